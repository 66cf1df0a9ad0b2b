"""Weights of a bridge under the field's names: per layer, stacked, and as circuits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..hooks import AbsentPointError, InputError, LayerRangeError, PointError
from .bias_sum import BiasSum
from .layers import Layers
from .parameters import WeightTable
from .run import Stack
from .tl_names import tl_names
from .tokens import Tokens
from .view import BlocksView
from .whole import Whole


class Weights(Layers):
    """Looking at the weights of a bridge.

    A weight of one layer is a view of the model's parameter wherever its layout allows one
    (``bridge.blocks[0].attn.W_Q``, or by name with `weight`); stacks over layers are copies. Biases a model
    does not have are zeros.
    """

    _inner: nn.Module
    _tokens: Tokens
    _stack: Stack

    def weight(self, name: str, expand_groups: bool = False) -> Any:
        """A weight by name: ``bridge.weight("blocks.0.attn.W_Q")``.

        Args:
            name: Of what stands in `weight_names`.
            expand_groups: Repeat the heads of keys and values that several query heads share, so that
                there is one for each query head; a copy.
        Returns:
            A tensor; a `FactoredMatrix` for ``QK`` and ``OV``.
        Raises:
            AbsentPointError: This model has no such weight; the message says why.
            UnknownPointError: No model has.
        """
        return self._weights.read(name, expand_groups=expand_groups)

    @property
    def weight_names(self) -> list[str]:
        """The names of this model's weights, in the order of the model."""
        return list(self._weights)

    # --- outside the layers ------------------------------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """What the token embedding makes of each token."""
        return self._of_main("embed.W_E")

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The embedding of each position."""
        return self._of_main("pos_embed.W_pos")

    @property
    def W_E_pos(self) -> Float[Tensor, "row d_model"]:
        """`W_E`, and below it `W_pos`."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The head: the final norm's output times this is what it makes (`b_U` aside)."""
        return self.weight("unembed.W_U")

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The head's bias."""
        return self.weight("unembed.b_U")

    # --- stacked over layers -----------------------------------------------------------------------------

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Queries, all layers."""
        return self._every_layer("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Keys, all layers; heads that query heads share once."""
        return self._every_layer("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Values, all layers; heads that query heads share once."""
        return self._every_layer("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """What each head writes, all layers."""
        return self._every_layer("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Biases of queries, all layers."""
        return self._every_layer("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Biases of keys, all layers."""
        return self._every_layer("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Biases of values, all layers."""
        return self._every_layer("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Biases of what attention writes, all layers."""
        return self._every_layer("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer *expert d_model d_mlp"]:
        """Into the MLPs' hidden layers (what the gate multiplies, in a gated one), all layers."""
        return self._every_layer("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer *expert d_model d_mlp"]:
        """Into the MLPs' gates, all layers."""
        return self._every_layer("mlp", "W_gate")

    @property
    def W_out(self) -> Float[Tensor, "layer *expert d_mlp d_model"]:
        """Out of the MLPs' hidden layers, all layers."""
        return self._every_layer("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer *expert d_mlp"]:
        """Biases of the MLPs' hidden layers, all layers."""
        return self._every_layer("mlp", "b_in")

    @property
    def b_gate(self) -> Float[Tensor, "layer *expert d_mlp"]:
        """Biases of the MLPs' gates, all layers."""
        return self._every_layer("mlp", "b_gate")

    @property
    def b_out(self) -> Float[Tensor, "layer *expert d_model"]:
        """Biases of what the MLPs write, all layers."""
        return self._every_layer("mlp", "b_out")

    def stack_params_for(
        self,
        submodule: str,
        attr: str,
        *,
        layers: list[int] | None = None,
        expand_groups: bool = False,
        tower: str | None = None,
    ) -> tuple[list[int], Tensor]:
        """A weight of those layers that have it: ``bridge.stack_params_for("attn", "W_Q")``.

        Args:
            submodule: ``"attn"``, ``"cross_attn"``, ``"mlp"``, ``"mlp.router"``, ``"ln1"``...
            attr: ``"W_Q"``, ``"b_in"``, ``"w"``...
            layers: Which layers; every one that has it unless given.
            expand_groups: As in `weight`.
            tower: Which tower, by the beginning of its names (``"vision_"``); the main one unless given.
        Returns:
            The indices of the layers, and the stack [layer, ...], a copy on the first layer's device.
        Raises:
            AbsentPointError: No layer has it, or one of ``layers`` has not, or it cannot be read.
            InputError: The shapes differ, so that they cannot be stacked; ``layers`` chooses.
        """
        one = self._tower(tower)
        start = f"{one.prefix}blocks"
        found: dict[int, Tensor] = {}
        every = BlocksView(self.registry, len(one.blocks), start)
        if layers is not None:
            for index in map(every.index, layers):
                found[index] = self.weight(f"{start}.{index}.{submodule}.{attr}", expand_groups)
        else:
            names = {i: f"{start}.{i}.{submodule}.{attr}" for i in range(len(every))}
            found = {
                i: self.weight(name, expand_groups)
                for i, name in names.items()
                if name in self._weights
            }
            if not found:
                raise self._nowhere(f"{submodule}.{attr}", list(names.values()))
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, value in found.items():
            shapes.setdefault(tuple(value.shape), []).append(index)
        if len(shapes) > 1:
            each = "; ".join(f"{list(shape)} in layers {at}" for shape, at in shapes.items())
            some = next(iter(shapes.values()))
            raise InputError(
                f"{submodule}.{attr} differs in shape, so the layers cannot be stacked: {each}. Stack some "
                f"with stack_params_for({submodule!r}, {attr!r}, layers={some}), or read one with "
                f"bridge.blocks[i].{submodule}.{attr}"
            )
        first = next(iter(found.values()))
        return list(found), torch.stack([value.to(first.device) for value in found.values()])

    # --- all at once -------------------------------------------------------------------------------------

    def get_params(self) -> dict[str, Tensor]:
        """Every weight by name, of all towers; biases a model does not have are zeros.

        Those in `weight_names` that cannot be read are not in it; `weight` says of each why.
        """
        table = self._weights
        found = {name: table.read_or_none(name) for name, one in table.items() if one.axes}
        return {name: value for name, value in found.items() if value is not None}

    def tl_parameters(self) -> dict[str, Tensor]:
        """The main tower's weights as TransformerLens's HookedTransformer names and shapes its parameters.

        ``blocks.0.attn.W_Q``; keys and values of grouped heads are ``_W_K``, ``_W_V``; a router is
        ``mlp.W_gate`` and its experts ``mlp.experts.0.W_in.weight``, [d_mlp, d_model].
        """
        return dict(tl_names(self.get_params(), self.architecture))

    @property
    def n_params_total(self) -> int:
        """How many numbers its parameters are, shared ones once, embeddings and norms among them."""
        from transformers import PreTrainedModel

        if isinstance(self._inner, PreTrainedModel):
            return self._inner.num_parameters()  # which knows of packed ones
        return sum(parameter.numel() for parameter in self._inner.parameters())

    # --- directions --------------------------------------------------------------------------------------

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """What biases alone have added to the residual stream entering a layer.

        Args:
            layer: Its index, ``n_layers`` for behind the last one; negative counts from the end.
            mlp_input: At the input of this layer's MLP, so with what its attention adds.
            include_mlp_biases: Whether those of the MLPs count.
        Raises:
            AbsentPointError: Biases are not simply added in this model; the message says why.
            LayerRangeError: No such layer.
        """
        index = self._stack.layer(layer, "layer")
        if mlp_input and index == len(self.architecture.blocks):
            raise LayerRangeError(f"layer {layer} is behind the last one and has no MLP")
        return BiasSum(Whole(self._inner, self.architecture), self._weights).up_to(
            index, mlp_input=mlp_input, include_mlp_biases=include_mlp_biases
        )

    def tokens_to_residual_directions(
        self, tokens: str | int | list[str] | list[int] | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """The direction of the final norm's output that raises a token's logit: its column of `W_U`.

        Args:
            tokens: A token as text or id, or several, of any shape.
        Returns:
            Directions, [..., d_model]; one for a single token.
        Raises:
            InputError: Text that is not one token, or an id outside the vocabulary.
        """
        if isinstance(tokens, str):
            tokens = self._tokens.to_single_token(tokens)
        elif isinstance(tokens, list):
            tokens = [self._tokens.to_single_token(t) if isinstance(t, str) else t for t in tokens]
        W_U = self.W_U
        ids = torch.as_tensor(tokens, device=W_U.device)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"tokens are ids or text, got a tensor of {ids.dtype}")
        size = W_U.shape[1]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise InputError(
                f"token ids are from 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        return W_U.T[ids]

    # --- inside ------------------------------------------------------------------------------------------

    @property
    def _weights(self) -> WeightTable:
        return self.registry.weights

    def _of_main(self, name: str) -> Tensor:
        return self.weight(f"{self.architecture.main.prefix}{name}")

    def _every_layer(self, submodule: str, attr: str) -> Tensor:
        """A stack over all layers of the main tower."""
        self._check_every_layer(
            submodule, attr, f"bridge.stack_params_for({submodule!r}, {attr!r})"
        )
        return self.stack_params_for(submodule, attr)[1]

    def _check_every_layer(self, submodule: str, attr: str, instead: str) -> None:
        main = self.architecture.main
        names = [f"{main.prefix}blocks.{i}.{submodule}.{attr}" for i in range(len(main.blocks))]
        lacking = [index for index, name in enumerate(names) if name not in self._weights]
        if lacking and len(lacking) < len(names):
            why = self._weights.why(names[lacking[0]]) or "it was not found"
            raise AbsentPointError(
                f"not every layer has {submodule}.{attr}: layers {lacking} have not ({why}); "
                f"{instead} gives those that have it, with their indices"
            )

    def _nowhere(self, what: str, names: list[str]) -> PointError:
        errors = [self._weights.missing(name) for name in names]
        absent = [error for error in errors if isinstance(error, AbsentPointError)]
        text = "; ".join(dict.fromkeys(str(error) for error in (absent or errors)[:2]))
        return type((absent or errors or [AbsentPointError()])[0])(
            f"no layer has {what}: {text or 'there are no layers'}"
        )
