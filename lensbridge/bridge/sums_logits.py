"""Components of the stream behind its norms, and what they do to logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..hooks import ArchitectureError, InputError
from .architecture import Norm
from .decompose import Source, norm_at, refuse_head, refuse_streams
from .matrix import linear_map
from .residual import Stream, device_of, head_factor, held_norm, norm_bias, tolerance_of, wide
from .slicing import SliceInput, take
from .sums import Groups, Sums
from .whole import Whole, module_of

Stack = Float[Tensor, "component *batch_and_pos d_model"]
Sliced = Float[Tensor, "component *batch_and_pos_out d_model"]


class LogitSums(Sums):
    """Norms and logits: a part of an `ActivationCache`."""

    def _answer(
        self,
        stream: Stream,
        groups: Groups,
        end: int,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: SliceInput,
        return_labels: bool,
    ) -> Any:
        """Components stacked, in the stream's dtype; behind a norm and with labels where asked."""
        empty = torch.zeros(0, *stream.shape, device=stream.device)
        stack = torch.cat([values for _, values in groups] or [empty]).to(stream.dtype)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        if not return_labels:
            return stack
        return stack, [label for group in groups for label in self._labels(stream, *group)]

    def _labels(self, stream: Stream, source: Source, values: Tensor) -> list[str]:
        which = torch.arange(len(values))
        if source.kind == "neuron" and stream.neurons is not None:
            count = self.registry[source.name].sizes["d_mlp"]
            which = take(torch.arange(count), stream.neurons, 0)
        return source.labels(which.tolist())

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Sliced:
        """Components of the stream as the norm that reads it takes them, its scale held at what it was.

        The norm's own weights are applied, whether or not they were folded; what it adds is no component's,
        so the results sum to the norm's output less its bias. Where a layer or the head reads the stream
        without a norm, they are as they were.

        Args:
            residual_stack: Components, [component, ..., d_model].
            layer: Whose norm; -1, None or the number of layers means the final one.
            mlp_input: That of the layer's MLP.
            pos_slice: The positions the components are of.
            batch_slice: Rows to take, of the components too.
            has_batch_dim: Whether the components have a batch dimension.
            recompute_ln: Run the norm itself on each component, with the component's own statistics (and with
                its bias).
        Raises:
            ArchitectureError: The norm is of no known form; says why.
            UnknownPointError: Its scale is not in the cache.
            InputError: The components are not of those rows and positions.
        """
        whole = self._whole("apply_ln_to_stack")
        refuse_streams(whole, self.registry)
        end = self._end(whole, layer, mlp_input)
        if batch_slice is not None and has_batch_dim:
            residual_stack = take(residual_stack, batch_slice, 1)
        found = norm_at(whole, self.registry, end, mlp_input=mlp_input)
        if found is None:
            return residual_stack
        if recompute_ln:
            module = module_of(self.registry[f"{found[0]}.hook_out"])
            here = residual_stack.device
            with torch.no_grad():
                return module.forward(residual_stack.to(device_of(module, here))).to(here)
        return self._behind(*found, residual_stack, pos_slice, batch_slice)

    def _behind(
        self, name: str, norm: Norm, stack: Stack, pos_slice: SliceInput, batch_slice: SliceInput
    ) -> Stack:
        """Components behind a norm whose scale is held."""
        if not norm.is_open:
            raise ArchitectureError(
                f"{name} ({norm.path}) is no norm of a known form, so its scale cannot be held; "
                "recompute_ln=True runs it on each component"
            )
        self._require([(f"{name}.hook_scale",)])
        scale = wide(self._at(f"{name}.hook_scale", pos_slice, batch_slice)).to(stack.device)
        if stack.shape[1:-1] != scale.shape[:-1] or stack.shape[-1] != self._d_model:
            raise InputError(
                f"the components are {list(stack.shape)}, and the scales of {name} {list(scale.shape)}: "
                "give the pos_slice and batch_slice that the components are of"
            )
        return held_norm(self.registry, name, norm, wide(stack), scale).to(stack.dtype)

    def _at(self, name: str, pos_slice: SliceInput, batch_slice: SliceInput) -> Tensor:
        value = self.at_positions(name, pos_slice)
        return take(value, batch_slice, 0) if self.has_batch_dim else value

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        *,
        linearise: bool = False,
    ) -> Float[Tensor, "component *batch_and_pos_out"]:
        """What components of the stream add to a logit, or to the difference of two, directly.

        Through the final norm, its scale held, and the head. What those two add by themselves is no
        component's: the results of a full decomposition and `logit_bias` sum to the model's logits.

        Args:
            residual_stack: Components of the stream behind the last layer, as `decompose_resid` gives them
                (not behind the norm), [component, ..., d_model].
            tokens: Whose logit: a token id, a text of one token, or ids of [batch], [pos] or [batch, pos].
            incorrect_tokens: If given, likewise: the logit of these is subtracted.
            pos_slice: The positions the components are of.
            batch_slice: Rows to take, of the components too; tokens are given for those rows.
            has_batch_dim: Whether the components have a batch dimension.
            linearise: Where more than a factor stands between head and logits (a soft cap), attribute what
                the head makes, before it.
        Raises:
            ArchitectureError: The head is more than one linear map, or more than a factor follows it.
            UnknownPointError: The cache lacks the norm's scale, or what norm and head pass on.
            InputError: Tokens that do not fit.
        """
        whole = self._whole("logit_attrs")
        factor = self._head_factor(whole, linearise)
        stack = self.apply_ln_to_stack(
            residual_stack, -1, False, pos_slice, batch_slice, has_batch_dim
        )
        directions, _ = self._directions(tokens, incorrect_tokens, stack)
        return ((wide(stack) * directions).sum(-1) * factor).to(stack.dtype)

    def logit_bias(
        self, tokens: Any, incorrect_tokens: Any = None, *, linearise: bool = False
    ) -> Float[Tensor, "*tokens"]:
        """What the final norm's bias and the head's add to a logit: what is left of it by `logit_attrs`.

        Args:
            tokens: As in `logit_attrs`.
            incorrect_tokens: As in `logit_attrs`.
            linearise: As in `logit_attrs`.
        Returns:
            One number a token, in the tokens' shape.
        """
        whole = self._whole("logit_bias")
        factor = self._head_factor(whole, linearise)
        directions, bias = self._directions(tokens, incorrect_tokens, None)
        scale = whole.architecture.logit_scale
        total = bias if linearise or scale is None else bias * scale
        norm = norm_at(whole, self.registry, len(whole.architecture.blocks), mlp_input=False)
        own = None if norm is None else norm_bias(self.registry, norm[0])
        return total if own is None else total + (directions * own.to(directions)).sum(-1) * factor

    def _head_factor(self, whole: Whole, linearise: bool) -> float:
        """By what the end of the stream is multiplied on its way to the logits, the head apart."""
        refuse_streams(whole, self.registry)
        refuse_head(whole, self.registry, linearise=linearise)
        tower = whole.architecture.main
        final = f"{self.registry.layers}.{len(tower.blocks) - 1}.hook_out"
        if tower.ln_final is not None:
            final = f"{tower.prefix}ln_final.hook_out"
        self._require([(final,), ("unembed.hook_in",)])
        made, read = self[final], self["unembed.hook_in"]
        if made.shape != read.shape:
            raise InputError(
                f"the head read {list(read.shape)} of the {list(made.shape)} that {final} made: a logit is "
                "attributed where every position makes one (leave out logits_to_keep)"
            )
        factor = head_factor(whole, wide(made), wide(read).to(made.device), tolerance_of(read))
        scale = whole.architecture.logit_scale
        return factor if scale is None or linearise else factor * scale

    # --- tokens ----------------------------------------------------------------------------------

    def _directions(
        self, tokens: Any, incorrect_tokens: Any, stack: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """By what the head multiplies what it reads, [..., d_model], and what it adds, for some tokens."""
        module = module_of(self.registry["unembed.hook_in"])
        like = self["unembed.hook_in"]
        weight, bias = linear_map(module, like.shape[-1], like)
        device = like.device if stack is None else stack.device
        directions, biases = [], []
        given = {"tokens": tokens}
        if incorrect_tokens is not None:
            given["incorrect_tokens"] = incorrect_tokens
        for what, value in given.items():
            ids = self._ids(value, what, weight.shape[1])
            ids = ids if stack is None else self._laid(ids, what, stack)
            at = ids.to(weight.device)
            directions.append(wide(weight.T[at]).to(device))
            own = torch.zeros(at.shape) if bias is None else wide(bias[at.to(bias.device)])
            biases.append(own.to(device))
        if len(given) == 1:
            return directions[0], biases[0]
        return directions[0] - directions[1], biases[0] - biases[1]

    def _ids(self, tokens: Any, what: str, d_vocab: int) -> Tensor:
        """Token ids of any shape.

        Raises:
            InputError: They are none, or outside the vocabulary.
        """
        if isinstance(tokens, str):
            tokens = self._whole(what).token(tokens)
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{what} must be token ids or a text of one token; got {tokens!r}"
            ) from error
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputError(f"{what} must be token ids or a text of one token; got {tokens!r}")
        outside = [x for x in ids.flatten().tolist() if not 0 <= x < d_vocab]
        if outside:
            raise InputError(f"{what}: id {outside[0]} is outside the vocabulary of {d_vocab}")
        return ids

    def _laid(self, ids: Tensor, what: str, stack: Tensor) -> Tensor:
        """Ids beside the components: for all, one a row, one a position, or one for each.

        Raises:
            InputError: They fit in no such way.
        """
        rows = tuple(stack.shape[1:-1])
        if ids.dim() == 1 and len(rows) == 2 and len(ids) == rows[0]:
            return ids[:, None]
        fits = ids.dim() <= len(rows) and all(
            a in (1, b) for a, b in zip(ids.shape[::-1], rows[::-1], strict=False)
        )
        if not fits:
            raise InputError(
                f"{what} are {list(ids.shape)} and the components are of {list(rows)}: give one token, one a "
                "row, one a position, or one for each"
            )
        return ids
