"""An agent that answers what a test tells it to, over the real wire; it can be restarted."""

import threading
from pathlib import Path
from typing import cast

from guestagent.api import METHODS, OverlayReport
from guestagent.api.observe import CrashReport
from vsock.address import UnixAddress
from vsock.dial import listen
from vsock.errors import CallError
from vsock.server import Call, Connection, Outcome, Server

WAIT_SECONDS = 60.0


class Agent:
    """An agent that says hello, numbers events and lines, and can be restarted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.address = f"unix://{path}"
        self.events: list[dict[str, object]] = []
        self.lines = 0
        self.boot_id = "first"
        self.events_per_page = 1000
        self.traces: list[str | None] = []
        self.subscribers: list[Connection] = []
        self.followers: list[Connection] = []
        self.layers: dict[str, str] = {}
        self.overlays: dict[str, tuple[str, ...]] = {}
        self.problems: list[str] = []
        self.crashes: list[CrashReport] = []
        self.metrics = "guestagent_up 1\n"
        #: How many times an event is sent and the connection ended instead of listing events.
        self.hang_ups = 0
        #: The answer to the next subscriptions.
        self.refusal: CallError | None = None
        #: What a newer agent says beyond: in each reply, event, batch of lines and error.
        self.more_fields: dict[str, object] = {}
        #: Set while a request for the layer "slow" waits, and after it was cancelled.
        self.waiting, self.cancelled = threading.Event(), threading.Event()
        self.start()

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self.server = Server(
            self._handle,
            quick=frozenset(METHODS) - {"layer.verify", "agent.events"},
            hello_seconds=None,
        )
        self.server.add_listener(listen(UnixAddress(path=str(self._path))))
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def reboot(self) -> None:
        """Start as another boot, which has told more than any client was told of the old one."""
        self.boot_id = "second"
        self.events.clear()
        for _ in range(4):
            self.publish("layer_mounted")
        self.lines = 3
        self.start()

    def stop(self) -> None:
        self.server.stop(0.0)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        self.subscribers.clear()
        self.followers.clear()

    def publish(self, kind: str) -> None:
        number = self.last_sequence + 1
        event = {"sequence": number, "kind": kind, "unix_ms": number, **self.more_fields}
        self.events.append(event)
        for connection in self.subscribers:
            connection.notify("agent.event", event)

    @property
    def last_sequence(self) -> int:
        """The number of the last event, 0 before the first."""
        return cast(int, self.events[-1]["sequence"]) if self.events else 0

    def log(self) -> None:
        self.lines += 1
        for connection in self.followers:
            connection.notify("agent.log", self._log_reply(self.lines - 1))

    def _log_reply(self, since: int) -> dict[str, object]:
        numbers = range(since + 1, self.lines + 1)
        lines = [
            {
                "number": number,
                "uptime_seconds": 1.0,
                "unix_ms": 1,
                "level": "info",
                "text": f"line {number}",
                "fields": {},
            }
            for number in numbers
        ]
        whole = {"lines": lines, "dropped": 0, "next": self.lines, "more": False}
        return {**whole, **self.more_fields}

    def _handle(self, call: Call) -> Outcome:
        self.traces.append(call.traceparent)
        try:
            reply = getattr(self, call.method.replace(".", "_"))(call)
            return Outcome(None, {**reply, **self.more_fields})
        except CallError as error:
            return Outcome({**error.to_wire(), **self.more_fields}, None)

    def agent_cancel(self, call: Call) -> object:
        msgid = call.params["msgid"]
        assert isinstance(msgid, int)
        return {"cancelled": call.connection.cancel(msgid)}

    def agent_hello(self, call: Call) -> object:
        call.connection.said_hello = True
        return {
            "version": 1,
            "agent": "0",
            "kernel": "6",
            "features": [],
            "limits": {},
            "boot": {"boot_id": self.boot_id},
        }

    def agent_subscribe(self, call: Call) -> object:
        if self.refusal is not None:
            raise self.refusal
        self.subscribers.append(call.connection)
        return {"sequence": self.last_sequence}

    def agent_events(self, call: Call) -> object:
        if self.hang_ups:
            self.hang_ups -= 1
            self.publish("layer_mounted")
            ended = threading.Event()
            call.connection.on_close(ended.set)
            call.connection.close()
            assert ended.wait(WAIT_SECONDS)
        since = call.params.get("since", 0)
        assert isinstance(since, int)
        events = [event for event in self.events if cast(int, event["sequence"]) > since]
        return {
            "events": events[: self.events_per_page],
            "dropped": 0,
            "sequence": self.last_sequence,
            "more": len(events) > self.events_per_page,
        }

    def agent_log(self, call: Call) -> object:
        since = call.params.get("since", 0)
        assert isinstance(since, int)
        if call.params.get("follow"):
            self.followers.append(call.connection)
        if since < 0:
            since = max(0, self.lines + since)
        return self._log_reply(since if since <= self.lines else 0)

    def agent_metrics(self, call: Call) -> object:
        return {"text": self.metrics}

    def layer_verify(self, call: Call) -> object:
        if call.params["layer_id"] == "slow":
            self.waiting.set()
            try:
                call.deadline.wait((), "verify")
            finally:
                self.cancelled.set()
        for done in (1, 2):
            place = {"msgid": call.msgid, "done_bytes": done, "total_bytes": 2}
            call.connection.notify("agent.progress", place)
        return {
            "layer_id": "x",
            "read_bytes": 2,
            "corrupt_blocks": [],
            "status": "V",
            "timings_ms": {},
        }

    def layer_get(self, call: Call) -> object:
        raise CallError("not_found", "no such layer", errno=2, step="look", object="x", hint="list")

    # --- what guestctl asks besides

    def agent_status(self, call: Call) -> object:
        return {
            "state": "degraded" if self.problems else "ready",
            "problems": self.problems,
            "uptime_seconds": 3723.0,
            "pid": 7,
            "restarts": 0,
            "layers": len(self.layers),
            "overlays": len(self.overlays),
            "dm_devices": 2 * len(self.layers),
            "requests_in_flight": 1,
            "connections": 1,
            "rss_bytes": 13 << 20,
            "threads": 4,
            "event_sequence": self.last_sequence,
            "events_dropped": 0,
        }

    def layer_list(self, call: Call) -> object:
        reports = [layer_report(name, state) for name, state in self.layers.items()]
        return {"layers": [{**report, **self.more_fields} for report in reports]}

    def overlay_list(self, call: Call) -> object:
        return {"overlays": [overlay_report(name, *ids) for name, ids in self.overlays.items()]}

    def dm_list(self, call: Call) -> object:
        devices = [dm_device(f"dm-verity-{name}-{'ab' * 32}") for name in self.layers]
        return {"devices": devices}

    def agent_crashes(self, call: Call) -> object:
        return {"crashes": [crash.to_wire() for crash in self.crashes], "total": len(self.crashes)}


def dm_device(name: str) -> dict[str, object]:
    return {
        "name": name,
        "uuid": f"guestagent-verity-{name}",
        "dev": "254:1",
        "node": "/dev/dm-1",
        "target_type": "verity",
        "table": "0 8 verity 1",
        "status": "V",
        "readonly": True,
        "deferred_remove": True,
        "open_count": 1,
    }


def layer_report(layer_id: str, state: str = "mounted") -> dict[str, object]:
    return {
        "layer_id": layer_id,
        "state": state,
        "target": f"/run/layers/{layer_id}",
        "device": {"kind": "pmem", "number": 0},
        "device_node": "/dev/pmem0",
        "dev": "254:1",
        "mapping": None,
        "dm": [],
        "verity": None,
        "filesystem": "erofs",
        "mount_id": 30,
        "options": ["ro"],
        "readonly": True,
        "size_bytes": 55_574_528,
        "used_by": [],
        "overlaps": [],
        "timings_ms": {},
        "already": False,
    }


def overlay_report(overlay_id: str, *layers: str) -> dict[str, object]:
    known = {
        "overlay_id": overlay_id,
        "state": "mounted",
        "target": f"/run/overlays/{overlay_id}",
        "layers": list(layers),
        "lowerdirs": [f"/run/layers/{layer}" for layer in layers],
        "method": "mount",
        "scratch": None,
        "mount_id": 31,
        "options": ["ro"],
        "timings_ms": {},
        "already": False,
    }
    return {name: known[name] for name in OverlayReport._fields if name in known}
