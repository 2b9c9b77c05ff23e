"""The page about Runs and comparisons."""

import itertools
import json
import re
import struct
import zlib
from collections.abc import Mapping
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from regraft.delivery.pages import source_hash
from regraft.delivery.report import write_report
from regraft.errors import ArtefactError, UsageError, readable
from signing import sign

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></table></main>",
    "{{ 7 * 7 }}",
    "$x$ & <b>&amp;",
    "cat\u202egnp.exe\n\x1b[2J\x00",
    "caf\udce9",
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A parsed page: its elements, its text, and whether they nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_bytes().decode("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.nests = True
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.nests = self.nests and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def png() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\x00\x00\xff\x00\xff\x00")
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="ascii")
    seal(path.parent)


def seal(folder: Path) -> None:
    """Lets the manifest vouch for the files as they are, as that of a Run or comparison does."""
    if any((folder / name).is_file() for name in ("run.json", "comparison.json")):
        sign(folder)


def edit(path: Path, changes: Mapping[str, Any]) -> None:
    write(path, json.loads(path.read_text()) | changes)


def make_run(
    folder: Path,
    *,
    verb: str = "finetune",
    names: tuple[str, ...] = ("even", "odd"),
    status: Mapping[str, Any] | None = None,
    seed: int = 0,
    num_mistakes: int = 2,
) -> Path:
    phase = {"learns": "all", "epochs": 3, "lr": 0.0123, "warmup": 0.05, "batch_norm": "frozen"}
    record: dict[str, Any] = {
        "schema": 1,
        "verb": verb,
        "arch": "resnet18",
        "backbone_parameters": 11176512,
        "recipe": {"goal": "transfer", "seed": seed, "image_size": [32, 48], "phases": [phase]},
        "inputs": {"size": [32, 48], "channels": 3, "bit_depth": 8, "decoder": "pillow-1"},
        "data": {
            "name": names[0],
            "fingerprint": "41119a46bfede497",
            "class_names": list(names),
            "options": {"csv": None, "image_column": "image", "relabel": [], "allow": []},
            "splits": {"train": 20, "val": 21, "test": 757},
            "excluded": 1,
            "notes": [f"test has no images of `{names[-1]}`"],
        },
        "start": None,
        "transplant": None,
        "engine": {"device": "cpu", "precision": "bf16"},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "id": "2c6da0bb9e221cef",
    }
    if verb == "finetune":
        start = {"run": "f26586c38530bc3b", "arch": "resnet18", "class_names": list(names)}
        record["start"] = start | {"data": ["bdba1fd2"]}
        move = {"stage": "stage 1", "what": "taken", "num_tensors": 6, "num_values": 9665}
        record["transplant"] = [move, move | {"stage": "head", "what": "new", "num_values": 1026}]
    write(folder / "run.json", record)
    write(folder / "status.json", status or {"state": "finished", "best_epoch": 2})
    excluded = {"path": f"{names[0]}.tif", "excluded": "truncated"}
    (folder / "samples.jsonl").write_text(json.dumps(excluded) + "\n", encoding="ascii")
    with (folder / "metrics.jsonl").open("w") as stream:
        for epoch in (1, 2, 3):
            line = {"epoch": epoch, "num_epochs": 3, "learns": "all", "train_loss": 1 / epoch}
            line |= {"val_loss": 0.9 / epoch, "val_balanced_accuracy": 0.3 * epoch}
            stream.write(json.dumps(line) + "\n")
    (folder / "times.jsonl").write_text('{"epoch": 3, "elapsed_s": 720.0}\n')
    write(folder / "evaluation.json", evaluation_of(names, num_mistakes))
    (folder / "mistakes").mkdir()
    for number in range(num_mistakes):
        (folder / "mistakes" / f"{number:03d}.png").write_bytes(png())
    seal(folder)
    return folder


def evaluation_of(names: tuple[str, ...], num_mistakes: int) -> dict[str, Any]:
    metrics = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "ece")
    values = {
        metric: {"value": 0.71115 + number / 10, "low": 0.1234, "high": 0.9876}
        for number, metric in enumerate(metrics)
    }
    row = {"n": 375, "precision": 0.9304, "recall": None, "f1": 0.2468}
    wrong = {"truth": names[0], "predicted": names[-1], "probability": 0.98765}
    return {
        "schema": 1,
        "run": "2c6da0bb9e221cef",
        "split": "test",
        "n": 757,
        **values,
        "class_names": list(names),
        "confusion": [[3341] * len(names) for _ in names],
        "per_class": [{"class": name, **row} for name in names],
        "mistakes": [wrong | {"path": f"{names[0]}/{i}.png"} for i in range(num_mistakes)],
    }


def make_comparison(
    folder: Path, *, verdict: str = "helped", seeds: tuple[int, ...] = (0, 1)
) -> Path:
    sign = -1 if verdict == "hurt" else 1
    arm = {
        metric: {"mean": 0.81777, "std": 0.02711, "values": [0.79, 0.84]}
        for metric in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "ece")
    }
    single = {metric: {"mean": 0.90989, "std": None, "values": [0.90989]} for metric in arm}
    comparison = {
        "schema": 1,
        "verdict": verdict,
        "metric": "balanced_accuracy",
        "difference": sign * 0.09218,
        "low": -0.06441 if verdict == "cannot tell" else min(sign * 0.06441, sign * 0.12017),
        "high": sorted([sign * 0.06441, sign * 0.12017])[1],
        "per_seed": [sign * 0.07, sign * 0.11],
        "num_seeds": 2,
        "num_images": 757,
        "least_detectable": 0.01889,
        "sign_flip_p": None,
        "mcnemar_p": [0.00002, 0.45678],
        "delong_p": [0.00003, 0.00004],
        "seconds": {"transfer": 4.0, "scratch": 9.0},
        "curve": [],
        "saved_images": None,
        "arms": {"transfer": arm, "scratch": arm, "probe_transplanted": single},
        "chance_balanced_accuracy": 0.25,
        "data": {"name": "even-odd", "fingerprint": "4111", "splits": {"test": 757}},
    }
    write(folder / "comparison.json", comparison)
    for seed in seeds:
        make_run(folder / f"transfer-{seed}", seed=seed)
        make_run(folder / f"scratch-{seed}", seed=seed, verb="pretrain")
    return folder


def page_of(out: Path, *folders: Path) -> Page:
    return Page(write_report(list(folders), out / "page" / "report.html"))


@pytest.mark.parametrize(
    ("verdict", "told", "direction"),
    [
        ("helped", "The transfer helped", "0.092 higher"),
        ("hurt", "The transfer hurt", "0.092 lower"),
        ("cannot tell", "Cannot tell whether the transfer helped", "0.092 higher"),
    ],
)
def test_the_verdict_comes_first(tmp_path: Path, verdict: str, told: str, direction: str) -> None:
    text = page_of(tmp_path, make_comparison(tmp_path / "c", verdict=verdict)).text
    places = [text.index(word) for word in (told, direction, "Learning curves", "Recipe")]
    assert places == sorted(places)
    assert text.index(told) < 150
    for number in ("0.064", "0.120", "757 images", "over 2 seeds", "0.019"):
        assert number in text[: text.index("Transfer against scratch")]
    assert ("The interval includes no difference" in text) == (verdict == "cannot tell")


@pytest.mark.fault("L4")
def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    comparison, run = make_comparison(tmp_path / "c"), make_run(tmp_path / "r")
    page = page_of(tmp_path, comparison, run)
    assert not re.search(r"https?:|[\"'(]//|@import|url\((?!#)", page.source)
    loading = {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not loading & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in {"src", "href", "xlink:href"} & attributes.keys():
            expected = "data:image/png;base64," if tag == "img" else "#"
            assert str(attributes[name]).startswith(expected)
    assert page.count("style") == 1
    policy = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    style = source_hash(page.source.split("<style>")[1].split("</style>")[0])
    assert policy == [f"default-src 'none'; style-src {style}; img-src data:"]
    assert not any("style" in attributes for _, attributes in page.elements)


@pytest.mark.fault("L1")
def test_hostile_class_names_stay_text(tmp_path: Path) -> None:
    plain = page_of(tmp_path, make_run(tmp_path / "a", names=("a", "b", "c", "d", "e", "f", "g")))
    hostile = page_of(tmp_path, make_run(tmp_path / "b", names=HOSTILE))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert plain.nests
    assert hostile.nests
    assert hostile.open == []
    assert [sorted(a) for _, a in hostile.elements] == [sorted(a) for _, a in plain.elements]
    for name in HOSTILE[:5]:
        assert name in hostile.text
    assert r"cat\u202egnp.exe\u000a\u001b[2J\u0000" in hostile.text
    assert r"caf\udce9" in hostile.text
    assert not re.search("[\u202e\x1b\x00]", hostile.source)


@pytest.mark.fault("L9")
def test_hidden_characters_are_spelled_out_and_letters_are_not() -> None:
    assert (
        readable("a\u202eb\u2066\u200b\u2028\u2029\x7f")
        == r"a\u202eb\u2066\u200b\u2028\u2029\u007f"
    )
    assert readable("\U000e0001") == r"\U000e0001"
    assert (
        readable("Größe, 膝, می\u200cخواهم, 👩\u200d🔬") == "Größe, 膝, می\u200cخواهم, 👩\u200d🔬"
    )


@pytest.mark.fault("L7")
@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"state": "interrupted", "best_epoch": 2}, "interrupted after epoch 3 of 3"),
        ({"state": "running"}, "running, or ended without a word"),
        ({"state": "failed", "reason": "loss is NaN"}, "failed: loss is NaN"),
    ],
)
def test_an_unfinished_run_says_so_at_the_top(
    tmp_path: Path, status: dict[str, Any], told: str
) -> None:
    page = page_of(tmp_path, make_run(tmp_path / "r", status=status))
    assert page.text.index(told) < page.text.index("Balanced accuracy")
    comparison = make_comparison(tmp_path / "c")
    assert told not in page_of(tmp_path, comparison).text
    write(comparison / "scratch-1" / "status.json", status)
    text = page_of(tmp_path, comparison).text
    assert text.index(f"scratch-1: {told}") < text.index("The transfer helped")


def add_search(run: Path, *best: tuple[str, float]) -> None:
    """Makes the Run one of a search: `firm` won, and the last of `best` is kept."""
    phase = {"epochs": 7, "lr_factor": 3.0, "warmup": 0.05, "batch_norm": "adapt"}
    head = phase | {"learns": "head", "lr": 0.0077, "epochs": 1}
    winner = {"name": "firm", "phases": [head, phase | {"learns": "all", "lr": 0.0042}]}
    plan = {"candidates": [winner], "rungs": [], "folds": 0, "epochs": 9}
    write(run / "winner.json", plan)
    write(run / "plan.json", plan | {"candidates": [winner, winner | {"name": "bold"}]})
    trials = [("bold", 0.3, False), *((name, share, True) for name, share in best)]
    with (run / "trials.jsonl").open("w") as trial_lines, (run / "times.jsonl").open("w") as times:
        for name, share, is_best in trials:
            line = {"candidate": name, "share": share, "loss": 0.1, "balanced_accuracy": 0.9}
            trial_lines.write(json.dumps(line | {"is_best": is_best}) + "\n")
            times.write(json.dumps({"candidate": name, "elapsed_s": 5.0}) + "\n")
    seal(run)


def test_the_recipe_is_the_one_that_the_search_carried_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    add_search(run, ("probe", 0), ("firm", 1))
    page = page_of(tmp_path, run)
    assert "learns head all" in page.text
    assert "epochs 1 9" in page.text
    assert "lr 0.0077 0.0042" in page.text
    assert "0.0123" not in page.text  # of the recipe that asked for the search
    assert "The run holds firm , trained on the full schedule" in page.text
    assert "best epoch 2" in page.text
    assert re.search(r"probe best so far .* firm kept", page.text)


@pytest.mark.parametrize(
    ("kept", "share", "told"),
    [
        ("adapted", 0, "a ridge head on frozen features, with BatchNorm statistics"),
        ("firm", 0.3, "from its short trial: the full training was no better"),
        ("50% of firm", 1, "weights between those before and after the training"),
        ("bold", 0.3, "from its short trial"),
    ],
)
def test_an_epoch_is_marked_only_if_its_weights_were_kept(
    tmp_path: Path, kept: str, share: float, told: str
) -> None:
    run = make_run(tmp_path / "r")
    add_search(run, ("firm", 1))
    marked = page_of(tmp_path, run)
    add_search(run, ("firm", 1), (kept, share))
    page = page_of(tmp_path, run)
    assert "best epoch 2" not in page.text
    assert f"The run holds {kept} , {told}" in page.text
    assert page.source.count("<use") < marked.source.count("<use")


def test_a_solved_head_has_no_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", status={"state": "finished", "best_epoch": None})
    add_search(run, ("head", 1))
    line = {"epoch": 0, "num_epochs": 0, "learns": "head", "train_loss": 0.5, "val_loss": None}
    write(run / "metrics.jsonl", line | {"val_balanced_accuracy": None})
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "\n")
    seal(run)
    page = page_of(tmp_path, run)
    assert "No epochs: the head was solved" in page.text
    assert "0 of 0" not in page.text
    assert page.count("figure") == marked_figures(page)


def marked_figures(page: Page) -> int:
    """Figures other than curves: the confusion matrix and the mistakes."""
    return page.count("img") + 1


def test_too_few_seeds_are_named_where_they_are_why_nothing_is_told(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "c", verdict="cannot tell")
    edit(comparison / "comparison.json", {"low": 0.01})
    assert "So few seeds never give a verdict" in page_of(tmp_path, comparison).text
    edit(comparison / "comparison.json", {"num_seeds": 6})
    assert "So few seeds" not in page_of(tmp_path, comparison).text


def test_a_run_that_died_at_once_can_be_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    for name in ("status.json", "metrics.jsonl", "times.jsonl", "evaluation.json"):
        (run / name).unlink()
    text = page_of(tmp_path, run).text
    assert "running, or ended without a word, before the first epoch ended" in text
    assert "No epoch has ended yet." in text
    assert "Not evaluated yet" in text


def test_allowed_findings_and_a_foreign_evaluation_are_told_at_the_top(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    record = json.loads((run / "run.json").read_text())
    record["data"]["options"]["allow"] = ["leak"]
    write(run / "run.json", record)
    edit(run / "evaluation.json", {"run": "0000"})
    top = page_of(tmp_path, run).text.split("Fine-tuning")[0]
    assert "allowed by name: leak" in top
    assert "belongs to another run, 0000" in top


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = make_comparison(tmp_path / "c")
    first = write_report([comparison], tmp_path / "1.html").read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert write_report([comparison], tmp_path / "2.html").read_bytes() == first
    edit(comparison / "comparison.json", {"per_seed": [0.01, 0.17]})
    assert write_report([comparison], tmp_path / "2.html").read_bytes() != first


def test_the_users_own_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    run = make_run(tmp_path / "r")
    first = write_report([run], tmp_path / "1.html").read_bytes()
    with matplotlib.rc_context({"axes.linewidth": 7, "font.size": 40}):
        assert write_report([run], tmp_path / "2.html").read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 40


def test_numbers_on_the_page_are_those_of_the_files(tmp_path: Path) -> None:
    text = page_of(tmp_path, make_run(tmp_path / "r")).text
    for shown in (
        "accuracy 0.711 0.123 to 0.988",
        "AUROC 1.011 0.123 to 0.988",
        "even 3,341 3,341",
        "even 375 0.930 – 0.247",
        "probability 0.988 even/1.png",
        "stage 1 taken 6 9,665",
        "images for validation 21",
        "lr 0.0123",
        "image size 32 × 48",
        "backbone parameters 11,176,512",
        "best epoch 2",
        "training took 12 min",
        "even.tif : truncated",
    ):
        assert shown in text, shown
    text = page_of(tmp_path, make_comparison(tmp_path / "c")).text
    assert "scratch 2 0.818 ± 0.027 0.818 ± 0.027" in text
    assert "probe, transplanted 1 0.910 0.910" in text
    assert "McNemar’s test of accuracy, largest of the seeds p = 0.457" in text
    assert "DeLong’s test of AUROC, largest of the seeds p < 0.001" in text
    assert "chance – – 0.250 –" in text


def test_a_comparison_without_its_runs_still_shows_its_verdict(tmp_path: Path) -> None:
    text = page_of(tmp_path, make_comparison(tmp_path / "c", seeds=())).text
    assert "The transfer helped" in text
    assert "curves are not shown" in text


def test_the_first_run_is_that_of_the_lowest_seed(tmp_path: Path) -> None:
    text = page_of(tmp_path, make_comparison(tmp_path / "c", seeds=(10, 9))).text
    assert "The first transfer run, transfer-9" in text
    assert text.index("seed 9") < text.index("seed 10")


def test_mistakes_stand_in_order_and_no_more_than_24(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", num_mistakes=30)
    (run / "mistakes" / "003.png").write_bytes(b"GIF89a")
    (run / "mistakes" / "004.png").unlink()
    page = page_of(tmp_path, run)
    alternatives = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    kept = [number for number in range(24) if number not in (3, 4)]
    assert alternatives == [f"even/{number}.png: even, taken for odd" for number in kept]
    assert page.text.count("no thumbnail") == 2


@pytest.mark.fault("L6")
def test_thousands_of_classes_make_no_endless_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", names=("a", "b"), num_mistakes=0)
    names = [f"class {number}" for number in range(5000)]
    document = evaluation_of(("a", "b"), 0)
    row = document["per_class"][0]
    rows = [row | {"class": name} for name in names]
    write(run / "evaluation.json", document | {"class_names": names, "per_class": rows})
    edit_names = json.loads((run / "run.json").read_text())
    edit_names["data"]["class_names"] = names
    write(run / "run.json", edit_names)
    excluded = [json.dumps({"path": f"{i}.tif", "excluded": "truncated"}) for i in range(5000)]
    (run / "samples.jsonl").write_text("\n".join([*excluded, ""]))
    seal(run)
    page = page_of(tmp_path, run)
    assert len(page.source) < 500_000
    assert "5000 classes:" in page.text
    assert "and 4950 more" in page.text
    assert "The first 200 of 5000 classes" in page.text


@pytest.mark.fault("L6")
def test_a_confusion_matrix_too_large_to_read_is_left_out(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(31))
    page = page_of(tmp_path, make_run(tmp_path / "large", names=names))
    assert "The confusion matrix of 31 classes is too large" in page.text
    assert "3,341" not in page.text
    assert "3,341" in page_of(tmp_path, make_run(tmp_path / "small", names=names[:30])).text


@pytest.mark.fault("L10")
def test_the_page_tells_no_absolute_path(tmp_path: Path) -> None:
    reason = (
        "`/home/al ice/x/metrics.jsonl` cannot be written; see /home/alice/log and C:\\bob\\log"
    )
    run = make_run(tmp_path / "r", status={"state": "failed", "reason": reason})
    record = json.loads((run / "run.json").read_text())
    record["arch"] = "/home/alice/nets.py:small"
    record["data"]["options"]["csv"] = "/home/alice/list.csv"
    write(run / "run.json", record)
    page = page_of(tmp_path, run)
    assert not re.search(f"al ice|alice|bob|{re.escape(str(tmp_path))}", page.source)
    for kept in ("`…/metrics.jsonl` cannot be written", "…/nets.py:small", "…/list.csv"):
        assert kept in page.text


def test_headings_stand_in_order_and_tables_have_headers(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_comparison(tmp_path / "c"), make_run(tmp_path / "r"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(a.get("scope") in ("row", "col") for tag, a in page.elements if tag == "th")
    assert page.count("caption") == page.count("table")
    assert all(a.get("alt") for tag, a in page.elements if tag == "img")
    assert page.count("figcaption") == page.count("figure")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {"part-1", "part-2"} <= set(ids)


def test_what_is_no_run_and_no_comparison_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="neither a run nor a comparison"):
        write_report([tmp_path / "empty"], out)
    with pytest.raises(ArtefactError, match="does not exist"):
        write_report([tmp_path / "nothing"], out)
    cut = make_comparison(tmp_path / "cut")
    (cut / "comparison.json").unlink()
    with pytest.raises(ArtefactError, match="the comparison has not finished") as caught:
        write_report([cut], out)
    assert "transfer-0" in caught.value.hint
    later = make_comparison(tmp_path / "later")
    edit(later / "comparison.json", {"schema": 2})
    with pytest.raises(ArtefactError, match="has schema 2"):
        write_report([later], out)
    assert not out.exists()


def test_a_file_that_lacks_something_is_an_error_and_leaves_no_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    whole = json.loads((run / "evaluation.json").read_text())
    for missing in ("per_class", "auroc", "n"):
        document = deepcopy(whole)
        del document[missing]
        write(run / "evaluation.json", document)
        with pytest.raises(ArtefactError, match=missing):
            write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.fault("I2")
@pytest.mark.parametrize(
    "name", ["comparison.json", "transfer-0/evaluation.json", "transfer-0/times.jsonl"]
)
def test_a_number_that_was_edited_is_never_shown(tmp_path: Path, name: str) -> None:
    comparison = make_comparison(tmp_path / "c")
    text = (comparison / name).read_text()
    (comparison / name).write_text(text.replace("0", "1", 1))
    with pytest.raises(ArtefactError, match="is damaged or was changed"):
        write_report([comparison], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_only_a_page_is_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    before = (run / "run.json").read_bytes()
    with pytest.raises(UsageError, match="no HTML page"):
        write_report([run], run / "run.json")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match="no HTML page"):
        write_report([run], tmp_path / "folder.html")
    assert (run / "run.json").read_bytes() == before
    out = tmp_path / "report.html"
    out.write_text("old")
    assert write_report([run], out).read_text() != "old"
