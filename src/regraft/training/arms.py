"""The arms of a comparison: transfer, scratch and probes on one session, trained and tested."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from regraft.evaluation.compare import judge, summarise
from regraft.evaluation.metrics import METRICS, point
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.savings import saved_images
from regraft.evaluation.testing import predict_dataset, record_evaluation, tabulate
from regraft.models.backbone import Backbone
from regraft.progress import Note, OnProgress
from regraft.training.loop import Epoch
from regraft.training.plan import Plan
from regraft.training.probe import solve_head
from regraft.training.recipe import Recipe
from regraft.training.session import Session, Start, transplant_table


@dataclass
class Arms:
    """The trainings of a comparison; all of one arm go by the plan of its first seed."""

    session: Session
    begun: Start
    recipe: Recipe
    out: Path
    metric: str
    plans: dict[str, Plan | None] = field(default_factory=dict)
    found: dict[str, list[Predictions]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, seed: int, share: float = 1.0) -> None:
        """Trains and tests both arms with one seed, on a share of the training images."""
        session, told = self.session, self.session.on_progress
        backbone, moves = self.begun.backbone(session.inputs, seed)
        random = self.begun.random_backbone(session.own_inputs, seed)
        record = self.begun.record(moves, session.dataset)
        if share == 1:
            birth = deepcopy(random.state_dict())  # the probe changes its BatchNorm statistics
            self._add("probe_random", _probed(session, random))
            random.load_state_dict(birth)
            if "probe_transplanted" not in self.found:
                self._add("probe_transplanted", _probed(session, backbone))
                told(Note(transplant_table(record["transplant"])))
        changes = {"seed": seed, "train_share": share}
        transfer = session.resolved(self.recipe.changed(changes), backbone)
        self._train("transfer", backbone, transfer, record)
        plan = self.plans["transfer"]
        # Each arm's learning rate, weight decay and BatchNorm policy follow its own goal; data,
        # splits, augmentation, batches and input size are the same.
        control = transfer.as_scratch(plan.epochs if plan else None)
        self._train("scratch", random, session.resolved(control, random), {"verb": "pretrain"})

    def _train(self, arm: str, network: Backbone, recipe: Recipe, record: dict[str, Any]) -> None:
        session = replace(self.session, on_progress=_without_epochs(self.session.on_progress))
        name = arm if recipe.train_share == 1 else f"{arm}@{recipe.train_share:g}"
        began, plan = monotonic(), self.plans.get(arm)
        folder = self.out / f"{name}-{recipe.seed}"
        trained = session.train(network, recipe, folder, record, plan=plan)
        if plan is not None or trained.plan is None:
            self.seconds.setdefault(name, []).append(monotonic() - began)  # without the search
        self.plans[arm] = trained.plan
        rows, dataset, cache = session.dataset.rows("test"), session.dataset, session.cache
        found = predict_dataset(trained.classifier, dataset, cache, rows, session.engine)
        record_evaluation(trained.run, found, dataset, cache, "test", write=session.engine.is_main)
        self._add(name, found)
        value = point(found, self.metric)
        session.on_progress(Note(f"{name:<8} seed {recipe.seed}: test {self.metric} {value:.3f}"))

    def _add(self, name: str, found: Predictions) -> None:
        self.found.setdefault(name, []).append(found)


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


def judged(arms: Arms, shares: Sequence[float]) -> dict[str, Any]:
    session, found = arms.session, arms.found
    judgement = judge(found["transfer"], found["scratch"], arms.metric)
    curve = [
        {"share": share, "num_images": len(session.material(share).train_rows)}
        | {
            arm: summarise(found[arm if share == 1 else f"{arm}@{share:g}"], arms.metric)
            for arm in ("transfer", "scratch")
        }
        for share in shares
    ]
    return {
        "schema": 1,
        **judgement,
        "arms": {
            arm: {name: summarise(found[arm], name) for name in METRICS}
            for arm in ("transfer", "scratch", "probe_transplanted", "probe_random")
        },
        "seconds": {arm: float(np.mean(spent)) for arm, spent in arms.seconds.items()},
        "curve": curve,
        "saved_images": saved_images(curve, arms.metric),
        "chance_balanced_accuracy": 1 / len(session.dataset.class_names),
        "class_names": list(session.dataset.class_names),
        "data": {
            "name": session.dataset.root.resolve().name,
            "fingerprint": session.dataset.fingerprint,
            "splits": {s: len(session.dataset.rows(s)) for s in ("train", "val", "test")},
        },
    }
