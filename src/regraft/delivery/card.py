"""Model card: what a model is, what it was made of, and what it is not. Hugging Face's format."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from regraft.errors import count
from regraft.manifests import read_document
from regraft.models.classifier import Classifier
from regraft.run import Run, elsewhere

METRICS = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1",
    "auroc": "AUROC", "nll": "negative log-likelihood", "ece": "expected calibration error",
}  # fmt: skip
LIMITS = """\
- It knows these classes only, and gives every image one of them; an image of something else too.
- The numbers hold for images like those it was judged on: the same devices, places and people.
- It is no medical device, and nobody has tried it in use.
"""
USES = {
    "onnx": """\
One file. Input `images`: float32, (batch, {channels}, {height}, {width}), in the values that the
files hold; resize by stretching, bilinear with antialiasing. Outputs `probabilities` and `logits`.
Class names and what it expects of an image are in the file's metadata.

```python
import json, onnxruntime
session = onnxruntime.InferenceSession("{name}")
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
probabilities = session.run(["probabilities"], {{"images": images}})[0]
```
""",
    "torch": """\
One file of `torch.export`. Input: float32, (batch, {channels}, {height}, {width}), in the values
that the files hold; resize by stretching, bilinear with antialiasing. Outputs: probabilities, and
logits. `extra_files={{"regraft.json": ""}}` of `torch.export.load` gets the class names.

```python
import torch
probabilities, logits = torch.export.load("{name}").module()(images)
```
""",
    "timm": """\
```python
import timm
model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(image)[None]).softmax(dim=1)
model.pretrained_cfg["label_names"]
```
""",
}


def model_card(
    classifier: Classifier, run: Run | None, form: str, agreement: str, license_: str, name: str
) -> str:
    """Returns the card.

    Args:
        classifier: Whose it is.
        run: That made it; None for a bare Classifier.
        form: onnx, timm or torch.
        agreement: How the export was checked.
        license_: Of the weights, as Hugging Face names it.
        name: Of the exported file or folder.
    """
    evaluation = _evaluation(run)
    inputs = classifier.inputs
    height, width = inputs.size
    use = USES[form].format(name=name, channels=inputs.channels, height=height, width=width)
    classes = ", ".join(_plain(each) for each in classifier.class_names)
    sections = {
        "Use": f"{use}\nChecked before it was written: {agreement}.",
        "Classes": f"{count(len(classifier.class_names), 'class', 'classes')}, in this order: "
        f"{classes}",
        "Images": f"{height} x {width} px, {count(inputs.channels, 'channel')}, "
        f"{inputs.bit_depth} bits; {inputs.told_range()}; mean {_numbers(inputs.mean)}, standard "
        f"deviation {_numbers(inputs.std)} of the training images.",
        "Where the weights come from": "\n".join(_origin(classifier)),
        "Recipe": _recipe(run),
        "How good it is": "\n".join(_quality(run, evaluation)),
        "Limits": LIMITS,
    }
    front = "\n".join(_front_matter(classifier, run, form, license_, evaluation))
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items())
    return f"---\n{front}\n---\n\n# {_plain(_name(classifier, run))}\n\n{body}\n"


def _front_matter(
    classifier: Classifier, run: Run | None, form: str, license_: str, evaluation: Any
) -> Iterator[str]:
    """Yields lines of YAML; strings are quoted as in JSON, which YAML reads."""
    yield f"license: {json.dumps(license_)}"
    yield f"library_name: {'timm' if form == 'timm' else json.dumps(form)}"
    yield "pipeline_tag: image-classification"
    yield "tags:"
    yield from ("- image-classification", "- regraft")
    if evaluation is None or run is None:
        return
    yield "model-index:"
    yield f"- name: {json.dumps(_name(classifier, run))}"
    yield "  results:"
    yield "  - task:"
    yield "      type: image-classification"
    yield "    dataset:"
    yield f"      name: {json.dumps(run.record['data']['name'])}"
    yield f"      type: {json.dumps(run.record['data']['fingerprint'])}"
    yield f"      split: {evaluation['split']}"
    yield "    metrics:"
    for key, told in METRICS.items():
        if evaluation[key]["value"] is not None:
            yield f"    - type: {key}"
            yield f"      value: {evaluation[key]['value']:.6g}"
            yield f"      name: {told}"


def _origin(classifier: Classifier) -> Iterator[str]:
    sources = elsewhere(classifier.lineage)
    told = "; ".join(_plain(source) for source in sources)
    yield f"Weights from elsewhere: {told or 'none'}."
    yield ""
    for record in classifier.lineage:
        images = record.get("train_images")
        trained = f", {images:,} training images" if images else ""
        data = f"data fingerprint `{record['data']}`" if record.get("data") else "data not known"
        arch = _plain(str(record.get("arch", classifier.backbone.arch)))
        yield f"- {record.get('verb')}: {arch}{trained}, {data}"


def _recipe(run: Run | None) -> str:
    if run is None:
        return "Not known: the classifier stands alone, without the run that made it."
    return f"```json\n{json.dumps(run.record['recipe'], indent=1)}\n```"


def _quality(run: Run | None, evaluation: Any) -> Iterator[str]:
    if evaluation is None:
        yield "Not measured: `regraft evaluate` had not been run when this was written."
        return
    yield f"{evaluation['n']:,} images, split {evaluation['split']}; 95 % intervals."
    yield ""
    yield "| metric | value | from | to |"
    yield "|---|---|---|---|"
    for key, told in METRICS.items():
        numbers = [evaluation[key][part] for part in ("value", "low", "high")]
        shown = [" - " if number is None else f"{number:.4f}" for number in numbers]
        yield f"| {told} | {' | '.join(shown)} |"
    if verdict := _verdict(run):
        yield ""
        yield verdict


def _verdict(run: Run | None) -> str:
    """Returns what the comparison found of which the Run is an arm; empty for none."""
    place = None if run is None else run.folder.resolve().parent / "comparison.json"
    if run is None or place is None or not place.is_file():
        return ""
    if not run.folder.resolve().name.startswith(("transfer-", "scratch-")):
        return ""
    found = read_document(place.parent, place.name)
    ends = [found["low"], found["high"]]
    interval = " to ".join("unknown" if end is None else f"{end:+.3f}" for end in ends)
    return (
        f"Did the transfer help? **{found['verdict']}**: {found['metric'].replace('_', ' ')} "
        f"{found['difference']:+.3f} over training from scratch (95 % interval {interval}), "
        f"{count(found['num_seeds'], 'seed')}, {count(found['num_images'], 'test image')}."
    )


def _evaluation(run: Run | None) -> dict[str, Any] | None:
    """Returns what `evaluate` has found of this Run, if it did."""
    found = None if run is None else run.evaluation()
    return found if run and found and found.get("run") == run.record["id"] else None


def _name(classifier: Classifier, run: Run | None) -> str:
    data = f" on {run.record['data']['name']}" if run is not None else ""
    return f"{classifier.backbone.arch}{data}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _plain(text: str) -> str:
    """Returns a name that Markdown and HTML show as it is."""
    marks: Mapping[int, str] = {ord(mark): f"\\{mark}" for mark in "\\`*_[]<>#|!"}
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return shown.translate(dict(marks))
