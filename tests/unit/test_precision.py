"""TF32 and full precision. Without a GPU, the operator of GPUs runs on the CPU, where its switch has no effect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffmoe_ds import precision


@pytest.fixture
def tf32():
    """TF32 enabled, as on a GPU; the state of torch is restored."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_is_left_alone_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    precision.set_tf32(True)
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_is_set_for_products_and_convolutions(monkeypatch, tf32):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for enabled, name in ((False, "ieee"), (True, "tf32")):
        precision.set_tf32(enabled)
        assert (
            torch.backends.cuda.matmul.fp32_precision
            == torch.backends.cudnn.conv.fp32_precision.replace("none", "ieee")
            == name
        )
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == enabled


def test_products_on_the_cpu_are_those_of_torch():
    x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    assert torch.equal(precision.linear_fp32(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(precision.product_fp32(x, weight.mT), x @ weight.mT)


def test_the_gpu_operator_switches_tf32_off_and_on_again(monkeypatch, tf32):
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__",
        lambda a, b: seen.append(torch.backends.cuda.matmul.fp32_precision) or matmul(a, b),
    )  # fmt: skip
    a, b = torch.randn(4, 8, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    precision._product(a, b).sum().backward()
    assert seen == ["ieee"] * 3, "the product and both of its gradients"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high", "the compiler reads this, and mixed interfaces make it raise"


def test_the_gpu_operator_has_the_right_gradients_and_compiles():
    a = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(precision._product, (a, b))
    explained = torch._dynamo.explain(lambda a, b: precision._product(a, b).softmax(-1))(a, b)
    assert explained.graph_count == 1 and explained.graph_break_count == 0
