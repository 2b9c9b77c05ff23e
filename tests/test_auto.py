"""auto: what is tried, what is kept, and that a plan repeats itself."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regraft import api
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.engine import Engine
from regraft.errors import UsageError
from regraft.evaluation.calibration import calibrated_loss, least_loss
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Note
from regraft.run import Run
from regraft.training import auto, loop, tuning
from regraft.training.auto import tune
from regraft.training.feeds import Material
from regraft.training.keeping import Stopped
from regraft.training.plan import LEAST_STEPS, Candidate, Plan, make_plan, refuse_unfitting_plan
from regraft.training.recipe import Phase, Recipe
from regraft.training.records import Step, Trial

MakeShapes = Callable[..., Path]
ENGINE = Engine("cpu", "fp32")
ARMS = ("transfer", "scratch")
NAMES = ("a", "b")


@pytest.fixture
def bars(make_shapes: MakeShapes) -> tuple[Material, InputSpec]:
    dataset = Dataset.open(make_shapes(NAMES, 24))
    cache, dataset = Cache.build(dataset, (32, 32), 3)
    inputs = cache.with_statistics(InputSpec((32, 32), 3), dataset.rows("train"))
    rows = (dataset.rows("train"), dataset.rows("val"))
    return Material(cache.images, dataset.labels, *rows, key=cache.key), inputs


def in_folds(material: Material) -> Material:
    both = np.concatenate([material.train_rows, material.val_rows])
    return replace(material, train_rows=np.sort(both), val_rows=both[:0])


def start_of(inputs: InputSpec) -> Classifier:
    backbone = Backbone.create("resnet10t", inputs)
    backbone.random = frozenset()
    return Classifier(backbone, NAMES)


def recipe_for(material: Material, **changes: Any) -> Recipe:
    recipe = Recipe.transfer("auto").changed({"epochs": 4, **changes})
    return recipe.resolved(normalisation="batch", num_images=len(material.train_rows), is_grey=True)


def trials(told: list[Any]) -> list[Trial]:
    return [record for record in told if isinstance(record, Trial)]


@pytest.mark.parametrize("folded", [False, True])
def test_the_best_of_all_that_was_tried_is_kept(
    bars: tuple[Material, InputSpec], folded: bool
) -> None:
    material, inputs = bars
    material = in_folds(material) if folded else material
    classifier = start_of(inputs)
    told = list(tune(classifier, material, recipe_for(material), ENGINE))
    plans = [record for record in told if isinstance(record, Plan)]
    assert [plan.folds for plan in plans] == [3 * folded] * 2
    assert (len(plans[0].candidates), len(plans[1].candidates)) == (2 + folded, 1)
    tried = trials(told)
    assert tried[0].candidate == "probe" and tried[0].is_best
    expected = ["bold", "firm", "head"][: 2 + folded]
    assert [trial.candidate for trial in tried if trial.share == 0.3] == expected
    losses = [t.loss for t in tried if t.loss is not None]
    best = [t.loss for t in tried if t.is_best and t.loss is not None]
    assert best == sorted(best, reverse=True) and best[-1] == min(losses)
    assert not classifier.training


def test_the_same_plan_gives_the_same_bits(bars: tuple[Material, InputSpec]) -> None:
    material, inputs = bars
    first = start_of(inputs)
    told = list(tune(first, material, recipe_for(material), ENGINE))
    plan = next(record for record in told if isinstance(record, Plan))
    again = start_of(inputs)
    other_clock = Plan.model_validate_json(plan.model_dump_json())
    repeated = list(tune(again, material, recipe_for(material), ENGINE, plan=other_clock))
    assert [replace(t, elapsed_s=0) for t in trials(told)] == [
        replace(t, elapsed_s=0) for t in trials(repeated)
    ]
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_search_stopped_at_any_moment_holds_the_best_so_far(
    bars: tuple[Material, InputSpec],
) -> None:
    material, inputs = bars
    reference = start_of(inputs)
    whole = list(tune(reference, material, recipe_for(material), ENGINE))
    for moment in range(1, len(whole), 7):
        classifier, held = start_of(inputs), None
        running = tune(classifier, material, recipe_for(material), ENGINE)
        for _ in range(moment):
            told = next(running)
            if isinstance(told, Trial) and told.is_best:
                held = {name: t.clone() for name, t in classifier.state_dict().items()}
        in_last = sum(isinstance(record, Trial) for record in whole[moment:]) <= 4  # training
        running.close()
        assert not classifier.training
        if held is not None and not in_last:
            now = classifier.state_dict()
            assert all(torch.equal(held[name], now[name]) for name in held), moment


def test_a_time_budget_shortens_schedules_then_drops_candidates() -> None:
    phases = (Phase(learns="head", epochs=1), Phase(lr=0.1, epochs=40))
    candidates = tuple(Candidate(name=name, phases=phases) for name in ("bold", "firm"))
    plan = Plan(candidates=candidates, epochs=40, steps_per_epoch=10, seconds_per_step=1.0)
    # two on three tenths of the schedule, the winner on all of it
    assert plan.seconds == pytest.approx(1.6 * 400)
    # in three folds each learns from two thirds of the images; a head is solved at no cost
    folded = plan.model_copy(
        update={"folds": 3, "candidates": (*candidates, Candidate(name="head", phases=phases[:1]))}
    )
    assert folded.seconds == pytest.approx((1 + 2 * 2 * 0.3) * 400)
    half = plan.within(320)
    assert (len(half.candidates), half.epochs) == (2, 20)
    assert half.seconds <= 320
    one = plan.within(60)
    assert (len(one.candidates), one.rungs, one.epochs) == (1, (), 6)
    assert one.epochs * one.steps_per_epoch >= LEAST_STEPS
    assert [each.name for each in plan.within(5).candidates] == ["head"]
    assert plan.within(10**6) == plan
    whole = Candidate(name="lr x1", phases=phases[1:])
    control = plan.model_copy(update={"candidates": (whole,)}).within(5)
    assert (control.candidates, control.epochs) == ((whole,), 1)


def test_a_given_learning_rate_is_not_searched_for(bars: tuple[Material, InputSpec]) -> None:
    material, inputs = bars
    recipe = recipe_for(material, lr=0.01)
    backbone = start_of(inputs).backbone
    plan = make_plan(backbone, material, recipe, ENGINE, "frozen")
    assert {phase.lr for c in plan.candidates for phase in c.phases if phase.learns == "all"} == {
        0.01
    }
    assert [each.name for each in plan.candidates] == ["bold", "firm"]


def test_images_that_judge_never_teach(
    bars: tuple[Material, InputSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    material, inputs = bars
    material = in_folds(material)
    seen: list[set[int]] = []
    judged: list[set[int]] = []
    fit = loop.fit

    def watched(classifier: Any, part: Material, *rest: Any, **named: Any) -> Any:
        seen.append(set(part.train_rows.tolist()))
        assert not len(part.val_rows)
        return fit(classifier, part, *rest, **named)

    logits = tuning.Tuning.logits

    def noted(self: Any, network: Any, rows: Any) -> Any:
        judged.append(set(rows.tolist()))
        return logits(self, network, rows)

    monkeypatch.setattr(auto, "fit", watched)
    monkeypatch.setattr(tuning.Tuning, "logits", noted)
    list(tune(start_of(inputs), material, recipe_for(material), ENGINE))
    everything = set(material.train_rows.tolist())
    assert seen[-1] == everything  # the winner learns from all
    assert len(judged) == len(seen) - 1 == 9, "three candidates in three folds"
    for taught, held_out in zip(seen, judged, strict=False):
        assert taught | held_out == everything and not taught & held_out


@pytest.mark.parametrize(
    ("bold", "firm", "head", "winner"),
    [
        (0.30, 0.40, 0.25, "bold"),  # the full schedule leaves 0.7 of the short one's loss
        (0.40, 0.50, 0.25, "head"),
        (0.50, 0.30, 0.25, "firm"),
        (0.0, 0.0, 0.0, "head"),  # all are right: nothing is left to gain
        (None, None, 5.0, "head"),  # they diverged
    ],
)
def test_a_head_stays_where_full_schedules_promise_nothing_better(
    bars: tuple[Material, InputSpec],
    monkeypatch: pytest.MonkeyPatch,
    bold: float | None,
    firm: float | None,
    head: float | None,
    winner: str,
) -> None:
    material, inputs = bars
    material, classifier = in_folds(material), start_of(inputs)
    least = least_loss(len(material.judged), len(NAMES))
    losses = {"bold": bold, "firm": firm, "head": head}

    def trial(_state: Any, _plan: Any, candidate: Candidate, share: float) -> Any:
        loss = losses[candidate.name]
        yield from ()
        return Trial(candidate.name, share, None if loss is None else least + loss, 0.9, 0.0)

    monkeypatch.setattr(auto, "_trial", trial)
    recipe = recipe_for(material)
    state = tuning.Tuning(classifier, material, recipe, ENGINE, classifier.state_dict())
    plan = make_plan(classifier.backbone, material, recipe, ENGINE, "frozen")
    with pytest.raises(StopIteration) as ended:
        next(auto._search(state, plan))
    assert ended.value.value[0].name == winner


def test_the_least_loss_is_that_of_certain_and_right_answers() -> None:
    labels = np.arange(40) % 3
    logits = np.float32(1000.0) * np.eye(3, dtype=np.float32)[labels]
    assert calibrated_loss(logits, labels, 1.0) == pytest.approx(least_loss(40, 3))


def test_no_better_than_random_features_is_told_at_once(
    bars: tuple[Material, InputSpec],
) -> None:
    material, inputs = bars
    classifier = start_of(inputs)

    def same() -> Backbone:
        return Backbone.create("resnet10t", inputs)

    told = list(tune(classifier, material, recipe_for(material), ENGINE, random=same))
    first = next(place for place, record in enumerate(told) if isinstance(record, Step))
    notes = [record.text for record in told[:first] if isinstance(record, Note)]
    assert any("no better than random ones" in text for text in notes)


def test_finetune_searches_unless_told_and_the_run_says_what_was_tried(
    make_shapes: MakeShapes, tmp_path: Path
) -> None:
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 2})
    data = make_shapes(NAMES, 20)
    api.pretrain(data, out=tmp_path / "source", arch="resnet10t", recipe=recipe)
    target = make_shapes(("c", "d"), 20, name="target", seed=1)
    quick = Recipe.transfer("auto").changed({"epochs": 2})
    run = api.finetune(target, out=tmp_path / "run", start=tmp_path / "source", recipe=quick)
    assert run.status["chosen"] in {trial["candidate"] for trial in run.trials()}
    assert {sample["split"] for sample in run.samples()} == {"train", "test"}  # few: in folds
    plan = Plan.read(run.folder / "plan.json")
    assert plan.folds == 3
    again = api.finetune(
        target, out=tmp_path / "again", start=tmp_path / "source", recipe=quick, plan=plan
    )
    hashes = [(r.final / "model.safetensors").read_bytes() for r in (run, again)]
    assert hashes[0] == hashes[1]
    assert run.trials() == again.trials()
    found = api.evaluate(run.folder, target)
    assert found["n"] == sum(sample["split"] == "test" for sample in run.samples())


def test_a_signal_during_the_search_leaves_a_usable_run(
    make_shapes: MakeShapes, tmp_path: Path
) -> None:
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 2})
    api.pretrain(make_shapes(NAMES, 20), out=tmp_path / "s", arch="resnet10t", recipe=recipe)
    target = make_shapes(("c", "d"), 20, name="target", seed=1)

    def stop_at_a_step(record: Any) -> None:
        if isinstance(record, Step):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        api.finetune(target, out=tmp_path / "run", start=tmp_path / "s", on_progress=stop_at_a_step)
    run = Run.open(tmp_path / "run")
    assert run.status["state"] == "interrupted"
    assert run.status["chosen"] in ("probe", "adapted")
    assert api.evaluate(run.folder, target)["n"] > 0


def test_a_plan_of_other_data_or_of_no_search_is_refused(
    bars: tuple[Material, InputSpec],
) -> None:
    material, inputs = bars
    classifier = start_of(inputs)
    recipe = recipe_for(material)
    told = list(tune(classifier, material, recipe, ENGINE))
    plan = next(record for record in told if isinstance(record, Plan))
    refuse_unfitting_plan(plan, recipe, material, classifier.backbone)
    with pytest.raises(UsageError, match="judged in 0 folds, these images in 2"):
        refuse_unfitting_plan(plan, recipe, in_folds(material), classifier.backbone)
    fixed = Recipe.transfer("head")
    with pytest.raises(UsageError, match="a plan is of a search"):
        refuse_unfitting_plan(plan, fixed, material, classifier.backbone)


def test_a_winner_that_diverges_leaves_the_probe(bars: tuple[Material, InputSpec]) -> None:
    material, inputs = bars
    classifier = start_of(inputs)
    recipe = recipe_for(material, lr=1e18, clip_norm=0.0)
    told = list(tune(classifier, material, recipe, ENGINE))
    best = [trial.candidate for trial in trials(told) if trial.is_best]
    assert best[-1] in ("probe", "adapted")
    assert any("what was best before is kept" in r.text for r in told if isinstance(r, Note))
    assert all(torch.isfinite(tensor).all() for tensor in classifier.state_dict().values())


def shuffled(start: Path, out: Path) -> Path:
    """Writes the classifier with the values of each tensor in another order."""
    classifier = Classifier.load(start)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in classifier.state_dict().values():
            order = torch.randperm(tensor.numel(), generator=generator)
            tensor.copy_(tensor.flatten()[order].view(tensor.shape))
    classifier.save(out)
    return out


def test_weights_that_know_nothing_are_never_called_a_help(
    make_shapes: MakeShapes, tmp_path: Path
) -> None:
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 3})
    api.pretrain(make_shapes(NAMES, 30), out=tmp_path / "s", arch="resnet10t", recipe=recipe)
    start = shuffled(tmp_path / "s", tmp_path / "shuffled")
    target = make_shapes(("c", "d", "e"), 24, name="target", seed=1)
    head = Recipe.transfer("head")
    found = api.compare(target, out=tmp_path / "c", start=start, seeds=3, recipe=head)
    assert found["verdict"] in ("hurt", "cannot tell")
    assert found["difference"] <= 0


def test_both_arms_are_searched_and_the_control_has_at_least_as_many_steps(
    make_shapes: MakeShapes, tmp_path: Path
) -> None:
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 2})
    api.pretrain(make_shapes(NAMES, 20), out=tmp_path / "s", arch="resnet10t", recipe=recipe)
    target = make_shapes(("c", "d"), 24, name="target", seed=1)
    quick = Recipe.transfer().changed({"epochs": 2})
    found = api.compare(
        target,
        out=tmp_path / "c",
        start=tmp_path / "s",
        seeds=2,
        recipe=quick,
        fractions=(0.5, 1.0),
    )
    plans = {arm: Plan.read(tmp_path / "c" / f"{arm}-0" / "plan.json") for arm in ARMS}
    assert plans["scratch"].epochs == 2 * plans["transfer"].epochs
    assert plans["scratch"].seconds / plans["scratch"].seconds_per_step >= (
        plans["transfer"].seconds / plans["transfer"].seconds_per_step
    )
    for arm in ARMS:
        first, second = (Run.open(tmp_path / "c" / f"{arm}-{seed}") for seed in (0, 1))
        winner = Plan.read(first.folder / "winner.json").candidates
        assert Plan.read(second.folder / "plan.json").candidates == winner
        shares = {trial["share"] for trial in second.trials()}
        assert shares <= {0, 1}, "the choice is not made again"
        half = Run.open(tmp_path / "c" / f"{arm}@0.5-0")
        assert half.record["recipe"]["train_share"] == 0.5
        assert half.record["data"]["splits"] == first.record["data"]["splits"]
    assert [point["share"] for point in found["curve"]] == [0.5, 1.0]
    assert (
        found["curve"][1]["transfer"]["values"]
        == found["arms"]["transfer"]["balanced_accuracy"]["values"]
    )
    page = (tmp_path / "c" / "report.html").read_text()
    assert "What was tried" in page and "What the transfer saves" in page
