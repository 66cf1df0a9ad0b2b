"""Extraction: the one loop that runs a model over a dataset and shows rows of activations, batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import HookPoint, InputError
from ..numbers import whole
from ..reading import no_cache, pad_id_of, point_at, read_points, takes_mask
from .items import check_dataset, items_of
from .jobs import WINDOW, Job, jobs_of
from .moving import Mover, evaluating
from .positions import Positions

Layers = int | str | Sequence[int | str]


@dataclass(frozen=True)
class ActivationBatch:
    """What the points showed of some samples that ran together.

    Attributes:
        number: Which batch of the dataset it is.
        samples: Which samples of the dataset, [batch].
        counts: How many rows each of them has, [batch].
        lengths: How many tokens each of them has, [batch].
        tokens: The ids of all of them, one after the other, [token].
        rows: Point -> the rows of all of them, one after the other, [row, ...].
        mark: A checksum of what was run.
    """

    number: int
    samples: Tensor
    counts: Tensor
    lengths: Tensor
    tokens: Tensor
    rows: dict[str, Tensor]
    mark: int

    def __len__(self) -> int:
        return len(self.samples)


class Extraction:
    """Which rows of a dataset are wanted, and how the model is run to have them.

    Args:
        bridge: The model.
        layers: Places: layer indices (the layer's output), hook points, or paths of modules; one, or several.
        batch_size: How many samples run together.
        max_samples: How many samples of the dataset are read; all unless given.
        max_length: How many tokens of a sample are read; all unless given.
        device: Where the rows go; None leaves them where the model is.
        positions: As in `extract_representations`.
        dtype: Dtype of floating rows; the model's own unless given.
    Raises:
        InputError: An argument that cannot be used.
        UnknownPointError, AbsentPointError, LayerRangeError: A place that is not there.

    Attributes:
        points: The hook point behind each place, by the name it is kept under: as it was given, a layer's
            index by its point's canonical name.
    """

    def __init__(
        self,
        bridge: Any,
        layers: Layers,
        *,
        batch_size: int = 8,
        max_samples: int | None = None,
        max_length: int | None = None,
        device: torch.device | str | None = "cpu",
        positions: Any = "all",
        dtype: Any = None,
    ) -> None:
        if not isinstance(bridge, TransformerBridge):
            raise InputError(
                f"give a TransformerBridge, got {type(bridge).__name__}; of a loaded model it is "
                "TransformerBridge(model, tokenizer)"
            )
        self.bridge: TransformerBridge = bridge
        self.batch_size = whole("batch_size", batch_size)
        for name, value in (("max_samples", max_samples), ("max_length", max_length)):
            if value is not None:
                whole(name, value)
        self.max_samples, self.max_length = max_samples, max_length
        self.positions = Positions(positions)
        self.points = points_of(bridge, layers)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype is a torch.dtype, got {dtype!r}")
        self.dtype: torch.dtype | None = dtype
        self._mover = Mover(device)

    # --- what to run -----------------------------------------------------------------------------

    def jobs(self, dataset: Any) -> Iterator[Job]:
        """The batches of a dataset: the same whoever asks.

        Raises:
            InputError: What is no dataset.
        """
        check_dataset(dataset)
        return self._jobs(dataset)

    def _jobs(self, dataset: Any) -> Iterator[Job]:
        items = items_of(dataset, self.bridge, self.max_length)
        if self.max_samples is not None:
            # Not one more is asked for: a stream may block.
            items = (item for _, item in zip(range(self.max_samples), items, strict=False))
        yield from jobs_of(
            items,
            self.positions,
            self.batch_size,
            pads=takes_mask(self.bridge.unwrapped_model),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the rows depend on beside model and dataset, for JSON."""
        return {
            "points": {name: str(point.name) for name, point in self.points.items()},
            "batch_size": self.batch_size,
            "window": WINDOW,
            "max_samples": self.max_samples,
            "max_length": self.max_length,
            "positions": self.positions.described,
            "single": self.positions.is_single,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    # --- running ---------------------------------------------------------------------------------

    def rows(self, jobs: Iterable[Job]) -> Iterator[ActivationBatch]:
        """Run batches and show their rows, in the order of the batches.

        Between two of them no hook is set and the model is in its own mode. On a GPU one batch computes
        while the rows of the one before travel.
        """
        under_way: deque[tuple[ActivationBatch, list[Any]]] = deque()
        for job in jobs:
            under_way.append(self._run(job))
            if len(under_way) > bool(under_way[-1][1]):
                yield _arrived(*under_way.popleft())
        while under_way:
            yield _arrived(*under_way.popleft())

    def _run(self, job: Job) -> tuple[ActivationBatch, list[Any]]:
        bridge = self.bridge
        self._check_ids(job)
        ids, beside = job.inputs(pad_id_of(bridge, bridge.tokenizer))
        told: dict[str, Any] = {**beside, **no_cache(bridge)}

        def take(shown: Tensor, hook: HookPoint) -> Tensor:
            return self._taken(shown, hook, job)

        with evaluating(bridge.original_model):
            found, _ = read_points(
                bridge,
                self.points.values(),
                take,
                lambda: bridge(ids, return_type=None, **told),
            )
        moved = {
            name: self._mover.move(found[str(point.name)]) for name, point in self.points.items()
        }
        made = ActivationBatch(
            job.number,
            torch.tensor(job.samples),
            torch.from_numpy(job.counts),
            torch.from_numpy(job.lengths),
            torch.from_numpy(job.tokens),
            {name: rows for name, (rows, _) in moved.items()},
            job.mark,
        )
        return made, [event for _, event in moved.values() if event is not None]

    def _check_ids(self, job: Job) -> None:
        """On an accelerator an id beyond the vocabulary would kill the process."""
        d_vocab = self.bridge.cfg.d_vocab
        low, high = job.tokens.min(), job.tokens.max()
        if low >= 0 and (d_vocab is None or high < d_vocab):
            return
        wrong = low if low < 0 else high
        sample = job.samples[next(i for i, x in enumerate(job.items) if (x.ids == wrong).any())]
        raise InputError(
            f"sample {sample} has token id {wrong}, outside the vocabulary of {d_vocab}"
        )

    def _taken(self, shown: Tensor, hook: HookPoint, job: Job) -> Shaped[Tensor, "row ..."]:
        """The rows of what a point shows, as a copy."""
        states = _per_token(shown, hook, job)
        if job.pools:
            return self._cast(_means(states, job), copy=False)
        flat = states.flatten(0, 1)
        if job.takes_all:
            return self._cast(flat, copy=True)
        return self._cast(flat[job.places.to(flat.device)], copy=False)

    def _cast(self, rows: Tensor, *, copy: bool) -> Tensor:
        wanted = self.dtype if rows.is_floating_point() and self.dtype else rows.dtype
        return rows.to(wanted, copy=copy, memory_format=torch.contiguous_format)


def stream_representations(
    bridge: TransformerBridge,
    dataset: Any,
    layers: Layers,
    batch_size: int = 8,
    max_samples: int | None = None,
    device: torch.device | str | None = "cpu",
    positions: Any = "all",
    dtype: torch.dtype | None = None,
    *,
    max_length: int | None = None,
) -> Iterator[ActivationBatch]:
    """Rows of activations, batch by batch; nothing is kept.

    Between two batches no hook is set on the model, so it may be used, or changed, for other things.

    Args:
        bridge: As in `extract_representations`, like all that follows.
        dataset: Also one that never ends.
        layers: The places.
        batch_size: How many samples run together.
        max_samples: How many samples are read.
        device: Where the rows go; None leaves them where the model is.
        positions: Which tokens have rows.
        dtype: Their dtype.
        max_length: How many tokens of a sample are read.
    Returns:
        What each batch showed. Samples come sorted by length within windows of 64 batches.
    Raises:
        InputError: A dataset or an argument that cannot be used.
        UnknownPointError, AbsentPointError, LayerRangeError: A place that is not there.

    Example::

        for batch in stream_representations(bridge, texts, [4, 8], batch_size=32, device=None):
            sae.step(batch.rows["blocks.4.hook_out"])          # [row, d_model]
    """
    extraction = Extraction(
        bridge,
        layers,
        batch_size=batch_size,
        max_samples=max_samples,
        max_length=max_length,
        device=device,
        positions=positions,
        dtype=dtype,
    )
    return extraction.rows(extraction.jobs(dataset))


def points_of(bridge: TransformerBridge, layers: Any) -> dict[str, HookPoint]:
    """The points behind some places, by the names they are kept under.

    Raises:
        InputError: None at all, or one place twice.
        UnknownPointError, AbsentPointError, LayerRangeError: A place that is not there.
    """
    given = [layers] if isinstance(layers, (int, str)) else list(layers)
    if not given:
        raise InputError("give at least one place: a layer, a hook point, or a module's path")
    points: dict[str, HookPoint] = {}
    for place in given:
        point = point_at(place, bridge, "place")
        twin = next((name for name, other in points.items() if other.name == point.name), None)
        if twin is not None:
            raise InputError(f"{place!r} is the same place as {twin!r}: {point.name}")
        points[place if isinstance(place, str) else str(point.name)] = point
    return points


def _per_token(shown: Tensor, hook: HookPoint, job: Job) -> Shaped[Tensor, "batch pos ..."]:
    """What a point shows, a row for each token.

    Raises:
        InputError: It shows something else.
    """
    axes = hook.axes.split()
    per_token = axes[:1] == ["..."] or axes[:2] == ["batch", "pos"]
    n, width = job.is_token.shape
    if not per_token or shown.dim() < 2 or shown.shape[1] != width or len(shown) not in (1, n):
        named = "" if axes[:1] == ["..."] else f" ({', '.join(axes)})"
        raise InputError(
            f"{str(hook.name).removeprefix('raw:')!r} shows {list(shown.shape)}{named} of {n} x {width} "
            "tokens, not [batch, pos, ...]: it has no row for each token"
        )
    # One row for all samples: positions, mostly.
    return shown.expand(n, *shown.shape[1:])


def _means(states: Shaped[Tensor, "batch pos ..."], job: Job) -> Shaped[Tensor, "batch ..."]:
    """Of each sample, the mean over its tokens, summed in float32 at least.

    Raises:
        InputError: There is no mean of what the point shows.
    """
    if not states.is_floating_point():
        raise InputError(f"positions='mean' is for floating activations, not {states.dtype}")
    wide = torch.promote_types(states.dtype, torch.float32)
    real = torch.from_numpy(job.is_token).to(states.device)
    real = real[(..., *[None] * (states.dim() - 2))]
    sums = states.to(wide).masked_fill(~real, 0).sum(1)
    lengths = torch.from_numpy(job.lengths).to(states.device, wide)
    return (sums / lengths[(..., *[None] * (sums.dim() - 1))]).to(states.dtype)


def _arrived(batch: ActivationBatch, events: list[Any]) -> ActivationBatch:
    for event in events:
        event.synchronize()
    return batch


def places_in(starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
    """The numbers from each start on, as many as counted: [5, 0], [2, 3] -> [5, 6, 0, 1, 2]."""
    ends = counts.cumsum()
    return np.arange(int(ends[-1]) if len(ends) else 0) + (starts - (ends - counts)).repeat(counts)
