from __future__ import annotations

from pathlib import Path

import pytest

from tests.certs.support import ensure
from zcproto.certs.pair import CertificateSet, Site


def test_certificate_set_has_a_default_site_and_all_pairs(made: Path) -> None:
    rsa, ecdsa = ensure(made)
    default, other = Site((), (rsa, ecdsa)), Site(("a.example", "*.b.example"), (ecdsa,))
    one = CertificateSet((default, other))
    assert one.default is default
    assert one.pairs == (rsa, ecdsa, ecdsa)
    assert one == CertificateSet((default, other))


def test_certificate_set_without_a_site_is_refused() -> None:
    with pytest.raises(AssertionError, match="default site"):
        CertificateSet(())
