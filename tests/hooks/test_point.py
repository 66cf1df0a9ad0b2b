"""HookPoint inside a hand-made module: identity, listeners, edits, gradients, lifetimes."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge.hooks import (
    GradientError,
    HookPoint,
    HookRegistry,
    HookValueError,
    InputError,
    Listener,
)


def double(tensor: Tensor, hook: HookPoint) -> Tensor:
    """Twice the value."""
    return 2 * tensor


def add_one(tensor: Tensor, hook: HookPoint) -> Tensor:
    """The value and one."""
    return tensor + 1


def triple(tensor: Tensor, hook: HookPoint) -> None:
    """Three times the value, in place."""
    tensor.mul_(3)


def noted(calls: list[str], name: str) -> Callable[[Tensor, HookPoint], None]:
    """A hook that writes its name down."""
    return lambda tensor, hook: calls.append(name)


def build_net() -> nn.Sequential:
    """first -> mid (a point) -> act -> second -> end (a point), in float64."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("first", nn.Linear(3, 4, dtype=torch.float64))
        net.add_module("mid", HookPoint())
        net.add_module("act", nn.Tanh())
        net.add_module("second", nn.Linear(4, 2, dtype=torch.float64))
        net.add_module("end", HookPoint())
    HookRegistry.from_module(net)
    return net


@pytest.fixture
def net() -> Any:
    """A fresh net whose points are named after their paths."""
    return build_net()


@pytest.fixture
def x() -> Tensor:
    """Input of the net, [5, 3]."""
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(net: Any, x: Tensor, edit: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
    """What the net computes when `edit` is applied where the point sits."""
    return net.second(torch.tanh(edit(net.first(x))))


# --- identity and forward edits -----------------------------------------------------------------------------


def test_unheard_point_returns_the_very_tensor() -> None:
    """With nobody listening the point hands back the object it was given."""
    tensor = torch.ones(3)
    assert HookPoint("a")(tensor) is tensor


def test_from_module_names_points_after_their_paths(net: Any) -> None:
    """The registry holds the module's own points under their paths, in order."""
    registry = HookRegistry.from_module(net)
    assert list(registry.items()) == [("mid", net.mid), ("end", net.end)]
    assert (net.mid.name, net.end.name) == ("mid", "end")


def test_from_module_names_nested_points_by_full_path(net: Any) -> None:
    """A point two modules down is named by the whole path, and can be called by it."""
    outer = nn.ModuleDict({"blocks": nn.ModuleList([net])})
    assert list(HookRegistry.from_module(outer)) == ["blocks.0.mid", "blocks.0.end"]
    assert net.mid.layer() == 0


def test_listener_that_returns_none_sees_the_value_and_leaves_it(net: Any, x: Tensor) -> None:
    """Reading: the value is the one by hand, the output is bit-equal, the hook argument is the point."""
    seen: list[tuple[Tensor, HookPoint]] = []
    clean = net(x)
    net.mid.add_hook(lambda tensor, hook: seen.append((tensor, hook)))
    assert torch.equal(net(x), clean)
    assert torch.equal(seen[0][0], net.first(x))
    assert seen[0][1] is net.mid
    assert len(seen) == 1


def test_returned_tensor_replaces_the_value(net: Any, x: Tensor) -> None:
    """Writing: everything after the point is computed from what the hook returned."""
    net.mid.add_hook(double)
    assert torch.equal(net(x), by_hand(net, x, lambda h: 2 * h))
    assert not torch.equal(net(x), by_hand(net, x))


def test_in_place_edit_without_return_is_noticed() -> None:
    """A hook that edits in place and returns nothing counts as having written."""
    point = HookPoint("a")
    point.add_hook(triple)
    value = torch.ones(2)
    fired = point.fire(value)
    assert fired is value
    assert value.tolist() == [3.0, 3.0]


def test_fire_is_none_when_nobody_wrote() -> None:
    """Hooks that only look make `fire` answer None, so that nothing is put back."""
    point = HookPoint("a")
    point.add_hook(lambda tensor, hook: None)
    assert point.fire(torch.ones(2)) is None


def test_in_place_edit_reaches_the_rest_of_the_net(net: Any, x: Tensor) -> None:
    """The edit is what the following modules see."""
    net.mid.add_hook(triple)
    with torch.no_grad():
        assert torch.equal(net(x), by_hand(net, x, lambda h: h * 3))


def test_in_place_edit_of_one_row_only(net: Any, x: Tensor) -> None:
    """Indexed assignment, the way tutorials ablate, works without a return."""

    def ablate(tensor: Tensor, hook: HookPoint) -> None:
        tensor[1] = 0.0

    net.mid.add_hook(ablate)
    with torch.no_grad():
        out = net(x)
        hidden = net.first(x)
        hidden[1] = 0.0
        assert torch.equal(out, net.second(torch.tanh(hidden)))


# --- several listeners --------------------------------------------------------------------------------------


def test_listeners_are_called_in_the_order_they_came_and_each_sees_the_last_value() -> None:
    """(x * 2) + 1, not (x + 1) * 2."""
    point = HookPoint("a")
    point.add_hook(double)
    point.add_hook(add_one)
    assert point(torch.tensor([1.0, 5.0])).tolist() == [3.0, 11.0]


def test_prepend_puts_a_listener_first() -> None:
    """(x + 1) * 2 when the later one is prepended."""
    point = HookPoint("a")
    point.add_hook(double)
    point.add_hook(add_one, prepend=True)
    assert point(torch.tensor([1.0, 5.0])).tolist() == [4.0, 12.0]


def test_a_looker_between_two_editors_sees_the_first_edit_only() -> None:
    """Listeners that look see the value as edited so far."""
    point, seen = HookPoint("a"), []
    point.add_hook(double)
    point.add_hook(lambda tensor, hook: seen.append(tensor.clone()))
    point.add_hook(add_one)
    assert point(torch.tensor([1.0])).tolist() == [3.0]
    assert [t.tolist() for t in seen] == [[2.0]]


def test_same_function_twice_is_two_listeners() -> None:
    """Adding a function again applies it again; removing one leaves the other."""
    point = HookPoint("a")
    first = point.add_hook(double)
    point.add_hook(double)
    assert point(torch.tensor(1.0)).item() == 4.0
    first.remove()
    assert point(torch.tensor(1.0)).item() == 2.0


def test_observer_return_is_ignored() -> None:
    """A listener that promised only to look changes nothing by returning."""
    point = HookPoint("a")
    point.add_hook(double, observes=True)
    assert point.fire(torch.ones(1)) is None


def test_listener_removed_by_itself_while_firing() -> None:
    """A one-shot hook acts once; its neighbours still act in that very call and afterwards."""
    point = HookPoint("a")
    held: list[Listener] = []

    def once(tensor: Tensor, hook: HookPoint) -> Tensor:
        held[0].remove()
        return tensor * 10

    held.append(point.add_hook(once))
    point.add_hook(add_one)
    assert point(torch.tensor(1.0)).item() == 11.0
    assert point(torch.tensor(1.0)).item() == 2.0


def test_remove_twice_is_harmless() -> None:
    """Listener.remove is idempotent and leaves others alone."""
    point = HookPoint("a")
    gone, stays = point.add_hook(double), point.add_hook(add_one)
    gone.remove()
    gone.remove()
    assert point.fwd == (stays,)


def test_fired_tells_whether_it_was_called() -> None:
    """`fired` is False until the point is passed."""
    point = HookPoint("a")
    listener = point.add_hook(double)
    assert listener.fired is False
    point(torch.ones(1))
    assert listener.fired is True


# --- removal, permanence, levels ----------------------------------------------------------------------------


def layered() -> tuple[HookPoint, dict[str, Listener]]:
    """One point with every combination of direction, permanence and level 0 or 1."""
    point = HookPoint("a")
    held = {
        f"{direction}{'!' if permanent else ''}{level}": point.add_hook(
            double, direction, is_permanent=permanent, level=level
        )
        for direction in ("fwd", "bwd")
        for permanent in (False, True)
        for level in (0, 1)
    }
    return point, held


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({}, "fwd!0 fwd!1 bwd0 bwd1 bwd!0 bwd!1"),
        ({"dir": "fwd"}, "fwd!0 fwd!1 bwd0 bwd1 bwd!0 bwd!1"),
        ({"dir": "bwd"}, "fwd0 fwd1 fwd!0 fwd!1 bwd!0 bwd!1"),
        ({"dir": "both"}, "fwd!0 fwd!1 bwd!0 bwd!1"),
        ({"dir": "both", "including_permanent": True}, ""),
        ({"dir": "fwd", "including_permanent": True}, "bwd0 bwd1 bwd!0 bwd!1"),
        ({"dir": "both", "level": 1}, "fwd0 fwd!0 fwd!1 bwd0 bwd!0 bwd!1"),
        (
            {"dir": "fwd", "level": 0, "including_permanent": True},
            "fwd1 fwd!1 bwd0 bwd1 bwd!0 bwd!1",
        ),
        ({"dir": "both", "level": 2, "including_permanent": True}, "*"),
    ],
)
def test_remove_hooks_takes_exactly_what_was_asked(asked: dict[str, Any], left: str) -> None:
    """Direction, permanence and level select independently; what goes is cancelled, what stays is not."""
    point, held = layered()
    point.remove_hooks(**asked)
    staying = set(held) if left == "*" else set(left.split())
    assert {name for name, x in held.items() if x in (*point.fwd, *point.bwd)} == staying
    assert {name for name, x in held.items() if not x.cancelled} == staying


@pytest.mark.parametrize(
    ("kept", "asked", "answer"),
    [
        ("fwd0", {}, True),
        ("fwd0", {"dir": "fwd"}, True),
        ("fwd0", {"dir": "bwd"}, False),
        ("bwd0", {"dir": "bwd"}, True),
        ("fwd!0", {"including_permanent": False}, False),
        ("fwd!0", {"including_permanent": True}, True),
        ("fwd1", {"level": 1}, True),
        ("fwd1", {"level": 0}, False),
    ],
)
def test_has_hooks(kept: str, asked: dict[str, Any], answer: bool) -> None:
    """has_hooks asks with the same three selectors."""
    point, held = layered()
    for name, listener in held.items():
        if name != kept:
            listener.remove()
    assert point.has_hooks(**asked) is answer


def test_no_hooks_has_none() -> None:
    """A fresh point has no hooks in any direction."""
    assert HookPoint("a").has_hooks() is False


def test_permanent_hook_survives_reset_and_goes_when_asked(net: Any, x: Tensor) -> None:
    """`reset` leaves permanent hooks acting, `reset(including_permanent=True)` does not."""
    registry = HookRegistry.from_module(net)
    net.mid.add_perma_hook(double)
    net.mid.add_hook(add_one)
    registry.reset()
    assert torch.equal(net(x), by_hand(net, x, lambda h: 2 * h))
    registry.reset(including_permanent=True)
    assert torch.equal(net(x), by_hand(net, x))


# --- context, layer, repr -----------------------------------------------------------------------------------


def test_context_carries_notes_between_calls_until_cleared() -> None:
    """ctx is one dictionary per point; clear_context empties that dictionary."""
    point, other = HookPoint("a"), HookPoint("b")

    def count(tensor: Tensor, hook: HookPoint) -> None:
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1

    point.add_hook(count)
    point(torch.ones(1))
    point(torch.ones(1))
    assert (point.ctx, other.ctx) == ({"n": 2}, {})
    held = point.ctx
    point.clear_context()
    assert held == {}
    assert point.ctx is held


@pytest.mark.parametrize(
    ("name", "layer"),
    [("blocks.3.attn.hook_out", 3), ("blocks.11.hook_in", 11), ("decoder.blocks.0.hook_out", 0)],
)
def test_layer_is_read_from_the_name(name: str, layer: int) -> None:
    """The first number of the path."""
    assert HookPoint(name).layer() == layer


@pytest.mark.parametrize("name", ["embed.hook_out", "q4.hook_out", None])
def test_layer_of_a_point_outside_layers_is_an_error(name: str | None) -> None:
    """No layer is made up; the message names the point."""
    with pytest.raises(InputError, match=str(name)):
        HookPoint(name).layer()


def test_reprs_name_point_and_function() -> None:
    """What the debugger shows is what the author would look for."""
    point = HookPoint("a.hook_out", axes="batch pos")
    assert repr(point) == "HookPoint('a.hook_out', [batch pos])"
    assert repr(point.add_hook(double)).startswith(f"Listener(double ({__file__}:")
    assert "Listener(double" in repr(point.add_hook(functools.partial(double)))


# --- copies and files ---------------------------------------------------------------------------------------


def through_file(module: nn.Module) -> Any:
    """torch.save and torch.load."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    through_file,
    lambda module: pickle.loads(pickle.dumps(module)),
]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "torch.save", "pickle"])
def test_copy_carries_the_name_and_no_listeners(
    net: Any, x: Tensor, copied: Callable[[Any], Any]
) -> None:
    """A copy computes the clean function; the original keeps its (unpicklable) listeners and notes."""
    clean = net(x)
    net.eval()
    net.mid.add_hook(lambda tensor, hook: tensor * 2)
    net.mid.add_hook(lambda grad, hook: None, "bwd")
    net.mid.ctx["note"] = lambda: None
    twin = copied(net)
    assert torch.equal(twin(x), clean)
    assert (twin.mid.name, twin.mid.has_hooks(), twin.mid.ctx) == ("mid", False, {})
    assert twin.mid.training is False
    assert torch.equal(net(x), by_hand(net, x, lambda h: 2 * h))
    assert list(net.mid.ctx) == ["note"]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "torch.save", "pickle"])
def test_hooks_on_a_copy_leave_the_original_alone(
    net: Any, x: Tensor, copied: Callable[[Any], Any]
) -> None:
    """Copy and original share no state."""
    twin = copied(net)
    twin.mid.add_hook(double)
    assert torch.equal(twin(x), by_hand(net, x, lambda h: 2 * h))
    assert torch.equal(net(x), by_hand(net, x))
    assert net.mid.has_hooks() is False


def test_copy_keeps_aliases_axes_and_default() -> None:
    """Everything that describes the place survives."""
    twin = copy.deepcopy(HookPoint("a", ("b", "c"), axes="batch pos", is_default=False))
    assert (twin.name, twin.aliases, twin.axes, twin.is_default) == (
        "a",
        ("b", "c"),
        "batch pos",
        False,
    )


def test_a_point_adds_nothing_to_the_state_dict(net: Any) -> None:
    """Points own no weights, so checkpoints do not change."""
    net.mid.add_hook(double)
    assert list(net.state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]


# --- unfit values -------------------------------------------------------------------------------------------


def shrink(tensor: Tensor, hook: HookPoint) -> Tensor:
    """A wrong shape."""
    return tensor[:1]


def to_half(tensor: Tensor, hook: HookPoint) -> Tensor:
    """A wrong dtype."""
    return tensor.half()


def to_meta(tensor: Tensor, hook: HookPoint) -> Tensor:
    """A wrong device."""
    return tensor.to("meta")


@pytest.mark.parametrize(
    ("fn", "got"),
    [
        (shrink, "[1, 4] torch.float64 on cpu"),
        (to_half, "[5, 4] torch.float16 on cpu"),
        (to_meta, "[5, 4] torch.float64 on meta"),
    ],
)
def test_unfit_tensor_is_refused_with_the_whole_story(
    net: Any, x: Tensor, fn: Callable[[Tensor, HookPoint], Tensor], got: str
) -> None:
    """The message names the point, the function and its file, what came and what was expected."""
    net.mid.add_hook(fn)
    with pytest.raises(HookValueError) as caught:
        net(x)
    message = str(caught.value)
    line = inspect.getsourcelines(fn)[1]
    for part in ("'mid'", f"{fn.__name__} ({__file__}:{line})", got, "[5, 4] torch.float64 on cpu"):
        assert part in message


@pytest.mark.parametrize("value", [0, False, 3.5, [1.0], "text", (torch.ones(1),)])
def test_unfit_type_is_refused(value: Any) -> None:
    """Even a falsy value is not mistaken for None."""
    point = HookPoint("blocks.0.hook_in")
    point.add_hook(lambda tensor, hook: value)
    with pytest.raises(
        HookValueError, match=rf"'blocks.0.hook_in' returned {type(value).__name__}"
    ):
        point(torch.ones(2))


def test_hook_value_error_is_a_type_error() -> None:
    """`except TypeError` catches it."""
    point = HookPoint("a")
    point.add_hook(lambda tensor, hook: 1)
    with pytest.raises(TypeError):
        point(torch.ones(2))


@pytest.mark.parametrize("thing", [None, 3, "double", torch.ones(1)])
def test_hook_that_cannot_be_called_is_refused_at_once(thing: Any) -> None:
    """Nothing is attached; the message names the point and the type."""
    point = HookPoint("a.b")
    with pytest.raises(InputError, match=rf"'a.b' must be callable, got {type(thing).__name__}"):
        point.add_hook(thing)
    assert not point.has_hooks()


@pytest.mark.parametrize("direction", ["forward", "", "both"])
def test_unknown_direction_is_refused(direction: str) -> None:
    """A listener has one of two directions."""
    point = HookPoint("a.b")
    with pytest.raises(InputError, match=rf"dir must be .*{direction!r} at 'a.b'"):
        point.add_hook(double, direction)
    assert not point.has_hooks()


@pytest.mark.parametrize("method", [HookPoint.remove_hooks, HookPoint.has_hooks])
def test_unknown_direction_is_no_silent_no(method: Callable[..., Any]) -> None:
    """Asking about, or removing, a direction that does not exist is an error and removes nothing."""
    point = HookPoint("a.b")
    point.add_hook(double)
    with pytest.raises(InputError, match="'forward'"):
        method(point, "forward")
    assert point.has_hooks()


def test_error_inside_a_hook_arrives_as_it_is(net: Any, x: Tensor) -> None:
    """The user's exception is not wrapped."""

    def fail(tensor: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError("mine")

    net.mid.add_hook(fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        net(x)


# --- gradients ----------------------------------------------------------------------------------------------


def hidden_gradient(net: Any, x: Tensor) -> Tensor:
    """d sum(out^2) / d hidden, by hand."""
    hidden = net.first(x).detach().requires_grad_()
    return torch.autograd.grad((net.second(torch.tanh(hidden)) ** 2).sum(), hidden)[0]


def test_gradient_seen_is_the_gradient_by_hand(net: Any, x: Tensor) -> None:
    """A bwd listener sees d loss / d value; the parameters' gradients do not change."""
    (net(x) ** 2).sum().backward()
    clean = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    seen: list[Tensor] = []
    net.mid.add_hook(lambda grad, hook: seen.append(grad), "bwd")
    (net(x) ** 2).sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], hidden_gradient(net, x))
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, clean[name]), name


def test_returned_gradient_goes_upstream(net: Any, x: Tensor) -> None:
    """Upstream weights get the product of the edited gradient, downstream weights their own."""
    net.mid.add_hook(lambda grad, hook: -3 * grad, "bwd")
    (net(x) ** 2).sum().backward()
    edited = -3 * hidden_gradient(net, x)
    torch.testing.assert_close(net.first.weight.grad, edited.T @ x)
    torch.testing.assert_close(net.first.bias.grad, edited.sum(0))
    out = by_hand(net, x)
    torch.testing.assert_close(net.second.weight.grad, (2 * out).T @ torch.tanh(net.first(x)))


def test_gradient_listeners_chain_in_order(net: Any, x: Tensor) -> None:
    """The second sees what the first returned; the upstream gradient is the last word."""
    seen: list[Tensor] = []
    net.mid.add_hook(lambda grad, hook: grad * 2, "bwd")
    net.mid.add_hook(lambda grad, hook: seen.append(grad), "bwd")
    net.mid.add_hook(lambda grad, hook: torch.zeros_like(grad), "bwd")
    (net(x) ** 2).sum().backward()
    torch.testing.assert_close(seen[0], 2 * hidden_gradient(net, x))
    assert torch.equal(net.first.weight.grad, torch.zeros_like(net.first.weight))


def test_forward_edit_and_gradient_together(net: Any, x: Tensor) -> None:
    """The gradient is that of the edited value, and flows through the edit."""
    seen: list[Tensor] = []
    net.mid.add_hook(double)
    net.mid.add_hook(lambda grad, hook: seen.append(grad), "bwd")
    (net(x) ** 2).sum().backward()
    hidden = (2 * net.first(x)).detach().requires_grad_()
    wanted = torch.autograd.grad((net.second(torch.tanh(hidden)) ** 2).sum(), hidden)[0]
    torch.testing.assert_close(seen[0], wanted)
    torch.testing.assert_close(net.first.bias.grad, 2 * wanted.sum(0))


def test_frozen_model_still_shows_its_gradient(net: Any, x: Tensor) -> None:
    """With no parameter and no input in the graph, the listener starts one."""
    wanted = hidden_gradient(net, x)
    net.requires_grad_(False)
    seen: list[Tensor] = []
    net.mid.add_hook(lambda grad, hook: seen.append(grad), "bwd")
    (net(x) ** 2).sum().backward()
    torch.testing.assert_close(seen[0], wanted)
    assert x.grad is None
    assert x.requires_grad is False


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_listener_without_gradients_is_an_error(
    net: Any, x: Tensor, mode: Callable[[], Any]
) -> None:
    """Instead of never firing, it says which point and why."""
    net.mid.add_hook(lambda grad, hook: None, "bwd")
    with mode(), pytest.raises(GradientError, match="'mid': gradients are disabled"):
        net(x)


def test_gradient_of_integers_is_an_error() -> None:
    """Token ids carry no gradient; the message names dtype and point."""
    point = HookPoint("embed.hook_in")
    point.add_hook(lambda grad, hook: None, "bwd")
    with pytest.raises(GradientError, match=r"'embed.hook_in'.*torch.int64"):
        point(torch.arange(3))


def test_complex_values_have_gradients() -> None:
    """A complex tensor's gradient is seen: d |z|^2 / d z* convention gives 2z."""
    point, seen = HookPoint("a"), []
    point.add_hook(lambda grad, hook: seen.append(grad), "bwd")
    z = torch.tensor([1 + 2j, -3j])
    (point(z).abs() ** 2).sum().backward()
    torch.testing.assert_close(seen[0], 2 * z)


def test_no_hook_stays_on_the_users_leaf() -> None:
    """A leaf passed in gets its gradient, the listener fires once, later graphs of the leaf are not heard."""
    point, seen = HookPoint("a"), []
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    point.add_hook(lambda grad, hook: seen.append(grad.clone()), "bwd")
    (point(leaf) ** 2).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [2.0, 4.0]
    assert [grad.tolist() for grad in seen] == [[2.0, 4.0]]
    assert not leaf._backward_hooks
    (leaf * 5).sum().backward()
    assert len(seen) == 1


def test_edited_gradient_of_a_leaf_reaches_the_leaf() -> None:
    """Returning a gradient changes leaf.grad by that factor."""
    point = HookPoint("a")
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    point.add_hook(lambda grad, hook: grad * 10, "bwd")
    (point(leaf) ** 2).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [20.0, 40.0]


def test_removed_listener_stays_quiet_on_an_old_graph(net: Any, x: Tensor) -> None:
    """Removed between forward and backward: not called, nothing edited; its neighbour still is."""
    calls: list[str] = []

    def shout(grad: Tensor, hook: HookPoint) -> Tensor:
        calls.append("gone")
        return grad * 100

    gone = net.mid.add_hook(shout, "bwd")
    net.mid.add_hook(noted(calls, "stays"), "bwd")
    loss = (net(x) ** 2).sum()
    gone.remove()
    loss.backward()
    assert calls == ["stays"]
    torch.testing.assert_close(net.first.bias.grad, hidden_gradient(net, x).sum(0))


def test_reset_silences_gradient_listeners_on_an_old_graph(net: Any, x: Tensor) -> None:
    """`remove_hooks("bwd")` cancels what is already on a graph."""
    calls: list[str] = []
    net.mid.add_hook(noted(calls, "a"), "bwd")
    loss = net(x).sum()
    net.mid.remove_hooks("bwd")
    loss.backward()
    assert calls == []


def test_closed_scope_still_hears_its_own_graph_and_no_other(net: Any, x: Tensor) -> None:
    """Gradient hooks of a scope belong to the graphs made inside it."""
    registry = HookRegistry.from_module(net)
    seen: list[Tensor] = []
    with registry.hooks(bwd_hooks=[("mid", lambda grad, hook: seen.append(grad))]):
        loss = (net(x) ** 2).sum()
    assert not net.mid.has_hooks()
    loss.backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], hidden_gradient(net, x))
    (net(x) ** 2).sum().backward()
    assert len(seen) == 1


def test_unfit_gradient_is_refused(net: Any, x: Tensor) -> None:
    """A gradient of the wrong shape is reported like a value of the wrong shape."""
    net.mid.add_hook(lambda grad, hook: grad[:2], "bwd")
    loss = net(x).sum()
    with pytest.raises(HookValueError, match=r"'mid' returned \[2, 4\].*\[5, 4\]"):
        loss.backward()


def test_gradient_observer_changes_nothing(net: Any, x: Tensor) -> None:
    """What a gradient observer returns is ignored, and it counts as fired."""
    listener = net.mid.add_hook(lambda grad, hook: grad * 100, "bwd", observes=True)
    (net(x) ** 2).sum().backward()
    assert listener.fired
    torch.testing.assert_close(net.first.bias.grad, hidden_gradient(net, x).sum(0))


def test_two_points_get_their_own_gradients(net: Any, x: Tensor) -> None:
    """Backward order is the reverse of forward order, each with its own gradient."""
    seen: list[tuple[str | None, Tensor]] = []
    for point in (net.mid, net.end):
        point.add_hook(lambda grad, hook: seen.append((hook.name, grad)), "bwd")
    out = net(x)
    (out**2).sum().backward()
    assert [name for name, _ in seen] == ["end", "mid"]
    assert torch.equal(seen[0][1], 2 * out.detach())
    torch.testing.assert_close(seen[1][1], hidden_gradient(net, x))
