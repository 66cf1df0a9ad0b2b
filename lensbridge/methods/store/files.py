"""Files: the shards of an extraction, mapped into memory when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...hooks import InputError
from .shards import DTYPES

_OPEN = 256
"""How many shards are mapped at a time."""

_KINDS = {name: dtype for dtype, name in DTYPES.items()}


class Files:
    """The shards of an extraction.

    Args:
        path: Their folder.
        index: The index, which was checked.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self._shards = index["shards"]
        self._points = index["points"]
        self._open: OrderedDict[int, Any] = OrderedDict()
        unknown = {facts["dtype"] for facts in self._points.values()} - set(_KINDS)
        if unknown:
            raise InputError(f"the index of {path} speaks of a dtype {', '.join(sorted(unknown))}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, {"shards": self._shards, "points": self._points})

    def tensor(self, shard: int, name: str) -> Tensor:
        """A tensor of a shard, mapped.

        Raises:
            InputError: The shard is damaged, or holds another tensor than the index says.
        """
        facts = self._shards[shard]
        try:
            held = self._mapped(shard).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path / facts['file']} is damaged: {error}") from error
        if name in self._points:
            wanted = (
                [facts["rows"], *self._points[name]["shape"]],
                _KINDS[self._points[name]["dtype"]],
            )
            if (list(held.shape), held.dtype) != wanted:
                raise InputError(
                    f"{self.path / facts['file']} has {name} as {list(held.shape)} {held.dtype}, but the "
                    f"index says {wanted[0]} {wanted[1]}"
                )
        return held

    def empty(self, name: str, n: int) -> Tensor:
        """Room for rows of a point."""
        facts = self._points[name]
        return torch.empty(n, *facts["shape"], dtype=_KINDS[facts["dtype"]])

    def column(self, name: str, datasets: Any) -> Any:
        """The feature of a column of rows of a point."""
        facts = self._points[name]
        dtype = str(_KINDS[facts["dtype"]]).removeprefix("torch.")
        feature = datasets.Value("float32" if dtype == "bfloat16" else dtype)
        for size in reversed(facts["shape"]):
            feature = datasets.List(feature, length=size)
        return datasets.List(feature)

    def _mapped(self, shard: int) -> Any:
        held = self._open.pop(shard, None)
        if held is None:
            held = safe_open(self.path / self._shards[shard]["file"], framework="pt")
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)
        self._open[shard] = held
        return held
