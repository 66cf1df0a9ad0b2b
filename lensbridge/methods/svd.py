"""Singular vectors of a model's matrices, and the tokens they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import InputError
from .sites import layer_index

MATRICES = {
    # Where the weight is; which side is the residual stream, and through what it is read as tokens.
    "OV": ("attn.OV", "W_E", "W_U"),
    "QK": ("attn.QK", "W_E", "W_E"),
    "w_in": ("mlp.W_in", "W_E", None),
    "w_gate": ("mlp.W_gate", "W_E", None),
    "w_out": ("mlp.W_out", None, "W_U"),
}
LEFT, RIGHT = "left", "right"


@dataclass(frozen=True)
class SingularVectors:
    """A matrix as a sum of ``S[i] * outer(left[i], right[i])``, the largest first.

    A pair of singular vectors may change sign together; here the largest entry of the left one is positive.

    Attributes:
        name: Which matrix: ``"blocks.2.attn.OV[0]"``.
        S: Singular values, all of them, [n].
        left: What the matrix reads (of QK, what asks), [n, d_in].
        right: What it writes (of QK, what is looked for), [n, d_out].
        through: For each side, the matrix that tells it as tokens, ``"W_E"`` or ``"W_U"``; None for neurons.
    """

    name: str
    S: Float[Tensor, " n"]
    left: Float[Tensor, "n d_in"]
    right: Float[Tensor, "n d_out"]
    through: dict[str, str | None]
    bridge: TransformerBridge = field(repr=False, compare=False)

    def scores(
        self, side: str = RIGHT, through: str | None = None, n_vectors: int = 10
    ) -> Float[Tensor, "vector d_vocab"]:
        """How much each token of the vocabulary lies along the first singular vectors.

        Args:
            side: ``"left"`` or ``"right"``.
            through: ``"W_U"`` (what a direction adds to the logits) or ``"W_E"`` (which embeddings lie along
                it); None: embeddings for what is read, logits for what is written.
            n_vectors: Of how many, from the largest.
        Raises:
            InputError: The side is one of neurons, which stand for no tokens, or there is no such side.
        """
        if side not in (LEFT, RIGHT):
            raise InputError(f"side is 'left' or 'right', got {side!r}")
        if self.through[side] is None:
            other = RIGHT if side == LEFT else LEFT
            raise InputError(
                f"the {side} singular vectors of {self.name} are over neurons, which stand for no tokens: "
                f"ask for side={other!r}"
            )
        through = through or self.through[side]
        if through not in ("W_E", "W_U"):
            raise InputError(f"through is 'W_E' or 'W_U', got {through!r}")
        vectors = (self.left if side == LEFT else self.right)[:n_vectors]
        with torch.no_grad():
            tokens = self.bridge.W_E.T if through == "W_E" else self.bridge.W_U
            return vectors @ tokens.to(vectors)

    def top_tokens(
        self, side: str = RIGHT, k: int = 5, *, through: str | None = None, n_vectors: int = 5
    ) -> list[tuple[list[str], list[str]]]:
        """The tokens furthest along each of the first singular vectors, and furthest against it.

        Args:
            side: As in `scores`.
            k: How many tokens.
            through: As in `scores`.
            n_vectors: Of how many vectors.
        """
        scores = self.scores(side, through, n_vectors)
        return [
            (self._words(row.topk(k).indices), self._words((-row).topk(k).indices))
            for row in scores
        ]

    def _words(self, ids: Tensor) -> list[str]:
        if self.bridge.tokenizer is None:
            return [str(i) for i in ids.tolist()]
        return [self.bridge.to_single_str_token(i) for i in ids.tolist()]


def svd_of(
    bridge: TransformerBridge,
    matrix: str,
    layer: int,
    head: int | None = None,
    *,
    expert: int | None = None,
) -> SingularVectors:
    """The singular value decomposition of a head's circuit or of an MLP's matrix.

    The weights are taken as they are: what a norm multiplies by before the matrix reads is not in them,
    unless it was folded in beforehand (``bridge.process_weights()``).

    Args:
        bridge: The model.
        matrix: ``"OV"`` or ``"QK"`` of a head, ``"w_in"``, ``"w_gate"`` or ``"w_out"`` of an MLP.
        layer: Which; negative counts from the end.
        head: Which, for OV and QK.
        expert: Which, where the MLP is made of experts.
    Raises:
        InputError: Another matrix, a head or an expert that is not there, or one where there are none.
        AbsentPointError: The layer has no such weight; says why.
        LayerRangeError: A layer this model does not have.
    Source: Millidge and Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are
        Highly Interpretable".
    """
    if matrix not in MATRICES:
        raise InputError(f"matrix is one of {', '.join(MATRICES)}, got {matrix!r}")
    path, reads, writes = MATRICES[matrix]
    name = f"{bridge.registry.layers}.{layer_index(layer, bridge)}.{path}"
    with torch.no_grad():
        if matrix in ("OV", "QK"):
            if expert is not None:
                raise InputError(f"{matrix} is of a head, not of an expert: leave expert out")
            whole = bridge.weight(name)
            name = f"{name}[{_chosen(head, whole.shape[0], 'head', matrix)}]"
            U, S, Vh = whole[head].svd()
        else:
            if head is not None:
                raise InputError(f"{matrix} is the whole MLP's: leave head out")
            weight = bridge.weight(name)
            if weight.dim() > 2:
                index = _chosen(expert, len(weight), "expert", matrix)
                name, weight = f"{name}[{index}]", weight[index]
            elif expert is not None:
                raise InputError(f"{name} is no MLP of experts: leave expert out")
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        left = U.mT
        # Of the two signs a pair may have, the one that does not depend on the machine.
        largest = left.gather(1, left.abs().argmax(1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(left)
    return SingularVectors(name, S, left * sign, Vh * sign, {LEFT: reads, RIGHT: writes}, bridge)


def _chosen(index: int | None, count: int, what: str, matrix: str) -> int:
    if index is None:
        raise InputError(f"{matrix} is one of each {what}: say which, {what}= 0 to {count - 1}")
    if not 0 <= index < count:
        raise InputError(f"{what} {index}: there are {count}, from 0")
    return index
