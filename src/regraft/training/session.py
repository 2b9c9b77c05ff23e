"""One training from data to a finished Run: prepare, train, write."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.batches import ONLY, Shard, eval_batches
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
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
from regraft.disk import require_space
from regraft.documents import sealed_content
from regraft.engine import Engine
from regraft.errors import count
from regraft.evaluation.predictions import eval_batch, infer
from regraft.evaluation.testing import fitting_channels, labelled
from regraft.inputs import InputSpec
from regraft.locks import writing
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Note, OnProgress, counting, duration, quiet
from regraft.run import PLACE, Run, refuse_existing
from regraft.storage import Store, make_folder, write_file
from regraft.training.auto import tune
from regraft.training.cautions import cautions
from regraft.training.contract import contract, place
from regraft.training.doubting import with_doubt
from regraft.training.feeds import Material
from regraft.training.keeping import FIRST_COST, Keeper, Trained
from regraft.training.loop import fit
from regraft.training.memory import is_out_of_memory, out_of_memory
from regraft.training.optim import (
    adapt_batch_norm,
    refuse_frozen_random,
    refuse_missing_stages,
    refuse_single_images,
)
from regraft.training.plan import Plan, refuse_unfitting_plan
from regraft.training.recipe import Recipe

SPACE_FOR_STATES = 8  # of the weights: two states (with two moments and an average each); assumed
POOLED_BELOW = 500  # images: fewer are judged in folds, not by a small split; assumed
DEFAULT_SIZE = (224, 224)  # Krizhevsky et al. 2012 and most architectures since


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
        material = self.material(recipe.train_share, recipe.seed)
        if plan is not None:
            refuse_unfitting_plan(plan, recipe, material, backbone)
        classifier = Classifier(backbone, self.dataset.class_names, seed=recipe.seed)
        classifier.lineage = tuple(record.get("lineage", ()))
        self.engine.place(classifier)
        if self.engine.is_main:
            held = sum(tensor.nbytes for tensor in classifier.state_dict().values())
            require_space(out, SPACE_FOR_STATES * held)
        with writing(out, here=self.engine.is_main):
            began = monotonic()
            run = self._create_run(classifier, recipe, out, record, plan)
            keeper = self.keeper(run, classifier)
            keeper.cost_s = FIRST_COST * (monotonic() - began)
            return self.carry_on(keeper, recipe, plan=plan, random=random)

    def keeper(self, run: Run, classifier: Classifier) -> Keeper:
        """Returns what writes the Run; the classifier is as before any training."""
        state = classifier.state_dict()
        origin = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        return Keeper(run, classifier, origin, self.engine)

    def carry_on(
        self,
        keeper: Keeper,
        recipe: Recipe,
        *,
        plan: Plan | None = None,
        random: Callable[[], Backbone] | None = None,
    ) -> Trained:
        """Trains from where the keeper is, to the end; the Run is held for writing.

        Raises:
            Stopped: A signal came; all that was done is saved.
            EnvironmentFault: There is too little memory.
        """
        run, classifier, engine = keeper.run, keeper.classifier, self.engine
        own = {"verb": run.record["verb"], "run": run.record["id"]}
        own |= {"data": self.dataset.fingerprint, "arch": classifier.backbone.arch}
        own |= {"train_images": len(self.dataset.rows("train"))}
        classifier.lineage = (*classifier.lineage, own)
        material, bookmark = self.material(recipe.train_share, recipe.seed), keeper.bookmark
        if recipe.search == "none":
            training: Generator[Any, None, None] = fit(
                classifier, material, recipe, engine, bookmark=bookmark
            )
        else:
            training = tune(
                classifier, material, recipe, engine, plan=plan, random=random, bookmark=bookmark
            )
        training = with_doubt(training, classifier, material, recipe, engine)
        try:
            return keeper.drive(training, self.on_progress)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(classifier, recipe, engine) from error

    def material(self, share: float = 1.0, seed: int = 0) -> Material:
        """Returns what may be learned from: no test rows, and a share of the training rows."""
        data, train = self.dataset, self.dataset.rows("train")
        if share < 1:
            train = _drawn(train, data.labels, share, seed)
        # Copies of one picture are a group: they may not teach and judge.
        names = [sample.group or sample.sha256 for sample in data.samples]
        number_of = {name: number for number, name in enumerate(sorted(set(names)))}
        groups = np.array([number_of[name] for name in names], np.int64)
        rows = train, data.rows("val")
        paths = tuple(sample.path for sample in data.samples)
        return Material(self.cache.images, data.labels, *rows, groups, self.cache.key, paths)

    def caution(self, recipe: Recipe) -> None:
        """Tells what speaks against a resolved recipe."""
        number = len(self.dataset.rows("train"))
        for caution in cautions(recipe, num_images=number, is_grey=self.cache.is_grey):
            self.on_progress(Note(f"warning: {caution}"))

    def estimate(self, backbone: Backbone, recipe: Recipe) -> None:
        """Tells how long a training will take, from a measured step; a search tells its plan."""
        epochs = recipe.num_epochs
        if recipe.search != "none" or not epochs:
            return
        size, batch = self.inputs.size, int(recipe.batch_size)
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
        self,
        classifier: Classifier,
        recipe: Recipe,
        out: Path,
        record: dict[str, Any],
        plan: Plan | None,
    ) -> Run:
        data, backbone = self.dataset, classifier.backbone
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
            "random": "all" if backbone.is_random else sorted(backbone.random),
            "engine": self.engine.describe(),
            "contract": contract(self.engine),
        }
        samples = (
            labelled(sample) | {"phash": encoded_hash(values)}
            for sample, values in zip(data.samples, self.cache.hashes, strict=True)
        )
        excluded = ({"path": path, "excluded": why} for path, why in data.excluded)
        hashes = record.get("hashes", {})
        seen = (
            {"sha256": sha, "split": split, "phash": hashes.get(sha, "")}
            for sha, split in record.get("seen", {}).items()
        )
        if self.engine.is_main:
            repeated = None if plan is None else plan.model_dump(mode="json")
            states = Store(out / "state")
            make_folder(states.folder)
            states.commit(0, classifier.contents())  # the origin: what stays frozen is not again
            write_file(out / PLACE, sealed_content(place(data)))
            Run.create(out, document, chain(samples, excluded), seen, repeated)
        self.engine.wait()
        return Run.open(out)


def _drawn(
    rows: NDArray[np.int64], labels: NDArray[np.int64], share: float, seed: int
) -> NDArray[np.int64]:
    """Returns a share of the rows of each class, at least one."""
    generator = np.random.default_rng(seed)
    of_class = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    drawn = [generator.permutation(own)[: max(1, round(share * len(own)))] for own in of_class]
    return np.sort(np.concatenate(drawn))
