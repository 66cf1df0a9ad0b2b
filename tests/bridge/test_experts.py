"""Mixtures of experts: the router's scores, what it chooses, the experts, and what an edit of each does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensbridge import TransformerBridge

FLOAT = 5e-6

ROUTERS = {
    # name -> (the part with experts, its router), in the last layer
    "mixtral": ("mlp", "gate"),
    "olmoe": ("mlp", "gate"),
    "gpt_oss": ("mlp", "router"),
    "qwen2_moe": ("mlp", "gate"),
    "deepseek_v3": ("mlp", "gate"),
    "jamba": ("feed_forward", "router"),
    "granitemoe": ("block_sparse_moe", "router"),
}
SHARED = {"qwen2_moe": "shared_expert", "deepseek_v3": "shared_experts"}
PERMUTED = torch.tensor([2, 0, 3, 1])


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=sorted(ROUTERS))
def name(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def bridge(name: str, wrapped: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A bridge around a tiny model, shared; no test here leaves anything on it."""
    return wrapped(name)


@pytest.fixture
def model(bridge: TransformerBridge) -> nn.Module:
    """The model of `bridge`."""
    return bridge.original_model


@pytest.fixture
def home(name: str) -> str:
    """Path of the part with experts in the last layer."""
    return f"model.layers.1.{ROUTERS[name][0]}"


@pytest.fixture
def router(home: str, name: str) -> str:
    """Path of its router."""
    return f"{home}.{ROUTERS[name][1]}"


def scores_of(module: nn.Module, hidden: Tensor) -> Tensor:
    """Router logits by hand."""
    bias = module._parameters.get("bias")
    scores = hidden @ module.weight.T
    return scores if bias is None else scores + bias


def edit(bridge: TransformerBridge, ids: Tensor, name: str, fn: Callable[[Tensor], Any]) -> Any:
    return bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.1.mlp.{name}", lambda x, hook: fn(x))])


class Rerouted:
    """The bare model with other choices or weights handed to its experts."""

    def __init__(self, model: nn.Module, home: str) -> None:
        self.model = model
        self.experts = model.get_submodule(f"{home}.experts")

    def choices(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts are called with: which, and how much of each; [batch * pos, choice]."""
        seen: list[Any] = []
        handle = self.experts.register_forward_pre_hook(lambda m, args: seen.extend(args[1:3]))
        self.model(ids)
        handle.remove()
        return seen[0], seen[1]

    def logits(self, ids: Tensor, chosen: Any = None, weights: Any = None) -> Tensor:
        """The model's logits with what is given in place of its own."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            which = args[1] if chosen is None else chosen
            return (args[0], which, args[2] if weights is None else weights, *args[3:])

        handle = self.experts.register_forward_pre_hook(before)
        try:
            return self.model(ids).logits
        finally:
            handle.remove()


# --- what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 9), (1, 7), (3, 2), (4, 4)])
def test_logits_are_the_hidden_state_through_the_router(
    bridge: Any, model: nn.Module, home: str, router: str, plain: Any, shape: tuple[int, int]
) -> None:
    """router.hook_out is hidden @ W.T (+ b), a row of scores a token, whatever the batch."""
    ids = torch.randint(8, 160, shape, generator=torch.Generator().manual_seed(2))
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.mlp.**")
    hidden = plain.read(model, ids, f"{router}<")[f"{router}<"][0].view(*shape, -1)
    assert torch.equal(cache["blocks.1.mlp.router.hook_in"], hidden)
    scores = cache["blocks.1.mlp.router.hook_out"]
    assert scores.shape == (*shape, 4)
    assert plain.gap(scores, scores_of(model.get_submodule(router), hidden)) < FLOAT


def test_what_the_experts_get_and_make(
    bridge: Any, model: nn.Module, home: str, plain: Any, ids: Tensor
) -> None:
    """Choices, weights, input and output of the experts are the module's own, seen as [batch, pos, ...]."""
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.mlp.**")
    chosen, weights = Rerouted(model, home).choices(ids)
    assert torch.equal(cache["blocks.1.mlp.router.hook_experts"], chosen.view(2, 9, 2))
    assert torch.equal(cache["blocks.1.mlp.router.hook_weights"], weights.view(2, 9, 2))
    at = f"{home}.experts"
    seen = plain.read(model, ids, f"{at}<", at, home)
    assert torch.equal(cache["blocks.1.mlp.experts.hook_in"], seen[f"{at}<"][0].view(2, 9, -1))
    assert torch.equal(cache["blocks.1.mlp.experts.hook_out"], seen[at][0].view(2, 9, -1))
    assert torch.equal(cache["blocks.1.mlp.hook_out"], seen[home][0])


def test_choices_follow_from_the_scores(bridge: Any, ids: Tensor) -> None:
    """The chosen experts are those with the highest scores."""
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.mlp.router.*")
    best = cache["blocks.1.mlp.router.hook_out"].topk(2, dim=-1).indices
    chosen = cache["blocks.1.mlp.router.hook_experts"]
    assert torch.equal(chosen.sort(-1).values, best.sort(-1).values)


@pytest.mark.parametrize("name", ["mixtral"], indirect=True)
def test_experts_by_hand(bridge: Any, model: nn.Module, home: str, plain: Any, ids: Tensor) -> None:
    """Each token's output is the weighted sum of what its chosen experts make of it."""
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.mlp.**")
    experts: Any = model.get_submodule(f"{home}.experts")
    hidden = cache["blocks.1.mlp.experts.hook_in"]
    every = []
    for index in range(4):
        gate, up = F.linear(hidden, experts.gate_up_proj[index]).chunk(2, dim=-1)
        every.append(F.linear(F.silu(gate) * up, experts.down_proj[index]))
    chosen = cache["blocks.1.mlp.router.hook_experts"]
    own = torch.stack(every, dim=-2).gather(-2, chosen[..., None].expand(*chosen.shape, 64))
    total = (own * cache["blocks.1.mlp.router.hook_weights"][..., None]).sum(-2)
    assert plain.gap(cache["blocks.1.mlp.experts.hook_out"], total) < FLOAT


def test_positions_are_cut_as_elsewhere(bridge: Any, ids: Tensor) -> None:
    """pos_slice keeps positions of a value that the model holds flat."""
    names = ["blocks.1.mlp.router.hook_out", "blocks.1.mlp.experts.hook_out"]
    _, whole = bridge.run_with_cache(ids, names_filter=names)
    _, last = bridge.run_with_cache(ids, names_filter=names, pos_slice=[3, -1])
    for name in names:
        assert torch.equal(last[name], whole[name][:, [3, -1]])


# --- what is written ----------------------------------------------------------------------------------------


def test_own_values_change_nothing(bridge: Any, model: nn.Module, ids: Tensor) -> None:
    """Setting any point of the part to what it is leaves the logits' bits."""
    expected = model(ids).logits
    names = [n for n in bridge.registry if n.startswith("blocks.1.mlp.")]
    assert len(names) >= 8
    moved = [
        n
        for n in names
        if not torch.equal(
            edit(bridge, ids, n.removeprefix("blocks.1.mlp."), torch.clone), expected
        )
    ]
    assert not moved


def test_permuted_scores_are_permuted_weights(
    bridge: Any, model: nn.Module, router: str, plain: Any, ids: Tensor
) -> None:
    """Swapping scores does what swapping the rows of the router's weights does."""
    found = edit(bridge, ids, "router.hook_out", lambda x: x[..., PERMUTED])
    module: Any = model.get_submodule(router)
    kept = {name: p.data for name, p in module.named_parameters()}
    for name, data in kept.items():
        module.get_parameter(name).data = data[PERMUTED]
    expected = model(ids).logits
    for name, data in kept.items():
        module.get_parameter(name).data = data
    assert plain.gap(found, expected) < FLOAT
    assert plain.gap(found, model(ids).logits) > 1e-3


def test_forcing_an_expert(
    bridge: Any, model: nn.Module, home: str, router: str, plain: Any, ids: Tensor
) -> None:
    """A score far above the others puts that expert among the chosen of every token, and the output follows."""
    force = lambda x, hook: x + 50.0 * F.one_hot(torch.tensor(3), 4)  # noqa: E731
    with bridge.hooks(fwd_hooks=[("blocks.1.mlp.router.hook_out", force)]):
        found, cache = bridge.run_with_cache(ids, names_filter="blocks.1.mlp.**")
    chosen = cache["blocks.1.mlp.router.hook_experts"]
    weights = cache["blocks.1.mlp.router.hook_weights"]
    own = plain.read(model, ids, f"{router}<")[f"{router}<"][0].view(2, 9, -1)
    scores = scores_of(model.get_submodule(router), own)
    assert ((chosen == 3).sum(-1) == 1).all()
    assert (weights[chosen == 3] >= weights[chosen != 3]).all()
    others = scores.index_fill(-1, torch.tensor(3), -torch.inf).argmax(-1)
    assert torch.equal(chosen[chosen != 3], others.flatten())
    by_hand = Rerouted(model, home).logits(ids, chosen.flatten(0, 1), weights.flatten(0, 1))
    assert plain.gap(found, by_hand) < FLOAT
    assert plain.gap(found, model(ids).logits) > 1e-3


def test_rerouting(bridge: Any, model: nn.Module, home: str, plain: Any, ids: Tensor) -> None:
    """Other choices, or other weights, reach the experts as when they are handed to them by hand."""
    by_hand = Rerouted(model, home)
    chosen, weights = by_hand.choices(ids)
    found = edit(bridge, ids, "router.hook_experts", lambda x: (x + 1) % 4)
    assert torch.equal(found, by_hand.logits(ids, chosen=(chosen + 1) % 4))
    assert plain.gap(found, model(ids).logits) > 1e-3
    found = edit(bridge, ids, "router.hook_weights", lambda x: x.flip(-1) * 2)
    assert torch.equal(found, by_hand.logits(ids, weights=weights.flip(-1) * 2))
    assert plain.gap(found, model(ids).logits) > 1e-3


@pytest.mark.parametrize("side", ["in", "out"])
def test_edits_around_the_experts(
    bridge: Any, model: nn.Module, home: str, plain: Any, ids: Tensor, side: str
) -> None:
    """An edit of one position, made on [batch, pos, d_model], is that row of the flat tensor."""
    at = f"{home}.experts" + ("<" if side == "in" else "")

    def on_rows(x: Tensor) -> Tensor:
        rows = x.clone().view(2, 9, -1)
        rows[1, 4] = plain.noisy(rows[1, 4])
        return rows.view(x.shape)

    found = edit(bridge, ids, f"experts.hook_{side}", on_rows)
    assert torch.equal(found, plain.edited(model, ids, at, on_rows))
    untouched = model(ids).logits
    assert torch.equal(found[1, :4], untouched[1, :4])
    assert not torch.equal(found[1, 4:], untouched[1, 4:])


# --- experts that every token passes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SHARED), indirect=True)
def test_shared_experts(
    bridge: Any, model: nn.Module, home: str, name: str, plain: Any, ids: Tensor
) -> None:
    """The shared expert's layers are read and edited as any MLP's."""
    at = f"{home}.{SHARED[name]}"
    places = {
        "hook_in": f"{at}<",
        "gate.hook_out": f"{at}.gate_proj",
        "in.hook_out": f"{at}.up_proj",
        "out.hook_in": f"{at}.down_proj<",
        "out.hook_out": f"{at}.down_proj",
        "hook_out": at,
    }
    seen = plain.read(model, ids, *places.values())
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.mlp.shared.**")
    for point, place in places.items():
        value = cache[f"blocks.1.mlp.shared.{point}"]
        assert value.shape[:2] == (2, 9)
        assert torch.equal(value, seen[place][0].view(value.shape)), point

        def fn(x: Tensor) -> Tensor:
            return plain.noisy(x.view(2, 9, -1)).view(x.shape)

        found = edit(bridge, ids, f"shared.{point}", fn)
        assert torch.equal(found, plain.edited(model, ids, place, fn)), point


def test_what_a_mixture_lacks_says_why(bridge: Any, name: str) -> None:
    """The names of a plain MLP are absent with a reason; so are shared experts where there are none."""
    for point in ("in.hook_out", "out.hook_in"):
        assert f"blocks.1.mlp.{point}" not in bridge.registry
        assert "experts" in bridge.why(f"blocks.1.mlp.{point}")
    assert bridge.layer_types()[1] == "attn + mlp (experts)"
    has_shared = "blocks.1.mlp.shared.hook_out" in bridge.registry
    assert has_shared == (name in SHARED)


def test_dense_layers_before_the_experts(tiny: Any, ids: Tensor, plain: Any) -> None:
    """DeepSeek's first layer is a plain MLP; it has an MLP's points and no router."""
    model = tiny("deepseek_v3")
    bridge = TransformerBridge(model)
    assert bridge.layer_types() == ["attn + mlp", "attn + mlp (experts)"]
    assert [index for index, _ in bridge.blocks_with("mlp.router")] == [1]
    assert "blocks.0.mlp.router.hook_out" not in bridge.registry
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.0.mlp.**")
    seen = plain.read(model, ids, "model.layers.0.mlp.down_proj<")
    post = cache["blocks.0.mlp.hook_post"]
    assert torch.equal(post, seen["model.layers.0.mlp.down_proj<"][0])
