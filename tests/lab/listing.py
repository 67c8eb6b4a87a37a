"""Paging and X-Filter of API v4, as pure functions over lists of objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PAGE_SIZE_DEFAULT, PAGE_SIZE_MIN, PAGE_SIZE_MAX = 100, 25, 500
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "+gt": lambda have, want: have > want,
    "+gte": lambda have, want: have >= want,
    "+lt": lambda have, want: have < want,
    "+lte": lambda have, want: have <= want,
    "+neq": lambda have, want: have != want,
    "+contains": lambda have, want: str(want).lower() in str(have).lower(),
}


class FilterError(Exception):
    """The X-Filter header or the paging is not one that the API takes; the message is the API's reason."""


def _values(item: Mapping[str, Any], key: str) -> list[Any]:
    """All that a dotted key finds: what is in a list, each of it."""
    found: list[Any] = [item]
    for part in key.split("."):
        below = [one.get(part) if isinstance(one, Mapping) else None for one in found]
        found = [each for one in below for each in (one if isinstance(one, list) else [one])]
    return found


def _holds(item: Mapping[str, Any], condition: Mapping[str, Any], allowed: frozenset[str]) -> bool:
    for key, want in condition.items():
        if key in ("+order", "+order_by"):
            continue
        if key in ("+and", "+or"):
            results = [_holds(item, part, allowed) for part in want]
            if not (all(results) if key == "+and" else any(results)):
                return False
            continue
        if key not in allowed:
            raise FilterError(f"Cannot filter on {key}")
        candidates = _values(item, key)
        if isinstance(want, Mapping):
            for operator, operand in want.items():
                if operator not in _OPERATORS:
                    raise FilterError(f"Unknown operator {operator}")
                if not any(one is not None and _OPERATORS[operator](one, operand) for one in candidates):
                    return False
        elif want not in candidates:
            return False
    return True


def select(items: Sequence[dict[str, Any]], header: str | None, allowed: frozenset[str]) -> list[dict[str, Any]]:
    """Items that an X-Filter header lets through, in the order that it asks for. Raises FilterError."""
    if not header:
        return list(items)
    try:
        condition = json.loads(header)
    except ValueError:
        raise FilterError("X-Filter is not valid JSON") from None
    if not isinstance(condition, dict):
        raise FilterError("X-Filter must be a JSON object")
    found = [item for item in items if _holds(item, condition, allowed)]
    if order := condition.get("+order_by"):
        if order not in allowed:
            raise FilterError(f"Cannot order by {order}")
        found.sort(key=lambda item: _values(item, order), reverse=condition.get("+order") == "desc")
    return found


def page(items: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The envelope of one page: data, page, pages, results. Raises FilterError."""
    try:
        number, size = int(query.get("page", 1)), int(query.get("page_size", PAGE_SIZE_DEFAULT))
    except ValueError:
        raise FilterError("page and page_size must be integers") from None
    if not PAGE_SIZE_MIN <= size <= PAGE_SIZE_MAX:
        raise FilterError(f"page_size must be between {PAGE_SIZE_MIN} and {PAGE_SIZE_MAX}")
    pages = max(1, -(-len(items) // size))
    if not 1 <= number <= pages:
        raise FilterError(f"page must be between 1 and {pages}")
    return {"data": items[(number - 1) * size : number * size], "page": number, "pages": pages, "results": len(items)}
