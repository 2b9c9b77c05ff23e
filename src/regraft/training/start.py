"""Start: a trained classifier whose backbone is carried over to other images and classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from regraft.data.dataset import Dataset, unusable
from regraft.data.decode import UnreadableImage
from regraft.data.precheck import Known
from regraft.errors import count, shorten
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.models.weights import Move, transplant
from regraft.run import Run, elsewhere
from regraft.training.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """A trained classifier whose backbone is to be transplanted, again and again."""

    folder: Path
    classifier: Classifier
    run: Run | None
    arch: str
    adapt: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path, arch: str | None, adapt: Sequence[str]) -> "Start":
        """Reads a Run, or a bare classifier folder.

        Raises:
            ArtefactError: It is none, or damaged.
        """
        if folder.name == "final" and (folder.parent / "run.json").is_file():
            folder = folder.parent  # the Run knows which images its weights have seen
        run = Run.open(folder) if (folder / "run.json").is_file() else None
        classifier = Classifier.load(folder, arch=arch, needs_head=False)
        return cls(folder, classifier, run, arch or classifier.backbone.arch, tuple(adapt))

    def inputs(self, recipe: Recipe, dataset: Dataset) -> InputSpec:
        """Returns what the transplanted backbone expects; mean and std stay the start's."""
        own = self.classifier.inputs
        size = own.size if recipe.image_size == "auto" else recipe.image_size
        channels = dataset.channels if "channels" in self.adapt else own.channels
        if recipe.channels != "auto":
            channels = recipe.channels
        return replace(own.with_channels(channels), size=size)

    def random_backbone(self, inputs: InputSpec, seed: int | None) -> Backbone:
        """Returns the architecture with random weights; seed None: with none worth the name."""
        return Backbone.create(self.arch, inputs, seed=seed)

    def backbone(self, inputs: InputSpec, seed: int) -> tuple[Backbone, list[Move]]:
        """Returns a new backbone with the start's weights, and the table of what moved."""
        # Where every tensor is taken over, none need be drawn first.
        target = self.random_backbone(inputs, seed if self.adapt else None)
        source = self.classifier.backbone.resized(inputs.size)
        return target, transplant(source, target, self.adapt)

    def record(self, moves: Sequence[Move], dataset: Dataset) -> dict[str, Any]:
        """Returns what the new Run keeps of its start."""
        head, names = self.classifier.head, self.classifier.class_names
        rows = [vars(move) for move in moves]
        rows.append(_head_row("dropped", head.in_features, len(names)))
        rows.append(_head_row("new", head.in_features, len(dataset.class_names)))
        return {
            "verb": "finetune",
            "start": {
                "run": self.run.record["id"] if self.run else None,
                "arch": self.classifier.backbone.arch,
                "class_names": list(names),
                "data": [record["data"] for record in self.classifier.lineage if "data" in record],
                "elsewhere": elsewhere(self.classifier.lineage),
            },
            "transplant": rows,
            "lineage": self.classifier.lineage,
            "seen": self.known.splits,
            "hashes": self.known.hashes,
        }

    @cached_property
    def known(self) -> Known:
        """What is known of the images that its weights have seen."""
        return Known({}, {}) if self.run is None else Known(self.run.seen(), self.run.hashes())

    def unseen(self, dataset: Dataset) -> Dataset:
        """Returns the dataset, without test images that the start was trained on where allowed.

        Raises:
            DataError: There are some, and nobody has allowed to leave them out.
        """
        used = {sha256 for sha256, split in self.known.splits.items() if split != "test"}
        known = [s for s in dataset.samples if s.split == "test" and s.sha256 in used]
        if known and "leak" in dataset.options.allow:
            reason = UnreadableImage("leak", "the start was trained on it")
            return dataset.without([(sample, reason) for sample in known])
        if known:
            raise unusable(
                dataset.root,
                [
                    f"the start was trained on {count(len(known), 'test image')}, "
                    f"e.g. {shorten(sample.path for sample in known)}"
                ],
                hint="use other test images, or a start that has not seen these, or leave them "
                "out with `--allow leak`",
            )
        return dataset


def transplant_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of what moved, for people."""
    lines = ["transplant:   part      what      tensors  values (millions)"]
    for row in rows:
        millions = row["num_values"] / 1e6
        lines.append(
            f"{'':14}{row['stage']:<9} {row['what']:<9} {row['num_tensors']:>7}  {millions:.3f}"
        )
    taken = sum(row["num_values"] for row in rows if row["what"] == "taken")
    backbone = sum(row["num_values"] for row in rows if row["stage"] != "head")
    lines.append(
        f"              {taken / backbone:.1%} of the backbone taken, checked after loading"
    )
    return "\n".join(lines)


def _head_row(what: str, width: int, num_classes: int) -> dict[str, Any]:
    return {
        "stage": "head",
        "what": what,
        "num_tensors": 2,
        "num_values": (width + 1) * num_classes,
    }
