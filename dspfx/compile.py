"""`compile`: a model and the shapes it will see, to a fast callable."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dspfx.inputs import as_inputs


def compile(model: nn.Module, example_inputs: Any) -> Callable[..., Any]:
    """Compile an evaluation-mode model for inference with `torch.compile`.

    On a CPU the parameters are frozen into the compiled code. The first call for the shapes of
    `example_inputs` is made here, so that the callable returned is warm.

    Args:
        model: a compact module, or any module in evaluation mode.
        example_inputs: a tensor, or a tuple of positional inputs.

    Returns:
        A callable with the model's positional arguments; it computes without gradients.
    """
    inputs = as_inputs(example_inputs)
    on_cpu = all(p.device.type == "cpu" for p in (*model.parameters(), *model.buffers()))
    compiled = torch.compile(model, options={"freezing": True} if on_cpu else None)

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*args)

    run(*inputs)
    return run
