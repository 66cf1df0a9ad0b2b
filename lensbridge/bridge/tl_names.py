"""Weights under the names that TransformerLens's HookedTransformer gives its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from .architecture import Architecture, Attention, Block, Norm

_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")


def tl_names(
    weights: Mapping[str, Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """The main tower's weights, renamed and, for experts, taken apart.

    Args:
        weights: Every weight by our name.
        architecture: Where the parts are.
    """
    main = architecture.main
    for name in ("embed.W_E", "pos_embed.W_pos"):
        if f"{main.prefix}{name}" in weights:
            yield name, weights[f"{main.prefix}{name}"]
    for index, block in enumerate(main.blocks):
        ours, theirs = f"{main.prefix}blocks.{index}", f"blocks.{index}"
        yield from _norms(weights, ours, theirs, block)
        if block.attn is not None:
            yield from _attention(weights, f"{ours}.attn", f"{theirs}.attn", block.attn)
        if block.mlp is not None:
            part = _experts if block.mlp.router is not None else _mlp
            yield from part(weights, f"{ours}.mlp", f"{theirs}.mlp")
    yield from _norm(weights, f"{main.prefix}ln_final", "ln_final", main.ln_final)
    for name in ("unembed.W_U", "unembed.b_U"):
        if name in weights:
            yield name, weights[name]


def _norms(
    weights: Mapping[str, Tensor], ours: str, theirs: str, block: Block
) -> Iterator[tuple[str, Tensor]]:
    for branch in block.branches:
        for name, norm in (
            (f"ln{branch.number}", branch.ln),
            (f"ln{branch.number}_post", branch.ln_post),
        ):
            if name in _NORMS:
                yield from _norm(weights, f"{ours}.{name}", f"{theirs}.{name}", norm)


def _norm(
    weights: Mapping[str, Tensor], ours: str, theirs: str, norm: Norm | None
) -> Iterator[tuple[str, Tensor]]:
    owns = () if norm is None else ("w", "b") if norm.center else ("w",)
    for own in owns:
        if f"{ours}.{own}" in weights:
            yield f"{theirs}.{own}", weights[f"{ours}.{own}"]


def _attention(
    weights: Mapping[str, Tensor], ours: str, theirs: str, attn: Attention
) -> Iterator[tuple[str, Tensor]]:
    grouped = "_" if attn.n_key_value_heads != attn.n_heads else ""
    for letter in "QKVO":
        for kind in "Wb":
            name = f"{ours}.{kind}_{letter}"
            if name in weights:
                yield f"{theirs}.{grouped * (letter in 'KV')}{kind}_{letter}", weights[name]
    for part in ("q_norm", "k_norm"):
        if f"{ours}.{part}.w" in weights:
            yield f"{theirs}.{part}.w", weights[f"{ours}.{part}.w"]


def _mlp(weights: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    for own in ("W_in", "b_in", "W_gate", "b_gate", "W_out", "b_out"):
        value = weights.get(f"{ours}.{own}")
        # HookedTransformer's gates have no bias.
        if value is not None and (own != "b_gate" or bool(value.any())):
            yield f"{theirs}.{own}", value


def _experts(weights: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    if f"{ours}.router.W" in weights:
        yield f"{theirs}.W_gate", weights[f"{ours}.router.W"]
    for own in ("in", "gate", "out"):
        for kind, word in (("W", "weight"), ("b", "bias")):
            value = weights.get(f"{ours}.{kind}_{own}")
            if value is None or (kind == "b" and not bool(value.any())):
                continue
            for index, one in enumerate(value):
                yield f"{theirs}.experts.{index}.W_{own}.{word}", one.T if kind == "W" else one
