"""The program that drives the C interface for the kit, through ctypes: `python conform.py libzcproto.so`.

It has the steps of zcproto_conformance/blocking.py, whose folder must be in PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_size_t, c_uint8, c_uint64, c_void_p
from typing import Any

import msgpack

from zcproto_conformance.blocking import BlockingConform, Hold, Step, start
from zcproto_conformance.values import typed

CLOSED, CANNOT_CONNECT, TLS, END = -5, -4, -3, -8
FATAL = range(64, 67)
HANDLER = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)


class CallOptions(ctypes.Structure):
    """`zcp_call_options`."""

    _fields_ = (
        ("timeout_ms", c_uint64),
        ("idempotency_key", c_char_p),
        ("traceparent", c_char_p),
    )


class CError(Exception):
    """An error that a function has returned."""

    def __init__(self, code: int, message: str, details: Any, is_clean: bool) -> None:
        super().__init__(message)
        self.code, self.details, self.is_clean = code, details, is_clean


class CApi:
    """The C interface."""

    def __init__(self, library: str) -> None:
        self._zcp = ctypes.CDLL(library)
        for name in ("error_message", "code_name", "server_call_method", "server_call_user", "version"):
            getattr(self._zcp, f"zcp_{name}").restype = c_char_p
        self._zcp.zcp_value_msgpack.restype = POINTER(c_uint8)
        for name in ("server_call_params", "error_details"):
            getattr(self._zcp, f"zcp_{name}").restype = c_void_p
        self.name = f"zcproto-c/{self._zcp.zcp_version().decode()}"
        self._handlers: list[Any] = []  # functions that the library may call

    # --- the steps ----------------------------------------------------------------------------------

    def connect(self, step: Step) -> c_void_p:
        options = self._made("options_new", step["address"].encode())
        try:
            names = {"server_name": "server_hostname"} | {
                name: name for name in ("ca_file", "user", "key", "home", "timeout_ms", "max_calls")
            }
            for name, option in names.items():
                if name in step:
                    self._check("options_set", options, option.encode(), str(step[name]).encode())
            return self._made("connect", options)
        finally:
            self._zcp.zcp_options_free(options)

    def call(self, client: c_void_p, method: str, params: Any, step: Step) -> Any:
        key = step.get("idempotency_key")
        options = CallOptions(step.get("timeout_ms", 0), None if key is None else key.encode(), None)
        value = self._value(params)
        try:
            return self._taken(self._made("call", client, method.encode(), value, byref(options)))
        finally:
            self._zcp.zcp_value_free(value)

    def open(self, client: c_void_p, method: str, params: Any) -> c_void_p:
        value = self._value(params)
        try:
            return self._made("stream_open", client, method.encode(), value, c_uint64(0))
        finally:
            self._zcp.zcp_value_free(value)

    def next(self, stream: c_void_p) -> dict[str, Any]:
        try:
            return {"item": self._taken(self._made("stream_next", stream))}
        except CError as error:
            if error.code != END:
                self._zcp.zcp_stream_free(stream)
                raise
        try:
            return {"end": self._taken(self._made("stream_result", stream))}
        finally:
            self._zcp.zcp_stream_free(stream)

    def handle(self, client: c_void_p, method: str, hold: Hold) -> None:
        def called(_: int | None, address: int | None) -> None:
            call = c_void_p(address)
            name = self._zcp.zcp_server_call_method(call).decode()
            user = self._zcp.zcp_server_call_user(call).decode()
            params = self._read(c_void_p(self._zcp.zcp_server_call_params(call)))

            def answer() -> None:  # in a thread of its own: this one belongs to the library
                value = self._value(hold(name, user, params))
                self._zcp.zcp_server_call_reply(call, value)
                self._zcp.zcp_value_free(value)

            start(answer)

        self._handlers.append(HANDLER(called))
        self._check("handle", client, method.encode(), self._handlers[-1], None)

    def session(self, client: c_void_p) -> dict[str, Any] | None:
        session: dict[str, Any] | None = self._taken(self._made("session", client))
        return session

    def open_session(self, client: c_void_p) -> None:
        self._check("open_session", client)

    def close(self, client: c_void_p) -> None:
        self._zcp.zcp_close(client)

    def describe(self, error: Exception) -> dict[str, Any]:
        if not isinstance(error, CError):
            raise error
        message = str(error)
        if error.code == CLOSED or error.code in FATAL:
            code = None if error.code == CLOSED else error.code
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
        kinds = {CANNOT_CONNECT: "connect", TLS: "tls"}
        return {"kind": kinds.get(error.code, "argument"), "message": message}

    # --- the border ---------------------------------------------------------------------------------

    def _check(self, function: str, *arguments: object) -> None:
        """Call a function that can fail, with the arguments before its last one."""
        error = c_void_p()
        code: int = getattr(self._zcp, f"zcp_{function}")(*arguments, byref(error))
        if code:
            message = self._zcp.zcp_error_message(error).decode()
            details = self._read(c_void_p(self._zcp.zcp_error_details(error)))
            is_clean = bool(self._zcp.zcp_error_is_clean(error))
            self._zcp.zcp_error_free(error)
            raise CError(code, message, details, is_clean)

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


if __name__ == "__main__":
    BlockingConform(CApi(sys.argv[1])).run()
