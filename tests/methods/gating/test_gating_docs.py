"""What the README says of head gates is what comes out."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_readme() -> None:
    """The session with a fit prints what stands below it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sessions = re.findall(r"^```pycon\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (session,) = (one for one in sessions if "lens.fit(" in one)
    told: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    parsed = doctest.DocTestParser().get_doctest(session, {}, "README.md", "README.md", 0)
    runner.run(parsed, out=told.append)
    assert runner.summarize(verbose=False).attempted == 7
    assert not told, "".join(told)
