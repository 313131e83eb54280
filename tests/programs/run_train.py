"""Run a train.py that is broken or slow: import this module, change something, call `run_train`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from keepgpt.config import TrainConfig, parse


def run_train() -> None:
    """Train with the flags of the command line and exit."""
    config, overrides, _ = parse(TrainConfig, "", sys.argv[1:])
    sys.exit(train.main(config, overrides))
