"""Count multiply-accumulates while code runs, by dispatch, with the formulas that torch uses.

1. Matrix products, convolutions and attention are counted by `torch.utils.flop_counter`'s formulas.
2. What torch has no formula for, since it is fused, is counted here: recurrent layers, encoder
   layers of transformers, and attention on the CPU.
3. Operators composed of these are decomposed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dspfx.passes.sandbox.dispatch import Dispatch


class Products(Dispatch):
    """Counts multiply-accumulates while it is entered.

    Attributes:
        macs: multiply-accumulates so far, of all samples.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # noqa: PLC0415 (it takes long)

        self.known: Mapping[Any, Callable[..., int]] = flop_registry
        self.macs = 0

    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = getattr(func, "_overloadpacket", None)
        known = packet in _FUSED or packet in self.known
        if not known and hasattr(func, "decompose"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet in _FUSED:
            self.macs += _FUSED[packet](*args)
        elif packet in self.known:
            self.macs += int(self.known[packet](*args, **kwargs, out_val=result)) // 2
        return result


def _recurrent_direction(x: Tensor, of_input: Tensor, of_state: Tensor, *_: Any) -> int:
    """`aten::mkldnn_rnn_layer`: one direction of one layer, whose weights see every position."""
    return x.shape[:-1].numel() * (of_input.numel() + of_state.numel())


def _recurrent(x: Tensor, weights: list[Tensor], *_: Any) -> int:
    """`aten::_cudnn_rnn`: all layers and directions."""
    positions = x.shape[:-1].numel()
    return positions * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Scores of all keys for all queries, and sums of values by them."""
    scores = query.shape[:-1].numel() * key.shape[-2]
    return scores * (query.shape[-1] + value.shape[-1])


def _self_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *weights: Any
) -> int:
    """`aten::_native_multi_head_attention`: projections of `[N, T, E]`, attention, projection."""
    into, _, out = weights[:3]
    own: int = into.numel() + out.numel() + 2 * key.shape[1] * width
    return query.shape[:2].numel() * own


def _encoder_layer(x: Tensor, width: int, heads: int, *rest: Any) -> int:
    """`aten::_transformer_encoder_layer_fwd`: self-attention, and two linear layers."""
    into, _, out = rest[:3]
    first, second = rest[11], rest[13]
    if x.is_nested:
        positions, scores = x.numel() // width, sum(len(own) ** 2 for own in x.unbind())
    else:
        positions, scores = x.shape[:2].numel(), len(x) * x.shape[1] ** 2
    own: int = into.numel() + out.numel() + first.numel() + second.numel()
    return positions * own + 2 * scores * width


_aten = torch.ops.aten
_FUSED: dict[Any, Callable[..., int]] = {
    _aten.mkldnn_rnn_layer: _recurrent_direction,
    _aten._cudnn_rnn: _recurrent,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention,
    _aten._native_multi_head_attention: _self_attention,
    _aten._transformer_encoder_layer_fwd: _encoder_layer,
}
