"""Activations in one file: .npz or .safetensors, as the name says."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...hooks import InputError
from .ragged import Ragged
from .shards import DTYPES, settle, settle_folder, write_shard

_OFFSETS = "#offsets"
_SUFFIXES = (".npz", ".safetensors")


def save_activations(activations: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write activations to one file, whole or not at all.

    Args:
        activations: Tensors by name: of `extract_representations`, `ActivationStore.activations`, or a cache.
        path: Ends in ``.safetensors`` or ``.npz``, and is written as it is given.
    Returns:
        The path.
    Raises:
        InputError: Another suffix, nothing to write, what is no tensor, or a dtype the format lacks
            (bfloat16 in ``.npz``).
    """
    path = Path(path)
    _check_suffix(path)
    if not isinstance(activations, Mapping) or not activations:
        raise InputError("activations are a mapping from names to tensors, with at least one")
    tensors: dict[str, Tensor] = {}
    for name, held in activations.items():
        if not isinstance(name, str) or not isinstance(held, (Tensor, Ragged)):
            raise InputError(
                f"activations are tensors by name, got {name!r}: {type(held).__name__}"
            )
        values = held.values if isinstance(held, Ragged) else held
        tensors[name] = values.detach().cpu().contiguous()
        if isinstance(held, Ragged):
            tensors[name + _OFFSETS] = held.offsets
    if path.suffix == ".npz":
        _write_npz(path, tensors)
    else:
        odd = [name for name, x in tensors.items() if x.dtype not in DTYPES]
        if odd:
            raise InputError(f"{odd[0]} is {tensors[odd[0]].dtype}, which .safetensors files lack")
        if any(x.dim() == 0 for x in tensors.values()):
            raise InputError("activations have at least one dimension")
        write_shard(path, {name: [x] for name, x in tensors.items()})
    return path


def load_activations(path: str | os.PathLike[str]) -> dict[str, Tensor | Ragged]:
    """Read what `save_activations` wrote. Pickles are not read.

    Raises:
        FileNotFoundError: No such file.
        InputError: Another suffix, or a file of another kind or cut short.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        tensors = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    except (SafetensorError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no activations: {error}") from error
    return {
        name: Ragged(held, tensors[name + _OFFSETS]) if name + _OFFSETS in tensors else held
        for name, held in tensors.items()
        if not name.endswith(_OFFSETS)
    }


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"activations are written to .npz or .safetensors, got {path.name!r}"
            + ("; pickles are neither written nor read" if path.suffix in (".pt", ".pkl") else "")
        )


def _write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    arrays = {name: _array(name, x) for name, x in tensors.items()}
    beside = path.with_name(f".{path.name}.part")
    # By hand: np.savez takes names as keywords, and has one called "file" itself.
    with beside.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as held:
            for name, array in arrays.items():
                with held.open(f"{name}.npy", "w", force_zip64=True) as part:
                    np.lib.format.write_array(part, array, allow_pickle=False)
        settle(file)
    beside.replace(path)
    settle_folder(path.parent)


def _array(name: str, x: Tensor) -> NDArray[Any]:
    try:
        return x.numpy()
    except TypeError as error:
        raise InputError(
            f"{name} is {x.dtype}, which .npz files lack: cast it (.float()), extract with "
            "dtype=torch.float32, or save as .safetensors"
        ) from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        held = np.load(file, allow_pickle=False)
        if not isinstance(held, np.lib.npyio.NpzFile):
            raise ValueError("it is one array without a name")
        return {name: torch.from_numpy(held[name]) for name in held.files}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - no mapping
