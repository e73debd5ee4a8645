"""The forms of a network worth timing: as converted, dense, on the own kernel, a mixture.

The form dense over the live channels is there for runtimes that do not reward groups. A mixture,
each layer in the form that is fastest by itself, is tried where the own kernel cannot compute every
layer whose filters read different channels; else the own kernel is faster.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from dspfx.engines.form import AS_CONVERTED, DENSE, MIXED, NATIVE, NATIVE_ALONE, Form
from dspfx.engines.report import LayerChoice
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.model.analysed import fitting_inputs
from dspfx.model.parts import compact_parts_of
from dspfx.passes.lowering.classifier import join_classifiers
from dspfx.passes.lowering.cost_model import CPU
from dspfx.passes.lowering.forms import Lowering, dense, describe, forms
from dspfx.passes.lowering.fuse import fuse
from dspfx.passes.lowering.measure import Measured
from dspfx.passes.lowering.runs import join_runs
from dspfx.passes.lowering.sites import Site, relowered, sites
from dspfx.passes.lowering.winograd import choose, measured_choice

MOST_FORMS = 6


@dataclass(frozen=True)
class Forms:
    """The forms of one network, and the layers that were timed for them so far.

    Attributes:
        all: in the precision of the network.
        in_bf16: the same ones with what the own kernel computes in bfloat16; the rest is left to
            the engine.
        choices: of layers.
    """

    all: tuple[Form, ...]
    in_bf16: tuple[Form, ...]
    choices: list[LayerChoice]


def forms_of(model: nn.Module, inputs: tuple[Any, ...]) -> Forms:
    """The forms of `model`, which computes the same in all of them.

    Args:
        model: compact, or any module in evaluation mode; the only form of that is the first.
        inputs: positional example inputs.
    """
    choices: list[LayerChoice] = []
    found = [Form(AS_CONVERTED, lambda: model, inputs)]
    if not compact_parts_of(model):  # nobody's kernel is built for it
        return Forms(tuple(found), tuple(found), choices)
    layers = sites(model, inputs)
    grouped = [site for site in layers if len(site.groups) > 1 and site.structural_groups == 1]
    own = {site: made for site in layers if (made := site.emit_native()) is not None}

    def whole() -> nn.Module:
        return relowered(model, {site: site.emit(dense(site.groups)) for site in grouped})

    def mixed() -> nn.Module:
        fastest = _fastest_forms(grouped, choices)
        return _by_faster_algorithm(_joined(relowered(model, fastest)), inputs)

    def native() -> nn.Module:
        return _by_faster_algorithm(_joined(relowered(model, own)), inputs)

    if grouped:
        found.append(Form(DENSE, whole, inputs))
    in_bf16 = list(found)
    if any(site not in own for site in grouped):
        mixture = Form(MIXED, mixed, inputs)
        rounded = Form(MIXED, lambda: _in_bf16(copy.deepcopy(mixture.model)), inputs)
        found, in_bf16 = [*found, mixture], [*in_bf16, rounded]
    if own:
        found += _with_and_without_inductor(native, inputs)
        in_bf16 += _with_and_without_inductor(
            lambda: _in_bf16(_joined(relowered(model, own))), inputs
        )
    return Forms(tuple(found), tuple(in_bf16), choices)


def _with_and_without_inductor(
    make: Callable[[], nn.Module], inputs: tuple[Any, ...]
) -> tuple[Form, Form]:
    native = Form(NATIVE, make, inputs)
    return native, Form(NATIVE_ALONE, lambda: native.model, inputs)


def _joined(network: nn.Module) -> nn.Module:
    """`network`, which is changed, with its layers on the own kernel joined into runs."""
    for _, part in compact_parts_of(network):
        fuse(part, fitting_inputs(part))
        join_classifiers(part)
        join_runs(part)
    return network


def _by_faster_algorithm(network: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """`network`, which is changed, with the algorithms of its runs chosen by measuring them."""
    choose(network, measured_choice(network, inputs))
    return network


def _in_bf16(network: nn.Module) -> nn.Module:
    """`network`, which is changed, with its runs in bfloat16."""
    for path, module in list(network.named_modules()):
        if isinstance(module, GroupConvRun):
            network.set_submodule(path, module.in_bf16())
    return network


def _fastest_forms(found: list[Site], choices: list[LayerChoice]) -> dict[Site, nn.Module]:
    """The fastest of the likely forms of every layer, timed one by one."""
    measured = Measured(found[0].weight.device)
    fastest = {}
    for site in found:
        modules: dict[str, nn.Module] = {n: site.emit(f) for n, f in _likely(site).items()}
        own = site.emit_native()
        modules |= {NATIVE: own} if own is not None else {}
        times = measured(modules, site.example())
        best = min(times, key=times.__getitem__)
        choices.append(LayerChoice(site.name, times, best))
        fastest[site] = modules[best]
    measured.save()
    return fastest


def _likely(site: Site) -> dict[str, Lowering]:
    """The forms worth timing, by description: dense, and those that should be the fastest."""
    whole = dense(site.groups)
    structural_group = [0] * len(site.groups)
    grouping = not isinstance(site.layer, nn.Linear)
    seconds: Callable[[Lowering], float] = partial(CPU.seconds, geometry=site.geometry)
    others = sorted(forms(site.groups, structural_group, grouping), key=seconds)
    return {DENSE: whole} | {describe(form): form for form in others[:MOST_FORMS]}
