"""From the code of a graph, as pickle keeps it, back to the graph."""

from typing import Any

from torch import fx

from dspfx.passes.tracing.patches import factories_traced


class Retracer(fx.Tracer):
    """How pickle reads a graph back: buffers are what they were, not constants."""

    proxy_buffer_attributes = True

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """The graph of code that fx has written, whose every call is a node again."""

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            return self.create_proxy("call_function", function, args, kwargs)

        with factories_traced(call, recording=lambda: True):
            return super().trace(*args, **kwargs)
