"""A run of some of the cases (QWEN15_TEST_EVERY) sees every value of every parameter, and its seed brings it back."""

from collections import namedtuple
from itertools import product

from conftest import some_cases

Item = namedtuple("Item", "nodeid callspec")
Spec = namedtuple("Spec", "params")


def cases():
    made = [Item(f"a.py::test[{kernels}-{tokens}]", Spec({"kernels": kernels, "tokens": tokens}))
            for kernels, tokens in product("xyz", range(40))]
    return made + [namedtuple("Plain", "nodeid")("a.py::other")]


def names(every, seed):
    return [item.nodeid for item in some_cases(cases(), every, seed)]


def test_every_value_of_every_parameter_is_there_once_at_least():
    for seed in range(20):
        kept = names(10, seed)
        assert "a.py::other" in kept and 12 < len(kept) < 70
        parameters = [name[len("a.py::test["):-1].split("-") for name in kept if "[" in name]
        assert {kernels for kernels, _ in parameters} == set("xyz")
        assert {int(tokens) for _, tokens in parameters} == set(range(40))


def test_a_seed_chooses_the_same_cases_again_and_another_one_others():
    assert names(10, 1) == names(10, 1) != names(10, 2)
    assert sorted(names(1, 1)) == sorted(item.nodeid for item in cases())
