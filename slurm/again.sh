# Read by a job's script before it starts its processes: puts the job into the queue again if one of them was killed.
#
# SLURM does so by itself for a node that fails, and not for a process that does: one that the kernel kills for memory,
# that a broken device aborts, or that has waited for another in vain. Its next start goes on from the last checkpoint.
# A job that dies three times without having got further, as one does that lacks memory, is left to you; so is one that
# ends by an error of its own (a status up to 128), which it would only meet again, and one that wants a single start
# (`callbacks.preemption.requeue=false`). SLURM has a requeued job wait for two minutes; where a site has made that
# shorter than 70 s (cred_expire), a signal to the old start may meet the next one, which then saves its state and is
# requeued once more.

job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}"
job="${job:-$SLURM_JOB_ID}"

# Beside this file, in which the training writes the step that it goes on from, and a tool how much it has finished,
#     .ended   has the status and the rank of each process that failed, the first one first
#     .lost    the ranks that another one found silent, or `time-out` if one has waited in vain
#     .once    is there if the training wants no other start
#     .deaths  has what this file held when a start died, or was told to go before it had got further
#     .counted is there if this start is among these
placed="${placed:-a start from step}"
export LDM_START_FILE="${LDM_RUNS:-runs}/.starts/$job"
mkdir -p "${LDM_START_FILE%/*}"
for each in "" .ended .lost .once .counted; do rm -f "$LDM_START_FILE$each"; done

# What a task runs: `bash -c "$LDM_TASK" task command ...`. Signals that come while Python is still loading are ignored:
# they would end it.
export LDM_TASK='trap "" USR1 USR2 TERM QUIT; "$@"; status=$?
[ $status = 0 ] || echo "$status ${SLURM_PROCID:-0}" >>"$LDM_START_FILE.ended"; exit $status'

# Not cancelled, and not in the queue already. At its time limit a job is COMPLETING, as a cancelled one is, but for the
# reason.
may_start_again() {
    scontrol show --oneliner job "$job" | grep -qE " JobState=(RUNNING|PREEMPTED|TIMEOUT|COMPLETING Reason=TimeLimit) "
}

# A process was missed, and that is not the one which ended first, by an error.
is_lost() {
    local first
    first=$(head -n 1 "$LDM_START_FILE.ended" 2>/dev/null | cut -d " " -f 2)
    [ -e "$LDM_START_FILE.lost" ] && ! grep -qxF "${first:-none}" "$LDM_START_FILE.lost"
}

again_after() {
    if [ "$1" = 0 ] || [ -e "$LDM_START_FILE.once" ]; then return; fi
    if is_lost; then
        start_again "its processes have lost each other"
        return
    fi
    # The first that ended is the reason: SLURM kills the others for it.
    if [ -s "$LDM_START_FILE.ended" ]; then
        set -- "$(head -n 1 "$LDM_START_FILE.ended" | cut -d " " -f 1)"
    fi
    # 128 + USR1, USR2, TERM: the run was told to go, and has seen to the rest itself, unless its time was up first.
    case $1 in 138 | 140 | 143)
        scontrol show --oneliner job "$job" | grep -q " JobState=COMPLETING Reason=TimeLimit " || return
        ;;
    esac
    case $1 in [0-9] | [0-9][0-9] | 1[01]? | 12[0-8] | 130) return ;; esac
    start_again "a process died with status $1"
}

# Three times at the same place are enough: two starts at least have not got further.
start_again() {
    if [ -n "${asked:-}" ] || ! may_start_again; then return 0; fi
    asked=1
    local place
    place=$(cat "$LDM_START_FILE" 2>/dev/null || echo "before the first")
    [ -e "$LDM_START_FILE.counted" ] || echo "$place" >>"$LDM_START_FILE.deaths"
    if [ "$(tail -n 3 "$LDM_START_FILE.deaths" | grep -cxF "$place")" = 3 ]; then
        echo "job $job: $1 ($placed $place), as in the two starts before; allowed are two without progress; see above" \
            "what ended it, give it more of that (--time, --mem), and submit it again" >&2
        return
    fi
    echo "job $job: $1 ($placed $place); the job goes into the queue again" >&2
    scontrol requeue "$job"
}

# The script outlives its processes, which get these too.
trap : USR1 USR2 TERM
trap 'status=$?; again_after $status || true; exit $status' EXIT
