"""Methods: consumers of the hook registry through the bridge's public face."""

from .adapter import ModelAdapter, get_adapter
from .attribution import (
    attribution_patching,
    input_x_gradient,
    integrated_gradients,
)
from .base_splitter import BaseSplitter
from .circuit import (
    CausalCircuitAttribution,
)
from .concepts import (
    BatchTopKSAEConcepts,
    ConceptExample,
    JumpReLUSAEConcepts,
    MpSAEConcepts,
    SAEExplainer,
    SAELossClasses,
    SAEMetrics,
    Streaming,
    TopKInputs,
    TopKSAEConcepts,
    VanillaSAEConcepts,
    dashboard,
    fit_together,
    label_concepts,
    logit_effects,
    measure_sae,
    read_gemma_scope,
    read_saelens,
    write_saelens,
)
from .dla import LogitAttribution, direct_logit_attribution
from .figures import (
    Plot,
    attention_plot,
    head_scatter,
)
from .gating import (
    CHG,
    AblationCurve,
    CHGBatch,
    CHGDataset,
    CHGResults,
    CHGTrainer,
    CircuitCheck,
    ContrastiveCHG,
    FitOptions,
    FitUpdate,
    GateSite,
    KLToFull,
    LogitDifference,
    TargetTokens,
    ablation_curve,
    check_circuit,
    gate_attribution,
    scores_under,
)
from .gradients import (
    autograd_node_hook,
    capture_backward_pre,
    capture_gradients,
    capture_kwargs_hook,
    tensor_grad_hook,
)
from .granularity import Aggregation, Granularity
from .heads import (
    HeadScores,
    detect_head,
    duplicate_token_score,
    induction_score,
    previous_token_score,
    repeated_tokens,
)
from .interventions import InterventionSpec, apply_interventions
from .lens import LensAPI
from .lenses import (
    LogitLens,
    logit_lens,
)
from .measured import (
    ValueAndGradient,
    logit_difference,
)
from .patch_grid import (
    PatchGrid,
)
from .patching import (
    activation_patch,
)
from .path_patching import (
    path_patch,
)
from .scoring import (
    TokenScores,
    apply_temperature,
    gather_token_scores,
    logits_to_log_probs,
    logits_to_probs,
    select_final_token,
)
from .spans import (
    aggregate_to_sentences,
    get_sentence_token_spans,
)
from .split_points import ModelWithSplitPoints
from .splitters import SplitterForGeneration
from .store import (
    ActivationBatch,
    ActivationStore,
    ExtractedActivations,
    Ragged,
    extract_representations,
    extract_to,
    load_activations,
    read_vllm_hidden_states,
    save_activations,
    stream_representations,
)
from .svd import (
    SingularVectors,
    svd_of,
)
from .tracing import TraceResult, TransformerTracer

__all__ = [
    "CHG",
    "AblationCurve",
    "ActivationBatch",
    "ActivationStore",
    "Aggregation",
    "BaseSplitter",
    "BatchTopKSAEConcepts",
    "CHGBatch",
    "CHGDataset",
    "CHGResults",
    "CHGTrainer",
    "CausalCircuitAttribution",
    "CircuitCheck",
    "ConceptExample",
    "ContrastiveCHG",
    "ExtractedActivations",
    "FitOptions",
    "FitUpdate",
    "GateSite",
    "Granularity",
    "HeadScores",
    "InterventionSpec",
    "JumpReLUSAEConcepts",
    "KLToFull",
    "LensAPI",
    "LogitAttribution",
    "LogitDifference",
    "LogitLens",
    "ModelAdapter",
    "ModelWithSplitPoints",
    "MpSAEConcepts",
    "PatchGrid",
    "Plot",
    "Ragged",
    "SAEExplainer",
    "SAELossClasses",
    "SAEMetrics",
    "SingularVectors",
    "SplitterForGeneration",
    "Streaming",
    "TargetTokens",
    "TokenScores",
    "TopKInputs",
    "TopKSAEConcepts",
    "TraceResult",
    "TransformerTracer",
    "ValueAndGradient",
    "VanillaSAEConcepts",
    "ablation_curve",
    "activation_patch",
    "aggregate_to_sentences",
    "apply_interventions",
    "apply_temperature",
    "attention_plot",
    "attribution_patching",
    "autograd_node_hook",
    "capture_backward_pre",
    "capture_gradients",
    "capture_kwargs_hook",
    "check_circuit",
    "dashboard",
    "detect_head",
    "direct_logit_attribution",
    "duplicate_token_score",
    "extract_representations",
    "extract_to",
    "fit_together",
    "gate_attribution",
    "gather_token_scores",
    "get_adapter",
    "get_sentence_token_spans",
    "head_scatter",
    "induction_score",
    "input_x_gradient",
    "integrated_gradients",
    "label_concepts",
    "load_activations",
    "logit_difference",
    "logit_effects",
    "logit_lens",
    "logits_to_log_probs",
    "logits_to_probs",
    "measure_sae",
    "path_patch",
    "previous_token_score",
    "read_gemma_scope",
    "read_saelens",
    "read_vllm_hidden_states",
    "repeated_tokens",
    "save_activations",
    "scores_under",
    "select_final_token",
    "stream_representations",
    "svd_of",
    "tensor_grad_hook",
    "write_saelens",
]
