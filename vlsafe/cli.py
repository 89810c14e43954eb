"""The `vlsafe` command: thin. Every error that a user can make ends in one line that names the thing and the remedy."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vlsafe import stages, store
from vlsafe.scales import known
from vlsafe.stages import STAGES, Study


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 where two result sets differ, 2 on a mistake of the caller."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"vlsafe: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlsafe", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("stage", _stage, "make stages, and what they need, one after another"),
        ("fresh", _fresh, "remove the runs of stages, so that they are made anew"),
    ):
        added = command(name, run, text)
        added.add_argument("names", nargs="+")
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
            added.add_argument("--grid", choices=stages.GRIDS, default="default", help="which safety-tuning recipes")
        else:
            added.add_argument("--deep", action="store_true", help="compare file contents, not times")
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
        added.add_argument("--grid", choices=stages.GRIDS, default="default")
        if name == "export":
            added.add_argument("--prompts", type=int, default=4, help="prompts per study and kind; each goes to every model")
            added.add_argument("--draw", type=int, default=0, help="seed of the choice and the order")
        else:
            added.add_argument("--people", type=Path, required=True, help="people.csv of an import")
    return parser


def _place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", default="mini", help="a preset or the path of a YAML file")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the cellar")


def _studies(arguments: argparse.Namespace) -> list[Study]:
    return [
        Study.open(arguments.scale, backbone, seed, arguments.root)
        for backbone in arguments.backbones
        for seed in arguments.seeds
    ]


def _stage(arguments: argparse.Namespace) -> None:
    study = Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    for name in [known(name, STAGES, "stage") for name in arguments.names]:
        study.folder(name)


def _fresh(arguments: argparse.Namespace) -> None:
    study = Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    for name in [known(name, STAGES, "stage") for name in arguments.names]:
        store.forget(study.run(name))


def _notebook(arguments: argparse.Namespace) -> None:
    from vlsafe import notebooks

    Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    path = notebooks.FOLDER / f"{known(arguments.name, notebooks.NOTEBOOKS, 'notebook')}.ipynb"
    given = {name: getattr(arguments, name) for name in ("scale", "backbone", "seed")}
    notebooks.execute(path, arguments.out, {**given, "root": str(arguments.root)})


def _notebooks(arguments: argparse.Namespace) -> None:
    from vlsafe import notebooks

    stamp = {"scale": "mini", "seed": 0, "backbone": "mini-chat", "packages": store.environment()["packages"]}
    for name in notebooks.NOTEBOOKS:
        done = arguments.root / "mini" / "mini-chat" / "seed0" / "notebooks" / f"{name}.ipynb"
        notebooks.adopt(done, notebooks.FOLDER / f"{name}.ipynb", stamp)
        print(f"{name}: outputs taken over")


def _unlock(arguments: argparse.Namespace) -> None:
    """A killed Snakemake leaves its lock behind; the lock of a living one is respected."""
    locks = arguments.root / ".snakemake" / "locks"
    owner = arguments.root / ".snakemake" / "owner"
    if owner.exists() and _alive(int(owner.read_text())):
        raise ValueError("another `make reproduce` is at work in this folder; wait for it or stop it")
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
                print(f"{study.backbone} seed {study.seed} {name}: {found}, will be made anew")


def _status(arguments: argparse.Namespace) -> None:
    for study in _studies(arguments):
        for name in STAGES:
            print(f"{store.status(study.run(name), arguments.deep):9s} {study.backbone} seed {study.seed} {name}")


def _gallery(arguments: argparse.Namespace) -> None:
    from vlsafe import gallery
    from vlsafe.stages.results import made, results

    studies = _studies(arguments)
    runs = {folder: study.run(name) for study, name, folder in made(studies, stages.planned(arguments.grid))}
    provenance = []
    for run in runs.values():
        noted = store.read_manifest(run)
        provenance.append({k: noted[k] for k in ("backbone", "seed", "stage", "recipe", "digest", "commit", "packages")})
    out = arguments.out or Path("figures") / studies[0].scale.name
    for name in gallery.make(results(studies, arguments.grid), studies[0].scale.name, out, provenance):
        print(f"{out}/{name}")


def _diff(arguments: argparse.Namespace) -> int:
    from vlsafe import cards

    found = cards.differences(*arguments.results, arguments.atol)
    print(found.to_string(index=False) if len(found) else f"no difference above {arguments.atol}")
    return int(len(found) > 0)


def _report(arguments: argparse.Namespace) -> None:
    from vlsafe import cards

    print(cards.report(arguments.figures, arguments.out))


def _human_export(arguments: argparse.Namespace) -> None:
    from vlsafe import human
    from vlsafe.stages.results import answers

    given = answers(_studies(arguments), arguments.grid)
    print(human.export(given, arguments.out, arguments.prompts, arguments.draw))
    print(f"{arguments.out / 'key.csv'} says whose responses they are: raters must not see it")


def _human_import(arguments: argparse.Namespace) -> None:
    import pandas as pd

    from vlsafe import human

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

    from vlsafe import agreement, figures, forest
    from vlsafe.stages.results import read

    studies = _studies(arguments)
    wide = agreement.verdicts(read(studies, stages.tables(arguments.grid), "raw.parquet"), pd.read_csv(arguments.people))
    rates, pairs = agreement.rates(wide), agreement.pairs(wide)
    figures.write(forest.judges(rates, pairs, studies[0].scale.name), rates, arguments.out, "F15_judges")
    pairs.to_csv(arguments.out / "F15_agreement.csv", index=False)
    print(pairs.round(3).to_string(index=False))
