"""Singular vectors against matrices multiplied out by hand from the bare model's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.hooks import AbsentPointError, InputError, LayerRangeError
from lensbridge.methods.svd import svd_of

CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def _gpt2(model: Any, layer: int, head: int) -> dict[str, Tensor]:
    attn = model.transformer.h[layer].attn
    q, k, v = attn.c_attn.weight.detach().unflatten(1, (3, 4, -1)).unbind(1)
    o = attn.c_proj.weight.detach().unflatten(0, (4, -1))
    return {"QK": q[:, head] @ k[:, head].T, "OV": v[:, head] @ o[head]}


def _llama(model: Any, layer: int, head: int) -> dict[str, Tensor]:
    attn, n = model.model.layers[layer].self_attn, model.config.num_attention_heads
    group = head // (n // model.config.num_key_value_heads)

    def of(module: Any, index: int) -> Tensor:
        width = model.config.hidden_size // n
        return module.weight.detach()[index * width : (index + 1) * width].T

    q, k, v = of(attn.q_proj, head), of(attn.k_proj, group), of(attn.v_proj, group)
    width = model.config.hidden_size // n
    o = attn.o_proj.weight.detach()[:, head * width : (head + 1) * width].T
    return {"QK": q @ k.T, "OV": v @ o}


@pytest.mark.parametrize("matrix", ["OV", "QK"])
@pytest.mark.parametrize(("name", "by_hand"), [("gpt2", _gpt2), ("llama", _llama)])
def test_circuits_by_hand(lens_of: Any, name: str, by_hand: Any, matrix: str) -> None:
    """Values, vectors and their sum, of grouped heads too."""
    lens = lens_of(name)
    for layer, head in ((0, 0), (1, 3)):
        expected = by_hand(lens.model, layer, head)[matrix]
        found = svd_of(lens.bridge, matrix, layer, head)
        d_head = lens.bridge.cfg.d_head
        assert found.S.shape == (d_head,)
        torch.testing.assert_close(found.S, torch.linalg.svdvals(expected)[:d_head], **CLOSE)
        made = (found.left * found.S[:, None]).T @ found.right
        torch.testing.assert_close(made, expected, **CLOSE)
        for vectors in (found.left, found.right):
            torch.testing.assert_close(vectors @ vectors.T, torch.eye(d_head), **CLOSE)
        assert found.name == f"blocks.{layer}.attn.{matrix}[{head}]"
        assert (found.left.gather(1, found.left.abs().argmax(1, keepdim=True)) > 0).all()


def test_mlps_by_hand(lens_of: Any) -> None:
    """What an MLP reads and writes; gates; experts one by one."""
    gpt2, llama, mixtral = (lens_of(x) for x in ("gpt2", "llama", "mixtral"))
    with torch.no_grad():
        weights = {
            ("w_in", gpt2, None): gpt2.model.transformer.h[1].mlp.c_fc.weight,
            ("w_out", gpt2, None): gpt2.model.transformer.h[1].mlp.c_proj.weight,
            ("w_gate", llama, None): llama.model.model.layers[1].mlp.gate_proj.weight.T,
            ("w_out", mixtral, 2): mixtral.bridge.weight("blocks.1.mlp.W_out")[2],
        }
        for (matrix, lens, expert), expected in weights.items():
            found = svd_of(lens.bridge, matrix, -1, expert=expert)
            made = (found.left * found.S[:, None]).T @ found.right
            torch.testing.assert_close(made, expected, **CLOSE)
    with pytest.raises(
        InputError, match=r"w_out is one of each expert: say which, expert= 0 to \d"
    ):
        svd_of(mixtral.bridge, "w_out", 1)


def test_tokens_by_hand(lens_of: Any) -> None:
    """Read directions as embeddings, written ones as logits, unless asked otherwise; both ends of each."""
    lens = lens_of("llama")
    embedding = lens.model.model.embed_tokens.weight.detach()
    head = lens.model.lm_head.weight.detach()
    found = svd_of(lens.bridge, "OV", 1, 2)
    torch.testing.assert_close(found.scores("left"), (found.left[:10] @ embedding.T))
    torch.testing.assert_close(found.scores(n_vectors=3), (found.right[:3] @ head.T))
    torch.testing.assert_close(found.scores(through="W_E"), (found.right[:10] @ embedding.T))
    along, against = found.top_tokens(k=3, n_vectors=2)[1]
    order = (found.right[1] @ head.T).argsort(descending=True).tolist()
    told = lens.bridge.to_single_str_token
    assert along == [told(i) for i in order[:3]]
    assert against == [told(i) for i in order[::-1][:3]]
    looked_for = svd_of(lens.bridge, "QK", 1, 2)
    torch.testing.assert_close(looked_for.scores(), looked_for.right[:10] @ embedding.T)
    with pytest.raises(InputError, match=r"W_in are over neurons, .* ask for side='left'"):
        svd_of(lens.bridge, "w_in", 0).scores()
    for wrong in ({"side": "top"}, {"through": "W_Q"}):
        with pytest.raises(InputError, match="got '"):
            found.scores(**wrong)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (("VO", 0), InputError, "matrix is one of OV, QK, w_in, w_gate, w_out, got 'VO'"),
        (("OV", 0), InputError, "OV is one of each head: say which, head= 0 to 3"),
        (("OV", 0, 4), InputError, "head 4: there are 4, from 0"),
        (("w_in", 0, 1), InputError, "leave head out"),
        (("w_out", 5), LayerRangeError, "layer 5"),
        (("w_gate", 0), AbsentPointError, "W_gate"),
    ],
)
def test_refusals(lens_of: Any, given: Any, kind: Any, message: str) -> None:
    """What was given and what there is."""
    with pytest.raises(kind, match=message):
        svd_of(lens_of("gpt2").bridge, *given)
    with pytest.raises(InputError, match="leave expert out"):
        svd_of(lens_of("gpt2").bridge, "w_in", 0, expert=1)
