"""JumpReLU and the step function, with pseudo-gradients for their thresholds.

Rajamanoharan et al., "Jumping Ahead", arXiv 2407.14435. The derivative of a step by its threshold is minus
the density of the input there; what stands in for it is minus a kernel that integrates to one, so that its
mean over a batch estimates the density.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Density around zero: of distances to the threshold and the bandwidth."""


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, threshold: Tensor, kernel: Kernel, bandwidth: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, threshold, bandwidth)
        ctx.kernel = kernel
        return torch.where(x > threshold, x, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, threshold, bandwidth = ctx.saved_tensors
        by_threshold = -threshold * ctx.kernel(x - threshold, bandwidth) * grad
        return torch.where(x > threshold, grad, 0), by_threshold, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, threshold: Tensor, kernel: Kernel, bandwidth: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, threshold, bandwidth)
        ctx.kernel = kernel
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, threshold, bandwidth = ctx.saved_tensors
        return None, -ctx.kernel(x - threshold, bandwidth) * grad, None, None


def jump_relu(x: Tensor, threshold: Tensor, kernel: Kernel, bandwidth: Tensor) -> Tensor:
    """``x`` where it is above a threshold of at least 0, and 0 elsewhere.

    Args:
        x: Pre-codes.
        threshold: Of each of them, of the same shape or one that broadcasts.
        kernel: Integrates to one.
        bandwidth: Of the kernel.
    """
    return _Jump.apply(x, threshold.expand_as(x), kernel, bandwidth)


def heaviside(x: Tensor, threshold: Tensor, kernel: Kernel, bandwidth: Tensor) -> Tensor:
    """1 where ``x`` is above the threshold, else 0; only the threshold gets a gradient. See `jump_relu`."""
    return _Step.apply(x, threshold.expand_as(x), kernel, bandwidth)
