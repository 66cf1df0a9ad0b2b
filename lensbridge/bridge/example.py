"""Small inputs a model can be run on, made from its configuration and the parameters of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH = 2, 5
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    NotImplementedError,
    ImportError,
    AssertionError,  # some models check their shapes with it
)
"""What a model raises on an input it was not made for."""
_IMAGE = ("image_size", "img_size", "input_size")
_FEATURES = ("num_mel_bins", "feature_size", "input_feat_per_channel", "num_mel_features", "n_mels")


def examples(model: nn.Module, device: torch.device | str) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, the likeliest first.

    Args:
        model: A Hugging Face model, or a tower of one.
        device: Where to make them.
    """
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    names = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "use_cache" in names and getattr(config, "use_cache", None) is True:
        extra["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        # Longer than the encoder's, so that the two can be told apart.
        extra["decoder_input_ids"] = _ids(model, device, LENGTH + 1)
    if "input_ids" in names and main in ("input_ids", "pixel_values"):
        text = {"input_ids": _ids(model, device, LENGTH), **extra}
        if main == "input_ids":
            yield text
        if "pixel_values" in names:
            yield from ({**text, "pixel_values": x} for x in _images(model, device))
    if main == "pixel_values" or "pixel_values" in names:
        yield from ({"pixel_values": x} for x in _images(model, device))
    if main in ("input_features", "input_values") or {"input_features", "input_values"} & set(
        names
    ):
        yield from ({**sound, **extra} for sound in _sounds(model, names, device))
    if "inputs_embeds" in names:
        width = getattr(config, "hidden_size", None)
        if isinstance(width, int):
            yield {"inputs_embeds": torch.ones(ROWS, LENGTH, width, device=device), **extra}
    if "hidden_states" in names and isinstance(getattr(config, "hidden_size", None), int):
        yield {"hidden_states": torch.ones(ROWS, LENGTH, config.hidden_size, device=device)}


def _ids(model: nn.Module, device: torch.device | str, length: int) -> Tensor:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    size = size if isinstance(size, int) else 16
    return (torch.arange(ROWS * length, device=device).reshape(ROWS, length) + 3) % max(size, 1)


def _images(model: nn.Module, device: torch.device | str) -> Iterator[Tensor]:
    config: Any = model.config
    config = getattr(config, "vision_config", None) or config
    side = next((v for n in _IMAGE if (v := getattr(config, n, None)) is not None), None)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    sides = [side] if side is not None else []
    for size in [*sides, 32, 64, 224]:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        yield torch.ones(ROWS, int(channels), int(height), int(width), device=device)


def _sounds(model: nn.Module, names: Any, device: torch.device | str) -> Iterator[dict[str, Any]]:
    config: Any = model.config
    config = (
        getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    )
    if "input_values" in names:
        yield {"input_values": torch.ones(ROWS, 1600, device=device)}
    bins = next((v for n in _FEATURES if isinstance(v := getattr(config, n, None), int)), 80)
    source = getattr(config, "max_source_positions", None) or 50
    for length in (2 * int(source), 100):
        # Whisper takes [batch, mel, time], Speech2Text [batch, time, mel].
        yield {"input_features": torch.ones(ROWS, bins, length, device=device)}
        yield {"input_features": torch.ones(ROWS, length, bins, device=device)}
