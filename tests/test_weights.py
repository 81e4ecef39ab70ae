"""Downloading against a real HTTP server on loopback."""

import hashlib
import http.server
import io
import multiprocessing
import threading
from functools import partial
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import safetensors.torch
import torch
from segment_anything.build_sam import sam_model_registry

from fsdino import weights
from fsdino.encoder import build_encoder
from fsdino.errors import Fault, UserError
from fsdino.state import load_state, sam_decoder_state
from fsdino.teacher import build_teacher
from fsdino.weights import PUBLISHED, Published, fetch
from tests import reference_dinov2

BODY = bytes(range(256)) * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`. The path says how: whole, ranged, cut, stuck or chunked (answers end after 400 kB), garbage,
    broken, absent."""

    protocol_version = "HTTP/1.1"
    close_connection = True
    files: ClassVar[dict[str, bytes]] = {"file.pth": BODY}
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        _, manner, name = self.path.split("/")
        self.asked.append(self.headers.get("Range", ""))
        if manner == "garbage":
            self.wfile.write(b"no HTTP at all\r\n\r\n")
            return
        if manner == "chunked":  # one chunk is announced longer than it is
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"fffff\r\n" + self.files[name][:400_000])
            return
        if manner in ("absent", "broken"):
            self.send_error(404 if manner == "absent" else 503)
            return
        body, first = self.files[name], 0
        if manner in ("ranged", "cut") and "Range" in self.headers:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        last = first + 400_000 if manner in ("cut", "stuck") else len(body)
        self.wfile.write(body[first:last])

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
    monkeypatch.setattr(weights, "WAIT_SECONDS", 0.001)
    Handler.asked.clear()
    return tmp_path / "cache"


def kept(cache):
    """What is in the cache besides locks."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def attempt(published):
    """What a process that wants the file ends with."""
    try:
        return fetch("name", published)
    except (UserError, Fault) as error:
        return str(error)


MD5 = "md5:" + hashlib.md5(BODY).hexdigest()[:6]


def test_a_download_is_checked_and_kept(server, cache):
    published = Published(f"{server}/whole/file.pth", MD5, len(BODY))
    path = fetch("name", published)
    assert path == cache / "file.pth" and path.read_bytes() == BODY and kept(cache) == [path]
    path.write_bytes(b"kept")
    assert fetch("name", published).read_bytes() == b"kept"  # not downloaded again


def test_wrong_bytes_are_refused_and_leave_nothing_behind(server, cache):
    with pytest.raises(Fault, match="expected a file whose md5 begins with 000000"):
        fetch("name", Published(f"{server}/whole/file.pth", "md5:000000"))
    with pytest.raises(Fault, match=f"expected 7 bytes, got {len(BODY)}"):
        fetch("name", Published(f"{server}/whole/file.pth", None, 7))
    assert kept(cache) == []


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(server, cache):
    path = fetch("name", Published(f"{server}/cut/file.pth", MD5, len(BODY)))
    assert path.read_bytes() == BODY
    assert Handler.asked == ["", "bytes=400000-", "bytes=800000-", "bytes=1200000-"]


def test_a_later_call_goes_on_where_a_killed_one_stopped(server, cache):
    cache.mkdir()
    (cache / "file.pth.partial").write_bytes(BODY[:1000])
    assert fetch("name", Published(f"{server}/ranged/file.pth", MD5)).read_bytes() == BODY
    assert Handler.asked == ["bytes=1000-"]


def test_a_download_that_was_killed_before_its_last_step_is_only_checked(server, cache):
    cache.mkdir()
    (cache / "file.pth.partial").write_bytes(BODY)
    assert fetch("name", Published(f"{server}/ranged/file.pth", MD5)).read_bytes() == BODY


def test_a_server_without_ranges_starts_from_the_beginning(server, cache):
    cache.mkdir()
    (cache / "file.pth.partial").write_bytes(b"something else")
    assert fetch("name", Published(f"{server}/whole/file.pth", MD5)).read_bytes() == BODY


def test_a_connection_that_never_gets_further_is_given_up(server, cache):
    with pytest.raises(Fault, match=r"broke off after 400000 bytes\); rerun to resume"):
        fetch("name", Published(f"{server}/stuck/file.pth", None))
    assert len(Handler.asked) == weights.TRIES


def test_a_busy_server_is_asked_again_and_an_absent_file_is_not(server, cache):
    with pytest.raises(Fault, match=r"cannot download .*503"):
        fetch("name", Published(f"{server}/broken/file.pth", None))
    assert len(Handler.asked) == weights.TRIES
    with pytest.raises(Fault, match=r"cannot download .*404.* put the file at .*file\.pth, or name a local file"):
        fetch("name", Published(f"{server}/absent/file.pth", None))
    assert len(Handler.asked) == weights.TRIES + 1


def test_two_processes_that_want_one_file_download_it_once(server, cache):
    published = Published(f"{server}/whole/file.pth", MD5)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert len(set(pool.starmap(fetch, [("name", published)] * 4))) == 1
    assert kept(cache) == [cache / "file.pth"] and (cache / "file.pth").read_bytes() == BODY
    assert len(Handler.asked) == 1


@pytest.mark.parametrize("manner", ["garbage", "chunked"])
def test_answers_that_are_no_http_are_a_failed_download(server, cache, manner):
    with pytest.raises(Fault, match=r"cannot download \("):
        fetch("name", Published(f"{server}/{manner}/file.pth", MD5))


def test_every_process_that_waits_in_vain_is_told_so(server, cache):
    for published in (Published(f"{server}/broken/file.pth", None), Published(f"{server}/whole/file.pth", "md5:0000")):
        with multiprocessing.get_context("fork").Pool(3) as pool:
            for said in pool.starmap(attempt, [(published,)] * 3):
                assert "cannot download" in said or "expected a file whose md5" in said
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_is_a_users_mistake(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FSDINO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file: expected a folder for the cache, got: .* another with FSDINO_CACHE"):
        fetch("name", Published(f"{server}/whole/file.pth", MD5))
    monkeypatch.setenv("FSDINO_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_folder() == Path.home() / ".cache" / "fsdino"


def test_a_fetched_file_that_is_no_network_is_put_aside_and_fetched_anew(server, cache, monkeypatch):
    monkeypatch.setitem(Handler.files, "net.pth", b"<html>come back later</html>")
    monkeypatch.setitem(PUBLISHED, "net", Published(f"{server}/whole/net.pth", None))
    with pytest.raises(UserError, match=r"net\.pth\.useless: expected a PyTorch state dict"):
        load_state(torch.nn.Linear(3, 2), "net")
    network, file = torch.nn.Linear(3, 2), io.BytesIO()
    torch.save(network.state_dict(), file)
    monkeypatch.setitem(Handler.files, "net.pth", file.getvalue())
    other = torch.nn.Linear(3, 2)
    load_state(other, "net")
    assert torch.equal(other.weight, network.weight)


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"weight": 3}])
def test_a_file_of_something_else_than_tensors_by_name_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="expected a dict of tensors, got something else"):
        load_state(torch.nn.Linear(3, 2), "linear", tmp_path / "w.pth")


def test_weights_come_from_the_hub_unless_offline(tmp_path, monkeypatch):
    network = torch.nn.Linear(3, 2)
    body = safetensors.torch.save(network.state_dict())
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.command, self.path))
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        real, place = huggingface_hub.hf_hub_download, f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", partial(real, endpoint=place, cache_dir=tmp_path))
        other = torch.nn.Linear(3, 2)
        monkeypatch.setenv("FSDINO_OFFLINE", "1")
        with pytest.raises(UserError, match="hf:someone/net: cannot be downloaded from the hub"):
            load_state(other, "net", "hf:someone/net")
        assert asked == []
        monkeypatch.setenv("FSDINO_OFFLINE", "0")
        load_state(other, "net", "hf:someone/net")
        assert torch.equal(other.weight, network.weight)
        assert ("GET", "/someone/net/resolve/main/model.safetensors") in asked
        running.shutdown()


def test_offline_nothing_is_asked_for(server, cache, monkeypatch):
    monkeypatch.setenv("FSDINO_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"file\.pth: expected the weights of name, found none, and FSDINO_OFFLINE forbids"
    ):
        fetch("name", Published(f"{server}/whole/file.pth", MD5))
    assert Handler.asked == []


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_a_full_size_file_of_official_names_is_fetched_and_loaded(server, cache, monkeypatch, name):
    state = reference_dinov2.random_state("s", registers=4 if name.endswith("_reg") else 0)
    file = io.BytesIO()
    torch.save(state, file)
    own = PUBLISHED[name].url.rsplit("/", 1)[1]
    monkeypatch.setitem(Handler.files, own, file.getvalue())
    monkeypatch.setitem(PUBLISHED, name, Published(f"{server}/ranged/{own}", None, len(file.getvalue())))
    encoder = build_encoder(name)
    assert torch.equal(encoder.vit.blocks[5].attn.qkv.weight, state["blocks.5.attn.qkv.weight"])
    assert (cache / own).exists()


@pytest.mark.slow
def test_sams_full_size_checkpoint_is_fetched_and_loaded_into_teacher_and_decoder(server, cache, monkeypatch):
    sam = sam_model_registry["vit_b"]()
    file = io.BytesIO()
    torch.save(sam.state_dict(), file)
    body = file.getvalue()
    monkeypatch.setitem(Handler.files, "sam.pth", body)
    digest = "md5:" + hashlib.md5(body).hexdigest()[:6]
    monkeypatch.setitem(PUBLISHED, "sam_vit_b", Published(f"{server}/ranged/sam.pth", digest, len(body)))
    teacher, decoder = build_teacher("sam_vit_b"), sam_decoder_state("sam_vit_b")
    assert torch.equal(teacher.image_encoder.patch_embed.proj.weight, sam.image_encoder.patch_embed.proj.weight)
    gaussian = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert torch.equal(decoder["positional_encoding.gaussian"], gaussian) and len(Handler.asked) == 1


def test_a_hub_id_that_cannot_be_had_says_so(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf:timm/no-such-model: cannot be downloaded from the hub"):
        build_encoder("dinov2_vits14", "hf:timm/no-such-model")
    with pytest.raises(UserError, match="expected hf:ORGANISATION/NAME"):
        build_encoder("dinov2_vits14", "hf:alone")


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
