"""What a model and its process look like from outside: two equal snapshots mean that nothing was left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import _len_torch_function_stack

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Modules, classes, forwards, hooks, configuration, parameters, buffers, and torch's function modes."""
    modules = dict(model.named_modules())
    config: Any = model.config
    return {
        "modules": {path: id(module) for path, module in modules.items()},
        "classes": {path: module.__class__ for path, module in modules.items()},
        "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
        "forward": {path: vars(module).get("forward") for path, module in modules.items()},
        "hooks": {
            (path, kind): list(getattr(module, kind))
            for path, module in modules.items()
            for kind in HOOKS
        },
        "training": {path: module.training for path, module in modules.items()},
        "config": config.to_dict(),
        "attention": config._attn_implementation,
        "parameters": {
            name: (p.data_ptr(), p.requires_grad, p.grad is None, p._version)
            for name, p in model.named_parameters()
        },
        "tensor hooks": [name for name, p in model.named_parameters() if p._backward_hooks],
        "buffers": {name: (b.data_ptr(), b._version) for name, b in model.named_buffers()},
        "values": {
            name: t.detach().double().sum().item() for name, t in model.state_dict().items()
        },
        "function modes": _len_torch_function_stack(),
        "global hooks": [
            list(getattr(nn.modules.module, f"_global_{kind}"))
            for kind in (
                "forward_hooks",
                "forward_pre_hooks",
                "backward_hooks",
                "backward_pre_hooks",
            )
        ],
        "stance": torch._dynamo.eval_frame._stance.stance,
        "grad mode": torch.is_grad_enabled(),
    }


def is_silent(bridge: Any) -> bool:
    """No listener anywhere, no scope open."""
    points = bridge.registry.values()
    return not any(point.fwd or point.bwd for point in points) and not bridge.registry.scopes
