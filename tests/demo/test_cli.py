"""What ``lensbridge demo`` prints is what plain transformers computes."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lensbridge
from lensbridge import TransformerBridge, demo
from lensbridge.cli import app
from lensbridge.demo import report, show

FRANCE, ITALY = "The capital of France is", "The capital of Italy is"
MARY = "When Mary and John went to the shop, John gave a drink to"
ROOT = Path(lensbridge.__file__).parents[1]


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.path())


@functools.cache
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path(), attn_implementation="eager").eval()


def ids_of(text: str) -> Tensor:
    return torch.tensor([[tokenizer().bos_token_id, *tokenizer()(text)["input_ids"]]])


def token_id(word: str) -> int:
    (token,) = tokenizer()(word)["input_ids"]
    return token


@torch.no_grad()
def last_logits(text: str) -> Tensor:
    return plain()(ids_of(text)).logits[0, -1]


def with_pre_hook(module: nn.Module, edit: Callable[[Tensor], Tensor], text: str) -> Tensor:
    """The last logits with a hand-written hook on a module's first argument."""
    handle = module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        return last_logits(text)
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "page.html"


@pytest.fixture(scope="module")
def printed(page: Path) -> str:
    """What ``lensbridge demo`` prints."""
    result = command("demo", "--out", str(page))
    assert result.exit_code == 0, result.output
    return result.stdout


def section(text: str, title: str) -> str:
    """The text under one heading."""
    found = re.search(
        rf"^\d  {re.escape(title)} ─+ [\d.]+ s\n(.*?)(?=^\d  |^Done)",
        text,
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None, title
    return found[1]


def grid(text: str) -> list[list[float]]:
    """The numbers of a table whose lines begin with a layer."""
    return [
        [float(value.rstrip("%")) for value in match.split()]
        for match in re.findall(r"^   layer \d+ +([-+.\d% ]+)$", text, re.MULTILINE)
    ]


# --------------------------------------------------------------------------- the sections


def test_model(printed: str) -> None:
    text = " ".join(section(printed, "The model").split())
    config = plain().config
    assert f"GPT2LMHeadModel: {config.n_layer} layers of {config.n_head} heads" in text
    assert f"{sum(p.numel() for p in plain().parameters()):,} parameters" in text


def names_in(tree: str) -> list[str]:
    """The point names that a printed tree stands for."""
    names: list[str] = []
    path: list[str] = []
    for line in tree.splitlines():
        match = re.match(r"((?:│  |   )*)[├└]─ (\S+) *(\[)?", line)
        assert match is not None, line
        depth = len(match[1]) // 3
        path[depth:] = [match[2]]
        if match[3]:
            names.append(".".join(path))
    return names


@pytest.mark.parametrize("layer", [0, 2])
def test_tree_holds_every_point_and_alias(layer: int) -> None:
    bridge = TransformerBridge(plain())
    other = re.compile(rf"blocks\.(?!{layer}\.)\d+\.")
    expected = [name for name in bridge.registry if not other.match(name)]
    tree = report.tree(bridge.registry, layer)
    names = [name.replace("{i}", str(layer)) for name in names_in(tree)]
    assert sorted(names) == sorted(expected)
    for name in expected:
        for alias in bridge.registry[name].aliases:
            assert alias.removeprefix(f"blocks.{layer}.") in tree


def test_points_are_printed(printed: str) -> None:
    text = section(printed, "Its hook points")
    for line in report.tree(TransformerBridge(plain()).registry).splitlines():
        assert line in text
    assert f"i is 0 to {plain().config.n_layer - 1}" in text


@pytest.mark.parametrize("prompt", [FRANCE, "3 + 4 =", "Then Mary"])
def test_continuation(prompt: str) -> None:
    printed = command("demo", "--no-page", "--prompt", prompt).stdout
    with torch.no_grad():
        out = plain().generate(ids_of(prompt), max_new_tokens=24, do_sample=False)
    expected = tokenizer().decode(out[0], skip_special_tokens=True)
    found = " ".join(section(printed, "A continuation, greedy").split())
    assert found.replace(" ▸", "") == " ".join(expected.split())


def test_continuation_that_ends_at_once() -> None:
    assert report.continuation("The end.", "").strip() == "The end. ▸ (the document ends here)"


def test_cache(printed: str) -> None:
    text = section(printed, "One run with every activation cached")
    registry = TransformerBridge(plain()).registry
    assert f"{sum(point.is_default for point in registry.values())} activations" in text
    width, config = ids_of(FRANCE).shape[1], plain().config
    assert re.search(rf"cache\['resid_post', -1\] +\[1, {width}, {config.n_embd}\]", text)
    assert re.search(rf"cache\['pattern', 0\] +\[1, {config.n_head}, {width}, {width}\]", text)
    found = re.search(r"at most (\S+) away", text)
    assert found is not None
    assert float(found[1]) < 1e-4


def test_lens_says_what_the_model_says(printed: str) -> None:
    text = section(printed, "The logit lens")
    probability, token = last_logits(FRANCE).softmax(-1).max(-1)
    answer = tokenizer().decode([int(token)])
    assert answer == " Paris"
    assert f'the answer is "{answer}"' in text
    last = text.strip().splitlines()[-1]
    assert re.search(rf'"{answer}" {float(probability):.1%}', last)


def test_lens_through_depth(printed: str) -> None:
    rows = re.findall(
        r"^   (\S.*?)  [█·]{20} +([\d.]+)%", section(printed, "The logit lens"), re.MULTILINE
    )
    transformer = plain().transformer
    streams: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        for block in [*transformer.h, transformer.ln_f]
    ]
    answer = int(last_logits(FRANCE).argmax())
    for handle in handles:
        handle.remove()
    names = ["embeddings", *(f"layer {layer}" for layer in range(plain().config.n_layer))]
    assert [name.strip() for name, _ in rows] == names
    for stream, (_, value) in zip(streams, rows, strict=True):
        with torch.no_grad():
            logits = plain().lm_head(transformer.ln_f(stream))[0, -1]
        assert float(value) == pytest.approx(100 * float(logits.softmax(-1)[answer]), abs=0.051)


def test_induction_scores(printed: str) -> None:
    text = section(printed, "The induction head")
    with torch.no_grad():
        found = show.induction(TransformerBridge(plain(), tokenizer()))
        attentions = plain()(found.tokens, output_attentions=True).attentions
    period = found.period
    assert torch.equal(found.tokens[:, 1 : 1 + period], found.tokens[:, 1 + period :])
    queries = range(period + 1, 2 * period + 1)
    scores = {
        (layer, head): torch.stack([pattern[:, head, q, q - period + 1] for q in queries]).mean()
        for layer, pattern in enumerate(attentions)
        for head in range(pattern.shape[1])
    }
    for layer, row in enumerate(grid(text)):
        for head, value in enumerate(row):
            assert value == pytest.approx(float(scores[layer, head]), abs=6e-4)
    layer, head = max(scores, key=lambda where: scores[where])
    assert f"layer {layer}, head {head}: {float(scores[layer, head]):.3f}" in text
    assert scores[layer, head] > 0.4


def lead(logits: Tensor) -> float:
    return float(logits[token_id(" Mary")] - logits[token_id(" John")])


def test_ablation(printed: str) -> None:
    text = section(printed, "Ablation of each head")
    config, baseline = plain().config, lead(last_logits(MARY))
    size = config.n_embd // config.n_head

    def without(layer: int, head: int) -> float:
        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            z[..., head * size : (head + 1) * size] = 0
            return z

        return lead(with_pre_hook(plain().transformer.h[layer].attn.c_proj, edit, MARY))

    heads = list(itertools.product(range(config.n_layer), range(config.n_head)))
    changes = {where: without(*where) - baseline for where in heads}
    found = grid(text)
    assert [len(row) for row in found] == [config.n_head] * config.n_layer
    for layer, head in heads:
        assert found[layer][head] == pytest.approx(changes[layer, head], abs=6e-4)
    layer, head = max(changes, key=lambda where: abs(changes[where]))
    after = changes[layer, head] + baseline
    assert f"layer {layer}, head {head}: {baseline:+.3f} becomes {after:+.3f}" in text
    assert abs(changes[layer, head]) > 0.5


def test_patching(printed: str) -> None:
    text = section(printed, "Activation patching")
    blocks = plain().transformer.h
    paris = token_id(" Paris")

    def probability(logits: Tensor) -> float:
        return 100 * float(logits.softmax(-1)[paris])

    clean: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: clean.append(args[0])) for block in blocks
    ]
    last_logits(FRANCE)
    for handle in handles:
        handle.remove()

    def patched(layer: int, pos: int) -> float:
        def edit(stream: Tensor) -> Tensor:
            return torch.cat([stream[:, :pos], clean[layer][:, [pos]], stream[:, pos + 1 :]], 1)

        return probability(with_pre_hook(blocks[layer], edit, ITALY))

    found = grid(text)
    assert len(found) == len(blocks)
    for layer, row in enumerate(found):
        assert len(row) == ids_of(ITALY).shape[1]
        for pos, value in enumerate(row):
            assert value == pytest.approx(patched(layer, pos), abs=0.051)
    # The country is where it was read, until the last position has it.
    assert max(map(max, found)) > 50 > probability(last_logits(ITALY))


def test_fits_a_terminal(printed: str, page: Path) -> None:
    lines = printed.replace(str(page), "").splitlines()
    assert max(map(len, lines)) <= 100


def test_page_is_announced_and_written(printed: str, page: Path) -> None:
    assert page.stat().st_size > 10_000
    assert str(page.resolve()) in section(printed, "The page")


# ---------------------------------------------------------------------------- the command


def test_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("demo", "--no-page")
    assert result.exit_code == 0
    assert "The page" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_default_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("demo", "--prompt", "3 + 4 =").exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["lensbridge-demo.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "missing/page.html"], "--out: there is no folder missing"),
        (["--out", "."], "is a folder; name a file"),
        (["--prompt", " "], "--prompt: the prompt is empty"),
        (["--prompt", " the" * 64], "--prompt: the prompt is 65 tokens long"),
        (["--pages"], "--pages"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("demo", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = command("demo")
    assert result.exit_code == 1
    assert "Error: The demo checkpoint is missing" in result.output
    assert "Traceback" not in result.output


def test_longest_prompt() -> None:
    result = command("demo", "--no-page", "--prompt", " the" * (show.MAX_TOKENS - 1))
    assert result.exit_code == 0
    assert f"[1, {show.MAX_TOKENS}, " in result.stdout


def test_odd_prompt() -> None:
    result = command("demo", "--no-page", "--prompt", "Grüße,\t世界\n🎉")
    assert result.exit_code == 0, result.output


def test_version() -> None:
    assert command("--version").stdout.strip() == f"lensbridge {lensbridge.__version__}"


def test_module_runs_and_help_needs_no_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['lensbridge', '--help']\n"
        "try: runpy.run_module('lensbridge', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "points" in done.stdout


# ----------------------------------------------------------------------- lensbridge points


def test_points_of_a_checkpoint() -> None:
    result = command("points", str(demo.path()), "--layer", "1")
    assert result.exit_code == 0, result.output
    bridge = TransformerBridge(plain())
    assert result.stdout == f"{bridge!r}\n\n{report.tree(bridge.registry, 1)}\n"


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_points_of_a_config(name: str, tiny: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny(name)
    model.config.save_pretrained(tmp_path)
    result = command("points", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().endswith(report.tree(TransformerBridge(model).registry))


def test_points_layer_out_of_range() -> None:
    result = command("points", str(demo.path()), "--layer", "99")
    assert result.exit_code == 2
    assert f"has layers 0 to {plain().config.n_layer - 1}, not 99" in " ".join(
        result.output.split()
    )


def test_points_of_nothing(tmp_path: Path) -> None:
    result = command("points", str(tmp_path))
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "Traceback" not in result.output
