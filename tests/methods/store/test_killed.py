"""Extractions that are killed lose nothing and double nothing; nor do several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed by forking"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `killed.py` prints."""
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "killed.py"),
            str(tmp_path_factory.mktemp("k")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_left_alone(found: Any) -> None:
    """A child that is not killed extracts what its parent did in memory, in many shards."""
    assert found["whole"]["code"] == 0
    assert found["whole"]["right"]
    assert len(found["whole"]["sums"]) > 9


def test_killed_at_random_times(found: Any) -> None:
    """Twenty seeds: the same files, byte for byte, as if nothing had been."""
    assert len(found["clock"]) == 20
    for trial in found["clock"]:
        assert trial["code"] == 0
        assert trial["right"]
        assert trial["sums"] == found["whole"]["sums"]
    assert sum(trial["killed"] for trial in found["clock"]) >= 5


def test_killed_at_every_kind_of_write(found: Any) -> None:
    """The plan, a shard, its folder, the line in the journal: before each is on the disk."""
    for trial in found["write"]:
        assert trial == {"killed": True, "code": 0, "right": True}


def test_several_ranks(found: Any) -> None:
    """Two processes write what one does; killed ones are gone on with by more, or by one."""
    both, more, fewer = found["ranks"]
    assert both == {"first": [], "second": [0, 0], "right": True, "by": ["rank0", "rank1"]}
    assert (more["second"], more["right"], more["by"]) == (
        [0] * 3,
        True,
        ["rank0", "rank1", "rank2"],
    )
    assert (fewer["second"], fewer["right"]) == ([0], True)
    assert set(more["first"] + fewer["first"]) <= {0, -9}
    assert -9 in more["first"] + fewer["first"]
