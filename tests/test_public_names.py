"""The public names, pinned: adding or losing one is a decision, made here."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lensbridge

PUBLIC = [
    "CHG",
    "AblationCurve",
    "AbsentPointError",
    "ActivationBatch",
    "ActivationCache",
    "ActivationStore",
    "Aggregation",
    "Architecture",
    "ArchitectureError",
    "BaseSplitter",
    "BatchTopKSAEConcepts",
    "BridgeConfig",
    "CHGBatch",
    "CHGDataset",
    "CHGResults",
    "CHGTrainer",
    "CausalCircuitAttribution",
    "CircuitCheck",
    "ConceptExample",
    "ContrastiveCHG",
    "ExtractedActivations",
    "FactoredMatrix",
    "FitOptions",
    "FitUpdate",
    "GateSite",
    "GradientError",
    "Granularity",
    "HeadScores",
    "HookNotFiredError",
    "HookPoint",
    "HookRegistry",
    "HookValueError",
    "InputError",
    "InterventionSpec",
    "JumpReLUSAEConcepts",
    "KLToFull",
    "LayerRangeError",
    "LensAPI",
    "LensError",
    "LogitAttribution",
    "LogitDifference",
    "LogitLens",
    "ModelAdapter",
    "ModelWithSplitPoints",
    "MpSAEConcepts",
    "NotFittedError",
    "PatchGrid",
    "Plot",
    "PointError",
    "Ragged",
    "SAEExplainer",
    "SAELossClasses",
    "SAEMetrics",
    "SelectionError",
    "SingularVectors",
    "SplitterForGeneration",
    "Step",
    "Streaming",
    "TargetTokens",
    "TokenScores",
    "TopKInputs",
    "TopKSAEConcepts",
    "TraceResult",
    "TransformerBridge",
    "TransformerTracer",
    "UnknownPointError",
    "ValueAndGradient",
    "VanillaSAEConcepts",
    "__version__",
    "ablation_curve",
    "activation_patch",
    "add_row",
    "aggregate_to_sentences",
    "apply_interventions",
    "apply_temperature",
    "attention_plot",
    "attribution_patching",
    "autograd_node_hook",
    "capture_backward_pre",
    "capture_gradients",
    "capture_kwargs_hook",
    "check_circuit",
    "dashboard",
    "detect_head",
    "direct_logit_attribution",
    "duplicate_token_score",
    "extract_representations",
    "extract_to",
    "fit_together",
    "gate_attribution",
    "gather_token_scores",
    "get_adapter",
    "get_sentence_token_spans",
    "head_scatter",
    "induction_score",
    "input_x_gradient",
    "integrated_gradients",
    "label_concepts",
    "load_activations",
    "logit_difference",
    "logit_effects",
    "logit_lens",
    "logits_to_log_probs",
    "logits_to_probs",
    "measure_sae",
    "path_patch",
    "previous_token_score",
    "read_gemma_scope",
    "read_saelens",
    "read_vllm_hidden_states",
    "repeated_tokens",
    "save_activations",
    "scores_under",
    "select_final_token",
    "stream_representations",
    "svd_of",
    "tensor_grad_hook",
    "write_saelens",
]


def test_public_names_are_these() -> None:
    """Exactly these, each once (ruff keeps them in order, CHG in front)."""
    assert lensbridge.__all__ == PUBLIC
    assert len(set(PUBLIC)) == len(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_can_be_imported(name: str) -> None:
    """`from lensbridge import name` gives what its home gives, and dir() shows it."""
    value = getattr(lensbridge, name)
    if name != "__version__":
        assert value is getattr(import_module(f"lensbridge.{lensbridge._HOME[name]}"), name)
    assert name in dir(lensbridge)


@pytest.mark.parametrize("name", sorted(lensbridge._HOME))
def test_public_name_is_public_at_home(name: str) -> None:
    """What the top offers, the part's own `__all__` offers too."""
    assert name in import_module(f"lensbridge.{lensbridge._HOME[name]}").__all__


def test_type_checkers_see_the_same_names() -> None:
    """The TYPE_CHECKING imports name the same things from the same homes as the lazy table."""
    tree = ast.parse(Path(lensbridge.__file__).read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lensbridge._HOME
    assert {*lensbridge._HOME, "__version__"} == set(lensbridge.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="'lensbridge' has no attribute 'Nonsense'"):
        lensbridge.Nonsense  # noqa: B018


def test_import_is_lazy() -> None:
    """In a fresh interpreter, `import lensbridge` loads neither torch nor transformers nor its own parts."""
    probe = (
        "import sys, lensbridge; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', "
        "'transformers'} | {m for m in sys.modules if m.startswith('lensbridge.')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=Path(lensbridge.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "['lensbridge._version']"
