"""The demo's results as plain text for a terminal of 88 columns, and its progress."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor

    from ..bridge import ActivationCache, TransformerBridge
    from ..hooks import HookPoint, HookRegistry
    from .show import Ablation, Induction, Patching, Reading

WIDTH = 88
_T = TypeVar("_T")
_Tree = dict[str, Any]  # part -> its tree, or its HookPoint


class Progress:
    """Numbered steps: a bar on stderr while one runs, its heading, time and text on stdout after.

    Args:
        total: How many steps there will be.
    """

    def __init__(self, total: int) -> None:
        # Only on a terminal: in a log the headings are the progress.
        self.bar = tqdm(
            total=total, disable=None, leave=False, bar_format="{bar:20} {n}/{total} {desc}"
        )
        self.done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, title: str, work: Callable[[], _T], text: Callable[[_T], str]) -> _T:
        """Do one step and print it.

        Args:
            title: Its heading.
            work: What to do.
            text: What to print of the result.
        Returns:
            What ``work`` returned.
        """
        self.bar.set_description_str(title)
        started = time.perf_counter()
        result = work()
        seconds = f"{time.perf_counter() - started:.2f} s"
        self.done += 1
        self.bar.update()
        start = f"{self.done}  {title} "
        rule = "─" * (WIDTH - len(start) - len(seconds) - 1)
        tqdm.write(f"{start}{rule} {seconds}\n\n{text(result)}\n")
        return result


def visible(token: str) -> str:
    """A token in quotes, so that its spaces show; control characters escaped."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
    return f'"{escaped}"'


def indented(text: str) -> str:
    """Every line moved in under its heading."""
    return textwrap.indent(text, "   ")


def wrapped(text: str) -> str:
    """A paragraph under its heading."""
    return indented(textwrap.fill(text, WIDTH - 3))


def bar(share: float, width: int = 20) -> str:
    """A bar of ``width`` columns, filled by a share between 0 and 1."""
    filled = round(share * width)
    return "█" * filled + "·" * (width - filled)


def table(rows: Iterable[Iterable[str]]) -> str:
    """Columns as wide as they need: the first flush left, the others flush right."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in lines
    )


def tree(registry: HookRegistry, layer: int = 0) -> str:
    """Every point with its axes and aliases as a tree, one layer standing for all.

    Args:
        registry: The points.
        layer: The layer to show.
    """
    root: _Tree = {}
    for name, point in registry.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            if parts[1] != str(layer):
                continue
            parts[:2] = ["blocks.{i}"]
        branch = root
        for part in parts[:-1]:
            branch = branch.setdefault(part, {})
        branch[parts[-1]] = point
    return "\n".join(_branch(root, "", layer))


def _branch(branch: _Tree, prefix: str, layer: int) -> Iterable[str]:
    for index, (part, held) in enumerate(branch.items()):
        last = index == len(branch) - 1
        line = f"{prefix}{'└─ ' if last else '├─ '}{part}"
        if isinstance(held, dict):
            yield line
            yield from _branch(held, prefix + ("   " if last else "│  "), layer)
        else:
            yield f"{line:<29} {_leaf(held, layer)}".rstrip()


def _leaf(point: HookPoint, layer: int) -> str:
    aliases = ", ".join(alias.replace(f"blocks.{layer}.", "") for alias in point.aliases)
    return f"{f'[{point.axes}]':<28} {aliases}"


# --- what each step prints -----------------------------------------------------------------------


def model(bridge: TransformerBridge) -> str:
    """What the model is, in one paragraph."""
    c = bridge.cfg
    parameters = sum(parameter.numel() for parameter in bridge.parameters())
    return wrapped(
        f"{c.architecture}: {c.n_layers} layers of {c.n_heads} heads, d_model {c.d_model}, "
        f"d_head {c.d_head}, d_mlp {c.d_mlp}, {c.d_vocab:,} tokens, {c.n_ctx} positions; "
        f"{parameters:,} parameters. It ships inside lensbridge and was trained on text that a "
        "script made up: capitals, indirect objects, sums, repeated random tokens. Hugging Face "
        f"built it and nothing in it was replaced; {len(bridge.registry)} hook points name its places."
    )


def points(bridge: TransformerBridge) -> str:
    """The tree of points."""
    layers = bridge.cfg.n_layers
    note = f"Each of the {layers} layers has the points of blocks.{{i}}; i is 0 to {layers - 1}."
    return indented(f"{'point':<29} {'axes':<28} also called\n{tree(bridge.registry)}\n\n{note}")


def continuation(prompt: str, added: str) -> str:
    """The prompt and what the model adds."""
    return wrapped(f"{prompt} ▸{added or ' (the document ends here)'}")


def cached(logits: Tensor, cache: ActivationCache, difference: float) -> str:
    """What a run with cache left.

    Args:
        logits: Of the run.
        cache: Of the run.
        difference: Largest difference between these logits and those of the bare model.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in cache.values()) / 2**20
    keys = (("embed",), ("resid_post", -1), ("q", 0), ("pattern", 0), ("post", 0))
    rows = [
        f"cache[{', '.join(map(repr, key))}]".ljust(26) + f"{list(cache[key].shape)}"
        for key in keys
    ]
    return indented(
        f"{len(cache)} activations, {size:.1f} MiB. Some of them:\n\n" + "\n".join(rows) + "\n\n"
        f"Logits {list(logits.shape)}; at most {difference:.1e} away from the bare model's."
    )


def depth_names(depths: int) -> list[str]:
    """What the rows of a lens are called."""
    return ["embeddings", *(f"layer {layer}" for layer in range(depths - 1))]


def lens(reading: Reading, to_string: Callable[[int], str], shown: int = 3) -> str:
    """The lens at the last position: how the answer arises through depth.

    Args:
        reading: The text.
        to_string: Token id to text.
        shown: How many top tokens to show.
    """
    last = reading.lens[:, -1]
    answer = int(last[-1].argmax())
    name = visible(to_string(answer))
    lines = [f"Next token read off the residual stream behind each layer; the answer is {name}.\n"]
    lines.append(f"{'behind':<11}  {'P(' + name + ')':<27}  likeliest tokens")
    for label, row in zip(depth_names(len(last)), last, strict=True):
        top = row.topk(shown)
        tokens = "  ".join(
            f"{visible(to_string(int(token)))} {value:.1%}"
            for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        share = float(row[answer])
        lines.append(f"{label:<11}  {bar(share)} {share:>6.1%}  {tokens}")
    return indented("\n".join(lines))


def grid(values: Tensor, form: str) -> str:
    """A matrix [layer, head] with its margins."""
    head = ["", *(f"head {index}" for index in range(values.shape[1]))]
    rows = [
        [f"layer {layer}", *(format(value, form) for value in row)]
        for layer, row in enumerate(values.tolist())
    ]
    return table([head, *rows])


def induction(found: Induction) -> str:
    """Induction scores and the best head."""
    layer, head = found.best
    rows, period = len(found.tokens), found.period
    return indented(
        f"{rows} rows of {period} random words, each row repeated once. Score: attention to the "
        f"word that\nfollowed this word the first time.\n\n{grid(found.score, '.3f')}\n\n"
        f"The induction head is layer {layer}, head {head}: {float(found.score[layer, head]):.3f}."
    )


def ablation(found: Ablation) -> str:
    """What silencing each head does to the answer's lead."""
    layer, head = found.best
    item = found.item
    return indented(
        f'"{item.prompt}"\n'
        f"Logit of {visible(item.answer)} minus logit of {visible(str(item.distractor))}: "
        f"{found.baseline:+.3f}.\nChange when one head's z is set to zero:\n\n"
        f"{grid(found.change, '+.3f')}\n\n"
        f"Strongest: layer {layer}, head {head}: "
        f"{found.baseline:+.3f} becomes {float(found.ablated[layer, head]):+.3f}."
    )


def patching(found: Patching) -> str:
    """What carrying one position over from the clean run recovers."""
    layer, pos = found.best
    name = visible(found.answer)
    head = ["entering", *map(visible, found.tokens)]
    rows = [
        [f"layer {index}", *(f"{value:.1%}" for value in row)]
        for index, row in enumerate(found.patched.tolist())
    ]
    return indented(
        f"P({name}) is {found.clean:.1%} after {_text(found.clean_tokens)},\n"
        f"and {found.corrupted:.1%} after {_text(found.tokens)}.\n"
        "After the second, with the stream at one layer and position taken from the first:\n\n"
        f"{table([head, *rows])}\n\n"
        f"Strongest: entering layer {layer} at {visible(found.tokens[pos])}: "
        f"{found.corrupted:.1%} becomes {float(found.patched[layer, pos]):.1%}."
    )


def _text(tokens: list[str]) -> str:
    return '"' + "".join(tokens[1:]) + '"'
