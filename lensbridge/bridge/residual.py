"""The residual stream at a place as the sum of parts, put together from what a run left behind.

Every operation on the stream is linear in the parts once the scale that each norm divides by is held at what
it was in the run. So what happens to the stream happens to each part, and a part is what *arrives* of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from ..hooks import ArchitectureError, HookRegistry
from .architecture import Norm
from .decompose import Add, Check, Constant, Enter, Multiply, Normed, Source, Step
from .matrix import linear_map
from .slicing import SliceInput, take
from .whole import Whole, module_of


@runtime_checkable
class Seen(Protocol):
    """What a run showed, by canonical name: all of it over the same rows and positions."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Tensor: ...


class Stream:
    """The residual stream as groups of parts, each [part, ..., d_model].

    Args:
        whole: The model.
        registry: Its points.
        seen: What the run showed.
        like: A tensor of the stream: rows and positions of the parts, and where they are put together (layers
            may be spread over several devices).
        neurons: Which neurons, where MLPs are split; None for all.
    """

    def __init__(
        self,
        whole: Whole,
        registry: HookRegistry,
        seen: Seen,
        like: Float[Tensor, "*rows d_model"],
        neurons: SliceInput = None,
    ) -> None:
        self.whole = whole
        self.registry = registry
        self.seen = seen
        self.shape = like.shape
        self.device = like.device
        self.dtype = like.dtype
        self.neurons = neurons
        self.groups: list[tuple[Source, Tensor]] = []

    # --- reading ---------------------------------------------------------------------------------

    def raw(self, name: str) -> Tensor:
        """What the run showed at a point, where the sum is made."""
        return self.seen[name].to(self.device)

    def read(self, name: str) -> Tensor:
        """The same, wide enough to be summed."""
        return wide(self.raw(name))

    def has(self, name: str) -> bool:
        """Whether the run showed a point."""
        return name in self.registry and name in self.seen

    # --- the steps -------------------------------------------------------------------------------

    def follow(self, steps: Iterable[Step]) -> None:
        """Do to the parts what the model did to the stream.

        Raises:
            ArchitectureError: The parts do not come to what the run showed.
        """
        for step in steps:
            match step:
                case Enter():
                    self._enter(step)
                case Add():
                    for source, values in self._added(step):
                        self.add(source, self.scaled(values, step.factor, step.by))
                case Multiply():
                    self.multiply(step.factor, step.by)
                case Normed():
                    self.normed(step.name, step.norm)
                case Constant():
                    self.add(Source("bias", step.name), self.whole.parameter(step.name)[None])
                case Check():
                    self.check(step.name)

    def add(self, source: Source, values: Tensor) -> None:
        """Further parts; rows that share a value may be left out."""
        values = wide(values).to(self.device)
        while values.dim() <= len(self.shape):
            values = values[:, None]
        self.groups.append((source, values.expand(-1, *self.shape)))

    def multiply(self, factor: float, by: tuple[str, ...] = ()) -> None:
        """Every part times a number and parameters of the model."""
        self.groups = [(source, self.scaled(x, factor, by)) for source, x in self.groups]

    def scaled(self, values: Tensor, factor: float, by: tuple[str, ...]) -> Tensor:
        """Values times a number and parameters of the model."""
        for name in by:
            values = values * self.whole.parameter(name).to(values)
        return values if factor == 1.0 else values * factor

    def normed(self, name: str, norm: Norm) -> None:
        """Every part behind a norm, its scale held at what it was; its bias is a part of its own."""
        self.groups = [(source, self.behind(name, norm, x)) for source, x in self.groups]
        bias = norm_bias(self.registry, name)
        if bias is not None:
            self.add(Source("bias", f"{name}.bias"), bias[None])

    def behind(self, name: str, norm: Norm, values: Tensor) -> Tensor:
        """What a norm makes of some parts of what it reads, without its bias."""
        return held_norm(self.registry, name, norm, values, self.read_scale(name, norm))

    def read_scale(self, name: str, norm: Norm) -> Tensor:
        """What a norm divided by, [..., 1].

        Raises:
            ArchitectureError: The norm is of no known form.
        """
        if not norm.is_open:
            raise ArchitectureError(
                f"{name} ({norm.path}) is no norm of a known form, so its scale cannot be held"
            )
        return self.read(f"{name}.hook_scale")

    @property
    def total(self) -> Float[Tensor, "*rows d_model"]:
        """What the parts sum to."""
        total = torch.zeros(self.shape, device=self.device)
        for _, values in self.groups:
            total = total + values.sum(0)
        return total

    def check(self, name: str) -> None:
        """Hold the sum against what the run showed.

        Raises:
            ArchitectureError: It is something else.
        """
        if not is_near(self.total, self.read(name), tolerance=tolerance_of(self.seen[name])):
            raise ArchitectureError(
                f"{name} is no sum of what entered the stream and what was added; does a hook that is set "
                "edit the stream itself?"
            )

    # --- what enters and what is added -----------------------------------------------------------

    def _enter(self, step: Enter) -> None:
        """Embeddings, apart where nothing else happens to them."""
        parts = self._parts(step)
        if parts is None:
            self.add(Source("whole", step.first), self.read(step.first)[None])
            return
        for source, value in parts:
            self.add(source, value[None])
        if step.norm is not None:
            self.normed(*step.norm)

    def _parts(self, step: Enter) -> list[tuple[Source, Tensor]] | None:
        """Embeddings and what else there is; None where the embeddings are not summands."""
        if not (step.parts and self.has(step.at)):
            return None
        if not all(self.has(x.name) and self._fits(self.seen[x.name]) for x, _ in step.parts):
            return None
        whole, tolerance = self.read(step.at), tolerance_of(self.seen[step.at])
        for sure in (False, True):
            found = [
                (source, self.read(source.name) * (1.0 if factor is None else factor))
                for source, factor in step.parts
                if not (sure and factor is None)
            ]
            rest = whole - sum(value for _, value in found)
            if is_near(rest, torch.zeros_like(rest), whole, tolerance=tolerance):
                return found
        # Something happens to the embeddings (images stand in their place, say), unless more is added.
        return [*found, (Source("rest", "embed.rest"), rest)] if step.has_rest else None

    def _fits(self, value: Tensor) -> bool:
        """Whether a value is one of the stream's, or one that rows or positions share."""
        theirs = tuple(value.shape)[-len(self.shape) :]
        ours = tuple(self.shape)[len(self.shape) - len(theirs) :]
        return value.dim() <= len(self.shape) and all(
            a in (1, b) for a, b in zip(theirs, ours, strict=True)
        )

    def _added(self, step: Add) -> Iterator[tuple[Source, Tensor]]:
        """What a branch hands to the sum, before its factor."""
        source, bias = step.source, None
        if source.kind == "branch":
            values = self.read(source.name)[None]
        else:
            split = head_results if source.kind == "head" else neuron_results
            values, bias = split(self, source.name)
            self._check_parts(step, values, bias)
        own = source.name.removesuffix(".hook_result").removesuffix(".out.hook_in")
        layer = "o" if source.kind == "head" else "out"
        made = [(source, values)]
        if bias is not None:
            made.append((Source("bias", f"{own}.{layer}.bias"), bias))
        if step.norm is not None:
            name, norm = step.norm
            made = [(one, self.behind(name, norm, x)) for one, x in made]
            after = norm_bias(self.registry, name)
            if after is not None:
                made.append((Source("bias", f"{name}.bias"), after[None]))
        yield from made

    def _check_parts(self, step: Add, values: Tensor, bias: Tensor | None) -> None:
        """Hold heads or neurons against what their branch made, where that was recorded."""
        if not self.has(step.whole) or (step.source.kind == "neuron" and self.neurons is not None):
            return
        total = values.sum(0) if bias is None else values.sum(0) + bias[0]
        if not is_near(total, self.read(step.whole), tolerance=tolerance_of(self.seen[step.whole])):
            parts = f"{step.source.kind}s"
            raise ArchitectureError(
                f"{step.whole} is more than the sum of its {parts}: something stands behind the last "
                f"projection, or a hook that was set edits what it makes; leave the {parts} together"
            )


# --- heads and neurons --------------------------------------------------------------------------------------


def head_results(stream: Stream, name: str) -> tuple[Tensor, Tensor | None]:
    """What each head adds, [head, ..., d_model], and the output projection's bias, one row.

    Args:
        stream: Where they are read: at ``hook_result``, or from what the output projection reads.
        name: Name of the point ``hook_result``.
    """
    z = f"{name.removesuffix('.hook_result')}.o.hook_in"
    shown = stream.raw(name if stream.has(name) else z)
    heads = shown.shape[-2]
    width = heads * stream.registry[z].sizes["d_head"] if z in stream.registry else None
    weight, bias = _map_of(stream, name, width, shown)
    if stream.has(name):
        results = wide(shown)
    else:
        results = torch.einsum("...hd,hdm->...hm", wide(shown), weight.unflatten(0, (heads, -1)))
    return results.movedim(-2, 0), bias


def neuron_results(stream: Stream, name: str) -> tuple[Tensor, Tensor | None]:
    """What each neuron adds, [neuron, ..., d_model], and the output projection's bias, one row.

    Args:
        stream: Where they are read.
        name: Name of the point that shows the neurons behind their activation.
    """
    acts = stream.raw(name)
    weight, bias = _map_of(stream, name, acts.shape[-1], acts)
    which = stream.neurons
    acts, weight = take(wide(acts), which, -1), take(weight, which, 0)
    rows = [1] * (acts.dim() - 1)
    return acts.movedim(-1, 0)[..., None] * weight.view(len(weight), *rows, -1), bias


def _map_of(
    stream: Stream, name: str, width: int | None, like: Tensor
) -> tuple[Float[Tensor, "d_in d_model"], Tensor | None]:
    """Matrix and bias of the layer at a point."""
    weight, bias = linear_map(module_of(stream.registry[name]), width, like)
    rows = [1] * len(stream.shape)
    own = None if bias is None else wide(bias).to(stream.device).view(*rows, -1)
    return wide(weight).to(stream.device), own


# --- norms --------------------------------------------------------------------------------------------------


def held_norm(
    registry: HookRegistry, name: str, norm: Norm, values: Tensor, scale: Tensor
) -> Tensor:
    """What a norm makes of parts of what it reads while its scale is held, without its bias.

    Args:
        registry: The model's points.
        name: The norm's name.
        norm: Its facts.
        values: The parts, [..., d_model].
        scale: What it divided by, [..., 1].
    """
    if norm.center:
        values = values - values.mean(-1, keepdim=True)
    values = values / scale
    module: Any = module_of(registry[f"{name}.hook_out"])
    with align_module_device(module):  # accelerate may keep the weights elsewhere
        weight = getattr(module, "weight", None)
        return values if weight is None else values * (wide(weight).to(values) + norm.offset)


def norm_bias(registry: HookRegistry, name: str) -> Float[Tensor, " d_model"] | None:
    """What a norm adds; None where it adds nothing."""
    module: Any = module_of(registry[f"{name}.hook_out"])
    with align_module_device(module):
        bias = getattr(module, "bias", None)
        return None if bias is None else wide(bias)


def device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a module's weights are; for those that are nowhere until it runs, somewhere else."""
    held = [*module.parameters(), *module.buffers()]
    return next((x.device for x in held if x.device.type != "meta"), otherwise)


# --- the end ------------------------------------------------------------------------------------------------


def head_factor(
    whole: Whole,
    final: Float[Tensor, "*rows d_model"],
    head: Float[Tensor, "*rows d_model"],
    tolerance: float,
) -> float:
    """By what the end of the stream is multiplied before the head reads it.

    Args:
        whole: The model.
        final: What the final norm made, or the last layer where there is none.
        head: What the head read.
        tolerance: How far they may differ.
    Raises:
        ArchitectureError: More happens to it.
    """
    factor = float((head * final).sum() / final.square().sum())
    if not is_near(final * factor, head, tolerance=tolerance):
        tower = whole.architecture.main
        before = "the last layer" if tower.ln_final is None else f"{tower.prefix}ln_final"
        raise ArchitectureError(
            f"the head of {whole.kind} is more than one linear map: what {before} makes is changed (by a "
            "layer, an activation, a norm) before unembed.hook_in"
        )
    return factor if abs(factor - 1) > 1e-3 else 1.0  # else it is one, and the rest is rounding


# --- how near is near ---------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """In float32 or better; parameters and what a run left behind have no gradients here."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def tolerance_of(x: Tensor) -> float:
    """The error of many sums in the tensor's precision, relative to the largest value."""
    return 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2


def is_near(left: Tensor, right: Tensor, size: Tensor | None = None, *, tolerance: float) -> bool:
    """Whether two sums are equal up to rounding, relative to the largest value."""
    size = right if size is None else size
    return bool((left - right).abs().max() <= tolerance * size.abs().max())
