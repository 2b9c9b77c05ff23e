from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regraft.data.batches import normalised
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.engine import Engine
from regraft.errors import NumericError, UsageError
from regraft.evaluation.metrics import log_losses
from regraft.evaluation.predictions import infer, softmax
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.training.feeds import Live, Material, own_share
from regraft.training.loop import fit
from regraft.training.optim import Average, freeze, make_optimizer, scheduled_lr
from regraft.training.probe import solve_head
from regraft.training.recipe import Phase, Recipe
from regraft.training.records import Epoch, Step

MakeShapes = Callable[..., Path]
ENGINE = Engine("cpu", "fp32")
CPU = torch.device("cpu")
NAMES = ("a", "b")


def material(root: Path, size: int = 32, channels: int = 3) -> tuple[Material, InputSpec]:
    dataset = Dataset.open(root)
    cache, dataset = Cache.build(dataset, (size, size), channels)
    inputs = cache.with_statistics(InputSpec((size, size), channels), dataset.rows("train"))
    rows = (dataset.rows("train"), dataset.rows("val"))
    return Material(cache.images, dataset.labels, *rows), inputs


def settled(recipe: Recipe, found: Material, norm: str = "batch") -> Recipe:
    return recipe.resolved(normalisation=norm, num_images=len(found.train_rows), is_grey=True)


def classifier_of(arch: str, inputs: InputSpec, *, trained: bool = True) -> Classifier:
    backbone = Backbone.create(arch, inputs)
    if trained:
        backbone.random = frozenset()
    return Classifier(backbone, NAMES)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def bars(make_shapes: MakeShapes) -> tuple[Material, InputSpec]:
    return material(make_shapes(NAMES, 24))


@pytest.mark.parametrize(
    ("learns", "epochs", "num_frozen"), [("head", 1, 5), ("last:1", 2, 4), ("last:3", 2, 2)]
)
@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.fault("D11")
def test_frozen_stages_stay_bit_identical(
    bars: tuple[Material, InputSpec], learns: str, epochs: int, num_frozen: int, batch_norm: str
) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs)
    before = state_of(classifier.backbone)
    phase = {"learns": learns, "epochs": epochs, "lr": 0.1, "batch_norm": batch_norm}
    recipe = settled(Recipe(goal="transfer", phases=(Phase.model_validate(phase),)), found)
    learning: set[str] = set()
    for told in fit(classifier, found, recipe, ENGINE):
        if isinstance(told, Step):
            named = classifier.backbone.named_parameters()
            learning |= {name for name, parameter in named if parameter.requires_grad}
    after = classifier.backbone.state_dict()
    for stage, names in enumerate(classifier.backbone.stages):
        same = [torch.equal(before[name], after[name]) for name in names]
        assert all(same) if stage < num_frozen else not all(same), f"stage {stage}"
        assert bool(learning & set(names)) == (stage >= num_frozen)


@pytest.mark.fault("D11")
def test_frozen_batch_norm_keeps_its_statistics_while_its_stage_learns(
    bars: tuple[Material, InputSpec],
) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs)
    before = state_of(classifier.backbone)
    phase = Phase(learns="all", epochs=1, lr=0.1, batch_norm="frozen")
    list(fit(classifier, found, settled(Recipe(goal="transfer", phases=(phase,)), found), ENGINE))
    after = classifier.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("running" in name or "num_batches" in name for name in changed)
    assert all(changed & set(names) for names in classifier.backbone.stages)


@pytest.mark.parametrize("learns", ["head", "last:2"])
def test_freezing_random_weights_is_refused(bars: tuple[Material, InputSpec], learns: str) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs, trained=False)
    recipe = settled(Recipe(phases=(Phase(learns=learns),)), found)
    with pytest.raises(UsageError, match="a frozen random backbone stays random"):
        next(fit(classifier, found, recipe, ENGINE))


def test_new_tensors_must_learn_in_some_phase(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs)
    stem = frozenset(classifier.backbone.stages[0])
    classifier.backbone.random = stem  # as `--adapt new:body.conv1.*` leaves it
    with pytest.raises(UsageError, match="the stage 1 is random, and learning only `last:2`"):
        next(fit(classifier, found, settled(Recipe.transfer("last:2"), found), ENGINE))
    recipe = settled(Recipe.transfer("full").changed({"epochs": 1}), found)
    list(fit(classifier, found, recipe, ENGINE))
    assert not classifier.backbone.random


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5))
        self.high = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.5))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps: Tensor = self.high(self.low(images_BCHW))
        return maps.mean(dim=(2, 3))


def test_dropout_works_where_a_stage_learns_and_only_there() -> None:
    body = WithDropout()
    classifier = Classifier(Backbone("net.py:net", body, InputSpec((8, 8), 3)), NAMES)
    freeze(classifier, Phase(learns="last:1"))
    assert (body.low[1].training, body.high[1].training) == (False, True)


def test_a_network_learns_from_scratch(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs, trained=False)
    recipe = settled(Recipe.scratch().changed({"epochs": 12}), found)
    records = list(fit(classifier, found, recipe, ENGINE))
    epochs = [record for record in records if isinstance(record, Epoch)]
    steps = [record for record in records if isinstance(record, Step)]
    assert len(epochs) == 12
    assert [step.step for step in steps] == list(range(1, steps[-1].num_steps + 1))
    assert (epochs[-1].val_balanced_accuracy or 0) >= 0.9
    assert steps[-1].left_s == 0
    assert not classifier.training
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_the_same_seed_gives_the_same_bits(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    states = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)
        classifier = classifier_of("resnet10t", inputs, trained=False)
        list(
            fit(classifier, found, settled(Recipe.scratch().changed({"epochs": 2}), found), ENGINE)
        )
        states.append(state_of(classifier))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_best_epoch_by_validation_loss_is_kept(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs, trained=False)
    recipe = settled(Recipe.scratch().changed({"epochs": 6, "lr": 0.3}), found)
    best = float("inf")
    for record in fit(classifier, found, recipe, ENGINE):
        if isinstance(record, Epoch):
            assert record.val_loss is not None
            assert record.is_best == (record.val_loss < best)
            best = min(best, record.val_loss)
    kept = infer(classifier, [normalised(found.images[found.val_rows], inputs, CPU)], ENGINE)
    losses = log_losses(softmax(kept), found.labels[found.val_rows])
    assert float(losses.mean()) == pytest.approx(best, rel=1e-4)


def test_with_balanced_class_weights_the_epoch_is_chosen_by_a_balanced_loss(
    bars: tuple[Material, InputSpec],
) -> None:
    found, inputs = bars
    few = [row for row in found.val_rows if found.labels[row]][:1]
    rows = np.array([row for row in found.val_rows if not found.labels[row]] + few)
    found = replace(found, val_rows=rows)
    classifier = classifier_of("resnet10t", inputs, trained=False)
    changes = {"epochs": 2, "lr": 0.3, "class_weights": "balanced"}
    records = fit(classifier, found, settled(Recipe.scratch().changed(changes), found), ENGINE)
    best = min(float(one.val_loss or 0) for one in records if isinstance(one, Epoch))
    kept = infer(classifier, [normalised(found.images[rows], inputs, CPU)], ENGINE)
    losses, labels = log_losses(softmax(kept), found.labels[rows]), found.labels[rows]
    means = [losses[labels == label].mean() for label in np.unique(labels)]
    assert float(np.mean(means)) == pytest.approx(best, rel=1e-3)
    assert float(losses.mean()) != pytest.approx(best, rel=1e-3)


def test_mixup_mixes_images_and_labels_alike(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    recipe = Recipe.scratch().changed({"epochs": 1, "mixup": 0.4, "augment": "none"})
    recipe = settled(recipe, found)
    classifier = classifier_of("resnet10t", inputs)
    seen: list[Tensor] = []
    logits: list[Tensor] = []

    def see(network: nn.Module, given: tuple[Tensor, ...]) -> None:
        if network.training:
            seen.append(given[0].detach())

    def hear(head: nn.Module, _given: object, output: Tensor) -> None:
        if head.training:
            logits.append(output.detach())

    classifier.backbone.register_forward_pre_hook(see)
    classifier.head.register_forward_hook(hear)
    told = [one for one in fit(classifier, found, recipe, ENGINE) if isinstance(one, Step)]
    assert told
    for step, (images, rows) in enumerate(Live(found, inputs, recipe, ENGINE).train_batches(0)):
        share = own_share(recipe, 0, step)
        assert 0 < share < 1
        torch.testing.assert_close(seen[step], share * images + (1 - share) * images.flip(0))
        labels = torch.from_numpy(found.labels[rows])
        own, other = (
            float(nn.functional.cross_entropy(logits[step], each))
            for each in (labels, labels.flip(0))
        )
        assert told[step].loss == pytest.approx(share * own + (1 - share) * other, rel=1e-4)


def test_mixup_is_refused_among_several_processes(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    recipe = settled(Recipe.scratch().changed({"epochs": 1, "mixup": 0.4}), found)
    engine = Engine("cpu", "fp32")
    engine.shard = (0, 2)
    with pytest.raises(UsageError, match="mixup"):
        next(fit(classifier_of("resnet10t", inputs), found, recipe, engine))


def test_a_stopped_fit_leaves_the_best_weights(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs, trained=False)
    before = state_of(classifier)
    running = fit(classifier, found, settled(Recipe.scratch(), found), ENGINE)
    for _ in range(3):
        next(running)
    running.close()  # what `break` does
    assert not classifier.training
    assert not torch.equal(before["head.weight"], classifier.state_dict()["head.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in classifier.state_dict().values())


def test_a_learning_rate_that_diverges_is_told(bars: tuple[Material, InputSpec]) -> None:
    found, inputs = bars
    classifier = classifier_of("vgg11", inputs, trained=False)
    changes = {"lr": 1e18, "clip_norm": 0.0, "epochs": 3}
    with pytest.raises(NumericError, match=r"loss is (nan|inf) in epoch \d at learning rate"):
        list(fit(classifier, found, settled(Recipe.scratch().changed(changes), found), ENGINE))


class Constant(nn.Module):
    """Sees nothing: the same features for every image."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.new_ones(len(images_BCHW), 2)


@pytest.mark.parametrize(("numbers", "weights", "entropy"), [
    ((90, 10), "none", -0.9 * log(0.9) - 0.1 * log(0.1)),
    ((90, 10), "balanced", log(2)),
    ((50, 50), "none", log(2)),
])  # fmt: skip
def test_a_constant_predictor_is_stuck_at_the_entropy_of_its_labels(
    numbers: tuple[int, int], weights: str, entropy: float
) -> None:
    labels = np.repeat([0, 1], numbers)
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), dtype=np.uint8)
    rows = np.arange(100)
    inputs = InputSpec((8, 8), 1, 8, (0.5,), (0.3,))
    backbone = Backbone("constant.py:net", Constant(), inputs)
    recipe = settled(
        Recipe.scratch().changed({"epochs": 60, "lr": 0.3, "class_weights": weights}),
        Material(images, labels, rows, rows),
    )
    with pytest.raises(NumericError) as stuck:
        list(fit(Classifier(backbone, NAMES), Material(images, labels, rows, rows), recipe, ENGINE))
    assert f"always answering with the class frequencies gives {entropy:.4f}" in str(stuck.value)
    assert "`--set class_weights=balanced`" in str(stuck.value)


def glorot(classifier: Classifier) -> None:
    """Keras' initialisation of `VGG16(weights=None)`."""
    generator = torch.Generator().manual_seed(0)
    for module in classifier.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def test_vgg16_with_glorot_weights_and_adam_is_found_stuck(make_shapes: MakeShapes) -> None:
    """The network of the original question: plain VGG16, Glorot-uniform, Adam 1e-3."""
    found, inputs = material(make_shapes(NAMES, 50))
    classifier = classifier_of("vgg16", inputs, trained=False)
    glorot(classifier)
    changes = {"optimizer": "adam", "lr": 1e-3, "clip_norm": 0.0, "epochs": 16, "batch_size": 4}
    recipe = settled(Recipe.scratch().changed(changes), found, "none")
    with pytest.raises(NumericError, match="training is stuck: after"):
        for _ in fit(classifier, found, recipe, Engine("cpu")):
            pass


@pytest.mark.slow
def test_vgg16_with_our_recipe_is_not_stuck_on_the_same_images(make_shapes: MakeShapes) -> None:
    found, inputs = material(make_shapes(NAMES, 100))
    classifier = classifier_of("vgg16", inputs, trained=False)
    recipe = settled(Recipe.scratch().changed({"epochs": 15}), found, "none")
    epochs = [e for e in fit(classifier, found, recipe, Engine("cpu")) if isinstance(e, Epoch)]
    assert epochs[-1].train_loss < 0.9 * log(2)


def test_the_cosine_rises_then_ends_at_nothing() -> None:
    phase = Phase(lr=1.0, warmup=0.1)
    rates = [scheduled_lr(phase, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_lower_stages_learn_slower_and_norms_do_not_decay() -> None:
    classifier = classifier_of("resnet10t", InputSpec((32, 32), 3))
    phase = Phase(lr=1.0, layer_decay=0.5, epochs=1)
    freeze(classifier, phase)
    optimizer = make_optimizer(classifier, phase, Recipe(weight_decay=0.1, optimizer="sgd"))
    factor = {
        id(parameter): (group["factor"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert factor[id(classifier.head.weight)] == (1.0, 0.1)
    assert factor[id(classifier.head.bias)] == (1.0, 0.0)
    parameters = dict(classifier.backbone.named_parameters())
    assert factor[id(parameters["body.conv1.0.weight"])] == (0.5**4, 0.1)
    assert factor[id(parameters["body.bn1.weight"])] == (0.5**4, 0.0)
    assert factor[id(parameters["body.layer4.0.conv1.weight"])] == (1.0, 0.1)
    assert len(factor) == len(list(classifier.parameters()))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_solved_head_separates_what_can_be_separated(num_classes: int) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(80) % num_classes
    centres = generator.normal(0, 1, (num_classes, 6)) * [1, 1, 1, 1, 100, 0]
    features = (centres[labels] + generator.normal(0, 0.1, (80, 6))).astype(np.float32)
    features[:, 5] = 0.0  # dead
    solution = solve_head(features, labels, [(np.arange(40), np.arange(40, 80))])
    assert (solution.logits(features[40:]).argmax(axis=1) == labels[40:]).all()
    assert solution.weight.shape == (num_classes, 6)


def test_adapted_batch_norm_measures_the_training_images_then_stays(
    bars: tuple[Material, InputSpec],
) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs)
    before = state_of(classifier.backbone)
    phase = Phase(learns="head", epochs=1, batch_norm="adapt")
    list(fit(classifier, found, settled(Recipe(goal="transfer", phases=(phase,)), found), ENGINE))
    after = classifier.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert changed == statistics
    images = normalised(found.images[found.train_rows], inputs, CPU)
    with torch.no_grad():
        first = classifier.backbone.body.get_submodule("conv1.0")(images)
    mean = after["body.conv1.1.running_mean"]
    assert torch.allclose(mean, first.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_the_head_may_learn_faster_than_the_last_stage() -> None:
    classifier = classifier_of("resnet10t", InputSpec((32, 32), 3))
    phase = Phase(lr=1.0, head_factor=10.0, epochs=1)
    freeze(classifier, phase)
    optimizer = make_optimizer(classifier, phase, Recipe(weight_decay=0.1, optimizer="sgd"))
    assert [group["factor"] for group in optimizer.param_groups[:2]] == [10.0, 10.0]
    assert {group["factor"] for group in optimizer.param_groups[2:]} == {1.0}


def test_frozen_tensors_are_not_averaged_and_learning_ones_are() -> None:
    classifier = classifier_of("resnet10t", InputSpec((32, 32), 3))
    phase = Phase(learns="last:1", lr=1.0, epochs=1)
    freeze(classifier, phase)
    averaged = Average(classifier, decay=0.9)
    averaged.update()
    top = dict(classifier.backbone.named_parameters())["body.layer4.0.conv1.weight"]
    before = top.detach().clone()
    with torch.no_grad():
        top.add_(1.0)
    averaged.update()
    mean = dict(averaged.module.backbone.named_parameters())["body.layer4.0.conv1.weight"]
    assert torch.allclose(mean, before + (1 - 2 / 11))  # the second decay is (1 + 1) / (10 + 1)
    learning = {id(tensor) for tensor in averaged.averaged}
    stem = dict(averaged.module.backbone.named_parameters())["body.conv1.0.weight"]
    assert id(stem) not in learning


def test_without_validation_images_the_last_epoch_is_kept(
    bars: tuple[Material, InputSpec],
) -> None:
    found, inputs = bars
    found = replace(found, val_rows=found.val_rows[:0])
    classifier = classifier_of("resnet10t", inputs, trained=False)
    recipe = settled(Recipe.scratch().changed({"epochs": 3}), found)
    told = [r for r in fit(classifier, found, recipe, ENGINE) if isinstance(r, Epoch)]
    assert [record.val_loss for record in told] == [None] * 3
    assert not any(record.is_best for record in told)
    batch = normalised(found.images[found.train_rows], inputs, CPU)
    kept = infer(classifier, [batch], ENGINE)
    right = (kept.argmax(axis=1) == found.labels[found.train_rows]).mean()
    assert right > 0.5


def test_training_from_scratch_tells_what_each_stage_is_worth(
    bars: tuple[Material, InputSpec],
) -> None:
    found, inputs = bars
    classifier = classifier_of("resnet10t", inputs, trained=False)
    recipe = settled(Recipe.scratch().changed({"epochs": 2}), found)
    told = [r for r in fit(classifier, found, recipe, ENGINE) if isinstance(r, Epoch)]
    for record in told:
        assert len(record.stage_probes) == len(classifier.backbone.stages)
        assert all(0 <= score <= 1 for score in record.stage_probes)
        assert record.effective_rank is not None and record.effective_rank >= 1


def test_a_network_is_compiled_where_it_is_asked_for_and_learns_the_same(
    bars: tuple[Material, InputSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, inputs = bars
    compiled: list[nn.Module] = []
    original = torch.compile

    def eagerly(network: nn.Module) -> object:
        compiled.append(network)
        return original(network, backend="eager")  # the tracing alone: no compiler is at hand

    monkeypatch.setattr(torch, "compile", eagerly)
    states = []
    for engine in (ENGINE, Engine("cpu", "fp32", compiles=True)):
        classifier = classifier_of("resnet10t", inputs, trained=False)
        recipe = settled(Recipe.scratch().changed({"epochs": 1}), found)
        list(fit(classifier, found, recipe, engine))
        states.append(state_of(classifier))
    assert len(compiled) == 1
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
