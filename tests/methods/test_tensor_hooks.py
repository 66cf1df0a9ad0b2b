"""tensor_grad_hook and autograd_node_hook: gradients of one tensor, and what an operation passes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import GradientError, HookNotFiredError, InputError, UnknownPointError
from lensbridge.methods import LensAPI, autograd_node_hook, tensor_grad_hook


@pytest.fixture
def lens(llama: LensAPI) -> Iterator[LensAPI]:
    """A lens on a shared Llama that tests may freeze and differentiate."""
    yield llama
    llama.model.requires_grad_(True)
    llama.model.zero_grad()


def gradient_of_first_layer(model: Any, ids: Tensor) -> Tensor:
    """By hand."""
    out = model(ids, output_hidden_states=True)
    return torch.autograd.grad(out.logits.square().mean(), out.hidden_states[1])[0]


# --- one tensor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_given", [lambda x: x, lambda x: lambda: x], ids=["tensor", "function"])
def test_a_tensors_gradients(as_given: Callable[[Tensor], Any]) -> None:
    """Each backward pass adds one gradient; the tensor keeps the last as .grad, and no hook."""
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    x = a * 3
    with tensor_grad_hook(as_given(x)) as found:
        (x**2).sum().backward(retain_graph=True)
        assert [g.tolist() for g in found] == [[6, 12]]
        (5 * x).sum().backward(retain_graph=True)
    assert [g.tolist() for g in found] == [[6, 12], [5, 5]]
    assert x.grad.tolist() == [11, 17]  # PyTorch adds up
    x.sum().backward()
    assert len(found) == 2


def test_without_retaining() -> None:
    """retain_grad=False leaves the tensor's .grad as it is."""
    x = torch.tensor([1.0, 2.0], requires_grad=True) * 3
    with tensor_grad_hook(x, retain_grad=False) as found:
        (x**2).sum().backward()
    assert found[0].tolist() == [6, 12]
    assert not x.retains_grad


def test_a_leaf() -> None:
    """A parameter is a tensor too; it is left without a hook."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with tensor_grad_hook(x) as found:
        (x**2).sum().backward()
    assert found[0].tolist() == x.grad.tolist() == [2, 4]
    assert not x._backward_hooks


def test_hidden_states(lens: LensAPI, ids: Tensor) -> None:
    """A model's hidden state, from an output that was kept, has the gradient autograd gives."""
    out = lens.model(ids, output_hidden_states=True)
    with lens.tensor_grad_hook(lambda: out.hidden_states[1]) as found:
        out.logits.square().mean().backward()
    torch.testing.assert_close(found[0], gradient_of_first_layer(lens.model, ids))
    assert torch.equal(out.hidden_states[1].grad, found[0])


@pytest.mark.parametrize("is_frozen", [False, True])
def test_by_name(lens: LensAPI, ids: Tensor, is_frozen: bool) -> None:
    """Of a point the run comes inside the block; a frozen model has the gradient too, after the block as well."""
    expected = gradient_of_first_layer(lens.model, ids)
    lens.model.requires_grad_(not is_frozen)
    for target in ("blocks.0.hook_out", "blocks.0.hook_resid_post"):
        with lens.tensor_grad_hook(target) as found:
            loss = lens.model(ids).logits.square().mean()
            loss.backward(retain_graph=True)
        loss.backward()
        assert len(found) == 2
        for grad in found:
            torch.testing.assert_close(grad, expected)
    assert not is_frozen or all(p.grad is None for p in lens.model.parameters())


@pytest.mark.parametrize("hook", [tensor_grad_hook, autograd_node_hook])
def test_points_are_taken_without_a_bridge(lens: LensAPI, ids: Tensor, hook: Any) -> None:
    """A HookPoint says where it is."""
    with hook(lens.bridge.registry["blocks.0.hook_out"]) as found:
        lens.model(ids).logits.square().mean().backward()
    first = found[0] if isinstance(found[0], Tensor) else found[0][0]
    torch.testing.assert_close(first, gradient_of_first_layer(lens.model, ids))


@pytest.mark.parametrize("hook", ["tensor_grad_hook", "autograd_node_hook"])
def test_a_run_before_the_block(lens: LensAPI, ids: Tensor, hook: str) -> None:
    """Of a point, differentiating inside what was run before gives nothing: an error and no empty list."""
    loss = lens.model(ids).logits.square().mean()
    with pytest.raises(HookNotFiredError), getattr(lens, hook)("blocks.0.hook_out"):
        loss.backward()


@pytest.mark.parametrize("tensor", [torch.ones(2), torch.ones(2, dtype=torch.long)])
def test_tensors_without_a_graph(tensor: Tensor) -> None:
    """No gradient reaches a tensor without a graph: refused on entering."""
    for target in (tensor, lambda: tensor):
        with (
            pytest.raises(GradientError, match=r"shape \[2\] has no graph"),
            tensor_grad_hook(target),
        ):
            pass


@pytest.mark.parametrize("value", [None, 3, [torch.ones(1, requires_grad=True)]])
def test_functions_that_give_no_tensor(value: Any, unchecked: None) -> None:
    """A function that has nothing to give yet is refused; the message says to run first."""
    with (
        pytest.raises(
            InputError, match=f"gave {type(value).__name__}, not a tensor: run the forward"
        ),
        tensor_grad_hook(lambda: value),
    ):
        pass


def test_gradients_disabled(lens: LensAPI, ids: Tensor) -> None:
    """A point looked at under no_grad says so in the run."""
    for hook in (lens.tensor_grad_hook, lens.autograd_node_hook):
        with pytest.raises(GradientError), torch.no_grad(), hook("blocks.0.hook_out"):
            lens.model(ids)


# --- one operation ------------------------------------------------------------------------------------------


def test_what_an_operation_passes_on() -> None:
    """One gradient for each input of the operation, None in the place of one that needs none."""
    a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    for product, expected in (
        (a * b, [15, 10]),
        (a * b.detach(), [15, None]),
        (a.detach() * b, [None, 10]),
    ):
        with autograd_node_hook(product) as found:
            (5 * product).backward(retain_graph=True)
            product.backward(retain_graph=True)
        values = [[None if g is None else g.item() for g in grads] for grads in found]
        assert values == [expected, [None if g is None else g / 5 for g in expected]]
        product.backward()
        assert len(found) == 2


def test_the_stream_passes_on_the_same_twice(lens: LensAPI, ids: Tensor) -> None:
    """A layer's output is a sum: what reaches it goes to the stream and to the MLP alike."""
    expected = gradient_of_first_layer(lens.model, ids)
    with lens.autograd_node_hook("blocks.0.hook_out") as found:
        lens.model(ids).logits.square().mean().backward()
    (grads,) = found
    assert len(grads) == 2
    for grad in grads:
        torch.testing.assert_close(grad, expected)


def test_several_passes_and_runs(lens: LensAPI, ids: Tensor) -> None:
    """Each backward pass of each run made inside adds a tuple, also after the block."""
    with lens.autograd_node_hook("blocks.0.hook_out") as found:
        first = lens.model(ids).logits.square().mean()
        first.backward(retain_graph=True)
        second = lens.model(ids).logits.square().mean()
    (3 * first).backward()
    second.backward()
    torch.testing.assert_close(found[1][0], 3 * found[0][0])
    torch.testing.assert_close(found[2][0], found[0][0])
    assert len(found) == 3


@pytest.mark.parametrize("requires_grad", [True, False])
def test_leaves(requires_grad: bool) -> None:
    """What no operation made has no operation to listen at."""
    leaf = torch.ones(2, requires_grad=requires_grad)
    with (
        pytest.raises(InputError, match=r"shape \[2\] was made by no differentiable operation"),
        autograd_node_hook(leaf),
    ):
        pass


def test_a_frozen_models_operations(lens: LensAPI, ids: Tensor) -> None:
    """A frozen model's operations pass nothing on: the run says so, and what to use instead."""
    lens.model.requires_grad_(False)
    with (
        pytest.raises(
            GradientError,
            match=r"'blocks\.0\.hook_out' was computed without a graph.*capture_gradients",
        ),
        lens.autograd_node_hook("blocks.0.hook_out"),
    ):
        lens.model(ids)


@pytest.mark.parametrize("hook", ["tensor_grad_hook", "autograd_node_hook"])
def test_what_is_no_tensor(lens: LensAPI, hook: str) -> None:
    """A module's path, and a name that leads nowhere, are no tensors."""
    with (
        pytest.raises(
            InputError, match="'lm_head' is a module, not a tensor; use capture_gradients"
        ),
        getattr(lens, hook)("lm_head"),
    ):
        pass
    with (
        pytest.raises(UnknownPointError, match=r"nearest: blocks\.0\.hook_out"),
        getattr(lens, hook)("blocks.0.hook_outt"),
    ):
        pass
    with (
        pytest.raises(InputError, match="say in which model"),
        globals()[hook]("blocks.0.hook_out"),
    ):
        pass


# --- all five -----------------------------------------------------------------------------------------------

FIVE = [
    "capture_gradients",
    "capture_backward_pre",
    "capture_kwargs_hook",
    "tensor_grad_hook",
    "autograd_node_hook",
]


@pytest.mark.parametrize("when", ["before", "in", "after"])
@pytest.mark.parametrize("hook", FIVE)
def test_errors_leave_nothing(
    lens: LensAPI, ids: Tensor, hook: str, when: str, snapshot: Any, is_silent: Any
) -> None:
    """An error in the block, before a run, inside or after it, comes through and no hook stays behind."""
    before = snapshot(lens.model)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    targets: list[Any] = ["blocks.0.hook_out"]
    if hook.startswith("capture"):
        targets += ["model.layers.0", lens.model.model.layers[0]]

    def inside() -> None:
        if when == "in":
            handle = lens.model.model.layers[1].register_forward_pre_hook(fail)
            try:
                lens.model(ids)
            finally:
                handle.remove()
        if when == "after":
            lens.model(ids)
        fail()

    for target in targets:
        with pytest.raises(ZeroDivisionError), getattr(lens, hook)(target):
            inside()
        assert snapshot(lens.model) == before
        assert is_silent(lens.bridge)


def test_an_error_on_a_tensor_leaves_no_hook() -> None:
    """The same of tensors: what was set on them goes."""
    x = torch.tensor([1.0], requires_grad=True)
    y = x * 2
    for hook, target in ((tensor_grad_hook, x), (tensor_grad_hook, y), (autograd_node_hook, y)):
        with pytest.raises(ZeroDivisionError), hook(target) as found:
            raise ZeroDivisionError
        y.backward(retain_graph=True)
        assert not found
    assert not x._backward_hooks


def test_a_module_is_no_tensor() -> None:
    """It is refused, and the message says what to use for it."""
    with (
        pytest.raises(InputError, match=r"got Linear.*capture_gradients"),
        tensor_grad_hook(torch.nn.Linear(1, 1)),
    ):
        pass
