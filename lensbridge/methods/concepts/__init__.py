"""Concepts of activations: sparse autoencoders, trained, used, measured, looked at and kept in files."""

from .base import SAEExplainer
from .dashboard import dashboard
from .effects import logit_effects, top_tokens
from .examples import ConceptExample, TopKInputs, label_concepts
from .explainers import (
    BatchTopKSAEConcepts,
    JumpReLUSAEConcepts,
    MpSAEConcepts,
    OMPSAEConcepts,
    QSAEConcepts,
    RAJumpSAEConcepts,
    RATopKSAEConcepts,
    TopKSAEConcepts,
    VanillaSAEConcepts,
)
from .formats import read_gemma_scope, read_saelens, write_saelens
from .learning import fit_together
from .losses import SAELossClasses
from .metrics import SAEMetrics, measure_sae, stability
from .streaming import Streaming

__all__ = [
    "BatchTopKSAEConcepts",
    "ConceptExample",
    "JumpReLUSAEConcepts",
    "MpSAEConcepts",
    "OMPSAEConcepts",
    "QSAEConcepts",
    "RAJumpSAEConcepts",
    "RATopKSAEConcepts",
    "SAEExplainer",
    "SAELossClasses",
    "SAEMetrics",
    "Streaming",
    "TopKInputs",
    "TopKSAEConcepts",
    "VanillaSAEConcepts",
    "dashboard",
    "fit_together",
    "label_concepts",
    "logit_effects",
    "measure_sae",
    "read_gemma_scope",
    "read_saelens",
    "stability",
    "top_tokens",
    "write_saelens",
]
