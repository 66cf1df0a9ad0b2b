"""Recording: hook functions that keep what points show, and the runs around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import GradientError, HookFunction, HookPoint, HookRegistry, InputError, LensError
from ..hooks.registry import Selection
from .cache import ActivationCache
from .inputs import Inputs
from .slicing import SliceInput, pos_dim, take


class Recorder:
    """Stores what points show, as they show it.

    Args:
        registry: The points of the model.
        points: Those to record.
        device: Where to keep the tensors; None leaves them where they are.
        pos_slice: Positions to keep.
        copies: Whether values must be copied because somebody may edit them in place.
    """

    def __init__(
        self,
        registry: HookRegistry,
        points: list[HookPoint],
        *,
        device: torch.device | str | None = None,
        pos_slice: SliceInput = None,
        copies: bool = False,
    ) -> None:
        self.registry = registry
        self.points = points
        self.device = device
        self.pos_slice = pos_slice
        self.copies = copies
        self.values: dict[str, Tensor] = {}
        self.versions: list[tuple[str, Tensor, int]] = []

    @property
    def store(self) -> HookFunction:
        """The hook function; the plainest one that does the job."""
        if self.device is not None or self.pos_slice is not None or self.copies:
            return self._store
        # Inference tensors have no version to watch.
        return self._store_untracked if torch.is_inference_mode_enabled() else self._store_plain

    def _store_untracked(self, tensor: Tensor, hook: HookPoint) -> None:
        self.values[hook.name] = tensor.clone() if hook.is_volatile else tensor  # type: ignore[index]

    def _store_plain(self, tensor: Tensor, hook: HookPoint) -> None:
        name: str = hook.name  # type: ignore[assignment]
        value = tensor.detach() if tensor.requires_grad else tensor
        if hook.is_volatile:
            value = value.clone()
        self.values[name] = value
        self.versions.append((name, value, value._version))

    def _store(self, tensor: Tensor, hook: HookPoint) -> None:
        value = tensor.detach()
        if self.pos_slice is not None:
            value = take(value, self.pos_slice, pos_dim(hook.axes))
        moved = value if self.device is None else value.to(self.device)
        shares = moved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        self.values[str(hook.name)] = moved.clone() if shares else moved

    def store_grad(self, grad: Tensor, hook: HookPoint) -> None:
        """The hook function for gradients."""
        value = grad if self.pos_slice is None else take(grad, self.pos_slice, pos_dim(hook.axes))
        value = value.detach().clone()
        self.values[f"{hook.name}_grad"] = value if self.device is None else value.to(self.device)

    def check_gradients(self, points: list[HookPoint]) -> None:
        """Refuse to hand out a cache without a gradient that was asked for by name."""
        for point in points:
            if f"{point.name}_grad" not in self.values and not point.is_index:
                raise GradientError(
                    f"no gradient reached {point.name}: the loss does not depend on it, or goes round it "
                    "because another point was listened to for gradients (hook_q_input goes round q.hook_in)"
                )


def check_versions(seen: list[tuple[str, Tensor, int]]) -> None:
    """Refuse to hand out values the model overwrote after they were recorded."""
    spoilt = [name for name, value, version in seen if value._version != version]
    if spoilt:
        raise LensError(
            f"the model changed {spoilt[0]} in place after it was recorded; pass pos_slice or device to "
            "have copies taken, and please report the architecture"
        )


def whereabouts(
    inputs: Inputs, pos_slice: SliceInput, device: torch.device | str | None
) -> tuple[Tensor | None, Tensor | None]:
    """Tokens and mask at the positions a cache keeps, beside its tensors; None where they are not known."""
    tokens, mask = inputs.tokens, inputs.mask
    if tokens is not None and mask is not None:
        mask = mask[:, -tokens.shape[1] :]  # a mask may cover a past as well
    kept = []
    for value in (tokens, mask):
        try:
            at = None if value is None else take(value, pos_slice, 1)
        except InputError:
            at = None  # the points that were kept have more positions than the text has tokens
        kept.append(at if at is None or device is None else at.to(device))
    return kept[0], kept[1]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Leave the parameters out of the graph, so that a backward pass touches no ``.grad``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def is_explicit(names_filter: Selection) -> bool:
    """Whether a filter names its points one by one, so that each of them must fire."""
    items = [names_filter] if isinstance(names_filter, str) else names_filter
    return isinstance(items, (list, tuple, set)) and all(
        isinstance(item, str) and not set("*?[") & set(item) for item in items
    )


def record_run(
    registry: HookRegistry,
    run: Callable[[], Any],
    *,
    names_filter: Selection = None,
    device: torch.device | str | None = None,
    pos_slice: SliceInput = None,
    backward: Callable[[Any], Tensor] | None = None,
) -> tuple[Any, ActivationCache]:
    """Run with recording listeners attached.

    Args:
        registry: The model's points.
        run: Runs the model.
        names_filter: What to record.
        device: Where to keep the tensors.
        pos_slice: Positions to keep.
        backward: Picks the scalar to differentiate from what ``run`` returned; gradients are recorded too.
    """
    points = (
        []
        if isinstance(names_filter, (list, tuple)) and not names_filter
        else registry.select(names_filter)
    )
    edited = any(not listener.observes for point in registry.live for listener in point.fwd)
    recorder = Recorder(registry, points, device=device, pos_slice=pos_slice, copies=edited)
    with registry.hooks() as scope:
        scope.observe(points, recorder.store, must_fire=is_explicit(names_filter))
        if backward is not None:
            scope.observe([p for p in points if not p.is_index], recorder.store_grad, "bwd")
        out = run()
        if backward is not None:
            backward(out).backward()
            if is_explicit(names_filter):
                recorder.check_gradients(points)
    check_versions(recorder.versions)
    return out, ActivationCache(recorder.values, registry)
