"""What feeding an autoencoder from texts costs against the model's own passes over them, interleaved.

Run: ``python tests/benchmarks/streaming.py [--only demo] [--rounds 10] [--threads 2]``.

Against: ``get_activations`` of the same texts, piece by piece, which ends behind the place and keeps nothing. The
first ratio is the stream alone (order, buffer, batches), the second with an autoencoder that trains on it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from bench import compare, gpt2_small, llama_512

from lensbridge import ModelWithSplitPoints, Streaming, TopKSAEConcepts, TransformerBridge, demo
from lensbridge.demo.tasks import documents
from lensbridge.methods.concepts.buffer import ShuffleBuffer
from lensbridge.methods.concepts.streaming import source_of


def measure(name: str, rounds: int) -> None:
    """Two rows of one model."""
    bridge = TransformerBridge.boot_transformers(demo.path())
    count = 512
    if name != "demo":
        build: Callable[[], Any] = {"gpt2-small": gpt2_small, "llama-512": llama_512}[name]
        bridge, count = TransformerBridge(build(), bridge.tokenizer), 64
    texts = list(itertools.islice(documents(0), count))
    point = f"blocks.{len(bridge.architecture.blocks) // 2}.hook_resid_post"
    how = Streaming(buffer=4096)
    split = ModelWithSplitPoints(bridge, split_points=[point], batch_size=how.texts_per_batch)
    order = torch.Generator()

    def theirs() -> None:
        for start in range(0, count, 256):
            split.get_activations(texts[start : start + 256], device=None)

    def stream() -> None:
        source = source_of(texts, bridge, None, [point], how)
        buffer = ShuffleBuffer(how.buffer, order)
        for piece in source.pieces(order):
            buffer.add(piece)
            if buffer.is_full:
                list(buffer.draw(1024))
        list(buffer.draw(1024, all_of_it=True))

    explainer = TopKSAEConcepts(bridge, nb_concepts=1024, split_point=point, top_k=32)

    def fit() -> None:
        explainer.fit(texts, nb_epochs=1, stream=how, overwrite=True)

    ratio, ms = compare(stream, theirs, rounds)
    print(
        f"| {name} | streamed, mixed | passes alone | {ratio:.2f} | {ms:.0f} | 1.15 |", flush=True
    )
    ratio, ms = compare(fit, theirs, max(2, rounds // 3))
    print(
        f"| {name} | with TopK, 1,024 concepts, trained | passes alone | {ratio:.2f} | {ms:.0f} | |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="substring of the cases to run")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| model | what | against | ratio | theirs, ms | budget |\n|---|---|---|---|---|---|")
    for name in ("demo", "gpt2-small", "llama-512"):
        if options.only in name:
            measure(name, options.rounds)


if __name__ == "__main__":
    main()
