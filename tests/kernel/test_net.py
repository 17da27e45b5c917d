"""The guest's network on a real kernel: all of a request or nothing, judged by iproute2."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api.net import (
    Dns,
    HostsEntry,
    Interface,
    InterfaceMatch,
    Neighbour,
    NetConfigure,
    NetConfigureReply,
    Route,
    Rule,
    Vlan,
)
from guestagent.engine.faults import Faults
from guestagent.engine.transaction import Transaction
from guestagent.net.changes import restore
from guestagent.net.configure import configure
from guestagent.net.network import configure_network, list_network
from guestagent.net.undofile import UndoFile, is_unfinished, undo_path
from guestagent.policy.decision import ALLOWED_WITHOUT_POLICY
from tests.beds.agentbed import PROJECT, SITE, AgentProcess
from tests.beds.netbed import MAC, ask, ip, network_namespace, set_duplicate_detection, world
from vsock.deadline import Deadline
from vsock.errors import CallError, ConnectionClosed

MAX_STEPS = 100
BY_MAC = InterfaceMatch(mac=MAC)
#: With something in every field.
EVERYTHING = NetConfigure(
    interfaces=(
        Interface(
            match=BY_MAC,
            name="eth0",
            mtu=1400,
            addresses=("10.0.0.2/24", "10.0.0.3/24", "fd00::2/64"),
            routes=(
                Route(destination="default", gateway="10.0.0.1", metric=7, source="10.0.0.2"),
                Route(destination="default", gateway="fd00::1"),
                Route(destination="10.9.0.0/16", table=1000),
                Route(destination="172.16.0.0/12", gateway="192.0.2.1", on_link=True),
            ),
            neighbours=(
                Neighbour(address="10.0.0.9", mac="52:54:00:00:00:99"),
                Neighbour(address="fd00::9", mac="52:54:00:00:00:99"),
            ),
            dad=False,
        ),
        Interface(
            vlan=Vlan(parent="eth0", id=5), name="eth0.5", mtu=1300, addresses=("10.5.0.2/24",)
        ),
    ),
    rules=(
        Rule(priority=100, table=1000, source="10.0.0.0/24"),
        Rule(priority=101, table=1000, mark=7, family="ipv6"),
        Rule(priority=102, table=200, interface="eth0", destination="10.0.0.0/8"),
    ),
    dns=Dns(servers=("10.0.0.1", "fd00::1"), search=("example.org",), options=("ndots:2",)),
    hostname="guest",
    hosts=(HostsEntry(address="10.0.0.2", names=("guest", "guest.example.org")),),
)


class Bed:
    """A root with an /etc, an undo file, and a network namespace."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.etc = self.root / "etc"
        self.etc.mkdir(parents=True)
        (self.etc / "hosts").write_text("127.0.0.1 before\n")
        (self.etc / "resolv.conf").symlink_to("../run/resolv.conf")
        self.state = directory / "state"
        self.state.mkdir()

    def undo_file(self) -> UndoFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        return UndoFile(os.open(undo_path(str(self.state)), flags, 0o600))

    def fork(self, fault: str) -> int:
        """Do EVERYTHING in a fork of this process; return its status."""
        pid = os.fork()
        if pid == 0:
            try:
                self.configure(EVERYTHING, fault)
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def configure(self, request: NetConfigure, fault: str = "") -> NetConfigureReply:
        """Do a request in this process."""
        with self.undo_file() as undo_file, Deadline(30) as deadline:
            self.faults = Faults.parse(fault)
            op = Transaction(deadline, faults=self.faults)
            return configure(request, op, undo_file, root=str(self.root))

    def run(self, request: NetConfigure, fault: str = "", seconds: float = 30) -> NetConfigureReply:
        """Do a request in a child, as the agent does."""
        with Deadline(seconds) as deadline:
            return configure_network(
                request,
                str(self.state),
                deadline,
                ALLOWED_WITHOUT_POLICY,
                faults=fault,
                root=str(self.root),
            )

    def world(self) -> dict[str, object]:
        return world(self.etc)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with network_namespace():
        yield Bed(tmp_path)


@pytest.fixture
def furnished(bed: Bed) -> Bed:
    """With a network that a request takes away, or leaves alone."""
    for command in (
        "link set v0 up mtu 1450",
        "addr add 192.168.7.2/24 dev v0",
        "addr add 192.168.7.3/24 dev v0",
        "addr add fd07::2/64 dev v0 nodad",
        "route add default via 192.168.7.1 dev v0 proto static metric 3",
        "route add 10.77.0.0/16 dev v0 proto dhcp",
        "route add 10.79.0.0/16 via 192.168.7.9 dev v0",
        "-6 route add fd99::/64 via fd07::1 dev v0 proto static",
        "neigh add 192.168.7.9 lladdr 52:54:00:00:00:77 dev v0",
        "rule add from 192.168.7.0/24 table 300 priority 50 protocol static",
        "rule add from 192.168.8.0/24 table 301 priority 51",
        "link add link v0 name other type vlan id 9",
        "link set other up",
        "addr add 10.99.0.1/24 dev other",
    ):
        ip(*command.split())
    return bed


def outcome(call: object, *arguments: object) -> CallError | None:
    try:
        call(*arguments)  # type: ignore[operator]
    except CallError as error:
        return error
    return None


def refused(call: object, *arguments: object) -> CallError:
    with pytest.raises(CallError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value


def one(**fields: object) -> NetConfigure:
    """Return a request for the interface of the bed."""
    return NetConfigure(interfaces=(Interface(match=BY_MAC, **fields),))  # type: ignore[arg-type]


def addresses(name: str) -> list[str]:
    found = ask("addr", "show", "dev", name)[0]["addr_info"]
    return [f"{a['local']}/{a['prefixlen']}" for a in found if a["scope"] == "global"]


def test_every_field_reaches_the_kernel(bed: Bed) -> None:
    reply = bed.run(EVERYTHING)
    assert not reply.already
    link, vlan = (ask("-d", "link", "show", name)[0] for name in ("eth0", "eth0.5"))
    assert (link["mtu"], vlan["mtu"]) == (1400, 1300)
    assert vlan["linkinfo"]["info_data"]["id"] == 5
    assert vlan["link"] == "eth0"
    assert sorted(addresses("eth0")) == ["10.0.0.2/24", "10.0.0.3/24", "fd00::2/64"]
    assert addresses("eth0.5") == ["10.5.0.2/24"]
    routes = {
        (route["dst"], route.get("gateway"), route.get("metric"), route.get("table"))
        for family in ("-4", "-6")
        for route in ask(family, "route", "show", "table", "all")
        if route["protocol"] == "static"
    }
    assert routes == {
        ("default", "10.0.0.1", 7, None),
        ("default", "fd00::1", 1024, None),
        ("10.9.0.0/16", None, None, "1000"),
        ("172.16.0.0/12", "192.0.2.1", None, None),
    }
    neighbours = ask("neigh", "show", "nud", "permanent", "dev", "eth0")
    assert {(one["dst"], one["lladdr"]) for one in neighbours} == {
        ("10.0.0.9", "52:54:00:00:00:99"),
        ("fd00::9", "52:54:00:00:00:99"),
    }
    rules = [
        (rule["priority"], rule["table"], rule["src"], rule.get("fwmark"), rule.get("iif"))
        for family in ("-4", "-6")
        for rule in ask(family, "rule")
        if rule.get("protocol") == "static"
    ]
    assert rules == [
        (100, "1000", "10.0.0.0", None, None),
        (102, "200", "all", None, "eth0"),
        (101, "1000", "all", "0x7", None),
    ]
    assert (bed.etc / "resolv.conf").read_text() == (
        "search example.org\nnameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:2\n"
    )
    assert (bed.etc / "hosts").read_text() == (
        "127.0.0.1 localhost\n::1 localhost\n10.0.0.2 guest guest.example.org\n"
    )
    assert socket.gethostname() == "guest"
    assert [report.name for report in reply.interfaces] == ["eth0", "eth0.5"]
    assert reply.interfaces[1].vlan == Vlan(parent="eth0", id=5)
    with Deadline(20) as deadline:
        listed = list_network(str(bed.state), deadline)
    # its link-local address may be tentative still, or no longer
    eth0 = [one.replace(tentative=()) for one in listed.interfaces if one.name == "eth0"]
    assert eth0 == [reply.interfaces[0].replace(tentative=())]


def test_same_request_touches_nothing(bed: Bed) -> None:
    bed.run(EVERYTHING)
    before = bed.world()
    stamps = [path.stat().st_mtime_ns for path in sorted(bed.etc.iterdir())]
    monitor = subprocess.Popen(["ip", "monitor", "all"], stdout=subprocess.PIPE, text=True)
    try:
        assert bed.run(EVERYTHING).already
        ip("link", "set", "v1", "alias", "the-end")  # the monitor shows it, and what came before
        assert monitor.stdout is not None
        seen = monitor.stdout.readline()
    finally:
        monitor.kill()
        monitor.communicate()
    assert "v1" in seen
    assert [path.stat().st_mtime_ns for path in sorted(bed.etc.iterdir())] == stamps
    assert bed.world()["addresses"] == before["addresses"]
    assert not is_unfinished(str(bed.state))


def test_list_that_is_given_is_the_whole_list(furnished: Bed) -> None:
    furnished.configure(one(addresses=("192.168.7.3/24",), routes=(), neighbours=()))
    assert addresses("v0") == ["192.168.7.3/24"]
    left = [
        (route["dst"], route.setdefault("protocol", "boot"))
        for family in ("-4", "-6")
        for route in ask(family, "route", "show", "dev", "v0")
        if route["protocol"] != "kernel"
    ]
    assert left == [("10.77.0.0/16", "dhcp")]  # of another program
    assert ask("neigh", "show", "nud", "permanent") == []
    assert addresses("other") == ["10.99.0.1/24"]
    assert [rule["priority"] for rule in ask("rule") if "192.168" in rule["src"]] == [50, 51]


def test_field_that_is_left_out_stays(furnished: Bed) -> None:
    before = furnished.world()
    reply = furnished.configure(one())
    assert reply.already
    assert furnished.world() == before


def test_renaming_an_interface_that_is_up_keeps_what_it_has(furnished: Bed) -> None:
    before = furnished.world()
    furnished.configure(one(name="lan0"))
    assert sorted(addresses("lan0")) == ["192.168.7.2/24", "192.168.7.3/24", "fd07::2/64"]
    furnished.configure(one(name="v0"))
    after = furnished.world()
    # the kernel gives the second address a label of its own (inetdev_changename)
    assert str(after.pop("addresses")).replace("v0:2", "v0") == str(before.pop("addresses"))
    assert after == before


def test_two_interfaces_change_names(bed: Bed) -> None:
    swap = NetConfigure(
        interfaces=(
            Interface(match=BY_MAC, name="v1"),
            Interface(match=InterfaceMatch(mac=ask("link", "show", "v1")[0]["address"]), name="v0"),
        )
    )
    bed.configure(swap)
    assert ask("link", "show", "v1")[0]["address"] == MAC
    assert bed.configure(swap).already


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "code", "number"), [("EIO", "device", errno.EIO), ("LATE", "timeout", None)]
)
def test_every_step_that_fails_leaves_what_was_there(
    furnished: Bed, kind: str, code: str, number: int | None
) -> None:
    before = furnished.world()
    for step in range(1, MAX_STEPS):
        error = outcome(furnished.configure, EVERYTHING, f"#{step}:{kind}")
        if error is None:
            break
        assert error.step
        assert (error.code in (code, "resource"), error.errno) == (True, number)
        assert error.hint is None, error.hint
        assert furnished.world() == before, f"{step} {error.step}"
        assert not is_unfinished(str(furnished.state))
    assert step > 25
    assert furnished.configure(EVERYTHING).already


@pytest.mark.timeout(600)
def test_work_killed_at_every_step_is_undone(furnished: Bed) -> None:
    before = furnished.world()
    for number in range(1, MAX_STEPS):
        with furnished.undo_file() as undo_file, Deadline(30) as deadline:
            if furnished.fork(f"#{number}:KILL") == 0:
                break
            restore(undo_file, deadline)
        assert furnished.world() == before, f"after a kill at step {number}"
    assert number > 25


@pytest.mark.parametrize("step", ["journal", "rename", "route", "write", "commit"])
def test_killed_child_is_undone_by_another(furnished: Bed, step: str) -> None:
    before = furnished.world()
    error = refused(furnished.run, EVERYTHING, f"{step}:KILL")
    assert "killed by signal 9" in error.message
    assert error.hint is None
    assert furnished.world() == before


def test_deadline_leaves_what_was_there(furnished: Bed) -> None:
    before = furnished.world()
    error = refused(furnished.run, EVERYTHING, "route:BLOCK:2", 3.0)
    assert (error.code, error.step) == ("timeout", "route")
    assert furnished.world() == before


def test_interface_that_nobody_has(bed: Bed) -> None:
    error = refused(bed.run, NetConfigure(interfaces=(Interface(match=InterfaceMatch(name="x")),)))
    assert (error.code, error.errno, error.step) == ("not_found", errno.ENODEV, "find")
    assert error.object == "interfaces[0].match"


def test_interface_that_comes_later_is_waited_for(bed: Bed) -> None:
    late = subprocess.Popen(["sh", "-c", "sleep 0.5; ip link add late type veth peer name late1"])
    try:
        match = InterfaceMatch(name="late")
        bed.configure(NetConfigure(interfaces=(Interface(match=match),), wait_ms=10_000))
    finally:
        late.wait(10)
    assert "UP" in ask("link", "show", "late")[0]["flags"]
    ip("link", "del", "late")


@pytest.mark.parametrize(
    ("fields", "code", "number", "step", "named"),
    [
        ({"mtu": 65535 + 1}, "invalid", None, None, "mtu"),
        ({"name": "v1"}, "conflict", errno.EEXIST, "rename", "interfaces[0].name: v1"),
        (
            {"routes": (Route(destination="10.1.0.0/16", gateway="10.200.0.1"),)},
            "invalid", errno.ENETUNREACH, "route", "interfaces[0].routes[0]: 10.1.0.0/16",
        ),
        (
            {"addresses": ("10.0.0.1/24",),
             "routes": (Route(destination="10.1.0.0/16", source="10.0.0.99"),)},
            "invalid", errno.EINVAL, "route", "interfaces[0].routes[0]: 10.1.0.0/16",
        ),
    ],
)  # fmt: skip
def test_refusal_names_the_field_and_undoes_the_rest(
    furnished: Bed, fields: dict[str, object], code: str, number: int, step: str, named: str
) -> None:
    before = furnished.world()
    if step is None:
        with pytest.raises(ValueError, match=named):
            one(**fields)
        return
    error = refused(furnished.run, one(**{"addresses": ("10.3.0.1/24",), **fields}))
    assert (error.code, error.errno, error.step) == (code, number, step)
    assert named in (error.object or "")
    assert named in error.message
    assert furnished.world() == before


def test_mtu_beyond_that_of_the_device(bed: Bed) -> None:
    bed.run(NetConfigure(interfaces=(Interface(match=BY_MAC, mtu=1500),)))
    vlan = Interface(vlan=Vlan(parent="v0", id=7), name="v0.7", mtu=9000)
    before = bed.world()
    error = refused(bed.run, NetConfigure(interfaces=(vlan,)))
    assert (error.code, error.errno, error.step) == ("invalid", errno.ERANGE, "mtu")
    assert error.object == "interfaces[0].mtu: 9000 of v0.7"
    assert bed.world() == before


def test_route_of_another_program_is_in_the_way(furnished: Bed) -> None:
    ip("route", "add", "10.78.0.0/16", "via", "192.168.7.9", "dev", "v0", "proto", "dhcp")
    before = furnished.world()
    route = Route(destination="10.78.0.0/16", gateway="192.168.7.8")
    error = refused(furnished.run, one(routes=(route,)))
    assert (error.code, error.errno, error.step) == ("conflict", errno.EEXIST, "route")
    assert furnished.world() == before


def test_address_that_another_machine_has(bed: Bed) -> None:
    ip("link", "set", "v0", "up")
    set_duplicate_detection("v0", True)
    ip("addr", "add", "fd00::7/64", "dev", "v1")
    before = bed.world()
    error = refused(bed.run, one(addresses=("fd00::7/64",)))
    assert (error.code, error.errno, error.step) == ("conflict", errno.EADDRINUSE, "duplicates")
    assert "interfaces[0].addresses[0]: fd00::7/64 on v0" in (error.object or "")
    assert bed.world() == before


def test_addresses_can_be_used_when_the_reply_comes(bed: Bed) -> None:
    set_duplicate_detection("v0", True)
    reply = bed.run(one(addresses=("fd00::8/64",)))
    assert "fd00::8/64" in reply.interfaces[0].addresses
    assert "fd00::8/64" not in reply.interfaces[0].tentative
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as bound:
        bound.bind(("fd00::8", 0))


def test_etc_that_cannot_be_written(furnished: Bed) -> None:
    before = furnished.world()
    (furnished.etc / ".guestagent-hosts").mkdir()
    error = refused(furnished.run, EVERYTHING)
    assert (error.step, error.object) == ("write", "/etc/hosts")
    assert error.errno == errno.EISDIR
    (furnished.etc / ".guestagent-hosts").rmdir()
    assert furnished.world() == before


def test_links_in_the_root_stay_in_the_root(bed: Bed, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (bed.etc / "resolv.conf").unlink()
    (bed.etc / "hosts").unlink()
    bed.etc.rmdir()
    (bed.root / "etc").symlink_to(f"../../../{outside}")
    error = refused(bed.run, NetConfigure(dns=Dns(servers=("10.0.0.1",))))
    assert error.errno == errno.ENOENT
    assert list(outside.iterdir()) == []


def test_requests_at_the_same_time_wait_for_each_other(bed: Bed) -> None:
    with bed.undo_file() as held, Deadline(5) as deadline:
        held.lock(deadline)
        error = refused(bed.run, one(), "", 1.0)
    assert error.step == "lock"
    assert error.errno == errno.EWOULDBLOCK
    bed.run(one())


def test_agent_sets_up_the_network_and_stays_small(bed: Bed) -> None:
    with AgentProcess() as agent, agent.client() as guest:
        guest.net_list()
        before_bytes = guest.status().rss_bytes
        request = EVERYTHING.replace(dns=None, hosts=None)
        assert not guest.net_configure(request).already
        assert guest.net_configure(request).already
        assert "eth0.5" in [one.name for one in guest.net_list().interfaces]
        assert guest.status().rss_bytes - before_bytes < 1 << 20
        error = refused(guest.net_configure, one(name="v1"))
        assert (error.code, error.errno, error.step) == ("conflict", errno.EEXIST, "rename")


def test_child_ends_with_its_agent_and_the_next_one_undoes_its_work(furnished: Bed) -> None:
    request = EVERYTHING.replace(dns=None, hosts=None)
    before = furnished.world()
    with AgentProcess() as agent, contextlib.ExitStack() as stack:
        agent.stop()
        agent.start("fault=rule:BLOCK:2")
        guest = stack.enter_context(agent.client())

        def ask_in_vain() -> None:
            with contextlib.suppress(CallError, ConnectionClosed):
                guest.net_configure(request)

        asking = threading.Thread(target=ask_in_vain)
        with subprocess.Popen(["ip", "monitor", "rule"], stdout=subprocess.PIPE) as monitor:
            asking.start()
            assert monitor.stdout is not None
            monitor.stdout.readline()  # the rule of before is gone, or the first one is there
            agent.kill()
            monitor.kill()
        asking.join(30)
        assert is_unfinished(agent.state)
        assert furnished.world() != before
        agent.start()
        with agent.client() as again:
            assert again.status().problems == ()
        assert furnished.world() == before
        assert not is_unfinished(agent.state)


def test_agent_without_the_child(bed: Bed, tmp_path: Path) -> None:
    package = tmp_path / "lib/guestagent"
    shutil.copytree(PROJECT / "guestagent", package)
    shutil.copytree(PROJECT / "vsock", tmp_path / "lib/vsock")
    (package / "net/child.py").unlink()
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from guestagent.net.network import list_network\n"
        "from vsock.deadline import Deadline\n"
        "try: list_network(sys.argv[3], Deadline(9))\n"
        "except Exception as error: print(error, '|', error.hint)"
    )
    command = [sys.executable, "-I", "-S", "-c", script, tmp_path / "lib", SITE, bed.state]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == (
        "unsupported: this guest cannot set up its network | build the boot image with the "
        "feature net\n"
    )
