"""Classifier: Backbone + Head, what is saved, evaluated and used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regraft.errors import ArtefactError
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone, refuse_unnamed_code
from regraft.models.head import Head
from regraft.storage import committed, read_json, verify_manifest, write_json, write_manifest

WEIGHTS, MODEL = "model.safetensors", "model.json"


class _ModelFile(BaseModel):
    """The shape of `model.json`: typed scalars and names only; nothing importable, no paths."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: int = Field(ge=1, le=1)
    arch: str = Field(max_length=300)
    inputs: dict[str, Any]
    class_names: list[str] = Field(min_length=2, max_length=100_000)
    lineage: list[dict[str, Any]]


class Classifier(nn.Module):
    """A Backbone and the Head for these class names.

    Attributes:
        class_names: In the order of the logits.
        lineage: One record for each training behind the weights, the oldest first.
    """

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
        """Writes the weights, what they mean, and last the manifest that makes them count."""
        folder.mkdir(parents=True, exist_ok=True)
        # safetensors refuses channels-last tensors: they are stored contiguous.
        state = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        with committed(folder / WEIGHTS) as temporary:
            save_file(state, temporary)
        document = _ModelFile(
            schema_version=1,
            arch=self.backbone.arch,
            inputs=self.inputs.to_dict(),
            class_names=list(self.class_names),
            lineage=[dict(record) for record in self.lineage],
        )
        write_json(folder / MODEL, document.model_dump(mode="json"))
        write_manifest(folder, [WEIGHTS, MODEL])

    @classmethod
    def load(cls, folder: str | Path, *, arch: str | None = None) -> "Classifier":
        """Reads a Run's `final` folder, or the Run itself.

        Args:
            folder: The folder.
            arch: For a user's own network, its `file.py:factory` once more: code that an
                artefact names is never imported unasked.

        Raises:
            ArtefactError: A file is missing, damaged or invalid.
        """
        folder = final_folder(Path(folder))
        verify_manifest(folder)
        try:
            document = _ModelFile.model_validate(read_json(folder / MODEL))
            state = load_file(folder / WEIGHTS)
        except (ValidationError, SafetensorError) as error:
            raise ArtefactError(
                f"`{folder}` is no classifier of this version: {str(error).splitlines()[0]}",
                hint="restore the folder from a copy, or train again",
            ) from error
        inputs = InputSpec.from_dict(document.inputs)
        backbone = Backbone.create(refuse_unnamed_code(document.arch, arch), inputs, seed=None)
        backbone.arch = document.arch
        backbone.random = frozenset()
        classifier = cls(backbone, tuple(document.class_names))
        classifier.lineage = tuple(document.lineage)
        classifier._load_exactly(state, folder)
        return classifier

    def _load_exactly(self, state: dict[str, Tensor], folder: Path) -> None:
        own = self.state_dict()
        wrong = [name for name in state.keys() ^ own.keys()]
        wrong += [
            name for name in state.keys() & own.keys() if state[name].shape != own[name].shape
        ]
        if not wrong and not all(_is_finite(tensor) for tensor in state.values()):
            raise ArtefactError(
                f"`{folder / WEIGHTS}` holds values that are not finite", hint="train again"
            )
        if wrong:
            raise ArtefactError(
                f"the weights in `{folder}` are not those of `{self.backbone.arch}`",
                problems=[f"`{name}`" for name in sorted(wrong)[:3]],
                hint="restore the folder from a copy, or use the timm version it was made with",
            )
        self.load_state_dict(state, assign=True)  # taken over as they are, not copied


def _is_finite(tensor: Tensor) -> bool:
    # Both ends are finite only where all values are; measured 3x faster than asking each.
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def final_folder(folder: Path) -> Path:
    """Returns where the classifier of a Run, or of a bare classifier folder, lies.

    Raises:
        ArtefactError: There is none.
    """
    for candidate in (folder / "final", folder):
        if (candidate / MODEL).is_file():
            return candidate
    raise ArtefactError(
        f"`{folder}` holds no trained classifier"
        if folder.exists()
        else f"run not found: `{folder}`",
        hint="name a folder that `regraft pretrain` or `regraft finetune` has finished",
    )
