"""Applications: methods by name, each with its access and its parameters.

    app = App()

    @app.method("greet")
    def greet(name: str, times: int = 1) -> str:
        "Say hello."
        return " ".join(["hello", name] * times)

Parameters are passed by name and checked against the annotations; results and items are sent by theirs. A parameter
annotated `Context` receives the context of the call. A plain function runs in the event loop and must not wait; an
`async` one may. An async generator sends items: it waits at `yield` until the client wants the next one. It has
a result by `yield Ended(result)`. A method with a parameter annotated `Items[T]` takes the client's items.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, Self, TypeVar, overload

from zcproto.app.context import Context, State
from zcproto.app.topics import Scope, Slow, Topic
from zcproto.auth.identity import BUILT_IN_SCHEMES, Authenticators
from zcproto.common.middleware import Middleware, around, check_middleware
from zcproto.common.parameters import Ended, Signature
from zcproto.common.roles import NO_ROLES, Roles, roles_from
from zcproto.common.value_types import ValueType
from zcproto.errors import InvalidArgument, PermissionDenied
from zcproto.observe.histogram import QUICK_S, WAITED_S, Histogram
from zcproto.sessions import Session
from zcproto.wire.message import METHOD_ALPHABET, METHOD_MAX_LENGTH, MessageError, decode_body, encode_body

Item = TypeVar("Item")


class Items(AsyncIterator[Item], Generic[Item]):
    """The client's items: a method takes them with `async for` from a parameter annotated `Items[T]`.

        @app.method("upload")
        async def upload(name: str, chunks: Items[bytes]) -> int:
            return sum([len(chunk) async for chunk in chunks])

    The client sends only as much as the method takes. An item that is not a `T` raises InvalidArgument.
    """

    __slots__ = ()


class Access(NamedTuple):
    """Who may call a method: sessions with one of the roles `needed`, if there are any, and none of `denied`."""

    needed: Roles
    denied: Roles = NO_ROLES

    def admits(self, roles: Roles) -> bool:
        """Return whether a session with these roles may call the method."""
        return not self.denied & roles and (not self.needed or not self.needed.isdisjoint(roles))


Handler = TypeVar("Handler", bound=Callable[..., Any])
Wrapper = TypeVar("Wrapper", bound=Middleware[Context])

Produce = Callable[[Any], Awaitable[Any]]
"""Sends the items of a generator and returns the result of its stream."""

UNLIMITED: Final = "session."
"""Methods that begin with this are not counted by the limits of requests."""

RESERVED_PREFIXES: Final = (UNLIMITED, "server.", "device.", "stream.")

_MAX_SLEEP_MS: Final = 3_600_000

_SCHEMA_DEPTH: Final = 24
"""How deep a schema may nest: `server.info` adds 4 to it, and clients accept 32."""

_SHAPES: Final = {
    (False, False): "unary",
    (True, False): "server",
    (False, True): "client",
    (True, True): "both",
}
"""Shapes by whether a method sends and takes items."""


class Method:
    """One method. `function` is called with keyword arguments only.

    `may_wait` is whether the function may return a coroutine instead of its result, `is_async` whether it always
    does, and `thread` whether it blocks. `signature` is that of the function, if it is known already. `bind` checks
    the parameters of a call and returns the arguments. `encode` returns the body of a result, `encode_item` that of
    an item. With `middleware`, or in a thread, `bind` and `function` are those of `_run_wrapped`.
    `is_unchecked` is whether `bind` returns any parameters unchanged, `admits_sessions` whether each request with a
    session may run, and `is_open` whether each one may, as those of `session.open`.
    `roles` are those of which a session needs one, as the application names them; none are needed without them.
    `access` is who may call the method, also by the configuration of the server; None for every session.
    `calls` counts calls, `durations` are the seconds that sampled calls occupied the loop, `waits` the seconds
    until asynchronous calls were answered; servers in one process share them.
    """

    __slots__ = (
        "_schema",
        "_schema_size",
        "_wrapped",
        "access",
        "admits_sessions",
        "bind",
        "calls",
        "context_name",
        "doc",
        "durations",
        "encode",
        "encode_item",
        "function",
        "is_async",
        "is_durable",
        "is_open",
        "is_unchecked",
        "items",
        "may_wait",
        "middleware",
        "name",
        "owner",
        "public",
        "roles",
        "shape",
        "signature",
        "thread",
        "topic",
        "waits",
    )

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        public: bool = False,
        roles: Collection[str] = (),
        may_wait: bool = False,
        thread: bool = False,
        durable: bool = False,
        signature: Signature | None = None,
    ) -> None:
        _check_name(name)
        if public and roles:
            raise ValueError(f"method {name}: choose public or roles, not both")
        if inspect.isgeneratorfunction(function):
            raise TypeError(f"method {name}: a stream must be an async generator; write async def")
        if thread and (
            _is(inspect.iscoroutinefunction, function) or _is(inspect.isasyncgenfunction, function)
        ):
            raise TypeError(f"method {name}: thread=True is for def; use asyncio.to_thread in async def")
        if signature is None:
            try:
                signature = Signature(function, injected=Context, items=Items)
            except TypeError as error:
                raise TypeError(f"method {name}: {error}") from error
        self.is_async = _is(inspect.iscoroutinefunction, function)
        yields = _is(inspect.isasyncgenfunction, function)
        if signature.is_iterator and not yields:
            raise TypeError(f"method {name}: it returns an async iterator and has no yield; yield its items")
        if public and (yields or signature.items is not None):
            raise ValueError(f"method {name}: a stream needs a session; remove public=True")
        if durable and (not yields or signature.items is not None):
            raise TypeError(
                f"method {name}: a durable method only sends items; write an async generator without Items"
            )
        if signature.items is not None and not (yields or self.is_async):
            raise TypeError(f"method {name}: a method that takes items waits for them; write async def")
        self.name = name
        self.function = function
        self.public = public
        self.is_durable = durable
        self.roles = roles_from(roles)
        self.doc = inspect.getdoc(function) or ""
        self.may_wait = may_wait or self.is_async
        self.thread = thread
        self.shape = _SHAPES[yields, signature.items is not None]
        """Whether the method sends and takes items: as `server.info` states it."""
        self.topic: Topic[Any] | None = None
        """The topic that the method subscribes to."""
        self.middleware: tuple[Middleware[Context], ...] = ()
        self.owner: App | None = None
        """The application whose lifespan yields the state of its calls."""
        self.reset_counters()
        self.signature = signature
        self.bind: Callable[[dict[str, Any]], dict[str, Any]] = signature.bind
        self.encode = _encoder(signature.result)
        self.encode_item = _encoder(signature.sends)
        self.context_name = signature.injected
        self.items = signature.items
        self.is_unchecked = signature.is_unchecked and signature.injected is None
        self.access: Access | None = None
        self.restrict(Access(self.roles) if self.roles else None)
        self._wrapped: Method | None = None  # this method without middleware
        self._schema: dict[str, Any] | None = None
        self._schema_size = 0.0

    def restrict(self, access: Access | None) -> None:
        """Let only the sessions that `access` admits call this method; with None all of them."""
        self.access = access
        self.admits_sessions = access is None and self.shape == "unary"
        self.is_open = self.public and access is None and self.name.startswith(UNLIMITED)

    def may_be_called_by(self, session: Session | None) -> bool:
        """Return whether a caller may call this method."""
        if session is None:
            return self.public
        return self.access is None or self.access.admits(session.roles)

    def reset_counters(self) -> None:
        self.calls = 0
        self.durations = Histogram(QUICK_S)
        self.waits = Histogram(WAITED_S)

    def served(self, name: str, middleware: tuple[Middleware[Context], ...], owner: App | None) -> Method:
        """Return this method under a name, with middleware around that which it has, and counters of its own.

        `owner` is the application whose lifespan it uses unless it has one.
        """
        method = copy.copy(self)
        method.name = name
        method.owner = self.owner or owner
        method.reset_counters()
        method.middleware = middleware + self.middleware
        if method.middleware or method.thread:
            method._wrapped = self._wrapped or self
            method.function = partial(_run_wrapped, method._wrapped, method.middleware)
            method.bind = _as_one_argument  # `_run_wrapped` checks the parameters, within the middleware
            method.context_name = "context"
            method.items = None if self.items is None else ("items", self.items[1])
            method.is_async = method.may_wait = True
            method.is_unchecked = False
        return method

    def check_result(self, result: Any) -> None:
        """Raise TypeError for a result of another type than annotated, which would be sent all the same."""
        if inspect.iscoroutine(result):
            raise TypeError("the result is a coroutine; await it")
        self.signature.result.check_sent(result, "result")

    def check_items(self) -> None:
        """Refuse to send items of another type than annotated."""
        encode, sends = self.encode_item, self.signature.sends

        def checked(item: Any) -> bytes:
            sends.check_sent(item, "item")
            return encode(item)

        self.encode_item = checked

    def functions(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Yield the names of the function and of its middleware, and these themselves."""
        yield self.name, (self._wrapped or self).function
        for each in self.middleware:
            yield f"middleware {getattr(each, '__name__', type(each).__name__)}", each

    @property
    def listing(self) -> dict[str, Any]:
        """The method as `server.info` lists it, without its schema."""
        return {"name": self.name, "doc": self.doc, "params": self.signature.params, "shape": self.shape}

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the method (zcproto/app/app.py)."""
        if self._schema is None:
            self._schema = method_schema(self.signature, sends=self.shape in ("server", "both"))
        return self._schema

    @property
    def schema_size(self) -> float:
        """The size of the encoded schema; infinite if clients could not read it."""
        if not self._schema_size:
            try:
                body = encode_body(self.schema)
                decode_body(body, _SCHEMA_DEPTH)
                self._schema_size = len(body)
            except MessageError:
                self._schema_size = math.inf
        return self._schema_size


async def _run_wrapped(
    method: Method,
    middleware: tuple[Middleware[Context], ...],
    context: Context,
    params: dict[str, Any],
    items: Items[Any] | None = None,
    produce: Produce | None = None,
) -> Any:
    """Run a method within its middleware."""

    async def run(context: Context) -> Any:
        arguments = method.bind(params)
        if method.context_name is not None:
            arguments[method.context_name] = context
        if method.items is not None:
            arguments[method.items[0]] = items
        if method.thread:
            return await context.caller.run_in_thread(context, method.function, arguments)
        result = method.function(**arguments)
        if produce is not None:
            return await produce(result)
        return await result if method.is_async else result

    return await around(middleware, run)(context)


def _as_one_argument(params: dict[str, Any]) -> dict[str, Any]:
    return {"params": params}


class App(Generic[State]):
    """A set of methods. Several servers may serve one application.

        @asynccontextmanager
        async def lifespan(app: App) -> AsyncIterator[Pool]:
            async with create_pool() as pool:
                yield pool

        app = App(lifespan=lifespan)

        @app.method
        async def count(context: Context[Pool]) -> int:
            return await context.state.fetch_count()

    Each server enters `lifespan(app)` before it listens, and leaves it when its methods have ended.
    `authenticators` decide who may open sessions. By default they are `BUILT_IN_SCHEMES`: the API keys, devices and
    client certificates of the server's home folder.
    """

    if not TYPE_CHECKING:

        def __new__(cls, *arguments: object, **_: object) -> Self:
            if arguments and cls.__init__ is App.__init__:
                raise TypeError("App: give arguments by name, as in App(lifespan=...)")
            return super().__new__(cls)

    def __init__(
        self,
        *,
        lifespan: Callable[[App[State]], AbstractAsyncContextManager[State]] | None = None,
        authenticators: Authenticators = (BUILT_IN_SCHEMES,),
    ) -> None:
        """Raises TypeError for a generator function that is not decorated as a context manager."""
        if _is(inspect.isasyncgenfunction, lifespan) or inspect.isgeneratorfunction(lifespan):
            raise TypeError("lifespan: decorate the function with contextlib.asynccontextmanager")
        self.authenticators = authenticators
        self._lifespan = lifespan
        self._methods: dict[str, Method] = {}
        self._middleware: tuple[Middleware[Context], ...] = ()
        self._included: list[tuple[str, App]] = []
        self._including: list[tuple[str, App]] = []
        self._served: tuple[Method, ...] | None = None

    @overload
    def method(self, function: Handler, /) -> Handler: ...
    @overload
    def method(
        self,
        name: str | None = None,
        *,
        public: bool = False,
        roles: Collection[str] = (),
        thread: bool = False,
        durable: bool = False,
    ) -> Callable[[Handler], Handler]: ...
    def method(
        self,
        name: str | Callable[..., Any] | None = None,
        *,
        public: bool = False,
        roles: Collection[str] = (),
        thread: bool = False,
        durable: bool = False,
    ) -> Callable[..., Any]:
        """Register a function under `name`, by default its own: `@app.method`, `@app.method("name")`.

        A `public` method may be called without a session. With `roles`, such as {"admin"}, a session needs one of
        them; the configuration may allow and deny the method to roles too. With `thread` a plain function may
        block: it runs in one of the server's threads. A `durable` stream goes on without its connection, and its
        items are kept until a client has taken them. Raises ValueError for a name that is malformed, registered or
        reserved, for a malformed role, and for `public` with `roles` or with a stream; TypeError for an annotation
        that cannot be used, for `self`, for `thread` with `async def`, and for `durable` of another method than a
        stream that takes no items.
        """
        if not (name is None or isinstance(name, str)):
            return self.method()(name)

        def register(function: Handler) -> Handler:
            own_name = _name_of(function) if name is None else name
            self.add(Method(own_name, function, public=public, roles=roles, thread=thread, durable=durable))
            return function

        return register

    def include(self, other: App, *, prefix: str = "") -> None:
        """Serve the methods of another application too, with `prefix` before their names.

            app.include(jobs.app, prefix="jobs.")

        Methods that are registered in `other` afterwards are served too. Its middleware and lifespan apply to its
        methods; its authenticators are not used. Raises ValueError for a name that is registered, malformed or
        reserved, and for an application that includes this one; then nothing changes.
        """
        if not isinstance(other, App):
            raise TypeError(f"include an App object, such as jobs.app, not a {type(other).__name__}")
        if other is self or other._includes(self):
            raise ValueError("an application cannot include itself")
        for name in other._names():
            self._check_free(prefix + name)
        self._included.append((prefix, other))
        other._including.append((prefix, self))
        self._changed()

    def middleware(self, function: Wrapper) -> Wrapper:
        """Run `async def` function(context, call_next) around each call of the methods of this application.

            @app.middleware
            async def log_failures(context: Context, call_next: CallNext[Context]) -> Any:
                try:
                    return await call_next(context)
                except Exception as error:
                    print(context.method, repr(error))
                    raise

        It may raise an error instead of calling `call_next`, at most once, and return another result. The first one
        registered is the outermost. It runs after the caller's access is checked and before the parameters are. A
        stream is within it until it ends, a run with an idempotency key once. Methods of included applications run
        within it too, those of the protocol do not. Raises TypeError for other functions.
        """
        check_middleware(function, "context")
        self._middleware += (function,)
        self._changed()
        return function

    @overload
    def topic(
        self,
        name: str,
        *,
        of: type[Item],
        keep: int = 16,
        slow: Slow = "drop_oldest",
        scope: Scope = "process",
        allow: Callable[[Context], bool] | None = None,
        roles: Collection[str] = (),
    ) -> Topic[Item]: ...
    @overload
    def topic(
        self,
        name: str,
        *,
        keep: int = 16,
        slow: Slow = "drop_oldest",
        of: Any = Any,
        scope: Scope = "process",
        allow: Callable[[Context], bool] | None = None,
        roles: Collection[str] = (),
    ) -> Topic[Any]: ...
    def topic(
        self,
        name: str,
        *,
        keep: int = 16,
        slow: Slow = "drop_oldest",
        of: Any = Any,
        scope: Scope = "process",
        allow: Callable[[Context], bool] | None = None,
        roles: Collection[str] = (),
    ) -> Topic[Any]:
        """Register a stream under `name` that sends every event of the returned topic.

        At most `keep` events, and 64 KiB, wait for a slow subscriber; then `slow` either drops the oldest for it or
        ends its stream. `of` is the type of the events, checked like that of a parameter: for a dataclass, an
        instance or a dict of its fields. With the `scope` "server" an event reaches the subscribers of all workers,
        and of all servers with the same store; otherwise those of the process that publishes it. `allow` returns
        whether a caller may subscribe; `roles` are as for methods. Raises ValueError like `method`, and for other
        values of `keep`, `slow` and `scope`; TypeError for an `of` that cannot be used.
        """
        topic: Topic[Any] = Topic(name, keep=keep, slow=slow, of=of, scope=scope)

        async def subscribe(context: Context) -> AsyncIterator[Any]:
            """Send every event of this topic from now on."""
            if allow is not None and not allow(context):
                raise PermissionDenied("this session may not subscribe to this topic")
            events = topic.subscribe(until=context.stopping)
            try:  # `with` would keep a bound method for each subscriber
                async for event in events:
                    yield event
            finally:
                topic.leave(context.stopping)

        method = Method(name, subscribe, roles=roles)
        method.topic = topic
        method.signature.sends, method.signature.result = topic.type, ValueType(None)
        self.add(method)
        return topic

    def add(self, method: Method) -> None:
        """Add a method. Raises ValueError if the name is registered or reserved."""
        self._check_free(method.name)
        self._methods[method.name] = method
        self._changed()

    def __iter__(self) -> Iterator[Method]:
        """Yield all methods that are served, with those of included applications."""
        if self._served is None:
            self._served = tuple(self._all())
        return iter(self._served)

    def _all(self) -> Iterator[Method]:
        middleware, owner = self._middleware, None if self._lifespan is None else self
        for method in self._methods.values():
            is_changed = middleware or method.thread or owner is not None
            yield method.served(method.name, middleware, owner) if is_changed else method
        for prefix, other in self._included:
            for method in other:
                yield method.served(prefix + method.name, middleware, owner)

    def lifespans(self) -> dict[App[Any], Callable[[App[Any]], AbstractAsyncContextManager[Any]]]:
        """Return the lifespans to enter, in order: that of this application, then of those that it includes."""
        found = {} if self._lifespan is None else {self: self._lifespan}
        for _, other in self._included:
            found |= {app: lifespan for app, lifespan in other.lifespans().items() if app not in found}
        return found

    def _names(self) -> Iterator[str]:
        yield from self._methods
        for prefix, other in self._included:
            yield from (prefix + name for name in other._names())

    def _has(self, name: str) -> bool:
        return name in self._methods or any(
            name.startswith(prefix) and other._has(name.removeprefix(prefix))
            for prefix, other in self._included
        )

    def _includes(self, app: App) -> bool:
        return any(other is app or other._includes(app) for _, other in self._included)

    def _check_free(self, name: str) -> None:
        """Raise ValueError if a name cannot be registered here, or in an application that includes this one."""
        _check_name(name)
        if name.startswith(RESERVED_PREFIXES):
            raise ValueError(
                f"method name {name!r}: {', '.join(RESERVED_PREFIXES)} are reserved for the protocol"
            )
        if self._has(name):
            raise ValueError(f"method {name!r} is registered twice")
        for prefix, app in self._including:
            app._check_free(prefix + name)

    def _changed(self) -> None:
        self._served = None
        for _, app in self._including:
            app._changed()


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= METHOD_MAX_LENGTH or not METHOD_ALPHABET.issuperset(name):
        raise ValueError(f"method name {name!r} must be 1 to {METHOD_MAX_LENGTH} characters of a-z 0-9 _ .")


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"{function!r} has no name of its own; give one: app.method('name')")
    return name


def _encoder(type_: ValueType) -> Callable[[Any], bytes]:
    """Return the function that encodes values of a type."""
    dump = type_.dump
    return encode_body if dump is None else lambda value: encode_body(dump(value))


def _is(kind: Callable[[Any], bool], function: Any) -> bool:
    """Return whether a function, or what a callable object calls, is of a kind."""
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004 - its kind matters


def default_app() -> App:
    """Return the application that `zcproto serve` runs if it is given none."""
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        """Return the params."""
        return params

    @app.method("sleep")
    async def sleep(ms: int) -> dict[str, Any]:
        """Wait for `ms` milliseconds, at most an hour."""
        if not 0 <= ms <= _MAX_SLEEP_MS:
            raise InvalidArgument(f"ms must be from 0 to {_MAX_SLEEP_MS}")
        await asyncio.sleep(ms / 1000)
        return {}

    @app.method("repeat")
    async def repeat(
        context: Context, n: int, data: bytes, count: int, interval: float = 0.0
    ) -> AsyncIterator[dict[str, Any] | Ended[dict[str, int]]]:
        """Send the data `count` times, numbered from `n`, every `interval` seconds or as fast as it is read."""
        if not 0 <= interval <= _MAX_SLEEP_MS / 1000:
            raise InvalidArgument(f"interval must be from 0 to {_MAX_SLEEP_MS // 1000}")
        started = context.now()
        for number in range(count):
            due = started + number * interval
            while interval and context.now() < due:  # noqa: ASYNC110 - a timer may be early
                await asyncio.sleep(due - context.now())
            yield {"n": n + number, "data": data}
        yield Ended({"items": count})

    @app.method("time")
    def time(context: Context) -> int:
        """The server's clock, milliseconds since the Unix epoch."""
        return context.wall()

    return app


_SHOWN_DEFAULTS: Final = frozenset({type(None), bool, int, float, str})

Direction = Literal["validation", "serialization"]
"""What a caller sends, and what it receives; the two differ for some types."""


def method_schema(signature: Signature, *, sends: bool) -> dict[str, Any]:
    """Return the JSON Schema of a method: its parameters, its result, and the items that it sends and takes.

        {"params": {"type": "object", "properties": {...}, "required": [...], "additionalProperties": false},
         "result": {...}, "sends": {...}, "takes": {...}, "$defs": {...}}

    It describes values as they are on the wire: bin is a str of the format `binary`, Decimal one of `decimal`.
    """
    types: dict[str, tuple[ValueType, Direction]] = {
        f"params.{each.name}": (each.type, "validation") for each in signature.parameters
    }
    types["result"] = signature.result, "serialization"
    if sends:
        types["sends"] = signature.sends, "serialization"
    if signature.items is not None:
        types["takes"] = signature.items[1], "validation"
    schemas, definitions = _schemas(types)
    properties: dict[str, Any] = {}
    others: Any = False
    for each in signature.parameters:
        schema = schemas.pop(f"params.{each.name}")
        if each.name.startswith("**"):
            others = schema or True
            continue
        default = each.default.value if isinstance(each.default, Enum) else each.default
        if not each.is_required and default.__class__ in _SHOWN_DEFAULTS:
            schema = {**schema, "default": default}
        properties[each.name] = schema
    params = {"type": "object", "properties": properties, "additionalProperties": others}
    required = [each.name for each in signature.parameters if each.is_required]
    if required:
        params["required"] = required
    return {"params": params, **schemas, **({"$defs": definitions} if definitions else {})}


def _schemas(
    types: dict[str, tuple[ValueType, Direction]],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the schema of each type, and the definitions that they share."""
    schemas = {key: type_.simple_schema for key, (type_, _) in types.items() if type_.adapter is None}
    adapters = {
        key: (type_.adapter, mode) for key, (type_, mode) in types.items() if type_.adapter is not None
    }
    if not adapters:
        return schemas, {}
    from zcproto.common.adapters import json_schemas  # noqa: PLC0415  pydantic is large

    described, definitions = json_schemas(adapters)
    return {**schemas, **described}, definitions
