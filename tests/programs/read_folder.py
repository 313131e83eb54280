"""What Transformers makes of a folder: FOLDER WORK.json RESULT.pt."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, work_file, result = sys.argv[1:]
with open(work_file) as file:
    work = json.load(file)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
ids = [tokenizer(text)["input_ids"] for text in work["texts"]]
prompt = tokenizer(work["prompt"], return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
answer = {
    "ids": ids,
    "back": [tokenizer.decode(row) for row in ids],
    "made": made,
    "continued": tokenizer.decode(made),
    "logits": model(torch.tensor([work["ids"]])).logits[0],
    "eot": tokenizer.eos_token_id,
}
torch.save(answer, result)
