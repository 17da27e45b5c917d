"""The digest that the host gave the machine when it was launched, as the TEE itself tells it.

SEV-SNP: HOST_DATA in the report that configfs-tsm gets from the firmware, by messages that the host
cannot read or write. TDX: MRCONFIGID as the module's own measurement in sysfs, never the quote,
which a service of the host delivers.

Source: Documentation/ABI/testing/configfs-tsm-report, sysfs-devices-virtual-misc-tdx_guest (Linux
6.16); SEV Secure Nested Paging Firmware ABI, table ATTESTATION_REPORT.
"""

import os

from vsock.errors import CallError

__all__ = ("launch_digest",)

_REPORTS = "/sys/kernel/config/tsm/report"
_MRCONFIGID = "/sys/devices/virtual/misc/tdx_guest/measurements/mrconfigid"
_HOST_DATA_AT, _HOST_DATA_BYTES = 0xC0, 32
_MRCONFIGID_BYTES = 48
_REPORT_BYTES = 1184
_MAX_BYTES = 64 * 1024
_INBLOB_BYTES = 64


def launch_digest(*, reports: str = _REPORTS, mrconfigid: str = _MRCONFIGID) -> bytes:
    """Return HOST_DATA (32 bytes) or MRCONFIGID (48 bytes).

    Raises:
        CallError: ``denied``, the machine tells none: it is no TEE, the report was made anew while
            it was read, or the value is all zeros.
    """
    try:
        digest = _read_mrconfigid(mrconfigid) if os.path.exists(mrconfigid) else _snp(reports)
    except OSError as error:
        raise _refused(f"no report can be read: {error.strerror or error}") from error
    if not any(digest):
        raise _refused("the machine was launched with zeros")
    return digest


def _read_mrconfigid(path: str) -> bytes:
    digest = _read(path)
    if len(digest) != _MRCONFIGID_BYTES:
        raise _refused(f"MRCONFIGID has {len(digest)} bytes")
    return digest


def _snp(reports: str) -> bytes:
    entry = f"{reports}/guestagent-{os.getpid()}"
    os.mkdir(entry)
    try:
        with open(f"{entry}/inblob", "wb", buffering=0) as stream:
            stream.write(bytes(_INBLOB_BYTES))
        before = _read(f"{entry}/generation")
        provider = _read(f"{entry}/provider").strip()
        report = _read(f"{entry}/outblob")
        if _read(f"{entry}/generation") != before:
            raise _refused("the report was made anew while it was read")
    finally:
        os.rmdir(entry)
    if provider != b"sev_guest":
        raise _refused(f"the report is by {provider.decode('ascii', 'replace')[:32]}")
    if len(report) < _REPORT_BYTES:
        raise _refused(f"the report has {len(report)} bytes")
    return report[_HOST_DATA_AT : _HOST_DATA_AT + _HOST_DATA_BYTES]


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        return stream.read(_MAX_BYTES) or b""


def _refused(problem: str) -> CallError:
    text = f"the TEE does not vouch for a policy: {problem}"
    return CallError("denied", text, step="policy", object="tsm")
