"""The teacher that a job's settings ask for, loaded or connected."""

from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.teacher import Teacher, TeacherConfig


def load_teacher(files: ModelFiles, config: TeacherConfig) -> Teacher:
    """Load or connect a teacher; what its backend needs is imported here and nowhere else.

    Args:
        files: its inspected folder.
        config: how it runs.

    Raises:
        MissingError: a package that the backend needs is not installed.
        StillroomError: as the backend's own class.
    """
    if config.backend == "vllm":
        from stillroom.cache.vllm_teacher import VllmTeacher

        return VllmTeacher(files, config)
    if config.backend == "server":
        from stillroom.cache.server_teacher import ServerTeacher

        return ServerTeacher(files, config)
    from stillroom.cache.transformers_teacher import TransformersTeacher

    return TransformersTeacher(files, config)
