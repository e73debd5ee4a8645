"""What a race between engines measured: plain data, and a table of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from tabulate import tabulate

WIDEST_NOTE = 60  # characters


@dataclass(frozen=True)
class LayerChoice:
    """The forms of one layer that were timed.

    Attributes:
        name: of the layer.
        seconds: of each form, by its description.
        chosen: the fastest.
    """

    name: str
    seconds: Mapping[str, float]
    chosen: str


@dataclass(frozen=True)
class Candidate:
    """A network in one engine, form and precision.

    Attributes:
        engine, form, precision: of the network.
        seconds: of a call, the median; None if it was not timed.
        agreement: the share of decisions that are those of the model, where it was compared: see
            `dspfx.engines.agreement`.
        difference: the largest, relative to the largest output.
        note: why it was not timed, or not to the end.
    """

    engine: str
    form: str
    precision: str
    seconds: float | None = None
    agreement: float | None = None
    difference: float | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.form}, {self.engine}, {self.precision}"


@dataclass(frozen=True)
class CompileReport:
    """What `compile` measured and chose; `str` is a table.

    Attributes:
        candidates: all that were tried, and why others were not.
        chosen: the one that is returned.
        layers: those whose forms were timed by themselves; empty where the own kernel computes
            every layer whose filters read different channels.
        winograd: layers of the chosen one that Winograd's algorithm computes.
        missing: why engines were not there, by their names.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> fast = dspfx.compile(dspfx.convert(prepared), x, engines=["inductor"])
        >>> fast.report.chosen in fast.report.candidates
        True
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    layers: tuple[LayerChoice, ...] = ()
    winograd: tuple[str, ...] = ()
    missing: Mapping[str, str] | None = None

    @property
    def timed(self) -> list[tuple[Candidate, float]]:
        """The candidates that were timed and their seconds, the fastest first."""
        timed = [(c, c.seconds) for c in self.candidates if c.seconds is not None]
        return sorted(timed, key=lambda pair: pair[1])

    def __str__(self) -> str:
        tables = [self._layers()] if self.layers else []
        header = ("engine", "form", "precision", "ms", "agreement", "difference", "")
        order = [candidate for candidate, _ in self.timed]
        rows = [self._row(c) for c in (*order, *(c for c in self.candidates if c not in order))]
        tables.append(tabulate(rows, header, disable_numparse=True))
        tables += [f"{name}: {why}" for name, why in (self.missing or {}).items()]
        if self.winograd:
            tables.append(f"By Winograd's algorithm: {', '.join(self.winograd)}")
        return "\n\n".join(tables)

    def _row(self, candidate: Candidate) -> tuple[str, ...]:
        c = candidate
        note = "chosen" if c is self.chosen else c.note
        return (
            c.engine,
            worded(c.form),
            c.precision,
            "" if c.seconds is None else f"{1e3 * c.seconds:.3f}",
            "" if c.agreement is None else f"{c.agreement:.2%}",
            "" if c.difference is None else f"{c.difference:.1e}",
            note if len(note) <= WIDEST_NOTE else f"{note[: WIDEST_NOTE - 3]}...",
        )

    def _layers(self) -> str:
        rows = [
            (
                layer.name,
                layer.chosen,
                f"{1e3 * layer.seconds[layer.chosen]:.3f}",
                f"{1e3 * layer.seconds['dense']:.3f}",
                str(len(layer.seconds)),
            )
            for layer in self.layers
        ]
        header = ("layer", "fastest by itself", "ms", "dense, ms", "forms timed")
        best = sum(layer.seconds[layer.chosen] for layer in self.layers)
        whole = sum(layer.seconds["dense"] for layer in self.layers)
        rows.append(("together", "", f"{1e3 * best:.3f}", f"{1e3 * whole:.3f}", ""))
        return tabulate(rows, header, disable_numparse=True)


def worded(form: str) -> str:
    """The name of a form as reports show it.

    Layers that are the fastest one by one may make the slowest network, since what lies between
    them counts as well.
    """
    mixed = "each layer in the form that is fastest by itself"
    return form.replace("the fastest form of each layer", mixed)
