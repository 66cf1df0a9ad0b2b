"""From any Hugging Face model to its Architecture, by watching one small run of it.

The run is made on a twin without weights, so the user's model is neither run nor touched; a model that cannot
run without numbers gets a small one. Nothing is guessed from names: a part is what it does in that run, and
what the run does not show is absent, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import table
from .architecture import Architecture, Block, Norm, Tower
from .example import FAILURES, examples
from .layer import Layer
from .norm import describe_norm
from .seen import Trace, Visit, has_weights, into
from .stacks import Stack, find_stacks, text_config
from .trace import trace

_SMALL = 200_000_000
"""Parameters up to which a twin with numbers is made."""

_KNOWN: dict[tuple[Any, ...], Architecture] = {}


def architecture_of(model: nn.Module, example: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a model, read off a watched run of its kind.

    Remembered for each class, configuration and module tree, so a second model of a kind costs nothing.

    Args:
        model: Any Hugging Face model.
        example: Keywords of its forward to run it on; made up unless given.
    Raises:
        ArchitectureError: The model's layers could not be found.
    """
    config = text_config(model)  # refuses what is no Hugging Face model
    whole: Any = getattr(model, "config", config)
    names = tuple((path, type(module)) for path, module in model.named_modules())
    shapes = tuple(
        (name, getattr(value, "shape", value)) for name, value in (example or {}).items()
    )
    row = str(sorted(table.row_of(model).items()))
    key = (
        row,
        whole.to_json_string(use_diff=False),
        str(whole._attn_implementation),
        names,
        str(shapes),
    )
    if key not in _KNOWN:
        _KNOWN[key] = infer(model, example)
    return _KNOWN[key]


def infer(model: nn.Module, example: Mapping[str, Any] | None = None) -> Architecture:
    """Tell a model's parts apart.

    Args:
        model: Any Hugging Face model.
        example: Keywords of its forward to run it on.
    Raises:
        ArchitectureError: The model's layers could not be found.
    """
    stacks = find_stacks(model)
    seen, why = _watch(model, stacks, example=example)
    towers = [_Reader(model, stack, seen, why).tower() for stack in stacks]
    for index, stack in enumerate(stacks[:-1]):
        if not towers[index].blocks or any(not b.branches for b in towers[index].blocks):
            alone = _alone(model, stack)
            towers[index] = towers[index] if alone is None else alone
    main = towers[-1]
    if main.prefix == "decoder_":
        towers.sort(key=lambda tower: tower.prefix == "decoder_")
    unembed, scale, absent = _head(model, seen, main)
    projectors = tuple(
        (path.rpartition(".")[2], path)
        for path, _ in model.named_modules()
        if path.rpartition(".")[2] in table.PROJECTORS
    )
    return Architecture(main, tuple(towers), unembed, scale, projectors, absent)


# --- running ----------------------------------------------------------------------------------


def _watch(
    model: nn.Module,
    stacks: tuple[Stack, ...],
    root: str = "",
    example: Mapping[str, Any] | None = None,
) -> tuple[Trace | None, str]:
    """One watched run of a model of this class and configuration, or None with the reason."""
    blocks = frozenset(block for stack in stacks for block in stack.blocks)
    main = stacks[-1].blocks
    wanted = {path for path, _ in model.named_modules()}
    size = sum(p.numel() for p in model.parameters())
    reasons: list[str] = []
    passed: Trace | None = None  # a run that passed everything but the layers
    twins: dict[str, nn.Module] = {}
    devices = ("meta", "cpu") if size <= _SMALL else ("meta",)
    count = len(list(_inputs(model, "meta", example)))
    for index, device in ((i, d) for i in range(count) for d in devices):
        try:
            if device not in twins:
                twins[device] = _twin(model, device)
            twin = twins[device]
            given = next(islice(_inputs(twin, device, example), index, None))
            if not {path for path, _ in twin.named_modules()} <= wanted:
                return None, "the model's modules are not those its configuration makes"
            seen = trace(twin, blocks, partial(twin, **given), root)
        except FAILURES as error:
            reasons.append(f"a run on {device} failed: {type(error).__name__}: {str(error)[:150]}")
            continue
        if not main or any(path in seen.visits for path in main):
            return seen, ""
        reasons.append(f"in a run on {', '.join(given)} the layers were not called")
        passed = seen if passed is None else passed
    return passed, reasons[-1] if reasons else "no input for it is known"


def _inputs(
    model: nn.Module, device: str, example: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    if example is None:
        yield from examples(model, device)
    else:
        yield {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in example.items()
        }


def _twin(model: nn.Module, device: str) -> nn.Module:
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng([]), torch.device(device), _Blank():
        kind: Any = type(model)
        twin = kind._from_config(config)
    return twin.eval()


class _Blank(TorchFunctionMode):
    """Lets nothing be drawn for weights that hold no numbers; PyTorch takes its time over that."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            tensor = args[0] if args else kwargs.get("tensor")
            if tensor is not None and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _alone(model: nn.Module, stack: Stack) -> Tower | None:
    """A tower the whole model's run did not pass, watched in a run of its own."""
    for path in _owners(stack.path):
        owner: Any = model.get_submodule(path)
        if not hasattr(owner, "_from_config") or not hasattr(owner, "config"):
            continue
        seen, why = _watch(owner, (stack,), path)
        if seen is not None and not why:
            return replace(_Reader(model, stack, seen, "").tower(), root=path)
    return None


def _owners(path: str) -> Iterator[str]:
    """The modules around a path, innermost first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


# --- reading ----------------------------------------------------------------------------------


class _Reader:
    """Reads one tower off a trace."""

    def __init__(self, model: nn.Module, stack: Stack, seen: Trace | None, why: str) -> None:
        self.model = model
        self.stack = stack
        self.why = why
        ran = seen is not None and any(path in seen.visits for path in stack.blocks)
        self.seen = seen if ran else None
        if seen is not None and not ran:
            self.why = why or f"{stack.path} did not run on the example that was tried"
        self.passed = seen

    def tower(self) -> Tower:
        stack, seen = self.stack, self.seen
        if not stack.blocks and self.why == "":
            self.why = "no module of this model is a layer; see raw: points"
        if seen is None:
            blocks = tuple(Block(path, unproved=self.why) for path in stack.blocks)
            embed = None
            if self.passed is not None and stack.prefix == "":
                embed = _path_of(self.model, "get_input_embeddings")
            return Tower(stack.prefix, blocks, embed, seen=self.passed, unproved=self.why)
        inside: dict[str, list[str]] = {path: [] for path in stack.blocks}
        for path in seen.visits:
            home = path
            while home:
                home = home.rpartition(".")[0]
                if home in inside:
                    inside[home].append(path)
                    break
        calls = sorted(
            (visit.began, path, call)
            for path in stack.blocks
            for call, visit in enumerate(seen.visits.get(path, ()))
        )
        layers = [
            Layer(self.model, seen, path, inside[path], call).block() for _, path, call in calls
        ]
        for index in range(len(layers) - 1):
            after, here = layers[index + 1], layers[index]
            out = seen.visits[here.path][here.call].terms_out
            if seen.before.get(into(after.path, after.call)) != out:
                layers[index] = replace(here, is_chained=False)
        absent: dict[str, str] = {}
        embed, pos_embed, ln_embed, scale = self.entry(seen, layers[0], absent)
        return Tower(
            stack.prefix,
            tuple(layers),
            embed=embed,
            pos_embed=pos_embed,
            rotary=self.rotary(seen, absent),
            ln_embed=ln_embed,
            embed_scale=scale,
            ln_final=self.ln_final(seen, layers, absent),
            absent=absent,
            seen=seen,
        )

    def entry(
        self, seen: Trace, first: Block, absent: dict[str, str]
    ) -> tuple[str | None, str | None, Norm | None, float | None]:
        """What the first layer's input is made of: embeddings, positions, a norm."""
        terms = seen.before.get(into(first.path, first.call), {})
        makers = self.makers(seen)
        ln = None
        if len(terms) == 1:
            visit = makers.get(next(iter(terms)))
            if visit is not None and self.is_norm(visit.path):
                ln = describe_norm(self.model.get_submodule(visit.path), visit.path)
                terms = visit.terms_in or {}
        found = [makers[s].path for s in terms if s in makers]
        found = [path for path in found if has_weights(self.model.get_submodule(path))]
        row = table.row_of(self.model) if self.stack.prefix in ("", "decoder_") else {}
        getter = row.get("embed") or _path_of(self.model, "get_input_embeddings")
        tokens = [p for p in found if not any(word in p for word in (*table.POSITIONS, "type"))]
        is_getters = getter in found or (self.stack.prefix == "" and getter in seen.visits)
        embed = getter if is_getters else next(iter(tokens), None) or self.looked_up(seen, first)
        pos = row.get("pos_embed") or next(
            (p for p in found if p != embed and any(word in p for word in table.POSITIONS)), None
        )
        if pos is None:
            absent["pos_embed"] = "no learned position embedding is added to the token embedding"
        if embed is None:
            absent["embed"] = "no embedding layer was seen to make the first layer's input"
        scales = [c for t, c in terms.items() if t in makers and makers[t].path == embed]
        return embed, pos, ln, scales[0] if scales else None

    def looked_up(self, seen: Trace, first: Block) -> str | None:
        """The embedding that was called with ids beside this tower's layers, before them."""
        home = self.stack.path.rpartition(".")[0]
        start = seen.visits[first.path][first.call].began
        for path, visits in seen.visits.items():
            ids = visits[0].entering
            if (
                path.rpartition(".")[0] == home
                and visits[0].ended < start
                and isinstance(self.model.get_submodule(path), nn.Embedding)
                and isinstance(ids, torch.Tensor)
                and not ids.is_floating_point()
                and not any(word in path for word in table.POSITIONS)
            ):
                return path
        return None

    def makers(self, seen: Trace) -> dict[str, Visit]:
        found: dict[str, Visit] = {}
        for visits in seen.visits.values():
            for visit in visits:
                if visit.terms_out is not None and list(visit.terms_out.values()) == [1.0]:
                    source = next(iter(visit.terms_out))
                    if source not in found or visit.ended < found[source].ended:
                        found[source] = visit
        return found

    def is_norm(self, path: str) -> bool:
        return "norm" in type(self.model.get_submodule(path)).__name__.lower()

    def ln_final(self, seen: Trace, blocks: list[Block], absent: dict[str, str]) -> Norm | None:
        row = table.row_of(self.model) if self.stack.prefix in ("", "decoder_") else {}
        if "ln_final" in row:
            return describe_norm(self.model.get_submodule(row["ln_final"]), row["ln_final"])
        last = seen.visits[blocks[-1].path][blocks[-1].call]
        behind = [
            visit
            for visits in seen.visits.values()
            for visit in visits
            if visit.began > last.ended
            and visit.terms_in == last.terms_out
            and self.is_norm(visit.path)
        ]
        if not behind:
            absent["ln_final"] = "no norm reads the last layer's output"
            return None
        path = min(behind, key=lambda visit: visit.began).path
        return describe_norm(self.model.get_submodule(path), path)

    def rotary(self, seen: Trace, absent: dict[str, str]) -> str | None:
        """The module beside the layers that makes cosines and sines."""
        home = self.stack.path.rpartition(".")[0]
        for path, visits in seen.visits.items():
            if path.rpartition(".")[0] not in (home, home.rpartition(".")[0]):
                continue
            if "rotary" in type(self.model.get_submodule(path)).__name__.lower():
                out = visits[0].output
                if isinstance(out, tuple) and len(out) == 2:
                    return path
        absent["rotary_emb"] = "no module beside the layers computes rotary cosines and sines"
        return None


def _head(
    model: nn.Module, seen: Trace | None, main: Tower
) -> tuple[str | None, float | None, dict[str, str]]:
    """The head, and by what factor its output becomes the logits."""
    path = table.row_of(model).get("unembed") or _path_of(model, "get_output_embeddings")
    if seen is None:
        return path, None, {} if path else {"unembed": f"{type(model).__name__} has no head"}
    if path is None:
        made = [
            visit
            for visits in seen.visits.values()
            for visit in visits
            if visit.terms_out == seen.answer and has_weights(model.get_submodule(visit.path))
        ]
        path = made[0].path if made else None
    visit = seen.one(path)
    if path is None or visit is None:
        return None, None, {"unembed": f"{type(model).__name__} has no head that makes its output"}
    own = visit.terms_out or {}
    if own and set(own) == set(seen.answer):
        source = next(iter(own))
        return path, seen.answer[source] / own[source], {}
    return path, None, {}


def _path_of(model: nn.Module, getter: str) -> str | None:
    try:
        module = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None  # transformers raises these for models without the part
    return next((path for path, part in model.named_modules() if part is module), None)
