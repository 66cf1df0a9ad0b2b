"""Circuits of two heads: QK and OV matrices of all layers, and how much heads compose."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..hooks import AbsentPointError, InputError
from .config import BridgeConfig
from .factored import FactoredMatrix, widened
from .weights import Weights


class Composition(Weights):
    """QK, OV and composition scores of a bridge's main tower."""

    cfg: BridgeConfig

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every head, [layer, head, d_model, d_model].

        Without what stands between projection and product: rotation, norms on q and k, biases. Where heads
        are grouped, there is one for each query head.
        """
        self._check_every_layer("attn", "QK", "bridge.QK_for_attn_layers()")
        return self.QK_for_attn_layers()[1]

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every head, [layer, head, d_model, d_model]."""
        self._check_every_layer("attn", "OV", "bridge.OV_for_attn_layers()")
        return self.OV_for_attn_layers()[1]

    def QK_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """`QK` of the layers that have it: their indices, and [layer, head, d_model, d_model]."""
        layers = self._layers_with("QK")
        W_Q = self._stacked("W_Q", layers)
        return layers, FactoredMatrix(W_Q, self._stacked("W_K", layers).mT)

    def OV_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """`OV` of the layers that have it: their indices, and [layer, head, d_model, d_model]."""
        layers = self._layers_with("OV")
        W_V = self._stacked("W_V", layers)
        return layers, FactoredMatrix(W_V, self._stacked("W_O", layers))

    def composition_layer_indices(self) -> list[int]:
        """The layers that `all_composition_scores` is about, in its order."""
        overlap = set(self._layers_with("OV"))
        return [layer for layer in self._layers_with("QK") if layer in overlap]

    @property
    def all_head_labels(self) -> list[str]:
        """``["L0H0", "L0H1", ...]``: ``cfg.n_heads`` for each layer of the main tower, attention or not."""
        count = self.cfg.n_heads or 0
        blocks = range(len(self.architecture.blocks))
        return [f"L{layer}H{head}" for layer in blocks for head in range(count)]

    @property
    def attn_head_labels(self) -> list[str]:
        """The heads there are: of the layers with attention, as many as each has."""
        return [
            f"L{layer}H{head}"
            for layer, block in enumerate(self.architecture.blocks)
            if block.attn is not None
            for head in range(block.attn.n_heads)
        ]

    @torch.no_grad()
    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer head"]:
        """How much the output of each head feeds each later one: ``|OV @ M| / (|OV| |M|)``, Frobenius norms.

        Computed from the factors; no matrix of d_model x d_model is made. Where heads are grouped, every
        query head counts. A norm of the stream between the heads is left out, as are rotations.

        Args:
            mode: Which input of the later head: ``"Q"`` (M is QK), ``"K"`` (its transpose), ``"V"`` (OV).
        Returns:
            The score of head [l1, h1] with [l2, h2]; 0 unless layer l2 comes later. The layers are those of
            `composition_layer_indices`: all of them, unless the model mixes kinds of layers.
        Raises:
            InputError: Another mode.
            AbsentPointError: Two layers with both matrices are not there.
        Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(f'mode is "Q", "K" or "V", got {mode!r}')
        layers = self.composition_layer_indices()
        if not layers:
            # Says why.
            self._layers_with("QK")
            self._layers_with("OV")
            raise AbsentPointError("no layer of this model has both a QK and an OV matrix")
        first = FactoredMatrix(self._stacked("W_V", layers), self._stacked("W_O", layers))
        if mode == "V":
            second = first
        else:
            second = FactoredMatrix(self._stacked("W_Q", layers), self._stacked("W_K", layers).mT)
            second = second.T if mode == "K" else second
        # An orthogonal factor on the outside changes no norm: what is left of it has d_head columns.
        left = torch.linalg.qr(widened(first.A), mode="r")[1] @ widened(first.B)
        right = widened(second.A) @ torch.linalg.qr(widened(second.B).mT, mode="r")[1].mT
        sizes = torch.linalg.matrix_norm(left), torch.linalg.matrix_norm(right)
        count, heads = sizes[0].shape
        scores = left.new_zeros(count, heads, count, heads)
        for i in range(count):
            for j in range(i + 1, count):
                made = torch.linalg.matrix_norm(left[i, :, None] @ right[j, None])
                bound = sizes[0][i, :, None] * sizes[1][j]
                scores[i, :, j] = torch.where(bound > 0, made / bound, 0.0)
        return scores

    # --- inside ------------------------------------------------------------------------------------------

    def _layers_with(self, product: str) -> list[int]:
        table, main = self._weights, self.architecture.main
        names = [f"{main.prefix}blocks.{i}.attn.{product}" for i in range(len(main.blocks))]
        layers = [index for index, name in enumerate(names) if name in table]
        if not layers:
            whys = dict.fromkeys(str(table.missing(name)) for name in names[:1])
            raise AbsentPointError(
                f"no layer of this model has attn.{product}: {'; '.join(whys) or 'it has no layers'}"
            )
        return layers

    def _stacked(self, attr: str, layers: list[int]) -> Tensor:
        return self.stack_params_for("attn", attr, layers=layers, expand_groups=True)[1]
