"""`compile`: a model and the shapes it will see, to a fast callable.

1. Where the project's own kernel cannot compute some layer whose filters read different channels,
   every such layer is timed in the forms that are likely to be fast, the own kernel among them.
2. Convolutions on the own kernel that follow each other are joined, and those of 3x3 computed by
   Winograd's algorithm where that is faster.
3. The whole network is compiled as it was converted, with every layer dense, with every layer on
   the own kernel that it can compute, and with the fastest form of each layer if 1 found them.
   Whole networks are timed because changes of layout between layers cost time as well. The fastest
   is returned, so that none is slower than dense. Without groups there are two candidates: as it
   was converted, and the own kernel.
"""

import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from dspfx.errors import CompileError
from dspfx.layers.group_conv import GroupConvRun
from dspfx.model.analysed import fitting_inputs
from dspfx.model.deployable import check_deployable
from dspfx.model.parts import compact_parts_of
from dspfx.passes.lowering.classifier import join_classifiers
from dspfx.passes.lowering.cost_model import CPU
from dspfx.passes.lowering.forms import Lowering, dense, describe, forms
from dspfx.passes.lowering.fuse import fuse
from dspfx.passes.lowering.measure import Measured, can_be_packed
from dspfx.passes.lowering.runs import join_runs
from dspfx.passes.lowering.sites import Site, relowered, sites
from dspfx.passes.lowering.winograd import choose, measured_choice
from dspfx.passes.sandbox.calls import Call, as_inputs, check_accepted, fresh
from dspfx.utils.timing import medians
from dspfx.utils.torch_warnings import without_cuda_home

MOST_FORMS = 6
ROUNDS = 15
SETTLE = 5e-3
_COMPILING = threading.Lock()  # torch's settings are those of the process
FASTEST_ALONE = "the fastest form of each layer"
INDUCTOR, UNFROZEN, AS_IT_IS = "inductor", "weights not frozen", "without inductor"


@dataclass(frozen=True)
class LayerChoice:
    """The forms of one layer that were timed.

    Attributes:
        name: of the layer.
        seconds: of each form, by its description.
        chosen: the fastest.
    """

    name: str
    seconds: Mapping[str, float]
    chosen: str


@dataclass(frozen=True)
class CompileReport:
    """What `compile` measured and chose; `str` is a table.

    Attributes:
        layers: those whose forms were timed; empty where the own kernel computes all layers whose
            filters read different channels.
        networks: seconds of the whole network, compiled, by how its layers are emitted; empty
            where there was nothing to choose.
        chosen: the one that is returned.
        winograd: its layers that Winograd's algorithm computes.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> fast = dspfx.compile(dspfx.convert(prepared), x)
        >>> fast.report.chosen in fast.report.networks
        True
    """

    layers: tuple[LayerChoice, ...]
    networks: Mapping[str, float]
    chosen: str
    winograd: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                layer.chosen,
                f"{1e3 * layer.seconds[layer.chosen]:.3f}",
                f"{1e3 * layer.seconds['dense']:.3f}",
                str(len(layer.seconds)),
            )
            for layer in self.layers
        ]
        header = ("layer", "fastest by itself", "ms", "dense, ms", "forms timed")
        best = sum(layer.seconds[layer.chosen] for layer in self.layers)
        whole = sum(layer.seconds["dense"] for layer in self.layers)
        rows.append(("together", "", f"{1e3 * best:.3f}", f"{1e3 * whole:.3f}", ""))
        networks = [
            (worded(name), f"{1e3 * seconds:.3f}", "chosen" if name == self.chosen else "")
            for name, seconds in self.networks.items()
        ]
        names = ", ".join(self.winograd)
        return "\n\n".join(
            [
                *([tabulate(rows, header, disable_numparse=True)] if self.layers else []),
                tabulate(networks, ("whole network, compiled", "ms", ""), disable_numparse=True),
                *([f"By Winograd's algorithm: {names}"] if names else []),
            ]
        )


def worded(network: str) -> str:
    """The name of a network in `CompileReport.networks` as reports show it.

    Layers that are the fastest one by one may make the slowest network, since what lies between
    them counts as well.
    """
    return network.replace(FASTEST_ALONE, "each layer in the form that is fastest by itself")


class Compiled:
    """A model compiled for inference; called with the model's positional arguments.

    Attributes:
        model: what was compiled.
        report: what was measured and chosen.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> compact = dspfx.convert(prepared)
        >>> fast = dspfx.compile(compact, x)
        >>> fast(x).shape  # without gradients, from any thread
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, model: nn.Module, how: str = INDUCTOR) -> None:
        without_cuda_home()
        self.model = model
        self.report = CompileReport((), {}, "as it is")
        # its weights are frozen: only what is new in the inputs needs a look
        guards: Any = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self._call: Callable[..., Any] = model
        if how != AS_IT_IS:
            self._call = torch.compile(_with_code_of_its_own(model), options=guards)
        on_cpu = all(buffer.device.type == "cpu" for buffer in model.buffers())
        freezing = how == INDUCTOR and on_cpu and can_be_packed(model.parameters())
        self._settings = {"freezing": freezing}
        self._met: set[tuple[object, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        """The model's outputs, computed without gradients."""
        shapes = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else None for x in args)
        with torch.no_grad():
            if shapes in self._met:
                return self._call(*args)
            with _COMPILING:  # one thread compiles, those that wait for the same find it done
                # options of torch.compile come too late: dynamo asks for them before inductor
                with torch._inductor.config.patch(self._settings):
                    result = self._call(*args)
                self._met.add(shapes)
            return result


def _with_code_of_its_own(model: nn.Module) -> Callable[..., Any]:
    """A function that calls `model`, and whose code object nobody else has.

    Torch keeps what it compiled with the code object of a function, and all modules of a class
    share theirs: without guards on modules, one would be taken for the other.
    """

    def call(*args: Any) -> Any:
        return model(*args)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
    )


def compile(model: nn.Module, example_inputs: Any) -> Compiled:
    """Compile an evaluation-mode model for inference with `torch.compile`.

    What is fastest for a compact model is measured, on the device of the example inputs and with
    the current number of threads. Times are remembered on disk, in the
    folder that the environment variable `DSPFX_CACHE_DIR` names, else in the user's cache.
    On a CPU the parameters are frozen into the compiled code. The first call for the shapes of
    `example_inputs` is made here, so that the callable returned is warm.

    Args:
        model: a compact module, or any module in evaluation mode; it is left as it is.
        example_inputs: a tensor, or a tuple of positional inputs.

    Returns:
        A callable with the model's positional arguments; `print(compiled.report)` shows what was
        measured and chosen.

    Raises:
        CompileError: the model is not converted, is in training mode, does not accept the example
            inputs, or cannot be compiled by torch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
        >>> compact = dspfx.convert(prepared)
        >>> fast = dspfx.compile(compact, x)
        >>> bool(torch.allclose(fast(x), compact(x), atol=1e-5))
        True
    """
    inputs = fresh(as_inputs(example_inputs))
    check_deployable(model, "compile", CompileError)
    check_accepted(model, Call(inputs), CompileError)
    layers = sites(model, inputs)
    grouped = [site for site in layers if len(site.groups) > 1 and site.structural_groups == 1]
    if not grouped and not compact_parts_of(model):  # nobody's kernel is built for it
        return _compiled(model, inputs)
    modules = {site: site.emit_native() for site in layers}
    own = {site: module for site, module in modules.items() if module is not None}
    if not grouped and not own:
        return _compiled(model, inputs)
    networks: dict[str, nn.Module] = {"as converted": model}
    choices: tuple[LayerChoice, ...] = ()
    if grouped:
        whole = {site: site.emit(dense(site.groups)) for site in grouped}
        networks["dense"] = relowered(model, whole)
        if any(site not in own for site in grouped):  # else the own kernel is faster than a mixture
            choices, fastest = _choose(grouped)
            networks[FASTEST_ALONE] = _joined(relowered(model, fastest), inputs)
    if own:
        networks["native"] = _joined(relowered(model, own), inputs)
    compiled = {name: _compiled(network, inputs) for name, network in networks.items()}
    if own:  # a few long calls need nobody to join them
        compiled[f"native, {AS_IT_IS}"] = _compiled(networks["native"], inputs, AS_IT_IS)
    calls = {name: partial(call, *inputs) for name, call in compiled.items()}
    times = medians(calls, ROUNDS, settle=SETTLE)
    best = min(times, key=times.__getitem__)
    fast = compiled[best]
    runs = [module for module in fast.model.modules() if isinstance(module, GroupConvRun)]
    winograd = tuple(name for run in runs for name in run.by_winograd())
    fast.report = CompileReport(choices, times, best, winograd)
    return fast


def _joined(network: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """`network` with its layers on the own kernel joined into runs, by the faster algorithm."""
    for _, part in compact_parts_of(network):
        fuse(part, fitting_inputs(part))
        join_classifiers(part)
        join_runs(part)
    choose(network, measured_choice(network, inputs))
    return network


def _choose(
    found: list[Site],
) -> tuple[tuple[LayerChoice, ...], dict[Site, nn.Module]]:
    """Time the likely forms of every layer."""
    measured = Measured(found[0].weight.device)
    choices, fastest = [], {}
    for site in found:
        likely = _likely(site)
        modules = {name: site.emit(form) for name, form in likely.items()}
        own = site.emit_native()
        modules |= {"native": own} if own is not None else {}
        times = measured(modules, site.example())
        best = min(times, key=times.__getitem__)
        choices.append(LayerChoice(site.name, times, best))
        fastest[site] = modules[best]
    measured.save()
    return tuple(choices), fastest


def _likely(site: Site) -> dict[str, Lowering]:
    """The forms worth timing, by description: dense, and those that should be the fastest."""
    whole = dense(site.groups)
    structural_group = [0] * len(site.groups)
    grouping = not isinstance(site.layer, nn.Linear)
    others = sorted(
        forms(site.groups, structural_group, grouping),
        key=partial(CPU.seconds, geometry=site.geometry),
    )
    return {"dense": whole} | {describe(form): form for form in others[:MOST_FORMS]}


def _compiled(model: nn.Module, inputs: tuple[Any, ...], how: str = INDUCTOR) -> Compiled:
    """`model` compiled and called once; its weights stay parameters where torch cannot freeze them.

    Raises:
        CompileError: torch cannot compile it.
    """
    failure: RuntimeError | None = None
    for way in (INDUCTOR, UNFROZEN) if how == INDUCTOR else (how,):
        compiled = Compiled(model, way)
        try:
            compiled(*inputs)
        except RuntimeError as error:
            failure = error
        else:
            return compiled
    raise CompileError(
        f"torch.compile cannot compile {type(model).__name__}: {failure}; call the model as it is, "
        "or export it for another runtime"
    ) from failure
