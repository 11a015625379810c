"""What is asked and when an answer is right: one file a task, found by name."""

from cmai_fast.tasks.task import TASKS, Task, task

__all__ = ["TASKS", "Task", "task"]
