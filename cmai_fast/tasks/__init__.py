"""Tasks: what is asked and when an answer is right; one file per task, found by name."""

from cmai_fast.tasks.choices import answer_kind, with_choices
from cmai_fast.tasks.task import TASKS, Task, task

__all__ = ["TASKS", "Task", "answer_kind", "task", "with_choices"]
