"""The support table, written from docs/support.json at every build of these pages.

As a Sphinx extension it writes ``docs/generated/support.md``, which ``docs/support.md`` includes. The data
are committed; ``python -m tests.sweep.row`` makes them, and `pytest -m sweep` holds them to what the library
does.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
TABLE = DOCS / "support.json"
TARGET = DOCS / "generated" / "support.md"

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

KINDS = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Encoder-decoders",
    "vlm": "Image and text to text",
    "vision": "Image classification",
    "speech": "Speech to text",
    "ctc": "Speech, CTC",
    "contrastive": "Image beside text",
    "textenc": "Text encoders",
}
"""Kinds of the table in the order of the page, and what to call them."""


def read(path: Path = TABLE) -> tuple[dict[str, str], dict[str, Rows]]:
    """Versions the table was made with, and its rows: kind -> name -> row."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return table.pop("versions"), table


# --- what a row says ----------------------------------------------------------------------------------------


def boots(row: Row) -> bool:
    """Whether the model could be wrapped and run."""
    return not row["outcome"].startswith("refused")


def holds(row: Row) -> bool:
    """Whether all that is claimed of it holds: every identity, logits bit for bit."""
    return row["outcome"] == "holds"


def main_tower(row: Row) -> Mapping[str, int]:
    """The tower that makes the output."""
    towers = row.get("towers", {})
    return towers.get("main") or towers.get("decoder") or dict.fromkeys(_COUNTS, 0)


def is_proved(row: Row) -> bool:
    """Whether each layer of the main tower is shown to be its input and what its branches add."""
    return main_tower(row)["residual"] == main_tower(row)["layers"] > 0


def attends(row: Row) -> bool:
    """Whether softmax attention happens in the main tower."""
    return main_tower(row)["attention"] > 0


def shows_patterns(row: Row) -> bool:
    """Whether all softmax attention of the main tower has a pattern."""
    return attends(row) and main_tower(row)["patterns"] >= main_tower(row)["attention"]


def pads(row: Row) -> bool | None:
    """Whether padded rows equal single ones on both sides; None where that cannot be asked."""
    padded = row.get("padded", {"both": ""})
    return None if "both" in padded else set(padded.values()) == {"equal"}


_COUNTS = ("layers", "residual", "attention", "patterns")


# --- the page -----------------------------------------------------------------------------------------------


def page(versions: Mapping[str, str], table: Mapping[str, Rows]) -> str:
    """Totals and one table a kind, in Markdown."""
    made = " and ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"Made with {made}.", "", *_totals(table)]
    for kind, title in KINDS.items():
        rows = sorted(table[kind].items())
        lines += ["", f"## {title}", ""]
        lines += ["| architecture | class | layers | residual | patterns | padded | absent |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join(_cells(name, row)) + " |" for name, row in rows]
    return "\n".join([*lines, ""])


def _totals(table: Mapping[str, Rows]) -> Iterator[str]:
    yield "| | entries | boot | all claims hold | residual proved | patterns | padded rows equal |"
    yield "|---|---|---|---|---|---|---|"
    for kind, title in KINDS.items():
        rows = table[kind].values()
        asked = [pads(row) for row in rows if pads(row) is not None]
        cells = (
            len(rows),
            sum(map(boots, rows)),
            sum(map(holds, rows)),
            sum(map(is_proved, rows)),
            f"{sum(map(shows_patterns, rows))} of {sum(map(attends, rows))}",
            f"{sum(map(bool, asked))} of {len(asked)}",
        )
        yield f"| {title} | " + " | ".join(map(str, cells)) + " |"


def _cells(name: str, row: Row) -> Iterator[str]:
    yield f"`{name}`"
    yield f"`{row['class']}`" if "class" in row else ""
    if "towers" not in row:
        yield from ("", "", "", "", _text(row["outcome"]))
        return
    towers = row["towers"]
    yield _by_tower(towers, lambda one: str(one["layers"]))
    yield _by_tower(towers, lambda one: _share(one["residual"], one["layers"]))
    yield _by_tower(towers, lambda one: _share(one["patterns"], one["attention"]))
    yield _padded(row["padded"])
    yield "; ".join(_absent(row))


def _by_tower(towers: Mapping[str, Any], say: Any) -> str:
    said = {label: say(one) for label, one in towers.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{label} {text}" for label, text in said.items())


def _share(found: int, of: int) -> str:
    if of == 0 and found == 0:
        return "none"
    return "all" if found >= of else f"{found} of {of}"


def _padded(padded: Mapping[str, str]) -> str:
    if set(padded.values()) == {"equal"}:
        return "equal"
    return "; ".join(
        _text(reason if side == "both" else f"{side}: {reason}") for side, reason in padded.items()
    )


def _absent(row: Row) -> Iterator[str]:
    if row["outcome"] != "holds":
        yield f"**{_text(row['outcome'])}**"
    if "stream" in row:
        yield f"the stream is [{row['stream']}]"
    for label, reason in row["unproved"].items():
        yield f"residual{'' if label == 'main' else ' of ' + label}: {_text(reason)}"
    if row["edits"]:
        yield f"{_names(row['edits'])}: putting its own value back changes the output"
    for reason, names in row["absent"].items():
        yield f"{_names(names)}: {_text(reason)}"


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name.replace('blocks.{i}.', '')}`" for name in names)


def _text(text: str) -> str:
    """A reason as a cell of a table holds it."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")


def write(target: Path = TARGET) -> None:
    """Write the page, unless it is there and the same."""
    text = page(*read())
    target.parent.mkdir(exist_ok=True)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.connect("builder-inited", lambda _: write())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
