"""Commands about the console itself, and those that leave it."""

from guestagent.api.console import Size
from guestagent.console.command import Command, Run, Usage, number
from vsock.errors import CallError

__all__ = ("SESSION_COMMANDS",)

_END_SECONDS = 60.0
_KEYS = (
    "Keys: left right home end ^A ^E ^K ^U ^W ^Y ^L, up and down for lines that",
    "begin alike, tab to complete, ^C to interrupt, ^D to leave.",
    "At --more--: space for a page, enter for a line, G for the rest, q for no more.",
)


def _help(run: Run) -> int | None:
    from guestagent.console.commands import COMMANDS, GROUPS, suggest

    if run.words:
        command = COMMANDS.get(run.words[0])
        if command is None:
            raise Usage(f"there is no command {run.words[0]!r}{suggest(run.words[0])}")
        run.screen.line(f"{command.synopsis}")
        run.screen.line(f"  {command.summary}")
        return None
    for group, title in GROUPS.items():
        run.screen.line(f"{title}")
        for command in COMMANDS.values():
            if command.group == group:
                run.screen.line(f"  {command.name:10} {command.summary}")
    run.screen.line()
    run.screen.lines(_KEYS)
    return None


def _term(run: Run) -> int | None:
    """A bare line cannot tell of its terminal; the person can."""
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
    return None


def _sh(run: Run) -> int | None:
    if not run.guest.shell:
        raise CallError(
            "denied",
            "the shell is disabled: guestagent.console_shell=",
            hint="boot with guestagent.console_shell=1 to permit it",
        )
    from guestagent.console.shell import run_shell

    command = run.options.get("c")
    return run_shell(run, command)


def _end(mode: str) -> object:
    def end(run: Run) -> int | None:
        from guestagent.console.session import Leave

        if not run.guest.boot.get("pid1"):
            raise CallError("unsupported", "this agent is not the init of a machine", step=mode)
        with run.deadline.part(_END_SECONDS) as limit:
            op = run.engine.operation(limit)
            run.engine.unmount_everything(op, force="force" in run.options)
        run.screen.line(f"everything is unmounted; {mode}")
        run.screen.flush()
        run.guest.end(mode)
        raise Leave

    return end


def _seconds(run: Run) -> int | None:
    """Wait: for scripts, and to see that an interrupt works."""
    seconds = number(run.words[0], "SECONDS", low=0, high=86_400)
    run.deadline.wait((), "sleep", at_most=float(seconds))
    return None


def _command(name: str, summary: str, function: object, **fields: object) -> Command:
    return Command(name=name, summary=summary, function=function, group="session", **fields)  # type: ignore[arg-type]


SESSION_COMMANDS = (
    _command(
        "help",
        "list the commands, or tell of one",
        _help,
        usage="[COMMAND]",
        most=1,
        completes="command",
    ),
    _command(
        "sh",
        "run the guest's shell, where that is permitted and there is one",
        _sh,
        usage="[-c COMMAND]",
        options=("c=",),
        is_paged=False,
    ),
    _command(
        "term",
        "say or set the terminal, for a bare line",
        _term,
        usage="[NAME] [COLUMNSxROWS]",
        most=2,
    ),
    _command("sleep", "wait", _seconds, usage="SECONDS", least=1, most=1),
    _command(
        "reboot",
        "unmount everything, reboot; --force though something is busy",
        _end("reboot"),
        usage="[--force]",
        options=("force",),
    ),
    _command(
        "poweroff",
        "unmount everything, power off; --force though something is busy",
        _end("poweroff"),
        usage="[--force]",
        options=("force",),
    ),
)
