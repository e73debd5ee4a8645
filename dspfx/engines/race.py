"""The race: every form of a network in every engine and precision, cheap ones first.

1. What is loaded is computed once, compared with the module, and timed briefly. What takes much
   longer than the fastest so far is hopeless and goes no further; an engine that is slow to load is
   not loaded again when it was hopeless with another form.
2. The others are timed in blocks, in turns.

Whatever an engine raises costs its candidate, and nothing else.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dspfx.engines.agreement import agreement, worst_difference
from dspfx.engines.engine import Engine, Executable, Precision
from dspfx.engines.form import Form
from dspfx.engines.onnx_call import OnnxCall, first_line
from dspfx.engines.report import Candidate
from dspfx.passes.sandbox.calls import fresh
from dspfx.utils.timing import block, in_blocks

HOPELESS = 1.5  # times as long as the fastest so far


@dataclass(frozen=True)
class Entry:
    """A candidate that runs."""

    candidate: Candidate
    form: Form
    call: Executable


@dataclass(frozen=True)
class Race:
    """The inputs of a race.

    Attributes:
        inputs: that are timed.
        samples: inputs for which outputs are compared, and what the model computes for them.
        accepts: whether a candidate that agrees so far may win.
    """

    inputs: tuple[Any, ...]
    samples: Sequence[tuple[tuple[Any, ...], Any]]
    accepts: Callable[[Candidate], bool]

    def run(
        self, starters: Iterable[tuple[Engine, Form, Precision]]
    ) -> tuple[list[Candidate], Entry | None]:
        """All candidates in the order of `starters`, and the fastest."""
        entries: dict[Candidate, Entry] = {}
        candidates: list[Candidate] = []
        for engine, form, precision in starters:
            blank = Candidate(engine.name, form.name, precision)
            if engine.slow_to_load and any(_hopeless_like(c, blank) for c in candidates):
                note = "not tried: hopeless in another form"
                candidates.append(replace(blank, note=note))
                continue
            found, call = self._tried(engine, form, blank)
            fastest = min((c.seconds or 0.0 for c in entries), default=float("inf"))
            if call is not None and (found.seconds or 0.0) > HOPELESS * fastest:
                found = replace(found, note="hopeless: not timed to the end")
            elif call is not None:
                found, call = self._compared(found, call)
                if call is not None:
                    entries[found] = Entry(found, form, call)
            candidates.append(found)
        return self._final(candidates, entries)

    def _tried(
        self, engine: Engine, form: Form, blank: Candidate
    ) -> tuple[Candidate, Executable | None]:
        """Load it and time it briefly."""
        try:
            call = engine.load(form, blank.precision)  # type: ignore[arg-type]
            if isinstance(call, OnnxCall) and (why := call.why_not(*fresh(self.inputs))):
                return replace(blank, note=why), None
            return replace(blank, seconds=block(partial(call, *self.inputs), 5)), call
        except Exception as error:  # of anybody's runtime
            return replace(blank, note=first_line(error)), None

    def _compared(
        self, candidate: Candidate, call: Executable
    ) -> tuple[Candidate, Executable | None]:
        try:
            pairs = [(expected, call(*fresh(given))) for given, expected in self.samples]
        except Exception as error:  # as above
            return replace(candidate, seconds=None, note=first_line(error)), None
        found = replace(
            candidate,
            agreement=sum(agreement(a, b) for a, b in pairs) / len(pairs),
            difference=max(worst_difference(a, b) for a, b in pairs),
        )
        if self.accepts(found):
            return found, call
        return replace(found, note="does not agree"), None

    def _final(
        self, candidates: list[Candidate], entries: dict[Candidate, Entry]
    ) -> tuple[list[Candidate], Entry | None]:
        """Time those that are left to the end."""
        fastest = min((c.seconds or 0.0 for c in entries), default=0.0)
        left = {c: e for c, e in entries.items() if (c.seconds or 0.0) <= HOPELESS * fastest}
        times = in_blocks({c: partial(e.call, *self.inputs) for c, e in left.items()})
        timed = {c: replace(c, seconds=times[c]) for c in left}
        if not timed:
            return candidates, None
        best = min(left, key=times.__getitem__)
        winner = replace(left[best], candidate=timed[best])
        return [timed.get(c, c) for c in candidates], winner


def _hopeless_like(candidate: Candidate, other: Candidate) -> bool:
    same = (candidate.engine, candidate.precision) == (other.engine, other.precision)
    return same and candidate.note.startswith("hopeless")
