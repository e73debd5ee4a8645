"""What decides what is pruned first: energies, moments, or what users say of their own model."""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.errors import BudgetError, DataError
from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.pruning.energy import check_moments, energies_of
from dspfx.utils.arrays import BoolArray, FloatArray
from dspfx.utils.wrappers import unwrapped

LeastKept = float | Mapping[str, float]
LEAST_SCORE = 1e-12  # of the largest
LOWER_CAPS = ", or let layers keep less than keep_at_least says"


@dataclass(frozen=True)
class Criteria:
    """How important the channels of a model are, and what its layers keep at least.

    Attributes:
        moments: from `input_moments`; None for none.
        scores: by the name of a layer, `[O, C/S]` or `[O]`.
        least: by the name of a gated layer, the share that it keeps.
    """

    moments: Mapping[str, Tensor] | None
    scores: Mapping[str, Tensor]
    least: Mapping[str, float]

    @staticmethod
    def of(
        prepared: nn.Module,
        moments: Mapping[str, Tensor] | None,
        scores: Mapping[str, Tensor] | None,
        keep_at_least: LeastKept,
    ) -> "Criteria":
        """The criteria that follow from what the user gave for `prepared`.

        Raises:
            DataError: moments or scores are not of this model.
            BudgetError: `keep_at_least` holds no fractions, or a pattern that matches no layer.
        """
        check_moments(moments, prepared)
        layers = gated_layers(unwrapped(prepared))
        if scores is not None and not isinstance(scores, Mapping):
            raise DataError("scores must be a dict of the names of layers, as get_masks gives it")
        for name, score in (scores or {}).items():
            _check_score(name, score, layers)
        return Criteria(moments, scores or {}, _least(keep_at_least, layers))

    def energies(self, name: str, layer: nn.Module) -> FloatArray:
        """`[O, C/S]`, how much the layer `name` would miss each channel; zero where it is masked.

        Raises:
            PrepareError: the weight is not finite.
            DataError: the moments are of other channels.
        """
        if name not in self.scores:
            return energies_of(name, layer, self.moments)
        own = self.scores[name].detach().double().cpu().numpy()
        own = np.maximum(own, LEAST_SCORE * (own.max(initial=0.0) or 1.0))  # zero is not gone yet
        if own.ndim == 1:  # of filters: each spreads it like its energy
            energies = energies_of(name, layer, self.moments)
            whole = energies.sum(1, keepdims=True)
            shares = np.divide(energies, whole, out=np.zeros_like(energies), where=whole > 0)
            spread: FloatArray = shares * own[:, None]
            return spread
        assert isinstance(layer, GatedLayer)
        masked: FloatArray = np.where(layer.gate.mask.cpu().numpy(), own, 0.0)
        return masked

    def least_of(self, name: str, count: int) -> int:
        """How many of `count` the layer `name` keeps at least."""
        return math.ceil(self.least.get(name, 0.0) * count - 1e-9)


def strongest(values: FloatArray, count: int) -> BoolArray:
    """True where `values` are among the `count` largest along the last axis."""
    order = np.argsort(-values, axis=-1, kind="stable")
    found: BoolArray = np.zeros(values.shape, bool)
    np.put_along_axis(found, order[..., :count], True, -1)
    return found


def _check_score(name: str, score: object, layers: Mapping[str, GatedLayer]) -> None:
    if name not in layers:
        raise DataError(
            f"'{name}' is no gated layer; gated are {', '.join(list(layers)[:8])}"
            + (" ..." if len(layers) > 8 else "")
        )
    shape = layers[name].gate.mask.shape
    if not isinstance(score, Tensor) or score.shape not in (shape, shape[:1]):
        raise DataError(
            f"the scores of '{name}' must be a tensor of {tuple(shape)}, filters x input channels, "
            f"or of {tuple(shape[:1])}, one of each filter"
        )
    if score.is_complex() or not bool((torch.isfinite(score) & (score >= 0)).all()):
        raise DataError(f"the scores of '{name}' must be finite and not negative")


def _least(given: LeastKept, layers: Mapping[str, GatedLayer]) -> dict[str, float]:
    """The share that every gated layer keeps; of patterns that match, the largest."""
    found: dict[str, float] = {}
    for pattern, share in (given if isinstance(given, Mapping) else {"*": given}).items():
        if not isinstance(share, Real) or not 0 <= float(share) <= 1:
            raise BudgetError(f"keep_at_least takes fractions in [0, 1], got {share!r}")
        matching = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise BudgetError(
                f"keep_at_least: {pattern!r} matches no gated layer; gated are "
                f"{', '.join(list(layers)[:8])}"
            )
        for name in matching:
            found[name] = max(found.get(name, 0.0), float(share))
    return found
