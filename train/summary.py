"""What a run did, as tables for a person and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillroom.train.stages import StageRecord

FIRST_WORDS = 86


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One round."""

    version: int
    """Policy that was sampled."""
    rollouts: int
    positions: int
    bytes_per_position: float
    """Shard and manifest, all columns."""
    seconds: dict[str, float]
    """Wall time by stage."""
    teacher_s: float
    """Teacher seconds spent on the round's rollouts."""
    replayed_positions: int
    """Scored tokens that training read, repeats counted."""
    live_teacher_s: float
    """What scoring every replayed position live would have taken, at the cached positions' rate."""
    drift: dict[str, Any]
    """Of the replayed rows, by policy version."""
    before: dict[str, Any]
    """Held-out measurement of the policy that was sampled, by source of the text, and its rows."""
    after: dict[str, Any]
    """The same of the policy that was published."""


def round_of(
    version: int,
    rolled: StageRecord,
    scored: StageRecord,
    trained: StageRecord,
    before: StageRecord,
    after: StageRecord,
) -> Round:
    """Put the records of a round's stages together."""
    rate = trained.values["cached_teacher_s"] / trained.values["cached_positions"]
    return Round(
        version=version,
        rollouts=scored.values["rollouts"],
        positions=scored.values["positions"],
        bytes_per_position=scored.values["stored_bytes"] / scored.values["positions"],
        seconds={
            "rollout": rolled.seconds,
            "score": scored.seconds,
            "train": trained.seconds,
            "measure": after.seconds,
        },
        teacher_s=scored.values["teacher_s"],
        replayed_positions=trained.values["positions"],
        live_teacher_s=rate * trained.values["positions"],
        drift=trained.values["drift"],
        before=before.values,
        after=after.values,
    )


@dataclass(slots=True)
class Summary:
    """All rounds of a run."""

    run: str
    rounds: list[Round] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    """Held-out prompts with the first and the last policy's text."""

    def add(self, done: Round) -> None:
        """Add a round."""
        self.rounds.append(done)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "run": self.run,
            "rounds": [asdict(done) for done in self.rounds],
            "held_out": {source: self.change(source) for source in ("student", "teacher")},
            "teacher_s": sum(r.teacher_s for r in self.rounds),
            "live_teacher_s": sum(r.live_teacher_s for r in self.rounds),
            "samples": self.samples,
        }

    def change(self, source: str) -> dict[str, float]:
        """Forward KL on held-out text of one source: first, last, and how far it fell."""
        first = self.rounds[0].before[source]["forward_kl_nats"]
        last = self.rounds[-1].after[source]["forward_kl_nats"]
        return {"first_nats": first, "last_nats": last, "fell_by": 1 - last / first}

    def print_round(self, version: int) -> None:
        """Print one round's table."""
        done = self.rounds[version]
        table = Table(
            title=f"round {version + 1}: policy {version} -> {version + 1}", title_justify="left"
        )
        table.add_column("what")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for source, text in (
            ("student", "student's fresh rollouts"),
            ("teacher", "teacher's text"),
        ):
            for key, name in (
                ("forward_kl_nats", "forward KL, nats"),
                ("reverse_kl_nats", "reverse KL, nats"),
                ("teacher_tail_mass", "teacher's tail mass"),
                ("hidden_kl_bound_nats", "forward KL hidden in it at most, nats"),
            ):
                values = [f"{m[source][key]:.4f}" for m in (done.before, done.after)]
                table.add_row(f"held-out {text}: {name}", *values)
        for key, name in (("measured", "held-out rows"), ("truncated", "of them, truncated")):
            table.add_row(name, *(f"{m['rows'][key]:,}" for m in (done.before, done.after)))
        table.add_section()
        table.add_row("rollouts", "", f"{done.rollouts:,}")
        table.add_row("scored positions", "", f"{done.positions:,}")
        table.add_row("bytes a position", "", f"{done.bytes_per_position:.0f}")
        for stage, seconds in done.seconds.items():
            table.add_row(f"{stage}, s", "", f"{seconds:.1f}")
        for policy, drift in done.drift.items():
            known = drift["lag"] is not None
            sampled_by = f"policy {policy} (lag {drift['lag']})" if known else "no known policy"
            name = f"drift of replayed rows of {sampled_by}"
            if drift["compared"]:
                table.add_row(f"{name}: k3, nats", "", f"{drift['k3_nats']:.4f}")
                table.add_row(f"{name}: ESS", "", f"{drift['ess']:.3f}")
        _console().print(table)

    def print_end(self) -> None:
        """Print samples, and what the whole run came to."""
        console = _console()
        for sample in self.samples:
            console.print(Text(printable(sample["prompt"]), style="bold"))
            for when in ("before", "after"):
                console.print(Text(f"  {when:>6}: {printable(sample[when])}"))
        for source, text in (
            ("student", "the student's fresh rollouts"),
            ("teacher", "the teacher's text"),
        ):
            change = self.change(source)
            first, last, fell = change["first_nats"], change["last_nats"], change["fell_by"]
            console.print(
                f"forward KL on {text}, held out: {first:.2f} -> {last:.2f} nats ({-fell:+.0%})"
            )
        value = self.as_json()
        spent, live = value["teacher_s"], value["live_teacher_s"]
        replayed, cached = (
            sum(getattr(r, n) for r in self.rounds) for n in ("replayed_positions", "positions")
        )
        console.print(
            f"{replayed:,} positions replayed from {cached:,} scored: "
            f"the teacher took {spent:.1f} s; "
            f"scoring every replayed position live would have taken {live:.1f} s"
        )


def printable(text: str) -> str:
    """The first words of a text on one line, without what a terminal would obey."""
    words = " ".join(text.split())[:FIRST_WORDS]
    return "".join(c if c.isprintable() else "\ufffd" for c in words)


def _console() -> Console:
    return Console(width=100, highlight=False)
