"""The command ``lensbridge``; torch and transformers are imported when a command needs them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._version import __version__
from .demo import report

if TYPE_CHECKING:
    from torch import nn

    from .bridge import TransformerBridge

PROMPT = "The capital of France is"
PAGE = Path("lensbridge-demo.html")

app = typer.Typer(
    name="lensbridge",
    help="Any Hugging Face model in canonical, named hook points.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character gets a question mark, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"lensbridge {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Any Hugging Face model in canonical, named hook points."""


def _failure(error: Exception) -> typer.Exit:
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(1)


# --- lensbridge demo -----------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = PAGE,
    prompt: Annotated[str, typer.Option(help="The text to continue and to look into.")] = PROMPT,
    no_page: Annotated[bool, typer.Option("--no-page", help="Print only, write no page.")] = False,
) -> None:
    """Look inside the small trained model that ships with lensbridge.

    Prints what the model is, the tree of its hook points, a continuation, the logit lens through
    depth, its induction head, and what ablation and patching do; writes a page with its attention.
    """
    started = time.perf_counter()
    if not no_page:
        _check_writable(out)
    with report.Progress(total=8 if no_page else 9) as progress:
        bridge = progress.step("The model", _boot_demo, report.model)
        _check_prompt(bridge, prompt)
        _tour(bridge, prompt, None if no_page else out, progress)
    typer.echo(f"Done in {time.perf_counter() - started:.1f} s.")


def _check_writable(out: Path) -> None:
    folder = out.parent
    problem = None
    if not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif out.is_dir():
        problem = f"{out} is a folder; name a file"
    elif not os.access(out if out.exists() else folder, os.W_OK):
        problem = f"{out} cannot be written"
    if problem is not None:
        raise typer.BadParameter(problem, param_hint="--out")


def _boot_demo() -> TransformerBridge:
    from .demo import show  # torch and transformers are imported here

    try:
        return show.boot()
    except FileNotFoundError as error:
        raise _failure(error) from error


def _check_prompt(bridge: TransformerBridge, prompt: str) -> None:
    from .demo import show
    from .hooks import InputError

    try:
        show.check_prompt(bridge, prompt)
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--prompt") from error


def _tour(
    bridge: TransformerBridge, prompt: str, out: Path | None, progress: report.Progress
) -> None:
    from .demo import page, show

    step, name = progress.step, bridge.to_single_str_token
    tokens = bridge.to_tokens(prompt)
    step("Its hook points", lambda: bridge, report.points)
    step(
        "A continuation, greedy",
        lambda: show.generate(bridge, prompt),
        lambda added: report.continuation(prompt, added),
    )
    _, cache = step(
        "One run with every activation cached",
        lambda: show.run(bridge, tokens),
        lambda ran: report.cached(*ran, show.distance(bridge, tokens, ran[0])),
    )
    reading = step(
        "The logit lens",
        lambda: show.read(bridge, "the prompt", tokens, cache),
        lambda found: report.lens(found, name),
    )
    induction = step("The induction head", lambda: show.induction(bridge), report.induction)
    ablation = step("Ablation of each head", lambda: show.ablate(bridge), report.ablation)
    patching = step("Activation patching", lambda: show.patch(bridge), report.patching)
    if out is not None:
        others = [
            show.read(bridge, "indirect object", bridge.to_tokens(show.IOI.prompt)),
            show.read(bridge, "repeated words", induction.tokens[:1]),
        ]
        step(
            "The page",
            lambda: page.write(out, bridge, [reading, *others], induction, ablation, patching),
            lambda size: report.indented(f"{out.resolve()} ({size / 1024:.0f} KiB)"),
        )


# --- lensbridge points ---------------------------------------------------------------------------


@app.command()
def points(
    model: Annotated[str, typer.Argument(help="A name on the Hugging Face hub, or a folder.")],
    layer: Annotated[int, typer.Option(help="The layer to show.")] = 0,
) -> None:
    """Print the tree of a model's hook points.

    The model is built from its config alone; no weights are loaded.
    """
    from .bridge import TransformerBridge
    from .hooks import LensError

    try:
        bridge = TransformerBridge(_skeleton(model))
    except (OSError, ValueError, LensError) as error:
        raise _failure(error) from error
    layers = bridge.cfg.n_layers
    if not 0 <= layer < layers:
        problem = f"{model} has layers 0 to {layers - 1}, not {layer}"
        raise typer.BadParameter(problem, param_hint="--layer")
    typer.echo(f"{bridge!r}\n\n{report.tree(bridge.registry, layer)}")


def _skeleton(name_or_path: str) -> nn.Module:
    """A model built from its config on the meta device: no memory for weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind: Any = next(filter(None, named), None)
    with torch.device("meta"):
        if kind is None:
            return transformers.AutoModelForCausalLM.from_config(config)
        return kind._from_config(config)


# --- lensbridge extract --------------------------------------------------------------------------


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="A name on the Hugging Face hub, or a folder.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="A .txt file (a text a line), a .jsonl file (text or input_ids a line), or a folder that "
            "datasets' save_to_disk wrote."
        ),
    ],
    points: Annotated[
        list[str],
        typer.Option(help="A layer's index, a hook point or a module's path; again for each."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    batch_size: Annotated[int, typer.Option(help="How many samples run together.")] = 8,
    max_samples: Annotated[int | None, typer.Option(help="How many samples to read.")] = None,
    max_length: Annotated[int | None, typer.Option(help="How many tokens of each.")] = None,
    positions: Annotated[
        str, typer.Option(help="Which tokens have rows: all, last, mean, or indices: 0,-1.")
    ] = "all",
    dtype: Annotated[str | None, typer.Option(help="Dtype of the rows, such as bfloat16.")] = None,
    model_dtype: Annotated[str, typer.Option(help="Dtype of the parameters.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Where to run; under torchrun a GPU for each process.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL.")] = None,
    shard_mib: Annotated[int, typer.Option(help="From what size on a shard is written.")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with MODEL.")
    ] = False,
) -> None:
    """Write a model's activations on a dataset to a folder of safetensors shards.

    Over several processes: torchrun --nproc-per-node 8 -m lensbridge extract MODEL DATA ...
    """
    from .bridge import TransformerBridge
    from .hooks import LensError
    from .methods import extract_to
    from .methods.store.ranks import home_of_rank, is_first
    from .methods.store.sources import dataset_at

    try:
        dataset = dataset_at(data)
        bridge = TransformerBridge.boot_transformers(
            model,
            device=device or home_of_rank(),
            dtype=_dtype(model_dtype, "--model-dtype"),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        found = extract_to(
            out,
            bridge,
            dataset,
            [int(name) if _is_index(name) else name for name in points],
            batch_size=batch_size,
            max_samples=max_samples,
            max_length=max_length,
            positions=_positions(positions),
            dtype=None if dtype is None else _dtype(dtype, "--dtype"),
            shard_bytes=shard_mib * 2**20,
            resume=resume,
            progress=sys.stderr.isatty(),
        )
    except (OSError, ValueError, LensError) as error:
        raise _failure(error) from error
    if is_first():
        size = sum(shard["bytes"] for shard in found.index["shards"])
        typer.echo(
            f"{len(found)} samples, {found.n_rows} rows of {', '.join(found.points)}: "
            f"{size / 2**20:.1f} MiB in {len(found.index['shards'])} shards at {out.resolve()}"
        )


def _is_index(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _positions(text: str) -> Any:
    parts = text.split(",")
    return [int(part) for part in parts] if all(map(_is_index, parts)) else text


def _dtype(name: str, option: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise typer.BadParameter(f"{name!r} is no dtype of torch", param_hint=option)
    return found
