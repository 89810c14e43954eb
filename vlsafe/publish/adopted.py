"""`vlsafe examine` and `vlsafe probe`: somebody else's model goes through the stages, gallery and report that ours go through."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vlsafe import analysis, evaluation, publish
from vlsafe.study import adopted
from vlsafe.study.adopted import EXAMINED, PROBES, Request
from vlsafe.study.study import Study

Arguments = argparse.Namespace
EXAMINATION = ("T02_degradation", "F03_categories", "T08_models", "T08_capable", "F15_judges", "F15_agreement")
INSIDE = ("F07_drift", "F07_layer_similarity", "F07_cka", "F07_probes", "F09_localisation", "F09_scaling")
PROBED = ".probed"  # what is added to the name of a study that probes: a part of its prompts chooses, and is not reported


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Describe `vlsafe examine` and `vlsafe probe` to the parser; `command` makes the one of a function."""
    added = command(examine, "examine a vision-language model that others have trained, and the language model that it came from")
    _add_model(added, "--parent", dict(default="", help="the language model that it came from: it is asked what has no picture"))
    added.add_argument("--benchmarks", nargs="+", default=[], help="by default all whose official files are below VLSAFE_DATA")
    added.add_argument("--judges", nargs="+", default=[], metavar="JUDGE[=WHERE]",
                       help="models that judge beside rules: a name, NAME=FOLDER or NAME=ADDRESS")  # fmt: skip
    served = "generate by a server: its address (…#MODEL), or a command with {folder} and {port}"
    added.add_argument("--serve", default="", help=served)
    added.add_argument("--limit", type=int, default=0, help="items per benchmark, spread evenly; all without it")
    added.add_argument("--max-new-tokens", type=int, default=512)
    added = command(probe, "which layers of somebody else's model have moved from its parent, which way, and where safety lies")
    _add_model(added, "--parent", dict(required=True, help="the language model that it came from"))
    added.add_argument("--prompts", type=Path, help="a CSV or lines of JSON with text, label (harmful, benign) and maybe image")
    added.add_argument("--max-new-tokens", type=int, default=32)


def _add_model(added: argparse.ArgumentParser, parent: str, settings: dict[str, Any]) -> None:
    added.add_argument("model", help="a folder, or a repository in the hub's cache (owner/name@revision)")
    added.add_argument(parent, **settings)
    added.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja, in place of the model's own")
    added.add_argument("--parent-chat-template", type=Path, metavar="FILE", help="likewise of its parent")
    added.add_argument("--batch-size", type=int, default=16, help="prompts at a time; halved where they do not fit")
    added.add_argument("--root", type=Path, default=Path("runs"), help="the run store")
    added.add_argument("--name", default="", help="of its place there; by default the model's")
    added.add_argument("--out", type=Path, help="tables, figures and report.html; by default figures/NAME (of probe NAME.probed)")


def _request(arguments: Arguments, **more: Any) -> Request:
    exam = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens, **more.pop("exam", {})}
    templates = arguments.chat_template, arguments.parent_chat_template
    return Request(arguments.model, arguments.parent, *templates, exam=exam, **more)


def examine(arguments: Arguments) -> None:
    """Examine a model and its parent; the table, what it was made by, and where everything is."""
    limit = {"full": arguments.limit} if arguments.limit else {}
    request = _request(
        arguments, benchmarks=arguments.benchmarks, judges=arguments.judges, exam={"serve": arguments.serve, **limit}
    )
    study, lacking = adopted.opened(request, arguments.root, arguments.name)
    for name, why in lacking.items():
        print(f"{name}: not at hand ({why})", file=sys.stderr)
    names = [name for name in EXAMINED if name not in study.left_out()]
    out = published(study, names, arguments.out, EXAMINATION, "How safe is this model, and how safe was its parent?")
    caption = (out / "T02_degradation.md").read_text(encoding="utf-8").rstrip().splitlines()[-1]
    table = pd.read_csv(out / "T02_degradation.csv")
    print(shown(table), caption, sep="\n\n")
    for side, column in (("the parent", "parent_capable"), ("the model", "instruct_capable")):
        for verdict in table.reindex(columns=[column])[column].dropna().astype(str).unique():
            if verdict.startswith("no: "):
                print(f"{side} may not be able to answer at all ({verdict[4:]}); then its rates are not about safety")
    print(f"\n{_here(out / 'report.html')}; answers and verdicts: {', '.join(_here(study.run(name).folder) for name in names)}")
    print(f"for other commands: --scale {shlex.quote(_here(Path(study.file)))} --backbone {study.backbone}")


def probe(arguments: Arguments) -> None:
    """Compare a model with its parent inside."""
    sources = [name for names in evaluation.prompts.OFFICIAL.values() for name in names if name in evaluation.benchmarks.REAL]
    share = 0.5 if arguments.prompts else 0.2  # a file holds fewer
    request = _request(arguments, prompts=arguments.prompts, among=sources, validation=share)
    study, _ = adopted.opened(request, arguments.root, arguments.name, PROBED)
    out = published(study, list(PROBES), arguments.out, INSIDE, "What of the parent has moved in this model, and where?")
    band, direction = study.numbers("probe/localisation"), study.numbers("probe/direction")
    located = f"safety band [{band['band'][0]}, {band['band'][1]})" if band["located"] else "no safety band"
    print(f"{located}: {band['reason']}")
    print(f"refusal direction: of block {direction['layer']}, by {direction['prompts']} prompts\n{_here(out / 'report.html')}")


def _here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def published(study: Study, names: Sequence[str], out: Path | None, artefacts: Sequence[str], title: str) -> Path:
    """Make stages, then tables and figures of them and the report; where these are."""
    out = out or study.figures
    publish.report.refuse_other(out / "report.html")
    if others := publish.provenance.studies_in(out) - {(study.backbone, study.seed)}:
        raise ValueError(f"{out} holds tables of {', '.join(sorted({name for name, _ in others}))}; choose another --out")
    for name in names:
        study.folder(name)
    frames, runs = publish.results.results([study]), publish.results.made_by([study], sorted(adopted.STAGES))
    for line in publish.gallery.make(frames, study.scale.name, out, runs, only=artefacts).left_out.itertuples():
        print(f"left out: {line.what}: {line.reason}", file=sys.stderr)
    publish.report.report(out, out / "report.html", f"{study.scale.name}: {title}")
    return out


def shown(table: pd.DataFrame) -> str:
    """T02 for a terminal: a line per measure of the model."""
    frame = analysis.degradation.sheet(table.dropna(subset=["instruct_n"])).rename(columns={"adapted": "model"})
    return publish.provenance.markdown(frame.drop(columns=["backbone", "seeds"]))
