"""NANO: MINI with smaller numbers, the same code; and one finished NANO study for all tests that need models."""

import dataclasses
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from vlsafe import cli
from vlsafe.core.presets import MINI, SCALES
from vlsafe.data.pocket import packages
from vlsafe.study.graph import planned
from vlsafe.study.study import Study

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """Tests that share what takes long to make, a study or a fixture of their module, go to one process; others where is room."""
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        shared = [name for name in ("study", "begun") if name in item.fixturenames]
        scopes = {fixture.scope for of in item._fixtureinfo.name2fixturedefs.values() for fixture in of}
        if (shared or "module" in scopes) and not item.get_closest_marker("processes"):
            item.add_marker(pytest.mark.xdist_group(shared[0] if shared else item.path.name))


def pytest_collection_finish(session):
    """What was imported stays: the collector need not look through it after every training, which is a fifth of the time."""
    gc.collect()
    gc.freeze()


def smaller(fit, steps, batch_size=8):
    return dataclasses.replace(fit, steps=steps, batch_size=batch_size)


NANO = dataclasses.replace(
    MINI,
    name="nano",
    language=dataclasses.replace(MINI.language, layers=2, width=32, mlp=64),
    vision=dataclasses.replace(MINI.vision, vision_width=32, vision_layers=1, text_width=32, text_layers=1, projection=32),
    tower=smaller(MINI.tower, 3, 102),
    pretraining=smaller(MINI.pretraining, 2),
    guard=dataclasses.replace(smaller(MINI.guard, 80, 16), learning_rate=5e-3),
    projector=smaller(MINI.projector, 5),
    instruct=smaller(MINI.instruct, 5),
    tuning=dataclasses.replace(
        MINI.tuning,
        sft=smaller(MINI.tuning.sft, 2),
        preference=dataclasses.replace(MINI.tuning.preference, fit=smaller(MINI.tuning.preference.fit, 2, 4)),
        rollout=dataclasses.replace(
            MINI.tuning.rollout, fit=smaller(MINI.tuning.rollout.fit, 2), generations=4, max_new_tokens=4
        ),
        milestones=(0.5,),
        pairs=12,
    ),
    backbones={name: dataclasses.replace(b, fit=smaller(b.fit, 3)) for name, b in MINI.backbones.items()},
    corpora=dataclasses.replace(MINI.corpora, pictures=204, guard_pictures=60, captions=80, instructions=80, safety=8, pairs=8),
    exam=dataclasses.replace(MINI.exam, panel=4, full=14, batch_size=32, max_new_tokens=6),
    merging=dataclasses.replace(MINI.merging, ratios=(0.0, 0.5, 1.0), few=(0.5,), votes=(0.5,), items=8),
    checkpoints=(2, 3),
    arm_checkpoints=(2,),
    search=dataclasses.replace(MINI.search, prompts=8, pairs=20, factors=(1.1, 1.6)),
    probing=dataclasses.replace(
        MINI.probing,
        prompts=20,
        along=6,
        items=8,
        random_sets=3,
        strengths=(1.0,),
        random_directions=2,
        gradient_batches=2,
        gradient_points=2,
    ),
)
SCALES["nano"] = NANO


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A whole NANO study, made once; in the folder that `VLSAFE_NANO` names, where it is kept for the next session."""
    made = Study.open("nano", "mini-chat", 0, os.environ.get("VLSAFE_NANO") or tmp_path_factory.mktemp("store"))
    for name in planned(made):
        made.folder(name)
    gc.freeze()
    return made


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
    """A NANO study up to stage 1."""
    made = Study.open("nano", "mini-chat", 0, tmp_path_factory.mktemp("store"))
    made.folder("projector/filtered")
    gc.freeze()  # what training has imported
    return made


@pytest.fixture(scope="session")
def figures(study, tmp_path_factory):
    """A gallery of the NANO study, made once."""
    out = tmp_path_factory.mktemp("figures")
    assert cli.main(["gallery", "--scale", "nano", "--root", str(study.root), "--out", str(out), "--seeds", "0"]) == 0
    return out


def installed(package):
    """The first file of a package of scale pocket; its test is skipped by name where the package is not installed."""
    try:
        return packages.path(package, package.files[0][0])
    except FileNotFoundError as error:
        pytest.skip(f"scale pocket's packages are not installed: {error}")
