"""Direct logit attribution: a logit as the sum of what each part of a model adds to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge import (
    Inputs,
    Stream,
    TransformerBridge,
    Wanted,
    head_factor,
    is_near,
    leaving,
    module_of,
    refuse_head,
    refuse_sum,
    stream_steps,
    tolerance_of,
    wide,
)
from ..hooks import ArchitectureError, HookPoint, InputError
from .measured import differentiable, prepared, token_ids
from .scoring import last_real


@dataclass(frozen=True)
class LogitAttribution:
    """A logit, or the difference of two, as a sum.

    Attributes:
        labels: What each part is: the hook point it was read at (``"blocks.0.hook_attn_out"``), a head
            (``"blocks.0.attn.hook_result[3]"``), or a bias (``"ln_final.bias"``, ``"unembed.bias"``).
        contributions: What each adds, [component, batch].
        logits: What they sum to, as the model computed it, [batch].
    """

    labels: tuple[str, ...]
    contributions: Tensor
    logits: Tensor

    def __getitem__(self, label: str) -> Float[Tensor, " batch"]:
        """What one part adds.

        Raises:
            InputError: No part is called that.
        """
        if label not in self.labels:
            raise InputError(f"no part is called {label!r}; there are {', '.join(self.labels)}")
        return self.contributions[self.labels.index(label)]


def direct_logit_attribution(
    bridge: TransformerBridge,
    input: Any,
    tokens: Any,
    *,
    incorrect_tokens: Any = None,
    per_head: bool = False,
    positions: Any = -1,
    linearise: bool = False,
    **run_kwargs: Any,
) -> LogitAttribution:
    """What each part of the model adds to a logit directly, through the final norm and the head alone.

    The residual stream is the sum of the embeddings and of what every branch (attention, MLP, mixer) adds,
    with the model's own factors. A norm on the stream is linear once the scale it divides by is held at what
    it was; its bias, and the head's, are parts of their own. The parts sum to the logit, and that is checked.

    Args:
        bridge: The model.
        input: As in `TransformerBridge.forward`, or a mapping of its keywords.
        tokens: Whose logit: a token id, or a list or tensor of one a row.
        incorrect_tokens: If given, likewise: the logit of these is subtracted.
        per_head: Each head of an attention by itself, and the bias of its output projection.
        positions: Where the logit is, for all rows or one a row. Negative counts from each row's last real
            token, which is -1.
        linearise: Where more than a factor stands between head and logits (a soft cap), attribute what the
            head makes, before it.
        **run_kwargs: Further keywords of the model's forward.
    Returns:
        Labels and contributions, in the order the model makes them.
    Raises:
        ArchitectureError: A model whose stream is no such sum, or whose head is more than one linear map; or
            hooks of the caller make it so in this run. Says where and why.
        AbsentPointError: A model without a head.
        InputError: Tokens or positions that are not there.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    registry = bridge.registry
    _check_whole(bridge, per_head)
    refuse_head(registry.owner, registry, linearise=linearise)
    with torch.inference_mode(False), torch.no_grad():
        stream = _at_head(bridge, prepared(bridge, input, run_kwargs), positions, per_head)
        seen = stream.seen
        logits, scale = seen["logits"], bridge.architecture.logit_scale
        if scale is None:
            logits, scale = seen["unembed.hook_out"], 1.0
        wanted = torch.zeros_like(logits)  # 1 at the tokens, -1 at the incorrect ones
        _count(wanted, 1.0, tokens, "tokens")
        if incorrect_tokens is not None:
            _count(wanted, -1.0, incorrect_tokens, "incorrect_tokens")
        direction, bias = _head(bridge, seen["unembed.hook_in"], wanted)
        labels = [x for one, part in stream.groups for x in one.points(range(len(part)))]
        made = torch.cat([(part * wide(direction)).sum(-1) for _, part in stream.groups])
        if bias is not None:
            labels.append("unembed.bias")
            made = torch.cat([made, wide(bias)[None]])
        made, total = made * scale, (wide(logits) * wanted).sum(-1)
    if not is_near(made.sum(0), total, made.abs().sum(0), tolerance=tolerance_of(logits)):
        raise ArchitectureError(
            f"the parts sum to {made.sum(0).tolist()} and the model says {total.tolist()}: the head is not "
            "linear, or a hook that is set changes what it makes"
        )
    return LogitAttribution(tuple(labels), made, total)


def parts_at_head(
    bridge: TransformerBridge, inputs: Inputs, *, per_head: bool = False
) -> tuple[tuple[str, ...], Float[Tensor, "component batch pos d_model"]]:
    """What each part of the model adds to what the head reads, at every position, norms' scales held.

    Args:
        bridge: The model.
        inputs: What to run.
        per_head: Each head of an attention by itself, and the bias of its output projection.
    Returns:
        Labels and parts, as in `LogitAttribution`; they sum to what the run showed at ``unembed.hook_in``.
    Raises:
        ArchitectureError, AbsentPointError: As in `direct_logit_attribution`.
    """
    _check_whole(bridge, per_head)
    refuse_head(bridge.registry.owner, bridge.registry, linearise=True)
    with torch.inference_mode(False), torch.no_grad():
        stream = _at_head(bridge, inputs, None, per_head)
    labels = tuple(x for one, part in stream.groups for x in one.points(range(len(part))))
    return labels, torch.cat([part for _, part in stream.groups])


def _check_whole(bridge: TransformerBridge, per_head: bool) -> None:
    """Whether the stream is a sum, and its heads are to be had."""
    registry = bridge.registry
    refuse_sum(registry.owner, registry, len(bridge.architecture.blocks))
    if per_head and not any(name.endswith(".hook_result") for name in registry):
        raise registry.missing(f"{registry.layers}.0.attn.hook_result")


def _at_head(bridge: TransformerBridge, inputs: Inputs, positions: Any, per_head: bool) -> Stream:
    """The stream in parts, followed to where the head reads it."""
    whole, registry = bridge.registry.owner, bridge.registry
    seen = _Seen(bridge, inputs, positions, per_head)
    stream = Stream(whole, registry, seen, seen["unembed.hook_in"])
    wanted = Wanted(heads=per_head, checks=True)
    stream.follow(stream_steps(whole, registry, len(bridge.architecture.blocks), wanted))
    stream.follow(leaving(whole))
    read = stream.read("unembed.hook_in")
    tolerance = tolerance_of(seen["unembed.hook_in"])
    stream.multiply(head_factor(whole, stream.total, read, tolerance))
    return stream


def _count(wanted: Tensor, value: float, tokens: Any, what: str) -> None:
    ids = token_ids(tokens, *wanted.shape, what=what).to(wanted.device)
    wanted.scatter_add_(-1, ids[:, None], torch.full_like(wanted[:, :1], value))


def _head(
    bridge: TransformerBridge, like: Float[Tensor, "batch d_model"], wanted: Tensor
) -> tuple[Tensor, Tensor | None]:
    """By what the head multiplies what it reads, and what it adds, for some tokens of each row.

    The head itself is asked, so that it does not matter what its weights are (quantised, offloaded, LoRA).
    """
    module = module_of(bridge.registry["unembed.hook_in"])
    with bridge.registry.silenced(), differentiable(bridge):
        zero = torch.zeros_like(like)[:, None].requires_grad_()
        out = module(zero)[:, 0]
        (direction,) = torch.autograd.grad((out * wanted.to(out)).sum(), zero)
    bias = (out.detach() * wanted.to(out)).sum(-1) if bool(out.any()) else None
    return direction[:, 0], bias


# --- the run ----------------------------------------------------------------------------------------------


class _Seen:
    """What a run shows of the stream and of what is added to it, at one position of each row or at all.

    Args:
        bridge: The model.
        inputs: What to run.
        positions: As the caller gave them; None for all.
        per_head: Whether heads are needed.
    """

    def __init__(
        self, bridge: TransformerBridge, inputs: Inputs, positions: Any, per_head: bool
    ) -> None:
        self.registry = registry = bridge.registry
        self.positions, self.mask = positions, inputs.mask
        self.held: dict[str, Tensor] = {}
        self.shape: tuple[int, int] | None = None  # rows and positions of the stream
        self.at: Tensor | None = None
        prefix = bridge.architecture.main.prefix
        self.entry = [f"{prefix}{part}.hook_out" for part in ("embed", "pos_embed")]
        self.entry += [f"{prefix}ln_embed.{end}" for end in ("hook_in", "hook_scale")]
        homes = (f"{registry.layers}.", f"{prefix}ln_final.", "unembed.")
        points = [
            point
            for name, point in registry.items()
            if name in self.entry
            or (name.startswith(homes) and _is_of_stream(point) and point.is_default)
            or (per_head and name.startswith(homes) and name.endswith(".hook_result"))
        ]
        with registry.hooks() as scope:
            scope.observe(points, self._keep)
            logits = bridge(**inputs.kwargs)
        if self.shape is None:
            raise ArchitectureError(f"the run did not pass {registry.layers}.0")
        if logits.shape[:-1] != self.shape:
            raise InputError(
                f"the logits are {list(logits.shape)} and the stream has {list(self.shape)} rows and "
                "positions: a logit is attributed where every position makes one (leave out logits_to_keep)"
            )
        self.held["logits"] = self._cut(logits)

    def _keep(self, tensor: Tensor, hook: HookPoint) -> None:
        name = str(hook.name)
        if name in self.entry:
            self.held[name] = tensor.clone()  # whole: how long the stream is, is not known yet
            return
        if self.shape is None:
            self.shape = (tensor.shape[0], tensor.shape[1])
            if self.positions is not None:
                self.at = _positions(self.positions, self.mask, *self.shape).to(tensor.device)
            for part in self.entry:
                value = self.held.pop(part, None)
                if value is not None and value.dim() == 3 and value.shape[1] == tensor.shape[1]:
                    self.held[part] = self._cut(value)
        if tensor.shape[1] == self.shape[1]:
            self.held[name] = self._cut(tensor)

    def _cut(self, tensor: Tensor) -> Tensor:
        """One position of each row, or all; a copy."""
        rows = len(tensor) if self.shape is None else self.shape[0]
        whole = tensor.expand(rows, *tensor.shape[1:])
        if self.at is None:
            return whole.clone()
        return whole[torch.arange(rows, device=tensor.device), self.at.to(tensor.device)]

    def __getitem__(self, name: str) -> Tensor:
        key = name if name == "logits" else self.registry.canonical(name)
        if key not in self.held:
            raise ArchitectureError(f"{name} was not passed with the positions of the stream")
        return self.held[key]

    def __contains__(self, name: str) -> bool:
        return self.registry.aliases.get(name, name) in self.held


def _is_of_stream(point: HookPoint) -> bool:
    """Whether a point shows vectors of the stream, the scale of a norm, or logits."""
    is_wide = point.axes in ("batch pos d_model", "batch pos d_vocab")
    return is_wide or str(point.name).endswith(".hook_scale")


def _positions(given: Any, mask: Tensor | None, rows: int, length: int) -> Int[Tensor, " batch"]:
    """A position of each row, from the front."""
    if mask is not None and mask.dim() != 2:
        raise InputError(f"where a row ends is told by a mask [batch, pos], got {list(mask.shape)}")
    mask = None if mask is None else mask[:, -length:]  # it may cover a past as well
    items = given.tolist() if isinstance(given, Tensor) else given
    items = list(items) if isinstance(items, (list, tuple)) else [items] * rows
    if len(items) != rows or any(not isinstance(x, int) or isinstance(x, bool) for x in items):
        raise InputError(f"positions is a whole number or {rows} of them, one a row; got {given!r}")
    last = last_real(mask, rows, length).tolist()
    found = [x if x >= 0 else end + 1 + x for x, end in zip(items, last, strict=True)]
    for row, at in enumerate(found):
        if not 0 <= at < length or (mask is not None and not bool(mask[row, at])):
            raise InputError(
                f"row {row} has no real token at position {items[row]}: it ends at {last[row]} of {length}"
            )
    return torch.tensor(found)
