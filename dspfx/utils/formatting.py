"""Numbers and names as people read them."""

from collections.abc import Iterable

PREFIXES = ("", "k", "M", "G", "T", "P")


def short(count: int) -> str:
    """Four digits and an SI prefix: 1823522816 is `1.824 G`; below a thousand all of it."""
    power = 0
    while count >= 999.95 * 1000**power and power < len(PREFIXES) - 1:
        power += 1
    return f"{count / 1000**power:#.4g} {PREFIXES[power]}" if power else str(count)


def mebibytes(size: int) -> str:
    """A size in bytes as MiB, or KiB where it is small."""
    if size < 2**20 / 10:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:.2f} MiB"


def share(after: int, before: int) -> str:
    """What is kept, in percent."""
    return f"{after / before:.1%}" if before else "-"


def change(before: int, after: int, arrow: str = "->") -> str:
    """`64 -> 48`, or `64` where it stays."""
    return str(before) if before == after else f"{before} {arrow} {after}"


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` characters, all printable; what is left out is in its middle."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    if len(name) <= width:
        return name
    head = (width - 3) // 2
    return f"{name[:head]}...{name[len(name) - (width - 3 - head) :]}"


def distinct(name: str, names: Iterable[str], width: int) -> str:
    """`name` in at most `width` characters, unlike any other of `names`, which are shown so, too.

    What is left out is in front, up to a dot; in its middle, if not even that is short enough.
    """
    if len(name) <= width:
        return shortened(name, width)
    others = [f".{other}" for other in names if other != name]
    parts = name.split(".")
    for first in range(1, len(parts)):
        end = ".".join(parts[first:])
        fits = len(end) + 3 <= width
        if fits and end.isprintable() and not any(other.endswith(f".{end}") for other in others):
            return f"...{end}"
    return shortened(name, width)


def duration(seconds: float) -> str:
    """Two units of a time: `0.6 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
