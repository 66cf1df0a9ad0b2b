"""Every causal architecture transformers can build: boots, and its names mean what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lensbridge import LensError, TransformerBridge

pytestmark = pytest.mark.sweep

NAMES = sorted(json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())["causal"])

OPEN = {
    "beam": "memory beside the stream",
    "blt": "several stacks; the configuration has no hidden_size",
    "codegen": "q, v and k interleaved over four model-parallel parts",
    "deepseek_v4": "four residual streams",
    "dots3_note": "per-layer head counts",
    "dots3_note_text": "per-layer head counts",
    "gemma3n": "four residual streams",
    "gemma3n_text": "four residual streams",
    "gpt_neox_japanese": "its product of q and k is not seen",
    "hrm_text": "layers run several times in one pass",
    "hy_v4": "four residual streams",
    "prophetnet": "its product of pattern and v is not seen",
    "reformer": "reversible layers with two streams",
    "rwkv": "no heads",
    "xlm": "no stack of blocks",
    "xlnet": "the stream is [pos, batch, d_model]",
}
"""Not proved yet, each with what is in the way. A name that is proved after all must leave this list."""


def problem(model: nn.Module) -> str:
    """Why a model is not proved; empty when it is."""
    torch.manual_seed(0)
    try:
        proof = TransformerBridge(model).verify()
    except (LensError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:  # transformers' own, for settings that differ between layers
        return f"{type(error).__name__}: {error}"
    return "" if proof.holds else str(proof)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OPEN])
def test_proved(tiny: Callable[..., nn.Module], name: str) -> None:
    """Every identity the architecture promises holds, and logits keep their bits."""
    assert problem(tiny(name)) == ""


@pytest.mark.parametrize("name", sorted(OPEN))
def test_open(tiny: Callable[..., nn.Module], name: str) -> None:
    """What is listed as open is refused or reported, never passed off as proved."""
    assert problem(tiny(name)) != ""


def test_most_are_proved() -> None:
    """The list is complete and short."""
    assert set(OPEN) <= set(NAMES)
    assert len(NAMES) == 187
    assert len(OPEN) == 16


def test_what_is_missing_has_a_reason(tiny: Callable[..., nn.Module]) -> None:
    """A canonical point that a model lacks says why."""
    seen: list[Any] = []
    for name in ("opt", "bloom", "mamba", "bert", "mixtral", "deepseek_v3"):
        bridge = TransformerBridge(tiny(name))
        for point in ("hook_resid_mid", "attn.hook_pattern", "mlp.in.hook_out", "ln1.hook_out"):
            full = f"blocks.0.{point}"
            if full not in bridge.registry:
                seen.append(bridge.why(full))
    assert seen
    assert all(seen)
