"""No file that a user is given gets executed: hostile pickles, YAML and names, wherever files are read."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from tests.helpers import sources
from tests.helpers.data import write_tar


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def trap(tmp_path):
    """Where the hostile file would appear, after a check that it would."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(path)))
    path.unlink()
    yield path
    assert not path.exists(), "the pickle was executed"


def test_checkpoints(tmp_path, trap):
    content = pickle.dumps(Hostile(trap))
    root = tmp_path / "run" / "checkpoints" / "images_000000000016"
    root.mkdir(parents=True)
    (root.parent / "latest").write_bytes(content)
    for name in ("rank_00000.safetensors", "meta.json", "manifest.json"):
        (root / name).write_bytes(content)
    for command in (
        ["train", "--run-dir", str(tmp_path / "run")],
        ["train", "--run-dir", str(tmp_path / "new"), "--resume", str(root)],
        ["train", "--run-dir", str(tmp_path / "new"), "--set", f"model.init_from={tmp_path / 'run'}"],
        ["sample", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")],
        ["checkpoint", "inspect", str(tmp_path / "run")],
        ["checkpoint", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out")],
    ):
        assert main(command) == 5, command


def test_exported_models(tmp_path, trap):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Hostile(trap)))
    (tmp_path / "config.json").write_text(json.dumps({"weights": "ema", "images": 1, "config": {}}))
    assert main(["sample", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 5
    (tmp_path / "config.json").write_bytes(pickle.dumps(Hostile(trap)))
    assert main(["sample", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 5


@pytest.mark.parametrize("wrap", (lambda bad: bad, lambda bad: {"ema": bad}, lambda bad: {"ema": {"w": bad}}))
def test_reference_weights(tmp_path, trap, wrap):
    for number, save in enumerate((torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree)))):
        path = tmp_path / f"{number}.pt"
        save(wrap(Hostile(trap)), path)
        assert main(["checkpoint", "import-official", str(path), "--out", str(tmp_path / "out")]) == 5
    assert not (tmp_path / "out").exists()


def test_recipes_and_settings(tmp_path, trap):
    text = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trap}']]"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {text}")
    assert main(["train", "--config", str(recipe), "--run-dir", str(tmp_path / "r")]) == 2
    assert main(["train", "--set", f"data.path={text}", "--run-dir", str(tmp_path / "r")]) in (2, 4)
    hostile = tmp_path / "ds.json"
    hostile.write_bytes(pickle.dumps(Hostile(trap)))
    assert main(["train", "--deepspeed_config", str(hostile), "--run-dir", str(tmp_path / "r")]) == 2


def test_shards(tmp_path, trap):
    array = io.BytesIO()
    np.save(array, np.array([Hostile(trap)], dtype=object), allow_pickle=True)
    for number, (suffix, content) in enumerate(
        (("npy", array.getvalue()), ("npy", pickle.dumps(Hostile(trap))), ("png", pickle.dumps(Hostile(trap))))
    ):
        members = [(f"a.{suffix}", content), ("a.cls", b"0"), ("a.pyd", content), ("a.pkl", content)]
        shard = write_tar(tmp_path / f"{number}.tar", members)
        with pytest.raises(DataError):
            ShardDataset([shard])[0]


FORBIDDEN_MODULES = re.compile(
    r"(pickle|_pickle|cPickle|dill|cloudpickle|jsonpickle|shelve|marshal|joblib|dbm|runpy|code|imp|torch\.package|torch\.hub|"
    r"multiprocessing\.(connection|managers|reduction)|pandas|xmlrpc)(\.|$)"
)
"""Modules that unpickle or execute what they read."""
FORBIDDEN_CALLS = re.compile(
    r"eval|exec|compile|__import__|(.*\.)?(import_module|spec_from_file_location|SourceFileLoader|run_path|run_module)|"
    r"(tar|archive)\.extract|(.*\.)?(extractall|unpack_archive)|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|"
    r"subprocess\.(getoutput|getstatusoutput)|(.*\.)?(loads?_pickle|unsafe_load\w*|full_load\w*|Unpickler)|"
    r"(yaml|torch\.jit|torch\.hub|pickle|marshal|joblib|numpy|np|shelve)\.(load|loads|open|fromregex)|"
    r"(.*\.)?(\w+_object_list|\w+_gather_object|gather_object|add_safe_globals)|np\.lib\.format\.read_array|npy\.read_array"
)
"""Calls that unpickle, import or execute, under the names that the package gives these modules."""
ALLOWED = {
    (
        "diffmoe_ds/evaluation/extractors.py",
        "importlib.import_module",
    ),  # a class that the user names on the command line
    ("diffmoe_ds/data/sources/remote.py", "shell=True"),  # pipe:COMMAND, which the user passes as data.path
    ("diffmoe_ds/__init__.py", "import_module"),  # the modules of the package
    ("diffmoe_ds/cli/__init__.py", "import_module"),
}
"""(file, call) pairs that are safe, and why."""
READS = re.compile(r".+\.(read_text|read_bytes)|open|(io|codecs|os|gzip|zipfile|tarfile)\.open|json\.load")
"""Calls that open a file for reading."""
OWN_READS = {
    "diffmoe_ds/cli/console.py": "the null device",
    "diffmoe_ds/control_files.py": "the one place that opens files of others",
    "diffmoe_ds/data/prepare/preparation.py": "a shard that it has just written",
    "diffmoe_ds/data/sources/cache.py": "a lock, without blocking, and a download in a file of its own",
    "diffmoe_ds/data/sources/compressed.py": "gzip, on an open file",
    "diffmoe_ds/data/sources/tar_index.py": "tarfile, on an open file",
    "diffmoe_ds/data/sources/verified.py": "a record, without blocking",
    "diffmoe_ds/distributed/run_lock.py": "its own file, and /proc",
    "diffmoe_ds/distributed/shutdown.py": "/proc",
    "diffmoe_ds/doctor/facts.py": "/sys",
    "diffmoe_ds/evaluation/report/page.py": "a template of the package",
    "diffmoe_ds/files.py": "directories, to flush them",
    "diffmoe_ds/interop/folder.py": "code of the package",
    "diffmoe_ds/interop/standalone/pipeline.py": "runs without the package",
    "diffmoe_ds/training/log_files.py": "logs of the run, without blocking",
}
"""Files with calls that open a file for reading themselves, and what they open."""


def calls(module: sources.Module) -> Iterator[tuple[int, str, ast.Call]]:
    """Yield the line and dotted name of every call."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """Return the constant that a call passes by keyword; None without one."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def problem(name: str, call: ast.Call) -> str | None:
    """Return what is unsafe about a call, if anything."""
    if FORBIDDEN_CALLS.fullmatch(name):
        return name
    if name.endswith("torch.load") and keyword(call, "weights_only") is not True:
        return "torch.load without weights_only=True"
    for argument in ("shell", "trust_remote_code", "allow_pickle"):
        if keyword(call, argument) is True:
            return f"{argument}=True"
    return None


def test_nothing_in_the_package_unpickles_or_executes_what_it_reads():
    found = set()
    for module in sources.modules("diffmoe_ds"):
        for _, name in sources.imported_names(module):
            if FORBIDDEN_MODULES.match(name):
                found.add((module.path, f"import {name}"))
        found |= {(module.path, what) for _, name, call in calls(module) if (what := problem(name, call))}
    assert found - ALLOWED == set()
    assert ALLOWED - found == set(), "no longer needed"


@pytest.mark.parametrize(
    "source",
    (
        "eval(x)", "exec(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x)", "yaml.load(x)",
        "yaml.unsafe_load(x)", "run(x, shell=True)", "tar.extractall()", "np.save(x, allow_pickle=True)",
        "os.system(x)", "dist.broadcast_object_list(x)", "importlib.import_module(x)", "torch.hub.load(x)",
    ),
)  # fmt: skip
def test_unsafe_calls_are_found(source):
    call = ast.parse(source).body[0].value
    assert problem(ast.unparse(call.func), call) is not None


def test_files_of_others_are_opened_in_one_place():
    """`control_files` opens without blocking and bounds what is read; code that opens files itself is named above."""
    found = set()
    for module in sources.modules("diffmoe_ds"):
        for _, name, call in calls(module):
            modes = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
            system = re.search("'/(proc|sys|dev)/", ast.unparse(call))
            if READS.fullmatch(name) and not system and not any(str(mode)[0] in "xwa" for mode in modes):
                found.add(module.path)
    assert found - OWN_READS.keys() == set()
    assert OWN_READS.keys() - found == set(), "no longer needed"
