"""dspfx: dynamic structure pruning as a torch.fx compiler.

prepared = dspfx.prepare(model)      # a traced copy with group gates
...                                  # learn groups, prune, fine-tune: your own loop
compact = dspfx.convert(prepared)    # the same function, smaller and faster, verified
"""

from dspfx.compile import compile
from dspfx.config import PrepareConfig
from dspfx.convert import convert
from dspfx.errors import (
    BudgetError,
    ConvertError,
    DataError,
    DspfxError,
    EquivalenceError,
    ExportError,
    LearnError,
    LoadError,
    MaskError,
    PrepareError,
    SaveError,
    TraceError,
)
from dspfx.export import export
from dspfx.graph import channel_graph
from dspfx.learner import GroupLearner
from dspfx.load import load
from dspfx.masks import get_masks, set_masks
from dspfx.module import CompactModule, PreparedModule
from dspfx.passes.cost_model import FEWEST_WEIGHTS, CostModel
from dspfx.prepare import prepare
from dspfx.prune import Budget, PruneReport, prune
from dspfx.report import Report, report
from dspfx.save import save

__all__ = [
    "FEWEST_WEIGHTS",
    "Budget",
    "BudgetError",
    "CompactModule",
    "ConvertError",
    "CostModel",
    "DataError",
    "DspfxError",
    "EquivalenceError",
    "ExportError",
    "GroupLearner",
    "LearnError",
    "LoadError",
    "MaskError",
    "PrepareConfig",
    "PrepareError",
    "PreparedModule",
    "PruneReport",
    "Report",
    "SaveError",
    "TraceError",
    "channel_graph",
    "compile",
    "convert",
    "export",
    "get_masks",
    "load",
    "prepare",
    "prune",
    "report",
    "save",
    "set_masks",
]
