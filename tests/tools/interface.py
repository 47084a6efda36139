"""The interface: public names with their signatures, options of the program, schemas of the operators.

python tests/tools/interface.py writes tests/golden/interface.txt. A line that changes or goes there breaks a caller.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "golden" / "interface.txt"
SPECIAL = ("__getitem__", "__iter__", "__len__")


class Plain(str):
    """An annotation that is shown without quotes."""

    __repr__ = str.__str__


def signature(function: Any) -> str:
    """Parameters, annotations and defaults, as the source has them; nothing of what another package defines."""
    defined = function.__init__ if inspect.isclass(function) else function
    if not inspect.isfunction(defined) or not defined.__module__.startswith("blurry_attn"):
        return ""
    found = inspect.signature(function)
    parameters = [
        parameter
        if parameter.annotation is parameter.empty
        else parameter.replace(annotation=Plain(parameter.annotation))
        for name, parameter in found.parameters.items()
        if name not in ("self", "cls")
    ]
    returned = found.return_annotation
    return str(
        found.replace(parameters=parameters, return_annotation=returned if returned is None else Plain(returned))
    )


def members(owner: type) -> Iterator[str]:
    """Methods and properties that a class defines itself."""
    for name, member in vars(owner).items():
        if name.startswith("_") and name not in SPECIAL:
            continue
        if isinstance(member, property):
            yield f"{name} -> {inspect.signature(member.fget).return_annotation}"
        elif inspect.isfunction(function := getattr(member, "__func__", member)):
            yield name + signature(function)


def names() -> Iterator[str]:
    """Every public name of the modules that docs/api.md lists, with what belongs to it."""
    sys.path.insert(0, str(ROOT / "docs"))
    api = importlib.import_module("api")
    for path in (*api.MODULES, "blurry_attn.reference"):
        module = importlib.import_module(path)
        public = api.public(module) if path != "blurry_attn.reference" else ["blurry_window_attention"]
        for name in public:
            named = getattr(module, name)
            yield f"{path}.{name}{signature(named)}"
            if inspect.isclass(named):
                yield from (f"{path}.{name}.{member}" for member in members(named))


def options() -> Iterator[str]:
    """The commands of blurry-lm and what each of them takes."""
    from blurry_attn.lm.__main__ import _parser

    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, parser in action.choices.items():
                for option in parser._actions:
                    yield " ".join(("blurry-lm", command, *(option.option_strings or [option.dest])))
        else:
            yield " ".join(("blurry-lm", *action.option_strings))


def schemas() -> Iterator[str]:
    """The operators as they are registered."""
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("blurry_attn::"):
            yield str(schema)


def interface() -> str:
    """One line for each promise, sorted."""
    return "\n".join((*sorted(names()), *sorted(options()), *sorted(schemas()))) + "\n"


if __name__ == "__main__":
    FILE.write_text(interface())
