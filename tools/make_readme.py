"""Write README.md from nbs/index.ipynb: `python tools/make_readme.py`, or with `--check` only compare."""

import pathlib
import sys

import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent


def fenced(text, language=""):
    return f"```{language}\n{text.rstrip()}\n```"


def shown(output):
    """An output as Markdown: Markdown as it is, text in a fence."""
    data = output.get("data", {})
    return (
        data["text/markdown"]
        if "text/markdown" in data
        else fenced(output.get("text") or data.get("text/plain", ""))
    )


def blocks(notebook):
    """The notebook as Markdown: code up to an output is one fence; `#| echo: false` shows outputs only."""
    code = []
    for cell in notebook.cells:
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
        if cell.cell_type == "markdown":
            yield source
        elif "#| hide" not in cell.source:
            code += [] if "#| echo: false" in cell.source else [source]
            if cell.outputs:
                yield from ([fenced("\n\n".join(code), "python")] if code else [])
                yield from map(shown, cell.outputs)
                code = []


def readme():
    return "\n\n".join(blocks(nbformat.read(ROOT / "nbs" / "index.ipynb", 4))).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit((ROOT / "README.md").read_text(encoding="utf-8") != readme())
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
