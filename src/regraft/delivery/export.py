"""Export: a Classifier as one file of ONNX or torch.export. The only file that knows onnx.

Nothing is committed before its outputs were those of regraft on real images.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import torch

from regraft.delivery.card import model_card
from regraft.delivery.deployed import Agreement, Deployed, Outputs, compared, quiet_exporters
from regraft.delivery.real_images import RealImages
from regraft.delivery.timm_folder import write_timm_folder
from regraft.documents import to_json
from regraft.errors import EnvironmentFault, UsageError
from regraft.models.classifier import Classifier
from regraft.run import Run, refuse_existing
from regraft.storage import make_folder, write_file

OPSET = 20  # of ONNX; read by onnxruntime 1.17 (2024) and later
ONNX_BYTES = 2**31  # protobuf's limit of one file
FORMS = ("onnx", "timm", "torch")


def export_classifier(
    classifier: Classifier,
    to: str,
    out: Path,
    real: RealImages,
    run: Run | None,
    license_: str,
) -> Agreement:
    """Writes the export and its model card, once it agrees with regraft.

    Raises:
        UsageError: There is something already, or timm has no network of this form.
        EnvironmentFault: ONNX is not installed.
        ArtefactError: The export says something else than regraft; nothing is written.
    """
    if to not in FORMS:
        raise UsageError(f"`--to {to}` is not known", hint=f"use {', '.join(FORMS)}")
    refuse_existing(out)
    make_folder(out.parent)
    if to == "timm":
        return write_timm_folder(classifier, out, real, run, license_)
    beside = out.with_suffix(".md")
    refuse_existing(beside)
    make, load = {"onnx": (_onnx, _onnx_outputs), "torch": (_program, _program_outputs)}[to]
    with quiet_exporters():
        content = make(Deployed(classifier), _metadata(classifier, license_))
        agreement = compared(classifier, real, load(content), to)
    card = model_card(classifier, run, to, agreement.told(), license_, out.name)
    write_file(beside, card.encode("utf-8"))
    write_file(out, content)
    return agreement


def _metadata(classifier: Classifier, license_: str) -> dict[str, str]:
    """Returns what a user of the file needs to know, as ONNX stores it: text by name."""
    return {
        "class_names": to_json(list(classifier.class_names)),
        "inputs": to_json(classifier.inputs.to_dict()),
        "architecture": classifier.backbone.arch,
        "license": license_,
        "lineage": to_json([dict(record) for record in classifier.lineage]),
    }


def _exported(deployed: Deployed) -> torch.export.ExportedProgram:
    inputs = deployed.inputs
    example = torch.zeros(2, inputs.channels, *inputs.size)
    return torch.export.export(
        deployed, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
    )


def _onnx(deployed: Deployed, metadata: Mapping[str, str]) -> bytes:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(
            f"ONNX needs `{error.name}`, which is not installed",
            hint="pip install 'regraft[onnx]'",
        ) from error
    program = torch.onnx.export(
        _exported(deployed), (), dynamo=True, input_names=["images"],
        output_names=["probabilities", "logits"], opset_version=OPSET, verbose=False,
    )  # fmt: skip
    assert program is not None
    model = program.model_proto
    if model.ByteSize() >= ONNX_BYTES:
        raise UsageError(
            f"ONNX holds at most {ONNX_BYTES:,} bytes in one file", hint="use `--to torch`"
        )
    onnx.helper.set_model_props(model, dict(metadata))
    model.producer_name = "regraft"
    return bytes(model.SerializeToString())


def _onnx_outputs(content: bytes) -> Outputs:
    from onnxruntime import InferenceSession

    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images_BCHW: session.run(["probabilities"], {"images": images_BCHW})[0]


def _program(deployed: Deployed, metadata: Mapping[str, str]) -> bytes:
    stream = io.BytesIO()
    extra = {"regraft.json": to_json(dict(metadata))}
    torch.export.save(_exported(deployed), stream, extra_files=extra)
    return stream.getvalue()


def _program_outputs(content: bytes) -> Outputs:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images_BCHW: module(torch.from_numpy(images_BCHW))[0].detach().numpy()
