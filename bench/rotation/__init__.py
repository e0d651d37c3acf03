"""Certificates replaced again and again under load: nobody may notice who need not, and all must who should.

`plan` is what is asked, `rotator` replaces the certificates, `newcomers` are connections that arrive meanwhile,
`outcome` is what all of that proves, `run` brings it together with a server and the load of `zcproto.load`.
"""
