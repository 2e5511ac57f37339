"""What Jupyter Book does not do by itself: a book without a network, buttons from one setting."""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

BUTTONS = {
    "notebook_interface": "jupyterlab",
    "binderhub_url": "https://mybinder.org",
    "colab_url": "https://colab.research.google.com",
}
# A chapter is edited where it was written: in its text, not in the notebook made of it.
EDIT = (
    "{address}/edit/{branch}/book/"
    "{{{{ file_name | replace('chapters/', 'src/') | replace('.ipynb', '.md') }}}}"
)


def show_buttons(app: Sphinx, config: Config) -> None:
    """Colab, Binder, the repository and "edit this page", once the address is known."""
    options = config.html_theme_options
    address = (options.get("repository_url") or "").rstrip("/").removesuffix(".git")
    if not address:
        options.update(launch_buttons={}, repository_url="")
        return
    branch = options.get("repository_branch") or "main"
    options.update(
        launch_buttons=dict(BUTTONS),
        repository_url=address,
        path_to_docs="book",
        use_repository_button=True,
        use_edit_page_button=True,
    )
    config.html_context["edit_page_url_template"] = EDIT.format(address=address, branch=branch)
    config.html_context["edit_page_provider_name"] = "GitHub"


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """One script of MathJax beside the pages: equations are drawn with no network."""
    if error or app.builder.format != "html":
        return
    found = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static")
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(str(found)) / "mathjax" / "tex-svg.js", target / "tex-svg.js")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", show_buttons)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
