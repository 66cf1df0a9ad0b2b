"""What of a model's weights can be rewritten without changing what it computes, and what cannot, and why.

Nothing is written here. A plan is made from one watched run (see `flow`) and a few runs in which a rewriting
is tried at the hook points (see `probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..architecture import Architecture
from ..ranks import tensor_parallel
from .facts import Facts
from .flow import Flow, flow_of
from .norms import fold_norms, norms_of
from .step import CENTER, FOLD, STEPS, UNEMBED, Step
from .stream import center_head, center_stream


def plan_steps(
    model: nn.Module,
    architecture: Architecture,
    run: Callable[[], Any],
    refused: str,
) -> tuple[dict[str, Step], Flow | None]:
    """Plan everything but the attentions.

    Args:
        model: The Hugging Face model.
        architecture: Its parts.
        run: Runs it on something small.
        refused: Why nothing can be done; empty otherwise.
    Returns:
        Steps by name, and what the run showed.
    """
    steps = {name: Step(name) for name in STEPS}
    if refused:
        for step in steps.values():
            step.left["the model"] = refused
        return steps, None
    norms = {norm.path: norm for tower in architecture.towers for _, norm, _ in norms_of(tower)}
    flow = flow_of(model, norms, architecture.unembed, run)
    facts = Facts(model, architecture, flow, run)
    for tower in facts.towers:
        fold_norms(facts, steps[FOLD], tower)
        center_stream(facts, steps[CENTER], tower)
    fronts = [name for tower in facts.towers for name, _, why in norms_of(tower) if not why]
    if not fronts:
        steps[FOLD].left["the model"] = "no norm stands between the stream and what reads it"
    center_head(facts, steps[UNEMBED])
    return steps, flow


def refusal(model: nn.Module) -> str:
    """Why no weight of a model can be rewritten; empty when some may be."""
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised; load it without quantisation"
    if tensor_parallel(model) > 1:
        return "tensor parallelism has spread its weights over processes; load it without tp_plan"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            return f"{name} is spread over processes (a DTensor); load the model whole"
        if parameter.device.type == "meta":
            return f"{name} is not loaded (offloaded, or on the meta device); load it into memory"
        if parameter.is_inference():
            return f"{name} was made under torch.inference_mode and cannot be written to"
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            return f"{name} is stored as {parameter.dtype}; load it in a floating-point dtype"
    return ""
