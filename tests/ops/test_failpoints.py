"""RELAY_FAILPOINT: what it takes, and that production does not."""

import pytest

from relay_grpc import datafolder, failpoints
from relay_grpc.settings import Settings, SettingsError


@pytest.mark.parametrize("point", failpoints.POINTS)
def test_a_point_and_a_number_arm_it(point: str) -> None:
    assert Settings.load({"RELAY_FAILPOINT": f"{point}:3"}).failpoint == (point, 3)


def test_none_is_armed_by_default() -> None:
    assert Settings.load({}).failpoint is None


@pytest.mark.parametrize("text", ["attempt.sent", "attempt.sent:", "attempt.sent:0", "attempt.sent:-1", "nowhere:1"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="RELAY_FAILPOINT: should be POINT:NTH"):
        Settings.load({"RELAY_FAILPOINT": text})


def test_production_refuses_all_of_them() -> None:
    environ = {
        **datafolder.new_key_material(),
        "RELAY_ENV": "production",
        "DATABASE_URL": "postgresql://relay@db/relay",
        "RELAY_LISTEN": "127.0.0.1:0",
        "RELAY_FAILPOINT": "attempt.sent:1",
    }
    with pytest.raises(SettingsError) as raised:
        Settings.load(environ)
    assert raised.value.problems == ["RELAY_FAILPOINT: production does not kill itself"]


def test_only_the_armed_point_kills_and_only_its_nth_time(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setattr("os.kill", lambda *_: killed.append("dead"))
    monkeypatch.setattr(failpoints, "_armed", "")
    monkeypatch.setattr(failpoints, "_left", 0)
    failpoints.reach("attempt.sent")
    failpoints.arm("attempt.sent", 2)
    for point in ("attempt.answered", "attempt.sent", "attempt.answered"):
        failpoints.reach(point)
    assert killed == []
    failpoints.reach("attempt.sent")
    assert killed == ["dead"]
