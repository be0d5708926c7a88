"""The files in cluster/: valid, safe, and with commands that the jobs understand.

Schemas: Kubernetes' own (PyPI: kubernetes-validate), Ray's own of the cluster launcher (in the ray
package). KubeRay publishes its CRDs in no Python package, so what it adds around pods is stated
here by hand, after the CRDs of its repository at commit 034971d; the pods inside are checked by
Kubernetes' schema.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERNETES = "1.34"

MANIFESTS = sorted(path for path in CLUSTER.glob("*.yaml") if path.name != "aws.yaml")
RAY_MANIFESTS = [path for path in MANIFESTS if path.name.startswith("ray")]
HEADED = [*sorted(CLUSTER.glob("*.yaml")), CLUSTER / "Dockerfile"]


def name_of(path: Path) -> str:
    return path.name


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a document, with the keys that lead to it."""
    yield path, value
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from walk(each, (*path, key))


def job_spec(path: Path) -> dict[str, Any]:
    """The RayJob in a file, or in its RayCronJob."""
    (document,) = documents(path)
    spec = document["spec"]
    return spec["jobTemplate"] if document["kind"] == "RayCronJob" else spec


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template in a document."""
    found = [value for _, value in walk(document) if isinstance(value, dict)]
    return [each for each in found if "containers" in each.get("spec", {})]


# What a person meets first.


@pytest.mark.parametrize("path", HEADED, ids=name_of)
def test_header_says_what_to_change_and_the_one_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines = lines[lines[0].startswith("# syntax=") :]
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    text = "\n".join(header)
    assert len(re.findall(r"^# Run: ", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^# Change: ", text, re.MULTILINE)) == 1
    (command,) = re.findall(r"^# Run:\s+(.*)$", text, re.MULTILINE)
    assert f"cluster/{path.name}" in command


def test_every_file_of_the_folder_is_in_its_readme() -> None:
    text = (CLUSTER / "README.md").read_text()
    files = [each.name for each in CLUSTER.iterdir() if each.name != "README.md"]
    assert [name for name in files if f"`{name}`" not in text] == []


# Commands: each parses with the real command line.


def commands(text: str) -> list[str]:
    """The `python -m jobs.X ...` commands in a text, one line each; those of a CMD too."""
    text = re.sub(r"\\\n[#\s]*", " ", text)
    text = text.replace('", "', " ").replace('"]', "")
    return re.findall(r"python -m (jobs\.[^\n`|;&#]*)", text)


def strings(path: Path) -> list[str]:
    """What may hold a command in a file; of YAML the values as they are read, and the comments."""
    text = path.read_text()
    if path.suffix != ".yaml":
        return [text]
    values = [
        value for each in documents(path) for _, value in walk(each) if isinstance(value, str)
    ]
    return [*values, "\n".join(line for line in text.splitlines() if line.startswith("#"))]


COMMANDS = [
    (path.relative_to(ROOT), command.strip())
    for path in [ROOT / "README.md", CLUSTER / "README.md", *HEADED]
    for text in strings(path)
    for command in commands(text)
]


def parse(command: str) -> Any:
    """Parse a command line and check its settings, without running it; return the settings."""
    module_name, *arguments = shlex.split(command)
    module = importlib.import_module(module_name)
    if "..." in arguments:
        return None
    parser: click.Command = module.main
    try:
        context = parser.make_context(module_name, list(arguments))
        while isinstance(parser, click.Group):
            name, sub, rest = parser.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            assert name is not None
            assert sub is not None
            parser, context = sub, sub.make_context(name, rest, parent=context)
    except click.exceptions.Exit:  # --help
        return None
    for value in vars(module).values():
        if dataclasses.is_dataclass(value) and isinstance(value, type):
            fields = {field.name for field in dataclasses.fields(value)}
            if fields == set(context.params):
                return value(**context.params)
    return None


@pytest.mark.parametrize(
    ("path", "command"),
    COMMANDS,
    ids=[f"{path}-{index}" for index, (path, _) in enumerate(COMMANDS)],
)
def test_command_parses_with_the_real_command_line(path: Path, command: str) -> None:
    from denoise_core.presets import preset

    # A file that an earlier command writes.
    settings = parse(re.sub(r"--config OUT/\S+", "", command))
    if command.startswith("jobs.train "):
        preset(settings.preset)


def test_commands_are_found_and_wrong_ones_are_refused() -> None:
    files = {path.name for path, _ in COMMANDS}
    assert {"README.md", "aws.yaml", "rayjob-train.yaml", "rayjob-denoise.yaml"} <= files
    assert parse("jobs.denoise in --output out --actors 1:8").actors == "1:8"
    with pytest.raises(click.UsageError):
        parse("jobs.denoise in --output out --no-such-flag")
    with pytest.raises(Exception, match="--actors"):
        parse("jobs.denoise in --output out --actors none")


# Schemas.


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_kubernetes_accepts_objects_and_pods(path: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    pods = 0
    for document in documents(path):
        if not document["apiVersion"].startswith("ray.io/"):
            validator.validate(document, KUBERNETES, strict=True)
            continue
        for template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            validator.validate(pod, KUBERNETES, strict=True)
            pods += 1
    assert pods == (3 if path in RAY_MANIFESTS else 0)


def fields(required: str = "", /, **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXT, WHOLE, YES_NO, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {}
TEXTS = {"type": "object", "additionalProperties": TEXT}
GROUP = {
    "rayStartParams": TEXTS,
    "template": {"type": "object"},
    "resources": TEXTS,
    "labels": TEXTS,
}
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(
        mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=YES_NO
    ),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=WHOLE,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        image=TEXT, imagePullPolicy=TEXT, env=ANY, envFrom=ANY, volumeMounts=ANY,
        resources=ANY, securityContext=ANY, command=ANY, args=ANY,
    ),
    gcsFaultToleranceOptions=ANY,
    headServiceAnnotations=TEXTS,
    suspend=YES_NO,
    managedBy=TEXT,
    headGroupSpec=fields(
        "template", serviceType=TEXT, headService=ANY, enableIngress=YES_NO, **GROUP
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName template",
            groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, numOfHosts=WHOLE,
            idleTimeoutSeconds=WHOLE, suspend=YES_NO, scaleStrategy=ANY, **GROUP,
        ),
    },
)  # fmt: skip
RAY_JOB = fields(
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=WHOLE, activeDeadlineSeconds=WHOLE, preRunningDeadlineSeconds=WHOLE,
    ttlSecondsAfterFinished=WHOLE, shutdownAfterJobFinishes=YES_NO, suspend=YES_NO,
    submitterPodTemplate={"type": "object"}, submitterConfig=fields(backoffLimit=WHOLE),
    rayClusterSpec=RAY_CLUSTER, clusterSelector=TEXTS, metadata=TEXTS, managedBy=TEXT,
    runtimeEnvYAML=TEXT, jobId=TEXT, entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"}, entrypointResources=TEXT, deletionStrategy=ANY,
)  # fmt: skip
RAY_CRON_JOB = fields(
    "schedule jobTemplate", schedule=TEXT, timeZone=TEXT, suspend=YES_NO, jobTemplate=RAY_JOB
)
KINDS = {"RayJob": RAY_JOB, "RayCronJob": RAY_CRON_JOB}


@pytest.mark.parametrize("path", RAY_MANIFESTS, ids=name_of)
def test_kuberay_knows_every_field(path: Path) -> None:
    (document,) = documents(path)
    kind = KINDS[document["kind"]]
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.validate(document["spec"], kind)
    document["spec"]["no-such-field"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document["spec"], kind)


@pytest.mark.parametrize("path", RAY_MANIFESTS, ids=name_of)
def test_ray_job_begins_with_no_gpu_ends_by_itself_and_is_tried_again(path: Path) -> None:
    spec = job_spec(path)
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    assert spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    pod = workers["template"]["spec"]
    assert any("spot" in json.dumps(each) for each in pod["tolerations"])
    (container,) = pod["containers"]
    # The autoscaler takes the limits for what a pod will have, and Ray counts what it has.
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    settings = parse(spec["entrypoint"].removeprefix("python -m "))
    if "jobs.denoise" in spec["entrypoint"]:
        # Nothing tells a job on an empty cluster how many GPUs will come.
        assert settings.actors == f"1:{workers['maxReplicas']}"
        assert settings.gpus_per_actor == "1"
    else:
        assert settings.workers == workers["maxReplicas"]
        assert settings.resume, "a retry finds the training that it is to go on with"
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        (main,) = template["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe"} <= set(main)
        (volume,) = [each for each in template["spec"]["volumes"] if "emptyDir" in each]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert {"name": volume["name"], "mountPath": "/dev/shm"} in main["volumeMounts"]


def test_ray_cron_job_is_a_copy_of_the_ray_job() -> None:
    copy, source = (job_spec(CLUSTER / f"{name}-denoise.yaml") for name in ("raycronjob", "rayjob"))
    assert copy == source


def test_cron_job_does_not_overlap_and_forgets() -> None:
    (cron,) = [d for d in documents(CLUSTER / "cronjob-denoise.yaml") if d["kind"] == "CronJob"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["timeZone"]
    assert {"successfulJobsHistoryLimit", "failedJobsHistoryLimit"} <= set(cron["spec"])
    once = job_spec(CLUSTER / "rayjob-denoise.yaml")
    whole = once["activeDeadlineSeconds"] * (1 + once["backoffLimit"])
    assert cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] > whole


def test_package_of_a_submitted_job_holds_the_code_and_no_data(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    for name in ("jobs", "denoise_core", "out", "photos", "x", ".venv", "tests"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "file").write_text("x")
    (checkout / "scan.tif").write_text("x")
    shutil.copy(ROOT / ".rayignore", checkout)
    create_package(str(checkout), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        assert sorted(package.namelist()) == ["denoise_core/file", "jobs/file"]


def test_cluster_launcher_file_is_valid() -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    spot = types["gpu_spot"]
    assert spot["min_workers"] == 0
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    # The head starts machines; a worker, where images are decoded, must not be able to.
    names = {
        kind: each["node_config"]["IamInstanceProfile"]["Name"] for kind, each in types.items()
    }
    assert names == {"head": "denoise-head", "gpu_spot": "denoise-worker"}
    # Ray's own choice, where none is named, has a driver too old for CUDA 12.
    assert all(each["node_config"].get("ImageId") for each in types.values())


# Safety.


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_no_container_is_root_or_may_become_it(path: Path) -> None:
    containers = 0
    for document in documents(path):
        for template in pod_templates(document):
            pod = template["spec"]["securityContext"]
            assert pod["runAsNonRoot"] is True
            assert pod["runAsUser"] > 0
            for container in template["spec"]["containers"]:
                own = container["securityContext"]
                assert own["allowPrivilegeEscalation"] is False
                assert own["capabilities"] == {"drop": ["ALL"]}
                containers += 1
    assert containers == (3 if path in RAY_MANIFESTS else 1)


@pytest.mark.parametrize("path", RAY_MANIFESTS, ids=name_of)
def test_dashboard_that_others_reach_asks_for_a_token(path: Path) -> None:
    """KubeRay has every dashboard listen on its pod's address: the submitter is another pod."""
    cluster = job_spec(path)["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    assert "RAY_AUTH_MODE" not in path.read_text(), "the operator sets it; here it could undo it"


def test_launched_dashboard_stays_on_loopback_and_all_nodes_have_the_token() -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert command.startswith("RAY_AUTH_MODE=token ")
        assert set(re.findall(r"--dashboard-host=(\S+)", command)) <= {"127.0.0.1"}
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]


SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{32,}\b|(?:SECRET|TOKEN|PASSWORD)\w*[=:]\s*[\"']?\w{12,}"
)


def secrets_in(path: Path) -> list[str]:
    found = [match[0] for match in SECRET_VALUE.finditer(path.read_text())]
    if path.suffix == ".yaml":
        for document in documents(path):
            found += [document["kind"] for _ in [0] if document.get("kind") == "Secret"]
            for _, value in walk(document):
                named = isinstance(value, dict) and SECRET_NAME.search(str(value.get("name", "")))
                found += [str(value["name"]) for _ in [0] if named and "value" in value]
    return found


def test_no_file_holds_a_secret(tmp_path: Path) -> None:
    files = [path for path in CLUSTER.iterdir() if path.suffix != ".lock"]
    assert [path.name for path in files if secrets_in(path)] == []
    for text in (
        "env: [{name: AWS_SECRET_ACCESS_KEY, value: x}]",
        "a: AKIAIOSFODNN7EXAMPLE",
        "kind: Secret",
        "run: export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI0K7",
    ):
        (tmp_path / "planted.yaml").write_text(text)
        assert secrets_in(tmp_path / "planted.yaml"), text


# The image.


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def test_image_is_of_the_locked_ray_and_uv() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    (ray_version,) = re.findall(r"^ray==([\d.]+)", lock, re.MULTILINE)
    steps = dockerfile()
    assert ("ARG", f"BASE=rayproject/ray:{ray_version}-py311-cpu") in steps
    (uv,) = re.findall(r"^UV_VERSION := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert ("FROM", f"ghcr.io/astral-sh/uv:{uv} AS uv") in steps
    for path in RAY_MANIFESTS:
        assert job_spec(path)["rayClusterSpec"]["rayVersion"] == ray_version


def test_image_is_not_root_and_holds_only_what_is_named() -> None:
    steps = dockerfile()
    users = [rest for verb, rest in steps if verb == "USER"]
    assert [user.split(":")[0].isdigit() and int(user.split(":")[0]) > 0 for user in users] == [
        True
    ]
    first_run = next(index for index, (verb, _) in enumerate(steps) if verb == "RUN")
    assert steps.index(("USER", users[0])) < first_run
    assert not [step for step in steps if step[0] == "ADD"]
    copied = [
        part
        for verb, rest in steps
        if verb == "COPY" and "--from=" not in rest
        for part in rest.split()[:-1]
        if not part.startswith("--")
    ]
    assert {"jobs", "denoise_core", "requirements.lock"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in sent
    assert {line[1:] for line in sent if line.startswith("!")} == set(copied)


def test_gpu_lock_has_what_the_gpu_extra_adds_and_nothing_else() -> None:
    names = re.findall(r"^([\w.-]+)==", (CLUSTER / "gpu.lock").read_text(), re.MULTILINE)
    assert "nvidia-cudnn-cu12" in names
    assert [name for name in names if not name.startswith("nvidia-")] == []
    lock = (ROOT / "requirements.lock").read_text()
    assert [name for name in names if re.search(rf"^{name}==", lock, re.MULTILINE)] == []


# The CronJob's script, with a `kubectl` that writes down what it is asked.

KUBECTL = """#!{python}
import sys, pathlib
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
with (here / "calls").open("a") as file:
    print(*words, file=file)
if words[0] == "patch":
    print("patched with", words[words.index("-p") + 1])
elif words[0] == "create":
    (here / "created").write_text(sys.stdin.read())
elif "jobDeploymentStatus" in words[-1]:
    states = (here / "states").read_text().split()
    (here / "states").write_text(" ".join(states[1:] or states))
    if states[0] == "broken":
        sys.exit(1)
    if states[0] != "gone":
        print(words[2], "" if states[0] == "none" else states[0])
elif words[0] == "get" and "name" in words and (here / "created").exists():
    print("rayjob.ray.io/" + words[2])
elif "message" in words[-1]:
    print("exit code 3")
"""


def run_script(folder: Path, states: str) -> subprocess.CompletedProcess[str]:
    (cron,) = [d for d in documents(CLUSTER / "cronjob-denoise.yaml") if d["kind"] == "CronJob"]
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (folder / "kubectl").write_text(KUBECTL.format(python=sys.executable))
    (folder / "sleep").write_text("#!/bin/sh\n")
    for name in ("kubectl", "sleep"):
        (folder / name).chmod(0o755)
    (folder / "states").write_text(states)
    return subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{folder}:/usr/bin:/bin", "NAME": "denoise-nightly-7", "UID_OF_JOB": "u-1"},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_cron_script_creates_one_named_and_owned_ray_job_and_ends_as_it_does(
    tmp_path: Path,
) -> None:
    done = run_script(tmp_path, "none broken Running Complete")
    assert done.returncode == 0, done.stderr
    patch = json.loads((tmp_path / "created").read_text().removeprefix("patched with "))
    assert patch["metadata"]["name"] == "denoise-nightly-7"
    assert patch["metadata"]["generateName"] is None
    (owner,) = patch["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "denoise-nightly-7", "u-1")
    # A second pod of the same Job finds it and makes no other.
    again = run_script(tmp_path, "Running Failed")
    assert again.returncode == 3
    assert "exit code 3" in again.stderr
    for states, said in (("ValidationFailed", "failed"), ("Running gone", "was deleted")):
        ended = run_script(tmp_path, states)
        assert (ended.returncode, said in ended.stderr) == (3, True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len([call for call in calls if call.startswith("create")]) == 1
