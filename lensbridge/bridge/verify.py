"""Proving that names mean what they say: the identities of every point, checked on one real run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import HookRegistry
from .architecture import Architecture, Attention
from .cache import ActivationCache
from .places import bias_of


@dataclass(frozen=True)
class Check:
    """One identity at one place.

    Attributes:
        identity: What must be equal, in words.
        where: The point or layer.
        error: Largest absolute difference, relative to the largest value compared.
        tolerance: What it may be; 0 means bit for bit.
    """

    identity: str
    where: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance (NaN never is)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """Every identity that was checked, in order."""

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether all of them hold."""
        return all(check.holds for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """Those that do not."""
        return tuple(check for check in self.checks if not check.holds)

    def __str__(self) -> str:
        worst: dict[str, Check] = {}
        for check in self.checks:
            held = worst.get(check.identity)
            if held is None or not check.error <= held.error:
                worst[check.identity] = check
        lines = [
            f"{'ok  ' if c.holds else 'FAIL'}  {c.identity:<66} {c.error:.1e} at {c.where}"
            for c in worst.values()
        ]
        return "\n".join([*lines, f"{len(self.checks)} checks, {len(self.failures)} failed"])


def verify(
    model: nn.Module,
    architecture: Architecture,
    registry: HookRegistry,
    bare: Tensor,
    opened: tuple[Tensor, ActivationCache],
    closed: tuple[Tensor, ActivationCache],
    tolerance: float,
    missing: list[str],
) -> Verification:
    """Check every identity the architecture promises.

    Args:
        model: The model.
        architecture: Its parts.
        registry: Its points.
        bare: Logits without any hook.
        opened: Logits and cache of a run with every default point and every ``hook_result``.
        closed: The same without the points inside attention.
        tolerance: For identities that hold up to float error.
        missing: Points that did not fire.
    """
    checks = _Checks(model, registry, opened[1], tolerance)
    for name in missing:
        checks.made.append(Check("every point fires", name, float("inf"), 0.0))
    checks.exact(
        "logits with everything outside attention cached == bare logits", "logits", closed[0], bare
    )
    checks.near("logits with everything cached == bare logits", "logits", opened[0], bare)
    for index in range(len(architecture.blocks)):
        checks.block(index, architecture)
    return Verification(tuple(checks.made))


class _Checks:
    def __init__(
        self, model: nn.Module, registry: HookRegistry, cache: ActivationCache, tolerance: float
    ) -> None:
        self.model = model
        self.registry = registry
        self.cache = cache
        self.tolerance = tolerance
        self.made: list[Check] = []

    def exact(self, identity: str, where: str, left: Tensor, right: Tensor) -> None:
        self.made.append(Check(identity, where, relative_error(left, right), 0.0))

    def near(self, identity: str, where: str, left: Tensor, right: Tensor) -> None:
        self.made.append(Check(identity, where, relative_error(left, right), self.tolerance))

    def block(self, index: int, architecture: Architecture) -> None:
        block, cache, here = architecture.blocks[index], self.cache, f"blocks.{index}"
        pre, post = cache[f"{here}.hook_in"], cache[f"{here}.hook_out"]
        if index + 1 < len(architecture.blocks):
            self.exact(
                "blocks.{i}.hook_out == blocks.{i+1}.hook_in",
                here,
                post,
                cache[f"blocks.{index + 1}.hook_in"],
            )
        if (
            f"{here}.hook_attn_out" in cache
            and f"{here}.hook_mlp_out" in cache
            and not block.unproved
        ):
            attn = cache[f"{here}.hook_attn_out"] * block.attn_scale
            mlp = cache[f"{here}.hook_mlp_out"] * block.mlp_scale
            skip = pre * block.skip_scale
            if block.is_parallel:
                self.near(
                    "resid_pre + attn_out + mlp_out == resid_post", here, skip + attn + mlp, post
                )
            elif f"{here}.hook_resid_mid" in cache:
                mid = cache[f"{here}.hook_resid_mid"]
                if block.is_post_norm:
                    self.near("resid_pre + attn_out == resid_mid", here, skip + attn, mid)
                    mid, post = cache[f"{here}.ln1.hook_out"], cache[f"{here}.ln2.hook_in"]
                    self.near(
                        "ln1.hook_out + mlp_out == ln2.hook_in (norms after)", here, mid + mlp, post
                    )
                else:
                    self.near("resid_pre + attn_out == resid_mid", here, pre + attn, mid)
                    self.near(
                        "resid_mid + mlp_out == resid_post",
                        here,
                        mid * block.skip_scale + mlp,
                        post,
                    )
        if block.attn is not None:
            self.attention(f"{here}.attn", block.attn)

    def attention(self, here: str, attn: Attention) -> None:
        cache = self.cache
        if f"{here}.hook_pattern" not in cache:
            return
        pattern = cache[f"{here}.hook_pattern"]
        rows = pattern.float().sum(-1)
        scores = cache[f"{here}.hook_attn_scores"]
        softmax = torch.softmax(scores.float(), -1)[..., : pattern.shape[-1]].nan_to_num()
        if scores.shape == pattern.shape:
            # A row that may look nowhere (padding) is all zeros.
            self.near("rows of the pattern sum to one", here, rows, (rows > 0.5).to(rows))
        else:
            left = softmax.sum(-1)
            self.near("rows of the pattern sum to one less the attention sink", here, rows, left)
        self.near("softmax of the scores == pattern", here, softmax, pattern)
        if f"{here}.hook_result" not in cache or f"{here}.v.hook_out" not in cache:
            return
        v, z = cache[f"{here}.v.hook_out"], cache[f"{here}.o.hook_in"]
        v = v.repeat_interleave(attn.n_heads // attn.n_key_value_heads, dim=2)
        if attn.is_direct:
            self.near("pattern @ v == z", here, torch.einsum("bhqk,bkhd->bqhd", pattern, v), z)
        total = cache[f"{here}.hook_result"].sum(2)
        bias = bias_of(self.model.get_submodule(str(attn.o)), z.flatten(-2))
        out = cache[f"{here}.o.hook_out"]
        self.near(
            "sum of hook_result over heads + b_O == attn.o.hook_out", here, _plus(total, bias), out
        )


def _plus(x: Tensor, bias: Any) -> Tensor:
    return x if bias is None else x + bias


def relative_error(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference over the largest absolute value, in float32."""
    if left.shape != right.shape:
        return float("inf")
    left, right = left.float(), right.float()
    size = max(float(right.abs().max()), 1e-6)
    return float((left - right).abs().max()) / size
