"""What vLLM wrote: one safetensors file a prompt, ``hidden_states`` [pos, layer, d] and ``token_ids`` [pos]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lensbridge import InputError, extract_representations, read_vllm_hidden_states


def written(folder: Path, rows: list[Tensor], states: list[list[Tensor]]) -> None:
    """Write prompts as vLLM does: by layer, what enters it; behind the last one, what leaves it."""
    for number, (ids, entering) in enumerate(zip(rows, states, strict=True)):
        sub = folder / f"request-{number}"
        sub.mkdir(parents=True)
        held = {"hidden_states": torch.stack(entering, dim=1).bfloat16(), "token_ids": ids}
        save_file(held, sub / "hidden_states.safetensors")


def test_layers_are_the_places_our_own_extraction_knows(llama_bridge: Any, tmp_path: Path) -> None:
    """Layer 0 is the embedding, layer k what enters block k, the last one what leaves the last block."""
    rows = [torch.arange(8, 12), torch.arange(20, 31)]
    states = []
    for ids in rows:
        with torch.no_grad():
            _, cache = llama_bridge.run_with_cache(ids[None])
        states.append(
            [
                cache["blocks.0.hook_in"][0],
                cache["blocks.2.hook_in"][0],
                cache["blocks.3.hook_out"][0],
            ]
        )
    written(tmp_path, rows, states)
    prompts = read_vllm_hidden_states(tmp_path, [0, 2, 4])
    assert len(prompts) == len(list(prompts)) == 2
    ours = extract_representations(llama_bridge, rows, prompts.points)
    for index, prompt in enumerate(prompts):
        assert torch.equal(prompt.pop("input_ids"), rows[index])
        assert list(prompt) == ["blocks.0.hook_in", "blocks.1.hook_out", "blocks.3.hook_out"]
        for name, rows_of in prompt.items():
            assert torch.allclose(rows_of.float(), ours[name][index], rtol=0.01, atol=0.01)
    one = read_vllm_hidden_states(tmp_path / "request-1" / "hidden_states.safetensors", [0, 2, 4])
    assert torch.equal(one[0]["input_ids"], rows[1])


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"x": torch.ones(2)}, "holds x"),
        ({"hidden_states": torch.ones(3, 2), "token_ids": torch.ones(3)}, r"\[3, 2\]"),
        ({"hidden_states": torch.ones(3, 2, 4), "token_ids": torch.ones(2)}, r"\[2\]"),
        ({"hidden_states": torch.ones(3, 1, 4), "token_ids": torch.ones(3)}, "1 layers, but 2"),
    ],
)
def test_other_files(tmp_path: Path, held: dict[str, Tensor], said: str) -> None:
    """Are refused with what is in them."""
    save_file(held, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=said):
        read_vllm_hidden_states(tmp_path, [1, 2])[0]


def test_refusals(tmp_path: Path) -> None:
    """Nothing there; layer ids that are none; a file that is none."""
    with pytest.raises(FileNotFoundError):
        read_vllm_hidden_states(tmp_path, [1])
    for wrong in ([], [1, 1], [-1]):
        with pytest.raises(InputError):
            read_vllm_hidden_states(tmp_path, wrong)
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="cannot be read"):
        read_vllm_hidden_states(tmp_path, [1])[0]
