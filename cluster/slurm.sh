#!/usr/bin/env bash
# slurm.sh: one study on nodes that Slurm lends, queued again until it is done.
#
# Rendered from cluster/site.toml by `python -m cluster write`: change that, not this. In the project's folder:
#
#   python -m cluster check cluster/slurm.sh
#   sbatch cluster/slurm.sh studies/alpha_beta.py --trials 40
#   tail -f hdml-JOB.log
#   scancel JOB
#
# See cluster/README.md.
#SBATCH --job-name=hdml
#SBATCH --partition=SET: a partition with GPUs, such as gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --output=hdml-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --requeue

set -euo pipefail
(($#)) || { echo "usage: sbatch cluster/slurm.sh studies/NAME.py [OPTION ...]" >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"
export PATH="SET: the bin folder of a Python that has what studies need, as all nodes see it, such as /shared/hdml/.venv/bin:$PATH"
export PYTHONPATH="$SLURM_SUBMIT_DIR"
export RAY_AUTH_MODE="token"
export RAY_USAGE_STATS_ENABLED="0"
export RAY_health_check_initial_delay_ms="5000"
export RAY_health_check_period_ms="5000"
export RAY_health_check_timeout_ms="5000"
export RAY_health_check_failure_threshold="3"
export HDML_DATA="/tmp/hdml-data-$UID"
export HDML_OUT="$HOME/hdml-runs"
export HDML_LEDGER="SET: PostgreSQL's URL without a password, such as postgresql+psycopg://hdml@10.0.0.5:5432/ledger"
export MLFLOW_TRACKING_URI="SET: MLflow's address as the head reaches it, such as http://10.0.0.5:5000"
bash cluster/node.sh secrets
mkdir -p "$HDML_DATA" "$HDML_OUT"
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# A port and a folder of its own: other jobs, of other users too, may have a Ray on the same nodes.
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$(hostname --ip-address | cut -d' ' -f1):$port"
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory=2147483648 --disable-usage-stats --block)
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# This script runs on the first node, which is the head and trains too; srun starts the others.
ray start --head --node-ip-address="${RAY_ADDRESS%:*}" --port="$port" --dashboard-host=127.0.0.1 \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${resources[@]}" &
for _ in $(seq 60); do ray health-check --address "$RAY_ADDRESS" 2>/dev/null && break; sleep 2; done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
    srun --nodes="$others" --ntasks="$others" --exclude="$SLURMD_NODENAME" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start --address="$RAY_ADDRESS" "${resources[@]}" &
fi

# Told that its time is nearly up, the study saves its state and ends; queued again, the same command goes on.
again=
python "$@" &
study=$!
trap 'again=yes; kill -TERM "$study"' TERM
status=0
wait "$study" || status=$?
while kill -0 "$study" 2>/dev/null; do status=0; wait "$study" || status=$?; done
if [ -n "$again" ] && ((status)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
