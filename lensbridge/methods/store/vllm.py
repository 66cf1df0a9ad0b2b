"""What vLLM's own extraction of hidden states wrote, by the names of this library."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...hooks import InputError
from ..numbers import whole

_STATES, _IDS = "hidden_states", "token_ids"


class VLLMHiddenStates:
    """Prompts that vLLM ran with ``extract_hidden_states``: a map-style dataset of samples.

    Args:
        files: A file for each prompt.
        layer_ids: The layers that vLLM was told (``eagle_aux_hidden_state_layer_ids``), in that order.
    """

    def __init__(self, files: Sequence[Path], layer_ids: Sequence[int]) -> None:
        self.files = list(files)
        # vLLM keeps the stream that enters a layer; its last id is what leaves the last one, not normed yet.
        self.points = [
            f"blocks.{layer - 1}.hook_out" if layer else "blocks.0.hook_in" for layer in layer_ids
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A prompt: ``input_ids`` [pos] and, by point, the residual stream [pos, d_model], mapped.

        Raises:
            IndexError: There is no such prompt.
            InputError: The file is none of vLLM's, or of other layers.
        """
        path = self.files[index]
        try:
            with safe_open(path, framework="pt") as held:
                names = set(held.keys())
                states, ids = (
                    held.get_tensor(name) if name in names else None for name in (_STATES, _IDS)
                )
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if states is None or ids is None:
            raise InputError(
                f"{path} holds {', '.join(sorted(names)) or 'nothing'}; vLLM writes {_STATES} and {_IDS}"
            )
        if states.dim() != 3 or ids.dim() != 1 or len(states) != len(ids):
            raise InputError(
                f"{path}: {_STATES} are [pos, layer, d_model] and {_IDS} [pos], got {list(states.shape)} "
                f"and {list(ids.shape)}"
            )
        if states.shape[1] != len(self.points):
            raise InputError(
                f"{path} has {states.shape[1]} layers, but {len(self.points)} layer ids were given"
            )
        each = dict(zip(self.points, states.unbind(1), strict=True))
        return {"input_ids": ids.long(), **each}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))


def read_vllm_hidden_states(
    path: str | os.PathLike[str], layer_ids: Sequence[int]
) -> VLLMHiddenStates:
    """Read what vLLM's ``ExampleHiddenStatesConnector`` wrote.

    Args:
        path: A file, or the folder of them (``shared_storage_path``); below it files are taken by name.
        layer_ids: The layers that vLLM was told, in that order; the files do not say.
    Returns:
        The prompts, as samples like those of `ExtractedActivations`; a file is opened when it is asked for.
        Layer k is kept under ``blocks.{k-1}.hook_out``: what enters layer k.
    Raises:
        FileNotFoundError: There is no such file, or none in the folder.
        InputError: Layer ids that are none.
    """
    path = Path(path)
    ids = [whole("a layer id", layer, 0) for layer in layer_ids]
    if not ids or len(set(ids)) < len(ids):
        raise InputError(f"layer_ids are those that vLLM was told, each once, got {layer_ids!r}")
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"there are no .safetensors files at {path}")
    return VLLMHiddenStates(files, ids)
