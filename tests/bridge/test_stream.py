"""generate_stream: pieces that join to what generate returns, made only while somebody waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import InputError, TransformerBridge

TEXTS = ["The cat", "When Mary and John went to the store, John gave a"]
GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _no_threads() -> Any:
    """Every test ends with the threads it began with (tqdm, at the first bar, starts one of a class of its own)."""
    before = plain_threads()
    yield
    assert plain_threads() == before


def plain_threads() -> int:
    return sum(type(thread) is threading.Thread for thread in threading.enumerate())


@pytest.fixture
def bridge(wrapped: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A bridge around a tiny Mistral, shared; no test here leaves anything on it."""
    return wrapped("mistral")


@pytest.fixture
def model(bridge: TransformerBridge) -> Any:
    """The model of `bridge`."""
    return bridge.original_model


def is_clean(bridge: Any, is_silent: Any) -> bool:
    """Whether no listener, no scope and no step is left."""
    return is_silent(bridge) and bridge.registry.clock.main is None and not bridge.registry.running


# --- the pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 20])
def test_ids(bridge: Any, model: Any, generation: Any, at_once: int, skip: bool) -> None:
    """So many tokens a piece, the prompt before the first unless skipped; together the model's own answer."""
    ids, mask = generation.prompts()
    wanted = generation.greedy(model, ids, 7, attention_mask=mask)
    pieces = list(
        bridge.generate_stream(ids, 7, at_once, skip_prompt=skip, attention_mask=mask, **GREEDY)
    )
    assert torch.equal(torch.cat(pieces, dim=1), wanted[:, 8:] if skip else wanted)
    widths = [min(at_once, 7 - start) for start in range(0, 7, at_once)]
    widths[0] += 0 if skip else 8
    assert [piece.shape[1] for piece in pieces] == widths


@pytest.mark.parametrize("at_once", [1, 3])
def test_text(demo_bridge: Any, at_once: int) -> None:
    """Strings that join to the string, lists of them for a list; the prompt first, or not at all."""
    given = {"max_new_tokens": 9, **GREEDY}
    stream = {"max_tokens_per_yield": at_once, **given}
    wanted = demo_bridge.generate(TEXTS[0], **given)
    pieces = list(demo_bridge.generate_stream(TEXTS[0], **stream))
    assert len(pieces) > 2
    assert "".join(pieces) == wanted
    assert pieces[0].startswith(TEXTS[0])
    new = "".join(demo_bridge.generate_stream(TEXTS[0], skip_prompt=True, **stream))
    assert new == wanted[len(TEXTS[0]) :]
    several = list(demo_bridge.generate_stream(TEXTS, **stream))
    assert ["".join(row) for row in zip(*several, strict=True)] == demo_bridge.generate(
        TEXTS, **given
    )
    single = list(demo_bridge.generate_stream(TEXTS[:1], **stream))
    assert all(isinstance(piece, list) for piece in single)
    assert ["".join(row) for row in zip(*single, strict=True)] == [wanted]
    tokens = demo_bridge.to_tokens(TEXTS[0])
    assert "".join(demo_bridge.generate_stream(tokens, return_type="str", **stream)) == wanted
    ids = list(demo_bridge.generate_stream(TEXTS[0], return_type="tokens", **stream))
    assert torch.equal(torch.cat(ids, dim=1), demo_bridge.original_model.generate(tokens, **given))


def test_half_a_character(demo_bridge: Any) -> None:
    """A character of several tokens is said when it is whole; what stays broken at the end is said as it is."""
    said = "à 日本語 ü"
    forced = demo_bridge.tokenizer(said)["input_ids"]
    assert len(forced) > len(said)

    def only(input_ids: Tensor, scores: Tensor) -> Tensor:
        token = forced[input_ids.shape[1] - 3]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    def stream(n: int) -> list[str]:
        given = {"skip_prompt": True, "return_type": "str", "logits_processor": [only], **GREEDY}
        return list(demo_bridge.generate_stream(torch.tensor([[5, 6, 7]]), n, **given))

    pieces = stream(len(forced))
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) < len(forced)
    cut = stream(len(forced) - 1)
    assert "".join(cut) == demo_bridge.tokenizer.decode(forced[:-1])
    assert "\ufffd" in cut[-1]


def test_rows_that_end(bridge: Any, model: Any, generation: Any, ids: Tensor) -> None:
    """A row that has ended is filled up, and the stream ends with the last row."""
    end = int(generation.greedy(model, ids, 6)[0, 11])
    given = {"eos_token_id": end, "pad_token_id": end}
    wanted = generation.greedy(model, ids, 6, **given)
    pieces = list(bridge.generate_stream(ids, 6, **GREEDY, **given))
    assert torch.equal(torch.cat(pieces, dim=1), wanted)
    alone = list(bridge.generate_stream(ids[:1], 6, **GREEDY, **given))
    assert torch.equal(torch.cat(alone, dim=1), wanted[:1, :12])
    assert len(alone) == 3


def test_drawing(bridge: Any, model: Any, generation: Any, ids: Tensor) -> None:
    """With a seed, the tokens that generate draws, options and all."""
    given = {"temperature": 0.8, "top_p": 0.9, "freq_penalty": 1.0}
    with generation.generator_state(2):
        wanted = bridge.generate(ids, max_new_tokens=6, **given)
    with generation.generator_state(2):
        pieces = list(bridge.generate_stream(ids, 6, **given))
    assert torch.equal(torch.cat(pieces, dim=1), wanted)


def test_encoder_decoder(tiny: Any, generation: Any, ids: Tensor) -> None:
    """The decoder's start token comes first, then what it writes."""
    bridge = TransformerBridge(tiny("marian", "seq2seq"))
    given = {"decoder_start_token_id": 7, "min_new_tokens": 5}
    wanted = generation.greedy(tiny("marian", "seq2seq"), ids, **given)
    pieces = list(bridge.generate_stream(ids, 5, **GREEDY, **given))
    assert torch.equal(torch.cat(pieces, dim=1), wanted)


# --- when the model runs ----------------------------------------------------------------------------------


def test_only_while_waited_for(bridge: Any, ids: Tensor) -> None:
    """Nothing runs before the first piece is asked for, and then one step a token."""
    steps: list[int] = []
    with bridge.hooks([("blocks.0.hook_out", lambda x, hook: steps.append(hook.step.number))]):
        stream = bridge.generate_stream(ids, 5, 2, **GREEDY)
        assert steps == []
        next(stream)
        assert steps == [0, 1]
        next(stream)
        assert steps == [0, 1, 2, 3]
        assert len(list(stream)) == 1
        assert steps == [0, 1, 2, 3, 4]


def test_hooks_are_those_of_the_moment(
    bridge: Any, model: Any, plain: Any, generation: Any, ids: Tensor
) -> None:
    """A hook set between pieces acts from the next step on, and knows its step; gone, it acts no more."""
    seen: list[Any] = []

    def edit(x: Tensor, hook: Any) -> Tensor:
        seen.append((hook.step.number, hook.step.positions))
        return x * -3

    stream = bridge.generate_stream(ids, 6, **GREEDY)
    pieces = [next(stream), next(stream)]
    with bridge.hooks([("blocks.0.hook_out", edit)]):
        pieces += [next(stream), next(stream)]
    pieces += stream
    acts = lambda x, count: x * -3 if count in (2, 3) else None  # noqa: E731
    with plain.watching(model, "model.layers.0", acts):
        wanted = generation.greedy(model, ids, 6)
    assert torch.equal(torch.cat(pieces, dim=1), wanted)
    assert seen == [(2, range(10, 11)), (3, range(11, 12))]


@pytest.mark.parametrize("inference", [False, True])
def test_the_callers_modes(bridge: Any, ids: Tensor, inference: bool) -> None:
    """Inference mode belongs to a thread; the stream's has that of the caller."""
    seen: set[bool] = set()
    with torch.inference_mode(inference):
        hooks = [("blocks.0.hook_out", lambda x, hook: seen.add(x.is_inference()))]
        with bridge.hooks(hooks):
            list(bridge.generate_stream(ids, 2, **GREEDY))
    assert seen == {inference}


# --- what goes on in between ------------------------------------------------------------------------------


def test_other_runs_in_between(
    bridge: Any, model: Any, generation: Any, is_silent: Any, ids: Tensor
) -> None:
    """Forwards, caches and generations between two pieces are right, and so is the stream."""
    steps: list[Any] = []
    other = ids.flip(0)[:, :6]
    logits = model(other).logits
    answer = generation.greedy(model, other, 3)
    stream = bridge.generate_stream(ids, 6, **GREEDY)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        hooks = [("blocks.1.hook_out", lambda x, hook: steps.append(hook.step.positions))]
        assert torch.equal(bridge.run_with_hooks(other, fwd_hooks=hooks), logits)
        found, cache = bridge.run_with_cache(other, names_filter="blocks.1.hook_out")
        assert torch.equal(found, logits)
        out, live = bridge.generate(
            other, max_new_tokens=3, return_cache=True, names_filter="blocks.1.hook_out", **GREEDY
        )
        assert torch.equal(out, answer)
        assert live["resid_post", 1].shape[1] == 9
        assert generation.gap(live["resid_post", 1][:, :6], cache["resid_post", 1]) < 1e-5
    assert torch.equal(torch.cat(pieces, dim=1), generation.greedy(model, ids, 6))
    assert steps == [range(6)] * 6
    assert is_clean(bridge, is_silent)


def test_steps_beside_other_runs(bridge: Any, ids: Tensor) -> None:
    """A hook that is heard in both knows at each call which text it sees."""
    seen: list[Any] = []

    def note(x: Tensor, hook: Any) -> None:
        assert x.shape[1] == len(hook.step.positions)
        seen.append((hook.step.number, hook.step.start, hook.step.stop))

    with bridge.hooks([("blocks.1.hook_out", note)]):
        for _ in bridge.generate_stream(ids, 3, **GREEDY):
            bridge(ids[:, :4])
    assert seen == [(0, 0, 9), (0, 0, 4), (1, 9, 10), (0, 0, 4), (2, 10, 11), (0, 0, 4)]


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_streams(
    fresh: Any, generation: Any, is_silent: Any, ids: Tensor, first_ends_first: bool
) -> None:
    """Two streams of one bridge, in turns, in whichever order they end: both right, nothing left."""
    bridge = fresh("mistral")
    model = bridge.original_model
    lengths = (3, 4) if first_ends_first else (4, 3)
    seen: list[Any] = []

    def note(x: Tensor, hook: Any) -> None:
        assert x.shape[1] == len(hook.step.positions)
        seen.append(hook.step.positions)

    with bridge.hooks([("blocks.0.hook_out", note)]):
        streams = [
            bridge.generate_stream(ids, lengths[0], **GREEDY),
            bridge.generate_stream(ids[:, :5], lengths[1], **GREEDY),
        ]
        pieces: list[list[Tensor]] = [[], []]
        for _ in range(3):
            for stream, found in zip(streams, pieces, strict=True):
                found.append(next(stream))
        for index in (0, 1) if first_ends_first else (1, 0):
            pieces[index].extend(streams[index])
    wanted = generation.greedy(model, ids, lengths[0])
    other = generation.greedy(model, ids[:, :5], lengths[1])
    assert torch.equal(torch.cat(pieces[0], dim=1), wanted)
    assert torch.equal(torch.cat(pieces[1], dim=1), other)
    assert seen[:4] == [range(9), range(5), range(9, 10), range(5, 6)]
    assert is_clean(bridge, is_silent)


# --- how it ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 2])
def test_errors_come_out(
    bridge: Any, model: Any, snapshot: Any, is_silent: Any, ids: Tensor, step: int
) -> None:
    """What a hook raises reaches whoever waits for the piece; pieces before it came; nothing is left."""
    before = snapshot(model)

    def fail(x: Tensor, hook: Any) -> None:
        if hook.step.number == step:
            raise KeyError("mine")

    with bridge.hooks([("blocks.0.hook_out", fail)]):
        stream = bridge.generate_stream(ids, 5, **GREEDY)
        for _ in range(step):
            next(stream)
        with pytest.raises(KeyError, match="mine"):
            next(stream)
        assert list(stream) == []
    assert snapshot(model) == before
    assert is_clean(bridge, is_silent)
    assert torch.equal(bridge(ids), model(ids).logits)


def test_leaving_early(bridge: Any, model: Any, snapshot: Any, is_silent: Any, ids: Tensor) -> None:
    """break, close, and letting go: the model runs no more and is as before."""
    before = snapshot(model)
    ran: list[int] = []

    def start() -> Any:
        ran.clear()
        return bridge.generate_stream(ids, 50, **GREEDY)

    with bridge.hooks([("blocks.0.hook_out", lambda x, hook: ran.append(hook.step.number))]):
        for _ in start():
            break
        stream = start()
        next(stream)
        next(stream)
        stream.close()
        assert ran == [0, 1]
        assert list(stream) == []
        stream = start()
        next(stream)
        del stream
        bridge(ids)
    assert snapshot(model) == before
    assert is_clean(bridge, is_silent)


def test_never_begun(bridge: Any, ids: Tensor) -> None:
    """A stream that nobody reads starts no thread and runs nothing."""
    ran: list[str] = []
    before = plain_threads()
    with bridge.hooks([("blocks.0.hook_out", lambda x, hook: ran.append(hook.name))]):
        stream = bridge.generate_stream(ids, 5)
        assert plain_threads() == before
        stream.close()
        bridge(ids)
    assert len(ran) == 1


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_tokens_per_yield": 0}, "at least 1, got 0"),
        ({"max_new_tokens": 0}, "nothing to stream"),
        ({"max_new_tokens": -2}, "0 or more, got -2"),
        ({"return_cache": True}, "takes no return_cache: .*use generate"),
        ({"sink": print}, "takes no sink"),
        ({"streamer": None}, "takes no streamer"),
        ({"output_logits": True}, "takes no output_logits"),
        ({"return_input_tokens": True}, "takes no return_input_tokens"),
        ({"return_type": "text"}, "'input', 'str' or 'tokens'"),
        ({"return_type": "str"}, "needs a tokenizer"),
        ({"input": "hello"}, "needs a tokenizer"),
        ({"input": [], "max_new_tokens": 2}, "empty list"),
    ],
    ids=str,
)
def test_refused_at_once(bridge: Any, ids: Tensor, given: Any, words: str) -> None:
    """By the call itself, not when the first piece is asked for."""
    with pytest.raises(InputError, match=words):
        bridge.generate_stream(**{"input": ids, **given})


def test_beams(bridge: Any, is_silent: Any, ids: Tensor) -> None:
    """Beams have no token to show before the end: refused, and nothing is left."""
    with pytest.raises(ValueError, match="beam"):
        list(bridge.generate_stream(ids, 3, num_beams=2, **GREEDY))
    assert is_clean(bridge, is_silent)


def test_no_bar(bridge: Any, ids: Tensor) -> None:
    """verbose is taken, and means nothing here."""
    for verbose in (True, False):
        assert len(list(bridge.generate_stream(ids, 2, verbose=verbose, **GREEDY))) == 2
