"""What a dataset may be: every kind gives the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lensbridge import InputError, extract_representations
from lensbridge.methods.store.sources import dataset_at

TEXTS = ["abc", "a", "the fox", "ab"]


class MapStyle(Dataset[dict[str, Any]]):
    """A dataset that knows only its length and indices, and is padded behind."""

    def __init__(self, rows: list[list[int]], key: str | None = "input_ids") -> None:
        self.rows, self.key = rows, key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        ids = torch.tensor(
            self.rows[index]
        )  # an index beyond is an error of its own kind, as it often is
        padded = torch.cat([ids, torch.zeros(3, dtype=torch.long)])
        mask = torch.cat([torch.ones_like(ids), torch.zeros(3, dtype=torch.long)])
        return {"input_ids": padded, "attention_mask": mask, "label": 3} if self.key else ids


def hugging_face(rows: list[list[int]]) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"input_ids": rows, "label": [0] * len(rows)})


def tables(rows: list[list[int]]) -> dict[str, Any]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


KINDS: dict[str, Callable[[list[list[int]]], Any]] = {
    "texts": lambda rows: TEXTS,
    "a generator of texts": lambda rows: (text for text in TEXTS),
    "mappings with text": lambda rows: [{"text": text, "id": 7} for text in TEXTS],
    "lists of ids": lambda rows: rows,
    "tuples": lambda rows: tuple(tuple(row) for row in rows),
    "tensors": lambda rows: [torch.tensor(row, dtype=torch.int32) for row in rows],
    "arrays": lambda rows: iter([torch.tensor(row).numpy() for row in rows]),
    "texts and ids": lambda rows: [rows[0], *TEXTS[1:]],
    "what a tokenizer returns": tables,
    "map-style mappings": MapStyle,
    "map-style ids": lambda rows: MapStyle(rows, None),
    "datasets": hugging_face,
    "datasets as tensors": lambda rows: hugging_face(rows).with_format("torch"),
    "datasets streaming": lambda rows: hugging_face(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(
    llama_bridge: Any, ids_of: Any, same_rows: Any, kind: str
) -> None:
    """Padding and other columns do not matter."""
    rows = ids_of(TEXTS)
    expected = extract_representations(llama_bridge, rows, [0, 2], 2)
    assert expected["blocks.0.hook_out"].lengths.tolist() == [4, 2, 8, 3]
    assert same_rows(extract_representations(llama_bridge, KINDS[kind](rows), [0, 2], 2), expected)


def test_one_text(llama_bridge: Any, same_rows: Any) -> None:
    """A string is one sample, not its letters."""
    acts = extract_representations(llama_bridge, "abc", 0)
    assert acts["blocks.0.hook_out"].shape[:2] == (1, 4)


def broken() -> Iterator[Any]:
    yield "abc"
    yield 3


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ([], "empty"),
        (iter(()), "no samples"),
        (3, "got int"),
        (b"abc", "got bytes"),
        (broken(), "sample 1 is int"),
        (["abc", ""], None),
        ([[1, 2], []], "sample 1 has no tokens"),
        ([[0.5, 1.0]], "whole numbers"),
        ([[True, False]], "whole numbers"),
        ([[[1, 2], [3, 4]]], "not batches"),
        (torch.zeros(2, 3, 4, dtype=torch.long), "[2, 3, 4]"),
        (torch.zeros(2, 3), "whole numbers"),
        ([[1, 2], [1, 160]], "sample 1 has token id 160, outside the vocabulary of 160"),
        ([[-1]], "token id -1"),
        ([{"label": 3}], "input_ids or text"),
        ({"label": 3}, "input_ids or text"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "says something of 1"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "nothing but padding"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}], "between others"),
        ({"input_ids": [[1]], "attention_mask": [[1], [1]]}, "unequal numbers of rows"),
        (DataLoader(MapStyle([[1, 2]])), "DataLoader"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_what_is_no_dataset(llama_bridge: Any, dataset: Any, said: str | None) -> None:
    """Is refused, with the sample that was wrong; an empty text has a BOS and is none of them."""
    if said is None:
        assert (
            extract_representations(llama_bridge, dataset, 0)["blocks.0.hook_out"].lengths[1] == 1
        )
        return
    with pytest.raises(InputError) as raised:
        extract_representations(llama_bridge, dataset, 0)
    assert said in str(raised.value)


# --- files --------------------------------------------------------------------------------------------------


def test_files_of_texts_and_of_objects(tmp_path: Path) -> None:
    """Lines are samples, empty ones none; they are read one by one."""
    lines, objects = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text("abc\n\n a b \nlast", encoding="utf-8")
    assert list(dataset_at(lines)) == ["abc", " a b ", "last"]
    held = [{"text": "abc"}, {"input_ids": [1, 2]}]
    objects.write_text("\n".join(map(json.dumps, held)) + "\n\n", encoding="utf-8")
    assert list(dataset_at(objects)) == held


def test_folders_of_datasets(tmp_path: Path) -> None:
    """What ``save_to_disk`` wrote; of several splits one has to be named."""
    import datasets

    one = datasets.Dataset.from_dict({"text": TEXTS})
    one.save_to_disk(str(tmp_path / "one"))
    assert [row["text"] for row in dataset_at(tmp_path / "one")] == TEXTS
    datasets.DatasetDict(train=one).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(InputError, match="train"):
        dataset_at(tmp_path / "several")
    assert len(dataset_at(tmp_path / "several" / "train")) == 4


def test_files_that_are_no_datasets(tmp_path: Path) -> None:
    """The line is named."""
    path = tmp_path / "a.jsonl"
    for wrong in ("{", "[1]"):
        path.write_text('{"text": "a"}\n' + wrong, encoding="utf-8")
        with pytest.raises(InputError, match="line 2"):
            list(dataset_at(path))
    with pytest.raises(InputError, match=r"\.txt"):
        dataset_at(Path(__file__))
    with pytest.raises(FileNotFoundError):
        dataset_at(tmp_path / "b.txt")
