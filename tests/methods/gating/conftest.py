"""Models whose circuits are known, because their weights were written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lensbridge import TransformerBridge
from lensbridge.methods.gating.data import CHGDataset

Effects = Mapping[tuple[int, int], Mapping[int, float]]
"""(layer, head) -> token -> what the head adds to its logit."""


def planted_model(
    layers: int, heads: int, effects: Effects, bias: Mapping[int, float], d_vocab: int = 8
) -> GPT2LMHeadModel:
    """A GPT-2 of which each head adds fixed amounts to the logits of some tokens, whatever it reads.

    Values are 1 everywhere, so that a head's output is its rows of the output projection; the residual stream
    has one feature a token, and the head of the model reads it off. There is no final norm, so gates act
    linearly on logits.
    """
    d_head = -(-d_vocab // heads)
    config = GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=d_head * heads,
        vocab_size=d_vocab,
        n_positions=32,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.lm_head.weight.copy_(torch.eye(d_vocab, config.n_embd))
        for token, value in bias.items():
            model.transformer.wte.weight[:, token] = value
        for block in model.transformer.h:
            block.attn.c_attn.bias[2 * config.n_embd :] = 1.0
        for (layer, head), adds in effects.items():
            for token, value in adds.items():
                rows = slice(head * d_head, (head + 1) * d_head)
                model.transformer.h[layer].attn.c_proj.weight[rows, token] = value / d_head
    model.transformer.ln_f = nn.Identity()
    return model


@pytest.fixture(scope="session")
def planted() -> Callable[..., TransformerBridge]:
    """Makes a bridge around a planted model: layers, heads, effects, bias."""

    def make(
        layers: int, heads: int, effects: Effects, bias: Mapping[int, float]
    ) -> TransformerBridge:
        return TransformerBridge(planted_model(layers, heads, effects, bias))

    return make


@pytest.fixture(scope="session")
def says() -> Callable[..., CHGDataset]:
    """Makes rows that all end in one token, which is to be predicted; with a foil, if one is given."""

    def make(token: int, rows: int = 4, foil: int | None = None) -> CHGDataset:
        ids = torch.tensor([[0, 5, 6, token]]).repeat(rows, 1)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, -1] = True
        foils = None if foil is None else list(torch.full_like(ids, foil))
        return CHGDataset.from_tokens(list(ids), list(mask), foils=foils)

    return make


@pytest.fixture(scope="session")
def ones_at() -> Callable[..., Tensor]:
    """Makes a mask of ones at some heads."""

    def make(shape: tuple[int, int], heads: list[tuple[int, int]]) -> Tensor:
        mask = torch.zeros(shape)
        for layer, head in heads:
            mask[layer, head] = 1
        return mask

    return make
