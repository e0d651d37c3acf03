"""The conformance kit: plays the server to a client in any language, and checks what the client does.

README.md of this distribution specifies the client's program. Reading order: `check.py` (what a check is),
`connection.py` (one connection of the scripted server), `harness.py` (what a scenario works with), `scenarios/`,
`run.py`.
"""
