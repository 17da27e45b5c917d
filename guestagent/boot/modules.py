"""Kernel modules at boot, loaded by a process of their own while PID 1 imports the agent.

Both take about as long, and neither needs the other. The order is that of the list in the boot
image: each module after those that it needs.
"""

import os
import time

from guestagent.storage import syscalls

__all__ = ("MODULE_LIST", "Loading", "load_module", "module_parameters", "start_loading")

MODULE_LIST = "/etc/guestagent/modules"
_COMMAND_LINE = "/proc/cmdline"
_CHUNK_BYTES = 4096
_DONE = "\0"


class Loading:
    """Modules that a child process is loading. Call ``finish`` once."""

    def __init__(self, pid: int, fd: int) -> None:
        self._pid = pid
        self._fd = fd

    def finish(self, seconds: float) -> tuple[tuple[str, ...], float]:
        """Wait until all are loaded; return what went wrong, and the milliseconds that it took.

        A module that hangs is a problem, too; its process is left behind.
        """
        raw, is_ended = self._read_all(seconds)
        os.close(self._fd)
        if is_ended:
            os.waitpid(self._pid, 0)
        *problems, last = raw.decode(errors="replace").split("\n")
        if not last.startswith(_DONE):
            what = "ended" if is_ended else f"still at work after {seconds:g} s"
            return (*problems, f"the loader of modules has {what}"), 0.0
        return tuple(problems), float(last[len(_DONE) :])

    def _read_all(self, seconds: float) -> tuple[bytes, bool]:
        import select

        until = time.monotonic() + seconds
        raw = b""
        while True:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                return raw, False
            chunk = os.read(self._fd, _CHUNK_BYTES)
            if not chunk:
                return raw, True
            raw += chunk


def start_loading(list_path: str = MODULE_LIST, command_line: str = _COMMAND_LINE) -> Loading:
    """Begin to load the modules that the boot image lists.

    Raises:
        OSError: there can be no process for it.
    """
    fd, fd_there = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(fd_there)
        return Loading(child, fd)
    try:
        os.close(fd)
        _load_all(list_path, command_line, fd_there)
    finally:
        os._exit(0)


def _load_all(list_path: str, command_line: str, fd: int) -> None:
    begin = time.perf_counter()
    problems: list[str] = []
    try:
        with open(command_line, encoding="utf-8", errors="replace") as stream:
            parameters = module_parameters(stream.read())
        for path in _listed(list_path):
            try:
                load_module(path, parameters)
            except OSError as error:
                problems.append(f"module {path}: {error.strerror or error}")
    except OSError as error:
        problems.append(f"modules: {error}")
    spent_ms = round((time.perf_counter() - begin) * 1000, 3)
    os.write(fd, "\n".join([*problems, f"{_DONE}{spent_ms}"]).encode())


def _listed(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as stream:
            return [line.strip() for line in stream if line.strip()]
    except FileNotFoundError:  # a kernel with all of it built in
        return []


def load_module(path: str, parameters: dict[str, str]) -> None:
    """Load a module with its parameters; a module that is loaded already is no error.

    ``parameters`` are by module name.

    Raises:
        OSError: there is no such file, or the kernel refuses it.
    """
    name = path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.finit_module(fd, parameters.get(name, ""), filename=path)
    except FileExistsError:
        return
    finally:
        os.close(fd)


def module_parameters(command_line: str) -> dict[str, str]:
    """Return the parameters of each module on a kernel's command line (MODULE.NAME=VALUE).

    The kernel applies those of built-in modules; for other modules the loader passes them on.
    """
    found: dict[str, str] = {}
    for word in command_line.split():
        module, dot, parameter = word.partition(".")
        if dot and parameter and "=" not in module:
            name = module.replace("-", "_")
            found[name] = f"{found.get(name, '')} {parameter}".lstrip()
    return found
