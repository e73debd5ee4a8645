"""A graph over its modules whose code is written when it is first called, as most are not."""

from typing import Any

from torch import fx


class UnwrittenModule(fx.GraphModule):
    """A `GraphModule` for what reads or interprets its graph; called, it runs code as others do."""

    def recompile(self) -> Any:
        """Nothing as yet."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Write the code, which takes the place of this, and run it."""
        super().recompile()
        return self.forward(*args, **kwargs)
