"""Import a rollout made by hand and let a teacher score it: two turns of the student, a tool's
answer between them that is not scored, and a prompt that only the teacher is shown.

    python examples/import/by_hand.py TEACHER CACHE

TEACHER is the folder of a Hugging Face model, CACHE the folder of the cache to make.
"""

import sys

from transformers import AutoTokenizer

from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.cache.teacher import ScoreSpec, TeacherConfig, identity_of
from stillroom.cache.transformers_teacher import TransformersTeacher

QUESTION = "<|user|>What is 6 times 7?<|end|><|assistant|>"
HINT = "<|system|>The calculator is right.<|end|>"
TURNS = (
    ("calculate(6 * 7)<|end|>", 1),
    ("<|user|>The calculator says 42.<|end|><|assistant|>", 0),
    ("It is 42.<|end|>", 1),
)


def main(teacher: str, root: str) -> None:
    """Make a cache, import one rollout, score it and print the scores."""
    config, files = TeacherConfig(model=teacher, device="cpu"), inspect_model(teacher)
    cache = Cache.create(root, identity_of(files, config, ScoreSpec(topk=8)))
    tokenizer = AutoTokenizer.from_pretrained(teacher)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    token, scored = ids(QUESTION), [0] * len(ids(QUESTION))
    for text, by_student in TURNS:
        token += ids(text)
        scored += [by_student] * len(ids(text))
    row = {
        "token": token,
        "scored": scored,
        "teacher_prompt": ids(HINT + QUESTION),
        "finish_reason": "stop",
        "ends_with_stop": True,
        "x_reward": 1.0,
    }
    report = cache.add_rollouts([row])
    print(f"added {report.added}: {report.positions} of {len(token)} ids are to be scored")
    score(cache, TransformersTeacher(files, config))
    for part in report.added:
        arrays = cache.read(part)
        own = arrays["token"][arrays["scored"] == 1]
        for token_id, logprob in zip(own, arrays["sampled_logprob"], strict=True):
            print(f"{logprob:9.4f} nats  {tokenizer.decode([token_id])!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
