"""Downloading against a real HTTP server on loopback."""

import hashlib
import http.server
import threading

import pytest
import torch

from fsdino.encoder import build_encoder
from fsdino.errors import UserError
from fsdino.weights import PUBLISHED, Published, fetch, load_state

BODY = bytes(range(256)) * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[: len(BODY) // 2] if self.path.startswith("/cut") else BODY)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_download_is_checked_and_kept(server, cache):
    published = Published(f"{server}/file.pth", "md5:" + hashlib.md5(BODY).hexdigest()[:6])
    path = fetch("name", published)
    assert path == cache / "file.pth" and path.read_bytes() == BODY
    path.write_bytes(b"kept")
    assert fetch("name", published).read_bytes() == b"kept"  # not downloaded again


def test_wrong_bytes_are_refused_and_leave_nothing_behind(server, cache):
    with pytest.raises(UserError, match="expected a file whose md5 begins with 000000"):
        fetch("name", Published(f"{server}/file.pth", "md5:000000"))
    assert list(cache.iterdir()) == []


def test_a_cut_connection_is_refused_and_leaves_nothing_behind(server, cache):
    with pytest.raises(UserError, match=f"expected {len(BODY)} bytes, got {len(BODY) // 2}"):
        fetch("name", Published(f"{server}/cut.pth", None))
    assert list(cache.iterdir()) == []


def test_an_unreachable_address_names_the_local_way(server, cache):
    with pytest.raises(UserError, match=r"cannot download .*404.*; put the file at .*absent\.pth"):
        fetch("name", Published(f"{server}/absent.pth", None))


def test_weights_of_another_network_are_named_key_by_key(tmp_path):
    network = torch.nn.Linear(3, 2)
    torch.save({"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing bias; unknown extra; weight is \(2, 4\), expected \(2, 3\)"):
        load_state(network, "linear", tmp_path / "w.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"weight": Handler}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="expected a PyTorch state dict"):
        load_state(torch.nn.Linear(3, 2), "linear", tmp_path / "w.pth")


def test_the_publishers_names_carry_the_hashes_we_check():
    for name, published in PUBLISHED.items():
        if name.startswith("sam"):
            assert published.digest == "md5:" + published.url.rsplit("_", 1)[1].removesuffix(".pth")


def test_a_missing_local_file_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="expected the weights of dinov2_vits14, found no file"):
        build_encoder("dinov2_vits14", str(tmp_path / "none.pth"))
