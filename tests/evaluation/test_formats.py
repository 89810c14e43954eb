"""Result files as people have them: each published format in exactly its shape, with invented rows; what is left out is said."""

import csv
import io
import json
import subprocess
import sys

import openpyxl
import pytest
from official_files import everything, lines, write

from vlsafe import cli
from vlsafe.evaluation import formats
from vlsafe.evaluation.benchmarks import REAL, mm_safetybench, mme
from vlsafe.evaluation.judges.llm import LLM_JUDGES

NO, YES = "I'm sorry, but I can't.", "Take flour and water."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("data"))


@pytest.fixture
def scored(root, tmp_path, capsys):
    """`vlsafe score` as people call it; the result and what was printed, or None and the error."""

    def run(benchmark, responses, *options, data=root):
        out = tmp_path / "out" / "result.json"
        options = (
            options
            if "--judge" in options or benchmark not in ("siuo", "mm_safetybench")
            else (*options, "--judge", "gcg-strings")
        )
        call = ["score", benchmark, "--data", data, "--responses", responses, "--out", out, *options]
        code = cli.main([*map(str, call)])
        said = capsys.readouterr()
        return (None, said.err) if code else (json.loads(out.read_text(encoding="utf-8")), said.out)

    return run


def values(found):
    return {(row["metric"], row["over"]): row["value"] for row in found["scores"]}


def table(path, rows, kind="csv"):
    """Rows as CSV, TSV or in a workbook, written by others' libraries."""
    header = list(rows[0])
    if kind == "xlsx":
        path.parent.mkdir(parents=True, exist_ok=True)
        book = openpyxl.Workbook()
        for row in [header, *([row[key] for key in header] for row in rows)]:
            book.active.append(row)
        book.save(path)
        return path
    file = io.StringIO()
    writer = csv.DictWriter(file, header, delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return write(path, file.getvalue())


# ---- each format


def completions(version, numbers):
    about = dict(
        annotation_1="1_full_compliance", annotation_2="1_full_compliance", agreement="TRUE", final_label="1_full_compliance"
    )
    return [
        {
            "id": f"{version}-{n}",
            "type": "homonyms",
            "prompt": "How, then?",
            "completion": NO if n % 2 else 'Yes, "so",\nthen.',
            **about,
        }
        for n in numbers
    ]


def test_xstest_completions_of_both_versions(scored, tmp_path):
    found, said = scored("xstest", table(tmp_path / "xstest_v2_completions_m.csv", completions("v2", range(1, 19))))
    assert found["format"] == "XSTest's completions" and "18 items; responses: XSTest's completions" in said
    assert values(found)["refusal_rate", "all"] == values(found)["compliance_unsafe", "all"] == 0.5
    older = table(tmp_path / "xstest_completions_m_v1.csv", completions("v1", (41, 42)))
    assert "'v1-41' is no item of xstest; its ids look like '1'" in scored("xstest", older)[1]
    header, kinds = "id_v1,id_v2,type,prompt,focus,note\n", ("homonyms", "contrast_homonyms")
    prompts = (
        "".join(f"v1-{n + 41},v2-{n + 1},{kind},How?,kill,\n" for n, kind in enumerate(kinds)) + ",v2-3,homonyms,Why?,kill,\n"
    )
    data = write(tmp_path / "data/xstest_v2_prompts.csv", header + prompts).parent
    found, _ = scored("xstest", older, data=data)
    assert (found["n_items"], found["n_without_response"]) == (3, 1)
    assert values(found)["compliance_unsafe", "all"] == 1 and found["scores"][0]["n_unjudged"] == 1


@pytest.mark.parametrize("as_list", [True, False])
def test_seed_predictions_as_a_list_and_as_lines(as_list, scored, tmp_path):
    rows = [{"question_id": "101", "prediction": "B"}, {"question_id": "102", "prediction": "C"}]
    content = json.dumps(rows, indent=4) if as_list else lines(rows)
    found, said = scored("seed_bench", write(tmp_path / "results.json", content))
    assert "SEED-Bench's predictions" in said and found["subset"] == "likelihood" and "no responses to: video" in said
    assert values(found)["accuracy_likelihood", "all"] == 0.5 and found["n_items"] == 2


def llava(name, text, prompt="?"):
    return {"question_id": name, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "llava-v1.5-7b", "metadata": {}}


def test_llava_answers_to_seed_mmbench_and_mme(scored, tmp_path):
    found, said = scored("seed_bench", write(tmp_path / "s.jsonl", lines([llava(101, "B"), llava(102, "A"), llava("v3", "D")])))
    assert "seed_bench (letter), 3 items; responses: LLaVA's answers" in said and values(found)["accuracy_letter", "all"] == 1
    found, _ = scored("mmbench", write(tmp_path / "b.jsonl", lines(llava(n, "B") for n in (0, 1_000_000, 241, 1_000_241))))
    assert found["n_without_response"] == 2 and values(found)["accuracy", "all"] == pytest.approx(2 / 6)
    rows = [
        llava(f"existence/images/{n:06d}.jpg", answer, f"Is there a {thing} here?\n{mme.SUFFIXES[1]}")
        for n in range(2)
        for answer, thing in (("Yes", "kettle, red"), ("No", "ladder"))
    ]
    found, said = scored("mme", write(tmp_path / "m.jsonl", lines(rows)))
    assert values(found)["score", "task=existence"] == 200 and "LLaVA's answers" in said
    assert (
        "add one of question" in scored("mme", write(tmp_path / "n.jsonl", lines([llava("existence/000000.jpg", "Yes", 7)])))[1]
    )


@pytest.mark.parametrize("suffix", [".jpg", ".txt"])
def test_mme_folders_of_its_tool_and_of_llavas_converter(suffix, scored, root, tmp_path):
    for path in (root / "MME").glob("*.txt"):
        write(tmp_path / "answers/llava" / path.name, path.read_text().replace(".jpg\t", f"{suffix}\t").replace("\n", "\tYes\n"))
    found, said = scored("mme", tmp_path / "answers/llava")
    assert found["n_left_out"] == {"unknown": 0, "elsewhere": 0, "repeated": 0} and found["n_without_response"] == 0
    assert values(found)["score", "all"] == 700 and "MME's result folder" in said


def with_answers(folder, answers, n=13):
    """`questions_with_answers`: the questions of `n` scenarios, each with the answers that `answers` has of its number."""
    for scenario in list(mm_safetybench.SCENARIOS)[:n]:
        rows = {i: {"Question": "q", "Changed Question": "q", "Key Phrase": "bread", "ans": answers(i)} for i in ("0", "7")}
        write(folder / f"{scenario}.json", json.dumps(rows))
    return folder


def test_mm_safetybench_questions_with_answers(scored, tmp_path):
    text = {"0": NO, "7": YES}
    kinds = ("sd", "typo", "SD_TYPO", "text_only")

    def both(i):
        return {f"sd-llava_{kind}": {"text": text[i], "eval": {"safe": 0}} for kind in kinds}

    found, said = scored("mm_safetybench", with_answers(tmp_path / "questions_with_answers", both))
    assert (
        values(found)["attack_rate", "kind=SD_TYPO, mean of 13 scenarios"] == pytest.approx(0.5)
        and found["n_without_response"] == 0
    )
    assert "MM-SafetyBench's questions_with_answers" in said and not found["parts_without_responses"]
    several = with_answers(tmp_path / "several", lambda i: {"a": {"SD": NO, "TYPO": YES}, "b": {"SD": YES}}, 2)
    assert "answers of 2 models; say which by --model: a, b" in scored("mm_safetybench", several)[1]
    found, _ = scored("mm_safetybench", several, "--model", "a")
    assert found["parts_without_responses"] == ["SD_TYPO", "Text_only"] and found["scores"][0]["n_unjudged"] == 22
    assert scored("mm_safetybench", several, "--model", "b")[0]["n_items"] == 26
    assert "unknown model of" in scored("mm_safetybench", several, "--model", "c")[1]
    found, said = scored("mm_safetybench", several, "--model", "a", "--subset", "tiny")
    assert found["n_left_out"]["elsewhere"] == 4 and "left out (outside of tiny): 4, such as 0 (question 0 of" in said
    nameless = with_answers(tmp_path / "nameless", lambda i: {"llava": {"text": NO}}, 1)
    assert (
        "the answer 'llava' to question 0 of " in (error := scored("mm_safetybench", nameless)[1])
        and "no kind of picture" in error
    )


def test_siuo_responses_in_one_file_and_one_by_one(scored, root, tmp_path):
    rows = json.loads((root / "SIUO/data/siuo_gen.json").read_text())
    rows = [{**row, "responses": [NO, NO, YES] if n else [YES, YES, NO]} for n, row in enumerate(rows)]
    found, said = scored("siuo", write(tmp_path / "gen.json", json.dumps(rows, indent=4)))
    assert values(found)["Safe", "all"] == pytest.approx(8 / 9) and "SIUO's responses" in said
    for n, row in enumerate(rows[1:]):
        write(tmp_path / f"gpt4o/output_{n}-{row['question_id']}.json", json.dumps(row, indent=4))
    write(tmp_path / "gpt4o/error_log.txt", "an error")
    found, _ = scored("siuo", tmp_path / "gpt4o")
    assert found["n_without_response"] == 1 and found["scores"][0]["n_unjudged"] == 1
    rows = json.loads((root / "SIUO/data/siuo_mcqa.json").read_text())
    answered = [{**row, "response_mcqa": row["correct_option"]} for row in rows]
    found, _ = scored("siuo", write(tmp_path / "mcqa.json", json.dumps(answered, indent=4)), "--judge", "siuo-letters")
    assert found["subset"] == "mcqa" and values(found)["accuracy", "all"] == 1


def test_vlguard_answers_by_picture(scored, tmp_path):
    safe, unsafe = {"HOD/Ads_1.png": NO, "HOD/hod_3.png": YES}, {"bad_ads/b.png": YES}
    for group, answers in (("unsafes", unsafe), ("safe_unsafes", safe), ("safe_safes", safe)):
        write(tmp_path / "results" / group / "llava15-7b.json", json.dumps(answers, indent=4))
    found, said = scored("vlguard", tmp_path / "results")
    rates = values(found)
    assert "VLGuard's answers by picture" in said and found["n_without_response"] == 0
    assert (rates["ASR", "subset=unsafes"], rates["ASR", "subset=safe_unsafes"], rates["refusal_rate", "subset=safe_safes"]) == (
        1,
        0.5,
        0.5,
    )
    found, _ = scored("vlguard", tmp_path / "results/safe_unsafes/llava15-7b.json")
    assert found["n_items"] == 2 and found["parts_without_responses"] == ["unsafes", "safe_safes"]
    assert scored("vlguard", write(tmp_path / "elsewhere/m.json", json.dumps(unsafe)))[0]["n_items"] == 1
    error = scored("vlguard", write(tmp_path / "elsewhere/n.json", json.dumps(safe)))[1]
    assert (
        "asks two things about HOD/Ads_1.png, and the folder 'elsewhere' does not say which; name it unsafes or safe_unsafes"
        in error
    )
    write(tmp_path / "results/unsafes/other.json", json.dumps(unsafe))
    assert "answers of 2 models; say which by --model: llava15-7b, other" in scored("vlguard", tmp_path / "results")[1]


def upload(answers=("B", "A", "D", "C", "A", "B")):
    """What LLaVA's script uploads: MMBench's table without its pictures and categories, with predictions."""
    colours, turned = ["red", "blue", "green", "white"], dict(zip(range(4), "BADC", strict=True))
    rows = []
    for k in range(4):
        options = dict(zip("ABCD", colours[k:] + colours[:k], strict=True))
        rows.append(
            {"index": k * 1_000_000, "question": "What colour is it?", **options, "prediction": answers[k], "answer": turned[k]}
        )
    for k in range(2):
        options = dict(zip("ABCD", ["yes", "no", None, None][k:2] + ["yes"][:k] + [None, None], strict=False))
        rows.append(
            {
                "index": 241 + k * 1_000_000,
                "question": "What colour is it?",
                **options,
                "prediction": answers[4 + k],
                "answer": "A",
            }
        )
    return rows


@pytest.mark.parametrize("kind", ["xlsx", "tsv", "csv"])
def test_mmbench_uploads(kind, scored, tmp_path):
    found, said = scored("mmbench", table(tmp_path / f"llava.{kind}", upload(), kind))
    assert values(found)["circular_accuracy", "all"] == 1 and "a table of VLMEvalKit or MMBench" in said
    found, said = scored("mmbench", table(tmp_path / f"part.{kind}", upload(("= B", "A", "D", "C", None, "B")), kind))
    assert found["judges"][0]["unjudged"] == {"no response": 1} and found["labels"]["mmbench-letters"] == {"right": 5}, (
        "a formula is a text"
    )
    assert "unjudged by mmbench-letters: 1 (no response)" in said


def test_workbooks_that_cannot_be_read(scored, tmp_path, monkeypatch):
    whole = table(tmp_path / "whole.xlsx", upload(), "xlsx").read_bytes()
    for name, data in (("cut.xlsx", whole[:900]), ("text.xlsx", b"index,prediction\n"), ("empty.xlsx", b"")):
        assert f"{name} is no whole .xlsx file" in scored("mmbench", write(tmp_path / name, data))[1]
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    error = scored("mmbench", tmp_path / "whole.xlsx")[1]
    assert "whole.xlsx needs openpyxl: `pip install openpyxl`, or save the sheet as CSV" in error and len(error.splitlines()) == 1


def test_vlmevalkit_predictions_of_mme_and_of_another_version(scored, tmp_path):
    rows = [
        dict(
            index=n, category="existence", image_path=f"existence/{p:06d}.jpg", question=question, answer=right, prediction="Yes."
        )
        for n, (p, thing, right) in enumerate((p, *pair) for p in range(2) for pair in (("kettle, red", "Yes"), ("ladder", "No")))
        for question in [f"Is there a {thing} here? Please answer yes or no."]
    ]
    found, _ = scored("mme", table(tmp_path / "model_MME.xlsx", rows, "xlsx"))
    assert (values(found)["accuracy", "task=existence"], found["n_left_out"]["unknown"]) == (0.5, 0)
    other = dict(index=7, question="An invented question that is not there?", prediction="hm", answer="safe")
    error = scored("xstest", table(tmp_path / "model_XSTest.tsv", [other], "tsv"))[1]
    assert "row 1 of " in error and "has another question than the item 7; is it of another version of xstest?" in error


def sample(number, response, **metric):
    hashes = dict(doc_hash="a", prompt_hash="b", target_hash="c")
    return {"doc_id": number, "target": "B", "filtered_resps": [response], **hashes, **metric}


def test_lmms_evals_samples(scored, tmp_path):
    seed = [
        sample(
            n, text, input="How many?", seed_image=dict(pred="B", answer="B", question_id=name), seed_all=dict(question_id=name)
        )
        for n, (name, text) in enumerate((("101", "B. Two"), ("102", "a"), ("v3", "d")))
    ]
    path = write(tmp_path / "20260101_samples_seedbench.jsonl", lines(seed))
    found, said = scored("seed_bench", path, "--judge", "first-character")
    assert "(letter), 3 items; responses: lmms-eval's samples" in said and values(found)["accuracy_first_character", "all"] == 1
    pairs = [("kettle, red", "Yes"), ("ladder", "No")]
    asked_with = {n: f"Is there a {thing} here?\n{mme.SUFFIXES[1]}" for n, (thing, _) in enumerate(pairs)}
    rows = [
        sample(n, right, input=asked_with[n], mme_perception_score=dict(question_id="count/000001.jpg"))
        for n, (_, right) in enumerate(pairs)
    ]
    older = dict(doc={"question_id": "count/000000.jpg", "question": "Is there a ladder here? Please answer yes or no."})
    rows += [{"doc_id": 9, **older, "target": "No", "arguments": [], "resps": [["No"]]}]
    found, _ = scored("mme", write(tmp_path / "m.jsonl", lines(rows)))
    assert (values(found)["accuracy_plus", "task=count"], found["n_without_response"]) == (0.5, 1)
    mmbench = [sample(n, "B", gpt_eval_score=dict(index=n, prediction="B")) for n in (0, 241)]
    assert scored("mmbench", write(tmp_path / "b.jsonl", lines(mmbench)))[0]["n_without_response"] == 4
    ranked = write(tmp_path / "r.jsonl", lines([sample(0, [-1.5, False], seed_all=dict(question_id="101"))]))
    assert "row 1 of " in (error := scored("seed_bench", ranked)[1]) and "holds likelihoods" in error
    assert (
        "names no item: neither its doc nor a metric"
        in scored("mme", write(tmp_path / "n.jsonl", lines([sample(0, "A", acc=1.0)])))[1]
    )


# ---- what fits nothing, several formats, or only in part


def test_unknown_and_ambiguous_files_are_refused_in_one_line(scored, tmp_path):
    odd = write(tmp_path / "odd.json", json.dumps([{"prompt": "How?", "output": "So."}]))
    error = scored("mme", odd)[1]
    assert "is unknown: it is a file with the keys prompt, output. Known for mme: " in error and "MME's result folder" in error
    assert "XSTest" not in error and len(error.splitlines()) == 1
    assert "is unknown: it is a folder of odd.json." in scored("xstest", tmp_path)[1]
    both = write(tmp_path / "both.jsonl", lines([{"id": "1", "question_id": "2", "response": NO, "text": YES}]))
    error = scored("xstest", both)[1]
    assert (
        'may be lines with "id" and "response" (--format own) and LLaVA\'s answers (question_id, text) (--format llava)' in error
    )
    assert values(scored("xstest", both, "--format", "own")[0])["refusal_rate", "all"] == pytest.approx(0.1)
    assert values(scored("xstest", both, "--format", "llava")[0])["refusal_rate", "all"] == 0
    assert "is not SIUO's responses; it is a file with the keys" in scored("xstest", both, "--format", "siuo")[1]
    assert "did you mean 'llava'" in scored("xstest", both, "--format", "lava")[1]
    csv_file = table(tmp_path / "c.csv", completions("v2", (1,)))
    assert "is XSTest's completions: responses to xstest, not to sorry_bench" in scored("sorry_bench", csv_file)[1]
    assert "row 2 of " in (error := scored("siuo", write(tmp_path / "l.json", '[{"question_id": 1, "responses": []}, 3]'))[1])
    assert "is no JSON object but int" in error
    assert "holds no rows" in scored("seed_bench", write(tmp_path / "e.json", "[]"))[1]
    listed = with_answers(tmp_path / "lists", lambda i: {"llava_sd": NO}, 1)
    write(next(listed.iterdir()), "[]")
    assert "is not built as MM-SafetyBench's questions_with_answers" in scored("mm_safetybench", listed)[1]


def test_a_quote_that_is_not_closed_swallows_no_rows_and_two_columns_of_one_name_are_refused(scored, tmp_path):
    text = 'id,response\n1,Sure.\n2,"Sure.\n3,I cannot help.\n'
    assert "is a quote not closed?" in scored("xstest", write(tmp_path / "q.csv", text))[1]
    assert "several columns 'response'" in scored("xstest", write(tmp_path / "d.csv", "id,response,response\n1,Sure.,No.\n"))[1]


def test_answers_to_a_scenario_of_another_spelling_count(scored, tmp_path):
    folder = with_answers(tmp_path / "answers", lambda i: {"llava_sd": YES}, 2)
    for path in [*folder.iterdir()]:
        path.rename(folder / path.name.replace("Activitiy", "Activity"))
    write(folder / "notes.json", '{"0": {"ans": {"llava_sd": "x"}}, "accuracy": 1}')
    found, said = scored("mm_safetybench", folder)
    assert found, said
    assert found["n_left_out"]["unknown"] == 1 and found["scores"][0]["n_unjudged"] < found["n_items"]


def test_one_answer_more_than_the_others_have_is_named(scored, tmp_path):
    rows = [{"id": f"01-Illegal_Activitiy/SD/{n}", "response": YES} for n in (0, 7)]
    found, _ = scored("mm_safetybench", write(tmp_path / "r.jsonl", lines(rows)))
    assert not any("tries" in line for line in found["files"])
    wrong = write(tmp_path / "w.jsonl", lines([rows[0] | {"scenario": "02-HateSpeech"}]))
    assert "is an item of mm_safetybench, but not one of scenario '02-HateSpeech'" in scored("mm_safetybench", wrong)[1]
    blank = write(tmp_path / "b.jsonl", lines([rows[0] | {"scenario": "Illegal Activity", "kind": "SD"}]))
    assert scored("mm_safetybench", blank)[0]["n_items"] > 0


def test_what_is_left_out_is_counted_and_named(scored, tmp_path):
    rows = [{"question_id": n, "prediction": "B"} for n in ("101", "999", "101", "998", "997", "996")]
    found, said = scored("seed_bench", write(tmp_path / "r.jsonl", lines(rows)))
    assert found["n_left_out"] == {"unknown": 4, "elsewhere": 0, "repeated": 1} and found["n_without_response"] == 1
    assert "left out (no item of seed_bench has their id): 4, such as 999 (row 2), 998 (row 4), 997 (row 5)\n" in said
    assert (
        "left out (they repeat an item; the first counts): 1, such as 101 (row 3)" in said and "1 items have no response" in said
    )
    assert "'999' is no item of seed_bench" in scored("seed_bench", write(tmp_path / "s.jsonl", lines(rows[1:2])))[1]
    same = [{"id": "101", "response": "B"}] * 2
    assert scored("seed_bench", write(tmp_path / "t.jsonl", lines(same)))[0]["n_left_out"]["repeated"] == 1
    other = [*same, {"id": "101", "response": "C"}]
    assert "has 2 responses; seed_bench counts at most 1" in scored("seed_bench", write(tmp_path / "u.jsonl", lines(other)))[1]


def test_an_empty_cell_is_no_response_and_never_safe(scored, tmp_path):
    rows = completions("v2", range(1, 19))
    found, _ = scored("xstest", table(tmp_path / "c.csv", [{**row, "completion": ""} for row in rows[:2]] + rows[2:]))
    score = next(row for row in found["scores"] if (row["metric"], row["over"]) == ("refusal_rate", "all"))
    assert score["n_unjudged"] == 2 and score["value_high"] == pytest.approx(score["value"] + 0.2)


def test_every_format_says_where_it_comes_from_and_the_base_command_stays_small():
    for name, form in formats.FORMATS.items():
        assert form.title and all(one in REAL for one in form.benchmarks) and set(form.subset) <= set(REAL), name
        assert all(subset in REAL[one].OFFICIAL for one, subset in form.subset.items())
    code = "import sys, vlsafe.evaluation.formats; sys.exit(bool({'torch', 'transformers', 'openpyxl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- official files with the oddities of those that people have


def test_mmbench_with_a_last_option_that_stays(scored, tmp_path):
    """Four options, three rotations: the file of 2023."""
    options, rows = ["red", "blue", "green"], []
    for k in range(3):
        turned = [*options[-k:], *options[:-k]] if k else options
        cells = dict(zip("ABCD", [*turned, "none of these"], strict=True))
        row = dict(index=7 + k * 1_000_000, question="Which colour?", hint="", **cells, answer="ABC"[turned.index("red")])
        rows.append({**row, "category": "c", "image": "7" if k else "x"})
    data = table(tmp_path / "MMBench/dev.tsv", rows, "tsv").parent
    found, _ = scored(
        "mmbench", write(tmp_path / "r.jsonl", lines({"id": r["index"], "response": r["answer"]} for r in rows)), data=data
    )
    assert values(found)["circular_accuracy", "all"] == 1 and found["n_items"] == 3
    assert "1 questions have fewer rotations than options, first question-7: those that are there count" in found["files"]


def seed_file(path, *ids):
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("one", "two", "three", "four"), strict=True)}
    row = dict(answer="A", **choices, data_id="p", data_type="image", question="How many cups?", question_type_id=5)
    return write(path / "SEED-Bench.json", json.dumps({"questions": [{**row, "question_id": name} for name in ids]})).parent


@pytest.mark.parametrize(("questions", "answers", "repeated"), [("112", "AB", 0), ("12", "AAB", 1)])
def test_seed_ids_that_stand_there_twice(questions, answers, repeated, scored, tmp_path):
    rows = [{"id": name, "response": text} for name, text in zip("112" if repeated else "12", answers, strict=True)]
    found, _ = scored("seed_bench", write(tmp_path / "r.jsonl", lines(rows)), data=seed_file(tmp_path, *questions))
    assert values(found)["accuracy_likelihood", "all"] == 0.5 and found["scores"][0]["n"] == 2
    assert found["n_left_out"]["repeated"] == repeated
    assert ("1 question ids stand there again, first 1: the first of each counts" in found["files"]) is not bool(repeated)


@pytest.mark.parametrize(("response", "letter", "first"), [("a", 0, 1), ("A", 1, 1), ("b", 0, 0)])
def test_letters_without_case_by_the_rule_that_is_so_published(response, letter, first, scored, tmp_path):
    data, path = seed_file(tmp_path, "1"), write(tmp_path / "r.jsonl", lines([{"id": "1", "response": response}]))
    assert scored("seed_bench", path, data=data)[0]["scores"][0]["value"] == letter
    found, _ = scored("seed_bench", path, "--subset", "letter", "--judge", "first-character", data=data)
    assert values(found)["accuracy_first_character", "all"] == first


@pytest.mark.parametrize(
    ("answer", "picture", "points", "other"),
    [
        ("Yes", "a.txt", 200, 0),  # as LLaVA's converter writes it
        ("Yes\x0cindeed", "a.jpg", 200, 0),  # lines end with "\n" alone
        ("    Yes", "a.jpg", 125, 1),  # blanks are characters
        ("It is.", "a.jpg", 125, 1),
    ],
)
def test_mme_lines(answer, picture, points, other, scored, tmp_path):
    ask = lambda colour: f"Is it {colour}? Please answer yes or no."  # noqa: E731
    rows = [(p, ask(colour), right) for p in ("a.jpg", "b.jpg") for colour, right in (("red", "Yes"), ("blue", "No"))]
    data = write(tmp_path / "MME/color.txt", "".join("\t".join(row) + "\n" for row in rows)).parent
    rows = [(picture, rows[0][1], "Yes", answer), *((p, question, right, right) for p, question, right in rows[1:])]
    found, said = scored(
        "mme", write(tmp_path / "res/color.txt", "".join("\t".join(row) + "\n" for row in rows)).parent, data=data
    )
    assert values(found)["score", "task=color"] == points and found["labels"]["mme-yes-no"].get("other", 0) == other
    assert ("neither yes nor no to mme-yes-no: 1 (wrong, as published)" in said) == bool(other)
    named = [{"id": f"color/images/{p}", "question": question, "response": right} for p, question, right, *_ in rows[1:]]
    found, _ = scored("mme", write(tmp_path / "r.jsonl", lines(named)), data=data)
    assert (found["n_without_response"], values(found)["accuracy", "task=color"]) == (1, 0.75)


def test_responses_to_the_full_set_do_for_the_tiny_one(scored, root, tmp_path):
    items, _ = REAL["mm_safetybench"].load(root, pictures=False)
    path = write(tmp_path / "r.jsonl", lines({"id": item.id, "response": YES} for item in items))
    found, _ = scored("mm_safetybench", path, "--subset", "tiny")
    assert (found["n_items"], found["n_left_out"]["elsewhere"], found["n_without_response"]) == (52, 52, 0)
    judgements = write(tmp_path / "j.jsonl", lines({"id": item.id, "judgement": "unsafe"} for item in items))
    found, _ = scored(
        "mm_safetybench", path, "--subset", "tiny", "--judge", "mm-safetybench-criteria", "--judgements", judgements
    )
    assert found["scores"][0]["value"] == pytest.approx(1) and found["judges"][0]["unjudged"] == {}
    figs, _ = REAL["figstep"].load(root, pictures=False)
    path = write(tmp_path / "f.jsonl", lines({"id": item.id, "response": NO} for item in figs))
    found, _ = scored("figstep", path, "--subset", "tiny", "--judge", "gcg-strings")
    assert (found["n_items"], found["n_left_out"]["elsewhere"]) == (3, 6)


def test_the_judge_of_xstest_asks_in_the_published_spacing():
    template = LLM_JUDGES["xstest-gpt4"].template
    assert [line[:9] for line in template.splitlines() if line][1:] == [f"{' ' * 8}{start}" for start in "123QRC"]
    assert template.count(" " * 9) == 3
