"""``guestctl net``: the guest's network."""

import json
from typing import BinaryIO

import click

from guestagent.api.net import InterfaceReport, NetConfigure, NetList, NetListReply
from guestagent.api.nettexts import network_from_texts
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import plain, spent, table

__all__ = ("net",)

_MAX_REQUEST_BYTES = 1024 * 1024
_HEADER = ("INTERFACE", "STATE", "MTU", "MAC", "ADDRESSES", "ROUTES")


@click.group()
def net() -> None:
    """The network of a guest."""


@net.command("configure")
@click.argument("parts", nargs=-1, metavar="[PART]...")
@click.option(
    "--request",
    "request_file",
    type=click.File("rb"),
    help="Read the parameters of net.configure from this file as JSON, - is standard input.",
)
@pass_session
def configure(session: Session, parts: tuple[str, ...], request_file: BinaryIO | None) -> None:
    """Set up the network: all of it, or what was there.

    PART is interface,match=mac=MAC,FIELD=VALUE... or rule,... dns,... hosts,... hostname=NAME
    wait_ms=N, as in guestagent.net= of the kernel command line.
    """
    if (request_file is None) == (not parts):
        raise click.UsageError("say either PARTs or --request FILE")
    try:
        if request_file is not None:
            request = NetConfigure.from_wire(json.loads(request_file.read(_MAX_REQUEST_BYTES)))
        else:
            request = network_from_texts(parts)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(str(error)) from None
    with session.agent() as guest:
        reply = guest.net_configure(request)

    def describe() -> str:
        done = "nothing to change" if reply.already else f"ms {spent(reply.timings_ms)}"
        return f"{_interfaces(reply.interfaces)}\n{done}"

    session.show(reply, describe)


@net.command("list")
@pass_session
def list_network(session: Session) -> None:
    """List interfaces, addresses, routes and rules."""
    session.tell(NetList, _describe)


def _describe(reply: NetListReply) -> str:
    texts = (
        _interfaces(reply.interfaces),
        table(("FAMILY", "RULE"), [(rule.family, rule.text) for rule in reply.rules]),
        plain(f"hostname {reply.hostname}"),
        "\n".join(map(plain, reply.resolv_conf.splitlines())),
    )
    return "\n\n".join(filter(None, texts))


def _interfaces(interfaces: tuple[InterfaceReport, ...]) -> str:
    rows = []
    for one in interfaces:
        state = "up" if one.carrier else "no carrier"
        routes = [
            f"{route.destination} via {route.gateway}" if route.gateway else route.destination
            for route in one.routes
        ]
        rows.append(
            (
                one.name,
                state if one.up else "down",
                str(one.mtu),
                one.mac or "-",
                " ".join(one.addresses) or "-",
                ", ".join(routes) or "-",
            )
        )
    return table(_HEADER, rows)
