"""rot: flipped bits, zeroed pages and cuts in the newest bundle."""
import io
import random
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

from keepgpt import checkpoint
from keepgpt.checkpoint import Disk
from tools.crash.common import KEEP, PAGE, Part, newest, real_bundles, state, state_at


def damaged(raw: bytes, edges: list[int], case: int, dice: random.Random) -> tuple[bytes, str]:
    """A file's content when it has rotted, and how."""
    kind, turn = case % 3, case // 3
    if kind == 0:
        bits, made = dice.sample(range(8 * len(raw)), dice.choice((1, 1, 2, 3))), bytearray(raw)
        for bit in bits:
            made[bit // 8] ^= 1 << bit % 8
        return bytes(made), ", ".join(f"bit {bit % 8} of byte {bit // 8} flipped" for bit in bits)
    if kind == 1:
        page = dice.choice([i for i in range(0, len(raw), PAGE) if any(raw[i:i + PAGE])])
        zeros = bytes(len(raw[page:page + PAGE]))
        return raw[:page] + zeros + raw[page + PAGE:], f"page at byte {page} zeroed"
    at = edges[turn] if turn < len(edges) else dice.randrange(len(raw))
    return raw[:at], f"cut to {at} bytes"


def rot(part: Part, place: Path) -> int:
    """The newest bundle is damaged: it must be refused, and the one before it taken."""
    older, newer = real_bundles(place)[-2:]
    folder, path = place / "rot", place / "rot" / "ckpt.pt"
    folder.mkdir()
    checkpoint.commit(older, folder, KEEP, True, Disk())
    checkpoint.commit(newer, folder, KEEP, True, Disk())  # best.pt is it, too: no way out
    raw, sound = path.read_bytes(), state(older)
    part.count(-1, "a sound bundle is not taken" * (newest(folder) != state(newer)), 0)
    with zipfile.ZipFile(path) as file:
        edges = [record.header_offset for record in file.infolist()] + [file.start_dir, len(raw)]
    around = sorted({at + d for at in edges for d in (-1, 0, 1)} & set(range(len(raw))))
    for case in part.choose([False] * (part.settings.cases or 500), few=500):
        content, how = damaged(raw, around, case, part.dice(case))
        path.write_bytes(content)  # in place: its other name, the numbered one, rots with it
        with redirect_stderr(io.StringIO()):
            problem = "it is not refused" * (state_at(path, {}) != "damaged")
            problem = problem or "the older one is not taken" * (newest(folder) != sound)
        part.count(case, problem and f"{how}, of {len(raw)}: {problem}")
    return part.end(f"damages to a bundle of {len(raw):,} bytes and {len(edges) - 2} records")
