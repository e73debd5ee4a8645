"""dspfx: dynamic structure pruning as a torch.fx compiler.

prepared = dspfx.prepare(model)      # a traced copy with group gates
...                                  # learn groups, prune, fine-tune: your own loop
compact = dspfx.convert(prepared)    # the same function, smaller and faster, verified
"""

from dspfx.compile import compile
from dspfx.compress import Compressed, compress
from dspfx.convert import convert
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
    QuantizeError,
    RecipeError,
    SaveError,
    TraceError,
)
from dspfx.export import export
from dspfx.model.config import PrepareConfig
from dspfx.model.module import CompactModule, NarrowModule, PreparedModule
from dspfx.passes.lowering.cost_model import FEWEST_WEIGHTS, CostModel
from dspfx.prepare import prepare
from dspfx.pruning.budget import Budget, PruneReport
from dspfx.pruning.gradual import GradualPruning
from dspfx.pruning.masks import get_masks, set_masks
from dspfx.pruning.prune import prune
from dspfx.pruning.prune_channels import prune_channels
from dspfx.quantization.quantize import quantize
from dspfx.quantization.training import fake_quantize
from dspfx.reporting.channel_graph import channel_graph
from dspfx.reporting.plot import plot
from dspfx.reporting.report import Report, report
from dspfx.storage.checkpoint import load_checkpoint, save_checkpoint
from dspfx.storage.load import load
from dspfx.storage.save import save
from dspfx.training.distill import distillation_loss
from dspfx.training.finetune import CyclicFinetune
from dspfx.training.groups.cluster import cluster_groups
from dspfx.training.groups.learner import GroupLearner
from dspfx.training.moments import input_moments
from dspfx.training.narrow.narrow import narrow
from dspfx.training.narrow.widen import widen
from dspfx.training.recalibrate import recalibrate
from dspfx.training.repair.compensate import Compensation, compensate

__all__ = [
    "FEWEST_WEIGHTS",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "CompactModule",
    "Compensation",
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
    "QuantizeError",
    "RecipeError",
    "Report",
    "SaveError",
    "TraceError",
    "channel_graph",
    "cluster_groups",
    "compensate",
    "compile",
    "compress",
    "convert",
    "distillation_loss",
    "export",
    "fake_quantize",
    "get_masks",
    "input_moments",
    "load",
    "load_checkpoint",
    "narrow",
    "plot",
    "prepare",
    "prune",
    "prune_channels",
    "quantize",
    "recalibrate",
    "report",
    "save",
    "save_checkpoint",
    "set_masks",
    "widen",
]


def __dir__() -> list[str]:
    """The public names, and what Python gives every package; not the rooms of the code."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
