"""Which children of a model become parts of it: the largest that can be without changing the rest.

1. Of the children that are called, the largest that can be prepared are; inside of the others, and
   of those that hide more of their layers than they show, the largest of theirs.
2. All of them are exchanged, and the model is compared with what it was (`whole`). Where it
   differs, halves of them are tried, down to single ones: those that make a difference stay as they
   were, and parts are looked for inside them.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from dspfx.errors import PrepareError, TraceError
from dspfx.layers.gated import gated_layers
from dspfx.model.calls import Calls, has_weight
from dspfx.model.module import PreparedModule
from dspfx.model.single import enclosed
from dspfx.model.whole import Whole
from dspfx.passes.sandbox.calls import Call
from dspfx.passes.tracing.trace import copy_model
from dspfx.utils.pytree import leaves

Prepare = Callable[[nn.Module, str, Call], PreparedModule]


class Division:
    """The parts of `root`.

    Attributes:
        parts: the prepared modules that stand in `root`, by their names.
        refused: why children that could be prepared were left as they are, by their names.
    """

    def __init__(self, root: nn.Module, calls: Calls, prepare_one: Prepare, whole: Whole) -> None:
        """Exchange what can be exchanged in `root`, a private copy.

        Args:
            prepare_one: prepares the child of a name for its arguments; leaves the child as it is.
            whole: of `root`.

        Raises:
            PrepareError: two runs of `root` itself differ.
        """
        self.root, self.calls, self.prepare_one, self.whole = root, calls, prepare_one, whole
        self.parts: dict[str, PreparedModule] = {}
        self.refused: dict[str, str] = {}
        self._tried: set[int] = set()
        self._repeatable = False
        found = self._inside(root, "")
        while found:
            left = self._exchange(list(found.items()))
            found = {}
            for name in left:
                found |= self._inside(root.get_submodule(name), f"{name}.")

    def _inside(self, module: nn.Module, prefix: str) -> dict[str, PreparedModule]:
        """The largest modules inside `module` that can be prepared, prepared, by their names."""
        found: dict[str, PreparedModule] = {}
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if id(child) in self._tried:
                continue
            self._tried.add(id(child))
            part = self._try(child, path)
            inside = {}
            if part is None or hides_most(part):
                inside = self._inside(child, f"{path}.")
            if part is not None and gated_in(part) >= sum(map(gated_in, inside.values())):
                inside = {path: part}
            found |= inside
        return found

    def _try(self, child: nn.Module, name: str) -> PreparedModule | None:
        """The child, prepared; None if it was not called, has no layer, or cannot be."""
        call = self.calls.first.get(id(child))
        if call is None or not any(p.dim() > 1 for p in child.parameters()):
            return None
        if not any(isinstance(x, Tensor) for x in leaves((call.args, call.kwargs))):
            return None  # it reads nothing that could be pruned
        if id(child) in self.calls.entered:
            inner = self.calls.entered[id(child)]
            self.refused[name] = f"'{inner}' inside it is called by code outside"
            return None
        if id(child) in self.calls.borrows:
            outer = self.calls.borrows[id(child)]
            self.refused[name] = f"it is given or calls '{outer}', which is outside of it"
            return None
        try:
            return self.prepare_one(child, name, call)
        except (TraceError, PrepareError):
            return None

    def _exchange(self, found: list[tuple[str, PreparedModule]]) -> list[str]:
        """Exchange those of `found` that change nothing; the names of the others."""
        originals = {name: self.root.get_submodule(name) for name, _ in found}
        for name, part in found:
            exchange(self.root, originals[name], part)
        different = self.whole.difference(self.root, [*self.parts.values(), *dict(found).values()])
        if different is None:
            self.parts |= dict(found)
            return []
        for name, part in found:
            exchange(self.root, part, originals[name])
        self._check_repeatable()
        if len(found) == 1:
            self.refused[found[0][0]] = f"the model around it would differ: {different}"
            return [found[0][0]]
        half = len(found) // 2
        return self._exchange(found[:half]) + self._exchange(found[half:])

    def _check_repeatable(self) -> None:
        if self._repeatable:
            return
        self._repeatable = True
        different = self.whole.difference(self.root, ())
        if different is not None:
            raise PrepareError(
                f"{type(self.root).__name__} cannot be prepared in parts, since two runs of it "
                f"with the same inputs differ: {different}; draw random numbers with torch, or "
                "move what it remembers out of 'forward'"
            )


def hides_most(part: PreparedModule) -> bool:
    """Whether the modules that `part` calls untraced have more weights than its gated layers."""
    return _weights(part.get_submodule(name) for name in part.untraced) > gated_in(part)


def gated_in(module: nn.Module) -> int:
    """The elements of the gated layers of `module`."""
    return _weights(gated_layers(module).values())


def _weights(modules: Iterable[nn.Module]) -> int:
    layers = {layer for module in modules for layer in module.modules() if has_weight(layer)}
    return sum(p.numel() for layer in layers for p in layer.parameters())


def copied(child: nn.Module, root: nn.Module) -> nn.Module:
    """A copy of `child` that shares its tensors, and whatever is not inside it, with `root`.

    A layer is in a module of its own.
    """
    inside = set(child.modules())
    outside = [module for module in root.modules() if module not in inside]
    shared = [*root.parameters(), *root.buffers(), *outside]
    return enclosed(copy_model(child, {id(x): x for x in shared}))


def exchange(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `root` has `old`."""
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
