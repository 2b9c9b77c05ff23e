"""One training from data to a finished Run: prepare, train, write."""

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.batches import ONLY, Shard, eval_batches
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset, unusable
from regraft.data.decode import UnreadableImage
from regraft.data.finding import Finding
from regraft.data.intensity import refuse_unclear, with_range
from regraft.data.precheck import (
    Known,
    accepted,
    encoded_hash,
    pictures_of,
    precheck,
    start_findings,
    told,
)
from regraft.engine import Engine
from regraft.errors import RegraftError, count, shorten
from regraft.evaluation.predictions import eval_batch, infer
from regraft.evaluation.testing import fitting_channels, labelled
from regraft.inputs import InputSpec
from regraft.locks import writing
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.models.weights import Move, transplant
from regraft.progress import Note, OnProgress, counting, duration, quiet
from regraft.run import FAILED, FINISHED, INTERRUPTED, Run, elsewhere, refuse_existing
from regraft.training.auto import Trial, tune
from regraft.training.feeds import Material
from regraft.training.loop import Epoch, Step, fit, to_json
from regraft.training.losses import SYNC_STEPS, Diverged
from regraft.training.optim import (
    adapt_batch_norm,
    refuse_frozen_random,
    refuse_missing_stages,
    refuse_single_images,
)
from regraft.training.plan import Plan, refuse_unfitting_plan
from regraft.training.recipe import Recipe

POOLED_BELOW = 500  # images: fewer are judged in folds, not by a small split; assumed
DEFAULT_SIZE = (224, 224)  # Krizhevsky et al. 2012 and most architectures since


class Stopped(RegraftError):
    """A signal ended the training; what was learned so far is saved."""

    code = "stopped"

    def __init__(self, run: Run, number: int, best: int | None) -> None:
        what = f"epoch {best}, the best so far, is" if best else "what was learned so far is"
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {what} saved in `{run.folder}`",
            hint=f"it can be used as it is: `regraft evaluate {run.folder} DATA`",
        )
        self.exit_code = 128 + number  # type: ignore[misc]


@dataclass(frozen=True)
class Trained:
    """What a training leaves: the Run, the Classifier in it, and the plan of a search's winner."""

    run: Run
    classifier: Classifier
    plan: Plan | None


@dataclass
class _Kept:
    """What a training tells, written into its Run."""

    run: Run
    classifier: Classifier
    writes: bool
    best: int | None = None
    chosen: str | None = None
    plan: Plan | None = None

    @property
    def status(self) -> dict[str, Any]:
        return {"best_epoch": self.best} | ({"chosen": self.chosen} if self.chosen else {})

    def take(self, told: object) -> None:
        if isinstance(told, Epoch):
            self.best = told.epoch if told.is_best else self.best
            if self.writes:
                self.run.append_epoch(*to_json(told))
        elif isinstance(told, Trial):
            self.chosen = told.candidate if told.is_best else self.chosen
            if self.writes:
                self.run.append_trial(*told.to_json())
                if told.is_best:  # from here on the Run holds a classifier, whatever comes
                    self.run.keep_best(self.classifier.contents())
        elif isinstance(told, Plan):
            if self.writes:
                name = "plan.json" if self.plan is None else "winner.json"
                self.run.write(name, told.model_dump(mode="json"))
            self.plan = told


@dataclass(frozen=True)
class Session:
    """What one dataset needs to be trained on, once for all seeds and arms of a comparison."""

    dataset: Dataset
    cache: Cache
    inputs: InputSpec
    engine: Engine
    on_progress: OnProgress
    findings: tuple[Finding, ...] = ()

    @classmethod
    def prepare(
        cls,
        dataset: Dataset,
        inputs: InputSpec,
        engine: Engine,
        on_progress: OnProgress,
        known: Known | None = None,
    ) -> "Session":
        """Decodes the images; mean and std are measured where the InputSpec has none yet.

        Args:
            known: Images that the start has seen.

        Raises:
            DataError: Images cannot be decoded, or stand in two splits or under two labels.
        """
        on_progress = on_progress if engine.is_main else quiet
        on_progress(Note(f"data: {dataset.summary()}"))
        channels = fitting_channels(dataset, inputs.channels)
        refuse_unclear(dataset, inputs)
        steps = counting(on_progress, "decoding")

        def decoded(dataset: Dataset) -> tuple[Cache, Dataset]:
            return Cache.build(
                dataset, inputs.size, channels, steps, lambda text: on_progress(Note(text))
            )

        with engine.first_on_machine():
            cache, dataset = decoded(dataset)
            findings = precheck(dataset, cache)
            if (kept := accepted(dataset, findings)) is not dataset:
                cache, dataset = decoded(kept)
        if known is not None:
            own = pictures_of(dataset, cache)
            findings += start_findings(own, np.asarray(cache.hashes), known)
        for note in dataset.notes:
            on_progress(Note(f"data: {note}"))
        for line in told(findings):
            on_progress(Note(line))
        if dataset.channels == 1 and channels == 3:
            on_progress(Note("data: grey images are replicated to RGB for this network"))
        if dataset.bit_depth != inputs.bit_depth:
            on_progress(
                Note(
                    f"data: the start was trained on {inputs.bit_depth}-bit images, these have "
                    f"{dataset.bit_depth} bits; each is scaled to [0, 1] by its own range"
                )
            )
        inputs = with_range(inputs, dataset, cache)
        if dataset.bit_depth > 8 or inputs.clips:
            on_progress(Note(f"data: {inputs.told_range()}"))
        if not inputs.mean:
            inputs = cache.with_statistics(inputs, dataset.rows("train"))
        return cls(dataset, cache, inputs, engine, on_progress, findings)

    @property
    def own_inputs(self) -> InputSpec:
        """What a network expects that knows nothing of Dataset1: not even its mean and std."""
        return self.cache.with_statistics(self.inputs, self.dataset.rows("train"))

    def features(self, backbone: Backbone) -> NDArray[np.float32]:
        """Returns the features of every image, not augmented.

        A random backbone first gets BatchNorm statistics from the training images: with those of
        its birth (mean 0, variance 1) its features all but vanish.
        """
        self.engine.place(backbone)
        if backbone.is_random:  # every process over all images: their statistics stay equal
            batches = self._plain_batches("train", backbone.inputs, ONLY)
            adapt_batch_norm(backbone, batches, self.engine)
        batches = self._plain_batches(None, backbone.inputs, self.engine.shard)
        return infer(backbone, batches, self.engine)

    def _plain_batches(
        self, split: str | None, inputs: InputSpec, shard: Shard
    ) -> Iterator[Tensor]:
        rows = np.arange(len(self.dataset.samples)) if split is None else self.dataset.rows(split)
        images, device = self.cache.images, self.engine.device
        batch = eval_batch(inputs.size, device)
        return eval_batches(images, rows, inputs, batch_size=batch, device=device, shard=shard)

    def resolved(self, recipe: Recipe, backbone: Backbone) -> Recipe:
        """Returns the recipe with every `auto` settled for this data and backbone.

        Raises:
            UsageError: A phase names more stages than there are.
        """
        refuse_missing_stages(backbone, recipe)
        settled = recipe.changed({"image_size": self.inputs.size, "channels": self.inputs.channels})
        return settled.resolved(
            normalisation=backbone.normalisation,
            num_images=len(self.dataset.rows("train")),
            is_grey=self.cache.is_grey,
        )

    def pooled(self, recipe: Recipe) -> "Session":
        """Returns the session in which few images are judged in folds, if the recipe searches.

        A small validation split chooses by chance: its images then join those that learn.
        """
        samples = self.dataset.samples
        number = sum(sample.split != "test" for sample in samples)
        if recipe.search == "none" or number >= POOLED_BELOW:
            return self
        joined = [replace(s, split="train" if s.split == "val" else s.split) for s in samples]
        session = replace(self, dataset=replace(self.dataset, samples=tuple(joined)))
        if not session.material().folds():
            return self
        self.on_progress(
            Note(f"data: {number} images are few: validation images learn too, all judge in folds")
        )
        return session

    def train(
        self,
        backbone: Backbone,
        recipe: Recipe,
        out: Path,
        record: dict[str, Any],
        *,
        plan: Plan | None = None,
        random: Callable[[], Backbone] | None = None,
    ) -> Trained:
        """Trains a new head on the backbone by a resolved recipe, and writes the Run.

        Args:
            backbone: Random or transplanted.
            recipe: Resolved.
            out: Folder of the Run, new.
            record: `verb`, and what `Start.record` gives for a transplanted backbone.
            plan: Of a search, to repeat.
            random: For a search, see `tune`.

        Raises:
            Stopped: A signal came; the Run holds the best epoch so far.
            UsageError: The recipe cannot work with this backbone or so few images.
            BusyError: Another process is writing the Run.
        """
        if self.engine.is_main:
            refuse_existing(out)
        refuse_frozen_random(backbone, recipe)
        refuse_single_images(backbone, recipe, len(self.dataset.rows("train")))
        with writing(out, here=self.engine.is_main):
            return self._train(backbone, recipe, out, record, plan, random)

    def _train(
        self,
        backbone: Backbone,
        recipe: Recipe,
        out: Path,
        record: dict[str, Any],
        plan: Plan | None,
        random: Callable[[], Backbone] | None,
    ) -> Trained:
        classifier = Classifier(backbone, self.dataset.class_names, seed=recipe.seed)
        self.engine.place(classifier)
        run = self._create_run(classifier, recipe, out, record)
        own = {"verb": record["verb"], "run": run.record["id"], "data": self.dataset.fingerprint}
        own |= {"train_images": len(self.dataset.rows("train")), "arch": backbone.arch}
        classifier.lineage = (*record.get("lineage", ()), own)
        kept = _Kept(run, classifier, self.engine.is_main)
        caught: list[int] = []
        material = self.material(recipe.train_share, recipe.seed)
        if plan is not None:
            refuse_unfitting_plan(plan, recipe, material, backbone)
        if recipe.search == "none":
            training: Generator[Any, None, None] = fit(classifier, material, recipe, self.engine)
        else:
            training = tune(classifier, material, recipe, self.engine, plan=plan, random=random)
        try:
            with _signals(caught), closing(training):  # closed, it leaves the best weights
                for told in training:
                    kept.take(told)
                    self.on_progress(told)
                    if self._all_stop(caught, told):
                        break
        except BaseException as error:  # whatever ends it: no Run stays `running`
            if self.engine.is_main:
                if kept.best is not None and isinstance(error, Diverged):
                    run.keep_best(classifier.contents())
                reason = str(error).split("\n")[0] or repr(error)
                run.set_status(FAILED, reason=reason, **kept.status)
            raise
        if self.engine.is_main:
            if caught:
                run.keep_best(classifier.contents())
            else:
                classifier.save(run.final)
            run.set_status(INTERRUPTED if caught else FINISHED, **kept.status)
            if not caught:
                run.drop_best()
        self.engine.wait()
        if caught:
            raise Stopped(run, caught[0], kept.best)
        return Trained(run, classifier, kept.plan)

    def _all_stop(self, caught: list[int], told: object) -> bool:
        """Whether to stop here: several processes must agree, and at the same step."""
        if self.engine.shard[1] == 1:
            return bool(caught)
        if not isinstance(told, Step) or told.step % SYNC_STEPS:
            return False
        if stop := self.engine.any(bool(caught)):
            caught.append(signal.SIGTERM)  # where the signal came to another process
        return stop

    def material(self, share: float = 1.0, seed: int = 0) -> Material:
        """Returns what may be learned from: no test rows, and a share of the training rows."""
        data, train = self.dataset, self.dataset.rows("train")
        if share < 1:
            train = _drawn(train, data.labels, share, seed)
        # Copies of one picture are a group: they may not teach and judge.
        names = [sample.group or sample.sha256 for sample in data.samples]
        groups = np.unique(names, return_inverse=True)[1]
        rows = train, data.rows("val")
        return Material(self.cache.images, data.labels, *rows, groups, self.cache.key)

    def estimate(self, backbone: Backbone, recipes: Sequence[Recipe]) -> None:
        """Tells how long these trainings will take, from a measured step."""
        phases = [
            phase
            for recipe in recipes
            for phase in recipe.phases
            if phase.learns != "head" and recipe.search == "none"  # a plan tells its own time
        ]
        epochs = sum(int(phase.epochs) for phase in phases)
        if not epochs:
            return
        size, batch = self.inputs.size, int(recipes[0].batch_size)
        self.engine.place(backbone)
        seconds = self.engine.seconds_per_image(backbone, self.inputs.channels, size, batch)
        total = seconds * epochs * len(self.dataset.rows("train")) / self.engine.shard[1]
        shorter = ""
        if total > 3600 and min(size) > 64:
            smaller = total * 64 * 64 / (size[0] * size[1])  # work grows with the pixels
            shorter = f"; about {duration(smaller)} with `--image-size 64`"
        self.on_progress(
            Note(
                f"time: about {duration(total)} for {count(epochs, 'epoch')} at "
                f"{size[0]}x{size[1]} px on {self.engine.device} ({self.engine.precision}, "
                f"{1 / seconds:.3g} images/s){shorter}"
            )
        )

    def _create_run(
        self, classifier: Classifier, recipe: Recipe, out: Path, record: dict[str, Any]
    ) -> Run:
        data = self.dataset
        document = {
            "verb": record["verb"],
            "arch": classifier.backbone.arch,
            "backbone_parameters": classifier.backbone.num_parameters,
            "recipe": recipe.model_dump(mode="json"),
            "inputs": classifier.inputs.to_dict(),
            "data": {
                "name": data.root.resolve().name,
                "fingerprint": data.fingerprint,
                "class_names": list(data.class_names),
                "options": data.options.to_dict(),
                "splits": {split: len(data.rows(split)) for split in ("train", "val", "test")},
                "excluded": len(data.excluded),
                "notes": [*data.notes, *told(self.findings)],
                "findings": [{**one.to_dict(), "files": len(one.files)} for one in self.findings],
            },
            "start": record.get("start"),
            "transplant": record.get("transplant"),
            "engine": self.engine.describe(),
        }
        samples = [
            labelled(sample) | {"phash": encoded_hash(values)}
            for sample, values in zip(data.samples, self.cache.hashes, strict=True)
        ]
        excluded = [{"path": path, "excluded": why} for path, why in data.excluded]
        hashes = record.get("hashes", {})
        seen = [
            {"sha256": sha, "split": split, "phash": hashes.get(sha, "")}
            for sha, split in record.get("seen", {}).items()
        ]
        if self.engine.is_main:
            Run.create(out, document, samples + excluded, seen)
        self.engine.wait()
        return Run.open(out)


@dataclass(frozen=True)
class Start:
    """A trained classifier whose backbone is to be transplanted, again and again."""

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
        return cls(classifier, run, arch or classifier.backbone.arch, tuple(adapt))

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


def _drawn(
    rows: NDArray[np.int64], labels: NDArray[np.int64], share: float, seed: int
) -> NDArray[np.int64]:
    """Returns a share of the rows of each class, at least one."""
    generator = np.random.default_rng(seed)
    of_class = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    drawn = [generator.permutation(own)[: max(1, round(share * len(own)))] for own in of_class]
    return np.sort(np.concatenate(drawn))


def _head_row(what: str, width: int, num_classes: int) -> dict[str, Any]:
    return {
        "stage": "head",
        "what": what,
        "num_tensors": 2,
        "num_values": (width + 1) * num_classes,
    }


@contextmanager
def _signals(caught: list[int]) -> Iterator[None]:
    """Notes the first INT or TERM, so that the loop ends between two steps; a second INT acts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
