"""Heads and neurons of a cache: what each of them adds to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .architecture import Branch
from .decompose import Source, Wanted, has_heads, has_neurons
from .residual import Stream, head_results, neuron_results, wide
from .slicing import SliceInput
from .sums import Shown
from .sums_logits import LogitSums


class PartSums(LogitSums):
    """Heads and neurons: a part of an `ActivationCache`."""

    def compute_head_results(self) -> None:
        """Add what each head writes, ``hook_result``, to this cache, from z and the output projections.

        [batch, pos, head, d_model] for every attention of the main tower; memory times the number of heads.
        What was cached already stays. The other methods here need no such call.

        Raises:
            AbsentPointError: No layer has heads.
            UnknownPointError: The cache lacks z somewhere; says where.
        """
        whole, layers = self._whole("compute_head_results"), self.registry.layers
        blocks = whole.architecture.blocks
        names = [
            f"{layers}.{index}.{branch.name}.hook_result"
            for index, block in enumerate(blocks)
            for branch in block.branches
            if has_heads(branch)
        ]
        self._need_one(has_heads, "hook_result")
        names = [name for name in names if name in self.registry]
        z = {name: f"{name.removesuffix('.hook_result')}.o.hook_in" for name in names}
        self._require([(z[name], name) for name in names])
        for name in names:
            if name in self.cache_dict:
                continue
            held = self[z[name]]
            like = held.new_empty(()).expand(*held.shape[:-2], self._d_model)
            stream = Stream(whole, self.registry, Shown(self, None), like)
            results, _ = head_results(stream, name)
            self.cache_dict[name] = results.movedim(0, -2).to(held.dtype)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> Any:
        """What every head before a layer adds to the stream that enters it, as it arrives there.

        Args:
            layer: Which; -1, None or the number of layers means behind the last.
            return_labels: Give the labels too, ``"L0H3"``.
            incl_remainder: One component more: the rest of the stream.
            pos_slice: Positions to take.
            apply_ln: As the norm that reads the stream there takes them; see `apply_ln_to_stack`.
        Returns:
            [component, ..., d_model]; with ``return_labels``, a pair of that and the labels.
        Raises:
            ArchitectureError: The stream is not known to be a sum, or a branch not to be that of its heads.
            AbsentPointError: No layer has heads.
            UnknownPointError: The cache lacks points; says which.
        """
        wanted = Wanted(branches=has_heads, enters=False, heads=True, only_parts=True)
        stream, end = self._stream("stack_head_results", layer, wanted, pos_slice)
        self._need_one(has_heads, "hook_result")
        return self._parts(
            stream, "head", end, incl_remainder, apply_ln, pos_slice, return_labels=return_labels
        )

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
    ) -> Any:
        """What every neuron before a layer adds to the stream that enters it, as it arrives there.

        Layers whose MLP is made of experts have none.

        Args:
            layer: Which; -1, None or the number of layers means behind the last.
            pos_slice: Positions to take; all neurons at all positions are large.
            neuron_slice: Neurons to take, the same in every layer.
            return_labels: Give the labels too, ``"L0N17"``.
            incl_remainder: One component more: the rest of the stream.
            apply_ln: As the norm that reads the stream there takes them; see `apply_ln_to_stack`.
        Returns:
            [component, ..., d_model]; with ``return_labels``, a pair of that and the labels.
        Raises:
            ArchitectureError: The stream is not known to be a sum, or a branch not to be that of its neurons.
            AbsentPointError: No layer has neurons.
            UnknownPointError: The cache lacks points; says which.
        """
        wanted = Wanted(branches=has_neurons, enters=False, neurons=True, only_parts=True)
        one = isinstance(neuron_slice, int) and not isinstance(neuron_slice, bool)
        which = [neuron_slice] if one else neuron_slice
        stream, end = self._stream("stack_neuron_results", layer, wanted, pos_slice, which)
        self._need_one(has_neurons, "out.hook_in")
        return self._parts(
            stream, "neuron", end, incl_remainder, apply_ln, pos_slice, return_labels=return_labels
        )

    def get_neuron_results(
        self, layer: int, neuron_slice: SliceInput = None, pos_slice: SliceInput = None
    ) -> Float[Tensor, "..."]:
        """What the neurons of one layer hand to their MLP's output, before any norm or factor behind it.

        Args:
            layer: Which; negative counts from the end.
            neuron_slice: Neurons to take; an int drops the dimension.
            pos_slice: Positions to take.
        Returns:
            [..., neuron, d_model]; not kept in the cache.
        Raises:
            AbsentPointError: That layer has no plain MLP.
            UnknownPointError: The cache lacks the neurons.
        """
        whole = self._whole("get_neuron_results")
        index = self._layer(layer)
        block, here = whole.architecture.blocks[index], f"{self.registry.layers}.{index}"
        branch = next((b for b in block.branches if has_neurons(b)), None)
        name = f"{here}.{'mlp' if branch is None else branch.name}.out.hook_in"
        if branch is None or name not in self.registry:
            raise self.registry.missing(f"{here}.mlp.out.hook_in")
        self._require([(name,)])
        shown = Shown(self, pos_slice)
        acts = shown[name]
        one = isinstance(neuron_slice, int) and not isinstance(neuron_slice, bool)
        like = acts.new_empty(()).expand(*acts.shape[:-1], self._d_model)
        which = [neuron_slice] if one else neuron_slice
        values, _ = neuron_results(Stream(whole, self.registry, shown, like, which), name)
        made = values.movedim(0, -2).to(acts.dtype)
        return made[..., 0, :] if one else made

    def _need_one(self, which: Callable[[Branch], bool], point: str) -> None:
        """Refuse a model in which no layer has heads, or neurons."""
        blocks, layers = self._whole(point).architecture.blocks, self.registry.layers
        names = [
            f"{layers}.{index}.{branch.name}.{point}"
            for index, block in enumerate(blocks)
            for branch in block.branches
            if which(branch)
        ]
        if not any(name in self.registry for name in names):
            usual = "attn" if which is has_heads else "mlp"
            raise self.registry.missing(f"{layers}.0.{usual}.{point}")

    def _parts(
        self,
        stream: Stream,
        kind: str,
        end: int,
        incl_remainder: bool,
        apply_ln: bool,
        pos_slice: SliceInput,
        return_labels: bool,
    ) -> Any:
        """The heads or neurons among a stream's summands, and the rest of it."""
        groups = [group for group in stream.groups if group[0].kind == kind]
        if incl_remainder:
            names = self._names_of(end)
            self._require([names])
            rest = wide(self.at_positions(self._held(names), pos_slice)).to(stream.device)
            for _, values in groups:
                rest = rest - values.sum(0)
            groups = [*groups, (Source("remainder", "remainder"), rest[None])]
        return self._answer(stream, groups, end, False, apply_ln, pos_slice, return_labels)
