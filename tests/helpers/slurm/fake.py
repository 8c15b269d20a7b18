"""Stand-ins for Slurm's commands and for Python, by which a batch script is tested without either.

`install_fakes` puts this file under their names into a directory for PATH. $FAKE is a JSON file:

  nodes         names of the allocation; their addresses are 10.0.0.1, 10.0.0.2, ...
  state, reason what squeue says of any job; a list is said word by word, the last one for ever
  requeue       statuses of `scontrol requeue`, likewise
  run_dir       what the configuration says
  runs          module -> [status, what each of its ranks prints]; what is not there prints nothing
  srun          lines that srun prints about a module's ranks, in place of its own
  servers       what the servers' log says
  wait_s        how long a module's ranks take

Every call of `scontrol requeue` and of Python is a line of $FAKE.calls: a JSON list.
"""

from __future__ import annotations

# Dozens of these are started for one test: what takes long to import is left out.
import json
import os
import sys
import time

NAMES = ("srun", "scontrol", "squeue", "sleep", "python", "apptainer")


def install_fakes(directory: str | os.PathLike[str]) -> None:
    """Makes `directory`/bin with all of them."""
    os.makedirs(f"{directory}/bin")
    with open(__file__) as source:
        text = f"#!{sys.executable} -ISs\n{source.read()}"
    for name in NAMES:
        with open(f"{directory}/bin/{name}", "w") as program:
            program.write(text)
        os.chmod(f"{directory}/bin/{name}", 0o755)


def _note(*words: object) -> None:
    with open(os.environ["FAKE"] + ".calls", "a") as calls:
        calls.write(json.dumps(words) + "\n")


def _next(fake: dict, name: str, default: object) -> object:
    """The next of what is to be said."""
    values = fake.get(name, default)
    if not isinstance(values, list):
        return values
    counter = f"{os.environ['FAKE']}.{name}"
    with open(counter, "a+") as said:
        said.seek(0)
        index = len(said.read())
        said.write(".")
    return values[min(index, len(values) - 1)]


def scontrol(fake: dict, argv: list[str]) -> int:
    if argv[:2] == ["show", "hostnames"]:
        print("\n".join(fake["nodes"]))
    elif argv[:2] == ["show", "node"]:
        number = fake["nodes"].index(argv[2]) + 1
        print(f"NodeName={argv[2]} Arch=x86_64 NodeAddr=10.0.0.{number} NodeHostName=same Port=1")
    else:
        _note("scontrol", *argv)
        return _next(fake, "requeue", 0)
    return 0


def squeue(fake: dict, argv: list[str]) -> int:
    name = "reason" if "--format=%r" in argv else "state"
    print(_next(fake, name, {"state": "RUNNING", "reason": "None"}[name]))
    return 0


def srun(fake: dict, argv: list[str]) -> int:
    """One task stands for all; its number is 0."""
    start = argv.index("bash")
    options = dict(word.lstrip("-").partition("=")[::2] for word in argv[:start])
    environment = {**os.environ, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    environment["FAKE_SRUN"] = json.dumps(options)
    task = os.fork()
    if task == 0:
        if "output" in options:
            name = options["output"].replace("%t", "0").replace("%%", "%")
            log = os.open(name, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
        os.execvpe("bash", argv[start:], environment)
    status = os.waitstatus_to_exitcode(os.waitpid(task, 0)[1])
    said = fake.get("srun", [])
    if status and not said:
        said = [f"srun: error: n1: task 0: Exited with exit code {status}"]
    for line in said:
        print(line, file=sys.stderr)
    return status


def python(fake: dict, argv: list[str]) -> int:
    if argv[0] == "-c":
        values = (fake.get("run_dir", "run"), *fake.get("models", ("s", "t")))
        print(*values, sep="\0", end="\0")
        return fake.get("settings", 0)
    module = argv[1]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: os.environ.get(name, "") for name in names}
    keys = [os.environ.get(f"MEGAOPD_SGLANG_{name}_KEY", "") for name in ("API", "ADMIN")]
    _note(module, argv[2:], json.loads(os.environ["FAKE_SRUN"]), environment, keys)
    if module == "megaopd.convert":
        os.makedirs(f"{argv[4]}/iter_0000000")
        open(f"{argv[4]}/iter_0000000/SHA256SUMS", "w").close()
    if module == "megaopd.serve":
        urls = next(word for word in argv if word.startswith("urls=")).removeprefix("urls=")
        with open(f"{urls}_0", "w") as file:
            file.write("http://10.0.0.2:30000\n")
        print(fake.get("servers", ""), flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.05)
    time.sleep(fake.get("wait_s", {}).get(module, 0))
    status, text = fake.get("runs", {}).get(module, (0, ""))
    print(text)
    return status


def main() -> None:
    name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
    if name == "sleep":
        time.sleep(0.05)
        return
    if name == "apptainer":
        os.execvp("python", ["python", *argv[argv.index("python") + 1 :]])
    with open(os.environ["FAKE"]) as file:
        fake = json.load(file)
    sys.exit(globals()[name](fake, argv))


if __name__ == "__main__":
    main()
