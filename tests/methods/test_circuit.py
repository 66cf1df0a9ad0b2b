"""Gradients through gated heads: against plain PyTorch on the bare model, and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lensbridge import GradientError, InputError, TransformerBridge, demo
from lensbridge.methods.circuit import CausalCircuitAttribution

DOCUMENT = "Paris is the capital of France. It is one of Europe's largest cities."
SENTENCES = ["Paris is the capital of France.", "It is one of Europe's largest cities."]
SUMMARY = "Paris is the capital of France."

IDS = torch.tensor([[9, 40, 17, 88, 23, 61, 12]])
TARGET = torch.tensor([33, 70, 18])

NAMES = ["gpt2", "llama", "gpt_neox", "qwen3_wide_head"]


# --- by hand ------------------------------------------------------------------------------------------------


def output_projections(model: Any) -> list[nn.Module]:
    """What reads the heads, in each layer."""
    if model.config.model_type == "gpt2":
        return [block.attn.c_proj for block in model.transformer.h]
    if model.config.model_type == "gpt_neox":
        return [layer.attention.dense for layer in model.gpt_neox.layers]
    return [layer.self_attn.o_proj for layer in model.model.layers]


@contextmanager
def gated_by_hand(model: Any, mask: Tensor | None) -> Iterator[None]:
    """Plain forward-pre-hooks on the output projections."""

    def hook(own: Tensor) -> Any:
        def gate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            return ((x.unflatten(-1, (len(own), -1)) * own[:, None]).flatten(-2).to(x.dtype),)

        return gate

    handles = []
    if mask is not None:
        for module, own in zip(output_projections(model), mask, strict=True):
            handles.append(
                module.register_forward_pre_hook(hook(own.to(next(model.parameters()).device)))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def embedding_gradients(
    model: Any, ids: Tensor, target: Tensor, mask: Tensor | None, full: bool
) -> tuple[Tensor, Tensor]:
    """Embeddings [pos, d] and the gradient of the mean log-probability there, by ``inputs_embeds``."""
    counted = target if full else target[:1]
    row = torch.cat([ids[0], counted[:-1]])[None]
    embeds = model.get_input_embeddings()(row).detach().requires_grad_()
    with gated_by_hand(model, mask):
        logits = model(inputs_embeds=embeds).logits[0]
    first = ids.shape[1] - 1
    total = sum(
        logits[first + k].float().log_softmax(-1)[token] for k, token in enumerate(counted)
    ) / len(counted)
    (found,) = torch.autograd.grad(total, embeds)
    n = ids.shape[1]
    return embeds[0, :n].detach(), found[0, :n]


def a_mask(model: Any) -> Tensor:
    """Open, shut and half-open heads."""
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    drawn[0, 0], drawn[0, 1], drawn[-1, -1] = 0.0, 1.0, 0.0
    return drawn


@pytest.fixture(scope="session")
def demo_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.path())


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.path())


@pytest.fixture(scope="session")
def demo_circuit(demo_model: Any, demo_tokenizer: Any) -> CausalCircuitAttribution:
    return CausalCircuitAttribution(demo_model, demo_tokenizer)


# --- tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "demo"])
def test_equal_to_plain_pytorch(
    tiny: Callable[..., Any], demo_model: Any, name: str, gated: bool, full: bool
) -> None:
    model = demo_model if name == "demo" else tiny(name)
    mask = a_mask(model) if gated else None
    values, grads = embedding_gradients(model, IDS, TARGET, mask, full)
    circuit = CausalCircuitAttribution(model)
    norms = circuit.compute_token_gradients(IDS, TARGET, mask, full_target=full)
    torch.testing.assert_close(norms, grads.norm(dim=-1), rtol=1e-5, atol=1e-7)
    products = circuit.compute_token_gradients(
        IDS, TARGET, mask, full_target=full, method="input_x_gradient"
    )
    torch.testing.assert_close(products, (values * grads).sum(-1), rtol=1e-4, atol=1e-6)
    # What is compared is no small thing: gates and target change it.
    assert norms.min() > 1e-6
    if gated:
        open_norms = circuit.compute_token_gradients(IDS, TARGET, full_target=full)
        assert (norms - open_norms).abs().max() > 1e-2 * norms.max()


def test_products_are_slopes(tiny: Callable[..., Any]) -> None:
    """Each is how fast the log-probability grows with the length of its token's embedding."""
    model = tiny("gpt2").double()  # Llama norms in float32
    mask = a_mask(model).double()
    found = CausalCircuitAttribution(model).compute_token_gradients(
        IDS, TARGET, mask, full_target=True, method="input_x_gradient"
    )
    row = torch.cat([IDS[0], TARGET[:-1]])[None]
    embeds = model.get_input_embeddings()(row).detach()

    def log_prob(position: int, change: float) -> float:
        moved = embeds.clone()
        moved[0, position] *= 1 + change
        with torch.no_grad(), gated_by_hand(model, mask):
            logits = model(inputs_embeds=moved).logits[0, IDS.shape[1] - 1 :]
        return float(logits.log_softmax(-1).gather(-1, TARGET[:, None]).mean())

    step = 1e-5
    slopes = [(log_prob(p, step) - log_prob(p, -step)) / (2 * step) for p in range(IDS.shape[1])]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(slopes).double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ones_are_no_mask(tiny: Callable[..., Any], name: str) -> None:
    circuit = CausalCircuitAttribution(tiny(name))
    bare = circuit.compute_token_gradients(IDS, TARGET, full_target=True)
    for ones in (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool), [[1] * 4] * 2):
        assert torch.equal(
            circuit.compute_token_gradients(IDS, TARGET, ones, full_target=True), bare
        )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_shut_head_has_no_output_weights(tiny: Callable[..., Any], name: str) -> None:
    """Zero gates equal a model that lacks the heads' rows of the output projection."""
    mask = torch.ones(2, 4)
    mask[0, 2] = 0
    mask[1] = 0
    found = CausalCircuitAttribution(tiny(name)).compute_token_gradients(IDS, TARGET, mask)
    without = tiny(name)
    with torch.no_grad():
        for module, own in zip(output_projections(without), mask, strict=True):
            # A Linear's inputs are its columns, a Conv1D's its rows.
            weight = module.weight if name == "gpt2" else module.weight.T
            weight.unflatten(0, (4, -1)).mul_(own[:, None, None])
    _, grads = embedding_gradients(without, IDS, TARGET, None, full=False)
    torch.testing.assert_close(found, grads.norm(dim=-1), rtol=1e-5, atol=1e-7)


def test_gates_are_wide_on_narrow_models(tiny: Callable[..., Any]) -> None:
    """0.9 is no bfloat16; gates are not rounded to it, only what they made."""
    model = tiny("llama").bfloat16()
    mask = torch.full((2, 4), 0.9)
    found = CausalCircuitAttribution(model).compute_token_gradients(IDS, TARGET, mask)
    assert found.dtype == torch.float32
    wide, narrow = (
        embedding_gradients(model, IDS, TARGET, own, full=False)[1].float().norm(dim=-1)
        for own in (mask, mask.bfloat16())
    )
    assert torch.equal(found, wide)
    assert not torch.equal(found, narrow)


def test_ids_of_either_shape(tiny: Callable[..., Any]) -> None:
    circuit = CausalCircuitAttribution(TransformerBridge(tiny("gpt2")))
    found = circuit.compute_token_gradients(IDS, TARGET)
    assert found.shape == (7,)
    assert torch.equal(circuit.compute_token_gradients(IDS[0], TARGET[None]), found)
    assert torch.equal(circuit.compute_token_gradients(IDS.tolist(), TARGET.tolist()), found)
    assert torch.equal(circuit.compute_token_gradients(IDS.int(), TARGET[:1]), found)


def test_a_model_that_keeps_all_its_logits(tiny: Callable[..., Any]) -> None:
    class Old(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
            assert not more
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model = tiny("llama")
    old = Old(model.config).eval()
    old.load_state_dict(model.state_dict())
    found = CausalCircuitAttribution(old).compute_token_gradients(IDS, TARGET, full_target=True)
    _, grads = embedding_gradients(model, IDS, TARGET, None, full=True)
    torch.testing.assert_close(found, grads.norm(dim=-1), rtol=1e-5, atol=1e-7)


def test_only_what_is_asked_is_unembedded(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    circuit = CausalCircuitAttribution(model)
    seen.clear()
    circuit.compute_token_gradients(IDS, TARGET)
    circuit.compute_token_gradients(IDS, TARGET, full_target=True)
    handle.remove()
    assert seen == [1, 3]


# --- what is left -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_model_is_left_as_it_was(
    tiny: Callable[..., Any], snapshot: Any, is_silent: Any, train: bool, trained: bool
) -> None:
    model = tiny("llama").train(train).requires_grad_(trained)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(not trained)
    kept = torch.ones_like(model.lm_head.weight)
    if trained:
        model.lm_head.weight.grad = kept
    circuit = CausalCircuitAttribution(model)
    before = snapshot(model)
    with torch.no_grad():
        found = circuit.compute_token_gradients(IDS, TARGET, a_mask(model), full_target=True)
    assert not found.requires_grad
    assert model.lm_head.weight.grad is (kept if trained else None)
    assert torch.equal(kept, torch.ones_like(kept))
    for bad in ({"mask": torch.ones(3, 4)}, {"method": "max"}):
        with pytest.raises(InputError):
            circuit.compute_token_gradients(IDS, TARGET, **bad)
    with (
        pytest.raises(RuntimeError, match="from a hook"),
        circuit.bridge.hooks([("blocks.1.hook_out", _raise)]),
    ):
        circuit.compute_token_gradients(IDS, TARGET, a_mask(model))
    assert snapshot(model) == before
    assert is_silent(circuit.bridge)


def _raise(tensor: Tensor, hook: Any) -> None:
    raise RuntimeError("from a hook")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointed_in_training(tiny: Callable[..., Any], name: str) -> None:
    """Layers that run again in the backward pass are gated there, too; and they do run again."""
    model = tiny(
        name, **({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if name == "gpt2" else {})
    )
    mask = a_mask(model)
    expected = CausalCircuitAttribution(model).compute_token_gradients(
        IDS, TARGET, mask, full_target=True
    )
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    model.train()
    circuit = CausalCircuitAttribution(model)
    runs: list[int] = []
    handle = output_projections(model)[0].register_forward_hook(lambda *_: runs.append(1))
    found = circuit.compute_token_gradients(IDS, TARGET, mask, full_target=True)
    assert len(runs) == 2
    # Training and checkpointing go on.
    circuit.compute_token_gradients(IDS, TARGET, mask)
    handle.remove()
    assert len(runs) == 4
    assert model.training
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 2), r"\[2, 4\] for \[layer, head\].*got \[4, 2\]"),
        (torch.ones(1, 2, 4), r"got \[1, 2, 4\]"),
        (torch.full((2, 4), 1.5), "from 0 to 1, got 1.5 to 1.5; of logits give mask.sigmoid"),
        (torch.full((2, 4), -3.0), "got -3 to -3"),
        (torch.full((2, 4), float("nan")), "got nan"),
    ],
)
def test_masks_that_are_none(tiny: Callable[..., Any], mask: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CausalCircuitAttribution(tiny("llama")).compute_token_gradients(IDS, TARGET, mask)


@pytest.mark.parametrize(
    ("ids", "target", "message"),
    [
        (IDS.repeat(2, 1), TARGET, r"the input is one row .*\[2, 7\]"),
        (IDS.float(), TARGET, "the input is one row of token ids.*float32"),
        (IDS[:, :0], TARGET, "the input has no tokens"),
        (IDS, TARGET[:0], "the target has no tokens"),
        (IDS, [160], "the target holds id 160, which is outside the vocabulary of 160"),
        ([[-1]], TARGET, "the input holds id -1"),
        (torch.ones(1, 63, dtype=torch.long), TARGET, r"63 tokens\) and target together are 65"),
    ],
)
def test_ids_that_are_none(tiny: Callable[..., Any], ids: Any, target: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CausalCircuitAttribution(tiny("llama")).compute_token_gradients(
            ids, target, full_target=True
        )


def test_other_methods(tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="method must be one of"):
        CausalCircuitAttribution(tiny("llama")).compute_token_gradients(IDS, TARGET, method="sum")


def test_gradients_that_are_not_finite(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(GradientError, match="at token 0 is not finite"):
        CausalCircuitAttribution(model).compute_token_gradients(IDS, TARGET)


@pytest.mark.parametrize(("name", "kind"), [("bert", "masked"), ("t5", "seq2seq")])
def test_models_that_do_not_go_on(tiny: Callable[..., Any], name: str, kind: str) -> None:
    with pytest.raises(InputError, match="does not predict what follows a text"):
        CausalCircuitAttribution(tiny(name, kind))


# --- sentences ----------------------------------------------------------------------------------------------


def sentences_by_hand(
    model: Any, tokenizer: Any, mask: Tensor | None, full: bool, how: Callable[[Tensor], Tensor]
) -> list[float]:
    """Norms by plain PyTorch; a sentence's tokens are those that reach into it."""
    made = tokenizer(DOCUMENT, return_offsets_mapping=True)
    ids = torch.tensor([[tokenizer.bos_token_id, *made["input_ids"]]])
    target = torch.tensor(tokenizer(SUMMARY)["input_ids"])
    norms = embedding_gradients(model, ids, target, mask, full)[1].norm(dim=-1)[1:]
    found = []
    for sentence in SENTENCES:
        start = DOCUMENT.index(sentence)
        end = start + len(sentence)
        own = [a < end and b > start for a, b in made["offset_mapping"]]
        found.append(float(how(norms[torch.tensor(own)])))
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_sentences_equal_plain_pytorch(
    demo_model: Any, demo_tokenizer: Any, demo_circuit: Any, how: str, full: bool
) -> None:
    mask = a_mask(demo_model)
    expected = sentences_by_hand(
        demo_model,
        demo_tokenizer,
        mask,
        full,
        {"mean": Tensor.mean, "sum": Tensor.sum, "max": Tensor.max}[how],
    )
    options = {"use_full_target": full, "aggregation": how}
    found = demo_circuit.compute_sentence_importance(
        DOCUMENT, SENTENCES, SUMMARY, mask, normalize=False, **options
    )
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    shared = demo_circuit.compute_sentence_importance(DOCUMENT, SENTENCES, SUMMARY, mask, **options)
    assert shared.tolist() == pytest.approx([x / max(expected) for x in expected], rel=1e-5)
    assert float(shared.max()) == 1.0


def test_the_example_of_the_readme(demo_model: Any, demo_tokenizer: Any) -> None:
    """As inteprelens shows it."""
    attribution = CausalCircuitAttribution(demo_model, demo_tokenizer)
    scores = attribution.compute_sentence_importance(
        document="Paris is the capital of France. It is one of Europe's largest cities.",
        sentences=["Paris is the capital of France.", "It is one of Europe's largest cities."],
        summary="Paris is the capital of France.",
        facilitating_mask=torch.ones(4, 4),
    )
    assert scores.shape == (2,)
    assert float(scores.max()) == 1.0
    assert float(scores.min()) > 0


def test_spans_are_of_the_models_input(demo_circuit: Any) -> None:
    """BOS included, and the same given as found."""
    spans = demo_circuit.sentence_spans(DOCUMENT, SENTENCES)
    pieces = demo_circuit.bridge.to_str_tokens(DOCUMENT)
    assert ["".join(pieces[a:b]).strip() for a, b in spans] == SENTENCES
    found = demo_circuit.compute_sentence_importance(DOCUMENT, SENTENCES, SUMMARY)
    given = demo_circuit.compute_sentence_importance(DOCUMENT, SENTENCES, SUMMARY, spans=spans)
    assert torch.equal(found, given)
    moved = [(a - 1, b - 1) for a, b in spans]
    other = demo_circuit.compute_sentence_importance(DOCUMENT, SENTENCES, SUMMARY, spans=moved)
    assert not torch.equal(found, other)


def test_cutting(demo_circuit: Any) -> None:
    """What is cut off is as if it had not been written; sentences there are refused."""
    end = demo_circuit.sentence_spans(DOCUMENT, SENTENCES)[0][1]
    importance = demo_circuit.compute_sentence_importance
    cut = importance(DOCUMENT, SENTENCES[:1], SUMMARY, max_input_tokens=end, normalize=False)
    alone = importance(SENTENCES[0], SENTENCES[:1], SUMMARY, normalize=False)
    assert torch.equal(cut, alone)
    with pytest.raises(InputError, match=r"sentence 1 \(\"It is one.* cut to"):
        importance(DOCUMENT, SENTENCES, SUMMARY, max_input_tokens=end)
    with pytest.raises(InputError, match=r"sentence 0 .* cut to"):
        importance(DOCUMENT, SENTENCES, SUMMARY, max_input_tokens=end - 1)
    first = importance(DOCUMENT, SENTENCES, SUMMARY, use_full_target=False)
    assert torch.equal(importance(DOCUMENT, SENTENCES, SUMMARY, max_target_tokens=1), first)
    for name in ("max_input_tokens", "max_target_tokens"):
        with pytest.raises(InputError, match=f"{name} must be at least 1"):
            importance(DOCUMENT, SENTENCES, SUMMARY, **{name: 0})


def test_nothing_counts_where_no_head_looks_back(demo_circuit: Any) -> None:
    """With every head shut only the last token speaks for the first of the summary: no NaN for the rest."""
    found = demo_circuit.compute_sentence_importance(
        DOCUMENT, SENTENCES[:1], SUMMARY, torch.zeros(4, 4), use_full_target=False
    )
    assert found.tolist() == [0.0]
    both = demo_circuit.compute_sentence_importance(
        DOCUMENT, SENTENCES, SUMMARY, torch.zeros(4, 4), use_full_target=False
    )
    assert both.tolist() == [0.0, 1.0]


def test_several_documents(demo_circuit: Any) -> None:
    documents = [DOCUMENT, "Rome is old. Go there."]
    sentences = [SENTENCES, ["Go there."]]
    summaries = [SUMMARY, "Go to Rome."]
    mask = torch.full((4, 4), 0.5)
    found = demo_circuit.compute_sentence_importance_batch(
        documents, sentences, summaries, mask, normalize=False, aggregation="sum"
    )
    assert [len(x) for x in found] == [2, 1]
    for own, *given in zip(found, documents, sentences, summaries, strict=True):
        alone = demo_circuit.compute_sentence_importance(
            *given, mask, normalize=False, aggregation="sum"
        )
        assert torch.equal(own, alone)
    spans = [demo_circuit.sentence_spans(*pair) for pair in zip(documents, sentences, strict=True)]
    again = demo_circuit.compute_sentence_importance_batch(
        documents, sentences, summaries, mask, normalize=False, aggregation="sum", spans=spans
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_documents_that_go_wrong(demo_circuit: Any) -> None:
    batch = demo_circuit.compute_sentence_importance_batch
    with pytest.raises(InputError, match="2 documents, 1 lists of sentences, 2 summaries"):
        batch([DOCUMENT] * 2, [SENTENCES], [SUMMARY] * 2)
    with pytest.raises(
        InputError, match=r"document 1: sentence 0 \('Nowhere.'\) is not in the text"
    ):
        batch([DOCUMENT] * 2, [SENTENCES, ["Nowhere."]], [SUMMARY] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summary": ""}, "the summary has no tokens: ''"),
        ({"sentences": []}, "at least one string"),
        ({"sentences": ["Elsewhere."]}, r"sentence 0 \('Elsewhere.'\) is not in the text"),
        ({"aggregation": "median"}, "aggregation must be one of"),
        ({"spans": [(0, 3)]}, "2 sentences and 1 spans"),
        ({"spans": [(0, 3), (3, 99)]}, r"the span of sentence 1 is \(3, 99\)"),
        ({"document": ""}, "is not in the text"),
    ],
)
def test_what_is_refused(
    demo_circuit: Any, left_alone: Any, change: dict[str, Any], message: str
) -> None:
    given = {"document": DOCUMENT, "sentences": SENTENCES, "summary": SUMMARY, **change}
    with left_alone(_Lens(demo_circuit)), pytest.raises(InputError, match=message):
        demo_circuit.compute_sentence_importance(**given)


class _Lens:
    def __init__(self, circuit: CausalCircuitAttribution) -> None:
        self.bridge, self.model = circuit.bridge, circuit.bridge.original_model


def test_a_tokenizer_of_ones_own(demo_model: Any, demo_tokenizer: Any) -> None:
    """Beside a bridge's, which stays."""
    bridge = TransformerBridge(demo_model)
    with pytest.raises(InputError, match="this bridge has no tokenizer"):
        CausalCircuitAttribution(bridge).compute_sentence_importance(DOCUMENT, SENTENCES, SUMMARY)
    circuit = CausalCircuitAttribution(bridge, demo_tokenizer)
    found = circuit.compute_sentence_importance(DOCUMENT, SENTENCES, SUMMARY)
    assert bridge.tokenizer is None
    expected = CausalCircuitAttribution(demo_model, demo_tokenizer).compute_sentence_importance(
        DOCUMENT, SENTENCES, SUMMARY
    )
    assert torch.equal(found, expected)
    assert repr(bridge) in repr(circuit)
