"""The loop that trains an autoencoder, and its state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from ...hooks import InputError
from .losses import Criterion
from .models import Autoencoder

_WARM = 0.1
"""The share of the steps over which penalties for codes grow to their full weight."""
_AUXILIARY = 1 / 32
"""What dead concepts' reconstruction of the residual weighs; Gao et al., arXiv 2406.04093."""
_COUNT_EVERY = 8
"""Steps between looks at which concepts are dead; each look waits for the device."""


@dataclass(frozen=True)
class TrainingOptions:
    """How an autoencoder is trained; see `SAEExplainer.fit`."""

    optimizer_class: Any = torch.optim.Adam
    optimizer_kwargs: Mapping[str, Any] | None = None
    scheduler_class: Any = None
    scheduler_kwargs: Mapping[str, Any] | None = None
    lr: float = 1e-3
    clip_grad: float | None = None
    use_amp: bool | torch.dtype = False
    max_nan_fallbacks: int = 5
    monitoring: int | None = None
    criterion: Criterion | None = None


class Trainer:
    """Trains an autoencoder batch by batch.

    Attributes:
        model: What is trained, in the units inside (see `models`) until it is folded.
        history: A figure for each epoch, by name.
        step: How many batches it has seen.
    """

    def __init__(
        self, model: Autoencoder, options: TrainingOptions, *, n_steps: int, dead_window: int
    ) -> None:
        self.model, self.options = model, options
        self.n_steps, self.dead_window = n_steps, dead_window
        self.optimizer = _optimizer(model, options)
        self.scheduler = None
        if options.scheduler_class is not None:
            self.scheduler = options.scheduler_class(
                self.optimizer, **(options.scheduler_kwargs or {})
            )
        self.step = self.epoch = 0
        self.history: dict[str, list[Any]] = {}
        device = model.device
        self.idle = torch.zeros(model.nb_concepts, dtype=torch.long, device=device)
        """Rows since each concept was last seen."""
        self.dead = torch.zeros(0, dtype=torch.long, device=device)
        self.amp = _amp(options.use_amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.spread = 1.0
        self._reset()

    def begin(self, mean: Float[Tensor, " d"], scale: Float[Tensor, ""], spread: float) -> None:
        """Start from the data.

        Args:
            mean: Of the rows.
            scale: What makes their distance from it sqrt(d) on average.
            spread: The mean of its square.
        """
        self.model.begin(mean.to(self.model.device), scale.to(self.model.device))
        self.spread = spread

    def _reset(self) -> None:
        device = self.model.device
        self.sums = {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("loss", "l0", "error")
        }
        self.n_rows = self.n_fallbacks = 0
        self.notes: dict[str, list[Tensor | float]] = {}

    # --- a batch -------------------------------------------------------------------------------------

    def train(self, rows: Num[Tensor, "row d"]) -> None:
        """One step on a batch of activations.

        Raises:
            InputError: The loss is not finite, in full precision; said at the end of an epoch otherwise.
        """
        model = self.model
        model.train()
        u = rows.to(model.device, torch.float32) * model.scale
        if self.step % _COUNT_EVERY == 0:
            self.dead = (self.idle >= self.dead_window).nonzero()[:, 0]
        uses_amp = self.amp is not None and self.n_fallbacks < max(
            1, self.options.max_nan_fallbacks
        )
        loss, found = self._loss(u, uses_amp)
        if uses_amp and not bool(loss.isfinite()):
            self.n_fallbacks += 1
            uses_amp = False
            loss, found = self._loss(u, uses_amp)
        if self.amp is not None and not bool(loss.isfinite()):
            raise self._diverged()
        self.optimizer.zero_grad(set_to_none=True)
        self._update(loss, scaled=uses_amp)
        fired, l0, error = found
        self.idle = torch.where(fired, 0, self.idle + len(u))
        self.sums["loss"] += loss.detach() * len(u)
        self.sums["l0"] += l0
        self.sums["error"] += error
        self.n_rows += len(u)
        self.step += 1

    def _loss(self, u: Tensor, uses_amp: bool) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        device = self.model.device.type
        with torch.autocast(device, dtype=self.amp, enabled=uses_amp):
            if self.options.criterion is not None:
                return self._by_criterion(u, self.options.criterion)
            found = self.model.training_pass(u)
            extra = None
            if len(self.dead):
                k = max(1, u.shape[1] // 2)
                extra = self.model.of_dead(u, found.x_hat, self.dead, k)
        left = u - found.x_hat
        error = left.square().sum(1)
        loss = error.mean() / u.shape[1]
        if found.penalty is not None:
            loss = loss + found.penalty * min(1.0, (self.step + 1) / (_WARM * self.n_steps + 1))
        if extra is not None:
            loss = loss + _AUXILIARY * (left.detach() - extra.float()).square().mean()
        return loss, (found.fired, found.l0, error.detach().sum(dtype=torch.float64))

    def _by_criterion(
        self, u: Tensor, criterion: Criterion
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        model = self.model
        pre, codes, x_hat = model.dense(u)
        loss = criterion(u, x_hat, pre, codes, model.get_dictionary())
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError(
                "criterion gives one differentiable number; got "
                f"{list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
            )
        on = codes.detach() > 0
        error = (u - x_hat.detach().float()).square().sum(dtype=torch.float64)
        return loss.float().reshape(()), (on.any(0), on.count_nonzero().float(), error)

    def _update(self, loss: Tensor, *, scaled: bool) -> None:
        scaler, limit = self.scaler, self.options.clip_grad
        scales = scaled and scaler.is_enabled()
        (scaler.scale(loss) if scales else loss).backward()
        if scales:
            scaler.unscale_(self.optimizer)
        self.model.before_step()
        if limit is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self._note(loss)
        if scales:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.model.after_step()

    def _note(self, loss: Tensor) -> None:
        """What ``monitoring`` asks for, step by step."""
        level = self.options.monitoring or 0
        made: dict[str, Tensor | float] = {}
        if level >= 1:
            made["lr"] = float(self.optimizer.param_groups[0]["lr"])
            made["step_loss"] = loss.detach()
        if level >= 2:
            for name, parameter in self.model.named_parameters():
                made[f"params_norm_{name}"] = parameter.detach().norm()
                if parameter.grad is not None:
                    made[f"params_grad_norm_{name}"] = parameter.grad.norm()
        for name, value in made.items():
            self.notes.setdefault(name, []).append(value)

    # --- an epoch ------------------------------------------------------------------------------------

    def figures(self) -> dict[str, float]:
        """Of the epoch so far: loss, codes a row, explained variance, share of dead concepts."""
        n = max(1, self.n_rows)
        spread = self.spread * n * float(self.model.scale) ** 2
        return {
            "loss": float(self.sums["loss"]) / n,
            "l0": float(self.sums["l0"]) / n,
            "explained_variance": 1 - float(self.sums["error"]) / spread,
            "dead": float((self.idle >= self.dead_window).double().mean()),
        }

    def end_epoch(self) -> dict[str, float]:
        """Close an epoch and note its figures.

        Raises:
            InputError: The loss became infinite or NaN.
        """
        figures = self.figures()
        if not math.isfinite(figures["loss"]):
            raise self._diverged()
        made: dict[str, Any] = dict(figures)
        if self.amp is not None:
            made["nan_fallbacks"] = self.n_fallbacks
        for name, value in made.items():
            self.history.setdefault(name, []).append(value)
        for name, values in self.notes.items():
            self.history.setdefault(name, []).extend(float(value) for value in values)
        self.epoch += 1
        self._reset()
        return figures

    def _diverged(self) -> InputError:
        return InputError(
            f"the loss became infinite or NaN in epoch {self.epoch + 1}, by step {self.step + 1}: lower "
            "lr, or set clip_grad"
        )

    # --- state ---------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and small facts to go on from, between two batches.

        Raises:
            InputError: An optimizer or a scheduler with a state that neither can hold.
        """
        tensors = {f"model/{name}": x for name, x in self.model.state_dict().items()}
        tensors["idle"], tensors["dead"] = self.idle, self.dead
        tensors.update({f"sums/{name}": x for name, x in self.sums.items()})
        kept = self.optimizer.state_dict()
        plain: dict[str, dict[str, Any]] = {}
        for index, own in kept["state"].items():
            for name, value in own.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{name}"] = value
                else:
                    plain.setdefault(str(index), {})[name] = value
        facts = {
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "counts": [self.n_rows, self.n_fallbacks],
            "notes": {name: [float(x) for x in values] for name, values in self.notes.items()},
            "spread": self.spread,
            "optimizer": {"state": plain, "param_groups": kept["param_groups"]},
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        for name in ("optimizer", "scheduler"):
            _check_plain(name, facts[name])
        return tensors, facts

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        device = self.model.device
        own = {
            name.removeprefix("model/"): x
            for name, x in tensors.items()
            if name.startswith("model/")
        }
        self.model.load_state_dict(own)
        self.idle, self.dead = tensors["idle"].to(device), tensors["dead"].to(device)
        state: dict[int, dict[str, Any]] = {
            int(index): dict(values) for index, values in facts["optimizer"]["state"].items()
        }
        for name, x in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/", 2)
                state.setdefault(int(index), {})[key] = x
        groups = facts["optimizer"]["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(facts["scheduler"])
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.step, self.spread = facts["epoch"], facts["step"], facts["spread"]
        self.history = {name: list(values) for name, values in facts["history"].items()}
        self.sums = {name: tensors[f"sums/{name}"].to(device) for name in self.sums}
        self.n_rows, self.n_fallbacks = facts["counts"]
        self.notes = {name: list(values) for name, values in facts["notes"].items()}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, for what draws them without a generator; the caller's go on after it."""
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(seed)
        if cards:
            torch.cuda.manual_seed(seed)
        yield


def _check_plain(name: str, state: Any) -> None:
    try:
        is_plain = json.loads(json.dumps(state)) == _listed(state)
    except TypeError:
        is_plain = False
    if not is_plain:
        raise InputError(
            f"this {name} keeps what a checkpoint cannot hold (it holds tensors, numbers, texts, lists): fit "
            "without checkpoint="
        )


def _listed(value: Any) -> Any:
    """As JSON has it: tuples are lists."""
    if isinstance(value, dict):
        return {key: _listed(x) for key, x in value.items()}
    return [_listed(x) for x in value] if isinstance(value, (list, tuple)) else value


def _amp(use_amp: bool | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, if any."""
    if not isinstance(use_amp, bool):
        if use_amp not in (torch.float16, torch.bfloat16):
            raise InputError(
                f"use_amp is True, False, torch.bfloat16 or torch.float16; got {use_amp}"
            )
        return use_amp
    if not use_amp:
        return None
    old = device.type == "cuda" and not torch.cuda.is_bf16_supported()
    return torch.float16 if old else torch.bfloat16


def _optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    kwargs = {"lr": options.lr, **(options.optimizer_kwargs or {})}
    kinds = (torch.optim.Adam, torch.optim.AdamW)
    own = {"foreach", "fused", "capturable", "differentiable"} & set(kwargs)
    device = next(model.parameters()).device.type
    if options.optimizer_class in kinds and not own and device in ("cpu", "cuda"):
        kwargs["fused"] = True
    return options.optimizer_class(model.parameters(), **kwargs)
