"""Ranks: several processes that share one extraction, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ...hooks import InputError

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: a dead one is torchrun's to notice, a slow one is none of ours."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: Which.
        world: How many there are. Batch k of the dataset is that of process k modulo this.
        state: accelerate's; None for one process.
    """

    rank: int = 0
    world: int = 1
    state: Any = None

    def mine(self, number: int) -> bool:
        """Whether a batch is this process's to run."""
        return number % self.world == self.rank

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def current_ranks(device: torch.device | None = None) -> Ranks:
    """The processes that this one was started with: itself alone, unless ``torchrun`` or a group says else.

    Args:
        device: Where the model is: processes on CPUs talk through gloo.
    Raises:
        InputError: The environment speaks of more processes than found each other.
    """
    told = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if told == 1 and not joined:
        return Ranks()
    from accelerate import PartialState

    on_cpu = device is None or device.type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    if state.num_processes < told:
        raise InputError(
            f"WORLD_SIZE is {told}, but only {state.num_processes} found each other; start them with "
            "torchrun (accelerate launch --cpu starts one)"
        )
    return Ranks(state.process_index, state.num_processes, state)


def home_of_rank() -> torch.device:
    """Where a process runs its model unless told: a GPU of its own where there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0
