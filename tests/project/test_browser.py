"""JupyterLab for real: a headless Chromium opens it, runs notebooks 03 and 06 from cached runs and looks at
the figures; and the report, at the width of a laptop and of a phone.

Run by `make browser`. It costs 51 MB to download for playwright (165 MB on disk) and, from the system's packages, Chromium
(113 MB to download, about 350 MB on disk); so neither is a dependency, and where either is missing this is skipped by name.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from vlsafe.core.schema import MEDIAN_SEED
from vlsafe.publish import report

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make browser` installs it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROJECT = Path(__file__).parents[2]
RUNS = PROJECT / "runs"
SEED = RUNS / "mini" / "mini-chat" / f"seed{MEDIAN_SEED}"
PICTURES = PROJECT / "build" / "browser"
SETTINGS = {  # a cell that is not on the screen must be in the page too; no news over the notebook
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
FLAGS = [
    *"--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking".split(),  # noqa: SIM905
    *"--disable-component-update --no-first-run --disable-sync --disable-extensions".split(),  # noqa: SIM905
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]


class Lab:
    """A JupyterLab on a free port of this machine, and what its API says."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.work, self.token, self.address = folder / "work", secrets.token_hex(16), f"http://127.0.0.1:{port}"
        self.work.mkdir()
        for name in ("Snakefile", "figures"):  # as in a clone, whose committed results a notebook opens with
            (self.work / name).symlink_to(PROJECT / name)
        places = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
        places |= {f"JUPYTERLAB_{kind}_DIR": str(folder / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
        for name, values in SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(values))
        options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0".split()
        options += [f"--ServerApp.root_dir={self.work}", f"--IdentityProvider.token={self.token}"]
        options += ["--LabApp.extension_manager=readonly"]
        options += ["--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
        self.log = open(folder / "lab.log", "w")  # noqa: SIM115
        environment = {**os.environ, **places, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=self.log, stderr=self.log, cwd=self.work
        )
        wait(lambda: self.ask("status"), 60, f"JupyterLab does not answer; see {self.log.name}")

    def ask(self, what, method="GET"):
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.address}/api/{what}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.loads(answer.read() or "null")
        except OSError:
            return None

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            self.log.close()


def wait(until, seconds, otherwise):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := until():
            return found
        time.sleep(0.3)
    raise AssertionError(otherwise)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    if not (SEED / "examination" / "instruct.filtered-full.json").exists():
        pytest.skip("no cached runs of mini-chat in runs/; `make reproduce` makes them")
    running = Lab(tmp_path_factory.mktemp("lab"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium; install your system's package `chromium`")
    with sync_api.sync_playwright() as play, play.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as opened:
        yield opened


def opened(lab, browser, name, notebook):
    """A page with a notebook in it, its kernel idle."""
    nbformat.write(notebook, lab.work / name)
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.goto(f"{lab.address}/lab/tree/{name}?token={lab.token}&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)

    def idle():
        sessions = [one for one in (lab.ask("sessions") or []) if one["path"] == name]
        return sessions and sessions[0]["kernel"]["execution_state"] == "idle" and sessions[0]["kernel"]["connections"] > 0

    wait(idle, 60, "the kernel does not become idle")
    return page


def prompts(page):
    return [text.strip() for text in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()]


def run_all(page, seconds):
    """Click until it is taken (a click that comes too early is swallowed), then wait until every cell has its number."""
    for _ in range(5):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        time.sleep(2)
        if set(prompts(page)) != {"[ ]:"}:
            break
    wait(lambda: all(text[1:-2].isdigit() for text in prompts(page)), seconds, f"cells were not run: {prompts(page)}")


def cleared(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source = cell.source.replace('root = ""', f"root = {str(RUNS)!r}")
    return notebook


def fresh(code):
    """A notebook of one cell that names its kernel; JupyterLab would ask for one else."""
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=kernel)


def seen(page, n):
    """`n` figures that the browser has really decoded."""
    found = page.locator(".jp-RenderedImage img")
    widths = "all => all.map(image => image.naturalWidth)"
    wait(lambda: found.count() >= n and min(found.evaluate_all(widths)) > 300, 60, f"not {n} figures")
    return found


def pictured(page, name):
    """Pictures of the screen as a laptop and as a phone show it."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for width, height in ((1280, 1400), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(1000)
        page.screenshot(path=PICTURES / f"{name}-{width}.png")


@pytest.mark.parametrize(("name", "figures"), [("03_safety_degradation", 2), ("06_merging", 2)])
def test_notebooks_run_in_jupyterlab_and_a_restart_loses_nothing(lab, browser, name, figures):
    page = opened(lab, browser, f"{name}.ipynb", cleared(PROJECT / "notebooks" / f"{name}.ipynb"))
    run_all(page, 400)
    first = seen(page, figures).evaluate_all("all => all.map(i => i.src.length)")
    answer = page.locator(".jp-RenderedMarkdown.jp-OutputArea-output").first
    assert answer.inner_text().startswith("The answer.") and "No results" not in answer.inner_text()
    page.keyboard.press("Control+b")  # the sidebar, which would leave a phone nothing
    answer.scroll_into_view_if_needed()
    pictured(page, name)
    page.set_viewport_size({"width": 1280, "height": 1400})
    kernel = next(one["kernel"]["id"] for one in lab.ask("sessions") if one["path"] == f"{name}.ipynb")
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells", exact=True).click()
    assert lab.ask(f"kernels/{kernel}/restart", "POST")
    time.sleep(2)
    run_all(page, 400)
    assert seen(page, figures).evaluate_all("all => all.map(i => i.src.length)") == first
    page.keyboard.press("Control+s")
    saved = lab.work / f"{name}.ipynb"
    code = lambda: [c for c in nbformat.read(saved, as_version=4).cells if c.cell_type == "code"]  # noqa: E731
    wait(lambda: all(cell.execution_count for cell in code()), 30, "the notebook was not saved with its outputs")
    assert not [out for cell in code() for out in cell.outputs if out.output_type == "error"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_folds_chooses_and_fits_a_phone(browser, tmp_path, scheme):
    file = report.report(PROJECT / "figures" / "mini", tmp_path / "report.html")
    assert file.stat().st_size < 3e6
    page = browser.new_page(viewport={"width": 1280, "height": 1400}, color_scheme=scheme)
    page.goto(file.as_uri())
    assert page.locator("nav a").count() == page.locator("h2").count() - 1  # provenance is no artefact
    widths = page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert len(widths) == len(list((PROJECT / "figures" / "mini").glob("F*.png"))) and min(widths) > 300
    table = page.locator("details table").first
    assert not table.is_visible()
    page.locator("details summary").first.click()
    assert table.is_visible()
    names = page.locator("#backbone option").all_inner_texts()[1:]
    rows = page.locator("#T09_claims ~ .table").first.locator("tbody tr")
    lines = rows.evaluate_all("all => all.map(row => row.innerText)")
    page.locator("#backbone").select_option(names[0])
    shown = rows.evaluate_all("all => all.filter(row => !row.hidden).map(row => row.innerText)")
    assert shown == [line for line in lines if names[0] in line or not any(name in line for name in names)]
    pictured(page, f"report-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # tables scroll by themselves
    page.close()


def test_the_chooser_draws_what_is_picked(lab, browser):
    asked = f"""from vlsafe.publish import sidebyside
from vlsafe.study.study import Study
study = Study.open("mini", "mini-chat", {MEDIAN_SEED}, {str(RUNS)!r})
sidebyside.choose(study, ["parent/aligned", "instruct/filtered-full"])"""
    page = opened(lab, browser, "choose.ipynb", fresh(asked))
    run_all(page, 120)
    drawn = page.locator("img.widget-image")
    wait(lambda: drawn.count() == 1, 60, "the chooser draws nothing")
    before = drawn.last.get_attribute("src")
    page.locator(".widget-dropdown select").nth(1).select_option(index=1)
    wait(lambda: drawn.count() == 2 and drawn.last.get_attribute("src") != before, 60, "picking a picture changes nothing")
    assert drawn.last.evaluate("image => image.naturalWidth") > 300
    pictured(page, "chooser")
    page.close()
