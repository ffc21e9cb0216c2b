"""The files around the code agree with each other: Makefile, CI, pre-commit hooks, templates, citation, pins."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.sources import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TARGETS = {
    "help", "demo", "test", "test-fast", "test-cluster", "test-torch", "test-long", "gpu-check", "lint", "docs",
    "lock", "audit", "clean",
}  # fmt: skip


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def read_toml(path):
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


def recipe_of(target):
    """Return the commands of a Makefile target, without the tab."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (lines,) = re.findall(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", text, flags=re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in lines.splitlines()]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target_and_make_alone_prints_it():
    # A `make test` that runs this test passes its own options on in MAKEFLAGS.
    shown = [
        subprocess.run(
            ["make", "-C", str(ROOT), "--no-print-directory", "MAKEFLAGS=", *target],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout
        for target in ((), ("help",))
    ]  # fmt: skip
    assert shown[0] == shown[1]
    assert set(re.findall(r"^  make (\S+) +\S", shown[0], flags=re.MULTILINE)) == TARGETS


def test_every_target_in_help_exists_and_is_phony():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert set(phony.split()) == TARGETS
    assert all(recipe_of(target) for target in TARGETS)


def test_long_tests_run_in_make_test_long_only():
    for target in ("test", "test-fast", "test-cluster"):
        for command in (line for line in recipe_of(target) if "pytest" in line):
            assert "not long" in shlex.split(command)[-1], command
    assert recipe_of("test-long") == [".venv/bin/python -m pytest -m long"]


def test_gpu_check_installs_nothing_and_uses_the_python_it_is_given():
    assert recipe_of("gpu-check") == ["$(PYTHON) -m benchmarks.gpu_check --out gpu_check.json"]
    assert re.search(r"^gpu-check: +##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_ci_runs_lint_and_all_tests():
    commands = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert [line for line in commands if line.startswith("make ")] == ["make lint", "make test", "make test-cluster"]


def test_the_workflow_calls_ci_run_on_pushes_and_pull_requests():
    workflow = read_yaml(".github/workflows/ci.yml")
    triggers = workflow.get("on", workflow.get(True))  # YAML 1.1 reads `on` as true
    assert {"push", "pull_request"} <= set(triggers)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(step.get("run", "").split()[-1:] == [".ci/run"] for step in steps)
    assert any(step.get("with", {}).get("python-version") == "3.11" for step in steps)


def test_the_workflow_tests_every_supported_minor_release_of_torch():
    dependencies = [Requirement(line) for line in read_toml("pyproject.toml")["project"]["dependencies"]]
    (supported,) = [requirement.specifier for requirement in dependencies if requirement.name == "torch"]
    pinned = re.findall(r"^torch==(.*)$", (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8"), re.MULTILINE)
    tested = [*read_yaml(".github/workflows/ci.yml")["jobs"]["torch"]["strategy"]["matrix"]["torch"], *pinned]
    minors = sorted(int(version.split(".")[1]) for version in tested)
    assert all(version in supported for version in tested)
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert f"2.{minors[0] - 1}.99" not in supported and f"2.{minors[-1] + 1}" not in supported


def test_pre_commit_hooks_run_the_commands_of_make_lint():
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local", "a hook from another repository would be downloaded"
    commands = [hook["entry"] for hook in local["hooks"] if not hook.get("pass_filenames", True)]
    assert commands == recipe_of("lint")


def test_the_bug_report_asks_for_the_doctor():
    fields = {field["id"]: field for field in read_yaml(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "`diffmoe doctor --json`" in fields["doctor"]["attributes"]["label"]
    assert {field["type"] for field in read_yaml(".github/ISSUE_TEMPLATE/feature.yml")["body"]} == {"textarea"}


def test_the_citation_file_is_complete():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))
    assert citation["version"] == read_toml("pyproject.toml")["project"]["version"]
    (paper,) = citation["references"]
    assert paper["title"] == "DiffMoE: Dynamic Token Selection for Scalable Diffusion Transformers"
    assert paper["doi"] == "10.48550/arXiv.2503.14487"
    assert all({"given-names", "family-names"} == set(author) for author in paper["authors"])


def test_every_requirement_is_pinned():
    project = read_toml("pyproject.toml")["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {canonicalize_name(Requirement(line).name) for line in lines}
    pinned = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "constraints-cpu.txt"))
    missing = names - {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", pinned, flags=re.MULTILINE)}
    assert not missing, f"pin {sorted(missing)} in constraints.txt, and what they depend on"
