"""Folder: an extraction on disk, begun, gone on with, finished.

- ``plan.json``: what is being extracted; written first
- ``rank0-00000.safetensors``: a shard: rows of each point, and tables of the samples they are of
- ``rank0.jsonl``: a line for each shard of that process, once the shard is on the disk
- ``index.json``: all of it; written last, when the others but the shards go

A shard's tables are ``#samples`` (which samples of the dataset), ``#counts`` (rows of each), ``#lengths``
(tokens of each), ``#tokens`` (their ids, one sample after the other) and ``#batches`` (number and checksum
of each batch).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ...hooks import InputError, LensError
from .identity import difference, versions
from .shards import BATCHES, SAMPLES, settle, write_json

FORMAT, VERSION = "lensbridge activations", 1
PLAN, INDEX = "plan.json", "index.json"
_JOURNAL = re.compile(r"rank(\d+)\.jsonl")
_OWN = re.compile(r"rank\d+-\d+\.safetensors")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


class Folder:
    """Where an extraction goes.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- beginning -------------------------------------------------------------------------------

    def check(self, identity: Mapping[str, Any], *, resume: bool) -> bool:
        """Look whether an extraction may begin, or go on, here. Nothing is written.

        Args:
            identity: What is to be extracted.
            resume: Whether to go on with what is there.
        Returns:
            Whether it is finished already.
        Raises:
            InputError: Something else is there, or another extraction; says what differs.
        """
        path = self.path
        if not path.exists():
            return False
        if not path.is_dir():
            raise InputError(f"{path} is a file; extract_to writes a folder")
        known = next((name for name in (INDEX, PLAN) if (path / name).exists()), None)
        if known is None:
            held = sorted(x.name for x in path.iterdir() if x.name != f".{PLAN}.part")
            if held:
                raise InputError(f"{path} holds other things ({held[0]}); give a folder of its own")
            return False
        finished = known == INDEX
        if not resume:
            raise InputError(
                f"{path} holds {'a finished' if finished else 'an unfinished'} extraction; resume=True "
                + ("returns it" if finished else "goes on with it")
                + ", or give another folder"
            )
        held_plan = read_json(path / known)
        theirs = held_plan.get("extraction", {}) if finished else held_plan
        differs = difference(theirs, identity)
        if differs is not None:
            raise InputError(
                f"{path} holds another extraction, which resume=True cannot go on with: {differs}"
            )
        return finished

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Note what is to be extracted here."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / PLAN).exists():
            write_json(self.path / PLAN, identity)

    def abandon(self) -> None:
        """Leave nothing behind of an extraction that has written no shard."""
        if not self.path.is_dir() or (self.path / INDEX).exists() or self.shards():
            return
        self.tidy()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    # --- shards ----------------------------------------------------------------------------------

    def shards(self, rank: int | None = None) -> list[dict[str, Any]]:
        """What has been written: all of it, or by one process."""
        found: list[dict[str, Any]] = []
        for journal in sorted(self.path.iterdir()):
            named = _JOURNAL.fullmatch(journal.name)
            if named and rank in (None, int(named[1])):
                found += self._lines(journal)
        return found

    def _lines(self, journal: Path) -> list[dict[str, Any]]:
        *whole, _ = journal.read_bytes().split(
            b"\n"
        )  # behind the last line's end: a line cut short
        try:
            lines = [json.loads(line) for line in whole]
            for line in lines:
                check_shard(line, self.path)
        except ValueError as error:
            raise InputError(f"{journal} is damaged: {error}") from error
        return lines

    def note(self, rank: int, facts: Mapping[str, Any]) -> None:
        """Note a shard that is on the disk."""
        with (self.path / f"rank{rank}.jsonl").open("ab") as file:
            file.write(json.dumps(facts).encode() + b"\n")
            settle(file)

    def mend(self, rank: int) -> None:
        """Take away a process's last line if it was cut short."""
        journal = self.path / f"rank{rank}.jsonl"
        if journal.exists():
            held = journal.read_bytes()
            with journal.open("r+b") as file:
                file.truncate(held.rfind(b"\n") + 1)
                settle(file)

    def done(self) -> Done:
        """Which batches have been written."""
        tables = [self._table(shard["file"], BATCHES) for shard in self.shards()]
        return Done(np.concatenate(tables) if tables else np.zeros((0, 2), dtype=np.int64))

    def _table(self, file: str, name: str) -> NDArray[Any]:
        try:
            with safe_open(self.path / file, framework="np") as held:
                return held.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path / file} cannot be read: {error}") from error

    # --- ending ----------------------------------------------------------------------------------

    def finish(self, samples: int) -> None:
        """Write the index, and take away what it makes superfluous.

        Args:
            samples: How many samples the dataset has.
        Raises:
            LensError: A sample is missing or there twice.
        """
        if (self.path / INDEX).exists():
            return
        shards = self.shards()
        held = np.zeros(samples, dtype=np.int64)
        for shard in shards:
            np.add.at(held, self._table(shard["file"], SAMPLES), 1)
        if (held != 1).any():
            wrong = int((held != 1).argmax())
            raise LensError(
                f"sample {wrong} is in {held[wrong]} shards of {self.path}, not in one: please report this"
            )
        points = shards[0]["points"]
        odd = next((shard for shard in shards if shard["points"] != points), None)
        if odd is not None:
            raise LensError(
                f"{odd['file']} has {odd['points']}, other shards {points}: what the points show changed "
                "its shape or dtype on the way"
            )
        plan = read_json(self.path / PLAN)
        named = plan["settings"]["points"]
        index = {
            "format": FORMAT,
            "version": VERSION,
            "points": {name: {"point": named[name], **points[name]} for name in named},
            **{
                what: sum(shard[what] for shard in shards) for what in ("samples", "rows", "tokens")
            },
            "extraction": plan,
            "made_with": versions(),
            "shards": [{k: v for k, v in shard.items() if k != "points"} for shard in shards],
        }
        write_json(self.path / INDEX, index)
        self.tidy()

    def tidy(self) -> None:
        """Take away what the index makes superfluous, and shards that were not noted any more.

        Such a one is left by a process that was killed between the two, where fewer went on.
        """
        index = self.path / INDEX
        shards = read_json(index)["shards"] if index.exists() else self.shards()
        noted = {shard["file"] for shard in shards}
        for file in list(self.path.iterdir()):
            is_left = _OWN.fullmatch(file.name) and file.name not in noted
            is_note = _JOURNAL.fullmatch(file.name) or file.name == PLAN
            if is_left or is_note or file.name.endswith(".part"):
                file.unlink()


class Done:
    """Batches that have been written.

    Args:
        batches: Number and checksum of each, [batch, 2].
    """

    def __init__(self, batches: NDArray[Any]) -> None:
        self._batches = batches[batches[:, 0].argsort()]

    def __len__(self) -> int:
        return len(self._batches)

    def has(self, number: int, mark: int) -> bool:
        """Whether a batch has been written.

        Raises:
            InputError: It was another batch.
        """
        at = int(self._batches[:, 0].searchsorted(number))
        if at == len(self._batches) or self._batches[at, 0] != number:
            return False
        if self._batches[at, 1] != mark:
            raise InputError(
                f"the dataset has changed: its batch {number} is not the one that was extracted; start anew "
                "in another folder"
            )
        return True


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: It is none.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(held, dict):
        raise InputError(f"{path} holds no JSON object but {type(held).__name__}")
    return held


def check_shard(shard: Any, folder: Path) -> None:
    """Refuse to follow a list of shards out of its folder, or to read less than it lists.

    Raises:
        InputError: A name that leads elsewhere, a file that is missing or of another size, or no such list.
    """
    wanted = {"file": str, "bytes": int, "sha256": str, "samples": int, "rows": int, "tokens": int}
    for name, kind in wanted.items():
        if not isinstance(shard, dict) or not isinstance(shard.get(name), kind):
            raise InputError(
                f"a shard listed in {folder} has no {name} ({kind.__name__}): {shard!r:.200}"
            )
    path = folder / shard["file"]
    if not _SHARD.fullmatch(shard["file"]):
        raise InputError(
            f"{folder} lists a shard {shard['file']!r}: a shard is a .safetensors file in the folder itself"
        )
    if not path.is_file():
        raise InputError(f"{path} is missing")
    if path.resolve().parent != folder.resolve():
        raise InputError(f"{path} is a link that leads out of its folder, to {path.resolve()}")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise InputError(
            f"{path} has {size} bytes, not {shard['bytes']}: it was cut short or changed"
        )
