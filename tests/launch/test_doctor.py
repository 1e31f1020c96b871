"""The check of the machine reports what is missing and sets its exit code."""

import pytest

from afa import parallel
from launch import doctor


def test_a_complete_machine_passes() -> None:
    lines: list[str] = []
    assert doctor.examine(print_line=lines.append) == 0
    assert lines[-1] == "ready"
    assert any(line.startswith("devices") for line in lines)
    count = parallel.device_count()
    assert f"{'sum over devices':<20}{count} of {count}" in lines
    assert not any("error" in line for line in lines)


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("jax", "no_such_package"))
    lines: list[str] = []
    assert doctor.examine(print_line=lines.append) == 2
    assert "error: no_such_package" in lines[-1]


def test_an_optional_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", ("no_such_package",))
    lines: list[str] = []
    assert doctor.examine(print_line=lines.append) == 0
    assert any("no_such_package" in line and "(optional)" in line for line in lines)


def test_what_is_missing_is_said_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK", 2**60)
    monkeypatch.setattr(doctor, "MIN_MEMORY", 2**60)
    lines: list[str] = []
    assert doctor.examine(print_line=lines.append) == 2
    assert lines[-2].endswith("GiB of memory: use a larger machine")
    assert lines[-1].endswith("GiB of disk is free: remove files, or work elsewhere")


def test_no_coordinator_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--coordinator=nowhere:x", "--processes=2"]) == 2
    assert "error: launch.coordinator='nowhere:x': " in capsys.readouterr().out
