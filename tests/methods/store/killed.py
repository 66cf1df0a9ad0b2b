"""Extractions killed at random points and gone on with, by one process or several; prints what came of them.

Run by ``test_killed.py`` in a process of its own: it forks, so that torch is imported once, and before it computes
with more than one thread, so that forks may compute.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from lensbridge import ExtractedActivations, TransformerBridge, extract_representations, extract_to
from lensbridge.methods.store.shards import checksum

POINTS = [0, "blocks.1.mlp.hook_out"]


def forked(work: Callable[[], Any]) -> int:
    """Do something in a child; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """How a child ended: its exit code, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ranks(world: int, work: Callable[[], Any]) -> list[int]:
    """Do something in children that are the ranks of a run, as torchrun starts them; their pids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def as_rank(rank: int) -> None:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in {**told, **address}.items()})
        work()

    return [forked(partial(as_rank, rank)) for rank in range(world)]


class Trials:
    """One extraction, done again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = transformers.LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        torch.manual_seed(0)
        self.bridge = TransformerBridge(transformers.LlamaForCausalLM(config).eval())
        chosen = random.Random(0)
        self.data = [
            [chosen.randrange(100) for _ in range(chosen.randint(1, 30))] for _ in range(120)
        ]
        self.expected = extract_representations(self.bridge, self.data, POINTS, 4)

    def extract(self, path: Path) -> ExtractedActivations:
        return extract_to(path, self.bridge, self.data, POINTS, 4, shard_bytes=20_000, resume=True)

    def is_right(self, path: Path) -> bool:
        """Every row once, and none other, bit for bit; nothing left in the folder that does not belong there."""
        acts = ExtractedActivations(path)
        acts.verify()
        rows = acts.load()
        files = {"index.json", *(shard["file"] for shard in acts.index["shards"])}
        return (
            all(torch.equal(rows[name].values, x.values) for name, x in self.expected.items())
            and all(torch.equal(rows[name].offsets, x.offsets) for name, x in self.expected.items())
            and {file.name for file in path.iterdir()} == files
        )

    def killed_by_the_clock(self, seed: int, longest: float) -> dict[str, Any]:
        """Killed after a random time, and gone on with."""
        path, chosen = self.folder / f"clock{seed}", random.Random(seed)
        pid = forked(lambda: self.extract(path))
        time.sleep(chosen.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        killed = ended(pid) == -signal.SIGKILL
        code = ended(forked(lambda: self.extract(path)))
        sums = {file.name: checksum(file) for file in path.glob("*.safetensors")}
        return {"killed": killed, "code": code, "right": self.is_right(path), "sums": sums}

    def killed_at_a_write(self, number: int) -> dict[str, Any]:
        """Killed just before, or in the midst of, what is done for the n-th time to have something on the disk."""
        path = self.folder / f"write{number}"

        def work() -> None:
            settle, count = os.fsync, [0]

            def counted(handle: int) -> None:
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                settle(handle)

            with mock.patch.object(os, "fsync", counted):
                self.extract(path)

        killed = ended(forked(work)) == -signal.SIGKILL
        code = ended(forked(lambda: self.extract(path)))
        return {"killed": killed, "code": code, "right": self.is_right(path)}

    def several_ranks(self, first: int, second: int, wait: float) -> dict[str, Any]:
        """Begun by some ranks, all of which are killed; gone on with by others."""
        path = self.folder / f"ranks{first}{second}"
        codes: list[int] = []
        if first:
            pids = ranks(first, lambda: self.extract(path))
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and not list(path.glob("rank0-*")):
                time.sleep(0.005)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            codes = [ended(pid) for pid in pids]
        return {
            "first": codes,
            "second": [ended(pid) for pid in ranks(second, lambda: self.extract(path))],
            "right": self.is_right(path),
            "by": sorted({file.name.split("-")[0] for file in path.glob("*.safetensors")}),
        }


def main() -> None:
    torch.set_num_threads(1)
    trials = Trials(Path(sys.argv[1]))
    started = time.perf_counter()
    whole = ended(forked(lambda: trials.extract(trials.folder / "whole")))
    longest = time.perf_counter() - started
    sums = {file.name: checksum(file) for file in (trials.folder / "whole").glob("*.safetensors")}
    found = {
        "whole": {"code": whole, "right": trials.is_right(trials.folder / "whole"), "sums": sums},
        "clock": [trials.killed_by_the_clock(seed, longest) for seed in range(20)],
        "write": [trials.killed_at_a_write(number) for number in (1, 2, 3, 4, 5, 6, 17)],
        "ranks": [trials.several_ranks(*pair, wait=30) for pair in ((0, 2), (2, 3), (3, 1))],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
