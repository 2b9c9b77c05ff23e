"""One image file to one (height, width, channels) array: the only file that opens images.

Training, evaluation and prediction all read through `read_pixels`, so they cannot differ. 8-bit
stays uint8 and 16-bit stays uint16; nothing is ever clipped, zero-filled or replaced.
"""

import gzip
import io
import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy"}
)
MAX_PIXELS = 50_000_000  # assumed: above any radiograph, far below a decompression bomb
JPEG_MARGIN = 2  # measured: within 1/255 of a full decode (99.9 % of pixels), 2 to 8 times as fast
CHUNK = 256  # images in flight while decoding or averaging: bounds memory, not a result
BACKGROUND = 255  # transparent pixels are composited over white, whatever colour hides beneath

IDX_ENTRY = re.compile(r"^(?P<file>.*-idx[134]-ubyte(?:\.gz)?)#(?P<row>\d+)$")

NOT_REGULAR = ("not-a-file", "a folder, pipe or device")

Item = TypeVar("Item")
Result = TypeVar("Result")
Pixels = NDArray[Any]  # uint8 or uint16, (height, width, channels)


class UnreadableImage(Exception):
    """A file that cannot be an input; `reason` is a short stable code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Header:
    """What can be known of an image without decoding it."""

    size: tuple[int, int]
    channels: int
    bit_depth: int


def read_content(root: Path, path: str) -> bytes | Pixels:
    """Returns the bytes of a file below `root`, or the pixels of one row of an IDX file.

    Raises:
        UnreadableImage: The file is missing, not a regular file, or forbidden.
    """
    if entry := IDX_ENTRY.match(path):
        try:
            image: Pixels = read_idx(root / entry["file"])[int(entry["row"]), ..., None]
            return image
        except (OSError, IndexError) as error:
            raise UnreadableImage("missing", str(error)) from error
    try:
        if not (root / path).is_file():  # a pipe or socket would block for ever
            is_there = (root / path).exists()
            raise UnreadableImage(*NOT_REGULAR if is_there else ("missing", "no such file"))
        return (root / path).read_bytes()
    except OSError as error:
        raise UnreadableImage("unreadable-file", error.strerror or str(error)) from error


def read_header(content: bytes | Pixels, path: str) -> Header:
    """Returns size, channels and bit depth.

    Raises:
        UnreadableImage: The content is no image that this version reads exactly.
    """
    if not isinstance(content, bytes) or Path(path).suffix.lower() == ".npy":
        pixels = content if not isinstance(content, bytes) else _read_array(content)
        return Header(pixels.shape[:2], pixels.shape[2], pixels.dtype.itemsize * 8)
    with _opened(content) as image:
        channels = {"1": 1, "L": 1, "LA": 1}.get(image.mode, 3)
        depth = 16 if image.mode.startswith("I;16") else 8
        return Header((image.height, image.width), 1 if depth == 16 else channels, depth)


def read_pixels(
    content: bytes | Pixels, path: str, *, size: tuple[int, int], channels: int
) -> Pixels:
    """Returns the image at (height, width), shape (height, width, channels), uint8 or uint16.

    Grey images are replicated to the channels asked for.

    Raises:
        UnreadableImage: It cannot be decoded, or its channels are others than asked for.
    """
    if not isinstance(content, bytes):
        pixels = content
    elif Path(path).suffix.lower() == ".npy":
        pixels = _read_array(content)
    else:
        pixels = _decode(content, size)
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        raise UnreadableImage(
            "channels", f"has {pixels.shape[2]} channels where {channels} are expected"
        )
    return _resize(pixels, size)


@contextmanager
def quiet_codecs() -> Iterator[None]:
    """Silences Pillow; for the main thread, around its workers: filters are of the process."""
    with warnings.catch_warnings():
        # Odd EXIF blocks are not used, and `MAX_PIXELS` is below Pillow's own limit.
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        logger = logging.getLogger("PIL")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # it names no file; our error does
        yield
        logger.setLevel(level)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields the results in order; Pillow releases the interpreter lock, so all cores decode."""
    with quiet_codecs(), ThreadPoolExecutor(os.cpu_count()) as pool:
        iterator = iter(items)
        while chunk := list(islice(iterator, CHUNK)):
            yield from pool.map(function, chunk)


def read_idx(path: Path) -> Pixels:
    """Returns the array of an IDX file (MNIST's format: magic, sizes, unsigned bytes), cached.

    Raises:
        UnreadableImage: It is not an IDX file of unsigned bytes, or its length is wrong.
    """
    return _read_idx(str(path), path.stat().st_mtime_ns)


def encode_png(pixels: Pixels) -> bytes:
    """Returns an 8-bit PNG of an (height, width, channels) array, without any metadata."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    shown = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0]
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(stream, "PNG")
    return stream.getvalue()


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


def _read_array(content: bytes) -> Pixels:
    try:
        # Not `np.load`: it opens zip archives and pickles too.
        pixels: Pixels = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise UnreadableImage("not-an-image", f"not a NumPy array: {error}") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.dtype not in (np.uint8, np.uint16) or 0 in pixels.shape:
        raise UnreadableImage(
            "array",
            f"has shape {pixels.shape} of {pixels.dtype}; "
            "expected (height, width[, channels]) of uint8 or uint16",
        )
    return pixels


def _opened(content: bytes) -> Image.Image:
    if not content:
        raise UnreadableImage("empty-file", "0 bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage("too-many-pixels", f"more than {MAX_PIXELS:,}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImage("not-an-image", _describe(content)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage("too-many-pixels", f"{image.width}x{image.height}")
    # Pillow gives 16-bit colour PNGs as 8-bit, silently: the depth byte of IHDR tells.
    if image.format == "PNG" and content[24] == 16 and not image.mode.startswith("I;16"):
        raise UnreadableImage("mode", "16-bit colour PNG, which Pillow would cut to 8 bits")
    if image.format == "TIFF" and _is_deep_colour(image):
        raise UnreadableImage("mode", "16-bit colour TIFF, which Pillow would cut to 8 bits")
    if image.mode not in _TO_ARRAY and not image.mode.startswith("I;16"):
        raise UnreadableImage("mode", f"pixel mode `{image.mode}` has no exact reading")
    return image


def _is_deep_colour(image: Image.Image) -> bool:
    bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]  # BitsPerSample
    return max(bits) > 8 and not image.mode.startswith(("I", "F"))


def _describe(content: bytes) -> str:
    start = content[:64].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; run `git lfs pull`"
    try:
        content[:512].decode("utf-8")
        return "a text file"
    except UnicodeDecodeError:
        return f"none of {', '.join(FORMATS)}"


def _decode(content: bytes, size: tuple[int, int]) -> Pixels:
    with _opened(content) as opened:
        try:
            # The square serves images that their EXIF block turns, too.
            side = JPEG_MARGIN * max(size)
            opened.draft(None, (side, side))  # of JPEGs alone
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                pixels = np.asarray(image).astype(np.uint16)[:, :, None]
                return pixels
            # A PNG may name one grey value or colour as transparent, without an alpha channel.
            has_alpha = "transparency" in image.info and image.mode in ("L", "RGB")
            pixels = np.asarray(_TO_ARRAY[image.mode + "A" * has_alpha](image))
        # Pillow's plugins raise these, and SyntaxError, on damaged files.
        except (OSError, ValueError, SyntaxError, IndexError, TypeError) as error:
            raise UnreadableImage("truncated", str(error)[:120]) from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _over_background(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
    return Image.alpha_composite(canvas, rgba)


_TO_ARRAY: dict[str, Callable[[Image.Image], Image.Image]] = {
    "1": lambda image: image.convert("L"),
    "L": lambda image: image,
    "LA": lambda image: _over_background(image).convert("L"),
    "RGB": lambda image: image,
    "RGBA": lambda image: _over_background(image).convert("RGB"),
    "P": lambda image: _over_background(image).convert("RGB"),
    "CMYK": lambda image: image.convert("RGB"),
    "YCbCr": lambda image: image.convert("RGB"),
}


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    height, width = size
    if pixels.shape[:2] == (height, width):
        return pixels
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        return resized.reshape(height, width, -1)
    # Float planes hold every 16-bit value exactly, and take any number of channels.
    planes = [
        np.asarray(
            Image.fromarray(pixels[:, :, channel].astype(np.float32)).resize(
                (width, height), Image.Resampling.BILINEAR
            )
        )
        for channel in range(pixels.shape[2])
    ]
    stacked: Pixels = np.rint(np.stack(planes, axis=2)).astype(pixels.dtype)
    return stacked
