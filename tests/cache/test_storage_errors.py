"""Errors of a storage: one class each, on one line, with the reason and the advice that fits."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from obstore.exceptions import GenericError

from stillroom.cache.errors import CorruptError, MissingError, StorageError
from stillroom.cache.storage_errors import reading, reason, writing

Around = Callable[[str, bool], AbstractContextManager[None]]
ANSWER = """Generic S3 error: Error performing PUT http://host/b/k in 5ms - Server returned \
non-2xx status code: 403 Forbidden: <?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SignatureDoesNotMatch</Code><Message>Check your key.</Message>
<StringToSign>AWS4 and more</StringToSign></Error>

Debug source:
Generic {}"""


def test_an_answer_of_a_store_is_one_line_with_its_code_and_message() -> None:
    assert reason(GenericError(ANSWER)) == (
        "Generic S3 error: Error performing PUT http://host/b/k in 5ms - Server returned non-2xx "
        "status code: 403 Forbidden: SignatureDoesNotMatch: Check your key."
    )
    assert reason(GenericError("one <Code>Slow</Code>")) == "one <Code>Slow</Code>: Slow"
    assert reason(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
    assert reason(OSError()) == "OSError"


@pytest.mark.parametrize(
    ("is_local", "advice"), [(True, "free space"), (False, "credentials, region and endpoint")]
)
@pytest.mark.parametrize(("around", "verb"), [(reading, "read"), (writing, "write")])
def test_failures_name_the_object_and_what_to_look_at(
    around: Callable[[str, bool], AbstractContextManager[None]],
    verb: str,
    is_local: bool,
    advice: str,
) -> None:
    for error in (OSError(13, "Permission denied"), GenericError("Permission denied")):
        message = rf"a/b: expected to {verb} it; got .*Permission denied\. .*{advice}"
        with pytest.raises(StorageError, match=message), around("a/b", is_local):
            raise error


def test_what_is_not_there_is_missing_where_it_is_read_only() -> None:
    message = "a/b: expected an object; got nothing"
    with pytest.raises(MissingError, match=message), reading("a/b", True):
        raise FileNotFoundError
    with pytest.raises(StorageError), writing("a/b", True):
        raise FileNotFoundError


def test_our_own_errors_and_unknown_ones_pass() -> None:
    for error in (CorruptError("a", "b", "c", "d"), StorageError("a", "b", "c", "d"), KeyError()):
        for around in (reading, writing):
            with pytest.raises(type(error)) as same, around("a/b", True):
                raise error
            assert same.value is error
