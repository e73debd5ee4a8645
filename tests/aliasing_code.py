"""Random code that overwrites tensors under other names, drawn by hypothesis.

A snippet is a list of steps over named values; each step makes a view, a new value or writes in
place, and the last returns some of them, nested.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

X = torch.randn(2, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda t: t,
    "half": lambda t: t[:, : max(t.shape[1] // 2, 1)],
    "rest": lambda t: t[:, 1:],
    "corner": lambda t: t[:, :, :3, 1:],
    "chunk": lambda t: t.chunk(2, 1)[0],
    "last chunk": lambda t: t.chunk(2, 1)[-1],
    "unbound": lambda t: t.unbind(2)[1].unsqueeze(2),
    "permuted": lambda t: t.permute(0, 1, 3, 2),
    "reshaped": lambda t: t.reshape(t.shape),
    "flat": lambda t: t.flatten(2).unsqueeze(3),
    "expanded": lambda t: t[:, :1].expand(-1, 2, -1, -1),
    "detached": lambda t: t.detach(),
    "contiguous": lambda t: t.contiguous(),
    "identity": lambda t: nn.Identity.forward(nn.Identity(), t),
    "no dropout": lambda t: F.dropout(t, 0.5, False),
    "narrow": lambda t: t.narrow(1, 0, 1),
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda t: t.clone(),
    "double": lambda t: t * 2,
    "relu": lambda t: t.relu(),
    "cat": lambda t: torch.cat([t, t], 1),
}


def _augmented(t: Tensor) -> None:
    t += 0.5


def _scaled(t: Tensor) -> None:
    t *= 1.5


def _untracked(t: Tensor) -> None:
    t.data.add_(1)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "sigmoid_": lambda t: t.sigmoid_(),
    "mul_": lambda t: t.mul_(2),
    "relu": lambda t: F.relu(t, inplace=True),
    "by keyword": lambda t: F.leaky_relu(input=t, negative_slope=0.1, inplace=True),
    "+=": _augmented,
    "*=": _scaled,
    "fill": lambda t: t[:, :1].fill_(0.25),
    "copy_": lambda t: t.copy_(t.flip(3)),
    "untracked": _untracked,
}


@dataclass(frozen=True)
class Writes:
    """A snippet: steps are (kind, name, which value), `returned` says which values, how nested."""

    steps: tuple[tuple[str, str, int], ...]
    returned: tuple[tuple[int, ...], str]

    def __call__(self, value: Tensor) -> Any:
        values = [value]
        for kind, name, which in self.steps:
            read = values[which % len(values)]
            if kind == "write":
                WRITES[name](read)
            else:
                values.append((VIEWS if kind == "view" else COPIES)[name](read))
        which, nesting = self.returned
        chosen = [values[i % len(values)] for i in which]
        match nesting:
            case "one":
                return chosen[0]
            case "dict":
                return {"a": chosen, "b": {"c": (chosen[-1], 1)}}
            case "sum":
                return sum(t.mean((1, 2, 3)) for t in chosen)
        return tuple(chosen)


@st.composite
def snippets(draw: st.DrawFn) -> Writes:
    """At most six steps, with at least one write."""
    names = {"view": tuple(VIEWS), "copy": tuple(COPIES), "write": tuple(WRITES)}

    def step(kinds: tuple[str, ...]) -> tuple[str, str, int]:
        kind = draw(st.sampled_from(kinds))
        return kind, draw(st.sampled_from(names[kind])), draw(st.integers(0, 5))

    before = [step(("view", "view", "copy", "write")) for _ in range(draw(st.integers(0, 3)))]
    after = [step(("view", "copy", "write")) for _ in range(draw(st.integers(0, 2)))]
    which = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    nesting = draw(st.sampled_from(["one", "tuple", "dict", "sum"]))
    return Writes((*before, step(("write",)), *after), (tuple(which), nesting))


def tensors(value: Any) -> list[Tensor]:
    """Those in a nested value."""
    if isinstance(value, Tensor):
        return [value]
    items: Any = value.values() if isinstance(value, dict) else value
    return [t for item in items for t in tensors(item)] if isinstance(items, Iterable) else []


class Runs(nn.Module):
    """Convolutions with a snippet somewhere."""

    def __init__(self, code: Writes) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
        self.code = code

    @staticmethod
    def anywhere() -> st.SearchStrategy[Callable[[Writes], nn.Module]]:
        """One of the places."""
        return st.sampled_from([AtTheEnd, AtTheStart, Between, InAModule, ModuleAtTheEnd])

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class AtTheEnd(Runs):
    def forward(self, x: Tensor) -> Any:
        return self.code(self.body(x))


class AtTheStart(Runs):
    def forward(self, x: Tensor) -> Any:
        made = tensors(self.code(x))
        return self.body(x), sum(t.mean() for t in made)


class Between(Runs):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        made = tensors(self.code(y))
        return self.c(self.b(y).relu()) + made[0].mean()


class Step(nn.Module):
    def __init__(self, code: Writes) -> None:
        super().__init__()
        self.code = code

    def forward(self, y: Tensor) -> Any:
        return self.code(y)


class InAModule(Runs):
    def __init__(self, code: Writes) -> None:
        super().__init__(code)
        self.step = Step(code)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x).relu())
        z = y[:, :4]
        made = self.step(y)
        return self.c(y.relu()), z, made


class ModuleAtTheEnd(InAModule):
    def forward(self, x: Tensor) -> Any:
        return self.step(self.body(x))
