"""Running the model: forward, caching, hooks, stopping early, starting late."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..hooks import (
    HookPoint,
    HookRegistry,
    InputError,
    LayerRangeError,
    LensError,
    Listener,
    Site,
)
from ..hooks.point import attach, discard
from .architecture import Architecture, Tower
from .implementation import is_openable, openable
from .past import whole_past, with_copied_past
from .steps import Steps, other_steps, plain_step

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
        architecture: Its towers; the layers are those of the main one.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: nn.Module,
        registry: HookRegistry,
        architecture: Architecture,
    ) -> None:
        tower = architecture.main
        self.model = model
        self.inner = inner
        self.registry = registry
        self.architecture = architecture
        self._has_warned = False
        self._runs = threading.local()
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
        clock, level = registry.clock, self.level()
        # Of a run in another thread (a stream that waits) there is nothing to put back: it tells anew.
        outer = (clock.main, clock.others) if level else (None, {})
        self._runs.level = level + 1
        registry.begin_run()
        try:
            if registry.live:
                step = plain_step(kwargs, self.architecture)
                clock.tell(step, other_steps(kwargs, self.architecture, step))
            with self._conditions(), whole_past(kwargs):
                return fn(**kwargs)
        finally:
            self._runs.level = level
            registry.end_run()
            clock.tell(*outer)

    def level(self) -> int:
        """How many runs of the model this thread has in progress."""
        return getattr(self._runs, "level", 0)

    @cached_property
    def loops(self) -> dict[str, Any]:
        """The modules that can generate: the model, or a language model inside it."""
        return {
            path: module
            for path, module in self.inner.named_modules()
            if callable(getattr(module, "generate", None))
            and hasattr(module, "_update_model_kwargs_for_generation")
        }

    def generate(
        self,
        kwargs: dict[str, Any],
        steps: Steps | None = None,
        then: Callable[[Any], None] | None = None,
    ) -> Any:
        """Run Hugging Face's ``generate``.

        Args:
            kwargs: Its keywords.
            steps: Tells listeners where each pass is.
            then: Given what it returned, while the run still lasts.
        """

        def go(**kwargs: Any) -> Any:
            out = self.inner.generate(**kwargs)  # type: ignore[operator]
            if then is not None:
                then(out)
            return out

        compiles = bool(self.registry.live) and compiles_itself(self.inner, kwargs)
        with (
            nullcontext() if steps is None else steps.following(),
            self._uncompiled() if compiles else _NOTHING,
        ):
            out = self._run(go, kwargs)
        self.registry.note_run()
        return out

    def call_until(self, layer: int, kwargs: dict[str, Any]) -> Tensor:
        """Run up to a layer; gives the residual stream entering it, [batch, pos, d_model]."""
        kwargs = {"use_cache": False, **kwargs} if takes_use_cache(self.inner) else kwargs
        kwargs = with_copied_past(kwargs)  # the layers behind would never get their part
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
        # Behind the last layer nobody asks for it.
        if hands_on and layer < len(self.blocks):
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
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the model is compiled, and compiled code passes hooks by in silence: runs with hooks "
                "set are run eagerly (runs without stay compiled; this is said once)",
                stacklevel=2,
            )
        return torch.compiler.set_stance("force_eager")

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


def compiles_itself(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether ``generate`` may compile the model without being asked: it does so for caches of fixed size."""
    config = kwargs.get("generation_config")
    own = getattr(model, "generation_config", None)

    def set_to(name: str) -> Any:
        found = (kwargs.get(name), getattr(config, name, None), getattr(own, name, None))
        return next((value for value in found if value is not None), None)

    if set_to("disable_compile"):
        return False
    past = next((kwargs[n] for n in ("past_key_values", "cache_params") if kwargs.get(n)), None)
    fixed = set_to("cache_implementation") or getattr(past, "is_compileable", False)
    return set_to("compile_config") is not None or (bool(fixed) and model.device.type != "cpu")


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
            f"{type(model).__name__} returns no logits ({', '.join(out.keys())}); load the model with its "
            "head, or run it for its activations alone, with return_type=None (run_with_cache takes that too)"
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
