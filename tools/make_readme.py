"""Write README.md from nbs/index.ipynb: its prose, its code, and what the code printed.

    python tools/make_readme.py [--check]
"""
import pathlib
import sys

import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent


def output_text(output):
    """What a reader of the README sees of one output: its Markdown, or its text in a code block."""
    data = output.get("data", {})
    if "text/markdown" in data:
        return data["text/markdown"]
    text = output.get("text") or data.get("text/plain", "")
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def cell_text(cell):
    """One cell as Markdown; code cells marked `#| echo: false` show their outputs only."""
    if cell.cell_type != "code":
        return cell.source
    shown = [line for line in cell.source.splitlines() if not line.startswith("#|")]
    code = [] if "#| echo: false" in cell.source or not "".join(shown).strip() else ["```python\n" + "\n".join(shown).strip() + "\n```"]
    return "\n\n".join([*code, *filter(None, map(output_text, cell.outputs))])


def readme():
    """The text of README.md."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    note = "<!-- Generated from nbs/index.ipynb by tools/make_readme.py; edit the notebook. -->"
    return "\n\n".join([note, *filter(None, map(cell_text, notebook.cells))]) + "\n"


def main():
    path = ROOT / "README.md"
    if "--check" in sys.argv:
        return int(path.read_text(encoding="utf-8") != readme())
    path.write_text(readme(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
