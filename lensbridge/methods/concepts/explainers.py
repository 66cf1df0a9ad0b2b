"""The kinds of SAE explainers: overcomplete's autoencoders, one line each."""

from __future__ import annotations

from ...hooks import NotFittedError
from .base import SAEExplainer
from .losses import DeadNeuronsReanimation, MSELoss, SAELossClasses

__all__ = [
    "KINDS",
    "BatchTopKSAEConcepts",
    "DeadNeuronsReanimation",
    "JumpReLUSAEConcepts",
    "MSELoss",
    "MpSAEConcepts",
    "NotFittedError",
    "OMPSAEConcepts",
    "QSAEConcepts",
    "RAJumpSAEConcepts",
    "RATopKSAEConcepts",
    "SAEExplainer",
    "SAELossClasses",
    "TopKSAEConcepts",
    "VanillaSAEConcepts",
]


class VanillaSAEConcepts(SAEExplainer):
    """ReLU codes, sparse by a penalty on their sum.

    Args:
        l1: What the penalty weighs (with ``bias`` and without a criterion).
    """

    kind = "SAE"


class TopKSAEConcepts(SAEExplainer):
    """The ``top_k`` largest codes of each row (default 32, or an eighth of the concepts if that is fewer).

    Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093.
    """

    kind = "TopKSAE"


class BatchTopKSAEConcepts(SAEExplainer):
    """``top_k`` codes a row on average over a batch; after training, all above one threshold.

    Bussmann et al., "BatchTopK sparse autoencoders", arXiv 2412.06410.
    """

    kind = "BatchTopKSAE"


class JumpReLUSAEConcepts(SAEExplainer):
    """Codes above a threshold of their concept's own, learnt so that a row has ``target_l0`` of them.

    Rajamanoharan et al., "Jumping Ahead", arXiv 2407.14435.
    """

    kind = "JumpSAE"


class MpSAEConcepts(SAEExplainer):
    """Matching pursuit: ``k`` times the atom that has most of what is left over."""

    kind = "MpSAE"


class OMPSAEConcepts(SAEExplainer):
    """Orthogonal matching pursuit, codes refitted after each of ``k`` atoms."""

    kind = "OMPSAE"


class QSAEConcepts(SAEExplainer):
    """Codes of ``q`` learnt levels."""

    kind = "QSAE"


class RATopKSAEConcepts(SAEExplainer):
    """`TopKSAEConcepts` whose atoms stay near the convex hull of ``points``; Fel et al., arXiv 2502.12892."""

    kind = "RATopKSAE"


class RAJumpSAEConcepts(SAEExplainer):
    """`JumpReLUSAEConcepts` whose atoms stay near the convex hull of ``points``."""

    kind = "RAJumpSAE"


KINDS: dict[str, type[SAEExplainer]] = {
    kind.kind: kind
    for kind in (
        VanillaSAEConcepts,
        TopKSAEConcepts,
        BatchTopKSAEConcepts,
        JumpReLUSAEConcepts,
        MpSAEConcepts,
        OMPSAEConcepts,
        QSAEConcepts,
        RATopKSAEConcepts,
        RAJumpSAEConcepts,
    )
}
"""By the name of overcomplete's class."""
