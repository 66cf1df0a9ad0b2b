"""Splitters on every architecture that reads text: rows and gradients of a padded batch, against plain hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import LensError, ModelWithSplitPoints

pytestmark = pytest.mark.sweep

CONFIGS = json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())
ENTRIES = [
    (kind, name)
    for kind in ("causal", "masked", "seq2seq")
    for name in sorted(CONFIGS[kind])
    if not CONFIGS[kind][name].get("inputs")
]

REFUSED = {
    # what stands at the first layer is no row a token: prompts, n-grams, patches, chunks, several streams
    ("causal", "cpmant"): "no row for each token",
    ("causal", "prophetnet"): "no row for each token",
    ("seq2seq", "prophetnet"): "no row for each token",
    ("causal", "blt"): "no row for each token",
    ("causal", "reformer"): "no row for each token",
    ("masked", "longformer"): "no row for each token",
    ("causal", "gemma3n"): "no row for each token",
    ("causal", "gemma3n_text"): "no row for each token",
    # layers in pieces
    ("causal", "xlm"): "layers of XLM",
    ("masked", "xlm"): "layers of XLM",
    ("masked", "flaubert"): "layers of Flaubert",
    ("masked", "squeezebert"): "never in one pass",
    # a forward pass without gradients, on purpose
    ("causal", "hrm_text"): "without gradients",
}
LEAKS = {
    # padding reaches the tokens in their own code: a convolution, hashing; the tiny decoder is not causal
    ("masked", "convbert"),
    ("masked", "yoso"),
    ("seq2seq", "encoder-decoder"),
}
SHORT = {("masked", "funnel")}  # cannot run on the short text, with or without us
TEXTS = ["ab cd e", "xyz"]
RAW = {"concepts_x_gradients": False, "normalization": False}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda part: part)
def test_rows_and_gradients(
    tiny: Callable[..., nn.Module], new_tokenizer: Any, kind: str, name: str
) -> None:
    """Each text of a batch has the rows, and the gradients of its targets, that it has alone by a plain hook."""
    model, tokenizer = tiny(name, kind), new_tokenizer(padding_side="left")
    batch_size = 1 if (kind, name) in LEAKS | SHORT else 2
    texts = TEXTS[:1] if (kind, name) in SHORT else TEXTS
    if (kind, name) in REFUSED:
        with pytest.raises(LensError, match=REFUSED[kind, name]):
            everything(model, tokenizer, texts)
        return
    split = ModelWithSplitPoints(model, tokenizer, 0, batch_size=batch_size)
    rows, _ = split.get_activations(texts, flatten_activations=False)
    gradients = split.concept_output_gradient(texts, torch.clone, torch.clone, [-1, 0], **RAW)
    path = split.bridge.architecture.blocks[0].path
    for text, own, gradient in zip(texts, rows, gradients, strict=True):
        inputs = split.bridge.prepare(torch.tensor([tokenizer(text)["input_ids"]])).kwargs
        states, by_hand = alone(model, path, inputs)
        assert gap(own, states.flatten(1)) < 1e-4
        assert gap(gradient, by_hand.flatten(2)) < 1e-3


def everything(model: Any, tokenizer: Any, texts: list[str]) -> None:
    """A splitter is made, and gives rows and gradients."""
    split = ModelWithSplitPoints(model, tokenizer, 0)
    split.get_activations(texts)
    split.concept_output_gradient(texts, torch.clone, torch.clone)


def alone(model: Any, path: str, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The layer's output for one text, and the gradients by it of its last and first position's best logit."""
    leaf: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        first = out if isinstance(out, Tensor) else out[0]
        if leaf:
            return None  # layers that are one module: the first of them
        leaf.append(first.detach().clone().requires_grad_())
        made = leaf[0] * 1
        return made if isinstance(out, Tensor) else type(out)((made, *out[1:]))

    keeps = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        best = model(**inputs, **keeps).logits[0].max(-1).values
    finally:
        handle.remove()
    grads = [torch.autograd.grad(best[i], leaf[0], retain_graph=True)[0] for i in (-1, 0)]
    # Of one text, with positions or the text first (XLNet).
    return leaf[0].detach().flatten(0, 1), torch.stack([grad.flatten(0, 1) for grad in grads])


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
