"""What decides about each method and each console command: the whole of both, row by row.

A test holds that every method of the contract and every command of the console has its row. What
has none is denied.
"""

from collections.abc import Mapping

__all__ = ("ALWAYS_RULES", "CONSOLE_COMMANDS", "LISTED_RULES", "METHOD_RULES")

_ROWS = {
    # answered under every policy; `policy.set` and `policy.narrow` decide for themselves
    "always": "agent.hello agent.status agent.cancel agent.more fs.available fs.version policy.set "
    "policy.narrow policy.get",
    # the mode, and `force`
    "shutdown": "agent.shutdown",
    # answered under every policy, with what `expose` leaves of it
    "observed": "agent.subscribe agent.events agent.log agent.metrics agent.crashes",
    # layers and chains, as they are resolved before a device is made
    "mount": "layer.mount layers.mount overlay.mount",
    # what was mounted by leave of the policy, and `force`
    "unmount": "layer.unmount layers.unmount overlay.unmount",
    # nothing but that the policy lists them
    "listed": "agent.features layer.list layer.get layer.verify overlay.list overlay.trim "
    "dev.list net.list pool.list pool.status share.list volume.list volume.get",
    # how far `expose.dm` goes
    "dm": "dm.list dm.table dm.status",
    # never a scratch or what lies decrypted upon one
    "devices": "fs.list_devices fs.list_partitions fs.list_filesystems fs.mountpoints fs.vfs_type "
    "fs.vfs_uuid fs.vfs_label fs.blockdev_getsize64 fs.blockdev_getro fs.checksum_device",
    # whether `expose.inspect` names the layer or admits overlays
    "place": "fs.checksums fs.statvfs fs.lstat fs.readlink fs.getxattrs fs.acl_get_file fs.exists "
    "fs.pread fs.head fs.read_file fs.download fs.ls fs.readdir fs.find fs.du fs.checksum "
    "fs.tar_out",
    # a request that the policy has word for word
    "exact": "device.remove dev.create dev.closure dev.add dev.remove dev.attach dev.destroy "
    "net.configure pool.open pool.close pool.grow share.mount share.unmount "
    "volume.create volume.snapshot volume.delete volume.mount volume.unmount volume.grow "
    "volume.trim",
}
#: Method -> what decides about it.
METHOD_RULES: Mapping[str, str] = {
    method: rule for rule, methods in _ROWS.items() for method in methods.split()
}
#: What a policy must list in ``expose.methods`` to allow it, besides what its rule asks.
LISTED_RULES = frozenset(("mount", "unmount", "listed", "dm", "devices", "place"))
#: What is answered even where what is mounted is not what the policy allows.
ALWAYS_RULES = frozenset(("always", "shutdown", "observed"))

_COMMANDS = (
    "cat checksum cmdline devices df dmesg env events fds find help hexdump holders layers log ls "
    "metrics modules mounts overlays plan poweroff ps reboot reconcile sh sleep stat status tables "
    "term timings top uptime"
)
#: Commands of the console. Each is denied unless the policy names it; a shell needs a second word.
CONSOLE_COMMANDS = frozenset(_COMMANDS.split())
