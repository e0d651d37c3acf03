"""Tests of applications that include others, and of the forms of `app.method`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from zcproto.app.app import App, Method
from zcproto.common.roles import OPERATORS
from zcproto.wire.message import METHOD_MAX_LENGTH


def names(app: App) -> list[str]:
    return [method.name for method in app]


def app_of(*methods: str) -> App:
    app = App()
    for name in methods:
        app.method(name)(lambda: None)
    return app


# --- the forms of the decorator --------------------------------------------------------------------------


def test_method_without_name_has_the_name_of_its_function() -> None:
    app = App()

    @app.method
    def bare() -> int:
        return 1

    @app.method()
    def called() -> int:
        return 2

    @app.method(roles=OPERATORS)
    async def with_flag() -> int:
        return 3

    @app.method(name="other.name")
    def named() -> int:
        return 4

    assert names(app) == ["bare", "called", "with_flag", "other.name"]
    assert [bool(method.roles) for method in app] == [False, False, True, False]
    assert (bare(), called(), named()) == (1, 2, 4)


def test_name_of_a_function_is_checked_like_any_other() -> None:
    app = App()
    with pytest.raises(ValueError, match="'<lambda>' must be 1 to 128 characters"):
        app.method(lambda: None)
    with pytest.raises(TypeError, match=r"has no name of its own; give one: app.method\('name'\)"):
        app.method(functools.partial(int))
    assert names(app) == []


# --- including -------------------------------------------------------------------------------------------


def test_included_methods_have_the_prefix() -> None:
    app, jobs = app_of("status"), app_of("run", "stop")
    app.include(jobs, prefix="jobs.")
    assert names(app) == ["status", "jobs.run", "jobs.stop"]
    assert names(jobs) == ["run", "stop"]


def test_included_method_keeps_its_access_and_function() -> None:
    app, jobs = App(), App()
    jobs.method("run", roles=OPERATORS)(lambda: 5)
    events = jobs.topic("events")
    app.include(jobs, prefix="jobs.")
    run, subscribe = app
    assert (run.roles, run.function(), run.admits_sessions) == (OPERATORS, 5, False)
    assert (subscribe.name, subscribe.shape, subscribe.topic) == ("jobs.events", "server", events)


def test_application_is_included_under_several_prefixes() -> None:
    app, jobs = App(), app_of("run")
    app.include(jobs, prefix="a.")
    app.include(jobs, prefix="b.")
    first, second = app
    first.calls += 1
    first.waits.add(1.0)
    assert (first.name, second.name, second.calls, sum(second.waits.counts)) == ("a.run", "b.run", 0, 0)


def test_methods_registered_after_the_include_are_served() -> None:
    app, jobs, nested = App(), App(), App()
    app.include(jobs, prefix="jobs.")
    jobs.include(nested, prefix="nested.")
    assert names(app) == []
    nested.method("run")(lambda: None)
    assert names(app) == ["jobs.nested.run"]


def test_methods_keep_their_counters_for_the_next_server() -> None:
    app = app_of("status")
    app.include(app_of("run"), prefix="jobs.")
    assert list(map(id, app)) == list(map(id, app))


@pytest.mark.parametrize(
    ("method", "prefix", "reason"),
    [
        ("run", "jobs.", "'jobs.run' is registered twice"),
        ("info", "server.", "are reserved for the protocol"),
        ("ion.open", "sess", "are reserved for the protocol"),
        ("run", "Jobs/", "must be 1 to 128 characters"),
        ("run", "x" * METHOD_MAX_LENGTH, "must be 1 to 128 characters"),
    ],
)
def test_include_is_refused_as_a_whole(method: str, prefix: str, reason: str) -> None:
    app = app_of("jobs.run")
    with pytest.raises(ValueError, match=reason):
        app.include(app_of("fine", method), prefix=prefix)
    assert names(app) == ["jobs.run"]


def add_run(app: App) -> None:
    app.method("run")(lambda: None)


def include_run(app: App) -> None:
    app.include(app_of("run"))


@pytest.mark.parametrize("add", [add_run, include_run])
def test_late_method_in_conflict_with_the_including_application_is_refused(
    add: Callable[[App], Any],
) -> None:
    app, jobs, nested = app_of("jobs.nested.run"), App(), App()
    app.include(jobs, prefix="jobs.")
    jobs.include(nested, prefix="nested.")
    with pytest.raises(ValueError, match=r"'jobs.nested.run' is registered twice"):
        add(nested)
    assert (names(app), names(nested)) == (["jobs.nested.run"], [])


def test_names_of_two_included_applications_conflict() -> None:
    app = App()
    app.include(app_of("b.run"), prefix="a.")
    with pytest.raises(ValueError, match=r"'a.b.run' is registered twice"):
        app.include(app_of("run"), prefix="a.b.")


def test_application_cannot_include_itself() -> None:
    app, jobs, nested = App(), App(), App()
    app.include(jobs)
    jobs.include(nested)
    for including in (app, jobs, nested):
        with pytest.raises(ValueError, match="cannot include itself"):
            including.include(app, prefix="again.")


def test_added_method_is_served_with_the_prefix() -> None:
    app, jobs = App(), App()
    app.include(jobs, prefix="jobs.")
    jobs.add(Method("run", lambda: None))
    assert names(app) == ["jobs.run"]
