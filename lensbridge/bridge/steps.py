"""Following a run: telling hook functions where in the text, and where in a generation, each pass is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import Clock, HookPoint, LensError, Step, watch
from .architecture import Architecture
from .past import past_length

_TEXT = ("input_ids", "inputs_embeds")
_CONTINUED = ("decoder_input_ids", "decoder_inputs_embeds")
_OF_ENCODER = tuple(f".cross_attn.{part}" for part in ("k.", "v.", "hook_rot_k"))
_UPDATE = "_update_model_kwargs_for_generation"


def width_of(kwargs: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """How many positions the first of some inputs has; None when none is given."""
    for name in names:
        given = kwargs.get(name)
        if isinstance(given, Tensor):
            return given.shape[1] if given.dim() > 1 else None
    return None


def _continued(architecture: Architecture) -> tuple[str, ...]:
    """Keywords that may bring the text the main tower reads, the likeliest first."""
    is_decoder = architecture.main.prefix == "decoder_"
    return _CONTINUED if is_decoder else (*_CONTINUED, *_TEXT)


def other_steps(
    kwargs: Mapping[str, Any], architecture: Architecture, main: Step | None
) -> dict[str, Step]:
    """Steps of points that see other positions than the main tower, by a part of their names."""
    found: dict[str, Step] = {}
    for prefix in architecture.elsewhere:
        # The encoder that stands beside a decoder reads the input; other towers read no text.
        width = _encoded(kwargs) if prefix == "encoder_" else None
        found[prefix] = Step(0, "encode", 0, width, width)
        if prefix == "encoder_":
            found.update(dict.fromkeys(_OF_ENCODER, found[prefix]))
    return found if main is None else found | head_step(kwargs, main)


def _encoded(kwargs: Mapping[str, Any]) -> int | None:
    """How many positions an encoder reads, or has read."""
    made = kwargs.get("encoder_outputs")
    if made is not None and isinstance(made[0], Tensor):
        return made[0].shape[1]
    return width_of(kwargs, _TEXT)


def head_step(kwargs: Mapping[str, Any], main: Step) -> dict[str, Step]:
    """The step of the head's points, where the head reads the last positions only."""
    kept = kwargs.get("logits_to_keep")
    if type(kept) is not int or not kept or main.stop is None or main.stop - kept <= main.start:
        return {}
    start = main.stop - kept
    return {"unembed": Step(main.number, main.phase, start, main.stop, main.prompt_length)}


def plain_step(kwargs: Mapping[str, Any], architecture: Architecture) -> Step:
    """The step of a run that generates nothing."""
    width = width_of(kwargs, _continued(architecture))
    start = past_length(kwargs)
    stop = None if width is None else start + width
    phase: Any = "decode" if start and width == 1 else "prefill"
    return Step(0, phase, start, stop, stop)


class Steps:
    """Follows a generation: before each pass, tells the clock what it covers.

    Args:
        loops: The modules whose ``generate`` may be the one that loops (a model, or a language model in it).
        architecture: Whose towers there are.
        clock: To be told.
        given: How many positions of ids ``generate`` was given to continue; None where it was given no ids.
        is_plain: Each pass after the first adds one token (greedy search, sampling, beams).
        level: How many runs of the model this thread has in progress.
        reads_last: Whether the last token will be read too; then the loop is overheard.
    Attributes:
        step: Of the last pass; None before the first.
        first: The first position that was read; not 0 where a past was given.
        latest: The module that looped and the keywords it would call itself with next.
        is_static: Whether keys and values lie in a store of fixed size.
    """

    def __init__(
        self,
        loops: Mapping[str, nn.Module],
        architecture: Architecture,
        clock: Clock,
        given: int | None,
        is_plain: bool,
        level: Callable[[], int],
        reads_last: bool = False,
    ) -> None:
        self.loops = loops
        self.architecture = architecture
        self.clock = clock
        self.given = given
        self.is_plain = is_plain
        self.level = level
        self.reads_last = reads_last
        self.step: Step | None = None
        self.first = 0
        self.latest: tuple[Any, dict[str, Any]] | None = None
        self.is_static = False
        self._names = _continued(architecture)
        self._elsewhere = other_steps({}, architecture, None)
        self._thread = self._level = 0
        self._depth = 0
        self._beyond = 0  # columns behind the text: a mask token at the place to predict (XLNet)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the passes that this thread makes inside a ``with`` block.

        A stream waits in a thread of its own while others run the same model.
        """
        self._thread, self._level = get_ident(), self.level() + 1
        with ExitStack() as stack:
            # A single module does not run inside itself.
            after = self._after if len(self.loops) > 1 else None
            stack.enter_context(watch(self.loops, self._before, after))
            for module in self.loops.values() if self.reads_last else ():
                stack.enter_context(self._listening_in(module))
            yield

    @contextmanager
    def _listening_in(self, module: Any) -> Iterator[None]:
        """Learn with which keywords the loop goes on; nothing else tells them."""
        own = module.__dict__.get(_UPDATE)
        update = getattr(module, _UPDATE)

        def heard(*args: Any, **kwargs: Any) -> Any:
            made = update(*args, **kwargs)
            self.latest = module, made
            return made

        module.__dict__[_UPDATE] = heard
        try:
            yield
        finally:
            if own is None:
                del module.__dict__[_UPDATE]
            else:
                module.__dict__[_UPDATE] = own

    def _before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_ours():
            return
        self._depth += 1
        if self._depth == 1 or len(self.loops) == 1:
            self.step = step = self._next(kwargs)
            self.clock.tell(step, self._elsewhere | head_step(kwargs, step))

    def _after(self, name: str, output: Any) -> None:
        if self._is_ours():
            self._depth -= 1

    def _is_ours(self) -> bool:
        """Whether a pass is the loop's: not another thread's, nor one that a hook function makes."""
        return get_ident() == self._thread and self.level() == self._level

    def _next(self, kwargs: Mapping[str, Any]) -> Step:
        width = width_of(kwargs, self._names) or 0
        last = self.step
        if last is None or last.stop is None or last.prompt_length is None:
            self._note_kind(kwargs)
            self._elsewhere = other_steps(kwargs, self.architecture, None)
            return self._first(width, past_length(kwargs))
        if last.stop < last.prompt_length:  # the prompt comes in chunks
            return Step(0, "prefill", last.stop, last.stop + width, last.prompt_length)
        number = last.number + 1
        stop = last.prompt_length + number + self._beyond
        start = stop - width
        if not self.is_plain:  # several tokens at once, some of them to be taken back
            start = past_length(kwargs) or last.stop
            stop = start + width
        return Step(number, "decode", start, stop, last.prompt_length)

    def _first(self, width: int, past: int) -> Step:
        given = self.given
        self._beyond = int(given is not None and not past and width == given + 1)
        stop = past + width
        prompt_length = max(stop - self._beyond, given or 0)
        if given is not None and not past and not self.is_plain:
            prompt_length = given  # guesses come with the prompt
        self.first = past
        return Step(0, "prefill", past, stop, prompt_length)

    def _note_kind(self, kwargs: Mapping[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        past = getattr(past, "self_attention_cache", past)
        self.is_static = any(
            getattr(layer, "is_compileable", False) and getattr(layer, "max_cache_len", None)
            for layer in getattr(past, "layers", ())
        )

    def room_of(self, point: HookPoint) -> int | None:
        """How many places a layer's store of keys has; None where nobody knows."""
        _, kwargs = self.latest or (None, {})
        past = kwargs.get("past_key_values")
        layers = getattr(getattr(past, "self_attention_cache", past), "layers", ())
        keys = getattr(layers[point.layer()], "keys", None) if layers else None
        return keys.shape[-2] if isinstance(keys, Tensor) else None

    # --- the last token --------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """How many positions of the text the passes so far have covered."""
        if self.step is None or self.step.stop is None:
            raise LensError(
                "the passes of this generation could not be followed: the model's own generate calls none of "
                "the modules that loop; run the returned tokens through run_with_cache instead"
            )
        return self.step.stop - self._beyond

    def feed(self, sequences: Tensor, past: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Run the model on the token that was generated last, as its loop would go on.

        Args:
            sequences: What the loop has so far, as it would hand it on.
            past: Says with what past to run.
        """
        if self.latest is None:
            raise LensError("the generation made no pass that could be continued")
        module, kwargs = self.latest
        step_by_step = 1 if kwargs.get("use_cache") else None
        inputs = module.prepare_inputs_for_generation(
            sequences, next_sequence_length=step_by_step, **kwargs
        )
        with torch.no_grad():
            module(**past(inputs), return_dict=True)
