"""On the model inside the package: which heads carry the indirect object's name, exactly and to first
order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.demo import tasks
from lensbridge.methods import patching, path_patching
from lensbridge.methods.measured import logit_difference
from lensbridge.methods.patch_grid import PatchGrid

# Runs are passed as tuples whose length a type checker cannot know.
activation_patch: Any = patching.activation_patch
path_patch: Any = path_patching.path_patch


@pytest.fixture(scope="module")
def questions() -> tuple[list[str], list[str], Any]:
    """Sentences, the same with a third name in place of the indirect object's, and the lead of the first."""
    items = [item for item in tasks.ioi() if item.kind == "ABBA"][:16]
    drawn = random.Random(0)
    others = [
        drawn.choice([n for n in tasks.NAMES if f" {n}" not in (item.answer, item.distractor)])
        for item in items
    ]
    corrupted = [
        item.prompt.replace(item.answer, f" {name}")
        for item, name in zip(items, others, strict=True)
    ]
    metric = logit_difference([item.answer for item in items], [f" {name}" for name in others])
    return [item.prompt for item in items], corrupted, metric


def _ranks(x: Tensor) -> Tensor:
    return x.flatten().argsort().argsort().float()


def _spearman(x: PatchGrid, y: PatchGrid) -> float:
    return float(torch.corrcoef(torch.stack([_ranks(x.effects), _ranks(y.effects)]))[0, 1])


def test_the_indirect_objects_name(demo_lens: Any, questions: Any) -> None:
    """Attribution patching ranks the heads as patching does, and its first three restore the answer."""
    bridge = demo_lens.bridge
    quick = {"batch_size": 128, "progress": False}
    real = activation_patch(bridge, *questions, "z", **quick)
    estimate = activation_patch(bridge, *questions, "z", first_order=True)
    assert real.clean > 8
    assert real.corrupted < -8
    assert _spearman(real, estimate) > 0.95
    first = [item[:2] for item in estimate.top(3)]
    assert first[:2] == [item[:2] for item in real.top(2)] == [(2, 0), (0, 1)]

    # Together, by a hook that knows nothing of grids.
    clean, corrupted, metric = questions
    _, cache = bridge.run_with_cache(clean, names_filter="blocks.*.attn.hook_z")

    def put(z: Tensor, hook: Any) -> None:
        for layer, head in first:
            if layer == hook.layer():
                z[:, :, head] = cache[hook.name][:, :, head]

    with torch.no_grad():
        logits = bridge.run_with_hooks(corrupted, fwd_hooks=[("blocks.*.attn.hook_z", put)])
    right, wrong = (
        torch.tensor([bridge.to_single_token(x) for x in words])
        for words in (metric.correct, metric.incorrect)
    )
    last = (
        bridge.prepare(corrupted).mask.sum(1) - 1
        if bridge.prepare(corrupted).mask is not None
        else -1
    )
    rows = torch.arange(len(clean))
    lead = (logits[rows, last, right] - logits[rows, last, wrong]).mean()
    assert (lead - real.corrupted) / (real.clean - real.corrupted) > 0.8


def test_where_the_name_is_carried(demo_lens: Any, questions: Any) -> None:
    """By position: first where the name stands, at the end where it is said, and nowhere else."""
    bridge = demo_lens.bridge
    one = [questions[0][0], questions[1][0]]
    metric = logit_difference(questions[2].correct[0], questions[2].incorrect[0])
    grid = activation_patch(bridge, *one, metric, "resid_pre", batch_size=64, progress=False)
    ids = [bridge.to_tokens(text)[0] for text in one]
    (place,) = (ids[0] != ids[1]).nonzero()[:, 0].tolist()
    last = len(ids[0]) - 1
    assert grid.normalised[0, place] == pytest.approx(1.0, abs=1e-5)
    assert grid.normalised[3, last] > 0.9
    rest = [pos for pos in range(last) if pos != place]
    assert grid.normalised[:, rest].abs().max() < 0.2


def test_how_the_name_reaches_the_end(demo_lens: Any, questions: Any) -> None:
    """From the first MLP to the values of one head, and from that head straight to the end."""
    bridge = demo_lens.bridge
    paths = path_patch(bridge, *questions, "heads", "final", batch_size=128, progress=False)
    assert paths.top(1)[0][:2] == (2, 0)
    whole = activation_patch(bridge, *questions, "z", layers=2, heads=[0], progress=False)
    # What it finds is what the first MLP makes of the name; where it looks is the same in both runs.
    told = {
        part: path_patch(bridge, *questions, ("mlp", 0), (part, 2, 0), progress=False)
        for part in "qkv"
    }
    assert float(told["v"].normalised) == pytest.approx(float(whole.normalised), abs=0.05)
    assert float(whole.normalised) > 0.5
    assert max(abs(float(told[part].normalised)) for part in "qk") < 0.01
