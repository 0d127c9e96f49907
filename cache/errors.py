"""Every error that Stillroom raises on purpose.

A message always says four things: where, what was expected, what came, and what to do. Each class
is also a standard error, so callers can catch either. All of them pickle: they cross process
borders.

To add one: derive it from `StillroomError` and the closest standard error, and write one line on
when it is raised.
"""

from typing import Any


class StillroomError(Exception):
    """Base of all errors raised on purpose.

    Args:
        where: the file, object, setting or row that is wrong.
        expected: what should have been there.
        got: what was there.
        do: what the reader of the message can do about it.
    """

    def __init__(self, where: str, expected: str, got: str, do: str) -> None:
        """Keep the four parts, so that programs can read them too."""
        super().__init__(where, expected, got, do)
        self.where = where
        self.expected = expected
        self.got = got
        self.do = do

    def __str__(self) -> str:
        """Render the message on one line."""
        return f"{self.where}: expected {self.expected}; got {self.got}. {self.do}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the four parts (OSError would drop some of them)."""
        return type(self), (self.where, self.expected, self.got, self.do)


class ConfigError(StillroomError, ValueError):
    """A setting is unknown, missing, out of range, or contradicts another."""


class InputError(StillroomError, ValueError):
    """Prompts, rollouts or another input cannot be used as they are."""


class ShapeError(StillroomError, ValueError):
    """Arrays or tensors that belong together disagree in shape or dtype."""


class MismatchError(StillroomError, ValueError):
    """Two things that must be the same differ: teacher, tokenizer, vocabulary, temperature, top-k,
    format."""


class NumericsError(StillroomError, ArithmeticError):
    """A model gave NaN or infinite values where finite ones are needed."""


class CorruptError(StillroomError, RuntimeError):
    """Stored bytes are not what was written: a hash, a count or a structure is wrong."""


class MissingError(StillroomError, LookupError):
    """Something named is not there: a part, a policy, a checkpoint, a snapshot."""


class StorageError(StillroomError, OSError):
    """The storage refuses, cannot keep a promise that the cache needs, or cannot be reached."""


class ForkedError(StillroomError, RuntimeError):
    """A cache opened before a fork is used in the child, where its threads do not exist."""


def first_line(error: BaseException) -> str:
    """What another library's error says, on one line; its class where it says nothing."""
    lines = str(error).split("\n")
    return lines[0].strip() or type(error).__name__
