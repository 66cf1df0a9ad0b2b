"""Proving that names mean what they say: the identities of every point, checked on one real run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import HookRegistry
from .architecture import Architecture, Attention, Block, Tower
from .cache import ActivationCache
from .example import FAILURES, examples
from .matrix import bias_of
from .record import record_run
from .run import INSIDE_ATTENTION
from .seen import first_item
from .view import belongs


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


def verify_run(
    model: nn.Module,
    architecture: Architecture,
    registry: HookRegistry,
    run: Callable[[], Tensor],
    names: list[str],
) -> list[Check]:
    """Check every identity the architecture promises, on one kind of run.

    Args:
        model: The model.
        architecture: Its parts.
        registry: Its points.
        run: Runs the model and gives its main output.
        names: The points that this run must pass.
    """
    every = [n for n in names if registry[n].is_default or n.endswith(".hook_result")]
    outside = [n for n in every if not n.endswith((*INSIDE_ATTENTION, ".hook_result"))]
    bare = _seeded(run)
    opened, closed = (
        record_run(
            registry,
            partial(_seeded, run),
            names_filter=set(wanted).__contains__ if wanted else [],
        )
        for wanted in (every, outside)
    )
    tolerance = 1e-5 if bare.dtype in (torch.float32, torch.float64) else 2e-2
    checks = _Checks(model, registry, opened[1], tolerance)
    for name in every:
        if name not in opened[1]:
            checks.made.append(Check("every point fires", name, float("inf"), 0.0))
    checks.exact(
        "logits with everything outside attention cached == bare logits", "logits", closed[0], bare
    )
    checks.near("logits with everything cached == bare logits", "logits", opened[0], bare)
    for tower in architecture.towers:
        checks.tower(tower)
    return checks.made


def verify_tower(
    model: nn.Module, architecture: Architecture, registry: HookRegistry, tower: Tower
) -> list[Check]:
    """The same for a tower that has inputs of its own, run by itself."""
    owner: Any = model.get_submodule(tower.root)
    first = next(owner.parameters())
    names = [name for name in registry if belongs(name, tower)]
    reasons: list[str] = []
    for given in examples(owner, first.device):
        try:
            made = partial(_run_alone, owner, _cast(given, first.dtype))
            _seeded(made)
        except FAILURES as error:
            reasons.append(str(error))
            continue
        return verify_run(model, architecture, registry, made, names)
    where = f"{tower.prefix}blocks"
    return [Check(f"runs alone ({reasons[:1]})", where, float("inf"), 0.0)]


def _run_alone(owner: Any, given: dict[str, Any]) -> Tensor:
    return first_item(owner(**given))


def _cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def _seeded(run: Callable[[], Tensor]) -> Tensor:
    """A run with the same random numbers each time (hashing attention draws some even in eval mode)."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        return run()


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

    def tower(self, tower: Tower) -> None:
        """The identities of every layer of a tower."""
        for index, block in enumerate(tower.blocks):
            here = f"{tower.prefix}blocks.{index}"
            if f"{here}.hook_in" not in self.cache or f"{here}.hook_out" not in self.cache:
                continue  # the stream is of another shape than [batch, pos, d_model], and has no points
            after = f"{tower.prefix}blocks.{index + 1}.hook_in"
            if after in self.cache and block.is_chained:
                identity = "blocks.{i}.hook_out == blocks.{i+1}.hook_in"
                self.exact(identity, here, self.cache[f"{here}.hook_out"], self.cache[after])
            if not block.unproved:
                self.stream(here, block)
            for branch in (*block.branches, *block.inner):
                if isinstance(branch.part, Attention):
                    self.attention(f"{here}.{branch.name}", branch.part)

    def stream(self, here: str, block: Block) -> None:
        """The layer's output as its input and what its branches add."""
        cache = self.cache
        if any(f"{here}.hook_{branch.name}_out" not in cache for branch in block.branches):
            return
        at, state = f"{here}.hook_in", cache[f"{here}.hook_in"]
        words, count = "resid_pre", 0
        for index, branch in enumerate(block.branches):
            norm = f"{here}.ln{branch.number}"
            if branch.place == "stream" and not branch.joins:
                state, words = cache[f"{norm}.hook_out"], f"ln{branch.number}.hook_out"
            made = cache[f"{here}.hook_{branch.name}_out"]
            state = self.scaled(state, branch.skip, branch.skip_by)
            state = state + self.scaled(made, branch.scale, branch.scale_by)
            for name in branch.bias:
                state = state + self.parameter(name).to(state.device)
            words += f" + {branch.name}_out"
            if index + 1 < len(block.branches) and block.branches[index + 1].joins:
                continue
            count += 1
            mid = f"{here}.hook_resid_mid{count if count > 1 else ''}"
            if branch.place == "after":
                at = f"{norm}.hook_in"
                self.near(
                    f"{words} == ln{branch.number}.hook_in (norm after)", here, state, cache[at]
                )
                state, words = cache[f"{norm}.hook_out"], f"ln{branch.number}.hook_out"
            elif index + 1 < len(block.branches) and mid in cache:
                self.near(f"{words} == {mid.rpartition('hook_')[2]}", here, state, cache[mid])
                state, words = cache[mid], mid.rpartition("hook_")[2]
        if block.ln_out is not None:
            self.near(f"{words} == ln_out.hook_in", here, state, cache[f"{here}.ln_out.hook_in"])
            state, words = cache[f"{here}.ln_out.hook_out"], "ln_out.hook_out"
        self.near(f"{words} == resid_post", here, state, cache[f"{here}.hook_out"])

    def scaled(self, value: Tensor, factor: float, by: tuple[str, ...]) -> Tensor:
        for name in by:
            value = value * self.parameter(name).to(value.device)
        return value if factor == 1.0 else value * factor

    def parameter(self, name: str) -> Tensor:
        home, _, own = name.rpartition(".")
        return getattr(self.model.get_submodule(home), own)

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
        v = v.repeat_interleave(attn.n_heads // attn.n_key_value_heads, dim=-2)
        if attn.is_direct:
            rows = v if v.dim() == 4 else v[None]  # a tower that keeps all its rows in one sequence
            made = torch.einsum("bhqk,bkhd->bqhd", pattern, rows)
            self.near("pattern @ v == z", here, made.reshape(z.shape), z)
        total = cache[f"{here}.hook_result"].sum(-2)
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
