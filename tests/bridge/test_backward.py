"""Backward hooks see the gradients autograd gives, and what they return goes on upstream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT = 1e-5
"""Relative float32 error of a gradient through two layers, computed by two attention kernels."""


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def differentiable(bridge: Any) -> list[str]:
    """Every point that holds no ids."""
    return [name for name, point in bridge.registry.items() if point.axes != "batch pos"]


def hearing(fn: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """An edit by hand that leaves the value and puts `fn` on its gradient."""

    def edit(x: Tensor) -> Tensor:
        y = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        y.register_hook(fn)
        return y

    return edit


def gradients_by_hand(hand: Any, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:

        def keep(grad: Tensor, name: str = name) -> None:
            found[name] = grad.clone()

        with hand.editing(name, hearing(keep)):
            next_token_loss(hand.logits(ids), ids).backward()
    hand.model.zero_grad(set_to_none=True)
    return found


def parameter_gradients(model: nn.Module) -> Tensor:
    """All of them in one row, and gone from the model."""
    row = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    model.zero_grad(set_to_none=True)
    return row


def wrong_ones(
    byhand: Any, seen: Any, expected: dict[str, Tensor], suffix: str = ""
) -> dict[str, Any]:
    """Points whose gradients differ, or that only one side has."""
    gaps = {name: byhand.gap(seen[name + suffix], expected[name]) for name in expected}
    return {name: gap for name, gap in gaps.items() if gap > FLOAT}


# --- what is seen -----------------------------------------------------------------------------------------


def test_gradients_one_point_at_a_time(
    bridge: Any, model: nn.Module, hand: Any, byhand: Any, ids: Tensor
) -> None:
    """At every point, the gradient of the loss; listening for it moves no logit outside attention."""
    names = differentiable(bridge)
    expected = gradients_by_hand(hand, names, ids)
    plain = bridge(ids)
    seen: dict[str, Tensor] = {}
    moved = {}
    for name in names:

        def keep(grad: Tensor, hook: Any) -> None:
            assert hook.name not in seen, f"{hook.name} fired twice"
            seen[hook.name] = grad.clone()

        logits, loss = bridge.run_with_hooks(ids, return_type="both", bwd_hooks=[(name, keep)])
        loss.backward()
        gap = byhand.gap(logits, plain)
        if gap > (FLOAT if byhand.is_inside(name) else 0):
            moved[name] = gap
    model.zero_grad(set_to_none=True)
    assert set(seen) == set(expected) == set(names)
    assert not wrong_ones(byhand, seen, expected)
    assert not moved


def test_gradients_of_every_point_in_one_run(
    bridge: Any, model: nn.Module, hand: Any, byhand: Any, ids: Tensor
) -> None:
    """incl_bwd=True: the same gradients under <name>_grad, and no parameter knows of it.

    All points but each head's own input: listening there splits the way into the heads, so that what lies
    on the shared way is left without a gradient.
    """
    points = [name for name in bridge.registry if not name.endswith(tuple(byhand.HEAD_INPUTS))]
    held = [torch.ones_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), held, strict=True):
        p.grad = grad
    frozen = next(model.parameters()).requires_grad_(False)
    loss, cache = bridge.run_with_cache(ids, return_type="loss", incl_bwd=True, names_filter=points)
    for p, grad in zip(model.parameters(), held, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))
        assert p.requires_grad == (p is not frozen)
    frozen.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    assert byhand.gap(loss, next_token_loss(hand.logits(ids), ids)) < FLOAT
    names = [name for name in differentiable(bridge) if name in points]
    assert {key for key in cache if key.endswith("_grad")} == {f"{name}_grad" for name in names}
    assert {key for key in cache if not key.endswith("_grad")} == set(points)
    assert not wrong_ones(byhand, cache, gradients_by_hand(hand, names, ids), "_grad")
    assert not any(value.requires_grad for value in cache.values())


def test_frozen_model(bridge: Any, model: nn.Module, hand: Any, byhand: Any, ids: Tensor) -> None:
    """With every parameter frozen the same gradients arrive, and no .grad appears."""
    names = differentiable(bridge)
    expected = gradients_by_hand(hand, names, ids)
    seen: dict[str, Tensor] = {}
    bridge.requires_grad_(False)
    for name in names:

        def keep(grad: Tensor, hook: Any) -> None:
            seen[hook.name] = grad.clone()

        bridge.run_with_hooks(ids, return_type="loss", bwd_hooks=[(name, keep)]).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    bridge.requires_grad_(True)
    assert set(seen) == set(names)
    assert not wrong_ones(byhand, seen, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3"], indirect=True)
@pytest.mark.parametrize(
    "point",
    [
        "blocks.0.hook_out",
        "blocks.0.attn.q.hook_out",
        "blocks.0.attn.k.hook_in",
        "blocks.1.attn.v.hook_out",
        "blocks.0.attn.hook_attn_scores",
        "blocks.0.attn.hook_pattern",
        "blocks.1.attn.hook_z",
        "blocks.0.mlp.hook_post",
        "blocks.0.ln1.hook_normalized",
        "blocks.0.ln1.hook_scale",
        "blocks.0.attn.hook_result",
    ],
)
def test_finite_differences(bridge: Any, ids: Tensor, point: str) -> None:
    """A small step at the point changes the loss by step times gradient (in float64)."""
    bridge.to(torch.float64)
    seen: list[Tensor] = []
    bridge.run_with_hooks(
        ids, return_type="loss", bwd_hooks=[(point, lambda grad, hook: seen.append(grad))]
    ).backward()
    grad = seen[0]
    step = torch.randn(grad.shape, generator=torch.Generator().manual_seed(3), dtype=grad.dtype)
    with torch.no_grad():
        value = bridge.run_with_cache(ids, names_filter=point)[1][point]
    # Large enough for RMSNorm and rotary angles, which Hugging Face computes in float32 even here.
    size = 3e-3 * value[value.abs() < 1e30].abs().mean().item()

    def loss(sign: float) -> Any:
        with torch.no_grad():
            return bridge.run_with_hooks(
                ids,
                return_type="loss",
                fwd_hooks=[(point, lambda x, hook: x + sign * size * step.to(x.dtype))],
            ).item()

    def slope(times: float) -> Any:
        return (loss(times) - loss(-times)) / (2 * size * times)

    # Two step widths, so that the curvature of the loss cancels.
    found = (4 * slope(1) - slope(2)) / 3
    assert found == pytest.approx((grad * step).sum().item(), rel=1e-3, abs=1e-6)


# --- what is returned -------------------------------------------------------------------------------------


def bent(grad: Tensor) -> Tensor:
    return 0.5 * grad.roll(1, dims=1) - 0.25 * grad


@pytest.mark.parametrize("new", [torch.zeros_like, bent])
def test_returned_gradient_goes_upstream(
    bridge: Any,
    model: nn.Module,
    hand: Any,
    byhand: Any,
    ids: Tensor,
    new: Callable[[Tensor], Tensor],
) -> None:
    """A returned gradient replaces the one that goes on: every parameter's gradient, against the same by hand."""
    wrong = {}
    next_token_loss(hand.logits(ids), ids).backward()
    untouched = parameter_gradients(hand.model)
    idle = []
    for name in differentiable(bridge):
        with hand.editing(name, hearing(new)):
            next_token_loss(hand.logits(ids), ids).backward()
        expected = parameter_gradients(hand.model)
        bridge.run_with_hooks(
            ids, return_type="loss", bwd_hooks=[(name, lambda grad, hook: new(grad))]
        ).backward()
        gap = byhand.gap(parameter_gradients(model), expected)
        if gap > FLOAT:
            wrong[name] = gap
        if byhand.gap(expected, untouched) < 1e-3 and not name.startswith("rotary_emb"):
            idle.append(name)  # nothing upstream of cos and sin has a gradient
    assert not wrong
    assert not idle


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3"], indirect=True)
def test_gradient_of_an_edited_value(
    bridge: Any, model: nn.Module, byhand: Any, ids: Tensor
) -> None:
    """With a forward edit at the same point, the gradient is that of the edited value, and flows through it."""
    point = "blocks.1.hook_in"
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.0.hook_out")
    value = cache["resid_post", 0].clone().requires_grad_()
    doubled = value * 2
    doubled.retain_grad()
    next_token_loss(bridge(doubled, start_at_layer=1), ids).backward()
    model.zero_grad(set_to_none=True)
    seen: dict[str, Tensor] = {}

    def keep(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = grad.clone()

    bridge.run_with_hooks(
        ids,
        return_type="loss",
        fwd_hooks=[(point, lambda x, hook: x * 2)],
        bwd_hooks=[(point, keep), ("blocks.0.hook_out", keep)],
    ).backward()
    model.zero_grad(set_to_none=True)
    assert doubled.grad is not None
    assert value.grad is not None
    assert byhand.gap(seen[point], doubled.grad) < FLOAT
    assert byhand.gap(seen["blocks.0.hook_out"], value.grad) < FLOAT


@pytest.mark.parametrize("family", ["gpt2", "phi3"], indirect=True)
def test_stopping_the_gradient_of_one_share(bridge: Any, model: nn.Module, ids: Tensor) -> None:
    """Zeroing q's gradient in a joint projection clears q's rows of the weight's gradient and no others."""
    h, kv, d = bridge.cfg.n_heads, bridge.cfg.n_key_value_heads, bridge.cfg.d_head
    path = {"gpt2": "transformer.h.0.attn.c_attn", "phi3": "model.layers.0.self_attn.qkv_proj"}
    joint: Any = model.get_submodule(path[bridge.cfg.model_type])
    bridge.run_with_hooks(
        ids, return_type="loss", bwd_hooks=[("blocks.0.attn.hook_q", lambda g, hook: g * 0)]
    ).backward()
    grad = joint.weight.grad.T if bridge.cfg.model_type == "gpt2" else joint.weight.grad
    q, k, v = grad.split([h * d, kv * d, kv * d])
    assert not q.any()
    assert k.any()
    assert v.any()


# --- lifetimes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_gradient_hooks_belong_to_the_runs_of_their_scope(bridge: Any, ids: Tensor) -> None:
    """They fire when a graph made inside is differentiated, also afterwards; later graphs know nothing of them."""
    calls: list[str] = []
    with bridge.hooks(bwd_hooks=[("blocks.0.hook_out", lambda g, hook: calls.append(hook.name))]):
        inside = bridge(ids, return_type="loss")
    outside = bridge(ids, return_type="loss")
    outside.backward()
    assert calls == []
    inside.backward()
    assert calls == ["blocks.0.hook_out"]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_reset_silences_gradient_hooks(bridge: Any, ids: Tensor) -> None:
    """reset_hooks before backward: hooks already on the graph stay quiet."""
    calls: list[str] = []
    bridge.add_hook("blocks.0.hook_out", lambda g, hook: calls.append(hook.name), dir="bwd")
    loss = bridge(ids, return_type="loss")
    bridge.reset_hooks()
    loss.backward()
    assert calls == []


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_requires_grad_survives_a_failing_incl_bwd(
    bridge: Any, model: nn.Module, ids: Tensor
) -> None:
    """A hook that raises in the middle of incl_bwd leaves requires_grad and .grad as they were."""
    for dir in ("fwd", "bwd"):

        def burst(x: Tensor, hook: Any) -> None:
            raise ZeroDivisionError

        with (
            pytest.raises(ZeroDivisionError),
            bridge.hooks(**{f"{dir}_hooks": [("blocks.0.hook_out", burst)]}),
        ):
            bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_padded_gradients(
    bridge: Any, model: nn.Module, hand: Any, byhand: Any, ids: Tensor
) -> None:
    """In a left-padded batch no gradient is NaN and the loss counts real predictions only."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    loss, cache = bridge.run_with_cache(
        ids, return_type="loss", incl_bwd=True, names_filter=lambda name: True, attention_mask=mask
    )
    assert not [name for name, value in cache.items() if value.isnan().any()]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = hand.logits(ids, attention_mask=mask, position_ids=positions)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    expected = torch.cat([losses[0, 3:], losses[1]]).mean()
    assert byhand.gap(loss, expected) < FLOAT
    assert not cache["blocks.0.hook_in_grad"][0, :3].any()
