"""Engine: device, precision, memory format and processes; the only file that imports accelerate.

Under `torchrun` every process runs the same command; the main one (rank 0) writes and tells.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regraft.errors import EnvironmentFault, UsageError

PROBE_PIXELS = 32 * 128 * 128  # in a timed step: fills the cores, and is short at 224 px
PROBE_STEPS = 2
SPELL_S = 1.0  # between two looks at signals and progress bars; assumed short enough to wait for
Item = TypeVar("Item")


class Engine:
    """Where and how tensors are computed.

    Attributes:
        device: Where the network and the batches live.
        precision: `bf16` where the processor computes it natively, else `fp32`.
        shard: This process among all: (rank, number); (0, 1) where there is one.
        is_main: Whether this process writes and tells.
        is_first_here: Whether it is the one that fills the caches of its machine.
        compiles: Whether networks are compiled before they are trained (`torch.compile`).
    """

    def __init__(
        self, device: str = "auto", precision: str = "auto", *, compiles: bool = False
    ) -> None:
        from accelerate import Accelerator

        _keep_freed_memory()
        chosen = _device(device)
        self.compiles = compiles
        self.precision = _precision(chosen) if precision == "auto" else precision
        # Precision is ours (`autocast`): accelerate allows one per process for ever.
        self._accelerator: Accelerator = Accelerator(cpu=chosen.type == "cpu")
        # A process of several has a GPU of its own; accelerate knows which.
        self.device = self._accelerator.device if chosen.type == "cuda" else chosen
        self.shard = (self._accelerator.process_index, self._accelerator.num_processes)
        if self.shard[1] > 1 and self.device.type == "cpu":
            # torchrun leaves each process one thread, however many cores there are.
            here = int(os.environ.get("LOCAL_WORLD_SIZE", self.shard[1]))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
        self.is_main: bool = self._accelerator.is_main_process
        self.is_first_here: bool = self._accelerator.is_local_main_process

    def place(self, module: nn.Module) -> None:
        """Moves a network to the device, in channels-last order (convolutions gain from it)."""
        # measured on 2 cores: VGG16 at 224 px trains 2.5x faster than contiguous fp32
        # (with bf16); issue 3 carries the benchmark.
        module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def autocast(self) -> "torch.autocast":
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def ready(self, network: nn.Module) -> nn.Module:
        """Returns the network to train: compiled if asked for; among several processes, one whose
        gradients are their mean.
        """
        if self.compiles:
            network = torch.compile(network)  # type: ignore[assignment]
        if self.shard[1] == 1:
            return network
        return self._accelerator.prepare(network)  # type: ignore[no-any-return]

    def gathered(self, own: list[Any]) -> list[Any]:
        """Returns the items of all processes, dealt out like cards: the first of each, ..."""
        if self.shard[1] == 1:
            return own
        hands: list[list[Any]] = [[] for _ in range(self.shard[1])]
        torch.distributed.all_gather_object(hands, own)
        longest = max(len(hand) for hand in hands)
        return [hand[place] for place in range(longest) for hand in hands if place < len(hand)]

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean over the processes."""
        if self.shard[1] == 1:
            return values
        return self._accelerator.reduce(values, "mean")  # type: ignore[no-any-return]

    def broadcast(self, network: nn.Module) -> None:
        """Gives every process the main one's tensors (BatchNorm statistics differ by shard)."""
        if self.shard[1] > 1:
            for tensor in network.state_dict().values():
                torch.distributed.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is up in some process."""
        if self.shard[1] == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        """Waits until every process is here."""
        self._accelerator.wait_for_everyone()

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Lets one process of each machine do the block before the others."""
        with self._accelerator.local_main_process_first():
            yield

    @contextmanager
    def seeded(self, *numbers: int) -> Iterator[None]:
        """Gives the block (dropout, stochastic depth) a random state of its own.

        Dropout then depends on (seed, step) alone, and the caller's random state is untouched.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(hash(numbers) & 0x7FFFFFFF)  # of integers: the same everywhere
            yield

    def describe(self) -> dict[str, str | int]:
        """Returns what a result depends on, for the Run."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "processes": self.shard[1],
            "compiled": self.compiles,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }

    def seconds_per_image(
        self, network: nn.Module, channels: int, size: tuple[int, int], batch_size: int
    ) -> float:
        """Returns the measured time of one training image: forward and backward, on a copy."""
        number = max(2, min(batch_size, PROBE_PIXELS // (size[0] * size[1])))
        copy = deepcopy(network).train()
        images_BCHW = torch.randn(number, channels, *size, device=self.device)
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        elapsed = 0.0
        for _ in range(PROBE_STEPS):  # the last one counts: the first warms up
            start = time.monotonic()
            with self.seeded(0), self.autocast():
                loss = copy(images_BCHW).square().mean()
            loss.backward()
            loss.item()  # waits for the device
            elapsed = time.monotonic() - start
        return elapsed / number


def spells(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Yields the items in stretches of about a second; between them others may act."""
    iterator = iter(items)

    def spell(first: Item) -> Iterator[Item]:
        ends = time.monotonic() + SPELL_S
        yield first
        while time.monotonic() < ends:
            for item in iterator:
                yield item
                break
            else:
                return

    for first in iterator:
        yield spell(first)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode, and each of its modules back as it was."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next batch, instead of giving it back and faulting it
    in again.

    glibc maps pieces of over 128 KiB anew each time (over 32 MiB whatever its threshold says), and
    gives back most of what a thread frees that is not the first. Measured: VGG16 at 224 px predicts
    17 % faster than with glibc's own settings; peaks stay as they are (docs/log.md 2026-11-27).
    """
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others do without
    if mallopt is not None:
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX: nothing gets a mapping of its own
        mallopt(-8, 1)  # M_ARENA_MAX: all threads share what is kept


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"`--device {name}` is not known", hint="use auto, cpu, cuda, cuda:0 or mps"
        ) from error
    usable = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not usable.get(device.type, False):
        raise EnvironmentFault(
            f"`--device {name}` is not available here", hint="use `--device cpu` or `auto`"
        )
    return device


def _precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )
    # Without native instructions bf16 is emulated, several times slower than fp32.
    return "bf16" if device.type == "cpu" and native else "fp32"
