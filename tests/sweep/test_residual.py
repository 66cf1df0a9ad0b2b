"""The residual stream of every causal and masked architecture as the sum of its heads, neurons and branches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lensbridge import LensError

pytestmark = pytest.mark.sweep

CONFIGS = json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())
ENTRIES = [(kind, name) for kind in ("causal", "masked") for name in sorted(CONFIGS[kind])]

NO_SUM = "not known to be a sum of parts"
REFUSED = {
    ("causal", "deepseek_v4"): NO_SUM,  # several streams
    ("causal", "gemma3n"): NO_SUM,
    ("causal", "gemma3n_text"): NO_SUM,
    ("causal", "hy_v4"): NO_SUM,
    ("causal", "qwen4_exp"): NO_SUM,
    ("causal", "qwen4_exp_text"): NO_SUM,
    ("causal", "inkling2_text"): NO_SUM,  # attention over earlier layers' outputs
    ("causal", "reformer"): NO_SUM,  # reversible
    ("causal", "xlnet"): NO_SUM,
    ("causal", "xmod"): NO_SUM,
    ("masked", "xmod"): NO_SUM,
    ("causal", "zaya"): NO_SUM,
    ("causal", "xlm"): "nothing is known of XLM",  # no module is a layer
    ("masked", "xlm"): "nothing is known of XLM",
    ("masked", "flaubert"): "nothing is known of Flaubert",
    (
        "masked",
        "squeezebert",
    ): "nothing is known of SqueezeBert",  # layers that hold several texts at once
    ("causal", "hrm_text"): "changes it between",
    # norms behind the sums that are of no known form: integers, a scale without a division
    ("masked", "ibert"): "no norm of a known form",
    ("masked", "mobilebert"): "no norm of a known form",
}
"""Architectures whose stream is no sum that is known, and what they are refused with."""

NO_HEADS = {("causal", "inkling_text")}
"""Something stands behind the output projection: branches sum to the stream, heads do not to their branch."""

ENTERING_WHOLE = {
    # the embeddings pass more than a factor and one norm, or are made of more than is embedded
    *(("causal", x) for x in ("bigbird_pegasus", "blenderbot-small", "blt", "ctrl", "musicgen")),
    *(("causal", x) for x in ("musicgen_melody", "nanochat", "openai-gpt", "prophetnet")),
    *(("causal", x) for x in ("inkling_text", "recurrent_gemma", "rembert", "xglm")),
    *(("masked", x) for x in ("albert", "deberta", "deberta-v2", "fnet", "funnel", "neomme")),
    ("masked", "rembert"),
}
"""What enters the first layer is one part, not embeddings by name."""


def given(name: str, kind: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entry's own inputs, or two texts."""
    seed = torch.Generator().manual_seed(2)
    return inputs or {"input_ids": torch.randint(8, 100, (2, 9), generator=seed)}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda part: part)
def test_full_decomposition(
    tiny: Callable[..., nn.Module],
    inputs_of: Callable[..., dict[str, Tensor]],
    kind: str,
    name: str,
) -> None:
    """Branches, and heads and neurons, sum to what leaves the last layer; at its input too."""
    from lensbridge import TransformerBridge

    own = inputs_of(name, kind)
    bridge = TransformerBridge(tiny(name, kind), example=own or None)
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        _, cache = bridge.run_with_cache(**given(name, kind, own), return_type=None)
    if (kind, name) in REFUSED:
        with pytest.raises(LensError, match=REFUSED[kind, name]):
            cache.decompose_resid()
        with pytest.raises(LensError):
            cache.get_full_resid_decomposition()
        return
    blocks, layers = bridge.architecture.blocks, bridge.registry.layers
    end = cache[f"{layers}.{len(blocks) - 1}.hook_out"]
    stack, labels = cache.decompose_resid(return_labels=True)
    assert miss(stack, end) < 1e-5
    start = cache[f"{layers}.{len(blocks) - 1}.hook_in"]
    assert miss(cache.decompose_resid(len(blocks) - 1), start) < 1e-5
    assert ("0_pre" in labels) == ((kind, name) in ENTERING_WHOLE), labels
    added = [label for label in labels if label.endswith("_out")]
    assert len(added) == sum(len(block.branches) for block in blocks)
    if (kind, name) in NO_HEADS:
        with pytest.raises(LensError, match="more than the sum of its heads"):
            cache.get_full_resid_decomposition()
        return
    full, labels = cache.get_full_resid_decomposition(return_labels=True)
    assert miss(full, end) < 1e-5
    assert len(labels) == len(set(labels)) == len(full)


def miss(stack: Tensor, stream: Tensor) -> float:
    """By how much parts miss what they are to sum to, relative to the largest of both."""
    size = max(float(stack.abs().max()), float(stream.abs().max()))
    return float((stack.sum(0) - stream).abs().max()) / size


def test_counts() -> None:
    """How many are refused; the lists hold nothing that is not an entry."""
    assert len(ENTRIES) == 187 + len(CONFIGS["masked"])
    assert {*REFUSED, *NO_HEADS, *ENTERING_WHOLE} <= set(ENTRIES)
    assert sum(kind == "causal" for kind, _ in REFUSED) == 13
    assert sum(kind == "masked" for kind, _ in REFUSED) == 6
