"""Ranks: several processes that share one extraction, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ...bridge import TransformerBridge, needs_all
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
        together: Whether every batch needs all of them, because they hold the model together; one writes.
    """

    rank: int = 0
    world: int = 1
    state: Any = None
    together: bool = False

    @property
    def writes(self) -> bool:
        """Whether this process writes what it has run."""
        return self.rank == 0 or not self.together

    def mine(self, number: int) -> bool:
        """Whether a batch is this process's to run."""
        return self.together or number % self.world == self.rank

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def current_ranks(bridge: TransformerBridge) -> Ranks:
    """The processes that this one was started with: itself alone, unless ``torchrun`` or a group says else.

    Args:
        bridge: The model. Where it is on the CPU, processes talk through gloo.
    Raises:
        InputError: The environment speaks of more processes than found each other.
    """
    told = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if told == 1 and not joined:
        return Ranks()
    from accelerate import PartialState

    on_cpu = bridge.device is None or bridge.device.type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    if state.num_processes < told:
        raise InputError(
            f"WORLD_SIZE is {told}, but only {state.num_processes} found each other; start them with "
            "torchrun (accelerate launch --cpu starts one)"
        )
    together = needs_all(bridge.unwrapped_model)
    return Ranks(state.process_index, state.num_processes, state, together)


def home_of_rank() -> torch.device:
    """Where a process runs its model unless told: a GPU of its own where there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0
