"""States in compiled and exported programs, whose trees have them as nodes, and in files that ``torch.load`` reads."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from .state import TENSORS, BlurryState
from .window import BlurryWindow

_FIELDS = tuple(field.name for field in fields(BlurryWindow))


def _entries(window: BlurryWindow) -> tuple[Any, ...]:
    """The window as plain data: torch.export(strict=True) can write down no other context of a tree."""
    return tuple(getattr(window, name) for name in _FIELDS)


def _flatten(state: BlurryState) -> tuple[list[Any], tuple[Any, ...]]:
    children = [state.key, state.value, state.position]
    return children if state.flux is None else [*children, state.flux], _entries(state.window)


def _flatten_with_keys(state: BlurryState) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    children, context = _flatten(state)
    names = (*TENSORS, "flux")
    return [(pytree.GetAttrKey(name), child) for name, child in zip(names, children, strict=False)], context


def _unflatten(children: Any, context: Any) -> BlurryState:
    # The leaves need not be tensors while a tree is taken apart.
    key, value, position, *flux = children
    return BlurryState._unchecked(key, value, position, BlurryWindow(*context), *flux)


pytree.register_pytree_node(
    BlurryState,
    _flatten,
    _unflatten,
    serialized_type_name="blurry_attn.BlurryState",
    to_dumpable_context=lambda context: dict(zip(_FIELDS, context, strict=True)),
    from_dumpable_context=lambda entries: _entries(BlurryWindow(**cast(dict[str, Any], entries))),
    flatten_with_keys_fn=_flatten_with_keys,
)
# Both classes hold plain data, so that torch.load and torch.export.load take them under weights_only.
torch.serialization.add_safe_globals([BlurryState, BlurryWindow])
