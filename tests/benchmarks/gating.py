"""What a step of causal head gating costs, interleaved in one process.

Run: ``python tests/benchmarks/gating.py [--rounds 20] [--threads 2] [--cpu]``. With ``--cpu`` it is processor time
that counts, on a machine that is not left alone; take one thread then, since threads that wait count too.

A Llama of 4 layers of width 128, 8 heads over 4 of keys and values, with a vocabulary of 32,000. A batch has 4 rows
of 32 tokens of which the last two count, and each row runs under 10 masks. By hand: forward and backward of the same
40 rows with frozen parameters, where the gradient goes to the embeddings. Where inteprelens can be imported, its
step stands beside ours (``PYTHONPATH=...``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import bench
import torch
from bench import Row, compare
from torch import Tensor, nn

from lensbridge import CHG, CHGDataset, CHGTrainer

VOCAB, ROWS, LENGTH, COUNTED, MASKS = 32_000, 4, 32, 2, 10


def llama() -> nn.Module:
    """4 layers, d_model 128, 8 heads over 4 of keys and values; frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def data() -> tuple[Tensor, Tensor]:
    """Ids of 64 rows, and which of their tokens count."""
    ids = torch.randint(5, VOCAB, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, -COUNTED:] = True
    return ids, counts


def ours(model: nn.Module, regularised: bool = False, **options: Any) -> Callable[[], Any]:
    """One update of a fit that goes on for ever; regularised, of both signs."""
    ids, counts = data()
    rows = CHGDataset.from_tokens(list(ids), list(counts))
    lasts = 10**6
    updates = {"num_updates": int(not regularised) * lasts, "num_reg_updates": lasts}
    fit = CHGTrainer(
        CHG(model, **options),
        rows,
        num_masks=MASKS,
        batch_size=ROWS,
        history_every=lasts,
        **updates,
    ).updates()
    return lambda: next(fit)


def by_hand(model: Any, times: int, keep: bool) -> Callable[[], Any]:
    """Forward and backward of so many copies of a batch; of all logits, or of those that are needed."""
    ids, _ = data()
    rows = ids[:ROWS].repeat_interleave(times, 0)
    targets = rows[:, -COUNTED:].flatten()
    options = {"logits_to_keep": COUNTED + 1} if keep else {}

    def step() -> None:
        embeds = model.get_input_embeddings()(rows).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False, **options).logits
        said = logits[:, -COUNTED - 1 : -1].flatten(0, 1)
        nn.functional.cross_entropy(said, targets).backward()

    return step


def theirs(model: nn.Module) -> Callable[[], Any] | None:
    """One update of inteprelens' trainer, as it comes; None where it cannot be imported."""
    try:
        from inteprelens import CHGTrainer as TheirTrainer
        from inteprelens.utils.ds import CHGDataset as TheirDataset
    except ImportError:
        return None
    ids, counts = data()
    rows = TheirDataset.from_tokens(ids, counts, pad_token_id=0)
    trainer = TheirTrainer(deepcopy(model), rows, num_masks=MASKS, batch_size=ROWS)
    fit = trainer.fit_stage("none", 10**6, show_progress=False)

    def step() -> None:
        next(fit)
        assert not torch.is_autocast_enabled("cpu")  # it would be ours to run under

    return step


def processor_time(fn: Callable[[], Any]) -> float:
    """Seconds of one call in which a core was ours."""
    start = time.process_time()
    fn()
    return time.process_time() - start


def logits_of(model: Any, step: Callable[[], Any]) -> int:
    """How many numbers the largest tensor of logits in a step holds."""
    sizes = [0]

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        sizes.append(out.numel())

    handle = model.lm_head.register_forward_hook(hook)
    try:
        step()
    finally:
        handle.remove()
    return max(sizes)


def measure(rounds: int) -> Iterator[Row]:
    """All rows."""
    torch.manual_seed(0)
    model = llama()
    name = f"{MASKS} masks"
    first = ours(model)
    whole, kept = (by_hand(model, MASKS, keep) for keep in (False, True))
    other = theirs(model)
    for what, step in {"all logits": whole, "logits_to_keep": kept}.items():
        yield Row(name, "a step", f"by hand, {what}", *compare(first, step, rounds), "1.30")
    if other is not None:
        yield Row(name, "a step", "inteprelens", *compare(first, other, rounds), "0.125")
    both = ours(model, regularised=True)
    double = by_hand(model, 2 * MASKS, keep=True)
    yield Row(
        name, "a regularised step, both signs", "by hand", *compare(both, double, rounds), "1.30"
    )
    last = ours(model, layers=[-1])
    yield Row(name, "a step, last layer only", "all layers", *compare(last, first, rounds), "")
    print(f"logits of a step: {logits_of(model, first):,} numbers", end="")
    print(f" (rows x loss tokens x vocabulary: {ROWS * MASKS * COUNTED * VOCAB:,});", end=" ")
    print(f"by hand {logits_of(model, whole):,}, with logits_to_keep {logits_of(model, kept):,}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.cpu:
        bench.timed = processor_time
    torch.set_num_threads(options.threads)
    print("| masks | what | against | ratio | theirs, ms | budget |")
    print("|---|---|---|---|---|---|")
    for row in measure(options.rounds):
        print(
            f"| {row.model} | {row.what} | {row.against} | {row.ratio:.3f} | {row.theirs_ms:.1f} "
            f"| {row.budget} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
