"""Tensors and small facts in one file: safetensors, with JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..hooks import InputError

KEY = "lensbridge"


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    held = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    beside.touch()
    mode = (
        beside.stat().st_mode
    )  # as files are made here; safetensors would make one for its owner alone
    save_file(held, beside, metadata={KEY: json.dumps(facts)})
    beside.chmod(mode)
    beside.replace(path)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        FileNotFoundError: No such file.
        InputError: A file of another format or kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no {kind}: {error}") from error
    if facts.get("kind") != kind:
        raise InputError(f"{path} is no {kind}: it is {facts.get('kind') or 'something else'}")
    return tensors, facts
