"""A metric: the mean length of the answers."""

from cmai_fast.metrics import metric


@metric("mean-length")
def mean_length(predictions, references):
    return sum(map(len, predictions)) / len(predictions)
