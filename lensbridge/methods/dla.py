"""Direct logit attribution: a logit as the sum of what each part of a model adds to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..bridge import Inputs, TransformerBridge
from ..hooks import ArchitectureError, HookPoint, InputError, Site
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
    _refuse(bridge, linearise, per_head)
    with torch.inference_mode(False), torch.no_grad():
        seen = _Seen(bridge, prepared(bridge, input, run_kwargs), positions, per_head)
        stream = _Stream(bridge, seen)
        _enter(stream)
        for index in range(len(bridge.architecture.blocks)):
            _layer(stream, index, per_head)
        _leave(stream)
        logits, scale = seen["logits"], bridge.architecture.logit_scale
        if scale is None:
            logits, scale = seen["unembed.hook_out"], 1.0
        wanted = torch.zeros_like(logits)  # 1 at the tokens, -1 at the incorrect ones
        _count(wanted, 1.0, tokens, "tokens")
        if incorrect_tokens is not None:
            _count(wanted, -1.0, incorrect_tokens, "incorrect_tokens")
        direction, bias = _head(bridge, seen["unembed.hook_in"], wanted)
        made = torch.einsum("cbd,bd->cb", torch.stack(stream.parts), _wide(direction))
        if bias is not None:
            stream.labels.append("unembed.bias")
            made = torch.cat([made, _wide(bias)[None]])
        made, total = made * scale, (_wide(logits) * wanted).sum(-1)
    if not _is_near(made.sum(0), total, made.abs().sum(0), tolerance=_tolerance(logits)):
        raise ArchitectureError(
            f"the parts sum to {made.sum(0).tolist()} and the model says {total.tolist()}: the head is not "
            "linear, or a hook that is set changes what it makes"
        )
    return LogitAttribution(tuple(stream.labels), made, total)


def _refuse(bridge: TransformerBridge, linearise: bool, per_head: bool) -> None:
    """What can be told before anything is run."""
    architecture, kind = bridge.architecture, type(bridge.original_model).__name__
    if architecture.unproved:
        raise ArchitectureError(f"nothing is known of {kind}'s layers: {architecture.unproved}")
    for index, block in enumerate(architecture.blocks):
        here = f"{bridge.registry.layers}.{index}"
        if block.unproved:
            raise ArchitectureError(
                f"what {here} makes is not known to be a sum of parts: {block.unproved}"
            )
        if not block.is_chained and index + 1 < len(architecture.blocks):
            raise ArchitectureError(
                f"what {here} makes is not what the next layer reads: {kind} changes it between"
            )
    first, head = (
        bridge.registry[f"{x}.hook_in"] for x in (f"{bridge.registry.layers}.0", "unembed")
    )
    if first.axes != "batch pos d_model":
        raise ArchitectureError(f"the stream of {kind} is [{first.axes}], not [batch pos d_model]")
    if per_head and not any(name.endswith(".hook_result") for name in bridge.registry):
        raise bridge.registry.missing(f"{bridge.registry.layers}.0.attn.hook_result")
    if architecture.logit_scale is None and not linearise:
        raise ArchitectureError(
            f"more than a factor stands between the head of {kind} and its logits (a soft cap, a mask, a "
            f"bias), so they are no sum of what reaches {head.name}; linearise=True attributes what the head "
            "makes"
        )


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


def module_of(point: HookPoint) -> nn.Module:
    """The module a point is at."""
    return next(owner.module for owner in point.owners if isinstance(owner, Site))


# --- the run ----------------------------------------------------------------------------------------------


class _Seen:
    """What a run shows of the stream and of what is added to it, at one position of each row.

    Args:
        bridge: The model.
        inputs: What to run.
        positions: As the caller gave them.
        per_head: Whether heads are needed.
    """

    def __init__(
        self, bridge: TransformerBridge, inputs: Inputs, positions: Any, per_head: bool
    ) -> None:
        self.registry = registry = bridge.registry
        self.positions, self.mask = positions, inputs.mask
        self.held: dict[str, Tensor] = {}
        self.shape: tuple[int, int] | None = None  # rows and positions of the stream
        prefix = bridge.architecture.main.prefix
        self.entry = [f"{prefix}{part}.hook_out" for part in ("embed", "pos_embed")]
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
            self.at = _positions(self.positions, self.mask, *self.shape).to(tensor.device)
            for part in self.entry:
                value = self.held.pop(part, None)
                if value is not None and value.shape[1:] == tensor.shape[1:]:
                    self.held[part] = self._cut(value)
        if tensor.shape[1] == self.shape[1]:
            self.held[name] = self._cut(tensor)

    def _cut(self, tensor: Tensor) -> Tensor:
        """One position of each row; a copy."""
        rows = len(self.at)
        whole = tensor.expand(rows, *tensor.shape[1:])
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


# --- the sum ----------------------------------------------------------------------------------------------


class _Stream:
    """The residual stream at a place, as the sum of parts; every operation on it is linear in them.

    Args:
        bridge: The model.
        seen: What the run showed.
    """

    def __init__(self, bridge: TransformerBridge, seen: _Seen) -> None:
        self.bridge = bridge
        self.seen = seen
        self.device = seen["unembed.hook_in"].device  # layers may be spread over several
        self.labels: list[str] = []
        self.parts: list[Tensor] = []

    def read(self, name: str) -> Tensor:
        """What the run showed at a point, wide enough to be summed, and where the head is."""
        return _wide(self.seen[name]).to(self.device)

    def add(self, label: str, value: Tensor) -> None:
        """Another part."""
        self.labels.append(label)
        self.parts.append(value)

    def multiply(self, factor: float, by: tuple[str, ...] = ()) -> None:
        """Every part times a number and parameters of the model."""
        self.parts = [self.scaled(part, factor, by) for part in self.parts]

    def normed(self, name: str, norm: Any) -> None:
        """Every part behind a norm, its scale held at what it was; its bias is a part of its own."""
        self.parts, bias = self.behind(name, norm, self.parts)
        if bias is not None:
            self.add(f"{name}.bias", bias)

    def behind(
        self, name: str, norm: Any, parts: list[Tensor]
    ) -> tuple[list[Tensor], Tensor | None]:
        """What a norm makes of some parts of what it reads, and its bias."""
        if not norm.is_open:
            raise ArchitectureError(
                f"{name} ({norm.path}) is no norm of a known form, so its scale cannot be held"
            )
        scale = self.read(f"{name}.hook_scale")
        if norm.center:
            parts = [part - part.mean(-1, keepdim=True) for part in parts]
        parts = [part / scale for part in parts]
        module: Any = module_of(self.bridge.registry[f"{name}.hook_out"])
        with align_module_device(module):  # accelerate may keep the weights elsewhere
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is not None:
                weight = _wide(weight).to(self.device) + norm.offset
                parts = [part * weight for part in parts]
            if bias is not None:
                bias = _wide(bias).to(self.device).expand_as(parts[0])
            return parts, bias

    def scaled(self, value: Tensor, factor: float, by: tuple[str, ...]) -> Tensor:
        """A value times a number and parameters of the model."""
        for name in by:
            value = value * self.parameter(name).to(value)
        return value * factor

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer of the model."""
        found = self._named[name]
        if found.device.type == "meta":
            raise ArchitectureError(
                f"{name} is offloaded and belongs to no norm: load the model whole"
            )
        return found

    @cached_property
    def _named(self) -> dict[str, Tensor]:
        model = self.bridge.original_model
        every = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        return {name.removeprefix("_orig_mod."): value for name, value in every}

    @property
    def total(self) -> Tensor:
        """What the parts sum to."""
        return torch.stack(self.parts).sum(0)

    def check(self, name: str) -> None:
        """Hold the sum against what the run showed."""
        if not _is_near(self.total, self.read(name), tolerance=_tolerance(self.seen[name])):
            raise ArchitectureError(
                f"{name} is no sum of what entered the stream and what was added; does a hook that is set "
                "edit the stream itself?"
            )


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _tolerance(x: Tensor) -> float:
    """The error of many sums in the tensor's precision, relative to the largest value."""
    return 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2


def _is_near(left: Tensor, right: Tensor, size: Tensor | None = None, *, tolerance: float) -> bool:
    size = right if size is None else size
    return bool((left - right).abs().max() <= tolerance * size.abs().max())


def _enter(stream: _Stream) -> None:
    """What the first layer reads: embeddings, apart where nothing else happens to them."""
    tower, seen = stream.bridge.architecture.main, stream.seen
    first = f"{stream.bridge.registry.layers}.0.hook_in"
    scales = (tower.embed_scale, 1.0)
    found = {
        name: stream.read(name) * scale
        for name, scale in zip(seen.entry, scales, strict=True)
        if name in seen and scale is not None
    }
    whole = stream.read(first)
    total = torch.stack(list(found.values())).sum(0) if found else None
    if total is None or not _is_near(total, whole, tolerance=_tolerance(seen[first])):
        found = {first: whole}  # a norm, token types, images stand between
    for label, value in found.items():
        stream.add(label, value)


def _layer(stream: _Stream, index: int, per_head: bool) -> None:
    """What the branches of a layer add, in the order and with the factors of the model."""
    block = stream.bridge.architecture.blocks[index]
    here = f"{stream.bridge.registry.layers}.{index}"
    for branch, after in zip(block.branches, [*block.branches[1:], None], strict=True):
        norm = f"{here}.ln{branch.number}"
        if branch.place == "stream" and not branch.joins:
            stream.normed(norm, branch.ln)
        stream.multiply(branch.skip, branch.skip_by)
        for label, value in _made(stream, here, branch, per_head):
            stream.add(label, stream.scaled(value, branch.scale, branch.scale_by))
        for name in branch.bias:
            bias = stream.parameter(name).to(stream.parts[0])
            stream.add(name, bias.expand_as(stream.parts[0]))
        if branch.place == "after" and not (after is not None and after.joins):
            stream.normed(norm, branch.ln)
    if block.ln_out is not None:
        stream.normed(f"{here}.ln_out", block.ln_out)
    stream.check(f"{here}.hook_out")


def _made(stream: _Stream, here: str, branch: Any, per_head: bool) -> list[tuple[str, Tensor]]:
    """What a branch hands to the sum, whole or by heads."""
    whole, heads = f"{here}.hook_{branch.name}_out", f"{here}.{branch.name}.hook_result"
    if not per_head or heads not in stream.seen:
        return [(whole, stream.read(whole))]
    parts = list(stream.read(heads).unbind(-2))
    labels = [f"{heads}[{head}]" for head in range(len(parts))]
    module: Any = module_of(stream.bridge.registry[heads])
    if getattr(module, "bias", None) is not None:
        bias = stream.read(f"{here}.{branch.name}.o.hook_out") - torch.stack(parts).sum(0)
        labels, parts = [*labels, f"{here}.{branch.name}.o.bias"], [*parts, bias]
    out = f"{here}.{branch.name}.hook_out"
    if not _is_near(
        torch.stack(parts).sum(0), stream.read(out), tolerance=_tolerance(stream.seen[out])
    ):
        raise ArchitectureError(
            f"{out} is more than the sum of its heads: something stands behind the output projection; leave "
            "per_head out"
        )
    if branch.ln_post is not None:
        norm = f"{here}.ln{branch.number}_post"
        parts, own = stream.behind(norm, branch.ln_post, parts)
        if own is not None:
            labels, parts = [*labels, f"{norm}.bias"], [*parts, own]
    return list(zip(labels, parts, strict=True))


def _leave(stream: _Stream) -> None:
    """From the last layer to what the head reads: the final norm, and a factor."""
    tower = stream.bridge.architecture.main
    name = f"{tower.prefix}ln_final"
    if tower.ln_final is not None:
        stream.normed(name, tower.ln_final)
        stream.check(f"{name}.hook_out")
    head = stream.read("unembed.hook_in")
    total = stream.total
    factor = float((head * total).sum() / total.square().sum())
    if not _is_near(total * factor, head, tolerance=_tolerance(stream.seen["unembed.hook_in"])):
        before = name if tower.ln_final is not None else "the last layer"
        raise ArchitectureError(
            f"the head of {type(stream.bridge.original_model).__name__} is more than one linear map: what "
            f"{before} makes is changed (by a layer, an activation, a norm) before unembed.hook_in"
        )
    if abs(factor - 1) > 1e-3:  # else it is one, and the rest is rounding
        stream.multiply(factor)
