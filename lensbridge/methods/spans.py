"""Where tokens stand in a text, and which of them make a sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import InputError
from .granularity import Aggregation
from .samples import untouched

Place = tuple[int, int]
"""From which character to before which."""

AGGREGATIONS = ("mean", "sum", "max")
"""How the values of a sentence's tokens become one."""


@dataclass(frozen=True)
class Reading:
    """A text's own tokens, special ones of the tokenizer's not among them.

    Attributes:
        ids: Their ids.
        places: Where each stands in the text; None where the tokenizer cannot tell.
    """

    ids: list[int]
    places: list[Place] | None


class Reader:
    """Reads texts as a bridge does, and leaves the tokenizer as it was.

    Args:
        source: A tokenizer, or a bridge that has one.
    Raises:
        InputError: Neither.
    """

    def __init__(self, source: Any) -> None:
        is_bridge = isinstance(source, TransformerBridge)
        self.tokenizer: Any = source.tokenizer if is_bridge else source
        if is_bridge and self.tokenizer is None:
            raise InputError("this bridge has no tokenizer: set bridge.tokenizer, or pass ids")
        if not callable(self.tokenizer):
            raise InputError(
                "text is read by a Hugging Face tokenizer, or a bridge that has one; got "
                f"{type(source).__name__}: {source!r}"
            )
        own_bos, self._eos_id = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self._prepend = source.cfg.default_prepend_bos if is_bridge else own_bos is not None
        self.n_ctx: int | None = source.cfg.n_ctx if is_bridge else None
        self._bos_id = self._eos_id if own_bos is None else own_bos
        pads = (self.tokenizer.pad_token_id, self._eos_id, self._bos_id, 0)
        self.pad_id: int = next(pad for pad in pads if pad is not None)
        self.added = self._probed()

    def _probed(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of any text, and behind it."""
        with untouched(self.tokenizer):
            own = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
            all_of_it = list(self.tokenizer("a")["input_ids"])
        for start in range(len(all_of_it) - len(own) + 1 if own else 0):
            if all_of_it[start : start + len(own)] == own:
                return all_of_it[:start], all_of_it[start + len(own) :]
        raise InputError(
            f"this tokenizer reads 'a' as {own}, and as {all_of_it} with special tokens: it cannot be told "
            "which of them are the text's; pass token ids"
        )

    def around(self, prepend_bos: bool | None = None) -> tuple[list[int], list[int]]:
        """What a bridge's input has in front of a text's own tokens, and behind them.

        Args:
            prepend_bos: As in `TransformerBridge.forward`.
        Raises:
            InputError: A BOS is wanted and there is none.
        """
        front, back = list(self.added[0]), list(self.added[1])
        if back and back[-1] == self._eos_id:
            del back[-1]
        wanted = self._prepend if prepend_bos is None else prepend_bos
        has = front[:1] == [self._bos_id]
        if wanted and self._bos_id is None:
            raise InputError(
                "prepend_bos=True, but the tokenizer has neither a BOS nor an EOS token"
            )
        if wanted and not has:
            front = [self._bos_id, *front]
        elif has and not wanted:
            del front[0]
        return front, back

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """The own tokens of texts; never cut, padded or added to."""
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"a text is a string, got {type(text).__name__}: {text!r}")
        is_fast = bool(getattr(self.tokenizer, "is_fast", False))
        with untouched(self.tokenizer):
            encoded = self.tokenizer(
                list(texts),
                add_special_tokens=False,
                return_offsets_mapping=is_fast,
                verbose=False,  # about texts longer than the model
            )
        ids = encoded["input_ids"]
        if not is_fast:
            return [Reading(list(own), None) for own in ids]
        places = encoded["offset_mapping"]
        return [
            Reading(list(own), [(int(a), int(b)) for a, b in at])
            for own, at in zip(ids, places, strict=True)
        ]


# --- sentences --------------------------------------------------------------------------------------------


def get_sentence_token_spans(
    text: str, sentences: Sequence[str], tokenizer: Any, add_special_tokens: bool = False
) -> list[tuple[int, int]]:
    """Which tokens of a text each of its sentences is made of.

    Sentences are looked for one behind the other, so one that occurs twice is found twice. Runs of white
    space count as one space. A token belongs to the sentence that its first visible character is in: no
    token is counted twice.

    Args:
        text: The whole text.
        sentences: Parts of it, in its order; they need not cover it.
        tokenizer: A fast tokenizer, or a bridge that has one.
        add_special_tokens: Whether positions count what the tokenizer puts in front of a text by itself.
    Returns:
        For each sentence its first token and the one behind its last.
    Raises:
        InputError: A sentence that is not in the text (behind the one before), or has no token of its own; a
            tokenizer that does not know where its tokens stand.
    """
    reader = Reader(tokenizer)
    return spans_in(
        text, sentences, reader.read([text])[0], len(reader.added[0]) if add_special_tokens else 0
    )


def spans_in(
    text: str, sentences: Sequence[str], reading: Reading, shift: int
) -> list[tuple[int, int]]:
    """`get_sentence_token_spans` of a text that is read already, with positions counted from ``shift``."""
    if reading.places is None:
        raise InputError(
            "only a fast tokenizer says where its tokens stand in a text; give the spans of the sentences "
            "yourself, or load the tokenizer with use_fast=True"
        )
    if isinstance(sentences, str) or not sentences:
        raise InputError(f"sentences is a list of at least one string, got {sentences!r}")
    begins = [_first_visible(text, place) for place in reading.places]
    found: list[tuple[int, int]] = []
    behind = 0
    for index, sentence in enumerate(sentences):
        start, end = _found(text, sentence, index, behind)
        own = [token for token, at in enumerate(begins) if at is not None and start <= at < end]
        if not own:
            raise InputError(
                f"sentence {index} ({_short(sentence)}) has no token of its own: its characters "
                f"{start} to {end} are part of a token that begins before them"
            )
        found.append((own[0] + shift, own[-1] + 1 + shift))
        behind = end
    return found


def _first_visible(text: str, place: Place) -> int | None:
    """Where a token's first character stands that is not white space."""
    return next((at for at in range(*place) if not text[at].isspace()), None)


def _found(text: str, sentence: Any, index: int, behind: int) -> Place:
    """Where a sentence stands behind some place."""
    if not isinstance(sentence, str) or not sentence.strip():
        raise InputError(f"sentence {index} is not a text with something in it: {sentence!r}")
    pattern = re.compile(r"\s+".join(re.escape(word) for word in sentence.split()))
    found = pattern.search(text, behind)
    if found is not None:
        return found.span()
    name = f"sentence {index} ({_short(sentence)}) is not in the text"
    earlier = pattern.search(text)
    if earlier is not None:
        raise InputError(
            f"{name} behind sentence {index - 1}, which ends at character {behind}; it stands at "
            f"{earlier.start()}: give sentences in the order of the text, each once"
        )
    like = SequenceMatcher(None, text, sentence, autojunk=False).find_longest_match()
    start = max(0, like.a - like.b)
    near = text[start : start + len(sentence)]
    raise InputError(
        f"{name}; the nearest is at character {start}: {_short(near)}. Give sentences as the text has them, "
        "letter by letter"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def aggregate_to_sentences(
    values: Float[Tensor, " pos"], spans: Sequence[tuple[int, int]], aggregation: str = "mean"
) -> Float[Tensor, " sentence"]:
    """One value for each sentence from those of its tokens.

    Args:
        values: A value for each token.
        spans: Each sentence's first token and the one behind its last.
        aggregation: ``"mean"``, ``"sum"`` or ``"max"``.
    Raises:
        InputError: Another aggregation, no spans, or one that is empty or reaches beyond the tokens.
    """
    if aggregation not in AGGREGATIONS:
        raise InputError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    check_spans(spans, len(values))
    how = Aggregation(aggregation)
    return torch.cat([how.aggregate(values[start:end, None]) for start, end in spans])


def check_spans(spans: Sequence[tuple[int, int]], length: int) -> None:
    """Refuse spans that are not some tokens of a text each.

    Args:
        spans: Each sentence's first token and the one behind its last.
        length: How many tokens the text has.
    Raises:
        InputError: The first that is not.
    """
    if not spans:
        raise InputError("there are no spans; give at least one sentence's")
    for index, (start, end) in enumerate(spans):
        if not 0 <= start < end <= length:
            raise InputError(
                f"the span of sentence {index} is ({start}, {end}); a span has at least one of the "
                f"{length} tokens: 0 <= start < end <= {length}"
            )
