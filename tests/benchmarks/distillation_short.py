"""Whether a teacher is worth a whole point in a short training: to a file of its own.

The images, the teachers and the EPOCHS of ``distillation.py``. There most methods train at the rate
that suits labels alone; here the two baselines, with mirror images or without, and two methods
each choose among all of their candidates at four learning rates, by the mean of SEEDS_TRIED seeds
on the held-out sixth. Test images are seen by the final runs alone; of the baselines the second
choice has a final run too, so that no unlucky choice of theirs makes the gain.
"""

from functools import partial

from distillation import EPOCHS, choose, each, sizes, student
from distillation_lab import Record, laboratory, scored

from structopt import networks

RATES = (0.04, 0.08, 0.16, 0.32)
SEEDS_TRIED = (0, 1)
CANDIDATES = {
    "labels": [{}, {"flip": True}],
    "label smoothing": [*each("smoothing", (0.1, 0.2)), {"smoothing": 0.1, "flip": True}],
    "standardised_logits": [{"temperature": 1, "weight": 9.0, "label_weight": 0.1}],
    "correlations": each("weight", (2.0, 6.0), temperature=4),
}
PLAIN = ("labels", "label smoothing")
TWICE = (*PLAIN, "correlations")


def main() -> None:
    lab, _ = laboratory(__doc__)  # the record is the other file's
    record = Record(lab.device, lab.quick, "short-distillation")
    record.result |= {
        "parameters": sizes(lab.teachers[0], networks.StudentNet()),
        "training images": len(lab.train),
    }
    for method, found in CANDIDATES.items():
        tries = [{**given, "lr": lr} for given in found for lr in RATES]
        given = choose(lab, record, "tried", method, tries, EPOCHS, SEEDS_TRIED)
        rows = {method: (given, EPOCHS)}
        if method in PLAIN:
            second = record.result["tried"][method][1]["settings"]
            rows[f"{method}, second choice"] = (second, EPOCHS)
        if method in TWICE:
            rows[f"{method}, twice as long"] = (given, 2 * EPOCHS)
        for row, (settings, epochs) in rows.items():
            taught = partial(student, lab, method, settings, epochs)
            notes = {"epochs": epochs, "settings": settings}
            record.scores("methods", row, partial(scored, lab, taught), **notes)


if __name__ == "__main__":
    main()
