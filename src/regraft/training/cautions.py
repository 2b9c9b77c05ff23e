"""Cautions: what a recipe asks for although it is known to seldom pay. It is done, and told."""

from collections.abc import Iterator

from regraft.data.augment import AUGMENTATIONS
from regraft.training.recipe import Recipe

LEAST_TO_MIX = 20_000  # images; BiT-HyperRule, Kolesnikov et al. 2020, arXiv:1912.11370


def cautions(recipe: Recipe, *, num_images: int, is_grey: bool) -> Iterator[str]:
    """Yields what speaks against a resolved recipe.

    Args:
        recipe: Of a training that somebody asked for.
        num_images: Training images.
        is_grey: Whether the images have no colour.
    """
    augmentation = AUGMENTATIONS[recipe.augment]
    if is_grey and (augmentation.flip or augmentation.erase):
        yield (
            f"`augment` = {recipe.augment} mirrors images and erases parts of them, and these are "
            "grey: in radiographs and characters left is not right, and small findings count "
            "(`gentle` does neither)"
        )
    if recipe.mixup and num_images < LEAST_TO_MIX:
        yield f"`mixup` seldom pays with fewer than {LEAST_TO_MIX:,} training images"
    if recipe.goal == "scratch" and recipe.label_smoothing:
        yield (
            "features learned with `label_smoothing` may serve a head on frozen stages worse "
            "(arXiv:2010.16402)"
        )
