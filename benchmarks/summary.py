"""The README's table of latencies, from docs/latency.md.

    python -m benchmarks.summary

What `benchmarks.latency` wrote is read, and the table between the marks in README.md replaced.
"""

import re
from pathlib import Path

from tabulate import tabulate

from benchmarks.latency import OUTPUT, sections_of

README = Path(__file__).resolve().parents[1] / "README.md"
MARKS = "<!-- latency -->", "<!-- end of latency -->"
HEADER = (
    *("network", "batch", "MACs kept", "dense, inductor", "dense, fastest", "`dspfx.compile`"),
    *("channel-pruned, fastest", "over inductor", "over fastest"),
)


def main() -> None:
    """Replace the table in README.md."""
    rows = [_row(title, text) for title, text in sections_of(OUTPUT).items()]
    table = tabulate(rows, HEADER, "github", disable_numparse=True)
    before, _, rest = README.read_text().partition(MARKS[0])
    _, _, behind = rest.partition(MARKS[1])
    assert behind, f"README.md has no {MARKS[1]}"
    README.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{behind}")


def _row(title: str, text: str) -> tuple[str, ...]:
    name, batch = title.removeprefix("## ").split(", batch ")
    kept = re.search(r"([\d.]+%) of the MACs kept", text)
    assert kept is not None
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    times = {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}
    runtimes = lines[0][1:-1]
    fastest = {
        network: min(float(cells[r]) for r in runtimes if cells[r])
        for network, cells in times.items()
    }
    own, dense = (float(times[network]["inductor"]) for network in ("compact", "dense"))
    return (
        *(name.split(" at ")[0], batch, kept.group(1), f"{dense:.2f}", f"{fastest['dense']:.2f}"),
        *(f"{own:.2f}", f"{fastest['channel-pruned']:.2f}", f"{dense / own:.2f}"),
        f"{fastest['dense'] / own:.2f}",
    )


if __name__ == "__main__":
    main()
