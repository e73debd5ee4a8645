"""dspfx: dynamic structure pruning as a torch.fx compiler.

prepared = dspfx.prepare(model)      # a traced copy with group gates
...                                  # learn groups, prune, fine-tune: your own loop
compact = dspfx.convert(prepared)    # the same function, smaller and faster, verified
"""

from dspfx.budget import Budget, PruneReport
from dspfx.checkpoint import load_checkpoint, save_checkpoint
from dspfx.cluster import cluster_groups
from dspfx.compile import compile
from dspfx.compress import Compressed, compress
from dspfx.config import PrepareConfig
from dspfx.convert import convert
from dspfx.distill import distillation_loss
from dspfx.errors import (
    BudgetError,
    CheckpointError,
    CompileError,
    ConvertError,
    DataError,
    DspfxError,
    DspfxWarning,
    EquivalenceError,
    ExportError,
    LearnError,
    LoadError,
    MaskError,
    NarrowError,
    PlotError,
    PrepareError,
    RecipeError,
    SaveError,
    TraceError,
)
from dspfx.export import export
from dspfx.finetune import CyclicFinetune
from dspfx.gradual import GradualPruning
from dspfx.graph import channel_graph
from dspfx.learner import GroupLearner
from dspfx.load import load
from dspfx.masks import get_masks, set_masks
from dspfx.module import CompactModule, NarrowModule, PreparedModule
from dspfx.moments import input_moments
from dspfx.narrow import narrow
from dspfx.passes.cost_model import FEWEST_WEIGHTS, CostModel
from dspfx.plot import plot
from dspfx.prepare import prepare
from dspfx.prune import prune
from dspfx.prune_channels import prune_channels
from dspfx.recalibrate import recalibrate
from dspfx.report import Report, report
from dspfx.save import save
from dspfx.widen import widen

__all__ = [
    "FEWEST_WEIGHTS",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "CompactModule",
    "CompileError",
    "Compressed",
    "ConvertError",
    "CostModel",
    "CyclicFinetune",
    "DataError",
    "DspfxError",
    "DspfxWarning",
    "EquivalenceError",
    "ExportError",
    "GradualPruning",
    "GroupLearner",
    "LearnError",
    "LoadError",
    "MaskError",
    "NarrowError",
    "NarrowModule",
    "PlotError",
    "PrepareConfig",
    "PrepareError",
    "PreparedModule",
    "PruneReport",
    "RecipeError",
    "Report",
    "SaveError",
    "TraceError",
    "channel_graph",
    "cluster_groups",
    "compile",
    "compress",
    "convert",
    "distillation_loss",
    "export",
    "get_masks",
    "input_moments",
    "load",
    "load_checkpoint",
    "narrow",
    "plot",
    "prepare",
    "prune",
    "prune_channels",
    "recalibrate",
    "report",
    "save",
    "save_checkpoint",
    "set_masks",
    "widen",
]
