"""Settings of a job that runs on Ray. Needs no Ray."""

from dataclasses import dataclass

from stillroom.cache.errors import ConfigError

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """How many workers Ray starts for a job, where, and what each of them has."""

    workers: tuple[int, int] = (1, 1)
    """Fewest and most processes, each with the model loaded; >= 1. There are more than the fewest
    while parts wait for them and the cluster has room."""
    num_cpus: float = 1.0
    """CPUs of a worker; >= 0."""
    num_gpus: float = 0.0
    """GPUs of a worker; >= 0."""
    address: str | None = None
    """Of the cluster, as ray.init takes it; None is the one in RAY_ADDRESS, or one that was started
    on this machine, or else Ray is started here. local always starts it here."""

    def __post_init__(self) -> None:
        """Check ranges."""
        fewest, most = self.workers
        if not 1 <= fewest <= most:
            expected = "at least 1, and no fewer at most than at least"
            got, do = f"{fewest} to {most}", "Change the setting."
            raise ConfigError("ray.workers", expected, got, do)
        if not (0 <= self.num_cpus < float("inf") and 0 <= self.num_gpus < float("inf")):
            got, do = f"{self.num_cpus} and {self.num_gpus}", "Change them."
            raise ConfigError("ray.num_cpus, num_gpus", "0 or more", got, do)
