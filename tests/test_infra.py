"""What infra/ holds, as far as it can be checked without a Kubernetes API and a container daemon."""

import copy
import fnmatch
import importlib
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from fsdino.errors import UserError
from pipelines import cli, serve
from tests.conftest import ROOT
from tests.ray_crds import SPECS, faults, strict

INFRA, BIN = ROOT / "infra", Path(sys.executable).parent
KUBERAY = INFRA / "kuberay"
FOLDERS = sorted(
    str(file.parent.relative_to(KUBERAY))
    for file in KUBERAY.rglob("kustomization.yaml")
    if "kind: Component" not in file.read_text()
)
JOBS = {path.name.replace("-", "_") for path in (KUBERAY / "jobs").iterdir()} - {"template"}
STEPS = {"extract_teacher", "extract_features", "distill", "bake_embeddings", "train_episodic", "evaluate", "reproduce"}
ON_PHOTOGRAPHS = {"annotate"}


def rendered(folder):
    """The objects that kustomize makes of a folder."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, whose kustomize renders the manifests, is not installed")
    line = ["kubectl", "kustomize", str(KUBERAY / folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def invalid(thing):
    """What is wrong with an object, by the description of its kind."""
    kind = (thing["apiVersion"], thing["kind"])
    if kind not in SPECS:
        return by_kubernetes(thing)
    found = {} if SPECS[kind] is None else {"spec": SPECS[kind]}
    wrong = list(faults({k: v for k, v in thing.items() if k == "spec"}, found, kind[1]))
    wrong += [f"{key}: no such field" for key in thing.keys() - {"apiVersion", "kind", "metadata", "spec"}]
    for template in templates(thing) if not wrong else ():
        wrong += by_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": template})
    return wrong


def by_kubernetes(thing):
    try:
        kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{thing['kind']}: {error.message}"]
    return []


def cluster_of(thing):
    spec = thing.get("spec", {})
    inside = spec.get("rayClusterSpec", spec.get("rayClusterConfig"))
    return spec if thing["kind"] == "RayCluster" else inside


def templates(thing):
    """Pod templates of a cluster, the head's first."""
    cluster = cluster_of(thing)
    if cluster is None:
        return []
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.fixture(scope="module")
def everything():
    return {folder: rendered(folder) for folder in FOLDERS}


def test_every_manifest_is_valid(everything):
    overlays = {f"overlays/{name}" for name in ("services", "queued", "fault-tolerant")}
    assert overlays | {"base", "jobs/reproduce", "serve"} <= set(everything)
    wrong = {(f, t["kind"]): invalid(t) for f, things in everything.items() for t in things if invalid(t)}
    assert wrong == {}


def test_a_misspelt_field_anywhere_is_found(everything):
    """Each field of each kind, once with a letter more."""
    tried: set[tuple] = set()
    for thing in (t for folder in ("overlays/queued", "overlays/services") for t in everything[folder]):
        for path in field_paths({k: v for k, v in thing.items() if k in ("spec", "data")}):
            kind = (thing["kind"], *(step for step in path if isinstance(step, str)))
            if kind in tried or free_form(path):
                continue
            wrong = copy.deepcopy(thing)
            inside = wrong
            for step in path[:-1]:
                inside = inside[step]
            inside[f"{path[-1]}x"] = inside.pop(path[-1])
            assert invalid(wrong), f"{thing['kind']} {thing['metadata']['name']}: {'.'.join(map(str, path))}x passes"
            tried.add(kind)
    assert len(tried) > 100


def field_paths(value, above=()):
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict):
            yield (*above, key)
        if isinstance(inside, (dict, list)):
            yield from field_paths(inside, (*above, key))


def free_form(path):
    """Keys that are names of the user's: labels, data, resources, parameters of `ray start`."""
    return any(
        name in path[:-1]
        for name in ("data", "labels", "matchLabels", "rayStartParams", "requests", "limits", "selector")
    )


@pytest.mark.slow
@pytest.mark.skipif("FSDINO_TEST_CRDS" not in os.environ, reason="FSDINO_TEST_CRDS names no folder with KubeRay's CRDs")
def test_every_ray_manifest_is_valid_by_the_publishers_own_schemas(everything):
    checked, schemas = 0, {}
    for thing in (t for things in everything.values() for t in things if t["apiVersion"] == "ray.io/v1"):
        file = Path(os.environ["FSDINO_TEST_CRDS"]) / f"ray.io_{thing['kind'].lower()}s.yaml"
        if file not in schemas:
            of = {v["name"]: v for v in yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]}
            schemas[file] = strict(of["v1"]["schema"]["openAPIV3Schema"])
            schemas[file]["properties"]["metadata"] = {}
        schema = schemas[file]
        jsonschema.validate(thing, schema)
        misspelt = copy.deepcopy(thing)
        cluster_of(misspelt)["enableInTreeAutoscalling"] = True
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(misspelt, schema)
        checked += 1
    assert checked > 10


def test_clusters_have_the_pinned_ray_a_head_without_work_and_requests_equal_to_limits(everything):
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    for things in everything.values():
        for cluster in filter(None, map(cluster_of, things)):
            assert cluster["rayVersion"] == pinned and cluster["authOptions"] == {"mode": "token"}
            assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
            if cluster["enableInTreeAutoscaling"]:
                assert cluster["autoscalerOptions"]["version"] == "v2"
                assert all(group["replicas"] == group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"])
        for template in (t for thing in things for t in templates(thing)):
            (container,) = template["spec"]["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"configMapRef": {"name": "fsdino"}} in container["envFrom"]
            # KubeRay keeps a cluster's token in a Secret of the cluster's name.
            (secret,) = [of["secretRef"]["name"] for of in container["envFrom"] if "secretRef" in of]
            assert secret not in {thing["metadata"]["name"] for thing in things if cluster_of(thing)}
            assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "restartPolicy" not in template["spec"], "autoscaler v2 wants it unset"


def test_every_step_has_a_job_whose_command_our_own_command_line_takes(everything):
    assert JOBS == STEPS | ON_PHOTOGRAPHS
    for step in JOBS:
        (job,) = [t for t in everything[f"jobs/{step.replace('_', '-')}"] if t["kind"] == "RayJob"]
        (settings,) = [t for t in everything["jobs/reproduce"] if t["kind"] == "ConfigMap"]
        assert job["metadata"]["name"] == step.replace("_", "-") and len(job["metadata"]["name"]) <= 47
        assert job["spec"]["backoffLimit"] > 0 and job["spec"]["shutdownAfterJobFinishes"]
        assert job["spec"]["entrypointNumCpus"] == 1
        parsed = parse(string.Template(job["spec"]["entrypoint"]).substitute(settings["data"]))
        assert type(parsed).__module__ in (f"pipelines.{step}", "pipelines.sequence")
        store, read = (
            (parsed.store, parsed.images) if step in ON_PHOTOGRAPHS else (parsed.places.store, parsed.places.data)
        )
        assert store == "s3://features" and read.startswith("s3://data/")
        assert within(parsed, job["spec"]["rayClusterSpec"])


def test_the_service_takes_flags_of_serve_and_fits_the_cluster(everything):
    (service,) = [t for t in everything["serve"] if t["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (app,) = config["applications"]
    module, _, builder = app["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    parsed = cli.parse(serve.Settings, shlex.split(app["args"]["flags"]))
    assert parsed.gpu and [name for (name,) in parsed.classes] == [
        "s3://data/classes/cat.class",
        "s3://data/classes/dog.class",
    ]
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (gpus,) = [group for group in groups if group["groupName"] == "gpu"]
    limits = gpus["template"]["spec"]["containers"][0]["resources"]["limits"]
    for template in templates(service):  # KubeRay makes no Service for a head that names ports, but not this one
        ports = template["spec"]["containers"][0]["ports"]
        assert {"name": "serve", "containerPort": config["http_options"]["port"]} in ports
    assert parsed.most_replicas <= gpus["maxReplicas"] and parsed.replica_cpus <= int(limits["cpu"])


def within(settings, cluster):
    """Whether the autoscaler may bring what a command asks for."""
    groups = [
        (g["maxReplicas"], g["template"]["spec"]["containers"][0]["resources"]["limits"])
        for g in cluster["workerGroupSpecs"]
    ]
    gpus = sum(count * int(limits.get("nvidia.com/gpu", 0)) for count, limits in groups)
    cpus = sum(count * int(limits["cpu"]) for count, limits in groups)
    wanted = []
    of = getattr(settings, "extraction", getattr(settings, "work", None))
    if of is not None:
        wanted.append((of.actors * of.actor_cpus + of.decode_cpus, of.actors * of.actor_gpus))
    if hasattr(settings, "workers"):
        wanted.append((settings.workers.workers * settings.workers.worker_cpus, settings.workers.workers))
    return all(cpu <= cpus and gpu <= gpus for cpu, gpu in wanted)


def parse(line):
    """A command's settings, or a UserError, as the command itself would make them of its line."""
    words = shlex.split(line)
    assert words[:2] == ["python", "-m"] and words[2].startswith("pipelines."), line
    module = importlib.import_module(words[2])
    return cli.parse(module.Settings, words[3:])


def commands_in(text):
    """Lines that call a command of ours, continuation lines joined, comment marks gone."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    return re.findall(r"python -m pipelines\.\w+ [^\n`|;)]+", joined)


@pytest.mark.parametrize("file", ["infra/compose.yaml", "infra/slurm/ray.sbatch", "docs/cluster.md"])
def test_commands_that_are_shown_are_ones_that_we_take(file):
    found = [line for line in commands_in((ROOT / file).read_text()) if "..." not in line]
    assert found
    for line in found:
        shell = {"PWD": "/d", "MLFLOW_SERVER": "http://mlflow:5000"}
        parse(re.sub(r"\s+#.*", "", string.Template(line).safe_substitute(shell)))


def test_a_command_that_rots_would_be_noticed():
    with pytest.raises(UserError, match="--acters"):
        parse("python -m pipelines.extract_features --recipe tiny --acters 3")


def test_the_queue_holds_what_a_queued_job_asks_for(everything):
    things = everything["overlays/queued"]
    (job,) = [t for t in things if t["kind"] == "RayJob"]
    (queue,) = [t for t in things if t["kind"] == "ClusterQueue"]
    (local,) = [t for t in things if t["kind"] == "LocalQueue"]
    assert (
        job["spec"]["suspend"] and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    )
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    quotas = {q["name"]: q["nominalQuota"] for q in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]}
    cluster, asked = cluster_of(job), {"cpu": 0, "nvidia.com/gpu": 0}
    for count, template in zip([1, *(g["replicas"] for g in cluster["workerGroupSpecs"])], templates(job), strict=True):
        limits = template["spec"]["containers"][0]["resources"]["limits"]
        asked = {kind: amount + count * int(limits.get(kind, 0)) for kind, amount in asked.items()}
    assert all(asked[kind] <= quotas[kind] for kind in asked) and asked["nvidia.com/gpu"] == 8


def test_the_compose_file_is_valid_and_starts_in_order():
    schemas = Path(importlib.util.find_spec("check_jsonschema").origin).parent / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    jsonschema.validate(compose, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(compose | {"services": {"head": {"imagee": "x"}}}, schema)
    services = compose["services"]
    waits = {name: set(of.get("depends_on", ())) for name, of in services.items()}
    assert waits["mlflow"] == {"buckets"} and waits["head"] == {"buckets", "mlflow"} and waits["worker"] == {"head"}
    for of in services.values():
        assert not of["image"].endswith(":latest") and ":" in of["image"]
        for other, how in of.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other == "buckets" else "service_healthy"
            assert how["condition"] == wanted and (other == "buckets" or "healthcheck" in services[other])
    assert services["worker"]["deploy"]["replicas"] == 2 and services["gpu"]["profiles"] == ["gpu"]
    for published in [port for of in services.values() for port in of.get("ports", ())]:
        assert published.startswith("127.0.0.1:"), f"{published} is open to the network"
    hosts = re.search(r"--allowed-hosts (\S+)", services["mlflow"]["command"]).group(1).split(",")
    assert {"mlflow:5000", "localhost:5000", "127.0.0.1:5000"} == set(hosts)
    buckets = set(re.findall(r"store/(\w+)", services["buckets"]["command"][0]))
    assert buckets == {"data", "features", "runs", "mlflow"}


def test_ray_start_takes_the_flags_that_we_give_it():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for file in (
        INFRA / "compose.yaml",
        INFRA / "local.sh",
        INFRA / "ray-cluster.yaml",
        INFRA / "slurm" / "ray.sbatch",
    ):
        text = re.sub(r"\\\n\s*|\n\s{6,}(?=--)", " ", file.read_text())
        for line in re.findall(r"ray\"? start ([^\n]+)", text):
            flags = set(re.findall(r"--[a-z][\w-]+", line))
            assert flags <= known | {"--detach", "--wait"}, (file.name, flags - known)


def test_the_launchers_file_is_what_rays_launcher_takes():
    import warnings

    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about its schema library
        validate_config(prepare_config(copy.deepcopy(config)))
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(copy.deepcopy(config) | {"max_wrokers": 3}))


def test_dockerfiles_and_scripts_are_clean():
    files = [str(INFRA / name) for name in ("Dockerfile", "mlflow.Dockerfile")]
    done = subprocess.run([BIN / "hadolint", *files], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout
    scripts = [str(INFRA / name) for name in ("local.sh", "image.sh", "slurm/ray.sbatch")]
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_images_context_holds_what_is_copied_and_no_more():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    taken = {line[1:] for line in ignored if line[0] == "!"}
    copied = set()
    for name in ("Dockerfile", "mlflow.Dockerfile"):
        for line in re.findall(r"^COPY (.+)$", (INFRA / name).read_text(), re.M):
            copied |= set(line.split()[:-1])
    assert ignored[0] == "*" and copied == taken and all((ROOT / part).exists() for part in copied)
    before, after = (INFRA / "Dockerfile").read_text().split("image.sh packages")
    assert "COPY fsdino" in after and "COPY fsdino" not in before, "a change of code would install all packages anew"
    assert any(fnmatch.fnmatch("x/__pycache__", pattern) for pattern in ignored)


def test_the_dashboard_shows_every_metric_that_we_export_and_none_that_nobody_does():
    from pipelines import meters

    source = Path(meters.__file__).read_text()
    exported = set(re.findall(r'_counter\("(\w+)"', source)) | set(re.findall(r'_gauge\("(\w+)"', source))
    told = {f"fsdino_{name}" for name in ("loss", "mse", "waiting_share", "cache_hit_share")}
    dashboard = json.loads((INFRA / "grafana" / "fsdino.json").read_text())
    shown = set(re.findall(r"ray_(fsdino_\w+)", json.dumps(dashboard)))
    assert {name.removesuffix("_total") for name in shown} == exported | told
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) and all(panel["targets"] for panel in dashboard["panels"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_of_the_image_make_an_environment_in_which_commands_run(tmp_path):
    """Each RUN line of the image in its order, in a clean folder in the place of `/`; apt only says what it would."""
    place, environ = tmp_path / "fsdino", os.environ | {"VIRTUAL_ENV": str(tmp_path / "opt"), "TORCH": "cuda"}
    environ["PATH"] = f"{tmp_path}/bin:{tmp_path}/opt/bin:{environ['PATH']}"
    for folder in (place, tmp_path / "bin", tmp_path / "etc"):
        folder.mkdir()
    for name in ("passwd", "group", "shadow", "gshadow"):
        (tmp_path / "etc" / name).touch()
    text = re.sub(r"\\\n", " ", (INFRA / "Dockerfile").read_text())
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                there = tmp_path / target.lstrip("/") if target.startswith("/usr") else place / target
                there = tmp_path / "bin" / "image.sh" if source.endswith("image.sh") else there
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, there, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, there)
        elif word == "RUN":
            rest = rest.replace("apt-get update", "true").replace("install --yes", "install --simulate --yes")
            rest = rest.replace("rm -rf /var/lib/apt/lists/*", "true").replace(
                "useradd", f"useradd --prefix {tmp_path}"
            )
            rest = re.sub(r"(?<=\s)/(fsdino|cache)", rf"{tmp_path}/\1", rest)
            done = subprocess.run(["sh", "-c", rest], cwd=place, env=environ, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert not (place / "fsdino.egg-info").is_symlink()
    line = ["image.sh", "run", "python", "-m", "pipelines.plan", "--recipe", "tiny", "--of", "voc"]
    done = subprocess.run(line, cwd=place, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"fsdino \S+ \S+ python 3\.\d+\.\d+ ray \S+ torch \S+ mlflow \S+ zarr", done.stderr)
    assert json.loads(done.stdout.splitlines()[-1])["train_images"] == 5953
    done = subprocess.run(["ray", "job", "--help"], cwd=place, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "submit" in done.stdout, "ray[default] is not in the image"
