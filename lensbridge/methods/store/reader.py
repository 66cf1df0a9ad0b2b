"""ExtractedActivations: what `extract_to` wrote, read where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from ...hooks import InputError, UnknownPointError
from .extraction import places_in
from .files import Files
from .folder import FORMAT, INDEX, PLAN, VERSION, check_shard, read_json
from .ragged import Ragged, shaped
from .shards import COUNTS, LENGTHS, SAMPLES, TOKENS, checksum
from .shuffled import ShuffledRows


class ExtractedActivations:
    """Activations on disk: a map-style dataset of samples, and a view of rows for each point.

    Shards are mapped into memory; what is not asked for is not read. Nothing that is read is executed.

    Args:
        path: The folder that `extract_to` wrote.
    Raises:
        FileNotFoundError: There is no such folder, or no extraction in it.
        InputError: It is not finished, its index is none, or a shard is missing, cut short, or elsewhere.

    Attributes:
        path: The folder.
        index: The index, as it was read.

    Example::

        acts = ExtractedActivations("activations")
        acts["blocks.3.hook_out"][1000:2000]                   # [row, d_model], of samples in their order
        acts[7]["blocks.3.hook_out"], acts[7]["input_ids"]     # of sample 7
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = _index(self.path)
        self._files = Files(self.path, self.index)
        tables = [self._tables(shard) for shard in range(len(self.index["shards"]))]
        held = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        order = held[SAMPLES].argsort()
        if not np.array_equal(held[SAMPLES][order], np.arange(self.index["samples"])):
            raise InputError(f"the shards of {self.path} do not hold each sample once")
        self._shard, self._at, self._tokens_at, self._counts, self._lengths = (
            held[name][order] for name in ("shard", "row", "token", COUNTS, LENGTHS)
        )
        self._ends = self._counts.cumsum()

    def _tables(self, shard: int) -> dict[str, NDArray[Any]]:
        found = {
            name: self._files.tensor(shard, name).numpy() for name in (SAMPLES, COUNTS, LENGTHS)
        }
        sizes = len({len(values) for values in found.values()})
        facts = self.index["shards"][shard]
        told = [facts["samples"], facts["rows"], facts["tokens"]]
        held = [len(found[SAMPLES]), int(found[COUNTS].sum()), int(found[LENGTHS].sum())]
        if sizes != 1 or told != held or min(found[COUNTS].min(), found[LENGTHS].min()) < 0:
            raise InputError(
                f"{self.path / facts['file']} holds {held} samples, rows and tokens, not {told}"
            )
        counts, lengths = found[COUNTS], found[LENGTHS]
        return {
            **found,
            "shard": np.full(len(counts), shard),
            "row": counts.cumsum() - counts,
            "token": lengths.cumsum() - lengths,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def __repr__(self) -> str:
        return (
            f"ExtractedActivations({len(self)} samples, {self.n_rows} rows of "
            f"{', '.join(self.points)})"
        )

    # --- what there is ---------------------------------------------------------------------------

    @property
    def points(self) -> list[str]:
        """The places, by the names they were asked for."""
        return list(self.index["points"])

    @property
    def facts(self) -> dict[str, Any]:
        """What was extracted: model, tokenizer, settings."""
        return dict(self.index["extraction"])

    @property
    def n_rows(self) -> int:
        """How many rows each point has."""
        return int(self.index["rows"])

    @property
    def counts(self) -> Int[Tensor, " n"]:
        """How many rows each sample has."""
        return torch.from_numpy(self._counts.copy())

    def name_of(self, point: str) -> str:
        """What a point is kept under, given that or its canonical name.

        Raises:
            UnknownPointError: There is no such point here.
        """
        if point in self.index["points"]:
            return point
        for name, facts in self.index["points"].items():
            if facts["point"] == point:
                return name
        raise UnknownPointError(
            f"{point!r} was not extracted; {self.path} holds {', '.join(self.points)}"
        )

    # --- samples and rows ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, key: int | str) -> Any:
        """A sample by its number, or the rows of a point by its name."""
        return RowsView(self, self.name_of(key)) if isinstance(key, str) else self.sample(key)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.sample(index) for index in range(len(self)))

    def sample(self, index: int) -> dict[str, Tensor]:
        """A sample.

        Args:
            index: Which, in the order of the dataset; negative from the end.
        Returns:
            ``input_ids`` [pos] and, by point, its rows [row, ...], as copies.
        Raises:
            IndexError: There is no such sample.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} is not one of {len(self)}")
        index %= len(self)
        shard, at, count = (int(x[index]) for x in (self._shard, self._at, self._counts))
        token, length = int(self._tokens_at[index]), int(self._lengths[index])
        rows = {
            name: self._files.tensor(shard, name)[at : at + count].clone() for name in self.points
        }
        tokens = self._files.tensor(shard, TOKENS)[token : token + length].long()
        return {"input_ids": tokens, **rows}

    def rows(self, point: str, numbers: Int[Tensor, " row"]) -> Shaped[Tensor, "row ..."]:
        """Some rows of a point, as a copy.

        Args:
            point: Which.
            numbers: Which rows, counted over all samples in the order of the dataset.
        Raises:
            InputError: There is no such row.
        """
        name = self.name_of(point)
        wanted = numbers.numpy()
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.n_rows):
            raise InputError(
                f"rows are 0 to {self.n_rows - 1}, got {wanted.min()} to {wanted.max()}"
            )
        samples = self._ends.searchsorted(wanted, side="right")
        inside = wanted - (self._ends - self._counts)[samples] + self._at[samples]
        shards = self._shard[samples]
        made = self._files.empty(name, len(wanted))
        for shard in np.unique(shards).tolist():
            here = (shards == shard).nonzero()[0]
            held = self._files.tensor(shard, name)
            made[torch.from_numpy(here)] = held[torch.from_numpy(inside[here])]
        return made

    def load(self, points: Iterable[str] | None = None) -> dict[str, Tensor | Ragged]:
        """Everything, in memory, as `extract_representations` returns it.

        Args:
            points: Which points; all unless given.
        """
        single = self.facts["settings"].get("single")
        names = self.points if points is None else [self.name_of(point) for point in points]
        made = {name: self._all(name) for name in names}
        return {n: x if single else shaped(x, self.counts) for n, x in made.items()}

    def _all(self, name: str) -> Tensor:
        made = self._files.empty(name, self.n_rows)
        starts = self._ends - self._counts
        for shard in range(len(self.index["shards"])):
            own = (self._shard == shard).nonzero()[0]
            own = own[self._at[own].argsort(kind="stable")]
            places = places_in(starts[own], self._counts[own])
            made[torch.from_numpy(places)] = self._files.tensor(shard, name)
        return made

    # --- for training ----------------------------------------------------------------------------

    def shuffled(
        self,
        point: str,
        batch_size: int,
        buffer_rows: int = 2**18,
        seed: int = 0,
        epochs: int = 1,
    ) -> ShuffledRows:
        """Rows in random order, for training: batches [batch, ...], each row once an epoch.

        Args:
            point: Which.
            batch_size: How many rows a batch has; an epoch's last one has what is left.
            buffer_rows: How many rows are mixed in memory, from places all over the shards.
            seed: The same one gives the same order.
            epochs: How often all rows come; each time in another order.
        Raises:
            UnknownPointError: There is no such point here.
            InputError: A number below 1.
        """
        sizes = [shard["rows"] for shard in self.index["shards"]]
        return ShuffledRows(
            self._files, self.name_of(point), sizes, batch_size, buffer_rows, seed, epochs
        )

    def to_dataset(self, points: Iterable[str] | None = None, **options: Any) -> Any:
        """A Hugging Face ``datasets.Dataset`` with a row for each sample.

        Args:
            points: Which points; all unless given.
            **options: Passed to ``Dataset.from_generator``, which writes a copy into its cache
                (``cache_dir=``).
        Returns:
            The dataset, of ``input_ids`` and a column for each point. bfloat16 becomes float32, which Arrow
            has.
        """
        import datasets

        names = self.points if points is None else [self.name_of(point) for point in points]
        columns = {name: self._files.column(name, datasets) for name in names}
        features = datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int64")), **columns}
        )

        def rows(path: str, names: list[str]) -> Iterator[dict[str, Any]]:
            for sample in ExtractedActivations(path):
                floats = {
                    name: sample[name].float()
                    if sample[name].dtype == torch.bfloat16
                    else sample[name]
                    for name in names
                }
                yield {
                    "input_ids": sample["input_ids"].numpy(),
                    **{k: v.numpy() for k, v in floats.items()},
                }

        given = {"path": str(self.path.resolve()), "names": names}
        return datasets.Dataset.from_generator(rows, features=features, gen_kwargs=given, **options)

    # --- trust -----------------------------------------------------------------------------------

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            InputError: Some differ; names them.
        """
        wrong = [
            shard["file"]
            for shard in self.index["shards"]
            if checksum(self.path / shard["file"]) != shard["sha256"]
        ]
        if wrong:
            raise InputError(
                f"{len(wrong)} of {len(self.index['shards'])} shards of {self.path} are not what was "
                f"written: {', '.join(wrong[:5])}"
            )


class RowsView:
    """The rows of a point, over all samples in the order of the dataset; read when they are asked for.

    Args:
        owner: The extraction.
        name: The point.

    Attributes:
        shape: [row, ...].
        dtype: Of the rows.
    """

    def __init__(self, owner: ExtractedActivations, name: str) -> None:
        self._owner = owner
        self.name = name
        facts = owner.index["points"][name]
        self.shape = torch.Size([owner.n_rows, *facts["shape"]])
        self.dtype = owner.sample(0)[name].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"RowsView({self.name}, {list(self.shape)} {self.dtype})"

    def __getitem__(self, which: Any) -> Tensor:
        """A row by its number; rows of a slice, of indices, or of a mask over all rows."""
        n = len(self)
        if isinstance(which, slice):
            return self._owner.rows(self.name, torch.from_numpy(np.arange(*which.indices(n))))
        at = torch.as_tensor(which)
        if at.dtype == torch.bool and at.shape == (n,):
            at = at.nonzero()[:, 0]
        if at.is_floating_point() or at.dtype == torch.bool or at.dim() > 1:
            raise InputError(
                f"rows are picked by a number, a slice, numbers, or a mask [{n}], got {list(at.shape)} "
                f"{at.dtype}"
            )
        numbers = at.reshape(-1).long()
        beyond = (numbers < -n) | (numbers >= n)
        if bool(beyond.any()):
            raise IndexError(f"row {int(numbers[beyond][0])} is not one of {n}")
        made = self._owner.rows(self.name, numbers % n)
        return made[0] if at.dim() == 0 else made

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def _index(path: Path) -> dict[str, Any]:
    """The index of an extraction.

    Raises:
        FileNotFoundError, InputError: As for `ExtractedActivations`.
    """
    if not (path / INDEX).is_file():
        if (path / PLAN).is_file():
            raise InputError(
                f"the extraction in {path} is not finished; go on with extract_to(..., resume=True)"
            )
        raise FileNotFoundError(f"there is no extraction in {path} (no {INDEX})")
    index = read_json(path / INDEX)
    if index.get("format") != FORMAT:
        raise InputError(
            f"{path / INDEX} is no index of {FORMAT}: format is {index.get('format')!r}"
        )
    if index.get("version") != VERSION:
        raise InputError(
            f"{path / INDEX} has version {index.get('version')!r}; this lensbridge reads {VERSION}"
        )
    wanted = {
        "points": dict,
        "samples": int,
        "rows": int,
        "tokens": int,
        "extraction": dict,
        "shards": list,
    }
    for name, kind in wanted.items():
        if not isinstance(index.get(name), kind) or index[name] in ([], {}):
            raise InputError(f"{path / INDEX} has no {name} ({kind.__name__})")
    for name, facts in index["points"].items():
        if not _is_point(facts):
            raise InputError(f"{path / INDEX} says no shape and dtype of {name}: {facts!r:.200}")
    if not isinstance(index["extraction"].get("settings"), dict):
        raise InputError(f"{path / INDEX} does not say how it was extracted (settings)")
    for shard in index["shards"]:
        check_shard(shard, path)
    files = [shard["file"] for shard in index["shards"]]
    if len(set(files)) < len(files):
        raise InputError(f"{path / INDEX} lists a shard twice")
    return index


def _is_point(facts: Any) -> bool:
    return (
        isinstance(facts, Mapping)
        and isinstance(facts.get("point"), str)
        and isinstance(facts.get("dtype"), str)
        and isinstance(facts.get("shape"), list)
        and all(type(size) is int and size >= 0 for size in facts["shape"])
    )
