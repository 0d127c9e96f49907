"""A cache's figures printed for a person."""

from typing import Any

from stillroom.tools.render import number, print_table, say


def print_stats(value: dict[str, Any]) -> None:
    """Print what `Stats.as_json` gives."""
    left_out = f" ({value['retired_parts']} retired left out)" if value["retired_parts"] else ""
    say(
        f"{value['root']}: {value['shards']} scored parts{left_out}, {value['unscored_parts']} "
        f"unscored, {value['rollouts']:,} rollouts, {value['positions']:,} positions"
    )
    if not value["positions"]:
        return
    say()
    _print_bytes(value)
    say()
    _print_teacher(value)
    say()
    _print_rollouts(value)


def _print_bytes(value: dict[str, Any]) -> None:
    keys = ("bytes_per_position", "raw_bytes_per_position", "compression")
    rows = [[name, *(sizes[k] for k in keys)] for name, sizes in value["columns"].items()]
    rows.append(["all, with metadata and manifest", *(value[k] for k in keys)])
    heads = ("column", "bytes/position", "raw bytes/position", "raw : stored")
    print_table(heads, rows, text=("column",), strong=[len(rows) - 1])
    for name, size in value["bytes"].items():
        say(f"{name.replace('_', ' ')}: {size:,} bytes")


def _print_teacher(value: dict[str, Any]) -> None:
    for k, mass in value["mean_mass"].items():
        say(f"mean probability of the teacher's top {k}: {number(mass)}")
    say(f"mean probability outside the top {value['topk']}: {number(value['mean_tail_mass'])}")
    share = value["sampled_outside_topk"]
    say(f"sampled tokens outside the top {value['topk']}: {share:.2%}")
    say(f"mean teacher logprob of the sampled token: {value['mean_sampled_logprob']:.4f} nats")


def _print_rollouts(value: dict[str, Any]) -> None:
    for name, key in (
        ("policy", "policy_versions"),
        ("finish reason", "finish_reasons"),
        ("source", "sources"),
    ):
        counts = ", ".join(f"{entry}: {count:,}" for entry, count in value[key].items())
        say(f"rollouts by {name}: {counts}")
    for name, spread in value["lengths"].items():
        figures = ", ".join(f"{figure} {number(size)}" for figure, size in spread.items())
        say(f"{name} length, tokens: {figures}")
