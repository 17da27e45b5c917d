"""Holds the policy of a guest: in PID 1, in memory that nobody can write to any more.

PID 1 makes a few memory files before it forks the first agent, and every agent inherits them. The
bytes of a policy go into the first, those of each narrowing into one more, and each is sealed with
that. An agent that is started again reads them, and none of it is in a directory. What was written
and not sealed, by an agent that died meanwhile, does not count: it was not answered either.

Without PID 1 the policy goes with the process: whatever starts it must give it the same settings.
"""

import errno
import fcntl
import os
import threading

from guestagent.policy.binding import KEY_PATH, POLICY_PATH
from guestagent.policy.gate import Gate
from vsock.errors import CallError
from vsock.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guestagent.policy.binding.binding import Binding
    from guestagent.policy.document import Policy
    from guestagent.policy.rules import Rules

__all__ = ("PolicyKeeper",)

#: A policy, and so many narrowings of it.
_SLOTS = 4


class PolicyKeeper:
    """Thread-safe. ``gate`` is in force by what is kept here."""

    def __init__(self, setting: str | None, *, is_held: bool, faults: str = "") -> None:
        """Read what binds a policy; ``is_held``: this is the process that outlives agents.

        ``faults`` are those that are injected, which no guest has that needs a policy.

        Raises:
            CallError: the policy that must be there cannot be put in force.
        """
        self.gate = Gate()
        self._lock = threading.Lock()
        self._documents: list[bytes] = []
        self._policies: list[Policy] = []
        self._digest = ""
        self._is_held = is_held
        self._slots = _make_slots() if is_held else []
        self._binding: Binding | None = None
        if setting in (None, "none") and not any(map(os.path.lexists, (POLICY_PATH, KEY_PATH))):
            return
        from guestagent.policy.binding.binding import accept, find_policy, read_binding

        self._binding = read_binding(setting)
        if faults and self._binding.is_required:
            text = "faults are injected, and there must be a policy"
            raise CallError("invalid", text, step="policy", object="guestagent.fault")
        if self._binding.is_required:
            self._lock_up()
        found = find_policy(self._binding)
        if found is not None:
            self._keep(found[0], accept(self._binding, *found))

    def restore(self) -> None:
        """Put in force what is kept, in an agent that has just been forked.

        Raises:
            CallError: it cannot be read any more.
        """
        self._lock = threading.Lock()
        for number, fd in enumerate(self._slots):
            raw = None if number < len(self._documents) else _sealed(fd)
            if raw is not None:
                self._enforce(raw)

    # --- for requests

    @property
    def policies(self) -> "tuple[Policy, ...]":
        """The policy in force, and after it its narrowings."""
        return tuple(self._policies)

    @property
    def state(self) -> str:
        """Say none, required (and absent), set, or inconsistent."""
        if self.gate.inconsistent:
            return "inconsistent"
        if self._documents:
            return "set"
        return "none" if self.gate.is_open else "required"

    @property
    def bound_by(self) -> tuple[str, ...]:
        return () if self._binding is None else self._binding.names

    def digest(self) -> str:
        """Return the SHA-256 of the policy in force, in hexadecimal; empty without one."""
        if self._documents and not self._digest:
            from guestagent.policy.binding.binding import digest_of

            self._digest = digest_of(self._documents[0]).hex()
        return self._digest

    def set(
        self, raw: bytes, signature: bytes | None, judge: "Callable[[Rules], str | None]"
    ) -> bool:
        """Put a policy in force; return whether just this one was already.

        ``judge`` returns what the policy denies of what is mounted, or None.

        Raises:
            CallError: ``denied``, another one is in force, or something does not vouch for this
                one; ``conflict``, it does not allow what is mounted; ``invalid``; ``unsupported``.
        """
        from guestagent.policy.binding.binding import Binding, accept
        from guestagent.policy.rules import Rules

        with self._lock:
            if self._documents:
                if raw == self._documents[0]:
                    return True
                text = "a policy is in force, and stays so"
                raise CallError("denied", text, step="policy", object="policy.set")
            policy = accept(self._binding or Binding(), raw, signature)
            self._refuse_mounted(judge(Rules(policy)))
            self._keep(raw, policy)
            return False

    def narrow(self, raw: bytes, judge: "Callable[[Rules], str | None]") -> bool:
        """Have one more policy judge: what both allow is allowed from now on. Return whether just
        this one was there already.

        Raises:
            CallError: ``conflict``, there is no policy, or what is mounted is not allowed;
                ``resource``, it was narrowed too often; ``invalid``; ``unsupported``.
        """
        from guestagent.policy.document import read_policy
        from guestagent.policy.rules import Rules

        with self._lock:
            if not self._documents:
                text = "there is no policy to narrow"
                raise CallError("conflict", text, step="policy", object="policy.narrow")
            if raw in self._documents[1:]:
                return True
            if len(self._documents) == _SLOTS:
                text = f"the policy was narrowed {_SLOTS - 1} times"
                raise CallError("resource", text, step="policy", object="policy.narrow")
            policy = read_policy(raw)
            self._refuse_mounted(judge(Rules(policy)))
            self._keep(raw, policy)
            return False

    def _refuse_mounted(self, rule: str | None) -> None:
        if rule is not None:
            text = "the policy does not allow what is mounted"
            raise CallError("conflict", text, step="policy", object=rule)

    # --- what is in force

    def _lock_up(self) -> None:
        """Allow what a policy that lists nothing allows, until there is one."""
        from guestagent.policy.document import Policy
        from guestagent.policy.rules import Rules

        self._put_in_force([Rules(Policy(name="absent", svn=0))])

    def _put_in_force(self, policies: "list[Rules]") -> None:
        self.gate.put_in_force(policies)
        disclosure = self.gate.disclosure
        if disclosure is not None:
            log.restrict(disclosure.line)

    def _keep(self, raw: bytes, policy: "Policy") -> None:
        if self._is_held:
            fd = self._slots[len(self._documents)] if self._slots else -1
            if fd < 0:
                text = "this kernel has no memory files to hold a policy (CONFIG_MEMFD_CREATE)"
                raise CallError("unsupported", text, step="policy", object="policy.set")
            _seal(fd, raw)
        self._enforce(raw, policy)

    def _enforce(self, raw: bytes, policy: "Policy | None" = None) -> None:
        from guestagent.policy.document import read_policy
        from guestagent.policy.rules import Rules

        if policy is None:
            policy = read_policy(raw)
        self._documents.append(raw)
        self._policies.append(policy)
        self._put_in_force([Rules(each) for each in self._policies])
        log.info("policy in force", name=policy.name, svn=policy.svn)


def _make_slots() -> list[int]:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return [os.memfd_create(f"guestagent-policy-{number}", flags) for number in range(_SLOTS)]
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return []


def _seal(fd: int, raw: bytes) -> None:
    """Write a memory file, and let nobody change it any more."""
    os.ftruncate(fd, 0)
    if os.pwrite(fd, raw, 0) < len(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def _sealed(fd: int) -> bytes | None:
    """Return what a memory file holds; None: nothing, or it is not sealed."""
    size_bytes = os.fstat(fd).st_size
    if not size_bytes:
        return None
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
        return None
    return os.pread(fd, size_bytes, 0)
