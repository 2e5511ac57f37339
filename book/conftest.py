"""nbval runs the notebooks in the surroundings in which they were made."""

import os

from notebooks import ENVIRONMENT

os.environ.update(ENVIRONMENT)
