"""Paths that belong to a layer, an overlay or a part: no two on, in or above each other."""

from bisect import bisect_left, insort

from vsock.errors import CallError

__all__ = ("Owner", "PathClaims", "parent_of")

#: What a reservation belongs to: ("layer" or "overlay", id).
Owner = tuple[str, str]


class PathClaims:
    """Path -> its owner and use; no path lies on, in or above another. Not thread-safe.

    The number of a device (MAJOR:MINOR) counts as a path at the top.
    """

    def __init__(self) -> None:
        self._owners: dict[str, tuple[str, Owner]] = {}
        self._sorted: list[str] = []

    def __repr__(self) -> str:
        return f"PathClaims({sorted(self._owners.items())})"

    def get(self, path: str) -> tuple[str, Owner] | None:
        """Return (use, owner) of a path that is claimed."""
        return self._owners.get(path)

    def conflicting_path(self, path: str) -> str | None:
        """Return a claimed path that this one lies on, in or above."""
        other = path
        while other:
            if other in self._owners:
                return other
            other = parent_of(other)
        return self.path_below(path)

    def path_below(self, path: str) -> str | None:
        """Return a claimed path that lies in this one."""
        at = bisect_left(self._sorted, path + "/")
        below = self._sorted[at : at + 1]
        return below[0] if below and below[0].startswith(path + "/") else None

    def add(self, path: str, use: str, owner: Owner) -> None:
        """Claim ``path`` as the ``use`` (target or scratch) of ``owner``.

        Raises:
            CallError: ``conflict``, naming the path and the owner that it conflicts with.
        """
        other = self.conflicting_path(path)
        if other is not None:
            other_use, (kind, name) = self._owners[other]
            how = "is" if path == other else "lies in or above"
            raise CallError(
                "conflict",
                f"{use} {path!r} {how} {other!r}, the {other_use} of {kind} {name!r}",
                step="claim",
                object=path,
            )
        self._owners[path] = use, owner
        insort(self._sorted, path)

    def refuse_hiding(self, path: str) -> None:
        """See that a mount at ``path``, which may lie in a target, hides no claimed path.

        Raises:
            CallError: ``conflict``, it is claimed, has a claimed path in it, or lies in what is the
                agent's own.
        """
        hidden, above = self.path_below(path), path
        while above and hidden is None:
            _, (kind, _) = self._owners.get(above) or ("", ("", ""))
            if kind and (above == path or kind == "agent"):
                hidden = above
            above = parent_of(above)
        if hidden is not None:
            text = f"a mount at {path!r} would hide {hidden!r}, which is in use"
            raise CallError("conflict", text, step="claim", object=path)

    def drop(self, path: str) -> None:
        """Release a path. Idempotent."""
        if self._owners.pop(path, None) is not None:
            del self._sorted[bisect_left(self._sorted, path)]


def parent_of(path: str) -> str:
    """Return the directory that holds a path; nothing for a path at the top."""
    return path.rpartition("/")[0]
