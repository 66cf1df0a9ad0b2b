"""Fixtures: tiny random models of every architecture, built from configs; nothing is downloaded.

lensbridge is imported inside the fixtures, after jaxtyping's import hook is in place.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "phi")
"""The families whose every canonical point is tested by value."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Grouped heads with biases, a wide head, a sequential GPT-NeoX, full multi-head Llama.
    "llama_mha": ("llama", {"num_key_value_heads": 4}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "qwen3_wide_head": ("qwen3", {"head_dim": 32}),
}

VOCAB = 160


@cache
def tiny_configs() -> dict[str, dict[str, Any]]:
    """kind ("causal", "masked", "vision"...) -> model type -> class, config and what its forward takes."""
    return json.loads((Path(__file__).parent / "tiny_configs.json").read_text())


def build_tiny(name: str, kind: str = "causal", **overrides: Any) -> nn.Module:
    """A tiny random model in eval mode, its weights large enough that every part matters."""
    import transformers

    base, extra = VARIANTS.get(name, (name, {}))
    entry = tiny_configs()[kind][base]
    config = getattr(transformers, entry["config_class"])(
        **{**entry["config"], **extra, **overrides}
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = getattr(transformers, entry["class"])(config).eval()
        for parameter_name, parameter in model.named_parameters():
            # Fresh models have zero biases, unit norms and nearly uniform attention: too easy to be right on.
            if parameter.dim() < 2:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif (
                parameter.numel() and "embed" not in parameter_name and "wte" not in parameter_name
            ):
                # T5 and its kind, which do not scale their scores, start large enough.
                parameter.data *= 5.0 if parameter.std() < 0.1 else 1.0
        for path, value in entry.get("set_params", {}).items():
            # Fresh models have parts that do nothing until they are trained: zero gates, empty projections.
            parameter = model.get_parameter(path)
            is_drawn = isinstance(value, dict)
            drawn = value["normal"] * torch.randn_like(parameter) if is_drawn else value
            parameter.data.copy_(torch.as_tensor(drawn))
    return model


def tiny_inputs(name: str, kind: str = "causal") -> dict[str, torch.Tensor]:
    """Keywords for the forward of an entry, the same every time; none where token ids are enough."""
    random = torch.Generator().manual_seed(0)
    wanted = tiny_configs()[kind][name].get("inputs") or {}
    return {keyword: _made(spec, random) for keyword, spec in wanted.items()}


def _made(spec: dict[str, Any], random: torch.Generator) -> torch.Tensor:
    dtype = {"float": torch.float32, "long": torch.long, "bool": torch.bool}[
        spec.get("dtype", spec["kind"])
    ]
    if spec["kind"] == "values":
        return torch.tensor(spec["data"], dtype=dtype)
    if spec["kind"] == "bool":
        return torch.ones(spec["shape"], dtype=dtype)
    if spec["kind"] == "float":
        return torch.randn(spec["shape"], generator=random)
    return torch.randint(spec.get("low", 0), spec["high"], spec["shape"], generator=random)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """``tiny("llama", num_hidden_layers=3)`` builds a fresh tiny model."""
    return build_tiny


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., dict[str, torch.Tensor]]:
    """``inputs_of("vit", "vision")``: keywords for that model's forward."""
    return tiny_inputs


@pytest.fixture(params=[*FAMILIES, *VARIANTS])
def family(request: pytest.FixtureRequest) -> str:
    """Each family and variant in turn."""
    return request.param


@pytest.fixture
def model(family: str) -> nn.Module:
    """A fresh tiny model of the family."""
    return build_tiny(family)


@pytest.fixture
def bridge(model: nn.Module, tokenizer: Any) -> Any:
    """A bridge around ``model``, with a tokenizer."""
    from lensbridge import TransformerBridge

    return TransformerBridge(model, tokenizer)


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids, [2, 9]."""
    return torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a character, with BOS 1, EOS 2 and a pad token 0; adds nothing by itself."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def new_tokenizer() -> Callable[..., Any]:
    """``new_tokenizer(pad_token=None)`` builds another one."""
    return build_tokenizer


def build_tokenizer(**special: Any) -> Any:
    """A character tokenizer that fits the tiny models' vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *string.printable[:95]]
    core = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**named, **special})
