"""Arrays as files: NumPy's `.npy`, and the IDX files of MNIST."""

import gzip
import io
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.pixels import Header, Pixels, UnreadableImage, held, held_type, refuse_size

IDX_ENTRY = re.compile(r"^(?P<file>.*-idx[134]-ubyte(?:\.gz)?)#(?P<row>\d+)$")
# An array of 3x224x224 is most likely channels-first, as torch has them: to take it for 3 rows of
# 224 channels would be a silent mistake. Assumed: no image has so few rows and so many channels.
FEW_ROWS, MANY_CHANNELS = 16, 16


def npy_header(content: bytes) -> Header:
    """Returns what the header of a `.npy` file tells."""
    shape, _, pixel_type = _npy_form(content)
    return Header(shape[:2], shape[2], pixel_type)


def npy_pixels(content: bytes) -> Pixels:
    """Returns the array of a `.npy` file; pickled objects are refused and never run."""
    shape, offset, _ = _npy_form(content)
    try:
        # Not `np.load`: it opens zip archives and pickles too.
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise UnreadableImage(
            "truncated", f"{len(content) - offset} bytes are too few for {shape}"
        ) from error
    return held(array)


def _npy_form(content: bytes) -> tuple[tuple[int, int, int], int, str]:
    """Returns (height, width, channels), where the values begin, and how they are held."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        shape, _, stored = (np.lib.format.read_array_header_2_0 if version != (1, 0) else read)(
            stream
        )
        if stored.hasobject:
            raise ValueError("it holds pickled objects, which are never loaded")
    except Exception as error:  # its header is Python's source: anything may be wrong with it
        raise UnreadableImage(
            "not-an-image", f"not a NumPy array of numbers: {str(error)[:120]}"
        ) from error
    whole = (*shape, 1) if len(shape) == 2 else shape
    is_channels_first = len(whole) == 3 and whole[0] <= FEW_ROWS and whole[2] > MANY_CHANNELS
    if len(whole) != 3 or is_channels_first:
        raise UnreadableImage(
            "array", f"has shape {shape} of {stored.name}; expected (height, width[, channels])"
        )
    refuse_size(*whole, bytes_each=stored.itemsize)
    return whole, stream.tell(), held_type(stored)


def read_idx(path: Path) -> Pixels:
    """Returns the array of an IDX file (MNIST's format: magic, sizes, unsigned bytes), cached.

    Raises:
        UnreadableImage: It is not an IDX file of unsigned bytes, or its length is wrong.
    """
    return _read_idx(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_idx(path: str, _mtime_ns: int) -> Pixels:
    content = Path(path).read_bytes()
    try:
        content = gzip.decompress(content) if path.endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableImage("truncated", f"not a whole gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 3:
        raise UnreadableImage("not-an-image", "not an IDX file of unsigned bytes")
    dimensions = content[3]
    if len(content) < 4 + 4 * dimensions:
        raise UnreadableImage("truncated", "its header is cut off")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if pixels.size != np.prod(shape):
        raise UnreadableImage("truncated", f"holds {pixels.size} bytes where {shape} are expected")
    return pixels.reshape(shape)
