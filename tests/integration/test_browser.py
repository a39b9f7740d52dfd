"""What a browser shows of two real runs: TensorBoard's dashboards, the report, the comparison, and the documentation site."""

import importlib.util
import json
import os
import shutil
import struct
import urllib.request
from pathlib import Path

import pytest

from prunadapt_ds.commands import compare
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments
from tests.integration.test_board import ask, server
from tests.integration.test_site import site  # noqa: F401
from tests.tiny import tiny_data, tiny_folder

pytestmark = pytest.mark.full
WIDTHS = {"phone": 390, "desktop": 1280}
GROUPS = {"train", "eval", "pruning", "distillation", "efficiency", "result"}
PATIENCE = 60_000  # milliseconds that a dashboard may take to draw, on a busy machine


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of two runs that differ in their sparsity, and their comparison."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_folder(folder / "bert", "bert")
    tiny_data(folder / "data", n_train=64, n_dev=40)
    for sparsity in (0.3, 0.6):
        options = {"batch": 8, "max_steps": 12, "logging_steps": 2, "eval_steps": 4, "num_decisions": 3}
        argv = arguments(
            folder,
            folder / "out" / str(sparsity),
            model_name_or_path=folder / "bert",
            train_file=folder / "data" / "train.csv",
            validation_file=folder / "data" / "validation.csv",
            target_sparsity=sparsity,
            **options,
        )
        assert run_ranks(runs.whole_run, 1, argv) == [0]
    assert compare.main([str(folder / "out"), "--output_dir", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install -c constraints.txt -e '.[full]'")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, request):
    """Opens an address: (page, what it asked the network for beyond it). With PRUNADAPT_SCREENSHOTS=DIR a picture stays."""
    pages = []

    def open_page(address, width=1280, wait_for=None):
        page = browser.new_page(viewport={"width": width, "height": 1000})
        asked = []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(address)
        if wait_for:
            page.get_by_text(wait_for).first.wait_for(timeout=PATIENCE)
        page.wait_for_timeout(500)
        pages.append(page)
        if folder := os.environ.get("PRUNADAPT_SCREENSHOTS"):
            name = f"{request.node.name}-{len(pages)}".translate(dict.fromkeys(map(ord, "/[]:"), "_"))
            page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
        own = (address.split("#")[0], "data:", "blob:")
        return page, [url for url in asked if not url.startswith(own)]

    yield open_page
    for page in pages:
        page.close()


# --------------------------------------------------------------------------------------------------- TensorBoard


@pytest.fixture(scope="module")
def board(finished):
    with server(finished) as address:
        ask(f"{address}/data/plugin/", 180)
        yield address


def get(address, values=None):
    data = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_the_server_lists_every_group(board):
    found = ask(f"{board}/data/plugin/", 60)
    for run in ("0.3/runs", "0.6/runs"):
        assert {tag.split("/")[0] for tag in found["scalars"][run]} == GROUPS
        assert {"pruning/importance", "pruning/kept"} == set(found["images"][run])
        assert "pruning/gates" in found["histograms"][run] and "config/text_summary" in found["text"][run]
    pictures = get(f"{board}/data/plugin/images/images?run=0.6%2Fruns&tag=pruning%2Fkept&sample=0")
    assert len(pictures) == 3, "one for every decision"
    with urllib.request.urlopen(f"{board}/data/plugin/images/individualImage?{pictures[-1]['query']}") as reply:
        header = reply.read(24)
    assert struct.unpack(">I", header[16:20])[0] >= 900, "pixels"


def test_the_layout_draws_tags_that_this_run_wrote(board):
    (category,) = get(f"{board}/data/plugin/custom_scalars/layout")["category"]
    tags = {tag for chart in category["chart"] for tag in chart["multiline"]["tag"]}
    assert len(category["chart"]) == 5 and tags <= set(ask(f"{board}/data/plugin/", 60)["scalars"]["0.6/runs"])


def test_the_table_of_runs_has_options_and_measures(board):
    asked = {"experimentName": "", "hparamsLimit": 0, "includeMetrics": True}
    table = get(f"{board}/data/plugin/hparams/experiment", asked)
    shown = [info["name"] for info in table["hparamInfos"]][:5]
    assert {"method", "target_sparsity"} <= set(shown), shown
    assert {"method", "seed", "r"} <= {info["name"] for info in table["hparamInfos"]}
    measures = {"result/score", "result/sparsity", "result/train_seconds", "result/parameters_of_dense"}
    assert measures <= {info["name"]["tag"] for info in table["metricInfos"]}


def test_time_series(board, opened):
    page, elsewhere = opened(f"{board}/#timeseries", wait_for="distillation/weight")
    for group in sorted(GROUPS):
        assert page.get_by_text(group, exact=True).count(), group
    assert page.get_by_text("0.6/runs").count() and not elsewhere


def test_custom_scalars(board, opened):
    page, elsewhere = opened(f"{board}/#custom_scalars", wait_for="memory (MiB)")
    for name in ("score", "sparsity", "speed", "loss", "memory (MiB)"):
        assert page.get_by_text(name, exact=True).first.is_visible(), name
    page.get_by_text("Matches (4)").first.wait_for(timeout=PATIENCE)  # two lines of two runs in one chart
    assert not elsewhere


def test_images(board, opened):
    page, elsewhere = opened(f"{board}/#images", wait_for="pruning/kept")
    pictures = page.locator("tf-image-loader img")
    pictures.nth(3).wait_for(timeout=PATIENCE)  # two of each run
    page.wait_for_timeout(1500)
    assert all(p.evaluate("i => i.complete && i.naturalWidth") >= 900 for p in pictures.all()) and not elsewhere


def test_histograms(board, opened):
    page, elsewhere = opened(f"{board}/#histograms", wait_for="pruning/gates")
    drawn = page.locator("tf-histogram-loader")
    drawn.nth(5).wait_for(timeout=PATIENCE)  # gates, heads and neurons of two runs
    for tag in ("pruning/gates", "pruning/log10_scores_heads", "pruning/log10_scores_neurons"):
        assert page.get_by_text(tag).count(), tag
    assert drawn.first.locator("vz-histogram-timeseries").count() and not elsewhere


def test_text(board, opened):
    page, elsewhere = opened(f"{board}/#text", wait_for="target_sparsity")  # the configuration itself
    page.locator("tf-text-loader").nth(3).wait_for(timeout=PATIENCE)  # two configurations of two runs are open
    page.locator("tf-category-paginated-view button.heading", has_text="plan").click()
    page.locator("tf-text-loader").nth(5).wait_for(timeout=PATIENCE)
    for words in ("ds_config", "zero_optimization", "plan"):
        assert page.get_by_text(words).count(), words
    assert not elsewhere


def test_hparams(board, opened):
    page, elsewhere = opened(f"{board}/#hparams", wait_for="TABLE VIEW")
    page.get_by_text("0.6/runs").first.wait_for(timeout=PATIENCE)
    heads = [text for text in page.locator("vaadin-grid-cell-content").all_inner_texts() if text.strip()]
    assert "target_sparsity" in heads and "result/score" in " ".join(heads) and not elsewhere


# ---------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("name", ["0.6/report.html", "compare.html"])
def test_our_pages(finished, opened, name, device):
    page, elsewhere = opened((finished / name).as_uri(), WIDTHS[device])
    assert not elsewhere
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device]
    images = page.locator("img").all()
    assert len(images) >= 3 and all(len(image.get_attribute("alt")) > 10 for image in images)
    assert all(image.evaluate("i => i.complete && i.naturalWidth > 0") for image in images)
    if name.startswith("0.6"):
        for table in ("Scores", "Costs"):  # the last column, which is the result, needs no scrolling
            box = page.get_by_role("region", name=table)
            assert box.evaluate("b => b.scrollWidth <= b.clientWidth"), table


@pytest.mark.parametrize("device", WIDTHS)
def test_the_documentation(site, opened, device):  # noqa: F811
    for name in ("method", "commands", "python", "operations"):
        page, elsewhere = opened((site / name / "index.html").as_uri(), WIDTHS[device])
        assert not [url for url in elsewhere if not url.startswith(site.as_uri())]
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[device], name
