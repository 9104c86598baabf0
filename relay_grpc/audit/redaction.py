"""What may be written of parameters: their shape. No I/O."""

import json
from typing import Any

PREFIX_LENGTH = 64
MASK = "*"


def masked_prefix(parameters: Any) -> str:
    """The first 64 characters of the parameters as JSON, every value masked.

    Field names stay, since they are the action's schema; what callers put in does not, since no list of suspicious
    names is ever complete.

    >>> masked_prefix({"payload": {"to": "ann@example.com", "amount": 5}, "method": "POST"})
    '{"method":*,"payload":{"amount":*,"to":*}}'
    """
    return _mask(parameters, PREFIX_LENGTH)[:PREFIX_LENGTH]


def _mask(value: Any, budget: int) -> str:
    if budget <= 0:
        return ""
    if isinstance(value, dict):
        text = "{"
        for name in sorted(value):
            text += ("" if text == "{" else ",") + f"{json.dumps(name)}:"
            text += _mask(value[name], budget - len(text))
            if len(text) >= budget:
                break
        return text + "}"
    if isinstance(value, list):
        return "[" + (_mask(value[0], budget - 1) + (",..." if len(value) > 1 else "") if value else "") + "]"
    return MASK
