"""``guestctl completion``: how a shell completes commands, options, layers and profiles."""

import click
from click.shell_completion import get_completion_class

__all__ = ("SHELLS", "completion")

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_GUESTCTL_COMPLETE"
#: By the line, not by the words that bash makes of it: those end at every colon of an address.
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
