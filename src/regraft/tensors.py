"""Tensors as safetensors: packed without a copy of them all, unpacked with caps on everything."""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from regraft.documents import once
from regraft.errors import ArtefactError

# Names of the format; the order is that of the library: the widest first.
DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
MOST_BYTES = 2**36  # 64 GiB: thirty times the weights of the largest network of timm; assumed
MOST_HEADER_BYTES = 2**22  # 200 bytes for each of the tensors below; assumed
MOST_TENSORS = 20_000  # the largest network of timm has 3,000; assumed
MOST_NAME = 300  # characters; assumed
MOST_DIMENSIONS = 8  # assumed


def packed(tensors: Mapping[str, Tensor]) -> Sequence[bytes | memoryview]:
    """Returns the buffers of a safetensors file, for `storage.write_file`: a header, then values.

    They share memory with contiguous tensors of the CPU: write them before these change.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    order = list(DTYPES)
    names = sorted(kept, key=lambda name: (order.index(kept[name].dtype), name))
    header, end = {}, 0
    for name in names:
        begin, end = end, end + kept[name].nbytes
        shape = list(kept[name].shape)
        header[name] = {
            "dtype": DTYPES[kept[name].dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values stay aligned
    values = [kept[name].reshape(-1).view(torch.uint8).numpy().data for name in names]
    return [len(text).to_bytes(8, "little") + text, *values]


def unpacked(content: bytes, path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file: copies, so the file may change later.

    Raises:
        ArtefactError: It is no such file, or holds more or other things than any network.
    """
    if content[:1] == b"\x80" or content[:4] == b"PK\x03\x04":
        raise ArtefactError(
            f"`{path}` is a pickle or an archive of one: such files can run code, and are refused",
            hint="weights that other tools wrote are converted by `regraft import FILE`",
        )
    try:
        _check_header(content)
        return load(content)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) \
            as error:  # fmt: skip
        raise ArtefactError(
            f"`{path}` holds no tensors in the form of safetensors: "
            f"{str(error).splitlines()[0][:200]}",
            hint="restore the file from a copy",
        ) from error


def _check_header(content: bytes) -> None:
    """Refuses what the library would accept or take long to refuse."""
    size = int.from_bytes(content[:8], "little")
    if size > min(MOST_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"a header of {size:,} bytes in a file of {len(content):,}")
    header: dict[str, Any] = json.loads(content[8 : 8 + size], object_pairs_hook=once)
    if len(header) > MOST_TENSORS:
        raise ValueError(f"{len(header):,} tensors")
    known = set(DTYPES.values())
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if len(name) > MOST_NAME or not name.isprintable():
            raise ValueError(f"a tensor named {name[:40]!r}")
        if entry["dtype"] not in known or len(entry["shape"]) > MOST_DIMENSIONS:
            raise ValueError(f"`{name}` is {str(entry['dtype'])[:20]} {str(entry['shape'])[:60]}")
        if prod(entry["shape"]) > 8 * len(content):
            raise ValueError(f"`{name}` has more values than the file has bits")
