"""The documents: what they show runs, where they point exists, and the list of names is whole."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
GENERATED = {"generated/points.md", "generated/support.md"}


def fenced(path: Path, language: str) -> list[str]:
    """The code blocks of one language in a Markdown file."""
    return re.findall(
        rf"^```{re.escape(language)}\n(.*?)^```",
        path.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )


# --- README -----------------------------------------------------------------------------------------------


def test_readme_example_prints_what_the_readme_says(tmp_path: Path) -> None:
    """On its own, as a reader would run it; a warning fails it."""
    (example,) = fenced(ROOT / "README.md", "python")
    (expected,) = fenced(ROOT / "README.md", "text")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_readme_commands_are_commands_and_extras_of_the_package() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    commands = "".join(fenced(ROOT / "README.md", "sh"))
    assert "&& lensbridge demo" in commands
    assert 'lensbridge = "lensbridge.cli:main"' in pyproject
    extras = re.findall(r"\.\[([\w,]+)\]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), f"README installs [{extra}]"


# --- links ------------------------------------------------------------------------------------------------


def targets(path: Path) -> Iterator[str]:
    """Where a Markdown file points, other than the web: links, includes, pages of a toctree."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from (f"{x}.md" for x in block.split("\n") if x and not x.startswith(":"))
    yield from re.findall(r"^```\{include\} (\S+)", text, re.MULTILINE)
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    for target in targets(page):
        if target in GENERATED:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name} points to {target}"
        assert linked.is_relative_to(ROOT), f"{page.name} points outside the repository: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} points to {target}"


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in a link."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_every_page_is_in_the_table_of_contents() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {target for target in targets(index) if target.endswith(".md")}
    assert {page.name for page in index.parent.glob("*.md")} - {"index.md"} <= listed


def test_paths_named_in_the_documents_exist() -> None:
    """`bridge/table.py`, `tests/conftest.py`: relative to the repository or to the package."""
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for path in re.findall(
            r"`([\w/]+/[\w.]+\.(?:py|json|md))`", page.read_text(encoding="utf-8")
        ):
            found = (ROOT / path).exists() or (ROOT / "lensbridge" / path).exists()
            assert found, f"{page.name} names {path}"


# --- the list of names ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names() -> ModuleType:
    """docs/_ext/names.py, which needs no Sphinx to be imported."""
    name = "lensbridge_docs_names"
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_ext" / "names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def registries(names: ModuleType) -> dict[str, Any]:
    return {family: names.registry_of(family) for family in names.FAMILIES}


def test_every_tested_family_is_in_the_list(names: ModuleType, family: str, tiny: Any) -> None:
    """Each point of each family and variant of the tests has its sentence."""
    from lensbridge import TransformerBridge

    bridge = TransformerBridge(tiny(family))
    assert {names.template(name) for name in bridge.registry} <= set(names.SENTENCES)
    assert bridge.original_model.config.model_type in names.FAMILIES


def test_list_says_what_the_registries_say(names: ModuleType, registries: dict[str, Any]) -> None:
    text = names.page(names.collect(registries), names.SENTENCES)
    for registry in registries.values():
        for name, point in registry.items():
            entry = text.split(f"\n`{names.template(name)}` [", 1)[1].split("\n\n", 1)[0]
            assert entry.startswith(f"{point.axes}]\n: {names.SENTENCES[names.template(name)]}")
            # A decoder's self_attn is its attn, which the introduction of the list says once.
            others = {names.template(alias) for alias in point.aliases} - {names.template(name)}
            assert all(f"`{alias}`" in entry for alias in others)
            assert ("Computed when named." in entry) == (not point.is_default)
    entry = text.split("\n`blocks.{i}.hook_resid_mid` [", 1)[1].split("\n\n", 1)[0]
    assert "Absent in GPT-NeoX, Phi: attention and MLP run in parallel" in entry


def test_list_refuses_to_be_incomplete(names: ModuleType, registries: dict[str, Any]) -> None:
    points = names.collect({"gpt2": registries["gpt2"]})
    own = {point.name: names.SENTENCES[point.name] for point in points}
    names.check(points, own)
    with pytest.raises(names.NamesError, match=r"no sentence for the point unembed\.hook_out"):
        names.check(points, {k: v for k, v in own.items() if k != "unembed.hook_out"})
    with pytest.raises(names.NamesError, match=r"no point for the sentence unembed\.hook_huh"):
        names.check(points, {**own, "unembed.hook_huh": "What?"})


def test_list_refuses_an_unexplained_absence(names: ModuleType, registries: dict[str, Any]) -> None:
    from lensbridge import HookPoint, HookRegistry

    odd = HookRegistry([HookPoint("embed.hook_odd", axes="batch pos")])
    with pytest.raises(names.NamesError, match=r"gpt2 lacks embed\.hook_odd and does not say why"):
        names.collect({"odd": odd, "gpt2": registries["gpt2"]})
