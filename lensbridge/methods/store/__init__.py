"""Activations of datasets: kept for a run, in memory, on disk, over many processes."""

from .capture import ActivationStore
from .extract import extract_to
from .extraction import ActivationBatch, stream_representations
from .memory import extract_representations
from .ragged import Ragged
from .reader import ExtractedActivations
from .save import load_activations, save_activations
from .vllm import read_vllm_hidden_states

__all__ = [
    "ActivationBatch",
    "ActivationStore",
    "ExtractedActivations",
    "Ragged",
    "extract_representations",
    "extract_to",
    "load_activations",
    "read_vllm_hidden_states",
    "save_activations",
    "stream_representations",
]
