"""What Python offers works in a harnessed script as without a harness."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.script import Script

Start = Callable[..., Script]


def test_run_is_the_script_as_it_was(start: Start) -> None:
    """argparse, sys.argv, stdin, cwd, __main__ and what the script has set up before."""
    script = start("""
        import argparse
        ARGUMENTS = argparse.ArgumentParser()
        ARGUMENTS.add_argument("--symbol")
        class Job(Cradle):
            def __init__(self): self.made_in = os.getpid()
            def run(self):
                os.chdir("/")
                print(ARGUMENTS.parse_args().symbol, sys.argv[1:], __name__, sys.modules["__main__"].Job is Job)
                print(sys.stdin.readline().strip(), input(), os.getcwd(), self.made_in != os.getpid())
                handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
                print(handlers == [signal.default_int_handler, signal.SIG_DFL, on_usr1])
                print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
                print(threading.active_count(), threading.current_thread() is threading.main_thread())
        def on_usr1(*_): pass
        signal.signal(signal.SIGUSR1, on_usr1)
        """, argv=["--symbol", "SPX", "-x", "{}"], stdin="first\nsecond\n")  # fmt: skip
    assert script.wait() == 0
    assert script.out.splitlines() == [
        "SPX ['--symbol', 'SPX'] __main__ True",
        "first second / True",
        "True",
        "set()",
        "1 True",
    ]


def test_every_way_to_an_event_loop(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                async def wait(): await asyncio.sleep(0.001); return 1
                print(asyncio.run(wait()), asyncio.run(asyncio.wait_for(wait(), 5)))
                loop = asyncio.new_event_loop()
                print(loop.run_until_complete(wait()))
                loop.close()
                with asyncio.Runner() as runner: print(runner.run(wait()))
                asyncio.set_event_loop(asyncio.new_event_loop())
                print(asyncio.get_event_loop().run_until_complete(wait()))
                asyncio.get_event_loop().close()
        """)
    assert script.wait() == 0, script.err
    assert script.out.split() == ["1"] * 5


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python no longer makes a loop for who asks for one")
def test_get_event_loop_makes_the_job_a_loop_of_its_own(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                loop = asyncio.get_event_loop()
                print(loop.run_until_complete(asyncio.sleep(0.001, "slept")))
                loop.close()
        """)
    assert script.wait() == 0, script.err
    assert script.out == "slept\n"


def test_async_run_reads_and_reports(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            async def run(self):
                self.set_status("up")
                while (msg := await asyncio.to_thread(self.get_msg, timeout=None))["cmd"] != Command.STOP:
                    self.set_status(msg["data"])
                asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print, "signalled")
                os.kill(os.getpid(), signal.SIGUSR1)
                await asyncio.sleep(0.05)
                return 9
        """)
    script.until_status("up")
    script.post("/config", '{"a": 1}')
    script.until_status({"a": 1})
    script.post("/stop")
    assert script.wait() == 9
    assert script.out == "signalled\n"


def test_harness_inside_the_scripts_own_event_loop(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self): self.set_status("up"); self.get_msg(timeout=None); return 3
        async def main():
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: None)
            ticks = 0
            job = asyncio.ensure_future(ProcessHarness({"http": {"port": 0}}).main(Job()))
            while not job.done():
                ticks += 1
                await asyncio.sleep(0.01)
            print(ticks > 5, await asyncio.wait_for(asyncio.sleep(0, "still works"), 5))
            return job.result()
        if __name__ == "__main__": sys.exit(asyncio.run(main()))
        """)
    script.until_status("up")
    script.post("/start")
    assert script.wait() == 3
    assert script.out == "True still works\n"


def test_harness_in_uvloop(start: Start) -> None:
    pytest.importorskip("uvloop")
    script = start("""
        import uvloop
        class Job(Cradle):
            def run(self): self.set_status("up"); print(asyncio.run(asyncio.sleep(0, "slept"))); time.sleep(1000)
        if __name__ == "__main__":
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                sys.exit(runner.run(ProcessHarness({"http": {"port": 0}}).main(Job())))
        """)
    script.until_status("up")
    script.process.terminate()
    assert script.wait() == 143
    assert script.err.count("Traceback") == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method: str, start: Start) -> None:
    script = start("""
        import concurrent.futures, multiprocessing
        def square(n): return n * n
        class Job(Cradle):
            def __init__(self): self.factor = 3
            def times(self, n): return n * self.factor
            def run(self, method):
                context = multiprocessing.get_context(method)
                with context.Pool(2) as pool: print(pool.map(square, range(4)), pool.map(self.times, range(3)))
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                    print(pool.submit(self.times, 5).result())
                process = context.Process(target=self.times, args=(1,))
                process.start()
                process.join()
                print(process.exitcode)
        """, job=f"Job(), {method!r}")  # fmt: skip
    assert script.wait() == 0, script.err
    assert script.out == "[0, 1, 4, 9] [0, 3, 6]\n15\n0\n"
    assert script.err.count("listens on") == 1


def test_exit_functions_run_once_each_in_their_own_process(start: Start) -> None:
    script = start("""
        import atexit, logging, tempfile, weakref
        class Thing: pass
        THING, PID = Thing(), os.getpid()
        def say(text): print(text, os.getpid() == PID, flush=True)
        class Job(Cradle):
            def run(self):
                atexit.register(say, "job's atexit")
                threading.Thread(target=lambda: (time.sleep(0.05), say("job's thread"))).start()
                self.folder = tempfile.TemporaryDirectory()
                self.thing = Thing()
                weakref.finalize(self.thing, say, "job's finalizer")
                self.set_status(self.folder.name)
                print("buffered", end=" ")
        atexit.register(say, "script's atexit")
        weakref.finalize(THING, say, "script's finalizer")
        FOLDER = tempfile.TemporaryDirectory()
        """)
    assert script.wait() == 0
    lines = script.out.splitlines()
    assert lines[0] == "buffered job's thread False"
    assert sorted(lines[1:3]) == ["job's atexit False", "job's finalizer False"]
    assert sorted(lines[3:]) == ["script's atexit True", "script's finalizer True"]
    folder = script.err.split('last status "')[1].split('"')[0]
    assert not os.path.exists(folder)


def test_what_the_script_printed_before_is_printed_once(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self): print("from the job"); os.write(1, b"unbuffered "); print("to stderr", file=sys.stderr)
        print("from the script", end=", ")
        """)
    assert script.wait() == 0
    assert script.out == "from the script, unbuffered from the job\n"
    assert script.err.count("to stderr") == 1


def test_what_script_and_job_write_to_a_file_that_neither_closes_is_there_once(start: Start, tmp_path: Path) -> None:
    script = start(f"""
        class Job(Cradle):
            def __init__(self):
                self.out = open({str(tmp_path / "out")!r}, "a")
                self.out.write("script ")
            def run(self): self.out.write("job ")
        """)
    assert script.wait() == 0
    assert (tmp_path / "out").read_text() == "script job "


def test_replaced_and_closed_streams_harm_nobody(start: Start) -> None:
    script = start("""
        import io
        class Job(Cradle):
            def run(self):
                sys.stdout, sys.stderr = io.StringIO(), None
                print("nobody sees this")
                os.close(1)
                print(self.set_status("x" * 5_000_000), self.set_status("last"))
                return 4
        """)
    assert script.wait() == 4
    assert script.out == "" and script.err.endswith('job crashed: exit code 4; last status "last"\n')


def test_import_error_is_a_traceback_exit_code_1_and_the_last_state(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                self.set_status({"loaded": 3})
                import no_such_module
        """)
    assert script.wait() == 1
    assert "Traceback (most recent call last):" in script.err
    assert "ModuleNotFoundError: No module named 'no_such_module'" in script.err
    assert script.err.splitlines()[-1] == 'harnessd: job crashed: exit code 1; last status {"loaded":3}'


def test_descriptors_all_closed_still_hb_and_kill(start: Start) -> None:
    script = start("""
        class Job(Cradle):
            def run(self):
                os.closerange(3, 65536)
                files = [open(f"own{n}", "w+") for n in range(1000)]
                print([self.set_status("lost"), self.get_msg(), self.get_msg(timeout=0.01)], flush=True)
                self.get_msg(timeout=None)
        """)
    script.job_pid()
    while not script.out:
        assert script.hb()["alive"] is True
    assert script.out == "[False, None, None]\n"
    assert script.get("/start").status_code == 409  # it has closed its mailbox
    assert script.get("/kill").json()["exit"]["signal"] == "SIGTERM"
    assert script.wait() == 143
    assert {os.path.getsize(script.folder / f"own{n}") for n in range(1000)} == {0}


def test_warnings_are_none(start: Start) -> None:
    script = start(
        """
        class Job(Cradle):
            async def run(self): self.set_status(1)
        """,
        interpreter=[sys.executable, "-W", "error"],
    )
    assert script.wait() == 0
    assert script.err.count("\n") == 2, script.err
