"""A storage of which one call fails: refused, or it took effect and then failed. A rival may work
at that very moment."""

from collections.abc import Callable
from typing import Any

from stillroom.cache.errors import StorageError
from stillroom.cache.storage import Storage

CALLS = (
    "entry",
    "get",
    "get_many",
    "get_ranges",
    "put_new",
    "put",
    "delete",
    "now",
    "list",
    "list_all",
    "temporaries",
    "delete_temporary",
)
FORMS = ("refused", "took effect")


class FaultyStorage(Storage):
    """A storage whose call number `point`, from 1, fails once."""

    def __init__(self, root: str, point: int, form: str, rival: Callable[[], object]) -> None:
        super().__init__(root)
        self.left, self.form, self.rival = point, form, rival
        self.failed = ""
        self.inside = False
        for name in CALLS:
            setattr(self, name, self._counted(name, getattr(self, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # a part of another call
                return call(*args, **kwargs)
            self.left -= 1
            if self.left:
                return self._within(call, *args, **kwargs)
            self.failed = f"{name}{args[:1]}"
            self.rival()
            if self.form == "took effect":
                self._within(call, *args, **kwargs)
            raise StorageError(self.failed, "an answer", "none", "Try again.")

        return counting

    def _within(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.inside = True
        try:
            return call(*args, **kwargs)
        finally:
            self.inside = False
