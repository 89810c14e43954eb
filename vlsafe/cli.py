"""The `vlsafe` command: thin. Every error that a user can make ends in one line that names the thing and the remedy."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlsafe import analysis, evaluation, models, planning, plots, publish
from vlsafe.core import failures, store
from vlsafe.core.presets import load_scale
from vlsafe.core.scale import known
from vlsafe.core.schema import MAIN_LINE, MEDIAN_SEED
from vlsafe.study import graph, judging
from vlsafe.study.graph import STAGES
from vlsafe.study.study import Study, project_root

Arguments = argparse.Namespace
Parser = argparse.ArgumentParser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 where results differ or miss published ones, 2 on a mistake of the caller."""
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("vlsafe: stopped; what was written stays, and the same command goes on with what it keeps", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads has seen enough: `vlsafe status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ModuleNotFoundError) as error:
        unnamed = error.strerror if isinstance(error, OSError) and not error.filename else None
        if isinstance(error, ModuleNotFoundError):
            if (error.name or "vlsafe").partition(".")[0] == "vlsafe":
                raise  # a fault of ours
            unnamed = f"{error}; the base install leaves out models and notebooks: `pip install '.[all]'` in the repository"
        print("\n".join(map(failures.shortened, f"vlsafe: {unnamed or error}".splitlines())), file=sys.stderr)
        return 2


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default or action.default == 0 else action.help


def _options(*options: tuple[str, dict[str, Any]], of: Sequence[Parser] = ()) -> Parser:
    """Options that several commands share."""
    parser = Parser(add_help=False, parents=of)
    for name, settings in options:
        parser.add_argument(name, **settings)
    return parser


ROOT = _options(("--root", dict(type=Path, default=Path("runs"), help="the run store")))
PLACE = _options(("--scale", dict(default="mini", help="a preset or the path of a YAML file")), of=[ROOT])
SEED = dict(type=int, help=f"without it {MEDIAN_SEED} at mini, the median of eight, and 0 at other scales")
STUDY = _options(("--backbone", dict(default="mini-chat")), ("--seed", SEED), of=[PLACE])
STUDIES = _options(("--backbones", dict(nargs="+", default=["mini-chat"])), ("--seeds", dict(nargs="+", **SEED)), of=[PLACE])
GRID = _options(("--grid", dict(choices=graph.GRIDS, default="default", help='"full" adds recipes, merges, fine-tunings again')))
OUTSIDE = _options(("--scale", dict(default="paper", help="a preset or the path of a YAML file")))
FIGURES = _options(("--figures", dict(type=Path, default=Path("figures/mini"))))


def _parser() -> Parser:
    parser = Parser(prog="vlsafe", description="Train, examine, probe and merge models; score results; write tables and figures.")
    commands = parser.add_subparsers(required=True)

    def command(run: Callable[[Arguments], Any], text: str, *shared: Parser, name: str = "", of: Any = commands) -> Parser:
        """Add a subcommand that is called as its function is."""
        name = name or run.__name__.strip("_")
        added = of.add_parser(name, help=text, description=text, parents=shared, formatter_class=Formatter)
        added.set_defaults(run=run)
        return added

    for group in (_add_runs, _add_outside, publish.merged.add_commands, publish.adopted.add_commands, _add_results, _add_human):
        group(command)
    return parser


def _add_runs(command: Callable[..., Parser]) -> None:
    """The runs of one study, and of several."""
    names: dict[str, Any] = dict(metavar="STAGE", help="such as instruct/filtered-full; `vlsafe status` lists all")
    added = command(_stage, "make stages, and what they need, one after another", STUDY)
    added.add_argument("names", nargs="+", **names)
    added.add_argument("--gpus", type=int, default=0, help="use up to this many GPUs that no other stage of this run store uses")
    added.add_argument("--attempt", type=int, default=1, help="how often a scheduler has tried this, the present try included")
    command(_fresh, "remove the runs of stages, so that they are made again", STUDY).add_argument("names", nargs="+", **names)
    added = command(_card, "write the model cards of finished runs, beside their folders (all runs without a name)", STUDY)
    added.add_argument("names", nargs="*", **names)
    added = command(_notebook, "execute one notebook with checked parameters", STUDY)
    added.add_argument("name")
    added.add_argument("--out", type=Path, required=True)
    command(_notebooks, "copy the outputs of mini, median seed, into the committed notebooks", ROOT)
    added = command(_agree, "answer the panel by the local engine and by a server of the same checkpoint, and compare", STUDY)
    added.add_argument("model", help="a run, such as instruct/filtered-full")
    added.add_argument("--serve", required=True, help="the server's command, with {folder} and {port}")
    command(_golden, "record the miniature's golden numbers, from a clean tree", PLACE)
    added = command(_unlock, "remove the lock of a killed scheduler, where none is at work, and become the next one")
    added.add_argument("--root", type=Path, default=Path("."))
    added.add_argument("command", nargs="*", help="after --: what is at work from now on")
    deep = _options(("--deep", dict(action="store_true", help="compare file contents, not times")))
    command(_sweep, "remove the receipts of runs that are not valid, so that the scheduler makes them again", STUDIES, deep)
    command(_status, "say of every stage whether its run is valid", STUDIES, deep)


def _add_outside(command: Callable[..., Parser]) -> None:
    """Models, data and responses that others made, and what a scale needs of them."""
    added = command(_score, "score stored responses, or those of a run, to a real benchmark by its official metric", STUDY)
    added.add_argument("benchmark", help="xstest, sorry_bench, mm_safetybench …; docs/benchmarks.md lists them")
    data = "its official files, or a folder of many; for MME the tool's own Your_Results is one"
    added.add_argument("--data", type=Path, default=os.environ.get("VLSAFE_DATA"), help=data)
    added.add_argument("--subset", help="tiny, mcqa, letter …; by default what the responses' format is made for, else the first")
    added.add_argument("--responses", type=Path, help='lines of {"id", "response"}, or a file or folder as published')
    added.add_argument("--format", dest="form", help="of a file that fits several: xstest, seed, llava, vlmevalkit, lmms-eval …")
    added.add_argument("--run", dest="stage", metavar="STAGE", help="instead a run, such as examination/instruct.filtered-full")
    added.add_argument("--model", help="which of its models, where the run or folder holds several")
    added.add_argument("--judge", dest="judges", nargs="+", default=[], help="by default the official one")
    added.add_argument("--judgements", type=Path, help='verdict texts from elsewhere: lines of {"id", "judgement"}')
    added.add_argument("--endpoint", help="an OpenAI-compatible address, such as http://127.0.0.1:8000/v1")
    added.add_argument("--judge-model", help="the model to ask for there; by default that of the first --judge that asks a model")
    added.add_argument("--key", default="OPENAI_API_KEY", help="the environment variable that holds the endpoint's key")
    added.add_argument("--parallel", type=int, default=8, help="requests at a time")
    added.add_argument("--timeout", type=float, default=120.0, help="seconds")
    added.add_argument("--weights", type=Path, help="a model folder that judges here")
    added.add_argument("--out", type=Path, required=True, help="the result, as JSON; judgements are kept beside it")
    added.add_argument("--verdicts", type=Path, help="also write every verdict, a line each")
    added = command(
        _dryrun, "say what a scale would cost, from its shapes; with --measure, from steps on this machine", PLACE, GRID
    )
    added.add_argument("--backbone")
    added.add_argument("--gpu", default="A100-80G", help="the card to count with, by name")
    added.add_argument("--measure", action="store_true", help="take some steps with random weights first")
    added.add_argument("--stages", action="store_true", help="a line for every stage, in place of one for each kind")
    added.add_argument("--readme", type=Path, help="write the summary of all scales into this file instead")
    added = command(_doctor, "say what a scale needs from outside and what of it is here", OUTSIDE)
    added.add_argument("--deep", action="store_true", help="compare checksums as well")
    added = command(_download, "fetch what a scale needs: weights into the hub's cache, corpora into VLSAFE_DATA", OUTSIDE)
    added.add_argument("--only", nargs="+", default=[], help="names as the doctor lists them")
    added.add_argument("--unpack", action="store_true", help="unpack pictures, for training at speed")


def _add_results(command: Callable[..., Parser]) -> None:
    """Tables, figures and pages."""
    added = command(_gallery, "write every table and figure", STUDIES, GRID)
    added.add_argument("--out", type=Path)
    added.add_argument("--all", action="store_true", help="of all studies of the scale that the run store has")
    publish.archive.add_commands(command, STUDIES)
    command(_readme, "make the generated parts of README.md and docs again from figures/mini", FIGURES)
    added = command(_diff, "compare two folders of results; 1 where they differ")
    added.add_argument("results", nargs=2, type=Path)
    added.add_argument("--atol", type=float, default=0.005, help="the greatest difference that does not count")
    added = command(_published, "hold a model of a gallery's folder against published numbers; 1 where one is missed", FIGURES)
    added.add_argument("--run", dest="stage", metavar="STAGE", default=MAIN_LINE["adapted"], help="the model, as T08 names it")
    added.add_argument("--model", help="the published model that it is held against; any one of them by default")
    added = command(_report, "one HTML file of a gallery's folder, the claims on top", FIGURES)
    added.add_argument("--out", type=Path, default=Path("report.html"))


def _add_human(command: Callable[..., Parser]) -> None:
    """People as a judge."""
    rating = command(_human_report, "people as a judge: packets out, ratings in", name="human").add_subparsers(required=True)
    out = _options(("--out", dict(type=Path, required=True)))
    added = command(_human_export, "write a blinded packet for raters and its key", out, STUDIES, GRID, name="export", of=rating)
    added.add_argument("--prompts", type=int, default=4, help="prompts per study and kind; each goes to every model")
    added.add_argument("--draw", type=int, default=0, help="seed of the choice and the order")
    added = command(_human_import, "read ratings: problems, agreement, verdicts", out, name="import", of=rating)
    added.add_argument("files", nargs="+", type=Path)
    added.add_argument("--key", type=Path, required=True)
    added = command(_human_report, "judges against people", out, STUDIES, GRID, name="report", of=rating)
    added.add_argument("--people", type=Path, required=True, help="people.csv of an import")


def _study(arguments: Arguments) -> Study:
    return Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)


def _studies(arguments: Arguments) -> list[Study]:
    places = dict.fromkeys((backbone, seed) for backbone in arguments.backbones for seed in arguments.seeds or [None])
    return [Study.open(arguments.scale, *place, arguments.root) for place in places]


def _stages(arguments: Arguments) -> list[str]:
    return [known(name, STAGES, "stage") for name in arguments.names]


def _stage(arguments: Arguments) -> None:
    study, names = _study(arguments), _stages(arguments)
    runs = [study.run(name) for name in names]
    with failures.lasting(runs, arguments.attempt), models.devices.claimed(arguments.gpus, study.root):
        for name in names:
            study.folder(name)


def _fresh(arguments: Arguments) -> None:
    study = _study(arguments)
    for name in _stages(arguments):
        print(f"{name}: {'removed' if store.forget(study.run(name)) else 'no such run'} ({study.backbone}, seed {study.seed})")


def _card(arguments: Arguments) -> None:
    study = _study(arguments)
    for name in _stages(arguments):
        publish.modelcards.card(study, name)  # a mistake is an error before anything is written
    print(*publish.modelcards.write_cards(study, arguments.names or list(STAGES)), sep="\n")


def _notebook(arguments: Arguments) -> None:
    path = publish.notebooks.FOLDER / f"{known(arguments.name, publish.notebooks.NOTEBOOKS, 'notebook')}.ipynb"
    of = {"backbone": arguments.backbone, "seed": _study(arguments).seed, "scale": arguments.scale, "root": str(arguments.root)}
    publish.notebooks.execute(path, arguments.out, of)


def _notebooks(arguments: Arguments) -> None:
    for name in publish.notebooks.adopt_all(arguments.root, store.environment()["packages"]):
        print(f"{name}: outputs copied")


def _agree(arguments: Arguments) -> None:
    from vlsafe.study.degradation import engines_agree

    for row in engines_agree(_study(arguments), known(arguments.model, STAGES, "run"), arguments.serve):
        change = "; change {:+.3f} [{:+.3f}, {:+.3f}]".format(*row["change"]) if "change" in row else ""
        print(f"{row['what']}: {row['share']:.3f} the same of {row['n']}{change}")


def _golden(arguments: Arguments) -> None:
    publish.golden.record(Study.open(arguments.scale, "mini-chat", None, arguments.root), publish.golden.FILE)
    print(f"{publish.golden.FILE}: recorded")


def _unlock(arguments: Arguments) -> None:
    planning.scheduler.unlock(arguments.root, arguments.command)


def _sweep(arguments: Arguments) -> None:
    for line in planning.scheduler.sweep(_studies(arguments), arguments.deep):
        print(line)


def _status(arguments: Arguments) -> None:
    for line in planning.scheduler.status(_studies(arguments), arguments.deep):
        print(line)


def _score(arguments: Arguments) -> None:
    if arguments.data is None:
        raise ValueError("say where the official files are: --data DIR, or the environment variable VLSAFE_DATA")
    if arguments.endpoint and arguments.weights:
        raise ValueError("a judge is asked either at an --endpoint or by --weights")
    if (arguments.responses is None) == (arguments.stage is None):
        raise ValueError("say which responses: those of a file by --responses, or those of a run by --run")
    responses = arguments.responses or judging.stored(
        _study(arguments), known(arguments.stage, STAGES, "run"), arguments.benchmark, arguments.model
    )
    judge_model = evaluation.judging.weights(arguments.weights) if arguments.weights else None
    if arguments.endpoint:
        judge_model = evaluation.judging.served(
            arguments.judges, arguments.endpoint, arguments.judge_model, arguments.key, arguments.timeout, arguments.parallel
        )
    if isinstance(responses, Path):
        responses = evaluation.formats.opened(responses, arguments.benchmark, arguments.form, arguments.model)
    result = evaluation.score.score(
        arguments.benchmark, Path(arguments.data), responses, arguments.out, arguments.judges, arguments.subset,
        arguments.judgements, judge_model, arguments.verdicts,
    )  # fmt: skip
    print(*evaluation.score.lines(result), sep="\n")


def _dryrun(arguments: Arguments) -> None:
    costs, dryrun = planning.costs, planning.dryrun
    if arguments.readme:
        rows = [(many, gpu, Study.open(scale, backbone, 0, Path("runs"))) for many, gpu, scale, backbone in dryrun.README_ROWS]
        text = arguments.readme.read_text(encoding="utf-8")
        store.write_text(arguments.readme, dryrun.in_readme(text, planning.shown.summary(rows)))
        return
    scale, gpu = load_scale(arguments.scale), known(arguments.gpu, dryrun.GPUS, "GPU")
    study = Study(scale, arguments.backbone or next(iter(scale.backbones)), 0, arguments.root)
    scale.backbone(study.backbone)
    found = dryrun.measure(scale, study.backbone) if arguments.measure else {}
    for name, value in found.items():
        print(f"measured {name}: {value}")
    plan = costs.Plan(study, gpu, costs.Rates(found.get("mfu"), found.get("prefill_mfu"), found.get("bandwidth")), arguments.grid)
    stages = plan.stages()
    print(dryrun.table(planning.shown.lines(stages, gpu, arguments.stages)))
    for many in (1, 8):
        time = costs.schedule(study, stages, many)
        chain = f"longest chain {time.chain_hours:,.1f} h: {', '.join(time.chain) or 'none'}"
        print(f"\n{many} × {gpu}: {time.hours:,.1f} h; {chain}")
    for line in planning.shown.too_large(stages, gpu):
        print(f"\n{line}")
    print("\nComputed from shapes unless a line says otherwise; assumptions are in planning/costs.py and Scale.traffic.")


def _doctor(arguments: Arguments) -> None:
    scale = load_scale(arguments.scale)
    for line in (lines := planning.doctor.doctor(scale, arguments.deep)):
        print(f"{line.state:10s} {line.what:28s} {line.detail}")
    if lacking := [line.what for line in lines if line.state in ("missing", "gated", "too small")]:
        remedy = "`vlsafe download` fetches what can be fetched; a corpus that is set to null in a YAML scale is done without"
        remedy = "`make parts` installs its packages" if scale.loaded and scale.loaded.packed else remedy
        raise ValueError(f"{len(lacking)} things are lacking ({', '.join(lacking)}); {remedy}")


def _download(arguments: Arguments) -> None:
    scale = load_scale(arguments.scale)
    if scale.loaded and scale.loaded.packed:
        raise ValueError(f"the parts of {scale.name!r} come from packages: `make parts` installs them")
    for name in arguments.only:
        known(name, [need.name for need in planning.outside.needs(scale)], "thing from outside")
    planning.outside.download(scale, print, arguments.only, arguments.unpack)


def _gallery(arguments: Arguments) -> None:
    studies = _studies(arguments)
    studies = publish.results.studies_in_store(studies[0]) if arguments.all else studies
    names = list(dict.fromkeys(name for study in studies for name in graph.planned(study, arguments.grid)))
    provenance = publish.results.made_by(studies, names)
    out = arguments.out or publish.gallery.place(studies)
    frames, missing = publish.results.results(studies, arguments.grid), publish.results.missing(studies, arguments.grid)
    gallery = publish.gallery.make(frames, studies[0].scale.name, out, provenance, missing)
    print(*(f"{out}/{name}" for name in gallery.written), sep="\n")
    for line in gallery.left_out[~gallery.left_out["what"].isin(list(missing))].itertuples():
        print(f"left out: {line.what}: {line.reason}{f' (missing: {line.missing})' if line.missing else ''}")
    if missing:
        print(f"{len(missing)} stages are not there; {out}/{publish.gallery.LEFT_OUT}.md says why")
    try:
        for study in studies:
            publish.modelcards.write_cards(study, graph.planned(study, arguments.grid))
    except OSError as error:
        if error.errno not in store.UNWRITABLE:
            raise
        print(f"no model cards: {arguments.root} cannot be written ({error.strerror})")


def _readme(arguments: Arguments) -> None:
    if not Path("README.md").exists():
        raise FileNotFoundError("there is no README.md in this folder; run this where the Snakefile is")
    for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        store.write_text(path, publish.readme.generated(path.read_text(encoding="utf-8"), arguments.figures, path.name))
        print(f"{path}: generated parts made again")


def _diff(arguments: Arguments) -> int:
    frame = publish.provenance.differences(arguments.results[0], arguments.results[1], arguments.atol)
    print(frame.to_string(index=False) if len(frame) else f"no difference above {arguments.atol}")
    return int(len(frame) > 0)


def _published(arguments: Arguments) -> int:
    printed = publish.provenance.published(project_root() / "env" / "published")
    if arguments.model:
        printed = printed[printed["model"] == known(arguments.model, set(printed["model"]), "published model")]
    frame, agree = publish.provenance.held(printed, arguments.figures, arguments.stage)
    print(publish.provenance.markdown(frame.round(4)))
    return int(not agree)


def _report(arguments: Arguments) -> None:
    print(publish.report.report(arguments.figures, arguments.out))


def _human_export(arguments: Arguments) -> None:
    studies = _studies(arguments)
    responses, real = publish.results.answers(studies, arguments.grid), any(study.scale.loaded for study in studies)
    page = evaluation.human.export(responses, arguments.out, arguments.prompts, arguments.draw, real)
    key = f"{arguments.out / 'key.csv'} says whose responses they are: raters must not see it"
    print(page, key, *evaluation.human.missing_cells(responses), sep="\n")


def _human_import(arguments: Arguments) -> None:
    ratings, agreed = evaluation.human.imported(arguments.files, arguments.key, arguments.out)
    print(ratings.problems.to_string(index=False) if len(ratings.problems) else "nothing is wrong with these ratings")
    print(agreed.round(3).to_string(index=False))


def _human_report(arguments: Arguments) -> None:
    outputs = {name: arguments.out / name for name in ("F15_judges.csv", "F15_agreement.csv")}
    store.refuse_inputs(outputs, {"--people": arguments.people})
    names = publish.results.read_by_all(studies := _studies(arguments), "tables", arguments.grid)
    people = evaluation.human.table(arguments.people, ["seed", "harmful", "event", "item", "label"])
    wide = analysis.agreement.verdicts(publish.results.read(studies, names, "raw.parquet"), people)
    rates, pairs = analysis.agreement.rates(wide), analysis.agreement.pairs(wide)
    plots.style.write(plots.claims.judges(rates, pairs, studies[0].scale.name), rates, arguments.out, "F15_judges")
    store.write_text(outputs["F15_agreement.csv"], pairs.to_csv(index=False))
    print(pairs.round(3).to_string(index=False))


if __name__ == "__main__":
    raise SystemExit(main())
