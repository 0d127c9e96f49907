"""Workers: which of how many processes that do the same job this one is, told by settings or by
what started it."""

from collections.abc import Mapping
from dataclasses import dataclass

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError

WORLD_SIZE = "STILLROOM_WORLD_SIZE"
"""Environment variable with the number of workers, for launchers that tell a process its rank
alone."""
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("JOB_COMPLETION_INDEX", None),
)
"""Variables in which torchrun, Slurm and Kubernetes tell a process its rank and the number of
processes. The first that is set counts: torchrun may run within Slurm, and both within Kubernetes,
which does not tell the number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One of several processes that share the work of a job."""

    rank: int = 0
    """0 to world_size - 1."""
    world_size: int = 1
    """How many there are."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.world_size < 1:
            do = "Give the number of workers."
            raise ConfigError("world_size", "1 or more", f"{self.world_size}", do)
        if not 0 <= self.rank < self.world_size:
            expected, do = f"0 to {self.world_size - 1}", "Number the workers from 0 on."
            raise ConfigError("rank", expected, f"{self.rank}", do)

    def owns(self, name: str) -> bool:
        """Whether a piece of work is in this worker's share. Each is in one share, and every worker
        knows in whose, whatever else there is to do."""
        return int(jsonfile.digest(name.encode()), 16) % self.world_size == self.rank


ALONE = Worker()
"""The only worker of a job."""


def find_worker(rank: int | None, world_size: int | None, environ: Mapping[str, str]) -> Worker:
    """Which worker this process is: what the settings say, else what the first launcher says that
    has set its variables, else `ALONE`.

    Args:
        rank: as set; None leaves it to the launcher.
        world_size: as set; None leaves it to `STILLROOM_WORLD_SIZE` or the launcher.
        environ: the process's environment variables.

    Raises:
        ConfigError: a rank without the number of workers, a number without a rank, two numbers that
            differ, or a variable that is no number.
    """
    size = _number(environ, WORLD_SIZE) if world_size is None else world_size
    where = WORLD_SIZE if world_size is None else "world_size"
    if rank is not None:
        return Worker(rank=rank, world_size=_known(size, "rank"))
    for rank_variable, size_variable in LAUNCHERS:
        found = _number(environ, rank_variable)
        told = None if size_variable is None else _number(environ, size_variable)
        if found is not None:
            return _launched(rank_variable, found, told, size, where)
        if told is not None and size_variable == "WORLD_SIZE":
            raise ConfigError(size_variable, "RANK beside it", "none", "Set both, or neither.")
    if size in (None, 1):
        return ALONE
    do = "Give --rank, or start the workers with torchrun, srun or an indexed Kubernetes Job."
    raise ConfigError(where, f"a rank, for {size} workers", "none", do)


def _launched(variable: str, rank: int, told: int | None, size: int | None, where: str) -> Worker:
    if told is not None and size is not None and told != size:
        do = "Leave it out, or give --rank too."
        raise ConfigError(where, f"{told}, as {variable} comes with", f"{size}", do)
    if variable == "SLURM_PROCID" and rank == 0 and told is None and size is None:
        return ALONE  # a batch script that starts no tasks
    return Worker(rank=rank, world_size=_known(size if told is None else told, variable))


def _known(size: int | None, where: str) -> int:
    if size is None:
        do = f"Give --world-size, or set {WORLD_SIZE}."
        raise ConfigError(where, "the number of workers with it", "none", do)
    return size


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if not value:
        return None
    if not (value.isascii() and value.isdecimal()):
        raise ConfigError(name, "a number, 0 or more", repr(value), "Correct or unset it.")
    return int(value)
