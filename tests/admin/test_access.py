"""Access to metrics: by bearer token, by address, public, or off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.admin.https_client import ask, bearer
from tests.helpers import WALL, FakeClock, small_registry
from tests.server.conftest import Serve
from tests.sessions.helpers import new_session
from zcproto.admin.resources import BAD_TOKEN, NO_TOKEN, BearerTokens
from zcproto.auth.schemes import certificate_key
from zcproto.errors import Code, ResourceExhausted, Unavailable
from zcproto.http.messages import HttpRequest, HttpResponse, Peer
from zcproto.server.state import ServerState
from zcproto.sessions import OpenedSession, Session, SessionRegistry
from zcproto.sessions.binding import SessionBinding
from zcproto.sessions.token import token_text
from zcproto.stores.service import SessionService

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class FakeSharedSessions(SessionService):
    """Shared sessions: unknown tokens are looked up."""

    looks_up = True

    def __init__(self, registry: SessionRegistry, clock: FakeClock) -> None:
        super().__init__(registry, clock)
        self.asked: list[tuple[bytes, str, Code]] = []
        self.error: Exception | None = None
        self.found: Any = None

    async def look_up(self, token: bytes, address: str, code: Code) -> None:
        self.asked.append((token, address, code))
        if self.error is not None:
            raise self.error
        if self.found is not None:
            self.found()


class TokenCheck:
    """BearerTokens with a registry and a fake clock."""

    def __init__(self, binding: SessionBinding | None = None) -> None:
        self.clock = FakeClock()
        self.registry = small_registry()
        self.sessions: SessionService = SessionService(self.registry, self.clock)
        self.state = SimpleNamespace(
            registry=self.registry,
            sessions=self.sessions,
            clock=self.clock,
            binding=SessionBinding() if binding is None else binding,
        )
        self.tokens = BearerTokens(cast("ServerState", self.state))

    def open(self, key: str = "", address: str = "192.0.2.1") -> OpenedSession:
        return self.registry.open("ada", client="test/1", address=address, wall=self.clock.wall(), key=key)

    async def ask(
        self, authorization: str | None, address: str = "192.0.2.1", certificate: bytes | None = None
    ) -> Session | HttpResponse:
        headers = {} if authorization is None else {"authorization": authorization}
        peer = Peer(address, lambda: certificate)
        return await self.tokens.session_of(HttpRequest("GET", "/metrics", headers=headers, peer=peer))


@pytest.mark.requirement("token_size")
async def test_valid_bearer_token_returns_its_session() -> None:
    check = TokenCheck()
    opened = check.open()
    for scheme in ("Bearer", "bearer", "BEARER"):
        found = await check.ask(f"{scheme} {token_text(opened.token)}")
        assert isinstance(found, Session)
        assert found.id == opened.session.id


async def test_missing_token_is_answered_with_a_challenge() -> None:
    answer = await TokenCheck().ask(None)
    assert answer is NO_TOKEN
    assert answer.headers == (("WWW-Authenticate", 'Bearer realm="zcproto"'),)


@pytest.mark.requirement("token_size")
async def test_every_bad_token_gets_the_same_response() -> None:
    check = TokenCheck()
    good = token_text(check.open().token)
    ended = check.open()
    check.registry.close(ended.session)
    for text in (
        *("", "Bearer", "Bearer ", "Basic " + good, good, "Bearer x", f"Bearer {good}=", f"Bearer {good} x"),
        *(
            f"Bearer {good}, Bearer {good}",
            f"Bearer {token_text(bytes(32))}",
            f"Bearer {token_text(ended.token)}",
        ),
    ):
        assert await check.ask(text) is BAD_TOKEN, text
    assert BAD_TOKEN.status == 401
    assert BAD_TOKEN.headers == (("WWW-Authenticate", 'Bearer realm="zcproto", error="invalid_token"'),)


async def test_refresh_token_is_refused() -> None:
    check = TokenCheck()
    refresh_token = check.open().refresh_token
    assert refresh_token is not None
    assert await check.ask(f"Bearer {token_text(refresh_token)}") is BAD_TOKEN


async def test_expired_token_is_refused() -> None:
    check = TokenCheck()
    opened = check.open()
    check.clock.wall_ms = opened.session.expires_at
    assert await check.ask(f"Bearer {token_text(opened.token)}") is BAD_TOKEN


async def test_bound_token_is_refused_without_its_client_certificate(ca: trustme.CA) -> None:
    check = TokenCheck()
    issued = ca.issue_cert("ada.example")
    certificate = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes()).public_bytes(Encoding.DER)
    other = x509.load_pem_x509_certificate(ca.cert_pem.bytes()).public_bytes(Encoding.DER)
    of_device = check.open(key="device:phone")
    of_certificate = check.open(key=certificate_key(certificate))
    for opened in (of_device, of_certificate):
        for shown in (None, other, b"no certificate"):
            assert await check.ask(f"Bearer {token_text(opened.token)}", certificate=shown) is BAD_TOKEN
    assert await check.ask(f"Bearer {token_text(of_device.token)}", certificate=certificate) is BAD_TOKEN
    found = await check.ask(f"Bearer {token_text(of_certificate.token)}", certificate=certificate)
    assert isinstance(found, Session)


async def test_refused_token_does_not_count_as_used() -> None:
    check = TokenCheck()
    opened = check.open(key="device:phone")
    check.clock.advance(10.0)
    await check.ask(f"Bearer {token_text(opened.token)}")
    assert check.registry.info(opened.session.id, check.clock.wall()).last_used_at == WALL


async def test_token_from_another_network_is_refused() -> None:
    check = TokenCheck(SessionBinding("exact"))
    token = token_text(check.open(address="192.0.2.1").token)
    assert isinstance(await check.ask(f"Bearer {token}", "192.0.2.1"), Session)
    assert await check.ask(f"Bearer {token}", "192.0.2.2") is BAD_TOKEN


async def test_token_of_a_removed_user_is_refused() -> None:
    binding = SessionBinding()
    binding.is_user = lambda user: user != "ada"
    check = TokenCheck(binding)
    assert await check.ask(f"Bearer {token_text(check.open().token)}") is BAD_TOKEN


async def test_503_while_tokens_cannot_be_checked() -> None:
    check = TokenCheck()
    token = token_text(check.open().token)
    check.registry.refuse_all()
    answer = await check.ask(f"Bearer {token}")
    assert isinstance(answer, HttpResponse)
    assert (answer.status, answer.headers) == (503, (("Retry-After", "1"),))


async def test_unknown_token_of_a_shared_session_is_looked_up() -> None:
    check = TokenCheck()
    check.state.sessions = sessions = FakeSharedSessions(check.registry, check.clock)
    new = new_session(check.registry, "ada", client="", address="192.0.2.1", wall=WALL)
    sessions.found = lambda: check.registry.restore(new.record)
    found = await check.ask(f"Bearer {token_text(new.token)}")
    assert isinstance(found, Session)
    assert sessions.asked == [(new.token, "192.0.2.1", Code.UNAUTHENTICATED)]


@pytest.mark.parametrize(
    ("error", "status", "seconds"),
    [
        (Unavailable("the store does not answer", {"retry_after_ms": 1_500}), 503, "2"),
        (ResourceExhausted("too many", {"retry_after_ms": 9_001}), 429, "10"),
        (ResourceExhausted("too many", {"retry_after_ms": 1}), 429, "1"),
    ],
)
async def test_failed_lookup_is_answered_with_retry_after(
    error: Exception, status: int, seconds: str
) -> None:
    check = TokenCheck()
    check.state.sessions = sessions = FakeSharedSessions(check.registry, check.clock)
    sessions.error = error
    answer = await check.ask(f"Bearer {token_text(bytes(32))}")
    assert isinstance(answer, HttpResponse)
    assert answer.status == status
    assert answer.headers == (("Retry-After", seconds),)


# --- on a whole server -----------------------------------------------------------------------------------


@pytest.mark.requirement("metrics")
def test_metrics_need_a_session_by_default(serve: Serve) -> None:
    server = serve()
    with server.client("ada") as client:
        refused = ask(server, "/metrics")
        assert refused.status == 401
        assert refused.one("www-authenticate") == 'Bearer realm="zcproto"'
        answer = ask(server, "/metrics", headers=bearer(client.token))
        assert (answer.status, answer.one("content-type")) == (200, TEXT)
        assert answer.body.startswith(b"# HELP ")
        wanted = {**bearer(client.token), "Accept": "application/openmetrics-text; version=1.0.0"}
        assert (
            ask(server, "/metrics", headers=wanted)
            .one("content-type")
            .startswith("application/openmetrics-text")
        )
        client.call("session.close")
        revoked = ask(server, "/metrics", headers=bearer(client.token))
    assert revoked.status == 401
    assert 'error="invalid_token"' in revoked.one("www-authenticate")


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"http__metrics": "address"}, 200),
        ({"http__metrics": "address", "http__allow": ["192.0.2.0/24"]}, 403),
        ({"http__metrics": "address", "http__allow": []}, 403),
        ({"http__metrics": "open"}, 200),
        ({"http__metrics": "off"}, 404),
    ],
)
def test_access_to_metrics_follows_the_configuration(
    serve: Serve, settings: dict[str, Any], status: int
) -> None:
    assert ask(serve(**settings), "/metrics").status == status
