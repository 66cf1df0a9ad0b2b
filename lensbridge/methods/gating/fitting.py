"""The loop that fits gates, and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...bridge import read_tensors, write_tensors
from ...hooks import InputError
from .chg import CHG
from .options import FitOptions
from .tasks import Task

NONE, POSITIVE, NEGATIVE = "none", "positive", "negative"
"""Without a regulariser; with one that opens gates (gives G+); with one that closes them (gives G-)."""
KIND = "lensbridge gating checkpoint"


@dataclass(frozen=True)
class Stage:
    """A stretch of updates.

    Attributes:
        signs: Of the regulariser by the name of what it makes; several are fitted side by side.
        updates: How many.
        lr, lr_end: Learning rate at its start and (linearly) end; None: as at the start.
    """

    signs: dict[str, float]
    updates: int
    lr: float
    lr_end: float | None = None

    @property
    def name(self) -> str:
        """What callbacks call it."""
        return " and ".join(self.signs)

    def rate(self, update: int) -> float:
        """The learning rate of an update."""
        if self.lr_end is None or self.updates < 2:
            return self.lr
        return self.lr + (self.lr_end - self.lr) * update / (self.updates - 1)


@dataclass(frozen=True)
class FitUpdate:
    """One update, as a callback sees it.

    Attributes:
        stage: ``"none"``, or ``"positive and negative"``, which are fitted side by side.
        update: Its number in the stage, from 0.
        loss: Of the objective under each mask, in nats, before the update.
        gates: After it; of two stages, those of the positive one first.
    """

    stage: str
    update: int
    loss: Float[Tensor, " mask"]
    gates: Float[Tensor, "mask layer head"]


Callback = Callable[[FitUpdate], Any]
"""Called after each update; returning True ends the stage."""


class Fit:
    """Logits of gates, and where the fit of them is.

    Attributes:
        z: Logits that are being fitted, [stages * masks, layer, head] where several stages run side by side.
        found: Gates of the stages that are done, on the CPU.
        history: Gates on the way, and at which update each was, by stage.
        losses: The losses of each update, by stage.
    """

    def __init__(
        self, chg: CHG, task: Task, options: FitOptions, first: Tensor, stages: list[Stage]
    ) -> None:
        self.chg = chg
        self.task = task
        self.options = options
        self.stages = stages
        self.num_masks = len(first)
        self.z = first
        self.first = first
        self.start = first
        self.nth = 0
        self.update = 0
        self.quiet = 0
        self.ends_stage = False
        self.found: dict[str, Tensor] = {}
        self.history: dict[str, list[Tensor]] = {}
        self.numbers: dict[str, list[int]] = {}
        self.losses: dict[str, list[Tensor]] = {}
        self.adam: torch.optim.Adam | None = None

    @property
    def weight_per_gate(self) -> float:
        """The regulariser's weight on one gate's logit, in nats."""
        weight = self.options.l1_weight
        return weight / self.z[0].numel() if self.options.reduction == "mean" else weight

    # --- the loop --------------------------------------------------------------------------------

    def run(self, verbose: bool, path: Path | None, every: int) -> Iterator[FitUpdate]:
        """Make the updates that are left."""
        from tqdm.auto import tqdm

        total = sum(stage.updates for stage in self.stages)
        done = sum(stage.updates for stage in self.stages[: self.nth]) + self.update
        with tqdm(total=total, initial=done, disable=not verbose) as bar:
            while self.nth < len(self.stages):
                stage = self.stages[self.nth]
                bar.set_description(stage.name)
                adam = self._begin(stage)
                while self.update < stage.updates and not self._is_over():
                    # Between updates the caller's own code runs, with the model as the caller has it.
                    with self.chg.still():
                        made = self._step(stage, adam)
                    yield made
                    bar.update()
                    if path is not None and self.update % every == 0:
                        self.save(path)
                self._end(stage)
                if path is not None:
                    self.save(path)

    def _is_over(self) -> bool:
        patience = self.options.patience
        return self.ends_stage or (patience is not None and self.quiet >= patience)

    def _begin(self, stage: Stage) -> torch.optim.Adam:
        if self.adam is not None:
            return self.adam  # a fit that goes on
        z = self.start.repeat(len(stage.signs), 1, 1)
        self.z = nn.Parameter(z.to(self.chg.device))
        self.adam = torch.optim.Adam([self.z], lr=stage.lr)
        self.update = self.quiet = 0
        self.ends_stage = False
        return self.adam

    def _end(self, stage: Stage) -> None:
        made = self.z.detach().sigmoid().cpu()
        self.found.update(zip(stage.signs, made.split(self.num_masks), strict=True))
        if NONE in stage.signs:
            self.start = self._untied(self.z.detach())
        self.adam = None
        self.nth += 1
        self.update = 0

    def _untied(self, z: Tensor) -> Tensor:
        """Where the regularised stages start; see `FitOptions.jitter`."""
        if not self.options.projection:
            return z.clone()
        return z * (1 - self.options.jitter * self.first.to(z.device).sigmoid())

    def _step(self, stage: Stage, adam: torch.optim.Adam) -> FitUpdate:
        options, z = self.options, self.z
        was_open = z.detach() > 0
        adam.param_groups[0]["lr"] = stage.rate(self.update)
        adam.zero_grad()
        sums = torch.zeros(len(z), device=z.device)
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(options.gradient_accum_steps):
                losses = self.task.losses(z.sigmoid()) / options.gradient_accum_steps
                sums += losses.detach().to(sums.device)
                total = losses.mean() if options.clip == "joint" else losses.sum()
                total.backward()
            self._regularise(stage)
        self._shorten()
        adam.step()
        with torch.no_grad():
            if options.projection:
                z.clamp_(-options.l1_clamp, options.l1_clamp)
        if options.patience is not None:
            crossed = bool(((z.detach() > 0) != was_open).any())
            self.quiet = 0 if crossed else self.quiet + 1
        return self._note(stage, sums)

    def _regularise(self, stage: Stage) -> None:
        signs = [sign for sign in stage.signs.values() for _ in range(self.num_masks)]
        if not any(signs) or not self.options.l1_weight:
            return
        # Projected logits lie inside; a clamp has no gradient at its ends, and there they would stay.
        limit = self.options.l1_clamp
        inside = self.z if self.options.projection else self.z.clamp(-limit, limit)
        pull = torch.tensor(signs, device=self.z.device, dtype=inside.dtype) * inside.sum((1, 2))
        weighed = self.weight_per_gate * pull
        (-(weighed.mean() if self.options.clip == "joint" else weighed.sum())).backward()

    def _shorten(self) -> None:
        limit, grad = self.options.grad_norm, self.z.grad
        if limit is None or grad is None:
            return
        of_each = grad.flatten(1).norm(dim=-1)
        size = of_each.norm() if self.options.clip == "joint" else of_each[:, None, None]
        grad.mul_((limit / (size + 1e-6)).clamp(max=1))

    def _note(self, stage: Stage, losses: Tensor) -> FitUpdate:
        number = self.update
        gates = self.z.detach().sigmoid()
        self.losses.setdefault(stage.name, []).append(losses)
        last = number + 1 == stage.updates
        if number % self.options.history_every == 0 or last:
            for name, part in zip(stage.signs, gates.split(self.num_masks), strict=True):
                self.history.setdefault(name, []).append(part.cpu())
                self.numbers.setdefault(name, []).append(number)
        self.update += 1
        return FitUpdate(stage.name, number, losses, gates)

    # --- state -----------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on from."""
        return {
            "options": asdict(self.options),
            "sites": [site.name for site in self.chg.sites],
            "rows": {name: len(order.dataset) for name, order in self.task.orders().items()},
        }

    def save(self, path: Path) -> None:
        """Write the state: safetensors, with the small things as JSON in its header."""
        tensors = {"z": self.z.detach(), "start": self.start}
        for group in ("found", "history", "losses"):
            for name, value in getattr(self, group).items():
                tensors[f"{group}/{name}"] = (
                    torch.stack(value) if isinstance(value, list) else value
                )
        for name, order in self.task.orders().items():
            tensors.update({f"order/{name}/{key}": x for key, x in order.state().items()})
        if self.adam is not None:
            held = self.adam.state[self.z]
            tensors.update({f"adam/{key}": torch.as_tensor(x) for key, x in held.items()})
        counts = {name: getattr(self, name) for name in ("nth", "update", "quiet", "numbers")}
        write_tensors(path, tensors, {"kind": KIND, **self.identity(), **counts})

    def load(self, path: Path) -> None:
        """Go on from a state.

        Raises:
            InputError: No state of a fit, or of a fit with other knobs, other gates or other rows.
        """
        tensors, meta = read_tensors(path, KIND)
        for key, own in self.identity().items():
            if _plain(meta.get(key)) != _plain(own):
                raise InputError(
                    f"{path} holds another fit: its {key} are {meta.get(key)}, and here they are {own}"
                )
        for name in ("nth", "update", "quiet", "numbers"):
            setattr(self, name, meta[name])
        self.start = tensors["start"].to(self.chg.device)
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            if group == "found":
                self.found[name] = value
            elif group in ("history", "losses"):
                getattr(self, group)[name] = list(value)
        for name, order in self.task.orders().items():
            order.load({key: tensors[f"order/{name}/{key}"] for key in ("left", "generator")})
        self.z = nn.Parameter(tensors["z"].to(self.chg.device))
        self.adam = None
        if "adam/step" in tensors:
            self.adam = torch.optim.Adam([self.z], lr=self.options.lr)
            held = {
                key.removeprefix("adam/"): x
                for key, x in tensors.items()
                if key.startswith("adam/")
            }
            moments = {k: x if k == "step" else x.to(self.z.device) for k, x in held.items()}
            self.adam.state[self.z].update(moments)


def _plain(value: Any) -> Any:
    """As JSON has it: tuples are lists."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
