"""Pairs of signature and docstring out of Python source."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Docstring:
    """A documented function or class: `signature` as written, `text` without its indentation."""

    signature: str
    text: str
    name: str
    line: int


def docstrings(source: str) -> Iterator[Docstring]:
    """Every documented function, method and class of a module, from top to bottom.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: the source does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    lines = source.splitlines()
    for name, node in _walk(tree, ""):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            yield Docstring(_signature(node, lines), inspect.cleandoc(text), name, node.lineno)


def _walk(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Documented]]:
    stack: list[tuple[ast.AST, str]] = [(tree, prefix)]
    while stack:
        parent, path = stack.pop()
        children: list[tuple[ast.AST, str]] = []
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, Documented):
                children.append((child, f"{path}{child.name}."))
            elif isinstance(child, ast.stmt):
                children.append((child, path))
        if isinstance(parent, Documented):
            yield path[:-1], parent
        stack += reversed(children)


def _signature(node: Documented, lines: list[str]) -> str:
    """The source from `def` or `class` to the colon, dedented; one-line bodies are cut off."""
    body = node.body[0]
    last = body.lineno - 1
    if last < node.lineno:
        # Body on the line of the colon: byte columns, as ast counts them.
        return lines[node.lineno - 1].encode()[node.col_offset : body.col_offset].decode(errors="ignore").rstrip()
    part = [line.rstrip() for line in lines[node.lineno - 1 : last]]
    while part and (not part[-1] or part[-1].lstrip().startswith("#")):
        part.pop()
    return inspect.cleandoc("\n".join([part[0].lstrip(), *part[1:]])) if part else ""
