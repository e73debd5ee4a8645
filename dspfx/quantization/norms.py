"""Batch norms for a network that trains with rounding, which `convert` has folded away.

Without any, a deep network diverges at rates at which it was trained. So a convolution gets one
again, that changes nothing at first: it scales by the deviation, and shifts by the mean, that the
batches of the calibration lead to. The weight is rounded as it will be once the norm is folded
(Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018, arXiv
1806.08342, 3.2.2): with `s = gamma / sqrt(var + eps)`, it is `norm(conv(x, round(W s)) / s)`. The
convolution's bias is that of the norm.

Convolutions without a bias, which never had a norm, and those that make the results of the model
get none.
"""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.passes.analysis import operators
from dspfx.quantization.kinds import CONVOLUTIONS, LAYERS

EPS, MOMENTUM = 1e-5, 0.1


class FollowingNorm(nn.Module):
    """A batch norm; while it is `watching` it only adds the bias, and takes moments of its input.

    Args:
        weight: of the convolution before it, `[O, ...]`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        ones = torch.ones_like(weight[:, :1]).detach().flatten(1)[:, 0].clone()
        self.weight = nn.Parameter(ones)
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros_like(ones))
        self.register_buffer("running_var", ones - EPS)
        self.eps = EPS
        self.watching = True
        self._seen = 0

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x`, `[N, O, ...]`, normed, and shifted by `bias`, `[O]`."""
        if self.watching:
            self._watch(x.detach())
            return x + bias.reshape(-1, *[1] * (x.dim() - 2))
        batch = self.training and x.numel() > len(bias)
        own = self.running_mean, self.running_var, self.weight, bias
        return F.batch_norm(x, *own, batch, MOMENTUM, self.eps)

    def _watch(self, x: Tensor) -> None:
        """Average the moments, and keep `s` at 1."""
        dims = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x, dims, correction=0)
        self._seen += 1
        with torch.no_grad():
            self.running_var.lerp_(variance, 1 / self._seen)
            self.running_mean.lerp_(mean, 1 / self._seen)
            self.weight.copy_((self.running_var + self.eps).sqrt())


def add_norms(root: fx.GraphModule, convolutions: Iterable[str]) -> None:
    """Put a norm after the nodes `convolutions` of a graph with observers of its weights."""
    nodes = {node.name: node for node in root.graph.nodes}
    for name in convolutions:
        conv = nodes[name]
        if _may_be_normed(conv):
            _add(root, conv)
    root.graph.lint()
    root.recompile()


def norms_of(root: fx.GraphModule) -> list[tuple[Node, FollowingNorm]]:
    """The nodes that call such norms, and these."""
    calls = root.graph.find_nodes(op="call_module")
    called = ((node, root.get_submodule(str(node.target))) for node in calls)
    return [(node, norm) for node, norm in called if isinstance(norm, FollowingNorm)]


@torch.no_grad()
def begin_norms(root: fx.GraphModule) -> None:
    """Let all of them norm from now on; as yet, it is as if there were none."""
    for node, norm in norms_of(root):
        _, bias = node.all_input_nodes
        attrgetter(str(bias.target))(root).add_(norm.running_mean)
        norm.watching = False


@torch.no_grad()
def fold_norms(root: fx.GraphModule) -> None:
    """Fold all of them into the convolutions before them, as in evaluation mode."""
    for node, norm in norms_of(root):
        quotient, bias = node.all_input_nodes
        conv = quotient.all_input_nodes[0]
        product = _read_by(conv, "weight")
        weight = product.all_input_nodes[0]
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        tensor = attrgetter(str(weight.target))(root)
        tensor.mul_(scale.reshape(-1, *[1] * (tensor.dim() - 1)))
        attrgetter(str(bias.target))(root).sub_(norm.running_mean * scale)
        product.replace_all_uses_with(weight)
        _set_bias(conv, bias)
        node.replace_all_uses_with(conv)
        root.graph.erase_node(node)
    operators.remove_dead_code(root.graph)
    root.graph.lint()
    root.delete_all_unused_submodules()
    root.recompile()


def _add(root: fx.GraphModule, conv: Node) -> None:
    graph, weight, bias = root.graph, _read_by(conv, "weight"), _read_by(conv, "bias")
    tensor, name = attrgetter(str(weight.target))(root), f"{conv.name}_norm"
    root.add_submodule(name, FollowingNorm(tensor))
    (observer,) = weight.users
    ones = [1] * (tensor.dim() - 2)
    with graph.inserting_before(observer):
        gamma, variance = (graph.get_attr(f"{name}.{n}") for n in ("weight", "running_var"))
        deviation = graph.call_function(torch.add, (variance, EPS))
        s = graph.call_function(torch.mul, (gamma, graph.call_function(torch.rsqrt, (deviation,))))
        along, across = (
            graph.call_function(torch.reshape, (s, (*dims, *ones))) for dims in ((-1, 1), (1, -1))
        )
        product = graph.call_function(torch.mul, (weight, along))
    observer.replace_input_with(weight, product)
    _set_bias(conv, None)
    with graph.inserting_after(conv):
        quotient = graph.call_function(torch.div, (conv, across))
    with graph.inserting_after(quotient):
        normed = graph.call_module(name, (quotient, bias))
    conv.replace_all_uses_with(normed, lambda user: user is not quotient)


def _read_by(conv: Node, name: str) -> Node:
    """What `conv` reads as its weight or bias, before that is rounded."""
    place = {"weight": 1, "bias": 2}[name]
    node: Any = conv.args[place] if len(conv.args) > place else conv.kwargs[name]
    while node.target is torch.positive or node.op == "call_module":
        (node,) = node.all_input_nodes
    found: Node = node
    return found


def _may_be_normed(conv: Node) -> bool:
    """Whether it has a bias, nobody else reads that or its weight, and it makes no result."""
    bias: Any = conv.args[2] if len(conv.args) > 2 else conv.kwargs.get("bias")
    if conv.target not in CONVOLUTIONS or bias is None or _makes_results(conv):
        return False
    weight: Any = conv.args[1] if len(conv.args) > 1 else conv.kwargs["weight"]
    read = [bias, weight]
    while read[-1].op != "get_attr":
        read += read[-1].all_input_nodes
    return all(len(node.users) == 1 for node in read)


def _set_bias(conv: Node, bias: Node | None) -> None:
    args = (*conv.args[:2], bias, *conv.args[3:])
    if len(conv.args) > 1:
        conv.args = args
        conv.kwargs = {name: value for name, value in conv.kwargs.items() if name != "bias"}
    else:
        conv.kwargs = {**conv.kwargs, "bias": bias}


def _makes_results(conv: Node) -> bool:
    """Whether what it writes is returned, without a layer in between."""
    reached, open_nodes = set[Node](), [conv]
    while open_nodes:
        for user in open_nodes.pop().users:
            if user.op == "output":
                return True
            if user not in reached and user.target not in LAYERS:
                reached.add(user)
                open_nodes.append(user)
    return False
