"""Metrics by name, one file per metric; accuracy and attack success, consistency, recall, detection, intervals."""

from cmai_fast.metrics.accuracy import accuracy, attack_success_rate, rejection_accuracy, worst_case
from cmai_fast.metrics.consistency import consistency
from cmai_fast.metrics.detection import auroc, roc_curve, threshold_at_fpr, threshold_interval, tpr_at_fpr
from cmai_fast.metrics.interval import bootstrap_interval
from cmai_fast.metrics.metric import METRICS, Metric, measure, metric
from cmai_fast.metrics.retrieval import recall_at

__all__ = [
    "METRICS",
    "Metric",
    "accuracy",
    "attack_success_rate",
    "auroc",
    "bootstrap_interval",
    "consistency",
    "measure",
    "metric",
    "recall_at",
    "rejection_accuracy",
    "roc_curve",
    "threshold_at_fpr",
    "threshold_interval",
    "tpr_at_fpr",
    "worst_case",
]
