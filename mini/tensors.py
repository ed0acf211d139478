"""Tensors in files, and the weights of a model.

A safetensors file (https://github.com/huggingface/safetensors#format) is 8 bytes, the header's length, little-endian; a
JSON header with each tensor's dtype, shape and place; the raw bytes. It can run no code, and can be memory-mapped.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mini.errors import UserError
from mini.storage import atomic_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def digest_tensors(tensors: dict[str, torch.Tensor], *words: str) -> str:
    """A checksum of tensors and words."""
    h = hashlib.sha256("|".join(words).encode())
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        h.update(tensor.flatten().view(torch.uint8).numpy())
    return h.hexdigest()[:32]


class Rows(NamedTuple):
    """What a process holds of a tensor: all of it, or of a sharded one (torch's DTensor) some of its rows."""

    tensor: torch.Tensor
    first: int  # the number of its first row
    shape: torch.Size  # of the whole
    whole: bool  # whether every process holds all of it


def held(tensor: torch.Tensor) -> Rows:
    """The rows of a tensor that are here; they share its memory."""
    tensor = tensor.detach()
    if not hasattr(tensor, "to_local"):
        return Rows(tensor, 0, tensor.shape, True)
    first, _ = share_of(len(tensor), tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())
    return Rows(tensor.to_local(), first, tensor.shape, False)


def share_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """From which row up to which a process holds a sharded tensor, as torch.chunk deals them out."""
    share = -(-rows // size)
    return min(rank * share, rows), min((rank + 1) * share, rows)


def put(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies a whole tensor into another, of which only the rows that are here are looked at."""
    rows = held(target)
    rows.tensor.copy_(source if rows.whole else source[rows.first : rows.first + len(rows.tensor)])


def write_tensors(path: str | Path, tensors: dict[str, Rows], lead: bool = True) -> None:
    """Writes named tensors as one safetensors file. The same tensors give the same bytes, however they are sharded.

    Several processes write one file: each its own rows, and that which is to `lead` the rest.
    """
    header, offset = {}, 0
    # Widest types first keeps every tensor aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].tensor.element_size(), name))
    for name in order:
        dtype, shape = tensors[name].tensor.dtype, tensors[name].shape
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:  # others may have written into it
        if lead:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor, first, shape, whole = tensors[name]
            if tensor.numel() and (lead or not whole):
                row = shape[1:].numel() * tensor.element_size() if shape else 0
                file.seek(8 + len(text) + header[name]["data_offsets"][0] + first * row)
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes named tensors as one safetensors file, atomically."""
    with atomic_file(path) as temporary:
        write_tensors(temporary, {name: held(tensor) for name, tensor in tensors.items()})


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file, {name: tensor} on the CPU.

    The tensors share one memory map that is private to this process: writing to them does not change the file.
    Raises UserError where the file is missing, cut off, or its header does not describe its bytes.
    """
    path = Path(path)

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what}; the file is damaged or not safetensors: copy or download it again")

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):  # the limit of the reference implementation
            raise refuse(f"its header should be {length:,} bytes long, but the file has {size:,}")
        text = file.read(length)
    data = torch.from_numpy(np.memmap(path, np.uint8, "c"))[8 + length :]
    tensors, expected, total = {}, 0, len(data)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), shape, dtype = entry["data_offsets"], list(entry["shape"]), DTYPES[entry["dtype"]]
            if any(type(n) is not int or not 0 <= n < 2**63 for n in [begin, end, *shape]):
                raise ValueError(f"tensor {name!r} has a size that is no number")
            if begin != expected or end > total or end - begin != math.prod(shape) * dtype.itemsize:
                raise refuse(f"tensor {name!r} {shape} does not fit its place {begin}..{end} of {total} bytes")
            aligned = begin % dtype.itemsize == 0 and (8 + length) % 8 == 0
            raw = data[begin:end] if aligned else data[begin:end].clone()
            tensors[name] = raw.view(dtype).reshape(shape)
            expected = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(f"its header cannot be read ({type(error).__name__}: {error})") from None
    if expected != total:
        raise refuse(f"{total - expected:,} bytes belong to no tensor")
    return tensors


# ---------------------------------------------------------------- weights of a model
def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model's file holds: each parameter once, though it may have two places (a tied head), and buffers."""
    persistent = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def load_weights(model: torch.nn.Module, tensors: dict[str, torch.Tensor], where: str | Path) -> None:
    """Copies named tensors into a model. Raises UserError listing what is missing, extra or has another shape."""
    check_shapes(weights(model), tensors, where)
    if bad := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
        others = f", as do {len(bad) - 1} others" if len(bad) > 1 else ""
        raise UserError(f"{where}: {bad[0]} holds values that are no numbers{others}: train it anew, or copy it again")
    with torch.no_grad():
        for name, tensor in weights(model).items():
            put(tensor, tensors[name])


def check_shapes(wanted: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], where: str | Path) -> None:
    have, want = ({n: list(tensor.shape) for n, tensor in named.items()} for named in (tensors, wanted))
    problems = [f"missing {n} {shape}" for n, shape in want.items() if n not in have]
    problems += [f"extra {n} {shape}" for n, shape in have.items() if n not in want]
    problems += [f"{n} is {have[n]}, not {shape}" for n, shape in want.items() if have.get(n, shape) != shape]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(f"{where}: the weights do not fit the model: {shown}")


def loaded(make: Callable[[], torch.nn.Module], tensors: dict[str, torch.Tensor], where: str | Path) -> torch.nn.Module:
    """make() with these weights; it takes no memory before their shapes are known to fit."""
    check_shapes(weights_wanted(make, where), tensors, where)
    model = make()
    load_weights(model, tensors, where)
    return model


def weights_wanted(make: Callable[[], torch.nn.Module], where: str | Path) -> dict[str, torch.Tensor]:
    """The weights of make() without their values, which take no memory. Raises UserError where none can be so large."""
    try:
        with torch.device("meta"):
            return weights(make())
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"{where}: its settings are of no model ({str(error).splitlines()[0]})") from None


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether none of its values is an infinity or no number: its smallest and its largest tell."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
