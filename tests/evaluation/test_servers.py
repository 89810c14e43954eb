"""A checkpoint behind a server that is started for it: the same answers as the local engine, and clear words where it fails."""

import dataclasses
import sys

import pytest

from vlsafe import cli
from vlsafe.core.presets import MINI
from vlsafe.core.scale import as_plain
from vlsafe.core.schema import Response
from vlsafe.evaluation import engines, examine, servers
from vlsafe.study.study import Study

SERVE = f"{sys.executable} -m transformers.cli.transformers serve {{folder}} --device cpu --dtype float32"
SERVE += " --host 127.0.0.1 --port {port}"


def test_a_server_is_the_engine_of_an_examination_and_agrees_with_the_local_one(begun, tmp_path, monkeypatch, capsys):
    pytest.importorskip("fastapi", reason="transformers serve needs the extra `test`")
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = ["agree", "projector/filtered", "--serve", SERVE, "--scale", "nano", "--root", str(begun.root)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("equal texts: 1.000 the same of") and "; change +0.000 [" in printed[1]
    folder = begun.checkpoints("projector/filtered")[-1]
    ranked = [item for item in begun.items() if item.scoring == "likelihood"]
    chosen = [*(item for item in begun.items()[::20] if item not in ranked), *ranked[:2]]
    assert {item.scoring for item in chosen} == {"generated", "likelihood"}
    exam = begun.scale.exam
    local = examine.respond(folder, chosen, "m", exam, print)
    served = examine.respond(folder, chosen, "m", dataclasses.replace(exam, serve=SERVE), print)
    assert [(r.item, r.text) for r in served] == [(r.item, r.text) for r in local]


def test_a_server_that_ends_says_why(begun):
    folder = begun.checkpoints("projector/filtered")[-1]
    command = f"{sys.executable} -c \"raise SystemExit('no such model')\""
    with pytest.raises(ChildProcessError, match="the server ended with code 1: no such model"):
        servers.serve_and_respond(command, folder, begun.items()[:1], "m", 4, engines.Kept())


def test_engines_are_not_mixed(tmp_path):
    """The engine is among the parameters of every examination: what another one answered is stale and not read."""
    served = dataclasses.replace(MINI, exam=dataclasses.replace(MINI.exam, serve=SERVE))
    one, other = (Study(scale, "mini-chat", 0, tmp_path).run("examination/parent.aligned") for scale in (MINI, served))
    assert one.digest != other.digest and one.folder == other.folder
    assert "serve" not in as_plain(MINI.exam)


def test_agreement_by_hand():
    texts = {"a": ["yes", "no", "no", "x"], "b": ["yes", "yes", "no", "y"]}
    events = {"a": [True, False, False, None], "b": [True, True, False, True]}
    responses = {engine: [Response(str(i), "bench", "m", text) for i, text in enumerate(of)] for engine, of in texts.items()}
    rows = {
        engine: [{"benchmark": "bench", "judge": "j", "event": event, "cluster": str(i)} for i, event in enumerate(of)]
        for engine, of in events.items()
    }
    equal, change = servers.agreement(rows, responses)
    assert (equal["n"], equal["share"]) == (4, 0.5)
    assert (change["n"], change["share"]) == (3, pytest.approx(2 / 3)) and change["change"][0] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="answered different items"):
        servers.agreement(rows, {"a": responses["a"], "b": responses["b"][:2]})
