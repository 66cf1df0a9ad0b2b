"""Running what gates name: scores, curves and circuits, against sums that can be done by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import (
    CHG,
    CHGDataset,
    CHGTrainer,
    InputError,
    LensAPI,
    LogitDifference,
    ablation_curve,
    check_circuit,
    gate_attribution,
)
from lensbridge.demo import tasks
from lensbridge.methods.gating import scores_under

TARGET, FOIL = 1, 3


@pytest.fixture
def linear(planted: Callable[..., Any]) -> CHG:
    """Four heads worth 4, 2, 0 and -1 of logit difference."""
    effects = {(0, n): {TARGET: value} for n, value in enumerate([4.0, 2.0, 0.0, -1.0])}
    return CHG(planted(1, 4, effects, {}))


@pytest.fixture
def rows(says: Callable[..., CHGDataset]) -> CHGDataset:
    """Rows with a foil."""
    return says(TARGET, 5, foil=FOIL)


def test_scores(linear: CHG, rows: CHGDataset) -> None:
    """Minus the objective: what the open heads are worth; log-probabilities unless told otherwise."""
    masks = torch.tensor([[[1.0, 1, 1, 1]], [[0.5, 0, 1, 1]], [[0.0, 0, 0, 0]]])
    found = scores_under(linear, rows, masks, LogitDifference())
    assert found.tolist() == pytest.approx([5, 1, 0], abs=1e-5)
    logits = torch.zeros(8)
    logits[TARGET] = 5.0
    plain = scores_under(linear, rows, masks[:1])
    assert float(plain) == pytest.approx(float(logits.log_softmax(0)[TARGET]), abs=1e-5)


def test_scores_are_means_over_rows(demo_lens: LensAPI) -> None:
    """Each row of its own length counts once, in whatever parts it is run."""
    items = tasks.capitals()[:7]
    data = CHGDataset.from_texts(
        [i.prompt for i in items], [i.answer for i in items], demo_lens.bridge
    )
    chg = CHG(demo_lens.bridge)
    masks = torch.rand(70, *chg.mask_shape, generator=torch.Generator().manual_seed(0)).round()
    found = scores_under(chg, data, masks)
    ids: Any = demo_lens.tokenizer
    expected = []
    for item in items:
        with torch.no_grad(), chg.gated(masks[3]) as bridge:
            log_p = bridge(item.prompt)[0, -1].log_softmax(-1)
        expected.append(float(log_p[ids(item.answer)["input_ids"][0]]))
    assert float(found[3]) == pytest.approx(sum(expected) / 7, abs=1e-4)
    assert torch.allclose(scores_under(chg, data, masks[3:4]), found[3:4], atol=1e-5)


def test_a_curve(linear: CHG, rows: CHGDataset) -> None:
    """Heads are closed from the highest score down, and each point is what is left."""
    order = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    curve = ablation_curve(linear, rows, order, points=4, objective=LogitDifference())
    assert curve.heads == [(0, 1), (0, 3), (0, 2), (0, 0)]
    assert curve.closed == [0, 1, 2, 3, 4]
    assert curve.scores.tolist() == pytest.approx([5, 3, 4, 4, 0], abs=1e-5)
    few = ablation_curve(linear, rows, order, points=2, objective=LogitDifference())
    assert few.closed == [0, 2, 4]
    assert few.scores.tolist() == pytest.approx([5, 4, 0], abs=1e-5)


def test_a_circuit(linear: CHG, rows: CHGDataset) -> None:
    """Faithful as what it keeps, complete as what goes with it; random ones of its size beside it."""
    check = check_circuit(
        linear, rows, torch.tensor([[1.0, 0, 0, 1]]), n_random=40, objective=LogitDifference()
    )
    assert check.n_heads == 2
    assert [check.full, check.empty] == pytest.approx([5, 0])
    assert check.faithfulness == pytest.approx(3 / 5, abs=1e-5)
    assert check.completeness == pytest.approx(3 / 5, abs=1e-5)
    pairs = {6 / 5, 4 / 5, 3 / 5, 2 / 5, 1 / 5, -1 / 5}
    found = {round(float(x), 4) for x in check.random_faithfulness}
    assert found <= pairs
    assert len(found) >= 4
    again = check_circuit(linear, rows, torch.tensor([[1.0, 0, 0, 1]]), n_random=40)
    other = check_circuit(linear, rows, torch.tensor([[1.0, 0, 0, 1]]), n_random=40, seed=1)
    assert not torch.equal(again.random_faithfulness, other.random_faithfulness)


def test_slopes(linear: CHG, rows: CHGDataset) -> None:
    """One backward pass: of a linear score the slope is each head's worth."""
    found = gate_attribution(linear, rows, objective=LogitDifference(), batch_size=2)
    assert found[0].tolist() == pytest.approx([4, 2, 0, -1], abs=1e-5)
    model: Any = linear.bridge.original_model
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_slopes_against_differences(demo_lens: LensAPI) -> None:
    """On the embedded model, against two runs with a gate moved."""
    chg = CHG(demo_lens.bridge)
    data = CHGDataset.from_texts(
        ["The capital of France is"], [" Paris"], demo_lens.bridge, foils=[" Rome"]
    )
    found = gate_attribution(chg, data, objective=LogitDifference())
    step = 1e-2
    for place in [(0, 3), (2, 1), (3, 0)]:
        masks = torch.ones(2, *chg.mask_shape)
        masks[0][place] += step
        masks[1][place] -= step
        up, down = scores_under(chg, data, masks, LogitDifference())
        assert float(found[place]) == pytest.approx(float(up - down) / (2 * step), abs=1e-2)
    assert float(found.abs().max()) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("task", ["capitals", "ioi"])
def test_circuits_of_the_embedded_model(demo_lens: LensAPI, task: str) -> None:
    """A minority of heads keeps 90 % of the task on rows nothing was fitted to; random ones do not."""
    items = list(getattr(tasks, task)())[:96]
    data = CHGDataset.from_texts(
        [i.prompt for i in items], [i.answer for i in items], demo_lens.bridge
    )
    train, test = data.split(0.7, seed=0)
    chg = CHG(demo_lens.bridge)
    results = CHGTrainer(
        chg, train, num_masks=4, num_updates=30, num_reg_updates=70, batch_size=8
    ).fit()
    circuit = results.get_facilitating_mask()
    check = check_circuit(chg, test, circuit, n_random=40)
    assert circuit.numel() / 2 > check.n_heads > 0
    assert check.faithfulness >= 0.9
    assert float(check.random_faithfulness.median()) < 0.6
    assert float((check.random_faithfulness < 0.9).float().mean()) >= 0.8
    assert len(results.sufficient_heads()) <= circuit.numel() / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda chg, data: ablation_curve(chg, data, torch.ones(2, 4)), r"\[1, 4\] heads"),
        (lambda chg, data: ablation_curve(chg, data, torch.ones(1, 4), points=0), "at least one"),
        (lambda chg, data: check_circuit(chg, data, torch.full((1, 4), 0.5)), "0 and 1"),
        (lambda chg, data: gate_attribution(chg, data, max_rows=0), "max_rows"),
    ],
)
def test_what_is_refused(
    linear: CHG, rows: CHGDataset, call: Callable[[CHG, CHGDataset], Tensor], message: str
) -> None:
    """Orders of other shapes, no points, circuits that are none, no rows."""
    with pytest.raises(InputError, match=message):
        call(linear, rows)
