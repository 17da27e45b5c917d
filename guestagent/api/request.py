"""A method is its request: the record of its parameters, which also says how it is called.

    class LayerGet(Request[LayerReport], method="layer.get"):
        '''Describe one layer.'''

        layer_id: str

``LayerGet.method``, ``.reply`` and ``.quick`` say what the class statement said, ``.summary`` what
the first line of its docstring said. The type checker knows from it that a call with a ``LayerGet``
returns a ``LayerReport``.
"""

from types import GenericAlias

from vsock.errors import CallError
from vsock.record import Record

__all__ = ("Empty", "Item_co", "R_co", "Request", "Streamed", "handles")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ClassVar, Generic, TypeVar

    R_co = TypeVar("R_co", bound=Record, covariant=True)
    Item_co = TypeVar("Item_co", covariant=True)
    Q = TypeVar("Q", bound="Request[Record]")
    S = TypeVar("S")
    C = TypeVar("C")
    R = TypeVar("R", bound=Record)

    class Answered(Generic[R_co]):
        """The type of the reply, for the type checker."""

    class Streamed(Generic[Item_co]):
        """The type of the items of a reply that comes in chunks, for the type checker."""
else:
    R_co = Item_co = object

    class Answered:
        """Gives subclasses the form ``Request[Reply]`` without the import of typing."""

        __class_getitem__ = classmethod(GenericAlias)

    class Streamed:
        """Nothing at run time."""

        __class_getitem__ = classmethod(GenericAlias)


class Empty(Record):
    """A reply that says nothing beyond that the request is done."""


class Request(Record, Answered[R_co]):
    """Base of the parameters of every method.

    A subclass that names no ``method`` is a base of others. ``quick`` methods never wait and are
    answered at once.
    """

    if TYPE_CHECKING:
        method: ClassVar[str]
        reply: ClassVar[type[Record]]
        quick: ClassVar[bool]
        summary: ClassVar[str]

    def __init_subclass__(cls, *, method: str = "", quick: bool = False) -> None:
        super().__init_subclass__()
        if not method:
            return
        cls.method = method
        cls.summary = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
        cls.quick = quick
        # the arguments in brackets after the base: the reply first
        cls.reply = vars(cls)["__orig_bases__"][0].__args__[0]

    def read_reply(self, value: object) -> "R_co":
        """Check and convert the reply to this request, as it came over the wire.

        Fields that are unknown here are ignored: a newer agent may send them.

        Raises:
            CallError: ``internal``; the reply is not of the contract.
        """
        try:
            reply = type(self).reply.from_wire(value, "reply", strict=False)
        except CallError as error:
            text = f"the agent's answer to {self.method} is malformed: {error.message}"
            raise CallError("internal", text, step="read reply", object=error.object) from None
        return reply  # type: ignore[return-value]  # R_co is the type of this class's reply


def handles(
    request: "type[Q]",
) -> "Callable[[Callable[[S, Q, C], R]], Callable[[S, Q, C], R]]":
    """Declare that a method, which takes a call or a transaction too, answers a kind of request."""

    def declare(function: "Callable[[S, Q, C], R]") -> "Callable[[S, Q, C], R]":
        function.handles = request  # type: ignore[attr-defined]
        return function

    return declare
