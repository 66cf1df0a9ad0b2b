"""Activation patching: values of one run put into another, and what that does to a number from the logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ActivationCache, TransformerBridge
from ..hooks import HookPoint, InputError
from .attribution import attribution_patching
from .measured import MeasuredRun, Metric, prepared
from .patch_grid import (
    EACH,
    Axis,
    PatchGrid,
    axes_of,
    check_aligned,
    check_rows,
    counted,
    patches_of,
    sites_at,
    sweep,
)


def activation_patch(
    bridge: TransformerBridge,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    site: str = "resid_pre",
    *,
    layers: Iterable[int] | int | None = None,
    positions: Any = None,
    heads: Any = None,
    sources: Any = None,
    into: str = "corrupted",
    first_order: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
    **run_kwargs: Any,
) -> PatchGrid:
    """Patch activations of one run into another, each place by itself, and measure what that does.

    A patch is a row of a batch: as many as fit go through the model together. Where rows cannot be repeated
    (hooks of the caller that edit, inputs that are not [batch, ...]), each patch is a run of its own.

    Args:
        bridge: The model.
        clean: One input, as in `TransformerBridge.forward`, or a mapping of its keywords.
        corrupted: The other, of as many rows and tokens, padded alike.
        metric: See `Metric`; `logit_difference` makes one.
        site: What to patch: ``"resid_pre"``, ``"resid_mid"``, ``"attn_out"``, ``"mlp_out"``, ``"z"``,
            ``"q"``, ``"k"``, ``"v"``, ``"pattern"``, or any other site or hook point.
        layers: Which, negative from the end; None for all that have the site.
        positions: ``"each"`` by itself, ``"all"`` together, or a list of positions; a list in it is patched
            together. Negative counts from each row's last real token, which is -1. None: each for what has no
            heads, all for what has. Of a pattern: the positions that attend.
        heads: Likewise, for what has heads; None: each. Keys and values of grouped heads are patched by
            group.
        sources: Of a pattern, the positions that are attended to; None: all.
        into: Which run is patched: ``"corrupted"`` (does it restore the answer?) or ``"clean"`` (does it
            break it?).
        first_order: Estimate all patches from one backward pass (attribution patching) instead of running
            them; the same grid.
        batch_size: How many rows go through the model at once; 32 unless given.
        progress: Show a bar that counts patches.
        **run_kwargs: Further keywords of the model's forward, for both runs.
    Returns:
        The metric under each patch, [layer], then [head], [pos] and [key] where those are patched one by one.
    Raises:
        InputError: Inputs that do not align, positions or heads that are not there, a metric that is no
            number a row; or as in `gradients` with ``first_order``.
        UnknownPointError, AbsentPointError, LayerRangeError: No such site or layer.
        HookNotFiredError: The run does not pass the site.
    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; Vig et al. 2020.
    """
    if into not in ("corrupted", "clean"):
        raise InputError(f"into must be 'corrupted' or 'clean', got {into!r}")
    places = sites_at(bridge, site, layers)
    names = [str(place.point.name) for place in places]
    with torch.inference_mode(False), torch.no_grad():
        runs = {
            which: MeasuredRun(bridge, prepared(bridge, given, run_kwargs), metric)
            for which, given in (("clean", clean), ("corrupted", corrupted))
        }
        check_aligned(runs["clean"].inputs, runs["corrupted"].inputs)
        here, other = runs[into], runs["clean" if into == "corrupted" else "corrupted"]
        source = other.values(names, once=True)
        every = []
        for place, name in zip(places, names, strict=True):
            check_rows(other, name, source[name])
            every.append(axes_of(place.point, source[name], here.inputs, positions, heads, sources))
        axes = _common(every, names)
        plain = {which: run.measured(run.logits()[0]) for which, run in runs.items()}
        if first_order:
            found = _estimated(bridge, (clean, corrupted), metric, names, every, into, run_kwargs)
            found = found + plain[into] if plain[into].dim() else found.sum(-1) + plain[into]
        else:
            patches = [
                patch
                for name, own in zip(names, every, strict=True)
                for patch in patches_of(name, source[name], own)
            ]
            found = sweep(
                here,
                source,
                patches,
                batch_size=batch_size,
                progress=progress,
                desc=f"patching {site}",
            )
    return gridded(
        site,
        (("layer", tuple(place.layer for place in places)), *((a.name, a.labels) for a in axes)),
        found,
        plain,
        into=into,
        is_estimate=first_order,
        tokens=words_of(here),
    )


def gridded(
    site: str,
    axes: Sequence[tuple[str, tuple[Any, ...]]],
    found: Tensor,
    plain: dict[str, Tensor],
    **facts: Any,
) -> PatchGrid:
    """A grid of what was measured, patch by patch.

    Args:
        site: What was patched.
        axes: Names and labels of the grid's dimensions.
        found: [patch] or [patch, batch].
        plain: The metric of the clean and of the corrupted run, [] or [batch].
        **facts: The grid's further attributes.
    """
    wide = found.detach().cpu().to(torch.promote_types(found.dtype, torch.float32))
    sizes = [len(labels) for _, labels in axes]
    by_row = wide.view(*sizes, -1) if wide.dim() > 1 else None
    values = wide.view(sizes) if by_row is None else by_row.mean(-1)
    ends = {which: float(one.to(wide).mean()) for which, one in plain.items()}
    return PatchGrid(
        site,
        tuple(name for name, _ in axes),
        tuple(labels for _, labels in axes),
        values,
        ends["clean"],
        ends["corrupted"],
        by_row,
        **facts,
    )


def words_of(run: MeasuredRun) -> tuple[str, ...] | None:
    """The tokens of a run of one row, as text."""
    tokens = run.inputs.tokens
    if tokens is None or len(tokens) != 1 or run.bridge.tokenizer is None:
        return None
    return tuple(run.bridge.to_single_str_token(token) for token in tokens[0].tolist())


def _common(every: list[list[Axis]], names: list[str]) -> list[Axis]:
    """The axes of all layers.

    Raises:
        InputError: They differ, as layers with different numbers of heads do.
    """
    for axes, name in zip(every, names, strict=True):
        for own, first in zip(axes, every[0], strict=True):
            if own.labels != first.labels:
                raise InputError(
                    f"{name} has {len(own.labels)} entries of {own.name} and {names[0]} "
                    f"{len(first.labels)}, so "
                    "they make no grid: choose layers that are alike with layers="
                )
    return every[0]


def _estimated(
    bridge: TransformerBridge,
    inputs: tuple[Any, Any],
    metric: Metric,
    names: list[str],
    every: list[list[Axis]],
    into: str,
    run_kwargs: dict[str, Any],
) -> Float[Tensor, "patch batch"]:
    """What each patch adds to the metric, to first order, for each row."""
    made = attribution_patching(bridge, *inputs, metric, names, into=into, **run_kwargs)
    found = []
    for name, axes in zip(names, every, strict=True):
        value = made[name]
        rest = sorted(set(range(1, value.dim())) - {axis.dim for axis in axes})
        small = value.sum(rest, keepdim=True) if rest else value
        for patch in patches_of(name, value, axes):
            mask = patch.mask.to(small.device)
            found.append(torch.where(mask, small, 0.0).flatten(1).sum(1))
    return torch.stack(found)


# --- the names of TransformerLens ---------------------------------------------------------------------------

_BLOCK = ("resid_pre", "attn_out", "mlp_out")
_HEAD = ("z", "q", "k", "v", "pattern")


def _patches_as(site: str, *order: str) -> Callable[..., Tensor]:
    """A function of TransformerLens's ``patching``; see `generic_activation_patch`.

    Args:
        site: What it patches.
        order: The dimensions of what it returns.
    """
    wanted = {
        "positions": EACH if {"pos", "dest_pos"} & set(order) else "all",
        "heads": EACH if "head" in order else None,
        "sources": EACH if "src_pos" in order else None,
    }

    def patch(
        model: TransformerBridge,
        corrupted_tokens: Any,
        clean_cache: ActivationCache,
        patching_metric: Metric,
        *,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        run = MeasuredRun(model, model.prepare(corrupted_tokens), patching_metric)
        places = sites_at(model, site, None)
        source = {str(place.point.name): clean_cache[str(place.point.name)] for place in places}
        every = [
            axes_of(place.point, source[str(place.point.name)], run.inputs, **wanted)
            for place in places
        ]
        axes = _common(every, list(source))
        patches = [
            patch
            for (name, value), own in zip(source.items(), every, strict=True)
            for patch in patches_of(name, value, own)
        ]
        found = sweep(
            run, source, patches, batch_size=batch_size, progress=progress, desc=f"patching {site}"
        )
        grid = found.float() if found.dim() == 1 else found.float().mean(-1)
        grid = grid.view(len(places), *(len(axis.labels) for axis in axes))
        return grid.transpose(1, 2) if order == ("layer", "pos", "head") else grid

    patch.__doc__ = (
        f"The metric with ``{site}`` of the clean cache in the corrupted run: [{', '.join(order)}].\n\n"
        "    Args:\n"
        "        model: A bridge.\n"
        "        corrupted_tokens: The run that is patched.\n"
        "        clean_cache: Of the other run, of as many rows and tokens.\n"
        "        patching_metric: See `Metric`; the mean over rows is returned.\n"
        "        batch_size: How many rows go through the model at once; 32 unless given.\n"
        "        progress: Show a bar.\n"
    )
    return patch


get_act_patch_resid_pre = _patches_as("resid_pre", "layer", "pos")
get_act_patch_resid_mid = _patches_as("resid_mid", "layer", "pos")
get_act_patch_resid_post = _patches_as("resid_post", "layer", "pos")
get_act_patch_attn_out = _patches_as("attn_out", "layer", "pos")
get_act_patch_mlp_out = _patches_as("mlp_out", "layer", "pos")
get_act_patch_attn_head_out_by_pos = _patches_as("z", "layer", "pos", "head")
get_act_patch_attn_head_q_by_pos = _patches_as("q", "layer", "pos", "head")
get_act_patch_attn_head_k_by_pos = _patches_as("k", "layer", "pos", "head")
get_act_patch_attn_head_v_by_pos = _patches_as("v", "layer", "pos", "head")
get_act_patch_attn_head_pattern_by_pos = _patches_as("pattern", "layer", "head", "dest_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _patches_as(
    "pattern", "layer", "head", "dest_pos", "src_pos"
)
get_act_patch_attn_head_out_all_pos = _patches_as("z", "layer", "head")
get_act_patch_attn_head_q_all_pos = _patches_as("q", "layer", "head")
get_act_patch_attn_head_k_all_pos = _patches_as("k", "layer", "head")
get_act_patch_attn_head_v_all_pos = _patches_as("v", "layer", "head")
get_act_patch_attn_head_pattern_all_pos = _patches_as("pattern", "layer", "head")


def get_act_patch_block_every(*args: Any, **kwargs: Any) -> Float[Tensor, "3 layer pos"]:
    """``resid_pre``, ``attn_out`` and ``mlp_out``; arguments as of `get_act_patch_resid_pre`."""
    return torch.stack([_patches_as(site, "layer", "pos")(*args, **kwargs) for site in _BLOCK])


def get_act_patch_attn_head_all_pos_every(
    *args: Any, **kwargs: Any
) -> Float[Tensor, "5 layer head"]:
    """``z``, ``q``, ``k``, ``v`` and ``pattern``; arguments as of `get_act_patch_resid_pre`.

    Raises:
        InputError: Keys and values are grouped, so that they make no grid with the others.
    """
    return _stacked([_patches_as(site, "layer", "head")(*args, **kwargs) for site in _HEAD])


def get_act_patch_attn_head_by_pos_every(
    *args: Any, **kwargs: Any
) -> Float[Tensor, "5 layer pos head"]:
    """``z``, ``q``, ``k``, ``v`` and ``pattern``; arguments as of `get_act_patch_resid_pre`.

    Raises:
        InputError: Keys and values are grouped, so that they make no grid with the others.
    """
    made = [_patches_as(site, "layer", "pos", "head")(*args, **kwargs) for site in _HEAD]
    return _stacked(made)


def _stacked(made: list[Tensor]) -> Tensor:
    if len({x.shape for x in made}) > 1:
        sizes = ", ".join(f"{site} {list(x.shape)}" for site, x in zip(_HEAD, made, strict=True))
        raise InputError(
            f"keys and values are grouped here, so the grids cannot be stacked ({sizes}): patch "
            f"them one by one"
        )
    return torch.stack(made)


def generic_activation_patch(
    model: TransformerBridge,
    corrupted_tokens: Any,
    clean_cache: ActivationCache,
    patching_metric: Metric,
    patch_setter: Callable[[Tensor, list[int], Tensor], Any],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    *,
    progress: bool = True,
) -> Any:
    """Patch with a function of your own, one run a patch, called as TransformerLens's.

    Args:
        model: A bridge.
        corrupted_tokens: The run that is patched.
        clean_cache: Of the other run.
        patching_metric: See `Metric`; the mean over rows counts.
        patch_setter: ``fn(corrupted, index, clean)`` gets the values of both runs and an index, which begins
            with the layer; it returns what to go on with, or changes ``corrupted`` in place.
        activation_name: What to patch: ``"resid_pre"``, ``"z"``...
        index_axis_names: What is numbered through: ``"layer"``, then ``"pos"``, ``"head"`` or
            ``"head_index"``, ``"dest_pos"``, ``"src_pos"``.
        index_df: Instead, a table of the indices themselves, a column ``layer`` first.
        return_index_df: Return that table too; needs pandas.
        progress: Show a bar.
    Returns:
        The metric by the named axes, or [row of the table].
    Raises:
        InputError: Both or neither of names and table, or an axis that is not known.
    """
    if (index_axis_names is None) == (index_df is None):
        raise InputError("give index_axis_names or index_df, one of the two")
    run = MeasuredRun(model, model.prepare(corrupted_tokens), patching_metric)
    shape: tuple[int, ...] = ()
    if index_axis_names is not None:
        places = sites_at(model, activation_name, None)
        shape = _sizes(index_axis_names, clean_cache[str(places[0].point.name)], places)
        indices = [list(index) for index in itertools.product(*(range(n) for n in shape))]
        if [place.layer for place in places] != list(range(len(places))):
            raise InputError(
                f"{activation_name} is in layers {[place.layer for place in places]}, not in all: list the "
                "indices in index_df="
            )
    else:
        indices = [[int(x) for x in row] for row in index_df.to_numpy().tolist()]
    found = []
    for (index,) in counted([[index] for index in indices], len(indices), progress, "patching"):
        (place,) = sites_at(model, activation_name, index[0])
        clean = clean_cache[str(place.point.name)]

        def put(tensor: Tensor, hook: HookPoint, index: Any = index, clean: Tensor = clean) -> Any:
            edited = tensor.clone()
            made = patch_setter(edited, index, clean)
            return edited if made is None else made

        with torch.no_grad(), model.hooks(fwd_hooks=[(place.point, put)]):
            found.append(run.measured(run.logits()[0]).float().mean())
    made = torch.stack(found).cpu().view(shape or (len(indices),))
    if not return_index_df:
        return made
    if index_df is None:
        import pandas as pd

        index_df = pd.DataFrame(indices, columns=list(index_axis_names or ()))
    return made, index_df


def _sizes(names: Sequence[str], value: Tensor, places: Sequence[Any]) -> tuple[int, ...]:
    """How long each named axis is."""
    dims = places[0].point.axes.split()
    known = {
        "layer": len(places),
        **{
            name: value.shape[dims.index(dim)]
            for dim, own in {
                "pos": ("pos",),
                "query": ("pos", "dest_pos"),
                "key": ("src_pos",),
                "head": ("head", "head_index"),
                "kv_head": ("head", "head_index"),
            }.items()
            if dim in dims
            for name in own
        },
    }
    if not names or names[0] != "layer" or set(names) - set(known):
        raise InputError(
            f"index_axis_names begins with 'layer', then some of {', '.join(list(known)[1:])}; got "
            f"{list(names)}"
        )
    return tuple(known[name] for name in names)
