"""Call the method `echo` of a server through the C interface.

python ask.py LIBRARY HOST:PORT CA_FILE USER KEY
"""

import ctypes
import json
import sys

library_path, address, ca_file, user, key = sys.argv[1:]
zcp = ctypes.CDLL(library_path)
for name in ("zcp_value_json", "zcp_error_message", "zcp_code_name"):
    getattr(zcp, name).restype = ctypes.c_char_p


def check(code: int, error: ctypes.c_void_p) -> None:
    """Raise an error that a function has reported."""
    if code:
        text = f"{zcp.zcp_code_name(code).decode()}: {zcp.zcp_error_message(error).decode()}"
        zcp.zcp_error_free(error)
        raise RuntimeError(text)


def made(function: str, *arguments: object) -> ctypes.c_void_p:
    """Call a function that makes an object, and return the object."""
    result, error = ctypes.c_void_p(), ctypes.c_void_p()
    check(getattr(zcp, function)(*arguments, ctypes.byref(result), ctypes.byref(error)), error)
    return result


options = made("zcp_options_new", address.encode())
for option, value in {"ca_file": ca_file, "user": user, "key": key}.items():
    error = ctypes.c_void_p()
    check(zcp.zcp_options_set(options, option.encode(), value.encode(), ctypes.byref(error)), error)
client = made("zcp_connect", options)
zcp.zcp_options_free(options)
params = made("zcp_value_from_json", json.dumps({"word": "hello"}).encode())
result = made("zcp_call", client, b"echo", params, None)
print(zcp.zcp_value_json(result).decode())  # noqa: T201  (a program)
for value in (params, result):
    zcp.zcp_value_free(value)
zcp.zcp_close(client)
