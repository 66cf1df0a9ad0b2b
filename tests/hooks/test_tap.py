"""Taps and sites on plain torch modules: one PyTorch hook a side, views in, edits out, nothing left."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lensbridge.hooks import (
    Action,
    Call,
    HookFunction,
    HookPoint,
    HookRegistry,
    HookValueError,
    Listener,
    Site,
    Span,
    Tap,
    Unsettled,
)

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hook_counts(module: nn.Module) -> tuple[int, int]:
    """PyTorch hooks on a module: (before, after)."""
    return len(module._forward_pre_hooks), len(module._forward_hooks)


def is_bare(module: nn.Module) -> bool:
    """Whether none of PyTorch's hook dictionaries of any submodule holds anything."""
    return not any(getattr(part, held) for part in module.modules() for held in HOOK_DICTS)


def read_input(call: Call) -> Tensor:
    """First argument, by position or as ``x=``."""
    return call.args[0] if call.args else call.kwargs["x"]


def write_input(call: Call, value: Tensor) -> None:
    """Replace what `read_input` reads."""
    call.changed = True
    if call.args:
        call.args = (value, *call.args[1:])
    else:
        call.kwargs = {**call.kwargs, "x": value}


def read_output(call: Call) -> Tensor:
    """The output, or its first item."""
    return call.output if isinstance(call.output, Tensor) else call.output[0]


def write_output(call: Call, value: Tensor) -> None:
    """Replace what `read_output` reads."""
    call.changed = True
    call.output = value if isinstance(call.output, Tensor) else (value, *call.output[1:])


INPUT = Tap("input", read_input, write_input)
OUTPUT = Tap("output", read_output, write_output)


def tapped(
    module: nn.Module, *taps: Tap, unsettled: Unsettled | None = None
) -> tuple[Site, list[HookPoint]]:
    """A site with one point a tap, named "0", "1", ..."""
    site = Site(module, unsettled)
    points = [HookPoint(str(index)) for index in range(len(taps))]
    for tap, point in zip(taps, points, strict=True):
        site.add(tap, point)
    return site, points


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A seeded float64 layer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Linear(d_in, d_out, dtype=torch.float64)


class Pair(nn.Module):
    """Returns (its input through a layer, a constant); takes ``x`` and an option by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(3, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        """[batch, 3] -> ([batch, 4], "rest")."""
        return self.layer(x) * scale, "rest"


@pytest.fixture
def x() -> Tensor:
    """Input, [2, 3]."""
    return torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def look(tensor: Tensor, hook: HookPoint) -> None:
    """A hook that does nothing."""


def noting(seen: list[Any], then: HookFunction) -> HookFunction:
    """A hook that notes a copy of what it saw, then does `then`."""

    def hook_function(tensor: Tensor, hook: HookPoint) -> Any:
        seen.append(tensor.clone())
        return then(tensor, hook)

    return hook_function


# --- attaching ----------------------------------------------------------------------------------------------


def test_site_without_listeners_attaches_nothing() -> None:
    """Making sites, taps and points leaves the module as it was."""
    module = Pair()
    tapped(module, INPUT, OUTPUT)
    tapped(module.layer, INPUT, OUTPUT)
    assert is_bare(module)


@pytest.mark.parametrize(
    ("side", "counts"), [("input", (1, 0)), ("output", (0, 1))], ids=["input", "output"]
)
def test_one_hook_on_the_listened_side_only(side: str, counts: tuple[int, int]) -> None:
    """The side nobody listens to has no hook; the last removal takes the hook away."""
    module = Pair()
    tap = INPUT if side == "input" else OUTPUT
    _, points = tapped(module, tap, tap, tap)
    listeners = [point.add_hook(look) for point in points]
    assert hook_counts(module) == counts
    listeners[0].remove()
    listeners[1].remove()
    assert hook_counts(module) == counts
    listeners[2].remove()
    assert is_bare(module)


@pytest.mark.parametrize("make", [Pair, lambda: linear(3, 4)], ids=["composite", "leaf"])
@pytest.mark.parametrize("observes", [False, True])
def test_at_most_one_hook_a_side_however_many_listen(
    make: Callable[[], nn.Module], observes: bool
) -> None:
    """Six points with two listeners each share at most one hook before and one after."""
    module = make()
    _, points = tapped(module, *[INPUT, OUTPUT] * 3)
    listeners = [point.add_hook(look, observes=observes) for point in points for _ in range(2)]
    before, after = hook_counts(module)
    assert (before <= 1, after) == (True, 1)
    for listener in listeners:
        listener.remove()
    assert is_bare(module)


def test_other_peoples_hooks_are_left_alone(x: Tensor) -> None:
    """A user's own PyTorch hooks stay, in their order, when ours come and go."""
    module, calls = linear(3, 4), []
    mine = module.register_forward_hook(lambda *_: calls.append("mine"))
    _, points = tapped(module, INPUT, OUTPUT)
    listeners = [
        point.add_hook(lambda tensor, hook: calls.append(str(hook.name))) for point in points
    ]
    module(x)
    assert calls == ["0", "1", "mine"]
    for listener in listeners:
        listener.remove()
    assert list(module._forward_hooks) == [mine.id]
    module(x)
    assert calls == ["0", "1", "mine", "mine"]


def test_hooks_that_came_first_see_our_edit(x: Tensor) -> None:
    """Ours run before hooks installed earlier (Hugging Face's recorders), on both sides."""
    module, seen = linear(3, 4), []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    module.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    _, (before, after) = tapped(module, INPUT, OUTPUT)
    before.add_hook(lambda tensor, hook: tensor + 1)
    after.add_hook(lambda tensor, hook: tensor * 2)
    module(x)
    assert torch.equal(seen[0], x + 1)
    assert torch.equal(seen[1], x + 1)
    assert torch.equal(seen[2], 2 * F.linear(x + 1, module.weight, module.bias))


def test_points_of_a_side_fire_in_the_order_of_their_taps(x: Tensor) -> None:
    """Whatever order the listeners come in."""
    module, calls = Pair(), []
    _, points = tapped(module, INPUT, INPUT, OUTPUT, OUTPUT)
    for point in reversed(points):
        point.add_hook(lambda tensor, hook: calls.append(hook.name))
    module(x)
    assert calls == ["0", "1", "2", "3"]


def test_later_point_of_a_side_sees_the_earlier_ones_edit(x: Tensor) -> None:
    """Edits of one side accumulate."""
    module = Pair()
    _, (first, second) = tapped(module, OUTPUT, OUTPUT)
    first.add_hook(lambda tensor, hook: tensor + 1)
    second.add_hook(lambda tensor, hook: tensor * 2)
    assert torch.equal(module(x)[0], (module.layer(x) + 1) * 2)


# --- reading ------------------------------------------------------------------------------------------------


def test_reading_shares_storage_and_changes_nothing(x: Tensor) -> None:
    """What an observer sees is the module's own memory; the output is the object the module made."""
    module = linear(3, 4)
    seen: dict[str | None, Tensor] = {}
    _, points = tapped(module, INPUT, OUTPUT)
    for point in points:
        point.add_hook(lambda tensor, hook: seen.update({hook.name: tensor}), observes=True)
    out = module(x)
    assert seen["0"] is x
    assert seen["1"] is out
    assert torch.equal(out, F.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [Pair, lambda: linear(3, 4)], ids=["composite", "leaf"])
def test_in_place_edit_of_an_input_reaches_this_module_alone(
    make: Callable[[], nn.Module], mode: Callable[[], Any], x: Tensor
) -> None:
    """The module computes with the edit, the caller's tensor and its other readers do not see it."""
    module, twin = make(), make()
    _, (point,) = tapped(module, INPUT)

    def ablate(tensor: Tensor, hook: HookPoint) -> None:
        tensor[:, 1] = 0.0

    point.add_hook(ablate)
    edited = x.clone()
    edited[:, 1] = 0.0
    with mode():
        shared = x.clone()
        out, wanted = module(shared), twin(edited)
    assert torch.equal(*(y[0] if isinstance(y, tuple) else y for y in (out, wanted)))
    assert torch.equal(shared, x)


def test_view_tap_reads_without_a_copy(x: Tensor) -> None:
    """A tap that reshapes into heads shows the same storage, with the values by hand."""
    module, seen = linear(3, 4), []
    heads = Tap("output", lambda c: c.output.unflatten(-1, (2, 2)), lambda c, v: None)
    _, (point,) = tapped(module, heads)
    point.add_hook(lambda tensor, hook: seen.append(tensor))
    out = module(x)
    assert seen[0].untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    assert seen[0].tolist() == out.view(2, 2, 2).tolist()


def test_first_item_of_a_tuple_is_read_and_the_rest_kept(x: Tensor) -> None:
    """Editing element 0 keeps the other elements."""
    module = Pair()
    seen: list[Tensor] = []
    _, (point,) = tapped(module, OUTPUT)
    point.add_hook(noting(seen, lambda tensor, hook: tensor * 3))
    out = module(x)
    assert torch.equal(seen[0], module.layer(x))
    assert torch.equal(out[0], module.layer(x) * 3)
    assert out[1] == "rest"


def test_input_given_by_keyword_is_read_and_written(x: Tensor) -> None:
    """Modules called by keyword are tapped alike, and their other keywords arrive."""
    module = Pair()
    seen: list[Tensor] = []
    _, (point,) = tapped(module, INPUT)
    point.add_hook(noting(seen, lambda tensor, hook: tensor + 1))
    out = module(x=x, scale=2.0)
    assert torch.equal(seen[0], x)
    assert torch.equal(out[0], module.layer(x + 1) * 2.0)


def test_callers_keyword_dictionary_is_not_touched(x: Tensor) -> None:
    """An edit goes to the module, not into the caller's own dictionary or tensor."""
    module = Pair()
    _, (point,) = tapped(module, INPUT)
    point.add_hook(lambda tensor, hook: tensor + 1)
    kwargs, before = {"x": x, "scale": 2.0}, x.clone()
    module(**kwargs)
    assert kwargs["x"] is x
    assert torch.equal(x, before)


# --- writing ------------------------------------------------------------------------------------------------


def triple(tensor: Tensor) -> Tensor:
    """The edit both ways of hooking make."""
    return 3 * tensor - 1


@pytest.mark.parametrize("make", [Pair, lambda: linear(3, 4)], ids=["composite", "leaf"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_write_equals_a_hand_written_pytorch_hook(
    make: Callable[[], nn.Module], side: str, x: Tensor
) -> None:
    """Bit-equal to the same edit by register_forward(_pre)_hook on a twin module."""
    module, twin = make(), make()
    _, (point,) = tapped(module, INPUT if side == "input" else OUTPUT)
    point.add_hook(lambda tensor, hook: triple(tensor))
    if side == "input":
        twin.register_forward_pre_hook(lambda module, args: (triple(args[0]),))
    else:
        twin.register_forward_hook(
            lambda module, args, out: (
                triple(out) if isinstance(out, Tensor) else (triple(out[0]), out[1])
            )
        )
    ours, theirs = module(x), twin(x)
    if isinstance(ours, tuple):
        ours, theirs = ours[0], theirs[0]
    assert torch.equal(ours, theirs)


def test_in_place_edit_of_a_view_takes_effect(x: Tensor) -> None:
    """Editing one head in place edits the module's output."""
    module = linear(3, 4)
    clean = module(x)

    def write(call: Call, value: Tensor) -> None:
        write_output(call, value.flatten(-2))

    _, (point,) = tapped(
        module, Tap("output", lambda call: call.output.unflatten(-1, (2, 2)), write)
    )

    def ablate(tensor: Tensor, hook: HookPoint) -> None:
        tensor[:, 1] = 0.0

    point.add_hook(ablate)
    with torch.no_grad():
        out = module(x)
    assert torch.equal(out[:, :2], clean[:, :2])
    assert out[:, 2:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_place_edit_of_a_computed_value_is_written_back(
    mode: Callable[[], Any], x: Tensor
) -> None:
    """Where reading has to compute, an in-place edit still reaches `write`, in inference mode too."""
    module = linear(3, 4)
    squares = Tap("output", lambda c: c.output**2, lambda c, v: write_output(c, v.sqrt()))
    _, (point,) = tapped(module, squares)

    def quadruple(tensor: Tensor, hook: HookPoint) -> None:
        tensor.mul_(4)

    with mode():
        clean = module(x)
        point.add_hook(quadruple)
        torch.testing.assert_close(module(x), 2 * clean.abs())


def test_own_value_written_back_changes_nothing(x: Tensor) -> None:
    """Returning a clone is bit-equal to not listening."""
    module = Pair()
    clean = module(x)[0]
    _, points = tapped(module, INPUT, OUTPUT)
    for point in points:
        point.add_hook(lambda tensor, hook: tensor.clone())
    assert torch.equal(module(x)[0], clean)


@pytest.mark.parametrize("order", [("observer", "editor"), ("editor", "observer")])
def test_editor_at_a_point_that_is_observed_already(order: tuple[str, str], x: Tensor) -> None:
    """On a leaf's input, an edit acts whether the observer came before or after, and when it has gone."""
    module, seen = linear(3, 4), []
    _, (point,) = tapped(module, INPUT)
    held = {}
    for who in order:
        if who == "observer":
            held[who] = point.add_hook(
                lambda tensor, hook: seen.append(tensor.clone()), observes=True
            )
        else:
            held[who] = point.add_hook(lambda tensor, hook: tensor + 1)
    assert torch.equal(module(x), F.linear(x + 1, module.weight, module.bias))
    assert torch.equal(seen[0], x if order[0] == "observer" else x + 1)
    held["editor"].remove()
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    assert torch.equal(seen[1], x)
    held["observer"].remove()
    assert is_bare(module)


def test_gradient_listener_at_a_point_that_is_observed_already(x: Tensor) -> None:
    """A leaf's input gradient is seen though an observer was there first."""
    module, seen = linear(3, 4), []
    _, (point,) = tapped(module, INPUT)
    point.add_hook(look, observes=True)
    point.add_hook(lambda grad, hook: seen.append(grad), "bwd")
    module(x).sum().backward()
    torch.testing.assert_close(seen[0], torch.ones(2, 4, dtype=torch.float64) @ module.weight)


def test_input_of_a_module_that_works_in_place() -> None:
    """An observer of ReLU(inplace=True) sees what went in, not what came out."""
    module, seen = nn.ReLU(inplace=True), []
    _, (point,) = tapped(module, INPUT)
    point.add_hook(lambda tensor, hook: seen.append(tensor.clone()), observes=True)
    assert module(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert [tensor.tolist() for tensor in seen] == [[-1.0, 2.0]]


def test_gradient_through_a_site_equals_autograd(x: Tensor) -> None:
    """The gradient of a tapped hidden value, and of an edited one, as by hand."""
    first, second = linear(3, 4), linear(4, 2)
    _, (point,) = tapped(first, OUTPUT)
    seen: list[Tensor] = []
    point.add_hook(lambda tensor, hook: tensor * 2)
    point.add_hook(lambda grad, hook: seen.append(grad), "bwd")
    (second(first(x)) ** 2).sum().backward()
    hidden = (F.linear(x, first.weight, first.bias) * 2).detach().requires_grad_()
    wanted = torch.autograd.grad((second(hidden) ** 2).sum(), hidden)[0]
    torch.testing.assert_close(seen[0], wanted)
    torch.testing.assert_close(first.bias.grad, 2 * wanted.sum(0))


def test_unfit_value_at_a_site_is_refused_and_the_site_still_works(x: Tensor) -> None:
    """The error comes out of the module call; after removal the module is bare and clean."""
    module = Pair()
    clean = module(x)[0]
    _, (point,) = tapped(module, OUTPUT)
    listener = point.add_hook(lambda tensor, hook: tensor[:, :2])
    with pytest.raises(HookValueError, match=r"'0' returned \[2, 2\].*\[2, 4\]"):
        module(x)
    listener.remove()
    assert is_bare(module)
    assert torch.equal(module(x)[0], clean)


# --- actions ------------------------------------------------------------------------------------------------


def share(index: int) -> tuple[Tap, Action]:
    """The input of one half of a joint projection [.., 4] = [.., 2 + 2]: read before, mended after."""
    part = slice(2 * index, 2 * index + 2)
    changed: list[Tensor] = []

    def read(call: Call) -> Tensor:
        changed.clear()
        return read_input(call)

    def mend(call: Call) -> None:
        if changed:
            again = call.module.forward(changed.pop())
            mended = call.output.clone()
            mended[:, part] = again[:, part]
            write_output(call, mended)

    return Tap("input", read, lambda call, value: changed.append(value)), Action(mend)


def tapped_shares(module: nn.Module, *more: Tap) -> list[HookPoint]:
    """Points "left" and "right" on the two shares, and one for each further tap."""
    site, rest = tapped(module)[0], [HookPoint(str(index)) for index in range(len(more))]
    points = [HookPoint("left"), HookPoint("right")]
    for index, point in enumerate(points):
        for part in share(index):
            site.add(part, point)
    for tap, point in zip(more, rest, strict=True):
        site.add(tap, point)
    return [*points, *rest]


def test_action_mends_its_own_share_only(x: Tensor) -> None:
    """Editing the input of one half leaves the other half bit-equal."""
    module = linear(3, 4)
    clean = module(x)
    left, _ = tapped_shares(module)
    listener = left.add_hook(lambda tensor, hook: tensor + 1)
    assert hook_counts(module) == (1, 1)
    out = module(x)
    assert torch.equal(out[:, :2], F.linear(x + 1, module.weight, module.bias)[:, :2])
    assert torch.equal(out[:, 2:], clean[:, 2:])
    listener.remove()
    assert is_bare(module)
    assert torch.equal(module(x), clean)


def test_two_shares_each_see_the_unedited_input(x: Tensor) -> None:
    """Both halves edited differently: each acts on its share alone."""
    module = linear(3, 4)
    seen: list[Tensor] = []
    left, right = tapped_shares(module)
    left.add_hook(lambda tensor, hook: tensor + 1)
    right.add_hook(noting(seen, lambda tensor, hook: tensor * 5))
    out = module(x)
    assert torch.equal(seen[0], x)
    assert torch.equal(out[:, :2], F.linear(x + 1, module.weight, module.bias)[:, :2])
    assert torch.equal(out[:, 2:], F.linear(x * 5, module.weight, module.bias)[:, 2:])


def test_output_points_see_what_an_action_mended(x: Tensor) -> None:
    """The mended output is what output listeners read."""
    module, seen = linear(3, 4), []
    left, _, whole = tapped_shares(module, OUTPUT)
    left.add_hook(lambda tensor, hook: tensor + 1)
    whole.add_hook(lambda tensor, hook: seen.append(tensor))
    assert torch.equal(module(x), seen[0])
    assert torch.equal(seen[0][:, :2], F.linear(x + 1, module.weight, module.bias)[:, :2])


def test_edit_of_a_failed_call_is_not_applied_to_the_next(x: Tensor) -> None:
    """A call that raised after its input was edited leaves nothing pending."""
    module = linear(3, 4)
    left, _ = tapped_shares(module)
    wanted = [True]
    left.add_hook(lambda tensor, hook: tensor + 1 if wanted[0] else None)
    stop = module.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        module(x)
    stop.remove()
    wanted[0] = False
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


def fail(*_: Any) -> None:
    """Raise."""
    raise ZeroDivisionError


# --- spans --------------------------------------------------------------------------------------------------


class Watch(Span):
    """Counts calls of torch.tanh and fires its point on their input."""

    def __init__(self, point: HookPoint) -> None:
        super().__init__((point,))
        self.watched = 0
        self.closed: list[str | None] = []

    def close(self) -> None:
        """Note the name."""
        self.closed.append(self.points[0].name)
        super().close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Fire before tanh."""
        if func is torch.tanh:
            self.watched += 1
            new = self.points[0].fire(args[0])
            args = args if new is None else (new,)
        return func(*args, **(kwargs or {}))


class Squash(nn.Module):
    """tanh of a layer; raises `trouble` half-way when set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(3, 4)
        self.trouble: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3] -> [batch, 4]."""
        hidden = self.layer(x)
        if self.trouble is not None:
            raise self.trouble
        return torch.tanh(hidden)


def open_modes() -> int:
    """How many torch function modes are on this thread's stack."""
    return torch._C._len_torch_function_stack()


@pytest.fixture
def squash() -> tuple[Squash, HookRegistry, Watch]:
    """A module with a span whose point is "inner", and output point "0"; in a registry."""
    module = Squash()
    spans = Unsettled()
    inner = HookPoint("inner")
    watch = Watch(inner)
    site, points = tapped(module, OUTPUT, unsettled=spans)
    site.set_span(watch)
    return module, HookRegistry([inner, *points], None, spans), watch


Squashed = tuple[Squash, HookRegistry, Watch]


def test_span_stays_closed_while_nobody_listens_inside(squash: Squashed, x: Tensor) -> None:
    """Listening to another point of the same module does not open it."""
    module, registry, watch = squash
    registry["0"].add_hook(look)
    module(x)
    assert (watch.watched, watch.is_open, open_modes()) == (0, False, 0)
    registry.reset()
    assert is_bare(module)


def test_span_is_open_exactly_during_the_forward(squash: Squashed, x: Tensor) -> None:
    """It sees the module's own call, edits it, and is closed before and after."""
    module, registry, watch = squash
    states: list[tuple[bool, int]] = []
    module.layer.register_forward_hook(lambda *_: states.append((watch.is_open, open_modes())))
    registry["inner"].add_hook(lambda tensor, hook: tensor * 2)
    assert hook_counts(module) == (1, 1)
    assert not watch.is_open
    out = module(x)
    assert torch.equal(out, torch.tanh(module.layer(x) * 2))
    assert states[0] == (True, 1)
    assert (watch.is_open, open_modes(), watch.watched) == (False, 0, 1)
    registry.reset()
    assert hook_counts(module) == (0, 0)
    assert torch.equal(module(x), torch.tanh(module.layer(x)))
    assert watch.watched == 1


def test_listeners_do_their_own_torch_business_unwatched(squash: Squashed, x: Tensor) -> None:
    """tanh called by a hook inside the span's module is not mistaken for the model's."""
    module, registry, watch = squash
    _, (deep,) = tapped(module.layer, OUTPUT, unsettled=registry.unsettled)
    deep.add_hook(lambda tensor, hook: torch.tanh(tensor))
    registry["inner"].add_hook(look)
    assert torch.equal(
        module(x),
        torch.tanh(torch.tanh(F.linear(x, module.layer.weight, module.layer.bias))),
    )
    assert watch.watched == 1


def test_output_listener_runs_after_the_span_is_closed(squash: Squashed, x: Tensor) -> None:
    """The module's own output point fires outside the span."""
    module, registry, watch = squash
    states: list[bool] = []
    registry["inner"].add_hook(look)
    registry["0"].add_hook(lambda tensor, hook: states.append(watch.is_open))
    module(x)
    assert states == [False]


def test_span_is_closed_when_the_module_raises(squash: Squashed, x: Tensor) -> None:
    """An exception inside the forward closes it at once, without help from a scope."""
    module, registry, watch = squash
    registry["inner"].add_hook(look)
    module.trouble = ZeroDivisionError("inside")
    with pytest.raises(ZeroDivisionError, match="inside"):
        module(x)
    assert (watch.is_open, open_modes()) == (False, 0)


def test_span_is_closed_when_a_hook_inside_raises(squash: Squashed, x: Tensor) -> None:
    """An exception in a listener of the span's own point closes it too."""
    module, registry, watch = squash
    registry["inner"].add_hook(fail)
    with pytest.raises(ZeroDivisionError):
        module(x)
    assert (watch.is_open, open_modes()) == (False, 0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_scope_leaves_no_span_open(squash: Squashed, x: Tensor, kind: type[BaseException]) -> None:
    """PyTorch skips its hooks on KeyboardInterrupt; the scope closes the span all the same."""
    module, registry, watch = squash
    module.trouble = kind()
    with pytest.raises(kind), registry.hooks([("inner", look), ("0", look)]):
        module(x)
    assert (watch.is_open, open_modes(), registry.unsettled.spans) == (False, 0, set())
    assert is_bare(module)
    module.trouble = None
    assert torch.equal(module(x), torch.tanh(module.layer(x)))
    assert watch.watched == 0


def test_settle_closes_nested_spans_innermost_first(x: Tensor) -> None:
    """Two spans left open by an interrupt come off the stack in order; a foreign mode below stays."""

    class Foreign(TorchFunctionMode):
        """Somebody else's mode."""

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            """Pass on."""
            return func(*args, **(kwargs or {}))

    spans = Unsettled()
    inner_module = Squash()
    outer_module = nn.Sequential(inner_module)
    points = [HookPoint("outer"), HookPoint("inner")]
    watches = [Watch(point) for point in points]
    for module, watch in zip((outer_module, inner_module), watches, strict=True):
        Site(module, spans).set_span(watch)
    registry = HookRegistry(points, None, spans)
    inner_module.trouble = KeyboardInterrupt()
    with Foreign():
        registry.add_hook(None, look)
        with pytest.raises(KeyboardInterrupt):
            outer_module(x)
        assert [watch.is_open for watch in watches] == [True, True]
        assert open_modes() == 3
        closed: list[str | None] = []
        for watch in watches:
            watch.closed = closed
        registry.settle()
        assert closed == ["inner", "outer"]
        assert [watch.is_open for watch in watches] == [False, False]
        assert open_modes() == 1
    assert open_modes() == 0


def test_interrupted_span_does_not_pile_up(squash: Squashed, x: Tensor) -> None:
    """Without any scope, the next call of the module finds one mode on the stack, not two."""
    module, registry, watch = squash
    registry["inner"].add_hook(look)
    module.trouble = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        module(x)
    module.trouble = None
    module(x)
    assert (watch.watched, watch.is_open, open_modes()) == (1, False, 0)


def test_gradient_listener_opens_a_span(squash: Squashed, x: Tensor) -> None:
    """A bwd listener on an inner point gets the gradient of the value inside."""
    module, registry, _ = squash
    seen: list[Tensor] = []
    registry["inner"].add_hook(lambda grad, hook: seen.append(grad), "bwd")
    module(x).sum().backward()
    torch.testing.assert_close(seen[0], 1 - torch.tanh(module.layer(x)).detach() ** 2)


# --- mute ---------------------------------------------------------------------------------------------------


def test_muted_points_pass_in_silence_and_come_back(x: Tensor) -> None:
    """The muted point neither fires nor edits; others of the site do; unmuting restores it."""
    module, calls = Pair(), []
    site, points = tapped(module, INPUT, OUTPUT)

    def note_and_add(tensor: Tensor, hook: HookPoint) -> Tensor:
        calls.append(hook.name)
        return tensor + 1

    for point in points:
        point.add_hook(note_and_add)
    site.mute(frozenset({points[0]}))
    assert hook_counts(module) == (0, 1)
    assert torch.equal(module(x)[0], module.layer(x) + 1)
    assert calls == ["1"]
    site.mute(frozenset(points))
    assert is_bare(module)
    assert torch.equal(module(x)[0], module.layer(x))
    site.mute(frozenset())
    assert torch.equal(module(x)[0], module.layer(x + 1) + 1)
    assert calls == ["1", "0", "1"]


def test_listener_that_comes_while_muted_waits(x: Tensor) -> None:
    """Adding a listener to a muted point attaches nothing until it is unmuted."""
    module = Pair()
    site, (point,) = tapped(module, INPUT)
    site.mute(frozenset({point}))
    point.add_hook(lambda tensor, hook: tensor + 1)
    assert is_bare(module)
    assert torch.equal(module(x)[0], module.layer(x))
    site.mute(frozenset())
    assert torch.equal(module(x)[0], module.layer(x + 1))


def test_one_point_at_two_sites(x: Tensor) -> None:
    """A point served by two modules fires at both, and both are bare afterwards."""
    modules, seen = [linear(3, 3), linear(3, 3)], []
    point = HookPoint("shared")
    for module in modules:
        Site(module).add(OUTPUT, point)
    listener = point.add_hook(lambda tensor, hook: seen.append(tensor))
    hidden = modules[0](x)
    out = modules[1](hidden)
    assert (seen[0] is hidden, seen[1] is out, len(seen)) == (True, True, 2)
    listener.remove()
    assert all(is_bare(module) for module in modules)


def test_one_shot_editor_beside_an_observer_fires_each_point_once(x: Tensor) -> None:
    """A listener removing itself during a leaf's call does not make its neighbour fire twice."""
    module, calls = linear(3, 4), []
    _, (edited, observed) = tapped(module, INPUT, INPUT)
    held: list[Listener] = []

    def once(tensor: Tensor, hook: HookPoint) -> Tensor:
        held[0].remove()
        return tensor + 1

    held.append(edited.add_hook(once))
    observed.add_hook(lambda tensor, hook: calls.append(tensor.clone()), observes=True)
    module(x)
    assert len(calls) == 1
    assert torch.equal(calls[0], x + 1)


def test_one_shot_hook_inside_a_span_leaves_no_mode_open(squash: Squashed, x: Tensor) -> None:
    """A hook that removes itself in mid-call leaves the span to be closed as usual."""
    module, registry, watch = squash
    held: list[Listener] = []
    held += registry.add_hook("inner", lambda tensor, hook: held[0].remove())
    module(x)
    assert (watch.is_open, open_modes()) == (False, 0)
    assert is_bare(module)


def test_one_shot_edit_is_carried_out(x: Tensor) -> None:
    """An edit whose action comes at the other side of the call happens although its hook is gone by then."""
    module = nn.Linear(3, 4, dtype=torch.float64)
    kept: list[Tensor] = []
    tap = Tap("input", lambda call: call.args[0], lambda call, value: kept.append(value))

    def apply(call: Call) -> None:
        call.changed, call.output = True, module.forward(kept.pop())

    point, site = HookPoint("late"), Site(module)
    site.add(tap, point)
    site.add(Action(apply), point)

    def once(tensor: Tensor, hook: HookPoint) -> Tensor:
        listener.remove()
        return tensor + 100

    listener = point.add_hook(once)
    assert torch.equal(module(x), module.forward(x + 100))
    assert torch.equal(module(x), module.forward(x))
    assert is_bare(module)
