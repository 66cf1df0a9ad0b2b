"""Granularity: which tokens make a row, on texts cut up by hand, and how the rows of several become one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lensbridge import Aggregation, Granularity, InputError, demo
from lensbridge.methods.granularity import groups_of, sentence_ends
from lensbridge.methods.samples import Sample, samples_of

TEXTS: list[tuple[str, str, list[str]]] = [
    # a text; its words, as GPT-2's rule makes them, between bars; its sentences
    (
        "Dr. Smith met Mr. Jones. They talked.",
        "Dr|.|Smith|met|Mr|.|Jones|.|They|talked|.",
        ["Dr. Smith met Mr. Jones.", "They talked."],
    ),
    (
        '"Really?" he said. "Yes!" she said.',
        '"|Really|?"|he|said|.|"|Yes|!"|she|said|.',
        ['"Really?"', "he said.", '"Yes!"', "she said."],
    ),
    ("Wait... what?! No way.", "Wait|...|what|?!|No|way|.", ["Wait...", "what?!", "No way."]),
    (
        "It costs 3.14 dollars. Wow!!",
        "It|costs|3|.|14|dollars|.|Wow|!!",
        ["It costs 3.14 dollars.", "Wow!!"],
    ),
    (
        "The U.S. team left at 5 p.m. on Friday. Good.",
        "The|U|.|S|.|team|left|at|5|p|.|m|.|on|Friday|.|Good|.",
        ["The U.S. team left at 5 p.m. on Friday.", "Good."],
    ),
    (
        "(See fig. 2.) It works, e.g. here.",
        "(|See|fig|.|2|.)|It|works|,|e|.|g|.|here|.",
        ["(See fig. 2.)", "It works, e.g. here."],
    ),
    (
        "J. R. Smith wrote it. Who?",
        "J|.|R|.|Smith|wrote|it|.|Who|?",
        ["J. R. Smith wrote it.", "Who?"],
    ),
    ("no full stop here", "no|full|stop|here", ["no full stop here"]),
    (
        "One line. Another, vs. me!\nThird?",
        "One|line|.|Another|,|vs|.|me|!|\n|Third|?",
        ["One line.", "Another, vs. me!", "Third?"],
    ),
    (
        "Don't stop. It's fine, isn't it?",
        "Don|'t|stop|.|It|'s|fine|,|isn|'t|it|?",
        ["Don't stop.", "It's fine, isn't it?"],
    ),
]

ROWS = torch.tensor([[1.0, -5.0], [3.0, 2.0], [-4.0, 1.0]])
MADE = {
    Aggregation.MEAN: [0.0, -2 / 3],
    Aggregation.SUM: [0.0, -2.0],
    Aggregation.MAX: [3.0, 2.0],
    Aggregation.MIN: [-4.0, -5.0],
    Aggregation.SIGNED_MAX: [-4.0, -5.0],
}


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Any:
    """The embedded model's tokenizer: byte-level pairs, words as in GPT-2."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.path())


def pieces(sample: Sample, granularity: Granularity) -> list[str]:
    """The part of the text that each row stands for, up to the next one."""
    groups = groups_of(sample, granularity, None).rows()
    starts = [sample.spans[group[0]][0] for group in groups]
    return [
        sample.text[start:end]
        for start, end in zip(starts, [*starts[1:], len(sample.text)], strict=True)
    ]


# --- which tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "words", "sentences"), TEXTS, ids=range(len(TEXTS)))
def test_words_and_sentences_by_hand(
    bytes_tokenizer: Any, text: str, words: str, sentences: list[str]
) -> None:
    """Ten texts fall into the words and sentences that were written down by hand, whole and in order."""
    (sample,) = samples_of([text], bytes_tokenizer, None)
    for granularity, expected in (
        (Granularity.WORD, words.split("|")),
        (Granularity.SENTENCE, sentences),
    ):
        found = pieces(sample, granularity)
        assert "".join(found) == text
        assert [x.strip(" \n") or x.strip(" ") for x in found] == expected
        tokens = [i for group in groups_of(sample, granularity, None).rows() for i in group]
        assert tokens == list(range(len(sample.ids)))


@pytest.mark.parametrize(("text", "words", "sentences"), TEXTS[:3], ids=range(3))
def test_all_texts_of_a_list_are_cut_as_alone(
    bytes_tokenizer: Any, text: str, words: str, sentences: list[str]
) -> None:
    """A text's rows do not depend on the texts beside it."""
    others = [t for t, _, _ in TEXTS]
    (alone,) = samples_of([text], bytes_tokenizer, None)
    assert samples_of([*others, text], bytes_tokenizer, None)[-1] == alone


def test_rows_with_special_tokens_around(letters: Any) -> None:
    """[CLS] and [SEP] are in no row but those of ALL_TOKENS and CLS_TOKEN; positions count them."""
    (sample,) = samples_of(['Hi you. "No!" ok'], letters("[CLS] $A [SEP]"), None)
    # 0 [CLS], 1 H, 2 i, 3 y, 4 o, 5 u, 6 ., 7 ", 8 N, 9 o, 10 !, 11 ", 12 o, 13 k, 14 [SEP]
    expected = {
        Granularity.CLS_TOKEN: [[0]],
        Granularity.ALL_TOKENS: [[i] for i in range(15)],
        Granularity.TOKEN: [[i] for i in range(1, 14)],
        Granularity.WORD: [[1, 2], [3, 4, 5], [6], [7], [8, 9], [10], [11], [12, 13]],
        Granularity.SENTENCE: [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11], [12, 13]],
        Granularity.SAMPLE: [list(range(1, 14))],
    }
    assert set(expected) == set(Granularity)
    for granularity, groups in expected.items():
        assert groups_of(sample, granularity, 1).rows() == groups, granularity


def test_special_tokens_written_in_the_text(bytes_tokenizer: Any) -> None:
    """A special token inside the text is part of no word, and words on its two sides stay two."""
    (sample,) = samples_of(["The<|endoftext|>The"], bytes_tokenizer, None)
    assert sample.special == (False, True, False)
    assert groups_of(sample, Granularity.TOKEN, None).rows() == [[0], [2]]
    assert groups_of(sample, Granularity.WORD, None).rows() == [[0], [2]]
    assert groups_of(sample, Granularity.SAMPLE, None).rows() == [[0, 2]]
    assert groups_of(sample, Granularity.ALL_TOKENS, None).rows() == [[0], [1], [2]]


def test_tokens_of_no_word() -> None:
    """A token that belongs to no word, such as one that was added to the vocabulary, is a row by itself."""
    words = (None, 0, 0, None, None, 1)
    sample = Sample((1, 9, 10, 11, 12, 13), (True, *[False] * 5), "ab+-c", words)
    assert groups_of(sample, Granularity.WORD, 1).rows() == [[1, 2], [3], [4], [5]]


def test_a_text_of_special_tokens_has_no_rows(bytes_tokenizer: Any) -> None:
    """Where nothing is left there is no row, not one of nothing."""
    (sample,) = samples_of(["<|endoftext|>"], bytes_tokenizer, None)
    rest = [g for g in Granularity if g not in (Granularity.ALL_TOKENS, Granularity.CLS_TOKEN)]
    assert [groups_of(sample, granularity, None).rows() for granularity in rest] == [[]] * 4


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("A dog. A cat.", [6]),
        ("etc. and so on. Fine", [15]),
        ("One?! Two.) Three", [5, 11]),
        ("no.space", []),
        ("(i.e. this). That", [12]),
        ("Inc. Ltd. co. ST. Prof. x", []),
        ("He said \N{LEFT DOUBLE QUOTATION MARK}No.\N{RIGHT DOUBLE QUOTATION MARK} Then", [13]),
        ("\N{LEFT SINGLE QUOTATION MARK}Go!\N{RIGHT SINGLE QUOTATION MARK} he said.", [5]),
        ("(See \N{LEFT DOUBLE QUOTATION MARK}Dr. No\N{RIGHT DOUBLE QUOTATION MARK}.) Good", [15]),
        ("", []),
    ],
)
def test_sentence_ends(text: str, ends: list[int]) -> None:
    """A full stop behind an abbreviation or before no space ends nothing; the text's end is not listed."""
    assert sentence_ends(text) == ends


def test_what_a_sample_lacks_is_said(letters: Any) -> None:
    """Ids alone have no words or sentences; a text that begins otherwise has no CLS token."""
    bare = Sample((1, 9, 10), (True, False, False))
    for granularity in (Granularity.WORD, Granularity.SENTENCE):
        with pytest.raises(InputError, match="needs text"):
            groups_of(bare, granularity, 1)
    assert groups_of(bare, Granularity.CLS_TOKEN, 1).rows() == [[0]]
    for cls_id in (None, 7):
        with pytest.raises(InputError, match="begins with 1"):
            groups_of(bare, Granularity.CLS_TOKEN, cls_id)


# --- what a row is ------------------------------------------------------------------------------------------


def test_aggregation_by_hand() -> None:
    """Each way of making one row of three gives the values computed by hand."""
    assert set(MADE) == set(Aggregation)
    for how, expected in MADE.items():
        torch.testing.assert_close(how.aggregate(ROWS), torch.tensor(expected), atol=1e-7, rtol=0)


@pytest.mark.parametrize("how", Aggregation)
def test_several_rows_at_once(how: Aggregation) -> None:
    """Of two times three rows, one for each three."""
    found = how.aggregate(torch.stack([ROWS, -ROWS]))
    torch.testing.assert_close(found[0], torch.tensor(MADE[how]), atol=1e-7, rtol=0)
    assert torch.equal(found[1], how.aggregate(-ROWS))


@pytest.mark.parametrize("how", Aggregation)
def test_unfold_is_the_inverse(how: Aggregation) -> None:
    """A row put back in n places makes the same row again; a sum is shared, anything else repeated."""
    rows = torch.tensor([[2.0, -3.0, 0.5], [1.0, 8.0, -4.0]])
    back = how.unfold(rows, torch.tensor([4, 1]))
    assert back.shape == (5, 3)
    assert torch.equal(how.aggregate(back[:4]), rows[0])
    assert torch.equal(back[4], rows[1])
    for row in back[:4]:
        assert torch.equal(row, rows[0] / 4 if how is Aggregation.SUM else rows[0])
