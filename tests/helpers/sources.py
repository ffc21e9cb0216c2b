"""The project's sources as the tests of house rules see them: read with ``ast``, never imported."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("diffmoe_ds", "benchmarks", "examples", "tools")
MODULE_NAME = re.compile(r"deepspeed(\.\w+)+")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One Python file: its path from the repository's root, its dotted name and its syntax tree."""

    path: str
    name: str
    lines: tuple[str, ...]
    tree: ast.Module


@lru_cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Return the Python files below ``folders``, sorted by path."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(_read(path) for path in paths)


def _read(path: Path) -> Module:
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text(encoding="utf-8")
    return Module(relative.as_posix(), name, tuple(text.splitlines()), ast.parse(text, filename=str(path)))


def imported_names(module: Module) -> Iterator[tuple[int, str]]:
    """Yield the line and dotted name of every import, inside functions and ``TYPE_CHECKING`` too.

    ``from a.b import c`` yields ``a.b.c``: only the caller knows whether ``c`` is a module.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def names_used(module: Module) -> Iterator[tuple[int, str]]:
    """Yield the imports of a module and the dotted names it reads, such as ``torch.distributed.get_rank``.

    Strings that look like a module below ``deepspeed`` count too: ``import_module`` takes them.
    """
    yield from imported_names(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node) if _is_dotted(node) else ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.lineno, node.value


def _is_dotted(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def import_graph() -> dict[str, set[str]]:
    """Return which modules of the package each of them imports, by name.

    ``from diffmoe_ds.cli import train`` counts for ``diffmoe_ds.cli.train``; the ``__init__`` that Python runs on the
    way to a module does not count.
    """
    names = {module.name for module in modules("diffmoe_ds")}
    graph: dict[str, set[str]] = {}
    for module in modules("diffmoe_ds"):
        found = (_module_of(name, names) for _, name in imported_names(module))
        graph[module.name] = {name for name in found if name is not None and name != module.name}
    return graph


def _module_of(name: str, modules: set[str]) -> str | None:
    for candidate in (name, name.rpartition(".")[0]):
        if candidate in modules:
            return candidate
    return None


def functions(module: Module) -> Iterator[tuple[str, Function]]:
    """Yield every function, nested ones and methods too, with its qualified name."""
    yield from _functions(module.tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            name += "."
        yield from _functions(child, name)


def length(function: Function) -> int:
    """Return the lines of a function, decorators and docstring included."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return (function.end_lineno or function.lineno) - first + 1


def parameters(function: Function) -> int:
    """Return the number of parameters without ``self`` and ``cls``; ``*args`` and ``**kwargs`` count one each."""
    found = function.args
    names = [argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    starred = (found.vararg is not None) + (found.kwarg is not None)
    return len(names) - (bool(names) and names[0] in ("self", "cls")) + starred


def tracked_files() -> list[Path] | None:
    """Return the paths that git tracks and that exist, or None outside a checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return None
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
