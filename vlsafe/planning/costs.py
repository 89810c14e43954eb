"""What each stage of a scale's graph would cost, and how long the graph takes on some GPUs.

A stage is counted by what it trains, answers, judges or reads: operations from real shapes (`planning.dryrun`), divided by the
share of the peak that was measured or is assumed. Time on several GPUs is that of a schedule of the graph, which no number of
GPUs makes shorter than its longest chain.

Units: hours of one GPU, tokens, bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vlsafe.core.scale import Fit
from vlsafe.evaluation.benchmarks import BENCHMARKS
from vlsafe.evaluation.judges import LLM_JUDGES
from vlsafe.inspection import causal as interventions
from vlsafe.models import checkpoints
from vlsafe.planning import dryrun
from vlsafe.planning.dryrun import CAST, FROZEN, GPUS, MEASURED, Shapes
from vlsafe.study import adaptation, causal, durability, graph, merging, tuning
from vlsafe.study.study import Study

GUARD_WEIGHTS = 8.0e9  # Llama-Guard-3-8B; judges that are models are taken to be as large
SCREENED_ROWS = 1_223_426  # 558,128 captions and 665,298 instructions, of LLaVA's own files
EXCHANGES = 3.0  # of a row of the instructions, each of which the guard reads by itself; assumed
SEARCHED = 1.5  # bands per block and factor that the search for the safety band tries: at most 2, it ends earlier
VERDICT = 10  # tokens of a judgement; assumed
SHARES = {"sft": 0.47, "projector": 0.62, "lora": 0.48, "dpo": 0.44}
"""Of the peak, in training with bfloat16 weights: measured on one H200 (LOG.md, 2026-11-26), assumed on other cards."""
LONGEST = 2.2  # the longest of a batch's answers, which all wait for, as a multiple of their mean; assumed
CASTING = 0.25  # the same with float32 weights under autocast: LLaVA-1.5's published 10 hours on eight A100 come to about that


class Cost(NamedTuple):
    """One stage: hours of one GPU, on how many it can run, tokens, memory of each of so many GPUs, what stays on disk and what is
    there at most, and whether its hours are computed or from measured steps."""

    stage: str
    hours: float = 0.0
    gpus: int = 0
    tokens: float = 0.0
    memory: Mapping[int, float] = {1: 0.0, 8: 0.0}
    kept: float = 0.0
    at_most: float = 0.0
    how: str = "computed"

    @property
    def part(self) -> str:
        """What it is counted under: the first word of its name, a training of stage 2 by its method."""
        kind, _, recipe = self.stage.partition("/")
        if kind == "instruct":
            return "instruct (LoRA)" if recipe.endswith("-lora") else "instruct"
        if kind == "safety":
            of = tuning.RECIPES[recipe]
            return f"safety ({'multitask' if 'general' in of.corpora else of.objective.upper()})"
        return kind


class Rates(NamedTuple):
    """Shares that were measured: of the peak in training and where prompts are read, of the memory's bandwidth in decoding."""

    training: float | None = None
    prefill: float | None = None
    decoding: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of one study on one kind of GPU, by `rates` where these were measured."""

    study: Study
    gpu: str
    rates: Rates = dataclasses.field(default_factory=Rates)
    grid: str = "default"

    @functools.cached_property
    def shapes(self) -> Shapes:
        scale, name = self.study.scale, self.study.backbone
        model = checkpoints.random_graft(scale.decoder(name), scale.vision, scale.source == "load")
        return dryrun._shapes(scale, name, model)

    def stages(self) -> list[Cost]:
        """Every stage of the graph, in its order."""
        return [self._cost(name) for name in graph.planned(self.study, self.grid)]

    def _cost(self, name: str) -> Cost:
        kind, _, recipe = name.partition("/")
        found = KINDS[kind](self, recipe) if kind in KINDS else Cost(name)
        many = graph.gpus(self.study, name)
        return found._replace(stage=name, gpus=many if found.hours else 0)

    # what a stage is made of

    def trained(self, fit: Fit, method: str, saved: int, text: float, pictures: float, runs: float = 1) -> Cost:
        """Trainings by one fit; `method` is full, sppft, projector, lora or dpo, `saved` how many checkpoints each leaves."""
        shapes, scale, dpo = self.shapes, self.study.scale, method == "dpo"
        adapters = 2 * scale.lora.rank * shapes.layers * 13 * shapes.width  # rank × both sides of 7 maps
        moving = {"projector": 0, "lora": adapters}.get(method, shapes.language) + shapes.projector
        of_row = dryrun.operations(shapes, text, pictures, 4 if method in ("projector", "lora") else 6)
        if dpo:
            of_row = 2 * (of_row + dryrun.operations(shapes, text, pictures, 2))  # two answers, and the reference reads both
        rows, tokens = fit.steps * fit.batch_size, text + pictures * shapes.image_tokens
        sharded, low = "fsdp" in fit.launch, fit.dtype == "bfloat16"
        at_once = (fit.at_once or -(-fit.batch_size // fit.micro_batches)) * (2 if dpo else 1)
        waiting = dryrun.activations(shapes, at_once * tokens, "full" if method == "sppft" else method, recompute=True)
        memory = {n: dryrun.gpu_memory(shapes, moving, n, sharded, low) + waiting for n in (1, 8)}
        if dpo:
            memory = {n: size + (FROZEN / n if sharded else CAST if low else FROZEN) * shapes.all for n, size in memory.items()}
        share = self.rates.training or (SHARES.get(method, SHARES["sft"]) if low else CASTING)
        kept = runs * saved * (2 if fit.saved == "bfloat16" else 4) * shapes.all
        at_most = saved * FROZEN * shapes.all + 2 * (FROZEN * shapes.all + 8 * moving)  # two of them can be resumed
        hours = runs * self._hours(of_row * rows, share)
        how = MEASURED if self.rates.training else "computed"
        return Cost("", hours, 0, runs * rows * tokens * (2 if dpo else 1), memory, kept, at_most, how)

    def answered(self, requests: float, questions: float, length: float | None = None) -> Cost:
        """So many requests, whose answers are decoded, and questions, of which only the prompt is read."""
        exam, traffic, shapes = self.study.scale.exam, self.study.scale.traffic, self.shapes
        length = min(traffic.answer, exam.max_new_tokens) if length is None else length
        read = dryrun.operations(shapes, 100, 0.8, 2) * (requests + questions)
        cache = dryrun.cache_bytes(shapes, 100 + 0.8 * shapes.image_tokens + length / 2)
        step = CAST * shapes.language + exam.batch_size * cache  # every step reads all weights and the cache once
        decoding = requests / exam.batch_size * min(LONGEST * length, exam.max_new_tokens) * step
        seconds = decoding / (GPUS[self.gpu]["bandwidth"] * (self.rates.decoding or dryrun.BANDWIDTH))
        memory = CAST * shapes.all + exam.batch_size * cache * 2
        hours = self._hours(read, self.rates.prefill or dryrun.PREFILL) + seconds / 3600
        how = MEASURED if self.rates.decoding else "computed"
        return Cost("", hours, 0, requests * length, {1: memory, 8: memory}, 5e7, 5e7, how)

    def read(self, prompts: float, passes: int = 2, text: float = 100.0, pictures: float = 0.5) -> Cost:
        """So many prompts through the model, 2 passes a weight without and 6 with gradients."""
        hours = self._hours(
            prompts * dryrun.operations(self.shapes, text, pictures, passes), self.rates.prefill or dryrun.PREFILL
        )
        memory = (CAST if passes == 2 else 2 * FROZEN) * self.shapes.all * 1.2
        return Cost("", hours, 0, prompts * text, {1: memory, 8: memory})

    def judged(self, answers: float, tokens: float | None = None) -> Cost:
        """So many verdicts of models as large as a guard."""
        read = answers * (self.study.scale.traffic.screened if tokens is None else tokens)
        written = answers / 32 * VERDICT * CAST * GUARD_WEIGHTS / (GPUS[self.gpu]["bandwidth"] * dryrun.BANDWIDTH)
        hours = self._hours(2 * GUARD_WEIGHTS * read, self.rates.prefill or dryrun.PREFILL) + written / 3600
        if not answers:
            return Cost("")
        memory = CAST * GUARD_WEIGHTS * 1.3
        return Cost("", hours, 0, read, {1: memory, 8: memory}, 5e7, 5e7)

    def _hours(self, operations: float, share: float) -> float:
        return operations / (GPUS[self.gpu]["operations"] * share) / 3600

    # how much of it a stage takes

    def exam(self, full: float, panel: float, share: float = 1.0) -> tuple[float, float]:
        """Requests and questions of so many full examinations and panels, on a share of the benchmarks."""
        scale = self.study.scale
        of, many = scale.traffic.questions + scale.traffic.requests, len(scale.exam.judges or BENCHMARKS)
        times = full * min(1.0, scale.exam.full * many / of) + panel * min(1.0, scale.exam.panel * many / of)
        return times * share * scale.traffic.requests, times * share * scale.traffic.questions

    def early(self, name: str) -> int:
        """How many checkpoints of a run come before its last."""
        scale, (kind, _, recipe) = self.study.scale, name.partition("/")
        if kind == "projector":
            return sum(step < scale.projector.steps for step in scale.checkpoints) + 1
        if kind == "instruct":
            return len(adaptation.stage_2(self.study, recipe)[1]) - 1
        return 0

    def models(self, recipe: str) -> tuple[float, float, float]:
        """Full examinations and panels behind `responses/recipe`, and the share of the benchmarks that they sit."""
        word, _, rest = recipe.partition(".")
        if word == "merge":
            partner, _, grid = rest.partition(".")
            rules = merging.points(self.study, partner, grid or "default")
            return len(rules), sum(map(len, rules)), 1.0 if grid else 0.8  # the headline measures' benchmarks; assumed
        if trainings := self.further(recipe):
            spec = self.study.scale.durability
            many = word == "durability"
            return 1 + trainings * many, trainings * (len(spec.along) - 1 if many else len(spec.searched)), 0.8
        if word == "confounds":
            return 1, 0, 0.2  # the requests of one benchmark in several prompts; assumed
        return 1, self.early(recipe.replace(".", "/", 1)), 1.0

    def further(self, recipe: str) -> int:
        """How many further fine-tunings are behind `responses/recipe`."""
        n = {"durability": len(durability.kinds(self.study)), "worst": self.study.scale.durability.trials + 1}
        return n.get(recipe.partition(".")[0], 0)

    def items(self, models: float) -> tuple[float, float]:
        """Requests and questions of interventions: a few items of each benchmark, half of them answered in sentences."""
        n = models * self.study.scale.probing.items * 5
        return n / 2, n / 2


def _instruct(plan: Plan, name: str) -> Cost:
    recipe, traffic = adaptation.RECIPES[name], plan.study.scale.traffic
    fit, milestones = adaptation.stage_2(plan.study, name)
    pictures = 0.0 if recipe.data == "textonly" else traffic.pictured
    return plan.trained(fit, recipe.method, len(milestones), traffic.instructions, pictures)


def _projector(plan: Plan, recipe: str) -> Cost:
    return plan.trained(
        plan.study.scale.projector, "projector", plan.early("projector/") + 1, plan.study.scale.traffic.captions, 1.0
    )


def _safety(plan: Plan, name: str) -> Cost:
    """Steps grow with corpora: their rows are taken to be alike; a replay has its own share."""
    recipe, scale, traffic = tuning.RECIPES[name], plan.study.scale, plan.study.scale.traffic
    fit, general = tuning.base_fit(plan.study, name), "general" in recipe.corpora
    times = 1.0 if general else len(recipe.corpora) + (scale.tuning.replay - 1) * ("replay" in recipe.corpora)
    fit = dataclasses.replace(fit, steps=max(1, round(fit.steps * times)))
    if recipe.objective == "grpo":
        sampled = plan.answered(fit.steps * fit.batch_size, 0, scale.tuning.rollout.max_new_tokens)
        learned = plan.trained(fit, "full", 1, traffic.pairs, 0.0)
        return learned._replace(hours=learned.hours + sampled.hours)
    if recipe.objective == "dpo":
        return plan.trained(fit, "dpo", 1, traffic.pairs, ("spa_vl" in recipe.corpora) / len(recipe.corpora))
    text = traffic.instructions if general else traffic.safety
    return plan.trained(fit, recipe.method, 1, text, 0.0 if recipe.corpora == ("chosen",) else 1.0)


def _screen(plan: Plan, recipe: str) -> Cost:
    """Both large corpora through the text guard, exchange by exchange; the picture classifier is a hundredth of it."""
    loaded, traffic = plan.study.scale.loaded, plan.study.scale.traffic
    if loaded is None or loaded.text_guard is None:
        return Cost("")
    corpora = [corpus for name in ("captions", "instructions") if (corpus := getattr(loaded, name)) is not None]
    rows = [corpus.limit or corpus.rows or SCREENED_ROWS / 2 for corpus in corpora]
    exchanges = sum(n * (EXCHANGES if corpus is loaded.instructions else 1.0) for n, corpus in zip(rows, corpora, strict=True))
    return plan.judged(exchanges, traffic.screened)


def _responses(plan: Plan, recipe: str) -> Cost:
    found, scale, traffic = plan.answered(*plan.exam(*plan.models(recipe))), plan.study.scale, plan.study.scale.traffic
    if not (runs := plan.further(recipe)):
        return found
    fit = dataclasses.replace(scale.instruct, steps=max(1, round(scale.durability.share * scale.instruct.steps)))
    learned = plan.trained(fit, "full", 1, traffic.instructions, traffic.pictured, runs)
    return learned._replace(hours=found.hours + learned.hours, kept=found.kept)


def _examination(plan: Plan, recipe: str) -> Cost:
    """Where models are loaded, the judges that are models and are not asked at a server; else the answers themselves."""
    exam, loaded = plan.study.scale.exam, plan.study.scale.loaded
    if loaded is None:
        return _responses(plan, recipe)
    judges = [[name for name in of if name in LLM_JUDGES and name not in exam.endpoints] for of in exam.judges.values()]
    requests, _ = plan.exam(*plan.models(recipe))
    return plan.judged(requests * sum(map(len, judges)) / max(1, sum(map(bool, judges))))


def _probe(plan: Plan, what: str) -> Cost:
    scale, layers = plan.study.scale, plan.shapes.layers
    probing, ends = scale.probing, plan.early(f"instruct/{adaptation.MAIN}") + 1
    runs = sum(plan.early(f"instruct/{name}") + 1 for name in adaptation.RECIPES)
    return {
        "localisation": lambda: plan.answered(scale.search.prompts * len(scale.search.factors) * layers * SEARCHED, 0, 4),
        "direction": lambda: plan.answered(2 * probing.prompts * layers, 0),
        "layers": lambda: plan.read(2 * (3 * 4 * probing.prompts + ends * 4 * probing.along)),
        "drift": lambda: plan.read(runs * 2 * probing.along),
        "seeing": lambda: plan.read(3 * ends * 2 * scale.exam.captions, pictures=1.0),
        "objectives": lambda: plan.read(
            probing.gradient_points * 2 * probing.gradient_batches * scale.instruct.batch_size, 6, scale.traffic.instructions
        ),
    }[what]()


def _causal(plan: Plan, what: str) -> Cost:
    probing, layers = plan.study.scale.probing, plan.shapes.layers
    if what == "directions":
        return plan.answered(
            *plan.items((2 + probing.random_directions) + (1 + probing.random_directions) * len(probing.strengths))
        )
    widths = [*probing.widths, layers // 4]
    return plan.answered(*plan.items(len(interventions.bands(layers, widths)) + probing.random_sets * len(widths)))


def _sppft(plan: Plan, which: str) -> Cost:
    """Stage 2 once for every set of frozen blocks, as wide as the published band: a quarter of all."""
    scale, layers = plan.study.scale, plan.shapes.layers
    sets = len(interventions.bands(layers, [layers // 4])) if which == "bands" else scale.probing.frozen_sets
    fit, _ = adaptation.stage_2(plan.study, causal.SPPFT)
    learned = plan.trained(fit, "sppft", 1, scale.traffic.instructions, scale.traffic.pictured, sets)
    return learned._replace(hours=learned.hours + plan.answered(*plan.items(sets)).hours, kept=0.0)


def _judging(plan: Plan, what: str) -> Cost:
    """The reward's guard, or the parent, reads the answers of all that is tuned, the parent and the adapted model."""
    requests, _ = plan.exam(len(tuning.REFERENCES) + len(tuning.examined(plan.grid)), 0)
    loaded = plan.study.scale.loaded
    guarded = what.startswith("guard-text") and loaded is not None and loaded.text_guard is not None
    return plan.judged(requests) if guarded else plan.read(requests)


KINDS: dict[str, Callable[[Plan, str], Cost]] = {
    "projector": _projector, "instruct": _instruct, "safety": _safety, "screen": _screen, "responses": _responses,
    "examination": _examination, "probe": _probe, "causal": _causal, "sppft": _sppft, "judging": _judging,
    "merge": lambda plan, recipe: _examination(plan, f"merge.{recipe}"),
    "durability": lambda plan, recipe: _examination(plan, f"durability.{recipe}"),
    "worst": lambda plan, recipe: _examination(plan, f"worst.{recipe}"),
}  # fmt: skip
"""What counts a stage, by the first word of its name; the others (corpora, weights that are there) take no GPU."""


class Schedule(NamedTuple):
    """When a graph ends on some GPUs, and the longest chain of stages that wait for each other."""

    hours: float
    chain: list[str]
    chain_hours: float


def schedule(study: Study, costs: Sequence[Cost], many: int) -> Schedule:
    """Stages in the order of their urgency (the longest chain that waits for them), each on as many GPUs as it can use.

    A stage on n GPUs is taken to be n times as fast. Stages without a GPU take no time.
    """
    takes = {cost.stage: cost.hours / max(1, min(cost.gpus, many)) for cost in costs}
    wants = {cost.stage: min(max(cost.gpus, 1), many) if cost.hours else 0 for cost in costs}
    before = {name: [needed for needed in study.inputs(name) if needed in takes] for name in takes}
    after: dict[str, list[str]] = {name: [] for name in takes}
    for name, needed in before.items():
        for one in needed:
            after[one].append(name)

    @functools.cache
    def urgency(name: str) -> float:
        return takes[name] + max(map(urgency, after[name]), default=0.0)

    free, clock, running, waiting = many, 0.0, list[tuple[float, str]](), {name: len(before[name]) for name in takes}
    while running or waiting:
        for name in sorted((name for name, left in waiting.items() if not left), key=urgency, reverse=True):
            if wants[name] <= free:
                free -= wants[name]
                heapq.heappush(running, (clock + takes[name], name))
                del waiting[name]
        clock, done = heapq.heappop(running)
        free += wants[done]
        for name in after[done]:
            waiting[name] -= 1
    chain = [max((name for name in takes if not before[name]), key=urgency)]
    while after[chain[-1]]:
        chain.append(max(after[chain[-1]], key=urgency))
    return Schedule(clock, [name for name in chain if takes[name]], urgency(chain[0]))
