"""Writing at every point does what the same edit does by hand, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FLOAT = 5e-6
"""Relative float32 error of a few sums in another order."""


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def outside(byhand: Any) -> Callable[[str], bool]:
    """Every point that leaves the model's own kernels alone."""
    return lambda name: not byhand.is_inside(name)


def edit(bridge: Any, ids: Tensor, name: str, fn: Callable[[Tensor], Any], **given: Any) -> Tensor:
    return bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: fn(x))], **given)


def noisy(x: Tensor) -> Tensor:
    """Another value in every place: another token, another position, or noise of the value's own size."""
    if not x.is_floating_point():
        return (x * 3 + 1) % 60  # not a mere shift, which rotary positions do not feel
    # A masked score is -inf or the most negative number there is.
    finite = torch.where(x.abs() < 1e30, x, 0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    return x * 1.5 + noise * finite.abs().mean()


# --- every point ------------------------------------------------------------------------------------------


def test_own_value_changes_nothing(bridge: Any, byhand: Any, ids: Tensor) -> None:
    """Setting a point to what it already is leaves the logits: the same bits, or float error inside attention."""
    expected = bridge(ids)
    moved = {}
    for name in bridge.registry:
        error = byhand.gap(edit(bridge, ids, name, Tensor.clone), expected)
        if error > (FLOAT if byhand.is_inside(name) else 0):
            moved[name] = error
    assert not moved


def test_own_values_everywhere_at_once(bridge: Any, byhand: Any, ids: Tensor) -> None:
    """The same with every point written in one run."""
    clone = [(lambda name: not byhand.is_inside(name), lambda x, hook: x.clone())]
    assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=clone), bridge(ids))
    clone = [(lambda name: True, lambda x, hook: x.clone())]
    assert byhand.gap(bridge.run_with_hooks(ids, fwd_hooks=clone), bridge(ids)) < FLOAT


def test_every_point_fires_once(bridge: Any, ids: Tensor) -> None:
    """One forward, one call of the hook, with the point itself as its second argument."""
    for name, point in bridge.registry.items():
        calls: list[Any] = []

        def count(x: Tensor, hook: Any, calls: list[Any] = calls) -> None:
            calls.append(hook)

        bridge.run_with_hooks(ids, fwd_hooks=[(name, count)])
        assert len(calls) == 1, f"{name} fired {len(calls)} times"
        assert calls[0] is point


def test_every_edit_matters(bridge: Any, ids: Tensor) -> None:
    """A changed value changes the logits: a point whose edits go nowhere is no point."""
    expected = bridge(ids)
    idle = [
        name for name in bridge.registry if torch.equal(edit(bridge, ids, name, noisy), expected)
    ]
    assert not idle


def shifted(x: Tensor) -> Tensor:
    return x.roll(1, dims=1)


@pytest.mark.parametrize("fn", [torch.zeros_like, noisy])
def test_edit_is_the_edit_by_hand(
    bridge: Any, hand: Any, byhand: Any, ids: Tensor, fn: Callable[[Tensor], Tensor]
) -> None:
    """Zeros, the neighbour's value, or noise: the logits of the edit by hand, bit for bit where modules meet."""
    wrong = {}
    for name in bridge.registry:
        if fn is torch.zeros_like and name.endswith("hook_scale"):
            continue  # nothing can be divided by zero
        with hand.editing(name, fn):
            error = byhand.gap(edit(bridge, ids, name, fn), hand.logits(ids))
        # Inside attention an edit may make large scores, which magnify the last bit.
        if error > (0 if byhand.is_exact(name) else 2 * FLOAT):
            wrong[name] = error
    assert not wrong


def test_in_place_edit_is_the_returned_edit(bridge: Any, ids: Tensor) -> None:
    """Filling the tensor the hook was given does what returning a filled one does, and no more."""
    wrong, spoilt = set(), set()
    for name in bridge.registry:
        expected = edit(bridge, ids, name, noisy)
        for fn in (lambda x: x.copy_(noisy(x)), lambda x: [x.copy_(noisy(x)), None][1]):
            given = ids.clone()
            if not torch.equal(edit(bridge, given, name, fn), expected):
                wrong.add(name)
            if not torch.equal(given, ids):
                spoilt.add(name)
    assert not wrong
    assert not spoilt


def test_row_and_position_edits(bridge: Any, byhand: Any, ids: Tensor) -> None:
    """Editing one row of the batch leaves the logits of the other row alone, at every point."""
    expected = bridge(ids)

    def first_row(x: Tensor) -> Tensor:
        x = x.clone()
        x[0] = noisy(x[0])
        return x

    for name, point in bridge.registry.items():
        if name.startswith(("pos_embed", "rotary_emb")) or name.endswith("hook_scale"):
            continue  # shared by the batch
        assert point.axes.startswith("batch")
        logits = edit(bridge, ids, name, first_row)
        assert not torch.equal(logits[0], expected[0]), name
        if byhand.is_inside(name):
            assert byhand.gap(logits[1], expected[1]) < FLOAT, name
        else:
            assert torch.equal(logits[1], expected[1]), name


# --- joint projections ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["hook_in", "hook_out"])
def test_shares_are_separate(bridge: Any, ids: Tensor, side: str) -> None:
    """Editing q (its input or its output) changes q alone; so for k, v, gate and the ungated projection."""
    _, before = bridge.run_with_cache(ids)
    groups = [("attn", ("q", "k", "v")), ("mlp", ("gate", "in"))]
    for part, members in groups:
        present = [m for m in members if f"blocks.0.{part}.{m}.hook_out" in bridge.registry]
        for edited in present:
            point = f"blocks.0.{part}.{edited}.{side}"
            with bridge.hooks(fwd_hooks=[(point, lambda x, hook: noisy(x))]):
                _, cache = bridge.run_with_cache(ids)
            for other in present:
                name = f"blocks.0.{part}.{other}.hook_out"
                same = torch.equal(cache[name], before[name])
                assert same == (other != edited), f"{point} and {name}"
            assert not torch.equal(cache["resid_post", 0], before["resid_post", 0])


def test_all_shares_edited_together(bridge: Any, hand: Any, ids: Tensor) -> None:
    """q, k and v edited in one run, at their inputs and outputs: as the same six edits by hand."""
    names = [f"blocks.1.attn.{part}.hook_{side}" for part in "qkv" for side in ("in", "out")]
    edits = [(name, lambda x, hook: shifted(x) * 0.5) for name in names]
    logits = bridge.run_with_hooks(ids, fwd_hooks=edits)
    with ExitStack() as stack:
        # By hand, a joint module's inputs have to come before its outputs.
        for name in sorted(names, key=lambda n: n.endswith("out")):
            stack.enter_context(hand.editing(name, lambda x: shifted(x) * 0.5))
        assert torch.equal(logits, hand.logits(ids))


# --- the stream between attention and MLP -----------------------------------------------------------------

SEQUENTIAL = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox_sequential"]


@pytest.mark.parametrize("family", SEQUENTIAL, indirect=True)
def test_resid_mid_reaches_mlp_and_stream(bridge: Any, hand: Any, byhand: Any, ids: Tensor) -> None:
    """An edit of the stream is read by the MLP and added to by it."""
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_mid", lambda x, hook: noisy(x))]):
        _, cache = bridge.run_with_cache(ids, names_filter=outside(byhand))
    middle = noisy(hand.read("blocks.0.hook_resid_mid", ids))
    assert torch.equal(cache["resid_mid", 0], middle)
    assert torch.equal(cache["blocks.0.ln2.hook_in"], middle)
    added = hand.part("blocks.0.mlp")(hand.part("blocks.0.ln2")(middle))
    assert torch.equal(cache["mlp_out", 0], added)
    assert torch.equal(cache["resid_post", 0], middle + added)


@pytest.mark.parametrize("family", SEQUENTIAL, indirect=True)
def test_mlp_in_reaches_mlp_alone(bridge: Any, hand: Any, byhand: Any, ids: Tensor) -> None:
    """An edit of what the MLP reads (hook_mlp_in) leaves the stream it adds to."""
    _, before = bridge.run_with_cache(ids, names_filter=outside(byhand))
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_mlp_in", lambda x, hook: noisy(x))]):
        _, cache = bridge.run_with_cache(ids, names_filter=outside(byhand))
    assert torch.equal(cache["resid_mid", 0], before["resid_mid", 0])
    added = hand.part("blocks.0.mlp")(hand.part("blocks.0.ln2")(noisy(before["resid_mid", 0])))
    assert torch.equal(cache["resid_post", 0], before["resid_mid", 0] + added)


@pytest.mark.parametrize("family", SEQUENTIAL, indirect=True)
def test_resid_mid_in_every_layer_and_then_mlp_in(bridge: Any, hand: Any, ids: Tensor) -> None:
    """Edits of the stream in all layers, and of the MLP's input on top of one, compose."""
    logits = bridge.run_with_hooks(
        ids,
        fwd_hooks=[
            ("blocks.*.hook_resid_mid", lambda x, hook: shifted(x)),
            ("blocks.1.hook_resid_mid", lambda x, hook: x * 2),
        ],
    )
    with ExitStack() as stack:
        stack.enter_context(hand.editing("blocks.0.hook_resid_mid", shifted))
        stack.enter_context(hand.editing("blocks.1.hook_resid_mid", lambda x: shifted(x) * 2))
        assert torch.equal(logits, hand.logits(ids))
    both = bridge.run_with_hooks(
        ids,
        fwd_hooks=[
            ("blocks.1.hook_resid_mid", lambda x, hook: x * 2),
            ("blocks.1.hook_mlp_in", lambda x, hook: x + 1),
        ],
        stop_at_layer=2,
    )
    middle = hand.read("blocks.1.hook_resid_mid", ids) * 2
    added = hand.part("blocks.1.mlp")(hand.part("blocks.1.ln2")(middle + 1))
    assert torch.equal(both, middle + added)


# --- inside attention -------------------------------------------------------------------------------------


def test_eager_edits_take_effect(
    model: nn.Module, bridge: Any, hand: Any, byhand: Any, ids: Tensor
) -> None:
    """Where the model writes its attention out, edits inside it act as they do at the fused call."""
    model.set_attn_implementation("eager")
    for name in filter(byhand.is_inside, bridge.registry):
        logits = edit(bridge, ids, name, noisy)
        with hand.editing(name, noisy):
            assert byhand.gap(logits, hand.logits(ids)) < 2 * FLOAT, name


def test_ablating_one_head_by_pattern_is_ablating_its_z(
    bridge: Any, byhand: Any, ids: Tensor
) -> None:
    """A head that looks nowhere writes nothing: pattern, z and result agree."""

    def head_zero(dim: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.index_fill(dim, torch.tensor([2]), 0.0)

    z = edit(bridge, ids, "blocks.0.attn.hook_z", head_zero(2))
    pattern = edit(bridge, ids, "blocks.0.attn.hook_pattern", head_zero(1))
    result = edit(bridge, ids, "blocks.0.attn.hook_result", head_zero(2))
    assert byhand.gap(pattern, z) < FLOAT
    assert byhand.gap(result, z) < FLOAT
    assert byhand.gap(z, bridge(ids)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_a_hooks_own_attention_is_its_own_business(bridge: Any, byhand: Any, ids: Tensor) -> None:
    """A hook inside an opened layer may compute softmaxes and attention without being listened to."""
    calls: list[str] = []

    def meddle(x: Tensor, hook: Any) -> None:
        square = torch.randn(
            2, bridge.cfg.n_heads, 9, 9, generator=torch.Generator().manual_seed(0)
        )
        weights = torch.softmax(square, -1)
        weights @ torch.ones(2, bridge.cfg.n_heads, 9, 4)
        heads = torch.ones(2, bridge.cfg.n_heads, 9, 16)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    def count(x: Tensor, hook: Any) -> None:
        calls.append(hook.name)

    inside = [f"blocks.0.attn.hook_{what}" for what in ("attn_scores", "pattern")]
    around = [
        f"blocks.0.attn.{what}"
        for what in ("hook_in", "q.hook_in", "q.hook_out", "hook_z", "hook_out")
    ]
    with bridge.hooks(fwd_hooks=[(inside, count), ([*around, *inside], meddle)]):
        logits = bridge(ids)
    assert calls == inside
    assert byhand.gap(logits, bridge(ids)) < FLOAT


# --- listeners together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"], indirect=True)
def test_edits_chain_in_order(bridge: Any, hand: Any, ids: Tensor) -> None:
    """Each hook sees what the one before it returned; a recorder that comes later sees the last value."""
    name = "blocks.0.mlp.hook_post"
    point = bridge.get_hook_point(name)
    point.add_hook(lambda x, hook: x + 1)
    point.add_hook(lambda x, hook: x * 2)
    first = point.add_hook(lambda x, hook: x - 3, prepend=True)
    _, cache = bridge.run_with_cache(ids, names_filter=name)
    plain = hand.read("blocks.0.mlp.out.hook_in", ids)
    assert torch.equal(cache[name], (plain - 3 + 1) * 2)
    first.remove()
    _, cache = bridge.run_with_cache(ids, names_filter=name)
    assert torch.equal(cache[name], (plain + 1) * 2)
    bridge.reset_hooks()
    _, cache = bridge.run_with_cache(ids, names_filter=name)
    assert torch.equal(cache[name], plain)


def test_cached_values_survive_later_in_place_edits(bridge: Any, ids: Tensor) -> None:
    """What was recorded before a hook wrote into the tensor is what the point showed then."""
    names = ["blocks.0.hook_out", "blocks.1.hook_in"]
    _, before = bridge.run_with_cache(ids, names_filter=names)
    zero = [("blocks.1.hook_in", lambda x, hook: x.zero_())]
    with bridge.hooks(fwd_hooks=zero):
        _, cache = bridge.run_with_cache(ids, names_filter=names)
    assert torch.equal(cache["resid_post", 0], before["resid_post", 0])
    assert not cache["resid_pre", 1].any()


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_hugging_faces_own_records_see_the_edit(
    model: nn.Module, bridge: Any, hand: Any, ids: Tensor, order: str
) -> None:
    """output_hidden_states reports edited values, whoever put their hooks on the model first."""
    if order == "theirs first":
        model(ids, output_hidden_states=True)

    def run() -> Any:
        return bridge.original_model(ids, output_hidden_states=True)

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", lambda x, hook: shifted(x))]):
        out = run()
    with hand.editing("blocks.0.hook_out", shifted):
        expected = hand.model(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[1], expected.hidden_states[1])
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(run().logits, hand.logits(ids))


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"], indirect=True)
def test_the_users_own_pytorch_hooks_see_the_edit(
    bridge: Any, model: nn.Module, hand: Any, ids: Tensor
) -> None:
    """PyTorch hooks that were on a module first see what the bridge's made of its input and output, and stay."""
    path = hand.paths["layers"] + ".0." + hand.paths["mlp"]
    module = model.get_submodule(path)
    seen: list[Tensor] = []
    before = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    after = module.register_forward_hook(lambda m, args, output: seen.append(output.clone()))
    plain_in = hand.read("blocks.0.mlp.hook_in", ids)
    try:
        edits = [
            ("blocks.0.mlp.hook_in", lambda x, hook: x * 2),
            ("blocks.0.mlp.hook_out", shifted_hook),
        ]
        bridge.run_with_hooks(ids, fwd_hooks=edits)
        assert torch.equal(seen[0], plain_in * 2)
        assert torch.equal(seen[1], shifted(hand.part("blocks.0.mlp")(plain_in * 2)))
        bridge(ids)
        assert torch.equal(seen[2], plain_in)
        assert len(seen) == 4
    finally:
        before.remove()
        after.remove()


def shifted_hook(x: Tensor, hook: Any) -> Tensor:
    return shifted(x)
