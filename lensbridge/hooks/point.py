"""HookPoint: a name for a place, and the functions that listen there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import GradientError, HookValueError, InputError, LensError
from .step import Clock, Step

HookFunction = Callable[[Tensor, "HookPoint"], Any]
"""``fn(tensor, hook) -> Tensor | None``: None leaves the value, a tensor replaces it."""


@runtime_checkable
class Owner(Protocol):
    """What a point tells when somebody starts or stops listening."""

    def refresh(self) -> None:
        """Attach or detach whatever the listening points need."""


class Listener:
    """One function at one point, and how to take it away again.

    Attributes:
        fn: The function, called ``fn(tensor, hook)``.
        point: Where it listens.
        direction: ``"fwd"`` or ``"bwd"``.
        level: Depth of the scope that added it; 0 outside any scope.
        is_permanent: Survives ``reset_hooks()``.
        observes: Promises neither to return nor to change anything, which saves the checks.
        fired: Whether it was called since it was added.
        cancelled: Removed by name; gradient hooks already on a graph then stay quiet too.
    """

    __slots__ = (
        "cancelled",
        "direction",
        "fired",
        "fn",
        "is_permanent",
        "level",
        "observes",
        "point",
    )

    def __init__(
        self,
        fn: HookFunction,
        point: HookPoint,
        direction: str = "fwd",
        *,
        level: int = 0,
        is_permanent: bool = False,
        observes: bool = False,
    ) -> None:
        self.fn = fn
        self.point = point
        self.direction = direction
        self.level = level
        self.is_permanent = is_permanent
        self.observes = observes
        self.fired = False
        self.cancelled = False

    def remove(self) -> None:
        """Stop listening; doing it twice is harmless."""
        self.cancelled = True
        discard([self])

    def __repr__(self) -> str:
        return f"Listener({describe(self.fn)} at {self.point.name!r}, {self.direction})"


def describe(fn: HookFunction) -> str:
    """Name a hook function the way its author would look for it."""
    while isinstance(fn, partial):
        fn = fn.func
    code = getattr(fn, "__code__", None)
    name = getattr(fn, "__qualname__", type(fn).__name__)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


class HookPoint(nn.Module):
    """A named place in a model: listeners see its tensor and may replace it.

    The bridge's points stand for places in a Hugging Face model and fire when the model gets there. A
    point is also an identity module: put one in any ``nn.Module``, call it on a tensor, and it is the same
    thing (``HookRegistry.from_module`` names and collects such points).

    Args:
        name: Canonical name, ``"blocks.0.hook_out"``.
        aliases: Other names of the same point.
        axes: What the tensor's dimensions are: ``"batch pos head d_head"``.
        is_default: Whether "every point" includes this one (points that multiply memory do not).
    """

    def __init__(
        self,
        name: str | None = None,
        aliases: tuple[str, ...] = (),
        *,
        axes: str = "",
        is_default: bool = True,
    ) -> None:
        super().__init__()
        # Straight into __dict__: nn.Module.__setattr__ costs more than everything else here.
        self.__dict__.update(
            name=name,
            aliases=aliases,
            axes=axes,
            is_default=is_default,
            ctx={},
            fwd=(),
            bwd=(),
            owners=(),
            live=set(),
            n_edits=0,
            is_volatile=False,
            is_index=False,
            sizes={},
            clock=None,
        )

    name: str | None
    aliases: tuple[str, ...]
    axes: str
    is_default: bool
    ctx: dict[str, Any]
    fwd: tuple[Listener, ...]
    bwd: tuple[Listener, ...]
    owners: tuple[Owner, ...]
    live: set[HookPoint]  # the registry's set of points somebody listens to
    is_volatile: (
        bool  # the model goes on to change the tensor in place: keep a copy, not a reference
    )
    is_index: bool  # ids, positions, choices: whole numbers, without a gradient
    sizes: dict[str, int]  # of the axes whose size does not depend on the input
    clock: Clock | None  # the registry's
    n_edits: int  # listeners that may change the value or need its gradient

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r}, [{self.axes}])"

    def __getstate__(self) -> dict[str, Any]:
        # Listeners belong to whoever added them here, not to a copy or a saved file.
        return {
            **self.__dict__,
            "fwd": (),
            "bwd": (),
            "ctx": {},
            "owners": (),
            "live": set(),
            "n_edits": 0,
            "clock": None,
        }

    # --- listening -------------------------------------------------------------------------------

    def add_hook(
        self,
        fn: Any,
        dir: str = "fwd",
        *,
        is_permanent: bool = False,
        level: int = 0,
        prepend: bool = False,
        observes: bool = False,
    ) -> Listener:
        """Listen here until removed.

        Args:
            fn: ``fn(tensor, hook)``; for ``dir="bwd"`` the tensor is the gradient.
            dir: ``"fwd"`` or ``"bwd"``.
            is_permanent: Keep through ``reset_hooks()``.
            level: Scope depth, for ``remove_hooks(level=)``.
            prepend: Be called before the listeners already here.
            observes: ``fn`` only looks: whatever it returns is ignored.
        Returns:
            The listener; ``listener.remove()`` takes it away.
        Raises:
            InputError: ``fn`` is not callable or ``dir`` is unknown.
        """
        if not callable(fn):
            raise InputError(f"hook at {self.name!r} must be callable, got {type(fn).__name__}")
        if dir not in ("fwd", "bwd"):
            raise InputError(f"dir must be 'fwd' or 'bwd', got {dir!r} at {self.name!r}")
        listener = Listener(
            fn, self, dir, level=level, is_permanent=is_permanent, observes=observes
        )
        attach([listener], prepend=prepend)
        return listener

    @contextmanager
    def listening(
        self, fn: HookFunction, dir: str = "fwd", *, observes: bool = True
    ) -> Iterator[Listener]:
        """Have one function look (or, unless it only ``observes``, write) here during a ``with`` block.

        Gradients of a graph that was made inside are told after the block too, as long as the graph lives.
        """
        listener = self.add_hook(fn, dir, observes=observes)
        try:
            yield listener
        finally:
            discard([listener])

    def add_perma_hook(self, fn: Any, dir: str = "fwd") -> Listener:
        """Listen here through every ``reset_hooks()``."""
        return self.add_hook(fn, dir, is_permanent=True)

    def remove_hooks(
        self,
        dir: str = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove listeners.

        Args:
            dir: Which direction, or ``"both"``.
            including_permanent: Also the permanent ones.
            level: Only those of this scope depth.
        """
        going = self._held(dir, including_permanent, level)
        for listener in going:
            listener.cancelled = True
        discard(going)

    def has_hooks(
        self,
        dir: str = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Whether anybody listens here."""
        return bool(self._held(dir, including_permanent, level))

    def _held(self, dir: str, including_permanent: bool, level: int | None) -> list[Listener]:
        if dir not in ("fwd", "bwd", "both"):
            raise InputError(f"dir must be 'fwd', 'bwd' or 'both', got {dir!r} at {self.name!r}")
        return [
            held
            for held in (*self.fwd, *self.bwd)
            if dir in (held.direction, "both")
            and (including_permanent or not held.is_permanent)
            and (level is None or held.level == level)
        ]

    def clear_context(self) -> None:
        """Empty ``ctx``, the dictionary hook functions may keep notes in."""
        self.ctx.clear()

    def layer(self) -> int:
        """Layer index from the name: 3 for ``"blocks.3.attn.hook_out"``."""
        for part in (self.name or "").split("."):
            if part.isdigit():
                return int(part)
        raise InputError(f"{self.name!r} is not inside a layer")

    @property
    def step(self) -> Step:
        """Prefill or decode, which step of a generation, which positions: of the run in progress.

        Raises:
            LensError: No run is in progress that says.
        """
        if self.clock is None:
            raise LensError(f"{self.name!r} belongs to no registry, so nobody tells it the step")
        return self.clock.of(str(self.name))

    # --- firing ----------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Identity, as heard and edited by the listeners."""
        if not (self.fwd or self.bwd):
            return x
        value = self.fire(x)
        return x if value is None else value

    def fire(self, tensor: Tensor) -> Tensor | None:
        """Show a tensor to the listeners.

        Args:
            tensor: The value at this place.
        Returns:
            The value to go on with, or None when nobody wrote (the usual case, which then costs nothing).
        Raises:
            HookValueError: A function returned something unfit.
            GradientError: A backward listener is here and no gradient can come.
        """
        state = self.__dict__
        value, written = tensor, False
        for listener in state["fwd"]:
            listener.fired = True
            if listener.observes:
                listener.fn(value, self)
                continue
            version = -1 if value.is_inference() else value._version
            new = listener.fn(value, self)
            if new is not None:
                value, written = self._checked(new, value, listener), True
            elif version < 0 or value._version != version:
                written = (
                    True  # edited in place; an inference tensor cannot tell, so it may have been
                )
        if state["bwd"]:
            value, written = self._arm_backward(value), True
        return value if written else None

    def _checked(self, new: Any, old: Tensor, listener: Listener) -> Tensor:
        if not isinstance(new, Tensor):
            raise HookValueError(
                f"hook {describe(listener.fn)} at {self.name!r} returned {type(new).__name__}; "
                "return a tensor to replace the value, or None to leave it"
            )
        if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
            raise HookValueError(
                f"hook {describe(listener.fn)} at {self.name!r} returned "
                f"{list(new.shape)} {new.dtype} on {new.device}, but the value there is "
                f"{list(old.shape)} {old.dtype} on {old.device}"
            )
        return new

    def _arm_backward(self, value: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or value.is_inference():
            raise GradientError(
                f"backward hook at {self.name!r}: gradients are disabled; "
                "leave torch.no_grad() / torch.inference_mode() to use backward hooks"
            )
        if not (value.is_floating_point() or value.is_complex()):
            raise GradientError(
                f"backward hook at {self.name!r}: its tensor is {value.dtype}, which carries no gradient"
            )
        if not value.requires_grad:
            # A frozen model: start the graph here, so that the gradient exists to be seen.
            value = value.detach().requires_grad_()
        elif value.is_leaf:
            # A hook on a leaf would outlive the run on somebody else's tensor.
            value = value.view_as(value)
        for listener in self.bwd:
            listener.fired = True
            value.register_hook(partial(self._on_gradient, listener))
        return value

    def _on_gradient(self, listener: Listener, grad: Tensor) -> Tensor | None:
        if listener.cancelled:
            return None
        listener.fired = True
        new = listener.fn(grad, self)
        if new is None or listener.observes:
            return None
        return self._checked(new, grad, listener)


def attach(listeners: Iterable[Listener], *, prepend: bool = False) -> None:
    """Add ready-made listeners at their points, telling each owner once."""
    owners: set[Owner] = set()
    for listener in listeners:
        point, direction = listener.point, listener.direction
        state = point.__dict__
        held = state[direction]
        state[direction] = (listener, *held) if prepend else (*held, listener)
        if direction == "bwd" or not listener.observes:
            state["n_edits"] += 1
        state["live"].add(point)
        # Also when somebody listens here already: an editor asks more of a site than an observer.
        owners.update(state["owners"])
    for owner in owners:
        owner.refresh()


def discard(listeners: Iterable[Listener]) -> None:
    """Take listeners away (those of them that are still there), telling each owner once."""
    owners: set[Owner] = set()
    for listener in listeners:
        point, direction = listener.point, listener.direction
        state = point.__dict__
        held = state[direction]
        if listener not in held:
            continue
        state[direction] = tuple([other for other in held if other is not listener])
        if direction == "bwd" or not listener.observes:
            state["n_edits"] -= 1
        if not (state["fwd"] or state["bwd"]):
            state["live"].discard(point)
        owners.update(state["owners"])
    for owner in owners:
        owner.refresh()
