"""Training an autoencoder on a tensor of activations, from start or checkpoint to end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...bridge import read_tensors, write_tensors
from ...hooks import InputError
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

    @property
    def resumes(self) -> Path | None:
        """The checkpoint to go on from; None where there is none, or it is not wanted."""
        path = self.checkpoint
        return path if self.resume and path is not None and path.is_file() else None


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
) -> None:
    """Train on rows, in an order drawn anew for each epoch.

    Args:
        trainer: What is trained, at its start.
        rows: Activations; they stay where they are, and batches go where the model is.
        schedule: How often, and what is written on the way.
        identity: What a checkpoint must agree with.
    Raises:
        InputError: A checkpoint of another fit, or a loss that is not finite.
    """
    mean, scale, spread = spread_of(rows)
    trainer.begin(mean, scale, spread)
    order = torch.Generator().manual_seed(schedule.seed)
    identity = {**identity, "rows": len(rows), "sum": float(mean.double().sum())}
    with training(schedule.seed, trainer.model.device):
        if schedule.resumes is not None:
            tensors, facts = opened(schedule.resumes, identity)
            resume([trainer], order, tensors, facts)
        steps = math.ceil(len(rows) / schedule.batch_size)
        with Bar(schedule, [trainer], steps) as bar:
            while trainer.epoch < schedule.nb_epochs:
                drawn = torch.randperm(len(rows), generator=order).to(rows.device)
                for picked in drawn.split(schedule.batch_size):
                    trainer.train(rows.index_select(0, picked))
                    bar.step()
                trainer.end_epoch()
                bar.show()
                if schedule.checkpoint is not None:
                    keep([trainer], order, schedule.checkpoint, identity)


@contextmanager
def training(seed: int, device: torch.device) -> Iterator[None]:
    """Gradients, and random numbers from a seed."""
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, device):
        yield


# --- checkpoints ----------------------------------------------------------------------------------------


def keep(
    trainers: Sequence[Trainer],
    order: torch.Generator,
    path: Path,
    identity: dict[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    **facts: Any,
) -> None:
    """Write a checkpoint.

    Args:
        trainers: What is being trained.
        order: Where the order of rows is drawn from.
        path: Where to.
        identity: What a fit that goes on must agree with.
        tensors: What else there is to keep.
        **facts: Likewise.
    """
    held = dict(tensors or {})
    states = []
    for index, trainer in enumerate(trainers):
        own, state = trainer.state()
        held.update({f"{index}/{name}": x for name, x in own.items()})
        states.append(state)
    held["order"], held["random"] = order.get_state(), torch.get_rng_state()
    device = trainers[0].model.device
    if device.type == "cuda":
        held["random_cuda"] = torch.cuda.get_rng_state(device)
    write_tensors(path, held, {"kind": KIND, "identity": identity, "trainers": states, **facts})


def opened(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Raises:
        InputError: It is of another fit.
    """
    tensors, facts = read_tensors(path, KIND)
    for key, own in identity.items():
        if facts["identity"].get(key) != own:
            raise InputError(
                f"{path} holds another fit: its {key} is {facts['identity'].get(key)}, and here it is {own}"
            )
    return tensors, facts


def resume(
    trainers: Sequence[Trainer],
    order: torch.Generator,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Go on from a checkpoint that was `opened`."""
    for index, (trainer, state) in enumerate(zip(trainers, facts["trainers"], strict=True)):
        start = f"{index}/"
        own = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
        trainer.load_state(own, state)
    order.set_state(tensors["order"])
    torch.set_rng_state(tensors["random"])
    if "random_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random_cuda"], trainers[0].model.device)


# --- what is shown --------------------------------------------------------------------------------------


class Bar:
    """A progress bar with the figures so far, or nothing.

    Args:
        schedule: Whether to show it, and how many epochs there are.
        trainers: Whose figures.
        steps: How many batches an epoch has.
        done: How many of them are behind us.
    """

    def __init__(
        self, schedule: Schedule, trainers: Sequence[Trainer], steps: int, done: int = 0
    ) -> None:
        self.trainers = trainers
        self.bar: Any = None
        if schedule.progress:
            from tqdm import tqdm

            left = (schedule.nb_epochs - trainers[0].epoch) * steps - done
            self.bar = tqdm(total=left, desc="Training", unit="batch")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        """A batch is done."""
        # The bar says when it is drawn anew; figures, which wait for the device, are made only then.
        if self.bar is not None and self.bar.update():
            self.show()

    def show(self) -> None:
        """Write the figures of this epoch, or of the one that has just ended."""
        if self.bar is None:
            return
        said: dict[str, str] = {}
        for index, trainer in enumerate(self.trainers):
            figures = trainer.figures()
            if not trainer.n_rows:
                figures = {name: trainer.history[name][-1] for name in figures}
            start = f"{index}:" if len(self.trainers) > 1 else ""
            said.update({start + name: f"{value:.3g}" for name, value in figures.items()})
        self.bar.set_postfix(epoch=self.trainers[0].epoch, **said)


def finished(model: Autoencoder) -> Autoencoder:
    """A trained autoencoder, made ready for use: in the units of the activations, and without gradients."""
    model.fold()
    model.eval().requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return model


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
