"""A cache's norms, logits, stacks and files, against the bare model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache as remembered
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    AbsentPointError,
    ActivationCache,
    ArchitectureError,
    InputError,
    LayerRangeError,
    UnknownPointError,
)

OVERRIDES: dict[str, dict[str, Any]] = {
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "minicpm3": {"scale_emb": 12, "scale_depth": 0.7, "dim_model_base": 16},
}


@pytest.fixture(scope="module")
def built(tiny: Callable[..., nn.Module], tokenizer: Any) -> Callable[..., Any]:
    """``built("gpt2")``: a bridge around a tiny model, built once; nothing here leaves a trace on it."""
    from lensbridge import TransformerBridge

    def build(name: str, kind: str = "causal") -> Any:
        return TransformerBridge(tiny(name, kind, **OVERRIDES.get(name, {})), tokenizer)

    return remembered(build)


def cached(bridge: Any, ids: Tensor, **given: Any) -> Any:
    """A run's cache."""
    with torch.no_grad():
        return bridge.run_with_cache(ids, **given)[1]


def close(left: Tensor, right: Tensor, size: float = 1.0) -> bool:
    """Whether two sums are equal up to float32 rounding."""
    assert left.shape == right.shape
    return torch.allclose(left, right, atol=1e-5 * size, rtol=1e-5)


# --- norms ------------------------------------------------------------------------------------------------

NORMS = [
    ("gpt2", "transformer.h.1.ln_1", 1, False),
    ("gpt2", "transformer.h.1.ln_2", 1, True),
    ("gpt2", "transformer.ln_f", None, False),
    ("llama", "model.layers.0.post_attention_layernorm", 0, True),
    ("llama", "model.norm", 2, False),
    ("gemma2", "model.layers.1.input_layernorm", 1, False),
    ("gemma2", "model.layers.1.pre_feedforward_layernorm", 1, True),
    ("gemma2", "model.norm", -1, False),
    ("gpt_neox", "gpt_neox.layers.1.post_attention_layernorm", 1, True),
    ("gptj", "transformer.h.1.ln_1", 1, True),
    ("minimax", "model.layers.1.input_layernorm", 1, False),
    ("mixtral", "model.layers.1.post_attention_layernorm", 1, True),
]


@pytest.mark.parametrize(("name", "path", "layer", "mlp_input"), NORMS)
def test_components_behind_a_norm_sum_to_what_it_made(
    name: str, path: str, layer: int | None, mlp_input: bool, built: Any, plain: Any, ids: Tensor
) -> None:
    """Less its bias; by `apply_ln` and by `apply_ln_to_stack`; each by itself with ``recompute_ln``."""
    bridge = built(name)
    cache, norm = cached(bridge, ids), bridge.original_model.get_submodule(path)
    made = plain.read(bridge.original_model, ids, path)[path][0]
    bias = getattr(norm, "bias", None)
    wanted = made if bias is None else made - bias.detach()
    size = float(wanted.abs().max())
    stack = cache.decompose_resid(layer, mlp_input)
    behind = cache.apply_ln_to_stack(stack, layer, mlp_input)
    assert close(behind.sum(0), wanted, size)
    assert not behind.requires_grad
    assert torch.equal(cache.decompose_resid(layer, mlp_input, apply_ln=True), behind)
    full = cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True)
    assert close(full.sum(0), wanted, size)
    own = cache.apply_ln_to_stack(stack, layer, mlp_input, recompute_ln=True)
    for one, part in zip(own, stack, strict=True):
        assert torch.equal(one, norm(part).detach())
    some = cache.apply_ln_to_stack(stack[:, :, 2:5], layer, mlp_input, pos_slice=(2, 5))
    assert torch.equal(some, behind[:, :, 2:5])
    row = cache.apply_ln_to_stack(stack, layer, mlp_input, batch_slice=[1])
    assert torch.equal(row, behind[:, 1:])
    row = cache.apply_ln_to_stack(stack[:, :, -1], layer, mlp_input, -1, batch_slice=1)
    assert torch.equal(row, behind[:, 1, -1])
    row = cache.apply_ln_to_stack(stack[:, 0], layer, mlp_input, batch_slice=0, has_batch_dim=False)
    assert torch.equal(row, behind[:, 0])


def test_streams_that_are_read_without_a_norm(built: Any, ids: Tensor) -> None:
    """BERT's layers read the stream as it is, OpenAI's head too: components stay as they are."""
    for bridge, layer in ((built("bert", "masked"), 1), (built("openai-gpt"), None)):
        cache = cached(bridge, ids)
        stack = cache.decompose_resid(layer)
        assert cache.apply_ln_to_stack(stack, layer) is stack


def test_stacks_that_do_not_fit(built: Any, ids: Tensor) -> None:
    """Other rows or positions than those of the scale, and norms that cannot be held."""
    cache = cached(built("gpt2"), ids)
    stack = cache.decompose_resid()
    for wrong in (stack[:, :, :4], stack[:, :1], stack[..., :8]):
        with pytest.raises(
            InputError, match="pos_slice and batch_slice that the components are of"
        ):
            cache.apply_ln_to_stack(wrong)
    few = cached(built("gpt2"), ids, names_filter="blocks.0.hook_in")
    with pytest.raises(UnknownPointError, match=r"ln_final.hook_scale$"):
        few.apply_ln_to_stack(stack)
    olmo = cached(built("olmo"), ids)
    stack = olmo.decompose_resid()
    with pytest.raises(ArchitectureError, match=r"ln_final .* no norm of a known form.*recompute"):
        olmo.apply_ln_to_stack(stack)
    assert close(
        olmo.apply_ln_to_stack(stack.sum(0)[None], recompute_ln=True)[0], olmo["ln_final.hook_out"]
    )


# --- logits -----------------------------------------------------------------------------------------------

HEADS = ["gpt2", "llama", "gpt_neox", "gptj", "mixtral", "granite", "bloom", "minimax", "cohere"]
HEADS += ["minicpm3", "openai-gpt", "phi", "opt", "mamba", "jamba"]


@pytest.mark.parametrize("name", HEADS)
def test_attributions_sum_to_logits(name: str, built: Any, ids: Tensor) -> None:
    """Of the bare model: a token's logit everywhere, differences one a row and one a place."""
    bridge = built(name)
    cache = cached(bridge, ids)
    with torch.no_grad():
        logits = bridge.original_model(ids).logits
    stack = cache.decompose_resid()
    rows = torch.arange(2)
    right, wrong = torch.tensor([3, 5]), torch.tensor([9, 8])
    place = torch.randint(0, 160, (2, 9), generator=torch.Generator().manual_seed(4))
    cases = [
        (7, None, logits[..., 7]),
        (7, 9, logits[..., 7] - logits[..., 9]),
        (right, wrong, logits[rows, :, right] - logits[rows, :, wrong]),
        (right, 9, logits[rows, :, right] - logits[..., 9]),
        (place, None, logits.gather(-1, place[..., None])[..., 0]),
        (place[:1], None, logits.gather(-1, place[:1].expand(2, -1)[..., None])[..., 0]),
        (place[0], None, logits.gather(-1, place[:1].expand(2, -1)[..., None])[..., 0]),
        ([3, 5], [9, 8], logits[rows, :, right] - logits[rows, :, wrong]),
    ]
    for tokens, incorrect, wanted in cases:
        attrs = cache.logit_attrs(stack, tokens, incorrect)
        bias = cache.logit_bias(tokens, incorrect)
        bias = bias[:, None] if bias.shape == (2,) else bias
        size = float(attrs.abs().sum(0).max()) + float(bias.abs().max())
        assert attrs.shape == (len(stack), 2, 9)
        assert close(attrs.sum(0) + bias, wanted, size)
        assert size < 300 * float(wanted.abs().max())
    full = cache.get_full_resid_decomposition(pos_slice=-1)
    attrs = cache.logit_attrs(full, right, wrong, pos_slice=-1)
    assert attrs.shape == (len(full), 2)
    wanted = logits[rows, -1, right] - logits[rows, -1, wrong]
    size = float(attrs.abs().sum(0).max())
    assert close(attrs.sum(0) + cache.logit_bias(right, wrong), wanted, size)
    attrs = cache.logit_attrs(full, 5, pos_slice=-1, batch_slice=1)
    assert close(attrs.sum(0) + cache.logit_bias(5), logits[1, -1, 5], size)
    biased = {"gpt2", "gpt_neox", "gptj", "bloom", "phi", "opt"}
    assert bool(cache.logit_bias(5, 3)) == (name in biased)


def test_attributions_without_a_batch_dimension(built: Any, ids: Tensor) -> None:
    """A row of a cache, and a run of one row."""
    bridge = built("llama")
    with torch.no_grad():
        logits = bridge.original_model(ids).logits
    for cache in (
        cached(bridge, ids).apply_slice_to_batch_dim(1),
        cached(bridge, ids[1:], remove_batch_dim=True),
    ):
        stack = cache.decompose_resid()
        attrs = cache.logit_attrs(stack, 7, 9, has_batch_dim=False)
        assert close(attrs.sum(0), logits[1, :, 7] - logits[1, :, 9])
        places = torch.arange(9)
        attrs = cache.logit_attrs(stack, places)
        assert close(attrs.sum(0), logits[1].gather(-1, places[:, None])[:, 0])
        last = cache.decompose_resid(pos_slice=-1)
        attrs = cache.logit_attrs(last, "a", "b", pos_slice=-1)
        a, b = (bridge.to_single_token(x) for x in "ab")
        assert close(attrs.sum(0), logits[1, -1, a] - logits[1, -1, b])


def test_attributions_are_those_of_the_method(built: Any, ids: Tensor) -> None:
    """`direct_logit_attribution` is the same sum."""
    from lensbridge import direct_logit_attribution

    bridge = built("gpt2")
    found = direct_logit_attribution(bridge, ids, [3, 5], per_head=True)
    cache = cached(bridge, ids)
    heads = cache.stack_head_results(pos_slice=-1)
    attrs = cache.logit_attrs(heads, [3, 5], pos_slice=-1)
    own = [i for i, label in enumerate(found.labels) if "hook_result" in label]
    assert close(attrs, found.contributions[own])


@pytest.mark.parametrize("name", ["gpt2", "llama_bias", "gpt_neox", "granite"])
def test_the_bias_row_is_what_the_weights_say(name: str, built: Any, ids: Tensor) -> None:
    """`accumulated_bias`, which reads the weights alone, and the directions of `W_U`."""
    bridge = built(name)
    cache = cached(bridge, ids)
    for layer, mlp_input in ((1, False), (1, True), (2, False)):
        if mlp_input and name == "gpt_neox":
            continue
        full = cache.get_full_resid_decomposition(layer, mlp_input)
        bias = bridge.accumulated_bias(layer, mlp_input, include_mlp_biases=True).detach()
        assert close(full[-1], bias.expand_as(full[-1]))
    assert bool(bias.any()) == (name != "granite")
    stack = cache.decompose_resid()
    attrs = cache.logit_attrs(stack, 7, 9)
    factor = bridge.architecture.logit_scale
    directions = bridge.tokens_to_residual_directions([7, 9]).detach() * factor
    behind = cache.apply_ln_to_stack(stack)
    assert close(attrs, behind @ (directions[0] - directions[1]))


def test_heads_that_are_no_linear_map(built: Any, ids: Tensor) -> None:
    """A soft cap is refused, or left out when that is asked for; more than a matrix is refused."""
    bridge = built("gemma2")
    cache = cached(bridge, ids)
    stack = cache.decompose_resid()
    for call in (lambda: cache.logit_attrs(stack, 7), lambda: cache.logit_bias(7)):
        with pytest.raises(ArchitectureError, match=r"more than a factor .* linearise=True"):
            call()
    attrs = cache.logit_attrs(stack, 7, linearise=True)
    assert close(attrs.sum(0), cache["unembed.hook_out"][..., 7], float(attrs.abs().sum(0).max()))
    assert float(cache.logit_bias(7, linearise=True)) == 0
    bert = cached(built("bert", "masked"), ids)
    with pytest.raises(ArchitectureError, match=r"head of BertForMaskedLM is more than one linear"):
        bert.logit_attrs(bert.decompose_resid(), 7)
    cohere = cached(built("cohere"), ids)
    stack = cohere.decompose_resid()
    made = cohere.logit_attrs(stack, 7, linearise=True).sum(0) + cohere.logit_bias(
        7, linearise=True
    )
    assert close(made, cohere["unembed.hook_out"][..., 7])


def test_tokens_that_are_not_there(built: Any, tiny: Any, ids: Tensor) -> None:
    """Ids of the vocabulary, in a shape that fits; texts of one token."""
    from lensbridge import TransformerBridge

    cache = cached(built("gpt2"), ids)
    stack = cache.decompose_resid()
    for given, message in (
        (160, r"tokens: id 160 is outside the vocabulary of 160"),
        (torch.tensor([1.0, 2.0]), "must be token ids or a text of one token"),
        (True, "must be token ids"),
        (None, "must be token ids"),
        ([[1, 2], [3]], "must be token ids"),
        ([1, 2, 3], r"tokens are \[3\] and the components are of \[2, 9\]"),
        (torch.zeros(2, 2, 9, dtype=torch.long), r"are \[2, 2, 9\]"),
        ("ab", "'ab' is 2 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            cache.logit_attrs(stack, given)
    with pytest.raises(InputError, match=r"incorrect_tokens: id -1 is outside"):
        cache.logit_attrs(stack, 3, -1)
    few = cached(built("gpt2"), ids, names_filter="ln_final.hook_scale")
    with pytest.raises(UnknownPointError, match=r": ln_final.hook_out, unembed.hook_in$"):
        few.logit_attrs(stack, 3)
    headless = TransformerBridge(tiny("gpt2").transformer)
    with torch.no_grad():
        _, cache = headless.run_with_cache(ids, return_type=None)
    with pytest.raises(AbsentPointError, match="has no head"):
        cache.logit_attrs(cache.decompose_resid(), 3)
    with torch.no_grad():
        _, cache = built("llama").run_with_cache(ids, logits_to_keep=1)
    with pytest.raises(InputError, match="leave out logits_to_keep"):
        cache.logit_attrs(cache.decompose_resid(), 3)


# --- the stream as it grows -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "granite"])
def test_accumulated_streams(name: str, built: Any, plain: Any, ids: Tensor) -> None:
    """Those of ``output_hidden_states``; the last is what the final norm reads."""
    bridge = built(name)
    model = bridge.original_model
    cache = cached(bridge, ids)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert close(stack[:2], torch.stack(states[:2]), float(stack.abs().max()))
    path = bridge.architecture.main.ln_final.path
    last = plain.read(model, ids, f"{path}<")[f"{path}<"][0]
    assert close(stack[2], last, float(last.abs().max()))
    stack, labels = cache.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]
    assert torch.equal(stack[1], cache["resid_mid", 0])
    assert torch.equal(stack[3], cache["resid_mid", 1])
    # The logit lens: each stream through the model's own end.
    lens = cache.accumulated_resid(apply_ln=True)
    with torch.no_grad():
        for state, own in zip(cache.accumulated_resid(), lens, strict=True):
            assert torch.equal(own, model.get_submodule(path)(state))
        logits = cache["unembed.hook_out"]
        factor = cache["unembed.hook_in"] / cache["ln_final.hook_out"]
        assert close(model.lm_head(lens[-1] * factor), logits, float(logits.abs().max()))
    # At a layer's input: that layer's norm, its scale held.
    lens = cache.accumulated_resid(1, apply_ln=True)
    assert close(lens, cache.apply_ln_to_stack(cache.accumulated_resid(1), 1))
    assert len(cache.accumulated_resid(0)) == 1


def test_streams_between_branches(built: Any, ids: Tensor) -> None:
    """Parallel layers have none, three branches have two; BERT's MLP reads behind the norm."""
    with pytest.raises(AbsentPointError, match="run in parallel"):
        cached(built("gptj"), ids).accumulated_resid(incl_mid=True)
    with torch.no_grad():
        _, cache = built("t5", "seq2seq").run_with_cache(ids, decoder_input_ids=ids)
    _, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    mids = ["0_pre", "0_mid", "0_mid2", "1_pre", "1_mid", "1_mid2", "final_post"]
    assert labels == mids
    full, labels = cache.get_full_resid_decomposition(return_labels=True)
    assert close(full.sum(0), cache["resid_post", -1], float(full.abs().max()))
    assert "L1H0_cross_attn" in labels
    assert "L1H0" in labels
    bert = cached(built("bert", "masked"), ids)
    stack = bert.accumulated_resid(1, mlp_input=True)
    assert torch.equal(stack[-1], bert["blocks.1.mlp.in.hook_in"])


def test_stack_activation(built: Any, ids: Tensor) -> None:
    """One name over layers; what a layer lacks, and shapes that differ, are refused."""
    cache = cached(built("gpt2"), ids)
    for given, names in (
        (("resid_pre",), ["blocks.0.hook_in", "blocks.1.hook_in"]),
        (("pattern", 1), ["blocks.0.attn.hook_pattern"]),
        (("scale", None, "ln2"), ["blocks.0.ln2.hook_scale", "blocks.1.ln2.hook_scale"]),
        (("z", 2), ["blocks.0.attn.o.hook_in", "blocks.1.attn.o.hook_in"]),
    ):
        assert torch.equal(cache.stack_activation(*given), torch.stack([cache[x] for x in names]))
    with pytest.raises(LayerRangeError, match="layer=5"):
        cache.stack_activation("resid_pre", 5)
    with pytest.raises(AbsentPointError, match=r"blocks.0.attn.hook_pattern': this layer is mixer"):
        cached(built("jamba"), ids).stack_activation("pattern")
    with pytest.raises(InputError, match="cannot be stacked over the layers: its shapes are none"):
        cache.stack_activation("z", 0)


# --- head results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "jamba"])
def test_head_results_are_what_the_run_shows(name: str, built: Any, ids: Tensor) -> None:
    """Computed afterwards or recorded: the same; and nothing that is there is computed again."""
    bridge = built(name)
    recorded = cached(bridge, ids, names_filter="**.hook_result")
    cache = cached(bridge, ids)
    assert not any("hook_result" in x for x in cache)
    before = len(cache)
    cache.compute_head_results()
    assert len(cache) == before + len(recorded)
    for point, value in recorded.items():
        assert close(cache[point], value)
    first = next(iter(recorded))
    held = cache[first]
    cache.compute_head_results()
    assert cache[first] is held
    row = cached(bridge, ids).apply_slice_to_batch_dim(0).apply_slice_to_pos_dim(3)
    row.compute_head_results()
    assert close(row[first], held[0, 3])
    few = cached(bridge, ids, names_filter="ln_final.hook_out")
    with pytest.raises(UnknownPointError) as raised:
        few.compute_head_results()
    for point in recorded:
        assert point.replace("hook_result", "o.hook_in") in str(raised.value)


# --- whatever the model is --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_an_offloaded_model(name: str, tiny: Any, ids: Tensor) -> None:
    """Weights that are elsewhere until their layer runs come back for the arithmetic."""
    from accelerate import cpu_offload

    from lensbridge import TransformerBridge

    kind = "masked" if name == "bert" else "causal"
    whole = cached(TransformerBridge(tiny(name, kind)), ids)
    model = cpu_offload(tiny(name, kind), execution_device=torch.device("cpu"))
    cache = cached(TransformerBridge(model), ids)
    assert next(model.parameters()).is_meta
    full = cache.get_full_resid_decomposition()
    assert torch.equal(full, whole.get_full_resid_decomposition())
    if kind == "causal":
        assert torch.equal(cache.logit_attrs(full, 7, 9), whole.logit_attrs(full, 7, 9))
        assert torch.equal(cache.logit_bias(7, 9), whole.logit_bias(7, 9))
    assert next(model.parameters()).is_meta


class _Wrapped(nn.Linear):
    """A linear layer that is no plain matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


def test_layers_that_are_no_plain_matrix(tiny: Any, ids: Tensor) -> None:
    """Adapters and quantised layers are asked what they do; their weights are not looked at."""
    from lensbridge import TransformerBridge

    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = _Wrapped(64, 64), _Wrapped(64, 64)
    model.lm_head = _Wrapped(64, 160)
    cache = cached(TransformerBridge(model), ids)
    full = cache.get_full_resid_decomposition()
    assert close(full.sum(0), cache["resid_post", -1], float(full.abs().max()))
    attrs, bias = cache.logit_attrs(full, 7, 9), cache.logit_bias(7, 9)
    with torch.no_grad():
        logits = model(ids).logits
    assert close(attrs.sum(0) + bias, logits[..., 7] - logits[..., 9], 3.0)


def test_half_precision(tiny: Any, ids: Tensor) -> None:
    """Sums are made in float32 and given in the model's dtype."""
    from lensbridge import TransformerBridge

    cache = cached(TransformerBridge(tiny("bert", "masked").bfloat16()), ids)
    full = cached(TransformerBridge(tiny("bert", "masked")), ids).decompose_resid()
    stack = cache.decompose_resid()
    assert stack.dtype == torch.bfloat16
    assert float((stack - full).abs().max()) < 0.05 * float(full.abs().max())
    assert cache.accumulated_resid().dtype == torch.bfloat16


def test_nothing_is_left_behind(tiny: Any, ids: Tensor, snapshot: Any) -> None:
    """Under inference mode, in train mode, with gradients on: no graph, no gradients, the model as it was."""
    from lensbridge import TransformerBridge

    model = tiny("gpt2")
    bridge = TransformerBridge(model)
    before = snapshot(model)
    _, cache = bridge.run_with_cache(ids)
    with torch.inference_mode():
        _, inferred = bridge.run_with_cache(ids)
    for one in (cache, inferred):
        full = one.get_full_resid_decomposition(apply_ln=True)
        one.compute_head_results()
        assert not full.requires_grad
        assert not one.logit_attrs(one.accumulated_resid(), 3).requires_grad
        assert not one.apply_ln_to_stack(one.decompose_resid(), recompute_ln=True).requires_grad
        assert not one["blocks.0.attn.hook_result"].requires_grad
    assert snapshot(model) == before


def test_toggle_autodiff(built: Any, ids: Tensor) -> None:
    """Gradients off, and on again."""
    cache = cached(built("gpt2"), ids, names_filter="blocks.0.hook_in")
    assert torch.is_grad_enabled()
    try:
        cache.toggle_autodiff()
        assert not torch.is_grad_enabled()
        cache.toggle_autodiff(mode=True)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_who_keeps_whom(tiny: Any, tokenizer: Any, ids: Tensor) -> None:
    """A cache works when its bridge is gone, and a plain dictionary keeps nothing of the model."""
    from lensbridge import TransformerBridge

    bridge = TransformerBridge(tiny("gpt2"), tokenizer)
    cache = cached(bridge, ids)
    wanted = cache.logit_attrs(cache.decompose_resid(), "a")
    watched = weakref.ref(bridge)
    del bridge
    gc.collect()
    assert watched() is None
    stack = cache.decompose_resid()
    assert torch.equal(cache.logit_attrs(stack, tokenizer.convert_tokens_to_ids("a")), wanted)
    with pytest.raises(
        InputError, match=r"'a' needs the bridge's tokenizer, and the bridge .* gone"
    ):
        cache.logit_attrs(stack, "a")
    model = tiny("gpt2")
    watched = weakref.ref(model)
    bridge = TransformerBridge(model)
    plain = cached(bridge, ids, return_cache_object=False)
    del bridge, model
    gc.collect()
    assert watched() is None
    assert len(plain) > 20


def test_caches_of_a_generation(built: Any, ids: Tensor) -> None:
    """A cache recorded while a text was generated is summed like any other."""
    bridge = built("gpt2")
    _, cache = bridge.generate(ids, max_new_tokens=3, do_sample=False, return_cache=True)
    full = cache.get_full_resid_decomposition()
    assert close(full.sum(0), cache["resid_post", -1], float(full.abs().max()))


def test_embeddings_that_were_given(built: Any, ids: Tensor) -> None:
    """No token embedding was passed: what entered the first layer stays whole."""
    bridge = built("llama")
    with torch.no_grad():
        given = bridge.original_model.get_input_embeddings()(ids)
    cache = cached(bridge, given)
    stack, labels = cache.decompose_resid(return_labels=True)
    assert labels[0] == "0_pre"
    assert torch.equal(stack[0], given)
    assert close(stack.sum(0), cache["resid_post", -1])


# --- files ------------------------------------------------------------------------------------------------


def test_save_and_load(built: Any, tmp_path: Path, ids: Tensor) -> None:
    """Everything comes back, in order, under every name; cut caches too."""
    bridge = built("gpt2")
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    whole = cached(bridge, ids, attention_mask=mask, names_filter=lambda name: True)
    _, graded = bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)
    _, live = bridge.generate(ids, max_new_tokens=2, do_sample=False, return_cache=True)
    caches = [whole, graded, live, whole.apply_slice_to_pos_dim(3), whole.to(dtype=torch.bfloat16)]
    caches += [whole.apply_slice_to_batch_dim(1).apply_slice_to_pos_dim([1, 2])]
    path = tmp_path / "made" / "cache.safetensors"
    for cache in caches:
        cache.save(path)
        again = ActivationCache.load(path, bridge)
        assert list(again) == list(cache)
        for name, value in cache.items():
            assert torch.equal(again[name], value)
            assert again[name].dtype == value.dtype
        assert again.has_batch_dim == cache.has_batch_dim
        assert again.left_out == cache.left_out
        for name in ("mask", "tokens"):
            held, got = getattr(cache, name), getattr(again, name)
            assert (held is None) == (got is None)
            assert held is None or torch.equal(held, got)
        stack = cache.decompose_resid()
        assert torch.equal(again.decompose_resid(), stack)
    assert ActivationCache.load(str(path), bridge, "meta")["resid_pre", 0].is_meta
    assert [x.name for x in path.parent.iterdir()] == ["cache.safetensors"]


def test_files_of_other_models(built: Any, tiny: Any, tmp_path: Path, ids: Tensor) -> None:
    """Other names, widths or layers, and files that are none, are refused."""
    from lensbridge import TransformerBridge

    path = tmp_path / "cache.safetensors"
    cached(built("gpt2"), ids, names_filter="**.hook_out").save(path)
    with pytest.raises(InputError, match=r"of GPT2LMHeadModel, which is another model than this: "):
        ActivationCache.load(path, built("llama"))
    longer = TransformerBridge(tiny("gpt2", n_layer=3))
    with pytest.raises(InputError, match="of GPT2LMHeadModel with 2 layers, and this model has 3"):
        ActivationCache.load(path, longer)
    wider = TransformerBridge(tiny("gpt2", n_embd=32))
    wrong = r"embed.hook_out is \[2, 9, 64\] there and \[batch pos d_model=32\] here"
    with pytest.raises(InputError, match=wrong):
        ActivationCache.load(path, wider)
    cached(built("gpt2"), ids, names_filter="**.hook_pattern").save(path)
    heads = TransformerBridge(tiny("gpt2", n_head=2))
    with pytest.raises(InputError, match=r"\[2, 4, 9, 9\] there and \[batch head=2 query key\]"):
        ActivationCache.load(path, heads)
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match="is no lensbridge activation cache"):
        ActivationCache.load(path, built("gpt2"))
    with pytest.raises(FileNotFoundError):
        ActivationCache.load(tmp_path / "none", built("gpt2"))
