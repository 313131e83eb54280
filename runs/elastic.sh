#!/usr/bin/env bash
# Stop on four ranks, resume on one, and compare with an uninterrupted run: bit-identical.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # the order of a sum also depends on the threads that share it
run="config/train_plays_cpu.py --elastic=True --gradient_accumulation_steps=4
    --batch_size=3 --eval_interval=300 --sample_tokens=0 --log_interval=50"
rm -rf out-moved out-alone
set -x
python prepare.py plays_char
python -m torch.distributed.run --standalone --nproc_per_node=4 train.py $run --out_dir=out-moved --max_iters=150
python train.py --init_from=resume --out_dir=out-moved --max_iters=300
python train.py $run --out_dir=out-alone --max_iters=300
python -m tools.same out-moved out-alone
