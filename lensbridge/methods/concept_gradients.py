"""Gradients of a model's outputs with respect to concepts its activations are rebuilt from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..bridge import frozen
from ..hooks import GradientError, HookNotFiredError, HookPoint, InputError
from .batches import Batch
from .granularity import Aggregation, Granularity

if TYPE_CHECKING:
    from .base_splitter import BaseSplitter

_AT_ONCE = 2**28
"""Elements that the gradients of all targets of one backward pass may have, at the place where they have the
most; more targets take several passes."""

_AT_ONCE_ON_CPU = 2**18
"""The same on the CPU, where it is the cache that they must fit: a pass over more is slower than two."""


class ConceptGradients:
    """Rebuilds one split point from concepts and differentiates what the model makes of it.

    With activations A at the rows, concepts C = encode(A) and the split point set to decode(C) there (and
    left as it is elsewhere: padding, special tokens), the gradient is that of the outputs with respect to C.
    ``encode`` is not differentiated. Outputs are the classes of a text where the model gives it one row of
    logits, and else each position's largest logit.

    Args:
        splitter: The model and its tokenizer.
        point: The hook point to rebuild.
    """

    def __init__(self, splitter: BaseSplitter, point: str) -> None:
        self.splitter = splitter
        self.bridge = splitter.bridge
        self.point = point

    def of(
        self,
        inputs: Any,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        *,
        targets: Any,
        granularity: Granularity,
        how: Aggregation,
        times_concepts: bool,
        normalizes: bool,
        tqdm_bar: bool,
        batch_size: int | None,
    ) -> list[Tensor]:
        """The gradients of each text, [target, row, concept]; see `BaseSplitter.concept_output_gradient`."""
        if granularity is Granularity.SAMPLE:
            raise InputError(
                "SAMPLE makes one row of a whole text, which cannot be put back in the places of its tokens"
            )
        if any(p.is_inference() for p in self.bridge.parameters()):
            raise GradientError(
                "the model was made under torch.inference_mode, so nothing can be differentiated through it: "
                "make it outside, or under torch.no_grad"
            )
        samples = self.splitter.samples(inputs, granularity)
        groups = self.splitter.groups(samples, granularity)
        wanted = _per_text(targets, len(samples))
        found: list[Any] = [None] * len(samples)
        # Also of the batches: a mask made under inference mode could not be saved for the backward pass.
        with torch.inference_mode(False):
            for batch in self.splitter.batches(samples, groups, how, batch_size, tqdm_bar):
                own = [wanted[i] for i in batch.texts]
                for text, grad, concepts in zip(
                    batch.texts, *self._differentiate(batch, encode, decode, own), strict=True
                ):
                    result = grad * concepts if times_concepts else grad
                    found[text] = (_shares(result) if normalizes else result).to("cpu", copy=True)
        return found

    def _differentiate(
        self,
        batch: Batch,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        wanted: list[list[int] | None],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each text of a batch its gradients [target, row, concept] and its concepts [row, concept]."""
        rebuild, head = _Rebuild(batch, encode, decode), _Head()
        hooks: list[Any] = [(self.point, rebuild)]
        if self._head_is_plain:
            hooks.append(("unembed.hook_in", head))
        with (
            frozen(self.bridge.unwrapped_model),
            torch.enable_grad(),
            # In the backward pass, too: checkpointed layers come by again there.
            self.bridge.hooks(fwd_hooks=hooks),
        ):
            logits = self.bridge(batch.ids, **self.splitter.options(batch))
            rebuild.is_over = True
            if not rebuild.has_passed:
                raise HookNotFiredError(f"the model ran to its end without passing {self.point}")
            outputs, which = _outputs(logits, batch, wanted)
            gradient = _jacobian(outputs, which, rebuild.concepts, head.states, logits.numel())
        concepts = rebuild.concepts.detach()
        parts = zip(gradient.split(batch.counts, dim=1), which, strict=True)
        return [grad[: len(own)] for grad, own in parts], list(concepts.split(batch.counts))

    @property
    def _head_is_plain(self) -> bool:
        """Whether a linear map, position by position, makes the logits."""
        path = self.bridge.architecture.unembed
        if path is None or "unembed.hook_in" not in self.bridge.registry:
            return False
        return isinstance(self.bridge.unwrapped_model.get_submodule(path), nn.Linear)


class _Head:
    """The hook function: keeps what goes into the head, as the head gets it."""

    states: Tensor | None = None

    def __call__(self, shown: Tensor, hook: HookPoint) -> Tensor:
        if self.states is None:
            self.states = shown
        return shown


class _Rebuild:
    """The hook function: puts in the place of a batch's rows what their concepts are decoded to.

    Attributes:
        concepts: The concepts, [row, concept]: a leaf to differentiate by.
        is_over: Whether the run is over, and what comes by is computed again for the backward pass.
    """

    concepts: Tensor

    def __init__(
        self, batch: Batch, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
    ) -> None:
        self.batch = batch
        self.encode = encode
        self.decode = decode
        self.has_passed = self.is_over = False

    def __call__(self, shown: Tensor, hook: HookPoint) -> Tensor:
        where = repr(str(hook.name).removeprefix("raw:"))
        if self.has_passed and not self.is_over:
            raise InputError(
                f"{where} is passed more than once in a run, and it is not clear what to rebuild; of the "
                "canonical names each means one passage"
            )
        if not torch.is_grad_enabled():
            raise GradientError(
                f"the model runs {where} without gradients, so its outputs cannot be differentiated by it"
            )
        states = self.batch.states(shown.detach(), hook)
        if len(states) != len(shown) or not states.is_floating_point():
            raise InputError(
                f"{where} shows {list(shown.shape)} {shown.dtype} of {len(states)} texts: only floats are "
                "rebuilt, and for each text its own (try batch_size=1)"
            )
        rows = self.batch.rows(states)
        # Both are computed in float32 at least, also of a half-precision model.
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not self.has_passed:
            self.concepts, self.has_passed = self._encoded(rows), True
        return self.batch.put_back(self._decoded(rows).to(states), states).view(shown.shape)

    def _encoded(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row concept"]:
        with torch.no_grad():
            concepts = self.encode(rows)
        is_fit = isinstance(concepts, Tensor) and concepts.dim() == 2 and len(concepts) == len(rows)
        if not is_fit or not concepts.is_floating_point():
            raise InputError(
                f"encode gave {_said(concepts)} for {len(rows)} rows; expected floats, [rows, concepts]"
            )
        return concepts.detach().requires_grad_()

    def _decoded(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        try:
            rebuilt = self.decode(self.concepts)
        except RuntimeError as error:
            if "nference tensors" not in str(error):
                raise
            raise GradientError(
                "decode computes with tensors that were made under torch.inference_mode, through which "
                "nothing can be differentiated: make them outside, or clone them there"
            ) from error
        if not isinstance(rebuilt, Tensor) or rebuilt.shape != rows.shape:
            raise InputError(
                f"decode gave {_said(rebuilt)}; the rows it rebuilds are {list(rows.shape)}"
            )
        if not _depends(rebuilt, self.concepts):
            raise GradientError(
                "decode is not differentiable: no graph leads from its result back to the concepts it got"
            )
        return rebuilt


def _said(given: object) -> str:
    if not isinstance(given, Tensor):
        return type(given).__name__
    return f"{'' if given.is_floating_point() else f'{given.dtype} '}{list(given.shape)}"


def _depends(value: Tensor, leaf: Tensor) -> bool:
    """Whether a graph leads from a value back to a leaf."""
    if value is leaf:
        return True
    seen, to_see = set(), [value.grad_fn]
    while to_see:
        node = to_see.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is leaf:  # the nodes that leaves end in
            return True
        to_see += [before for before, _ in node.next_functions]
    return False


def _outputs(
    logits: Tensor, batch: Batch, wanted: list[list[int] | None]
) -> tuple[Float[Tensor, "batch output"], list[list[int]]]:
    """The outputs of each text; and which of them are its targets."""
    if logits.dim() == 2:
        n = logits.shape[1]
        return logits, [_resolved(own, n, "class") for own in wanted]
    if logits.shape[:2] != batch.ids.shape:
        raise InputError(
            f"the model's logits have shape {list(logits.shape)}, neither [batch, class] nor [batch, pos, "
            f"d_vocab] for {len(batch.ids)} x {batch.ids.shape[1]} tokens"
        )
    lengths = batch.mask.sum(1).tolist()
    which = [
        [first + position for position in _resolved(own, n, "position")]
        for own, n, first in zip(wanted, lengths, batch.firsts, strict=True)
    ]
    return logits.max(-1).values, which


def _jacobian(
    outputs: Float[Tensor, "batch output"],
    which: list[list[int]],
    concepts: Float[Tensor, "row concept"],
    head: Tensor | None,
    n_logits: int,
) -> Float[Tensor, "target row concept"]:
    """Gradients of the k-th targets of all texts, in as few backward passes as fit.

    Texts do not see each other, so the gradient of a sum over them is the gradient of each.

    Args:
        outputs: What is differentiated.
        which: The targets of each text.
        concepts: By what.
        head: What goes into the head, [batch, pos, d_model], where the head is linear.
        n_logits: How many logits there are.
    """
    most = max(len(own) for own in which)
    made = concepts.new_zeros(most, *concepts.shape)
    if not made.numel():
        return made
    source, slopes, size = outputs, torch.ones_like(outputs), n_logits
    if head is not None and head.requires_grad and head.shape[:-1] == outputs.shape:
        # A position's logits come from its own states: one pass through the head does for all targets, and
        # of the vocabulary's many gradients none has to be held for each of them.
        (slopes,) = torch.autograd.grad(outputs.sum(), head)
        source, size = head, head.numel()
    limit = _AT_ONCE_ON_CPU if source.device.type == "cpu" else _AT_ONCE
    at_once = max(1, limit // max(concepts.numel(), size))
    for start in range(0, most, at_once):
        stop = min(start + at_once, most)
        weights = source.new_zeros(stop - start, *source.shape)
        for text, own in enumerate(which):
            picked = own[start:stop]
            weights[range(len(picked)), text, picked] = slopes[text, picked]
        is_one = len(weights) == 1
        (grad,) = torch.autograd.grad(
            source,
            concepts,
            weights[0] if is_one else weights,
            retain_graph=stop < most,
            is_grads_batched=not is_one,
            allow_unused=True,
        )
        if grad is not None:
            made[start:stop] = grad
    return made


def _shares(gradient: Float[Tensor, "target row concept"]) -> Float[Tensor, "target row concept"]:
    """Divided by the sum of absolute values of each target; of one that nothing changes there is no share."""
    total = gradient.abs().sum((1, 2), keepdim=True)
    return torch.where(total > 0, gradient / total, torch.zeros_like(gradient))


# --- targets ------------------------------------------------------------------------------------------------


def _per_text(targets: Any, n: int) -> list[list[int] | None]:
    """The targets of each text: common ones, or one list a text.

    Raises:
        InputError: Lists that are not one a text, or entries that are no whole numbers.
    """
    if targets is None:
        return [None] * n
    plain: Any = targets
    if isinstance(targets, (Tensor, np.ndarray, np.generic)):
        plain = targets.tolist()
    if _is_whole(plain):
        return [[int(plain)]] * n
    items = None if isinstance(plain, (str, bytes, Mapping)) else plain
    if not isinstance(items, Iterable) or not (items := list(items)):
        raise _no_targets(targets)
    if all(_is_whole(item) for item in items):
        return [[int(item) for item in items]] * n
    lists: list[list[int] | None] = [_whole_numbers(item, targets) for item in items]
    if len(lists) != n:
        raise InputError(f"targets has {len(lists)} lists for {n} texts")
    return lists


def _whole_numbers(item: Any, targets: Any) -> list[int]:
    """The targets of one text."""
    plain = item.tolist() if isinstance(item, (Tensor, np.ndarray)) else item
    items = [plain] if _is_whole(plain) else plain
    if not isinstance(items, (list, tuple, range)) or not all(_is_whole(x) for x in items):
        raise _no_targets(targets)
    return [int(x) for x in items]


def _is_whole(item: Any) -> bool:
    return isinstance(item, (int, np.integer)) and not isinstance(item, bool)


def _no_targets(targets: Any) -> InputError:
    return InputError(
        "targets are whole numbers, positions or classes: one, a list, or a list of lists, one for each "
        f"text; got {targets!r}"
    )


def _resolved(wanted: list[int] | None, n: int, what: str) -> list[int]:
    if wanted is None:
        return list(range(n))
    for target in wanted:
        if not -n <= target < n:
            raise InputError(f"target {target} is not a {what}: there are {n}")
    return [target % n for target in wanted]
