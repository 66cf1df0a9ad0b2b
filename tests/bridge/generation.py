"""What a generation is held against. Loaded by the fixture `generation`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOAT = 2e-5
"""Relative float32 error of the same sums taken step by step instead of all at once."""

_MASKED = -1e28  # scores below this stand for minus infinity, whichever number a kernel puts there


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of 5, 7 and 8 tokens, padded in front, and their mask; [3, 8]."""
    ids = torch.randint(8, 100, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    return ids.where(mask.bool(), 0), mask


def greedy(model: Any, ids: Tensor | None, n: int = 5, **given: Any) -> Any:
    """Hugging Face's own answer, the likeliest token at each step."""
    return model.generate(ids, max_new_tokens=n, do_sample=False, **given)


def everything(name: str) -> bool:
    """A filter that selects every point, those that multiply memory too."""
    return True


@contextmanager
def generator_state(seed: int) -> Iterator[None]:
    """torch's generator begins at a seed, and goes on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def gap(left: Tensor, right: Tensor) -> float:
    """Largest difference over the largest value; infinite where shapes differ."""
    if left.shape != right.shape:
        return float("inf")
    left, right = (x.float().masked_fill(x < _MASKED, 0) for x in (left, right))
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-6))


def _at_real(value: Tensor, axes: list[str], mask: Tensor) -> Tensor:
    """A value with zeros where its row has padding; an encoder's positions are others."""
    for name in ("pos", "query"):
        dim = axes.index(name) if name in axes else 0
        if dim and (value.shape[0], value.shape[dim]) == mask.shape:
            shape = [1] * value.dim()
            shape[0], shape[dim] = mask.shape
            value = value.masked_fill(~mask.bool().view(shape), 0)
    return value


def differing(live: Any, run: Mapping[str, Tensor], without: Collection[str] = ()) -> Any:
    """Point -> gap, where a live cache is not what one run over the same text shows at real positions.

    A point that only one of the two has is a difference too.

    Args:
        live: The cache of a generation.
        run: Activations of a run over the tokens it returned, with its mask.
        without: Points not to compare.
    """
    assert len(live) > 3
    wrong: dict[str, Any] = dict.fromkeys(set(live) ^ set(run), "only in one")
    for name in set(live) & set(run):
        axes = live.registry[name].axes.split()
        left, right = live[name], run[name]
        if len(left) != len(right) and 1 in (len(left), len(right)):
            # Positions that all rows share are made once, or for each row.
            left, right = torch.broadcast_tensors(left, right)
        left, right = (_at_real(x, axes, live.mask) for x in (left, right))
        far = gap(left, right)
        if far > FLOAT:
            wrong[name] = far
    return {name: why for name, why in wrong.items() if name not in without}


@contextmanager
def blocks_seen(plain: Any, model: nn.Module, paths: list[str]) -> Iterator[list[list[Tensor]]]:
    """What plain hooks see at modules: for each module, one value a pass."""
    seen: list[list[Tensor]] = [[] for _ in paths]

    def keep(found: list[Tensor]) -> Callable[[Tensor, int], None]:
        return lambda value, count: found.append(value.clone())

    with ExitStack() as stack:
        for path, found in zip(paths, seen, strict=True):
            stack.enter_context(plain.watching(model, path, keep(found)))
        yield seen
