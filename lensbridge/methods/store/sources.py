"""Sources: datasets in files, for the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...hooks import InputError


def dataset_at(path: Path) -> Any:
    """A dataset in a file or folder. Files are read line by line.

    Args:
        path: ``.txt``, one text a line (empty lines are none); ``.jsonl``, an object with ``text`` or
            ``input_ids`` a line; or a folder that Hugging Face's ``Dataset.save_to_disk`` wrote.
    Raises:
        FileNotFoundError: There is no such file or folder.
        InputError: Another kind of file.
    """
    if path.is_dir():
        import datasets

        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            splits = ", ".join(str(path / name) for name in found)
            raise InputError(f"{path} holds several splits; give one of {splits}")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.suffix == ".txt":
        return _lines(path)
    if path.suffix == ".jsonl":
        return _objects(path)
    raise InputError(
        f"{path} is none of .txt (a text a line), .jsonl, or a folder of Dataset.save_to_disk"
    )


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if text := line.rstrip("\r\n"):
                yield text


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                held = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
            if not isinstance(held, dict):
                raise InputError(
                    f"{path}, line {number}: an object with text or input_ids, got {line.strip()!r:.80}"
                )
            yield held
