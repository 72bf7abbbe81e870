"""``pytest benchmarks --benchmark-only``: every file of benchmarks still runs, and what is said around the times."""

import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from helpers.processes import ROOT, pytest_environment, run_pytest

from benchmarks import busy, cases, report, runner
from benchmarks.busy import Load
from benchmarks.cases import Case, ConvBnRelu
from benchmarks.timing import Spread
from benchmarks.variants import BASELINE, OURS, UnavailableError

BENCHMARKS = ROOT / "benchmarks"
SMOKE = ["--benchmark-only", "--smoke", "--seconds", "0.1", "--device", "cpu"]


def outcomes(junit):
    """How many tests of each file passed, and how many did not, by the file's name."""
    counts = {}
    for test in ElementTree.parse(junit).iter("testcase"):
        # A file that cannot be imported is named by "name" alone.
        module = (test.get("classname") or test.get("name")).split(".")[-1]
        passed = not [child for child in test if child.tag in ("failure", "error", "skipped")]
        good, bad = counts.get(f"{module}.py", (0, 0))
        counts[f"{module}.py"] = (good + passed, bad + (not passed))
    return counts


def idle_files(counts, folder):
    """Files of benchmarks of which nothing ran, or not all."""
    files = sorted(path.name for path in folder.glob("bench_*.py"))
    assert files
    return [name for name in files if counts.get(name, (0, 1)) == (0, 1) or counts[name][1]]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All files on their smallest case, by pytest as people start it; its output, and the outcomes by file."""
    folder = tmp_path_factory.mktemp("smoke")
    done = run_pytest("benchmarks", *SMOKE, f"--junitxml={folder}/junit.xml", f"--benchmark-json={folder}/times.json")
    times = folder / "times.json"
    return done, outcomes(folder / "junit.xml"), json.loads(times.read_text()) if times.exists() else None


def test_every_file_runs(smoke):
    done, counts, _ = smoke
    assert done.returncode == 0, done.stdout[-4000:]
    assert idle_files(counts, BENCHMARKS) == []


def test_the_report_ends_with_the_table(smoke):
    done, counts, times = smoke
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 1 + sum(good for good, _ in counts.values())
    assert any(line.startswith(f"| {'case'}") for line in table)
    said = [line for line in lines if "load average" in line]
    assert len(said) == 1
    assert said[0].startswith(("Quiet machine: ", "BUSY MACHINE, do not trust these times: "))
    assert "the baseline's quartiles are up to" in said[0]
    # The plugin's own columns, a group a case.
    assert {"min", "median", "iqr", "rounds"} <= set(times["benchmarks"][0]["stats"])
    for entry in times["benchmarks"]:
        assert entry["extra_info"]["ratio_to"] == BASELINE
        assert (entry["extra_info"]["ratio"] == 1) == (entry["extra_info"]["variant"] == BASELINE)
    written = next(line for line in lines if line.startswith("written: ")).split()[1:]
    for path in map(Path, written):
        if path.suffix == ".md":
            assert said[0] in path.read_text()
        path.unlink()


# What each file of a folder may be, beside one that works, and whether it is noticed.
FILES = {
    "bench_sound.py": ("def test_it(benchmark): benchmark(len, [])", False),
    "bench_nothing.py": ("def measure(benchmark): benchmark(len, [])", True),
    "bench_broken.py": ("import nothing_of_this_name", True),
    "bench_failing.py": ("def test_it(benchmark): assert benchmark(len, [])", True),
    "bench_skipping.py": ("import pytest\n@pytest.mark.skip\ndef test_it(benchmark): pass", True),
    "bench_unmeasured.py": ("def test_it(): pass", True),  # --benchmark-only skips what asks for no benchmark
}


def test_files_that_do_not_run_are_noticed(tmp_path):
    """Those of the fixture above are judged by the same two functions."""
    for name, (text, _) in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    run_pytest(tmp_path, "--benchmark-only", "--continue-on-collection-errors", "--junitxml=junit.xml", cwd=tmp_path)
    noticed = [name for name, (_, seen) in sorted(FILES.items()) if seen]
    assert idle_files(outcomes(tmp_path / "junit.xml"), tmp_path) == noticed


def collected(*options):
    """Names of the benchmarks that would run."""
    done = run_pytest("benchmarks", "--benchmark-only", "--collect-only", "-q", "--device", "cpu", *options)
    assert done.returncode == 0, done.stdout[-4000:]
    return [line.split("::", 1)[1] for line in done.stdout.splitlines() if "::" in line]


def test_what_takes_minutes_is_left_to_full():
    usual, full = collected(), collected("--full")
    assert set(usual) < set(full)
    assert not [name for name in usual if "torch.compile" in name or "resnet50" in name]
    assert [name for name in full if "resnet50" in name and "torch.compile" in name]
    # The variants of a case come in a row: it is built and verified once, not again for each of them.
    of_cases = [name.rsplit("-", 1)[0] for name in full]
    assert sum(a != b for a, b in itertools.pairwise(of_cases)) + 1 == len(set(of_cases))


CASE = Case("small", (2, 16, 8, 8), lambda: ConvBnRelu(16))


@pytest.mark.parametrize("wrong", ["unavailable", "wrong", "broken"])
def test_one_variant_that_fails_leaves_the_others_their_times(wrong, monkeypatch):
    def prepare(module, x):
        if wrong == "unavailable":
            raise UnavailableError("not here")
        if wrong == "broken":
            raise RuntimeError("broken")
        return lambda x: module(x) + 1

    monkeypatch.setitem(runner.VARIANTS, "another", runner.Variant(prepare))
    found = runner.measured(CASE, ["another", OURS], "random", refusals=(Exception,), seconds=0.01)
    assert set(found.results) == set(found.calls) == {BASELINE, OURS}
    kinds = {"unavailable": UnavailableError, "wrong": runner.WrongResultError, "broken": RuntimeError}
    assert type(found.refused["another"]) is kinds[wrong]
    assert found.results[BASELINE].ratio == Spread(1, 1, 1)
    if wrong == "broken":
        with pytest.raises(RuntimeError, match="broken"):
            runner.results(CASE, ["another"], "random", seconds=0.01)


def test_a_case_is_built_once_for_all_variants(monkeypatch):
    built, interleaved = [], []
    build, turns = Case.build, runner.interleaved
    monkeypatch.setattr(Case, "build", lambda self: built.append(self) or build(self))
    monkeypatch.setattr(runner, "interleaved", lambda calls, **k: interleaved.append([*calls]) or turns(calls, **k))
    runner.measured(CASE, ["eager", BASELINE, OURS], "random", seconds=0.01)
    assert built == [CASE]
    assert interleaved == [[BASELINE, "eager", OURS]]


QUIET, UNSTEADY = {"a case": Spread(1.0, 0.98, 1.02)}, {"a case": Spread(1.0, 0.98, 1.02), "b": Spread(2.0, 1.8, 2.4)}


@pytest.mark.parametrize(
    ("average", "cpus", "threads", "baselines", "state", "signs"),
    [
        (0.3, 2, 2, QUIET, "Quiet machine", ["0.30 at the start (2 CPUs, 2 threads)", "up to 4% of its median apart."]),
        (0.7, 2, 2, QUIET, "BUSY MACHINE", ["0.70 at the start (2 CPUs, 2 threads, want at most 0.5)"]),
        (13.9, 16, 2, QUIET, "Quiet machine", []),
        (15.0, 16, 2, QUIET, "BUSY MACHINE", ["want at most 14.5"]),
        (0.2, 1, 2, QUIET, "Quiet machine", []),
        (0.3, 2, 2, UNSTEADY, "BUSY MACHINE", ["up to 30% of its median apart (b), want 10%"]),
        (0.3, 2, 2, {}, "Quiet machine", ["0.30 at the start"]),
    ],
)
def test_a_busy_machine_is_said(average, cpus, threads, baselines, state, signs):
    said = busy.line(Load(average, cpus, threads), baselines)
    assert said.startswith(state)
    assert "\n" not in said
    assert all(sign in said for sign in signs), said


def test_python_m_benchmarks_says_it_too(tmp_path, monkeypatch):
    code = (
        "import sys; from pathlib import Path; from benchmarks import report, __main__ as program\n"
        f"report.RESULTS = Path({str(tmp_path)!r})\n"
        "sys.argv = ['benchmarks', '--match', 'cifar_resnet32, 1x', '--seconds', '0.1', '--rounds', '5', "
        "'--device', 'cpu']\n"
        "sys.exit(program.main())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=pytest_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (said,) = [line for line in done.stdout.splitlines() if "load average" in line]
    assert "the baseline's quartiles are up to" in said
    (numbers,) = tmp_path.glob("*.json")
    assert json.loads(numbers.read_text())["machine"] == said


def test_the_environment_of_a_process(monkeypatch):
    """A child of a worker of pytest-xdist is none, and has options of its own."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"):
        monkeypatch.setenv(name, "--no-such-option")
    monkeypatch.setenv("ANOTHER", "kept")
    given = pytest_environment(MORE="1")
    assert "--no-such-option" not in given.values()
    assert (given["ANOTHER"], given["MORE"]) == ("kept", "1")
    assert run_pytest("--version").returncode == 0


def test_sizes_of_cases():
    assert CASE.size == 2 * 16 * 8 * 8
    assert min(cases.NETWORKS, key=lambda case: case.size).group.startswith("cifar_resnet32, 1x")


def test_a_report_without_a_line(tmp_path, monkeypatch):
    """Whoever saves results of another kind need not know about the load."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    found = runner.measured(CASE, [], "random", seconds=0.01)
    text, *_ = report.save(list(found.results.values()))
    assert text.read_text().splitlines()[1] == ""
    assert torch.get_num_threads() == found.results[BASELINE].threads
