"""A rollout printed for a person."""

from stillroom.tools.render import number, plain, print_table, say
from stillroom.tools.show import Alternative, Extra, Position, Shown

MARK = "<- sampled"
SMALL = 0.00005


def print_rollout(shown: Shown, topk: int) -> None:
    """Print text, origin and the table of positions.

    Args:
        shown: the rollout.
        topk: K of the cache.
    """
    for note in shown.notes:
        say(f"note: {note}")
    _print_origin(shown)
    _print_text("prompt", shown.prompt, shown.prompt_ids)
    if shown.teacher_prompt_ids:
        _print_text("the teacher's own prompt", shown.teacher_prompt, shown.teacher_prompt_ids)
    _print_text("completion", shown.completion, shown.completion_ids)
    say()
    _print_positions(shown.positions, topk, scored=shown.scored)
    if shown.alternatives is not None:
        say()
        _print_alternatives(shown.alternatives, shown.positions[0])
    if shown.extra is not None:
        say(f"extra ids, teacher logprob: {', '.join(map(_extra, shown.extra)) or 'none'}")


def _print_origin(shown: Shown) -> None:
    meta = shown.meta
    low, high = meta["policy_version_min"], meta["policy_version_max"]
    policy = f"policy {low}" if low == high else f"policies {low} to {high}"
    say(
        f"part {shown.part}, row {shown.row} of {shown.rows} rollouts: {policy}, "
        f"source {meta['source']}, finish reason {meta['finish_reason']}, "
        f"{len(shown.prompt_ids)} prompt and {len(shown.completion_ids)} completion tokens"
    )
    say(f"prompt id {meta['prompt_id']:016x}, sample {meta['sample_index']} of its group")
    say("sampler: " + ", ".join(f"{key} {value}" for key, value in meta["sampler"].items()))
    if shown.scored:
        scorer = ", ".join(f"{key} {value}" for key, value in meta["scorer"].items())
        say(f"scored by: {scorer or 'not recorded'}")
    else:
        say("not scored yet")


def _print_text(name: str, text: str | None, ids: list[int]) -> None:
    say()
    say(f"{name} ({len(ids)} tokens):")
    shown = " ".join(map(str, ids)) if text is None else text
    for line in shown.split("\n"):
        print(f"  | {plain(line, keep=chr(9))}")


def _print_positions(positions: list[Position], topk: int, *, scored: bool) -> None:
    heads = ["position", "token", "id", "behaviour logprob"]
    if scored:
        heads += ["teacher logprob", "probability", f"rank of {topk}", "tail mass"]
    rows = [_position_row(p, scored=scored) for p in positions]
    print_table(heads, rows, text=("token",))


def _position_row(at: Position, *, scored: bool) -> list[object]:
    own = [at.position, _quoted(at.text), str(at.token_id), _fixed(at.behaviour_logprob)]
    if not scored:
        return own
    rank = "outside" if at.rank is None else number(at.rank)
    return [*own, _fixed(at.logprob), _fixed(at.probability), rank, _fixed(at.tail_mass)]


def _print_alternatives(alternatives: list[Alternative], at: Position) -> None:
    say(f"the teacher at position {at.position}, likeliest first:")
    rows = [
        [
            "outside" if a.rank is None else number(a.rank),
            _quoted(a.text),
            str(a.token_id),
            _fixed(a.logprob),
            _fixed(a.probability),
            MARK if a.sampled else "",
        ]
        for a in alternatives
    ]
    strong = [i for i, a in enumerate(alternatives) if a.sampled]
    heads = ("rank", "token", "id", "logprob", "probability", "")
    print_table(heads, rows, text=("token", ""), strong=strong)
    rest = 1 - sum(a.probability for a in alternatives)
    say(f"all other tokens: probability {_fixed(max(0.0, rest))}")


def _extra(extra: Extra) -> str:
    return f"{extra.token_id} {_quoted(extra.text)} {_fixed(extra.logprob)}"


def _quoted(text: str | None) -> str:
    return "-" if text is None else f"'{plain(text)}'"


def _fixed(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0e}" if 0 < value < SMALL else f"{value:.4f}"
