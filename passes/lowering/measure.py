"""Measure forms of a layer on the device, shapes and number of threads at hand.

Measurements are cached on disk, in one file for each machine, number of threads and version of
torch. A damaged file counts as empty.
"""

import contextlib
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.layers.branches import Branches
from dspfx.layers.group_conv import GroupConv2d
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.utils.cache import as_file_name, cache_folder, processor
from dspfx.utils.timing import ROUNDS as LAYER_ROUNDS
from dspfx.utils.timing import WARM_UP_CALLS, medians

ROUNDS = 7
WARM_UP = 0.005
ROUND_TAKES = 0.003


class Measured:
    """Times of layers by signature, cached on disk.

    Args:
        device: on which they were measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.path = cache_folder() / f"{_machine(device)}.json"
        self.known = _read(self.path)

    def __call__(self, modules: Mapping[Any, nn.Module], x: Tensor) -> dict[Any, float]:
        """The seconds that each of `modules` takes for `x`; runs by the kernel's own clock."""
        signatures = {name: signature(module, x) for name, module in modules.items()}
        missing = {
            signatures[name]: module
            for name, module in modules.items()
            if signatures[name] not in self.known
        }
        if missing:
            with torch.no_grad():
                self.known.update(_timed(missing, x))
        return {name: self.known[key] for name, key in signatures.items()}

    def remembered(self, key: str, find: Callable[[], float]) -> float:
        """The seconds of what is called `key`, which `find` measures if they are not known."""
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]

    def save(self) -> None:
        """Write all times, atomically; a folder that cannot be written to is no error."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".tmp", delete=False
            ) as file:
                json.dump(_read(self.path) | self.known, file)  # others may have saved meanwhile
            os.replace(file.name, self.path)


def signature(module: nn.Module, x: Tensor) -> str:
    """A key for the time of `module` for `x`: all that it depends on, except the machine."""
    kind = "channels last" if _is_channels_last(x) else "plain"
    return f"{module!r} {tuple(x.shape)} {x.dtype} {kind}"


def _timed(modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
    planar = x.contiguous()  # as the own kernel takes it
    runs = {key: module for key, module in modules.items() if isinstance(module, GroupConvRun)}
    ready = {
        key: _ready(module, planar if isinstance(module, GroupConv2d) else x)
        for key, module in modules.items()
        if key not in runs
    }
    layers = layer_medians(list(runs.values()), [planar])
    return medians(ready, ROUNDS, warm_up=WARM_UP, round_takes=ROUND_TAKES) | {
        key: sum(seconds) for key, seconds in zip(runs, layers, strict=True)
    }


def can_be_packed(weights: Iterable[Tensor]) -> bool:
    """Whether oneDNN packs such weights for this processor; where it cannot, torch fails to."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    mkldnn: Any = torch.ops.mkldnn
    packed = {
        torch.float32: True,
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: mkldnn._is_mkldnn_fp16_supported(),
    }
    return all(w.device.type == "cpu" and packed.get(w.dtype, False) for w in weights)


def _machine(device: torch.device) -> str:
    """A name for device, threads and torch, fit for a file."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()} {torch.backends.cpu.get_cpu_capability()}"
    text = f"{name} {torch.get_num_threads()} threads torch {torch.__version__}"
    return as_file_name(text)


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: t for key, t in entries if isinstance(t, float) and 0 < t < float("inf")}


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _ready(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call of `module` as it runs when compiled: on a CPU with its weights packed by oneDNN."""
    twin = module
    if x.dim() == 4 and can_be_packed([x]):
        twin = copy.deepcopy(module) if isinstance(module, Branches) else nn.Sequential(module)
        for name, layer in list(twin.named_children()):
            if type(layer) is nn.Conv2d and _is_plain(layer):
                setattr(twin, name, _Packed(layer, x))
    return lambda: twin(x)


class _Packed(nn.Module):
    """A convolution as inductor calls it once weights are frozen."""

    def __init__(self, conv: nn.Conv2d, x: Tensor) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.settings = conv.padding, conv.stride, conv.dilation, conv.groups
        size = x.shape[0], conv.in_channels, *x.shape[2:]
        pack = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = pack(conv.weight, *self.settings, size)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        call = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = call(x, self.weight, self.bias, *self.settings, "none", [], "")
        return result


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def layer_medians(runs: Sequence[GroupConvRun], inputs: Sequence[Tensor]) -> list[list[float]]:
    """Of each of `runs` the median seconds of every layer by the kernel's own clock, in turns."""
    times: list[list[list[float]]] = [[] for _ in runs]
    for _ in range(WARM_UP_CALLS + LAYER_ROUNDS):
        for run, own in zip(runs, times, strict=True):
            own.append(run.seconds(*inputs).tolist())
    return [
        [statistics.median(layer) for layer in zip(*own[WARM_UP_CALLS:], strict=True)]
        for own in times
    ]
