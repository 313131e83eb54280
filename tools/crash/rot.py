"""rot: flipped bits, zeroed pages and cuts in the newest checkpoint."""
import io
import random
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

from keepgpt import checkpoint
from keepgpt.checkpoint import Disk
from tools import runs
from tools.crash.common import KEEP, PAGE, Part, make_bundles


def corrupt(raw: bytes, edges: list[int], case: int, rng: random.Random) -> tuple[bytes, str]:
    """Return a file's content with a fault, and its description. Cuts are at `edges` first."""
    kind, number = case % 3, case // 3
    if kind == 0:
        bits, changed = rng.sample(range(8 * len(raw)), rng.choice((1, 1, 2, 3))), bytearray(raw)
        for bit in bits:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed), f"bits {bits} flipped"
    if kind == 1:
        page = rng.choice([i for i in range(0, len(raw), PAGE) if any(raw[i:i + PAGE])])
        zeros = bytes(len(raw[page:page + PAGE]))
        return raw[:page] + zeros + raw[page + PAGE:], f"page at byte {page} zeroed"
    end = edges[number] if number < len(edges) else rng.randrange(len(raw))
    return raw[:end], f"cut to {end} bytes"


def rot(part: Part, place: Path) -> str:
    """Corrupt the newest checkpoint: it must be rejected, and the one before it used."""
    older, newer = make_bundles(part, place)[-2:]
    folder, path = place / "rot", place / "rot" / "ckpt.pt"
    folder.mkdir()
    for bundle in (older, newer):
        checkpoint.commit(bundle, folder, KEEP, True, Disk())  # also as best.pt
    raw, expected = path.read_bytes(), runs.state_of(older)
    if runs.newest_state(folder) != runs.state_of(newer):
        part.count(-1, "an intact checkpoint is not used", 0)
    with zipfile.ZipFile(path) as file:
        edges = [record.header_offset for record in file.infolist()] + [file.start_dir, len(raw)]
    around = sorted({at + d for at in edges for d in (-1, 0, 1)} & set(range(len(raw))))
    for case in part.choose([False] * (part.config.cases or 500), few=500):
        content, how = corrupt(raw, around, case, part.rng(case))
        path.write_bytes(content)  # in place: the numbered checkpoint is the same file
        with redirect_stderr(io.StringIO()):
            states = runs.read_state(path), runs.newest_state(folder)
        problem = "" if states == ("corrupt", expected) else "it is used, or the older one is not"
        part.count(case, problem and f"{how}, of {len(raw)}: {problem}")
    return f"faults in a checkpoint of {len(raw):,} bytes and {len(edges) - 2} records"
