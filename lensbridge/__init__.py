"""lensbridge: any Hugging Face model in canonical, named hook points.

Names are imported when first used (PEP 562), so ``import lensbridge`` costs what torch and transformers cost.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .bridge import (
        ActivationCache,
        Architecture,
        BridgeConfig,
        TransformerBridge,
        add_row,
    )
    from .hooks import (
        AbsentPointError,
        ArchitectureError,
        GradientError,
        HookNotFiredError,
        HookPoint,
        HookRegistry,
        HookValueError,
        InputError,
        LayerRangeError,
        LensError,
        PointError,
        SelectionError,
        UnknownPointError,
    )

_HOME = {
    "ActivationCache": "bridge",
    "Architecture": "bridge",
    "BridgeConfig": "bridge",
    "TransformerBridge": "bridge",
    "AbsentPointError": "hooks",
    "ArchitectureError": "hooks",
    "GradientError": "hooks",
    "HookNotFiredError": "hooks",
    "HookPoint": "hooks",
    "HookRegistry": "hooks",
    "HookValueError": "hooks",
    "InputError": "hooks",
    "LayerRangeError": "hooks",
    "LensError": "hooks",
    "PointError": "hooks",
    "SelectionError": "hooks",
    "UnknownPointError": "hooks",
    "add_row": "bridge",
}

__all__ = [
    "AbsentPointError",
    "ActivationCache",
    "Architecture",
    "ArchitectureError",
    "BridgeConfig",
    "GradientError",
    "HookNotFiredError",
    "HookPoint",
    "HookRegistry",
    "HookValueError",
    "InputError",
    "LayerRangeError",
    "LensError",
    "PointError",
    "SelectionError",
    "TransformerBridge",
    "UnknownPointError",
    "__version__",
    "add_row",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
