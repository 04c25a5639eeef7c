"""Writes the docstrings of the compiled core into its stub, where editors show them. Run by `make stubs`.

Names, types and defaults in `python/sssd/_core.pyi` are written by hand, and held by stubtest.
"""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

STUB = Path(__file__).resolve().parent.parent / "python/sssd/_core.pyi"
Definition = ast.ClassDef | ast.FunctionDef


def definitions(tree: ast.Module) -> dict[str, Definition]:
    """Classes, functions and methods of a stub by qualified name, in order."""
    found: dict[str, Definition] = {}
    for node in tree.body:
        if isinstance(node, Definition):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}": item for item in node.body if isinstance(item, Definition)}
    return found


def documentation(core: ModuleType, name: str) -> str | None:
    """What the extension says of a name. None where only Python says something, as of every `__len__`."""
    owner, last = core, name
    while "." in last:
        first, _, last = last.partition(".")
        owner = getattr(owner, first)
    held = vars(owner).get(last)
    said = getattr(getattr(held, "__func__", held), "__doc__", None)
    pythons = [getattr(getattr(kind, last, None), "__doc__", None) for kind in (object, list)]
    return inspect.cleandoc(said) if said and said not in pythons else None


def docstring(text: str, node: Definition) -> list[str]:
    """The lines of a docstring."""
    first, *others = text.replace("\\", "\\\\").split("\n")
    lines = [f'"""{first}"""'] if not others else [f'"""{first}', *others, '"""']
    return [f"{' ' * (node.col_offset + 4)}{line}".rstrip() for line in lines]


def documented(stub: str, core: ModuleType) -> str:
    """The stub with the docstrings that the extension has, and no others."""
    lines = stub.split("\n")
    for name, node in reversed(definitions(ast.parse(stub)).items()):
        said = documentation(core, name)
        new = docstring(said, node) if said else []
        first, last = node.body[0], node.body[-1]
        if isinstance(node, ast.ClassDef):
            held = ast.get_docstring(node, clean=False) is not None
            start = min([first.lineno, *(line.lineno for line in getattr(first, "decorator_list", []))])
            end = (first.end_lineno or start) if held else start - 1
        else:
            start, end = first.lineno, last.end_lineno or last.lineno
            head = lines[start - 1][: first.col_offset].rstrip()
            new = [*([head] if head else []), *(new or [f"{' ' * (node.col_offset + 4)}..."])]
        lines[start - 1 : end] = new
    return "\n".join(lines)


def main() -> None:
    core = importlib.import_module("sssd._core")
    STUB.write_text(documented(STUB.read_text(), core))
    ruff = Path(sys.executable).parent / "ruff"
    subprocess.run([ruff, "format", "--quiet", STUB], check=True)


if __name__ == "__main__":
    main()
