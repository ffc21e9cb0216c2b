"""House rules that the sources must follow: who may import whom, size limits, and a few words we do not use.

Nothing here imports the package: files are parsed with ``ast``, so this runs in about two seconds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tests.helpers import sources

# A room and the rooms it may import, besides itself and the ground.  A name is a module or a package below
# ``diffmoe_ds``; the longest match wins (``moe.pool`` before ``moe``).
GROUND = (
    "errors", "topology", "rng", "control_files", "npy", "files", "outputs", "precision", "text", "text_layout",
    "text_features",
)  # fmt: skip
RULES = {
    "errors": "",
    "topology": "",
    "rng": "",
    "control_files": "",
    "npy": "",
    "files": "",
    "outputs": "",
    "precision": "",
    "text": "",
    "text_layout": "",
    "text_features": "",
    "config": "",
    "diffusion": "",
    "model.layers": "config",
    "model.conditioning": "config model.layers",
    # What a token passes through on one rank: routers, top-K, experts, the layer.  Independent of ranks and the DiT.
    "moe": "config model.layers",
    # The same layer across many ranks.
    "moe.pool": "moe distributed",
    "moe.dispatch": "moe distributed",
    "moe.expert_parallel": "config moe moe.pool moe.dispatch distributed",
    "model": "config diffusion model.layers model.conditioning moe",
    "distributed": "config",
    "data": "config",
    "data.prepare": "config data distributed",
    "sampling": "config diffusion model model.conditioning",
    "planning": "config diffusion model model.conditioning model.layers moe moe.expert_parallel distributed checkpoint",
    "checkpoint": "config model distributed",
    "training": (
        "config diffusion model model.conditioning model.layers moe moe.expert_parallel distributed data sampling"
        " planning checkpoint evaluation"
    ),
    "interop": "config model model.conditioning sampling planning checkpoint evaluation",
    # What an export copies into the folder: nothing of the package, so that it runs without it.
    "interop.standalone": "",
    "doctor": "config distributed",
    "evaluation": "config diffusion model distributed data sampling planning checkpoint",
    "cli": (
        "config diffusion model model.conditioning moe distributed data data.prepare sampling planning checkpoint"
        " training doctor evaluation interop"
    ),
    # Entry points: `python -m diffmoe_ds`, the launchers' script, and what `import diffmoe_ds` offers.
    "__main__": "cli",
    "train": "cli",
    "api_arguments": "cli config",
    "api_samples": "sampling",
    "api": "api_arguments api_samples cli checkpoint config data diffusion distributed sampling",
    "": "api api_samples checkpoint",
}

# The files that may talk to other ranks directly; all others go through them.
IMPORT_TORCH_DISTRIBUTED = (
    "diffmoe_ds/distributed/",
    "diffmoe_ds/moe/pool.py",
    "diffmoe_ds/moe/dispatch.py",
    "diffmoe_ds/moe/expert_parallel.py",
)
# The one file with DeepSpeed's private names; others may import ``deepspeed`` for its version and ``DeepSpeedEngine``.
DEEPSPEED_SEAM = "diffmoe_ds/distributed/deepspeed_seam.py"
# The opponents of a benchmark: DeepSpeed's own layers.
DEEPSPEED_OPPONENTS = "benchmarks/deepspeed_layers.py"
PUBLIC_DEEPSPEED = ("deepspeed", "deepspeed.DeepSpeedEngine", "deepspeed.__version__")
# These and all that they import never load DeepSpeed.
WITHOUT_DEEPSPEED = ("diffmoe_ds.moe.layer", "diffmoe_ds.moe.routers", "diffmoe_ds.diffusion", "diffmoe_ds.model")
READ_ARGV = ("diffmoe_ds/train.py", "diffmoe_ds/cli/__init__.py")

DICTATED = ("diffmoe_ds/interop/standalone/pipeline.py:DiffMoEPipeline.__call__",)
"""Functions with the parameters that users of another library expect."""
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_LOOP = 350, 50, 8, 40
# Phrases that no native engineer writes (the brackets keep this line from matching itself).
UNIDIOMATIC = re.compile(r"\bane[w]\b|(?<!there )is n[o] [a-z]+\b|stands t[h]ere|have not c[o]me|laid on w[h]ite")


def refuse(found: Iterable[str], advice: str) -> None:
    """Fail with one line for each violation."""
    lines = list(found)
    assert not lines, "\n  ".join([advice, *lines])


def room_of(module: str) -> str:
    name = module.removeprefix("diffmoe_ds").removeprefix(".")
    while name and name not in RULES:
        name = name.rpartition(".")[0]
    return name


def test_every_module_has_a_room():
    homeless = [name for name in sources.import_graph() if name != "diffmoe_ds" and not room_of(name)]
    assert not homeless, f"add a line to RULES for {homeless}"


def test_imports_run_one_way():
    found = []
    for module, imported in sorted(sources.import_graph().items()):
        room = room_of(module)
        allowed = {room, *GROUND, *RULES[room].split()}
        for name in sorted(imported):
            if room_of(name) not in allowed:
                found.append(f"{module[11:] or 'diffmoe_ds'} -> {name[11:]} ({room!r} may import: {RULES[room]!r})")
    refuse(found, "imports against the direction of the table RULES:")


def test_the_table_itself_has_no_cycle():
    graph = {room: set(allowed.split()) for room, allowed in RULES.items()}
    assert not find_cycle(graph)


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count: they hide a cycle from Python, not from the reader."""
    cycle = find_cycle(sources.import_graph())
    assert not cycle, "circular import: " + " -> ".join(cycle)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one cycle, its first node repeated at the end, or nothing."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if cycle := visit(other):
                return cycle
        done.add(path.pop())
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node))), [])


def test_find_cycle_finds_one():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_only_named_files_import_torch_distributed():
    found = []
    for module in sources.modules("diffmoe_ds"):
        if not module.path.startswith(IMPORT_TORCH_DISTRIBUTED):
            found += [
                f"{module.path} imports torch.distributed (line {line})"
                for line, name in sources.names_used(module)
                if f"{name}.".startswith("torch.distributed.")
            ]
    refuse(found, "use diffmoe_ds/distributed/ instead:")


def test_one_file_imports_the_private_names_of_deepspeed():
    found = []
    for module in sources.modules(*sources.CODE):
        if module.path not in (DEEPSPEED_SEAM, DEEPSPEED_OPPONENTS):
            found += [
                f"{module.path} imports {name} (line {line})"
                for line, name in sources.names_used(module)
                if name.startswith("deepspeed.") and name not in PUBLIC_DEEPSPEED
            ]
    refuse(found, f"private names of DeepSpeed belong in {DEEPSPEED_SEAM}:")


def test_routing_diffusion_and_model_never_load_deepspeed():
    graph = sources.import_graph()
    loads = {m.name for m in sources.modules("diffmoe_ds") for _, n in sources.imported_names(m) if is_deepspeed(n)}
    reached = {name for name in graph if f"{name}.".startswith(tuple(f"{start}." for start in WITHOUT_DEEPSPEED))}
    while more := {other for name in reached for other in graph[name]} - reached:
        reached |= more
    assert not reached & loads, f"imported by routing rules, diffusion or model: {sorted(reached & loads)}"


def is_deepspeed(name: str) -> bool:
    return name == "deepspeed" or name.startswith("deepspeed.")


@pytest.mark.parametrize("command", ("", "train"))
def test_help_loads_neither_torch_nor_deepspeed(command):
    code = (
        "import sys\nfrom diffmoe_ds.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*(name for name in ('torch', 'deepspeed') if name in sys.modules), file=sys.stderr)"
    )
    arguments = [*command.split(), "--help"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [f"diffmoe {' '.join(arguments)} loads {name}" for name in done.stderr.split()]
    refuse(found, "import torch and deepspeed where a command runs, so that --help is fast and typos fail fast:")


def test_only_the_parser_reads_the_command_line():
    found = [
        f"{module.path} reads sys.argv (line {line})"
        for module in sources.modules("diffmoe_ds")
        if module.path not in READ_ARGV
        for line, name in sources.names_used(module)
        if name == "sys.argv"
    ]
    refuse(found, "take arguments from the parser:")


def test_imports_are_absolute():
    found = [
        f"{module.path} imports {name} (line {line})"
        for module in sources.modules(*sources.CODE, "tests")
        for line, name in sources.imported_names(module)
        if name.startswith(".")
    ]
    refuse(found, "write imports in full:")


def test_files_are_short():
    found = [
        f"{module.path}: {len(module.lines)} lines"
        for module in sources.modules(*sources.CODE, "tests")
        if len(module.lines) > MAX_FILE
    ]
    refuse(found, f"split files of more than {MAX_FILE} lines:")


def test_functions_are_short():
    found = [
        f"{module.path}:{name}: {lines} lines"
        for module in sources.modules(*sources.CODE)
        for name, function in sources.functions(module)
        if (lines := sources.length(function)) > MAX_FUNCTION
    ]
    refuse(found, f"split functions of more than {MAX_FUNCTION} lines:")


def test_parameter_lists_are_short():
    found = [
        f"{module.path}:{name}: {count} parameters"
        for module in sources.modules(*sources.CODE)
        for name, function in sources.functions(module)
        if (count := sources.parameters(function)) > MAX_PARAMETERS and f"{module.path}:{name}" not in DICTATED
    ]
    refuse(found, f"put more than {MAX_PARAMETERS} parameters into a dataclass:")


def test_the_training_loop_fits_on_a_page():
    (loop,) = (module for module in sources.modules("diffmoe_ds/training") if module.path.endswith("/loop.py"))
    (lines,) = (sources.length(function) for name, function in sources.functions(loop) if name == "train")
    refuse([f"{loop.path}:train: {lines} lines"] if lines > MAX_LOOP else [], f"at most {MAX_LOOP} lines:")


def test_fields_are_documented_by_docstrings():
    comment = re.compile(r"(^|\s)#" + ":")
    found = [
        f"{module.path}:{number}"
        for module in sources.modules(*sources.CODE, "tests")
        for number, line in enumerate(module.lines, 1)
        if comment.search(line)
    ]
    refuse(found, "write a docstring or a plain comment:")


def test_no_file_contains_an_unidiomatic_phrase():
    paths = sources.tracked_files()
    if paths is None:
        pytest.skip("not a git checkout")
    found = []
    for path in paths:
        data = path.read_bytes()
        if b"\0" in data[:8000]:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if match := UNIDIOMATIC.search(line):
                found.append(f"{path.relative_to(sources.ROOT)}:{number}: {match.group()}")
    refuse(found, "say it plainly:")
