"""Data goes one way: nothing imports what comes later on the way from a checkpoint to an answer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import chatglm_ov

ROOT = Path(chatglm_ov.__file__).parent

ORDER = (
    "errors field_errors json_files unicode system native published_names rope_scaling config presets weight_formats",
    "lowering.__init__ models checkpoint weights lowering",
    "chat tokenizer documents calibration conversion",
    "passes runtime generation modeling",
    "bench evaluation demo cli __main__",
)
"""Modules and packages at the top, each with what it may import before it. The words that model files are written in
stand before them, what makes a graph of the words behind the weights."""

RANKS = {name: rank for rank, name in enumerate(" ".join(ORDER).split())}


def unit(module: str) -> str:
    """What a module counts as in ORDER."""
    parts = module.split(".")[1:]
    if parts == ["lowering"]:
        return "lowering.__init__"
    return parts[0] if parts else ""


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "chatglm_ov")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "chatglm_ov":
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names if is_module(f"{node.module}.{name.name}"))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_nothing_later_is_imported():
    seen, backwards = 0, []
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue  # which is the public names, brought in when they are asked for
        for imported in imports(path):
            name = module_name(path)
            if unit(imported) in ("", unit(name)):
                continue
            seen += 1
            if RANKS[unit(imported)] > RANKS[unit(name)]:
                backwards.append(f"{name} imports {imported}")
    assert not backwards, "\n".join(backwards)
    assert seen > 300
