"""The grammar of names: TransformerLens shorthand, the alias table, and suggestions for misspelt names."""

from __future__ import annotations

import re
import string
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensbridge.hooks import HookPoint, HookRegistry, InputError, UnknownPointError
from lensbridge.hooks.names import ALIASES, act_name, aliases_of

LAYERS = 12

# What TransformerLens's get_act_name gives for the same arguments.
SHORTHAND: list[tuple[tuple[str | int, ...], str]] = [
    (("k", 6), "blocks.6.attn.hook_k"),
    (("k", 6, "a"), "blocks.6.attn.hook_k"),
    (("k", 6, "attn"), "blocks.6.attn.hook_k"),
    (("k", 6, "attention"), "blocks.6.attn.hook_k"),
    (("k6",), "blocks.6.attn.hook_k"),
    (("q", 0), "blocks.0.attn.hook_q"),
    (("v", 11), "blocks.11.attn.hook_v"),
    (("z", 2), "blocks.2.attn.hook_z"),
    (("query", 1), "blocks.1.attn.hook_q"),
    (("key", 1), "blocks.1.attn.hook_k"),
    (("value", 1), "blocks.1.attn.hook_v"),
    (("attn", 5), "blocks.5.attn.hook_pattern"),
    (("attn5",), "blocks.5.attn.hook_pattern"),
    (("pattern", 3), "blocks.3.attn.hook_pattern"),
    (("attn_scores", 3), "blocks.3.attn.hook_attn_scores"),
    (("attn_logits", 3), "blocks.3.attn.hook_attn_scores"),
    (("rot_q", 3), "blocks.3.attn.hook_rot_q"),
    (("rot_k", 3), "blocks.3.attn.hook_rot_k"),
    (("result", 3), "blocks.3.attn.hook_result"),
    (("pre", 2), "blocks.2.mlp.hook_pre"),
    (("pre5",), "blocks.5.mlp.hook_pre"),
    (("mlp_pre", 2), "blocks.2.mlp.hook_pre"),
    (("post", 2), "blocks.2.mlp.hook_post"),
    (("post", 2, "m"), "blocks.2.mlp.hook_post"),
    (("mlp_post", 2), "blocks.2.mlp.hook_post"),
    (("pre_linear", 2), "blocks.2.mlp.hook_pre_linear"),
    (("resid_pre", 0), "blocks.0.hook_resid_pre"),
    (("resid_mid", 0), "blocks.0.hook_resid_mid"),
    (("resid_post", 10), "blocks.10.hook_resid_post"),
    (("resid_post", 10, "b"), "blocks.10.hook_resid_post"),
    (("resid_post", 10, "block"), "blocks.10.hook_resid_post"),
    (("resid_post", 10, "blocks"), "blocks.10.hook_resid_post"),
    (("attn_out", 4), "blocks.4.hook_attn_out"),
    (("mlp_out", 4), "blocks.4.hook_mlp_out"),
    (("mlp_in", 4), "blocks.4.hook_mlp_in"),
    (("attn_in", 4), "blocks.4.hook_attn_in"),
    (("q_input", 4), "blocks.4.hook_q_input"),
    (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
    (("scale", 4, "ln1"), "blocks.4.ln1.hook_scale"),
    (("scale4ln1",), "blocks.4.ln1.hook_scale"),
    (("scale",), "ln_final.hook_scale"),
    (("normalized",), "ln_final.hook_normalized"),
    (("embed",), "hook_embed"),
    (("pos_embed",), "hook_pos_embed"),
    (("blocks.3.hook_out",), "blocks.3.hook_out"),
    (("hook_embed",), "hook_embed"),
    (("blocks.3.attn.q.hook_out",), "blocks.3.attn.q.hook_out"),
]


@pytest.mark.parametrize(("args", "name"), SHORTHAND)
def test_shorthand(args: tuple[str, int, str], name: str) -> None:
    """Each shorthand means what TransformerLens means by it."""
    assert act_name(*args) == name


@pytest.mark.parametrize("name", ["resid_post", "k", "pattern", "mlp_out", ""])
def test_shorthand_inside_a_layer_needs_the_layer(name: str) -> None:
    """No layer is guessed; the message shows how to say it."""
    with pytest.raises(InputError, match=re.escape(f"say which, as in ({name!r}, 0)")):
        act_name(name)


@given(
    st.sampled_from(sorted({str(args[0]) for args, _ in SHORTHAND if len(args) == 2})),
    st.integers(0, 999),
)
def test_squeezed_shorthand_equals_the_long_form(name: str, layer: int) -> None:
    """``k6`` is ``("k", 6)``, for every shorthand and layer."""
    assert act_name(f"{name}{layer}") == act_name(name, layer)


@given(st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){1,3}", fullmatch=True), st.integers(0, 9))
def test_full_name_is_returned_as_it_is(name: str, layer: int) -> None:
    """A dotted name is nobody's shorthand, whatever else is given."""
    assert act_name(name) == act_name(name, layer) == name


# --- the alias table ----------------------------------------------------------------------------------------


@cache
def registry() -> HookRegistry:
    """Every canonical name of the table, twelve layers."""
    return HookRegistry([HookPoint(name, aliases_of(name)) for name in canonical_names()])


@cache
def canonical_names() -> tuple[str, ...]:
    """The table's names, filled in for each layer."""
    return tuple(
        name.replace("{i}", str(layer))
        for name in ALIASES
        for layer in (range(LAYERS) if "{i}" in name else [0])
    )


@pytest.mark.parametrize(
    ("name", "aliases"),
    [
        ("blocks.0.hook_in", ("blocks.0.hook_resid_pre",)),
        ("blocks.11.hook_out", ("blocks.11.hook_resid_post",)),
        ("blocks.3.attn.q.hook_out", ("blocks.3.attn.hook_q",)),
        ("blocks.3.attn.o.hook_in", ("blocks.3.attn.hook_z",)),
        ("blocks.3.mlp.gate.hook_out", ("blocks.3.mlp.hook_pre",)),
        ("blocks.3.mlp.out.hook_in", ("blocks.3.mlp.hook_post",)),
        ("embed.hook_out", ("hook_embed",)),
        ("unembed.hook_out", ("hook_unembed",)),
        ("blocks.3.attn.hook_pattern", ()),
        ("blocks.3.hook_nonsense", ()),
        ("nonsense", ()),
        ("blocks.{i}.hook_in", ("blocks.{i}.hook_resid_pre",)),
    ],
)
def test_aliases_of(name: str, aliases: tuple[str, ...]) -> None:
    """The familiar names of a place, with the layer filled in; none where there are none."""
    assert aliases_of(name) == aliases


def test_no_alias_names_two_places() -> None:
    """Aliases are unique and none is itself a canonical name."""
    aliases = [alias for found in ALIASES.values() for alias in found]
    assert len(aliases) == len(set(aliases))
    assert set(aliases).isdisjoint(ALIASES)


@given(st.sampled_from(sorted(ALIASES)), st.integers(0, 10**6))
def test_every_name_maps_back_through_its_aliases(template: str, layer: int) -> None:
    """In any layer, each alias of a canonical name leads back to it, and keeps the layer."""
    name = template.replace("{i}", str(layer))
    table = HookRegistry([HookPoint(name, aliases_of(name))])
    assert len(aliases_of(name)) == len(ALIASES[template])
    for alias in aliases_of(name):
        assert table.canonical(alias) == name
        assert re.findall(r"blocks\.\d+\.", alias) == re.findall(r"blocks\.\d+\.", name)


@pytest.mark.parametrize(
    ("shorthand", "layer"),
    [
        ("resid_pre", 3),
        ("resid_post", 3),
        ("q", 3),
        ("k", 3),
        ("v", 3),
        ("z", 3),
        ("pre", 3),
        ("post", 3),
        ("embed", None),
        ("pos_embed", None),
        ("unembed", None),
    ],
)
def test_shorthand_of_an_alias_leads_to_a_point(shorthand: str, layer: int | None) -> None:
    """What act_name writes is what the alias table knows."""
    assert act_name(shorthand, layer) in registry().aliases


# --- suggestions --------------------------------------------------------------------------------------------


@given(st.data())
@example(None)
def test_one_wrong_character_is_forgiven_with_the_right_name(data: st.DataObject | None) -> None:
    """A name or alias with one character dropped, added, changed or swapped is among the suggestions."""
    if data is None:
        name, typo = "blocks.3.attn.q.hook_out", "blocks.3.attn.g.hook_out"
    else:
        name = data.draw(st.sampled_from(sorted(registry().hook_dict)), label="name")
        # The layer number is not misspelt here: another layer's point exists, and is what was asked for.
        start = re.match(r"(blocks\.\d+\.)?", name).end()
        at = data.draw(st.integers(start, len(name) - 1), label="position")
        letter = data.draw(st.sampled_from(string.ascii_lowercase + "._"), label="letter")
        kinds = [
            name[:at] + name[at + 1 :],
            name[:at] + letter + name[at:],
            name[:at] + letter + name[at + 1 :],
            name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :],
        ]
        typo = data.draw(st.sampled_from(kinds), label="typo")
    if typo in registry():
        assert registry()[typo] is registry().hook_dict[typo]
        return
    with pytest.raises(UnknownPointError) as caught:
        registry()[typo]
    assert name in str(caught.value).partition("nearest: ")[2].split(", ")


@given(st.text(max_size=30))
def test_any_text_is_a_point_or_a_helpful_error(text: str) -> None:
    """No string crashes a lookup; every suggestion exists."""
    if text in registry():
        assert text in registry().hook_dict
        return
    with pytest.raises(UnknownPointError, match=re.escape(f"no hook point is called {text!r}")):
        registry()[text]
    assert set(registry().nearest(text)) <= set(registry().hook_dict)
