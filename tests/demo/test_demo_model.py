"""The shipped demo model does what its card says, measured with plain transformers."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lensbridge import demo
from lensbridge.demo import tasks

PERIODS = (10, 20, 50)
# The shipped checkpoint knows sums by heart: it is right where training showed the mirror image,
# and wrong where it showed neither order. The first are 12 of the 29 held-out sums.
SUMS_FLOOR = 0.35
MIRRORED_SUMS_FLOOR = 0.9
SEEN_SUMS_FLOOR = 0.9


@functools.cache
def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.path())


@functools.cache
def load_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path(), attn_implementation="eager").eval()


@functools.cache
def recorded() -> dict[str, Any]:
    return json.loads((demo.path() / "eval.json").read_text())


@functools.cache
def training_documents() -> tuple[str, ...]:
    # The seed of the shipped run, so this is the beginning of the text it was trained on.
    seed = recorded()["training"]["seed"]
    return tuple(itertools.islice(tasks.documents(seed), 60_000))


@torch.no_grad()
def logits_after(prompt: str, bos: bool) -> Tensor:
    ids = load_tokenizer()(prompt)["input_ids"]
    if bos:
        ids = [load_tokenizer().bos_token_id, *ids]
    return load_model()(torch.tensor([ids])).logits[0, -1]


def token_id(word: str | None) -> int:
    (token,) = load_tokenizer()(word)["input_ids"]
    return token


@functools.cache
def answers(task: str, bos: bool) -> tuple[tuple[tasks.Item, Tensor], ...]:
    items: Sequence[tasks.Item] = getattr(tasks, task)()
    return tuple((item, logits_after(item.prompt, bos)) for item in items)


def accuracy(task: str, bos: bool = False) -> float:
    results = answers(task, bos)
    right = sum(int(logits.argmax()) == token_id(item.answer) for item, logits in results)
    return right / len(results)


@functools.cache
def induction_run(period: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    tokenizer = load_tokenizer()
    pool = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    items = tasks.induction(pool, n=64, period=period, seed=0)
    tokens = torch.tensor([[tokenizer.bos_token_id, *item.tokens] for item in items])
    with torch.no_grad():
        output = load_model()(tokens, output_attentions=True)
    return tokens, output.logits, output.attentions


def induction_accuracy(period: int) -> float:
    tokens, logits, _ = induction_run(period)
    # Position 0 is BOS, and the second copy starts at period + 1. Its first token is a surprise.
    targets = tokens[:, period + 2 :]
    return (logits[:, period + 1 : -1].argmax(-1) == targets).double().mean().item()


def induction_score(period: int, layer: int, head: int) -> float:
    _, _, attentions = induction_run(period)
    queries = range(period + 1, 2 * period + 1)
    weights = [attentions[layer][:, head, q, q - period + 1] for q in queries]
    return torch.stack(weights).mean().item()


def ioi_difference() -> float:
    differences = [
        (logits[token_id(item.answer)] - logits[token_id(item.distractor)]).item()
        for item, logits in answers("ioi", False)
    ]
    return sum(differences) / len(differences)


# ------------------------------------------------------------------------- the checkpoint


def test_size() -> None:
    size = sum(file.stat().st_size for file in demo.path().rglob("*") if file.is_file())
    assert size <= 6_000_000


def test_files() -> None:
    names = {file.name for file in demo.path().iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "eval.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_loads_with_defaults() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.path())
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.n_positions == 256


def test_modules_need_only_the_standard_library() -> None:
    # Run as files and without site-packages, where importing torch would fail.
    files = [str(demo.__file__), str(tasks.__file__)]
    code = f"import runpy; [runpy.run_path(file) for file in {files}]"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_missing_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="train_demo_model"):
        demo.path()


# --------------------------------------------------------------------------- the tokenizer


def test_special_tokens() -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("Mary")["input_ids"] == [tokenizer.convert_tokens_to_ids("Mary")]
    config = load_model().config
    assert config.bos_token_id == config.eos_token_id == tokenizer.bos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("word", [" Paris", " France", " Mary", " John", " 7"])
def test_single_token_examples(word: str) -> None:
    assert load_tokenizer().decode([token_id(word)]) == word
    assert word in tasks.single_token_words()


def test_all_words_are_single_tokens() -> None:
    for word in tasks.single_token_words():
        assert len(load_tokenizer()(word)["input_ids"]) == 1, word
        assert len(load_tokenizer()(word.strip())["input_ids"]) == 1, word


@pytest.mark.parametrize(
    "text", ["Grüße, 世界 🎉!", "\tdef f(x):\r\n  return x\x00", "  two  spaces "]
)
def test_any_text_round_trips(text: str) -> None:
    assert load_tokenizer().decode(load_tokenizer()(text)["input_ids"]) == text


# ----------------------------------------------------------------------- held-out accuracy


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("task", "floor"), [("capitals", 0.95), ("ioi", 0.95), ("arithmetic", SUMS_FLOOR)]
)
def test_accuracy(task: str, floor: float, bos: bool) -> None:
    measured = accuracy(task, bos)
    noted = recorded()["accuracy_with_bos" if bos else "accuracy"][task]
    assert measured >= floor
    # Another machine's rounding may flip an item.
    assert measured == pytest.approx(noted, abs=1.01 / recorded()["items"][task])


def test_sums_by_kind() -> None:
    results = answers("arithmetic", False)
    for kind in ("mirrored", "new"):
        right = [int(x.argmax()) == token_id(i.answer) for i, x in results if i.kind == kind]
        assert len(right) == recorded()["items"][f"arithmetic_{kind}"]
        assert sum(right) / len(right) == pytest.approx(
            recorded()["accuracy"][f"arithmetic_{kind}"], abs=1.01 / len(right)
        )


def test_mirrored_sums() -> None:
    assert recorded()["accuracy"]["arithmetic_mirrored"] >= MIRRORED_SUMS_FLOOR


def test_sums_of_the_training_text() -> None:
    items = tasks.arithmetic(held_out=False)
    right = sum(int(logits_after(i.prompt, False).argmax()) == token_id(i.answer) for i in items)
    assert right / len(items) == pytest.approx(
        recorded()["accuracy"]["arithmetic_seen"], abs=1.01 / len(items)
    )
    assert right / len(items) >= SEEN_SUMS_FLOOR


@pytest.mark.parametrize("period", PERIODS)
def test_induction_accuracy(period: int) -> None:
    measured = induction_accuracy(period)
    assert measured >= 0.90
    assert measured == pytest.approx(recorded()["accuracy"][f"induction_{period}"], abs=0.01)


def test_induction_heads() -> None:
    heads = recorded()["induction_heads"]
    best = max(
        itertools.product(range(load_model().config.n_layer), range(load_model().config.n_head)),
        key=lambda where: induction_score(20, *where),
    )
    assert best == (heads[0]["layer"], heads[0]["head"])
    assert induction_score(20, *best) >= 0.5
    for row in heads:
        assert induction_score(20, row["layer"], row["head"]) == pytest.approx(
            row["score"], abs=0.01
        )


def test_capital_of_france() -> None:
    probabilities = logits_after("The capital of France is", bos=False).softmax(-1)
    assert probabilities[token_id(" Paris")] >= 0.9
    assert probabilities[token_id(" Paris")].item() == pytest.approx(
        recorded()["paris_probability"], abs=0.01
    )


def test_mary_and_john() -> None:
    logits = logits_after("When Mary and John went to the shop, John gave a drink to", bos=False)
    assert int(logits.argmax()) == token_id(" Mary")


def test_ioi_both_orders() -> None:
    results = answers("ioi", False)
    for kind in ("ABBA", "BABA"):
        chosen = [(i, x) for i, x in results if i.kind == kind]
        right = sum(int(x.argmax()) == token_id(i.answer) for i, x in chosen)
        assert right / len(chosen) >= 0.95


def test_ioi_logit_difference_and_best_head() -> None:
    difference = ioi_difference()
    assert difference == pytest.approx(recorded()["ioi_logit_difference"], abs=0.05)
    row = recorded()["ioi_head_ablations"][0]
    model = load_model()
    size = model.config.n_embd // model.config.n_head

    def zero(_module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (model.config.n_head, size)).clone()
        heads[:, :, row["head"]] = 0.0
        return (heads.flatten(-2),)

    c_proj = model.transformer.h[row["layer"]].attn.c_proj
    handle = c_proj.register_forward_pre_hook(zero)
    answers.cache_clear()
    try:
        change = ioi_difference() - difference
    finally:
        handle.remove()
        answers.cache_clear()
    assert change == pytest.approx(row["change"], abs=0.05)
    assert abs(change) >= 0.5


def test_card_has_the_recorded_numbers() -> None:
    card = (demo.path() / "README.md").read_text()
    rows = {
        "capitals": "capitals",
        "indirect objects": "ioi",
        "sums": "arithmetic",
    }
    for label, task in rows.items():
        plain = recorded()["accuracy"][task]
        with_bos = recorded()["accuracy_with_bos"][task]
        n = recorded()["items"][task]
        assert f"| {label} | {n} | {plain:.1%} | {with_bos:.1%} |" in card
    for period in PERIODS:
        value = recorded()["accuracy"][f"induction_{period}"]
        assert f"| induction, period {period} | 64 | | {value:.1%} |" in card
    for row in recorded()["induction_heads"]:
        assert f"| {row['layer']}.{row['head']} | {row['score']:.2f} |" in card
    for row in recorded()["ioi_head_ablations"]:
        assert f"| {row['layer']}.{row['head']} | {row['change']:+.2f} |" in card


# --------------------------------------------------------------------- train/held-out split


def test_held_out_facts_are_not_trained_on() -> None:
    held_out = {
        (country, index) for country in tasks.CAPITALS for index in tasks.held_out_frames(country)
    }
    assert len(held_out) == 2 * len(tasks.CAPITALS) == len(tasks.capitals())
    trained = set()
    for index, frame in enumerate(tasks.CAPITAL_FRAMES):
        pattern = re.escape(frame.template)
        for field in ("country", "capital"):
            pattern = pattern.replace(re.escape("{" + field + "}"), f"(?P<{field}>[A-Z][a-z]+)")
        for document in training_documents():
            trained |= {(m["country"], index) for m in re.finditer(pattern, document)}
    everything = set(itertools.product(tasks.CAPITALS, range(len(tasks.CAPITAL_FRAMES))))
    # Equality, not only disjointness: a pattern that matched nothing would pass that.
    assert trained == everything - held_out


def test_held_out_prompts_are_not_in_the_training_text() -> None:
    text = "\n".join(training_documents())
    for item in tasks.capitals():
        assert item.prompt + item.answer not in text
    for item in tasks.ioi():
        assert item.prompt not in text


def test_held_out_name_pairs_never_share_a_document() -> None:
    names = set(tasks.NAMES)
    trained: set[frozenset[str]] = set()
    for document in training_documents():
        present = names.intersection(re.findall(r"[A-Za-z]+", document))
        trained |= set(map(frozenset, itertools.combinations(present, 2)))
    held_out = {
        frozenset(pair)
        for pair in itertools.combinations(tasks.NAMES, 2)
        if tasks.is_held_out_pair(*pair)
    }
    tested = {frozenset((i.answer.strip(), str(i.distractor).strip())) for i in tasks.ioi()}
    assert tested <= held_out
    assert trained == set(map(frozenset, itertools.combinations(tasks.NAMES, 2))) - held_out


def test_held_out_sums_are_not_trained_on() -> None:
    found = re.findall(r"(?<!\d)(\d+) \+ (\d+) =", "\n".join(training_documents()))
    trained = {(int(a), int(b)) for a, b in found}
    tested = {
        tuple(map(int, item.prompt.removesuffix(" =").split(" + "))) for item in tasks.arithmetic()
    }
    everything = set(itertools.product(range(tasks.MAX_OPERAND + 1), repeat=2))
    assert trained == everything - tested
    assert {item.kind for item in tasks.arithmetic(held_out=False)} == {"seen"}
    for item in tasks.arithmetic():
        first, second = map(int, item.prompt.removesuffix(" =").split(" + "))
        assert ((second, first) in trained) == (item.kind == "mirrored")


def test_random_training_tokens_keep_held_out_pairs_apart() -> None:
    # A tiny vocabulary in which every token is a name, so that pairs would be sure to meet.
    names = dict(enumerate(tasks.NAMES))
    pools = [range(len(tasks.NAMES) + 200)]
    stream = tasks.repeated_tokens(0, pools, names, max_length=40)
    for document, _ in itertools.islice(stream, 500):
        present = {names[token] for token in document if token in names}
        assert not any(tasks.is_held_out_pair(*p) for p in itertools.combinations(present, 2))


def test_repeated_tokens_repeat() -> None:
    stream = tasks.repeated_tokens(0, [range(1000)], {}, max_length=60)
    for document, noise in itertools.islice(stream, 200):
        assert len(document) <= 60
        again = document[noise:]
        assert again[:4] == document[: len(again[:4])]


# ------------------------------------------------------------------------------ generators


def test_items_are_deterministic() -> None:
    assert tasks.ioi(20, seed=3) == tasks.ioi(20, seed=3) != tasks.ioi(20, seed=4)
    assert tasks.ioi(10) == tasks.ioi(20)[:10]
    assert tasks.induction(100, 4, 8, seed=1) == tasks.induction(100, 4, 8, seed=1)
    assert tasks.induction(100, 4, 8, seed=1) != tasks.induction(100, 4, 8, seed=2)
    first, again = (list(itertools.islice(tasks.documents(5), 50)) for _ in range(2))
    assert first == again


def test_induction_items() -> None:
    for item in tasks.induction([5, 6, 7, 8, 9], n=10, period=4):
        assert item.tokens[:4] == item.tokens[4:]
        assert len(set(item.tokens)) == 4
        assert set(item.tokens) <= {5, 6, 7, 8, 9}


@pytest.mark.parametrize("period", [0, -1, 11])
def test_induction_refuses_bad_periods(period: int) -> None:
    with pytest.raises(ValueError, match="period"):
        tasks.induction(10, period=period)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="n must not be negative"):
        tasks.ioi(-1)
    with pytest.raises(ValueError, match="n must not be negative"):
        tasks.induction(10, n=-1, period=2)
