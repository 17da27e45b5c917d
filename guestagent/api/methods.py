"""The methods of the contract by name. Those of parts that most guests never use are late: their
records are imported by the first look for one of them."""

from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType

from guestagent.api.request import Request
from vsock.record import Record

__all__ = ("Methods",)

#: Word before the dot of late methods.
_LATE = ("dev", "net", "policy", "pool", "share", "volume")


class Methods(Mapping[str, type[Request[Record]]]):
    """Method -> the class of its request. No late method is quick, so that the agent knows the
    quick ones by ``early``. Usable from many threads."""

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        """``modules`` define the methods that are not late."""
        #: The methods that are not late.
        self.early = _defined_in(*modules)
        self._late: dict[str, dict[str, type[Request[Record]]]] = {}

    def __getitem__(self, method: str) -> type[Request[Record]]:
        found = self.early.get(method)
        return self._load(method.partition(".")[0])[method] if found is None else found

    def __iter__(self) -> Iterator[str]:
        yield from self.early
        for part in _LATE:
            yield from self._load(part)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _load(self, part: str) -> dict[str, type[Request[Record]]]:
        """Return the methods of a late part; none of a name that is no late part's."""
        if part in _LATE and part not in self._late:
            self._late[part] = {
                method: kind
                for method, kind in _defined_in(_module_of(part)).items()
                if method.startswith(f"{part}.")
            }
        return self._late.get(part, {})


def _module_of(part: str) -> ModuleType:
    """Import what defines the methods of a late part."""
    if part == "dev":
        from guestagent.api import devtree

        return devtree
    if part == "net":
        from guestagent.api import net

        return net
    if part == "policy":
        from guestagent.api import policy

        return policy
    if part == "share":
        from guestagent.api import share

        return share
    from guestagent.api import thin

    return thin


def _defined_in(*modules: ModuleType) -> dict[str, type[Request[Record]]]:
    """Return the methods that modules define, by name, in the order of their definition."""
    return {
        kind.method: kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Request)
        and kind.__module__ == module.__name__
        and "method" in vars(kind)
    }
