"""Models of torchaudio and MONAI."""

from typing import Any

import torch

from benchmarks.users.case import Draw, Inputs, Make, add, attribute, features, images

# MONAI: volumes of one channel


def _monai(name: str, **settings: Any) -> Make:
    return attribute("monai.networks.nets", name, **settings)


_VOLUME: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_STEPS: dict[str, Any] = {"channels": (16, 32, 48), "strides": (2, 2)}
add(
    *("monai", "volumes", images(32, 48, channels=1, dims=3)),
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
add(
    *("monai", "volumes", images(32, channels=1, dims=3)),
    unetr=_monai(
        "UNETR",
        **{"in_channels": 1, "out_channels": 2, "img_size": 32, "feature_size": 8},
        **{"hidden_size": 48, "mlp_dim": 96, "num_heads": 4},
    ),
)
add(
    *("monai", "images", images(64, 96, channels=1)),
    swin_unetr=_monai(
        "SwinUNETR",
        **{"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2},
    ),
    densenet121=_monai("DenseNet121", spatial_dims=2, in_channels=1, out_channels=2),
)


# torchaudio


def _audio(name: str, *args: Any, **settings: Any) -> Make:
    return attribute("torchaudio.models", name, *args, **settings)


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


add(
    *("torchaudio", "waves", features((2, 1, 1600), (3, 1, 2400))),
    conv_tasnet=_audio(
        "ConvTasNet",
        **{"enc_num_feats": 64, "msk_num_feats": 32, "msk_num_hidden_feats": 64},
        **{"msk_num_layers": 3, "msk_num_stacks": 2},
    ),
    wav2letter=_audio("Wav2Letter", num_classes=20),
)
add(
    *("torchaudio", "frames", _with_lengths(24, 40, 32)),
    conformer=_audio(
        "Conformer", 32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7
    ),
)
add(
    # a loop of its code runs once for every segment, so that the length is fixed
    *("torchaudio", "frames", _with_lengths(24, 24, 32, right=4)),
    emformer=_audio("Emformer", 32, 4, 64, 2, segment_length=8, right_context_length=4),
)
add(
    *("torchaudio", "frames", features((2, 1, 24, 32), (3, 1, 40, 32))),
    deepspeech=_audio("DeepSpeech", 32, n_hidden=64),
)
add(
    *("torchaudio", "frames", _speech),
    tacotron2=_audio(
        "Tacotron2",
        **{"n_mels": 20, "n_symbol": 40, "symbol_embedding_dim": 32, "encoder_embedding_dim": 32},
        **{"decoder_rnn_dim": 48, "attention_rnn_dim": 48, "attention_hidden_dim": 16},
        **{"prenet_dim": 32, "postnet_embedding_dim": 32},
    ),
)
