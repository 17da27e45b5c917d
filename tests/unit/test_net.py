"""Requests for the network: what is refused, and how they are said as texts."""

import subprocess
import sys

import pytest

from guestagent.api.net import NetConfigure
from guestagent.api.nettexts import network_from_texts
from guestagent.config import read_settings
from guestagent.net.names import hosts_text, resolv_conf_text
from vsock.errors import CallError

MAC = "52:54:00:12:34:56"
MATCH = {"match": {"mac": MAC}}


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"match": {}}, "interfaces[0].match: either mac or name"),
        ({"match": {"mac": MAC, "name": "a"}}, "interfaces[0].match: either mac or name"),
        ({"match": {"mac": "52:54:00:12:34"}}, "mac must be a MAC address"),
        ({"match": {"mac": "52:54:00:12:34:zz"}}, "mac must be a MAC address"),
        ({"match": {"name": "a/b"}}, "name must be letters"),
        ({}, "interfaces[0]: either match or vlan"),
        ({**MATCH, "vlan": {"parent": "a", "id": 1}}, "either match or vlan"),
        ({"vlan": {"parent": "a", "id": 1}}, "a vlan needs a name"),
        ({"vlan": {"parent": "a", "id": 4095}, "name": "b"}, "id must be in 1..4094"),
        ({**MATCH, "name": "a" * 16}, "name must have 1 to 15 characters"),
        ({**MATCH, "name": "all"}, "name must not be 'all'"),
        ({**MATCH, "mtu": 67}, "mtu must be in 68..65535"),
        ({**MATCH, "mtu": 65536}, "mtu must be in 68..65535"),
        ({**MATCH, "mtu": True}, "interfaces[0].mtu: expected int, got bool"),
        ({**MATCH, "addresses": ["10.0.0.1"]}, "addresses[0] must be ADDRESS/PREFIX"),
        ({**MATCH, "addresses": ["10.0.0.1/"]}, "addresses[0] must be ADDRESS/PREFIX"),
        ({**MATCH, "addresses": ["10.0.0.1/33"]}, "addresses[0] has a prefix of 33 bits"),
        ({**MATCH, "addresses": ["10.0.0.1/0"]}, "addresses[0] has a prefix of no bits"),
        ({**MATCH, "addresses": ["10.0.0/24"]}, "must be an IPv4 or IPv6 address"),
        ({**MATCH, "addresses": ["10.0.0.1\n/24"]}, "must be an IPv4 or IPv6 address"),
        ({**MATCH, "addresses": ["fd00::1\0/64"]}, "must be an IPv4 or IPv6 address"),
        ({**MATCH, "addresses": ["fe80::1%eth0/64"]}, "must be an IPv4 or IPv6 address"),
        ({**MATCH, "addresses": ["224.0.0.1/24"]}, "must be the address of one machine"),
        ({**MATCH, "addresses": ["ff02::1/64"]}, "must be the address of one machine"),
        ({**MATCH, "addresses": ["::/64"]}, "must be the address of one machine"),
        ({**MATCH, "addresses": ["10.0.0.1/24", "10.0.0.1/16"]}, "addresses[1] is there twice"),
        ({**MATCH, "addresses": ["fd00::1/64"], "mtu": 1279}, "IPv6 needs an mtu of 1280"),
        ({**MATCH, "addresses": ["fd00::1/64"], "up": False}, "needs an interface that is up"),
        ({**MATCH, "addresses": [f"10.0.{n}.1/24" for n in range(257)]}, "may have 256 entries"),
        ({**MATCH, "routes": [{"destination": "10.0.0.1/8"}]}, "has bits behind its prefix"),
        ({**MATCH, "routes": [{"destination": "fd00::/129"}]}, "has a prefix of 129 bits"),
        ({**MATCH, "routes": [{"destination": "10.0.0.0/8", "gateway": "fd00::1"}]}, "family"),
        ({**MATCH, "routes": [{"destination": "default", "table": 255}]}, "the kernel's own"),
        ({**MATCH, "routes": [{"destination": "default", "table": 0}]}, "table must be in"),
        ({**MATCH, "routes": [{"destination": "default", "metric": 1 << 32}]}, "metric must be in"),
        ({**MATCH, "routes": [{"destination": "default", "on_link": True}]}, "about a gateway"),
        ({**MATCH, "routes": [{"destination": "default"}] * 2}, "routes[1] is there twice"),
        ({**MATCH, "routes": [{"destination": "default"}], "up": False}, "that is up"),
        ({**MATCH, "neighbours": [{"address": "10.0.0.1", "mac": "x"}]}, "must be a MAC address"),
        ({**MATCH, "colour": "red"}, "interfaces[0].colour"),
    ],
)
def test_interface_that_cannot_be(fields: dict[str, object], refusal: str) -> None:
    with pytest.raises(CallError) as caught:
        NetConfigure.from_wire({"interfaces": [fields]})
    assert caught.value.code == "invalid"
    assert refusal in caught.value.message


@pytest.mark.parametrize(
    ("request_", "refusal"),
    [
        ({"interfaces": [MATCH, MATCH]}, "interfaces[1] is there twice"),
        (
            {"interfaces": [{**MATCH, "name": "a"}, {"match": {"name": "a"}}]},
            "names of interfaces[1] is there twice",
        ),
        ({"interfaces": [{"match": {"name": f"i{n}"}} for n in range(65)]}, "64 entries"),
        ({"rules": [{"priority": 1, "table": 1}]}, "the rule needs a family"),
        (
            {"rules": [{"priority": 0, "table": 1, "family": "ipv4"}]},
            "priority must be in 1..32765",
        ),
        (
            {"rules": [{"priority": 1, "table": 1, "source": "10.0.0.0/8", "family": "ipv6"}]},
            "the rule is of two families",
        ),
        ({"rules": [{"priority": 1, "table": 1, "family": "ipv4"}] * 2}, "rules[1] is there twice"),
        ({"dns": {"servers": ["10.0.0.1\nsearch x"]}}, "must be an IPv4 or IPv6 address"),
        ({"dns": {"servers": ["10.0.0.1"] * 4}}, "servers may have 3 entries"),
        ({"dns": {"search": ["a b"]}}, "search[0] must be a name"),
        ({"dns": {"options": ["ndots:2\n"]}}, "options[0] must be a word"),
        ({"hosts": [{"address": "10.0.0.1", "names": []}]}, "names is empty"),
        ({"hosts": [{"address": "10.0.0.1", "names": ["a\n"]}]}, "names[0] must be a name"),
        ({"hostname": "a" * 65}, "hostname must have 1 to 64 characters"),
        ({"hostname": "-a"}, "hostname must be a name"),
        ({"hostname": "a..b"}, "hostname must be a name"),
        ({"wait_ms": -1}, "wait_ms must be in"),
    ],
)
def test_request_that_cannot_be(request_: dict[str, object], refusal: str) -> None:
    with pytest.raises(CallError) as caught:
        NetConfigure.from_wire(request_)
    assert caught.value.code == "invalid"
    assert refusal in caught.value.message


@pytest.mark.parametrize(
    ("texts", "refusal"),
    [
        (("nothing",), "expected interface,"),
        (("interface,colour=red",), "'colour=red' is none of match, name, mtu"),
        (("interface,mtu",), "'mtu' is none of"),
        (("interface,match=mac=52:54:00:12:34:56,mtu=1,mtu=2",), "mtu is given twice"),
        (("interface,match=mac=52:54:00:12:34:56,mtu=0x10",), "'0x10' is no number"),
        (("interface,match=name=a,up=yes",), "up must be 1 or 0"),
        (("hostname=a", "hostname=b"), "hostname is given twice"),
        (("interface,match=name=a,mtu=1",), "mtu must be in 68..65535"),
    ],
)
def test_text_that_cannot_be(texts: tuple[str, ...], refusal: str) -> None:
    with pytest.raises(ValueError, match=r"network|number") as caught:
        network_from_texts(texts)
    assert refusal in str(caught.value)


def test_settings_of_the_kernel_command_line() -> None:
    texts = ("interface,match=name=eth0,addresses=10.0.0.2/24", "hostname=guest")
    config, problems = read_settings(tuple(("net", text) for text in texts))
    assert (config.net, problems) == (texts, ())
    assert network_from_texts(config.net).interfaces[0].addresses == ("10.0.0.2/24",)
    _, problems = read_settings((("net", "interface,match=name=eth0,addresses=10.0.0.2"),))
    assert [problem.fatal for problem in problems] == [True]


def test_content_of_files() -> None:
    request = NetConfigure.from_wire(
        {
            "dns": {"servers": ["fd00::1"], "search": ["a.example", "b.example"]},
            "hosts": [{"address": "127.0.0.1", "names": ["localhost", "guest"]}],
        }
    )
    assert request.dns is not None
    assert request.hosts is not None
    assert resolv_conf_text(request.dns) == b"search a.example b.example\nnameserver fd00::1\n"
    assert hosts_text(request.hosts) == b"127.0.0.1 localhost guest\n"


def test_agent_and_init_start_without_what_is_for_the_network() -> None:
    code = "import sys, guestagent.agent, guestagent.boot.init; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "guestagent.service.dispatch" in loaded
    assert "guestagent.api.net" not in loaded  # loaded by the first request for it
    others = ("guestagent.net", "guestagent.service.net", "guestagent.api.nettexts", "pyroute2")
    assert [name for name in loaded if name.startswith(others)] == []
