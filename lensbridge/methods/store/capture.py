"""ActivationStore: what some layers showed in the last run."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...bridge import TransformerBridge
from ...hooks import HookNotFiredError, HookPoint, InputError, Listener, UnknownPointError
from .extraction import points_of


class ActivationStore:
    """Keeps what layers show, run by run, as copies: a model that writes into its values later changes none.

    What a layer showed last is kept: in a run that passes it twice, the second time; of two runs, the
    second one.

    Args:
        model: A loaded model, or a bridge.
        layers: Places: layer indices (the layer's output), hook points, aliases, or paths of modules (their
            output); one, or several.
        device: Where to keep the copies; None leaves them where they are.
        dtype: Their dtype; the model's own unless given.
    Raises:
        UnknownPointError, AbsentPointError, LayerRangeError: A layer that is not there. No hook is set then.
        InputError: No model, or no layer.

    Attributes:
        bridge: Around the model. Insides of attention (scores, patterns) fire in runs of the bridge alone.

    Example::

        with ActivationStore(model, [0, "model.layers.1.mlp"]) as store:
            model(ids)
        store.get("model.layers.1.mlp")                        # [batch, pos, d_model]
    """

    def __init__(
        self,
        model: nn.Module | TransformerBridge,
        layers: int | str | Sequence[int | str],
        *,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, (nn.Module, TransformerBridge)):
            raise InputError(
                f"an ActivationStore takes a loaded model or a bridge, got {type(model).__name__}"
            )
        self.bridge = model if isinstance(model, TransformerBridge) else TransformerBridge(model)
        self._points = points_of(self.bridge, layers)
        self._device = device
        self._dtype = dtype
        self._listeners: list[Listener] = []
        self._held: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return f"ActivationStore({', '.join(self._points)}; {state})"

    # --- listening -------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether it listens."""
        return bool(self._listeners)

    def enable(self) -> None:
        """Begin to listen; twice is once."""
        if not self._listeners:
            self._listeners = [
                point.add_hook(self._keep, observes=True) for point in self._points.values()
            ]

    def disable(self) -> None:
        """Stop listening. What is held stays."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.remove()

    def clear(self) -> None:
        """Let go of what is held."""
        self._held.clear()

    def __enter__(self) -> ActivationStore:
        self.enable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()
        if error is None and self._held:
            self._check(self._points)

    def _keep(self, shown: Tensor, hook: HookPoint) -> None:
        dtype = self._dtype if shown.is_floating_point() else None
        self._held[str(hook.name)] = shown.detach().to(
            device=shown.device if self._device is None else self._device,
            dtype=dtype or shown.dtype,
            copy=True,
        )

    # --- what it holds ---------------------------------------------------------------------------

    @property
    def layer_names(self) -> list[str]:
        """The layers, by the names they were given; an index by its canonical name."""
        return list(self._points)

    @property
    def activations(self) -> dict[str, Tensor]:
        """What every layer showed, by `layer_names`.

        Raises:
            HookNotFiredError: Some layer showed nothing.
        """
        self._check(self._points)
        return {name: self._held[str(point.name)] for name, point in self._points.items()}

    def get(self, name: str) -> Tensor:
        """What a layer showed.

        Args:
            name: As it was given, or another name of the same place.
        Raises:
            UnknownPointError: It is none of the layers.
            HookNotFiredError: It showed nothing.
        """
        if name not in self._points:
            point = str(next(iter(points_of(self.bridge, name).values())).name)
            same = [own for own, known in self._points.items() if known.name == point]
            if not same:
                raise UnknownPointError(
                    f"{name!r} is not in this store, which has {', '.join(self._points)}"
                )
            name = same[0]
        self._check([name])
        return self._held[str(self._points[name].name)]

    def _check(self, names: Any) -> None:
        silent = [name for name in names if str(self._points[name].name) not in self._held]
        if not silent:
            return
        if self._held:
            why = "the run did not pass there (insides of attention fire in runs of store.bridge alone)"
        else:
            why = "nothing was run" + ("" if self.enabled else " while the store was enabled")
        raise HookNotFiredError(f"{', '.join(silent)} showed nothing: {why}")
