"""All files are written completely or not at all: on full disks, in read-only folders, and by killed programs."""

import json
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from budget import synthetic
from PIL import Image
from test_corrupted import analysis, sound
from test_evaluate_runs import Subject, figures
from typer.testing import CliRunner

import arrowhead as ah
from arrowhead.analysis import draw
from arrowhead.cli import main
from arrowhead.errors import ArrowheadError, FileUnwritable, InputsInvalid
from arrowhead.evaluation import work_folder
from arrowhead.plans import atomic_write

pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.TooFewSamples", "ignore::arrowhead.errors.InputsRepeated")
LONG = "x" * 50_000
WRITERS = {
    "plan": lambda path: replace(sound(), about={"note": LONG}).save(path),
    "table": lambda path: replace(synthetic(0, steps=3), about={"note": LONG}).save(path),
    "analysis": lambda path: replace(analysis(), about={"note": np.random.default_rng(0).bytes(40_000).hex()}).save(path),
    "picture": lambda path: draw.plan_map({"plan": sound()}, path),
    "work folder": lambda path: work_folder.write(path, LONG.encode()),
    "array": lambda path: work_folder.store_array(path, torch.zeros(10_000)),
}
every_writer = pytest.mark.parametrize("name", WRITERS)


@pytest.fixture
def path(name, tmp_path):
    return tmp_path / ("file.png" if name == "picture" else "file")


@every_writer
def test_permissions_are_those_of_any_new_file_or_of_the_old_one(name, path):
    before = os.umask(0o027)
    try:
        WRITERS[name](path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        WRITERS[name](path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)
    assert [*path.parent.iterdir()] == [path]


@every_writer
def test_a_file_that_grows_too_large_leaves_the_old_one(name, path):
    """The system refuses to write more than 8 KiB, in the middle of the file, as it does when a disk is full."""
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10 if name == "picture" else 2**13, hard))
    try:
        with pytest.raises(
            FileUnwritable, match=r"cannot write .*file.*: File too large; wanted .*; free some space"
        ) as refused:
            WRITERS[name](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(refused.value, ArrowheadError)
    assert isinstance(refused.value, OSError)
    assert path.read_bytes() == b"old"
    assert [*path.parent.iterdir()] == [path]


@every_writer
def test_a_disk_that_is_full_when_the_file_is_flushed(name, path, monkeypatch):
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileUnwritable, match="No space left on device") as refused:
        WRITERS[name](path)
    assert refused.value.errno == 28
    assert path.read_bytes() == b"old"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_that_is_full():
    with pytest.raises(FileUnwritable, match="No space left on device"):
        sound().save("/dev/full")
    sound().save("/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["", "file/plan.json", "nowhere/plan.json", "x" * 300, "folder", "a\0b"])
def test_paths_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for save in (sound().save, synthetic(0, steps=3).save, analysis().save):
        with pytest.raises(FileUnwritable, match=r"cannot write .*wanted a path"):
            save(name)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]


READ_ONLY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import arrowhead as ah
from arrowhead.errors import FileUnwritable
from arrowhead.plans import atomic_write
plan = ah.Plan.load("plan.json")
if os.getuid() == 0:
    os.setuid(65534)  # root may write everywhere
for path in ("folder/plan.json", "folder/new.json", "protected.json"):
    for write in (plan.save, atomic_write.require_writable):
        try:
            write(path)
        except FileUnwritable as error:
            print(path, error.errno, "Permission denied" in str(error))
"""


def test_read_only_folders_and_files():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "folder").mkdir()
        for path in ("plan.json", "protected.json", "folder/plan.json"):
            sound().save(folder / path)
        (folder / "protected.json").chmod(0o444)
        (folder / "folder").chmod(0o555)
        folder.chmod(0o777)
        tests = str(Path(__file__).parent)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, tests], cwd=folder, capture_output=True, text=True, check=True, timeout=300
        )
        paths = ("folder/plan.json", "folder/new.json", "protected.json")
        assert done.stdout.split("\n")[:-1] == [f"{path} 13 True" for path in paths for _ in range(2)]
        assert sorted(p.name for p in folder.rglob("*")) == ["folder", "plan.json", "plan.json", "protected.json"]
        for path in ("plan.json", "protected.json", "folder/plan.json"):
            assert ah.Plan.load(folder / path) == sound()
        (folder / "folder").chmod(0o755)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    sound().save(tmp_path / "real/plan.json")
    (tmp_path / "link.json").symlink_to("real/plan.json")
    sound(steps=3).save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert ah.Plan.load(tmp_path / "real/plan.json").steps == 3


def interrupted(path):
    with atomic_write.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_an_interrupt_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_many_threads_that_write_one_file(tmp_path):
    """Each reader sees one of the contents, whole."""
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=atomic_write.write, args=(tmp_path / "file", content)) for content in contents]
    atomic_write.write(tmp_path / "file", contents[0])
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert (tmp_path / "file").read_bytes() in contents
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_of_many_that_write_a_file_first_one_succeeds(tmp_path, monkeypatch):
    start, contents = threading.Barrier(8), [bytes([i]) for i in range(8)]

    def begin(content):
        start.wait()
        atomic_write.write_first(tmp_path / "file", content)
        seen.append((tmp_path / "file").read_bytes())

    seen = []
    threads = [threading.Thread(target=begin, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len({*seen}) == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]

    def without_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", without_links)
    atomic_write.write_first(tmp_path / "other", b"x")
    assert (tmp_path / "other").read_bytes() == b"x"


SAVES = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
folder, tests = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, tests)
from test_corrupted import ah, analysis, sound, synthetic

notes = [f"{i}" * 300_000 for i in (0, 1)]
things = {"plan": sound(), "table": synthetic(0, steps=3), "analysis": analysis()}
loads = {"plan": ah.Plan.load, "table": ah.Table.load, "analysis": ah.Analysis.load}
versions = [{name: replace(thing, about={"note": note}) for name, thing in things.items()} for note in notes]
for name, thing in versions[0].items():
    thing.save(folder / name)
for seed in range(10):
    pid = os.fork()
    while not pid:
        for version in versions:
            for name, thing in version.items():
                thing.save(folder / name)
    time.sleep(random.Random(seed).random() / 10)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print([loads[name](folder / name).about["note"] in notes for name in loads], flush=True)
"""


def test_killed_in_the_middle_of_save(tmp_path):
    """After each of many kills, each file is the old one or the new one, whole; some kills came while a file was written."""
    tests = str(Path(__file__).parent)
    script = [sys.executable, "-c", SAVES, str(tmp_path), tests]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.splitlines() == ["[True, True, True]"] * 10
    assert [*tmp_path.glob(".*.tmp")]


def command(*arguments):
    return [sys.executable, "-m", "arrowhead", *map(str, arguments)]


@pytest.mark.slow
def test_killed_in_the_middle_of_search(tmp_path):
    sound().save(tmp_path / "plan.json")
    asked = ("search", "tiny:dit", "-i", "class_labels=[1,4]", "-i", "num_inference_steps=200", "--threshold", 0.3)
    running = subprocess.Popen(command(*asked, "--out", tmp_path / "plan.json"), stderr=subprocess.PIPE)
    seen = b""
    while b"%" not in seen:  # the bar of the search
        seen += running.stderr.read(1)
    time.sleep(1)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    running.stderr.close()
    assert ah.Plan.load(tmp_path / "plan.json") == sound()
    assert [*tmp_path.iterdir()] == [tmp_path / "plan.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "nowhere", "-i", "class_labels=[1]", "--out", "file/plan.json"),
        ("search", "nowhere", "-i", "class_labels=[1]", "--out", "folder"),
        ("sweep", "nowhere", "-i", "class_labels=[1]", "--out", "file"),
        ("generate", "nowhere", "-i", "class_labels=[1]", "--out", "file"),
        ("analyze", "nowhere", "-i", "class_labels=[1]", "--out", "file"),
        ("evaluate", "nowhere", "-i", "class_labels=[1]", "--out", "file/table.json"),
        ("compare", "nowhere", "-i", "class_labels=[1]", "--plan", "plan.json", "--out", "file/page.html"),
        ("resample", "plan.json", "--steps", "3", "--out", "file/plan.json"),
        ("show", "plan.json", "--png", "file/plan.png"),
        ("demo", "--out", "file"),
    ],
    ids=" ".join,
)
def test_commands_know_before_any_work_that_they_cannot_write(arguments, tmp_path, monkeypatch):
    """No model is loaded: there is none of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    sound().save("plan.json")
    result = CliRunner().invoke(main.app, [*arguments])
    assert isinstance(result.exception, FileUnwritable), result.exception
    assert "cannot write" in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "plan.json"]


def test_a_figure_is_written_under_the_name_that_was_given(tmp_path):
    with pytest.raises(InputsInvalid, match=r"got .*plan for a figure, wanted a file that ends in .*\.png"):
        draw.plan_map({"plan": sound()}, tmp_path / "plan")
    draw.plan_map({"plan": sound()}, tmp_path / "plan.SVG")
    assert (tmp_path / "plan.SVG").read_text(encoding="utf-8").startswith("<?xml")
    draw.plan_map({"plan": sound()}, tmp_path / "plan.png")
    assert Image.open(tmp_path / "plan.png").format == "PNG"
    assert len([*tmp_path.iterdir()]) == 2


WRITES = """
import pickle, sys
from pathlib import Path
work, out, tests = sys.argv[1:]
sys.path.insert(0, tests)
from test_evaluate_runs import Subject, figures
from arrowhead.evaluation import resumable

generate_missing = resumable.generate_missing
def wait_and_generate(*arguments, **more):
    print("ready", flush=True)
    sys.stdin.readline()
    generate_missing(*arguments, **more)

resumable.generate_missing = wait_and_generate
Path(out).write_bytes(pickle.dumps(figures(Subject().measure(work, images=5))))
"""


@pytest.mark.slow
def test_two_writers_in_one_work_folder(tmp_path):
    """Two processes, each of which finds nothing there, and makes everything."""
    tests, running = str(Path(__file__).parent), []
    for i in range(2):
        script = [sys.executable, "-W", "ignore", "-c", WRITES, str(tmp_path / "work"), str(tmp_path / f"{i}"), tests]
        running.append(subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    for process in running:
        assert process.stdout.readline() == b"ready\n"
    for process in running:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    assert [process.wait(600) for process in running] == [0, 0]
    for process in running:
        process.stdin.close()
        process.stdout.close()
    whole = figures(Subject().measure(tmp_path / "whole", images=5))
    made = [pickle.loads((tmp_path / f"{i}").read_bytes()) for i in range(2)]
    assert made == [whole] * 2
    again = Subject()
    assert figures(again.measure(tmp_path / "work", images=5)) == whole
    assert again.calls == 0
    assert not [*(tmp_path / "work").rglob(".*")]


def test_two_evaluations_that_begin_in_one_folder(tmp_path, monkeypatch):
    """Both find the folder empty. The one that is second is refused, and the first one's folder stays its own."""
    start, seen, refused = threading.Barrier(8), [], []
    write_first = atomic_write.write_first
    monkeypatch.setattr(atomic_write, "write_first", lambda *given: (start.wait(), write_first(*given)))

    def begin(seed):
        try:
            work_folder.open_work(tmp_path / "work", {"first_seed": seed})
            seen.append(seed)
        except InputsInvalid as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1
    assert len([text for text in refused if "keeps an evaluation of another setting: first_seed was" in text]) == 7
    assert json.loads((tmp_path / "work/evaluation.json").read_text()) == {"first_seed": seen[0]}


def test_an_evaluation_whose_disk_fills_is_resumed(tmp_path, monkeypatch):
    """The disk is full at the first, third, ninth … file, until a call has room for all."""
    subject, calls = Subject(), []
    whole = subject.measure(tmp_path / "whole", images=3)
    fsync = os.fsync
    for left in (0, 2, 8, 20):

        def full(descriptor, calls=calls, left=left):
            calls.append(1)
            if len(calls) > left:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        calls.clear()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FileUnwritable, match="No space left on device"):
            subject.measure(tmp_path / "work", images=3)
    monkeypatch.undo()
    assert figures(subject.measure(tmp_path / "work", images=3)) == figures(whole)
    assert not [*(tmp_path / "work").rglob(".*")]


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_killed_in_the_middle_of_evaluate(batches, tmp_path):
    """After SIGKILL the next evaluation goes on with the batches that are whole."""
    tests, work = str(Path(__file__).parent), tmp_path / "work"
    script = [sys.executable, "-W", "ignore", "-c", WRITES, str(work), str(tmp_path / "out"), tests]
    running = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout.readline() == b"ready\n"
    running.stdin.write(b"go\n")
    running.stdin.flush()
    while len([*work.rglob("batches/*.json")]) < batches:
        assert running.poll() is None
        time.sleep(0.001)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    running.stdin.close()
    running.stdout.close()
    assert not (tmp_path / "out").exists()
    found, whole = Subject(), Subject()
    assert figures(found.measure(work, images=5)) == figures(whole.measure(tmp_path / "whole", images=5))
    assert found.calls < whole.calls
