"""Models of transformers, of two layers or so, and of diffusers."""

import importlib
from typing import Any

import torch
from torch import nn

from benchmarks.users.case import Inputs, Make, add, attribute, features, images, tokens

# transformers: models of two layers or so


def _hugging(name: str, /, **settings: Any) -> Make:
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
add(
    *("transformers", "plain transformers", images(32)),
    vit=_hugging("ViTForImageClassification", **_VIT),
    deit=_hugging("DeiTForImageClassificationWithTeacher", **_VIT),
    beit=_hugging("BeitForImageClassification", **_VIT),
    clip_vision=_hugging("CLIPVisionModel", **_VIT),
)
# away from the size that its positions are for, so that its code takes the same branch
add("transformers", "plain transformers", images(48, 64), dinov2=_hugging("Dinov2Model", **_VIT))
add(
    *("transformers", "hierarchical transformers", images(64, 96)),
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
add(
    *("transformers", "hierarchical transformers", images(64)),
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
add(
    *("transformers", "convolutional", images(64, 96)),
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
add(
    *("transformers", "dense prediction", images(64, 96)),
    segformer=_hugging(
        "SegformerForSemanticSegmentation",
        **{"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
        decoder_hidden_size=32,
    ),
)
add(
    *("transformers", "dense prediction", images(32)),
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


add("transformers", "dense prediction", images(64, 96), upernet=_upernet, detr=_detr)
add(
    *("transformers", "text", tokens(12, 20)),
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
add(
    *("transformers", "sound", features((2, 1600), (3, 2200))),
    wav2vec2=_hugging("Wav2Vec2ForCTC", **_WAVES),
)
add(
    *("transformers", "sound", features((2, 64, 16), (3, 64, 16))),
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


add("transformers", "sound", features((2, 16, 64), (3, 16, 64)), whisper_encoder=_whisper)


# diffusers


def _diffusers(name: str, **settings: Any) -> Make:
    return attribute("diffusers", name, **settings)


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


add(
    *("diffusers", "denoising", _noisy),
    unet2d=_diffusers(
        "UNet2DModel",
        **{"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8},
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
)
add(
    *("diffusers", "autoencoders", images(32, 48)),
    autoencoder_kl=_diffusers("AutoencoderKL", **_CODER),
    vq_model=_diffusers("VQModel", **_CODER),
    autoencoder_tiny=_diffusers(
        "AutoencoderTiny",
        **{"encoder_block_out_channels": (16, 16, 16, 16), "num_encoder_blocks": (1, 1, 1, 1)},
        **{"decoder_block_out_channels": (16, 16, 16, 16), "num_decoder_blocks": (1, 1, 1, 1)},
    ),
)
