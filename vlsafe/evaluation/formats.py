"""Formats in which responses are published: what each is recognised by, and its rows as `{"id", "response"}`.

FORMATS says what the rows or files of a format are called and which function reads them: a new one is a function and an entry
there. Readers name the item as the file does, with what else tells items of one name apart, and judge nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from vlsafe.core.scale import known
from vlsafe.core.schema import Item
from vlsafe.core.texts import read_json, text_lines
from vlsafe.evaluation.benchmarks import REAL, mm_safetybench, mme, vlguard
from vlsafe.evaluation.contents import Content, Row, contents, listed

Rows = Iterator[tuple[str, dict[str, Any]]]  # where a row stands, and the row
QUOTED = "(question)"  # key of a question that has to be the item's
IDS = ("question_id", "index", "id")  # under which lmms-eval's tasks and metrics name an item
KIND = re.compile(r"(?<![a-z])(sd[^a-z]*typo|typo|sd|text[^a-z]*only)(?![a-z])", re.IGNORECASE)
KINDS = {re.sub("[^a-z]", "", kind.lower()): kind for kind in mm_safetybench.COLUMNS}


class Wanted(NamedTuple):
    """What a reader may look at beside the file: the benchmark, its items, and which of several models is meant."""

    benchmark: ModuleType
    items: Sequence[Item]
    model: str | None = None


class Format(NamedTuple):
    """A published format. `keys`: those of a row, any one set of which tells it; `fits` where keys do not tell.

    `benchmarks` are those that it exists for (none: any), `subset` is what responses in it were generated for.
    """

    title: str
    read: Callable[[Content, Wanted], Rows]
    keys: Sequence[set[str]] = ()
    fits: Callable[[Content], bool] = lambda content: False
    benchmarks: Sequence[str] = ()
    subset: Mapping[str, str] = {}

    def holds(self, content: Content) -> bool:
        """Whether a place looks like this format."""
        return any(keys <= set(content.keys) for keys in self.keys if content.rows) or self.fits(content)


class Source(NamedTuple):
    """Responses in a place whose format is known; `model` is the one that is meant where the place holds several."""

    content: Content
    format: Format
    model: str | None = None

    @property
    def name(self) -> str:
        """That of the file or folder."""
        return self.content.path.name

    def rows(self, benchmark: ModuleType, items: Sequence[Item]) -> Rows:
        """Where each row stands, and the row with `id`, `response` and what tells items of one name apart.

        Raises:   ValueError naming the row, or the file where it is built otherwise than its format
        """
        try:
            yield from self.format.read(self.content, Wanted(benchmark, items, self.model))
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{self.content.path} is not built as {self.format.title} ({error})") from error


# ---- recognising


def opened(path: Path, benchmark: str, name: str | None = None, model: str | None = None) -> Source:
    """A place and its format: the one of that name, or the only one that fits.

    Raises:   FileNotFoundError; ValueError where nothing fits, naming the keys that are there and the formats; where several do
    """
    known(benchmark, REAL, "benchmark")
    content = contents(path)
    fitting = {one: form for one, form in FORMATS.items() if form.holds(content)}
    if name is not None and known(name, FORMATS, "format") not in fitting:
        raise ValueError(f"{path} is not {FORMATS[name].title}; {_found(content)}")
    chosen = {name: FORMATS[name]} if name else {n: f for n, f in fitting.items() if benchmark in (f.benchmarks or [benchmark])}
    if len(chosen) > 1:
        both = " and ".join(f"{form.title} (--format {one})" for one, form in chosen.items())
        raise ValueError(f"{path} may be {both}: say which")
    if chosen:
        return Source(content, next(iter(chosen.values())), model)
    if fitting:
        form = next(iter(fitting.values()))
        raise ValueError(f"{path} is {form.title}: responses to {' or '.join(form.benchmarks)}, not to {benchmark}")
    known_ones = "; ".join(form.title for form in FORMATS.values() if benchmark in (form.benchmarks or [benchmark]))
    raise ValueError(f"the format of {path} is unknown: {_found(content)}. Known for {benchmark}: {known_ones}")


def _found(content: Content) -> str:
    """What a place holds, in some words."""
    return f"it is {'a folder of' if content.path.is_dir() else 'a file with the keys'} {listed(content.keys)}"


# ---- readers of rows


def _value(row: Row, key: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where} has no {key}; it has {listed(row)}")
    return row[key]


def own(content: Content, wanted: Wanted) -> Rows:
    """`{"id", "response"}`, ours: ids as the official files write them, and what else tells items of one id apart."""
    for where, row in content.numbered():
        yield where, {**row, "id": _value(row, "id", where), "response": _value(row, "response", where)}


def columns(name: str, response: str, question: str = "") -> Callable[[Content, Wanted], Rows]:
    """A reader of rows that name the item in one column and hold the response in another."""

    def read(content: Content, wanted: Wanted) -> Rows:
        """Rows as `columns` says."""
        for where, row in content.numbered():
            more = {"question": row[question]} if isinstance(row.get(question), str) else {}
            yield where, {"id": _value(row, name, where), "response": _value(row, response, where), **more}

    return read


def siuo(content: Content, wanted: Wanted) -> Rows:
    """SIUO's rows with `responses`, three a question, or `response_mcqa`; or its folder of one such row a file.

    Source:   sinwang20/SIUO, eval/generation-gpt4o-gen.py and eval/generation-gpt4o-mcqa.py
    """
    files = ((path.name, read_json(path)) for path in sorted(content.path.glob("output_*.json")))
    for where, row in files if content.path.is_dir() else content.numbered():
        answers = row.get("response_mcqa", row.get("responses"))
        for answer in answers if isinstance(answers, list) else [answers]:
            yield where, {"id": _value(row, "question_id", where), "response": answer}


def vlmevalkit(content: Content, wanted: Wanted) -> Rows:
    """A table with `index` and `prediction`: what MMBench takes as an upload and VLMEvalKit keeps of every benchmark.

    Its indices are MMBench's own. MME's items are told by picture and question, others by index and question, because the
    indices of its copies are not everywhere those of the official files.

    Source:   haotian-liu/LLaVA, scripts/convert_mmbench_for_submission.py; open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py
    """
    for where, row in content.numbered():
        name, question = _value(row, "index", where), row.get("question")
        if wanted.benchmark is mme:
            name = f"{_value(row, 'category', where)}/{str(_value(row, 'image_path', where)).rpartition('/')[2]}"
        more = {"scenario": row["category"]} if wanted.benchmark is mm_safetybench and "category" in row else {}
        more |= {"question": question, QUOTED: question} if question else {}
        yield where, {"id": name, "response": _value(row, "prediction", where), **more}


def lmms_eval(content: Content, wanted: Wanted) -> Rows:
    """lmms-eval's `--log_samples`: generated answers, of items that the document or a metric of the row names.

    Source:   EvolvingLMMs-Lab/lmms-eval, lmms_eval/evaluator.py and lmms_eval/loggers/evaluation_tracker.py

    Raises:   ValueError where a row names no item, or holds likelihoods instead of answers
    """
    for where, row in content.numbered():
        held = next((part for part in row.values() if isinstance(part, dict) and any(key in part for key in IDS)), None)
        if held is None:
            raise ValueError(f"{where} names no item: neither its doc nor a metric has {', '.join(IDS)}")
        question = row["doc"].get("question") if isinstance(row.get("doc"), dict) else row.get("input")
        answers = row.get("filtered_resps", row.get("resps"))
        for answer in answers if isinstance(answers, list) else [answers]:
            while isinstance(answer, list) and len(answer) == 1:
                answer = answer[0]
            if not isinstance(answer, str | None):
                raise ValueError(f"{where} holds likelihoods, or several answers to a request; single generated ones are read")
            more = {"question": question} if isinstance(question, str) else {}
            yield where, {"id": next(held[key] for key in IDS if key in held), "response": answer, **more}


# ---- readers of folders and mappings


def mme_folder(content: Content, wanted: Wanted) -> Rows:
    """A text file per task: picture, question, right answer and response between tabs.

    LLaVA's converter writes the name of the file with the questions (0020.txt) where the picture's stands; both are found.

    Source:   MME's eval_tool; BAAI-DCAI/Bunny, eval/mme/convert_answer_to_mme.py (LLaVA's converter)
    """
    files = {path.stem.casefold(): path for path in content.path.glob("*.txt")}
    for task, path in ((task, files.get(task.casefold())) for task in mme.TASKS):
        for number, line in text_lines(path) if path else ():
            where, fields = f"line {number} of {path}", line.split("\t")
            if len(fields) < 4:
                raise ValueError(f"{where} has fewer than 4 fields between tabs")
            picture, question, _, *response = fields
            yield where, {"id": f"{task}/{picture}", "question": question, "response": "\t".join(response)}


def mm_safetybench_folder(content: Content, wanted: Wanted) -> Rows:
    """`questions_with_answers`: the questions of each scenario, with answers under `ans` by model and kind of picture.

    The names of answers are read in any order and nesting ("llava_SD_TYPO", or "llava" and in it "SD_TYPO").

    Source:   isXinLiu/MM-SafetyBench, evaluation.py, as others describe it: the file itself was not at hand

    Raises:   ValueError where an answer's name tells no kind of picture, or there are several models and none is chosen
    """
    answers: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    known_names = {mm_safetybench.plain(scenario): scenario for scenario in mm_safetybench.SCENARIOS}
    for path in sorted(content.path.glob("*.json")):  # one of another name is of a scenario that is unknown, and counted as such
        rows, scenario = read_json(path), known_names.get(mm_safetybench.plain(path.stem))
        if scenario is None:
            rows = {number: row for number, row in rows.items() if isinstance(row, dict)} if isinstance(rows, dict) else {}
        for number, row in rows.items():
            for name, text in _leaves(row.get("ans") or {}):
                kinds = KIND.findall(name)
                if not kinds:
                    of = f"the answer {name!r} to question {number} of {path}"
                    raise ValueError(f"{of} tells no kind of picture: {', '.join(KINDS.values())}")
                kind, model = KINDS[re.sub("[^a-z]", "", kinds[-1].lower())], KIND.sub("", name).strip("_-/ .") or "model"
                known_as = {"id": number, "scenario": scenario or path.stem, "kind": kind, "response": text}
                answers.setdefault(model, []).append((f"question {number} of {path}", known_as))
    yield from answers[_one(list(answers), wanted.model, content.path)]


def _leaves(answers: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Answers with the names that lead to them; what is no mapping, or one with `text`, is an answer."""
    for name, value in answers.items():
        if isinstance(value, dict) and "text" not in value:
            yield from _leaves(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value["text"] if isinstance(value, dict) else value


def vlguard_results(content: Content, wanted: Wanted) -> Rows:
    """`{picture: answer}` in a folder named after what was asked (`safe_unsafes/model.json`), or the folder of these folders.

    Source:   ys-zong/VLGuard, VLGuard_eval.py

    Raises:   ValueError where a picture was asked about in two ways and the folder's name does not say in which
    """
    folders = [content.path / group for group in vlguard.SIZES if group in content.keys] if content.path.is_dir() else []
    models = sorted({path.stem for folder in folders for path in folder.glob("*.json")})
    model = _one(models, wanted.model, content.path) if folders else ""
    files = [path for folder in folders if (path := folder / f"{model}.json").exists()] or [content.path]
    groups = {item.note: item.group for item in wanted.items}
    for path in files:
        group = path.resolve().parent.name
        for picture, answer in (read_json(path) if folders else content.mapping or {}).items():
            if group not in vlguard.SIZES and groups.get(picture, "unsafes") != "unsafes":
                where = f"{path}: VLGuard asks two things about {picture}, and the folder {group!r} does not say which"
                raise ValueError(f"{where}; name it {' or '.join(vlguard.SIZES)}, as its script does")
            more = {"subset": group} if group in vlguard.SIZES else {}
            yield f"{picture} of {path}", {"id": picture, "response": answer, **more}


def _one(models: Sequence[str], model: str | None, path: Path) -> str:
    """The model that is meant; raises ValueError naming those that are there."""
    if not models:
        raise ValueError(f"{path} holds no responses")
    if model is None and len(models) > 1:
        raise ValueError(f"{path} holds answers of {len(models)} models; say which by --model: {', '.join(models)}")
    return known(model or models[0], models, f"model of {path}")


def _files(*patterns: str) -> Callable[[Content], bool]:
    return lambda content: content.path.is_dir() and any(re.fullmatch("|".join(patterns), key) for key in content.keys)


def _pictured(content: Content) -> bool:
    pictures = re.compile(r".*\.(jpe?g|png|webp|gif|bmp)", re.IGNORECASE | re.DOTALL)
    return _files(*vlguard.SIZES)(content) or (content.mapping is not None and all(map(pictures.fullmatch, content.keys)))


FORMATS: dict[str, Format] = {
    "own": Format('lines with "id" and "response"', own, [{"id", "response"}]),
    "xstest": Format("XSTest's completions", columns("id", "completion"), [{"id", "completion"}], benchmarks=["xstest"]),
    "seed": Format("SEED-Bench's predictions", columns("question_id", "prediction"), [{"question_id", "prediction"}]),
    "llava": Format(
        "LLaVA's answers (question_id, text)", columns("question_id", "text", "prompt"), [{"question_id", "text"}],
        subset={"seed_bench": "letter"},
    ),
    "siuo": Format(
        "SIUO's responses", siuo, [{"question_id", "responses"}], _files(r"output_.*\.json"), benchmarks=["siuo"]
    ),
    "siuo-mcqa": Format(
        "SIUO's choices", siuo, [{"question_id", "response_mcqa"}], benchmarks=["siuo"], subset={"siuo": "mcqa"}
    ),
    "vlmevalkit": Format("a table of VLMEvalKit or MMBench (index, prediction)", vlmevalkit, [{"index", "prediction"}]),
    "lmms-eval": Format(
        "lmms-eval's samples", lmms_eval, [{"doc_id", "target", "filtered_resps"}, {"doc_id", "target", "resps"}],
        subset={"seed_bench": "letter"},
    ),
    "mme": Format(
        "MME's result folder (its tool's or LLaVA's)", mme_folder, (), _files(*(f"{task}.txt" for task in mme.TASKS)), ["mme"]
    ),
    "mm-safetybench": Format(
        "MM-SafetyBench's questions_with_answers", mm_safetybench_folder, (),
        _files(*(f"{scenario}.json" for scenario in mm_safetybench.SCENARIOS)), ["mm_safetybench"],
    ),
    "vlguard": Format("VLGuard's answers by picture", vlguard_results, fits=_pictured, benchmarks=["vlguard"]),
}  # fmt: skip
