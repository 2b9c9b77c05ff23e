"""Pictures as Pillow reads them: JPEG, PNG, WebP, BMP, GIF and plain TIFF. The only Pillow.

Pillow cuts 16-bit colour to 8 bits and drops bands, silently: what it would cut is not read here
but in `deep.py`.
"""

import io
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from regraft.data.pixels import WHITE, Header, Pixels, UnreadableImage, refuse_size

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
JPEG_MARGIN = 2  # measured: within 1/255 of a full decode (99.9 % of pixels), 2 to 8 times as fast
# Pillow's plugins raise these on damaged files.
DAMAGES = (OSError, ValueError, SyntaxError, IndexError, TypeError, KeyError, OverflowError,
           AttributeError, RuntimeError, MemoryError, EOFError, struct.error)  # fmt: skip
IS_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA")


def picture_header(content: bytes, kind: str) -> Header | None:
    """Returns what the header tells; None where Pillow would lose values.

    Raises:
        UnreadableImage: It is damaged, too large, or of a mode without an exact reading.
    """
    image = _opened(content, kind)
    if image is None:
        return None
    with image:
        try:  # a GIF looks for its next frame only now
            has_frames = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        except DAMAGES as error:
            raise UnreadableImage("damaged", _told(error)) from error
        is_grey = image.mode in GREY or image.mode in IS_16_BIT
        pixel_type = "uint16" if image.mode in IS_16_BIT else "uint8"
        return Header((image.height, image.width), 1 if is_grey else 3, pixel_type, has_frames)


def picture_pixels(content: bytes, kind: str, size: tuple[int, int] | None) -> Pixels | None:
    """Returns the picture, upright; None where Pillow would lose values.

    Args:
        content: The file.
        kind: Of `KINDS`.
        size: To which (height, width) one of 8 bits is stretched, a JPEG from the smallest decoding
            of at least twice that.

    Raises:
        UnreadableImage: It is damaged, too large, or of a mode without an exact reading.
    """
    image = _opened(content, kind)
    if image is None:
        return None
    with image:
        try:
            if size is not None:  # the square serves images that their EXIF block turns, too
                side = JPEG_MARGIN * max(size)
                image.draft(None, (side, side))  # of JPEGs alone
            is_inverted = image.format == "TIFF" and _tag(image, 262) == 0  # WhiteIsZero
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in IS_16_BIT:
                return _from_16_bit(image, is_inverted)
            # A PNG may name one grey value or colour as transparent, without an alpha channel.
            has_alpha = "transparency" in image.info and image.mode in ("1", "L", "RGB")
            mode = {"1": "L"}.get(image.mode, image.mode) + "A" if has_alpha else image.mode
            plain = _TO_ARRAY[mode](image)
            pixels = np.asarray(plain if size is None else _stretched(plain, size))
        except DAMAGES as error:
            is_cut = "truncated" in str(error).lower()
            raise UnreadableImage("truncated" if is_cut else "damaged", _told(error)) from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def exif_orientation(content: bytes) -> int:
    """Returns how a PNG is turned (1 to 8), for those whose pixels Pillow would cut."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def lzw_decoded(packed: bytes, size: int) -> bytes:
    """Returns the bytes of one LZW strip or tile of a TIFF, by libtiff.

    Raises:
        OSError: They are damaged, or fewer than `size`.
    """
    start = 8 + 2 + 9 * 12 + 4  # behind header and directory
    tags = {256: size, 257: 1, 258: 8, 259: 5, 262: 1, 273: start, 277: 1, 278: 1,
            279: len(packed)}  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)
    with Image.open(io.BytesIO(head + packed), formats=("TIFF",)) as image:
        return image.tobytes()


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Returns the pixels stretched to (height, width), bilinear with antialiasing."""
    if pixels.shape[:2] == size:
        return pixels
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return np.asarray(_stretched(image, size)).reshape(*size, -1)
    # Float planes hold every 16-bit value exactly, and take any number of channels.
    planes = [
        np.asarray(_stretched(Image.fromarray(pixels[:, :, channel].astype(np.float32)), size))
        for channel in range(pixels.shape[2])
    ]
    stacked = np.stack(planes, axis=2)
    return stacked if pixels.dtype == np.float32 else np.rint(stacked).astype(pixels.dtype)


def _stretched(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def as_shown(pixels: Pixels, intensity_range: tuple[float, float] | None = None) -> Pixels:
    """Returns what `encode_png` shows: uint8, (height, width, 1 or 3)."""
    shown = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1]
    if pixels.dtype == np.uint8:
        return shown
    low, high = intensity_range or (float(shown.min()), float(shown.max()))
    share = (shown.astype(np.float64) - low) / max(high - low, 1e-12)
    scaled: Pixels = np.rint(share.clip(0, 1) * 255).astype(np.uint8)
    return scaled


def encode_png(pixels: Pixels, intensity_range: tuple[float, float] | None = None) -> bytes:
    """Returns an 8-bit PNG of an (height, width, channels) array, without any metadata.

    Args:
        pixels: Grey, RGB, or n channels, of which the first three are shown (of two, one).
        intensity_range: The values shown as black and white; None: of 8 bits 0 and 255, of other
            types the smallest and the largest.
    """
    shown = as_shown(pixels, intensity_range)
    shown = shown[:, :, 0] if shown.shape[2] == 1 else shown
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silences Pillow; for the main thread, around its workers: filters are of the process."""
    with warnings.catch_warnings():
        # Odd EXIF blocks are not used; our own limit of pixels stands.
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        logger = logging.getLogger("PIL")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # it names no file; our error does
        try:
            yield
        finally:
            logger.setLevel(level)


def _opened(content: bytes, kind: str) -> Image.Image | None:
    try:
        image = Image.open(io.BytesIO(content), formats=(kind,))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage("too-many-pixels", _told(error)) from error
    except DAMAGES as error:
        if kind == "TIFF":  # of many kinds that Pillow does not know
            return None
        raise UnreadableImage("damaged", f"not a whole {kind}: {_told(error)}") from error
    refuse_size(image.height, image.width, len(image.getbands()))
    if image.format == "PNG" and content[24:25] == b"\x10" and image.mode not in IS_16_BIT:
        return None  # the depth byte of IHDR tells: Pillow gives 16-bit colour as 8-bit
    if image.format == "TIFF" and not _keeps_all(image):
        return None
    if image.mode not in _TO_ARRAY and image.mode not in IS_16_BIT:
        raise UnreadableImage("mode", f"pixel mode `{image.mode}` has no exact reading")
    return image


def _keeps_all(image: Image.Image) -> bool:
    """Whether Pillow keeps every band and bit of a TIFF."""
    bits, formats = _tags(image, 258), _tags(image, 339)
    deepest = 16 if image.mode in IS_16_BIT else 8
    is_whole = _tag(image, 277) == len(image.getbands()) and max(bits) <= deepest
    return is_whole and set(formats) == {1} and image.mode in (*_TO_ARRAY, *IS_16_BIT)


def _tags(image: Image.Image, tag: int) -> tuple[int, ...]:
    found = image.tag_v2.get(tag, 1)  # type: ignore[attr-defined]
    return found if isinstance(found, tuple) else (found,)


def _tag(image: Image.Image, tag: int) -> int:
    return _tags(image, tag)[0]


def _told(error: BaseException) -> str:
    told = f"{error}"[:120] or type(error).__name__
    return "its header cannot be read" if told.startswith("cannot identify") else told


def _from_16_bit(image: Image.Image, is_inverted: bool) -> Pixels:
    pixels = np.asarray(image).astype(np.uint16)[:, :, None]
    if is_inverted:
        pixels = np.uint16(65535) - pixels
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        pixels = np.where(pixels == clear, np.uint16(WHITE["uint16"]), pixels)
    return pixels


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (WHITE["uint8"],) * 4)
    return Image.alpha_composite(canvas, rgba)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


_TO_ARRAY: dict[str, Callable[[Image.Image], Image.Image]] = {
    "1": lambda image: image.convert("L"),
    "L": lambda image: image,
    "LA": lambda image: _over_white(image).convert("L"),
    "RGB": lambda image: image,
    "RGBA": lambda image: _over_white(image).convert("RGB"),
    "P": lambda image: _over_white(image).convert("RGB"),
    "PA": lambda image: _over_white(image).convert("RGB"),
    "CMYK": lambda image: image.convert("RGB"),
    "YCbCr": lambda image: image.convert("RGB"),
    "LAB": _from_lab,
}
