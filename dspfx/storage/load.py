"""`load`: what `save` wrote, built on a new module of the same architecture.

1. The file is read as data, and checked to be what was written.
2. A copy of the user's module is traced and gated as the saved one was; its graph has to be the
   same, node by node.
3. A compact model is emitted from that by the stored plan, every number of which is checked.
4. The names, shapes and kinds of all tensors have to fit. Only then are values copied.
   The settings of all modules have to be the same too.
5. Every part is run once.
"""

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import DspfxError, LoadError, PrepareError, TraceError
from dspfx.layers.gated import GATED, gated_layers
from dspfx.model.analysed import analyse_prepared, fitting_inputs
from dspfx.model.config import PrepareConfig
from dspfx.model.division import copied, exchange
from dspfx.model.emit import emit_compact, indices
from dspfx.model.gating import Task, gate
from dspfx.model.modes import put_all
from dspfx.model.module import CompactModule, PreparedModule
from dspfx.model.origin import TRACING
from dspfx.model.parts import compact_parts_of, exchanged, parts_of
from dspfx.model.rebuilt import plain_copy
from dspfx.model.tensors import named_tensors
from dspfx.passes.analysis.operators import Key, Rule
from dspfx.passes.sandbox.calls import Call, evaluate, fresh, parameter_dtype_and_device
from dspfx.passes.sandbox.state import buffers_kept
from dspfx.quantization.quantize import rebuilt
from dspfx.storage.blueprint import (
    Blueprint,
    Listing,
    blueprint,
    channel_gates,
    listings,
    mask_of,
    named_rules,
)
from dspfx.storage.container import read
from dspfx.storage.example_inputs import DTYPES, from_plain
from dspfx.storage.fingerprint import other_setting, settings, structure
from dspfx.storage.plan_record import checked, plan_of
from dspfx.storage.restore import fill, matching
from dspfx.storage.save import ORIGINAL, Manifest
from dspfx.utils.typed_json import from_json

LARGER = 16  # times the size of the model that its file may have at most
ROOM = 2**26  # bytes that it may have besides

_ADDED: dict[str, Any] = {"settings": {}}  # what plans of format 1 lack


def load(
    path: str | os.PathLike[str], model: nn.Module, *, rules: Mapping[Key, Rule] | None = None
) -> nn.Module:
    """Rebuild what `dspfx.save` wrote, on a new module of the same architecture.

    Weights, masks, groups and outputs are those of the saved model, bit for bit. No code is read
    from the file, and there is no pickle: a damaged or hostile file leads to an error.

    Args:
        path: of the file.
        model: constructed as the one that was prepared; its weights do not matter. It is left
            alone, whether loading succeeds or fails.
        rules: those of the `PrepareConfig` that the model was prepared with, if there were any:
            functions and types are not stored.

    Returns:
        A prepared model, or one like that of `dspfx.convert`, on the device of `model`, in the mode
        and type that it was saved in. Random values stand for its example inputs.

    Raises:
        LoadError: the file is damaged, of a later format, or was saved of another architecture.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> dspfx.save(dspfx.convert(prepared), Path(folder) / "compact.safetensors")
        >>> fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> compact = dspfx.load(Path(folder) / "compact.safetensors", fresh)
        >>> bool(torch.allclose(compact(x), model(x), atol=1e-6))
        True
    """
    path = Path(path)
    if any(isinstance(module, PreparedModule | CompactModule) for module in model.modules()):
        raise LoadError("pass the model as it was before dspfx.prepare: construct it again")
    own = list(named_tensors(model).values())
    if any(tensor.is_meta for tensor in own):
        raise LoadError("the model is on the meta device; construct it on a CPU or GPU")
    archive = read(path, LARGER * sum(8 * tensor.numel() for tensor in own) + ROOM)
    try:
        with torch.inference_mode(mode=False):  # or what is loaded could not be run apart from it
            manifest = from_json(Manifest, _ADDED | archive.plan)
            return _built(model, manifest, archive.tensors, rules or {})
    except Exception as error:  # also what the code of the model raises when it is called
        what = str(error) if isinstance(error, DspfxError | ValueError) else repr(error)
        saved = " and ".join(f"{n} {str(archive.plan.get(n))[:20]}" for n in ("dspfx", "torch"))
        raise LoadError(
            f"{path} cannot be loaded on this {type(model).__name__}: {what}. It was saved with "
            f"{saved}; construct the model as it was constructed then"
        ) from error


def _built(
    model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor], rules: Mapping[Key, Rule]
) -> nn.Module:
    root = _prepared(plain_copy(model), manifest.parts, rules)
    compact = any(part.compaction is not None for part in manifest.parts)
    if compact:
        root = _compacted(root, manifest.parts, tensors)
    values = {name: t for name, t in tensors.items() if not name.startswith(ORIGINAL)}
    fill(root, values, manifest.aliases, manifest.orders)
    if not compact:
        _check_masks(root, manifest.parts)
    if other := other_setting(settings(root), manifest.settings):
        raise LoadError(f"its module {other}")
    _run(root)
    if compact:
        put_all(root, manifest.training)
    else:
        root.train(manifest.training)
    return root


def _prepared(
    root: nn.Module, parts: tuple[Blueprint, ...], rules: Mapping[Key, Rule]
) -> nn.Module:
    """`root`, a private copy, prepared as `parts` say."""
    if [part.name for part in parts] == [""]:
        return _gated(root, parts[0], rules)
    for part in parts:
        try:
            child = root.get_submodule(part.name)
        except AttributeError as error:
            raise LoadError(f"it has a part '{part.name}', the model has none") from error
        gated = _gated(copied(child, root), part, rules)
        gated.answer_for(child)
        exchange(root, child, gated)
    return root


def _gated(child: nn.Module, part: Blueprint, rules: Mapping[Key, Rule]) -> PreparedModule:
    """`child`, traced and gated as `part` was, with weights of its own still."""
    if named_rules(rules) != part.rules:
        raise LoadError(
            f"it was prepared with rules for {', '.join(part.rules) or 'nothing'}, which are not "
            "stored: pass the same ones, dspfx.load(path, model, rules={...})"
        )
    if DTYPES[part.dtype] != parameter_dtype_and_device(child)[0]:
        dtype = DTYPES[part.dtype]  # complex tensors stay so
        child._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)  # type: ignore[no-untyped-call]
    kinds = {kind.__name__: kind for kind in GATED}
    layers = tuple(kinds[name] for name in part.layers)
    settings = part.groups, part.frozen, layers, part.round_to, dict(rules), part.opaque
    config = PrepareConfig(*settings)
    if part.samples is not None and not part.samples > 0:
        raise LoadError(f"it was prepared for {part.samples} samples")
    if part.outside < 0 or part.tracing not in range(TRACING + 1):
        raise LoadError("it was prepared in a way that is not known here")
    names = frozenset(part.frozen), frozenset(part.opaque)
    followed = frozenset(part.masks)
    task = Task(
        config, *names, part.gate_first, followed, samples=part.samples, tracing=part.tracing
    )
    call = _call(child, part)
    try:
        gated = gate(child, call, task, evaluate(child, call), prove=False)
    except (TraceError, PrepareError) as error:
        raise LoadError(f"it cannot be prepared as it was: {error}") from error
    gated.notes, gated.outside = part.notes, part.outside
    _check_graphs(listings(gated), part.graphs)
    return gated


def _call(module: nn.Module, part: Blueprint) -> Call:
    """The arguments that `part` was traced for, on the device of `module`."""
    _, device = parameter_dtype_and_device(module)
    match from_plain(["list", part.arguments]):
        case [tuple(args), dict(kwargs)]:
            return Call(args, kwargs).map(lambda x: x.to(device) if isinstance(x, Tensor) else x)
    raise ValueError("there are no arguments to trace the model for")


def _check_graphs(here: tuple[Listing, ...], saved: tuple[Listing, ...]) -> None:
    if here == saved:
        return
    ours, theirs = (tuple(itertools.chain.from_iterable(graphs)) for graphs in (here, saved))
    pairs = itertools.zip_longest(ours, theirs, fillvalue="nothing")
    line, other = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    raise LoadError(f"its graph differs, first where it is `{line}` and was `{other[:200]}`")


def _compacted(
    root: nn.Module, parts: tuple[Blueprint, ...], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """`root`, prepared, with its parts as they were emitted, with weights of its own still."""
    compact = {}
    for part, stored in zip(parts_of(root), parts, strict=True):
        for name, buffer in indices(part.module).items():
            buffer.data = matching(name, buffer, tensors[ORIGINAL + part.full_name(name)])
        most = sum(tensor.numel() for tensor in tensors.values())
        compact[part.module] = _emitted(part.module, stored, most)
    whole = exchanged(root, compact)
    put_all(whole, mode=False)
    return whole


def _emitted(prepared: PreparedModule, part: Blueprint, most_weights: int) -> CompactModule:
    stored = part.compaction
    if stored is None:
        raise LoadError("one part is compact, another is not")
    for name, layer in gated_layers(prepared).items():
        layer.gate.set_mask(mask_of(part.masks[name], *layer.gate.mask.shape))
    for name, after_norm in channel_gates(prepared).items():
        alive = torch.ones(len(after_norm.alive), dtype=torch.bool)
        alive[torch.from_numpy(checked(part.dead[name], 0, len(alive)))] = False
        after_norm.set_alive(alive)
    analysis = analyse_prepared(prepared)
    module = emit_compact(prepared, analysis, plan_of(stored, analysis, most_weights))
    found = stored.difference
    module.summary = stored.summary
    module.difference = None if found is None else (found[0], DTYPES[found[1]])
    module.blueprint = replace(part, name="", arguments=None, quantization=None)
    if structure(module) != stored.structure:
        raise LoadError("its plan describes other layers than it holds")
    if part.quantization is None:
        return module
    module = rebuilt(module, part.quantization.how)
    if structure(module) != part.quantization.structure:
        raise LoadError("it was rounded in another way than its plan says")
    return module


def _check_masks(root: nn.Module, parts: tuple[Blueprint, ...]) -> None:
    """The plan of a prepared model repeats what its gates hold."""
    for part, stored in zip(parts_of(root), parts, strict=True):
        held = blueprint(part.module)
        same = held.dead == stored.dead and held.masks.keys() == stored.masks.keys()
        if not same or not all(
            torch.equal(mask_of(stored.masks[name], *layer.gate.mask.shape), layer.gate.mask.cpu())
            and stored.masks[name].groups == held.masks[name].groups
            for name, layer in gated_layers(part.module).items()
        ):
            raise LoadError("its masks are not those of its plan")


def _run(root: nn.Module) -> None:
    """Run every part once, so that what cannot run is not returned."""
    compact: list[Any] = [part for _, part in compact_parts_of(root)]
    for part in compact or [part.module for part in parts_of(root)]:
        part.example_inputs = fitting_inputs(part)
        with torch.no_grad(), buffers_kept(part), part.evaluation_view() as view:
            view(*fresh(part.example_inputs))
