"""What splitters cost against loops written by hand, over the same batches, interleaved in one process.

Run: ``python tests/benchmarks/splitters.py [--only demo] [--rounds 30] [--threads 2]``.

Activations: against the model's own forward up to the split point, where a plain hook keeps what passes and
ends the run, over batches that are tokenized, sorted and padded already. Gradients: against one backward pass for
each target, by a plain hook.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from bench import Row, compare, gpt2_small, llama_512
from torch import Tensor, nn

from lensbridge import (
    Granularity,
    ModelWithSplitPoints,
    SplitterForGeneration,
    TransformerBridge,
    demo,
)
from lensbridge.methods.granularity import Groups


class Stop(Exception):  # noqa: N818 - not an error
    """The place was passed."""


def texts_of_the_demo() -> list[str]:
    """Prompts of the embedded model, of several lengths."""
    from lensbridge.demo.tasks import CAPITAL_FRAMES, CAPITALS

    prompts = [frame.prompt(country) for frame in CAPITAL_FRAMES for country in CAPITALS]
    return [" ".join(prompts[i : i + 1 + i % 3]) for i in range(256)]


def ids_of(n: int, longest: int) -> dict[str, list[list[int]]]:
    """Random ids of several lengths."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (n,), generator=random).tolist()
    return {"input_ids": [torch.randint(8, 900, (k,), generator=random).tolist() for k in lengths]}


def splitter_of(name: str) -> tuple[SplitterForGeneration, Any]:
    """A model split at its middle layer, and what to run it on."""
    bridge = TransformerBridge.boot_transformers(demo.path())
    if name == "demo":
        return SplitterForGeneration(bridge, 2, batch_size=16), texts_of_the_demo()
    build, inputs = {
        "gpt2-small": (gpt2_small, ids_of(16, 64)),
        "llama-512": (llama_512, ids_of(16, 128)),
    }[name]
    model = build()
    layer = len(TransformerBridge(model).architecture.blocks) // 2
    return SplitterForGeneration(model, layer, tokenizer=bridge.tokenizer, batch_size=8), inputs


def prepared(splitter: Any, inputs: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Ids and masks of the batches a splitter makes; no mask where nothing is padded."""
    samples = splitter.samples(inputs)
    batches = splitter.batches(samples, [Groups([], [])] * len(samples))
    return [(batch.ids, batch.inputs().get("attention_mask")) for batch in batches]


def by_hand(splitter: Any, batches: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """What the layer's output is for each batch, padding included."""
    model, kept = splitter.model, []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        kept.append(out if isinstance(out, Tensor) else out[0])
        raise Stop

    layer = splitter.split_point.split(".")[1]
    path = splitter.bridge.architecture.blocks[int(layer)].path
    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        with torch.no_grad():
            for ids, mask in batches:
                with suppress(Stop):
                    model(ids, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    return kept


def one_by_one(splitter: Any, batch: tuple[Tensor, Tensor | None], n: int, trains: bool) -> Tensor:
    """Gradients of n positions' largest logits by the layer's output, a backward pass for each position.

    Where the parameters train, each pass goes through them as well, as ``loss.backward()`` does.
    """
    model, leaf = splitter.model, []

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        states = out if isinstance(out, Tensor) else out[0]
        leaf.append(states.detach().requires_grad_())
        made = leaf[0] * 1
        return made if isinstance(out, Tensor) else (made, *out[1:])

    layer = splitter.split_point.split(".")[1]
    path = splitter.bridge.architecture.blocks[int(layer)].path
    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        ids, mask = batch
        best = model(ids, attention_mask=mask, use_cache=False).logits.max(-1).values.sum(0)
    finally:
        handle.remove()
    found = []
    for k in range(n):
        if trains:
            best[k].backward(retain_graph=True)
            found.append(leaf[0].grad.clone())
            leaf[0].grad = None
        else:
            found.append(torch.autograd.grad(best[k], leaf[0], retain_graph=True)[0])
    return torch.stack(found)


def measure(name: str, rounds: int) -> Iterator[Row]:
    """All rows of one model."""
    splitter, inputs = splitter_of(name)
    batches = prepared(splitter, inputs)
    given: dict[str, Callable[[], Any]] = {}
    if isinstance(inputs, list):
        encoded = splitter.tokenizer(inputs)
        split = ModelWithSplitPoints(splitter.bridge, None, 2, batch_size=splitter.batch_size)
        given["get_activations of texts"] = lambda: splitter.get_activations(inputs)
        given["... by word"] = lambda: split.get_activations(inputs, Granularity.WORD)
        given["get_activations of ids"] = lambda: splitter.get_activations(encoded)
    else:
        given["get_activations of ids"] = lambda: splitter.get_activations(inputs)
    for what, ours in given.items():
        ratio, ms = compare(ours, lambda: by_hand(splitter, batches), rounds)
        yield Row(name, what, "bare forward, same batches", ratio, ms, "1.05")
    yield from gradients(name, splitter, batches[0], max(3, rounds // 3))


def gradients(
    name: str, splitter: Any, batch: tuple[Tensor, Tensor | None], rounds: int
) -> Iterator[Row]:
    """16 targets of each text of a batch, with one direction as a concept for each feature."""
    ids, mask = batch
    rows, width = ids.shape
    given = {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})}
    raw = {"concepts_x_gradients": False, "normalization": False, "batch_size": rows}
    targets = list(range(16))

    def ours() -> Any:
        return splitter.concept_output_gradient(given, torch.clone, torch.clone, targets, **raw)

    for trains in (False, True):
        for parameter in splitter.model.parameters():
            parameter.requires_grad_(trains)
        against = "16 backward passes, " + ("parameters too" if trains else "parameters frozen")
        ratio, ms = compare(
            ours, lambda trains=trains: one_by_one(splitter, batch, 16, trains), rounds
        )
        what = f"gradients of 16 targets, {rows} x {width} tokens: {ratio * ms / 1e3:.2f} s"
        yield Row(name, what, against, ratio, ms, "")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="substring of the cases to run")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| model | what | against | ratio | theirs, ms | budget |")
    print("|---|---|---|---|---|---|")
    for name in ("demo", "gpt2-small", "llama-512"):
        if options.only in name:
            for row in measure(name, options.rounds):
                print(
                    f"| {row.model} | {row.what} | {row.against} | {row.ratio:.2f} | {row.theirs_ms:.1f} "
                    f"| {row.budget} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
