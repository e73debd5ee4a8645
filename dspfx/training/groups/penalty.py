"""The regulariser of dynamic structure pruning, and its derivatives, on energies alone.

Park, Kim, Kim, Choi, Lee, "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023,
arXiv 2303.09736. For one convolution with O filters of C input channels and K taps, divided into
G groups by an assignment p `[G, O]` whose columns sum to 1:

    E[o,c] = sum_k W[o,c,k]^2                    energy
    N[g,c] = sqrt( sum_o p[g,o]^2 E[o,c] )       norm of a group's channel
    s[g]   = ( sum_o p[g,o]^(1/2) )^2            size factor: favours few, clear members
    R      = kappa * sum_g s[g] * sum_c N[g,c]
    kappa  = sqrt(A / 16384) * kh * (G / O)^1.5  A: elements of the input, kh: size of the kernel

R sees the weight only through E, so dR/dW[o,c,k] = 2 W[o,c,k] dR/dE[o,c]: no copy of the weight
for each group is ever made. All derivatives are written out, as three small matmuls each; with
F[g] = kappa s[g] and D[o,c] the change of the energies that a change of the weights brings,

    dR/dE[o,c]       = sum_g F[g] p[g,o]^2 / (2 N[g,c])
    <dR/dE, D>       = sum_gc F[g] M[g,c] / (2 N[g,c]),     M[g,c] = sum_o p[g,o]^2 D[o,c]
    dR/dp[g,o]       = F'[g,o] sum_c N[g,c] + F[g] p[g,o] sum_c E[o,c] / N[g,c]
    d<dR/dE,D>/dp[g,o] = F'[g,o] sum_c M[g,c] / (2 N[g,c])
                       + F[g] p[g,o] sum_c (D[o,c] / N[g,c] - E[o,c] M[g,c] / (2 N[g,c]^3))
    F'[g,o]          = kappa sqrt(s[g] / p[g,o])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspfx.layers.gated import GatedLayer
from dspfx.layers.weights import structural_groups

REFERENCE_INPUT = 16384  # elements of the 16 x 32 x 32 input that kappa is relative to


@dataclass(frozen=True)
class LayerPenalty:
    """The regulariser of one layer.

    Attributes:
        kappa: `sqrt(A / 16384) * kh * (G / O)^1.5`, with A the elements of the layer's input for
            one sample and kh the first size of the kernel, 1 for a linear layer.
        structural_groups: S, the `groups` of a convolution. Norms are taken within each, over
            the filters and channels that belong to it.
    """

    kappa: float
    structural_groups: int = 1

    @staticmethod
    def of(layer: GatedLayer) -> "LayerPenalty":
        """The regulariser of a gated layer."""
        groups, filters = layer.gate.logits.shape
        scale = (layer.gate.input_elements / REFERENCE_INPUT) ** 0.5
        kernel = getattr(layer, "kernel_size", (1,))[0]
        kappa = scale * kernel * (groups / filters) ** 1.5
        return LayerPenalty(kappa, structural_groups(layer))

    def __call__(self, energies: Tensor, assignment: Tensor) -> Tensor:
        """R, a scalar, of energies `[O, C]` (C for each structural group) and p `[G, O]`.

        It is zero, its derivatives too, where N^2 is below the root of `tiny`: there lies the kink
        of the root, and below it 1 / N^2 of the second order overflows.
        """
        squares = self._by_group(self._shares(assignment), energies)
        norms = squares * _inverse_root(squares)
        return (self._factors(assignment) * norms.sum((0, 2))).sum()

    def slope(self, energies: Tensor, assignment: Tensor) -> Tensor:
        """`[O, C]`, dR/dE; twice the weight times this is dR/dW."""
        shares = self._shares(assignment)
        inverse = _inverse_root(self._by_group(shares, energies))
        weighted = inverse * (self._factors(assignment) / 2)[:, None]
        return (shares.transpose(1, 2) @ weighted).reshape(energies.shape)

    def assignment_gradient(
        self, assignment: Tensor, before: Tensor, after: Tensor, step: Tensor
    ) -> Tensor:
        """`[G, O]`: dR/dp(W3, p) + (d2R/dp dW)(W1, p) . delta.

        The second term is the derivative by p of `<dR/dE(E1, p), D>`, since
        `<dR/dW, delta> = sum_ock 2 W1 dR/dE delta`.

        Args:
            assignment: p `[G, O]`, all entries positive.
            before: E1 `[O, C]`, the energy of W1.
            after: E3 `[O, C]`, the energy of W3.
            step: D `[O, C]`, `sum_k 2 W1[o,c,k] delta[o,c,k]`.
        """
        shares = self._shares(assignment)
        squares = self._by_group(shares, after)
        inverse_before = _inverse_root(self._by_group(shares, before))  # [S, G, C]
        inverse_after = _inverse_root(squares)
        change = self._by_group(shares, step) * inverse_before / 2  # M / 2N
        curvature = change * inverse_before.square()
        members = (
            self._by_filter(inverse_after, after)
            + self._by_filter(inverse_before, step)
            - self._by_filter(curvature, before)
        )
        sums = (squares * inverse_after + change).sum((0, 2))[:, None]
        roots = assignment.sqrt()
        sizes = roots.sum(1, keepdim=True)
        return self.kappa * (sizes / roots * sums + sizes.square() * assignment * members)

    def _shares(self, assignment: Tensor) -> Tensor:
        """`[S, G, O/S]`, p^2."""
        groups = len(assignment)
        return assignment.square().reshape(groups, self.structural_groups, -1).transpose(0, 1)

    def _factors(self, assignment: Tensor) -> Tensor:
        """`[G]`, F."""
        return self.kappa * assignment.sqrt().sum(1).square()

    def _by_group(self, shares: Tensor, matrix: Tensor) -> Tensor:
        """`[S, G, C]`: `sum_o p[g,o]^2 matrix[o,c]`, over the filters of a structural group."""
        return shares @ matrix.reshape(self.structural_groups, -1, matrix.shape[1])

    def _by_filter(self, factors: Tensor, matrix: Tensor) -> Tensor:
        """`[G, O]`: `sum_c factors[g,c] matrix[o,c]`, factors being `[S, G, C]`."""
        by_structure = matrix.reshape(self.structural_groups, -1, matrix.shape[1])
        products = factors @ by_structure.transpose(1, 2)  # [S, G, O/S]
        return products.transpose(0, 1).reshape(factors.shape[1], -1)


def _inverse_root(squares: Tensor) -> Tensor:
    """1 / N of N^2; zero where N^2 is below the root of `tiny`."""
    return torch.where(squares > torch.finfo(squares.dtype).tiny ** 0.5, squares.rsqrt(), 0.0)
