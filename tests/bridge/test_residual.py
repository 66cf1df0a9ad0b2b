"""What the residual stream is a sum of: every decomposition against the bare model, read with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as remembered
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    AbsentPointError,
    ArchitectureError,
    InputError,
    LayerRangeError,
    UnknownPointError,
)

FLOAT = 2e-6
"""Relative float32 error of a sum of a few hundred parts."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
}
"""Factors that the tiny configurations leave at one."""


class Family(NamedTuple):
    """Where the bare model shows its stream."""

    layers: str
    mlp: str
    kind: str = "causal"


FAMILIES = {
    "gpt2": Family("transformer.h", "ln_2<"),
    "llama": Family("model.layers", "post_attention_layernorm<"),
    "bert": Family("bert.encoder.layer", "intermediate.dense<", "masked"),  # norms behind the sums
    "gemma2": Family("model.layers", "pre_feedforward_layernorm<"),  # norms before and behind
    "olmo2": Family("model.layers", "mlp<"),  # behind the branches alone
    "gpt_neox": Family("gpt_neox.layers", "post_attention_layernorm<"),  # parallel, two norms
    "gptj": Family("transformer.h", "ln_1<"),  # parallel, one norm
    "mixtral": Family("model.layers", "post_attention_layernorm<"),  # experts
    "granite": Family("model.layers", "post_attention_layernorm<"),  # multipliers
    "bloom": Family("transformer.h", "post_attention_layernorm<"),  # a norm behind the embeddings
    "minimax": Family("model.layers", "post_attention_layernorm<"),  # norms on the stream
    "openai-gpt": Family("transformer.h", "mlp<"),  # norms behind the sums
    "doge": Family("model.layers", "post_attention_layernorm<"),  # the stream times parameters
    "jamba": Family("model.layers", "pre_ff_layernorm<"),  # mixers
}
SPLIT = {  # which layers have heads, and neurons
    "mixtral": ([0, 1], []),
    "minimax": ([0], []),
    "jamba": ([1], [0]),
}


@pytest.fixture(scope="module")
def built(tiny: Callable[..., nn.Module]) -> Callable[[str], Any]:
    """``built("bert")``: a bridge around a tiny model, built once; nothing here leaves a trace on it."""
    from lensbridge import TransformerBridge

    def build(name: str) -> Any:
        kind = FAMILIES[name].kind if name in FAMILIES else "causal"
        return TransformerBridge(tiny(name, kind, **OVERRIDES.get(name, {})))

    return remembered(build)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


def cached(bridge: Any, ids: Tensor, **given: Any) -> Any:
    """A run's cache."""
    with torch.no_grad():
        return bridge.run_with_cache(ids, **given)[1]


def miss(stack: Tensor, stream: Tensor) -> float:
    """By how much parts miss what they are to sum to, relative to the stream."""
    assert stack.shape[1:] == stream.shape
    return float((stack.sum(0) - stream).abs().max() / stream.abs().max())


def streams(plain: Any, bridge: Any, name: str, ids: Any) -> dict[str, Tensor]:
    """The stream of the bare model: into each layer, into its MLP, out of the last."""
    model, (layers, mlp, _) = bridge.original_model, FAMILIES[name]
    count = len(bridge.architecture.blocks)
    places = {f"{i}": f"{layers}.{i}<" for i in range(count)}
    places.update({f"{i} mlp": f"{layers}.{i}.{mlp}" for i in range(count)})
    places[f"{count}"] = f"{layers}.{count - 1}"
    seen = plain.read(model, ids, *places.values())
    return {what: seen[place][0] for what, place in places.items()}


# --- the sum ----------------------------------------------------------------------------------------------


def test_decompositions_sum_to_the_stream(name: str, built: Any, plain: Any, ids: Tensor) -> None:
    """Of every layer's input, every MLP's input and the end, whole and by heads and neurons."""
    bridge = built(name)
    cache, bare = cached(bridge, ids), streams(plain, bridge, name, ids)
    for layer in range(3):
        for mlp_input in (False, True)[: 1 if layer == 2 else 2]:
            wanted = bare[f"{layer}{' mlp' * mlp_input}"]
            stack, labels = cache.decompose_resid(layer, mlp_input, return_labels=True)
            assert miss(stack, wanted) < FLOAT
            assert len(labels) == len(set(labels)) == len(stack)
            for neurons in (False, True):
                full, every = cache.get_full_resid_decomposition(
                    layer, mlp_input, neurons, return_labels=True
                )
                assert miss(full, wanted) < FLOAT
                assert len(every) == len(set(every)) == len(full)
                assert every[-1] == "bias"
            # Nothing much cancels: a part that is wrong would show.
            assert float(full.abs().sum(0).max()) < 300 * float(wanted.abs().max())


def test_labels_and_order(name: str, built: Any, ids: Tensor) -> None:
    """Branches in the order they are added; heads, neurons, whole branches, embeddings, bias."""
    bridge = built(name)
    cache = cached(bridge, ids)
    _, labels = cache.decompose_resid(return_labels=True)
    branches = [
        f"{index}_{branch.name}_out"
        for index, block in enumerate(bridge.architecture.blocks)
        for branch in block.branches
    ]
    assert [x for x in labels if x.endswith("_out")] == branches
    first = ["embed", "pos_embed", "embed_rest"] if name == "bert" else ["embed"]
    first = {"gpt2": ["embed", "pos_embed"], "openai-gpt": ["0_pre"]}.get(name, first)
    biased = ["bias"] * (name in ("bert", "bloom", "openai-gpt"))
    assert labels == [*first, *branches, *biased]
    assert cache.decompose_resid(incl_embeds=False, return_labels=True)[1] == [*branches, *biased]
    for mode in ("attn", "mlp"):
        stack, some = cache.decompose_resid(mode=mode, return_labels=True)
        assert some == [*first, *(x for x in branches if f"_{mode}" in x)]
        whole = cache.decompose_resid()
        assert torch.equal(stack, torch.stack([whole[labels.index(x)] for x in some]))
    heads, neurons = SPLIT.get(name, ([0, 1], [0, 1]))
    blocks = bridge.architecture.blocks
    of_heads = [f"L{i}H{h}" for i in heads for h in range(bridge.cfg.n_heads)]
    of_neurons = [f"L{i}N{n}" for i in neurons for n in range(blocks[i].mlp.d_mlp)]
    mlps = [f"{i}_mlp_out" for i in range(2) if i not in neurons]
    others = [f"{i}_{blocks[i].branches[0].name}_out" for i in range(2) if i not in heads]
    _, every = cache.get_full_resid_decomposition(return_labels=True)
    assert every == [*of_heads, *of_neurons, *mlps, *others, *first, "bias"]
    assert len(of_heads) >= 4


def test_parts_and_the_rest_are_the_stream(name: str, built: Any, plain: Any, ids: Tensor) -> None:
    """Heads with a remainder, neurons with one; without it, they are rows of the full decomposition."""
    bridge = built(name)
    cache, bare = cached(bridge, ids), streams(plain, bridge, name, ids)
    full, every = cache.get_full_resid_decomposition(return_labels=True)
    heads, labels = cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert labels[-1] == "remainder"
    assert miss(heads, bare["2"]) < FLOAT
    assert torch.allclose(heads[:-1], full[: len(heads) - 1], atol=1e-6)
    assert labels[:-1] == every[: len(heads) - 1]
    assert miss(cache.stack_head_results(1, incl_remainder=True), bare["1"]) < FLOAT
    assert miss(cache.stack_head_results(0, incl_remainder=True), bare["0"]) < FLOAT
    assert cache.stack_head_results(0).shape == (0, *bare["0"].shape)
    if name in ("mixtral", "minimax"):
        with pytest.raises(AbsentPointError, match="experts have their layers inside"):
            cache.stack_neuron_results(-1)
        return
    neurons, labels = cache.stack_neuron_results(-1, return_labels=True, incl_remainder=True)
    assert miss(neurons, bare["2"]) < FLOAT
    start = every.index(labels[0])
    assert torch.allclose(neurons[:-1], full[start : start + len(neurons) - 1], atol=1e-6)
    some, labels = cache.stack_neuron_results(-1, neuron_slice=[5, -1], return_labels=True)
    width = bridge.architecture.blocks[0].mlp.d_mlp
    wanted = [f"L{x.split('L')[1].split('N')[0]}N{n}" for x in labels[::2] for n in (5, width - 1)]
    assert labels == wanted
    assert torch.allclose(some, torch.stack([full[every.index(x)] for x in labels]), atol=1e-6)
    one = cache.stack_neuron_results(-1, neuron_slice=5, incl_remainder=True)
    assert torch.equal(one[:-1], some[::2])
    assert miss(one, bare["2"]) < FLOAT


# --- each part --------------------------------------------------------------------------------------------


def test_every_part_of_gpt2_by_hand(built: Any, plain: Any, ids: Tensor) -> None:
    """With the weights of the Hugging Face model and plain hooks, nothing of lensbridge."""
    bridge = built("gpt2")
    model: Any = bridge.original_model
    names = [
        f"transformer.h.{i}.{x}" for i in (0, 1) for x in ("attn.c_proj<", "mlp.c_proj<", "mlp")
    ]
    seen = {k: v[0] for k, v in plain.read(model, ids, *names).items()}
    cache = cached(bridge, ids)
    full, every = cache.get_full_resid_decomposition(return_labels=True)
    bias = 0
    for i in (0, 1):
        layer, here = model.transformer.h[i], f"transformer.h.{i}"
        for head in range(4):
            at = slice(16 * head, 16 * head + 16)
            made = seen[f"{here}.attn.c_proj<"][..., at] @ layer.attn.c_proj.weight[at]
            assert torch.allclose(full[every.index(f"L{i}H{head}")], made, atol=1e-5)
        for neuron in (0, 100, 255):
            made = seen[f"{here}.mlp.c_proj<"][..., neuron, None] * layer.mlp.c_proj.weight[neuron]
            assert torch.allclose(full[every.index(f"L{i}N{neuron}")], made, atol=1e-5)
            result = cache.get_neuron_results(i, neuron)
            assert torch.allclose(result, made, atol=1e-6)
        results = cache.get_neuron_results(i - 2, [0, 100], pos_slice=-1)
        assert results.shape == (2, 2, 64)
        assert torch.allclose(results[:, 1], cache.get_neuron_results(i, 100)[:, -1])
        bias = bias + layer.attn.c_proj.bias + layer.mlp.c_proj.bias
        whole = cache.decompose_resid(return_labels=True)
        mlp = whole[0][whole[1].index(f"{i}_mlp_out")]
        assert torch.allclose(mlp, seen[f"{here}.mlp"], atol=1e-5)
    assert torch.allclose(full[-1], bias.expand_as(full[-1]), atol=1e-6)
    assert torch.equal(full[every.index("embed")], model.transformer.wte(ids))
    positions = model.transformer.wpe.weight[:9].expand(2, -1, -1)
    assert torch.equal(full[every.index("pos_embed")], positions)
    assert not full.requires_grad


def test_every_part_of_bert_by_hand(built: Any, plain: Any, ids: Tensor) -> None:
    """A part passes every norm behind it, each with the scale it had."""
    bridge = built("bert")
    model: Any = bridge.original_model
    layers = [f"bert.encoder.layer.{i}" for i in (0, 1)]
    norms = ["bert.embeddings.LayerNorm"]
    norms += [f"{x}.{p}.LayerNorm" for x in layers for p in ("attention.output", "output")]
    dense = [f"{x}.{p}.dense" for x in layers for p in ("attention.output", "output")]
    places = [*(f"{n}<" for n in norms), *dense]
    seen = {k: v[0] for k, v in plain.read(model, ids, *places).items()}

    def behind(x: Tensor, first: int) -> Tensor:
        for path in norms[first:]:
            norm, read = model.get_submodule(path), seen[f"{path}<"]
            scale = (read.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            x = (x - x.mean(-1, keepdim=True)) / scale * norm.weight
        return x

    embeddings = model.bert.embeddings
    parts = {
        "embed": behind(embeddings.word_embeddings(ids), 0),
        "pos_embed": behind(embeddings.position_embeddings.weight[:9].expand(2, -1, -1), 0),
        "embed_rest": behind(embeddings.token_type_embeddings.weight[0].expand(2, 9, -1), 0),
    }
    for count, path in enumerate(dense):
        label = f"{count // 2}_{('attn', 'mlp')[count % 2]}_out"
        parts[label] = behind(seen[path], 1 + count)
    bias = [behind(model.get_submodule(n).bias, i + 1) for i, n in enumerate(norms)]
    parts["bias"] = torch.stack([x.expand(2, 9, -1) for x in bias]).sum(0)
    stack, labels = cached(bridge, ids).decompose_resid(return_labels=True)
    assert labels == list(parts)
    for row, (label, value) in zip(stack, parts.items(), strict=True):
        assert torch.allclose(row, value.detach(), atol=1e-5), label
        assert float(row.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt_neox", "doge"])
def test_a_part_is_what_the_stream_loses_without_it(name: str, built: Any, ids: Tensor) -> None:
    """Taken out where it is added, with everything behind it held: factors and norms behind a branch count."""
    bridge = built(name)
    cache = cached(bridge, ids)
    stack, labels = cache.decompose_resid(return_labels=True)
    last = len(bridge.architecture.blocks) - 1
    for branch in bridge.architecture.blocks[last].branches:
        point = f"blocks.{last}.hook_{branch.name}_out"
        held = [
            (f"blocks.{last}.hook_{other.name}_out", lambda x, hook: cache[hook.name])
            for other in bridge.architecture.blocks[last].branches
            if other is not branch
        ]
        hooks = [(point, lambda x, hook: 0 * x), *held]
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            _, without = bridge.run_with_cache(ids, names_filter=f"blocks.{last}.hook_out")
        lost = cache["resid_post", -1] - without["resid_post", -1]
        own = stack[labels.index(f"{last}_{branch.name}_out")]
        assert torch.allclose(own, lost, atol=1e-5 * float(cache["resid_post", -1].abs().max()))
        assert float(own.abs().max()) > 1e-3


def test_heads_of_grouped_attention_and_norms_behind(built: Any, plain: Any, ids: Tensor) -> None:
    """Gemma2: what a head makes passes the norm behind the branch, with the scale of the whole."""
    bridge = built("gemma2")
    model: Any = bridge.original_model
    here = "model.layers.0.self_attn.o_proj"
    post = "model.layers.0.post_attention_layernorm"
    seen = {k: v[0] for k, v in plain.read(model, ids, f"{here}<", f"{post}<").items()}
    norm = model.get_submodule(post)
    scale = (seen[f"{post}<"].square().mean(-1, keepdim=True) + norm.eps).sqrt()
    z = seen[f"{here}<"].unflatten(-1, (bridge.cfg.n_heads, -1))
    width = z.shape[-1]
    stack, labels = cached(bridge, ids).stack_head_results(1, return_labels=True)
    assert labels == [f"L0H{h}" for h in range(bridge.cfg.n_heads)]
    for head, row in enumerate(stack):
        weight = model.get_submodule(here).weight[:, head * width : (head + 1) * width]
        made = z[:, :, head] @ weight.T / scale * (1 + norm.weight)
        assert torch.allclose(row, made.detach(), atol=1e-5)


# --- rows and positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pos_slice", [3, -1, (2, 6), slice(None, None, 2), [0, -1]])
@pytest.mark.parametrize("name", ["gpt2", "bert", "granite"])
def test_positions_are_picked_before_or_after(
    name: str, pos_slice: Any, built: Any, ids: Tensor
) -> None:
    """In the call, from the cache, from the run: the same numbers; and without a batch dimension."""
    bridge = built(name)
    whole = cached(bridge, ids)
    index = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    for call in (
        lambda c, **more: c.decompose_resid(**more),
        lambda c, **more: c.get_full_resid_decomposition(apply_ln=True, **more),
        lambda c, **more: c.stack_head_results(1, incl_remainder=True, apply_ln=True, **more),
        lambda c, **more: c.accumulated_resid(apply_ln=True, **more),
        lambda c, **more: c.stack_neuron_results(2, neuron_slice=(3, 9), **more),
    ):
        wanted = call(whole)[:, :, index]
        close = {"atol": 1e-5, "rtol": 1e-5}
        assert torch.allclose(call(whole, pos_slice=pos_slice), wanted, **close)
        assert torch.allclose(call(whole.apply_slice_to_pos_dim(pos_slice)), wanted, **close)
        assert torch.allclose(call(cached(bridge, ids, pos_slice=pos_slice)), wanted, **close)
        row = whole.apply_slice_to_batch_dim(1)
        assert torch.allclose(call(row, pos_slice=pos_slice), wanted[:, 1], **close)
        alone = cached(bridge, ids[1:], remove_batch_dim=True)
        assert torch.allclose(call(alone, pos_slice=pos_slice), wanted[:, 1], atol=1e-4)
    if isinstance(pos_slice, int):
        with pytest.raises(InputError, match="holds one position already"):
            whole.apply_slice_to_pos_dim(pos_slice).decompose_resid(pos_slice=0)


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2"])
def test_padded_rows_are_what_they_are_alone(
    name: str, built: Any, plain: Any, ids: Tensor
) -> None:
    """Padding in front: sums hold at every position, and the real ones are those of the row alone."""
    bridge = built(name)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    cache = cached(bridge, ids, attention_mask=mask)
    given = bridge.prepare(ids, attention_mask=mask).kwargs
    bare = streams(plain, bridge, name, given)
    full = cache.get_full_resid_decomposition()
    assert miss(full, bare["2"]) < FLOAT
    if name != "bert":  # its positions start at the padding
        alone = cached(bridge, ids[:1, 3:]).get_full_resid_decomposition()
        assert torch.allclose(full[:, :1, 3:], alone, atol=1e-4)


def test_rows_that_share_positions(built: Any, plain: Any, ids: Tensor) -> None:
    """Some rows of a cache, in any order."""
    bridge = built("gpt2")
    bare = streams(plain, bridge, "gpt2", ids)
    for rows in ([1], [1, 0, 1], slice(0, 1)):
        cut = cached(bridge, ids).apply_slice_to_batch_dim(rows)
        assert miss(cut.decompose_resid(), bare["2"][rows]) < FLOAT


# --- what is refused --------------------------------------------------------------------------------------


def test_points_that_were_not_cached(built: Any, ids: Tensor) -> None:
    """The error names exactly those, and with them it works."""
    bridge = built("bert")
    cases: list[tuple[Callable[[Any], Any], list[str]]] = [
        (lambda c: c.decompose_resid(1, mode="mlp", incl_embeds=False), ["mlp.out.hook_out"]),
        (lambda c: c.stack_head_results(1), ["attn.o.hook_in"]),
        (lambda c: c.stack_neuron_results(1), ["mlp.out.hook_in"]),
        (lambda c: c.get_neuron_results(0), ["mlp.out.hook_in"]),
    ]
    scales = [f"blocks.0.{ln}.hook_scale" for ln in ("ln1", "ln2")]
    for call, own in cases:
        few = cached(bridge, ids, names_filter="blocks.1.hook_out")
        with pytest.raises(UnknownPointError, match="names_filter") as raised:
            call(few)
        named = str(raised.value).split("(names_filter): ")[1].split(", ")
        wanted = [f"blocks.0.{x}" for x in own] + scales * (call is not cases[3][0])
        assert sorted(named) == sorted(wanted)
        enough = cached(bridge, ids, names_filter=named)
        assert torch.allclose(call(enough), call(cached(bridge, ids)), atol=1e-5)
    few = cached(bridge, ids, names_filter="blocks.1.hook_out")
    with pytest.raises(UnknownPointError, match=r"needs 13 points and the cache lacks 13 of them"):
        few.decompose_resid()
    with pytest.raises(UnknownPointError) as raised:
        few.decompose_resid()
    named = str(raised.value).split("(names_filter): ")[1].split(", ")
    enough = cached(bridge, ids, names_filter=named)
    whole = cached(bridge, ids).decompose_resid()
    assert torch.allclose(enough.decompose_resid(), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("causal", "gemma3n_text", r"blocks\.0 makes is not known to be a sum of parts"),
        ("causal", "hy_v4", r"\[batch pos n d_model\]|not known to be a sum"),
        ("causal", "reformer", r"not known to be a sum of parts|nothing is known"),
        ("causal", "xlnet", r"not known to be a sum of parts"),
    ],
)
def test_models_that_are_no_such_sum(
    kind: str, name: str, message: str, tiny: Any, ids: Tensor
) -> None:
    """Are refused, with the place and the reason."""
    from lensbridge import TransformerBridge

    cache = cached(TransformerBridge(tiny(name, kind)), ids)
    for call in ("decompose_resid", "get_full_resid_decomposition", "stack_head_results"):
        with pytest.raises(ArchitectureError, match=message):
            getattr(cache, call)()
    if name in ("gemma3n_text", "hy_v4"):
        with pytest.raises(ArchitectureError, match=r"the stream of .* not \[batch pos d_model\]"):
            cache.accumulated_resid()


def test_edits_of_the_stream_are_no_ones_part(built: Any, ids: Tensor) -> None:
    """An edit of what is added is in the sum; one of the stream, or behind the heads, is refused."""
    bridge = built("gpt2")
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: 0 * x)]):
        cache = cached(bridge, ids)
    stack, labels = cache.decompose_resid(return_labels=True)
    assert not bool(stack[labels.index("0_mlp_out")].any())
    assert miss(stack, cache["resid_post", -1]) < FLOAT
    with pytest.raises(
        ArchitectureError, match=r"mlp.hook_out is more than the sum of its neurons"
    ):
        cache.get_full_resid_decomposition()
    assert miss(cache.get_full_resid_decomposition(expand_neurons=False), stack.sum(0)) < FLOAT
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda x, hook: x + 1)]):
        cache = cached(bridge, ids)
    with pytest.raises(ArchitectureError, match="does a hook that is set edit the stream itself"):
        cache.decompose_resid()
    assert miss(cache.decompose_resid(0), cache["resid_pre", 0]) < FLOAT

    def ablate(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, 2] = 0
        return x

    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_result", ablate)]):
        cache = cached(bridge, ids, names_filter=lambda name: True)
    stack, labels = cache.stack_head_results(return_labels=True)
    assert not bool(stack[labels.index("L0H2")].any())
    assert bool(stack[labels.index("L0H1")].any())
    assert miss(cache.get_full_resid_decomposition(), cache["resid_post", -1]) < FLOAT


def test_arguments_that_are_none(built: Any, ids: Tensor) -> None:
    """Layers, modes and MLPs that are not there."""
    cache = cached(built("gpt2"), ids)
    for layer in (3, -2):
        with pytest.raises(
            LayerRangeError, match=r"0 to 1, or behind the last one, as 2, -1 or None"
        ):
            cache.decompose_resid(layer)
    with pytest.raises(InputError, match="mode is 'all', 'attn' or 'mlp', got 'heads'"):
        cache.decompose_resid(mode="heads")
    with pytest.raises(InputError, match="behind the last layer there is no MLP"):
        cache.decompose_resid(mlp_input=True)
    mamba = cached(built("mamba"), ids)
    with pytest.raises(InputError, match=r"mlp_input: blocks.0 has no MLP; it is mixer"):
        mamba.decompose_resid(0, mlp_input=True)
    assert miss(mamba.get_full_resid_decomposition(), mamba["resid_post", -1]) < FLOAT
    for call in (mamba.stack_head_results, mamba.compute_head_results):
        with pytest.raises(AbsentPointError, match=r"attn.hook_result': this layer is mixer"):
            call()
    with pytest.raises(AbsentPointError, match=r"mlp.out.hook_in': this layer is mixer"):
        mamba.get_neuron_results(0)
