"""Certificates: issued by the server or loaded from files, checked before they are served, and kept valid.

Reading order: names, keys, files, pair; lifecycle, issued, profile, authority, rollover, managed; client_user,
client_ca; notices, external, settings, sources, acme, proof, checker, manager; examine. This package deals with
files and X.509, and not with connections.
"""
