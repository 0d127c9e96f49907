"""What `run` checks before it writes anything: models, tokenizers, settings, prompts, the root."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.canary import canary_rows
from stillroom.cache.errors import ConfigError, CorruptError, InputError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.identity import Identity
from stillroom.cache.storage import Storage
from stillroom.cache.store import IDENTITY_PATH, Cache
from stillroom.cache.teacher import ScoreSpec, Teacher, identity_of
from stillroom.replay.policies import check_student
from stillroom.replay.prompts import Prompts, load_prompts
from stillroom.train.decisive import decisive_settings, differing, named
from stillroom.train.run_config import RunConfig


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a run, and the identity of its caches."""

    teacher: ModelFiles
    student: ModelFiles
    identity: Identity


def check_models(config: RunConfig) -> Models:
    """Inspect teacher and student and check that they fit each other.

    Raises:
        MissingError, InputError: a model folder is missing or not whole.
        MismatchError: other tokenizers or vocabularies.
        ConfigError: the teacher is an ensemble, or a setting is out of the teacher's range.
    """
    if config.teacher.ensemble:
        got, do = f"{len(config.teacher.ensemble)} more", "Use init, rollout, score and train."
        expected = "one model: a run lets its teacher write text, which a mixture cannot"
        raise ConfigError("teacher.ensemble", expected, got, do)
    teacher = inspect_model(config.teacher.model, config.teacher.revision)
    student = inspect_model(config.student)
    identity = identity_of(teacher, config.teacher, config.score_spec, config.shard_format)
    check_student(
        student, identity.tokenizer_fingerprint, identity.vocab_size, config.teacher.model
    )
    return Models(teacher, student, identity)


def check_root(root: str, identity: Identity) -> None:
    """Refuse a root that holds a cache of another identity.

    Raises:
        MismatchError: names what differs.
    """
    storage = Storage(root)
    if storage.exists(IDENTITY_PATH):
        Cache.open(root).identity.check_same(identity, storage.describe(IDENTITY_PATH))


def check_output(path: Path, config: RunConfig) -> None:
    """Refuse an output whose `run.json` is of a run with other settings.

    Raises:
        ConfigError: names the settings that differ.
        CorruptError: it is no record of a run.
    """
    if not path.is_file():
        return
    record = jsonfile.load(path.read_bytes(), str(path))
    earlier = record.get("settings")
    if not isinstance(earlier, dict):
        got = f"settings = {earlier!r:.80}" if "settings" in record else "no settings"
        do = "Restore the file, or give another output."
        raise CorruptError(str(path), "a run's settings by name", got, do)
    now = settings_of(config)
    names = differing(earlier, now)
    if names:
        expected = f"the settings of the run that is there: {named(earlier, names)}"
        do = "Give those settings, or another output and root."
        raise ConfigError(str(path), expected, named(now, names), do)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what a run is, by dotted name, as they come back from JSON."""
    return decisive_settings(config)


def check_machine(config: RunConfig) -> None:
    """Refuse devices, optimisers and schedules that are not to be had here.

    Raises:
        ConfigError: names the setting.
    """
    from stillroom.cache.causal_lm import pick_device
    from stillroom.train.optimizer import check_trainable

    for device in (config.teacher.device, config.sampler.device):
        pick_device(device)
    check_trainable(config.train, pick_device(config.train.device))


def check_teacher(teacher: Teacher, identity: Identity) -> None:
    """Let the teacher score a few sequences.

    Raises:
        NumericsError: it gives NaN or infinite logits.
    """
    rows = canary_rows(identity.vocab_size, identity.max_length)
    for _ in teacher.score(rows, ScoreSpec(topk=identity.topk, temperature=identity.temperature)):
        pass


def read_prompts(config: RunConfig, models: Models) -> tuple[Prompts, Prompts]:
    """Prompts for training, and held-out ones that are not among them.

    Raises:
        InputError: a file cannot be used, or a prompt is in both.
        ConfigError: there is no room for a completion.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.student.folder)
    longest = min(models.teacher.max_length, models.student.max_length)
    room = min(longest, config.train.replay.max_tokens) - config.sampler.max_new_tokens
    training, held_out = (
        load_prompts(source, tokenizer, room) for source in (config.prompts, config.held_out)
    )
    both = {p.id for p in training.prompts} & {p.id for p in held_out.prompts}
    if both:
        do = "Take them out of one of the two."
        got = f"{len(both)} that are among the training prompts too"
        raise InputError(config.held_out.source, "prompts of their own", got, do)
    check_batch(config, len(training.prompts))
    return training, held_out


def check_batch(config: RunConfig, prompts: int) -> None:
    """Refuse a step of more rows than the first round samples."""
    sampled = min(prompts, config.refresh.prompts_per_cycle) * config.sampler.samples_per_prompt
    if config.train.replay.batch_rows > sampled:
        expected = f"at most the {sampled} rollouts of a round"
        got, do = f"{config.train.replay.batch_rows}", "Lower it, or sample more."
        raise ConfigError("train.replay.batch_rows", expected, got, do)


def describe_prompts(source: str, prompts: Prompts) -> str:
    """One line on what was read."""
    return (
        f"{source}: {len(prompts.prompts)} prompts; left out: {prompts.num_too_long} too long, "
        f"{prompts.num_duplicates} twice"
    )
