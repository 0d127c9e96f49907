"""What a run of the score job did, printed for a person."""

from stillroom.cache.score import ScoreReport
from stillroom.tools.render import say


def print_scored(report: ScoreReport) -> None:
    """Print parts, positions, the teacher's time, and how much of the time its model ran."""
    rate = report.positions / report.teacher_s if report.teacher_s else 0.0
    say(
        f"score: {len(report.scored)} parts, {report.positions:,} positions in "
        f"{report.teacher_s:.1f} s of the teacher ({rate:,.0f} positions/s); "
        f"{len(report.lost)} parts scored by others meanwhile"
    )
    if report.too_long:
        say(
            f"score: {len(report.too_long)} parts are not scored, such as {report.too_long[0]}: "
            "they have rows that are longer than the teacher reads"
        )
    if report.model_s and report.work_s:
        share = report.model_s / report.work_s
        say(
            f"score: the teacher's model ran {share:.0%} of the time; the rest went into sums, "
            "reading, encoding and storing"
        )
