"""What fitted gates say of each head."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...hooks import InputError
from .fitting import NEGATIVE, POSITIVE, Fit
from .results_file import read_results, write_results
from .statistics import bootstrap, correlation, fleiss_kappa
from .validation import Evaluation

if TYPE_CHECKING:
    from pandas import DataFrame

    from .chg import CHG

FACILITATING, INTERFERING, IRRELEVANT = "facilitating", "interfering", "irrelevant"
INCONSISTENT, UNDECIDED = "inconsistent", "undecided"
LABELS = (FACILITATING, INTERFERING, IRRELEVANT, INCONSISTENT, UNDECIDED)

AGREEING = 0.9
"""The share of masks that must agree on a gate for its head to have a role."""

Head = tuple[int, int]


@dataclass
class CHGResults:
    """Fitted gates, and the roles they give the heads.

    A head that stays open although closing is rewarded (high G-) *facilitates*: the task needs it. One that
    stays shut although opening is rewarded (low G+) *interferes*. One that follows either push is
    *irrelevant*. One that stays shut when pushed open and open when pushed shut follows no loss: it is called
    *inconsistent*, and means that the fit has not come to rest.

    Attributes:
        masks: Gates by stage: ``"none"``, ``"positive"`` (G+), ``"negative"`` (G-), [mask, layer, head],
            float32.
        layers: Which layers the rows are.
        history: Gates on the way, [update, mask, layer, head].
        updates: Which updates those are.
        losses: The objective's loss at each update under each mask, in nats; for stages fitted side by side,
            under the masks of the one and then the other.
        options: The knobs of the fit.
        evaluation: How well the circuits of G- do; None for gates that were not fitted here.
        model, target: What was gated.
    """

    masks: dict[str, Tensor]
    layers: list[int]
    history: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, list[int]] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    model: str = ""
    target: str = "heads"

    @classmethod
    def of(cls, chg: CHG, fit: Fit, evaluation: Evaluation) -> CHGResults:
        """The results of a fit."""
        return cls(
            masks=dict(fit.found),
            layers=list(chg.layers),
            history={name: torch.stack(gates) for name, gates in fit.history.items()},
            updates={name: list(numbers) for name, numbers in fit.numbers.items()},
            losses={name: torch.stack(found).cpu() for name, found in fit.losses.items()},
            options={**asdict(fit.options), "weight_per_gate": fit.weight_per_gate},
            evaluation=evaluation,
            model=type(chg.bridge.original_model).__name__,
            target=chg.target,
        )

    def __repr__(self) -> str:
        shape = (
            f"{self.num_masks} masks x {self.num_layers} layers x {self.num_heads} {self.target}"
        )
        return (
            f"CHGResults({self.model + ', ' if self.model else ''}{shape}, {', '.join(self.masks)})"
        )

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        count, layers, heads = next(iter(self.masks.values())).shape
        return count, layers, heads

    @property
    def num_masks(self) -> int:
        """How many masks were fitted."""
        return self._shape[0]

    @property
    def num_layers(self) -> int:
        """How many layers have gates."""
        return self._shape[1]

    @property
    def num_heads(self) -> int:
        """How many gates a layer has."""
        return self._shape[2]

    # --- scores ----------------------------------------------------------------------------------

    def gates(self, stage: str) -> Float[Tensor, "mask layer head"]:
        """The gates of a stage.

        Raises:
            InputError: It was not fitted.
        """
        if stage not in self.masks:
            raise InputError(f"stage {stage!r} was not fitted; there are {', '.join(self.masks)}")
        return self.masks[stage]

    def facilitation(self, mask_idx: int | None = None) -> Float[Tensor, "layer head"]:
        """How open a head stays under pressure to close: G-, of one mask or the mean over them."""
        return self._over(self.gates(NEGATIVE), mask_idx)

    def interference(self, mask_idx: int | None = None) -> Float[Tensor, "layer head"]:
        """How shut a head stays under pressure to open: 1 - G+."""
        return self._over(1 - self.gates(POSITIVE), mask_idx)

    def irrelevance(self, mask_idx: int | None = None) -> Float[Tensor, "layer head"]:
        """How far a head follows either pressure: G+ (1 - G-)."""
        return self._over(self._irrelevance, mask_idx)

    @property
    def _irrelevance(self) -> Tensor:
        return self.gates(POSITIVE) * (1 - self.gates(NEGATIVE))

    def _over(self, values: Tensor, mask_idx: int | None) -> Tensor:
        if mask_idx is None:
            return values.mean(0)
        if not -self.num_masks <= mask_idx < self.num_masks:
            raise InputError(f"mask_idx={mask_idx}: there are masks 0 to {self.num_masks - 1}")
        return values[mask_idx]

    def intervals(
        self, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Confidence intervals of the three mean scores over masks, by bootstrap.

        Args:
            level: How sure.
            draws: How many resamples.
            seed: Of those.
        Returns:
            By score: lower and upper ends, [layer, head] each.
        """
        values = {
            "facilitation": self.gates(NEGATIVE),
            "interference": 1 - self.gates(POSITIVE),
            "irrelevance": self._irrelevance,
        }
        return {name: bootstrap(x, level, draws, seed) for name, x in values.items()}

    # --- labels ----------------------------------------------------------------------------------

    def labels(
        self, threshold: float = 0.5, mask_idx: int | None = None, level: float = 0.95
    ) -> dict[Head, str]:
        """A role for each head.

        Over several masks a gate counts as open or shut only where the interval of its mean lies on that side
        of the threshold, and so do 90 % of the masks; a head with a gate that is neither is "undecided".
        Heads
        that can stand in for each other are such, of which each mask keeps another: see `cooccurrence`.

        Args:
            threshold: Above it a gate is open.
            mask_idx: Of this mask alone; None for all masks together.
            level: Of the intervals.
        """
        closed, opened = self.gates(NEGATIVE), self.gates(POSITIVE)
        if mask_idx is not None:
            closed, opened = (
                self.facilitation(mask_idx)[None],
                1 - self.interference(mask_idx)[None],
            )
        kept, let = (_sided(gates, threshold, level) for gates in (closed, opened))
        return {
            (layer, head): _label(int(kept[row, head]), int(let[row, head]))
            for row, layer in enumerate(self.layers)
            for head in range(self.num_heads)
        }

    def necessary_heads(self, threshold: float = 0.5, mask_idx: int | None = None) -> list[Head]:
        """Heads that stay open under pressure to close.

        Args:
            threshold: Above it a gate is open.
            mask_idx: In this mask; None for those of which the mean over masks is above it for sure (95 %).
        """
        if mask_idx is not None:
            return self._heads(self.facilitation(mask_idx) > threshold)
        return self._heads(self.intervals()["facilitation"][0] > threshold)

    def sufficient_heads(
        self, threshold: float = 0.5, mask_idx: int | None = None, tolerance: float = 0.1
    ) -> list[Head]:
        """The smallest circuit that was found to do the task by itself.

        Sufficiency is a property of a set: each mask's open heads were run together, with all others shut.

        Args:
            threshold: Taken at 0.5, where the circuits were run.
            mask_idx: The circuit of this mask; None for the smallest of those that do.
            tolerance: How much of what the heads are worth, (full - empty), a circuit may lose.
        Raises:
            InputError: No circuit was run, or none does; the message says how near the best comes.
        """
        if threshold != 0.5:
            raise InputError(
                f"circuits were run at a threshold of 0.5, not {threshold}; run others with check_circuit"
            )
        ran = self.evaluation
        if ran is None or ran.circuits is None:
            raise InputError(
                "whether heads are sufficient shows when they are run, and these gates come without a run; "
                "use check_circuit(chg, dataset, results.get_facilitating_mask(mask_idx=0))"
            )
        kept = (ran.circuits - ran.empty) / (ran.full - ran.empty)
        sizes = (self.gates(NEGATIVE) > threshold).flatten(1).sum(1)
        self.facilitation(mask_idx)  # refuses a mask that is not there
        indices = range(self.num_masks) if mask_idx is None else [mask_idx % self.num_masks]
        good = [i for i in indices if float(kept[i]) >= 1 - tolerance]
        if not good:
            best = max(indices, key=lambda i: float(kept[i]))
            raise InputError(
                f"no circuit is sufficient: the best (mask {best}, {int(sizes[best])} heads) keeps "
                f"{float(kept[best]):.1%} of what the heads are worth, and tolerance={tolerance} asks for "
                f"{1 - tolerance:.1%}"
            )
        chosen = min(good, key=lambda i: (int(sizes[i]), -float(kept[i])))
        return self._heads(self.gates(NEGATIVE)[chosen] > threshold)

    def get_facilitating_mask(
        self, threshold: float = 0.5, mask_idx: int | None = None
    ) -> Float[Tensor, "layer head"]:
        """A circuit as gates of 0 and 1: the open heads of one mask's G-.

        Heads of different masks are not mixed: of two that stand in for each other, each mask keeps one.

        Args:
            threshold: Above it a gate is open.
            mask_idx: Which mask; None for the one whose circuit did best when it was run (the first, for
                gates that come without a run).
        """
        chosen = self.best_mask if mask_idx is None else mask_idx
        return (self.facilitation(chosen) > threshold).float()

    @property
    def best_mask(self) -> int:
        """The mask whose circuit did best when it was run."""
        ran = self.evaluation
        return 0 if ran is None or ran.circuits is None else int(ran.circuits.argmax())

    def _heads(self, chosen: Tensor) -> list[Head]:
        return [(self.layers[row], head) for row, head in chosen.nonzero().tolist()]

    # --- over masks ------------------------------------------------------------------------------

    def cooccurrence(
        self, stage: str = NEGATIVE, threshold: float = 0.5
    ) -> Float[Tensor, "gate gate"]:
        """Correlation over masks of which gates are open; gates are counted layer by layer.

        Near -1 for heads of which a mask keeps one or the other, near 1 for heads that need each other; nan
        for a gate that all masks agree on.
        """
        return correlation((self.gates(stage) > threshold).float().flatten(1))

    def agreement(self, stage: str = NEGATIVE, threshold: float = 0.5) -> dict[str, float]:
        """How far masks agree: the share of heads open in ``any`` mask and ``every`` mask, and ``kappa``.

        Kappa is Fleiss' (1971): 1 where all masks agree, 0 where they do as often as chance would have it.
        """
        open_ = (self.gates(stage) > threshold).float().flatten(1)
        return {
            "any": float(open_.amax(0).mean()),
            "every": float(open_.amin(0).mean()),
            "kappa": fleiss_kappa(open_),
        }

    # --- tables ----------------------------------------------------------------------------------

    def head_taxonomy(self, threshold: float = 0.5, mask_idx: int | None = None) -> DataFrame:
        """A line a head: its scores, their intervals, in how many masks it is needed, its role.

        Raises:
            InputError: pandas is not installed.
        """
        labels = self.labels(threshold, mask_idx)
        scores = {
            "facilitation": self.facilitation(mask_idx),
            "interference": self.interference(mask_idx),
            "irrelevance": self.irrelevance(mask_idx),
        }
        ends = (
            self.intervals() if mask_idx is None else {name: (x, x) for name, x in scores.items()}
        )
        needed = (self.gates(NEGATIVE) > threshold).float().mean(0)
        lines = []
        for (layer, head), label in labels.items():
            row = self.layers.index(layer)
            line: dict[str, Any] = {"layer": layer, "head": head}
            for name, score in scores.items():
                line[name] = float(score[row, head])
                line[f"{name}_low"], line[f"{name}_high"] = (
                    float(x[row, head]) for x in ends[name]
                )
            lines.append({**line, "needed_in": float(needed[row, head]), "taxonomy": label})
        return _pandas().DataFrame(lines)

    def to_dataframe(self, stage: str = NEGATIVE, include_all_updates: bool = False) -> DataFrame:
        """Gates in long form: stage, update, mask, layer, head, gate.

        Args:
            stage: Which.
            include_all_updates: Those on the way too, as far as they were kept.
        Raises:
            InputError: The stage was not fitted, or pandas is not installed.
        """
        final = self.gates(stage)
        frames, numbers = final[None], [-1]
        if stage in self.history:
            numbers = self.updates[stage] if include_all_updates else self.updates[stage][-1:]
            frames = self.history[stage] if include_all_updates else final[None]
        index = torch.cartesian_prod(*[torch.arange(n) for n in frames.shape]).T
        update, mask, layer, head = index
        return _pandas().DataFrame(
            {
                "stage": stage,
                "update": torch.tensor(numbers)[update].numpy(),
                "mask": mask.numpy(),
                "layer": torch.tensor(self.layers)[layer].numpy(),
                "head": head.numpy(),
                "gate": frames.flatten().numpy(),
            }
        )

    def summary(self, threshold: float = 0.5) -> dict[str, Any]:
        """Counts of roles, and how well the best circuit does."""
        labels = list(self.labels(threshold).values())
        total = len(labels)
        necessary = len(self.necessary_heads(threshold))
        circuit = self.get_facilitating_mask(threshold)
        found: dict[str, Any] = {
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_masks": self.num_masks,
            "total_heads": total,
            "num_necessary": necessary,
            "pct_necessary": 100 * necessary / total,
            "circuit_size": int(circuit.sum()),
            "pct_circuit": 100 * float(circuit.mean()),
            "taxonomy_counts": {label: labels.count(label) for label in LABELS},
        }
        ran = self.evaluation
        if ran is not None and ran.circuits is not None:
            best = float(ran.circuits[self.best_mask])
            found |= {"full_score": ran.full, "empty_score": ran.empty, "circuit_score": best}
            found["circuit_keeps"] = (best - ran.empty) / (ran.full - ran.empty)
        return found

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, with the knobs and numbers as JSON in its header.

        Args:
            path: Where; ``.safetensors`` is added unless it ends so.
        Returns:
            Where it was written.
        """
        return write_results(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> CHGResults:
        """Read what `save` wrote, or a ``.pt`` file of inteprelens or of the paper's code.

        Those files hold the right gates under the right stages; only what was read off them was named
        the wrong way round. Here they get the names that this class gives.

        Raises:
            FileNotFoundError: No such file.
            InputError: A file of another format.
        """
        return read_results(cls, Path(path))


def _sided(gates: Float[Tensor, "mask layer head"], threshold: float, level: float) -> Tensor:
    """1 for gates that are open, -1 for shut ones, 0 where masks do not agree."""
    low, high = bootstrap(gates, level)
    share = (gates > threshold).float().mean(0)
    return ((low > threshold) & (share >= AGREEING)).int() - (
        (high <= threshold) & (share <= 1 - AGREEING)
    ).int()


def _label(kept: int, let: int) -> str:
    """A role, from whether G- and G+ are open (1) or shut (-1), or masks do not agree (0)."""
    if 0 in (kept, let):
        return UNDECIDED
    if let > 0:
        return FACILITATING if kept > 0 else IRRELEVANT
    return INCONSISTENT if kept > 0 else INTERFERING


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise InputError(
            "tables need pandas: pip install 'lensbridge[data]' (or pandas by itself)"
        ) from error
    return pd
