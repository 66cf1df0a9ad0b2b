"""Text and tokens: the part of a bridge that faces its tokenizer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ..hooks import InputError
from .config import BridgeConfig
from .tokens import PaddingSide, Tokens


class TextMethods:
    """Turning text to ids and back."""

    cfg: BridgeConfig
    processor: Any
    _tokens: Tokens

    @property
    def device(self) -> torch.device | None:
        """Where the model takes its input."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None. Setting it re-reads the BOS and padding rules."""
        return self._tokens.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokens = Tokens(tokenizer, self.cfg)

    def prepare_multimodal_inputs(
        self, text: Any, images: Any = None, audio: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Text with images or sound as keywords for the model: ``bridge(**inputs)``.

        Args:
            text: A string or a list of strings, with the placeholders the processor expects.
            images: What the processor takes: PIL images, arrays, tensors.
            audio: Likewise.
            **kwargs: Passed to the processor.
        Returns:
            Keywords of the model's forward, on its device.
        Raises:
            InputError: The bridge has no processor.
        """
        if self.processor is None:
            raise InputError(
                "there is no processor to turn images or sound into the model's inputs; give one as "
                "bridge.processor = AutoProcessor.from_pretrained(...)"
            )
        given = {"text": text, "images": images, "audio": audio}
        given = {name: value for name, value in given.items() if value is not None}
        made = self.processor(**given, **{"return_tensors": "pt", **kwargs})
        device = self.device
        return {
            name: value.to(device) if isinstance(value, Tensor) and device is not None else value
            for name, value in made.items()
        }

    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of a string or a list of strings.

        Args:
            input: The text.
            prepend_bos: Whether each row starts with BOS; None follows ``cfg.default_prepend_bos``.
            padding_side: Where shorter rows are padded; None follows the tokenizer.
            move_to_device: Put the ids where the model is.
            truncate: Cut at the model's context length.
        Raises:
            InputError: No tokenizer, an empty list, or an item that is no string.
        """
        ids, _ = self._tokens.batch(input, prepend_bos, padding_side, truncate=truncate)
        return ids.to(self.device) if move_to_device and self.device is not None else ids

    def to_string(self, tokens: Any) -> str | list[str]:
        """Text of token ids: a string for [pos], a list of strings for [batch, pos]."""
        return self._tokens.to_string(tokens)

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """The tokens of a text, or of ids, as strings."""
        return self._tokens.to_str_tokens(input, prepend_bos)

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token; an error when it is not."""
        return self._tokens.to_single_token(string)

    def to_single_str_token(self, token: int) -> str:
        """The text of one id."""
        return self._tokens.to_single_str_token(token)

    def get_token_position(
        self,
        single_token: str | int,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> int:
        """Position of a token in a text or a row of ids."""
        return self._tokens.token_position(single_token, input, mode, prepend_bos, padding_side)
