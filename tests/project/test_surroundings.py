"""What surrounds the package: links of notebooks, nbval, ruff and hooks, model cards, progress, the fresh clone's script."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import official_files
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

from vlsafe import cli
from vlsafe.analysis.measures import MEASURES
from vlsafe.core import store
from vlsafe.publish import modelcards, notebooks
from vlsafe.study.graph import jobs
from vlsafe.study.study import Bar, Study

ROOT = Path(__file__).parents[2]
MAIN = "instruct/filtered-full"


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_every_notebook_leads_to_all_others(name):
    first = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source
    assert notebooks.with_links(name, first) == first, "run `make notebooks`"
    line = next(line for line in first.splitlines() if line.startswith(notebooks.LINKS))
    assert all((f"({other}.ipynb)" in line) == (other != name) for other in notebooks.NOTEBOOKS)


def test_links_are_put_below_the_title_once():
    once = notebooks.with_links("00_world", "# Title\n\nText.")
    assert once == f"# Title\n\n{notebooks.links('00_world')}\n\nText."
    assert notebooks.with_links("00_world", once.replace("[01]", "[99]")) == once


def test_outputs_that_need_a_kernel_or_speak_to_the_runner_are_not_taken_over(tmp_path):
    cell = nbformat.v4.new_code_cell("show()")
    source = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), cell])
    committed, executed = tmp_path / "00_world.ipynb", tmp_path / "done.ipynb"
    nbformat.write(source, committed)
    widget = nbformat.v4.new_output("display_data", {notebooks.DEAD: {}, "text/plain": "VBox"})
    told = [nbformat.v4.new_output("stream", name=name, text=name) for name in ("stdout", "stderr")]
    cell.outputs = [widget, *told]
    nbformat.write(source, executed)
    notebooks.adopt(executed, committed, {})
    done = nbformat.read(committed, as_version=4)
    assert [out.text for out in done.cells[1].outputs] == ["stdout"] and notebooks.LINKS in done.cells[0].source


@pytest.mark.parametrize(("printed", "failed"), [("1", 0), ("2", 1)])
def test_nbval_minds_what_a_checked_cell_prints_and_not_its_notes(printed, failed, tmp_path):
    cell = nbformat.v4.new_code_cell(f"import sys\nprint('a note', file=sys.stderr)\nprint({printed})", execution_count=1)
    cell.outputs, cell.metadata["tags"] = [nbformat.v4.new_output("stream", name="stdout", text="1\n")], ["nbval-check-output"]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    options = ["-q", "--nbval-lax", "--nbval-current-env", "-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, tmp_path, tmp_path], capture_output=True, text=True)
    assert f"{'1 failed' if failed else '1 passed'}" in done.stdout and done.returncode == failed, done.stdout


def test_ruff_reads_notebooks_and_ci_runs_what_it_should():
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--show-files", "."]
    read = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"{name}.ipynb" in read for name in notebooks.NOTEBOOKS)
    script = (ROOT / ".ci/run").read_text().replace("\\\n", "")
    steps = re.findall(r"^ *time (?:nice -n 3 )?make ([a-z-]+)", script, re.MULTILINE)
    assert steps == ["setup", "parts", "reproduce", "results", "nbval", "pocket-nano", "test", "processes", "loaded"]
    assert re.search(r"^\} > \S+ 2>&1 &\nbeside=\$!", script, re.MULTILINE)
    rules = set(re.search('TARGETS="(.+)"', script)[1].split())
    here = Study.open("mini", "mini-chat", None, ROOT / "runs")
    known = {"_".join([re.sub("[/.-]", "_", job[0]), "mini_chat", str(here.seed)]) for job in jobs(here)}
    known |= {f"notebook_{name}_mini_chat_{here.seed}" for name in notebooks.NOTEBOOKS}
    assert len(rules) == 6 and rules <= known


def test_hooks_fetch_nothing_and_call_what_is_there():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    for hook in hooks[0]["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")


def test_what_shares_a_study_is_in_one_process(begun, request):
    assert request.node.nodeid.endswith("@begun") or not getattr(request.config.option, "loadgroup", False)


def test_the_script_of_the_fresh_clone_is_sound():
    subprocess.run(["bash", "-n", ROOT / "tests" / "fresh.sh"], check=True)


def test_long_work_says_how_far_it_is_and_how_long_it_takes():
    bar = Bar("training", 10)
    bar.bar.start_t -= 20
    bar(4)
    assert re.search(r"training: +40%.* 4/10 \[00:20<00:3\d,", str(bar.bar))  # what is left after the sign
    bar(10)
    assert bar.bar.disable  # closed


@pytest.fixture(scope="module")
def content(study):
    return modelcards.card(study, MAIN)


def test_a_card_tells_lineage_data_safety_and_licences(study, content):
    data = ModelCard(content).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-text-to-text")
    for name in (*modelcards.lineage(study, MAIN), MAIN):
        assert study.run(name).digest in content
    raw = pd.read_parquet(study.folder(f"examination/{MAIN.replace('/', '.')}") / "raw.parquet")
    asr = raw[(raw["exam"] == "full") & (raw["benchmark"] == "sorry_bench") & (raw["judge"] == "world")]["event"].astype(float)
    told = next(result for result in data.eval_results if result.metric_type == "text_asr")
    assert told.metric_value == pytest.approx(asr.mean(), abs=1e-4) and told.metric_args["judge"] == "world"
    assert told.metric_args["low"] <= told.metric_value <= told.metric_args["high"] and told.metric_args["n"] == len(asr)
    line = next(line for line in content.splitlines() if line.startswith(f"| {MEASURES['text_asr']['label']} |"))
    assert f"| world | {100 * asr.mean():.0f} [" in line and "no link of the chain comes from elsewhere" in content


def test_a_card_of_what_was_not_examined_claims_nothing_and_without_weights_there_is_none(study, tmp_path):
    assert "nothing is claimed about its safety" in modelcards.card(study, "tower/clip")
    with pytest.raises(ValueError, match="shared/screen/filtered left no model"):
        modelcards.card(study, "screen/filtered")
    with pytest.raises(FileNotFoundError, match="is missing; `vlsafe stage safety/sl-lora`"):
        modelcards.card(dataclasses.replace(study, root=tmp_path), "safety/sl-lora")


def test_what_comes_from_elsewhere_stands_in_the_licence_chain(study):
    noted = store.manifest_of(study.run(MAIN))
    origin = SimpleNamespace(repo="someone/parent", kind="model", revision="abc", terms="accept the licence on its page")
    content = modelcards.render(noted, [], None, {"parent": origin})
    assert "- parent: someone/parent at abc; accept the licence on its page" in content
    assert ModelCard(content).data.license == "other" and ModelCard(content).data.base_model == ["someone/parent"]


def test_cards_stand_beside_the_runs_and_leave_them_as_they_were(study):
    before = {name: store.status(study.run(name), deep=True) for name in (MAIN, "guard/image", "parent/aligned")}
    assert modelcards.write_cards(study, list(before)) == [
        study.run(name).folder.with_name(f"{study.run(name).recipe}.card.md") for name in (MAIN, "parent/aligned")
    ]
    assert {name: store.status(study.run(name), deep=True) for name in before} == before == dict.fromkeys(before, "valid")
    assert json.loads(study.run(MAIN).receipt.read_text())["digest"] == study.run(MAIN).digest
    assert cli.main(["card", MAIN, "--scale", "nano", "--root", str(study.root)]) == 0


BASE = """
import importlib.util, sys

ABSENT = "torch transformers datasets trl peft accelerate papermill nbformat IPython ipywidgets snakemake".split()

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in ABSENT else found(name, package)
sys.meta_path.insert(0, Absent())

from vlsafe import cli

code = cli.main(sys.argv[1:])
print("torch" in sys.modules)
sys.exit(code)
"""


def base(*arguments):
    call = [sys.executable, "-c", BASE, *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_base_install_scores_rates_and_reports_without_any_model_library(tmp_path):
    """Where the extras are not installed: a benchmark is scored, doctor says what is lacking, a report is written."""
    official_files.everything(tmp_path)
    prompts = pd.read_csv(tmp_path / "xstest" / "xstest_prompts.csv")
    rows = [json.dumps({"id": str(name), "response": "I cannot help with that."}) for name in prompts["id"]]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    out = tmp_path / "scores.json"
    scored = base("score", "xstest", "--data", tmp_path, "--responses", tmp_path / "mine.jsonl", "--out", out)
    assert scored.returncode == 0 and out.exists() and scored.stdout.rstrip().endswith("False"), scored.stderr[-2000:]
    looked = base("doctor", "--scale", "mini")
    assert looked.returncode == 0 and "pip install '.[models]'" in looked.stdout, looked.stderr[-2000:]
    written = base("report", "--figures", "figures/mini", "--out", tmp_path / "report.html")
    assert written.returncode == 0 and (tmp_path / "report.html").stat().st_size < 3_000_000, written.stderr[-2000:]
    exported = base("human", "export", "--help")
    assert exported.returncode == 0, exported.stderr[-2000:]
