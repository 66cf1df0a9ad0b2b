"""The residual stream of a cache: as it grew, and as the sum of what was added to it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..hooks import InputError
from .architecture import Attention, Branch, Mlp
from .decompose import EMBEDS, Source, Wanted, refuse_streams
from .slicing import SliceInput
from .sums import Shown, stacked, with_one_bias
from .sums_logits import LogitSums


class ResidSums(LogitSums):
    """The stream: a part of an `ActivationCache`."""

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """One activation of every layer before a layer.

        Args:
            activation_name: Its short name: ``"resid_pre"``, ``"pattern"``, ``"scale"``.
            layer: The layer to stop before; -1, None or the number of layers takes all.
            sublayer_type: Which part, where there are several: ``"ln1"``.
        Raises:
            InputError: The layers' shapes differ.
            AbsentPointError, UnknownPointError: A layer has no such place, or it was not cached.
        """
        end = self._end(self._whole("stack_activation"), layer)
        found = [self[activation_name, index, sublayer_type] for index in range(end)]
        return stacked(found, activation_name)

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream at the input of every layer up to one.

        Args:
            layer: The last of them; -1, None or the number of layers goes on to what leaves the last layer.
            incl_mid: The stream between the branches too, where a layer has it (parallel layers have none).
            apply_ln: Behind the norm that reads it at ``layer``: the final norm of the model itself, on each
                stream with its own statistics (the logit lens), or, at the input of a layer, that layer's
                norm with the scale it had.
            pos_slice: Positions to take.
            mlp_input: What the MLP of ``layer`` reads as the last one.
            return_labels: Give the labels too: ``"0_pre"``, ``"0_mid"``, ..., ``"final_post"``.
        Returns:
            [component, ..., d_model]; with ``return_labels``, a pair of that and the labels.
        Raises:
            ArchitectureError: The model has several streams.
            UnknownPointError: The cache lacks points; says which.
        """
        whole = self._whole("accumulated_resid")
        refuse_streams(whole, self.registry)
        end, count = self._end(whole, layer, mlp_input), len(whole.architecture.blocks)
        wanted: list[tuple[str, tuple[str, ...]]] = []
        for index in range(end + 1):
            label = "final_post" if index == count else f"{index}_pre"
            wanted.append((label, self._names_of(index)))
            if incl_mid and index < end:
                wanted += self._mids(index)
        if incl_mid and end and not any("_mid" in label for label, _ in wanted):
            raise self.registry.missing(f"{self.registry.layers}.0.hook_resid_mid")
        if mlp_input:
            wanted.append((f"{end}_mid", self._names_of(end, mlp_input)))
        self._require([names for _, names in wanted])
        shown = Shown(self, pos_slice)
        stack = torch.stack([shown[self._held(names)] for _, names in wanted])
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, end, mlp_input, pos_slice, recompute_ln=end == count
            )
        return (stack, [label for label, _ in wanted]) if return_labels else stack

    def _mids(self, layer: int) -> list[tuple[str, tuple[str, ...]]]:
        """The points between a layer's branches, with their labels."""
        here = f"{self.registry.layers}.{layer}."
        found = [name.removeprefix(here) for name in self.registry if name.startswith(here)]
        mids = [name for name in found if name.startswith("hook_resid_mid")]
        return [(f"{layer}_{x.removeprefix('hook_resid_')}", (f"{here}{x}",)) for x in mids]

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream that enters a layer, as the sum of what each branch before it added.

        A component is what arrives of it: times the factors of the model, and, where norms stand on the
        stream or behind the sums (BERT, MiniMax), behind those, with the scale that they had. So the
        components sum to the stream. What such norms add is one component more, ``"bias"``; what enters the
        first layer besides embeddings (token types) is ``"embed_rest"``, and all that enters is ``"0_pre"``
        where it is no sum.

        Args:
            layer: Which; -1, None or the number of layers means behind the last.
            mlp_input: What the MLP of that layer reads instead of what the layer does.
            mode: ``"attn"`` for attention alone, ``"mlp"`` for MLPs, ``"all"`` for those and every other
                kind of branch; only all of them sum to the stream.
            apply_ln: As the norm that reads the stream there takes them; see `apply_ln_to_stack`.
            pos_slice: Positions to take.
            incl_embeds: The embeddings too.
            return_labels: Give the labels too: ``"embed"``, ``"pos_embed"``, ``"0_attn_out"``...
        Returns:
            [component, ..., d_model]; with ``return_labels``, a pair of that and the labels.
        Raises:
            ArchitectureError: The stream is not known to be a sum, or not that sum in this run (a hook edited
                it); says where and why.
            UnknownPointError: The cache lacks points; says which.
        """
        kinds: dict[str, Any] = {"all": (), "attn": Attention, "mlp": Mlp}
        if mode not in kinds:
            raise InputError(f"mode is 'all', 'attn' or 'mlp', got {mode!r}")

        def chosen(branch: Branch) -> bool:
            return mode == "all" or isinstance(branch.part, kinds[mode])

        wanted = Wanted(branches=chosen, enters=mode == "all" or incl_embeds)
        stream, end = self._stream("decompose_resid", layer, wanted, pos_slice, mlp_input=mlp_input)
        if mode == "all" and incl_embeds:
            self._check_sum(stream, end, mlp_input)
        left_out = (*(() if incl_embeds else EMBEDS), *(() if mode == "all" else ("bias",)))
        groups = [group for group in stream.groups if group[0].kind not in left_out]
        groups = with_one_bias(groups)
        return self._answer(stream, groups, end, mlp_input, apply_ln, pos_slice, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream that enters a layer, as the sum of every head, neuron, embedding and bias.

        In this order: heads, neurons (or MLPs), branches of other kinds, embeddings, and one ``"bias"``. A
        branch that is no sum of heads or neurons stays whole under its own label: a mixer, an MLP of experts.
        As in `decompose_resid`, a component is what arrives of it.

        Every neuron of every position is a vector of d_model: take few positions, or
        ``expand_neurons=False``.

        Args:
            layer: Which; -1, None or the number of layers means behind the last.
            mlp_input: What the MLP of that layer reads instead of what the layer does.
            expand_neurons: MLPs by neurons.
            apply_ln: As the norm that reads the stream there takes them; see `apply_ln_to_stack`.
            pos_slice: Positions to take.
            return_labels: Give the labels too: ``"L0H3"``, ``"L0N17"`` or ``"0_mlp_out"``, ``"embed"``...
        Returns:
            [component, ..., d_model]; with ``return_labels``, a pair of that and the labels.
        Raises:
            ArchitectureError: The stream is not known to be a sum, or not that sum in this run; says where.
            UnknownPointError: The cache lacks points; says which.
        """
        wanted = Wanted(heads=True, neurons=expand_neurons)
        what = "get_full_resid_decomposition"
        stream, end = self._stream(what, layer, wanted, pos_slice, mlp_input=mlp_input)
        self._check_sum(stream, end, mlp_input)
        groups = with_one_bias(stream.groups, like=stream)
        groups.sort(key=lambda group: _rank(group[0]))
        return self._answer(stream, groups, end, mlp_input, apply_ln, pos_slice, return_labels)


def _rank(source: Source) -> int:
    """Where a component comes in a full decomposition."""
    if source.kind == "branch" and not source.branch.startswith("mlp"):
        return 2
    kinds = ("head", "neuron", "", "embed", "bias")
    kind = {"branch": "neuron"}.get(source.kind, source.kind)
    return kinds.index("embed" if kind in EMBEDS else kind)
