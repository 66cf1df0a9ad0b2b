"""Every canonical point of the test families, reached by hand: plain PyTorch hooks on a plain model.

Nothing of lensbridge is used here. Where a module gives a place no name of its own (the stream between
attention and MLP, the inside of a norm, what each head adds, the inside of attention) the part around it is
computed in a few lines of plain PyTorch instead. Loaded by the fixture `byhand`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

Edit = Callable[[Tensor], Tensor]

_LLAMA = {
    "embed": "model.embed_tokens",
    "rotary_emb": "model.rotary_emb",
    "layers": "model.layers",
    "ln_final": "model.norm",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp": "mlp",
    "mlp.gate": "mlp.gate_proj",
    "mlp.in": "mlp.up_proj",
    "mlp.out": "mlp.down_proj",
}
_PHI3 = {
    **_LLAMA,
    **dict.fromkeys(("attn.q", "attn.k", "attn.v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("mlp.gate", "mlp.in"), "mlp.gate_up_proj"),
}
PLACES: dict[str, dict[str, str]] = {
    "gpt2": {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "layers": "transformer.h",
        "ln_final": "transformer.ln_f",
        "ln1": "ln_1",
        "ln2": "ln_2",
        "attn": "attn",
        **dict.fromkeys(("attn.q", "attn.k", "attn.v"), "attn.c_attn"),
        "attn.o": "attn.c_proj",
        "mlp": "mlp",
        "mlp.in": "mlp.c_fc",
        "mlp.out": "mlp.c_proj",
    },
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    "phi3": _PHI3,
    "gpt_neox": {
        "embed": "gpt_neox.embed_in",
        "rotary_emb": "gpt_neox.rotary_emb",
        "layers": "gpt_neox.layers",
        "ln_final": "gpt_neox.final_layer_norm",
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "attn": "attention",
        **dict.fromkeys(("attn.q", "attn.k", "attn.v"), "attention.query_key_value"),
        "attn.o": "attention.dense",
        "mlp": "mlp",
        "mlp.in": "mlp.dense_h_to_4h",
        "mlp.out": "mlp.dense_4h_to_h",
    },
    "phi": {
        "embed": "model.embed_tokens",
        "rotary_emb": "model.rotary_emb",
        "layers": "model.layers",
        "ln_final": "model.final_layernorm",
        "ln1": "input_layernorm",
        "attn": "self_attn",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.dense",
        "mlp": "mlp",
        "mlp.in": "mlp.fc1",
        "mlp.out": "mlp.fc2",
    },
}
"""Where each part sits; paths below ``layers`` are relative to a block."""

HEAD_INPUTS = {
    "hook_q_input": ("q",),
    "hook_k_input": ("k",),
    "hook_v_input": ("v",),
    "hook_attn_in": ("q", "k", "v"),
}
INSIDE = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")


def is_inside(name: str) -> bool:
    """Whether a point is inside the attention call."""
    return name.endswith(INSIDE)


def is_exact(name: str) -> bool:
    """Whether the place has a module boundary, so that two ways of editing it agree to the last bit."""
    computed = ("hook_scale", "hook_normalized", "hook_result", *HEAD_INPUTS)
    return not is_inside(name) and not name.endswith(computed)


def base(family: str) -> str:
    """The family of a variant: ``gpt_neox_sequential`` is a ``gpt_neox``."""
    return max((known for known in PLACES if family.startswith(known)), key=len)


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite places must be the same ones."""
    one, other = one.detach().float(), other.detach().float()
    assert one.shape == other.shape, f"{list(one.shape)} is not {list(other.shape)}"
    finite = torch.isfinite(other)
    assert torch.equal(one[~finite], other[~finite])
    if not bool(finite.any()):
        return 0.0
    size = max(float(other[finite].abs().max()), 1e-30)
    return float((one[finite] - other[finite]).abs().max()) / size


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was called with."""
    return args[0] if args else kwargs["hidden_states"]


def open_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as in the textbook, with a place for an edit at each step."""
    edits: dict[str, Edit] = module.__dict__.get("_edits", {})

    def edited(what: str, x: Tensor) -> Tensor:
        return edits[what](x) if what in edits else x

    query = edited("hook_rot_q", query.transpose(1, 2)).transpose(1, 2)
    key = edited("hook_rot_k", key.transpose(1, 2)).transpose(1, 2)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (
        query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    if attention_mask is not None:
        # -inf, not the most negative number: an edit may lower a score that is masked already.
        scores = scores.masked_fill(attention_mask < -1e30, -torch.inf)
    scores = edited("hook_attn_scores", scores)
    pattern = edited("hook_pattern", scores.float().softmax(-1).to(value.dtype))
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


AttentionInterface.register("byhand", open_attention)
AttentionMaskInterface.register("byhand", eager_mask)


class ByHand:
    """A copy of a model, edited and read by hand at the places that lensbridge calls by canonical names.

    Args:
        model: Copied, so that what is done here never reaches it.
        family: One of the families or variants of the fixture.
    """

    def __init__(self, model: nn.Module, family: str) -> None:
        self.family = base(family)
        self.model: Any = copy.deepcopy(model)
        self.paths = PLACES[self.family]
        config: Any = self.model.config
        self.config = config
        self.layers: Any = self.model.get_submodule(self.paths["layers"])
        self.n_heads: int = config.num_attention_heads
        self.n_kv: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_head: int = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        self.is_parallel = self.family == "phi" or getattr(config, "use_parallel_residual", False)

    # --- parts -----------------------------------------------------------------------------------

    def part(self, name: str) -> nn.Module:
        """The module behind ``"embed"``, ``"ln_final"``, ``"unembed"`` or ``"blocks.0.attn.q"``."""
        if name == "unembed":
            return (
                self.model.lm_head
                if self.family != "gpt_neox"
                else self.model.get_output_embeddings()
            )
        if not name.startswith("blocks."):
            return self.model.get_submodule(self.paths[name])
        _, layer, *rest = name.split(".", 2)
        block = self.layers[int(layer)]
        return block.get_submodule(self.paths[rest[0]]) if rest else block

    def share(self, part: str, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A projection's part of its module's output, and how to put a changed one back."""
        h, kv, d, kind = self.n_heads, self.n_kv, self.d_head, part.rsplit(".", maxsplit=1)[-1]
        if part.startswith("mlp"):
            if self.family != "phi3":
                return x, lambda new: new
            gate, up = x.chunk(2, -1)
            if kind == "gate":
                return gate, lambda new: torch.cat([new, up], -1)
            return up, lambda new: torch.cat([gate, new], -1)
        heads = {"q": (h, d), "k": (kv, d), "v": (kv, d)}[kind]
        if self.family in ("gpt2", "phi3"):
            pieces = dict(zip("qkv", x.split([h * d, kv * d, kv * d], -1), strict=True))
            return pieces[kind].unflatten(-1, heads), lambda new: torch.cat(
                [new.flatten(-2) if name == kind else old for name, old in pieces.items()], -1
            )
        if self.family == "gpt_neox":
            runs = dict(zip("qkv", x.view(*x.shape[:-1], h, 3 * d).split(d, -1), strict=True))
            return runs[kind], lambda new: torch.cat(
                [new if name == kind else old for name, old in runs.items()], -1
            ).flatten(-2)
        return x.unflatten(-1, heads), lambda new: new.flatten(-2)

    def is_joint(self, part: str) -> bool:
        """Whether other projections live in the same module."""
        return list(self.paths.values()).count(self.paths[part]) > 1

    # --- norms -----------------------------------------------------------------------------------

    def norm_inside(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, Edit]:
        """Centred input, scale, and what the weights do afterwards, as the papers have it."""
        if self.family in ("gpt2", "gpt_neox", "phi"):
            centred = x - x.mean(-1, keepdim=True)
            scale = (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
            return centred, scale, lambda n: n * module.weight + module.bias
        eps = module.eps if self.family == "gemma" else module.variance_epsilon
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        if self.family == "gemma":
            return x, scale, lambda n: n * (1 + module.weight)
        return x, scale, lambda n: n * module.weight

    # --- editing ---------------------------------------------------------------------------------

    @contextmanager
    def editing(self, name: str, fn: Edit) -> Iterator[None]:
        """While open, the value at a canonical point goes through `fn`."""
        owner, _, what = name.rpartition(".")
        if what in INSIDE:
            with self._attention(owner, what, fn):
                yield
            return
        if what == "hook_resid_mid":
            handles = self._between(owner, fn)
        elif what in HEAD_INPUTS:
            handles = self._head_inputs(owner, HEAD_INPUTS[what], fn)
        elif what in ("hook_scale", "hook_normalized"):
            handles = [self.part(owner).register_forward_hook(self._norm_edit(what, fn))]
        elif what == "hook_result":
            handles = [self.part(f"{owner}.o").register_forward_hook(self._result_edit(fn))]
        elif owner == "rotary_emb" and what != "hook_in":
            handles = [self.part(owner).register_forward_hook(_item_edit(what == "hook_sin", fn))]
        elif what == "hook_in":
            handles = [self._input_edit(owner, fn)]
        else:
            handles = [self._output_edit(owner, fn)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _input_edit(self, owner: str, fn: Edit) -> Any:
        part = owner.split(".", 2)[-1]
        if part.endswith((".q", ".k", ".v", ".in", ".gate")) and self.is_joint(part):

            def redo(module: Any, args: Any, output: Tensor) -> Tensor:
                new, _ = self.share(part, module.forward(fn(args[0])))
                _, put = self.share(part, output)
                return put(new)

            return self.part(owner).register_forward_hook(redo)

        def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if owner == "rotary_emb":  # positions; of the hidden state it reads only the dtype
                if "position_ids" in kwargs:
                    return args, {**kwargs, "position_ids": fn(kwargs["position_ids"])}
                return (args[0], fn(args[1])), kwargs
            x = first_tensor(args, kwargs)
            heads = (self.n_heads, self.d_head)
            new = fn(x.unflatten(-1, heads)).flatten(-2) if part == "attn.o" else fn(x)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return self.part(owner).register_forward_pre_hook(before, with_kwargs=True)

    def _output_edit(self, owner: str, fn: Edit) -> Any:
        part = owner.split(".", 2)[-1]

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            x = output if isinstance(output, Tensor) else output[0]
            if part.endswith((".q", ".k", ".v", ".in", ".gate")):
                piece, put = self.share(part, x)
                return put(fn(piece))
            new = fn(x)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return self.part(owner).register_forward_hook(after)

    def _norm_edit(self, what: str, fn: Edit) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            centred, scale, affine = self.norm_inside(module, args[0])
            if what == "hook_scale":
                return affine(centred / fn(scale))
            return affine(fn(centred / scale))

        return after

    def _result_edit(self, fn: Edit) -> Any:
        def after(module: Any, args: Any, output: Tensor) -> Tensor:
            z = args[0].unflatten(-1, (self.n_heads, self.d_head))
            results = fn(torch.einsum("bphd,hdm->bphm", z, self.w_o(module)))
            bias = getattr(module, "bias", None)
            return results.sum(2) + (0 if bias is None else bias)

        return after

    def w_o(self, module: Any) -> Tensor:
        """The output projection per head, [head, d_head, d_model]."""
        weight = module.weight if self.family == "gpt2" else module.weight.T
        return weight.unflatten(0, (self.n_heads, self.d_head))

    def _between(self, block: str, fn: Edit) -> list[Any]:
        """Run the second half of the block here, from the edited stream on."""
        norm, mlp = self.part(f"{block}.ln2"), self.part(f"{block}.mlp")
        streams: list[Tensor] = []

        def keep(module: nn.Module, args: Any) -> None:
            streams.append(args[0])

        def second_half(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            middle = fn(streams.pop())
            new = middle + mlp.forward(norm.forward(middle))
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return [
            norm.register_forward_pre_hook(keep),
            self.part(block).register_forward_hook(second_half, with_kwargs=True),
        ]

    def _head_inputs(self, attn: str, parts: tuple[str, ...], fn: Edit) -> list[Any]:
        """Give each head its own copy of the stream, and take from each projection that head's part."""
        norm = self.part(attn.replace(".attn", ".ln1"))
        copies: list[Tensor] = []

        def keep(module: nn.Module, args: Any) -> None:
            n = self.n_heads if parts[0] == "q" else self.n_kv
            copies[:] = fn(torch.stack([args[0]] * n, -2)).unbind(-2)

        def redo(part: str) -> Any:
            def after(module: Any, args: Any, output: Tensor) -> Tensor:
                heads = [
                    self.share(part, module.forward(norm.forward(x)))[0][..., head, :]
                    for head, x in enumerate(copies)
                ]
                return self.share(part, output)[1](torch.stack(heads, -2))

            return self.part(attn.replace(".attn", f".{part}")).register_forward_hook(after)

        return [norm.register_forward_pre_hook(keep), *(redo(f"attn.{part}") for part in parts)]

    @contextmanager
    def _attention(self, owner: str, what: str, fn: Edit) -> Iterator[None]:
        usual = self.model.config._attn_implementation
        module = self.part(owner)
        self.model.set_attn_implementation("byhand")
        module.__dict__["_edits"] = {what: fn}
        try:
            yield
        finally:
            del module.__dict__["_edits"]
            self.model.set_attn_implementation(usual)

    # --- running ---------------------------------------------------------------------------------

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's own logits, with whatever is being edited."""
        return self.model(*args, **kwargs).logits

    def read(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The value at a canonical point."""
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return x

        with torch.no_grad(), self.editing(name, keep):
            self.model(*args, **kwargs)
        (value,) = seen
        return value


def _item_edit(index: int, fn: Edit) -> Any:
    def after(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        items = list(output)
        items[index] = fn(items[index])
        return items[0], items[1]

    return after
