"""Weight processing: the same function, with norms that only normalise and a stream without a mean."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..hooks import ArchitectureError, HookRegistry, InputError
from .architecture import Architecture
from .folding.plan import plan_steps, refusal
from .folding.probe import plan_attentions, plan_head
from .folding.step import CENTER, FOLD, REFACTOR, STEPS, UNEMBED, VALUES, Step
from .folding.write import center, fold_norm, fold_values, refactor, untie

_Self = TypeVar("_Self", bound="Processing")

_WRITERS: dict[str, Callable[[nn.Module, Any], None]] = {
    FOLD: fold_norm,
    CENTER: center,
    UNEMBED: center,
    VALUES: fold_values,
    REFACTOR: refactor,
}


@dataclass(frozen=True)
class Processed:
    """What was done to a model's weights.

    Attributes:
        asked: The steps that were asked for.
        done: Those that were done, wholly or in part.
        left: What of the steps that were asked for was left: step -> part -> why.
        notes: What else there is to say of a part: step -> part -> note.
    """

    asked: tuple[str, ...]
    done: tuple[str, ...]
    left: Mapping[str, Mapping[str, str]]
    notes: Mapping[str, Mapping[str, str]]

    def __str__(self) -> str:
        lines = [f"{step}: {self._said(step)}" for step in STEPS]
        for index, step in enumerate(STEPS):
            for told in (self.left, self.notes):
                for part, why in told.get(step, {}).items():
                    lines[index] += f"\n  {part}: {why}"
        return "\n".join(lines)

    def _said(self, step: str) -> str:
        if step not in self.asked:
            return "not asked for"
        if step in self.done:
            return "done in part" if step in self.left else "done"
        return "not done" if step in self.left else "nothing to do"


class Processing:
    """The part of a bridge that rewrites the model's weights."""

    original_model: nn.Module
    architecture: Architecture
    registry: HookRegistry
    _inner: nn.Module
    _stack: Any
    _example: Callable[[], dict[str, Any]]
    list_hooks: Callable[[], dict[str, Any]]
    processed: Processed | None = None
    """What `process_weights` did to this bridge's model; None when it was not called."""

    def can_process(self) -> dict[str, str]:
        """Which steps of `process_weights` can be done wholly on this model.

        Returns:
            Step -> an empty string, or what cannot be done, and why.
        """
        return {name: step.reason for name, step in self._plan(STEPS).items()}

    def process_weights(
        self: _Self,
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
        refactor_factored_attn_matrices: bool | None = False,
        in_place: bool = False,
    ) -> _Self:
        """Rewrite the weights so that they are easier to read and the model computes the same.

        A step is done where it is exact for this model: watched runs of the model itself show who reads and
        writes what. None does of a step what is exact and leaves the rest, which `processed` lists; True
        insists on the whole step; False leaves it out. Log-probabilities stay; logits change by a constant
        per position where ``center_unembed`` was done. The model stays a Hugging Face model of its class
        with the same keys; an embedding that is the head as well gets a copy when one of the two changes.

        Args:
            fold_ln: Norms in front of a branch or the head only normalise; their weights and biases go into
                the layers that read them.
            center_writing_weights: What is written into the stream has no mean over d_model (models all of
                whose norms on the stream subtract it).
            center_unembed: The head's matrix and bias have no mean over the vocabulary.
            fold_value_biases: The values' biases go into the output projection's.
            refactor_factored_attn_matrices: The two factors of each head's QK and OV matrix are made alike:
                orthogonal columns, with the roots of its singular values as their lengths.
            in_place: Rewrite this bridge's model; otherwise a copy, and this one stays as it is.
        Returns:
            A new bridge around the copy; this one when ``in_place``.
        Raises:
            ArchitectureError: A step that was insisted on cannot be done, or none at all.
            InputError: Hooks are set. Whatever is raised, nothing was changed.

        Example::

            plain = bridge.process_weights()
            print(plain.processed)                       # what was done, what was left, and why
            plain.unwrapped_model.save_pretrained(path)  # an ordinary checkpoint
        """
        given = (
            fold_ln,
            center_writing_weights,
            center_unembed,
            fold_value_biases,
            refactor_factored_attn_matrices,
        )
        wanted = {name: flag for name, flag in zip(STEPS, given, strict=True) if flag is not False}
        plan = self._plan(tuple(wanted))
        _check(plan, wanted)
        bridge = self if in_place else copy.deepcopy(self)
        with torch.inference_mode(False), torch.no_grad():
            _write(bridge._inner, plan)
        bridge.processed = Processed(
            tuple(plan),
            tuple(name for name, step in plan.items() if step.todo),
            {name: dict(step.left) for name, step in plan.items() if step.left},
            {name: dict(step.notes) for name, step in plan.items() if step.notes},
        )
        return bridge

    def enable_compatibility_mode(
        self: _Self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
        refactor_factored_attn_matrices: bool | None = False,
    ) -> _Self:
        """`process_weights` in place, by the name it has in TransformerLens.

        The other thing this does there, names of old, needs no switch here: aliases always work.

        Args:
            disable_warnings: Say nothing of what was left; otherwise one warning lists it.
            no_processing: Change nothing.
            fold_ln: As in `process_weights`.
            center_writing_weights: As in `process_weights`.
            center_unembed: As in `process_weights`.
            fold_value_biases: As in `process_weights`.
            refactor_factored_attn_matrices: As in `process_weights`.
        Returns:
            This bridge.
        Raises:
            ArchitectureError, InputError: As in `process_weights`.
        """
        if no_processing:
            return self
        self.process_weights(
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            in_place=True,
        )
        if self.processed is not None and self.processed.left and not disable_warnings:
            warnings.warn(
                f"not everything could be done without changing what the model computes:\n{self.processed}",
                stacklevel=2,
            )
        return self

    def _plan(self, wanted: tuple[str, ...]) -> dict[str, Step]:
        """What can be done of some steps. The model is run, in evaluation mode, and left as it was."""
        set_by_user = self.list_hooks()
        if set_by_user:
            raise InputError(
                f"hooks are set ({len(set_by_user)}), and weights are judged by what the model does without "
                "them; call reset_hooks(including_permanent=True) first"
            )
        model = self._inner
        refused = refusal(model)
        given = {} if refused else self._example()

        def run() -> Any:
            return model(**given)  # as it is, also where the bridge has a compiled one

        with _evaluating(model), torch.inference_mode(False):
            steps, flow = plan_steps(model, self.architecture, run, refused)
            bridge: Any = self
            if UNEMBED in wanted:
                plan_head(bridge, steps[UNEMBED], run)
            if flow is not None and {VALUES, REFACTOR} & set(wanted):
                if FOLD not in wanted:
                    steps[
                        FOLD
                    ].todo.clear()  # biases that folding would make are not to be expected
                plan_attentions(bridge, model, self.architecture, flow, steps, run)
        return {name: steps[name] for name in wanted}


def _check(plan: dict[str, Step], wanted: Mapping[str, bool | None]) -> None:
    """Refuse what was insisted on and cannot be done."""
    doable = [name for name, step in plan.items() if not step.left]
    known = ", ".join(doable) or "none"
    for name, step in plan.items():
        if wanted[name] and step.left:
            partly = " None instead of True does what is exact of it." if step.todo else ""
            raise ArchitectureError(
                f"{name} cannot be done here without changing what the model computes: {step.reason}."
                f"{partly} Of the steps asked for, these can be done wholly: {known}; can_process() says more"
            )
    if plan and not any(step.todo for step in plan.values()) and any(s.left for s in plan.values()):
        first = next(step for step in plan.values() if step.left)
        raise ArchitectureError(
            f"none of {', '.join(plan)} can be done on this model: {first.name}: {first.reason}; "
            "can_process() says more"
        )


def _write(model: nn.Module, plan: dict[str, Step]) -> None:
    if any(step.unties for step in plan.values()):
        untie(model)
    for name, step in plan.items():
        for item in step.todo:
            _WRITERS[name](model, item)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like switched off, module by module as they were afterwards."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training
