# Read by a job's script before it starts its processes: puts the job into the queue again if one of them was killed.
#
# SLURM does so by itself for a node that fails, and not for a process that does: one that the kernel kills for memory,
# or that a broken device or NCCL's time-out aborts. Its next start goes on from the last checkpoint. A job that dies
# three times without having got further, as one does that lacks memory, is left to you; so is one that ends by an error
# of its own (a status up to 128), which it would only meet again. SLURM has a requeued job wait for two minutes; where
# a site has made that shorter than 70 s (cred_expire), a signal to the old start may meet the next one, which then saves
# its state and is requeued once more.

job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}"
job="${job:-$SLURM_JOB_ID}"

# The training writes the step there that it goes on from; into .ended each process its status, the first one first; and
# .lost is there if another process had found one silent.
export LDM_START_FILE="${LDM_RUNS:-runs}/.starts/$job"
mkdir -p "${LDM_START_FILE%/*}"
rm -f "$LDM_START_FILE" "$LDM_START_FILE.ended" "$LDM_START_FILE.lost"

# Not cancelled, and not in the queue already. At its time limit a job is COMPLETING, as a cancelled one is, but for the
# reason.
may_start_again() {
    scontrol show --oneliner job "$job" | grep -qE " JobState=(RUNNING|COMPLETING Reason=TimeLimit) "
}

again_after() {
    # The first that ended is the reason: SLURM kills the others for it.
    if [ -s "$LDM_START_FILE.ended" ] && [ ! -e "$LDM_START_FILE.lost" ]; then
        set -- "$(head -n 1 "$LDM_START_FILE.ended")"
    fi
    # 128 + USR1, USR2, TERM: the run was told to go, and has seen to the rest itself, unless its time was up first.
    case $1 in 138 | 140 | 143)
        scontrol show --oneliner job "$job" | grep -q " JobState=COMPLETING Reason=TimeLimit " || return
        ;;
    esac
    case $1 in [0-9] | [0-9][0-9] | 1[01]? | 12[0-8] | 130) return ;; esac
    may_start_again || return
    local step
    step=$(cat "$LDM_START_FILE" 2>/dev/null || echo "before the first")
    echo "$step" >>"$LDM_START_FILE.deaths"
    if [ "$(tail -n 3 "$LDM_START_FILE.deaths" | grep -cxF "$step")" = 3 ]; then
        echo "job $job: a process died with status $1, as in the two starts before, and all three began at step $step;" \
            "allowed are three deaths without a checkpoint between them; see above what ended it, and submit it again" >&2
        return
    fi
    echo "job $job: a process died with status $1 in a start from step $step; the job goes into the queue again" >&2
    scontrol requeue "$job"
}

# The script outlives its processes, which get these too.
trap : USR1 USR2 TERM
trap 'status=$?; again_after $status || true; exit $status' EXIT
