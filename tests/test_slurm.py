"""Jobs of a real Slurm on this machine, and what they rest on: stopping by signal, comparing runs."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from wandb.sdk.launch.sweeps import utils as sweeps

from cyclefit import UserError
from cyclefit.finetune import CaptionerFinetune
from cyclefit.train import cli
from tests.conftest import ROOT


def rows(run):
    return list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))


def trained_steps(run):
    return [row["step"] for row in rows(run) if "train/loss" in row] if (run / "metrics.jsonl").exists() else []


def measured(run):
    return [{k: v for k, v in row.items() if k not in ("time", "started", "gpus")} for row in rows(run)]


def last(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def launch(tmp_path_factory, world):
    """Trains in this process; at step `stop` it gets a signal."""
    folder = tmp_path_factory.mktemp("runs")
    objective = CaptionerFinetune.objective

    def run(name, *arguments, stop=None, number=signal.SIGUSR1):
        def signalled(self, batch, seeds):
            if self.global_step == stop:
                os.kill(os.getpid(), number)
            return objective(self, batch, seeds)

        small = {
            "runs": folder, "name": name, "trainer.max_steps": 6, "trainer.val_check_interval": 2,
            "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false", "data.train": world / "finetune",
            "data.validation": world / "validation", "data.validation_size": 8, "data.batch_size": 8,
            "data.epoch_size": 24, "model.round_trip_images": 0, "model.cycle.num_images": 4,
        }  # fmt: skip
        settings = [f"--{k}={v}" for k, v in small.items()]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", ["train.py"])
            patch.setattr(CaptionerFinetune, "objective", signalled)
            return cli.train(["--config=miniature_cycle_blip_reward.yaml", *settings, *arguments]), folder / name

    return run


@pytest.fixture(scope="module")
def whole(launch):
    code, run = launch("whole")
    assert code == 0
    return run


@pytest.mark.parametrize("stop", [0, 2, 3], ids=["in an epoch", "at its end", "where validation is due"])
@pytest.mark.parametrize("number", [signal.SIGUSR1])
def test_a_stopped_run_continues_as_if_it_had_not_been(launch, whole, stop, number):
    code, run = launch(f"stopped-{stop}", stop=stop, number=number)
    assert code == 128 + number
    assert last(run)["global_step"] == stop + 1
    handlers = [signal.getsignal(n) for n in cli.StopOnSignal.SIGNALS]
    assert handlers == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL]
    code, _ = launch(run.name, "--ckpt_path=auto")
    assert code == 0
    assert measured(run) == measured(whole)
    assert sum("started" in row for row in rows(run)) == 2
    for name, tensor in last(whole)["state_dict"].items():
        assert torch.equal(tensor, last(run)["state_dict"][name]), name


def test_accumulated_gradients_are_not_lost(launch):
    code, run = launch("accumulated", "--trainer.accumulate_grad_batches=2", stop=0, number=signal.SIGTERM)
    assert code == 143
    assert last(run)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 2


def test_auto_starts_where_nothing_was_saved(launch, tmp_path):
    """As after a kill between the first `best.ckpt` and `last.ckpt`: the folder and half a file are there."""
    run = tmp_path / "killed"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").touch()
    (run / "config.yaml").write_text("name: ki")
    (run / "wandb_id.txt").touch()
    arguments = [f"--runs={tmp_path}", "--trainer.max_steps=1"]
    with pytest.raises(UserError, match="already holds a run"):
        launch("killed", *arguments)
    code, _ = launch("killed", *arguments, "--ckpt_path=auto")
    assert code == 0
    assert "name: killed" in (run / "config.yaml").read_text()
    assert (run / "wandb_id.txt").read_text().strip()
    assert not list(run.glob("*.part"))


@pytest.fixture
def project(tmp_path, world):
    """The project's folder as the scripts see it, with runs and logs of its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("train.py", "evaluate.py", "src", "configs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.log"))
    (folder / "data").mkdir()
    (folder / "data" / "miniature").symlink_to(world)
    return folder


ENVIRONMENT = {"PYTHON": sys.executable, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
SMALL = [
    "--data.batch_size=8", "--data.validation_size=8", "--model.round_trip_images=0", "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--data.train=data/miniature/finetune", "--data.validation=data/miniature/validation",
]  # fmt: skip


def wandb_ids(run):
    """The ids of all W&B logs of a run."""
    return {
        path.name.removeprefix("run-").removesuffix(".wandb") for path in run.glob("wandb/offline-run-*/run-*.wandb")
    }


def test_wandb_sweep(project):
    """The command that an agent makes of the sweep's file trains under the agent's id."""
    sweep = sweeps.load_sweep_config(str(project / "slurm" / "wandb_sweep.yaml"))
    assert sweep["method"] in ("bayes", "random", "grid")
    assert sweep["metric"] == {"name": "val/CIDEr", "goal": "maximize"}
    chosen = {
        name: {"value": p["value"] if "value" in p else p.get("max", 0.0001)} for name, p in sweep["parameters"].items()
    }
    chosen["config"] = {"value": "miniature_cycle_blip_reward.yaml"}
    arguments = sweeps.create_sweep_command_args({"args": chosen})["args"]
    small = [*SMALL, "--trainer.max_steps=1", "--model.cycle.num_images=8"]
    command = [
        part for chunk in sweeps.create_sweep_command(sweep["command"])
        for part in ([*arguments, *small] if chunk == "${args}" else [chunk])
    ]  # fmt: skip
    environment = {**os.environ, **ENVIRONMENT, "WANDB_RUN_ID": "abc123", "WANDB_SWEEP_ID": "s1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = project / "runs" / "sweep-abc123"
    assert wandb_ids(run) == {"abc123"}
    assert (run / "wandb_id.txt").read_text() == "abc123\n"
    assert "weight: 10" in (run / "config.yaml").read_text()


CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install():
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root")
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    if not shutil.which("apt-get"):
        pytest.skip("Slurm is neither installed nor to be had from apt-get")
    command = [
        "apt-get",
        "-o",
        "DPkg::Lock::Timeout=120",
        "install",
        "-y",
        "--no-install-recommends",
        "slurm-wlm",
        "munge",
    ]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"apt-get could not install Slurm: {done.stderr.strip()[-200:]}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of two nodes on this machine, apart from any other Slurm here; runs its commands."""
    install()
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool-node1", "spool-node2"):
        (folder / name).mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=ports, host=host))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "WANDB"))}
    environment |= ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}

    def command(*arguments, cwd=folder):
        done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    munge = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
    try:
        command("munged", "--force", f"--socket={folder}/munge.socket", *munge.values())
        command("slurmctld")
        command("slurmd", "-N", "node1")
        command("slurmd", "-N", "node2")
        wait(lambda: command("sinfo", "-h", "-o", "%T %D") == "idle 2\n", folder / "slurmctld.log")
        yield command
    finally:
        # All that was started here, the jobs' processes included, is known by its configuration.
        mine = f"SLURM_CONF={environment['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mine in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)


def wait(until, log):
    deadline = time.monotonic() + 240  # on a busy machine; else seconds
    while not until():
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log.exists() else f"no {log}"
        time.sleep(0.2)


def test_a_run_survives_requeue_and_time_limit(slurm, project):
    """Two nodes with a task each: stopped on one rank, requeued, at the time limit; one run from first to last step."""
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
    arguments = ["--config=miniature_blip.yaml", "--name=two", *SMALL, "--data.num_workers=1", "--data.epoch_size=4000"]
    arguments += ["--trainer.max_steps=-1", "--trainer.max_time=00:00:00:50", "--trainer.val_check_interval=200"]
    script = ["slurm/train.sbatch", *arguments]
    job = slurm("sbatch", "--parsable", *size, "--time=20", "--signal=SIGUSR1@59", *script, cwd=project).strip()
    run, log = project / "runs" / "two", project / "slurm" / "logs" / f"train-{job}.log"

    def state(name):
        return re.search(rf" {name}=(\S+)", " " + slurm("scontrol", "show", "job", job))[1]

    def one_rank():
        ranks = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes()
                mine = {f"SLURM_JOB_ID={job}".encode(), b"SLURM_PROCID=1"} <= set(environment)
                if mine and b"train.py" in command and b"srun" not in command:
                    ranks.append(int(process.name))
        os.kill(min(ranks), signal.SIGUSR1)  # the others are workers of its loader

    def limit():
        slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")

    stops = []
    for stop in (one_rank, lambda: slurm("scontrol", "requeue", job), limit):
        wait(lambda: len(trained_steps(run)) > (stops[-1] if stops else 0) + 5, log)
        stop()
        wait(lambda: int(state("Restarts")) > len(stops) and state("JobState") == "PENDING", log)
        if stop is limit:
            slurm("scontrol", "update", f"JobId={job}", "TimeLimit=20")
        stops.append(len(trained_steps(run)))
        assert last(run)["global_step"] == stops[-1]
    wait(lambda: state("JobState") not in ("PENDING", "RUNNING", "COMPLETING"), log)
    assert state("JobState") == "COMPLETED", log.read_text()[-3000:]
    steps = trained_steps(run)
    assert steps == list(range(len(steps)))
    assert 0 < stops[0] < stops[1] < stops[2] < len(steps) == last(run)["global_step"]
    assert sum("started" in row for row in rows(run)) == 4
    assert wandb_ids(run) == {(run / "wandb_id.txt").read_text().strip()}
    said = log.read_text()
    assert said.count("saved; continue with") == 3
    assert "All distributed processes registered. Starting with 2 processes" in said


def test_array_sweep_ends_in_one_table(slurm, project):
    small = " ".join([*SMALL, "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.cycle.num_images=4"])
    runs = [("cycle-a", 0.5, 0), ("cycle-b", 1.0, 0), ("cycle-c", 0.5, 1), ("cycle-d", 1.0, 1)]
    text = (project / "slurm" / "sweep.txt").read_text().splitlines()[0] + "\n"
    for name, weight, seed in runs:
        text += f"{name}  --config miniature_cycle_blip_reward.yaml {small}"
        text += f" --model.cycle.weight={weight} --model.seed={seed}\n"
    (project / "slurm" / "little.txt").write_text(text)
    size = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
    submitted = slurm("bash", "slurm/sweep.sbatch", "slurm/little.txt", *size, cwd=project)
    comparison = re.search(r"job (\d+)", submitted)[1]
    log = project / "slurm" / "logs" / f"compare-{comparison}.log"
    # The last task's own id is the array's, which names all of them.
    [array] = set(slurm("squeue", "-h", "--states=all", "--name=sweep", "-o", "%F").split())
    wait((project / "runs" / "cycle-d" / "wandb_id.txt").exists, project / "slurm" / "logs" / f"sweep-{array}_3.log")
    slurm("scancel", "--signal=USR1", f"{array}_3")
    wait(lambda: not slurm("squeue", "-h"), log)
    restarts = [slurm("scontrol", "show", "job", f"{array}_{task}").partition("Restarts=")[2][0] for task in range(4)]
    assert restarts == ["0", "0", "0", "1"]
    assert len(list((project / "slurm" / "logs").glob(f"sweep-{array}_*.log"))) == 4
    with (project / "runs" / "little" / "comparison.csv").open() as file:
        table = list(csv.DictReader(file))
    found = [(row["run"], float(row["model.cycle.weight"]), int(row["model.seed"])) for row in table]
    assert found == runs
    assert {(row["group"], row["steps"], row["planned"]) for row in table} == {("little", "2", "2")}
    assert all(float(row["val/CIDEr best"]) > 0 for row in table)
    said = log.read_text()
    assert all(name in said for name, *_ in runs)
    assert "left out" not in said


def test_an_evaluation_continues_after_the_limit(slurm, project):
    shards = json.dumps({"test": "data/miniature/test"})
    arguments = ["--config", "miniature_evaluate.yaml", f"--shards={shards}", "--limit=12", "--num_candidates=2",
                 "--gallery=4", "--generator.steps=2", "--out=runs/evaluation", "--batch_size=2"]  # fmt: skip
    script = ["slurm/evaluate.sbatch", "captions", *arguments]
    job = slurm("sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", *script, cwd=project).strip()
    log, folder = project / "slurm" / "logs" / f"evaluate-{job}.log", project / "runs" / "evaluation"
    candidates = folder / "candidates-test.jsonl"
    wait(lambda: candidates.exists() and candidates.read_text().count("\n") > 1, log)
    slurm("scancel", "--signal=USR1", job)
    wait(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), log)
    wait(lambda: not slurm("squeue", "-h"), log)
    assert (folder / "report.html").exists(), log.read_text()[-3000:]


def test_an_array_works_on_the_parts_of_a_matrix(slurm, project):
    """Two tasks with a part of the inputs each, and a job after them that finds everything made."""
    shards = json.dumps({"test": "data/miniature/test"})
    arguments = ["--config", "miniature_matrix.yaml", f"--shards={shards}", "--limit=4", "--out=runs/matrix"]
    script = ["--gpus-per-node=0", "--cpus-per-task=1", "slurm/evaluate.sbatch", "matrix", *arguments]
    array = slurm("sbatch", "--parsable", "--array=1-2", *script, cwd=project).strip()
    job = slurm("sbatch", "--parsable", f"--dependency=afterok:{array}", *script, cwd=project).strip()
    log, folder = project / "slurm" / "logs" / f"evaluate-{job}.log", project / "runs" / "matrix"
    wait(lambda: not slurm("squeue", "-h"), log)
    assert (folder / "report.html").exists(), log.read_text()[-3000:]
    assert sorted(path.parent.name for path in folder.glob("parts/*/made.*")) == ["1-of-2", "2-of-2"]
    assert "test, prompt → image → caption: 4 images" in log.read_text()
