"""Scores: logits, probabilities and log-probabilities of texts under a model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..hooks import InputError


def apply_temperature(
    logits: Float[Tensor, "*batch d_vocab"], temperature: float | int
) -> Float[Tensor, "*batch d_vocab"]:
    """Logits divided by a temperature.

    Raises:
        InputError: A temperature that is not above 0.
    """
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not is_number or not temperature > 0:
        raise InputError(f"the temperature must be above 0, got {temperature!r}")
    return logits / temperature


def logits_to_log_probs(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """Log-probabilities, in nats; at least float32 inside."""
    return _wide(logits).log_softmax(-1)


def logits_to_probs(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
    """Probabilities; at least float32 inside."""
    return _wide(logits).softmax(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def last_real(
    mask: Int[Tensor, "batch pos"] | None, rows: int, length: int
) -> Int[Tensor, " batch"]:
    """The position of each row's last real token, under padding on either side.

    Raises:
        InputError: A row without a real token.
    """
    if mask is None:
        return torch.full((rows,), length - 1)
    if not bool(mask.any(-1).all()):
        empty = (~mask.bool().any(-1)).nonzero().flatten().tolist()
        raise InputError(f"rows {empty} have no real token: their attention mask is 0 everywhere")
    return (torch.arange(length, device=mask.device) * (mask != 0)).argmax(-1)


def select_final_token(
    tensor: Float[Tensor, "batch pos *rest"], attention_mask: Int[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch *rest"]:
    """What a tensor holds at each row's last real token.

    Args:
        tensor: Values by position.
        attention_mask: 1 at real tokens; None where all are.
    Raises:
        InputError: A row without a real token.
    """
    last = last_real(attention_mask, tensor.shape[0], tensor.shape[1]).to(tensor.device)
    return tensor[torch.arange(tensor.shape[0], device=tensor.device), last]


def gather_token_scores(
    scores: Float[Tensor, "*batch d_vocab"], token_ids: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """The score of one token at each position; nothing is shifted.

    Args:
        scores: A score for every token of the vocabulary.
        token_ids: Which token at each place.
    """
    return scores.gather(-1, token_ids[..., None].to(scores.device))[..., 0]


class TokenScores:
    """What a model predicts at every position of some texts.

    Args:
        logits: The model's logits, [batch, pos, d_vocab], kept as they are.
        input_ids: The ids, [batch, pos].
        attention_mask: 1 at real tokens; None where all are.
        metadata: Anything to keep along.
        temperature: Divides the logits in `log_probs` and `probs`.
        is_causal: Whether position i predicts the token at i + 1; `text_log_probs` and `perplexity` need it.
    Raises:
        InputError: Shapes that do not fit, or a temperature that is not above 0.
    """

    def __init__(
        self,
        logits: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        metadata: dict[str, Any] | None = None,
        temperature: float | int = 1.0,
        is_causal: bool = True,
    ) -> None:
        if logits.dim() != 3 or input_ids.shape != logits.shape[:2]:
            raise InputError(
                "scores are made of logits [batch, pos, d_vocab] and ids [batch, pos], got "
                f"{list(logits.shape)} and {list(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise InputError(
                f"the attention mask is {list(attention_mask.shape)} and the ids {list(input_ids.shape)}"
            )
        self.logits = logits
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.metadata = dict(metadata or {})
        self.temperature = temperature
        self.is_causal = is_causal
        self._scaled = apply_temperature(_wide(logits), temperature)

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probabilities at the temperature, in nats, [batch, pos, d_vocab]."""
        return logits_to_log_probs(self._scaled)

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities at the temperature, [batch, pos, d_vocab]."""
        return logits_to_probs(self._scaled)

    def final_token_logits(self) -> Tensor:
        """The model's logits at each row's last real token, [batch, d_vocab]."""
        return select_final_token(self.logits, self.attention_mask)

    def final_token_log_probs(self) -> Tensor:
        """Log-probabilities of what follows each row, at the temperature, [batch, d_vocab]."""
        return logits_to_log_probs(select_final_token(self._scaled, self.attention_mask))

    def final_token_probs(self) -> Tensor:
        """Probabilities of what follows each row, at the temperature, [batch, d_vocab]."""
        return logits_to_probs(select_final_token(self._scaled, self.attention_mask))

    def gather(self, token_ids: Any) -> Tensor:
        """Log-probability of one token at each position; nothing is shifted.

        Args:
            token_ids: [batch, pos], or one id for all.
        Raises:
            InputError: Another shape.
        """
        ids = torch.as_tensor(token_ids, device=self.logits.device)
        ids = ids.expand(self.input_ids.shape) if ids.dim() == 0 else ids
        if ids.shape != self.input_ids.shape:
            raise InputError(
                f"token_ids has shape {list(self.input_ids.shape)} like the text, got {list(ids.shape)}"
            )
        d_vocab = self.logits.shape[-1]
        if ids.is_floating_point() or bool(((ids < 0) | (ids >= d_vocab)).any()):
            raise InputError(
                f"token ids are whole numbers from 0 to {d_vocab - 1}, got {token_ids!r}"
            )
        return gather_token_scores(self.log_probs, ids.long())

    gather_log_probs = gather

    def token_log_probs(self) -> Tensor:
        """Log-probability of each token given those before it, [batch, pos - 1]; 0 at padding.

        Raises:
            InputError: The model does not predict from left to right.
        """
        if not self.is_causal:
            raise InputError(
                "this model does not predict each token from those before it, so its texts have no "
                "probability and no perplexity; gather() reads what it predicts at each position"
            )
        found = gather_token_scores(self.log_probs[:, :-1], self.input_ids[:, 1:])
        # Not a product: padding may have a logit of -inf.
        return torch.where(self._counts().to(found) > 0, found, torch.zeros_like(found))

    def text_log_probs(self) -> Tensor:
        """Log-probability of each text given its first token, in nats, [batch]."""
        return self.token_log_probs().sum(-1)

    def perplexity(self) -> Tensor:
        """Exp of the mean negative log-probability of a token, [batch]; nan for a text of one token."""
        return torch.exp(-self.text_log_probs() / self._counts().sum(-1).to(self.logits.device))

    def _counts(self) -> Tensor:
        """1 where a prediction is from a real token to a real token, [batch, pos - 1]."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids[:, 1:])
        mask = self.attention_mask.to(self.input_ids.device)
        return mask[:, 1:] * mask[:, :-1]

    def __repr__(self) -> str:
        rows, length, d_vocab = self.logits.shape
        return (
            f"TokenScores({rows} texts of {length} positions, vocabulary {d_vocab}, "
            f"temperature {self.temperature})"
        )
