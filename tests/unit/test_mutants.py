"""The list of planted defects fits the code: each line stands once, each test is there. `make mutants` plants them."""

import ast
import re

import pytest

from tests.conftest import ROOT
from tests.mutants.run import MUTANTS

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted(mutant):
    text = (ROOT / "prunadapt_ds" / mutant.file).read_text()
    assert text.count(mutant.find) == 1
    ast.parse(
        text.replace(mutant.find, mutant.replace)
    )  # a file that Python does not read is no defect that a test catches
    file, _, name = mutant.test.partition("::")
    assert re.search(rf"^def {re.escape(name.partition('[')[0])}\(", (ROOT / file).read_text(), re.M)


def test_no_two_have_one_name():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
