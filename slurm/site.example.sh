# Copy to slurm/site.sh (which git ignores) and keep what your cluster needs. train.sbatch reads it in every job.

# module load cuda/13.2
# . /path/to/venv/bin/activate
# export NCCL_SOCKET_IFNAME=ib0
# export WANDB_MODE=offline
