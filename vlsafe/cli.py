"""The `vlsafe` command: thin. Every error that a user can make ends in one line that names the thing and the remedy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vlsafe import stages, store
from vlsafe.scales import known
from vlsafe.stages import STAGES, Study


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 2 on a mistake of the caller."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"vlsafe: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlsafe", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
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
    added = command("golden", _golden, "record the miniature's golden numbers, from a clean tree")
    _place(added)
    added = command("readme", _readme, "make the generated parts of README.md anew from figures/mini")
    added.add_argument("--figures", type=Path, default=Path("figures/mini"))
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


def _card(arguments: argparse.Namespace) -> None:
    from vlsafe.stages.cards import card, write_cards

    study = Study.open(arguments.scale, arguments.backbone, arguments.seed, arguments.root)
    for name in arguments.names:
        card(study, known(name, STAGES, "stage"))  # a mistake is told before anything is written
    for path in write_cards(study, arguments.names or list(STAGES)):
        print(path)


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


def _golden(arguments: argparse.Namespace) -> None:
    from vlsafe import golden

    golden.record(Study.open(arguments.scale, "mini-chat", 0, arguments.root), golden.FILE)
    print(f"{golden.FILE}: recorded")


def _readme(arguments: argparse.Namespace) -> None:
    from vlsafe import readme

    path = Path("README.md")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path} in this folder; run this where the Snakefile is")
    store.write_text(path, readme.generated(path.read_text(encoding="utf-8"), arguments.figures))
    print(f"{path}: generated parts made anew")


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
                print(f"{study.backbone} seed {study.seed} {name}: {found}, will be made anew")


def _status(arguments: argparse.Namespace) -> None:
    for study in _studies(arguments):
        for name in STAGES:
            print(f"{store.status(study.run(name), arguments.deep):9s} {study.backbone} seed {study.seed} {name}")


def _gallery(arguments: argparse.Namespace) -> None:
    from vlsafe import gallery
    from vlsafe.stages.cards import write_cards
    from vlsafe.stages.results import made, results

    studies = _studies(arguments)
    runs = {folder: study.run(name) for study, name, folder in made(studies, stages.planned(arguments.grid))}
    provenance = []
    for run in runs.values():
        noted = store.told(run)
        provenance.append(
            {k: noted[k] for k in ("backbone", "seed", "stage", "recipe", "digest", "commit", "packages", "seconds")}
        )
    out = arguments.out or Path("figures") / studies[0].scale.name
    for name in gallery.make(results(studies, arguments.grid), studies[0].scale.name, out, provenance):
        print(f"{out}/{name}")
    for study in studies:
        write_cards(study, stages.planned(arguments.grid))
