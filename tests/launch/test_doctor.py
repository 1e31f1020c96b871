"""The check of the machine reports what is missing and sets its exit code."""

import pytest

from launch import doctor


def test_a_complete_machine_passes() -> None:
    lines: list[str] = []
    assert doctor.examine(lines.append) == 0
    assert any(line.startswith("devices") for line in lines)
    assert not any("error" in line for line in lines)


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("jax", "no_such_package"))
    lines: list[str] = []
    assert doctor.examine(lines.append) == 2
    assert "error: no_such_package" in lines[-1]


def test_an_optional_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", ("no_such_package",))
    lines: list[str] = []
    assert doctor.examine(lines.append) == 0
    assert any("no_such_package" in line and "(optional)" in line for line in lines)
