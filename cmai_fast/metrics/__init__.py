"""Metrics by name, one file per metric; accuracy and attack success, detection, bootstrap intervals."""

from cmai_fast.metrics.accuracy import accuracy, attack_success_rate, rejection_accuracy, worst_case
from cmai_fast.metrics.detection import auroc, roc_curve, threshold_at_fpr, threshold_interval, tpr_at_fpr
from cmai_fast.metrics.interval import bootstrap_interval
from cmai_fast.metrics.metric import METRICS, Metric, measure, metric

__all__ = [
    "METRICS",
    "Metric",
    "accuracy",
    "attack_success_rate",
    "auroc",
    "bootstrap_interval",
    "measure",
    "metric",
    "rejection_accuracy",
    "roc_curve",
    "threshold_at_fpr",
    "threshold_interval",
    "tpr_at_fpr",
    "worst_case",
]
