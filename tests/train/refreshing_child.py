"""A process that trains, refreshes every three steps and saves every so many; for a test to kill.

Arguments: cache, student, teacher, prompts, output, steps between checkpoints.
"""

import sys

from transformers import AutoTokenizer

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.store import Cache
from stillroom.cache.teacher import TeacherConfig
from stillroom.cache.transformers_teacher import TransformersTeacher
from stillroom.replay.config import StreamConfig
from stillroom.replay.prompts import PromptsConfig, load_prompts
from stillroom.replay.refresh import RefreshConfig
from stillroom.replay.sampler import SamplerConfig
from stillroom.train.config import ReplayConfig
from stillroom.train.refreshing import RefreshCallback, Refresher
from stillroom.train.trainer import ReplayTrainer


def main(root: str, student: str, teacher: str, source: str, output: str, save: str) -> None:
    """Train to the end, unless somebody ends this process."""
    cache = Cache.open(root)
    prompts = load_prompts(
        PromptsConfig(source=source), AutoTokenizer.from_pretrained(student), 64
    ).prompts
    scorer = TransformersTeacher(inspect_model(teacher), TeacherConfig(model=teacher, device="cpu"))
    sampler = SamplerConfig(max_new_tokens=6, device="cpu")
    config = RefreshConfig(prompts_per_cycle=4, unit_rollouts=4, max_lag=0)
    replay = StreamConfig(
        batch_rows=2, max_tokens=256, block_rows=2, window_rows=4, follow_every_steps=3
    )
    ReplayTrainer(
        student,
        cache,
        ReplayConfig(
            device="cpu", learning_rate=1e-2, max_steps=11, save_steps=int(save), replay=replay
        ),
        output=output,
        callbacks=(RefreshCallback(Refresher(cache, scorer, prompts, sampler, config)),),
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
