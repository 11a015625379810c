"""Scores: accuracy and attack success, detection of adversarial inputs, intervals by bootstrap."""

from cmai_fast.metrics.accuracy import accuracy, attack_success_rate, rejection_accuracy, worst_case
from cmai_fast.metrics.detection import auroc, roc_curve, threshold_at_fpr, tpr_at_fpr
from cmai_fast.metrics.interval import bootstrap_interval

__all__ = [
    "accuracy",
    "attack_success_rate",
    "auroc",
    "bootstrap_interval",
    "rejection_accuracy",
    "roc_curve",
    "threshold_at_fpr",
    "tpr_at_fpr",
    "worst_case",
]
