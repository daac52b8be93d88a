"""A hash of a recipe's code: its own text and that of the neighbours that it imports."""

from __future__ import annotations

import ast
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["source_files", "source_hash"]

IGNORED = "metadata"  # says nothing of what is measured


def source_hash(path: Path) -> str:
    """Return a hash of a recipe file and of the modules of its folder that it imports.

    Imports are followed through the code, also inside functions, as far as they lead to files
    of the recipe's folder; installed packages do not count, nor do imports by computed names.
    The text of the top-level function ``metadata`` of the recipe does not count either, so
    that what is known of a checkpoint can be corrected without measuring it again; it does
    where other code of the recipe names it, as ``model`` may, to build the network.

    Args:
        path: The recipe.
    """
    root = path.resolve().parent
    digest = hashlib.sha256()
    for file, text, tree in _texts(path):
        name = os.path.relpath(file, root)
        if file == path.resolve():
            text = _without(tree, text)
            name = ""  # a recipe that was renamed is the same recipe
        digest.update(f"{name}\0{len(text)}\0{text}".encode())
    return digest.hexdigest()


def source_files(path: Path) -> list[Path]:
    """Return the files that :func:`source_hash` reads, the recipe first."""
    return [file for file, _, _ in _texts(path)]


def _texts(path: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    root = path.resolve().parent
    waiting, seen = [path.resolve()], set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # a neighbour that cannot have been imported
            tree = ast.Module([], [])
        yield file, text, tree
        waiting += sorted(set(_neighbours(tree, file, root)), reverse=True)


def _without(tree: ast.Module, text: str) -> str:
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == IGNORED]
    inside = {id(part) for node in found for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == IGNORED and id(node) not in inside:
            return text
    lines = io.StringIO(text).readlines()  # as the parser counts them: other breaks end no line
    for node in found:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        last = node.end_lineno or first
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "".join(lines)


def _neighbours(tree: ast.Module, file: Path, root: Path) -> Iterator[Path]:
    # The files in the folder that the code of `file` imports.
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(root, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else root
            pieces = node.module.split(".") if node.module else []
            yield from _files(base, pieces)
            for alias in node.names:
                yield from _files(base, [*pieces, alias.name])


def _files(base: Path, pieces: list[str]) -> Iterator[Path]:
    for piece in pieces:
        for file in (base / f"{piece}.py", base / piece / "__init__.py"):
            if file.is_file():
                yield file.resolve()
        base = base / piece
