"""The command that looks at data before anything is trained on it."""

import sys
from pathlib import Path

from regraft.commands.arguments import DataArguments, Json
from regraft.errors import DataError
from regraft.terminal import print_findings, print_json, progress


def check(
    data: list[Path],
    /,
    *,
    start: Path | None = None,
    out: Path | None = None,
    json_: Json = False,
    reading: DataArguments = DataArguments(),
) -> None:
    """Find what would spoil a training: broken files, copies, leaks, wrong labels, shortcuts.

    Every file is read and decoded once. Exit code 3 where there are errors.

    Parameters
    ----------
    data
        Folders of class folders. Of several the first is what a backbone is pretrained on: test
        images of the others that it holds are leaks.
    start
        A Run: test images that its weights have seen are leaks.
    out
        An HTML page to write, with the pictures side by side.
    json_
        Print one JSON document; `--exclude-from` reads it.
    """
    from regraft.data.checks import check_data  # not by `api`: no torch is needed, and none loaded

    with progress() as told:
        checked = check_data(data, reading.options(), start=start, on_progress=told)
        if out is not None:
            from regraft.delivery.findings import write_findings

            write_findings(checked, out)
    if json_:
        print_json(checked.to_dict())
    else:
        print_findings(checked)
        if out is not None:
            print(f"\npage: {out}")
    if checked.errors:
        sys.exit(DataError.exit_code)
