"""HookRegistry: a mapping with aliases, selections that never guess, and errors that help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.hooks import (
    AbsentPointError,
    HookPoint,
    HookRegistry,
    InputError,
    LensError,
    PointError,
    SelectionError,
    UnknownPointError,
)
from lensbridge.hooks.names import aliases_of

BLOCK = ("hook_in", "attn.q.hook_out", "attn.hook_pattern", "attn.hook_result", "hook_out")
LAYERS = 12
NAMES = [
    "embed.hook_out",
    *(f"blocks.{layer}.{part}" for layer in range(LAYERS) for part in BLOCK),
    "unembed.hook_out",
]
ABSENT = {
    "pos_embed.hook_out": "positions are rotary",
    "blocks.{i}.hook_resid_mid": "attention and MLP run in parallel",
    "blocks.3.attn.hook_rot_q": "layer 3 does not rotate",
}


@pytest.fixture
def registry() -> HookRegistry:
    """Twelve layers of five points; ``hook_result`` is not among the default ones."""
    points = [
        HookPoint(name, aliases_of(name), is_default="hook_result" not in name) for name in NAMES
    ]
    return HookRegistry(points, ABSENT)


def names(points: list[HookPoint]) -> list[str | None]:
    """Names of points."""
    return [point.name for point in points]


def double(tensor: Tensor, hook: HookPoint) -> Tensor:
    """Twice the value."""
    return 2 * tensor


# --- mapping ------------------------------------------------------------------------------------------------


def test_is_a_mapping_in_execution_order(registry: HookRegistry) -> None:
    """Keys, values, items and length are those of the canonical names, in order."""
    assert isinstance(registry, Mapping)
    assert list(registry) == list(registry.keys()) == NAMES
    assert len(registry) == 62
    assert [point.name for point in registry.values()] == NAMES
    assert [registry[name] for name in NAMES] == list(registry.values())


def test_alias_leads_to_the_same_point(registry: HookRegistry) -> None:
    """An alias is as good as the name, in [], get, in and canonical."""
    point = registry["blocks.2.hook_out"]
    assert registry["blocks.2.hook_resid_post"] is point
    assert registry.get("blocks.2.hook_resid_post") is point
    assert "blocks.2.hook_resid_post" in registry
    assert registry.canonical("blocks.2.hook_resid_post") == "blocks.2.hook_out"
    assert registry.canonical("blocks.2.hook_out") == "blocks.2.hook_out"
    assert "blocks.2.hook_resid_post" not in list(registry)


def test_hook_dict_holds_names_and_aliases(registry: HookRegistry) -> None:
    """Names first, then aliases, all leading to the registry's own points."""
    table = registry.hook_dict
    assert list(table)[: len(NAMES)] == NAMES
    assert set(table) == {*NAMES, *registry.aliases}
    assert all(registry[name] is point for name, point in table.items())
    assert table["hook_embed"] is registry["embed.hook_out"]


@pytest.mark.parametrize("key", [3, None, ["embed.hook_out"], {"a": 1}, ("embed.hook_out",)])
def test_keys_that_are_no_strings(registry: HookRegistry, key: Any) -> None:
    """They are not in it, get gives the default, [] says what a name is."""
    assert key not in registry
    assert registry.get(key, "default") == "default"
    with pytest.raises(UnknownPointError, match=f"is a string, got {type(key).__name__}"):
        registry[key]


def test_repr_counts(registry: HookRegistry) -> None:
    """Points and aliases, not a wall of text."""
    assert repr(registry) == "HookRegistry(62 points, 38 aliases)"


def test_order_is_the_place_in_the_run(registry: HookRegistry) -> None:
    """order(point) numbers the points, also those added later."""
    assert [registry.order(point) for point in registry.values()] == list(range(62))
    late = registry.add(HookPoint("zzz.hook_out"))
    assert registry.order(late) == 62


# --- adding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "taken"),
    [
        (HookPoint("embed.hook_out"), "embed.hook_out"),
        (HookPoint("hook_embed"), "hook_embed"),
        (HookPoint("new.hook_out", ("embed.hook_out",)), "embed.hook_out"),
        (HookPoint("new.hook_out", ("fresh", "hook_embed")), "hook_embed"),
        (HookPoint(), None),
    ],
)
def test_name_that_is_not_free_is_refused_whole(
    registry: HookRegistry, point: HookPoint, taken: str | None
) -> None:
    """Neither name nor alias may repeat; a refused point leaves no trace."""
    before = registry.hook_dict
    with pytest.raises(PointError, match=re.escape(f"{taken!r} is no free name")):
        registry.add(point)
    assert registry.hook_dict == before


def test_point_added_later_is_found_by_selections_made_before(registry: HookRegistry) -> None:
    """Remembered selections do not outlive a change."""
    assert len(registry.select("**.hook_pattern")) == LAYERS
    assert len(registry.select()) == 50
    late = registry.add(HookPoint("extra.hook_pattern"))
    assert registry.select("**.hook_pattern")[-1] is late
    assert registry.select()[-1] is late


# --- selecting ----------------------------------------------------------------------------------------------

PATTERNS = [f"blocks.{layer}.attn.hook_pattern" for layer in range(LAYERS)]
OUTS = [f"blocks.{layer}.hook_out" for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        (None, [name for name in NAMES if "hook_result" not in name]),
        ("blocks.1.hook_out", ["blocks.1.hook_out"]),
        ("blocks.1.hook_resid_post", ["blocks.1.hook_out"]),
        ("blocks.1.attn.hook_result", ["blocks.1.attn.hook_result"]),
        ("blocks.*.hook_out", OUTS),
        ("blocks.*.hook_resid_post", OUTS),
        ("blocks.*.attn.hook_pattern", PATTERNS),
        ("**.hook_pattern", PATTERNS),
        ("**hook_pattern", PATTERNS),
        ("*.hook_out", ["embed.hook_out", "unembed.hook_out"]),
        ("blocks.?.hook_out", OUTS[:10]),
        ("blocks.??.hook_out", OUTS[10:]),
        ("blocks.[0-2].hook_out", OUTS[:3]),
        ("blocks.[13].hook_out", [OUTS[1], OUTS[3]]),
        ("blocks.[!0-8].hook_out", [OUTS[9]]),
        ("blocks.1[01].hook_out", OUTS[10:]),
        (re.compile(r"blocks\.1\d\.hook_out"), OUTS[10:]),
        (re.compile("resid_post"), OUTS),
        (re.compile("pattern$"), PATTERNS),
        (lambda name: name.endswith("pattern"), PATTERNS),
        (lambda name: name.endswith("resid_post"), OUTS),
        (lambda name: True, NAMES),
        ([], []),
        (["blocks.3.hook_out", "embed.hook_out"], ["embed.hook_out", "blocks.3.hook_out"]),
        (["hook_embed", "embed.hook_out", "embed.hook_out"], ["embed.hook_out"]),
        (("blocks.3.hook_out",), ["blocks.3.hook_out"]),
        ({"blocks.3.hook_out", "hook_embed"}, ["embed.hook_out", "blocks.3.hook_out"]),
        (
            [
                re.compile("unembed"),
                "blocks.[01].hook_out",
                lambda name: name == "blocks.0.hook_in",
                "blocks.1.hook_resid_post",
                "hook_embed",
            ],
            [
                "embed.hook_out",
                "blocks.0.hook_in",
                "blocks.0.hook_out",
                "blocks.1.hook_out",
                "unembed.hook_out",
            ],
        ),
    ],
)
def test_selection(registry: HookRegistry, selection: Any, wanted: list[str]) -> None:
    """Each kind of filter means exactly these points, each once, in registry order - and again so."""
    assert names(registry.select(selection)) == wanted
    assert names(registry.select(selection)) == wanted


def test_selected_list_is_the_callers_own(registry: HookRegistry) -> None:
    """Changing what select returned does not change the next selection."""
    registry.select("blocks.*.hook_out").clear()
    registry.select().clear()
    assert names(registry.select("blocks.*.hook_out")) == OUTS
    assert len(registry.select()) == 50


def test_predicate_is_asked_anew_each_time(registry: HookRegistry) -> None:
    """A predicate may change its mind."""
    wanted = "blocks.0.hook_in"

    def predicate(name: str) -> bool:
        return name == wanted

    assert names(registry.select(predicate)) == ["blocks.0.hook_in"]
    wanted = "blocks.5.hook_in"
    assert names(registry.select(predicate)) == ["blocks.5.hook_in"]


def test_a_point_selects_itself(registry: HookRegistry) -> None:
    """A HookPoint is callable but no predicate: it means itself, alone or in a list."""
    point = registry["blocks.4.hook_in"]
    assert registry.select(point) == [point]
    assert registry.select([point, "embed.hook_out"]) == [registry["embed.hook_out"], point]


def test_foreign_point_is_not_mistaken(registry: HookRegistry) -> None:
    """A point of another model with a name this one lacks is an error."""
    with pytest.raises(UnknownPointError, match=r"'elsewhere.hook_out'"):
        registry.select([HookPoint("elsewhere.hook_out")])


@pytest.mark.parametrize(
    "selection", [0, 3, 2.5, True, {"embed.hook_out": 1}, b"embed", object(), torch.ones(2)]
)
@pytest.mark.parametrize("in_list", [False, True])
def test_what_cannot_select_is_refused(
    registry: HookRegistry, selection: Any, in_list: bool
) -> None:
    """SelectionError names the type, alone and inside a list; it is a TypeError."""
    with pytest.raises(SelectionError, match=f"with {type(selection).__name__} ") as caught:
        registry.select([selection] if in_list else selection)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, LensError)


def test_nested_list_is_refused(registry: HookRegistry) -> None:
    """A list of lists is nobody's intention."""
    with pytest.raises(SelectionError, match="with list"):
        registry.select([["embed.hook_out"]])


@pytest.mark.parametrize(
    ("selection", "hint"),
    [
        ("blocks.*.hook_outt", "'blocks.*.hook_outt' selects none of the 62 points"),
        ("blocks.1?.hook_mlp", "selects none of the 62 points; for example"),
        (re.compile("nothing"), "re.compile('nothing') selects none"),
        (lambda name: False, "the predicate <function"),
    ],
)
def test_filter_that_selects_nothing_is_an_error(
    registry: HookRegistry, selection: Any, hint: str
) -> None:
    """It says what selected nothing and offers real names, alone and inside a list."""
    for asked in (selection, ["embed.hook_out", selection]):
        with pytest.raises(UnknownPointError, match=re.escape(hint)) as caught:
            registry.select(asked)
        offered = str(caught.value).rpartition("there are: ")[2].split(", ")
        assert offered
        assert all(name in registry for name in offered)


def test_one_wrong_name_in_a_list_is_an_error(registry: HookRegistry) -> None:
    """The rest of the list does not excuse it."""
    with pytest.raises(UnknownPointError, match=r"blocks\.0\.hook_put"):
        registry.select(["embed.hook_out", "blocks.0.hook_put"])


# --- unknown and absent -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ("blocks.0.hook_resid_pst", "blocks.0.hook_resid_post"),
        ("blocks.7.attn.hook_patern", "blocks.7.attn.hook_pattern"),
        ("embed.hook_ou", "embed.hook_out"),
        ("hook_embd", "hook_embed"),
        ("blocks.11.attn.q.hook_uot", "blocks.11.attn.q.hook_out"),
    ],
)
def test_unknown_name_offers_the_nearest(registry: HookRegistry, asked: str, offered: str) -> None:
    """The first suggestion is what was meant, of the same layer; the error is a KeyError, shown plainly."""
    with pytest.raises(UnknownPointError) as caught:
        registry[asked]
    message = str(caught.value)
    assert message.startswith(f"no hook point is called {asked!r}; nearest: {offered}")
    assert isinstance(caught.value, KeyError)
    assert registry.nearest(asked)[0] == offered
    if asked.startswith("blocks."):
        layer = asked.split(".")[1]
        assert all(name.startswith(f"blocks.{layer}.") for name in registry.nearest(asked))


def test_name_like_nothing_offers_nothing(registry: HookRegistry) -> None:
    """No far-fetched suggestions."""
    with pytest.raises(UnknownPointError) as caught:
        registry["ZZZZ"]
    assert str(caught.value) == "no hook point is called 'ZZZZ'"


@pytest.mark.parametrize("layer", [12, 99])
def test_layer_out_of_range_says_which_layers_there_are(registry: HookRegistry, layer: int) -> None:
    """Not a misspelling: the layers are named, and an absent name's reason is not borrowed."""
    for part in ("hook_out", "hook_resid_mid"):
        with pytest.raises(UnknownPointError, match="the layers are 0 to 11") as caught:
            registry[f"blocks.{layer}.{part}"]
        assert not isinstance(caught.value, AbsentPointError)
        assert registry.why(f"blocks.{layer}.{part}") is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pos_embed.hook_out", "positions are rotary"),
        ("blocks.0.hook_resid_mid", "attention and MLP run in parallel"),
        ("blocks.11.hook_resid_mid", "attention and MLP run in parallel"),
        ("blocks.3.attn.hook_rot_q", "layer 3 does not rotate"),
    ],
)
def test_absent_name_says_why(registry: HookRegistry, name: str, reason: str) -> None:
    """AbsentPointError carries the reason; `why` gives it alone."""
    assert registry.why(name) == reason
    for asked in (name, [name]):
        with pytest.raises(
            AbsentPointError, match=re.escape(f"this model has no point {name!r}: {reason}")
        ):
            registry.select(asked)


@pytest.mark.parametrize(
    "name", ["embed.hook_out", "hook_embed", "nonsense", "blocks.4.attn.hook_rot_q"]
)
def test_why_is_none_when_there_is_nothing_to_explain(registry: HookRegistry, name: str) -> None:
    """Present names, aliases and unheard-of names have no reason."""
    assert registry.why(name) is None


# --- listening through the registry -------------------------------------------------------------------------


def test_add_hook_reaches_every_selected_point(registry: HookRegistry) -> None:
    """The function acts at all selected points and at no other."""
    listeners = registry.add_hook("blocks.[01].hook_out", double)
    assert names([listener.point for listener in listeners]) == OUTS[:2]
    heard = [name for name, point in registry.items() if point(torch.tensor(3.0)).item() == 6.0]
    assert heard == OUTS[:2]


def test_add_hook_passes_its_options_on(registry: HookRegistry) -> None:
    """Direction, permanence, level and prepend arrive."""
    point = registry["embed.hook_out"]
    (first,) = registry.add_hook("hook_embed", double)
    (second,) = registry.add_hook("hook_embed", double, prepend=True, is_permanent=True, level=4)
    (third,) = registry.add_hook("hook_embed", double, "bwd")
    assert point.fwd == (second, first)
    assert point.bwd == (third,)
    assert (second.is_permanent, second.level, first.level) == (True, 4, 0)


def test_wrong_name_adds_nothing_anywhere(registry: HookRegistry) -> None:
    """A list with one wrong name attaches none of its hooks."""
    with pytest.raises(UnknownPointError):
        registry.add_hook(["embed.hook_out", "nope"], double)
    assert not any(point.has_hooks() for point in registry.values())


def test_reset_selects_direction_level_and_context(registry: HookRegistry) -> None:
    """reset removes what was asked everywhere, and clears contexts unless told not to."""
    point = registry["embed.hook_out"]
    registry.add_hook("hook_embed", double, "bwd")
    registry.add_hook("hook_embed", double, level=2)
    kept = registry.add_hook("hook_embed", double, level=1)
    point.ctx["note"] = 1
    registry.reset(clear_contexts=False, direction="fwd", level=2)
    assert (point.fwd, len(point.bwd), point.ctx) == (tuple(kept), 1, {"note": 1})
    registry.reset()
    assert (point.has_hooks(), point.ctx) == (False, {})


def test_reset_of_an_unknown_direction_removes_nothing(registry: HookRegistry) -> None:
    """A misspelt direction is an error, not a reset of nothing."""
    registry.add_hook("hook_embed", double)
    with pytest.raises(InputError, match="'forward'"):
        registry.reset(direction="forward")
    assert registry["embed.hook_out"].has_hooks()


def test_reset_reaches_hooks_that_were_there_before_the_registry() -> None:
    """Points heard before they were registered are reset, and are among the live ones."""
    net = torch.nn.Sequential(HookPoint())
    net[0].add_hook(double)
    registry = HookRegistry.from_module(net)
    assert registry.live == {net[0]}
    registry.reset()
    assert net(torch.tensor(3.0)).item() == 3.0
    assert registry.live == set()


def test_two_registries_of_one_module_both_reset_it() -> None:
    """An older registry still knows its points."""
    net = torch.nn.Sequential(HookPoint())
    older = HookRegistry.from_module(net)
    HookRegistry.from_module(net)
    older.add_hook("0", double)
    older.reset()
    assert net(torch.tensor(3.0)).item() == 3.0


def test_live_holds_exactly_the_points_listened_to(registry: HookRegistry) -> None:
    """Points join with their first listener and leave with the last."""
    first, second = registry.add_hook("hook_embed", double), registry.add_hook("hook_embed", double)
    assert registry.live == {registry["embed.hook_out"]}
    first[0].remove()
    assert registry.live == {registry["embed.hook_out"]}
    second[0].remove()
    assert registry.live == set()
