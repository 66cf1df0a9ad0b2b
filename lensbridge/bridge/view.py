"""The registry as a tree: ``bridge.blocks[0].attn.q.hook_out`` and a printed outline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..hooks import AbsentPointError, HookPoint, HookRegistry, LayerRangeError
from .architecture import Architecture, Tower
from .parameters import WeightTable

_TOWER_PARTS = ("embed", "pos_embed", "ln_embed", "rotary_emb", "blocks", "ln_final")


def belongs(name: str, tower: Tower) -> bool:
    """Whether a point is one of a tower's."""
    part = name.removeprefix(tower.prefix).partition(".")[0]
    return name.startswith(tower.prefix) and part in _TOWER_PARTS


class PartView:
    """One part of a model: its points, its weights and its parts, as attributes.

    Args:
        registry: All points.
        name: This part's name, ``"blocks.0.attn"``.
    """

    def __init__(self, registry: HookRegistry, name: str) -> None:
        self._registry = registry
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """A `PartView`, a `HookPoint`, or a weight: a tensor, for ``QK`` and ``OV`` a `FactoredMatrix`."""
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        name = f"{self._name}.{attribute}"
        registry = self._registry
        if name in registry:
            return registry[name]
        weights: WeightTable = registry.weights
        if name in weights:
            try:
                return weights.read(name)
            except AbsentPointError as error:
                raise AttributeError(str(error)) from error
        if any(held.startswith(name + ".") for held in (*registry, *weights)):
            return PartView(registry, name)
        missing = registry if weights.why(name) is None else weights
        raise AttributeError(str(missing.missing(name)))

    def __dir__(self) -> list[str]:
        start = self._name + "."
        names = [*self._registry, *self._registry.aliases, *self._registry.weights]
        return sorted(
            {name[len(start) :].split(".")[0] for name in names if name.startswith(start)}
        )

    def __repr__(self) -> str:
        points = [p for n, p in self._registry.items() if n.startswith(self._name + ".")]
        return "\n".join([self._name, *(f"  {point!r}" for point in points)])


class BlocksView:
    """The layers of a tower: ``bridge.blocks[0]``, ``len(bridge.blocks)``, iteration.

    Args:
        registry: All points.
        count: How many layers there are.
        name: What their names begin with.
    """

    def __init__(self, registry: HookRegistry, count: int, name: str = "blocks") -> None:
        self._registry = registry
        self._count = count
        self._name = name

    def __len__(self) -> int:
        return self._count

    def index(self, layer: int) -> int:
        """A layer index, negative ones counted from the end."""
        if not isinstance(layer, int) or not -self._count <= layer < self._count:
            raise LayerRangeError(f"layer {layer} is not one of this model's {self._count} layers")
        return layer % self._count

    def __getitem__(self, index: int) -> PartView:
        return PartView(self._registry, f"{self._name}.{self.index(index)}")

    def __iter__(self) -> Iterator[PartView]:
        return (self[index] for index in range(self._count))


def blocks_of(registry: HookRegistry, name: str) -> BlocksView:
    """The layers whose points begin with a name (``"vision_blocks"``)."""
    layers = {n.split(".")[1] for n in registry if n.startswith(f"{name}.")}
    return BlocksView(registry, len(layers), name)


def outline(registry: HookRegistry, architecture: Architecture) -> str:
    """A model as a tree: points with axes and aliases, one layer for each kind, and what is absent."""
    lines: list[str] = []
    samples: list[str] = []
    for tower in architecture.towers:
        kinds: dict[tuple[str, ...], list[int]] = {}
        for index in range(len(tower.blocks)):
            kinds.setdefault(_templates(registry, f"{tower.prefix}blocks.{index}."), []).append(
                index
            )
        shown = {f"{tower.prefix}blocks.{found[0]}": found for found in kinds.values()}
        lines += _tower(registry, tower, shown)
        samples += [f"{name}." for name in shown]
    lines += [
        _line(p, n, "") for n, p in registry.items() if n.startswith(("unembed.", "projector"))
    ]
    lines += _absent(registry, samples)
    return "\n".join(lines)


def _templates(registry: HookRegistry, start: str) -> tuple[str, ...]:
    return tuple(name.removeprefix(start) for name in registry if name.startswith(start))


def _tower(registry: HookRegistry, tower: Tower, shown: dict[str, list[int]]) -> Iterator[str]:
    at = ""
    for name, point in registry.items():
        if not belongs(name, tower):
            continue
        words = name.removeprefix(tower.prefix).split(".")
        block = f"{tower.prefix}blocks.{words[1]}"
        if words[0] == "blocks":
            if block not in shown:
                continue
            if block != at:
                at = block
                which = ", ".join(map(str, shown[block]))
                yield f"{tower.prefix}blocks.{{{which}}}: {tower.blocks[shown[block][0]].kind}"
            yield _line(point, name.removeprefix(block + "."), "  ", block)
        else:
            yield _line(point, name, "")
    if tower.unproved:
        yield f"{tower.prefix}blocks: no points; {tower.unproved}"


def _line(point: HookPoint, name: str, indent: str, block: str = "") -> str:
    also = (
        f"  = {', '.join(a.removeprefix(block + '.') for a in point.aliases)}"
        if point.aliases
        else ""
    )
    return f"{indent}{name:<{38 - len(indent)}} [{shape(point)}]{also}"


def shape(point: HookPoint) -> str:
    """A point's axes with their known sizes: ``batch pos head=12 d_head=64``."""
    sizes = point.sizes
    return " ".join(
        f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in point.axes.split()
    )


def _absent(registry: HookRegistry, samples: list[str]) -> Iterator[str]:
    """Why a model, and the first layer of each kind, lack what they lack; a line a reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in registry.absent.items():
        start = next((start for start in samples if name.startswith(start)), "")
        if not start and re.search(r"blocks\.(\d|{i})", name):
            continue
        own = name.removeprefix(start)
        part = own.rpartition(".")[0] or own
        if any(held.startswith(f"{start}{part}.") for held in registry):
            part = own  # the part is there; this is one place of it
        names = reasons.setdefault(reason, [])
        if part not in names:
            names.append(part)
    if reasons:
        yield "absent:"
    for reason, names in reasons.items():
        yield f"  {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}: {reason}"
