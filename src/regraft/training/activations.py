"""Activations: the frozen part of a network runs once over a dataset, and the rest trains on what
it gave.

They lie in the user's cache folder, keyed by images, InputSpec, weights below the cut, precision
and augmentation.
"""

import hashlib
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.augment import AUGMENTATIONS
from regraft.data.batches import (
    Rows,
    part_of,
    plain_order,
    shuffled_batches,
)
from regraft.disk import create_array
from regraft.documents import read_json, sha256_of
from regraft.engine import evaluating
from regraft.models.backbone import Backbone
from regraft.models.stages import Cut
from regraft.progress import Counting
from regraft.storage import (
    cache_home,
    committed_folder,
    is_whole,
    make_cache,
    remove_folder,
    remove_leftovers,
    write_json,
)
from regraft.training.feeds import Feed, Live
from regraft.training.recipe import Phase

BUDGET_BYTES = 16 * 2**30  # of all stored activations together; assumed
KEPT_FREE = 0.5  # of the free disk stays free; assumed


@dataclass(frozen=True)
class Stored:
    """Activations at a cut, through what lies above it.

    Attributes:
        values: Memory-mapped, (place, ...): all training images plain, all validation images,
            then the training images in each of their augmented views.
        is_channels_last: Whether channels stand last on disk, and second in the network.
    """

    live: Live
    cut: Cut
    values: NDArray[Any]
    is_channels_last: bool

    def train_batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Rows]]:
        recipe, material = self.live.recipe, self.live.material
        places = _places(material.train_rows)
        if self.live.views:
            view = epoch % self.live.views
            plain = len(material.train_rows) + len(material.val_rows)
            places = places + plain + view * len(material.train_rows)
        batches = shuffled_batches(
            material.train_rows, batch_size=int(recipe.batch_size), seed=recipe.seed, epoch=epoch
        )
        for rows in batches[skip:]:
            yield self._tensor(places[part_of(rows, self.live.engine.shard)]), rows

    def plain_batches(self, rows: Rows) -> Iterator[Tensor]:
        material = self.live.material
        places = _places(np.concatenate([material.train_rows, material.val_rows]))
        for own in plain_order(rows, self.live.batch_size, self.live.engine.shard):
            yield self._tensor(places[own])

    def features(self, backbone: Backbone, batch: Tensor) -> Tensor:
        return backbone.above(self.cut, batch)

    def _tensor(self, places: Rows) -> Tensor:
        tensor = torch.from_numpy(self.values[places]).to(self.live.engine.device)
        if tensor.dtype == torch.int16:
            tensor = tensor.view(torch.bfloat16)
        return tensor.movedim(-1, 1) if self.is_channels_last else tensor


def choose_feed(
    live: Live, backbone: Backbone, phase: Phase
) -> Generator[Counting, None, tuple[Feed, str]]:
    """Returns stored activations where a phase has a frozen part, and else the network itself.

    Yields progress while activations are computed.

    Args:
        live: The whole network's feed.
        backbone: In the state of the phase.
        phase: What learns.

    Returns:
        The feed; and why a frozen part has to be run at each step, if it has.
    """
    phases, num_stages = live.recipe.phases, len(backbone.stages)
    num_frozen = phase.num_frozen(num_stages)
    if not num_frozen or live.material.key is None:
        return live, ""
    # Where some stages stay frozen in every phase, their activations serve them all.
    always = min(each.num_frozen(num_stages) for each in phases)
    cut = backbone.cut(always) if always else None
    served = phases if cut else (phase,)
    cut = cut or backbone.cut(num_frozen)
    if cut is None:
        return live, f"`{backbone.arch}` is no chain of modules below what learns"
    # A head alone is solved on plain images; its activations serve every seed.
    trains = any(each.learns != "head" for each in served)
    views = live.views or 0 if trains else 0
    folder = cache_home() / "activations" / _key(live, backbone, cut, views)
    if live.engine.any(not _is_whole(folder)):
        obstacle = yield from _fill(folder, live, backbone, cut, views)
        if obstacle:
            return live, obstacle
    os.utime(folder)  # the least recently used go first
    values = np.load(folder / "values.npy", mmap_mode="r")
    is_channels_last = bool(read_json(folder / "activations.json")["is_channels_last"])
    return Stored(live, cut, values, is_channels_last), ""


def _fill(
    folder: Path, live: Live, backbone: Backbone, cut: Cut, views: int
) -> Generator[Counting, None, str]:
    """Computes the activations in shards and commits them; returns the obstacle, if any."""
    engine, rows = live.engine, live.material.train_rows
    both = np.concatenate([rows, live.material.val_rows])
    total = len(both) + views * len(rows)
    make_cache(folder.parent)
    if engine.is_first_here:
        remove_leftovers(folder.parent)
        remove_folder(folder)  # damaged, if it is there at all
    with evaluating(backbone), torch.inference_mode():
        plain = _below(live, backbone, cut, live.plain_batches(both))
        first = list(islice(plain, 1))  # none, where other processes have all
        one = (first or list(_below(live, backbone, cut, [live.example()])))[0][:1]
        example = _to_disk(one)
        needed = total * example.nbytes
        room = _make_room(folder.parent, needed) if engine.is_first_here else needed
        if engine.any(room < needed):
            return (
                f"its activations need {needed / 2**30:.1f} GiB of disk, more than the "
                f"{room / 2**30:.1f} GiB there is for them"
            )
        begun = committed_folder(folder, "activations") if engine.is_first_here else nullcontext()
        with begun as temporary:
            values: NDArray[Any] | None = None
            if temporary is not None:
                shape = (total, *example.shape[1:])
                values = create_array(temporary / "values.npy", example.dtype, shape)
            passes: list[tuple[int, Iterator[Tensor]]] = [(len(both), chain(first, plain))]
            passes += [
                (len(rows), _below(live, backbone, cut, live.view_batches(view)))
                for view in range(views)
            ]
            done = 0
            for number, outputs in passes:
                for _ in range(ceil(number / live.batch_size / engine.shard[1])):
                    own = [_to_disk(output) for output in islice(outputs, 1)]
                    for part in engine.gathered(own):
                        if values is not None:
                            values[done : done + len(part)] = part
                        done += len(part)
                        yield Counting("frozen part", done, total)
            if temporary is not None:
                description = {"schema": 1, "is_channels_last": one.ndim == 4}
                write_json(temporary / "activations.json", description)
    engine.wait()
    return ""


def _is_whole(folder: Path) -> bool:
    """Whether the activations are there and verify; hashed once while their files stay the same."""
    try:
        files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    except OSError:
        return False
    return _verified(folder, *((name, s.st_ino, s.st_size, s.st_ctime_ns) for name, s in files))


@lru_cache(maxsize=64)
def _verified(folder: Path, *_files: tuple[str, int, int, int]) -> bool:
    return is_whole(folder)


def _below(live: Live, backbone: Backbone, cut: Cut, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for images_BCHW in batches:
        with live.engine.autocast():  # of the network alone: images are augmented in float32
            output = backbone.below(cut, images_BCHW)
        yield output


def _to_disk(activations: Tensor) -> NDArray[Any]:
    """Returns the values for the disk: bf16 as int16 bits, channels of maps last."""
    if activations.ndim == 4:
        activations = activations.movedim(1, -1)
    if activations.dtype == torch.bfloat16:
        activations = activations.contiguous().view(torch.int16)
    return activations.contiguous().cpu().numpy()


def _make_room(home: Path, needed: int) -> int:
    """Deletes the least recently used activations; returns the bytes there are then."""
    # Folders of other processes come and go; hidden ones are at work.
    folders = [path for path in home.glob("*") if path.is_dir() and path.name[0] != "."]
    folders = sorted(folders, key=lambda folder: folder.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    most = int(min(BUDGET_BYTES, (shutil.disk_usage(home).free + sum(sizes)) * KEPT_FREE))
    if needed <= most:
        while folders and sum(sizes) + needed > most:
            remove_folder(folders.pop(0))
            sizes.pop(0)
    return most


def _key(live: Live, backbone: Backbone, cut: Cut, views: int) -> str:
    weights = hashlib.sha256()
    above = tuple(f"body.{name}." for name in cut.above)
    for name, tensor in backbone.state_dict().items():
        if not name.startswith(above):
            weights.update(name.encode())
            weights.update(tensor.cpu().contiguous().numpy().data)
    material, recipe = live.material, live.recipe
    rows = [
        hashlib.sha256(r.tobytes()).hexdigest() for r in (material.train_rows, material.val_rows)
    ]
    look = [recipe.seed, asdict(AUGMENTATIONS[recipe.augment])] if views else []
    return sha256_of([
        1, material.key, rows, live.inputs.to_dict(), backbone.arch, cut.below,
        weights.hexdigest(), live.engine.precision, live.engine.device.type, torch.__version__,
        views, look,
    ])  # fmt: skip


def _places(rows: Rows) -> Rows:
    """Returns where each row stands in `rows`."""
    places = np.full(rows.max(initial=0) + 1, -1)
    places[rows] = np.arange(len(rows))
    return places
