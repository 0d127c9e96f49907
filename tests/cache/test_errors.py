"""Errors: they cross process borders, and a message holds all that it should."""

import inspect
import pickle

import pytest

from stillroom.cache import errors
from stillroom.cache.errors import StillroomError

STANDARD = {
    "ConfigError": ValueError,
    "InputError": ValueError,
    "ShapeError": ValueError,
    "MismatchError": ValueError,
    "NumericsError": ArithmeticError,
    "CorruptError": RuntimeError,
    "MissingError": LookupError,
    "StorageError": OSError,
    "ForkedError": RuntimeError,
}
CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, StillroomError)
]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_pickles_whole(cls: type[StillroomError]) -> None:
    error = cls("here", "this", "that", "Do it.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (copy.where, copy.expected, copy.got, copy.do) == ("here", "this", "that", "Do it.")
    assert str(copy) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_message_holds_the_four_parts(cls: type[StillroomError]) -> None:
    error = cls("here", "this", "that", "Do it.")
    assert str(error) == "here: expected this; got that. Do it."


def test_each_error_is_its_standard_error_too() -> None:
    derived = {cls.__name__: cls for cls in CLASSES if cls is not StillroomError}
    assert derived.keys() == STANDARD.keys()
    assert all(issubclass(derived[name], standard) for name, standard in STANDARD.items())
