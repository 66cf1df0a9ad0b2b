"""Patch grids: which activations of one run go into another, place by place, and what comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..bridge import Inputs, TransformerBridge
from ..hooks import HookPoint, InputError
from .measured import MeasuredRun
from .scoring import last_real
from .sites import Place, layer_index, places_of

if TYPE_CHECKING:
    from .figures import Plot

Entry = int | tuple[int, ...]
"""A layer, a head or a position, or several that are patched together."""

EACH, ALL = "each", "all"
_POSITIONS, _HEADS, _SOURCES = ("pos", "query"), ("head", "kv_head"), ("key",)


@dataclass(frozen=True)
class PatchGrid:
    """What patches did to a metric, one number for each.

    Attributes:
        site: What was patched: ``"resid_pre"``, or who sent in path patching.
        axes: What the dimensions of `values` are: ``("layer", "pos")``, ``("layer", "head")``...
        labels: For each axis, which layer, head or position its entries are; several in a tuple were patched
            together.
        values: The metric under each patch, the mean over rows.
        clean, corrupted: The metric of the two runs as they are, the mean over rows.
        by_row: The metric of each row, [..., batch]; None for a metric that is one number for all rows.
        into: The run that was patched, ``"corrupted"`` or ``"clean"``.
        is_estimate: Whether one backward pass made it, to first order, instead of a run for each patch.
        tokens: The tokens of the run that was patched, as text, if it has one row and a tokenizer.
    """

    site: str
    axes: tuple[str, ...]
    labels: tuple[tuple[Entry | None, ...], ...]
    values: Float[Tensor, "..."]
    clean: float
    corrupted: float
    by_row: Tensor | None = None
    into: str = "corrupted"
    is_estimate: bool = False
    tokens: tuple[str, ...] | None = None

    @property
    def normalised(self) -> Float[Tensor, "*axes"]:
        """The values on a scale from 0, the corrupted run, to 1, the clean run.

        Raises:
            InputError: The metric is the same in both runs, so that there is no scale.
        """
        if self.clean == self.corrupted:
            raise InputError(
                f"the metric is {self.clean:.6g} in the clean and in the corrupted run, so nothing lies "
                "between: choose runs or a metric that differ"
            )
        return (self.values - self.corrupted) / (self.clean - self.corrupted)

    @property
    def effects(self) -> Float[Tensor, "*axes"]:
        """By how much each patch moved the metric of the run it was made in."""
        return self.values - (self.corrupted if self.into == "corrupted" else self.clean)

    def top(self, k: int = 5) -> list[tuple[Any, ...]]:
        """The patches that moved the metric most, each as its labels and its effect."""
        order = self.effects.flatten().abs().argsort(descending=True, stable=True)[:k]
        found = []
        for index in order.tolist():
            place = torch.unravel_index(torch.tensor(index), self.values.shape)
            labels = [own[int(i)] for own, i in zip(self.labels, place, strict=True)]
            found.append((*labels, float(self.effects.flatten()[index])))
        return found

    def plot(self, *, normalised: bool = True) -> Plot:
        """A heat map; see `lensbridge.methods.figures.patch_plot`."""
        from .figures import patch_plot

        return patch_plot(self, normalised=normalised)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{n} {axis}" for n, axis in zip(self.values.shape, self.axes, strict=True)
        )
        best = ""
        if self.axes:
            *labels, effect = self.top(1)[0]
            where = [
                f"{axis} {x}" for axis, x in zip(self.axes, labels, strict=True) if x is not None
            ]
            best = f"; most at {', '.join(where) or self.site}: {effect:+.3f}"
        how = "first order" if self.is_estimate else "patched"
        return (
            f"PatchGrid({self.site}, {sizes or 'one patch'}, {how} into {self.into}; clean {self.clean:.3f}, "
            f"corrupted {self.corrupted:.3f}{best})"
        )


# --- what is patched --------------------------------------------------------------------------------------


class Patch(NamedTuple):
    """Some entries of what a point shows.

    Attributes:
        name: The point.
        mask: True at what is taken from the other run; has the value's dimensions, those of one entry count
            for all.
    """

    name: str
    mask: Bool[Tensor, "batch ..."]


class Axis(NamedTuple):
    """A dimension of a grid that lies in the patched tensor.

    Attributes:
        name: What it is called.
        dim: Which dimension of the value.
        labels: Its entries.
        masks: For each, where it is: [rows or 1, length].
    """

    name: str
    dim: int
    labels: tuple[Entry, ...]
    masks: tuple[Bool[Tensor, "batch length"], ...]


def sites_at(
    bridge: TransformerBridge, site: Any, layers: Iterable[int] | int | None
) -> list[Place]:
    """The places of a site in some layers.

    Raises:
        InputError: Not a name, or no layers.
        UnknownPointError, AbsentPointError, LayerRangeError: No such site or layer.
    """
    chosen = None
    if layers is not None:
        chosen = [layer_index(x, bridge) for x in ([layers] if isinstance(layers, int) else layers)]
        if not chosen:
            raise InputError("layers is empty: name some, or leave it out for all")
    return places_of(site, chosen, bridge)


def axes_of(
    point: HookPoint,
    value: Tensor,
    inputs: Inputs,
    positions: Any,
    heads: Any,
    sources: Any = None,
) -> list[Axis]:
    """How a point's value is divided into patches, head first.

    Args:
        point: Where.
        value: What it showed.
        inputs: Of that run.
        positions: ``"each"``, ``"all"`` together, or a list; None: each if the point has no heads, else all.
        heads: Likewise; None: each.
        sources: Positions that are attended to, of a pattern; None: all.
    Raises:
        InputError: The point has no such dimension, or it has no such entry.
    """
    dims = point.axes.split()
    found = []

    def named(names: Sequence[str]) -> str | None:
        return next((dim for dim in dims if dim in names), None)

    head, pos, key = named(_HEADS), named(_POSITIONS), named(_SOURCES)
    if positions is None:
        positions = EACH if head is None else ALL
    for name, given, what in (
        (head, heads, "heads"),
        (pos, positions, "positions"),
        (key, sources, "sources"),
    ):
        if name is None:
            if given not in (None, ALL):
                raise InputError(
                    f"{point.name} is [{point.axes}] and has no {what}: leave {what}= out"
                )
            continue
        unless = EACH if what == "heads" else ALL
        chosen = unless if given is None else given
        dim = dims.index(name)
        length = value.shape[dim]
        # What a cross-attention looks at has a mask of its own.
        has_mask = what == "positions" or (what == "sources" and "cross" not in str(point.name))
        mask = inputs.mask if has_mask else None
        if mask is not None and (mask.dim() != 2 or mask.shape[-1] < length):
            mask = None
        split = _split(chosen, length, what, None if mask is None else mask[:, -length:])
        if split is not None:
            found.append(Axis("pos" if what == "positions" else name, dim, *split))
    return found


def _split(
    chosen: Any, length: int, what: str, mask: Tensor | None
) -> tuple[tuple[Entry, ...], tuple[Tensor, ...]] | None:
    """Labels and masks of the entries of a dimension; None where it is patched as a whole."""
    if isinstance(chosen, str):
        if chosen not in (EACH, ALL):
            raise InputError(f"{what} is 'each', 'all' or a list, got {chosen!r}")
        if chosen == ALL:
            return None
        chosen = range(length)
    try:
        items = list(chosen)
    except TypeError:
        raise InputError(f"{what} is 'each', 'all' or a list, got {chosen!r}") from None
    if not items:
        raise InputError(f"{what} is empty: name some, or 'each', or 'all' at once")
    ends = torch.tensor([length]) if mask is None else last_real(mask, *mask.shape).cpu() + 1
    labels, masks = [], []
    for item in items:
        group = tuple(item) if isinstance(item, (list, tuple)) else (item,)
        made = torch.zeros(len(ends), length, dtype=torch.bool)
        for entry in group:
            if not isinstance(entry, int) or isinstance(entry, bool):
                raise InputError(
                    f"{what} are whole numbers, or lists of some to patch together; got {item!r}"
                )
            at = torch.full_like(ends, entry) if entry >= 0 else ends + entry
            if bool(((at < 0) | (at >= length)).any()):
                raise InputError(f"{what}: there is no {entry}; there are {length}, from 0")
            made[torch.arange(len(ends)), at] = True
        labels.append(item if isinstance(item, int) else group)
        masks.append(made)
    return tuple(labels), tuple(masks)


def patches_of(name: str, value: Tensor, axes: Sequence[Axis]) -> list[Patch]:
    """Every patch at a point, the last axis running fastest."""
    made = []
    for masks in itertools.product(*(axis.masks for axis in axes)):
        whole = torch.ones([1] * value.dim(), dtype=torch.bool)
        for axis, mask in zip(axes, masks, strict=True):
            shape = [1] * value.dim()
            shape[0], shape[axis.dim] = mask.shape
            whole = whole & mask.view(shape)
        made.append(Patch(name, whole))
    return made


def check_aligned(clean: Inputs, corrupted: Inputs) -> None:
    """Refuse runs that cannot be patched into each other position by position.

    Raises:
        InputError: They differ in rows, in length, or in where their padding is.
    """
    advice = (
        "position i of one run is patched into position i of the other, so use texts of equally many tokens "
        "(bridge.to_str_tokens(text) shows them), row by row"
    )
    if clean.tokens is not None and corrupted.tokens is not None:
        if clean.tokens.shape != corrupted.tokens.shape:
            sizes = [
                f"{x.tokens.shape[0]} x {x.tokens.shape[1]}"
                for x in (clean, corrupted)
                if x.tokens is not None
            ]
            raise InputError(
                f"clean is {sizes[0]} tokens and corrupted {sizes[1]} (rows x positions): {advice}"
            )
        masks = [
            torch.ones_like(x.tokens) if x.mask is None else (x.mask != 0).long()
            for x in (clean, corrupted)
            if x.tokens is not None
        ]
        if masks[0].shape == masks[1].shape and not torch.equal(*masks):
            rows = (masks[0] != masks[1]).flatten(1).any(1).nonzero().flatten().tolist()
            raise InputError(
                f"in rows {rows} clean and corrupted are padded at different positions: {advice}"
            )


def check_rows(run: MeasuredRun, name: str, value: Tensor) -> None:
    """Refuse a point that does not show each row's own value.

    Raises:
        InputError: It does not.
    """
    if not run.has_rows(name, value):
        point = run.bridge.registry[name]
        raise InputError(
            f"{name} [{point.axes}] shows {list(value.shape)} of {run.rows} rows: it has no value for each "
            "row to be patched"
        )


# --- running ----------------------------------------------------------------------------------------------


def batches_of(run: MeasuredRun, count: int, batch_size: int | None) -> list[range]:
    """Which of so many patches run together.

    Raises:
        InputError: A batch size that is no count.
    """
    size = 32 if batch_size is None else batch_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(
            f"batch_size counts rows of one forward pass and is 1 or more, got {batch_size!r}"
        )
    times = max(1, size // run.rows) if run.repeats else 1
    return [range(at, min(at + times, count)) for at in range(0, count, times)]


def counted(chunks: Sequence[Any], total: int, progress: bool, desc: str) -> Iterable[Any]:
    """Chunks behind a progress bar that counts what is in them."""
    if not progress:
        yield from chunks
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=desc, unit="patch") as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def sweep(
    run: MeasuredRun,
    source: dict[str, Shaped[Tensor, "batch *rest"]],
    patches: Sequence[Patch],
    *,
    batch_size: int | None = None,
    progress: bool = False,
    desc: str = "patching",
) -> Tensor:
    """The metric under each patch, many in one forward pass where the rows can be repeated.

    Args:
        run: What is patched.
        source: What the points showed in the other run.
        patches: Which entries of them, each patch by itself.
        batch_size: How many rows go through the model at once, at least those of the input.
        progress: Show a bar.
        desc: What to call it.
    Returns:
        [patch] or [patch, batch], as the metric is.
    """
    found = []
    with torch.no_grad():
        for chunk in counted(
            batches_of(run, len(patches), batch_size), len(patches), progress, desc
        ):
            own = [patches[index] for index in chunk]
            names = {patch.name for patch in own}
            hooks = [(name, putting(source[name], name, own)) for name in names]
            with run.bridge.hooks(fwd_hooks=hooks):
                found += [run.measured(part) for part in run.logits(len(own))]
    return torch.stack(found)


def putting(source: Tensor, name: str, patches: Sequence[Patch]) -> Any:
    """A hook that puts the patches at its point into the copies of the rows, the n-th into the n-th copy."""

    def put(tensor: Tensor, hook: HookPoint) -> Tensor:
        if tensor.shape != (len(patches) * len(source), *source.shape[1:]):
            raise InputError(
                f"{name} is {list(source.shape)} in one run and "
                f"{[len(tensor) // len(patches), *tensor.shape[1:]]} in the other: give inputs of as many "
                "rows and tokens"
            )
        copies = tensor.unflatten(0, (len(patches), -1)).clone()
        for index, patch in enumerate(patches):
            if patch.name == name:
                mask = patch.mask.to(copies.device)
                copies[index] = torch.where(mask, source.to(copies), copies[index])
        return copies.flatten(0, 1)

    return put
