"""Granularity: which tokens of a text make a row of activations, and how several become one."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from jaxtyping import Num
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

    def aggregate(self, rows: Num[Tensor, "token d"]) -> Num[Tensor, "1 d"]:
        """One row of several.

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

    def unfold(self, row: Num[Tensor, "1 d"], n: int) -> Num[Tensor, "{n} d"]:
        """The rows of n tokens from the one they became; a sum is shared equally."""
        return (row / n if self is Aggregation.SUM else row).expand(n, -1)


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
    if granularity is Granularity.WORD:
        if sample.words is None:
            raise InputError(
                "WORD needs text, or what a fast tokenizer made of it: ids do not say where words begin"
            )
        return _runs([(index, sample.words[index]) for index in real])
    if sample.text is None:
        raise InputError("SENTENCE needs text: ids do not say where sentences end")
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
    for found in re.finditer(rf"[.?!]+[{_QUOTES})\]}}]*(?=\s)", text):
        word = text[: found.start()].rsplit(None, 1)[-1:] or [""]
        is_short = found.group().startswith(".") and _ABBREVIATION.fullmatch(
            word[0].lstrip(_QUOTES + "([{")
        )
        if not is_short:
            ends.append(found.end())
    return ends
