"""``guestctl man``: manual pages, made from the texts that --help shows.

Not by click-man: its pages lose examples that keep their line breaks, and mandoc warns of them.
"""

import datetime
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from guestagent import __version__
from guestagent.host.ctl.session import Session, cannot_write, pass_session
from guestagent.host.output import atomic_write

__all__ = ("man", "pages")

_NAME = "guestctl"
_COLUMNS = 76


@click.command()
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for guestctl.1 and a page for each command; created if missing.",
)
@pass_session
def man(session: Session, output: Path) -> None:
    """Write manual pages; $SOURCE_DATE_EPOCH is their date, if set."""
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)
    written = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in pages(root).items():
            with atomic_write(output / name) as file:
                file.write(text.encode())
            written.append(str(output / name))
    except OSError as error:
        raise cannot_write(error, error.filename or str(output)) from error
    session.say(written, f"{len(written)} pages in {output}: man -l {output}/{_NAME}.1")


def pages(root: click.Group) -> dict[str, str]:
    """Return file name -> text: one page for guestctl, one for each of its commands."""
    made = {f"{_NAME}.1": _root_page(root)}
    for name, command in sorted(root.commands.items()):
        if not command.hidden:
            made[f"{_NAME}-{name}.1"] = _command_page(root, name, command)
    return made


def _root_page(root: click.Group) -> str:
    context = click.Context(root, info_name=_NAME)
    lines = [*_head(_NAME, _short(root)), *_synopsis(context), *_description(root)]
    lines += _options(context)
    lines.append(".SH COMMANDS")
    for name, command in sorted(root.commands.items()):
        if not command.hidden:
            lines += [".TP", f".BR {_roff(f'{_NAME}-{name}')} (1)", _roff(_short(command))]
    return _page([*lines, *_foot()])


def _command_page(root: click.Group, name: str, command: click.Command) -> str:
    parent = click.Context(root, info_name=_NAME)
    context = click.Context(command, info_name=name, parent=parent)
    title = f"{_NAME}-{name}"
    lines = [*_head(title, _short(command)), *_synopsis(context), *_description(command)]
    lines += _options(context)
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for inner, leaf in _leaves(command, context):
            lines += _subsection(inner, leaf)
    return _page([*lines, *_foot()])


def _leaves(
    group: click.Group, context: click.Context
) -> Iterator[tuple[click.Context, click.Command]]:
    for name, command in sorted(group.commands.items()):
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _leaves(command, inner)
        elif not command.hidden:
            yield inner, command


def _subsection(context: click.Context, command: click.Command) -> list[str]:
    words = context.command_path.split(" ", 1)[1]
    lines = [f".SS {_roff(words)}", f".B {_roff(context.command_path)}"]
    lines += [f".I {_roff(' '.join(command.collect_usage_pieces(context)))}"]
    lines += [".PP", *_paragraphs(command.help or "")]
    for names, text in _option_rows(context):
        lines += [".TP", f".B {_roff(names)}", _roff(text) or r"\&"]
    return lines


def _head(title: str, summary: str) -> list[str]:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    day = (
        datetime.datetime.fromtimestamp(int(epoch), datetime.UTC).date()
        if epoch and epoch.isdigit()
        else datetime.date.today()
    )
    return [
        f'.TH {title.upper()} 1 {day.isoformat()} "guestagent {__version__}" "User Commands"',
        ".SH NAME",
        f"{_roff(title)} \\- {_roff(summary)}",
    ]


def _synopsis(context: click.Context) -> list[str]:
    pieces = " ".join(context.command.collect_usage_pieces(context))
    return [".SH SYNOPSIS", f".B {_roff(context.command_path)}", f".I {_roff(pieces)}"]


def _description(command: click.Command) -> list[str]:
    return [".SH DESCRIPTION", *_paragraphs(command.help or "")]


def _options(context: click.Context) -> list[str]:
    rows = _option_rows(context)
    lines = [".SH OPTIONS"] if rows else []
    for names, text in rows:
        lines += [".TP", f".B {_roff(names)}", _roff(text) or r"\&"]
    return lines


def _option_rows(context: click.Context) -> list[tuple[str, str]]:
    records = (
        parameter.get_help_record(context) for parameter in context.command.get_params(context)
    )
    return [record for record in records if record is not None]


def _foot() -> list[str]:
    return [
        ".SH EXIT STATUS",
        "0 success, 1 failure (the error says what to do next), 2 wrong usage.",
        ".SH SEE ALSO",
        ".BR guestctl (1)",
    ]


def _page(lines: list[str]) -> str:
    return "".join(f"{row}\n" for line in lines if line for row in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    """Break a line of text, which roff fills again; a roff request stays on one line."""
    if line.startswith("."):
        return [line]
    rows = textwrap.wrap(line, _COLUMNS, break_long_words=False, break_on_hyphens=False)
    return [rf"\&{row}" if row.startswith(".") else row for row in rows]


def _short(command: click.Command) -> str:
    """Return the first sentence of a command's help, without its full stop."""
    first = (command.help or "").split("\n\n")[0]
    return " ".join(first.split()).rstrip(".")


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if lines:
            lines.append(".PP")
        rows = paragraph.split("\n")
        if rows[0].strip() == "\b":
            lines += [".nf", *(_roff(row.strip()) for row in rows[1:]), ".fi"]
        else:
            lines.append(_roff(" ".join(paragraph.split())))
    return lines


def _roff(text: str) -> str:
    """Return text with everything escaped that roff would interpret."""
    text = " ".join(text.split()) if "\n" in text else text
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga").replace("'", r"\(aq")
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text if c != "\b")
    return rf"\&{text}" if text.startswith(".") else text
