"""Hook points, taps and their registry: knows torch, has never heard of transformers."""

from .capture import (
    module_gradients,
    module_kwargs,
    node_gradients,
    on_node,
    tensor_gradients,
)
from .errors import (
    AbsentPointError,
    ArchitectureError,
    GradientError,
    HookNotFiredError,
    HookValueError,
    InputError,
    LayerRangeError,
    LensError,
    NotFittedError,
    PointError,
    SelectionError,
    UnknownPointError,
)
from .names import act_name
from .point import HookFunction, HookPoint, Listener
from .registry import HookRegistry
from .scope import HookScope
from .span import Span
from .splice import Splice
from .step import Clock, Step
from .tap import Action, Call, Site, Tap, Unsettled, watch

__all__ = [
    "AbsentPointError",
    "Action",
    "ArchitectureError",
    "Call",
    "Clock",
    "GradientError",
    "HookFunction",
    "HookNotFiredError",
    "HookPoint",
    "HookRegistry",
    "HookScope",
    "HookValueError",
    "InputError",
    "LayerRangeError",
    "LensError",
    "Listener",
    "NotFittedError",
    "PointError",
    "SelectionError",
    "Site",
    "Span",
    "Splice",
    "Step",
    "Tap",
    "UnknownPointError",
    "Unsettled",
    "act_name",
    "module_gradients",
    "module_kwargs",
    "node_gradients",
    "on_node",
    "tensor_gradients",
    "watch",
]
