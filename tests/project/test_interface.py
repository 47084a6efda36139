"""What stands on what: users on the interface as promised, modules on those below, calls of _C on its stub."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import blurry_attn
from blurry_attn import _C

ROOT = Path(__file__).parents[2]
PACKAGE = Path(blurry_attn.__file__).parent  # installed, or in the tree


def test_the_interface_is_the_one_that_is_promised() -> None:
    for name in ("matplotlib", "tqdm", "safetensors", "transformers"):
        pytest.importorskip(name)
    from interface import FILE, interface

    promised, found = (set(text.splitlines()) for text in (FILE.read_text(), interface()))
    lines = [*(f"- {line}" for line in sorted(promised - found)), *(f"+ {line}" for line in sorted(found - promised))]
    assert not lines, "\n".join(("python tests/tools/interface.py writes what is promised from here on:", *lines))


def stub() -> dict[str, ast.FunctionDef]:
    body = ast.parse((PACKAGE / "_C.pyi").read_text()).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def used() -> Iterator[str]:
    """Attributes of _C in the package, and operators that ``_operator`` takes from it by name."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_C":
                yield node.attr
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_operator":
                assert isinstance(node.args[0], ast.Constant)
                yield node.args[0].value


def test_the_stub_names_all_that_is_called_and_nothing_else() -> None:
    assert set(used()) == set(stub()) == {name for name in vars(_C) if not name.startswith("__")}


# A module imports those before it, or of its own package. One import within a function goes the other way: ops loads
# distributed.dtensor where it is given a DTensor.
ORDER = (
    "_build", "_load", "_C", "files", "geometry", "window", "flux_rows", "spectrum", "state", "serialization", "ops",
    "flops", "ragged", "reference", "modules", "swap", "_picture", "viz", "distributed", "integrations", "lm",
)  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """What a module of the package imports of it, outside functions: the first name below ``blurry_attn``."""
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join((*base, name)).partition(".")[0] for name in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path) -> None:
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    own = len(ORDER) if name == "__init__" else ORDER.index(name)
    above = [other for other in imported(path) if other != name and ORDER.index(other) >= own]
    assert not above


@pytest.mark.parametrize("name", sorted(stub()))
def test_the_stub_has_the_parameters_of_what_is_compiled(name: str) -> None:
    """Names where it has names; of an operator, those of its schema, as far as _C takes them."""
    arguments = stub()[name].args
    listed = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    head = (inspect.getdoc(getattr(_C, name)) or "").partition(") ->")[0]
    compiled = [part.split("(")[-1].split(", ")[-1] for part in head.split(": ")[:-1]]
    assert len(listed) == len(compiled)
    if arguments.posonlyargs:
        schema = getattr(torch.ops.blurry_attn, name).default._schema
        assert listed == [argument.name for argument in schema.arguments][: len(listed)]
    else:
        assert listed == compiled
