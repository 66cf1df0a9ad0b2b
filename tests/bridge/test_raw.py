"""Every module of a model under its own path: ``raw:model.layers.3.mlp``, and its input with ``.hook_in``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookNotFiredError, TransformerBridge, UnknownPointError

PLACES = {
    # Called by position or by keyword, returning a tensor, a tuple or a Hugging Face output.
    "model.layers.1.mlp": "model.layers.1.mlp",
    "model.layers.1.mlp.act_fn": "model.layers.1.mlp.act_fn",
    "model.layers.0.self_attn": "model.layers.0.self_attn",
    "model.layers.0.self_attn.hook_in": "model.layers.0.self_attn<",
    "model.layers.1.hook_in": "model.layers.1<",
    "model.layers.1.hook_out": "model.layers.1",
    "model.norm": "model.norm",
    "model": "model",
    "lm_head.hook_in": "lm_head<",
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def bridge(tiny: Any) -> TransformerBridge:
    """A bridge around a tiny Llama; a new one, because these tests look at what is left on it."""
    return TransformerBridge(tiny("llama"))


@pytest.fixture
def model(bridge: TransformerBridge) -> nn.Module:
    """Its model."""
    return bridge.original_model


def is_bare(model: nn.Module) -> bool:
    """Whether no module carries a hook."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_values(bridge: Any, model: nn.Module, ids: Tensor, plain: Any) -> None:
    """A raw point is what the module returns, or is called with, first tensor of it."""
    seen = plain.read(model, ids, *PLACES.values())
    names = [f"raw:{name}" for name in PLACES]
    logits, cache = bridge.run_with_cache(ids, names_filter=names)
    assert set(cache) == set(names)
    for name, place in PLACES.items():
        assert torch.equal(cache[f"raw:{name}"], seen[place][0]), name
    assert torch.equal(logits, model(ids).logits)
    assert is_bare(model)


@pytest.mark.parametrize("name", sorted(PLACES))
def test_edits(bridge: Any, model: nn.Module, ids: Tensor, plain: Any, name: str) -> None:
    """An edit there is the same edit by a plain hook, and the model is bare again afterwards."""
    found = bridge.run_with_hooks(ids, fwd_hooks=[(f"raw:{name}", lambda x, hook: plain.noisy(x))])
    assert is_bare(model)
    assert torch.equal(found, plain.edited(model, ids, PLACES[name], plain.noisy))
    assert plain.gap(found, model(ids).logits) > 1e-3


def test_own_values(bridge: Any, model: nn.Module, ids: Tensor) -> None:
    """Setting every module that runs to its own value, one at a time, keeps the logits' bits."""
    expected = model(ids).logits
    count = 0
    for path, _ in model.named_modules():
        if not path or path in ("model.layers", "model.rotary_emb"):
            continue
        clone = [(f"raw:{path}", lambda x, hook: x.clone())]
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=clone), expected), path
        count += 1
    assert count > 20


def test_globs(bridge: Any, model: nn.Module, ids: Tensor, plain: Any) -> None:
    """A glob stands for the modules it matches, one dotted part a star, in the model's order."""
    _, cache = bridge.run_with_cache(ids, names_filter="raw:model.layers.*.mlp")
    assert list(cache) == ["raw:model.layers.0.mlp", "raw:model.layers.1.mlp"]
    seen = plain.read(model, ids, "model.layers.0.mlp", "model.layers.1.mlp<")
    assert torch.equal(cache["raw:model.layers.0.mlp"], seen["model.layers.0.mlp"][0])
    _, cache = bridge.run_with_cache(ids, names_filter="raw:model.layers.*.mlp.hook_in")
    assert list(cache) == [f"raw:model.layers.{i}.mlp.hook_in" for i in range(2)]
    assert torch.equal(cache["raw:model.layers.1.mlp.hook_in"], seen["model.layers.1.mlp<"][0])
    _, cache = bridge.run_with_cache(ids, names_filter="raw:model.layers.[1]**_proj")
    wanted = [path for path, _ in model.named_modules() if path.endswith("_proj") and ".1." in path]
    assert set(cache) == {f"raw:{path}" for path in wanted}
    assert len(wanted) == 7


def test_edits_by_glob(bridge: Any, model: nn.Module, ids: Tensor, plain: Any) -> None:
    """One hook on every module that matches is the same hook on each."""
    half = [("raw:model.layers.*.mlp", lambda x, hook: x / 2)]
    found = bridge.run_with_hooks(ids, fwd_hooks=half)
    with plain.watching(model, "model.layers.0.mlp", lambda x, count: x / 2):
        expected = plain.edited(model, ids, "model.layers.1.mlp", lambda x: x / 2)
    assert torch.equal(found, expected)
    assert is_bare(model)


def test_beside_the_canonical_point(bridge: Any, model: nn.Module, ids: Tensor, plain: Any) -> None:
    """A raw point and the canonical one of the same place see each other's edits; both are cached."""
    names = ["raw:model.layers.1.mlp", "blocks.1.mlp.hook_out", "blocks.1.hook_out"]
    _, cache = bridge.run_with_cache(ids, names_filter=names)
    assert torch.equal(cache[names[0]], cache[names[1]])
    assert torch.equal(
        cache["resid_post", 1], plain.read(model, ids, "model.layers.1")["model.layers.1"][0]
    )
    edits = [(names[1], lambda x, hook: x * 2), (names[0], lambda x, hook: x + 1)]
    found = bridge.run_with_hooks(ids, fwd_hooks=edits)
    either = [
        plain.edited(model, ids, "model.layers.1.mlp", fn)
        for fn in (lambda x: x * 2 + 1, lambda x: (x + 1) * 2)
    ]
    assert any(torch.equal(found, one) for one in either)


def test_not_listed(bridge: Any, ids: Tensor) -> None:
    """Raw points are in no listing and no default selection, also after they were used."""
    before = list(bridge.registry)
    bridge.run_with_cache(ids, names_filter=["raw:model.norm", "raw:model.layers.*.mlp"])
    assert list(bridge.registry) == before
    assert not [name for name in bridge.hook_dict if name.startswith("raw:")]
    _, cache = bridge.run_with_cache(ids)
    assert not [name for name in cache if name.startswith("raw:")]
    _, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
    assert set(cache) == set(before)
    assert "raw:" not in str(bridge)


def test_unknown_paths(bridge: Any, ids: Tensor) -> None:
    """A path that the model does not have is refused with the nearest ones, before anything runs."""
    with pytest.raises(UnknownPointError, match=r"raw:model\.layers\.1\.mlp"):
        bridge.run_with_cache(ids, names_filter="raw:model.layers.1.mpl")
    with pytest.raises(UnknownPointError, match=r"raw:model\.norm"):
        bridge.run_with_hooks(ids, fwd_hooks=[("raw:model.nrom", lambda x, hook: x)])
    with pytest.raises(UnknownPointError, match="modules are called like"):
        bridge.run_with_cache(ids, names_filter="raw:transformer.h.*.mlp")
    for name in ("raw:", "raw:.hook_in", "model.norm"):
        with pytest.raises(UnknownPointError):
            bridge.run_with_cache(ids, names_filter=name)
    assert is_bare(bridge.original_model)


def test_modules_that_do_not_run(bridge: Any, tiny: Any, ids: Tensor) -> None:
    """A list of layers, and a convolution whose weights are used without a call, never fire: an error."""
    with pytest.raises(HookNotFiredError, match=r"raw:model\.layers"):
        bridge.run_with_hooks(ids, fwd_hooks=[("raw:model.layers", lambda x, hook: x)])
    assert is_bare(bridge.original_model)
    mamba = TransformerBridge(tiny("mamba"))
    with pytest.raises(HookNotFiredError, match="conv1d"):
        mamba.run_with_cache(ids, names_filter="raw:backbone.layers.0.mixer.conv1d")


def test_hooks_are_gone_after_an_error(bridge: Any, model: nn.Module, ids: Tensor) -> None:
    """An exception in a raw hook, or a stop before it, leaves a bare model."""

    def broken(x: Tensor, hook: Any) -> None:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError):
        bridge.run_with_hooks(ids, fwd_hooks=[("raw:model.layers.1.mlp", broken)])
    assert is_bare(model)
    late = [("raw:model.layers.1.mlp", broken)]
    assert bridge.run_with_hooks(ids, fwd_hooks=late, stop_at_layer=1).shape == (2, 9, 64)
    assert is_bare(model)
    with bridge.hooks(fwd_hooks=[("raw:model.layers.0", lambda x, hook: None)]):
        bridge(ids)
        assert not is_bare(model)
    assert is_bare(model)


def test_the_hook_knows_its_point(bridge: Any, ids: Tensor) -> None:
    """A hook is told its raw name; the point keeps a context of its own."""
    names: list[str] = []

    def note(x: Tensor, hook: Any) -> None:
        names.append(hook.name)
        hook.ctx["seen"] = tuple(x.shape)

    bridge.run_with_hooks(ids, fwd_hooks=[("raw:model.layers.*.mlp.up_proj", note)])
    assert names == [f"raw:model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert bridge.get_hook_point(names[0]).ctx["seen"] == (2, 9, 64)


def test_gradients(bridge: Any, ids: Tensor) -> None:
    """A gradient at a raw point is that of the canonical point of the same place."""
    names = ["raw:model.layers.0.mlp", "blocks.0.mlp.hook_out"]
    with torch.enable_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=names, incl_bwd=True, return_type="loss")
    ours, theirs = (cache[f"{name}_grad"] for name in names)
    assert torch.equal(ours, theirs)
    assert ours.abs().max() > 0


def test_a_module_that_runs_twice(tiny: Any, ids: Tensor, plain: Any) -> None:
    """A module that is called several times shows each call; an edit there is one of all calls."""
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    bridge = TransformerBridge(tiny("albert", "masked"))
    model = bridge.original_model
    values: list[Tensor] = []
    bridge.run_with_hooks(
        ids, fwd_hooks=[(f"raw:{path}", lambda x, hook: values.append(x.clone()))]
    )
    seen = plain.read(model, ids, path)[path]
    assert len(seen) == 2
    assert [torch.equal(a, b) for a, b in zip(values, seen, strict=True)] == [True, True]
    found = bridge.run_with_hooks(ids, fwd_hooks=[(f"raw:{path}", lambda x, hook: x * 1.5)])
    assert torch.equal(found, plain.edited(model, ids, path, lambda x: x * 1.5))
