"""What the committed table comes to. Every exception is listed, with the reason; a name that is no longer one
must leave its list. Reads docs/support.json only: `test_rows.py` holds that to the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CONFIGS = json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())

SEVERAL_STREAMS = {
    "deepseek_v4": "batch pos n d_model",
    "gemma3n": "n batch pos d_model",
    "gemma3n_text": "n batch pos d_model",
    "hy_v4": "batch pos n d_model",
    "qwen4_exp": "batch pos 4*d_model",
    "qwen4_exp_text": "batch pos 4*d_model",
}
"""Causal models whose stream is not one of [batch, pos, d_model], and what it is."""

UNPROVED = {
    "inkling2_text": "a layer reads an attention over the outputs of the layers before it",
    "reformer": "reversible layers: two streams side by side",
    "xlm": "lists of parts side by side; no module is a layer",
    "xlnet": "the stream is [pos, batch, d_model]",
    "xmod": "what its adapters make is written row by row, by language, into a new tensor",
    "zaya": "stream and branch are scaled and shifted by learned vectors before they are added",
}
"""Other causal models in which some layer is not shown to be a sum."""

WITHOUT_SOFTMAX = {
    "falcon_mamba": "state space",
    "mamba": "state space",
    "mamba2": "state space",
    "reformer": "hashing attention, normalised by a logsumexp",
    "rwkv": "linear attention",
    "xlm": "attention in no layer: its modules are reached as raw: points",
    "xlstm": "recurrent",
}
"""Causal models with no softmax attention in a layer."""

IN_PART = {
    "deepseek_v4": "each layer's attention has one; softmaxes that mix the four streams are counted too",
    "diffllama": "one of the two fused calls a layer, which make the same pattern for halves of v",
    "inkling2_text": "each layer's attention has one; not all attention over earlier layers' outputs",
    "prophetnet": "the attention of the main stream, not that of the streams that predict further ahead",
}
"""Causal models in which only some of what looks like softmax attention has a pattern."""


def names(table: dict[str, Any], kind: str, wanted: Any) -> set[str]:
    return {name for name, row in table[kind].items() if wanted(row)}


def test_every_entry_has_a_row(table: dict[str, Any], support: Any) -> None:
    assert {kind: set(rows) for kind, rows in table.items()} == {
        kind: set(entries) for kind, entries in CONFIGS.items()
    }
    assert set(support.KINDS) == set(table)
    assert len(table["causal"]) == 187


def test_causal_models_boot(table: dict[str, Any], support: Any) -> None:
    assert names(table, "causal", lambda row: not support.boots(row)) == set()


def test_nothing_that_boots_claims_what_does_not_hold(table: dict[str, Any], support: Any) -> None:
    for kind in table:
        assert names(table, kind, support.boots) == names(table, kind, support.holds)


def test_causal_streams_are_sums(table: dict[str, Any], support: Any) -> None:
    unproved = names(table, "causal", lambda row: not support.is_proved(row))
    assert unproved == {*UNPROVED, *SEVERAL_STREAMS}
    assert len(UNPROVED) <= 6
    for name, stream in SEVERAL_STREAMS.items():
        assert table["causal"][name]["stream"] == stream


def test_causal_patterns(table: dict[str, Any], support: Any) -> None:
    booted = names(table, "causal", support.boots)
    attending = names(table, "causal", support.attends)
    assert booted - attending == set(WITHOUT_SOFTMAX)
    assert attending - names(table, "causal", support.shows_patterns) == set(IN_PART)
    assert all(support.main_tower(table["causal"][name])["patterns"] >= 2 for name in IN_PART)
    assert len(attending) >= 177


@pytest.mark.parametrize("kind", ["masked", "seq2seq", "vlm", "vision", "speech"])
def test_other_kinds(table: dict[str, Any], support: Any, kind: str) -> None:
    """At least 95 % boot with everything that is claimed holding."""
    assert len(names(table, kind, support.holds)) >= 0.95 * len(table[kind])
