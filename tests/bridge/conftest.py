"""Fixtures of the bridge's tests: the same places reached by hand, and what a model looks like from outside."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


def _load(name: str) -> ModuleType:
    """A helper file beside this one; tests cannot import each other by name."""
    full = f"lensbridge_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def wrapped(tiny: Callable[..., Any]) -> Callable[[str], Any]:
    """``wrapped("mixtral")``: a bridge around a tiny model, built once, for tests that leave nothing on it."""
    from lensbridge import TransformerBridge

    return cache(lambda name: TransformerBridge(tiny(name)))


@pytest.fixture(scope="session")
def byhand() -> Any:
    """The module `byhand.py`."""
    return _load("byhand")


@pytest.fixture(scope="session")
def plain() -> Any:
    """The module `plain.py`."""
    return _load("plain")


@pytest.fixture(scope="session")
def generation() -> Any:
    """The module `generation.py`."""
    return _load("generation")


@pytest.fixture(scope="session")
def demo_bridge() -> Any:
    """A bridge around the model inside the package, with its tokenizer; for tests that leave nothing on it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lensbridge import TransformerBridge, demo

    model = AutoModelForCausalLM.from_pretrained(demo.path()).eval()
    return TransformerBridge(model, AutoTokenizer.from_pretrained(demo.path()))


_SHARED: dict[str, Any] = {}


def _looks_used(bridge: Any) -> bool:
    """Whether a test left anything on a model that the next one would see."""
    model = bridge.original_model
    return (
        model.training
        or model.dtype != torch.float32
        or model.config._attn_implementation != "sdpa"
        or model._compiled_call_impl is not None
        or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        or any(point.fwd or point.bwd or point.ctx for point in bridge.registry.values())
        or not all(p.requires_grad and p.grad is None for p in model.parameters())
    )


@pytest.fixture
def bridge(family: str, tiny: Callable[..., nn.Module], tokenizer: Any) -> Iterator[Any]:
    """A bridge around a tiny model; built once a family, again after a test that left traces on it."""
    from lensbridge import TransformerBridge

    if family not in _SHARED:
        _SHARED[family] = TransformerBridge(tiny(family), tokenizer)
    yield _SHARED[family]
    if _looks_used(_SHARED[family]):
        del _SHARED[family]


@pytest.fixture
def model(bridge: Any) -> nn.Module:
    """The model of `bridge`."""
    return bridge.original_model


@pytest.fixture
def fresh(tiny: Callable[..., nn.Module], tokenizer: Any) -> Callable[..., Any]:
    """``fresh("llama", num_hidden_layers=3)``: a new bridge around a new model, for tests that change it."""
    from lensbridge import TransformerBridge

    return lambda name, **overrides: TransformerBridge(tiny(name, **overrides), tokenizer)


@pytest.fixture
def hand(byhand: Any, model: nn.Module, family: str) -> Any:
    """A copy of ``model``, read and edited with plain PyTorch hooks."""
    return byhand.ByHand(model, family)


@pytest.fixture(scope="session")
def snapshot() -> Any:
    """The function `snapshot` of `snapshot.py`."""
    return _load("snapshot").snapshot


@pytest.fixture(scope="session")
def is_silent() -> Any:
    """The function `is_silent` of `snapshot.py`."""
    return _load("snapshot").is_silent


@pytest.fixture(scope="session")
def make_tokenizer(new_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """``make_tokenizer(template="<bos> $A")``: a character tokenizer that adds what the template says."""
    from tokenizers.processors import TemplateProcessing

    def make(template: str | None = None, **special: Any) -> Any:
        tokenizer = new_tokenizer(**special)
        if template is not None:
            tokens = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=template, special_tokens=tokens
            )
        return tokenizer

    return make
