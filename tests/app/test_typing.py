"""What type checkers see of an application's state."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.helpers import run_mypy

PROGRAM: Final = """
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, assert_type

from zcproto import App, CallNext, Context, Server

@asynccontextmanager
async def lifespan(app: App[list[int]]) -> AsyncIterator[list[int]]:
    yield [1]

@asynccontextmanager
async def bare_lifespan(app: App) -> AsyncIterator[str]:
    yield "state"

app, plain, other = App(lifespan=lifespan), App(), App(lifespan=bare_lifespan)
assert_type(app, App[list[int]])
assert_type(plain, App[Any])

@app.method
async def first(context: Context[list[int]]) -> int:
    return assert_type(context.state, list[int])[0]

@plain.method(thread=True)
def anything(context: Context, n: int) -> int:
    assert_type(context.state, Any)
    return n

@app.middleware
async def typed(context: Context[list[int]], call_next: CallNext[Context[list[int]]]) -> Any:
    return await call_next(context)

@app.middleware
async def untyped(context: Context, call_next: CallNext[Context]) -> Any:
    return await call_next(context)

async def use(context: Context[list[int]]) -> None:
    assert_type(await first(context), int)
    assert_type(anything(context, 1), int)

app.include(plain, prefix="plain.")
app.include(other, prefix="other.")
Server(app)
"""

WRONG: Final = """
from zcproto import App, Context

app = App()

@app.method
def wrong(context: Context[list[int]]) -> str:
    return context.state[0]

app.method(public="yes")
app.include(wrong)
"""


def test_state_is_typed_and_plain_applications_need_no_type(tmp_path: Path) -> None:
    good, wrong = tmp_path / "good.py", tmp_path / "wrong.py"
    good.write_text(PROGRAM)
    wrong.write_text(WRONG)
    done = run_mypy(tmp_path, good, wrong)
    assert done.stderr == ""
    faults = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.partition(".py:")[2].partition(":")[0] for line in faults] == ["8", "10", "11"], done.stdout
    assert all("wrong.py" in line for line in faults)


TYPED: Final = """
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, assert_type

from zcproto import App, BlockingClient, Client, Context, Ended, Topic, TopicEvent

app = App()

@dataclass
class Turn:
    text: str

turns = app.topic("turns", of=Turn)
assert_type(turns, Topic[Turn])
assert_type(app.topic("any"), Topic[Any])

@app.method
async def words(text: str) -> AsyncIterator[str | TopicEvent[Turn] | Ended[int]]:
    with turns.subscribe() as events:
        async for event in events:
            assert_type(event.value, Turn)
            yield event
    yield Ended(7)

async def use(context: Context, client: Client, blocking: BlockingClient) -> None:
    turns.publish(Turn("a"))
    assert_type(await client.call("m"), Any)
    assert_type(await client.call("m", {}, returns=Turn, text="a"), Turn)
    assert_type(await client.call("m", returns=list[Turn]), list[Turn])
    assert_type(blocking.call("m", returns=Turn), Turn)
    assert_type(await context.client.call("m", returns=bool, timeout=1.0), bool)
    turns.publish("a")  # wrong
"""


def test_results_and_topics_are_typed(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    done = run_mypy(tmp_path, "typed.py")
    faults = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in faults] == [str(len(TYPED.splitlines()))], done.stdout
