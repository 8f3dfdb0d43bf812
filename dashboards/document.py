"""Pages of tables, written as Markdown and as LaTeX."""

from collections.abc import Sequence
from typing import NamedTuple

LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "†": r"\textsuperscript{\dag}",
    "‡": r"\textsuperscript{\ddag}",
    "§": r"\textsuperscript{\S}",
    "¶": r"\textsuperscript{\P}",
    "‖": r"\textsuperscript{$\|$}",
    "–": "--",
}


class Table(NamedTuple):
    """Cells under a heading; the first `words` columns are text, the rest numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str = ""
    """How it is to be read."""
    words: int = 2


class Page(NamedTuple):
    """Tables under one title."""

    title: str
    about: str
    tables: Sequence[Table]
    notes: Sequence[str]
    """What the marks in the tables stand for."""


def markdown(page: Page) -> str:
    """Write a page as Markdown that reads well before it is rendered, too."""
    blocks = [f"# {page.title}", page.about]
    for table in page.tables:
        blocks += [f"## {table.caption}", table.about, markdown_table(table)]
    return "\n\n".join([*blocks, *page.notes]) + "\n"


def markdown_table(table: Table) -> str:
    """Write a table with its columns aligned."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < table.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < table.words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(lines[0]), f"|{'|'.join(f' {cell} ' for cell in rule)}|", *map(line, lines[1:])])


def latex(page: Page) -> str:
    """Write a page's tables and notes as LaTeX, to be \\input; it needs the package booktabs."""
    lines = [f"% {page.title}. Needs \\usepackage{{booktabs}}."]
    for table in page.tables:
        lines += [
            r"\begin{table}",
            r"  \centering\small",
            f"  \\caption{{{escaped(table.caption)}. {escaped(table.about)}}}",
            f"  \\begin{{tabular}}{{{'l' * table.words}{'r' * (len(table.head) - table.words)}}}",
            r"    \toprule",
            f"    {_cells(table.head)}",
            r"    \midrule",
            *(f"    {_cells(row)}" for row in table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    notes = "\n\n".join(map(escaped, (page.about, *page.notes)))
    return "\n".join([*lines, r"\begin{footnotesize}", notes, r"\end{footnotesize}"]) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX wants it.

    >>> print(escaped("5 % of hdml_npair †"))
    5 \\% of hdml\\_npair \\textsuperscript{\\dag}
    """
    return "".join(LATEX.get(character, character) for character in text)


def _cells(cells: Sequence[str]) -> str:
    return f"{' & '.join(map(escaped, cells))} \\\\"
