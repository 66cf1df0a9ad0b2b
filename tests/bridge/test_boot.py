"""Getting a model: from a checkpoint folder through transformers, or small and new from a config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import BridgeConfig, InputError, TransformerBridge

boot = TransformerBridge.boot_transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any, tiny: Callable[..., Any], tokenizer: Any) -> dict[str, Path]:
    """Checkpoint folders of two families, tokenizer included."""
    made = {}
    for name in ("gpt2", "llama"):
        made[name] = tmp_path_factory.mktemp(name)
        tiny(name).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture(params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(folders: dict[str, Path], family: str) -> str:
    return str(folders[family])


@pytest.fixture
def expected(tiny: Any, family: str, ids: Tensor) -> Tensor:
    """Logits of the model that was saved."""
    return tiny(family)(ids).logits


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["boot_transformers", "from_pretrained"])
def test_boots_a_folder(folder: str, family: str, ids: Tensor, expected: Tensor, how: str) -> None:
    """The saved weights in float32, in eval mode, with the saved tokenizer, described by cfg."""
    bridge = getattr(TransformerBridge, how)(folder)
    assert torch.equal(bridge(ids), expected)
    assert not bridge.training
    assert bridge.dtype == bridge.cfg.dtype == torch.float32
    assert bridge.tokenizer is not None
    assert bridge.to_tokens("ab").tolist() == [[1, 14, 15]]
    cfg = bridge.cfg
    assert (cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_vocab, cfg.n_ctx) == (
        64,
        2,
        4,
        16,
        160,
        64,
    )
    assert cfg.d_mlp == {"gpt2": 256, "llama": 64}[family]
    assert cfg.n_key_value_heads == {"gpt2": 4, "llama": 2}[family]
    assert cfg.act_fn == {"gpt2": "gelu_new", "llama": "silu"}[family]
    assert cfg.normalization_type == {"gpt2": "LN", "llama": "RMS"}[family]
    assert cfg.positional_embedding_type == {"gpt2": "standard", "llama": "rotary"}[family]
    assert cfg.gated_mlp == {"gpt2": False, "llama": True}[family]
    assert cfg.eps == pytest.approx({"gpt2": 1e-5, "llama": 1e-6}[family])
    assert cfg.architecture == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family]
    assert cfg.model_type == family
    assert cfg.model_name == folder
    assert cfg.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(folder: str, ids: Tensor, dtype: torch.dtype) -> None:
    """dtype is that of every parameter, as when transformers loads in it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    bridge = boot(folder, dtype=dtype)
    assert {p.dtype for p in bridge.parameters()} == {dtype}
    assert bridge.cfg.dtype == dtype
    assert torch.equal(bridge(ids), model(ids).logits)


def test_float32_whatever_was_saved(tiny: Any, family: str, tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint in bfloat16 is loaded in float32 unless something else is asked for."""
    tiny(family).to(torch.bfloat16).save_pretrained(tmp_path)
    assert boot(str(tmp_path), tokenizer=tokenizer).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_device(folder: str, ids: Tensor, expected: Tensor, device: Any) -> None:
    """By name or as a torch.device."""
    bridge = boot(folder, device=device)
    assert bridge.device == torch.device("cpu")
    assert torch.equal(bridge(ids), expected)


def test_config_overrides(folder: str, family: str, tiny: Any, ids: Tensor) -> None:
    """Overrides are in the model's config when it is built, and change what it computes."""
    name = {"gpt2": "layer_norm_epsilon", "llama": "rms_norm_eps"}[family]
    bridge = boot(folder, hf_config_overrides={name: 0.5})
    assert bridge.cfg.eps == 0.5
    assert getattr(bridge.original_model.config, name) == 0.5
    assert torch.equal(bridge(ids), tiny(family, **{name: 0.5})(ids).logits)


def test_n_ctx(folders: dict[str, Path]) -> None:
    """The context length in the config, where cfg and truncation find it."""
    bridge = boot(str(folders["llama"]), n_ctx=16)
    assert bridge.cfg.n_ctx == 16
    assert bridge.original_model.config.max_position_embeddings == 16
    assert bridge.to_tokens("a" * 40).shape == (1, 16)


def test_load_weights_false(folder: str, family: str, ids: Tensor, expected: Tensor) -> None:
    """The architecture of the config with new weights; a longer context is possible then."""
    bridge = boot(folder, load_weights=False, n_ctx=128)
    assert bridge.cfg.n_ctx == 128
    assert not bridge.training
    assert not torch.equal(bridge(ids), expected)
    assert bridge(torch.ones(1, 100, dtype=torch.long)).shape == (1, 100, 160)
    shallow = boot(
        folder,
        load_weights=False,
        hf_config_overrides={"num_hidden_layers": 1},
        dtype=torch.bfloat16,
    )
    assert shallow.cfg.n_layers == 1
    assert shallow.dtype == torch.bfloat16


def test_tokenizer(folder: str, new_tokenizer: Any, tmp_path: Path, tiny: Any, family: str) -> None:
    """A tokenizer that is given is used as it is, and then the folder needs none."""
    own = new_tokenizer(padding_side="left")
    assert boot(folder, tokenizer=own).tokenizer is own
    tiny(family).save_pretrained(tmp_path)
    assert boot(str(tmp_path), tokenizer=own).tokenizer is own


def test_model_class(folder: str, family: str, tiny: Any, ids: Tensor) -> None:
    """The class to load with: a trunk without a head, say."""
    import transformers

    kind = {"gpt2": transformers.GPT2Model, "llama": transformers.LlamaModel}[family]
    bridge = boot(folder, model_class=kind)
    assert type(bridge.original_model) is kind
    hidden = tiny(family).base_model(ids).last_hidden_state
    assert torch.equal(
        bridge.run_with_cache(ids, return_type=None)[1]["blocks.0.hook_in"],
        tiny(family)(ids, output_hidden_states=True).hidden_states[0],
    )
    _, cache = bridge.run_with_cache(ids, return_type=None, names_filter="ln_final.hook_out")
    assert torch.equal(cache["ln_final.hook_out"], hidden)


def test_hf_keywords(folder: str, ids: Tensor) -> None:
    """Anything else goes to from_pretrained."""
    bridge = boot(folder, attn_implementation="eager")
    assert bridge.original_model.config._attn_implementation == "eager"


def test_hf_model(tiny: Any, family: str, tokenizer: Any, ids: Tensor, expected: Tensor) -> None:
    """A loaded model is wrapped as it is; the name is not looked up; dtype casts it."""
    model = tiny(family)
    bridge = boot("no/such-model", hf_model=model, tokenizer=tokenizer)
    assert bridge.original_model is model
    assert bridge.tokenizer is tokenizer
    assert torch.equal(bridge(ids), expected)
    assert boot("no/such-model", hf_model=model, dtype=torch.float64).dtype == torch.float64
    assert boot("no/such-model", hf_model=model).tokenizer is None


def test_a_training_model_stays_one(tiny: Any) -> None:
    """Wrapping changes no mode; loading gives eval mode."""
    model = tiny("llama").train()
    assert TransformerBridge(model).training
    assert model.training


# --- device maps ------------------------------------------------------------------------------------------

PARTS = {
    "gpt2": [
        "transformer.wte",
        "transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
        "lm_head",
    ],
    "llama": [
        "model.embed_tokens",
        "model.rotary_emb",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ],
}


def check_as_usual(bridge: Any, family: str, byhand: Any, tiny: Any, ids: Tensor) -> None:
    """A dispatched model gives the same values, takes the same edits, and stops and starts like any other."""
    hand = byhand.ByHand(tiny(family), family)
    with torch.no_grad():
        assert torch.equal(bridge(ids), hand.logits(ids))
        logits, cache = bridge.run_with_cache(
            ids, names_filter=lambda name: not byhand.is_inside(name)
        )
        assert torch.equal(logits, hand.logits(ids))
        wrong = [name for name in cache if byhand.gap(cache[name], hand.read(name, ids)) > 5e-6]
        assert not wrong
        _, opened = bridge.run_with_cache(ids, names_filter=byhand.is_inside)
        wrong = [name for name in opened if byhand.gap(opened[name], hand.read(name, ids)) > 5e-6]
        assert not wrong
        wrong = []
        for name in bridge.registry:
            if not name.startswith(("blocks.1", "unembed", "ln_final")) or name.endswith("scale"):
                continue
            edited = bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x * 0.5)])
            with hand.editing(name, lambda x: x * 0.5):
                if byhand.gap(edited, hand.logits(ids)) > 1e-5:
                    wrong.append(name)
        assert not wrong
        residual = bridge(ids, stop_at_layer=1)
        assert torch.equal(residual, hand.read("blocks.0.hook_out", ids))
        assert torch.equal(bridge(residual, start_at_layer=1), hand.logits(ids))
        assert torch.equal(bridge(ids), hand.logits(ids))
    assert bridge("ab").shape == (1, 3, 160)


def test_device_map_of_one(folder: str, family: str, byhand: Any, tiny: Any, ids: Tensor) -> None:
    """Everything in one place."""
    check_as_usual(boot(folder, device_map={"": "cpu"}), family, byhand, tiny, ids)


def test_offload_to_disk(
    folder: str, family: str, byhand: Any, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    """Some parts on the CPU, the last layer and the head on disk, loaded by accelerate while they run."""
    import accelerate

    where = dict.fromkeys(PARTS[family], "cpu")
    model: Any = tiny(family)
    last = [part for part in PARTS[family] if part.endswith(("1", "ln_f", "norm"))]
    where.update(dict.fromkeys(last, "disk"))
    model = accelerate.dispatch_model(
        model, where, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert {p.device.type for p in model.get_submodule(last[0]).parameters()} == {"meta"}
    tokenizer = boot(folder).tokenizer
    before = snapshot_of_hooks(model)
    bridge = TransformerBridge(model, tokenizer)
    check_as_usual(bridge, family, byhand, tiny, ids)
    assert snapshot_of_hooks(model) == before
    assert {p.device.type for p in model.get_submodule(last[0]).parameters()} == {"meta"}


PLACED = {
    "explicit": lambda family: {
        "device_map": {
            part: "disk" if part.endswith(("1", "ln_f", "norm")) else "cpu"
            for part in PARTS[family]
        }
    },
    "auto": lambda family: {"device_map": "auto", "max_memory": {"cpu": 60_000}},
    "balanced": lambda family: {"device_map": "balanced", "max_memory": {"cpu": 60_000}},
    "sequential": lambda family: {"device_map": "sequential", "max_memory": {"cpu": 60_000}},
}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("gpt2", "explicit"),
        ("llama", "explicit"),
        ("llama", "auto"),
        ("gpt2", "balanced"),
        ("llama", "sequential"),
    ],
    indirect=["family"],
)
def test_device_maps(
    folder: str, family: str, how: str, byhand: Any, tiny: Any, ids: Tensor, tmp_path: Path
) -> None:
    """Loaded with parts on disk: the same values, edits, gradients and weights; and it stays where it is."""
    bridge = boot(folder, offload_folder=str(tmp_path), **PLACED[how](family))
    assert any(p.is_meta for p in bridge.parameters())
    plain = boot(folder)
    for name in ("W_E", "W_U"):
        assert torch.equal(getattr(bridge, name), getattr(plain, name))
    for part in ("attn.W_Q", "attn.W_O", "mlp.W_in", "mlp.b_out", "ln1.w"):
        assert torch.equal(bridge.weight(f"blocks.1.{part}"), plain.weight(f"blocks.1.{part}"))
    at = "blocks.0.hook_out"
    slopes = []
    for each in (bridge, plain):
        caught: list[Tensor] = []
        with each.hooks(bwd_hooks=[(at, lambda grad, hook, caught=caught: caught.append(grad))]):
            each(ids, return_type="loss").backward()
        slopes.append(caught[0])
    assert torch.equal(*slopes)
    for change in ({"device": "cpu"}, {"dtype": torch.float64}):
        with pytest.raises(InputError, match=r"spread over.*load it again"):
            bridge.to(**change)
    check_as_usual(bridge, family, byhand, tiny, ids)


def test_everything_on_one_device_moves(folder: str) -> None:
    """A device_map that is one place leaves the model free."""
    assert boot(folder, device_map={"": "cpu"}).to(torch.float64).dtype == torch.float64


def snapshot_of_hooks(model: Any) -> dict[str, Any]:
    """Forwards (accelerate's own), hooks and places of the weights."""
    return {
        path: (
            vars(module).get("forward"),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            [p.device for p in module.parameters(recurse=False)],
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "cpu", "device_map": {"": "cpu"}}, ["device or device_map"]),
        ({"device": "cpu", "n_devices": 2}, ["device or n_devices"]),
        ({"n_devices": 99}, ["n_devices=99", "CUDA"]),
        ({"n_devices": 0}, ["n_devices=0"]),
        ({"load_weights": False, "device_map": {"": "cpu"}}, ["device_map", "load_weights"]),
        ({"revision": "main", "checkpoint_index": 3}, ["revision", "checkpoint_index"]),
        ({"checkpoint_index": 3, "checkpoint_value": 4}, ["checkpoint_value"]),
        ({"checkpoint_index": 3}, ["not known to publish", "revision"]),
        ({"checkpoint_value": 1000}, ["EleutherAI/pythia"]),
    ],
)
def test_arguments_that_exclude_each_other(
    folder: str, given: dict[str, Any], words: list[str]
) -> None:
    """Said before anything is loaded."""
    with pytest.raises(InputError) as caught:
        boot(folder, **given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"device_map": {"": "cpu"}},
        {"n_devices": 2},
        {"max_memory": {0: "1GB"}},
        {"n_ctx": 8},
        {"load_weights": False},
        {"hf_config_overrides": {"eps": 1}},
        {"revision": "main"},
    ],
)
def test_what_a_loaded_model_cannot_be_given(tiny: Any, given: dict[str, Any]) -> None:
    """Options that only loading can honour are refused with hf_model, not ignored."""
    with pytest.raises(InputError, match=next(iter(given))):
        boot("name", hf_model=tiny("llama"), **given)


@pytest.mark.parametrize(
    ("name", "given", "revision"),
    [
        ("EleutherAI/pythia-70m", {"checkpoint_index": 0}, "step0"),
        ("EleutherAI/pythia-70m", {"checkpoint_index": 1}, "step1"),
        ("EleutherAI/pythia-70m", {"checkpoint_index": 11}, "step1000"),
        ("EleutherAI/pythia-70m", {"checkpoint_index": -1}, "step143000"),
        ("EleutherAI/pythia-70m", {"checkpoint_value": 512}, "step512"),
        ("EleutherAI/pythia-1.4b-deduped", {"checkpoint_value": 3000}, "step3000"),
        ("stanford-crfm/alias-gpt2-small-x21", {"checkpoint_index": 1}, "checkpoint-10"),
        ("stanford-crfm/alias-gpt2-small-x21", {"checkpoint_value": 400000}, "checkpoint-400000"),
        ("anything", {"revision": "v2"}, "v2"),
        ("anything", {}, None),
    ],
)
def test_revisions_of_training_checkpoints(
    monkeypatch: pytest.MonkeyPatch, name: str, given: dict[str, Any], revision: str | None
) -> None:
    """Index or step becomes the revision under which the family publishes it."""
    import transformers

    asked: list[Any] = []

    def config(name: str, **kwargs: Any) -> Any:
        asked.append(kwargs.get("revision"))
        raise FileNotFoundError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    with pytest.raises(FileNotFoundError):
        boot(name, **given)
    assert asked == [revision]


@pytest.mark.parametrize(
    "given", [{"checkpoint_index": 154}, {"checkpoint_value": 3}, {"checkpoint_index": -155}]
)
def test_checkpoints_that_were_never_published(given: dict[str, Any]) -> None:
    """The first and last step are said."""
    with pytest.raises(InputError, match=r"154 published steps, 0 to 143000"):
        boot("EleutherAI/pythia-70m", **given)


# --- native models ----------------------------------------------------------------------------------------

LLAMA = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_vocab": 50, "n_ctx": 20}
GPT2 = {**LLAMA, "normalization_type": "LN"}


@pytest.mark.parametrize("sizes", [LLAMA, GPT2], ids=["llama", "gpt2"])
class TestNative:
    def test_sizes(self, sizes: dict[str, Any]) -> None:
        """The sizes asked for, in a Hugging Face model of the family that has them."""
        bridge = TransformerBridge.boot_native(sizes)
        for name, value in sizes.items():
            assert getattr(bridge.cfg, name) == value
        assert bridge(torch.ones(2, 20, dtype=torch.long)).shape == (2, 20, 50)
        kind = "GPT2LMHeadModel" if "normalization_type" in sizes else "LlamaForCausalLM"
        assert type(bridge.original_model).__name__ == kind
        assert not bridge.training
        again = TransformerBridge.boot_native(BridgeConfig(**sizes))
        assert torch.equal(
            again(torch.ones(1, 5, dtype=torch.long)), bridge(torch.ones(1, 5, dtype=torch.long))
        )

    def test_seeds(self, sizes: dict[str, Any]) -> None:
        """The same seed gives the same weights, another seed others; no seed is a seed."""

        def weights(**more: Any) -> Tensor:
            bridge = TransformerBridge.boot_native({**sizes, **more})
            return torch.cat([p.flatten() for p in bridge.parameters()])

        assert torch.equal(weights(seed=1), weights(seed=1))
        assert not torch.equal(weights(seed=1), weights(seed=2))
        assert torch.equal(weights(), weights())

    def test_the_callers_random_state(self, sizes: dict[str, Any]) -> None:
        """torch's and numpy's generators go on as if nothing had been made."""
        import numpy as np

        torch.manual_seed(5)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        TransformerBridge.boot_native({**sizes, "seed": 9})
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()

    def test_dtype_and_config(self, sizes: dict[str, Any]) -> None:
        """dtype by argument or config; the config handed in is not changed."""
        config = BridgeConfig(**sizes, dtype=torch.float64)
        before = copy.deepcopy(config)
        assert TransformerBridge.boot_native(config).dtype == torch.float64
        assert TransformerBridge.boot_native(config, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert config == before

    def test_runs_like_any_other(self, sizes: dict[str, Any], tokenizer: Any) -> None:
        """Caches, hooks and text work on it."""
        bridge = TransformerBridge.boot_native({**sizes, "d_vocab": 160}, tokenizer)
        logits, cache = bridge.run_with_cache("hello")
        assert logits.shape == (1, 6, 160)
        assert torch.equal(cache["resid_post", 0], cache["resid_pre", 1])
        assert cache["pattern", 2].shape == (1, 4, 6, 6)


def test_native_details() -> None:
    """Grouped heads, head and MLP width, activation, epsilon."""
    more = {"n_key_value_heads": 2, "d_head": 12, "d_mlp": 40, "act_fn": "gelu", "eps": 1e-3}
    cfg = TransformerBridge.boot_native({**LLAMA, **more}).cfg
    assert {name: getattr(cfg, name) for name in more} == more
    more = {"d_mlp": 40, "act_fn": "relu", "eps": 1e-3}
    cfg = TransformerBridge.boot_native({**GPT2, **more}).cfg
    assert {name: getattr(cfg, name) for name in more} == more


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"d_model": 32, "n_layers": 2}, ["n_heads", "d_vocab", "n_ctx"]),
        ({**LLAMA, "n_heads": 5}, ["d_model=32", "n_heads=5"]),
        (
            {**LLAMA, "normalization_type": "LN", "positional_embedding_type": "rotary"},
            ["'LN'", "'rotary'"],
        ),
        (
            {**LLAMA, "normalization_type": "RMS", "positional_embedding_type": "standard"},
            ["'RMS'"],
        ),
        ({**LLAMA, "normalization_type": "Layer"}, ["'Layer'"]),
        ({**GPT2, "gated_mlp": True}, ["plain MLP"]),
        ({**GPT2, "n_key_value_heads": 2}, ["ungrouped"]),
        ({**GPT2, "d_head": 12}, ["d_head"]),
        ({**LLAMA, "gated_mlp": False}, ["gated"]),
        ({**LLAMA, "parallel_attn_mlp": True}, ["parallel"]),
    ],
)
def test_native_combinations_that_do_not_exist(config: dict[str, Any], words: list[str]) -> None:
    """No model of that kind: said, not approximated."""
    with pytest.raises(InputError) as caught:
        TransformerBridge.boot_native(config)
    for word in words:
        assert word in str(caught.value)
