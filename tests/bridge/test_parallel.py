"""Models over two processes: what a process can show is the whole of it, and the rest is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WORKER = r"""
import copy
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from lensbridge import AbsentPointError, ArchitectureError, TransformerBridge, extract_representations, extract_to

(folder,) = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
)
whole = LlamaForCausalLM(config).eval()
if dist.get_rank() == 0:
    whole.save_pretrained(folder)
dist.barrier()
ids = torch.arange(20).view(2, 10)
plain = TransformerBridge(whole)
expected, held = plain.run_with_cache(ids)
rows, points = torch.arange(50).view(5, 10), ["blocks.0.hook_out", "blocks.1.hook_mlp_out"]


def refused(error, *words, call):
    try:
        call()
    except error as found:
        assert all(word in str(found) for word in words), found
    else:
        raise AssertionError(f"{words} was not refused")


def spread(**sizes):
    given = DistributedConfig(**sizes)
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=given, dtype=torch.float32).eval()


def same_values(bridge, exact):
    logits, cache = bridge.run_with_cache(ids)
    near = torch.equal if exact else lambda a, b: torch.allclose(a, b, atol=1e-6)
    assert near(logits, expected)
    assert all(cache[name].shape == held[name].shape and near(cache[name], held[name]) for name in cache)
    edit = [("blocks.0.hook_out", lambda x, hook: x * 0.5)]
    assert near(bridge.run_with_hooks(ids, fwd_hooks=edit), plain.run_with_hooks(ids, fwd_hooks=edit))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(bridge.generate(ids, **options), plain.generate(ids, **options))
    assert bridge.verify().holds
    for part in ("attn.W_Q", "attn.W_O", "mlp.W_out", "ln1.w"):
        name = f"blocks.1.{part}"
        assert torch.equal(bridge.weight(name), plain.weight(name))
    assert torch.equal(bridge.W_E, plain.W_E) and torch.equal(bridge.W_U, plain.W_U)
    store = extract_to(f"{folder}-{bridge.original_model.__class__.__name__}-{exact}", bridge, rows, points, batch_size=2)
    for name, expected_rows in extract_representations(plain, rows, points, batch_size=2).items():
        assert near(store[name][:], expected_rows.flatten(0, 1))
        assert near(extract_representations(bridge, rows, points, batch_size=2)[name], expected_rows)
    return cache


def tensor_parallel():
    bridge = TransformerBridge(spread(tp_size=2))
    cache = same_values(bridge, exact=False)
    split = {"head", "kv_head", "d_mlp"}
    gone = {name for name in held if not split.isdisjoint(plain.registry[name].axes.split())}
    assert len(gone) == 22 and set(cache) == set(held) - gone
    for name in (*gone, "blocks.1.attn.hook_z", "blocks.0.attn.hook_result"):
        refused(AbsentPointError, "each of the 2 processes", call=lambda: bridge.registry[name])
    for path in ("self_attn.q_proj", "mlp.act_fn", "self_attn.o_proj.hook_in"):
        name = f"raw:model.layers.0.{path}"
        refused(AbsentPointError, name, "each of the 2 processes", call=lambda: bridge.registry[name])
    _, raw = bridge.run_with_cache(ids, names_filter="raw:model.layers.0.self_attn")
    assert torch.allclose(raw["raw:model.layers.0.self_attn"], held["blocks.0.hook_attn_out"], atol=1e-6)


def fully_sharded():
    model = copy.deepcopy(whole)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    bridge = TransformerBridge(model)
    assert set(same_values(bridge, exact=True)) == set(held)
    _, left = bridge.run_with_cache(ids, names_filter="**.hook_result")
    _, right = plain.run_with_cache(ids, names_filter="**.hook_result")
    assert len(left) == 2 and all(torch.equal(left[name], right[name]) for name in right)


def a_stage():
    refused(ArchitectureError, "one stage of a pipeline", call=lambda: TransformerBridge(spread(pp_size=2)))


for check in (fully_sharded, tensor_parallel, a_stage):
    check()
dist.barrier()
print("as it should be", flush=True)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    """FSDP2: bit for bit. Tensor parallelism: full widths equal, heads refused, raw paths too. A stage: no.

    Weights come back whole from both.
    """
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, str(script), str(tmp_path / "model")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("as it should be") == 2
