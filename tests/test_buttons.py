"""One setting, the repository's address, decides about every link into the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/someone/some-book"


def built(folder: Path, address: str) -> dict[str, list[str]]:
    """A book of a page and a chapter, with our settings: the links in the bar above each page."""
    book = folder / "book"
    (book / "chapters").mkdir(parents=True)
    for name in ("ext", "inventories", "static"):
        shutil.copytree(ROOT / "book" / name, book / name)
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    settings["repository"]["url"] = address  # whatever the real one is by now
    (folder / "_config.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (book / "references.bib").touch()
    (book / "page.md").write_text("# A page\n\nText.\n")
    cells = [nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell("1 + 1")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, book / "chapters" / "01_first.ipynb")
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: page\nchapters:\n  - file: chapters/01_first\n"
    )
    command = "from jupyter_book.cli.main import main; main()"
    words = ["build", str(book), "-W", "--keep-going", "-n", "-q"]
    done = subprocess.run([sys.executable, "-c", command, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        name: [
            str(link["href"])
            for link in BeautifulSoup(
                (folder / "_build/html" / f"{name}.html").read_text(encoding="utf-8"), "html.parser"
            ).select(".bd-header-article a[href]")
        ]
        for name in ("page", "chapters/01_first")
    }


@pytest.mark.slow
@pytest.mark.parametrize("address", [ADDRESS, f"{ADDRESS}/", f"{ADDRESS}.git"])
def test_with_an_address_each_page_leads_to_its_own_source(tmp_path: Path, address: str) -> None:
    links = built(tmp_path, address)
    assert ADDRESS in links["page"]
    assert f"{ADDRESS}/edit/main/book/page.md" in links["page"]
    assert not any("colab" in link or "mybinder" in link for link in links["page"])
    chapter = links["chapters/01_first"]
    assert f"{ADDRESS}/edit/main/book/src/01_first.md" in chapter
    where = "someone/some-book/blob/main/book/chapters/01_first.ipynb"
    assert f"https://colab.research.google.com/github/{where}" in chapter
    binder = "https://mybinder.org/v2/gh/someone/some-book/main"
    assert f"{binder}?urlpath=lab/tree/book/chapters/01_first.ipynb" in chapter


@pytest.mark.slow
def test_without_an_address_no_button_leads_out_of_the_book(tmp_path: Path) -> None:
    links = built(tmp_path, "")
    assert [link for page in links.values() for link in page if "://" in link] == []
