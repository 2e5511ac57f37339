"""Run every benchmark of this folder; options go to each: ``python tests/benchmarks --quick``."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

for script in sorted(HERE.glob("*.py")):
    if script.stem not in {"__main__", "common", "distillation_lab"}:
        print(f"== {script.stem}", flush=True)
        subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=True)
