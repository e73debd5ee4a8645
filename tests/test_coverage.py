"""A sample of the models that `benchmarks.coverage` examines in full."""

import math
from typing import Any

import pytest
import torch

from benchmarks.coverage import outcome_of
from benchmarks.zoo import Case, timm_cases, torchvision_cases

SAMPLE = (
    *("mnasnet0_5", "convnext_tiny", "lraspp_mobilenet_v3_large", "mobilenet_v3_large", "r3d_18"),
    *(
        "raft_small",
        "quantized_shufflenet_v2_x0_5",
        "swin_t",
        "regnet_x_400mf",
        "retinanet_resnet50_fpn",
    ),
    *("starnet_s050", "mobilenetv3_small_050", "test_byobnet", "test_nfnet", "test_coatnet"),
    *("test_convnext", "test_mambaout", "test_vit", "ghostnet_050", "iformer_t", "mobilevit_xxs"),
    *("hgnetv2_b0", "inception_next_atto", "skresnet18", "dla46x_c", "swiftformer_xs"),
    *("efficientvit_b0", "convit_tiny", "regnetx_002", "cs3darknet_focus_s", "hrnet_w18_small"),
    *("poolformerv2_s12", "ese_vovnet19b_slim_dw", "edgenext_xx_small", "rexnet_100"),
    *("tiny_vit_5m_224", "resnest14d", "levit_128s", "xcit_nano_12_p8_224", "test_resnet"),
)
# less than in the benchmark, where these take longest: a short clip, two updates of the flow, and
# images of half the height and width where networks take any
IMAGES = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
CLIP = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
ANY_SIZE = (
    *("starnet_s050", "xcit_nano_12_p8_224", "hrnet_w18_small", "skresnet18", "rexnet_100"),
    *("mobilevit_xxs", "ghostnet_050", "swiftformer_xs", "poolformerv2_s12", "iformer_t"),
    *("inception_next_atto", "hgnetv2_b0", "regnetx_002", "resnest14d", "efficientvit_b0"),
    *("edgenext_xx_small", "dla46x_c", "cs3darknet_focus_s", "ese_vovnet19b_slim_dw"),
)
INPUTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(ANY_SIZE, (IMAGES[..., :64, :64],)),
    "r3d_18": (CLIP,),
    "raft_small": (IMAGES, IMAGES.flip(3), 2),
}
CASES = {case.name: case for case in torchvision_cases() + timm_cases()}


def test_the_sample_is_of_forty_and_the_whole_is_whole() -> None:
    assert len(SAMPLE) == len(set(SAMPLE)) == 40
    assert len(torchvision_cases()) >= 121
    assert len(timm_cases()) >= 98


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [CASES[name] for name in SAMPLE], ids=lambda case: case.name)
def test_masked_equals_compact(case: Case) -> None:
    outcome = outcome_of(case, INPUTS.get(case.name))
    assert outcome.double <= 1e-9
    assert outcome.single <= 1e-4
    assert outcome.status == "ok" or outcome.why
    # attention alone has no convolution but the one that reads the image
    attention = ("test_vit", "convit_tiny", "swin_t")
    if case.name not in attention:
        assert outcome.prunable > 0.2
    # what attention computes stays; Swin's projections are part of it
    assert outcome.kept < (0.9 if case.name in attention else 0.8)
    assert not math.isnan(outcome.kept)
