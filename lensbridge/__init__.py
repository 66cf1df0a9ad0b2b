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
        Step,
        UnknownPointError,
    )
    from .methods import (
        Aggregation,
        BaseSplitter,
        Granularity,
        InterventionSpec,
        LensAPI,
        LogitAttribution,
        ModelAdapter,
        ModelWithSplitPoints,
        SplitterForGeneration,
        TokenScores,
        TraceResult,
        TransformerTracer,
        ValueAndGradient,
        apply_interventions,
        apply_temperature,
        attribution_patching,
        autograd_node_hook,
        capture_backward_pre,
        capture_gradients,
        capture_kwargs_hook,
        direct_logit_attribution,
        gather_token_scores,
        get_adapter,
        input_x_gradient,
        integrated_gradients,
        logits_to_log_probs,
        logits_to_probs,
        select_final_token,
        tensor_grad_hook,
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
    "Step": "hooks",
    "UnknownPointError": "hooks",
    "add_row": "bridge",
    "ModelAdapter": "methods",
    "get_adapter": "methods",
    "autograd_node_hook": "methods",
    "capture_backward_pre": "methods",
    "capture_gradients": "methods",
    "capture_kwargs_hook": "methods",
    "tensor_grad_hook": "methods",
    "InterventionSpec": "methods",
    "apply_interventions": "methods",
    "LensAPI": "methods",
    "ValueAndGradient": "methods",
    "attribution_patching": "methods",
    "input_x_gradient": "methods",
    "integrated_gradients": "methods",
    "LogitAttribution": "methods",
    "direct_logit_attribution": "methods",
    "Aggregation": "methods",
    "BaseSplitter": "methods",
    "Granularity": "methods",
    "ModelWithSplitPoints": "methods",
    "SplitterForGeneration": "methods",
    "TokenScores": "methods",
    "apply_temperature": "methods",
    "gather_token_scores": "methods",
    "logits_to_log_probs": "methods",
    "logits_to_probs": "methods",
    "select_final_token": "methods",
    "TraceResult": "methods",
    "TransformerTracer": "methods",
}

__all__ = [
    "AbsentPointError",
    "ActivationCache",
    "Aggregation",
    "Architecture",
    "ArchitectureError",
    "BaseSplitter",
    "BridgeConfig",
    "GradientError",
    "Granularity",
    "HookNotFiredError",
    "HookPoint",
    "HookRegistry",
    "HookValueError",
    "InputError",
    "InterventionSpec",
    "LayerRangeError",
    "LensAPI",
    "LensError",
    "LogitAttribution",
    "ModelAdapter",
    "ModelWithSplitPoints",
    "PointError",
    "SelectionError",
    "SplitterForGeneration",
    "Step",
    "TokenScores",
    "TraceResult",
    "TransformerBridge",
    "TransformerTracer",
    "UnknownPointError",
    "ValueAndGradient",
    "__version__",
    "add_row",
    "apply_interventions",
    "apply_temperature",
    "attribution_patching",
    "autograd_node_hook",
    "capture_backward_pre",
    "capture_gradients",
    "capture_kwargs_hook",
    "direct_logit_attribution",
    "gather_token_scores",
    "get_adapter",
    "input_x_gradient",
    "integrated_gradients",
    "logits_to_log_probs",
    "logits_to_probs",
    "select_final_token",
    "tensor_grad_hook",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
