"""`save` and `load`: bit for bit, on a new module; what does not fit changes nothing."""

import copy
import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from detector import IMAGES, Detector
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import MODELS, Detections
from safetensors import safe_open
from safetensors.torch import save_file
from small import Small, X, pruned
from test_properties import COST_MODELS, inputs, prepare
from torch import Tensor, nn
from unusual import RULES, Squash, Unusual

import dspfx
from dspfx.passes.lowering.forms import dense
from dspfx.passes.lowering.sites import relowered, sites
from dspfx.storage import container as archive
from dspfx.storage import example_inputs as stored_inputs
from helpers import assert_equal, randomise, unchanged
from random_networks import MaskRecipe, mask_recipes, networks

DATA = Path(__file__).parents[1] / "data"


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    state, other = a.state_dict(), b.state_dict()
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.stride() == other[name].stride()
        assert torch.equal(tensor, other[name]), name


def round_trip(model: nn.Module, fresh: nn.Module, path: Path, **options: Any) -> nn.Module:
    """What is loaded of `model`, after it was compared with it, and saved again."""
    file, again = path / "model.safetensors", path / "again.safetensors"
    dspfx.save(model, file)
    with unchanged(fresh):
        loaded = dspfx.load(file, fresh, **options)
    assert_same_state(model, loaded)
    assert str(dspfx.report(loaded)) == str(dspfx.report(model))
    assert loaded.training == model.training
    dspfx.save(loaded, again)
    assert again.read_bytes() == file.read_bytes()
    return loaded


@pytest.mark.parametrize("kind", MODELS)
def test_awkward_models(kind: type[nn.Module], tmp_path: Path) -> None:
    prepared = pruned(kind().double(), MODELS[kind])
    compact = dspfx.convert(prepared, verify=False)
    others = dspfx.convert(prepared, verify=False, cost_model=dspfx.FEWEST_WEIGHTS)
    for model in (prepared, compact, others):
        loaded = round_trip(model, kind(), tmp_path)
        assert type(loaded).__name__ == type(model).__name__
        assert loaded.code == model.code
        assert_equal(model(*model.example_inputs), loaded(*model.example_inputs), tolerance=0)


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "googlenet", "shufflenet_v2_x0_5", "convnext_atto"]
)
def test_models_of_torchvision_and_timm(name: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        if name == "convnext_atto":
            return timm.create_model(name, num_classes=5)
        options = {"init_weights": True} if name == "googlenet" else {}
        return torchvision.models.get_model(name, num_classes=5, **options)

    x = torch.randn(2, 3, 48, 48)
    prepared = pruned(make().eval(), x)
    for model in (prepared, dspfx.convert(prepared, verify=False)):
        loaded = round_trip(model, make(), tmp_path)
        with torch.no_grad():
            assert_equal(model(x), loaded(x), tolerance=0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=networks(),
    recipe=mask_recipes(),
    groups=st.integers(1, 4),
    cost_model=st.sampled_from(COST_MODELS),
)
def test_random_networks(
    model: nn.Module, recipe: MaskRecipe, groups: int, cost_model: dspfx.CostModel
) -> None:
    prepared = prepare(model, groups)
    if prepared is None:
        return
    dspfx.set_masks(prepared, recipe.masks(prepared))
    compact = dspfx.convert(prepared, verify=False, cost_model=cost_model)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(0.25)
    for saved in (prepared, compact):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            loaded = round_trip(saved, fresh, Path(folder))
            assert_equal(saved(inputs(model)), loaded(inputs(model)), tolerance=0)


def test_work_goes_on_with_what_was_loaded(tmp_path: Path) -> None:
    prepared = pruned(Small()).train()
    loaded = round_trip(prepared, Small(), tmp_path)
    assert_same_state(dspfx.convert(prepared), dspfx.convert(loaded))
    reports = [dspfx.prune(model, dspfx.Budget(macs=0.4)) for model in (prepared, loaded)]
    assert reports[0] == reports[1]
    for model in (prepared, loaded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learner = dspfx.GroupLearner(model, optimizer, total_steps=2)
        torch.manual_seed(0)
        learner.step(lambda model=model: model(X).square().mean())
    assert_same_state(prepared, loaded)


def test_a_compact_model_that_was_trained_further_in_another_type(tmp_path: Path) -> None:
    compact = dspfx.convert(pruned(Small()))
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.add_(torch.randn_like(parameter))
    compact.double().to(memory_format=torch.channels_last)
    loaded = round_trip(compact, Small(), tmp_path)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 13, 9, dtype=torch.float64)
        assert_equal(compact(x), loaded(x), tolerance=0)


def test_models_in_parts(tmp_path: Path) -> None:
    prepared = pruned(Detector().double(), (IMAGES,), groups=2)
    for model in (prepared, dspfx.convert(prepared)):
        loaded = round_trip(model, Detector(), tmp_path)
        assert type(loaded) is Detector
        assert_equal(model(IMAGES), loaded(IMAGES), tolerance=0)
        assert loaded.head.limit == -1


def test_rules_are_passed_again(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    compact = dspfx.convert(pruned(Unusual().double(), x, rules=RULES))
    loaded = round_trip(compact, Unusual(), tmp_path, rules=RULES)
    assert_equal(compact(x), loaded(x), tolerance=0)
    file = tmp_path / "model.safetensors"
    with pytest.raises(dspfx.LoadError, match=r"with rules for .*Squash.* pass the same ones"):
        dspfx.load(file, Unusual())
    with pytest.raises(dspfx.LoadError, match="pass the same ones"):
        dspfx.load(file, Unusual(), rules=RULES | {Squash: "elementwise"})


def test_opaque_and_ignored_modules_need_not_be_named_again(tmp_path: Path) -> None:
    model = pruned(Small(), ignore=("a",), opaque=(nn.BatchNorm2d,), layers=(nn.Conv2d,))
    for saved in (model, dspfx.convert(model)):
        loaded = round_trip(saved, Small(), tmp_path)
        assert_equal(saved(X), loaded(X), tolerance=0)


def test_where_channels_go_is_restored_before_the_plan_is_used(tmp_path: Path) -> None:
    """A new module draws another permutation, for which the plan would be wrong."""

    class Shuffles(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("permutation", torch.randperm(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.b(self.stem(x)[:, self.permutation])).mean((2, 3)))

    prepared = pruned(Shuffles())
    for model in (prepared, dspfx.convert(prepared)):
        loaded = round_trip(model, Shuffles(), tmp_path)
        assert_equal(model(X), loaded(X), tolerance=0)


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    class Shares(Small):
        def __init__(self, share: bool = True) -> None:
            super().__init__()
            if share:
                self.b.weight = self.a.weight

    model = pruned(Shares())
    loaded = round_trip(model, Shares(), tmp_path)
    assert loaded.get_parameter("b.weight") is loaded.get_parameter("a.weight")
    with pytest.raises(dspfx.LoadError, match="shares other tensors"):
        dspfx.load(tmp_path / "model.safetensors", Shares(share=False))


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    """Read without dspfx: the weights of the compact model by the numbers of their channels."""
    prepared = pruned(Small(), groups=2)
    compact = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
    dspfx.save(compact, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        plan = json.loads(file.metadata()["dspfx"])["plan"]
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert (plan["format"], plan["torch"], plan["dspfx"]) == (
        archive.FORMAT,
        torch.__version__,
        "0.1.0",
    )
    (part,) = plan["parts"]
    for name, mask in dspfx.get_masks(prepared).items():
        record = part["masks"][name]
        assert record["groups"] == prepared.get_submodule(name).gate.assignment.tolist()
        for row, number in zip(mask, record["reads"], strict=True):
            assert row.nonzero().flatten().tolist() == (
                [] if number < 0 else record["lists"][number]
            )
    compaction = part["compaction"]
    layer, lists = compaction["layers"]["a"], compaction["channels"]
    assert compaction["holds"]["a"] == layer["filters"]
    whole = prepared.get_submodule("a").masked()[0]
    for number, group in enumerate(layer["parts"]):
        ((filters,), (inputs,)) = group["filters"], group["inputs"]
        filters = [lists[layer["filters"]][i] for i in filters]
        inputs = [lists[layer["inputs"]][i] for i in inputs]
        assert torch.equal(weights[f"a.{number}.weight"], whole[filters][:, inputs])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Small(width=6), r"is `a = call_module a: Conv2d\(6, 6|is `stem_0 = .*Conv2d\(3, 6"),
        (Small(mode="circular"), r"padding_mode=circular.* and was .*padding=\(1, 1\)\)"),
        (Small(act=nn.SiLU), "SiLU.* and was .*ReLU"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), "its graph differs"),
        (nn.Linear(10, 3), "cannot be prepared as it was: .* no layer to prune"),
        (nn.Conv2d(5, 5, 1), "expected input"),
        (Small().to("meta"), "on the meta device"),
        (dspfx.prepare(Small(), X), "as it was before dspfx.prepare"),
    ],
)
@pytest.mark.parametrize("compact", [False, True])
def test_other_models_are_refused(
    other: nn.Module, words: str, compact: bool, tmp_path: Path
) -> None:
    model = pruned(Small())
    dspfx.save(dspfx.convert(model) if compact else model, tmp_path / "m")
    with pytest.raises(dspfx.LoadError, match=words) as caught:
        dspfx.load(tmp_path / "m", other)
    assert "as it was" in str(caught.value) or "construct it" in str(caught.value)


class Scaled(nn.Module):
    """Cannot be traced, and finds out what `size` is when it is first called."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.size = factor, None

    def forward(self, x: Tensor) -> Tensor:
        self.size = self.size or x.shape[-1]
        return x * self.factor if x.isfinite().all() else x


class Attending(nn.Module):
    """Runs `layer` on the pixels of the first convolution."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.layer(pixels).transpose(1, 2).unflatten(2, (8, 8)))


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 1))


def encoder(heads: int = 2, norm_first: bool = False, act: Any = torch.relu) -> nn.Module:
    return Attending(nn.TransformerEncoderLayer(8, heads, 16, 0.0, act, norm_first=norm_first))


OTHER_SETTINGS = {  # what `extra_repr` does not show
    "count_include_pad": [lambda v: between(nn.AvgPool2d(3, 1, 1, False, v)), True, False],
    "divisor_override": [lambda v: between(nn.AvgPool2d(3, divisor_override=v)), None, 5],
    "align_corners": [lambda v: between(nn.Upsample(9, None, "bilinear", v)), False, True],
    "num_heads": [lambda v: encoder(heads=v), 2, 4],
    "norm_first": [lambda v: encoder(norm_first=v), False, True],
    "activation": [lambda v: encoder(act=v), torch.relu, torch.sigmoid],
    "factor": [lambda v: between(Scaled(v)), 1.0, 3.0],
}


@pytest.mark.parametrize("attribute", OTHER_SETTINGS)
@pytest.mark.parametrize("compact", [False, True])
def test_other_settings_are_refused(attribute: str, compact: bool, tmp_path: Path) -> None:
    build, value, other = OTHER_SETTINGS[attribute]
    model = pruned(build(value))
    model = dspfx.convert(model) if compact else model
    dspfx.save(model, tmp_path / "m")
    assert torch.equal(dspfx.load(tmp_path / "m", build(value))(X), model(X))
    with pytest.raises(dspfx.LoadError, match=f"has {attribute}=.* and had .*as it was"):
        dspfx.load(tmp_path / "m", build(other))


class Stateful(Small):
    def get_extra_state(self) -> Any:
        return {"epoch": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class TakesRecord(Small):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x.boxes)


def test_what_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compact = dspfx.convert(pruned(Small(), groups=2), cost_model=dspfx.FEWEST_WEIGHTS)
    (site,) = [s for s in sites(compact, (X,)) if len(s.groups) > 1 and s.name == "a"]
    cases: list[tuple[Any, type[Exception], str]] = [
        (Small(), dspfx.ConvertError, "call dspfx.prepare"),
        ((lambda x: x), dspfx.SaveError, "compile again after loading"),
        (
            relowered(compact, {site: site.emit(dense(site.groups))}),
            dspfx.SaveError,
            "emitted them again",
        ),
        (nn.Sequential(dspfx.prepare(Small(), X), Stateful()), dspfx.SaveError, "no tensor"),
        (dspfx.prepare(TakesRecord(), Detections(X, X)), dspfx.SaveError, "hold a Detections"),
        (dspfx.prepare(Small(), X), dspfx.SaveError, "600 elements.* fewer samples"),
    ]
    for model, error, words in cases:
        if "fewer" in words:
            monkeypatch.setattr(stored_inputs, "MOST_ELEMENTS", 599)
        with pytest.raises(error, match=words):
            dspfx.save(model, tmp_path / "m")
        assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.safetensors"
    dspfx.save(pruned(Small()), file)
    before = file.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(archive, "save_file", full)
    with pytest.raises(dspfx.SaveError, match="No space left"):
        dspfx.save(pruned(Small(width=6)), file)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
    with pytest.raises(dspfx.SaveError, match="cannot be written"):
        dspfx.save(pruned(Small()), tmp_path / "no such folder" / "m")


def test_the_longest_name_is_the_systems(tmp_path: Path) -> None:
    model = pruned(Small())
    dspfx.save(model, tmp_path / ("m" * 255))
    with pytest.raises(dspfx.SaveError, match=r"cannot be written: .*too long"):
        dspfx.save(model, tmp_path / ("m" * 256))
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


@pytest.mark.parametrize("number", range(1, archive.FORMAT + 1))
def test_formats(number: int) -> None:
    """A file of every format there was is kept, and loads."""
    loaded = dspfx.load(DATA / f"format_{number}.safetensors", Small())
    assert isinstance(loaded, dspfx.CompactModule)
    expected = torch.tensor(json.loads((DATA / "format_1.json").read_text()))
    assert_equal(expected, loaded(torch.linspace(-1, 1, 600).reshape(2, 3, 10, 10)), 1e-5)


def test_a_later_format_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    dspfx.save(pruned(Small()), file)
    found = archive.read(file, 2**30)
    archive.write(
        file, archive.Archive({**found.plan, "format": archive.FORMAT + 1, "new": 1}, found.tensors)
    )
    with pytest.raises(dspfx.LoadError, match=rf"has format {archive.FORMAT + 1}.*update dspfx"):
        dspfx.load(file, Small())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(dspfx.LoadError, match=r"there is no file .*nothing"):
        dspfx.load(tmp_path / "nothing", Small())
    save_file({"a": X}, tmp_path / "plain")
    (tmp_path / "empty").touch()
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with (tmp_path / "large").open("r+b") as file:
        file.truncate(2**40)
    for name in ("plain", "empty", "pickle", "folder", "large", "missing", "folder/../missing"):
        with pytest.raises(dspfx.LoadError, match=name.rpartition("/")[2]):
            dspfx.load(tmp_path / name, Small())


def test_the_callers_randomness_is_left_alone(tmp_path: Path) -> None:
    compact, fresh = dspfx.convert(pruned(Small())), Small()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    dspfx.save(compact, tmp_path / "m")
    dspfx.load(tmp_path / "m", fresh)
    assert torch.equal(torch.get_rng_state(), state)


def test_lines_of_source_may_move(tmp_path: Path) -> None:
    """What a check of sizes says names a line: it was part of the graph that has to be the same."""
    code = """
import torch
class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(4, 4, 1) for _ in range(3))
    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        if y.shape[2] > 4:
            y = torch.relu(y)
        return self.c(y)
"""

    def model(text: str, name: str) -> nn.Module:
        (tmp_path / f"{name}.py").write_text(text)
        return randomise(runpy.run_path(str(tmp_path / f"{name}.py"))["Branches"]())

    x = torch.randn(2, 4, 6, 6)
    prepared = dspfx.prepare(model(code, "before"), x).eval()
    for module in (prepared, dspfx.convert(prepared)):
        dspfx.save(module, tmp_path / "saved.dspfx")
        loaded = dspfx.load(tmp_path / "saved.dspfx", model(f"# moved\n{code}", "behind"))
        assert_equal(module(x), loaded(x), 0)
        with pytest.raises(AssertionError, match=r"behind.py:10: if y.shape"):
            loaded(x[..., :4, :4])
