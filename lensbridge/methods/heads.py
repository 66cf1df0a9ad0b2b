"""Head detectors: which attention heads look back at what, on random text that repeats or on any text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import HookPoint, InputError
from .measured import prepared
from .sites import places_of

if TYPE_CHECKING:
    from .figures import Plot

PREVIOUS, DUPLICATE, INDUCTION = KINDS = ("previous_token", "duplicate_token", "induction")
"""Looks at the token before; at the same token earlier; at what came after the same token earlier."""


@dataclass(frozen=True)
class HeadScores:
    """A number for each head.

    Attributes:
        kind: What they are scores of.
        scores: One a head, [layer, head]; nan where a layer has fewer heads than another.
        layers: Which layer each row is; layers without such attention have none.
    """

    kind: str
    scores: Float[Tensor, "layer head"]
    layers: tuple[int, ...]

    def __getitem__(self, head: tuple[int, int]) -> float:
        """The score of one head, by layer and number.

        Raises:
            InputError: There is no such head.
        """
        layer, number = head
        if layer not in self.layers or not 0 <= number < self.scores.shape[1]:
            raise InputError(
                f"(layer, head) {tuple(head)}: there are layers {list(self.layers)} with heads 0 to "
                f"{self.scores.shape[1] - 1}"
            )
        return float(self.scores[self.layers.index(layer), number])

    def top(self, k: int = 5) -> list[tuple[int, int, float]]:
        """The heads of the highest scores: layer, head, score."""
        flat = self.scores.nan_to_num(-torch.inf).flatten()
        order = flat.argsort(descending=True, stable=True)[:k].tolist()
        width = self.scores.shape[1]
        found = [(self.layers[at // width], at % width, float(flat[at])) for at in order]
        return [item for item in found if item[2] > -torch.inf]

    def plot(self) -> Plot:
        """A heat map; see `lensbridge.methods.figures.head_plot`."""
        from .figures import head_plot

        return head_plot(self)

    def __repr__(self) -> str:
        best = ", ".join(f"{layer}.{head} {score:.3f}" for layer, head, score in self.top(3))
        rows, width = self.scores.shape
        return f"HeadScores({self.kind}, {rows} layers x {width} heads; highest: {best})"


# --- on random text that repeats ----------------------------------------------------------------------------


def repeated_tokens(
    bridge: TransformerBridge,
    *,
    batch: int = 8,
    length: int = 24,
    seed: int = 0,
    vocabulary: Any = None,
    prepend_bos: bool | None = None,
) -> Int[Tensor, "batch pos"]:
    """Random tokens, each row once and then again; within a copy no token occurs twice.

    Args:
        bridge: The model.
        batch: How many rows.
        length: How many tokens before they repeat.
        seed: Of the draw; the global generator is left alone.
        vocabulary: The token ids to draw from; all but special tokens unless given.
        prepend_bos: Whether a BOS token stands in front; None follows ``cfg.default_prepend_bos``.
    Raises:
        InputError: Too few tokens to draw from, no BOS token to prepend, or more than the model has positions
            for.
    """
    tokenizer, cfg = bridge.tokenizer, bridge.cfg
    if batch < 1 or length < 2:
        raise InputError(f"batch is at least 1 and length at least 2, got {batch} and {length}")
    if vocabulary is None:
        if cfg.d_vocab is None:
            raise InputError("this model has no vocabulary that is known: give vocabulary=")
        known = cfg.d_vocab if tokenizer is None else min(cfg.d_vocab, len(tokenizer))
        special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        pool = torch.tensor([i for i in range(known) if i not in special])
    else:
        pool = torch.as_tensor(vocabulary).flatten().unique()
    if len(pool) < length:
        raise InputError(f"{length} different tokens are to be drawn from {len(pool)}")
    wants_bos = cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if wants_bos and bos is None:
        if prepend_bos:
            raise InputError("there is no BOS token to prepend: leave prepend_bos out")
        wants_bos = False
    total = 2 * length + wants_bos
    if cfg.n_ctx is not None and total > cfg.n_ctx:
        raise InputError(
            f"{total} tokens are more than the {cfg.n_ctx} this model has positions for: lower length="
        )
    random = torch.Generator().manual_seed(seed)
    rows = torch.stack(
        [pool[torch.randperm(len(pool), generator=random)[:length]] for _ in range(batch)]
    )
    rows = rows.repeat(1, 2)
    if bos is None or not wants_bos:
        return rows
    return torch.cat([torch.full((batch, 1), bos), rows], 1)


def previous_token_score(bridge: TransformerBridge, **drawn: Any) -> HeadScores:
    """How much of its attention each head pays to the token before.

    Args:
        bridge: The model.
        **drawn: As in `repeated_tokens`: ``batch``, ``length``, ``seed``, ``vocabulary``, ``prepend_bos``.
    Returns:
        Mean attention, over random tokens; a BOS token that is the one before does not count.
    Raises:
        AbsentPointError: No layer has an attention pattern.
        InputError: As in `repeated_tokens`.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    return _along(bridge, PREVIOUS, drawn)


def duplicate_token_score(bridge: TransformerBridge, **drawn: Any) -> HeadScores:
    """How much of its attention each head pays to the earlier occurrence of the token it is at.

    Args:
        bridge: The model.
        **drawn: As in `repeated_tokens`.
    Returns:
        Mean attention, over the second copy of random tokens that repeat.
    Raises:
        AbsentPointError, InputError: As in `previous_token_score`.
    Source: Wang et al. 2022, "Interpretability in the Wild".
    """
    return _along(bridge, DUPLICATE, drawn)


def induction_score(bridge: TransformerBridge, **drawn: Any) -> HeadScores:
    """How much of its attention each head pays to what came after the token's earlier occurrence.

    Args:
        bridge: The model.
        **drawn: As in `repeated_tokens`.
    Returns:
        Mean attention, over the second copy of random tokens that repeat.
    Raises:
        AbsentPointError, InputError: As in `previous_token_score`.
    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    return _along(bridge, INDUCTION, drawn)


def _along(bridge: TransformerBridge, kind: str, drawn: dict[str, Any]) -> HeadScores:
    """Mean attention from each query to the key so many positions before it."""
    tokens = repeated_tokens(bridge, **drawn)
    rest = tokens.shape[1] % 2  # a BOS token in front
    length = tokens.shape[1] // 2
    back, first = {
        PREVIOUS: (1, rest + 1),
        DUPLICATE: (length, rest + length),
        INDUCTION: (length - 1, rest + length),
    }[kind]

    def score(pattern: Tensor) -> Tensor:
        # The n-th entry is of query n + back.
        return pattern.diagonal(-back, -2, -1)[..., first - back :].mean((0, -1))

    return _scored(bridge, kind, _given(bridge, tokens), score)


def _given(bridge: TransformerBridge, tokens: Tensor) -> dict[str, Any]:
    """Keywords that have the layers read tokens: a decoder reads them as its own, and attends to them."""
    if bridge.architecture.main.prefix == "decoder_":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def _scored(bridge: TransformerBridge, kind: str, given: Any, score: Any) -> HeadScores:
    """What a function [batch, head, query, key] -> [head] makes of every layer's pattern."""
    places = places_of("pattern", None, bridge)
    held: dict[str, Tensor] = {}

    def keep(pattern: Tensor, hook: HookPoint) -> None:
        held[str(hook.name)] = score(pattern.float()).cpu()

    with torch.inference_mode(False), torch.no_grad(), bridge.registry.hooks() as scope:
        scope.observe([place.point for place in places], keep, must_fire=True)
        bridge(**prepared(bridge, given, {}).kwargs, return_type=None)
    found = [held[str(place.point.name)] for place in places]
    width = max(len(row) for row in found)
    scores = torch.full((len(found), width), torch.nan)
    for row, own in zip(scores, found, strict=True):
        row[: len(own)] = own
    layers = tuple(place.layer for place in places if place.layer is not None)
    return HeadScores(kind, scores, layers)


# --- on any text --------------------------------------------------------------------------------------------


def detect_head(
    bridge: TransformerBridge,
    input: Any,
    pattern: str | Tensor,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: str = "mul",
) -> HeadScores:
    """How well each head's attention on a text fits a pattern, as TransformerLens's ``detect_head`` says it.

    ``"mul"`` is the share of a head's attention that lies on the pattern, from 0 to 1. ``"abs"`` is one
    less the sum of absolute differences per query, from -1 to 1; it also tells how attention is to be
    divided.

    Args:
        bridge: The model.
        input: Text, several texts, or token ids.
        pattern: ``"previous_token"``, ``"duplicate_token"``, ``"induction"`` (TransformerLens's names with
            ``_head`` behind as well), or what attention should be, [query, key] or [batch, query, key].
        exclude_bos: Leave out attention to each row's first token.
        exclude_current_token: Leave out attention of a token to itself.
        error_measure: ``"mul"`` or ``"abs"``.
    Returns:
        The mean over rows; padding does not count.
    Raises:
        InputError: Another pattern or measure, or a matrix that does not fit the text.
        AbsentPointError: No layer has an attention pattern.
    """
    if error_measure not in ("mul", "abs"):
        raise InputError(f"error_measure is 'mul' or 'abs', got {error_measure!r}")
    inputs = prepared(bridge, input, {})
    tokens = inputs.tokens
    if tokens is None:
        raise InputError("patterns are told by tokens: give text or token ids")
    rows, length = tokens.shape
    real = torch.ones(rows, length) if inputs.mask is None else (inputs.mask != 0).float().cpu()
    if isinstance(pattern, str):
        wanted = _pattern_of(pattern, tokens.cpu(), real)
    else:
        wanted = torch.as_tensor(pattern).detach().float().cpu()
        if wanted.shape not in ((length, length), (rows, length, length)):
            raise InputError(
                f"the pattern is [query, key] of {length} tokens, or one a row of {rows}; got "
                f"{list(wanted.shape)}"
            )
    counts = (real[:, :, None] * real[:, None]).expand(rows, length, length).clone()
    if exclude_bos:
        counts[torch.arange(rows), :, real.argmax(1)] = 0.0
    if exclude_current_token:
        counts *= 1 - torch.eye(length)

    def score(attention: Tensor) -> Tensor:
        weight, aim = counts[:, None].to(attention), wanted.to(attention)
        aim = aim if aim.dim() == 2 else aim[:, None]
        if error_measure == "mul":
            paid = (attention * weight).sum((-2, -1))
            fits = (attention * weight * aim).sum((-2, -1))
            # A head that looks at nothing that counts has nothing on the pattern.
            return torch.where(paid > 0, fits / paid.clamp(min=1e-30), 0.0).mean(0)
        missed = ((attention - aim).abs() * weight).sum((-2, -1))
        return (1 - missed / real.sum(1).to(missed)[:, None]).mean(0)

    kind = pattern.removesuffix("_head") if isinstance(pattern, str) else "given pattern"
    return _scored(bridge, kind, inputs.kwargs, score)


def _pattern_of(
    kind: str, tokens: Int[Tensor, "batch pos"], real: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch query key"]:
    """1 where a head of a kind looks."""
    kind = kind.removesuffix("_head")
    if kind not in KINDS:
        raise InputError(
            f"pattern is one of {', '.join(KINDS)} or a tensor [query, key], got {kind!r}"
        )
    rows, length = tokens.shape
    if kind == PREVIOUS:
        return torch.eye(length).roll(-1, 1).tril().expand(rows, length, length)
    same = (tokens[:, :, None] == tokens[:, None]).float() * real[:, :, None] * real[:, None]
    earlier = same.tril(-1)
    if kind == DUPLICATE:
        return earlier
    # What came after an earlier occurrence; that may be the token itself.
    return torch.cat([torch.zeros(rows, length, 1), earlier[:, :, :-1]], -1)
