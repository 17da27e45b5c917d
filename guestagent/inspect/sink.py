"""Where bulk answers go, piece by piece."""

__all__ = ("Sink",)


class Sink:
    """Takes the answer of one request. Subclasses decide what to do with the answer.

    ``data``, ``entry`` and ``finish`` wait until there is room, and raise CallError when the
    request is over: cancelled, past its deadline, or its peer gone.
    """

    def data(self, data: "bytes | memoryview") -> None:
        """Take bytes, any number of them."""
        raise NotImplementedError

    def entry(self, *fields: object) -> None:
        """Take one entry of a list; its fields hold at most some 16 KiB together."""
        raise NotImplementedError

    def finish(self) -> int:
        """Send what is still held back; return how many chunks there were in all."""
        raise NotImplementedError

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Take note of how far it has come, 0 in all being unknown; never waits."""
        raise NotImplementedError
