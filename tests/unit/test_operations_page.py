"""docs/operations.md quotes the program: what it shows under Resume, Faults and Security is still said so."""

import re

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.fast
PAGE = (ROOT / "docs" / "operations.md").read_text()
QUOTED = [
    line.strip()
    for block in re.findall(r"```\n(.*?)```", PAGE[PAGE.index("## Resume") :], re.DOTALL)
    for line in block.strip().splitlines()
]
# Literals of a source stand in quotes and may be broken over lines.
SOURCE = "".join(re.sub(r'"\s*\n\s*f?"', "", p.read_text()) for p in (ROOT / "prunadapt_ds").rglob("*.py"))


def test_there_are_quotations():
    assert len(QUOTED) > 15


@pytest.mark.parametrize("line", QUOTED)
def test_what_is_quoted_is_said(line):
    """A third of its pairs of words stand in the source: the rest are values, or what other libraries say."""
    words = line.removeprefix("error: ").split()
    windows = [" ".join(words[i : i + 2]) for i in range(len(words) - 1)]
    plain = [w for w in windows if not re.search(r"[0-9/=\[\]]", w)]
    said = [w for w in plain if w in SOURCE]
    assert len(said) >= max(1, len(plain) // 3), (line, [w for w in plain if w not in SOURCE])


def test_every_link_of_the_page_leads_somewhere():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings


def test_every_fault_of_the_tests_is_on_the_page():
    table = (ROOT / "tests" / "integration" / "test_faults.py").read_text()
    faults = [row for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) if row not in ("fault", "---")]
    rows = PAGE[PAGE.index("| what happened") : PAGE.index("### Disk full")].count("\n| ")
    assert len(faults) <= rows + 1, "a new fault needs a row in docs/operations.md"
