"""The site ``logits``: a layer's output through the model's own end, computed by hand on the bare model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.methods import LensAPI


def _plain(norm: str, head: str = "lm_head") -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.get_submodule(head)(m.get_submodule(norm)(x))


def _gemma2(m: Any, x: Tensor) -> Tensor:
    cap = m.config.final_logit_softcapping
    return cap * torch.tanh(m.lm_head(m.model.norm(x)) / cap)


def _bert(m: Any, x: Tensor) -> Tensor:
    head = m.cls.predictions
    dense = torch.nn.functional.gelu(x @ head.transform.dense.weight.T + head.transform.dense.bias)
    return head.transform.LayerNorm(dense) @ head.decoder.weight.T + head.bias


ENDS: dict[tuple[str, str], tuple[dict[str, Any], str, Callable[[Any, Tensor], Tensor]]] = {
    # (model, kind) -> (changes to its config, its layers, its end)
    ("llama", "causal"): ({}, "model.layers.{i}", _plain("model.norm")),
    ("gpt2", "causal"): ({}, "transformer.h.{i}", _plain("transformer.ln_f")),
    ("gpt_neox", "causal"): ({}, "gpt_neox.layers.{i}", _plain("gpt_neox.final_layer_norm")),
    ("olmo2", "causal"): ({}, "model.layers.{i}", _plain("model.norm")),
    ("gemma2", "causal"): ({"final_logit_softcapping": 2.0}, "model.layers.{i}", _gemma2),
    ("granite", "causal"): (
        {"logits_scaling": 4.0},
        "model.layers.{i}",
        lambda m, x: m.lm_head(m.model.norm(x)) / 4.0,
    ),
    ("cohere", "causal"): (
        {"logit_scale": 0.25},
        "model.layers.{i}",
        lambda m, x: m.lm_head(m.model.norm(x)) * 0.25,
    ),
    ("mamba", "causal"): ({}, "backbone.layers.{i}", _plain("backbone.norm_f")),
    ("bert", "masked"): ({}, "bert.encoder.layer.{i}", _bert),
    ("t5", "seq2seq"): (
        {},
        "decoder.block.{i}",
        lambda m, x: m.lm_head(m.decoder.final_layer_norm(x) * 64**-0.5),
    ),
    ("bart", "seq2seq"): (
        {},
        "model.decoder.layers.{i}",
        lambda m, x: m.lm_head(x) + m.final_logits_bias,
    ),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("which", ENDS, ids=lambda which: which[0])
def test_the_models_own_end(
    tiny: Callable[..., Any], which: tuple[str, str], places: Any, plain: Any, ids: Tensor
) -> None:
    """A layer's logits are norm, head, scale and cap of its output; the last layer's are the model's own."""
    changes, layers, end = ENDS[which]
    model = tiny(*which, **changes)
    if "final_logits_bias" in dict(model.named_buffers()):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(5))
    given = places.keywords(which[1], ids)
    trace = LensAPI(model).trace(**given, sites="logits")
    seen = plain.read(model, given, *(layers.format(i=i) for i in (0, 1)))
    by_hand = [end(model, found[0]) for found in seen.values()]
    for i in (0, 1):
        torch.testing.assert_close(trace.get("logits", i), by_hand[i])
    assert torch.equal(trace.get("logits", -1), trace.final_logits)
    torch.testing.assert_close(trace.final_logits, model(**given).logits)
    assert not torch.allclose(by_hand[0], by_hand[1], atol=0.01)


def test_the_cap_matters(tiny: Callable[..., Any], ids: Tensor) -> None:
    """Without the soft cap Gemma 2's logits would be others: no layer's goes beyond it."""
    model = tiny("gemma2", final_logit_softcapping=0.5)
    trace = LensAPI(model).trace(input_ids=ids)
    for i in (0, 1):
        uncapped = model.lm_head(model.model.norm(trace.get("block_output", i)))
        assert uncapped.abs().max() > 0.5
        assert trace.get("logits", i).abs().max() <= 0.5


@pytest.mark.parametrize(
    "name", ["qwen3", "phi3", "mixtral", "opt", "falcon", "gemma3_text", "bloom"]
)
def test_the_last_layers_logits(lens_of: Callable[..., LensAPI], name: str, ids: Tensor) -> None:
    """In any architecture the last layer's logits are those the bare model gives."""
    trace = lens_of(name).trace(input_ids=ids)
    torch.testing.assert_close(trace.get("logits", -1), lens_of(name).model(ids).logits)
    assert not torch.allclose(trace.get("logits", 0), trace.get("logits", 1), atol=0.01)


def test_only_the_layers_asked_for(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """layers= counts for logits too, and block outputs need not be asked for."""
    trace = lens_of("llama").trace(input_ids=ids, sites="logits", layers=[-1])
    assert {site: list(held) for site, held in trace.activations.items()} == {"logits": [1]}


def test_a_decoders_logits_do_not_need_text(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """A decoder whose input is encoder outputs and embeddings is read off as one given ids."""
    t5 = lens_of("t5", "seq2seq")
    expected = t5.trace(input_ids=ids, decoder_input_ids=ids[:, :4])
    found = t5.trace(
        encoder_outputs=t5.model.encoder(ids),
        decoder_inputs_embeds=t5.model.shared(ids[:, :4]),
    )
    for layer in (0, 1):
        torch.testing.assert_close(found.get("logits", layer), expected.get("logits", layer))
