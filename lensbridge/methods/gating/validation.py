"""Whether gates say the truth: run the heads they name, and run without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...hooks import InputError
from .chg import CHG
from .data import CHGDataset
from .objectives import Objective, TargetTokens
from .tasks import losses_of

AT_ONCE = 256
"""Rows, counted under every mask, that are run at once."""


@dataclass(frozen=True)
class Evaluation:
    """How well circuits do: scores are minus the objective, so with targets log-probabilities in nats.

    Attributes:
        rows: On how many rows.
        full, empty: With every head, and with none of the gated ones.
        circuits: With the heads whose G- is above 0.5, under each mask; None if there is no G-.
        removed: Without those.
    """

    rows: int
    full: float
    empty: float
    circuits: Float[Tensor, " mask"] | None = None
    removed: Float[Tensor, " mask"] | None = None


@dataclass(frozen=True)
class AblationCurve:
    """What happens as heads are closed one after the other.

    Attributes:
        heads: (layer, head) in the order they were closed.
        closed: How many were closed at each point of the curve, from 0.
        scores: The score there, minus the objective.
    """

    heads: list[tuple[int, int]]
    closed: list[int]
    scores: Float[Tensor, " point"]


@dataclass(frozen=True)
class CircuitCheck:
    """A circuit against random ones of its size.

    Attributes:
        n_heads: How many heads it has.
        score, full, empty: Of the circuit, of the whole model, of none of the gated heads.
        faithfulness: How much of what the heads are worth it keeps: (score - empty) / (full - empty).
        completeness: How much of it goes when the circuit goes: 1 - (removed - empty) / (full - empty).
        random_faithfulness, random_completeness: Those of random circuits of the same size.
    """

    n_heads: int
    score: float
    full: float
    empty: float
    faithfulness: float
    completeness: float
    random_faithfulness: Float[Tensor, " circuit"]
    random_completeness: Float[Tensor, " circuit"]


@torch.no_grad()
def scores_under(
    chg: CHG,
    dataset: CHGDataset,
    masks: Tensor,
    objective: Objective | None = None,
    *,
    max_rows: int | None = None,
) -> Float[Tensor, " mask"]:
    """The mean score of a dataset's rows under each of several masks.

    Args:
        chg: The gated model.
        dataset: Rows.
        masks: Gates, [mask, layer, head], or one mask, [layer, head].
        objective: None for the log-probability of the targets, in nats a token.
        max_rows: Only the first so many.
    Returns:
        Minus the objective, in float64, on the CPU.
    """
    objective = TargetTokens() if objective is None else objective
    rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    gates = chg.gates(masks)
    found = []
    with chg.still():
        for part in gates.split(AT_ONCE):
            size = max(AT_ONCE // len(part), 1)
            total = torch.zeros(len(part), dtype=torch.float64)
            for start in range(0, rows, size):
                batch = dataset.batch(range(start, min(start + size, rows)))
                total -= losses_of(chg, objective, batch, part).double().sum(0).cpu()
            found.append(total / rows)
    return torch.cat(found)


def evaluate(
    chg: CHG,
    dataset: CHGDataset,
    closed: Float[Tensor, "mask layer head"] | None,
    objective: Objective | None = None,
    max_rows: int = 256,
) -> Evaluation:
    """Run the whole model, none of its heads, and the circuits of G-, on a dataset's first rows."""
    ends = torch.stack([torch.ones(chg.mask_shape), torch.zeros(chg.mask_shape)])
    parts = [ends]
    if closed is not None:
        circuits = (closed > 0.5).float().cpu()
        parts += [circuits, 1 - circuits]
    scores = scores_under(chg, dataset, torch.cat(parts), objective, max_rows=max_rows)
    full, empty = scores[:2].tolist()
    kept, removed = (None, None) if closed is None else scores[2:].chunk(2)
    return Evaluation(min(max_rows, len(dataset)), full, empty, kept, removed)


def ablation_curve(
    chg: CHG,
    dataset: CHGDataset,
    order: Float[Tensor, "layer head"],
    *,
    points: int = 20,
    objective: Objective | None = None,
    max_rows: int | None = 256,
) -> AblationCurve:
    """Close heads in the order of a score, the highest first.

    Closing in the order of facilitation should lower the score, in that of irrelevance leave it, in that of
    interference raise it (at first).

    Args:
        chg: The gated model.
        dataset: Rows.
        order: A number a head: `CHGResults.facilitation`, say, or `gate_attribution`.
        points: At how many counts of closed heads to run, besides none.
        objective: None for the log-probability of the targets.
        max_rows: Only the first so many rows; None for all.
    Raises:
        InputError: Scores of another shape, or no points.
    """
    if tuple(order.shape) != chg.mask_shape or points < 1:
        raise InputError(
            f"an order is a score for each of {list(chg.mask_shape)} heads and has at least one point, got "
            f"{list(order.shape)} and {points}"
        )
    count = order.numel()
    ranked = order.flatten().cpu().argsort(descending=True, stable=True)
    closed = sorted({round(count * n / points) for n in range(points + 1)})
    masks = torch.ones(len(closed), count)
    for row, n in enumerate(closed):
        masks[row, ranked[:n]] = 0
    scores = scores_under(
        chg, dataset, masks.view(-1, *chg.mask_shape), objective, max_rows=max_rows
    )
    heads = [(chg.layers[int(i) // chg.num_heads], int(i) % chg.num_heads) for i in ranked]
    return AblationCurve(heads, closed, scores)


def check_circuit(
    chg: CHG,
    dataset: CHGDataset,
    circuit: Float[Tensor, "layer head"],
    *,
    n_random: int = 20,
    seed: int = 0,
    objective: Objective | None = None,
    max_rows: int | None = 256,
) -> CircuitCheck:
    """Faithfulness and completeness of a circuit, beside random circuits of its size.

    Args:
        chg: The gated model.
        dataset: Rows, best such as no gate was fitted to.
        circuit: 1 at its heads: `CHGResults.get_facilitating_mask`.
        n_random: How many random circuits.
        seed: Of those.
        objective: None for the log-probability of the targets.
        max_rows: Only the first so many rows; None for all.
    Raises:
        InputError: Another shape, or gates that are not 0 or 1.
    """
    kept = chg.gates(circuit)[0].cpu()
    if not bool(((kept == 0) | (kept == 1)).all()):
        raise InputError(
            "a circuit has gates 0 and 1; round those of a mask first: (mask > 0.5).float()"
        )
    size = int(kept.sum())
    random = _random_circuits(kept.numel(), size, n_random, seed).view(-1, *chg.mask_shape)
    circuits = torch.cat([kept[None].float(), random])
    ends = torch.stack([torch.ones(chg.mask_shape), torch.zeros(chg.mask_shape)])
    scores = scores_under(
        chg, dataset, torch.cat([ends, circuits, 1 - circuits]), objective, max_rows=max_rows
    )
    full, empty = scores[:2].tolist()
    kept_scores, removed = scores[2:].chunk(2)
    faithful = (kept_scores - empty) / (full - empty)
    complete = 1 - (removed - empty) / (full - empty)
    return CircuitCheck(
        size,
        float(kept_scores[0]),
        full,
        empty,
        float(faithful[0]),
        float(complete[0]),
        faithful[1:],
        complete[1:],
    )


def _random_circuits(
    count: int, size: int, number: int, seed: int
) -> Float[Tensor, "circuit gate"]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(number, count)
    for row in masks:
        row[_chosen(count, size, generator)] = 1
    return masks


def _chosen(count: int, size: int, generator: torch.Generator) -> Int[Tensor, " size"]:
    return torch.randperm(count, generator=generator)[:size]


def gate_attribution(
    chg: CHG,
    dataset: CHGDataset,
    *,
    objective: Objective | None = None,
    batch_size: int = 32,
    max_rows: int | None = 256,
) -> Float[Tensor, "layer head"]:
    """What each gate is worth by one backward pass: the slope of the score at open gates.

    Positive where a little less of the head would lower the score. It is the cheap guess beside which fitted
    gates should be seen: it takes heads one by one, and only near the whole model.

    Args:
        chg: The gated model.
        dataset: Rows.
        objective: None for the log-probability of the targets.
        batch_size: Rows at once.
        max_rows: Only the first so many; None for all.
    """
    objective = TargetTokens() if objective is None else objective
    rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    with chg.still(), torch.inference_mode(False), torch.enable_grad():
        gates = torch.ones(1, *chg.mask_shape, device=chg.device, requires_grad=True)
        for start in range(0, rows, batch_size):
            batch = dataset.batch(range(start, min(start + batch_size, rows)))
            losses = losses_of(chg, objective, batch, gates)
            (-losses.sum() / rows).backward()
    if gates.grad is None:
        raise InputError("no row was run: max_rows must be at least 1")
    return gates.grad[0].cpu()
