"""Test the generator of mutants and the list of equivalent ones."""

from __future__ import annotations

import pytest

from tests.mutation.__main__ import ROOT, mirrored, modules_of, read_equivalent, run
from tests.mutation.mutants import Mutant, mutants_of


def changes(source: str) -> list[str]:
    return [mutant.change for mutant in mutants_of("module.py", source.encode())]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {"< -> <="}),
        ("a is not b", {"is not -> is"}),
        ("(a) == (b)", {"== -> !="}),
        ("x = a and b or c", {"and -> or", "or -> and"}),
        ("x = not a", {"not -> "}),
        ("x = a + 1", {"+ -> -", "1 -> 2"}),
        ("a += b", {"+= -> -="}),
        ("x = call(a, b)", {"a, b -> b, a"}),
        ("x = min(a, b)", {"min -> max"}),
        ("x = a[:b]", {"b -> "}),
        ("x = True", {"True -> False"}),
        ("x = 1 if a else b", {"a -> True", "a -> False", "1 -> 2"}),
        ("def f():\n    return a", {"a -> None"}),
        ("a.b = c", {"a.b = c -> pass"}),
        ("raise a", {"raise a -> pass"}),
        ("for a in b:\n    break", {"break -> continue"}),
    ],
)
def test_faults_of_each_kind_are_made(source: str, expected: set[str]) -> None:
    assert expected <= set(changes(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "assert a < 1",
        "a: Literal[1]",
        "@call(1)\ndef f(): ...",
        "log.info(a, b)",
        'x = "a" + b',
    ],
)
def test_what_no_test_should_depend_on_is_not_mutated(source: str) -> None:
    assert changes(source) == []


def test_mutant_replaces_its_text_and_keeps_the_lines() -> None:
    source = "é = 'ä'\nif a <= b:\n    c()\n".encode()
    mutant = next(each for each in mutants_of("module.py", source) if each.change == "<= -> <")
    assert mutant.apply(source).decode() == "é = 'ä'\nif a < b:\n    c()\n"
    assert (mutant.line, mutant.text) == (2, "if a <= b:")


def test_mutants_are_the_same_each_time() -> None:
    source = (ROOT / "zcproto/sessions/table.py").read_bytes()
    assert mutants_of("sessions/table.py", source) == mutants_of("sessions/table.py", source)


def test_equivalent_mutants_exist_and_have_a_reason() -> None:
    for each in read_equivalent():
        (module,) = modules_of([each.module.removesuffix(".py")])
        mutants = mutants_of(module, (ROOT / "zcproto" / module).read_bytes())
        assert (each.line, each.change) in {(mutant.text, mutant.change) for mutant in mutants}, each
        assert each.reason.endswith(".")


def test_module_has_its_own_tests_and_those_of_its_room() -> None:
    own, wide = mirrored("auth/throttle.py")
    assert own == ["tests/auth/test_throttle.py"]
    assert wide == ["tests/auth"]


@pytest.mark.slow
def test_undetected_mutants_are_returned() -> None:
    """Mutants of equal size follow each other within a second: stale bytecode would hide the second."""
    module = "sessions/token.py"
    source = (ROOT / "zcproto" / module).read_bytes()
    good = next(each for each in mutants_of(module, source))
    same = Mutant(module, 1, "", "none", 0, 1, source[:1])
    assert run([same, good, same], 1, report=False) == [same, same]
