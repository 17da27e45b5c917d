"""The contract between a host and the agent: every request, reply and event, with its checks.

One frozen record for each method's parameters (see ``guestagent.api.request``) and for its reply;
``METHODS`` has them all. Imported by host and guest alike. A record that exists is valid by itself:
what can be judged without the kernel is judged here, and a refusal names the field (see
``vsock.record``). The records are in the modules named below; the package itself has what a caller
needs most.

Conventions: sizes and offsets are in bytes unless the name says sectors or blocks; digests and
salts travel as binary or hexadecimal text in requests and as hexadecimal text in replies; layers
of an overlay are listed topmost first, as in the kernel's ``lowerdir``.
"""

from guestagent.api import (
    agent,
    devicemapper,
    devices,
    inspect,
    inspect_devices,
    layers,
    observe,
    overlays,
)
from guestagent.api.agent import Event
from guestagent.api.devices import (
    ByteRange,
    LabelDevice,
    PathDevice,
    PmemDevice,
    ScsiDevice,
    Verity,
    VirtioBlkDevice,
    VmbusScsiDevice,
)
from guestagent.api.layers import LayerReport, LayerSpec
from guestagent.api.methods import Methods
from guestagent.api.overlays import (
    DeviceScratch,
    DirectoryScratch,
    LayersMount,
    LayersUnmount,
    OverlayOptions,
    OverlayReport,
    OverlaySpec,
    ThinScratch,
    TmpfsScratch,
)
from guestagent.api.request import Request

__all__ = (
    "METHODS",
    "ByteRange",
    "DeviceScratch",
    "DirectoryScratch",
    "Event",
    "LabelDevice",
    "LayerReport",
    "LayerSpec",
    "LayersMount",
    "LayersUnmount",
    "OverlayOptions",
    "OverlayReport",
    "OverlaySpec",
    "PathDevice",
    "PmemDevice",
    "Request",
    "ScsiDevice",
    "ThinScratch",
    "TmpfsScratch",
    "Verity",
    "VirtioBlkDevice",
    "VmbusScsiDevice",
)

#: Every method of the contract by name: the class of its request.
METHODS = Methods(
    (agent, observe, layers, overlays, devices, devicemapper, inspect_devices, inspect)
)
