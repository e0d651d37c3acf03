"""Certificates: issued by the server or loaded from files, checked before they are served, and kept valid.

    CertificatePair           a certificate with its key, checked and ready to be served
    Site, CertificateSet      what is served for some names, and everything that is served at one time
    NextPins                  pins that are announced and not used yet
    CertificateManager        all certificates of a running server
    ManagedSettings, ensure   the private authority and its certificates: issued, repaired, renewed
    load_pair                 load one pair from files
    spki_pin                  the pin of a certificate's public key (RFC 7469 section 2.4)

Reading order: names, host, keys, files, pair; lifecycle, issued, profile, authority, rollover, managed;
client_user, client_ca, crl; notices, external, settings, sources, checker, manager; examine. This package deals
with files and X.509, and not with connections.
"""

from __future__ import annotations

from zcproto.certs.managed import ManagedSettings, ensure
from zcproto.certs.manager import CertificateManager
from zcproto.certs.pair import CertificatePair, CertificateSet, Site, load_pair, spki_pin
from zcproto.certs.rollover import NextPins

__all__ = [
    "CertificateManager",
    "CertificatePair",
    "CertificateSet",
    "ManagedSettings",
    "NextPins",
    "Site",
    "ensure",
    "load_pair",
    "spki_pin",
]
