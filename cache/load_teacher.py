"""The teacher that a job's settings ask for: one model or an ensemble, inspected, then loaded or
connected."""

import sys
from dataclasses import replace

from stillroom.cache.errors import MismatchError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.id_map import IdMap
from stillroom.cache.teacher import ScoreSpec, Teacher, TeacherConfig


def inspect_teacher(config: TeacherConfig) -> ModelFiles:
    """Inspect a teacher's model; of an ensemble the first one, with the others as its members.

    Raises:
        MissingError, InputError: a model folder is missing or not whole.
        MismatchError: members of an ensemble have other tokenizers.
    """
    first, *others = (inspect_model(one.model, one.revision) for one in config.members())
    for files in others:
        mine, theirs = (
            (one.tokenizer_fingerprint, one.vocab_size, min(one.logit_width, first.vocab_size))
            for one in (first, files)
        )
        if theirs != mine:
            expected = f"the tokenizer and vocabulary of {first.folder}, {mine}"
            do = "An ensemble adds up probabilities of the same tokens: choose other members."
            raise MismatchError(str(files.folder), expected, f"{theirs}", do)
    return replace(first, members=tuple(others))


def load_teacher(
    files: ModelFiles,
    config: TeacherConfig,
    id_map: IdMap | None = None,
    spec: ScoreSpec | None = None,
) -> Teacher:
    """Load or connect a teacher; what its backend needs is imported here and nowhere else.

    Args:
        files: as `inspect_teacher` gives them.
        config: how it runs.
        id_map: from the ids of rows and scores to the teacher's; None where they are the same.
        spec: what it will be asked for, if that is known: vLLM then gives hidden states where
            nothing else will do.

    Raises:
        MissingError: a package that the backend needs is not installed.
        StillroomError: as the backend's own class.
    """
    if config.backend == "transformers":
        from stillroom.cache.transformers_teacher import TransformersTeacher

        return TransformersTeacher(files, config, id_map)
    teacher: Teacher
    if config.ensemble:
        from stillroom.cache.mixed_teacher import MixedTeacher

        every = zip((files, *files.members), config.members(), strict=True)
        members = [_connect(replace(one, members=()), own, spec) for one, own in every]
        teacher = MixedTeacher(members, config.shares(), files.vocab_size, config.ensemble_topk)
    else:
        teacher = _connect(files, config, spec)
    if id_map is None:
        return teacher
    from stillroom.cache.mapped_teacher import MappedTeacher

    return MappedTeacher(teacher, id_map)


def _connect(files: ModelFiles, config: TeacherConfig, spec: ScoreSpec | None) -> Teacher:
    """One model behind vLLM or servers."""
    if config.backend == "vllm":
        from stillroom.cache.vllm_teacher import VllmTeacher

        return VllmTeacher(files, exact_if_needed(files, config, spec))
    from stillroom.cache.server_teacher import ServerTeacher

    return ServerTeacher(files, config)


def exact_if_needed(
    files: ModelFiles, config: TeacherConfig, spec: ScoreSpec | None
) -> TeacherConfig:
    """Settings of a teacher that vLLM runs, with `exact_tail` where the model or what is asked of
    it cannot be had otherwise; that is said."""
    why = ""
    if files.logit_width > files.vocab_size:
        why = f"the head has {files.logit_width} rows for {files.vocab_size} tokens"
    elif spec is not None and spec.temperature != 1:
        why = f"the temperature is {spec.temperature}"
    elif spec is not None and spec.extra_kind == "tail":
        why = "extra ids are drawn from the tail"
    if not why or config.exact_tail:
        return config
    said = f"  {files.folder}: vLLM gives hidden states, as with teacher.exact_tail, because {why}"
    print(said, file=sys.stderr, flush=True)
    return replace(config, exact_tail=True)
