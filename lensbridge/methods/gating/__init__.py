"""Causal head gating: which heads a task needs, which harm it, and which it does not notice.

Source: Nam et al., "Causal Head Gating", arXiv 2505.13737.
"""

from .answers import Answers
from .chg import CHG
from .data import CHGBatch, CHGDataset
from .fitting import FitUpdate
from .objectives import KLToFull, LogitDifference, Objective, TargetTokens
from .options import FitOptions
from .plots import (
    ablation_plot,
    cooccurrence_heatmap,
    gate_trajectories,
    head_heatmaps,
    role_scatter,
)
from .results import CHGResults
from .sites import GateSite
from .training import CHGTrainer, ContrastiveCHG
from .validation import (
    AblationCurve,
    CircuitCheck,
    Evaluation,
    ablation_curve,
    check_circuit,
    gate_attribution,
    scores_under,
)

__all__ = [
    "CHG",
    "AblationCurve",
    "Answers",
    "CHGBatch",
    "CHGDataset",
    "CHGResults",
    "CHGTrainer",
    "CircuitCheck",
    "ContrastiveCHG",
    "Evaluation",
    "FitOptions",
    "FitUpdate",
    "GateSite",
    "KLToFull",
    "LogitDifference",
    "Objective",
    "TargetTokens",
    "ablation_curve",
    "ablation_plot",
    "check_circuit",
    "cooccurrence_heatmap",
    "gate_attribution",
    "gate_trajectories",
    "head_heatmaps",
    "role_scatter",
    "scores_under",
]
