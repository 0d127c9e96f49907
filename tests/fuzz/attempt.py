"""Reading of bytes that may be anything: refusing them is right."""

from collections.abc import Callable

from stillroom.cache.errors import StillroomError


def attempt(read: Callable[[], object]) -> None:
    """Read something; a `StillroomError` is as good as a value.

    Raises:
        MemoryError: memory ran out, also if the reader made an error of its own of that.
    """
    try:
        read()
    except StillroomError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
