"""From an Architecture to hook points: which places exist, what they are called, how they are reached.

The one list of canonical points. Order is execution order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..hooks import ArchitectureError, Call, HookPoint, HookRegistry, Site, Tap, Unsettled
from ..hooks.names import aliases_of
from . import places
from .architecture import Architecture, Attention, Block, Mlp, Norm, Projection
from .attention import AttentionSpan
from .branch import BranchSpan
from .head_inputs import HeadInputs
from .trace import Trace

_STREAM = "batch pos d_model"
_UNREADABLE = (RuntimeError, IndexError, KeyError, TypeError, AttributeError, ArchitectureError)
# Modules that change none of their arguments; norms join them once their formula is known.
_PURE = (nn.Linear, nn.Embedding, Conv1D)


def build_registry(model: nn.Module, architecture: Architecture) -> HookRegistry:
    """Make every canonical point of a model; attaches nothing.

    Args:
        model: The Hugging Face model.
        architecture: Where its parts are.
    Returns:
        The registry; its ``absent`` says why a canonical name is missing.
    """
    builder = _Builder(model, architecture)
    builder.build()
    return HookRegistry(builder.points, builder.absent, builder.unsettled)


class _Builder:
    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.modules = dict(model.named_modules())
        self.architecture = architecture
        self.points: list[HookPoint] = []
        self.absent: dict[str, str] = {}
        self.sites: dict[str, Site] = {}
        self.pure = {norm.path for norm in _norms(architecture) if norm.is_open}
        self.unsettled = Unsettled()

    def site(self, path: str) -> Site:
        if path not in self.sites:
            module = self.modules[path]
            is_pure = isinstance(module, _PURE) or path in self.pure
            self.sites[path] = Site(module, self.unsettled, is_pure=is_pure)
        return self.sites[path]

    def add(
        self,
        name: str,
        path: str,
        tap: Tap,
        axes: str,
        *extra_aliases: str,
        is_default: bool = True,
    ) -> HookPoint:
        point = HookPoint(
            name, (*aliases_of(name), *extra_aliases), axes=axes, is_default=is_default
        )
        reason = self.unfit(name, path, tap, axes)
        if reason:
            self.lacks(reason, name, *extra_aliases)
            return point
        seen: Trace | None = self.architecture.seen
        point.__dict__["is_volatile"] = seen is not None and seen.verdicts[name][1]
        self.site(path).add(tap, point)
        self.points.append(point)
        return point

    def unfit(self, name: str, path: str, tap: Tap, axes: str) -> str:
        """Why a place cannot carry a point, as the watched run shows it; empty when it can."""
        seen: Trace | None = self.architecture.seen
        if seen is None:
            return ""
        if name not in seen.verdicts:
            reason = self.judge(seen, path, tap, axes)
            is_volatile = not reason and seen.visits[path][0].is_overwritten(tap.side)
            seen.verdicts[name] = (reason, is_volatile)
        return seen.verdicts[name][0]

    def judge(self, seen: Trace, path: str, tap: Tap, axes: str) -> str:
        times = len(seen.visits.get(path, ()))
        if times != 1:
            how = "never" if times == 0 else f"{times} times"
            return f"the model calls {path} {how} in one pass; a name stands for one value"
        visit = seen.visits[path][0]
        try:
            value = tap.read(Call(self.modules[path], visit.args, visit.kwargs, visit.output))
        except _UNREADABLE as error:
            return f"what passes there cannot be read as [{axes}]: {type(error).__name__}: {error}"
        if not isinstance(value, torch.Tensor) or value.dim() != len(axes.split()):
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            return f"what passes there is {shape}, not [{axes}]"
        return ""

    def lacks(self, reason: str, *names: str) -> None:
        for name in names:
            self.absent[name] = reason
            for alias in aliases_of(name):
                self.absent[alias] = reason

    # --- the model -------------------------------------------------------------------------------

    def build(self) -> None:
        a = self.architecture
        if a.embed is not None:
            self.add("embed.hook_in", a.embed, places.whole_input(), "batch pos")
            self.add("embed.hook_out", a.embed, places.whole_output(), _STREAM)
        if a.pos_embed is not None:
            self.add("pos_embed.hook_in", a.pos_embed, places.whole_input(), "batch pos")
            self.add("pos_embed.hook_out", a.pos_embed, places.whole_output(), _STREAM)
        else:
            self.lacks(a.absent["pos_embed"], "pos_embed.hook_in", "pos_embed.hook_out")
        if a.rotary is not None:
            # Position ids: of the hidden state it is also given, a rotary module reads only the dtype.
            position_ids = places.named_input(1, "position_ids")
            self.add("rotary_emb.hook_in", a.rotary, position_ids, "batch pos")
            self.add("rotary_emb.hook_cos", a.rotary, places.output_item(0), "batch pos d_rotary")
            self.add("rotary_emb.hook_sin", a.rotary, places.output_item(1), "batch pos d_rotary")
        else:
            names = [f"rotary_emb.hook_{part}" for part in ("in", "cos", "sin")]
            self.lacks(a.absent.get("rotary_emb", "computed inside each layer"), *names)
        for index, block in enumerate(a.blocks):
            self.block(f"blocks.{index}", block)
        if a.ln_final is not None:
            self.norm("ln_final", a.ln_final, _STREAM)
        else:
            names = [f"ln_final.hook_{part}" for part in ("in", "scale", "normalized", "out")]
            self.lacks(a.absent["ln_final"], *names)
        if a.unembed is not None:
            self.add("unembed.hook_in", a.unembed, places.whole_input(), _STREAM)
            self.add("unembed.hook_out", a.unembed, places.whole_output(), "batch pos d_vocab")
        else:
            self.lacks(a.absent["unembed"], "unembed.hook_in", "unembed.hook_out")

    # --- a block ---------------------------------------------------------------------------------

    def block(self, name: str, block: Block) -> None:
        self.add(f"{name}.hook_in", block.path, places.whole_input(), _STREAM)
        for part in ("ln1", "ln1_post", "ln2", "ln2_post"):
            if getattr(block, part) is None:
                reason = f"this model's blocks have no {part} (no norm in that place)"
                self.lacks(
                    reason,
                    *(f"{name}.{part}.hook_{p}" for p in ("in", "scale", "normalized", "out")),
                )
        if block.ln1 is not None and not block.is_post_norm:
            self.norm(f"{name}.ln1", block.ln1, _STREAM)
        if block.attn is not None:
            self.head_inputs(name, block.attn, block)
            self.attention(name, block.attn, block)
        else:
            self.lacks(
                "attention was not recognised in this layer", *_names(name, "attn", _ATTENTION)
            )
        if block.ln1_post is not None:
            self.norm(f"{name}.ln1_post", block.ln1_post, _STREAM, f"{name}.hook_attn_out")
        if block.attn is not None and block.mlp is not None:
            self.resid_mid(name, block)
        if block.is_post_norm and block.ln1 is not None:
            self.norm(f"{name}.ln1", block.ln1, _STREAM)
        if block.ln2 is not None and not block.is_post_norm:
            self.norm(f"{name}.ln2", block.ln2, _STREAM)
        if block.mlp is not None:
            self.mlp(name, block.mlp, block)
        else:
            self.lacks("an MLP was not recognised in this layer", *_names(name, "mlp", _MLP))
        if block.attn is None or block.mlp is None:
            self.lacks(
                "this layer is not recognised as attention and MLP", f"{name}.hook_resid_mid"
            )
        if block.is_post_norm and block.ln2 is not None:
            self.norm(f"{name}.ln2", block.ln2, _STREAM)
        if block.ln2_post is not None:
            self.norm(f"{name}.ln2_post", block.ln2_post, _STREAM, f"{name}.hook_mlp_out")
        self.add(f"{name}.hook_out", block.path, places.whole_output(), _STREAM)

    def resid_mid(self, name: str, block: Block) -> None:
        mid = f"{name}.hook_resid_mid"
        if block.unproved:
            self.lacks(block.unproved, mid)
            return
        if block.is_parallel:
            self.lacks(
                "attention and MLP run in parallel here, both reading hook_resid_pre, so the stream has no "
                "value between them",
                mid,
            )
            return
        reader = block.mid or (block.ln2.path if block.ln2 is not None else _entry(block.mlp))
        if reader is None:
            self.lacks("no module reads the stream between attention and MLP", mid)
            return
        reason = self.unfit(mid, reader, places.whole_input(), _STREAM)
        if reason:
            self.lacks(reason, mid)
            return
        point = HookPoint(mid, axes=_STREAM)
        span = BranchSpan(point)
        self.site(reader).add(span.tap(), point)
        self.site(block.path).set_span(span)
        self.points.append(point)

    def norm(self, name: str, norm: Norm, axes: str, *out_aliases: str) -> None:
        self.add(f"{name}.hook_in", norm.path, places.whole_input(), axes)
        if norm.is_open:
            one = axes.rsplit(" ", 1)[0] + " 1"
            self.add(f"{name}.hook_scale", norm.path, places.norm_scale(norm), one)
            self.add(f"{name}.hook_normalized", norm.path, places.norm_normalized(norm), axes)
        else:
            kind = type(self.modules[norm.path]).__name__
            self.lacks(
                f"{kind} is neither the LayerNorm nor the RMSNorm formula, so its inside has no names",
                f"{name}.hook_scale",
                f"{name}.hook_normalized",
            )
        self.add(f"{name}.hook_out", norm.path, places.whole_output(), axes, *out_aliases)

    # --- attention -------------------------------------------------------------------------------

    def attention(self, block_name: str, attn: Attention, block: Block) -> None:
        name = f"{block_name}.attn"
        self.add(f"{name}.hook_in", attn.path, places.whole_input(), _STREAM)
        heads = {
            "q": (attn.n_heads, attn.d_head),
            "k": (attn.n_key_value_heads, attn.d_head),
            "v": (attn.n_key_value_heads, attn.d_head_v),
        }
        axes = {
            "q": "batch pos head d_head",
            "k": "batch pos kv_head d_head",
            "v": "batch pos kv_head d_head",
        }
        for part, projection in (("q", attn.q), ("k", attn.k), ("v", attn.v)):
            self.projection(f"{name}.{part}", projection, heads[part], axes[part])
        for part, norm in (("q_norm", attn.q_norm), ("k_norm", attn.k_norm)):
            if norm is not None:
                self.norm(f"{name}.{part}", norm, axes[part[0]])
            else:
                parts = ("in", "scale", "normalized", "out")
                self.lacks(
                    f"attention has no {part} in this model",
                    *(f"{name}.{part}.hook_{p}" for p in parts),
                )
        self.inside(name, attn)
        if attn.o is not None:
            z = (attn.n_heads, attn.d_head_v)
            self.add(f"{name}.o.hook_in", attn.o, places.input_heads(*z), "batch pos head d_head")
            self.add(
                f"{name}.hook_result",
                attn.o,
                places.head_results(*z),
                "batch pos head d_model",
                is_default=False,
            )
            adds = block.attn_out == attn.o and block.ln1_post is None
            alias = (f"{block_name}.hook_attn_out",) if adds else ()
            self.add(f"{name}.o.hook_out", attn.o, places.whole_output(), _STREAM, *alias)
        alias = () if block.ln1_post is not None else (f"{block_name}.hook_attn_out",)
        if block.attn_out not in (None, attn.path):
            alias = ()  # the module also adds the stream; what is added is the projection's output
        self.add(f"{name}.hook_out", attn.path, places.whole_output(), _STREAM, *alias)

    def head_inputs(self, block_name: str, attn: Attention, block: Block) -> None:
        """What each head reads of the stream: one copy a head, before the norm."""
        names = {part: f"{block_name}.attn.hook_{part}_input" for part in ("q", "k", "v")}
        all_name = f"{block_name}.attn.hook_attn_in"
        shares = {"q": attn.q, "k": attn.k, "v": attn.v}
        if block.ln1 is None or block.is_post_norm or any(x is None for x in shares.values()):
            self.lacks("needs a norm before attention and known q, k, v", all_name, *names.values())
            return
        seen: Trace | None = self.architecture.seen
        used = [block.ln1.path, *(x.path for x in shares.values() if x is not None)]
        if seen is not None and any(seen.one(path) is None for path in used):
            self.lacks("norm or projections are not called exactly once", all_name, *names.values())
            return
        inputs = HeadInputs(self.modules[block.ln1.path])
        site = self.site(block.ln1.path)
        widths = {
            "q": (attn.n_heads, attn.d_head),
            "k": (attn.n_key_value_heads, attn.d_head),
            "v": (attn.n_key_value_heads, attn.d_head_v),
        }
        actions = {part: inputs.action(part, shares[part], widths[part]) for part in names}  # type: ignore[arg-type]
        if attn.n_heads == attn.n_key_value_heads:
            every = HookPoint(
                all_name,
                (f"{block_name}.hook_attn_in",),
                axes="batch pos head d_model",
                is_default=False,
            )
            site.add(inputs.tap(None, attn.n_heads), every)
            for part in names:
                self.site(shares[part].path).add(actions[part], every)  # type: ignore[union-attr]
            self.points.append(every)
        else:
            self.lacks(
                "keys and values are grouped, so heads do not share one input; use hook_q_input, "
                "hook_k_input and hook_v_input",
                all_name,
                f"{block_name}.hook_attn_in",
            )
        for part, name in names.items():
            axes = "batch pos head d_model" if part == "q" else "batch pos kv_head d_model"
            point = HookPoint(
                name, (f"{block_name}.hook_{part}_input",), axes=axes, is_default=False
            )
            site.add(inputs.tap(part, widths[part][0]), point)
            self.site(shares[part].path).add(actions[part], point)  # type: ignore[union-attr]
            self.points.append(point)

    def inside(self, name: str, attn: Attention) -> None:
        if not attn.is_softmax:
            names = [f"{name}.hook_{part}" for part in ("rot_q", "rot_k", "attn_scores", "pattern")]
            self.lacks("no softmax attention happens inside this layer", *names)
            return
        square = "batch head query key"
        scores = HookPoint(f"{name}.hook_attn_scores", axes=square)
        pattern = HookPoint(f"{name}.hook_pattern", axes=square)
        rotated: tuple[HookPoint | None, HookPoint | None] = (None, None)
        if attn.is_rotary:
            rotated = (
                HookPoint(f"{name}.hook_rot_q", axes="batch pos head d_head"),
                HookPoint(f"{name}.hook_rot_k", axes="batch pos kv_head d_head"),
            )
        else:
            self.lacks(
                "this model does not rotate q and k; use attn.hook_q and attn.hook_k",
                f"{name}.hook_rot_q",
                f"{name}.hook_rot_k",
            )
        span = AttentionSpan(attn.n_heads, attn.n_key_value_heads, scores, pattern, *rotated)
        self.site(attn.path).set_span(span)
        self.points.extend(span.points)

    def projection(
        self, name: str, projection: Projection | None, heads: tuple[int, int] | None, axes: str
    ) -> None:
        if projection is None:
            self.lacks(
                "no projection of that role was recognised", f"{name}.hook_in", f"{name}.hook_out"
            )
            return
        self.projection_input(f"{name}.hook_in", projection)
        self.add(
            f"{name}.hook_out", projection.path, places.projection_output(projection, heads), axes
        )

    def projection_input(self, name: str, projection: Projection) -> None:
        if projection.split is None:
            self.add(name, projection.path, places.whole_input(), _STREAM)
            return
        tap, action = places.shared_input(projection, projection.split)
        point = self.add(name, projection.path, tap, _STREAM)
        self.site(projection.path).add(action, point)

    # --- the MLP ---------------------------------------------------------------------------------

    def mlp(self, block_name: str, mlp: Mlp, block: Block) -> None:
        name = f"{block_name}.mlp"
        entry = _entry(mlp)
        if entry is not None:
            self.add(f"{name}.hook_in", entry, places.whole_input(), _STREAM)
        hidden = "batch pos d_mlp"
        if mlp.gate is not None:
            self.projection(f"{name}.gate", mlp.gate, None, hidden)
        else:
            self.lacks("the MLP is not gated", f"{name}.gate.hook_in", f"{name}.gate.hook_out")
        if mlp.inp is None:
            self.lacks(
                "no input projection of the MLP was recognised (experts have theirs inside)",
                f"{name}.in.hook_in",
                f"{name}.in.hook_out",
            )
        else:
            alias = f"{name}.hook_pre_linear" if mlp.gate is not None else f"{name}.hook_pre"
            path = mlp.inp.path
            self.projection_input(f"{name}.in.hook_in", mlp.inp)
            self.add(
                f"{name}.in.hook_out", path, places.projection_output(mlp.inp, None), hidden, alias
            )
        if mlp.out is not None:
            self.add(f"{name}.out.hook_in", mlp.out, places.whole_input(), hidden)
            adds = block.mlp_out == mlp.out != mlp.path and mlp.path is not None
            added = (f"{block_name}.hook_mlp_out",) if adds and block.ln2_post is None else ()
            self.add(f"{name}.out.hook_out", mlp.out, places.whole_output(), _STREAM, *added)
        exit_path = mlp.path or mlp.out
        if exit_path is not None:
            alias_out = () if block.ln2_post is not None else (f"{block_name}.hook_mlp_out",)
            if block.mlp_out not in (None, exit_path):
                alias_out = ()
            self.add(f"{name}.hook_out", exit_path, places.whole_output(), _STREAM, *alias_out)


_ENDS = ("hook_in", "hook_out")
_ATTENTION = (
    *_ENDS,
    *(f"{part}.{end}" for part in ("q", "k", "v", "o") for end in _ENDS),
    *(f"hook_{part}" for part in ("rot_q", "rot_k", "attn_scores", "pattern", "result")),
)
_MLP = (*_ENDS, *(f"{part}.{end}" for part in ("in", "gate", "out") for end in _ENDS))


def _names(block_name: str, part: str, points: tuple[str, ...]) -> list[str]:
    return [f"{block_name}.{part}.{point}" for point in points]


def _norms(architecture: Architecture) -> Iterator[Norm]:
    parts: list[object] = [architecture, *architecture.blocks]
    parts += [block.attn for block in architecture.blocks if block.attn is not None]
    for part in parts:
        yield from (value for value in vars(part).values() if isinstance(value, Norm))


def _entry(mlp: Mlp | None) -> str | None:
    """The module whose input is the MLP's input."""
    if mlp is None or mlp.path is not None:
        return None if mlp is None else mlp.path
    return None if mlp.inp is None else mlp.inp.path
