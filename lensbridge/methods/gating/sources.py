"""Rows of text from files and from datasets of the Hugging Face hub."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ...hooks import InputError

Column = str | Callable[[Mapping[str, Any]], str]
"""A column's name, or a function that makes a text of a row."""


def read_tsv(
    path: Path,
    columns: tuple[int | str, int | str],
    header: bool,
    max_samples: int | None,
) -> tuple[list[str], list[str]]:
    """Two columns of a file of tab-separated values."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t", strict=True)
        names = next(reader, []) if header else None
        at = [_number(column, names, path) for column in columns]
        found: tuple[list[str], list[str]] = ([], [])
        try:
            for row in first(filter(None, reader), max_samples):
                if len(row) <= max(at):
                    raise InputError(
                        f"{path}, line {reader.line_num}: there are {len(row)} columns, and column {max(at)} "
                        f"is wanted (counted from 0): {row!r}"
                    )
                for texts, number in zip(found, at, strict=True):
                    texts.append(row[number])
        except csv.Error as error:
            raise InputError(
                f"{path}, line {reader.line_num} is not tab-separated text: {error}"
            ) from error
    if not found[0]:
        raise InputError(f"{path} has no rows" + (" below its header" if header else ""))
    return found


def _number(column: int | str, names: list[str] | None, path: Path) -> int:
    if isinstance(column, str):
        if names is None:
            raise InputError(f"header=False: columns have no names; give {column!r} as a number")
        if column not in names:
            raise InputError(f"{path} has no column {column!r}; its columns are {names}")
        return names.index(column)
    if column < 0 or (names is not None and column >= len(names)):
        raise InputError(f"{path} has no column {column}; its columns are {names or 'numbered'}")
    return column


def read_dataset(
    dataset: Any,
    columns: tuple[Column, Column],
    split: str,
    max_samples: int | None,
    load_options: Mapping[str, Any] | None,
) -> tuple[list[str], list[str]]:
    """Two columns of a dataset."""
    if isinstance(dataset, (str, os.PathLike)):
        from datasets import load_dataset

        rows = load_dataset(os.fspath(dataset), split=split, **(load_options or {}))
    elif load_options is not None:
        raise InputError("load_options are for load_dataset; this dataset is loaded already")
    elif isinstance(dataset, Mapping):
        if split not in dataset:
            raise InputError(
                f"there is no split {split!r}; there are {', '.join(map(str, dataset))}"
            )
        rows = dataset[split]
    else:
        rows = dataset
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise InputError(f"a dataset is an iterable of mappings, got {type(rows).__name__}")
    found: tuple[list[str], list[str]] = ([], [])
    for index, row in enumerate(first(rows, max_samples)):
        for texts, column in zip(found, columns, strict=True):
            texts.append(_cell(index, row, column))
    if not found[0]:
        raise InputError("the dataset has no rows")
    return found


def _cell(index: int, row: Any, column: Column) -> str:
    if not isinstance(row, Mapping):
        raise InputError(
            f"row {index} of the dataset is {type(row).__name__}, expected a mapping of columns: {row!r}"
        )
    if callable(column):
        value, name = column(row), "what the function made"
    elif column in row:
        value, name = row[column], f"column {column!r}"
    else:
        raise InputError(f"row {index} has no column {column!r}; its columns are {list(row)}")
    if not isinstance(value, str):
        raise InputError(
            f"row {index}: {name} is {type(value).__name__}, expected str: {value!r}; a function of the row "
            "in place of the name makes text of it"
        )
    return value


def first(rows: Iterable[Any], count: int | None) -> Iterable[Any]:
    """The first rows, and no further.

    Raises:
        InputError: Less than one.
    """
    if count is not None and count < 1:
        raise InputError(f"max_samples must be at least 1, or None for all; got {count}")
    return islice(rows, count)
