"""Test the generator of mutants and the list of equivalent ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import CodeType

import pytest

from tests.limits import TIMEOUT
from tests.mutation import children
from tests.mutation.__main__ import ROOT, choose, find_equivalent, run
from tests.mutation.forks import Result, changed_functions, statement_lines
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
        "@dataclass(slots=True)\nclass C: ...",
        "a: int = field(init=False)",
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
    for entry, mutants in find_equivalent():
        assert len(mutants) == 1, f"{entry}: name one mutant of `python -m tests.mutation --list`: {mutants}"
        assert entry.reason.endswith(".")


def test_mutants_have_the_place_that_code_is_moved_by() -> None:
    source = """
SIZE, _COUNT = 1, 2
class Table:
    limit: int = 3
    def find(self, key=4):
        def inner():
            return key < 5 or key < 5
        return [each for each in key if each > 6]
"""
    places = {mutant.change: mutant.place for mutant in mutants_of("module.py", source.encode())}
    assert places["1 -> 2"] == "SIZE"
    assert places["2 -> 3"] == "_COUNT"
    assert places["3 -> 4"] == "Table.limit"
    assert places["4 -> 5"] == places["5 -> 6"] == places["6 -> 7"] == "Table.find"
    twice = [each for each in mutants_of("module.py", source.encode()) if each.change == "< -> <="]
    assert [each.number for each in twice] == [1, 2]


def test_lines_of_children_are_recorded(tmp_path: Path) -> None:
    """The child forks, and both end by `os._exit`, as workers do."""
    (tmp_path / "sitecustomize.py").write_text(children.SITE)
    program = """
import os
from zcproto.common import text
if not os.fork():
    text.counted(1, "fork")
    os._exit(0)
os.wait()
os._exit(0)
"""
    folder = tmp_path / "lines"
    folder.mkdir()
    paths = [tmp_path, ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        children.FOLDER: str(folder),
        children.CONTEXT: "this test",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=TIMEOUT)
    lines = children.load(folder)[str(ROOT / "zcproto/common/text.py")]
    source = (ROOT / "zcproto/common/text.py").read_text().splitlines()
    function = next(number for number, line in enumerate(source, 1) if line.startswith("def counted"))
    assert lines[function] == {"this test"}
    assert lines[function + 2] == {"this test"}


def test_most_of_a_sample_remains_when_a_module_changes() -> None:
    source = (ROOT / "zcproto/sessions/token.py").read_bytes()
    mutants = mutants_of("sessions/token.py", source)
    before = choose(mutants, seed=1, size=8)
    assert len(before) == 8
    assert before == choose(mutants, seed=1, size=8)
    assert before != choose(mutants, seed=2, size=8)
    rest = [each for each in mutants if each != before[0]]
    assert len(set(before) & set(choose(rest, seed=1, size=8))) == 7


SOURCE = """
LIMIT = 1 + len("a")
class Table:
    size = 2
    def find(self, key=3):
        return [each for each in key if
                each > 4]
"""


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("each > 4", "each < 4", ["find"]),
        ("key=3", "key=5", None),
        ("size = 2", "size = 5", None),
        ("size = 2", "size = True", None),
        ("1 + len", "1 - len", None),
        ("", "", []),
    ],
)
def test_only_code_of_functions_is_replaced_in_a_fork(old: str, new: str, names: list[str] | None) -> None:
    def compiled(source: str) -> CodeType:
        return compile(source, "module.py", "exec", dont_inherit=True)

    pairs = changed_functions(compiled(SOURCE), compiled(SOURCE.replace(old, new)))
    assert (None if pairs is None else [after.co_name for _, after in pairs]) == names


@pytest.mark.parametrize(
    ("line", "lines"), [(2, range(2, 3)), (3, range(3, 4)), (5, range(5, 6)), (7, range(6, 8))]
)
def test_tests_are_chosen_by_the_innermost_statement(line: int, lines: range) -> None:
    assert statement_lines(SOURCE.encode(), line) == lines


@pytest.mark.slow
@pytest.mark.timeout(900)  # it runs tests of a room four times
def test_undetected_mutants_are_reported() -> None:
    """Mutants of equal size follow each other within a second: stale bytecode would hide the second."""
    module = "wire/frame.py"
    source = (ROOT / "zcproto" / module).read_bytes()
    good = next(each for each in mutants_of(module, source) if each.change == "length > limit -> True")
    constant = next(each for each in mutants_of(module, source) if each.change == "4 -> 5")
    same = Mutant(module, 1, "", "none", 1, "", 0, 1, source[:1])
    results: list[tuple[Mutant, Result]] = []
    run([good, constant, same], 1, lambda *result: results.append(result))
    assert [mutant for mutant, _ in results] == [good, constant, same]
    assert [result.outcome for _, result in results] == ["failed", "failed", "passed"]
