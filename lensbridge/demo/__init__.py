"""The small demo model that ships inside the package.

The model is a four-layer GPT-2 of about one million parameters, trained from scratch on
generated text by ``demos/train_demo_model.py``. It exists so that examples and tests can
run real interpretability experiments (factual recall, indirect-object identification,
induction, small sums) without a download.

This module imports neither torch nor transformers, so importing it is cheap:

    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from lensbridge import demo
    >>> model = AutoModelForCausalLM.from_pretrained(demo.path())
    >>> tokenizer = AutoTokenizer.from_pretrained(demo.path())

The evaluation items the model was measured on are in :mod:`lensbridge.demo.tasks`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Return the directory of the demo checkpoint.

    It is an ordinary Hugging Face checkpoint directory, to be passed to
    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.

    Returns:
        The directory, inside the installed package.

    Raises:
        FileNotFoundError: If the package was installed without the checkpoint.
    """
    directory = Path(__file__).resolve().parent / "model"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"The demo checkpoint is missing from {directory}. Reinstall lensbridge, or rebuild "
            f"the checkpoint with: python demos/train_demo_model.py --out {directory}"
        )
    return directory
