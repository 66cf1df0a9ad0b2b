"""Running the model: forward, caching, hooks, stopping early, starting late."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..hooks import (
    GradientError,
    HookFunction,
    HookPoint,
    HookRegistry,
    InputError,
    LayerRangeError,
    LensError,
    Listener,
    Site,
)
from ..hooks.point import attach, discard
from ..hooks.registry import Selection
from .architecture import Tower
from .cache import ActivationCache, SliceInput, pos_dim, take
from .implementation import is_openable, openable

ReturnType = Literal["logits", "loss", "both", "predictions"]
RETURN_TYPES = ("logits", "loss", "both", "predictions", None)


_NOTHING = nullcontext()
INSIDE_ATTENTION = (".hook_attn_scores", ".hook_pattern", ".hook_rot_q", ".hook_rot_k")


def block_kind(tower: Tower) -> tuple[type, int, bool]:
    """What the layers of a tower return, as the watched run shows; whether that is more than the stream."""
    visits = (
        []
        if tower.seen is None or not tower.blocks
        else tower.seen.visits.get(tower.blocks[0].path, [])
    )
    out = visits[0].output if visits else None
    if not isinstance(out, (tuple, list)):
        return Tensor, 1, False
    return type(out), len(out), any(isinstance(item, Tensor) for item in out[1:])


class _Stopped(Exception):  # noqa: N818 - not an error: it carries the answer out of the model
    def __init__(self, value: Tensor) -> None:
        super().__init__("the run was stopped on purpose")
        self.value = value


class Stack:
    """The model's layers as something a run can leave early or enter late.

    Args:
        model: The callable model (compiled or not).
        inner: The model itself.
        registry: Its points.
        tower: The tower whose layers they are.
    """

    def __init__(
        self, model: nn.Module, inner: nn.Module, registry: HookRegistry, tower: Tower
    ) -> None:
        self.model = model
        self.inner = inner
        self.registry = registry
        self.name = f"{tower.prefix}blocks"
        self.blocks = [inner.get_submodule(block.path) for block in tower.blocks]
        self.block_kind = block_kind(tower)

    def layer(self, layer: int, what: str) -> int:
        """A layer index, negative ones counted from the end; the number of layers means "behind the last"."""
        count = len(self.blocks)
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise InputError(f"{what} must be an int, got {type(layer).__name__}: {layer!r}")
        if not -count <= layer <= count:
            raise LayerRangeError(
                f"{what}={layer} is out of range: this model has {count} layers (use {-count} to {count})"
            )
        return layer + count if layer < 0 else layer

    def call(self, kwargs: dict[str, Any]) -> Any:
        """Run the whole model."""
        out = self._run(self.model, kwargs)
        self.registry.note_run()
        return out

    def _run(self, fn: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        registry = self.registry
        if registry.running and registry.unsettled.spans:
            raise LensError(
                "the bridge was run from inside a hook at a place that is being watched (inside attention, "
                "or after an edit of hook_resid_mid); collect what you need before the outer run"
            )
        registry.begin_run()
        try:
            with self._conditions():
                return fn(**kwargs)
        finally:
            registry.end_run()

    def generate(self, kwargs: dict[str, Any]) -> Any:
        """Run Hugging Face's ``generate``."""
        out = self._run(self.inner.generate, kwargs)  # type: ignore[arg-type]
        self.registry.note_run()
        return out

    def call_until(self, layer: int, kwargs: dict[str, Any]) -> Tensor:
        """Run up to a layer; gives the residual stream entering it, [batch, pos, d_model]."""
        kwargs = {"use_cache": False, **kwargs} if takes_use_cache(self.inner) else kwargs
        last = layer == len(self.blocks)
        name = f"{self.name}.{layer - 1}.hook_out" if last else f"{self.name}.{layer}.hook_in"
        point = self.registry[name]

        def stop(tensor: Tensor, hook: HookPoint) -> None:
            raise _Stopped(tensor)

        listener = Listener(stop, point, observes=True)
        # Before block `layer` nothing of it is heard; behind the last block everything of it is.
        attach([listener], prepend=not last)
        try:
            self._run(self.model, kwargs)
        except _Stopped as stopped:
            self.registry.note_run(point)
            return stopped.value
        finally:
            discard([listener])
        raise LensError(f"the model ran to its end without passing {name}")

    @contextmanager
    def entered_at(self, layer: int, residual: Tensor) -> Iterator[None]:
        """Let the next runs skip the layers before `layer` and enter it with `residual`.

        Skipped layers run no code and fire no points; masks, positions and everything else the model prepares
        outside its layers are its own.
        """
        if layer == 0:
            listener = Listener(
                lambda tensor, hook: residual, self.registry[f"{self.name}.0.hook_in"]
            )
            attach([listener], prepend=True)
            try:
                yield
            finally:
                discard([listener])
            return
        kind, length, hands_on = self.block_kind
        if hands_on:
            raise InputError(
                "start_at_layer: the layers of this model hand on more than the residual stream (a position "
                "bias, say), so it cannot be entered late"
            )

        def skip(hidden: Any = None, *args: Any, **kwargs: Any) -> Any:
            if kind is Tensor:
                return residual
            return kind([residual, *[None] * (length - 1)])

        # A module that is several layers is skipped as often as it stands before the layer.
        left = Counter(id(block) for block in self.blocks[:layer])
        skipped = list({id(block): block for block in self.blocks[:layer]}.values())
        own = [block.__dict__.get("forward") for block in skipped]

        def counted(block: nn.Module, forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                if left[id(block)]:
                    left[id(block)] -= 1
                    return skip(*args, **kwargs)
                return (
                    type(block).forward(block, *args, **kwargs)
                    if forward is None
                    else forward(*args, **kwargs)
                )

            return run

        again = Counter(id(block) for block in self.blocks[layer:])
        muted = self._mute(layer)
        try:
            for block, forward in zip(skipped, own, strict=True):
                block.__dict__["forward"] = counted(block, forward) if again[id(block)] else skip
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.__dict__["forward"] = forward
            for site in muted:
                site.mute(frozenset())

    def _mute(self, layer: int) -> list[Site]:
        """Silence the points of skipped layers, and of positions that are added to nothing."""
        before = [f"{self.name}.{i}" for i in range(layer)] + [
            self.name.replace("blocks", "pos_embed")
        ]
        names = [f"{part}.hook_{side}" for part in before for side in ("in", "out")]
        points = frozenset(self.registry[name] for name in names if name in self.registry)
        sites = {id(x): x for point in points for x in point.owners if isinstance(x, Site)}
        for site in sites.values():
            site.mute(points)
        return list(sites.values())

    @property
    def _is_compiled(self) -> bool:
        return self.model is not self.inner or any(
            module._compiled_call_impl is not None for module in (self.inner, *self.blocks)
        )

    def _uncompiled(self) -> Any:
        """Compiled code does not see hooks that came after its first call, and says nothing about it."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else _NOTHING

    def _conditions(self) -> Any:
        """What must hold around a run so that every listened-to point can fire."""
        live = self.registry.live
        if not live:
            return _NOTHING
        compiled = self._is_compiled
        closed = not is_openable(self.inner) and any(
            str(p.name).endswith(INSIDE_ATTENTION) for p in live
        )
        if not (compiled or closed):
            return _NOTHING
        conditions = ExitStack()
        if compiled:
            conditions.enter_context(self._uncompiled())
        if closed:
            conditions.enter_context(openable(self.inner))
        return conditions


def takes_use_cache(model: nn.Module) -> bool:
    """Whether the model keeps keys and values between calls unless told not to."""
    return bool(getattr(getattr(model, "config", None), "use_cache", False))


# --- what comes back --------------------------------------------------------------------------------------


def logits_of(out: Any, model: nn.Module) -> Float[Tensor, "*batch d_vocab"]:
    """The logits of a Hugging Face output.

    Raises:
        InputError: The model has no head.
    """
    if isinstance(out, tuple):
        return next(item for item in out if isinstance(item, Tensor) and item.dim() > 0)
    logits = next(
        (x for n in ("logits", "logits_per_image") if (x := getattr(out, n, None)) is not None),
        None,
    )
    if logits is None:
        raise InputError(
            f"{type(model).__name__} returns no logits ({', '.join(out.keys())}); pass return_type=None "
            "(to run_with_cache, too), or load the model with its head"
        )
    return logits


def lm_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Tensor | None = None,
    *,
    per_token: bool = False,
) -> Tensor:
    """Cross-entropy of each next token, in nats.

    Args:
        logits: The model's logits.
        tokens: The ids it was run on.
        mask: 1 at real tokens; a prediction counts only between two real ones.
        per_token: One loss a position, [batch, pos - 1] (0 where masked), instead of the mean.
    """
    ahead = tokens[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ahead, reduction="none")
    if mask is None:
        return losses if per_token else losses.mean()
    real = (mask[:, 1:] * mask[:, :-1]).to(losses)
    losses = losses * real
    return losses if per_token else losses.sum() / real.sum()


# --- caching ----------------------------------------------------------------------------------------------


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
        self._versions: list[tuple[str, Tensor, int]] = []

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
        self._versions.append((name, value, value._version))

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

    def check_unchanged(self) -> None:
        """Refuse to hand out values the model overwrote after they were recorded."""
        spoilt = [name for name, value, version in self._versions if value._version != version]
        if spoilt:
            raise LensError(
                f"the model changed {spoilt[0]} in place after it was recorded; pass pos_slice or device to "
                "have copies taken, and please report the architecture"
            )


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
    recorder.check_unchanged()
    return out, ActivationCache(recorder.values, registry)
