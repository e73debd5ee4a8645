"""Graph modules whose code is written when they are called."""

import torch
from torch import fx, nn

from dspfx.passes.sandbox.unwritten import UnwrittenModule


def test_code_is_written_at_the_first_call_and_computes_the_graph() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    module = UnwrittenModule(traced, traced.graph)
    assert not hasattr(module, "_code")
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(fx.Interpreter(module).run(x), traced(x))
    assert not hasattr(module, "_code")
    assert torch.equal(module(x), traced(x))
    assert "conv2d" in module.code or "getattr(self" in module.code
    assert torch.equal(module.forward(x), traced(x))
