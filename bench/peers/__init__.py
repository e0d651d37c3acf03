"""zcproto beside other servers of the same echo over TLS 1.3: `python -m bench peers`.

`environment` installs the others, `servers` runs them, `clients` has a client for each, `measure` measures, and
`command` holds the figures against their bars.
"""
