"""tools.export that gets the signal $NUMBER before it renames its files."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import export

write = export.write_hugging_face


def write_and_die(*args):
    write(*args)
    os.kill(os.getpid(), int(os.environ["NUMBER"]))


export.write_hugging_face = write_and_die
export.run_tool(export.ExportConfig, "", export.main)
