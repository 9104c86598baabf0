"""What may be written of parameters: their shape. No I/O."""

from collections.abc import Set
from typing import Any

PREFIX_LENGTH = 64
MASK = "*"


def masked_prefix(parameters: Any, names: Set[str]) -> str:
    """The first 64 characters of the parameters as JSON, with everything masked that the caller put in.

    names: the field names of the action's schema. Only these stay: values never do, since no list of suspicious names
    is ever complete, and in free-form objects the names are the caller's too.

    >>> masked_prefix({"payload": {"ann@example.com": 5}, "method": "POST"}, {"method", "payload"})
    '{"method":*,"payload":{*:*}}'
    """
    return _mask(parameters, names, PREFIX_LENGTH)[:PREFIX_LENGTH]


def _mask(value: Any, names: Set[str], budget: int) -> str:
    if budget <= 0:
        return ""
    if isinstance(value, dict):
        text = "{"
        for name in sorted(value):
            text += ("" if text == "{" else ",") + (f'"{name}":' if name in names else f"{MASK}:")
            text += _mask(value[name], names, budget - len(text))
            if len(text) >= budget:
                break
        return text + "}"
    if isinstance(value, list):
        first = _mask(value[0], names, budget - 1) if value else ""
        return f"[{first}{',...' if len(value) > 1 else ''}]"
    return MASK
