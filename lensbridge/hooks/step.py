"""Steps: which positions of a text, and which step of a generation, the tensors that hooks see belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import InputError, LensError

Phase = Literal["prefill", "decode", "encode"]


@dataclass(frozen=True)
class Step:
    """One pass of the model, as a hook function needs to know it: ``hook.step``.

    Positions count the columns of the whole text: the prompt with its padding, then the generated tokens.
    Indices count along the tensor's own position axis, which holds only the positions of this pass.

    ::

        x[:, hook.step.generated] += vector                   # steer only what is generated
        x[:, hook.step.at(5)] = 0                             # ablate position 5, whenever it comes by
        return patch if hook.step.number == 3 else None       # the pass that reads the third new token

    Attributes:
        number: 0 while the prompt is read, k in the pass that reads the k-th generated token.
        phase: ``"prefill"`` while the prompt is read (and in any run that does not generate), ``"decode"``
            afterwards, ``"encode"`` in a tower that reads something else than the text that is continued.
        start: The first position of this pass.
        stop: The position behind its last one; None where the text does not say (images, sound).
        prompt_length: How many positions the prompt has.
    """

    number: int
    phase: Phase
    start: int
    stop: int | None
    prompt_length: int | None

    @property
    def is_prefill(self) -> bool:
        """Whether the prompt is being read."""
        return self.phase == "prefill"

    @property
    def is_decode(self) -> bool:
        """Whether generated tokens are being read."""
        return self.phase == "decode"

    @property
    def positions(self) -> range:
        """The positions of this pass."""
        return range(self.start, self._known(self.stop))

    @property
    def prompt(self) -> slice:
        """Indices of the prompt's positions; empty when there are none in this pass."""
        return slice(0, self._border())

    @property
    def generated(self) -> slice:
        """Indices of generated positions; empty when there are none in this pass."""
        return slice(self._border(), len(self.positions))

    def at(self, *positions: int) -> list[int]:
        """Indices of the given positions; those outside this pass are left out.

        Raises:
            InputError: A negative position: the end of the text is not known while it is written.
        """
        for position in positions:
            if position < 0:
                raise InputError(
                    f"position {position} is counted from an end that is not known yet; the last of the "
                    "prompt is hook.step.prompt_length - 1"
                )
        here = self.positions
        return [position - self.start for position in positions if position in here]

    def _border(self) -> int:
        here = self.positions
        return min(max(self._known(self.prompt_length) - here.start, 0), len(here))

    def _known(self, number: int | None) -> int:
        if number is None:
            raise LensError(
                "the positions of this tensor are not those of a text (it belongs to another tower)"
            )
        return number


class Clock:
    """What step it is, for all points of a model.

    Attributes:
        main: The step of the pass in progress; None outside runs that tell.
        others: Steps of points that see something else, by a part of their names.
    """

    __slots__ = ("main", "others")

    def __init__(self) -> None:
        self.main: Step | None = None
        self.others: Mapping[str, Step] = {}

    def tell(self, main: Step | None, others: Mapping[str, Step]) -> None:
        """A pass begins, or what was interrupted goes on."""
        self.main, self.others = main, others

    def of(self, name: str) -> Step:
        """The step of the tensor that the point of that name sees.

        Raises:
            LensError: No run is in progress that says.
        """
        step = next((x for part, x in self.others.items() if part in name), self.main)
        if step is None:
            raise LensError(
                f"{name!r} has no step now: hook.step is known in runs of the bridge (bridge(...), "
                "bridge.generate(...)), not when the model is called directly"
            )
        return step
