"""The rows of a snapshot that a stream replays: those that fit a filter and a micro-batch, their
lengths, and the units in which they are shuffled.

Lengths are the commits' and cost no read. Only columns that are needed are read, from several
shards at once.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.schema import Arrays
from stillroom.cache.snapshot import Snapshot
from stillroom.cache.store import Cache
from stillroom.replay.row_filter import Conditions, RowFilter
from stillroom.replay.shard_columns import UNCOUNTED, Known, ShardColumns

OVER_LONG = ("refuse", "truncate", "skip")
"""What happens to rows of more tokens than a micro-batch: they are an error, lose their last
tokens, or are left out."""
POLICY = "policy_version_min"
PROMPT = "prompt_id"
LAG = "max_lag"
SPANS = 128
"""Rows whose tokens are looked at in one request."""
NO_POSITION = "no_position"


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows to replay."""

    rows: np.ndarray
    """(n,) int64: their numbers in the snapshot, ascending; n >= 1."""
    lengths: np.ndarray
    """(n, 3) uint32: tokens, prompt tokens and positions, of what is left of truncated rows."""
    policy: np.ndarray | None
    """(n,) int64: the oldest policy that sampled each row, -1 if unknown; None if it was not read.
    The policy in a part's name is another one where rows were imported, or where weights changed
    while a rollout was sampled."""
    unit_start: np.ndarray
    """(U + 1,) int64: where units of rows that stay together begin; the last is n."""
    left_out: dict[str, int]
    """Rows that are not selected, by the first reason: a setting of the filter, a column of its
    `ranges`, `over_long`, or `no_position` (none is left of a truncated row)."""
    truncated: int
    """Selected rows that lost their last tokens."""
    newest_policy: int
    """The newest of `policy_version_min` of all rows of the snapshot, selected or not; -1 if it was
    not read, or unknown of all."""

    @property
    def digest(self) -> str:
        """Hash of rows, lengths and units: 32 hexadecimal digits."""
        arrays = (self.rows, "<i8"), (self.lengths, "<u4"), (self.unit_start, "<i8")
        hashes = [jsonfile.digest(array.astype(dtype).tobytes()) for array, dtype in arrays]
        return jsonfile.digest(jsonfile.dump(hashes))

    @property
    def missing(self) -> str:
        """What is not replayed, for a person; empty if every row is, whole."""
        reasons = ", ".join(f"{count:,} by {name}" for name, count in self.left_out.items())
        said = [f"rows left out: {reasons}"] if reasons else []
        return "; ".join(said + [f"{self.truncated:,} truncated"] * (self.truncated > 0))

    @property
    def unit_policy(self) -> np.ndarray:
        """(U,) int64: the oldest known policy of each unit, -1 where none is known; `policy` must
        have been read."""
        assert self.policy is not None
        unsigned = self.policy.view(np.uint64)  # of which -1 is the largest
        return np.minimum.reduceat(unsigned, self.unit_start[:-1]).view(np.int64)


def select(
    cache: Cache,
    snapshot: Snapshot,
    rows: RowFilter,
    *,
    max_tokens: int,
    over_long: str = "refuse",
    group_rows: int = 1,
    with_policy: bool = False,
    threads: int = 16,
    known: Known | None = None,
) -> Selection:
    """Choose the rows of a snapshot.

    Args:
        cache: where the shards are.
        snapshot: which of them.
        rows: the filter. It sees rows as they are stored, before any truncation.
        max_tokens: most tokens of a row; >= 1.
        over_long: what happens to longer ones, of those that the filter keeps: see OVER_LONG.
        group_rows: most rows of a unit; >= 1. A unit is up to so many selected rows of one part
            and prompt, one after another.
        with_policy: read `Selection.policy` also where the filter does not need it.
        threads: shards that are read at once.
        known: what selections of the same `max_tokens` have read of shards, which is not read
            again; what is read now is added.

    Raises:
        InputError: no row is left, a row is longer than max_tokens and over_long is "refuse", or a
            shard has no column of a name in `rows.ranges`, or one with a number a position.
        CorruptError: stored bytes are damaged; names the object.
    """
    _check_settings(max_tokens, over_long, group_rows)
    if not snapshot.rows:
        do = "Roll out and score first, or widen the policies that are replayed."
        raise InputError(cache.storage.root, "rows to replay", "an empty snapshot", do)
    survey = _Survey(cache, snapshot, Conditions(rows), threads, known)
    wanted = {POLICY: with_policy, PROMPT: group_rows > 1}
    survey.read({name for name, is_wanted in wanted.items() if is_wanted})
    if rows.max_lag is not None:
        survey.apply_lag(rows.max_lag)
    truncated = survey.apply_max_tokens(max_tokens, over_long)
    return survey.selection(group_rows, truncated)


class _Survey:
    """Every row of a snapshot, and why it is left out."""

    def __init__(
        self,
        cache: Cache,
        snapshot: Snapshot,
        conditions: Conditions,
        threads: int,
        known: Known | None,
    ) -> None:
        """Take the lengths from the commits."""
        self._root, self._shards = cache.storage.root, ShardColumns(cache, snapshot, known)
        self._conditions, self._threads = conditions, threads
        self._start = np.cumsum([0, *(commit.rows for commit in snapshot.commits)])
        self._lengths = np.concatenate([commit.row_lengths() for commit in snapshot.commits])
        self._reasons = (*conditions.names, LAG, "over_long", NO_POSITION)
        self._reason = np.full(snapshot.rows, -1, np.int32)
        """Index into _reasons; -1 of rows that are selected."""
        self._columns: Arrays = {}

    def read(self, wanted: set[str]) -> None:
        """Hold the filter against all rows, and keep the wanted columns."""
        needed = self._conditions.columns | wanted
        if not needed:
            self._apply(slice(None), {})
            return
        for name, dtype in ((POLICY, np.int64), (PROMPT, np.uint64)):
            if name in needed:
                self._columns[name] = np.empty(len(self._reason), dtype)

        def read_part(part: int) -> None:
            columns = self._shards.read(part, sorted(needed))
            own = slice(self._start[part], self._start[part + 1])
            self._apply(own, columns)
            for name, kept in self._columns.items():
                kept[own] = columns[name]

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(read_part, range(len(self._start) - 1)))

    def apply_lag(self, max_lag: int) -> None:
        """Leave out rows too far behind the newest policy, or of an unknown one."""
        policy = self._columns[POLICY]
        self._leave_out((policy < 0) | (policy.max() - policy > max_lag), LAG)

    def apply_max_tokens(self, max_tokens: int, over_long: str) -> int:
        """Deal with longer rows; how many are truncated."""
        over = np.flatnonzero((self._reason < 0) & (self._lengths[:, 0] > max_tokens))
        if not len(over):
            return 0
        if over_long == "refuse":
            longest = self._lengths[over, 0].max()
            where = f"{self._root}, replay.max_tokens"
            expected = f"at least the longest row's {longest} tokens"
            got = f"{max_tokens}, and {len(over)} rows have more"
            do = "Raise it, or set replay.over_long to 'truncate' or 'skip'."
            raise InputError(where, expected, got, do)
        if over_long == "skip":
            self._reason[over] = self._reasons.index("over_long")
            return 0
        positions = self._positions_within(over, max_tokens)
        self._lengths[over, 0] = max_tokens
        self._lengths[over, 2] = positions
        self._reason[over[positions == 0]] = self._reasons.index(NO_POSITION)
        return int(np.count_nonzero(positions))

    def selection(self, group_rows: int, truncated: int) -> Selection:
        """The rows that are left."""
        rows = np.flatnonzero(self._reason < 0).astype(np.int64)
        counts = np.bincount(self._reason[self._reason >= 0], minlength=len(self._reasons))
        left_out = {
            name: int(count) for name, count in zip(self._reasons, counts, strict=True) if count
        }
        if not len(rows):
            reasons = ", ".join(f"{count} by {name}" for name, count in left_out.items())
            got = f"none of {len(self._reason)}; left out: {reasons}"
            do = "Widen the filter, or raise replay.max_tokens."
            raise InputError(self._root, "rows to replay", got, do)
        policy = self._columns.get(POLICY)
        return Selection(
            rows=rows,
            lengths=self._lengths[rows],
            policy=None if policy is None else policy[rows],
            unit_start=self._units(rows, group_rows),
            left_out=left_out,
            truncated=truncated,
            newest_policy=-1 if policy is None else int(policy.max()),
        )

    def _units(self, rows: np.ndarray, group_rows: int) -> np.ndarray:
        index = np.arange(len(rows) + 1)
        if group_rows == 1:
            return index
        part, prompt = self._part_of(rows), self._columns[PROMPT][rows]
        is_first = np.ones(len(rows), bool)
        is_first[1:] = (part[1:] != part[:-1]) | (prompt[1:] != prompt[:-1])
        in_run = index[:-1] - np.maximum.accumulate(np.where(is_first, index[:-1], 0))
        return np.append(np.flatnonzero(in_run % group_rows == 0), len(rows))

    def _apply(self, own: slice, columns: Arrays) -> None:
        reason = self._reason[own]
        for name, is_held in self._conditions.held(self._lengths[own], columns):
            reason[(reason < 0) & ~is_held] = self._reasons.index(name)

    def _leave_out(self, is_left_out: np.ndarray, name: str) -> None:
        self._reason[(self._reason < 0) & is_left_out] = self._reasons.index(name)

    def _positions_within(self, rows: np.ndarray, max_tokens: int) -> np.ndarray:
        """(rows,) int64: positions among the first tokens of each row."""
        tokens, prompt, positions = self._lengths[rows].astype(np.int64).T
        within: np.ndarray = np.maximum(max_tokens - prompt, 0)
        is_masked = (tokens > prompt + positions) & (within > 0)
        within[is_masked] = self._counted(rows[is_masked], max_tokens)
        return within

    def _counted(self, rows: np.ndarray, max_tokens: int) -> np.ndarray:
        """(rows,) int64: scored ones among the first tokens of each row, by its shard's mask."""
        part, spans = self._part_of(rows), self._spans(rows, max_tokens)
        at = rows - self._start[part]
        own = {of: np.flatnonzero(part == of) for of in np.unique(part).tolist()}
        jobs: list[tuple[int, np.ndarray]] = []
        for of, some in own.items():
            new = some[self._shards.counted(of)[at[some]] == UNCOUNTED]
            jobs += [(of, new[i : i + SPANS]) for i in range(0, len(new), SPANS)]
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda job: self._shards.count(job[0], at[job[1]], spans[job[1]]), jobs))
        found = np.empty(len(rows), np.int64)
        for of, some in own.items():
            found[some] = self._shards.counted(of)[at[some]]
        return found

    def _spans(self, rows: np.ndarray, max_tokens: int) -> np.ndarray:
        """(rows, 2) int64: where the completion of each row begins among the tokens of its shard,
        and its first tokens end."""
        ends = np.cumsum(self._lengths[:, 0], dtype=np.int64)
        starts = ends - self._lengths[:, 0]
        start = starts[rows] - starts[self._start[self._part_of(rows)]]
        return np.stack([start + self._lengths[rows, 1], start + max_tokens], axis=1)

    def _part_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._start, rows, side="right") - 1


def _check_settings(max_tokens: int, over_long: str, group_rows: int) -> None:
    if over_long not in OVER_LONG:
        raise ConfigError("replay.over_long", f"one of {OVER_LONG}", repr(over_long), "Correct it.")
    if min(max_tokens, group_rows) < 1:
        got = f"{max_tokens} and {group_rows}"
        raise ConfigError("replay.max_tokens, group_rows", "at least 1", got, "Raise them.")
