"""Tensors and small facts in one file, as `lensbridge.bridge` writes and reads them."""

from ..bridge import read_tensors as read
from ..bridge import write_tensors as write

__all__ = ["read", "write"]
