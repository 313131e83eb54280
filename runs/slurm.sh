#!/usr/bin/env bash
#SBATCH --job-name=keepgpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# A run of any length on a queue that ends jobs after hours: two minutes before the end the run
# saves, and the job queues itself again. From the repository, with the environment active:
#
#   sbatch runs/slurm.sh config/train_gpt2.py --out_dir=/shared/run1
#   sbatch runs/slurm.sh config/finetune_shakespeare.py --init_from=auto:gpt2-xl
#
# A preempted job gets SIGTERM from Slurm itself and is queued again by it.
set -u
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun takes 1 core unless it is told
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds that torchrun gives its ranks to save
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else torch 2.13 hangs when a node comes back
host=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
leave=""
# to the job's steps, not to srun, which would kill them at once
trap 'leave=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 USR2 XCPU

# torchrun would die of a signal that reaches the whole step (--signal without B:); its ranks save
srun env --ignore-signal=USR1,USR2,XCPU torchrun \
    --nnodes="${SLURM_NNODES:-1}" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="$host:$((20000 + SLURM_JOB_ID % 10000))" --max-restarts=3 \
    train.py --init_from=auto "$@" &
run=$!
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do  # the signal has ended the wait, not the run
    wait "$run"
    code=$?
done
[ -n "$leave" ] && [ $code -ne 0 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit $code
