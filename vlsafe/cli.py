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
    """Run one subcommand; 0 on success, 2 on a mistake of the caller."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"vlsafe: {error}", file=sys.stderr)
        return 2
    return 0


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
    _add_merge(command("merge", _merge, "merge two checkpoints into a new one, on disk and tensor by tensor"))
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


def _merge(arguments: argparse.Namespace) -> None:
    from vlsafe.merge import files
    from vlsafe.merge.rules import RULES, How

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
