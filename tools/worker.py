"""Call the pickled function on stdin and print its result as JSON, for tools.measure."""

import json
import pickle
import sys

from keepgpt.signals import die_with_parent

if __name__ == "__main__":
    # an interrupted tool leaves nothing running
    die_with_parent()
    work = pickle.load(sys.stdin.buffer)
    print(json.dumps(work()))
