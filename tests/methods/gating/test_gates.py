"""Gates act as a hook by hand does, only where they should, and leave nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import CHG, AbsentPointError, CHGDataset, GateSite, InputError, TransformerBridge

CLOSE = 1e-5
OUT = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
    "gemma2": "model.layers.{}.self_attn.o_proj",
    "deepseek_v3": "model.layers.{}.self_attn.o_proj",
    "mixtral": "model.layers.{}.self_attn.o_proj",
}
"""The output projection of each layer's attention."""


@pytest.fixture(params=list(OUT))
def chg(request: Any, tiny: Callable[..., nn.Module]) -> CHG:
    """Gates on the heads of a tiny model: absolute and rotary positions, grouped heads, latent attention."""
    model = tiny(request.param)
    model.config.name_of_test = request.param
    return CHG(model)


@pytest.fixture
def ids() -> Tensor:
    """Two rows of seven tokens."""
    return torch.randint(5, 40, (2, 7), generator=torch.Generator().manual_seed(3))


def by_hand(chg: CHG, ids: Tensor, gates: Tensor, **more: Any) -> Tensor:
    """Logits of the bare model with plain hooks that scale what enters each output projection."""
    model: Any = chg.bridge.original_model
    handles = []
    for row, layer in enumerate(chg.layers):
        module = model.get_submodule(OUT[model.config.name_of_test].format(layer))

        def scale(module: Any, args: Any, row: int = row) -> Any:
            x = args[0]
            split = x.unflatten(-1, (chg.num_heads, -1)) * gates[row].view(1, 1, -1, 1)
            return (split.flatten(-2), *args[1:])

        handles.append(module.register_forward_pre_hook(scale))
    try:
        with torch.no_grad():
            return model(ids, **more).logits
    finally:
        for handle in handles:
            handle.remove()


def logp_by_hand(logits: Tensor, ids: Tensor, loss: Tensor) -> Tensor:
    """Summed log-probabilities of the tokens that count."""
    found = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (found * loss[:, 1:]).sum(-1)


# --- values -------------------------------------------------------------------------------------------------


def test_one_mask(chg: CHG, ids: Tensor) -> None:
    """One mask for all rows: the logits of plain hooks."""
    gates = torch.rand(chg.mask_shape)
    found = chg(ids, gates)
    assert torch.allclose(found, by_hand(chg, ids, gates), atol=CLOSE)
    assert not torch.allclose(found, chg(ids), atol=1e-3)


def test_several_masks_in_one_forward(chg: CHG, ids: Tensor) -> None:
    """Each row under each mask, [batch, mask, pos, d_vocab]."""
    masks = torch.rand(3, *chg.mask_shape)
    found = chg(ids, masks)
    assert found.shape[:3] == (2, 3, 7)
    for m in range(3):
        assert torch.allclose(found[:, m], by_hand(chg, ids, masks[m]), atol=CLOSE)


def test_open_gates_change_nothing(chg: CHG, ids: Tensor) -> None:
    """Ones are the whole model, bit for bit."""
    with torch.no_grad():
        expected = chg.bridge.original_model(ids).logits
        assert torch.equal(chg(ids, torch.ones(chg.mask_shape)), expected)
        assert torch.equal(chg(ids), expected)


def test_log_probs(chg: CHG, ids: Tensor) -> None:
    """Of the tokens that count, under each mask, summed, averaged or by place."""
    loss = torch.zeros_like(ids, dtype=torch.bool)
    loss[0, [2, 6]] = loss[1, 4:] = True
    masks = torch.rand(3, *chg.mask_shape)
    with torch.no_grad():
        summed, right = chg.get_logp(masks, ids, loss, return_accuracy=True)
        mean = chg.get_logp(masks, ids, loss, agg="mean")
        each = chg.get_logp(masks, ids, loss, agg="none")
        whole = chg.get_logp(None, ids, loss)
        one = chg.get_logp(masks[0], ids, loss)
    for m in range(3):
        logits = by_hand(chg, ids, masks[m])
        expected = logp_by_hand(logits, ids, loss)
        assert torch.allclose(summed[:, m], expected, atol=CLOSE)
        assert torch.allclose(mean[:, m], expected / loss.sum(-1), atol=CLOSE)
        hits = (logits[:, :-1].argmax(-1) == ids[:, 1:]) & loss[:, 1:]
        assert torch.allclose(right[:, m], hits.sum(-1) / loss.sum(-1), atol=CLOSE)
    assert torch.allclose(each.sum(-1), summed, atol=CLOSE)
    assert not each[:, :, ~loss.any(0)].any()
    assert torch.allclose(one, summed[:, 0], atol=CLOSE)
    ungated = by_hand(chg, ids, torch.ones(chg.mask_shape))
    assert torch.allclose(whole, logp_by_hand(ungated, ids, loss), atol=CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(chg: CHG, ids: Tensor, side: str) -> None:
    """Rows of unequal length, padded on either side, give what each gives by itself."""
    rows = [ids[0], ids[1, :4]]
    masks = torch.rand(2, *chg.mask_shape)
    loss = [torch.arange(len(row)) >= len(row) - 2 for row in rows]
    data = CHGDataset.from_tokens(rows, loss)
    batch = data.batch([0, 1], padding_side=side)
    with torch.no_grad():
        answers = chg.answers(batch, masks)
        found = answers.per_row(answers.log_probs(), "sum").view(2, 2)
    for b, row in enumerate(rows):
        for m in range(2):
            logits = by_hand(chg, row[None], masks[m])
            expected = logp_by_hand(logits, row[None], loss[b][None])
            assert torch.allclose(found[b, m], expected[0], atol=CLOSE)


def test_some_layers_only(chg: CHG, ids: Tensor) -> None:
    """Rows of a mask are the layers that were asked for; those in front run once a row, to the same end."""
    last = CHG(chg.bridge, layers=[-1])
    loss = torch.zeros_like(ids, dtype=torch.bool)
    loss[:, -1] = True
    masks = torch.rand(3, 1, chg.num_heads)
    runs: list[int] = []
    first = f"blocks.{chg.layers[0]}.hook_in"
    with (
        torch.no_grad(),
        chg.bridge.hooks([(first, lambda x, hook: runs.append(len(x)))]),
    ):
        last.get_logp(None, ids, loss)  # the cuts are tried
        runs.clear()
        found = last.get_logp(masks, ids, loss)
    assert runs == [2]
    for m in range(3):
        full = torch.ones(chg.mask_shape)
        full[-1] = masks[m, 0]
        expected = logp_by_hand(by_hand(chg, ids, full), ids, loss)
        assert torch.allclose(found[:, m], expected, atol=CLOSE)


def test_only_places_that_count_are_unembedded(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """The head sees rows x loss tokens, not rows x positions."""
    model: Any = tiny("llama")
    chg = CHG(model)
    loss = torch.zeros_like(ids, dtype=torch.bool)
    loss[:, 3] = True
    masks = torch.rand(3, *chg.mask_shape)
    chg.get_logp(masks, ids, loss)
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(
        lambda m, a, out: seen.append(out.shape[:-1].numel())
    )
    chg.get_logp(masks, ids, loss)
    handle.remove()
    assert seen == [2 * 3 * 1]


def test_gradients_reach_gates_and_nothing_else(
    tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    """The slope of a log-probability by each gate equals the difference of two runs, in float64."""
    chg = CHG(tiny("gpt2").double())
    loss = torch.zeros_like(ids, dtype=torch.bool)
    loss[:, -1] = True
    gates = torch.rand(1, *chg.mask_shape, dtype=torch.float64, requires_grad=True)
    with chg.still():
        chg.get_logp(gates, ids, loss).sum().backward()
    step = 1e-6
    with torch.no_grad():
        for place in [(0, 0, 0), (0, -1, 1)]:
            moved = torch.zeros_like(gates)
            moved[place] = step
            up, down = (chg.get_logp(gates + s * moved, ids, loss).sum() for s in (1, -1))
            assert float((up - down) / (2 * step)) == pytest.approx(
                float(gates.grad[place]), abs=1e-6
            )
    assert all(p.grad is None and p.requires_grad for p in chg.bridge.original_model.parameters())


def test_bfloat16_keeps_the_gate(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """A gate of 0.999 is not 1 in a bfloat16 model: it multiplies in float32, and has a float32 gradient."""
    chg = CHG(tiny("llama").bfloat16())
    gates = torch.full(chg.mask_shape, 0.999, requires_grad=True)
    seen: dict[str, Tensor] = {}
    with chg.gated(gates) as bridge:
        name = "blocks.0.attn.hook_z"
        with bridge.hooks([(name, lambda x, hook: seen.update(gated=x.detach().clone()))]):
            bridge(ids).float().sum().backward()
    with torch.no_grad():
        _, cache = chg.bridge.run_with_cache(ids, names_filter=name)
    assert torch.equal(seen["gated"], (cache[name].float() * 0.999).bfloat16())
    assert gates.grad is not None
    assert gates.grad.dtype == torch.float32


# --- other targets ------------------------------------------------------------------------------------------


def test_groups_of_heads(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """A gate on keys and values is one on each head that reads them."""
    model: Any = tiny("llama")
    heads, groups = CHG(model), CHG(model, target="kv_groups")
    share = heads.num_heads // groups.num_heads
    assert share > 1
    gates = torch.rand(groups.mask_shape)
    spread = gates.repeat_interleave(share, -1)
    assert torch.equal(groups(ids, gates), heads(ids, spread))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("target", ["mlp", "attn"])
def test_branches(tiny: Callable[..., nn.Module], ids: Tensor, name: str, target: str) -> None:
    """A shut gate on a branch takes what it adds out of the stream."""
    chg = CHG(tiny(name), target=target)
    assert chg.mask_shape == (2, 1)
    gates = torch.tensor([[1.0], [0.25]])
    point = f"blocks.1.hook_{target}_out"
    with chg.bridge.hooks([(point, lambda x, hook: x * 0.25)]):
        expected = chg.bridge(ids)
    assert torch.allclose(chg(ids, gates), expected, atol=CLOSE)


def test_sites_of_ones_own(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """Gates on the neurons of an MLP."""
    bridge = TransformerBridge(tiny("gpt2"))
    name = "blocks.1.mlp.hook_post"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=name)
    width = cache[name].shape[-1]
    chg = CHG(bridge, target=[GateSite(name, 1, width, axis=-1)])
    gates = torch.rand(1, width)
    with bridge.hooks([(name, lambda x, hook: x * gates[0])]):
        expected = bridge(ids)
    assert torch.allclose(chg(ids, gates), expected, atol=CLOSE)


def test_mean_ablation(chg: CHG, ids: Tensor) -> None:
    """A shut gate leaves the mean over the dataset's real tokens."""
    rows = [ids[0], ids[1, :4]]
    data = CHGDataset.from_tokens(rows, [torch.arange(len(row)) == len(row) - 1 for row in rows])
    mean = CHG(chg.bridge, ablation=data)
    names = [site.name for site in chg.sites]
    held: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in rows:
        with torch.no_grad():
            _, cache = chg.bridge.run_with_cache(row[None], names_filter=names)
        for name in names:
            held[name].append(cache[name][0])
    gates = torch.zeros(chg.mask_shape)

    def put(name: str) -> Callable[[Tensor, Any], Tensor]:
        return lambda x, hook: torch.cat(held[name]).mean(0).expand_as(x)

    with chg.bridge.hooks([(name, put(name)) for name in names]):
        expected = chg.bridge(ids)
    assert torch.allclose(mean(ids, gates), expected, atol=CLOSE)


# --- errors and state ---------------------------------------------------------------------------------------


def test_wrong_masks(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """Masks of another model, or for other rows, are refused; nothing stays set."""
    chg = CHG(tiny("llama"))
    expected = chg(ids)
    with pytest.raises(InputError, match=r"\[2, 4\] for \[layer, head\].*got \[3, 4\]"):
        chg(ids, torch.ones(3, 4))
    with pytest.raises(InputError, match="gates for 3"), chg.gated(torch.ones(3, 2, 4)) as bridge:
        bridge(ids)
    assert torch.equal(chg(ids), expected)
    assert not chg.bridge.registry.live


def test_a_model_without_heads(tiny: Callable[..., nn.Module]) -> None:
    """A state-space model is refused by name."""
    with pytest.raises(AbsentPointError, match="MambaForCausalLM has nothing to gate"):
        CHG(tiny("mamba"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "neurons"}, "heads, kv_groups, attn, mlp"),
        ({"layers": [5]}, "0 to 1"),
        ({"layers": []}, "0 to 1"),
        ({"target": [3]}, "GateSite"),
        ({"ablation": {}}, "it lacks blocks.0"),
    ],
)
def test_what_cannot_be_gated(
    tiny: Callable[..., nn.Module], given: dict[str, Any], message: str
) -> None:
    """Unknown targets, layers and means are refused, and the message says what there is."""
    with pytest.raises(InputError, match=message):
        CHG(tiny("llama"), **given)


@pytest.mark.parametrize(
    "given", [{"num_masks": 0}, {"mask_init_range": (0.5, 0.2)}, {"mask_init_range": (-1.0, 1.0)}]
)
def test_masks_that_cannot_be_drawn(tiny: Callable[..., nn.Module], given: dict[str, Any]) -> None:
    """No masks, or gates outside [0, 1]."""
    with pytest.raises(InputError, match=next(iter(given))):
        CHG(tiny("llama")).create_masks(**given)


def test_drawn_masks(tiny: Callable[..., nn.Module]) -> None:
    """Mask k of many is mask k of more; the range holds; the global generator is not touched."""
    chg = CHG(tiny("llama"))
    state = torch.get_rng_state()
    plain = {"as_parameter": False, "as_logits": False}
    few, more = (chg.create_masks(n, (0.2, 0.8), **plain, seed=4) for n in (2, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(few, more[:2])
    assert 0.2 <= float(more.min()) < float(more.max()) <= 0.8
    assert not torch.equal(more, chg.create_masks(5, (0.2, 0.8), **plain, seed=5))
    logits = chg.create_masks(None, (0.0, 1.0))
    assert isinstance(logits, nn.Parameter)
    assert logits.shape == chg.mask_shape
    assert logits.isfinite().all()


def test_the_model_is_as_it_was(tiny: Callable[..., nn.Module], snapshot: Any) -> None:
    """Training mode, gradients wanted and hooks are what they were, also after an error."""
    model = tiny("llama").train()
    model.get_submodule("model.layers.0").eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model), [m.training for m in model.modules()]
    chg = CHG(model)

    def fail() -> None:
        with chg.still(), chg.gated(torch.ones(chg.mask_shape)):
            assert not any(m.training for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (snapshot(model), [m.training for m in model.modules()]) == before


def test_encoder_decoders_are_refused(tiny: Callable[..., nn.Module]) -> None:
    """A row of tokens does not run one; the message says what does."""
    chg = CHG(tiny("t5", "seq2seq"))
    ids = torch.tensor([[5, 6]])
    with pytest.raises(InputError, match=r"chg\.gated"):
        chg(ids)
    with chg.gated(torch.ones(chg.mask_shape)) as bridge:
        assert torch.equal(
            bridge(ids, decoder_input_ids=ids),
            bridge.original_model(input_ids=ids, decoder_input_ids=ids).logits,
        )


def test_concepts_of_a_spliced_coder(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """Gates on the concepts of a sparse autoencoder that stands in the model."""
    bridge = TransformerBridge(tiny("gpt2"))
    width = int(bridge.cfg.d_model or 0)
    into = torch.randn(width, 12, generator=torch.Generator().manual_seed(0)) / width**0.5

    class Coder:
        d_in = width

        def encode(self, x: Tensor) -> Tensor:
            return (x @ into).relu()

        def decode(self, acts: Tensor) -> Tensor:
            return acts @ into.T

    at = "blocks.0.hook_out"
    gates = torch.rand(1, 12)
    loss = torch.zeros_like(ids, dtype=torch.bool)
    loss[:, -1] = True
    with bridge.splice(Coder(), at):
        chg = CHG(bridge, target=[GateSite(f"{at}.sae.hook_acts", 0, 12, axis=-1)])
        found = chg.get_logp(gates, ids, loss)

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        acts = (x @ into).relu()
        return x + (acts * gates[0] - acts) @ into.T

    with bridge.hooks([(at, by_hand)]):
        expected = logp_by_hand(bridge(ids), ids, loss)
    assert torch.allclose(found, expected, atol=CLOSE)
    assert not torch.allclose(found, CHG(bridge).get_logp(None, ids, loss), atol=1e-3)
