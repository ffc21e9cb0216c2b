"""requirements.txt, which `make lock` generates, agrees with pyproject.toml, constraints.txt and docs/licenses.md."""

from __future__ import annotations

import re
from email.message import Message
from functools import cache
from importlib import metadata

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.sources import ROOT
from tests.unit.test_project import read_toml
from tools.list_licenses import license_of

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def locked() -> tuple[tuple[Requirement, str], ...]:
    """Every requirement of the lock file with its options."""
    lines = read("requirements.txt").replace("\\\n", "").splitlines()
    parts = (line.partition(" --") for line in lines if not line.startswith("#"))
    return tuple((Requirement(requirement), dashes + options) for requirement, dashes, options in parts)


def versions_for(python: str) -> dict[str, str]:
    """Name -> version of what pip installs from the lock file for a version of Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    chosen = [(r.name, str(r.specifier)) for r, _ in locked() if r.marker is None or r.marker.evaluate(environment)]
    assert len(dict(chosen)) == len(chosen), f"Python {python}: two versions of a package"
    return dict(chosen)


def constraints_for(python: str) -> dict[str, str]:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    lines = f"{read('constraints.txt')}\n{read('constraints-cpu.txt')}".splitlines()
    pins = [Requirement(line) for line in lines if re.match(r"\w", line)]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in pins
            if pin.marker is None or pin.marker.evaluate(environment)}  # fmt: skip


def test_every_requirement_has_hashes_and_no_index():
    for requirement, options in locked():
        assert re.fullmatch(r"( *--hash=sha256:[0-9a-f]{64})+", options), requirement
        assert requirement.url is None and str(requirement.specifier).startswith("==")


@pytest.mark.parametrize("python", PYTHONS)
def test_locked_versions_are_those_of_the_constraints(python):
    pins = constraints_for(python)
    different = {name: found for name, found in versions_for(python).items() if pins.get(name) != found}
    assert not different, f"run `make lock`, or pin in constraints.txt: {different}"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_but_torch_is_locked(python):
    needed = [Requirement(line) for line in read_toml("pyproject.toml")["project"]["dependencies"]]
    found = versions_for(python)
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        assert (name in found) == (name != "torch"), f"{name}: run `make lock`"
        assert name == "torch" or found[name].removeprefix("==") in requirement.specifier, f"{name}: run `make lock`"


def test_dependencies_of_dependencies_are_locked():
    """Walk the installed packages. What only torch needs comes with torch."""
    found = versions_for(".".join(default_environment()["python_full_version"].split(".")[:2]))
    waiting = [Requirement(line) for line in read_toml("pyproject.toml")["project"]["dependencies"]]
    reached: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if name == "torch" or (name, extra) in reached:
                continue
            reached.add((name, extra))
            more = [Requirement(line) for line in metadata.requires(name) or ()]
            waiting += [one for one in more if one.marker is None or one.marker.evaluate({"extra": extra})]
    assert {name for name, _ in reached} == set(found), "run `make lock`"


def test_the_license_list_has_every_locked_package():
    listed = re.findall(r"^\| (\S+) \| (\d\S*) \| \S.* \|$", read("docs/licenses.md"), re.MULTILINE)
    rows = sorted((requirement.name, str(requirement.specifier).removeprefix("==")) for requirement, _ in locked())
    assert listed == rows, "run `make lock`"


def test_the_license_list_names_what_torch_installs():
    waiting, names = ["torch"], set()
    while waiting:
        names.add(name := waiting.pop())
        needed = [Requirement(line) for line in metadata.requires(name) or ()]
        found = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
        waiting += {canonicalize_name(one.name) for one in found} - names
    text = read("docs/licenses.md")
    assert not [name for name in names if name not in text and not name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize(("fields", "expected"), (
    ({"License-Expression": "MIT", "Classifier": "License :: OSI Approved :: BSD License"}, "MIT"),
    ({"License": "BSD", "Classifier": "License :: OSI Approved :: BSD License"}, "BSD License"),
    ({"License": "Apache 2.0", "Classifier": "Programming Language :: Python"}, "Apache 2.0"),
    ({"License": "Copyright\nPermission is granted", "Classifier": "License :: OSI Approved"}, "not declared"),
    ({"License": "UNKNOWN"}, "not declared"),
))  # fmt: skip
def test_the_most_precise_license_is_listed(fields, expected):
    package = Message()
    for name, value in fields.items():
        package[name] = value
    assert license_of(package) == expected
