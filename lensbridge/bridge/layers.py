"""What a model's layers are: their parts, points and kinds."""

from __future__ import annotations

from ..hooks import HookRegistry, InputError
from .architecture import Architecture, Tower
from .view import PartView, blocks_of


class Layers:
    """Looking at the layers of a bridge."""

    architecture: Architecture
    registry: HookRegistry

    def blocks_with(self, part: str, tower: str | None = None) -> list[tuple[int, PartView]]:
        """The layers that have a part: ``blocks_with("attn")`` in a model that mixes several kinds.

        Args:
            part: ``"attn"``, ``"mixer"``, ``"mlp"``, ``"cross_attn"``, ``"mlp.router"``, ``"ln1_post"``...
            tower: Which tower, by the beginning of its names (``"vision_"``); the main one unless given.
        Returns:
            Pairs of index and layer.
        """
        start = f"{self._tower(tower).prefix}blocks"
        return [
            (index, block)
            for index, block in enumerate(blocks_of(self.registry, start))
            if any(name.startswith(f"{start}.{index}.{part}.") for name in self.registry)
        ]

    def block_hooks(self, layer: int, tower: str | None = None) -> list[str]:
        """The points of a layer in execution order.

        Args:
            layer: Its index; negative counts from the end.
            tower: As in `blocks_with`.
        """
        start = self._start(layer, tower)
        return [name for name in self.registry if name.startswith(start)]

    def block_submodules(self, layer: int, tower: str | None = None) -> list[str]:
        """The parts of a layer, parts of parts among them: ``["ln1", "attn", "attn.q", ...]``.

        Args:
            layer: Its index; negative counts from the end.
            tower: As in `blocks_with`.
        """
        start = self._start(layer, tower)
        found: dict[str, None] = {}
        for name in self.block_hooks(layer, tower):
            parts = name.removeprefix(start).split(".")[:-1]
            for count in range(1, len(parts) + 1):
                found[".".join(parts[:count])] = None
        return list(found)

    def layer_types(self, tower: str | None = None) -> list[str]:
        """What each layer is made of: ``"attn + mlp"``, ``"mixer + mlp (experts)"``."""
        return [block.kind for block in self._tower(tower).blocks]

    def _tower(self, prefix: str | None) -> Tower:
        if prefix is None:
            return self.architecture.main
        for tower in self.architecture.towers:
            if tower.prefix == prefix:
                return tower
        known = ", ".join(repr(tower.prefix) for tower in self.architecture.towers)
        raise InputError(f"no tower's names begin with {prefix!r}; there are {known}")

    def _start(self, layer: int, tower: str | None) -> str:
        one = self._tower(tower)
        index = blocks_of(self.registry, f"{one.prefix}blocks").index(layer)
        return f"{one.prefix}blocks.{index}."
