"""Runs that go on from keys, values and states kept earlier: right values, and the caller's past left whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from lensbridge import TransformerBridge

FIRST = 5
"""How many positions the past holds before each run."""


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=20)


@pytest.fixture(params=[dynamic, static], ids=["dynamic", "static"])
def new_past(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Makes an empty past, growing or of fixed size."""
    return request.param


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def bridge(request: pytest.FixtureRequest, wrapped: Any) -> TransformerBridge:
    """A bridge around a tiny model, shared; no test here leaves anything on it."""
    return wrapped(request.param)


@pytest.fixture
def model(bridge: TransformerBridge) -> Any:
    """The model of `bridge`."""
    return bridge.original_model


@pytest.fixture
def past(model: Any, new_past: Any, ids: Tensor) -> Any:
    """What the bare model kept of the first positions of `ids`."""
    kept = new_past(model)
    model(ids[:, :FIRST], past_key_values=kept)
    return kept


def copied(value: Any) -> Any:
    """A copy of tensors, also in dictionaries and lists."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def equal(left: Any, right: Any) -> bool:
    """Whether two copies hold the same."""
    if isinstance(left, dict):
        return set(left) == set(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def held(past: Any) -> Any:
    """A copy of all that a past holds."""
    return [copied(vars(layer)) for layer in past.layers]


def is_as(past: Any, before: Any) -> bool:
    """Whether a past holds what a copy of it does, attribute by attribute."""
    return equal(held(past), before)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "mixtral", "bloom"])
def test_the_rest_of_a_run(wrapped: Any, generation: Any, ids: Tensor, name: str) -> None:
    """From a past of five positions, every point shows the rest of the whole run; the past grows."""
    bridge = wrapped(name)
    full, whole = bridge.run_with_cache(ids, names_filter=generation.everything)
    kept = dynamic(bridge.original_model)
    bridge(ids[:, :FIRST], past_key_values=kept)
    logits, cache = bridge.run_with_cache(
        ids[:, FIRST:], past_key_values=kept, names_filter=generation.everything
    )
    assert generation.gap(logits, full[:, FIRST:]) < 1e-5
    assert kept.get_seq_length() == 9
    wrong = {}
    # Keys that are rotated, or of a window, may come with those of the past or without.
    for point in cache:
        axes = bridge.registry[point].axes.split()
        dim = axes.index("query" if "query" in axes else "pos")
        value, wanted = cache[point], whole[point].narrow(dim, FIRST, 9 - FIRST)
        if axes[-2:] == ["query", "key"]:
            wanted = wanted[..., -value.shape[-1] :]
        value = value.narrow(dim, value.shape[dim] - (9 - FIRST), 9 - FIRST)
        gap = generation.gap(*torch.broadcast_tensors(value, wanted))
        if gap > 1e-5:
            wrong[point] = gap
    assert wrong == {}
    assert set(cache) == set(whole)


def test_padded(wrapped: Any, generation: Any) -> None:
    """With padding in front, the mask covers the past too; positions go on where they were."""
    ids, mask = generation.prompts()
    for name in ("gpt2", "llama"):
        bridge = wrapped(name)
        full, whole = bridge.run_with_cache(ids, attention_mask=mask)
        kept = dynamic(bridge.original_model)
        bridge(ids[:, :FIRST], attention_mask=mask[:, :FIRST], past_key_values=kept)
        logits, cache = bridge.run_with_cache(
            ids[:, FIRST:], attention_mask=mask, past_key_values=kept
        )
        real = mask[:, FIRST:].bool()
        assert generation.gap(logits[real], full[:, FIRST:][real]) < 1e-5
        for layer in range(2):
            value, wanted = cache["resid_post", layer], whole["resid_post", layer][:, FIRST:]
            assert generation.gap(value[real], wanted[real]) < 1e-5


def test_steps(bridge: Any, past: Any, ids: Tensor) -> None:
    """hook.step counts from where the past ends; one token more is a decoding step."""
    seen: list[Any] = []

    def note(x: Tensor, hook: Any) -> None:
        step = hook.step
        seen.append((step.number, step.phase, step.start, step.stop))
        assert x.shape[1] == len(step.positions)
        assert step.at(6) == ([6 - step.start] if step.start <= 6 < step.stop else [])

    with bridge.hooks([("blocks.1.hook_out", note)]):
        bridge(ids[:, 5:8], past_key_values=past)
        bridge(ids[:, 8:], past_key_values=past)
        bridge(ids)
    assert seen == [(0, "prefill", 5, 8), (0, "decode", 8, 9), (0, "prefill", 0, 9)]


def test_an_edit(
    bridge: Any, model: Any, new_past: Any, past: Any, plain: Any, ids: Tensor
) -> None:
    """An edit of a run that goes on is the same edit by a plain hook, and what it wrote is in the past."""
    again = new_past(model)
    model(ids[:, :FIRST], past_key_values=again)
    path = bridge.architecture.blocks[0].path
    found = bridge.run_with_hooks(
        ids[:, FIRST:],
        past_key_values=past,
        fwd_hooks=[("blocks.0.hook_out", lambda x, hook: x * 0.5)],
    )
    with plain.watching(model, path, lambda x, count: x * 0.5):
        wanted = model(ids[:, FIRST:], past_key_values=again).logits
    assert torch.equal(found, wanted)
    assert is_as(past, held(again))


# --- stopping early, starting late ------------------------------------------------------------------------


def test_stop_at_layer(bridge: Any, generation: Any, past: Any, ids: Tensor) -> None:
    """The stream of the full run, and a past in which nothing has changed: layers behind never got their part."""
    _, whole = bridge.run_with_cache(ids, names_filter=["blocks.*.hook_in", "blocks.1.hook_out"])
    before = held(past)
    for stop, name in ((0, "blocks.0.hook_in"), (1, "blocks.1.hook_in"), (2, "blocks.1.hook_out")):
        residual = bridge(ids[:, FIRST:], past_key_values=past, stop_at_layer=stop)
        assert generation.gap(residual, whole[name][:, FIRST:]) < 1e-5
        assert is_as(past, before)
    _, cache = bridge.run_with_cache(ids[:, FIRST:], past_key_values=past, stop_at_layer=1)
    assert generation.gap(cache["resid_post", 0], whole["resid_pre", 1][:, FIRST:]) < 1e-5
    assert is_as(past, before)


def test_start_at_layer(bridge: Any, generation: Any, past: Any, ids: Tensor) -> None:
    """The logits of the full run, a past in which nothing has changed, and which can still be gone on from."""
    full, whole = bridge.run_with_cache(ids, names_filter="blocks.1.hook_in")
    before = held(past)
    residual = whole["resid_pre", 1][:, FIRST:]
    for _ in range(2):
        found = bridge(residual, past_key_values=past, start_at_layer=1)
        assert generation.gap(found, full[:, FIRST:]) < 1e-5
        assert is_as(past, before)
    found = bridge(ids[:, FIRST:], past_key_values=past)
    assert generation.gap(found, full[:, FIRST:]) < 1e-5
    assert int(past.get_seq_length()) == 9


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba"])
def test_states(wrapped: Any, generation: Any, ids: Tensor, name: str) -> None:
    """A state space goes on from its states, which a run that stops early leaves as they were."""
    bridge = wrapped(name)
    model = bridge.original_model
    given = {"use_cache": True, "return_dict": True}
    kept = model(ids[:, :-1], **given).cache_params
    before = held(kept)
    _, whole = bridge.run_with_cache(ids, names_filter="blocks.*.hook_in")
    for _ in range(2):
        residual = bridge(ids[:, -1:], cache_params=kept, use_cache=True, stop_at_layer=1)
        assert generation.gap(residual, whole["resid_pre", 1][:, -1:]) < 1e-4
        assert is_as(kept, before)
    logits = bridge(ids[:, -1:], cache_params=kept, use_cache=True)
    assert generation.gap(logits, model(ids).logits[:, -1:]) < 1e-4
    assert not is_as(kept, before)


# --- a run that fails -------------------------------------------------------------------------------------


def fail(x: Tensor, hook: Any) -> None:
    raise RuntimeError("boom")


@pytest.mark.parametrize("point", ["blocks.0.hook_out", "blocks.1.hook_out", "unembed.hook_out"])
def test_a_failing_hook(bridge: Any, model: Any, ids: Tensor, generation: Any, point: str) -> None:
    """A growing past is as before the run, in every layer, and the run can be made again."""
    past = dynamic(model)
    model(ids[:, :FIRST], past_key_values=past)
    before = held(past)
    with bridge.hooks([(point, fail)]), pytest.raises(RuntimeError, match="boom"):
        bridge(ids[:, FIRST:], past_key_values=past)
    assert is_as(past, before)
    found = bridge(ids[:, FIRST:], past_key_values=past)
    assert generation.gap(found, model(ids).logits[:, FIRST:]) < 1e-5
    assert past.get_seq_length() == 9


def test_a_failing_first_run(wrapped: Any, ids: Tensor) -> None:
    """An empty past is empty again."""
    bridge = wrapped("llama")
    past = dynamic(bridge.original_model)
    with bridge.hooks([("blocks.1.hook_out", fail)]), pytest.raises(RuntimeError, match="boom"):
        bridge(ids, past_key_values=past)
    assert past.get_seq_length() == 0
    assert torch.equal(bridge(ids, past_key_values=past), bridge.original_model(ids).logits)


def test_a_failing_window(wrapped: Any, ids: Tensor) -> None:
    """A window that has dropped keys has them again."""
    bridge = wrapped("mistral")
    model = bridge.original_model
    assert model.config.sliding_window < 8
    past = dynamic(model)
    model(ids[:, :8], past_key_values=past)
    before = held(past)
    with bridge.hooks([("blocks.1.hook_out", fail)]), pytest.raises(RuntimeError, match="boom"):
        bridge(ids[:, 8:], past_key_values=past)
    assert is_as(past, before)


def test_a_failing_decoder(tiny: Any, ids: Tensor) -> None:
    """The two halves of an encoder-decoder's past are both as before."""
    bridge = TransformerBridge(tiny("bart", "seq2seq"))
    past = EncoderDecoderCache(DynamicCache(), DynamicCache())
    start = ids[:, :3]
    bridge(ids, decoder_input_ids=start, past_key_values=past)
    halves = past.self_attention_cache, past.cross_attention_cache
    before = [held(half) for half in halves]
    with (
        bridge.hooks([("decoder_blocks.1.hook_out", fail)]),
        pytest.raises(RuntimeError, match="boom"),
    ):
        bridge(ids, decoder_input_ids=ids[:, 3:4], past_key_values=past)
    assert [is_as(half, kept) for half, kept in zip(halves, before, strict=True)] == [True, True]
    found = bridge(ids, decoder_input_ids=ids[:, 3:4], past_key_values=past)
    wanted = bridge(ids, decoder_input_ids=ids[:, :4])[:, 3:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [False, True])
def test_a_failing_generation(wrapped: Any, ids: Tensor, cache: bool) -> None:
    """The past that generate was given is as it was, though some steps had gone well."""
    bridge = wrapped("llama")
    model = bridge.original_model
    past = dynamic(model)
    model(ids[:, :FIRST], past_key_values=past)
    before = held(past)

    def third(x: Tensor, hook: Any) -> None:
        if hook.step.number == 3:
            raise RuntimeError("boom")

    with bridge.hooks([("blocks.0.hook_out", third)]), pytest.raises(RuntimeError, match="boom"):
        bridge.generate(ids, max_new_tokens=5, past_key_values=past, return_cache=cache)
    assert is_as(past, before)


def test_a_cached_generation_gives_the_past_one_token_less(wrapped: Any, ids: Tensor) -> None:
    """The caller's past ends where Hugging Face's loop leaves it, though the last token was read too."""
    bridge = wrapped("llama")
    model = bridge.original_model
    pasts = [dynamic(model) for _ in range(2)]
    for past in pasts:
        model(ids[:, :FIRST], past_key_values=past)
    given = {"max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(ids, past_key_values=pasts[0], **given)
    out, cache = bridge.generate(
        ids, past_key_values=pasts[1], return_cache=True, names_filter="blocks.*.hook_out", **given
    )
    assert torch.equal(out, wanted)
    assert cache["resid_post", 0].shape[1] == 13 - FIRST
    assert pasts[1].get_seq_length() == 12
    assert is_as(pasts[1], held(pasts[0]))
