"""The strongest inputs of concepts, against every input looked at by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import Aggregation, Granularity, InputError, ModelWithSplitPoints
from lensbridge.demo import tasks
from lensbridge.methods.concepts.examples import (
    TEXTS_AT_ONCE,
    TopKInputs,
    label_concepts,
)

POINT = "blocks.1.hook_out"


class Explainer:
    """Codes are the positive parts of some fixed directions."""

    is_fitted = True
    split_point = POINT

    def __init__(self, splitter: ModelWithSplitPoints, concepts: int = 6) -> None:
        self.splitter = splitter
        width = next(iter(splitter.get_latent_shape().values()))[-1]
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(width, concepts, generator=generator)
        self.rows[:, -1] = 0  # never active

    def encode_activations(self, x: Tensor) -> Tensor:
        return (x @ self.rows).relu()


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    """On the embedded model."""
    from lensbridge import TransformerBridge, demo

    bridge = TransformerBridge.boot_transformers(str(demo.path()))
    return Explainer(ModelWithSplitPoints(bridge, split_points=POINT, batch_size=8))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """More than are looked at together, of unequal length."""
    items = [*tasks.capitals(), *tasks.ioi()][: TEXTS_AT_ONCE + 30]
    return [item.prompt + item.answer + "." for item in items]


def by_hand(
    explainer: Explainer, texts: list[str], granularity: Granularity, how: Aggregation
) -> list[list[tuple[float, str, int]]]:
    """Every input, text by text: by concept, sorted."""
    split = explainer.splitter
    every: list[list[tuple[float, str, int]]] = [[] for _ in range(explainer.rows.shape[1])]
    for number, text in enumerate(texts):
        rows, _ = split.get_activations([text], granularity, how)
        sample = split.samples([text], Granularity.SENTENCE)[0]
        groups = split.groups([sample], granularity)[0].rows()
        for row, tokens in zip(rows, groups, strict=True):
            piece = text[sample.spans[tokens[0]][0] : sample.spans[tokens[-1]][1]]
            for concept, value in enumerate(explainer.encode_activations(row[None])[0].tolist()):
                if value > 0:
                    every[concept].append((value, piece, number))
    return [sorted(entries, reverse=True) for entries in every]


@pytest.mark.parametrize(
    "granularity",
    [Granularity.TOKEN, Granularity.WORD, Granularity.SENTENCE, Granularity.SAMPLE],
)
def test_against_every_input(
    explainer: Explainer, texts: list[str], granularity: Granularity
) -> None:
    """The k strongest different strings, in order, with their activations; None where there are none."""
    found = TopKInputs(explainer, granularity, k=4).interpret("all", texts)
    expected = by_hand(explainer, texts, granularity, Aggregation.MEAN)
    assert list(found) == list(range(6))
    assert found[5] is None
    for concept in range(5):
        best: dict[str, float] = {}
        for value, piece, _ in expected[concept]:
            best.setdefault(piece, value)
        wanted = dict(list(best.items())[:4])
        assert found[concept] == pytest.approx(wanted, rel=1e-4)
        values = list((found[concept] or {}).values())
        assert values == sorted(values, reverse=True)


def test_where_they_stand(explainer: Explainer, texts: list[str]) -> None:
    """An example is a piece of its text; without merging, the same string comes as often as it is there."""
    found = TopKInputs(explainer, k=9, use_unique=False).examples([2, 0], texts)
    assert list(found) == [2, 0]
    expected = by_hand(explainer, texts, Granularity.TOKEN, Aggregation.MEAN)
    for concept, examples in found.items():
        values = [example.activation for example in examples]
        assert values == pytest.approx([value for value, *_ in expected[concept][:9]], rel=1e-4)
        for example in examples:
            assert example.before + example.text + example.after == texts[example.sample]
            assert example.tokens[1] == example.tokens[0] + 1


def test_what_is_there_already(explainer: Explainer, texts: list[str]) -> None:
    """Activations or codes that were computed before give the same; other numbers of rows are refused."""
    top = TopKInputs(explainer, Granularity.WORD, Aggregation.MAX, k=3)
    expected = top.interpret([1], texts)
    rows, _ = explainer.splitter.get_activations(texts, Granularity.WORD, Aggregation.MAX)
    codes = explainer.encode_activations(rows)
    for given in ({"latent_activations": rows}, {"concepts_activations": codes}):
        assert top.interpret(1, texts, **given)[1] == pytest.approx(expected[1])
    with pytest.raises(InputError, match="latent_activations has"):
        top.interpret([1], texts[:-1], latent_activations=rows)


def test_labels(explainer: Explainer, texts: list[str]) -> None:
    """Any function of the examples names a concept; one that is never active has no name."""
    names = label_concepts(
        TopKInputs(explainer, k=2), lambda examples: examples[0].text.strip(), texts, [0, 5]
    )
    strongest = TopKInputs(explainer, k=1).examples(0, texts)[0][0]
    assert names == {0: strongest.text.strip(), 5: None}


@pytest.mark.parametrize(
    ("concepts", "inputs", "message"),
    [
        ([6], ["a b"], "there are 0 to 5"),
        ("some", ["a b"], "'all'"),
        ("all", None, "a list of texts"),
        ("all", "a text", "a list of texts"),
        ("all", [], "a list of texts"),
    ],
)
def test_what_is_refused(explainer: Explainer, concepts: Any, inputs: Any, message: str) -> None:
    """Concepts that are not there, and texts that are none."""
    with pytest.raises(InputError, match=message):
        TopKInputs(explainer).interpret(concepts, inputs)


def test_options_that_cannot_be(explainer: Explainer) -> None:
    """No inputs wanted, no rows at once, nothing fitted."""
    with pytest.raises(InputError, match="k must be"):
        TopKInputs(explainer, k=0)
    with pytest.raises(InputError, match="batch_size"):
        TopKInputs(explainer, concept_encoding_batch_size=0)
    bare: Any = type("Bare", (), {"is_fitted": False})()
    with pytest.raises(InputError, match="not fitted"):
        TopKInputs(bare)
