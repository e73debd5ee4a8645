"""Models of libraries that dspfx does not know, built from configurations; none is downloaded.

Each is small where its library lets it be, has random weights and random running statistics, and
comes with inputs of two sizes: other batches, and other images, lengths or numbers of tokens where
the model takes them.
"""

import contextlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import Case, fill

Inputs = tuple[Any, ...] | dict[str, Any]
Draw = Callable[[torch.Generator, int], Inputs]

LIBRARIES = (
    *("ultralytics", "transformers", "segmentation_models_pytorch", "monai", "torchaudio"),
    *("diffusers", "doctr", "kornia", "spandrel", "efficientnet_pytorch", "facenet_pytorch"),
)


@dataclass(frozen=True)
class UsersModel:
    """How one model is made, and what it is called with.

    Attributes:
        make: builds it, with whatever weights.
        draw: inputs of the first size, given 0, or of the second, given 1.
    """

    make: Callable[[], nn.Module]
    draw: Draw


MODELS: dict[Case, UsersModel] = {}


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


def _images(first: int, second: int = 0, channels: int = 3, dims: int = 2) -> Draw:
    """Two images of a side of `first`; three, of another height and width if there is a second."""

    def draw(generator: torch.Generator, size: int) -> Inputs:
        side = [first] * dims
        if size and second:
            side = [second] * (dims - 1) + [second if dims > 2 else second + first // 2]
        return (torch.rand(2 + size, channels, *side, generator=generator),)

    return draw


def _tokens(first: int, second: int, vocabulary: int = 100) -> Draw:
    def draw(generator: torch.Generator, size: int) -> Inputs:
        shape = 2 + size, (first, second)[size]
        ids = torch.randint(2, vocabulary, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return draw


def _features(*shapes: tuple[int, ...]) -> Draw:
    """A tensor of the first shape or of the second."""
    return lambda generator, size: (torch.rand(shapes[size], generator=generator),)


def _add(library: str, family: str, draw: Draw, **makers: Callable[[], nn.Module]) -> None:
    for name, make in makers.items():
        MODELS[Case(library, family, name)] = UsersModel(make, draw)


# ultralytics: detectors and their heads, from the descriptions that come with it


def _yolo(task: str, description: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        tasks = importlib.import_module("ultralytics.nn.tasks")
        model: nn.Module = getattr(tasks, task)(description, verbose=False)
        return model

    return make


for _version in ("v8", "11"):
    _name = f"yolo{_version}n"
    _add(
        *("ultralytics", f"YOLO{_version}", _images(64, 96)),
        **{
            _name: _yolo("DetectionModel", f"{_name}.yaml"),
            f"{_name}_seg": _yolo("SegmentationModel", f"{_name}-seg.yaml"),
            f"{_name}_pose": _yolo("PoseModel", f"{_name}-pose.yaml"),
            f"{_name}_cls": _yolo("ClassificationModel", f"{_name}-cls.yaml"),
            f"{_name}_obb": _yolo("OBBModel", f"{_name}-obb.yaml"),
        },
    )
_add("ultralytics", "YOLOv5", _images(64, 96), yolov5n=_yolo("DetectionModel", "yolov5n.yaml"))
_add("ultralytics", "YOLOv9", _images(64, 96), yolov9t=_yolo("DetectionModel", "yolov9t.yaml"))
_add("ultralytics", "YOLOv10", _images(64, 96), yolov10n=_yolo("DetectionModel", "yolov10n.yaml"))
_add("ultralytics", "YOLO12", _images(64, 96), yolo12n=_yolo("DetectionModel", "yolo12n.yaml"))
_add(
    *("ultralytics", "RT-DETR", _images(128, 160)),
    rtdetr_resnet50=_yolo("RTDETRDetectionModel", "rtdetr-resnet50.yaml"),
)


# transformers: models of two layers or so


def _hugging(name: str, /, **settings: Any) -> Callable[[], nn.Module]:
    """The model class `name`, built from a configuration of its own class."""

    def make() -> nn.Module:
        kind = getattr(importlib.import_module("transformers"), name)
        model: nn.Module = kind(kind.config_class(**settings))
        return model

    return make


_VIT: dict[str, Any] = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 128, "image_size": 32, "patch_size": 8},
}
_TEXT: dict[str, Any] = {**_VIT, "vocab_size": 100, "max_position_embeddings": 64}
for _key in ("image_size", "patch_size"):
    del _TEXT[_key]
_add(
    *("transformers", "plain transformers", _images(32)),
    vit=_hugging("ViTForImageClassification", **_VIT),
    deit=_hugging("DeiTForImageClassificationWithTeacher", **_VIT),
    beit=_hugging("BeitForImageClassification", **_VIT),
    clip_vision=_hugging("CLIPVisionModel", **_VIT),
)
# away from the size that its positions are for, so that its code takes the same branch
_add("transformers", "plain transformers", _images(48, 64), dinov2=_hugging("Dinov2Model", **_VIT))
_add(
    *("transformers", "hierarchical transformers", _images(64, 96)),
    swin=_hugging(
        "SwinForImageClassification",
        **{"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
        window_size=4,
    ),
    pvt_v2=_hugging(
        "PvtV2ForImageClassification",
        **{"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        num_attention_heads=[1, 2, 3, 4],
    ),
    cvt=_hugging(
        "CvtForImageClassification",
        **{"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    ),
    mobilevit=_hugging(
        "MobileViTForImageClassification",
        **{"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 24, 32, 48, 64, 80, 160]},
        num_attention_heads=4,
    ),
    swiftformer=_hugging("SwiftFormerForImageClassification", depths=[1, 1, 1, 1]),
    poolformer=_hugging("PoolFormerForImageClassification", depths=[1, 1, 1, 1]),
)
_add(
    *("transformers", "hierarchical transformers", _images(64)),
    pvt=_hugging(
        "PvtForImageClassification",
        **{"image_size": 64, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        num_attention_heads=[1, 2, 3, 4],
    ),
    levit=_hugging(
        "LevitForImageClassification",
        **{"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4]},
        **{"depths": [2, 2, 2], "key_dim": [16, 16, 16]},
    ),
)
_add(
    *("transformers", "convolutional", _images(64, 96)),
    convnext=_hugging(
        "ConvNextForImageClassification", hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1]
    ),
    resnet=_hugging(
        "ResNetForImageClassification",
        **{"embedding_size": 16, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 2, 2, 1]},
    ),
    regnet=_hugging(
        "RegNetForImageClassification",
        **{"hidden_sizes": [32, 48, 64, 80], "depths": [1, 2, 2, 1], "groups_width": 16},
    ),
    mobilenet_v2=_hugging("MobileNetV2ForImageClassification"),
    efficientnet=_hugging("EfficientNetForImageClassification", depth_coefficient=0.5),
    bit=_hugging(
        "BitForImageClassification",
        **{"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]},
        num_groups=8,
    ),
)
_add(
    *("transformers", "dense prediction", _images(64, 96)),
    segformer=_hugging(
        "SegformerForSemanticSegmentation",
        **{"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        decoder_hidden_size=32,
    ),
)
_add(
    *("transformers", "dense prediction", _images(32)),
    dpt=_hugging(
        "DPTForDepthEstimation",
        **{**_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
        **{"neck_hidden_sizes": [16, 24, 32, 48], "fusion_hidden_size": 32, "is_hybrid": False},
    ),
    yolos=_hugging(
        "YolosForObjectDetection", **{**_VIT, "image_size": [32, 32]}, num_detection_tokens=10
    ),
)


def _upernet() -> nn.Module:
    library = importlib.import_module("transformers")
    backbone = library.ConvNextConfig(
        **{"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    settings = library.UperNetConfig(
        backbone_config=backbone, hidden_size=32, auxiliary_channels=16, auxiliary_in_channels=48
    )
    model: nn.Module = library.UperNetForSemanticSegmentation(settings)
    return model


def _detr() -> nn.Module:
    library = importlib.import_module("transformers")
    backbone = library.ResNetConfig(
        **{"embedding_size": 16, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 1, 1, 1]},
        out_features=["stage4"],
    )
    settings = library.DetrConfig(
        **{"backbone_config": backbone, "use_timm_backbone": False, "d_model": 64},
        **{"encoder_layers": 1, "decoder_layers": 1, "num_queries": 10, "backbone": None},
        **{"encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    )
    model: nn.Module = library.DetrForObjectDetection(settings)
    return model


_add("transformers", "dense prediction", _images(64, 96), upernet=_upernet, detr=_detr)
_add(
    *("transformers", "text", _tokens(12, 20)),
    bert=_hugging("BertForSequenceClassification", **_TEXT),
    distilbert=_hugging(
        "DistilBertForSequenceClassification",
        **{"vocab_size": 100, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
        max_position_embeddings=64,
    ),
)
_WAVES: dict[str, Any] = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 96, "conv_dim": [32, 32, 48], "conv_stride": [5, 2, 2]},
    **{"conv_kernel": [10, 3, 3], "num_conv_pos_embeddings": 16},
    **{"num_conv_pos_embedding_groups": 4, "vocab_size": 20},
}
_add(
    *("transformers", "sound", _features((2, 1600), (3, 2200))),
    wav2vec2=_hugging("Wav2Vec2ForCTC", **_WAVES),
)
_add(
    *("transformers", "sound", _features((2, 64, 16), (3, 64, 16))),
    ast=_hugging("ASTForAudioClassification", **_VIT, max_length=64, num_mel_bins=16),
)


def _whisper() -> nn.Module:
    library = importlib.import_module("transformers")
    settings = library.WhisperConfig(
        **{"d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 4},
        **{"encoder_ffn_dim": 96, "num_mel_bins": 16, "max_source_positions": 32},
    )
    kind = importlib.import_module("transformers.models.whisper.modeling_whisper").WhisperEncoder
    model: nn.Module = kind(settings)
    return model


_add("transformers", "sound", _features((2, 16, 64), (3, 16, 64)), whisper_encoder=_whisper)


# segmentation_models_pytorch: every decoder


def _smp(name: str, encoder: str = "resnet18") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = getattr(importlib.import_module("segmentation_models_pytorch"), name)
        model: nn.Module = kind(encoder, encoder_weights=None, classes=3)
        return model

    return make


_add(
    *("segmentation_models_pytorch", "decoders", _images(64, 96)),
    **{
        name.lower(): _smp(name)
        for name in (
            *("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3Plus", "Linknet", "MAnet"),
            *("Segformer", "UPerNet"),
        )
    },
)
_add("segmentation_models_pytorch", "decoders", _images(128, 192), pan=_smp("PAN"))
_add(
    *("segmentation_models_pytorch", "encoders", _images(64, 96)),
    unet_efficientnet_b0=_smp("Unet", "efficientnet-b0"),
    unet_mit_b0=_smp("Unet", "mit_b0"),
)


# MONAI: volumes of one channel


def _monai(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module("monai.networks.nets"), name)(**settings)
        return model

    return make


_VOLUME: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_STEPS: dict[str, Any] = {"channels": (16, 32, 48), "strides": (2, 2)}
_add(
    *("monai", "volumes", _images(32, 48, channels=1, dims=3)),
    monai_unet=_monai("UNet", **_VOLUME, **_STEPS, num_res_units=2),
    basic_unet=_monai("BasicUNet", **_VOLUME, features=(16, 16, 24, 32, 40, 16)),
    segresnet=_monai("SegResNet", **_VOLUME, init_filters=16, blocks_down=(1, 1, 2, 2)),
    dynunet=_monai(
        "DynUNet",
        **_VOLUME,
        **{"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
        filters=[16, 32, 48],
    ),
    attention_unet=_monai("AttentionUnet", **_VOLUME, **_STEPS),
    vnet=_monai("VNet", **_VOLUME),
    highresnet=_monai("HighResNet", **_VOLUME),
)
_add(
    *("monai", "volumes", _images(32, channels=1, dims=3)),
    unetr=_monai(
        "UNETR",
        **{"in_channels": 1, "out_channels": 2, "img_size": 32, "feature_size": 8},
        **{"hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
    ),
)
_add(
    *("monai", "images", _images(64, 96, channels=1)),
    swin_unetr=_monai(
        "SwinUNETR",
        **{"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2},
    ),
    densenet121=_monai("DenseNet121", spatial_dims=2, in_channels=1, out_channels=2),
)


# torchaudio


def _audio(name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module("torchaudio.models"), name)(
            *args, **settings
        )
        return model

    return make


def _with_lengths(first: int, second: int, features: int, right: int = 0) -> Draw:
    def draw(generator: torch.Generator, size: int) -> Inputs:
        length = (first, second)[size]
        frames = torch.rand(2 + size, length + right, features, generator=generator)
        return frames, torch.tensor([length, length - 4, length][: 2 + size])

    return draw


def _speech(generator: torch.Generator, size: int) -> Inputs:
    text, frames = (10, 14)[size], (12, 20)[size]
    lengths = torch.tensor([text, text - 2, text - 3][: 2 + size])
    return {
        "tokens": torch.randint(0, 40, (2 + size, text), generator=generator),
        "token_lengths": lengths,
        "mel_specgram": torch.rand(2 + size, 20, frames, generator=generator),
        "mel_specgram_lengths": torch.full_like(lengths, frames),
    }


_add(
    *("torchaudio", "waves", _features((2, 1, 1600), (3, 1, 2400))),
    conv_tasnet=_audio(
        "ConvTasNet",
        **{"enc_num_feats": 64, "msk_num_feats": 32, "msk_num_hidden_feats": 64},
        **{"msk_num_layers": 3, "msk_num_stacks": 2},
    ),
    wav2letter=_audio("Wav2Letter", num_classes=20),
)
_add(
    *("torchaudio", "frames", _with_lengths(24, 40, 32)),
    conformer=_audio(
        "Conformer", 32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7
    ),
)
_add(
    # a loop of its code runs once for every segment, so that the length is fixed
    *("torchaudio", "frames", _with_lengths(24, 24, 32, right=4)),
    emformer=_audio("Emformer", 32, 4, 64, 2, segment_length=8, right_context_length=4),
)
_add(
    *("torchaudio", "frames", _features((2, 1, 24, 32), (3, 1, 40, 32))),
    deepspeech=_audio("DeepSpeech", 32, n_hidden=64),
)
_add(
    *("torchaudio", "frames", _speech),
    tacotron2=_audio(
        "Tacotron2",
        **{"n_mels": 20, "n_symbol": 40, "symbol_embedding_dim": 32, "encoder_embedding_dim": 32},
        **{"decoder_rnn_dim": 48, "attention_rnn_dim": 48, "attention_hidden_dim": 16},
        **{"prenet_dim": 32, "postnet_embedding_dim": 32},
    ),
)


# diffusers


def _diffusers(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module("diffusers"), name)(**settings)
        return model

    return make


_CODER: dict[str, Any] = {
    **{"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4},
    **{
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
}


def _noisy(generator: torch.Generator, size: int) -> Inputs:
    side = (16, 24)[size]
    image = torch.rand(2 + size, 3, side, side, generator=generator)
    return image, torch.tensor([3, 500, 17][: 2 + size])


_add(
    *("diffusers", "denoising", _noisy),
    unet2d=_diffusers(
        "UNet2DModel",
        **{"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8},
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
)
_add(
    *("diffusers", "autoencoders", _images(32, 48)),
    autoencoder_kl=_diffusers("AutoencoderKL", **_CODER),
    vq_model=_diffusers("VQModel", **_CODER),
    autoencoder_tiny=_diffusers(
        "AutoencoderTiny",
        **{"encoder_block_out_channels": (16, 16, 16, 16), "num_encoder_blocks": (1, 1, 1, 1)},
        **{"decoder_block_out_channels": (16, 16, 16, 16), "num_decoder_blocks": (1, 1, 1, 1)},
    ),
)


# doctr, kornia, spandrel, efficientnet_pytorch, facenet_pytorch


def _doctr(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module("doctr.models"), name)(
            pretrained=False, **settings
        )
        return model

    return make


_TEXT_LINES = _features((2, 3, 32, 128), (3, 3, 32, 128))
# exportable: the maps, without the boxes that numpy finds in them
_WITHOUT = {"pretrained_backbone": False, "exportable": True}
_add(
    *("doctr", "text detection", _images(64, 96)),
    db_resnet34=_doctr("db_resnet34", **_WITHOUT),
    linknet_resnet18=_doctr("linknet_resnet18", **_WITHOUT),
    fast_tiny=_doctr("fast_tiny", **_WITHOUT),
)
_add(
    *("doctr", "text recognition", _TEXT_LINES),
    crnn_mobilenet_v3_small=_doctr("crnn_mobilenet_v3_small", **_WITHOUT),
    vitstr_small=_doctr("vitstr_small", **_WITHOUT),
)


def _attribute(module: str, name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), name)(*args, **settings)
        return model

    return make


_add(
    *("kornia", "descriptors", _images(32, channels=1)),
    **{
        name.lower(): _attribute("kornia.feature", name, pretrained=False)
        for name in ("HardNet", "SOSNet", "HyNet")
    },
)
_add(
    *("kornia", "edges", _images(64, 96)),
    dexined=_attribute("kornia.models.dexined", "DexiNed", pretrained=False),
)
_add(
    *("kornia", "small images", _images(64)),
    tiny_vit=_attribute(
        *("kornia.models.tiny_vit", "TinyViT"),
        **{"img_size": 64, "embed_dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        **{"num_heads": [1, 2, 3, 4], "window_sizes": [4, 4, 4, 2]},
    ),
)


def _spandrel(module: str, name: str, **settings: Any) -> Callable[[], nn.Module]:
    return _attribute(f"spandrel.architectures.{module}", name, **settings)


_add(
    *("spandrel", "super-resolution", _images(16, 24)),
    esrgan=_spandrel("ESRGAN.__arch.RRDB", "RRDBNet", num_filters=16, num_blocks=2),
    compact=_spandrel("Compact.__arch.SRVGG", "SRVGGNetCompact", num_feat=24, num_conv=4),
    span=_spandrel(
        "SPAN.__arch.span", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=24, upscale=2
    ),
    swinir=_spandrel(
        "SwinIR.__arch.SwinIR",
        "SwinIR",
        **{"img_size": 8, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2]},
        **{"window_size": 8, "upscale": 2, "upsampler": "pixelshuffle"},
    ),
    rcan=_spandrel(
        *("RCAN.__arch.rcan_arch", "RCAN"),
        **{"scale": 2, "n_resgroups": 2, "n_resblocks": 2, "n_feats": 32},
    ),
)
_add(
    *("spandrel", "restoration", _images(32, 48)),
    dncnn=_spandrel("DnCNN.__arch.network_dncnn", "DnCNN", in_nc=3, out_nc=3, nc=24, nb=6),
    nafnet=_spandrel(
        "NAFNet.__arch.NAFNet_arch",
        "NAFNet",
        **{"width": 16, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    ),
)
_add(
    *("efficientnet_pytorch", "EfficientNet", _images(64, 96)),
    efficientnet_b0=lambda: importlib.import_module("efficientnet_pytorch").EfficientNet.from_name(
        "efficientnet-b0"
    ),
)
_add(
    *("facenet_pytorch", "faces", _images(160, 192)),
    inception_resnet_v1=_attribute(
        "facenet_pytorch", "InceptionResnetV1", pretrained=None, classify=True, num_classes=10
    ),
)
