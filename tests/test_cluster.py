"""A cluster of two nodes with an S3 server and a tracking server, as infra/local.sh starts it: commands that are
submitted, nodes that are killed, and results that are those of one machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from pipelines import tracking
from tests.conftest import FOLD, ROOT, TRAINED, flags, result_of, stop_ray
from tests.servers import environment, free_port
from tests.test_kills import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LOCAL = str(ROOT / "infra" / "local.sh")
VIEWS = 160  # enough work that a lost node is noticed before the end


def local(*words):
    done = subprocess.run([LOCAL, *map(str, words)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stack(tmp_path_factory, shapes_root):
    """The environment of a driver there; the generated images are on its S3 server."""
    stop_ray()
    state = tmp_path_factory.mktemp("stack")
    ports = {name: str(free_port()) for name in ("S3_PORT", "MLFLOW_PORT", "RAY_PORT", "DASHBOARD_PORT")}
    settings = {"FSDINO_LOCAL": str(state), "FSDINO_BIN": str(Path(sys.executable).parent), "HEAD_CPUS": "2"}
    with environment(**ports, **settings, NODE_CPUS="2", OMP_NUM_THREADS="1"):
        try:
            local("up")
            lines = re.findall(r"(\w+)=(\S+)", (state / "env").read_text())
            with environment(**{name: value for name, value in lines if name != "PATH"}):
                fs = fsspec.filesystem("s3", skip_instance_cache=True)
                fs.put(str(shapes_root), "data/shapes", recursive=True)
                yield os.environ
        finally:
            local("down")


def places(name):
    """Where a run's things lie, as flags."""
    return {
        "--recipe": "tiny",
        "--data": "s3://data/shapes",
        "--store": f"s3://features/{name}",
        "--out": f"s3://runs/{name}",
        "--tracking-uri": os.environ["MLFLOW_SERVER"],
    }


def submit(command, *arguments):
    """Submit a command, follow it to its end, and return its result and all that it said."""
    entry = ["python", "-m", f"pipelines.{command}", *map(str, arguments)]
    line = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--", *entry]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (last,) = [text for text in done.stdout.splitlines() if text.startswith("{")][-1:]
    return json.loads(last), done.stdout


def begin(command, *arguments):
    line = [sys.executable, "-m", f"pipelines.{command}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, cwd=ROOT, text=True, start_new_session=True, **pipes)


def done_of(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def shards(url):
    """Key to bytes of a store's shards."""
    fs, root = fsspec.url_to_fs(url, skip_instance_cache=True)
    fs.invalidate_cache()
    return {name.removeprefix(root): fs.cat_file(name) for name in fs.find(f"{root}/c")}


def markers(name, store="late@70"):
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.invalidate_cache()
    return fs.glob(f"features/{name}/shapes/tiny_vit/{store}/markers/*")


def runs_of(experiment):
    client = tracking.MlflowClient(os.environ["MLFLOW_SERVER"])
    ids = [client.get_experiment_by_name(experiment).experiment_id]
    return client, client.search_runs(ids)


def test_the_whole_pipeline_is_submitted_and_equals_the_one_of_a_single_machine(whole_run, stack):
    line = [*flags(places("whole")), "--folds", FOLD, "--variants", "4d", "--methods", "prototype", "--actors", 2]
    result, _ = submit("reproduce", *line)
    for store in ("tiny_vit/early@70", "tiny_vit/late@70", "tiny_vit/early@28", "tiny_sam/teacher@128"):
        (here,) = [u for u in urls_of(whole_run) if u.endswith(store)]
        assert shards(here) == shards(f"s3://features/whole/shapes/{store}"), store
    scores = {name: of[str(FOLD)]["0"]["miou"] for name, of in result["scores"]["1-shot"].items()}
    assert scores["prototype"] == pytest.approx(whole_run["score prototype"]["miou"], abs=1e-5)
    # The adapter of the fixture was distilled by two workers, which sum in another order.
    assert scores["4d"] == pytest.approx(whole_run["score 4d"]["miou"], abs=0.02)
    client, runs = runs_of("train/shapes")
    (run,) = [r for r in runs if r.info.status == "FINISHED"]
    losses = [m.value for m in client.get_metric_history(run.info.run_id, "loss")]
    assert losses[-1] == pytest.approx(whole_run["4d"]["loss"], rel=1e-3)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert [file.path for file in client.list_artifacts(run.info.run_id, "segmenter")]
    assert fsspec.filesystem("s3", skip_instance_cache=True).find("mlflow"), "artifacts are not in the bucket"


def urls_of(whole_run):
    """The stores of the run on one machine."""
    return [url for step in ("teacher", "features", "bake") for url in whole_run[step]["stores"]]


@pytest.fixture(scope="module")
def calm(shapes_root, tmp_path_factory):
    """Stores of an undisturbed extraction on one machine without a cluster."""
    root = tmp_path_factory.mktemp("calm")
    line = ["--recipe", "tiny", "--data", shapes_root, "--store", root / "stores", "--num-views", VIEWS]
    line += ["--tracking-uri", f"sqlite:///{root}/m.db"]
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE")
    kept = {name: os.environ.pop(name, None) for name in names}
    try:
        done = done_of(begin("extract_features", *line), 600)
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "stores" / "shapes" / "tiny_vit"


def test_an_extraction_that_loses_a_node_says_so_and_writes_the_same_bytes(calm, stack):
    line = [*flags(places("lossy")), "--num-views", VIEWS, "--actors", 2, "--actor-cpus", 1.5]
    process = begin("extract_features", *line)
    try:
        assert wait_for(lambda: len(markers("lossy")) >= 4, process, 240), done_of(process).stderr[-3000:]
        local("lose", 2)
        time.sleep(8)
        assert process.poll() is None
        local("node", 2)
        done = done_of(process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"note: .* node \S+ \(.*\) with 2 CPU lost .* images are written, .* computed again", done.stderr)
    assert "starting 2 actors (loading torch)" in done.stderr
    assert "core_worker" not in done.stderr and "Traceback" not in done.stderr
    for store in ("early@70", "late@70"):
        assert shards(f"s3://features/lossy/shapes/tiny_vit/{store}") == shards(str(calm / store))
    client, runs = runs_of("extract/shapes")
    losing = [r for r in runs if "lost_nodes" in r.data.metrics]
    assert losing and "lost.txt" in [file.path for file in client.list_artifacts(losing[0].info.run_id)]


def test_an_extraction_that_loses_the_head_ends_in_one_line_and_its_rerun_resumes(calm, stack):
    line = [*flags(places("headless")), "--num-views", VIEWS, "--actors", 2]
    process = begin("extract_features", *line)
    assert wait_for(lambda: len(markers("headless")) >= 4, process, 240), done_of(process).stderr[-3000:]
    local("lose", 1)
    try:
        done = done_of(process, 200)
    finally:
        local("lose", 2)
        local("node", 1)
        local("node", 2)
    said = [text for text in done.stderr.splitlines() if text.strip() and "img" not in text]
    assert done.returncode == 1, done.stderr[-3000:]
    assert len([text for text in said if text.startswith("error: ")]) == 1, done.stderr[-3000:]
    assert "core_worker" not in done.stderr and "Traceback" not in done.stderr
    assert "rerun the command to resume" in said[-1]
    finished = len(markers("headless"))
    result = result_of(done_of(begin("extract_features", *line)))
    assert 0 < result["computed"] <= result["samples"] - 32 * (finished - 2)
    for store in ("early@70", "late@70"):
        assert shards(f"s3://features/headless/shapes/tiny_vit/{store}") == shards(str(calm / store))


def test_a_training_that_loses_a_node_says_so_and_ends_at_the_same_loss(whole_run, stack):
    everywhere = flags(places("whole"))
    line = [*everywhere, "--fold", FOLD, "--steps", 60, "--checkpoint-every", 5, "--no-register", "--workers", 2]
    line += ["--worker-cpus", 1.5]
    calm = result_of(done_of(begin("train_episodic", *line, "--name", "calm"), 600))
    process = begin("train_episodic", *line, "--name", "lossy")
    fs = fsspec.filesystem("s3", skip_instance_cache=True)

    def checkpointed():
        fs.invalidate_cache()
        return len(fs.glob(f"runs/whole/{TRAINED}/lossy/checkpoint_*/state.pt")) >= 2

    try:
        assert wait_for(checkpointed, process, 240), done_of(process).stderr[-3000:]
        local("lose", 2)
        time.sleep(3)
        local("node", 2)
        done = done_of(process, 400)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert result_of(done)["loss"] == pytest.approx(calm["loss"], rel=1e-5)
    assert re.search(r"note: .* node \S+ \(.*\) with 2 CPU lost", done.stderr)
    assert re.search(r"note: .* workers? [\d, ]+ lost \(.*\); 2 restarts left", done.stderr), done.stderr[-3000:]
    assert re.search(r"note: 2 workers are back; the training resumes after step \d+, its last checkpoint", done.stderr)
    assert "core_worker" not in done.stderr
    client, runs = runs_of("train/shapes")
    (run,) = [r for r in runs if r.data.tags["mlflow.runName"] == "lossy"]
    assert run.data.metrics["losses_of_workers"] >= 1
    assert "lost.txt" in [file.path for file in client.list_artifacts(run.info.run_id)]


def test_a_driver_without_the_token_is_refused_with_the_cure(stack, tmp_path):
    line = [*flags(places("refused"))]
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "HOME": str(tmp_path)}):
        with environment(**wrong):
            done = done_of(begin("extract_features", *line))
        assert done.returncode == 2, done.stderr[-3000:]
        (error,) = [text for text in done.stderr.splitlines() if text]
        assert error.startswith("error: RAY_ADDRESS") and "RAY_AUTH_TOKEN_PATH to the head's token" in error


def test_a_cluster_that_is_too_small_is_refused_before_anything_is_planned(stack):
    done = done_of(begin("extract_features", *flags(places("large")), "--actors", 9))
    assert done.returncode == 2, done.stderr[-3000:]
    (error,) = [text for text in done.stderr.splitlines() if text]
    assert "9 actors and a decoding task: expected a cluster with 9.5 CPU, got 4; lower --actors" in error
    assert not fsspec.filesystem("s3", skip_instance_cache=True).glob("features/large/**")


def test_what_actors_do_is_exported_to_prometheus(stack):
    """A short extraction, while the nodes' metrics are read as Prometheus does."""
    process = begin("extract_features", *flags(places("metrics")), "--num-views", VIEWS, "--actors", 2)
    ask = "import json, ray; ray.init(logging_level=40); print(json.dumps(ray.nodes()))"
    # In a process of its own, as this one's Ray remembers that it once needed no token.
    nodes = json.loads(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout)
    ports = [(n["NodeManagerAddress"], n["MetricsExportPort"]) for n in nodes if n["Alive"]]
    assert len(ports) == 2
    seen = set()
    while process.poll() is None:
        for host, port in ports:
            with suppress(OSError):
                text = urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5).read().decode()
                seen |= set(re.findall(r"^(ray_fsdino_\w+)\{", text, re.M))
        time.sleep(1)
    assert done_of(process).returncode == 0
    assert {"ray_fsdino_images_total", "ray_fsdino_bytes_total"} <= seen


FAKE = {
    "scontrol": "#!/bin/sh\nprintf 'node-a\\nnode-b\\n'\n",
    # Both nodes are this machine, on which the second node's agent needs a port of its own.
    "srun": """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
case "$*" in *--address=*) set -- "$@" --dashboard-agent-listen-port=PORT ;; esac
exec "$@"
""",
}


def test_the_slurm_script_starts_two_nodes_and_runs_the_command_on_them(shapes_root, tmp_path):
    stop_ray()
    for name, text in FAKE.items():
        (tmp_path / name).write_text(text.replace("PORT", str(free_port())))
        (tmp_path / name).chmod(0o755)
    places = ["--recipe", "tiny", "--data", shapes_root, "--store", tmp_path / "s", "--actors", 2]
    places += ["--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    line = ["bash", ROOT / "infra" / "slurm" / "ray.sbatch", "python", "-m", "pipelines.extract_features", *places]
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "2"}
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))} | slurm
    environ |= {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    logs = Path(f"/tmp/ray-{os.getpid()}")
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        job = subprocess.Popen(
            list(map(str, line)), cwd=ROOT, env=environ, stdout=out, stderr=err, start_new_session=True
        )
    try:
        while job.poll() is None:
            nodes = list(logs.glob("session_2*/logs/raylet*.out"))
            time.sleep(0.5)
    finally:
        subprocess.run(["pkill", "-KILL", "--session", str(job.pid)])
        shutil.rmtree(logs, ignore_errors=True)
    assert job.returncode == 0, (tmp_path / "err").read_text()[-3000:]
    assert len(nodes) == 2, nodes
    assert json.loads((tmp_path / "out").read_text().splitlines()[-1])["computed"] > 0
