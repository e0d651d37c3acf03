"""Outages of a Valkey that servers keep their sessions in, under load: who must wait, and what is lost.

`plan` is what is asked, `valkey` the store's process and the way to it, `harm` what is done to them, `load` the
requests of sessions that are known, `churn` what is opened, refreshed and revoked meanwhile, `outcome` what all of
that proves, `run` brings it together.
"""
