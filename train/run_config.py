"""Settings of `run`. Needs no torch."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from stillroom.cache.teacher import ScoreSpec, TeacherConfig
from stillroom.replay.prompts import PromptsConfig
from stillroom.replay.refresh import RefreshConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.train.config import ReplayConfig
from stillroom.train.settings import check_setting


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The whole loop on one machine: roll out, score, replay and train, publish, refresh, in
    rounds."""

    root: str
    """The cache: a folder."""
    output: str
    """Folder for summaries, logs, checkpoints and the held-out caches."""
    student: str
    """Initial student: folder of a Hugging Face model with its tokenizer, or a hub id."""
    teacher: TeacherConfig
    """The teacher."""
    prompts: PromptsConfig
    """Prompts that rollouts are sampled from."""
    held_out: PromptsConfig
    """Prompts that are only ever used to measure."""
    rounds: int = 2
    """Times to roll out, score, train and publish; >= 1."""
    topk: int = 64
    """K, teacher entries a position; 1 to the vocabulary."""
    temperature: float = 1.0
    """Divides the teacher's and the student's logits in scores and losses; > 0."""
    mass: float = 1.0
    """Of the K likeliest entries the fewest that cover this probability are kept; 0 < mass <= 1,
    and 1 keeps all K."""
    extra: int = 0
    """M, further scored ids a position; 0 to 1024."""
    extra_kind: str = "none"
    """none (M is 0), student (the sampler's sampler.extra likeliest tokens), or tail (the teacher
    draws them from its probability outside the kept entries)."""
    shard_format: str = "zarr"
    """How scores are stored: zarr (smaller and quicker), or parquet (opens in data tools)."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How rollouts are sampled."""
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    """How much is sampled each round."""
    train: ReplayConfig = field(default_factory=ReplayConfig)
    """How the student is trained each round."""
    accept_numerics: bool = False
    """A person has confirmed an engine, version, dtype or device that is new to the cache."""

    @property
    def score_spec(self) -> ScoreSpec:
        """What the teacher keeps of each position."""
        return ScoreSpec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ScoreSpec)})

    def __post_init__(self) -> None:
        """Check ranges."""
        check_setting("rounds", self.rounds >= 1, "at least 1", self.rounds)
        scored = self.extra if self.extra_kind == "student" else 0
        expected = f"at most {scored}, the ids of the student that the cache scores"
        check_setting("sampler.extra", self.sampler.extra <= scored, expected, self.sampler.extra)
        check_setting(
            "root", "://" not in self.root, "a folder; run works on one machine", self.root
        )
        check_setting(
            "output", Path(self.output) != Path(self.root), "another folder than root", self.output
        )
