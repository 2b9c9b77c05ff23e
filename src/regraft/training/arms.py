"""The arms of a comparison: transfer, scratch and probes on one session, trained and tested."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import count
from regraft.evaluation.compare import judge, summarise
from regraft.evaluation.metrics import METRICS, point
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.savings import saved_images
from regraft.evaluation.testing import predict_dataset, record_evaluation, tabulate
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Note, OnProgress, duration
from regraft.run import Run
from regraft.training.comparing import Asked, Done, Ledger
from regraft.training.keeping import Trained
from regraft.training.plan import Plan
from regraft.training.probe import solve_head
from regraft.training.recipe import Recipe
from regraft.training.records import Epoch
from regraft.training.resuming import Resumption, resume_run
from regraft.training.session import Session
from regraft.training.start import Start, transplant_table

ARMS = ("transfer", "scratch")


@dataclass
class Arms:
    """The trainings of a comparison; all of one arm go by the plan of its first seed.

    Attributes:
        left: Arm and share of each training that is not done.
        has_foretold: Whether it was told how long those will take.
    """

    session: Session
    begun: Start
    asked: Asked
    out: Path
    how: Resumption = field(default_factory=Resumption)
    plans: dict[str, Plan | None] = field(default_factory=dict)
    found: dict[str, list[Predictions]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    left: list[tuple[str, float]] = field(default_factory=list)
    has_foretold: bool = False
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.out / "state", self.session)

    def run_all(self) -> dict[str, Any]:
        """Trains and tests what is not done yet; returns the comparison."""
        asked = self.asked
        seeds = range(asked.recipe.seed, asked.recipe.seed + asked.seeds)
        trainings = [(share, seed) for share in (1.0, *asked.shares[:-1]) for seed in seeds]
        self.left = [(arm, share) for share, _ in trainings for arm in ARMS]
        for share, seed in trainings:
            self.run(seed, share)
        return _comparison(self, asked.shares if len(asked.shares) > 1 else [])

    def run(self, seed: int, share: float = 1.0) -> None:
        """Trains and tests both arms with one seed, on a share of the training images."""
        session, told = self.session, self.session.on_progress
        backbone, moves = self.begun.backbone(session.inputs, seed)
        random = self.begun.random_backbone(session.own_inputs, seed)
        record = self.begun.record(moves, session.dataset)
        changes = {"seed": seed, "train_share": share}
        transfer = session.resolved(self.asked.recipe.changed(changes), backbone)
        if share == 1:
            birth = deepcopy(random.state_dict())  # the probe changes its BatchNorm statistics
            self._probe("probe_random", random)
            random.load_state_dict(birth)
            if "probe_transplanted" not in self.found:
                self._probe("probe_transplanted", backbone)
                told(Note(transplant_table(record["transplant"])))
                session.caution(transfer)
        self._arm("transfer", backbone, transfer, record)
        plan = self.plans["transfer"]
        # Each arm's learning rate, weight decay and BatchNorm policy follow its own goal; data,
        # splits, augmentation, batches and input size are the same.
        control = transfer.as_scratch(plan.epochs if plan else None)
        self._arm("scratch", random, session.resolved(control, random), {"verb": "pretrain"})

    def _probe(self, name: str, backbone: Backbone) -> None:
        done = self.ledger.next(name)
        if done is None:
            done = Done(_probed(self.session, backbone))
            self.ledger.add(name, done)
        self.found.setdefault(name, []).append(done.predictions)

    def _arm(self, arm: str, network: Backbone, recipe: Recipe, record: dict[str, Any]) -> None:
        name = arm if recipe.train_share == 1 else f"{arm}@{recipe.train_share:g}"
        plan, done = self.plans.get(arm), self.ledger.next(name)
        if done is None:
            self._foretell()
            trained = self._trained(
                self.out / f"{name}-{recipe.seed}", network, recipe, record, plan
            )
            done = Done(self._tested(trained), trained.plan, trained.seconds)
            self.ledger.add(name, done)
        if done.seconds is not None and (plan is not None or done.plan is None):
            self.seconds.setdefault(name, []).append(done.seconds)  # without the search
        self.plans[arm] = done.plan
        self.left.pop(0)
        self.found.setdefault(name, []).append(done.predictions)
        metric = self.asked.metric
        value = point(done.predictions, metric)
        self.session.on_progress(Note(f"{name:<8} seed {recipe.seed}: test {metric} {value:.3f}"))

    def _foretell(self) -> None:
        """Tells once how long all that is left takes: as long as the first of each arm, searches
        left out.
        """
        if self.has_foretold or len(self.plans) < len(ARMS):
            return
        each = {
            arm: plan.seconds if plan else float(np.mean(self.seconds.get(arm, [0.0])))
            for arm, plan in self.plans.items()
        }
        total = sum(each[arm] * share for arm, share in self.left)
        number = count(len(self.left), "training")
        self.session.on_progress(Note(f"time: about {duration(total)} for the {number} left"))
        self.has_foretold = True

    def _trained(
        self,
        folder: Path,
        network: Backbone,
        recipe: Recipe,
        record: dict[str, Any],
        plan: Plan | None,
    ) -> Trained:
        session = replace(self.session, on_progress=_without_epochs(self.session.on_progress))
        if not (folder / "run.json").is_file():
            return session.train(network, recipe, folder, record, plan=plan)
        run = Run.open(folder)
        trained = resume_run(run, self.how, session.on_progress, session)
        if trained is None:  # and killed before its test
            winner = run.winner()
            classifier = Classifier.load(folder, arch=self.how.arch)
            session.engine.place(classifier)
            found = None if winner is None else Plan.model_validate(winner)
            return Trained(run, classifier, found, run.seconds)
        return trained

    def _tested(self, trained: Trained) -> Predictions:
        session = self.session
        rows, dataset, cache = session.dataset.rows("test"), session.dataset, session.cache
        found = predict_dataset(trained.classifier, dataset, cache, rows, session.engine)
        record_evaluation(
            trained.run,
            found,
            dataset,
            cache,
            "test",
            classifier=trained.classifier,
            write=session.engine.is_main,
        )
        return found


def _without_epochs(on_progress: OnProgress) -> OnProgress:
    """Twelve trainings of sixty epochs are not for reading: the bar and the results are."""
    return lambda record: None if isinstance(record, Epoch) else on_progress(record)


def _probed(session: Session, backbone: Backbone) -> Predictions:
    """Returns the test predictions of a linear probe on the backbone's frozen features."""
    dataset = session.dataset
    features, test = session.features(backbone), dataset.rows("test")
    rows, folds = session.material().for_head()
    solution = solve_head(features[rows], dataset.labels[rows], folds)
    return tabulate(solution.logits(features[test]), dataset, test)


def _comparison(arms: Arms, shares: Sequence[float]) -> dict[str, Any]:
    session, found = arms.session, arms.found
    judgement = judge(found["transfer"], found["scratch"], arms.asked.metric)
    curve = [
        {"share": share, "num_images": len(session.material(share).train_rows)}
        | {
            arm: summarise(found[arm if share == 1 else f"{arm}@{share:g}"], arms.asked.metric)
            for arm in ARMS
        }
        for share in shares
    ]
    return {
        "schema": 1,
        **judgement,
        "arms": {
            arm: {name: summarise(found[arm], name) for name in METRICS}
            for arm in (*ARMS, "probe_transplanted", "probe_random")
        },
        "seconds": {arm: float(np.mean(spent)) for arm, spent in arms.seconds.items()},
        "curve": curve,
        "saved_images": saved_images(curve, arms.asked.metric),
        "chance_balanced_accuracy": 1 / len(session.dataset.class_names),
        "class_names": list(session.dataset.class_names),
        "data": {
            "name": session.dataset.root.resolve().name,
            "fingerprint": session.dataset.fingerprint,
            "splits": {s: len(session.dataset.rows(s)) for s in ("train", "val", "test")},
        },
    }
