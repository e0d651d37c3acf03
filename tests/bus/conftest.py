"""Fixtures with real Valkey and Redis servers."""

from tests.stores.valkey.conftest import cluster, no_time_limits, server, server_of

__all__ = ["cluster", "no_time_limits", "server", "server_of"]
