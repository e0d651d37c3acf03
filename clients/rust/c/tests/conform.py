"""The program that drives the C interface for the kit, through ctypes: `python conform.py libzcproto.so`.

It has the steps of zcproto_conformance/blocking.py, whose folder must be in PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
from ctypes import POINTER, byref, c_char_p, c_size_t, c_uint8, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from zcproto_conformance.blocking import Api, BlockingConform, Failure, Hold, Step, Wait, start
from zcproto_conformance.python_client import CAUSES
from zcproto_conformance.values import typed, untyped

CLOSED, CANNOT_CONNECT, TLS, END = -5, -4, -3, -8
FATAL = range(64, 67)
DONE = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
HANDLER = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
LOGIN = ctypes.CFUNCTYPE(c_void_p, c_void_p)
FOREVER = c_uint64(3_600_000)


class CallOptions(ctypes.Structure):
    """`zcp_call_options`."""

    _fields_ = (
        ("timeout_ms", c_uint64),
        ("idempotency_key", c_char_p),
        ("traceparent", c_char_p),
    )


class StreamOptions(ctypes.Structure):
    """`zcp_stream_options`."""

    _fields_ = (
        ("timeout_ms", c_uint64),
        ("item_timeout_ms", c_uint64),
        ("window_items", c_uint64),
        ("window_bytes", c_uint64),
        ("traceparent", c_char_p),
    )


class CError(Exception):
    """An error that a function has returned."""

    def __init__(self, code: int, message: str, details: Any, is_clean: bool) -> None:
        super().__init__(message)
        self.code, self.details, self.is_clean = code, details, is_clean


class CApi(Api):
    """The C interface."""

    def __init__(self, library: str) -> None:
        self._zcp = ctypes.CDLL(library)
        for name in ("error_message", "code_name", "server_call_method", "server_call_user", "version"):
            getattr(self._zcp, f"zcp_{name}").restype = c_char_p
        self._zcp.zcp_value_msgpack.restype = POINTER(c_uint8)
        for name in ("server_call_params", "error_details"):
            getattr(self._zcp, f"zcp_{name}").restype = c_void_p
        self.name = f"zcproto-c/{self._zcp.zcp_version().decode()}"
        self._functions: list[Any] = []  # that the library may call
        self._pending: dict[str, c_void_p] = {}  # by the name of the call

    # --- the steps ----------------------------------------------------------------------------------

    def connect(self, step: Step) -> c_void_p:
        options = self._made("options_new", step["address"].encode())
        try:
            for name, value in options_of(step).items():
                self._check("options_set", options, name.encode(), str(value).encode())
            if "login" in step:
                logins = map(untyped, step["login"])
                login = self._kept(LOGIN(lambda _: self._value(next(logins)).value))
                self._check("options_set_login", options, login, None)
            return self._made("connect", options)
        finally:
            self._zcp.zcp_options_free(options)

    def session_for(self, client: c_void_p, step: Step) -> c_void_p:
        options = self._made("options_new", b"localhost")
        try:
            for name in ("user", "key"):
                self._check("options_set", options, name.encode(), step[name].encode())
            return self._made("session_for", client, options)
        finally:
            self._zcp.zcp_options_free(options)

    def call(self, client: c_void_p, method: str, params: Any, step: Step) -> Wait:
        key, trace = (encoded(step.get(name)) for name in ("idempotency_key", "traceparent"))
        options = CallOptions(step.get("timeout_ms", 0), key, trace)
        ended: queue.SimpleQueue[tuple[int | None, int | None]] = queue.SimpleQueue()
        done = self._kept(DONE(lambda _, result, error: ended.put((result, error))))
        value = self._value(params)
        try:
            arguments = client, method.encode(), value, byref(options), done, None
            self._pending[step["call"]] = self._made("call_start", *arguments)
        finally:
            self._zcp.zcp_value_free(value)

        def wait() -> Any:
            result, error = ended.get()
            if error is not None:
                raise self._error(c_void_p(error))
            return self._taken(c_void_p(result))

        return wait

    def cancel(self, call: str) -> None:
        self._zcp.zcp_pending_cancel(self._pending[call])

    def open(self, client: c_void_p, method: str, params: Any, step: Step) -> c_void_p:
        items, size = step.get("credit", (0, 0))
        options = StreamOptions(step.get("timeout_ms", 0), 0, items, size, None)
        value = self._value(params)
        try:
            return self._made("stream_open", client, method.encode(), value, byref(options))
        finally:
            self._zcp.zcp_value_free(value)

    def next(self, stream: c_void_p) -> dict[str, Any]:
        try:
            return {"item": self._taken(self._made("stream_next", stream))}
        except CError as error:
            if error.code != END:
                raise
        return {"end": self._taken(self._made("stream_result", stream))}

    def send(self, stream: c_void_p, value: Any) -> None:
        item = self._value(value)
        try:
            self._check("stream_send", stream, item)
        finally:
            self._zcp.zcp_value_free(item)

    def finish(self, stream: c_void_p) -> None:
        self._check("stream_finish", stream)

    def leave(self, stream: c_void_p) -> None:
        self._zcp.zcp_stream_cancel(stream)

    def handle(self, client: c_void_p, method: str, hold: Hold) -> None:
        def called(_: int | None, address: int | None) -> None:
            call = c_void_p(address)
            name = self._zcp.zcp_server_call_method(call).decode()
            user = self._zcp.zcp_server_call_user(call).decode()
            params = self._read(c_void_p(self._zcp.zcp_server_call_params(call)))

            wait = hold(name, user, params)

            def answer() -> None:  # in a thread of its own: this one belongs to the library
                try:
                    value = self._value(wait())
                except Failure as failure:
                    self._zcp.zcp_server_call_fail(call, failure.code, str(failure).encode())
                else:
                    self._zcp.zcp_server_call_reply(call, value)
                    self._zcp.zcp_value_free(value)

            start(answer)

        self._check("handle", client, method.encode(), self._kept(HANDLER(called)), None)

    def event(self, client: c_void_p) -> dict[str, Any]:
        name, data = self._taken(self._made("event", client, FOREVER))
        return {"name": name, "data": data}

    def session(self, client: c_void_p) -> dict[str, Any] | None:
        session: dict[str, Any] | None = self._taken(self._made("session", client))
        return session

    def open_session(self, client: c_void_p) -> None:
        self._check("open_session", client)

    def cut(self, client: c_void_p) -> None:
        self._zcp.zcp_cut(client)

    def close(self, client: c_void_p) -> None:
        self._zcp.zcp_close(client)

    def describe(self, error: Exception) -> dict[str, Any]:
        if not isinstance(error, CError):
            raise error
        message = str(error)
        if error.code == CLOSED or error.code in FATAL:
            code = error.details.get("code") if error.code == CLOSED else error.code
            return {"kind": "closed", "clean": error.is_clean, "code": code, "message": message}
        if error.code > 0:
            name = self._zcp.zcp_code_name(error.code).decode()
            return {
                "kind": "call",
                "code": error.code,
                "name": name,
                "message": message,
                "details": typed(error.details),
            }
        if error.code == TLS:
            return {"kind": "tls", "cause": CAUSES.get(error.details["failure"], "other"), "message": message}
        return {"kind": "connect" if error.code == CANNOT_CONNECT else "argument", "message": message}

    # --- the border ---------------------------------------------------------------------------------

    def _check(self, function: str, *arguments: object) -> None:
        """Call a function that can fail, with the arguments before its last one."""
        error = c_void_p()
        code: int = getattr(self._zcp, f"zcp_{function}")(*arguments, byref(error))
        if code:
            raise self._error(error)

    def _error(self, error: c_void_p) -> CError:
        """Return an error as one of Python, and free it."""
        message = self._zcp.zcp_error_message(error).decode()
        details = self._read(c_void_p(self._zcp.zcp_error_details(error)))
        is_clean = bool(self._zcp.zcp_error_is_clean(error))
        code = self._zcp.zcp_error_code(error)
        self._zcp.zcp_error_free(error)
        return CError(code, message, details, is_clean)

    def _kept(self, function: Any) -> Any:
        """Keep a function of Python that the library may call."""
        self._functions.append(function)
        return function

    def _made(self, function: str, *arguments: object) -> c_void_p:
        """Call a function that makes an object, and return the object."""
        made = c_void_p()
        self._check(function, *arguments, byref(made))
        return made

    def _value(self, value: object) -> c_void_p:
        body = msgpack.packb(value)
        return self._made("value_from_msgpack", body, c_size_t(len(body)))

    def _read(self, value: c_void_p) -> Any:
        size = c_size_t()
        body = self._zcp.zcp_value_msgpack(value, byref(size))
        return msgpack.unpackb(ctypes.string_at(body, size.value))

    def _taken(self, value: c_void_p) -> Any:
        """Return a value as one of Python, and free it."""
        try:
            return self._read(value)
        finally:
            self._zcp.zcp_value_free(value)


def encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def options_of(step: Step) -> dict[str, object]:
    """Return the options of `zcp_options_set` for a step `connect`."""
    names = {"server_name": "server_hostname", "client_name": "client"} | {
        name: name
        for name in (
            "ca_file",
            "user",
            "key",
            "home",
            "timeout_ms",
            "connect_timeout_ms",
            "max_calls",
            "max_connections",
        )
    }
    options = {option: step[name] for name, option in names.items() if name in step}
    if "pins" in step:
        options["pins"] = " ".join(step["pins"])
    if "verify" in step:
        options["verify"] = str(step["verify"]).lower()
    if "device" in step:
        key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(step["device_key"]))
        file = Path(step["home"], "device.key")
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
            output.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        options |= {"device": file, "device_name": step["device"]}
    return options


if __name__ == "__main__":
    BlockingConform(CApi(sys.argv[1])).run()
