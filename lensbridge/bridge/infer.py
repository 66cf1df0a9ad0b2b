"""From a Hugging Face model to its Architecture: by structure first, by the vocabulary second."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..hooks import ArchitectureError
from . import table
from .architecture import Architecture, Attention, Block, Mlp, Norm, Projection, Split
from .norm import describe_norm


def infer(model: nn.Module) -> Architecture:
    """Tell a model's parts apart.

    Args:
        model: Any Hugging Face model.
    Returns:
        Its architecture; roles that could not be filled are in ``absent`` with what was tried.
    Raises:
        ArchitectureError: There is no stack of layers to be found.
    """
    config = text_config(model)
    paths = {id(module): path for path, module in model.named_modules()}
    stack_path, stack = _find_stack(model, config)
    trunk_path = stack_path.rpartition(".")[0]
    trunk = model.get_submodule(trunk_path)
    rotary = _child(trunk, table.ROTARY) or _child(stack[0], table.ROTARY)
    is_rotary = rotary is not None or _takes_rotary(stack[0])
    blocks = tuple(
        _block(block, f"{stack_path}.{index}", config, is_rotary)
        for index, block in enumerate(stack)
    )
    embed = _path_of(model, paths, "get_input_embeddings")
    unembed = _path_of(model, paths, "get_output_embeddings")
    absent = {}
    if unembed is None:
        absent["unembed"] = f"{type(model).__name__} has no language-model head"
    if rotary is None:
        absent["rotary_emb"] = "the model has no module that computes rotary embeddings"
    pos_embed = _child(trunk, table.POS_EMBED)
    if pos_embed is None:
        absent["pos_embed"] = "the model has no learned position embedding"
    ln_final = _child(trunk, table.LN_FINAL)
    if ln_final is None:
        absent["ln_final"] = f"no final norm beside the layers (tried {', '.join(table.LN_FINAL)})"
    return Architecture(
        embed=embed,
        blocks=blocks,
        pos_embed=_join(trunk_path, pos_embed),
        rotary=_join(trunk_path, rotary) if rotary and _child(trunk, table.ROTARY) else None,
        ln_final=_norm(trunk, trunk_path, ln_final),
        unembed=unembed,
        absent=absent,
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of the text model (a multimodal model nests it)."""
    config = getattr(model, "config", None)
    if config is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no Hugging Face config; TransformerBridge wraps transformers models"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _find_stack(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    declared = set(getattr(model, "_no_split_modules", None) or ())
    n_layers = getattr(config, "num_hidden_layers", None)

    def rank(item: tuple[str, nn.ModuleList]) -> tuple[bool, bool, bool, int]:
        path, stack = item
        is_text = not any(word in path for word in table.OTHER_TOWERS)
        named = any(type(block).__name__ in declared for block in stack)
        return is_text, named, len(stack) == n_layers, sum(p.numel() for p in stack.parameters())

    best = max(stacks, key=rank, default=None)
    if best is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of layers (no nn.ModuleList anywhere); its modules are: "
            + ", ".join(path for path, _ in list(model.named_modules())[1:8])
        )
    return best


def _block(block: nn.Module, path: str, config: Any, is_rotary: bool) -> Block:
    attn_name = _child(block, table.ATTENTION)
    mlp_name = _child(block, table.MLP)
    sandwich = _child(block, table.SANDWICH) is not None
    ln1 = _child(block, table.LN1)
    ln2 = _child(block, table.LN2)
    ln1_post = ln2_post = None
    if sandwich:
        ln1_post, ln2_post = _child(block, table.LN1_POST), _child(block, table.LN2_POST)
        ln2 = ln2 if ln2 != ln1_post else None
    attn = None
    if attn_name is not None:
        attn = _attention(block, attn_name, path, config, is_rotary)
    is_parallel = attn is not None and (
        any(getattr(block, flag, False) for flag in table.PARALLEL_FLAGS)
        or (ln2 is None and not sandwich and ln1 is not None)
    )
    return Block(
        path=path,
        attn=attn,
        mlp=_mlp(block, mlp_name, path),
        ln1=_norm(block, path, ln1),
        ln2=_norm(block, path, ln2),
        ln1_post=_norm(block, path, ln1_post),
        ln2_post=_norm(block, path, ln2_post),
        is_parallel=is_parallel,
    )


def _attention(
    block: nn.Module, name: str, block_path: str, config: Any, is_rotary: bool
) -> Attention:
    attn = block.get_submodule(name)
    path = f"{block_path}.{name}"
    n_heads = _fact(attn, config, ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    n_kv = _fact(attn, config, ("num_key_value_heads", "num_kv_heads"), default=n_heads)
    o_name = _child(attn, table.O)
    width: int = config.hidden_size
    if o_name is not None:
        width = features(attn.get_submodule(o_name))[0] or width
    joint = _child(attn, tuple(table.QKV))
    q_name, k_name, v_name = (_child(attn, names) for names in (table.Q, table.K, table.V))
    # "asks the modules": a head's width is what the projection makes, not what the config says.
    d_head_v = width // n_heads
    d_head = d_head_v
    q = k = v = None
    if joint is not None:
        total = features(attn.get_submodule(joint))[1] or 0
        d_head = total // (n_heads + 2 * n_kv)
        split = _split(table.QKV[joint], n_heads, n_kv, d_head)
        if sum(split.sizes) * split.groups == total:
            q, k, v = (Projection(f"{path}.{joint}", split, index) for index in range(3))
    elif q_name and k_name and v_name:
        q, k, v = (Projection(f"{path}.{name}") for name in (q_name, k_name, v_name))
        d_head = (features(attn.get_submodule(q_name))[1] or width) // n_heads
        n_kv = (features(attn.get_submodule(k_name))[1] or n_kv * d_head) // d_head
    return Attention(
        path=path,
        q=q,
        k=k,
        v=v,
        o=_join(path, o_name),
        n_heads=n_heads,
        n_key_value_heads=n_kv,
        d_head=d_head,
        d_head_v=d_head_v,
        is_rotary=is_rotary,
        q_norm=_norm(attn, path, _child(attn, table.Q_NORM)),
        k_norm=_norm(attn, path, _child(attn, table.K_NORM)),
    )


def _split(layout: str, n_heads: int, n_kv: int, d_head: int) -> Split:
    if layout == "per_head":
        return Split(n_heads, (d_head, d_head, d_head))
    return Split(1, (n_heads * d_head, n_kv * d_head, n_kv * d_head))


def _mlp(block: nn.Module, name: str | None, block_path: str) -> Mlp | None:
    if name is None and _child(block, table.MLP_OUT) is None:
        return None
    home = block if name is None else block.get_submodule(name)
    path = block_path if name is None else f"{block_path}.{name}"
    joint, gate, inp, out = (
        _child(home, names)
        for names in (table.GATE_UP, table.MLP_GATE, table.MLP_IN, table.MLP_OUT)
    )
    own_path = None if name is None else path
    if out is None or not isinstance(home.get_submodule(out), nn.Module):
        return Mlp(own_path, None, None, None, None)
    d_mlp = features(home.get_submodule(out))[0]
    if joint is not None and d_mlp is not None:
        split = Split(1, (d_mlp, d_mlp))
        shares = [Projection(f"{path}.{joint}", split, index) for index in range(2)]
        return Mlp(own_path, shares[1], shares[0], f"{path}.{out}", d_mlp)
    return Mlp(
        own_path,
        None if inp is None else Projection(f"{path}.{inp}"),
        None if gate is None else Projection(f"{path}.{gate}"),
        f"{path}.{out}",
        d_mlp,
    )


def features(module: nn.Module) -> tuple[int | None, int | None]:
    """(in, out) widths of a linear layer, from what it says of itself; weights are not read."""
    if isinstance(getattr(module, "in_features", None), int):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(getattr(module, "nf", None), int):  # transformers' Conv1D
        return module.nx, module.nf  # type: ignore[return-value]
    return None, None


def _fact(
    module: nn.Module, config: Any, names: tuple[str, ...], default: int | None = None
) -> int:
    for source in (module, config):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    if default is not None:
        return default
    raise ArchitectureError(
        f"{type(module).__name__}: none of {', '.join(names)} is on the module or its config"
    )


def _child(module: nn.Module, names: Iterable[str]) -> str | None:
    """The first of these child paths that exists."""
    for name in names:
        current: Any = module
        for part in name.split("."):
            current = current._modules.get(part) if isinstance(current, nn.Module) else None
        if isinstance(current, nn.Module):
            return name
    return None


def _norm(home: nn.Module, home_path: str, name: str | None) -> Norm | None:
    if name is None:
        return None
    return describe_norm(home.get_submodule(name), str(_join(home_path, name)))


def _join(home: str, name: str | None) -> str | None:
    if name is None:
        return None
    return f"{home}.{name}" if home else name


def _path_of(model: nn.Module, paths: dict[int, str], getter: str) -> str | None:
    try:
        module = getattr(model, getter)()
    except NotImplementedError:
        return None  # transformers raises this for models without the part
    return paths.get(id(module))


def _takes_rotary(block: nn.Module) -> bool:
    attn = _child(block, table.ATTENTION)
    if attn is None:
        return False
    return "position_embeddings" in inspect.signature(block.get_submodule(attn).forward).parameters
