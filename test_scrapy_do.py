"""Prove scrapy_do.py from outside: real HTTP, real processes, real signals, real files; sections as in the module."""
from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile

import psutil
import pytest

import scrapy_do

MODULE = pathlib.Path(scrapy_do.__file__).resolve()


# ---- 0. Tools --------------------------------------------------------------------------------------------------------

STUB = """#!/bin/sh
# Stands in for Scrapy where only the daemon is under test: `list` prints spiders.txt, `crawl NAME` runs NAME.sh.
case "$1" in
    list) if [ -e list.sh ]; then . ./list.sh; else cat spiders.txt; fi ;;
    crawl) name="$2"; shift 2; . "./$name.sh" ;;
esac
"""


def wait_for(condition, seconds=30.0):
    """Return what `condition` returns as soon as it is true. The only place that sleeps."""
    end = time.monotonic() + seconds
    while True:
        if result := condition():
            return result
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def make_zip(files, **options):
    """Return a zip archive of a dictionary of names and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return buffer.getvalue()


def stub_project(name="shop", folder="", settings="", **spiders):
    """Return an archive for the stub: a shell script for each spider; `quick` is always there."""
    spiders = {"quick": "exit 0", **spiders}
    config = f"[settings]\ndefault = {settings}\n[deploy]\nproject = {name}\n"
    files = {"scrapy.cfg": config, "spiders.txt": "\n".join(spiders), "code.py": "x = 1\n"}
    files |= {f"{spider}.sh": script + "\n" for spider, script in spiders.items()}
    return make_zip({folder + path: content for path, content in files.items()})


class Client:
    """Speak to a daemon at `port`."""

    port = 0

    def request(self, method, path, body=None, headers=None):
        """Return the status, the headers and the body of one answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def call(self, method, path, body=None, headers=None):
        """Return the status and the JSON of one answer."""
        status, headers, data = self.request(method, path, body, headers)
        assert headers["Content-Type"] == "application/json"
        assert data.endswith(b"}\n")
        return status, json.loads(data)

    def get(self, path, **query):
        """Return the JSON of a GET that must succeed."""
        status, answer = self.call("GET", f"/{path}.json?{urllib.parse.urlencode(query)}")
        assert (status, answer["status"]) == (200, "ok"), answer
        return answer

    def try_post(self, path, **fields):
        """Return the status and the JSON of a POST."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.call("POST", f"/{path}.json", urllib.parse.urlencode(fields), headers)

    def post(self, path, **fields):
        """Return the JSON of a POST that must succeed."""
        status, answer = self.try_post(path, **fields)
        assert (status, answer["status"]) == (200, "ok"), answer
        return answer

    def try_push(self, archive):
        """Return the status and the JSON of a push."""
        return self.try_post("push-project", archive=archive)

    def push(self, *args, **spiders):
        """Push a stub project, or an archive, and return the answer."""
        return self.post("push-project", archive=args[0] if args else stub_project(**spiders))

    def schedule(self, spider="quick", when="now", project="shop", **fields):
        """Schedule a job and return its identifier."""
        return self.post("schedule-job", project=project, spider=spider, when=when, **fields)["identifier"]

    def job(self, identifier):
        """Return a job."""
        return self.get("list-jobs", id=identifier)["jobs"][0]

    def jobs(self, status):
        """Return the jobs in a status."""
        return self.get("list-jobs", status=status)["jobs"]

    def wait_job(self, identifier, *statuses):
        """Wait until a job is in one of some statuses, any finished one by default, and return it."""
        wanted = statuses or ("SUCCESSFUL", "FAILED", "CANCELED")
        return wait_for(lambda: (job := self.job(identifier))["status"] in wanted and job)

    def log(self, identifier, stream="err"):
        """Return a job's log."""
        status, headers, data = self.request("GET", f"/get-log/data/{identifier}.{stream}")
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        return data.decode()


class Inside(Client):
    """A daemon in this process, so that a test can reach into its surroundings."""

    def __init__(self, folder, scrapy, clock=None, **settings):
        self.store = scrapy_do.Store(folder / "data")
        self.daemon = scrapy_do.Daemon(self.store, scrapy_do.Settings(scrapy=scrapy, **settings), clock)
        self.server = scrapy_do.Server(("127.0.0.1", 0), self.daemon, 4 * scrapy_do.MIB)
        self.daemon.start()
        self.port = self.server.port
        self.stop, self.wake = socket.socketpair()
        self.thread = threading.Thread(target=self.server.serve, args=(self.stop,))
        self.thread.start()

    def close(self):
        """Stop it as main does."""
        self.wake.send(b"x")
        self.thread.join()
        self.stop.close()
        self.wake.close()
        self.daemon.close()
        self.server.drain(5)
        self.store.close()


class Outside(Client):
    """A daemon in a process of its own, started as a user would."""

    def __init__(self, folder, *options, environment=None, command=(sys.executable, str(MODULE))):
        self.folder, self.options, self.command = folder, options, command
        self.environment = {**os.environ, **(environment or {})}
        self.log_path = folder / "daemon.log"
        self.start()

    def start(self):
        """Start the process, and wait until it says where it listens."""
        began = self.log_path.stat().st_size if self.log_path.exists() else 0
        command = [*self.command, "--port", "0", "--data-dir", str(self.folder / "data"), *self.options]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=self.environment, cwd=self.folder)

        def address():
            assert self.process.poll() is None, self.log_path.read_text()
            text = self.log_path.read_text()[began:]
            return text.partition("listens on http://127.0.0.1:")[2].partition("\n")[0]

        self.port = int(wait_for(address))

    def stop(self, number=signal.SIGTERM, seconds=30):
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self):
        """End it without a word, as a power cut would."""
        self.stop(signal.SIGKILL)

    def close(self):
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.stop()


@pytest.fixture(autouse=True)
def no_leaks(request):
    """Fail a test that leaves a thread, a child or a file descriptor behind."""

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def threads():
        return {thread for thread in threading.enumerate() if thread.name != "http"}  # those end by themselves

    before = threads(), descriptors()
    yield
    wait_for(lambda: threads() <= before[0] and descriptors() <= before[1])
    assert psutil.Process().children() == []


@pytest.fixture
def stub(tmp_path):
    """Return the command that stands in for Scrapy."""
    path = tmp_path / "stub-scrapy"
    path.write_text(STUB)
    path.chmod(0o755)
    return (str(path),)


@pytest.fixture
def inside(tmp_path, stub):
    """Return a function that starts a daemon in this process with the stub for Scrapy."""
    with contextlib.ExitStack() as stack:

        def start(clock=None, **settings):
            client = Inside(tmp_path, settings.pop("scrapy", stub), clock, **settings)
            stack.callback(client.close)
            return client

        yield start


@pytest.fixture
def site(inside):
    """Return a running daemon with the stub for Scrapy."""
    return inside()


@pytest.fixture
def outside(tmp_path, stub):
    """Return a function that starts a daemon in a process of its own, with the stub for Scrapy."""
    with contextlib.ExitStack() as stack:

        def start(*options, **more):
            client = Outside(tmp_path, "--scrapy", *stub, *options, **more)
            stack.callback(client.close)
            return client

        yield start


# ---- 7. Daemon -------------------------------------------------------------------------------------------------------


def test_a_job_runs_and_leaves_its_log(site):
    site.push(talker="echo hello; echo problem >&2")
    job = site.wait_job(site.schedule("talker"))
    assert job["status"] == "SUCCESSFUL"
    assert site.log(job["identifier"], "out") == "hello\n"
    assert site.log(job["identifier"], "err") == "problem\n"
