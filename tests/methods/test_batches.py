"""Batches: which texts run together, how they are padded, where their rows are taken from and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import Aggregation, HookPoint, InputError
from lensbridge.methods.batches import Batch, Rows, cut
from lensbridge.methods.granularity import Groups
from lensbridge.methods.samples import Sample

SAMPLES = [
    Sample((5, 6, 7, 8), (False,) * 4),
    Sample((9,), (False,), types=(1,)),
    Sample((3, 4, 5), (True, False, False)),
]
GROUPS: dict[str, list[list[list[int]]]] = {
    "tokens": [[[0], [1], [2], [3]], [[0]], [[1], [2]]],
    "words": [[[0, 1, 2], [3]], [[0]], [[1, 2]]],
    "none": [[], [], []],
}
ROWS = torch.tensor([[1.0, -5.0], [3.0, 2.0], [-4.0, 1.0]])
MADE = {
    Aggregation.MEAN: [0.0, -2 / 3],
    Aggregation.SUM: [0.0, -2.0],
    Aggregation.MAX: [3.0, 2.0],
    Aggregation.MIN: [-4.0, -5.0],
    Aggregation.SIGNED_MAX: [-4.0, -5.0],
}


def batch_of(
    groups: str = "tokens", how: Aggregation = Aggregation.MEAN, in_front: bool = False
) -> Batch:
    flat = [Groups([i for row in rows for i in row], [*map(len, rows)]) for rows in GROUPS[groups]]
    return Batch([4, 0, 2], SAMPLES, flat, how, pad_id=7, in_front=in_front)


@pytest.fixture
def states() -> Tensor:
    """What a point shows of the batch, [3, 4, 2], every value another."""
    return torch.arange(24.0).view(3, 4, 2)


def test_padding_by_hand() -> None:
    """Ids, mask and types on either side; a text without types is of the first part."""
    behind, front = batch_of(), batch_of(in_front=True)
    assert behind.ids.tolist() == [[5, 6, 7, 8], [9, 7, 7, 7], [3, 4, 5, 7]]
    assert behind.mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert behind.types.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert front.ids.tolist() == [[5, 6, 7, 8], [7, 7, 7, 9], [7, 3, 4, 5]]
    assert front.mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]]
    assert (behind.firsts, front.firsts) == ([0, 0, 0], [0, 3, 1])
    assert behind.counts == front.counts == [4, 1, 2]


def test_what_the_model_is_told() -> None:
    """A mask where there is padding, types where there are any, nothing of what says nothing."""
    assert set(batch_of().inputs()) == {"attention_mask", "token_type_ids"}
    whole = Batch([0], SAMPLES[:1], [Groups([], [])], Aggregation.MEAN, pad_id=0, in_front=False)
    assert whole.inputs() == {}


@pytest.mark.parametrize(
    ("in_front", "expected"),
    [
        (False, [0, 2, 4, 6, 8, 18, 20]),
        (True, [0, 2, 4, 6, 14, 20, 22]),
    ],
)
def test_rows_of_tokens_by_hand(states: Tensor, in_front: bool, expected: list[int]) -> None:
    """Each row is what stands at its token: its first features, counted off."""
    rows = batch_of(in_front=in_front).rows(states)
    assert rows[:, 0].tolist() == expected
    states.zero_()
    assert rows[:, 0].tolist() == expected


@pytest.mark.parametrize("how", Aggregation)
def test_rows_of_words_by_hand(states: Tensor, how: Aggregation) -> None:
    """Several tokens make the row computed by hand, single ones stay as they are."""
    states[0, :3] = ROWS
    rows = batch_of("words", how).rows(states)
    torch.testing.assert_close(rows[0], torch.tensor(MADE[how]), atol=1e-6, rtol=0)
    assert torch.equal(rows[1:3], torch.stack([states[0, 3], states[1, 0]]))


@pytest.mark.parametrize("how", Aggregation)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("in_front", [False, True])
def test_what_is_put_back_is_taken_again(
    states: Tensor, groups: str, how: Aggregation, in_front: bool
) -> None:
    """New rows stand where rows were taken; padding and tokens of no row keep what they had."""
    batch = batch_of(groups, how, in_front)
    new = torch.randn(sum(batch.counts), 2, generator=torch.Generator().manual_seed(0))
    changed = batch.put_back(new, states)
    torch.testing.assert_close(batch.rows(changed), new)
    own = batch.rows(states)
    if groups != "words":
        assert torch.equal(batch.put_back(own, states), states)
    taken = [
        (text, first + token)
        for text, (first, rows) in enumerate(zip(batch.firsts, GROUPS[groups], strict=True))
        for row in rows
        for token in row
    ]
    for text in range(3):
        for column in range(4):
            same = torch.equal(changed[text, column], states[text, column])
            assert same == ((text, column) not in taken)
    if groups == "words":
        share = 3 if how is Aggregation.SUM else 1
        for column in range(3):
            torch.testing.assert_close(changed[0, batch.firsts[0] + column], new[0] / share)


def test_texts_of_like_length() -> None:
    """The longest first, in their order where they are as long; one length at a time where nobody pads."""
    samples = [Sample((1,) * n, (False,) * n) for n in (2, 5, 2, 3, 5, 2)]
    assert cut(samples, 2) == [[1, 4], [3, 0], [2, 5]]
    assert cut(samples, 4) == [[1, 4, 3, 0], [2, 5]]
    assert cut(samples, 2, pads=False) == [[1, 4], [3], [0, 2], [5]]


@pytest.mark.parametrize("flatten", [False, True])
def test_rows_come_in_any_order(flatten: bool) -> None:
    """They stand in the order of the texts, and share no memory with what they came in."""
    rows = Rows([2, 0, 1], flatten)
    came = torch.tensor([[9.0, 9.0]])
    rows.put([2, 1], came)
    rows.put([0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    came.zero_()
    found: Any = rows.result()
    if flatten:
        assert found.tolist() == [[1, 2], [3, 4], [9, 9]]
    else:
        assert [x.tolist() for x in found] == [[[1, 2], [3, 4]], [], [[9, 9]]]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 4), "batch pos"),
        ((3, 2), "..."),
        ((3, 5, 2), "..."),
        ((2, 4, 2), "..."),
        ((4, 3, 2), "..."),
        ((3, 4, 4, 4), "batch head query key"),
        ((3, 4, 6), "stream batch pos d_model"),
    ],
)
def test_what_shows_no_row_a_token(shape: tuple[int, ...], axes: str) -> None:
    """Refused, whether its axes or its sizes say so, with the place, its shape and what was run."""
    point = HookPoint("raw:some.place", axes=axes)
    with pytest.raises(InputError, match=r"'some.place' shows \[.*3 x 4 tokens"):
        batch_of().states(torch.zeros(shape), point)


def test_what_shows_more_of_a_token() -> None:
    """Heads are put side by side; what is shown once for all texts is each one's."""
    point = HookPoint("blocks.0.attn.hook_z", axes="batch pos head d_head")
    shown = torch.arange(72.0).view(3, 4, 2, 3)
    assert torch.equal(batch_of().states(shown, point), shown.view(3, 4, 6))
    assert torch.equal(batch_of().states(shown[:1], point)[2], shown[0].view(4, 6))
