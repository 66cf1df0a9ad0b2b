"""Reading places of a model: what they are called, and runs that end behind the last of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..bridge import TransformerBridge
from ..hooks import (
    HookNotFiredError,
    HookPoint,
    InputError,
    LayerRangeError,
    UnknownPointError,
)


class _Enough(Exception):  # noqa: N818 - not an error: it ends a run that has shown all it was run for
    pass


def point_at(place: Any, bridge: TransformerBridge, what: str = "split point") -> HookPoint:
    """The hook point behind a place.

    Args:
        place: A layer's index (its output; negative from the end), a hook point, or the path of a module (its
            output).
        bridge: The model.
        what: What the place is called in messages.
    Raises:
        UnknownPointError, AbsentPointError, LayerRangeError: It is not there.
        InputError: No such thing.
    """
    blocks = bridge.architecture.blocks
    if isinstance(place, int) and not isinstance(place, bool):
        if not blocks:
            raise LayerRangeError(
                f"layer {place}: the layers of {type(bridge.original_model).__name__} are not known as "
                "such; name a hook point or a module's path"
            )
        if not -len(blocks) <= place < len(blocks):
            raise LayerRangeError(
                f"layer {place} is not one of this model's {len(blocks)} (0 to {len(blocks) - 1})"
            )
        return bridge.registry[f"{bridge.registry.layers}.{place % len(blocks)}.hook_out"]
    if not isinstance(place, str):
        raise InputError(f"a {what} is a layer, a hook point or a module's path, got {place!r}")
    paths = {block.path: index for index, block in enumerate(blocks)}
    if place in paths:
        return bridge.registry[f"{bridge.registry.layers}.{paths[place]}.hook_out"]
    try:
        return bridge.registry[place]
    except UnknownPointError:
        if place not in dict(bridge.unwrapped_model.named_modules()):
            raise
        return bridge.registry[f"raw:{place}.hook_out"]


def read_points(
    bridge: TransformerBridge,
    points: Iterable[HookPoint],
    take: Callable[[Tensor, HookPoint], Tensor],
    run: Callable[[], Any],
    *,
    to_end: bool = False,
) -> tuple[dict[str, Tensor], Any]:
    """Run a model until every point was passed. Nothing is differentiated.

    Args:
        bridge: The model.
        points: Where to look.
        take: What to keep of what a point shows the first time. It copies: some models write into it later.
        run: Runs the bridge.
        to_end: Run on to the end.
    Returns:
        What was taken, by the point's name, and what ``run`` returned; None where it did not come to its end.
    Raises:
        HookNotFiredError: The model ran to its end without passing one of the points.
    """
    wanted = {str(point.name): point for point in points}
    found: dict[str, Tensor] = {}

    def keep(shown: Tensor, hook: HookPoint) -> None:
        name = str(hook.name)
        if name not in found:
            found[name] = take(shown.detach(), hook)
        if len(found) == len(wanted) and not to_end:
            raise _Enough(name)

    out, last = None, None
    with ExitStack() as listening, torch.no_grad():
        for point in wanted.values():
            listening.enter_context(point.listening(keep))
        try:
            out = run()
        except _Enough as enough:
            last = wanted[enough.args[0]]
    if last is not None:
        # Of hooks that others have set, those behind here owe nothing. Where a place comes in a run is
        # known of canonical names alone.
        registry = bridge.registry
        registry.note_run(last if last.name in registry else next(iter(registry.values())))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise HookNotFiredError(
            f"the model ran to its end without passing {', '.join(missing)}: there is nothing to show"
        )
    return found, out


def takes_mask(model: nn.Module) -> bool:
    """Whether a model can be told what is padding; wrappers that hand on all they get say nothing of ids."""
    taken = inspect.signature(type(model).forward).parameters
    return "attention_mask" in taken or "input_ids" not in taken


def pad_id_of(bridge: TransformerBridge, tokenizer: Any) -> int:
    """What to fill up with: models that look for a text's end go by the token in their configuration."""
    config: Any = getattr(bridge.original_model, "config", None)
    d_vocab = bridge.cfg.d_vocab
    # Llama's says -1, and tokenizers get tokens that no embedding was made for.
    known = range(2**31 if d_vocab is None else d_vocab)
    pads = (getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), 0)
    return next(pad for pad in pads if pad is not None and pad in known)


def no_cache(bridge: TransformerBridge) -> dict[str, bool]:
    """Keywords that spare a model keeping keys and values of a text that nobody goes on with."""
    config = getattr(bridge.original_model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", False) else {}
