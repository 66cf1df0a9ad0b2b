"""From what the names propose to what one watched run shows: where each norm stands, and what the stream is.

The run is made on a twin without weights, so the user's model is neither run nor touched; a model that cannot
run without numbers gets a small one. What could not be shown stays as the names propose it, and says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, Attention, Block, Norm
from .infer import infer, text_config
from .norm import describe_norm
from .trace import Terms, Trace, Visit, trace

_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    NotImplementedError,
    AssertionError,  # some models check their shapes with it
)
_SMALL = 50_000_000
"""Parameters up to which a twin with numbers is made."""

_KNOWN: dict[tuple[Any, ...], Architecture] = {}


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a model: proposed by its names, settled by a watched run of its kind.

    Remembered for each class, configuration and module tree, so a second model of a kind costs nothing.

    Raises:
        ArchitectureError: The model's layers could not be found.
    """
    config = text_config(model)  # refuses what is no Hugging Face model
    whole: Any = getattr(model, "config", config)
    names = tuple((path, type(module)) for path, module in model.named_modules())
    key = (whole.to_json_string(use_diff=False), str(whole._attn_implementation), names)
    if key not in _KNOWN:
        _KNOWN[key] = settle(model, infer(model))
    return _KNOWN[key]


def _watch_run(model: nn.Module, architecture: Architecture) -> tuple[Trace | None, str]:
    """One watched run of a model of this class and configuration, or None with the reason."""
    paths = frozenset(block.path for block in architecture.blocks)
    names = [(path, type(module)) for path, module in model.named_modules()]
    size = sum(p.numel() for p in model.parameters())
    found, first = _try(model, names, paths, "meta", cached=False)
    if found is None:
        # Without a key-value cache some masks look at numbers, which the meta device has not got; with
        # one, what the values are made of is lost on the way through it. A small twin has numbers.
        device = "cpu" if size <= _SMALL else "meta"
        found, second = _try(model, names, paths, device, cached=device == "meta")
        first = "" if found is not None else f"{first}; {second}"
    return found, first


def _try(
    model: nn.Module, names: Any, paths: frozenset[str], device: str, *, cached: bool
) -> tuple[Trace | None, str]:
    try:
        twin = _twin(model, device)
        if [(path, type(module)) for path, module in twin.named_modules()] != names:
            return None, "the model's modules are not those its configuration makes"
        ids = torch.arange(10, device=device).reshape(2, 5) + 3
        return trace(twin, paths, _runner(twin, ids, cached=cached)), ""
    except _FAILURES as error:
        return None, f"a small run on {device} failed: {type(error).__name__}: {str(error)[:150]}"


def _twin(model: nn.Module, device: str) -> nn.Module:
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng([]), torch.device(device):
        kind: Any = type(model)
        twin = kind._from_config(config)
    return twin.eval()


def _runner(twin: nn.Module, ids: torch.Tensor, *, cached: bool) -> Callable[[], Any]:
    config: Any = twin.config
    given: dict[str, Any] = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    if getattr(config, "use_cache", None) is True and not cached:
        given["use_cache"] = False
    return lambda: twin(**given)


def settle(model: nn.Module, architecture: Architecture) -> Architecture:
    """The architecture as a watched run shows it.

    Args:
        model: The model.
        architecture: What the names propose.
    """
    seen, reason = _watch_run(model, architecture)
    if seen is None:
        return replace(architecture, unproved=reason)
    blocks = tuple(_Settler(model, seen, block).settle() for block in architecture.blocks)
    return replace(architecture, blocks=blocks, seen=seen)


class _Settler:
    """One layer."""

    def __init__(self, model: nn.Module, seen: Trace, block: Block) -> None:
        self.model = model
        self.seen = seen
        self.block = block
        self.x: Terms = {f"into {block.path}": 1.0}

    def settle(self) -> Block:
        seen = self.seen
        if self.block.attn is not None:
            self.block = replace(self.block, attn=self.attention(self.block.attn))
        block = self.block
        whole = seen.one(block.path)
        if block.attn is None or block.mlp is None or whole is None:
            return block
        attn = seen.one(block.attn.path)
        mlp_path = block.mlp.path or block.mlp.out
        mlp = seen.one(mlp_path)
        entry = seen.one(block.mlp.path or (block.mlp.inp.path if block.mlp.inp else None))
        if attn is None or mlp is None or entry is None or whole.terms_out is None:
            return replace(block, unproved="attention or MLP did not run exactly once")
        a, m = self.added(attn), self.added(mlp)
        norms = self.norms()
        ln1 = next(
            (n for n in norms if n.terms_in == self.x and n.terms_out == attn.terms_in), None
        )
        ln1_post = next((n for n in norms if n.terms_in == a.terms_out), None)
        ln2_post = next((n for n in norms if n.terms_in == m.terms_out), None)
        a, m = ln1_post or a, ln2_post or m
        ln2 = next((n for n in norms if n.terms_out == entry.terms_in and n is not ln1), None)
        placed: dict[str, Any] = {
            "ln1": self.norm(ln1),
            "ln1_post": self.norm(ln1_post),
            "ln2": self.norm(ln2),
            "ln2_post": self.norm(ln2_post),
        }
        sums = _split(whole.terms_out, self.x, a.terms_out, m.terms_out)
        if sums is None:
            return self.post_norm(norms, whole, a, m, entry)
        skip, attn_scale, mlp_scale = sums
        reader = ln2 or entry
        mid = _split(reader.terms_in, self.x, a.terms_out, {}) if reader.terms_in else None
        is_parallel = mid is None or mid[1] == 0.0
        return replace(
            block,
            **placed,
            is_parallel=is_parallel,
            mid=None if is_parallel else reader.path,
            attn_out=a.path,
            mlp_out=m.path,
            skip_scale=skip,
            attn_scale=attn_scale,
            mlp_scale=mlp_scale,
        )

    def attention(self, attn: Attention) -> Attention:
        """Whether a softmax is inside, and whether its result goes straight to the output projection."""
        o, v = self.seen.one(attn.o), self.seen.one(attn.v.path if attn.v else None)
        into = (o.terms_in if o is not None else None) or {}
        is_direct = list(into.values()) == [1.0] and next(iter(into)).startswith("attended ")
        if is_direct and v is not None and attn.v is not None and attn.v.split is None:
            is_direct = self.seen.attended.get(next(iter(into))) == v.terms_out
        return replace(attn, is_softmax=attn.path in self.seen.attending, is_direct=is_direct)

    def post_norm(
        self, norms: list[Visit], whole: Visit, a: Visit, m: Visit, entry: Visit
    ) -> Block:
        """Norms behind the sums: out = ln2(s + mlp(s)), s = ln1(x + attn(x))."""
        first = next((n for n in norms if _split(n.terms_in or {}, self.x, a.terms_out, {})), None)
        last = next((n for n in norms if n.terms_out == whole.terms_out), None)
        if first is not None and last is not None and first.terms_out == entry.terms_in:
            sums = _split(last.terms_in or {}, first.terms_out or {}, m.terms_out, {})
            if sums is not None and sums[0] == 1.0 and first is not last:
                into = _split(first.terms_in or {}, self.x, a.terms_out, {})
                return replace(
                    self.block,
                    ln1=self.norm(first),
                    ln2=self.norm(last),
                    ln1_post=None,
                    ln2_post=None,
                    is_parallel=False,
                    is_post_norm=True,
                    mid=first.path,
                    attn_out=a.path,
                    mlp_out=m.path,
                    skip_scale=into[0] if into else 1.0,
                    attn_scale=into[1] if into else 1.0,
                    mlp_scale=sums[1],
                )
        return replace(
            self.block,
            mid=None,
            unproved="the layer's output is no sum of its input and what attention and MLP made",
        )

    def added(self, part: Visit) -> Visit:
        """The module whose output the part adds, where the part adds the stream itself (Bloom, BERT)."""
        terms = part.terms_out or {}
        if not any(source in terms for source in self.x):
            return part
        rest = {s: v for s, v in terms.items() if s not in self.x}
        inside = [
            v
            for path, vs in self.seen.visits.items()
            if path.startswith(part.path + ".")
            for v in vs
        ]
        return next((v for v in inside if v.terms_out == rest), part)

    def norms(self) -> list[Visit]:
        """Calls of norm-like modules of the layer, outside attention's own."""
        attn = self.block.attn
        inside = "" if attn is None else attn.path + "."
        found = []
        for path, visits in self.seen.visits.items():
            name = type(self.model.get_submodule(path)).__name__.lower()
            own = not path.startswith(inside) or "output" in path[len(inside) :]
            if (
                own
                and path.startswith(self.block.path + ".")
                and "norm" in name
                and len(visits) == 1
            ):
                found.append(visits[0])
        return found

    def norm(self, visit: Visit | None) -> Norm | None:
        return (
            None
            if visit is None
            else describe_norm(self.model.get_submodule(visit.path), visit.path)
        )


def _split(
    total: Terms, first: Terms, second: Terms | None, third: Terms | None
) -> tuple[float, float, float] | None:
    """Coefficients with which ``total`` is made of three combinations, or None if it is not."""
    if second is None or third is None:
        return None
    rest, found = dict(total), []
    for part in (first, second, third):
        factor = 0.0
        if part:
            source = next(iter(part))
            factor = rest.get(source, 0.0) / part[source]
            for name, value in part.items():
                rest[name] = rest.get(name, 0.0) - factor * value
        found.append(factor)
    if any(abs(value) > 1e-9 for value in rest.values()) or (second and not found[1]):
        return None
    return found[0], found[1], found[2]
