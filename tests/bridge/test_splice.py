"""A coder in a model: what passes, what is shown, and that nothing changes until something is edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookValueError, InputError, PointError, TransformerBridge, UnknownPointError

AT = "blocks.1.hook_resid_post"
CLOSE = 1e-5


class Coder:
    """A small overcomplete coder with fixed weights."""

    def __init__(self, width: int, concepts: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.d_in = width
        self.into = torch.randn(width, concepts, generator=generator) / width**0.5
        self.back = torch.randn(concepts, width, generator=generator) / concepts**0.5
        self.calls = 0

    def encode(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return (rows @ self.into.to(rows.dtype)).relu()

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.back.to(acts.dtype)


class Unit(Coder):
    """A coder that misses nothing."""

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def decode(self, acts: Tensor) -> Tensor:
        return acts


@pytest.fixture(params=["gpt2", "llama", "bert"])
def bridge(request: Any, tiny: Callable[..., nn.Module]) -> TransformerBridge:
    """Decoders and an encoder."""
    return TransformerBridge(tiny(request.param, "masked" if request.param == "bert" else "causal"))


@pytest.fixture
def ids() -> Tensor:
    """Two rows of six tokens."""
    return torch.randint(5, 40, (2, 6), generator=torch.Generator().manual_seed(1))


def width(bridge: TransformerBridge) -> int:
    return int(bridge.cfg.d_model or 0)


# --- values -------------------------------------------------------------------------------------------------


def test_with_its_error_nothing_changes(bridge: TransformerBridge, ids: Tensor) -> None:
    """Bit for bit, heard or not; unheard, nothing is computed."""
    expected = bridge(ids)
    coder = Coder(width(bridge))
    with bridge.splice(coder, AT):
        assert torch.equal(bridge(ids), expected)
        assert coder.calls == 0
        # Patterns are left out: to show them attention is written out, and rounds otherwise.
        logits, cache = bridge.run_with_cache(ids, names_filter=["**.sae.*", AT])
        assert torch.equal(logits, expected)
        assert coder.calls == 1
    stream = cache[f"{AT}.sae.hook_in"]
    acts = coder.encode(stream.flatten(0, 1)).unflatten(0, stream.shape[:2])
    recon = coder.decode(acts)
    assert torch.equal(stream, cache[AT])
    assert torch.allclose(cache[f"{AT}.sae.hook_acts"], acts, atol=CLOSE)
    assert torch.allclose(cache[f"{AT}.sae.hook_error"], stream - recon, atol=CLOSE)
    assert torch.equal(cache[f"{AT}.sae.hook_out"], stream)


def test_without_it_the_reconstruction_goes_on(bridge: TransformerBridge, ids: Tensor) -> None:
    """As a hook by hand that replaces the stream; who listens at the point sees what goes on."""
    coder = Coder(width(bridge))
    with bridge.hooks([(AT, lambda x, hook: coder.decode(coder.encode(x)))]):
        expected = bridge(ids)
    with bridge.splice(coder, AT, include_error=False):
        logits, cache = bridge.run_with_cache(ids)
    assert torch.allclose(logits, expected, atol=CLOSE)
    assert torch.equal(cache[AT], cache[f"{AT}.sae.hook_out"])
    assert f"{AT}.sae.hook_error" not in cache
    with bridge.splice(Unit(width(bridge)), AT, include_error=False):
        assert torch.equal(bridge(ids), bridge.original_model(ids).logits)


def test_clamping_a_concept(bridge: TransformerBridge, ids: Tensor) -> None:
    """As the same done by hand on the stream: the concept's direction, times how far it was moved."""
    coder = Coder(width(bridge))

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        acts = coder.encode(x)
        return x + (3.0 - acts[..., 5:6]) * coder.back[5]

    def clamp(acts: Tensor, hook: Any) -> Tensor:
        acts[..., 5] = 3.0  # in place, which counts as an edit too
        return acts

    with bridge.hooks([(AT, by_hand)]):
        expected = bridge(ids)
    with bridge.splice(coder, AT), bridge.hooks([(f"{AT}.sae.hook_acts", clamp)]):
        found = bridge(ids)
    assert torch.allclose(found, expected, atol=CLOSE)
    assert not torch.allclose(found, bridge(ids), atol=1e-3)


@pytest.mark.parametrize("part", ["hook_in", "hook_error", "hook_out"])
def test_the_other_points_can_be_edited(bridge: TransformerBridge, ids: Tensor, part: str) -> None:
    """Each takes part in out = decode(encode(in)) + error."""
    coder = Coder(width(bridge))

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        if part == "hook_in":
            return 2 * x
        recon = coder.decode(coder.encode(x))
        return recon + 2 * (x - recon) if part == "hook_error" else 2 * x

    with bridge.hooks([(AT, by_hand)]):
        expected = bridge(ids)
    with (
        bridge.splice(coder, AT),
        bridge.hooks([(f"{AT}.sae.{part}", lambda x, hook: 2 * x)]),
    ):
        assert torch.allclose(bridge(ids), expected, atol=1e-4)


def test_gradients_at_concepts(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """The gradient at the activations is the dictionary times that at the stream, and equals differences."""
    bridge = TransformerBridge(tiny("gpt2").double())
    coder = Coder(width(bridge))
    grads: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor, Any], None]:
        return lambda grad, hook: grads.update({name: grad.clone()})

    acts_at = f"{AT}.sae.hook_acts"
    with (
        bridge.splice(coder, AT),
        bridge.hooks(bwd_hooks=[(acts_at, keep("acts")), (AT, keep("stream"))]),
    ):
        bridge(ids, return_type="loss").backward()
    assert torch.allclose(grads["acts"], grads["stream"] @ coder.back.double().T, atol=1e-10)
    losses = []
    for step in (1e-6, -1e-6):

        def move(acts: Tensor, hook: Any, step: float = step) -> Tensor:
            acts[0, 2, 7] += step
            return acts

        with torch.no_grad(), bridge.splice(coder, AT), bridge.hooks([(acts_at, move)]):
            losses.append(float(bridge(ids, return_type="loss")))
    slope = (losses[0] - losses[1]) / 2e-6
    assert float(grads["acts"][0, 2, 7]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_several_at_once(bridge: TransformerBridge, ids: Tensor) -> None:
    """At two points, and two at one point: the later one stands in front of the earlier."""
    first, second = Coder(width(bridge)), Coder(width(bridge), seed=1)
    names = ["blocks.0.hook_out", AT]

    def through(*coders: Coder) -> Callable[[Tensor, Any], Tensor]:
        def run(x: Tensor, hook: Any) -> Tensor:
            for coder in coders:
                x = coder.decode(coder.encode(x))
            return x

        return run

    with bridge.hooks([(names[0], through(first)), (names[1], through(second, first))]):
        expected = bridge(ids)
    with (
        bridge.splice(first, names[0], include_error=False),
        bridge.splice(first, AT, include_error=False),
        bridge.splice(second, AT, include_error=False, name="other"),
    ):
        logits, cache = bridge.run_with_cache(ids)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert f"{AT}.other.hook_acts" in cache
    order = list(cache)
    canonical = bridge.registry.canonical(AT)
    assert order.index(f"{canonical}.sae.hook_acts") == order.index(f"{canonical}.sae.hook_in") + 1


def test_heads_side_by_side(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """A coder for all heads of an attention: its rows are theirs, one behind the other."""
    bridge = TransformerBridge(tiny("llama"))
    at = "blocks.0.attn.hook_z"
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=at)
    coder = Coder(cache[at].shape[-2:].numel())
    with bridge.hooks([(at, lambda x, hook: coder.decode(coder.encode(x.flatten(-2))).view_as(x))]):
        expected = bridge(ids)
    with bridge.splice(coder, at, include_error=False):
        logits, cache = bridge.run_with_cache(ids)
    assert torch.allclose(logits, expected, atol=CLOSE)
    assert cache[f"{at}.sae.hook_acts"].shape == (2, 6, 24)


def test_steering_in_generation(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """A concept clamped while the model writes: the tokens of a loop by hand without a past."""
    bridge = TransformerBridge(tiny("gpt2"))
    coder = Coder(width(bridge))

    def clamp(acts: Tensor, hook: Any) -> Tensor:
        acts[..., 5] = 40.0
        return acts

    def by_hand(x: Tensor, hook: Any) -> Tensor:
        return x + (40.0 - coder.encode(x)[..., 5:6]) * coder.back[5]

    with bridge.splice(coder, AT), bridge.hooks([(f"{AT}.sae.hook_acts", clamp)]):
        found = bridge.generate(ids[:1], max_new_tokens=6, do_sample=False, return_type="tokens")
    row = ids[:1]
    with torch.no_grad(), bridge.hooks([(AT, by_hand)]):
        for _ in range(6):
            row = torch.cat([row, bridge(row)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, row)
    plain = bridge.generate(ids[:1], max_new_tokens=6, do_sample=False, return_type="tokens")
    assert not torch.equal(found, plain)


def test_acts_are_cached_while_a_text_is_written(
    tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    """The live cache has a row of concepts for every token, as a run over the whole has."""
    bridge = TransformerBridge(tiny("gpt2"))
    name = f"{AT}.sae.hook_acts"
    with bridge.splice(Coder(width(bridge)), AT):
        tokens, live = bridge.generate(
            ids,
            max_new_tokens=4,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            return_cache=True,
            names_filter=name,
        )
        _, cache = bridge.run_with_cache(tokens, names_filter=name)
    assert live[name].shape == (2, 10, 24)
    assert torch.allclose(live[name], cache[name], atol=1e-4)


# --- life and errors ----------------------------------------------------------------------------------------


def test_it_goes(bridge: TransformerBridge, ids: Tensor, snapshot: Any) -> None:
    """At the end of the block, after an error, or when told; with its points and who listened there."""
    model: Any = bridge.original_model
    before, names = snapshot(model), list(bridge.registry)
    splice = bridge.splice(Coder(width(bridge)), AT, include_error=False)
    assert [n for n in bridge.registry if n not in names] == [
        f"{bridge.registry.canonical(AT)}.sae.{part}"
        for part in ("hook_in", "hook_acts", "hook_error", "hook_out")
    ]
    assert not any("sae" in name for name in model.state_dict())
    splice.remove()
    splice.remove()
    assert list(bridge.registry) == names
    assert snapshot(model) == before

    def fail(x: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    def run() -> None:
        with bridge.splice(Coder(width(bridge)), AT):
            bridge.add_hook(f"{AT}.sae.hook_acts", fail)
            bridge(ids)

    with pytest.raises(ZeroDivisionError):
        run()
    assert list(bridge.registry) == names
    assert snapshot(model) == before
    with pytest.raises(UnknownPointError):
        bridge.get_hook_point(f"{AT}.sae.hook_acts")


def test_it_survives_reset_hooks(bridge: TransformerBridge, ids: Tensor) -> None:
    """reset_hooks takes away who listens, not the coder."""
    coder = Coder(width(bridge))
    with bridge.splice(coder, AT, include_error=False):
        expected = bridge(ids)
        bridge.reset_hooks()
        assert torch.equal(bridge(ids), expected)


def test_what_is_refused(bridge: TransformerBridge, ids: Tensor) -> None:
    """No coder, no width, no such point, a point without features, a name that is taken or none."""
    coder = Coder(width(bridge))
    names = list(bridge.registry)
    with pytest.raises(InputError, match="has encode and decode"):
        bridge.splice(object(), AT)
    nameless: Any = type("Bare", (), {"encode": coder.encode, "decode": coder.decode})()
    with pytest.raises(InputError, match="give it d_in"):
        bridge.splice(nameless, AT)
    with pytest.raises(UnknownPointError, match="blocks"):
        bridge.splice(coder, "blocks.9.hook_out")
    with pytest.raises(InputError, match="takes features of positions"):
        bridge.splice(coder, "blocks.0.attn.hook_pattern")
    with pytest.raises(InputError, match="one word"):
        bridge.splice(coder, AT, name="a.b")
    with bridge.splice(coder, AT), pytest.raises(PointError, match="no free name"):
        bridge.splice(coder, AT)
    assert list(bridge.registry) == names
    with (
        bridge.splice(Coder(7), AT, include_error=False),
        pytest.raises(HookValueError, match="takes rows of 7"),
    ):
        bridge(ids)


def test_a_coder_in_another_precision(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """What goes on has the model's own type."""
    bridge = TransformerBridge(tiny("gpt2").bfloat16())
    with bridge.splice(Coder(width(bridge)), AT, include_error=False):
        assert bridge(ids).dtype == torch.bfloat16
