"""What `import dspfx` brings along; `python -m benchmarks.import_time` says how long it takes."""

import functools
import json
import subprocess
import sys

from torchvision.ops import FrozenBatchNorm2d, stochastic_depth

from dspfx.passes.analysis import operators

# whole packages, and parts of torch that `import torch` itself leaves out
HEAVY = {
    *("IPython", "PIL", "accelerate", "lightning", "matplotlib", "networkx", "onnx", "onnxruntime"),
    *("onnxscript", "openvino", "pandas", "scipy", "sklearn", "sympy", "timm", "torchao"),
    "torchvision",
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "triton"),
}


@functools.cache
def modules_after(statement: str) -> frozenset[str]:
    """The modules of a fresh process that ran `statement`."""
    code = f"import json, sys; {statement}; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return frozenset(json.loads(run.stdout))


def test_nothing_heavy_is_imported() -> None:
    brought = modules_after("import torch, dspfx") - modules_after("import torch")
    assert "dspfx.prepare" in brought
    assert not brought & HEAVY


def test_what_prepares_and_converts_imports_no_compiler() -> None:
    brought = modules_after(
        "import torch, dspfx; from torch.nn import Conv2d; "
        "model = torch.nn.Sequential(Conv2d(3, 8, 3), Conv2d(8, 8, 3)); "
        "prepared = dspfx.prepare(model, torch.rand(2, 3, 8, 8)); dspfx.convert(prepared.double())"
    )
    assert "dspfx.passes.transforms.verify" in brought
    assert not brought & {"sympy", "torch._dynamo", "torch._inductor"}


def test_heavy_modules_are_seen() -> None:
    """The check above would find what is imported, were it so."""
    brought = modules_after("import torch, torchvision, networkx") - modules_after("import torch")
    assert {"torchvision", "networkx", "torch._dynamo", "sympy"} <= brought & HEAVY


def test_operators_of_torchvision_are_known_by_name() -> None:
    assert operators.named(FrozenBatchNorm2d) in operators.BATCH_NORMS & operators.LEAVES
    assert operators.named(stochastic_depth) in operators.ELEMENTWISE
    assert operators.named(FrozenBatchNorm2d.forward) is FrozenBatchNorm2d.forward
