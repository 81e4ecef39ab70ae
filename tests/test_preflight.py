"""What is said of a node that lacks something, each check against a real file, server or answer."""

import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fsdino.errors import Fault, UserError
from pipelines import cluster, preflight
from pipelines.preflight import Needs
from tests.conftest import ROOT
from tests.servers import FaultProxy, aws, environment, free_port

NOTHING = {"written": (), "read": (), "weights": (), "tracking_uri": "", "probes": {}, "sizes": {}}


def lacking(**asked):
    return preflight.lacking(NOTHING | asked)


def elsewhere(tmp_path, script, **changed):
    """What a process in another folder and environment finds when it does the nodes' task."""
    code = (
        "import sys; from ray import cloudpickle\n"
        "look, asked = cloudpickle.loads(sys.stdin.buffer.read())\n"
        f"{script}\n"
        "sys.stdout.buffer.write(cloudpickle.dumps(look(asked)))"
    )
    from ray import cloudpickle

    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | changed
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=cloudpickle.dumps((preflight.facts(), NOTHING)),
        capture_output=True,
        cwd=tmp_path,
        env=environ,
    )
    assert done.returncode == 0, done.stderr.decode()
    return cloudpickle.loads(done.stdout)


def said(found, asked_at=None):
    expected = preflight.facts()(NOTHING)
    return list(preflight.problems("gpu-7", expected, found, asked_at or time.time() - 1))


WITHOUT = (
    "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in type(f).__name__ + getattr(f, '__name__', '')]"
)


def test_a_node_like_the_drivers_lacks_nothing(tmp_path):
    assert said(elsewhere(tmp_path, "", PYTHONPATH=str(ROOT))) == []


def test_a_node_without_the_project_is_named_with_the_cure(tmp_path):
    (line,) = said(elsewhere(tmp_path, WITHOUT))
    assert line.startswith("node gpu-7: expected this project to be importable there, found none; start the node from")


def test_a_node_with_another_version_of_the_code_is_named(tmp_path):
    for package in ("fsdino", "feature_store", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    same = elsewhere(tmp_path, "", PYTHONPATH=str(tmp_path))
    with open(tmp_path / "pipelines" / "heap.py", "a") as file:
        file.write("# a later commit\n")
    (line,) = said(elsewhere(tmp_path, "", PYTHONPATH=str(tmp_path)))
    assert said(same) == []
    assert f"expected the driver's code {same['code']}, got" in line and "same commit or image" in line


@pytest.mark.parametrize(("what", "version"), [("python", "3.9.1"), ("ray", "2.40.0")])
def test_other_versions_of_python_and_ray_are_named(what, version):
    (line,) = said(preflight.facts()(NOTHING) | {what: version})
    assert f"node gpu-7: expected {what.capitalize()}" in line and f"got {version}" in line and "one image" in line


def test_a_clock_that_is_off_is_named():
    (line,) = said(preflight.facts()(NOTHING) | {"clock": time.time() + 90})
    assert "a clock within 20 s" in line and "s ahead; let NTP" in line
    (line,) = said(preflight.facts()(NOTHING) | {"clock": time.time() - 3600})
    assert "s behind" in line and "NTP" in line


def test_a_project_that_does_not_load_is_named():
    (line,) = said(preflight.facts()(NOTHING) | {"broken": "ModuleNotFoundError: No module named 'zarr'"})
    assert "does not load there (ModuleNotFoundError: No module named 'zarr')" in line


def test_a_path_that_is_not_shared_is_named_and_a_shared_one_leaves_no_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SEEN_SECONDS", 0.1)
    needs = Needs(written=(str(tmp_path / "stores"), "s3://features/x"))
    with preflight.probes(needs) as probes:
        assert list(probes) == [str(tmp_path / "stores")]
        assert lacking(probes=probes) == []
        hidden = {path: f"{probe}-hidden" for path, probe in probes.items()}
        (line,) = lacking(probes=hidden)
    assert "this path is not shared by all nodes; use s3:// or a shared file system" in line
    assert list((tmp_path / "stores").iterdir()) == []


def test_data_that_a_node_does_not_see_are_named(tmp_path, s3_endpoint):
    (line,) = lacking(read=[str(tmp_path / "VOC")])
    assert "expected what the driver sees there, found nothing; mount or copy it on every node" in line
    (line,) = lacking(read=["s3://features/no/such.jpg"])
    assert "found nothing" in line
    assert lacking(read=[str(tmp_path), f"tar://a.jpg::{tmp_path}"]) == []


def test_a_node_without_credentials_or_with_refused_ones_is_named(s3_endpoint, tmp_path):
    assert lacking(written=["s3://features/x"]) == []
    nobody = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
    }
    with environment(**nobody):
        (line,) = lacking(written=["s3://features/y"])
    assert "expected credentials for S3, found none" in line and "before `ray start` there" in line
    with FaultProxy(s3_endpoint, share=0) as proxy:
        proxy.answer_all = 403
        with environment(**aws(proxy.address)):
            (line,) = lacking(written=["s3://features/z"])
    assert "the object store refuses" in line and "before `ray start` there" in line


def test_weights_that_a_node_cannot_have_are_named(tmp_path):
    with environment(FSDINO_CACHE=str(tmp_path), FSDINO_OFFLINE="1"):
        (line,) = lacking(weights=[("dinov2_vits14", None)])
        assert "FSDINO_OFFLINE forbids downloading them" in line
        (tmp_path / "dinov2_vits14_pretrain.pth").touch()
        assert lacking(weights=[("dinov2_vits14", None)]) == []
    file = tmp_path / "mine.pth"
    (line,) = lacking(weights=[("dinov2_vits14", str(file))])
    assert "found no file" in line
    file.write_bytes(b"1234")
    asked = preflight.question(Needs(weights=(("dinov2_vits14", str(file)),)), {})
    assert preflight.lacking(asked) == []
    file.write_bytes(b"12")
    (line,) = preflight.lacking(asked)
    assert "expected the driver's 4 bytes, got 2; copy the same file to every node" in line


def test_weights_whose_publisher_cannot_be_reached_are_named(tmp_path, monkeypatch):
    from fsdino import weights

    address = f"http://127.0.0.1:{free_port()}/w.pth"
    monkeypatch.setitem(weights.PUBLISHED, "dinov2_vits14", weights.Published(address, None))
    with environment(FSDINO_CACHE=str(tmp_path), FSDINO_OFFLINE="0"):
        (line,) = lacking(weights=[("dinov2_vits14", None)])
    assert address in line and "put the file into FSDINO_CACHE on every node" in line


@pytest.mark.parametrize(("code", "words"), [(200, ""), (404, ""), (403, "--allowed-hosts"), (401, "PASSWORD before")])
def test_a_tracking_server_that_refuses_a_node_is_named(code, words):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"Invalid Host header")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = lacking(tracking_uri=f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert lines == [] if not words else words in lines[0] and "refuses this node" in lines[0]


def test_a_tracking_server_that_is_away_is_named():
    (line,) = lacking(tracking_uri=f"http://127.0.0.1:{free_port()}")
    assert "MLflow does not answer" in line and "name an address that every node reaches" in line


def test_an_address_where_no_ray_listens_is_said_at_once():
    address, before = f"127.0.0.1:{free_port()}", time.monotonic()
    with environment(RAY_ADDRESS=address), pytest.raises(Fault, match=f"RAY_ADDRESS {address}: no Ray listens there"):
        cluster._join()
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001", "head"])
def test_an_address_of_another_kind_is_refused(address):
    with environment(RAY_ADDRESS=address), pytest.raises(UserError, match="expected HOST:PORT of the head"):
        cluster._join()


def test_too_few_resources_are_said_with_the_cure():
    with pytest.raises(UserError, match=r"2 actors: expected a cluster with 2 GPU, got 1; lower --actors"):
        cluster._check_amounts({"CPU": 1, "GPU": 2}, {"CPU": 4.0, "GPU": 1.0}, "2 actors", "lower --actors")


def test_what_an_autoscaler_may_bring_counts(monkeypatch):
    import ray
    from ray._private.state import state

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "memory": 1.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 4, "GPU": 64})
    assert cluster.obtainable() == {"CPU": 8.0, "memory": 1.0, "GPU": 64}
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    assert cluster.obtainable() == {"CPU": 8.0, "memory": 1.0}
