"""What is written of parameters: their shape, and nothing that a caller put in as a value."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay_grpc.audit.redaction import PREFIX_LENGTH, masked_prefix

MARKS = set('{}[],:*."')
VALUES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text()
# On a busy machine examples come as slowly as they come.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parameters(names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    inner = st.recursive(VALUES, lambda one: st.lists(one, max_size=3) | st.dictionaries(names, one, max_size=3))
    return st.dictionaries(names, inner, max_size=4)


@UNHURRIED
@given(parameters(st.text()))
def test_nothing_but_the_names_of_the_schema_appears(value: Any) -> None:
    value["known"] = dict(value)
    prefix = masked_prefix(value, {"known"})
    assert set(prefix) <= MARKS | set("known"), prefix
    assert len(prefix) <= PREFIX_LENGTH


def with_other_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: with_other_values(one) for name, one in value.items()}
    return list(map(with_other_values, value)) if isinstance(value, list) else "another value"


@UNHURRIED
@given(parameters(st.text()))
def test_the_same_shape_has_the_same_prefix_whatever_the_values_are(value: Any) -> None:
    assert masked_prefix(value, set(value)) == masked_prefix(with_other_values(value), set(value))


def test_a_large_or_deep_value_costs_no_more_than_its_prefix() -> None:
    deep: Any = "value"
    for _ in range(32):
        deep = [deep]
    assert masked_prefix({"deep": deep, "long": "x" * 10**6}, {"deep", "long"}).startswith('{"deep":[[[')
    many = {f"n{i:06}": i for i in range(10_000)}
    assert masked_prefix(many, set(many)) == ("{" + ",".join(f"{json.dumps(name)}:*" for name in many))[:PREFIX_LENGTH]
