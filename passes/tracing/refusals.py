"""Refusals of the tracer: the reason, and the module whose code is to stay untraced."""

from dspfx.passes.tracing.aliases import StaleValueError


class UntraceableError(Exception):
    """Tracing failed in `module` (empty: in the root), after `node`, for `reason`."""

    def __init__(self, module: str, node: str, reason: str) -> None:
        super().__init__(reason)
        self.module, self.node, self.reason = module, node, reason


def blamed(error: Exception, module: str | None) -> str | None:
    """Whose code is to be left untraced: of what overwrote a stale value, else of `module`."""
    return error.module if isinstance(error, StaleValueError) else module
