"""`report`: its text, its data, its page, and that torch counts the same."""

import base64
import dataclasses
import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from models import MODELS, Generator, UNet
from PIL import Image
from torch import nn

import browser
import dspfx
from dspfx.engines.report import Candidate, CompileReport, LayerChoice
from dspfx.passes.analysis.channel_ops import Declined
from dspfx.passes.analysis.cost import Cost
from dspfx.reporting.panels import PALETTE
from dspfx.reporting.text import WIDTH, gate_of, together
from dspfx.utils.formatting import distinct, mebibytes, share, short, shortened
from helpers import macs, random_masks, randomise
from reports import in_parts, many_layers, pruned

EVIL = "<script>alert('&')</script>"
CHOSEN = Candidate("own", "native", "fp32", 1.125e-3)
MEASURED = CompileReport(
    (
        Candidate("openvino", "dense", "fp32", 3.5e-3),
        CHOSEN,
        Candidate("own", f"native, {EVIL}", "fp32", 1e-3),
        Candidate("inductor", "dense", "fp32", note="crashed"),
    ),
    CHOSEN,
    (
        LayerChoice("m.0.cv1.0", {"dense": 2e-3, "native": 1.25e-3}, "native"),
        LayerChoice(EVIL, {"dense": 1e-3, "2 layers: 1 of 3->5, 1 of 4->6": 4e-4}, "dense"),
    ),
)


# -- numbers -------------------------------------------------------------------------------------


def test_units() -> None:
    assert [short(n) for n in (0, 7, 999, 1000, 272_474, 999_949, 999_960, 25_557_032)] == (
        ["0", "7", "999", "1.000 k", "272.5 k", "999.9 k", "1.000 M", "25.56 M"]
    )
    assert short(4_089_184_256) == "4.089 G"
    assert [mebibytes(n) for n in (512, 2**20, 46_758_048)] == ["0.5 KiB", "1.00 MiB", "44.59 MiB"]
    assert (share(1, 3), share(1, 0)) == ("33.3%", "-")


def test_names_are_shortened_in_the_middle() -> None:
    assert shortened("layer1.0.conv2", 14) == "layer1.0.conv2"
    assert shortened("backbone.layer1.0.conv2", 14) == "backb....conv2"
    for width in range(8, 30):
        assert len(shortened("abcdefghijklmnopqrstuvwxyz" * 2, width)) == width
    assert shortened("a\tb\nc", 9) == "a?b?c"


def test_names_that_are_shortened_are_told_apart() -> None:
    """As names of modules are: what they end with differs, or what stands before that."""
    names = [f"backbone.features.{block}.conv.2" for block in range(1, 13)]
    for width in range(16, 31):
        shown = [distinct(name, names, width) for name in names]
        assert len(set(shown)) == len(names)
        assert max(map(len, shown)) <= width
    assert distinct("backbone.features.2.conv.2", names, 16) == "...2.conv.2"
    assert distinct("backbone.features.2.conv.2", names, 26) == "backbone.features.2.conv.2"
    assert distinct("a" * 40, ["a" * 40, "b"], 12) == shortened("a" * 40, 12)


def test_a_reason_that_holds_many_nodes_is_one_line() -> None:
    found = [Declined(f"norm_{n}", "it mixes channels", "net.py:3: x") for n in range(12)]
    lines = together([*found, Declined("norm_0", "it mixes channels", "net.py:9: y"), found[0]])
    assert lines == [
        "norm_0, norm_1, norm_2 and 9 more: it mixes channels (net.py:3: x)",
        "norm_0: it mixes channels (net.py:9: y)",
    ]


def test_depthwise_layers_follow_what_they_read() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)]
    report = dspfx.report(dspfx.prepare(nn.Sequential(*layers), torch.zeros(2, 3, 4, 4)))
    assert [gate_of(layer) for layer in report.layers] == ["no", "follows", "yes"]
    (row,) = re.findall(r"^2 .*follows.*$", str(report), re.MULTILINE)
    assert row.split() == ["2", "follows", "8", "of", "8", "0"]
    assert report.to_rows()[1]["why_not"] == "its filters read one channel each"


def test_sizes_are_those_of_the_type() -> None:
    report = dspfx.report(pruned())
    assert (report.dtype, report.parameter_bytes) == ("float64", 8)
    assert report.to_dict()["before"]["bytes"] == 8 * report.before.parameters
    assert f"whole model, size in float64  {mebibytes(8 * report.before.parameters)}" in str(report)
    half = dspfx.report(dspfx.convert(pruned()).to(torch.bfloat16))
    assert (half.dtype, half.parameter_bytes) == ("bfloat16", 2)


def test_the_name_is_that_of_the_model_inside() -> None:
    model = pruned()
    compiled = torch.compile(model, backend="eager")
    assert dspfx.report(compiled).model == dspfx.report(model).model == type(model).__name__


def test_parameters_of_a_layer_that_is_called_twice_count_once() -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 1, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), shared, nn.ReLU(), shared, nn.Flatten())
    prepared = dspfx.prepare(model, torch.randn(2, 3, 2, 2))
    for which in (prepared, dspfx.convert(prepared)):
        report = dspfx.report(which)
        assert [layer.name for layer in report.layers if layer.gated] == ["2", "2"]
        assert report.gated_before == report.gated_after == Cost(2 * 16 * 4, 16)
        assert report.before.parameters == 16 + 16


NETWORKS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5")


@pytest.mark.parametrize("network", [*NETWORKS, UNet, Generator])
def test_torch_counts_the_same_macs(network: str | type[nn.Module]) -> None:
    """`FlopCounterMode` counts two operations for a multiply-accumulate.

    Dense, as emitted, and, where no zero weight is emitted, what is live under the masks.
    """
    if isinstance(network, str):
        model = randomise(torchvision.models.get_model(network, weights=None, num_classes=10))
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    else:
        model, x = randomise(network()), MODELS[network]
    model = model.double().eval()
    prepared = dspfx.prepare(model, x, config=dspfx.PrepareConfig(groups=3)).eval()
    assert dspfx.report(prepared).before.macs == macs(model, x)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.1))
    report = dspfx.report(prepared)
    assert report.before.macs == macs(model, x)
    likely = dspfx.convert(prepared)
    fewest = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
    assert dspfx.report(likely).emitted.macs == macs(likely, x)
    assert report.after.macs == dspfx.report(fewest).emitted.macs == macs(fewest, x)


# -- text ----------------------------------------------------------------------------------------


def with_long_words(report: dspfx.Report) -> dspfx.Report:
    """The same report, with names, counts and reasons as long as nobody would make them."""
    name = "a_module_with_a_very_long_name." * 8
    pin = Declined(name, "no_spaces_to_wrap_at" * 20, "file.py:1: " + "word " * 90)
    layers = tuple(
        dataclasses.replace(
            layer,
            name=name + layer.name,
            filters=(123_456, 123_455),
            inputs=(123_456, (123_456,) * 64),
            coupled=(name,) * 200,
            why_not="reason " * 60,
            pin=pin,
        )
        for layer in report.layers
    )
    notes = ("note " * 80, "x" * 300)
    return dataclasses.replace(report, layers=layers, declined=(pin, pin), notes=notes)


@pytest.mark.parametrize("compact", [False, True])
def test_text_fits_a_terminal(compact: bool) -> None:
    model = dspfx.convert(pruned()) if compact else pruned()
    for report in (dspfx.report(model), with_long_words(dspfx.report(model))):
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= WIDTH == 100
        assert len([line for line in lines if line.startswith("whole model")]) == 3 + compact


def test_text_names_layers_whole_where_there_is_room() -> None:
    report = dspfx.report(pruned())
    table = str(report).split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[2:]] == [layer.name for layer in report.layers]


# -- data ----------------------------------------------------------------------------------------


def leaves(value: Any) -> Iterator[Any]:
    if type(value) is dict:
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if type(value) is list:
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("compact", [False, True])
def test_plain_values(compact: bool) -> None:
    model = dspfx.convert(pruned()) if compact else pruned()
    report = dspfx.report(model)
    found = report.to_dict()
    assert {type(leaf) for leaf in leaves(found)} <= {str, int, bool, type(None)}
    assert json.loads(report.to_json()) == found
    assert json.loads(report.to_json(indent=None)) == found
    rows = report.to_rows()
    assert found["layers"] == rows
    assert len({tuple(row) for row in rows}) == 1
    assert [row["layer"] for row in rows] == [layer.name for layer in report.layers]
    assert sum(row["macs_before"] for row in rows) == found["before"]["macs"]
    assert sum(row["macs_after"] for row in rows) == found["after"]["macs"]
    assert sum(row["macs_after"] for row in rows if row["gated"]) == found["gated_after"]["macs"]
    assert (found["emitted"] is None, found["gathers"] is None) == (not compact, not compact)
    assert found["prepared"] is not compact


def test_reasons_are_data_too() -> None:
    found = dspfx.report(in_parts()).to_dict()
    (row,) = (row for row in found["layers"] if row["layer"] == "backbone.0")
    assert row["why_not"] == "it reads the model's inputs"
    assert found["model"] == "InParts"
    assert any("prepared in parts" in note for note in found["notes"])


# -- page ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is in a page: tags, what it refers to, the cells of its tables, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        refer = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "background")
        self.references += [value or "" for name, value in attrs if name in refer]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("style", "script"):
            self.references += re.findall(r"url\([^)]*\)|@import", data)
        self.words.append(data)
        if self.rows and self.rows[-1] and self.lasttag in ("th", "td", "span", "tr"):
            self.rows[-1][-1] += data.strip()


def page_of(report: dspfx.Report, folder: Path, measured: CompileReport | None = None) -> str:
    report.to_html(folder / "page.html", measured=measured)
    return (folder / "page.html").read_text(encoding="utf-8")


def picture_in(text: str) -> str:
    (data,) = re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', text)
    return base64.b64decode(data).decode()


@pytest.mark.parametrize("compact", [False, True])
def test_page(tmp_path: Path, compact: bool) -> None:
    report = dspfx.report(dspfx.convert(pruned()) if compact else pruned())
    text = page_of(report, tmp_path)
    page = Page(text)
    names = [row[0] for row in page.rows]
    for layer in report.layers:
        assert names.count(layer.name) == 2  # what became of it, and what can be pruned
        row = page.rows[names.index(layer.name)]
        assert short(layer.before.macs) in row
        assert short(layer.after.macs) in row
    for row in str(report).split("\n\n")[-1].splitlines():
        if row.startswith("whole model"):
            label, *numbers = re.split(r"\s{2,}", row)
            assert label in page.words
            assert numbers[-1] in page.words
    assert "Measured" not in text
    assert {"header", "figure", "section", "dl", "table", "thead", "tbody"} <= set(page.tags)
    assert picture_in(text).count("<image") == len(report.masks)


def test_page_asks_for_nothing(tmp_path: Path) -> None:
    text = page_of(dspfx.report(pruned()), tmp_path, MEASURED)
    page = Page(text)
    assert len(page.references) == 1
    assert page.references[0].startswith("data:image/svg+xml")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "default-src 'none'" in text  # and a browser that knows better is forbidden to
    picture = picture_in(text)
    referred = re.findall(r'(?:href|src)="\s*([^"]{0,30})|url\(([^)]*)\)', picture)
    assert referred
    assert all((a or b).startswith(("#", "data:image/png")) for a, b in referred)


def test_page_escapes_what_the_model_says(tmp_path: Path) -> None:
    report = with_long_words(dspfx.report(pruned()))
    layers = [dataclasses.replace(layer, name=EVIL, coupled=(EVIL,)) for layer in report.layers]
    evil = Declined(EVIL, EVIL, EVIL)
    report = dataclasses.replace(
        report, model=EVIL, layers=tuple(layers), declined=(evil,), notes=(EVIL,)
    )
    text = page_of(report, tmp_path, MEASURED)
    assert "<script" not in text
    assert text.count(html.escape(EVIL).replace("&#x27;", "&#39;")) > 3 * len(layers)
    assert EVIL in Page(text).words


def test_page_shows_what_was_measured(tmp_path: Path) -> None:
    report = dspfx.report(dspfx.convert(pruned()))
    rows = Page(page_of(report, tmp_path, MEASURED)).rows
    assert ["native, own, fp32 (chosen)", "1.125", "", "32.1%"] in rows
    assert ["dense, openvino, fp32", "3.500", "", "100.0%"] in rows
    assert not any("inductor" in row[0] for row in rows)
    assert ["m.0.cv1.0", "native", "1.250", "2.000", "", "62.5%", "2"] in rows


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(dspfx.PlotError, match="nowhere"):
        dspfx.report(pruned()).to_html(tmp_path / "nowhere" / "page.html")


def test_page_in_a_browser(tmp_path: Path) -> None:
    """All layers are in the document, and the picture is seen, in light and in dark."""
    report = dspfx.report(dspfx.convert(pruned()))
    page_of(report, tmp_path, MEASURED)
    page = Page(browser.dom(tmp_path / "page.html"))
    names = [row[0] for row in page.rows]
    assert {layer.name for layer in report.layers} <= set(names)
    for flags, background in (((), (255, 255, 255)), ((browser.DARK,), (21, 24, 28))):
        picture = browser.screenshot(tmp_path / "page.html", 1280, 2000, *flags)
        with Image.open(picture) as image:
            assert image.size == (1280, 2000)
            pixels = np.asarray(image.convert("RGB"))
        assert (pixels[:, -8:] == background).all()  # nothing reaches into the margin
        colours = {tuple(pixel) for pixel in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
        shown = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in PALETTE[:2]}
        assert shown <= colours


def test_page_is_as_wide_as_the_window(tmp_path: Path) -> None:
    """Phone, tablet and desk, with long names and 60 layers: only tables scroll sideways."""
    report = with_long_words(many_layers(60, 64))
    inner = html.escape(page_of(report, tmp_path, MEASURED))
    widths = (360, 768, 1400)
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{inner}"></iframe>' for w in widths)
    script = """<script>onload = () => {
        const documents = [...document.querySelectorAll("iframe")].map(f => f.contentDocument);
        const roots = documents.map(d => d.documentElement);
        document.body.dataset.found = roots.map(r => `${r.scrollWidth} of ${r.clientWidth}`);
    }</script>"""
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><body>{frames}{script}")
    found = re.search(r'data-found="([^"]*)"', browser.dom(tmp_path / "frames.html"))
    assert found is not None
    sizes = [tuple(map(int, pair.split(" of "))) for pair in found.group(1).split(",")]
    assert len(sizes) == len(widths)
    for width, (content, window) in zip(widths, sizes, strict=True):
        assert content <= window
        assert width - 20 <= window <= width
