import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED = Path(
    os.environ.get("REGRAFT_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data"
).resolve()


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)  # two test processes share two cores
    # Whoever started the tests in the background has INT and HUP ignored, and the product respects
    # that: tests of signals need them as a terminal leaves them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach a host fails the test."""

    def refuse(_self: socket.socket, address: Any, *_args: Any) -> None:
        raise AssertionError(f"a test tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: refuse(None, args))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes class folders of different random images: `make_folder({"train/cats": 5})`."""

    def make(
        layout: dict[str, int],
        *,
        size: tuple[int, int] = (12, 10),
        mode: str = "L",
        seed: int = 0,
        name: str = "data",
    ) -> Path:
        generator = np.random.default_rng(seed)
        root = tmp_path / name
        for folder, number in layout.items():
            assert not Path(folder).is_absolute()
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                shape = size if mode == "L" else (*size, 3)
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{Path(folder).name}_{i:03d}.png")
        return root

    return make


@pytest.fixture
def make_shapes(tmp_path: Path) -> Callable[..., Path]:
    """Writes classes that can be learned: bars of one direction on noise, one for each class."""

    def make(
        classes: tuple[str, ...],
        number: int = 20,
        *,
        side: int = 32,
        seed: int = 0,
        name: str = "shapes",
        splits: tuple[str, ...] = (),
    ) -> Path:
        generator = np.random.default_rng(seed)
        root = tmp_path / name
        y, x = np.mgrid[:side, :side] / side
        for split in splits or ("",):
            for index, label in enumerate(classes):
                folder = root / split / label
                folder.mkdir(parents=True)
                angle = np.pi * index / len(classes)
                wave = np.cos(angle) * x + np.sin(angle) * y
                for i in range(number):
                    phase = generator.uniform(0, 2 * np.pi)
                    bars = 90 * np.sin(2 * np.pi * 4 * wave + phase)
                    pixels = 128 + bars + generator.normal(0, 12, (side, side))
                    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                    image.save(folder / f"{label}_{i:03d}.png")
        return root

    return make


@pytest.fixture
def shared_data() -> Path:
    """The real images beside the project; nothing of them is ever copied into it."""
    if not SHARED.is_dir():
        pytest.skip(f"no real images in {SHARED}; set REGRAFT_TEST_DATA")
    return SHARED
