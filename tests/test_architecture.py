"""The shape of the package as rules over its source text; nothing of it is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_pipebd"
ROOT = Path(__file__).parents[1] / PACKAGE

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils", "common", "types", "base"}
LIGHTNING_INTERNALS = "lightning_internals"

#: What each floor may import beside the standard library; the root is the floor named "".
FLOORS = {
    "planning": {f"{PACKAGE}.planning"},
    "runtime": {"torch", "typing_extensions", f"{PACKAGE}.planning", f"{PACKAGE}.runtime"},
    # safetensors, matplotlib, rich and shtab are optional, and imported where they are asked for.
    "": {
        *("torch", "typing_extensions", "lightning", "torchmetrics", "jsonargparse", "yaml"),
        *("safetensors", "matplotlib", "rich", "shtab", PACKAGE),
    },
}

#: The functions of torch.distributed that move data or make ranks wait for each other.
COMMUNICATION = {
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "P2POp", "send_object_list", "recv_object_list"),
    *("broadcast", "broadcast_object_list", "reduce", "all_reduce", "all_reduce_coalesced", "barrier"),
    *("gather", "gather_object", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_coalesced"),
    *("scatter", "scatter_object_list", "reduce_scatter", "reduce_scatter_tensor", "monitored_barrier"),
    *("all_to_all", "all_to_all_single"),
}

#: The functions of torch.distributed that make or end process groups.
MEMBERSHIP = {"init_process_group", "destroy_process_group", "new_group", "new_subgroups", "split_group"}


@dataclass(frozen=True)
class Module:
    path: Path
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return ".".join((PACKAGE, *self.parts))

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def floor(self) -> str:
        return self.parts[0] if self.parts and self.parts[0] in FLOORS else ""

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @cached_property
    def names(self) -> list[tuple[int, str]]:
        """Every dotted name this module takes from another, with its line: imported, or reached through an import."""
        aliases: dict[str, str] = {}
        found: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    aliases[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
                    found.append((node.lineno, alias.name))
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    found.append((node.lineno, f"{node.module}.{alias.name}"))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                first, _, rest = dotted_name(node).partition(".")
                if first in aliases:
                    found.append((node.lineno, f"{aliases[first]}.{rest}"))
        return found


Rule = Callable[[list[Module]], Iterator[str]]


def dotted_name(node: ast.expr) -> str:
    """Give ``a.b.c`` for a chain of attributes that starts at a plain name, otherwise text that is no dotted name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def read_package(root: Path) -> list[Module]:
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules.append(Module(path, parts[:-1] if parts[-1] == "__init__" else parts))
    return modules


def imports(module: Module, *, at_run_time: bool = False) -> Iterator[tuple[int, str]]:
    """Give line and dotted name of each import; `at_run_time` leaves out what only a type checker reads."""
    nodes: list[ast.AST] = [module.tree]
    while nodes:
        node = nodes.pop()
        if at_run_time and isinstance(node, ast.If) and dotted_name(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        else:
            nodes.extend(ast.iter_child_nodes(node))


def directories_are_packages(modules: list[Module]) -> Iterator[str]:
    """Without its `__init__.py` a directory works in a checkout and is missing from what pip installs."""
    for directory in sorted({module.path.parent for module in modules}):
        if not (directory / "__init__.py").exists():
            yield f"{directory.name} has no __init__.py"


def floors_import_only_what_they_may(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        allowed = FLOORS[module.floor]
        for line, name in imports(module):
            is_standard = name.split(".")[0] in sys.stdlib_module_names
            is_allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)
            if not (is_standard or is_allowed or name.startswith(".")):
                yield f"{module.name}:{line} must not import {name}"


def imports_are_absolute(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        yield from (f"{module.name}:{line} imports relatively" for line, name in imports(module) if name[0] == ".")


def imports_form_no_circle(modules: list[Module]) -> Iterator[str]:
    known = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        # `from package import name` needs the module `name` where there is one, otherwise the package itself.
        needed = (name if name in known else name.rpartition(".")[0] for _, name in imports(module, at_run_time=True))
        graph[module.name] = {name for name in needed if name in known}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"import circle: {' <- '.join(error.args[1])}"


def files_are_short(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        num_lines = len(module.text.splitlines())
        if num_lines > MAX_FILE_LINES:
            yield f"{module.name} has {num_lines} lines, at most {MAX_FILE_LINES} are allowed"


def functions_are_short(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    yield f"{module.name}:{node.lineno} {node.name} has {num_lines} lines"


def modules_are_named_for_what_they_do(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        yield from (f"{module.name}: {part} says nothing" for part in module.parts if part.strip("_") in VAGUE_NAMES)


def only_transport_communicates(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        # Lightning's own hooks (barrier, broadcast) are collectives by definition, and run before a transport exists.
        is_host = module.parts == (LIGHTNING_INTERNALS, "processes")
        is_transport = is_host or (module.floor == "runtime" and module.stem.startswith("transport"))
        allowed = (
            (COMMUNICATION | MEMBERSHIP)
            if is_transport
            else MEMBERSHIP
            if module.name == f"{PACKAGE}.strategy"
            else set()
        )
        for line, name in module.names:
            function = name.rpartition(".")[2]
            if name.startswith("torch.distributed.") and function in (COMMUNICATION | MEMBERSHIP) - allowed:
                yield f"{module.name}:{line} must leave {name} to the transport"


def one_package_uses_lightning_internals(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.parts[:1] == (LIGHTNING_INTERNALS,):
            continue
        for line, name in module.names:
            is_lightning = name.split(".")[0] in {"lightning", "lightning_fabric", "pytorch_lightning"}
            if is_lightning and any(part.startswith("_") and not part.startswith("__") for part in name.split(".")):
                yield f"{module.name}:{line} uses the private name {name}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                owner = dotted_name(node.value)
                if owner.rpartition(".")[2] == "trainer":
                    yield f"{module.name}:{node.lineno} uses the private name {owner}.{node.attr}"


def public_modules_list_their_names(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        body = module.tree.body[1:] if ast.get_docstring(module.tree) is not None else module.tree.body
        targets = {dotted_name(target) for node in body if isinstance(node, ast.Assign) for target in node.targets}
        targets |= {dotted_name(node.target) for node in body if isinstance(node, ast.AnnAssign)}
        is_public = not any(part.startswith("_") for part in module.parts)
        if is_public and body and "__all__" not in targets:
            yield f"{module.name} has no __all__"


def nothing_prints(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and dotted_name(node.func) == "print":
                yield f"{module.name}:{node.lineno} prints"


RULES: list[Rule] = [
    directories_are_packages,
    floors_import_only_what_they_may,
    imports_are_absolute,
    imports_form_no_circle,
    files_are_short,
    functions_are_short,
    modules_are_named_for_what_they_do,
    only_transport_communicates,
    one_package_uses_lightning_internals,
    public_modules_list_their_names,
    nothing_prints,
]


def test_package_is_found() -> None:
    assert {module.floor for module in read_package(ROOT)} == set(FLOORS)


@pytest.mark.parametrize("rule", RULES)
def test_package_follows_the_rule(rule: Rule) -> None:
    assert list(rule(read_package(ROOT))) == []


#: Rule, the file with the planted fault, its text, and what the report must say.
FAULTS = [
    (directories_are_packages, "planning/deeper/a.py", "", "deeper has no __init__.py"),
    (floors_import_only_what_they_may, "planning/a.py", "import torch", "planning.a:1 must not import torch"),
    (floors_import_only_what_they_may, "planning/a.py", "from lightning_pipebd.runtime import b", "runtime.b"),
    (floors_import_only_what_they_may, "planning/a.py", "from lightning_pipebd import strategy", "pipebd.strategy"),
    (floors_import_only_what_they_may, "runtime/a.py", "def f():\n    import lightning", "runtime.a:2 must not"),
    (floors_import_only_what_they_may, "runtime/a.py", "from lightning_pipebd.strategy import b", "pipebd.strategy"),
    (floors_import_only_what_they_may, "a.py", "import numpy", "pipebd.a:1 must not import numpy"),
    (imports_are_absolute, "runtime/a.py", "from . import b", "runtime.a:1 imports relatively"),
    (imports_are_absolute, "runtime/a.py", "from .b import c", "runtime.a:1 imports relatively"),
    (imports_form_no_circle, "planning/a.py", "from lightning_pipebd.planning import good", "planning.good"),
    (imports_form_no_circle, "planning/a.py", "def f():\n    import lightning_pipebd.planning.good", "planning.good"),
    (files_are_short, "a.py", "\n" * 401, "pipebd.a has 401 lines"),
    (functions_are_short, "a.py", "def long():" + "\n    pass" * 60, "pipebd.a:1 long has 61 lines"),
    (functions_are_short, "a.py", "class C:\n  async def f(self):" + "\n    pass" * 60, "a:2 f has 61 lines"),
    (modules_are_named_for_what_they_do, "runtime/utils.py", "", "utils says nothing"),
    (modules_are_named_for_what_they_do, "runtime/_base.py", "", "_base says nothing"),
    (modules_are_named_for_what_they_do, "common/a.py", "", "common says nothing"),
    (only_transport_communicates, "runtime/a.py", "import torch.distributed as d\nd.send(1)", "torch.distributed.send"),
    (only_transport_communicates, "runtime/a.py", "from torch import distributed\ndistributed.barrier()", "barrier"),
    (only_transport_communicates, "runtime/a.py", "import torch\ntorch.distributed.all_reduce(1)", "all_reduce"),
    (only_transport_communicates, "strategy.py", "from torch.distributed import isend", "torch.distributed.isend"),
    (only_transport_communicates, "lightning_internals/module.py", "from torch.distributed import isend", "isend"),
    (only_transport_communicates, "transport.py", "from torch.distributed import isend", "torch.distributed.isend"),
    (only_transport_communicates, "a.py", "from torch.distributed import new_group", "torch.distributed.new_group"),
    (one_package_uses_lightning_internals, "a.py", "from lightning.pytorch._x import y", "lightning.pytorch._x.y"),
    (one_package_uses_lightning_internals, "a.py", "from lightning.pytorch.x import _y", "pytorch.x._y"),
    (
        one_package_uses_lightning_internals,
        "a.py",
        "import lightning as l\nl.pytorch._x()",
        "a:2 uses the private",
    ),
    (one_package_uses_lightning_internals, "a.py", "def f(s):\n    s.trainer._x()", "private name s.trainer._x"),
    (public_modules_list_their_names, "a.py", "x = 1", "pipebd.a has no __all__"),
    (public_modules_list_their_names, "runtime/__init__.py", "from x import y", "pipebd.runtime has no __all__"),
    (nothing_prints, "a.py", "def f():\n    print(1)", "pipebd.a:2 prints"),
]

#: The nearest that is still allowed, one or more modules for each rule.
GOOD_PACKAGE = {
    "__init__.py": '"""A docstring needs no list of names."""',
    "planning/__init__.py": "",
    "planning/good.py": "import math\nimport lightning_pipebd.planning.a\n__all__: list[str] = []",
    "planning/a.py": "from typing import TYPE_CHECKING\n__all__ = ['b']\n"
    "if TYPE_CHECKING:\n    from lightning_pipebd.planning import good\n",
    "runtime/__init__.py": "",
    "runtime/transport_gloo.py": "import torch.distributed as d\n__all__ = []\nd.send(1)\nd.new_group()",
    "runtime/_private.py": "from torch.distributed import is_initialized\nx = 1\nx.send()",
    "strategy.py": "import torch.distributed as d\n__all__ = []\nd.init_process_group()",
    "lightning_internals/__init__.py": "",
    "lightning_internals/trainer.py": "from lightning.pytorch._x import _y\n__all__ = []\n_y.trainer._z()" + "\n" * 397,
    "lightning_internals/processes.py": "import torch.distributed as d\n__all__ = []\nd.barrier()",
    "database.py": "import lightning\n__all__ = [lightning.__name__]\ndef f():" + "\n    pass" * 59,
}


def write_package(root: Path, files: dict[str, str]) -> list[Module]:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_package(root / PACKAGE)


@pytest.mark.parametrize("rule", RULES)
def test_rule_accepts_the_nearest_allowed(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(write_package(tmp_path, GOOD_PACKAGE))) == []


@pytest.mark.parametrize(("rule", "name", "text", "report"), FAULTS)
def test_rule_reports_the_planted_fault(rule: Rule, name: str, text: str, report: str, tmp_path: Path) -> None:
    (fault,) = rule(write_package(tmp_path, {**GOOD_PACKAGE, name: text}))
    assert report in fault


def test_every_rule_has_a_planted_fault() -> None:
    assert {rule for rule, *_ in FAULTS} == set(RULES)
