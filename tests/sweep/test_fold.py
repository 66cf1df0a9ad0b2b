"""Weight processing on every causal and masked model: the same log-probabilities, and a reason for what is left.

`fold.json` holds the reasons: kind -> name -> step -> why it could not be done wholly; a step that is not there
was done wholly. ``python tests/sweep/test_fold.py`` writes it anew.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

HERE = Path(__file__).parent
TABLE = HERE / "fold.json"
KINDS = ("causal", "masked")
CONFIGS = json.loads((HERE.parent / "tiny_configs.json").read_text())
ENTRIES = [(kind, name) for kind in KINDS for name in CONFIGS[kind]]
STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
IN_FLOAT64 = {
    "cpmant": "its attention scores are so large that float32 rounds by more than 1e-4",
    "funnel": "its logits are so large that float32 rounds by 1e-4",
}

REASONS = {
    "no norm stands between": "post-norm",
    "neither a LayerNorm nor an RMSNorm": "norm of another kind",
    "not read by linear layers alone": "norm with another reader",
    "was not used in the watched run": "a part that did not run",
    "has another use": "matrix with another use",
    "keep the mean (RMSNorm)": "RMSNorm",
    "its mean matters": "mean is read",
    "not one linear layer": "writer is no linear layer",
    "no matrix of its own": "writer is no linear layer",
    "soft cap": "soft cap",
    "no head": "no head",
    "not [batch pos d_vocab]": "several streams of logits",
    "no bias to take it": "no bias to take it",
    "(a sink?)": "sink",
    "share values in groups": "grouped heads",
    "share keys in groups": "grouped heads",
    "are normalised": "normalised queries and keys",
    "that make": "no layer of its own",
    "is put together from": "no layer of its own",
    "weight is shared": "matrix with another use",
    "do not cancel": "does not cancel",
    "is not there": "no point of its own",
    "is not given by head": "no point of its own",
    "plain linear layer": "layer of another kind",
    "something besides its pattern": "another reader",
}


def word(reason: str) -> str:
    return next((w for start, w in REASONS.items() if start in reason), reason)


def log_probs(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)  # Reformer draws its hashes
    with torch.no_grad():
        return model(**given).logits.double().log_softmax(-1)


def row_of(
    model: nn.Module, given: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], nn.Module]:
    """What was left of each step, what was done of it, and the processed model."""
    from lensbridge import ArchitectureError, TransformerBridge

    bridge = TransformerBridge(model, example=given or None)
    try:
        told = bridge.process_weights(refactor_factored_attn_matrices=None, in_place=True).processed
    except ArchitectureError as error:
        assert "none of" in str(error)  # noqa: PT017 - any other refusal is a fault
        return {step: why for step, why in bridge.can_process().items() if why}, {}, model
    assert told is not None
    left = {
        step: "; ".join(f"{part}: {why}" for part, why in list(parts.items())[:1])
        for step, parts in told.left.items()
    }
    return left, dict.fromkeys(told.done, True), model


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=["-".join(entry) for entry in ENTRIES])
def test_processing(
    kind: str,
    name: str,
    tiny: Callable[..., nn.Module],
    inputs_of: Callable[..., dict[str, torch.Tensor]],
    table: dict[str, Any],
) -> None:
    model = tiny(name, kind)
    model = model.double() if name in IN_FLOAT64 else model
    given = inputs_of(name, kind)
    ids = torch.randint(8, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    keywords = given or {"input_ids": ids}
    expected = log_probs(model, keywords)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    left, done, _ = row_of(model, given)
    after = model.state_dict()
    assert list(after) == list(before)
    written = any(not torch.equal(value, before[key]) for key, value in after.items())
    assert written == bool(done)
    assert (log_probs(model, keywords) - expected).abs().max() < 1e-4
    assert {step: word(why) for step, why in left.items()} == {
        step: word(why) for step, why in table[kind].get(name, {}).items()
    }


def test_counts(table: dict[str, Any]) -> None:
    """How many of each kind of model each step can be done on wholly, and why not on the others."""
    found = {
        kind: {
            step: Counter(
                word(table[kind].get(name, {}).get(step, "wholly")) for name in CONFIGS[kind]
            )
            for step in STEPS
        }
        for kind in KINDS
    }
    assert found == COUNTS


COUNTS: dict[str, Any] = {
    "causal": {
        "fold_ln": {
            "wholly": 147,
            "post-norm": 28,
            "a part that did not run": 6,
            "norm with another reader": 3,
            "norm of another kind": 2,
            "matrix with another use": 1,
        },
        "center_writing_weights": {
            "RMSNorm": 116,
            "wholly": 53,
            "mean is read": 13,
            "writer is no linear layer": 5,
        },
        "center_unembed": {
            "wholly": 174,
            "soft cap": 9,
            "no head": 2,
            "matrix with another use": 1,
            "several streams of logits": 1,
        },
        "fold_value_biases": {
            "wholly": 179,
            "no bias to take it": 6,
            "sink": 1,
            "no layer of its own": 1,
        },
        "refactor_factored_attn_matrices": {
            "grouped heads": 110,
            "wholly": 68,
            "does not cancel": 4,
            "no layer of its own": 4,
            "matrix with another use": 1,
        },
    },
    "masked": {
        "fold_ln": {"post-norm": 35, "wholly": 10},
        "center_writing_weights": {
            "wholly": 32,
            "writer is no linear layer": 5,
            "mean is read": 4,
            "RMSNorm": 4,
        },
        "center_unembed": {"wholly": 44, "no head": 1},
        "fold_value_biases": {"wholly": 43, "no point of its own": 1, "layer of another kind": 1},
        "refactor_factored_attn_matrices": {
            "wholly": 37,
            "grouped heads": 4,
            "no point of its own": 1,
            "does not cancel": 1,
            "layer of another kind": 1,
            "no layer of its own": 1,
        },
    },
}


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("conftest", HERE.parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    rows: dict[str, Any] = {kind: {} for kind in KINDS}
    for kind, name in ENTRIES:
        model = support.build_tiny(name, kind)
        model = model.double() if name in IN_FLOAT64 else model
        left = row_of(model, support.tiny_inputs(name, kind))[0]
        if left:
            rows[kind][name] = left
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write(f"{TABLE}: {sum(map(len, rows.values()))} models of {len(ENTRIES)}\n")
