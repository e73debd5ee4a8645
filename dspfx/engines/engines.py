"""The engines that there are, those that load quickly first."""

from collections.abc import Sequence

from dspfx.engines.engine import Engine
from dspfx.engines.inductor import Inductor, OwnKernel
from dspfx.engines.onnx_runtime import OnnxRuntime
from dspfx.engines.open_vino import OpenVino
from dspfx.errors import CompileError

ENGINES: tuple[Engine, ...] = (OpenVino(), OnnxRuntime(), OwnKernel(), Inductor())
OWN = OwnKernel.name
NAMES = tuple(engine.name for engine in ENGINES)


def engines_named(names: Sequence[str] | None) -> tuple[Engine, ...]:
    """Those called `names`, or all.

    Raises:
        CompileError: there is no such engine, or none is named.
    """
    if names is None:
        return ENGINES
    named = (names,) if isinstance(names, str) else tuple(names)
    if unknown := [name for name in named if name not in NAMES]:
        raise CompileError(f"there is no engine {unknown[0]!r}; there are {', '.join(NAMES)}")
    if not named:
        raise CompileError(f"engines= names none; there are {', '.join(NAMES)}")
    return tuple(engine for engine in ENGINES if engine.name in named)
