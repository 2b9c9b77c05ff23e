"""What every format gives: pixels, what a header tells of them, and why a file is refused.

Values stay as they are stored. They are held as uint8, uint16, int16 or float32: the first that
holds every value of the stored type. Whatever is wider (32-bit integers, 64-bit floats) is held as
float32, whose 24 bits a network could not tell from more.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]  # uint8, uint16, int16 or float32, (height, width, channels)

MAX_PIXELS = 50_000_000  # assumed: above any radiograph, far below a decompression bomb
MAX_CHANNELS = 512  # assumed: above hyperspectral cameras (AVIRIS has 224)
MAX_BYTES = 2**30  # of one decoded image; assumed: 50 million pixels of RGB in 16 bits are 0.3 GiB
WHITE = {"uint8": 255, "uint16": 65535}  # transparent pixels show it, whatever hides beneath

_HELD = {
    "bool": "uint8",
    "uint8": "uint8",
    "uint16": "uint16",
    "int8": "int16",
    "int16": "int16",
    "int32": "float32",
    "uint32": "float32",
    "float16": "float32",
    "float32": "float32",
    "float64": "float32",
}


class UnreadableImage(Exception):
    """A file that cannot be an input; `reason` is a short stable code."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # by these a process that reads hands it on
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Header:
    """What can be known of an image without decoding it.

    Attributes:
        size: (height, width) as stored, before any turn by EXIF.
        channels: As `read_pixels` gives them.
        pixel_type: uint8, uint16, int16 or float32.
        has_frames: Whether frames or pages follow the first one, which is read.
        patient: A pseudonym of the patient that a DICOM file names; never the id itself.
    """

    size: tuple[int, int]
    channels: int
    pixel_type: str = "uint8"
    has_frames: bool = False
    patient: str | None = None

    @property
    def bit_depth(self) -> int:
        return np.dtype(self.pixel_type).itemsize * 8


def max_pixels() -> int:
    """Returns how many pixels an image may have: `REGRAFT_MAX_PIXELS`, or 50 million."""
    chosen = os.environ.get("REGRAFT_MAX_PIXELS", "")
    return int(chosen) if chosen.isdecimal() else MAX_PIXELS


def refuse_size(height: int, width: int, channels: int = 1, bytes_each: int = 1) -> None:
    """Refuses an image by what its header claims, before any pixel is decoded.

    Raises:
        UnreadableImage: It has none, or more than `max_pixels`.
    """
    if min(height, width, channels) < 1:
        raise UnreadableImage("no-pixels", f"{height}x{width} pixels of {channels} channels")
    if height * width > max_pixels():
        raise UnreadableImage(
            "too-many-pixels",
            f"{height}x{width}, more than {max_pixels():,} (`REGRAFT_MAX_PIXELS` raises that)",
        )
    if channels > MAX_CHANNELS or height * width * channels * bytes_each > MAX_BYTES:
        raise UnreadableImage(
            "too-many-pixels",
            f"{height}x{width} pixels of {channels} channels need too much memory",
        )


def held_type(stored: Any) -> str:
    """Returns the type in which values of this stored type are held.

    Raises:
        UnreadableImage: It is no type of pixels.
    """
    name = np.dtype(stored).newbyteorder("=").name
    if name not in _HELD:
        raise UnreadableImage("mode", f"pixels of type {name} are not read")
    return _HELD[name]


def held(values: NDArray[Any]) -> Pixels:
    """Returns (height, width[, channels]) values as Pixels, exactly.

    Raises:
        UnreadableImage: The type is no type of pixels, or a value is not finite.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    pixels = values.astype(held_type(values.dtype), copy=False)
    if values.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    # The sum is not finite where a value is not; measured 3x faster than asking each.
    if pixels.dtype == np.float32 and not np.isfinite(pixels.sum(dtype=np.float64)):
        raise UnreadableImage("non-finite", "it holds values that are no numbers (NaN) or infinite")
    return pixels


def over_white(pixels: Pixels, *, is_premultiplied: bool = False) -> Pixels:
    """Returns the colours of an image whose last channel is alpha, composited over white."""
    white = WHITE[pixels.dtype.name]
    colours = pixels[:, :, :-1].astype(np.float64)
    share = pixels[:, :, -1:].astype(np.float64) / white
    seen = colours if is_premultiplied else colours * share
    composited = np.rint(seen + (1 - share) * white)
    return np.minimum(composited, white).astype(pixels.dtype)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Returns the image turned as its EXIF or TIFF orientation (1 to 8) asks."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
