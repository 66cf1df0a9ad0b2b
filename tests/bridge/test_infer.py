"""What one watched run shows: norm places, sums of the stream, factors, silent and overwritten places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import TransformerBridge
from lensbridge.bridge.infer import architecture_of
from lensbridge.bridge.trace import trace

SETTLED = {
    # name -> (ln1, ln1_post, ln2, ln2_post), parallel, post-norm
    "llama": (("input_layernorm", None, "post_attention_layernorm", None), False, False),
    "gemma2": (
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        False,
        False,
    ),
    "olmo2": ((None, "post_attention_layernorm", None, "post_feedforward_layernorm"), False, False),
    "glm4": (
        (
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
        False,
        False,
    ),
    "phi": (("input_layernorm", None, None, None), True, False),
    "gpt_neox": (("input_layernorm", None, "post_attention_layernorm", None), True, False),
    "openai-gpt": (("ln_1", None, "ln_2", None), False, True),
}


@pytest.mark.parametrize("name", sorted(SETTLED))
def test_norms_and_order(tiny: Any, name: str) -> None:
    """Where the norms stand, as the modelling code has it."""
    norms, is_parallel, is_post_norm = SETTLED[name]
    block = architecture_of(tiny(name)).blocks[1]
    found: dict[str, Any] = dict.fromkeys(("ln1", "ln1_post", "ln2", "ln2_post"))
    for branch in block.branches:
        found[f"ln{branch.number}"] = branch.ln
        found[f"ln{branch.number}_post"] = branch.ln_post
    names = tuple(n and n.path.removeprefix(block.path + ".") for n in found.values())
    assert names == norms
    assert block.is_parallel == is_parallel
    assert all((branch.place == "after") == is_post_norm for branch in block.branches)
    assert block.unproved == ""


def test_residual_factor(tiny: Any, ids: Tensor) -> None:
    """A model that scales what its branches add says by how much, and the identity holds with it."""
    bridge = TransformerBridge(tiny("granite", residual_multiplier=0.25))
    block = bridge.architecture.blocks[0]
    assert [(branch.skip, branch.scale) for branch in block.branches] == [(1.0, 0.25)] * 2
    _, cache = bridge.run_with_cache(ids)
    total = cache["resid_pre", 0] + 0.25 * cache["attn_out", 0]
    torch.testing.assert_close(total, cache["resid_mid", 0])
    assert bridge.verify().holds


@pytest.mark.parametrize(
    "name",
    ["bloom", "falcon", "gpt_oss", "xglm", "bart", "bert", "mixtral", "mamba", "deepseek_v3"],
)
def test_proved(tiny: Any, name: str) -> None:
    """One of each kind: stream added inside a part, overwritten values, sinks, folded heads, norms behind."""
    proof = TransformerBridge(tiny(name)).verify()
    assert proof.holds, str(proof)


def test_overwritten_values_are_copied(tiny: Any, ids: Tensor) -> None:
    """Falcon adds attention's output into the MLP's, in place; the cache has what the MLP made."""
    model = tiny("falcon")
    bridge = TransformerBridge(model)
    kept: list[Tensor] = []
    mlp = model.get_submodule(bridge.architecture.blocks[0].mlp.path)
    handle = mlp.register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    _, cache = bridge.run_with_cache(ids)
    handle.remove()
    assert bridge.get_hook_point("blocks.0.mlp.hook_out").is_volatile
    assert torch.equal(cache["blocks.0.mlp.hook_out"], kept[0])


def test_edit_of_mid_in_a_post_norm_model(tiny: Any, ids: Tensor) -> None:
    """With norms behind the sums, hook_resid_mid is what the first norm reads."""
    model = tiny("openai-gpt")
    bridge = TransformerBridge(model)
    norm = model.get_submodule(bridge.architecture.blocks[0].branches[0].ln.path)
    handle = norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = model(ids).logits
    handle.remove()
    double = [("blocks.0.hook_resid_mid", lambda x, hook: x * 2)]
    assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=double), expected)


class Odd(nn.Module):
    """Sums that are and are not a block's."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
        self.block.forward = self.run

    def run(self, x: Tensor) -> Tensor:
        """x + one(x) / 2 + two(x), the second in place."""
        x = x + self.block["one"](x).clone().view_as(x) * 0.5
        x += nn.functional.dropout(self.block["two"](x), 0.3, training=False)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return self.block(x)


def test_sums_are_read_off() -> None:
    """Additions, factors, casts, reshapes, idle dropout and work in place are followed."""
    model = Odd()
    seen = trace(model, frozenset({"block"}), lambda: model(torch.randn(2, 4, 3)))
    one, two, block = (seen.one(path) for path in ("block.one", "block.two", "block"))
    assert one is not None
    assert two is not None
    assert block is not None
    made_one, made_two = next(iter(one.terms_out or {})), next(iter(two.terms_out or {}))
    assert one.terms_in == {"into block": 1.0}
    assert two.terms_in == {"into block": 1.0, made_one: 0.5}
    assert block.terms_out == {"into block": 1.0, made_one: 0.5, made_two: 1.0}


def test_the_users_model_is_not_run(tiny: Any) -> None:
    """Settling looks at a twin: hooks on the user's model see nothing, and its weights stay where they are."""
    model = tiny("llama", num_hidden_layers=5)
    seen: list[Any] = []
    model.register_forward_hook(lambda *args: seen.append(args))
    pointers = [p.data_ptr() for p in model.parameters()]
    assert TransformerBridge(model).architecture.unproved == ""
    assert seen == []
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize(("name", "scale"), [("t5gemma", 8.0), ("t5", 1.0)])
def test_embedding_scale(tiny: Any, name: str, scale: float) -> None:
    """Gemma multiplies embeddings by the root of d_model."""
    bridge = TransformerBridge(tiny(name, "seq2seq"))
    assert [tower.embed_scale for tower in bridge.architecture.towers] == [scale, scale]


@pytest.mark.parametrize("name", ["xlm", "flaubert"])
def test_a_model_without_layer_modules(tiny: Any, name: str, ids: Tensor) -> None:
    """Its row says so: it boots, has no blocks, and its parts are reached under their own names."""
    model = tiny(name, "masked")
    bridge = TransformerBridge(model)
    assert len(bridge.blocks) == 0
    assert torch.equal(bridge(ids), model(ids).logits)
    kept: list[Tensor] = []
    part = model.transformer.attentions[1]
    handle = part.register_forward_hook(lambda module, args, out: kept.append(out[0]))
    _, cache = bridge.run_with_cache(ids, names_filter=["raw:transformer.attentions.1"])
    handle.remove()
    assert torch.equal(cache["raw:transformer.attentions.1"], kept[0])


def test_projector(tiny: Any, inputs_of: Any) -> None:
    """What carries images to the text model has points; an edit there is the edit by hand."""
    model, inputs = tiny("llava", "vlm"), inputs_of("llava", "vlm")
    bridge = TransformerBridge(model, example=inputs)
    module = model.get_submodule(dict(bridge.architecture.projectors)["multi_modal_projector"])
    handle = module.register_forward_hook(lambda module, args, out: out * 0)
    expected = model(**inputs).logits
    handle.remove()
    zero = [("projector.hook_out", lambda x, hook: x * 0)]
    found = bridge.run_with_hooks(fwd_hooks=zero, **inputs)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(**inputs).logits)
