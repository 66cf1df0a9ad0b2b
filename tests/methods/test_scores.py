"""Scores: logits as they are, probabilities at a temperature, and what texts are worth, against hand-made sums."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lensbridge import InputError
from lensbridge.methods import (
    LensAPI,
    TokenScores,
    apply_temperature,
    gather_token_scores,
    logits_to_log_probs,
    logits_to_probs,
    select_final_token,
)

LOGITS = torch.tensor([[[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]] * 2).log1p()
"""Two rows of three positions: odds 1:3:1, 2:1:4, 1:1:1."""
IDS = torch.tensor([[0, 1, 2], [2, 2, 0]])
MASK = torch.tensor([[0, 1, 1], [1, 1, 0]])
TEXTS = ["the lens sees what is there", "short", "and this"]


@pytest.fixture
def scores() -> TokenScores:
    return TokenScores(LOGITS, IDS)


# --- by hand ------------------------------------------------------------------------------------------------


def test_probabilities(scores: TokenScores) -> None:
    """probs are the odds normalised, log_probs their natural logarithm, logits what came in."""
    assert scores.logits is LOGITS
    expected = torch.tensor([[1, 3, 1], [2, 1, 4], [1, 1, 1]]) / torch.tensor([[5.0], [7], [3]])
    for row in (0, 1):
        torch.testing.assert_close(scores.probs[row], expected)
        torch.testing.assert_close(scores.log_probs[row], expected.log())
    torch.testing.assert_close(logits_to_probs(LOGITS[0]), expected)
    torch.testing.assert_close(logits_to_log_probs(LOGITS[0, 0]), expected[0].log())


@pytest.mark.parametrize("temperature", [0.5, 2, 2.0])
def test_temperature(temperature: float) -> None:
    """The temperature is in probabilities and log-probabilities, and not in the logits."""
    scores = TokenScores(LOGITS, IDS, MASK, temperature=temperature)
    odds = torch.tensor([[1.0, 3, 1], [2, 1, 4], [1, 1, 1]]) ** (1 / temperature)
    expected = odds / odds.sum(-1, keepdim=True)
    torch.testing.assert_close(scores.probs[0], expected)
    torch.testing.assert_close(scores.log_probs[1], expected.log())
    torch.testing.assert_close(scores.final_token_probs(), expected[[2, 1]])
    torch.testing.assert_close(scores.final_token_log_probs(), expected[[2, 1]].log())
    torch.testing.assert_close(scores.text_log_probs(), expected[[1, 0], [2, 2]].log())
    assert torch.equal(scores.logits, LOGITS)
    assert torch.equal(scores.final_token_logits()[1], LOGITS[1, 1])
    assert torch.equal(apply_temperature(LOGITS, temperature), LOGITS / temperature)


@pytest.mark.parametrize("temperature", [0, 0.0, -1, -0.5, True, False, float("nan")])
def test_temperatures_that_are_refused(llama: LensAPI, ids: Tensor, temperature: float) -> None:
    """A temperature must be above 0; a truth value and nan are none; the model is not run in vain."""
    for call in (
        lambda: apply_temperature(LOGITS, temperature),
        lambda: TokenScores(LOGITS, IDS, temperature=temperature),
    ):
        with pytest.raises(InputError, match="temperature must be above 0"):
            call()
    runs: list[Any] = []
    handle = llama.model.register_forward_pre_hook(lambda module, args: runs.append(args))
    try:
        with pytest.raises(InputError, match="temperature must be above 0"):
            llama.score(input_ids=ids, temperature=temperature)
    finally:
        handle.remove()
    assert not runs


def test_the_last_real_token() -> None:
    """Final scores are those of each row's last real token, whichever side the padding is on."""
    scores = TokenScores(LOGITS, IDS, MASK)
    assert torch.equal(scores.final_token_logits(), torch.stack([LOGITS[0, 2], LOGITS[1, 1]]))
    torch.testing.assert_close(scores.final_token_probs()[1], torch.tensor([2.0, 1, 4]) / 7)
    torch.testing.assert_close(
        scores.final_token_log_probs()[0], torch.full((3,), -log(3)), atol=1e-6, rtol=0
    )
    numbers = torch.arange(6.0).view(2, 3)
    assert select_final_token(numbers, MASK).tolist() == [2.0, 4.0]
    assert select_final_token(numbers).tolist() == [2.0, 5.0]
    gap = torch.tensor([[1, 0, 0], [1, 0, 1]])
    assert select_final_token(numbers[..., None], gap).tolist() == [[0.0], [5.0]]


def test_a_row_of_padding_is_refused() -> None:
    """A row without a real token has no last one; the message says which rows."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    scores = TokenScores(LOGITS, IDS, mask)
    for call in (
        scores.final_token_logits,
        scores.final_token_probs,
        scores.final_token_log_probs,
        lambda: select_final_token(LOGITS, mask),
    ):
        with pytest.raises(InputError, match=r"rows \[1\] have no real token"):
            call()


def test_gather(scores: TokenScores) -> None:
    """gather reads one token's log-probability at each position, nothing shifted; one id means all positions."""
    expected = torch.tensor([[1 / 5, 1 / 7, 1 / 3], [1 / 5, 4 / 7, 1 / 3]]).log()
    torch.testing.assert_close(scores.gather(IDS), expected)
    torch.testing.assert_close(scores.gather_log_probs(IDS.tolist()), expected)
    one = torch.tensor([3 / 5, 1 / 7, 1 / 3]).log().expand(2, 3)
    torch.testing.assert_close(scores.gather(1), one)
    torch.testing.assert_close(scores.gather(torch.tensor(1)), one)
    assert gather_token_scores(LOGITS[0], IDS[0]).tolist() == [
        LOGITS[0, i, k] for i, k in enumerate(IDS[0])
    ]
    for wrong in (IDS[0], IDS[:, :2], [[1], [2]]):
        with pytest.raises(InputError, match=r"shape \[2, 3\] like the text"):
            scores.gather(wrong)


@pytest.mark.parametrize("wrong", [3, -1, 0.5, [[0, 1, 2], [0, 1, 3]]])
def test_ids_beyond_the_vocabulary(scores: TokenScores, wrong: Any) -> None:
    """Token ids are whole numbers within the vocabulary."""
    with pytest.raises(InputError, match="whole numbers from 0 to 2"):
        scores.gather(wrong)


def test_texts_by_hand() -> None:
    """A token counts when it and the one before it are real; perplexity is over those tokens alone."""
    scores = TokenScores(LOGITS, IDS, MASK)
    tokens = torch.tensor([[0, log(4 / 7)], [log(1 / 5), 0]])
    torch.testing.assert_close(scores.token_log_probs(), tokens)
    torch.testing.assert_close(scores.text_log_probs(), tokens.sum(-1))
    torch.testing.assert_close(scores.perplexity(), torch.tensor([7 / 4, 5.0]))
    unpadded = TokenScores(LOGITS, IDS)
    torch.testing.assert_close(unpadded.perplexity(), torch.tensor([35 / 12, 35 / 2]) ** 0.5)
    assert TokenScores(LOGITS[:, :1], IDS[:, :1]).perplexity().isnan().all()


def test_impossible_padding() -> None:
    """A token that the model gives no probability at all does no harm as padding."""
    logits = torch.zeros(1, 3, 4)
    logits[..., 0] = -torch.inf
    scores = TokenScores(logits, torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(scores.text_log_probs(), torch.tensor([-log(3)]))


@pytest.mark.parametrize(
    ("logits", "ids", "mask", "message"),
    [
        (LOGITS[0], IDS, None, r"got \[3, 3\] and \[2, 3\]"),
        (LOGITS, IDS[:, :2], None, r"got \[2, 3, 3\] and \[2, 2\]"),
        (LOGITS, IDS[0], None, r"and \[3\]"),
        (LOGITS, IDS, MASK[:, :2], r"mask is \[2, 2\] and the ids \[2, 3\]"),
        (LOGITS, IDS, MASK[0], r"mask is \[3\] and the ids \[2, 3\]"),
    ],
)
def test_shapes_that_do_not_fit(logits: Tensor, ids: Tensor, mask: Any, message: str) -> None:
    """Logits, ids and mask of different texts are refused, with their shapes."""
    with pytest.raises(InputError, match=message):
        TokenScores(logits, ids, mask)


def test_metadata_is_kept() -> None:
    """What is to be kept along is kept, as a copy."""
    given = {"prompt": 3}
    scores = TokenScores(LOGITS, IDS, metadata=given)
    assert scores.metadata == given
    assert scores.metadata is not given


# --- models -------------------------------------------------------------------------------------------------


def test_a_models_scores(llama: LensAPI, ids: Tensor) -> None:
    """Scores are the bare model's logits and their softmax, without a graph, whatever the temperature."""
    logits = llama.model(ids).logits.detach()
    scores = llama.score(input_ids=ids, temperature=0.7)
    torch.testing.assert_close(scores.logits, logits)
    torch.testing.assert_close(scores.probs, (logits / 0.7).softmax(-1))
    assert torch.equal(scores.input_ids, ids)
    assert scores.attention_mask is None
    assert not scores.log_probs.requires_grad
    assert torch.equal(
        llama.score(input_ids=ids, temperature=None).log_probs, scores.logits.log_softmax(-1)
    )


def test_perplexity_is_cross_entropy(llama: LensAPI, ids: Tensor) -> None:
    """Perplexity is exp of F.cross_entropy of the next token, row by row."""
    scores = llama.score(input_ids=ids)
    with torch.no_grad():
        logits = llama.model(ids).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(scores.token_log_probs(), -losses)
    torch.testing.assert_close(scores.text_log_probs(), -losses.sum(-1))
    torch.testing.assert_close(scores.perplexity(), losses.mean(-1).exp())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts(
    lens_of: Callable[..., LensAPI], name: str, side: str, tokenizer: Any
) -> None:
    """A padded batch scores each text as the bare model does alone, learned positions included."""
    lens = lens_of(name)
    scores = lens.score(TEXTS, padding_side=side)
    assert (scores.attention_mask[:, 0 if side == "left" else -1] == 0).tolist() == [
        False,
        True,
        True,
    ]
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            logits = lens.model(ids).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        close = {"atol": 2e-5, "rtol": 1e-5}
        torch.testing.assert_close(scores.final_token_logits()[row], logits[0, -1], **close)
        torch.testing.assert_close(
            scores.final_token_log_probs()[row], logits[0, -1].log_softmax(-1), **close
        )
        torch.testing.assert_close(
            scores.final_token_probs()[row], logits[0, -1].softmax(-1), **close
        )
        found = scores.token_log_probs()[row]
        torch.testing.assert_close(found[found != 0], -loss, **close)
        torch.testing.assert_close(scores.text_log_probs()[row], -loss.sum(), atol=2e-4, rtol=1e-5)
        torch.testing.assert_close(scores.perplexity()[row], loss.mean().exp(), atol=0, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_teacher_forcing(lens_of: Callable[..., LensAPI], name: str, ids: Tensor) -> None:
    """With two stacks the scored text is the decoder's, each row as it is alone, padding left out."""
    lens = lens_of(name, "seq2seq")
    decoder_ids, mask = ids.flip(1), torch.ones_like(ids)
    mask[1, 6:] = 0
    scores = lens.score(input_ids=ids, decoder_input_ids=decoder_ids, decoder_attention_mask=mask)
    assert torch.equal(scores.input_ids, decoder_ids)
    for row, length in ((0, 9), (1, 6)):
        own = decoder_ids[row : row + 1, :length]
        with torch.no_grad():
            logits = lens.model(input_ids=ids[row : row + 1], decoder_input_ids=own).logits[0]
        loss = F.cross_entropy(logits[:-1], own[0, 1:], reduction="none")
        torch.testing.assert_close(scores.token_log_probs()[row, : length - 1], -loss)
        torch.testing.assert_close(scores.perplexity()[row], loss.mean().exp())
        torch.testing.assert_close(scores.final_token_logits()[row], logits[-1])
    assert not scores.token_log_probs()[1, 5:].any()


def test_a_decoder_without_text_of_its_own(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """Given one text, the decoder is forced along it: shifted right, behind the start token."""
    bart = lens_of("bart", "seq2seq")
    shifted = torch.cat([torch.full((2, 1), 2), ids[:, :-1]], 1)
    scores = bart.score(input_ids=ids)
    assert torch.equal(scores.input_ids, shifted)
    with torch.no_grad():
        logits = bart.model(input_ids=ids, decoder_input_ids=shifted).logits
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), shifted[:, 1:], reduction="none")
    torch.testing.assert_close(scores.perplexity(), loss.mean(-1).exp())


def test_masked_models_have_no_perplexity(lens_of: Callable[..., LensAPI], ids: Tensor) -> None:
    """A model that sees both sides gives probabilities at each position, and no text one."""
    bert = lens_of("bert", "masked")
    scores = bert.score(input_ids=ids)
    with torch.no_grad():
        logits = bert.model(ids).logits
    torch.testing.assert_close(
        scores.gather(ids), logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    )
    for call in (scores.token_log_probs, scores.text_log_probs, scores.perplexity):
        with pytest.raises(InputError, match="does not predict each token from those before it"):
            call()


def test_embeddings_have_no_ids_to_score(llama: LensAPI, ids: Tensor) -> None:
    """Of embeddings there are probabilities, and no text of which to tell the probability."""
    embeds = llama.model.get_input_embeddings()(ids).detach()
    scores = llama.score(inputs_embeds=embeds)
    torch.testing.assert_close(scores.logits, llama.model(ids).logits.detach())
    with pytest.raises(InputError, match="perplexity"):
        scores.perplexity()


def test_bfloat16(tiny: Callable[..., Any], ids: Tensor) -> None:
    """A model in bfloat16 keeps its logits so; what is computed from them is float32, and adds up to 1."""
    lens = LensAPI(tiny("llama").bfloat16())
    scores = lens.score(input_ids=ids)
    assert scores.logits.dtype == scores.final_token_logits().dtype == torch.bfloat16
    expected = lens.model(ids).logits.detach().float().log_softmax(-1)
    for found, wanted in (
        (scores.log_probs, expected),
        (scores.probs, expected.exp()),
        (scores.final_token_log_probs(), expected[:, -1]),
        (scores.final_token_probs(), expected[:, -1].exp()),
        (scores.gather(ids), expected.gather(-1, ids[..., None])[..., 0]),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(scores.probs.sum(-1), torch.ones(2, 9))
    assert scores.perplexity().dtype == torch.float32


def test_temperature_in_bfloat16(tiny: Callable[..., Any], ids: Tensor) -> None:
    """The temperature divides in float32 too, so that it loses nothing of the logits."""
    scores = LensAPI(tiny("llama").bfloat16()).score(input_ids=ids, temperature=0.7)
    torch.testing.assert_close(scores.log_probs, (scores.logits.float() / 0.7).log_softmax(-1))


def test_double(ids: Tensor, tiny: Callable[..., Any]) -> None:
    """A model in float64 is scored in float64."""
    lens = LensAPI(tiny("llama").double())
    scores = lens.score(input_ids=ids)
    assert scores.log_probs.dtype == torch.float64
    expected = lens.model(ids).logits.detach().log_softmax(-1)
    torch.testing.assert_close(scores.log_probs, expected, atol=1e-12, rtol=1e-12)


def test_inputs_that_cannot_be_scored(llama: LensAPI, ids: Tensor) -> None:
    """Two inputs, none, and a mask for text are refused."""
    with pytest.raises(InputError, match="not both"):
        llama.score("x", input_ids=ids)
    with pytest.raises(InputError, match="nothing to run"):
        llama.score()
    with pytest.raises(InputError, match="its own attention mask"):
        llama.score("x", attention_mask=torch.ones(1, 2))


def test_the_demo_model_knows_its_language(demo_lens: LensAPI) -> None:
    """A trained model finds the order of words likelier than another: its tokenizer and scores fit together."""
    text = "When Mary and John went to the shop, John gave a drink to"
    good, bad = demo_lens.score([text, " ".join(reversed(text.split()))]).perplexity()
    assert good * 3 < bad
