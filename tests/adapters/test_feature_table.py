"""Each row of docs/compatibility.md names its test, and each of these tests has its row."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.host_independent

TESTS = Path(__file__).parent
PAGE = (TESTS.parents[1] / "docs" / "compatibility.md").read_text()
FILES = ("test_spikingjelly_features.py", "test_snntorch_features.py", "test_torch_features.py")


def section(file):
    """The part of the page that names this file, up to the next host's."""
    return next(part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if f"`tests/adapters/{file}`" in part)


def rows(file):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section(file).splitlines()
        if line.startswith("|") and "`test_" in line
    ]


@pytest.mark.parametrize("file", FILES)
def test_every_row_has_a_test_and_every_test_a_row(file):
    named = [re.fullmatch(r"`(\w+)`", row[-1])[1] for row in rows(file)]
    tree = ast.parse((TESTS / file).read_text())
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert sorted(named) == sorted(defined)


def test_cells_agree_with_the_versions_that_the_tests_run_on():
    source = (TESTS / FILES[0]).read_text()
    for row in rows(FILES[0]):
        _, new, old, test = row
        mark = re.search(rf"@only_(new|old)\n(?:[@ )][^\n]*\n)*def {test.strip('`')}\(", source)
        only = mark[1] if mark else None
        assert (old == "the host has none") == (only == "new"), row
        assert (new == "the host has none") == (only == "old"), row
