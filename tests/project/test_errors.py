"""What a user can get wrong on the command line, in a scale file and in a notebook's parameters.

Every mistake ends in one line that names the thing, the value and the remedy, and makes nothing. Add yours to the tables.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vlsafe import cli
from vlsafe.core import store
from vlsafe.core.presets import load_scale
from vlsafe.publish import notebooks
from vlsafe.study.study import Study

ROOT = Path(__file__).parents[2]
# Arguments -> the thing, the value, the remedy, as patterns that must all be found.
COMMANDS = {
    "stage world/corpora --scale mimi": ("scale", "'mimi'", "did you mean 'mini'"),
    "stage world/corpora --scale none.yaml": ("scale file", "'none.yaml'", "one of .*mini"),
    "stage world/corpora --backbone mini-chad": ("backbone", "'mini-chad'", "did you mean 'mini-chat'"),
    "stage world/corpora --seed -1": ("seed", "-1", "non-negative integer"),
    "stage world/corpora --seed one": ("--seed", "'one'", "int"),
    "stage world/corpora --root afile": ("run store", "'afile'", "root is a folder"),
    "stage world/corpra": ("stage", "'world/corpra'", "did you mean 'world/corpora'"),
    "fresh parent/alignd": ("stage", "'parent/alignd'", "did you mean 'parent/aligned'"),
    "card parent/alignd": ("stage", "'parent/alignd'", "did you mean 'parent/aligned'"),
    "card safety/sl-full --root empty": ("safety/sl-full", "missing", "`vlsafe stage safety/sl-full`"),
    "notebook 00_world --out notebooks/00_world.ipynb": ("--out", "00_world.ipynb", "choose another place"),
    "notebook 00_word --out o.ipynb": ("notebook", "'00_word'", "did you mean '00_world'"),
    "notebook 00_world --out o.ipynb": ("notebook", "00_world.ipynb", "where the Snakefile is"),
    "examine nobody/nothing": ("nobody/nothing at main", "is not here", "`hf download`"),
    "examine nothing --judges wildgard": ("nothing at main", "is not here"),
    "examine . --benchmarks xtest": ("benchmark", "'xtest'", "did you mean 'xstest'"),
    "probe nobody/nothing --parent b": ("nobody/nothing at main", "is not here"),
    "probe a": ("required", "--parent"),
    "notebooks --root empty": ("00_world.ipynb", "not executed", "`make reproduce`"),
    "gallery --root empty": ("examination", "no", "`make reproduce`"),
    "gallery --grid ful": ("--grid", "'ful'", "choose from .*full"),
    "gallery --backbones mini-chat mini-tolu": ("backbone", "'mini-tolu'", "did you mean 'mini-tulu'"),
    "sweep --backbones x": ("backbone", "'x'", "known: mini-chat"),
    "status --scale mimi": ("scale", "'mimi'", "did you mean 'mini'"),
    "golden --root empty": ("golden|world/corpora", "clean tree|not valid", "commit first|`make reproduce`"),
    "archive --root empty --out o": ("no run", "mini-chat seed 4", "`make reproduce`"),
    "unpack afile --root r": ("afile", "no archive of results", "`vlsafe archive`"),
    "readme": ("README.md", "no", "where the Snakefile is"),
    "agree instruct/filtered --serve x": ("run", "'instruct/filtered'", "did you mean 'instruct/"),
    "diff a b": ("folder of results", "a", "no CSV file"),
    "doctor --scale pocket": ("lacking", "pyrit", "`make parts`"),
    "download --scale pocket": ("'pocket'", "packages", "`make parts`"),
    "score sorry_bench --responses afile --data . --out o --judge sorry-bench --endpoint 127.0.0.1:1": (
        "server's address",
        "http://127.0.0.1:8000",
    ),
    "doctor --scale mimi": ("scale", "'mimi'", "did you mean 'mini'"),
    "download --scale paper --only caption": ("thing from outside", "'caption'", "did you mean 'captions'"),
    "dryrun --scale paper --gpu H10": ("GPU", "'H10'", "did you mean 'H100'"),
    "human import --key k.csv --out o f.csv": ("key", "k.csv", "`vlsafe human export`"),
    "merge lineer a b --ratio 0.5 --out o": ("merge rule", "'lineer'", "did you mean 'linear'"),
    "fisher afile rows.jsonl --out f": ("afile", "holds no model", "name its folder"),
    "published --figures none": ("none", "no results of models", "`vlsafe gallery`"),
    "report --figures none": ("ledger", "none", "`vlsafe gallery`"),
    "score xstest --responses r.jsonl --out o": ("official files", "where", "--data DIR"),
    "sttus": ("argument", "'sttus'", "choose from .*status"),
}
FILES = {
    "extends: [mini": ("scale.yaml", "not YAML", "line 1|column"),
    "a: 1": ("scale.yaml", "mapping", "'extends' .*mini"),
    "extends: mimi": ("scale", "'mimi'", "did you mean 'mini'"),
    "extends: mini\ninstruct: {step: 3}": ("scale.instruct", "'step'", "did you mean 'steps'"),
    "extends: mini\ninstruct: {steps: many}": ("scale.instruct.steps", "'many'", "int"),
    "extends: mini\ninstruct: 3": ("scale.instruct", "3", "mapping of its fields"),
    "extends: mini\ninstruct: {steps: 0}": ("scale.instruct", "steps=0", "at least one step"),
    "extends: mini\ntuning: {rollout: {generations: 1}}": ("scale.tuning.rollout", "generations=1", "at least two"),
    "extends: mini\nbackbones: {mini-chat: 3}": ("scale.backbones.mini-chat", "3", "mapping of its fields"),
    "extends: mini\nbackbones: {x: {template: tulu}}": ("backbones.x", "new", "which backbone it extends .*mini-chat"),
    "extends: mini\nbackbones: {x: {extends: mini-cat}}": ("backbone", "'mini-cat'", "did you mean 'mini-chat'"),
    "extends: mini\nbackbones: {mini-chat: {template: tullu}}": ("chat template of mini-chat", "'tullu'", "did you mean 'tulu'"),
    "extends: mini\nbackbones: {mini-chat: {language: {layer: 2}}}": ("mini-chat.language", "'layer'", "did you mean 'layers'"),
    "extends: mini\ninstruct: {saved: bfloat}": ("scale.instruct.saved", "'bfloat'", "did you mean 'bfloat16'"),
    "extends: mini\ninstruct: {dtype: fp32}": ("scale.instruct.dtype", "'fp32'", "known: bfloat16, float32"),
    "extends: mini\ninstruct: {schedule: cosin}": ("scale.instruct.schedule", "'cosin'", "did you mean 'cosine'"),
    "extends: mini\ntuning: {rollout: {reward: exakt}}": ("rollout.reward", "'exakt'", "did you mean 'exact'"),
    "extends: mini\ndevice: gpu": ("scale.device", "'gpu'", "known: .*cuda"),
    "extends: mini\nexam: {validation: 2.0}": ("exam.validation", "2.0", "share"),
    "extends: mini\nmerging: {ratios: [1.5]}": ("merging.ratios", "1.5", "from 0 to 1"),
    "extends: mini\nmerging: {ratios: [0.301, 0.304]}": ("merging.ratios", "0.301", "two digits"),
    "extends: mini\nmerging: {few: []}": ("merging.few", r"\(\)", "one or more"),
    "extends: mini\nmerging: {kept: 0.0}": ("merging.kept", "0.0", "above 0"),
    "extends: mini\nexam: {dtype: half}": ("scale.exam.dtype", "'half'", "known: bfloat16"),
    "extends: mini\nvision: {feature_strategy: ful}": ("feature_strategy", "'ful'", "did you mean 'full'"),
    "extends: mini\nsource: loaded": ("scale.source", "'loaded'", "did you mean 'load'"),
    "extends: paper\nloaded: {arms: [filterd]}\nbackbones: {mini-chat: {extends: tulu2}}\n": ("parent", "'mini-chat'", "known"),
    "extends: paper\nloaded: {arms: [filterd], parents: {mini-chat: {repo: a}}}\nbackbones: {mini-chat: {extends: tulu2}}": (
        "data arm",
        "'filterd'",
        "did you mean 'filtered'",
    ),
    "extends: mini\ncheckpoints: [a]": (r"scale.checkpoints\[0\]", "'a'", "int"),
    "extends: mini\ncheckpoints: 3": ("scale.checkpoints", "3", "a list"),
    "extends: mini\nrates: [0.4]": ("scale.rates", "0.4", "2 entries"),
    "extends: mini\nrates: [0.4, quick]": (r"scale.rates\[1\]", "'quick'", "float"),
    "extends: mini\ntuning: {milestones: [0.5, .nan]}": (r"milestones\[1\]", "nan", "finite"),
    "extends: mini\nbackbones: [a]": ("scale.backbones", "'a'", "mapping"),
    "extends: mini\nbackbones: {1: {extends: mini-chat}}": ("scale.backbones", "1", "no text; put it in quotes"),
    "extends: mini\nbackbones: {mini-chat: {answered_categories: [thefts]}}": ("category", "'thefts'", "did you mean 'theft'"),
    "extends: mini\nbackbones: {a/b: {extends: mini-chat}}": ("backbone's name", "'a/b'", "letters, digits"),
    "extends: mini\nname: ../../x": ("name", "'../../x'", "letters, digits"),
    "extends: mini\nname: mini\nthreads: 2": ("scale.yaml", "preset 'mini'", "another `name:`"),
    "extends: mini\nname: n\nthreads: 0": ("threads", "0", "at least 1"),
    "extends: mini\nname: n\nexam: {batch_size: 0}": ("exam.batch_size", "0", "at least 1"),
    "extends: mini\nname: n\nexam: {panel: -3}": ("exam.panel", "-3", "at least 1"),
    "extends: mini\nthreads: 2\nthreads: 3": ("scale.yaml", "'threads'", "there twice"),
    "extends: mini\ninstruct: {steps: 2, steps: 3}": ("scale.yaml", "'steps'", "there twice"),
}
PARAMETERS = {
    "sede": (1, ("parameter of 03_safety_degradation.ipynb", "'sede'", "did you mean 'seed'")),
    "scale": ("mimi", ("scale", "'mimi'", "did you mean 'mini'")),
    "backbone": ("mini-chad", ("backbone", "'mini-chad'", "did you mean 'mini-chat'")),
    "seed": ("0", ("seed", "'0'", "non-negative integer")),
    "root": (__file__, ("run store", "test_errors.py", "root is a folder")),
}


def says(told, patterns):
    assert "Traceback" not in told and len(told.strip().splitlines()[-1]) < 700
    for pattern in patterns:
        assert re.search(pattern, told.strip().splitlines()[-1]), (pattern, told)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that is not the project's, with a file where a folder is wanted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").touch()
    return tmp_path


@pytest.mark.parametrize("typed", COMMANDS)
def test_commands(typed, elsewhere, capsys):
    try:
        code = cli.main(typed.split())
    except SystemExit as left:
        code = left.code
    assert code == 2
    says(capsys.readouterr().err, COMMANDS[typed])
    assert {path.name for path in elsewhere.iterdir()} == {"afile"}


def test_every_command_is_among_them():
    commands = next(action.choices for action in cli._parser()._actions if action.choices)
    assert {typed.split()[0] for typed in COMMANDS} >= set(commands) - {"unlock"}


UNLOCK = [sys.executable, "-m", "vlsafe", "unlock", "--root", "."]
HOLD = [*UNLOCK, "--", sys.executable, "-c", "print('held', flush=True); input()"]
OTHER_NAMESPACE = ["unshare", "--pid", "--fork"]


def namespaces():
    return (
        shutil.which("unshare") and subprocess.run([*OTHER_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("note", ["", "no number", "1", None])
@pytest.mark.parametrize(
    "within", [[], pytest.param(OTHER_NAMESPACE, marks=pytest.mark.skipif(not namespaces(), reason="no unshare"))]
)
def test_the_lock_of_a_living_scheduler_is_respected_and_of_a_dead_one_removed(within, note, elsewhere, capsys):
    """Whatever its note says (a full disk leaves it empty; 1 is always alive), and also from another PID namespace."""
    lock = elsewhere / ".snakemake" / "locks" / "0.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    if note is not None:
        (elsewhere / ".snakemake" / "owner").write_text(note)
    with subprocess.Popen([*within, *HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n" and not lock.exists()
        lock.touch()
        assert cli.main(["unlock"]) == 2 and lock.exists()
        says(capsys.readouterr().err, ("make reproduce", "at work here", "wait for it or stop it"))
        holder.stdin.write("\n")
    assert cli.main(["unlock"]) == 0 and not lock.exists()


def test_whoever_reads_may_go_away_and_every_way_to_call_it_calls_it(elsewhere):
    for module in ("vlsafe", "vlsafe.cli"):
        call = f"{sys.executable} -m {module} status --root runs"
        done = subprocess.run(
            ["bash", "-c", f"{call} | head -1; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
        )
        assert done.stderr == "" and done.stdout.startswith("missing ") and done.stdout.splitlines()[1] in ("141", "0"), done
    assert subprocess.run([sys.executable, "-m", "vlsafe.cli"], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("text", FILES)
def test_scale_files(text, elsewhere):
    (elsewhere / "scale.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        Study.open("scale.yaml", "mini-chat", 0, "runs")
    says(str(caught.value), FILES[text])


def test_two_scale_files_of_one_stem_share_no_place(elsewhere, monkeypatch):
    """The second one would make every run of the first again, in its place."""
    monkeypatch.setattr(store, "ensure", lambda run, make, say: run.folder)
    monkeypatch.setattr(Study, "inputs", lambda self, name: ())
    text = "extends: mini\nexam: {panel: 3}\n"
    for folder in ("one", "copy", "other"):
        (elsewhere / folder).mkdir()
        (elsewhere / folder / "own.yaml").write_text(text if folder != "other" else text.replace("3", "4"))
    Study.open("one/own.yaml", "mini-chat", 0, "runs").folder("world/corpora")
    Study.open("copy/own.yaml", "mini-chat", 0, "runs").folder("world/corpora")  # equal numbers are the same scale
    with pytest.raises(ValueError) as caught:
        Study.open("other/own.yaml", "mini-chat", 0, "runs")
    says(str(caught.value), ("one/own.yaml", "other/own.yaml", "another `name:`"))
    Study.open("other/own.yaml", "mini-chat", 0, "elsewhere")
    (elsewhere / "one" / "own.yaml").write_text(text.replace("3", "5"))  # one's own numbers may change, as ever
    Study.open("one/own.yaml", "mini-chat", 0, "runs").folder("world/corpora")
    with pytest.raises(ValueError, match="another `name:`"):
        Study.open("copy/own.yaml", "mini-chat", 0, "runs")


@pytest.mark.parametrize("name", PARAMETERS)
def test_notebook_parameters(name, tmp_path):
    """The setup cell is the first that runs after the parameters; here it is run as the notebook has it."""
    value, patterns = PARAMETERS[name]
    path = ROOT / "notebooks" / "03_safety_degradation.ipynb"
    given = notebooks.parameters(path)
    if name not in given:
        with pytest.raises(ValueError) as caught:
            notebooks.execute(path, tmp_path / "out.ipynb", {name: value})
    else:
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        with pytest.raises(ValueError) as caught:
            exec(cells[1], {**given, name: value})
    says(str(caught.value), patterns)


def test_of_many_names_the_nearest_are_told():
    from vlsafe.core.scale import known

    with pytest.raises(ValueError, match=r"did you mean 'n07'\? \(known: n07, .* and 40 more\)$"):
        known("n077", [f"n{i:02d}" for i in range(50)], "name")
    assert load_scale("mini").name == "mini"
