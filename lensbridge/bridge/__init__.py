"""A Hugging Face model as canonical points, the runs over them, and what a run returns."""

from .architecture import Architecture
from .bridge import TransformerBridge
from .cache import ActivationCache
from .config import BridgeConfig
from .factored import FactoredMatrix
from .inputs import Inputs
from .record import frozen
from .table import add_row

__all__ = [
    "ActivationCache",
    "Architecture",
    "BridgeConfig",
    "FactoredMatrix",
    "Inputs",
    "TransformerBridge",
    "add_row",
    "frozen",
]
