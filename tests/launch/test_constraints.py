"""Constraints files pin every direct requirement, at versions that pyproject.toml allows."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from paths import ROOT

PYTHON = {
    "constraints.txt": "3.11",
    "constraints-oldest.txt": "3.13",
    "constraints-newest.txt": "3.13",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def required(python):
    """Requirements of afa[dev] on Linux, by name."""
    texts = list(PROJECT["dependencies"])
    extras = ["dev"]
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(text)
            extras += sorted(requirement.extras) if requirement.name == "afa" else []
            texts += [text] if requirement.name != "afa" else []
    found = [Requirement(text) for text in texts]
    machine = {"sys_platform": "linux", "python_version": python}
    return {
        canonicalize_name(each.name): each
        for each in found
        if each.marker is None or each.marker.evaluate(machine)
    }


def pinned(name):
    """Versions of a constraints file, by package."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


@pytest.mark.parametrize("name", PYTHON)
def test_every_requirement_is_pinned(name):
    pins = pinned(name)
    for package, requirement in required(PYTHON[name]).items():
        assert package in pins, f"{name} does not pin {package}"
        assert requirement.specifier.contains(pins[package]), f"{package}=={pins[package]}"


def test_the_oldest_are_the_lower_bounds():
    pins = pinned("constraints-oldest.txt")
    for package, requirement in required("3.13").items():
        (bound,) = [
            Version(each.version) for each in requirement.specifier if each.operator == ">="
        ]
        length = len(bound.release)
        assert pins[package].release[:length] == bound.release, f"{package}=={pins[package]}"
