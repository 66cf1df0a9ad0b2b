"""Texts as rows of a dataset: which tokens are the prompt's, and which are to be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...hooks import InputError
from ..spans import Reader, Reading


@dataclass
class Row:
    """One example.

    Attributes:
        ids: Its token ids.
        loss: Which of them are to be predicted.
        targets: What is to be predicted there, if that is not what stands there.
        foils: What should not be predicted there.
    """

    ids: list[int]
    loss: list[bool]
    targets: list[int] | None = None
    foils: list[int] | None = None


def as_texts(given: Any, what: str) -> list[str]:
    """A list of strings, or an error that says which is none.

    Raises:
        InputError: A single string, nothing, or an item of another kind.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise InputError(f"{what} is a list of strings, one a row; got {given!r}")
    texts = list(given)
    if not texts:
        raise InputError(f"{what} is empty; give at least one row")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"row {index} of {what} is {type(text).__name__}, expected str: {text!r}"
            )
    return texts


def same_number(first: Sequence[Any], second: Sequence[Any], names: tuple[str, str]) -> None:
    """Refuse two lists that do not belong together."""
    if len(first) != len(second):
        raise InputError(
            f"there are {len(first)} {names[0]} and {len(second)} {names[1]}; give one of each a row"
        )


# --- prompt and target ------------------------------------------------------------------------------------


def prompt_rows(
    reader: Reader,
    prompts: Any,
    targets: Any,
    foils: Any = None,
    *,
    prepend_bos: bool | None = None,
    separator: str = "",
    join: str = "text",
    max_length: int | None = None,
    truncate_prompt: bool = False,
) -> list[Row]:
    """Rows of prompts and what follows them; see `CHGDataset.from_texts`."""
    if join not in ("text", "tokens"):
        raise InputError(f"join must be 'text' or 'tokens', got {join!r}")
    if join == "tokens" and separator:
        raise InputError(
            "join='tokens' tokenizes prompt and target apart: write the separator at the end of the prompts "
            "or at the front of the targets"
        )
    prompts, targets = as_texts(prompts, "texts"), as_texts(targets, "targets")
    same_number(prompts, targets, ("texts", "targets"))
    parts = _joined(reader, prompts, targets, separator, join, "target")
    wrong: list[tuple[list[int], int]] | None = None
    if foils is not None:
        foils = as_texts(foils, "foils")
        same_number(prompts, foils, ("texts", "foils"))
        wrong = _joined(reader, prompts, foils, separator, join, "foil")
        for index, pair in enumerate(zip(parts, wrong, strict=True)):
            _check_foil(index, *pair, targets[index], foils[index])
    around = reader.around(prepend_bos)
    rows = [_row(around, ids, first) for ids, first in parts]
    for row, other in zip(rows, wrong or [], strict=False):
        row.foils = [*around[0], *other[0], *around[1]]
    return fitted(rows, reader, max_length, truncate_prompt=truncate_prompt, kept=len(around[0]))


def _row(around: tuple[list[int], list[int]], ids: list[int], first: int) -> Row:
    """A row whose own tokens count from one of them on."""
    front, back = around
    loss = [*[False] * (len(front) + first), *[True] * (len(ids) - first), *[False] * len(back)]
    return Row([*front, *ids, *back], loss)


def _joined(
    reader: Reader,
    prompts: list[str],
    targets: list[str],
    separator: str,
    join: str,
    what: str,
) -> list[tuple[list[int], int]]:
    """For each row its own tokens, and which of them is the first of the target."""
    for index, target in enumerate(targets):
        if not target:
            raise InputError(f"row {index}: the {what} is empty; there is nothing to predict")
    heads = [prompt + separator for prompt in prompts]
    if join == "tokens":
        pairs = zip(reader.read(heads), reader.read(targets), strict=True)
        made = [([*head.ids, *tail.ids], len(head.ids)) for head, tail in pairs]
    else:
        whole = reader.read([h + t for h, t in zip(heads, targets, strict=True)])
        if whole[0].places is None:
            firsts = _by_prefix(reader, prompts, heads, whole, what)
        else:
            rows = zip(whole, prompts, targets, strict=True)
            firsts = [
                _by_place(reader, index, *row, separator, what) for index, row in enumerate(rows)
            ]
        made = [(reading.ids, first) for reading, first in zip(whole, firsts, strict=True)]
    for index, (ids, first) in enumerate(made):
        if first >= len(ids):
            raise InputError(f"row {index}: the {what} {targets[index]!r} has no tokens")
    return made


def _by_place(
    reader: Reader,
    index: int,
    reading: Reading,
    prompt: str,
    target: str,
    separator: str,
    what: str,
) -> int:
    """Which token is the first of a target: those with a character of it, and none of the prompt."""
    ends = len(prompt), len(prompt) + len(separator)
    count = 0
    for token, (start, end) in zip(reading.ids, reading.places or [], strict=True):
        if end <= ends[1]:
            count += 1
        elif start < ends[0]:
            piece = reader.tokenizer.convert_ids_to_tokens([token])[0]
            raise InputError(
                f"row {index}: the token {piece!r} is the end of the prompt and the beginning of the {what} "
                f"in one ({prompt[start:]!r} + {(separator + target)[: end - ends[0]]!r}); "
                + _advice(prompt, target, what)
            )
    return count


def _advice(prompt: str, target: str, what: str) -> str:
    bare = prompt.rstrip()
    apart = "or pass join='tokens' to tokenize the two apart"
    if bare == prompt:
        return f"cut the text where a token begins, {apart}"
    moved = prompt[len(bare) :] + target
    return f"move the white space into the {what}: prompt {bare[-30:]!r}, {what} {moved[:30]!r}; {apart}"


def _by_prefix(
    reader: Reader, prompts: list[str], heads: list[str], whole: list[Reading], what: str
) -> list[int]:
    """The same by comparing with the tokens of the prompts alone, for tokenizers that know no places."""
    with_separator, without = reader.read(heads), reader.read(prompts)
    firsts = []
    for index, row in enumerate(whole):
        fitting = [
            len(head.ids)
            for head in (with_separator[index], without[index])
            if row.ids[: len(head.ids)] == head.ids
        ]
        if not fitting:
            raise InputError(
                f"row {index}: with the {what} behind it the prompt is tokenized otherwise than alone "
                f"({prompts[index][-30:]!r}); cut the text where a token begins, or pass join='tokens' to "
                "tokenize the two apart"
            )
        firsts.append(fitting[0])
    return firsts


def _check_foil(
    index: int,
    right: tuple[list[int], int],
    wrong: tuple[list[int], int],
    target: str,
    foil: str,
) -> None:
    (ids, first), (other, at) = right, wrong
    sizes = len(ids) - first, len(other) - at
    if sizes[0] != sizes[1]:
        raise InputError(
            f"row {index}: the foil {foil!r} is {sizes[1]} tokens and the target {target!r} {sizes[0]}; they "
            "are compared token by token, so give a foil of as many"
        )
    if ids[:first] != other[:at]:
        raise InputError(
            f"row {index}: with the foil {foil!r} behind it the prompt is tokenized otherwise than with the "
            f"target {target!r}; cut the text where a token begins, or pass join='tokens'"
        )
    if ids == other:
        raise InputError(f"row {index}: the foil {foil!r} is the target")


# --- length -----------------------------------------------------------------------------------------------


def fitted(
    rows: list[Row],
    reader: Reader,
    max_length: int | None,
    *,
    truncate_prompt: bool | None = None,
    kept: int = 0,
) -> list[Row]:
    """Rows that are not too long.

    Args:
        rows: Some rows.
        reader: Says how much its model can read, if it comes from a bridge.
        max_length: How many tokens a row may have.
        truncate_prompt: Whether to cut prompts at the front to make rows fit; None where that cannot be.
        kept: How many tokens at the front stay (BOS).
    Raises:
        InputError: A row that is too long and may not be cut, or cannot be without losing its target.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length must be at least 1, got {max_length}")
    limit = reader.n_ctx if max_length is None else max_length
    if limit is None:
        return rows
    long = [index for index, row in enumerate(rows) if len(row.ids) > limit]
    if long and not truncate_prompt:
        few = ", ".join(f"{i} ({len(rows[i].ids)} tokens)" for i in long[:5])
        source = "the model reads" if max_length is None else "max_length is"
        cutting = (
            ""
            if truncate_prompt is None
            else ", or pass truncate_prompt=True to cut prompts at the front (targets are never cut)"
        )
        raise InputError(
            f"{len(long)} of {len(rows)} rows are too long, {source} {limit}: {few}; leave them out{cutting}"
        )
    for index in long:
        rows[index] = _cut(rows[index], index, limit, kept)
    return rows


def _cut(row: Row, index: int, limit: int, kept: int) -> Row:
    excess = len(row.ids) - limit
    first = row.loss.index(True)
    # Something must stay in front of the target, to predict it from.
    if excess > first - max(kept, 1):
        raise InputError(
            f"row {index}: its target is {len(row.ids) - first} tokens, which do not fit into {limit} behind "
            "anything of the prompt; raise max_length or leave the row out"
        )

    def shorter(items: list[Any]) -> list[Any]:
        return [*items[:kept], *items[kept + excess :]]

    foils = None if row.foils is None else shorter(row.foils)
    return Row(shorter(row.ids), shorter(row.loss), None, foils)


# --- one token, masks, whole texts ------------------------------------------------------------------------


def last_token_rows(reader: Reader, texts: Any, prepend_bos: bool | None) -> list[Row]:
    """Rows whose last token is to be predicted."""
    texts = as_texts(texts, "texts")
    around = reader.around(prepend_bos)
    readings = reader.read(texts)
    for index, reading in enumerate(readings):
        if not reading.ids:
            raise InputError(f"row {index} has no tokens: {texts[index]!r}")
    return [_row(around, reading.ids, len(reading.ids) - 1) for reading in readings]


def whole_rows(
    reader: Reader, texts: Any, prepend_bos: bool | None, max_length: int | None, truncate: bool
) -> list[Row]:
    """Rows without a token that is to be predicted."""
    texts = as_texts(texts, "texts")
    front, back = reader.around(prepend_bos)
    limit = reader.n_ctx if max_length is None else max_length
    room = None if limit is None else limit - len(front) - len(back)
    rows = []
    for index, reading in enumerate(reader.read(texts)):
        own = reading.ids
        if not own:
            raise InputError(f"row {index} has no tokens: {texts[index]!r}")
        if room is not None and len(own) > room:
            if not truncate or room < 1:
                raise InputError(
                    f"row {index} has {len(own) + len(front) + len(back)} tokens, more than {limit}; pass "
                    "truncate=True to cut texts at the end"
                )
            own = own[:room]
        ids = [*front, *own, *back]
        rows.append(Row(ids, [False] * len(ids)))
    return rows


def masked_rows(
    reader: Reader,
    texts: Any,
    targets: Any,
    foils: Any,
    prepend_bos: bool | None,
    max_length: int | None,
) -> list[Row]:
    """Rows with mask tokens in them, and what belongs there."""
    mask_id = reader.tokenizer.mask_token_id
    if mask_id is None:
        raise InputError("this tokenizer has no mask token; from_masked is for masked-LM models")
    texts, targets = as_texts(texts, "texts"), _listed(targets, "targets")
    same_number(texts, targets, ("texts", "targets"))
    if foils is not None:
        foils = _listed(foils, "foils")
        same_number(texts, foils, ("texts", "foils"))
    front, back = reader.around(prepend_bos)
    rows = []
    for index, reading in enumerate(reader.read(texts)):
        loss = [token == mask_id for token in reading.ids]
        if not any(loss):
            raise InputError(
                f"row {index} has no {reader.tokenizer.mask_token!r} in it: {texts[index]!r}"
            )

        def filled(
            given: Any,
            what: str,
            index: int = index,
            ids: list[int] = reading.ids,
            loss: list[bool] = loss,
        ) -> list[int]:
            found = iter(_tokens_for(reader, given, sum(loss), f"row {index}: the {what}"))
            own = [next(found) if is_mask else i for i, is_mask in zip(ids, loss, strict=True)]
            return [*front, *own, *back]

        rows.append(
            Row(
                [*front, *reading.ids, *back],
                [*[False] * len(front), *loss, *[False] * len(back)],
                filled(targets[index], "target"),
                None if foils is None else filled(foils[index], "foil"),
            )
        )
    return fitted(rows, reader, max_length)


def _listed(given: Any, what: str) -> list[Any]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise InputError(f"{what} is a list with one item a row; got {given!r}")
    return list(given)


def _tokens_for(reader: Reader, given: Any, count: int, name: str) -> list[int]:
    """The ids of what belongs in some masks: text, an id, or a list of these."""
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    ids: list[int] = []
    for item in items:
        if isinstance(item, str):
            ids += reader.read([item])[0].ids
        elif isinstance(item, int) and not isinstance(item, bool):
            ids.append(item)
        else:
            raise InputError(f"{name} is text, a token id, or a list of these; got {item!r}")
    if len(ids) != count:
        shown = reader.tokenizer.convert_ids_to_tokens(ids)
        raise InputError(
            f"{name} {given!r} is {len(ids)} tokens ({', '.join(map(str, shown[:8]))}), for {count} "
            "masks; give one token a mask"
        )
    return ids
