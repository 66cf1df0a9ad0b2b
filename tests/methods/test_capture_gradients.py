"""capture_gradients and capture_backward_pre: what they yield is what torch.autograd.grad gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    AbsentPointError,
    GradientError,
    HookNotFiredError,
    InputError,
    UnknownPointError,
)
from lensbridge.methods import LensAPI, capture_backward_pre, capture_gradients


@pytest.fixture
def lens(llama: LensAPI) -> Iterator[LensAPI]:
    """A lens on a shared Llama that tests may freeze and differentiate."""
    yield llama
    llama.model.requires_grad_(True)
    llama.model.zero_grad()


@pytest.fixture
def model(lens: LensAPI) -> Any:
    return lens.model


def loss_of(model: Any, ids: Tensor, **given: Any) -> Tensor:
    return model(ids, **given).logits.square().mean()


def hidden_gradients(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """The gradient at each layer's input and behind the last norm, by hand."""
    out = model(ids, output_hidden_states=True)
    return torch.autograd.grad(out.logits.square().mean(), out.hidden_states)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Makes(nn.Module):
    """Returns whatever a function makes of its inputs."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["capture_gradients", "capture_backward_pre"])
@pytest.mark.parametrize(
    "target",
    ["model.layers.0", "blocks.0.hook_out", "blocks.0.hook_resid_post", "raw:model.layers.0"],
)
def test_by_name(lens: LensAPI, model: Any, ids: Tensor, capture: str, target: str) -> None:
    """A module's path, a point's name and its alias give the gradient of the layer's output."""
    with getattr(lens, capture)(target) as found:
        loss_of(model, ids).backward()
    assert [len(grads) for grads in found] == [1]
    torch.testing.assert_close(found[0][0], hidden_gradients(model, ids)[1])


@pytest.mark.parametrize("capture", [capture_gradients, capture_backward_pre])
def test_by_module_and_by_point(lens: LensAPI, model: Any, ids: Tensor, capture: Any) -> None:
    """Modules and hook points are taken as they are, without a bridge."""
    for target in (model.model.layers[0], lens.bridge.registry["blocks.0.hook_out"]):
        with capture(target) as found:
            loss_of(model, ids).backward()
        assert len(found) == 1
        torch.testing.assert_close(found[0][0], hidden_gradients(model, ids)[1])


def test_inputs_given_by_keyword(lens: LensAPI, model: Any, ids: Tensor) -> None:
    """Llama hands its attention the stream by keyword; that input's gradient is there."""
    seen: list[Tensor] = []
    norm = model.model.layers[1].input_layernorm
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(out))
    loss = loss_of(model, ids)
    handle.remove()
    (expected,) = torch.autograd.grad(loss, seen[0])
    for target in (model.model.layers[1].self_attn, "model.layers.1.self_attn"):
        with lens.capture_gradients(target, "input") as found:
            loss_of(model, ids).backward()
        assert len(found) == 1
        torch.testing.assert_close(found[0][0], expected)


def test_inputs_by_position_and_keyword() -> None:
    """Positional inputs come before keywords; a tensor that nothing depends on has None in its place."""
    module = Makes(lambda a, n, *, b, unused, c: n * a * b + c)
    a, b, c = leaf(2.0), leaf(3.0), leaf(5.0)
    with capture_gradients(module, "input") as found:
        module(a, 7, b=b, unused=leaf(1.0), c=c).sum().backward()
    assert [[None if g is None else g.item() for g in grads] for grads in found] == [
        [21, 14, None, 1]
    ]
    assert [a.grad.item(), b.grad.item(), c.grad.item()] == [21, 14, 1]


def test_input_of_a_projection(lens: LensAPI, model: Any, ids: Tensor) -> None:
    """The input of the output projection, as PyTorch's own hook on the module has it."""
    module = model.model.layers[0].self_attn.o_proj
    expected: list[Tensor] = []
    handle = module.register_full_backward_hook(lambda module, into, out: expected.append(into[0]))
    loss_of(model, ids).backward()
    handle.remove()
    with lens.capture_gradients(module, "input") as found:
        loss_of(model, ids).backward()
    torch.testing.assert_close(found[0][0], expected[0])


@pytest.mark.parametrize(
    "is_frozen",
    [
        True,
        False,
    ],
)
def test_input_that_others_read_too(
    lens: LensAPI, model: Any, ids: Tensor, is_frozen: bool
) -> None:
    """The gradient at an input is what comes through that module, whether the model is frozen or not."""
    module = model.model.layers[1].input_layernorm
    expected: list[Tensor] = []
    handle = module.register_full_backward_hook(lambda module, into, out: expected.append(into[0]))
    loss_of(model, ids).backward()
    handle.remove()
    model.requires_grad_(not is_frozen)
    with lens.capture_gradients(module, "input") as found:
        loss_of(model, ids).backward()
    torch.testing.assert_close(found[0][0], expected[0])


def test_a_module_that_returns_its_input() -> None:
    """The gradient at an output is what comes back to it, not what goes past the module."""
    module, x = nn.Identity(), leaf(1.0) * 3
    with capture_gradients(module) as found:
        (5 * x + 2 * module(x)).backward()
    assert found[0][0].item() == 2


def test_attention_weights_that_go_nowhere(tiny: Callable[..., Any], ids: Tensor) -> None:
    """Where a module returns several tensors each has its place, None where no gradient arrives."""
    model = tiny("llama", attn_implementation="eager")
    module = model.model.layers[0].self_attn
    with capture_gradients(module) as found:
        out = model(ids, output_attentions=True)
        out.logits.square().mean().backward()
    (grads,) = found
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, out: kept.append(out[0]))
    loss = loss_of(model, ids)
    handle.remove()
    torch.testing.assert_close(grads[0], torch.autograd.grad(loss, kept[0])[0])
    assert grads[1] is None


def test_nothing_else_changes(lens: LensAPI, model: Any, ids: Tensor) -> None:
    """Logits and every parameter's gradient are the same with and without capturing."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(ids).logits
    expected = torch.autograd.grad(logits.square().mean(), parameters)
    layer = model.model.layers[0]
    with (
        lens.capture_gradients(layer.mlp, "input"),
        lens.capture_gradients(layer),
        lens.capture_gradients("blocks.1.attn.hook_z"),
        lens.capture_backward_pre("lm_head"),
    ):
        out = model(ids)
        out.logits.square().mean().backward()
    assert torch.equal(out.logits, logits)
    for name, parameter, grad in zip(names, parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, msg=name)


@pytest.mark.parametrize("site", ["output", "input"])
def test_frozen(lens: LensAPI, model: Any, ids: Tensor, site: str) -> None:
    """On a frozen model the graph starts at the module: the same gradient, and no parameter gets one."""
    module = model.model.layers[1].mlp
    with lens.capture_gradients(module, site) as expected:
        loss_of(model, ids).backward()
    model.zero_grad()
    model.requires_grad_(False)
    with lens.capture_gradients(module, site) as found:
        loss_of(model, ids).backward()
    assert len(found) == 1
    torch.testing.assert_close(found[0][0], expected[0][0])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_frozen_models_point(lens: LensAPI, model: Any, ids: Tensor) -> None:
    """The same at a hook point that no module's output is."""
    name = "blocks.1.attn.hook_pattern"
    with lens.capture_gradients(name) as expected:
        loss_of(model, ids).backward()
    model.zero_grad()
    model.requires_grad_(False)
    with lens.capture_gradients(name) as found:
        loss_of(model, ids).backward()
    assert expected[0][0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(found[0][0], expected[0][0])
    assert expected[0][0].any()


# --- how many -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["model.layers.0", "blocks.0.hook_out"])
def test_several_backward_passes(lens: LensAPI, model: Any, ids: Tensor, target: str) -> None:
    """Each backward pass through one run gives a tuple of its own."""
    with lens.capture_gradients(target) as found:
        logits = model(ids).logits
        logits.square().mean().backward(retain_graph=True)
        (3 * logits.square().mean()).backward(retain_graph=True)
        logits[..., 4].sum().backward()
    expected = hidden_gradients(model, ids)[1]
    out = model(ids, output_hidden_states=True)
    (last,) = torch.autograd.grad(out.logits[..., 4].sum(), out.hidden_states[1])
    assert len(found) == 3
    for grads, wanted in zip(found, (expected, 3 * expected, last), strict=True):
        torch.testing.assert_close(grads[0], wanted)


@pytest.mark.parametrize("target", ["model.layers.0", "blocks.0.hook_out"])
def test_several_runs(lens: LensAPI, model: Any, ids: Tensor, target: str) -> None:
    """Each run's gradient is a tuple of its own, also when they are differentiated together."""
    with lens.capture_gradients(target) as found:
        loss_of(model, ids[:1]).backward()
        loss_of(model, ids[1:]).backward()
        assert len(found) == 2
        (loss_of(model, ids[:1]) + loss_of(model, ids[1:])).backward()
    by_row = [hidden_gradients(model, row[None])[1] for row in ids]
    torch.testing.assert_close(found[0][0], by_row[0])
    torch.testing.assert_close(found[1][0], by_row[1])
    assert len(found) == 4
    # The run that was made last is differentiated first.
    torch.testing.assert_close(found[2][0], by_row[1])
    torch.testing.assert_close(found[3][0], by_row[0])


def test_a_module_called_twice() -> None:
    """Two calls in one run are two tuples, the last call's first."""
    square = Makes(torch.square)
    with capture_gradients(square, "input") as found:
        square(square(leaf(3.0))).backward()
    assert [grads[0].item() for grads in found] == [18, 108]


def test_several_tensors_of_one_call() -> None:
    """The gradients of one call are one tuple, in the order of the tensors, in each backward pass anew."""
    module = Makes(lambda x: (2 * x, 3 * x, "text", 4 * x))
    with capture_gradients(module) as found:
        a, b, _, c = module(leaf(1.0))
        (5 * c + 7 * a).backward(retain_graph=True)
        (a + b + c).backward(retain_graph=True)
        (2 * b).backward()
    assert [[None if g is None else g.item() for g in grads] for grads in found] == [
        [7, None, 5],
        [1, 1, 1],
        [None, 2, None],
    ]


def test_passes_through_different_tensors() -> None:
    """Two backward passes are two tuples, though they reach different outputs of the call."""
    module = Makes(lambda x: (2 * x, 3 * x))
    with capture_gradients(module) as found:
        a, b = module(leaf(1.0))
        (5 * a).backward()
        (7 * b).backward()
    assert [[None if g is None else g.item() for g in grads] for grads in found] == [
        [5, None],
        [None, 7],
    ]


@pytest.mark.parametrize("target", ["model.layers.0", "blocks.0.hook_out"])
def test_backward_after_the_block(lens: LensAPI, model: Any, ids: Tensor, target: str) -> None:
    """What was run inside may be differentiated after; what is run after is not looked at."""
    with lens.capture_gradients(target) as found:
        loss = loss_of(model, ids)
    assert not found
    loss.backward()
    loss_of(model, ids).backward()
    assert len(found) == 1
    torch.testing.assert_close(found[0][0], hidden_gradients(model, ids)[1])


def test_what_is_yielded_is_a_copy() -> None:
    """The gradients have no graph and their own memory, also of a graph that is differentiated twice."""
    cube, x = Makes(lambda x: x**3), leaf(2.0)
    with capture_gradients(cube, "input") as found:
        (first,) = torch.autograd.grad(cube(x), x, create_graph=True)
        found[0][0].zero_()
        assert first.item() == 12
        first.backward()
    assert not any(g.requires_grad for grads in found for g in grads)
    assert [grads[0].item() for grads in found] == [0, 12]


def test_checkpointing(tiny: Callable[..., Any], ids: Tensor) -> None:
    """With gradient checkpointing, which runs layers twice, a gradient is told once and is the same."""
    model = tiny("llama").train()
    module = model.model.layers[0].mlp
    with capture_gradients(module) as expected:
        loss_of(model, ids).backward()
    # The older name is deprecated in transformers 5.23 and the newer unknown to 5.2.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(enable for name in names if (enable := getattr(model, name, None)))(
        {"use_reentrant": False}
    )
    assert any(getattr(x, "gradient_checkpointing", False) for x in model.modules())
    with capture_gradients(module) as found:
        loss_of(model, ids).backward()
    assert len(expected) == len(found) == 1
    torch.testing.assert_close(found[0][0], expected[0][0])


# --- what is returned keeps its kind ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [lambda a, b: (a, b), lambda a, b: [a, b], Pair, lambda a, b: {"left": a, "right": b}],
    ids=["tuple", "list", "namedtuple", "dict"],
)
def test_kinds_of_outputs(kind: Callable[..., Any]) -> None:
    """Tuples, lists, named tuples and dictionaries come out as what they were."""
    module = Makes(lambda x: kind(2 * x, 3 * x))
    plain = module(leaf(1.0))
    with capture_gradients(module) as found:
        out = module(leaf(1.0))
        left, right = out.values() if isinstance(out, dict) else out
        (5 * left + 7 * right).backward()
    assert type(out) is type(plain)
    assert out == plain
    assert [g.item() for g in found[0]] == [5, 7]


def test_a_models_own_output(lens: LensAPI, model: Any, ids: Tensor) -> None:
    """The whole model's output is of its class, with its cache; the logits' gradient is the loss's own."""
    with lens.capture_gradients(model) as found:
        out = model(ids, use_cache=True)
        out.logits.square().mean().backward()
    plain = model(ids, use_cache=True)
    assert type(out) is type(plain)
    assert list(out) == list(plain)
    assert type(out.past_key_values) is type(plain.past_key_values)
    torch.testing.assert_close(found[0][0], 2 * plain.logits / plain.logits.numel())


def test_what_carries_no_gradient(lens: LensAPI, model: Any, ids: Tensor) -> None:
    """Ids are no place for gradients and are refused in the run; what is made of them has its gradient."""
    with (
        pytest.raises(GradientError, match="nothing at the input of Embedding is a floating-point"),
        lens.capture_gradients("model.embed_tokens", "input"),
    ):
        model(ids)
    with lens.capture_gradients("model.embed_tokens") as found:
        loss_of(model, ids).backward()
    torch.testing.assert_close(found[0][0], hidden_gradients(model, ids)[0])


@pytest.mark.parametrize("target", ["model.layers.0", "blocks.0.hook_out"])
def test_a_run_before_the_block(lens: LensAPI, model: Any, ids: Tensor, target: str) -> None:
    """Differentiating inside what was run before gives nothing, which is an error and no empty list."""
    loss = loss_of(model, ids)
    for capture in (lens.capture_gradients, lens.capture_backward_pre):
        with (
            pytest.raises(HookNotFiredError, match="run the forward pass there, not before"),
            capture(target),
        ):
            loss.backward(retain_graph=True)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1]),
        (torch.tensor([1]), "text"),
        {},
        *(x for x in (None, 3)),
    ],
)
def test_an_output_that_is_nothing(value: Any) -> None:
    """A module that returns no floating-point tensor has nothing to capture: refused in the run."""
    module = Makes(lambda x: value)
    with pytest.raises(GradientError, match="output of Makes"), capture_gradients(module):
        module(leaf(1.0))


@pytest.mark.parametrize("site", ["output", "input"])
def test_no_hook_is_left_on_a_callers_tensor(site: str) -> None:
    """A leaf that the caller owns is not listened at itself; its own gradient is what it would be."""
    module, x = Makes(lambda x: x), leaf(1.0, 2.0)
    with capture_gradients(module, site) as found:
        (3 * module(x) + 4 * x).sum().backward()
    assert not x._backward_hooks
    assert found[0][0].tolist() == [3, 3]
    assert x.grad.tolist() == [7, 7]


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["bogus", "Output", ""])
def test_wrong_sides(lens: LensAPI, model: Any, site: str, unchecked: None) -> None:
    """A side is output or input, at a module and by name; a hook point has none."""
    for target in (model.lm_head, "lm_head"):
        with (
            pytest.raises(InputError, match=f"site must be 'output' or 'input', got '{site}'"),
            lens.capture_gradients(target, site),
        ):
            pass
    for side in (site, "input"):
        with (
            pytest.raises(InputError, match=f"is one tensor and has no '{side}'"),
            lens.capture_gradients("blocks.0.hook_out", side),
        ):
            pass


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", ["model.layers.0", "blocks.0.hook_out"])
def test_gradients_disabled(
    lens: LensAPI, model: Any, ids: Tensor, target: str, mode: Callable[[], Any]
) -> None:
    """A run under no_grad cannot be differentiated: it is refused, rather than leaving the list empty."""
    for capture in (lens.capture_gradients, lens.capture_backward_pre):
        with pytest.raises(GradientError, match="gradients are disabled"), mode(), capture(target):
            model(ids)
    with (
        pytest.raises(GradientError, match="gradients are disabled"),
        mode(),
        lens.capture_gradients("model.layers.0", "input"),
    ):
        model(ids)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("model.layerz.0", UnknownPointError, "no hook point is called 'model.layerz.0'"),
        ("blocks.0.hook_outt", UnknownPointError, "nearest: blocks.0.hook_out"),
        ("blocks.0.attn.q_norm.hook_out", AbsentPointError, "this model has no point"),
        ("blocks.*.hook_out", InputError, "names 2 points; give one"),
    ],
)
def test_names_that_lead_nowhere(
    lens: LensAPI, target: str, error: type[Exception], message: str
) -> None:
    """A wrong name is refused on entering, the nearest listed; so is one that means several points."""
    for capture in (lens.capture_gradients, lens.capture_backward_pre, lens.capture_kwargs_hook):
        with pytest.raises(error, match=message), capture(target):
            pass


def test_a_name_needs_a_model(unchecked: None) -> None:
    """Without a bridge a name says nothing; what is neither module nor name is refused."""
    for capture in (capture_gradients, capture_backward_pre):
        with pytest.raises(InputError, match="say in which model, as bridge="), capture("lm_head"):
            pass
        with (
            pytest.raises(InputError, match="a module, a hook point or a name, got int"),
            capture(3),
        ):
            pass


def test_paths_in_a_compiled_model(tiny: Callable[..., Any], ids: Tensor) -> None:
    """A compiled model's modules have the paths they have without compiling."""
    model = torch.compile(tiny("llama"), backend="eager")
    # Run as it is: the checks of argument types that these tests add cannot be compiled.
    with torch.compiler.set_stance("force_eager"):
        for target in ("model.layers.0", "blocks.0.hook_out"):
            with LensAPI(model).capture_gradients(target) as found:
                loss_of(model, ids).backward()
            torch.testing.assert_close(found[0][0], hidden_gradients(model._orig_mod, ids)[1])
