from __future__ import annotations

import pytest

from cmai_fast.data import Sample
from cmai_fast.metrics import METRICS
from cmai_fast.tasks import TASKS, Task

VQA = TASKS["vqa"]


def test_the_task_is_found_by_name_and_its_metrics_are_there():
    assert isinstance(VQA, Task) and "vqa" in TASKS and "choices" not in TASKS and "task" not in TASKS
    assert all(name in METRICS for name in VQA.metric_names)


def test_scores_and_metrics():
    samples = [Sample(0, (), "a?", ("red", "dark red")), Sample(1, (), "b?", ("3",))]
    assert [VQA.score(p, samples[0]) for p in ("Dark  Red", "reddish", "")] == [1.0, 0.0, 0.0]
    assert VQA.metrics(["RED", "4"], samples) == {"exact-match": 0.5}
    with pytest.raises(ValueError, match="0 predictions for 0 samples"):
        VQA.metrics([], [])
