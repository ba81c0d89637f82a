"""Remakes the pictures in docs/ from small real runs: about 15 minutes on two CPU cores.

    python scripts/docs_pictures.py                 all that can be made
    python scripts/docs_pictures.py --keep FOLDER   keep the runs in a folder; runs that it has already are not repeated

The runs are those of README.md and docs/own-images.md: the script reads the commands from the pages. Two need data
in data_dir (METACV_DATA_DIR): docs/own-images.md needs Omniglot, and the evaluation with class names needs CIFAR-100.
Without them their pictures stay as they are. Pictures of pages (report.png, tensorboard.png) need Chromium.
"""

import argparse
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OWN_IMAGES = ROOT / "outputs/reference/own_images"
DATA = Path(os.environ.get("METACV_DATA_DIR", "~/.cache/metacv")).expanduser()
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

SETTINGS = 250  # width in pixels of TensorBoard's panel of settings, which is cut off
NAMES = "metacv evaluate checkpoint=cifar_fs/classifier_5w1s episodes=600 hydra.run.dir=names"

# The images of docs/own-images.md: ten characters from each of six alphabets, and three from each of two others.
PHOTOS = ["Angelic", "Gurmukhi", "Kannada", "Keble", "Malayalam", "Tibetan"]
NEW = {"Sylheti": [1, 5, 9], "Tengwar": [1, 5, 9]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder of the runs; default: a temporary one")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        work = keep.absolute() if keep else Path(temporary)
        glyphs(work / "glyphs")
        if (DATA / "omniglot/images_evaluation").is_dir():
            own_images(work / "own_images")
        else:
            print("own images: skipped, no Omniglot in data_dir")
        if (DATA / "cifar-100-python").exists():
            run(NAMES, work / "names")
            copy(work / "names/names", "confusion.png", "embedding.png")
        else:
            print("names of classes: skipped, no CIFAR-100 in data_dir")


def glyphs(folder: Path) -> None:
    """The first run of the README: an episode, curves, and TensorBoard."""
    run(commands(ROOT / "README.md", "First steps"), folder)
    last_episode(folder / "runs/maml").save(DOCS / "episode.png")
    copy(folder / "runs/maml", "results.png")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", port, "--load_fast=false"]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(int(port))
        tags = "tagFilter=%28train%7Cval%29%2F%28loss%7Caccuracy%7Cepisode%29&smoothing=0"
        picture = DOCS / "tensorboard.png"
        with slowly(f"http://localhost:{port}/?{tags}#timeseries") as address:
            screenshot(address, picture, height=1050, width=1310 + SETTINGS)
        if BROWSER:
            Image.open(picture).crop((0, 0, 1310, 1030)).save(picture)
    finally:
        server.terminate()
        server.wait()


def own_images(folder: Path) -> None:
    """The example of docs/own-images.md: its images, its commands, its results and pictures."""
    images = DATA / "omniglot/images_evaluation"
    for alphabet in PHOTOS:
        for character in sorted((images / alphabet).iterdir())[:10]:
            shutil.copytree(character, folder / f"photos/{alphabet}_{character.name}", dirs_exist_ok=True)
    for alphabet, numbers in NEW.items():
        for number in numbers:
            name = f"{alphabet}_character{number:02}"
            files = sorted((images / alphabet / f"character{number:02}").iterdir())
            for part, chosen in (("examples", files[:3]), ("new", files[10:])):
                (folder / part / name).mkdir(parents=True, exist_ok=True)
                for file in chosen:
                    shutil.copy(file, folder / part / name)
    (folder / "new/Sylheti_character01/notes.txt").write_text("not an image\n")
    run(commands(DOCS / "own-images.md", "An example from folders to labels"), folder)
    kept = {
        "runs/plain/result.json": "plain.json",
        "runs/rotated/result.json": "rotated.json",
        "comparison/result.json": "comparison.json",
        "labels/predictions.json": "predictions.json",
        "report/report.md": "report.md",
    }
    for made, name in kept.items():
        shutil.copy(folder / made, OWN_IMAGES / name)
    copy(folder / "labels", "predictions.png")
    screenshot((folder / "report/report.html").as_uri(), DOCS / "report.png", height=900)


def commands(page: Path, section: str) -> str:
    """The shell commands of a section of a page."""
    text = page.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))


def run(commands: str, folder: Path) -> None:
    """Run shell commands in a folder, unless they were run there to the end, and keep what they print in output.txt."""
    done, output = folder / "done", folder / "output.txt"
    if done.exists() and done.read_text() == commands:
        return
    folder.mkdir(parents=True, exist_ok=True)
    script = f'set -e\nmetacv() {{ echo "$ metacv $*"; "{sys.executable}" -m metacv "$@"; }}\n{commands}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with output.open("w") as file:
        subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=True, stdout=file, stderr=file)
    done.write_text(commands)


def last_episode(folder: Path) -> Image.Image:
    """The newest episode of validation among the pictures that a run wrote for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"images": 0})
    events.Reload()
    return Image.open(io.BytesIO(events.Images("val/episode")[-1].encoded_image_string))


def copy(folder: Path, *names: str) -> None:
    for name in names:
        if (folder / name).exists():
            shutil.copy(folder / name, DOCS / name)
        else:
            print(f"{name}: not in {folder}")


def wait_for(port: int) -> None:
    """Wait until something listens there, at most a minute."""
    for _ in range(60):
        with socket.socket() as connection:
            if connection.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(1)


@contextmanager
def slowly(address: str, seconds: int = 20) -> Iterator[str]:
    """The address of a page that shows another one, and counts as loaded only when that one had time to draw."""
    frame = f'<iframe src="{address}" style="position:fixed;inset:0;width:100%;height:100%;border:0"></iframe>'

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/wait":
                time.sleep(seconds)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f'<body>{frame}<img src="/wait">'.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("localhost", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def screenshot(address: str, path: Path, height: int, width: int = 1280) -> None:
    """A picture of a page, cut off below `height` pixels."""
    if BROWSER is None:
        return print(f"{path.name}: skipped, no Chromium")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command = [BROWSER, *options, f"--window-size={width},{height}", f"--screenshot={path}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


if __name__ == "__main__":
    main()
