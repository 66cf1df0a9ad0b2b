"""generate: the tokens of Hugging Face's own loop, hooks or none; how the next one is chosen; when it ends."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lensbridge import InputError, TransformerBridge

FAMILIES = [
    "gpt2",
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt_neox",
    "bloom",
    "opt",
    "mixtral",
    "gpt_oss",
    "mamba",
    "jamba",
    "recurrent_gemma",
]
"""Learned, rotary, relative and sliding positions; parallel blocks; experts; sinks; state spaces."""

Greedy = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def bridge(wrapped: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A bridge around a tiny Mistral, shared; no test here leaves anything on it."""
    return wrapped("mistral")


@pytest.fixture
def model(bridge: TransformerBridge) -> Any:
    """The model of `bridge`."""
    return bridge.original_model


@pytest.fixture
def greedy(generation: Any) -> Greedy:
    """``greedy(model, ids)``: Hugging Face's own answer."""
    return generation.greedy


@pytest.fixture
def prompts(generation: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask of three prompts padded in front, [3, 8]."""
    return generation.prompts()


@pytest.fixture
def seeded(generation: Any) -> Any:
    """A context in which draws begin at a seed."""
    return generation.generator_state


# --- the loop is Hugging Face's ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_is_hugging_faces(wrapped: Any, tiny: Any, generation: Any, ids: Tensor, name: str) -> None:
    """The tokens and each step's logits of a model that was never wrapped, bit for bit."""
    given = {"output_logits": True, "min_new_tokens": 5}
    wanted = generation.greedy(tiny(name), ids, return_dict_in_generate=True, **given)
    found = wrapped(name).generate(ids, max_new_tokens=5, do_sample=False, **given)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.sequences.shape == (2, 14)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_every_point_changes_nothing(
    wrapped: Any, tiny: Any, generation: Any, ids: Tensor, name: str
) -> None:
    """With a function on every point: the same tokens, and each point of a plain run is heard at each step."""
    bridge = wrapped(name)
    heard: dict[int, set[str]] = {}
    _, cache = bridge.run_with_cache(ids, names_filter=generation.everything)

    def read(x: Tensor, hook: Any) -> None:
        heard.setdefault(hook.step.number, set()).add(hook.name)

    with bridge.hooks([(generation.everything, read)]):
        found = bridge.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4)
    assert torch.equal(found, generation.greedy(tiny(name), ids, 4, min_new_tokens=4))
    # A convolution over a kept state, one position at a time, is no call of its module.
    later = {n for n in cache if "mixer.conv" not in n}
    assert heard[0] == set(cache)
    assert all(heard[number] >= later for number in (1, 2, 3))
    assert sorted(heard) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "mamba", "jamba"])
def test_edits_act_at_every_step(
    wrapped: Any, tiny: Any, generation: Any, plain: Any, ids: Tensor, name: str
) -> None:
    """An edit of a block's output at every step is the same edit by a plain hook on the block."""
    bridge, model = wrapped(name), tiny(name)
    path = bridge.architecture.blocks[0].path
    with bridge.hooks([("blocks.0.hook_out", lambda x, hook: x.roll(1, -1) * 2)]):
        found = bridge.generate(ids, max_new_tokens=5, do_sample=False, min_new_tokens=5)
    with plain.watching(model, path, lambda value, count: value.roll(1, -1) * 2):
        wanted = generation.greedy(model, ids, min_new_tokens=5)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, generation.greedy(model, ids, min_new_tokens=5))


def test_edits_of_some_steps(
    bridge: Any, model: nn.Module, greedy: Greedy, plain: Any, ids: Tensor
) -> None:
    """hook.step tells the prompt from what is generated, as counting the calls of a plain hook does."""

    def late(x: Tensor, hook: Any) -> None:
        x[:, hook.step.generated] *= -3

    with bridge.hooks([("blocks.0.hook_out", late)]):
        found = bridge.generate(ids, max_new_tokens=6, do_sample=False)
    with plain.watching(model, "model.layers.0", lambda x, count: x * -3 if count else None):
        assert torch.equal(found, greedy(model, ids, 6))

    def third(x: Tensor, hook: Any) -> Tensor | None:
        return x * -3 if hook.step.number == 3 else None

    with bridge.hooks([("blocks.0.hook_out", third)]):
        found = bridge.generate(ids, max_new_tokens=6, do_sample=False)
    with plain.watching(model, "model.layers.0", lambda x, count: x * -3 if count == 3 else None):
        assert torch.equal(found, greedy(model, ids, 6))
    assert not torch.equal(found, greedy(model, ids, 6))


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, [(0, 0, 9), (1, 9, 10), (2, 10, 11), (3, 11, 12)]),
        ({"use_past_kv_cache": False}, [(0, 0, 9), (1, 0, 10), (2, 0, 11), (3, 0, 12)]),
        ({"cache_implementation": "static"}, [(0, 0, 9), (1, 9, 10), (2, 10, 11), (3, 11, 12)]),
        (
            {"prefill_chunk_size": 4},
            [(0, 0, 4), (0, 4, 8), (0, 8, 9), (1, 9, 10), (2, 10, 11), (3, 11, 12)],
        ),
    ],
    ids=["plain", "no cache", "static", "chunks"],
)
def test_steps(bridge: Any, ids: Tensor, given: Any, steps: Any) -> None:
    """Number and positions of each pass, the widths of the tensors, the phase and the prompt's length."""
    seen: list[Any] = []

    def note(x: Tensor, hook: Any) -> None:
        assert hook.step.prompt_length == 9
        assert x.shape[1] == len(hook.step.positions)
        assert hook.step.phase == ("decode" if hook.step.number else "prefill")
        seen.append((hook.step.number, hook.step.start, hook.step.stop))

    with bridge.hooks([("blocks.1.hook_out", note)]):
        bridge.generate(ids, max_new_tokens=4, do_sample=False, **given)
    assert seen == steps


def test_steps_of_the_head(bridge: Any, ids: Tensor) -> None:
    """The head sees the last position of the prompt only, and its step says which that is."""
    seen: list[Any] = []

    def note(x: Tensor, hook: Any) -> None:
        assert x.shape[1] == len(hook.step.positions)
        seen.append((hook.step.number, hook.step.positions))

    with bridge.hooks([("unembed.hook_out", note)]):
        bridge.generate(ids, max_new_tokens=3, do_sample=False)
        bridge(ids)
    assert seen == [(0, range(8, 9)), (1, range(9, 10)), (2, range(10, 11)), (0, range(9))]


def test_steps_of_other_runs(bridge: Any, ids: Tensor) -> None:
    """A forward is one prefill; the model called without the bridge has no step, and says so."""
    from lensbridge import LensError

    seen: list[Any] = []
    hooks = [("blocks.1.hook_out", lambda x, hook: seen.append(hook.step))]
    bridge.run_with_hooks(ids, fwd_hooks=hooks)
    assert (seen[0].number, seen[0].phase, seen[0].positions) == (0, "prefill", range(9))
    with bridge.hooks(hooks), pytest.raises(LensError, match="no step now"):
        bridge.original_model(ids)


# --- how the next token is chosen -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"repetition_penalty": 1.5}],
    ids=lambda given: next(iter(given), "plain"),
)
@pytest.mark.parametrize("hooked", [False, True])
def test_sampling(
    bridge: Any, model: Any, ids: Tensor, seeded: Any, given: Any, hooked: bool
) -> None:
    """With one seed, Hugging Face's draws; it is told top_k=0 where nobody asked to cut."""
    with seeded(3):
        wanted = model.generate(ids, max_new_tokens=8, do_sample=True, **{"top_k": 0, **given})
    hooks = [("**.hook_out", lambda x, hook: None)] if hooked else []
    with seeded(3), bridge.hooks(hooks):
        found = bridge.generate(ids, max_new_tokens=8, **given)
    assert torch.equal(found, wanted)
    with seeded(4):
        assert not torch.equal(found, bridge.generate(ids, max_new_tokens=8, **given))


def test_nothing_is_cut_unasked(bridge: Any, model: Any, ids: Tensor, seeded: Any) -> None:
    """Draws reach beyond the 50 likeliest, where transformers' own default stops."""
    given = {"max_new_tokens": 1, "temperature": 50.0, "num_return_sequences": 300}
    best = set(model(ids[:1]).logits[0, -1].topk(50).indices.tolist())
    with seeded(0):
        drawn = set(bridge.generate(ids[:1], **given)[:, -1].tolist())
    with seeded(0):
        theirs = set(model.generate(ids[:1], do_sample=True, **given)[:, -1].tolist())
    assert theirs <= best
    assert len(drawn - best) > 50


def test_what_the_checkpoint_cuts(fresh: Any, ids: Tensor, seeded: Any) -> None:
    """The checkpoint's own top_k holds unless another is given."""
    bridge = fresh("mistral")
    bridge.original_model.generation_config.top_k = 3
    given = {"max_new_tokens": 1, "temperature": 50.0, "num_return_sequences": 100}
    best = bridge.original_model(ids[:1]).logits[0, -1].topk(3).indices.tolist()
    with seeded(0):
        assert set(bridge.generate(ids[:1], **given)[:, -1].tolist()) == set(best)
        assert len(set(bridge.generate(ids[:1], top_k=0, **given)[:, -1].tolist())) > 20


@pytest.mark.parametrize("temperature", [0, 0.0])
def test_temperature_zero(
    bridge: Any, model: Any, greedy: Greedy, ids: Tensor, temperature: Any
) -> None:
    """The likeliest token, also where drawing was asked for."""
    found = bridge.generate(ids, max_new_tokens=5, temperature=temperature, do_sample=True)
    assert torch.equal(found, greedy(model, ids))


@pytest.mark.parametrize("padded", [False, True])
def test_freq_penalty(bridge: Any, model: Any, prompts: Any, padded: bool) -> None:
    """Each earlier occurrence in the row, prompt included and padding not, lowers a logit by the penalty."""
    penalty = 6.0
    ids, mask = prompts
    ids = ids.clone()
    ids[:, 3:6] = torch.tensor([[7, 7, 9]])
    mask = mask if padded else torch.ones_like(mask)
    found = bridge.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        stop_at_eos=False,
        freq_penalty=penalty,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    tokens, full = ids, mask
    for logits, scores in zip(found.logits, found.scores, strict=True):
        wanted = logits.clone()
        for row in range(3):
            for place in range(tokens.shape[1]):
                wanted[row, tokens[row, place]] -= penalty * float(full[row, place])
        torch.testing.assert_close(scores, wanted)
        tokens = torch.cat([tokens, wanted.argmax(-1, keepdim=True)], dim=1)
        full = torch.cat([full, torch.ones_like(full[:, :1])], dim=1)
    assert torch.equal(found.sequences, tokens)
    bare = bridge.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, stop_at_eos=False
    )
    assert not torch.equal(found.sequences, bare)


def test_freq_penalty_of_several_continuations(bridge: Any, prompts: Any, seeded: Any) -> None:
    """Each continuation of a padded prompt counts for itself; a forbidding penalty repeats nothing."""
    ids, mask = prompts
    given = {"attention_mask": mask, "num_return_sequences": 2, "max_new_tokens": 8}
    with seeded(1):
        found = bridge.generate(ids, freq_penalty=1000.0, stop_at_eos=False, **given)
    for row, new in enumerate(found[:, 8:].tolist()):
        real = ids[row // 2][mask[row // 2].bool()].tolist()
        assert len(set(new)) == 8
        assert not set(new) & set(real)


def test_freq_penalty_behind_embeddings(bridge: Any, model: Any, prompts: Any) -> None:
    """Where the prompt has no ids, padded or not, what is generated is counted alone."""
    ids, mask = prompts
    embedded = model.get_input_embeddings()(ids)
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    found = bridge.generate(embedded, freq_penalty=1000.0, stop_at_eos=False, **given)
    assert all(len(set(row)) == 8 for row in found.tolist())


def test_repetition_penalty(bridge: Any, model: Any, greedy: Greedy, ids: Tensor) -> None:
    """Hugging Face's own, which changes what this model says."""
    found = bridge.generate(ids, max_new_tokens=8, do_sample=False, repetition_penalty=3.0)
    assert torch.equal(found, greedy(model, ids, 8, repetition_penalty=3.0))
    assert not torch.equal(found, greedy(model, ids, 8))


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["beams", "beams returned", "lookup"],
)
def test_other_searches(bridge: Any, model: Any, generation: Any, ids: Tensor, given: Any) -> None:
    """Beams and assisted decoding run with hooks; each pass is as wide as its step says."""
    row = torch.cat([ids[:1]] * 3, dim=1)  # repeats itself, so that looking up finds something
    widths: list[int] = []

    def read(x: Tensor, hook: Any) -> None:
        widths.append(x.shape[1])
        assert x.shape[1] == len(hook.step.positions)

    with bridge.hooks([("blocks.*.hook_out", read)]):
        found = bridge.generate(row, max_new_tokens=6, do_sample=False, **given)
    assert torch.equal(found, generation.greedy(model, row, 6, **given))
    assert len(widths) > 4


def test_assistant_model(bridge: Any, model: Any, tiny: Any, generation: Any, ids: Tensor) -> None:
    """With another model to guess, the passes begin where the last one's accepted tokens end."""
    assistant = tiny("mistral", num_hidden_layers=1)
    starts: list[tuple[int, int]] = []

    def read(x: Tensor, hook: Any) -> None:
        assert x.shape[1] == len(hook.step.positions)
        starts.append((hook.step.start, hook.step.stop))

    with bridge.hooks([("blocks.0.hook_out", read)]):
        found = bridge.generate(
            ids[:1], max_new_tokens=6, do_sample=False, assistant_model=assistant
        )
    assert torch.equal(found, generation.greedy(model, ids[:1], 6, assistant_model=assistant))
    assert torch.equal(found, generation.greedy(model, ids[:1], 6))
    assert starts[0][0] == 0
    assert all(start <= stop for (start, _), (_, stop) in zip(starts[1:], starts, strict=False))


# --- when it ends -----------------------------------------------------------------------------------------


@pytest.fixture
def end(model: Any, greedy: Greedy, ids: Tensor) -> int:
    """An id the first row of `ids` comes to at its third token, and the second row not before its fourth."""
    out = greedy(model, ids, 8)[:, 9:].tolist()
    assert out[0][2] not in [*out[0][:2], *out[1][:3]]
    return out[0][2]


@pytest.mark.parametrize("how", [int, lambda end: [end, 159]], ids=["one", "several"])
def test_early_end(
    bridge: Any, model: Any, greedy: Greedy, ids: Tensor, end: int, how: Any
) -> None:
    """A row ends at the id and is filled up with the pad token while the other goes on."""
    given = {"eos_token_id": how(end), "pad_token_id": 0}
    found = bridge.generate(ids, max_new_tokens=6, do_sample=False, **given)
    assert torch.equal(found, greedy(model, ids, 6, **given))
    assert found[0, 11] == end
    assert not found[0, 12:].any()
    assert found[1, 12:].any()


def test_no_end(bridge: Any, model: Any, greedy: Greedy, ids: Tensor, end: int) -> None:
    """stop_at_eos=False goes on over it, given here or by the checkpoint."""
    row, given = ids[:1], {"max_new_tokens": 6, "do_sample": False}
    free = greedy(model, row, 6, eos_token_id=159)
    assert torch.equal(bridge.generate(row, eos_token_id=end, stop_at_eos=False, **given), free)
    config = model.generation_config
    kept = config.eos_token_id
    config.eos_token_id = end
    try:
        assert torch.equal(bridge.generate(row, stop_at_eos=False, **given), free)
        assert torch.equal(bridge.generate(row, **given), greedy(model, row, 6))
        assert bridge.generate(row, **given).shape[1] < free.shape[1]
    finally:
        config.eos_token_id = kept


def test_no_end_where_the_prompt_has_one(
    bridge: Any, model: Any, generation: Any, ids: Tensor
) -> None:
    """An end-of-sequence token in the prompt (GPT-2's BOS is one) is read, not taken for padding."""
    prompt = ids.clone()
    prompt[:, 2] = model.generation_config.eos_token_id
    full = torch.ones_like(prompt)
    given = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    for end in ({}, {"eos_token_id": int(ids[0, 4])}):
        found = bridge.generate(prompt, output_logits=True, **given, **end)
        wanted = model(prompt, attention_mask=full).logits[:, -1]
        assert generation.gap(found.logits[0], wanted) < 1e-5
        _, cache = bridge.generate(prompt, return_cache=True, **given, **end)
        assert cache.mask.all()


def test_the_tokenizers_end(tiny: Any, tokenizer: Any, ids: Tensor, end: int) -> None:
    """A model that knows no end takes its tokenizer's."""
    model = tiny("mistral")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    bridge = TransformerBridge(model, tokenizer)
    bridge._tokens.eos_id = end  # as if this were what the tokenizer ends with
    found = bridge.generate(ids, max_new_tokens=6, do_sample=False)
    assert found[0, 11] == end
    assert (found[0, 12:] == end).all()


@pytest.mark.parametrize("n", [1, 2])
def test_few_tokens(bridge: Any, model: Any, greedy: Greedy, ids: Tensor, n: int) -> None:
    """One new token, and two."""
    assert torch.equal(
        bridge.generate(ids, max_new_tokens=n, do_sample=False), greedy(model, ids, n)
    )


def test_no_tokens(bridge: Any, ids: Tensor) -> None:
    """max_new_tokens=0 gives the prompt back and runs nothing; embeddings have no ids to give back."""
    ran: list[str] = []
    with bridge.hooks([("blocks.0.hook_out", lambda x, hook: ran.append(hook.name))]):
        assert torch.equal(bridge.generate(ids, max_new_tokens=0), ids)
        out = bridge.generate(ids, max_new_tokens=0, output_logits=True)
    assert torch.equal(out.sequences, ids)
    assert out.logits == ()
    assert not ran
    embedded = bridge.original_model.get_input_embeddings()(ids)
    with pytest.raises(InputError, match="max_new_tokens=0 gives back the ids"):
        bridge.generate(embedded, max_new_tokens=0)
    with pytest.raises(InputError, match="0 or more, got -1"):
        bridge.generate(ids, max_new_tokens=-1)


def test_how_many(bridge: Any, model: Any, greedy: Greedy, ids: Tensor) -> None:
    """Ten tokens unless max_length or a generation_config says, which also says whether to draw."""
    assert torch.equal(bridge.generate(ids, do_sample=False), greedy(model, ids, 10))
    assert torch.equal(bridge.generate(ids, max_length=12, do_sample=False), greedy(model, ids, 3))
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    assert torch.equal(bridge.generate(ids, generation_config=config), greedy(model, ids, 4))
    found = bridge.generate(ids, max_new_tokens=2, generation_config=config)
    assert torch.equal(found, greedy(model, ids, 2))


def test_a_drawing_configuration(bridge: Any, model: Any, ids: Tensor, seeded: Any) -> None:
    """A generation_config is followed to the letter, its cut at 50 too."""
    config = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=4, temperature=2.0)
    with seeded(5):
        wanted = model.generate(ids, generation_config=config)
    with seeded(5):
        assert torch.equal(bridge.generate(ids, generation_config=config), wanted)


def test_stopping_criteria(bridge: Any, model: Any, greedy: Greedy, ids: Tensor) -> None:
    """A function or several end the text when any says so, and see the ids so far."""

    def at(length: int) -> Any:
        return lambda tokens, scores: torch.full((2,), tokens.shape[1] >= length)

    for rules, length in ((at(11), 11), ([at(13), at(12)], 12)):
        found = bridge.generate(ids, max_new_tokens=8, do_sample=False, stopping_criteria=rules)
        assert torch.equal(found, greedy(model, ids, length - 9))


def test_stop_strings(demo_bridge: Any) -> None:
    """The text ends with the first of the strings that comes up."""
    prompt = "The cat"
    whole = demo_bridge.generate(prompt, max_new_tokens=20, do_sample=False, stop_at_eos=False)
    new = whole[len(prompt) :]
    stop = new[4:7]
    given = {"max_new_tokens": 20, "do_sample": False, "stop_at_eos": False}
    cut = demo_bridge.generate(prompt, stop_strings=stop, **given)
    assert whole.startswith(cut)
    assert stop in cut[len(prompt) :]
    assert len(cut) < len(whole)
    assert cut == demo_bridge.generate(prompt, stop_strings=["@@@", stop], **given)


# --- the bar ----------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("verbose", "screen"), [(True, True), (False, True), (True, False)])
def test_progress(
    bridge: Any,
    model: Any,
    greedy: Greedy,
    ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    verbose: bool,
    screen: bool,
) -> None:
    """A bar that counts the tokens, in a terminal and if wanted, beside the caller's own stopping rules."""
    out = Screen() if screen else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    seen: list[int] = []

    def rule(tokens: Tensor, scores: Any) -> Tensor:
        seen.append(tokens.shape[1])
        return torch.zeros(2, dtype=torch.bool)

    found = bridge.generate(
        ids, max_new_tokens=5, do_sample=False, verbose=verbose, stopping_criteria=rule
    )
    assert torch.equal(found, greedy(model, ids))
    assert seen == [10, 11, 12, 13, 14]
    assert ("/5" in out.getvalue()) == (verbose and screen)
