"""The command line: which commands there are, and errors to exit codes. The only file that exits.

torch is imported by the verbs, inside the commands: `regraft --help` answers at once.
"""

import io
import os
import sys
import traceback
from importlib.metadata import version
from typing import NoReturn

from cyclopts import App, CycloptsError

from regraft.commands import check, delivery, models, training
from regraft.errors import EnvironmentFault, RegraftError, UsageError
from regraft.faults import VARIABLE, is_armed
from regraft.signals import raised
from regraft.terminal import print_error, speaks, tell

app = App(
    name="regraft",
    help="Train image classifiers from your own images, carry the weights over to other classes, "
    "and learn whether that helped. No weights of anybody else are ever used.",
    version=f"regraft {version('regraft')}",
)
for command in (
    training.demo,
    check.check,
    training.pretrain,
    training.finetune,
    training.compare,
    training.resume,
    training.recipe,
    models.evaluate,
    models.predict,
    models.explain,
    delivery.export,
    models.report,
    delivery.serve,
    models.verify,
):
    app.command(command)
app.command(delivery.import_, name="import")
# Commands of one process.
ALONE = (
    "check", "demo", "explain", "export", "import", "predict", "recipe", "report", "serve",
    "verify",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command line and exits: 0 done, otherwise as the error says."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that are no valid Unicode
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    if is_armed():
        tell(f"warning: {VARIABLE} is set: this process fails on purpose")
    try:
        _settle_processes(given)
        tokens = [argument for argument in given if argument != "--debug"]
        with raised():
            app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except RegraftError as error:
        print_error(error)
        if debug:
            traceback.print_exc()
        sys.exit(error.exit_code)
    except CycloptsError as error:
        print_error(_as_usage_error(error))
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        sys.exit(0)
    except OSError as error:
        place = f"`{error.filename}`: " if error.filename else ""
        hint = "check the place, its permissions and the free space"
        print_error(EnvironmentFault(f"{place}{error.strerror or error}", hint=hint))
        if debug:
            traceback.print_exc()
        sys.exit(5)
    except KeyboardInterrupt:
        tell("stopped")
        sys.exit(130)
    except Exception:  # noqa: BLE001  the last resort: a mistake of ours is shown whole
        traceback.print_exc()
        tell("error: a mistake in regraft itself; please report the lines above")
        sys.exit(70)
    sys.exit(0)


def _settle_processes(given: list[str]) -> None:
    """Under `torchrun` one process speaks for all (see `Engine`)."""
    # Idle threads of OpenMP spin. Beside another job on the same 2 cores, without spinning: 3 to 16
    # times as fast, and no slower alone (docs/log.md 2026-11-24). Read when torch is imported.
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if given and given[0] in ALONE:
        raise UsageError(
            f"`regraft {given[0]}` works in one process", hint="start it without `torchrun`"
        )
    if not speaks():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _as_usage_error(error: CycloptsError) -> UsageError:
    text = " ".join(str(error).split())
    return UsageError(text, hint="`regraft COMMAND --help` shows what it takes")
