"""From columns to what the teacher reads, and from its answers to columns."""

from dataclasses import replace

import numpy as np

from stillroom.cache.part_arrays import part_arrays
from stillroom.cache.schema import UNUSED_ID
from stillroom.cache.score_rows import score_columns, score_rows
from tests.cache.fakes import dense_scores, make_rollout, make_table

ROWS = [
    make_rollout(
        rollout_id=2**64 - 1,
        prompt=[1, 2],
        completion=[3, 4, 5],
        scored=[0, 1, 1],
        extra_id=[[6], [7, 8], None],
        extra_behaviour_logprob=[[-1.0], [-2.0, -3.0], None],
    ),
    make_rollout(rollout_id=5, prompt=[9], completion=[10], teacher_prompt=[11, 12, 13]),
]


def test_each_row_gets_its_own_tokens_seed_and_ids() -> None:
    first, second = score_rows(part_arrays(make_table(ROWS), 2))
    assert first.token.tolist() == [1, 2, 3, 4, 5]
    assert first.targets.tolist() == [3, 4]
    assert first.extra_id is not None
    assert first.extra_id.tolist() == [[7, 8], [UNUSED_ID, UNUSED_ID]]
    assert first.seed == 2**64 - 1
    assert second.token.tolist() == [11, 12, 13, 10]
    assert second.targets.tolist() == [3]
    assert second.extra_id is not None
    assert second.extra_id.tolist() == [[UNUSED_ID, UNUSED_ID]]
    assert second.seed == 5


def test_rows_have_no_ids_where_the_cache_asks_for_none() -> None:
    assert [row.extra_id for row in score_rows(part_arrays(make_table(ROWS)))] == [None, None]


def test_columns_are_the_answers_end_to_end() -> None:
    answers = [dense_scores(np.eye(3)[:n], np.arange(n), 2) for n in (1, 3)]
    columns = score_columns(answers)
    assert columns["topk_id"].shape == (4, 2)
    assert columns["sampled_logprob"].shape == columns["topk_count"].shape == (4,)
    assert not [name for name in columns if name.startswith("extra")]
    extra = [
        replace(answer, extra_logprob=np.full((len(answer.topk_id), 2), -1, np.float16))
        for answer in answers
    ]
    assert score_columns(extra).keys() - columns.keys() == {"extra_logprob"}
