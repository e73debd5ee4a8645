"""Pictures: the data that they are drawn from, what is in them, and that nothing overlaps."""

import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from models import MODELS, C2f, Siamese
from PIL import Image
from torch import Tensor, nn

import dspfx
from dspfx.passes.lowering.sites import sites
from dspfx.passes.transforms.grouped_masks import GroupedMask, MaskGroup
from dspfx.reporting.panels import GONE, PALETTE, PIXELS, UNREAD, raster
from helpers import random_masks
from reports import in_parts, many_layers, pruned


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def texts(figure: Figure) -> list[Text]:
    """All that is written in a picture and can be seen."""
    figure.draw_without_rendering()
    beyond = set()  # labels of ticks that matplotlib holds, but does not draw
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                beyond.add(tick.label1)
    found = [text for text in figure.findobj(Text) if text.get_visible() and text not in beyond]
    return [text for text in found if text.get_text().strip()]


def assert_legible(figure: Figure) -> None:
    """Every text lies within the picture, has 6 points at least, and covers no other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    whole = figure.bbox
    for name, box in boxes:
        assert box.x0 >= whole.x0, name
        assert box.x1 <= whole.x1, name
        assert box.y0 >= whole.y0, name
        assert box.y1 <= whole.y1, name
    for (name, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(across, down) <= 1, (name, other)  # pixel
    assert min(text.get_fontsize() for text in texts(figure)) >= 6


def test_masks_are_those_of_the_compact_network() -> None:
    """The weights of the layers that were emitted say who reads what."""
    prepared = pruned()
    compact = dspfx.convert(prepared)
    masks = {mask.name: mask for mask in dspfx.report(compact).masks}
    assert masks == {mask.name: mask for mask in dspfx.report(prepared).masks}
    assert len(masks) == len(dspfx.get_masks(prepared))
    found = {site.name: site for site in sites(compact, (MODELS[C2f],))}
    for name, mask in masks.items():
        reads = {group.inputs for group in mask.groups}
        assert reads == {tuple(mask.held[i] for i in g.inputs) for g in found[name].groups}
        assert sum(len(g.filters) for g in mask.groups) == found[name].weight.shape[0]
        assert len(mask.held) == found[name].weight.shape[1]
        own = dspfx.get_masks(prepared)[name]
        for group in mask.groups:
            expected = torch.zeros(mask.channels, dtype=torch.bool)
            expected[list(group.inputs)] = True
            assert all(torch.equal(own[filter], expected) for filter in group.filters)


def test_masks_travel_with_the_model(tmp_path: Path) -> None:
    compact = dspfx.convert(pruned())
    expected = dspfx.report(compact)
    dspfx.save(compact, tmp_path / "model.safetensors")
    loaded = dspfx.load(tmp_path / "model.safetensors", C2f().double())
    for twin in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact)), loaded):
        assert dspfx.report(twin) == expected


def test_a_panel_shows_who_reads_what() -> None:
    mask = GroupedMask(
        "layer",
        filters=4,
        channels=8,
        held=(7, 0, 3, 5),
        groups=(MaskGroup((2,), (7, 3)), MaskGroup((0, 1), (3,))),
    )
    image = raster(mask)
    assert image.shape == (PIXELS, PIXELS, 3)
    a, b, unread, gone = (rgb(c) for c in (PALETTE[0], PALETTE[1], UNREAD, GONE))
    expected = [
        [a, unread, a, unread] + 4 * [gone],
        [unread, unread, b, unread] + 4 * [gone],
        [unread, unread, b, unread] + 4 * [gone],
        8 * [gone],
    ]
    middle = image[PIXELS // 8 :: PIXELS // 4, PIXELS // 16 :: PIXELS // 8]
    assert middle.tolist() == expected


def test_no_channel_is_left_out_of_a_panel() -> None:
    """Every second of 2048 channels: each pixel has the mean of what it covers."""
    every, second = tuple(range(2048)), tuple(range(0, 2048, 2))
    mask = GroupedMask("layer", 2048, 2048, every, (MaskGroup(every, second),))
    mean = (np.array(rgb(PALETTE[0])) + rgb(UNREAD)) / 2
    assert np.abs(raster(mask) - mean).max() <= 0.5


def test_what_is_in_a_picture(tmp_path: Path) -> None:
    prepared = pruned()
    figure = dspfx.plot(prepared, tmp_path / "picture.png")
    written = {text.get_text() for text in texts(figure)}
    report = dspfx.report(prepared)
    assert {layer.name for layer in report.layers} <= written
    assert {"group 1", "group 2", "not read", "removed", "before", "after"} <= written
    assert any("% of the MACs" in text and "C2f" in text for text in written)
    assert_legible(figure)
    with Image.open(tmp_path / "picture.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        size = tuple(round(150 * inches) for inches in figure.get_size_inches())
        assert image.size == pytest.approx(size, abs=1)
    colours = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    assert {tuple(rgb(c)) for c in (PALETTE[0], PALETTE[1], GONE)} <= colours


@pytest.mark.parametrize(
    ("count", "channels", "name"),
    [
        (1, 4, "x"),
        (19, 64, "stage_1.conv_"),
        (53, 2048, "layer1.0.downsample."),
        (160, 16, "backbone.body.stages.3.blocks.attention.projection."),
    ],
)
def test_nothing_overlaps(count: int, channels: int, name: str) -> None:
    figure = dspfx.plot(many_layers(count, channels, name))
    assert_legible(figure)
    across, down = (figure.dpi * inches for inches in figure.get_size_inches())
    assert across <= 3000
    assert down < 2**16  # more cannot be drawn


def test_a_model_in_parts_and_a_layer_that_is_called_twice() -> None:
    prepared = in_parts()
    dspfx.set_masks(prepared, random_masks(prepared))
    for model in (prepared, dspfx.convert(prepared)):
        written = [text.get_text() for text in texts(dspfx.plot(model))]
        assert written.count("backbone.2") == 2  # below the charts and above its panel
    written = [text.get_text() for text in texts(dspfx.plot(pruned(Siamese)))]
    assert written.count("embed") == 4


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Dollars and underscores are no formulas."""
    model = nn.Sequential()
    for name, channels in (("a", 3), ("$x^{$", 4), ("x_1^2$", 4), ("<&>", 4)):
        model.add_module(name, nn.Conv2d(channels, 4, 1))
    prepared = dspfx.prepare(model, torch.randn(2, 3, 4, 4))
    for suffix in (".png", ".svg"):
        figure = dspfx.plot(prepared, tmp_path / f"picture{suffix}")
        assert (tmp_path / f"picture{suffix}").stat().st_size > 1000
    assert {"$x^{$", "x_1^2$", "<&>"} <= {text.get_text() for text in texts(figure)}


def test_a_layer_that_vanishes() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
            self.b, self.head = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.b(self.a(x).relu()))

    prepared = dspfx.prepare(Residual(), torch.randn(2, 3, 4, 4))
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    dspfx.set_masks(prepared, {"a": nothing, "b": nothing})
    report = dspfx.report(prepared)
    gone = {layer.name for layer in report.layers if layer.filters[1] == 0}
    assert gone == {"a", "b"}
    masks = {mask.name: mask for mask in report.masks}
    assert masks["a"].groups == masks["b"].groups == ()
    assert (raster(masks["a"]) == rgb(GONE)).all()
    assert_legible(dspfx.plot(report))


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = many_layers(2, 4)
    for name in ("picture.docx", "picture"):
        with pytest.raises(dspfx.PlotError, match=r"has to end with .*\.png"):
            dspfx.plot(report, tmp_path / name)
    with pytest.raises(dspfx.PlotError, match="nowhere"):
        dspfx.plot(report, tmp_path / "nowhere" / "picture.png")
    plain: Any = nn.Conv2d(3, 3, 1)
    with pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.plot(plain)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: dspfx.plot(report), lambda: report.to_html(tmp_path / "page.html")):
        with pytest.raises(dspfx.PlotError, match=r"pip install 'dspfx\[plot\]'"):
            draw()
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_left_alone() -> None:
    """`import dspfx` does not load it, and drawing neither loads pyplot nor changes settings."""
    code = """if True:
        import sys, torch, dspfx
        assert "matplotlib" not in sys.modules and "jinja2.environment" not in sys.modules
        model = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 1) for _ in range(3)))
        prepared = dspfx.prepare(model, torch.randn(2, 3, 4, 4))
        from matplotlib import rcParams
        names = [name for name in rcParams if name != "backend"]  # looking it up loads pyplot
        before = [rcParams[name] for name in names]
        dspfx.plot(prepared)
        assert [rcParams[name] for name in names] == before
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)
