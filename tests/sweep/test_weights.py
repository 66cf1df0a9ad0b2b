"""Every architecture: what its weights make of what a layer reads is what the model makes of it.

Each weight that a bridge claims is multiplied out against the activations of one run, read at the hook points
beside it, or by a plain PyTorch hook where there are none; of experts, one after the other is called by itself.
weights.json beside this file says, for every architecture, how many weights were proved so, and which are absent
and why; ``python tests/sweep/test_weights.py`` writes it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.sweep

HERE = Path(__file__).parent
TABLE = HERE / "weights.json"
CONFIGS = json.loads((HERE.parent / "tiny_configs.json").read_text())
ENTRIES = [(kind, name) for kind, entries in CONFIGS.items() for name in sorted(entries)]
TOLERANCE = 1e-5
"""Largest difference over the largest value."""

Pair = tuple[Tensor, Tensor]
"""What a weight makes, and what the model made."""


def ids() -> Tensor:
    """Token ids that are special in no configuration, [2, 9]."""
    return torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(1))


def error(left: Tensor, right: Tensor) -> float:
    """Largest difference over the largest value; infinite where the shapes differ."""
    if left.shape != right.shape:
        return float("inf")
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-6))


def template(name: str) -> str:
    """A name for every layer at once."""
    return re.sub(r"blocks\.\d+", "blocks.{i}", name)


class Run:
    """One run of a model, and of each tower that this does not pass, seen at hook points and by plain hooks.

    Attributes:
        values: What the points showed.
        calls: The first tensor that a module was given, and the first it made, at its last call.
    """

    def __init__(self, bridge: Any, inputs: dict[str, Tensor]) -> None:
        self.bridge = bridge
        self.values: dict[str, Tensor] = {}
        self.calls: dict[str, Pair] = {}
        model = bridge.unwrapped_model
        handles = [
            module.register_forward_hook(self.note(path), with_kwargs=True)
            for path, module in model.named_modules()
        ]
        try:
            self.every(inputs)
        finally:
            for handle in handles:
                handle.remove()

    def every(self, inputs: dict[str, Tensor]) -> None:
        from lensbridge.bridge.example import FAILURES, examples
        from lensbridge.bridge.record import record_run

        given = () if inputs else (ids(),)
        self.keep(self.bridge.run_with_cache(*given, return_type=None, **inputs)[1])
        for tower in self.bridge.architecture.towers:
            if not tower.root or f"{tower.prefix}blocks.0.hook_in" in self.values:
                continue
            owner = self.bridge.unwrapped_model.get_submodule(tower.root)
            for example in examples(owner, "cpu"):
                run = lambda owner=owner, example=example: owner(**example)  # noqa: E731
                try:
                    self.keep(record_run(self.bridge.registry, run)[1])
                except FAILURES:
                    continue  # the next example
                break

    def keep(self, cache: Any) -> None:
        for name in cache:
            self.values.setdefault(name, cache[name])

    def note(self, path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            made = out[0] if isinstance(out, (tuple, list)) else out
            if isinstance(made, Tensor):
                given = torch.empty(0) if given is None else given.clone()
                self.calls[path] = given, made.clone()

        return hook

    def at(self, point: str, path: str | None, share: Any = None) -> Pair | None:
        """What entered and left a layer: at its points, or seen by a plain hook; None if it was not run."""
        names = f"{point}.hook_in", f"{point}.hook_out"
        if all(name in self.values for name in names):
            return self.values[names[0]], self.values[names[1]]
        pair = self.calls.get(path or "")
        if pair is None or share is None or share.split is None:
            return pair
        runs = pair[1].unflatten(-1, (share.split.groups, -1))
        own = runs.split(share.split.sizes, -1)[share.index]
        return pair[0], own.flatten(-2)


class Proofs:
    """Every weight of a bridge, held against a run.

    Attributes:
        errors: Of each weight that was multiplied out.
        unseen: Weights of layers that were not run.
        absent: Why -> weights that are not there or cannot be read.
    """

    def __init__(self, bridge: Any, inputs: dict[str, Tensor]) -> None:
        self.bridge = bridge
        self.run = Run(bridge, inputs)
        self.parts = {name: part for name, part in self.named_parts() if part is not None}
        self.errors: dict[str, float] = {}
        self.unseen: list[str] = []
        self.absent: dict[str, list[str]] = {}
        for name in bridge.weight_names:
            self.prove(name)
        for name, why in bridge.registry.weights.absent.items():
            own = name.rpartition(".")[2]
            if own.startswith("W") and name not in bridge.weight_names:
                self.absent.setdefault(why, []).append(name)

    def named_parts(self) -> Iterator[tuple[str, Any]]:
        """What an architecture says of the places that have weights, by the beginning of their names."""
        a = self.bridge.architecture
        yield "unembed", a.unembed
        for tower in a.towers:
            start = tower.prefix
            yield f"{start}embed", tower.embed
            yield f"{start}pos_embed", tower.pos_embed
            yield f"{start}ln_embed", tower.ln_embed
            yield f"{start}ln_final", tower.ln_final
            for index, block in enumerate(tower.blocks):
                here = f"{start}blocks.{index}"
                yield f"{here}.ln_out", block.ln_out
                for branch in (*block.branches, *block.inner):
                    yield f"{here}.ln{branch.number}", branch.ln
                    yield f"{here}.ln{branch.number}_post", branch.ln_post
                    home, part = f"{here}.{branch.name}", branch.part
                    yield home, part
                    if getattr(part, "shared", None) is not None:
                        yield f"{home}.shared", part.shared
                    for norm in ("q_norm", "k_norm"):
                        yield f"{home}.{norm}", getattr(part, norm, None)

    def prove(self, name: str) -> None:
        from lensbridge import AbsentPointError

        home, _, own = name.rpartition(".")
        if own in ("QK", "OV"):
            return  # of factors that are proved
        try:
            weight = self.bridge.weight(name)
        except AbsentPointError as refusal:
            if own[0] in "Ww":
                self.absent.setdefault(str(refusal).partition(": ")[2], []).append(name)
            return
        if own[0] == "b":
            return  # added where its matrix is proved
        pair = self.pair(home, own, weight)
        if pair is None:
            self.unseen.append(name)
        else:
            self.errors[name] = error(*pair)

    def pair(self, home: str, own: str, weight: Tensor) -> Pair | None:
        if own in ("W_E", "W_pos"):
            return self.rows(home, weight)
        bias = self.bridge.weight(f"{home}.b{own[1:]}")
        part = self.parts.get(home)
        if own == "w":
            seen = self.run.calls.get(part.path)
            return None if seen is None else (normed(part, seen[0]) * weight + bias, seen[1])
        if own in ("W_Q", "W_K", "W_V"):
            letter = own[-1].lower()
            share = getattr(part, letter)
            seen = self.run.at(f"{home}.{letter}", share.path, share)
            if seen is None:
                return None
            made = torch.einsum("...m,hmd->...hd", seen[0], weight) + bias
            return made, seen[1].reshape(made.shape)
        if own == "W_O":
            seen = self.run.at(f"{home}.o", part.o)
            if seen is None:
                return None
            z = seen[0].reshape(*seen[1].shape[:-1], *weight.shape[:2])
            return torch.einsum("...hd,hdm->...m", z, weight) + bias, seen[1]
        if weight.dim() == 3:
            return self.experts(home, part)
        point, path, share = home, part if isinstance(part, str) else None, None
        if own in ("W_in", "W_gate", "W_out"):
            point = f"{home}.{own[2:]}"
            held = part.out if own == "W_out" else part.inp if own == "W_in" else part.gate
            path, share = (held, None) if isinstance(held, str) else (held.path, held)
        seen = self.run.at(point, path, share)
        return None if seen is None else (seen[0] @ weight + bias, seen[1])

    def rows(self, home: str, weight: Tensor) -> Pair | None:
        """Rows of an embedding: by the ids it was given; in order, where it counts positions itself."""
        seen = self.run.calls.get(self.parts[home])
        if seen is None:
            return None
        given, out = seen
        module = self.bridge.unwrapped_model.get_submodule(self.parts[home])
        if not home.endswith("pos_embed") or type(module) is nn.Embedding:
            return weight[given], out
        if type(module).__name__ == "QuantEmbedding":
            return weight[given], out
        return weight[: out.shape[-2]].expand_as(out), out

    def experts(self, home: str, part: Any) -> Pair:
        """Each expert called by itself, and the same from its weights."""
        own = {
            name: self.bridge.weight(f"{home}.{name}")
            for name in ("W_in", "b_in", "W_out", "b_out")
        }
        if f"{home}.W_gate" in self.bridge.weight_names:
            own |= {name: self.bridge.weight(f"{home}.{name}") for name in ("W_gate", "b_gate")}
        model = self.bridge.unwrapped_model
        holder = model.get_submodule(part.experts or f"{part.path}.experts")
        count, width = own["W_in"].shape[:2]
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        ours = torch.stack(
            [by_hand(holder, x, {key: held[e] for key, held in own.items()}) for e in range(count)]
        )
        if type(holder).__name__ == "Llama4TextExperts":
            theirs = holder(x.repeat(count, 1)).view(count, 3, -1)
        else:
            halves = torch.full((3, 2), 0.5)  # chosen twice
            each = [holder(x, torch.full((3, 2), e), halves) for e in range(count)]
            theirs = torch.stack([made.view(3, -1) for made in each])
        return ours, theirs


def by_hand(holder: Any, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """What one expert makes of [row, d_model]."""
    hidden = x @ own["W_in"] + own["b_in"]
    inner = getattr(holder, "mlp", holder)
    act: Any = getattr(inner, "act_fn", None) or getattr(inner, "activation_fn", None)
    if "W_gate" not in own:
        hidden = act(hidden)
    else:
        gate = x @ own["W_gate"] + own["b_gate"]
        custom = getattr(type(holder), "_apply_gate", None)
        if custom is None or custom.__name__ == "_default_apply_gate":
            hidden = act(gate) * hidden
        elif holder.is_concatenated:
            hidden = holder._apply_gate(torch.cat([gate, hidden], -1))
        else:
            hidden = holder._apply_gate(torch.stack([gate, hidden], -1).flatten(-2))
    return hidden @ own["W_out"] + own["b_out"]


def normed(norm: Any, x: Tensor) -> Tensor:
    """A norm's input, normalised."""
    x = x - x.mean(-1, keepdim=True) if norm.center else x
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def row_of(bridge: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the table says of an architecture, and what fails."""
    torch.manual_seed(0)
    with torch.no_grad():
        proofs = Proofs(bridge, inputs)
    failing = {n: e for n, e in proofs.errors.items() if not e <= TOLERANCE}
    absent: dict[str, set[str]] = {}
    for why, names in proofs.absent.items():
        words = re.sub(r"(?<=\.)\d+(?=\.|$| )", "{i}", why)
        absent.setdefault(words[:160], set()).update(map(template, names))
    return {
        "proved": len(proofs.errors),
        "failing": failing,
        "unseen": sorted({template(name) for name in proofs.unseen}),
        "absent": {why: sorted(names) for why, names in sorted(absent.items())},
    }


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Annotations are enforced wherever else weights are read; here that would take most of the time.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    # Architectures warn of their own matters: deprecated options, slow paths.
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda part: part)
def test_weights(
    tiny: Callable[..., nn.Module],
    inputs_of: Callable[..., dict[str, Tensor]],
    kind: str,
    name: str,
) -> None:
    """Every weight that is claimed is proved, and the others are those of the table."""
    from lensbridge import TransformerBridge

    inputs = inputs_of(name, kind)
    row = row_of(TransformerBridge(tiny(name, kind), example=inputs or None), inputs)
    held = json.loads(TABLE.read_text())[kind][name]
    assert not row.pop("failing")
    assert row == held, "if that is meant: python tests/sweep/test_weights.py"


def main() -> None:
    """Write the table, of every architecture or of those named, and show what fails."""
    spec = importlib.util.spec_from_file_location("tiny_conftest", HERE.parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    from lensbridge import TransformerBridge

    warnings.simplefilter("ignore")
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    wanted = [tuple(word.split("/")) for word in sys.argv[1:]] or ENTRIES
    for kind, name in wanted:
        inputs = conftest.tiny_inputs(name, kind)
        model = conftest.build_tiny(name, kind)
        row = row_of(TransformerBridge(model, example=inputs or None), inputs)
        for weight, off in row.pop("failing").items():
            sys.stderr.write(f"{kind}/{name} {weight}: {off:.1e}\n")
        table.setdefault(kind, {})[name] = row
    lines = [
        f'"{kind}": {{\n'
        + ",\n".join(f'"{name}": {json.dumps(rows[name])}' for name in sorted(rows))
        + "\n}"
        for kind, rows in sorted(table.items())
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # an architecture a line


if __name__ == "__main__":
    main()
