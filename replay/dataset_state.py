"""Where an iteration of a dataset stands, as a small plain dict."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError, MismatchError

FORMAT = 1
WHERE = "dataset state"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetState:
    """Before a step, of all steps or of those that one of several workers takes."""

    format: int = FORMAT
    step: int = 0
    """Number of the next step, from the beginning of the run."""
    stream: dict[str, Any] | None = None
    """State of the stream; None is its beginning."""
    ahead: int = 0
    """Steps from that state to the next one."""
    worker: int = 0
    workers: int = 1
    """Worker 0 of 1 takes all steps."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.step, self.ahead, self.worker, self.workers - 1 - self.worker) < 0:
            raise ValueError(f"{self!r:.200}")

    @staticmethod
    def parse(state: Mapping[str, Any]) -> "DatasetState":
        """The state that `plain` gave.

        Raises:
            CorruptError: it is none.
            MismatchError: it is of another format.
        """
        do = "Resume from another checkpoint."
        if not isinstance(state, Mapping):
            raise CorruptError(WHERE, "a mapping", f"{state!r:.40}", do)
        if state.get("format") != FORMAT:
            got = f"{state.get('format')!r:.40}"
            raise MismatchError(WHERE, f"format {FORMAT}", got, do)
        try:
            parsed: DatasetState = jsonfile.build(DatasetState, dict(state), WHERE)
        except CorruptError as error:
            raise CorruptError(WHERE, error.expected, error.got, do) from error
        return parsed

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    def later(self, steps: int) -> "DatasetState":
        """So many steps on.

        Raises:
            ConfigError: less than 0, or this is one of several workers.
        """
        if steps < 0 or self.workers > 1:
            got = f"{steps} steps, from a state of {self.workers} workers"
            do = "Skip from the beginning, or from a state that was taken without workers."
            raise ConfigError("skip", "0 steps or more of all workers", got, do)
        return replace(self, step=self.step + steps, ahead=self.ahead + steps)

    def of_worker(self, worker: int, workers: int) -> "DatasetState":
        """Where one of several workers begins that start here.

        Raises:
            MismatchError: this is another one's.
        """
        if self.workers == 1:
            return replace(self.later(worker), worker=worker, workers=workers)
        if (self.worker, self.workers) != (worker, workers):
            expected = f"that of worker {worker} of {workers}"
            got = f"that of worker {self.worker} of {self.workers}"
            do = f"Resume with {self.workers} workers, or skip() the steps that were taken."
            raise MismatchError(WHERE, expected, got, do)
        return self
