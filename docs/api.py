"""Writes docs/api.md, the reference of every public name, from signatures and docstrings.

python docs/api.py           writes it
python docs/api.py --check   fails if it is not what would be written
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

WIDTH, PROSE = 80, 120  # of a signature and of a line of prose
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = ("blurry_attn", "blurry_attn.distributed", "blurry_attn.integrations.transformers", "blurry_attn.viz")
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Returns, Raises")
HEAD = """\
# Reference

Every public name, from its docstring. Written by [api.py](api.py) (`make api`); [usage.md](usage.md) shows them at
work. Shapes: B sequences, Hq query heads, Hkv key/value heads, T tokens, D (Dk, Dv) features, N slots, P tokens in a
window.

"""


def public(module: ModuleType) -> list[str]:
    """Names in the order of the source."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    defined = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    return [name for name in defined if name != "main" and name[0] != "_" and callable(getattr(module, name))]


def prose(text: str) -> str:
    """reST roles and literals as Markdown."""
    text = re.sub(r":(?:func|class|meth|mod|math):`~?([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


def wrapped(text: str) -> str:
    """Lines of prose, which go on under the text of a list's entry."""
    more = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, PROSE, subsequent_indent=more, break_long_words=False, break_on_hyphens=False)


def markdown(docstring: str) -> str:
    """Paragraphs as they are; what is indented under a section's name as a list."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        first, _, rest = block.partition("\n")
        if first.rstrip(":") in SECTIONS and first.endswith(":"):
            blocks.append(f"**{first.rstrip(':')}**")
            rest = textwrap.dedent(rest)
            # This section holds a text, and the others list names.
            if first == "Returns:":
                blocks.append(wrapped(prose(" ".join(rest.split()))))
                continue
            entries = re.split(r"\n(?=\S)", rest)
            blocks.append("\n".join(wrapped("- " + prose(" ".join(entry.split()))) for entry in entries))
        elif block.lstrip().startswith(">>>"):
            blocks.append(f"```python\n{textwrap.dedent(block)}\n```")
        else:
            blocks.append(prose(block))
    return "\n\n".join(blocks)


def signature(x: Any) -> str:
    try:
        found = str(inspect.signature(x)).replace("'", "")
    except ValueError:
        return ""
    found = re.sub(r"^\((?:self|cls)(?:, |(?=\)))", "(", found)
    found = re.sub(r"\b(?:torch|typing|collections\.abc|blurry_attn\.\w+)\.(?=[A-Z])", "", found)
    if len(found) > WIDTH:
        # Each parameter stands in a line of its own.
        found = re.sub(r", (?=\*|\w+: )", ",\n    ", found.replace("(", "(\n    ", 1))
        found = re.sub(r"\)(?= -> )", ",\n)", found, count=1)
    return found


def link(x: Any) -> str:
    source = Path(inspect.getsourcefile(inspect.unwrap(x)) or "").resolve().relative_to(ROOT)
    return f"[source](../{source})"


def entry(title: str, x: Any, level: str) -> list[str]:
    call = f"```python\n{title}{signature(x)}\n```"
    return [f"{level} {title}", call, markdown(x.__doc__), link(x)]


def members(x: type) -> list[tuple[str, Any]]:
    """Methods and properties that a class defines itself and documents."""
    own = [(name, getattr(member, "__func__", member)) for name, member in vars(x).items()
           if name[0] != "_" or name == "__getitem__"]  # fmt: skip
    return [(name, member) for name, member in own if getattr(member, "__doc__", None)
            and (inspect.isfunction(member) or isinstance(member, property))]  # fmt: skip


def page() -> str:
    parts = []
    for path in MODULES:
        module = importlib.import_module(path)
        parts += [f"## {path}", markdown(module.__doc__ or "")]
        for name in public(module):
            x = getattr(module, name)
            parts += entry(name, x, "###")
            for member, function in members(x) if inspect.isclass(x) else ():
                text = function.fget if isinstance(function, property) else function
                call = "" if isinstance(function, property) else signature(function)
                parts += [f"```python\n{name}.{member}{call}\n```", markdown(text.__doc__)]
    return HEAD + "\n\n".join(parts) + "\n"


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/api.md is not what the docstrings say; type: make api")


if __name__ == "__main__":
    main()
