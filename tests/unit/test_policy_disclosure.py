"""What leaves a guest under a policy: errors, replies, events, lines of the log, the console."""

import json
from pathlib import Path
from typing import Any

import pytest

from guestagent.api import Event, LayerSpec, PmemDevice
from guestagent.api.agent import EventsReply, StatusReply
from guestagent.api.devicemapper import DmListReply
from guestagent.api.inspect import FsReadFile
from guestagent.api.layers import DmDevice
from guestagent.api.observe import CrashesReply, CrashReport, LogLine, MetricsReply
from guestagent.host.client import GuestAgent
from guestagent.policy.disclosure import Disclosure
from guestagent.policy.document import Exposure, Policy, canonical_policy, read_policy
from guestagent.policy.rules import LayerAction, Rules, State
from tests.beds.consolebed import serving
from tests.beds.inspectbed import serving as serving_layers
from tests.beds.policybed import POLICY
from vsock.errors import CallError
from vsock.log import Line, Log

NOTHING = Exposure()
ALL = Exposure.from_wire(
    {
        "log": "full",
        "crashes": "full",
        "errors": "text",
        "dm": "tables",
        "metrics": ["guestagent_layers", "guestagent_request_duration_seconds"],
        "events": {
            "kinds": ["layer_failed", "layer_mounted"],
            "fields": ["layer_id", "detail", "device"],
        },
    }
)
ERROR = CallError(
    "integrity",
    "block 7 of /dev/pmem0 is not what the digest says",
    errno=5,
    step="prove",
    object="/dev/pmem0",
    hint="look at the disk",
    kernel_log=("device-mapper: verity: 254:0: data block 7 is corrupted",),
)


def disclosure(*exposures: Exposure) -> Disclosure:
    return Disclosure([Policy(name="p", svn=0, expose=expose) for expose in exposures])


def test_error_is_its_code_and_step_alone() -> None:
    shown = disclosure(NOTHING).error(ERROR).to_wire()
    assert shown == {
        "code": "integrity",
        "message": "not exposed by the policy",
        "errno": None,
        "step": "prove",
        "object": None,
        "hint": None,
        "kernel_log": [],
    }
    assert disclosure(ALL).error(ERROR) is ERROR
    assert disclosure(ALL, NOTHING).error(ERROR).message != ERROR.message


def test_denial_names_its_rule() -> None:
    denial = CallError("denied", "no", step="policy", object="layers.tree")
    assert disclosure(NOTHING).error(denial) is denial


def event(kind: str) -> Event:
    return Event(sequence=1, kind=kind, unix_ms=2, layer_id="a", device="/dev/pmem0", detail="x")


def test_events_lose_what_is_not_exposed() -> None:
    assert disclosure(NOTHING).event(event("layer_failed")) is None
    some = Exposure.from_wire({"events": {"kinds": ["layer_failed"], "fields": ["layer_id"]}})
    shown = disclosure(some).event(event("layer_failed"))
    assert shown is not None
    assert (shown.layer_id, shown.device, shown.detail) == ("a", None, "")
    assert disclosure(some).event(event("layer_mounted")) is None
    assert disclosure(ALL, some).event(event("layer_failed")) == shown
    reply = EventsReply(
        events=(event("layer_failed"), event("layer_mounted")), dropped=0, sequence=1
    )
    assert disclosure(some).reply(reply) == reply.replace(events=(shown,))


def test_metrics_are_those_that_are_named() -> None:
    text = (
        "# HELP guestagent_layers layers by state\n"
        "# TYPE guestagent_layers gauge\n"
        'guestagent_layers{state="mounted"} 2\n'
        "# TYPE guestagent_uptime_seconds gauge\n"
        "guestagent_uptime_seconds 12.5\n"
        'guestagent_request_duration_seconds_bucket{method="layer.mount",le="0.1"} 3\n'
        'guestagent_request_duration_seconds_count{method="layer.mount"} 3\n'
    )
    lines = text.splitlines(keepends=True)
    shown = disclosure(ALL).reply(MetricsReply(text=text))
    assert shown == MetricsReply(text="".join((*lines[:3], *lines[5:])))
    assert disclosure(NOTHING).reply(MetricsReply(text=text)) == MetricsReply(text="")


def test_crashes_are_told_as_far_as_they_are_exposed() -> None:
    line = LogLine(number=1, uptime_seconds=0.0, unix_ms=0, level="info", text="x", fields={})
    crash = CrashReport(
        number=1, kind="death", reason="r", unix_ms=1, agent="1", pid=1, restarts=0, log=(line,)
    )
    reply = CrashesReply(crashes=(crash,), total=4)
    count = Exposure(crashes="count")
    assert disclosure(NOTHING).reply(reply) == CrashesReply(crashes=(), total=0)
    assert disclosure(count).reply(reply) == CrashesReply(crashes=(), total=4)
    assert disclosure(Exposure(crashes="full")).reply(reply) == CrashesReply(
        crashes=(crash.replace(log=()),), total=4
    )
    assert disclosure(ALL).reply(reply) == reply


def test_tables_and_problems_are_blank() -> None:
    device = DmDevice(
        name="n",
        uuid="u",
        dev="254:0",
        node="/dev/dm-0",
        target_type="verity",
        table="0 8 verity 1 secret",
        status="V",
        readonly=True,
        deferred_remove=True,
        open_count=1,
    )
    reply = DmListReply(devices=(device,))
    blank = device.replace(table="", status="")
    assert disclosure(NOTHING).reply(reply) == DmListReply(devices=(blank,))
    assert disclosure(ALL).reply(reply) == reply
    status = StatusReply(state="degraded", problems=("layer x: /dev/vda is gone",))
    [problem] = disclosure(NOTHING).reply(status).as_dict()["problems"]  # type: ignore[misc]
    assert "vda" not in str(problem)


@pytest.mark.parametrize("level", ["none", "codes", "full"])
def test_lines_leave_as_far_as_they_are_exposed(level: str) -> None:
    """The ring keeps all: the reason of a denial is there, in the guest alone."""
    lines: list[Line] = []
    log = Log()
    log.restrict(disclosure(Exposure(log=level)).line)
    log.add_sink(lines.append)
    log.warning("denied by the policy", rule="layers.tree", reason="the secret reason")
    kept, _ = log.since(0)
    assert kept[0].fields["reason"] == "the secret reason"
    expected = {
        "none": [],
        "codes": [{"rule": "layers.tree"}],
        "full": [{"rule": "layers.tree", "reason": "the secret reason"}],
    }[level]
    assert [line.fields for line in lines] == expected
    assert [line.fields for line in log.shown(kept)] == expected


def test_console_runs_the_commands_that_the_policy_names(tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    document: dict[str, Any] = json.loads(json.dumps(POLICY))
    document["expose"]["console"] = ["help", "env", "sh"]
    rules = Rules(read_policy(canonical_policy(document)))
    with serving(tmp_path / "console", {"base": tmp_path / "layer"}, shell=True) as bed:
        assert bed.run("cat /etc/hostname")[0] == 0
        bed.engine.state.gate.put_in_force([rules])
        assert bed.run("help")[0] == 0
        assert bed.run("env")[0] == 0
        for command in ("cat /etc/hostname", "ps", "dmesg", "sh -c true", "poweroff", "layers"):
            status, output = bed.run(command)
            assert status != 0, command
            assert "the policy of this guest does not allow it" in output
        assert bed.modes == []
        assert bed.engine.state.gate.denials == {"expose.console": 5, "expose.shell": 1}


def test_place_is_judged_again_once_it_is_open(tmp_path: Path) -> None:
    """Between the first look and the opening another layer may have taken the id."""
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/file").write_text("secret")
    rules = Rules(read_policy(canonical_policy(POLICY)))
    exposed, other = rules.policy.layers
    spec = LayerSpec(layer_id="app", device=PmemDevice(number=0), filesystem="erofs")
    states = [
        State(layers={"app": LayerAction(spec=spec, verity=layer.verity)})
        for layer in (exposed, exposed, exposed, other)
    ]
    layers = {"app": tmp_path / "layer"}
    with (
        serving_layers(tmp_path / "agent.sock", layers) as bed,
        GuestAgent(bed.address) as guest,
    ):
        gate = bed.engine.state.gate
        gate.look = iter(states).__next__
        gate.put_in_force([rules])
        request = FsReadFile(layer_id="app", path="/file")
        assert b"".join(guest.stream(request)) == b"secret"
        with pytest.raises(CallError) as caught:
            b"".join(guest.stream(request))
    assert (caught.value.code, caught.value.object) == ("denied", "expose.inspect")
