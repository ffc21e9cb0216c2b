"""The documentation agrees with the code: links, paths, command lines, quoted messages, the map of folders."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from diffmoe_ds import cli
from tests.helpers.sources import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*/*.md", "*/*/*.md", "*/*/*/*.md")
    for path in ROOT.glob(pattern)
    if not {".venv", "runs", "build", "node_modules", ".pytest_cache"}.intersection(path.parts)
)
MADE_BY_USERS = {"slurm/env.sh", "env.sh", "grid.png"}
"""Files that users create, by hand or by running a command."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    return FENCE.sub("", read(page))


@cache
def anchors(page: str) -> set[str]:
    """The anchors that GitHub derives from a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        number = sum(slug == re.sub(r"-\d+$", "", other) for other in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.relative_to(ROOT).as_posix())):
            broken.append(target)
    assert not broken, f"{page} has broken links: {broken}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page: str) -> None:
    missing = []
    for name in INLINE.findall(prose(page)):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|md|sh|sbatch|yml|svg|png)", name) or name in MADE_BY_USERS:
            continue
        if name.startswith(("runs/", "photos/")):
            continue
        places = (ROOT, ROOT / "diffmoe_ds", (ROOT / page).parent)
        found_by_name = (
            path for folder in ("diffmoe_ds", "launchers", "slurm") for path in (ROOT / folder).rglob(name)
        )
        anywhere = "/" not in name and any(found_by_name)
        if not anywhere and not any((place / name).exists() for place in places):
            missing.append(name)
    assert not missing, f"{page} names files that do not exist: {missing}"


def test_readme_fits_on_a_few_screens() -> None:
    assert len(read("README.md").splitlines()) <= 150


def test_map_lists_every_folder() -> None:
    blocks = [body for _, body in FENCE.findall(read("README.md")) if "diffmoe_ds/" in body and "tests/" in body]
    assert len(blocks) == 1, "the README has one map of folders"
    listed = {line.split()[0].rstrip("/") for line in blocks[0].splitlines() if line.strip()}
    top = {path.name for path in ROOT.iterdir() if path.is_dir() and _has_sources(path)}
    package = {path.name for path in (ROOT / "diffmoe_ds").iterdir() if path.is_dir() and _has_sources(path)}
    assert top | package <= listed, f"missing from the map: {sorted((top | package) - listed)}"
    inside = {path.name for path in (ROOT / "diffmoe_ds").iterdir()}
    unknown = {name for name in listed if not (ROOT / name).exists() and name not in inside}
    assert not unknown, f"in the map, but not in the repository: {sorted(unknown)}"


def _has_sources(path: Path) -> bool:
    hidden = path.name.startswith((".", "__")) or path.name.endswith(".egg-info")
    return not hidden and path.name not in ("runs", "build", "dist", "shared") and any(path.iterdir())


def commands(page: str) -> Iterator[list[str]]:
    """The command lines of a page's shell blocks, as words."""
    for language, body in FENCE.findall(read(page)):
        if language not in ("bash", "sh", "console"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
                words = shlex.split(part.partition(" > ")[0])
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                if words:
                    yield words


def parsed_by(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) if a command line runs our program; None for other programs."""
    text = " ".join(words)
    if words[0] == "diffmoe":
        return "diffmoe_ds.cli", words[1:]
    for number, word in enumerate(words):
        rest = words[number + 1 :]
        if word.endswith("diffmoe_ds/train.py") or re.fullmatch(r"(launchers|slurm)/(\w+)\.(sh|sbatch)", word):
            command = {"slurm/sample.sbatch": ["sample"], "slurm/prepare.sbatch": ["prepare"]}.get(word, ["train"])
            assert (ROOT / word).is_file(), text
            return "diffmoe_ds.cli", [*command, *(arg for arg in rest if arg != "...")]
        if word in ("-m", "--module") and rest and rest[0] == "diffmoe_ds.train":
            return "diffmoe_ds.cli", ["train", *rest[1:]]
        if word in ("-m", "--module") and rest and rest[0].split(".")[0] in OURS:
            return rest[0], rest[1:]
    return None


OURS = ("diffmoe_ds", "benchmarks", "examples", "tools", "tests")


class Parsed(BaseException):
    """Raised once the arguments were accepted."""


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *given: object, **named: object) -> None:
        parse(parser, *given, **named)  # type: ignore[call-overload]
        raise Parsed

    def stop(args: argparse.Namespace) -> None:
        raise Parsed

    monkeypatch.setattr(cli, "run_command", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for words in commands(page):
        if words[0] == "make":
            for target in words[1:]:
                assert re.search(rf"^{re.escape(target)}:", read("Makefile"), re.MULTILINE), f"make {target}"
            continue
        found = parsed_by(words)
        if found is None:
            continue
        module, arguments = found
        program = cli if module == "diffmoe_ds.cli" else importlib.import_module(module)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                program.main(arguments)
            except Parsed:
                continue
            except SystemExit:
                pass
        pytest.fail(f"{page}: {' '.join(words)}\n{said.getvalue().strip()}")


@pytest.mark.parametrize("page", PAGES)
def test_modules_in_backticks_exist(page: str) -> None:
    for module in re.findall(r"python -m (\w+(?:\.\w+)*)", read(page)):
        if module.split(".")[0] in OURS:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page}: {module}"


@cache
def texts() -> list[str]:
    """Every string of the sources with placeholders as null characters; each script is one text."""
    scripts = [path for folder in ("launchers", "slurm") for path in (ROOT / folder).iterdir()]
    found = [path.read_text(encoding="utf-8") for path in scripts]
    for path in (ROOT / "diffmoe_ds").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return found


def quoted_messages() -> list[str]:
    """The messages in code spans in the first column of the tables of troubleshooting.md."""
    rows = re.findall(r"^\| (.*?) \|", read("docs/troubleshooting.md"), re.MULTILINE)
    return [span for row in rows for span in INLINE.findall(row) if " " in span]


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_occur_in_the_sources(message: str) -> None:
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), f"no message in the sources matches: {message}"
