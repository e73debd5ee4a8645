"""Small models that learn groups, and how."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import GatedLayer, gated_layers

X = torch.randn(6, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(1))


SETTINGS = {"strength": 0.3, "total_steps": 7, "temperature": 0.5, "logits_lr": 0.1}
LR = 0.5


def tiny() -> dspfx.PreparedModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()
    prepared = dspfx.prepare(model, X, config=dspfx.PrepareConfig(groups=2)).train()
    gate(prepared).logits.normal_(generator=torch.Generator().manual_seed(2))
    return prepared


def conv(prepared: dspfx.PreparedModule) -> GatedLayer:
    return gated_layers(prepared)["2"]


def gate(prepared: dspfx.PreparedModule) -> Any:
    return conv(prepared).gate


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner_of(
    prepared: dspfx.PreparedModule,
    make: Callable[[Any], torch.optim.Optimizer],
    **changes: Any,
) -> dspfx.GroupLearner:
    settings = {**SETTINGS, **changes}
    return dspfx.GroupLearner(
        prepared, make(prepared.parameters()), generator=generator(5), **settings
    )


def loss(prepared: nn.Module) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(prepared(X), Y)


def assert_same_state(mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Equal states bit for bit, in entries and values, and equal groups."""
    a, b = mine.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in b["state"].items():
        assert a["state"][key].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(a["state"][key][name]), torch.as_tensor(value))
