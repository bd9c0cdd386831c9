#!/usr/bin/env bash
# One attempt at a run, inside an allocation: prorl_1node.sh and prorl_4node.sh run `job.sh CONFIG [key=value ...]`.
# It starts one trainer rank for every task of the allocation, hands the warning before the time limit on to them, and
# when they have ended lets the job begin again, or end. docs/slurm.md says more, and has the exit codes.
#
# Variables, all optional, from the shell that submits (sbatch passes its environment on) or from PRORL_SETUP:
#   PRORL_SETUP            shell file to source first: module load ..., export NCCL_SOCKET_IFNAME=..., HF_HOME=...
#   PRORL_VENV             virtual environment at the same path on all nodes (default .venv)
#   PRORL_CONTAINER        image for pyxis instead of a virtual environment, such as /images/prorl.sqsh
#   PRORL_MOUNTS           its --container-mounts (default: the folder of submission, at the same path)
#   PRORL_LOGS             folder for the logs of the ranks (default slurm-logs)
#   PRORL_CHAIN            a name for jobs that follow each other instead of beginning again (docs/slurm.md)
#   PRORL_LEAVE_SECONDS    what the ranks have to leave in after the warning; see --signal (default 540)
#   MASTER_ADDR, MASTER_PORT   where the ranks meet (default: the first node, a port of the job's own)
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 2
[ -z "${PRORL_SETUP:-}" ] || source "$PRORL_SETUP" || exit 2

[ $# -ge 1 ] || { echo "job.sh: give a configuration" >&2; exit 2; }
if [ -n "${PRORL_CONTAINER:-}" ]; then
    container=(--container-image="$PRORL_CONTAINER" --container-mounts="${PRORL_MOUNTS:-$PWD:$PWD}"
               --container-workdir="$PWD")
    python=(python3)
    here=(srun --nodes=1 --ntasks=1 --overlap "${container[@]}")  # this shell is outside of the container
else
    container=()
    python=("${PRORL_VENV:-.venv}/bin/python")
    here=()
    [ -x "${python[0]}" ] || { echo "job.sh: no ${python[0]}: set PRORL_VENV or PRORL_CONTAINER" >&2; exit 2; }
fi

export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
attempt=${SLURM_RESTART_COUNT:-0}
logs=${PRORL_LOGS:-slurm-logs}/$SLURM_JOB_ID/attempt-$attempt
mkdir -p "$logs" || exit 2
echo "$(date '+%F %T') attempt $attempt of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, logs in $logs"

# Whether there is anything to do: a chain is over when one of its jobs had the last word.
"${here[@]}" "${python[@]}" -m megatron_prorl.launch.attempts begin "$@"
verdict=$?
[ "$verdict" -eq 75 ] || exit "$verdict"

# Every task is a rank: Slurm's numbers are torch's. A rank that ends leaves the others 60 s, in which those that are
# well leave too. No CPU binding, because a node's engines and verifiers are children of its first rank.
# shellcheck disable=SC2016  # the variables are the tasks' own
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=none --output="$logs/rank-%t.log" "${container[@]}" \
    bash -c "$as_rank" rank "${python[@]}" -m megatron_prorl.cli train "$@" &
ranks=$!

# The warning reaches this shell alone (--signal=B:USR1@...), and srun passes it on. Ranks that have not left by
# PRORL_LEAVE_SECONDS are ended, so that there is time left to begin again: what was saved before is sound.
warned() {
    echo "$(date '+%F %T') warned: the ranks save the last step and leave"
    kill -USR1 "$ranks"
    (sleep "${PRORL_LEAVE_SECONDS:-540}" && kill -TERM "$ranks") 2>/dev/null &
}
trap warned USR1
until wait "$ranks"; code=$?; ! kill -0 "$ranks" 2>/dev/null; do :; done  # `wait` returns for the warning, too
trap '' USR1

"${here[@]}" "${python[@]}" -m megatron_prorl.launch.attempts end "$code" "$@"
verdict=$?
if [ "$verdict" -eq 75 ] && [ -z "${PRORL_CHAIN:-}" ]; then
    # The same job in the same queue, again from its last checkpoint. Slurm ends this shell for it. A controller that is
    # busy or restarted does not answer, which must not end a run of weeks.
    for _ in {1..15}; do scontrol requeue "$SLURM_JOB_ID" && sleep 600; sleep 20; done
fi
exit "$verdict"
