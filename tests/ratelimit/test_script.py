"""window.lua computes what window.py says, on a real Valkey and a clock of the test's own."""

from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st
from redis.commands.core import Script

from relay_grpc.ratelimit.node import SCRIPT
from relay_grpc.ratelimit.window import MINUTE, Charge, Window, decide, spend
from tests.ratelimit.spending import as_kept, charge
from tests.valkey import Valkey

NOON = 29_000_000 * MINUTE
units = st.integers(0, 300)
kept_windows = st.none() | st.builds(Window, st.integers(NOON // MINUTE - 3, NOON // MINUTE + 3), units, units)
prices = st.tuples(st.integers(0, 40), units)  # cost, limit
# Pauses (negative: the clock steps back), and what of the budgets is charged: places and prices.
histories = st.lists(
    st.tuples(
        st.integers(-100, 20_000) | st.integers(-3 * MINUTE, 3 * MINUTE),
        st.dictionaries(st.integers(0, 3), prices, min_size=1),
    ),
    max_size=20,
)


def on_a_clock_of_ours(valkey: Valkey) -> Script:
    clock = "redis.call('TIME')"
    assert SCRIPT.count(clock) == 1
    return valkey.client.register_script(SCRIPT.replace(clock, "{ARGV[#ARGV - 1], ARGV[#ARGV]}"))


def run(script: Script, keys: list[str], charges: list[Charge], now: int) -> list[int]:
    numbers = [number for charge in charges for number in (charge.cost, charge.limit)]
    return script(keys, [*numbers, now // 1000, now % 1000 * 1000 + 999])


@given(st.lists(kept_windows, min_size=4, max_size=4), histories)
@settings(deadline=None)
def test_the_script_computes_what_the_arithmetic_says(
    valkey: Valkey, kept: list[Window | None], history: list[tuple[int, dict[int, tuple[int, int]]]]
):
    script, now, tag = on_a_clock_of_ours(valkey), NOON, uuid4()
    keys = [f"{{{tag}}}:{place}" for place in range(4)]
    for key, window in zip(keys, kept, strict=True):
        if window:
            valkey.client.set(key, as_kept(window))
    for pause, charged in history:
        now += pause
        charges = [charge(keys[place], *price) for place, price in charged.items()]
        after, decision = spend(now, [kept[place] or Window() for place in charged], charges)
        when, allowed, *numbers = run(script, [keys[place] for place in charged], charges, now)
        assert when == now
        assert [Window(*numbers[at : at + 3]) for at in range(0, len(numbers), 3)] == after
        assert decide(now, after, charges, allowed=bool(allowed)) == decision
        for place, window in zip(charged, after, strict=True):
            if allowed and charged[place][0]:
                kept[place] = window
        assert valkey.client.mget(keys) == [window and as_kept(window) for window in kept]
    valkey.client.delete(*keys)


def test_what_is_no_window_counts_as_unspent(valkey: Valkey):
    script, key = on_a_clock_of_ours(valkey), str(uuid4())
    for rubbish in ("", "1", "29000000 -1 0", "29000000 1 0 0", "\x00"):
        valkey.client.set(key, rubbish)
        assert run(script, [key], [charge(key, 2, 5)], NOON) == [NOON, 1, NOON // MINUTE, 2, 0]
        valkey.client.delete(key)
