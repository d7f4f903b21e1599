"""Jobs: what is submitted, in which order, and a sweep that runs here with one job preempted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from absl import flags

from infsub import files, shards
from infsub import main as infsub_main
from launch import sweep

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests/tiny.py")


def by_name(jobs):
    return {job.name: job for job in jobs}


def test_a_sweep_is_every_run_trained_evaluated_in_shards_and_reported(tmp_path):
    jobs = sweep.plan([TINY], [0, 3], 2, tmp_path, ["--config.train.num_epochs=3"])
    named = by_name(jobs)
    parts = ["train", "evaluate-0-of-2", "evaluate-1-of-2", "report"]
    assert [*named] == [*(f"tiny-seed_{s}-{part}" for s in (0, 3) for part in parts), "join"]
    seen = set()
    for job in jobs:
        assert set(job.needs) <= seen, "a job stands before what it needs"
        seen.add(job.name)
        assert job.command[:2] == (sys.executable, "-m")
    shard = named["tiny-seed_3-evaluate-1-of-2"]
    assert shard[2:] == (("tiny-seed_3-train",), "afterok")
    assert shard.command[3:] == (
        f"--config={TINY}",
        f"--workdir={tmp_path}/tiny-seed_3",
        "--config.train.num_epochs=3",
        "--config.seed=3",
        "--mode=evaluate",
        "--shard=1/2",
    )
    report = named["tiny-seed_3-report"]  # of what there is, and says what is not
    assert report[2:] == (
        ("tiny-seed_3-evaluate-0-of-2", "tiny-seed_3-evaluate-1-of-2"),
        "afterany",
    )
    assert named["join"].needs == ("tiny-seed_0-report", "tiny-seed_3-report")


PUBLISHED = "binarized_mnist-gaussian-697ad6c2/train-2c6320a0"


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (f"{ROOT}/configs/published.py:run={PUBLISHED}", []),
        (TINY, ["--config.model.import=my_module:build"]),
        ("own.py", []),
    ],
)
def test_what_is_trained_already_is_not_trained(tmp_path, config, overrides):
    own = tmp_path / "own.py"
    own.write_text(Path(TINY).read_text().replace(
        "return config", "config.model.imported = 'my_module:build'; return config", 1
    ))  # fmt: skip
    jobs = sweep.plan([config.replace("own.py", str(own))], [0], 2, tmp_path, overrides)
    assert [re.sub(".*seed_0-", "", job.name) for job in jobs] == [
        "evaluate-0-of-2", "evaluate-1-of-2", "report",
    ]  # fmt: skip
    assert [job.needs for job in jobs[:2]] == [(), ()]
    assert "--mode=evaluate" in jobs[0].command


@pytest.mark.parametrize(
    ("seed", "overrides"), [(1, []), (0, ["--config.train.num_epochs=10"])], ids=str
)
def test_other_weights_than_the_published_are_trained(tmp_path, seed, overrides):
    config = f"{ROOT}/configs/published.py:run={PUBLISHED}"
    first = sweep.plan([config], [seed], 1, tmp_path, overrides)[0]
    assert "--mode=train" in first.command


def test_shards_of_an_experiment_share_its_cells(tmp_path):
    config = str(ROOT / "configs/paper/test_set.py")
    jobs = sweep.plan([config], [0], 3, tmp_path)
    assert [job.name.removeprefix("test_set-seed_0-") for job in jobs] == [
        "run-0-of-3", "run-1-of-3", "run-2-of-3", "report",
    ]  # fmt: skip
    assert all(job.needs == () for job in jobs[:3])


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-1,7", [0, 1, 7]), ("5,2", [5, 2])]
)
def test_seeds(text, seeds):
    assert sweep._seeds(text) == seeds


def test_the_commands_are_understood(tmp_path):
    for job in sweep.plan([TINY, f"{ROOT}/configs/model.py:dataset=mnist"], [0], 2, tmp_path):
        module = job.command[2]
        if module == "infsub.main":
            known = set(flags.FLAGS)
            given = {argument.partition("=")[0][2:] for argument in job.command[3:]}
            assert {name for name in given if not name.startswith("config.")} <= known
        assert module in ("infsub.main", "infsub.report")
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", job.name)  # of a file of logs


def sweep_here(*arguments):
    return [sys.executable, "-m", "launch.sweep", f"--config={TINY}", *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nothere.py"], "--config=nothere.py: there is no such file"),
        ([f"--config={TINY}"], "two configs are called tiny-seed_0"),
        (["--shards=0"], "--shards=0 must be at least 1"),
        (["--cluster=local", "--parallel=0"], "--parallel=0 must be at least 1"),
        (["--slurm=gpu"], "'gpu' is not NAME=VALUE"),
        (["--seeds=3-1"], "'3-1' names no seed"),
        ([f"--config={ROOT}/configs/model.py:postrior=ffg"], "postrior"),
        (["--", "--config.train.num_epoch=3"], "did you mean config.train.num_epochs?"),
        (["--", "--config.train.num_epochs=some"], "'some'; it must be a whole number"),
        (["--", "--config.train.num_epochs=-1"], "config.train.num_epochs is -1; it must be"),
        ([f"--config={ROOT}/configs/paper/test_set.py", "--", "--config.train.num_epochs=-1"],
         "num_epochs is -1"),
        ([f"--config={ROOT}/configs/paper/test_set.py", "--", "--config.evaluate.name=x"],
         "evaluate.name is set by the experiment"),
        (["--", "--shrad=0/2"], "shrad"),
        (["--", "--config.seed=5"], "the sweep says that to each run; give it --seeds"),
        (["--cluster=local", "--gpus=1"], "are 2, and this machine has 1: give fewer"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_a_sentence(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    configs = [] if any("test_set" in argument for argument in arguments) else [f"--config={TINY}"]
    with pytest.raises(SystemExit) as ended:
        sweep.main([*configs, f"--workdir={tmp_path}", "--dry-run", *arguments])
    assert message in f"{ended.value.code} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_the_table_of_all_is_of_every_evaluation(tmp_path):
    overrides = ["--config.evaluate.name=second", "--config.train.num_seeds=2"]
    jobs = sweep.plan([TINY], [0, 7], 1, tmp_path, overrides)
    *_, flag, first, second, third, fourth = by_name(jobs)["join"].command
    assert flag == "--workdirs"
    assert first == f"tiny-seed_0-seed_0-second={tmp_path}/tiny-seed_0/seed_0/second"
    assert fourth == f"tiny-seed_7-seed_1-second={tmp_path}/tiny-seed_7/seed_1/second"
    assert len({first, second, third, fourth}) == 4


@pytest.mark.parametrize(
    ("visible", "num_gpus", "seen"),
    [
        (None, 0, {"None"}),
        ("4,5", 0, {"4,5"}),
        ("4,5", 1, {"4", "5"}),
        ("4,5,6,7", 2, {"4,5", "6,7"}),
    ],
)
def test_jobs_here_have_the_gpus_that_are_theirs(tmp_path, monkeypatch, visible, num_gpus, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    show = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    )
    jobs = [
        sweep.Job(str(i), (sys.executable, "-c", show, str(tmp_path / f"job{i}"))) for i in range(2)
    ]
    states = sweep.run_local(jobs, tmp_path / "jobs", {"timeout_min": 5}, 2, num_gpus)
    assert states == {"0": "done", "1": "done"}
    assert {(tmp_path / f"job{i}").read_text() for i in range(2)} == seen


@pytest.mark.filterwarnings("ignore:os.fork")  # here jax is in the process
def test_a_cancelled_job_is_not_queued_again(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\necho "$@" | grep -q -e "--jobs=8" && echo 8\n')
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    requeued = []
    monkeypatch.setattr(os, "kill", lambda pid, number: requeued.append(number))
    monkeypatch.setattr(sweep, "GRACE", 0)
    for job, want in (("8", []), ("7", [signal.SIGUSR2])):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(RuntimeError, match="exit code 143"):
            sweep.Command(["sh", "-c", "exit 143"])()
        assert requeued == want


def test_a_tilde_is_the_users_home(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    assert sweep.main([f"--config={TINY}", "--workdir=~/sweep", "--dry-run"]) == 0
    assert "--workdir=/home/me/sweep/tiny-seed_0 " in capsys.readouterr().out


FAKE_SBATCH = """#!/bin/sh
number=$(ls {folder} | grep -c job)
cp "$1" {folder}/job$number
echo "Submitted batch job $((100 + number))"
"""


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """A folder where sbatch leaves what it was given, as job0, job1, …; their ids are 100, 101, …"""
    folder, bin_folder = tmp_path / "queue", tmp_path / "bin"
    folder.mkdir()
    bin_folder.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH.format(folder=folder)), ("srun", "#!/bin/sh\n")):
        path = bin_folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return folder


# In a process of its own: submitit's log holds on to the stderr that pytest takes away.
UNPICKLE = """
import json, pickle, sys
from pathlib import Path
for path in map(Path, sys.argv[1:]):
    print(json.dumps(pickle.loads(path.read_bytes()).function.command))
"""


def test_slurm_gets_what_the_dry_run_has_shown(tmp_path, fake_slurm):
    workdir = tmp_path / "sweep"

    def run(*arguments):
        command = sweep_here(
            f"--workdir={workdir}", *arguments, "--", "--config.train.num_epochs=3"
        )
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    asked = ["--seeds=0-1", "--shards=2", "--gpus=1", "--minutes=60", "--slurm=partition=gpu"]
    asked += ["--slurm=mail-type=END", "--slurm=cpus-per-task=8"]
    shown = run(*asked, "--dry-run")
    assert not workdir.exists()
    assert not list(fake_slurm.iterdir())
    listed = dict(line.split()[::-1] for line in run(*asked))
    jobs = sweep.plan([TINY], [0, 1], 2, workdir, ["--config.train.num_epochs=3"])
    assert [*listed] == [job.name for job in jobs]
    pickles = [workdir / "jobs" / f"{listed[job.name]}_submitted.pkl" for job in jobs]
    loaded = subprocess.run(
        [sys.executable, "-c", UNPICKLE, *pickles], capture_output=True, text=True, cwd=ROOT
    )
    commands = [tuple(json.loads(line)) for line in loaded.stdout.splitlines()]
    assert commands == [job.command for job in jobs]
    for number, job in enumerate(jobs):
        text = (fake_slurm / f"job{number}").read_text()
        lines = dict(re.findall(r"#SBATCH --([a-z-]+)=?(.*)", text))
        assert lines["partition"] == "gpu"
        assert lines["mail-type"] == "END"  # no name of submitit's
        (srun,) = (line for line in text.splitlines() if line.startswith("srun "))
        assert "--cpus-per-task=8" in srun.split()
        assert re.findall("#SBATCH --cpus-per-task=(.*)", text) == ["8"]  # once, and not ours
        assert lines["gpus-per-node"] == "1"
        assert lines["time"] == "60"
        assert lines["requeue"] == ""
        assert lines["signal"] == "USR2@120"  # on which the command saves, and is queued again
        assert lines["job-name"] == job.name
        ids = ":".join(listed[name] for name in job.needs)
        assert lines.get("dependency", "").strip("'") == (f"{job.kind}:{ids}" if ids else "")
        block = sweep.describe(job, {}).splitlines()
        assert block == [line for line in block if line in shown]


def test_kubernetes_is_an_indexed_job_whose_pods_know_their_shard():
    job = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # as podFailurePolicy wants it
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environment["JOB_COMPLETIONS"])
    command = shlex.split(shlex.join(container["command"]))
    assert command[:3] == ["python", "-m", "infsub.main"]
    (shard,) = (argument[8:] for argument in command if argument.startswith("--shard="))
    for index in range(spec["completions"]):
        given = environment | {"JOB_COMPLETION_INDEX": str(index)}
        assert shards.parse(shard, given) == shards.Shard(index, spec["completions"])
    assert (ROOT / next(a for a in command if a.startswith("--config="))[9:]).is_file()
    workdir = next(a for a in command if a.startswith("--workdir="))[10:]
    assert workdir.startswith(container["volumeMounts"][0]["mountPath"])
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    codes = [
        rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert [(code["containerName"], code["values"]) for code in codes] == [("infsub", [1, 2])]


def test_skypilot_runs_the_same_command():
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    command = shlex.split(task["run"])
    assert command[1:3] == ["-m", "infsub.main"]
    assert f"--python {command[0]} '.[cuda13,plots]'" in task["setup"]  # what is there may be 3.10
    given = {a.partition("=")[0][2:]: a.partition("=")[2] for a in command[3:]}
    assert given.keys() == {"config", "workdir"}
    assert (ROOT / given["config"]).is_file()
    assert given["workdir"].startswith(tuple(task["file_mounts"]))
    assert task["num_nodes"] == 1  # a bucket has no locks
    assert infsub_main.WORKDIR.name == "workdir"


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_sbatch_runs_the_command_on_its_cores_and_requeues_on_both_signals(tmp_path, code):
    script = ROOT / "launch/slurm.sbatch"
    for name, text in (("srun", f"exit {code}"), ("scontrol", "")):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/called\n{text}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", str(script), "configs/quickstart.py", "runs/a b", "--config.seed=3"]
    done = subprocess.run(command, env=environment | {"SLURM_CPUS_PER_TASK": "6"})
    assert done.returncode == code
    srun, *others = (tmp_path / "called").read_text().splitlines()
    (tmp_path / "called").unlink()
    # Of its own accord the srun of SLURM 22.05 to 23.02 takes one core, whatever the job has.
    assert srun == (
        "srun --cpus-per-task=6 .venv/bin/python -m infsub.main --config=configs/quickstart.py "
        "--workdir=runs/a b --config.seed=3"
    )
    assert others == (["scontrol requeue 7"] if code in (130, 143) else [])
    assert "#SBATCH --requeue" in script.read_text()
    # One task of an array has the array's own number, which would requeue them all.
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    subprocess.run(command, env=environment | array)
    _, *others = (tmp_path / "called").read_text().splitlines()
    assert others == (["scontrol requeue 7_3"] if code in (130, 143) else [])


def processes(*words):
    """Of the running commands those whose arguments have all these words: their pids."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().decode(errors="replace").split("\0")
            if set(words) <= set(arguments):
                found.append(int(path.parent.name))
    return found


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.slow
@pytest.mark.thorough
def test_a_sweep_runs_here_and_a_preempted_job_is_requeued_and_continues(tmp_path):
    overrides = ["--config.train.num_epochs=300", "--config.train.checkpoint_seconds=1000"]
    overrides += ["--config.evaluate.per_class=0", "--config.evaluate.first=5"]
    overrides += ["--config.evaluate.local.families=()"]
    overrides += ["--config.evaluate.elbo_samples=5", "--config.evaluate.iwae_samples=5"]
    overrides += ["--config.evaluate.ais.num_chains=2", "--config.evaluate.ais.num_temperatures=2"]
    workdir = tmp_path / "sweep"
    options = [
        f"--workdir={workdir}",
        "--cluster=local",
        "--seeds=0-1",
        "--shards=2",
        "--minutes=30",
    ]
    running = subprocess.Popen(
        sweep_here(*options, "--", *overrides), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    run = workdir / "tiny-seed_0"
    deadline = time.monotonic() + 200
    while len(files.read_rows(run / "metrics.jsonl")) < 25:  # all is compiled
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)
    (trains,) = processes("infsub.main", "--mode=train", f"--workdir={run}")
    os.kill(parent(trains), signal.SIGUSR2)  # what SLURM sends
    out, _ = running.communicate(timeout=500)
    assert running.returncode == 0, out
    assert out.count("done: ") == 9, out
    log = next(p for p in (workdir / "jobs").glob("*_log.out") if "--mode=train" in p.read_text()
               and "seed_0" in p.read_text()).read_text()  # fmt: skip
    assert log.count("$ ") == 2  # it was started twice
    errors = "".join(p.read_text() for p in (workdir / "jobs").glob("*_log.err"))
    assert re.search(r"stopped at step \d+, saved", errors)
    assert re.search(r"continuing from step \d+ of 4800", errors)
    for seed in (0, 1):
        folder = workdir / f"tiny-seed_{seed}"
        assert files.read_json(folder / "summary.json")["ended"] == "finished"
        rows = shards.read(folder, "rows")
        assert sorted(row["index"] for row in rows) == list(range(5))
        assert len(shards.paths(folder, "rows")) == 2
        assert (folder / "table.md").exists()
    assert "tiny-seed_1" in (workdir / "report/table.md").read_text()
