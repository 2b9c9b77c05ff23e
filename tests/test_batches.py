"""Training batches visit every row once; evaluation batches are plain and in order."""

import inspect
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.augment import AUGMENTATIONS, Augmentation
from regraft.data.batches import ahead, eval_batches, num_batches, train_batches
from regraft.inputs import InputSpec

FULL = (0.0, 65535.0)
CPU = torch.device("cpu")
INPUTS = InputSpec((6, 5), 3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
PIXELS = np.random.default_rng(0).integers(0, 256, (200, 6, 5, 3), dtype=np.uint8)
ROWS = np.arange(3, 200, 3)  # a split is some rows of the cache, not all


def epoch_of(
    rows: NDArray[np.int64] = ROWS, how: Augmentation | None = None, *,
    batch_size: int = 8, seed: int = 0, epoch: int = 0,
) -> list[tuple[Tensor, NDArray[np.int64]]]:  # fmt: skip
    return list(
        train_batches(
            PIXELS,
            rows,
            INPUTS,
            how or Augmentation(),
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            device=CPU,
        )
    )


def order_of(batches: list[tuple[Tensor, NDArray[np.int64]]]) -> list[int]:
    return np.concatenate([chosen for _, chosen in batches]).tolist()  # type: ignore[no-any-return]


def expected(rows: NDArray[np.int64]) -> NDArray[np.float64]:
    scaled = PIXELS[rows] / 255
    normal: NDArray[np.float64] = (scaled - np.array(INPUTS.mean)) / np.array(INPUTS.std)
    return normal.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("batch_size", [1, 8, 65, 66, 1000])
def test_an_epoch_visits_every_row_once(batch_size: int) -> None:
    assert sorted(order_of(epoch_of(batch_size=batch_size))) == ROWS.tolist()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(order_of(epoch_of(seed=seed, epoch=epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    torch.manual_seed(9)
    assert tuple(order_of(epoch_of(seed=1, epoch=1))) == orders[1, 1]
    assert all(list(order) != sorted(order) for order in orders.values())


@pytest.mark.parametrize(("number", "batch_size"), [(65, 8), (33, 32), (65, 32), (7, 3), (10, 10)])
def test_batches_differ_by_one_image_at_most_and_none_has_one_alone(
    number: int, batch_size: int
) -> None:
    sizes = [len(chosen) for _, chosen in epoch_of(np.arange(number), batch_size=batch_size)]
    assert max(sizes) - min(sizes) <= 1
    assert 1 < min(sizes) <= max(sizes) <= batch_size
    assert len(sizes) == num_batches(number, batch_size) == -(-number // batch_size)


def test_images_stand_beside_their_rows() -> None:
    for images, chosen in epoch_of():
        torch.testing.assert_close(images.double().numpy(), expected(chosen), rtol=0, atol=1e-5)


def test_batch_size_does_not_change_what_happens_to_an_image() -> None:
    how = AUGMENTATIONS["natural"]
    by_row = [
        {row: image for images, rows in epoch_of(how=how, batch_size=size)
         for image, row in zip(images, rows.tolist(), strict=True)}
        for size in (8, 30)
    ]  # fmt: skip
    for row in ROWS.tolist():
        torch.testing.assert_close(by_row[0][row], by_row[1][row], rtol=0, atol=1e-5)


def test_what_happens_to_an_image_is_unrelated_to_its_place_in_the_epoch() -> None:
    # A ramp from left to right: after a rotation its slope from top to bottom tells the angle.
    ramp = np.broadcast_to(
        np.arange(0, 240, 15, dtype=np.uint8)[None, None, :, None], (300, 16, 16, 1)
    )
    batches = train_batches(
        ramp, np.arange(300), InputSpec((16, 16), 1, mean=(0.5,), std=(0.2,)),
        Augmentation(rotate=10), batch_size=32, seed=0, epoch=0, device=CPU,
    )  # fmt: skip
    middle = torch.cat([images for images, _ in batches])[:, 0, 4:12, 4:12]
    slope = (middle[:, -1] - middle[:, 0]).mean(1).numpy()
    assert slope.std() > 0.1
    assert abs(np.corrcoef(slope, np.arange(300))[0, 1]) < 0.2


def test_evaluation_is_plain_and_in_order() -> None:
    rows = np.array([9, 3, 3, 150, 0])
    batches = list(eval_batches(PIXELS, rows, INPUTS, batch_size=2, device=CPU))
    assert [len(images) for images in batches] == [2, 2, 1]
    seen = torch.cat(batches).double().numpy()
    torch.testing.assert_close(seen, expected(rows), rtol=0, atol=1e-5)


def test_evaluation_cannot_shuffle_or_augment() -> None:
    parameters = set(inspect.signature(eval_batches).parameters)
    assert parameters == {"images", "rows", "inputs", "batch_size", "device", "shard"}
    assert {"how", "seed", "epoch"} <= set(inspect.signature(train_batches).parameters)


def test_normalising_by_the_measured_values_gives_mean_0_and_std_1() -> None:
    scaled = PIXELS / 255
    mean, std = scaled.mean((0, 1, 2)).tolist(), scaled.std((0, 1, 2)).tolist()
    inputs = InputSpec((6, 5), 3, mean=tuple(mean), std=tuple(std))
    (images,) = eval_batches(PIXELS, np.arange(200), inputs, batch_size=200, device=CPU)
    assert images.dtype == torch.float32
    assert images.shape == (200, 3, 6, 5)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("values", [PIXELS, np.full_like(PIXELS, 255), np.zeros_like(PIXELS)])
def test_8_and_16_bit_of_one_picture_give_nearly_equal_tensors(values: NDArray[np.uint8]) -> None:
    wide = values.astype(np.uint16) * np.uint16(257)
    eight, sixteen = (
        next(eval_batches(images, ROWS, inputs, batch_size=200, device=CPU))
        for images, inputs in ((values, INPUTS), (wide, replace(INPUTS, intensity_range=FULL)))
    )
    torch.testing.assert_close(eight, sixteen, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the name alone decides: no GPU is touched
def test_batches_made_ahead_are_the_same_in_the_same_order(device: str) -> None:
    assert list(ahead(iter(range(5)), torch.device(device))) == list(range(5))


def test_a_mistake_in_a_batch_made_ahead_is_told() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        list(ahead(broken(), torch.device("cuda")))
