"""Text to tokens and back, with one rule for BOS and one for padding, whatever the tokenizer does."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ..hooks import InputError
from .config import BridgeConfig

PaddingSide = Literal["left", "right"]


class Tokens:
    """What the bridge knows about its tokenizer; never changes the tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer, or None.
        cfg: Gives vocabulary size and context length; holds the defaults for BOS and padding, which are set
            from the tokenizer here and may be changed there.
    """

    def __init__(self, tokenizer: Any, cfg: BridgeConfig) -> None:
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.pad_id = 0
        self.prepends_bos: bool | None = None
        self.appends_eos: bool | None = None
        if tokenizer is not None:
            self._learn(tokenizer)

    def _learn(self, tokenizer: Any) -> None:
        self.eos_id = tokenizer.eos_token_id
        own_bos = tokenizer.bos_token_id
        # A model trained without BOS (Qwen) is not given one unasked; when asked for, EOS serves.
        self.cfg.default_prepend_bos = own_bos is not None
        self.bos_id = self.eos_id if own_bos is None else own_bos
        pads = (tokenizer.pad_token_id, self.eos_id, self.bos_id, 0)
        self.pad_id = next(pad for pad in pads if pad is not None)
        self.cfg.default_padding_side = tokenizer.padding_side
        probe = tokenizer("a")["input_ids"]
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.prepends_bos = len(probe) > len(plain) and probe[0] == self.bos_id
        self.appends_eos = len(probe) > len(plain) and probe[-1] == self.eos_id != plain[-1]
        self.cfg.tokenizer_prepends_bos = self.prepends_bos
        self.cfg.tokenizer_appends_eos = self.appends_eos

    def need(self, what: str) -> Any:
        """The tokenizer, or an error that says what it was needed for."""
        if self.tokenizer is None:
            raise InputError(
                f"{what} needs a tokenizer and this bridge has none: pass token ids, or build it as "
                "TransformerBridge(model, tokenizer)"
            )
        return self.tokenizer

    # --- text to ids -----------------------------------------------------------------------------

    def encode(
        self, text: str, prepend_bos: bool | None = None, *, truncate: bool = True
    ) -> list[int]:
        """Ids of one string, with exactly one BOS in front or none, and no EOS behind."""
        tokenizer = self.need("text")
        ids = list(tokenizer(text)["input_ids"])
        if self.appends_eos and ids and ids[-1] == self.eos_id:
            ids = ids[:-1]
        wanted = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        if wanted and self.bos_id is None:
            raise InputError(
                "prepend_bos=True, but the tokenizer has neither a BOS nor an EOS token"
            )
        if wanted and not self.prepends_bos:
            ids = [self.bos_id, *ids]
        elif not wanted and self.prepends_bos and ids and ids[0] == self.bos_id:
            ids = ids[1:]
        return ids[: self.cfg.n_ctx] if truncate and self.cfg.n_ctx is not None else ids

    def batch(
        self,
        text: Any,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        *,
        truncate: bool = True,
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Ids and attention mask of one string or several, padded to the longest.

        Raises:
            InputError: No tokenizer, an empty list, an item that is no string, or nothing to run on.
        """
        if not isinstance(text, (str, list, tuple)):
            raise InputError(
                f"text is a string or a list of strings, got {type(text).__name__}: {text!r}"
            )
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise InputError("an empty list of texts was given; give at least one string")
        for index, item in enumerate(texts):
            if not isinstance(item, str):
                raise InputError(f"text {index} is {type(item).__name__}, expected str: {item!r}")
        side = self.cfg.default_padding_side if padding_side is None else padding_side
        if side not in ("left", "right"):
            raise InputError(f"padding_side must be 'left' or 'right', got {side!r}")
        rows = [self.encode(item, prepend_bos, truncate=truncate) for item in texts]
        for item, row in zip(texts, rows, strict=True):
            if not row:
                raise InputError(f"{item!r} has no tokens; with prepend_bos=True it would have one")
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[index, span] = torch.tensor(row)
            mask[index, span] = 1
        return ids, mask

    # --- ids to text -----------------------------------------------------------------------------

    def to_string(self, tokens: Any) -> str | list[str]:
        """Text of ids: a string for one row, a list for a batch."""
        tokenizer = self.need("to_string")
        ids = as_ids(tokens)
        if ids.dim() <= 1:
            return tokenizer.decode(ids.reshape(-1).tolist(), clean_up_tokenization_spaces=False)
        if ids.dim() == 2:
            return [
                tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()
            ]
        raise InputError(
            f"to_string takes ids of shape [pos] or [batch, pos], got {list(ids.shape)}"
        )

    def to_str_tokens(
        self, text: Any, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Each token of a text (or of ids) as a string; a list of texts gives a list of lists."""
        self.need("to_str_tokens")
        if isinstance(text, str):
            ids = self.encode(text, prepend_bos)
        elif (
            isinstance(text, (list, tuple)) and text and all(isinstance(item, str) for item in text)
        ):
            return [self._str_tokens(self.encode(item, prepend_bos)) for item in text]
        else:
            given = as_ids(text)
            if given.dim() == 2 and given.shape[0] > 1:
                return [self._str_tokens(row) for row in given.tolist()]
            ids = given.reshape(-1).tolist()
        return self._str_tokens(ids)

    def _str_tokens(self, ids: list[int]) -> list[str]:
        decode = self.tokenizer.decode
        return [decode([token], clean_up_tokenization_spaces=False) for token in ids]

    def to_single_token(self, text: Any) -> int:
        """The id of a text that is exactly one token.

        Raises:
            InputError: It is none or several; the message shows them.
        """
        if not isinstance(text, str):
            raise InputError(f"to_single_token takes a string, got {type(text).__name__}: {text!r}")
        ids = self.encode(text, prepend_bos=False)
        if len(ids) != 1:
            raise InputError(
                f"{text!r} is {len(ids)} tokens, not one: {self.to_str_tokens(text, prepend_bos=False)}"
            )
        return ids[0]

    def to_single_str_token(self, token: Any) -> str:
        """The text of one id."""
        tokenizer = self.need("to_single_str_token")
        if not isinstance(token, int) or isinstance(token, bool):
            raise InputError(
                f"to_single_str_token takes one id, got {type(token).__name__}: {token!r}"
            )
        self.check_ids(torch.tensor([token]))
        return tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def token_position(
        self,
        token: str | int,
        text: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """Where a token stands in a text or a row of ids.

        Raises:
            InputError: It is not there, or the input holds several rows.
        """
        if mode not in ("first", "last"):
            raise InputError(f"mode must be 'first' or 'last', got {mode!r}")
        ids = self.batch(text, prepend_bos, padding_side)[0] if _is_text(text) else as_ids(text)
        if ids.dim() == 2 and ids.shape[0] != 1:
            raise InputError(f"get_token_position takes one row, got {ids.shape[0]}")
        row = ids.reshape(-1).tolist()
        wanted = self.to_single_token(token) if isinstance(token, str) else int(token)
        places = [index for index, held in enumerate(row) if held == wanted]
        if not places:
            shown = (
                repr(token) if self.tokenizer is None else f"{token!r} in {self.to_str_tokens(row)}"
            )
            raise InputError(f"token not found: {shown}")
        return places[0] if mode == "first" else places[-1]

    def check_ids(self, ids: Tensor) -> None:
        """Refuse ids beyond the vocabulary."""
        if self.cfg.d_vocab is None or ids.numel() == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.cfg.d_vocab:
            bad = low if low < 0 else high
            raise InputError(
                f"token id {bad} is outside the vocabulary of {self.cfg.d_vocab} "
                f"(0 to {self.cfg.d_vocab - 1})"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(item, str) for item in value)
    )


def as_ids(tokens: Any) -> Tensor:
    """Ids from a tensor, an int, or (nested) lists of ints.

    Raises:
        InputError: Anything else.
    """
    if isinstance(tokens, Tensor):
        ids = tokens
    else:
        try:
            ids = torch.as_tensor(tokens, dtype=torch.long if tokens == [] else None)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"token ids must be integers in a tensor or a list, got {tokens!r}"
            ) from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, got {ids.dtype}")
    return ids


def positions_from_mask(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Position ids that count real tokens only; padding in front gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)
