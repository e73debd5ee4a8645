"""`save`: a prepared or compact model to one file, without pickle."""

import os
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from dspfx.errors import SaveError
from dspfx.model.module import CompactModule
from dspfx.model.parts import compact_parts_of, full_name, parts_of
from dspfx.model.tensors import aliases, named_tensors
from dspfx.storage.blueprint import Blueprint, QuantizationRecord, blueprint, with_arguments
from dspfx.storage.container import FORMAT, Archive, write
from dspfx.storage.fingerprint import Settings, settings, structure
from dspfx.utils.typed_json import to_json
from dspfx.utils.wrappers import unwrapped

ORIGINAL = "original/"  # before the names of tensors that only the module before `convert` has


@dataclass(frozen=True)
class Manifest:
    """What a file says beside the weights; it is written as JSON.

    Attributes:
        format: number of the format.
        dspfx, torch: the versions that wrote it.
        training: whether the model was in training mode.
        aliases: further names of tensors, and the names under which these are stored.
        orders: the dimensions of tensors that are not contiguous, in the order of their strides,
            the largest first.
        settings: what the modules of the model were constructed with, by their names.
        parts: the prepared or compact modules of the model, itself if it was traced whole.
    """

    format: int
    dspfx: str
    torch: str
    training: bool
    aliases: dict[str, str]
    orders: dict[str, tuple[int, ...]]
    settings: Settings
    parts: tuple[Blueprint, ...]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a prepared or compact model to a file that `dspfx.load` reads.

    The file is in the safetensors format. It holds all parameters and buffers as they are now, bit
    for bit. As JSON in its metadata it holds the versions of dspfx and torch, the shapes and types
    of the example inputs, the graph, the settings of all modules, the masks and groups of every
    layer, and of a compact model for every tensor in the graph the original number of each channel
    that it holds. It holds no code, no example images and no state of an optimiser. What was at
    `path` is replaced in one step, when all is written.

    Args:
        model: from `dspfx.prepare`, at any time, from `dspfx.convert`, fine-tuned or not, or from
            `dspfx.quantize`.
        path: of the file, usually `*.safetensors`.

    Raises:
        SaveError: the model holds state that is no tensor, was rebuilt by `dspfx.compile`, or was
            prepared with inputs that are neither tensors nor numbers; or the disk is full.
        ConvertError: the model comes from neither `dspfx.prepare` nor `dspfx.convert`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> dspfx.save(prepared, Path(folder) / "prepared.safetensors")
        >>> loaded = dspfx.load(Path(folder) / "prepared.safetensors", model)
        >>> bool((loaded(x) == prepared(x)).all())
        True
    """
    if not isinstance(model, nn.Module):
        raise SaveError(
            f"a {type(model).__name__} cannot be saved; save the model that dspfx.prepare or "
            "dspfx.convert returned, and compile again after loading"
        )
    model = unwrapped(model)
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise SaveError(f"'{name}', a {type(module).__name__}, has state that is no tensor")
    names = aliases(model)
    tensors = {
        ORIGINAL + full_name(path, name): tensor
        for path, part in compact_parts_of(model)
        for name, tensor in part.indices.items()
    }
    tensors |= {name: t for name, t in named_tensors(model).items() if name not in names}
    manifest = Manifest(
        format=FORMAT,
        dspfx=version("dspfx"),
        torch=torch.__version__,
        training=model.training,
        aliases=names,
        orders={name: _order(t) for name, t in tensors.items() if not t.is_contiguous()},
        settings=settings(model),
        parts=_parts(model),
    )
    write(Path(path), Archive(to_json(manifest), tensors))


def _order(tensor: Tensor) -> tuple[int, ...]:
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))


def _parts(model: nn.Module) -> tuple[Blueprint, ...]:
    compact = compact_parts_of(model)
    if compact:
        return tuple(with_arguments(part, _unchanged(part), name) for name, part in compact)
    return tuple(
        with_arguments(part.module, blueprint(part.module), part.name) for part in parts_of(model)
    )


def _unchanged(part: CompactModule) -> Blueprint:
    plain: Blueprint = part.blueprint
    assert plain.compaction is not None
    if part.quantization is not None:
        return replace(plain, quantization=QuantizationRecord(part.quantization, structure(part)))
    if structure(part) != plain.compaction.structure:
        raise SaveError(
            "the layers of the model are not those that dspfx.convert made, perhaps since "
            "dspfx.compile emitted them again; save the model that convert returned, and compile "
            "again after loading"
        )
    return plain
