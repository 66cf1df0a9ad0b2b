"""Gradients of a model's outputs with respect to concepts its activations are rebuilt from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hooks import GradientError, HookPoint, InputError
from .granularity import Aggregation, Granularity, Sample, groups_of, rows_of

if TYPE_CHECKING:
    from .splitters import BaseSplitter

_AT_ONCE = 2**28
"""Elements of all gradients of one batched backward pass together; more targets take several passes."""


class ConceptGradients:
    """Rebuilds one split point from concepts and differentiates what the model makes of it.

    With activations A at the rows, concepts C = encode(A) and the split point set to decode(C) there (and
    left as it is elsewhere: padding, special tokens), the gradient is that of the outputs with respect to C.
    ``encode`` is not differentiated.

    Args:
        splitter: The model and its tokenizer.
        point: The hook point to rebuild.
        classifies: Whether outputs are classes of a text ([batch, class]) instead of logits by position, of
            which each position's largest is meant.
    """

    def __init__(self, splitter: BaseSplitter, point: str, classifies: bool) -> None:
        self.splitter = splitter
        self.bridge = splitter.bridge
        self.point = point
        self.classifies = classifies

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
        """The gradients of each text, [target, row, concept]; see `ModelWithSplitPoints`."""
        if granularity is Granularity.SAMPLE:
            raise InputError(
                "SAMPLE makes one row of a whole text, which cannot be put back in the places of its tokens"
            )
        samples = self.splitter.samples(inputs)
        cls_id = self.splitter.tokenizer.cls_token_id
        groups = [groups_of(sample, granularity, cls_id) for sample in samples]
        wanted = _per_text(targets, len(samples))
        found: list[Any] = [None] * len(samples)
        for chunk, ids, mask in self.splitter.batches(samples, batch_size, tqdm_bar):
            batch = _Batch(ids, mask, [groups[i] for i in chunk], how)
            gradients, concepts = self._differentiate(
                batch, encode, decode, [wanted[i] for i in chunk], [samples[i] for i in chunk]
            )
            for index, grad, own in zip(chunk, gradients, concepts, strict=True):
                result = grad * own if times_concepts else grad
                if normalizes:
                    total = result.abs().sum((1, 2), keepdim=True)
                    # Of a target that nothing changes there is no share to give.
                    result = torch.where(total > 0, result / total, torch.zeros_like(result))
                found[index] = result.cpu()
        return found

    def _differentiate(
        self,
        batch: _Batch,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        wanted: list[list[int] | None],
        samples: list[Sample],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each text of a batch its gradients [target, row, concept] and its concepts [row, concept]."""
        held: list[Tensor] = []

        def rebuild(tensor: Tensor, hook: HookPoint) -> Tensor:
            states = tensor.detach()
            with torch.no_grad():
                rows = batch.rows(states)
                # Concepts are computed in float32 at least, also of a half-precision model.
                rows = rows if rows.dtype == torch.float64 else rows.float()
                concepts = encode(rows)
            if (
                not isinstance(concepts, Tensor)
                or concepts.dim() != 2
                or len(concepts) != len(rows)
            ):
                shape = list(concepts.shape) if isinstance(concepts, Tensor) else type(concepts)
                raise InputError(
                    f"encode gave {shape} for {len(rows)} rows; expected [rows, concepts]"
                )
            held.append(concepts.detach().requires_grad_())
            rebuilt = decode(held[0])
            if rebuilt.shape != rows.shape:
                raise InputError(
                    f"decode gave {list(rebuilt.shape)}; the rows it rebuilds are {list(rows.shape)}"
                )
            if not rebuilt.requires_grad:
                raise GradientError(
                    "decode is not differentiable: its result does not depend on the concepts"
                )
            return batch.put_back(rebuilt.to(states.dtype), states)

        padding = None if bool(batch.mask.all()) else batch.mask
        with self.splitter.frozen(), torch.enable_grad():
            logits = self.bridge.run_with_hooks(
                batch.ids, attention_mask=padding, fwd_hooks=[(self.point, rebuild)]
            )
            outputs, which = self._outputs(logits, batch, wanted, samples)
            gradient = _jacobian(outputs, held[0])
        concepts = held[0].detach()
        counts = [len(groups) for groups in batch.groups]
        parts = zip(gradient.split(counts, dim=1), concepts.split(counts), which, strict=True)
        grads = [grad[: len(own)] for grad, _, own in parts]
        return grads, list(concepts.split(counts))

    def _outputs(
        self,
        logits: Tensor,
        batch: _Batch,
        wanted: list[list[int] | None],
        samples: list[Sample],
    ) -> tuple[Tensor, list[list[int]]]:
        """The sum over texts of their k-th targets, [most targets]; and the targets of each text.

        Texts do not see each other, so the gradient of a sum over them is the gradient of each.
        """
        if self.classifies:
            n, values = logits.shape[-1], logits
            which = [_resolved(own, n, "class") for own in wanted]
        else:
            values = logits.max(-1).values
            lengths = [len(sample.ids) for sample in samples]
            which = [
                [batch.first(row) + p for p in _resolved(own, n, "position")]
                for row, (own, n) in enumerate(zip(wanted, lengths, strict=True))
            ]
        most = max((len(own) for own in which), default=0)
        picked = [
            sum(values[row, own[k]] for row, own in enumerate(which) if k < len(own))
            for k in range(most)
        ]
        return torch.stack([torch.as_tensor(x) for x in picked]), which


class _Batch:
    """Texts that run together, and where their rows are."""

    def __init__(
        self, ids: Tensor, mask: Tensor, groups: list[list[list[int]]], how: Aggregation
    ) -> None:
        self.ids = ids
        self.mask = mask
        self.groups = groups
        self.how = how

    def first(self, row: int) -> int:
        """The column of a text's first token."""
        return int(self.mask[row].argmax())

    def _columns(self, row: int) -> list[list[int]]:
        first = self.first(row)
        return [[first + p for p in group] for group in self.groups[row]]

    def rows(self, states: Tensor) -> Tensor:
        """All rows of all texts, [row, d]."""
        made = [rows_of(states[row], self._columns(row), self.how) for row in range(len(states))]
        return torch.cat(made)

    def put_back(self, rows: Tensor, states: Tensor) -> Tensor:
        """The states with the rows in the places they were taken from, [batch, pos, d]."""
        texts, columns, values = [], [], []
        given = iter(rows.split(1))
        for text in range(len(states)):
            for group in self._columns(text):
                values.append(self.how.unfold(next(given), len(group)))
                texts += [text] * len(group)
                columns += group
        if not values:
            return states
        index = torch.tensor(texts), torch.tensor(columns)
        return states.index_put(tuple(i.to(states.device) for i in index), torch.cat(values))


def _jacobian(outputs: Tensor, concepts: Tensor) -> Tensor:
    """Gradients of each output, [output, row, concept], in as few backward passes as fit."""
    n = len(outputs)
    at_once = max(1, min(n, _AT_ONCE // max(concepts.numel(), 1)))
    made = []
    for start in range(0, n, at_once):
        rows = torch.eye(n, device=outputs.device, dtype=outputs.dtype)[start : start + at_once]
        (grad,) = torch.autograd.grad(
            outputs,
            concepts,
            rows,
            retain_graph=start + at_once < n,
            is_grads_batched=True,
            allow_unused=True,
        )
        made.append(concepts.new_zeros(len(rows), *concepts.shape) if grad is None else grad)
    return torch.cat(made) if made else concepts.new_zeros(0, *concepts.shape)


def _per_text(targets: Any, n: int) -> list[list[int] | None]:
    """The targets of each text: common ones, or one list a text.

    Raises:
        InputError: Lists that are not one a text, or entries that are no whole numbers.
    """
    if targets is None:
        return [None] * n
    given = targets.tolist() if isinstance(targets, Tensor) else targets
    given = [given] if isinstance(given, int) else list(given)
    if not given or any(isinstance(item, bool) for item in given):
        raise InputError(f"targets are positions or classes, got {targets!r}")
    if all(isinstance(item, int) for item in given):
        return [given] * n
    if len(given) != n:
        raise InputError(f"targets has {len(given)} lists for {n} texts")
    return [[item] if isinstance(item, int) else list(item) for item in given]


def _resolved(wanted: list[int] | None, n: int, what: str) -> list[int]:
    if wanted is None:
        return list(range(n))
    for target in wanted:
        if not -n <= target < n:
            raise InputError(f"target {target} is not a {what}: there are {n}")
    return [target % n for target in wanted]
