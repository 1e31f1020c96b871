"""The doctor tells what is missing and says so in its exit code."""

import pytest

from launch import doctor


def test_a_working_machine_is_fit() -> None:
    said: list[str] = []
    assert doctor.examine(said.append) == 0
    assert any(line.startswith("devices") for line in said)
    assert not any("not fit" in line for line in said)


def test_a_missing_package_makes_it_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("jax", "no_such_package"))
    said: list[str] = []
    assert doctor.examine(said.append) == 2
    assert "not fit: no_such_package" in said[-1]


def test_an_optional_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WANTED", ("no_such_package",))
    said: list[str] = []
    assert doctor.examine(said.append) == 0
    assert any("no_such_package" in line and "(optional)" in line for line in said)
