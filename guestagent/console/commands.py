"""The table of commands, and those about the console itself.

Help, completion and the documentation are made from the table.
"""

from guestagent.api.agent import PROTOCOL_VERSIONS, AgentHello, AgentShutdown
from guestagent.api.console import Size
from guestagent.console.command import Access, Command, Group, Leave, Run, Usage, number
from guestagent.console.commands_files import FILES
from guestagent.console.commands_layers import LAYERS
from guestagent.console.commands_system import SYSTEM
from vsock.errors import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ("COMMANDS", "GROUPS", "suggest")

_END_SECONDS = 60.0
_KEYS = (
    "Keys: left right home end ^A ^E ^K ^U ^W ^Y ^L, up and down for lines that",
    "begin alike, tab to complete, ^C to interrupt, ^D to leave.",
    "At --more--: space for a page, enter for a line, G for the rest, q for no more.",
)
SESSION = Group("The console", {"COMMAND": lambda access, word: tuple(COMMANDS)})


@SESSION.command("help [COMMAND]", "list the commands, or tell of one")
def _help(run: Run) -> None:
    if run.words:
        command = COMMANDS.get(run.words[0])
        if command is None:
            raise Usage(f"there is no command {run.words[0]!r}{suggest(run.words[0])}")
        run.screen.line(f"{command.usage}")
        run.screen.line(f"  {command.summary}")
        return
    for group in GROUPS:
        run.screen.line(group.title)
        for command in group.commands.values():
            run.screen.line(f"  {command.name:10} {command.summary}")
    run.screen.line()
    run.screen.lines(_KEYS)


@SESSION.command(
    "sh [--root DIRECTORY] [-c COMMAND]",
    "run the shell of the guest, or of a root, where that is permitted",
    is_paged=False,
)
def _sh(run: Run) -> int | None:
    if not run.guest.shell:
        raise CallError(
            "denied",
            "the shell is disabled: guestagent.console_shell=",
            hint="boot with guestagent.console_shell=1 to permit it",
        )
    from guestagent.console.shell import run_shell

    return run_shell(run, run.options.get("c"), run.options.get("root"))


@SESSION.command("term [NAME] [COLUMNSxROWS]", "say or set the terminal, for a bare line")
def _term(run: Run) -> None:
    """A bare line cannot tell its terminal's name and size; the person can."""
    channel = run.channel
    for word in run.words:
        columns, x, rows = word.partition("x")
        if x and columns.isdigit() and rows.isdigit():
            try:
                channel.size = Size(rows=int(rows), columns=int(columns))
            except ValueError as error:
                raise Usage(str(error)) from None
        elif word.isascii() and word.isprintable() and len(word) <= 64:
            channel.hello = channel.hello.replace(term=word)
            run.screen.term = word
        else:
            raise Usage(f"{word!r} is no name of a terminal and no size")
    run.screen.line(f"{channel.hello.term} {channel.size.columns}x{channel.size.rows}")


@SESSION.command("sleep SECONDS", "wait")
def _sleep(run: Run) -> None:
    """For scripts, and to see that an interrupt works."""
    seconds = number(run.words[0], "SECONDS", low=0, high=86_400)
    run.deadline.wait((), "sleep", at_most=float(seconds))


@SESSION.command("reboot [--force]", "unmount everything, reboot; --force though something is busy")
def _reboot(run: Run) -> None:
    _end(run, "reboot")


@SESSION.command(
    "poweroff [--force]", "unmount everything, power off; --force though something is busy"
)
def _poweroff(run: Run) -> None:
    _end(run, "poweroff")


def _end(run: Run, mode: str) -> "NoReturn":
    if not run.ask(AgentHello, versions=PROTOCOL_VERSIONS).boot.get("pid1"):
        raise CallError("unsupported", "this agent is not the init of a machine", step=mode)
    with run.deadline.part(_END_SECONDS) as limit:
        Access(run.guest, limit).ask(AgentShutdown, mode=mode, force="force" in run.options)
    run.screen.line(f"everything is unmounted; {mode}")
    run.screen.flush()
    raise Leave


GROUPS = (LAYERS, SYSTEM, FILES, SESSION)
COMMANDS: dict[str, Command] = {
    name: command for group in GROUPS for name, command in group.commands.items()
}


def suggest(name: str) -> str:
    """Return a hint for a command that there is not."""
    near = [known for known in COMMANDS if name and (known.startswith(name) or name in known)]
    return f"; did you mean {' or '.join(near[:3])}?" if near else "; help lists them"
