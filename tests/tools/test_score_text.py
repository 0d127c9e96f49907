"""What a run of the score job says of itself."""

from typing import Any

import pytest

from stillroom.cache.score import ScoreReport
from stillroom.tools.score_text import print_scored


def test_rates_and_the_model_s_share(capsys: pytest.CaptureFixture[str]) -> None:
    report = ScoreReport(["a", "b"], ["c"], positions=1000, teacher_s=4.0, work_s=5.0, model_s=3.5)
    print_scored(report)
    parts, model = capsys.readouterr().out.splitlines()
    assert parts == (
        "score: 2 parts, 1,000 positions in 4.0 s of the teacher (250 positions/s); "
        "1 parts scored by others meanwhile"
    )
    assert model.startswith("score: the teacher's model ran 70% of the time;")
    print_scored(ScoreReport())
    assert capsys.readouterr().out.count("\n") == 1
    print_scored(ScoreReport(too_long=["d", "e"]))
    assert "\nscore: 2 parts are not scored, such as d: they have rows" in capsys.readouterr().out


@pytest.mark.usefixtures("quiet_jobs")
def test_the_transformers_teacher_tells(
    tmp_path: Any, teacher_dir: Any, student_dir: Any, prompts_file: Any, run: Any
) -> None:
    root = ["--root", tmp_path / "cache"]
    teacher = ["--teacher.model", teacher_dir, "--teacher.device", "cpu"]
    sample = ["--prompts.source", prompts_file, "--sampler.max-new-tokens", 4]
    assert run("init", *root, *teacher, "--student", student_dir, "--topk", 8).status == 0
    assert run("rollout", *root, *sample).status == 0
    ran = run("score", *root, *teacher)
    assert ran.status == 0, ran.err
    share = ran.out.split("the teacher's model ran ")[1].split("%")[0]
    assert 0 < int(share) <= 100
