"""What Transformers makes of folders. A line of stdin is FOLDER, WORK.json and RESULT.pt with tabs
between them; a line of stdout says that the result is written."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(folder, work):
    """Return ids, texts, a continuation and logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = [tokenizer(text)["input_ids"] for text in work["texts"]]
    prompt = tokenizer(work["prompt"], return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    return {
        "ids": ids,
        "back": [tokenizer.decode(row) for row in ids],
        "made": made,
        "continued": tokenizer.decode(made),
        "logits": model(torch.tensor([work["ids"]])).logits[0],
        "eot": tokenizer.eos_token_id,
    }


# one import for all folders: it takes seconds
for line in sys.stdin:
    folder, work_file, result = line.rstrip("\n").split("\t")
    with open(work_file) as file:
        work = json.load(file)
    torch.save(read(folder, work), result)
    print("done", flush=True)
