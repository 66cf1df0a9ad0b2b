"""The registry as a tree: ``bridge.blocks[0].attn.q.hook_out`` and a printed outline."""

from __future__ import annotations

from collections.abc import Iterator

from ..hooks import HookPoint, HookRegistry, LayerRangeError


class PartView:
    """One part of a model: its points and its parts, as attributes.

    Args:
        registry: All points.
        name: This part's name, ``"blocks.0.attn"``.
    """

    def __init__(self, registry: HookRegistry, name: str) -> None:
        self._registry = registry
        self._name = name

    def __getattr__(self, attribute: str) -> PartView | HookPoint:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        name = f"{self._name}.{attribute}"
        if name in self._registry:
            return self._registry[name]
        if any(held.startswith(name + ".") for held in self._registry):
            return PartView(self._registry, name)
        raise AttributeError(str(self._registry.missing(name)))

    def __dir__(self) -> list[str]:
        start = self._name + "."
        names = [*self._registry, *self._registry.aliases]
        return sorted(
            {name[len(start) :].split(".")[0] for name in names if name.startswith(start)}
        )

    def __repr__(self) -> str:
        points = [p for n, p in self._registry.items() if n.startswith(self._name + ".")]
        return "\n".join([self._name, *(f"  {point!r}" for point in points)])


class BlocksView:
    """The layers: ``bridge.blocks[0]``, ``len(bridge.blocks)``, iteration."""

    def __init__(self, registry: HookRegistry, count: int) -> None:
        self._registry = registry
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> PartView:
        if not -self._count <= index < self._count:
            raise LayerRangeError(f"layer {index} is not one of this model's {self._count} layers")
        return PartView(self._registry, f"blocks.{index % self._count}")

    def __iter__(self) -> Iterator[PartView]:
        return (self[index] for index in range(self._count))


def outline(registry: HookRegistry, layer: int = 0) -> str:
    """Every point with its axes and aliases, one layer standing for all."""
    lines: list[str] = []
    for name, point in registry.items():
        parts = name.split(".")
        if parts[0] == "blocks" and parts[1] != str(layer):
            continue
        shown = name.replace(f"blocks.{layer}.", "blocks.{i}.")
        names = [alias.replace(f"blocks.{layer}.", "") for alias in point.aliases]
        also = f"  = {', '.join(names)}" if names else ""
        lines.append(f"{shown:<40} [{point.axes}]{also}")
    return "\n".join(lines)
