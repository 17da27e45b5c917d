"""Where the log of this process goes, as the settings say."""

from guestagent.config import Config
from vsock.log import FORMATS, fd_sink, log

__all__ = ("open_sinks",)


def open_sinks(config: Config, *, is_machine: bool) -> None:
    """Send the log, from its first line on, to where ``log_to`` says.

    ``is_machine``: the settings of the whole machine are this agent's to change.
    """
    log.set_level(config.log)
    if "console" in config.log_to:
        log.add_sink(fd_sink(2, FORMATS[config.log_format]), replay=True, is_slow=True)
    if "kmsg" in config.log_to:
        from guestagent.observe.kernellog import KernelLogSink

        try:
            log.add_sink(KernelLogSink(may_set=is_machine), replay=True, is_slow=True)
        except OSError as error:
            log.warning("the log does not go to the kernel's", error=str(error))
