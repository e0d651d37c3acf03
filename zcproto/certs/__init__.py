"""Certificates: made here, or read from files; checked before they are ever served; kept good while they are.

    CertificatePair          a certificate with its key, checked and fit to be served
    Site, CertificateSet     what is served for some names, and all that is served at one time
    NextPins                 pins that are announced and not used yet
    Maintainer               all certificates of a server, asked again and again what is to be served
    ensure_own_certificates  the private CA and the server's certificates: made, repaired, renewed
    load_pair                one pair from files, or an error that names the file and the cure
    spki_pin                 the pin of a certificate's public key (RFC 7469 section 2.4)

Reading order: names, host, keys, files, pair, certificates; issue, authority, lifecycle, rotation, own; watch,
foreign; client_issue, client_list, client_user, clients, revoked; maintainer, examine.
This package knows files and X.509. It knows nothing of connections.
"""

from __future__ import annotations

from zcproto.certs.certificates import CertificateSet, NextPins, Site
from zcproto.certs.maintainer import Maintainer
from zcproto.certs.own import ensure_own_certificates
from zcproto.certs.pair import CertificatePair, load_pair, spki_pin

__all__ = [
    "CertificatePair",
    "CertificateSet",
    "Maintainer",
    "NextPins",
    "Site",
    "ensure_own_certificates",
    "load_pair",
    "spki_pin",
]
