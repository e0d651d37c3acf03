from __future__ import annotations

from pathlib import Path

import pytest

from tests.certs.support import ensure
from zcproto.certs import CertificateSet, Site


def test_a_set_knows_its_default_all_its_pairs_and_the_pins_of_the_default(made: Path) -> None:
    rsa, ecdsa = ensure(made)
    default, other = Site((), (rsa, ecdsa)), Site(("a.example", "*.b.example"), (ecdsa,))
    one = CertificateSet((default, other))
    assert one.default is default
    assert one.pairs == (rsa, ecdsa, ecdsa)
    assert one.pins == (rsa.pin, ecdsa.pin)
    assert one == CertificateSet((default, other))


def test_a_set_without_a_site_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="default site"):
        CertificateSet(())
