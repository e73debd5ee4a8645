"""The tables of latencies in docs/performance.md, from docs/latency.md and docs/latency_avx2.md.

    python -m benchmarks.summary

What `benchmarks.latency` wrote is read, and the tables between the marks are replaced.
"""

import re
from pathlib import Path

from tabulate import tabulate

from benchmarks.latency import OUTPUT, sections_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
PAGES = {"AVX-512": OUTPUT, "AVX2": OUTPUT.with_name("latency_avx2.md")}
MARKS = "<!-- latency -->", "<!-- end of latency -->"
HEADER = (
    *("network", "batch", "MACs kept", "dense, inductor", "dense, fastest", "`dspfx.compile`"),
    *("channel-pruned, fastest", "over inductor", "over fastest"),
)


def main() -> None:
    """Replace the tables in docs/performance.md."""
    tables = "\n\n".join(
        f"{processor}, [{page.name}]({page.name}):\n\n{_table(page)}"
        for processor, page in PAGES.items()
    )
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    assert after, f"{PAGE.name} has no {MARKS[1]}"
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}")


def _table(page: Path) -> str:
    rows = [_row(title, text) for title, text in sections_of(page).items()]
    return tabulate(rows, HEADER, "github", disable_numparse=True)


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
