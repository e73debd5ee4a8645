"""`Blueprint`: all that is saved of a model but its weights, as plain data.

A prepared module is rebuilt from it by preparing a new module of the same architecture alike. A
compact one is not planned again, since plans depend on weights that are gone: the plan is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.layers.gated import gated_layers
from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.model.module import CompactModule, PreparedModule
from dspfx.passes.analysis.operators import Key
from dspfx.quantization.record import Quantization
from dspfx.storage.example_inputs import to_plain
from dspfx.storage.fingerprint import listing
from dspfx.storage.plan_record import Compaction, Numbers, checked
from dspfx.utils.arrays import any_along, equal_rows

Listing = tuple[str, ...]


@dataclass(frozen=True)
class MaskRecord:
    """The mask of one gated layer.

    Attributes:
        lists: the different lists of input channels that its filters read.
        reads: for every filter the number of its list, -1 for none.
        groups: for every filter the group that it is in, learned or set.
    """

    lists: tuple[Numbers, ...]
    reads: Numbers
    groups: Numbers


@dataclass(frozen=True)
class QuantizationRecord:
    """How a compact module is rounded.

    Attributes:
        how: where, and by which scales.
        structure: a digest of the quantised module without its weights.
    """

    how: Quantization
    structure: str


@dataclass(frozen=True)
class Blueprint:
    """How a part of a model is built from the user's module.

    Attributes:
        name: the path of the part in the model, empty for the whole.
        groups, round_to: of the `PrepareConfig`.
        layers: the names of the types of layers that have gates.
        rules: the rules for operators, by the name of the operator.
        frozen: the layers that keep all their filters and inputs.
        opaque: the modules that were not to be traced into.
        gate_first, dtype: see `Origin`.
        arguments: the call it was traced for, see `example_inputs`; a pair of args and kwargs.
        notes: for the report.
        graphs: the listing of the evaluation graph, and of the training graph if it is another.
        masks: of the gated layers.
        dead: the channels that each channel gate keeps at zero.
        compaction: None for a prepared module.
        samples: see `PreparedModule`; None where it is the length of the first tensor.
        quantization: of a compact module that is rounded to 8 bits.
        outside: see `PreparedModule`; 0 in files from before it was counted.
        tracing: see `Origin`.
    """

    name: str
    groups: int
    round_to: int
    layers: tuple[str, ...]
    rules: dict[str, str]
    frozen: tuple[str, ...]
    opaque: tuple[str, ...]
    gate_first: bool
    dtype: str
    arguments: Any
    notes: tuple[str, ...]
    graphs: tuple[Listing, ...]
    masks: dict[str, MaskRecord]
    dead: dict[str, Numbers]
    compaction: Compaction | None
    samples: float | None = None
    quantization: QuantizationRecord | None = None
    outside: int = 0
    tracing: int = 0


def blueprint(prepared: PreparedModule) -> Blueprint:
    """What is saved of `prepared`, without its arguments."""
    config, origin = prepared.asked, prepared.origin
    gates = channel_gates(prepared)
    return Blueprint(
        name="",
        groups=config.groups,
        round_to=config.round_to,
        layers=tuple(kind.__name__ for kind in config.layers),
        rules=named_rules(config.rules),
        frozen=tuple(sorted(prepared.frozen)),
        opaque=tuple(sorted(origin.opaque)),
        gate_first=origin.gate_first,
        dtype=str(origin.dtype).removeprefix("torch."),
        arguments=None,
        notes=prepared.notes,
        graphs=listings(prepared),
        masks={name: _mask_record(layer.gate) for name, layer in gated_layers(prepared).items()},
        dead={name: _numbers((~gate.alive).nonzero().flatten()) for name, gate in gates.items()},
        compaction=None,
        samples=float(prepared.samples),
        outside=prepared.outside,
        tracing=origin.tracing,
    )


def with_arguments(part: PreparedModule | CompactModule, plain: Blueprint, name: str) -> Blueprint:
    """`plain`, of `part`, with its name and the arguments that it was traced for.

    Raises:
        SaveError: the arguments cannot be stored.
    """
    call = part.origin.call
    return replace(plain, name=name, arguments=[to_plain(call.args), to_plain(call.kwargs)])


def channel_gates(prepared: nn.Module) -> dict[str, ChannelGate]:
    """The channel gates of `prepared` by name."""
    return {name: m for name, m in prepared.named_modules() if isinstance(m, ChannelGate)}


def named_rules(rules: Mapping[Key, str]) -> dict[str, str]:
    """The rules by the names of their operators."""
    return {getattr(key, "__name__", str(key)): rule for key, rule in rules.items()}


def listings(prepared: PreparedModule) -> tuple[Listing, ...]:
    """See `Blueprint.graphs`."""
    distinct = dict.fromkeys(prepared.graphs[mode] for mode in (False, True))
    return tuple(listing(prepared, graph) for graph in distinct)


def mask_of(record: MaskRecord, filters: int, channels: int) -> Tensor:
    """The mask that `record` describes, bool `[filters, channels]`.

    Raises:
        ValueError: it describes none of that shape.
    """
    if len(record.reads) != filters or len(record.lists) > filters:
        raise ValueError(f"the mask of a layer is not one of its {filters} filters")
    rows = torch.zeros(len(record.lists) + 1, channels, dtype=torch.bool)  # the last one is for -1
    for number, own in enumerate(record.lists):
        rows[number, torch.from_numpy(checked(own, 0, channels))] = True
    return rows[torch.from_numpy(checked(record.reads, -1, len(record.lists)))]


def _mask_record(gate: FilterGate) -> MaskRecord:
    mask = gate.mask.cpu().numpy()
    group, rows = equal_rows(mask)
    read = any_along(rows, 1)
    lists = tuple(tuple(np.flatnonzero(row).tolist()) for row in rows[read])
    reads = np.where(read, np.cumsum(read) - 1, -1)[group]
    return MaskRecord(lists, tuple(reads.tolist()), _numbers(gate.assignment))


def _numbers(tensor: Tensor) -> Numbers:
    return tuple(tensor.tolist())
