"""LensAPI: how one is had, and that having one changes nothing of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import InputError, TransformerBridge, demo
from lensbridge.methods import InterventionSpec, LensAPI

TEXT = "When Mary and John went to the shop, John gave a drink to"


def test_from_pretrained(demo_lens: LensAPI) -> None:
    """A folder's model and tokenizer are loaded, in float32, and answer as they do loaded by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.path())
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    assert demo_lens.model.dtype == torch.float32
    assert demo_lens.tokenizer.get_vocab() == tokenizer.get_vocab()
    scores = demo_lens.score(TEXT)
    with torch.no_grad():
        logits = model(scores.input_ids).logits
    torch.testing.assert_close(scores.logits, logits)
    assert tokenizer.decode(scores.input_ids[0], skip_special_tokens=True).strip() == TEXT
    likeliest = scores.final_token_logits().argmax(-1)
    assert tokenizer.decode(likeliest).strip() == "Mary"


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_from_pretrained_in_another_dtype(keyword: str) -> None:
    """dtype= and torch_dtype= both say in which dtype the parameters are."""
    lens = LensAPI.from_pretrained(demo.path(), **{keyword: torch.bfloat16})
    assert {p.dtype for p in lens.model.parameters()} == {torch.bfloat16}
    trace = lens.trace(texts=TEXT, sites=["block_output", "logits"])
    assert trace.get("block_output", 0).dtype == torch.bfloat16
    assert trace.layer_probs(0).dtype == torch.float32


def test_from_pretrained_passes_the_rest_on(tokenizer: Any) -> None:
    """Further keywords are those of boot_transformers."""
    lens = LensAPI.from_pretrained(
        demo.path(),
        device="cpu",
        attn_implementation="eager",
        tokenizer=tokenizer,
        load_weights=False,
    )
    assert lens.model.config._attn_implementation == "eager"
    assert lens.tokenizer is tokenizer
    with pytest.raises(InputError):
        LensAPI.from_pretrained(demo.path(), device="cpu", device_map="auto")


def test_of_a_model_or_a_bridge(
    tiny: Callable[..., nn.Module], tokenizer: Any, new_tokenizer: Callable[..., Any]
) -> None:
    """A model is wrapped with its tokenizer; a bridge is used as it is, and brings its own."""
    model = tiny("llama")
    lens = LensAPI(model, tokenizer, adapter="ignored")
    assert lens.model is model
    assert lens.tokenizer is tokenizer
    bridge = TransformerBridge(model, tokenizer)
    assert LensAPI(bridge).bridge is bridge
    assert LensAPI(bridge).tokenizer is tokenizer
    other = new_tokenizer()
    assert LensAPI(bridge, other).tokenizer is other
    assert LensAPI(model).tokenizer is None


def test_without_a_tokenizer(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """Ids need no tokenizer; text is refused and the message names what is missing."""
    lens = LensAPI(tiny("llama"))
    assert lens.score(input_ids=ids).logits.shape == (2, 9, 160)
    for call in (lambda: lens.score("x"), lambda: lens.trace(texts="x")):
        with pytest.raises(InputError, match="tokenizer"):
            call()


def test_what_it_says_of_itself(llama: LensAPI, tiny: Callable[..., nn.Module]) -> None:
    """Layers, heads and the model's name are told."""
    assert (llama.num_layers, llama.num_heads) == (2, 4)
    assert LensAPI(tiny("mamba")).num_heads is None
    assert repr(llama).startswith("LensAPI(TransformerBridge(LlamaForCausalLM: 2 layers")


def test_device(tiny: Callable[..., nn.Module]) -> None:
    """The model goes where it is told to go and nowhere else."""
    model = tiny("llama")
    LensAPI(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    lens = LensAPI(model, device="meta")
    assert lens.model is model
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_the_model_stays_as_it_was(
    tiny: Callable[..., nn.Module],
    ids: Tensor,
    tokenizer: Any,
    snapshot: Any,
    is_silent: Any,
    is_training: bool,
    is_frozen: bool,
) -> None:
    """Whatever is done with a lens, mode, frozen or not, gradients, values and hooks of the model stay."""
    model = tiny("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    model.train(is_training).requires_grad_(not is_frozen)
    before, random_state = snapshot(model), torch.random.get_rng_state()
    lens = LensAPI(model, tokenizer)
    assert snapshot(model) == before
    lens.trace(texts=["a text", "another"], sites=["pattern", "block_output", "logits"])
    lens.trace(input_ids=ids, detach=False, clone=False)
    lens.score(["a text", "another"]).perplexity()
    with lens.intervene(InterventionSpec("mlp_output", torch.zeros_like)):
        model(ids)
    loss_gradients = []
    with (
        lens.capture_gradients("transformer.h.0", "input") as inputs,
        lens.capture_gradients("blocks.1.hook_out") as outputs,
        lens.capture_backward_pre("lm_head") as heads,
        lens.tensor_grad_hook("blocks.0.hook_in") as tensors,
        lens.capture_kwargs_hook("transformer.h.1") as keywords,
    ):
        loss = model(ids).logits.square().mean()
        loss.backward()
    loss_gradients += [inputs, outputs, heads, tensors, keywords]
    assert all(len(found) == 1 for found in loss_gradients)
    assert all((p.grad is None) is is_frozen for p in model.parameters())
    model.zero_grad()
    assert snapshot(model) == before
    assert is_silent(lens.bridge)
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_a_training_model_is_read_in_training(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """A model in training mode is traced as it trains, dropout included: no mode is switched behind one's back."""
    model = tiny("gpt2", resid_pdrop=0.5).train()
    lens = LensAPI(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        expected = model(ids).logits
        torch.manual_seed(3)
        found = lens.trace(input_ids=ids, sites="block_output")
    torch.testing.assert_close(found.final_logits, expected.detach())
    assert not torch.allclose(found.final_logits, model.eval()(ids).logits, atol=0.01)


def test_lens_and_functions_agree(llama: LensAPI, ids: Tensor) -> None:
    """The methods look names up in this model; two lenses of one model see the same places."""
    other = LensAPI(llama.model)
    with (
        llama.capture_kwargs_hook("blocks.1.attn.hook_out") as one,
        other.capture_kwargs_hook("model.layers.1.self_attn") as two,
        torch.no_grad(),
    ):
        llama.model(ids)
    assert one[0]["hidden_states"] is two[0]["hidden_states"]
    found = other.trace(input_ids=ids, sites="pattern").get("pattern", 0)
    assert torch.equal(found, llama.trace(input_ids=ids, sites="pattern").get("pattern", 0))
