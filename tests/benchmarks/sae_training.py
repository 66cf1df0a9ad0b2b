"""Activations a second in training, beside overcomplete's own loop: the same rows, kind, batches, optimizer.

Run on a quiet machine: ``python tests/benchmarks/sae_training.py --threads 2``. Not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lensbridge.methods.concepts.engine import engine
from lensbridge.methods.concepts.training import Trainer, TrainingOptions

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SAE": ({}, {}),
    "TopKSAE": ({"top_k": 32}, {"top_k": 32}),
    "BatchTopKSAE": ({"top_k": 32}, {"top_k": 32 * 1024}),
    "JumpSAE": ({}, {}),
    "MpSAE": ({"k": 8}, {"k": 8}),
}


def ours(kind: str, rows: Tensor, c: int, lr: float) -> Callable[[], None]:
    """A pass over the rows by the loop of lensbridge."""
    model = getattr(engine(), kind)(rows.shape[1], c, **KINDS[kind][0])
    n = len(rows)
    trainer = Trainer(model, TrainingOptions(lr=lr), n_steps=10 * n // 1024, dead_window=n)
    away = (rows - rows.mean(0)).norm(dim=1).mean()
    trainer.begin(rows.mean(0), rows.shape[1] ** 0.5 / away, float(away**2))

    def once() -> None:
        for picked in torch.randperm(n).split(1024):
            trainer.train(rows[picked])
        trainer.end_epoch()

    return once


def theirs(kind: str, rows: Tensor, c: int, lr: float) -> Callable[[], None]:
    """The same by overcomplete's, with the mean squared error and its lowest monitoring that reports."""
    import overcomplete.sae as upstream
    from overcomplete.sae.train import train_sae

    model = getattr(upstream, kind)(rows.shape[1], c, **KINDS[kind][1])
    data = torch.utils.data.TensorDataset(rows)
    loader = torch.utils.data.DataLoader(data, batch_size=1024, shuffle=True)
    adam = torch.optim.Adam(model.parameters(), lr=lr)

    def loss(x: Tensor, x_hat: Tensor, *rest: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def once() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            train_sae(model, loader, loss, adam, nb_epochs=1, clip_grad=None, monitoring=1)

    return once


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--size", type=int, nargs=2, default=(768, 4096), metavar=("D", "CONCEPTS"))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    d, c = args.size
    atoms = torch.nn.functional.normalize(torch.randn(c, d), dim=1)
    chosen = torch.randint(0, c, (args.rows, 32))
    rows = torch.nn.functional.embedding_bag(
        chosen, atoms, per_sample_weights=torch.rand(args.rows, 32), mode="sum"
    )
    for kind in args.kinds:
        loops = {"ours": ours(kind, rows, c, 1e-3), "overcomplete": theirs(kind, rows, c, 1e-3)}
        best = dict.fromkeys(loops, float("inf"))
        # Turn by turn, so that what else the machine does meets both.
        for _ in range(args.rounds):
            for name, once in loops.items():
                start = time.perf_counter()
                once()
                best[name] = min(best[name], time.perf_counter() - start)
        speed = {name: len(rows) / seconds for name, seconds in best.items()}
        ratio = speed["ours"] / speed["overcomplete"]
        said = ", ".join(f"{name} {value:,.0f}/s" for name, value in speed.items())
        print(f"{kind} {d}x{c}: {said}, {ratio:.2f}x", flush=True)


if __name__ == "__main__":
    main()
