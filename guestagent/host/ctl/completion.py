"""``guestctl completion``: the shell completes commands, options and names in the guest."""

import string
from collections.abc import Callable, Iterable

import click
from click.shell_completion import get_completion_class

from guestagent.host.client import GuestAgent
from guestagent.host.ctl.profiles import resolve
from vsock.errors import RpcError

__all__ = (
    "SHELLS",
    "complete_devices",
    "complete_layers",
    "complete_overlays",
    "complete_places",
    "completion",
)

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_GUESTCTL_COMPLETE"
#: Reads the whole line: bash ends a word at every colon, which an address has.
_BASH = """\
_guestctl_completion() {
    local line=${COMP_LINE:0:COMP_POINT} words kind value
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_WORDS=$line COMP_CWORD=$((${#words[@]} - 1)) \
        _GUESTCTL_COMPLETE=bash_complete "$1")
    local last=${words[-1]}
    # bash replaces only what is behind the last colon
    [[ $last == *:* ]] && COMPREPLY=("${COMPREPLY[@]#"${last%"${last##*:}"}"}")
    return 0
}
complete -F _guestctl_completion guestctl"""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script by which SHELL completes guestctl.

    \b
    bash   eval "$(guestctl completion bash)"             in ~/.bashrc
    zsh    eval "$(guestctl completion zsh)"              in ~/.zshrc, after compinit
    fish   guestctl completion fish > ~/.config/fish/completions/guestctl.fish
    """
    if shell == "bash":
        click.echo(_BASH)
        return
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "guestctl", _VARIABLE).source())


# --- names that only the agent knows; none where it does not answer quickly


#: Limit for asking the agent while a person waits for the completion.
_SECONDS = 1.0

#: What a completed name may be made of: nothing that means more to a shell, or ends a line.
_NAME = frozenset(string.ascii_letters + string.digits + "._-:@+=")

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _completer(names: Callable[[GuestAgent], Iterable[str]]) -> Complete:
    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        address = _address(context)
        try:
            text = resolve(address)
            if text is None:
                return []
            with GuestAgent(text, connect_seconds=_SECONDS, deadline_ms=1000) as guest:
                # bash puts a name into the command line as it is
                found = (name for name in names(guest) if _NAME.issuperset(name))
                return sorted(name for name in found if name.startswith(incomplete))
        except (RpcError, OSError, ValueError, click.UsageError):
            return []

    return complete


def _address(context: click.Context) -> str | None:
    """Return the value of --connect, before or behind the command."""
    place: click.Context | None = context
    while place is not None:
        address = place.params.get("address")
        if isinstance(address, str):
            return address
        place = place.parent
    return None


complete_layers = _completer(lambda guest: (layer.layer_id for layer in guest.layer_list()))
complete_overlays = _completer(lambda guest: (one.overlay_id for one in guest.overlay_list()))
complete_places = _completer(
    lambda guest: (
        *(f"layer:{layer.layer_id}" for layer in guest.layer_list()),
        *(f"overlay:{one.overlay_id}" for one in guest.overlay_list()),
    )
)
complete_devices = _completer(lambda guest: (device.name for device in guest.dm_list().devices))
