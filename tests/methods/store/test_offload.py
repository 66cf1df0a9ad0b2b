"""Extraction from a model that is partly on disk: the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lensbridge import TransformerBridge, extract_representations, extract_to


def test_rows_of_a_model_on_disk(tiny: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Bit for bit, in memory and written, and a second call finds that it is the same model."""
    import accelerate

    plain = TransformerBridge(tiny("gpt2"))
    where = dict.fromkeys(
        ("transformer.wte", "transformer.wpe", "transformer.drop", "lm_head"), "cpu"
    )
    where |= {"transformer.h.0": "disk", "transformer.h.1": "disk", "transformer.ln_f": "cpu"}
    model = accelerate.dispatch_model(
        tiny("gpt2"), where, main_device="cpu", offload_dir=str(tmp_path / "off"), force_hooks=True
    )
    spread = TransformerBridge(model)
    assert any(parameter.is_meta for parameter in spread.parameters())
    rows, points = torch.arange(8, 68).view(6, 10), [0, "blocks.1.mlp.hook_post"]
    expected = extract_representations(plain, rows, points, batch_size=2)
    found = extract_representations(spread, rows, points, batch_size=2)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for resume in (False, True):
        store = extract_to(tmp_path / "acts", spread, rows, points, batch_size=2, resume=resume)
        assert all(torch.equal(store.load()[name], value) for name, value in expected.items())
