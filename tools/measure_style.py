"""How large the rooms are: `python tools/measure_style.py`.

Prints which modules, functions, exported cells, lines and markdown cells are larger than they should be, and
the median of each.
"""

import ast
import pathlib
import re
import statistics

import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST_LINES, MOST_NAMES, MOST_COLUMNS, MOST_CELL, MOST_FUNCTION, MOST_WORDS = 450, 30, 110, 40, 40, 150


def modules():
    """`(place, source)` of each module that was exported from a notebook or written by hand."""
    for path in sorted((ROOT / "dpsynth").rglob("*.py")):
        if path.name not in ("_modidx.py", "_version.py"):
            yield path.relative_to(ROOT / "dpsynth").as_posix(), path.read_text(encoding="utf-8")


def public_names(tree):
    """Names that a module defines at its top and that do not begin with an underscore."""
    named = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    named += [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    return [name for name in named if not name.startswith("_")]


def functions(tree):
    """`(name, lines)` of each function and method."""
    found = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return [(node.name, node.end_lineno - node.lineno + 1) for node in found]


def without_list_of_names(source):
    """A module without the list of names that the export writes."""
    return re.sub(r"^__all__ = \[.*?\]$", "", source, flags=re.M | re.S)


def cells():
    """`(notebook, cell)` of each cell of the notebooks that the package comes from."""
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if not {"templates", ".ipynb_checkpoints"} & set(path.parts):
            for cell in nbformat.read(path, 4).cells:
                yield path.relative_to(ROOT / "nbs").as_posix(), cell


def exported_definitions(cell):
    """Lines of a cell that is exported and defines something; None for any other."""
    if cell.cell_type != "code" or not re.match(r"#\|\s*export", cell.source):
        return None
    defines = any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.parse(cell.source).body)
    return cell.source.count("\n") if defines else None


def told(title, found, most):
    """One line on a list of `(what, size)`: how many are larger than they should be, and the largest."""
    large = sorted(((size, what) for what, size in found if size > most), reverse=True)
    names = ", ".join(f"{what} {size}" for size, what in large[:6])
    return f"{title} over {most}: {len(large)} of {len(found)}" + (f" ({names})" if large else "")


def main():
    trees = {place: (ast.parse(source), source) for place, source in modules()}
    lines = [(place, source.count("\n")) for place, (_, source) in trees.items()]
    names = [(place, len(public_names(tree))) for place, (tree, _) in trees.items()]
    every = [
        (f"{place}:{name}", size) for place, (tree, _) in trees.items() for name, size in functions(tree)
    ]
    wide = [
        (f"{place}:{number}", len(line))
        for place, (_, source) in trees.items()
        for number, line in enumerate(without_list_of_names(source).splitlines(), 1)
    ]
    defined = [(where, size) for where, cell in cells() if (size := exported_definitions(cell)) is not None]
    prose = [(where, len(cell.source.split())) for where, cell in cells() if cell.cell_type == "markdown"]
    for title, found, most in (
        ("modules: lines", lines, MOST_LINES),
        ("modules: public names", names, MOST_NAMES),
        ("functions: lines", every, MOST_FUNCTION),
        ("lines: columns", wide, MOST_COLUMNS),
        ("exported cells that define: lines", defined, MOST_CELL),
        ("markdown cells: words", prose, MOST_WORDS),
    ):
        print(told(title, found, most) + f"; median {statistics.median(size for _, size in found):g}")


if __name__ == "__main__":
    main()
