"""The list of planted defects fits the code: each line stands once, each test is there. `make mutants` plants them."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.mutants.run import MUTANTS


@pytest.mark.fast
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted(mutant):
    text = (ROOT / "prunadapt_ds" / mutant.file).read_text()
    assert text.count(mutant.find) == 1
    # A file that Python cannot read is no defect that a test catches.
    ast.parse(text.replace(mutant.find, mutant.replace))


@pytest.mark.fast
def test_no_two_have_one_name():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.ci
def test_each_test_is_there():
    """With its parameters: pytest itself says which are not."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", *{mutant.test for mutant in MUTANTS}]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
