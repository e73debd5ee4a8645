"""Budgets: what fraction of a network may remain, of what; and the report of who met one."""

from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

from dspfx.engines.engine import Precision
from dspfx.engines.engines import NAMES, OWN
from dspfx.errors import BudgetError
from dspfx.passes.analysis.cost import Cost

Count = Literal["emitted", "masks"]


@dataclass(frozen=True)
class Budget:
    """What fraction of the dense network may remain; exactly one of the fractions is given.

    Attributes:
        macs: of the multiply-accumulates of one sample, whole model; in (0, 1].
        params: of the parameters of the whole model; in (0, 1]. A layer that is called twice
            counts once.
        latency: of the time that the dense network takes for the example inputs in the same engine
            and precision; in (0, 1]. Layers and whole networks are measured, which takes a while.
        count: what MACs and parameters are of. `"emitted"`: of the model that `dspfx.convert`
            makes of it, where groups of different sizes are filled up with zeros, or become one
            dense layer if that is likely to be faster; what is emitted anyway is not masked then.
            `"masks"`: of what the masks leave, which is what
            `convert(..., cost_model=dspfx.FEWEST_WEIGHTS)` emits, and what papers count.
        engine: of a budget of latency, what will run the network: `"own"`, the project's kernel and
            torch, `"inductor"`, `"onnxruntime"` or `"openvino"`. Where groups of filters save no
            time in it, only whole channels go, in the multiples that it likes.
        precision: of a budget of latency, that of the engine: `"fp32"`, `"bf16"` or `"int8"`.

    Example:
        >>> budget = dspfx.Budget(macs=0.5)
        >>> budget.fraction
        0.5
        >>> dspfx.Budget(macs=0.5, count="masks").count
        'masks'
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    count: Count = "emitted"
    engine: str = OWN
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        given = {name: f for name in _FRACTIONS if (f := getattr(self, name)) is not None}
        if len(given) != 1:
            raise BudgetError(
                "give exactly one of Budget(macs=...), Budget(params=...) and Budget(latency=...)"
            )
        ((name, value),) = given.items()
        if not isinstance(value, Real) or not 0 < float(value) <= 1:
            raise BudgetError(f"a budget is a fraction in (0, 1], got {value!r}")
        if self.count not in get_args(Count):
            raise BudgetError(f"count must be 'emitted' or 'masks', got {self.count!r}")
        if self.engine not in NAMES:
            raise BudgetError(f"there is no engine {self.engine!r}; there are {', '.join(NAMES)}")
        if self.precision not in get_args(Precision):
            raise BudgetError(f"precision={self.precision!r} is none of fp32, bf16, int8")
        if self.latency is None and (self.engine, self.precision) != (OWN, "fp32"):
            raise BudgetError("engine= and precision= are of a budget of latency")
        object.__setattr__(self, name, float(value))  # numpy's cannot be saved

    @property
    def fraction(self) -> float:
        """The fraction that may remain."""
        return next(f for f in (self.macs, self.params, self.latency) if f is not None)

    def at(self, fraction: float) -> "Budget":
        """A budget of the same, of another fraction."""

        changed: dict[str, Any] = {n: fraction for n in _FRACTIONS if getattr(self, n) is not None}
        return replace(self, **changed)

    def plain(self) -> dict[str, Any]:
        """As plain values; the engine and its precision where they are no defaults."""
        usual = {"engine": OWN, "precision": "fp32"}
        return {n: v for n, v in asdict(self).items() if n not in usual or v != usual[n]}

    def of(self, masks: Cost, emitted: Cost, time: float) -> float:
        """What is budgeted of a network, of which the masks leave so much."""
        if self.latency is not None:
            return time
        cost = emitted if self.count == "emitted" else masks
        return cost.macs if self.macs is not None else cost.parameters


_FRACTIONS = ("macs", "params", "latency")


def check_budget(budget: object, *, optional: bool = False) -> None:
    """Refuse what is no budget, such as a mere number; nothing at all is fine if `optional`.

    Raises:
        BudgetError: it is none.
    """
    if not isinstance(budget, Budget) and not (optional and budget is None):
        raise BudgetError(f"{budget!r} is no budget; give dspfx.Budget(macs=0.35), for instance")


@dataclass(frozen=True)
class PruneReport:
    """What `prune` or `prune_channels` did.

    Attributes:
        budget: the fraction that was asked for.
        achieved: the fraction that remains, of what was budgeted.
        threshold: of `prune` beta, the share of its energy that each group lost at most; of
            `prune_channels` the share of the channels that went, of those that could.
        before: cost of the dense model for one sample.
        after: of what the masks leave of it.
        emitted: of what `dspfx.convert` makes of it, the zeros that fill up groups included.
        note: says so where the budget could not be met closely.
        measured: of a budget of latency, the fraction of the dense network's time that the pruned
            one really takes; `achieved` is what was predicted from its layers. Not measured by
            `GradualPruning`, which goes on training.
        warnings: layers of which hardly anything is left, and what to do; see
            `dspfx.CyclicFinetune` for what may come of them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune(prepared, dspfx.Budget(macs=0.5))
        >>> report.after.macs < report.before.macs
        True
        >>> report.emitted.macs / report.before.macs == report.achieved
        True
    """

    budget: float
    achieved: float
    threshold: float
    before: Cost
    after: Cost
    emitted: Cost
    note: str = ""
    measured: float | None = None
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"kept {self.achieved:.2%} (budget {self.budget:.2%})",
            f"MACs {self.before.macs:,} -> {self.emitted.macs:,}, "
            f"parameters {self.before.parameters:,} -> {self.emitted.parameters:,}",
        ]
        if self.after.macs != self.emitted.macs:
            lines.append(
                f"of which the masks need {self.after.macs:,} MACs, "
                f"{self.after.parameters:,} parameters"
            )
        if self.measured is not None:
            lines.append(f"latency {self.achieved:.2%} predicted, {self.measured:.2%} measured")
        warnings = [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, *([self.note] if self.note else []), *warnings])
