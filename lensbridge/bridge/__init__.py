"""A Hugging Face model as canonical points, the runs over them, and what a run returns."""

from .architecture import Architecture
from .bridge import TransformerBridge
from .cache import ActivationCache
from .config import BridgeConfig
from .decompose import Wanted, leaving, refuse_head, refuse_sum, stream_steps
from .factored import FactoredMatrix
from .files import read_tensors, write_tensors
from .inputs import Inputs
from .ranks import needs_all
from .record import frozen
from .residual import Stream, head_factor, is_near, tolerance_of, wide
from .table import add_row
from .whole import Whole, module_of

__all__ = [
    "ActivationCache",
    "Architecture",
    "BridgeConfig",
    "FactoredMatrix",
    "Inputs",
    "Stream",
    "TransformerBridge",
    "Wanted",
    "Whole",
    "add_row",
    "frozen",
    "head_factor",
    "is_near",
    "leaving",
    "module_of",
    "needs_all",
    "read_tensors",
    "refuse_head",
    "refuse_sum",
    "stream_steps",
    "tolerance_of",
    "wide",
    "write_tensors",
]
