"""What rides along in Hugging Face's generation loop: penalties, stopping rules, a progress bar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FrequencyPenalty:
    """Subtracts from a token's logit for each time its row has it already (OpenAI's frequency penalty).

    Args:
        penalty: How much for each time, in logits.
        mask: 1 at real tokens of the prompt, [batch, pos]; None where all are.
    """

    def __init__(self, penalty: float, mask: Tensor | None) -> None:
        self.penalty = penalty
        self.mask = mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Penalised scores, [batch, d_vocab]."""
        real = torch.ones_like(input_ids, dtype=scores.dtype)
        if self.mask is not None:
            # Several rows may continue one prompt.
            mask = self.mask.repeat_interleave(len(input_ids) // len(self.mask), dim=0)
            real[:, : mask.shape[1]] = mask.to(real)
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, real)
        return scores - self.penalty * counts


def as_criteria(given: Any) -> Any:
    """A stopping rule, or several, as transformers takes them."""
    from transformers import StoppingCriteriaList

    if given is None:
        return None
    return StoppingCriteriaList(given if isinstance(given, (list, tuple)) else [given])


class Progress:
    """A progress bar over the steps of a generation, where somebody is there to see it.

    Args:
        options: Keywords of ``generate``; inside the ``with`` block those to use.
        total: How many steps there may be; None shows nothing.
    """

    def __init__(self, options: dict[str, Any], total: int | None) -> None:
        self.options = options
        self.total = total
        self._bar: Any = None

    def __enter__(self) -> dict[str, Any]:
        from tqdm import tqdm

        if not self.total:
            return self.options
        self._bar = tqdm(total=self.total, disable=None, unit="token", leave=False)
        if self._bar.disable:
            return self.options
        rules = [*(self.options.get("stopping_criteria") or ()), self._tick]
        return {**self.options, "stopping_criteria": as_criteria(rules)}

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _tick(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def real_tokens(new: Tensor, ends: Any, pad: int | None) -> Tensor:
    """Which generated tokens belong to their row and which fill it up after it has ended, [batch, pos].

    Args:
        new: The generated ids.
        ends: The ids that end a row, the first of which still belongs to it.
        pad: The id rows are filled with, where they may have ended otherwise (stop strings, rules).
    """
    real = torch.ones_like(new)
    if ends is not None:
        is_end = torch.isin(new, torch.as_tensor(ends, device=new.device)).long()
        real[(is_end.cumsum(1) - is_end) > 0] = 0
    if pad is not None:
        is_pad = (new == pad).long()
        real[is_pad.flip(1).cumprod(1).flip(1) > 0] = 0
    return real
