"""Load on a method of the application: its params, its results, and a run without an operator."""

from __future__ import annotations

from typing import Any

import pytest

from tests.load.helpers import OPERATOR, RecordingView, plan_for, users
from tests.server.conftest import Serve
from zcproto.app.app import App
from zcproto.errors import ConfigError, NotFound
from zcproto.load.plan import Target
from zcproto.load.record import RequestKind
from zcproto.load.result import Result, Verdict
from zcproto.load.run import Stop, run

GREET = Target("greet", {"name": "ada", "raw": b"\x00\xff"}, ("hello ada",))


def greeter() -> App:
    app = App()

    @app.method("greet")
    def greet(name: str, raw: bytes = b"") -> str:
        return f"hello {name}"

    @app.method("next")
    def following() -> int:
        following.number += 1  # type: ignore[attr-defined]
        return int(following.number)  # type: ignore[attr-defined]

    following.number = 0  # type: ignore[attr-defined]

    @app.method("missing")
    def missing() -> None:
        raise NotFound("no such greeting")

    return app


async def go(serve: Serve, target: Target, **changes: Any) -> Result:
    usual: dict[str, Any] = {"credentials": users(1), "sessions": 3, "operator": None, "processes": 1}
    return await run(
        plan_for(serve(greeter()), target=target, **{**usual, **changes}), RecordingView(), Stop()
    )


def test_target_survives_its_way_to_a_process() -> None:
    assert Target.from_text(GREET.to_text()) == GREET
    assert Target.from_text(Target("greet", {}).to_text()).expected == ()
    assert Target("m", {}, (None,)).is_right(None)
    assert not Target("m", {}, (None,)).is_right(0)


async def test_method_of_the_application_is_called_with_the_key_of_one_user(serve: Serve) -> None:
    result = await go(serve, GREET)
    assert result.reasons() == []
    assert result.verdict is Verdict.VERIFIED
    assert result.record.tallies[RequestKind.LOAD].equal == 50
    assert result.record.tallies[RequestKind.JOIN].equal == 7
    assert all(each.agree and each.server is None for each in result.counted())


async def test_any_result_is_right_if_none_is_expected(serve: Serve) -> None:
    result = await go(serve, Target("next", {}))
    assert result.verdict is Verdict.VERIFIED


async def test_counts_of_the_server_are_compared_with_an_operator(serve: Serve) -> None:
    result = await go(serve, GREET, operator=OPERATOR)
    assert result.verdict is Verdict.VERIFIED
    assert all(each.server == each.client for each in result.counted())


async def test_results_that_change_are_wrong_if_one_is_expected(serve: Serve) -> None:
    result = await go(serve, Target("next", {}, (1,)))
    assert result.verdict is Verdict.FAILED
    assert result.record.tallies[RequestKind.JOIN].equal == 0


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        (Target("grete", {}), "grete cannot be measured: UNIMPLEMENTED"),
        (Target("greet", {}), "greet cannot be measured: INVALID_ARGUMENT"),
        (Target("missing", {}), "missing cannot be measured: NOT_FOUND: no such greeting"),
        (
            Target("greet", {"name": "eve"}, ("hello ada",)),
            "greet answered 'hello eve'; give that to --expect",
        ),
    ],
)
async def test_target_that_cannot_be_measured_is_refused_before_the_load(
    serve: Serve, target: Target, fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        await go(serve, target)
