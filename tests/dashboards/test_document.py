"""Markdown in columns, and LaTeX that has nothing in it to stumble over."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.document import LATEX, Page, Table, escaped, latex, markdown, markdown_table

TABLE = Table(
    "5 % of hdml_npair", ["method", "source", "R@1"], [["a|b", "x †", "1 ± 2"], ["c", "", "–"]], "About & so."
)
PAGE = Page("cub200", "All # of it.", [TABLE], ["† is ~ that_{x}^2\\."])


def balanced(text):
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text.replace("\\\\", "")):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def test_markdown_reads_in_columns():
    assert markdown_table(TABLE).splitlines() == [
        "| method | source |   R@1 |",
        "| ------ | ------ | ----: |",
        "| a\\|b   | x †    | 1 ± 2 |",
        "| c      |        |     – |",
    ]
    assert markdown(PAGE).startswith("# cub200\n\nAll # of it.\n\n## 5 % of hdml_npair\n\nAbout & so.\n\n| method")


def test_latex_is_whole():
    text = latex(PAGE)
    assert balanced(text)
    assert sorted(re.findall(r"\\begin\{(\w+)\}", text)) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    assert r"\caption{5 \% of hdml\_npair. About \& so.}" in text
    assert r"x \textsuperscript{\dag} & 1 $\pm$ 2 \\" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {2}


@given(st.text(alphabet=st.sampled_from([*LATEX, "a", " "])))
def test_nothing_is_left_that_latex_would_take_for_its_own(text):
    written = escaped(text)
    assert balanced(written)
    assert written.count("$") % 2 == text.count("$") % 2
    assert not re.search(r"(?<!\\)[&%#_~^]", written)


@pytest.mark.parametrize("mark", "†‡§¶‖±–−")
def test_latex_is_plain_ascii(mark):
    assert escaped(mark).isascii()
