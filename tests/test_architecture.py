"""The rooms of the code and the direction of their imports, read from the source.

    python tests/test_architecture.py      # prints rooms, arrows, floors, circles, and what is long

`ROOMS` is the one place where rooms and their order are written: a module imports from its own
room and from rooms that stand before it in the list, never from one after it.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

TOP = Path(__file__).resolve().parents[1]
LONGEST = 350  # lines of a file of the package, or of benchmarks
LONG_FUNCTION = 80  # lines of a function, from which on it is printed; no test asks for fewer

# from the ground floor up; a module that is no package is a room of its own
ROOMS = (
    "dspfx.errors",
    "dspfx.utils",
    "dspfx.layers.native",
    "dspfx.layers",
    "dspfx.passes.sandbox",
    "dspfx.passes.analysis",
    "dspfx.passes.tracing",
    "dspfx.passes.lowering",
    "dspfx.passes.transforms",
    "dspfx.model",
    "dspfx.quantization",
    "dspfx.engines",
    "dspfx.storage",
    "dspfx.prepare",
    "dspfx.compile",
    "dspfx.export",
    "dspfx.convert",
    "dspfx.reporting",
    "dspfx.pruning",
    "dspfx.training.groups",
    "dspfx.training.narrow",
    "dspfx.training.repair",
    "dspfx.training",
    "dspfx.compress",
    "dspfx.lightning",
    "dspfx.recipe",
    "dspfx.commands",
)
ENTRANCES = ("dspfx", "dspfx.__main__", "dspfx.passes")  # import whatever they show


def sources() -> dict[str, Path]:
    """Every module of the package by its name; `passes/` is installed as `dspfx.passes`."""
    found = {}
    for folder, prefix in (("dspfx", ()), ("passes", ("dspfx",))):
        for path in sorted((TOP / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(TOP).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def programs() -> list[Path]:
    """The files of the package and of benchmarks, which have to be short."""
    return [*sources().values(), *sorted((TOP / "benchmarks").rglob("*.py"))]


def length(path: Path) -> int:
    """How many lines a file has."""
    return len(path.read_text().splitlines())


def long_functions(path: Path) -> Iterator[tuple[str, int]]:
    """The functions and methods of more than `LONG_FUNCTION` lines, docstrings included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > LONG_FUNCTION:
                yield node.name, lines


def imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else node.module


@functools.cache
def arrows() -> nx.DiGraph:
    """Who imports whom; the files are read once."""
    modules = sources()
    graph = nx.DiGraph()
    graph.add_nodes_from(modules)
    for name, path in modules.items():
        graph.add_edges_from((name, other) for other in imports(path, modules) if other != name)
    return graph


def room(module: str) -> str:
    """The room of `module`: the longest name in `ROOMS` that it begins with."""
    return max(
        (r for r in ROOMS if module == r or module.startswith(f"{r}.")), key=len, default=module
    )


def room_arrows() -> nx.DiGraph:
    """Which room imports from which."""
    graph = nx.DiGraph()
    graph.add_nodes_from(ROOMS)
    for one, other in arrows().edges:
        if one not in ENTRANCES and room(one) != room(other):
            graph.add_edge(room(one), room(other))
    return graph


def test_every_module_is_in_a_room() -> None:
    homeless = [m for m in sources() if m not in ENTRANCES and room(m) not in ROOMS]
    assert homeless == ["dspfx.training"] * ("dspfx.training" in homeless)


@pytest.mark.parametrize("one", ROOMS)
def test_imports_point_down(one: str) -> None:
    place = {name: number for number, name in enumerate(ROOMS)}
    up = [
        f"{source} imports {target}"
        for source, target in arrows().edges
        if source not in ENTRANCES
        and room(source) == one != room(target)
        and place.get(room(target), len(ROOMS)) > place[one]
    ]
    assert up == []


def test_there_are_no_circles() -> None:
    circles = [sorted(c) for c in nx.strongly_connected_components(arrows()) if len(c) > 1]
    assert circles == []


def test_nobody_imports_an_entrance() -> None:
    """A module names what it needs; the package as a whole is for users."""
    graph = arrows()
    inside = [
        f"{source} imports {target}"
        for target in ENTRANCES
        for source in graph.predecessors(target)
        if source not in ENTRANCES and not source.startswith(("dspfx.commands", "dspfx.recipe"))
    ]
    assert inside == []


@pytest.mark.parametrize("name", [r for r in ROOMS if (TOP / r.replace(".", "/")).is_dir()])
def test_a_room_says_what_it_is_for(name: str) -> None:
    text = sources()[name].read_text()
    said = ast.get_docstring(ast.parse(text))
    assert said is not None
    assert said.splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", programs(), ids=lambda p: str(p.relative_to(TOP)))
def test_files_are_short(path: Path) -> None:
    assert length(path) <= LONGEST


def test_long_functions_are_found(tmp_path: Path) -> None:
    """Nested ones and methods, too; the limit itself is not long."""
    just = "    def just(self):\n" + "        pass\n" * (LONG_FUNCTION - 1)
    over = "    def over(self):\n" + "        pass\n" * LONG_FUNCTION
    (tmp_path / "some.py").write_text(f"class Some:\n{just}{over}")
    assert dict(long_functions(tmp_path / "some.py")) == {"over": LONG_FUNCTION + 1}


def main() -> None:
    """Print what the tests above look at, as figures."""
    graph, rooms = arrows(), room_arrows()
    floors = nx.dag_longest_path_length(nx.condensation(rooms)) + 1
    circles = [c for c in nx.strongly_connected_components(rooms) if len(c) > 1]
    inner = [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
    print(f"{len(graph)} modules, {graph.number_of_edges()} imports, {len(inner)} circles of them")
    print(
        f"{len(rooms)} rooms, {rooms.number_of_edges()} arrows, {floors} floors, "
        f"{len(circles)} circles"
    )
    everything = [*programs(), *sorted((TOP / "tests").rglob("*.py"))]
    for path in everything:
        if (lines := length(path)) > LONGEST:
            print(f"{path.relative_to(TOP)}: {lines} lines")
    for path in everything:
        for name, lines in long_functions(path):
            print(f"{path.relative_to(TOP)}: {name} has {lines} lines")


if __name__ == "__main__":
    main()
