"""What accelerate's launcher asks for in its environment that this trainer does not read, and its
own settings for that. Needs no torch."""

from collections.abc import Mapping

from stillroom.train.config import ReplayConfig


def asked_in_vain(config: ReplayConfig, environ: Mapping[str, str]) -> str:
    """One line on what the launcher asks for and the settings do not say; empty where all is said.

    Args:
        config: the settings.
        environ: the process's environment.
    """
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    sharded, compiled = config.parallel == "fsdp", config.torch_compile
    asked = [
        ("FSDP", _is_on(environ, "FSDP") and not sharded, "train.parallel: fsdp"),
        ("DeepSpeed", _is_on(environ, "DEEPSPEED") and not sharded, "train.parallel: fsdp"),
        (f"precision {precision}", precision != "no" and not config.bf16, "train.bf16: true"),
        (f"compiler {backend}", backend != "no" and not compiled, "train.torch_compile: true"),
    ]
    unsaid = [(name, setting) for name, is_unsaid, setting in asked if is_unsaid]
    if not unsaid:
        return ""
    names, settings = (", ".join(dict.fromkeys(column)) for column in zip(*unsaid, strict=True))
    return f"accelerate's launcher asks for {names}, which is not read here; there is {settings}"


def _is_on(environ: Mapping[str, str], plugin: str) -> bool:
    return environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true"
