"""What extraction costs against the bare model run over the same batches, on disk and in memory.

Run: ``python tests/benchmarks/extraction.py [--rounds 10] [--threads 2] [--only time] [--folder /tmp]``.

Time: 3 of 8 layers, kept in memory and written to disk, against the model's own forward over batches that are
padded already, and against the same ended by a plain hook behind the last of the layers. Size: bytes of the shards
against bytes of the rows. Memory: the peak of a process that writes 2 GB, above what it had with the model loaded and
run once.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from bench import Row, compare, llama_512
from torch import Tensor, nn

from lensbridge import TransformerBridge, extract_representations, extract_to
from lensbridge.methods.store.extraction import Extraction

LAYERS = [1, 4, 7]
SIZES = {"8 x 512, batches of 8 x 64": (32, 64, 8), "8 x 512, batches of 16 x 128": (32, 128, 16)}
"""Samples, tokens of the longest, samples a batch."""


class Stop(Exception):  # noqa: N818 - not an error
    """The last layer was passed."""


def dataset(n: int, longest: int, vocab: int = 8000) -> list[list[int]]:
    """Random ids, half as long as the longest at least."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (n,), generator=random).tolist()
    return [torch.randint(8, vocab, (k,), generator=random).tolist() for k in lengths]


def bare(
    bridge: TransformerBridge, data: Any, batch_size: int, *, stops: bool
) -> Callable[[], None]:
    """The model's own forward over the batches that extraction makes."""
    model: Any = bridge.original_model
    jobs = Extraction(bridge, LAYERS, batch_size=batch_size).jobs(data)
    batches: list[tuple[Tensor, dict[str, Tensor]]] = [job.inputs(0) for job in jobs]

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        raise Stop

    def run() -> None:
        handle = model.model.layers[LAYERS[-1]].register_forward_hook(stop) if stops else None
        try:
            with torch.no_grad():
                for ids, beside in batches:
                    with suppress(Stop):
                        model(ids, use_cache=False, **beside)
        finally:
            if handle is not None:
                handle.remove()

    return run


def times(rounds: int, folder: Path) -> Iterator[Row]:
    """Wall time, in memory and to disk."""
    bridge = TransformerBridge(llama_512())
    for name, (n, longest, batch_size) in SIZES.items():
        data, path = dataset(n, longest), folder / "acts"

        def memory(data: Any = data, size: int = batch_size) -> None:
            extract_representations(bridge, data, LAYERS, size)

        def disk(data: Any = data, size: int = batch_size, path: Path = path) -> None:
            shutil.rmtree(path, ignore_errors=True)
            extract_to(path, bridge, data, LAYERS, size)

        for stops in (False, True):
            against = "forward up to the last layer" if stops else "bare forward"
            theirs = bare(bridge, data, batch_size, stops=stops)
            for what, ours, budget in (("in memory", memory, "1.05"), ("to disk", disk, "1.15")):
                ratio, ms = compare(ours, theirs, rounds)
                yield Row(name, f"3 of 8 layers, {what}", against, ratio, ms, budget)


def sizes(folder: Path) -> Iterator[Row]:
    """Bytes written against bytes of the rows."""
    bridge = TransformerBridge(llama_512())
    for dtype in (torch.float32, torch.bfloat16):
        path = folder / f"sizes-{dtype}"
        acts = extract_to(path, bridge, dataset(128, 64), LAYERS, 16, dtype=dtype)
        rows = acts.n_rows * 512 * len(LAYERS) * dtype.itemsize
        written = sum(file.stat().st_size for file in path.iterdir())
        yield Row(
            f"llama 8 x 512, {dtype}",
            "bytes written",
            "bytes of the rows",
            written / rows,
            0,
            "1.01",
        )


def gigabytes(folder: str) -> None:
    """Write 2 GB and print what it took of the memory; in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # One wide layer with little in it: much to keep for little to compute.
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=1024,
        intermediate_size=64,
        num_attention_heads=8,
        num_key_value_heads=1,
        vocab_size=1000,
    )
    bridge = TransformerBridge(LlamaForCausalLM(config).eval())
    points = [
        f"blocks.0.{x}"
        for x in ("hook_in", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_out")
    ]
    stream = samples()
    extract_representations(bridge, [next(stream) for _ in range(8)], points, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n = 2 * 10**9 // (1024 * 4 * len(points)) // 256 + 1
    acts = extract_to(f"{folder}/2gb", bridge, stream, points, 8, max_samples=n)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = acts.n_rows * 1024 * 4 * len(points)
    print(json.dumps({"before": before, "after": after, "rows": rows}))


def samples() -> Iterator[Tensor]:
    """Random ids without end, 256 a sample."""
    random = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(8, 1000, (256,), generator=random)


def memory(folder: Path, threads: int) -> str:
    """A line on the peak of a process that writes 2 GB."""
    work = f"import torch, extraction; torch.set_num_threads({threads}); extraction.gigabytes({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", work],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    above = (found["after"] - found["before"]) / 1024
    return f"| {found['rows'] / 1e9:.2f} GB to disk | peak above model and one batch | | {above:.0f} MiB | | 300 MB |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="time, size or memory")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", default=None, help="where to write; a temporary folder unless given"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| model | what | against | ratio | theirs, ms | budget |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.only in "memory":
            print(memory(folder, options.threads), flush=True)
        rows = {"size": lambda: sizes(folder), "time": lambda: times(options.rounds, folder)}
        for what, measure in rows.items():
            if options.only in what:
                for row in measure():
                    print(
                        f"| {row.model} | {row.what} | {row.against} | {row.ratio:.3f} | "
                        f"{row.theirs_ms:.0f} | {row.budget} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
