"""Everything dspfx raises or warns of on purpose; the messages say what to do."""


class DspfxError(Exception):
    """Base of every error that dspfx raises on purpose."""


class DspfxWarning(UserWarning):
    """Something works, but probably not as intended; the message says what, and what to do."""


class TraceError(DspfxError):
    """The model could not be turned into a graph; the message names the place."""


class PrepareError(DspfxError):
    """The model or its example inputs cannot be prepared."""


class MaskError(DspfxError):
    """A mask names an unknown layer, has the wrong shape, or is not made of groups."""


class BudgetError(DspfxError):
    """A budget is out of range or cannot be reached; the message says what can."""


class ConvertError(DspfxError):
    """The model cannot be converted, for example because it was never prepared."""


class NarrowError(DspfxError):
    """The model cannot be trained narrow; it can be trained as it is, masked."""


class EquivalenceError(DspfxError):
    """Masked and compact model differ; the message names the first node that does."""


class SaveError(DspfxError):
    """The model cannot be saved, for example since its layers were exchanged after `convert`."""


class LoadError(DspfxError):
    """A file is damaged, of a later format, or does not fit the model; nothing was loaded."""


class ExportError(DspfxError):
    """The model cannot be exported, or not to this format; the message says what to do."""


class QuantizeError(DspfxError):
    """The model cannot be quantised, or not with these batches; the message says what to do."""


class CompileError(DspfxError):
    """The model cannot be compiled, or not for these inputs; the message says what to do."""


class PlotError(DspfxError):
    """A picture cannot be drawn or not be written in this format; the message says what to do."""


class LearnError(DspfxError):
    """Learning or fine-tuning was given an optimiser, a loss or settings it cannot work with."""


class CheckpointError(DspfxError):
    """A checkpoint is missing, damaged or of something else, or cannot be written."""


class DataError(DspfxError):
    """Data is missing, empty or damaged; the message says where it was looked for."""


class RecipeError(DspfxError):
    """A recipe names a model, a preset or a folder that is not there, or contradicts itself."""
