"""Writes docs/reference.md from the code: `make reference`. tests/test_docs.py holds it current."""

import re
from pathlib import Path
from typing import Any

from regraft import errors
from regraft.cli import app
from regraft.training.recipe import Phase, Recipe

PLACE = Path(__file__).with_name("reference.md")
OTHER_CODES = {
    0: "done",
    70: "a mistake of regraft's own; please report what it printed",
    129: "stopped by SIGHUP (a closed terminal); what was learned is kept",
    130: "stopped by SIGINT; what was learned is kept",
    143: "stopped by SIGTERM; what was learned is kept",
}


def reference() -> str:
    """Returns the page."""
    commands = app.generate_docs(heading_level=2)
    commands = commands[commands.index("## ", 4) :] if "## Table" in commands else commands
    commands = re.sub(r"\n[ \t]+(?=\S)", " ", commands)  # help texts that go on in the next line
    recipe = "\n".join(_rows(Recipe))
    phase = "\n".join(_rows(Phase))
    codes = "\n".join(f"| {code} | {text} |" for code, text in sorted(_codes().items()))
    return (
        "# Reference\n\n"
        "Made from the code by `make reference`; do not edit. Data options are the same wherever "
        "DATA stands, training options wherever something trains.\n\n"
        f"{commands.strip()}\n\n"
        "## Exit codes\n\n| code | what happened |\n|---|---|\n"
        f"{codes}\n\n"
        "Results go to stdout, progress and errors to stderr. `--debug` adds a traceback.\n\n"
        "## Keys of a recipe\n\n"
        "`regraft recipe scratch` and `regraft recipe transfer` print a file with every key, to "
        "edit and give to `--recipe`; `--set key=value` changes one.\n\n"
        f"| key | default | what it is |\n|---|---|---|\n{recipe}\n\n"
        "## Keys of a phase\n\n"
        "A recipe has one or more phases, in order; in each of them one part of the network "
        "learns and everything else is frozen.\n\n"
        f"| key | default | what it is |\n|---|---|---|\n{phase}\n"
    )


def _rows(model: type[Any]) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        if name == "phases":
            continue
        default = "" if field.is_required() else f"`{field.default}`"
        told = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {told} |")
    return rows


def _codes() -> dict[int, str]:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.RegraftError)
    ]
    told = {
        kind.exit_code: (kind.__doc__ or "").splitlines()[0]
        for kind in kinds
        if kind is not errors.RegraftError
    }
    return OTHER_CODES | told


if __name__ == "__main__":
    PLACE.write_text(reference(), encoding="utf-8")
