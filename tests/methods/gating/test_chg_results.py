"""What is read off gates: scores, labels, tables and files, on gates that are written down."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import CHG, CHGDataset, CHGResults, CHGTrainer, InputError, LensAPI
from lensbridge.methods.gating import Evaluation
from lensbridge.methods.gating.statistics import bootstrap, correlation, fleiss_kappa

# Facilitating, interfering, irrelevant, inconsistent.
POSITIVE = torch.tensor([[[0.9, 0.1, 0.9, 0.1]]]).repeat(4, 1, 1)
NEGATIVE = torch.tensor([[[0.8, 0.1, 0.2, 0.9]]]).repeat(4, 1, 1)


def results(**more: Any) -> CHGResults:
    """Four masks of one layer, number 3, that all agree."""
    masks = {"positive": POSITIVE.clone(), "negative": NEGATIVE.clone()}
    return CHGResults(**{"masks": masks, "layers": [3], **more})


def split() -> CHGResults:
    """Four masks, of which two keep head 0 and two head 1."""
    made = results()
    made.masks["negative"] = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])[:, None]
    made.masks["positive"] = torch.full((4, 1, 2), 0.9)
    return made


# --- scores and labels --------------------------------------------------------------------------------------


def test_scores() -> None:
    """G-, 1 - G+ and G+ (1 - G-)."""
    found = results()
    assert torch.allclose(found.facilitation(), torch.tensor([[0.8, 0.1, 0.2, 0.9]]))
    assert torch.allclose(found.interference(2), torch.tensor([[0.1, 0.9, 0.1, 0.9]]))
    assert torch.allclose(found.irrelevance(), torch.tensor([[0.18, 0.09, 0.72, 0.01]]))


def test_labels_are_the_four_corners() -> None:
    """Each corner of (G+, G-) has its name, and none is folded into another."""
    expected = {
        (3, 0): "facilitating",
        (3, 1): "interfering",
        (3, 2): "irrelevant",
        (3, 3): "inconsistent",
    }
    assert results().labels() == expected
    assert results().labels(mask_idx=1) == expected
    assert results().necessary_heads() == [(3, 0), (3, 3)]
    assert results().summary()["taxonomy_counts"]["inconsistent"] == 1


def test_masks_that_disagree() -> None:
    """A head that half of the masks keep has no role, though the mean of its gate is 0.5."""
    found = split()
    assert set(found.labels().values()) == {"undecided"}
    assert found.labels(mask_idx=0) == {(3, 0): "facilitating", (3, 1): "irrelevant"}
    assert found.necessary_heads() == []
    assert found.necessary_heads(mask_idx=3) == [(3, 1)]
    assert torch.equal(found.get_facilitating_mask(mask_idx=3), torch.tensor([[0.0, 1.0]]))
    assert found.agreement() == {"any": 1.0, "every": 0.0, "kappa": pytest.approx(-1 / 3)}
    assert torch.allclose(found.cooccurrence(), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


def test_a_threshold() -> None:
    """Where a gate is open is the caller's to say."""
    assert results().labels(0.85)[3, 0] == "irrelevant"
    assert results().get_facilitating_mask(0.15).tolist() == [[1.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("index", [4, -5])
def test_a_mask_that_is_not_there(index: int) -> None:
    """Its number is refused, and the message says which there are."""
    with pytest.raises(InputError, match="masks 0 to 3"):
        results().facilitation(index)


def test_a_stage_that_is_not_there() -> None:
    """Its name is refused, and the message says which there are."""
    with pytest.raises(InputError, match="'none' was not fitted; there are positive, negative"):
        results().gates("none")


# --- sufficiency --------------------------------------------------------------------------------------------


def test_sufficient_is_what_ran() -> None:
    """The smallest circuit that kept enough; a single one on request; none is an error with a figure."""
    found = split()
    found.masks["negative"][0] = 0.9  # mask 0 keeps both heads
    scores = torch.tensor([-0.1, -0.3, -0.15, -4.0], dtype=torch.float64)
    found.evaluation = Evaluation(8, full=0.0, empty=-4.0, circuits=scores)
    assert found.best_mask == 0
    assert found.sufficient_heads() == [(3, 1)]
    assert found.sufficient_heads(tolerance=0.03) == [(3, 0), (3, 1)]
    assert found.sufficient_heads(mask_idx=1) == [(3, 0)]
    assert found.get_facilitating_mask().tolist() == [[1.0, 1.0]]
    with pytest.raises(InputError, match=r"mask 3, 1 heads\) keeps 0\.0%"):
        found.sufficient_heads(mask_idx=3)
    summary = found.summary()
    assert summary["circuit_keeps"] == pytest.approx(1 - 0.1 / 4)
    assert summary["circuit_size"] == 2


def test_sufficiency_is_not_guessed() -> None:
    """Gates that were never run say nothing about it."""
    with pytest.raises(InputError, match="check_circuit"):
        results().sufficient_heads()
    with pytest.raises(InputError, match=r"threshold of 0\.5"):
        results().sufficient_heads(0.7)


# --- statistics ---------------------------------------------------------------------------------------------


def test_bootstrap() -> None:
    """The interval of a mean is near the normal one, and none at all of a single mask."""
    values = torch.rand(200, 1, 1, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(values, 0.95)
    error = 1.96 * float(values.std()) / 200**0.5
    assert float(low) == pytest.approx(float(values.mean()) - error, abs=0.1 * error)
    assert float(high) == pytest.approx(float(values.mean()) + error, abs=0.1 * error)
    low, high = bootstrap(values[:1], 0.95)
    assert float(low) == pytest.approx(float(values[0]))
    assert float(high) == pytest.approx(float(values[0]))


def test_kappa_by_hand() -> None:
    """Three raters, two subjects: (1, 1, 0) and (0, 0, 0)."""
    open_ = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    # Agreement (1/3 + 1) / 2, by chance (1/3)^2 + (2/3)^2.
    assert fleiss_kappa(open_) == pytest.approx((2 / 3 - 5 / 9) / (1 - 5 / 9))
    assert fleiss_kappa(torch.ones(3, 2)) != fleiss_kappa(torch.ones(3, 2))  # nan


def test_correlation_against_torch() -> None:
    """As torch.corrcoef has it; nan for a gate on which all agree."""
    open_ = (torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert torch.allclose(correlation(open_), torch.corrcoef(open_.T), atol=1e-6)
    open_[:, 1] = 1
    assert correlation(open_)[1].isnan().all()


# --- tables -------------------------------------------------------------------------------------------------


def test_taxonomy_table() -> None:
    """A line a head, with its scores, intervals and role."""
    table = split().head_taxonomy()
    assert list(table["taxonomy"]) == ["undecided", "undecided"]
    assert list(table["layer"]) == [3, 3]
    assert list(table["needed_in"]) == [0.5, 0.5]
    assert table["facilitation"][0] == pytest.approx(0.5)
    assert (table["facilitation_low"] < table["facilitation"]).all()
    assert (table["facilitation"] < table["facilitation_high"]).all()
    assert list(split().head_taxonomy(mask_idx=0)["facilitation_low"]) == pytest.approx([0.9, 0.1])


def test_long_table() -> None:
    """A line a gate; on request those on the way."""
    made = results(
        history={"negative": torch.stack([NEGATIVE * 0, NEGATIVE])}, updates={"negative": [0, 7]}
    )
    final = made.to_dataframe("negative")
    assert len(final) == 16
    assert set(final["update"]) == {7}
    assert list(final["gate"][:4]) == pytest.approx([0.8, 0.1, 0.2, 0.9])
    both = made.to_dataframe("negative", include_all_updates=True)
    assert list(both.groupby("update")["gate"].sum()) == pytest.approx([0, 8])
    assert set(results().to_dataframe("positive")["update"]) == {-1}


def test_tables_need_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the message says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InputError, match="pip install 'lensbridge"):
        results().head_taxonomy()


# --- files --------------------------------------------------------------------------------------------------


def test_round_trip(
    planted: Callable[..., Any], says: Callable[..., CHGDataset], tmp_path: Path
) -> None:
    """Everything comes back, and says the same."""
    chg = CHG(planted(2, 4, {(0, 1): {1: 6.0}}, {}), layers=[0])
    made = CHGTrainer(chg, says(1), num_masks=3, num_updates=5, num_reg_updates=20).fit()
    path = made.save(tmp_path / "deep" / "gates")
    assert path.name == "gates.safetensors"
    found = CHGResults.load(path)
    for group in ("masks", "history", "losses"):
        held = getattr(made, group)
        assert held.keys() == getattr(found, group).keys()
        assert all(torch.equal(x, getattr(found, group)[name]) for name, x in held.items())
    assert (found.layers, found.updates, found.options) == (made.layers, made.updates, made.options)
    assert torch.equal(found.evaluation.circuits, made.evaluation.circuits)
    assert found.sufficient_heads() == made.sufficient_heads() == [(0, 1)]
    assert repr(found) == repr(made)
    assert results().save(tmp_path / "bare.safetensors") == tmp_path / "bare.safetensors"
    assert CHGResults.load(tmp_path / "bare.safetensors").labels() == results().labels()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_old_files(tmp_path: Path, nested: bool, single: bool) -> None:
    """Files of inteprelens, as its trainer and as its results write them: the last update, rightly named."""
    gates = {"positive": POSITIVE, "negative": NEGATIVE, "none": NEGATIVE}
    final = {stage: x[0] if single else x for stage, x in gates.items()}
    old: dict[str, Any] = {stage: torch.stack([x * 0, x]) for stage, x in final.items()}
    path = tmp_path / "old.pt"
    torch.save({"masks": old, "metrics": [], "model_config": None} if nested else old, path)
    found = CHGResults.load(path)
    assert found.num_masks == (1 if single else 4)
    assert list(found.labels().values()) == [
        "facilitating",
        "interfering",
        "irrelevant",
        "inconsistent",
    ]
    assert found.necessary_heads() == [(0, 0), (0, 3)]


class Evil:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, of another format, or with code in them, which is not run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        CHGResults.load("nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        CHGResults.load("nowhere.pt")
    Path("text.safetensors").write_text("nothing")
    with pytest.raises(InputError, match="is no lensbridge gating results"):
        CHGResults.load("text.safetensors")
    torch.save({"weights": torch.ones(2)}, "other.pt")
    with pytest.raises(InputError, match="holds no gates"):
        CHGResults.load("other.pt")
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="without running code"):
        CHGResults.load("evil.pt")
    assert not Path("evil").exists()


# --- from a lens --------------------------------------------------------------------------------------------


def test_lens_fit(demo_lens: LensAPI, tmp_path: Path) -> None:
    """Texts and targets to results; the gates are those of a trainer by hand, and land in a file."""
    texts, targets = ["The capital of France is", "The capital of Italy is"], [" Paris", " Rome"]
    knobs: dict[str, Any] = {"num_masks": 2, "num_updates": 2, "num_reg_updates": 2}
    path = tmp_path / "gates.safetensors"
    found = demo_lens.fit(texts, targets, verbose=False, save_path=path, **knobs)
    data = CHGDataset.from_texts(texts, targets, demo_lens.bridge)
    expected = CHGTrainer(CHG(demo_lens.bridge), data, **knobs).fit()
    for stage in ("none", "positive", "negative"):
        assert torch.equal(found.gates(stage), expected.gates(stage))
    assert CHGResults.load(path).summary() == found.summary()
    mean = demo_lens.fit_dataset(data, ablation="mean", layers=[1], verbose=False, **knobs)
    means = CHG(demo_lens.bridge, layers=[1], ablation=data)
    assert torch.equal(mean.gates("none"), CHGTrainer(means, data, **knobs).fit().gates("none"))


def test_lens_fits_patterns_and_tables(demo_lens: LensAPI) -> None:
    """The other two ways in give the datasets of the same name."""
    knobs: dict[str, Any] = {
        "num_masks": 1,
        "num_updates": 1,
        "num_reg_updates": 0,
        "verbose": False,
    }
    task: dict[str, Any] = {"num_samples": 6, "num_lines": 2, "use_vocab_tokens": True}
    found = demo_lens.fit_pattern_task("abb", **task, data_seed=3, **knobs)
    data = CHGDataset.from_pattern_task("abb", demo_lens.bridge, **task, seed=3)
    assert torch.equal(found.gates("none"), demo_lens.fit_dataset(data, **knobs).gates("none"))
    rows = [{"q": "The capital of France is", "a": " Paris"}] * 2
    found = demo_lens.fit_huggingface(rows, "q", "a", **knobs)
    expected = demo_lens.fit([row["q"] for row in rows], [row["a"] for row in rows], **knobs)
    assert torch.equal(found.gates("none"), expected.gates("none"))


def test_lens_fit_refuses(demo_lens: LensAPI) -> None:
    """An ablation that is none, and a knob that is none."""
    texts, targets = ["The capital of France is"], [" Paris"]
    with pytest.raises(InputError, match="'zero', 'mean'"):
        demo_lens.fit(texts, targets, ablation="noise")
    with pytest.raises(InputError, match="did you mean num_masks"):
        demo_lens.fit(texts, targets, n_masks=3)


def test_a_single_number_of_masks(tiny: Callable[..., nn.Module]) -> None:
    """One mask: no interval, and the same labels as of that mask."""
    one = results()
    one.masks = {name: x[:1] for name, x in one.masks.items()}
    assert one.labels() == one.labels(mask_idx=0)
    low, high = one.intervals()["facilitation"]
    assert torch.equal(low, high)
    kappa: Tensor = torch.tensor(one.agreement()["kappa"])
    assert kappa.isnan()
