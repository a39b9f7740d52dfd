"""The documentation site builds without a warning, holds every option, and asks nothing of the network."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from prunadapt_ds import console
from prunadapt_ds.config import OPTIONS
from tests.conftest import ROOT

pytestmark = pytest.mark.ci
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -c constraints.txt -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


def page(site, name):
    return (site / name / "index.html").read_text()


def test_every_option_and_command_is_on_the_page(site):
    text = page(site, "commands")
    assert all(f"<code>--{name}</code>" in text for name in OPTIONS)
    assert all(f'id="{command.name}"' in text for command in console.COMMANDS)
    assert "usage: prunadapt export" in text and "usage: prunadapt compare" in text
    row = re.search(r"<td><code>--target_sparsity</code></td>\s*<td>(.*?)</td>", text)
    assert row[1] == "number, ≥ 0, &lt; 1"


def test_pages_that_lie_elsewhere_and_docstrings_are_there(site):
    assert "glue_all.sh" in page(site, "slurm") and "zero3_offload_cpu.json" in page(site, "deepspeed")
    assert 'href="../slurm/"' in page(site, "operations") and "<td><code>modernbert</code></td>" in page(site, "models")
    python = page(site, "python")
    assert 'id="prunadapt_ds.gates.attach"' in python and 'id="prunadapt_ds.budget.decide"' in python


def test_formulas_are_drawn_by_the_browser(site):
    text = page(site, "method")
    assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') == 6
    assert "arithmatex" not in text and "\\frac" not in text


def test_nothing_is_fetched_from_elsewhere(site):
    """Scripts, styles, pictures and fonts; a link that a reader may follow is another thing."""
    for path in site.rglob("*.html"):
        text = path.read_text()
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"?([^\s\">]+)", text)
        fetched += re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?([^\s\">]+)", text)
        fetched += re.findall(r"<link[^>]* href=\"?([^\s\">]+)[^>]* rel=\"?(?:stylesheet|preconnect|icon)", text)
        assert fetched and not [f for f in fetched if f.startswith(("http", "//"))], path.name
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", path.read_text()), path.name
