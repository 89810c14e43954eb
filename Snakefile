"""The order of the work, and nothing else: what is valid is decided by the store, what a stage does by `vlsafe.study`."""

import re
from pathlib import Path
from shlex import quote

from vlsafe.publish.notebooks import ACROSS, NOTEBOOKS, code_digest, reads
from vlsafe.core.presets import load_scale
from vlsafe.publish.gallery import place
from vlsafe.study.graph import jobs, needs, planned, urgency
from vlsafe.study.study import Study

SCALE, ROOT, GRID = (str(config.get(name, "default")) for name in ("scale", "root", "grid"))
if re.search("[{}]", ROOT):  # Snakemake would take what is between them for a wildcard
    raise ValueError(f"the run store {ROOT!r} has braces in its name; choose another")
PLACE = f"--scale {quote(SCALE)} --root {quote(ROOT)}"
STUDIES = [
    Study.open(SCALE, backbone, int(seed), ROOT)
    for backbone in str(config["backbones"]).split()
    for seed in str(config["seeds"]).split()
]
COMPLETE = {s.backbone for s in STUDIES} == set(load_scale(SCALE).backbones) and {s.seed for s in STUDIES} >= {0, 1, 2}
FIGURES = place(STUDIES) if COMPLETE else Path("figures") / f"{STUDIES[0].scale.name}-partial"


def receipt(study, name):
    return str(study.run(name).receipt.relative_to(Path.cwd()) if study.root.is_relative_to(Path.cwd()) else study.run(name).receipt)


def executed(study, notebook, suffix):
    return str(Path(ROOT) / study.scale.name / study.backbone / f"seed{study.seed}" / "notebooks" / f"{notebook}{suffix}")


rule all:
    input:
        FIGURES / "report.html",
        [executed(study, notebook, ".done") for study in STUDIES for notebook in NOTEBOOKS],
    default_target: True


made = set()
for study in STUDIES:
    URGENCY = urgency(study, GRID)
    for job in jobs(study, GRID):
        targets = [receipt(study, name) for name in job]
        if targets[0] in made:
            continue
        made.update(targets)
        asked = needs(study, job)

        rule:
            name: "_".join([re.sub(r"[/.-]", "_", job[0]), study.run(job[0]).backbone.replace("-", "_"), str(study.seed)])
            input: [receipt(study, needed) for name in job for needed in study.inputs(name) if needed not in job]
            output: targets
            priority: URGENCY[job]
            log: targets[0].replace(".json", ".log")
            resources:
                attempt=lambda wildcards, attempt: attempt,
                **{key: value for key, value in {"gpu": 0, **asked}.items() if key != "threads"},
            threads: asked.get("threads", 1)
            params:
                digest=[study.run(name).digest for name in job],
                call=f"{' '.join(job)} --backbone {study.backbone} --seed {study.seed} {PLACE}",
            # The same text in all rules (it is put together when a job runs); of GPUs those that were granted, at most what it can use.
            shell: "vlsafe stage {params.call} --gpus {resources.gpu} --attempt {resources.attempt} > {log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"

    for notebook in NOTEBOOKS:

        rule:
            name: f"notebook_{notebook}_{study.backbone.replace('-', '_')}_{study.seed}"
            input:
                ancient(f"notebooks/{notebook}.ipynb"),
                [receipt(s, name) for s in (STUDIES if notebook in ACROSS else [study]) for name in reads(s, notebook)],
            output: touch(executed(study, notebook, ".done"))
            priority: 2 * max(URGENCY.values())  # seconds each, and somebody may be waiting to read it
            log: executed(study, notebook, ".ipynb")
            params:
                code=code_digest(Path("notebooks") / f"{notebook}.ipynb"),
                call=f"{notebook} --backbone {study.backbone} --seed {study.seed} {PLACE}",
            shell: "vlsafe notebook {params.call} --out {log:q}"


rule gallery:
    input: [receipt(study, name) for study in STUDIES for name in planned(study, GRID)]
    output: FIGURES / "provenance.json"
    priority: 1  # before the notebooks, which nothing waits for
    params:
        call=f"{PLACE} --backbones {config['backbones']} --seeds {config['seeds']} --out {quote(str(FIGURES))} --grid {GRID}",
    shell: "vlsafe gallery {params.call}"


rule report:
    input: FIGURES / "provenance.json"
    output: FIGURES / "report.html"
    params:
        figures=str(FIGURES),
    shell: "vlsafe report --figures {params.figures:q} --out {output:q}"
