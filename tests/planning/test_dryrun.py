"""What a reproduction would cost: real shapes, sums that can be checked by hand, and published hours."""

import dataclasses
from pathlib import Path

import pytest
from conftest import NANO

from vlsafe import cli
from vlsafe.core.presets import PAPER, SMALL, load_scale
from vlsafe.core.scale import Fit
from vlsafe.models import checkpoints
from vlsafe.planning import dryrun
from vlsafe.study import graph
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


def test_hours_come_near_the_published_ones():
    """LLaVA-1.5 7B on eight A100: stage 1 in 3.5 hours, stage 2 in 10 (its README)."""
    hours = {work.name: work.hours / 8 for work in dryrun.plan(PAPER, "llama2-chat", "A100-80G")}
    assert hours["stage 2"] == pytest.approx(10, rel=0.1) and hours["stage 1"] == pytest.approx(3.5, rel=0.25)


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


def test_memory_of_whole_and_of_sharded_weights():
    works = {work.name: work for work in dryrun.plan(PAPER, "llama2-chat", "A100-80G")}
    assert works["stage 2"].memory[1] > 16 * 6.7e9 and works["stage 2"].memory[8] < 40e9
    assert works["stage 1"].memory[8] == works["stage 1"].memory[1]  # DDP: every GPU holds the whole model
    small = [work.memory[1] for work in dryrun.plan(SMALL, "smollm2", "RTX-4090")]
    assert max(small) < dryrun.GPUS["RTX-4090"]["memory"]


def test_every_part_says_whether_it_was_computed_or_measured():
    assert {work.how for work in dryrun.plan(PAPER, "llama2-chat", "A100-80G")} == {"computed"}
    result = {work.name: work.how for work in dryrun.plan(PAPER, "llama2-chat", "A100-80G", 0.4)}
    assert result["stage 2"] == dryrun.MEASURED and result["screening"] == result["examinations"] == "computed"


def test_steps_are_measured_by_the_trainer_itself():
    result = dryrun.measure(dataclasses.replace(NANO, instruct=dataclasses.replace(NANO.instruct, at_once=2)), "mini-chat", 4)
    assert result["device"] == "cpu" and result["mfu"] is None and result["peak_bytes"] is None
    assert result["tokens_per_row"] > 200 and result["tokens_per_second"] == pytest.approx(
        2 * result["tokens_per_row"] / result["seconds_per_step"]
    )


def test_the_readme_says_what_the_dry_run_says(tmp_path):
    readme = ENV.parent / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    assert cli.main(["dryrun", "--readme", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8"), "run `vlsafe dryrun --readme README.md`"


def test_the_command_prints_the_plan(capsys):
    assert cli.main(["dryrun", "--scale", "paper", "--gpu", "H100"]) == 0
    assert "| stage 2 | 1 |" in capsys.readouterr().out
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
