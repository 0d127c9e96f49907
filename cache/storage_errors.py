"""What the failures of a storage become: errors that name the object and the store's own reason."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import BaseError

from stillroom.cache.errors import MissingError, StillroomError, StorageError, first_line

REASON = re.compile(r"<Code>([^<]*)</Code>\s*(?:<Message>([^<]*)</Message>)?")
LOCAL_ADVICE = (
    "Check access and free space; the file system must know hard links: give buckets as s3:// or "
    "gs://, not mounted."
)
REMOTE_ADVICE = "Check access, and the credentials, region and endpoint in the environment."


@contextmanager
def reading(where: str, is_local: bool) -> Iterator[None]:
    """Around a read of an object of that full name.

    Raises:
        MissingError: it is not there.
        StorageError: it cannot be read.
    """
    try:
        yield
    except StillroomError:
        raise
    except FileNotFoundError as error:
        do = "Check the root, or restore the object."
        raise MissingError(where, "an object", "nothing", do) from error
    except (OSError, BaseError) as error:
        advice = LOCAL_ADVICE if is_local else REMOTE_ADVICE
        raise StorageError(where, "to read it", reason(error), advice) from error


@contextmanager
def writing(where: str, is_local: bool) -> Iterator[None]:
    """Around a change of an object of that full name.

    Raises:
        StorageError: it cannot be written or removed.
    """
    try:
        yield
    except StillroomError:
        raise
    except (OSError, BaseError) as error:
        advice = LOCAL_ADVICE if is_local else REMOTE_ADVICE
        raise StorageError(where, "to write it", reason(error), advice) from error


def reason(error: Exception) -> str:
    """What went wrong, on one line; of an object store's answer only its code and message."""
    line = first_line(error).partition("<?xml")[0].strip(" :")
    found = REASON.search(str(error))
    return f"{line}: {found[1]}: {found[2] or ''}".rstrip(" :") if found else line
