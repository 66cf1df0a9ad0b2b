"""Direct logit attribution: the parts sum to the logit, and each is what the model loses without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge.hooks import AbsentPointError, ArchitectureError, InputError
from lensbridge.methods.dla import LogitAttribution, direct_logit_attribution

FLOAT = 2e-6
"""Relative float32 error of a sum of a few dozen parts."""

ARCHITECTURES = (
    "granite",  # residual and embedding multipliers, logits divided
    "minicpm3",  # residual factors, and one between norm and head
    "cohere",  # parallel, a logit scale
    "falcon",  # parallel, changed in place
    "bloom",  # a norm behind the embeddings
    "opt",  # learned positions
    "xglm",  # an embedding scaled in its own module, sinusoidal positions
    "olmo2",  # norms behind the branches
    "minimax",  # norms on the stream itself
    "openai-gpt",  # norms behind the sums, none at the end
    "doge",  # the stream times parameters
    "gemma4_text",  # stream and branch times parameters
    "gpt_neox_japanese",  # a bias besides
    "mamba",  # mixers
    "jamba",  # mixers, attention and experts
)
OVERRIDES: dict[str, dict[str, Any]] = {
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    "minicpm3": {"scale_emb": 12, "scale_depth": 0.7, "dim_model_base": 16},
}
"""Factors that the tiny configurations leave at one."""

PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


@pytest.fixture(scope="module")
def wrapped(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapped("gpt2")``: a bridge around a tiny model, built once; nothing here leaves a trace on it."""
    from lensbridge import TransformerBridge

    return cache(
        lambda name, kind="causal": TransformerBridge(tiny(name, kind, **OVERRIDES.get(name, {})))
    )


def miss(found: LogitAttribution, logits: Tensor) -> float:
    """By how much the parts miss some logits, relative to the parts."""
    assert found.contributions.shape == (len(found.labels), len(logits))
    assert len(set(found.labels)) == len(found.labels)
    sizes = found.contributions.abs().sum(0).max()
    return float((found.contributions.sum(0) - logits).abs().max() / sizes)


def labels_of(bridge: Any, index: int) -> list[str]:
    """What a layer's branches are called."""
    branches = bridge.architecture.blocks[index].branches
    return [f"{bridge.registry.layers}.{index}.hook_{branch.name}_out" for branch in branches]


@torch.no_grad()
def logits_of(bridge: Any, **given: Any) -> Tensor:
    """The untouched model's logits."""
    return bridge.original_model(**given).logits


def check(bridge: Any, ids: Tensor, **options: Any) -> LogitAttribution:
    """The sum is the model's own logit of a token a row, whole and by heads."""
    logits = logits_of(bridge, input_ids=ids)[:, -1]
    expected = logits[torch.arange(2), torch.tensor([3, 5])]
    found = direct_logit_attribution(bridge, ids, [3, 5], **options)
    assert torch.equal(found.logits, expected)
    assert miss(found, expected) < FLOAT
    # Nothing much cancels, and nothing is the whole: a part that is wrong would show.
    assert float(found.contributions.abs().sum(0).max()) < 300 * float(expected.abs().max())
    wanted = [
        x for index in range(len(bridge.architecture.blocks)) for x in labels_of(bridge, index)
    ]
    assert [label for label in found.labels if label in wanted] == wanted
    return found


# --- the sum ----------------------------------------------------------------------------------------------


def test_the_parts_sum_to_the_logit_in_every_family(bridge: Any, ids: Tensor) -> None:
    """Embeddings, every branch, biases; and the same by heads."""
    check(bridge, ids)
    by_head = direct_logit_attribution(bridge, ids, [3, 5], per_head=True)
    logits = logits_of(bridge, input_ids=ids)[:, -1]
    assert miss(by_head, logits[torch.arange(2), torch.tensor([3, 5])]) < FLOAT
    heads = [x for x in by_head.labels if ".hook_result[" in x]
    assert len(heads) == bridge.cfg.n_heads * len(bridge.architecture.blocks)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parts_sum_to_the_logit_in_other_architectures(
    name: str, wrapped: Any, ids: Tensor
) -> None:
    """Factors, norms on the stream and behind branches, mixers, experts."""
    check(wrapped(name), ids)


@pytest.mark.parametrize("name", ["gpt2", "llama_bias", "olmo2", "gemma2", "granite", "jamba"])
def test_heads_sum_to_their_attention(name: str, tiny: Any, ids: Tensor) -> None:
    """With the bias of the output projection, and of a norm behind it; what is no attention stays whole."""
    from lensbridge import TransformerBridge

    bridge = TransformerBridge(tiny(name))
    options: dict[str, Any] = {"linearise": name == "gemma2", "incorrect_tokens": 9}
    whole = direct_logit_attribution(bridge, ids, [3, 5], **options)
    by_head = direct_logit_attribution(bridge, ids, [3, 5], per_head=True, **options)
    assert torch.equal(by_head.logits, whole.logits)
    split = 0
    for label in whole.labels:
        here = label.removesuffix("_out").replace("hook_", "")  # blocks.0.attn
        own = [x for x in by_head.labels if x.startswith(f"{here}.")]
        split += bool(own)
        expected = sum(by_head[x] for x in own) if own else by_head[label]
        assert torch.allclose(
            whole[label], expected, atol=2e-5 * float(whole[label].abs().max() + 1)
        )
    assert split == sum(block.attn is not None for block in bridge.architecture.blocks)
    has_bias = name in ("gpt2", "llama_bias")
    assert ("blocks.0.attn.o.bias" in by_head.labels) == has_bias


@pytest.mark.parametrize("name", ["gpt2", "gemma", "gpt_neox", "cohere", "granite"])
def test_a_part_is_what_the_model_loses_without_it(name: str, wrapped: Any, ids: Tensor) -> None:
    """Taken out of what the final norm reads, the norm's scale held, in a run of the model itself."""
    bridge = wrapped(name)
    found = direct_logit_attribution(bridge, ids, 7)
    points = [label for label in found.labels if not label.endswith(".bias")]
    _, cache = bridge.run_with_cache(ids, names_filter=[*points, "ln_final.hook_scale"])
    before = logits_of(bridge, input_ids=ids)[:, -1, 7]
    blocks = bridge.architecture.blocks
    for label in points:
        factor = bridge.architecture.main.embed_scale if label == "embed.hook_out" else 1.0
        if label.startswith("blocks."):
            branch = next(b for b in blocks[0].branches if label.endswith(f"hook_{b.name}_out"))
            factor = branch.scale
        part = cache[label] * factor

        def without(x: Tensor, hook: Any, part: Tensor = part) -> Tensor:
            return x - part

        def held(x: Tensor, hook: Any) -> Tensor:
            return cache["ln_final.hook_scale"]

        hooks = [("ln_final.hook_in", without), ("ln_final.hook_scale", held)]
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            after = bridge(ids)[:, -1, 7]
        size = float(found.contributions.abs().max())
        assert torch.allclose(found[label], before - after, atol=2e-5 * size)
        assert float(found[label].abs().max()) > 1e-3 * size


def test_every_number_of_gpt2_by_hand(wrapped: Any, ids: Tensor) -> None:
    """With the weights of the Hugging Face model and no more of lensbridge than its cache."""
    bridge = wrapped("gpt2")
    model: Any = bridge.original_model
    found = direct_logit_attribution(bridge, ids, 7, per_head=True)
    _, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
    norm, final = model.transformer.ln_f, cache["blocks.1.hook_out"][:, -1]
    scale = (final.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()

    def counts(vector: Tensor) -> Tensor:
        centred = vector - vector.mean(-1, keepdim=True)
        return (centred / scale * norm.weight) @ model.lm_head.weight[7]

    parts = {
        "embed.hook_out": model.transformer.wte(ids)[:, -1],
        "pos_embed.hook_out": model.transformer.wpe.weight[8].expand(2, -1),
    }
    for index in (0, 1):
        here, layer = f"blocks.{index}", model.transformer.h[index]
        for head in range(4):
            at = slice(16 * head, 16 * head + 16)
            z = cache[f"{here}.attn.o.hook_in"][:, -1, head]
            parts[f"{here}.attn.hook_result[{head}]"] = z @ layer.attn.c_proj.weight[at]
        parts[f"{here}.attn.o.bias"] = layer.attn.c_proj.bias.expand(2, -1)
        parts[f"{here}.hook_mlp_out"] = cache[f"{here}.mlp.hook_out"][:, -1]
    expected = {label: counts(vector) for label, vector in parts.items()}
    expected["ln_final.bias"] = (norm.bias @ model.lm_head.weight[7]).expand(2)
    assert list(found.labels) == list(expected)
    for label, value in expected.items():
        assert torch.allclose(found[label], value.detach(), atol=1e-5), label


# --- which logit ------------------------------------------------------------------------------------------


def test_a_difference_of_two_logits(wrapped: Any, ids: Tensor) -> None:
    """Is the difference part by part; one token for all rows or one a row."""
    bridge = wrapped("phi")  # its head has a bias
    right, wrong, both = (
        direct_logit_attribution(bridge, ids, tokens, **more)
        for tokens, more in (
            ([3, 5], {}),
            (torch.tensor([8, 8]), {}),
            ((3, 5), {"incorrect_tokens": 8}),
        )
    )
    assert right.labels == wrong.labels == both.labels
    assert both.labels[-1] == "unembed.bias"
    difference = right.contributions - wrong.contributions
    assert torch.allclose(both.contributions, difference, atol=1e-5)
    head = bridge.original_model.lm_head.bias.detach()
    assert torch.allclose(both["unembed.bias"], head[[3, 5]] - head[8], atol=1e-6)
    same = direct_logit_attribution(bridge, ids, 8, incorrect_tokens=8)
    assert not bool(same.contributions.any())


@pytest.mark.parametrize(("side", "last"), [("left", [8, 8]), ("right", [5, 8]), (None, [8, 8])])
def test_positions(side: str | None, last: list[int], wrapped: Any, ids: Tensor) -> None:
    """-1 is each row's last real token, negatives count from there, others from the front."""
    bridge = wrapped("gpt2")
    mask = {"left": PADDED, "right": PADDED.flip(1), None: None}[side]
    given = {} if mask is None else {"attention_mask": mask}
    logits = bridge(ids, **given).detach()

    def at(positions: Any) -> Tensor:
        found = direct_logit_attribution(bridge, ids, 7, positions=positions, **given)
        assert miss(found, found.logits) < FLOAT
        return found.logits

    rows = torch.arange(2)
    for positions, where in (
        (-1, last),
        (-3, [x - 2 for x in last]),
        (4, [4, 4]),
        ([3, -1], [3, last[1]]),
        (torch.tensor([5, 0]), [5, 0]),
    ):
        assert torch.equal(at(positions), logits[rows, torch.tensor(where), 7])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (2, r"row 0 has no real token at position 2"),
        (-7, r"row 0 has no real token at position -7: it ends at 8 of 9"),
        (9, r"row 0 has no real token at position 9"),
        ([-1, -10], r"row 1 has no real token at position -10"),
        ([1, 2, 3], r"a whole number or 2 of them"),
        (1.5, r"a whole number or 2 of them, one a row; got 1.5"),
        ("last", r"got 'last'"),
    ],
)
def test_positions_that_are_not_there(
    positions: Any, message: str, wrapped: Any, ids: Tensor
) -> None:
    """Padding is none, and neither is what lies outside."""
    with pytest.raises(InputError, match=message):
        direct_logit_attribution(
            wrapped("gpt2"), ids, 7, positions=positions, attention_mask=PADDED
        )


def test_tokens_that_are_not_there(wrapped: Any, ids: Tensor) -> None:
    """Tokens are ids of the vocabulary, one or one a row."""
    for given, message in (
        ({"tokens": 160}, "tokens: id 160 is outside the vocabulary of 160"),
        ({"tokens": [1, 2, 3]}, "tokens must be a token id or 2 of them, one a row; got 3"),
        ({"tokens": 3, "incorrect_tokens": "x"}, "incorrect_tokens must be .* got 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            direct_logit_attribution(wrapped("gpt2"), ids, **given)
    found = direct_logit_attribution(wrapped("gpt2"), ids, 3)
    with pytest.raises(InputError, match=r"no part is called 'blocks.9'; there are embed.hook_out"):
        found["blocks.9"]


def test_a_row_counts_the_same_alone(wrapped: Any, ids: Tensor) -> None:
    """Padding in front changes nothing."""
    bridge = wrapped("llama")
    padded = direct_logit_attribution(bridge, ids, 7, per_head=True, attention_mask=PADDED)
    alone = direct_logit_attribution(bridge, ids[:1, 3:], 7, per_head=True)
    assert padded.labels == alone.labels
    assert torch.allclose(padded.contributions[:, :1], alone.contributions, atol=1e-4)


# --- heads and towers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "beam"])  # beam multiplies the stream, too
def test_a_soft_cap_is_refused_or_left_out(name: str, wrapped: Any, ids: Tensor) -> None:
    """What stands behind it is no sum; what the head makes is, and that is said to be asked for."""
    bridge = wrapped(name)
    with pytest.raises(ArchitectureError, match=r"more than a factor .* linearise=True"):
        direct_logit_attribution(bridge, ids, 7)
    found = direct_logit_attribution(bridge, ids, 7, linearise=True)
    _, cache = bridge.run_with_cache(ids, names_filter="unembed.hook_out")
    made = cache["unembed.hook_out"][:, -1, 7]
    assert torch.equal(found.logits, made)
    assert miss(found, made) < FLOAT
    assert not torch.equal(made, logits_of(bridge, input_ids=ids)[:, -1, 7])


def test_linearise_changes_nothing_without_a_cap(wrapped: Any, ids: Tensor) -> None:
    """Cohere's logit scale is a factor and stays."""
    plain, asked = (
        direct_logit_attribution(wrapped("cohere"), ids, 7, linearise=x) for x in (False, True)
    )
    assert torch.equal(plain.contributions, asked.contributions)
    assert torch.equal(asked.logits, logits_of(wrapped("cohere"), input_ids=ids)[:, -1, 7])


def test_a_decoder_with_an_encoder(wrapped: Any, ids: Tensor) -> None:
    """T5's head reads a scaled norm: one linear map. Its decoder attends to itself and to the encoder."""
    bridge = wrapped("t5", "seq2seq")
    decoder = ids.flip(0)
    found = direct_logit_attribution(bridge, ids, 7, decoder_input_ids=decoder, per_head=True)
    logits = logits_of(bridge, input_ids=ids, decoder_input_ids=decoder)[:, -1, 7]
    assert torch.equal(found.logits, logits)
    assert miss(found, logits) < FLOAT
    assert "decoder_embed.hook_out" in found.labels
    assert "decoder_blocks.0.cross_attn.hook_result[1]" in found.labels


def test_an_image_among_the_text(wrapped: Any, inputs_of: Any) -> None:
    """The text tower of a model that also sees."""
    bridge, given = wrapped("llava", "vlm"), inputs_of("llava", "vlm")
    found = direct_logit_attribution(bridge, given, 7)
    assert miss(found, logits_of(bridge, **given)[:, -1, 7]) < FLOAT


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "bert",
            "masked",
            r"the head of BertForMaskedLM is more than one linear map.*unembed.hook_in",
        ),
        ("bart", "seq2seq", r"more than a factor stands between the head of BartFor"),
        ("gemma3n_text", "causal", r"blocks\.0 makes is not known to be a sum of parts: it adds 2"),
        ("olmo", "causal", r"ln_final \(model.norm\) is no norm of a known form"),
    ],
)
def test_models_that_are_no_such_sum(
    name: str, kind: str, message: str, wrapped: Any, ids: Tensor
) -> None:
    """Are refused, with the place and the reason."""
    with pytest.raises(ArchitectureError, match=message):
        direct_logit_attribution(wrapped(name, kind), ids, 7)


def test_models_without_a_head_or_heads(tiny: Any, wrapped: Any, ids: Tensor) -> None:
    """Why there is none is said."""
    from lensbridge import TransformerBridge

    with pytest.raises(AbsentPointError, match=r"unembed.hook_in.*has no head"):
        direct_logit_attribution(TransformerBridge(tiny("gpt2").transformer), ids, 7)
    with pytest.raises(AbsentPointError, match=r"attn.hook_result': this layer is mixer"):
        direct_logit_attribution(wrapped("mamba"), ids, 7, per_head=True)


def test_fewer_logits_than_positions(wrapped: Any, ids: Tensor) -> None:
    """A position is one of both."""
    with pytest.raises(InputError, match=r"\[2, 1, 160\] and the stream has \[2, 9\]"):
        direct_logit_attribution(wrapped("llama"), ids, 7, logits_to_keep=1)


def test_hooks_that_are_set(wrapped: Any, ids: Tensor) -> None:
    """Edits of what is added are attributed as edited; of the stream itself, they are no one's part."""
    bridge = wrapped("gpt2")
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: 0 * x)]):
        found = direct_logit_attribution(bridge, ids, 7)
        expected = bridge(ids)[:, -1, 7].detach()
    assert not bool(found["blocks.0.hook_mlp_out"].any())
    assert miss(found, expected) < FLOAT
    for point in ("blocks.0.hook_resid_mid", "blocks.0.hook_out", "ln_final.hook_out"):
        with (
            pytest.raises(ArchitectureError, match="does a hook that is set edit the stream"),
            bridge.hooks(fwd_hooks=[(point, lambda x, hook: x + 1)]),
        ):
            direct_logit_attribution(bridge, ids, 7)
    with (
        pytest.raises(ArchitectureError, match="a hook that is set changes what it makes"),
        bridge.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: 2 * x)]),
    ):
        direct_logit_attribution(bridge, ids, 7)
    assert not bridge.registry.live


class _Doubling(nn.Linear):
    """A linear head that is no plain matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


def test_any_linear_head(tiny: Any, ids: Tensor) -> None:
    """The head itself is asked what it does; its weights are not looked at."""
    from lensbridge import TransformerBridge

    model: Any = tiny("llama")
    model.lm_head = _Doubling(64, 160)
    bridge = TransformerBridge(model)
    found = direct_logit_attribution(bridge, ids, [3, 5])
    logits = logits_of(bridge, input_ids=ids)[:, -1]
    assert miss(found, logits[torch.arange(2), torch.tensor([3, 5])]) < FLOAT
    head = 2 * model.lm_head.bias.detach()[[3, 5]] + 1
    assert torch.allclose(found["unembed.bias"], head, atol=1e-6)


def test_half_precision(tiny: Any, ids: Tensor) -> None:
    """The parts of a bfloat16 model are summed in float32 and miss its logit by its own rounding."""
    from lensbridge import TransformerBridge

    found = direct_logit_attribution(TransformerBridge(tiny("llama").bfloat16()), ids, 7)
    assert found.contributions.dtype == torch.float32
    assert miss(found, found.logits) < 2e-2
    full = direct_logit_attribution(TransformerBridge(tiny("llama")), ids, 7)
    assert float((found.contributions - full.contributions).abs().max()) < 0.05 * float(
        full.contributions.abs().max()
    )


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(around: Any, tiny: Any, ids: Tensor) -> None:
    """Whatever the caller is in, and offloaded: the same numbers, nothing changed, nothing kept."""
    from accelerate import cpu_offload

    from lensbridge import TransformerBridge

    model = tiny("gpt2")
    model.transformer.wte.weight.requires_grad_(False)  # the head's, too
    bridge = TransformerBridge(model)
    trains = [p.requires_grad for p in model.parameters()]
    expected = direct_logit_attribution(bridge, ids, 7, per_head=True)
    with around():
        found = direct_logit_attribution(bridge, ids, 7, per_head=True)
    assert torch.equal(found.contributions, expected.contributions)
    assert not found.contributions.requires_grad
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(p.grad is None for p in model.parameters())
    assert not bridge.registry.live
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    offloaded = TransformerBridge(cpu_offload(tiny("gpt2"), execution_device=torch.device("cpu")))
    assert next(offloaded.parameters()).is_meta
    found = direct_logit_attribution(offloaded, ids, 7, per_head=True)
    assert torch.equal(found.contributions, expected.contributions)
