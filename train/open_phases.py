"""Opens what a run's phases are trained on: the streams of its own cache, of other caches, of
datasets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from stillroom.cache.errors import InputError
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.identity import Identity
from stillroom.cache.store import Cache
from stillroom.replay.pinned import empty_for
from stillroom.replay.state import snapshots_in
from stillroom.train.config import ReplayConfig
from stillroom.train.fits import check_fits, check_not_held_out, check_same_rows, place_of
from stillroom.train.phase_streams import Opened, PhaseStreams
from stillroom.train.phases import Phase
from stillroom.train.run_stream import RunStream
from stillroom.train.student import Student
from stillroom.train.supervised import SupervisedStream
from stillroom.train.supervised_data import SupervisedConfig, SupervisedRows, load_supervised


@dataclass(frozen=True, slots=True)
class PhaseOpener:
    """Opens the data of phases for one rank of a run."""

    config: ReplayConfig
    root: str
    """Of the run's own cache."""
    student: Student
    files: ModelFiles
    output: Path
    run: str
    rank: int
    world: int
    say: Callable[[str], None]
    resumed: Mapping[str, Any] | None = None
    """State of the phases in the checkpoint that the run goes on from."""

    def open(self, own: Opened) -> PhaseStreams:
        """All phases of the settings, or the single one that settings without phases mean.

        Args:
            own: the run's own cache.

        Raises:
            InputError: a dataset cannot be used.
            MissingError: a file or a cache is not there, or its snapshot is gone.
            MismatchError: a cache does not fit the student, or ranks have other datasets.
            ConfigError: a phase is on the held-out cache.
        """
        config, identity = self.config, own.identity
        phases: Sequence[Phase] = config.phases or [
            Phase(num_train_epochs=config.num_train_epochs, max_steps=config.max_steps)
        ]
        here = place_of(self.root)
        phases = [
            replace(phase, root=None) if phase.root and place_of(phase.root) == here else phase
            for phase in phases
        ]

        def opened(index: int, phase: Phase) -> Opened:
            if phase.supervised is not None:
                return self._dataset(phase.supervised, identity)
            assert phase.root is not None
            return self._cache(phase.root, index)

        accumulated = config.gradient_accumulation_steps
        return PhaseStreams(phases, config.phase_cycles, accumulated, own, opened, self.resumed)

    def _dataset(self, settings: SupervisedConfig, identity: Identity) -> Opened:
        rows = load_rows(settings, self.files)
        check_same_rows(settings.source, rows.digest)
        if rows.missing:
            self.say(f"  {settings.source}: {rows.missing}")
        stream = SupervisedStream(
            rows,
            settings,
            rank=self.rank,
            world=self.world,
            one_row=not self.student.packs,
            empty=empty_for(self.student.model.device),
        )
        plain = replace(identity, temperature=1.0, extra=0, extra_kind="none")
        return Opened(stream, plain)

    def _cache(self, root: str, index: int) -> Opened:
        """Another cache at what its rows were when the run began, pinned under a name of its own;
        newer ones are not taken up."""
        cache = Cache.open(root)
        check_not_held_out("phase.root", root, self.config.eval_root)
        check_fits(self.files, cache, replace(self.config, temperature=None))
        name = f"{self.run}-phase{index}"
        opened = RunStream(cache, self.output, name, self.rank, self.world)
        snapshot = opened.choose(self.config.device, partial(self._resumed, index))
        replay = replace(self.config.replay, follow_every_steps=0)
        config = replace(self.config, replay=replay)
        stream = opened.open(snapshot, config, self.student, self.files.vocab_size, self.say)
        return Opened(stream, cache.identity, opened.keep, opened.release)

    def _resumed(self, index: int) -> str | None:
        """The snapshot of a phase's cache that the newest checkpoint was on."""
        streams = {} if self.resumed is None else self.resumed.get("streams", {})
        stored = streams.get(str(index))
        return None if stored is None else snapshots_in(stored)[0]


def load_rows(settings: SupervisedConfig, files: ModelFiles) -> SupervisedRows:
    """A dataset as a student reads it.

    Raises:
        MissingError: the file is not there.
        InputError: it cannot be used, or a row is longer than the student takes.
    """
    rows = load_supervised(settings, AutoTokenizer.from_pretrained(files.folder))
    longest = int(rows.lengths.max())
    if longest > files.max_length:
        expected = f"rows of at most {files.max_length} tokens, which the student was made for"
        raise InputError(settings.source, expected, f"{longest}", "Lower supervised.max_length.")
    return rows
