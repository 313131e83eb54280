# From GPT-2 XL's weights to Shakespeare, in BPE tokens:
# python prepare.py shakespeare && python train.py config/finetune_shakespeare.py
import time

out_dir = "out-shakespeare"
init_from = "gpt2-xl"  # 6 GB; gpt2 is the smallest
dataset = "shakespeare"

eval_interval = 5
eval_iters = 40

# 32 sequences of 1024 tokens a step: 32,768 tokens
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # low and constant: the weights are good already
decay_lr = False

wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())
