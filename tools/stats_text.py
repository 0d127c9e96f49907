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
    rows: list[list[object]] = list(map(list, value["stored_bytes_per_position"].items()))
    rows.append(["all, with metadata and manifest", value["bytes_per_position"]])
    print_table(("stored", "bytes/position"), rows, text=("stored",), strong=[len(rows) - 1])
    raw, ratio = (number(value[name]) for name in ("raw_bytes_per_position", "compression"))
    say(f"as plain arrays: {raw} bytes a position, {ratio} times as many")
    for name, size in value["bytes"].items():
        say(f"{name.replace('_', ' ')}: {size:,} bytes")


def _print_teacher(value: dict[str, Any]) -> None:
    cut = value["mass_cut"] < 1
    of = "kept ones of the teacher's" if cut else "teacher's"
    for k, mass in value["mean_mass"].items():
        say(f"mean probability of the {of} top {k}: {number(mass)}")
    if cut:
        _print_cut(value)
    say(f"mean probability outside the kept entries: {number(value['mean_tail_mass'])}")
    say(
        "forward KL that this can hide from a student no worse there than a uniform guess: at most "
        f"{number(value['mean_hidden_kl_bound_nats'])} nats a position"
    )
    say(f"sampled tokens outside the kept entries: {value['sampled_outside_topk']:.2%}")
    say(f"mean teacher logprob of the sampled token: {value['mean_sampled_logprob']:.4f} nats")
    seconds = value["teacher_s"]
    rate = f", {value['positions'] / seconds:,.0f} positions/s" if seconds else ""
    say(f"the teacher took {seconds:,.1f} s for these positions{rate}")


def _print_cut(value: dict[str, Any]) -> None:
    figures = ", ".join(f"{name} {number(size)}" for name, size in value["entries"].items())
    say(f"entries that cover {value['mass_cut']}, at most {value['topk']}: {figures}")
    say(
        f"entries left out: {value['entries_left_out']:,} ({value['left_out_share']:.1%}), "
        f"{number(value['left_out_raw_bytes_per_position'])} bytes a position before compression"
    )


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
