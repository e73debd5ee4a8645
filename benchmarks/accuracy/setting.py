"""What every method is given, and what it is measured by: multiply-accumulates (MACs)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dspfx
from benchmarks.accuracy.protocol import Data
from benchmarks.accuracy.scenarios import IMAGE, Scenario


@dataclass(frozen=True)
class Run:
    """What a method may use.

    Attributes:
        scenario, data: what is trained on what.
        dense: the trained network; not to be changed.
        generator: of everything random.
    """

    scenario: Scenario
    data: Data
    dense: nn.Module
    generator: torch.Generator


def dense_macs(model: nn.Module) -> tuple[int, int]:
    """MACs of `model` for one image, and those of its layers with gates."""
    found = dspfx.report(dspfx.prepare(model, IMAGE.repeat(2, 1, 1, 1)))
    return found.before.macs, found.gated_before.macs


def macs_of(model: nn.Module) -> int:
    """MACs for one image: of what is alive in a prepared network, else counted by torch."""
    if isinstance(model, dspfx.PreparedModule):
        return dspfx.report(model).after.macs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(IMAGE)
    return int(counter.get_total_flops()) // 2
