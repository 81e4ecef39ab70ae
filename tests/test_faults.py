"""Nothing is lost: faults of an object store, a full disk, processes killed at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import fsspec
import numpy as np
import psutil
import pytest

from feature_store import FeatureStore, Fingerprint, Row, ShardWriter, StoreError, StoreFault, create
from feature_store.layout import shard_rows
from tests.conftest import ROOT, command, result_of
from tests.servers import FAULTS, FaultProxy, environment, free_port

FINGERPRINT = Fingerprint(
    feature="late",
    model="m",
    weights="w1",
    layer="l",
    norm="none",
    res_px=56,
    grid=4,
    channels=64,
    view_seed=0,
    preprocessing="p",
)
ROWS = [Row(f"image {i}", 0, f"/photos/image {i}.jpg") for i in range(32 * 20 + 7)]
DATA = np.random.default_rng(0).standard_normal((len(ROWS), 4, 4, 64)).astype(np.float16)


def write(url, shards=None, threads=1):
    """Fill what is missing, as an extraction does, and seal."""
    writer = create(url, FINGERPRINT, ROWS)

    def one(shard):
        rows = shard_rows(shard, len(ROWS))
        writer.write(shard, DATA[rows.start : rows.stop], [(5, 5)] * len(rows))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, writer.missing() if shards is None else shards))
    writer.seal()


def snapshot(url):
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return {name.removeprefix(root): fs.cat_file(name) for name in fs.find(root)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("undisturbed") / "late@56")
    write(url)
    return snapshot(url)


def test_500_faults_of_an_object_store_change_nothing(s3_endpoint, undisturbed):
    """Resets, 500, 503, late answers, bodies cut short in either direction, answers lost after a write."""
    with FaultProxy(s3_endpoint, share=0.4, slow_s=0.7) as proxy:
        while proxy.injected.total() < 500:
            url = f"s3://features/{uuid.uuid4().hex}/late@56"
            with environment(AWS_ENDPOINT_URL=proxy.address, FSDINO_STORE_TIMEOUT="0.5"):
                write(url, threads=16)
                store = FeatureStore(url)
                order = np.random.default_rng(1).permutation(len(ROWS))
                for at in range(0, len(order), 48):
                    rows = order[at : at + 48].tolist()
                    assert np.array_equal(store.read(rows), DATA[rows])
            assert snapshot(url) == undisturbed
        assert set(proxy.injected) == set(FAULTS), proxy.injected


def test_a_store_that_does_not_answer_stops_the_job_with_one_line(tmp_path):
    with environment(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b"
    ):
        with pytest.raises(
            StoreFault, match=r"s3://features/x/.*failed 6 times.*fix this and rerun to resume"
        ) as caught:
            create("s3://features/x", FINGERPRINT, ROWS)
    assert "\n" not in str(caught.value)


def test_refused_credentials_are_said_at_once(s3_endpoint):
    with FaultProxy(s3_endpoint, share=0) as proxy:
        proxy.answer_all = 403
        with environment(AWS_ENDPOINT_URL=proxy.address, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="topsecret"):
            with pytest.raises(StoreError, match="the object store refuses") as caught:
                create("s3://features/x", FINGERPRINT, ROWS)
    assert "topsecret" not in str(caught.value) and not isinstance(caught.value, StoreFault)


@contextmanager
def small_disk(folder, megabytes):
    """A disk of that size, mounted at a folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges that this process lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_with_one_line_and_goes_on_after_space_is_made(tmp_path, undisturbed):
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "ballast").write_bytes(bytes(500_000))
        url = str(disk / "late@56")
        with pytest.raises(StoreFault, match="no space left there; free some and rerun to resume") as caught:
            write(url)
        assert "\n" not in str(caught.value) and not list(disk.rglob("*.partial"))
        done = 21 - len(ShardWriter(url).missing())
        assert 0 < done < 21
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        write(url)
        assert snapshot(url) == undisturbed


@pytest.mark.slow
def test_an_extraction_onto_a_full_disk_exits_with_1_and_one_line(shapes_root, tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        places = [
            "--recipe",
            "tiny",
            "--data",
            shapes_root,
            "--store",
            disk,
            "--tracking-uri",
            f"sqlite:///{tmp_path}/m.db",
        ]
        (disk / "ballast").write_bytes(bytes(800_000))
        done = command("extract_features", *places, check=False)
        assert done.returncode == 1, done.stderr
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(errors) == 1 and "no space left there" in errors[0] and "Traceback" not in done.stderr
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert result_of(command("extract_features", *places))["computed"] > 0


def test_a_writer_killed_at_25_random_moments_leaves_nothing_wrong(tmp_path, undisturbed):
    url, rng, kills = str(tmp_path / "late@56"), random.Random(0), 0
    writer = create(url, FINGERPRINT, ROWS)
    while kills < 25:
        child = os.fork()
        if child == 0:
            code = 1
            with suppress(BaseException):
                write(url)
                code = 0
            os._exit(code)
        time.sleep(rng.expovariate(1 / 0.004))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        kills += status == signal.SIGKILL
        for shard in set(range(21)) - set(writer.missing()):  # what counts as done is right
            rows = shard_rows(shard, len(ROWS))
            raw = writer.folder.read(f"c/{shard}/0/0/0")
            assert np.array_equal(np.frombuffer(raw[: DATA[0].nbytes], np.float16), DATA[rows.start].ravel())
        if not writer.missing():
            url = str(tmp_path / f"late@56-{kills}")
            writer = create(url, FINGERPRINT, ROWS)
    write(url)
    left = {name: data for name, data in snapshot(url).items() if not name.endswith(".partial")}
    assert left == undisturbed


def processes(root, *words):
    """Living processes below one whose command line holds all the words."""
    found, family = [], []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(root).children(recursive=True)
    for process in family:
        try:
            if all(word in " ".join(process.cmdline()) for word in words):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_until_done(arguments, folder, rng, kills):
    """Run an extraction and kill driver, actor or raylet at random moments, `kills` times; then let it end.

    What a killed driver leaves running goes on for as long as it likes, beside the job that is started next.
    """
    done, sessions = {"driver": 0, "actor": 0, "raylet": 0}, []
    logs = folder.parents[2]
    logs.mkdir(parents=True)
    try:
        while True:
            line = [sys.executable, "-m", "pipelines.extract_features", *map(str, arguments)]
            log = logs / f"{len(sessions)}.log"
            with log.open("w") as out:
                job = subprocess.Popen(line, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
            sessions.append(job.pid)
            disturb(job, folder, rng, kills, done)
            code = job.wait(300)
            if code == 0:
                return done
            # 1: Ray lost its raylet; we say so in one line where Ray does not end the process itself.
            assert code in (-signal.SIGKILL, 1), log.read_text()[-3000:]
    finally:
        for session in sessions:
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)


def disturb(job, folder, rng, kills, done):
    """Kill at random moments until the job is gone or `kills` are done: now and then in its start, else in its work."""
    words = {"actor": ("ray::", "Extract"), "raylet": ("raylet/raylet",)}
    before, began, early = len(list(folder.glob("markers/*"))), time.monotonic(), rng.random() < 0.2
    victim, wait = rng.choice(["driver", "actor", "actor", "raylet"]), rng.uniform(0, 20 if early else 4)
    while sum(done.values()) < kills and job.poll() is None:
        time.sleep(0.02)
        if not early and len(list(folder.glob("markers/*"))) == before:
            began = time.monotonic()
        if time.monotonic() - began < wait:
            continue
        found = [psutil.Process(job.pid)] if victim == "driver" else processes(job.pid, *words[victim])
        if found:
            with suppress(psutil.NoSuchProcess):
                rng.choice(found).kill()
                done[victim] += 1
            if victim == "driver":
                return
            began, wait, early = time.monotonic(), rng.uniform(0, 10), True
            victim = rng.choice(["driver", "actor", "raylet"])


def extraction(shapes_root, store, views):
    places = ["--recipe", "tiny", "--data", shapes_root, "--store", store, "--num-views", views]
    return [*places, "--coarse-res", 28, "--tracking-uri", f"sqlite:///{store.parent}/m.db"]


@pytest.mark.parametrize(("kills", "views"), [(2, 8), (int(os.environ.get("FSDINO_KILLS", "100")), 60)])
@pytest.mark.slow
def test_an_extraction_killed_at_random_moments_equals_an_undisturbed_one(shapes_root, tmp_path, kills, views):
    whole = tmp_path / "whole" / "stores"
    command("extract_features", *extraction(shapes_root, whole, views))
    killed, rng = 0, random.Random(kills)
    while killed < kills:
        store = tmp_path / f"killed-{killed}" / "stores"
        folder = store / "shapes" / "tiny_vit" / "late@70"
        done = kill_until_done(extraction(shapes_root, store, views), folder, rng, min(10, kills - killed))
        killed += sum(done.values())
        print(f"{killed} kills: {done}", flush=True)
        for name in ("early@70", "late@70", "early@28"):
            left = snapshot(str(store / "shapes" / "tiny_vit" / name))
            assert {n: d for n, d in left.items() if not n.endswith(".partial")} == snapshot(
                str(whole / "shapes" / "tiny_vit" / name)
            )


def test_a_store_that_asks_for_fewer_requests_is_tried_for_longer_than_one_that_fails(monkeypatch):
    from feature_store.storage import base

    waited: list[float] = []
    monkeypatch.setattr(base.time, "sleep", waited.append)

    def answers(error, times):
        left = iter([error] * times)

        def request():
            for one in left:
                raise one
            return "here"

        return request

    assert base.patiently("s3://b/k", answers(base.Throttled("503 SlowDown"), 40)) == "here"
    assert len(waited) == 40 and max(waited) <= base.LONGEST_BACKOFF_SECONDS
    with pytest.raises(StoreFault, match="failed 6 times"):
        base.patiently("s3://b/k", answers(OSError("500"), 6))


def test_a_slow_down_of_s3_is_known_as_one(s3_endpoint):
    from feature_store.storage import base, open_folder

    with FaultProxy(s3_endpoint, share=0) as proxy:
        proxy.answer_all, proxy.answer_body = 503, b"<Error><Code>SlowDown</Code><Message>Reduce</Message></Error>"
        with environment(AWS_ENDPOINT_URL=proxy.address), pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "PATIENCE_SECONDS", 0)
            with pytest.raises(StoreFault, match="too many requests for one prefix") as caught:
                open_folder("s3://features/slow").read("x")
    assert "\n" not in str(caught.value)
