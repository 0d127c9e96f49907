"""The sampler that a job's settings ask for, loaded."""

from stillroom.cache.errors import MismatchError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.replay.sampler import SamplerConfig, StudentSampler


def load_sampler(files: ModelFiles, config: SamplerConfig) -> StudentSampler:
    """Load a student that samples; what its backend needs is imported here and nowhere else.

    Args:
        files: its inspected folder.
        config: how it samples.

    Raises:
        MissingError: a package that the backend needs is not installed.
        StillroomError: as the backend's own class.
    """
    if config.backend == "vllm":
        from stillroom.replay.vllm_sampler import VllmSampler

        return VllmSampler(files, config)
    from stillroom.replay.transformers_sampler import TransformersSampler

    return TransformersSampler(files, config)


def find_and_load_sampler(model: str, fingerprint: str, config: SamplerConfig) -> StudentSampler:
    """Load a student on another machine than the one where it was inspected.

    Args:
        model: a folder, or a hub id that this machine resolves.
        fingerprint: of the student that is meant.
        config: how it samples.

    Raises:
        MismatchError: it is another model here.
        StillroomError: as `inspect_model` and `load_sampler`.
    """
    files = inspect_model(model)
    if files.fingerprint != fingerprint:
        do = "Give all machines the same files."
        raise MismatchError(f"{model} on this machine", fingerprint, files.fingerprint, do)
    return load_sampler(files, config)
