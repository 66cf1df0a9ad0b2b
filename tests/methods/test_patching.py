"""Activation patching against plain PyTorch hooks on the bare model, one patch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import ActivationCache
from lensbridge.hooks import (
    AbsentPointError,
    InputError,
    LayerRangeError,
    UnknownPointError,
    act_name,
)
from lensbridge.methods import attribution, patching
from lensbridge.methods.measured import logit_difference

# Runs are passed as pairs whose length a type checker cannot know.
activation_patch: Any = patching.activation_patch
generic_activation_patch: Any = patching.generic_activation_patch
attribution_patching: Any = attribution.attribution_patching

MODELS = [("gpt2", "causal"), ("llama", "causal"), ("bert", "masked"), ("gpt_neox", "causal")]


def _metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 11] - 2 * logits[:, -2, 40]


def _other(ids: Tensor) -> Tensor:
    """The same text with two tokens changed."""
    changed = ids.clone()
    changed[:, 2], changed[:, 5] = (changed[:, 2] + 7) % 100 + 8, (changed[:, 5] + 9) % 100 + 8
    return changed


@pytest.fixture
def pair(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, _other(ids)


def _neox(q_k_or_v: int, head: int, n_heads: int) -> Callable[[Tensor], Tensor]:
    """Where a head's share is in GPT-NeoX's joint output: head by head, (q, k, v) in each."""

    def of(x: Tensor) -> Tensor:
        return x.unflatten(-1, (n_heads, 3, -1))[..., head, q_k_or_v, :]

    return of


def _heads(n: int, head: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.unflatten(-1, (n, -1))[..., head, :]


def _at(pos: int, take: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Tensor], Tensor]:
    return lambda x: take(x)[:, pos]


def _by_hand(
    plain: Any,
    model: Any,
    runs: tuple[Tensor, Tensor],
    place: str,
    take: Callable[[Tensor], Tensor],
) -> Tensor:
    """The metric of each row, with a part of what passes a place taken from the clean run."""
    (value,) = plain.read(model, runs[0], place)[place]

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        take(x)[:] = take(value)  # a view of x
        return x

    with torch.no_grad():
        return _metric(plain.edited(model, runs[1], place, put))


@pytest.mark.parametrize("which", MODELS, ids=lambda which: which[0])
@pytest.mark.parametrize(
    ("site", "called"),
    [("resid_pre", "block_input"), ("attn_out", "attn_output"), ("mlp_out", "mlp_output")],
)
def test_positions_by_hand(
    lens_of: Any, places: Any, plain: Any, pair: Any, which: Any, site: str, called: str
) -> None:
    """Each layer and position, by a plain hook on the module that makes or takes the value."""
    lens = lens_of(*which)
    grid = activation_patch(lens.bridge, *pair, _metric, site, progress=False)
    assert grid.axes == ("layer", "pos")
    assert grid.labels == ((0, 1), tuple(range(9)))
    for layer in (0, 1):
        place = places.PLACES[which][called].format(i=layer)
        for pos in (0, 2, 5, 8):
            found = _by_hand(plain, lens.model, pair, place, _at(pos))
            torch.testing.assert_close(grid.by_row[layer, pos], found)
            torch.testing.assert_close(grid.values[layer, pos], found.mean())


@pytest.mark.parametrize("which", MODELS, ids=lambda which: which[0])
def test_heads_by_hand(lens_of: Any, places: Any, plain: Any, pair: Any, which: Any) -> None:
    """Each layer and head: what the output projection reads."""
    lens = lens_of(*which)
    n = lens.bridge.cfg.n_heads
    grid = activation_patch(lens.bridge, *pair, _metric, "z", progress=False)
    assert grid.axes == ("layer", "head")
    assert grid.values.shape == (2, n)
    for layer in (0, 1):
        place = places.PLACES[which]["attn_o_proj_pre"].format(i=layer)
        for head in range(n):
            found = _by_hand(plain, lens.model, pair, place, _heads(n, head))
            torch.testing.assert_close(grid.by_row[layer, head], found)
    assert grid.values.std() > 1e-3


@pytest.mark.parametrize(("site", "index"), [("q", 0), ("k", 1), ("v", 2)])
def test_shares_of_a_joint_projection(
    lens_of: Any, plain: Any, pair: Any, site: str, index: int
) -> None:
    """GPT-NeoX's q, k and v lie side by side in one output, head by head."""
    lens = lens_of("gpt_neox")
    n = lens.bridge.cfg.n_heads
    grid = activation_patch(
        lens.bridge, *pair, _metric, site, positions=[2, 5, 7], heads="each", progress=False
    )
    assert grid.axes == ("layer", "head" if site == "q" else "kv_head", "pos")
    assert grid.labels == ((0, 1), tuple(range(n)), (2, 5, 7))
    for layer in (0, 1):
        place = f"gpt_neox.layers.{layer}.attention.query_key_value"
        for head in range(n):
            for column, pos in enumerate((2, 5, 7)):
                take = _at(pos, _neox(index, head, n))
                found = _by_hand(plain, lens.model, pair, place, take)
                torch.testing.assert_close(grid.by_row[layer, head, column], found)


def test_grouped_heads(lens_of: Any, plain: Any, pair: Any) -> None:
    """Llama's values are shared by groups of heads, and are patched by group."""
    lens = lens_of("llama")
    groups = lens.bridge.cfg.n_key_value_heads
    assert groups < lens.bridge.cfg.n_heads
    grid = activation_patch(lens.bridge, *pair, _metric, "v", progress=False)
    assert grid.axes == ("layer", "kv_head")
    for layer in (0, 1):
        for head in range(groups):
            place = f"model.layers.{layer}.self_attn.v_proj"
            found = _by_hand(plain, lens.model, pair, place, _heads(groups, head))
            torch.testing.assert_close(grid.by_row[layer, head], found)


@pytest.mark.parametrize("which", MODELS, ids=lambda which: which[0])
def test_exact_ends(lens_of: Any, pair: Any, which: Any) -> None:
    """All of the first layer's input is the clean run; a run patched into itself is itself. To the bit."""
    bridge = lens_of(*which).bridge
    whole = activation_patch(
        bridge, *pair, _metric, layers=0, positions="all", batch_size=2, progress=False
    )
    assert whole.axes == ("layer",)
    assert whole.normalised.tolist() == [1.0]
    assert whole.effects.tolist() == [whole.clean - whole.corrupted]
    same = activation_patch(bridge, pair[1], pair[1], _metric, batch_size=2, progress=False)
    assert torch.equal(same.values, torch.full_like(same.values, whole.corrupted))
    with pytest.raises(InputError, match="in the clean and in the corrupted run"):
        _ = same.normalised
    # And the last layer's output reaches every logit at its own position only.
    with torch.no_grad():
        clean, corrupted = (_metric(lens_of(*which).model(x).logits).mean() for x in pair)
    torch.testing.assert_close(torch.tensor(whole.clean), clean)
    torch.testing.assert_close(torch.tensor(whole.corrupted), corrupted)


def test_into_the_clean_run(lens_of: Any, pair: Any) -> None:
    """into="clean" is the same with the runs exchanged, on the same scale."""
    bridge = lens_of("gpt2").bridge
    into = activation_patch(bridge, *pair, _metric, "z", into="clean", progress=False)
    other = activation_patch(bridge, *pair[::-1], _metric, "z", progress=False)
    assert torch.equal(into.values, other.values)
    assert (into.clean, into.corrupted) == (other.corrupted, other.clean)
    torch.testing.assert_close(into.normalised, 1 - other.normalised)
    assert torch.equal(into.effects, into.values - into.clean)


def test_batches(lens_of: Any, pair: Any) -> None:
    """How many patches go through the model at once changes nothing but the number of runs."""
    bridge = lens_of("gpt2").bridge
    grids, runs = {}, {}
    for size in (1, 2, 5, 64):
        calls: list[int] = []
        with bridge.registry.hooks() as scope:
            scope.observe(
                [bridge.registry["blocks.0.hook_in"]],
                lambda x, hook, calls=calls: calls.append(len(x)),
            )
            grids[size] = activation_patch(
                bridge, *pair, _metric, "z", batch_size=size, progress=False
            ).values
        runs[size] = calls[3:]  # the clean run once for its values, both for their metric
    assert runs == {1: [2] * 8, 2: [2] * 8, 5: [4] * 4, 64: [16]}
    for found in grids.values():
        torch.testing.assert_close(found, grids[2])


def test_under_an_editing_hook(lens_of: Any, plain: Any, pair: Any) -> None:
    """A hook of the caller that edits sees the rows it knows, and is part of every run."""
    lens = lens_of("gpt2")
    rows: list[int] = []

    def halved(x: Tensor, hook: Any) -> Tensor:
        rows.append(len(x))
        return x * 0.5

    with lens.bridge.hooks(fwd_hooks=[("blocks.0.mlp.hook_out", halved)]):
        grid = activation_patch(lens.bridge, *pair, _metric, "z", layers=[1], progress=False)
    assert set(rows) == {2}
    with plain.watching(lens.model, "transformer.h.0.mlp", lambda x, count: x * 0.5):
        for head in range(4):
            found = _by_hand(
                plain, lens.model, pair, "transformer.h.1.attn.c_proj<", _heads(4, head)
            )
            torch.testing.assert_close(grid.by_row[0, head], found)


def test_positions_of_padded_rows(lens_of: Any, plain: Any, pair: Any) -> None:
    """Negative positions count from each row's last real token; lists are patched together."""
    lens = lens_of("gpt2")
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    metric = logit_difference([5, 6], [7, 8])
    grid = activation_patch(
        lens.bridge,
        *pair,
        metric,
        "resid_pre",
        layers=-1,
        positions=[-1, [0, -2], 3],
        attention_mask=mask,
        progress=False,
    )
    assert grid.labels == ((1,), (-1, (0, -2), 3))
    place = "transformer.h.1<"
    given = [{"input_ids": x, "attention_mask": mask} for x in pair]
    (value,) = plain.read(lens.model, given[0], place)[place]
    ends = [8, 5]
    for column, group in enumerate(([-1], [0, -2], [3])):

        def put(x: Tensor, group: Any = group) -> Tensor:
            x = x.clone()
            for row, end in enumerate(ends):
                for pos in group:
                    at = pos if pos >= 0 else end + 1 + pos
                    x[row, at] = value[row, at]
            return x

        logits = plain.edited(lens.model, given[1], place, put)[[0, 1], ends]
        found = logits[[0, 1], [5, 6]] - logits[[0, 1], [7, 8]]
        torch.testing.assert_close(grid.by_row[0, column], found)


def test_pattern_entries(lens_of: Any, pair: Any) -> None:
    """A pattern by head, by attending position, and by what is attended to."""
    bridge = lens_of("llama").bridge
    names = "blocks.*.attn.hook_pattern"
    _, clean = bridge.run_with_cache(pair[0], names_filter=names)
    grid = activation_patch(
        bridge,
        *pair,
        _metric,
        "pattern",
        positions=[6, 8],
        sources=[2, 5],
        heads=[1, 3],
        progress=False,
    )
    assert grid.axes == ("layer", "head", "pos", "key")
    for layer in (0, 1):
        for i, head in enumerate((1, 3)):
            for j, query in enumerate((6, 8)):
                for k, key in enumerate((2, 5)):

                    def put(
                        x: Tensor, hook: Any, head: int = head, query: int = query, key: int = key
                    ) -> None:
                        x[:, head, query, key] = clean[hook.name][:, head, query, key]

                    logits = bridge.run_with_hooks(
                        pair[1], fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", put)]
                    )
                    torch.testing.assert_close(grid.by_row[layer, i, j, k], _metric(logits))


def test_metrics(lens_of: Any, pair: Any) -> None:
    """One number for all rows, one a row, a token, a lead of one token over another."""
    bridge = lens_of("gpt2").bridge
    found = {
        name: activation_patch(bridge, *pair, metric, "z", progress=False)
        for name, metric in {
            "rows": lambda logits: logits[:, -1, 5] - logits[:, -1, 9],
            "whole": lambda logits: (logits[:, -1, 5] - logits[:, -1, 9]).mean(),
            "lead": logit_difference(5, 9),
            "right": 5,
            "wrong": [9, 9],
            "text": logit_difference(bridge.to_string([5]), [bridge.to_string([9])] * 2),
        }.items()
    }
    assert found["whole"].by_row is None
    torch.testing.assert_close(found["rows"].values, found["whole"].values)
    for name in ("lead", "text"):
        torch.testing.assert_close(found["rows"].by_row, found[name].by_row)
    difference = found["right"].by_row - found["wrong"].by_row
    torch.testing.assert_close(found["lead"].by_row, difference)


def test_first_order(lens_of: Any, pair: Any) -> None:
    """One backward pass in the same grid: sums of attribution_patching, exact where the metric is linear."""
    bridge = lens_of("gpt2").bridge
    dims = {"z": (3,), "resid_pre": (2,), "q": (3,)}
    for site, options in {"z": {}, "resid_pre": {}, "q": {"positions": "each"}}.items():
        real = activation_patch(bridge, *pair, _metric, site, progress=False, **options)
        found = activation_patch(bridge, *pair, _metric, site, first_order=True, **options)
        assert (found.axes, found.labels) == (real.axes, real.labels)
        assert (found.clean, found.corrupted) == (real.clean, real.corrupted)
        assert found.is_estimate
        assert not real.is_estimate
        names = [bridge.registry.canonical(act_name(site, layer)) for layer in (0, 1)]
        made = attribution_patching(bridge, *pair, _metric, names)
        sums = torch.stack(
            [made[name].sum(dims[site]) for name in names]
        )  # [layer, batch, pos, ...]
        if site == "z":
            sums = sums.sum(2)
        elif site == "q":
            sums = sums.transpose(2, 3)
        torch.testing.assert_close(found.effects, sums.mean(1), atol=1e-5, rtol=1e-4)
    end = {"positions": [4, 7, 8]}
    real = activation_patch(bridge, *pair, _metric, "unembed.hook_in", progress=False, **end)
    found = activation_patch(bridge, *pair, _metric, "unembed.hook_in", first_order=True, **end)
    torch.testing.assert_close(found.values, real.values)
    assert real.labels[0] == (None,)
    whole = activation_patch(bridge, *pair, lambda x: _metric(x).sum(), "z", first_order=True)
    rows = activation_patch(bridge, *pair, _metric, "z", first_order=True)
    torch.testing.assert_close(whole.values, rows.by_row.sum(-1))


def test_what_a_grid_says(lens_of: Any, pair: Any) -> None:
    """Its form, and where the metric moved most."""
    bridge = lens_of("gpt2").bridge
    grid = activation_patch(bridge, *(x[:1] for x in pair), _metric, "z", progress=False)
    layer, head, effect = grid.top(1)[0]
    assert abs(effect) == grid.effects.abs().max()
    assert grid.values[layer, head] - grid.corrupted == pytest.approx(effect)
    assert len(grid.top(100)) == 8
    assert repr(grid).startswith("PatchGrid(z, 2 layer, 4 head, patched into corrupted; clean ")
    assert f"most at layer {layer}, head {head}: {effect:+.3f}" in repr(grid)
    assert grid.tokens == tuple(bridge.to_single_str_token(x) for x in pair[1][0].tolist())


def test_progress(lens_of: Any, pair: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The bar counts patches; it can be left out."""
    bridge = lens_of("gpt2").bridge
    activation_patch(bridge, *pair, _metric, "z", batch_size=6)
    assert "8/8" in capsys.readouterr().err
    activation_patch(bridge, *pair, _metric, "z", progress=False)
    assert not capsys.readouterr().err


def test_a_decoder_and_a_mixer(lens_of: Any, pair: Any) -> None:
    """Two stacks: the decoder's layers; and layers that have no attention at all."""
    t5 = lens_of("t5", "seq2seq").bridge
    runs = [{"input_ids": pair[0], "decoder_input_ids": x[:, :5]} for x in pair]
    grid = activation_patch(t5, *runs, _metric, layers=0, positions="all", progress=False)
    assert grid.normalised.tolist() == pytest.approx([1.0], abs=1e-5)
    cross = activation_patch(t5, *runs, _metric, "cross_attn.hook_pattern", progress=False)
    assert cross.axes == ("layer", "head")
    mamba = lens_of("mamba").bridge
    grid = activation_patch(mamba, *pair, _metric, layers=[0], positions="all", progress=False)
    assert grid.normalised.tolist() == pytest.approx([1.0], abs=1e-4)
    with pytest.raises(AbsentPointError):
        activation_patch(mamba, *pair, _metric, "z", progress=False)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"site": "resid_pree"}, UnknownPointError, "resid_pree"),
        ({"layers": 9}, LayerRangeError, "layer 9 is not one of this model's 2"),
        ({"layers": []}, InputError, "layers is empty"),
        ({"positions": [9]}, InputError, "positions: there is no 9; there are 9"),
        ({"positions": [-10]}, InputError, "positions: there is no -10"),
        ({"positions": []}, InputError, "positions is empty"),
        ({"positions": "every"}, InputError, "positions is 'each', 'all' or a list, got 'every'"),
        ({"positions": 3}, InputError, "positions is 'each', 'all' or a list, got 3"),
        ({"positions": [1.5]}, InputError, r"whole numbers, or lists of some to patch .* got 1.5"),
        (
            {"heads": "each"},
            InputError,
            r"\[batch pos d_model\] and has no heads: leave heads= out",
        ),
        ({"sources": [1]}, InputError, "has no sources: leave sources= out"),
        ({"site": "z", "heads": [4]}, InputError, "heads: there is no 4; there are 4, from 0"),
        ({"into": "corrupt"}, InputError, "into must be 'corrupted' or 'clean'"),
        ({"batch_size": 0}, InputError, "batch_size counts rows"),
        ({"site": "pos_embed.hook_out"}, InputError, "it has no value for each row"),
        ({"metric": lambda x: x}, InputError, "the metric must give a tensor of one number"),
        ({"metric": logit_difference([1], 2)}, InputError, "correct must be a token id or 2"),
        ({"metric": logit_difference(1, 9999)}, InputError, "incorrect: id 9999 is outside"),
        ({"metric": logit_difference("ab", 1)}, InputError, "is 2 tokens, not one"),
    ],
)
def test_refusals(
    lens_of: Any, left_alone: Any, pair: Any, options: Any, kind: Any, message: str
) -> None:
    """What was given, what was expected; nobody listens afterwards."""
    given = {"metric": _metric, "progress": False, **options}
    with left_alone(lens_of("gpt2")) as lens, pytest.raises(kind, match=message):
        activation_patch(lens.bridge, *pair, **given)


def test_runs_that_do_not_align(lens_of: Any, left_alone: Any, pair: Any) -> None:
    """Unequal lengths and unequal padding are refused with how to align."""
    with left_alone(lens_of("gpt2")) as lens:
        bridge = lens.bridge
        with pytest.raises(
            InputError, match=r"clean is 2 x 9 tokens and corrupted 2 x 8 .*to_str_tok"
        ):
            activation_patch(bridge, pair[0], pair[1][:, :8], _metric)
        texts = ["abcd", "ab"], ["abc", "abcd"]
        with pytest.raises(InputError, match=r"in rows \[0, 1\] .* padded at different positions"):
            activation_patch(bridge, *texts, _metric, padding_side="right")
        wide = [torch.randn(2, n, bridge.cfg.d_model) for n in (5, 6)]
        with pytest.raises(
            InputError, match=r"\[2, 5, 64\] in one run and \[2, 6, 64\] in the other"
        ):
            activation_patch(bridge, *wide, _metric, progress=False)


def test_metric_that_raises(lens_of: Any, left_alone: Any, pair: Any) -> None:
    """An error in the metric, in the midst of patches, leaves no hook behind."""
    calls = []

    def failing(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise ZeroDivisionError
        return _metric(logits)

    with left_alone(lens_of("gpt2")) as lens, pytest.raises(ZeroDivisionError):
        activation_patch(lens.bridge, *pair, failing, progress=False)


# --- the names of TransformerLens ----------------------------------------------------------------------------


@pytest.fixture
def cached(lens_of: Any, pair: Any) -> tuple[Any, Tensor, ActivationCache]:
    bridge = lens_of("gpt2").bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(pair[0])
    return bridge, pair[1], cache


@pytest.mark.parametrize(
    ("name", "site", "options"),
    [
        ("resid_pre", "resid_pre", {}),
        ("resid_mid", "resid_mid", {}),
        ("resid_post", "resid_post", {}),
        ("attn_out", "attn_out", {}),
        ("mlp_out", "mlp_out", {}),
        ("attn_head_out_all_pos", "z", {}),
        ("attn_head_q_all_pos", "q", {}),
        ("attn_head_k_all_pos", "k", {}),
        ("attn_head_v_all_pos", "v", {}),
        ("attn_head_pattern_all_pos", "pattern", {}),
        ("attn_head_out_by_pos", "z", {"positions": "each"}),
        ("attn_head_q_by_pos", "q", {"positions": "each"}),
        ("attn_head_k_by_pos", "k", {"positions": "each"}),
        ("attn_head_v_by_pos", "v", {"positions": "each"}),
        ("attn_head_pattern_by_pos", "pattern", {"positions": "each"}),
        (
            "attn_head_pattern_dest_src_pos",
            "pattern",
            {"positions": "each", "sources": "each"},
        ),
    ],
)
def test_transformerlens_names(cached: Any, pair: Any, name: str, site: str, options: Any) -> None:
    """Each function of TransformerLens's ``patching``, in its layout."""
    function = getattr(patching, f"get_act_patch_{name}")
    found = function(*cached, _metric, progress=False, batch_size=64)
    grid = activation_patch(
        cached[0], *pair, _metric, site, batch_size=64, progress=False, **options
    )
    by_pos = name.endswith("_by_pos") and "pattern" not in name
    expected = grid.values.transpose(1, 2) if by_pos else grid.values
    assert found.shape == (
        {"resid_pre": (2, 9), "attn_head_v_by_pos": (2, 9, 4)}.get(name, expected.shape)
    )
    torch.testing.assert_close(found, expected)


def test_transformerlens_stacks(cached: Any, lens_of: Any, pair: Any) -> None:
    """The "every" functions stack their kinds; grouped keys and values do not fit."""
    heads = patching.get_act_patch_attn_head_all_pos_every(*cached, _metric, progress=False)
    assert heads.shape == (5, 2, 4)
    v = patching.get_act_patch_attn_head_v_all_pos(*cached, _metric, progress=False)
    torch.testing.assert_close(heads[3], v)
    by_pos = patching.get_act_patch_attn_head_by_pos_every(*cached, _metric, progress=False)
    assert by_pos.shape == (5, 2, 9, 4)
    pattern = patching.get_act_patch_attn_head_pattern_by_pos(*cached, _metric, progress=False)
    torch.testing.assert_close(by_pos[4], pattern.transpose(1, 2))
    blocks = patching.get_act_patch_block_every(*cached, _metric, progress=False)
    assert blocks.shape == (3, 2, 9)
    llama = lens_of("llama").bridge
    _, cache = llama.run_with_cache(pair[0])
    with pytest.raises(InputError, match=r"grouped here, .*z \[2, 4\], .* k \[2, 2\]"):
        patching.get_act_patch_attn_head_all_pos_every(
            llama, pair[1], cache, _metric, progress=False
        )


def test_a_setter_of_ones_own(cached: Any) -> None:
    """generic_activation_patch numbers the named axes through, and takes a table instead."""
    import pandas as pd

    def setter(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
        _, pos, head = index
        corrupted[:, pos, head] = clean[:, pos, head]
        return corrupted

    def in_place(corrupted: Tensor, index: list[int], clean: Tensor) -> None:
        setter(corrupted, index, clean)

    axes = ("layer", "pos", "head")
    expected = patching.get_act_patch_attn_head_out_by_pos(*cached, _metric, progress=False)
    quick = {"progress": False}
    found, table = generic_activation_patch(
        *cached, _metric, setter, "z", axes, return_index_df=True, **quick
    )
    torch.testing.assert_close(found, expected)
    assert list(table.columns) == list(axes)
    assert table.iloc[7].tolist() == [0, 1, 3]
    some = pd.DataFrame({"layer": [1, 0], "pos": [5, 2], "head": [3, 0]})
    found = generic_activation_patch(*cached, _metric, in_place, "z", index_df=some, **quick)
    torch.testing.assert_close(found, torch.stack([expected[1, 5, 3], expected[0, 2, 0]]))
    with pytest.raises(InputError, match="one of the two"):
        generic_activation_patch(*cached, _metric, setter, "z")
    with pytest.raises(InputError, match="begins with 'layer', then some of pos, head, head_index"):
        generic_activation_patch(*cached, _metric, setter, "z", ("layer", "query"))
