"""A trace: what it holds, what it is called with, and that the run it looks at is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import AbsentPointError, InputError, UnknownPointError
from lensbridge.methods import InterventionSpec, LensAPI, TraceResult, TransformerTracer


@pytest.fixture
def trace(llama: LensAPI, ids: Tensor) -> TraceResult:
    """A trace with its defaults."""
    return llama.trace(input_ids=ids)


# --- the result ---------------------------------------------------------------------------------------------


def test_defaults(trace: TraceResult, llama: LensAPI, ids: Tensor) -> None:
    """Unasked, a trace holds every block's output, the final norm and every layer's logits, and says so."""
    assert trace.available_sites == ["block_output", "final_norm", "logits"]
    assert {site: list(held) for site, held in trace.activations.items()} == {
        "block_output": [0, 1],
        "final_norm": [None],
        "logits": [0, 1],
    }
    assert trace.metadata["requested_layers"] == [0, 1]
    assert trace.metadata["requested_sites"] == ["block_output", "final_norm", "logits"]
    assert torch.equal(trace.input_ids, ids)
    assert trace.attention_mask is None
    with torch.no_grad():
        assert torch.equal(trace.final_logits, llama.model(ids).logits)


def test_get_and_has(trace: TraceResult) -> None:
    """get gives the tensor itself, layers from the end too; has says whether it would."""
    held = trace.activations
    assert trace.get("block_output", 1) is held["block_output"][1]
    assert trace.get("block_output", -1) is held["block_output"][1]
    assert trace.get("logits", -2) is held["logits"][0]
    assert trace.get("final_norm") is held["final_norm"][None]
    assert trace.has("block_output", 0)
    assert trace.has("final_norm")
    for site, layer in (("block_output", None), ("final_norm", 0), ("pattern", 0), ("logits", 2)):
        assert not trace.has(site, layer)


def test_has_agrees_with_get(trace: TraceResult) -> None:
    """What get gives, has has."""
    assert trace.get("block_output", -1) is not None
    assert trace.has("block_output", -1)


@pytest.mark.parametrize(
    ("site", "layer", "message"),
    [
        ("pattern", 0, "no site 'pattern'; it has block_output, final_norm, logits"),
        ("block_output", 2, r"not traced at layer 2; it has layers \[0, 1\]"),
        ("block_output", -3, r"it has layers \[0, 1\]"),
        ("block_output", None, r"layer None; it has layers \[0, 1\]"),
        ("final_norm", 0, "leave the layer out"),
    ],
)
def test_what_was_not_traced(
    trace: TraceResult, site: str, layer: int | None, message: str
) -> None:
    """Asking for what a trace does not hold says what it holds."""
    with pytest.raises(UnknownPointError, match=message):
        trace.get(site, layer)


def test_probabilities(trace: TraceResult, llama: LensAPI, ids: Tensor) -> None:
    """Final and per-layer probabilities are the softmax of the logits, in nats, over the vocabulary."""
    with torch.no_grad():
        logits = llama.model(ids).logits
        early = llama.model.lm_head(llama.model.model.norm(trace.get("block_output", 0)))
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(trace.final_log_probs(), log_probs)
    torch.testing.assert_close(trace.final_probs(), log_probs.exp())
    torch.testing.assert_close(trace.layer_probs(-1), log_probs.exp())
    torch.testing.assert_close(trace.layer_log_probs(-1), log_probs)
    torch.testing.assert_close(
        trace.layer_probs(0), early.exp() / early.exp().sum(-1, keepdim=True)
    )


def test_probabilities_need_the_site(llama: LensAPI, ids: Tensor) -> None:
    """Without per-layer logits their probabilities are refused, and the final ones are there."""
    trace = llama.trace(input_ids=ids, sites="mlp_output")
    with pytest.raises(UnknownPointError, match="no site 'logits'"):
        trace.layer_probs(0)
    assert trace.final_probs().shape == (2, 9, 160)


# --- graphs and copies --------------------------------------------------------------------------------------


def test_detached(trace: TraceResult, llama: LensAPI) -> None:
    """Unless asked for, nothing has a graph though the model can be trained: per-layer logits neither."""
    assert all(p.requires_grad for p in llama.model.parameters())
    assert not trace.final_logits.requires_grad
    for site, held in trace.activations.items():
        assert not any(x.requires_grad for x in held.values()), site


@pytest.mark.parametrize("clone", [True, False])
def test_with_a_graph(llama: LensAPI, ids: Tensor, clone: bool) -> None:
    """detach=False keeps the run's graph: gradients of sites and logits are those of the bare model."""
    trace = llama.trace(
        input_ids=ids, sites=["block_output", "logits", "embed.hook_out"], detach=False, clone=clone
    )
    model, weight = llama.model, llama.model.model.layers[0].mlp.up_proj.weight
    out = model(ids, output_hidden_states=True)
    for found, by_hand in (
        (trace.final_logits, out.logits),
        (trace.get("block_output", 0), out.hidden_states[1]),
        (trace.get("logits", 0), model.lm_head(model.model.norm(out.hidden_states[1]))),
    ):
        (one,) = torch.autograd.grad((found**2).sum(), weight, retain_graph=True)
        (other,) = torch.autograd.grad((by_hand**2).sum(), weight, retain_graph=True)
        torch.testing.assert_close(one, other)
    assert all(p.grad is None for p in model.parameters())


def test_a_layers_logits_differentiate_to_its_output(llama: LensAPI, ids: Tensor) -> None:
    """With a graph and without copies, a layer's logits hang on that trace's own block output."""
    trace = llama.trace(input_ids=ids, detach=False, clone=False)
    stream = trace.get("block_output", 0)
    (found,) = torch.autograd.grad(trace.get("logits", 0)[..., 7].sum(), stream)
    twin = stream.detach().requires_grad_()
    logits = llama.model.lm_head(llama.model.model.norm(twin))
    (by_hand,) = torch.autograd.grad(logits[..., 7].sum(), twin)
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("clone", [True, False])
def test_copies(llama: LensAPI, ids: Tensor, clone: bool) -> None:
    """A copy does not follow what the model does to its tensor later in the run; without it memory is shared."""
    layers = llama.model.model.layers
    seen: list[Tensor] = []
    handles = [
        layers[0].register_forward_hook(lambda module, args, out: seen.append(out)),
        # In place, when the layer before has long been read.
        layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].mul_(3))),
    ]
    try:
        held = llama.trace(input_ids=ids, sites="block_output", clone=clone).get("block_output", 0)
    finally:
        for handle in handles:
            handle.remove()
    assert (held.data_ptr() == seen[0].data_ptr()) is not clone
    assert torch.equal(held, seen[1]) is not clone
    expected = llama.model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(held, expected if clone else 3 * expected)


def test_what_the_model_overwrites_is_copied(
    lens_of: Callable[..., LensAPI], plain: Any, ids: Tensor
) -> None:
    """Falcon adds attention's output into the MLP's, in place; clone=False still gives what the MLP made."""
    falcon = lens_of("falcon")
    seen = plain.read(falcon.model, ids, "transformer.h.0.mlp")["transformer.h.0.mlp"][0]
    trace = falcon.trace(input_ids=ids, sites="mlp_output", clone=False)
    assert torch.equal(trace.get("mlp_output", 0), seen)


# --- inputs -------------------------------------------------------------------------------------------------

TEXTS = ["the lens sees what is there", "short"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", "causal"),
        ("llama", "causal"),
        ("opt", "causal"),
        ("bert", "masked"),
        ("t5", "seq2seq"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(
    lens_of: Callable[..., LensAPI], name: str, kind: str, side: str, tokenizer: Any
) -> None:
    """Padded on either side, texts give at their own tokens what each gives alone, learned positions included."""
    lens = lens_of(name, kind)
    together = lens.trace(texts=TEXTS, padding_side=side)
    alone = [lens.trace(texts=text) for text in TEXTS]
    assert together.attention_mask is not None
    for row, single in enumerate(alone):
        real = together.attention_mask[row].bool()
        assert real.sum() == single.input_ids.shape[1] == 1 + len(TEXTS[row])
        for site in together.available_sites:
            for layer, found in together.activations[site].items():
                torch.testing.assert_close(
                    found[row][real], single.get(site, layer)[0], atol=2e-5, rtol=1e-5
                )
        torch.testing.assert_close(
            together.final_logits[row][real], single.final_logits[0], atol=2e-5, rtol=1e-5
        )


def test_text_is_the_models_own_run(lens_of: Callable[..., LensAPI], tokenizer: Any) -> None:
    """A text alone is traced as the bare model runs on its ids, behind a BOS token."""
    gpt2 = lens_of("gpt2")
    trace = gpt2.trace(texts=TEXTS[0])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXTS[0]).input_ids]])
    assert torch.equal(trace.input_ids, ids)
    with torch.no_grad():
        assert torch.equal(trace.final_logits, gpt2.model(ids).logits)


def test_mask_with_ids(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """A mask given with ids is the run's, and its positions start at the first real token."""
    gpt2 = lens_of("gpt2")
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(12) > 2).long().expand(2, 12)
    trace = gpt2.trace(input_ids=padded, attention_mask=mask)
    assert torch.equal(trace.attention_mask, mask)
    alone = gpt2.trace(input_ids=ids)
    for site in ("block_output", "logits"):
        torch.testing.assert_close(
            trace.get(site, 1)[:, 3:], alone.get(site, 1), atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("keyword", ["input_ids", "inputs_embeds"])
def test_embeddings(llama: LensAPI, ids: Tensor, trace: TraceResult, keyword: str) -> None:
    """Embeddings stand in for ids; a trace of them has no ids and the same values."""
    embeds = llama.model.get_input_embeddings()(ids).detach()
    found = llama.trace(**{keyword: embeds})
    assert found.input_ids is None
    for layer in (0, 1):
        assert torch.equal(found.get("logits", layer), trace.get("logits", layer))
    assert torch.equal(found.final_logits, trace.final_logits)


def test_keywords_reach_the_model(llama: LensAPI, ids: Tensor) -> None:
    """Further keywords are the forward's: shifted positions shift what is traced."""
    positions = torch.arange(9)[None] * 3
    trace = llama.trace(input_ids=ids, sites="block_output", position_ids=positions)
    hidden = llama.model(ids, position_ids=positions, output_hidden_states=True).hidden_states
    torch.testing.assert_close(trace.get("block_output", 0), hidden[1])
    assert not torch.allclose(
        hidden[1], llama.model(ids, output_hidden_states=True).hidden_states[1]
    )


def test_inputs_that_cannot_be_run(llama: LensAPI, ids: Tensor) -> None:
    """Two inputs, none, and unknown keywords are refused; a text by position too."""
    with pytest.raises(InputError, match="not both"):
        llama.trace(texts="x", input_ids=ids)
    with pytest.raises(InputError, match="nothing to run"):
        llama.trace()
    with pytest.raises(InputError, match=r"'attention_maks'.*attention_mask"):
        llama.trace(input_ids=ids, attention_maks=ids)
    with pytest.raises(TypeError, match="positional"):
        llama.trace("x")  # type: ignore[call-arg]


def test_a_tracer_of_a_bare_model(tiny: Callable[..., Any], ids: Tensor) -> None:
    """TransformerTracer takes a model or a bridge, and ids by position."""
    model = tiny("llama")
    tracer = TransformerTracer(model, adapter="ignored")
    found = tracer.trace(ids, sites="block_output")
    again = TransformerTracer(tracer.bridge).trace(ids, sites="block_output")
    hidden = model(ids, output_hidden_states=True).hidden_states
    for trace in (found, again):
        torch.testing.assert_close(trace.get("block_output", 0), hidden[1])


# --- layers of several kinds --------------------------------------------------------------------------------


def test_hybrid(lens_of: Callable[..., LensAPI], plain: Any, ids: Tensor) -> None:
    """Of a hybrid, a site is traced in the layers that have it; a layer asked for by number must."""
    jamba = lens_of("jamba")
    trace = jamba.trace(input_ids=ids, sites=["attn_output", "pattern", "block_output"])
    layers = {site: list(held) for site, held in trace.activations.items()}
    assert layers == {"attn_output": [1], "pattern": [1], "block_output": [0, 1]}
    seen = plain.read(jamba.model, ids, "model.layers.1.self_attn", "model.layers.0")
    torch.testing.assert_close(trace.get("attn_output", 1), seen["model.layers.1.self_attn"][0])
    torch.testing.assert_close(trace.get("block_output", 0), seen["model.layers.0"][0])
    for site in ("attn_output", "pattern"):
        with pytest.raises(AbsentPointError, match="layer is mixer"):
            jamba.trace(input_ids=ids, sites=site, layers=0)
        with pytest.raises(AbsentPointError, match="layer is mixer"):
            jamba.trace(input_ids=ids, sites=site, layers=[0, 1])


def test_a_site_in_no_layer(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """What no layer has is refused although no layer was asked for."""
    with pytest.raises(AbsentPointError, match="attn_output"):
        lens_of("mamba").trace(input_ids=ids, sites="attn_output")


# --- hooks that are set -------------------------------------------------------------------------------------


def test_hooks_that_are_set_edit_once(llama: LensAPI, plain: Any, ids: Tensor) -> None:
    """Hooks around a trace edit the run that is traced, once each; reading logits off layers does not fire them."""
    calls: list[str] = []

    def double(x: Tensor, hook: Any) -> Tensor:
        calls.append(hook.name)
        return 2 * x

    names = ["blocks.0.hook_out", "ln_final.hook_out", "unembed.hook_out"]
    with llama.bridge.hooks(fwd_hooks=[(name, double) for name in names]):
        trace = llama.trace(input_ids=ids)
    assert calls == names
    model = llama.model
    stream = plain.read(model, ids, "model.layers.0")["model.layers.0"][0] * 2
    with torch.no_grad():
        assert torch.equal(trace.get("block_output", 0), stream)
        torch.testing.assert_close(trace.get("logits", 0), model.lm_head(model.model.norm(stream)))
        last = plain.edited(model, ids, "model.layers.0", lambda x: 2 * x)
        torch.testing.assert_close(trace.get("logits", 1), last)
        torch.testing.assert_close(trace.final_logits, 4 * last)


@pytest.fixture
def without_last_mlp(llama: LensAPI, plain: Any, ids: Tensor) -> Tensor:
    """The bare model's logits where the last MLP adds nothing."""
    return plain.edited(llama.model, ids, "model.layers.1.mlp", torch.zeros_like)


def test_interventions_are_traced(llama: LensAPI, ids: Tensor, without_last_mlp: Tensor) -> None:
    """What is traced inside an intervention is the changed run."""
    with llama.intervene(InterventionSpec("mlp_output", torch.zeros_like, 1)):
        trace = llama.trace(input_ids=ids, sites=["mlp_output", "logits"])
    assert torch.equal(trace.final_logits, without_last_mlp)
    torch.testing.assert_close(trace.get("logits", 1), without_last_mlp)
    assert not trace.get("mlp_output", 1).any()


@pytest.mark.parametrize(
    "sites",
    [
        "block_output",
        "logits",
    ],
)
def test_standing_hooks_are_traced(
    tiny: Callable[..., Any], ids: Tensor, without_last_mlp: Tensor, sites: str
) -> None:
    """Hooks set to stay are in every traced run, and outlive it."""
    lens = LensAPI(tiny("llama"))
    lens.bridge.add_hook("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)
    for _ in range(2):
        assert torch.equal(lens.trace(input_ids=ids, sites=sites).final_logits, without_last_mlp)


@pytest.mark.parametrize("sites", [["block_output"], ["logits"]])
def test_a_trace_that_fails_leaves_nothing(
    llama: LensAPI, ids: Tensor, snapshot: Any, is_silent: Any, sites: list[str]
) -> None:
    """An error in the run goes through, and the model and registry are as before."""
    before = snapshot(llama.model)
    llama.trace(input_ids=ids, sites=sites)

    def fail(x: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with (
        llama.bridge.hooks(fwd_hooks=[("blocks.1.hook_in", fail)]),
        pytest.raises(ZeroDivisionError),
    ):
        llama.trace(input_ids=ids, sites=sites)
    assert is_silent(llama.bridge)
    assert snapshot(llama.model) == before


# --- models without a head ----------------------------------------------------------------------------------


def test_a_model_without_its_head(tiny: Callable[..., Any], ids: Tensor) -> None:
    """Unasked, logits are left out; the rest is what the model with its head holds."""
    model = tiny("llama")
    expected = LensAPI(model).trace(input_ids=ids)
    found = LensAPI(model.model).trace(input_ids=ids)
    assert found.available_sites == ["block_output", "final_norm"]
    for layer in range(2):
        assert torch.equal(found.get("block_output", layer), expected.get("block_output", layer))
    assert found.final_logits is None
    with pytest.raises(InputError, match="no logits"):
        found.final_log_probs()


def test_logits_of_a_model_without_its_head(tiny: Callable[..., Any], ids: Tensor) -> None:
    """Asked for, they are refused, and the message says what to leave out."""
    with pytest.raises(InputError, match="leave 'logits' out"):
        LensAPI(tiny("llama").model).trace(input_ids=ids, sites=["block_output", "logits"])
