"""Pictures of runs, as PNG.

    python -m tools.plot out [out2 ...]   the curves of one run, or of several in one picture
    python -m tools.plot pieces           what each piece of a checkpoint is for; takes minutes
"""
import sys
from pathlib import Path

from keepgpt.config import parse
from keepgpt.process import fail, prepare_process
from tools.plot.curves import CurvesConfig, draw, read_run

USAGE = "python -m tools.plot FOLDER ... | pieces [--key=value ...]"


def check_target(path: Path) -> None:
    """End the program unless the picture can be written there; minutes of training may come
    first."""
    if path.suffix.lower() != ".png":
        fail(f"--to={path}: the picture is a PNG; give a name that ends in .png")
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as e:
        fail(f"--to={path} can't be written: {e.strerror.lower()}")


def main(argv: list[str]) -> None:
    """Draw what is asked for, and print where it is."""
    words = [word for word in argv if not word.startswith("-")]
    settings = CurvesConfig
    if words == ["pieces"]:
        prepare_process()  # before torch is loaded
        from tools.plot import pieces
        settings = pieces.PiecesConfig
    config, _, folders = parse(settings, USAGE, argv)
    if not folders:
        fail("name the out_dir of a run, or of several; or: pieces")
    try:
        import matplotlib
    except ImportError:
        fail("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")  # it needs no display
    check_target(Path(config.to))
    figure = (pieces.draw(config) if settings is not CurvesConfig
              else draw([read_run(folder) for folder in folders], config.x))
    try:
        figure.savefig(config.to)
    except OSError as e:
        fail(f"--to={config.to} can't be written: {e.strerror.lower()}")
    print(config.to)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
