"""The demo's results as one self-contained HTML page."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bridge import TransformerBridge
from .report import depth_names
from .show import Ablation, Induction, Patching, Reading, str_tokens

DIGITS = 4
"""Decimals of every number on the page."""
TOP = 5

# JSON inside <script> must not close it or open a comment; U+2028 and U+2029 end lines in old scripts.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def write(
    out: Path,
    bridge: TransformerBridge,
    readings: list[Reading],
    induction: Induction,
    ablation: Ablation,
    patching: Patching,
) -> int:
    """Write the page and return its size in bytes."""
    data = build(bridge, readings, induction, ablation, patching)
    return out.write_bytes(render(data).encode())


def build(
    bridge: TransformerBridge,
    readings: list[Reading],
    induction: Induction,
    ablation: Ablation,
    patching: Patching,
) -> dict[str, Any]:
    """Everything the page's script draws, ready for JSON.

    Args:
        bridge: The model.
        readings: The texts to choose from; the first is the prompt.
        induction: Found on repeated words.
        ablation: Of each head.
        patching: Of each layer and position.
    """
    return {
        "model": _model(bridge),
        "readings": [_reading(bridge, reading) for reading in readings],
        "induction": _induction(bridge, induction),
        "ablation": _ablation(ablation),
        "patching": _patching(patching),
    }


def render(data: dict[str, Any]) -> str:
    """The page around its data; references nothing outside itself."""
    template = (files(__package__) / "page.html").read_text(encoding="utf-8")
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPES)
    values = {"prompt": html.escape(data["readings"][0]["text"]), "data": payload}
    # One pass: a prompt that contains a placeholder stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _numbers(tensor: Tensor) -> Any:
    """Nested lists, rounded."""
    if tensor.dim() > 1:
        return [_numbers(row) for row in tensor]
    return [round(value, DIGITS) for value in tensor.tolist()]


def _model(bridge: TransformerBridge) -> dict[str, Any]:
    c = bridge.cfg
    return {
        "architecture": c.architecture,
        "layers": c.n_layers,
        "heads": c.n_heads,
        "d_model": c.d_model,
        "d_head": c.d_head,
        "d_vocab": c.d_vocab,
        "parameters": sum(parameter.numel() for parameter in bridge.parameters()),
        "points": len(bridge.registry),
    }


def _reading(bridge: TransformerBridge, reading: Reading) -> dict[str, Any]:
    top = reading.lens.topk(TOP)
    return {
        "title": reading.title,
        "text": reading.text,
        "tokens": reading.tokens,
        "pattern": _numbers(reading.pattern),
        "depths": depth_names(len(reading.lens)),
        "lens": [
            [
                [
                    [bridge.to_single_str_token(t), round(p, DIGITS)]
                    for t, p in zip(*pair, strict=True)
                ]
                for pair in zip(tokens, chances, strict=True)
            ]
            for tokens, chances in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
    }


def _induction(bridge: TransformerBridge, found: Induction) -> dict[str, Any]:
    return {
        "period": found.period,
        "rows": len(found.tokens),
        "tokens": str_tokens(bridge, found.tokens[0]),
        "score": _numbers(found.score),
        "best": list(found.best),
    }


def _ablation(found: Ablation) -> dict[str, Any]:
    return {
        "prompt": found.item.prompt,
        "answer": found.item.answer,
        "other": found.item.distractor,
        "baseline": round(found.baseline, DIGITS),
        "ablated": _numbers(found.ablated),
        "change": _numbers(found.change),
        "best": list(found.best),
    }


def _patching(found: Patching) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "clean_tokens": found.clean_tokens,
        "answer": found.answer,
        "clean": round(found.clean, DIGITS),
        "corrupted": round(found.corrupted, DIGITS),
        "patched": _numbers(found.patched),
        "best": list(found.best),
    }
