"""Granularity: which tokens of a text make a row of activations, and how several become one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..hooks import InputError

_ABBREVIATION = re.compile(
    r"(mrs?|ms|dr|prof|st|[js]r|vs|etc|e\.g|i\.e|fig|vol|inc|ltd|co|u\.[sk]|[ap]\.m|[a-z])",
    re.IGNORECASE,
)
"""Words behind which a full stop ends no sentence; single letters are initials."""


class Granularity(Enum):
    """What a row of activations stands for."""

    CLS_TOKEN = "cls_token"
    ALL_TOKENS = "all_tokens"
    TOKEN = "token"
    WORD = "word"
    SENTENCE = "sentence"
    SAMPLE = "sample"


class Aggregation(Enum):
    """How the rows of several tokens become one."""

    MEAN = "mean"
    SUM = "sum"
    MAX = "max"
    MIN = "min"
    SIGNED_MAX = "signed_max"

    def aggregate(self, rows: Tensor) -> Tensor:
        """One row of several: [n, d] -> [1, d].

        ``SIGNED_MAX`` is, for each feature, the value that is largest without its sign.
        """
        if self is Aggregation.MEAN:
            return rows.mean(0, keepdim=True)
        if self is Aggregation.SUM:
            return rows.sum(0, keepdim=True)
        if self is Aggregation.MAX:
            return rows.max(0, keepdim=True).values
        if self is Aggregation.MIN:
            return rows.min(0, keepdim=True).values
        return rows.gather(0, rows.abs().argmax(0, keepdim=True))

    def unfold(self, row: Tensor, n: int) -> Tensor:
        """The rows of n tokens from the one they became: [1, d] -> [n, d]; a sum is shared equally."""
        return (row / n if self is Aggregation.SUM else row).expand(n, -1)


@dataclass(frozen=True)
class Sample:
    """A text as the model reads it.

    Attributes:
        ids: Its token ids, special ones included.
        special: Which of them are special tokens.
        text: The text; None where ids were given.
        words: Which word each token belongs to; None for tokens of none. None where nobody can tell.
        spans: Where each token stands in the text; None where nobody can tell.
    """

    ids: tuple[int, ...]
    special: tuple[bool, ...]
    text: str | None = None
    words: tuple[int | None, ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None


def samples_of(texts: Sequence[str], tokenizer: Any, max_length: int | None) -> list[Sample]:
    """Tokenize texts as their tokenizer does by itself, special tokens and all.

    Raises:
        InputError: A text without a token.
    """
    limit = {} if max_length is None else {"truncation": True, "max_length": max_length}
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(list(texts), return_offsets_mapping=is_fast, **limit)
    special = set(tokenizer.all_special_ids)
    made = []
    for index, text in enumerate(texts):
        ids = tuple(encoded["input_ids"][index])
        if not ids:
            raise InputError(f"text {index} has no tokens: {text!r}")
        words = tuple(encoded.word_ids(index)) if is_fast else _words_by_spaces(ids, tokenizer)
        spans = tuple(tuple(s) for s in encoded["offset_mapping"][index]) if is_fast else None
        made.append(Sample(ids, tuple(i in special for i in ids), text, words, spans))
    return made


def _words_by_spaces(ids: Sequence[int], tokenizer: Any) -> tuple[int | None, ...]:
    """A token begins a word where it begins with a space."""
    words: list[int | None] = []
    current = -1
    for piece in tokenizer.convert_ids_to_tokens(list(ids)):
        if current < 0 or piece[:1] in ("Ġ", "▁", " "):
            current += 1
        words.append(current)
    return tuple(words)


def groups_of(sample: Sample, granularity: Granularity, cls_id: int | None) -> list[list[int]]:
    """The tokens of each row: lists of positions.

    Raises:
        InputError: The granularity needs what this sample lacks (text, a CLS token).
    """
    real = [index for index, special in enumerate(sample.special) if not special]
    if granularity is Granularity.ALL_TOKENS:
        return [[index] for index in range(len(sample.ids))]
    if granularity is Granularity.TOKEN:
        return [[index] for index in real]
    if granularity is Granularity.SAMPLE:
        return [real] if real else []
    if granularity is Granularity.CLS_TOKEN:
        if cls_id is None or sample.ids[0] != cls_id:
            raise InputError(
                f"CLS_TOKEN needs texts that begin with the tokenizer's CLS token ({cls_id}); this one "
                f"begins with {sample.ids[0]}"
            )
        return [[0]]
    if sample.text is None:
        raise InputError(f"{granularity.name} needs text: ids do not say where words begin")
    if granularity is Granularity.WORD:
        return _runs([(index, (sample.words or ())[index]) for index in real])
    if sample.spans is None:
        raise InputError(
            "SENTENCE needs a fast tokenizer, which says where tokens stand in the text"
        )
    ends = sentence_ends(sample.text)
    which = [(i, sum(sample.spans[i][1] > end for end in ends)) for i in real]
    return _runs(which)


def _runs(keyed: list[tuple[int, Any]]) -> list[list[int]]:
    """Neighbours with the same key together."""
    groups: list[list[int]] = []
    last: Any = object()
    for index, key in keyed:
        if key is None or key != last:
            groups.append([])
        groups[-1].append(index)
        last = key
    return groups


def sentence_ends(text: str) -> list[int]:
    """Where sentences end: behind ``.``, ``?`` or ``!`` before a space, but not behind an abbreviation."""
    ends = []
    for found in re.finditer(r"[.?!]+[\"')\]]*(?=\s)", text):
        word = text[: found.start()].rsplit(None, 1)[-1:] or [""]
        is_short = found.group().startswith(".") and _ABBREVIATION.fullmatch(word[0].lstrip("(\"'"))
        if not is_short:
            ends.append(found.end())
    return ends


def rows_of(states: Tensor, groups: list[list[int]], how: Aggregation) -> Tensor:
    """A row for each group of tokens: [pos, d] -> [group, d]."""
    if all(len(group) == 1 for group in groups):
        return states[[group[0] for group in groups]] if groups else states[:0]
    return torch.cat([how.aggregate(states[group]) for group in groups])
