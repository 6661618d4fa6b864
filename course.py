"""The course from the command line. Needs Python 3.11 or newer and nothing else.

The first command that needs it makes .venv, the course's own environment, and installs the pinned requirements there.
On Linux without an NVIDIA GPU torch comes from PyTorch's CPU index if that can be reached: PyPI's Linux build is the
CUDA one, several GB that such a machine cannot use. With a GPU, on Windows and on macOS it comes from PyPI.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (before the imports below, which an older Python could not read)
    sys.exit(f"The course needs Python 3.11 or newer; {sys.executable} is Python {sys.version.split()[0]}.")

import argparse
import os
import socket

from utils.setup import testing, workbook
from utils.setup.environment import ROOT, Stop, ask, check_home, environment_home, is_working, prepare, python_in, run

MOST_WORKERS = 8  # a notebook may take 2 GB
TEACHING = {  # command: (module of utils/teaching, what it makes)
    "plans": (
        "plan",
        "plans [NN ...]: a plan for a class from each lecture, and what of TEACHING.md follows from them",
    ),
    "slides": ("slides", "slides [NN ...]: a deck, a handout and a quiz sheet of each lecture"),
    "assignment": ("assignment", "assignment NN --exercises 5A,5C --points 10,15: a notebook for a class"),
    "grade": ("grade", "grade NN FOLDER: mark the notebooks that a class handed in"),
    "site": ("site", "all lectures as pages, in build/site, to be opened without a server"),
}
BENCHMARKS = "tests.benchmarks.cuda_runner", "tests.benchmarks.flash_numpy"


def main(argv=None):
    """Run one command. Returns the exit status."""
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.command not in ("test", "build", *TEACHING):
        parser().error(f"unknown argument: {rest[0]}")
    try:
        return arguments.run(arguments, rest)
    except Stop as problem:
        print(f"course.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The next run carries on from here.", file=sys.stderr)
        return 130


def parser():
    """The command line."""
    top = argparse.ArgumentParser(
        prog="course.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    lab = commands.add_parser("lab", help="open JupyterLab on your own copies of the lectures (workbook/)")
    lab.add_argument("--port", type=port, help="the port to use; without it the first free one from 8888 on")
    lab.add_argument("--no-browser", action="store_true", help="print the address, open no browser")
    lab.set_defaults(run=run_lab)

    test = commands.add_parser("test", help="test [NN ...]: every test and every notebook, or those of some lectures")
    test.add_argument("--quick", action="store_true", help="leave out what is slow, and one folder of notebooks")
    test.add_argument(
        "--mutation",
        action="store_true",
        help="put errors into the exercises' solutions, or into attention.flash, and let the checks or the tests judge",
    )
    test.set_defaults(run=run_test)

    build = commands.add_parser("build", help="build [NN ...]: make notebooks and modules from solutions/NN_*.py")
    build.set_defaults(run=run_build)

    for name, (module, text) in TEACHING.items():
        commands.add_parser(name, help=text, description=text).set_defaults(run=run_teaching, module=module)

    bench = commands.add_parser("bench", help="time the kernels and flash attention on this machine (two minutes)")
    bench.set_defaults(run=run_bench)

    doctor = commands.add_parser("doctor", help="say what works on this machine and what to do about what does not")
    doctor.set_defaults(run=run_doctor)
    return top


def port(text):
    """A port from the command line."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: expected a number from 1 to 65535")
    return int(text)


def run_lab(arguments, _rest):
    """Bring the learner's copies up to date and run JupyterLab on them until Ctrl-C."""
    if arguments.port is not None and not is_free(arguments.port):
        raise Stop(f"Port {arguments.port} is in use: choose another, or leave --port out and a free one is found.")
    check_home()
    python = prepare()
    update_workbook(python)
    try:
        return run(lab_command(python, ROOT, arguments.port, not arguments.no_browser), env=lab_environment(ROOT))
    except KeyboardInterrupt:
        print("JupyterLab has stopped. Your notebooks are in workbook/.")
        return 0


def update_workbook(python):
    """Copy new lectures, say what has changed, and sign the copies, so that JupyterLab runs their viewers at once."""
    written, messages = workbook.update(ROOT / "lectures", ROOT / "workbook")
    for message in messages:
        print(message)
    if written and ask([python, "-m", "nbformat.sign", *written])[0] != 0:
        print("The copies could not be marked as trusted: their interactive views appear once a cell has been run.")


def lab_command(python, root, port_wanted=None, browser=True):
    """The command that serves the workbook of the course in the folder `root`, and nothing that is not the learner's."""
    command = [
        python,
        "-m",
        "jupyterlab",
        "--log-level=WARN",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.answer_yes=True",
        f"--ServerApp.root_dir={root / 'workbook'}",
        f"--LabApp.app_settings_dir={root / 'utils' / 'setup' / 'jupyter'}",
    ]
    if port_wanted is not None:
        command += [f"--ServerApp.port={port_wanted}", "--ServerApp.port_retries=0"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # the only user of a container; the server listens to this machine alone
    return command


def lab_environment(root):
    """The environment of JupyterLab: open tabs are remembered for this course only, notebooks find the course's modules
    in whatever folder of the workbook they lie, NumPy computes on one thread, as in the kept outputs, unless the
    learner's own environment says otherwise."""
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workbook" / ".workspaces"),
    }


def is_free(number):
    """True if a server may listen on this port of this machine."""
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def run_test(arguments, rest):
    """Run pytest: tests/, and every notebook of lectures/ and solutions/ executed and its outputs compared.

    Lectures' numbers select their tests, notebooks and gates; all other arguments go to pytest. With --mutation the
    checks of the exercises are tested instead, on solutions with one error each.
    """
    if arguments.mutation:
        python = prepare("requirements-dev.txt")
        return run([python, "-m", "tests.mutation", *rest], env=quiet_environment(), cwd=ROOT)
    selected = testing.selection(ROOT, rest, arguments.quick)
    python = prepare("requirements-dev.txt")
    workers = min(available_cores(), MOST_WORKERS)
    # A file is one worker's, notebooks first, as conftest.py sorts them.
    spread = ["-n", workers, "--dist", "loadscope", "--no-loadscope-reorder"]
    command = [python, "-m", "pytest", *spread, "--nbval", "--nbval-current-env", *selected]
    status = run(command, env=quiet_environment(), cwd=ROOT)
    if status == testing.NOTHING:
        print(f"course.py: no test was found by: {' '.join(map(str, selected)) or 'pytest'}", file=sys.stderr)
    return status


def run_build(_arguments, rest):
    """Run utils/authoring/build.py in the course's environment, and then bring TEACHING.md up to date."""
    python = prepare()
    status = run([python, "-m", "utils.authoring.build", *rest], env=quiet_environment(), cwd=ROOT)
    return status or run([python, "-m", "utils.teaching.overview"], env=quiet_environment(), cwd=ROOT)


def run_teaching(arguments, rest):
    """Run a module of utils/teaching in an environment with what a teacher needs."""
    python = prepare("requirements-teaching.txt")
    return run([python, "-m", f"utils.teaching.{arguments.module}", *rest], env=quiet_environment(), cwd=ROOT)


def run_bench(_arguments, _rest):
    """Run the benchmarks one after the other, on one thread each; stop at the first that fails."""
    python = prepare()
    for name in BENCHMARKS:
        print(f"{name}:", flush=True)
        status = run([python, "-m", name], env=quiet_environment(), cwd=ROOT)
        if status:
            return status
    return 0


def quiet_environment():
    """One thread for each worker, and no progress bars in what is compared."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def available_cores():
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_doctor(_arguments, _rest):
    """Look, install nothing. In the course's environment if there is one, otherwise in this Python."""
    python = python_in(environment_home())
    return run([python if is_working(python) else sys.executable, "-m", "utils.setup.doctor"], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
