"""Fixtures of the sweep: how a row is made, and the table that is committed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(path: Path) -> ModuleType:
    """A file that is no test and in no package; tests cannot import each other by name."""
    full = f"lensbridge_sweep_{path.stem}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def sweep() -> Any:
    """The module `row.py`."""
    return _load(Path(__file__).parent / "row.py")


@pytest.fixture(scope="session")
def support() -> Any:
    """The module `docs/_ext/support.py`: what the rows of the table say."""
    return _load(ROOT / "docs" / "_ext" / "support.py")


@pytest.fixture(scope="session")
def table(support: Any) -> dict[str, Any]:
    """docs/support.json: kind -> name -> row."""
    return support.read()[1]
