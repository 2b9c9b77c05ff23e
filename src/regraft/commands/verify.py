"""The command that checks what was saved."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.terminal import print_json


def verify(
    run: Path,
    /,
    *,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Check every file by its hash, and show where the weights come from.

    Parameters
    ----------
    run
        Folder of a Run, of a comparison, or of a classifier.
    json_
        Print one JSON document.
    """
    from regraft import api
    from regraft.delivery.verification import told

    document = api.verify(run)
    print_json(document) if json_ else print(told(document))
