"""The agent as a process: engine, service and server, until a request or a signal ends it.

The same function serves as a child of PID 1 in a VM and as a plain root process elsewhere.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from guestagent.config import Config, Problem
from guestagent.engine.engine import Engine
from guestagent.engine.faults import Faults
from guestagent.engine.journal import Journal
from guestagent.engine.state import Rules
from guestagent.engine.statedirectory import StateDirectory
from guestagent.listeners import HeldSockets, Listeners
from guestagent.observe.crashes import CrashReports
from guestagent.observe.observers import Observers
from guestagent.policy.binding.keeper import PolicyKeeper
from guestagent.service.dispatch import QUICK_METHODS, URGENT_METHODS, Service
from guestagent.storage.syscalls import bound_malloc
from vsock.address import Address, parse_address
from vsock.deadline import Deadline
from vsock.dial import dial, listen
from vsock.errors import CallError, RpcError
from vsock.log import log
from vsock.retry import retry
from vsock.rpc import Limits
from vsock.server import Server
from vsock.stream import Listener, Stream
from vsock.threads import start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.console.service import Console

__all__ = ("EXIT_FAILED", "MODES", "run")

EXIT_FAILED = 1
#: Exit status -> how the machine is to end; any other status asks PID 1 for another agent.
MODES = {0: "poweroff", 80: "poweroff", 81: "reboot"}
_STATUS_OF_MODE = {"exit": 0, "poweroff": 80, "reboot": 81}

_STOP_GRACE_SECONDS = 5.0
_LAST_UNMOUNT_SECONDS = 10.0
#: What a dialled peer gets to answer a connection attempt, and the pauses between attempts.
_DIAL_SECONDS = 5.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.05, 2.0


def run(
    config: Config,
    *,
    problems: tuple[Problem, ...] = (),
    boot: dict[str, object] | None = None,
    restarts: int = 0,
    on_ready: Callable[[], None] | None = None,
    sockets: HeldSockets | None = None,
    policy: PolicyKeeper | None = None,
) -> int:
    """Serve until shutdown or SIGTERM; return the exit status, which says how to go on.

    ``on_ready`` is called once, when peers that connect are served. ``sockets`` and ``policy`` are
    those that PID 1 holds. An agent that does not return leaves a report: it writes one itself if
    it can, or else the next agent in the same state directory does.

    Raises:
        OSError: a plain process can listen on no address at all, and has none to dial.
    """
    path = config.state_directory
    left = partial(_left_behind, path)
    try:
        directory = StateDirectory(path)
    except CallError as error:
        log.error("cannot start", error=str(error), hint=error.hint or "")
        return EXIT_FAILED
    try:
        if policy is None:
            policy = PolicyKeeper(config.policy, is_held=False, faults=config.fault)
        else:
            policy.restore()
    except CallError as error:
        log.error("cannot start", error=str(error))
        return EXIT_FAILED
    with directory, CrashReports(path, restarts=restarts, left=left) as crashes:
        return _live(
            config, directory, crashes, problems, boot, restarts, on_ready, sockets, policy
        )


def _left_behind(directory: str) -> dict[str, tuple[str, ...]]:
    """Return what the journal of an agent that has ended holds, as texts."""
    written = Journal(directory).read()
    half = [(one.layer_id, one.mount_point) for one in written.begun_layers]
    half += [(one.spec.overlay_id, one.spec.mount_point) for one in written.begun_overlays]
    return {
        "layers": tuple(f"{one.spec.layer_id} at {one.spec.mount_point}" for one in written.layers),
        "overlays": tuple(
            f"{one.spec.overlay_id} at {one.spec.mount_point}" for one in written.overlays
        ),
        "unfinished": tuple(f"{name} at {target}" for name, target in half),
    }


def _live(
    config: Config,
    directory: StateDirectory,
    crashes: CrashReports,
    problems: tuple[Problem, ...],
    boot: dict[str, object] | None,
    restarts: int,
    on_ready: Callable[[], None] | None,
    sockets: HeldSockets | None,
    policy: PolicyKeeper,
) -> int:
    begin = time.perf_counter()
    bound_malloc()
    engine = Engine(
        state_directory=directory,
        rules=Rules(
            target_roots=config.target_roots,
            require_verity=config.require_verity,
        ),
        faults=Faults.parse(config.fault),
        gate=policy.gate,
    )
    observers = Observers(crashes)
    try:
        observers.watch(engine)
        observers.ship_log(config.log_dial, level=config.log, boot_id=engine.events.boot_id)
        recovered = engine.start()
        _restore_network(engine)
        ending = _Ending(is_machine=bool((boot or {}).get("pid1")))
        boot = {
            **(boot or {}),
            "boot_id": engine.events.boot_id,
            "adopted_layers": len(recovered.layers),
            "undone": len(recovered.undone),
            "engine_ms": round((time.perf_counter() - begin) * 1000, 3),
            "ready_uptime_ms": round(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000, 1),
            "console": list(config.console),
            "console_shell": config.console_shell,
        }
        service = Service(
            engine,
            boot=boot,
            problems=problems,
            restarts=restarts,
            deadline_seconds=config.deadline_seconds,
            on_shutdown=ending.end,
            observers=observers,
            policy=policy,
        )
        service.adopt(engine.state.journal.left)
        server = Server(
            service.handle,
            limits=Limits(max_deadline_ms=config.max_deadline_seconds * 1000),
            quick=QUICK_METHODS,
            urgent=URGENT_METHODS,
            report=_report,
        )
        service.attach(server)
        ending.attach(server)
        listen_on = partial(
            _listen_for, config.vsock_peers, listen if sockets is None else sockets.listen
        )
        listeners = Listeners(config.listen, server.add_listener, listen_on)
        observers.add_problems(listeners.problems)
        listeners.start()
        if sockets is None and not config.dial:
            listeners.require_one()
        console = _start_console(config, engine, service, observers, listen_on)
        dialers = [_Dialer(server, address) for address in config.dial]
        for dialer in dialers:
            dialer.start()
        log.info("serving", listen=",".join(config.listen), dial=",".join(config.dial))
        if on_ready is not None:
            on_ready()
        server.serve_forever()
        ending.detach()
        listeners.close()
        for dialer in dialers:
            dialer.close()
        if console is not None:
            console.close()
        if ending.mode != "exit":
            _leave_nothing(engine)
    finally:
        observers.close()
        engine.close()
    return _STATUS_OF_MODE[ending.mode]


def _restore_network(engine: Engine) -> None:
    """Undo what an agent before this one has left unfinished of the network."""
    try:
        if os.stat(f"{engine.state.directory}/network").st_size == 0:
            return
    except FileNotFoundError:
        return
    from guestagent.net.network import restore_network

    try:
        restore_network(engine.state.directory)
    except CallError as error:
        engine.state.inventory.note_problem("network", f"network: {error.message}")


def _listen_for(
    cids: tuple[int, ...], listen_on: Callable[[Address], Listener], address: Address
) -> Listener:
    """Listen on ``address`` for AF_VSOCK peers with ``cids``."""
    listener = listen_on(address)
    listener.allowed_cids = frozenset(cids)
    return listener


def _start_console(
    config: Config,
    engine: Engine,
    service: Service,
    observers: Observers,
    listen_on: Callable[[Address], Listener],
) -> "Console | None":
    """Start the debug console, where the configuration allows one."""
    if not config.console:
        return None
    from guestagent.console.command import Guest
    from guestagent.console.service import Console
    from guestagent.engine.debugview import DebugView
    from guestagent.inspect.guestroot import GuestRoot

    root = GuestRoot(engine.operation)
    guest = Guest(service, root, DebugView(engine), engine.state.gate, shell=config.console_shell)
    console = Console(guest, config.console, listen_on)
    observers.add_problems(console.problems)
    console.start()
    return console


def _leave_nothing(engine: Engine) -> None:
    """Unmount what came since the shutdown began, or all of it when a signal ends the machine."""
    with Deadline(_LAST_UNMOUNT_SECONDS) as deadline:
        try:
            engine.unmount_everything(engine.operation(deadline), force=True)
        except CallError as error:
            log.error("the machine ends with layers mounted", error=str(error))


class _Ending:
    """How the agent is to end: what ``agent.shutdown`` asked for, or a signal.

    A plain process that gets a signal leaves everything mounted, for the next agent to adopt; under
    PID 1 the machine ends.
    """

    def __init__(self, *, is_machine: bool) -> None:
        self.mode = "exit"
        self._ended = False
        self._mode_of_signal = "poweroff" if is_machine else "exit"
        self._server: Server | None = None
        self._waker_fd = -1
        signal.signal(signal.SIGTERM, self._signalled)
        signal.signal(signal.SIGINT, self._signalled)

    def attach(self, server: Server) -> None:
        self._server = server
        # a copy, so that a signal after the server has closed its own meets an open one
        self._waker_fd = os.dup(server.waker_fd)
        signal.set_wakeup_fd(self._waker_fd, warn_on_full_buffer=False)
        if self._ended:  # a signal came before there was a server to stop
            server.stop(0.0)

    def detach(self) -> None:
        """Stop waking the server by signals: it has stopped. Idempotent."""
        if self._waker_fd >= 0:
            signal.set_wakeup_fd(-1)
            os.close(self._waker_fd)
            self._waker_fd = -1

    def end(self, mode: str) -> None:
        """Stop serving; replies that are on their way are still sent."""
        self.mode = mode
        self._ended = True
        if self._server is not None:
            self._server.stop(_STOP_GRACE_SECONDS)

    def _signalled(self, _number: int, _frame: object) -> None:
        self.end(self.mode if self.mode != "exit" else self._mode_of_signal)


class _Dialer:
    """Keeps one connection to a host that listens: dials, serves, and dials again when it ends."""

    def __init__(self, server: Server, address: str) -> None:
        self._server = server
        self._address = parse_address(address)
        self._until = Deadline()
        self._thread = threading.Thread(target=self._run, name=f"dial {address}", daemon=True)

    def start(self) -> None:
        start_thread(self._thread)

    def close(self) -> None:
        """End the thread and wait for it."""
        self._until.cancel()
        self._thread.join()
        self._until.close()

    def _run(self) -> None:
        try:
            while True:
                stream = retry(
                    self._dial,
                    self._until,
                    when=lambda error: isinstance(error, (OSError, RpcError)),
                    step="dial again",
                    first_seconds=_FIRST_PAUSE_SECONDS,
                    most_seconds=_LAST_PAUSE_SECONDS,
                )
                self._serve(stream)
                self._until.wait((), "dial again", at_most=_FIRST_PAUSE_SECONDS)
        except CallError:  # closed
            return

    def _dial(self) -> Stream:
        with self._until.part(_DIAL_SECONDS) as deadline:
            try:
                return dial(self._address, deadline)
            except (OSError, RpcError) as error:
                log.debug("cannot dial", address=self._address, error=str(error))
                raise

    def _serve(self, stream: Stream) -> None:
        ended, ended_there = socket.socketpair()
        with ended:
            self._server.add_stream(stream, on_close=ended_there.close)
            self._until.wait([ended.fileno()], "serve the host")


def _report(text: str) -> None:
    log.debug(text, pid=os.getpid())
