"""Too little memory, told with the batch size, an estimate and a smaller value."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from regraft.engine import Engine
from regraft.errors import EnvironmentFault
from regraft.models.classifier import Classifier
from regraft.training.recipe import Recipe

# What allocators say where they raise no error of their own.
SIGNS = ("DefaultCPUAllocator", "not enough memory", "allocate memory", "out of memory")
COPIES = 5  # of the weights: themselves, gradients, moments, averages, the best


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def out_of_memory(classifier: Classifier, recipe: Recipe, engine: Engine) -> EnvironmentFault:
    """Returns what to tell of a training that found too little memory."""
    batch, size = int(recipe.batch_size), classifier.inputs.size
    needed = _needed_bytes(classifier, batch, engine)
    about = f": about {needed / 1e9:.2g} GB are needed" if needed else ""
    fewer = max(2, batch // 2)
    smaller = f"`--image-size {max(32, min(size) // 2)}`"
    return EnvironmentFault(
        f"too little memory for batches of {batch} images of {size[0]}x{size[1]} px{about}",
        hint=(f"use `--batch-size {fewer}` or {smaller}" if fewer < batch else f"use {smaller}")
        + "; what was saved before is intact",
    )


def _needed_bytes(classifier: Classifier, batch: int, engine: Engine) -> int:
    """Returns what a step needs, from what a forward pass of two images keeps; 0: not known."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        network: Any = deepcopy(classifier).train()
        own = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
        inputs = classifier.inputs
        images_BCHW = torch.zeros(2, inputs.channels, *inputs.size, device=engine.device)
        kept_whole = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with kept_whole, engine.seeded(0), engine.autocast():
            network(images_BCHW)
    except (MemoryError, RuntimeError):  # not even for that
        return 0
    activations = sum(size for place, size in kept.items() if place not in own)
    weights: int = sum(tensor.nbytes for tensor in network.state_dict().values())
    return activations * batch // 2 + COPIES * weights
