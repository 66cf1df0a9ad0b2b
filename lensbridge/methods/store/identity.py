"""Identity: what makes two extractions one and the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ...bridge import TransformerBridge
from .extraction import Extraction

_PLACES = 16
"""How many values of each parameter tell one checkpoint from another of the same shape."""


def identity_of(extraction: Extraction) -> dict[str, Any]:
    """What an extraction is, for JSON: two with the same one, over the same dataset, have the same rows."""
    bridge = extraction.bridge
    tokenizer = bridge.tokenizer
    device = bridge.device
    return {
        "model": _model(bridge),
        "tokenizer": None
        if tokenizer is None
        else {
            "class": type(tokenizer).__name__,
            "name_or_path": str(getattr(tokenizer, "name_or_path", "")),
            "size": len(tokenizer),
            "prepends_bos": bool(bridge.cfg.default_prepend_bos),
        },
        "settings": extraction.settings,
        "device": None if device is None else device.type,
    }


def versions() -> dict[str, str]:
    """What made it; no part of the identity."""
    import transformers

    from ... import __version__

    return {
        "lensbridge": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _model(bridge: TransformerBridge) -> dict[str, Any]:
    model = bridge.unwrapped_model
    config: Any = getattr(model, "config", None)
    held = config.to_dict() if config is not None else {}
    for name in ("transformers_version", "_name_or_path"):
        held.pop(name, None)
    text = json.dumps(held, sort_keys=True, default=str)
    return {
        "class": type(model).__name__,
        "name_or_path": str(getattr(config, "_name_or_path", "")),
        "revision": getattr(config, "_commit_hash", None),
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": fingerprint(model),
        "attention": getattr(config, "_attn_implementation", None),
    }


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of all parameters, and of some values of each.

    Of parameters that are not whole in memory (offloaded ones, and those spread over processes) values are
    not looked at.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        is_elsewhere = parameter.device.type == "meta" or isinstance(parameter, DTensor)
        if is_elsewhere or not parameter.numel():
            continue
        flat = parameter.detach().reshape(-1)
        at = torch.arange(_PLACES, device=flat.device) * (len(flat) - 1) // (_PLACES - 1)
        digest.update(flat[at].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """The first thing in which two identities differ, in words; None where there is none."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            found = difference(ours.get(name), theirs.get(name), f"{where}.{name}".lstrip("."))
            if found is not None:
                return found
        return None
    # What has been through JSON is told from what has not by tuples alone.
    same = json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)
    return None if same else f"{where} was {ours!r:.100}, now it is {theirs!r:.100}"
