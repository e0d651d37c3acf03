from __future__ import annotations

import socket
from pathlib import Path

import pytest

from zcproto.common import network
from zcproto.common.network import MAX_SOCKET_PATH, AddressSet, address_of, network_of, plain_address


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff:1:2:3", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("fe80::2%eth0", "fe80::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("", ""),
        ("/run/socket", "/run/socket"),
        ("192.0.2.1:80", "192.0.2.1:80"),
    ],
)
def test_address_is_counted_for_its_network(address: str, network: str) -> None:
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("address", "plain"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:0:1", "::ffff:0:1"),
        ("", ""),
    ],
)
def test_mapped_ipv4_address_is_shortened(address: str, plain: str) -> None:
    assert plain_address(address) == plain


LISTED = ["10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "fe80::1"]


@pytest.mark.parametrize(
    "address", ["10.255.0.1", "192.0.2.7", "2001:db8:1::1", "::ffff:10.1.2.3", "fe80::1%eth0", "fe80::1"]
)
def test_address_in_a_listed_network_is_found(address: str) -> None:
    networks = AddressSet(LISTED)
    assert networks
    assert networks.contains(address)
    assert networks.contains(address)  # remembered


@pytest.mark.parametrize("address", ["11.0.0.1", "192.0.2.8", "2001:db9::1", "", "/run/socket", "10.0.0.0/8"])
def test_other_text_is_not_found(address: str) -> None:
    assert not AddressSet(LISTED).contains(address)


def test_empty_set_is_false() -> None:
    assert not AddressSet()
    assert not AddressSet().contains("10.0.0.1")


@pytest.mark.parametrize("network", ["10.0.0.1/8", "10.0.0.0/33", "here", ""])
def test_invalid_network_is_refused(network: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        AddressSet([network])


def test_short_path_is_unchanged() -> None:
    with address_of(Path("/run/x.sock")) as address:
        assert address == "/run/x.sock"


def test_long_path_can_be_bound_and_connected_to(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 30) / "x.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        with address_of(path) as address:
            assert len(address) <= MAX_SOCKET_PATH
            server.bind(address)
            server.listen()
            client.connect(address)
        assert path.is_socket()


def test_long_path_is_unchanged_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_DESCRIPTORS", tmp_path / "missing")
    path = tmp_path / ("long" * 30)
    with address_of(path) as address:
        assert address == str(path)


def test_long_path_in_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), address_of(tmp_path / ("long" * 30) / "x.sock"):
        pass
