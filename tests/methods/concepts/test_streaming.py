"""Fits on texts and iterables: every row once, the model's own, nothing kept whole, resumed bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import (
    BatchTopKSAEConcepts,
    InputError,
    ModelWithSplitPoints,
    Streaming,
    TopKSAEConcepts,
    TransformerBridge,
    VanillaSAEConcepts,
    demo,
    extract_to,
    fit_together,
)
from lensbridge.demo.tasks import documents
from lensbridge.methods.concepts.buffer import ShuffleBuffer
from lensbridge.methods.concepts.figures import explained_variance
from lensbridge.methods.concepts.training import Trainer

POINT = "blocks.1.hook_resid_post"
SMALL = Streaming(buffer=600, texts_per_batch=2)


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    """The embedded model."""
    return TransformerBridge.boot_transformers(demo.path())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of the kind it was trained on."""
    return list(itertools.islice(documents(0), 48))


def rows_of(bridge: TransformerBridge, texts: list[str], point: str = POINT) -> Tensor:
    """What the model makes of texts, a row for each token."""
    found, _ = ModelWithSplitPoints(bridge, split_points=[point], batch_size=8).get_activations(
        texts
    )
    assert isinstance(found, Tensor)
    return found


def sae(bridge: TransformerBridge, point: str = POINT, kind: Any = TopKSAEConcepts) -> Any:
    """An explainer that has learnt nothing."""
    options = {} if kind is VanillaSAEConcepts else {"top_k": 4}
    return kind(bridge, nb_concepts=32, split_point=point, **options)


def weights(explainer: Any) -> dict[str, Tensor]:
    """What it has learnt; a copy."""
    return {name: x.clone() for name, x in explainer.concept_model.state_dict().items()}


def in_order(rows: Tensor) -> Tensor:
    """Rows in an order that does not depend on the one they came in."""
    return rows[rows[:, :3].double().mul(torch.tensor([1e6, 1e3, 1.0])).sum(1).argsort()]


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every batch that a trainer is given."""
    seen: list[Tensor] = []
    train = Trainer.train

    def spy(self: Trainer, rows: Tensor) -> None:
        seen.append(rows.clone())
        train(self, rows)

    monkeypatch.setattr(Trainer, "train", spy)
    return seen


def test_every_row_of_the_model_comes_once_an_epoch(
    bridge: TransformerBridge, texts: list[str], trained_on: list[Tensor]
) -> None:
    """In both epochs the rows of all texts, in batches of the size asked for, in another order."""
    whole = rows_of(bridge, texts)
    explainer = sae(bridge)
    history = explainer.fit(texts, nb_epochs=2, batch_size=64, stream=SMALL)
    per_epoch = -(-len(whole) // 64)
    assert len(trained_on) == 2 * per_epoch
    assert {len(rows) for rows in trained_on[: per_epoch - 1]} == {64}
    epochs = [torch.cat(trained_on[:per_epoch]), torch.cat(trained_on[per_epoch:])]
    for rows in epochs:
        torch.testing.assert_close(in_order(rows), in_order(whole), rtol=1e-4, atol=1e-4)
    assert not torch.equal(*epochs)
    assert len(history["loss"]) == 2
    assert explainer.is_fitted


def test_rows_are_mixed_over_texts(
    bridge: TransformerBridge, texts: list[str], trained_on: list[Tensor]
) -> None:
    """A batch of 64 rows holds rows of far more texts than the three or four that would fill it."""
    lengths = [len(rows_of(bridge, [text])) for text in texts]
    where = torch.repeat_interleave(torch.arange(48), torch.tensor(lengths))
    rows = torch.cat([torch.full((n, 1), float(i)) for i, n in enumerate(lengths)])
    wide = torch.cat([rows, torch.randn(len(rows), 127)], dim=1)
    pieces = [wide[where == i] for i in range(48)]
    sae(bridge).fit(
        iter(pieces),
        nb_epochs=1,
        batch_size=64,
        stream=Streaming(buffer=600, rows=len(wide)),
    )
    mixed = [len(batch[:, 0].unique()) for batch in trained_on[:5]]
    assert min(mixed) >= 10


def test_nothing_is_kept_whole(
    bridge: TransformerBridge, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model reads a few texts at a time, and the buffer holds its size and what came last."""
    read: list[int] = []
    held: list[int] = []
    get, add = ModelWithSplitPoints.get_activations, ShuffleBuffer.add

    def counted(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(len(inputs))
        return get(self, inputs, *args, **kwargs)

    def sized(self: ShuffleBuffer, rows: Any) -> None:
        add(self, rows)
        held.append(self.n)

    monkeypatch.setattr(ModelWithSplitPoints, "get_activations", counted)
    monkeypatch.setattr(ShuffleBuffer, "add", sized)
    sae(bridge).fit(
        iter(texts),
        nb_epochs=1,
        batch_size=64,
        stream=Streaming(buffer=300, texts_per_batch=1, rows=10**6),
    )
    assert sum(read) == len(texts)
    assert max(read) == 16
    longest = max(len(rows_of(bridge, texts[i : i + 16])) for i in range(0, len(texts), 16))
    assert max(held) < 300 + longest


def test_several_places_in_one_pass(bridge: TransformerBridge, texts: list[str]) -> None:
    """Three explainers at two places learn what each learns alone, and the model runs once for all."""
    places = [
        (POINT, TopKSAEConcepts),
        ("blocks.2.hook_mlp_out", BatchTopKSAEConcepts),
        (POINT, VanillaSAEConcepts),
    ]
    options: dict[str, Any] = {"nb_epochs": 2, "batch_size": 64, "stream": SMALL, "seed": 3}
    alone = [sae(bridge, *place) for place in places]
    histories = [own.fit(texts, **options) for own in alone]
    together = [sae(bridge, *place) for place in places]
    runs: list[int] = []
    with bridge.hooks([("blocks.0.hook_in", lambda x, hook: runs.append(len(x)))]):
        found = fit_together(together, texts, **options)
    assert sum(runs) == 2 * len(texts)
    assert found == histories
    for one, other in zip(alone, together, strict=True):
        for name, x in weights(one).items():
            assert torch.equal(x, weights(other)[name]), name


class StoppedError(Exception):
    """Ends a fit in its middle."""


@pytest.mark.parametrize("at", [2, 11, 24])
@pytest.mark.parametrize("one_way", [False, True])
def test_resuming_is_bit_for_bit(
    bridge: TransformerBridge,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    one_way: bool,
) -> None:
    """Broken off in the first buffer, in the middle, in the second epoch: the rest is as if nothing had been."""
    options: dict[str, Any] = {
        "nb_epochs": 1 if one_way else 2,
        "batch_size": 64,
        "stream": Streaming(buffer=400, texts_per_batch=1, rows=1200, checkpoint_every=2),
        "checkpoint": tmp_path / "state",
        "monitoring": 1,
    }
    given = lambda: iter(texts) if one_way else texts  # noqa: E731
    whole = sae(bridge)
    expected = whole.fit(given(), **options)
    if one_way and at >= len(expected["step_loss"]):
        at = len(expected["step_loss"]) - 2
    (tmp_path / "state").unlink()
    broken = sae(bridge)
    train = Trainer.train

    def breaks(self: Trainer, rows: Tensor) -> None:
        if self.step == at:
            raise StoppedError
        train(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", breaks)
        with pytest.raises(StoppedError):
            broken.fit(given(), **options)
    assert not broken.is_fitted
    assert (tmp_path / "state").exists() == (at > 2)
    assert broken.fit(given(), resume=True, **options) == expected
    for name, x in weights(whole).items():
        assert torch.equal(x, weights(broken)[name]), name


def test_a_checkpoint_of_other_texts_is_refused(
    bridge: TransformerBridge, texts: list[str], tmp_path: Path
) -> None:
    """The file says what it is of."""
    options: dict[str, Any] = {"nb_epochs": 1, "checkpoint": tmp_path / "state", "stream": SMALL}
    sae(bridge).fit(texts[:20], **options)
    other = sae(bridge)
    with pytest.raises(InputError, match="another fit: its source"):
        other.fit([*texts[1:20], "x"], resume=True, **options)
    with pytest.raises(InputError, match="another fit: its buffer is 600"):
        other.fit(texts[:20], resume=True, **{**options, "stream": Streaming(buffer=601)})
    assert not other.is_fitted


def test_rows_of_any_iterable(bridge: TransformerBridge, texts: list[str]) -> None:
    """Pieces of rows by hook point, under any of its names, train as the tensor they are made of."""

    class Store:
        """Rows on disk, say."""

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from ({"blocks.1.hook_out": part} for part in whole.split(100))

    whole = rows_of(bridge, texts)
    options: dict[str, Any] = {"nb_epochs": 6, "batch_size": 64, "lr": 3e-3}
    streamed, at_once = sae(bridge), sae(bridge)
    streamed.fit(Store(), stream=Streaming(buffer=500, rows=len(whole)), **options)
    at_once.fit(whole, **options)
    found = [
        explained_variance(whole, own.decode_concepts(own.encode_activations(whole)))
        for own in (streamed, at_once)
    ]
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_a_store_on_disk(bridge: TransformerBridge, texts: list[str], tmp_path: Path) -> None:
    """What was extracted once trains as texts do: each of its rows once an epoch, at several places."""
    points = ["blocks.1.hook_out", "blocks.0.attn.hook_z"]
    store = extract_to(tmp_path / "store", bridge, texts, points, batch_size=16)
    both = [sae(bridge, point) for point in points]
    options: dict[str, Any] = {"nb_epochs": 2, "batch_size": 64}
    seen: dict[int, list[Tensor]] = {}
    train = Trainer.train

    def spy(self: Trainer, rows: Tensor) -> None:
        seen.setdefault(id(self), []).append(rows.clone())
        train(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", spy)
        found = fit_together(both, store, stream=SMALL, **options)
    assert [len(history["loss"]) for history in found] == [2, 2]
    for point, batches in zip(points, seen.values(), strict=True):
        whole = store[point][:].flatten(1)
        own, times = torch.cat(batches).unique(dim=0, return_counts=True)
        expected, each = whole.unique(dim=0, return_counts=True)
        assert torch.equal(own, expected)
        assert torch.equal(times, 2 * each)


def test_an_epoch_may_have_fewer_rows(
    bridge: TransformerBridge, texts: list[str], trained_on: list[Tensor]
) -> None:
    """``rows`` ends an epoch to the row."""
    sae(bridge).fit(texts, nb_epochs=2, batch_size=64, stream=Streaming(buffer=300, rows=777))
    assert sum(map(len, trained_on)) == 2 * 777


def test_progress_says_how_it_goes(
    bridge: TransformerBridge, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss, codes a row, explained variance and dead share, of each explainer."""
    both = [sae(bridge), sae(bridge, "blocks.0.hook_out")]
    fit_together(both, texts[:30], nb_epochs=1, batch_size=64, progress=True, stream=SMALL)
    said = capsys.readouterr().err
    for word in ("0:loss=", "0:l0=4", "1:explained_variance=", "1:dead="):
        assert word in said


def test_what_cannot_be_learnt_from(bridge: TransformerBridge, texts: list[str]) -> None:
    """Each is refused with what to do, and nothing has changed."""
    explainer = sae(bridge)
    wide = torch.zeros(4, 7)
    bad = torch.full((4, 128), float("nan"))
    for given, options, said in [
        (iter(texts), {"nb_epochs": 2}, "can be gone through once"),
        (iter(texts), {"nb_epochs": 1, "stream": SMALL}, r"Streaming\(rows=\.\.\.\)"),
        ([], {}, "nothing to learn from|no activations"),
        (3, {}, "got int"),
        ([{"text": "a"}, {"text": "b"}], {}, "text"),
        ([3, 4], {}, "iterable of int"),
        (iter([wide]), {"nb_epochs": 1}, "7 wide"),
        (iter([bad]), {"nb_epochs": 1}, "NaN"),
        (iter([{"blocks.0.hook_out": torch.randn(4, 128)}]), {"nb_epochs": 1}, "no rows for"),
        (torch.randn(9, 128), {"stream": SMALL}, "all here"),
    ]:
        with pytest.raises((InputError, KeyError), match=said):
            explainer.fit(given, **options)
        assert not explainer.is_fitted
    explainer.fit(texts[:20], nb_epochs=1)
    before = weights(explainer)
    with pytest.raises(InputError, match="overwrite=True"):
        explainer.fit(texts)
    with pytest.raises(InputError, match="overwrite=True"):
        fit_together([sae(bridge), explainer], texts)
    for name, x in weights(explainer).items():
        assert torch.equal(x, before[name])
    with pytest.raises(InputError, match="several models"):
        fit_together([sae(bridge), sae(TransformerBridge.boot_transformers(demo.path()))], texts)
    with pytest.raises(InputError, match="twice"):
        fit_together([explainer, explainer], texts, overwrite=True)
    with pytest.raises(InputError, match="list of explainers"):
        fit_together([], texts)
    for wrong in (0, True):
        with pytest.raises(InputError, match="buffer is at least 1"):
            Streaming(buffer=wrong)


def test_the_buffer_gives_every_row_once() -> None:
    """Whatever the sizes; places stay together."""
    draw = torch.Generator().manual_seed(0)
    for capacity, batch, pieces in [(10, 3, [4, 4, 25, 1, 1]), (1, 1, [1, 1]), (100, 7, [5, 6])]:
        buffer, at, left = ShuffleBuffer(capacity, draw), 0, []
        for size in pieces:
            rows = torch.arange(at, at + size)[:, None].float()
            at += size
            buffer.add({"a": rows, "b": -rows})
            if buffer.is_full:
                left += list(buffer.draw(batch))
        left += list(buffer.draw(batch, all_of_it=True))
        for item in left:
            assert torch.equal(item["a"], -item["b"])
        assert sorted(torch.cat([item["a"] for item in left])[:, 0].tolist()) == list(range(at))
        assert buffer.n == 0


@pytest.mark.sweep
def test_texts_train_as_well_as_rows(bridge: TransformerBridge) -> None:
    """The middle layer from texts, held out: nine tenths of the variance with 32 codes a row."""
    texts = list(itertools.islice(documents(0), 1000))
    explainer = TopKSAEConcepts(bridge, nb_concepts=512, split_point=1)
    stream = Streaming(buffer=16_384, texts_per_batch=64)
    history = explainer.fit(texts[:900], lr=3e-3, batch_size=512, nb_epochs=8, stream=stream)
    held_out = rows_of(bridge, texts[900:], "blocks.1.hook_out")
    codes = explainer.encode_activations(held_out)
    assert explained_variance(held_out, explainer.decode_concepts(codes)) >= 0.9
    assert float((codes > 0).sum(1).double().mean()) <= 32
    assert history["dead"][-1] < 0.1
