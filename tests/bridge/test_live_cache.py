"""return_cache: what a generation computed, at the positions of the text it returned.

Every value is held against one run over the returned tokens (which is what the same model would compute), or
against plain PyTorch hooks during Hugging Face's own loop (which is what it did compute).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from lensbridge import InputError, LensError, TransformerBridge

FAMILIES = [
    "gpt2",
    "llama",
    "qwen3",
    "phi3",
    "gpt_neox",
    "bloom",
    "opt",
    "mistral",
    "gemma2",
    "gemma3_text",
    "llama4_text",
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "mamba",
    "mamba2",
    "jamba",
    "lfm2",
]
"""Learned, rotary and relative positions; windows and chunks; experts; sinks; state spaces and hybrids."""


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def prompts(generation: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask of three prompts padded in front, [3, 8]."""
    return generation.prompts()


@pytest.fixture
def check(generation: Any, prompts: Any) -> Callable[..., Any]:
    """``check(bridge, **options)``: tokens are Hugging Face's, every point that of one run; gives the cache."""
    ids, mask = prompts

    def run(bridge: Any, without: Any = (), seed: int = 0, **given: Any) -> Any:
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, **given}
        theirs = dict(options)
        if not theirs.pop("use_past_kv_cache", True):
            theirs["use_cache"] = False
        if options["do_sample"]:
            theirs["top_k"] = 0
        with generation.generator_state(seed):
            wanted = bridge.original_model.generate(ids, **theirs)
        with generation.generator_state(seed):
            out, cache = bridge.generate(
                ids, return_cache=True, names_filter=generation.everything, **options
            )
        assert torch.equal(out, wanted)
        assert torch.equal(cache.tokens, out)
        full = {"attention_mask": cache.mask, "names_filter": generation.everything}
        _, again = bridge.run_with_cache(out, **full)
        assert generation.differing(cache, again, without) == {}
        return cache

    return run


# --- point by point ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_point(wrapped: Any, check: Any, prompts: Any, name: str) -> None:
    """Three prompts of unequal length: every point, at real positions, as in one run over the answer."""
    cache = check(wrapped(name), min_new_tokens=5)
    assert cache.left_out == {}
    assert torch.equal(cache.mask[:, :8], prompts[1])
    assert cache.mask[:, 8:].all()
    assert cache.mask.shape == (3, 13)


STATIC = {"cache_implementation": "static"}
TWICE = {"do_sample": True, "num_return_sequences": 2}
# A state space forgets the chunk before, so of a prompt in chunks one run computes something else.
WAYS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"use_past_kv_cache": False}) for name in ("gpt2", "gemma2", "jamba")),
    *((name, {"prefill_chunk_size": 3}) for name in ("gpt2", "gemma2", "mixtral")),
    *((name, STATIC) for name in ("gpt2", "llama", "deepseek_v3", "jamba")),
    ("llama", {**STATIC, "prefill_chunk_size": 3}),
    *((name, TWICE) for name in ("gpt2", "gemma2", "jamba")),
    ("mixtral", {**STATIC, **TWICE}),
    ("llama", {"max_new_tokens": 1}),
    ("llama", {"repetition_penalty": 2.0}),
]


@pytest.mark.parametrize(("name", "given"), WAYS, ids=str)
def test_ways_to_generate(wrapped: Any, check: Any, name: str, given: dict[str, Any]) -> None:
    """Keys and values not kept, or kept in a fixed store; prompts read in chunks; rows repeated; one token."""
    cache = check(wrapped(name), **{"max_new_tokens": 3, **given})
    assert cache.left_out == {}


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "llama4_text"])
def test_windows_in_a_fixed_store(wrapped: Any, check: Any, name: str) -> None:
    """With a static cache and a text longer than the window, patterns lie at the keys they are of."""
    check(wrapped(name), cache_implementation="static")


def test_nothing_new(wrapped: Any, generation: Any, prompts: Any) -> None:
    """max_new_tokens=0: the prompt is read once, and the cache is that of run_with_cache."""
    ids, mask = prompts
    for name in ("gpt2", "gemma2", "jamba"):
        given = {"attention_mask": mask, "names_filter": generation.everything}
        out, cache = wrapped(name).generate(ids, max_new_tokens=0, return_cache=True, **given)
        assert torch.equal(out, ids)
        assert torch.equal(cache.mask, mask)
        _, again = wrapped(name).run_with_cache(ids, **given)
        assert generation.differing(cache, again) == {}


@pytest.mark.parametrize("name", ["gpt2", "mistral", "jamba"])
def test_all_positions_of_an_output_object(
    wrapped: Any, generation: Any, ids: Tensor, name: str
) -> None:
    """With output_logits the cache has the head at every position, the object each step's logits as before."""
    given = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4, "output_logits": True}
    bare = wrapped(name).generate(ids, **given)
    found, cache = wrapped(name).generate(ids, return_cache=True, **given)
    assert torch.equal(found.sequences, bare.sequences)
    for step, (logits, wanted) in enumerate(zip(found.logits, bare.logits, strict=True)):
        assert logits.shape == wanted.shape == (2, 160)
        assert generation.gap(logits, wanted) < 1e-5
        assert torch.equal(cache["unembed.hook_out"][:, 8 + step], logits)
    assert cache["unembed.hook_out"].shape == (2, 13, 160)
    _, again = wrapped(name).run_with_cache(found.sequences)
    assert generation.differing(cache, again) == {}


def test_the_past_that_comes_back_ends_before_the_last_token(
    wrapped: Any, generation: Any, ids: Tensor
) -> None:
    """Reading the last token for the cache leaves no trace in the past_key_values of the answer."""
    bridge = wrapped("llama")
    given = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    bare = bridge.original_model.generate(ids, **given).past_key_values
    out, cache = bridge.generate(ids, return_cache=True, **given)
    assert cache["blocks.0.hook_out"].shape[1] == 13
    for layer, wanted in zip(out.past_key_values.layers, bare.layers, strict=True):
        assert generation.gap(layer.keys, wanted.keys) < 1e-5
        assert generation.gap(layer.values, wanted.values) < 1e-5
    assert bare.get_seq_length() == 12


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_modes(wrapped: Any, generation: Any, ids: Tensor, mode: Any) -> None:
    """Where graphs are built none is kept; in inference mode the same values."""
    bridge = wrapped("llama")
    given = {"max_new_tokens": 3, "do_sample": False, "return_cache": True}
    with mode():
        _, cache = bridge.generate(ids, **given)
    assert not any(value.requires_grad for value in cache.values())
    _, wanted = bridge.generate(ids, **given)
    assert generation.differing(cache, wanted) == {}


# --- what was computed, not what would be -----------------------------------------------------------------


def block_outputs(generation: Any, plain: Any, bridge: Any, call: Callable[[], Any]) -> Any:
    """What the call returns, and every block's output during it by plain hooks, joined along positions."""
    paths = [block.path for block in bridge.architecture.blocks]
    with generation.blocks_seen(plain, bridge.original_model, paths) as seen:
        out = call()
    return out, [torch.cat(values, dim=1) for values in seen]


@pytest.mark.parametrize("name", ["gpt2", "mistral", "mixtral", "jamba", "mamba"])
def test_is_what_plain_hooks_see(
    wrapped: Any, generation: Any, plain: Any, prompts: Any, name: str
) -> None:
    """Blocks during Hugging Face's own loop: the same values, and one position more, the last token's."""
    bridge = wrapped(name)
    ids, mask = prompts
    given = {"attention_mask": mask, "min_new_tokens": 5}
    wanted, seen = block_outputs(
        generation, plain, bridge, lambda: generation.greedy(bridge.original_model, ids, **given)
    )
    only = {"return_cache": True, "names_filter": "blocks.*.hook_out"}
    out, cache = bridge.generate(ids, max_new_tokens=5, do_sample=False, **only, **given)
    assert torch.equal(out, wanted)
    for layer, values in enumerate(seen):
        assert values.shape[1] == 12
        assert torch.equal(cache["resid_post", layer][:, :12], values)  # padding and all


@pytest.mark.parametrize("given", [{}, {"use_past_kv_cache": False}], ids=["kept", "read again"])
def test_under_an_intervention(
    wrapped: Any, plain: Any, generation: Any, ids: Tensor, given: dict[str, Any]
) -> None:
    """Steering what is generated: the cache is that of a loop written by hand, and not that of a run over it."""
    bridge = wrapped("llama")
    model = bridge.original_model
    vector = 5 * torch.randn(64, generator=torch.Generator().manual_seed(1))

    def steer(x: Tensor, hook: Any) -> None:
        x[:, hook.step.generated] += vector

    with bridge.hooks([("blocks.0.hook_out", steer)]):
        out, cache = bridge.generate(
            ids, max_new_tokens=5, do_sample=False, return_cache=True, stop_at_eos=False, **given
        )
    tokens, new, past = ids, ids, DynamicCache(config=model.config)
    edit = lambda value, count: value + vector if count else None  # noqa: E731
    paths = ["model.layers.0", "model.layers.1"]
    with generation.blocks_seen(plain, model, paths) as seen, plain.watching(model, paths[0], edit):
        for _ in range(5):
            new = model(new, past_key_values=past).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], dim=1)
        logits = model(new, past_key_values=past).logits
    assert torch.equal(out, tokens)
    assert generation.gap(cache["resid_post", 1], torch.cat(seen[1], dim=1)) < 1e-5
    assert generation.gap(cache["resid_pre", 1], torch.cat(seen[0], dim=1)) < 1e-5
    assert generation.gap(cache["unembed.hook_out"][:, -1:], logits) < 1e-5
    # The same edit of a run over the answer touches nothing: there is no step that generates.
    with bridge.hooks([("blocks.0.hook_out", steer)]):
        _, again = bridge.run_with_cache(out)
    assert generation.gap(again["resid_post", 1], cache["resid_post", 1]) > 0.1
    assert not torch.equal(out, generation.greedy(model, ids, eos_token_id=159))


def test_an_edit_in_place_of_a_kept_value(wrapped: Any, ids: Tensor) -> None:
    """A point that is edited is kept as edited; points before it as they were."""
    bridge = wrapped("gpt2")

    def clear(x: Tensor, hook: Any) -> None:
        x[:, hook.step.at(3, 10)] = 0

    given = {"max_new_tokens": 3, "do_sample": False, "return_cache": True}
    with bridge.hooks([("blocks.0.hook_out", clear)]):
        _, cache = bridge.generate(ids, **given)
    cleared = cache["resid_post", 0].abs().sum(-1) == 0
    assert cleared[0].nonzero().flatten().tolist() == [3, 10]
    assert torch.equal(cache["resid_pre", 1], cache["resid_post", 0])
    assert cache["mlp_out", 0][:, [3, 10]].abs().min() > 0


# --- several towers, embeddings, a past -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
@pytest.mark.parametrize(
    "given", [{}, {"cache_implementation": "static"}, {"use_past_kv_cache": False}], ids=str
)
def test_encoder_decoder(tiny: Any, generation: Any, ids: Tensor, name: str, given: Any) -> None:
    """Encoder, decoder and what joins them: every point as in one run over what was read and written."""
    bridge = TransformerBridge(tiny(name, "seq2seq"))
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "decoder_start_token_id": 7,
        "stop_at_eos": False,
    }
    out, cache = bridge.generate(
        ids, return_cache=True, names_filter=generation.everything, **options, **given
    )
    bare = bridge.original_model.generate(
        ids, max_new_tokens=4, do_sample=False, decoder_start_token_id=7, eos_token_id=159
    )
    assert torch.equal(out, bare)
    assert torch.equal(cache.tokens, out)
    assert cache["encoder_blocks.0.hook_out"].shape == (2, 9, 64)
    assert cache["decoder_blocks.1.cross_attn.hook_pattern"].shape[-2:] == (5, 9)
    assert cache["decoder_blocks.1.cross_attn.k.hook_out"].shape[1] == 9
    assert cache["decoder_blocks.1.attn.hook_pattern"].shape[-2:] == (5, 5)
    _, again = bridge.run_with_cache(ids, decoder_input_ids=out, names_filter=generation.everything)
    assert generation.differing(cache, again) == {}


def test_images(tiny: Any, inputs_of: Any, generation: Any) -> None:
    """Pictures are looked at once; their tower and the text behind them are all there."""
    given = inputs_of("llava", "vlm")
    bridge = TransformerBridge(tiny("llava", "vlm"), example=given)
    only = {"names_filter": generation.everything}
    out, cache = bridge.generate(
        **given, max_new_tokens=4, do_sample=False, return_cache=True, **only
    )
    assert torch.equal(
        out, bridge.original_model.generate(**given, max_new_tokens=4, do_sample=False)
    )
    assert any(name.startswith("vision_blocks") for name in cache)
    _, again = bridge.run_with_cache(out, pixel_values=given["pixel_values"], **only)
    assert generation.differing(cache, again) == {}


@pytest.mark.parametrize("name", ["gpt2", "llama", "jamba"])
def test_embeddings(wrapped: Any, generation: Any, ids: Tensor, name: str) -> None:
    """What continues embeddings has their positions too, and no ids for them."""
    bridge = wrapped(name)
    embedded = bridge.original_model.get_input_embeddings()(ids).detach()
    given = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4, "return_cache": True}
    out, cache = bridge.generate(embedded, **given)
    assert cache.tokens is None
    assert cache.mask.shape == (2, 13)
    _, again = bridge.run_with_cache(torch.cat([ids, out], dim=1))
    of_ids = {"embed.hook_in", "embed.hook_out"}
    assert generation.differing(cache, again, of_ids) == {}
    assert set(cache.left_out) == of_ids
    with pytest.raises(LensError, match=r"embed\.hook_out cannot be cached .* position 0.*sink="):
        bridge.generate(embedded, names_filter="embed.hook_out", **given)


def test_going_on_from_a_past(wrapped: Any, generation: Any, ids: Tensor) -> None:
    """With a past of five positions, the cache begins at the fifth; hooks know where they are."""
    bridge = wrapped("llama")
    model = bridge.original_model
    pasts = [DynamicCache(config=model.config) for _ in range(3)]
    for past in pasts:
        model(ids[:, :5], past_key_values=past)
    wanted = generation.greedy(model, ids, 3, past_key_values=pasts[0])
    steps: list[Any] = []

    def note(x: Tensor, hook: Any) -> None:
        step = hook.step
        assert x.shape[1] == len(step.positions)
        steps.append((step.number, step.phase, step.start, step.stop, step.prompt_length))

    given = {"max_new_tokens": 3, "do_sample": False}
    with bridge.hooks([("blocks.0.hook_out", note)]):
        assert torch.equal(bridge.generate(ids, past_key_values=pasts[1], **given), wanted)
    assert steps == [(0, "prefill", 5, 9, 9), (1, "decode", 9, 10, 9), (2, "decode", 10, 11, 9)]
    out, cache = bridge.generate(ids, past_key_values=pasts[2], return_cache=True, **given)
    assert torch.equal(out, wanted)
    assert cache.mask.shape == cache.tokens.shape == (2, 7)
    assert torch.equal(cache.tokens, out[:, 5:])
    _, again = bridge.run_with_cache(out)
    cut = again.apply_slice_to_pos_dim((5, None))
    assert generation.differing(cache, cut) == {}


# --- rows that end early ----------------------------------------------------------------------------------


def test_mask_behind_an_early_end(wrapped: Any, generation: Any, ids: Tensor) -> None:
    """The end still belongs to its row, the padding behind it does not; the other row goes on."""
    bridge = wrapped("mistral")
    free = generation.greedy(bridge.original_model, ids, 6)
    end = int(free[0, 11])
    assert end not in free[0, 9:11]
    assert end not in free[1, 9:]
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    out, cache = bridge.generate(ids, return_cache=True, **given)
    assert out[0, 11:].tolist() == [end] * 4
    assert cache.mask[:, 9:].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert cache.mask[:, :9].all()
    _, again = bridge.run_with_cache(out, attention_mask=cache.mask)
    assert generation.differing(cache, again) == {}
    given |= {"stop_at_eos": False}
    _, whole = bridge.generate(ids[:1], return_cache=True, **given)
    assert whole.mask.tolist() == [[1] * 15]


def test_mask_behind_a_stop_string(demo_bridge: Any) -> None:
    """A row that ended at a string is padded behind it, though no end-of-sequence token was drawn."""
    texts = ["The cat", "When Mary and John went to the store, John gave a"]
    given = {"max_new_tokens": 8, "do_sample": False, "return_type": "tokens"}
    out, cache = demo_bridge.generate(texts, stop_strings=" hat", return_cache=True, **given)
    pad = demo_bridge.tokenizer.pad_token_id
    ends = [row.tolist().index(pad) if pad in row else len(row) for row in out[:, -8:]]
    assert ends[1] < ends[0] <= 8
    for row, end in enumerate(ends):
        assert cache.mask[row, -8:].tolist() == [1] * end + [0] * (8 - end)


# --- what cannot be kept ----------------------------------------------------------------------------------


def test_points_that_do_not_line_up(wrapped: Any, check: Any, prompts: Any) -> None:
    """A convolution's tail has more entries than the pass: left out with the reason; by name, an error."""
    name = "blocks.0.mixer.conv.hook_out"
    bridge = wrapped("recurrent_gemma")
    cache = check(bridge, without=[name])
    assert cache.left_out == {name: "11 entries in a pass over 8"}
    assert name not in cache
    with pytest.raises(LensError, match=r"not in this cache: .*11 entries"):
        cache[name]
    ids, mask = prompts
    given = {"attention_mask": mask, "max_new_tokens": 3, "return_cache": True}
    with pytest.raises(LensError, match=rf"{name} cannot be cached .*11 entries.*sink="):
        bridge.generate(ids, names_filter=name, **given)


def test_a_sink_takes_what_does_not_line_up(
    wrapped: Any, generation: Any, plain: Any, prompts: Any
) -> None:
    """As the error without a sink says: pieces come as they are, at no positions, as plain hooks see them."""
    bridge = wrapped("recurrent_gemma")
    ids, mask = prompts
    pieces: list[Any] = []
    given = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    bridge.generate(
        ids,
        names_filter="blocks.0.mixer.conv.hook_out",
        sink=lambda name, x, positions: pieces.append((positions, x)),
        **given,
    )
    path = f"{bridge.architecture.blocks[0].path}.temporal_block.conv_1d"
    with generation.blocks_seen(plain, bridge.original_model, [path]) as seen:
        bridge.original_model.generate(ids, **given)
    assert [x.shape for _, x in pieces] == [x.shape for x in seen[0]]
    assert all(torch.equal(x, y) for (_, x), y in zip(pieces, seen[0], strict=True))
    assert {positions for positions, _ in pieces} == {None}


def test_heads_that_see_the_last_position_only(wrapped: Any, check: Any, ids: Tensor) -> None:
    """A model whose loop computes one position of logits, whatever is asked, has no head for the prompt."""
    heads = ["unembed.hook_in", "unembed.hook_out"]
    cache = check(wrapped("falcon_h1"), without=heads)
    assert sorted(cache.left_out) == heads
    with pytest.raises(LensError, match="nothing at position 0"):
        wrapped("falcon_h1").generate(
            ids, max_new_tokens=2, return_cache=True, names_filter="unembed.hook_out"
        )
    _, late = wrapped("falcon_h1").generate(
        ids, max_new_tokens=3, return_cache=True, names_filter=heads, pos_slice=slice(-4, None)
    )
    assert late["unembed.hook_out"].shape[:2] == (2, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_beams": 2}, "during beam search"),
        ({"num_beams": 2, "do_sample": True}, "during beam sample"),
        ({"prompt_lookup_num_tokens": 2}, "during assisted generation"),
        ({"custom_generate": print}, "during custom generate"),
    ],
    ids=["beams", "drawn beams", "guesses", "the caller's own"],
)
def test_searches_that_take_back(wrapped: Any, ids: Tensor, given: Any, words: str) -> None:
    """Beams and guesses are refused before anything runs, with the reason and what to do."""
    bridge = wrapped("llama")
    ran: list[str] = []
    options = {"max_new_tokens": 3, "do_sample": False, **given}
    with bridge.hooks([("blocks.0.hook_in", lambda x, hook: ran.append(hook.name))]):
        for more in ({"return_cache": True}, {"sink": lambda name, x, step: None}):
            with pytest.raises(InputError, match=f"{words}: .*run_with_cache.*num_beams=1"):
                bridge.generate(ids[:1], **options, **more)
    assert not ran
