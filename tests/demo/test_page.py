"""The demo's page stands alone and holds the model's own numbers."""

from __future__ import annotations

import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lensbridge import TransformerBridge, demo
from lensbridge.demo import page, show

PROMPT = "The capital of France is"
HOSTILE = 'A </script><script>alert("1")</script> <!-- {{data}} {{prompt}} & &lt; \u2028 \\u003c'
HALF = 0.5 * 10**-page.DIGITS + 1e-6  # rounding, and float error
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Parsed(HTMLParser):
    """Elements, texts by element, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.open: list[tuple[str, int]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self.open.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            index = self.open[-1][1]
            self.texts[index] = self.texts.get(index, "") + data

    def text_of(self, tag: str, **attributes: str) -> str:
        (index,) = [
            i
            for i, (name, attrs) in enumerate(self.elements)
            if name == tag and attributes.items() <= attrs.items()
        ]
        return self.texts[index]


@functools.cache
def bridge() -> TransformerBridge:
    return show.boot()


@functools.cache
def results() -> tuple[show.Induction, show.Ablation, show.Patching]:
    return show.induction(bridge()), show.ablate(bridge()), show.patch(bridge())


@functools.cache
def written(prompt: str = PROMPT) -> str:
    """The page for one prompt, as the command makes it."""
    induction, ablation, patching = results()
    readings = [
        show.read(bridge(), "the prompt", bridge().to_tokens(prompt)),
        show.read(bridge(), "repeated words", induction.tokens[:1]),
    ]
    data = page.build(bridge(), readings, induction, ablation, patching)
    return page.render(data)


def data_of(text: str) -> dict[str, Any]:
    return json.loads(Parsed(text).text_of("script", id="data"))


@functools.cache
def plain(text: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Attentions and logits of plain transformers under eager attention."""
    model = AutoModelForCausalLM.from_pretrained(demo.path(), attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    return out.attentions, out.logits


# ---------------------------------------------------------------------------- it stands alone


@pytest.mark.parametrize("prompt", [PROMPT, HOSTILE])
def test_well_formed(prompt: str) -> None:
    text = written(prompt)
    parsed = Parsed(text)
    assert text.startswith("<!doctype html>")
    assert parsed.open == []
    assert [attrs.get("type") for tag, attrs in parsed.elements if tag == "script"] == [
        "application/json",
        None,
    ]
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_references_nothing_outside() -> None:
    text = written()
    parsed = Parsed(text)
    loading = {"src", "href", "srcset", "action", "poster", "background", "formaction"}
    assert not [attrs for _, attrs in parsed.elements if loading & attrs.keys()]
    assert not {"link", "iframe", "img", "object", "embed", "base"} & {
        t for t, _ in parsed.elements
    }
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|import\(|WebSocket", text)
    (policy,) = [
        attrs["content"]
        for tag, attrs in parsed.elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_script_finds_its_elements() -> None:
    parsed = Parsed(written())
    script = next(
        parsed.texts[i]
        for i, (tag, attrs) in enumerate(parsed.elements)
        if tag == "script" and not attrs
    )
    ids = {attrs["id"] for _, attrs in parsed.elements if "id" in attrs}
    used = set(re.findall(r"\$\(\"([\w-]+)\"\)", script))
    assert used
    assert used <= ids
    labels = {
        name
        for _, attrs in parsed.elements
        for key in ("aria-labelledby", "aria-describedby")
        for name in str(attrs.get(key) or "").split()
    }
    assert labels <= ids


def test_html_is_only_made_from_text() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", written())


def test_dark_and_light() -> None:
    style = Parsed(written()).text_of("style")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    variables = set(re.findall(r"(--\w+):", light))
    used = set(re.findall(r"var\((--\w+)\)", style))
    redefined = set(re.findall(r"(--\w+):", dark))
    assert used <= variables == redefined


def test_hostile_prompt_arrives_as_it_is() -> None:
    text = written(HOSTILE)
    assert data_of(text)["readings"][0]["text"] == HOSTILE
    assert Parsed(text).text_of("title") == f"lensbridge: {HOSTILE}"


# -------------------------------------------------------------------- it holds the model's numbers


def test_patterns() -> None:
    reading = data_of(written())["readings"][0]
    attentions, _ = plain(PROMPT)
    found = torch.tensor(reading["pattern"])
    assert found.shape == (len(attentions), *attentions[0].shape[1:])
    assert (found - torch.cat(attentions)).abs().max() <= HALF
    assert reading["tokens"] == ["<|endoftext|>", "The", " capital", " of", " France", " is"]


def test_every_reading_has_every_head_and_depth() -> None:
    data = data_of(written())
    model = data["model"]
    config = bridge().original_model.config
    assert (model["layers"], model["heads"]) == (config.n_layer, config.n_head)
    for reading in data["readings"]:
        n = len(reading["tokens"])
        assert torch.tensor(reading["pattern"]).shape == (model["layers"], model["heads"], n, n)
        assert len(reading["lens"]) == len(reading["depths"]) == model["layers"] + 1
        assert {len(row) for row in reading["lens"]} == {n}


def test_patterns_equal_the_cache() -> None:
    tokens = results()[0].tokens[:1]
    _, cache = show.run(bridge(), tokens)
    found = torch.tensor(data_of(written())["readings"][1]["pattern"])
    for layer, pattern in enumerate(found):
        assert (pattern - cache["pattern", layer][0]).abs().max() <= HALF


def test_lens() -> None:
    lens = data_of(written())["readings"][0]["lens"]
    _, logits = plain(PROMPT)
    top = logits[0].softmax(-1).topk(page.TOP)
    for pos, cell in enumerate(lens[-1]):
        values = [value for _, value in cell]
        assert values == pytest.approx(top.values[pos].tolist(), abs=HALF)
        assert values == sorted(values, reverse=True)
    assert lens[-1][-1][0][0] == " Paris"


def test_heads_and_patches() -> None:
    data = data_of(written())
    induction, ablation, patching = results()
    pairs = [
        (data["induction"]["score"], induction.score),
        (data["ablation"]["change"], ablation.change),
        (data["ablation"]["ablated"], ablation.ablated),
        (data["patching"]["patched"], patching.patched),
    ]
    for found, expected in pairs:
        assert torch.tensor(found).shape == expected.shape
        assert (torch.tensor(found) - expected).abs().max() <= HALF
    assert data["ablation"]["baseline"] == pytest.approx(ablation.baseline, abs=HALF)
    layer, head = data["ablation"]["best"]
    assert abs(ablation.change[layer, head]) == ablation.change.abs().max()
    layer, head = data["induction"]["best"]
    assert induction.score[layer, head] == induction.score.max()


def test_write_returns_the_size(tmp_path: Path) -> None:
    induction, ablation, patching = results()
    reading = show.read(bridge(), "the prompt", bridge().to_tokens(PROMPT))
    out = tmp_path / "page.html"
    size = page.write(out, bridge(), [reading], induction, ablation, patching)
    assert size == out.stat().st_size
    assert data_of(out.read_text(encoding="utf-8"))["readings"][0]["tokens"] == reading.tokens


def test_size() -> None:
    assert len(written()) < 500_000
