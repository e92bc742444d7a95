#!/usr/bin/env bash
#SBATCH --job-name=rbm-dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=rbm-dist-%j.log
#
# Run the pipeline on the nodes of one Slurm job, in a Ray cluster that lives as long as the job:
#   sbatch --nodes=4 --gpus-per-node=2 launch/slurm.sh CONFIG [KEY=VALUE ...]
# run_dir and the input must lie on a file system that every node mounts. rbm-dist must be on the PATH of all nodes.
# The exit code is that of the run. When time ran out or a node was lost: the same sbatch again, and it goes on.
set -euo pipefail

start_timeout_s=${START_TIMEOUT_S:-300} # for Ray to start on the first node, and then on the others
head=$(hostname)                        # this script runs on the first node
port=$((20000 + SLURM_JOB_ID % 10000))
address=$head:$port

# Only who has the token can use the cluster; srun hands the environment on to the other nodes.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

fail() {
    echo "error: $*" >&2
    exit 1
}

