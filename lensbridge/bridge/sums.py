"""What the arithmetic of a cache rests on: which points it needs, which it holds, at which positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..hooks import HookRegistry, InputError, UnknownPointError
from .decompose import Source, Wanted, before_mlp, layer_number, needed, refuse_sum, stream_steps
from .residual import Stream
from .slicing import SliceInput, pos_dim, take
from .whole import Whole, owner_of

Groups = list[tuple[Source, Tensor]]


class Shown:
    """What a cache holds, at some positions.

    Args:
        cache: The cache.
        pos_slice: Which positions.
    """

    def __init__(self, cache: Sums, pos_slice: SliceInput) -> None:
        self.cache = cache
        self.pos_slice = pos_slice

    def __contains__(self, name: str) -> bool:
        return name in self.cache

    def __getitem__(self, name: str) -> Tensor:
        return self.cache.at_positions(name, self.pos_slice)


class Sums:
    """The part of an `ActivationCache` that its arithmetic rests on."""

    cache_dict: dict[str, Tensor]
    registry: HookRegistry
    has_batch_dim: bool
    tokens: Tensor | None

    def __getitem__(self, key: Any) -> Tensor:
        raise NotImplementedError

    def __contains__(self, key: object) -> bool:
        raise NotImplementedError

    def _layer(self, layer: Any) -> int:
        raise NotImplementedError

    # --- the model and its layers ----------------------------------------------------------------

    def _whole(self, what: str) -> Whole:
        return owner_of(self.registry, what)

    def _end(self, whole: Whole, layer: int | None, mlp_input: bool = False) -> int:
        """A place on the stream; the MLP's input is only inside a layer that has one."""
        end = layer_number(whole.architecture, layer)
        if mlp_input:
            if end == len(whole.architecture.blocks):
                raise InputError("mlp_input: behind the last layer there is no MLP; name a layer")
            before_mlp(whole.architecture.blocks[end], f"{self.registry.layers}.{end}")
        return end

    @property
    def _d_model(self) -> int:
        return self.registry[f"{self.registry.layers}.0.hook_in"].sizes["d_model"]

    # --- what is held ----------------------------------------------------------------------------

    def at_positions(self, name: str, pos_slice: SliceInput) -> Tensor:
        """What a point showed, at some positions.

        Raises:
            InputError: There are no such positions, or one was picked before.
        """
        tensor = self[name]
        if pos_slice is None:
            return tensor
        axes = self.registry[name].axes
        if tensor.dim() != len(axes.split()) - (not self.has_batch_dim):
            raise InputError(
                f"pos_slice: {name} is {list(tensor.shape)}; this cache holds one position already"
            )
        return take(tensor, pos_slice, pos_dim(axes) - (not self.has_batch_dim))

    def _require(self, names: Sequence[tuple[str, ...]]) -> None:
        """Check that points are held; of several names, any will do.

        Raises:
            UnknownPointError: Some are not; names all of them.
            AbsentPointError: The model lacks one; says why.
        """
        lacking = []
        for several in names:
            if not any(name in self for name in several):
                known = [name for name in several if name in self.registry]
                if not known:
                    raise self.registry.missing(several[0])
                lacking.append(self.registry.canonical(known[0]))
        if lacking:
            raise UnknownPointError(
                f"this needs {len(names)} points and the cache lacks {len(lacking)} of them, which the run "
                f"has to keep (names_filter): {', '.join(lacking)}"
            )

    def _held(self, names: Sequence[str]) -> str:
        """The first of some names that is held."""
        return next(name for name in names if name in self)

    def _names_of(self, layer: int, mlp_input: bool = False) -> tuple[str, ...]:
        """The points that show the stream at a place."""
        layers, blocks = self.registry.layers, self._whole("the stream").architecture.blocks
        here = f"{layers}.{layer}"
        if mlp_input:
            names = [f"{here}.hook_mlp_in", f"{here}.hook_resid_mid"]
            names += [f"{here}.hook_in"] * (before_mlp(blocks[layer], here) == 0)
        else:
            names = [f"{here}.hook_in"] if layer < len(blocks) else []
            if layer == len(blocks) or (layer and blocks[layer - 1].is_chained):
                names.append(f"{layers}.{layer - 1}.hook_out")
        return tuple(name for name in names if name in self.registry)

    # --- sums ------------------------------------------------------------------------------------

    def _stream(
        self,
        what: str,
        layer: int | None,
        wanted: Wanted,
        pos_slice: SliceInput,
        neurons: SliceInput = None,
        *,
        mlp_input: bool = False,
    ) -> tuple[Stream, int]:
        """The wanted summands of the stream that enters a layer, and which layer that is."""
        whole = self._whole(what)
        end = self._end(whole, layer, mlp_input)
        refuse_sum(whole, self.registry, end, is_inside=mlp_input)
        made = stream_steps(whole, self.registry, end, wanted, mlp_input=mlp_input)
        names = needed(made, embeds=self.tokens is not None)
        self._require(names)
        stream = Stream(
            whole,
            self.registry,
            Shown(self, pos_slice),
            self._like([self._names_of(end, mlp_input), *names], pos_slice),
            neurons,
        )
        stream.follow(made)
        return stream, end

    def _like(self, names: Sequence[tuple[str, ...]], pos_slice: SliceInput) -> Tensor:
        """A tensor with the rows and positions of the stream."""
        layers = self.registry.layers
        every = [*(x for xs in names for x in xs), f"{layers}.0.hook_in", *self.cache_dict]
        for name in every:
            if not name.startswith(f"{layers}.") or name not in self:
                continue
            axes = self.registry[name].axes if name in self.registry else ""
            if axes.startswith("batch pos"):
                value = self.at_positions(name, pos_slice)
                lead = value.dim() - len(axes.split()) + 2
                return value.new_empty(()).expand(*value.shape[:lead], self._d_model)
        raise UnknownPointError(f"the cache lacks {layers}.0.hook_in, which the run has to keep")

    def _check_sum(self, stream: Stream, end: int, mlp_input: bool) -> None:
        """Hold a full sum against the stream, where that was cached."""
        for name in self._names_of(end, mlp_input):
            if name in self:
                stream.check(name)
                return


def stacked(found: list[Tensor], what: str) -> Float[Tensor, "layer ..."]:
    """Tensors of one shape, stacked.

    Raises:
        InputError: Their shapes differ.
    """
    shapes = {tuple(x.shape) for x in found}
    if len(shapes) != 1:
        every = ", ".join(str(list(shape)) for shape in sorted(shapes)) or "none"
        raise InputError(f"{what} cannot be stacked over the layers: its shapes are {every}")
    return torch.stack(found)


def with_one_bias(groups: Groups, like: Stream | None = None) -> Groups:
    """All biases as one component, the last; of a stream without any, zeros for a stream that is given."""
    biases = [values.sum(0, keepdim=True) for source, values in groups if source.kind == "bias"]
    if not biases and like is not None:
        biases = [torch.zeros(1, *like.shape, device=like.device)]
    others = [group for group in groups if group[0].kind != "bias"]
    if not biases:
        return others
    return [*others, (Source("bias", "bias"), torch.cat(biases).sum(0, keepdim=True))]
