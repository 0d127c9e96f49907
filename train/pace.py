"""How fast a run goes and what it saves: tokens a second, waiting for data, memory, padding, shared
prompts, and the teacher's time that replaying took the place of."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillroom.cache import jsonfile
from stillroom.cache.commits import Commit
from stillroom.train.callbacks import Callback, StepOutcome
from stillroom.train.ranks import from_every_rank, rank

if TYPE_CHECKING:
    from stillroom.train.report import TrainReport
    from stillroom.train.trainer import ReplayTrainer

STATUS = Path("/proc/self/status")


@dataclass(slots=True)
class PaceSums:
    """Sums over steps and ranks."""

    wall_s: float = 0.0
    """Of rank 0 alone."""
    wait_s: float = 0.0
    busy_s: float = 0.0
    """Waiting or not."""
    positions: int = 0
    replayed: int = 0
    """Positions from the run's own cache."""
    tokens: int = 0
    forward_tokens: int = 0
    padded_tokens: int = 0

    def summary(self) -> dict[str, float]:
        """Rates over all ranks, and shares from 0 to 1."""
        return {
            "tokens_per_s": self.tokens / max(self.wall_s, 1e-9),
            "positions_per_s": self.positions / max(self.wall_s, 1e-9),
            "waiting_share": self.wait_s / max(self.busy_s, 1e-9),
            "padding_saved": 1 - self.tokens / max(self.padded_tokens, 1),
            "shared_prompts_saved": 1 - self.forward_tokens / max(self.tokens, 1),
        }


class PaceCallback(Callback):
    """Adds up every step, and tells trackers about rank 0's share of it.

    Every rank adds up its own; with a checkpoint, rank 0 takes over the sums of all.
    """

    name = "pace"

    def __init__(self) -> None:
        """Start at nothing."""
        self._sums = PaceSums()

    def on_step(self, trainer: "ReplayTrainer", outcome: StepOutcome) -> None:
        """Add the step."""
        seconds = outcome.wait_s + outcome.compute_s
        positions = sum(one.micro.num_positions for one in outcome.micro)
        step = PaceSums(
            wall_s=seconds if rank() == 0 else 0.0,
            wait_s=outcome.wait_s,
            busy_s=seconds,
            positions=positions,
            replayed=positions if outcome.replayed else 0,
            tokens=outcome.tokens,
            forward_tokens=outcome.forward_tokens,
            padded_tokens=outcome.padded_tokens,
        )
        self._sums = _total([self._sums, step])
        if rank() == 0:
            trainer.log({f"pace/{name}": value for name, value in step.summary().items()})
            trainer.log({f"pace/{name}": value for name, value in peak_bytes().items()})

    def on_end(self, trainer: "ReplayTrainer", report: "TrainReport") -> None:
        """Put those of the whole run, its resumed parts included, into the report."""
        sums = _total(from_every_rank(self._sums))
        peaks = from_every_rank(peak_bytes())
        report.pace = sums.summary()
        for name in peaks[0]:
            report.pace[name] = max(peak[name] for peak in peaks)
        commits = [c for feed in trainer.stream.feeds for c in feed.source.snapshot.commits]
        report.pace["teacher_s_replayed"] = sums.replayed * teacher_s_per_position(commits)

    def state_dict(self) -> dict[str, Any]:
        """The sums of all ranks, which all of them must ask for; from then on rank 0's."""
        total = _total(from_every_rank(self._sums))
        self._sums = total if rank() == 0 else PaceSums()
        return asdict(total)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them, on rank 0.

        Raises:
            CorruptError: they are not such sums.
        """
        found = jsonfile.build(PaceSums, state, "pace in a checkpoint")
        self._sums = found if rank() == 0 else PaceSums()


def teacher_s_per_position(commits: Sequence[Commit]) -> float:
    """Seconds of the teacher that a position of these shards took to score, on average."""
    positions = sum(commit.positions for commit in commits)
    return sum(commit.teacher_s for commit in commits) / max(positions, 1)


def peak_bytes() -> dict[str, float]:
    """The most memory that this process has used: resident, where the system tells, and on its
    GPU."""
    found: dict[str, float] = {}
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        found["peak_rss_bytes"] = 1024.0 * int(peak)
    if torch.cuda.is_available():
        found["peak_cuda_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def _total(parts: Sequence[PaceSums]) -> PaceSums:
    names = [field.name for field in fields(PaceSums)]
    return PaceSums(*(sum(getattr(part, name) for part in parts) for name in names))
