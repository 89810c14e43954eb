"""The registry of claims: where it is, that nothing in it moves unseen, and that ledgers agree with other tables."""

import json
import subprocess
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import scipy.stats
import yaml

from vlsafe.analysis import claims, crossing
from vlsafe.analysis.claims import EXPLORATORY, REGISTERED, SUPPORTED

ROOT = Path(__file__).parents[2]
LEDGERS = sorted(path.relative_to(ROOT) for path in (ROOT / "figures").glob("*/T09_claims.csv"))
PARTNER = {"10": "sl-full", "10b": "dpo-both-full", "11": "sl-full", "11b": "dpo-both-full"}


def test_the_package_reads_the_registry_and_not_a_copy_of_it():
    link, registry = ROOT / "vlsafe/analysis/claims.yaml", ROOT / "env/claims.yaml"
    assert link.resolve() == registry.resolve() and not registry.is_symlink()


def test_registered_claims_come_first_and_each_says_what_it_needs():
    statuses = [claim.status for claim in claims.CLAIMS]
    assert set(statuses) == {REGISTERED, EXPLORATORY} and statuses == sorted(statuses, reverse=True)
    for claim in claims.CLAIMS:
        assert claim.family and 0 < claim.interest < 1 and claim.rule, claim.name
        assert len({part.what for part in claims.leaves(claim.decided_by)}) == len(claims.leaves(claim.decided_by)), claim.name
    ledger = claims.judged({(claim.name, "b"): {} for claim in claims.CLAIMS})
    assert ledger["status"].tolist() == statuses and set(ledger["registry"]) == {claims.REGISTRY}


def test_a_digest_is_of_the_whole_rule_and_not_of_its_status():
    data = yaml.safe_load((ROOT / "env/claims.yaml").read_text())
    before = {name: claims.rule(entry) for name, entry in claims.entries(data).items()}
    assert before == {claim.name: claim.rule for claim in claims.CLAIMS} and len(set(before.values())) == len(before)
    data["claims"]["1"]["status"] = EXPLORATORY
    data["trees"]["below"]["against"] = 0.01  # a shared tree
    after = {name: claims.rule(entry) for name, entry in claims.entries(data).items()}
    assert {name for name in before if before[name] != after[name]} == {"3c", "8b", "10", "10b", "11", "11b", "15"}


def git(root, *command):
    try:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return done.stdout if done.returncode == 0 else ""


def runs_at(root, commit, ledger):
    """The runs behind a ledger as it was committed: stage/recipe of each, and its digest."""
    text = git(root, "show", f"{commit}:{ledger.with_suffix('.provenance.json').as_posix()}")
    runs = json.loads(text)["runs"] if text else {}
    return {digest: name.split("/", 2)[2] for name, digest in runs.items()}


def stages(part):
    """The stages without which nobody can have seen the result of a comparison, as patterns."""
    for run in filter(None, (part.before, part.after)):
        kind, _, recipe = run.partition("/")
        kept = {"durability": f"durability/{recipe.partition('/')[0]}", "merge": "merge/*", "sppft": "sppft/*"}
        yield kept.get(kind, f"examination/{kind}.{recipe}")


def changed_after(root, ledger):
    """Measured claims that a ledger calls registered although their entry was another one, or none, when a ledger of any of its
    runs was first committed that held what they compare: results were seen before the rule."""
    table = pd.read_csv(root / ledger, dtype={"claim": str})
    own = set(json.loads((root / ledger.with_suffix(".provenance.json")).read_text())["runs"].values())
    commits = git(root, "log", "--reverse", "--format=%H", "--", ledger).split()
    found = {commit: runs_at(root, commit, ledger) for commit in commits}
    shared = {commit: {of[digest] for digest in of.keys() & own} for commit, of in found.items() if of.keys() & own}
    if "status" not in table:
        return []  # before the registry there were no registered claims
    trees, late = {claim.name: claim.decided_by for claim in claims.CLAIMS}, set()
    for line in table[(table["status"] == REGISTERED) & (table["item_level"] != claims.NOT)].itertuples():
        needed = {stage for part in claims.leaves(trees[line.claim]) for stage in stages(part)}
        seen = [commit for commit, runs in shared.items() if all(any(map(partial(fnmatchcase, pat=of), runs)) for of in needed)]
        old = git(root, "show", f"{seen[0]}:env/claims.yaml") if seen else ""
        then = {name: claims.rule(entry) for name, entry in claims.entries(yaml.safe_load(old)).items()} if old else {}
        late |= {line.claim} if seen and then.get(line.claim) != line.rule else set()
    return sorted(late)


@pytest.mark.parametrize("ledger", LEDGERS, ids=str)
def test_a_claim_that_changed_after_its_results_is_exploratory(ledger):
    if not git(ROOT, "log", "-1", "--format=%H"):
        pytest.skip("no git history here: whether claims were registered in time cannot be seen")
    assert changed_after(ROOT, ledger) == []


def test_a_rule_made_after_the_results_is_caught(tmp_path):
    """A ledger, then the rule of one claim changed and the ledger made again from the same runs; then from others."""
    ledger = Path("figures/mini/T09_claims.csv")
    data = yaml.safe_load((ROOT / "env/claims.yaml").read_text())

    def commit(run, others=("textonly", "looking")):
        entries = claims.entries(data)
        lines = [
            {"claim": name, "status": entry["status"], "rule": claims.rule(entry), "item_level": SUPPORTED}
            for name, entry in entries.items()
        ]
        (tmp_path / ledger).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "env").mkdir(exist_ok=True)
        (tmp_path / "env/claims.yaml").write_text(yaml.safe_dump(data))
        pd.DataFrame(lines).to_csv(tmp_path / ledger, index=False)
        runs = {f"mini/seed0/examination/instruct.{name}-full": f"{run} {name}" for name in ("filtered", *others)}
        (tmp_path / ledger.with_suffix(".provenance.json")).write_text(json.dumps({"runs": runs}))
        git(tmp_path, "add", ".")
        assert git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-m", "x")

    git(tmp_path, "init")
    commit("first")
    assert changed_after(tmp_path, ledger) == []
    data["claims"]["4b"]["sign"], data["claims"]["5"]["after"] = -1, "safety/other"  # 5 says that it is exploratory
    commit("first")
    assert changed_after(tmp_path, ledger) == ["4b"]
    data["claims"]["4b"]["status"] = EXPLORATORY
    commit("first")
    assert changed_after(tmp_path, ledger) == []
    data["claims"]["4b"]["status"] = REGISTERED
    commit("other seeds")
    assert changed_after(tmp_path, ledger) == []
    commit("new", ())
    data["claims"]["4d"]["sign"] = -1
    commit("new")  # nobody had the arm that it compares with before
    assert changed_after(tmp_path, ledger) == []


def contradictions(ledger, dominance):
    """Claims on merging that a ledger supports while T07 calls the interior merge dominated, or trading, in some seed."""
    found = []
    for line in ledger[ledger["claim"].isin(list(PARTNER)) & (ledger["item_level"] == SUPPORTED)].itertuples():
        own = dominance[(dominance["backbone"] == line.backbone) & (dominance["rule"] == "inside")]
        own = own[own["partner"] == PARTNER[line.claim]]
        rivals = own[(own["reference"] == "ensemble") == line.claim.startswith("11")]
        rivals = rivals[rivals["reference"] != "adapted"]
        if rivals["verdict"].isin(["is dominated", "trades"]).any():
            found.append((line.claim, line.backbone))
    return found


@pytest.mark.parametrize("ledger", LEDGERS, ids=str)
def test_no_ledger_supports_what_the_table_of_merges_denies(ledger):
    table = pd.read_csv(ROOT / ledger, dtype={"claim": str})
    other = (ROOT / ledger).with_name("T07_dominance.csv")
    if "status" not in table or not other.exists():
        pytest.skip(f"{ledger} was made before claims had a registry, or has no merges beside it")
    assert contradictions(table, pd.read_csv(other)) == []


def test_the_first_ledger_is_what_the_crossing_refuses():
    """Claim 10 was "supported" where T07 says that the merge is dominated: its rule let the unmerged model pass."""
    line = {"claim": "10", "backbone": "b", "item_level": SUPPORTED}
    rival = {"backbone": "b", "rule": "inside", "partner": "sl-full", "reference": "dpo"}
    lost, won = (pd.DataFrame([rival | {"verdict": verdict}]) for verdict in ("is dominated", "dominates"))
    ledger = pd.DataFrame([line | {"seed_level": SUPPORTED}])
    assert contradictions(ledger, lost) == [("10", "b")] and contradictions(ledger, won) == []
    for dominance, level in ((lost, claims.DIFFERS), (won, SUPPORTED), (None, SUPPORTED)):
        assert crossing.crossed(ledger, dominance)[["item_level", "seed_level"]].eq(level).all(axis=None)
    others = [("backbone", "c"), ("partner", "aligned"), ("reference", "ensemble"), ("reference", "adapted"), ("rule", "linear")]
    for column, value in others:
        assert crossing.crossed(ledger, lost.assign(**{column: value}))["item_level"].tolist() == [SUPPORTED], column


SIDE = {"instruct/filtered-full": "adapted", "parent/aligned": "parent"}


def denied(tree, tuned):
    """Whether T05 says otherwise than a tree of comparisons, in some seed: its interval lies wholly on the other side, with
    Bonferroni's correction over the seeds, as in the ledger's own rule of seeds that differ."""
    if not isinstance(tree, claims.Part):
        return (any if tree.how == "all" else all)(denied(part, tuned) for part in tree.parts)
    (measure, *_), reference = tree.measures, SIDE.get(tree.before)
    own = tuned[(tuned["stage"] + "/" + tuned["recipe"] == tree.after) & (tuned["measure"] == measure)]
    if reference is None or len(tree.measures) > 1 or own.empty:
        return False
    ends = own[[f"{reference}_difference_{end}" for end in ("low", "high")]].to_numpy()
    middle = ends.mean(axis=1, keepdims=True)
    ends = middle + wider(len(own)) * (ends - middle) - tree.against
    return bool((ends * tree.sign < 0).all(axis=1).any())


def wider(seeds):
    """How much wider than a 95 % interval one of so many is that all hold together."""
    return scipy.stats.norm.isf(0.025 / seeds) / scipy.stats.norm.isf(0.025)


def denied_by_t05(ledger, tuned):
    """Claims that a ledger supports, although T05 says otherwise of a comparison that they hang on."""
    trees = {claim.name: claim.decided_by for claim in claims.CLAIMS}
    held = ledger[(ledger["item_level"] == SUPPORTED) & ledger["claim"].isin(list(trees))]
    return [
        (line.claim, line.backbone) for line in held.itertuples()
        if denied(trees[line.claim], tuned[tuned["backbone"] == line.backbone])
    ]  # fmt: skip


@pytest.mark.parametrize("ledger", LEDGERS, ids=str)
def test_no_ledger_supports_what_the_table_of_tunings_denies(ledger):
    table = pd.read_csv(ROOT / ledger, dtype={"claim": str})
    other = (ROOT / ledger).with_name("T05_safety_tuning.csv")
    if "status" not in table or not other.exists():
        pytest.skip(f"{ledger} was made before claims had a registry, or has no tunings beside it")
    assert denied_by_t05(table, pd.read_csv(other)) == []


def test_the_crossing_with_tunings_refuses_what_it_should():
    """SFT "lowers" both ASR; T05 has one that rose, beyond its interval in one seed of two."""
    ledger = pd.DataFrame([{"claim": "5", "backbone": "b", "item_level": SUPPORTED}])
    line = {"backbone": "b", "stage": "safety", "recipe": "sl-full", "adapted_difference_high": -0.1}
    fell = [line | {"measure": name, "seed": seed, "adapted_difference_low": -0.3}
            for name in ("text_asr", "multimodal_asr") for seed in (0, 1)]  # fmt: skip
    assert denied_by_t05(ledger, pd.DataFrame(fell)) == []
    fell[-1] |= {"adapted_difference_low": 0.05, "adapted_difference_high": 0.2}
    assert denied_by_t05(ledger, pd.DataFrame(fell)) == [("5", "b")]
    costs = ledger.assign(claim="5r")  # of twins or of exaggerated refusal: both must be denied
    less = [
        line | {"measure": name, "seed": 0, "adapted_difference_low": -0.3} for name in ("twin_refusal", "exaggerated_refusal")
    ]
    assert denied_by_t05(costs, pd.DataFrame(less)) == [("5r", "b")]
    assert denied_by_t05(costs, pd.DataFrame(less[:1])) == []
