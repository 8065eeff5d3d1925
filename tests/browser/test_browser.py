"""What a browser shows of our files. Where there is no Chromium, there is nothing to ask."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from core.test_video import COLOURS, of_one_colour
from tpuvid.files.mp4 import save_mp4

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
FLAGS = (
    "--headless", "--no-sandbox", "--no-first-run", "--disable-sync", "--disable-background-networking",
    "--disable-component-update", "--autoplay-policy=no-user-gesture-required", "--force-color-profile=srgb",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
)  # fmt: skip
"""Shaders turn pictures into pixels, as they do wherever there is a GPU. Without (--disable-gpu) Chromium does it by libyuv,
whose coefficients of BT.709 are cut at 2.0: it shows pure blue as 243, whoever has made the video."""
PAGE = """<!doctype html><script>
async function pixel(name) {
  const video = document.createElement('video');
  video.muted = true;
  video.src = name;
  await new Promise((done, fail) => { video.oncanplaythrough = done; video.onerror = () => fail(video.error.message); });
  const canvas = document.createElement('canvas');
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const context = canvas.getContext('2d');
  context.drawImage(video, 0, 0);
  return Array.from(context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data.slice(0, 3));
}
(async () => {
  const found = {};
  for (const name of NAMES) found[name] = await pixel(name).catch(error => String(error));
  await fetch('/found', {method: 'POST', body: JSON.stringify(found)});
})();
</script>"""


def pixels(folder: Path, names: list[str]) -> dict[str, list[int] | str]:
    """The pixel in the middle of each video's first frame, as a page in Chromium reads it off a canvas."""
    (folder / "index.html").write_text(PAGE.replace("NAMES", json.dumps(names)))
    found: dict = {}
    told = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            found.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            told.set()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/index.html"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert told.wait(60), "Chromium said nothing"
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
    return found


def test_chromium_shows_the_colours_of_the_frames(tmp_path):
    sizes = {"small": (64, 64), "hd": (720, 1280)}
    for name in COLOURS:
        for size, (height, width) in sizes.items():
            save_mp4(of_one_colour(name, height, width), tmp_path / f"{name}-{size}.mp4", fps=8, metadata={"prompt": name})
    names = [path.name for path in sorted(tmp_path.glob("*.mp4"))]
    found = pixels(tmp_path, names)
    for name in names:
        print(f"{name}: {COLOURS[name.partition('-')[0]]} shown as {found[name]}")
    far = {name: found[name] for name in names if isinstance(found[name], str)
           or max(abs(a - b) for a, b in zip(found[name], COLOURS[name.partition("-")[0]], strict=True)) > 3}  # fmt: skip
    assert not far
