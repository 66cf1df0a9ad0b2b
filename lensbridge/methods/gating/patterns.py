"""The ABA / ABB task: lines of three words, whose last one follows from the pattern of the lines before."""

from __future__ import annotations

import random
import string

from ...hooks import InputError
from ..spans import Reader, Reading
from .text_rows import Row

PATTERNS = ("aba", "abb")


def pattern_rows(
    reader: Reader,
    pattern: str,
    num_samples: int,
    num_lines: int,
    use_vocab_tokens: bool,
    vocab_size: int,
    seed: int,
) -> list[Row]:
    """Rows of the task; see `CHGDataset.from_pattern_task`."""
    if pattern not in PATTERNS:
        raise InputError(f"pattern must be one of {PATTERNS}, got {pattern!r}")
    if num_samples < 1 or num_lines < 1:
        raise InputError(
            f"num_samples and num_lines are at least 1, got {num_samples} and {num_lines}"
        )
    if vocab_size < 2 * num_lines:
        raise InputError(
            f"{num_lines} lines have {2 * num_lines} different words, so vocab_size must be at least that; "
            f"got {vocab_size}"
        )
    # A string as seed gives the same numbers in every process; the global generator is left alone.
    drawn = random.Random(f"lensbridge {pattern} {seed}")
    ids = _words(reader, use_vocab_tokens, vocab_size, drawn)
    words = sorted(ids)
    texts, wrong = [], []
    for _ in range(num_samples):
        # No word stands in two lines: only the pattern helps.
        chosen = drawn.sample(words, 2 * num_lines)
        pairs = list(zip(chosen[::2], chosen[1::2], strict=True))
        texts.append("".join(_line(a, b, pattern) for a, b in pairs))
        a, b = pairs[-1]
        wrong.append(ids[b if pattern == "aba" else a])
    front, _ = reader.around()
    rows = []
    for reading, foil in zip(reader.read(texts), wrong, strict=True):
        row = [*front, *reading.ids]
        rows.append(Row(row, [*[False] * (len(row) - 1), True], None, [*row[:-1], foil]))
    return rows


def _line(a: str, b: str, pattern: str) -> str:
    # With the line break in front every word follows a space, also the very first: tokens differ there.
    return f"\n {a}^ {b}^ {a if pattern == 'aba' else b}"


def _words(
    reader: Reader, use_vocab_tokens: bool, wanted: int, drawn: random.Random
) -> dict[str, int]:
    """So many words that are one token wherever they stand in a line, and which."""
    if use_vocab_tokens:
        candidates = _vocabulary(reader)
        drawn.shuffle(candidates)
    else:
        candidates = list(string.ascii_uppercase + string.ascii_lowercase)
    # Some tokenizers make a token of the space in front of some words: words of one pool are all alike.
    pools: dict[int, dict[int, str]] = {}
    for start in range(0, len(candidates), 256):
        some = candidates[start : start + 256]
        # Two lines show a word in every place it can have.
        lines = [2 * _line(word, word, "aba") for word in some]
        for word, text, reading in zip(some, lines, reader.read(lines), strict=True):
            token = _one_token(reader, word, text, reading)
            if token is not None:
                pools.setdefault(len(reading.ids), {}).setdefault(token, word)
        if pools and len(pools[min(pools)]) >= wanted:
            pool = list(pools[min(pools)].items())[:wanted]
            return {word: token for token, word in pool}
    count = len(pools[min(pools)]) if pools else 0
    kind = "words of the vocabulary" if use_vocab_tokens else "letters"
    raise InputError(
        f"only {count} {kind} are one token each for this tokenizer, and vocab_size={wanted} asks for more; "
        "ask for fewer" + ("" if use_vocab_tokens else ", or pass use_vocab_tokens=True")
    )


def _vocabulary(reader: Reader) -> list[str]:
    """Words of the tokenizer's vocabulary that are spelled with two or more ASCII letters, by id."""
    tokenizer = reader.tokenizer
    texts = (tokenizer.decode([i]).strip() for i in sorted(tokenizer.get_vocab().values()))
    return list(
        dict.fromkeys(text for text in texts if len(text) > 1 and text.isascii() and text.isalpha())
    )


def _one_token(reader: Reader, word: str, text: str, reading: Reading) -> int | None:
    """The id of a word in lines of nothing else, if it is one and the same token everywhere."""
    if reading.places is None:
        raise InputError("the pattern task needs a fast tokenizer, which says where tokens stand")
    found = set()
    start = 0
    for _ in range(text.count(word)):
        start = text.index(word, start)
        end = start + len(word)
        placed = zip(reading.ids, reading.places, strict=True)
        own = [token for token, (a, b) in placed if a < end and b > start]
        if len(own) != 1:
            return None
        found.add(own[0])
        start = end
    # What stands beside a word differs, so one token for all places has nothing of that in it but the space.
    token = found.pop()
    return None if found or token == reader.tokenizer.unk_token_id else token
