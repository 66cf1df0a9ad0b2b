"""Step and Clock: which indices of a tensor are which positions of a text, and whose step is whose."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lensbridge.hooks import Clock, InputError, LensError, Step

PROMPT = Step(0, "prefill", 0, 5, 5)
CHUNK = Step(0, "prefill", 3, 5, 8)  # the prompt read in pieces
THIRD = Step(3, "decode", 7, 8, 5)
AGAIN = Step(2, "decode", 0, 7, 5)  # the whole text read again, without keys and values kept
GUESSES = Step(2, "decode", 4, 8, 5)  # from the last token of the prompt on
BEHIND = Step(0, "prefill", 2, 5, 5)  # after a past of two
IMAGE = Step(0, "encode", 0, None, None)


@pytest.mark.parametrize(
    ("step", "prompt", "generated"),
    [
        (PROMPT, [0, 1, 2, 3, 4], []),
        (CHUNK, [3, 4], []),
        (THIRD, [], [7]),
        (AGAIN, [0, 1, 2, 3, 4], [5, 6]),
        (GUESSES, [4], [5, 6, 7]),
        (BEHIND, [2, 3, 4], []),
    ],
)
def test_prompt_and_generated(step: Step, prompt: list[int], generated: list[int]) -> None:
    """Both index a tensor whose entries are the positions of the pass, and share them out."""
    tensor = torch.tensor(list(step.positions))
    assert tensor[step.prompt].tolist() == prompt
    assert tensor[step.generated].tolist() == generated
    assert step.positions == range(step.start, step.stop or 0)


@pytest.mark.parametrize("step", [PROMPT, CHUNK, THIRD, AGAIN, GUESSES, BEHIND])
def test_at(step: Step) -> None:
    """at() finds each position that comes by, in the order asked for, and leaves out the others."""
    tensor = torch.tensor(list(step.positions))
    wanted = [7, 0, 4, 3, 20]
    here = [position for position in wanted if step.start <= position < (step.stop or 0)]
    assert tensor[step.at(*wanted)].tolist() == here
    assert step.at() == []


def test_at_writes_through_an_index() -> None:
    """Indices, not a mask: assigning through them changes those positions and no other; none, none."""
    x = torch.zeros(2, 4)
    x[:, GUESSES.at(5, 7)] = 1
    assert x.tolist() == [[0, 1, 0, 1]] * 2
    x[:, GUESSES.at(0)] = 5
    assert x.tolist() == [[0, 1, 0, 1]] * 2


@pytest.mark.parametrize("positions", [(-1,), (2, -3)])
def test_negative_positions_are_refused(positions: tuple[int, ...]) -> None:
    """The end is not known while the text is written; the message says what to use instead."""
    with pytest.raises(InputError, match=r"position -\d .*prompt_length - 1"):
        PROMPT.at(*positions)


@pytest.mark.parametrize(
    "ask",
    [
        lambda step: step.positions,
        lambda step: step.prompt,
        lambda step: step.generated,
        lambda step: step.at(0),
    ],
)
def test_unknown_positions(ask: Any) -> None:
    """Images and sound have no positions of a text; asking for them says so."""
    assert (IMAGE.start, IMAGE.stop) == (0, None)
    with pytest.raises(LensError, match="another tower"):
        ask(IMAGE)


def test_phases() -> None:
    """The prompt is read in prefill, what was generated in decode, an encoder is in neither."""
    assert [(s.is_prefill, s.is_decode) for s in (PROMPT, THIRD, IMAGE)] == [
        (True, False),
        (False, True),
        (False, False),
    ]


def test_a_step_is_a_fact() -> None:
    """A hook cannot change it for the hooks after it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROMPT.number = 4  # type: ignore[misc]


class TestClock:
    def test_before_any_run(self) -> None:
        """No step, and the error names the point and the runs that have one."""
        with pytest.raises(LensError, match=r"'blocks\.0\.hook_out' has no step.*bridge\.generate"):
            Clock().of("blocks.0.hook_out")

    def test_of_a_name(self) -> None:
        """Points of other towers have their own step, found by a part of the name; the rest the main one."""
        clock = Clock()
        clock.tell(THIRD, {"encoder_": PROMPT, ".cross_attn.k.": PROMPT, "vision_": IMAGE})
        assert clock.of("decoder_blocks.0.hook_out") is THIRD
        assert clock.of("decoder_blocks.0.cross_attn.q.hook_out") is THIRD
        assert clock.of("encoder_blocks.0.hook_out") is PROMPT
        assert clock.of("decoder_blocks.0.cross_attn.k.hook_out") is PROMPT
        assert clock.of("vision_embed.hook_out") is IMAGE

    def test_the_next_pass_and_the_end(self) -> None:
        """What is told replaces what was told before, others included; None ends it."""
        clock = Clock()
        clock.tell(PROMPT, {"encoder_": IMAGE})
        clock.tell(THIRD, {})
        assert clock.of("encoder_blocks.0.hook_out") is THIRD
        clock.tell(None, {})
        with pytest.raises(LensError):
            clock.of("blocks.0.hook_out")
