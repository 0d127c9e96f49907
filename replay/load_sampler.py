"""The sampler that a job's settings ask for, loaded."""

from stillroom.cache.fingerprint import ModelFiles
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
