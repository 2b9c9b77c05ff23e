"""Reading a file that somebody else made, in a process of its own with limits.

    python -m regraft.models.quarantine KIND FILE FOLDER

The process has no network where the system can take it away, a bound on memory, time, open files
and what it writes, and leaves arrays.safetensors and document.json, or error.json.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regraft.errors import ArtefactError, EnvironmentFault, RegraftError

ARRAYS, DOCUMENT, ERROR = "arrays.safetensors", "document.json", "error.json"
# All assumed, with room: reading takes 2 to 3 times the file, and about 0.1 s of time per 100 MB.
MEMORY_PER_BYTE, MEMORY_BYTES = 10, 512 * 2**20
CPU_S, CPU_S_PER_BYTE = 60, 1e-7
WRITES_PER_BYTE, WRITES_BYTES = 4, 64 * 2**20
OPEN_FILES = 64
NO_NETWORK = 0x40000000, 0x10000000  # CLONE_NEWNET; with CLONE_NEWUSER where one is not root


def read_apart(kind: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the document and arrays that a reader made of a file.

    Args:
        kind: `keras` or `torch`.

    Raises:
        ArtefactError: The reader refused the file, or did not survive it.
        EnvironmentFault: What reads such files is not installed.
    """
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
        command = [sys.executable, "-m", "regraft.models.quarantine", kind, str(path), folder]
        alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        limit_s = CPU_S * 5 + path.stat().st_size * CPU_S_PER_BYTE * 5
        try:
            done = subprocess.run(
                command, env=alone, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise _died(path, f"not done after {limit_s:.0f} s") from error
        if (Path(folder) / ERROR).is_file():
            raise _told(json.loads((Path(folder) / ERROR).read_text()))
        if done.returncode:
            raise _died(path, _why(done.returncode, done.stderr.decode(errors="replace")))
        document = json.loads((Path(folder) / DOCUMENT).read_text())
        return document, load_file(Path(folder) / ARRAYS)


def _died(path: Path, why: str) -> ArtefactError:
    return ArtefactError(
        f"`{path.name}` cannot be read: its reader, in a process of its own, ended: {why}",
        hint="save it again where it was made",
    )


def _why(code: int, said: str) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return (said.strip().splitlines() or [f"exit code {code}"])[-1][:300]


def _told(document: dict[str, Any]) -> RegraftError:
    kind = EnvironmentFault if document["code"] == EnvironmentFault.code else ArtefactError
    return kind(document["message"], problems=document["problems"], hint=document["hint"])


def _limit(path: Path) -> None:
    """Bounds this process; where the system has no such bounds it runs without."""
    try:
        import resource
    except ImportError:
        return
    size = path.stat().st_size
    bounds = {
        resource.RLIMIT_CPU: CPU_S + int(size * CPU_S_PER_BYTE),
        resource.RLIMIT_FSIZE: WRITES_BYTES + size * WRITES_PER_BYTE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    status = Path("/proc/self/statm")
    if status.is_file():  # torch alone maps gigabytes: what it has is not what the file takes
        mapped = int(status.read_text().split()[0]) * resource.getpagesize()
        bounds[resource.RLIMIT_AS] = mapped + MEMORY_BYTES + size * MEMORY_PER_BYTE
    for kind, bound in bounds.items():
        most = resource.getrlimit(kind)[1]
        least = bound if most == resource.RLIM_INFINITY else min(bound, most)
        resource.setrlimit(kind, (least, least))


def _leave_network() -> None:
    """Takes the network away, where Linux lets us: nothing that is read needs it."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if library.unshare(NO_NETWORK[0]):
            library.unshare(NO_NETWORK[0] | NO_NETWORK[1])


def _read_keras(path: Path) -> tuple[dict[str, Any], Callable[[Path], None]]:
    from safetensors.numpy import save_file

    from regraft.models.keras_files import read_keras

    _limit(path)
    document, arrays = read_keras(path).to_flat()
    return document, lambda place: save_file(arrays, place)


def _read_torch(path: Path) -> tuple[dict[str, Any], Callable[[Path], None]]:
    import torch  # noqa: F401  before the limits: what it takes is not what the file takes
    from safetensors.torch import save_file

    from regraft.models.torch_files import read_torch

    _limit(path)
    document, tensors = read_torch(path)
    return document, lambda place: save_file(tensors, place)


def main(kind: str, path: Path, folder: Path) -> None:
    """Reads, and leaves what was read or what was wrong with it in `folder`."""
    _leave_network()
    try:
        document, save = {"keras": _read_keras, "torch": _read_torch}[kind](path)
        save(folder / ARRAYS)
        (folder / DOCUMENT).write_text(json.dumps(document))
    except RegraftError as error:
        told = {"code": error.code, "message": error.message, "hint": error.hint}
        (folder / ERROR).write_text(json.dumps(told | {"problems": list(error.problems)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
