"""What is said of a scoring job beside the part at hand."""

from collections.abc import Mapping

from stillroom.cache.outlook import Outlook
from tests.cache.fakes import FakeTeacher


class Telling(FakeTeacher):
    """A teacher that tells of itself."""

    told: Mapping[str, float] = {}

    def stats(self) -> Mapping[str, float]:
        """See `teacher.stats_of`."""
        return self.told


def test_the_last_part_has_nothing_behind_it() -> None:
    outlook = Outlook(FakeTeacher())
    outlook.expect(["a"])
    outlook.begin(1000)
    assert outlook.text(500, 10.0) == ""


def test_parts_that_were_not_read_are_as_large_as_those_that_were() -> None:
    outlook = Outlook(FakeTeacher())
    outlook.expect(["a", "b", "c", "d"])
    outlook.begin(1000)
    assert outlook.text(500, 10.0) == "; all 4 parts at most 350 s"
    outlook.drop("a")
    outlook.begin(2000)
    assert outlook.text(2000, 10.0) == "; all 3 parts at most 500 s"
    outlook.drop("c")
    outlook.expect(["b", "d"])
    assert outlook.text(2000, 0.1) == "; all 2 parts at most 9.7 h"


def test_what_the_teacher_tells_is_said() -> None:
    teacher = Telling()
    outlook = Outlook(teacher)
    outlook.expect(["a"])
    outlook.begin(10)
    teacher.told = {"tokens_in_flight": 65_536.0, "retries": 0.0, "model_s": 3.0}
    assert outlook.text(10, 1.0) == "; 65,536 tokens in flight"
    teacher.told = {"tokens_in_flight": 512.0, "retries": 3.0, "servers": 2.0}
    assert outlook.text(10, 1.0) == "; 512 tokens in flight; 2 servers; 3 retries"
