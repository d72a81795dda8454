"""Each deliberate fault in the code of the Ascend path is noticed by a test."""

import pytest
from ascend_mutations import MUTATIONS, PACKAGE, ROOT, noticed
from conftest import require


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_table_of_faults_is_up_to_date(name):
    """Every fault finds the line that it changes, once."""
    text = (ROOT / (PACKAGE + MUTATIONS[name].file)).read_text(encoding="utf-8")
    assert text.count(MUTATIONS[name].old) == 1


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_noticed(name):
    require("mindformers")
    found, last = noticed(MUTATIONS[name])
    assert found, f"the tests pass, or could not run: {last}"
