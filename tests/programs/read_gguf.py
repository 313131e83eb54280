"""What llama.cpp makes of a file, by its server's endpoints: FILE.gguf WORK.json RESULT.json."""

import json
import sys
import urllib.request

import xllamacpp

path, work_file, result = sys.argv[1:]
with open(work_file) as file:
    work = json.load(file)
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx = 64
params.n_parallel = 1
params.warmup = False
server = xllamacpp.Server(params)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(endpoint, **content):
    """Return the server's answer."""
    request = urllib.request.Request(
        server.listening_address + endpoint,
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    return json.load(opener.open(request))


ids = [ask("/tokenize", content=text)["tokens"] for text in work["texts"]]
made = ask(
    "/completion",
    prompt=work["prompt"],
    n_predict=20,
    temperature=0,
    top_k=1,
    ignore_eos=work["ignore_eos"],
    return_tokens=True,
)
answer = {
    "ids": ids,
    "back": [ask("/detokenize", tokens=row)["content"] for row in ids],
    "made": made["tokens"],
    "continued": made["content"],
}
with open(result, "w") as file:
    json.dump(answer, file)
