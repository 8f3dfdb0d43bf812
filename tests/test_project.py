"""The project's own papers: what they name exists, what exists is named, and nothing names one machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hdml_core", "studies", "cluster", "dashboards")
MODULES = [file.relative_to(ROOT) for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
README = (ROOT / "README.md").read_text()

# The user's folders on one machine, and the hosts that packages are fetched from.
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|home|Users)/\w")
REGISTRY = re.compile(r"pypi\.|python[h]osted|anaconda\.(?:org|com)|pytorch\.org/whl|index[-_]url", re.IGNORECASE)


def texts():
    """(name, text) of every file that is tracked or about to be."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content:
            yield name, content.decode()


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY])
def test_no_file_names_a_machine_or_a_registry(pattern):
    lines = [(name, line) for name, text in texts() for line in text.splitlines() if pattern.search(line)]
    assert lines == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (MACHINE_PATH, "see /" + "home/someone/data"),
        (REGISTRY, "--index" + "-url https://example.org"),
        (REGISTRY, "https://py" + "pi.org/simple"),
    ],
)
def test_the_search_for_them_can_fail(pattern, line):
    assert pattern.search(line)


def test_constraints_are_names_and_versions_alone():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line)] == []


@pytest.mark.parametrize("command", ["study", "test"])
def test_the_two_commands_exist(command):
    assert f"make {command}" in README
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_says_what_it_holds(module):
    assert ast.get_docstring(ast.parse((ROOT / module).read_text()))


def file_tree():
    """The README's tree as path -> clause: two spaces of indent for each folder above."""
    tree = re.search(r"^## Files\n.*?```\n(.*?)```", README, re.MULTILINE | re.DOTALL).group(1)
    folders, clauses = [], {}
    for line in tree.splitlines():
        indent, name, clause = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        folders[len(indent) // 2 :] = [name]
        clauses[Path(*folders)] = clause
    return clauses


def test_the_file_tree_names_what_exists():
    assert [path for path in file_tree() if not (ROOT / path).exists()] == []


def test_the_file_tree_names_every_module_with_its_clause():
    clauses = file_tree()
    assert [module for module in MODULES if module.name != "__init__.py" and module not in clauses] == []
    assert [path for path, clause in clauses.items() if not clause] == []


def test_the_readme_shows_and_links_what_exists():
    assert [name for name in re.findall(r"\]\(([^)]+)\)", README) if not (ROOT / name.partition("#")[0]).exists()] == []


def test_an_isolated_command_keeps_its_exit_status_and_its_loopback():
    script = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
raise SystemExit(7)
"""
    command = [sys.executable, ROOT / "tests/isolated.py", sys.executable, "-c", script]
    assert subprocess.run(command, check=False).returncode == 7
