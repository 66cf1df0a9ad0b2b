"""Quantised models on the CPU: activations are the quantised model's own, edits act, weights come out as matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import TransformerBridge

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def bitsandbytes(**options: Any) -> Any:
    """One of bitsandbytes's."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


HOW: dict[str, Callable[[], Any]] = {
    "bitsandbytes 8 bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4 bit": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
    ),
}


@pytest.fixture(scope="module", params=HOW)
def model(
    request: pytest.FixtureRequest, tiny: Callable[..., nn.Module], tmp_path_factory: Any
) -> Any:
    """A tiny Llama whose linear layers are quantised."""
    from transformers import LlamaForCausalLM

    folder: Path = tmp_path_factory.mktemp("whole")
    whole: Any = tiny("llama")
    whole.save_pretrained(folder)
    made = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=HOW[request.param](), dtype=torch.float32
    )
    layer = made.model.layers[0].self_attn.q_proj
    assert type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter
    return made.eval()


@pytest.fixture(scope="module")
def bridge(model: Any) -> TransformerBridge:
    return TransformerBridge(model)


PLACES = {
    "blocks.0.hook_out": ("model.layers.0", False),
    "blocks.1.hook_attn_out": ("model.layers.1.self_attn", False),
    "blocks.1.hook_mlp_out": ("model.layers.1.mlp", False),
    "blocks.1.attn.q.hook_out": ("model.layers.1.self_attn.q_proj", False),
    "blocks.0.attn.o.hook_in": ("model.layers.0.self_attn.o_proj", True),
    "blocks.0.mlp.out.hook_in": ("model.layers.0.mlp.down_proj", True),
    "ln_final.hook_out": ("model.norm", False),
}


@torch.no_grad()
def test_activations(model: Any, bridge: TransformerBridge, ids: Tensor) -> None:
    """Bit for bit what plain hooks on the quantised model see; the pattern's rows sum to one."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, (path, is_input) in PLACES.items():

        def keep(
            module: nn.Module,
            args: Any,
            kwargs: Any,
            out: Any,
            name: str = name,
            is_input: bool = is_input,
        ) -> None:
            shown = args[0] if is_input else out
            seen[name] = (shown if isinstance(shown, Tensor) else shown[0]).clone()

        handles.append(model.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
    expected = model(ids).logits
    for handle in handles:
        handle.remove()
    logits, cache = bridge.run_with_cache(ids, names_filter=list(PLACES))
    assert torch.equal(logits, expected)
    for name, value in seen.items():
        assert torch.equal(cache[name].flatten(2), value), name
    _, opened = bridge.run_with_cache(ids, names_filter="**.hook_pattern")
    pattern = opened["pattern", 0]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))


@torch.no_grad()
def test_edits(model: Any, bridge: TransformerBridge, ids: Tensor) -> None:
    """Doubling an MLP's output equals the same by a plain hook; a generation with it too."""

    def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * 2

    edit = [("blocks.0.hook_mlp_out", lambda x, hook: x * 2)]
    handle = model.model.layers[0].mlp.register_forward_hook(double)
    expected = model(ids).logits
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    handle.remove()
    assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=edit), expected)
    with bridge.hooks(edit):
        assert torch.equal(bridge.generate(ids, max_new_tokens=4, do_sample=False), text)
    assert not torch.equal(bridge(ids), expected)


@torch.no_grad()
def test_weights_are_what_the_layers_do(bridge: TransformerBridge, ids: Tensor) -> None:
    """``x @ W`` is what the layer made, as near as it rounds; heads' results sum to what attention made."""
    names = [
        "blocks.0.attn.q.hook_in",
        "blocks.0.attn.q.hook_out",
        "blocks.0.attn.hook_result",
        "blocks.0.attn.o.hook_out",
    ]
    _, cache = bridge.run_with_cache(ids, names_filter=names)
    made = torch.einsum(
        "bpd,hde->bphe", cache[names[0]].float(), bridge.weight("blocks.0.attn.W_Q").float()
    )
    for own, whole in ((made, cache[names[1]]), (cache[names[2]].sum(-2), cache[names[3]])):
        off = (own.float() - whole.float()).norm() / whole.float().norm()
        assert off < 0.05
