"""The guest's network: what it is to be, and what the kernel then has.

An address is ADDRESS/PREFIX, IPv4 or IPv6. What is left out of a request (nil) stays as it is. A
list that is given is the whole list: of the interface's permanent addresses (its IPv6 link-local
ones apart), of its permanent neighbours, of its routes with the protocol ``static``, which those of
this agent have, or ``boot``, and of the rules with the protocol ``static``. Routes and rules of
other protocols stay.
"""

import socket
from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_range, check_word
from guestagent.api.request import Request
from vsock.record import Record

#: linux/if.h: IFNAMSIZ, less the final NUL.
NAME_MAX = 15
#: linux/rtnetlink.h: RT_TABLE_MAIN.
MAIN_TABLE = 254
FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
DEFAULT_ROUTE = "default"
#: RFC 8200, section 5: with a smaller MTU the kernel takes IPv6 away from an interface.
IPV6_MTU_MIN = 1280
_U32_MAX = (1 << 32) - 1
_HEX = frozenset("0123456789abcdefABCDEF")
_OPTION = frozenset("abcdefghijklmnopqrstuvwxyz0123456789:-")


def check_interface_name(field: str, name: str) -> None:
    check_word(field, name, NAME_MAX)
    if name in ("all", "default"):  # directories of /proc/sys/net/*/conf
        raise ValueError(f"{field} must not be {name!r}, which the kernel uses itself")


def check_mac(field: str, mac: str) -> None:
    parts = mac.split(":")
    if len(parts) != 6 or not all(len(part) == 2 and _HEX.issuperset(part) for part in parts):
        raise ValueError(f"{field} must be a MAC address like 52:54:00:12:34:56, got {mac!r}")


def packed_address(field: str, text: str) -> tuple[int, bytes]:
    """Return the family of an address and its bytes; ValueError names the field."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return family, socket.inet_pton(family, text)
    except (OSError, ValueError):
        raise ValueError(f"{field} must be an IPv4 or IPv6 address, got {text!r}") from None


def split_prefix(field: str, text: str) -> tuple[int, bytes, int]:
    """Return family, bytes and prefix length of ADDRESS/PREFIX; ValueError names the field."""
    address, slash, length = text.partition("/")
    family, packed = packed_address(field, address)
    bits = len(packed) * 8
    if not (slash and length.isascii() and length.isdigit() and len(length) <= 3):
        raise ValueError(f"{field} must be ADDRESS/PREFIX, got {text!r}")
    if int(length) > bits:
        raise ValueError(f"{field} has a prefix of {length} bits, and the address has {bits}")
    return family, packed, int(length)


def _check_unicast(field: str, packed: bytes) -> None:
    first = packed[0]
    multicast = first == 0xFF if len(packed) == 16 else first >= 0xE0
    if multicast or not any(packed):
        raise ValueError(f"{field} must be the address of one machine")


def check_network(field: str, text: str) -> int:
    """Check the destination of a route or a side of a rule; return its family."""
    family, packed, length = split_prefix(field, text)
    number = int.from_bytes(packed, "big")
    if number & ((1 << (len(packed) * 8 - length)) - 1):
        raise ValueError(f"{field} has bits behind its prefix, got {text!r}")
    return family


def _check_count(field: str, items: "tuple[object, ...] | None", most: int) -> None:
    if items is not None and len(items) > most:
        raise ValueError(f"{field} may have {most} entries, got {len(items)}")


def _check_unique(field: str, keys: list[object]) -> None:
    seen: set[object] = set()
    for index, key in enumerate(keys):
        if key in seen:
            raise ValueError(f"{field}[{index}] is there twice")
        seen.add(key)


def check_domain(field: str, name: str, longest: int = 253) -> None:
    """A host or domain name (RFC 1123): labels of letters, digits, '-', and '_' as DNS has it."""
    if not 0 < len(name) <= longest:
        raise ValueError(f"{field} must have 1 to {longest} characters, got {len(name)}")
    for label in name.split("."):
        plain = label.replace("-", "").replace("_", "")
        if not (len(label) <= 63 and label.isascii() and plain.isalnum()) or label[0] == "-":
            raise ValueError(f"{field} must be a name of letters, digits and '-', got {name!r}")


class InterfaceMatch(Record):
    """Which interface of the guest: by its MAC address or by its present name."""

    mac: str | None = None
    name: str | None = None

    def check(self) -> None:
        if (self.mac is None) == (self.name is None):
            raise ValueError("either mac or name")
        if self.mac is not None:
            check_mac("mac", self.mac)
        if self.name is not None:
            check_interface_name("name", self.name)


class Vlan(Record):
    """An 802.1Q VLAN: ``parent`` is the name that its interface has after the request."""

    parent: str
    id: int

    def check(self) -> None:
        check_interface_name("parent", self.parent)
        check_range("id", self.id, 1, 4094)


class Route(Record):
    """``destination`` is ADDRESS/PREFIX, or default: then of the gateway's family, or else IPv4.

    ``source`` is the address that packets get; ``on_link`` takes a gateway as reachable.
    """

    destination: str
    gateway: str | None = None
    metric: int | None = None
    table: int = MAIN_TABLE
    source: str | None = None
    on_link: bool = False

    def check(self) -> None:
        for field in ("gateway", "source"):
            text = getattr(self, field)
            if text is not None:
                family, packed = packed_address(field, text)
                _check_unicast(field, packed)
                if family != self.family:
                    raise ValueError(f"{field} is of another family than the destination")
        check_range("metric", self.metric, 0, _U32_MAX)
        check_range("table", self.table, 1, _U32_MAX)
        if self.table == 255:  # RT_TABLE_LOCAL
            raise ValueError("table 255 is the kernel's own")
        if self.on_link and self.gateway is None:
            raise ValueError("on_link is about a gateway")

    @property
    def family(self) -> int:
        if self.destination != DEFAULT_ROUTE:
            return check_network("destination", self.destination)
        return packed_address("gateway", self.gateway)[0] if self.gateway else socket.AF_INET


class Neighbour(Record):
    """A permanent entry of the table of neighbours."""

    address: str
    mac: str

    def check(self) -> None:
        _check_unicast("address", packed_address("address", self.address)[1])
        check_mac("mac", self.mac)


class Interface(Record):
    """One interface as it is to be: found by ``match`` and renamed to ``name``, or made as a VLAN.

    ``dad`` false takes IPv6 addresses as they are, without the second or two that the kernel asks
    for duplicates on the link.
    """

    match: InterfaceMatch | None = None
    name: str | None = None
    mtu: int | None = None
    addresses: tuple[str, ...] | None = None
    routes: tuple[Route, ...] | None = None
    neighbours: tuple[Neighbour, ...] | None = None
    vlan: Vlan | None = None
    up: bool = True
    dad: bool = True

    def check(self) -> None:
        if (self.match is None) == (self.vlan is None):
            raise ValueError("either match or vlan")
        if self.vlan is not None and self.name is None:
            raise ValueError("a vlan needs a name")
        if self.name is not None:
            check_interface_name("name", self.name)
        check_range("mtu", self.mtu, 68, 65535)
        self._check_lists()
        if not self.up and (self.routes or self.neighbours):
            raise ValueError("routes and neighbours need an interface that is up")

    def _check_lists(self) -> None:
        _check_count("addresses", self.addresses, 256)
        _check_count("routes", self.routes, 1024)
        _check_count("neighbours", self.neighbours, 1024)
        addresses: list[object] = []
        for index, text in enumerate(self.addresses or ()):
            field = f"addresses[{index}]"
            family, packed, length = split_prefix(field, text)
            _check_unicast(field, packed)
            if length == 0:
                raise ValueError(f"{field} has a prefix of no bits")
            if family == socket.AF_INET6 and (self.mtu or IPV6_MTU_MIN) < IPV6_MTU_MIN:
                raise ValueError(f"{field}: IPv6 needs an mtu of {IPV6_MTU_MIN}")
            if family == socket.AF_INET6 and not self.up:
                raise ValueError(f"{field}: an IPv6 address needs an interface that is up")
            addresses.append(packed)
        _check_unique("addresses", addresses)
        places: list[object] = [
            (route.family, route.destination, route.metric, route.table)
            for route in self.routes or ()
        ]
        _check_unique("routes", places)
        neighbours: list[object] = [
            packed_address("address", one.address) for one in self.neighbours or ()
        ]
        _check_unique("neighbours", neighbours)


class Rule(Record):
    """A rule of policy routing: what matches it is looked up in ``table``.

    ``source`` and ``destination`` are ADDRESS/PREFIX, ``interface`` is where a packet came in,
    ``mark`` its mark. ``family`` (ipv4 or ipv6) is needed where no address tells it.
    """

    priority: int
    table: int
    source: str | None = None
    destination: str | None = None
    interface: str | None = None
    mark: int | None = None
    family: str | None = None

    def check(self) -> None:
        check_range("priority", self.priority, 1, 32765)
        check_range("table", self.table, 1, _U32_MAX)
        check_range("mark", self.mark, 1, _U32_MAX)
        check_choice("family", self.family, FAMILIES)
        if self.interface is not None:
            check_interface_name("interface", self.interface)
        found = {
            check_network(field, text)
            for field, text in (("source", self.source), ("destination", self.destination))
            if text is not None
        }
        if self.family is not None:
            found.add(FAMILIES[self.family])
        if len(found) != 1:
            why = "is of two families" if found else "needs a family"
            raise ValueError(f"the rule {why}")

    @property
    def family_number(self) -> int:
        text = self.source or self.destination
        return check_network("source", text) if text else FAMILIES[self.family or "ipv4"]


class Dns(Record):
    """What /etc/resolv.conf is to say (resolv.conf(5), which reads three servers)."""

    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def check(self) -> None:
        _check_count("servers", self.servers, 3)
        _check_count("search", self.search, 32)
        _check_count("options", self.options, 16)
        for index, server in enumerate(self.servers):
            packed_address(f"servers[{index}]", server)
        for index, domain in enumerate(self.search):
            check_domain(f"search[{index}]", domain)
        for index, option in enumerate(self.options):
            if not 0 < len(option) <= 32 or not _OPTION.issuperset(option):
                raise ValueError(f"options[{index}] must be a word, got {option!r}")


class HostsEntry(Record):
    """A line of /etc/hosts."""

    address: str
    names: tuple[str, ...]

    def check(self) -> None:
        packed_address("address", self.address)
        _check_count("names", self.names, 16)
        if not self.names:
            raise ValueError("names is empty")
        for index, name in enumerate(self.names):
            check_domain(f"names[{index}]", name)


class RouteReport(Record):
    """A route of an interface outside of the kernel's local table. ``protocol`` says by whom."""

    destination: str
    gateway: str | None
    metric: int
    table: int
    source: str | None
    on_link: bool
    protocol: str


class InterfaceReport(Record):
    """An interface as the kernel has it. Addresses that are ``tentative`` cannot be used yet."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    carrier: bool
    vlan: Vlan | None
    addresses: tuple[str, ...]
    tentative: tuple[str, ...]
    routes: tuple[RouteReport, ...]
    neighbours: tuple[Neighbour, ...]


class RuleReport(Record):
    """A rule of policy routing as the kernel has it, as text."""

    family: str
    text: str


class NetConfigureReply(Record):
    """The interfaces of the request, read back; ``already`` when there was nothing to change."""

    interfaces: tuple[InterfaceReport, ...]
    rules: tuple[RuleReport, ...]
    hostname: str
    timings_ms: Mapping[str, float]
    already: bool


class NetConfigure(Request[NetConfigureReply], method="net.configure"):
    """Set up interfaces, routes, rules, names and DNS: all or nothing.

    ``wait_ms`` is how long to wait for interfaces that are not there yet.
    """

    interfaces: tuple[Interface, ...] = ()
    rules: tuple[Rule, ...] | None = None
    dns: Dns | None = None
    hostname: str | None = None
    hosts: tuple[HostsEntry, ...] | None = None
    wait_ms: int = 0

    def check(self) -> None:
        _check_count("interfaces", self.interfaces, 64)
        _check_count("rules", self.rules, 256)
        _check_count("hosts", self.hosts, 1024)
        check_range("wait_ms", self.wait_ms, 0, 600_000)
        if self.hostname is not None:
            check_domain("hostname", self.hostname, 64)
        _check_unique("interfaces", [one.match or one.vlan for one in self.interfaces])
        names = [one.name or (one.match.name if one.match else None) for one in self.interfaces]
        _check_unique("names of interfaces", [name for name in names if name is not None])
        _check_unique("rules", [(rule.family_number, rule.priority) for rule in self.rules or ()])


class NetListReply(Record):
    """The network as the kernel has it. ``resolv_conf`` and ``hosts`` are the files."""

    interfaces: tuple[InterfaceReport, ...]
    rules: tuple[RuleReport, ...]
    hostname: str
    resolv_conf: str
    hosts: str


class NetList(Request[NetListReply], method="net.list"):
    """List interfaces, addresses, routes, neighbours, rules and name files."""
