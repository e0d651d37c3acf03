"""Many clients at once, and clients that mean harm: what those feel who are already in.

`storm` has a crowd come back to a killed server, `mix` puts hostile connections among honest ones. `crowd`,
`honest` and `hostile` are processes of their own, which `lines` talks to; `outcome` holds the figures against their
bars, `plot` draws them.
"""
