"""Methods: consumers of the hook registry through the bridge's public face."""

from .adapter import ModelAdapter, get_adapter
from .gradients import (
    autograd_node_hook,
    capture_backward_pre,
    capture_gradients,
    capture_kwargs_hook,
    tensor_grad_hook,
)
from .granularity import Aggregation, Granularity
from .interventions import InterventionSpec, apply_interventions
from .lens import LensAPI
from .scoring import (
    TokenScores,
    apply_temperature,
    gather_token_scores,
    logits_to_log_probs,
    logits_to_probs,
    select_final_token,
)
from .split_points import ModelWithSplitPoints
from .splitters import BaseSplitter, SplitterForGeneration
from .tracing import TraceResult, TransformerTracer

__all__ = [
    "Aggregation",
    "BaseSplitter",
    "Granularity",
    "InterventionSpec",
    "LensAPI",
    "ModelAdapter",
    "ModelWithSplitPoints",
    "SplitterForGeneration",
    "TokenScores",
    "TraceResult",
    "TransformerTracer",
    "apply_interventions",
    "apply_temperature",
    "autograd_node_hook",
    "capture_backward_pre",
    "capture_gradients",
    "capture_kwargs_hook",
    "gather_token_scores",
    "get_adapter",
    "logits_to_log_probs",
    "logits_to_probs",
    "select_final_token",
    "tensor_grad_hook",
]
