"""Detectors, segmentation, recognition of text, descriptors, restoration of images."""

import importlib
from typing import Any

from benchmarks.users.case import Make, add, attribute, features, images

# ultralytics: detectors and their heads, from the descriptions that come with it


def _yolo(task: str, description: str) -> Make:
    return attribute("ultralytics.nn.tasks", task, description, verbose=False)


for _version in ("v8", "11"):
    _name = f"yolo{_version}n"
    add(
        *("ultralytics", f"YOLO{_version}", images(64, 96)),
        **{
            _name: _yolo("DetectionModel", f"{_name}.yaml"),
            f"{_name}_seg": _yolo("SegmentationModel", f"{_name}-seg.yaml"),
            f"{_name}_pose": _yolo("PoseModel", f"{_name}-pose.yaml"),
            f"{_name}_cls": _yolo("ClassificationModel", f"{_name}-cls.yaml"),
            f"{_name}_obb": _yolo("OBBModel", f"{_name}-obb.yaml"),
        },
    )
add("ultralytics", "YOLOv5", images(64, 96), yolov5n=_yolo("DetectionModel", "yolov5n.yaml"))
add("ultralytics", "YOLOv9", images(64, 96), yolov9t=_yolo("DetectionModel", "yolov9t.yaml"))
add("ultralytics", "YOLOv10", images(64, 96), yolov10n=_yolo("DetectionModel", "yolov10n.yaml"))
add("ultralytics", "YOLO12", images(64, 96), yolo12n=_yolo("DetectionModel", "yolo12n.yaml"))
add(
    *("ultralytics", "RT-DETR", images(128, 160)),
    rtdetr_resnet50=_yolo("RTDETRDetectionModel", "rtdetr-resnet50.yaml"),
)


# segmentation_models_pytorch: every decoder


def _smp(name: str, encoder: str = "resnet18") -> Make:
    return attribute("segmentation_models_pytorch", name, encoder, encoder_weights=None, classes=3)


add(
    *("segmentation_models_pytorch", "decoders", images(64, 96)),
    **{
        name.lower(): _smp(name)
        for name in (
            *("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3Plus", "Linknet", "MAnet"),
            *("Segformer", "UPerNet"),
        )
    },
)
add("segmentation_models_pytorch", "decoders", images(128, 192), pan=_smp("PAN"))
add(
    *("segmentation_models_pytorch", "encoders", images(64, 96)),
    unet_efficientnet_b0=_smp("Unet", "efficientnet-b0"),
    unet_mit_b0=_smp("Unet", "mit_b0"),
)


# doctr, kornia, spandrel, efficientnet_pytorch, facenet_pytorch


def _doctr(name: str, **settings: Any) -> Make:
    return attribute("doctr.models", name, pretrained=False, **settings)


_TEXT_LINES = features((2, 3, 32, 128), (3, 3, 32, 128))
# exportable: the maps, without the boxes that numpy finds in them
_WITHOUT = {"pretrained_backbone": False, "exportable": True}
add(
    *("doctr", "text detection", images(64, 96)),
    db_resnet34=_doctr("db_resnet34", **_WITHOUT),
    linknet_resnet18=_doctr("linknet_resnet18", **_WITHOUT),
    fast_tiny=_doctr("fast_tiny", **_WITHOUT),
)
add(
    *("doctr", "text recognition", _TEXT_LINES),
    crnn_mobilenet_v3_small=_doctr("crnn_mobilenet_v3_small", **_WITHOUT),
    vitstr_small=_doctr("vitstr_small", **_WITHOUT),
)


add(
    *("kornia", "descriptors", images(32, channels=1)),
    **{
        name.lower(): attribute("kornia.feature", name, pretrained=False)
        for name in ("HardNet", "SOSNet", "HyNet")
    },
)
add(
    *("kornia", "edges", images(64, 96)),
    dexined=attribute("kornia.models.dexined", "DexiNed", pretrained=False),
)
add(
    *("kornia", "small images", images(64)),
    tiny_vit=attribute(
        *("kornia.models.tiny_vit", "TinyViT"),
        **{"img_size": 64, "embed_dims": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        **{"num_heads": [1, 2, 3, 4], "window_sizes": [4, 4, 4, 2]},
    ),
)


def _spandrel(module: str, name: str, **settings: Any) -> Make:
    return attribute(f"spandrel.architectures.{module}", name, **settings)


add(
    *("spandrel", "super-resolution", images(16, 24)),
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
add(
    *("spandrel", "restoration", images(32, 48)),
    dncnn=_spandrel("DnCNN.__arch.network_dncnn", "DnCNN", in_nc=3, out_nc=3, nc=24, nb=6),
    nafnet=_spandrel(
        "NAFNet.__arch.NAFNet_arch",
        "NAFNet",
        **{"width": 16, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    ),
)
add(
    *("efficientnet_pytorch", "EfficientNet", images(64, 96)),
    efficientnet_b0=lambda: importlib.import_module("efficientnet_pytorch").EfficientNet.from_name(
        "efficientnet-b0"
    ),
)
add(
    *("facenet_pytorch", "faces", images(160, 192)),
    inception_resnet_v1=attribute(
        "facenet_pytorch", "InceptionResnetV1", pretrained=None, classify=True, num_classes=10
    ),
)
