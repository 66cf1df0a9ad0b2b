"""Granularity: which tokens of a text make a row of activations, and how several become one."""

from __future__ import annotations

import re
from bisect import bisect_left
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

from jaxtyping import Int, Num
from torch import Tensor

from ..hooks import InputError
from .samples import Sample

_ABBREVIATION = re.compile(
    r"(mrs?|ms|dr|prof|st|[js]r|vs|etc|e\.g|i\.e|fig|vol|inc|ltd|co|u\.[sk]|[ap]\.m|[a-z])",
    re.IGNORECASE,
)
"""Words behind which a full stop ends no sentence; single letters are initials."""

_SINGLE = "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
_DOUBLE = "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_LOW = "\N{SINGLE LOW-9 QUOTATION MARK}\N{DOUBLE LOW-9 QUOTATION MARK}"
_ANGLE = (
    "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"
)
_QUOTES = f"\"'{_SINGLE}{_DOUBLE}{_LOW}{_ANGLE}"
"""Marks that open in one language close in another."""


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

    def aggregate(self, rows: Num[Tensor, "*row token d"]) -> Num[Tensor, "*row d"]:
        """One row of several.

        ``SIGNED_MAX`` is, for each feature, the value that is largest without its sign.
        """
        if self is Aggregation.MEAN:
            return rows.mean(-2)
        if self is Aggregation.SUM:
            return rows.sum(-2)
        if self is Aggregation.MAX:
            return rows.amax(-2)
        if self is Aggregation.MIN:
            return rows.amin(-2)
        return rows.gather(-2, rows.abs().argmax(-2, keepdim=True)).squeeze(-2)

    def unfold(
        self, rows: Num[Tensor, "row d"], sizes: Int[Tensor, " row"]
    ) -> Num[Tensor, "token d"]:
        """The rows of tokens from those they became, each for as many as it has; sums are shared equally."""
        each = rows / sizes[:, None] if self is Aggregation.SUM else rows
        return each.repeat_interleave(sizes, 0)


class Groups(NamedTuple):
    """The tokens that make the rows of a text.

    Flat, because there may be millions of them, and lists of lists keep the garbage collector busy.

    Attributes:
        tokens: Positions in the text, one row's after the other's.
        sizes: How many of them are each row's.
    """

    tokens: list[int]
    sizes: list[int]

    def rows(self) -> list[list[int]]:
        """The tokens of each row by itself."""
        ends = list(accumulate(self.sizes))
        return [self.tokens[end - n : end] for end, n in zip(ends, self.sizes, strict=True)]


def groups_of(sample: Sample, granularity: Granularity, cls_id: int | None) -> Groups:
    """The tokens of each row.

    Raises:
        InputError: The granularity needs what this sample lacks (text, a CLS token).
    """
    if granularity is Granularity.ALL_TOKENS:
        return Groups([*range(len(sample.ids))], [1] * len(sample.ids))
    if granularity is Granularity.CLS_TOKEN:
        if cls_id is None or sample.ids[0] != cls_id:
            raise InputError(
                f"CLS_TOKEN needs texts that begin with the tokenizer's CLS token ({cls_id}); this one "
                f"begins with {sample.ids[0]}"
            )
        return Groups([0], [1])
    real = [index for index, special in enumerate(sample.special) if not special]
    if granularity is Granularity.TOKEN:
        return Groups(real, [1] * len(real))
    if granularity is Granularity.SAMPLE:
        return Groups(real, [len(real)] if real else [])
    if granularity is Granularity.WORD:
        if sample.words is None:
            raise InputError(
                "WORD needs text, or what a fast tokenizer made of it: ids do not say where words begin"
            )
        return Groups(real, _runs([sample.words[index] for index in real]))
    if sample.text is None:
        raise InputError("SENTENCE needs text: ids do not say where sentences end")
    if sample.spans is None:
        raise InputError(
            "SENTENCE needs a fast tokenizer, which says where tokens stand in the text"
        )
    ends = sentence_ends(sample.text)
    return Groups(real, _runs([bisect_left(ends, sample.spans[index][1]) for index in real]))


def _runs(keys: list[int | None]) -> list[int]:
    """How many neighbours have the same key; those without one stand alone."""
    sizes: list[int] = []
    last: int | None = None
    for key in keys:
        if key is None or key != last:
            sizes.append(0)
        sizes[-1] += 1
        last = key
    return sizes


def sentence_ends(text: str) -> list[int]:
    """Where sentences end: behind ``.``, ``?`` or ``!`` before a space, but not behind an abbreviation."""
    ends = []
    for found in re.finditer(rf"[.?!]+[{_QUOTES})\]}}]*(?=\s)", text):
        word = text[: found.start()].rsplit(None, 1)[-1:] or [""]
        is_short = found.group().startswith(".") and _ABBREVIATION.fullmatch(
            word[0].lstrip(_QUOTES + "([{")
        )
        if not is_short:
            ends.append(found.end())
    return ends
