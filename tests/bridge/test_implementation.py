"""Closed attention kernels: switched for the runs that look inside, and only for those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import TransformerBridge

CLOSED = "lensbridge_test_closed"


@pytest.fixture
def closed(tiny: Any) -> tuple[nn.Module, list[int]]:
    """A model that runs a kernel nobody can look into, and a list that grows with each of its calls."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    calls: list[int] = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register(CLOSED, kernel)
    AttentionMaskInterface.register(CLOSED, sdpa_mask)
    model = tiny("llama")
    model.config._attn_implementation = CLOSED
    return model, calls


def test_looking_inside_switches_for_the_run(
    closed: tuple[nn.Module, list[int]], tiny: Any, ids: Tensor
) -> None:
    """Patterns come from sdpa, equal to those of a model that always runs it; afterwards all is as before."""
    model, calls = closed
    bridge = TransformerBridge(model)
    calls.clear()
    logits, cache = bridge.run_with_cache(ids, names_filter="**.hook_pattern")
    assert calls == []
    assert model.config._attn_implementation == CLOSED
    _, expected = TransformerBridge(tiny("llama")).run_with_cache(
        ids, names_filter="**.hook_pattern"
    )
    assert all(torch.equal(cache[name], expected[name]) for name in expected)
    assert torch.allclose(logits, model(ids).logits, atol=1e-5)


def test_other_runs_keep_the_kernel(closed: tuple[nn.Module, list[int]], ids: Tensor) -> None:
    """Caching outside attention leaves the kernel, and the logits their bits."""
    model, calls = closed
    bridge = TransformerBridge(model)
    expected = model(ids).logits
    calls.clear()
    logits, _ = bridge.run_with_cache(ids, names_filter="blocks.*.hook_out")
    assert len(calls) == 2
    assert torch.equal(logits, expected)


def test_the_kernel_returns_after_an_error(
    closed: tuple[nn.Module, list[int]], ids: Tensor
) -> None:
    """A hook that fails inside attention leaves the configuration as it was."""
    model, _ = closed
    bridge = TransformerBridge(model)

    def burst(x: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", burst)])
    assert model.config._attn_implementation == CLOSED
