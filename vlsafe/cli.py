"""The `vlsafe` command: thin. Every error that a user can make ends in one line that names the thing and the remedy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlsafe.core import store
from vlsafe.core.presets import load_scale
from vlsafe.core.scale import known
from vlsafe.study import graph
from vlsafe.study.graph import STAGES
from vlsafe.study.study import Study, keep_freed_memory


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 where two result sets differ, 2 on a mistake of the caller."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        unnamed = error.strerror if isinstance(error, OSError) and not error.filename else None
        print(f"vlsafe: {unnamed or error}", file=sys.stderr)
        return 2


Command = Callable[[str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]
"""Adds a subcommand: its name, what it runs, what it says of itself."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlsafe", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    for group in (_add_runs, _add_outside, _add_studies, _add_results):
        group(command)
    return parser


def _add_runs(command: Command) -> None:
    """What is about the runs of one study."""
    for name, run, text in (
        ("stage", _stage, "make stages, and what they need, one after another"),
        ("fresh", _fresh, "remove the runs of stages, so that they are made again"),
    ):
        added = command(name, run, text)
        added.add_argument("names", nargs="+")
        _place(added)
        added.add_argument("--backbone", default="mini-chat")
        added.add_argument("--seed", type=int, default=0)
        if name == "stage":
            added.add_argument("--gpus", type=int, default=0, help="keep to so many that no other stage on this machine uses")
    added = command("card", _card, "write the model cards of finished runs, beside their folders (all runs without a name)")
    added.add_argument("names", nargs="*")
    _place(added)
    added.add_argument("--backbone", default="mini-chat")
    added.add_argument("--seed", type=int, default=0)
    added = command("notebook", _notebook, "execute one notebook with checked parameters")
    added.add_argument("name")
    _place(added)
    added.add_argument("--backbone", default="mini-chat")
    added.add_argument("--seed", type=int, default=0)
    added.add_argument("--out", type=Path, required=True)
    added = command("notebooks", _notebooks, "copy the outputs of mini, seed 0, into the committed notebooks")
    _place(added)
    added = command("agree", _agree, "answer the panel by the local engine and by a server of the same checkpoint, and compare")
    added.add_argument("model", help="a run, such as instruct/filtered-full")
    added.add_argument("--serve", required=True, help="the server's command, with {folder} and {port}")
    _place(added)
    added.add_argument("--backbone", default="mini-chat")
    added.add_argument("--seed", type=int, default=0)
    added = command("golden", _golden, "record the miniature's golden numbers, from a clean tree")
    _place(added)


def _add_outside(command: Command) -> None:
    """What is about models, data and answers that others made, and about what a scale needs of them."""
    added = command("score", _score, "score stored responses to a real benchmark by its official metric")
    added.add_argument("benchmark")
    added.add_argument("--data", type=Path, default=os.environ.get("VLSAFE_DATA"), help="its official files, or a folder of many")
    added.add_argument("--subset", help="tiny, mcqa, letter …; the first one there is by default")
    added.add_argument("--responses", type=Path, required=True, help='lines of {"id", "response"}; for MME also its folder')
    added.add_argument("--judge", dest="judges", nargs="+", default=[], help="by default the official one")
    added.add_argument("--judgements", type=Path, help='verdict texts made elsewhere: lines of {"id", "judgement"}')
    added.add_argument("--endpoint", help="an OpenAI-compatible address, such as http://127.0.0.1:8000/v1")
    added.add_argument("--judge-model", help="the model to ask for there; by default the judge's own")
    added.add_argument("--key", default="OPENAI_API_KEY", help="the environment variable that holds the endpoint's key")
    added.add_argument("--parallel", type=int, default=8, help="requests at a time")
    added.add_argument("--timeout", type=float, default=120.0, help="seconds")
    added.add_argument("--weights", type=Path, help="a model folder that judges here")
    added.add_argument("--out", type=Path, required=True, help="the result, as JSON; judgements are kept beside it")
    added.add_argument("--verdicts", type=Path, help="also write every verdict, a line each")
    added = command("dryrun", _dryrun, "say what a scale would cost, from its shapes; with --measure, from steps on this machine")
    _place(added)
    added.add_argument("--backbone")
    added.add_argument("--gpu", default="A100-80G", help="which one to count with")
    added.add_argument("--measure", action="store_true", help="take some steps with random weights first")
    added.add_argument("--readme", type=Path, help="write the summary of all scales into this file instead")
    _add_merge(command("merge", _merge, "merge two checkpoints into a new one, on disk and tensor by tensor"))
    for name, run, text in (
        ("doctor", _doctor, "say what a scale needs from outside and what of it is here"),
        ("download", _download, "fetch what a scale needs: weights into the hub's cache, corpora into VLSAFE_DATA"),
    ):
        added = command(name, run, text)
        added.add_argument("--scale", default="paper", help="a preset or the path of a YAML file")
        if name == "doctor":
            added.add_argument("--deep", action="store_true", help="compare checksums as well")
        else:
            added.add_argument("--only", nargs="+", default=[], help="names as the doctor lists them")
            added.add_argument("--unpack", action="store_true", help="unpack pictures, for training at speed")


def _add_studies(command: Command) -> None:
    """What is about all runs of several studies."""
    added = command("unlock", _unlock, "remove the scheduler's lock when no scheduler is running here")
    added.add_argument("--root", type=Path, default=Path("."))
    for name, run, text in (
        ("sweep", _sweep, "take away the receipts of runs that are not valid, so that the scheduler makes them again"),
        ("gallery", _gallery, "write every table and figure"),
        ("status", _status, "say of every stage whether its run is valid"),
    ):
        added = command(name, run, text)
        _place(added)
        added.add_argument("--backbones", nargs="+", default=["mini-chat"])
        added.add_argument("--seeds", nargs="+", type=int, default=[0])
        if name == "gallery":
            added.add_argument("--out", type=Path)
            added.add_argument("--grid", choices=graph.GRIDS, default="default", help="which safety-tuning recipes")
        else:
            added.add_argument("--deep", action="store_true", help="compare file contents, not times")


def _add_results(command: Command) -> None:
    """What is made of results: pages, comparisons, packets for raters."""
    added = command("readme", _readme, "make the generated parts of README.md again from figures/mini")
    added.add_argument("--figures", type=Path, default=Path("figures/mini"))
    added = command("diff", _diff, "compare two folders of results; 1 where they differ")
    added.add_argument("results", nargs=2, type=Path)
    added.add_argument("--atol", type=float, default=0.005, help="the greatest difference that does not count")
    added = command("report", _report, "one HTML file of a gallery's folder, the claims on top")
    added.add_argument("--figures", type=Path, default=Path("figures/mini"))
    added.add_argument("--out", type=Path, default=Path("report.html"))
    rating = command("human", _human_report, "people as a judge: packets out, ratings in").add_subparsers(required=True)
    for name, run, text in (
        ("export", _human_export, "write a blinded packet for raters and its key"),
        ("import", _human_import, "read ratings: what is wrong with them, agreement, verdicts"),
        ("report", _human_report, "judges against people"),
    ):
        added = rating.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--out", type=Path, required=True)
        if name == "import":
            added.add_argument("files", nargs="+", type=Path)
            added.add_argument("--key", type=Path, required=True)
            continue
        _place(added)
        added.add_argument("--backbones", nargs="+", default=["mini-chat"])
        added.add_argument("--seeds", nargs="+", type=int, default=[0])
        added.add_argument("--grid", choices=graph.GRIDS, default="default")
        if name == "export":
            added.add_argument("--prompts", type=int, default=4, help="prompts per study and kind; each goes to every model")
            added.add_argument("--draw", type=int, default=0, help="seed of the choice and the order")
        else:
            added.add_argument("--people", type=Path, required=True, help="people.csv of an import")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rule", help="linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, …_l1 or model_stock")
    parser.add_argument("a", type=Path, help="a model folder; the result has its shards, precision, config and processor")
    parser.add_argument("b", type=Path, help="another one with the same tensors")
    parser.add_argument("--ratio", type=float, help="the weight of B, from 0 to 1")
    parser.add_argument("--base", type=Path, help="what both started from, for rules on task vectors")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--kept", type=float, default=0.2, help="TIES: the share of each task vector that is kept")
    parser.add_argument("--survived", type=float, default=0.5, help="DARE: the share of each task vector that is not dropped")
    parser.add_argument("--scaling", type=float, default=1.0, help="the factor of the merged task vector")
    parser.add_argument("--seed", type=int, default=0, help="of DARE's draws")
    parser.add_argument("--language-only", action="store_true", help="the rest is A's; B and the base may be language models")


def _place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", default="mini", help="a preset or the path of a YAML file")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the run store")


def _studies(arguments: argparse.Namespace) -> list[Study]:
    return [
        Study.open(arguments.scale, backbone, seed, arguments.root)
        for backbone in arguments.backbones
        for seed in arguments.seeds
    ]


def _stage(arguments: argparse.Namespace) -> None:
    from vlsafe.training import processes

    study = Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    with processes.claimed(arguments.gpus, study.root):
        for name in [known(name, STAGES, "stage") for name in arguments.names]:
            study.folder(name)


def _fresh(arguments: argparse.Namespace) -> None:
    study = Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    for name in [known(name, STAGES, "stage") for name in arguments.names]:
        store.forget(study.run(name))


def _card(arguments: argparse.Namespace) -> None:
    from vlsafe.publish.modelcards import card, write_cards

    study = Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    for name in arguments.names:
        card(study, known(name, STAGES, "stage"))  # a mistake is told before anything is written
    for path in write_cards(study, arguments.names or list(STAGES)):
        print(path)


def _notebook(arguments: argparse.Namespace) -> None:
    from vlsafe.publish import notebooks

    Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    path = notebooks.FOLDER / f"{known(arguments.name, notebooks.NOTEBOOKS, 'notebook')}.ipynb"
    given = {name: getattr(arguments, name) for name in ("scale", "backbone", "seed")}
    notebooks.execute(path, arguments.out, {**given, "root": str(arguments.root)})


def _notebooks(arguments: argparse.Namespace) -> None:
    from vlsafe.publish import notebooks

    stamp = {"scale": "mini", "seed": 0, "backbone": "mini-chat", "packages": store.environment()["packages"]}
    for name in notebooks.NOTEBOOKS:
        done = arguments.root / "mini" / "mini-chat" / "seed0" / "notebooks" / f"{name}.ipynb"
        notebooks.adopt(done, notebooks.FOLDER / f"{name}.ipynb", stamp)
        print(f"{name}: outputs taken over")


def _agree(arguments: argparse.Namespace) -> None:
    from vlsafe.study.degradation import engines_agree

    study = Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    for line in engines_agree(study, known(arguments.model, STAGES, "run"), arguments.serve):
        change = "; change {:+.3f} [{:+.3f}, {:+.3f}]".format(*line["change"]) if "change" in line else ""
        print(f"{line['what']}: {line['share']:.3f} the same of {line['n']}{change}")


def _score(arguments: argparse.Namespace) -> None:
    from vlsafe.evaluation import score, servers
    from vlsafe.evaluation.judges.written import WRITTEN

    if arguments.data is None:
        raise ValueError("say where the official files are: --data DIR, or the environment variable VLSAFE_DATA")
    if arguments.endpoint and arguments.weights:
        raise ValueError("a judge is asked either at an --endpoint or by --weights")
    asker = score.weights(arguments.weights) if arguments.weights else None
    if arguments.endpoint:
        own = [WRITTEN[name].model for name in arguments.judges if name in WRITTEN]
        model = arguments.judge_model or (own[0] if own else "")
        if not model:
            raise ValueError("say which model the endpoint is to be asked for: --judge-model")
        asker = score.endpoint(
            servers.Server(arguments.endpoint, model, arguments.key, arguments.timeout, parallel=arguments.parallel)
        )
    result = score.score(
        arguments.benchmark, Path(arguments.data), arguments.responses, arguments.out, arguments.judges, arguments.subset,
        arguments.judgements, asker, arguments.verdicts,
    )  # fmt: skip
    print(*score.lines(result), sep="\n")


def _dryrun(arguments: argparse.Namespace) -> None:
    from vlsafe.core.presets import load_scale
    from vlsafe.planning import costs, dryrun

    if arguments.readme:
        rows = [(many, gpu, load_scale(scale), backbone) for many, gpu, scale, backbone in dryrun.README_ROWS]
        text = arguments.readme.read_text(encoding="utf-8")
        store.write_text(arguments.readme, dryrun.in_readme(text, dryrun.summary(rows)))
        return
    scale, gpu = load_scale(arguments.scale), known(arguments.gpu, costs.GPUS, "GPU")
    backbone = arguments.backbone or next(iter(scale.backbones))
    scale.backbone(backbone)
    told = dryrun.measure(scale, backbone) if arguments.measure else {}
    for name, value in told.items():
        print(f"measured {name}: {value}")
    print(dryrun.table(dryrun.lines(dryrun.plan(scale, backbone, gpu, told.get("mfu")), gpu)))
    print("\nComputed from shapes unless the last column says otherwise; what is assumed stands in costs.py and Scale.traffic.")


def _golden(arguments: argparse.Namespace) -> None:
    from vlsafe.publish import golden

    golden.record(Study.open(arguments.scale, "mini-chat", 0, arguments.root), golden.FILE)
    print(f"{golden.FILE}: recorded")


def _readme(arguments: argparse.Namespace) -> None:
    from vlsafe.publish import readme

    path = Path("README.md")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path} in this folder; run this where the Snakefile is")
    store.write_text(path, readme.generated(path.read_text(encoding="utf-8"), arguments.figures))
    print(f"{path}: generated parts made again")


def _merge(arguments: argparse.Namespace) -> None:
    from vlsafe.models.merge import files
    from vlsafe.models.merge.rules import RULES, How

    keep_freed_memory()
    rated = RULES[known(arguments.rule, RULES, "merge rule")].rated
    if rated == (arguments.ratio is None):
        raise ValueError(f"{arguments.rule} {'needs' if rated else 'has no'} --ratio")
    folders = {"a": arguments.a, "b": arguments.b, **({"base": arguments.base} if arguments.base else {})}
    how = How(0.5 if arguments.ratio is None else arguments.ratio, arguments.kept, arguments.survived, arguments.scaling)
    told = files.merge(arguments.rule, folders, arguments.out, how, arguments.seed, arguments.language_only)
    print(f"{arguments.out}: {told['tensors']} tensors, {told['bytes'] / 2**20:.0f} MiB in {told['shards']} shard(s)")


def _unlock(arguments: argparse.Namespace) -> None:
    """A killed Snakemake leaves its lock behind; the lock of a living one is respected."""
    locks = arguments.root / ".snakemake" / "locks"
    owner = arguments.root / ".snakemake" / "owner"
    if owner.exists() and _alive(int(owner.read_text())):
        told = f"another `make reproduce` (process {owner.read_text()}) is at work in this folder; wait for it or stop it"
        raise ValueError(told)
    for lock in locks.glob("*"):
        lock.unlink()
    owner.parent.mkdir(exist_ok=True)
    owner.write_text(str(os.getppid()))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getppid()


def _sweep(arguments: argparse.Namespace) -> None:
    for study in _studies(arguments):
        for name in STAGES:
            run = study.run(name)
            if run.receipt.exists() and (found := store.status(run, arguments.deep)) != "valid":
                run.receipt.unlink()
                print(f"{study.backbone} seed {study.seed} {name}: {found}, will be made again")


def _status(arguments: argparse.Namespace) -> None:
    for study in _studies(arguments):
        for name in STAGES:
            print(f"{store.status(study.run(name), arguments.deep):9s} {study.backbone} seed {study.seed} {name}")


def _doctor(arguments: argparse.Namespace) -> None:
    from vlsafe.planning import doctor

    lines = doctor.doctor(load_scale(arguments.scale), arguments.deep)
    for line in lines:
        print(f"{line.state:10s} {line.what:28s} {line.detail}")
    lacking = [line.what for line in lines if line.state in ("missing", "gated", "too small")]
    if lacking:
        remedy = "`vlsafe download` fetches what can be fetched; a corpus that is set to null in a YAML scale is done without"
        raise ValueError(f"{len(lacking)} things are lacking ({', '.join(lacking)}); {remedy}")


def _download(arguments: argparse.Namespace) -> None:
    from vlsafe.planning import download
    from vlsafe.planning.doctor import needs

    scale = load_scale(arguments.scale)
    for name in arguments.only:
        known(name, [need.name for need in needs(scale)], "thing from outside")
    download.download(scale, print, arguments.only, arguments.unpack)


def _gallery(arguments: argparse.Namespace) -> None:
    from vlsafe.publish import gallery
    from vlsafe.publish.modelcards import write_cards
    from vlsafe.publish.results import made, results

    studies = _studies(arguments)
    runs = {folder: study.run(name) for study, name, folder in made(studies, graph.planned(arguments.grid))}
    provenance = []
    for run in runs.values():
        noted = store.manifest_of(run)
        provenance.append(
            {k: noted[k] for k in ("backbone", "seed", "stage", "recipe", "digest", "commit", "packages", "seconds")}
        )
    out = arguments.out or Path("figures") / studies[0].scale.name
    for name in gallery.make(results(studies, arguments.grid), studies[0].scale.name, out, provenance):
        print(f"{out}/{name}")
    for study in studies:
        write_cards(study, graph.planned(arguments.grid))


def _diff(arguments: argparse.Namespace) -> int:
    from vlsafe.publish import provenance as publish_provenance

    found = publish_provenance.differences(arguments.results[0], arguments.results[1], arguments.atol)
    print(found.to_string(index=False) if len(found) else f"no difference above {arguments.atol}")
    return int(len(found) > 0)


def _report(arguments: argparse.Namespace) -> None:
    from vlsafe.publish import provenance as publish_provenance

    print(publish_provenance.report(arguments.figures, arguments.out))


def _human_export(arguments: argparse.Namespace) -> None:
    from vlsafe.evaluation import human
    from vlsafe.publish.results import answers

    given = answers(_studies(arguments), arguments.grid)
    print(human.export(given, arguments.out, arguments.prompts, arguments.draw))
    print(f"{arguments.out / 'key.csv'} says whose responses they are: raters must not see it")


def _human_import(arguments: argparse.Namespace) -> None:
    import pandas as pd

    from vlsafe.evaluation import human

    if not arguments.key.exists():
        raise FileNotFoundError(f"there is no key {arguments.key}; `vlsafe human export` writes it beside its packet")
    key = pd.read_csv(arguments.key, keep_default_na=False)
    found = human.read(arguments.files, key)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables = {"problems": found.problems, "agreement": human.agreement(found, key), "people": human.verdicts(found, key)}
    for name, frame in tables.items():
        frame.to_csv(arguments.out / f"{name}.csv", index=False)
    print(found.problems.to_string(index=False) if len(found.problems) else "nothing is wrong with these ratings")
    print(tables["agreement"].round(3).to_string(index=False))


def _human_report(arguments: argparse.Namespace) -> None:
    import pandas as pd

    from vlsafe.analysis import agreement
    from vlsafe.plots import claims, style
    from vlsafe.publish.results import read

    studies = _studies(arguments)
    wide = agreement.verdicts(read(studies, graph.tables(arguments.grid), "raw.parquet"), pd.read_csv(arguments.people))
    rates, pairs = agreement.rates(wide), agreement.pairs(wide)
    style.write(claims.judges(rates, pairs, studies[0].scale.name), rates, arguments.out, "F15_judges")
    pairs.to_csv(arguments.out / "F15_agreement.csv", index=False)
    print(pairs.round(3).to_string(index=False))
