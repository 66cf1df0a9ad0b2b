"""Looking at layers: which have a part, their points and parts, their kinds; the printed tree."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import InputError, LayerRangeError, TransformerBridge

_BUILT: dict[tuple[str, str], TransformerBridge] = {}


@pytest.fixture
def built(tiny: Any) -> Any:
    """``built("jamba")``: a bridge built once; no test here changes it."""

    def build(name: str, kind: str = "causal") -> TransformerBridge:
        if (kind, name) not in _BUILT:
            _BUILT[kind, name] = TransformerBridge(tiny(name, kind))
        return _BUILT[kind, name]

    return build


# --- blocks_with --------------------------------------------------------------------------------------------


def test_layers_with_a_part(built: Any, ids: Tensor) -> None:
    """The layers of a hybrid by what they have; each comes as a view whose points are that layer's."""
    bridge = built("jamba")
    assert [i for i, _ in bridge.blocks_with("mixer")] == [0]
    assert [i for i, _ in bridge.blocks_with("attn")] == [1]
    assert [i for i, _ in bridge.blocks_with("mlp")] == [0, 1]
    assert [i for i, _ in bridge.blocks_with("mlp.router")] == [1]
    assert [i for i, _ in bridge.blocks_with("attn.q")] == [1]
    assert bridge.blocks_with("cross_attn") == []
    ((_, block),) = bridge.blocks_with("attn")
    assert block.attn.q.hook_out is bridge.get_hook_point("blocks.1.attn.q.hook_out")
    fired: list[str] = []
    note = lambda x, hook: fired.append(hook.name)  # noqa: E731
    names = [str(b.attn.hook_out.name) for _, b in bridge.blocks_with("attn")]
    bridge.run_with_hooks(ids, fwd_hooks=[(names, note)])
    assert fired == ["blocks.1.attn.hook_out"]


def test_a_part_is_a_whole_word(built: Any) -> None:
    """ln1 is not ln1_post, and att is no part."""
    gemma = built("gemma2")
    assert [i for i, _ in gemma.blocks_with("ln1_post")] == [0, 1]
    llama = built("llama")
    assert llama.blocks_with("ln1_post") == []
    assert llama.blocks_with("att") == []
    assert [i for i, _ in llama.blocks_with("ln1")] == [0, 1]
    olmo = built("olmo2")
    assert olmo.blocks_with("ln1") == []
    assert [i for i, _ in olmo.blocks_with("ln1_post")] == [0, 1]


def test_layers_of_another_tower(built: Any) -> None:
    """The main tower unless another is named."""
    bridge = built("t5", "seq2seq")
    assert [i for i, _ in bridge.blocks_with("cross_attn")] == [0, 1]
    assert bridge.blocks_with("cross_attn", tower="encoder_") == []
    (_, block), *_ = bridge.blocks_with("attn", tower="encoder_")
    assert block.attn.hook_out.name == "encoder_blocks.0.attn.hook_out"


# --- block_hooks and block_submodules -----------------------------------------------------------------------


def test_points_of_a_layer(built: Any, ids: Tensor) -> None:
    """block_hooks gives all of a layer's points and no other's, in the order they fire."""
    bridge = built("llama")
    found = bridge.block_hooks(1)
    assert found == [name for name in bridge.registry if name.startswith("blocks.1.")]
    assert bridge.block_hooks(-1) == found
    assert found[0] == "blocks.1.hook_in"
    assert found[-1] == "blocks.1.hook_out"
    fired: list[str] = []
    note = lambda x, hook: fired.append(hook.name)  # noqa: E731
    quick = [n for n in found if not n.endswith(("result", "_input"))]
    bridge.run_with_hooks(ids, fwd_hooks=[(quick, note)])
    assert sorted(fired) == sorted(quick)
    assert [n for n in fired if n.count(".") == 2] == [n for n in quick if n.count(".") == 2]


def test_points_of_layers_beyond_nine(tiny: Any) -> None:
    """Layer 1 is not layer 10."""
    bridge = TransformerBridge(tiny("gpt2", n_layer=12))
    assert not [name for name in bridge.block_hooks(1) if not name.startswith("blocks.1.")]
    assert len(bridge.block_hooks(10)) == len(bridge.block_hooks(1))
    assert [i for i, _ in bridge.blocks_with("attn")] == list(range(12))
    assert bridge.layer_types() == ["attn + mlp"] * 12


def test_parts_of_a_layer(built: Any) -> None:
    """block_submodules names parts and parts of parts, each once, in order."""
    found = built("llama").block_submodules(0)
    expected = ["ln1", "attn", "attn.q", "attn.k", "attn.v", "attn.o", "ln2", "mlp"]
    assert [part for part in found if part in expected] == expected
    assert {"mlp.gate", "mlp.in", "mlp.out"} <= set(found)
    assert len(found) == len(set(found))
    mixtral = built("mixtral").block_submodules(-1)
    assert {"mlp.router", "mlp.experts"} <= set(mixtral)
    assert not {"mlp.in", "mlp.gate"} & set(mixtral)
    decoder = built("t5", "seq2seq").block_submodules(0)
    assert {"cross_attn", "cross_attn.k", "ln3"} <= set(decoder)
    encoder = built("t5", "seq2seq").block_submodules(0, tower="encoder_")
    assert "ln2" in encoder
    assert not {"cross_attn", "ln3"} & set(encoder)


@pytest.mark.parametrize("layer", [2, -3, 99])
def test_layers_that_are_not(built: Any, layer: int) -> None:
    """An index outside the model is refused with how many there are."""
    bridge = built("llama")
    for method in (bridge.block_hooks, bridge.block_submodules):
        with pytest.raises(LayerRangeError, match="2 layers"):
            method(layer)


def test_towers_that_are_not(built: Any) -> None:
    """Another tower's name is refused with those there are."""
    bridge = built("t5", "seq2seq")
    calls = [
        lambda: bridge.layer_types(tower="vision_"),
        lambda: bridge.blocks_with("attn", tower="vision_"),
        lambda: bridge.block_hooks(0, tower="vision_"),
        lambda: bridge.block_submodules(0, tower="vision_"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"vision_.*encoder_.*decoder_"):
            call()


# --- layer_types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "tower", "expected"),
    [
        ("llama", "causal", None, ["attn + mlp"] * 2),
        ("mixtral", "causal", None, ["attn + mlp (experts)"] * 2),
        ("deepseek_v3", "causal", None, ["attn + mlp", "attn + mlp (experts)"]),
        ("mamba", "causal", None, ["mixer"] * 2),
        ("jamba", "causal", None, ["mixer + mlp", "attn + mlp (experts)"]),
        ("t5", "seq2seq", None, ["attn + cross_attn + mlp"] * 2),
        ("t5", "seq2seq", "decoder_", ["attn + cross_attn + mlp"] * 2),
        ("t5", "seq2seq", "encoder_", ["attn + mlp"] * 2),
        ("clip", "contrastive", "vision_", ["attn + mlp"] * 2),
        ("bert", "masked", "", ["attn + mlp"] * 2),
    ],
)
def test_kinds(built: Any, name: str, kind: str, tower: str | None, expected: list[str]) -> None:
    """What each layer is made of."""
    assert built(name, kind).layer_types(tower=tower) == expected


# --- the printed tree ---------------------------------------------------------------------------------------


def test_every_point_is_printed_with_its_sizes(built: Any, ids: Tensor) -> None:
    """A line for each point of a kind of layer, with sizes that are those of the values."""
    bridge = built("llama")
    text = str(bridge)
    assert len(re.findall(r"^blocks\.\{", text, re.MULTILINE)) == 1
    assert "blocks.{0, 1}: attn + mlp" in text
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
    lines = {
        line.split()[0]: re.search(r"\[(.*?)\]", line) for line in text.splitlines() if "[" in line
    }
    for name in bridge.registry:
        if name.startswith("blocks.1."):
            continue
        shown = lines[name.removeprefix("blocks.0.")]
        assert shown is not None, name
        axes = shown.group(1).split()
        assert len(axes) == cache[name].dim(), name
        for axis, size in zip(axes, cache[name].shape, strict=True):
            if "=" in axis:
                assert int(axis.partition("=")[2]) == size, name
    assert "[batch pos head=4 d_head=16]" in text
    assert "hook_resid_pre" in text


def test_each_kind_of_layer_is_printed_once(tiny: Any) -> None:
    """Four layers of two kinds are two parts of the tree."""
    bridge = TransformerBridge(tiny("jamba", num_hidden_layers=4))
    text = str(bridge)
    heads = re.findall(r"^(\w*blocks\.\{.*\}: .*)$", text, re.MULTILINE)
    assert heads == [
        "blocks.{0, 2}: mixer + mlp",
        "blocks.{1, 3}: attn + mlp (experts)",
    ]
    assert text.count("mixer.hook_in ") == 1
    assert text.count("mlp.router.hook_out") == 1


def test_towers_are_printed(built: Any) -> None:
    """Each tower with its layers, in the order they run."""
    heads = re.findall(r"^(\w*blocks)\.\{", str(built("t5", "seq2seq")), re.MULTILINE)
    assert heads == ["encoder_blocks", "decoder_blocks"]


def test_what_is_absent_is_printed_with_reasons(built: Any) -> None:
    """Absent parts stand at the end, under the reason that `why` gives."""
    bridge = built("llama")
    text = str(bridge)
    absent = text[text.index("\nabsent:") :]
    for name, part in (
        ("pos_embed.hook_out", "pos_embed"),
        ("blocks.0.ln1_post.hook_out", "ln1_post"),
    ):
        line = next(x for x in absent.splitlines() if x.strip().startswith(part))
        assert bridge.why(name) in line


@pytest.mark.parametrize(
    ("name", "kind", "point"),
    [
        ("jamba", "causal", "blocks.1.mlp.in.hook_out"),
        ("t5", "seq2seq", "encoder_blocks.0.ln1_post.hook_out"),
        ("clip", "contrastive", "vision_embed.hook_out"),
    ],
)
def test_absent_in_other_layers_and_towers(built: Any, name: str, kind: str, point: str) -> None:
    """What a later kind of layer or another tower lacks is told too."""
    bridge = built(name, kind)
    reason = bridge.why(point)
    assert reason
    assert reason in str(bridge)[str(bridge).index("\nabsent:") :]


def test_short_form(built: Any) -> None:
    """repr is one line that names the class, sizes and how many points there are."""
    bridge = built("llama")
    assert repr(bridge).count("\n") == 0
    assert f"{len(bridge.registry)} hook points" in repr(bridge)
    assert str(bridge).startswith(repr(bridge))
