"""``lensbridge extract``, alone and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lensbridge import ExtractedActivations, TransformerBridge, demo, extract_representations
from lensbridge.cli import app

TEXTS = ["The capital of France is", "Mary gave a drink to John.", "Hello.", "One and two is"] * 5


@pytest.fixture(scope="module")
def bridge() -> Any:
    """The embedded model."""
    return TransformerBridge.boot_transformers(demo.path())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The texts in a file."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["extract", *map(str, arguments)])


def test_the_command_writes_what_the_function_does(
    bridge: Any, data: Path, tmp_path: Path, same_rows: Any
) -> None:
    """Layers by number and places by name; options; what it prints."""
    out = tmp_path / "acts"
    points = ["--points", 2, "--points", "transformer.h.1.mlp"]
    told = ["--batch-size", 3, "--dtype", "bfloat16", "--max-samples", 11, "--positions", "0,-1"]
    done = run(demo.path(), data, *points, *told, "--out", out)
    assert done.exit_code == 0, done.output
    assert "11 samples, 22 rows of blocks.2.hook_out, transformer.h.1.mlp" in done.stdout
    expected = extract_representations(
        bridge,
        TEXTS,
        [2, "transformer.h.1.mlp"],
        3,
        max_samples=11,
        positions=[0, -1],
        dtype=torch.bfloat16,
    )
    assert same_rows(ExtractedActivations(out).load(), expected)


def test_going_on(data: Path, tmp_path: Path) -> None:
    """Only when it is asked for."""
    given = (demo.path(), data, "--points", "-1", "--out", tmp_path / "acts")
    assert run(*given).exit_code == 0
    again = run(*given)
    assert again.exit_code == 1
    assert "resume=True" in again.output
    assert run(*given, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"data": "none.txt"}, 1, "there is no file"),
        ({"--points": "blocks.9.hook_out"}, 1, "blocks.3.hook_out"),
        ({"--dtype": "bf16"}, 2, "no dtype of torch"),
        ({"--positions": "first"}, 1, "positions"),
        ({"model": "no/such/folder"}, 1, "no/such/folder"),
    ],
)
def test_bad_arguments(
    data: Path, tmp_path: Path, change: dict[str, str], code: int, said: str
) -> None:
    """Are named, without a traceback, and nothing is written."""
    told = {"--points": "2", "--out": str(tmp_path / "acts"), **change}
    model, path = told.pop("model", demo.path()), told.pop("data", data)
    done = run(model, path, *(item for pair in told.items() for item in pair))
    assert done.exit_code == code
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "acts").exists()


@pytest.mark.slow
def test_two_processes(bridge: Any, tmp_path: Path, same_rows: Any) -> None:
    """The same command under torchrun: a shard set for each, the rows of one process, bit for bit."""
    data, out = tmp_path / "ids.jsonl", tmp_path / "acts"
    rows = [bridge.to_tokens(text)[0].tolist() for text in TEXTS]
    data.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "lensbridge", "extract", demo.path(), data, "--points", "2"]
    done = subprocess.run(
        list(map(str, [sys.executable, *launch, *command, "--batch-size", "3", "--out", out])),
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("20 samples") == 1
    acts = ExtractedActivations(out)
    assert same_rows(acts.load(), extract_representations(bridge, rows, 2, 3))
    assert {shard["file"][:5] for shard in acts.index["shards"]} == {"rank0", "rank1"}
