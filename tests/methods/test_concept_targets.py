"""Concept gradients: which outputs are differentiated, and what is no target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lensbridge import InputError, ModelWithSplitPoints, SplitterForGeneration

TEXTS = ["words", "ab", "some, not so long"]
RAW = {"concepts_x_gradients": False, "normalization": False}
CLOSE = 1e-5


@pytest.fixture(scope="module")
def splitter(tiny: Any, tokenizer: Any) -> SplitterForGeneration:
    """A GPT-2 split behind its first layer; no test here changes it."""
    return SplitterForGeneration(tiny("gpt2"), 0, tokenizer=tokenizer, batch_size=3)


@pytest.fixture(scope="module")
def of(splitter: Any) -> Any:
    """``of(TEXTS, targets=[0])``: gradients by the first seven features, neither multiplied nor normalised."""

    def gradients(inputs: Any, **options: Any) -> list[Tensor]:
        keep = torch.nn.functional.pad
        return splitter.concept_output_gradient(
            inputs, lambda a: a[:, :7], lambda c: keep(c, (0, 57)), **{**RAW, **options}
        )

    return gradients


@pytest.fixture(scope="module")
def whole(of: Any) -> list[Tensor]:
    """The gradients of all positions."""
    return of(TEXTS)


def test_all_targets_unless_given(whole: list[Tensor]) -> None:
    """Every position of a text, a row for each of its tokens; padding is neither."""
    assert [tuple(found.shape) for found in whole] == [(5, 5, 7), (2, 2, 7), (17, 17, 7)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (1, [[1], [1], [1]]),
        ([0, 1], [[0, 1]] * 3),
        ([-1], [[4], [1], [16]]),
        ([1, -2, 1], [[1, 3, 1], [1, 0, 1], [1, 15, 1]]),
        ([[3, 0], [1], [16, -17, 2]], [[3, 0], [1], [16, 0, 2]]),
        ([[0], 1, [5, 6]], [[0], [1], [5, 6]]),
        ([[4], [], [0]], [[4], [], [0]]),
        (torch.tensor([1, 0]), [[1, 0]] * 3),
        (torch.tensor([[1], [0], [9]]), [[1], [0], [9]]),
        (torch.tensor(1), [[1]] * 3),
        (range(2), [[0, 1]] * 3),
        (np.array([0, 1]), [[0, 1]] * 3),
        (np.int64(1), [[1]] * 3),
        ([np.int32(1), 0], [[1, 0]] * 3),
        ([np.array([0]), torch.tensor([1]), [np.int8(2)]], [[0], [1], [2]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["last", "cls_index"])
def test_targets(
    of: Any,
    whole: list[Tensor],
    plain: Any,
    splitter: Any,
    targets: Any,
    expected: list[list[int]],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions of the text itself, common or by text, in the order given, on whichever side it is padded."""
    monkeypatch.setattr(splitter.model.config, "summary_type", kind)  # "last" has it in front
    found = of(TEXTS, targets=targets)
    for gradient, every, wanted in zip(found, whole, expected, strict=True):
        assert gradient.shape == (len(wanted), *every.shape[1:])
        if wanted:
            assert plain.gap(gradient, every[wanted]) < CLOSE


def test_classes_are_targets_of_a_classifier(new_classifier: Any, letters: Any) -> None:
    """Of a classifier targets are classes, negative ones from the last."""
    tokenizer = letters("[CLS] $A [SEP]")
    split = ModelWithSplitPoints(new_classifier(), tokenizer, 1, batch_size=2)
    every = split.concept_output_gradient(["words", "ab"], torch.clone, torch.clone, **RAW)
    some = split.concept_output_gradient(
        ["words", "ab"], torch.clone, torch.clone, [[-1], [0, 2]], **RAW
    )
    assert [tuple(found.shape) for found in every] == [(3, 5, 32), (3, 2, 32)]
    torch.testing.assert_close(some[0], every[0][[2]])
    torch.testing.assert_close(some[1], every[1][[0, 2]])
    with pytest.raises(InputError, match="target 3 is not a class: there are 3"):
        split.concept_output_gradient(["words"], torch.clone, torch.clone, 3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([2], "target 2 is not a position: there are 2"),
        ([-3], "target -3 is not a position: there are 2"),
        ([[0], [2], [0]], "target 2 is not a position"),
        ([[0], [1]], "2 lists for 3 texts"),
        ([], "targets are"),
        (True, "True"),
        ([True, False], "True"),
        ("no", "got 'no'"),
        ([0.0], r"got \[0.0\]"),
        (1.5, "got 1.5"),
        ([["a"], [0], [0]], "'a'"),
        ([[True], [0], [0]], "True"),
        ([[0.5], [0], [0]], "0.5"),
        ([None, [0], [0]], "None"),
        ([[None], [0], [0]], "None"),
        ([[[0]], [0], [0]], r"\[\[\[0\]\]"),
        ({0: 1}, "got {0: 1}"),
        (torch.tensor([0.0]), "whole numbers"),
        (torch.tensor([True]), "whole numbers"),
        (np.array([0.5]), "whole numbers"),
        (3j, "whole numbers"),
    ],
    ids=str,
)
def test_targets_that_are_not_there(of: Any, targets: Any, message: str) -> None:
    """A position outside its text, lists that are not one a text, no number: an error says which."""
    with pytest.raises(InputError, match=message):
        of(TEXTS, targets=targets)
