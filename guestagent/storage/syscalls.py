"""The system calls that Python's ``os`` lacks: one signature table, one error function.

Every function raises ``OSError`` with the errno, a text that begins with the call's name, and the
object it was tried on as ``filename``. Calls interrupted by a signal are repeated. Constants have
the kernel headers' names. A machine whose call numbers are unknown, or a libc without a symbol, is
an error at import: a storage agent without its system calls is of no use.

What this does not do: no policy, no defaults, no paths made up. Descriptors taken as arguments are
borrowed; returned ones belong to the caller and are close-on-exec.
"""

import ctypes
import errno as errno_module
import fcntl
import os
import stat
import struct
from collections.abc import Callable

from vsock.errors import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsock.deadline import Deadline

# include/uapi/linux/mount.h: mount(2) flags
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8
# include/uapi/linux/mount.h: the mount API of Linux 5.2 and later
FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_NODIRATIME = 0x80
# include/uapi/linux/fcntl.h and openat2.h
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
STATX_TYPE = 0x1
STATX_MNT_ID = 0x1000
AT_STATX_DONT_SYNC = 0x4000
AT_RECURSIVE = 0x8000
RESOLVE_NO_XDEV = 0x1
RESOLVE_NO_MAGICLINKS = 0x2
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10
# include/uapi/linux/sched.h
CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
# include/uapi/linux/reboot.h
LINUX_REBOOT_CMD_RESTART = 0x01234567
LINUX_REBOOT_CMD_POWER_OFF = 0x4321FEDC
LINUX_REBOOT_CMD_HALT = 0xCDEF0123
LINUX_REBOOT_CMD_CAD_OFF = 0x0
# include/uapi/linux/keyctl.h
KEY_SPEC_THREAD_KEYRING = -1
KEY_SPEC_PROCESS_KEYRING = -2
KEYCTL_REVOKE = 3
KEYCTL_UNLINK = 9
KEYCTL_SEARCH = 10
# include/uapi/linux/random.h
GRND_NONBLOCK = 0x1
# include/uapi/linux/module.h
MODULE_INIT_COMPRESSED_FILE = 4

#: The name of the threads of ``run_apart``.
APART = "apart"
#: mount(2) copies one page of options, and cuts what is longer without an error.
MOUNT_DATA_MAX_BYTES = 4095

#: struct statx has 256 bytes: stx_mode at 28; at 128 stx_rdev_major and _minor, stx_dev_major and
#: _minor, stx_mnt_id.
_STATX_BYTES, _STATX_NUMBERS = 256, struct.Struct("=28xH98xIIIIQ")
#: struct ustat has 32 bytes or less.
_USTAT_BYTES = 64
#: What fcntl.ioctl copies, to run without the interpreter lock.
_FCNTL_MAX_BYTES = 1024

_NUMBERS_BY_MACHINE = {
    "x86_64": {
        "ustat": 136,
        "pivot_root": 155,
        "add_key": 248,
        "keyctl": 250,
        "finit_module": 313,
        "statx": 332,
    },
    "aarch64": {
        "pivot_root": 41,
        "add_key": 217,
        "keyctl": 219,
        "finit_module": 273,
        "statx": 291,
    },
}
#: Calls made since Linux 5.0 have the same number everywhere.
_NUMBERS_COMMON = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "openat2": 437,
    "mount_setattr": 442,
}


def _numbers() -> dict[str, int]:
    machine = os.uname().machine
    if machine not in _NUMBERS_BY_MACHINE:
        known = ", ".join(_NUMBERS_BY_MACHINE)
        raise ImportError(f"system call numbers of {machine!r} are not known (known: {known})")
    return _NUMBERS_BY_MACHINE[machine] | _NUMBERS_COMMON


_NR = _numbers()
_c_int, _c_ulong, _c_str = ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p
#: name -> argument types; every one returns int but for syscall, which returns long.
_SIGNATURES: dict[str, tuple[type, ...] | None] = {
    "mount": (_c_str, _c_str, _c_str, _c_ulong, _c_str),
    "umount2": (_c_str, _c_int),
    "unshare": (_c_int,),
    "syncfs": (_c_int,),
    "setns": (_c_int, _c_int),
    "sethostname": (_c_str, ctypes.c_size_t),
    "reboot": (_c_int,),
    "ioctl": (_c_int, _c_ulong, ctypes.c_void_p),
    "getrandom": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "syscall": None,  # variadic: see _syscall_taking
}


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    for name, argument_types in _SIGNATURES.items():
        function = getattr(libc, name)
        function.restype = _c_int
        if argument_types is not None:
            function.argtypes = argument_types
    libc.syscall.restype = ctypes.c_long
    return libc


_libc = _load_libc()


# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MALLOC_OPTIONS = {
    _M_ARENA_MAX: 1,
    # what packs a message begins with 256 KiB, dozens of times for a request: mapping that anew
    # each time would cost more than all the rest
    _M_MMAP_THRESHOLD: 512 * 1024,
    _M_TRIM_THRESHOLD: 1024 * 1024,
}


def bound_malloc() -> bool:
    """Have malloc give back what is free; False where the libc knows nothing of this.

    glibc gives threads heaps of their own, none of which ever shrinks below what it once held.
    Threads that share one interpreter lock gain nothing by that: one heap is kept to. And glibc
    takes the first large block that is freed for a sign that all like it belong into the heap,
    where small things that stay settle between them: large blocks are kept out of it for good.
    Call it before there are threads.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is None:
        return False
    taken = [mallopt(option, value) for option, value in _MALLOC_OPTIONS.items()]
    return all(taken)


def _oserror(call: str, number: int, filename: object) -> OSError:
    """Make the one kind of error that this module raises. OSError picks its own subclass."""
    return OSError(number, f"{call}: {os.strerror(number)}", filename)


def _checked(
    call: str, filename: object, function: "Callable[..., int]", *arguments: object
) -> int:
    while True:
        result = function(*arguments)
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno_module.EINTR:
            raise _oserror(call, number, filename)


def _call_number(call: str, filename: object, *arguments: "int | bytes | None") -> int:
    """Make a call by number. Integers pass as long, bytes as a pointer, None as a null pointer."""
    kinds = tuple(map(type, arguments))
    function = _typed.get(kinds) or _typed.setdefault(kinds, _syscall_taking(kinds))
    return _checked(call, filename, function, _NR[call], *arguments)


#: syscall(2) as a function of arguments of these types: converted in C, not one by one here.
_typed: "dict[tuple[type, ...], Callable[..., int]]" = {}


def _syscall_taking(kinds: tuple[type, ...]) -> "Callable[..., int]":
    passed = {int: ctypes.c_long, bytes: _c_str, type(None): ctypes.c_void_p}
    types = [passed[kind] for kind in kinds]
    prototype = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, *types, use_errno=True)
    return prototype(("syscall", _libc))


def _text(value: str | bytes) -> bytes:
    """Encode as a path; a NUL inside would silently cut the text short in C."""
    encoded = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in encoded:
        raise ValueError(f"embedded null byte in {value!r}")
    return encoded


def _optional_text(value: str | bytes | None) -> bytes | None:
    return None if value is None else _text(value)


def mount(
    source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | bytes = b""
) -> None:
    """mount(2).

    Raises:
        OSError: E2BIG where ``data`` is over 4095 bytes: the kernel would cut it and go on.
    """
    options = _text(data)
    if len(options) > MOUNT_DATA_MAX_BYTES:
        text = f"mount: options of {len(options)} bytes, the kernel reads {MOUNT_DATA_MAX_BYTES}"
        raise OSError(errno_module.E2BIG, text, target)
    arguments = (_optional_text(source), _text(target), _optional_text(fstype), flags, options)
    _checked("mount", target, _libc.mount, *arguments)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked("umount2", target, _libc.umount2, _text(target), flags)


def fsopen(filesystem: str) -> int:
    """Open a context to configure a new superblock; ENODEV where the kernel lacks the type."""
    return _call_number("fsopen", filesystem, _text(filesystem), FSOPEN_CLOEXEC)


def fsconfig_flag(context_fd: int, key: str) -> None:
    """Set an option that has no value."""
    _call_number("fsconfig", key, context_fd, FSCONFIG_SET_FLAG, _text(key), None, 0)


def fsconfig_string(context_fd: int, key: str, value: str) -> None:
    """Set an option to a text of at most 255 bytes (the kernel answers EINVAL beyond)."""
    name = f"{key}={value}"
    _call_number("fsconfig", name, context_fd, FSCONFIG_SET_STRING, _text(key), _text(value), 0)


def fsconfig_fd(context_fd: int, key: str, value_fd: int) -> None:
    """Set an option to an open file; the descriptor is borrowed."""
    _call_number("fsconfig", key, context_fd, FSCONFIG_SET_FD, _text(key), None, value_fd)


def fsconfig_create(context_fd: int, filename: str) -> None:
    """Create the superblock. ``filename`` names the object in the error."""
    _call_number("fsconfig", filename, context_fd, FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(context_fd: int, attributes: int, filename: str) -> int:
    """Make a detached mount of the created superblock; it goes when the descriptor is closed."""
    return _call_number("fsmount", filename, context_fd, FSMOUNT_CLOEXEC, attributes)


def move_mount(
    from_fd: int, to_dirfd: int, to_path: str = "", *, from_path: str = "", filename: str = ""
) -> None:
    """Attach a mount. An empty path means the very object that the descriptor stands for."""
    flags = (0 if from_path else MOVE_MOUNT_F_EMPTY_PATH) | (
        0 if to_path else MOVE_MOUNT_T_EMPTY_PATH
    )
    name = filename or to_path
    _call_number("move_mount", name, from_fd, _text(from_path), to_dirfd, _text(to_path), flags)


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """Open a mount, or with OPEN_TREE_CLONE a detached copy of it."""
    return _call_number("open_tree", path, dirfd, _text(path), flags | OPEN_TREE_CLOEXEC)


def openat2(dirfd: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """Open below ``dirfd`` under the ``RESOLVE_`` rules. struct open_how is three u64."""
    how = struct.pack("=3Q", flags | os.O_CLOEXEC, mode, resolve)
    return _call_number("openat2", path, dirfd, _text(path), how, len(how))


def mount_of(path: str, *, fd: int = AT_FDCWD) -> tuple[str, int]:
    """Return what a path, or an empty one with ``fd``, is on: the number of the file system
    (MAJOR:MINOR) and the id of the mount. Links are followed. struct statx, since Linux 5.8.

    Raises:
        OSError: ENOENT and the like.
    """
    _, _, _, major, minor, mount_id = _statx_numbers(path, fd)
    return f"{major}:{minor}", mount_id


def block_and_mount_of(path: str) -> tuple[str | None, str, int]:
    """Return the number of the block device that a path names, if it names one, and what
    ``mount_of`` does.

    A file system whose server does not answer is not asked: stat(2) would wait for it.

    Raises:
        OSError: as ``mount_of``.
    """
    mode, *block, major, minor, mount_id = _statx_numbers(path, AT_FDCWD)
    block_dev = f"{block[0]}:{block[1]}" if stat.S_ISBLK(mode) else None
    return block_dev, f"{major}:{minor}", mount_id


def _statx_numbers(path: str, fd: int) -> tuple[int, ...]:
    """Return mode, rdev major and minor, dev major and minor, mount id."""
    result = ctypes.create_string_buffer(_STATX_BYTES)
    # the file system's server, if it has one, need not be asked for these numbers
    flags = AT_STATX_DONT_SYNC | (0 if path else AT_EMPTY_PATH)
    mask = STATX_TYPE | STATX_MNT_ID
    _call_number("statx", path, fd, _text(path), flags, mask, ctypes.addressof(result))
    return _STATX_NUMBERS.unpack_from(result)


def has_superblock(dev: str) -> bool | None:
    """Return whether the kernel still has a file system of the number ``dev`` (MAJOR:MINOR),
    mounted or only held open; None on machines without ustat(2)."""
    if "ustat" not in _NR:
        return None
    major, minor = map(int, dev.split(":"))
    number = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)  # new_encode_dev of Linux
    result = ctypes.create_string_buffer(_USTAT_BYTES)
    try:
        _call_number("ustat", dev, number, ctypes.addressof(result))
    except OSError as error:
        if error.errno != errno_module.EINVAL:
            raise
        return False
    return True


def syncfs(fd: int) -> None:
    """syncfs(2): write out the file system that an open file is on."""
    _checked("syncfs", f"fd {fd}", _libc.syncfs, fd)


def mount_setattr(
    dirfd: int, path: str, flags: int, *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0
) -> None:
    """Change attributes of an existing mount, and its propagation (MS_SHARED, MS_SLAVE or
    MS_PRIVATE). struct mount_attr is four u64."""
    values = (attr_set, attr_clr, propagation, 0)
    attributes = b"".join(value.to_bytes(8, "little") for value in values)
    _call_number("mount_setattr", path, dirfd, _text(path), flags, attributes, len(attributes))


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _call_number("pivot_root", new_root, _text(new_root), _text(put_old))


def finit_module(fd: int, parameters: str = "", flags: int = 0, *, filename: str = "") -> None:
    """Load a kernel module from an open file; EEXIST where it is loaded already."""
    _call_number("finit_module", filename or f"fd {fd}", fd, _text(parameters), flags)


def add_key(key_type: str, description: str, payload: bytes | bytearray, keyring: int) -> int:
    """Add a key and return its serial number. The payload may hold any bytes; the kernel reads a
    bytearray where it lies, so that no copy of a secret is made here."""
    size = len(payload)
    if isinstance(payload, bytes):
        arguments = (_text(key_type), _text(description), payload, size, keyring)
        return _call_number("add_key", description, *arguments)
    place = (ctypes.c_char * size).from_buffer(payload)
    address = ctypes.addressof(place)
    return _call_number(
        "add_key", description, _text(key_type), _text(description), address, size, keyring
    )


def getrandom(buffer: bytearray) -> None:
    """Fill a buffer of at most 256 bytes by getrandom(2), which is never interrupted then.

    Raises:
        OSError: EAGAIN, the kernel's random numbers are not seeded yet.
    """
    place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    address = ctypes.addressof(place)
    _checked("getrandom", None, _libc.getrandom, address, len(buffer), GRND_NONBLOCK)


def keyctl(operation: int, *arguments: "int | bytes | None", filename: object = None) -> int:
    """keyctl(2); what the arguments mean depends on the operation."""
    return _call_number("keyctl", filename, operation, *arguments)


def unshare(flags: int) -> None:
    """unshare(2): acts on the calling thread alone."""
    _checked("unshare", hex(flags), _libc.unshare, flags)


def setns(fd: int, kind: int = 0) -> None:
    """setns(2): acts on the calling thread alone."""
    _checked("setns", f"fd {fd}", _libc.setns, fd, kind)


def run_apart(action: "Callable[[], None]", deadline: "Deadline | None" = None) -> None:
    """Run ``action`` on a thread of its own, for calls that act on the calling thread alone: it may
    change its working directory and its mount namespace, and no other thread gets to see that.

    Past ``deadline`` the thread is left to itself: it must own the descriptors that it uses.

    Raises:
        OSError, ValueError, CallError: what ``action`` raised, or unshare(2).
        CallError: ``timeout`` or ``cancelled``.
    """
    import threading  # PID 1 has no threads

    from vsock.threads import start_thread

    failures: list[OSError | ValueError | CallError] = []
    done_fd = os.eventfd(0, os.EFD_CLOEXEC)
    write_fd = os.dup(done_fd)

    def run() -> None:
        try:
            unshare(CLONE_FS)
            action()
        except (OSError, ValueError, CallError) as error:  # carried over to the caller's thread
            failures.append(error)
        finally:
            os.eventfd_write(write_fd, 1)
            os.close(write_fd)

    try:
        thread = threading.Thread(target=run, name=APART, daemon=True)
        start_thread(thread)
        if deadline is not None:
            deadline.wait([done_fd], "wait for a mount namespace")
        thread.join()
    finally:
        os.close(done_fd)
    if failures:
        raise failures[0]


def sethostname(name: str) -> None:
    """sethostname(2)."""
    encoded = _text(name)
    _checked("sethostname", name, _libc.sethostname, encoded, len(encoded))


def reboot(command: int) -> None:
    """reboot(2). Does not return where the command ends the machine."""
    # the commands use bit 31, which int has as its sign
    _checked("reboot", hex(command), _libc.reboot, ctypes.c_int(command & 0xFFFFFFFF).value)


def ioctl(fd: int, request: int, argument: bytearray | int, filename: object, call: str) -> int:
    """ioctl(2) on a buffer that the kernel may write to, or on an integer.

    ``fcntl.ioctl`` is the cheap way, but keeps the interpreter lock with buffers over 1024 bytes,
    and a device-mapper call may sleep for 40 ms: other threads must be able to run meanwhile.
    """
    if isinstance(argument, int):
        return _checked(call, filename, _libc.ioctl, fd, request, argument)
    if len(argument) > _FCNTL_MAX_BYTES:
        buffer = (ctypes.c_char * len(argument)).from_buffer(argument)
        return _checked(call, filename, _libc.ioctl, fd, request, ctypes.addressof(buffer))
    while True:
        try:
            result: int = fcntl.ioctl(fd, request, argument)
            return result
        except InterruptedError:
            continue
        except OSError as error:
            raise _oserror(call, error.errno or 0, filename) from None
