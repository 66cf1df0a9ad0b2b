"""Spans of sentences: found by characters, in tokens, or refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from lensbridge import InputError, TransformerBridge, demo
from lensbridge.methods.spans import (
    Reader,
    aggregate_to_sentences,
    get_sentence_token_spans,
)

TEXT = "Paris is the capital of France. It is one of Europe's largest cities.  Go there."
SENTENCES = [
    "Paris is the capital of France.",
    "It is one of Europe's largest cities.",
    "Go there.",
]


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.path())


@pytest.fixture(scope="session")
def metaspace() -> Any:
    """Like Llama 2's: spaces are part of the words behind them, and BOS comes by itself."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"])
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(params=["demo", "characters", "pieces", "metaspace"])
def any_tokenizer(
    request: pytest.FixtureRequest,
    demo_tokenizer: Any,
    tokenizer: Any,
    letters: Any,
    metaspace: Any,
) -> Any:
    return {
        "demo": demo_tokenizer,
        "characters": tokenizer,
        "pieces": letters("[CLS] $A [SEP]"),
        "metaspace": metaspace,
    }[request.param]


def visible(text: str) -> str:
    return "".join(text.split())


def test_the_tokens_of_a_span_are_its_sentence(any_tokenizer: Any) -> None:
    """Whatever the tokenizer: by the offsets of its own tokens, and without white space at the ends."""
    spans = get_sentence_token_spans(TEXT, SENTENCES, any_tokenizer)
    places = any_tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    places = places["offset_mapping"]
    for (start, end), sentence in zip(spans, SENTENCES, strict=True):
        own = TEXT[places[start][0] : places[end - 1][1]]
        assert visible(own) == visible(sentence)
        # Nothing of it is left out: the tokens beside it are another sentence's, or white space.
        assert all(
            visible(TEXT[a:b]) == ""
            or not TEXT.index(sentence) < b <= TEXT.index(sentence) + len(sentence)
            for a, b in [*places[:start], *places[end:]]
        )


def test_no_token_is_in_two_spans(any_tokenizer: Any) -> None:
    spans = get_sentence_token_spans(TEXT, SENTENCES, any_tokenizer)
    assert all(first[1] <= then[0] for first, then in pairwise(spans))


def test_by_hand(tokenizer: Any) -> None:
    """With a token for each character, spans are places in the text."""
    assert get_sentence_token_spans("ab. cd. ab.", ["ab.", "cd.", "ab."], tokenizer) == [
        (0, 3),
        (4, 7),
        (8, 11),
    ]


def test_special_tokens_move_spans(letters: Any, metaspace: Any) -> None:
    """By what stands in front; what stands behind does not count."""
    pieces = letters("[CLS] $A [SEP]")
    for own in (pieces, metaspace):
        bare = get_sentence_token_spans(TEXT, SENTENCES, own)
        moved = get_sentence_token_spans(TEXT, SENTENCES, own, add_special_tokens=True)
        assert moved == [(a + 1, b + 1) for a, b in bare]
        first = own.convert_ids_to_tokens(own(TEXT)["input_ids"][slice(*moved[0])])
        assert first[0].strip("▁") == "P" or first[0].startswith("▁P")


def test_a_bridge_serves_as_a_tokenizer(tiny: Callable[..., Any], tokenizer: Any) -> None:
    bridge = TransformerBridge(tiny("gpt2"), tokenizer)
    assert get_sentence_token_spans("ab. cd.", ["cd."], bridge) == [(4, 7)]
    with pytest.raises(InputError, match="has no tokenizer"):
        get_sentence_token_spans("ab.", ["ab."], TransformerBridge(tiny("gpt2")))


def test_white_space_need_not_be_the_same(tokenizer: Any) -> None:
    text = "One\r\n  two.\tThree\nfour."
    assert get_sentence_token_spans(text, [" One two. ", "Three four."], tokenizer) == [
        (0, text.index(".") + 1),
        (text.index("T"), len(text)),
    ]


def test_a_token_of_two_sentences_is_the_first_ones(tokenizer: Any) -> None:
    """Counted where its first visible character is."""
    core = Tokenizer(models.WordLevel({"a": 0, ".b": 1, "c": 2}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split(".b", behavior="isolated")
    joined = PreTrainedTokenizerFast(tokenizer_object=core)
    assert get_sentence_token_spans("a.bc", ["a.", "bc"], joined) == [(0, 2), (2, 3)]
    with pytest.raises(InputError, match=r"sentence 1 \('b'\) has no token of its own"):
        get_sentence_token_spans("a.bc", ["a.", "b"], joined)


def test_brackets_and_dots_are_only_characters(tokenizer: Any) -> None:
    assert get_sentence_token_spans("axb a.b (c*", ["a.b", "(c*"], tokenizer) == [(4, 7), (8, 11)]


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_sentence_that_is_not_there(tokenizer: Any) -> None:
    with pytest.raises(InputError) as caught:
        get_sentence_token_spans(
            TEXT, [SENTENCES[0], "It is one of Europes largest cities."], tokenizer
        )
    message = str(caught.value)
    assert "sentence 1 ('It is one of Europes largest cities.') is not in the text" in message
    assert "the nearest is at character 32" in message
    assert "It is one of Europe's largest" in message


def test_sentences_in_another_order(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"sentence 1 .*behind sentence 0.*it stands at 0"):
        get_sentence_token_spans(TEXT, [SENTENCES[1], SENTENCES[0]], tokenizer)
    with pytest.raises(InputError, match="order of the text, each once"):
        get_sentence_token_spans(TEXT, [SENTENCES[0]] * 2, tokenizer)


@pytest.mark.parametrize("sentences", [[], "ab.", [""], ["ab.", "  "], [3]])
def test_what_is_no_list_of_sentences(tokenizer: Any, sentences: Any, unchecked: None) -> None:
    with pytest.raises(InputError, match="sentence"):
        get_sentence_token_spans("ab. 3", sentences, tokenizer)


def test_a_slow_tokenizer_does_not_know() -> None:
    with pytest.raises(InputError, match="only a fast tokenizer"):
        get_sentence_token_spans("ab.", ["ab."], ByT5Tokenizer())


@pytest.mark.parametrize("given", [None, "gpt2", 3])
def test_what_is_no_tokenizer(given: Any, unchecked: None) -> None:
    with pytest.raises(InputError, match="a Hugging Face tokenizer, or a bridge"):
        get_sentence_token_spans("ab.", ["ab."], given)


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_a_reader_reads_as_a_bridge_does(
    any_tokenizer: Any, tiny: Callable[..., Any], prepend_bos: bool | None
) -> None:
    """With special tokens of the tokenizer's own, with BOS and without."""
    bridge = TransformerBridge(tiny("gpt2", vocab_size=1200), any_tokenizer)
    reader = Reader(bridge)
    if prepend_bos and any_tokenizer.bos_token_id is None and any_tokenizer.eos_token_id is None:
        with pytest.raises(InputError, match="neither a BOS nor an EOS"):
            reader.around(prepend_bos)
        return
    for text in (TEXT, " a", "a\n"):
        front, back = Reader(any_tokenizer).around(prepend_bos)
        ids = bridge.to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0].tolist()
        assert ids == [*front, *reader.read([text])[0].ids, *back]
        assert reader.around(prepend_bos) == (front, back)


def test_a_reader_follows_the_bridges_default(tiny: Callable[..., Any], tokenizer: Any) -> None:
    bridge = TransformerBridge(tiny("gpt2"), tokenizer)
    assert Reader(bridge).around() == ([1], [])
    bridge.cfg.default_prepend_bos = False
    assert Reader(bridge).around() == ([], [])


def test_an_eos_that_comes_by_itself_is_left_out(tiny: Callable[..., Any], tokenizer: Any) -> None:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    own = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    bridge = TransformerBridge(tiny("gpt2"), own)
    assert Reader(own).around() == ([1], [])
    assert bridge.to_tokens("a")[0].tolist() == [1, *Reader(own).read(["a"])[0].ids]


def test_the_backend_keeps_its_truncation_and_padding(new_tokenizer: Callable[..., Any]) -> None:
    own = new_tokenizer()
    own.backend_tokenizer.enable_truncation(3, stride=1, strategy="only_first", direction="left")
    own.backend_tokenizer.enable_padding(direction="left", pad_id=2, pad_token="<eos>", length=9)
    before = own.backend_tokenizer.to_str()
    assert get_sentence_token_spans("ab. cd.", ["cd."], own) == [(4, 7)]
    assert own.backend_tokenizer.to_str() == before


# --- aggregation --------------------------------------------------------------------------------------------


def test_aggregates_by_hand() -> None:
    values = torch.tensor([1.0, -2.0, 4.0, 8.0])
    spans = [(0, 3), (1, 2), (2, 4)]
    expected = {"mean": [1.0, -2.0, 6.0], "sum": [3.0, -2.0, 12.0], "max": [4.0, -2.0, 8.0]}
    for how, wanted in expected.items():
        assert aggregate_to_sentences(values, spans, how).tolist() == wanted
    assert aggregate_to_sentences(values, spans).tolist() == expected["mean"]
    assert aggregate_to_sentences(values.double(), spans[:1]).dtype == torch.float64


@pytest.mark.parametrize("span", [(2, 2), (3, 1), (-1, 2), (2, 5)])
def test_a_span_without_tokens(span: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"the span of sentence 1 is \("):
        aggregate_to_sentences(torch.ones(4), [(0, 1), span])


def test_other_aggregations_and_none() -> None:
    with pytest.raises(InputError, match="aggregation must be one of"):
        aggregate_to_sentences(torch.ones(4), [(0, 1)], "median")
    with pytest.raises(InputError, match="there are no spans"):
        aggregate_to_sentences(torch.ones(4), [])
