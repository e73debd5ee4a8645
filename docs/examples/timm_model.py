"""A model of timm, by its name, to a smaller ONNX file: no data, no training.

    python timm_model.py --name resnet10t --keep 0.5 --output pruned.onnx

The groups are found in the weights alone. What is left has lost accuracy, as nothing was trained:
with data, recalibrate or fine-tune before `convert`. `--pretrained` downloads timm's weights.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import timm
import torch
import typer

import dspfx


def main(
    name: Annotated[str, typer.Option(help="as in timm.list_models()")] = "resnet10t",
    keep: Annotated[float, typer.Option(help="fraction of the MACs to keep")] = 0.5,
    groups: Annotated[int, typer.Option(help="groups per layer")] = 4,
    size: Annotated[int | None, typer.Option(help="pixels; the model's own if left out")] = None,
    output: Annotated[Path, typer.Option(help="the ONNX file")] = Path("pruned.onnx"),
    pretrained: Annotated[bool, typer.Option(help="download trained weights")] = False,
) -> None:
    """Prune, convert, export and compare."""
    model = timm.create_model(name, pretrained=pretrained).eval()
    channels, height, width = timm.data.resolve_model_data_config(model)["input_size"]
    x = torch.randn(2, channels, size or height, size or width)

    prepared = dspfx.prepare(model, x, config=dspfx.PrepareConfig(groups=groups))
    dspfx.cluster_groups(prepared)
    print(dspfx.prune(prepared, dspfx.Budget(macs=keep)))
    compact = dspfx.convert(prepared)  # compared with the masked model, in float64
    print(dspfx.report(compact))

    dspfx.export(compact, x, output)
    images = torch.randn(3, *x.shape[1:])  # a batch that the file was not made with
    with torch.no_grad():
        masked = prepared(images).numpy()
    session = onnxruntime.InferenceSession(output)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    difference = np.abs(outputs - masked).max() / np.abs(masked).max()
    if difference > 1e-3:
        raise SystemExit(f"the file differs from the masked model by {difference:.1e}")
    print(f"{output}: {output.stat().st_size:,} bytes, equal to the masked model")
    print(f"(largest difference {difference:.1e} of the largest output)")


if __name__ == "__main__":
    typer.run(main)
