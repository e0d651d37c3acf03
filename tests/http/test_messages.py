"""Test routing, 404, 405 and response validation."""

from __future__ import annotations

import pytest

from zcproto.http.messages import HttpRequest, HttpResponse, Route, Router, json_response, text_response


def get(request: HttpRequest) -> HttpResponse:
    return text_response(200, "got")


def post(request: HttpRequest) -> HttpResponse:
    return json_response(200, request.json())


ROUTER = Router([Route("GET", "/a", get), Route("POST", "/a", post), Route("POST", "/b", post)])


@pytest.mark.parametrize(
    ("method", "path", "handler"),
    [("GET", "/a", get), ("HEAD", "/a", get), ("POST", "/a", post), ("POST", "/b", post)],
)
def test_path_and_method_select_handler(method: str, path: str, handler: object) -> None:
    assert ROUTER.find(HttpRequest(method, path)) is handler


@pytest.mark.parametrize("path", ["/", "/A", "/a/", "//a", "/a/../a", "/%61", "/a;b", "*", ""])
def test_unknown_path_is_404(path: str) -> None:
    answer = ROUTER.find(HttpRequest("GET", path))
    assert isinstance(answer, HttpResponse)
    assert answer.status == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/a", "GET, HEAD, POST"),
        ("OPTIONS", "/a", "GET, HEAD, POST"),
        ("GET", "/b", "POST"),
        ("HEAD", "/b", "POST"),
    ],
)
def test_unsupported_method_is_405_with_allow(method: str, path: str, allow: str) -> None:
    answer = ROUTER.find(HttpRequest(method, path))
    assert isinstance(answer, HttpResponse)
    assert answer.status == 405
    assert answer.headers == (("Allow", allow),)


def test_duplicate_route_is_refused() -> None:
    router = Router()
    router.add(Route("GET", "/a", get))
    with pytest.raises(ValueError, match="GET /a already has a handler"):
        router.add(Route("GET", "/a", post))
    assert router.find(HttpRequest("GET", "/a")) is get


@pytest.mark.parametrize("path", ["a", "", "/a?b", "/ä", "/a b", "/%61"])
def test_invalid_route_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="invalid path"):
        Router([Route("GET", path, get)])


def test_json_parses_body_or_raises() -> None:
    assert HttpRequest("POST", "/", body=b'{"a": 1}').json() == {"a": 1}
    with pytest.raises(ValueError, match="Expecting value"):
        HttpRequest("POST", "/", body=b"x").json()


def test_json_ends_with_a_line_end() -> None:
    assert json_response(200, {"a": 1}).body == b'{"a": 1}\n'


@pytest.mark.parametrize(("status", "body"), [(100, b""), (101, b""), (600, b""), (204, b"x"), (304, b"x")])
def test_invalid_status_or_body_is_refused(status: int, body: bytes) -> None:
    with pytest.raises(ValueError, match="must be final"):
        HttpResponse(status, body)
