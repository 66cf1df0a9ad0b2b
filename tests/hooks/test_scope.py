"""HookScope: what a `with` block added is gone after it, and a hook that never fired is reported."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge.hooks import (
    HookNotFiredError,
    HookPoint,
    HookRegistry,
    InputError,
    SelectionError,
    UnknownPointError,
)

PATHS = [f"blocks.{layer}.hook_out" for layer in range(3)]


class Net(nn.Module):
    """Three blocks, each adding one to its input and showing the result."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"hook_out": HookPoint()}) for _ in range(3)])

    def forward(self, x: Tensor, stop: int = 3, start: int = 0) -> Tensor:
        """Run blocks start..stop-1."""
        for block in list(self.blocks)[start:stop]:
            x = block["hook_out"](x + 1)
        return x


class Rig:
    """A net, its registry, and a way to run it."""

    def __init__(self) -> None:
        self.net = Net()
        self.registry = HookRegistry.from_module(self.net)

    def run(self, **kwargs: int) -> float:
        """Run from 0 and tell the open scopes, as a bridge does."""
        out = self.net(torch.tensor(0.0), **kwargs).item()
        stop = kwargs.get("stop", 3)
        for scope in self.registry.scopes:
            scope.note_run(None if stop == 3 else self.registry[PATHS[stop]])
        return out

    @property
    def heard(self) -> list[str]:
        """Names of points with listeners."""
        return [name for name, point in self.registry.items() if point.has_hooks()]


@pytest.fixture
def rig() -> Rig:
    """A fresh net."""
    rig = Rig()
    assert list(rig.registry) == PATHS
    return rig


def times_ten(tensor: Tensor, hook: HookPoint) -> Tensor:
    """Ten times the value."""
    return tensor * 10


def plus_half(tensor: Tensor, hook: HookPoint) -> Tensor:
    """Half more."""
    return tensor + 0.5


def look(tensor: Tensor, hook: HookPoint) -> None:
    """Nothing."""


# --- lifetime -----------------------------------------------------------------------------------------------


def test_hooks_act_inside_and_are_gone_after(rig: Rig) -> None:
    """((0 + 1) * 10 + 1) + 1 inside, 3 outside."""
    with rig.registry.hooks([(PATHS[0], times_ten)]):
        assert rig.run() == 12.0
        assert rig.heard == PATHS[:1]
    assert rig.heard == []
    assert rig.run() == 3.0


def test_nothing_is_attached_before_the_block(rig: Rig) -> None:
    """Making a scope changes nothing."""
    scope = rig.registry.hooks([(PATHS[0], times_ten)])
    assert rig.heard == []
    assert rig.run() == 3.0
    assert (scope in rig.registry.scopes, rig.registry.depth) == (False, 0)


def test_inner_scope_adds_to_the_outer_one(rig: Rig) -> None:
    """Outer hooks act first; leaving the inner scope leaves the outer hook."""
    with rig.registry.hooks([(PATHS[0], times_ten)]):
        with rig.registry.hooks([(PATHS[0], plus_half), (PATHS[1], times_ten)]):
            assert rig.run() == (10.5 + 1) * 10 + 1
        assert rig.heard == PATHS[:1]
        assert rig.run() == 12.0
    assert rig.heard == []


def test_hooks_from_outside_stay(rig: Rig) -> None:
    """A hook added by hand before, and one added inside, both outlive the scope."""
    rig.registry.add_hook(PATHS[0], times_ten)
    with rig.registry.hooks([(PATHS[0], plus_half)]):
        rig.registry.add_hook(PATHS[1], plus_half)
        assert rig.run() == (10.5 + 1 + 0.5) + 1
    assert rig.run() == 10 + 1 + 0.5 + 1
    rig.registry.reset()
    assert rig.heard == []


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_exception_in_the_body_removes_hooks_and_passes_through(
    rig: Rig, kind: type[BaseException]
) -> None:
    """Whatever is raised, nothing stays, the count of open scopes is right, and no second error covers it."""
    with (
        pytest.raises(kind),
        rig.registry.hooks([(PATHS[0], times_ten)], [(PATHS[1], look)]),
        rig.registry.hooks([(PATHS[1], look)]),
    ):
        raise kind
    assert (rig.heard, rig.registry.depth, rig.registry.scopes) == ([], 0, [])


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_exception_in_a_hook_removes_all_hooks(rig: Rig, kind: type[BaseException]) -> None:
    """The failing hook, and those that did not get their turn, are gone."""

    def fail(tensor: Tensor, hook: HookPoint) -> None:
        raise kind

    with pytest.raises(kind), rig.registry.hooks([(PATHS[0], fail), (PATHS[2], look)]):
        rig.run()
    assert rig.heard == []
    assert rig.run() == 3.0


def test_error_handled_inside_the_block_does_not_end_it(rig: Rig) -> None:
    """After a caught failure the hooks still act until the block ends."""
    with rig.registry.hooks([(PATHS[0], times_ten)]):
        with pytest.raises(TypeError):
            rig.net("text")
        assert rig.run() == 12.0
    assert rig.heard == []


def test_levels_count_nesting(rig: Rig) -> None:
    """Listeners carry the depth of their scope, hooks added inside too; by level they can be removed."""
    registry, point = rig.registry, rig.registry[PATHS[0]]
    registry.add_hook(PATHS[0], look)
    with registry.hooks([(PATHS[0], look)]):
        registry.add_hook(PATHS[0], look)
        with registry.hooks([(PATHS[0], times_ten)]) as scope:
            scope.observe([point], look)
            assert [x.level for x in point.fwd] == [0, 1, 1, 2, 2]
            assert registry.depth == 2
            registry.reset(level=2)
            assert [x.level for x in point.fwd] == [0, 1, 1]
        assert registry.depth == 1
        rig.run()
    assert [x.level for x in point.fwd] == [0, 1]
    assert registry.depth == 0


def test_scopes_may_close_out_of_order(rig: Rig) -> None:
    """Each takes away its own hooks only."""
    first, second = (
        rig.registry.hooks([(PATHS[0], times_ten)]),
        rig.registry.hooks([(PATHS[0], plus_half)]),
    )
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert rig.run() == 3.5
    second.__exit__(None, None, None)
    assert (rig.heard, rig.registry.depth, rig.registry.scopes) == ([], 0, [])


def test_scope_used_again_acts_and_owes_again(rig: Rig) -> None:
    """A second use attaches the hooks again; that they fired the first time is no excuse."""
    scope = rig.registry.hooks([(PATHS[0], times_ten)])
    for _ in range(2):
        with scope:
            assert rig.run() == 12.0
        assert rig.heard == []
    with pytest.raises(HookNotFiredError), scope:
        rig.run(start=1)


# --- everything is resolved first ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fwd", "bwd", "error"),
    [
        ([(PATHS[0], look), ("nope", look)], [], UnknownPointError),
        ([(PATHS[0], look)], [("nope", look)], UnknownPointError),
        ([(PATHS[0], look), ("nope.*", look)], [], UnknownPointError),
        ([(PATHS[0], look), (5, look)], [], SelectionError),
        ([(PATHS[0], look), (PATHS[1], "look")], [], InputError),
        ([(PATHS[0], look), (PATHS[1], None)], [], InputError),
        ([(PATHS[0], look), PATHS[1]], [], InputError),
        ([(PATHS[0], look), (PATHS[1],)], [], InputError),
        ([(PATHS[0], look), (PATHS[1], look, "fwd")], [], InputError),
        ([look], [], InputError),
        ([], [None], InputError),
    ],
)
def test_one_wrong_pair_leaves_no_trace(
    rig: Rig, fwd: list[Any], bwd: list[Any], error: type[Exception]
) -> None:
    """The error comes before anything is attached or any scope is open."""
    with pytest.raises(error):
        rig.registry.hooks(fwd, bwd)
    assert (rig.heard, rig.registry.depth, rig.registry.scopes) == ([], 0, [])


def test_malformed_pair_is_shown(rig: Rig) -> None:
    """The message says what a hook is and what came."""
    with pytest.raises(
        InputError, match=r"a pair \(name or filter, function\), got 'blocks.0.hook_out'"
    ):
        rig.registry.hooks([PATHS[0]])
    with pytest.raises(
        InputError, match=r"function for 'blocks.0.hook_out' must be callable, got str"
    ):
        rig.registry.hooks([(PATHS[0], "look")])


def test_pairs_may_be_lists_points_or_filters(rig: Rig) -> None:
    """A point stands for itself, a filter for its points, None for all of them."""
    point = rig.registry[PATHS[0]]
    pairs: list[Any] = [[point, times_ten], ([PATHS[1], PATHS[2]], plus_half), (None, look)]
    with rig.registry.hooks(pairs):
        assert rig.run() == 10 + 1.5 + 1.5
        assert [len(p.fwd) for p in rig.registry.values()] == [2, 2, 2]


# --- did it fire? -------------------------------------------------------------------------------------------


def test_hook_that_never_fired_is_an_error_when_the_model_ran(rig: Rig) -> None:
    """A run that started later passes block 0 by; the message names function and point."""
    with (
        pytest.raises(
            HookNotFiredError, match=r"hook times_ten \(.*\) was set at blocks.0.hook_out"
        ),
        rig.registry.hooks([(PATHS[0], times_ten)]),
    ):
        rig.run(start=1)
    assert rig.heard == []


def test_hook_not_fired_is_a_runtime_error(rig: Rig) -> None:
    """`except RuntimeError` catches it."""
    with pytest.raises(RuntimeError), rig.registry.hooks([(PATHS[0], look)]):
        rig.run(start=1)


def test_no_run_owes_nothing(rig: Rig) -> None:
    """A block that never runs the model is fine."""
    with rig.registry.hooks([(PATHS[0], times_ten)]):
        pass
    assert rig.heard == []


def test_every_name_must_fire(rig: Rig) -> None:
    """That another hook fired is no excuse for a name."""
    with (
        pytest.raises(HookNotFiredError, match=r"blocks.0.hook_out"),
        rig.registry.hooks([(PATHS[2], look), (PATHS[0], look)]),
    ):
        rig.run(start=1)


@pytest.mark.parametrize("selection", ["blocks.*.hook_out", None, PATHS, lambda name: True])
def test_filter_that_fires_somewhere_is_fine(rig: Rig, selection: Any) -> None:
    """A filter need not fire at all its points."""
    with rig.registry.hooks([(selection, times_ten)]):
        assert rig.run(start=2) == 10.0


def test_filter_that_fires_nowhere_is_an_error(rig: Rig) -> None:
    """None of its points was passed."""
    with (
        pytest.raises(HookNotFiredError, match=r"blocks.0.hook_out, blocks.1.hook_out"),
        rig.registry.hooks([("blocks.[01].hook_out", look)]),
    ):
        rig.run(start=2)


def test_bare_module_call_counts_when_something_fired(rig: Rig) -> None:
    """Nobody told the scope of a run, but a hook fired, so the silent one is reported."""
    with (
        pytest.raises(HookNotFiredError, match=r"blocks.0.hook_out"),
        rig.registry.hooks([(PATHS[0], look), (PATHS[2], look)]),
    ):
        rig.net(torch.tensor(0.0), start=1)


def test_points_behind_a_stop_owe_nothing(rig: Rig) -> None:
    """Stopped at block 1, hooks at 1 and 2 need not fire."""
    with rig.registry.hooks([(PATHS[0], times_ten), (PATHS[1], look), (PATHS[2], look)]):
        assert rig.run(stop=1) == 10.0


def test_points_before_a_stop_still_owe(rig: Rig) -> None:
    """Stopped at block 2, a hook at block 0 that was passed by is reported."""
    with (
        pytest.raises(HookNotFiredError, match=r"blocks.0.hook_out"),
        rig.registry.hooks([(PATHS[0], look), (PATHS[2], look)]),
    ):
        rig.run(start=1, stop=2)


def test_filter_across_a_stop(rig: Rig) -> None:
    """Only its points before the stop are named as owing."""
    with pytest.raises(HookNotFiredError) as caught, rig.registry.hooks([(None, look)]):
        rig.run(start=1, stop=1)
    assert "set at blocks.0.hook_out and" in str(caught.value)


def test_earliest_of_several_stops_counts(rig: Rig) -> None:
    """Stops at 2 and at 1: block 1 owes nothing."""
    with rig.registry.hooks([(PATHS[1], look)]):
        rig.run(stop=1)
        rig.run(start=2, stop=2)


def test_error_in_the_body_is_not_covered_by_a_silent_hook(rig: Rig) -> None:
    """The user's exception wins over HookNotFiredError."""
    with pytest.raises(ZeroDivisionError), rig.registry.hooks([(PATHS[0], look)]):
        rig.run(start=1) / 0


def test_hook_removed_on_purpose_owes_nothing(rig: Rig) -> None:
    """Reset inside the block before the run: no complaint that it did not fire."""
    with rig.registry.hooks([(PATHS[0], times_ten)]):
        rig.registry.reset()
        assert rig.run() == 3.0


def test_outer_scope_hears_of_runs_in_the_inner_one(rig: Rig) -> None:
    """A run inside the inner scope is a run of the outer one."""
    outer = rig.registry.hooks([(PATHS[0], look)])
    with pytest.raises(HookNotFiredError), outer, rig.registry.hooks([(PATHS[2], look)]):
        rig.run(start=1)
    assert rig.heard == []


def test_backward_hooks_owe_nothing_at_the_end_of_the_block(rig: Rig) -> None:
    """The backward pass may come later."""
    seen: list[Tensor] = []
    with rig.registry.hooks(bwd_hooks=[(PATHS[1], lambda grad, hook: seen.append(grad))]):
        x = torch.tensor(2.0, requires_grad=True)
        loss = rig.net(x) ** 2
        rig.run()
    loss.backward()
    assert [grad.item() for grad in seen] == [10.0]


# --- observing ----------------------------------------------------------------------------------------------


def test_observers_see_and_cannot_write(rig: Rig) -> None:
    """They get each point's value, what they return is ignored, and they go with the scope."""
    seen: dict[str, float] = {}

    def store(tensor: Tensor, hook: HookPoint) -> Tensor:
        seen[str(hook.name)] = tensor.item()
        return tensor * 0

    with rig.registry.hooks() as scope:
        scope.observe(rig.registry.values(), store)
        assert rig.run() == 3.0
    assert seen == {PATHS[0]: 1.0, PATHS[1]: 2.0, PATHS[2]: 3.0}
    assert rig.heard == []


@pytest.mark.parametrize(
    ("must_fire", "points"), [(False, PATHS[:1]), (False, PATHS), (True, PATHS[1:])]
)
def test_observers_that_owe_nothing(rig: Rig, must_fire: bool, points: list[str]) -> None:
    """Silent observers are fine unless asked to fire; those asked are fine when they did."""
    with rig.registry.hooks() as scope:
        scope.observe([rig.registry[name] for name in points], look, must_fire=must_fire)
        rig.run(start=1)
    assert rig.heard == []


def test_observer_that_must_fire_at_every_point(rig: Rig) -> None:
    """Each point owes for itself."""
    scope = rig.registry.hooks()
    scope.__enter__()
    scope.observe(rig.registry.values(), look, must_fire=True)
    rig.run(start=1)
    with pytest.raises(HookNotFiredError, match=r"set at blocks.0.hook_out and"):
        scope.__exit__(None, None, None)
    assert rig.heard == []


# --- contexts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_contexts_are_cleared_when_asked(rig: Rig, clear: bool, fails: bool) -> None:
    """Only with clear_contexts, only of the scope's points, and also after a failure."""

    def note(tensor: Tensor, hook: HookPoint) -> None:
        hook.ctx["value"] = tensor.item()
        if fails:
            raise ZeroDivisionError

    rig.registry[PATHS[2]].ctx["mine"] = 1
    expected = pytest.raises(ZeroDivisionError) if fails else nullcontext()
    with expected, rig.registry.hooks([(PATHS[0], note)], clear_contexts=clear):
        rig.run()
    assert rig.registry[PATHS[0]].ctx == ({} if clear else {"value": 1.0})
    assert rig.registry[PATHS[2]].ctx == {"mine": 1}
