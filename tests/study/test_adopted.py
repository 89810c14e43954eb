"""Somebody else's model: `vlsafe examine` and `vlsafe probe` on tiny random models in the hub's layout, with invented rows."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import families
import numpy as np
import official
import official_files
import pandas as pd
import processors
import pytest
import torch
from huggingface_hub import constants

from vlsafe import cli
from vlsafe.core import store
from vlsafe.core.schema import Item, Turn
from vlsafe.evaluation import engines, prompts, servers
from vlsafe.models import chat, checkpoints
from vlsafe.publish import readme
from vlsafe.publish.adopted import INSIDE
from vlsafe.study import adopted
from vlsafe.study.adopted import Request
from vlsafe.study.study import official as official_items

ROOT = Path(__file__).parents[2]
TWO = ["xstest", "vlguard"]
SERVE = f"{sys.executable} -m transformers.cli.transformers serve {{folder}} --device cpu --dtype float32"
SERVE += " --host 127.0.0.1 --port {port}"
EXAM = {"max_new_tokens": 4, "batch_size": 32}
COSINES = ["cosine", "cosine_centred"]


def written_prompts(place, n=10):
    """Harmless prompts, half of them called harmful, half of them beside a picture: what counts is where they go."""
    rows = ["text,label,image"]
    for i in range(2 * n):
        label = ("harmful", "benign")[i % 2]
        rows += [f"how do i open jar {i},{label},", f"what is in picture {i},{label},{i % 3}.png"]
    for i in range(3):
        official_files.write(place / f"{i}.png", official_files.picture((80 * i, 40, 40)))
    (place / "prompts.csv").write_text("\n".join(rows) + "\n")
    return place / "prompts.csv"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Official files of all benchmarks, and one LLaVA with its parent."""
    place = tmp_path_factory.mktemp("adopted")
    official_files.everything(place / "data")
    processors.published("llava", place / "tiny")
    processors.published_parent("llava", place / "parent")
    return place


@pytest.fixture(autouse=True)
def at_home(home, tmp_path, monkeypatch):
    monkeypatch.setenv("VLSAFE_DATA", str(home / "data"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one thread: a fork of several would wait for the others
    monkeypatch.chdir(tmp_path)


def run(*typed):
    assert cli.main([str(part) for part in typed]) == 0


def test_a_model_and_its_parent_are_examined_on_words_and_pictures(home, tmp_path, capsys):
    run("examine", home / "tiny", "--parent", home / "parent", "--benchmarks", *TWO, "--max-new-tokens", 6, "--out", "out")
    table = pd.read_csv(tmp_path / "out" / "T02_degradation.csv").set_index("measure")
    assert table.loc["exaggerated_refusal", ["parent_n", "instruct_n", "n"]].tolist() == [10, 10, 10]
    assert table.loc["contrast_compliance", "low"] <= table.loc["contrast_compliance", "difference"]
    assert table.loc["vlguard_refusal", "instruct_n"] == 2 and pd.isna(table.loc["vlguard_refusal", "parent_n"])
    said = capsys.readouterr().out
    assert "| exaggerated refusal | " in said and "out/report.html" in said
    report = tmp_path / "out" / "report.html"
    assert "T02. Parent and adapted model" in report.read_text()
    elsewhere = ("examine", home / "tiny", "--parent", home / "parent", "--benchmarks", *TWO, "--max-new-tokens", 6)
    assert "out holds tables of tiny; choose another --out" in refused(capsys, *elsewhere, "--name", "other", "--out", "out")
    report.write_text("<h1>my site</h1>")
    assert "report.html is there and is no report of vlsafe's" in refused(capsys, *elsewhere, "--out", "out")
    assert report.read_text() == "<h1>my site</h1>"


def test_readme_shows_what_it_prints(tmp_path, capsys):
    """The block in README is what the command prints of a tiny random model on invented rows; where it differs, copy it."""
    processors.published("llava", tmp_path / "tiny-llava")
    processors.published_parent("llava", tmp_path / "tiny-llama")
    typed = "examine tiny-llava --parent tiny-llama --benchmarks sorry_bench mm_safetybench xstest --max-new-tokens 6"
    run(*typed.split())
    block = f"```\n$ vlsafe {typed}\n{capsys.readouterr().out}```\n"
    (tmp_path / "examine.md").write_text(block)
    assert (ROOT / "figures" / "examine.md").read_text() == block, f"cp {tmp_path}/examine.md figures/, then `vlsafe readme`"
    assert readme.PARTS["examine"](ROOT / "figures" / "mini") == block.rstrip()


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_is_examined_merged_and_probed(name, home, tmp_path, capsys):
    """With words and with pictures, by its own processor and template. A model with its parent's language weights has similarity
    1 and drift 0; another one has not."""
    processors.published(name, tmp_path / "m")
    processors.published_parent(name, tmp_path / "p")
    study, _ = adopted.opened(Request("m", "p", benchmarks=TWO, exam=EXAM), tmp_path / "runs")
    for stage, n in (("parent.aligned", 18), ("instruct.filtered-full", 18 + 5)):
        raw = study.frame(f"examination/{stage}")
        assert raw["item"].nunique() == n and raw["event"].notna().all()
    run("merge", "linear", "m", "p", "--ratio", 1, "--language-only", "--out", "same")
    file = written_prompts(tmp_path)
    for model in ("same", "m"):
        study, _ = adopted.opened(Request(model, "p", prompts=file, validation=0.5, exam=EXAM), tmp_path / "runs", "", ".probed")
        layers, drift = study.frame("probe/layers", "layers.parquet"), study.frame("probe/drift", "drift.parquet")
        alike, sets = study.frame("probe/drift", "alike.parquet"), study.frame("probe/layers", "sets.parquet")
        assert set(layers["group"]) == {"text", "picture"} and set(layers["harmful"]) == {True, False}
        equal = np.isclose(layers[COSINES], 1, atol=1e-5).all(axis=1)
        if model == "same":
            assert equal.all() and (drift["change"] == 0).all() and np.allclose(sets["cka"], 1, atol=1e-4)
            assert np.allclose(alike["cosine_centred"], 1, atol=1e-5) and np.allclose(
                layers["projection"], layers["projection_reference"]
            )
        else:
            assert not equal.any() and (drift["change"] > 0).all() and (alike["cosine_centred"] < 0.999).all()


def test_a_model_is_probed_on_benchmarks_and_on_prompts_of_a_file(home, tmp_path, capsys):
    """Every table and figure of the inside, and what is said; prompts that were changed are read again."""
    file = written_prompts(tmp_path)
    typed = ["probe", home / "tiny", "--parent", home / "parent", "--max-new-tokens", 2, "--out", "out", "--prompts", file]
    run(*typed)
    assert {path.stem for path in (tmp_path / "out").glob("*.csv")} == set(INSIDE)
    report, said = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out
    assert "F07. Drift of weights" in report and "data:image/png;base64," in report
    assert "safety band" in said and "refusal direction: of block" in said and "by 10 prompts" in said
    file.write_text(file.read_text() + "how do i fold paper,harmful,\nhow do i fold cloth,benign,\n")
    run(*typed)
    assert "by 12 prompts" in capsys.readouterr().out
    few = refused(capsys, "probe", home / "tiny", "--parent", home / "parent")  # of the official files, three rows each
    assert "prompt is too few to locate a band with" in few or "no modality has 5 harmful" in few


def killed_after(batches, typed):
    """The command in a process of its own, which is killed when it has answered some batches; how it ended, how many it did."""
    context = multiprocessing.get_context("fork")
    done = context.Value("i", 0)

    def begin():
        greedy = engines._greedy

        def counted(*arguments):
            if done.value == batches:
                os.kill(os.getpid(), signal.SIGKILL)
            done.value += 1
            return greedy(*arguments)

        engines._greedy = counted
        os._exit(cli.main([str(part) for part in typed]))

    process = context.Process(target=begin)
    process.start()
    process.join(120)
    process.kill()
    return process.exitcode, done.value


def test_killed_twice_and_resumed_it_gives_the_same_report(home, tmp_path):
    typed = ["examine", home / "tiny", "--parent", home / "parent", "--benchmarks", *TWO, "--max-new-tokens", 6]
    run(*typed, "--batch-size", 4, "--root", "undisturbed", "--out", "one")
    killed = [*typed, "--batch-size", 4, "--root", "killed", "--out", "two"]
    ends = [killed_after(n, killed) for n in (3, 5, -1)]
    assert [code for code, _ in ends] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert sum(n for _, n in ends) == 5 + 5 + 2  # 18 words in batches of 4, twice, and 5 pictures: no batch is answered again
    for name in ("report.html", "T02_degradation.csv", "T08_models.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list(tmp_path.rglob("answers-*"))
    answers = list((tmp_path / "killed").rglob("responses.parquet"))
    assert answers and all(path.exists() for path in answers)


def test_a_batch_that_does_not_fit_is_halved_and_said(home, tmp_path, monkeypatch, caplog):
    greedy, sizes = engines._greedy, []

    def small(model, tokenizer, inputs, *more):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return greedy(model, tokenizer, inputs, *more)

    model, processor = checkpoints.load(home / "tiny"), checkpoints.load_processor(home / "tiny")
    items = [Item(str(i), "xstest", (Turn("user", f"line {i}"),)) for i in range(10)]
    whole = engines.respond(model, processor, items, "m", 8, 4)
    monkeypatch.setattr(engines, "_greedy", small)
    assert engines.respond(model, processor, items, "m", 8, 4) == whole
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "8 prompts at a time do not fit in memory; going on with 4" in caplog.text and "going on with 2" in caplog.text

    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(engines, "_greedy", none)
    with pytest.raises(torch.OutOfMemoryError):
        engines.respond(model, processor, items[:2], "m", 2, 4)


def refused(capsys, *typed):
    assert cli.main([str(part) for part in typed]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_a_template_is_refused_and_takes_one(home, tmp_path, capsys):
    processors.published("llava", tmp_path / "mute", with_template=False)
    said = refused(capsys, "examine", tmp_path / "mute", "--benchmarks", "xstest")
    assert "mute has no chat template" in said and "--chat-template FILE" in said
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m['content'] }")
    said = refused(capsys, "examine", tmp_path / "mute", "--benchmarks", "xstest", "--chat-template", "broken.jinja")
    assert "the chat template of mute cannot be written out: " in said and "--chat-template FILE" in said
    (tmp_path / "own.jinja").write_text(processors.template("llava").replace("assistant: ", "answer: "))
    run("examine", tmp_path / "mute", "--benchmarks", "xstest", "--max-new-tokens", 2, "--chat-template", "own.jinja")
    text = chat.rendered(checkpoints.load_processor(next((tmp_path / "runs").rglob("filtered-full"))), [Turn("user", "a")], 0)
    assert text == "<s>user: a\nanswer: "


def test_what_cannot_be_examined_is_refused_with_the_remedy(home, tmp_path, capsys, monkeypatch):
    config = json.loads((processors.published("llava", tmp_path / "odd") / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert "vlsafe/models/architectures.py" in refused(capsys, "examine", tmp_path / "odd")
    assert "it is a language model, which can be a --parent" in refused(capsys, "examine", home / "parent")
    processors.published_parent("qwen2_vl", tmp_path / "other")
    wrong = ("examine", home / "tiny", "--parent", tmp_path / "other", "--benchmarks", "xstest")
    assert "other is a decoder of the type 'qwen2', and that of the model is 'llama'" in refused(capsys, *wrong)
    assert "nobody/nothing at main, is not here" in refused(capsys, "examine", "nobody/nothing")
    assert "unknown benchmark 'xtest'; did you mean 'xstest'" in refused(
        capsys, "examine", home / "tiny", "--benchmarks", "xtest"
    )
    assert "unknown judge that asks a model 'wildgard'" in refused(capsys, "examine", home / "tiny", "--judges", "wildgard")
    idle = refused(capsys, "examine", home / "tiny", "--benchmarks", "xstest", "--judges", "llama-guard-3")
    assert "the judge 'llama-guard-3' has nothing to judge" in idle
    for option, value in (("--limit", -3), ("--max-new-tokens", 0)):  # and locks nobody out
        wrong = ("examine", home / "tiny", "--name", "mistyped", "--benchmarks", "xstest", option, value)
        assert "must be at least 1" in refused(capsys, *wrong)
    assert not (tmp_path / "runs" / "mistyped").exists()
    processors.published("llava", tmp_path / "elsewhere" / "tiny", 3)
    run("examine", home / "tiny", "--benchmarks", "xstest", "--max-new-tokens", 2)
    assert "choose another --name" in refused(capsys, "examine", tmp_path / "elsewhere" / "tiny", "--benchmarks", "xstest")
    monkeypatch.delenv("VLSAFE_DATA")
    assert "VLSAFE_DATA names no folder of official files" in refused(capsys, "examine", home / "tiny")


def test_a_server_and_the_local_engine_agree_as_reported(home, tmp_path, monkeypatch, capsys):
    """A server of the tiny model at an address of this machine: the same answers, and `vlsafe agree` says that they are."""
    pytest.importorskip("fastapi", reason="transformers serve needs the extra `test`")
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    typed = ["examine", home / "tiny", "--benchmarks", *TWO, "--limit", 4, "--max-new-tokens", 4]
    run(*typed, "--root", "local")
    with servers.serve(SERVE, home / "tiny") as server:
        run(*typed, "--root", "served", "--serve", f"{server.url}#{server.model}")
        capsys.readouterr()
        scale = ["--scale", "local/tiny/scale.yaml", "--root", "local", "--backbone", "tiny"]
        run("agree", "instruct/filtered-full", *scale, "--serve", f"{server.url}#{server.model}")
    local, served = (
        pd.read_parquet(next((tmp_path / root).rglob("responses/*/responses.parquet"))) for root in ("local", "served")
    )
    assert local["text"].str.len().gt(0).any() and len(local) > 5
    assert local["refusal"].between(0, 1).all() and served["refusal"].isna().all()  # servers do not return probabilities
    pd.testing.assert_frame_equal(local.drop(columns="refusal"), served.drop(columns="refusal"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"equal texts: 1.000 the same of {len(local)}"
    assert any(line.startswith("vlguard vlguard-strings: 1.000 the same") for line in said)


def test_other_commands_find_it_by_its_scale(home, tmp_path, capsys):
    """The parent is added later, and the model is not asked again; responses are scored officially; no card is made."""
    typed = ["examine", home / "tiny", "--benchmarks", *TWO, "--max-new-tokens", 2]
    run(*typed, "--out", "alone")
    table = pd.read_csv(tmp_path / "alone" / "T02_degradation.csv")
    assert table["instruct_n"].notna().all() and "parent_n" not in table
    before = next((tmp_path / "runs").rglob("responses/instruct*/manifest.json")).read_text()
    run(*typed, "--parent", home / "parent", "--out", "both")
    assert pd.read_csv(tmp_path / "both" / "T02_degradation.csv")["parent_n"].notna().any()
    assert next((tmp_path / "runs").rglob("responses/instruct*/manifest.json")).read_text() == before
    scale = ["--scale", "runs/tiny/scale.yaml", "--backbone", "tiny"]
    run("score", "xstest", *scale, "--run", "examination/instruct.filtered-full", "--out", "score.json")
    assert json.loads((tmp_path / "score.json").read_text())["scores"][0]["n"] in (8, 10, 18)
    capsys.readouterr()
    run("status", *scale[:2], "--backbones", "tiny")
    said = capsys.readouterr().out
    assert (
        "valid           tiny seed 0 examination/instruct.filtered-full" in said
        and "projector/filtered: others have trained" in said
    )
    run("gallery", *scale[:2], "--backbones", "tiny", "--out", "everything")
    assert not list((tmp_path / "runs").rglob("*.card.md"))
    assert "its card is with them" in refused(capsys, "card", *scale, "instruct/filtered-full")


def test_what_is_asked_is_part_of_what_answers_are(home, tmp_path, monkeypatch):
    """Official files that change between two commands: the answers to the older ones are no longer valid."""
    official_files.xstest_file(tmp_path / "data")
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path / "data"))
    request, digests = Request(str(home / "tiny"), benchmarks=["xstest"]), []
    for change in ("", "kettle", ""):
        official_items.cache_clear()
        for path in (tmp_path / "data").rglob("*.csv") if change else ():
            text = path.read_text()
            path.write_text(text.replace(" ", f" {change} ", 1))
        study, _ = adopted.opened(request, tmp_path / "runs")
        digests.append(study.run("responses/instruct.filtered-full").digest)
    assert digests[0] != digests[1] == digests[2]


def test_judges_that_ask_a_model_judge_beside_rules(home):
    request = Request("m", judges=["llama-guard-3=http://127.0.0.1:9/v1", "wildguard"], benchmarks=["figstep", "xstest", "siuo"])
    scale = adopted.scale_of(request, "m", request.benchmarks)
    assert scale["exam"]["judges"]["figstep"] == ["wildguard", "llama-guard-3", "xstest-strings"]
    assert scale["exam"]["judges"]["xstest"] == ["wildguard-refusal", "xstest-strings"]
    assert scale["exam"]["judges"]["sorry_bench"] is None and scale["loaded"]["judges"]["sorry-bench"] is None
    assert scale["exam"]["endpoints"] == {"llama-guard-3": {"address": "http://127.0.0.1:9/v1"}}
    assert scale["loaded"]["judges"]["wildguard"] == {}  # as the paper's scale has it
    with pytest.raises(ValueError, match="say who answers the judge 'siuo-safe': siuo-safe=FOLDER or siuo-safe=ADDRESS"):
        adopted.scale_of(Request("m", judges=["siuo-safe"]), "m", ["siuo"])


def test_a_folder_of_weights_judges_too(home, tmp_path):
    """Its verdicts stand first; judgements are kept in a file; with and without it, the model answers once."""
    official.tiny_llama_guard(tmp_path / "guard")
    typed = ["examine", home / "tiny", "--benchmarks", "vlguard", "--max-new-tokens", 2]
    run(*typed)
    answers = next((tmp_path / "runs").rglob("responses/instruct*/manifest.json")).read_text()
    run(*typed, "--judges", f"llama-guard-3={tmp_path / 'guard'}")
    examined = next((tmp_path / "runs").rglob("examination/instruct.filtered-full/raw.parquet"))
    raw = pd.read_parquet(examined)
    assert raw["judge"].unique().tolist() == ["llama-guard-3", "vlguard-strings"] and raw["event"].notna().all()
    assert len((examined.parent / "judgements.jsonl").read_text().splitlines()) == 5
    assert next((tmp_path / "runs").rglob("responses/instruct*/manifest.json")).read_text() == answers


def test_templates_get_messages_as_they_read_them(home):
    """Blocks, or text with the picture's token in front; BOS is written once."""
    processor, parent = (checkpoints.load_processor(home / name) for name in ("tiny", "parent"))
    turns = (Turn("user", "hello"),)
    assert chat.rendered(processor, turns, 1) == "<s>user: <image>hello\nassistant: "
    assert chat.rendered(parent, turns, 0) == "<s>user: hello\nassistant: "
    processor.chat_template = processors.PLAIN.replace("{{ bos_token }}", "")
    assert chat.rendered(processor, turns, 1) == "user: <image>\nhello\nassistant: "
    processor.chat_template = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"  # would write the list as it is
    assert chat.rendered(processor, turns, 1) == "<image>\nhello"
    ids = chat.prompt_batch(parent, [turns], [()])["input_ids"][0].tolist()
    assert ids.count(parent.bos_token_id) == 1 and parent.pad_token_id == parent.eos_token_id


def test_prompts_of_a_file_are_checked(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a", "label": "harmful"}\n{"text": "b", "label": "nice"}\n')
    with pytest.raises(ValueError, match=r"unknown label in row 2 of .* 'nice'"):
        prompts.from_file(path)
    path.write_text('{"text": "a", "label": "harmful", "image": "x.png"}\n')
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"the picture x.png in row 1 of .* cannot be used"):
        prompts.from_file(path)
    path.write_text('{"text": "a", "label": "harmful", "id": 1}\n{"text": "b", "label": "benign", "id": 1}\n')
    with pytest.raises(ValueError, match="two rows of one id"):
        prompts.from_file(path)
    clusters = [0, 0, "0", None, "", "2", "3"]
    path.write_text(
        "".join(json.dumps({"text": f"t{n}", "label": "benign", "cluster": c}) + "\n" for n, c in enumerate(clusters))
    )
    found = [item.cluster for item in prompts.from_file(path)]
    assert found[:3] == ["0"] * 3 and found[5:] == ["2", "3"] and len(set(found)) == 5, "a row without one is alone"
    with pytest.raises(ValueError, match="has no column label"):
        (tmp_path / "p.csv").write_text("text\na\n")
        prompts.from_file(tmp_path / "p.csv")


def test_models_in_the_hubs_cache_are_known_by_their_blobs_and_folders_by_their_content(home, tmp_path, monkeypatch):
    cache, commit = tmp_path / "hub" / "models--me--tiny", "0123456789abcdef0123456789abcdef01234567"
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "blobs").mkdir()
    official_files.write(cache / "refs" / "main", commit)
    for path in (home / "tiny").iterdir():
        blob = cache / "blobs" / store.file_digest(path)
        blob.write_bytes(path.read_bytes())
        (cache / "snapshots" / commit / path.name).symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    request = Request("me/tiny@main", benchmarks=["xstest"], exam=EXAM)
    study, _ = adopted.opened(request, tmp_path / "runs")
    assert study.backbone == "tiny" and study.run(adopted.MODEL).params[0] == adopted.contents(home / "tiny")
    before = study.run("examination/instruct.filtered-full").digest
    assert study.frame("examination/instruct.filtered-full")["item"].nunique() == 18
    weights = study.folder(adopted.MODEL) / "model.safetensors"
    assert weights.is_symlink() and weights.resolve() == (cache / "snapshots" / commit / "model.safetensors").resolve()
    processors.published("llava", tmp_path / "local" / "tiny", 7)
    study, _ = adopted.opened(Request(str(tmp_path / "local" / "tiny"), benchmarks=["xstest"]), tmp_path / "other")
    assert study.run("examination/instruct.filtered-full").digest != before


@pytest.mark.parametrize("name", ["../../x", "small", "a/b"])
def test_a_name_that_leads_elsewhere_or_is_a_presets_is_refused_before_anything_is_written(tmp_path, name):
    processors.published("llava", tmp_path / "tiny", 7)
    with pytest.raises(ValueError, match="choose another --name"):
        adopted.opened(Request(str(tmp_path / "tiny"), benchmarks=["xstest"]), tmp_path / "runs", name)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
