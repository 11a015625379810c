"""Tasks: what is asked and when an answer is right; one file per task, found by name."""

from cmai_fast.tasks.choices import answer_kind, with_choices
from cmai_fast.tasks.task import TASKS, Task, posed, ranks, task, task_over

__all__ = ["TASKS", "Task", "answer_kind", "posed", "ranks", "task", "task_over", "with_choices"]
