"""What a reproduction would cost: real shapes, sums that can be checked by hand, and published hours."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import loaded
import pytest
from conftest import NANO

from vlsafe import cli
from vlsafe.core.presets import PAPER, SMALL, load_scale
from vlsafe.core.scale import Fit
from vlsafe.models import checkpoints, devices
from vlsafe.planning import costs, dryrun, shown
from vlsafe.study import graph, tuning
from vlsafe.study.study import Study

ENV = Path(__file__).parents[2] / "env"


def shapes_of(scale, backbone):
    return dryrun._shapes(
        scale, backbone, checkpoints.random_graft(scale.decoder(backbone), scale.vision, scale.source == "load")
    )


@pytest.mark.parametrize(
    ("scale", "backbone", "language", "tower"),
    [  # weights as their makers count them
        ("paper", "llama2-chat", 6_738_415_616, 303_507_456),
        ("small", "smollm2", 361_821_120, 87_456_000),
        (ENV / "scales/mistral.yaml", "mistral", 7_248_023_552, 303_507_456),
        (ENV / "scales/vicuna.yaml", "vicuna", 6_738_415_616, 303_507_456),
        (ENV / "scales/qwen2.5.yaml", "qwen2.5", 7_615_616_512, 303_507_456),
        (ENV / "scales/llama3.yaml", "llama3", 8_030_261_248, 303_507_456),
    ],
)
def test_shapes_are_the_real_ones(scale, backbone, language, tower):
    shapes = shapes_of(load_scale(scale), backbone)
    assert (shapes.language, shapes.tower) == (language, tower)


def test_operations_by_hand():
    shapes = dryrun.Shapes(blocks=100, head=10, embedding=10, projector=4, tower=50, layers=2, width=8, image_tokens=5)
    text = dryrun.operations(shapes, 10, 0, 6)
    assert text == 6 * 10 * 110 + 6 * 2 * 8 * 10**2
    pictured = dryrun.operations(shapes, 10, 1, 6)
    assert pictured == pytest.approx(6 * 15 * 110 + 6 * 5 * 4 + 6 * 2 * 8 * 15**2 + 2 * 6 * 50)


def planned(scale, backbone, gpu, tmp_path, grid="default", **rates):
    study = Study.open(scale, backbone, 0, tmp_path)
    return study, costs.Plan(study, gpu, costs.Rates(**rates), grid=grid).stages()


def by_name(stages):
    return {cost.stage: cost for cost in stages}


def test_hours_come_near_the_published_ones(tmp_path):
    """LLaVA-1.5 7B on eight A100 at a quarter of the peak: stage 1 in 3.5 hours, stage 2 in 10 (its README)."""
    found = by_name(planned("paper", "llama2-chat", "A100-80G", tmp_path, training=0.25)[1])
    assert found["instruct/filtered-full"].hours / 8 == pytest.approx(10, rel=0.1)
    assert found["projector/filtered"].hours / 8 == pytest.approx(3.5, rel=0.25)


@pytest.mark.parametrize("grid", graph.GRIDS)
def test_every_stage_of_the_graph_is_in_the_plan(tmp_path, grid):
    """Of the tiny scale that loads, of the paper's, of pocket's and of the miniature's."""
    scales = [(loaded.written(tmp_path), "tiny-a"), ("paper", "llama2-chat"), ("pocket", "pocket-chat"), ("mini", "mini-chat")]
    for scale, backbone in scales:
        study = Study.open(str(scale), backbone, 0, tmp_path)
        stages = costs.Plan(study, "H200", grid=grid).stages()
        assert [cost.stage for cost in stages] == graph.planned(study, grid)
        rows = shown.lines(stages, "H200", every=True)
        assert [row["stage"] for row in rows] == [*graph.planned(study, grid), "all"]
        assert sum(row["stages"] for row in shown.lines(stages, "H200")[:-1]) == len(stages)
        free = {cost.stage.partition("/")[0] for cost in stages if not cost.hours}
        assert free <= {
            "world",
            "tower",
            "base",
            "guard",
            "parent",
            "screen",
            "examination",
            "merge",
            "durability",
            "worst",
        }  # nothing to compute there


def test_what_was_forgotten_once_costs_something(tmp_path):
    found = by_name(planned("paper", "llama2-chat", "H200", tmp_path, "full")[1])
    for name in (
        "screen/filtered", "safety/grpo-text-full", "safety/mtl-pcgrad-full", "judging/guard-text.full", "probe/localisation",
        "probe/direction", "probe/objectives", "causal/transplants", "responses/merge.sl-full.full", "merge/sl-full.full",
        "examination/instruct.filtered-full", "responses/confounds.parent",
    ):  # fmt: skip
        assert found[name].hours > 0.001, name
    screened = found["screen/filtered"]
    rows = 558_128 + costs.EXCHANGES * 665_298
    assert screened.tokens == pytest.approx(rows * 350, rel=0.01)


def test_a_recipe_that_no_such_gpu_holds_is_named_and_can_be_left_out(tmp_path, monkeypatch):
    """GRPO of seven billion weights is not sharded: it takes a GPU of 141 GB."""
    one, eight, line = shown.too_large(planned("paper", "llama2-chat", "H100", tmp_path, "full")[1], "H100")
    assert one.startswith("1 × H100 cannot hold ") and "instruct" in one and eight == "8 × H100 cannot hold safety (GRPO)"
    assert line.startswith("safety (GRPO) is not sharded and needs one GPU of 129 GB, more than one H100 has")
    assert shown.too_large(planned("paper", "llama2-chat", "H200", tmp_path, "full")[1], "H200") == []  # full DPO fits
    file = tmp_path / "smaller.yaml"
    file.write_text(f"extends: paper\nname: smaller\n{line.split('`')[1]}\n")
    study, stages = planned(str(file), "llama2-chat", "H100", tmp_path, "full")
    assert shown.too_large(stages, "H100") == [one.replace(", safety (GRPO)", "")]
    reason = "the scale leaves the recipe 'grpo-text-full' out (`tuning.without`)"
    assert study.left_out("full")["safety/grpo-text-full"] == reason
    assert reason in study.left_out("full")["examination/safety.grpo-text-full"]
    kept = {cost.stage for cost in planned("paper", "llama2-chat", "H100", tmp_path, "full")[1]} - {cost.stage for cost in stages}
    assert kept and all("grpo" in name for name in kept) and "judging/guard-text.full" in graph.planned(study, "full")
    assert study.run("safety/sl-full").digest == Study.open("paper", "llama2-chat", 0, tmp_path).run("safety/sl-full").digest
    monkeypatch.setattr(devices, "memory", lambda: 80_000_000)
    weights = SimpleNamespace(num_parameters=lambda only_trainable: 6_000_000)
    monkeypatch.setattr(tuning.models.checkpoints, "load", lambda start: weights)
    monkeypatch.setattr(tuning.models.trainable, "choose", lambda model, *_: model)
    with pytest.raises(ValueError, match=r"not sharded: .* take 0 GB .*`tuning: {without: \[grpo-text-full\]}` in the scale"):
        tuning.train_by(study, "grpo-text-full", tmp_path, tmp_path, [], study.scale.tuning.rollout.fit)


def test_a_schedule_by_hand(tmp_path):
    """Two chains of two stages of one GPU: four hours on one, two on two; a stage that can use two GPUs takes half as long."""
    of = Study.open("mini", "mini-chat", 0, tmp_path)
    names = ["parent/aligned", "projector/filtered", "examination/parent.aligned"]  # the last two wait for the first
    stages = [costs.Cost(name, hours=hours, gpus=1) for name, hours in zip(names, (1.0, 3.0, 2.0), strict=True)]
    assert costs.schedule(of, stages, 1).hours == 6.0
    found = costs.schedule(of, stages, 2)
    assert (found.hours, found.chain, found.chain_hours) == (4.0, names[:2], 4.0)
    assert costs.schedule(of, stages, 8) == found  # more GPUs do not help
    assert costs.schedule(of, [stages[0], stages[1]._replace(gpus=2), stages[2]], 2).hours == pytest.approx(1 + 1.5 + 2)


@pytest.mark.parametrize("many", [1, 2, 8])
def test_no_schedule_is_shorter_than_its_chain_or_its_work(tmp_path, many):
    study, stages = planned("paper", "llama2-chat", "H200", tmp_path)
    found, work = costs.schedule(study, stages, many), sum(cost.hours for cost in stages)
    assert found.hours >= max(found.chain_hours, work / many) - 1e-9 and found.hours <= work + 1e-9
    assert found.chain[0] == "screen/filtered" and "instruct/filtered-full" in found.chain


@pytest.mark.parametrize(
    ("method", "trained", "rows", "recompute", "peak"),
    [  # LLaVA-1.5-7B on one H200: 889 tokens a row; 1,368 a pair of answers
        ("full", 6.76e9, 32, True, 138),
        ("projector", 21e6, 4, False, 28),
        ("lora", 341e6, 16, False, 120),
        ("lora without dropout", 341e6, 8, False, 89),
    ],
)
def test_memory_is_what_one_gpu_took(method, trained, rows, recompute, peak):
    shapes = dryrun.Shapes(6.476e9, 131e6, 131e6, 21e6, 304e6, 32, 4096, 576)
    pairs = method == "lora without dropout"
    planned = dryrun.gpu_memory(shapes, trained, 1, sharded=False, low=True) + (2 * shapes.all if pairs else 0)
    planned += dryrun.activations(shapes, rows * (1368 if pairs else 889), method, recompute)
    assert planned / 1e9 == pytest.approx(peak, rel=0.1)


def test_memory_of_whole_and_of_sharded_weights(tmp_path):
    found = by_name(planned("paper", "llama2-chat", "A100-80G", tmp_path)[1])
    stage_2, stage_1 = found["instruct/filtered-full"].memory, found["projector/filtered"].memory
    assert stage_2[1] > 16 * 6.7e9 and stage_2[8] < 40e9
    assert stage_1[8] == stage_1[1]  # DDP: every GPU holds the whole model
    small = [cost.memory[1] for cost in planned("small", "smollm2", "RTX-4090", tmp_path)[1]]
    assert max(small) < dryrun.GPUS["RTX-4090"]["memory"]


def test_every_stage_says_whether_it_was_computed_or_measured(tmp_path):
    assert {cost.how for cost in planned("paper", "llama2-chat", "A100-80G", tmp_path)[1]} == {"computed"}
    found = by_name(planned("paper", "llama2-chat", "A100-80G", tmp_path, training=0.4, decoding=0.6)[1])
    assert found["instruct/filtered-full"].how == found["responses/parent.aligned"].how == dryrun.MEASURED
    assert found["screen/filtered"].how == "computed"


def test_steps_are_measured_by_the_trainer_itself():
    result = dryrun.measure(dataclasses.replace(NANO, instruct=dataclasses.replace(NANO.instruct, at_once=2)), "mini-chat", 4)
    assert result["device"] == "cpu" and result["mfu"] is None and result["peak_bytes"] is None
    assert result["tokens_per_row"] > 200 and result["tokens_per_second"] == pytest.approx(
        2 * result["tokens_per_row"] / result["seconds_per_step"]
    )
    assert result["step_seconds"] > 0 and result["generated_per_second"] == pytest.approx(
        NANO.exam.batch_size / result["step_seconds"]
    )


def test_the_readme_says_what_the_dry_run_says(tmp_path):
    readme = ENV.parent / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    assert cli.main(["dryrun", "--readme", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8"), "run `vlsafe dryrun --readme README.md`"


def test_the_command_prints_the_plan(capsys):
    assert cli.main(["dryrun", "--scale", "paper", "--gpu", "H100"]) == 0
    output = capsys.readouterr().out
    assert "| instruct | 4 |" in output and "longest chain" in output
    assert cli.main(["dryrun", "--scale", "paper", "--gpu", "H100", "--stages"]) == 0
    assert "| instruct/filtered-full | 1 |" in capsys.readouterr().out
    assert cli.main(["dryrun", "--scale", "paper", "--gpu", "H10"]) == 2
    assert "did you mean 'H100'" in capsys.readouterr().err


def test_what_a_job_asks_of_a_scheduler(tmp_path):
    paper, mini = (Study.open(scale, name, 0, tmp_path) for scale, name in (("paper", "llama2-chat"), ("mini", "mini-chat")))
    assert graph.needs(mini, ("instruct/filtered-full",)) == {}
    trained = graph.needs(paper, ("instruct/filtered-full", "examination/instruct.filtered-full"))
    assert (trained["gpu"], trained["tasks"]) == (8, 0)
    assert graph.needs(paper, ("examination/parent.aligned",))["gpu"] == 1
    assert "gpu" not in graph.needs(paper, ("world/corpora",))


def test_every_fit_of_the_loaded_scales_can_be_dealt_to_one_and_to_eight_processes():
    from vlsafe.training import processes

    for scale in (PAPER, SMALL):
        for fit in (scale.projector, scale.instruct, scale.tuning.sft, scale.tuning.preference.fit):
            assert isinstance(fit, Fit) and processes.per_process(fit, 1) <= fit.at_once
            assert not fit.launch or processes.per_process(fit, 8) <= fit.at_once


@pytest.mark.parametrize(
    ("name", "found"),
    [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100-80G"),
     ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("NVIDIA GeForce RTX 3060", None), ("NVIDIA A100-PCIE-40GB", None)],
)  # fmt: skip
def test_a_card_is_known_by_its_whole_name(monkeypatch, name, found):
    monkeypatch.setattr(devices, "device", lambda: "cuda")
    monkeypatch.setattr(dryrun.torch.cuda, "get_device_name", lambda: name)
    assert dryrun.this_gpu() == dryrun.GPUS.get(found)


def test_what_reads_a_stage_that_does_not_fit_is_not_counted(tmp_path):
    """On one card of 80 GB no whole model is adapted: no answer of one is planned either."""
    study, stages = planned("paper", "llama2-chat", "A100-80G", tmp_path)
    row = shown.summary([(1, "A100-80G", study)]).splitlines()[2].split("|")
    possible = [cost for cost in stages if not set(shown.beyond(study, stages, 80e9)) & {cost.stage}]
    assert float(row[4]) == round(sum(cost.hours for cost in possible)) < 0.8 * sum(cost.hours for cost in stages)
    assert not [cost.stage for cost in possible if "filtered-full" in cost.stage]
