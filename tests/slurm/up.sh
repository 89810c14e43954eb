#!/usr/bin/env bash
# A real Slurm of one node on loopback, from Debian's packages, and the NANO graph through it to its end, one job killed on the way.
# Needs root. Where the packages cannot be installed it says so and ends with 77. What it makes lies in a folder of its own;
# /etc/slurm/slurm.conf is a link into it meanwhile (the job-step plugin drops SLURM_CONF).
set -euo pipefail
cd "$(dirname "$0")/../.."
TARGETS=("$@")   # rules to make; everything, notebooks and gallery included, without any
PYTHON=${PYTHON:-.venv/bin/python}
skip() { echo "skipped: $1"; exit 77; }

[ "$(id -u)" = 0 ] || skip "bringing up Slurm needs root"
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  apt-get install -y -qq --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge >/dev/null 2>&1 \
    || skip "slurm-wlm and munge cannot be installed"
fi
"$PYTHON" -c "import snakemake_executor_plugin_slurm" 2>/dev/null || skip "snakemake-executor-plugin-slurm is not installed (pip install '.[slurm]')"
[ ! -e /etc/slurm/slurm.conf ] || skip "/etc/slurm/slurm.conf exists: this machine has a Slurm of its own"

D=$(mktemp -d /tmp/vlsafe-slurm.XXXXXX); chmod 755 "$D"
mkdir -p "$D"/{etc,run,state,spool,log}
down() {
  for pid in "$D"/run/{slurmd,slurmctld,munged}.pid; do [ -s "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true; done
  rm -f /etc/slurm/slurm.conf
}
trap down EXIT
CPUS=$(nproc); MEMORY=$(awk '/MemTotal/ {print int($2/1024*0.8)}' /proc/meminfo); HOST=$(hostname -s)
cat > "$D/etc/slurm.conf" <<CONF
ClusterName=toy
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$D/run/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=16817
SlurmdPort=16818
SrunPortRange=60001-60100
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.pid
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt
JobAcctGatherType=jobacct_gather/none
MinJobAge=3600
ReturnToService=2
DefMemPerCPU=500
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=04:00:00 State=UP
CONF
export SLURM_CONF="$D/etc/slurm.conf"
mkdir -p /etc/slurm; ln -s "$SLURM_CONF" /etc/slurm/slurm.conf
chown munge "$D/run"; dd if=/dev/urandom bs=1 count=1024 of="$D/munge.key" 2>/dev/null
install -o munge -m 0400 "$D/munge.key" "$D/run/munge.key"; rm "$D/munge.key"
setpriv --reuid=munge --regid=munge --init-groups /usr/sbin/munged --key-file="$D/run/munge.key" --socket="$D/run/munge.socket" \
  --pid-file="$D/run/munged.pid" --log-file="$D/run/munged.log" --seed-file="$D/run/munged.seed" --num-threads=2
/usr/sbin/slurmctld -c; /usr/sbin/slurmd -N "$HOST"
for _ in $(seq 30); do sinfo -h -o %t 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo

# NANO, as a researcher would bring a scale of their own.
PYTHONPATH=tests:. "$PYTHON" - "$D/nano.yaml" <<'PY'
import sys, yaml
from conftest import NANO
from vlsafe.core.scale import as_plain
open(sys.argv[1], "w").write(yaml.safe_dump({"extends": "mini", **as_plain(NANO)}))
PY
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PATH="$(cd "$(dirname "$PYTHON")" && pwd):$PATH"

# One job is killed while it runs, as a node that fails would.
(
  while sleep 1; do
    job=$(squeue -h -t RUNNING -o %i | head -n 1)
    if [ -n "$job" ]; then
      sleep 4; scancel --signal=KILL --full "$job" 2>/dev/null && echo "$job" > "$D/killed" && echo "killed Slurm job $job" && break
    fi
  done
) &
"$PYTHON" -m snakemake --profile env/profiles/slurm --seconds-between-status-checks 5 --latency-wait 10 --jobs "$CPUS" \
  --default-resources mem_mb=1500 runtime=60 --rerun-incomplete --rerun-triggers mtime params input --quiet rules \
  --slurm-keep-successful-logs --slurm-logdir "$D/log/jobs" \
  --config scale="$D/nano.yaml" seeds=0 backbones=mini-chat root="$D/runs" grid=default -- "${TARGETS[@]}"

submitted=$(grep -c JobId= "$D/log/jobcomp.txt"); failed=$(grep -c 'JobState=\(FAILED\|CANCELLED\|NODE_FAIL\)' "$D/log/jobcomp.txt" || true)
echo "Slurm ran $submitted jobs, $failed of them failed, killed on purpose: $(cat "$D/killed" 2>/dev/null || echo none)"
[ -s "$D/killed" ] && [ "$failed" -ge 1 ] || { echo "no job was killed: nothing has been shown about retrying"; exit 1; }
"$PYTHON" -c "import sys; from vlsafe import cli; sys.exit(cli.main(sys.argv[1:]))" status --scale "$D/nano.yaml" --root "$D/runs" | awk '{print $1}' | sort | uniq -c
echo "done; logs in $D/log"
