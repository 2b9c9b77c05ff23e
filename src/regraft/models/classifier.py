"""Classifier: Backbone + Head, what is saved, evaluated and used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from regraft.documents import json_content, parse_json
from regraft.errors import ArtefactError, UsageError, count, shorten
from regraft.inputs import InputSpec
from regraft.manifests import Manifest
from regraft.models.architectures import refuse_larger, refuse_unnamed_code
from regraft.models.backbone import Backbone
from regraft.models.doubt import Doubt
from regraft.models.head import Head
from regraft.run import refuse_existing
from regraft.storage import Content, Store, holds, make_folder, write_folder
from regraft.tensors import MOST_BYTES, packed, unpacked

WEIGHTS, MODEL = "model.safetensors", "model.json"
MOST_MODEL_BYTES = 2**23  # of model.json: names of 100,000 classes; assumed


class Description(BaseModel):
    """The shape of `model.json`: typed scalars and names only; nothing importable, no paths."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: int = Field(ge=1, le=1)
    arch: str = Field(max_length=300)
    inputs: dict[str, Any]
    class_names: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        min_length=2, max_length=100_000
    )
    lineage: list[dict[str, Any]] = Field(max_length=1000)

    @field_validator("class_names")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise ValueError("two classes have one name")
        return names


class Classifier(nn.Module):
    """A Backbone and the Head for these class names.

    Attributes:
        class_names: In the order of the logits.
        lineage: One record for each training behind the weights, the oldest first.
        doubt: When it is unsure; None: nobody has measured it.
    """

    doubt: Doubt | None = None

    def __init__(self, backbone: Backbone, class_names: tuple[str, ...], *, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.width, len(class_names), seed=seed)
        self.class_names = tuple(class_names)
        self.lineage: tuple[Mapping[str, Any], ...] = ()

    @property
    def inputs(self) -> InputSpec:
        return self.backbone.inputs

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Returns logits_BK in float32."""
        logits_BK: Tensor = self.head(self.backbone(images_BCHW))
        return logits_BK

    def save(self, folder: Path) -> None:
        """Writes weights, what they mean and their manifest; the folder appears whole.

        Raises:
            UsageError: Something else is there already.
        """
        contents = self.contents()
        if not holds(folder, contents):
            refuse_existing(folder)
            make_folder(folder.parent)
            write_folder(folder, contents, "final")

    def contents(self) -> dict[str, Content]:
        """Returns the files that `save` writes, for a `Store`; the tensors are not copied."""
        document = Description(
            schema_version=1,
            arch=self.backbone.arch,
            inputs=self.inputs.to_dict(),
            class_names=list(self.class_names),
            lineage=[dict(record) for record in self.lineage],
        )
        return {
            WEIGHTS: packed(self.state_dict()),
            MODEL: json_content(document.model_dump(mode="json")),
            **({} if self.doubt is None else self.doubt.contents()),
        }

    @classmethod
    def load(
        cls, folder: str | Path, *, arch: str | None = None, needs_head: bool = True
    ) -> "Classifier":
        """Reads a Run's `final` folder, or the Run itself.

        Args:
            folder: The folder.
            arch: For a user's own network, its `file.py:factory` once more: code that an
                artefact names is never imported unasked.
            needs_head: Whether it is to classify; a start is not.

        Raises:
            ArtefactError: A file is missing, damaged or invalid; or it was imported without a head.
        """
        given, chosen = Path(folder), final_folder(Path(folder))
        while True:
            try:
                classifier = cls._read(chosen, arch)
                break
            except ArtefactError:  # a training may have put a better one in its place meanwhile
                if chosen == (chosen := final_folder(given)):
                    raise
        classifier._mind_import(given, needs_head)
        return classifier

    @classmethod
    def _read(cls, folder: Path, arch: str | None) -> "Classifier":
        manifest = Manifest.open(folder)
        manifest.refuse_strangers()
        description, state = read_description(manifest), read_weights(manifest)
        inputs = InputSpec.from_dict(description.inputs)
        named = refuse_unnamed_code(description.arch, arch)
        try:
            refuse_larger(named, inputs, sum(tensor.numel() for tensor in state.values()))
            backbone = Backbone.create(named, inputs, seed=None)
        except UsageError as error:
            if named == arch:
                raise
            raise ArtefactError(
                f"`{folder}` cannot be built: {error.message}",
                hint="restore the folder from a copy, or use the timm version it was made with",
            ) from error
        backbone.arch = description.arch
        backbone.random = frozenset()
        classifier = cls(backbone, tuple(description.class_names))
        classifier.lineage = tuple(description.lineage)
        classifier._load_exactly(state, folder)
        classifier.doubt = Doubt.read(manifest, backbone.width)
        return classifier

    def _mind_import(self, folder: Path, needs_head: bool) -> None:
        """Acts on what an import has left out; a training behind it has made up for that."""
        last = self.lineage[-1] if self.lineage else {}
        if last.get("verb") != "import":
            return
        if last.get("untrained"):
            self.backbone.random = frozenset(self.backbone.state_dict())
        if needs_head and (head := last.get("head")) != "kept":
            raise ArtefactError(
                f"`{folder}` cannot classify: it was imported without its head ({head})",
                hint=f"give it one: `regraft finetune DATA --start {folder} --out RUN`",
            )

    def _load_exactly(self, state: dict[str, Tensor], folder: Path) -> None:
        own = self.state_dict()
        wrong = [f"- `{name[:100]}`" for name in sorted(state.keys() - own.keys())]
        wrong += [f"+ `{name}`" for name in sorted(own.keys() - state.keys())]
        wrong += [
            f"~ `{name}` {_sides(state[name])} -> {_sides(own[name])}"
            for name in sorted(state.keys() & own.keys())
            if state[name].shape != own[name].shape
        ]
        if wrong:
            more = [f"... and {len(wrong) - 3} more"] if len(wrong) > 3 else []
            raise ArtefactError(
                f"the weights in `{folder}` are not those of `{self.backbone.arch}` with "
                f"{len(self.class_names)} classes: {count(len(wrong), 'tensor')} "
                f"{'differs' if len(wrong) == 1 else 'differ'} (- only in the file, + only in the "
                "network, ~ another shape)",
                problems=[*wrong[:3], *more],
                hint="restore the folder from a copy, or use the timm version it was made with",
            )
        self.load_state_dict(state, assign=True)  # taken over as they are, not copied


def _sides(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"


def _is_finite(tensor: Tensor) -> bool:
    # Both ends are finite only where all values are; measured 3x faster than asking each.
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def read_description(manifest: Manifest) -> Description:
    """Returns what `model.json` says.

    Raises:
        ArtefactError: It is not the file that was saved, or says things that no save writes.
    """
    path = manifest.folder / MODEL
    try:
        return Description.model_validate(parse_json(manifest.read(MODEL, MOST_MODEL_BYTES), path))
    except ValidationError as error:
        places = {".".join(map(str, entry["loc"]))[:80] for entry in error.errors()}
        raise ArtefactError(
            f"`{manifest.folder}` is no classifier of this version: "
            f"{shorten(sorted(places))} of `{MODEL}` does not fit",
            hint="restore the folder from a copy, or train again",
        ) from error


def read_weights(manifest: Manifest) -> dict[str, Tensor]:
    """Returns the tensors by name.

    Raises:
        ArtefactError: It is not the file that was saved, no safetensors, or has values that are not
            finite.
    """
    path = manifest.folder / WEIGHTS
    state = unpacked(manifest.read(WEIGHTS, MOST_BYTES), path)
    if wrong := sorted(name for name, tensor in state.items() if not _is_finite(tensor)):
        raise ArtefactError(
            f"`{path}` holds values that are not finite in {shorten(wrong)}", hint="train again"
        )
    return state


def final_folder(folder: Path) -> Path:
    """Returns where the classifier of a Run, or of a bare classifier folder, lies.

    That of a training which has not finished is the best that it has committed so far.

    Raises:
        ArtefactError: There is none.
    """
    if folder.is_file():
        raise refused_file(folder)
    best = Store(folder / "best", "best")
    newest = [best.path(number) for number in reversed(best.numbers())]
    for candidate in (folder / "final", *newest, folder):
        if (candidate / MODEL).is_file():
            return candidate
    raise ArtefactError(
        f"`{folder}` holds no trained classifier"
        if folder.exists()
        else f"run not found: `{folder}`",
        hint="name a folder that `regraft pretrain` or `regraft finetune` has finished",
    )


def refused_file(file: Path) -> ArtefactError:
    """Returns why a file is no model here, and what makes one of it."""
    with file.open("rb") as stream:
        magic = stream.read(8)
    foreign = {b"\x89HDF": "a file of HDF5, as Keras writes it", b"PK\x03\x04": "a zip"}
    what = foreign.get(magic[:4], "a file")
    if magic[:1] == b"\x80" or file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        what = "a pickle file, which may run code when it is read"
    return ArtefactError(
        f"`{file}` is {what}; a model of regraft is a folder",
        hint=f"make one of it: `regraft import {file} --arch ... --source '...' --out FOLDER`",
    )
