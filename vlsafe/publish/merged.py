"""`vlsafe merge` and `vlsafe fisher`: merges of checkpoints on disk, and what one of the rules weighs by."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from vlsafe import data, models
from vlsafe.core import writing
from vlsafe.core.scale import known
from vlsafe.core.schema import Example, from_row
from vlsafe.study.study import keep_freed_memory


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Describe `vlsafe merge` and `vlsafe fisher` to the parser; `command` makes the one of a function."""
    added = command(merge, "merge two checkpoints into a new one, on disk and tensor by tensor")
    based = "task_arithmetic, ties, dare_linear(_l1), dare_ties(_l1), model_stock, tsv_m, iso_c"
    added.add_argument("rule", help=f"linear, slerp; expo (beyond B); fisher; on task vectors, with --base: {based}")
    added.add_argument("a", type=Path, help="a model folder; the result has its shards, precision, config and processor")
    added.add_argument("b", type=Path, help="another one with the same tensors")
    added.add_argument("--ratio", type=float, help="the weight of B, from 0 to 1; for expo from 1 on")
    added.add_argument("--base", type=Path, help="what both started from, for rules on task vectors")
    added.add_argument("--fisher", type=Path, nargs=2, default=[], metavar=("A", "B"), help="what `vlsafe fisher` wrote of both")
    added.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    added.add_argument("--kept", type=float, default=0.2, help="TIES: the share of each task vector that is kept")
    added.add_argument("--survived", type=float, default=0.5, help="DARE: the share of each task vector that is not dropped")
    added.add_argument("--rank", type=float, default=0.5, help="TSV-M: the share of its singular vectors that each task keeps")
    added.add_argument("--scaling", type=float, default=1.0, help="the factor of the merged task vector")
    added.add_argument("--seed", type=int, default=0, help="of DARE's draws")
    added.add_argument(
        "--language-only", action="store_true", help="the rest is A's; B and the base may be language models of A's kind"
    )
    added = command(fisher, "the diagonal of a model's Fisher information over rows, for `vlsafe merge fisher`")
    added.add_argument("model", type=Path, help="a model folder")
    added.add_argument("rows", type=Path, help="training rows as the run store has them, in Parquet or lines of JSON (.jsonl)")
    added.add_argument("--limit", type=int, default=256, help="the first so many rows")
    added.add_argument("--out", type=Path, required=True, help="a file in safetensors that does not exist yet")


def merge(arguments: argparse.Namespace) -> None:
    """Merge two checkpoints on disk, and say how many tensors were merged, copied and left alone.

    Raises:   ValueError for an unknown rule, or a ratio that is missing or that the rule has not
    """
    keep_freed_memory()
    rules = models.merge.rules
    rated = rules.RULES[known(arguments.rule, rules.RULES, "merge rule")].rated
    if rated == (arguments.ratio is None):
        raise ValueError(f"{arguments.rule} {'needs' if rated else 'has no'} --ratio")
    folders = {"a": arguments.a, "b": arguments.b, **({"base": arguments.base} if arguments.base else {})}
    ratio = 0.5 if arguments.ratio is None else arguments.ratio
    how = rules.How(ratio, arguments.kept, arguments.survived, arguments.scaling, arguments.rank)
    result = models.merge.files.merge(
        arguments.rule, folders, arguments.out, how, arguments.seed, arguments.language_only, arguments.fisher
    )
    print(f"{arguments.out}: {models.merge.files.sentence(result)}")


def fisher(arguments: argparse.Namespace) -> None:
    """Write the diagonal of a model's Fisher information over the first rows of a file (`models.merge.fisher`)."""
    models.weights.shards(arguments.model)  # refuses what is no folder of safetensors, with the remedy
    writing.refuse_existing(arguments.out)
    model, processor = models.checkpoints.ready(arguments.model), models.checkpoints.load_processor(arguments.model)
    found = models.merge.fisher.diagonal(model, processor, _examples(arguments.rows), arguments.limit)
    models.merge.fisher.save(found, arguments.out)
    print(f"{arguments.out}: {len(found)} tensors")


def _examples(path: Path) -> Iterator[Example]:
    for number, row in enumerate(data.files.rows_in(path), 1):
        try:
            yield from_row(Example, row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} of {path}: {error}") from error
