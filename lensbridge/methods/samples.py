"""Samples: texts, ids and what tokenizers return, as rows of tokens that a model can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..hooks import InputError

_READ = ("input_ids", "attention_mask", "token_type_ids")
_UNREAD = (
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "num_truncated_tokens",
    "overflowing_tokens",
    "overflow_to_sample_mapping",
)
"""What else tokenizers return about tokens, which no model reads."""

_NO_LIMIT = 10**20
"""From here on a tokenizer's longest text stands for no limit: transformers writes 10**30. XLNet says -1."""

_BLANKS = ("Ġ", "▁", " ", "Ċ", "\n", "\r", "\t", "ĉ", "č")
"""White space as pieces of words write it: as it is, or as byte-level and SentencePiece tokenizers do."""


@dataclass(frozen=True)
class Sample:
    """A text as the model reads it.

    Attributes:
        ids: Its token ids, special ones included.
        special: Which of them are special tokens.
        text: The text; None where ids were given.
        words: Which word each token belongs to; None for tokens of none. None where nobody can tell.
        spans: Where each token stands in the text; None where nobody can tell.
        types: Which part of a pair of texts each token belongs to (``token_type_ids``); None where all are of
            the first.
    """

    ids: tuple[int, ...]
    special: tuple[bool, ...]
    text: str | None = None
    words: tuple[int | None, ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    types: tuple[int, ...] | None = None


def samples_of(
    texts: Sequence[str], tokenizer: Any, max_length: int | None, *, detailed: bool = True
) -> list[Sample]:
    """Tokenize texts as their tokenizer does by itself, special tokens and all.

    Args:
        texts: The texts.
        tokenizer: Their tokenizer; it is left as it was.
        max_length: How many tokens the model reads; texts are cut there, or sooner where the tokenizer says.
        detailed: Whether to find out which word each token belongs to and where it stands.
    Raises:
        InputError: A text without a token.
    """
    limits = [max_length, getattr(tokenizer, "model_max_length", None)]
    limit = min((x for x in limits if x is not None and 0 < x < _NO_LIMIT), default=None)
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    with untouched(tokenizer):
        encoded = tokenizer(list(texts), return_offsets_mapping=is_fast and detailed, **cut)
    return _made(
        tokenizer,
        encoded["input_ids"],
        texts=texts,
        types=encoded.get("token_type_ids"),
        words=_words(encoded, tokenizer) if detailed else None,
        spans=encoded.get("offset_mapping"),
    )


def samples_given(
    given: Mapping[str, Any], tokenizer: Any, *, detailed: bool = True
) -> list[Sample]:
    """Samples of ids, or of what a tokenizer returned: tensors or lists, padded or not.

    Args:
        given: ``input_ids``; ``attention_mask`` and ``token_type_ids`` if there are any.
        tokenizer: Says which ids are special.
        detailed: Whether to find out which word each token belongs to.
    Raises:
        InputError: No ids, something that is none, or keywords that would be dropped.
    """
    dropped = [name for name in given if name not in (*_READ, *_UNREAD)]
    if dropped:
        raise InputError(
            f"{', '.join(dropped)} would be dropped: of an input {', '.join(_READ)} are read; give what "
            "else the model's forward takes as forward_kwargs"
        )
    if given.get("input_ids") is None:
        raise InputError(f"the input has no input_ids, only {', '.join(given) or 'nothing at all'}")
    ids = _table(given["input_ids"], "token ids")
    mask = _beside(given, "attention_mask", ids)
    # Of padding, which may stand on either side, nothing is kept.
    kept = [
        [i for i in range(len(row)) if mask is None or mask[index][i]]
        for index, row in enumerate(ids)
    ]

    def of_real(table: Any) -> Any:
        if table is None or [len(row) for row in table] != [len(row) for row in ids]:
            return None  # of words: somebody has changed the ids
        if mask is None or all(map(all, mask)):
            return table
        return [[row[i] for i in keep] for row, keep in zip(table, kept, strict=True)]

    types = _beside(given, "token_type_ids", ids)
    knows_words = detailed and bool(getattr(given, "encodings", None))
    words = _words(given, tokenizer) if knows_words else None
    return _made(tokenizer, of_real(ids), types=of_real(types), words=of_real(words))


def _made(
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    *,
    texts: Sequence[str] | None = None,
    types: Sequence[Sequence[int]] | None = None,
    words: Sequence[Sequence[int | None]] | None = None,
    spans: Sequence[Sequence[Any]] | None = None,
) -> list[Sample]:
    all_special = set(tokenizer.all_special_ids)
    samples = []
    for index, row in enumerate(ids):
        text = None if texts is None else texts[index]
        if not row:
            raise InputError(
                f"text {index} has no tokens" + ("" if text is None else f": {text!r}")
            )
        sample = Sample(
            ids=tuple(row),
            special=tuple([i in all_special for i in row]),
            text=text,
            words=None if words is None else tuple(words[index]),
            spans=None if spans is None else tuple([tuple(span) for span in spans[index]]),
            # Tokenizers of the general kind say 0 of every token, also to models that know no pairs.
            types=None if types is None or not any(types[index]) else tuple(types[index]),
        )
        samples.append(sample)
    return samples


@contextmanager
def untouched(tokenizer: Any) -> Iterator[None]:
    """Leave a fast tokenizer's settings: a call writes how it cuts and pads into what would be saved."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        yield
        return
    cuts, pads = core.truncation, core.padding
    try:
        yield
    finally:
        core.no_truncation() if cuts is None else core.enable_truncation(**cuts)
        core.no_padding() if pads is None else core.enable_padding(**pads)


# --- ids ----------------------------------------------------------------------------------------------------


def _table(given: Any, what: str) -> list[Any]:
    """Rows of whole numbers; those of a list may be of unequal length."""
    if isinstance(given, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in given):
        rows = [_row(row, what) for row in given]
        if rows and all(row is not None for row in rows):
            return rows
    table = _whole(given, what)
    if table.dim() != 2 or not table.numel():
        raise InputError(
            f"{what} have shape [batch, pos], got {list(table.shape)} {table.dtype}; none may be empty"
        )
    return table.tolist()


def _row(given: Any, what: str) -> Sequence[int] | None:
    """A row of whole numbers; None for what has more dimensions than that."""
    if all(type(item) is int for item in given):
        return given
    made = _whole(given, what)
    return made.tolist() if made.dim() == 1 else None


def _whole(given: Any, what: str) -> Tensor:
    try:
        made = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} have shape [batch, pos], got {given!r}") from error
    if what == "attention_mask":
        return (made != 0).long()
    if made.numel() and (made.is_floating_point() or made.dtype == torch.bool):
        raise InputError(f"{what} are whole numbers, got {list(made.shape)} {made.dtype}")
    return made


def _beside(given: Mapping[str, Any], name: str, ids: list[Any]) -> list[Any] | None:
    """What an input says of each token, in the shape of its ids."""
    if given.get(name) is None:
        return None
    table = _table(given[name], name)
    theirs, ours = [len(row) for row in table], [len(row) for row in ids]
    if theirs != ours:
        raise InputError(f"{name} says something of {theirs} tokens, but there are {ours}")
    return table


# --- words --------------------------------------------------------------------------------------------------


def _words(encoded: Any, tokenizer: Any) -> list[list[int | None]]:
    """Which word each token of each text belongs to."""
    if getattr(tokenizer, "is_fast", False):
        each = enumerate(encoded.encodings)
        return [_cut_at_spaces(encoded.word_ids(index), own.tokens) for index, own in each]
    begins = _beginnings(tokenizer)
    return [
        _counted(begins(tokenizer.convert_ids_to_tokens(list(row)))) for row in encoded["input_ids"]
    ]


def _cut_at_spaces(words: Sequence[int | None], pieces: Sequence[str]) -> list[int | None]:
    """A fast tokenizer's words, none longer than to the next space.

    To tokenizers of Llama 2's and Gemma's kind a whole text is one word.
    """
    made: list[int | None] = []
    current, before, is_blank = -1, None, True
    for word, piece in zip(words, pieces, strict=True):
        if word is None or word != before or (piece.startswith(_BLANKS) and not is_blank):
            current += 1
        made.append(None if word is None else current)
        # Spaces by themselves go with the word behind them.
        before, is_blank = word, not piece.strip("".join(_BLANKS))
    return made


def _counted(begins: Sequence[bool]) -> list[int | None]:
    """Which word each piece belongs to: [True, False, True] -> [0, 0, 1]."""
    return list(accumulate([0, *begins[1:]]))


def _beginnings(tokenizer: Any) -> Callable[[list[str]], list[bool]]:
    """How to tell the pieces that begin words, for a tokenizer that does not number words.

    Its vocabulary shows how it writes pieces: with the space before a word, or with a mark on those that go
    on with one (``##ing``), that another follows (``play@@``), or that end one (``ing</w>``).
    """
    pieces = [piece for piece in tokenizer.get_vocab() if len(piece) > 1]
    if not any(piece.startswith(_BLANKS) for piece in pieces):
        if any(piece.startswith("##") for piece in pieces):
            return lambda row: [not piece.startswith("##") for piece in row]
        if any(piece.endswith("@@") for piece in pieces):
            return lambda row: [not before.endswith("@@") for before in ["", *row[:-1]]]
        if any(piece.endswith("</w>") for piece in pieces):
            return lambda row: [before.endswith("</w>") for before in ["</w>", *row[:-1]]]
    return lambda row: [piece.startswith(_BLANKS) for piece in row]
