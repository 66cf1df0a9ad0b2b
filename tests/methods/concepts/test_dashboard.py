"""What concepts say, and the page about them: numbers by hand, and what is in the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import InputError, ModelWithSplitPoints, TransformerBridge
from lensbridge.methods.concepts.dashboard import dashboard
from lensbridge.methods.concepts.effects import logit_effects, top_tokens

POINT = "blocks.1.hook_out"
TEXTS = ["The capital of France is Paris.", "2 < 3 & 4", "When Mary and John went to the shop."]


class Explainer:
    """Codes are the positive parts of some fixed directions; the last is never active."""

    split_point = POINT

    def __init__(self, splitter: ModelWithSplitPoints) -> None:
        self.splitter = splitter
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(4, int(splitter.bridge.cfg.d_model or 0), generator=generator)
        self.rows[-1] = 0

    def get_dictionary(self) -> Tensor:
        return self.rows

    def encode_activations(self, x: Tensor) -> Tensor:
        return (x @ self.rows.T).relu()


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    """On the embedded model."""
    from lensbridge import demo

    bridge = TransformerBridge.boot_transformers(str(demo.path()))
    return Explainer(ModelWithSplitPoints(bridge, split_points=POINT))


class Page(HTMLParser):
    """Checks that tags close, and keeps the words."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


# --- effects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_effects_against_the_slope_of_the_logits(tiny: Callable[..., nn.Module], name: str) -> None:
    """Straight through the head: with the norm's scale held, what moving the stream does to the logits."""
    bridge = TransformerBridge(tiny(name))
    model: Any = bridge.original_model
    directions = torch.randn(3, int(bridge.cfg.d_model or 0))
    found = logit_effects(bridge, directions)
    norm = model.transformer.ln_f if name == "gpt2" else model.model.norm
    gain = 1 + norm.weight if name == "gemma2" else norm.weight
    centred = directions - directions.mean(-1, keepdim=True) if name == "gpt2" else directions
    expected = (centred * gain) @ model.lm_head.weight.T
    assert torch.allclose(found, expected, atol=1e-4)
    with pytest.raises(InputError, match="and not 5"):
        logit_effects(bridge, torch.ones(2, 5))


def test_top_tokens(explainer: Explainer) -> None:
    """The highest and lowest of a row, by name."""
    bridge = explainer.splitter.bridge
    effects = torch.zeros(int(bridge.cfg.d_vocab or 0))
    ids = {word: bridge.to_tokens(word, prepend_bos=False)[0, 0] for word in (" Paris", " Rome")}
    effects[ids[" Paris"]], effects[ids[" Rome"]] = 3.0, -2.0
    for_it, against = top_tokens(bridge, effects, k=1)
    assert for_it == [(" Paris", 3.0)]
    assert against == [(" Rome", -2.0)]


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page(explainer: Explainer, tmp_path: Path) -> None:
    """Every concept has its section, examples, effects and histogram; nothing is fetched from anywhere."""
    path = dashboard(
        explainer, TEXTS, tmp_path / "deep" / "page.html", k=3, labels={1: "a <name>", 2: None}
    )
    html = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.open == []
    assert not re.search(r"https?:|src=|@import|url\(", html)
    assert html.count("<section") == 4
    assert "a &lt;name&gt;" in html
    assert html.count("<svg") == html.count("speaks for") == 3
    assert "Never active on these texts." in html
    assert "2 < 3 & 4" in unescape(re.sub(r"<[^>]+>", "", html))
    again = dashboard(explainer, TEXTS, tmp_path / "again.html", k=3, labels={1: "a <name>"})
    assert again.read_text(encoding="utf-8") == html


def test_examples_are_marked(explainer: Explainer, tmp_path: Path) -> None:
    """The strongest token of a concept is the bold one of its first line, with its activation."""
    rows, _ = explainer.splitter.get_activations(TEXTS, flatten_activations=False)
    codes = [explainer.encode_activations(x)[:, 0] for x in rows]
    text = max(range(3), key=lambda n: float(codes[n].max()))
    at = int(codes[text].argmax())
    spans = explainer.splitter.tokenizer(TEXTS[text], return_offsets_mapping=True)["offset_mapping"]
    real = [span for span in spans if span[1] > span[0]]
    word = TEXTS[text][slice(*real[at])].strip()
    html = dashboard(explainer, TEXTS, tmp_path / "page.html", concepts=0).read_text()
    line = re.search(r"<li>(.*?)</li>", html)
    assert line is not None
    assert f">{float(codes[text].max()):.3g}</span>" in line.group(1)
    bold = re.search(r"<b>(.*?)</b>", line.group(1))
    assert bold is not None
    assert re.sub(r"<[^>]+>", "", bold.group(1)).strip() == word
    assert TEXTS[text][:8] in unescape(re.sub(r"<[^>]+>", "", line.group(1)))


def test_what_is_refused(explainer: Explainer, tmp_path: Path) -> None:
    """No texts, or a concept that is not there; no file is left."""
    with pytest.raises(InputError, match="a list of texts"):
        dashboard(explainer, [], tmp_path / "page.html")
    with pytest.raises(InputError, match="there are 0 to 3"):
        dashboard(explainer, TEXTS, tmp_path / "page.html", concepts=[4])
    assert not (tmp_path / "page.html").exists()
