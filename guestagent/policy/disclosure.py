"""What leaves the guest under a policy: errors, replies, events, lines of the log.

Every policy in force must expose a thing for it to leave. What is not exposed is left out or blank;
a reply keeps its form.
"""

from collections.abc import Sequence

from guestagent.api import Event, LayerReport, OverlayReport
from guestagent.api.agent import EventsReply, HelloReply, StatusReply
from guestagent.api.devicemapper import DmListReply
from guestagent.api.layers import DmDevice, LayerListReply
from guestagent.api.observe import CrashesReply, LogReply, MetricsReply
from guestagent.api.overlays import LayersMountReply, OverlayListReply
from guestagent.policy.document import EVENT_FIELDS, Policy
from vsock.errors import CallError
from vsock.log import Line
from vsock.record import Record

__all__ = ("Disclosure",)

_LEVELS = {
    "log": ("none", "codes", "full"),
    "crashes": ("none", "count", "full"),
    "errors": ("codes", "text"),
    "dm": ("none", "names", "tables"),
}
#: Fields of a line that are words of the agent's own, not of a request or a device.
_CODE_FIELDS = frozenset(("code", "step", "rule", "count", "ms"))
_HIDDEN = "not exposed by the policy"


class Disclosure:
    """Pure. Of several policies the least of each holds."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        exposures = [policy.expose for policy in policies]
        least = {
            name: levels[min(levels.index(getattr(each, name)) for each in exposures)]
            for name, levels in _LEVELS.items()
        }
        self.log, self.crashes = least["log"], least["crashes"]
        self.errors, self.dm = least["errors"], least["dm"]
        self._metrics = frozenset.intersection(*(frozenset(each.metrics) for each in exposures))
        self._kinds = frozenset.intersection(*(frozenset(each.events.kinds) for each in exposures))
        fields = frozenset.intersection(*(frozenset(each.events.fields) for each in exposures))
        self._blank = {
            name: "" if name == "detail" else None for name in EVENT_FIELDS if name not in fields
        }

    def error(self, error: CallError) -> CallError:
        """Return the error as a peer may see it: with ``codes`` neither its texts nor its errno.

        A denial by the policy names its rule all the same.
        """
        if self.errors == "text" or (error.code == "denied" and error.step == "policy"):
            return error
        return CallError(error.code, _HIDDEN, step=error.step)

    def event(self, event: Event) -> Event | None:
        """Return the event as a subscriber may see it; None: it may not."""
        return event.replace(**self._blank) if event.kind in self._kinds else None

    def line(self, line: Line) -> Line | None:
        """Return a line of the log as a reader outside may see it; None: it may not."""
        if self.log == "none":
            return None
        if self.log == "full":
            return line
        kept = {name: value for name, value in line.fields.items() if name in _CODE_FIELDS}
        return line.replace(fields=kept)

    def reply(self, reply: Record) -> Record:
        """Return a reply as a peer may see it."""
        match reply:
            case HelloReply():
                return reply.replace(kernel="", boot={})
            case StatusReply():
                problems = tuple(_HIDDEN for _ in reply.problems)
                return reply if self.errors == "text" else reply.replace(problems=problems)
            case EventsReply():
                seen = map(self.event, reply.events)
                return reply.replace(events=tuple(event for event in seen if event is not None))
            case LogReply():
                # its lines were filtered where they were read
                return reply
            case MetricsReply():
                return MetricsReply(text=self._metrics_text(reply.text))
            case CrashesReply():
                return self._crashes(reply)
            case DmListReply():
                return reply.replace(devices=tuple(map(self._dm_device, reply.devices)))
            case LayerReport():
                return self._layer(reply)
            case LayerListReply():
                return reply.replace(layers=tuple(map(self._layer, reply.layers)))
            case OverlayReport():
                return self._overlay(reply)
            case OverlayListReply():
                return reply.replace(overlays=tuple(map(self._overlay, reply.overlays)))
            case LayersMountReply():
                overlay = None if reply.overlay is None else self._overlay(reply.overlay)
                layers = tuple(map(self._layer, reply.layers))
                return reply.replace(layers=layers, overlay=overlay)
        return reply

    def _layer(self, report: LayerReport) -> LayerReport:
        return report.replace(dm=tuple(map(self._dm_device, report.dm)))

    def _overlay(self, report: OverlayReport) -> OverlayReport:
        """How full a scratch is tells what the guest does."""
        if report.scratch is None:
            return report
        dm = tuple(map(self._dm_device, report.scratch.dm))
        return report.replace(scratch=report.scratch.replace(free_bytes=0, dm=dm))

    def _dm_device(self, device: DmDevice) -> DmDevice:
        return device if self.dm == "tables" else device.replace(table="", status="")

    def _crashes(self, reply: CrashesReply) -> CrashesReply:
        if self.crashes == "none":
            return CrashesReply(crashes=(), total=0)
        if self.crashes == "count":
            return CrashesReply(crashes=(), total=reply.total)
        if self.log == "full":
            return reply
        return reply.replace(crashes=tuple(each.replace(log=()) for each in reply.crashes))

    def _metrics_text(self, text: str) -> str:
        lines = (line for line in text.splitlines() if self._family_of(line) in self._metrics)
        return "".join(f"{line}\n" for line in lines)

    def _family_of(self, line: str) -> str:
        name = line.split()[2] if line.startswith("# ") else line.partition("{")[0].split(" ")[0]
        for suffix in ("_bucket", "_sum", "_count"):
            if name.removesuffix(suffix) in self._metrics:
                return name.removesuffix(suffix)
        return name
