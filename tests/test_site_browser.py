"""The built site in headless Chromium: pages open without errors, fit a phone, and the search finds."""

import functools
import html
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from extras import needs

needs("sphinx", "furo", "myst_parser", "sphinx_gallery", "sphinx_copybutton")

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed"),
]
PAGES = ["index", "getting-started", "guide/memory", "paper", "results", "inside/heavy-ball", "api/timm_models"]
# A page in a frame as wide as a phone, which tells how many pixels stick out.
PHONE = """<!DOCTYPE html><iframe style="width:390px;height:800px;border:0" src="{page}.html"></iframe><script>
onload = () => {{
  const inner = document.querySelector("iframe").contentDocument.documentElement;
  document.body.dataset.beyond = inner.scrollWidth - inner.clientWidth;
}};
</script>"""


def build(folder):
    """Build the site from a copy of its sources, as ``make docs`` does."""
    ignored = shutil.ignore_patterns("_build", "__pycache__")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=ignored)
    shutil.rmtree(folder / "docs" / "examples", ignore_errors=True)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=ignored)
    shutil.copy(ROOT / "CHANGELOG.md", folder)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", "site"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    links = [sys.executable, ROOT / "docs" / "check_links.py", "site"]
    done = subprocess.run(links, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for page in PAGES:
        (folder / "site" / f"{page}-phone.html").write_text(PHONE.format(page=Path(page).name))
    (folder / "site" / "wide.html").write_text("<!DOCTYPE html><p style='width: 600px'>too wide")
    (folder / "site" / "wide-phone.html").write_text(PHONE.format(page="wide"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(once):
    """The address of the built site on this machine; the search reads pages, which a browser refuses for files."""
    site = once("site", build) / "site"
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browse(address, tmp_path):
    """Return a function that opens a page and gives the document as it is then, and what the console says."""

    def open_page(page):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"]
        done = subprocess.run([BROWSER, *options, f"{address}/{page}"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, re.findall(r"CONSOLE.*", done.stderr)

    return open_page


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_and_fits_a_phone(browse, page):
    dom, console = browse(f"{page}-phone.html")
    assert console == []
    assert 'data-beyond="0"' in dom


def test_a_page_that_does_not_fit_is_found(browse):
    assert 'data-beyond="0"' not in browse("wide-phone.html")[0]


def test_the_first_page_has_three_doors(browse):
    dom, console = browse("index.html")
    assert console == []
    assert len(re.findall(r'<div class="door docutils container">|<div class="docutils container door">', dom)) == 3


@pytest.mark.parametrize(("words", "page"), [("heavy+ball", "inside/heavy-ball.html"), ("resume", "faq.html")])
def test_the_search_finds(browse, words, page):
    dom, console = browse(f"search.html?q={words}")
    assert console == []
    found = dom.split('id="search-results"')[1].split("</ul>")[0]
    assert f'href="{page}' in html.unescape(found)
