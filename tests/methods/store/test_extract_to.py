"""extract_to: the rows of extract_representations on disk, whole or to be gone on with."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lensbridge import (
    ExtractedActivations,
    InputError,
    TransformerBridge,
    UnknownPointError,
    extract_representations,
    extract_to,
)
from lensbridge.methods.store import extract as extract_module
from lensbridge.methods.store.shards import checksum

POINTS = ["blocks.0.hook_out", "model.layers.1.mlp"]
SMALL = 20_000
"""Bytes of a shard: a few batches."""


@pytest.fixture
def to_disk(llama_bridge: Any, texts: list[str], tmp_path: Path) -> Callable[..., Any]:
    """``to_disk(**options)`` extracts the texts to ``tmp_path / "acts"``."""

    def go(dataset: Any = None, layers: Any = POINTS, **options: Any) -> Any:
        given = {"batch_size": 3, "shard_bytes": SMALL, **options}
        data = texts if dataset is None else dataset
        return extract_to(
            tmp_path / "acts", given.pop("bridge", llama_bridge), data, layers, **given
        )

    return go


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "last"},
        {"positions": "mean", "dtype": torch.bfloat16},
        {"positions": [0, -1], "max_samples": 17},
        {"positions": 0, "max_length": 3},
        {"layers": "blocks.1.attn.hook_z", "dtype": torch.float16},
    ],
    ids=str,
)
def test_the_rows_of_memory(
    to_disk: Any, llama_bridge: Any, texts: list[str], same_rows: Any, options: dict[str, Any]
) -> None:
    """Bit for bit, of any positions and dtype, in several shards."""
    acts = to_disk(**options)
    layers = options.pop("layers", POINTS)
    expected = extract_representations(llama_bridge, texts, layers, 3, **options)
    assert same_rows(acts.load(), expected)
    assert same_rows(ExtractedActivations(acts.path).load(), expected)


def test_files(to_disk: Any, texts: list[str], ids_of: Any, tmp_path: Path) -> None:
    """Plain safetensors under a JSON index that says what they are; nothing else is left in the folder."""
    acts = to_disk(dtype=torch.bfloat16)
    index = json.loads((tmp_path / "acts" / "index.json").read_text())
    files = [shard["file"] for shard in index["shards"]]
    assert len(files) > 2
    assert sorted(file.name for file in (tmp_path / "acts").iterdir()) == sorted(
        ["index.json", *files]
    )
    assert (index["samples"], index["rows"]) == (40, acts.n_rows)
    assert index["points"]["model.layers.1.mlp"] == {
        "point": "raw:model.layers.1.mlp.hook_out",
        "shape": [64],
        "dtype": "BF16",
    }
    assert index["extraction"]["model"]["class"] == "LlamaForCausalLM"
    assert index["extraction"]["tokenizer"]["size"] == 99
    seen: dict[int, list[int]] = {}
    for shard in index["shards"]:
        path = tmp_path / "acts" / shard["file"]
        held = load_file(path)
        assert path.stat().st_size == shard["bytes"]
        assert checksum(path) == shard["sha256"]
        assert held["blocks.0.hook_out"].dtype == torch.bfloat16
        assert len(held["blocks.0.hook_out"]) == shard["rows"] == held["#counts"].sum()
        tokens = held["#tokens"].split(held["#lengths"].tolist())
        seen |= {int(i): own.tolist() for i, own in zip(held["#samples"], tokens, strict=True)}
    assert [seen[i] for i in range(40)] == ids_of(texts)


def test_shards_cost_little_more_than_their_rows(to_disk: Any, ids: Any) -> None:
    """At the default size of a shard, with a width of 64 and short texts: still less than 1 in 100 more."""
    samples = torch.randint(8, 160, (64, 128), generator=torch.Generator().manual_seed(0))
    acts = to_disk(samples, layers=[0, 1, 2, 3], batch_size=8, shard_bytes=2**26)
    written = sum(shard["bytes"] for shard in acts.index["shards"])
    assert written <= 1.01 * acts.n_rows * 64 * 4 * 4


def test_memory_is_bounded(to_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long stream no more than a window of samples is read ahead of the rows, and shards go as they fill."""
    read, ahead, sizes = [0], [0], []
    put, write = extract_module.ShardWriter.put, extract_module.write_shard

    def watched_put(self: Any, batch: Any) -> None:
        put(self, batch)
        ahead.append(read[0] - 2 * (batch.number + 1))

    def watched_write(path: Path, pieces: Any) -> Any:
        sizes.append(sum(x.nbytes for held in pieces.values() for x in held))
        return write(path, pieces)

    def stream() -> Iterator[list[int]]:
        for i in range(260):
            read[0] += 1
            yield [8 + i % 100, 9, 10]

    monkeypatch.setattr(extract_module.ShardWriter, "put", watched_put)
    monkeypatch.setattr(extract_module, "write_shard", watched_write)
    acts = to_disk(stream(), layers=0, batch_size=2)
    assert max(ahead) <= 128
    assert max(sizes) < 1.2 * SMALL
    assert len(sizes) == len(acts.index["shards"]) > 4


def test_writing_overlaps_computing(
    to_disk: Any, monkeypatch: pytest.MonkeyPatch, llama_bridge: Any
) -> None:
    """While a shard is written, batches run on: the first write ends only once the model has run again."""
    again, runs = threading.Event(), [0]
    write = extract_module.write_shard

    def slow(path: Path, pieces: Any) -> Any:
        if path.name.endswith("00000.safetensors"):
            assert again.wait(timeout=30)
        return write(path, pieces)

    def count(module: Any, args: Any) -> None:
        runs[0] += 1
        if runs[0] == 2:  # the first shard is the first batch
            again.set()

    monkeypatch.setattr(extract_module, "write_shard", slow)
    handle = llama_bridge.original_model.model.layers[0].register_forward_pre_hook(count)
    to_disk(batch_size=3)
    handle.remove()
    assert again.is_set()


def test_a_full_disk_is_told_of_and_can_be_gone_on_from(
    to_disk: Any,
    monkeypatch: pytest.MonkeyPatch,
    llama_bridge: Any,
    texts: list[str],
    same_rows: Any,
) -> None:
    """The error of the writing thread is raised; the shards before are not lost."""
    write, ran = extract_module.write_shard, []

    def full(path: Path, pieces: Any) -> Any:
        if path.name.endswith("00003.safetensors"):
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "write_shard", full)
        with pytest.raises(OSError, match="No space left"):
            to_disk()
    handle = llama_bridge.original_model.model.layers[0].register_forward_pre_hook(
        lambda module, args: ran.append(1)
    )
    acts = to_disk(resume=True)
    handle.remove()
    assert len(ran) < 14
    assert same_rows(acts.load(), extract_representations(llama_bridge, texts, POINTS, 3))


def test_a_shard_that_was_not_noted_is_taken_away(to_disk: Any, tmp_path: Path) -> None:
    """Left by a process that does not go on; what is not the extraction's own stays."""
    whole = to_disk()
    folder = tmp_path / "acts"
    first = whole.index["shards"][0]["file"]
    for name in ("rank7-00003.safetensors", "mine.safetensors"):
        (folder / name).write_bytes((folder / first).read_bytes())
    again = to_disk(resume=True)
    assert not (folder / "rank7-00003.safetensors").exists()
    assert (folder / "mine.safetensors").exists()
    for name in whole.points:
        assert torch.equal(again[name][:], whole[name][:])


def test_an_extraction_that_wrote_nothing_leaves_nothing(to_disk: Any, tmp_path: Path) -> None:
    """Errors in the first batch, in a name, in the dataset."""
    for options, error in (
        ({"layers": "blocks.0.attn.hook_pattern"}, InputError),
        ({"layers": "nonsense"}, UnknownPointError),
        ({"dataset": iter(())}, InputError),
        ({"dataset": [[1], [999]]}, InputError),
        ({"shard_bytes": 0}, InputError),
    ):
        with pytest.raises(error):
            to_disk(**options)
        assert not (tmp_path / "acts").exists()


# --- going on -----------------------------------------------------------------------------------------------


def stopped(to_disk: Any, texts: list[str], after: int, **options: Any) -> None:
    """Begin an extraction and break off."""

    class Break(Exception):  # noqa: N818 - not an error
        pass

    def stream() -> Iterator[str]:
        yield from texts[:after]
        raise Break

    with pytest.raises(Break):
        to_disk(stream(), **options)


def test_what_is_there_is_not_overwritten(to_disk: Any, texts: list[str], tmp_path: Path) -> None:
    """Neither a finished nor an unfinished extraction, nor other things, unless asked to go on."""
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"thesis\.tex"):
            to_disk(resume=resume)
    (tmp_path / "acts" / "thesis.tex").unlink()
    many = texts * 6
    stopped(to_disk, many, 210)
    with pytest.raises(InputError, match="unfinished"):
        to_disk(many)
    with pytest.raises(InputError, match="not finished"):
        ExtractedActivations(tmp_path / "acts")
    first = to_disk(many, resume=True)
    with pytest.raises(InputError, match="a finished extraction"):
        to_disk(many)
    assert to_disk(iter(()), resume=True).index == first.index
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        extract_to(tmp_path / "file", first and to_disk.__closure__[0].cell_contents, texts, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [0]}, "settings.points.model.layers.1.mlp"),
        ({"batch_size": 4}, "settings.batch_size was 3, now it is 4"),
        ({"positions": "last"}, "settings.positions was 'all', now it is 'last'"),
        ({"dtype": torch.float16}, "settings.dtype"),
        ({"max_length": 8}, "settings.max_length"),
        ({"max_samples": 220}, "settings.max_samples"),
    ],
)
def test_another_extraction_is_not_gone_on_with(
    to_disk: Any, texts: list[str], options: dict[str, Any], said: str
) -> None:
    """What differs is said."""
    stopped(to_disk, texts * 6, 210)
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        to_disk(texts * 6, resume=True, **options)


def test_another_model_or_dataset_is_not_gone_on_with(
    to_disk: Any, texts: list[str], tiny: Any, tokenizer: Any, llama_bridge: Any
) -> None:
    """A checkpoint of the same shape, another configuration, other texts, fewer texts."""
    many = texts * 6
    stopped(to_disk, many, 210)
    twin = tiny("llama", num_hidden_layers=4)
    twin.model.layers[2].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(InputError, match=r"model\.weights"):
        to_disk(many, resume=True, bridge=TransformerBridge(twin, tokenizer))
    other = tiny("llama", num_hidden_layers=4, rms_norm_eps=1e-3)
    with pytest.raises(InputError, match=r"model\.config"):
        to_disk(many, resume=True, bridge=TransformerBridge(other, tokenizer))
    with pytest.raises(InputError, match="the dataset has changed: its batch 0"):
        to_disk(["x" * 40, *many[1:]], resume=True)
    with pytest.raises(InputError, match="the dataset has changed"):
        to_disk(many[:150], resume=True)
    assert len(to_disk(many, resume=True)) == 240
    assert TransformerBridge(twin, tokenizer).cfg.n_layers == llama_bridge.cfg.n_layers


def test_damage_is_found_before_going_on(to_disk: Any, texts: list[str], tmp_path: Path) -> None:
    """A shard cut short or gone; a journal with a line of nonsense; a last line cut short is no damage."""
    many = texts * 6
    stopped(to_disk, many, 210)
    folder = tmp_path / "acts"
    journal, shard = folder / "rank0.jsonl", folder / "rank0-00001.safetensors"
    lines, held = journal.read_bytes(), shard.read_bytes()
    for break_it, said in (
        (lambda: shard.write_bytes(held[:-1]), "cut short"),
        (shard.unlink, "missing"),
        (lambda: journal.write_bytes(b"{]\n" + lines), "damaged"),
        (
            lambda: journal.write_bytes(lines.replace(b"rank0-00001", b"../rank0-001")),
            "in the folder itself",
        ),
    ):
        break_it()
        with pytest.raises(InputError, match=said):
            to_disk(many, resume=True)
        journal.write_bytes(lines)
        shard.write_bytes(held)
    journal.write_bytes(lines[:-20])
    assert len(to_disk(many, resume=True)) == 240
