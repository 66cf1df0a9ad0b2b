"""QK, OV and composition scores are those of the matrices multiplied out, and no such matrix is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lensbridge import AbsentPointError, FactoredMatrix, InputError

FAMILIES = ("gpt2", "llama", "gpt_neox", "phi3")


def matrices(bridge: Any, layer: int) -> tuple[Tensor, Tensor]:
    """QK and OV of a layer, multiplied out head by head: [head, d_model, d_model]."""
    attn = bridge.blocks[layer].attn
    share = len(attn.W_Q) // len(attn.W_K)
    qk = [attn.W_Q[h] @ attn.W_K[h // share].T for h in range(len(attn.W_Q))]
    ov = [attn.W_V[h // share] @ attn.W_O[h] for h in range(len(attn.W_O))]
    return torch.stack(qk), torch.stack(ov)


@pytest.fixture(params=FAMILIES)
def deep(request: pytest.FixtureRequest, fresh: Callable[..., Any]) -> Any:
    """Three layers of a family."""
    return fresh(request.param, num_hidden_layers=3)


@torch.no_grad()
def test_circuits(deep: Any) -> None:
    assert deep.QK.shape == deep.OV.shape == (3, 4, 64, 64)
    for layer in range(3):
        qk, ov = matrices(deep, layer)
        for head in range(4):
            assert torch.allclose(deep.QK[layer, head].AB, qk[head], rtol=1e-5, atol=1e-5)
            assert torch.allclose(deep.OV[layer, head].AB, ov[head], rtol=1e-5, atol=1e-5)
        own = deep.blocks[layer].attn
        assert isinstance(own.QK, FactoredMatrix)
        assert torch.allclose(own.QK.AB, qk, rtol=1e-5, atol=1e-5)
        assert torch.allclose(own.OV.AB, ov, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_scores(deep: Any, mode: str) -> None:
    """As Elhage et al. define them, with every matrix in full."""
    scores = deep.all_composition_scores(mode)
    assert scores.shape == (3, 4, 3, 4)
    every = [matrices(deep, layer) for layer in range(3)]
    for l1 in range(3):
        for l2 in range(3):
            qk, ov = every[l2]
            for h1 in range(4):
                for h2 in range(4):
                    into = {"Q": qk[h2], "K": qk[h2].T, "V": ov[h2]}[mode]
                    wrote = every[l1][1][h1]
                    full = (wrote @ into).norm() / (wrote.norm() * into.norm())
                    wanted = full if l1 < l2 else torch.tensor(0.0)
                    assert torch.allclose(scores[l1, h1, l2, h2], wanted, rtol=1e-4, atol=1e-6)


def test_a_head_that_writes_nothing_composes_with_nothing(fresh: Callable[..., Any]) -> None:
    bridge = fresh("gpt2")
    with torch.no_grad():
        bridge.blocks[0].attn.W_O[1] = 0
    scores = bridge.all_composition_scores("V")
    assert (scores[0, 1] == 0).all()
    assert (scores[0, 0, 1] > 0).all()


class Largest(TorchDispatchMode):
    """The last two sizes of every tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.made.add(tuple(tensor.shape[-2:]))
        return out


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_no_square_of_the_stream_is_made(fresh: Callable[..., Any], mode: str) -> None:
    """Where the heads together are narrower than the stream, nothing else is as large."""
    bridge = fresh("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    assert bridge.QK.shape[-2:] == (64, 64)
    with Largest() as largest:
        bridge.all_composition_scores(mode)
    assert largest.made
    assert (64, 64) not in largest.made


def test_labels(wrapped: Callable[[str], Any]) -> None:
    labels = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    assert wrapped("gpt2").all_head_labels == labels
    assert wrapped("gpt2").attn_head_labels == labels
    assert wrapped("gpt2").composition_layer_indices() == [0, 1]


def test_hybrids(wrapped: Callable[[str], Any]) -> None:
    """Layers without attention: the indices come with the matrices."""
    bridge = wrapped("jamba")
    kinds = bridge.layer_types()
    layers = [index for index, kind in enumerate(kinds) if kind.startswith("attn")]
    assert 0 < len(layers) < len(kinds)
    for get in (bridge.QK_for_attn_layers, bridge.OV_for_attn_layers):
        found, made = get()
        assert found == layers
        assert made.shape[0] == len(layers)
    assert bridge.composition_layer_indices() == layers
    assert bridge.all_composition_scores("Q").shape[0] == len(layers)
    heads = bridge.cfg.n_heads
    assert len(bridge.all_head_labels) == len(kinds) * heads
    assert bridge.attn_head_labels == [f"L{i}H{h}" for i in layers for h in range(heads)]
    with pytest.raises(AbsentPointError, match=r"layers \[.*QK_for_attn_layers\(\)"):
        bridge.QK  # noqa: B018
    with pytest.raises(AbsentPointError, match=r"OV_for_attn_layers\(\)"):
        bridge.OV  # noqa: B018


def test_refusals(wrapped: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match='"Q", "K" or "V", got \'O\''):
        wrapped("gpt2").all_composition_scores("O")
    latent = wrapped("deepseek_v3")
    for call in (
        lambda: latent.QK,
        lambda: latent.OV,
        latent.QK_for_attn_layers,
        lambda: latent.all_composition_scores("V"),
    ):
        with pytest.raises(
            AbsentPointError, match=r"no layer of this model has attn.(QK|OV): .*_proj"
        ):
            call()
    with pytest.raises(AbsentPointError, match="this layer is mixer"):
        wrapped("mamba").all_composition_scores("Q")
