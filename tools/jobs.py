"""Settings of each job, filled by a YAML file and flags. `run` has `train.run_config.RunConfig`."""

from dataclasses import dataclass, field

from tyro.conf import Positional

from stillroom.cache.errors import ConfigError
from stillroom.cache.ray_config import ENGINES, RayConfig
from stillroom.cache.row_lengths import TOO_LONG
from stillroom.cache.teacher import TeacherConfig
from stillroom.replay.prompts import PromptsConfig
from stillroom.replay.refresh import RefreshConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.train.config import RUN_NAME, ReplayConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class InitJob:
    """Make a cache for one teacher; with a student, check that it fits, map its ids to the
    teacher's where they differ, and make it policy 0."""

    root: str
    """The cache to make: a folder, or an address such as s3://bucket/prefix."""
    teacher: TeacherConfig
    """The teacher."""
    student: str | None = None
    """Initial student: folder of a Hugging Face model with its tokenizer, or a hub id; None leaves
    it to the first rollout."""
    topk: int = 64
    """K, teacher entries a position; 1 to the vocabulary."""
    temperature: float = 1.0
    """Divides the teacher's logits before the softmax; > 0."""
    mass: float = 1.0
    """Of the K likeliest entries the fewest that cover this probability are kept; 0 < mass <= 1,
    and 1 keeps all K."""
    extra: int = 0
    """M, further scored ids a position; 0 to 1024."""
    extra_kind: str = "none"
    """none (M is 0), student (rollouts bring up to M ids for each token), or tail (the teacher
    draws M from its probability outside the kept entries)."""
    shard_format: str = "zarr"
    """How scores are stored: zarr (smaller and quicker), or parquet (opens in data tools)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutJob:
    """Sample completions of prompts from a policy; each planned unit becomes a part."""

    root: str
    """The cache: a folder, or an address such as s3://bucket/prefix."""
    prompts: PromptsConfig
    """Prompts that rollouts are sampled from."""
    student: str | None = None
    """Initial student: folder of a Hugging Face model, or a hub id. The first rollout needs it and
    makes it policy 0; later it must be that one."""
    policy: int | None = None
    """Policy version to sample; None is the newest."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How rollouts are sampled."""
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """How much is sampled. Nothing is retired here."""
    rank: int | None = None
    """Which worker this one is, of several that roll out at once: 0 to world_size - 1. None is what
    torchrun, Slurm or Kubernetes says, or the only one."""
    world_size: int | None = None
    """How many workers there are; None is STILLROOM_WORLD_SIZE, or what torchrun or Slurm says."""
    engine: str = "local"
    """local (in this process) or ray (in processes that Ray starts)."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Of the engine ray."""

    def __post_init__(self) -> None:
        """Check what does not go together."""
        _check_engine(self.engine, self.rank, self.world_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """Let the teacher score every part that has no shard."""

    root: str
    """The cache: a folder, or an address such as s3://bucket/prefix."""
    teacher: TeacherConfig
    """The teacher of this cache."""
    topk: int | None = None
    """K, if given, is compared with the cache's."""
    temperature: float | None = None
    """If given, is compared with the cache's."""
    mass: float | None = None
    """If given, is compared with the cache's."""
    extra: int | None = None
    """M, if given, is compared with the cache's."""
    extra_kind: str | None = None
    """If given, is compared with the cache's."""
    again: str | None = None
    """A part whose scores are damaged or unwanted: its commit is set aside and it is scored anew;
    nothing is deleted."""
    accept_numerics: bool = False
    """A person has confirmed that an engine, version, dtype or device that is new to the cache may
    fill it too."""
    rank: int | None = None
    """Which worker this one is, of several that score at once: 0 to world_size - 1. None is what
    torchrun, Slurm or Kubernetes says, or the only one."""
    world_size: int | None = None
    """How many workers there are; None is STILLROOM_WORLD_SIZE, or what torchrun or Slurm says."""
    too_long: str = "refuse"
    """What becomes of parts with a row that is longer than the teacher's engine or servers read,
    where the model itself could: refuse (nothing is scored) or skip (they stay unscored, and the
    exit status is 1)."""
    watch: bool = False
    """Go on with what arrives, with the teacher loaded, until SIGTERM or Ctrl-C."""
    watch_s: float = 30.0
    """Longest pause between two looks for new parts, seconds; > 0. The first ones are shorter."""
    engine: str = "local"
    """local (in this process) or ray (in processes that Ray starts)."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Of the engine ray."""

    def __post_init__(self) -> None:
        """Check ranges, and what does not go together."""
        _check_engine(self.engine, self.rank, self.world_size)
        if not 0 < self.watch_s < float("inf"):
            do = "Change the setting."
            raise ConfigError("watch_s", "a finite number above 0", f"{self.watch_s}", do)
        if self.too_long not in TOO_LONG:
            got, do = repr(self.too_long), "Change the setting."
            raise ConfigError("too_long", f"one of {TOO_LONG}", got, do)
        if self.watch and self.engine == "ray":
            do = "Start scorers with --watch on the nodes, or score in turns with --engine ray."
            raise ConfigError("watch", "the engine local", "ray", do)


def _check_engine(engine: str, rank: int | None, world_size: int | None) -> None:
    if engine not in ENGINES:
        raise ConfigError("engine", f"one of {ENGINES}", repr(engine), "Change the setting.")
    if engine == "ray" and (rank is not None or world_size is not None):
        do = "Leave them out: Ray shares out the work, over ray.workers processes."
        raise ConfigError("rank, world_size", "none with the engine ray", "one", do)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """Train the newest policy on everything scored and not retired, and publish the next one."""

    root: str
    """The cache: a folder."""
    output: str
    """Folder for logs and checkpoints."""
    run_name: str
    """Name of the run, for records in the cache: letters, digits, dots, dashes and underscores."""
    student: str | None = None
    """Folder of the initial student here, if it lies elsewhere than when it was named."""
    train: ReplayConfig = field(default_factory=ReplayConfig)
    """How the student is trained."""

    def __post_init__(self) -> None:
        """Check the name."""
        if not RUN_NAME.fullmatch(self.run_name):
            expected = "letters, digits, dots, dashes and underscores"
            raise ConfigError("run_name", expected, repr(self.run_name), "Choose another name.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshJob:
    """Retire parts of policies that are too old, and sample the newest policy."""

    root: str
    """The cache: a folder, or an address such as s3://bucket/prefix."""
    prompts: PromptsConfig
    """Prompts; those sampled longest ago come first."""
    student: str | None = None
    """Folder of the initial student here, if it lies elsewhere than when it was named."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How rollouts are sampled."""
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """How much is sampled, and how long rollouts stay in use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertJob:
    """Make a cache that holds the same with its shards in another format; the source is only
    read."""

    source: Positional[str]
    """The cache to read: a folder, or an address such as s3://bucket/prefix."""
    destination: Positional[str]
    """Root of the new cache; an interrupted conversion goes on where it stopped."""
    shard_format: str
    """zarr or parquet."""
    json: bool = False
    """Print JSON."""
