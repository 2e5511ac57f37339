"""What Jupyter Book does not do by itself: a book without a network, buttons from one setting."""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from docutils.nodes import Element, reference
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.util.nodes import make_refnode

BUTTONS = {
    "notebook_interface": "jupyterlab",
    "binderhub_url": "https://mybinder.org",
    "colab_url": "https://colab.research.google.com",
}
ALIASES = ("Numbers",)  # private names of types, which signatures show and no page explains
# A chapter is edited where it was written: in its text, not in the notebook made of it.
EDIT = (
    "{address}/edit/{branch}/book/"
    "{{{{ file_name | replace('chapters/', 'src/') | replace('.ipynb', '.md') }}}}"
)


def show_buttons(app: Sphinx, config: Config) -> None:
    """Colab, Binder, the repository and "edit this page", once the address is known."""
    options = config.html_theme_options
    address = (options.get("repository_url") or "").rstrip("/").removesuffix(".git")
    config.nitpick_ignore = [*config.nitpick_ignore, *(("py:class", name) for name in ALIASES)]
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


def find_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> Element | None:
    """Link `Axes` as `matplotlib.axes.Axes`, and a class under its private path as the public one.

    Annotations of names that are imported for type checking alone arrive unqualified.
    """
    if node.get("refdomain") != "py":
        return None
    package, _, last = str(node["reftarget"]).rpartition(".")
    package = package.split(".")[0]

    def fits(name: str) -> bool:
        return name.split(".")[-1] == last and name.startswith(package)

    ours = env.domains["py"].objects
    if found := sorted(filter(fits, ours), key=len):
        entry = ours[found[0]]
        page = node["refdoc"]
        return make_refnode(app.builder, page, entry.docname, entry.node_id, content, found[0])
    known = InventoryAdapter(env).main_inventory
    links = {name: item[2] for kind in known.values() for name, item in kind.items()}
    if found := sorted(filter(fits, links), key=len):
        return reference("", "", content, internal=False, refuri=links[found[0]], reftitle=found[0])
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", show_buttons)
    app.connect("missing-reference", find_short_name)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
