"""Streaming: a generation in a thread of its own that runs only while somebody waits for the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor


class _Abandoned(BaseException):
    """Nobody waits any more; unwinds the generation like an interrupt."""


class _Turns:
    """What transformers calls a streamer; hands over each token and waits to be asked for the next."""

    def __init__(self) -> None:
        self.asked = Semaphore(0)
        self.told = Semaphore(0)
        self.item: Tensor | None = None
        self.error: BaseException | None = None
        self.is_abandoned = False

    def put(self, value: Tensor) -> None:
        """Called by the loop with the prompt [batch, pos], then with each step's tokens [batch]."""
        self.item = value if value.dim() == 2 else value[:, None]
        self._hand_over()
        if self.is_abandoned:
            raise _Abandoned

    def end(self) -> None:
        """Called by the loop when it is done."""

    def _hand_over(self) -> None:
        self.told.release()
        self.asked.acquire()

    def work(self, run: Callable[[_Turns], Any], is_inference: bool, is_grad: bool) -> None:
        """The thread: modes of torch belong to a thread, so those of the caller are set here too."""
        self.asked.acquire()
        try:
            with torch.inference_mode(is_inference), torch.set_grad_enabled(is_grad):
                run(self)
        except _Abandoned:
            self.item = None
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self.error = error
        self.item = None
        self.told.release()

    def next(self) -> Tensor | None:
        """Wait for the next tokens; None when there are no more."""
        self.asked.release()
        self.told.acquire()
        if self.error is not None:
            raise self.error
        return self.item


def in_turns(run: Callable[[Any], Any], at_once: int, skip_prompt: bool) -> Iterator[Tensor]:
    """Run a generation step by step.

    Args:
        run: Generates, given a streamer.
        at_once: How many tokens to wait for.
        skip_prompt: Leave out the prompt.
    Yields:
        Token ids, [batch, pos]; the first with the prompt in front.
    """
    turns = _Turns()
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    thread = Thread(target=turns.work, args=(run, *modes), daemon=True)
    thread.start()
    is_over = False
    try:
        held: list[Tensor] = []
        prompt = turns.next()
        is_over = prompt is None
        if prompt is not None and not skip_prompt:
            held.append(prompt)
        n = 0
        while not is_over:
            item = turns.next()
            if item is None:
                is_over = True
                break
            held.append(item)
            n += 1
            if n == at_once:
                yield torch.cat(held, dim=1)
                held, n = [], 0
        if held:
            yield torch.cat(held, dim=1)
    except BaseException:
        is_over = is_over or turns.error is not None
        raise
    finally:
        if not is_over:
            turns.is_abandoned = True
            turns.asked.release()
        thread.join()


def pieces_of_text(
    steps: Iterator[Tensor], to_text: Callable[[Tensor], list[str]], *, as_list: bool
) -> Iterator[Any]:
    """The text of each piece, so that the pieces join to the text of all.

    Args:
        steps: Token ids, piece by piece.
        to_text: Text of ids, [batch, pos].
        as_list: Give lists also where there is one row.
    """
    ids: Tensor | None = None
    said: list[str] = []
    for new in steps:
        ids = new if ids is None else torch.cat([ids, new], dim=1)
        texts = to_text(ids)
        said = said or [""] * len(texts)
        # Half a character decodes to a replacement mark; it is said when it is whole.
        whole = [
            old if text.endswith("\ufffd") else text for text, old in zip(texts, said, strict=True)
        ]
        if whole != said:
            yield _pieces(whole, said, as_list)
        said = whole
    if ids is not None and (texts := to_text(ids)) != said:
        yield _pieces(texts, said, as_list)


def _pieces(texts: list[str], said: list[str], as_list: bool) -> Any:
    pieces = [text[len(old) :] for text, old in zip(texts, said, strict=True)]
    return pieces if as_list or len(pieces) > 1 else pieces[0]
