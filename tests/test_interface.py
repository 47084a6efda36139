"""What others build on: the public interface is as promised, and the stub of _C names all that is called of it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blurry_attn import _C

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blurry_attn"


def test_the_interface_is_the_one_that_is_promised() -> None:
    for name in ("matplotlib", "tqdm", "safetensors", "transformers"):
        pytest.importorskip(name)
    from interface import FILE, interface

    promised, found = (set(text.splitlines()) for text in (FILE.read_text(), interface()))
    lines = [*(f"- {line}" for line in sorted(promised - found)), *(f"+ {line}" for line in sorted(found - promised))]
    assert not lines, "\n".join(("python tests/interface.py writes what is promised from here on:", *lines))


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
