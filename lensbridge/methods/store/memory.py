"""Representations in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import InputError
from .extraction import Extraction, Layers, places_in
from .progress import shown
from .ragged import Ragged, shaped


def extract_representations(
    bridge: TransformerBridge,
    dataset: Any,
    layers: Layers,
    batch_size: int = 8,
    max_samples: int | None = None,
    device: torch.device | str | None = "cpu",
    positions: Any = "all",
    dtype: torch.dtype | None = None,
    progress: bool = False,
    *,
    max_length: int | None = None,
) -> dict[str, Tensor | Ragged]:
    """Activations of a dataset at several places, in memory.

    The model runs in eval mode, without gradients, up to the last place that is asked for. Samples of like
    length run together, and padding has no rows.

    Args:
        bridge: The model, with a tokenizer where the dataset is text.
        dataset: Texts; token ids [n, pos]; what a tokenizer returns; a map-style Dataset or a Hugging Face
            dataset, streaming or not, of ``input_ids`` (with ``attention_mask``) or ``text``; or any
            iterable of those.
        layers: Places: layer indices (the layer's output; negative from the end), hook points, aliases, or
            paths of modules (their output); one, or several.
        batch_size: How many samples run together.
        max_samples: How many samples of the dataset are read; all unless given.
        device: Where to put the rows; None leaves them where the model is.
        positions: Which tokens have rows: ``"all"``; ``"last"``, the last token of each sample; ``"mean"``,
            one row for the mean over a sample's tokens; an index or several, negative ones from a sample's
            end; a bool mask [n, pos] over the dataset's columns, or one mask for each sample.
        dtype: Dtype of floating rows; the model's own unless given.
        progress: Show a progress bar.
        max_length: How many tokens of a sample are read; all unless given, texts up to the model's context.
    Returns:
        For each place, by the name it was given (a layer's index by its canonical name): [n, rows, ...]
        where all samples have as many rows as each other, else `Ragged`; [n, ...] for ``"last"``,
        ``"mean"`` or an index.
    Raises:
        InputError: A dataset or an argument that cannot be used, or a place without a row for each token.
        UnknownPointError, AbsentPointError, LayerRangeError: A place that is not there.
        HookNotFiredError: The model does not pass a place.

    Example::

        acts = extract_representations(bridge, texts, [3, "blocks.5.mlp.hook_out"], positions="last")
        acts["blocks.3.hook_out"]                              # [n, d_model]
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
    jobs = list(extraction.jobs(dataset))  # ids alone: next to the rows they are nothing
    if not jobs:
        raise InputError("the dataset gave no samples")
    samples = np.concatenate([job.samples for job in jobs])
    counts = np.zeros(len(samples), dtype=np.int64)
    counts[samples] = np.concatenate([job.counts for job in jobs])
    starts = counts.cumsum() - counts
    kept: dict[str, Tensor] = {}
    for batch in shown(extraction.rows(jobs), len(samples), progress):
        own = batch.samples.numpy()
        places = torch.from_numpy(places_in(starts[own], counts[own]))
        for name, rows in batch.rows.items():
            if name not in kept:
                kept[name] = rows.new_empty(int(counts.sum()), *rows.shape[1:])
            kept[name][places.to(rows.device)] = rows
    if extraction.positions.is_single:
        return dict(kept)
    each = torch.from_numpy(counts)
    return {name: shaped(values, each) for name, values in kept.items()}
