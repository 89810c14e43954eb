#!/bin/sh
# What a 7B model costs on one GPU: a table in SECONDS (340 by default). It needs the environment and a card of 80 GB or more.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTORCH_ALLOC_CONF=expandable_segments:True PYTHONUNBUFFERED=1 exec "$python" tests/gpu.py "$@"
