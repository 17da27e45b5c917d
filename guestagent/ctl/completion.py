"""``guestctl completion``: how a shell completes commands, options, layers and profiles."""

import click
from click.shell_completion import get_completion_class

__all__ = ("SHELLS", "completion")

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_GUESTCTL_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script by which SHELL completes guestctl.

    \b
    bash   eval "$(guestctl completion bash)"             in ~/.bashrc
    zsh    eval "$(guestctl completion zsh)"              in ~/.zshrc, after compinit
    fish   guestctl completion fish > ~/.config/fish/completions/guestctl.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "guestctl", _VARIABLE).source())
