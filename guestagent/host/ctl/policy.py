"""``guestctl policy``: which policy a guest has, and giving it one."""

from pathlib import Path

import click

from guestagent.api.policy import PolicyReply
from guestagent.host.ctl.session import Session, pass_session
from guestagent.host.ctl.style import described

__all__ = ("policy",)

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def policy() -> None:
    """What the host may ask of a guest, and may learn."""


@policy.command("set")
@click.argument("document", type=_FILE)
@click.option("--signature", type=_FILE, help="File with the 64 bytes of an Ed25519 signature.")
@pass_session
def set_policy(session: Session, document: Path, signature: Path | None) -> None:
    """Put a policy in force, once, until the machine ends."""
    signed = None if signature is None else signature.read_bytes()
    with session.agent() as guest:
        reply = guest.policy_set(document.read_bytes(), signature=signed)
    session.show(reply, lambda: _describe(reply))


@policy.command("narrow")
@click.argument("document", type=_FILE)
@pass_session
def narrow(session: Session, document: Path) -> None:
    """Let a second policy judge as well: both must allow."""
    with session.agent() as guest:
        reply = guest.policy_narrow(document.read_bytes())
    session.show(reply, lambda: _describe(reply))


@policy.command("get")
@pass_session
def get(session: Session) -> None:
    """Say which policy is in force, and what it has denied."""
    with session.agent() as guest:
        reply = guest.policy_get()
    session.show(reply, lambda: _describe(reply))


def _describe(reply: PolicyReply) -> str:
    facts = [
        ("sha256", reply.digest),
        ("svn", str(reply.svn)),
        ("bound by", " ".join(reply.bound_by)),
        ("narrowed", str(reply.narrowed)),
        *((f"denied {rule}", str(count)) for rule, count in sorted(reply.denials.items())),
    ]
    return described("policy", reply.name or "-", reply.state, facts)
