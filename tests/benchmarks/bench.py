"""What lensbridge costs, as ratios against the bare model and hand-written hooks, interleaved in one process.

Run: ``python tests/benchmarks/bench.py [--only tiny] [--rounds 30] [--threads 2] [--markdown]``.

Every ratio is the median over rounds of (ours / theirs) where a round times both back to back, so that other
load on the machine falls on both.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Row:
    """One line of the table."""

    model: str
    what: str
    against: str
    ratio: float
    theirs_ms: float
    budget: str


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median ratio ours / theirs, and theirs in milliseconds. The order alternates between rounds."""
    for _ in range(3):
        theirs(), ours()
    ratios, base = [], []
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn % 2:
                a, b = timed(ours), timed(theirs)
            else:
                b, a = timed(theirs), timed(ours)
            ratios.append(a / b)
            base.append(b)
    finally:
        gc.enable()
    return statistics.median(ratios), statistics.median(base) * 1e3


# --- what somebody would write by hand --------------------------------------------------------------------


def hand_residual(model: nn.Module, blocks: Any, ids: Tensor) -> dict[str, Tensor]:
    """The residual stream after every block, by plain PyTorch hooks."""
    kept: dict[str, Tensor] = {}
    handles = []
    for index, block in enumerate(blocks):

        def hook(module: nn.Module, args: Any, out: Any, index: int = index) -> None:
            kept[f"blocks.{index}"] = (out if isinstance(out, Tensor) else out[0]).detach()

        handles.append(block.register_forward_hook(hook))
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def hand_everything(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """The output of every module, by plain PyTorch hooks, with the patterns from an eager model."""
    kept: dict[str, Any] = {}
    handles = []
    for name, module in model.named_modules():

        def hook(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            kept[name] = out.detach() if isinstance(out, Tensor) else out

        handles.append(module.register_forward_hook(hook))
    try:
        kept["out"] = model(ids, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    return kept


# --- the models -------------------------------------------------------------------------------------------


def tiny_gpt2(**kwargs: Any) -> nn.Module:
    """4 layers, d_model 64: overhead shows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 1000}
    return GPT2LMHeadModel._from_config(GPT2Config(**sizes), **kwargs).eval()


def tiny_llama(**kwargs: Any) -> nn.Module:
    """4 layers, d_model 64."""
    return _llama(layers=4, d_model=64, heads=4, vocab=1000, **kwargs)


def gpt2_small(**kwargs: Any) -> nn.Module:
    """GPT-2 small's sizes, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel._from_config(GPT2Config(), **kwargs).eval()


def llama_512(**kwargs: Any) -> nn.Module:
    """8 layers, d_model 512."""
    return _llama(layers=8, d_model=512, heads=8, vocab=8000, **kwargs)


def _llama(*, layers: int, d_model: int, heads: int, vocab: int, **kwargs: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=d_model,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=4 * d_model,
        vocab_size=vocab,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM._from_config(config, **kwargs).eval()


CASES: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "tiny GPT-2 (4 x 64), 16 tokens": (tiny_gpt2, 16, 8),
    "tiny Llama (4 x 64), 16 tokens": (tiny_llama, 16, 8),
    "GPT-2 small, 64 tokens": (gpt2_small, 64, 1),
    "Llama 8 x 512, 128 tokens": (llama_512, 128, 1),
    "Llama 8 x 512, 1024 tokens": (llama_512, 1024, 1),
    "Llama 8 x 512, 2048 tokens": (llama_512, 2048, 1),
}


def first_of_its_kind(model: nn.Module) -> None:
    """Wrap a model whose architecture is not remembered: watch a run, infer, prove."""
    from lensbridge import TransformerBridge
    from lensbridge.bridge import infer

    infer._KNOWN.clear()
    TransformerBridge(model)


def measure(name: str, rounds: int) -> Iterator[Row]:
    """All budgets on one model."""
    from lensbridge import TransformerBridge

    build, length, scale = CASES[name]
    rounds = max(5, rounds * scale // (1 + length // 512))
    torch.manual_seed(0)
    model = build()
    eager = build(attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    bridge = TransformerBridge(model)
    gc.disable()
    start = min(timed(lambda: TransformerBridge(model)) for _ in range(10)) * 1e3
    cold = min(timed(lambda: first_of_its_kind(model)) for _ in range(5)) * 1e3
    gc.enable()
    ids = torch.randint(0, 1000, (1, length))
    blocks = bridge._stack.blocks
    with torch.no_grad():
        ratio, ms = compare(lambda: bridge(ids), lambda: model(ids), rounds)
        yield Row(name, "forward, no hooks", "bare forward", ratio, ms, "1.00")
        ratio, ms = compare(
            lambda: bridge.run_with_cache(ids, names_filter="blocks.*.hook_out"),
            lambda: hand_residual(model, blocks, ids),
            rounds,
        )
        yield Row(name, "cache the residual stream", "hand-written hooks", ratio, ms, "1.03")
        ratio, ms = compare(
            lambda: bridge.run_with_cache(ids), lambda: hand_everything(eager, ids), rounds
        )
        yield Row(name, "cache every point", "hooks on every module, eager", ratio, ms, "1.25")
    if length <= 64:
        yield from generating(name, model, bridge, ids[:, :16], max(5, rounds // 12))
    yield Row(name, "wrap the model (ms)", "", start, 0.0, "20 ms" if "small" in name else "")
    what = "wrap the first of its kind (ms)"
    yield Row(name, what, "", cold, 0.0, "100 ms" if "small" in name else "")


def generating(name: str, model: Any, bridge: Any, ids: Tensor, rounds: int) -> Iterator[Row]:
    """64 new tokens, against the model's own ``generate``."""
    given: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    given["eos_token_id"] = 2**31 - 1  # run to the end

    def theirs() -> Any:
        return model.generate(ids, **given)

    ratio, ms = compare(lambda: bridge.generate(ids, **given), theirs, rounds)
    yield Row(name, "generate 64 tokens", "model.generate", ratio, ms, "1.00")

    def cached(names_filter: Any) -> Any:
        return bridge.generate(ids, return_cache=True, names_filter=names_filter, **given)

    ratio, ms = compare(lambda: cached("blocks.*.hook_out"), theirs, rounds)
    what = "generate 64 tokens, cache the residual stream"
    yield Row(name, what, "model.generate", ratio, ms, "1.05")
    ratio, ms = compare(lambda: cached(None), theirs, rounds)
    yield Row(name, "generate 64 tokens, cache every point", "model.generate", ratio, ms, "")


def import_ratio(rounds: int = 5) -> Row:
    """`import lensbridge` with its bridge, against torch and transformers' own model classes."""

    def run(code: str) -> float:
        return timed(lambda: subprocess.run([sys.executable, "-c", code], check=True))

    base = "import torch, transformers"
    ours = base + ", lensbridge"
    run(ours)
    pairs = [(run(ours), run(base)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    return Row("-", "import lensbridge", base, ratio, min(b for _, b in pairs) * 1e3, "1.05")


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
    rows = [row for name in CASES if options.only in name for row in measure(name, options.rounds)]
    for row in [*rows, import_ratio()]:
        print(
            f"| {row.model} | {row.what} | {row.against} | {row.ratio:.2f} | {row.theirs_ms:.2f} "
            f"| {row.budget} |"
        )


if __name__ == "__main__":
    main()
