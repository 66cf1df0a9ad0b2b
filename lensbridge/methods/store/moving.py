"""Moving rows off the model's device, beside its computing where the device can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Mover:
    """Brings tensors to a device; from a GPU to the host on a stream of their own, into pinned memory.

    Args:
        device: Where to; None leaves them where they are.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = None if device is None else torch.device(device)
        self._streams: dict[torch.device, Any] = {}

    def overlaps(self, source: torch.device) -> bool:
        """Whether a tensor from there travels while its device computes on."""
        return source.type == "cuda" and self.device is not None and self.device.type == "cpu"

    def move(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Start moving a tensor that nobody else writes to.

        Returns:
            The moved tensor, and an event after which it may be read; None where it may be at once.
        """
        if self.device is None or not self.overlaps(tensor.device):
            return (tensor if self.device is None else tensor.to(self.device)), None
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            there.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        # Its memory is not given to others before the copy is done.
        tensor.record_stream(stream)
        return there, event


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, and each module in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
