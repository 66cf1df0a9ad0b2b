"""Extraction to disk: shards of safetensors, by one process or many, gone on with after an interruption."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import InputError
from ..numbers import whole
from .extraction import ActivationBatch, Extraction, Layers
from .folder import Done, Folder
from .identity import identity_of
from .items import size_of
from .jobs import Job
from .progress import shown
from .ranks import Ranks, current_ranks
from .reader import ExtractedActivations
from .shards import BATCHES, COUNTS, DTYPES, LENGTHS, SAMPLES, TOKENS, write_shard

_MIB = 2**20


def extract_to(
    path: str | os.PathLike[str],
    bridge: TransformerBridge,
    dataset: Any,
    layers: Layers,
    batch_size: int = 8,
    max_samples: int | None = None,
    positions: Any = "all",
    dtype: torch.dtype | None = None,
    progress: bool = False,
    *,
    max_length: int | None = None,
    shard_bytes: int = 64 * _MIB,
    resume: bool = False,
) -> ExtractedActivations:
    """Activations of a dataset at several places, on disk.

    The rows are those of `extract_representations`, bit for bit. Two shards at most are in memory, however
    long the dataset is, and a shard is written while the next one is computed. Whenever it is killed,
    nothing is lost but the shards that were not on the disk yet: the same call with ``resume=True`` goes on
    behind them.

    Under ``torchrun`` each process runs its own part of the batches, which are the same as for one process,
    and writes shards of its own; the index comes last. All of them have to see the folder. An extraction
    may be gone on with by more or fewer processes. Of a model that they hold together (FSDP2, tensor
    parallelism) all of them run every batch, and one writes.

    Args:
        path: The folder to write; a new or an empty one, unless ``resume``.
        bridge: The model, as in `extract_representations`, like all that follows.
        dataset: Read from its beginning, by every process, also to go on: the same each time.
        layers: The places.
        batch_size: How many samples run together.
        max_samples: How many samples are read.
        positions: Which tokens have rows.
        dtype: Dtype of floating rows.
        progress: Show a progress bar.
        max_length: How many tokens of a sample are read.
        shard_bytes: From what size on a shard is written. Twice that is taken of the memory.
        resume: Go on with what is in the folder, or begin where nothing is.
    Returns:
        What was written, in each process.
    Raises:
        InputError: A dataset or an argument that cannot be used; a folder that holds other things; an
            extraction that differs from the one to go on with (says in what).
        UnknownPointError, AbsentPointError, LayerRangeError: A place that is not there.
        OSError: The disk is full, or cannot be written to.
    """
    whole("shard_bytes", shard_bytes)
    extraction = Extraction(
        bridge,
        layers,
        batch_size=batch_size,
        max_samples=max_samples,
        max_length=max_length,
        positions=positions,
        dtype=dtype,
    )
    jobs = extraction.jobs(dataset)
    folder = Folder(Path(path))
    ranks = current_ranks(bridge)
    identity = identity_of(extraction)
    finished = folder.check(identity, resume=resume)
    ranks.wait()  # until all have looked
    if finished:
        if ranks.rank == 0:
            folder.tidy()
        return ExtractedActivations(folder.path)
    try:
        if ranks.rank == 0:
            folder.begin(identity)
        ranks.wait()
        work = _Work(jobs, ranks, folder.done())
        ranks.wait()  # until all know what is done
        total = size_of(dataset)
        if max_samples is not None:
            total = max_samples if total is None else min(total, max_samples)
        shows = progress and ranks.rank == 0
        batches = shown(extraction.rows(work), total, shows)
        if ranks.writes:
            with ShardWriter(folder, ranks.rank, shard_bytes) as writer:
                for batch in batches:
                    writer.put(batch)
        else:
            deque(batches, maxlen=0)  # the others cannot run theirs without this process
        if not work.samples:
            raise InputError("the dataset gave no samples")
    except BaseException:
        if ranks.world == 1:
            folder.abandon()
        raise
    ranks.wait()
    if ranks.rank == 0:
        folder.finish(work.samples)
    ranks.wait()
    return ExtractedActivations(folder.path)


class _Work:
    """The batches that a process has left to run; counts the samples of all."""

    def __init__(self, jobs: Iterator[Job], ranks: Ranks, done: Done) -> None:
        self._jobs = jobs
        self._ranks = ranks
        self._done = done
        self.samples = 0

    def __iter__(self) -> Iterator[Job]:
        for job in self._jobs:
            self.samples += len(job.samples)
            if len(self._done) and self._done.has(job.number, job.mark):
                continue
            if self._ranks.mine(job.number):
                yield job


class ShardWriter:
    """Gathers batches into shards and writes each in a thread of its own, while the next one gathers.

    Args:
        folder: Where to.
        rank: Which process this is.
        shard_bytes: From what size on a shard is written.
    """

    def __init__(self, folder: Folder, rank: int, shard_bytes: int) -> None:
        self.folder = folder
        self.rank = rank
        self.shard_bytes = shard_bytes
        folder.mend(rank)
        self._number = len(folder.shards(rank))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._writing: Future[None] | None = None
        self._batches: list[ActivationBatch] = []
        self._bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                if self._batches:
                    self._flush()
                self._wait()
        finally:
            # What is being written is finished; of an unfinished shard nothing is kept.
            self._thread.shutdown(wait=True)

    def put(self, batch: ActivationBatch) -> None:
        """Add a batch.

        Raises:
            OSError: A shard before could not be written.
        """
        self._batches.append(batch)
        self._bytes += sum(rows.nbytes for rows in batch.rows.values())
        if self._bytes >= self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        batches, self._batches, self._bytes = self._batches, [], 0
        self._writing = self._thread.submit(self._write, batches, self._number)
        self._number += 1

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, batches: list[ActivationBatch], number: int) -> None:
        file = f"rank{self.rank}-{number:05d}.safetensors"
        marks = [torch.tensor([[batch.number, batch.mark]]) for batch in batches]
        pieces: dict[str, list[Tensor]] = {
            name: [batch.rows[name] for batch in batches] for name in batches[0].rows
        }
        points = {
            name: {"shape": list(rows[0].shape[1:]), "dtype": DTYPES[rows[0].dtype]}
            for name, rows in pieces.items()
        }
        tables: dict[str, list[Tensor]] = {
            SAMPLES: [batch.samples for batch in batches],
            COUNTS: [batch.counts for batch in batches],
            LENGTHS: [batch.lengths for batch in batches],
            TOKENS: [batch.tokens.int() for batch in batches],
            BATCHES: marks,
        }
        size, digest = write_shard(self.folder.path / file, {**pieces, **tables})
        facts = {
            "file": file,
            "bytes": size,
            "sha256": digest,
            "samples": sum(len(batch) for batch in batches),
            "rows": int(sum(batch.counts.sum() for batch in batches)),
            "tokens": int(sum(batch.lengths.sum() for batch in batches)),
            "points": points,
        }
        self.folder.note(self.rank, facts)
