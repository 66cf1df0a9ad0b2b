"""Making points: whether a place can carry one, in which layout, and the sites that serve them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..hooks import ArchitectureError, Call, HookPoint, Site, Tap, Unsettled
from ..hooks.names import aliases_of
from . import places
from .architecture import Architecture, Block, Branch, Norm, Tower
from .example import LENGTH, ROWS
from .places import Rows
from .seen import Trace, Visit

STREAM = "batch pos d_model"
IDS = "batch pos"
CHOICES = "batch pos choice"
_UNREADABLE = (RuntimeError, IndexError, KeyError, TypeError, AttributeError, ArchitectureError)
# Modules that change none of their arguments; norms join them once their formula is known.
_PURE = (nn.Linear, nn.Embedding, Conv1D)

_FREE = ("batch", "pos", "1", "height", "width")
"""Axes whose size depends on the input."""

Verdict = tuple[str, str, bool, dict[str, int]]
"""Why a place cannot carry a point (empty when it can), its layout, whether the value is overwritten later,
and the sizes of its axes."""

Layout = Callable[[Tap, Rows], Tap]


def _as_is(tap: Tap, rows: Rows) -> Tap:
    return tap


_LAYOUTS: dict[str, Layout] = {
    "": _as_is,
    "flat": places.unflattened,
    "pos first": lambda tap, rows: places.swapped(tap, 0, 1),
    "heads first": lambda tap, rows: places.swapped(tap, 1, 2),
    "one head": lambda tap, rows: places.squeezed(tap, 1),
}


class Builder:
    """Collects the points of one model.

    Args:
        model: The Hugging Face model.
        architecture: Where its parts are.
    """

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.modules = dict(model.named_modules())
        self.architecture = architecture
        self.points: list[HookPoint] = []
        self.absent: dict[str, str] = {}
        self.sites: dict[tuple[str, int], Site] = {}
        self.pure = {norm.path for norm in _norms(architecture) if norm.is_open}
        self.unsettled = Unsettled()
        self.enter(architecture.main, None)

    def enter(self, tower: Tower, block: Block | None, call: int = 0) -> None:
        """From here on, points are those of this layer."""
        self.tower = tower
        self.seen: Trace | None = tower.seen
        self.block = block
        self.call = call if block is None else block.call
        self.rows = Rows()
        self.is_noted = False
        self.calls = 1
        self.shape: tuple[int, ...] | None = None
        self.stream = STREAM
        self.size: tuple[int, ...] = ()
        visits = self.seen.visits.get(block.path) if self.seen and block else None
        if visits and block is not None:
            self.calls = len(visits)
            entering = visits[block.call].entering
            if isinstance(entering, Tensor):
                self.stream = _stream_axes(entering)
                axes = self.stream.split()
                first = axes.index("batch") if {"batch", "pos"} <= set(axes) else 0
                self.shape = tuple(entering.shape[first : first + 2])
                if self.shape == (LENGTH, ROWS):  # positions come first
                    self.shape = (ROWS, LENGTH)
                self.size = tuple(entering.shape)

    def site(self, path: str, turn: tuple[int, int] | None = None) -> Site:
        """The site of a module, or of one of its calls where it is called several times."""
        if turn is None and self.calls > 1:
            turn = self.call, self.calls
        key = path, -1 if turn is None else turn[0]
        if key not in self.sites:
            module = self.modules[path]
            is_pure = isinstance(module, _PURE) or path in self.pure
            self.sites[key] = Site(module, self.unsettled, is_pure=is_pure, turn=turn)
        return self.sites[key]

    def visit(self, path: str | None) -> Visit | None:
        """The call of a module that belongs to the layer at hand; None when there is no such one."""
        visits = [] if self.seen is None or path is None else self.seen.visits.get(path, [])
        return visits[self.call] if len(visits) == self.calls else None

    def add(
        self,
        name: str,
        path: str,
        tap: Tap,
        axes: str,
        *extra_aliases: str,
        is_default: bool = True,
        is_index: bool = False,
        turn: tuple[int, int] | None = None,
    ) -> HookPoint | None:
        """Make a point, unless the watched run shows that the place cannot carry one."""
        axes = self.axes(axes)
        aliases = self.aliases(name, *extra_aliases)
        reason, layout, is_volatile, sizes = self.verdict(name, path, tap, axes, turn)
        if reason:
            self.lacks(reason, name, *extra_aliases)
            return None
        point = HookPoint(name, aliases, axes=axes, is_default=is_default)
        is_index = is_index or axes in (IDS, "pos")
        point.__dict__.update(is_volatile=is_volatile, sizes=sizes, is_index=is_index)
        self.site(path, turn).add(self.laid(tap, layout), point)
        if layout == "flat":
            self.note_rows(point)
        self.points.append(point)
        return point

    def axes(self, axes: str) -> str:
        """Axes as they are in this tower; some keep all rows in one sequence."""
        return axes.replace("batch pos", "pos") if len(self.size) == 2 else axes

    def added(self, name: str, branch: Branch) -> tuple[str, ...]:
        """The name of what a branch adds, if that is laid out as the stream is."""
        visit = self.visit(branch.adds)
        value = None if visit is None else visit.value
        if not isinstance(value, Tensor):
            return ()
        if tuple(value.shape) != self.size and self.layout(value, self.stream) in (None, ""):
            shapes = f"{list(value.shape)}, the stream {list(self.size)}"
            self.lacks(f"what {branch.adds} makes is laid out as {shapes}", name)
            return ()
        return (name,)

    def aliases(self, name: str, *extra: str) -> tuple[str, ...]:
        """A point's familiar names; a decoder's own attention is also its self-attention."""
        found = [*aliases_of(name), *extra]
        if self.tower.prefix == "decoder_":
            found += [n.replace(".attn.", ".self_attn.") for n in [name, *found] if ".attn." in n]
        return tuple(found)

    def laid(self, tap: Tap, layout: str) -> Tap:
        """A tap in the layout its point promises."""
        return _LAYOUTS[layout](tap, self.rows)

    def note_rows(self, point: HookPoint) -> None:
        """Have the layer's shape noted while a point is listened to that needs it."""
        if self.block is not None:
            self.site(self.block.path).add(self.rows.note(), point)

    def verdict(
        self, name: str, path: str, tap: Tap, axes: str, turn: tuple[int, int] | None = None
    ) -> Verdict:
        """What the watched run says of a place."""
        seen = self.seen
        if seen is None:
            return self.tower.unproved, "", False, {}
        if name not in seen.verdicts:
            seen.verdicts[name] = self.judge(seen, name, path, tap, axes, turn)
        return seen.verdicts[name]

    def judge(
        self,
        seen: Trace,
        name: str,
        path: str,
        tap: Tap,
        axes: str,
        turn: tuple[int, int] | None,
    ) -> Verdict:
        """Judge a place by the call the run made of it."""
        call, calls = (self.call, self.calls) if turn is None else turn
        times = len(seen.visits.get(path, ()))
        if times != calls:
            how = "never" if times == 0 else f"{times} times"
            return (
                f"the model calls {path} {how} in one pass; a name stands for one value",
                "",
                False,
                {},
            )
        visit = seen.visits[path][call]
        is_volatile = visit.is_overwritten(tap.side)
        # Layers of a kind are judged once.
        shapes = [getattr(x, "shape", None) for x in (visit.entering, visit.value)]
        key = str((re.sub(r"\d+", "#", name), axes, *shapes, self.size))
        if key not in seen.verdicts:
            seen.verdicts[key] = self.read(visit, path, tap, axes)
        reason, layout, sizes = seen.verdicts[key]
        return reason, layout, is_volatile, sizes

    def read(self, visit: Visit, path: str, tap: Tap, axes: str) -> tuple[str, str, dict[str, int]]:
        """Try a tap on a call: why it cannot be read, or its layout and sizes."""
        try:
            value = tap.read(Call(self.modules[path], visit.args, visit.kwargs, visit.output))
        except _UNREADABLE as error:
            why = f"what passes there cannot be read as [{axes}]: {type(error).__name__}: {error}"
            return why, "", {}
        if not isinstance(value, Tensor):
            return f"what passes there is {type(value).__name__}, not [{axes}]", "", {}
        layout = self.layout(value, axes)
        if layout is None:
            return f"what passes there is {list(value.shape)}, not [{axes}]", "", {}
        self.rows.shape = None if self.shape is None else (self.shape[0], self.shape[1])
        laid = _LAYOUTS[layout](Tap(tap.side, lambda call: value, tap.write), self.rows).read
        shape = laid(Call(self.modules[path], (), {})).shape
        sizes = {a: n for a, n in zip(axes.split(), shape, strict=True) if a not in _FREE}
        return "", layout, sizes

    def layout(self, value: torch.Tensor, axes: str) -> str | None:
        """How a value is laid out against its axes; None when in no known way."""
        wanted = len(axes.split())
        shape = tuple(value.shape)
        if len(self.size) == 2:
            return "" if value.dim() == wanted else None
        if self.shape is None or self.shape[0] == self.shape[1]:
            return "" if value.dim() == wanted else None
        rows, length = self.shape
        if value.dim() == wanted:
            if not axes.startswith("batch pos"):
                return ""
            if shape[:2] == (length, rows):
                return "pos first"
            is_headed = wanted == 4 and shape[1] != length and shape[2] == length
            return "heads first" if is_headed else ""
        if value.dim() == wanted - 1 and shape[0] == rows * length:
            return "flat"
        if value.dim() == wanted + 1 and shape[1] == 1 and shape[2] == length:
            return "one head"
        return None

    def norm(
        self, name: str, one: Norm, axes: str, *out_aliases: str, in_aliases: tuple[str, ...] = ()
    ) -> None:
        """A norm and the two values inside it."""
        self.add(f"{name}.hook_in", one.path, places.whole_input(), axes, *in_aliases)
        if one.is_open:
            narrow = axes.rsplit(" ", 1)[0] + " 1"
            self.add(f"{name}.hook_scale", one.path, places.norm_scale(one), narrow)
            self.add(f"{name}.hook_normalized", one.path, places.norm_normalized(one), axes)
        else:
            kind = type(self.modules[one.path]).__name__
            self.lacks(
                f"{kind} is neither the LayerNorm nor the RMSNorm formula, so its inside has no names",
                f"{name}.hook_scale",
                f"{name}.hook_normalized",
            )
        self.add(f"{name}.hook_out", one.path, places.whole_output(), axes, *out_aliases)

    def hide(self, axes: Collection[str], reason: str) -> None:
        """Take back the points that have certain axes."""
        hidden = [point for point in self.points if not set(axes).isdisjoint(point.axes.split())]
        self.points = [point for point in self.points if point not in hidden]
        for point in hidden:
            for name in (str(point.name), *point.aliases):
                self.absent[name] = reason

    def lacks(self, reason: str, *names: str) -> None:
        """Say why names are missing."""
        for name in names:
            self.absent[name] = reason
            for alias in self.aliases(name):
                self.absent[alias] = reason


def _stream_axes(x: Tensor) -> str:
    """Axes of a residual stream: of the usual three, of images, or of several streams side by side."""
    if x.dim() == 2:
        return "pos d_model"
    if x.dim() != 4:
        return STREAM
    if x.shape[:2] == (ROWS, LENGTH):
        return "batch pos stream d_model"
    if x.shape[1:3] == (ROWS, LENGTH):
        return "stream batch pos d_model"
    return "batch channel height width"


def _norms(architecture: Architecture) -> Iterator[Norm]:
    parts: list[Any] = []
    for tower in architecture.towers:
        parts.append(tower)
        for block in tower.blocks:
            branches = (*block.branches, *block.inner)
            parts += [block, *branches, *(branch.part for branch in branches)]
    for part in parts:
        yield from (value for value in vars(part).values() if isinstance(value, Norm))
