"""Ridge regression of what a layer misses on its inputs, by float64 sums over many batches.

For a structural group with the columns x of `taps.py` and the residual r, what the output of
a filter lacks, the change of its weight and bias is

    min over d, b of  mean |r - d x - b|^2 + lambda |d|^2,
    d = cov(r, x) (cov(x, x) + lambda I)^-1,   b = mean(r) - d mean(x),

lambda being `ridge` times the mean of the diagonal of `cov(x, x)`. With `d = 0` and `b = 0` the
objective is what the layer misses now, so that no fit makes the mean square larger. It is shrunk
towards the weights that the layer has; where the inputs show nothing, these stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspfx.errors import DataError
from dspfx.layers.weights import filters_first, structural_groups
from dspfx.training.repair.taps import columns
from dspfx.utils.distributed import Processes

VARIES = 1e-12  # a smaller share of the mean square than this is rounding, no variance


@dataclass(frozen=True)
class Fit:
    """What solves the equations of a layer.

    Attributes:
        weight: float64 `[O, C/S, *taps]`, to be added to that of the layer; C are those that were
            asked for.
        bias: float64 `[O]`, to be added; zero without an intercept.
        before, after: the mean square of the residual, summed over the filters that were fitted.
        whole: the variance of what these are to give, summed.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float
    whole: float


class NormalEquations:
    """The sums that a layer of O filters, in S structural groups, is fitted by.

    Args:
        name, layer: the layer.
        mask: bool `[O, C/S]`, the inputs that filters are fitted to.
        channels: int, the input channels that `mask` is of, if S is 1; all by default.
        intercept: whether there is a bias to fit.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        mask: Tensor,
        channels: Tensor | None,
        intercept: bool,
    ) -> None:
        self.name, self.layer, self.mask = name, layer, mask
        self.channels, self.intercept = channels, intercept
        groups, (filters, width) = structural_groups(layer), mask.shape
        self.taps = filters_first(layer).shape[2:]
        n, m = width * self.taps.numel(), filters // groups
        zeros = mask.new_zeros((), dtype=torch.float64)
        self.count = zeros.clone()
        self.xx, self.xr = zeros.repeat(groups, n, n), zeros.repeat(groups, n, m)
        self.x, self.r = zeros.repeat(groups, n), zeros.repeat(groups, m)
        self.rr, self.y, self.yy = (zeros.repeat(filters) for _ in range(3))

    def see(self, x: Tensor, wanted: Tensor, given: Tensor) -> None:
        """Take an input into account, the output that is wanted, and the one that is given.

        Raises:
            DataError: they are not of one shape.
        """
        if wanted.shape != given.shape:
            raise DataError(
                f"{self.name} gives {tuple(given.shape)}, and {tuple(wanted.shape)} without masks: "
                "how much it reads depends on values, which cannot be compared"
            )
        wanted = wanted.double()
        residual = wanted - given.double()
        positions = [d for d in range(wanted.dim()) if d != wanted.dim() - 1 - len(self.taps)]
        self.count += wanted.numel() // len(self.y)
        self.y += wanted.sum(positions)
        self.yy += wanted.square().sum(positions)
        self.rr += residual.square().sum(positions)
        for cols, part in columns(self.layer, x, residual, self.channels):
            self.xx += cols @ cols.mT
            self.xr += cols @ part.mT
            self.x += cols.sum(2)
            self.r += part.sum(2)

    def gather(self, processes: Processes) -> None:
        """Replace the sums by those of all processes."""
        for name in ("count", "xx", "xr", "x", "r", "rr", "y", "yy"):
            setattr(self, name, processes.sum(getattr(self, name)))

    def solve(self, ridge: float) -> Fit:
        """The change of weight and bias.

        Raises:
            DataError: a sum is not finite.
        """
        if not all(bool(t.isfinite().all()) for t in (self.xx, self.xr, self.rr, self.yy)):
            raise DataError(
                f"the batches lead to values that are not finite at {self.name}; look for bad ones"
            )
        mean = self.x / self.count, self.r / self.count
        xx, xr = self.xx / self.count, self.xr / self.count
        square = xx.diagonal(dim1=1, dim2=2)
        if self.intercept:
            xx = xx - mean[0][:, :, None] * mean[0][:, None, :]
            xr = xr - mean[0][:, :, None] * mean[1][:, None, :]
        varies = xx.diagonal(dim1=1, dim2=2) > VARIES * square
        rows = self.mask.repeat_interleave(self.taps.numel(), 1)
        weight = torch.zeros_like(rows, dtype=torch.float64)
        fitted = torch.zeros_like(rows[:, 0])
        gain = 0.0
        for group, own in enumerate(torch.arange(len(rows), device=rows.device).chunk(len(xx))):
            lists, which = torch.unique(rows[own], dim=0, return_inverse=True)
            for number, row in enumerate(lists):
                read = (row & varies[group]).nonzero()[:, 0]
                filters = (which == number).nonzero()[:, 0]
                if not len(read):
                    continue
                matrix, right = xx[group][read][:, read], xr[group][read][:, filters]
                found = _ridge(matrix, right, ridge)
                weight[own[filters][:, None], read] = found.T
                fitted[own[filters]] = True
                gain += float((2 * found * right - found * (matrix @ found)).sum())
        bias = torch.zeros_like(self.y)
        if self.intercept:
            by_group = weight.reshape(len(xx), -1, rows.shape[1])
            shift = mean[1] - (by_group @ mean[0][:, :, None])[..., 0]
            bias = torch.where(fitted, shift.reshape(-1), 0.0)
            gain += float(torch.where(fitted, mean[1].reshape(-1), 0.0).square().sum())
        before = float(self.rr[fitted].sum() / self.count)
        variance = self.yy / self.count - (self.y / self.count).square()
        whole = float(variance[fitted].clamp(min=0).sum())
        change = weight.reshape(*self.mask.shape, *self.taps)
        return Fit(change, bias, before, max(before - gain, 0.0), whole)


def _ridge(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """The solution of `(matrix + lambda I) d = right`, the smallest one if there are several."""
    matrix = matrix.clone()
    matrix.diagonal().add_(ridge * matrix.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if ridge and not failed:
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(matrix, rtol=VARIES, hermitian=True)
    return inverse @ right
