"""ExtractedActivations: views, samples, shuffled rows, and what it refuses to read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lensbridge import (
    ExtractedActivations,
    InputError,
    UnknownPointError,
    extract_representations,
    extract_to,
)

POINTS = ["blocks.0.hook_out", "model.layers.1.mlp"]
NAME = "blocks.0.hook_out"


@pytest.fixture(scope="module")
def expected(shared: Any, texts: list[str]) -> dict[str, Any]:
    """The rows in memory."""
    return extract_representations(shared, texts, POINTS, 3)


@pytest.fixture(scope="module")
def acts(shared: Any, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same on disk, in several shards. Tests leave it as it is."""
    path = tmp_path_factory.mktemp("reader") / "acts"
    return extract_to(path, shared, texts, POINTS, 3, shard_bytes=30_000)


def test_views_of_rows(acts: Any, expected: dict[str, Any]) -> None:
    """Rows over all samples, in the order of the dataset, by everything that picks rows."""
    assert acts.points == POINTS
    assert len(acts.index["shards"]) > 3
    for name in POINTS:
        view, rows = acts[name], expected[name].values
        assert (view.shape, view.dtype, len(view)) == (rows.shape, rows.dtype, len(rows))
        mask = torch.arange(len(rows)) % 7 == 3
        for pick in (
            slice(None),
            slice(5, 300, 7),
            slice(-3, None),
            slice(9, 3),
            0,
            -1,
            [3, 400, -2, 3],
            torch.tensor([17]),
            mask,
        ):
            assert torch.equal(view[pick], rows[pick])
    assert torch.equal(next(iter(acts[NAME])), expected[NAME].values[0])
    assert torch.equal(acts["raw:model.layers.1.mlp.hook_out"][:9], acts["model.layers.1.mlp"][:9])


def test_samples(acts: Any, expected: dict[str, Any], texts: list[str], ids_of: Any) -> None:
    """A map-style dataset: as long as the texts, with their ids."""
    ids = ids_of(texts)
    assert len(acts) == len(list(acts)) == 40
    assert acts.counts.tolist() == [len(row) for row in ids]
    for index in (0, 13, -1):
        sample = acts[index]
        assert list(sample) == ["input_ids", *POINTS]
        assert sample["input_ids"].tolist() == ids[index]
        assert torch.equal(sample[NAME], expected[NAME][index])
    for wrong in (40, -41):
        with pytest.raises(IndexError):
            acts.sample(wrong)


def test_what_was_read_may_be_written_to(acts: Any, expected: dict[str, Any]) -> None:
    """Neither the files change nor what is read later."""
    acts[3][NAME].zero_()
    acts[NAME][:50].zero_()
    next(acts.shuffled(NAME, 50)).zero_()
    assert torch.equal(acts[3][NAME], expected[NAME][3])
    assert torch.equal(ExtractedActivations(acts.path)[NAME][:], expected[NAME].values)


def test_everything(acts: Any, expected: dict[str, Any], same_rows: Any) -> None:
    """Or some points."""
    assert same_rows(acts.load(), expected)
    assert same_rows(acts.load([POINTS[1]]), {POINTS[1]: expected[POINTS[1]]})


def test_in_other_processes(acts: Any, expected: dict[str, Any]) -> None:
    """It travels by its path, as a DataLoader's workers need it."""
    twin = pickle.loads(pickle.dumps(acts))
    assert torch.equal(twin[5][NAME], acts[5][NAME])
    batches = DataLoader(twin, batch_size=None, shuffle=False)
    assert torch.equal(torch.cat([sample[NAME] for sample in batches]), expected[NAME].values)


def test_as_a_hugging_face_dataset(acts: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    """One row a sample, with the rows' width in the features."""
    made = acts.to_dataset([NAME], cache_dir=str(tmp_path))
    assert made.column_names == ["input_ids", NAME]
    assert len(made) == 40
    rows = made.with_format("torch")
    for index in (0, 7, 39):
        assert torch.equal(rows[index][NAME], expected[NAME][index])
        assert torch.equal(rows[index]["input_ids"], acts[index]["input_ids"])


def test_unknown_points(acts: Any) -> None:
    """Those that are there are named."""
    for ask in (
        lambda: acts["blocks.3.hook_out"],
        lambda: acts.shuffled("x", 4),
        lambda: acts.load(["x"]),
    ):
        with pytest.raises(UnknownPointError, match=r"model\.layers\.1\.mlp"):
            ask()


def test_rows_that_are_not_there(acts: Any) -> None:
    """Numbers beyond, and what is no number."""
    with pytest.raises(IndexError):
        acts[NAME][10**6]
    for wrong in (torch.ones(3, dtype=torch.bool), [0.5], [[1]]):
        with pytest.raises(InputError, match="rows are picked"):
            acts[NAME][wrong]


# --- shuffled -----------------------------------------------------------------------------------------------


def keys(rows: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in rows.tolist()]


@pytest.mark.parametrize(("batch_size", "buffer_rows"), [(7, 64), (50, 20), (10**6, 10**6), (1, 1)])
def test_every_row_once_an_epoch(
    acts: Any, expected: dict[str, Any], batch_size: int, buffer_rows: int
) -> None:
    """In full batches but for an epoch's last, in another order each epoch."""
    rows = expected[NAME].values
    stream = acts.shuffled(NAME, batch_size, buffer_rows, seed=3, epochs=2)
    batches = list(stream)
    assert len(batches) == len(stream)
    half = len(batches) // 2
    assert all(len(batch) == batch_size for batch in batches[: half - 1])
    epochs = [torch.cat(batches[:half]), torch.cat(batches[half:])]
    for epoch in epochs:
        assert sorted(keys(epoch)) == sorted(keys(rows))
        assert not torch.equal(epoch, rows)
    assert not torch.equal(*epochs)


def test_order_by_seed(acts: Any) -> None:
    """The same for the same seed; another one for another."""

    def order(seed: int, epochs: int = 1) -> Tensor:
        return torch.cat(list(acts.shuffled(NAME, 16, 128, seed=seed, epochs=epochs)))

    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    second = order(0, 2)[len(order(0)) :]
    assert not torch.equal(second, order(1))


def test_rows_are_mixed_far_and_wide(acts: Any, expected: dict[str, Any]) -> None:
    """A buffer of a quarter of the rows holds rows of most samples, and neighbours do not stay together."""
    where = {key: number for number, key in enumerate(keys(expected[NAME].values))}
    n = acts.n_rows
    first = next(iter(acts.shuffled(NAME, n // 4, n // 4)))
    places = torch.tensor([where[key] for key in keys(first)]).double()
    assert places.max() - places.min() > 0.9 * n
    apart = places.diff().abs()
    assert apart.mean() > 0.1 * n


@pytest.mark.parametrize("after", [0, 3, 29, 40])
def test_going_on(acts: Any, after: int) -> None:
    """From a state, also in the second epoch, in another process."""

    def new() -> Any:
        return acts.shuffled(NAME, 20, 100, seed=5, epochs=2)

    whole = new()
    batches = [next(whole) for _ in range(after)]
    state = json.loads(json.dumps(whole.state_dict()))
    rest = list(whole)
    other = new()
    other.load_state_dict(state)
    again = list(other)
    assert len(batches) + len(rest) == len(whole)
    assert len(again) == len(rest)
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))


def test_states_of_another_order(acts: Any) -> None:
    """Are refused, and numbers below one."""
    state = acts.shuffled(NAME, 20, 100, seed=5).state_dict()
    with pytest.raises(InputError, match="seed"):
        acts.shuffled(NAME, 20, 100, seed=6).load_state_dict(state)
    with pytest.raises(InputError, match="batch_size"):
        acts.shuffled(NAME, 21, 100, seed=5).load_state_dict(state)
    with pytest.raises(InputError, match="no state"):
        acts.shuffled(NAME, 20, 100, seed=5).load_state_dict({**state, "epoch": -1})
    for wrong in (
        {"batch_size": 0},
        {"batch_size": 1, "buffer_rows": 0},
        {"batch_size": 1, "epochs": 0},
    ):
        with pytest.raises(InputError):
            acts.shuffled(NAME, **wrong)


# --- trust --------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(acts: Any, tmp_path: Path) -> Path:
    """A copy that tests may spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in acts.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def spoil(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def sized(size: int) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["shards"][0].update(bytes=size)


def renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["shards"][0].update(file=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed("../copy/rank0-00000.safetensors"), "in the folder itself"),
        (renamed("/etc/passwd"), "in the folder itself"),
        (renamed("/tmp/x.safetensors"), "in the folder itself"),
        (renamed("C:\\x.safetensors"), "in the folder itself"),
        (renamed("rank0-00000.pt"), "in the folder itself"),
        (renamed(".safetensors"), "in the folder itself"),
        (renamed("none.safetensors"), "missing"),
        (renamed("rank0-00001.safetensors"), "bytes|twice"),
        (lambda index: index["shards"][0].update(bytes=7), "not 7"),
        (lambda index: index["shards"][0].update(rows=7), "samples, rows and tokens"),
        (lambda index: index["shards"][0].pop("sha256"), "sha256"),
        (lambda index: index["shards"].pop(), "each sample once"),
        (lambda index: index.update(shards=[]), "shards"),
        (lambda index: index.update(shards=[3]), "no file"),
        (lambda index: index.update(format="torch"), "'torch'"),
        (lambda index: index.update(version=2), "version 2"),
        (lambda index: index.pop("samples"), "samples"),
        (lambda index: index.update(points=[]), "points"),
        (lambda index: index["points"].update({NAME: {"shape": [64]}}), "shape and dtype"),
        (lambda index: index["points"][NAME].update(shape=[-1]), "shape and dtype"),
        (lambda index: index["points"][NAME].update(dtype="PICKLE"), "PICKLE"),
        (lambda index: index["extraction"].pop("settings"), "settings"),
    ],
)
def test_an_index_that_lies(copied: Path, change: Any, said: str) -> None:
    """Is refused when it is opened."""
    spoil(copied, change)
    with pytest.raises(InputError, match=said):
        ExtractedActivations(copied)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x80", "null"])
def test_an_index_that_is_none(copied: Path, text: str) -> None:
    """Is refused with the file's name."""
    (copied / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"index\.json"):
        ExtractedActivations(copied)


def test_no_index(tmp_path: Path) -> None:
    """There is no extraction."""
    with pytest.raises(FileNotFoundError, match=r"no index\.json"):
        ExtractedActivations(tmp_path)


def test_a_link_out_of_the_folder(copied: Path, tmp_path: Path) -> None:
    """Is not followed."""
    shard = copied / "rank0-00000.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="leads out of its folder"):
        ExtractedActivations(copied)


def test_shards_of_another_kind(copied: Path) -> None:
    """A pickle of the right size is not loaded; nor is a shard without its tables, or of another shape."""
    shard = copied / "rank0-00000.safetensors"
    held = {name: x.clone() for name, x in load_file(shard).items()}
    bomb = pickle.dumps(b"x" * (shard.stat().st_size - 40))
    shard.write_bytes(bomb)
    spoil(copied, lambda index: index["shards"][0].update(bytes=len(bomb)))
    with pytest.raises(InputError, match="damaged"):
        ExtractedActivations(copied)
    for change in ({NAME: held[NAME][:, :3].contiguous()}, {"#samples": None}):
        kept = {k: v for k, v in {**held, **change}.items() if v is not None}
        save_file(kept, shard)
        size = shard.stat().st_size
        spoil(copied, sized(size))
        with pytest.raises(InputError, match=r"damaged|index says"):
            ExtractedActivations(copied).load()


def test_verify(copied: Path) -> None:
    """Reads everything, and names the shard in which one bit is wrong."""
    ExtractedActivations(copied).verify()
    shard = copied / "rank0-00002.safetensors"
    held = bytearray(shard.read_bytes())
    held[len(held) // 2] ^= 1
    shard.write_bytes(held)
    with pytest.raises(InputError, match=r"1 of \d+ shards .* rank0-00002"):
        ExtractedActivations(copied).verify()
