"""The conformance kit: plays the server to a client in any language, and judges what it does.

spec/conformance/README.md is the contract with the client's program. Reading order: `check.py` (what a check is),
`link.py` (one connection of the scripted server), `stage.py` (what a conversation is made with), `scenarios/` (the
conversations), `run.py`.

The scripted server shares no decision with the real one: it parses, judges and breaks frames by itself.
"""
