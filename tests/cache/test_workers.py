"""Workers: each finds which one it is, and the shares are whole and without overlap."""

import pytest

from stillroom.cache.errors import ConfigError
from stillroom.cache.workers import ALONE, WORLD_SIZE, Worker, find_worker

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "5"}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_piece_of_work_is_in_one_share(world_size: int) -> None:
    workers = [Worker(rank=rank, world_size=world_size) for rank in range(world_size)]
    names = [f"v000000-{i:016x}" for i in range(400)]
    owners = [[worker.rank for worker in workers if worker.owns(name)] for name in names]
    assert all(len(ranks) == 1 for ranks in owners)
    sizes = [sum(ranks == [rank] for ranks in owners) for rank in range(world_size)]
    assert min(sizes) > 400 / world_size / 2, "shares are about even"


@pytest.mark.parametrize(
    ("rank", "world_size", "environ", "expected"),
    [
        (None, None, {}, (0, 1)),
        (1, 3, {}, (1, 3)),
        (1, 3, TORCHRUN | SLURM, (1, 3)),
        (0, None, {WORLD_SIZE: "2"}, (0, 2)),
        (None, 1, {}, (0, 1)),
        (None, None, {WORLD_SIZE: "1"}, (0, 1)),
        (None, None, TORCHRUN, (3, 4)),
        (None, 4, TORCHRUN, (3, 4)),
        (None, None, SLURM, (1, 2)),
        (None, None, TORCHRUN | SLURM | KUBERNETES, (3, 4)),
        (None, None, SLURM | KUBERNETES, (1, 2)),
        (None, 8, KUBERNETES, (5, 8)),
        (None, None, KUBERNETES | {WORLD_SIZE: "6"}, (5, 6)),
        (None, 8, KUBERNETES | {WORLD_SIZE: "6"}, (5, 8)),
        (None, None, {"SLURM_PROCID": "0"}, (0, 1)),
        (None, None, {"SLURM_NTASKS": "4"}, (0, 1)),
        (None, 3, {"SLURM_PROCID": "2"}, (2, 3)),
        (None, None, {"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
    ],
)
def test_settings_come_before_launchers(
    rank: int | None, world_size: int | None, environ: dict[str, str], expected: tuple[int, int]
) -> None:
    found = find_worker(rank, world_size, environ)
    assert (found.rank, found.world_size) == expected


@pytest.mark.parametrize(
    ("rank", "world_size", "environ", "where"),
    [
        (1, None, {}, "rank: expected the number of workers with it; got none"),
        (1, None, TORCHRUN, "rank: expected the number of workers with it"),
        (None, 2, {}, "world_size: expected a rank, for 2 workers"),
        (None, None, {WORLD_SIZE: "2"}, f"{WORLD_SIZE}: expected a rank"),
        (None, None, {"RANK": "1"}, "RANK: expected the number of workers with it"),
        (None, None, {"WORLD_SIZE": "2"}, "WORLD_SIZE: expected RANK beside it"),
        (None, None, {"SLURM_PROCID": "1"}, "SLURM_PROCID: expected the number of workers"),
        (None, None, KUBERNETES, "JOB_COMPLETION_INDEX: expected the number of workers"),
        (None, 3, TORCHRUN, "world_size: expected 4, as RANK comes with; got 3"),
        (None, None, SLURM | {WORLD_SIZE: "3"}, f"{WORLD_SIZE}: expected 2, as SLURM_PROCID"),
        (2, 2, {}, "rank: expected 0 to 1; got 2"),
        (-1, 2, {}, "rank: expected 0 to 1; got -1"),
        (0, 0, {}, "world_size: expected 1 or more; got 0"),
        (None, None, {"RANK": "4", "WORLD_SIZE": "4"}, "rank: expected 0 to 3; got 4"),
        (None, None, {"RANK": "one", "WORLD_SIZE": "4"}, "RANK: expected a number, 0 or more"),
        (None, None, {"RANK": "-1", "WORLD_SIZE": "4"}, "RANK: expected a number, 0 or more"),
    ],
)
def test_what_is_incomplete_or_contradictory_is_refused(
    rank: int | None, world_size: int | None, environ: dict[str, str], where: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{where}"):
        find_worker(rank, world_size, environ)


def test_who_is_alone_owns_everything() -> None:
    assert all(ALONE.owns(f"part {i}") for i in range(50))
