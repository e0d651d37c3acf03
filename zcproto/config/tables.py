"""Decides what an array of tables accepts, such as [[certificates.site]], and how it is written as TOML.

Rules: every fault in every table is told, each with its place; a table that has one does not hide those of
the others. Faults between tables are found by `check`, which the model gives.

Must not know: which keys the tables have, where a value came from, anything on the disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import BaseModel

from zcproto.config.rules import Refusal, RefusedError, Rule

MAX_REFUSALS = 101
"""One more than are ever told: so that it can be said that there are more."""

_MAX_NAME = 120
"""Characters of an unknown key that are compared with the known ones: each costs time."""

_MAX_BEGINNINGS = 2
"""A beginning that more names have means none of them."""

Tables = Mapping[int, Mapping[str, Any]]
"""The tables without a fault of their own by their index: their values as the program uses them."""


def rules_of(model: type[BaseModel]) -> dict[str, Rule]:
    """What each key of a model accepts, in their order."""
    return {
        name: next(each for each in field.metadata if isinstance(each, Rule))
        for name, field in model.model_fields.items()
    }


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The known names that `name` may have meant, if any: those that it is the beginning of, or the most alike."""
    known = list(known)
    name = name[:_MAX_NAME]
    longer = [each for each in known if each.startswith(f"{name}_")]
    if 1 <= len(longer) <= _MAX_BEGINNINGS:
        return longer
    return difflib.get_close_matches(name, known, 1, cutoff)


@dataclass(frozen=True)
class TablesOf(Rule):
    """Up to `most` tables that stand under [[`key`]]; a tuple of `model` in the program."""

    key: str
    model: type[BaseModel]
    most: int
    check: Callable[[Tables], Iterable[Refusal]]

    def expects(self) -> str:
        return f"up to {self.most} tables, each under a line [[{self.key}]]"

    def read(self, value: object) -> tuple[BaseModel, ...]:
        return self._read(value, from_text=False)

    def load(self, value: object) -> tuple[BaseModel, ...]:
        return self._read(value, from_text=True)

    def write(self, value: tuple[BaseModel, ...]) -> str:
        """All tables on one line; `write_table` has the form for people."""
        return f"[{', '.join('{' + ', '.join(self.write_table(each)) + '}' for each in value)}]"

    def write_table(self, table: BaseModel) -> list[str]:
        """The lines of one table."""
        return [f"{name} = {rule.write(getattr(table, name))}" for name, rule in rules_of(self.model).items()]

    def _read(self, value: object, *, from_text: bool) -> tuple[BaseModel, ...]:
        if not isinstance(value, list | tuple) or len(value) > self.most:
            raise self.refused()
        sound: dict[int, dict[str, Any]] = {}
        refusals = list(islice(self._faults(value, from_text, sound), MAX_REFUSALS))
        if refusals:
            raise RefusedError(f"{self.key}{refusals[0].where} {refusals[0].sentence}", refusals)
        return tuple(self.model(**table) for table in sound.values())

    def _faults(
        self, tables: Iterable[object], from_text: bool, sound: dict[int, dict[str, Any]]
    ) -> Iterator[Refusal]:
        """The faults of all tables. Those without one are put into `sound` by their index."""
        for index, table in enumerate(tables):
            values: dict[str, Any] = {}
            whole = True
            for item in self._items(table, from_text):
                if isinstance(item, Refusal):
                    whole = False
                    yield Refusal(f"[{index}]{item.where}", item.value, item.sentence)
                else:
                    values[item[0]] = item[1]
            if whole:
                sound[index] = values
        yield from self.check(sound)

    def _items(self, table: object, from_text: bool) -> Iterator[Refusal | tuple[str, Any]]:
        if isinstance(table, self.model):
            yield from table
            return
        if not isinstance(table, Mapping):
            yield Refusal("", table, f"must be a table under a line [[{self.key}]]")
            return
        rules = rules_of(self.model)
        for name, value in table.items():
            if name not in rules:
                yield Refusal(f".{name}", value, self._unknown(str(name)))
        for name, rule in rules.items():
            field = self.model.model_fields[name]
            if name not in table and not field.is_required():
                yield name, field.get_default(call_default_factory=True)
                continue
            value = table.get(name)
            try:
                yield name, rule.load(value) if from_text else rule.accept(value)
            except RefusedError as error:
                for each in error.refusals or [Refusal("", value, str(error))]:
                    yield Refusal(f".{name}{each.where}", each.value, each.sentence)

    def _unknown(self, name: str) -> str:
        rules = rules_of(self.model)
        near = nearest(name, rules)
        if near:
            return f"unknown key; did you mean {' or '.join(near)}?"
        return f"unknown key; [[{self.key}]] has {', '.join(rules)}"
