"""Whose Adam runs where: torch's fused one unless DeepSpeed's own was prebuilt, and what a host cannot compile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.config.deepspeed import resolve_deepspeed
from diffmoe_ds.config.load import load_config
from diffmoe_ds.distributed.rejection import NO_COMPILER, rejection
from diffmoe_ds.errors import ConfigError

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def resolve(params: dict, *prebuilt: str, device: str = "cuda", zero: dict | None = None):
    raw = {"train_batch_size": 8, "optimizer": {"params": params}, "zero_optimization": zero or {"stage": 1}}
    config = load_config("fashion", [])
    settings = resolve_deepspeed(
        raw, config, "ds.json", world=1, local_world=1, device=device, is_prebuilt=prebuilt.__contains__
    )
    resolved = settings.json["optimizer"]["params"]
    return resolved["torch_adam"], resolved.get("fused"), [n for n in settings.notes if "_adam:" in n or "fused:" in n]


@pytest.mark.parametrize("params", ({}, {"torch_adam": "auto", "fused": "auto"}))
def test_deepspeeds_adam_runs_only_where_it_is_prebuilt(params):
    assert resolve(params, "fused_adam")[:2] == (False, None)
    assert resolve(params, "cpu_adam", zero=OFFLOAD)[:2] == (False, None)
    for prebuilt, zero, name in (((), None, "FusedAdam"), (("fused_adam",), OFFLOAD, "DeepSpeedCPUAdam")):
        torch_adam, fused, notes = resolve(params, *prebuilt, zero=zero)
        assert (torch_adam, fused) == (True, True)
        assert notes[0] == f"optimizer.params.torch_adam: true, because DeepSpeed's {name} is not prebuilt here"


def test_torchs_adam_is_fused():
    for device in ("cuda", "cpu"):
        assert resolve({"torch_adam": True}, device=device)[:2] == (True, True)
    assert resolve({"torch_adam": True, "fused": "auto"})[2] == [
        "optimizer.params.fused: true, the fastest of torch's implementations of Adam"
    ]


@pytest.mark.parametrize(
    ("params", "expected"),
    (
        ({"torch_adam": False}, (False, None)),
        ({"torch_adam": True, "fused": False}, (True, False)),
        ({"torch_adam": True, "foreach": True}, (True, None)),
        ({"fused": True}, (True, True)),
    ),
)
def test_a_choice_in_the_json_is_kept(params, expected):
    assert resolve(params, "fused_adam")[:2] == expected


@pytest.mark.parametrize(
    ("params", "message"),
    (
        ({"torch_adam": True, "fused": True, "foreach": True}, "foreach must be false with optimizer.params.fused"),
        ({"torch_adam": False, "fused": True}, "torch_adam must be true with optimizer.params.fused"),
        ({"fused": 1}, 'fused must be true, false or "auto", got 1'),
    ),
)
def test_options_that_exclude_each_other(params, message):
    with pytest.raises(ConfigError, match=message):
        resolve(params)


@pytest.mark.parametrize("name", NO_COMPILER)
def test_deepspeeds_names_of_a_missing_compiler_exist(name):
    from deepspeed.ops.op_builder import builder

    found = rejection(getattr(builder, name)("CUDA_HOME does not exist, unable to compile CUDA op(s)"), "AdamW")
    assert "torch_adam in the DeepSpeed JSON must be true" in str(found) and "CUDA_HOME does not exist" in str(found)
    assert not found.same_on_all_ranks, "the rank on the host without a compiler must report it"


def test_what_counts_as_a_rejection():
    for error in (
        RuntimeError("Unable to JIT load the fused_adam op due to ninja not being installed."),
        RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op, which failed to build/load."),
        RuntimeError("Error building extension 'cpu_adam'"),
        OSError("CUDA_HOME environment variable is not set."),
        ImportError("fused_adam.so: undefined symbol"),
    ):
        assert "torch_adam" in str(rejection(error, "AdamW"))
        lion = str(rejection(error, "Lion"))
        assert (
            lion.startswith("optimizer.type in the DeepSpeed JSON must be AdamW on this host")
            and "torch_adam" not in lion
        )
    assert "rejected the configuration: TypeError" in str(rejection(TypeError("unexpected keyword argument"), "AdamW"))
    assert rejection(RuntimeError("Connection closed by peer"), "AdamW") is None
    assert rejection(OSError("No space left on device"), "AdamW") is None


@pytest.mark.parametrize("fused", (True, False))
def test_adams_step_is_where_the_optimizer_reads_it(fused):
    """The fused Adam reads its step count on the device of the weights, the others on the CPU."""
    seam = pytest.importorskip("diffmoe_ds.distributed.deepspeed_seam")
    weights = [torch.nn.Parameter(torch.zeros(3, device="meta")) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, fused=fused)
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0)
    seam._ensure_moments(engine)
    seam.set_adam_step(engine, 7)
    assert {optimizer.state[w]["step"].device.type for w in weights} == {"meta" if fused else "cpu"}
    assert fused or seam.adam_step(engine) == 7


@pytest.mark.parametrize("fused", (True, False))
def test_moments_made_ahead_train_like_those_that_adam_makes(fused):
    seam = pytest.importorskip("diffmoe_ds.distributed.deepspeed_seam")
    trained = []
    for ahead in (True, False):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0)
        if ahead:
            seam._ensure_moments(engine)
        for _ in range(2):
            weight.grad = torch.tensor([1.0, -2.0, 3.0])
            optimizer.step()
        trained.append(weight.detach())
        assert seam.adam_step(engine) == 2
    assert torch.equal(*trained)


def resolve_lion(params: dict, zero: dict, device: str = "cpu"):
    raw = {"train_batch_size": 8, "optimizer": {"type": "Lion", "params": params}, "zero_optimization": zero}
    return resolve_deepspeed(raw, load_config("fashion", []), "ds.json", world=1, local_world=1, device=device)


def test_lion_gets_the_recipes_values_and_none_of_adams_options():
    adams = dict.fromkeys(("eps", "torch_adam", "foreach", "fused"), "auto")
    for device, zero in (("cpu", OFFLOAD), ("cuda", OFFLOAD), ("cuda", {"stage": 1})):
        found = resolve_lion({"lr": 1e-4, "weight_decay": "auto", **adams}, zero, device).json["optimizer"]
        assert found == {"type": "Lion", "params": {"lr": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.95]}}


@pytest.mark.parametrize(
    ("params", "zero", "device", "message"),
    (
        (
            {"eps": 1e-8},
            OFFLOAD,
            "cpu",
            "optimizer.params.eps is an option of Adam; Lion has lr, betas and weight_decay",
        ),
        ({"fused": True}, OFFLOAD, "cuda", "optimizer.params.fused is an option of Adam"),
        ({}, {"stage": 2}, "cpu", r"on a CPU needs zero_optimization.offload_optimizer.device .*; or use AdamW"),
        ({}, {"stage": 0}, "cuda", "needs zero_optimization.stage 1, 2 or 3, got 0"),
    ),
)
def test_where_lion_cannot_run(params, zero, device, message):
    with pytest.raises(ConfigError, match=message):
        resolve_lion(params, zero, device)


def test_lion_has_one_moment():
    """The state that is made ahead is all that DeepSpeed's Lion reads, so a second moment is never allocated."""
    seam = pytest.importorskip("diffmoe_ds.distributed.deepspeed_seam")
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = seam.DeepSpeedCPULion.__new__(seam.DeepSpeedCPULion)  # without compiling its operator
    torch.optim.Optimizer.__init__(optimizer, [weight], {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0})
    used = []
    optimizer.opt_id, optimizer.ds_opt_lion = (
        0,
        SimpleNamespace(lion_update=lambda *arguments: used.append(arguments), destroy_lion=lambda number: None),
    )
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0)
    seam._ensure_moments(engine)
    seam.set_adam_step(engine, 7)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[weight]) == {"step", "exp_avg"} and seam.adam_step(engine) == 8
    assert used[0][-1] is optimizer.state[weight]["exp_avg"]
