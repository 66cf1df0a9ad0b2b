"""What is shipped, what the links at the top level are, and what importing the package costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("bridge", "hooks", "methods")
DEMO_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HEAVY = ("overcomplete", "plotly", "matplotlib", "datasets", "sklearn", "pandas", "typer", "cv2")


def run_python(*args: str, cwd: Path) -> str:
    """Run this Python on its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{args[:3]} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def package_files() -> set[str]:
    """Files of the package in this checkout, as paths relative to its root."""
    found = (path for path in (ROOT / "lensbridge").rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix()
        for path in found
        if "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it (not from the checkout)."""
    out = tmp_path_factory.mktemp("dist")
    run_python("-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel_files(dist: Path) -> set[str]:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist_files(dist: Path) -> set[str]:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {
            member.name.split("/", 1)[1]
            for member in archive.getmembers()
            if not member.isdir() and "/" in member.name
        }


def test_wheel_holds_the_package_and_nothing_else(wheel_files: set[str]) -> None:
    metadata = {name for name in wheel_files if name.split("/")[0].endswith(".dist-info")}
    assert wheel_files - metadata == package_files()
    assert {name.split("/", 1)[1] for name in metadata} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_wheel_holds_what_users_need(wheel_files: set[str]) -> None:
    parts = [f"lensbridge/{part}/__init__.py" for part in (*LINKS, "demo")]
    model = [f"lensbridge/demo/model/{name}" for name in DEMO_FILES]
    expected = {"lensbridge/__init__.py", "lensbridge/py.typed", "lensbridge/cli.py"}
    assert expected.union(parts, model) <= wheel_files
    for part in ("hooks", "bridge"):
        prefix = f"lensbridge/{part}/"
        modules = [name for name in wheel_files if name.startswith(prefix) and name.endswith(".py")]
        assert len(modules) > 1, f"only {modules} of lensbridge/{part} is in the wheel"


def test_sdist_holds_sources_tests_and_documents(sdist_files: set[str]) -> None:
    assert package_files() <= sdist_files
    expected = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "docs/conf.py"}
    assert expected | {"tests/test_packaging.py"} <= sdist_files
    assert not {name.split("/")[0] for name in sdist_files} & set(LINKS)


@pytest.mark.parametrize("name", LINKS)
def test_top_level_links_lead_into_the_package(name: str) -> None:
    """A checkout has them, as links or (without symlinks) as files with the target; an sdist does not."""
    link, target = ROOT / name, f"lensbridge/{name}"
    assert (ROOT / target).is_dir()
    if link.is_symlink():
        assert link.readlink().as_posix() == target
    elif link.exists():
        assert link.is_file()
        assert link.read_text(encoding="utf-8") == target
    else:
        assert (ROOT / "PKG-INFO").exists(), f"the link {name} is missing from this checkout"


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither the package nor the bridge behind its lazy names adds to what transformers loads."""
    code = (
        "import sys, torch, transformers.modeling_utils\n"
        "before = set(sys.modules)\n"
        "import lensbridge\n"
        "lensbridge.TransformerBridge\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    added = set(run_python("-c", code, cwd=tmp_path).split())
    assert "lensbridge" in added
    assert not added & set(HEAVY)


def test_version_is_that_of_the_installed_package(tmp_path: Path) -> None:
    code = (
        "import lensbridge, importlib.metadata as m\n"
        "print(lensbridge.__version__, m.version('lensbridge'))"
    )
    imported, installed = run_python("-c", code, cwd=tmp_path).split()
    assert imported == installed


def test_ci_script_can_be_started() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        assert (ROOT / "PKG-INFO").exists(), ".ci/run is missing from this checkout"
        return
    assert script.read_bytes().startswith(b"#!/usr/bin/env bash\n")
    assert os.name == "nt" or os.access(script, os.X_OK)
