"""Do the pickled work on stdin and print what it returns as JSON: a process of tools.measure."""
import json
import pickle
import sys

from keepgpt.signals import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    work = pickle.load(sys.stdin.buffer)
    print(json.dumps(work()))
