"""What happens to an image depends on (seed, epoch, sample) alone, and goes as far as it says."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.augment import AUGMENTATIONS, Augmentation, augment, uniform


def images(number: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 3, height, width, generator=generator)


def rows(number: int) -> NDArray[np.int64]:
    return np.arange(number, dtype=np.int64)


def test_draws_are_uniform() -> None:
    draws = uniform(0, 0, rows(20_000), 13)
    assert draws.dtype == np.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(draws.var(axis=0), 1 / 12, atol=0.003)
    correlation = np.corrcoef(draws.T) - np.eye(13)
    assert np.abs(correlation).max() < 0.04


def test_draws_of_a_sample_do_not_depend_on_the_other_samples() -> None:
    everything = uniform(3, 7, rows(50), 13)
    subset = np.array([41, 3, 17, 3])
    np.testing.assert_array_equal(uniform(3, 7, subset, 13), everything[subset])
    np.testing.assert_array_equal(uniform(3, 7, subset, 4), everything[subset, :4])


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (0, 2), (2**40, 0)])
def test_another_seed_or_epoch_gives_unrelated_draws(seed: int, epoch: int) -> None:
    first, second = (uniform(s, e, rows(5000), 1) - 0.5 for s, e in ((0, 0), (seed, epoch)))
    assert abs(12 * (first * second).mean()) < 0.06


def test_these_draws_stay_the_same_in_every_version() -> None:
    recorded = [[0.4373183846473694, 0.9549254775047302, 0.2757871150970459]]
    assert uniform(1, 2, np.array([3]), 3).tolist() == recorded


@pytest.mark.parametrize("name", ["gentle", "natural", "trivial"])
def test_an_image_is_changed_alike_in_any_batch_and_under_any_global_seed(name: str) -> None:
    batch, how = images(12), AUGMENTATIONS[name]
    torch.manual_seed(1)
    together = augment(batch, rows(12), how, seed=5, epoch=2)
    torch.manual_seed(2)
    np.random.seed(3)
    order = np.array([11, 4, 7])
    alone = augment(batch[order], order, how, seed=5, epoch=2)
    torch.testing.assert_close(alone, together[order], rtol=0, atol=1e-5)
    assert not torch.allclose(together, batch)
    later = augment(batch, rows(12), how, seed=5, epoch=3)
    assert not torch.allclose(together, later)


def test_none_returns_the_very_same_tensor() -> None:
    batch = images(2)
    assert augment(batch, rows(2), AUGMENTATIONS["none"], seed=0, epoch=0) is batch


def test_the_batch_itself_is_not_changed() -> None:
    batch = images(6)
    before = batch.clone()
    augment(batch, rows(6), AUGMENTATIONS["natural"], seed=0, epoch=0)
    assert torch.equal(batch, before)


def test_half_of_the_images_are_flipped_and_nothing_else_happens() -> None:
    batch = images(2000, 8, 6)
    out = augment(batch, rows(2000), Augmentation(flip=True), seed=0, epoch=0)
    flipped = ((out - batch.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4).numpy()
    same = ((out - batch).abs().amax(dim=(1, 2, 3)) < 1e-4).numpy()
    assert (flipped ^ same).all()
    assert abs(flipped.mean() - 0.5) < 0.04


def test_a_quarter_of_the_images_lose_a_small_rectangle() -> None:
    batch = torch.ones(2000, 3, 40, 30)
    out = augment(batch, rows(2000), Augmentation(erase=0.25), seed=0, epoch=0)
    blank = (out == 0).all(dim=1)
    area = blank.float().mean(dim=(1, 2)).numpy()
    assert abs((area > 0).mean() - 0.25) < 0.03
    assert area[area > 0].min() > 0.01
    assert area.max() < 0.25
    first = int(np.argmax(area > 0))
    tall, wide = blank[first].any(1).sum(), blank[first].any(0).sum()
    assert blank[first].sum() == tall * wide, "it is one rectangle"
    assert torch.equal(out[:, :1], out[:, 1:2]), "in all channels alike"
    assert ((out == 0) | (out == 1)).all()
    assert blank.any(dim=0)[3:-3, 3:-3].all(), "and it may lie anywhere"


def test_contrast_and_brightness_stay_within_their_ranges() -> None:
    batch = images(500)
    how = Augmentation(brightness=0.2, contrast=0.1)
    out = augment(batch, rows(500), how, seed=0, epoch=0)
    gain = out.std(dim=(1, 2, 3)) / batch.std(dim=(1, 2, 3))
    offset = out.mean(dim=(1, 2, 3)) - gain * batch.mean(dim=(1, 2, 3))
    assert 0.899 < gain.min() < 0.92 < 1.08 < gain.max() < 1.101
    assert -0.201 < offset.min() < -0.18 < 0.18 < offset.max() < 0.201


def test_a_single_transform_leaves_the_others_out() -> None:
    batch = torch.full((4000, 1, 20, 20), 2.0)
    batch[:, :, ::2] = 1.0
    how = Augmentation(brightness=0.5, contrast=0.5, erase=1.0, is_single=True)
    out = augment(batch, rows(4000), how, seed=0, epoch=0)
    erased = (out == 0).any(dim=(1, 2, 3))
    whole = out[:, 0, :2, 0]  # rows of 1 and of 2: their distance is the gain
    gain, offset = whole[:, 1] - whole[:, 0], 2 * whole[:, 0] - whole[:, 1]
    contrast, bright = ~erased & ((gain - 1).abs() > 1e-4), ~erased & (offset.abs() > 1e-4)
    assert not (contrast & bright).any()
    for happened in (erased, contrast, bright):
        assert abs(happened.float().mean() - 1 / 8) < 0.02
    rest = ~(erased | contrast | bright)
    torch.testing.assert_close(out[rest], batch[rest])


def blob(height: int, width: int) -> Tensor:
    """A round spot in the middle."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = (y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2
    return torch.exp(-distance / 40)[None, None]


def test_a_rotation_keeps_round_things_round_in_an_oblong_image() -> None:
    spot = blob(32, 64).expand(20, 1, 32, 64)
    out = augment(spot, rows(20), Augmentation(rotate=80, flip=True), seed=0, epoch=0)
    assert (out - spot).abs().max() < 0.05


def test_a_shift_goes_up_to_its_share_of_the_side() -> None:
    out = augment(blob(32, 64).expand(400, 1, 32, 64), rows(400), Augmentation(shift=0.1),
                  seed=0, epoch=0)[:, 0]  # fmt: skip
    place = out.flatten(1).argmax(1)
    dy, dx = (place // 64 - 15.5).abs(), (place % 64 - 31.5).abs()
    assert 2.5 <= dy.max() <= 0.1 * 32 + 1
    assert 5.5 <= dx.max() <= 0.1 * 64 + 1
