"""The command line: which command runs what, and what the exit status says.

0 is clean, 1 is what `verify` or `doctor` found or what `score` left out, 2 is an error or wrong
usage, 130 an interrupt, 141 a reader that went away. Nothing here or in a looking command imports
torch, and `--help` imports none of the model libraries.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from stillroom.cache.errors import ConfigError, StillroomError
from stillroom.tools import (
    bench,
    collect,
    doctor,
    estimate,
    import_rollouts,
    jobs,
    looks,
    scoring,
    work,
)
from stillroom.tools.flags import parse_flags, parse_with_file
from stillroom.tools.render import plain
from stillroom.train.run_config import RunConfig

PROG = "stillroom"
ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    summary: str
    settings: type[Any]
    run: Callable[[Any], int]
    takes_file: bool
    """Whether a YAML file may hold its settings: jobs."""


COMMANDS = {
    "init": Command("make a cache for one teacher", jobs.InitJob, work.init, True),
    "rollout": Command("sample completions from a policy", jobs.RolloutJob, work.roll_out, True),
    "import": Command(
        "take rollouts that another system made",
        import_rollouts.Import,
        import_rollouts.run_import,
        False,
    ),
    "doctor": Command("try a root before a job", doctor.Doctor, doctor.run_doctor, False),
    "estimate": Command(
        "what scoring will take, before it runs", estimate.EstimateJob, estimate.run_estimate, True
    ),
    "score": Command("let the teacher score them", jobs.ScoreJob, scoring.score_all, True),
    "train": Command(
        "train on the scores, publish a policy", jobs.TrainJob, work.train_newest, True
    ),
    "refresh": Command(
        "retire old rollouts, sample the newest policy", jobs.RefreshJob, work.refresh_newest, True
    ),
    "run": Command("do all of it in rounds, on one machine", RunConfig, work.run_rounds, True),
    "convert": Command(
        "the same cache in the other shard format", jobs.ConvertJob, work.convert_cache, False
    ),
    "bench": Command(
        "measure store, replay, scoring, training or quality here",
        bench.Bench,
        bench.run_bench,
        False,
    ),
    "status": Command(
        "teacher, policies, bytes, teacher seconds", looks.Status, looks.run_status, False
    ),
    "ls": Command("one line a part", looks.Ls, looks.run_ls, False),
    "show": Command("one rollout and what the teacher said", looks.Show, looks.run_show, False),
    "stats": Command("bytes a position, kept mass, lengths", looks.Stats, looks.run_stats, False),
    "verify": Command(
        "read everything again; exit 1 if damaged", looks.Verify, looks.run_verify, False
    ),
    "gc": Command("remove what nobody needs", collect.Gc, collect.run_gc, False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the flush at exit is quiet too
        return BROKEN_PIPE
    except (StillroomError, OSError) as error:
        print(f"{PROG}: error: {plain(str(error))}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return status


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else ERROR
    if args[0] == "--version":
        print(f"{PROG} {version(PROG)}")
        return 0
    command = COMMANDS.get(args[0])
    if command is None:
        near = difflib.get_close_matches(args[0], COMMANDS, 1, 0.5)
        do = f"Did you mean {near[0]!r}?" if near else f"See '{PROG} --help'."
        raise ConfigError("command", f"one of {', '.join(COMMANDS)}", repr(args[0]), do)
    parse = parse_with_file if command.takes_file else parse_flags
    return command.run(parse(command.settings, args[1:], f"{PROG} {args[0]}"))


def _overview() -> str:
    lines = [f"  {name:<8} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [FILE.yaml | ROOT] [flags]",
            "",
            "A cache of teacher scores, and replay of it in training.",
            "",
            *lines,
            "",
            f"'{PROG} COMMAND --help' lists its flags; '{PROG} --version' says the version.",
            "Exit status: 0 clean, 1 found by verify or doctor, or left out by score, 2 error.",
        ]
    )
