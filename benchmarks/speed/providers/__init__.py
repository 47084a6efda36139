"""The operators that are compared. Importing this package registers them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from ..cases import Attend, Case


@dataclass(frozen=True)
class Provider:
    """An operator under measurement.

    ``prepare(case)`` imports what it needs and returns ``attend(query, key, value) -> out``; what it raises is reported
    as the reason why the provider has no result. ``skip(case)`` says why a case is left out on purpose, or None.
    """

    name: str
    label: str
    prepare: Callable[[Case], Attend]
    skip: Callable[[Case], str | None]


PROVIDERS: dict[str, Provider] = {}


def provider(
    name: str, label: str, skip: Callable[[Case], str | None] = lambda case: None
) -> Callable[[Callable[[Case], Attend]], Callable[[Case], Attend]]:
    """Registers the decorated ``prepare`` function; ``label`` may use the case's fields, as in ``"{slots} slots"``."""

    def register(prepare: Callable[[Case], Attend]) -> Callable[[Case], Attend]:
        PROVIDERS[name] = Provider(name, label, prepare, skip)
        return prepare

    return register


for _module in ("blurry", "peers"):
    import_module(f"{__name__}.{_module}")
