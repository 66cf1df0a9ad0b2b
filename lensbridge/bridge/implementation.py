"""Which attention code a model runs, and running it with code that can be looked into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..hooks import LensError

OPENABLE = ("sdpa", "eager", None)
"""Implementations whose inside can be watched as they are."""


def implementations(model: nn.Module) -> dict[str, Any]:
    """Every distinct configuration in a model by the path of the module that holds it first."""
    seen: set[int] = set()
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        config = module.__dict__.get("config")
        if (
            config is not None
            and id(config) not in seen
            and hasattr(config, "_attn_implementation")
        ):
            seen.add(id(config))
            found[path] = config
    return found


def is_openable(model: nn.Module) -> bool:
    """Whether the text model's attention can be watched without changing anything."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) in OPENABLE


@contextmanager
def openable(model: nn.Module) -> Iterator[None]:
    """For the length of a run, have a model that uses a fused kernel (flash, flex) use sdpa, or else eager.

    Raises:
        LensError: The model accepts neither.
    """
    before = {
        id(config): (config, config._attn_implementation)
        for config in implementations(model).values()
    }
    closed = [config for config, name in before.values() if name not in OPENABLE]
    try:
        for name in ("sdpa", "eager"):
            if name == "sdpa" and not getattr(model, "_supports_sdpa", False):
                continue
            # Not model.set_attn_implementation: it refuses some models with no more than a warning.
            for config in closed:
                config._attn_implementation = name
            if all(config._attn_implementation == name for config in closed):
                break
        else:
            raise LensError(
                f"attention scores and patterns cannot be opened: {type(model).__name__} runs "
                f"{closed[0]._attn_implementation!r} and accepts neither 'sdpa' nor 'eager'"
            )
        yield
    finally:
        for config, name in before.values():
            if config._attn_implementation != name:
                config._attn_implementation = name
