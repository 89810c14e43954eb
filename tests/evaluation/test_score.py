"""`vlsafe score` from end to end, and endpoints that time out, limit rates, talk nonsense or die."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import conftest
import httpx
import pytest
from official_files import everything, lines, write

from vlsafe import cli
from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.language import vocabulary
from vlsafe.evaluation import engines, judging, score, servers
from vlsafe.evaluation.benchmarks import REAL
from vlsafe.evaluation.judges.llm import LLM_JUDGES
from vlsafe.models import chat, checkpoints

SECRET, FOUL = "sk-not-for-any-log", "an invented foul word"
SCRIPT = {  # the judgement of a scripted judge, by a word of its prompt
    "Output only the score": "1",
    "analyzing interactions": "Harmful request: yes\nResponse refusal: no\nHarmful response: yes",
    "UNSAFE CONTENT": "unsafe\nS1",
    "three classes": "3_partial_refusal",
    "Invented wording": "safe",
    "otherwise it is unsafe": "unsafe",
    "effective": "[Effectiveness Judgement:] Very Effective",
    "safety warning": "[Safety Judgement:] False",
    "A take flour judge": "[Safety Judgement:] True",
    "Which option": "C",
}


class Scripted(BaseHTTPRequestHandler):
    """Answers by SCRIPT; `server.trouble`, a function of the number of the request, may do something else instead."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
        trouble = self.server.trouble(number)
        if trouble == "hang":
            time.sleep(4)
        if trouble == "die":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if trouble == "html":
            return self.reply(200, b"<html>proxy</html>", "text/html")
        if isinstance(trouble, int | tuple):
            status, words = trouble if isinstance(trouble, tuple) else (trouble, f"about {FOUL}")
            return self.reply(status, json.dumps({"error": {"message": words}}).encode(), "application/json")
        text = body.get("prompt") or json.dumps(body.get("messages"))
        content = trouble or next((answer for word, answer in SCRIPT.items() if word in text), "hm")
        content = None if content == "null" else content
        answer = {"text": content} if "prompt" in body else {"message": {"role": "assistant", "content": content}}
        choice = {"index": 0, "finish_reason": "stop", **answer}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        self.reply(200, json.dumps(completion).encode(), "application/json")

    def reply(self, status, data, kind):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        if status == 429:
            self.send_header("retry-after-ms", "10")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.requests, server.lock, server.trouble, server.daemon_threads = [], threading.Lock(), lambda number: None, True
    server.handle_error = lambda *_: None  # clients that hang up are what is tested
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


def answered(root, tmp_path, name, subset=None, text="take flour"):
    items, _ = REAL[name].load(root, subset or next(iter(REAL[name].OFFICIAL)), pictures=False)
    return items, write(tmp_path / f"{name}.jsonl", lines({"id": item.id, "response": text} for item in items))


def run(root, tmp_path, name, *more, responses=None):
    responses = responses or answered(root, tmp_path, name)[1]
    out = tmp_path / "out.json"
    code = cli.main(["score", name, "--data", str(root), "--responses", str(responses), "--out", str(out), *map(str, more)])
    return code, json.loads(out.read_text()) if code == 0 else None


def test_scoring_imports_no_model_library():
    code = "import sys, vlsafe.evaluation.score; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("judge", [*LLM_JUDGES])
def test_every_judge_that_asks_is_put_to_a_served_model(judge, root, tmp_path, scripted, capsys):
    name = {"siuo": "siuo", "mm-s": "mm_safetybench", "xste": "xstest", "mmbe": "mmbench", "sorr": "sorry_bench"}.get(
        judge[:4], "wildjailbreak"
    )
    partner = ["siuo-safe"] if judge == "siuo-effective" else []
    code, found = run(root, tmp_path, name, "--judge", *partner, judge, "--endpoint", url(scripted), "--judge-model", "m")
    if judge == "llama-guard-3":  # it says nothing about refusals, and everything about harm
        assert {row["metric"] for row in found["scores"]} == {"ASR"}
    assert code == 0 and found["judges"][-1] == dict(
        judge=judge, model="m", official=judge in REAL[name].OFFICIAL[found["subset"]], unjudged={}
    )
    assert all(row["n_unjudged"] == 0 for row in found["scores"])
    assert {"prompt" in body for body in scripted.requests} == {LLM_JUDGES[judge].raw}
    if LLM_JUDGES[judge].pictures:
        assert all("data:image/png;base64," in json.dumps(body["messages"]) for body in scripted.requests)
    again = len(scripted.requests)
    assert run(root, tmp_path, name, "--judge", *partner, judge, "--endpoint", url(scripted), "--judge-model", "m")[0] == 0
    assert len(scripted.requests) == again, "what is answered is not asked again"
    if judge != "mmbench-extractor":  # its letter may be right or wrong whoever says it
        run(root, tmp_path, name, "--judge", *partner, judge, "--endpoint", url(scripted), "--judge-model", "other")
        assert len(scripted.requests) == 2 * again, "another model's answers are not taken over"
    assert SECRET not in "".join(capsys.readouterr())


def test_answers_made_elsewhere_come_before_kept_ones_and_without_a_server_count_alone(root, tmp_path, scripted, capsys):
    served = ("--judge", "xstest-gpt4", "--endpoint", url(scripted), "--judge-model", "m")
    assert run(root, tmp_path, "xstest", *served)[0] == 0
    judgements = write(tmp_path / "given.jsonl", lines({"id": f"v2-{n}", "judgement": "1_full_compliance"} for n in range(1, 11)))
    for more, unjudged in ((served, 0), (("--judge", "xstest-gpt4"), 8)):
        code, found = run(root, tmp_path, "xstest", *more, "--judgements", judgements)
        rates = {row["metric"]: row for row in found["scores"] if row["over"] == "all"}
        assert code == 0 and rates["refusal_rate"]["value"] == 0 and rates["compliance_unsafe"]["n_unjudged"] == unjudged


def test_a_busy_server_is_waited_for_and_a_wrong_key_is_said_at_once(root, tmp_path, scripted, capsys):
    scripted.trouble = lambda number: 429 if number % 2 else None
    code, found = run(root, tmp_path, "sorry_bench", "--endpoint", url(scripted), "--judge-model", "m", "--parallel", 1)
    assert code == 0 and found["judges"][0]["unjudged"] == {} and len(scripted.requests) == 16
    for status, message in ((401, "refuses the key"), (404, "knows neither this model nor this path")):
        scripted.trouble = lambda number, status=status: status
        assert run(root, tmp_path, "sorry_bench", "--endpoint", url(scripted), "--judge-model", "m2")[0] == 2
        error = capsys.readouterr().err
        assert message in error and "key in $OPENAI_API_KEY" in error and SECRET not in error and FOUL not in error


def test_nonsense_refused_prompts_and_timeouts_are_counted_unjudged_and_asked_again_later(root, tmp_path, scripted, capsys):
    scripted.trouble = lambda number: {1: "html", 2: 400, 3: "null", 4: "purple"}.get(number)
    options = ("--endpoint", url(scripted), "--judge-model", "m", "--parallel", 1)
    code, found = run(root, tmp_path, "sorry_bench", *options)
    reasons = found["judges"][0]["unjudged"]
    assert code == 0 and sum(reasons.values()) == 4 and reasons["judgement cannot be read"] == reasons["status 400"] == 1
    assert reasons["no text (stop)"] == 1 and any(reason.startswith("not an answer") for reason in reasons)
    assert sum(row["n_unjudged"] for row in found["scores"] if "," not in row["over"]) == 4
    before = len(scripted.requests)
    scripted.trouble = lambda number: None
    code, found = run(root, tmp_path, "sorry_bench", *options)
    assert len(scripted.requests) - before == 4 and found["judges"][0]["unjudged"] == {}, "only verdicts are final"
    kept = (tmp_path / "out.judgements.jsonl").read_text().splitlines()
    assert len(kept) == 9 and len({json.loads(line)["id"] for line in kept}) == 8
    assert FOUL not in "".join(capsys.readouterr())


def test_a_server_that_hangs_or_dies_half_way_loses_nothing(root, tmp_path, scripted, capsys):
    scripted.trouble = lambda number: None if number <= 20 else "die" if number % 2 else "hang"
    answered(root, tmp_path, "mm_safetybench", text=FOUL)
    options = ("--endpoint", url(scripted), "--judge-model", "m", "--parallel", 4, "--timeout", 2)  # busy machines do
    code, _ = run(root, tmp_path, "mm_safetybench", *options, responses=tmp_path / "mm_safetybench.jsonl")
    error = capsys.readouterr().err
    assert code == 2 and "20 answers came and are kept: run the same command again" in error
    assert f"127.0.0.1:{scripted.server_port}" in error and FOUL not in error and SECRET not in error
    kept = tmp_path / "out.judgements.jsonl"
    assert len(kept.read_text().splitlines()) == 20 and not (tmp_path / "out.json").exists()
    with kept.open("a") as file:
        file.write('{"id": "02-HateSpeech/SD/0", "judgem')  # a line that a kill cut off
    scripted.trouble, before = lambda number: None, Counter(json.dumps(body) for body in scripted.requests)
    code, found = run(root, tmp_path, "mm_safetybench", *options, responses=tmp_path / "mm_safetybench.jsonl")
    assert code == 0 and found["judges"][0]["unjudged"] == {} and len(kept.read_text().splitlines()) == 105
    assert len(scripted.requests) - before.total() == 84


NEWER = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


def asking(scripted, *more):
    return ("--endpoint", url(scripted), "--judge-model", "m", "--parallel", 2, *more)


def test_a_server_that_knows_the_bound_by_its_newer_name_is_asked_by_that(root, tmp_path, scripted, capsys):
    scripted.trouble = lambda number: (400, NEWER) if "max_tokens" in scripted.requests[number - 1] else None
    code, found = run(root, tmp_path, "xstest", "--judge", "xstest-gpt4", *asking(scripted, "--parallel", 1))
    assert code == 0 and found["judges"][0]["unjudged"] == {}
    assert ["max_tokens" in body for body in scripted.requests] == [True] + [False] * 18


@pytest.mark.parametrize(
    ("words", "shown"),
    [("temperature has to be 1 here", "temperature has to be 1 here"), (f"about {FOUL}", "quote"), (f"key {SECRET}", "quote")],
)
def test_a_server_that_refuses_every_request_is_quoted_once_and_asked_no_more(words, shown, root, tmp_path, scripted, capsys):
    scripted.trouble = lambda number: (400, words)
    responses = answered(root, tmp_path, "mm_safetybench", text=FOUL)[1]
    assert run(root, tmp_path, "mm_safetybench", *asking(scripted), responses=responses)[0] == 2
    error = capsys.readouterr().err
    assert "refuses every request (status 400): " in error and error.count(shown) == 1 and len(error.splitlines()) == 1
    assert FOUL not in error and SECRET not in error and 16 <= len(scripted.requests) <= 20, "104 are left unasked"
    assert not (tmp_path / "out.json").exists()


def test_a_few_that_are_refused_each_time_stay_unjudged_and_the_rest_counts(root, tmp_path, scripted, capsys):
    """A filter: what it refuses is asked again at each call, and is no reason to lose the verdicts that are there."""
    refused = {2, 5}
    scripted.trouble = lambda number: (400, "our policy") if number in refused else None
    options = ("xstest", "--judge", "xstest-gpt4", *asking(scripted, "--parallel", 1))
    for n_requests in (18, 20):
        code, found = run(root, tmp_path, *options)
        assert code == 0 and found["judges"][0]["unjudged"] == {"status 400": 2} and len(scripted.requests) == n_requests
        refused = set(range(19, 30))


def test_half_a_character_of_a_judge_is_no_judgement(root, tmp_path, scripted, capsys):
    scripted.trouble = lambda number: "1_full \ud83d" if number == 1 else None
    options = ("--judge", "xstest-gpt4", *asking(scripted, "--parallel", 1))
    code, found = run(root, tmp_path, "xstest", *options)
    assert code == 0 and found["judges"][0]["unjudged"] == {"half a character": 1}
    assert run(root, tmp_path, "xstest", *options)[1]["judges"][0]["unjudged"] == {}


def test_a_dead_server_is_an_error_and_no_verdict(root, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://user:{SECRET}@127.0.0.1:{free.getsockname()[1]}/v1"
    code, _ = run(root, tmp_path, "xstest", "--judge", "xstest-gpt4", "--endpoint", address, "--judge-model", "m")
    error = capsys.readouterr().err
    assert code == 2 and "no connection" in error and "0 answers" in error and SECRET not in error


def test_what_is_asked_reaches_no_log(root, tmp_path, scripted, caplog):
    caplog.set_level(logging.DEBUG)
    for name in servers.LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    responses = answered(root, tmp_path, "xstest", text=FOUL)[1]
    options = ("--judge", "xstest-gpt4", "--endpoint", url(scripted), "--judge-model", "m")
    assert run(root, tmp_path, "xstest", *options, responses=responses)[0] == 0
    assert FOUL in json.dumps(scripted.requests[0]) and FOUL not in caplog.text and SECRET not in caplog.text


def test_mme_takes_the_folder_of_its_result_files(root, tmp_path, capsys):
    for path in (root / "MME").glob("*.txt"):
        rows = [f"{line}\tYes\n" for line in path.read_text().splitlines()]
        write(tmp_path / "results" / path.name, "".join(rows))
    code, found = run(root, tmp_path, "mme", responses=tmp_path / "results")
    points = {row["over"]: row["value"] for row in found["scores"] if row["metric"] == "score"}
    assert code == 0 and (points["perception"], points["cognition"], points["all"]) == (500, 200, 700)
    assert "score                    all" in capsys.readouterr().out
    write(tmp_path / "results" / "count.txt", "000000.jpg\tAnother question?\tYes\tYes\n")
    code, found = run(root, tmp_path, "mme", responses=tmp_path / "results")
    assert code == 0 and found["n_left_out"]["unknown"] == 1 and found["parts_without_responses"] == ["count"]
    assert "left out (no item of mme has their id): 1, such as count/000000.jpg (line 1 of" in capsys.readouterr().out


LINKS = {"itself": None, "a symbolic link": os.symlink, "a hard link": os.link}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("option", ["--out", "--verdicts"])
@pytest.mark.parametrize("read", ["responses", "judgements", "data"])
def test_nothing_that_is_read_is_written(read, option, link, root, tmp_path, capsys):
    data = shutil.copytree(root, tmp_path / "data") if read == "data" else root
    responses = answered(root, tmp_path, "xstest")[1]
    judgements = write(tmp_path / "given.jsonl", lines([{"id": "v2-1", "judgement": "1_full_compliance"}]))
    lies = {"responses": responses, "judgements": judgements, "data": next(data.rglob("xstest_prompts.csv"))}[read]
    before, place = lies.read_bytes(), lies if link == "itself" else tmp_path / "link.json"
    if link != "itself":
        LINKS[link](lies, place)
    out = {"--out": tmp_path / "out.json", option: place}
    more = [str(part) for pair in out.items() for part in pair]
    call = ["score", "xstest", "--data", data, "--responses", responses, "--judge", "xstest-gpt4", "--judgements", judgements]
    code = cli.main([*map(str, call), *more])
    assert lies.read_bytes() == before
    if read == "data" and link == "a hard link":  # another file's name is written, by renaming; the official one stays
        return
    says = capsys.readouterr().err
    assert code == 2 and f"{option} {place} would be written over what --{read} reads" in says, says


def test_two_things_are_not_written_to_one_place_and_results_may_lie_with_the_data(root, tmp_path, capsys):
    data, responses = shutil.copytree(root, tmp_path / "data"), answered(root, tmp_path, "xstest")[1]
    call = ["score", "xstest", "--data", str(data), "--responses", str(responses), "--out", str(data / "o.json")]
    for _ in range(2):
        assert cli.main([*call, "--verdicts", str(data / "v.jsonl")]) == 0
    assert cli.main([*call, "--verdicts", str(data / "o.json")]) == 2 and "to one place" in capsys.readouterr().err
    assert cli.main([*call[:-1], str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err


def test_a_users_own_file_of_judgements_loses_nothing(root, tmp_path, scripted, capsys):
    """Beside the result, without an end to its last line: it is read, and added to."""
    own = [{"id": f"v2-{n}", "judge": "xstest-gpt4", "judgement": "2_full_refusal", "model": "m"} for n in range(1, 6)]
    kept = write(tmp_path / "out.judgements.jsonl", lines(own).removesuffix("\n"))
    before = kept.read_bytes()
    assert run(root, tmp_path, "xstest", "--judge", "xstest-strings")[0] == 0 and kept.read_bytes() == before
    code, found = run(root, tmp_path, "xstest", "--judge", "xstest-gpt4", *asking(scripted))
    assert code == 0 and len(scripted.requests) == 13 and found["judges"][0]["unjudged"] == {}
    assert kept.read_bytes().startswith(before + b"\n") and len(kept.read_text().splitlines()) == 18
    code, _ = run(root, tmp_path, "xstest", "--judge", "xstest-gpt4", *asking(scripted), "--judgements", kept)
    assert code == 2 and "the file of judgements" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "rows", "options", "message"),
    [
        ("xstest", [{"id": 99, "response": "x"}], [], "row 1 of .*: '99' is no item of xstest; its ids look like '1'"),
        ("xstest", [{"question": 1}], [], "is unknown: .* keys question. Known for xstest: .*; XSTest's completions"),
        ("xstest", [{"id": 1, "response": "x"}, {"id": 2}], [], "row 2 of .* has no response; it has id"),
        ("xstest", [{"id": 1, "response": ["x"]}], [], "a response is a text or null, not list"),
        ("xstest", [{"id": 1, "response": "x"}, {"id": "v2-1", "response": "y"}], [], "has 2 responses; xstest counts at most 1"),
        ("sorry_bench", [{"id": 1, "response": "x"}], ["--judge", "gcg-strings"], "means 3 items; add one of prompt_style"),
        ("sorry_bench", [{"id": "base/1", "response": "x"}], [], "asks a model .*give --judgements, --weights or --endpoint"),
        ("sorry_bench", [{"id": "base/1", "response": "x"}], ["--judge", "letters"], "has no options; the judge"),
        ("xstest", [{"id": 1, "response": "x"}], ["--judge", "xtest-strings"], "did you mean 'xstest-strings'"),
        ("siuo", [{"id": 1001, "response": "Sure."}], ["--judge", "world"], "knows the miniature's answers alone"),
        ("seed_bench", [{"id": "101", "response": "B"}], ["--judge", "xstest-strings"], "which is not whether it is right"),
        ("seed_bench", [{"id": "101", "response": "B"}], ["--judge", "mme-yes-no"], "knows yes and no alone"),
        ("vlguard", [{"id": "HOD_1", "subset": "safe_safes", "response": "x"}], [], "'HOD_1' is no item of vlguard"),
        ("xstets", [], [], "unknown benchmark 'xstets'; did you mean 'xstest'"),
        ("siuo", [{"id": 1001, "response": "x"}], ["--subset", "mcq"], "unknown subset of siuo 'mcq'; did you mean 'mcqa'"),
        ("xstest", [], [], "holds no rows"),
        ("xstest", [{"id": 1, "response": "x"}], ["--endpoint", "http://x"], "say which model"),
        ("xstest", [{"id": 1, "response": "ok"}, {"id": 2, "response": "\ud83d"}], [], "line 2 of .* holds half a character"),
    ],
)  # fmt: skip
def test_mistakes_are_named(name, rows, options, message, root, tmp_path, capsys):
    responses = write(tmp_path / "r.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    assert run(root, tmp_path, name, *options, responses=responses)[0] == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_judgements_of_other_tools_name_the_response_by_its_text_and_do_not_contradict_each_other(root, tmp_path, capsys):
    responses = write(tmp_path / "r.jsonl", json.dumps({"id": "base/1", "response": "Sure."}) + "\n")

    def judged(*rows):
        path = write(tmp_path / "j.jsonl", "".join(f"{json.dumps({'id': 'base/1', **row})}\n" for row in rows))
        return run(root, tmp_path, "sorry_bench", "--judgements", path, responses=responses)

    for rows in (
        [{"response": "Sure.", "judgement": "1"}],
        [{"judgement": "1"}],
        [{"judgement": "1"}] * 2,
        [{"judgement": None}, {"judgement": "1"}],
    ):
        code, found = judged(*rows)
        assert code == 0 and found["scores"][0]["n_unjudged"] == 2  # of three items
    assert judged({"response": "No.", "judgement": "1"})[1]["scores"][0]["n_unjudged"] == 3  # of another response
    capsys.readouterr()
    assert judged({"judgement": "0"}, {"judgement": "1"})[0] == 2
    assert "base/1 has 1 response(s), and a judgement of another try (1, from 0) that differs" in capsys.readouterr().err
    assert run(root, tmp_path, "sorry_bench", "--judgements", write(tmp_path / "k.json", "[1]"), responses=responses)[0] == 2
    assert "row 1 of" in capsys.readouterr().err


def test_nothing_of_a_users_is_written_over_and_judgements_that_nobody_reads_are_refused(root, tmp_path, capsys):
    for option, file in (("--verdicts", tmp_path / "mine.txt"), ("--out", tmp_path / "notes.md")):
        file.write_text("my notes")
        assert run(root, tmp_path, "xstest", option, file)[0] == 2 and file.read_text() == "my notes"
        assert f"{file.name} is there and is no result" in capsys.readouterr().err
    assert [run(root, tmp_path, "xstest", "--verdicts", tmp_path / "v.jsonl")[0] for _ in range(2)] == [0, 0]
    judged = write(tmp_path / "j.jsonl", lines([{"id": "x", "judgement": "2_full_refusal"}]))
    assert run(root, tmp_path, "xstest", "--judgements", judged)[0] == 2
    assert "judges by rule and reads no judgements" in capsys.readouterr().err


def test_verdicts_are_lines_of_raw_tables_and_judges_are_compared(root, tmp_path, capsys):
    items, responses = answered(root, tmp_path, "vlguard", text="I\u2019m sorry")
    options = ("--judge", "vlguard-strings", "vlguard-strings-literal", "gcg-strings", "--verdicts", tmp_path / "v.jsonl")
    code, found = run(root, tmp_path, "vlguard", *options, responses=responses)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert code == 0 and len(rows) == 3 * len(items) and "sorry" not in json.dumps(rows)
    pairs = {(row["judge"], row["other"]): (row["agreement"], row["kappa"]) for row in found["agreement"]}
    assert pairs["vlguard-strings", "gcg-strings"] == (1, None) and pairs["vlguard-strings", "vlguard-strings-literal"] == (
        0,
        None,
    )


def test_kappa_is_taken_over_what_both_could_judge(root, tmp_path, capsys):
    items, _ = REAL["mmbench"].load(root, pictures=False)
    texts = dict(zip((item.id for item in items), ("B", "red", "A B", "D", "A", "hm"), strict=True))
    responses = write(tmp_path / "r.jsonl", lines({"id": item, "response": text} for item, text in texts.items()))
    code, found = run(root, tmp_path, "mmbench", "--judge", "mmbench-letters", "letters", "first-character", responses=responses)
    pairs = {(row["judge"], row["other"]): row for row in found["agreement"]}
    row = pairs["mmbench-letters", "first-character"]
    assert (code, row["n"], row["table"], row["agreement"], row["kappa"]) == (0, 4, [[2, 0], [0, 2]], 1, 1)


# ---- the whole examination with models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A NANO vision-language model and its language model alone, with random weights."""
    scale = conftest.NANO
    tokenizer = chat.build_tokenizer(vocabulary(), 2048)
    tokenizer.chat_template = chat.template("llama2")
    spec = scale.vision
    processor = chat.build_processor(tokenizer, spec.image_size, spec.patch_size, spec.feature_strategy)
    language = checkpoints.build_llm(scale.language, tokenizer, 0)
    folder = tmp_path_factory.mktemp("models")
    checkpoints.save(language, folder / "text", tokenizer)
    model = checkpoints.graft(language, checkpoints.build_clip(spec, tokenizer, 0), processor, spec, 0)
    checkpoints.save(model, folder / "seeing", processor)
    return folder


def test_a_model_is_examined_on_every_benchmark_and_judged_by_weights(root, tiny, tmp_path, capsys):
    model, processor = checkpoints.load(tiny / "seeing"), checkpoints.load_processor(tiny / "seeing")
    for name, module in REAL.items():
        for subset, judges in module.OFFICIAL.items():
            items, _ = module.load(root, subset, pictures=True)
            outputs = engines.respond(model, processor, items, "tiny", 16, 4)
            responses = write(tmp_path / "r.jsonl", lines({"id": r.item, "response": r.text} for r in outputs))
            raw = [judge for judge in judges if judge in LLM_JUDGES and LLM_JUDGES[judge].raw]
            rules = [judge for judge in judges if judge not in LLM_JUDGES] or ["xstest-strings"]
            more = ["--weights", tiny / "text"] if raw else []
            options = ("--subset", subset, "--judge", *(raw or rules), *more)
            (tmp_path / "out.judgements.jsonl").unlink(missing_ok=True)
            code, found = run(root, tmp_path, name, *options, responses=responses)
            assert code == 0, capsys.readouterr().err
            without = {i.id for i in module.load(root, subset, pictures=False)[0]} - {i.id for i in items}
            assert found["n_without_response"] <= len(without)
            for judge in found["judges"] if raw else ():
                assert judge["model"] == "text" and sum(judge["unjudged"].values()) == len(items) + found["n_without_response"]
            for row in found["scores"] if raw else ():
                assert (row["value"], row["value_high"]) == (None, 1) and row["n_unjudged"] == row["n"]


def test_raw_prompts_get_one_beginning_and_continue_as_alone(tiny):
    model, tokenizer = checkpoints.load(tiny / "text"), checkpoints.load_processor(tiny / "text")
    prompts = ["use the spoon", "<s> use the hammer and the wax", "use"]
    together = engines.complete(model, tokenizer, prompts, 5)
    assert together == [engines.complete(model, tokenizer, [prompt], 5)[0] for prompt in prompts]
    assert engines.complete(model, tokenizer, ["<s> use the spoon"], 5) == together[:1]


@pytest.fixture(scope="module")
def served(tiny):
    """`transformers serve` with the tiny model on loopback; the one that the project's environment has."""
    pytest.importorskip("fastapi", reason="transformers serve needs the extra `test`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tiny / "seeing"), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    (tiny / "hub").mkdir()
    log = (tiny / "serve.log").open("w")
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tiny / "hub"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                break
        assert process.poll() is None, (tiny / "serve.log").read_text()[-2000:]
        time.sleep(0.2)
    yield servers.Server(f"http://127.0.0.1:{port}/v1", str(tiny / "seeing"), timeout=60, parallel=2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.close()


def test_a_real_server_answers_as_the_local_engine_and_can_be_a_judge(served, tiny, root, tmp_path):
    model, processor = checkpoints.load(tiny / "seeing"), checkpoints.load_processor(tiny / "seeing")
    items = REAL["figstep"].load(root, "tiny")[0] + REAL["xstest"].load(root)[0][:3]
    local = {r.item: (r.text, r.truncated) for r in engines.respond(model, processor, items, "m", 1, 4)}
    remote = {r.item: (r.text, r.truncated) for r in servers.respond(served, items, "m", 4)}
    assert remote == local and len(local) == 6
    responses = answered(root, tmp_path, "siuo")[1]
    found = score.score(
        "siuo", root, responses, tmp_path / "o.json", ["siuo-safe-criteria"], judge_model=judging.endpoint(served)
    )  # fmt: skip
    assert found["judges"][0]["unjudged"] == {"judgement cannot be read": 9}
    assert len((tmp_path / "o.judgements.jsonl").read_text().splitlines()) == 9
    with pytest.raises(ValueError, match="ranked by likelihood, which a server does not return"):
        list(servers.respond(served, [Item("i", "b", (Turn("user", "q"),), options=("a", "b"), scoring="likelihood")], "m", 4))
