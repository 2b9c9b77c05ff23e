"""Names that want to be code: 46 of them, on the page, in a figure, in a CSV and on a terminal."""

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regraft.data.decode import encode_png, read_whole
from regraft.delivery.figures import arms
from regraft.errors import readable
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.rows import to_csv
from test_report import Page, evaluation_of, make_comparison, make_run, page_of, write

SIMPLE = "alert(1)"
PAYLOADS = (
    f"<script>{SIMPLE}</script>", f'"><script>{SIMPLE}</script>', f"'><script>{SIMPLE}</script>",
    f"<img src=x onerror={SIMPLE}>", f'"><img src=x onerror={SIMPLE}>', f"<svg onload={SIMPLE}>",
    f"<svg><script>{SIMPLE}</script></svg>", f"<body onload={SIMPLE}>", f"javascript:{SIMPLE}",
    f'" onmouseover="{SIMPLE}', f"' onfocus='{SIMPLE}' autofocus='",
    f"<a href=javascript:{SIMPLE}>",
    f"<iframe src=javascript:{SIMPLE}>", "<object data=x>", "<embed src=x>", "<base href=//x/>",
    "<meta http-equiv=refresh content=0>", "<link rel=stylesheet href=//x>", "<form action=//x>",
    "<style>*{display:none}</style>", "</style><b>", "</title><b>", "</script><b>",
    "</table></main>",
    "<!--", "-->", "]]>", "<![CDATA[", "&lt;script&gt;", "&#60;b&#62;", "{{ 7 * 7 }}", "{% raw %}",
    "{# x", "${7*7}", "<%= 7*7 %>", "$x^2$", "\\\\", "%00", "=1+1", "+1", "-1", "@SUM(A1)",
    "\x1b]0;title\x07", "\x1b[2J", "a\r\nb", "cat\u202egnp.exe",
)  # fmt: skip


def test_there_are_as_many_as_were_promised() -> None:
    assert len(set(PAYLOADS)) >= 40


@pytest.mark.fault("L1", "L9")
def test_no_name_becomes_a_part_of_the_page(tmp_path: Path) -> None:
    plain = tuple(f"name {number}" for number in range(len(PAYLOADS)))
    pages: list[Page] = []
    for number, names in enumerate((plain, PAYLOADS)):
        run = make_run(tmp_path / str(number), names=names, num_mistakes=0)
        document = evaluation_of(names, len(names))
        for mistake, name in zip(document["mistakes"], names, strict=True):
            mistake |= {"truth": name, "predicted": name, "path": f"{name}.png"}
        write(run / "evaluation.json", document)
        pages.append(page_of(tmp_path / f"out-{number}", run))
    expected, found = pages
    assert found.nests and found.open == []
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in expected.elements]
    assert [sorted(a) for _, a in found.elements] == [sorted(a) for _, a in expected.elements]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", found.source)
    for name in PAYLOADS:
        assert " ".join(readable(name).split()) in found.text


@pytest.mark.fault("L1")
def test_no_name_becomes_a_part_of_a_figure(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    comparison = {
        "metric": "accuracy",
        "arms": {"transfer": {"accuracy": {"values": [0.5], "mean": 0.5}}},
    }
    drawn = [arms(comparison, {"transfer": name}, name) for name in ("plain", *PAYLOADS[:12])]
    tags = [re.findall(r"<(/?[A-Za-z!?]\w*)", svg) for svg in drawn]
    assert all(found == tags[0] for found in tags)
    assert folder.is_dir()


@pytest.mark.fault("L2", "L3")
def test_a_csv_holds_every_name_and_no_formula() -> None:
    names = (*PAYLOADS, "a,b", 'a"b', "a\nb", "\t=1", "\0=1")
    share = np.full((len(names), len(names)), 1 / len(names))
    paths = tuple(f"{name}.png" for name in names)
    text = to_csv(Predictions(paths, names, share, np.arange(len(names))), [("=x.png", "=reason")])
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert {len(row) for row in rows} == {len(names) + 5}
    assert not [cell for row in rows for cell in row if cell[:1] in tuple("=+-@\t\r\0")]
    for name, row in zip(names, rows[1:], strict=False):
        assert row[0] in (f"{name}.png", f"'{name}.png")
        assert row[1] in (name, f"'{name}")
        float(row[3])  # numbers that we wrote stay numbers
    assert "\r\n" in text and text.endswith("\r\n")


@pytest.mark.fault("L5")
def test_a_thumbnail_holds_pixels_alone() -> None:
    image = Image.new("RGB", (300, 200), (9, 80, 200))
    exif = Image.Exif()
    exif[0x010E] = "Alice in Wonderland"
    exif.get_ifd(0x8825)[1] = "N"  # a place on earth
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif, icc_profile=b"a profile", comment=b"Alice")
    assert b"Alice" in stream.getvalue()
    small = encode_png(read_whole(stream.getvalue())[::2, ::2])
    assert b"Alice" not in small
    with Image.open(io.BytesIO(small)) as again:
        assert dict(again.getexif()) == {}
        assert set(again.info) <= {"dpi"}
    assert set(re.findall(rb"[A-Za-z]{4}(?=.{0})", small)) >= {b"IHDR", b"IDAT"}
    assert not [kind for kind in (b"eXIf", b"iCCP", b"tEXt", b"iTXt", b"zTXt") if kind in small]


@pytest.mark.fault("L8")
def test_a_report_that_is_killed_leaves_the_old_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    out = tmp_path / "pages" / "report.html"
    out.parent.mkdir()
    out.write_text("the old page")
    environment = os.environ | {"REGRAFT_FAULT": "report.half:1:kill"}
    command = [sys.executable, "-m", "regraft", "report", str(run), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == -9
    assert out.read_text() == "the old page"
