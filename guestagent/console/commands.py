"""The table of commands: help, completion and the documentation are made from it."""

from guestagent.console.command import Command
from guestagent.console.commands_files import FILE_COMMANDS
from guestagent.console.commands_layers import LAYER_COMMANDS
from guestagent.console.commands_session import SESSION_COMMANDS
from guestagent.console.commands_system import SYSTEM_COMMANDS

__all__ = ("COMMANDS", "GROUPS", "suggest")

#: Group -> its title.
GROUPS = {
    "layers": "Layers, overlays and their devices",
    "guest": "The guest",
    "files": "Files: ID:/path in a layer or overlay, /path in the guest",
    "session": "The console",
}
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (*LAYER_COMMANDS, *SYSTEM_COMMANDS, *FILE_COMMANDS, *SESSION_COMMANDS)
}


def suggest(name: str) -> str:
    """Return a hint for a command that there is not."""
    near = [known for known in COMMANDS if name and (known.startswith(name) or name in known)]
    return f"; did you mean {' or '.join(near[:3])}?" if near else "; help lists them"
