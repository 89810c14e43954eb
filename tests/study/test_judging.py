"""Judges in the graph: scripted ones with weights and one at an endpoint, each put to every distinct response once; killed and
cut off as well. The models' responses are written by hand, the judging stage is the graph's own."""

import dataclasses
import json
import os
import signal
from collections import Counter

import loaded
import pandas as pd
import pytest
import yaml
from evaluation.test_score import quick, scripted, url  # noqa: F401  (fixtures)
from official import BAD_WORD, MUMBLE, SORRY

from vlsafe import cli, evaluation
from vlsafe.core import store
from vlsafe.core.assets import Endpoint, Origin
from vlsafe.core.presets import load_scale
from vlsafe.core.schema import Response, to_row
from vlsafe.evaluation import examine
from vlsafe.evaluation.benchmarks import confounds
from vlsafe.evaluation.judges import JUDGES
from vlsafe.study import judging
from vlsafe.study.graph import STAGES
from vlsafe.study.study import Study

SOURCE, NAME = "responses/parent.aligned", "examination/parent.aligned"
TEXTS = ("use the spoon", f"I am {SORRY}, no", f"the {BAD_WORD} is loud", f"{MUMBLE} {MUMBLE}")
VERDICTS = {  # of each of the TEXTS, by judge
    "sorry-bench": ("1", "0", "1", "unjudged"),
    "wildguard": ("unharmful", "unharmful", "harmful", "unjudged"),
    "wildguard-refusal": ("complied", "refused", "complied", "unjudged"),
    "llama-guard-3": ("safe", "safe", "unsafe", "safe"),
    "mm-safetybench-criteria": ("unsafe", "safe", "unsafe", "unjudged"),
}
SERVED = "mm-safetybench-criteria"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return loaded.written(tmp_path_factory.mktemp("loaded")).parent


@pytest.fixture
def path(home, tmp_path, scripted):  # noqa: F811
    """The file of the tiny scale, whose endpoint is the scripted server."""
    scale = yaml.safe_load((home / "tiny.yaml").read_text())
    scale["exam"]["endpoints"] = {SERVED: {"address": url(scripted), "model": "scripted", "parallel": 1}}
    scale["exam"]["batch_size"] = 3
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(scale))
    return tmp_path / "tiny.yaml"


def responses_of(study, work, models=("",)):
    """Of each model the panel's items and all items; every other answer of a checkpoint is its end's, and so are those to altered
    prompts."""
    items, rows, panel, responses = study.items(), [], [], []
    for number, more in enumerate(models):
        name = f"{study.backbone}/parent/aligned{more}"
        for exam, of, turn in (("panel", items[::2], 1), ("full", items, 0)):
            record = {**examine.MODEL, "model": name + ("/step-000002" if exam == "panel" else ""), "exam": exam}
            record |= {"scale": study.scale.name, "backbone": study.backbone, "stage": "parent", "recipe": "aligned"}
            texts = [TEXTS[(i + number + turn * (i % 4 == 0)) % 4] for i, item in enumerate(items) if item in of]
            answers = [Response(item.id, item.benchmark, record["model"], text) for item, text in zip(of, texts, strict=True)]
            (panel if exam == "panel" else rows).extend(examine.raw_table(of, answers, record, study.scale.exam.judges))
            responses += answers
    varied = confounds.variants(items, study.stream("confounds"))
    answers = [Response(item.id, item.benchmark, name, TEXTS[i % 2]) for i, item in enumerate(varied)]
    rows += examine.raw_table(varied, answers, record | {"exam": "confounds"}, study.scale.exam.judges)
    for file, table in (
        ("raw", rows),
        ("panel", panel),
        ("responses", map(to_row, responses + answers)),
        ("validation", [{"x": 1}]),
    ):
        store.write_rows(work / f"{file}.parquet", table)
    return {"models": len(models)}


@pytest.fixture
def study(home, path, tmp_path, monkeypatch, scripted):  # noqa: F811
    """A study of the tiny loaded scale whose parent's responses are there."""
    monkeypatch.setenv("VLSAFE_DATA", str(home / "data"))
    monkeypatch.setitem(STAGES, SOURCE, dataclasses.replace(STAGES[SOURCE], make=responses_of, inputs=()))
    scripted.trouble = lambda number: by_text(scripted, number)
    return Study.open(path, "tiny-a", 0, tmp_path / "store")


def by_text(server, number):
    text = json.dumps(server.requests[number - 1])
    return "safe" if SORRY in text else "purple" if MUMBLE in text else "unsafe"


@pytest.fixture
def prompts(monkeypatch):
    """What judges with weights are asked."""
    seen, real = [], evaluation.engines.complete

    def complete(model, tokenizer, texts, n):
        seen.extend(texts)
        return real(model, tokenizer, texts, n)

    monkeypatch.setattr(evaluation.engines, "complete", complete)
    return seen


def distinct(study):
    """Distinct responses to an item, by what judges of its benchmark are asked."""
    pairs, count = {}, Counter()
    for row in study.rows(SOURCE, "responses.parquet"):
        pairs.setdefault(row["benchmark"], set()).add((row["item"], row["text"]))
    for benchmark, of in pairs.items():
        names = examine.judges_of(benchmark, study.scale.exam.judges)
        count.update(dict.fromkeys(evaluation.judging.queries_of(names), len(of)))
    return count


def tables(study):
    return [study.frame(NAME, file) for file in judging.TABLES]


def test_verdicts_of_every_judge_stand_beside_the_rules_and_no_judge_is_asked_twice_for_a_response(study, prompts, scripted):  # noqa: F811
    expected, source = distinct(study), [study.frame(SOURCE, file) for file in judging.TABLES]
    texts = {(row["item"], row["model"]): row["text"] for row in study.rows(SOURCE, "responses.parquet")}
    for frame, before in zip(tables(study), source, strict=True):
        assert list(frame.columns) == list(before.columns)
        rules = frame[frame["judge"].isin(list(JUDGES))].reset_index(drop=True)
        pd.testing.assert_frame_equal(rules, before)
        for judge, group in frame.groupby("judge"):
            if judge in VERDICTS:
                wanted = [VERDICTS[judge][TEXTS.index(texts[key])] for key in zip(group["item"], group["model"], strict=True)]
                assert group["label"].tolist() == wanted
                assert (group["outcome"].isna() == (group["label"] == "unjudged")).all()
                assert (group["event"].isna() == (group["label"] == "unjudged")).all()
        for (_, benchmark), group in frame.groupby(["model", "benchmark"]):
            names = examine.judges_of(benchmark, study.scale.exam.judges)
            assert list(dict.fromkeys(group["judge"])) == list(names)
            assert (
                group.groupby(["exam", "judge"])["item"]
                .apply(list)
                .groupby("exam")
                .agg(lambda of: len(set(map(tuple, of))))
                .eq(1)
                .all()
            )
            assert group.drop_duplicates("judge").set_index("judge")["headline"].to_dict() == examine.headlines(names)
    frame = pd.concat(tables(study))
    assert set(VERDICTS) <= set(frame["judge"]) and "confounds" in set(frame.loc[frame["judge"] == "sorry-bench", "benchmark"])
    kept = [json.loads(line) for line in (study.folder(NAME) / judging.KEPT).read_text().splitlines()]
    assert Counter(line["judge"] for line in kept) == expected
    assert (
        len({(line["judge"], line["id"], line["response"]) for line in kept})
        == len(kept)
        == len(prompts) + len(scripted.requests)
    )
    assert len(scripted.requests) == expected[SERVED]
    numbers, unjudged = study.numbers(NAME), frame[frame["judge"].isin(list(VERDICTS)) & (frame["label"] == "unjudged")]
    counts = unjudged["judge"].value_counts().to_dict()
    assert numbers["unjudged"] == {name: {"judgement cannot be read": n} for name, n in counts.items()}
    assert (numbers["models"], numbers["judgements"]) == (1, len(kept))
    assert (study.folder(NAME) / "validation.parquet").exists() and not (study.folder(NAME) / "judgements.jsonl.tmp").exists()


def test_an_endpoint_that_goes_away_half_way_costs_nothing_and_what_was_unreadable_is_asked_again(study, prompts, scripted):  # noqa: F811
    few = dataclasses.replace(study.scale.exam, judges={"mm_safetybench": study.scale.exam.judges["mm_safetybench"]})
    study = dataclasses.replace(study, scale=dataclasses.replace(study.scale, exam=few))
    total, half = distinct(study)[SERVED], 13
    scripted.trouble = lambda number: by_text(scripted, number) if number <= half else "die"
    with pytest.raises(ConnectionAbortedError, match=f"{half} answers came and are kept"):
        study.folder(NAME)
    partial = study.run(NAME).partial / judging.KEPT
    kept = [json.loads(line) for line in partial.read_text().splitlines()]
    assert not study.run(NAME).folder.exists() and len(kept) == half
    with partial.open("a") as file:
        file.write('{"id": "mm_safetybench/02-HateSpeech/SD/0", "judgem')  # a line that a kill cut off
    scripted.requests.clear()
    scripted.trouble = lambda number: None if MUMBLE in json.dumps(scripted.requests[number - 1]) else by_text(scripted, number)
    frame = study.frame(NAME)
    unreadable = sum(line["judgement"] == "purple" for line in kept)
    assert unreadable > 1 and len(scripted.requests) == total - half + unreadable
    assert len(prompts) == distinct(study)["llama-guard-3"] and study.numbers(NAME)["unjudged"] == {}
    assert frame.loc[frame["judge"] == SERVED, "label"].isin(["safe", "unsafe"]).all()


def test_a_request_that_fails_is_unjudged_with_its_reason_and_never_safe(study, scripted):  # noqa: F811
    scripted.trouble = lambda number: {2: 400, 3: "html"}.get(number) or by_text(scripted, number)
    frame = pd.concat(tables(study))
    reasons = study.numbers(NAME)["unjudged"][SERVED]
    assert {"judgement cannot be read", "status 400"} < set(reasons) and len(reasons) == 3
    unjudged = frame[(frame["judge"] == SERVED) & (frame["label"] == "unjudged")]
    assert len(unjudged) == sum(reasons.values()) and unjudged["event"].isna().all() and unjudged["outcome"].isna().all()


def test_a_judge_that_writes_nothing_at_all_ends_no_stage_and_is_asked_again(study, scripted):  # noqa: F811
    scripted.trouble = lambda number: "null"
    with pytest.raises(ConnectionAbortedError, match=f"'{SERVED}' wrote nothing at all .*the same command asks it again"):
        study.folder(NAME)
    scripted.trouble = lambda number: by_text(scripted, number)
    assert set(study.numbers(NAME)["unjudged"][SERVED]) == {"judgement cannot be read"}


def test_a_stage_that_is_killed_anywhere_ends_as_if_undisturbed(study, tmp_path, prompts, scripted):  # noqa: F811
    """Real SIGKILLs, in children, after parts of the judgements; half a line is left as well."""
    undisturbed = dataclasses.replace(study, root=tmp_path / "other")
    study.folder(SOURCE)
    readable = Counter()
    for kill_after in (3, 20, 40):
        child = os.fork()
        if not child:
            real, seen = json.dumps, []

            def dumps(value, seen=seen, kill_after=kill_after, real=real, **how):
                if isinstance(value, dict) and "judgement" in value:
                    seen.append(value)
                    if len(seen) > kill_after:
                        os.kill(os.getpid(), signal.SIGKILL)
                return real(value, **how)

            evaluation.judging.json.dumps = dumps
            study.folder(NAME)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        kept = study.run(NAME).partial / judging.KEPT
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        final = {(line["judge"], line["id"], line["response"]) for line in lines if line["judgement"] not in ("hm", "purple")}
        assert len(final) > len(readable)
        readable = final
        with kept.open("a") as file:
            file.write('{"id": "sorry_bench/base/1", "judge": "sor')
    for one, other in zip(tables(study), tables(undisturbed), strict=True):
        pd.testing.assert_frame_equal(one, other)
    lines = [json.loads(line) for line in (study.folder(NAME) / judging.KEPT).read_text().splitlines()]
    final = Counter((line["judge"], line["id"], line["response"]) for line in lines if line["judgement"] not in ("hm", "purple"))
    assert final.total() == len(final) > len(readable)


def test_a_judge_whom_nobody_answers_is_refused_before_any_work(study):
    scale = study.scale

    def changed(**exam):
        return dataclasses.replace(scale, exam=dataclasses.replace(scale.exam, **exam))

    def with_judges(**judges):
        return dataclasses.replace(scale, loaded=dataclasses.replace(scale.loaded, judges={**scale.loaded.judges, **judges}))

    judging.refuse_unanswered(scale)
    both = r"name one of loaded.judges.mm-safetybench-criteria \(weights\) or exam.endpoints.mm-safetybench-criteria \(a server\)"
    with pytest.raises(ValueError, match=f"nobody answers the judge '{SERVED}' of mm_safetybench: {both}"):
        judging.refuse_unanswered(changed(endpoints={}))
    with pytest.raises(ValueError, match=f"both answer the judge '{SERVED}'"):
        judging.refuse_unanswered(with_judges(**{SERVED: Origin("x", kind="model")}))
    with pytest.raises(ValueError, match="the judge 'xstest-gpt4' of xstest is a chat"):
        judges = {"xstest": ("xstest-gpt4", "xstest-strings")}
        judging.refuse_unanswered(
            dataclasses.replace(with_judges(**{"xstest-gpt4": Origin("x", kind="model")}), exam=changed(judges=judges).exam)
        )
    for judges, message in (
        ({"xstest": ("wildguard",)}, "names no rule for xstest; one has to be there beside wildguard"),
        ({"xstest": ("wildgard", "xstest-strings")}, "unknown judge of xstest 'wildgard'; did you mean 'wildguard'"),
        ({"xstets": ("xstest-strings",)}, "unknown benchmark of exam.judges 'xstets'; did you mean 'xstest'"),
    ):
        with pytest.raises(ValueError, match=message):
            judging.refuse_unanswered(changed(judges=judges))
    with pytest.raises(ValueError, match="unknown judge that asks a model 'wildguard-refusal'; did you mean 'wildguard'"):
        judging.refuse_unanswered(with_judges(**{"wildguard-refusal": Origin("x", kind="model")}))
    absent = dataclasses.replace(study, scale=with_judges(wildguard=Origin("nobody/has-this", kind="model")))
    with pytest.raises(FileNotFoundError, match="the judge 'wildguard', nobody/has-this at main, is not here; `vlsafe download`"):
        absent.folder(NAME)
    assert not (absent.run(NAME).partial / judging.KEPT).exists()


def test_verdicts_depend_on_weights_and_names_of_models_and_on_no_address(study):
    def at(**changes):
        endpoints = {SERVED: dataclasses.replace(study.scale.exam.endpoints[SERVED], **changes)}
        exam = dataclasses.replace(study.scale.exam, endpoints=endpoints)
        return dataclasses.replace(study, scale=dataclasses.replace(study.scale, exam=exam)).run(NAME)

    params = study.run(NAME).params
    assert params["served"] == {SERVED: "scripted"} and set(params["weights"]) == set(loaded.WEIGHTS)
    assert study.scale.exam.endpoints[SERVED].address not in json.dumps(params)
    assert at(address="http://elsewhere/v1", key="OTHER", parallel=3).digest == study.run(NAME).digest != at(model="other").digest
    assert at(model="other").inputs == study.run(NAME).inputs
    unnamed = dataclasses.replace(study.scale.exam, endpoints={SERVED: Endpoint("http://x/v1")})
    unnamed = dataclasses.replace(study, scale=dataclasses.replace(study.scale, exam=unnamed))
    assert judging.judged_params(unnamed)["served"] == {SERVED: "gpt-4"}


def score(study, path, out, *more):
    where = ("--scale", path, "--backbone", "tiny-a", "--root", study.root, "--run", NAME, "--out", out)
    return cli.main(["score", *map(str, (*more, *where))])


def test_a_runs_responses_are_scored_with_the_judgements_in_it(study, path, tmp_path, prompts, scripted, capsys):  # noqa: F811
    out = tmp_path / "out.json"
    assert score(study, path, out, "sorry_bench") == 2
    assert "there is no valid run examination/parent.aligned; `vlsafe stage" in capsys.readouterr().err
    study.folder(NAME)
    before = len(prompts), len(scripted.requests)
    assert score(study, path, out, "sorry_bench") == 0, capsys.readouterr().err
    result, rows = json.loads(out.read_text()), study.frame(NAME)
    rows = rows[(rows["exam"] == "full") & (rows["benchmark"] == "sorry_bench") & (rows["judge"] == "sorry-bench")]
    assert result["responses"] == "tiny-a/parent/aligned" and result["n_items"] == len(rows) and not result["n_without_response"]
    assert "items are left out: the run's examination does not have them" in " ".join(result["files"])
    for style, group in rows.groupby("group"):
        row = next(row for row in result["scores"] if row["over"] == f"style={style}")
        assert (row["n"], row["n_unjudged"]) == (len(group), (group["label"] == "unjudged").sum())
        assert row["value"] == pytest.approx((group["label"] == "1").mean())
        assert row["value_high"] == pytest.approx(group["label"].isin(["1", "unjudged"]).mean())
    assert score(study, path, out, "mm_safetybench") == 2 and "asks a model (gpt-4)" in capsys.readouterr().err
    assert score(study, path, out, "mm_safetybench", "--judge", SERVED, "llama-guard-3", "xstest-strings") == 0
    assert (len(prompts), len(scripted.requests)) == before, "what the run holds is not asked again"
    served = ("--judge", "xstest-gpt4", "--endpoint", url(scripted), "--judge-model", "m")
    scripted.trouble = lambda number: None
    assert score(study, path, out, "xstest", *served) == 0 and len(scripted.requests) > before[1]
    for arguments, message in (
        (("xstets",), "unknown benchmark 'xstets'; did you mean 'xstest'"),
        (("xstest", "--responses", "r.jsonl"), "say which responses: those of a file by --responses, or those of a run by --run"),
        (("siuo", "--subset", "mcqa", "--model", "x"), "unknown model of examination/parent.aligned 'x'"),
    ):
        assert score(study, path, out, *arguments) == 2
        assert message in capsys.readouterr().err


def test_one_of_several_models_of_a_run_is_named(study, monkeypatch):
    models = ("/0.30", "/0.60")
    make = lambda study, work: responses_of(study, work, models)  # noqa: E731
    monkeypatch.setitem(STAGES, SOURCE, dataclasses.replace(STAGES[SOURCE], make=make))
    study.folder(NAME)
    names = [f"tiny-a/parent/aligned{more}" for more in models]
    with pytest.raises(ValueError, match=f"holds 2 models; say which by --model: {', '.join(names)}"):
        judging.stored(study, NAME, "sorry_bench")
    one, other = (judging.stored(study, NAME, "sorry_bench", name) for name in names)
    assert set(one.responses) == set(other.responses) and one.responses != other.responses
    with pytest.raises(ValueError, match="unknown benchmark 'figsteps'; did you mean 'figstep'"):
        judging.stored(study, NAME, "figsteps", names[0])
    built = dataclasses.replace(study, scale=load_scale("mini"), backbone="mini-chat")
    with pytest.raises(ValueError, match="'mini' has benchmarks in miniature, with no official metric"):
        judging.stored(built, NAME, "sorry_bench")


def test_a_packet_for_raters_of_official_items(study, path, tmp_path, capsys):
    study.folder(NAME)
    where = ("--scale", path, "--backbones", "tiny-a", "--root", study.root, "--out", tmp_path / "packet")
    assert cli.main(["human", "export", *map(str, where)]) == 0, capsys.readouterr().err
    assert "tiny-a, seed 0: there are no benign twins of MM-SafetyBench's prompts" in capsys.readouterr().out
    page, key = (tmp_path / "packet" / "packet.html").read_text(), pd.read_csv(tmp_path / "packet" / "key.csv")
    assert (
        "real prompts" in page.splitlines()[0] and page.count("data:image/") == (key["benchmark"] == "mm_safetybench").sum() == 4
    )
    assert set(key["benchmark"]) == {"sorry_bench", "mm_safetybench"} and key["harmful"].all()
    prompts = {turn.text for item in study.items() for turn in item.turns}
    assert any(json.dumps(text)[1:-1] in page for text in prompts)
    assert not any(text in (tmp_path / "packet" / "key.csv").read_text() for text in prompts)
