"""What became of models of other libraries, and the page that says so."""

import importlib.metadata
import math
import re
from dataclasses import dataclass, field

from tabulate import tabulate

from benchmarks.zoo import Case

ASKED = 0.5
EXACT, ROUNDED, ONNX_ROUNDED = 1e-9, 1e-4, 1e-3
WIDEST_REASON = 300
POINT = 0.01  # of all MACs
STATUSES = ("all the way", "partly frozen", "in parts", "refused", "raw error", "quietly wrong")
_ROUNDS_OFF = ", rounds off"
_PACKAGES = (
    *("torch", "torchvision", "ultralytics", "transformers", "segmentation-models-pytorch"),
    *("monai", "torchaudio", "diffusers", "python-doctr", "kornia", "spandrel"),
    *("efficientnet-pytorch", "facenet-pytorch"),
)


@dataclass
class Outcome:
    """What became of one model.

    Attributes:
        troubles: what went wrong, by the step where it did.
        status: the worst of them, or how far it went; one of `STATUSES`.
        macs_share, parameters_share: of all, those of layers that can be pruned.
        known: MACs that the report knows, of all that torch counts.
        asked, left: of all MACs, what the budget was and what the compact model takes.
        equal: difference of masked and compact model, at both sizes; relative.
        prepared: difference of model and prepared model, at both sizes and in both modes.
        rounds_off: whether the model differs as much if the last bits of its inputs change, and so
            is compared in float64 alone.
        frozen: what is given all its channels.
    """

    case: Case
    status: str = ""
    troubles: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    macs_share: float = float("nan")
    parameters_share: float = float("nan")
    known: float = float("nan")
    asked: float = float("nan")
    left: float = float("nan")
    equal: float = float("nan")
    prepared: float = float("nan")
    onnx: str = ""
    trained: str = ""
    rounds_off: bool = False
    frozen: str = ""
    seconds: float = 0.0


def document(outcomes: list[Outcome], command: str, listed: int) -> str:
    """The outcomes as a page of Markdown, of as many models as are `listed` or of some of them."""
    count = {status: sum(o.status == status for o in outcomes) for status in STATUSES}
    examined = "" if len(outcomes) == listed else f", of {listed} that are listed"
    giving = [o for o in outcomes if o.asked == ASKED and not math.isnan(o.left)]
    near = sum(abs(o.left - o.asked) <= POINT for o in giving)
    counted = ", ".join(f"{n} {status}" for status, n in count.items())
    rows = [
        (
            *(o.case.library, o.case.family, o.case.name, o.status, f"{o.parameters / 1e6:.2f}"),
            *(_share(o.macs_share), _share(o.parameters_share), _share(o.known)),
            *(_share(o.asked, 1), _share(o.left, 1), _small(o.equal), _small(o.prepared)),
            *(o.trained or "no", (o.onnx or "no") + (_ROUNDS_OFF if o.rounds_off else "")),
        )
        for o in outcomes
    ]
    header = (
        *("library", "family", "model", "status", "million parameters", "MACs", "parameters"),
        *("known", "asked", "left", "compact", "prepared", "trains", "ONNX"),
    )
    reasons = [
        (o.case.name, _reason(o).replace("|", "\\|")) for o in outcomes if o.status != STATUSES[0]
    ]
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    return "\n".join(
        [
            "# Models of other libraries",
            "",
            f"{len(outcomes)} models{examined}: {counted}. "
            f"Of {len(giving)} that can give half of their MACs, {near} have within one point of "
            "half left, counted by torch on the compact model.",
            "",
            f"Written by `{command}`; {versions}.",
            "",
            "Every model is built from a configuration, small where its library lets it be, with "
            "random weights and running statistics, in a process of its own. It is prepared, "
            "pruned by whole channels to half of its MACs (by groups, or to the least that it can "
            "give, where that is more), converted with verification, trained for a step, "
            "exported, and compared.",
            "",
            "- *all the way*: one graph, every step passes, and no more than half of the MACs is "
            "left. *partly frozen*: more is left. *in parts*: every step passes, but the model's "
            "own code has no graph. *refused*: an error of dspfx says why. *raw error*: any other "
            "error. *quietly wrong*: a difference that nothing reported.",
            "- *MACs*, *parameters*: shares of all that are in layers which can be pruned. "
            "*known*: MACs that the report counts, of all that torch counts.",
            "- *asked*: the budget. *left*: MACs of the compact model, of the dense model's; both "
            "counted by `FlopCounterMode`, attention and recurrent layers taken apart.",
            "- *compact*: largest difference of masked and compact model in float64, relative to "
            "the largest output, at two sizes (another batch, and another height, width or length "
            f"where the model takes it); at most {EXACT:.0e} or it is quietly wrong. None where "
            "the model does not run in float64; float32 is compared in any case.",
            "- *prepared*: largest difference of model and prepared model in float32, in "
            "evaluation and training mode, running statistics included, at both sizes.",
            "- *ONNX*: the file runs in ONNX Runtime and agrees, for any batch or the example's; "
            "*nor the model*: the dense model cannot be exported either. *rounds off*: in float32 "
            "the model itself differs by more than is allowed if the last bits of its inputs "
            "change, as where it sorts scores that are nearly equal; so float64 alone says "
            "whether masked and compact model are equal, and the file need only run.",
            "",
            tabulate(rows, header, tablefmt="github", disable_numparse=True),
            "",
            "## Why not all the way",
            "",
            tabulate(reasons, ("model", "reason"), tablefmt="github", disable_numparse=True),
            "",
        ]
    )


def read_page(text: str) -> dict[Case, Outcome]:
    """What a page says, as it was rounded there, by the model."""
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    reasons = {row[0]: row[1].replace("\\|", "|") for row in cells if len(row) == 2}
    found: dict[Case, Outcome] = {}
    for row in cells:
        if len(row) == 2 or row[3] not in STATUSES:
            continue
        case, status, reason = Case(*row[:3]), row[3], reasons.get(row[2], "")
        failed = STATUSES.index(status) > STATUSES.index("in parts")
        step, _, trouble = reason.partition(": ")
        shares = [float(cell[:-1]) / 100 if cell else math.nan for cell in row[5:10]]
        small = [float(cell) if cell else math.nan for cell in row[10:12]]
        trained, onnx = ("" if cell == "no" else cell for cell in row[12:14])
        found[case] = Outcome(
            *(case, status, {step: trouble} if failed else {}, round(float(row[4]) * 1e6)),
            *(*shares, *small, onnx.removesuffix(_ROUNDS_OFF), trained),
            *(onnx.endswith(_ROUNDS_OFF), "" if failed else reason),
        )
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _reason(outcome: Outcome) -> str:
    troubles = [f"{step}: {trouble}" for step, trouble in outcome.troubles.items()]
    return "; ".join(troubles or [outcome.frozen or "attention is not pruned"])[:WIDEST_REASON]


def _share(value: float, digits: int = 0) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}%}"


def _small(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0e}"
