"""On a GPU: the reference's numbers in fp32, and no host synchronization in forward and backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import forward_loss, make_batch, make_model, model_config
from diffmoe_ds.checkpoint.reference import reference_views
from diffmoe_ds.moe import expert_ffn
from diffmoe_ds.moe.capacity import capacity_loss
from tests.golden.test_golden import MODELS, golden, inputs, model_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
TOLERANCE = 5e-5
"""Of the largest value; on the CPU it is 1e-5."""


@pytest.fixture(autouse=True)
def full_precision():
    """Switch TF32 off, which rounds products to three digits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def assert_close(ours, theirs, what):
    expected = torch.as_tensor(theirs, dtype=torch.float64)
    error = (ours.detach().double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_golden_numbers(name):
    """Output in both modes, selection, loss and all gradients."""
    file = golden(name)
    model = model_of(file).to(DEVICE)
    given = [tensor.to(DEVICE) for tensor in inputs(file)]
    with torch.no_grad():
        assert_close(model.eval()(*given).prediction, file["eval/out"], "eval/out")
    output = model.train()(*given)
    assert_close(output.prediction, file["train/out"], "train/out")
    loss = (output.prediction - torch.from_numpy(file["train/target"]).to(DEVICE)).square().mean()
    routing = model.config.routing
    for block, record in zip(model.moe_layers(), output.routing, strict=True):
        if record.capacity_logits_TE is not None:
            selected = torch.from_numpy(file[f"train/selected/{block}"].astype(bool)).flatten(0, 1)
            assert torch.equal(record.mask_TE.cpu(), selected), f"selection of block {block}"
            loss = loss + routing.capacity_weight * capacity_loss(record.capacity_logits_TE, record.mask_TE)
    assert_close(loss, file["train/loss"], "train/loss")
    for record in output.routing:
        if "balance" in record.auxiliary:
            loss = loss + routing.balance_weight * record.auxiliary["balance"]
    loss.backward()
    for ours, parameter in model.named_parameters():
        for theirs, gradient in reference_views(model.config, ours, parameter.grad).items():
            assert_close(gradient, file[f"grad/{theirs}"], f"grad/{theirs}")


@pytest.mark.parametrize("routing", ("batch_pool", "expert_choice", "token_choice"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_forward_and_backward_never_wait_for_the_gpu(routing, dtype):
    """Where the routing rule or padding fixes all sizes, torch itself refuses every synchronization."""
    config = model_config("tiny", 4, routing, ["routing.padded_dispatch=4"])  # affects token_choice only
    model, batch = make_model(config, DEVICE, dtype), make_batch(config, 4, DEVICE)
    for _ in range(2):  # the first pass may fill caches
        loss = forward_loss(model, batch, config)[0]
        loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = forward_loss(model, batch, config)[0]
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ("gelu", "swiglu"))
def test_grouped_products_agree_with_a_loop(monkeypatch, kind):
    """In bf16, experts with different numbers of rows are one grouped product."""
    counts, width, hidden = [300, 0, 77, 647], 64, 256
    third = (4, 1, hidden + width) if kind == "gelu" else (4, hidden, width)
    shapes = ((sum(counts), width), (4, hidden, width), (4, width, hidden), third)
    tensors = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16).mul_(0.1).requires_grad_() for s in shapes]
    gradient = torch.randn(sum(counts), width, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for grouped in ({("cuda", torch.bfloat16)}, set()):
        monkeypatch.setattr(expert_ffn, "GROUPED", grouped)
        out = expert_ffn.expert_ffn(kind, *tensors, counts)
        results.append([out, *torch.autograd.grad(out, tensors, gradient)])
    for name, ours, expected in zip(("out", "x", "w1", "w2", "w3"), *results, strict=True):
        error = (ours.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < 0.03, (name, float(error))


@pytest.mark.parametrize("routing", ("batch_pool", "token_choice"))
def test_no_layer_waits_for_the_gpu_in_sampling(routing):
    config = model_config("tiny", 4, routing)
    model, batch = make_model(config, DEVICE, torch.bfloat16).eval(), make_batch(config, 4, DEVICE)
    if routing == "batch_pool":
        model.set_inference("per_token")
    model.assumed_capacities = 4.0
    with torch.inference_mode(), model.bounded_dispatch() as is_bounded:
        assert is_bounded
        for mode in ("default", "error"):  # the first pass may fill caches
            torch.cuda.set_sync_debug_mode(mode)
            try:
                output = model(batch.x, batch.time, batch.label)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert output.prediction.isfinite().all() and not any(r.must_redo for r in output.routing)
