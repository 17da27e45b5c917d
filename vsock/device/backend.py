"""What each vhost-user message does: features, memory, rings. One object for one front-end.

Source: QEMU docs/interop/vhost-user.rst; VIRTIO 1.2, section 5.10.4 (configuration: the CID).
"""

import logging
import os
import struct
from collections.abc import Callable

from vsock.device.memory import GuestMemory, MemoryFault, Region
from vsock.device.vhost_user import Channel, ChannelError, ConfigRange, Message, Request, VringState
from vsock.device.virtqueue import MAX_QUEUE_SIZE
from vsock.device.vring import Vring
from vsock.loop import Loop

__all__ = ("DEVICE_FEATURES", "EVENT", "PROTOCOL_FEATURES", "RX", "TX", "Backend")

_log = logging.getLogger(__name__)

#: The rings, named as the guest names them; the event ring exists but we have no events to tell.
RX, TX, EVENT = 0, 1, 2
_RINGS = 3

_F_INDIRECT_DESC = 1 << 28
_F_PROTOCOL_FEATURES = 1 << 30
_F_VERSION_1 = 1 << 32
DEVICE_FEATURES = _F_VERSION_1 | _F_PROTOCOL_FEATURES | _F_INDIRECT_DESC

_PF_MQ = 1 << 0
_PF_REPLY_ACK = 1 << 3
# Nothing is sent on the request channel, but User Mode Linux 6.1 finds no interrupt without it.
_PF_BACKEND_REQ = 1 << 5
_PF_CONFIG = 1 << 9
# Each NVDIMM takes a slot of memory, and the table of SET_MEM_TABLE has but eight.
_PF_CONFIGURE_MEM_SLOTS = 1 << 15
PROTOCOL_FEATURES = _PF_MQ | _PF_REPLY_ACK | _PF_BACKEND_REQ | _PF_CONFIG | _PF_CONFIGURE_MEM_SLOTS
_MAX_MEMORY_SLOTS = 512


class Backend:
    """The back-end's half of one vhost-user session; owns the channel, the rings and the memory."""

    def __init__(
        self, channel: Channel, loop: Loop, *, cid: int, on_restart: Callable[[], None]
    ) -> None:
        """``on_restart`` is called when a guest driver starts afresh: it knows no connection."""
        self.rings = tuple(Vring(index, loop) for index in range(_RINGS))
        self._channel = channel
        self._config = struct.pack("<Q", cid)
        self._on_restart = on_restart
        self._memory = GuestMemory()
        self._protocol_features = 0
        self._request_fd: int | None = None
        self._handlers: dict[int, Callable[[Message], int | None]] = {
            Request.GET_FEATURES: lambda _: DEVICE_FEATURES,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: lambda _: None,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_memory_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_address,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_error,
            Request.GET_PROTOCOL_FEATURES: lambda _: PROTOCOL_FEATURES,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: lambda _: _RINGS,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SET_BACKEND_REQ_FD: self._set_request_fd,
            Request.SET_CONFIG: self._set_config,
            Request.GET_MAX_MEM_SLOTS: lambda _: _MAX_MEMORY_SLOTS,
            Request.ADD_MEM_REG: self._add_region,
            Request.REM_MEM_REG: self._remove_region,
        }

    def serve(self) -> None:
        """Serve every message that has come.

        Raises:
            ChannelError: framing is lost, or a question cannot be answered.
            ConnectionError: the front-end has gone.
        """
        while (message := self._channel.receive()) is not None:
            try:
                self._serve_one(message)
            finally:
                message.close()

    def close(self) -> None:
        """Free everything. The front-end sees its socket close."""
        for ring in self.rings:
            ring.close()
        self._memory = GuestMemory()
        if self._request_fd is not None:
            os.close(self._request_fd)
            self._request_fd = None
        self._channel.close()

    def _serve_one(self, message: Message) -> None:
        _log.debug("message %s fds=%d", message.name, len(message.fds))
        match message.request:
            case Request.GET_CONFIG:
                return self._get_config(message)
            case Request.GET_VRING_BASE:
                return self._get_vring_base(message)
        answer: int | None = None
        failed = False
        handler = self._handlers.get(message.request)
        try:
            if handler is None:
                raise ChannelError("this request is not known")
            answer = handler(message)
        except (ChannelError, MemoryFault, ValueError, OSError) as exc:
            failed = True
            _log.error("message refused request=%s reason=%s", message.name, exc)
        if answer is not None:
            self._channel.reply_number(message, answer)
        elif message.needs_reply and self._protocol_features & _PF_REPLY_ACK:
            self._channel.reply_number(message, int(failed))
        return None

    def _ring(self, index: int) -> Vring:
        if index >= len(self.rings):
            raise ChannelError(f"there is no ring {index}")
        return self.rings[index]

    def _set_features(self, message: Message) -> None:
        features = message.number()
        if features & ~DEVICE_FEATURES:
            raise ChannelError(f"features {features:#x} were not all offered")
        if not features & _F_PROTOCOL_FEATURES:
            # Without that feature there is no SET_VRING_ENABLE: rings are born enabled.
            for ring in self.rings:
                ring.enabled = True

    def _set_protocol_features(self, message: Message) -> None:
        features = message.number()
        if features & ~PROTOCOL_FEATURES:
            raise ChannelError(f"protocol features {features:#x} were not all offered")
        self._protocol_features = features

    def _reset_owner(self, _message: Message) -> None:
        for ring in self.rings:
            ring.stop()
            ring.enabled = False
            ring.base = 0
        self._on_restart()

    def _set_memory_table(self, message: Message) -> None:
        regions = [
            Region.map(where, fd)
            for where, fd in zip(message.memory_table(), message.fds, strict=True)
        ]
        self._use_memory(GuestMemory(regions))

    def _add_region(self, message: Message) -> None:
        if len(self._memory.regions) >= _MAX_MEMORY_SLOTS:
            raise ChannelError(f"all {_MAX_MEMORY_SLOTS} memory slots are taken")
        where = message.memory_region()
        fd = message.take_fd()
        try:
            region = Region.map(where, fd)
        finally:
            os.close(fd)
        self._use_memory(GuestMemory((*self._memory.regions, region)))

    def _remove_region(self, message: Message) -> None:
        where = message.memory_region()
        kept = [
            region
            for region in self._memory.regions
            if (region.where.guest_address, region.where.user_address, region.where.size_bytes)
            != (where.guest_address, where.user_address, where.size_bytes)
        ]
        if len(kept) == len(self._memory.regions):
            raise ChannelError(f"there is no such memory region: {where}")
        self._use_memory(GuestMemory(kept))

    def _use_memory(self, memory: GuestMemory) -> None:
        self._memory = memory
        for ring in self.rings:
            ring.remap(memory)

    def _set_vring_num(self, message: Message) -> None:
        state = message.vring_state()
        if not 0 < state.value <= MAX_QUEUE_SIZE or state.value & (state.value - 1):
            raise ChannelError(f"a ring of {state.value} descriptors")
        self._stopped_ring(state.index).size = state.value

    def _set_vring_address(self, message: Message) -> None:
        index, address = message.vring_address()
        ring = self._ring(index)
        ring.address = address
        ring.remap(self._memory)

    def _set_vring_base(self, message: Message) -> None:
        state = message.vring_state()
        self._stopped_ring(state.index).base = state.value & 0xFFFF

    def _stopped_ring(self, index: int) -> Vring:
        ring = self._ring(index)
        if ring.started:
            raise ChannelError(f"ring {index} is running")
        return ring

    def _get_vring_base(self, message: Message) -> None:
        ring = self._ring(message.vring_state().index)
        self._channel.reply_vring_state(message, VringState(index=ring.index, value=ring.stop()))

    def _set_vring_kick(self, message: Message) -> None:
        index, has_fd = message.vring_fd()
        if not has_fd:
            raise ChannelError(f"ring {index} has no kick descriptor: polling is not offered")
        self._ring(index).start(self._memory, message.take_fd())
        rx, tx = self.rings[RX], self.rings[TX]
        # A driver that starts afresh begins both rings at 0; a paused driver goes on.
        if index in (RX, TX) and rx.started and tx.started and rx.base == tx.base == 0:
            self._on_restart()

    def _set_vring_call(self, message: Message) -> None:
        index, has_fd = message.vring_fd()
        self._ring(index).set_call(message.take_fd() if has_fd else None)

    def _set_vring_error(self, message: Message) -> None:
        index, has_fd = message.vring_fd()
        self._ring(index).set_error(message.take_fd() if has_fd else None)

    def _set_vring_enable(self, message: Message) -> None:
        state = message.vring_state()
        self._ring(state.index).enabled = bool(state.value)

    def _set_request_fd(self, message: Message) -> None:
        fd = message.take_fd()
        if self._request_fd is not None:
            os.close(self._request_fd)
        self._request_fd = fd

    def _get_config(self, message: Message) -> None:
        wanted = message.config_range()
        data = self._config[wanted.offset_bytes : wanted.offset_bytes + wanted.size_bytes]
        if len(data) != wanted.size_bytes:
            _log.error("configuration read outside its %d bytes: %s", len(self._config), wanted)
            data = b""  # an answer without data is how the protocol says no
        self._channel.reply(
            message,
            ConfigRange(
                offset_bytes=wanted.offset_bytes,
                size_bytes=len(data),
                flags=wanted.flags,
                data=data,
            ).pack(),
        )

    def _set_config(self, _message: Message) -> None:
        raise ChannelError("the configuration of a vsock device is read-only")
