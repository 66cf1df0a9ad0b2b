"""Keys, values and states a model keeps between calls: how far they reach, and keeping them whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Keywords under which transformers models take what they kept."""


def past_of(kwargs: Mapping[str, Any]) -> Any:
    """What a forward was given of an earlier one; None without any."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def past_length(kwargs: Mapping[str, Any]) -> int:
    """How many positions the attention layers of the past given to a forward hold; 0 without any."""
    measure = getattr(past_of(kwargs), "get_seq_length", None)
    if measure is None:
        return 0
    try:
        return int(measure())
    except ValueError:  # raised by a cache of none but linear layers, which count nothing
        return 0


def with_copied_past(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same keywords with a past that can be written to without the caller's being touched."""
    return {name: _copied(value, {}) if name in NAMES else value for name, value in kwargs.items()}


@contextmanager
def whole_past(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """If a run fails, put back what its layers had already written to the caller's past.

    Only layers that grow by making new tensors can be put back at no cost; a past with any other layer is
    left as it is.
    """
    past = past_of(kwargs)
    before = None if past is None or not _grows(past) else _copied(past, {})
    try:
        yield
    except BaseException:
        if before is not None:
            _put_back(past, before)
        raise


def _grows(past: Any) -> bool:
    both = (
        getattr(past, "self_attention_cache", None),
        getattr(past, "cross_attention_cache", None),
    )
    if any(half is not None for half in both):
        return all(half is None or _grows(half) for half in both)
    layers = getattr(past, "layers", None)
    return isinstance(layers, list) and all(_is_growing(layer) for layer in layers)


def _is_growing(layer: Any) -> bool:
    """Whether a layer replaces its tensors by longer ones, never writing into them."""
    return type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")


def _copied(value: Any, made: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, dict):
        return {key: _copied(item, made) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_copied(item, made) for item in value])
    if _is_growing(value):
        return copy.copy(value)
    is_state = hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module))
    if not is_state or callable(value) or not _holds_tensors(value):
        return value
    twin = made[id(value)] = copy.copy(value)
    for name, item in vars(value).items():
        twin.__dict__[name] = _copied(item, made)
    return twin


def _holds_tensors(value: Any) -> bool:
    """Whether an object is a cache or part of one, not a configuration or a stream."""
    return hasattr(value, "layers") or any(
        isinstance(item, (Tensor, dict, list)) or hasattr(item, "layers")
        for item in vars(value).values()
    )


def _put_back(past: Any, before: Any) -> None:
    for name, item in vars(before).items():
        held = past.__dict__.get(name)
        if name == "layers":
            for layer, kept in zip(held, item, strict=False):
                layer.__dict__.clear()
                layer.__dict__.update(kept.__dict__)
            del held[len(item) :]
        elif hasattr(item, "layers"):
            _put_back(held, item)
        else:
            past.__dict__[name] = item
