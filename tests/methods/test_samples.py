"""Samples: how texts are cut into tokens and words, what is read of ids, what the tokenizer is left with."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import pytest
import torch

from lensbridge import Granularity, InputError, demo
from lensbridge.methods.granularity import groups_of
from lensbridge.methods.samples import Sample, samples_given, samples_of


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Any:
    """The embedded model's tokenizer: byte-level pairs, words as in GPT-2."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.path())


def words_of(sample: Sample) -> list[list[int]]:
    """The tokens of each word."""
    return groups_of(sample, Granularity.WORD, None).rows()


# --- words --------------------------------------------------------------------------------------------------


def spaced(is_split: bool) -> Any:
    """A fast tokenizer as Llama 2's, or Gemma's, which splits at spaces that are none any more by then."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "▁", *string.ascii_letters]
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(pieces)}, [], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    if is_split:
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("is_split", [False, True])
def test_words_of_a_tokenizer_without_pre_tokenization(is_split: bool) -> None:
    """Llama 2's and Gemma's kind number all tokens of a text as one word; words still begin at spaces."""
    texts = ["a cat sat", "hello", "a  b", "ab<s>c d"]
    samples = samples_of(texts, spaced(is_split), None)
    assert set(samples[0].words) == {0, 1, 2}
    assert [words_of(sample) for sample in samples] == [
        [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]],
        [[0, 1, 2, 3, 4, 5]],
        [[0, 1], [2, 3, 4]],
        # A special token is in no word, and the text behind it begins anew.
        [[0, 1, 2], [4, 5], [6, 7]],
    ]


class Slow:
    """A tokenizer that knows neither words nor offsets: pieces between bars."""

    is_fast = False
    all_special_ids = (0,)

    def __init__(self, *texts: str) -> None:
        self.pieces = ["<s>", *dict.fromkeys(p for text in texts for p in text.split("|"))]

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["return_offsets_mapping"] is False
        return {"input_ids": [[self.pieces.index(p) for p in text.split("|")] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        # the space before a word, in any of its spellings
        (["The|Ġca|t|Ġsat|.", "un|t"], [[[0], [1, 2], [3, 4]], [[0, 1]]]),
        (["<s>|▁The|▁ca|t", "▁The|t"], [[[1], [2, 3]], [[0, 1]]]),
        (["a| b|c|<s>| d"], [[[0], [1, 2], [4]]]),
        # a mark on what goes on with a word, or is followed, or ends one
        (["<s>|play|##ing|chess", "play|chess"], [[[1, 2], [3]], [[0], [1]]]),
        (["<s>|play@@|ing|chess", "play@@|s@@|ing"], [[[1, 2], [3]], [[0, 1, 2]]]),
        (["<s>|play|ing</w>|chess</w>", "ing</w>|play"], [[[1, 2], [3]], [[0], [1]]]),
        # single characters
        (["a|b| |c"], [[[0, 1], [2, 3]]]),
        (["a|b|c"], [[[0, 1, 2]]]),
    ],
)
def test_words_of_a_slow_tokenizer(texts: list[str], words: list[list[list[int]]]) -> None:
    """Without word numbers the pieces tell, each in the way of their vocabulary, of whatever text."""
    samples = samples_of(texts, Slow(*texts), None)
    # A special token in front is counted as a word's beginning, and is in no row.
    assert [words_of(sample) for sample in samples] == words


def test_sentences_need_a_fast_tokenizer() -> None:
    """Nobody else says where tokens stand in the text."""
    (sample,) = samples_of(["a| b|c"], Slow("a| b|c"), None)
    with pytest.raises(InputError, match="fast tokenizer"):
        groups_of(sample, Granularity.SENTENCE, None)


def test_what_nobody_asks_for_is_not_looked_for(bytes_tokenizer: Any) -> None:
    """Words and places of tokens are found only where they are wanted; ids are the same."""
    (rich,) = samples_of(["The dog. The cat."], bytes_tokenizer, None)
    (poor,) = samples_of(["The dog. The cat."], bytes_tokenizer, None, detailed=False)
    assert (poor.words, poor.spans) == (None, None)
    assert rich.words is not None
    assert rich.spans is not None
    assert (poor.ids, poor.special, poor.text) == (rich.ids, rich.special, rich.text)


# --- texts --------------------------------------------------------------------------------------------------


def test_a_text_without_tokens_is_refused(bytes_tokenizer: Any, letters: Any) -> None:
    """The empty text is an error that says which, unless the tokenizer adds something to it."""
    with pytest.raises(InputError, match="text 1 has no tokens"):
        samples_of(["The", ""], bytes_tokenizer, None)
    (sample,) = samples_of([""], letters("[CLS] $A [SEP]"), None)
    assert sample.ids == (1, 2)


def test_long_texts_are_cut(bytes_tokenizer: Any, letters: Any) -> None:
    """No more tokens than the model reads; what the tokenizer adds at the end stays."""
    (sample,) = samples_of(["The dog. The cat."], bytes_tokenizer, 3)
    assert sample.ids == tuple(bytes_tokenizer("The dog. The cat.")["input_ids"][:3])
    (sample,) = samples_of(["abcdef"], letters("[CLS] $A [SEP]"), 4)
    assert sample.special == (True, False, False, True)


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "length"),
    [
        (None, None, 40),
        (-1, None, 40),
        (None, 7, 7),
        (9, None, 9),
        (9, 7, 7),
        (5, 7, 5),
        (5, -1, 5),
    ],
)
def test_the_smaller_limit_holds(
    new_tokenizer: Any, of_model: Any, of_tokenizer: Any, length: int
) -> None:
    """Of the model's context and the tokenizer's; 10**30, which stands for none, and -1 are no limits."""
    tokenizer = new_tokenizer(**{} if of_tokenizer is None else {"model_max_length": of_tokenizer})
    (sample,) = samples_of(["abcd" * 10], tokenizer, of_model)
    assert len(sample.ids) == length


@pytest.mark.parametrize("is_set", [False, True])
def test_the_tokenizer_is_left_as_it_was(new_tokenizer: Any, is_set: bool) -> None:
    """What it would be saved as, with its own settings for cutting and padding; also after an error."""
    tokenizer = new_tokenizer()
    if is_set:
        tokenizer.backend_tokenizer.enable_truncation(30, direction="left")
        tokenizer.backend_tokenizer.enable_padding(pad_id=3, pad_token="<unk>", length=9)
    before = tokenizer.backend_tokenizer.to_str()
    samples_of(["abc", "some text"], tokenizer, 5)
    assert tokenizer.backend_tokenizer.to_str() == before
    with pytest.raises(TypeError):
        samples_of([3], tokenizer, 5)  # type: ignore[list-item]
    assert tokenizer.backend_tokenizer.to_str() == before


# --- ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": [[9, 10, 2], [11, 12]]},
        {"input_ids": ((9, 10, 2), (11, 12))},
        {"input_ids": [[9, 10, 2], [11, 12, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]},
        {"input_ids": [[9, 10, 2], [0, 11, 12]], "attention_mask": [[1, 1, 1], [0, 1, 1]]},
        {
            "input_ids": torch.tensor([[9, 10, 2], [0, 11, 12]]),
            "attention_mask": torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]),
        },
        {
            "input_ids": np.array([[9, 10, 2], [0, 11, 12]]),
            "attention_mask": np.array([[True] * 3, [False, True, True]]),
        },
        {"input_ids": [[9, 10, 2], [11, 12]], "token_type_ids": [[0, 0, 0], [0, 0]]},
        {"input_ids": [[9, 10, 2], [11, 12]], "special_tokens_mask": [[0, 0, 1], [0, 0]]},
    ],
    ids=range(8),
)
def test_ids_are_read(new_tokenizer: Any, given: dict[str, Any]) -> None:
    """Tensors, arrays and lists, padded on either side or not, are the same two texts."""
    assert samples_given(given, new_tokenizer()) == [
        Sample((9, 10, 2), (False, False, True)),
        Sample((11, 12), (False, False)),
    ]


def test_parts_of_pairs_are_kept(new_tokenizer: Any) -> None:
    """token_type_ids go with their tokens, without padding; those of a single text say nothing."""
    given = {
        "input_ids": [[9, 10, 2], [0, 11, 12]],
        "attention_mask": [[1, 1, 1], [0, 1, 1]],
        "token_type_ids": [[0, 0, 0], [0, 0, 1]],
    }
    assert [sample.types for sample in samples_given(given, new_tokenizer())] == [None, (0, 1)]


def test_parts_that_a_tokenizer_tells_are_kept(letters: Any) -> None:
    """XLNet's kind gives texts types that are not all 0: they are the model's to read."""
    from tokenizers import processors

    tokenizer = letters()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:0 [SEP]:0 [CLS]:2", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    (sample,) = samples_of(["ab"], tokenizer, None)
    assert sample.types == (0, 0, 0, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_words_of_what_a_fast_tokenizer_returned(letters: Any, side: str) -> None:
    """It says which word a token belongs to, so words need no text."""
    tokenizer = letters("[CLS] $A [SEP]", padding_side=side)
    encoded = tokenizer(["Hi you.", "a"], padding=True, return_tensors="pt")
    first, second = samples_given(encoded, tokenizer)
    assert words_of(first) == [[1, 2], [3, 4, 5], [6]]
    assert words_of(second) == [[1]]
    with pytest.raises(InputError, match="needs text"):
        groups_of(first, Granularity.SENTENCE, None)
    # Whoever changed the ids is not told the words of others.
    for name in ("input_ids", "attention_mask"):
        encoded[name] = encoded[name][:1, :4]
    with pytest.raises(InputError, match="needs text"):
        words_of(samples_given(encoded, tokenizer)[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, "no input_ids, only attention_mask"),
        ({}, "no input_ids"),
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": []}, r"got \[0\]"),
        ({"input_ids": [[], [9]]}, "text 0 has no tokens"),
        ({"input_ids": [9, 10]}, r"\[batch, pos\], got \[2\]"),
        ({"input_ids": [[9], 10]}, "token ids"),
        ({"input_ids": [["a"]]}, "token ids.*'a'"),
        ({"input_ids": [[9.5, 10.0]]}, "whole numbers.*float32"),
        ({"input_ids": [[[9]]]}, r"got \[1, 1, 1\]"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"got \[0, 5\]"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"got \[2, 0\]"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.bool)}, "bool"),
        ({"input_ids": [[9, 10]], "attention_mask": [[0, 0]]}, "text 0 has no tokens"),
        ({"input_ids": [[9, 10]], "attention_mask": [[1, 1, 1]]}, r"of \[3\] tokens.* \[2\]"),
        ({"input_ids": [[9, 10]], "attention_mask": torch.ones(2, 2)}, r"of \[2, 2\] tokens"),
        ({"input_ids": [[9, 10]], "attention_mask": [1, 1]}, "attention_mask"),
        ({"input_ids": [[9, 10]], "token_type_ids": [[0]]}, r"token_type_ids .* \[1\]"),
        ({"input_ids": [[9, 10]], "token_type_ids": [[0.0, 1.0]]}, "token_type_ids .*float32"),
        ({"input_ids": [[9]], "position_ids": [[3]], "labels": [[1]]}, "position_ids, labels"),
    ],
    ids=range(20),
)
def test_what_is_no_input(new_tokenizer: Any, given: dict[str, Any], message: str) -> None:
    """Each is an InputError that says what is wrong; nothing is dropped in silence."""
    with pytest.raises(InputError, match=message):
        samples_given(given, new_tokenizer())
