"""Measures of coders against sums by hand, and at the ends: a coder that misses nothing, and one that misses all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import InputError, TransformerBridge
from lensbridge.demo import tasks
from lensbridge.methods.concepts.metrics import measure_sae, stability

AT = "blocks.1.hook_resid_post"


class Linear:
    """Codes are the positive parts of some directions; the reconstruction sums them up."""

    def __init__(self, width: int, concepts: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.d_in = width
        self.rows = nn.functional.normalize(
            torch.randn(concepts, width, generator=generator), dim=-1
        )

    def get_dictionary(self) -> Tensor:
        return self.rows

    def encode(self, x: Tensor) -> Tensor:
        acts = (x @ self.rows.T - 0.5).relu()
        return torch.cat([acts[:, :-1], 0 * acts[:, -1:]], 1)  # the last one is dead

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.rows


class Identity(Linear):
    """Misses nothing."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, acts: Tensor) -> Tensor:
        return acts


class Zero(Linear):
    """Misses everything."""

    def decode(self, acts: Tensor) -> Tensor:
        return torch.zeros(len(acts), self.d_in)


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    """The embedded model."""
    from lensbridge import demo

    return TransformerBridge.boot_transformers(str(demo.path()))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Sentences of unequal length."""
    return [item.prompt + item.answer for item in (*tasks.capitals()[:4], *tasks.ioi()[:3])]


@pytest.fixture(scope="module")
def width(bridge: TransformerBridge) -> int:
    """Of the residual stream."""
    return int(bridge.cfg.d_model or 0)


def test_against_sums_by_hand(bridge: TransformerBridge, texts: list[str], width: int) -> None:
    """Text by text, with plain hooks."""
    sae = Linear(width)
    found = measure_sae(bridge, sae, AT, texts, batch_size=3)
    special = set(bridge.tokenizer.all_special_ids)
    xs: list[Tensor] = []
    ces: dict[str, list[Tensor]] = {run: [] for run in ("clean", "spliced", "zero", "mean")}
    kls: dict[str, list[Tensor]] = {run: [] for run in ("spliced", "zero", "mean")}
    rows: list[Tensor] = [bridge.to_tokens(text)[0] for text in texts]
    counts = [torch.tensor([int(i) not in special for i in row]) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(row[None], names_filter=AT)
        xs.append(cache[AT][0][count])
    x = torch.cat(xs).double()
    made = sae.decode(sae.encode(x.float())).double()
    for row, count in zip(rows, counts, strict=True):
        where = count[None, :, None]

        def run(new: Any, row: Tensor = row, where: Tensor = where) -> Tensor:
            def edit(value: Tensor, hook: Any) -> Tensor:
                return torch.where(where, new(value), value)

            with torch.no_grad(), bridge.hooks([(AT, edit)]):
                return bridge(row[None])[0, :-1].double().log_softmax(-1)

        logs = {
            "clean": run(lambda v: v),
            "spliced": run(lambda v: sae.decode(sae.encode(v[0]))[None]),
            "zero": run(torch.zeros_like),
            "mean": run(lambda v: x.mean(0).float().expand_as(v)),
        }
        for name, log_p in logs.items():
            ces[name].append(-log_p.gather(-1, row[1:, None])[:, 0])
            if name != "clean":
                kls[name].append((logs["clean"].exp() * (logs["clean"] - log_p)).sum(-1))
    ce = {name: float(torch.cat(values).mean()) for name, values in ces.items()}
    kl = {name: float(torch.cat(values).mean()) for name, values in kls.items()}
    assert found.n_tokens == len(x)
    assert found.mse == pytest.approx(float(((x - made) ** 2).sum(-1).mean()), rel=1e-4)
    spread = ((x - x.mean(0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(
        float(1 - ((x - made) ** 2).sum() / spread), rel=1e-4
    )
    cosine = nn.functional.cosine_similarity(x, made, dim=-1).mean()
    assert found.cosine == pytest.approx(float(cosine), rel=1e-4)
    active = sae.encode(x.float()) > 0
    assert found.l0 == pytest.approx(float(active.double().sum(-1).mean()))
    assert torch.allclose(found.density, active.float().mean(0), atol=1e-5)
    assert found.dead == pytest.approx(float((~active.any(0)).double().mean()))
    assert found.dead >= 1 / 16
    assert found.ce_clean == pytest.approx(ce["clean"], rel=1e-4)
    assert found.ce == pytest.approx({name: ce[name] for name in found.ce}, rel=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    for name in ("zero", "mean"):
        expected = (ce[name] - ce["spliced"]) / (ce[name] - ce["clean"])
        assert found.ce_recovered[name] == pytest.approx(expected, rel=1e-3)
        assert found.kl_recovered[name] == pytest.approx(1 - kl["spliced"] / kl[name], rel=1e-3)


def test_the_ends(bridge: TransformerBridge, texts: list[str], width: int) -> None:
    """Exactly 1 for a coder that misses nothing, exactly 0 for one that is zero."""
    all_of_it = measure_sae(bridge, Identity(width), AT, texts)
    assert all_of_it.ce_recovered == {"zero": 1.0, "mean": 1.0}
    assert all_of_it.kl_recovered == {"zero": 1.0, "mean": 1.0}
    assert (all_of_it.explained_variance, all_of_it.mse) == (1.0, 0.0)
    assert [all_of_it.cosine, all_of_it.l2_ratio, all_of_it.relative_bias] == pytest.approx([1] * 3)
    nothing = measure_sae(bridge, Zero(width), AT, texts)
    assert nothing.ce_recovered["zero"] == 0.0
    assert nothing.kl_recovered["zero"] == 0.0
    assert nothing.l2_ratio == 0


def test_a_mean_predictor_explains_nothing(
    bridge: TransformerBridge, texts: list[str], width: int
) -> None:
    """Explained variance is about the mean of each feature, not the mean of all of them."""
    xs = []
    special = set(bridge.tokenizer.all_special_ids)
    for text in texts:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(text, names_filter=AT)
        keep = torch.tensor([int(i) not in special for i in bridge.to_tokens(text)[0]])
        xs.append(cache[AT][0][keep])
    mean = torch.cat(xs).mean(0)
    coder = Zero(width)
    coder.decode = lambda acts: mean.expand(len(acts), -1)  # type: ignore[method-assign]
    found = measure_sae(bridge, coder, AT, texts)
    assert found.explained_variance == pytest.approx(0, abs=1e-6)
    assert found.ce_recovered["mean"] == pytest.approx(0, abs=1e-4)


def test_batches_and_padding_do_not_matter(
    bridge: TransformerBridge, texts: list[str], width: int
) -> None:
    """One by one or all at once, texts or ids, padded on either side."""
    sae = Linear(width)
    expected = measure_sae(bridge, sae, AT, texts, batch_size=1).as_dict()
    assert measure_sae(bridge, sae, AT, texts).as_dict() == pytest.approx(expected, rel=1e-4)
    for side in ("left", "right"):
        inputs = bridge.prepare(texts, padding_side=side)
        found = measure_sae(bridge, sae, AT, inputs.tokens, attention_mask=inputs.mask)
        assert found.as_dict() == pytest.approx(expected, rel=1e-4)


def test_special_tokens(bridge: TransformerBridge, texts: list[str], width: int) -> None:
    """They count only on request; then there are more tokens, one a text."""
    sae = Linear(width)
    without = measure_sae(bridge, sae, AT, texts)
    with_them = measure_sae(bridge, sae, AT, texts, include_special_tokens=True)
    count = sum(
        int(i) in bridge.tokenizer.all_special_ids
        for text in texts
        for i in bridge.to_tokens(text)[0]
    )
    assert with_them.n_tokens - without.n_tokens == count


def test_heads(bridge: TransformerBridge, texts: list[str], width: int) -> None:
    """At heads that lie side by side."""
    found = measure_sae(bridge, Identity(width), "blocks.1.attn.hook_z", texts)
    assert found.ce_recovered == {"zero": 1.0, "mean": 1.0}


def test_stability() -> None:
    """1 for the same rows in another order and length, less for others."""
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert stability(rows, 3 * rows.flip(0)) == pytest.approx(1)
    other = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    cosines = nn.functional.normalize(rows, dim=-1) @ nn.functional.normalize(other, dim=-1).T
    expected = (cosines.amax(0).mean() + cosines.amax(1).mean()) / 2
    assert stability(rows, other) == pytest.approx(float(expected))
    with pytest.raises(InputError, match="of 9 and 6 features"):
        stability(rows, other[:, :6])


def test_what_is_refused(bridge: TransformerBridge, tiny: Any, width: int) -> None:
    """No data, too little of it, and models that do not go on with a text."""
    sae = Linear(width)
    with pytest.raises(InputError, match="nothing to measure on"):
        measure_sae(bridge, sae, AT, [])
    with pytest.raises(InputError, match="too few"):
        measure_sae(bridge, sae, AT, torch.tensor([[5]]))
    with pytest.raises(InputError, match="next token"):
        measure_sae(TransformerBridge(tiny("bert", "masked")), sae, AT, torch.tensor([[5, 6]]))
    assert not bridge.registry.live
