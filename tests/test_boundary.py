"""The decode boundary, of any bytes: an image, or one reason for refusing it; nothing else."""

import io
import struct
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regraft.data.decode import (
    UnreadableImage,
    quiet_codecs,
    read_content,
    read_header,
    read_pixels,
    read_whole,
    sniffed,
)
from test_dicom import dicom

GREY = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
STARTS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0+",
          b"\x93NUMPY\x01\0", b"RIFF\0\0\0\0WEBP", bytes(128) + b"DICM"]  # fmt: skip


@cache
def seeds() -> dict[str, bytes]:
    found = {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        stream = io.BytesIO()
        Image.fromarray(GREY).save(stream, kind)
        found[kind] = stream.getvalue()
    for name, values in (("deep", np.stack([GREY] * 5, axis=2).astype(np.int16)), ("npy", GREY)):
        stream = io.BytesIO()
        if name == "npy":
            np.save(stream, values)
        else:
            tifffile.imwrite(stream, values, photometric="minisblack", planarconfig="contig")
        found[name] = stream.getvalue()
    found["DICOM"] = dicom(GREY)
    return found


def outcome(content: bytes) -> str:
    """Returns `read`, or the reason of the refusal."""
    with quiet_codecs():
        try:
            header = read_header(content)
            pixels = read_pixels(content, size=(8, 8), channels=header.channels)
        except UnreadableImage as error:
            assert error.reason == error.reason.lower()
            assert error.detail
            assert "\n" not in str(error).strip() or len(str(error)) < 400
            return error.reason
    assert pixels.shape == (8, 8, header.channels)
    assert pixels.dtype.name == header.pixel_type
    return "read"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_any_bytes_are_an_image_or_refused(start: bytes, rest: bytes) -> None:
    outcome(start + rest)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "deep", "npy", "DICOM"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0.2, 1),
)
def test_a_damaged_image_is_an_image_or_refused(
    kind: str, changes: list[tuple[float, int]], share: float
) -> None:
    content = bytearray(seeds()[kind])
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    outcome(bytes(content[: max(1, int(len(content) * share))]))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["uint8", "uint16", "int16", "float32"]),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["npy", "tiff"]),
    st.integers(0, 2**32 - 1),
)
def test_whatever_is_stored_comes_back(
    kind: str, bands: int, height: int, width: int, form: str, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 250, (height, width, bands)).astype(kind)
    stream = io.BytesIO()
    if form == "npy":
        np.save(stream, values)
    elif bands == 1:
        tifffile.imwrite(stream, values[..., 0], photometric="minisblack")
    else:
        tifffile.imwrite(stream, values, photometric="minisblack", planarconfig="contig")
    with quiet_codecs():
        pixels = read_whole(stream.getvalue())
    assert pixels.dtype == kind
    np.testing.assert_array_equal(pixels, values)


@pytest.mark.fault("B6")
def test_a_flipped_bit_in_a_png_is_refused_or_changes_nothing() -> None:
    whole, expected = seeds()["PNG"], GREY[:, :, None]
    refused = 0
    for place in range(8, len(whole)):
        content = bytearray(whole)
        content[place] ^= 0x10
        try:
            with quiet_codecs():
                pixels = read_whole(bytes(content))
        except UnreadableImage:
            refused += 1
            continue
        np.testing.assert_array_equal(pixels, expected)
    assert refused > 0.8 * (len(whole) - 8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(side: int, *chunks: bytes) -> bytes:
    ihdr = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = b"\0" * (side + 1) * min(side, 8)
    body = chunk(b"IHDR", ihdr) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_000, 30_000])
@pytest.mark.fault("B10", "B11")
def test_a_bomb_is_refused_from_its_header_at_once(side: int) -> None:
    content = png_of(side)
    start = time.perf_counter()
    assert outcome(content) == "too-many-pixels"
    assert time.perf_counter() - start < 0.05


def test_the_limit_of_pixels_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_MAX_PIXELS", "100")
    with pytest.raises(UnreadableImage) as caught:
        read_whole(seeds()["PNG"])
    assert str(caught.value) == (
        "too-many-pixels: 12x10, more than 100 (`REGRAFT_MAX_PIXELS` raises that)"
    )
    monkeypatch.setenv("REGRAFT_MAX_PIXELS", "120")
    assert outcome(seeds()["PNG"]) == "read"


@pytest.mark.fault("B23")
def test_a_huge_text_beside_the_pixels_is_bounded() -> None:
    text = b"c\0\0" + zlib.compress(b"x" * 200_000_000)
    start = time.perf_counter()
    assert outcome(png_of(8, chunk(b"zTXt", text))) in ("read", "damaged")
    assert time.perf_counter() - start < 2


@pytest.mark.fault("B23")
def test_ten_thousand_frames_cost_no_more_than_one() -> None:
    frames = [Image.fromarray(np.full((8, 8), n % 250, np.uint8)) for n in range(400)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    start = time.perf_counter()
    with quiet_codecs():
        assert read_header(stream.getvalue()).has_frames
        read_whole(stream.getvalue())
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0", "an EPS or PostScript document"),
        (b"%PDF-1.7", "a PDF document"),
        (b"SIMPLE  =                    T", "a FITS file"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"<?xml version='1.0'?>\n<svg/>", "an SVG drawing"),
        (b"P5\n2 2\n255\n0000", "a Netpbm image (PGM, PPM); save it as PNG or TIFF"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIC or AVIF; save it as JPEG or PNG"),
        (b"PK\x03\x04", "a ZIP archive"),
    ],
)
@pytest.mark.fault("B21", "B22")
def test_other_kinds_are_refused_by_name_before_any_plugin_runs(
    content: bytes, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UnreadableImage) as caught:
        read_header(content)
    assert str(caught.value) == f"not-an-image: {named}"


@pytest.mark.fault("B3")
def test_a_file_is_what_its_bytes_say_whatever_its_name(tmp_path: Path) -> None:
    for kind, content in seeds().items():
        (tmp_path / "a.jpg").write_bytes(content)
        found = read_content(tmp_path, "a.jpg")
        assert isinstance(found, bytes)
        assert sniffed(found) in (kind, "TIFF", "NPY"), kind
        assert outcome(found) == "read"


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
@pytest.mark.fault("B8", "B9")
def test_extreme_sizes_are_read_within_bounds(size: tuple[int, int]) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full(size, 7, np.uint8)).save(stream, "PNG")
    with quiet_codecs():
        pixels = read_pixels(stream.getvalue(), size=(32, 32), channels=3)
    assert np.unique(pixels).tolist() == [7]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.fault("B27")
def test_broken_or_huge_metadata_change_no_pixel(kind: str) -> None:
    plain, odd = io.BytesIO(), io.BytesIO()
    Image.fromarray(GREY).save(plain, kind)
    huge = b"p" * (60_000 if kind == "JPEG" else 900_000)
    Image.fromarray(GREY).save(odd, kind, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", icc_profile=huge)
    assert len(odd.getvalue()) > len(plain.getvalue())
    with quiet_codecs():
        found = read_whole(odd.getvalue())
        np.testing.assert_array_equal(found, read_whole(plain.getvalue()))
