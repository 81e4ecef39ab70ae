"""The service, as a process of its own that is asked by HTTP."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fsdino import Predictor
from fsdino.errors import UserError
from pipelines import serve, serving
from pipelines.cli import call
from tests.conftest import ROOT
from tests.servers import free_port, wait_for_port

EXAMPLE, QUERY = ROOT / "examples" / "astronaut", ROOT / "examples" / "camera.jpg"


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    predictor = Predictor.load()
    encoding = predictor.register([EXAMPLE.with_suffix(".jpg")], [EXAMPLE.with_suffix(".png")], "person")
    encoding.save(tmp_path_factory.mktemp("class") / "person.class")
    predictor.set_image(QUERY)
    return tmp_path_factory.getbasetemp() / "class0" / "person.class", predictor.segment([encoding])


@pytest.fixture(scope="module")
def address(encoding, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("service") / "log"
    line = [sys.executable, "-m", "pipelines.serve", "--class", encoding[0].as_uri(), "--port", str(port)]
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with open(log, "w") as said:
        service = subprocess.Popen(line, cwd=ROOT, env=environ, stdout=said, stderr=said)
        try:
            wait_for_port(port)
            while "serving person on" not in log.read_text():
                assert service.poll() is None, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            service.send_signal(signal.SIGTERM)
            assert service.wait(60) == 0, log.read_text()
            assert json.loads(log.read_text().splitlines()[-1]) == {"served": ["person"]}


def post(url, data):
    with urllib.request.urlopen(urllib.request.Request(url, data, method="POST"), timeout=120) as answer:
        return answer.read()


def test_a_photograph_that_is_sent_gets_the_predictors_mask(address, encoding):
    masks, scores = encoding[1]
    known = json.loads(urllib.request.urlopen(address, timeout=60).read())
    assert known["classes"] == [{"name": "person", "shots": 1}]
    answer = json.loads(post(f"{address}/segment", QUERY.read_bytes()))
    assert (answer["width"], answer["height"]) == masks.shape[:0:-1]
    (found,) = answer["classes"]
    assert found["name"] == "person" and found["score"] == pytest.approx(scores[0], abs=1e-3)
    (whole,) = found["objects"]
    assert (coco.decode(whole["segmentation"]) != masks[0]).mean() < 1e-3
    parts = json.loads(post(f"{address}/segment?instances=true", QUERY.read_bytes()))["classes"][0]["objects"]
    assert sum(part["area"] for part in parts) == whole["area"]
    picture = np.array(Image.open(io.BytesIO(post(f"{address}/picture", QUERY.read_bytes()))))
    assert (picture != masks[0]).mean() < 1e-3


def test_photographs_that_come_together_get_each_its_own_answer(address):
    turned = io.BytesIO()
    Image.open(QUERY).rotate(180).resize((300, 200)).save(turned, "PNG")
    bodies = [QUERY.read_bytes(), turned.getvalue()]
    alone = [json.loads(post(f"{address}/segment", body)) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = [json.loads(a) for a in pool.map(lambda n: post(f"{address}/segment", bodies[n % 2]), range(8))]
    for number, answer in enumerate(together):
        one = alone[number % 2]
        assert (answer["width"], answer["height"]) == (one["width"], one["height"])
        assert answer["classes"][0]["score"] == pytest.approx(one["classes"][0]["score"], abs=1e-3)
        assert answer["classes"][0]["foreground"] == pytest.approx(one["classes"][0]["foreground"], abs=1e-3)


def test_what_is_no_photograph_is_refused_in_one_line_and_the_service_goes_on(address):
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")  # 10 kB that would be 300 MB for each class
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    for body, status, said in (
        (b"nothing", 400, "expected a readable image"),
        (b"", 400, "expected a readable image"),
        (script, 400, "expected a readable image"),
        (bomb.getvalue(), 400, "expected an image of at most 50 megapixels, got 81"),
        (bytes(65 * 2**20), 413, "expected at most 64 MiB"),
    ):
        with pytest.raises(HTTPError) as refused:
            post(f"{address}/segment", body)
        assert refused.value.code == status and said in json.loads(refused.value.read())["error"]
    assert json.loads(post(f"{address}/segment", QUERY.read_bytes()))["width"] == 512


def test_a_port_that_is_taken_and_no_class_are_refused_before_ray_starts(address, encoding):
    port = address.rpartition(":")[2]
    with pytest.raises(UserError, match="--class: expected at least one"):
        call(serve.Settings, serve.job, [])
    with pytest.raises(UserError, match="expected an address to listen on"):
        call(serve.Settings, serve.job, ["--class", str(encoding[0]), "--port", port])
    with pytest.raises(UserError, match="--most-replicas 1: expected at least --replicas 2"):
        call(serve.Settings, serve.job, ["--class", str(encoding[0]), "--replicas", "2", "--most-replicas", "1"])
    with pytest.raises(UserError, match="a class called person is there already"):
        call(serve.Settings, serve.job, ["--class", str(encoding[0]), "--class", str(encoding[0])])
    with pytest.raises(UserError, match="--host and --port are http_options"):
        serving.application({"flags": f"--class {encoding[0]} --port 9"})
    with pytest.raises(UserError, match="expected at least one class"):
        serving.application({})
