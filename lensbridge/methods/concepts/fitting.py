"""Training an autoencoder on a tensor of activations, from start or checkpoint to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...hooks import InputError
from ..files import read, write
from .figures import Spread
from .models import Autoencoder
from .training import Trainer, seeded

KIND = "lensbridge concept checkpoint"


@dataclass(frozen=True)
class Schedule:
    """How often the rows are gone through, and what is written on the way; see `SAEExplainer.fit`."""

    batch_size: int
    nb_epochs: int
    seed: int
    progress: bool
    checkpoint: Path | None
    resume: bool


def rows_of(activations: Any, width: int) -> Float[Tensor, "row d"]:
    """Activations as one tensor of rows.

    Args:
        activations: Floats [n, width], or a list of such.
        width: What they must have.
    Raises:
        InputError: Something else; of another width; none; or one with NaN or infinite numbers.
    """
    parts = list(activations) if isinstance(activations, (list, tuple)) else [activations]
    for part in parts:
        if not isinstance(part, Tensor) or part.dim() != 2 or not part.is_floating_point():
            is_tensor = isinstance(part, Tensor)
            said = f"{part.dtype} {list(part.shape)}" if is_tensor else type(part).__name__
            raise InputError(f"activations are floats [n, {width}], or a list of such; got {said}")
        if part.shape[1] != width:
            raise InputError(
                f"these activations are {part.shape[1]} wide, and the split point is {width} wide"
            )
    rows = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.zeros(0, width)
    if not len(rows):
        raise InputError(f"no activations: got {len(parts)} tensors without a row")
    rows = rows.detach()
    for start in range(0, len(rows), 65536):
        is_bad = ~rows[start : start + 65536].isfinite().all(1)
        if is_bad.any():
            first = start + int(is_bad.nonzero()[0])
            raise InputError(f"row {first} of the activations holds NaN or infinite numbers")
    return rows


def spread_of(rows: Float[Tensor, "row d"]) -> tuple[Tensor, Tensor, float]:
    """The mean of rows, what scales their distances from it to sqrt(d), and the mean of the squared ones.

    Raises:
        InputError: All rows are equal.
    """
    spread = Spread(rows.shape[1], rows.device)
    for part in rows.split(65536):
        spread.add(part)
    if not spread.total:
        raise InputError(
            f"all {len(rows)} rows of the activations are equal: there is nothing to learn"
        )
    distance = sum(
        (part.double() - spread.mean).norm(dim=1).sum() for part in rows.split(65536)
    ) / len(rows)
    scale = math.sqrt(rows.shape[1]) / distance
    return spread.mean.float(), torch.as_tensor(scale).float(), float(spread.total) / len(rows)


def fit_rows(
    trainer: Trainer,
    rows: Float[Tensor, "row d"],
    schedule: Schedule,
    identity: dict[str, Any],
) -> dict[str, list[Any]]:
    """Train on rows, in an order drawn anew for each epoch.

    Args:
        trainer: What is trained, at its start.
        rows: Activations; they stay where they are, and batches go where the model is.
        schedule: How often, and what is written on the way.
        identity: What a checkpoint must agree with.
    Returns:
        The history.
    Raises:
        InputError: A checkpoint of another fit, or a loss that is not finite.
    """
    model = trainer.model
    mean, scale, spread = spread_of(rows)
    trainer.begin(mean.to(model.device), scale.to(model.device), spread)
    order = torch.Generator().manual_seed(schedule.seed)
    identity = {**identity, "rows": len(rows), "sum": float(mean.double().sum())}
    path = schedule.checkpoint
    with torch.inference_mode(False), torch.enable_grad(), seeded(schedule.seed, model.device):
        if schedule.resume and path is not None and path.is_file():
            _resume(trainer, order, path, identity)
        steps = math.ceil(len(rows) / schedule.batch_size)
        with _Bar(schedule, trainer, steps) as bar:
            while trainer.epoch < schedule.nb_epochs:
                drawn = torch.randperm(len(rows), generator=order).to(rows.device)
                for picked in drawn.split(schedule.batch_size):
                    trainer.train(rows.index_select(0, picked))
                    bar.step()
                bar.show(trainer.end_epoch())
                if path is not None:
                    _keep(trainer, order, path, identity)
    return trainer.history


def _keep(trainer: Trainer, order: torch.Generator, path: Path, identity: dict[str, Any]) -> None:
    tensors, facts = trainer.state()
    tensors["order"] = order.get_state()
    tensors["random"] = torch.get_rng_state()
    if trainer.model.device.type == "cuda":
        tensors["random_cuda"] = torch.cuda.get_rng_state(trainer.model.device)
    write(path, tensors, {"kind": KIND, "identity": identity, **facts})


def _resume(trainer: Trainer, order: torch.Generator, path: Path, identity: dict[str, Any]) -> None:
    tensors, facts = read(path, KIND)
    for key, own in identity.items():
        if facts["identity"].get(key) != own:
            raise InputError(
                f"{path} holds another fit: its {key} is {facts['identity'].get(key)}, and here it is {own}"
            )
    trainer.load_state(tensors, facts)
    order.set_state(tensors["order"])
    torch.set_rng_state(tensors["random"])
    if "random_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random_cuda"], trainer.model.device)


class _Bar:
    """A progress bar with the figures so far, or nothing."""

    def __init__(self, schedule: Schedule, trainer: Trainer, steps: int) -> None:
        self.trainer = trainer
        self.bar: Any = None
        if schedule.progress:
            from tqdm import tqdm

            left = schedule.nb_epochs - trainer.epoch
            self.bar = tqdm(total=steps * left, desc="Training", unit="batch")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        # The bar says when it is drawn anew; figures, which wait for the device, are made only then.
        if self.bar is not None and self.bar.update():
            self.show(self.trainer.figures())

    def show(self, figures: dict[str, float]) -> None:
        if self.bar is not None:
            said = {name: f"{value:.3g}" for name, value in figures.items()}
            self.bar.set_postfix(epoch=self.trainer.epoch, **said)


def finished(model: Autoencoder) -> Autoencoder:
    """A trained autoencoder, made ready for use: in the units of the activations, and without gradients."""
    model.fold()
    model.eval().requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return model


def as_path(path: str | Path | None) -> Path | None:
    """A path, if there is one."""
    return None if path is None else Path(path)


def whole(name: str, given: Any, least: int = 1) -> int:
    """A whole number.

    Raises:
        InputError: Something else, or less.
    """
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise InputError(f"{name} is a whole number, at least {least}; got {given!r}")
    return given


def described(value: Any) -> Any:
    """An option as JSON can hold it: classes and functions by name, tensors by shape."""
    if isinstance(value, dict):
        return {str(key): described(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [described(x) for x in value]
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", None) or type(value).__qualname__
