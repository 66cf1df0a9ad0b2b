"""The house rules that no type checker knows: who may hook, who may import whom, what is never written."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lensbridge

PACKAGE = Path(lensbridge.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}

Rule = Callable[[str, ast.Module], Iterator[str]]
"""Given a file's place in the package and its syntax tree: its offences, each with a line."""


def offences(rule: Rule) -> list[str]:
    """What the whole package does against a rule."""
    return [
        f"{name}:{found}"
        for name, path in FILES.items()
        for found in rule(name, ast.parse(path.read_text(encoding="utf-8")))
    ]


def part_of(name: str) -> str:
    """The part a file belongs to: "hooks" for hooks/tap.py, "" for files at the top."""
    return name.split("/", maxsplit=1)[0] if "/" in name else ""


# --- the rules ----------------------------------------------------------------------------------------------


def torch_hooks(name: str, tree: ast.Module) -> Iterator[str]:
    """PyTorch hooks are made in hooks/tap.py and capture.py; Tensor.register_hook in point.py and capture.py."""
    for node in ast.walk(tree):
        called = getattr(node, "attr", None) or getattr(node, "id", None) or ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            called = node.value  # getattr(module, "register_forward_hook")
        if isinstance(node, ast.alias):
            called = node.name
        if not called.startswith("register_") or not called.endswith("hook"):
            continue
        home = "hooks/point.py" if called == "register_hook" else "hooks/tap.py"
        if name not in (home, "hooks/capture.py"):
            yield f"{getattr(node, 'lineno', 0)} uses {called}"


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str, list[str]]]:
    """Every import, also inside functions: line, absolute dotted module, names taken from it."""
    home = ["lensbridge", *name.removesuffix(".py").split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module, [alias.name for alias in node.names]


def direction(name: str, tree: ast.Module) -> Iterator[str]:
    """methods -> bridge -> hooks; hooks knows torch and has never heard of transformers."""
    forbidden = {
        "hooks": ("lensbridge.bridge", "lensbridge.methods", "transformers", "accelerate"),
        "bridge": ("lensbridge.methods",),
    }.get(part_of(name), ())
    for line, module, taken in imports(name, tree):
        for path in (module, *(f"{module}.{item}" for item in taken)):
            if any(path == other or path.startswith(f"{other}.") for other in forbidden):
                yield f"{line} imports {path}"
                break
        # `from .. import X` would reach the public names, and through them everything.
        parts = ("hooks", "bridge", "methods", "_version")
        if part_of(name) in ("hooks", "bridge") and module == "lensbridge":
            yield from (
                f"{line} imports {item} from the top" for item in taken if item not in parts
            )


def public_face(name: str, tree: ast.Module) -> Iterator[str]:
    """methods take only public names of bridge and hooks, from the packages themselves, and no privates."""
    if part_of(name) != "methods":
        return
    for line, module, taken in imports(name, tree):
        parts = module.split(".")
        if parts[0] != "lensbridge" or parts[1:2] == ["methods"]:
            continue
        if module not in ("lensbridge", "lensbridge.bridge", "lensbridge.hooks"):
            yield f"{line} imports from {module}"
            continue
        public = importlib.import_module(module).__all__
        if module == "lensbridge":
            public = [*public, "bridge", "hooks"]
        yield from (f"{line} imports {item}" for item in taken if item not in public)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if not own and not node.attr.endswith("__"):
            yield f"{node.lineno} reaches for {node.attr}"


def asserts(name: str, tree: ast.Module) -> Iterator[str]:
    """`assert` disappears under -O; errors are raised instead."""
    yield from (f"{node.lineno} asserts" for node in ast.walk(tree) if isinstance(node, ast.Assert))


def swallowed(name: str, tree: ast.Module) -> Iterator[str]:
    """No exception is passed over: no empty handler, no suppress."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            empty = all(
                isinstance(line, (ast.Pass, ast.Continue))
                or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                for line in node.body
            )
            if empty:
                yield f"{node.lineno} swallows an exception"
        elif "suppress" in (getattr(node, "attr", None), getattr(node, "id", None)):
            yield f"{getattr(node, 'lineno', 0)} suppresses exceptions"


_MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_MAKERS = ("list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter", "bytearray")


def mutable_defaults(name: str, tree: ast.Module) -> Iterator[str]:
    """A default is made once and shared by all calls."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        for default in (*node.args.defaults, *node.args.kw_defaults):
            made = isinstance(default, ast.Call) and (
                getattr(default.func, "id", None) or getattr(default.func, "attr", None)
            )
            if isinstance(default, _MUTABLE) or made in _MAKERS:
                yield f"{default.lineno} has a mutable default"


RULES = [torch_hooks, direction, public_face, asserts, swallowed, mutable_defaults]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    """No file of the package breaks it."""
    assert {"hooks/tap.py", "bridge/bridge.py", "methods/__init__.py"} <= set(FILES)
    assert offences(rule) == []


# --- that the rules see what they are for -------------------------------------------------------------------

BROKEN: list[tuple[Rule, str, str]] = [
    (torch_hooks, "hooks/point.py", "module.register_forward_hook(fn)"),
    (torch_hooks, "hooks/scope.py", "tensor.register_hook(fn)"),
    (torch_hooks, "hooks/tap.py", "tensor.register_hook(fn)"),
    (torch_hooks, "bridge/run.py", "m.register_forward_pre_hook(fn)"),
    (torch_hooks, "methods/a.py", "m.register_full_backward_hook(fn)"),
    (torch_hooks, "bridge/run.py", "getattr(m, 'register_forward_hook')(fn)"),
    (
        torch_hooks,
        "bridge/run.py",
        "from torch.nn.modules.module import register_module_forward_hook",
    ),
    (torch_hooks, "bridge/run.py", "torch.nn.modules.module.register_module_forward_pre_hook(f)"),
    (torch_hooks, "bridge/run.py", "p.register_post_accumulate_grad_hook(fn)"),
    (direction, "hooks/tap.py", "import transformers"),
    (direction, "hooks/tap.py", "def f():\n    from transformers.utils import logging"),
    (direction, "hooks/tap.py", "from ..bridge import TransformerBridge"),
    (direction, "hooks/tap.py", "from .. import bridge"),
    (direction, "hooks/tap.py", "import lensbridge.methods.lens"),
    (direction, "hooks/tap.py", "from lensbridge import TransformerBridge"),
    (direction, "bridge/run.py", "from ..methods.lens import f"),
    (direction, "bridge/run.py", "from .. import methods"),
    (direction, "bridge/run.py", "from lensbridge.methods import lens"),
    (public_face, "methods/a.py", "from ..bridge.run import Stack"),
    (public_face, "methods/a.py", "from ..bridge import run"),
    (public_face, "methods/a.py", "from ..hooks.point import attach"),
    (public_face, "methods/a.py", "from lensbridge.bridge.cache import take"),
    (public_face, "methods/a.py", "import lensbridge.bridge.run"),
    (public_face, "methods/a.py", "bridge._stack.call({})"),
    (asserts, "cli.py", "def f(x):\n    assert x"),
    (swallowed, "cli.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (swallowed, "cli.py", "try:\n    f()\nexcept (KeyError, OSError):\n    ..."),
    (
        swallowed,
        "cli.py",
        "for x in y:\n    try:\n        f()\n    except KeyError:\n        continue",
    ),
    (swallowed, "cli.py", "with contextlib.suppress(KeyError):\n    f()"),
    (mutable_defaults, "cli.py", "def f(x=[]): ..."),
    (mutable_defaults, "cli.py", "def f(*, x={}): ..."),
    (mutable_defaults, "cli.py", "def f(x=dict()): ..."),
    (mutable_defaults, "cli.py", "async def f(x={1}): ..."),
    (mutable_defaults, "cli.py", "f = lambda x=[1 for _ in y]: x"),
]

KEPT: list[tuple[Rule, str, str]] = [
    (torch_hooks, "hooks/tap.py", "self.module.register_forward_hook(fn)"),
    (torch_hooks, "hooks/point.py", "value.register_hook(fn)"),
    (torch_hooks, "bridge/run.py", "'''Only tap.py calls register_forward_hook'''"),
    (torch_hooks, "bridge/run.py", "self.register_buffer('x', y)"),
    (direction, "hooks/tap.py", "import torch\nfrom .point import HookPoint"),
    (direction, "bridge/run.py", "import transformers\nfrom ..hooks.point import attach"),
    (direction, "bridge/run.py", "from . import run"),
    (direction, "methods/lens.py", "from ..bridge import TransformerBridge"),
    (public_face, "methods/a.py", "from ..bridge import TransformerBridge\nfrom .lens import f"),
    (public_face, "methods/a.py", "from ..hooks import HookPoint\nfrom torch import Tensor"),
    (public_face, "methods/a.py", "self._x = type(self).__name__"),
    (public_face, "bridge/a.py", "x._y"),
    (
        swallowed,
        "cli.py",
        "try:\n    f()\nexcept KeyError as error:\n    raise InputError from error",
    ),
    (swallowed, "cli.py", "try:\n    f()\nexcept KeyError:\n    x = None"),
    (mutable_defaults, "cli.py", "def f(x=(), y=None, z=frozenset()): ..."),
]


@pytest.mark.parametrize(("rule", "name", "source"), BROKEN)
def test_rule_sees_an_offence(rule: Rule, name: str, source: str) -> None:
    """Each rule finds exactly one offence in code that breaks it."""
    assert len(list(rule(name, ast.parse(source)))) == 1


@pytest.mark.parametrize(("rule", "name", "source"), KEPT)
def test_rule_lets_good_code_be(rule: Rule, name: str, source: str) -> None:
    """What is allowed is no offence."""
    assert list(rule(name, ast.parse(source))) == []


def test_importing_hooks_does_not_import_transformers() -> None:
    """Nor does anything hooks imports, in a fresh interpreter."""
    probe = (
        "import sys, lensbridge.hooks; print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == ["False", "True"]
