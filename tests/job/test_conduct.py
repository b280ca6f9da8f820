"""From the import to the exit code, in runs that a keeper forks."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from helpers.rig import Rig
from helpers.waiting import until

from harnessd import Command, Cradle
from harnessd.errors import NotAJob
from harnessd.job.conduct import as_cradle

EXITS = {
    "return None": 0,
    "return 0": 0,
    "return 7": 7,
    "return True": 1,
    "return False": 0,
    "return 255": 255,
    "return 256": 1,  # the kernel keeps eight bits, and a failure is not to become a success
    "return 257": 1,
    "return -1": 255,
    "return 10**30": 1,
    "return 'text'": 0,
    "return 1.5": 0,
    "sys.exit()": 0,
    "sys.exit(None)": 0,
    "sys.exit(3)": 3,
    "sys.exit('it is over')": 1,
    "raise SystemExit(4)": 4,
    "raise RuntimeError('boom')": 1,
    "raise BaseException('boom')": 1,
    "raise KeyboardInterrupt": 128 + signal.SIGINT,
    "os._exit(9)": 9,
    "os.abort()": 128 + signal.SIGABRT,
    "os.kill(os.getpid(), signal.SIGKILL)": 128 + signal.SIGKILL,
    "os.kill(os.getpid(), signal.SIGTERM); signal.pause()": 128 + signal.SIGTERM,
    "sys.stdout = None": 0,
    "sys.stdout = sys.stderr = None; sys.exit('nobody hears this')": 1,
    "sys.stderr.close(); raise RuntimeError('boom')": 1,
    "sys.stderr.close(); sys.exit('nobody hears this')": 1,
    "sys.stdout.close()": 0,
    "os.close(1)": 0,
    "os.closerange(0, 65536); return 5": 5,
    "sys.excepthook = None; raise RuntimeError('boom')": 1,
}


@pytest.mark.parametrize("ending", EXITS)
def test_exit_code_of(ending: str, keeper: Rig) -> None:
    code, _ = keeper.run(f"class Job(Cradle):\n    def run(self):\n        {ending}\n")
    assert code == EXITS[ending]


@pytest.mark.parametrize("ending", ["return 7", "sys.exit(7)"])
def test_exit_code_of_an_async_run(ending: str, keeper: Rig) -> None:
    code, run = keeper.run(f"""
        class Job(Cradle):
            async def run(self, *args):
                await asyncio.sleep(0.001)
                self.set_status(list(args))
                {ending}
        """, args=["a", "b"])  # fmt: skip
    assert code == 7 and run.said() == [["a", "b"]]


def test_exception_is_a_traceback_on_stderr_and_a_line_in_the_journal(keeper: Rig) -> None:
    code, run = keeper.run("""
        class Job(Cradle):
            def run(self):
                self.set_status("before")
                raise ValueError("no such symbol")
        """)
    assert code == 1
    assert "Traceback (most recent call last):" in run.out and run.out.endswith("ValueError: no such symbol\n")
    assert run.said() == ["before"] and run.said("error") == ["ValueError: no such symbol"]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("class Job(Cradle) pass", "SyntaxError: "),
        ("Other = 1", "AttributeError: module"),
        ("Job = 5", "harnessd.errors.NotAJob: cannot run 5: a Cradle or a callable is wanted"),
        ("class Job: pass", "harnessd.errors.NotAJob: cannot run Job: it does not extend Cradle"),
        ("class Job(Cradle): pass", "TypeError: cannot run Job: it has no run() method"),
        ("class Job(Cradle):\n    def __init__(self, x): pass", "TypeError: Job.__init__() missing 1 required"),
    ],
)
def test_job_that_cannot_be_loaded_is_exit_code_1_and_says_why(body: str, error: str, keeper: Rig) -> None:
    code, run = keeper.run(body)
    assert code == 1
    assert error in run.out
    assert error.removeprefix("harnessd.errors.") in "".join(run.said("error"))


@pytest.mark.parametrize(
    "body",
    [
        "def Job(): sys.exit(7)",
        "def Job(cradle): cradle.set_status('told'); return 7",
        "async def Job(cradle): return 7",
        "Job = lambda cradle: 7",
        "class Made(Cradle):\n    def run(self): return 7\nJob = Made()",
        "class Outer:\n    def __call__(self): return 7\nJob = Outer()",
    ],
)
def test_what_can_be_a_job(body: str, keeper: Rig) -> None:
    assert keeper.run(body)[0] == 7


@pytest.mark.parametrize("job", [5, None, "text", object(), int, Rig])
def test_what_cannot_be_a_job(job: Any) -> None:
    with pytest.raises(NotAJob, match="cannot run"):
        as_cradle(job)


@pytest.mark.parametrize("function", ["lambda: 7", "lambda cradle: 7", "lambda cradle, six: int(six) + 1"])
def test_a_function_is_given_what_it_takes(function: str, keeper: Rig) -> None:
    assert keeper.run(f"Job = {function}", args=["6"])[0] == 7


def test_cradle_is_the_job_as_it_is() -> None:
    job = Cradle()
    assert as_cradle(job) is job and isinstance(as_cradle(Cradle), Cradle)


def test_run_without_parameters_is_given_none(keeper: Rig) -> None:
    assert keeper.run("class Job(Cradle):\n    def run(self): return 7", args=["ignored"])[0] == 7


def test_arguments_are_in_sys_argv_and_in_run(keeper: Rig) -> None:
    _, run = keeper.run("""
        import argparse
        class Job(Cradle):
            def run(self, *args):
                parser = argparse.ArgumentParser()
                parser.add_argument("--n", type=int)
                self.set_status([args, sys.argv[1:], parser.parse_args().n, os.path.basename(sys.argv[0])])
        """, args=["--n", "4"])  # fmt: skip
    ((args, argv, number, name),) = run.said()
    assert (args, argv, number) == (["--n", "4"], ["--n", "4"], 4) and name.endswith(".py")


def test_end_is_as_the_interpreters_own(keeper: Rig) -> None:
    code, run = keeper.run("""
        import atexit, tempfile, weakref
        class Thing: pass
        class Job(Cradle):
            def run(self):
                atexit.register(lambda: print("at exit"))
                thread = threading.Thread(target=lambda: (time.sleep(0.05), self.set_status("thread"), print("joined")))
                thread.start()
                threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
                self.thing = Thing()
                weakref.finalize(self.thing, print, "finalized")
                sys.stdout.write("no newline, ")
                return 3
        """)
    assert code == 3
    assert run.out == "no newline, joined\nfinalized\nat exit\n"
    assert run.said() == ["thread"]


def test_files_that_the_job_has_not_closed_are_flushed(keeper: Rig, tmp_path: Any) -> None:
    code, _ = keeper.run(f"""
        text = open({str(tmp_path / "text")!r}, "w")
        detached = open(os.devnull, "w")
        detached.detach()
        class Job(Cradle):
            def __init__(self): self.bytes = open({str(tmp_path / "bytes")!r}, "wb")
            def run(self):
                self.bytes.write(b"b" * 100)
                text.write("t" * 100)
                return 3
        """)
    assert code == 3
    assert (tmp_path / "text").read_text() == "t" * 100 and (tmp_path / "bytes").read_bytes() == b"b" * 100


def test_a_file_that_cannot_be_flushed_holds_up_no_end(keeper: Rig) -> None:
    code, _ = keeper.run("""
        import subprocess
        class Job(Cradle):
            def run(self):
                self.child = subprocess.Popen(["sleep", "1000"], stdin=subprocess.PIPE)
                threading.Thread(target=self.child.stdin.write, args=(b"x" * 1_000_000,), daemon=True).start()
                time.sleep(0.2)
                return 3
        """)
    assert code == 3


def test_no_file_of_the_jobs_keeps_another_from_being_flushed(keeper: Rig, tmp_path: Any) -> None:
    code, _ = keeper.run(f"""
        import io
        class Raw(io.RawIOBase):
            bad = False
            def writable(self): return True
            @property
            def closed(self):
                if self.bad: raise RuntimeError("not to be asked")
                return False
        class Job(Cradle):
            def run(self):
                self.pipes = os.pipe()
                os.set_blocking(self.pipes[1], False)
                try:
                    while os.write(self.pipes[1], b"x" * 65536): pass
                except BlockingIOError:
                    os.set_blocking(self.pipes[1], True)
                self.full = open(self.pipes[1], "w")
                self.full.write("to nobody")
                self.odd = io.BufferedWriter(Raw())
                Raw.bad = True
                self.text = open({str(tmp_path / "text")!r}, "w")
                self.bytes = open({str(tmp_path / "bytes")!r}, "wb")
                self.text.write("last")
                self.bytes.write(b"words")
                return 3
        """)
    assert code == 3
    assert (tmp_path / "text").read_text() + (tmp_path / "bytes").read_text() == "lastwords"


def test_a_run_that_cannot_become_one_says_why(keeper: Rig) -> None:
    code, run = keeper.run("class Job(Cradle): pass", limits={"as": 1 << 20})
    assert code in (1, 126)
    assert "cannot" in run.out or "Error" in run.out


def test_failing_exit_functions_and_streams_leave_the_exit_code(keeper: Rig) -> None:
    code, run = keeper.run("""
        import atexit
        class Stream:
            def write(self, text): pass
            def flush(self): raise RuntimeError("cannot flush")
        class Job(Cradle):
            def run(self):
                atexit.register(print, "still called")
                atexit.register(lambda: 1 / 0)
                sys.stdin = Stream()
                return 3
        """)
    assert code == 3 and "ZeroDivisionError" in run.out and run.out.endswith("still called\n")
    code, _ = keeper.run("""
        class Stream:
            def write(self, text): pass
            def flush(self): raise RuntimeError("cannot flush")
        class Job(Cradle):
            def run(self): sys.stdout = Stream()
        """)
    assert code == 120  # as Python ends that could not flush


def test_signal_handler_that_raises_at_the_end_never_lets_the_run_go_on(keeper: Rig) -> None:
    run = keeper.spawn("""
        class Job(Cradle):
            def run(self):
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
                threading.Thread(target=time.sleep, args=(0.5,)).start()
                self.set_status("ending")
                return 4
        """)
    run.until_said("ending")
    keeper.ask("signal", run=run.spec.run, signals=[signal.SIGTERM], tree=False)
    assert keeper.ended(run)["code"] == 4
    assert keeper.ask("list")[0]["fds"] == 0


def test_threads_and_children_of_the_job_report_and_read(keeper: Rig) -> None:
    run = keeper.spawn("""
        class Job(Cradle):
            def run(self):
                def report(name):
                    for n in range(50):
                        self.set_status([name, n])
                threads = [threading.Thread(target=report, args=(f"t{n}",)) for n in range(3)]
                for thread in threads: thread.start()
                for thread in threads: thread.join()
                pid = os.fork()
                if pid == 0:
                    report("child")
                    self.set_status(["got", self.get_msg(timeout=None)["data"]])
                    os._exit(0)
                os.waitpid(pid, 0)
                report("parent")
        """)
    run.send(Command.CONFIG, 42)
    assert keeper.ended(run)["code"] == 0
    assert len(run.said()) == 251 and ["got", 42] in run.said()
    with open(run.spec.journal) as file:
        numbers = [line.split(",")[0] for line in file]
    assert len(set(numbers)) == 252


MULTIPROCESSING = """
import multiprocessing
from multiprocessing import get_context

def square(n): return n * n

class Job(Cradle):
    def __init__(self): self.factor = 2
    def times(self, n): return self.factor * n
    def tell(self, queue): queue.put(self.factor)
    def run(self, method):
        context = get_context(method)
        with context.Pool(2) as pool:
            squares, doubles = pool.map(square, range(4)), pool.map(self.times, range(4))
        queue = context.Queue()
        process = context.Process(target=self.tell, args=(queue,))
        process.start()
        told = queue.get()
        process.join()
        self.set_status([squares, doubles, told, process.exitcode])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_works_also_with_methods_of_the_job(method: str, keeper: Rig) -> None:
    code, run = keeper.run(MULTIPROCESSING, args=[method])
    assert code == 0, run.out
    assert run.said() == [[[0, 1, 4, 9], [0, 2, 4, 6], 2, 0]]
    assert run.out == ""


def test_job_in_a_package_is_imported_from_its_directory(keeper: Rig, tmp_path: Any) -> None:
    (tmp_path / "trading").mkdir()
    (tmp_path / "trading" / "__init__.py").write_text("")
    (tmp_path / "trading" / "momentum.py").write_text(
        "from harnessd import Cradle\nfrom trading import __name__ as base\n"
        "class Outer:\n    class Job(Cradle):\n        def run(self): self.set_status(base)\n"
    )
    code, run = keeper.run(entrypoint="trading.momentum:Outer.Job", cwd=str(tmp_path))
    assert code == 0, run.out
    assert run.said() == ["trading"]


def test_file_named_like_a_library_hides_nothing(keeper: Rig, tmp_path: Any) -> None:
    (tmp_path / "queue.py").write_text(
        "import json\nfrom harnessd import Cradle\nclass Job(Cradle):\n"
        "    def run(self):\n        import asyncio.queues\n        self.set_status(__name__)\n"
    )
    code, run = keeper.run(entrypoint=f"{tmp_path / 'queue.py'}:Job")
    assert code == 0, run.out
    assert run.said() == ["job_queue"]


def test_code_is_imported_fresh_in_each_run(keeper: Rig, tmp_path: Any) -> None:
    path = tmp_path / "changing.py"
    for number in (1, 2):
        path.write_text(
            f"from harnessd import Cradle\nclass Job(Cradle):\n    def run(self): return {'+'.join('1' * number)}\n"
        )
        assert keeper.run(entrypoint=f"{path}:Job")[0] == number


def test_closing_every_descriptor_harms_nobody(keeper: Rig, tmp_path: Any) -> None:
    run = keeper.spawn("""
        class Job(Cradle):
            def run(self, folder):
                os.closerange(3, 65536)
                files = [open(os.path.join(folder, f"own{n}"), "w+") for n in range(950)]
                done = [self.set_status("lost"), self.get_msg(), self.get_msg(timeout=0.01)]
                print(done, {os.fstat(file.fileno()).st_size for file in files})
                self.get_msg(timeout=None)
        """, args=[str(tmp_path)])  # fmt: skip
    until(lambda: run.out.count("\n") == 2, "it has printed")
    assert run.out.splitlines()[1] == "[False, None, None] {0}"
    assert "the job has closed its journal" in run.out
    keeper.tell({"op": "end", "run": run.spec.run, "grace": 5})
    assert keeper.ended(run)["signal"] == signal.SIGTERM
