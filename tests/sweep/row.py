"""One row of the support table: what of a tiny model's architecture is proved, what is absent and why.

``python -m tests.sweep.row`` writes docs/support.json, from which docs/_ext/support.py makes the page;
``--fork`` gives each architecture a process of its own, so that a crash costs one row.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Row = dict[str, Any]
"""An entry of docs/support.json; `row_of` says what is in it."""

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "support.json"

ROWS, LONG, SHORT = 2, 9, 6

LABELS = {
    "blocks.{i}.hook_out == blocks.{i+1}.hook_in": "chain",
    "rows of the pattern sum to one": "rows",
    "rows of the pattern sum to one less the attention sink": "rows",
    "softmax of the scores == pattern": "softmax",
    "pattern @ v == z": "z",
    "sum of hook_result over heads + b_O == attn.o.hook_out": "result",
}
"""Short names of identities besides those of the residual stream and the logits."""


def row_of(build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> Row:
    """Wrap a model, prove what can be proved and say what that was.

    Args:
        build: Makes the model, and keywords for its forward (none where token ids are enough).
    Returns:
        ``class``; ``outcome``: "holds", "fails: <identities>" or "refused: <why>"; ``towers``: for each, its
        layers, how many of them have a proved residual identity, how often softmax attention happens in them
        and how many patterns have a name; ``stream``: the main tower's, if not [batch, pos, d_model];
        ``unproved``: why a tower's identity is not proved; ``identities``: how many others hold; ``edits``:
        points whose own value, put back, changes the output; ``padded``; ``absent``: reason -> points.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng([]), torch.no_grad():
            # What transformers warns of in tiny configurations is not the subject.
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model, inputs = build()
            return {"class": type(model).__name__, **_of_model(model, inputs)}
    except Exception as error:  # noqa: BLE001 - whatever happens is this row's answer
        return {"outcome": f"refused: {_words(error)}"}


def _of_model(model: nn.Module, inputs: dict[str, Tensor]) -> Row:
    from lensbridge import TransformerBridge

    try:
        bridge = TransformerBridge(model, example=inputs or None)
        proof = bridge.verify()
    except Exception as error:  # noqa: BLE001
        return {"outcome": f"refused: {_words(error)}"}
    ids = () if inputs else (_ids(ROWS, LONG),)
    happened = _attended(bridge, ids, inputs)
    towers: dict[str, Any] = {}
    unproved: dict[str, str] = {}
    overlooked: set[str] = set()
    for tower in bridge.architecture.towers:
        label = tower.prefix.rstrip("_") or "main"
        mine = re.compile(re.escape(tower.prefix) + r"blocks\.(\d+)")
        proved = {
            found[1]
            for check in proof.checks
            if check.identity.endswith(" == resid_post") and check.holds
            if (found := mine.match(check.where))
        }
        patterns = [n for n in bridge.registry if mine.match(n) and n.endswith("hook_pattern")]
        towers[label] = {
            "layers": len(tower.blocks),
            "residual": len(proved),
            "attention": happened[tower.prefix],
            "patterns": len(patterns),
        }
        if len(patterns) < happened[tower.prefix]:
            overlooked.add(tower.prefix)
        if len(proved) < len(tower.blocks):
            unproved[label] = _why_unproved(bridge, tower, proved)
    failures = sorted({check.identity for check in proof.failures})
    others = Counter(LABELS[c.identity] for c in proof.checks if c.holds and c.identity in LABELS)
    shape = happened["stream"]
    return {
        "outcome": f"fails: {'; '.join(failures)}" if failures else "holds",
        "towers": towers,
        **({} if inputs or shape == "batch pos d_model" else {"stream": shape}),
        "unproved": unproved,
        "identities": dict(sorted(others.items())),
        "edits": _edits(bridge, ids, inputs),
        # A stream of other axes has no positions to compare where they are looked for: the output has.
        "padded": _Padding(bridge, is_usual=shape == "batch pos d_model" or bool(inputs)).row(),
        "absent": _absent(bridge, overlooked),
    }


def _ids(rows: int, length: int, seed: int = 1) -> Tensor:
    """Token ids that are special in no configuration, [rows, length]."""
    return torch.randint(10, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def _words(error: Exception) -> str:
    """An exception in one line, the same at every run."""
    text = " ".join(str(error).split()).replace(f"{ROOT}/", "")
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return f"{type(error).__name__}: {text[:160]}"


# --- the residual stream ------------------------------------------------------------------------


def _why_unproved(bridge: Any, tower: Any, proved: set[str]) -> str:
    """Why the layers of a tower are not shown to be sums, each reason once."""
    reasons: list[str] = []
    for index, block in enumerate(tower.blocks):
        if str(index) in proved:
            continue
        here = f"{tower.prefix}blocks.{index}"
        needed = ["hook_in", "hook_out", *(f"hook_{b.name}_out" for b in block.branches)]
        missing = (bridge.why(f"{here}.{name}") for name in needed)
        reason = block.unproved or next((why for why in missing if why), "no reason given")
        reasons.append(_condensed(reason))
    # Of reasons that differ in numbers only (widths of stages), the first.
    return "; ".join({re.sub(r"\d+", "", reason): reason for reason in reversed(reasons)}.values())


def _condensed(reason: str) -> str:
    """A reason for every layer at once, without the exception behind it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{i}", re.sub(r": \w+Error: .*", "", reason))


# --- attention, seen by another instrument ---------------------------------------------------------


class _Attentions(TorchFunctionMode):
    """Counts softmax attention: fused calls, and softmaxes whose outcome enters a product."""

    FUSED = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
    SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
    PRODUCT = (
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm),
        *(torch.einsum, torch.baddbmm),
    )

    def __init__(self) -> None:
        super().__init__()
        self.tower: list[str] = []
        self.only: str | None = None
        self.count: Counter[str] = Counter()
        self.soft: dict[int, Tensor] = {}
        """What softmaxes made, and what was made of that, until it enters a product."""

    def note(self) -> None:
        tower = self.tower[-1] if self.tower else "outside"
        if self.only in (None, tower):
            self.count[tower] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        flat = [y for x in given for y in (x if isinstance(x, (tuple, list)) else [x])]
        soft = any(id(x) in self.soft for x in flat if isinstance(x, Tensor))
        if func in self.FUSED:
            self.note()
        elif func in self.SOFTMAX and out.dim() > 2:
            self.soft[id(out)] = out
        elif func in self.PRODUCT and soft:
            self.note()
        elif soft and isinstance(out, Tensor) and out.dim() > 2:
            self.soft[id(out)] = out
        return out


def _attended(bridge: Any, ids: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> Any:
    """How often attention happens in each tower's layers, by prefix; and ``"stream"``, the main one's axes.

    A tower that the run does not pass is run alone if its proof was made that way; else it counts nothing.
    """
    from lensbridge.bridge.example import FAILURES, examples

    model, mode = bridge.original_model, _Attentions()
    handles: list[Any] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for tower in bridge.architecture.towers:
        for path in {block.path for block in tower.blocks}:

            def enter(module: Any, args: Any, kwargs: Any, prefix: str = tower.prefix) -> None:
                mode.tower.append(prefix)
                first = next((x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)), None)
                if first is not None:
                    shapes.setdefault(prefix, tuple(first.shape))

            def leave(*_: Any) -> None:
                mode.tower.pop()

            block = model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
    try:
        with mode:
            bridge(*ids, return_type=None, **inputs)
            for tower in bridge.architecture.towers:
                if not tower.root or tower.prefix in shapes:
                    continue
                owner, mode.only = model.get_submodule(tower.root), tower.prefix
                for given in examples(owner, "cpu"):
                    with suppress(*FAILURES):
                        owner(**given)
                        break
                    mode.tower.clear()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Any] = {t.prefix: mode.count[t.prefix] for t in bridge.architecture.towers}
    words = {ROWS: "batch", LONG: "pos"}
    d_model = (
        getattr(model.config.get_text_config(), "hidden_size", None) or bridge.cfg.d_model or 1
    )
    *axes, width = shapes.get(bridge.architecture.main.prefix, (ROWS, LONG, d_model))
    times, rest = divmod(width, d_model)
    last = str(width) if rest else "d_model" if times == 1 else f"{times}*d_model"
    found["stream"] = " ".join([*(words.get(size, "n") for size in axes), last])
    return found


# --- putting values back -------------------------------------------------------------------------------


def _edits(bridge: Any, ids: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> list[str]:
    """Points whose own value, put back, changes the output by more than 1e-5 or cannot be put back."""
    from lensbridge.bridge.verify import relative_error

    def run(names: set[str]) -> Tensor:
        torch.manual_seed(0)
        hooks = [(names.__contains__, lambda x, hook: x.clone())] if names else []
        with _output(bridge.original_model) as held:
            bridge.run_with_hooks(*ids, return_type=None, fwd_hooks=hooks, **inputs)
        return held[-1]

    bare = run(set())
    _, cache = bridge.run_with_cache(*ids, return_type=None, **inputs)

    def is_changed(names: set[str]) -> bool:
        try:
            return not relative_error(run(names), bare) <= 1e-5
        except Exception:  # noqa: BLE001 - what it would say is what the names say
            return True

    if not is_changed(set(cache)):
        return []
    alone = [name for name in cache if is_changed({name})]
    return list(dict.fromkeys(map(_template, alone))) or ["all together"]


@contextmanager
def _output(model: nn.Module) -> Iterator[list[Tensor]]:
    """The model's main output at each run, whatever it is called."""
    from lensbridge.bridge.seen import first_item

    held: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        logits = getattr(out, "logits", None)
        held.append(first_item(out) if logits is None else logits)

    handle = model.register_forward_hook(keep)
    try:
        yield held
    finally:
        handle.remove()


# --- padded batches -------------------------------------------------------------------------------------


class _Padding:
    """Compares a padded batch of two rows with the rows alone, at the last layer's real positions."""

    def __init__(self, bridge: Any, *, is_usual: bool) -> None:
        self.bridge = bridge
        self.model = bridge.original_model
        config = self.model.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and pad >= 0 else 0
        self.rows = _ids(1, LONG, 2), _ids(1, SHORT, 3)
        self.takes = inspect.signature(self.model.forward).parameters
        self.is_pair = self.model.config.is_encoder_decoder and "decoder_input_ids" in self.takes
        main = bridge.architecture.main
        name = f"{main.prefix}blocks.{len(main.blocks) - 1}.hook_out"
        self.name = name if name in bridge.registry and is_usual else None

    def row(self) -> dict[str, str]:
        """``left`` and ``right``: "equal", or why not; ``both`` where the question does not arise."""
        for keyword in ("input_ids", "attention_mask"):
            if keyword not in self.takes:
                return {"both": f"its forward takes no {keyword}"}
        try:
            self.single = [self.run(row) for row in self.rows]
        except Exception as error:  # noqa: BLE001
            return {"both": f"it does not run on token ids alone ({type(error).__name__})"}
        return {side: self.why(side) for side in ("left", "right")}

    def run(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last layer's output, or the model's where that layer has no name, [batch, pos, ...]."""
        torch.manual_seed(0)
        given: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if self.is_pair:
            given["decoder_input_ids"] = self.rows[0][:, :4].expand(len(ids), -1)
        if self.name is not None:
            only = {"return_type": None, "names_filter": self.name}
            found = self.bridge.run_with_cache(ids, **only, **given)[1][self.name]
            if self.is_pair or found.shape[1] == ids.shape[1]:
                return found
            self.name = None  # rounded up to windows, say: positions are not those of the ids
            torch.manual_seed(0)
        with _output(self.model) as held:
            self.bridge(ids, return_type=None, **given)
        return held[-1]

    def batch(self, side: str, fill: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Both rows in one tensor, its mask, and where the short one is."""
        where = slice(LONG - SHORT, LONG) if side == "left" else slice(SHORT)
        ids, mask = fill.clone(), torch.zeros(ROWS, LONG, dtype=torch.long)
        ids[0], mask[0] = self.rows[0][0], 1
        ids[1, where], mask[1, where] = self.rows[1][0], 1
        return ids, mask, slice(None) if self.is_pair else where

    def same(self, found: Tensor, where: Any, single: list[Tensor]) -> list[bool]:
        """Whether each row is what it is alone; the first has no padding."""
        pairs = (found[0], single[0][0]), (found[1, where], single[1][0])
        return [_is_near(left, right) for left, right in pairs]

    def is_refused(self, batches: list[dict[str, Tensor]]) -> bool:
        """Whether the model cannot be called without the bridge either."""
        try:
            self.bare(*batches)
        except Exception:  # noqa: BLE001
            return True
        return False

    def bare(self, *batches: dict[str, Tensor]) -> list[Tensor]:
        """What the model puts out, called without the bridge."""
        extra = {"decoder_input_ids": self.rows[0][:, :4]} if self.is_pair else {}
        with _output(self.model) as held:
            for given in batches:
                torch.manual_seed(0)
                rows = {name: x.expand(len(given["input_ids"]), -1) for name, x in extra.items()}
                self.model(**given, **rows)
        return held

    def why(self, side: str) -> str:
        """What keeps a padded row from being the row alone, by what changes it and what does not."""
        ids, mask, where = self.batch(side, torch.full((ROWS, LONG), self.pad))
        batches = [{"input_ids": ids, "attention_mask": mask}]
        batches += [{"input_ids": row} for row in self.rows]
        try:
            found = self.run(ids, mask)
        except Exception as error:  # noqa: BLE001
            who = "the model itself" if self.is_refused(batches) else "the bridge"
            return f"{who} refuses: {_words(error)}"
        ours = self.same(found, where, self.single)
        if all(ours):
            return "equal"
        if self.is_refused(batches):
            return "the model itself refuses ids and mask alone"
        together, *alone = self.bare(*batches)
        bare = self.same(together, where, alone)
        if any(bare[row] and not ours[row] for row in range(ROWS)):
            return "the bridge differs from the model itself"
        if not ours[0]:
            return "a row without padding changes beside a padded one"
        if not self.is_pair and torch.equal(found, self.run(ids)):
            return "the mask changes nothing"
        others, _, _ = self.batch(side, _ids(ROWS, LONG, 4))
        if not _is_near(self.run(others, mask)[1, where], found[1, where]):
            return "what is masked reaches the real positions"
        if side == "left" and "position_ids" not in self.takes:
            return "its forward takes no position_ids"
        return "the model itself differs, for no reason that was looked for"


def _is_near(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    return float((left - right).abs().max()) <= 1e-4 * float(right.abs().max())


# --- what is absent ---------------------------------------------------------------------------------------


def _template(name: str) -> str:
    """``blocks.3.hook_out`` as ``blocks.{i}.hook_out``."""
    return re.sub(r"blocks\.\d+\.", "blocks.{i}.", name)


def _absent(bridge: Any, overlooked: set[str]) -> dict[str, list[str]]:
    """Points that parts like these have elsewhere and this model lacks, by reason.

    Args:
        bridge: The bridge.
        overlooked: Prefixes of the towers in which attention happens that has no pattern.
    """
    found: dict[str, list[str]] = {}
    for name in _expected(bridge.architecture, overlooked):
        if name in bridge.registry:
            continue
        names = found.setdefault(_condensed(bridge.why(name) or "no reason given"), [])
        if _template(name) not in names:
            names.append(_template(name))
    return found


def _expected(architecture: Any, overlooked: set[str]) -> Iterator[str]:
    from lensbridge.bridge.architecture import Attention, Mlp

    for tower in architecture.towers:
        yield f"{tower.prefix}embed.hook_out"
        for index, block in enumerate(tower.blocks):
            here = f"{tower.prefix}blocks.{index}"
            yield from (f"{here}.{name}" for name in ("hook_in", "hook_resid_mid", "hook_out"))
            has_attention = any(isinstance(b.part, Attention) for b in block.branches)
            if tower.prefix in overlooked and not has_attention:
                yield f"{here}.attn.hook_pattern"
            for branch in block.branches:
                part = f"{here}.{branch.name}"
                yield f"{here}.hook_{branch.name}_out"
                if branch.ln is not None:
                    yield f"{here}.ln{branch.number}.hook_normalized"
                if isinstance(branch.part, Attention):
                    ends = ("q.hook_out", "k.hook_out", "v.hook_out", "hook_pattern")
                    yield from (f"{part}.{end}" for end in (*ends, "o.hook_in", "hook_result"))
                elif isinstance(branch.part, Mlp) and branch.part.router is None:
                    yield from (f"{part}.{end}" for end in ("in.hook_out", "out.hook_in"))
        yield f"{tower.prefix}ln_final.hook_out"
    yield "unembed.hook_out"


# --- the table ----------------------------------------------------------------------------------------------


def written(rows: dict[str, dict[str, Row]]) -> str:
    """The table as it is committed: kind -> name -> row, one line each."""
    import transformers

    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    parts = [f'"versions": {json.dumps(versions)}']
    for kind, found in sorted(rows.items()):
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items())]
        parts.append(f'"{kind}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _forked(kind: str, name: str) -> Row:
    """A row made in a process of its own."""
    command = [sys.executable, "-m", "tests.sweep.row", "--one", kind, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"outcome": f"refused: the process ended with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Write docs/support.json."""
    import transformers

    from tests.conftest import build_tiny, tiny_configs, tiny_inputs

    parser = argparse.ArgumentParser(prog="python -m tests.sweep.row", description=main.__doc__)
    parser.add_argument("--fork", action="store_true", help="one process per architecture")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "NAME"), help="print one row and stop")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)

    def make(kind: str, name: str) -> Row:
        return row_of(lambda: (build_tiny(name, kind), tiny_inputs(name, kind)))

    if chosen.one:
        print(json.dumps(make(*chosen.one)))
        return
    rows: dict[str, dict[str, Row]] = {}
    for kind, entries in tiny_configs().items():
        for name in entries:
            row = _forked(kind, name) if chosen.fork else make(kind, name)
            rows.setdefault(kind, {})[name] = row
            if row["outcome"] != "holds":
                print(f"{kind} {name}: {row['outcome']}", file=sys.stderr)
    TABLE.write_text(written(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
