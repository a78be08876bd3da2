#!/bin/bash
# A pipeline on a SLURM cluster: sbatch clusters/slurm.sh pipeline.yaml s3://bucket/run
#
# Every host of the job has the package installed (.venv below). `ray symmetric-run` starts Ray on all hosts and the
# command on the first, which is the home host. An option that workers do not know would end them with status 0, so no
# option of the head is given to all. After a failure `RESUME=1 sbatch ...` continues the run from the URI on any hosts.
#SBATCH --job-name=posttrain
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail

pipeline=${1:?the YAML of a pipeline}
storage=${2:?a URI for the copy of the run}
install=${POSTTRAIN:-$SLURM_SUBMIT_DIR}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$first" | awk 'NR == 1 {print $1}')
port=$((10000 + SLURM_JOB_ID % 10000))

# The token lies in a file that only this user reads; SLURM must not show it among the variables of the job.
umask 077
mkdir -p "$HOME/.ray"
[ -s "$HOME/.ray/auth_token" ] || head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$HOME/.ray/auth_token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token
export RAY_ADDRESS=$address:$port OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0

run_dir=${RUN_DIR:-/tmp/posttrain-$SLURM_JOB_ID}
command=(run "$pipeline" "storage=$storage")
[ -z "${RESUME:-}" ] || command=(run --resume "$storage")
srun --kill-on-bad-exit=1 "$install/.venv/bin/ray" symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_NNODES" -- \
    "$install/.venv/bin/posttrain" "${command[@]}" --run-dir "$run_dir"
