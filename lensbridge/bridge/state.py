"""The model's own state: parameters, state dict, device, mode. All of it is the Hugging Face model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..hooks import InputError
from .config import BridgeConfig

_Self = TypeVar("_Self", bound="ModelState")


class ModelState:
    """The part of a bridge that hands through to the model."""

    original_model: nn.Module
    cfg: BridgeConfig
    _inner: nn.Module
    _entry: nn.Module

    @property
    def unwrapped_model(self) -> nn.Module:
        """The Hugging Face model itself, also where `original_model` is a compiled one."""
        return self._inner

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The Hugging Face model's parameters."""
        return self.original_model.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The Hugging Face model's named parameters."""
        return self.original_model.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The Hugging Face model's state dict, under its own keys."""
        return self.original_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the Hugging Face model."""
        return self.original_model.load_state_dict(*args, **kwargs)

    def to(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """Move or cast the model, as ``nn.Module.to``; returns the bridge.

        Raises:
            InputError: It is spread over several devices, or partly on disk.
        """
        where: dict[str, Any] = getattr(self._inner, "hf_device_map", None) or {}
        places = sorted({str(place) for place in where.values()})
        if len(places) > 1 or any(p.device.type == "meta" for p in self._inner.parameters()):
            raise InputError(
                f"this model is spread over {', '.join(places) or 'what accelerate offloads to'} and stays "
                "there as it is: load it again with another device_map or dtype"
            )
        self.original_model.to(*args, **kwargs)
        first = next(self._inner.parameters(), None)
        if first is not None:
            self.cfg.device, self.cfg.dtype = first.device, first.dtype
        return self

    def cuda(self: _Self, device: int | torch.device | None = None) -> _Self:
        """Move the model to a CUDA device."""
        return self.to("cuda" if device is None else device)

    def cpu(self: _Self) -> _Self:
        """Move the model to the CPU."""
        return self.to("cpu")

    def eval(self: _Self) -> _Self:
        """Switch dropout and the like off."""
        self.original_model.eval()
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        """Switch dropout and the like on."""
        self.original_model.train(mode)
        return self

    def requires_grad_(self: _Self, requires_grad: bool = True) -> _Self:
        """Freeze or unfreeze every parameter."""
        self.original_model.requires_grad_(requires_grad)
        return self

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.original_model.training

    @property
    def device(self) -> torch.device | None:
        """Where the model takes its input; None when accelerate moves inputs itself."""
        first = self._entry._parameters.get("weight")
        if first is None:
            first = next(self._entry.parameters(), None)
        return None if first is None or first.device.type == "meta" else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self._inner.parameters()).dtype
