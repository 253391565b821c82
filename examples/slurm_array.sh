#!/usr/bin/env bash
# Builds one dataset on many nodes: each task of the array builds one part, the last one commits.
#
#   sbatch examples/slurm_array.sh                   # all parts
#   python -m preprocess status "$OUT"               # how far they are, and which are to be started
#   sbatch --array=3,7 examples/slurm_array.sh       # parts that died, again: they resume
#
# docs/many-machines.md says how many parts to take, and what may be shared how.

#SBATCH --job-name=vlm-shards
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

set -euo pipefail

# Into how many parts the dataset is divided: the length of the whole array. It stays the same when
# some parts are run again.
PARTS=16

# All nodes must see the three of them, under these names.
SOURCE=${SOURCE:-/shared/pixmo-cap}
OUT=${OUT:-/shared/shards/pixmo_cap}
CACHE=${CACHE:-/shared/cache/vlm-shards}

# exec: the job's signals reach the program itself, which then lets go of its part at once.
exec python -m preprocess shards pixmo_cap \
  --source "$SOURCE" \
  --out "$OUT" \
  --cache "$CACHE" \
  --workers "$SLURM_CPUS_PER_TASK" \
  --part "$SLURM_ARRAY_TASK_ID/$PARTS"
