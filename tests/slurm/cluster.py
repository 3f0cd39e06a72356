"""A real SLURM on this machine, for tests: munge, a controller and some nodes, all on the loopback interface.

    with Cluster(Path("/tmp/c")) as cluster:
        job = cluster.submit("job.sh", "--nodes=2")
        cluster.wait(job)

`slurmd -N name` starts several nodes on one machine (Debian builds it so). The daemons run as this user, with a munge
of their own, so that a SLURM or munge of the system is not touched. Two partitions share the nodes: jobs in `urgent`
preempt those in `work`, which are requeued after a grace time.

Where something is not as on a cluster: every node has this machine's host name; memory and CPUs are neither limited nor
bound; there is no accounting: `scontrol` alone remembers jobs, and a small `sacct` that asks the controller stands for
SLURM's own where submitit looks for a job's state; a requeued job may start again
after a few seconds (`cred_expire`) and not after two minutes; the user's signal is sent at preemption
(`preempt_send_user_signal`), which is a choice of the site.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = ("/usr/sbin", "/sbin")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=50000,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
KillWait={kill_wait}
InactiveLimit=0
MinJobAge=86400
ReturnToService=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN\n"
SACCT = """#!/bin/sh
# Submitit calls: sacct -o JobID,State,NodeList --parsable2 -j ID -j ID
while [ $# -gt 0 ]; do
    case $1 in -j) jobs="$jobs,$2"; shift ;; esac
    shift
done
echo "JobID|State|NodeList"
squeue --noheader --states=all --array --format="%i|%T|%N" --jobs="${jobs#,}"
"""
PARTITIONS = """
PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *SBIN])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """Starts with the context and ends with it, its jobs too.

    Args:
        folder: where it lives; a short path, because UNIX sockets have names of at most 107 bytes.
        nodes: how many.
        cpus: that each node claims to have.
        grace: seconds from a preemption to the end of the job.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4, grace: int = 60, kill_wait: int = 10) -> None:
        self.folder, self.nodes, self.cpus, self.grace, self.kill_wait = folder, nodes, cpus, grace, kill_wait
        self.config = folder / "slurm.conf"
        # Of SLURM's own variables none: a surrounding job must not be taken for this cluster's.
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        path = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", ""), *SBIN])
        # Lightning finds the first node by its name, which no name service knows.
        self.environment = own | {"PATH": path, "SLURM_CONF": str(self.config), "MASTER_ADDR": "127.0.0.1"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D", "-c", "-f", self.config)
            for name in self._names:
                self._start("slurmd", "-D", "-N", name, "-f", self.config)
            self._await(self._is_up, 60, "the nodes are up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.config.exists() and self._daemons:
            subprocess.run(
                ["scancel", "--signal=KILL", "--full", f"--user={_user()}"], env=self.environment, timeout=30
            )
            subprocess.run(["scancel", f"--user={_user()}"], env=self.environment, timeout=30)
            deadline = time.monotonic() + 20
            while list(self.folder.glob("spool/*/*_[0-9]*.*")) and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    @property
    def _names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def run(self, *command: object, timeout: float = 60, check: bool = True) -> str:
        """The output of a command that talks to the cluster."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} failed with {done.returncode}: {done.stderr}{self.logs()}")
        return done.stdout

    def submit(self, *command: object, **variables: str) -> str:
        """`sbatch`: the id of the new job."""
        exported = ",".join(["ALL", *(f"{key}={value}" for key, value in variables.items())])
        return self.run("sbatch", "--parsable", f"--export={exported}", *command).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, timeout: float = 300) -> dict[str, str]:
        """The facts of a job that has ended for good."""
        self._await(lambda: self.facts(job)["JobState"] in ENDED, timeout, f"job {job} ends", job)
        return self.facts(job)

    def wait_for_text(self, job: str, path: Path, text: str, count: int = 1, timeout: float = 180) -> None:
        """Until a file of a running job holds a text so many times."""

        def is_there() -> bool:
            if self.facts(job)["JobState"] in ENDED:
                raise RuntimeError(f"job {job} ended before {text!r} was said:\n{path.read_text()[-4000:]}")
            return path.exists() and path.read_text().count(text) >= count

        self._await(is_there, timeout, f"{text!r} in {path}", job)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "".join(f"\n--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def _await(self, condition, seconds: float, what: str, job: str | None = None) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                facts = "" if job is None else str(self.facts(job))
                raise TimeoutError(f"waited {seconds} s until {what}; {facts}{self.logs()}")
            if broken := [daemon.args for daemon in self._daemons if daemon.poll() is not None]:
                raise RuntimeError(f"{broken} ended{self.logs()}")
            time.sleep(0.2)

    def _is_up(self) -> bool:
        found = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=work", "--format=%T"],
            env=self.environment, capture_output=True, text=True, timeout=20,
        ).stdout.split()  # fmt: skip
        return len(found) == self.nodes and set(found) == {"idle"}

    def _configure(self) -> None:
        for name in ("state", *(f"spool/{node}" for node in self._names)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munge refuses a socket that others could replace
        ports, host = _free_ports(self.nodes + 1), socket.gethostname().split(".")[0]
        # Lightning's port is 15000 + the last four digits of the job's id.
        first_job = ports[0] % 9000 + 1
        values = {"folder": self.folder, "host": host, "user": _user(), "port": ports[0], "first_job": first_job}
        text = CONFIG.format(**values, kill_wait=self.kill_wait)
        for name, port in zip(self._names, ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=self.cpus)
        self.config.write_text(text + PARTITIONS.format(grace=self.grace))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "sacct").write_text(SACCT)
        (self.folder / "bin" / "sacct").chmod(0o755)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key": key.name, "socket": "munge.socket", "pid": "munge.pid", "seed": "munge.seed"}
        options = [
            f"--{kind}{'' if kind == 'socket' else '-file'}={self.folder / name}" for kind, name in files.items()
        ]
        # --force: warnings about who may write the folders above are of no concern here.
        self._start("munged", "--foreground", "--force", *options, f"--log-file={self.folder / 'munge.log'}")
        self._await((self.folder / "munge.socket").exists, 20, "munge answers")

    def _start(self, *command: object) -> None:
        output = (self.folder / f"{command[0]}{len(self._daemons)}.out.log").open("wb")
        words = [str(word) for word in command]
        self._daemons.append(
            subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        )


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until the last is found, so that none comes twice."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
