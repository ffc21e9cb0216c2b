"""`model.compile`: compiled blocks keep their parameters' names, and their graphs do not break."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.model.dit import BlockInputs, DiT
from diffmoe_ds.model.init import init_weights
from diffmoe_ds.training.setup import compile_blocks

DENSE, MOE = 0, 1
"""Blocks of the model without and with experts."""


def model_and_inputs(*overrides: str) -> tuple[DiT, torch.Tensor, BlockInputs]:
    """Return a small model, and what one of its blocks reads."""
    config = load_config("fashion", ["model.name=nano-E4", "model.patch_size=8", *overrides])
    model = DiT(config)
    init_weights(model, 0, 0)
    torch.manual_seed(0)
    for block in model.blocks:  # adaLN-zero would leave the tokens unchanged
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    x_BSD, vector_BD = torch.randn(3, config.tokens_per_image, 32), torch.randn(3, 32)
    return model, x_BSD, BlockInputs(vector_BD, vector_BD)


def breaks(block: torch.nn.Module, x_BSD: torch.Tensor, inputs: BlockInputs) -> list[str]:
    """Return the reasons why a block's forward pass is more than one graph."""
    torch._dynamo.reset()
    explained = torch._dynamo.explain(block)(x_BSD, inputs)
    assert explained.graph_count == explained.graph_break_count + 1, "the block was not compiled"
    return [str(reason.reason) for reason in explained.break_reasons]


@pytest.mark.parametrize("mlp", ("gelu", "swiglu"))
def test_a_dense_block_is_one_graph(mlp):
    model, x_BSD, inputs = model_and_inputs(f"model.mlp={mlp}")
    assert breaks(model.blocks[DENSE].train(), x_BSD, inputs) == []


def test_a_moe_block_on_one_rank_is_one_graph():
    """The static path: sizes follow from the routing rule, so that nothing has to be read from the device."""
    model, x_BSD, inputs = model_and_inputs("routing.shared_experts=1")
    assert breaks(model.blocks[MOE].train(), x_BSD, inputs) == []


def test_compiled_blocks_compute_the_same_with_the_same_names(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no C++ compiler, and fast
    outputs = []
    for compiled in (False, True):
        model, x_BSD, inputs = model_and_inputs()
        names = [name for name, _ in model.named_parameters()]
        if compiled:
            compile_blocks(model)
        assert [name for name, _ in model.named_parameters()] == names
        for block in model.blocks:
            x_BSD, _ = block(x_BSD, inputs)
        x_BSD.sum().backward()
        outputs.append((x_BSD.detach(), [p.grad for p in model.blocks.parameters()]))
    (plain, gradients), (compiled_plain, compiled_gradients) = outputs
    assert torch.equal(plain, compiled_plain)
    for a, b in zip(gradients, compiled_gradients, strict=True):
        assert a is b is None or torch.equal(a, b), "the capacity predictor has no gradient without its loss"


def test_hooks_on_compiled_blocks_run_if_the_stance_is_eager(monkeypatch):
    """`training/nonfinite.py` locates a NaN with hooks that it adds after blocks were compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, x_BSD, inputs = model_and_inputs()
    compile_blocks(model)
    block, called = model.blocks[DENSE], []
    block(x_BSD, inputs)
    handle = block.attn.register_forward_hook(lambda *_: called.append("attn"))
    with torch.compiler.set_stance("force_eager"):
        block(x_BSD, inputs)
    handle.remove()
    assert called == ["attn"]
