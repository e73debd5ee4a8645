"""`PrepareConfig`: what a user may ask of `prepare`, and the modules that its patterns name."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import get_args

from torch import nn

from dspfx.errors import PrepareError
from dspfx.layers.gated import GATED
from dspfx.layers.parametrised import kind_of
from dspfx.passes.analysis.operators import Key, Rule

Pattern = str | type[nn.Module]


@dataclass(frozen=True)
class PrepareConfig:
    """How a model is prepared.

    Attributes:
        groups: G, into how many groups the filters of a layer may be divided.
        ignore: layers to leave alone, with all their filters and inputs: names, patterns such as
            `"*.downsample.*"`, or module types.
        layers: the types of layers that get gates. Those of other types still lose the channels
            that die around them.
        round_to: n; `prune` keeps the filters of a layer and the inputs of a group to multiples of
            n, where the layer has that many.
        rules: teaches the analysis what an operator does to channels. Keys are functions as they
            stand in the graph, names of tensor methods, or module types, which are then not traced
            into. Values are `"elementwise"` (channel j of the result is made of channel j of the
            operands, position by position), `"channelwise"` (likewise, along dimension 1, and
            positions may mix), `"movement"` (elements are moved, never computed) or `"opaque"`
            (no assumption). `convert` proves the result equal in any case.
        opaque: modules not to be traced into: names, patterns or types. They are given all their
            channels.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> config = dspfx.PrepareConfig(groups=2, ignore=("2",))
        >>> list(dspfx.get_masks(dspfx.prepare(model, x, config=config)))
        ['1']
    """

    groups: int = 4
    ignore: tuple[Pattern, ...] = ()
    layers: tuple[type[nn.Module], ...] = tuple(GATED)
    round_to: int = 1
    rules: Mapping[Key, Rule] = field(default_factory=dict)
    opaque: tuple[Pattern, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ignore", "layers", "opaque"):
            given = getattr(self, name)
            if isinstance(given, str | type) or not isinstance(given, Iterable):
                raise PrepareError(f"{name} takes several: {name}=({_word(given)},)")
            object.__setattr__(self, name, tuple(given))
        whole = all(isinstance(n, Integral) for n in (self.groups, self.round_to))
        if not whole or self.groups < 1 or self.round_to < 1:
            raise PrepareError(
                "groups and round_to must be whole numbers of at least 1, got "
                f"{self.groups!r} and {self.round_to!r}"
            )
        for kind in self.layers:
            if kind not in GATED:
                names = ", ".join(k.__name__ for k in GATED)
                raise PrepareError(f"layers={kind!r} cannot be gated; those that can are {names}")
        for key, rule in self.rules.items():
            if rule not in get_args(Rule):
                known = ", ".join(get_args(Rule))
                raise PrepareError(f"the rule for {key!r} is {rule!r}; it must be one of {known}")


def _word(pattern: Pattern) -> str:
    """`pattern` as it stands in code."""
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", str(pattern))


def matching(root: nn.Module, patterns: Iterable[Pattern], option: str) -> frozenset[str]:
    """The names of the modules of `root` that `patterns` name, and of all that is inside them.

    Raises:
        PrepareError: a pattern matches nothing; the message names the `option` it came from.
    """
    names = {name: module for name, module in root.named_modules(remove_duplicate=False) if name}
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name, module in names.items() if _matches(name, module, pattern)}
        if not matches:
            raise PrepareError(
                f"{option}={pattern!r} matches no module; names look like "
                f"{', '.join(list(names)[:5])}"
            )
        found |= {n for n in names for m in matches if n == m or n.startswith(f"{m}.")}
    return frozenset(found)


def _matches(name: str, module: nn.Module, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    return kind_of(module) is pattern
