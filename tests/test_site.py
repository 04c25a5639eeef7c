"""The site: it builds offline without a warning, links lead somewhere, the API page leaves nothing out."""

import html
import importlib
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ("sssd", "sssd.errors", "sssd.datastore", "sssd.hardware", "sssd.hf", "sssd.pictures")

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return out


def test_every_page_is_there_and_reachable(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    home = (site / "index.html").read_text()
    assert {f"{page}.html" for page in pages} <= set(re.findall(r'href="([\w.-]+\.html)"', home)) | {
        "index.html"
    }


def test_links_and_pictures_lead_somewhere(site):
    texts = {path.name: path.read_text() for path in site.glob("*.html") if path.name != "404.html"}
    anchors = {name: set(re.findall(r'(?:id|name)="([^"]+)"', text)) for name, text in texts.items()}
    checked = 0
    for name, text in texts.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            target, _, anchor = html.unescape(link).partition("#")
            target = urllib.parse.unquote(target) or name
            if re.match(r"\w+:", target):
                continue
            assert (site / target).exists(), f"{name}: {link}"
            if target in anchors and anchor not in ("", "__skip"):
                assert anchor in anchors[target], f"{name}: {link}"
            checked += 1
    assert checked > 300


def test_nothing_is_fetched_when_the_site_is_read(site):
    for page in site.glob("*.html"):
        fetched = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?://[^"]+)"', page.read_text())
        assert not fetched, page.name


def test_the_api_page_has_every_public_name(site):
    text = (site / "api.html").read_text()
    anchors = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="(sssd\.[\w.]+)"', text)}
    missing = []
    for module in MODULES:
        if module == "sssd.hf":
            pytest.importorskip("transformers")
        public = importlib.import_module(module)
        names = getattr(public, "__all__", None) or [name for name in dir(public) if name.endswith("Error")]
        missing += [
            f"{module}.{name}" for name in names if name not in anchors and callable(getattr(public, name))
        ]
    assert not missing
