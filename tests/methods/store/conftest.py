"""Fixtures of the tests of extraction: a bridge, samples of unequal lengths, and their activations by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

POINTS = ["blocks.0.hook_out", "model.layers.1.mlp"]
PATHS = {"blocks.0.hook_out": "model.layers.0", "model.layers.1.mlp": "model.layers.1.mlp"}
"""The modules behind `POINTS`."""


@pytest.fixture(scope="session")
def store_points() -> list[str]:
    """Two places of a Llama: a hook point and a module's path."""
    return list(POINTS)


@pytest.fixture(scope="session")
def shared(tiny: Callable[..., nn.Module], tokenizer: Any) -> Any:
    """A bridge of a tiny Llama of four layers, for tests that leave nothing on it."""
    from lensbridge import TransformerBridge

    return TransformerBridge(tiny("llama", num_hidden_layers=4), tokenizer)


@pytest.fixture
def llama_bridge(shared: Any, snapshot: Any, is_silent: Any) -> Any:
    """`shared`, and whatever a test does, the model is afterwards as it was."""
    before = snapshot(shared.original_model)
    yield shared
    assert snapshot(shared.original_model) == before
    assert is_silent(shared)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty texts of 1 to 27 characters."""
    return [
        ("The quick brown fox jumps over" * 2)[i % 5 : i % 5 + 1 + 7 * i % 27] for i in range(40)
    ]


@pytest.fixture(scope="session")
def ids_of() -> Callable[[Sequence[str]], list[list[int]]]:
    """Token ids of texts as the character tokenizer and a BOS in front make them."""
    import string

    known = ["<pad>", "<bos>", "<eos>", "<unk>", *string.printable[:95]]
    return lambda texts: [[1, *(known.index(letter) for letter in text)] for text in texts]


@pytest.fixture(scope="session")
def alone() -> Callable[..., list[Tensor]]:
    """What a module of a bare model returns for each sample run by itself, [pos, d]. Plain PyTorch only."""

    def read(model: nn.Module, path: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        kept: list[Tensor] = []

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            kept.append((out if isinstance(out, Tensor) else out[0])[0].clone())

        handle = model.get_submodule(path).register_forward_hook(hook)
        try:
            with torch.no_grad():
                for row in rows:
                    model(torch.tensor([list(row)]))
        finally:
            handle.remove()
        return kept

    return read


@pytest.fixture(scope="session")
def same_rows() -> Callable[[Any, Any], bool]:
    """Whether two results of extraction are equal, bit for bit."""

    def check(ours: Any, theirs: Any) -> bool:
        assert list(ours) == list(theirs)
        for name, held in ours.items():
            other = theirs[name]
            assert type(held) is type(other)
            pairs = (
                [(held, other)]
                if isinstance(held, Tensor)
                else [(held.values, other.values), (held.offsets, other.offsets)]
            )
            for a, b in pairs:
                if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
                    return False
        return True

    return check
