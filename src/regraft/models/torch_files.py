"""Files that torch wrote, to named tensors: the only file that calls `torch.load`.

Such a file is a pickle in a zip, and a pickle may run code: it is read in a process of its own
(`quarantine.py`), with `weights_only=True` and nothing to fall back on.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.errors import ArtefactError, shorten

MOST_BYTES_PER_BYTE = 4  # torch stores uncompressed; what unpacks to more is no work of torch's
MOST_MEMBERS = 100_000  # assumed; one for each tensor
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and Lightning


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the file is, and its tensors by name.

    Raises:
        ArtefactError: It holds more than tensors, or is no file of torch's.
    """
    refuse_bomb(path)
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file may raise anything
        raise ArtefactError(
            f"`{path.name}` holds more than tensors, and code in a file is never run",
            problems=[f"it would call {name}" for name in _unsafe(path)]
            or [str(error).split(".")[0][:200]],
            hint="where it was trained, save tensors alone: "
            "`torch.save(model.state_dict(), 'weights.pt')`",
        ) from error
    tensors = _unwrapped(held)
    if tensors is None:
        raise ArtefactError(
            f"`{path.name}` holds no state dict: {type(held).__name__}",
            hint="save one: `torch.save(model.state_dict(), 'weights.pt')`",
        )
    return {"format": "torch state dict"}, {
        name: _plain(tensor) for name, tensor in without_prefix(tensors).items()
    }


def refuse_bomb(path: Path) -> None:
    """Refuses what is no zip of stored members before torch opens it.

    Raises:
        ArtefactError: It is old, compressed, or unpacks to far more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ArtefactError(
            f"`{path.name}` is no file of torch 1.6 or newer: {error}",
            hint="load it where it was made and save it again: "
            "`torch.save(model.state_dict(), 'weights.pt')`",
        ) from error
    total, size = sum(member.file_size for member in members), path.stat().st_size
    reason = ""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        reason = "its members are compressed, which torch never does"
    elif total > MOST_BYTES_PER_BYTE * size or len(members) > MOST_MEMBERS:
        reason = f"its {len(members):,} members unpack to {total:,} bytes from {size:,}"
    elif any("/code/" in member.filename for member in members):
        reason = "it is TorchScript, which holds code"
    elif not any(member.filename.endswith("data.pkl") for member in members):
        reason = "it is a zip, but torch did not write it"
    if reason:
        raise ArtefactError(
            f"`{path.name}` is refused: {reason}",
            hint="save tensors alone: `torch.save(model.state_dict(), 'weights.pt')`",
        )


def _unsafe(path: Path) -> list[str]:
    import torch

    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  an untrusted file may raise anything; this only tells more
        return []
    return [shorten([name]) for name in found[:3]]


def _unwrapped(held: object) -> dict[str, Any] | None:
    import torch

    for _ in range(3):
        if not isinstance(held, Mapping):
            return None
        inner = next((held[key] for key in WRAPPERS if isinstance(held.get(key), Mapping)), None)
        if inner is None:
            break
        held = inner
    if not isinstance(held, Mapping):
        return None
    tensors = {str(name): value for name, value in held.items() if isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) < len(held):
        return None
    return tensors


def _plain(tensor: Any) -> Any:
    """Returns a tensor of its own, floats in single precision, which numpy can hold."""
    alone = tensor.detach().to_dense().contiguous().clone()
    return alone.float() if alone.is_floating_point() else alone


def without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors without what wrappers of the network put before their names."""
    named = dict(tensors)
    for prefix in PREFIXES * 2:
        if named and all(name.startswith(prefix) for name in named):
            named = {name[len(prefix) :]: tensor for name, tensor in named.items()}
    return named
