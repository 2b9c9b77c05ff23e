"""TIFF and PNG files that Pillow would cut: 16-bit colour, floats, signed values, many bands.

The only tifffile and imagecodecs; both come with `regraft[tiff]`.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from regraft.data.pixels import (
    Header,
    Pixels,
    UnreadableImage,
    held,
    held_type,
    over_white,
    refuse_size,
    upright,
)
from regraft.errors import EnvironmentFault

WHITE_IS_ZERO, RGB, CMYK = 0, 2, 5  # of the tag PhotometricInterpretation, TIFF 6.0
PLAIN = (WHITE_IS_ZERO, 1, RGB, CMYK)
LZW, ORIENTATION = 5, 274
PARTS = ((324, 325), (273, 279))  # offsets and byte counts of tiles, or of strips


def deep_header(content: bytes, kind: str) -> Header:
    """Returns what the header tells of a TIFF or of a PNG of 16-bit colour.

    Raises:
        UnreadableImage: It is damaged, too large, or of a kind without an exact reading.
        EnvironmentFault: `regraft[tiff]` is not installed.
    """
    if kind == "PNG":
        return _png_header(content)
    with _TiffPage(content) as page:
        height, width, bands = page.shape
        channels = 3 if page.is_cmyk or page.has_alpha else bands
        pixel_type = held_type(page.stored)
        return Header((height, width), channels, pixel_type, page.has_frames)


def deep_pixels(content: bytes, kind: str) -> Pixels:
    """Returns the image, upright and exact: every band of a TIFF is a channel.

    Raises:
        UnreadableImage: As for `deep_header`, or its pixels are damaged.
        EnvironmentFault: `regraft[tiff]` is not installed.
    """
    if kind == "PNG":
        return _png_pixels(content)
    with _TiffPage(content) as page:
        pixels = held(page.values())
        if page.photometric == WHITE_IS_ZERO and pixels.dtype in (np.uint8, np.uint16):
            pixels = np.iinfo(pixels.dtype).max - pixels
        if page.is_cmyk:
            pixels = _from_cmyk(pixels)
        if page.has_alpha:
            pixels = over_white(pixels, is_premultiplied=page.is_premultiplied)
        return upright(pixels, page.orientation)


@contextmanager
def quiet_tifffile() -> Iterator[None]:
    """Silences tifffile, which names no file; our error does."""
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _TiffPage:
    """The first page of a TIFF."""

    def __init__(self, content: bytes) -> None:
        tifffile = _library("tifffile")
        try:
            self.file = tifffile.TiffFile(io.BytesIO(content))
            page = self.file.pages[0]
            self.is_lzw = int(page.compression) == LZW
            self.page, self.stored = page, page.dtype
            self.has_frames = bool(self.file.pages.is_multipage)
            self.photometric = int(page.photometric)
            extra = [int(sample) for sample in page.extrasamples]
            self.is_premultiplied = extra == [1]
            self.has_alpha = self.photometric == RGB and extra in ([1], [2])
            self.is_cmyk = self.photometric == CMYK and int(page.samplesperpixel) == 4
            tag = page.tags.get(ORIENTATION)
            self.orientation = int(tag.value) if tag is not None else 1
            sizes = (page.imagelength, page.imagewidth, page.samplesperpixel)
            self.shape = (int(sizes[0]), int(sizes[1]), int(sizes[2]))
            is_flat, bits = page.imagedepth == 1, page.dtype.itemsize if page.dtype else 0
        except Exception as error:  # tifffile raises anything on damaged files
            raise UnreadableImage("damaged", f"not a whole TIFF: {error}"[:140]) from error
        if self.photometric not in PLAIN or not is_flat or self.stored is None:
            name = getattr(page.photometric, "name", page.photometric)
            raise UnreadableImage("mode", f"a TIFF of {name} in {page.bitspersample} bits")
        refuse_size(*self.shape, bytes_each=bits)

    def __enter__(self) -> "_TiffPage":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def values(self) -> Any:
        """Returns all bands, (height, width, bands)."""
        try:
            held_parts, parts = list(self.page.databytecounts), int(np.prod(self.page.chunked))
            # tifffile fills up what is missing, silently.
            if len(held_parts) < parts or not all(held_parts[:parts]):
                raise ValueError("strips or tiles failed to read: they are missing")
            page = self._unpacked() if self.is_lzw else self.page
            values = page.asarray()
            if self.page.axes == "SYX":  # planar: a plane for each band
                values = np.moveaxis(values, 0, 2)
            return values.reshape(self.shape)
        except Exception as error:  # codecs have errors of their own
            told = str(error)
            is_cut = "failed to read" in told or "reshaped" in told or not told
            reason = "truncated" if is_cut else "damaged"
            raise UnreadableImage(reason, f"its pixels are not whole: {told}"[:140]) from error

    def _unpacked(self) -> Any:
        """Returns the same page without LZW.

        Found by `make fuzz`: imagecodecs 2026.3.6 ends the process on damaged LZW, libtiff not.
        """
        from regraft.data.pictures import lzw_decoded

        page, content = self.page, self.file.filehandle
        rows = page.chunks[0]
        row_bytes = int(np.prod(page.chunks[1:])) * page.bitspersample // 8
        num = -(-page.imagelength // rows)  # strips of a plane; the last may be lower
        parts = []
        for number, (place, size) in enumerate(
            zip(page.dataoffsets, page.databytecounts, strict=True)
        ):
            is_low = not page.is_tiled and number % num == num - 1
            height = page.imagelength - rows * (num - 1) if is_low else rows
            content.seek(place)
            parts.append(lzw_decoded(content.read(size), height * row_bytes))
        return self._rewritten(parts)

    def _rewritten(self, parts: Sequence[bytes]) -> Any:
        """Returns the page with these strips or tiles, uncompressed."""
        self.file.filehandle.seek(0)
        stream = io.BytesIO(self.file.filehandle.read())
        places = []
        for part in parts:
            places.append(stream.seek(0, io.SEEK_END))
            stream.write(part)
        stream.seek(0)
        tifffile = _library("tifffile")
        with tifffile.TiffFile(stream, mode="r+b") as file:
            tags = file.pages[0].tags
            offsets, sizes = next(pair for pair in PARTS if pair[0] in tags)
            kind = 16 if file.is_bigtiff else 4  # LONG8, LONG
            tags[259].overwrite(1)
            tags[offsets].overwrite(places, dtype=kind)
            tags[sizes].overwrite([len(part) for part in parts], dtype=kind)
        self.file = tifffile.TiffFile(io.BytesIO(stream.getvalue()))
        return self.file.pages[0]


def _from_cmyk(pixels: Pixels) -> Pixels:
    """Returns RGB, by multiplying inks as Pillow does for 8 bits; there is no ICC profile."""
    white = float(np.iinfo(pixels.dtype).max)
    inks = pixels.astype(np.float64)
    rgb = (white - inks[:, :, :3]) * (white - inks[:, :, 3:]) / white
    return np.rint(rgb).astype(pixels.dtype)


def _png_header(content: bytes) -> Header:
    width, height = (int.from_bytes(content[place : place + 4]) for place in (16, 20))
    is_colour = content[25] & 2  # of IHDR's colour type
    refuse_size(height, width, 3, bytes_each=2)
    return Header((height, width), 3 if is_colour else 1, "uint16")


def _png_pixels(content: bytes) -> Pixels:
    header, codecs = _png_header(content), _library("imagecodecs")
    try:
        pixels: Pixels = held(codecs.png_decode(content))
    except Exception as error:  # codecs have errors of their own
        reason = "truncated" if "too small" in str(error) else "damaged"
        raise UnreadableImage(reason, f"not a whole PNG: {error}"[:140]) from error
    if pixels.shape[:2] != header.size or pixels.dtype != np.uint16:
        raise UnreadableImage("damaged", f"a PNG that decodes to {pixels.shape} {pixels.dtype}")
    # A colour that is named as transparent comes as alpha, too.
    return over_white(pixels) if pixels.shape[2] in (2, 4) else pixels


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise EnvironmentFault(
            f"this image needs {name}, which is not installed",
            hint="pip install 'regraft[tiff]'",
        ) from error
