"""Weight processing: the same function, norms that only normalise, a Hugging Face model as before.

Log-probabilities are compared with those of the bare Hugging Face model; the tiny models of `build_tiny` have
random norm weights and biases, so that a norm that is not folded, or folded into too few layers, shows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import ArchitectureError, InputError, TransformerBridge

MUST_HOLD = ("gpt2", "llama", "gemma2", "gpt_neox")
OTHERS = (
    "phi",  # one norm for two branches
    "phi3",  # joint projections
    "cohere",  # a LayerNorm without bias, read by both branches, tied
    "mixtral",  # router and experts
    "gpt_oss",  # experts with weights the other way round; sinks
    "llama4_text",  # tokens scaled before the experts read them
    "gptj",  # biases of the norm have nowhere to go
    "opt",
    "falcon",
    "bloom",
    "mamba",
)
STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


def log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.log_softmax(-1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def only(step: str, flag: bool | None = True) -> dict[str, Any]:
    """Keywords for one step alone."""
    return {name: flag if name == step else False for name in STEPS}


def fronts(bridge: TransformerBridge) -> Iterator[tuple[str, nn.Module]]:
    """The norms in front of branches and head, by path."""
    model, found = bridge.unwrapped_model, {}
    for block in bridge.architecture.blocks:
        for branch in block.branches:
            if branch.ln is not None and branch.place == "before":
                found[branch.ln.path] = model.get_submodule(branch.ln.path)
    last = bridge.architecture.main.ln_final
    if last is not None:
        found[last.path] = model.get_submodule(last.path)
    yield from found.items()


def only_normalised(module: nn.Module, x: Tensor, eps: float) -> Tensor:
    """LayerNorm or RMSNorm without weights, by hand."""
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def eps_of(module: nn.Module) -> float:
    return next(getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n))


# --- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUST_HOLD)
def test_log_probabilities_stay_and_norms_are_identities(
    name: str, tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    model = tiny(name)
    bridge = TransformerBridge(model)
    before, expected = snapshot(model), log_probs(model, ids)
    # The norms of these models do matter: left out, they change the answer.
    without = copy.deepcopy(model)
    for path, _ in fronts(bridge):
        norm: Any = without.get_submodule(path)
        norm.weight.data.fill_(0.0 if name == "gemma2" else 1.0)
    assert (log_probs(without, ids) - expected).abs().max() > 1e-2

    processed = bridge.process_weights(fold_ln=True)
    plain = processed.unwrapped_model
    assert processed.processed is not None
    assert "fold_ln" in processed.processed.done
    assert (log_probs(plain, ids) - expected).abs().max() < 1e-4
    x = torch.randn(3, processed.cfg.d_model, generator=torch.Generator().manual_seed(0)) * 3 + 1
    count = 0
    for path, norm in fronts(processed):
        stays = torch.zeros(processed.cfg.d_model)
        if path in ("transformer.ln_f", "gpt_neox.final_layer_norm"):
            # The head has no bias: what the norm adds stays, in units of what the head reads.
            old = bridge.unwrapped_model.get_submodule(path)
            stays = (old.bias / old.weight).detach()
        with torch.no_grad():
            made = norm(x)
        assert torch.allclose(made, only_normalised(norm, x, eps_of(norm)) + stays, atol=1e-5)
        offset = 1.0 if name == "gemma2" else 0.0
        assert torch.equal(norm.weight + offset, torch.ones_like(norm.weight))
        count += 1
    assert count == 5
    assert processed.verify().holds
    assert type(plain) is type(model)
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(log_probs(model, ids), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str, tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    model = tiny(name)
    expected = log_probs(model, ids)
    processed = TransformerBridge(model).process_weights(refactor_factored_attn_matrices=None)
    plain = processed.unwrapped_model
    assert processed.processed is not None
    assert "fold_ln" in processed.processed.done
    assert "fold_ln" not in processed.processed.left
    assert (log_probs(plain, ids) - expected).abs().max() < 1e-4
    for _, norm in fronts(processed):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_nothing_stays_of_a_norm_with_biases_to_take_it(
    tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    processed = TransformerBridge(tiny("gpt2")).process_weights()
    for path, norm in fronts(processed):
        assert bool((norm.bias == 0).all()) == (path != "transformer.ln_f")
    assert processed.processed is not None
    assert set(processed.processed.notes["fold_ln"]) == {"ln_final"}
    assert "lm_head has no bias" in processed.processed.notes["fold_ln"]["ln_final"]
    biasless = TransformerBridge(tiny("gptj")).process_weights(**only("fold_ln"))
    assert biasless.processed is not None
    assert "k_proj has no bias" in biasless.processed.notes["fold_ln"]["blocks.0.ln1"]


def test_norms_behind_a_branch_are_left_and_said(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("gemma2")
    processed = TransformerBridge(model).process_weights(**only("fold_ln"))
    assert processed.processed is not None
    notes = processed.processed.notes["fold_ln"]
    assert set(notes) == {f"blocks.{i}.ln{n}_post" for i in (0, 1) for n in (1, 2)}
    assert "added to the stream" in notes["blocks.0.ln1_post"]
    path = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(processed.unwrapped_model.get_parameter(path), model.get_parameter(path))


def test_what_is_written_has_no_mean(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    for name in ("gpt2", "gpt_neox"):
        model = tiny(name)
        expected = log_probs(model, ids)
        bridge = TransformerBridge(model)
        processed = bridge.process_weights(**only("center_writing_weights"))
        assert (log_probs(processed.unwrapped_model, ids) - expected).abs().max() < 1e-4
        for one, least in ((processed, 0.0), (bridge, 1e-3)):
            _, cache = one.run_with_cache(ids)
            mean = cache["resid_post", -1].mean(-1).abs().max()
            assert mean < 1e-5 if one is processed else mean > least


def test_head_without_a_mean_shifts_logits_by_a_constant(
    tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    with torch.no_grad():
        expected = model(ids).logits
        processed = TransformerBridge(model).process_weights(**only("center_unembed"))
        logits = processed.unwrapped_model(ids).logits
    assert logits.mean(-1).abs().max() < 1e-5
    shift = expected - logits
    assert (shift - shift.mean(-1, keepdim=True)).abs().max() < 1e-4
    assert shift.abs().max() > 1e-3


def test_value_biases_move_to_the_output(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    model: Any = tiny("llama_bias")  # grouped heads with biases everywhere
    expected = log_probs(model, ids)
    processed = TransformerBridge(model).process_weights(**only("fold_value_biases"))
    plain: Any = processed.unwrapped_model
    assert (log_probs(plain, ids) - expected).abs().max() < 1e-4
    for old, new in zip(model.model.layers, plain.model.layers, strict=True):
        assert old.self_attn.v_proj.bias.abs().max() > 0.1
        assert not new.self_attn.v_proj.bias.any()
        assert torch.equal(old.self_attn.q_proj.bias, new.self_attn.q_proj.bias)
        bias = old.self_attn.v_proj.bias.view(2, -1).repeat_interleave(2, 0).flatten()
        moved = old.self_attn.o_proj.bias + old.self_attn.o_proj.weight @ bias
        assert torch.allclose(new.self_attn.o_proj.bias, moved, atol=1e-5)
    gpt2 = TransformerBridge(tiny("gpt2")).process_weights(fold_ln=True, fold_value_biases=True)
    width = gpt2.cfg.d_model
    for layer in gpt2.unwrapped_model.transformer.h:
        assert not layer.attn.c_attn.bias[2 * width :].any()
        assert layer.attn.c_attn.bias[: 2 * width].any()


def test_factors_of_heads_are_made_even(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    model: Any = tiny("gpt2")
    expected = log_probs(model, ids)
    processed = TransformerBridge(model).process_weights(
        **{**only("refactor_factored_attn_matrices"), "fold_value_biases": True}
    )
    plain: Any = processed.unwrapped_model
    assert (log_probs(plain, ids) - expected).abs().max() < 1e-4
    d, n = processed.cfg.d_model, processed.cfg.n_heads
    assert n is not None
    old, new = model.transformer.h[0].attn, plain.transformer.h[0].attn
    width = d // n
    for head in range(n):
        at = slice(head * width, (head + 1) * width)
        # OV: the same product, factors alike.
        v_old, v_new = (x.c_attn.weight[:, 2 * d :][:, at] for x in (old, new))
        o_old, o_new = (x.c_proj.weight[at] for x in (old, new))
        assert torch.allclose(v_old @ o_old, v_new @ o_new, atol=1e-4)
        gram = v_new.T @ v_new
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-4)
        assert torch.allclose(gram, o_new @ o_new.T, atol=1e-4)
        assert not torch.allclose(v_old.T @ v_old, o_old @ o_old.T, atol=1e-1)
        # QK with its biases as one more row.
        pairs = []
        for x in (old, new):
            q, k = (
                torch.cat([x.c_attn.weight[:, s][:, at], x.c_attn.bias[s][at][None]])
                for s in (slice(0, d), slice(d, 2 * d))
            )
            pairs.append((q, k))
        (q_old, k_old), (q_new, k_new) = pairs
        assert torch.allclose(q_old @ k_old.T, q_new @ k_new.T, atol=1e-4)
        assert torch.allclose(q_new.T @ q_new, k_new.T @ k_new, atol=1e-4)


# --- still a Hugging Face model ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("gemma2", True), ("llama", False)])
def test_checkpoints(
    name: str, tied: bool, tiny: Callable[..., nn.Module], ids: Tensor, tmp_path: Any
) -> None:
    model: Any = tiny(name)
    assert bool(model.config.tie_word_embeddings) == tied
    plain: Any = TransformerBridge(model).process_weights().unwrapped_model
    assert not plain.config.tie_word_embeddings
    assert bool(model.config.tie_word_embeddings) == tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    expected = log_probs(plain, ids)
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(log_probs(again.eval(), ids), expected)
    fresh = type(model)(plain.config).eval()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(log_probs(fresh, ids), expected)
    original = copy.deepcopy(model.state_dict())
    fresh.load_state_dict(original)
    assert torch.allclose(log_probs(fresh, ids), log_probs(model, ids), atol=1e-5)


def test_ties_are_kept_where_nothing_on_them_changes(tiny: Callable[..., nn.Module]) -> None:
    model: Any = tiny("gpt2")
    processed = TransformerBridge(model).process_weights(**only("fold_value_biases"))
    plain: Any = processed.unwrapped_model
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert plain.config.tie_word_embeddings


def test_in_place(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    model = tiny("gpt_neox")
    model.train()
    model.get_submodule("gpt_neox.layers.0").eval()
    modes = [module.training for module in model.modules()]
    parameters = dict(model.named_parameters())
    first = next(iter(parameters.values()))
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)
    bridge = TransformerBridge(model)
    copied = bridge.process_weights()
    assert bridge.processed is None
    same = bridge.process_weights(in_place=True)
    assert same is bridge
    assert bridge.processed == copied.processed
    assert [module.training for module in model.modules()] == modes
    assert dict(model.named_parameters()) == parameters
    assert not first.requires_grad
    assert first.grad is not None
    assert torch.equal(first.grad, torch.ones_like(first))
    assert not any("hook" in key for key in vars(model) if vars(model)[key] and "hooks" in key)
    for key, value in copied.unwrapped_model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_twice_is_once(tiny: Callable[..., nn.Module]) -> None:
    once = TransformerBridge(tiny("llama")).process_weights(fold_ln=True)
    twice = once.process_weights(fold_ln=True)
    for key, value in once.unwrapped_model.state_dict().items():
        assert torch.allclose(twice.unwrapped_model.state_dict()[key], value, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_it_did(
    dtype: torch.dtype, tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    for name in MUST_HOLD:
        exact = log_probs(tiny(name), ids)
        half = tiny(name).to(dtype)
        before = (log_probs(half, ids) - exact).abs().mean()
        processed = TransformerBridge(half).process_weights().unwrapped_model
        assert all(p.dtype == dtype for p in processed.parameters())
        after = (log_probs(processed, ids) - exact).abs().mean()
        assert after < 2 * before


def test_compiled_model(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    model = tiny("gpt2")
    expected = log_probs(model, ids)
    bridge = TransformerBridge(torch.compile(model, backend="eager"))
    processed = bridge.process_weights(fold_ln=True)
    assert (log_probs(processed.unwrapped_model, ids) - expected).abs().max() < 1e-4


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "step", "said"),
    [
        ("llama", "causal", "center_writing_weights", "RMSNorm"),
        ("gemma2", "causal", "center_unembed", "soft cap"),
        ("gpt_oss", "causal", "fold_value_biases", "sink"),
        ("qwen2", "causal", "fold_value_biases", "o_proj has no bias"),
        ("bert", "masked", "fold_ln", "no norm stands between"),
        ("rwkv", "causal", "fold_ln", "not read by linear layers alone"),
        ("longcat_flash", "causal", "fold_ln", "not read by linear layers alone"),
        ("whisper", "causal", "fold_ln", "was not used in the watched run"),
        ("umt5", "seq2seq", "fold_ln", "computes something else when its config says"),
        ("roberta-prelayernorm", "textenc", "fold_ln", "what the model returns"),
        ("llama", "causal", "refactor_factored_attn_matrices", "share values in groups"),
        ("openai-gpt", "causal", "center_writing_weights", "its mean matters"),
    ],
)
def test_what_is_not_exact_is_refused(
    name: str, kind: str, step: str, said: str, tiny: Callable[..., nn.Module]
) -> None:
    model = tiny(name, kind)
    bridge = TransformerBridge(model)
    before = snapshot(model)
    config = copy.deepcopy(model.config.to_dict())
    assert said in bridge.can_process()[step]
    with pytest.raises(ArchitectureError, match="without changing what the model computes") as told:
        bridge.process_weights(**only(step), in_place=True)
    assert step in str(told.value)
    assert said in str(told.value)
    assert bridge.processed is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config


def test_can_process(tiny: Callable[..., nn.Module]) -> None:
    assert set(TransformerBridge(tiny("gpt2")).can_process().values()) == {""}
    told = TransformerBridge(tiny("llama")).can_process()
    assert list(told) == list(STEPS)
    assert [step for step, why in told.items() if not why] == [
        "fold_ln",
        "center_unembed",
        "fold_value_biases",
    ]


def test_one_refusal_stops_everything(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(ArchitectureError, match="can be done wholly: fold_ln, center_unembed"):
        TransformerBridge(model).process_weights(center_writing_weights=True, in_place=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_none_of_it_possible(tiny: Callable[..., nn.Module]) -> None:
    with pytest.raises(ArchitectureError, match="none of"):
        TransformerBridge(tiny("gemma3n_text")).process_weights()


def test_a_matrix_with_another_use_is_not_scaled(
    tiny: Callable[..., nn.Module], ids: Tensor
) -> None:
    """The same linear layer behind two norms: folding either would change the other."""
    model: Any = tiny("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    bridge = TransformerBridge(model)
    expected = log_probs(model, ids)
    assert "also multiplies something" in bridge.can_process()["fold_ln"]
    processed = bridge.process_weights(**only("fold_ln", None))
    assert processed.processed is not None
    assert set(processed.processed.left["fold_ln"]) == {"blocks.0.ln2", "blocks.1.ln2"}
    assert (log_probs(processed.unwrapped_model, ids) - expected).abs().max() < 1e-4


def test_a_reader_that_is_no_layer_is_seen(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    """What a norm makes is used in an operation between modules: only watching operations shows that."""
    model: Any = tiny("llama")
    mlp = model.model.layers[0].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x) + 0.5 * x.tanh()
    bridge = TransformerBridge(model)
    expected = log_probs(model, ids)
    processed = bridge.process_weights(**only("fold_ln", None))
    assert processed.processed is not None
    left = processed.processed.left["fold_ln"]
    assert set(left) == {"blocks.0.ln2"}
    assert "tanh in model.layers.0.mlp" in left["blocks.0.ln2"]
    plain_model = processed.unwrapped_model
    plain_model.model.layers[0].mlp.forward = lambda x: (
        plain(plain_model.model.layers[0].mlp, x) + 0.5 * x.tanh()
    )
    assert (log_probs(plain_model, ids) - expected).abs().max() < 1e-4


def test_weights_that_cannot_be_written(tiny: Callable[..., nn.Module]) -> None:
    quantised = tiny("llama")
    bridge = TransformerBridge(quantised)
    quantised.config.quantization_config = {"quant_method": "made up"}
    with pytest.raises(ArchitectureError, match="quantised"):
        bridge.process_weights()
    away = tiny("llama")
    bridge = TransformerBridge(away)
    away.to("meta")
    with pytest.raises(ArchitectureError, match="not loaded"):
        bridge.process_weights()
    with torch.inference_mode():
        made = tiny("llama")
    with pytest.raises(ArchitectureError, match="inference_mode"):
        TransformerBridge(made).process_weights()


def test_hooks_that_are_set(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("gpt2")
    before = snapshot(model)
    bridge = TransformerBridge(model)
    bridge.add_perma_hook("blocks.0.hook_out", lambda x, hook: 0 * x)
    with pytest.raises(InputError, match="hooks are set"):
        bridge.process_weights(in_place=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    bridge.reset_hooks(including_permanent=True)
    bridge.process_weights(in_place=True)


# --- TransformerLens's name ----------------------------------------------------------------------


def test_compatibility_mode(tiny: Callable[..., nn.Module], ids: Tensor) -> None:
    model = tiny("llama")
    expected, before = log_probs(model, ids), snapshot(model)
    bridge = TransformerBridge(model)
    assert bridge.enable_compatibility_mode(no_processing=True) is bridge
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="center_writing_weights: not done"):
        assert bridge.enable_compatibility_mode() is bridge
    assert (log_probs(model, ids) - expected).abs().max() < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TransformerBridge(tiny("llama")).enable_compatibility_mode(disable_warnings=True)
        TransformerBridge(tiny("gpt2")).enable_compatibility_mode()
