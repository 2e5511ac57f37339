"""Learning from a teacher: each method is a loss, and a builder that makes an objective of it.

``from_logits(teacher, soft_targets, temperature=4.0)`` gives an objective for
:func:`structopt.training.train`. A teacher is a module, several, or outputs cached on disk; it is
asked in evaluation mode without a gradient, and left as it was. Losses are means over the batch;
where a temperature T divides logits they carry the factor T².
"""

from structopt.distillation.builders import from_features, from_logits, hints, together
from structopt.distillation.cache import Cached, cache_outputs
from structopt.distillation.contrast import contrast, contrastive
from structopt.distillation.diagnosis import Diagnosis, Finding, diagnose
from structopt.distillation.dreaming import dream, statistics_gap, total_variation
from structopt.distillation.features import attention_transfer, hint, similarity_preserving
from structopt.distillation.itself import MovingTeacher, born_again
from structopt.distillation.logits import (
    correlations,
    decoupled,
    logit_mse,
    soft_targets,
    standardised_logits,
)
from structopt.distillation.mutual import mutual, mutual_loss
from structopt.distillation.objective import Distillation, Term
from structopt.distillation.relations import relational_angle, relational_distance
from structopt.distillation.supervision import DeepSupervision, deep_supervision
from structopt.distillation.teachers import Lesson, Source, Teacher
from structopt.distillation.transformers import attention_scores, map_layers, token_relations
from structopt.distillation.tuning import Trial, Tuning, tune
from structopt.distillation.watching import Watch, watch

__all__ = [
    "Cached",
    "DeepSupervision",
    "Diagnosis",
    "Distillation",
    "Finding",
    "Lesson",
    "MovingTeacher",
    "Source",
    "Teacher",
    "Term",
    "Trial",
    "Tuning",
    "Watch",
    "attention_scores",
    "attention_transfer",
    "born_again",
    "cache_outputs",
    "contrast",
    "contrastive",
    "correlations",
    "decoupled",
    "deep_supervision",
    "diagnose",
    "dream",
    "from_features",
    "from_logits",
    "hint",
    "hints",
    "logit_mse",
    "map_layers",
    "mutual",
    "mutual_loss",
    "relational_angle",
    "relational_distance",
    "similarity_preserving",
    "soft_targets",
    "standardised_logits",
    "statistics_gap",
    "together",
    "token_relations",
    "total_variation",
    "tune",
    "watch",
]
