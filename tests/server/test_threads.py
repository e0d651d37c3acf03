"""Tests of methods that run in threads: the pool with a loop of its own, and a server with such methods."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from tests.client.conftest import ConnectTo, connect_to, home
from tests.helpers import until
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import eventually
from zcproto.app.app import App, Items, Method
from zcproto.app.context import Context
from zcproto.errors import (
    Cancelled,
    Code,
    DeadlineExceeded,
    InternalError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from zcproto.server.threads import ThreadLimits, ThreadPool

__all__ = ["connect_to", "home"]


class Blocker:
    """Work that blocks its thread until it is released."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.release = threading.Event()

    def work(self, name: str) -> Callable[[], str]:
        def block() -> str:
            self.begun.append(name)
            assert self.release.wait(TIMEOUT)
            return name

        return block


@pytest.fixture
def blocker() -> Iterator[Blocker]:
    blocker = Blocker()
    yield blocker
    blocker.release.set()


def start(pool: ThreadPool, blocker: Blocker, name: str, owner: str | None = None) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(pool.run(owner or f"user {name}", blocker.work(name)))


# --- the pool --------------------------------------------------------------------------------------------


async def test_result_error_and_context_of_the_caller_pass_the_thread() -> None:
    pool, name = ThreadPool(), contextvars.ContextVar("name", default="none")
    name.set("ada")

    def fail(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    assert await pool.run("user ada", lambda: (name.get(), threading.current_thread().name)) == (
        "ada",
        "zcproto-method",
    )
    with pytest.raises(NotFound, match="no such thing"):
        await pool.run("user ada", fail(NotFound("no such thing")))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await pool.run("user ada", fail(StopIteration()))
    assert (pool.running, pool.waiting, await pool.close(0.0)) == (0, 0, 0)


async def test_threads_are_reused() -> None:
    pool = ThreadPool()
    threads = {await pool.run("user ada", threading.get_ident) for _ in range(20)}
    assert len(threads) == 1


async def test_calls_beyond_the_threads_wait_in_order(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=2, waiting=3))
    tasks = [start(pool, blocker, name) for name in "abcde"]
    await until(lambda: len(blocker.begun) == 2)
    assert (pool.running, pool.waiting, sorted(blocker.begun)) == (2, 3, ["a", "b"])
    blocker.release.set()
    assert await asyncio.gather(*tasks) == [*"abcde"]
    assert (pool.running, pool.waiting) == (0, 0)
    one = ThreadPool(ThreadLimits(threads=1, waiting=3))
    blocker.begun.clear()
    await asyncio.gather(*(start(one, blocker, name) for name in "abcd"))
    assert blocker.begun == [*"abcd"]


async def test_call_beyond_the_queue_is_unavailable(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=1))
    tasks = [start(pool, blocker, name) for name in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="too many calls wait for a thread"):
        await pool.run("user eve", lambda: None)
    assert pool.refused == 1
    blocker.release.set()
    await asyncio.gather(*tasks)
    assert await pool.run("user eve", lambda: 1) == 1


async def test_one_user_cannot_take_the_whole_queue(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=7))
    tasks = [start(pool, blocker, str(number), "user ada") for number in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="of this user"):
        await pool.run("user ada", lambda: None)
    tasks.append(start(pool, blocker, "bob", "user bob"))
    await asyncio.sleep(0)
    assert (pool.waiting, pool.refused) == (4, 1)
    blocker.release.set()
    assert len(await asyncio.gather(*tasks)) == 5
    assert await pool.run("user ada", lambda: 1) == 1


async def test_call_cancelled_in_the_queue_is_never_run(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=4))
    first, second, third = (start(pool, blocker, name) for name in "abc")
    await until(lambda: blocker.begun)
    second.cancel()
    await asyncio.wait([second])
    assert (pool.running, pool.waiting) == (1, 1)
    for _ in range(20):  # more than have a place
        gone = start(pool, blocker, "gone")
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
    assert (pool.running, pool.waiting, pool.refused) == (1, 1, 0)
    blocker.release.set()
    assert await asyncio.gather(first, third) == ["a", "c"]
    assert blocker.begun == ["a", "c"]


async def test_threads_of_cancelled_calls_leave_one_to_another_user(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=4, waiting=8))
    for _ in range(3):
        gone = [start(pool, blocker, "ada") for _ in range(4)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
    assert (pool.running, pool.waiting) == (3, 0)
    assert await pool.run("user bob", lambda: "at once") == "at once"
    blocker.release.set()


async def test_last_thread_is_for_a_user_that_holds_none(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=4, waiting=8))
    tasks = [start(pool, blocker, name) for name in ["ada"] * 2 + ["bob"] * 2]
    await asyncio.sleep(0)
    assert (pool.running, pool.waiting) == (3, 1)
    assert await pool.run("user eve", lambda: "at once") == "at once"
    blocker.release.set()
    await asyncio.gather(*tasks)
    assert (pool.running, pool.waiting) == (0, 0)


async def test_waiting_users_are_served_in_turn(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=15))
    tasks = [start(pool, blocker, name) for name in ["ada"] * 5 + ["bob", "eve"] * 2]
    await asyncio.sleep(0)
    blocker.release.set()
    await asyncio.gather(*tasks)
    assert blocker.begun == ["ada", *["ada", "bob", "eve"] * 2, "ada", "ada"]


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (2, 1), (3, 2), (4, 3), (16, 12)])
async def test_user_holds_at_most_three_quarters_of_the_threads(
    blocker: Blocker, threads: int, most: int
) -> None:
    pool = ThreadPool(ThreadLimits(threads=threads, waiting=16))
    tasks = [start(pool, blocker, "ada") for _ in range(threads)]
    await asyncio.sleep(0)
    assert (pool.running, pool.waiting) == (most, threads - most)
    blocker.release.set()
    await asyncio.gather(*tasks)


async def test_calls_cancelled_in_a_queue_leave_no_trace(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=15))
    first, second, third = (start(pool, blocker, name) for name in ("ada", "bob", "eve"))
    await until(lambda: blocker.begun)
    second.cancel()  # its turn comes before it leaves the queue
    pool.reconfigure(ThreadLimits(threads=2, waiting=15))
    await asyncio.wait([second])
    await until(lambda: len(blocker.begun) == 2)
    blocker.release.set()
    assert await asyncio.gather(first, third) == ["ada", "eve"]
    assert (blocker.begun, pool.running, pool.waiting) == (["ada", "eve"], 0, 0)
    assert [*pool._calls_of, *pool._threads_of, *pool._queues] == []


async def test_call_cancelled_as_it_gets_a_thread_passes_it_on(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=4))
    first, second, third = (start(pool, blocker, name) for name in "abc")
    first.add_done_callback(lambda _: second.cancel())
    blocker.release.set()
    assert await asyncio.gather(first, third) == ["a", "c"]
    await asyncio.wait([second])
    assert second.cancelled()
    assert pool.running == 0


async def test_cancelled_call_keeps_its_thread_until_it_returns(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=4))
    first, second = start(pool, blocker, "a"), start(pool, blocker, "b")
    await until(lambda: blocker.begun)
    first.cancel()
    await asyncio.wait([first])
    assert (pool.running, pool.waiting, blocker.begun) == (1, 1, ["a"])
    blocker.release.set()
    assert await second == "b"


async def test_raised_limit_lets_waiting_calls_run(blocker: Blocker) -> None:
    pool = ThreadPool(ThreadLimits(threads=1, waiting=4))
    tasks = [start(pool, blocker, name) for name in "abc"]
    await until(lambda: blocker.begun)
    pool.reconfigure(ThreadLimits(threads=2, waiting=4))
    await until(lambda: len(blocker.begun) == 2)
    pool.reconfigure(ThreadLimits(threads=1, waiting=4))
    blocker.release.set()
    assert await asyncio.gather(*tasks) == [*"abc"]
    assert pool.running == 0


async def test_close_waits_for_methods_within_its_limit(blocker: Blocker) -> None:
    pool = ThreadPool()
    task = start(pool, blocker, "a")
    await until(lambda: blocker.begun)
    task.cancel()
    assert await pool.close(0.01) == 1
    blocker.release.set()
    assert await pool.close(TIMEOUT) == 0


async def test_thread_that_cannot_be_started_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = ThreadPool()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(Unavailable, match="cannot start a thread"):
            await pool.run("user ada", lambda: 1)
    assert pool.running == 0
    assert await pool.run("user ada", lambda: 1) == 1


# --- definition ------------------------------------------------------------------------------------------


async def coroutine() -> int:
    return 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


def generator() -> Iterator[int]:
    yield 1


def takes_items(items: Items[int]) -> int:
    return 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (coroutine, r"thread=True is for def; use asyncio\.to_thread in async def"),
        (async_generator, r"thread=True is for def; use asyncio\.to_thread in async def"),
        (generator, "a stream must be an async generator"),
        (takes_items, "takes items waits for them"),
    ],
)
def test_only_a_plain_function_runs_in_a_thread(function: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        Method("m", function, thread=True)


# --- a server --------------------------------------------------------------------------------------------


class BlockingMethods:
    """An application whose methods block."""

    def __init__(self, blocker: Blocker) -> None:
        self.app = App()
        self.contexts: list[Context] = []

        @self.app.method(thread=True)
        def block(context: Context, name: str) -> str:
            self.contexts.append(context)
            return blocker.work(name)()

        @self.app.method(thread=True)
        def who(context: Context, n: int = 1) -> Any:
            return [context.user, threading.current_thread().name] * n

        @self.app.method(thread=True)
        def plain(n: int) -> int:
            return n + 1

        @self.app.method(thread=True)
        def event(context: Context) -> bool:
            return context.send_event("news", 1)

        self.app.method("echo")(lambda **params: params)


@pytest.fixture
def methods(blocker: Blocker) -> BlockingMethods:
    return BlockingMethods(blocker)


async def test_blocking_method_leaves_the_loop_free(
    serve: Serve, connect_to: ConnectTo, methods: BlockingMethods, blocker: Blocker
) -> None:
    server = serve(methods.app)
    async with connect_to(server) as client:
        call = asyncio.create_task(client.call("block", name="a"))
        await until(lambda: blocker.begun)
        assert await client.call("echo", n=1) == {"n": 1}
        assert await client.call("plain", n=1) == 2
        blocker.release.set()
        assert await call == "a"
        assert await client.call("who") == ["ada", "zcproto-method"]
        assert await client.call("plain", n=1, idempotency_key="k") == 2
        with pytest.raises(InternalError):
            await client.call("event")


async def test_deadline_and_cancellation_answer_while_the_thread_runs(
    serve: Serve, connect_to: ConnectTo, methods: BlockingMethods, blocker: Blocker
) -> None:
    server = serve(
        methods.app, limits__threads=3, limits__idle_timeout="24h", loop_factory=asyncio.new_event_loop
    )
    async with connect_to(server) as client:
        call = asyncio.create_task(client.call("block", name="a", timeout=3_600.0))
        await until(lambda: blocker.begun)
        server.advance(3_600)
        with pytest.raises(DeadlineExceeded):
            await call
        call = asyncio.create_task(client.call("block", name="b"))
        await until(lambda: len(blocker.begun) == 2)
        call.cancel()
        await until(lambda: all(context.cancelled for context in methods.contexts))
        assert server.server.state.threads.running == 2
        with pytest.raises(DeadlineExceeded):  # waits for a thread
            await client.call("plain", n=1, timeout=0.1)
        blocker.release.set()
        assert await client.call("plain", n=1) == 2
    assert blocker.begun == ["a", "b"]


async def test_calls_beyond_the_queue_are_refused_and_counted(
    serve: Serve, connect_to: ConnectTo, methods: BlockingMethods, blocker: Blocker
) -> None:
    server = serve(methods.app, limits__threads=1, limits__waiting_for_thread=1)
    async with connect_to(server) as client, connect_to(server, "bob") as bob:
        calls = [asyncio.create_task(each.call("block", name="x")) for each in (client, bob)]
        pool = server.server.state.threads
        await until(lambda: pool.running == pool.waiting == 1)
        with server.client("eve") as eve:
            refused = eve.refused("plain", {"n": 1})
            assert refused.code == Code.UNAVAILABLE
            assert "too many calls wait for a thread" in refused.message
        blocker.release.set()
        await asyncio.gather(*calls)
        assert pool.refused > 0


async def test_drain_waits_for_threads_and_then_answers_cancelled(
    serve: Serve, connect_to: ConnectTo, methods: BlockingMethods, blocker: Blocker
) -> None:
    server = serve(methods.app)
    async with connect_to(server) as client:
        finished = asyncio.create_task(client.call("block", name="a"))
        await until(lambda: blocker.begun)
        server.begin_drain(TIMEOUT)
        await until(lambda: server.server.state.draining)
        blocker.release.set()
        assert await finished == "a"
        await asyncio.to_thread(server.join)


async def test_thread_that_outlives_the_drain_does_not_keep_the_server(
    serve: Serve,
    connect_to: ConnectTo,
    methods: BlockingMethods,
    blocker: Blocker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zcproto.runtime.server.CANCELLED_TIME", 0.05)
    server = serve(methods.app)
    async with connect_to(server) as client:
        call = asyncio.create_task(client.call("block", name="a"))
        await until(lambda: blocker.begun)
        await asyncio.to_thread(server.drain)
        await asyncio.wait([call])
        assert isinstance(call.exception(), Cancelled)
    assert server.server.state.threads.running == 1
    blocker.release.set()


def test_reload_applies_other_limits(serve: Serve, methods: BlockingMethods) -> None:
    server = serve(methods.app)
    server.reload(limits__threads=3, limits__waiting_for_thread=5)
    assert server.server.state.threads.limits == ThreadLimits(3, 5)
    eventually(lambda: server.alive)
