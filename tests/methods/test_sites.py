"""Sites are the values that plain PyTorch hooks find on the bare model, by every name they have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import AbsentPointError, InputError, LayerRangeError, UnknownPointError
from lensbridge.methods import LensAPI
from lensbridge.methods.sites import SITES

MODELS = [
    ("llama", "causal"),
    ("gpt2", "causal"),
    ("bert", "masked"),
    ("olmo2", "causal"),
    ("gemma2", "causal"),
    ("gpt_neox", "causal"),
    ("t5", "seq2seq"),
]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS, ids=lambda model: model[0])
def which(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Each kind of residual stream in turn."""
    return request.param


@pytest.fixture
def lens(
    which: tuple[str, str], lens_of: Callable[..., LensAPI], left_alone: Any
) -> Iterator[LensAPI]:
    with left_alone(lens_of(*which)) as lens:
        yield lens


def test_sites_are_what_plain_hooks_read(
    lens: LensAPI, which: tuple[str, str], places: Any, plain: Any, ids: Tensor
) -> None:
    """Every site a model has, in every layer, is bit for bit what a PyTorch hook on the module reads."""
    sites, given = places.PLACES[which], places.keywords(which[1], ids)
    trace = lens.trace(**given, sites=list(sites))
    by_hand = {
        (site, layer): place.format(i=layer)
        for site, place in sites.items()
        for layer in places.layers_of(place)
    }
    seen = plain.read(lens.model, given, *by_hand.values())
    assert len(by_hand) >= 14
    for (site, layer), place in by_hand.items():
        assert torch.equal(trace.get(site, layer), seen[place][0]), (site, layer)
    assert torch.equal(trace.final_logits, lens.model(**given).logits)


def test_what_is_added_adds_up(
    lens: LensAPI, which: tuple[str, str], places: Any, ids: Tensor
) -> None:
    """Attention and MLP outputs are what the stream gains between the sites around them."""
    name, kind = which
    trace = lens.trace(**places.keywords(kind, ids), sites=list(places.PLACES[which]))
    for i in (0, 1):
        at = lambda site, i=i: trace.get(site, i)  # noqa: E731
        if name == "bert":
            layer = lens.model.bert.encoder.layer[i]
            middle = at("block_input") + at("attn_output")
            torch.testing.assert_close(at("post_attn_residual"), middle)
            normed = layer.attention.output.LayerNorm(middle)
            out = layer.output.LayerNorm(normed + at("mlp_output"))
        elif name == "t5":
            cross = lens.trace(**places.keywords(kind, ids), sites="cross_attn.hook_out").get(
                "cross_attn.hook_out", i
            )
            out = at("post_attn_residual") + cross + at("mlp_output")
        else:
            out = at("block_input") + at("attn_output") + at("mlp_output")
        torch.testing.assert_close(at("block_output"), out)


@pytest.mark.parametrize(
    "name", ["qwen3", "mixtral", "phi3", "phi", "gemma3_text", "gpt_bigcode", "falcon", "opt"]
)
def test_adapters_are_not_needed(lens_of: Callable[..., LensAPI], name: str, ids: Tensor) -> None:
    """Architectures that inteprelens refuses or breaks on are traced, and their branches add up."""
    lens = lens_of(name)
    trace = lens.trace(
        input_ids=ids,
        sites=["block_input", "attn_output", "mlp_output", "block_output", "attn_o_proj_pre"],
    )
    hidden = lens.model(ids, output_hidden_states=True).hidden_states
    for i in (0, 1):
        assert torch.equal(trace.get("block_input", i), hidden[i])
        added = trace.get("attn_output", i) + trace.get("mlp_output", i)
        torch.testing.assert_close(trace.get("block_output", i), hidden[i] + added)
        assert trace.get("attn_o_proj_pre", i).shape[:2] == (2, 9)


def test_no_stream_between_parallel_branches(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """Where attention and MLP run side by side post_attn_residual is refused by name, with the reason."""
    with pytest.raises(
        AbsentPointError, match=r"'post_attn_residual'.*hook_resid_mid.*attention and MLP"
    ):
        lens_of("gpt_neox").trace(input_ids=ids, sites="post_attn_residual")


def test_no_final_norm_in_bert(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """A site that a model lacks is refused with the reason; by default it is left out."""
    bert = lens_of("bert", "masked")
    with pytest.raises(AbsentPointError, match="no norm reads the last layer's output"):
        bert.trace(input_ids=ids, sites="final_norm")
    assert bert.trace(input_ids=ids).available_sites == ["block_output", "logits"]


def test_the_encoder_of_two_stacks(
    lens_of: Callable[..., LensAPI], plain: Any, ids: Tensor
) -> None:
    """Points of the other stack are sites by their full names."""
    t5 = lens_of("t5", "seq2seq")
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    by_hand = {
        "encoder_blocks.1.hook_out": "encoder.block.1",
        "encoder_blocks.0.attn.o.hook_out": "encoder.block.0.layer.0.SelfAttention.o",
        "encoder_ln_final.hook_out": "encoder.final_layer_norm",
        "decoder_blocks.1.cross_attn.o.hook_out": "decoder.block.1.layer.1.EncDecAttention.o",
    }
    trace = t5.trace(**given, sites=list(by_hand))
    seen = plain.read(t5.model, given, *by_hand.values())
    for name, place in by_hand.items():
        assert torch.equal(trace.get(name), seen[place][0]), name


def test_heads_side_by_side(llama: LensAPI, ids: Tensor) -> None:
    """attn_o_proj_pre is flat, as the projection reads it; the hook point has the heads apart."""
    trace = llama.trace(input_ids=ids, sites=["attn_o_proj_pre", "z"])
    assert trace.get("attn_o_proj_pre", 0).shape == (2, 9, 64)
    assert torch.equal(trace.get("z", 0).flatten(-2), trace.get("attn_o_proj_pre", 0))


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attn.hook_pattern", "pattern"])
def test_pattern_by_part_and_by_short_form(llama: LensAPI, ids: Tensor, name: str) -> None:
    """A part of a point's name and TransformerLens' short form mean that point in each layer."""
    llama.model.set_attn_implementation("eager")
    try:
        attentions = llama.model(ids, output_attentions=True).attentions
    finally:
        llama.model.set_attn_implementation("sdpa")
    trace = llama.trace(input_ids=ids, sites=name)
    for i in (0, 1):
        torch.testing.assert_close(trace.get(name, i), attentions[i])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.0.hook_out", None),
        ("blocks.0.hook_resid_post", None),
        ("hook_out", 0),
        ("hook_resid_post", 0),
        ("resid_post", 0),
        ("raw:model.layers.0", None),
    ],
)
def test_every_name_of_a_place(llama: LensAPI, ids: Tensor, name: str, layer: int | None) -> None:
    """Canonical names, aliases, parts, short forms and module paths all lead to the same value."""
    hidden = llama.model(ids, output_hidden_states=True).hidden_states
    trace = llama.trace(input_ids=ids, sites=name)
    assert torch.equal(trace.get(name, layer), hidden[1])
    assert list(trace.activations) == [name]


def test_every_point_is_a_site(llama: LensAPI, ids: Tensor) -> None:
    """Every canonical name, and every alias, reads what run_with_cache reads."""
    registry = llama.bridge.registry
    names = [*registry, *registry.aliases]
    trace = llama.trace(input_ids=ids, sites=names)
    _, cache = llama.bridge.run_with_cache(ids, names_filter=list(registry))
    assert len(names) > 80
    for name in names:
        assert torch.equal(trace.get(name), cache[name]), name


def test_short_forms_of_two_stacks(
    lens_of: Callable[..., LensAPI], plain: Any, ids: Tensor
) -> None:
    """In a model with two stacks a part of a name means the decoder's layers."""
    t5, given = lens_of("t5", "seq2seq"), {"input_ids": ids, "decoder_input_ids": ids}
    trace = t5.trace(**given, sites=["cross_attn.o.hook_out", "resid_post"])
    seen = plain.read(
        t5.model, given, "decoder.block.1.layer.1.EncDecAttention.o", "decoder.block.1"
    )
    for name, found in zip(("cross_attn.o.hook_out", "resid_post"), seen.values(), strict=True):
        assert torch.equal(trace.get(name, 1), found[0])


def test_the_list_of_sites() -> None:
    """The nine places of inteprelens that a point stands for; logits is the tenth."""
    assert set(SITES) == {
        *("block_input", "attn_o_proj_pre", "attn_output", "post_attn_residual", "mlp_input"),
        *("mlp_output", "block_output", "final_norm", "lm_head_input"),
    }


# --- layers -------------------------------------------------------------------------------------------------


def test_layers_that_are_asked_for(llama: LensAPI, ids: Tensor) -> None:
    """Layers are a number or several, negative ones from the end; only those are kept."""
    hidden = llama.model(ids, output_hidden_states=True).hidden_states
    for layers in (-1, 1, [1], [-1], (1,), range(1, 2)):
        trace = llama.trace(input_ids=ids, layers=layers, sites="block_input")
        assert list(trace.activations["block_input"]) == [1]
        assert torch.equal(trace.get("block_input", 1), hidden[1])
        assert trace.metadata["requested_layers"] == [1]


@pytest.mark.parametrize("layers", [2, -3, [0, 2]])
def test_layers_that_are_not_there(llama: LensAPI, ids: Tensor, layers: Any) -> None:
    """A layer beyond the model is refused and the message says which there are."""
    with pytest.raises(LayerRangeError, match=r"is not one of this model's 2 \(0 to 1\)"):
        llama.trace(input_ids=ids, layers=layers)


@pytest.mark.parametrize("layers", [True, ["0"], [1.0]])
def test_layers_that_are_no_numbers(
    llama: LensAPI, ids: Tensor, layers: Any, unchecked: None
) -> None:
    """True is no layer, and neither is text."""
    with pytest.raises(InputError, match="a layer is an int"):
        llama.trace(input_ids=ids, layers=layers)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blok_output", "block_output"),
        ("mlp_outputs", "mlp_output"),
        ("logit", "logits"),
        ("blocks.0.attn.hook_patern", "blocks.0.attn.hook_pattern"),
        ("blocks.0.hook_outt", "blocks.0.hook_out"),
        ("", "block_output"),
    ],
)
def test_unknown_sites(
    llama: LensAPI, ids: Tensor, name: str, near: str, is_silent: Callable[..., bool]
) -> None:
    """A name that leads nowhere is an error that lists the nearest, and nothing is left set."""
    with pytest.raises(UnknownPointError, match=rf"nearest: (.*, )?{re.escape(near)}(,|$)"):
        llama.trace(input_ids=ids, sites=name)
    assert is_silent(llama.bridge)


def test_a_site_is_a_name(llama: LensAPI, ids: Tensor, unchecked: None) -> None:
    """Something that is no text is refused and shown."""
    with pytest.raises(InputError, match=r"a site is a name, got int: 3"):
        llama.trace(input_ids=ids, sites=[3])  # type: ignore[list-item]
