# The loss of OpenAI's gpt2-medium on data/openwebtext, without training.
init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500  # use more windows for a closer estimate
