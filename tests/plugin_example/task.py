"""A task: only the first letter of the answer has to be right."""

from cmai_fast.tasks import task


@task
class FirstLetter:
    name = "first-letter"
    label = "First letters"
    broken_below = 1.0

    def prompt(self, sample):
        return sample.prompt

    def score(self, prediction, sample):
        return float(any(prediction[:1] == reference[:1] for reference in sample.references))

    def metrics(self, predictions, samples):
        return {"letters": sum(map(self.score, predictions, samples)) / len(samples)}

    def wrong_answers(self, sample, others=()):
        return tuple(c for c in sample.choices if not self.score(c, sample))
