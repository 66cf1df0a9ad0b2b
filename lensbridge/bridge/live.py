"""Recording a generation as it happens: pieces of each point, laid out by position at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hooks import HookFunction, HookPoint, HookRegistry, InputError, LensError, Step
from .cache import ActivationCache
from .inputs import takes, takes_positions
from .past import NAMES, with_copied_past
from .record import check_versions
from .request import Request
from .run import Stack
from .sampling import real_tokens
from .slicing import SliceInput, pos_dim, take
from .steps import Steps
from .tokens import positions_from_mask

Positions = Sequence[int] | None
"""Positions of the text; None of what shows everything at once (an encoder, an image)."""

Sink = Callable[[str, Tensor, Positions], Any]
"""``sink(name, tensor, positions)``: takes a piece as soon as it is there, instead of the cache."""

_OF_KEYS = (".k.", ".v.", ".hook_k", ".hook_v", ".hook_rot_k")


class _Piece(NamedTuple):
    step: Step
    value: Tensor
    picked: (
        list[int] | range | None
    )  # the positions it has along its axis; None for all of the step
    version: int | None = None  # of the value, where it is no copy: it must not have changed since

    @property
    def positions(self) -> list[int] | range:
        """The positions that the value has along its position axis."""
        return self.step.positions if self.picked is None else self.picked


class Text(NamedTuple):
    """What a generation read.

    Attributes:
        mask: 1 at real tokens, [batch, pos].
        tokens: The ids, [batch, pos]; None where some of it was embeddings.
        first: The first position that was read; not 0 where a past was given.
    """

    mask: Tensor
    tokens: Tensor | None
    first: int


class Wanted:
    """Which positions of a text whose length is not known yet can be in a slice of it.

    Args:
        pos_slice: As `take` takes it.
    Raises:
        InputError: Not a slice.
    """

    def __init__(self, pos_slice: SliceInput) -> None:
        self.pos_slice = pos_slice
        self.tail = 0  # so many at the end may be wanted, wherever that is
        self._picked: frozenset[int] = frozenset()
        self._from: int | None = None
        self._to: int | None = None
        known = (int, slice, tuple, list, Tensor, type(None))
        if isinstance(pos_slice, bool) or not isinstance(pos_slice, known):
            take(torch.empty(0), pos_slice, 0)  # says what a slice is
        if isinstance(pos_slice, (int, list, Tensor)):
            picked: list[int] = torch.as_tensor(pos_slice).reshape(-1).tolist()
            self._picked = frozenset(p for p in picked if p >= 0)
            self.tail = max((-p for p in picked if p < 0), default=0)
            return
        bounds = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice or slice(None)
        start, stop = bounds.start, bounds.stop
        if start is not None and start < 0:
            self.tail = -start
        else:
            self._from = start or 0
            self._to = stop if stop is None or stop >= 0 else None

    @property
    def is_one(self) -> bool:
        """Whether one position is meant, whose dimension is then dropped."""
        return isinstance(self.pos_slice, int)

    def __call__(self, position: int, length: int) -> bool:
        """Whether a position of a text that has this length so far may be wanted."""
        if position in self._picked or position >= length - self.tail:
            return True
        return self._from is not None and (
            position >= self._from and (self._to is None or position < self._to)
        )

    def of(self, start: int, stop: int) -> list[int]:
        """The positions in the slice of a text from `start` to `stop`."""
        what = [self.pos_slice] if self.is_one else self.pos_slice
        chosen: list[int] = take(torch.arange(stop), what, 0).tolist()
        is_named = isinstance(what, (list, Tensor))
        return chosen if is_named else [position for position in chosen if position >= start]


class LiveRecorder:
    """Stores what points show during a generation.

    Args:
        registry: The points of the model.
        steps: Follows the generation.
        config: The settings in force.
        points: Those to record.
        device: Where to keep the tensors; copies to the CPU do not wait for the device.
        pos_slice: Positions to keep.
        sink: Takes each piece instead.
        copies: Whether values must be copied because somebody may edit them in place.
    """

    def __init__(
        self,
        registry: HookRegistry,
        steps: Steps,
        config: Any,
        points: list[HookPoint],
        *,
        device: torch.device | str | None = None,
        pos_slice: SliceInput = None,
        sink: Sink | None = None,
        copies: bool = False,
    ) -> None:
        self.registry = registry
        self.clock = registry.clock
        self.points = points
        self.device = None if device is None else torch.device(device)
        self.wanted = None if pos_slice is None else Wanted(pos_slice)
        self.sink = sink
        self.copies = copies
        self.is_plain = device is None and self.wanted is None and sink is None and not copies
        self.steps = steps
        self.config = config
        self._elsewhere = steps.architecture.elsewhere
        main, towers = steps.architecture.main, steps.architecture.towers
        self._towers = tuple(tower.prefix for tower in towers if tower is not main)
        # Points that show something else than the positions of the pass, and what.
        self._odd: dict[str, str] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._whole: dict[str, Tensor] = {}
        self._fired: dict[str, None] = {}  # names in the order they came
        self._behind: set[torch.device] = set()  # devices that copies to the CPU are coming from

    # --- while it happens ------------------------------------------------------------------------

    def store(self, point: HookPoint) -> HookFunction:
        """The hook function for a point; the plainest one that does the job."""
        if self._is_whole(point):
            return self._store_whole
        name = str(point.name)
        pieces = self._pieces[name] = []
        is_of_keys = any(part in name for part in _OF_KEYS)
        if not self.is_plain or point.is_volatile or is_of_keys or point.axes == "...":
            return self._store
        clock, steps, dim = self.clock, self.steps, _position_dim(point)

        def store(tensor: Tensor, hook: HookPoint) -> None:
            step = clock.main
            if (
                step is None
                or step is not steps.step
                or step.stop is None
                or tensor.shape[dim] != step.stop - step.start
                or tensor.is_inference()
            ):
                self._store(tensor, hook)
                return
            if not pieces:
                self._fired[name] = None
            elif not step.start:
                pieces.clear()  # read again from the start: what comes now is newer
            pieces.append(_Piece(step, tensor, None, tensor._version))

        return store

    def _is_whole(self, point: HookPoint) -> bool:
        """Whether a point shows everything at once, and positions other than those of the text."""
        name, axes = str(point.name), point.axes.split()
        if name.startswith(self._elsewhere):
            return True
        if ".cross_attn." in name and any(part in name for part in _OF_KEYS):
            return True  # of the encoder's positions
        return not {"pos", "query", "..."} & set(axes) or name.startswith("projector")

    def _store_whole(self, tensor: Tensor, hook: HookPoint) -> None:
        # A copy: a decoder may go on to change what it attends to.
        value = self._kept(tensor.clone(), hook)
        if self.sink is not None:
            self.sink(str(hook.name), value, None)
        else:
            self._fired[str(hook.name)] = None
            self._whole[str(hook.name)] = value

    def _of_this_pass(self, tensor: Tensor, hook: HookPoint, step: Step) -> Tensor:
        """Where values of all earlier positions come along (rotated keys, say), those of this pass."""
        dim, width = _position_dim(hook), len(step.positions)
        n, stop = tensor.shape[dim], step.positions.stop
        is_of_keys = any(part in str(hook.name) for part in _OF_KEYS)
        if n > width and (n == stop or (is_of_keys and (n < stop or self.steps.is_static))):
            first = step.start if n >= stop else n - width
            return tensor.narrow(dim, first, width).clone()
        # A store of fixed size is written to again.
        return tensor.clone() if is_of_keys and self.steps.is_static else tensor

    def _store(self, tensor: Tensor, hook: HookPoint) -> None:
        step = self._step(hook)
        if self.steps.step is not None and step is not self.steps.step:
            return  # of a run that a hook function makes
        pieces = self._pieces[str(hook.name)]
        if step.start == 0 and pieces and self.sink is None:
            pieces.clear()  # read again from the start: what comes now is newer
        dim, stop = _position_dim(hook), step.positions.stop
        if dim >= tensor.dim():
            self._set_aside(tensor, hook, f"a tensor of shape {list(tensor.shape)}")
            return
        if tensor.shape[dim] > len(step.positions) or self.steps.is_static:
            tensor = self._of_this_pass(tensor, hook, step)
        width = tensor.shape[dim]
        # The head may be given the last positions only.
        is_short = width < len(step.positions) and str(hook.name).startswith("unembed")
        if width != len(step.positions) and not is_short:
            why = f"{width} entries in a pass over {len(step.positions)}"
            self._set_aside(tensor, hook, why)
            return
        positions: list[int] | range = range(stop - width, stop)
        if self.wanted is not None:
            here = [i for i, p in enumerate(positions) if self.wanted(p, stop)]
            if len(here) < len(positions):
                positions = [positions[i] for i in here]
                index = torch.tensor(here, dtype=torch.long, device=tensor.device)
                tensor = tensor.index_select(dim, index)
            self._forget(pieces, stop)
        if not positions and (pieces or self.sink is not None):
            return
        value = self._kept(tensor, hook)
        if self.sink is not None:
            self.sink(str(hook.name), value, positions)
        else:
            self._fired[str(hook.name)] = None
            version = value._version if self.is_plain and not value.is_inference() else None
            pieces.append(_Piece(step, value, positions, version))

    def _set_aside(self, tensor: Tensor, hook: HookPoint, why: str) -> None:
        """What does not line up with the text is for a sink only."""
        if self.sink is not None:
            self.sink(str(hook.name), self._kept(tensor, hook), None)
        else:
            self._odd[str(hook.name)] = why

    def _forget(self, pieces: list[_Piece], stop: int) -> None:
        """Let go of what only the end of a shorter text would have wanted."""
        wanted = self.wanted
        if wanted is not None and wanted.tail:
            pieces[:] = [x for x in pieces if any(wanted(p, stop) for p in x.positions)]

    def _step(self, hook: HookPoint) -> Step:
        return self.clock.main or hook.step

    def _kept(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        value = tensor.detach() if tensor.requires_grad else tensor
        if self.is_plain:
            return value.clone() if hook.is_volatile else value
        moved = value if self.device is None else self._moved(value, self.device)
        shares = moved.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        return moved.clone() if shares else moved

    def _moved(self, value: Tensor, device: torch.device) -> Tensor:
        if value.is_cuda and device.type == "cpu" and self.sink is None:
            # Pinned memory is what lets the copy run beside the model.
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._behind.add(value.device)
            return copy.copy_(value, non_blocking=True)
        return value.to(device)

    # --- when it is over -------------------------------------------------------------------------

    def finish(self, text: Text, must_fit: bool) -> ActivationCache:
        """Lay everything out by position.

        Args:
            text: What was read.
            must_fit: Whether every point was asked for by name.
        Raises:
            LensError: One of them does not line up with the positions.
        """
        for device in self._behind:
            torch.cuda.synchronize(device)
        for name, pieces in self._pieces.items():
            check_versions([(name, x.value, x.version) for x in pieces if x.version is not None])
        rows, stop = text.mask.shape
        wanted = Wanted(None) if self.wanted is None else self.wanted
        order = wanted.of(text.first, stop)
        values: dict[str, Tensor] = {}
        left_out: dict[str, str] = {}
        for name in [*self._fired, *self._odd]:
            point, pieces = self.registry[name], self._pieces.get(name, [])
            if name in self._whole:
                is_read = name.startswith("encoder_") or ".cross_attn." in name
                value = self._whole[name]
                values[name] = _repeated(value, rows) if is_read else value
            elif name in self._odd:
                left_out[name] = self._odd[name]
            elif pieces:
                is_square = point.axes.endswith("query key") and self.steps.is_static
                room = self.steps.room_of(point) if is_square else None
                laid = _laid_out(point, pieces, order, stop, room)
                if isinstance(laid, str) and len(pieces) == 1 and name.startswith(self._towers):
                    # A tower that ran once, on something as long as the prompt.
                    laid = pieces[0].value
                if isinstance(laid, str):
                    left_out[name] = laid
                else:
                    values[name] = laid.select(_position_dim(point), 0) if wanted.is_one else laid
        if left_out and must_fit:
            name, why = next(iter(left_out.items()))
            raise LensError(
                f"{name} cannot be cached during generation, its values do not line up with the text: {why}; "
                "give sink= to take its pieces as they come"
            )
        index = torch.tensor(order, dtype=torch.long, device=text.mask.device)
        cut = [None if x is None else x.index_select(1, index) for x in (text.mask, text.tokens)]
        mask, tokens = (x[:, 0] if x is not None and wanted.is_one else x for x in cut)
        return ActivationCache(values, self.registry, mask=mask, tokens=tokens, left_out=left_out)


def _position_dim(point: HookPoint) -> int:
    return 1 if point.axes == "..." else pos_dim(point.axes)


def _laid_out(
    point: HookPoint, pieces: list[_Piece], order: list[int], stop: int, room: int | None
) -> Tensor | str:
    """The values at some positions, from the pieces they came in; or why that cannot be."""
    dim, values = _position_dim(point), [piece.value for piece in pieces]
    if point.axes.split()[-2:] == ["query", "key"] and ".cross_attn." not in str(point.name):
        values = _squared(str(point.name), pieces, stop, room)
    # Of a position that came twice, the last is meant.
    where = {p: i for i, p in enumerate(p for piece in pieces for p in piece.positions)}
    lost = [position for position in order if position not in where]
    if lost:
        return f"there is nothing at position {lost[0]}"
    shapes = {value.shape[:dim] + value.shape[dim + 1 :] for value in values}
    if len(shapes) > 1:
        return (
            f"it came in pieces of shapes {', '.join(str(list(value.shape)) for value in values)}"
        )
    joined = values[0] if len(values) == 1 else torch.cat(values, dim)
    indices = [where[position] for position in order]
    if indices == list(range(joined.shape[dim])):
        return joined
    index = torch.tensor(indices, dtype=torch.long, device=joined.device)
    return joined.index_select(dim, index)


def _repeated(value: Tensor, rows: int) -> Tensor:
    """One row a sequence, where several are continued from one input."""
    n = value.shape[0] if value.dim() else 0
    return value.repeat_interleave(rows // n, dim=0) if n and n < rows and not rows % n else value


def _squared(name: str, pieces: list[_Piece], stop: int, room: int | None) -> list[Tensor]:
    """Scores or patterns of each pass over all keys of the text, [batch, head, query, key].

    Args:
        name: Of the point.
        pieces: What came.
        stop: How many keys the text has.
        room: How many places a store of fixed size has; None where it grows.
    """
    first, last = pieces[0], pieces[-1]
    # Columns that are no keys: an attention sink beside the scores.
    known = first.step.positions.stop
    extra = first.value.shape[-1] - known if room is None else last.value.shape[-1] - room
    extra = max(extra, 0)
    empty = 0.0 if name.endswith("hook_pattern") else -torch.inf
    made = []
    for step, value, *_ in pieces:
        keys, known = value.shape[-1] - extra, step.positions.stop
        # A window holds the last so many; a store of fixed size begins at 0 and ends in empty places.
        first_key = max(known - keys, 0)
        n = min(keys, stop - first_key)
        full = value.new_full((*value.shape[:-1], stop + extra), empty)
        full[..., first_key : first_key + n] = value[..., :n]
        if extra:
            full[..., stop:] = value[..., -extra:]
        made.append(full)
    return made


# --- the run around it ------------------------------------------------------------------------------------


def record_generation(
    stack: Stack,
    request: Request,
    recorder: LiveRecorder,
    *,
    must_fire: bool,
) -> tuple[Any, ActivationCache]:
    """Generate, have the last token read too, and keep what the points show.

    Args:
        stack: Runs the model.
        request: What to generate.
        recorder: Keeps it.
        must_fire: Whether a point that stays silent is an error.
    Returns:
        What Hugging Face returns, and the cache.
    """
    steps, config = recorder.steps, recorder.config
    options = _seeing_all(stack.inner, request, recorder, config)
    is_returned = bool(options.get("return_dict_in_generate"))
    is_seen = is_returned or any(options.get(name) is not None for name in NAMES)

    def read_last(out: Any) -> None:
        sequences = out if isinstance(out, Tensor) else out.sequences
        if steps.length != sequences.shape[1]:
            # Whoever sees the past afterwards expects it to end before the last token.
            steps.feed(sequences, with_copied_past if is_seen else dict)

    with stack.registry.hooks() as scope:
        for point in recorder.points:
            scope.observe([point], recorder.store(point), must_fire=must_fire)
        if request.length == 0:
            out = unchanged(request)
            stack.call(_for_forward(stack.inner, request))
        else:
            out = stack.generate(options, steps, read_last)
    tokens = out if isinstance(out, Tensor) else out.sequences
    return out, recorder.finish(_text_of(tokens, request, steps, config), must_fire)


def unchanged(request: Request) -> Any:
    """The answer to max_new_tokens=0: what would have been continued.

    Raises:
        InputError: That has no ids.
    """
    tokens = request.prompt if request.start is None else request.start
    if tokens is None:
        raise InputError(
            "max_new_tokens=0 gives back the ids of the prompt, and this prompt has none"
        )
    if not request.options.get("return_dict_in_generate"):
        return tokens
    from transformers.generation import utils

    kind: Any = (
        utils.GenerateDecoderOnlyOutput
        if request.start is None
        else utils.GenerateEncoderDecoderOutput
    )
    return kind(sequences=tokens, logits=())


def _for_forward(model: nn.Module, request: Request) -> dict[str, Any]:
    """Keywords to read the prompt with, and nothing else."""
    kwargs = {name: value for name, value in request.options.items() if takes(model, name)}
    if request.start is not None:
        return {**kwargs, "decoder_input_ids": request.start}
    if request.mask is not None and takes_positions(model):
        kwargs.setdefault("position_ids", positions_from_mask(request.mask))
    return kwargs


def _seeing_all(
    model: nn.Module, request: Request, recorder: LiveRecorder, config: Any
) -> dict[str, Any]:
    """Keywords of ``generate`` with which every position is seen."""
    options = dict(request.options)
    heads = any(str(point.name).startswith("unembed") for point in recorder.points)
    if heads and takes(model, "logits_to_keep"):
        options.setdefault("logits_to_keep", 0)  # else only the last position passes the head
    if "static" in str(config.cache_implementation):
        # Room for the token that the loop does not read.
        embeds = options.get("inputs_embeds")
        width = (request.continued or 1) if embeds is None else embeds.shape[1]
        new = config.max_new_tokens
        room = config.max_length if new is None else width + new
        options["max_cache_len"] = max(room, config.max_cache_len or 0)
    return options


def _text_of(tokens: Tensor, request: Request, steps: Steps, config: Any) -> Text:
    if steps.step is None or steps.step.prompt_length is None:  # nothing was generated
        mask = torch.ones_like(tokens) if request.mask is None else request.mask
        return Text(mask, tokens, 0)
    length = steps.length
    if (
        tokens.shape[1] == length - 1
    ):  # on some devices the loop makes a step too many and takes it back
        length -= 1
    _, kwargs = steps.latest or (None, {})
    known = kwargs.get("attention_mask" if request.start is None else "decoder_attention_mask")
    mask = torch.ones(len(tokens), length, dtype=torch.long, device=tokens.device)
    if isinstance(known, Tensor) and known.shape == mask.shape:
        mask = known.to(mask).clone()
    if tokens.dim() > 2:  # several codes a position
        return Text(mask, None, steps.first)
    new = min(length - steps.step.prompt_length, tokens.shape[1])
    ends = config.eos_token_id
    may_end_otherwise = bool(config.stop_strings or request.options.get("stopping_criteria"))
    pad = config.pad_token_id if may_end_otherwise and config.pad_token_id != ends else None
    if new:
        mask[:, length - new :] = real_tokens(tokens[:, -new:], ends, pad)
    return Text(mask, tokens if tokens.shape[1] == length else None, steps.first)
