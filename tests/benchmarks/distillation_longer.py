"""Whether a teacher leads still where training is many times as long: to a file of its own.

The images of ``distillation.py`` and their mirror images, for EPOCHS epochs; the teachers are asked
about both. Each contender trains at the best of three learning rates on the held-out sixth, with
the other settings that it has there.
"""

from functools import partial

import torch
from distillation import choose, settings, student
from distillation_lab import Record, laboratory, scored

from structopt import distillation
from structopt.data import Examples

EPOCHS, RATES = 40, (0.02, 0.04, 0.08)


def main() -> None:
    lab, shorter = laboratory(__doc__)
    record = Record(lab.device, lab.quick, "longer-distillation")
    whole = lab.train
    inputs = torch.cat([whole.inputs, whole.inputs.flip(-1)])
    lab.train = Examples(inputs, whole.targets.repeat(2), whole.classes)
    lab.cached = distillation.cache_outputs(lab.teachers, lab.train.to(lab.device))
    for method in ("labels", "label smoothing", "standardised_logits"):
        tries = [{**settings(lab, shorter, method), "lr": lr} for lr in RATES]
        given = choose(lab, record, "rates tried", method, tries, EPOCHS)
        for epochs in (EPOCHS, 2 * EPOCHS) if method == "labels" else (EPOCHS,):
            taught = partial(student, lab, method, given, epochs)
            row = method if epochs == EPOCHS else f"{method}, twice as long"
            notes = {"images": len(lab.train), "epochs": epochs, "settings": given}
            record.scores("methods", row, partial(scored, lab, taught), **notes)


if __name__ == "__main__":
    main()
