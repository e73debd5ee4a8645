"""Models whose own code has no graph: their children are prepared in place."""

import copy
import pickle

import pytest
import torch
import torchvision
from detector import IMAGES, Detector
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise, unchanged


def prepared_detector() -> tuple[nn.Module, nn.Module]:
    model = randomise(Detector()).double().eval()
    with unchanged(model):
        prepared = dspfx.prepare(model, (IMAGES,), config=dspfx.PrepareConfig(groups=2))
    return model, prepared


def test_parts_are_prepared_in_place() -> None:
    model, prepared = prepared_detector()
    assert type(prepared) is Detector
    assert isinstance(prepared.backbone, dspfx.PreparedModule)
    assert isinstance(prepared.head, dspfx.PreparedModule)
    assert list(gated_layers(prepared)) == [
        *("backbone.2", "head.conv", "head.out", "refine.0.gated")
    ]
    assert [k for k in prepared.state_dict() if "gate" not in k] == list(model.state_dict())
    assert_equal(model(IMAGES), prepared(IMAGES), tolerance=0)
    report = " ".join(str(dspfx.report(prepared)).split())
    assert "prepared in parts, backbone, head, refine.0, since Detector cannot be traced" in report
    assert "depends on the values" in report


def test_ignored_and_opaque_parts_are_left_alone() -> None:
    model = randomise(Detector()).double().eval()
    ignoring = dspfx.PrepareConfig(ignore=("head.conv",))
    assert list(gated_layers(dspfx.prepare(model, (IMAGES,), config=ignoring))) == [
        "backbone.2",
        "head.out",
        "refine.0.gated",
    ]
    opaque = dspfx.prepare(model, (IMAGES,), config=dspfx.PrepareConfig(opaque=("backbone",)))
    assert not isinstance(opaque.backbone, dspfx.PreparedModule)
    # what the head reads is computed by the backbone, prepared or not
    assert list(gated_layers(opaque)) == ["head.conv", "head.out", "refine.0.gated"]


def test_every_verb_works_on_all_parts() -> None:
    _, prepared = prepared_detector()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    masks = dspfx.get_masks(prepared)
    assert list(masks) == list(gated_layers(prepared))
    compact = dspfx.convert(prepared)
    assert type(compact) is Detector
    assert isinstance(compact.head, dspfx.CompactModule)
    assert_equal(prepared(IMAGES), compact(IMAGES))
    assert dspfx.report(compact).after == dspfx.report(prepared).after
    assert dspfx.report(compact).after.macs < dspfx.report(compact).before.macs
    assert_equal(compact(IMAGES), dspfx.convert(compact)(IMAGES), tolerance=0)
    graph = dspfx.channel_graph(prepared)
    assert {n for n, kind in graph.nodes(data="kind") if kind == "layer"} == {
        "backbone.0",
        "backbone.2",
        "head.conv",
        "head.out",
        "refine.0.gated",
    }
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_equal(prepared(IMAGES), twin(IMAGES), tolerance=0)
        assert twin.head.limit == -1


def test_one_budget_for_all_parts() -> None:
    _, prepared = prepared_detector()
    report = dspfx.prune(prepared, dspfx.Budget(macs=0.5))
    assert 0.3 < report.achieved <= 0.5
    after = dspfx.report(prepared)
    assert after.after.macs == report.after.macs
    assert after.before.macs == report.before.macs
    assert_equal(prepared(IMAGES), dspfx.convert(prepared)(IMAGES))


def test_trains_through_the_methods_of_its_parts() -> None:
    model, prepared = prepared_detector()
    for module in (model.train(), prepared.train()):
        module(IMAGES).backward()
    for name, parameter in prepared.named_parameters():
        theirs = model.get_parameter(name).grad
        assert (theirs is None) == (parameter.grad is None)
        if theirs is not None:
            assert_equal(theirs, parameter.grad, 1e-12)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    learner = dspfx.GroupLearner(prepared, optimizer, total_steps=2)
    learner.step(lambda: prepared(IMAGES))
    assert any(layer.gate.logits.any() for layer in gated_layers(prepared).values())


def test_a_part_answers_for_nothing_it_does_not_have() -> None:
    _, prepared = prepared_detector()
    with pytest.raises(AttributeError, match="no_such_thing"):
        prepared.head.no_such_thing  # noqa: B018


def test_a_failed_trace_leaves_nothing_behind() -> None:
    """Code that caches what it computes would otherwise keep proxies."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(4, 4, 1), None

        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return self.conv(x) if x.max() > 0 else self.conv(-x)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
            self.caching = Caching()

        def forward(self, x: Tensor) -> Tensor:
            return self.caching(self.stem(x)) if x.shape[0] else x

    prepared = dspfx.prepare(Root(), torch.randn(2, 3, 4, 4))
    assert not isinstance(prepared.caching.last, torch.fx.Proxy)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {"min_size": 64, "max_size": 96}),  # of images
        ("ssdlite320_mobilenet_v3_large", {}),
    ],
)
def test_detectors(name: str, more: dict[str, int]) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **more)
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
    prepared = dspfx.prepare(model.eval(), (images,))
    assert "backbone" in {
        n for n, m in prepared.named_modules() if isinstance(m, dspfx.PreparedModule)
    }
    dspfx.set_masks(prepared, random_masks(prepared))
    compact = dspfx.convert(prepared)
    with torch.no_grad():
        x = torch.rand(2, 3, 64, 64)
        assert_equal(prepared.backbone(x), compact.backbone(x), 1e-5)
        assert [set(d) for d in compact(images)] == [{"boxes", "labels", "scores"}] * 2


class Prior(nn.Module):
    """Its `forward` takes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.net = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 4)
        self.out = nn.Linear(4, 3)

    def forward(self) -> Tensor:
        return self.out(self.net(self.code).relu())


@pytest.mark.parametrize("computed", [True, False])
def test_children_that_take_no_inputs(computed: bool) -> None:
    """Such a graph has no input that could be overwritten; a parametrisation is such a child."""

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3)
            if computed:
                nn.utils.parametrizations.spectral_norm(self.first)
            self.prior = nn.Identity() if computed else Prior()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y if computed else y + self.prior()[:, :, None, None]
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(dspfx.DspfxError):
        dspfx.prepare(Decides(), torch.randn(2, 3, 8, 8))
