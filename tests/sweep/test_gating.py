"""Every architecture with heads: log-probabilities under gates are those of plain PyTorch hooks on the bare model.

The hooks multiply what the output projection of each layer's attention reads. Gradients for the gates are held
against the same hooks. Every exception is listed with the reason; a name that is no longer one must leave its list.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.sweep

CONFIGS = json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())
NAMES = sorted(CONFIGS["causal"])
NATS = 1e-4

ABSENT = {
    "deepseek_v4": "what passes there cannot be read as",
    "falcon_mamba": "this layer is mixer",
    "jetmoe": "what passes there cannot be read as",
    "mamba": "this layer is mixer",
    "mamba2": "this layer is mixer",
    "prophetnet": "no layer with weights of its own reads what attention makes",
    "reformer": "its output is no sum of its input and what its modules make",
    "rwkv": "this layer is mixer",
    "xlm": "has no layers that could be gated",
    "xlnet": "no layer with weights of its own reads what attention makes",
    "xlstm": "this layer is mixer",
}
"""Architectures without a place where heads lie side by side, and what is said of them."""

UNEQUAL = ("dots3_note", "dots3_note_text")
"""Whose layers differ in their number of heads: each is gated by itself."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Annotations are enforced wherever else models are gated; here that would take most of the time.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    # Architectures warn of their own matters: deprecated options, slow paths.
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        yield


def rows() -> tuple[Tensor, Tensor]:
    """Ids of two rows, and the places of each that count: two, and four."""
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 9), generator=seed)
    counts = torch.zeros(2, 9, dtype=torch.bool)
    counts[0, [3, 8]] = True
    counts[1, 5:] = True
    return ids, counts


def gating(gates: Tensor, call: int) -> Callable[[Any, Any, Any], Any]:
    """A hook that multiplies what a module is given, in its nth call of a run."""
    seen = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) - 1 != call:
            return None
        if args:
            return (args[0] * gates, *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] * gates}

    return hook


def by_hand(model: Any, blocks: list[Any], layers: list[int], masks: Tensor) -> Tensor:
    """Log-probabilities, [batch, mask]: a run of the bare model for each mask."""
    ids, counts = rows()
    found = []
    for mask in masks:
        handles = []
        for row, layer in zip(mask, layers, strict=True):
            block = blocks[layer]
            hook = gating(row.repeat_interleave(block.attn.d_head_v), block.call)
            module = model.get_submodule(block.attn.o)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            log_probs = model(input_ids=ids).logits.float().log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()
        said = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        found.append((said * counts[:, 1:]).sum(-1))
    return torch.stack(found, 1)


def check(bridge: Any, layers: list[int] | None) -> None:
    """Three random masks of these layers."""
    from lensbridge import CHG

    chg = CHG(bridge, layers=layers)
    seed = torch.Generator().manual_seed(1)
    masks = torch.rand(3, *chg.mask_shape, generator=seed)
    model, blocks = bridge.original_model, bridge.architecture.blocks
    ours, theirs = masks.clone().requires_grad_(), masks.clone().requires_grad_()
    with chg.still():
        found = chg.get_logp(ours, *rows())
        wanted = by_hand(model, blocks, chg.layers, theirs)
        assert (found - wanted).abs().max() < NATS
        assert (wanted[:, 0] - wanted[:, 1]).abs().max() > 1e-6  # gates do something
        wanted.sum().backward()
        found.sum().backward()
    gap = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max().clamp(min=1)
    assert gap < NATS


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ABSENT])
def test_gates(tiny: Callable[..., nn.Module], name: str) -> None:
    """Gates in all layers, and in the last that has heads; where layers differ, in each by itself."""
    from lensbridge import CHG, InputError, TransformerBridge

    bridge = TransformerBridge(tiny(name, "causal"))
    if name in UNEQUAL:
        with pytest.raises(InputError, match="do not have equally many gates"):
            CHG(bridge)
        for layer in range(len(bridge.architecture.blocks)):
            check(bridge, [layer])
    else:
        check(bridge, None)
        check(bridge, CHG(bridge).layers[-1:])


@pytest.mark.parametrize("name", ABSENT)
def test_no_heads(tiny: Callable[..., nn.Module], name: str) -> None:
    """Refused by name, and why."""
    from lensbridge import CHG, AbsentPointError, TransformerBridge

    with pytest.raises(AbsentPointError, match=ABSENT[name]):
        CHG(TransformerBridge(tiny(name, "causal")))
