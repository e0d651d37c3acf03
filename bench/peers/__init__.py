"""zcproto beside others that serve the same echo over TLS 1.3.

`environment` installs the others, `servers` are their servers, `clients` what asks them, `measure` takes the
figures, `outcome` holds them against their bars, `plot` draws them.
"""
