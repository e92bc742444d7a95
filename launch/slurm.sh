#!/usr/bin/env bash
#SBATCH --job-name=rbm-dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=rbm-dist-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#
# Run the pipeline on the nodes of a Slurm job, in a Ray cluster that lives as long as the job:
#   sbatch --nodes=4 --gpus-per-node=2 launch/slurm.sh CONFIG [KEY=VALUE ...]
# run_dir and the input must lie on a file system that all nodes mount; rbm-dist must be on the PATH of all nodes.
# The job's exit code is that of the run. Two minutes before the time limit Slurm tells this script, and so the run, which
# saves and ends with 143 (now: scancel --batch --signal=TERM JOB); the same sbatch again, and it goes on. A job that
# lost a node, or was preempted, is queued again by Slurm.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

command -v rbm-dist >/dev/null || fail "rbm-dist is not on the PATH; submit from the environment it is installed in"
start_timeout_s=300
# Slurm runs this script on the first node. An address and not a name: not all of Ray looks names up in /etc/hosts.
head=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
port=$((20000 + SLURM_JOB_ID % 10000))
logs=rbm-dist-$SLURM_JOB_ID-ray

# Only who has the token can use the cluster; srun hands the environment on to the other nodes.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# By default Ray closes a connection of which it hears nothing for 20 s.
export RAY_grpc_keepalive_timeout_ms=45000 RAY_health_check_timeout_ms=5000
export COLUMNS=120 # the log has no terminal whose width it could ask for

steps=() # the srun of the first node, and that of the others
run=
trap 'kill "${steps[@]}" $run 2>/dev/null || true' EXIT
# Slurm's signal comes to this script alone. Without a run there is nothing to save.
trap 'terminated=1; if [[ $run ]]; then kill "$run" 2>/dev/null || true; else exit 143; fi' TERM
terminated=

# start_ray COUNT SRUN_OPTION RAY_OPTION...: Ray on COUNT nodes, one process each, until it is killed.
start_ray() {
    local count=$1 which=$2
    shift 2
    srun --quiet --nodes="$count" --ntasks="$count" "$which" \
        --cpu-bind=none --kill-on-bad-exit=1 --output="$logs-%N.log" \
        ray start --block --num-cpus="$SLURM_CPUS_ON_NODE" "$@" &
    steps+=($!)
}

# Fails if Ray has ended on any node: the run would wait in vain for what it needs.
check_ray() {
    local step
    for step in "${steps[@]}"; do
        kill -0 "$step" 2>/dev/null || fail "Ray ended on a node; see $logs-*.log"
    done
}

start_ray 1 --nodelist="$SLURMD_NODENAME" --head --port="$port" --include-dashboard=false
until (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do
    check_ray
    ((SECONDS < start_timeout_s)) || fail "Ray did not start on $head within $start_timeout_s s; see $logs-*.log"
    sleep 1
done
if ((SLURM_JOB_NUM_NODES > 1)); then
    start_ray $((SLURM_JOB_NUM_NODES - 1)) --exclude="$SLURMD_NODENAME" --address="$head:$port"
fi

# The run has a deadline of its own for nodes that are slow to join: cluster.start_timeout_s.
rbm-dist run "$@" --address "$head:$port" &
run=$!
while kill -0 "$run" 2>/dev/null; do
    # A run that was told to end is not cut short: without Ray it gives up by itself.
    [[ $terminated ]] || check_ray
    sleep 2 &
    wait $! || true # unlike sleep itself, it does not keep a signal waiting
done
wait "$run"
