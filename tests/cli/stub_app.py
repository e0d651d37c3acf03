"""An application with every kind of method and type, for which the tests write typed clients."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from zcproto import App, Items

app = App()


class Color(Enum):
    RED = "red"
    GREEN = "green"


@dataclass
class Line:
    item: str
    count: Annotated[int, Field(gt=0)] = 1
    price: Decimal = Decimal("1.5")


@dataclass
class Order:
    id: UUID
    lines: list[Line]
    color: Color = Color.RED
    placed: datetime.datetime | None = None
    parts: list[Order] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    place: tuple[int, str] = (1, "shelf")
    label: bytes = b""


@dataclass
class Cat:
    kind: Literal["cat"]


@dataclass
class Dog:
    kind: Literal["dog"]
    name: str


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


@app.method("order.place")
async def place(order: Order, urgent: bool = False, timeout: float = 1.0) -> Order:  # noqa: ASYNC109
    """Place an order.

    The "timeout" is a parameter of the method.
    """
    return order


@app.method("pet")
def pet(pet: Pet, level: Literal["low", "high"] = "low") -> dict[str, Pet]:
    return {level: pet}


@app.method("list")
def list_nothing() -> None:
    pass


@app.method("further")
def further(**counts: int) -> dict[str, Any]:
    return dict(counts)


@app.method("count.lines", durable=True)
async def count_lines(item: str, n: int = 2) -> AsyncIterator[Line]:
    for number in range(n):
        yield Line(item, number + 1)


@app.method("upload")
async def upload(name: str, chunks: Items[bytes]) -> int:
    return sum([len(chunk) async for chunk in chunks])


@app.method("orders")
async def orders(lines: Items[Line]) -> AsyncIterator[Order]:
    async for line in lines:
        yield Order(UUID(int=line.count), [line])
