"""What training finds: atoms that were planted, and the demo model's middle layer, to stated figures."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import SplitterForGeneration, TransformerBridge, demo
from lensbridge.demo.tasks import documents
from lensbridge.methods.concepts.explainers import KINDS
from lensbridge.methods.concepts.figures import Spread, explained_variance


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    """The embedded model."""
    return TransformerBridge.boot_transformers(demo.path())


@pytest.fixture(scope="module")
def planted() -> tuple[Tensor, Tensor]:
    """Rows that are sums of 4 of 96 known directions, away from zero; and the directions."""
    draw = torch.Generator().manual_seed(1)
    atoms = torch.nn.functional.normalize(torch.randn(96, 128, generator=draw), dim=1)
    chosen = torch.rand(16_000, 96, generator=draw).topk(4).indices
    sizes = torch.rand(16_000, 4, generator=draw) + 0.5
    codes = torch.zeros(16_000, 96).scatter(1, chosen, sizes)
    return codes @ atoms + torch.randn(128, generator=draw), atoms


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("TopKSAE", {"top_k": 4}),
        ("BatchTopKSAE", {"top_k": 4}),
        ("MpSAE", {"k": 4}),
        ("JumpSAE", {"target_l0": 4, "threshold": 2.0}),
        ("SAE", {}),
    ],
)
def test_planted_atoms_are_found(
    bridge: TransformerBridge, planted: tuple[Tensor, Tensor], kind: str, options: dict[str, Any]
) -> None:
    """The mean over planted atoms of the largest cosine with a learnt one."""
    rows, atoms = planted
    explainer = KINDS[kind](bridge, split_point=1, nb_concepts=96, **options)
    explainer.fit(rows, lr=5e-3, batch_size=256, nb_epochs=12)
    found = (atoms @ explainer.get_dictionary().T).max(1).values.mean()
    print(f"{kind}: mean max cosine {found:.4f}")
    assert found >= 0.95


@pytest.fixture(scope="module")
def acts(bridge: TransformerBridge) -> Tensor:
    """The middle layer on generated text, a row for each token."""
    splitter = SplitterForGeneration(bridge, 1, batch_size=64)
    texts = list(itertools.islice(documents(0), 1000))
    found, _ = splitter.get_activations(texts)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "epochs"),
    [
        ("TopKSAE", {}, 8),
        # Of rows not trained on, a little more than top_k codes are above the threshold.
        ("BatchTopKSAE", {"top_k": 30}, 8),
        ("MpSAE", {"k": 16}, 4),
        ("JumpSAE", {}, 12),
        ("SAE", {}, 16),
    ],
)
def test_the_demo_models_middle_layer(
    bridge: TransformerBridge, acts: Tensor, kind: str, options: dict[str, Any], epochs: int
) -> None:
    """At most 32 codes a row explain nine tenths of the variance, of rows that were not trained on, too."""
    n = len(acts) * 9 // 10
    explainer = KINDS[kind](bridge, split_point=1, nb_concepts=512, **options)
    history = explainer.fit(acts[:n], lr=3e-3, batch_size=512, nb_epochs=epochs)
    figures = []
    for rows in (acts[:n], acts[n:]):
        codes = explainer.encode_activations(rows)
        variance = explained_variance(rows, explainer.decode_concepts(codes))
        figures.append((variance, float((codes > 0).sum(1).double().mean())))
    dead = float((explainer.encode_activations(acts[:n]).amax(0) <= 0).double().mean())
    print(
        f"{kind}: EV {figures[0][0]:.3f}/{figures[1][0]:.3f}, L0 {figures[0][1]:.1f}/{figures[1][1]:.1f}, dead {dead:.3f}"
    )
    # The two whose number of codes is learnt come close to it.
    l0_most = 32 if kind in ("TopKSAE", "BatchTopKSAE", "MpSAE") else 36
    for variance, l0 in figures:
        assert variance >= 0.9
        assert l0 <= l0_most
    assert dead < 0.1
    assert history["explained_variance"][-1] >= 0.88


def test_explained_variance_is_exact() -> None:
    """By hand; the mean scores 0, where overcomplete's measure says nearly 1 of means that differ by column."""
    from overcomplete.metrics import r2_score

    x = torch.tensor([[1.0, 100.0], [3.0, 104.0]])
    mean = x.mean(0).expand(2, -1)
    assert explained_variance(x, x) == 1
    assert explained_variance(x, mean) == 0
    assert explained_variance(x, torch.tensor([[1.0, 101.0], [3.0, 104.0]])) == pytest.approx(0.9)
    assert float(r2_score(x, mean)) > 0.99


def test_spread_is_exact_far_from_zero() -> None:
    """Batch by batch, around a mean a million times the deviations."""
    x = 1e6 + torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = Spread(3)
    for part in x.split(77):
        spread.add(part)
    torch.testing.assert_close(spread.mean, x.mean(0))
    exact = (x - x.mean(0)).square().sum()
    assert float(spread.total) == pytest.approx(float(exact), rel=1e-9)
