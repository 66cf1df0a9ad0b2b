"""Path patching: what one part of a model tells another directly, everything between them held still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import ArchitectureError, HookPoint, InputError
from .measured import MeasuredRun, Metric, prepared
from .patch_grid import (
    ALL,
    EACH,
    Patch,
    PatchGrid,
    axes_of,
    batches_of,
    check_aligned,
    check_rows,
    counted,
    patches_of,
    sites_at,
)
from .patching import gridded, words_of
from .sites import layer_index, place_of

FINAL, EMBED = "final", "embed"
_SWEEPS = {"heads": "z", "mlps": "mlp_out"}
_INPUTS = ("q", "k", "v")

Job = tuple[Patch, ...]
"""Senders that speak together: one entry of the grid."""


@dataclass(frozen=True)
class _Receiver:
    """Where a path ends.

    Attributes:
        name: The point.
        layer: Its layer; the number of layers at the end of the stream.
        heads: Which heads of it, [head]; None for all there is.
        reads_first: Whether it is what a layer's attention reads, which nothing in its own layer comes
            before.
    """

    name: str
    layer: int
    heads: Bool[Tensor, " head"] | None = None
    reads_first: bool = True


def path_patch(
    bridge: TransformerBridge,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    senders: Any = "heads",
    receivers: Any = FINAL,
    *,
    positions: Any = ALL,
    into: str = "corrupted",
    batch_size: int | None = None,
    progress: bool = True,
    **run_kwargs: Any,
) -> PatchGrid:
    """Patch what senders say to receivers along the direct paths between them, and measure what that does.

    In the run that is patched, the senders' outputs are those of the other run, and every other attention,
    MLP or mixer is held at what it puts out unpatched. What the receivers then read is what they would read
    if nothing but the senders had spoken differently: it has come through the residual stream alone, and
    the norms on the way. In a last run only the receivers read this, and everything behind them follows
    freely.

    Args:
        bridge: The model.
        clean: One input, as in `TransformerBridge.forward`, or a mapping of its keywords.
        corrupted: The other, of as many rows and tokens, padded alike.
        metric: See `Metric`; `logit_difference` makes one.
        senders: ``"heads"`` or ``"mlps"``: each by itself, a grid. Or some that speak together, one number:
            ``(layer, head)``, ``("mlp", layer)``, ``"embed"`` (what enters the first layer), or a list.
        receivers: ``"final"`` (the stream behind the last layer), ``("q", layer, head)``, likewise ``"k"``
            and ``"v"`` (by group where heads are grouped), ``("mlp", layer)``, or a list: all read together.
        positions: Where senders are patched: ``"all"``, ``"each"`` by itself, or a list as in
            `activation_patch`.
        into: Which run is patched, ``"corrupted"`` or ``"clean"``.
        batch_size: How many rows go through the model at once; 32 unless given.
        progress: Show a bar that counts senders.
        **run_kwargs: Further keywords of the model's forward, for both runs.
    Returns:
        The metric for each sender: [layer, head] or [layer], then [pos] where positions are patched one by
        one. Senders that come before no receiver change nothing and are not run.
    Raises:
        InputError: Inputs that do not align, senders or receivers that are none or not there, or no path
            between them.
        ArchitectureError: A model whose layers are not known to be sums of branches, so that nothing can be
            held still.
        AbsentPointError, LayerRangeError: This model has no such sender or receiver; says why.
    Source: Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching"; Wang et al. 2022.
    """
    if into not in ("corrupted", "clean"):
        raise InputError(f"into must be 'corrupted' or 'clean', got {into!r}")
    _refuse(bridge)
    ends = _receivers(bridge, receivers)
    with torch.inference_mode(False), torch.no_grad():
        runs = {
            which: MeasuredRun(bridge, prepared(bridge, given, run_kwargs), metric)
            for which, given in (("clean", clean), ("corrupted", corrupted))
        }
        check_aligned(runs["clean"].inputs, runs["corrupted"].inputs)
        here, other = runs[into], runs["clean" if into == "corrupted" else "corrupted"]
        points = _points(bridge, senders)
        source = other.values(list(dict.fromkeys(name for name, _, _ in points)), once=True)
        for name, value in source.items():
            check_rows(other, name, value)
        axes, jobs = _jobs(bridge, here, senders, points, source, positions)
        held = here.values(_frozen(bridge, [name for name, _, _ in points]), once=True)
        plain = {which: run.measured(run.logits()[0]) for which, run in runs.items()}
        layers = {name: layer for name, layer, _ in points}
        open_jobs = [
            index
            for index, job in enumerate(jobs)
            if any(
                _comes_before(layers[patch.name], patch.name, end) for patch in job for end in ends
            )
        ]
        if not open_jobs:
            raise InputError(
                f"no sender comes before a receiver, so there is no path from {senders!r} to {receivers!r}"
            )
        found = [plain[into]] * len(jobs)
        chunks = batches_of(here, len(open_jobs), batch_size)
        for chunk in counted(chunks, len(open_jobs), progress, "patching paths"):
            own = [jobs[open_jobs[at]] for at in chunk]
            for at, value in zip(chunk, _measured(here, held, source, own, ends), strict=True):
                found[open_jobs[at]] = value
    spoken = senders if isinstance(senders, str) else "senders"
    return gridded(
        f"{spoken} to {_named(receivers)}",
        axes,
        torch.stack(found),
        plain,
        into=into,
        tokens=words_of(here),
    )


# --- who speaks and who listens ------------------------------------------------------------------------


def _refuse(bridge: TransformerBridge) -> None:
    """What can be told before anything is run."""
    architecture = bridge.architecture
    for index, block in enumerate(architecture.blocks):
        why = architecture.unproved or block.unproved
        if why:
            raise ArchitectureError(
                f"what {bridge.registry.layers}.{index} makes is not known to be a sum of branches, so "
                f"they cannot be held still: {why}"
            )


def _points(bridge: TransformerBridge, senders: Any) -> list[tuple[str, int, int | None]]:
    """Point, layer and head of each sender; of a sweep, of each layer."""
    if isinstance(senders, str) and senders in _SWEEPS:
        places = sites_at(bridge, _SWEEPS[senders], None)
        return [(str(place.point.name), place.layer or 0, None) for place in places]
    found: list[tuple[str, int, int | None]] = []
    nodes = senders if isinstance(senders, list) else [senders]
    for node in nodes:
        match node:
            case "embed":
                place = place_of("block_input", 0, bridge)
                found.append((str(place.point.name), -1, None))
            case ("mlp", int() as layer):
                place = place_of("mlp_out", layer, bridge)
                found.append((str(place.point.name), layer_index(layer, bridge), None))
            case (int() as layer, int() as head):
                place = place_of("z", layer, bridge)
                found.append((str(place.point.name), layer_index(layer, bridge), head))
            case _:
                raise InputError(
                    "senders are 'heads' or 'mlps' one by one, or some together: (layer, head), "
                    f"('mlp', layer), 'embed', or a list of these; got {node!r}"
                )
    if not found:
        raise InputError("senders is empty: name some, or 'heads', or 'mlps'")
    return found


def _jobs(
    bridge: TransformerBridge,
    run: MeasuredRun,
    senders: Any,
    points: list[tuple[str, int, int | None]],
    source: dict[str, Tensor],
    positions: Any,
) -> tuple[list[tuple[str, tuple[Any, ...]]], list[Job]]:
    """The grid's axes and who speaks in each of its entries."""
    every, jobs = [], []
    for name, _, head in points:
        point = bridge.registry[name]
        heads = (EACH if head is None else [head]) if "head" in point.axes.split() else None
        axes = axes_of(point, source[name], run.inputs, positions, heads)
        jobs.append([(patch,) for patch in patches_of(name, source[name], axes)])
        every.append([(axis.name, axis.labels) for axis in axes])
    if isinstance(senders, str) and senders in _SWEEPS:
        if any(own != every[0] for own in every):
            raise InputError(
                f"layers have different numbers of {senders}, so they make no grid: name senders one by "
                "one"
            )
        layers = tuple(layer for _, layer, _ in points)
        return [("layer", layers), *every[0]], [job for own in jobs for job in own]
    # Together: entry by entry of what they have in common, the positions.
    where = [axis for axis in every[0] if axis[0] == "pos"]
    return where, [tuple(part for job in one for part in job) for one in zip(*jobs, strict=True)]


def _receivers(bridge: TransformerBridge, receivers: Any) -> list[_Receiver]:
    """Where the paths end."""
    count = len(bridge.architecture.blocks)
    found = []
    for node in receivers if isinstance(receivers, list) else [receivers]:
        match node:
            case "final":
                name = str(place_of("block_output", -1, bridge).point.name)
                found.append(_Receiver(name, count))
            case ("mlp", int() as layer):
                name = str(place_of("mlp_input", layer, bridge).point.name)
                found.append(_Receiver(name, layer_index(layer, bridge), reads_first=False))
            case (("q" | "k" | "v") as part, int() as layer, int() as head):
                point = place_of(part, layer, bridge).point
                attn = bridge.architecture.blocks[layer_index(layer, bridge)].attn
                heads = (
                    0 if attn is None else attn.n_heads if part == "q" else attn.n_key_value_heads
                )
                if not 0 <= head < heads:
                    raise InputError(f"{point.name} has heads 0 to {heads - 1}, got {head}")
                mask = torch.arange(heads) == head
                found.append(_Receiver(str(point.name), layer_index(layer, bridge), mask))
            case _:
                raise InputError(
                    "receivers are 'final', ('q', layer, head), ('k', layer, head), ('v', layer, head), "
                    f"('mlp', layer), or a list of these; got {node!r}"
                )
    if not found:
        raise InputError("receivers is empty: name some, or 'final'")
    return found


def _comes_before(layer: int, name: str, end: _Receiver) -> bool:
    """Whether a sender is passed before a receiver reads."""
    if layer != end.layer:
        return layer < end.layer
    return not end.reads_first and name.endswith(".attn.o.hook_in")


def _named(receivers: Any) -> str:
    nodes = receivers if isinstance(receivers, list) else [receivers]
    return ", ".join(
        node if isinstance(node, str) else f"{node[0]} {'.'.join(str(x) for x in node[1:])}"
        for node in nodes
    )


def _frozen(bridge: TransformerBridge, senders: Sequence[str]) -> list[str]:
    """Every point that is held still: what each branch adds, or its heads where one of them speaks."""
    names = []
    for index, block in enumerate(bridge.architecture.blocks):
        here = f"{bridge.registry.layers}.{index}"
        for branch in block.branches:
            heads = f"{here}.{branch.name}.o.hook_in"
            name = heads if heads in senders else f"{here}.hook_{branch.name}_out"
            names.append(bridge.registry.canonical(name))
    final = f"{bridge.registry.layers}.{len(bridge.architecture.blocks) - 1}.hook_out"
    return list(dict.fromkeys([*names, final]))


# --- the runs -----------------------------------------------------------------------------------------------


def _measured(
    run: MeasuredRun,
    held: dict[str, Tensor],
    source: dict[str, Tensor],
    jobs: list[Job],
    ends: list[_Receiver],
) -> list[Tensor]:
    """The metric with each job's senders heard by the receivers."""
    times, final = len(jobs), list(held)[-1]
    read: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        read[str(hook.name)] = tensor.clone()

    def still(name: str) -> Any:
        def put(tensor: Tensor, hook: HookPoint) -> Tensor:
            own = held.get(name)
            value = tensor if own is None else own.repeat(times, *[1] * (own.dim() - 1))
            copies = value.to(tensor).unflatten(0, (times, -1)).clone()
            for index, job in enumerate(jobs):
                for patch in job:
                    if patch.name == name:
                        mask = patch.mask.to(copies.device)
                        copies[index] = torch.where(mask, source[name].to(copies), copies[index])
            return copies.flatten(0, 1)

        return put

    speaking = [name for name in source if name not in held]  # what enters the first layer
    hooks = [(name, still(name)) for name in [*speaking, *held] if name != final]
    names = list(dict.fromkeys(end.name for end in ends))
    with run.bridge.hooks(fwd_hooks=hooks) as scope:
        scope.observe([run.bridge.registry[name] for name in names], keep, must_fire=True)
        parts = run.logits(times)
    if names == [final]:
        return [run.measured(part) for part in parts]

    def heard(name: str) -> Any:
        heads = [end.heads for end in ends if end.name == name and end.heads is not None]

        def put(tensor: Tensor, hook: HookPoint) -> Tensor:
            if name == final:  # behind every other receiver: what the senders add to what those do
                own = held[final]
                return tensor + read[name] - own.repeat(times, *[1] * (own.dim() - 1)).to(tensor)
            if not heads:
                return read[name]
            chosen = torch.stack(heads).any(0).to(tensor.device)
            return torch.where(chosen[:, None], read[name], tensor)

        return put

    with run.bridge.hooks(fwd_hooks=[(name, heard(name)) for name in names]):
        return [run.measured(part) for part in run.logits(times)]
