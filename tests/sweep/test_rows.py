"""Every architecture transformers can build, wrapped and proved afresh: the committed table says the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.sweep

CONFIGS = json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())
ENTRIES = [(kind, name) for kind, entries in CONFIGS.items() for name in sorted(entries)]


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda part: part)
def test_row(
    sweep: Any,
    table: dict[str, Any],
    tiny: Callable[..., nn.Module],
    inputs_of: Callable[..., dict[str, torch.Tensor]],
    kind: str,
    name: str,
) -> None:
    """Boots, holds what it claims, and is proved and absent exactly as docs/support.json has it."""
    row = sweep.row_of(lambda: (tiny(name, kind), inputs_of(name, kind)))
    held = table[kind].get(name, {})
    # Through JSON, so that both are made of the same types.
    row = json.loads(json.dumps(row))
    changed = [
        f"{key}: {held.get(key)} is now {row.get(key)}"
        for key in {**held, **row}
        if held.get(key) != row.get(key)
    ]
    assert not changed, "; ".join([*changed, "if that is meant: python -m tests.sweep.row"])
