"""Models of libraries that dspfx does not know, built from configurations; none is downloaded.

Each is small where its library lets it be, has random weights and random running statistics, and
comes with inputs of two sizes: other batches, and other images, lengths or numbers of tokens where
the model takes them.
"""

import contextlib
import io

import torch
from torch import nn

from benchmarks.users import hugging_face, images, sound_and_volumes
from benchmarks.users.case import MODELS, Inputs
from benchmarks.zoo import Case, fill

LISTS = images, hugging_face, sound_and_volumes
LIBRARIES = (
    *("ultralytics", "transformers", "segmentation_models_pytorch", "monai", "torchaudio"),
    *("diffusers", "doctr", "kornia", "spandrel", "efficientnet_pytorch", "facenet_pytorch"),
)


def users_cases() -> list[Case]:
    """All models, in the order of their libraries."""
    return sorted(MODELS, key=lambda case: LIBRARIES.index(case.library))


def build(case: Case) -> nn.Module:
    """The model in evaluation mode."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        return fill(MODELS[case].make()).eval()


def inputs_of(case: Case, size: int) -> Inputs:
    """Inputs of the first size, given 0, or of the second."""
    return MODELS[case].draw(torch.Generator().manual_seed(size), size)
