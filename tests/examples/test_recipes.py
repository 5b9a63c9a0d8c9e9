"""The recipes for cluster managers, as far as one machine can try them."""

import importlib.util
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import textwrap

import pytest

from tests.multi_process import ROOT
from tfqcomm.cluster import Cluster

EXAMPLES = ROOT / "examples"
YAML = EXAMPLES / "kubernetes" / "train.yaml"
SERVERS = EXAMPLES / "kubernetes" / "parameter_server.yaml"
KUBEFLOW = EXAMPLES / "kubeflow" / "train.yaml"
KINDS = {
    YAML: ["Service", "Job", "NetworkPolicy"],
    SERVERS: ["Service", "ConfigMap", "StatefulSet", "StatefulSet", "Job", "NetworkPolicy"],
    KUBEFLOW: ["TrainingRuntime", "TrainJob"],
}
SBATCH = EXAMPLES / "slurm" / "train.sbatch"
SCRIPT = EXAMPLES / "resume_after_a_crash.py"


def executable(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(command, folder, **variables) -> subprocess.CompletedProcess:
    """Runs a command for which the programs in `folder` come first."""
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def field(name: str) -> str:
    """The one value of a field in the YAML file, which says some of them several times."""
    (value,) = set(re.findall(rf"^ *(?:- )?{name}: ([^\s#]+)", YAML.read_text(), re.M))
    return value.strip('"')


def scripts(manifest: pathlib.Path) -> list[str]:
    """What the shells of its containers are given."""
    found = re.findall(r"^( *)- \|\n((?:\1  .*\n)+)", manifest.read_text(), re.M)
    return [textwrap.dedent(block) for _, block in found]


@pytest.mark.parametrize("manifest", KINDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_manifests_are_well_formed(manifest):
    text = manifest.read_text()
    if importlib.util.find_spec("yaml"):  # not among our requirements
        found = importlib.import_module("yaml").safe_load_all(text)
        assert len(list(found)) == len(KINDS[manifest])
    assert re.findall(r"^kind: (\w+)", text, re.M) == KINDS[manifest]
    for number, line in enumerate(text.splitlines(), start=1):
        indent = len(line) - len(line.lstrip(" "))
        assert "\t" not in line and indent % 2 == 0, f"line {number}"


def test_kubernetes_says_the_same_thing_in_all_places():
    assert field("completions") == field("parallelism") == field("value") == "4"
    assert field("subdomain") == field("job-name") == "train"
    assert field("port") == re.search(r"train-%g\.train:(\d+)", YAML.read_text())[1]


def test_each_kubernetes_pod_makes_itself_a_tf_config(tmp_path, monkeypatch):
    (script,) = scripts(YAML)
    for index in range(4):
        variables = {"WORKERS": "4", "JOB_COMPLETION_INDEX": str(index)}
        cluster, _ = cluster_of(script, tmp_path, monkeypatch, **variables)
        assert cluster.jobs == {"worker": [f"train-{i}.train:2222" for i in range(4)]}
        assert cluster.task == f"worker {index}"


def test_each_kubeflow_node_makes_itself_a_tf_config(tmp_path, monkeypatch):
    """Of the name that its JobSet gives it: <jobset>-<replicated job>-<job>-<index>.<jobset>."""
    (script,) = scripts(KUBEFLOW)
    for index in range(4):
        variables = {"JOB": "train", "WORKERS": "4", "JOB_COMPLETION_INDEX": str(index)}
        cluster, _ = cluster_of(script, tmp_path, monkeypatch, **variables)
        assert cluster.jobs == {"worker": [f"train-node-0-{i}.train:2222" for i in range(4)]}
        assert cluster.task == f"worker {index}"


def test_each_task_of_parameter_servers_makes_itself_a_tf_config(tmp_path, monkeypatch):
    text = SERVERS.read_text()
    cluster = re.search(r"^  cluster: \|\n((?: {4}.*\n)+)", text, re.M)[1]
    replicas = dict(re.findall(r"name: train-(\w+)\nspec:\n  replicas: (\d+)", text))
    assert replicas == {"worker": "4", "ps": "2"}
    for script in scripts(SERVERS):
        job = re.search(r'"type\\": \\"(\w+)', script)[1]
        for index in range(int(replicas.get(job, 1))):
            variables = {"CLUSTER": cluster, "HOSTNAME": f"train-{job}-{index}"}
            found, command = cluster_of(script, tmp_path, monkeypatch, **variables)
            assert found.task == f"{job} {index}"
            assert found.address == f"train-{job}-{index}.train:2222"
            runs = "parameter_server.py" if job == "chief" else "-m tfqcomm.launch --serve"
            assert command == runs


def cluster_of(script, folder, monkeypatch, **variables) -> tuple[Cluster, str]:
    """What a container's script puts into TF_CONFIG, and what it has Python run."""
    executable(folder / "python", '#!/bin/sh\nprintf "%s\\n" "$*" "$TF_CONFIG"\n')
    done = run(["/bin/sh", "-c", script], folder, **variables)
    assert done.returncode == 0, done.stderr
    command, config = done.stdout.split("\n", 1)
    monkeypatch.setenv("TF_CONFIG", config)
    return Cluster.from_environment(), command


@pytest.fixture
def slurm(tmp_path):
    """Runs the batch script with an `srun` that ends with the given exit codes, one by one."""

    def submit(*codes: int, **variables):
        (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
        executable(
            tmp_path / "srun",
            f"""#!/bin/bash
            code=$(head -1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes
            echo "attempt $TFQCOMM_RESTART_COUNT: $*"; exit $code
            """,
        )
        common = {"SLURM_SUBMIT_DIR": "/submitted", "SLURM_JOB_ID": "7", "PAUSE": "0"}
        return run(["bash", str(SBATCH)], tmp_path, **common, **variables)

    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    return submit


def test_slurm_starts_all_again_until_they_succeed(slurm):
    done = slurm(1, 137, 0)
    assert done.returncode == 0
    attempts = [line for line in done.stdout.splitlines() if line.startswith("attempt")]
    assert [line.split()[1] for line in attempts] == ["0:", "1:", "2:"]
    assert attempts[0].endswith("resume_after_a_crash.py --slurm --backup_dir=/submitted/backup-7")
    assert "--kill-on-bad-exit=1" in attempts[0]


def test_slurm_gives_up_with_the_last_exit_code(slurm):
    done = slurm(1, 9, MAX_RESTARTS="1")
    assert done.returncode == 9
    assert done.stdout.count("attempt") == 2


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_script_trains_under_the_launcher(tmp_path):
    options = ["--workers=2", str(SCRIPT), f"--backup_dir={tmp_path}", "--epochs=2"]
    done = subprocess.run(
        [sys.executable, "-m", "tfqcomm.launch", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "start number 0" in done.stdout
    assert "Epoch 2/2" in done.stdout


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_script_trains_under_slurm(tmp_path):
    variables = {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(SCRIPT), "--slurm", f"--backup_dir={tmp_path}", "--epochs=1"]
    done = run(command, tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert "Epoch 1/1" in done.stdout or "accuracy" in done.stdout


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_workers_under_ray_learn(tmp_path):
    pytest.importorskip("ray")  # not among our requirements
    done = subprocess.run(
        [sys.executable, EXAMPLES / "ray" / "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    accuracy, ratio = map(
        float, re.search(r"accuracy ([\d.]+), ([\d.]+) times", done.stdout).groups()
    )
    assert accuracy > 0.9 and ratio > 10
