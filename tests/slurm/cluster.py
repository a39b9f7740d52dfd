"""A real SLURM on this machine: one slurmctld, two slurmd nodes, pretended CPUs and GPUs. Needs root, no systemd.

Everything it reads and writes lies in one folder of its own, and it listens on ports that were free: a SLURM that the
machine may have otherwise is neither seen nor touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from prunadapt_ds.launchers import free_port

NODES, CPUS, GPUS = 2, 64, 8  # per node, whatever the machine has
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
PACKAGES = "slurm-wlm munge openmpi-bin libopenmpi-dev"

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SwitchType=switch/none
InactiveLimit=0
MinJobAge=3600
FirstJobId={first_job}
KillWait=10
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=normal Nodes=ALL Default=YES DefaultTime=30 MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL DefaultTime=30 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here, or nothing."""
    if lacking := [name for name in NEEDED if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]:
        return f"no SLURM here ({', '.join(lacking)}); as root: apt-get install -y --no-install-recommends {PACKAGES}"
    return "" if os.geteuid() == 0 else "a SLURM for tests can only be started by root"


class Cluster:
    """Start on entering, stop on leaving. `environment` is what its commands need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._munge()
            self._configure()
            self._start("slurmctld", "-D")
            for i in range(NODES):
                self._start("slurmd", "-D", "-N", f"node{i}")
            deadline = time.monotonic() + 60
            while (
                self.command("sinfo", "-h", "-N", "-p", "normal", "-t", "idle", "-o", "%N", check=False).count("node")
                != NODES
            ):
                if time.monotonic() > deadline:
                    logs = "\n".join(p.read_text()[-2000:] for p in self.folder.glob("*.log"))
                    raise RuntimeError(f"SLURM does not start\n{logs}")
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.command("scancel", "--full", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            daemon = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self.daemons.append(daemon)

    def _munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "log-file": folder / "log", "pid-file": folder / "pid", "seed-file": folder / "seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._start("munged", "--foreground", "--force", f"--socket={folder}/socket", *options)
        while not (folder / "socket").exists():
            assert self.daemons[-1].poll() is None, (self.folder / "munged.out").read_text()
            time.sleep(0.05)

    def _configure(self) -> None:
        host, folder = socket.gethostname().split(".")[0], self.folder
        (folder / "controller").mkdir()
        ports = set[int]()
        while len(ports) < NODES + 1:
            ports.add(free_port())
        controller, *nodes = ports
        first_job = random.SystemRandom().randrange(1, 2**20)  # ranks meet at a port made of it: clusters must differ
        lines = [CONFIG.format(host=host, folder=folder, controller_port=controller, first_job=first_job)]
        for i in range(NODES):
            (folder / f"node{i}").mkdir()
            lines.append(
                f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes[i]} Sockets=1 "
                f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=64000 Gres=gpu:{GPUS} State=UNKNOWN\n"
            )
        (folder / "slurm.conf").write_text("".join(lines))
        for i in range(GPUS):  # a device file each, as for /dev/null
            os.mknod(folder / f"gpu{i}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")

    # ------------------------------------------------------------------------------------------------ commands

    def command(self, *words: str, check: bool = True, env: Mapping[str, str] | None = None, **options: object) -> str:
        environment = {**self.environment, **(env or {})}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return str(done.stdout)

    def submit(self, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """The new job's id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, env=env).strip()

    def jobs(self, job: str) -> dict[str, dict[str, str]]:
        """What SLURM knows of a job or of all elements of an array, by "JOB" or "ARRAY_INDEX"."""
        found = {}
        for line in self.command("scontrol", "-o", "show", "job", job, check=False).splitlines():
            values = dict(re.findall(r"(\w+)=(\S*)", line))
            array, index = values.get("ArrayJobId"), values.get("ArrayTaskId")
            found[f"{array}_{index}" if array else values["JobId"]] = values
        return found

    def story(self, job: str) -> str:
        """What the controller and the nodes said of a job, for a test that fails."""
        lines = [line for p in sorted(self.folder.glob("*.log")) for line in p.read_text().splitlines()]
        return "\n".join(line for line in lines if f"JobId={job}" in line or "error" in line)

    def state(self, job: str) -> str:
        return next(iter(self.jobs(job).values()))["JobState"]

    def wait(self, job: str, *states: str, timeout: float = 600) -> dict[str, dict[str, str]]:
        """Until every element is in one of `states` (default: has ended for good). Requeued jobs do not wait to start."""
        ended = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
        deadline = time.monotonic() + timeout
        resting: dict[str, float] = {}
        while True:
            jobs = self.jobs(job)
            if jobs and all(values["JobState"] in ended for values in jobs.values()):
                return jobs
            for values in jobs.values():
                # SLURM lets a requeued job rest for two minutes, so that its nodes have forgotten it; five seconds do here.
                if values["JobState"] == "PENDING" and values.get("Reason") == "BeginTime":
                    first = resting.setdefault(values["JobId"] + values["Restarts"], time.monotonic())
                    if time.monotonic() - first > 5:
                        self.command("scontrol", "update", f"JobId={values['JobId']}", "StartTime=now", check=False)
            if time.monotonic() > deadline:
                seen = {name: values["JobState"] for name, values in jobs.items()}
                raise TimeoutError(f"job {job} after {timeout:.0f} s: {seen}")
            time.sleep(0.3)


if __name__ == "__main__":  # a cluster to play with
    import tempfile

    if why := missing():
        sys.exit(why)
    with tempfile.TemporaryDirectory() as name, Cluster(Path(name)) as cluster:
        print(f"export SLURM_CONF={name}/slurm.conf   # until this program is ended")
        with contextlib.suppress(KeyboardInterrupt):
            cluster.daemons[1].wait()
