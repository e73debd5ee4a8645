"""What mkdocs does not do by itself.

mkdocstrings is given a copy of the package as it is installed, with `passes/` inside.
`<!-- examples -->` becomes a section for every script in docs/examples, with the docstring that it
begins with and its source. `<!-- other names -->` becomes an entry for every public name of dspfx
that the page has none for.
"""

import ast
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, OTHER_NAMES = "<!-- examples -->", "<!-- other names -->"


def on_startup(**_: Any) -> None:
    """Lay the package out in build/site, which `mkdocs.yml` names."""
    package = ROOT / "build" / "site" / "dspfx"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "dspfx", package)
    shutil.copytree(ROOT / "passes", package / "passes")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what the marks stand for."""
    if EXAMPLES in markdown:
        scripts = sorted((ROOT / "docs" / "examples").glob("*.py"))
        markdown = markdown.replace(EXAMPLES, "\n\n".join(_section(path) for path in scripts))
    if OTHER_NAMES in markdown:
        entries = [f"::: {where(name)}" for name in public_names()]
        missing = [entry for entry in entries if entry not in markdown.splitlines()]
        others = "\n\n".join(["## Others", *missing]) if missing else ""
        markdown = markdown.replace(OTHER_NAMES, others)
    return markdown


def public_names() -> list[str]:
    """`dspfx.__all__`, read without importing dspfx."""
    tree = ast.parse((ROOT / "dspfx" / "__init__.py").read_text())
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names: list[str] = ast.literal_eval(values["__all__"])
    return names


def where(name: str) -> str:
    """A public name in full; many a function is in a module of its own name, which hides it."""
    own = (ROOT / "dspfx" / f"{name}.py").is_file()
    return f"dspfx.{name}.{name}" if own else f"dspfx.{name}"


def _section(path: Path) -> str:
    """Title, docstring and, folded, the source of an example."""
    source = path.read_text()
    docstring = ast.get_docstring(ast.parse(source), clean=False) or ""
    title, _, rest = docstring.partition("\n")
    code = "\n".join(f"    {line}".rstrip() for line in source.splitlines())
    return (
        f"## {path.name}\n\n{title}\n{rest}\n\n"
        f'??? example "[{path.name}](examples/{path.name})"\n\n'
        f"    ```py\n{code}\n    ```"
    )
