#!/usr/bin/env bash
# A federated LoRA sweep as one Slurm job: Ray on all of its nodes, MLflow on the first, and nothing
# left when it ends. In the root of the repository, on a file system that all nodes share:
#
#   make install                                              # once: the environment, in .venv
#   .venv/bin/ray get-auth-token --generate && chmod 600 ~/.ray/auth_token    # once
#   sbatch cluster/slurm.sh search_spaces/rank_bits.py \
#       runtime.client_gpus=0.5 runtime.server_gpus=0.5
#   squeue --me; tail -f slurm-JOB.log            # the log prints the next line, filled in
#   ssh -N -L 5000:127.0.0.1:5000 FIRST_NODE      # leave running: MLflow on http://127.0.0.1:5000
#   scancel JOB                                   # to end it early
#
# The arguments are those of `python -m fedlpp_ray.tune`. Results go to $FEDLPP_STORAGE (default
# results/sweeps here); the same command goes on where an ended or preempted job stopped, and Slurm
# itself starts a preempted one again (--requeue). After the job, from the same folder:
#   .venv/bin/mlflow ui --backend-store-uri sqlite:///$PWD/results/mlflow/mlflow.db --host 127.0.0.1
#
# Change the numbers below, or give them to sbatch, which wins. --exclusive is not optional: MLflow
# and the dashboard listen on the node's loopback, where other users of the node would find them.
#SBATCH --job-name=fedlpp-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# So long before the end of the job its script is told, and stores MLflow's database.
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch cluster/slurm.sh search_spaces/rank_bits.py [key=value ...]" >&2
    exit 2
fi
: "${SLURM_JOB_ID:?this script is for sbatch}"
ROOT=${SLURM_SUBMIT_DIR:-$PWD}
BIN=${FEDLPP_BIN:-$ROOT/.venv/bin}
STORAGE=${FEDLPP_STORAGE:-$ROOT/results/sweeps}
STORE=$ROOT/results/mlflow
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token MLFLOW_DISABLE_TELEMETRY=true
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    echo "no token: run '$BIN/ray get-auth-token --generate' first" >&2
    exit 2
fi
chmod 600 "$RAY_AUTH_TOKEN_PATH"
cd "$ROOT"
mkdir -p "$STORAGE" "$STORE/artifacts"

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
FIRST=${NODES[0]}
HEAD_IP=$(srun --nodes=1 --ntasks=1 --nodelist="$FIRST" hostname --ip-address | awk '{print $1}')
ADDRESS=$HEAD_IP:6379
CPUS=${SLURM_CPUS_PER_TASK:-1} GPUS=${SLURM_GPUS_ON_NODE:-0}
# SQLite wants a disk of its own: the database is on this node's while the job runs.
LOCAL=$(mktemp -d "${TMPDIR:-/tmp}/fedlpp-mlflow.XXXXXX")
MLFLOW='' STEPS=()

finish() {
    trap - EXIT TERM INT
    kill "${STEPS[@]}" 2>/dev/null || true
    if [ -n "$MLFLOW" ]; then
        kill "$MLFLOW" 2>/dev/null || true
        wait "$MLFLOW" 2>/dev/null || true
    fi
    if [ -f "$LOCAL/mlflow.db" ]; then
        cp "$LOCAL"/mlflow.db* "$STORE/.new/" && mv "$STORE"/.new/* "$STORE/"
    fi
    rm -rf "$LOCAL" "$STORE/.new"
}
mkdir -p "$STORE/.new"
trap finish EXIT
trap 'exit 143' TERM INT

# A step of its own on some of the nodes; it ends with this script.
on() {
    local nodes=$1
    shift
    srun --overlap --nodelist="$nodes" --nodes="$(tr , '\n' <<<"$nodes" | wc -l)" \
        --ntasks-per-node=1 "$@" &
    STEPS+=($!)
}

# Wait until a command succeeds, three minutes at most.
until_ready() {
    local what=$1 tries=36
    shift
    until "$@" >/dev/null 2>&1; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || { echo "$what: no answer" >&2; exit 1; }
        sleep 5
    done
}

on "$FIRST" "$BIN/ray" start --head --block --node-ip-address="$HEAD_IP" --port=6379 \
    --dashboard-host=127.0.0.1 --disable-usage-stats --num-cpus="$CPUS" --num-gpus="$GPUS"
until_ready "the head of Ray" "$BIN/ray" status --address="$ADDRESS"
if [ "${#NODES[@]}" -gt 1 ]; then
    REST=$(IFS=,; echo "${NODES[*]:1}")
    on "$REST" "$BIN/ray" start --block --address="$ADDRESS" --num-cpus="$CPUS" --num-gpus="$GPUS"
    # A sweep that starts before they are there is refused for want of room.
    until_ready "${#NODES[@]} nodes of Ray" "$BIN/python" -c "import ray
ray.init(address='$ADDRESS', log_to_driver=False)
raise SystemExit(sum(node['Alive'] for node in ray.nodes()) < ${#NODES[@]})"
fi

# This script runs on the first node, so MLflow and the sweep's driver share its loopback.
cp "$STORE"/mlflow.db* "$LOCAL/" 2>/dev/null || true
"$BIN/mlflow" server --host 127.0.0.1 --port 5000 --workers 1 \
    --backend-store-uri "sqlite:///$LOCAL/mlflow.db" --artifacts-destination "$STORE/artifacts" &
MLFLOW=$!
until_ready MLflow "$BIN/python" -c \
    'import urllib.request; urllib.request.urlopen("http://127.0.0.1:5000/health", timeout=5)'
echo "MLflow: ssh -N -L 5000:127.0.0.1:5000 $FIRST, then http://127.0.0.1:5000"

# In the background, so that the script hears Slurm's signal while it waits.
RAY_ADDRESS=$ADDRESS "$BIN/python" -m fedlpp_ray.tune "$@" \
    --storage "$STORAGE" --tracking-uri http://127.0.0.1:5000 &
STEPS+=($!)
wait $!
