"""The verdict of regraft on every image file below a folder, as the table of docs/formats.md.

python benchmarks/formats.py FOLDER
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from regraft.data.decode import (
    UnreadableImage,
    quiet_codecs,
    read_content,
    read_header,
    read_whole,
    sniffed,
)

OTHER = {"LICENSE", "EXPECT.csv", "README.md"}


def verdicts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yields file, what it is, and how it is read or why it is refused."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    for path in (path.relative_to(root).as_posix() for path in files if path.name not in OTHER):
        kind = ""
        try:
            content = read_content(root, path)
            kind = sniffed(content) if isinstance(content, bytes) else "IDX"
            header, pixels = read_header(content), read_whole(content)
        except UnreadableImage as error:
            yield path, kind, f"refused: {error}"
            continue
        height, width, channels = pixels.shape
        frames = "; first frame of several" if header.has_frames else ""
        shape = f"{height}x{width}, {channels} channel{'s' if channels > 1 else ''}"
        ends = f"{pixels.min():g} to {pixels.max():g}"
        yield path, kind, f"{shape}, {pixels.dtype}, {ends}{frames}"


def table(root: Path) -> str:
    """Returns the table in Markdown."""
    lines = ["| file | is | verdict |", "|---|---|---|"]
    with quiet_codecs():
        for path, kind, verdict in verdicts(root):
            name = path if len(path) < 60 else f"{path[:28]}...{path[-28:]}"
            lines.append(f"| `{name}` | {kind or '-'} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(str(__doc__))
    print(table(Path(sys.argv[1])))
