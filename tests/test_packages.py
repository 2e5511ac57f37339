"""The wheel and the sdist hold all that a reader needs, outside this checkout too."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SMOKE = """\
import sys
from importlib.metadata import version
import structopt
assert structopt.__file__.startswith(sys.prefix), structopt.__file__
assert version("structopt-torch") == structopt.__version__
from structopt import data, descent, measure, networks, training
train, test = data.fashion_mnist()
net = networks.StudentNet()
few = train[:256]
rule = descent.fused_adamw(net, lr=0.01)
training.train(net, data.batches(few, 64), training.supervised(), rule, epochs=1)
assert 0 <= training.evaluate(net, test[:100]) <= 1
print(measure.cost(net, test.inputs[:1]).parameters)
"""


@pytest.mark.slow
def test_wheel_and_sdist_install_into_an_empty_environment_and_work(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "structopt", source / "structopt", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", tmp_path]
    run(sys.executable, *build, source)  # the sdist from the sources, the wheel from the sdist
    (wheel,), (sdist,) = list(tmp_path.glob("*.whl")), list(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"py.typed", "LICENSE", "fashion_mnist.xz"} <= names
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty/bin/python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # torch is borrowed from here; a folder on the path has no .pth files read, so not our checkout.
    (own / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    for package in (wheel, sdist):
        options = [
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--force-reinstall",
            "--quiet",
        ]
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, package)
        assert run(python, "-W", "error", "-c", SMOKE).strip() == "3778"
