"""TIFF and PNG beyond 8 bits: every bit and band that was stored comes back."""

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from regraft.data.decode import Header, UnreadableImage, quiet_codecs, read_header, read_whole
from regraft.errors import EnvironmentFault

imagecodecs: Any = pytest.importorskip("imagecodecs")
BANDS: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_codecs():  # as around all reading
        yield


def tiff(values: NDArray[Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def values(kind: str, *shape: int) -> NDArray[Any]:
    if kind.startswith("float"):
        return RANDOM.normal(0, 1e3, shape).astype(kind)
    ends = np.iinfo(kind)
    return RANDOM.integers(ends.min, ends.max, shape, dtype=kind, endpoint=True)


def refusal(content: bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_whole(content)
    return str(caught.value)


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "held"),
    [("uint8", "uint8"), ("uint16", "uint16"), ("int8", "int16"), ("int16", "int16"),
     ("float16", "float32"), ("float32", "float32")],
)  # fmt: skip
@pytest.mark.fault("B13", "B14")
def test_every_type_of_value_is_exact_in_either_byte_order(
    kind: str, held: str, byteorder: str, bigtiff: bool
) -> None:
    stored = values(kind, 7, 9)
    content = tiff(stored, byteorder=byteorder, bigtiff=bigtiff)
    assert read_header(content) == Header((7, 9), 1, held)
    pixels = read_whole(content)
    assert pixels.dtype == held
    np.testing.assert_array_equal(pixels[:, :, 0], stored)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("bands", [2, 4, 5, 13])
def test_every_band_is_a_channel(
    bands: int, kind: str, compression: str | None, planar: str
) -> None:
    stored = values(kind, 12, 8, bands)
    data = stored if planar == "contig" else np.moveaxis(stored, 2, 0)
    content = tiff(
        data, planarconfig=planar, photometric="minisblack", compression=compression, rowsperstrip=5
    )
    assert read_header(content) == Header((12, 8), bands, kind)
    np.testing.assert_array_equal(read_whole(content), stored)


@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_16_bit_colour_keeps_every_value(tile: tuple[int, int] | None) -> None:
    stored = values("uint16", 20, 18, 3)
    content = tiff(stored, photometric="rgb", tile=tile)
    assert read_header(content) == Header((20, 18), 3, "uint16")
    np.testing.assert_array_equal(read_whole(content), stored)


def test_the_fourth_band_of_a_colour_tiff_is_kept_unless_it_is_alpha() -> None:
    stored = values("uint8", 6, 6, 4)
    near_infrared = tiff(stored, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(read_whole(near_infrared), stored)
    assert read_whole(tiff(stored, photometric="rgb", extrasamples=["unassalpha"])).shape[2] == 3


@pytest.mark.parametrize(("extra", "hidden"), [("unassalpha", 40_000), ("assocalpha", 0)])
@pytest.mark.fault("B17")
def test_16_bit_alpha_is_composited_over_white(extra: str, hidden: int) -> None:
    stored = np.full((2, 2, 4), hidden, np.uint16)
    stored[..., 3] = 0
    stored[0, 0] = (100, 200, 300, 65535)
    pixels = read_whole(tiff(stored, photometric="rgb", extrasamples=[extra]))
    assert pixels[0, 0].tolist() == [100, 200, 300]
    assert np.unique(pixels[1]).tolist() == [65535]


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_white_is_zero_is_inverted(kind: str) -> None:
    stored = values(kind, 5, 5)
    pixels = read_whole(tiff(stored, photometric="miniswhite"))
    np.testing.assert_array_equal(pixels[:, :, 0], np.iinfo(kind).max - stored)


def test_16_bit_inks_become_colours_as_8_bit_ones_do() -> None:
    inks = values("uint8", 6, 6, 4)
    deep = tiff(inks.astype(np.uint16) * np.uint16(257), photometric="separated")
    assert read_header(deep) == Header((6, 6), 3, "uint16")
    wide, plain = read_whole(deep), read_whole(tiff(inks, photometric="separated"))
    assert np.abs(wide / 257 - plain).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.fault("B19")
def test_all_orientations_of_a_deep_tiff_give_the_same_array(orientation: int) -> None:
    upright = values("uint16", 6, 8, 5)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    tag = (274, 3, 1, orientation, True)
    content = tiff(np.ascontiguousarray(stored), **BANDS, extratags=[tag])
    np.testing.assert_array_equal(read_whole(content), upright)


@pytest.mark.fault("B20")
def test_of_several_pages_the_first_is_read_and_that_is_known() -> None:
    pages = values("uint16", 3, 6, 8)
    content = tiff(pages, photometric="minisblack")
    assert read_header(content).has_frames
    np.testing.assert_array_equal(read_whole(content)[:, :, 0], pages[0])


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits"])
@pytest.mark.parametrize("share", [0.99, 0.6])
def test_a_cut_deep_tiff_is_refused_and_never_filled(compression: str | None, share: float) -> None:
    stored = values("uint16", 40, 40, 5)
    whole = tiff(stored, **BANDS, compression=compression)
    told = refusal(whole[: int(len(whole) * share)])
    assert told.split(":")[0] in ("truncated", "damaged")


def test_a_value_that_is_no_number_is_refused() -> None:
    stored = values("float32", 5, 5)
    stored[2, 3] = np.nan
    assert refusal(tiff(stored)).startswith("non-finite: it holds values that are no numbers")
    stored[2, 3] = np.inf
    assert refusal(tiff(stored)).startswith("non-finite")


def test_a_deep_tiff_that_claims_too_much_is_refused_from_its_header() -> None:
    content = bytearray(tiff(values("uint16", 4, 4, 5), **BANDS))
    for tag in (b"\x00\x01", b"\x01\x01"):  # ImageWidth, ImageLength
        place = content.find(tag)
        content[place + 2 : place + 4] = b"\x04\x00"
        content[place + 8 : place + 12] = (30_000).to_bytes(4, "little")
    assert refusal(bytes(content)).startswith("too-many-pixels: 30000x30000, more than 50,000,000")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_png_keeps_every_value(channels: int) -> None:
    stored = values("uint16", 9, 7, channels)
    if channels != 3:
        stored[..., -1] = 65535
    content = imagecodecs.png_encode(stored)
    colours = {2: 1, 3: 3, 4: 3}[channels]
    assert read_header(content) == Header((9, 7), colours, "uint16")
    np.testing.assert_array_equal(read_whole(content), stored[..., :colours])


def test_a_16_bit_png_is_turned_by_its_exif_and_its_clear_colour_is_white() -> None:
    stored = values("uint16", 9, 7, 3)
    plain = imagecodecs.png_encode(stored)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = b"tRNS" + stored[0, 0].astype(">u2").tobytes()
    chunks = [b"eXIf" + exif.tobytes()[6:], clear]
    content = plain[:33] + b"".join(map(_chunk, chunks)) + plain[33:]
    expected = np.rot90(stored, -1).copy()
    expected[0, -1] = 65535
    np.testing.assert_array_equal(read_whole(content), expected)


def _chunk(body: bytes) -> bytes:
    import zlib

    return (len(body) - 4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)


@pytest.mark.parametrize("cut", [20, 300])
def test_a_cut_16_bit_png_is_refused(cut: int) -> None:
    content = imagecodecs.png_encode(values("uint16", 20, 20, 3))
    assert refusal(content[:-cut]).startswith("truncated: not a whole PNG")


@pytest.mark.parametrize(("library", "kind"), [("tifffile", "tiff"), ("imagecodecs", "png")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, library: str, kind: str) -> None:
    stored = values("uint16", 4, 4, 3)
    content = tiff(stored) if kind == "tiff" else imagecodecs.png_encode(stored)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EnvironmentFault) as caught:
        read_whole(content)
    assert f"this image needs {library}, which is not installed" in str(caught.value)
    assert caught.value.hint == "pip install 'regraft[tiff]'"
