"""capture_kwargs_hook: the keywords a module is called with, seen and changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import HookPoint, HookValueError, InputError, LensError
from lensbridge.methods import LensAPI, capture_kwargs_hook

ATTENTION = "model.layers.1.self_attn"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def called_with(model: Any, ids: Tensor, change: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """The model's logits with other keywords for one attention, by a plain PyTorch hook; and what it was given."""
    seen: list[dict[str, Any]] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append(dict(kwargs))
        return args, change(dict(kwargs))

    handle = model.get_submodule(ATTENTION).register_forward_pre_hook(before, with_kwargs=True)
    try:
        return model(ids).logits, seen[0]
    finally:
        handle.remove()


def is_same(one: Any, other: Any) -> bool:
    """Equality of keywords."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one is other or type(one) is type(other)


@pytest.mark.parametrize("target", [ATTENTION, "blocks.1.attn.hook_out", "blocks.1.attn.hook_in"])
def test_keywords_are_seen(llama: LensAPI, ids: Tensor, target: str) -> None:
    """By module path or by a point of the module, the keywords are those a PyTorch hook sees; nothing changes."""
    logits, expected = called_with(llama.model, ids)
    with llama.capture_kwargs_hook(target) as found:
        assert torch.equal(llama.model(ids).logits, logits)
    (given,) = found
    assert list(given) == list(expected)
    assert {"hidden_states", "position_embeddings", "attention_mask"} <= set(given)
    for name, value in expected.items():
        assert is_same(given[name], value), name


def test_by_module_and_by_point(llama: LensAPI, ids: Tensor) -> None:
    """Modules and hook points are taken as they are; each call adds one dictionary."""
    for target in (
        llama.model.get_submodule(ATTENTION),
        llama.bridge.registry["blocks.1.attn.hook_out"],
    ):
        with capture_kwargs_hook(target) as found:
            for row in ids:
                llama.model(row[None])
        assert [given["hidden_states"].shape for given in found] == [(1, 9, 64)] * 2
        assert not torch.equal(found[0]["hidden_states"], found[1]["hidden_states"])


def test_every_point_has_a_module(llama: LensAPI, ids: Tensor) -> None:
    """At every point of a model, inside attention too, the module there is found and called."""
    for name in llama.bridge.registry:
        with llama.capture_kwargs_hook(name) as found:
            llama.model(ids)
        assert len(found) == 1, name


def shift_stream(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "hidden_states": given["hidden_states"].roll(1, 1)}


def swap_angles(given: dict[str, Any]) -> dict[str, Any]:
    cos, sin = given["position_embeddings"]
    return {**given, "position_embeddings": (cos, -sin)}


def look_everywhere(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "attention_mask": torch.zeros(2, 1, 9, 9)}


@pytest.mark.parametrize("is_in_place", [True, False])
@pytest.mark.parametrize("change", [shift_stream, swap_angles, look_everywhere])
def test_keywords_are_changed(
    llama: LensAPI, ids: Tensor, change: Callable[..., Any], is_in_place: bool
) -> None:
    """What modify returns, or makes of its dictionary, is what the module gets; kept are the old ones."""
    untouched, original = called_with(llama.model, ids)
    expected, _ = called_with(llama.model, ids, change)

    def modify(given: dict[str, Any]) -> Any:
        if not is_in_place:
            return change(given)
        given.update(change(given))
        return None

    with llama.capture_kwargs_hook(ATTENTION, modify) as found:
        changed = llama.model(ids).logits
    assert torch.equal(changed, expected)
    assert not torch.allclose(changed, untouched, atol=1e-3)
    assert all(is_same(found[0][name], value) for name, value in original.items())
    assert torch.equal(llama.model(ids).logits, untouched)


def test_as_the_module_called_by_hand(llama: LensAPI, ids: Tensor) -> None:
    """The module's output inside the model is what calling it with the changed keywords gives."""
    module, outputs = llama.model.get_submodule(ATTENTION), []
    handle = module.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    try:
        with llama.capture_kwargs_hook(module, look_everywhere) as found:
            llama.model(ids)
    finally:
        handle.remove()
    given = {**look_everywhere(found[0]), "past_key_values": None}
    assert torch.equal(outputs[0], module(**given)[0])


def test_keywords_are_taken_away_and_added() -> None:
    """The dictionary that is returned is all the module gets; positional arguments stay."""

    class Sees(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    module = Sees()
    with capture_kwargs_hook(module, lambda given: {"b": 2}) as found:
        assert module(0, a=1) == ((0,), {"b": 2})
        assert module(0) == ((0,), {"b": 2})
    assert found == [{"a": 1}, {}]
    with capture_kwargs_hook(module, lambda given: given.clear()) as found:
        assert module(a=1) == ((), {})
    assert found == [{"a": 1}]
    assert module(a=1) == ((), {"a": 1})


def test_with_gradients(llama: LensAPI, ids: Tensor) -> None:
    """A keyword that is scaled scales the gradient that goes through it."""
    norm = llama.model.model.layers[1].input_layernorm
    halve = lambda given: {**given, "hidden_states": given["hidden_states"] * 0.5}  # noqa: E731
    with torch.enable_grad(), llama.capture_kwargs_hook(ATTENTION, halve):
        with (
            llama.capture_gradients(norm) as outside,
            llama.capture_gradients(f"{ATTENTION}", "input") as inside,
        ):
            loss = llama.model(ids).logits.square().mean()
        grads = torch.autograd.grad(loss, list(norm.parameters()))
    assert grads[0].any()
    torch.testing.assert_close(outside[0][0], 0.5 * inside[0][0])


@pytest.mark.parametrize("wrong", [3, [], "text"])
def test_what_is_no_dictionary(llama: LensAPI, ids: Tensor, wrong: Any, unchecked: None) -> None:
    """Anything else returned from modify is refused in the run."""
    message = f"modify returned {type(wrong).__name__}; return a dictionary"
    with (
        pytest.raises(HookValueError, match=message),
        llama.capture_kwargs_hook(ATTENTION, lambda given: wrong),
    ):
        llama.model(ids)


def test_a_name_needs_a_model() -> None:
    """Without a bridge a name says nothing."""
    with pytest.raises(InputError, match="say in which model"), capture_kwargs_hook("lm_head"):
        pass


def test_a_point_without_a_module() -> None:
    """A hook point that sits at no module is refused."""
    with pytest.raises(LensError), capture_kwargs_hook(HookPoint()):
        pass
