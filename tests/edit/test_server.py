"""What the server of the editor answers, refuses and writes, without a browser."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton import MaskedLossConfig, mask_weights
from masked_loss_triton.cache.cards import read_header
from masked_loss_triton.cli import main
from masked_loss_triton.edit.library import is_drawn
from tests.cache.support import Lab, disc, frames_of, video_lab, weights
from tests.edit.browser import Server, running

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def request(address: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an answer; a body makes it a POST."""
    asked = urllib.request.Request(address, body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def error_of(answer: tuple[int, bytes, dict[str, str]]) -> str:
    text = json.loads(answer[1])["error"]
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("edit"), resolution=(256, 256))
    lab.picture("cat", mask=disc((160, 120)))
    lab.picture("dog", size=(320, 100))
    lab.picture("gone")
    (lab.folder / "secret.txt").write_text("nothing of yours")
    return lab


@pytest.fixture(scope="module")
def server(lab):
    with running("--images", lab.images, "--masks", lab.masks, cwd=lab.folder) as server:
        yield server


def mask_of(server: Server, number: int) -> tuple[np.ndarray, str]:
    status, body, headers = request(f"{server.address}api/mask/{number}")
    assert status == 200
    width, height = map(int, headers["x-size"].split("x"))
    return np.frombuffer(body, np.uint8).reshape(height, width), headers["x-version"]


def save(server: Server, number: int, mask: np.ndarray, version: str, extra: str = ""):
    size = f"width={mask.shape[1]}&height={mask.shape[0]}"
    return request(f"{server.address}api/mask/{number}?{size}&version={version}{extra}", mask.tobytes())


def test_only_the_printed_address_opens(server):
    port = urlsplit(server.address).port
    assert request(server.address)[0] == 200
    for path in ("", "api/items", "wrong/api/items", "static/main.js"):
        answer = request(f"http://127.0.0.1:{port}/{path}")
        assert answer[0] == 404
        assert "address that masked-loss edit printed" in error_of(answer)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:80", "Origin": "http://evil.example:80"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "localhost:9999"}, 200),  # the other end of a tunnel
        ({"Host": "localhost:9999", "Origin": "http://localhost:9999", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_pages_and_hosts_are_refused(server, headers, status):
    answer = request(f"{server.address}api/items", **headers)
    assert answer[0] == status
    assert status == 200 or error_of(answer)


@pytest.mark.parametrize(
    "path",
    [
        "static/../../library.py",
        "static/%2e%2e/%2e%2e/secret.txt",
        "static//etc/passwd",
        "api/picture/../../secret.txt",
        "api/picture/9",
        "api/picture/-1",
        "api/picture/0?frame=99999999999",
        "api/picture/cat.png",
    ],
)
def test_nothing_outside_the_folders_is_read(server, path):
    status, body, _ = request(server.address + path)
    assert status in (404, 422)
    assert b"nothing of yours" not in body
    assert b"import" not in body


def test_bodies_that_are_too_large_or_wrong_are_refused(server):
    before = mask_of(server, 0)
    address = f"{server.address}api/mask/0?width=160&height=120&version={before[1]}"
    answer = request(address, b"x", **{"Content-Length": str(2**40)})
    assert answer[0] == 413
    for body in (b"", b"x" * 100):
        answer = request(address, body)
        assert answer[0] == 422
        assert "160x120" in error_of(answer)
    answer = request(f"{server.address}api/mask/0?width=12&height=10&version={before[1]}", b"x" * 120)
    assert "open it again" in error_of(answer)
    for wrong in ("{", "[]", '{"gamma": 0}', '{"gamma": "x"}', '{"unheard": 1}', '{"normalization": "mean"}'):
        encoded = urllib.request.quote(wrong)
        answer = request(f"{server.address}api/preview/0?width=160&height=120&settings={encoded}", bytes(160 * 120))
        assert answer[0] == 422, wrong
    assert np.array_equal(mask_of(server, 0)[0], before[0])


def test_a_mask_is_saved_kept_apart_and_brought_back(server, lab):
    before, version = mask_of(server, 0)
    assert np.array_equal(before, disc((160, 120)))
    mine = np.random.default_rng(0).integers(0, 256, before.shape, dtype=np.uint8)
    assert save(server, 0, mine, version)[0] == 200
    with Image.open(lab.masks / "cat.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), mine)
    assert is_drawn(lab.masks / "cat.png")
    # Another tab that opened it before must not win by being late.
    late = save(server, 0, before, version)
    assert late[0] == 409
    assert "changed by another tab" in error_of(late)
    assert np.array_equal(mask_of(server, 0)[0], mine)
    assert save(server, 0, 255 - mine, version, "&over=1")[0] == 200
    # One step brings back what was there before this session, whatever was saved since.
    assert request(f"{server.address}api/revert/0", b"")[0] == 200
    assert np.array_equal(mask_of(server, 0)[0], before)
    again = request(f"{server.address}api/revert/0", b"")
    assert "not saved in this session" in error_of(again)


def test_what_looks_odd_comes_first(tmp_path):
    lab = Lab(tmp_path)
    for name, mask in (("good", disc((160, 120))), ("empty", np.zeros((120, 160), np.uint8)), ("speck", None)):
        picture = np.repeat(disc((160, 120))[..., None], 3, axis=2)  # shows what the good mask covers
        Image.fromarray(picture).save(lab.images / f"{name}.png")
        if mask is not None:
            Image.fromarray(mask).save(lab.masks / f"{name}.png")
    Image.fromarray(np.pad(np.full((3, 3), 255, np.uint8), ((60, 57), (80, 77)))).save(lab.masks / "speck.png")
    (lab.images / "broken.png").write_bytes(b"no picture")
    with running("--images", lab.images, "--masks", lab.masks, cwd=tmp_path) as server:
        items = json.loads(request(f"{server.address}api/items")[1])["items"]
        for _ in range(600):
            news = json.loads(request(f"{server.address}api/news?since=0")[1])
            if news["looked"] == len(items) and len(news["facts"]) == len(items):
                break
            threading.Event().wait(0.05)
    facts = {items[int(number)]["name"]: found for number, found in news["facts"].items()}
    order = sorted(facts, key=lambda name: -facts[name]["badness"])
    assert order == ["broken.png", "empty.png", "speck.png", "good.png"]
    assert "covers" in facts["speck.png"]["marks"][0]
    assert facts["good.png"]["marks"] == []


def test_generate_keeps_what_was_drawn(server, lab, capsys):
    blank, version = mask_of(server, 1)
    assert version == "none"
    assert not blank.any()
    drawn = blank.copy()
    drawn[10:50, 20:90] = 200
    assert save(server, 1, drawn, version)[0] == 200
    words = ["generate", "--images", str(lab.images), "--masks", str(lab.masks), "--backend", "box+grabcut"]
    main([*words, "--overwrite"])
    assert np.array_equal(mask_of(server, 1)[0], drawn)
    assert request(f"{server.address}api/revert/1", b"")[0] == 200
    assert not (lab.masks / "dog.png").exists()


def test_a_picture_that_vanishes_is_one_answer(server, lab):
    _, version = mask_of(server, 2)
    picture, before = (lab.images / "gone.png").read_bytes(), sorted(os.listdir(lab.masks))
    (lab.images / "gone.png").unlink()
    try:
        answer = save(server, 2, np.full((120, 160), 9, np.uint8), version)
        assert answer[0] == 422
        assert "gone.png" in error_of(answer)
        assert sorted(os.listdir(lab.masks)) == before
    finally:
        (lab.images / "gone.png").write_bytes(picture)


def test_the_preview_is_what_cache_writes_and_mask_weights_makes_of_it(tmp_path):
    lab = Lab(tmp_path, resolution=(256, 192))
    lab.write_toml(entry="mask_dilate = 3\nmask_blur = 0.01")
    lab.picture("cat", size=(333, 211))
    cache = lab.add_cache("cat", size=(333, 211))
    mask = disc((333, 211), centre=(0.9, 0.4))
    values = {"gamma": 0.6, "min_weight": 0.15, "floor": "clamp", "blur_kernel_size": 5, "invert": True}
    with running("--dataset_config", lab.toml, "--masks", lab.masks, "--arch", "wan", cwd=tmp_path) as server:
        size = f"width={mask.shape[1]}&height={mask.shape[0]}"
        asked = urllib.request.quote(json.dumps({**values, "prior": True}))
        status, body, _ = request(f"{server.address}api/preview/0?{size}&settings={asked}", mask.tobytes())
        assert status == 200
        assert save(server, 0, mask, "none")[0] == 200
        assert lab.run("cache", "--masks", lab.masks) == 0
    found = json.loads(body)
    shape = found["height"], found["width"]
    cells = np.frombuffer(base64.b64decode(found["cells"]), np.float16).reshape(shape)
    cached = weights(cache)
    name = next(name for name in read_header(cache).tensors if name.startswith("mask_weights"))
    assert np.array_equal(read_header(cache).read(name)[0, 0].view(np.uint16), cells.view(np.uint16))
    assert cells.min() > 0 or cells.std() > 0.1
    w, v = mask_weights(cached[None], MaskedLossConfig(**values), shape=(1, 1, *shape))
    assert base64.b64decode(found["weights"]) == w.numpy().tobytes()
    assert base64.b64decode(found["prior"]) == v.numpy().tobytes()
    assert found["mean"] == float(w.numpy().mean())
    assert sum(found["histogram"]) == cells.size
    assert found["flags"] == (
        "--use_mask_loss --invert_mask --mask_blur_kernel_size 5 --mask_gamma 0.6 --mask_min_weight 0.15 "
        "--inverted_mask_prior"
    )
    # The picture is wider than its bucket: the crop cuts its right side, and says how much of the mask.
    left, top, right, bottom = found["crop"]
    rows, columns = np.arange(211) + 0.5, np.arange(333) + 0.5
    inside = ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))
    assert found["cut"] == pytest.approx(1 - mask[inside].sum(dtype=int) / mask.sum(dtype=int), abs=0.01)


def test_frames_of_a_clip(tmp_path):
    lab = video_lab(tmp_path, frames_of(9))
    (lab.masks / "clip.png").write_bytes(b"")
    (lab.masks / "clip.png").unlink()
    with running("--dataset_config", lab.toml, "--masks", lab.masks, "--arch", "wan", cwd=tmp_path) as server:
        answer = request(f"{server.address}api/picture/0?frame=4")
        assert answer[2]["x-frames"] == "9"
        key = frames_of(9)[0]
        size = f"frame=0&width={key.shape[1]}&height={key.shape[0]}"
        assert request(f"{server.address}api/mask/0?{size}&version=none", key.tobytes())[0] == 200
        assert sorted(os.listdir(lab.masks / "clip")) == [f"{i:06d}.png" for i in range(9)]
        assert request(f"{server.address}api/carry/0?frame=0&last=8", b"")[0] == 200
        busy = request(f"{server.address}api/carry/0?frame=0&last=8", b"")
        assert busy[0] in (200, 409)
        task = finished(server)
        assert not task["failed"], task["text"]
    # The clip shows the discs themselves: the mask of the first frame has followed the disc to the last.
    last = np.asarray(Image.open(lab.masks / "clip" / "000008.png")) > 127
    truth = frames_of(9)[8] > 127
    assert (last & truth).sum() / (last | truth).sum() > 0.9
    still = np.asarray(Image.open(lab.masks / "clip" / "000000.png")) > 127
    assert (still & truth).sum() / (still | truth).sum() < 0.1


def finished(server: Server) -> dict:
    for _ in range(600):
        task = json.loads(request(f"{server.address}api/news?since=0")[1])["task"]
        if not task["running"]:
            return task
        threading.Event().wait(0.05)
    raise AssertionError(task)


def test_write_into_caches_runs_cache(tmp_path):
    lab = Lab(tmp_path)
    lab.picture("cat", mask=disc((160, 120)))
    cache = lab.add_cache("cat")
    with running("--dataset_config", lab.toml, "--masks", lab.masks, "--arch", "wan", cwd=tmp_path) as server:
        assert request(f"{server.address}api/cache", b"")[0] == 200
        task = finished(server)
    assert not task["failed"]
    assert "1 masks written" in task["text"]
    assert weights(cache).max() > 0.9


def test_kill_while_saving_leaves_a_whole_mask(tmp_path):
    lab = Lab(tmp_path)
    lab.picture("cat", mask=disc((160, 120)))
    server = Server("--images", lab.images, "--masks", lab.masks, cwd=tmp_path)
    masks = [np.full((120, 160), value, np.uint8) for value in range(40)]
    ready = threading.Event()

    def save_all() -> None:
        for index, mask in enumerate(masks):
            if index == 5:
                ready.set()
            try:
                save(server, 0, mask, "x", "&over=1")
            except OSError:
                return

    thread = threading.Thread(target=save_all)
    thread.start()
    ready.wait(30)
    os.kill(server.process.pid, signal.SIGKILL)
    thread.join()
    server.stop()
    with Image.open(lab.masks / "cat.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (120, 160)
    assert (pixels == pixels[0, 0]).all()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "give --images and --masks, or --dataset_config"),
        (["--images", "images"], "--images needs --masks"),
        (["--images", "absent", "--masks", "masks"], "is not a folder"),
        (["--images", "empty", "--masks", "masks"], "nothing to edit"),
        (["--images", "images", "--masks", "images"], "two folders"),
        (["--images", "images", "--masks", "masks", "--port", "99999"], "--port 99999"),
        (["--images", "images", "--masks", "masks", "--resolution", "1"], "resolution"),
        (["--images", "images", "--masks", "masks", "--resolution", "1", "2", "3"], "one number or two"),
        (["--dataset_config", "absent.toml"], "absent.toml"),
    ],
)
def test_usage(tmp_path, monkeypatch, capsys, words, text):
    lab = Lab(tmp_path)
    lab.picture("cat")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["edit", "--no_browser", *words]) in (1, 2)
    err = capsys.readouterr().err
    assert text in err
    assert len(err.splitlines()) == 1
