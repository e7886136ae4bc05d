"""Protection: its formula, its extremes, and where it is undefined."""

from __future__ import annotations

import pytest

from fedlpp_ray.privacy import measure_protection


@pytest.mark.parametrize(
    ("attacks", "value"),
    [
        ({"a": 0.6}, 1.0),  # no better than the floor
        ({"a": 0.9}, 0.0),  # as good as the server
        ({"a": 0.75}, 0.5),
        ({"a": 0.96}, -0.2),  # better than the server
        ({"a": 0.3}, 2.0),  # worse than what a client can do alone
        ({"a": 0.3, "b": 0.75}, 0.5),  # the strongest counts
    ],
)
def test_protection_is_the_share_of_the_advantage_that_does_not_leak(
    attacks: dict[str, float], value: float
) -> None:
    protection = measure_protection(0.9, attacks, {"base": 0.2, "local_only": 0.6})
    assert protection.value == pytest.approx(value)
    assert protection.floor == ("local_only", 0.6)
    assert protection.reason is None


@pytest.mark.parametrize("server", [0.5, 0.6])
def test_it_is_undefined_where_the_server_is_not_above_the_floor(server: float) -> None:
    protection = measure_protection(server, {"a": 0.4}, {"base": 0.2, "local_only": 0.6})
    assert protection.value is None
    assert protection.reason == f"the server ({server:.3f}) is not above the floor (0.600)"
