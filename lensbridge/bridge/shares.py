"""Which features of a layer's output play which role: queries, keys, values, gates, in whatever order."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .architecture import Projection, Split
from .seen import Roots


def held_by(roots: Roots, path: str, width: int) -> Tensor:
    """A mask over the features of a layer that some roots speak of."""
    held = torch.zeros(width, dtype=torch.bool)
    for root in roots:
        if root.path != path:
            continue
        if root.features is None:
            held[:] = True
            continue
        start, dims = root.features
        index = torch.tensor([start])
        for size, step in dims:
            index = (index[:, None] + torch.arange(size) * step).flatten()
        held[index % width] = True
    return held


def share_of(
    path: str, width: int, role: str, held: dict[str, Tensor]
) -> tuple[Projection | None, str]:
    """The stretches a role has in a joint output, as groups of equal layout."""
    runs = {r: _runs(mask) for r, mask in held.items()}
    count = math.gcd(*(len(found) for found in runs.values()))
    for groups in [len(runs[role]), count, 1]:
        layout = _layout(runs, width, groups)
        if layout is not None:
            edges, places = layout
            sizes = tuple(b - a for a, b in pairwise(edges))
            return Projection(path, Split(groups, sizes), edges.index(places[role])), ""
    return None, f"the features of {path} that make {role} lie in no regular order"


def _layout(
    runs: dict[str, list[tuple[int, int]]], width: int, groups: int
) -> tuple[list[int], dict[str, int]] | None:
    """Edges of the stretches within a group, and where each role's begins."""
    if groups < 1 or width % groups:
        return None
    step = width // groups
    edges = {0, step}
    places: dict[str, int] = {}
    for role, found in runs.items():
        if len(found) != groups:
            return None
        start, size = found[0]
        if start + size > step or found != [(start + i * step, size) for i in range(groups)]:
            return None
        edges |= {start, start + size}
        places[role] = start
    return sorted(edges), places


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """(first, length) of every run of true values."""
    padded = torch.nn.functional.pad(mask.int(), (1, 1))
    change = padded.diff()
    starts = (change == 1).nonzero().flatten().tolist()
    ends = (change == -1).nonzero().flatten().tolist()
    return [(a, b - a) for a, b in zip(starts, ends, strict=True)]
