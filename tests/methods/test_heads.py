"""Head detectors against the attention Hugging Face returns, by hand, and against what ablation does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.hooks import AbsentPointError, InputError
from lensbridge.methods.heads import (
    HeadScores,
    detect_head,
    duplicate_token_score,
    induction_score,
    previous_token_score,
    repeated_tokens,
)

DRAWN = {"batch": 3, "length": 7, "seed": 4}
SCORES: dict[str, Callable[..., HeadScores]] = {
    "previous_token": previous_token_score,
    "duplicate_token": duplicate_token_score,
    "induction": induction_score,
}


def _attentions(model: Any, **given: Tensor) -> list[Tensor]:
    """Every layer's attention as Hugging Face itself returns it."""
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**given, output_attentions=True)
    model.set_attn_implementation(was)
    return list(out.decoder_attentions if "decoder_attentions" in out else out.attentions)


def _looked_back(kind: str, tokens: Tensor, attention: Tensor, first: int) -> Tensor:
    """Mean attention on what a kind looks at, found by comparing tokens one by one: [head]."""
    sums, count = torch.zeros(attention.shape[1]), 0
    length = tokens.shape[1] // 2
    for row in range(len(tokens)):
        for query in range(first + 1, tokens.shape[1]):
            for key in range(first, query + (kind == "induction")):
                earlier = tokens[row, :query].tolist()
                fits: Any
                if kind == "previous_token":
                    fits = key == query - 1
                elif kind == "duplicate_token":
                    fits = key < query and tokens[row, key] == tokens[row, query]
                else:
                    fits = (
                        key > first and earlier[key - 1] == tokens[row, query] and key - 1 < query
                    )
                if fits and (kind == "previous_token" or query >= first + length):
                    sums += attention[row, :, query, key]
                    count += 1
    return sums / count


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    "which", [("gpt2", "causal"), ("llama", "causal"), ("bert", "masked"), ("t5", "seq2seq")]
)
def test_scores_by_hand(lens_of: Any, which: Any, kind: str) -> None:
    """The stripes are where tokens say they are, in Hugging Face's own attention."""
    lens = lens_of(*which)
    tokens = repeated_tokens(lens.bridge, **DRAWN, prepend_bos=False)
    given = {"input_ids": tokens}
    if which[0] == "t5":
        given["decoder_input_ids"] = tokens
    expected = torch.stack(
        [_looked_back(kind, tokens, x, 0) for x in _attentions(lens.model, **given)]
    )
    found = SCORES[kind](lens.bridge, **DRAWN, prepend_bos=False)
    assert found.layers == (0, 1)
    assert found.kind == kind
    torch.testing.assert_close(found.scores, expected, atol=1e-6, rtol=1e-4)


def _ideal(kind: str, tokens: Tensor) -> Tensor:
    """A pattern that looks just where a kind does, elsewhere at itself: [batch, query, key]."""
    rows, length = tokens.shape
    made = torch.zeros(rows, length, length)
    for row, query in itertools.product(range(rows), range(length)):
        ids = tokens[row].tolist()
        earlier = [key for key in range(query) if ids[key] == ids[query]]
        at = {
            "previous_token": max(query - 1, 0),
            "duplicate_token": earlier[-1] if earlier else query,
            "induction": earlier[-1] + 1 if earlier else query,
        }[kind]
        made[row, query, at] = 1.0
    return made


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", SCORES)
def test_ideal_heads(lens_of: Any, kind: str, bos: bool) -> None:
    """A head whose attention is put just where a kind looks scores 1 there and 0 as the other kinds."""
    bridge = lens_of("gpt2").bridge
    drawn = {**DRAWN, "prepend_bos": bos}
    tokens = repeated_tokens(bridge, **drawn)
    assert tokens.shape == (3, 14 + bos)
    ideal = _ideal(kind, tokens)

    def put(pattern: Tensor, hook: Any) -> None:
        pattern[:, 2] = ideal

    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", put)]):
        found = {name: score(bridge, **drawn)[1, 2] for name, score in SCORES.items()}
        shares = {name: detect_head(bridge, tokens, name)[1, 2] for name in SCORES}
    assert found == {name: float(name == kind) for name in SCORES}
    # Of all queries, those of the second copy have an earlier occurrence.
    length, whole = 7, 14 + bos
    rest = {"previous_token": whole - 1, "duplicate_token": length, "induction": length}
    assert shares[kind] == pytest.approx(rest[kind] / whole)


def test_hybrids_say_which_layers(lens_of: Any) -> None:
    """Layers without attention have no row; a model without any is refused with why."""
    bridge = lens_of("jamba").bridge
    has = tuple(i for i, block in enumerate(bridge.architecture.blocks) if block.attn is not None)
    assert 0 < len(has) < len(bridge.architecture.blocks)
    found = induction_score(bridge, **DRAWN)
    assert found.layers == has
    assert found.scores.shape == (len(has), bridge.cfg.n_heads)
    missing = next(i for i in range(len(bridge.architecture.blocks)) if i not in has)
    with pytest.raises(InputError, match=rf"there are layers \[{has[0]}"):
        _ = found[missing, 0]
    with pytest.raises(AbsentPointError):
        induction_score(lens_of("mamba").bridge, **DRAWN)


def test_repeated_tokens(lens_of: Any) -> None:
    """The same every time, no token twice in a copy, no special tokens, the global generator left alone."""
    bridge = lens_of("gpt2").bridge
    before = torch.random.get_rng_state()
    tokens = repeated_tokens(bridge, batch=5, length=20, seed=3, prepend_bos=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (tokens[:, 0] == bridge.tokenizer.bos_token_id).all()
    assert torch.equal(tokens[:, 1:21], tokens[:, 21:])
    assert all(len(set(row)) == 20 for row in tokens[:, 1:21].tolist())
    assert not set(bridge.tokenizer.all_special_ids) & set(tokens[:, 1:].flatten().tolist())
    assert tokens.max() < len(bridge.tokenizer) <= bridge.cfg.d_vocab
    again = repeated_tokens(bridge, batch=5, length=20, seed=3, prepend_bos=True)
    assert torch.equal(tokens, again)
    assert not torch.equal(
        tokens, repeated_tokens(bridge, batch=5, length=20, seed=4, prepend_bos=True)
    )
    few = repeated_tokens(
        bridge, batch=2, length=4, vocabulary=[9, 9, 10, 11, 12], prepend_bos=False
    )
    assert set(few.flatten().tolist()) == {9, 10, 11, 12}
    for wrong, message in (
        ({"length": 200}, r"200 different tokens are to be drawn from \d+"),
        ({"length": 5, "vocabulary": [8, 9]}, "5 different tokens are to be drawn from 2"),
        ({"batch": 0}, "batch is at least 1"),
        ({"length": 90}, r"\d+ tokens are more than the \d+ this model has positions for"),
    ):
        with pytest.raises(InputError, match=message):
            repeated_tokens(bridge, **wrong)


# --- on any text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_detect_by_hand(lens_of: Any, measure: str, current: bool, bos: bool) -> None:
    """The share of attention on a pattern, or one less the difference per query, of a row alone."""
    lens = lens_of("gpt2")
    tokens = torch.tensor([[1, 20, 30, 20, 40, 30, 20, 50]])
    aim = torch.zeros(8, 8)
    for query, key in ((3, 2), (5, 3), (6, 2), (6, 4)):  # behind an earlier 20, 30, 20, 20
        aim[query, key] = 1.0
    options = {
        "exclude_bos": bos,
        "exclude_current_token": current,
        "error_measure": measure,
    }
    expected = torch.zeros(2, 4)
    for layer, attention in enumerate(_attentions(lens.model, input_ids=tokens)):
        for head in range(4):
            paid = fits = missed = 0.0
            for query, key in itertools.product(range(8), range(8)):
                if (bos and key == 0) or (current and key == query):
                    continue
                a, d = float(attention[0, head, query, key]), float(aim[query, key])
                paid, fits, missed = paid + a, fits + a * d, missed + abs(a - d)
            expected[layer, head] = fits / paid if measure == "mul" else 1 - missed / 8
    for pattern in ("induction_head", "induction", aim, aim[None]):
        found = detect_head(lens.bridge, tokens, pattern, **options)
        torch.testing.assert_close(found.scores, expected, atol=1e-5, rtol=1e-4)


def test_detect_several_texts(lens_of: Any) -> None:
    """The mean of what each text gives alone, whatever their padding, for either measure and exclusion."""
    bridge = lens_of("gpt2").bridge
    texts = ["abcabca", "aab"]
    for side, measure in itertools.product(("left", "right"), ("mul", "abs")):
        options = {"error_measure": measure, "exclude_bos": True}
        ids = bridge.prepare(texts, padding_side=side)
        both = detect_head(bridge, ids.kwargs, "duplicate_token", **options)
        alone = [detect_head(bridge, text, "duplicate_token", **options).scores for text in texts]
        torch.testing.assert_close(both.scores, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "options", "message"),
    [
        (
            "inductive",
            {},
            "pattern is one of previous_token, duplicate_token, induction or a tensor",
        ),
        (torch.ones(3, 3), {}, r"\[query, key\] of 4 tokens, or one a row of 1; got \[3, 3\]"),
        ("induction", {"error_measure": "square"}, "error_measure is 'mul' or 'abs'"),
    ],
)
def test_refusals(lens_of: Any, left_alone: Any, pattern: Any, options: Any, message: str) -> None:
    """What was given and what was expected."""
    with left_alone(lens_of("gpt2")) as lens, pytest.raises(InputError, match=message):
        detect_head(lens.bridge, torch.tensor([[8, 9, 10, 11]]), pattern, **options)


def test_what_scores_say() -> None:
    """The highest first, without places that do not exist."""
    scores = HeadScores("made", torch.tensor([[0.1, 0.9], [0.5, torch.nan]]), (0, 3))
    assert [item[:2] for item in scores.top()] == [(0, 1), (3, 0), (0, 0)]
    assert scores.top(1)[0][2] == pytest.approx(0.9)
    assert scores[3, 0] == 0.5
    assert repr(scores) == (
        "HeadScores(made, 2 layers x 2 heads; highest: 0.1 0.900, 3.0 0.500, 0.0 0.100)"
    )
    with pytest.raises(InputError, match=r"\(1, 0\): there are layers \[0, 3\] with heads 0 to 1"):
        _ = scores[1, 0]


# --- the demo model ----------------------------------------------------------------------------------------


def _repeats(bridge: Any, tokens: Tensor, without: list[tuple[int, int]]) -> float:
    """How often the second copy is predicted rightly, with some heads' output set to zero."""

    def silent(z: Tensor, hook: Any) -> None:
        z[:, :, [head for layer, head in without if layer == hook.layer()]] = 0.0

    hooks = [(f"blocks.{layer}.attn.hook_z", silent) for layer in {layer for layer, _ in without}]
    with torch.no_grad():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    half = tokens.shape[1] // 2
    return float((logits[:, half + 1 : -1].argmax(-1) == tokens[:, half + 2 :]).float().mean())


def test_the_demos_induction_heads(demo_lens: Any) -> None:
    """The detector finds the heads the model repeats with: without them it cannot, without others it can."""
    bridge = demo_lens.bridge
    scores = induction_score(bridge)
    found = [(layer, head) for layer, head, score in scores.top(16) if score > 0.5]
    assert sorted(found) == [(2, 0), (2, 1), (2, 2), (2, 3)]
    assert scores.top(5)[4][2] < 0.1
    tokens = repeated_tokens(bridge, batch=32, seed=1)
    assert _repeats(bridge, tokens, []) > 0.99
    assert _repeats(bridge, tokens, found) < 0.02
    for layer in (1, 3):
        assert _repeats(bridge, tokens, [(layer, head) for head in range(4)]) > 0.9
    # What an induction head matches was written by heads that look one token back, a layer before.
    assert {item[:2] for item in previous_token_score(bridge).top(2)} == {(0, 0), (0, 3)}
