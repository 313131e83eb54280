"""train.py that appends what each update reads to the file $RECORD. The losses of the batches
$POISONED are NaN, and those of the steps $FLAKY at the first attempt."""

import json
import os

from run_train import run_train, train

poisoned = json.loads(os.environ["POISONED"])
flaky = json.loads(os.environ["FLAKY"])
compute_gradient = train.compute_gradient
get_batch = train.Loader.get_batch
attempts = []


def get_batch_and_record(self, batch, m):
    x, y = get_batch(self, batch, m)
    attempts[-1]["read"].append(x.tolist())
    return x, y


def compute_gradient_and_record(run):
    step = run.state.step + 1
    batch = run.state.next_batch
    attempts.append({"step": step, "batch": batch, "read": []})
    losses = compute_gradient(run)
    if batch in poisoned:
        losses += float("nan")
    if step in flaky:
        flaky.remove(step)
        losses += float("nan")
    # at once: run_train ends the process
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(attempts[-1]) + "\n")
    return losses


train.Loader.get_batch = get_batch_and_record
train.compute_gradient = compute_gradient_and_record
run_train()
