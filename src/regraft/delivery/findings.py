"""One self-contained HTML page about what a check has found, with the pictures side by side.

Pictures are decoded again and shown as small PNGs: no metadata of a file reaches the page, and no
link to a place on disk.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regraft.changing import write_listed
from regraft.data.checks import Checked
from regraft.data.decode import UnreadableImage, encode_png, read_content, read_header, read_pixels
from regraft.data.finding import FileRef, Finding
from regraft.delivery.pages import rendered
from regraft.delivery.report import refuse_other_page
from regraft.storage import make_folder

MOST_SHOWN = 12  # pairs or single pictures of a finding; assumed
THUMBNAIL_PX = 112


def write_findings(checked: Checked, out: Path) -> Path:
    """Writes the page and returns its path.

    Raises:
        UsageError: `out` is something else than a page.
    """
    refuse_other_page(out)
    names = [root.resolve().name for root in checked.roots]
    page = rendered(
        "findings.html.jinja",
        ("style.css", "findings.css"),
        data=list(zip(names, checked.num_images, strict=True)),
        findings=[_section(checked.roots, finding) for finding in checked.findings],
    )
    make_folder(out.parent)
    write_listed(out, page.encode("utf-8", "surrogateescape"))
    return out


def _section(roots: Sequence[Path], finding: Finding) -> dict[str, Any]:
    shown: Sequence[tuple[FileRef, ...]] = finding.pairs or [(one,) for one in finding.files]
    return {
        **finding.to_dict(),
        "pictures": [
            [_picture(roots, one, len(roots) > 1) for one in pair] for pair in shown[:MOST_SHOWN]
        ],
        "more": max(0, len(shown) - MOST_SHOWN),
    }


def _picture(roots: Sequence[Path], one: FileRef, is_one_of_many: bool) -> dict[str, str | None]:
    place = f"{roots[one.place].resolve().name}: " if is_one_of_many else ""
    return {"name": place + one.path, "image": _thumbnail(roots[one.place], one.path)}


def _thumbnail(root: Path, path: str) -> str | None:
    """Returns a data URL; None where the file cannot be decoded."""
    try:
        content = read_content(root, path)
        header = read_header(content)
        scale = THUMBNAIL_PX / max(header.size)
        height, width = (max(1, round(side * scale)) for side in header.size)
        pixels = read_pixels(content, size=(height, width), channels=header.channels)
    except UnreadableImage:
        return None
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode("ascii")
