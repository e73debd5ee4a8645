"""Trying an engine in a process of its own: one that crashes takes nobody with it."""

import importlib.util
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dspfx.engines.onnx_network import OnnxNetwork
from dspfx.errors import CompileError

PATIENCE = 120.0  # seconds

# what it runs: no more than loading a network and computing it once, and nothing of torch
PROGRAM = """
import sys
import numpy
engine, file, inputs = sys.argv[1:]
names, tensors = zip(*sorted(numpy.load(inputs).items()))
network = open(file, "rb").read()
if engine == "openvino":
    import openvino
    core = openvino.Core()
    model = core.read_model(network)
    model.reshape({i: list(tensor.shape) for i, tensor in enumerate(tensors)})
    core.compile_model(model, "CPU")(list(tensors))
else:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    session.run(None, {i.name: t for i, t in zip(session.get_inputs(), tensors)})
"""


def missing_package(name: str) -> str:
    """Why the package `name` cannot be imported; empty if it can."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed: pip install 'dspfx[deploy]'"
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken package raises
        return f"{name} cannot be imported: {error}"
    return ""


def runs_in_a_child(engine: str, network: OnnxNetwork, inputs: tuple[Any, ...]) -> None:
    """Load `network` and compute it once in another process.

    Raises:
        CompileError: the engine refused it, crashed, or did not come back.
    """
    tensors = network.tensors(inputs)
    assert tensors is not None
    with tempfile.TemporaryDirectory(prefix="dspfx-") as folder:
        file, given = Path(folder) / "network.onnx", Path(folder) / "inputs.npz"
        file.write_bytes(network.file)
        numbered: Any = {f"{i:04}": tensor.numpy() for i, tensor in enumerate(tensors)}
        np.savez(given, **numbered)
        command = [sys.executable, "-c", PROGRAM, engine, str(file), str(given)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"did not come back within {PATIENCE:.0f} s") from error
    if done.returncode < 0:
        raise CompileError(f"crashed ({signal.Signals(-done.returncode).name})")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise CompileError(said[-1] if said else f"ended with {done.returncode}")
