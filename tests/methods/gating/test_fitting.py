"""Fitted gates on models whose circuits are known, and the loop itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    CHG,
    CHGDataset,
    CHGTrainer,
    ContrastiveCHG,
    FitUpdate,
    InputError,
    KLToFull,
    LogitDifference,
)
from lensbridge.methods.gating import Answers

TARGET, OTHER, FOIL = 1, 2, 3
SHORT = {"num_updates": 25, "num_reg_updates": 60}


# --- known circuits -----------------------------------------------------------------------------------------


def test_roles(planted: Callable[..., Any], says: Callable[..., CHGDataset]) -> None:
    """One head helps, one harms, six do nothing: every one of 32 masks says so."""
    chg = CHG(planted(2, 4, {(0, 1): {TARGET: 6.0}, (1, 2): {FOIL: 6.0}}, {}))
    results = CHGTrainer(chg, says(TARGET), num_masks=32, **SHORT).fit()
    expected = dict.fromkeys(
        [(layer, head) for layer in range(2) for head in range(4)], "irrelevant"
    )
    expected |= {(0, 1): "facilitating", (1, 2): "interfering"}
    assert results.labels() == expected
    for mask in range(32):
        assert results.labels(mask_idx=mask) == expected
    assert results.necessary_heads() == [(0, 1)]
    assert results.sufficient_heads() == [(0, 1)]


def test_no_false_labels(planted: Callable[..., Any], says: Callable[..., CHGDataset]) -> None:
    """Of 300 heads that do nothing none gets a role, under any mask."""
    chg = CHG(planted(10, 30, {(4, 7): {TARGET: 6.0}}, {}))
    results = CHGTrainer(
        chg, says(TARGET, 1), num_masks=32, num_updates=20, num_reg_updates=40
    ).fit()
    for mask in [None, *range(32)]:
        assert Counter(results.labels(mask_idx=mask).values()) == {
            "irrelevant": 299,
            "facilitating": 1,
        }


def test_the_papers_own_loop_gives_false_labels(
    planted: Callable[..., Any], says: Callable[..., CHGDataset]
) -> None:
    """Without projection a gate that begins outside the clamp stays where it was: 1.8 % on either side."""
    chg = CHG(planted(10, 30, {(4, 7): {TARGET: 6.0}}, {}))
    results = CHGTrainer(
        chg,
        says(TARGET, 1),
        num_masks=16,
        num_updates=20,
        num_reg_updates=40,
        projection=False,
        clip="joint",
        mask_init_range=(0.0, 1.0),
    ).fit()
    counts = Counter(label for m in range(16) for label in results.labels(mask_idx=m).values())
    false = counts["interfering"] + counts["facilitating"] - 16
    assert 0.015 < false / (16 * 299) < 0.06


@pytest.mark.parametrize("second", [16.0, 10.0])
def test_one_or_the_other(
    planted: Callable[..., Any], says: Callable[..., CHGDataset], second: float
) -> None:
    """Of two heads that can stand in for each other, each mask keeps one; the stronger if they differ."""
    chg = CHG(planted(1, 4, {(0, 0): {TARGET: 16.0}, (0, 1): {TARGET: second}}, {OTHER: 5.0}))
    results = CHGTrainer(
        chg, says(TARGET, 1), num_masks=48, num_updates=40, num_reg_updates=200
    ).fit()
    kept = (results.gates("negative") > 0.5)[:, 0, :2]
    assert int((kept.sum(-1) == 1).sum()) >= 0.9 * 48
    assert not (results.gates("negative") > 0.5)[:, 0, 2:].any()
    first = int(kept[:, 0].sum())
    if second == 16.0:
        assert 12 <= first <= 36
        assert results.labels()[0, 0] == results.labels()[0, 1] == "undecided"
        assert float(results.cooccurrence()[0, 1]) < -0.9
        assert results.agreement()["every"] == 0
        assert results.necessary_heads() == []
        assert len(results.sufficient_heads()) == 1
    else:
        assert first == 48
        assert results.labels()[0, 1] == "irrelevant"


def test_both_needed(planted: Callable[..., Any], says: Callable[..., CHGDataset]) -> None:
    """Of two heads that do nothing alone, every mask keeps both."""
    chg = CHG(planted(1, 4, {(0, 0): {TARGET: 8.0}, (0, 1): {TARGET: 8.0}}, {OTHER: 12.0}))
    results = CHGTrainer(chg, says(TARGET, 1), num_masks=32, **SHORT).fit()
    assert results.necessary_heads() == [(0, 0), (0, 1)]
    assert results.agreement()["every"] == 0.5
    assert results.agreement()["kappa"] == 1


def test_two_routes(planted: Callable[..., Any], says: Callable[..., CHGDataset]) -> None:
    """Contrastive: the head of the lost task goes, that of the kept one and those of neither stay."""
    effects = {(0, 0): {TARGET: 6.0}, (0, 1): {OTHER: 6.0}}
    chg = CHG(planted(2, 4, effects, {FOIL: 3.0}))
    fitted = ContrastiveCHG(chg, says(TARGET), says(OTHER), num_masks=8, num_updates=120).fit()
    shut = fitted.interference() > 0.5
    assert shut.nonzero().tolist() == [[0, 1]]
    with pytest.raises(InputError, match="'negative' was not fitted"):
        fitted.facilitation()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fixed_point(
    planted: Callable[..., Any], says: Callable[..., CHGDataset], reduction: str
) -> None:
    """A head worth c nats rests at (1 + sqrt(1 - 4 w / c)) / 2, w the weight on its logit; at 0 if 4 w > c."""
    worth = [0.04, 0.06, 0.1, 0.3, 1.0]
    effects = {divmod(n, 4): {TARGET: effect} for n, effect in enumerate(worth)}
    trainer = CHGTrainer(
        CHG(planted(2, 4, effects, {})),
        says(TARGET, 1, foil=FOIL),
        objective=LogitDifference(),
        num_masks=2,
        num_updates=20,
        num_reg_updates=160,
        lr_reg=0.1,
        reduction=reduction,
        l1_weight=0.1 if reduction == "mean" else 0.1 / 8,
    )
    weight, least = trainer.weight_per_gate, 1 / (1 + math.exp(4))
    assert weight == pytest.approx(0.1 / 8)
    found = trainer.fit().gates("negative")[0].flatten()
    for n, effect in enumerate(worth):
        inside = 1 - 4 * weight / effect
        expected = least if inside < 0 else min((1 + math.sqrt(inside)) / 2, 1 - least)
        assert float(found[n]) == pytest.approx(expected, abs=1e-2)


# --- objectives ---------------------------------------------------------------------------------------------


def test_nearest_to_the_whole_model(
    planted: Callable[..., Any], says: Callable[..., CHGDataset]
) -> None:
    """With KL as the objective a head that harms the targets is kept: the whole model has it."""
    chg = CHG(planted(1, 4, {(0, 0): {TARGET: 6.0}, (0, 1): {FOIL: 6.0}}, {}))
    results = CHGTrainer(chg, says(TARGET, 1), objective=KLToFull(), num_masks=4, **SHORT).fit()
    assert results.necessary_heads() == [(0, 0), (0, 1)]
    assert results.evaluation.full == pytest.approx(0, abs=1e-6)


def test_values_of_objectives() -> None:
    """Each by hand, on two places."""
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0]])
    full = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.0, 3.0]])
    where = torch.arange(2)
    answers = Answers(logits, where, where, torch.tensor([0, 2]), 2, torch.tensor([1, 0]), full)
    log_p, log_full = logits.log_softmax(-1), full.log_softmax(-1)
    kl = (log_full.exp() * (log_full - log_p)).sum(-1)
    assert torch.allclose(KLToFull()(answers), kl)
    assert float(kl[1]) == pytest.approx(0, abs=1e-6)
    assert LogitDifference()(answers).tolist() == [1.0, -2.5]


def test_an_objective_of_ones_own(
    planted: Callable[..., Any], says: Callable[..., CHGDataset]
) -> None:
    """Any function of the answers: here to say FOIL, whatever the target is."""
    chg = CHG(planted(1, 4, {(0, 0): {TARGET: 6.0}, (0, 1): {FOIL: 6.0}}, {}))

    def say_foil(answers: Answers) -> Tensor:
        return -answers.logits.log_softmax(-1)[:, FOIL]

    results = CHGTrainer(chg, says(TARGET, 1), objective=say_foil, num_masks=4, **SHORT).fit()
    assert results.necessary_heads() == [(0, 1)]


@pytest.mark.parametrize("wrong", [lambda answers: 1.0, lambda answers: answers.logits.mean()])
def test_an_objective_that_is_none(
    planted: Callable[..., Any], says: Callable[..., CHGDataset], wrong: Any
) -> None:
    """One that gives no loss for each place is refused."""
    trainer = CHGTrainer(CHG(planted(1, 4, {}, {})), says(TARGET), objective=wrong)
    with pytest.raises(InputError, match="a loss for each of the"):
        trainer.fit()


def test_a_foil_is_needed(planted: Callable[..., Any], says: Callable[..., CHGDataset]) -> None:
    """The logit difference says what is missing."""
    trainer = CHGTrainer(CHG(planted(1, 4, {}, {})), says(TARGET), objective=LogitDifference())
    with pytest.raises(InputError, match="foils="):
        trainer.fit()


def test_a_classifier(tiny: Callable[..., nn.Module]) -> None:
    """Heads of an encoder with classes: the loss is the cross-entropy of the labels."""
    from transformers import BertForSequenceClassification

    base: Any = tiny("bert", "masked")
    base.config.num_labels = 3
    torch.manual_seed(0)
    chg = CHG(BertForSequenceClassification(base.config).eval())
    ids = [torch.randint(5, 40, (n,)) for n in (5, 7, 6)]
    labels = torch.tensor([2, 0, 1])
    data = CHGDataset.from_tokens(ids, labels=labels)
    losses: list[Tensor] = []
    masks = torch.randn(2, *chg.mask_shape)
    trainer = CHGTrainer(chg, data, masks=masks, num_updates=1, num_reg_updates=0)
    trainer.fit(callback=lambda update: losses.append(update.loss))
    model: Any = chg.bridge.original_model
    for m in range(2):
        with torch.no_grad(), chg.gated(masks[m].sigmoid()):
            logits = torch.cat([model(row[None]).logits for row in ids])
        expected = nn.functional.cross_entropy(logits, labels)
        assert float(losses[0][m]) == pytest.approx(float(expected), abs=1e-5)


# --- the loop -----------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny: Callable[..., nn.Module]) -> CHG:
    """Gates on a tiny random model, in float64."""
    return CHG(tiny("gpt2").double())


@pytest.fixture
def rows() -> CHGDataset:
    """Ten random rows of unequal length, the last token counting."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 40, (n,), generator=generator) for n in range(5, 15)]
    return CHGDataset.from_tokens(ids, [torch.arange(len(x)) == len(x) - 1 for x in ids])


KNOBS: dict[str, Any] = {"num_updates": 6, "num_reg_updates": 6, "batch_size": 4, "lr": 0.3}


def test_the_first_update_by_hand(llama: CHG, rows: CHGDataset) -> None:
    """Adam's first step, on the clipped gradient of the mean loss of the batch."""
    first = torch.randn(1, *llama.mask_shape, dtype=torch.float64)
    trainer = CHGTrainer(
        llama, rows, masks=first, num_updates=1, num_reg_updates=0, batch_size=10, lr=0.3
    )
    made = trainer.fit().gates("none")[0]
    z = first.clone().requires_grad_()
    total = 0
    for ids in rows.input_ids:
        loss = torch.zeros(1, len(ids), dtype=torch.bool)
        loss[0, -1] = True
        total = total - llama.get_logp(z.sigmoid(), ids[None], loss).sum() / len(rows)
    total.backward()
    grad = z.grad * min(1, 1 / float(z.grad.norm()))
    # Adam's first step is lr times the sign, up to epsilon.
    step = 0.3 * grad / (grad.abs() + 1e-8)
    assert torch.allclose(made.double(), (z - step).sigmoid()[0].float().double(), atol=1e-5)


def test_masks_do_not_feel_each_other(llama: CHG, rows: CHGDataset) -> None:
    """A fit of one mask is the row of a fit of three, with the same seed."""
    first = llama.create_masks(3, as_parameter=False, seed=7).double()
    many = CHGTrainer(llama, rows, masks=first, seed=7, **KNOBS).fit()
    for k in range(3):
        one = CHGTrainer(llama, rows, masks=first[k], seed=7, **KNOBS).fit()
        for stage in ("none", "positive", "negative"):
            assert torch.allclose(many.gates(stage)[k], one.gates(stage)[0], atol=1e-6)


def test_a_seed_is_a_fit(llama: CHG, rows: CHGDataset) -> None:
    """The same seed gives the same gates, another others; the global generator is not touched."""
    state = torch.get_rng_state()
    fits = [CHGTrainer(llama, rows, num_masks=2, seed=s, **KNOBS).fit() for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fits[0].gates("negative"), fits[1].gates("negative"))
    assert not torch.equal(fits[0].gates("negative"), fits[2].gates("negative"))


def test_accumulation(llama: CHG, rows: CHGDataset) -> None:
    """Two batches of five are one of ten."""
    first = torch.randn(2, *llama.mask_shape, dtype=torch.float64)
    knobs = {"masks": first, "num_updates": 1, "num_reg_updates": 0}
    whole = CHGTrainer(llama, rows, batch_size=10, **knobs).fit()
    parts = CHGTrainer(llama, rows, batch_size=5, gradient_accum_steps=2, **knobs).fit()
    assert torch.allclose(whole.gates("none"), parts.gates("none"), atol=1e-6)


@pytest.mark.parametrize("stop", [3, 8])
def test_going_on(llama: CHG, rows: CHGDataset, tmp_path: Path, stop: int) -> None:
    """A fit that was broken off and resumed ends bit for bit as one that was not."""
    path = tmp_path / "fit.safetensors"
    knobs = {"num_masks": 2, "history_every": 2, **KNOBS}
    expected = CHGTrainer(llama, rows, **knobs).fit()
    updates = CHGTrainer(llama, rows, **knobs).updates(checkpoint=path, checkpoint_every=1)
    for _ in range(stop):
        next(updates)
    updates.close()
    numbers: list[int] = []
    again = CHGTrainer(llama, rows, **knobs)
    found = again.fit(checkpoint=path, resume=True, callback=lambda u: numbers.append(u.update))
    assert len(numbers) == 12 - (stop - 1)
    for stage in ("none", "positive", "negative"):
        assert torch.equal(found.gates(stage), expected.gates(stage))
        assert torch.equal(found.history[stage], expected.history[stage])
    for name, losses in expected.losses.items():
        assert torch.equal(found.losses[name], losses)


def test_another_fit_is_not_gone_on_from(llama: CHG, rows: CHGDataset, tmp_path: Path) -> None:
    """Other knobs, other gates or no checkpoint at all."""
    path = tmp_path / "fit.safetensors"
    CHGTrainer(llama, rows, num_masks=2, **KNOBS).fit(checkpoint=path)
    other = CHGTrainer(llama, rows, num_masks=2, **{**KNOBS, "lr": 0.1})
    with pytest.raises(InputError, match="its options are"):
        other.fit(checkpoint=path, resume=True)
    with pytest.raises(InputError, match="checkpoint="):
        other.fit(resume=True)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="is no lensbridge gating checkpoint"):
        other.fit(checkpoint=path, resume=True)


def test_patience(planted: Callable[..., Any], says: Callable[..., CHGDataset]) -> None:
    """A stage ends when no gate has crossed 0.5 for so many updates, with the same roles."""
    chg = CHG(planted(2, 4, {(0, 1): {TARGET: 6.0}, (1, 2): {FOIL: 6.0}}, {}))
    full = CHGTrainer(chg, says(TARGET), num_masks=4, **SHORT).fit()
    short = CHGTrainer(chg, says(TARGET), num_masks=4, patience=12, **SHORT).fit()
    assert short.labels() == full.labels()
    assert len(short.losses["none"]) < 25
    assert len(short.losses["positive and negative"]) < 60


def test_a_callback_ends_a_stage(llama: CHG, rows: CHGDataset) -> None:
    """True ends the stage, not the fit."""
    seen: list[FitUpdate] = []

    def stop(update: FitUpdate) -> bool:
        seen.append(update)
        return update.update == 2

    CHGTrainer(llama, rows, num_masks=2, **KNOBS).fit(callback=stop)
    assert [(u.stage, u.update) for u in seen] == [
        (stage, n) for stage in ("none", "positive and negative") for n in range(3)
    ]
    assert seen[0].gates.shape == (2, *llama.mask_shape)
    assert seen[-1].loss.shape == (4,)


def test_no_updates(llama: CHG, rows: CHGDataset) -> None:
    """Nothing is fitted: the gates are those that were drawn."""
    results = CHGTrainer(llama, rows, num_masks=2, num_updates=0, num_reg_updates=0).fit()
    drawn = llama.create_masks(2, as_parameter=False).sigmoid()
    assert torch.equal(results.gates("none"), drawn)
    assert results.summary()["num_masks"] == 2


def test_losses_are_told(planted: Callable[..., Any], says: Callable[..., CHGDataset]) -> None:
    """Each update's loss is that of its gates, not 0."""
    chg = CHG(planted(1, 4, {(0, 0): {TARGET: 6.0}}, {}))
    results = CHGTrainer(chg, says(TARGET), num_masks=2, **SHORT).fit()
    losses = results.losses["none"]
    assert losses.shape == (25, 2)
    assert float(losses[0].min()) > float(losses[-1].max()) > 0


def test_the_model_between_updates(
    tiny: Callable[..., nn.Module], rows: CHGDataset, snapshot: Any
) -> None:
    """While the caller's code runs the model is as the caller has it, and so it is after an error."""
    model = tiny("llama").train()
    before = snapshot(model)
    trainer = CHGTrainer(CHG(model), rows, num_masks=2, **KNOBS)
    for _ in trainer.updates():
        assert snapshot(model) == before
        assert model.training

    def fail(update: FitUpdate) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CHGTrainer(CHG(model), rows, num_masks=2, **KNOBS).fit(callback=fail)
    assert snapshot(model) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_mask": 3}, "did you mean num_masks"),
        ({"num_masks": 0}, "num_masks must be at least 1"),
        ({"num_updates": -1}, "must not be negative"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"reduction": "max"}, "'mean', 'sum'"),
        ({"clip": "all"}, "'mask', 'joint'"),
        ({"patience": 0}, "patience"),
        ({"jitter": 1.0}, "jitter"),
        ({"masks": torch.full((1, 2, 4), torch.inf)}, "finite"),
        ({"masks": torch.zeros(1, 2, 3)}, "layer, head"),
    ],
)
def test_knobs_that_cannot_be(
    llama: CHG, rows: CHGDataset, knobs: dict[str, Any], message: str
) -> None:
    """Unknown ones and values out of range are refused before anything is run."""
    with pytest.raises(InputError, match=message):
        CHGTrainer(llama, rows, **knobs)


def test_a_margin_that_cannot_be(llama: CHG, rows: CHGDataset) -> None:
    """How far the lost task is pushed must be a distance."""
    with pytest.raises(InputError, match="margin"):
        ContrastiveCHG(llama, rows, rows, margin=0.0)
