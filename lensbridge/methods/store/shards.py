"""Shards: safetensors files written from pieces, whole or not at all, with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtypes as safetensors calls them."""

SAMPLES, COUNTS, LENGTHS, TOKENS, BATCHES = "#samples", "#counts", "#lengths", "#tokens", "#batches"
"""Tables that each shard holds beside its rows; see `lensbridge.methods.store.folder`."""


def write_shard(path: Path, pieces: Mapping[str, Sequence[Tensor]]) -> tuple[int, str]:
    """Write a safetensors file.

    Args:
        path: Where. The file is there whole, and on the disk, or not at all.
        pieces: Name -> tensors [row, ...] that make one tensor, one after the other. They are never put
            together in memory.
    Returns:
        Its size in bytes and its SHA-256.
    """
    # Large items first: so each tensor begins at a multiple of its items' size.
    names = sorted(pieces, key=lambda name: (-pieces[name][0].element_size(), name))
    digest, size = hashlib.sha256(), 0
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        for block in (_header(pieces, names), *_blocks(pieces, names)):
            file.write(block)
            digest.update(block)
            size += len(block)
        settle(file)
    beside.replace(path)
    settle_folder(path.parent)
    return size, digest.hexdigest()


def write_json(path: Path, facts: Any) -> None:
    """Write a JSON file, whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1)
        file.write("\n")
        settle(file)
    beside.replace(path)
    settle_folder(path.parent)


def settle(file: Any) -> None:
    """Have a file's contents on the disk."""
    file.flush()
    os.fsync(file.fileno())


def settle_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the system lets folders be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """A file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _header(pieces: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> bytes:
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        first = pieces[name][0]
        stop = at + sum(piece.nbytes for piece in pieces[name])
        told[name] = {
            "dtype": DTYPES[first.dtype],
            "shape": [sum(len(piece) for piece in pieces[name]), *first.shape[1:]],
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(pieces: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> Iterator[Any]:
    for name in names:
        for piece in pieces[name]:
            if piece.numel():
                yield piece.contiguous().view(-1).view(torch.uint8).numpy().data
