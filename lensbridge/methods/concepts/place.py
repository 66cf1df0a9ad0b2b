"""Where in which model an autoencoder's activations come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import HookPoint, InputError, LayerRangeError
from ..split_points import ModelWithSplitPoints
from ..splitters import SplitterForGeneration

Source = SplitterForGeneration | ModelWithSplitPoints | TransformerBridge


class Place:
    """A hook point of a model, and how wide it is.

    Args:
        source: A splitter or a bridge.
        split_point: Which point: needed for a bridge, and where a splitter has several.
    Attributes:
        key: What the splitter calls it.
        name: The hook point.
        width: How many numbers it shows of a token; heads are laid side by side.
    Raises:
        TypeError: Neither a splitter nor a bridge.
        InputError: It is not clear which point is meant, or it is not the splitter's.
        UnknownPointError, AbsentPointError, LayerRangeError: A point that is not there.
    """

    def __init__(self, source: Source, split_point: int | str | None = None) -> None:
        self.source = source
        points = _points(source, split_point)
        if split_point is None and len(points) > 1:
            raise InputError(f"say which split_point: {', '.join(points)}")
        key = next(iter(points)) if split_point is None else str(split_point)
        if key not in points:
            # By another of its names.
            wanted = self.named(self.bridge, split_point)
            found = [own for own, name in points.items() if name == wanted]
            if not found:
                raise InputError(
                    f"{split_point!r} is {wanted}, and the splitter is split at {', '.join(points.values())}"
                )
            key = found[0]
        self.key, self.name = key, points[key]
        self.width = self._width()

    @staticmethod
    def named(bridge: TransformerBridge, split_point: int | str | None) -> str:
        """The hook point that a bridge knows by some name.

        Raises:
            UnknownPointError, AbsentPointError, LayerRangeError: It knows none.
        """
        return next(iter(_points(bridge, split_point).values()))

    @property
    def bridge(self) -> TransformerBridge:
        """The model."""
        return self.source if isinstance(self.source, TransformerBridge) else self.source.bridge

    @property
    def tokenizer(self) -> Any:
        """What texts are read with."""
        return self.source.tokenizer

    @property
    def splitter(self) -> SplitterForGeneration | ModelWithSplitPoints:
        """The splitter that was given, or one made for the bridge.

        Raises:
            InputError: The bridge has no tokenizer.
        """
        if isinstance(self.source, TransformerBridge):
            return ModelWithSplitPoints(self.source, split_points=[self.key])
        return self.source

    @property
    def among(self) -> str | None:
        """Which of the splitter's points it is; None where the splitter has no more than one."""
        return None if isinstance(self.source, SplitterForGeneration) else self.key

    def _width(self) -> int:
        if isinstance(self.source, TransformerBridge):
            shape = self._shown()
        else:
            made = self.source.get_latent_shape()
            shape = made[self.key] if isinstance(made, dict) else made
        if len(shape) < 3:
            raise InputError(
                f"{self.name} shows {list(shape)}, which has no row for each token ([batch, pos, d])"
            )
        return int(torch.Size(shape[2:]).numel())

    def _shown(self) -> torch.Size:
        """What the point shows of two tokens."""
        shapes = []

        def look(shown: Tensor, hook: HookPoint) -> None:
            shapes.append(shown.shape)

        ids = torch.zeros(1, 2, dtype=torch.long, device=self.bridge.device)
        with torch.no_grad():
            self.bridge.run_with_hooks(ids, return_type=None, fwd_hooks=[(self.name, look)])
        return shapes[0]


def _layer(bridge: TransformerBridge, layer: int) -> str:
    # As splitters read layers, with their errors.
    n = len(bridge.architecture.blocks)
    if isinstance(layer, bool) or not -n <= layer < n:
        raise LayerRangeError(f"layer {layer} is not one of this model's {n} (0 to {n - 1})")
    return f"{bridge.registry.layers}.{layer % n}.hook_out"


def _points(source: Any, split_point: int | str | None) -> dict[str, str]:
    if isinstance(source, SplitterForGeneration):
        return {source.split_point: source.split_point}
    if isinstance(source, ModelWithSplitPoints):
        return source.split_points
    if not isinstance(source, TransformerBridge):
        raise TypeError(f"a splitter or a bridge is needed, got {type(source).__name__}")
    if split_point is None:
        raise InputError("of a bridge, say where: split_point= a layer or a hook point")
    if isinstance(split_point, int):
        split_point = _layer(source, split_point)
    return {str(split_point): str(source.registry[split_point].name)}
