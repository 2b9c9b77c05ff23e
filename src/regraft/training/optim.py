"""A phase made real: what is frozen, which parameters learn at which rate, and when."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from regraft.data.batches import num_batches
from regraft.engine import Engine, evaluating, spells
from regraft.errors import UsageError, count
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Counting
from regraft.training.recipe import Phase, Recipe


def refuse_frozen_random(backbone: Backbone, recipe: Recipe) -> None:
    """Refuses to leave weights random for ever: the features would stay noise.

    Raises:
        UsageError: Some random tensors learn in no phase.
    """
    learning = {stage for phase in recipe.phases for stage in learning_stages(backbone, phase)}
    frozen = [
        number
        for number, names in enumerate(backbone.stages)
        if number not in learning and backbone.random.intersection(names)
    ]
    if frozen:
        what = "backbone" if backbone.is_random else f"stage {frozen[0] + 1}"
        raise UsageError(
            f"the {what} is random, and learning only `{recipe.phases[-1].learns}` would freeze "
            f"it: a frozen random {what} stays random, however long the head trains",
            hint="give trained weights with `--start RUN`, or let all of it learn "
            "(`--strategy lp-ft` or `full`; `regraft pretrain`)",
        )


def refuse_missing_stages(backbone: Backbone, recipe: Recipe) -> None:
    """Refuses `last:<n>` of more stages than the backbone has.

    Raises:
        UsageError: There are fewer.
    """
    most = len(backbone.stages)
    for phase in recipe.phases:
        if phase.num_last > most:
            raise UsageError(
                f"`{phase.learns}`: `{backbone.arch}` has {count(most, 'stage')}",
                hint=f"use `last:1` to `last:{most - 1}`, or `full`",
            )


def refuse_single_images(backbone: Backbone, recipe: Recipe, num_images: int) -> None:
    """Refuses batches of one image where BatchNorm needs a variance.

    Raises:
        UsageError: The smallest batch of a phase would be one.
    """
    smallest = num_images // num_batches(num_images, int(recipe.batch_size))
    trains = [p for p in recipe.phases if p.learns != "head" and p.batch_norm == "train"]
    if smallest < 2 and trains and backbone.normalisation == "batch":
        raise UsageError(
            f"`--batch-size {recipe.batch_size}` gives batches of one of {num_images} training "
            "images, on which BatchNorm cannot compute a variance",
            hint="use a larger `--batch-size`, or an architecture without BatchNorm",
        )


def freeze(classifier: Classifier, phase: Phase) -> None:
    """Puts the network into the state of a phase: what learns is in training mode, the rest is
    frozen, parameters and BatchNorm statistics alike.
    """
    backbone = classifier.backbone
    learning = set(learning_stages(backbone, phase))
    classifier.train()
    if len(learning) < len(backbone.stages):
        # Only own stages may be in training mode: dropout of a frozen part would be noise.
        backbone.eval()
        for stage in learning:
            for module in backbone.stage_modules(stage):
                module.training = True
    parameters = dict(backbone.named_parameters())
    for stage, names in enumerate(backbone.stages):
        for name in names:
            if name in parameters:
                parameters[name].requires_grad_(stage in learning)
    if phase.batch_norm != "train":
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def adapt_batch_norm(backbone: Backbone, batches: Iterable[Tensor], engine: Engine) -> None:
    """Measures the BatchNorm statistics again, on these images.

    Source: Li et al. 2016, arXiv:1603.04779.
    """
    for _ in adapting_batch_norm(backbone, batches, engine):
        pass


def adapting_batch_norm(
    backbone: Backbone, batches: Iterable[Tensor], engine: Engine, total: int = 0
) -> Iterator[Counting]:
    """Does the same, and yields about every second how far it is; begun again, it gives the same.

    Args:
        backbone: Changed in place.
        batches: Of `total` images.
        engine: Where and how to compute.
        total: For the Counting.
    """
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluating(backbone):
        for norm in norms:  # these alone: dropout stays off
            norm.reset_running_stats()
            norm.training = True
        seen = 0
        for spell in spells(batches):
            if seen:
                yield Counting("BatchNorm statistics", min(seen, total), total)
            with torch.no_grad(), engine.autocast():  # not while others act
                for images_BCHW in spell:
                    if len(images_BCHW) == 1 and seen:
                        continue  # a single image has no variance
                    seen += len(images_BCHW)
                    for norm in norms:  # every image weighs the same
                        norm.momentum = len(images_BCHW) / seen
                    backbone(images_BCHW)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def learning_stages(backbone: Backbone, phase: Phase) -> list[int]:
    number = len(backbone.stages)
    return [stage for stage in range(number) if phase.learns_stage(stage, number)]


def make_optimizer(classifier: Classifier, phase: Phase, recipe: Recipe) -> Optimizer:
    """Returns the optimiser over what learns; a parameter that is absent is frozen."""
    groups = list(_groups(classifier, phase, float(recipe.weight_decay)))
    fused = classifier.head.weight.device.type in ("cpu", "cuda")
    if recipe.optimizer == "sgd":
        # momentum 0.9: Krizhevsky et al. 2012.
        # fused: measured 4x faster than one operation a tensor on 2 cores (ResNet-18)
        return SGD(groups, lr=float(phase.lr), momentum=0.9, nesterov=True, fused=fused)
    kinds: dict[str, type[Adam]] = {"adamw": AdamW, "adam": Adam}
    return kinds[recipe.optimizer](groups, lr=float(phase.lr), fused=fused)


def _groups(classifier: Classifier, phase: Phase, decay: float) -> Iterator[dict[str, object]]:
    backbone = classifier.backbone
    parameters = dict(backbone.named_parameters())
    top = len(backbone.stages) - 1
    parts = [(list(classifier.head.parameters()), phase.head_factor)]
    for stage in learning_stages(backbone, phase):
        own = [parameters[name] for name in backbone.stages[stage] if name in parameters]
        parts.append((own, phase.layer_decay ** (top - stage)))
    for own, factor in parts:
        # Biases and norms (one dimension) are not decayed: arXiv:1812.01187.
        for chosen, weight_decay in (
            ([p for p in own if p.ndim > 1], decay),
            ([p for p in own if p.ndim <= 1], 0.0),
        ):
            if chosen:
                yield {"params": chosen, "weight_decay": weight_decay, "factor": factor}


def clipped(parameters: Sequence[Tensor], most: float) -> Tensor:
    """Returns the norm of all gradients; where it is larger than `most`, they are scaled down.

    Args:
        parameters: What learns.
        most: 0: unlimited.
    """
    if most:
        return nn.utils.clip_grad_norm_(parameters, most)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def scheduled_lr(phase: Phase, step: int, num_steps: int) -> float:
    """Returns the rate of one step: linear warm-up, then a cosine to 0 at the last step.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983; warm-up: arXiv:1706.02677.
    """
    warm = max(1, round(phase.warmup * num_steps)) if phase.warmup else 0
    peak = float(phase.lr)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + cos(pi * (step - warm) / max(1, num_steps - warm)))


class Average:
    """Exponential moving average of what learns, with warm-up, in a copy of the classifier.

    Frozen tensors are left out: averaging all 14.7 million values of VGG16 takes longer than the
    optimiser's step on its last stage.

    Attributes:
        module: The averaged classifier.
    """

    def __init__(self, classifier: Classifier, decay: float) -> None:
        # What is frozen is shared.
        shared = {id(each): each for each in classifier.parameters() if not each.requires_grad}
        self.module = deepcopy(classifier, shared)
        self.decay = decay
        self.steps = 0
        parameters = zip(self.module.parameters(), classifier.parameters(), strict=True)
        buffers = list(zip(self.module.buffers(), classifier.buffers(), strict=True))
        learning = [(old.detach(), new) for old, new in parameters if new.requires_grad]
        pairs = learning + [(old, new) for old, new in buffers if old.is_floating_point()]
        self.averaged = [old for old, _ in pairs]
        self.current = [new.detach() for _, new in pairs]
        self.counts = [(old, new) for old, new in buffers if not old.is_floating_point()]

    def update(self) -> None:
        """Takes in the weights after one more step."""
        # The usual warm-up, as in TensorFlow's ExponentialMovingAverage: early weights fade fast.
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        torch._foreach_lerp_(self.averaged, self.current, 1 - decay)
        for old, new in self.counts:
            old.copy_(new)
        self.steps += 1
