"""Fixtures of the methods' tests: shared lenses, and the same places reached by hand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import pytest
import torch


def _load(path: str) -> ModuleType:
    """A helper file below ``tests/``; tests cannot import each other by name."""
    full = f"lensbridge_tests_{Path(path).stem}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).parents[1] / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def plain() -> Any:
    """The module `tests/bridge/plain.py`: reading and editing a bare model by module path."""
    return _load("bridge/plain.py")


@pytest.fixture(scope="session")
def places() -> Any:
    """The module `places.py`: the sites by module path."""
    return _load("methods/places.py")


@pytest.fixture(scope="session")
def snapshot() -> Any:
    """The function of `tests/bridge/snapshot.py`: what a model looks like from outside."""
    return _load("bridge/snapshot.py").snapshot


@pytest.fixture(scope="session")
def is_silent() -> Any:
    """The function of `tests/bridge/snapshot.py`: nobody listens at a bridge."""
    return _load("bridge/snapshot.py").is_silent


@pytest.fixture(scope="session")
def lens_of(tiny: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """``lens_of("bert", "masked")``: a lens on a tiny model, built once, for tests that leave nothing on it."""
    from lensbridge.methods import LensAPI

    return cache(lambda name, kind="causal": LensAPI(tiny(name, kind), tokenizer))


@pytest.fixture
def left_alone(snapshot: Any, is_silent: Any) -> Callable[[Any], AbstractContextManager[Any]]:
    """``with left_alone(lens):`` afterwards the model is as it was, and nobody listens."""

    @contextmanager
    def check(lens: Any) -> Iterator[Any]:
        before = snapshot(lens.model)
        yield lens
        assert snapshot(lens.model) == before
        assert is_silent(lens.bridge)

    return check


@pytest.fixture
def llama(lens_of: Callable[..., Any], left_alone: Any) -> Iterator[Any]:
    """A lens on a shared tiny Llama; whatever a test does, the model is afterwards as it was."""
    lens = lens_of("llama")
    # The first time hidden states are asked for, transformers puts hooks of its own on the layers.
    lens.model(torch.tensor([[8]]), output_hidden_states=True)
    with left_alone(lens):
        yield lens


@pytest.fixture(scope="session")
def demo_lens() -> Any:
    """A lens on the model inside the package, shared by tests that leave nothing on it."""
    from lensbridge import demo
    from lensbridge.methods import LensAPI

    return LensAPI.from_pretrained(demo.path())


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are not checked at run time: what whoever passes something wrong meets outside these tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def letters() -> Callable[..., Any]:
    """``letters("[CLS] $A [SEP]")``: one token a letter, words at spaces and punctuation; fits 160 tokens."""
    import string

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    named = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
    pieces = [
        *named,
        *string.ascii_letters,
        *(f"##{x}" for x in string.ascii_letters),
        *".,!?'\"()",
    ]

    def make(template: str | None = None, **options: Any) -> Any:
        core = Tokenizer(models.WordPiece({x: i for i, x in enumerate(pieces)}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if template is not None:
            core.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
            )
        special = {"pad_token": named[0], "cls_token": named[1], "sep_token": named[2]}
        return PreTrainedTokenizerFast(
            tokenizer_object=core, **{**special, "unk_token": named[3], **options}
        )

    return make


@pytest.fixture(scope="session")
def new_classifier() -> Callable[..., Any]:
    """``new_classifier()``: a tiny BERT with three classes, weights large enough that every part matters."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    def make(**options: Any) -> Any:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_labels": 3,
        }
        config = BertConfig(vocab_size=160, num_hidden_layers=3, **{**sizes, **options})
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = BertForSequenceClassification(config).eval()
            for name, parameter in model.named_parameters():
                parameter.data += 0.2 * torch.randn_like(parameter) * ("embed" not in name)
        return model

    return make
