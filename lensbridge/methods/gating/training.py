"""Fitting gates: what the masks have to be for a task, with heads asked to open and asked to close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...bridge import TransformerBridge
from ...hooks import InputError
from .chg import CHG
from .data import CHGDataset
from .fitting import NEGATIVE, NONE, POSITIVE, Callback, Fit, FitUpdate, Stage
from .objectives import Objective, TargetTokens
from .options import options_of
from .results import CHGResults
from .tasks import ContrastTask, FitTask, Order, Task
from .validation import evaluate


class Trainer(ABC):
    """Fits gates.

    Attributes:
        chg: The gated model.
        dataset: What it is to do.
        objective: What is lowered.
        options: The knobs.
    """

    def __init__(
        self,
        chg: CHG | TransformerBridge | nn.Module,
        dataset: CHGDataset,
        objective: Objective | None,
        masks: Tensor | None,
        knobs: dict[str, Any],
    ) -> None:
        self.chg = chg = chg if isinstance(chg, CHG) else CHG(chg)
        self.dataset = dataset
        self.objective = TargetTokens() if objective is None else objective
        self.options = options_of(knobs)
        if masks is None:
            options = self.options
            first = chg.create_masks(
                options.num_masks, options.mask_init_range, as_parameter=False, seed=options.seed
            )
        else:
            first = chg.gates(masks).detach().clone()
            if not bool(first.isfinite().all()):
                raise InputError("masks= are logits of gates, and must be finite")
        self._fit = Fit(chg, self._task(), self.options, first, self._stages())

    @abstractmethod
    def _task(self) -> Task:
        """What an update lowers."""

    @abstractmethod
    def _stages(self) -> list[Stage]:
        """What is fitted, in order."""

    def _order(self, dataset: CHGDataset, nth: int = 0) -> Order:
        return Order(dataset, self.options.batch_size, self.options.seed + nth)

    @property
    def weight_per_gate(self) -> float:
        """What the regulariser weighs on one gate's logit, in nats."""
        return self._fit.weight_per_gate

    def fit(
        self,
        *,
        verbose: bool = False,
        callback: Callback | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
    ) -> CHGResults:
        """Fit every stage.

        Args:
            verbose: Show a progress bar.
            callback: Called after each update; ends a stage by returning True.
            checkpoint: A file to keep the state of the fit in.
            checkpoint_every: After how many updates it is written.
            resume: Go on from ``checkpoint`` where that file exists; the rest is bit for bit what an
                uninterrupted fit would have done.
        Raises:
            InputError: A checkpoint of another fit.
        """
        for update in self.updates(
            verbose=verbose, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume
        ):
            if callback is not None and callback(update) is True:
                self._fit.ends_stage = True
        return self.results()

    def updates(
        self,
        *,
        verbose: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        resume: bool = False,
    ) -> Iterator[FitUpdate]:
        """The updates one by one, as they are made; arguments as for `fit`."""
        path = None if checkpoint is None else Path(checkpoint)
        if resume and path is None:
            raise InputError("resume=True goes on from a checkpoint: say where it is, checkpoint=")
        if checkpoint_every < 1:
            raise InputError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
        if resume and path is not None and path.exists():
            self._fit.load(path)
        yield from self._fit.run(verbose, path, checkpoint_every)

    def results(self) -> CHGResults:
        """What was found so far; circuits of heads that stayed open are run on up to 256 rows."""
        found = self._fit.found
        ran = evaluate(self.chg, self.dataset, found.get(NEGATIVE), self.objective)
        return CHGResults.of(self.chg, self._fit, ran)


class CHGTrainer(Trainer):
    """Fits gates to a dataset (Nam et al., "Causal Head Gating", arXiv 2505.13737).

    First without a regulariser; then twice from where that led, side by side and on the same batches: with a
    regulariser that opens gates, which leaves shut only heads that harm (G+), and one that closes them, which
    leaves open only heads that are needed (G-).
    """

    def __init__(
        self,
        chg: CHG | TransformerBridge | nn.Module,
        dataset: CHGDataset,
        *,
        objective: Objective | None = None,
        masks: Tensor | None = None,
        **knobs: Any,
    ) -> None:
        """Prepare a fit.

        Args:
            chg: A gated model; of another, or a bridge, the heads are gated.
            dataset: What it is to do.
            objective: What is lowered; None for minus the log-probability of the targets.
            masks: Logits of the first gates, [mask, layer, head], in place of drawn ones.
            **knobs: See `FitOptions`.
        Raises:
            InputError: An unknown knob, or a value out of range.
        """
        super().__init__(chg, dataset, objective, masks, knobs)

    def _task(self) -> Task:
        return FitTask(self.chg, self._order(self.dataset), self.objective)

    def _stages(self) -> list[Stage]:
        options = self.options
        lr_reg = options.lr if options.lr_reg is None else options.lr_reg
        return [
            Stage({NONE: 0.0}, options.num_updates, options.lr, options.lr_end),
            Stage(
                {POSITIVE: 1.0, NEGATIVE: -1.0}, options.num_reg_updates, lr_reg, options.lr_reg_end
            ),
        ]


class ContrastiveCHG(Trainer):
    """Gates that keep one task and lose another: shut are the heads that only the lost one needs.

    After the contrastive variant of Nam et al., arXiv 2505.13737: one stage, with the regulariser that opens
    gates. `CHGResults.interference` of it says how far a head is shut.
    """

    def __init__(
        self,
        chg: CHG | TransformerBridge | nn.Module,
        retain: CHGDataset,
        forget: CHGDataset,
        *,
        objective: Objective | None = None,
        margin: float = 5.0,
        masks: Tensor | None = None,
        **knobs: Any,
    ) -> None:
        """Prepare a fit.

        Args:
            chg: A gated model; of another, or a bridge, the heads are gated.
            retain: What it is still to do.
            forget: What it is no longer to do.
            objective: A loss for both; None for minus the log-probability of the targets.
            margin: The lost task is pushed down until its log-probability is so many nats below the kept
                one's.
            masks: Logits of the first gates, [mask, layer, head], in place of drawn ones.
            **knobs: See `FitOptions`. There are ``num_updates`` updates; unless given, ``lr`` goes from
                0.1 to 0.01 and batches have 64 rows.
        Raises:
            InputError: An unknown knob, or a value out of range.
        """
        if not margin > 0:
            raise InputError(f"margin must be above 0, got {margin}")
        self.forget = forget
        self.margin = margin
        usual = {"lr": 0.1, "lr_end": 0.01, "batch_size": 64}
        super().__init__(chg, retain, objective, masks, {**usual, **knobs})

    def _task(self) -> Task:
        kept, lost = self._order(self.dataset), self._order(self.forget, 1)
        return ContrastTask(self.chg, kept, lost, self.objective, self.margin)

    def _stages(self) -> list[Stage]:
        options = self.options
        return [Stage({POSITIVE: 1.0}, options.num_updates, options.lr, options.lr_end)]
