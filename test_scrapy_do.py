"""Prove scrapy_do.py from outside: real HTTP, real processes, real signals, real files; sections as in the module."""
from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import datetime
import errno
import functools
import hashlib
import http.client
import http.server
import io
import itertools
import json
import os
import pathlib
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
import urllib.parse
import uuid
import warnings
import zipfile
import zlib
import zoneinfo

import hypothesis
import hypothesis.stateful
import hypothesis.strategies as st
import psutil
import pytest
import requests
import schedule
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import scrapy_do
from scrapy_do import LAST_INSTANT, UNIT_SECONDS, WEEKDAYS, Recurrence, SpecError, parse_spec

MODULE = pathlib.Path(scrapy_do.__file__).resolve()
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; the daemons that are to be reloaded must not inherit it
    signal.signal(signal.SIGHUP, lambda number, frame: None)


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


def make_zip(files):
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
        return self.call("POST", f"/{path}.json", urllib.parse.urlencode(fields, doseq=True), headers)

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
        listening = socket.create_server(("127.0.0.1", 0), backlog=scrapy_do.BACKLOG_COUNT)
        self.server = scrapy_do.Server(listening, self.daemon, scrapy_do.Rules(max_upload=4))
        self.daemon.start()
        self.port = self.server.port
        self.stop, self.wake = socket.socketpair()
        self.thread = threading.Thread(target=self.server.serve, args=(self.stop, lambda: False))
        self.thread.start()

    def limit(self, **rules):
        """Change the rules of the server."""
        self.server.rules = self.server.rules._replace(**rules)
        self.server.guard = scrapy_do.Guard(self.server.rules)

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
        began = self.log_bytes()
        command = [*self.command, "--port", "0", "--data-dir", str(self.folder / "data"), *self.options]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=self.environment, cwd=self.folder)
        self.wait_until_it_listens(began)

    def log_bytes(self):
        """Return how much the process has logged."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def wait_until_it_listens(self, began):
        """Wait until it says where it listens, after so many bytes of its log."""

        def address():
            assert self.process.poll() is None, self.log_path.read_text()
            return re.search(r"listens on https?://\S+:([0-9]+)\n", self.log_path.read_text()[began:])

        self.port = int(wait_for(address)[1])

    def hang_up(self):
        """Tell it to be executed anew, and return a function that waits until it listens again."""
        began = self.log_bytes()
        self.process.send_signal(signal.SIGHUP)
        return functools.partial(self.wait_until_it_listens, began)

    def reload(self):
        """Have it executed anew in the same process."""
        self.hang_up()()

    def stop(self, number=signal.SIGTERM, seconds=30):
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self):
        """End it without a word, as a power cut would."""
        self.stop(signal.SIGKILL)

    def close(self):
        """End it, if it still runs."""
        try:
            if self.process.poll() is None:
                self.stop()
        finally:
            self.process.kill()
            self.process.wait()


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


# ---- 2. Scheduling spec ----------------------------------------------------------------------------------------------

MINUTE, HOUR, DAY, WEEK = 60, 3600, 86400, 604800
ZONES = (
    "UTC", "Europe/Warsaw", "America/New_York", "Africa/Cairo", "Australia/Lord_Howe", "Asia/Kathmandu",
    "America/Havana", "America/Nuuk", "Pacific/Apia",
)  # fmt: skip
FIRST_INSTANT, END_INSTANT = 631152000, 3786912000  # 1990 to 2090, in UTC
PROPERTY = hypothesis.settings(deadline=None, derandomize=True, max_examples=200)


@contextlib.contextmanager
def local_zone(name):
    """Make a time zone the one of this process, and return what the standard library knows of it."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        yield zoneinfo.ZoneInfo(name)
    finally:
        del os.environ["TZ"]
        os.environ.update({} if before is None else {"TZ": before})
        time.tzset()


@pytest.fixture
def zone():
    """Return a function that sets the time zone of this process until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(local_zone(name))


def instant(text, place=datetime.timezone.utc, fold=0):
    """Return the POSIX seconds at which the clocks of a place show `text`."""
    return datetime.datetime.fromisoformat(text).replace(tzinfo=place, fold=fold).timestamp()


def wall_clock(moment, place):
    """Return what the clocks of a place show, as a naive datetime."""
    return datetime.datetime.fromtimestamp(moment, place).replace(tzinfo=None)


def utc_offset(moment, place):
    """Return by how many seconds the clocks of a place are ahead of UTC."""
    return int(datetime.datetime.fromtimestamp(moment, place).utcoffset().total_seconds())


@functools.cache
def transitions(name):
    """Return the instants from 1990 to 2090 at which the clocks of a zone jump."""
    place, found = zoneinfo.ZoneInfo(name), []
    for week in range(FIRST_INSTANT, END_INSTANT, WEEK):
        low, high = week, week + WEEK
        if utc_offset(low, place) != utc_offset(high, place):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if utc_offset(middle, place) == utc_offset(high, place) else (middle, high)
            found.append(high)
    return found


def jumps():
    """Yield zone, instant and the offsets before and after it, of each change of a clock from 1990 to 2090."""
    for name in ZONES:
        with local_zone(name) as place:
            for moment in transitions(name):
                yield place, moment, utc_offset(moment - 1, place), utc_offset(moment, place)


def fire(recurrence, moment, times):
    """Return the next due times, each computed from the one before."""
    dues = []
    for _ in range(times):
        dues.append(moment := recurrence.next_after(moment))
    return dues


def short(rows):
    """Return ids for a table whose rows begin with a spec."""
    return [" ".join(row[0].split())[:30] or "empty" for row in rows]


ACCEPTED = [
    ("now", None),
    (" NoW\n", None),
    ("every second", Recurrence("second")),
    ("every seconds", Recurrence("second")),
    ("every 1 second", Recurrence("second")),
    ("every 1 seconds", Recurrence("second")),
    ("every 2 seconds", Recurrence("second", 2, 2)),
    ("every 253402214400 seconds", Recurrence("second", 253402214400, 253402214400)),
    ("every 000000000000000000007 seconds", Recurrence("second", 7, 7)),
    ("every 1 to 1 seconds", Recurrence("second", 1, 1)),
    ("every 10 to 20 seconds", Recurrence("second", 10, 20)),
    ("every minute", Recurrence("minute")),
    ("every minutes", Recurrence("minute")),
    ("every 1 minute", Recurrence("minute")),
    ("every 10 minutes", Recurrence("minute", 10, 10)),
    ("every 5 to 5 minutes", Recurrence("minute", 5, 5)),
    ("every 1 to 90 minutes", Recurrence("minute", 1, 90)),
    ("every minute at :00", Recurrence("minute", at=0)),
    ("every minute at :59", Recurrence("minute", at=59)),
    ("every 2 minutes at :07", Recurrence("minute", 2, 2, at=7)),
    ("every 2 to 3 minutes at :30", Recurrence("minute", 2, 3, at=30)),
    ("every hour", Recurrence("hour")),
    ("every hours", Recurrence("hour")),
    ("every 1 hours", Recurrence("hour")),
    ("every 3 hours", Recurrence("hour", 3, 3)),
    ("every 2 to 3 hours", Recurrence("hour", 2, 3)),
    ("every hour at :15", Recurrence("hour", at=15 * MINUTE)),
    ("every hour at 00:15", Recurrence("hour", at=15)),
    ("every hour at 59:59", Recurrence("hour", at=3599)),
    ("every 3 hours at 00:30", Recurrence("hour", 3, 3, at=30)),
    ("every 2 to 3 hours at :30", Recurrence("hour", 2, 3, at=30 * MINUTE)),
    ("every day", Recurrence("day")),
    ("every days", Recurrence("day")),
    ("every 1 day", Recurrence("day")),
    ("every 2 days", Recurrence("day", 2, 2)),
    ("every 2932896 days", Recurrence("day", 2932896, 2932896)),
    ("every 2 to 5 days", Recurrence("day", 2, 5)),
    ("every day at 10:30", Recurrence("day", at=10 * HOUR + 30 * MINUTE)),
    ("every day at 9:05", Recurrence("day", at=9 * HOUR + 5 * MINUTE)),
    ("every day at 09:05", Recurrence("day", at=9 * HOUR + 5 * MINUTE)),
    ("every day at 0:00", Recurrence("day", at=0)),
    ("every day at 23:59:59", Recurrence("day", at=DAY - 1)),
    ("every 2 days at 10:30", Recurrence("day", 2, 2, at=10 * HOUR + 30 * MINUTE)),
    ("every 2 to 5 days at 06:00:01", Recurrence("day", 2, 5, at=6 * HOUR + 1)),
    ("every week", Recurrence("week")),
    ("every weeks", Recurrence("week")),
    ("every 1 week", Recurrence("week")),
    ("every 2 weeks", Recurrence("week", 2, 2)),
    ("every 1 to 2 weeks", Recurrence("week", 1, 2)),
    ("every monday", Recurrence("week", weekday=0)),
    ("every tuesday", Recurrence("week", weekday=1)),
    ("every wednesday", Recurrence("week", weekday=2)),
    ("every thursday", Recurrence("week", weekday=3)),
    ("every friday", Recurrence("week", weekday=4)),
    ("every saturday", Recurrence("week", weekday=5)),
    ("every sunday", Recurrence("week", weekday=6)),
    ("every monday at 10:30", Recurrence("week", weekday=0, at=10 * HOUR + 30 * MINUTE)),
    ("every friday at 7:00", Recurrence("week", weekday=4, at=7 * HOUR)),
    ("every sunday at 23:59:59", Recurrence("week", weekday=6, at=DAY - 1)),
    ("EVERY 2 To 3 HOURS At :30", Recurrence("hour", 2, 3, at=30 * MINUTE)),
    ("Every MONDAY at 10:30", Recurrence("week", weekday=0, at=10 * HOUR + 30 * MINUTE)),
    ("\tevery\r\n 2 \u00a0 days\u3000at  10:30 ", Recurrence("day", 2, 2, at=10 * HOUR + 30 * MINUTE)),
]


@pytest.mark.parametrize(("text", "recurrence"), ACCEPTED, ids=short(ACCEPTED))
def test_spec_is_understood(text, recurrence):
    assert parse_spec(text) == recurrence


NUMBER = "a whole number from 1 is wanted here"
FAR = "the next run would be past the year 9999"
CLOCK_RANGE = "hours go from 00 to 23, minutes and seconds from 00 to 59"
REFUSED = {  # what is wrong: the spec, and the word that it stumbles on; "" is its end
    "a schedule starts with 'now' or 'every'": [
        ("", ""), (" \t\r\n", ""), ("tomorrow", "tomorrow"), ("10:30", "10:30"), ("2 days every", "2"),
        ("at 10:30 every day", "at"), ("day", "day"), ("everyday", "everyday"), ("each day", "each"),
        ("in 2 hours", "in"), ("* * * * *", "*"), ("now,", "now,"), ("żółw", "żółw"), ("x" * 40, "x" * 40),
        ("x" * 41, "x" * 37 + "..."), ("NOPE", "nope"),
    ],
    "a whole number from 1, a unit of time or a weekday is wanted here": [
        ("every", ""), ("every every day", "every"), ("every now", "now"), ("every at 10:30", "at"),
        ("every to 3 days", "to"), ("every -1 days", "-1"), ("every +2 days", "+2"), ("every ½ days", "½"),
        ("every two days", "two"), ("every fortnight", "fortnight"), ("every month", "month"), ("every mon", "mon"),
        ("every mondays", "mondays"), ("every dayss", "dayss"), ("every ｄay", "ｄay"), ("every s", "s"),
        ("every other day", "other"), ("every weekday", "weekday"), ("every day, at 10:30", "day,"),
    ],
    "a unit of time is wanted here": [
        ("every 2", ""), ("every 2 to 3", ""), ("every 2 3 days", "3"), ("every 2 monday", "monday"),
        ("every 2 mondays", "mondays"), ("every 1 monday", "monday"), ("every 1 to 2 mondays at 10:30", "mondays"),
        ("every 2 to 3 to 4 days", "to"), ("every 2 years", "years"), ("every 2 at 10:30", "at"),
        ("every 2 every 3 days", "every"), ("every 2 - 3 days", "-"),
    ],
    NUMBER: [
        ("every 0 days", "0"), ("every 000 days", "000"), ("every 1.5 days", "1.5"), ("every 1,5 days", "1,5"),
        ("every 1e3 seconds", "1e3"), ("every 1_000 seconds", "1_000"), ("every 0x10 seconds", "0x10"),
        ("every 2days", "2days"), ("every 2-3 days", "2-3"), ("every ² days", "²"), ("every ٣ days", "٣"),
        ("every 1٣ days", "1٣"), ("every ３ days", "３"), ("every 2 to", ""), ("every 2 to days", "days"),
        ("every 0 to 3 days", "0"), ("every 2 to 0 days", "0"), ("every 2 to -3 days", "-3"),
        ("every 2 to ٣ days", "٣"), ("every 2 to 3.5 days", "3.5"), ("every 2 to to 3 days", "to"),
    ],
    FAR: [
        ("every 253402214401 seconds", "253402214401"), ("every 4223370241 minutes", "4223370241"),
        ("every 70389505 hours", "70389505"), ("every 2932897 days", "2932897"), ("every 418986 weeks", "418986"),
        ("every 1 to 2932897 days", "2932897"), ("every 1000000000000 seconds", "1000000000000"),
        ("every 1 to 1000000000000 seconds", "1000000000000"),
        ("every " + "9" * 900 + " days", "9" * 37 + "..."), ("every 1 to " + "9" * 900 + " days", "9" * 37 + "..."),
    ],
    "the second number must not be below the first, 3": [("every 3 to 2 days", "2"), ("every 3 to 1 days", "1")],
    "write 'every 2 seconds'": [("every 2 second", "second")],
    "write 'every 2 minutes'": [("every 2 minute", "minute")],
    "write 'every 2 hours'": [("every 2 hour at :15", "hour")],
    "write 'every 2 days'": [("every 2 day", "day"), ("EVERY  2 DAY at 10:30", "day")],
    "write 'every 2 weeks'": [("every 2 week", "week")],
    "write 'every 1 to 3 days'": [("every 1 to 3 day", "day")],
    "write 'every 1 to 1 hours'": [("every 1 to 1 hour", "hour")],
    "the time of 'days' is written HH:MM, H:MM or HH:MM:SS": [
        ("every day at", ""), ("every day at at 10:30", "at"), ("every day at noon", "noon"), ("every day at 10", "10"),
        ("every day at 1030", "1030"), ("every day at :30", ":30"), ("every day at 10:3", "10:3"),
        ("every day at 10:30:5", "10:30:5"), ("every day at 9:05:07", "9:05:07"), ("every day at 010:30", "010:30"),
        ("every day at 1:2:3:4", "1:2:3:4"), ("every day at 10.30", "10.30"), ("every day at 9:30pm", "9:30pm"),
        ("every day at -1:30", "-1:30"), ("every day at 1٣:30", "1٣:30"), ("every day at 10:30Z", "10:30z"),
        ("every 2 to 3 days at :15", ":15"), ("every monday at", ""), ("every monday at :15", ":15"),
        ("every friday at monday", "monday"), ("every day at 10 : 30", "10"),
        ("every day at " + "1" * 900, "1" * 37 + "..."),
    ],
    "the time of 'hours' is written MM:SS or :MM": [
        ("every hour at", ""), ("every hour at 15", "15"), ("every hour at 1:15", "1:15"), ("every hour at :5", ":5"),
        ("every hour at 10:30:15", "10:30:15"), ("every 2 hours at ::15", "::15"), ("every hour at :²5", ":²5"),
    ],
    "the time of 'minutes' is written :SS": [
        ("every minute at", ""), ("every minute at 30", "30"), ("every minute at 00:30", "00:30"),
        ("every minute at :5", ":5"), ("every 2 minutes at :030", ":030"),
    ],
    CLOCK_RANGE: [
        ("every day at 24:00", "24:00"), ("every day at 99:99", "99:99"), ("every day at 10:60", "10:60"),
        ("every day at 23:59:60", "23:59:60"), ("every monday at 25:00", "25:00"), ("every hour at 60:00", "60:00"),
        ("every hour at 00:60", "00:60"), ("every hour at :60", ":60"), ("every minute at :60", ":60"),
    ],
    "'seconds' take no time; only minutes, hours, days and weekdays do": [
        ("every second at :00", "at"), ("every 2 to 3 seconds at", "at"),
    ],
    "'weeks' take no time; only minutes, hours, days and weekdays do": [
        ("every week at 10:30", "at"), ("every 2 weeks at monday", "at"),
    ],
    "nothing may follow here": [
        ("now now", "now"), ("now every day", "every"), ("now at 10:30", "at"), ("every day every day", "every"),
        ("every day at 10:30 sharp", "sharp"), ("every day at 10:30 at 11:30", "at"), ("every day at 10:30 pm", "pm"),
        ("every monday tuesday", "tuesday"), ("every monday monday", "monday"),
        ("every monday and friday", "and"), ("every day to 3", "to"), ("every day monday", "monday"),
        ("every minute hour", "hour"), ("every week monday at 10:30", "monday"), ("every 2 days 3 hours", "3"),
        ("every day \u200bat 10:30", "\u200bat"),
    ],
}  # fmt: skip
REFUSALS = [(text, word, wanted) for wanted, rows in REFUSED.items() for text, word in rows]


@pytest.mark.parametrize(("text", "word", "wanted"), REFUSALS, ids=short(REFUSALS))
def test_spec_is_refused_in_words(text, word, wanted):
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    problem = f"'{word}' does not fit: {wanted}" if word else f"it ends too early: {wanted}"
    assert str(caught.value) == f"schedule not understood: {problem}. The forms are: {scrapy_do.SPEC_FORMS}"
    assert caught.value.status == 400


def test_refusals_are_sixty_at_least():
    assert len(set(REFUSALS)) >= 60


@pytest.mark.parametrize(
    "text", ["every " + "9" * 5000 + " days", "every day" + " " * 992, "now " * 251, "x" * 10_000_000],
    ids=["digits", "spaces", "words", "huge"],
)  # fmt: skip
def test_spec_is_refused_when_it_is_very_long(text):
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert str(caught.value) == "schedule not understood: it has more than 1000 characters"


def test_spec_of_a_thousand_characters_is_read():
    assert parse_spec("every day" + " " * 991) == Recurrence("day")


WORDS = (
    "now", "every", "0", "1", "2", "7", "to", "at", "second", "seconds", "day", "days", "week", "monday", ":15", "9:05",
)  # fmt: skip


@hypothesis.settings(PROPERTY, max_examples=500)
@hypothesis.given(st.lists(st.sampled_from(WORDS)))
def test_spec_of_any_words_is_understood_or_refused(words):
    """No other exception may come out, and whatever is accepted has a due time."""
    recurrence = None
    with contextlib.suppress(SpecError):
        recurrence = parse_spec(" ".join(words))
    assert recurrence is None or recurrence.next_after(0.0) > 0


SATURDAY = 1718445600.25  # 2024-06-15 12:00:00.25 in Warsaw, two hours ahead of UTC
DUES = [
    ("every second", 1718445601.25, "Sat 15 12:00:01"),
    ("every 90 seconds", 1718445690.25, "Sat 15 12:01:30"),
    ("every minute", 1718445660.25, "Sat 15 12:01:00"),
    ("every 10 minutes", 1718446200.25, "Sat 15 12:10:00"),
    ("every hour", 1718449200.25, "Sat 15 13:00:00"),
    ("every 36 hours", 1718575200.25, "Mon 17 00:00:00"),
    ("every day", 1718532000.25, "Sun 16 12:00:00"),
    ("every 2 days", 1718618400.25, "Mon 17 12:00:00"),
    ("every week", 1719050400.25, "Sat 22 12:00:00"),
    ("every 2 weeks", 1719655200.25, "Sat 29 12:00:00"),
    ("every minute at :00", 1718445660.0, "Sat 15 12:01:00"),
    ("every minute at :30", 1718445630.0, "Sat 15 12:00:30"),
    ("every 2 minutes at :30", 1718445750.0, "Sat 15 12:02:30"),
    ("every hour at :00", 1718449200.0, "Sat 15 13:00:00"),
    ("every hour at 00:15", 1718445615.0, "Sat 15 12:00:15"),
    ("every hour at :15", 1718446500.0, "Sat 15 12:15:00"),
    ("every 3 hours at 00:30", 1718456430.0, "Sat 15 15:00:30"),
    ("every day at 10:30", 1718526600.0, "Sun 16 10:30:00"),
    ("every day at 12:00", 1718532000.0, "Sun 16 12:00:00"),
    ("every day at 12:00:01", 1718445601.0, "Sat 15 12:00:01"),
    ("every 2 days at 10:30", 1718613000.0, "Mon 17 10:30:00"),
    ("every 2 days at 23:00", 1718658000.0, "Mon 17 23:00:00"),
    ("every monday", 1718618400.25, "Mon 17 12:00:00"),
    ("every friday", 1718964000.25, "Fri 21 12:00:00"),
    ("every saturday", 1719050400.25, "Sat 22 12:00:00"),
    ("every saturday at 10:30", 1719045000.0, "Sat 22 10:30:00"),
    ("every saturday at 23:59:59", 1718488799.0, "Sat 15 23:59:59"),
    ("every sunday at 0:00", 1718488800.0, "Sun 16 00:00:00"),
]


@pytest.mark.parametrize(("text", "due", "shown"), DUES, ids=short(DUES))
def test_next_due_is_exact(zone, text, due, shown):
    zone("Europe/Warsaw")
    found = parse_spec(text).next_after(SATURDAY)
    assert (found, time.strftime("%a %d %H:%M:%S", time.localtime(found))) == (due, shown)


LOCAL = [  # spec, zone, from, and the next three due times, local and in UTC
    ("every day at 02:30", "Europe/Warsaw", "2024-03-30 12:00", "31 03:00 01:00, 01 02:30 00:30, 02 02:30 00:30"),
    ("every sunday at 02:30", "Europe/Warsaw", "2024-03-24 12:00", "31 03:00 01:00, 07 02:30 00:30, 14 02:30 00:30"),
    ("every day at 02:30", "Europe/Warsaw", "2024-10-26 12:00", "27 02:30 00:30, 28 02:30 01:30, 29 02:30 01:30"),
    ("every 12 hours", "Europe/Warsaw", "2024-03-30 12:00", "31 00:00 23:00, 31 13:00 11:00, 01 01:00 23:00"),
    ("every hour at :15", "Europe/Warsaw", "2024-03-31 01:00", "31 01:15 00:15, 31 03:15 01:15, 31 04:15 02:15"),
    ("every hour at :15", "Europe/Warsaw", "2024-10-27 01:30", "27 02:15 00:15, 27 02:15 01:15, 27 03:15 02:15"),
    ("every day at 01:30", "America/New_York", "2024-11-02 12:00", "03 01:30 05:30, 04 01:30 06:30, 05 01:30 06:30"),
    ("every day at 00:00", "Africa/Cairo", "2024-04-25 12:00", "26 01:00 22:00, 27 00:00 21:00, 28 00:00 21:00"),
    ("every day at 02:10", "Australia/Lord_Howe", "2024-10-05 12:00", "06 02:30 15:30, 07 02:10 15:10, 08 02:10 15:10"),
    ("every hour at :45", "Australia/Lord_Howe", "2024-04-07 01:00", "07 01:45 14:45, 07 01:45 15:15, 07 02:45 16:15"),
    ("every hour at :15", "Australia/Lord_Howe", "2024-04-07 01:00", "07 01:15 14:15, 07 01:45 15:15, 07 02:15 15:45"),
    ("every hour at :00", "Asia/Kathmandu", "2024-01-01 00:30", "01 01:00 19:15, 01 02:00 20:15, 01 03:00 21:15"),
    ("every 2 days at 00:30", "America/Havana", "2024-03-08 12:00", "10 01:00 05:00, 12 00:30 04:30, 14 00:30 04:30"),
    ("every 2 days at 23:30", "America/Nuuk", "2024-03-28 23:30", "31 00:00 01:00, 01 23:30 00:30, 03 23:30 00:30"),
    ("every 2 days at 10:30", "Pacific/Apia", "2011-12-28 10:30", "31 00:00 10:00, 01 10:30 20:30, 03 10:30 20:30"),
    ("every friday at 10:30", "Pacific/Apia", "2011-12-29 00:00", "31 00:00 10:00, 06 10:30 20:30, 13 10:30 20:30"),
]


@pytest.mark.parametrize(("text", "name", "begin", "dues"), LOCAL, ids=short(LOCAL))
def test_next_due_keeps_local_time(zone, text, name, begin, dues):
    place, utc = zone(name), datetime.timezone.utc
    found = fire(parse_spec(text), instant(begin, place), 3)
    assert ", ".join(f"{wall_clock(due, place):%d %H:%M} {wall_clock(due, utc):%H:%M}" for due in found) == dues


@st.composite
def specs(draw, ranges=True):
    """Draw a spec of any form."""
    unit = draw(st.sampled_from([*UNIT_SECONDS, "weekday"]))
    first, second, third = (f"{draw(st.integers(0, limit)):02}" for limit in (23, 59, 59))
    times = {
        "minute": [f":{third}"],
        "hour": [f":{second}", f"{second}:{third}"],
        "day": [f"{first}:{second}", f"{first}:{second}:{third}"],
    }
    times["weekday"] = times["day"]
    at = draw(st.sampled_from(["", *[f" at {text}" for text in times.get(unit, [])]]))
    if unit == "weekday":
        return f"every {draw(st.sampled_from(WEEKDAYS))}{at}"
    low, more = draw(st.integers(1, 40)), draw(st.integers(0, 10))
    forms = [f"every {unit}{at}", f"every {low} {unit}s{at}"]
    return draw(st.sampled_from([*forms, f"every {low} to {low + more} {unit}s{at}"] if ranges else forms))


@st.composite
def places(draw, whole=False):
    """Draw a zone and an instant, half of the time near a change of the zone's clocks."""
    name = draw(st.sampled_from(ZONES))
    moments = [st.integers(FIRST_INSTANT, END_INSTANT)]
    if transitions(name):
        near = st.tuples(st.sampled_from(transitions(name)), st.integers(-3 * DAY, 3 * DAY) | st.integers(-9000, 9000))
        moments.append(near.map(sum))
    moment = float(draw(st.one_of(moments)))
    return name, moment if whole else moment + draw(st.integers(0, 999_999)) / 1e6


def is_split(moment, place, span):
    """Tell whether the clocks change by a part of an hour near a moment, so that hours are not whole."""
    return bool((utc_offset(moment + span, place) - utc_offset(moment - span, place)) % HOUR)


@hypothesis.settings(PROPERTY, max_examples=400)
@hypothesis.given(specs(), places(), st.integers(0, 999))
def test_next_due_is_later_and_on_the_grid(text, drawn, seed):
    name, moment = drawn
    recurrence = parse_spec(text)
    unit, low, high, weekday, at = recurrence
    with local_zone(name) as place:
        due = recurrence.next_after(moment, random.Random(seed))
        assert due == recurrence.next_after(moment, random.Random(seed))
        assert type(due) is float
        assert moment < due <= recurrence.latest_after(moment)
        shown, before = wall_clock(due, place), wall_clock(moment, place)
        seconds = shown.hour * HOUR + shown.minute * MINUTE + shown.second
        if recurrence.is_elapsed and at is None:
            count = round((due - moment) / UNIT_SECONDS[unit])
            assert low <= count <= high
            assert due - moment == pytest.approx(count * UNIT_SECONDS[unit], abs=1e-6)
        elif recurrence.is_elapsed:
            assert shown.microsecond == 0
            assert seconds % UNIT_SECONDS[unit] == at or is_split(moment, place, due - moment)
        elif due not in transitions(name):
            wanted = shown.replace(hour=0, minute=0, second=0, microsecond=0) + datetime.timedelta(seconds=at or 0)
            assert shown == wanted if at is not None else shown.time() == before.time()
            assert weekday in (None, shown.weekday())
            days = (shown.date() - before.date()).days
            assert weekday is not None or low == 1 or days in range(low * UNIT_SECONDS[unit] // DAY, days + 1)


@functools.cache
def first_instant(day, seconds, place):
    """Return the first instant at which clocks show a time of a day, or later: begin well before, and walk."""
    wanted = datetime.datetime.combine(day, datetime.time()) + datetime.timedelta(seconds=seconds)
    moment = int(wanted.replace(tzinfo=place).timestamp()) - 2 * HOUR
    while wall_clock(moment, place) >= wanted:
        moment -= HOUR
    while wall_clock(moment, place) < wanted:
        moment += 1
    return moment


def next_by_walking(recurrence, count, moment, name):
    """Return what next_after must return for a whole second, straight from the words of the manual."""
    place = zoneinfo.ZoneInfo(name)
    unit, _, _, weekday, at = recurrence
    if at is None and recurrence.is_elapsed:
        return moment + count * UNIT_SECONDS[unit]
    if recurrence.is_elapsed:

        def seconds():
            return wall_clock(moment, place).minute * MINUTE % UNIT_SECONDS[unit] + wall_clock(moment, place).second

        if count == 1:
            moment += 1
        while count != 1 and seconds() != 0:  # back to where this hour or minute began
            moment -= 1
        while seconds() != at:
            moment += 1
        return moment + (count * UNIT_SECONDS[unit] if count != 1 else 0)
    shown = wall_clock(moment, place)
    day = shown.date()
    if at is None:
        at = shown.hour * HOUR + shown.minute * MINUTE + shown.second
    elif moment in transitions(name) and first_instant(day - datetime.timedelta(1), at, place) == moment:
        day -= datetime.timedelta(1)  # a gap over midnight: this is the run of yesterday
    while weekday is not None and day.weekday() != weekday:
        day += datetime.timedelta(1)
    step = datetime.timedelta(**{unit + "s": count})
    if count != 1:
        day += step
    while first_instant(day, at, place) <= moment:
        day += step
    return first_instant(day, at, place)


class Fixed:
    """Draw what a test says; a random.Random for those who know what comes."""

    def __init__(self, number):
        self.number = number

    def randint(self, low, high):
        """Return the number, which must lie between the bounds."""
        assert low <= self.number <= high
        return self.number


@hypothesis.settings(PROPERTY, max_examples=150)
@hypothesis.given(specs(), places(whole=True), st.data())
def test_next_due_equals_a_walk_second_by_second(text, drawn, data):
    name, moment = drawn
    recurrence = parse_spec(text)
    with local_zone(name) as place:
        hypothesis.assume(not recurrence.is_elapsed or not is_split(moment, place, 2 * HOUR))
        count = data.draw(st.integers(recurrence.low, recurrence.high))
        assert recurrence.next_after(moment, Fixed(count)) == next_by_walking(recurrence, count, int(moment), name)


def alarm(wall, place):
    """Return the first instant at which clocks show the second `wall`, counted from 1970 on that clock, or later."""
    shown = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=wall)
    moment = shown.replace(tzinfo=place).timestamp()  # PEP 495: the first pass; in a gap an instant after it
    return moment if wall_clock(moment, place) == shown else max(m for m in transitions(place.key) if m <= moment)


def test_days_fire_once_at_every_change_of_the_clocks():
    """All gaps and folds of a century: the first instant after the gap, the first pass of the fold."""
    count = 0
    for place, moment, before, after in jumps():
        low, high = moment + min(before, after), moment + max(before, after)  # on the clock: skipped, or shown twice
        lost_day = high - low == DAY  # the two midnights of which were one instant: Apia, once
        for wall in (low + lost_day, (low + high) // 2, high - 1):
            expected = moment if after > before else wall - before
            daily = Recurrence("day", at=wall % DAY)
            weekly = Recurrence("week", weekday=(wall // DAY + 3) % 7, at=wall % DAY)
            for recurrence, step in ((daily, DAY), (weekly, WEEK)):
                begin = expected - 0.5 - (0 if lost_day else 3 * HOUR)
                assert fire(recurrence, begin, 2) == [expected, alarm(wall + step, place)], (place, moment)
                assert recurrence.next_after(max(moment, expected) + 0.5) == alarm(wall + step, place)
                count += 1
    assert count > 4000


def test_every_hour_at_a_minute_fires_in_every_real_hour():
    """Where clocks change by whole hours, each gap is an hour; by half an hour, none is longer."""
    for place, moment, before, after in jumps():
        for text in (":00", ":15", ":45", "00:15", "59:59"):
            dues = fire(parse_spec(f"every hour at {text}"), moment - 5 * HOUR - 0.5, 12)
            gaps = {second - first for first, second in itertools.pairwise(dues)}
            assert gaps == {HOUR} if (after - before) % HOUR == 0 else max(gaps) == HOUR, (place, moment)
            assert dues[-1] % HOUR == (parse_spec(f"every hour at {text}").at - after) % HOUR


@pytest.mark.parametrize("name", ZONES)
@pytest.mark.parametrize("text", ["every second", "every 7 minutes", "every hour", "every 5 hours", "every 25 hours"])
def test_intervals_are_elapsed_time_across_every_change_of_the_clocks(zone, name, text):
    zone(name)
    recurrence = parse_spec(text)
    size = recurrence.low * UNIT_SECONDS[recurrence.unit]
    for moment in transitions(name) or [SATURDAY]:
        begin = moment - size - 0.5
        assert fire(recurrence, begin, 3) == [begin + size, begin + 2 * size, begin + 3 * size]


@pytest.mark.parametrize(
    "text",
    [
        "every second", "every 3 seconds", "every minute", "every 90 minutes", "every hour", "every 2 hours",
        "every minute at :20", "every 3 minutes at :20", "every hour at :15", "every 3 hours at 00:30",
    ],
)  # fmt: skip
def test_interval_never_drifts_in_a_thousand_firings(zone, text):
    """Each run is late by a while that is not handed on; Warsaw changes its clocks 4 days on."""
    zone("Europe/Warsaw")
    lateness = random.Random(1)
    recurrence = parse_spec(text)
    size = recurrence.low * UNIT_SECONDS[recurrence.unit]
    first = due = recurrence.next_after(SATURDAY + 130 * DAY + 0.014793)
    for firing in range(1, 1001):
        due = recurrence.resume_after(due, due + lateness.random() * 0.99 * size)
        assert due == pytest.approx(first + firing * size, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "days"), [("every day", 1), ("every 2 days at 02:30", 2), ("every 2 weeks", 14), ("every sunday", 7)]
)
def test_days_never_drift_in_a_thousand_firings(zone, text, days):
    place = zone("Europe/Warsaw")
    origin = instant("2024-06-15T02:30:00.014793", place)
    recurrence = parse_spec(text).anchored(origin)
    first = due = recurrence.next_after(origin)
    for firing in range(1, 1001):
        due = recurrence.resume_after(due, due + 5 * HOUR)
        late = abs(wall_clock(due, place) - wall_clock(first, place) - datetime.timedelta(days * firing))
        assert late < datetime.timedelta(seconds=1e-5) or due in transitions("Europe/Warsaw")


def test_time_of_day_left_open_is_not_shifted_by_any_gap():
    """The runs after the delayed one come at the time of day, and on the days, that the first one set."""
    count = 0
    for place, moment, before, after in jumps():
        wall = moment + (before + after) // 2  # in the middle of the gap
        recurrences = [Recurrence("day"), Recurrence("day", 2, 2), Recurrence("week"), Recurrence("week", 2, 2)]
        for recurrence in recurrences if after > before else []:
            step = recurrence.low * UNIT_SECONDS[recurrence.unit]
            origin = alarm(wall - step, place)
            expected = [alarm(wall + number * step, place) for number in range(4)]
            assert expected[0] == moment
            assert fire(recurrence.anchored(origin), origin, 4) == expected, (place, moment)
            if recurrence.unit == "week" and recurrence.low == 1:
                weekly = recurrence._replace(weekday=(wall // DAY + 3) % 7).anchored(origin)
                assert fire(weekly, origin, 4) == expected, (place, moment)
            count += 1
    assert count > 1000


def test_time_of_day_left_open_is_taken_from_the_origin(zone):
    zone("Europe/Warsaw")
    assert parse_spec("every day").anchored(SATURDAY) == Recurrence("day", at=12 * HOUR + 0.25)
    assert parse_spec("every 2 weeks").anchored(SATURDAY) == Recurrence("week", 2, 2, at=12 * HOUR + 0.25)
    for text in ("every friday at 10:30", "every day at 10:30", "every hour", "every second", "every hour at :15"):
        assert parse_spec(text).anchored(SATURDAY) == parse_spec(text)


@pytest.mark.parametrize("text", ["every day", "every saturday", "every week"])
def test_schedule_is_not_due_at_the_moment_it_is_made(zone, text):
    """The rounding of floats changes at 2**30 and 2**31 seconds, where the local clock is ahead of UTC."""
    zone("Europe/Warsaw")
    moments = random.Random(1)
    for _ in range(1000):
        moment = 2 ** moments.choice([30, 31]) - moments.random() * HOUR
        recurrence = parse_spec(text).anchored(moment)
        assert recurrence.next_after(moment) > moment + HOUR


@hypothesis.settings(PROPERTY)
@hypothesis.given(specs(ranges=False), places(), st.floats(0, 60) | st.floats(0, 900))
def test_resume_equals_stepping(text, drawn, missed):
    name, moment = drawn
    with local_zone(name):
        recurrence = parse_spec(text).anchored(moment)
        is_split_grid = name == "Australia/Lord_Howe" and recurrence.at is not None and recurrence.low > 1
        hypothesis.assume(not (recurrence.unit == "hour" and is_split_grid))  # an hour's half has no one right phase
        hypothesis.assume(name != "Pacific/Apia" or recurrence.at != 0)  # one of its midnights stood for two
        due = expected = recurrence.next_after(moment)
        now = due + missed * recurrence.low * UNIT_SECONDS[recurrence.unit]
        while expected <= now:
            expected = recurrence.next_after(expected)
        assert recurrence.resume_after(due, now) == pytest.approx(expected, rel=0, abs=1e-6)
        assert recurrence.resume_after(expected, now) == expected  # once is enough


def test_resume_keeps_the_days_over_any_gap():
    """A leap that lands in a gap, above all in one at midnight, must not come out a day early."""
    for place, moment, before, after in jumps():
        wall = moment + (before + after) // 2
        for days in (2, 3) if after > before else ():
            recurrence = Recurrence("day", days, days, at=wall % DAY)
            due = alarm(wall - 6 * DAY, place)
            for now in range(moment + 2 * DAY + 1, moment + 9 * DAY, DAY):
                passed = next(number for number in itertools.count() if alarm(wall + number * DAY * days, place) > now)
                assert recurrence.resume_after(due, float(now)) == alarm(wall + passed * DAY * days, place)


class Counted(Recurrence):
    """Count how often a next due time is computed."""

    steps = 0

    def next_after(self, moment, rng=random):
        """Return the due time; a walk through all that was missed must fail, not hang."""
        Counted.steps += 1
        assert Counted.steps < 100
        return super().next_after(moment, rng)


@pytest.mark.parametrize("name", ["UTC", "Europe/Warsaw", "America/Havana"])
@pytest.mark.parametrize(
    "text",
    [
        "every second", "every 1 to 3 seconds", "every 2 minutes at :15", "every hour at :15", "every 2 to 3 hours",
        "every day", "every 2 days at 00:30", "every 1 to 3 days at 00:30", "every monday", "every 2 weeks",
    ],
)  # fmt: skip
def test_resume_takes_few_steps_over_centuries(zone, name, text):
    zone(name)
    recurrence = Counted(*parse_spec(text)).anchored(SATURDAY)
    latest = recurrence.latest_after(SATURDAY + 9e9)
    Counted.steps = 0
    assert SATURDAY + 9e9 < recurrence.resume_after(SATURDAY, SATURDAY + 9e9, random.Random(1)) <= latest
    assert Counted.steps <= 12


@hypothesis.settings(PROPERTY)
@hypothesis.given(specs(), places(), st.floats(0, 5e6), st.integers(0, 999))
def test_resume_is_never_further_away_than_the_next_run(text, drawn, gone, seed):
    name, moment = drawn
    rng = random.Random(seed)
    with local_zone(name):
        recurrence = parse_spec(text).anchored(moment)
        due, now = recurrence.next_after(moment, rng), moment + gone
        resumed = recurrence.resume_after(due, max(now, due), rng)
        assert max(now, due) < resumed <= recurrence.latest_after(max(now, due))
        if recurrence.is_elapsed and recurrence.at is None:
            assert resumed <= max(now, due) + recurrence.high * UNIT_SECONDS[recurrence.unit]


@hypothesis.settings(PROPERTY)
@hypothesis.given(specs(), places(), st.floats(0, 1))
def test_latest_is_the_greatest_draw_and_never_recedes(text, drawn, share):
    """Were it less than a due time that was drawn, a restart would draw that one again."""
    name, moment = drawn
    with local_zone(name):
        recurrence = parse_spec(text).anchored(moment)
        dues = {recurrence.next_after(moment, Fixed(n)) for n in range(recurrence.low, recurrence.high + 1)}
        assert recurrence.latest_after(moment) == max(dues)
        assert recurrence.latest_after(moment + (max(dues) - moment) * share) >= max(dues)


def test_every_week_stays_on_its_weekday(zone):
    """Another day's morning, at a restart or when the clock was set back, must not take the due time for too far."""
    zone("Europe/Warsaw")
    recurrence = parse_spec("every week").anchored(SATURDAY)
    due = recurrence.next_after(SATURDAY)
    for hours in range(7 * 24):
        assert recurrence.latest_after(SATURDAY + hours * HOUR) >= due


@pytest.mark.parametrize("text", ["every 2 to 4 seconds", "every 2 to 4 hours at :15", "every 2 to 4 days"])
def test_interval_is_drawn_afresh_for_every_run(zone, text):
    zone("UTC")
    recurrence, rng, dues = parse_spec(text), random.Random(1), [0.0]
    for _ in range(200):
        dues.append(recurrence.next_after(dues[-1], rng))
    gaps = [round((second - first) / UNIT_SECONDS[recurrence.unit]) for first, second in itertools.pairwise(dues[1:])]
    assert all(gaps.count(number) > 40 for number in (2, 3, 4))
    assert len(gaps) == sum(gaps.count(number) for number in (2, 3, 4))


@pytest.mark.parametrize("name", ["UTC", "Pacific/Apia", "America/Nuuk"])
@pytest.mark.parametrize(
    "text",
    [
        "every 2900000 days", "every 2900000 days at 23:59:59", "every 1 to 2900000 days", "every 400000 weeks",
        "every 69000000 hours at 59:59", "every 250000000000 seconds", "every 1 to 250000000000 seconds",
    ],
)  # fmt: skip
def test_next_due_past_the_year_9999_is_refused(zone, name, text):
    """Always, not only when a far number is drawn; and whatever is accepted can be kept in the state file."""
    zone(name)
    recurrence = parse_spec(text)
    most = recurrence.high * UNIT_SECONDS[recurrence.unit]
    assert recurrence.next_after(0.0, Fixed(recurrence.low)) > 0
    for moment in (LAST_INSTANT - most + 1, LAST_INSTANT - 1):
        for function in (recurrence.next_after, recurrence.latest_after):
            with pytest.raises(SpecError) as caught:
                function(moment)
            assert str(caught.value) == "the next run would be past the year 9999; choose a shorter interval"
    for hours in range(80):
        with contextlib.suppress(SpecError):
            assert recurrence.next_after(LAST_INSTANT - most - hours * HOUR, Fixed(recurrence.high)) <= LAST_INSTANT


# The schedule library as an oracle: what people know `every monday at 10:30` from.


@pytest.fixture
def freeze(monkeypatch):
    """Return a function that stops the clock of the schedule library at an instant."""

    def stop(moment):
        class Frozen(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime.fromtimestamp(moment, tz)

        names = types.SimpleNamespace(datetime=Frozen, timedelta=datetime.timedelta, time=datetime.time)
        monkeypatch.setattr(schedule, "datetime", names)

    return stop


def every(number=1):
    """Return a job of a schedule library of its own."""
    return schedule.Scheduler().every(number)


def asked(text):
    """Return a job of the schedule library from a spec, its next run not yet computed."""
    words = text.split()[1:]
    at = words.pop() if "at" in words else None
    numbers = [int(word) for word in words if word.isdigit()]
    job = every(*numbers[:1])
    for latest in numbers[1:]:
        job.to(latest)
    (unit,) = (word for word in words if word not in ("at", "to") and not word.isdigit())
    job = getattr(job, unit)
    return job.at(at) if at else job


def answered(job):
    """Return when the schedule library would run a job next."""
    return job.do(int).next_run.timestamp()


def generate_spec(rng):
    """Return a spec that both understand."""
    unit = rng.choice(["second", "minute", "hour", "day", "week", "weekday"])
    first, second, third = (f"{rng.randrange(limit):02}" for limit in (24, 60, 60))
    days = [f" at {first}:{second}", f" at {first}:{second}:{third}"]
    hours = [f" at :{second}", f" at {second}:{third}"]
    at = rng.choice(["", *{"minute": [f" at :{third}"], "hour": hours, "day": days, "weekday": days}.get(unit, [])])
    if unit == "weekday":
        return f"every {rng.choice(WEEKDAYS)}{at}"
    low = rng.randint(1, 12)
    number = rng.choice(["", "1 ", f"{low} ", f"{low} to {low + rng.randint(0, 9)} "])
    return f"every {number}{unit}s{at}"


def test_schedule_library_agrees_on_a_thousand_specs(zone, freeze):
    zone("UTC")
    rng = random.Random(2017)
    texts = set()
    while len(texts) < 1000:
        text, moment = generate_spec(rng), float(rng.randrange(FIRST_INSTANT, END_INSTANT)) + rng.randrange(10**6) / 1e6
        if rng.random() < 0.2:
            moment -= moment % rng.choice([MINUTE, HOUR, DAY])  # on the stroke, where "later" and "not before" differ
        freeze(moment)
        random.seed(len(texts))  # the library draws from the module's generator
        expected = answered(asked(text))
        due = parse_spec(text).next_after(moment, random.Random(len(texts)))
        assert due == pytest.approx(expected, rel=0, abs=1e-6), (text, moment)
        texts.add(text)


def both(text, moment, freeze):
    """Return the local time of the next run, by the schedule library and by this module, and the hours until then."""
    freeze(moment)
    found = [answered(asked(text)), parse_spec(text).next_after(moment)]
    return [f"{time.strftime('%H:%M', time.localtime(due))} in {(due - moment) / HOUR:g}" for due in found]


def test_schedule_library_departs_in_the_spring_gap(zone, freeze):
    """A time that does not exist: the library runs as late as the gap is long, this module right after it."""
    place = zone("Europe/Warsaw")
    begin = instant("2024-03-31T01:30", place)
    assert both("every day at 02:20", begin, freeze) == ["03:20 in 0.833333", "03:00 in 0.5"]


def test_schedule_library_departs_in_the_autumn_fold(zone, freeze):
    """A time that comes twice: the library runs on both passes, this module on the first."""
    place = zone("Europe/Warsaw")
    second_pass = instant("2024-10-27T02:15", place, fold=1)
    assert both("every day at 02:30", second_pass - HOUR, freeze) == ["02:30 in 0.25", "02:30 in 0.25"]
    freeze(second_pass)
    assert asked("every day at 02:30").do(int).next_run == datetime.datetime(2024, 10, 27, 2, 30)
    assert parse_spec("every day at 02:30").next_after(second_pass) == instant("2024-10-28T02:30", place)


def test_schedule_library_departs_in_what_an_hour_is(zone, freeze):
    """The library adds hours to the local clock, this module to the time that passes."""
    place = zone("Europe/Warsaw")
    assert both("every 3 hours", instant("2024-03-31T01:00", place), freeze) == ["04:00 in 2", "05:00 in 3"]
    assert both("every 3 hours", instant("2024-10-27T01:00", place), freeze) == ["04:00 in 4", "03:00 in 3"]
    assert both("every hour at :15", instant("2024-10-27T02:15", place), freeze) == ["03:15 in 2", "02:15 in 1"]


def test_schedule_library_departs_in_drift(zone, freeze):
    """The library counts from when a run ended, this module from when it was due."""
    zone("UTC")
    freeze(0.0)
    job, recurrence = asked("every 10 seconds").do(int), parse_spec("every 10 seconds")
    freeze(13.5)  # due at 10, run 3.5 seconds late
    job.run()
    assert (job.next_run.timestamp(), recurrence.resume_after(10.0, 13.5)) == (23.5, 20.0)
    freeze(99.0)  # and several missed
    job.run()
    assert (job.next_run.timestamp(), recurrence.resume_after(20.0, 99.0)) == (109.0, 100.0)


ALLOWED = [  # by the library, which then does something else than the words say
    ("every 0 seconds", lambda: every(0).seconds),  # whose do() never returns
    ("every -5 seconds", lambda: every(-5).seconds),
    ("every 1.5 hours", lambda: every(1.5).hours.do(int)),
    ("every 1 to 3 day", lambda: every(1).to(3).day.do(int)),
    ("every 1 to 3 monday", lambda: every(1).to(3).monday.do(int)),
    ("every 1 monday", lambda: every(1).monday.do(int)),
    ("every monday tuesday", lambda: every().monday.tuesday.do(int)),
    ("every day week", lambda: every().day.week.do(int)),
    ("every day at 10:30 at 11:30", lambda: every().day.at("10:30").at("11:30").do(int)),
    ("every day at 1٣:30", lambda: every().day.at("1٣:30").do(int)),
]


@pytest.mark.parametrize(("text", "job"), ALLOWED, ids=short(ALLOWED))
def test_schedule_library_departs_in_what_it_allows(text, job):
    job()
    with pytest.raises(SpecError):
        parse_spec(text)


def test_schedule_library_departs_in_what_it_refuses():
    """One digit for an hour, and any case, are allowed here; a far year is a sentence, not an OverflowError."""
    with pytest.raises(schedule.ScheduleValueError):
        asked("every day at 9:05")
    with pytest.raises(AttributeError):
        asked("every Monday")
    with pytest.raises(OverflowError):
        asked("every 2930000 days").do(int)
    assert parse_spec("every Monday at 9:05") == parse_spec("every monday at 09:05")
    with pytest.raises(SpecError, match="past the year 9999"):
        parse_spec("every 2930000 days").next_after(SATURDAY)


# ---- 4. Store --------------------------------------------------------------------------------------------------------


def fold(document):
    """Return what the state file says, its changes put where they belong."""
    for change in document.pop("changes", []):
        for section, records in change.items():
            document[section].update(records)
            document[section] = {key: record for key, record in document[section].items() if record is not None}
    return document


def state(site_folder):
    """Return what the state file says; a change may be half written just then."""
    with contextlib.suppress(ValueError):
        return fold(json.loads((site_folder / "data/state.json").read_text()))
    return state(site_folder)


def test_the_state_file_has_a_line_for_each_job_and_is_private(site, tmp_path):
    site.push()
    identifiers = [site.schedule(when="every 3 hours", description=text) for text in ("Zażółć", "漢字\n2", "x")]
    lines = (tmp_path / "data/state.json").read_text().splitlines()
    assert [line[1:37] for line in lines if line[1:37] in identifiers] == identifiers
    assert "Zażółć" in "".join(lines)
    assert list(state(tmp_path)["jobs"]) == identifiers
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "data").iterdir()}
    assert modes == {"lock": 0o600, "state.json": 0o600, "projects": 0o700, "logs": 0o700, "work": 0o700,
                     "spider-data": 0o700}  # fmt: skip
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def exposed(folder):
    """Return what a daemon has made in its folder, but for what its spiders keep, and not for itself alone."""
    own = [path for path in folder.rglob("*") if len(path.relative_to(folder).parts) <= 2 and path.parent.name != "spider-data"]
    return [path for path in [folder, *own] if path.lstat().st_mode & 0o077]


@pytest.mark.parametrize("mask", ["000", "022"])
def test_all_files_are_private_at_any_time(outside, tmp_path, mask):
    command = ("/bin/sh", "-c", f'umask {mask}; exec "$@"', "sh", sys.executable, str(MODULE))
    site, folder = outside(command=command), tmp_path / "data"
    project = plus(("list.sh", f"echo on > {tmp_path}/on; {until(tmp_path / 'gate')} echo hold"), ("hold.sh", HOLD), ("sub/text", ""))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(site.push, project)
        wait_for((tmp_path / "on").exists)
        during = exposed(folder), len(list((folder / "work").iterdir()))
        (tmp_path / "gate").touch()
        assert pushed.result()["spiders"] == ["hold"]
    assert during == ([], 3)  # the upload, its tree, and what `scrapy list` prints
    job = site.schedule("hold")
    wait_for(lambda: site.log(job, "out") == "started\n")
    assert len(list((folder / "work").iterdir())) == 2
    assert exposed(folder) == []
    assert {path.name for path in folder.iterdir()} == {"lock", "state.json", "projects", "logs", "work", "spider-data"}
    release(tmp_path)
    site.wait_job(job)
    assert exposed(folder) == []
    assert folder.stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777], ids=oct)
def test_a_data_folder_that_others_may_write_to_is_refused(tmp_path, mode):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine").write_text("x")
    folder.chmod(mode)
    before = folder_contents(folder)
    status, said = run_main("--port", "0", "--data-dir", str(folder))
    assert (status, said.count("\n"), f"'chmod 700 {folder}'" in said) == (1, 1, True)
    assert (folder_contents(folder), folder.stat().st_mode & 0o7777) == (before, mode)


def test_an_empty_data_folder_and_loose_folders_in_it_become_private(outside, tmp_path):
    folder, large = tmp_path / "data", tmp_path / "large"
    for path in (folder, large):
        path.mkdir()
        path.chmod(0o777)
    site = outside()
    assert exposed(folder) == []
    site.stop()
    for name in ("projects", "logs", "work"):
        (folder / name).chmod(0o777)
    (folder / "spider-data").rmdir()
    (folder / "spider-data").symlink_to(large)  # on a larger disk, say, where others are to read it
    folder.chmod(0o755)
    site.start()
    assert [path for path in exposed(folder) if not path.is_symlink()] == [folder]
    assert [path.stat().st_mode & 0o777 for path in (folder, large)] == [0o755, 0o777]


def test_links_in_the_data_folder_are_not_followed(outside, tmp_path):
    site = outside("--job-slots", "1")
    folder, victim, others = tmp_path / "data", tmp_path / "victim", tmp_path / "others"
    site.push(hold=HOLD, talk="echo out; echo err >&2")
    victim.write_text("mine")
    others.mkdir()
    (others / "file").write_text("mine")
    site.wait_job(site.schedule("hold"), "RUNNING")
    for stream in ("out", "err"):  # for the next job
        (folder / "logs" / f"{(job := site.schedule('talk'))}.{stream}").symlink_to(victim)
        assert site.request("GET", f"/get-log/data/{job}.{stream}")[0] == 404
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to(victim)  # so it must be written anew
    (folder / "state.json.new").symlink_to(victim)
    assert site.try_post("schedule-job", project="shop", spider="talk", when="now")[0] == 507
    (folder / "state.json.new").unlink()
    site.post("cancel-job", id=site.schedule("talk", "every 9 days"))
    assert not (folder / "state.json").is_symlink()
    release(tmp_path)
    wait_for(lambda: not site.jobs("PENDING") + site.jobs("RUNNING"))
    assert [("symbolic link" in job["reason"], job["spider"]) for job in site.jobs("FAILED")] == [(True, "talk")] * 2
    site.stop()
    shutil.rmtree(folder / "work")
    (folder / "work").symlink_to(others)
    (folder / "state.json.new").symlink_to(victim)
    site.start()
    assert site.wait_job(site.schedule("talk"))["status"] == "SUCCESSFUL"
    assert (folder / "work").lstat().st_mode == stat.S_IFDIR | 0o700
    site.stop()
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(victim)
    assert "Too many levels of symbolic links" in run_main("--port", "0", "--data-dir", str(folder))[1]
    assert (victim.read_text(), (others / "file").read_text(), os.listdir(others)) == ("mine", "mine", ["file"])


def test_a_pipe_in_the_place_of_a_log_holds_no_slot(outside, tmp_path):
    site = outside("--job-slots", "1")
    site.push(hold=HOLD)
    site.wait_job(site.schedule("hold"), "RUNNING")
    job = site.schedule()
    os.mkfifo(tmp_path / "data/logs" / f"{job}.out")
    release(tmp_path)
    assert "No such device" in site.wait_job(job)["reason"]
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


def test_a_reason_that_is_not_utf_8_can_be_saved():
    """Such a file name once ended the writer's thread; os.fsdecode makes surrogates of it."""
    reason = "no such file: " + os.fsdecode(b"\xff")
    job = scrapy_do.Job(
        str(uuid.uuid4()), scrapy_do.Status.FAILED, scrapy_do.Actor.USER, "now", "p", "s", 1.0, reason=reason
    )
    saved = json.loads(b"{" + scrapy_do.encode_line(job.identifier, job) + b"}")
    assert scrapy_do.decode_job(job.identifier, saved[job.identifier]) == job


def run_main(*options, **more):
    """Run the command line to its end and return its exit status and what it said."""
    done = subprocess.run([sys.executable, str(MODULE), *options], capture_output=True, text=True, timeout=30, **more)
    return done.returncode, done.stdout + done.stderr


def test_a_second_daemon_on_the_same_folder_is_refused(outside, tmp_path):
    first = outside()
    status, said = run_main("--port", "0", "--data-dir", str(tmp_path / "data"))
    assert (status, said.count("\n")) == (1, 1)
    assert "another scrapy_do is using the data folder" in said
    assert str(tmp_path / "data") in said
    assert first.get("status")


JOB = "3ec1a1a0-9b3c-4b52-a9e0-0d8fcd1cf001"
GROWN = f"""{{"version": 1,
"projects": {{
"shop": {{"name": "shop", "spiders": ["quick"], "archive": "x", "folder": "", "settings": ""}}
}},
"jobs": {{
}},
"changes": [{{}},
{{"jobs": {{
"{JOB}": {{"identifier": "{JOB}", "status": "PENDING", "actor": "USER"}}
}}}},
{{"jobs": {{
"{JOB}": {{"identifier": "{JOB}", "status": "RUNNING", "actor": "USER"}}
}}}}]}}
"""
BAD_STATES = {
    "empty": ("", "Expecting value"),
    "torn": ('{"version": 1,\n"projects": {\n"a": {"na', "Unterminated string"),
    "not-utf8": (b'{"version": 1, "jobs": {"\xff": 1}}', "utf-8"),
    "not-an-object": ("[]", "not an object with a 'version'"),
    "no-version": ("{}", "not an object with a 'version'"),
    "version-a-text": ('{"version": "1"}', "not an object with a 'version'"),
    "zeros": (b"\0" * 4096, "Expecting value"),
    "two-objects": ('{"version": 1}{"version": 1}', "Extra data"),
    "cut-in-a-letter": (b'{"version": 1, "jobs": {"\xc5', "utf-8"),
    "projects-null": ('{"version": 1, "projects": null}', "must be objects"),
    "spiders-numbers": (
        '{"version": 1, "projects": {"x": {"name": "x", "spiders": [1], "archive": "", "folder": "", "settings": ""}}}',
        "project 'x': the field 'spiders' must hold strings",
    ),
    "project-unknown-field": (
        '{"version": 1, "projects": {"x": {"name": "x", "spiders": [], "archive": "", "folder": "", "settings": "", "a": 1}}}',
        "project 'x': there is no field 'a'",
    ),
    "newer": ('{"version": 2}', "version 2, this scrapy_do knows 1"),
    "changes-a-number": ('{"version": 1, "changes": 3}', "'changes' must be a list of objects"),
    "change-a-list": ('{"version": 1, "changes": [[]]}', "'changes' must be a list of objects"),
    "torn-records": (GROWN[: GROWN.index("quick")], "Unterminated string starting at: line 3 column"),
    "edited-records": (GROWN.replace('": {"name"', '" {"name"'), "Expecting ':' delimiter: line 3 column"),
    "edited-change": (GROWN.replace("PENDING", 'PENDING"'), "Expecting ',' delimiter: line 9 column"),
    "edited-last-change": (GROWN.replace("RUNNING", 'RUNNING"'), "Expecting ',' delimiter: line 12 column"),
    "garbage-in-a-change": (GROWN.replace("PENDING", "\0" * 512), "Invalid control character at: line 9 column"),
    "not-utf8-in-a-change": (GROWN.encode().replace(b"RUNNING", b"\xff"), "utf-8"),
    "nested": ("[" * 100_000, "recursion"),
    "jobs-a-list": ('{"version": 1, "jobs": []}', "must be objects"),
    "bad-identifier": ('{"version": 1, "jobs": {"../../x": {}}}', "'../../x' is not the identifier of a job"),
    "bad-project": ('{"version": 1, "projects": {"x": 7}}', "project 'x': 7 is not an object"),
    "bad-project-name": (
        '{"version": 1, "projects": {"../x": {"name": "../x", "spiders": [], "archive": "", "folder": "", "settings": ""}}}',
        "project '../x': '../x' is not its name",
    ),
}


@pytest.mark.parametrize(("content", "reason"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_bad_state_file_stops_the_start_and_is_left_alone(tmp_path, content, reason):
    path = tmp_path / "data/state.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    status, said = run_main("--port", "0", "--data-dir", str(tmp_path / "data"))
    assert (status, said.count("\n")) == (1, 1)
    assert f"{path} cannot be read: " in said
    assert reason in said
    assert path.read_bytes() == before


BAD_RECORDS = {
    "a-number": (lambda job: 7, "7 is not an object"),
    "no-status": (lambda job: {k: v for k, v in job.items() if k != "status"}, "the field 'status' is missing"),
    "bad-status": (lambda job: {**job, "status": "DONE"}, "'DONE' is not a valid Status"),
    "bad-type": (lambda job: {**job, "spider": 3}, "the field 'spider' cannot be 3"),
    "bad-time": (lambda job: {**job, "timestamp": float("nan")}, "the field 'timestamp' cannot be nan"),
    "bad-due": (lambda job: {**job, "due": "soon"}, "the field 'due' cannot be 'soon'"),
    "far-due": (lambda job: {**job, "due": 1e30}, "the field 'due' cannot be 1e+30"),
    "bad-stats": (lambda job: {**job, "stats": [1]}, "[1] is not an object"),
    "bad-count": (lambda job: {**job, "stats": {"items": "1"}}, "the field 'items' cannot be '1'"),
    "unknown-field": (lambda job: {**job, "colour": "red"}, "there is no field 'colour'"),
    "other-name": (lambda job: {**job, "identifier": "y"}, "'y' is not its identifier"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_fails_its_job_and_no_other(outside, tmp_path, spoil, reason):
    site = outside()
    site.push()
    bad, good = site.schedule(when="every 2 days", description="kept"), site.schedule(when="every 3 hours")
    due = site.job(good)["next_run"]
    site.stop()
    change_state(tmp_path, lambda document: document["jobs"].update({bad: spoil(document["jobs"][bad])}))
    site.start()
    job = site.job(bad)
    assert (job["status"], job["reason"]) == ("FAILED", f"its record was not valid: {reason}")
    assert job["description"] == ("" if reason.startswith("7") else "kept")
    assert site.job(good)["next_run"] == due


def test_a_job_of_an_unknown_project_fails_with_a_reason(outside, tmp_path):
    site = outside("--job-slots", "1")
    site.push(hold=HOLD)
    jobs = [site.schedule("hold"), site.schedule(), site.schedule(when="every second")]
    site.stop()
    change_state(tmp_path, lambda document: document["projects"].clear())
    site.start()
    for job in jobs:
        assert site.wait_job(job)["reason"] == "there is no project 'shop'; list-projects.json shows those there are"


@pytest.mark.parametrize(
    ("thing", "name"),
    [("folder", "state.json"), ("folder", "lock")]
    + [("file", name) for name in ("", "state.json", "projects", "logs", "spider-data")]
    + [("broken-link", name) for name in ("", "state.json", "lock", "projects", "logs", "spider-data")],
)
def test_a_folder_that_is_not_as_it_should_be_stops_the_start(tmp_path, name, thing):
    path = tmp_path / "data" / name
    path.parent.mkdir(exist_ok=True)
    if thing == "folder":
        path.mkdir()
    elif thing == "file":
        path.write_bytes(b"")
    else:
        path.symlink_to("/nonexistent/x")
    kind = path.lstat().st_mode
    status, said = run_main("--port", "0", "--data-dir", str(tmp_path / "data"))
    assert (status, said.count("\n")) == (1, 1)
    assert str(tmp_path / "data") in said
    assert path.lstat().st_mode == kind


def test_leftovers_are_swept_and_other_files_stay(outside, tmp_path):
    site = outside()
    site.push()
    done = site.wait_job(site.schedule())["identifier"]
    site.kill()
    data = tmp_path / "data"
    stray = ["state.json.new", "projects/gone.zip", "projects/shop.123.new", f"logs/{uuid.uuid4()}.out", "work/x"]
    kept = ["state.json.backup", "notes.txt", "projects/README", f"logs/{done}.out", "projects/shop.zip",
            "spider-data/feed.json"]  # fmt: skip
    for name in stray + kept[:3] + kept[-1:]:
        (data / name).write_text("x")
    site.start()
    assert [name for name in stray if (data / name).exists()] == []
    assert [name for name in kept if not (data / name).exists()] == []


STEPS = {
    "open": "open", "write": "write", "short-write": "short", "fsync": "fsync", "rename": "replace", "folder-fsync": "folder",
}  # fmt: skip
ERRORS = {errno.errorcode[number]: number for number in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE)}


class Faults:
    """Make one step of writing the state file fail, as the kernel would; `count` times, or for ever."""

    def __init__(self, monkeypatch):
        self.step, self.error, self.count = "", 0, -1
        self.real = {name: getattr(os, name) for name in ("open", "pwrite", "fsync", "replace")}
        for name in self.real:
            monkeypatch.setattr(scrapy_do.os, name, getattr(self, name))

        def fdopen(file, *args, **options):
            if isinstance(file, int) and os.readlink(f"/proc/self/fd/{file}").endswith("state.json.new"):
                return io.BufferedWriter(FailingFile(self, file))
            return open(file, *args, **options)

        monkeypatch.setattr(scrapy_do, "open", fdopen, raising=False)

    def fail(self, *steps):
        if self.step in steps and self.count:
            self.count -= 1
            raise OSError(self.error, os.strerror(self.error))

    def write(self, write, data):
        self.fail("write")
        if self.step == "short" and len(data) > 10:
            return write(data[:10])
        self.fail("short")
        return write(data)

    def open(self, path, flags, *args, **options):
        if "state.json" in str(path):
            self.fail("open")
        return self.real["open"](path, flags, *args, **options)

    def pwrite(self, descriptor, data, place):
        if place + len(data) <= os.fstat(descriptor).st_size:  # needs no space
            return self.real["pwrite"](descriptor, data, place)
        return self.write(lambda data: self.real["pwrite"](descriptor, data, place), data)

    def fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.fail(*["fsync"] * ("/state.json" in path), *["folder"] * path.endswith("/data"))
        return self.real["fsync"](descriptor)

    def replace(self, source, target):
        if str(target).endswith("/state.json"):
            self.fail("replace")
        return self.real["replace"](source, target)


class FailingFile(io.FileIO):
    """A file on a disk that has faults."""

    def __init__(self, faults, descriptor):
        super().__init__(descriptor, "wb")
        self.faults = faults

    def write(self, data):
        return self.faults.write(super().write, bytes(data))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_write_that_fails_undoes_the_change_and_recovers_by_itself(site, tmp_path, monkeypatch, step, error):
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 0.2)
    site.push(slow="while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done")
    kept = site.schedule(when="every 3 hours")
    running = site.schedule("slow")
    site.wait_job(running, "RUNNING")
    wait_for(lambda: site.daemon._jobs[running].pid)  # which is published when its write is done
    faults = Faults(monkeypatch)
    faults.step, faults.error = step, error
    before = state(tmp_path), site.jobs("ACTIVE")
    if step in ("replace", "folder"):
        os.utime(tmp_path / "data/state.json", (0, 0))  # somebody has been at it, so it is written anew
    for path, fields in {
        "schedule-job": {"project": "shop", "spider": "quick", "when": "now"},
        "cancel-job": {"id": kept},
        "remove-project": {"name": "other"},
        "push-project": {"archive": stub_project("other")},
    }.items():
        status, answer = site.try_post(path, **fields)
        assert (status, answer["status"]) == ((404 if path == "remove-project" else 507), "error"), path
        assert state(tmp_path) == before[0], "a kill would bring the refused change to light"
    status, answer = site.try_post("cancel-job", id=running)
    assert (status, os.strerror(error) in answer["msg"]) == (507, True)
    assert site.jobs("ACTIVE") == before[1]
    assert site.get("list-projects")["projects"] == ["shop"]
    assert [path.name for path in (tmp_path / "data/projects").iterdir()] == ["shop.zip"]
    (tmp_path / "data/spider-data/go").touch()
    assert site.wait_job(running)["status"] == "SUCCESSFUL"  # what happens on a full disk is seen,
    faults.step = ""
    wait_for(lambda: state(tmp_path)["jobs"][running]["status"] == "SUCCESSFUL")  # and saved when there is space again
    assert set(state(tmp_path)["jobs"]) == {kept, running}
    site.post("cancel-job", id=kept)
    assert state(tmp_path)["jobs"][kept]["status"] == "CANCELED"


def test_a_disk_that_takes_nothing_refuses_changes_and_goes_on(outside, tmp_path):
    site = outside()
    site.push(slow="while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done")
    running = site.schedule("slow")
    wait_for(lambda: "pid" in state(tmp_path)["jobs"][running])
    for _ in range(20):  # the state file must be longer than the log, which shall still be written
        site.post("cancel-job", id=site.schedule(when="every 2 days", description="x" * 500))
    limits = resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE, (9000, limits[1]))  # the kernel refuses longer files
    for _ in range(3):
        status, answer = site.try_post("schedule-job", project="shop", spider="quick", when="now")
        assert (status, "cannot be written" in answer["msg"]) == (507, True)
    status, answer = site.try_push(random.Random(1).randbytes(20_000))
    assert (status, "cannot be stored" in answer["msg"]) == (507, True)
    assert [job["identifier"] for job in site.jobs("ACTIVE")] == [running]
    (tmp_path / "data/spider-data/go").touch()
    assert site.wait_job(running)["status"] == "SUCCESSFUL"
    resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE, limits)
    wait_for(lambda: state(tmp_path)["jobs"][running]["status"] == "SUCCESSFUL")
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    log = site.log_path.read_text()
    assert log.count("changes are refused until that is mended") == log.count("can be written again") == 1


def test_an_fsync_that_failed_is_not_believed_the_second_time(site, tmp_path, monkeypatch):
    """The kernel reports a page that it could not write once, and forgets it; so the file is made anew."""
    site.push()
    site.schedule(when="every 3 hours")
    path = tmp_path / "data/state.json"
    before = path.stat().st_ino
    faults = Faults(monkeypatch)
    faults.step, faults.error, faults.count = "fsync", errno.EIO, 1
    assert site.try_post("schedule-job", project="shop", spider="quick", when="every 3 hours")[0] == 507
    site.schedule(when="every 2 hours")
    assert path.stat().st_ino != before
    assert [job["schedule"] for job in state(tmp_path)["jobs"].values()] == ["every 3 hours", "every 2 hours"]


def test_a_change_is_written_to_the_end_and_a_stop_tidies_the_file(outside, tmp_path):
    site = outside("--completed-cap", "1")
    site.push()
    path = tmp_path / "data/state.json"
    first, gone, canceled = (site.schedule(when="every 3 hours") for _ in range(3))
    inode, head = path.stat().st_ino, path.read_bytes()[:-4]
    site.post("cancel-job", id=gone)
    site.post("cancel-job", id=canceled)
    assert path.stat().st_ino == inode
    assert path.read_bytes().startswith(head)
    before = state(tmp_path)
    assert list(before["jobs"]) == [first, canceled]
    site.kill()
    site.start()
    assert {job["identifier"] for job in site.jobs("SCHEDULED")} == {first}
    assert state(tmp_path) == before
    made = [site.schedule(when="every 2 hours") for _ in range(2)]
    for job in made:
        site.post("cancel-job", id=job)
    site.stop()
    lines = path.read_text().splitlines()
    assert [line[1:37] for line in lines if line[9:10] == "-"] == [first, made[1]]
    assert lines[-1] == '"changes": [{}]}'


def test_the_file_is_written_anew_when_its_changes_outgrow_the_rest(site, tmp_path):
    site.push()
    path, sizes = tmp_path / "data/state.json", []
    for _ in range(12):
        site.post("cancel-job", id=site.schedule(when="every 3 hours", description="x" * scrapy_do.MIB))
        sizes.append(path.stat().st_size)
    shrunk = [after < before for before, after in itertools.pairwise(sizes)]
    assert 1 <= sum(shrunk) <= 3  # rarely, and never so late that it is mostly dead
    assert all(size < 3 * len(json.dumps(state(tmp_path))) + 3 * scrapy_do.MIB for size in sizes)


MEDDLERS = {
    "touched": lambda path: path.touch(),
    "linked": lambda path: os.link(path, path.with_name("backup")),
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, 100),
    "replaced": lambda path: (path.with_name("copy").write_text("x"), path.with_name("copy").replace(path)),
    "overwritten": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("meddle", MEDDLERS.values(), ids=MEDDLERS)
def test_a_state_file_that_somebody_spoils_under_the_daemon_is_written_anew(inside, tmp_path, meddle):
    site = inside(completed_cap=1)
    site.push()
    jobs = [site.schedule(when="every 3 hours") for _ in range(3)]
    site.post("cancel-job", id=jobs[0])
    meddle(tmp_path / "data/state.json")
    site.post("cancel-job", id=jobs[1])
    text = (tmp_path / "data/state.json").read_text()
    assert list(json.loads(text)["jobs"]) == jobs[1:]
    assert text.endswith('\n},\n"changes": [{}]}\n')


def test_what_a_full_disk_did_not_take_is_saved_at_the_stop(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 60)
    site = inside()
    site.push(slow="while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done")
    running = site.schedule("slow")
    wait_for(lambda: "pid" in state(tmp_path)["jobs"][running])
    os.utime(tmp_path / "data/state.json", (0, 0))
    site.schedule(when="every 3 hours")
    faults = Faults(monkeypatch)
    faults.step, faults.error = "write", errno.ENOSPC
    (tmp_path / "data/spider-data/go").touch()
    assert site.wait_job(running)["status"] == "SUCCESSFUL"
    faults.step = ""
    site.daemon.close()
    assert state(tmp_path)["jobs"][running]["status"] == "SUCCESSFUL"


def test_a_file_without_changes_is_read_and_grows_at_its_next_change(outside, tmp_path):
    """As it was written before there were any, or by hand."""
    site = outside()
    site.push()
    jobs = [site.schedule(when="every 3 hours") for _ in range(2)]
    site.stop()
    path = tmp_path / "data/state.json"
    path.write_text(path.read_text().replace(',\n"changes": [{}]}', "\n}"))
    assert "changes" not in path.read_text()
    site.start()
    jobs += [site.schedule(when="every 3 hours") for _ in range(2)]
    site.kill()
    site.start()
    assert {job["identifier"] for job in site.jobs("SCHEDULED")} == set(jobs)


@pytest.fixture
def appended(tmp_path):
    """Return the bytes of a state file before and after a change was written to its end, and where that begins."""

    def job(number, **fields):
        identifier = f"{number:08x}-9b3c-4b52-a9e0-0d8fcd1cf001"
        status, actor = scrapy_do.Status.PENDING, scrapy_do.Actor.USER
        return scrapy_do.Job(identifier, status, actor, "now", "shop", "quick", 1.5, **fields)

    store = scrapy_do.Store(tmp_path / "data")
    shop = scrapy_do.Project("shop", ("quick",), "x", "", "")
    jobs = {made.identifier: made for made in (job(1), job(2), job(3, description="Zażółć"))}
    records = {"projects": {"shop": shop}, "jobs": jobs}
    store.write(records, {})
    store.write(records, {("jobs", job(2).identifier): job(2, description="漢字", exit_code=0)})
    before = store.state_file.read_bytes()
    store.write(records, {
        ("jobs", job(1).identifier): None, ("jobs", job(3).identifier): job(3, reason='"}}]}\\ żó'),
        ("projects", "shop"): shop._replace(archive="y"), ("jobs", job(4).identifier): job(4),
    })  # fmt: skip
    after = store.state_file.read_bytes()
    store.close()
    assert (after.startswith(before[:-3]), before[-3:], after[-3:]) == (True, b"]}\n", b"]}\n")
    assert fold(json.loads(before)) != fold(json.loads(after))
    return before, after, len(before) - 3


def check_torn(appended, torn):
    """Check that a file which a power cut has left is read as one of before or after the change."""
    states = [fold(json.loads(data)) for data in appended[:2]]
    found = fold(scrapy_do.parse_state(torn))
    assert found in states, torn
    return found == states[1]


def test_a_change_that_is_torn_at_any_byte_is_whole_or_not_there(appended):
    before, after, end = appended
    size = len(after)
    old = before.ljust(size, b"\0")
    for cut in range(end, size + 1):
        zeros = bytes(size - cut)
        assert check_torn(appended, after[:cut]) == (cut >= size - 3)  # the closing brackets may be missing
        assert check_torn(appended, after[:cut] + before[cut:]) == (cut >= size - 3)  # the old ones may be there
        assert check_torn(appended, after[:cut] + zeros) == (cut >= size - 3)  # blocks that were not written
        check_torn(appended, after[:cut] + zeros[:3] + after[cut + 3 :][: len(zeros)])
        assert not check_torn(appended, old[:cut] + after[cut:]) or cut == end  # later ones are there, earlier are not
        assert not check_torn(appended, after[:end] + bytes(cut - end) + after[cut:]) or cut == end


def test_a_change_of_which_any_blocks_are_missing_is_whole_or_not_there(appended):
    before, after, end = appended
    old = before.ljust(len(after), b"\0")
    size = -(-(len(after) - end) // 9)
    places = range(end - 5, len(after), size)  # the first block holds the end of what was acknowledged
    for written in itertools.product((False, True), repeat=len(places)):
        blocks = [(after if new else old)[at : at + size] for new, at in zip(written, places, strict=True)]
        torn = after[: end - 5] + b"".join(blocks)
        cut = torn.rstrip(b"\0")  # its size is often that of what was written
        assert not (check_torn(appended, torn) or check_torn(appended, cut)) or all(written[:-1])


def test_a_power_cut_in_the_middle_of_a_change_is_mended_at_the_start(outside, tmp_path):
    site = outside()
    site.push()
    path = tmp_path / "data/state.json"
    jobs = [site.schedule(when="every 3 hours") for _ in range(3)]
    before = path.read_bytes()
    site.schedule(when="every 3 hours")
    site.kill()
    os.truncate(path, len(before) + 100)
    site.start()
    assert {job["identifier"] for job in site.jobs("SCHEDULED")} == set(jobs)
    assert "a change that a crash has cut off" in site.log_path.read_text()
    jobs.append(site.schedule(when="every 3 hours"))
    site.kill()
    site.start()
    assert {job["identifier"] for job in site.jobs("SCHEDULED")} == set(jobs)
    assert site.log_path.read_text().count("has cut off") == 1


# ---- 5. Crawls: archives ---------------------------------------------------------------------------------------------

STORED, DEFLATED, BZIP2, LZMA = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA


def pack(*entries, bundle_of=None):
    """Return a zip archive of (name, content[, mode[, method]]), also of what `ZipFile` only warns of."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content, *more in entries:
            mode, method = (*more, *(0o100644, DEFLATED)[len(more) :])
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr, info.compress_type = 3, mode << 16, method
            bundle.writestr(info, content)
        if bundle_of:
            bundle_of(bundle)
    return buffer.getvalue()


def config(text, name="scrapy.cfg"):
    """Return an archive that holds nothing but a `scrapy.cfg`, and a spider."""
    return pack((name, text), ("spiders.txt", "quick\n"))


def named(name):
    """Return the archive of a project with a name."""
    return config(f"[deploy]\nproject = {name}\n")


def plus(*entries, bundle_of=None):
    """Return the archive of a sound project and these entries."""
    sound = {"scrapy.cfg": "[deploy]\nproject = shop\n", "spiders.txt": "talk\n", "talk.sh": "[ ! -e text ] || cat text\n"}
    return pack(*sound.items(), *entries, bundle_of=bundle_of)


def streamed(*entries):
    """Return the archive of a sound project as a program writes it that cannot go back: sizes come after the data."""

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def tell(self):
            raise OSError

    with zipfile.ZipFile(io.BytesIO(plus(*entries))) as bundle, zipfile.ZipFile(pipe := Pipe(), "w", DEFLATED) as other:
        for name in bundle.namelist():
            other.writestr(name, bundle.read(name))
    return pipe.getvalue()


FORGED = {"flags": (6, "<H"), "method": (8, "<H"), "time": (10, "<I"), "crc": (14, "<I"), "packed": (18, "<I"), "size": (22, "<I"), "named": (26, "<H")}


def forge(archive, name, headers=("local", "central"), **fields):
    """Overwrite fields in the headers of an entry, which lie about the content from then on."""
    forged = bytearray(archive)
    places = {"local": archive.index(name.encode()) - 30, "central": archive.rindex(name.encode()) - 46 + 2}
    for header, (field, value) in itertools.product(headers, fields.items()):
        place, form = FORGED[field]
        struct.pack_into(form, forged, places[header] + place, value)
    return bytes(forged)


def forge_end(archive, place, form, value):
    """Overwrite a field of the record at the end of an archive."""
    forged = bytearray(archive)
    struct.pack_into(form, forged, archive.rindex(b"PK\5\6") + place, value)
    return bytes(forged)


def zip64(**lies):
    """Return an archive whose last entry has its sizes and its place in a zip64 field, where they may lie."""
    content, name = b"x" * 50, b"evil"
    archive = plus(("evil", content, 0o644, STORED))
    truth = {"size": 50, "packed": 50, "place": archive.index(name) - 30}
    field = struct.pack("<HHQQQ", 1, 24, *(truth | lies).values())
    header, end = archive.rindex(name) - 46, archive.rindex(b"PK\5\6")
    record = bytearray(archive[header:end] + field)
    for place in (20, 24, 42):
        struct.pack_into("<I", record, place, 0xFFFFFFFF)
    struct.pack_into("<H", record, 30, len(field))
    grown = archive[:header] + bytes(record) + archive[end:]
    return forge_end(grown, 12, "<I", struct.unpack_from("<I", archive, end + 12)[0] + len(field))


def zip64_end(size, place, disk=0, disks=1):
    """Return an archive with a zip64 record at its end that lies about the list of entries."""
    archive = plus(("evil", "x"))
    end = archive.rindex(b"PK\5\6")
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 4, 4, size, place)
    return archive[:end] + record + b"PK\6\7" + struct.pack("<IQI", disk, end, disks) + archive[end:]


def repeat(name, count, size=0):
    """Return a zip whose list has one entry many times: small to send and large to list."""
    local = b"PK\3\4" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, 0, size, size, len(name), 0) + name
    entry = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", 788, 20, 0, 0, 0, 33, 0, size, size, len(name), *[0] * 6) + name
    return local + entry * count + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, *[count & 0xFFFF] * 2, len(entry) * count, len(local), 0)


def add_nested(bundle):
    """Add entries each of whose data begins with the record of the one before, as Fifield's bomb of 2019 has them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    kernel = packer.compress(bytes(300_000)) + packer.flush()
    records = []
    for number in range(20):
        info = zipfile.ZipInfo(f"bomb{number}")
        info.compress_type, info.file_size, info.CRC = DEFLATED, 300_000, zlib.crc32(bytes(300_000))
        info.compress_size, info.create_system, info.external_attr = len(kernel) + 50 * (20 - number), 3, 0o644 << 16
        info.header_offset = bundle.start_dir + sum(map(len, records))
        records.append(info.FileHeader(zip64=False))
        bundle.filelist.append(info)
    bundle.fp.seek(bundle.start_dir)
    bundle.fp.write(b"".join(records) + kernel)
    bundle.start_dir = bundle.fp.tell()


def add_overlapping(bundle):
    """Add an entry whose data are the whole record of another one, and that other one, as zip bombs do."""
    inner = make_zip({"inner.py": "x = 1\n"})
    with zipfile.ZipFile(io.BytesIO(inner)) as other:
        info, end = other.infolist()[0], other.start_dir
    bundle.writestr("outer.bin", inner[:end])
    info.header_offset = bundle.start_dir - end
    bundle.filelist.append(info)


def add_many(bundle):
    """Add 100,000 names of one record to the directory at the end."""
    for number in range(100_000):
        bundle.filelist.append(copy.copy(bundle.filelist[0]))
        bundle.filelist[-1].filename = f"{number:x}"


def folder_contents(folder):
    """Return what a folder holds, all the way down: names, modes, bytes."""
    return {
        str(path.relative_to(folder)): (oct(path.lstat().st_mode), path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def is_gone(pid):
    """Tell whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(gate):
    """Return the line of a shell script that waits for a file."""
    return f"until [ -e '{gate}' ]; do sleep 0.02; done\n"


SOUND_ARCHIVE = stub_project()
REFUSED_ARCHIVES = {
    # not a zip
    "text": (lambda: b"hello\n", 400, "not a sound zip"),
    "empty body": (lambda: b"", 400, "not a sound zip"),
    "tar": (lambda: b"shop/".ljust(257, b"\0") + b"ustar\00000" + bytes(10240), 400, "not a sound zip"),
    "cut at the end": (lambda: SOUND_ARCHIVE[:-30], 400, "not a sound zip"),
    "cut in the middle": (lambda: SOUND_ARCHIVE[: len(SOUND_ARCHIVE) // 2], 400, "not a sound zip"),
    "cut at the start": (lambda: SOUND_ARCHIVE[40:], 400, "not a sound zip"),
    "two ends": (lambda: SOUND_ARCHIVE + SOUND_ARCHIVE[SOUND_ARCHIVE.rindex(b"PK\5\6") :], 400, "not a sound zip"),
    "much behind the end": (lambda: SOUND_ARCHIVE + bytes(70_000), 400, "not a sound zip"),
    "nothing but an end": (lambda: b"PK\5\6" + bytes(18), 400, "no scrapy.cfg"),
    "list longer than it is": (lambda: forge_end(SOUND_ARCHIVE, 12, "<I", 2**31), 400, "not a sound zip"),
    "list shorter than it is": (lambda: forge_end(SOUND_ARCHIVE, 12, "<I", 60), 400, "not a sound zip"),
    "list elsewhere": (lambda: forge_end(SOUND_ARCHIVE, 16, "<I", 2**31), 400, "not a sound zip"),
    "list at the start": (lambda: forge_end(SOUND_ARCHIVE, 16, "<I", 0), 400, "not a sound zip"),
    "zip64 end elsewhere": (lambda: zip64_end(2**63, 2**63 + 5), 400, "not a sound zip"),
    "zip64 end of all ones": (lambda: zip64_end(2**64 - 1, 2**64 - 1), 400, "not a sound zip"),
    "several disks": (lambda: zip64_end(0, 0, disk=3, disks=9), 400, "multiple disks"),
    "zip in a zip": (lambda: pack(("shop.zip", SOUND_ARCHIVE)), 400, "no scrapy.cfg"),
    "zip without entries": (lambda: pack(), 400, "no scrapy.cfg"),
    # scrapy.cfg
    "no scrapy.cfg": (lambda: pack(("spiders.txt", "quick")), 400, "no scrapy.cfg"),
    "scrapy.cfg is a folder": (lambda: pack(("scrapy.cfg/", ""), ("spiders.txt", "quick")), 400, "no scrapy.cfg"),
    "other case": (lambda: config("[deploy]\nproject = shop\n", "Scrapy.cfg"), 400, "no scrapy.cfg"),
    "several scrapy.cfg": (lambda: plus(("b/scrapy.cfg", "")), 400, "several scrapy.cfg: scrapy.cfg, b/scrapy.cfg"),
    "two folders down": (lambda: config("[deploy]\nproject = shop\n", "a/b/scrapy.cfg"), 400, "a/b/scrapy.cfg is too deep"),
    "no deploy": (lambda: config("[settings]\ndefault = shop.settings\n"), 400, "does not name the project"),
    "deploy without project": (lambda: config("[deploy]\nurl = http://localhost/\n"), 400, "does not name the project"),
    "project without a name": (lambda: named(""), 400, "does not name the project"),
    "empty scrapy.cfg": (lambda: config(""), 400, "does not name the project"),
    "not UTF-8": (lambda: config(b"[deploy]\nproject = sklep\xb1\n"), 400, "scrapy.cfg cannot be read"),
    "binary": (lambda: config(bytes(range(128)) * 9), 400, "scrapy.cfg cannot be read"),
    "link as scrapy.cfg": (lambda: pack(("scrapy.cfg", "/etc/passwd", 0o120777)), 400, "neither a file nor a folder"),
    "bomb as scrapy.cfg": (lambda: config("[deploy]\nproject = shop\n" + "#\n" * 450_000), 413, "scrapy.cfg is longer than 8192"),
    "long nonsense in scrapy.cfg": (lambda: config("[deploy]\n" + "x\n" * 4000), 400, "scrapy.cfg cannot be read"),
    "interpolation": (lambda: named("%(x)s\nx = shop"), 400, "'%(x)s' is not allowed"),
    "settings with NUL": (lambda: named("shop\n[settings]\ndefault = a\0b"), 400, "cannot be a module"),
    "UTF-16": (lambda: config("[deploy]\nproject = shop\n".encode("utf-16")), 400, "scrapy.cfg cannot be read"),
    "section twice": (lambda: config("[deploy]\nproject = a\n[deploy]\nproject = b\n"), 400, "scrapy.cfg cannot be read"),
    "option twice": (lambda: config("[deploy]\nproject = a\nproject = b\n"), 400, "scrapy.cfg cannot be read"),
    "no section": (lambda: config("project = shop\n"), 400, "scrapy.cfg cannot be read"),
    # the project's name
    **{
        f"name {name[:12]!r}": (lambda name=name: named(name), 400, "is not allowed")
        for name in ("../../x", "..", ".x", "-x", "a/b", "/tmp/x", "a\\b", "x" * 101, "a b", "a\0b", "a\tb", "a;b", "a%b")
    },
    # paths
    "absolute path": (lambda: plus(("/tmp/evil", "x")), 400, "unsafe path"),
    "way out": (lambda: plus(("../evil", "x")), 400, "unsafe path"),
    "way out from within": (lambda: plus(("a/../../evil", "x")), 400, "unsafe path"),
    "folder outside": (lambda: plus(("../evil/", "")), 400, "unsafe path"),
    "dot": (lambda: plus(("./evil", "x")), 400, "unsafe path"),
    "two slashes": (lambda: plus(("a//b", "x")), 400, "unsafe path"),
    "backslash": (lambda: plus(("..\\evil", "x")), 400, "unsafe path"),
    "drive": (lambda: plus(("C:\\evil", "x")), 400, "unsafe path"),
    "NUL": (lambda: plus(("evilX.py", "x")).replace(b"evilX", b"evil\0"), 400, "unsafe path"),
    "name not UTF-8": (lambda: plus(("zł", "x")).replace("zł".encode(), b"z\xff\xfe"), 400, "not a sound zip"),
    "name too long": (lambda: plus(("x" * 300, "x")), 400, "path that cannot be"),
    "path too long": (lambda: plus(("/".join(["x" * 120] * 40), "x")), 400, "path that cannot be"),
    "nested too deep": (lambda: plus(("x/" * 60 + "x", "x")), 400, "too deep"),
    "file twice": (lambda: plus(("a", "x"), ("a", "y")), 400, "twice"),
    "file and folder": (lambda: plus(("a", "x"), ("a/", "")), 400, "twice"),
    "file and scrapy.cfg/": (lambda: plus(("scrapy.cfg/", "")), 400, "twice"),
    "file in scrapy.cfg": (lambda: plus(("scrapy.cfg/x", "x")), 400, "path that cannot be"),
    "root": (lambda: plus(("/", "")), 400, "unsafe path"),
    "no name at all": (lambda: plus(("", "x")), 400, "unsafe path"),
    "way out at the end": (lambda: plus(("a/..", "x")), 400, "unsafe path"),
    "way out by backslashes": (lambda: plus(("a\\..\\..\\evil", "x")), 400, "unsafe path"),
    "file in a file": (lambda: plus(("a", "x"), ("a/b", "x")), 400, "path that cannot be"),
    "file over a folder": (lambda: plus(("a/b", "x"), ("a", "x")), 400, "path that cannot be"),
    # kinds of entries
    "symbolic link": (lambda: plus(("link", "/etc/passwd", stat.S_IFLNK | 0o777)), 400, "neither a file nor a folder"),
    "link to a folder": (lambda: plus(("d", "..", 0o120777), ("d/x", "x")), 400, "neither a file nor a folder"),
    "device": (lambda: plus(("null", "", stat.S_IFCHR | 0o666)), 400, "neither a file nor a folder"),
    "fifo": (lambda: plus(("pipe", "", stat.S_IFIFO | 0o666)), 400, "neither a file nor a folder"),
    "socket": (lambda: plus(("socket", "", stat.S_IFSOCK | 0o666)), 400, "neither a file nor a folder"),
    "encrypted": (lambda: forge(plus(("secret", "x")), "secret", flags=1), 400, "zip it plainly"),
    "bzip2": (lambda: plus(("evil", "x", 0o644, BZIP2)), 400, "zip it plainly"),
    "lzma": (lambda: plus(("evil", "x", 0o644, LZMA)), 400, "zip it plainly"),
    "unknown compression": (lambda: forge(plus(("evil", "x")), "evil", method=99), 400, "zip it plainly"),
    "zstd": (lambda: forge(plus(("evil", "x")), "evil", method=93), 400, "zip it plainly"),
    "strong encryption": (lambda: forge(plus(("evil", "x")), "evil", flags=0x40), 400, "not a sound zip"),
    "patch": (lambda: forge(plus(("evil", "x")), "evil", flags=0x20), 400, "not a sound zip"),
    # content
    "other name in the list": (lambda: plus(("evil", "x")).replace(b"evil", b"good", 1), 400, "not a sound zip"),
    "longer than it says": (lambda: forge(plus(("evil", "x" * 5000)), "evil", size=10), 400, "not a sound zip"),
    "shorter than it says": (lambda: forge(plus(("evil", "x" * 5000)), "evil", size=9999), 400, "has not the size it claims"),
    "stored, shorter than it says": (lambda: forge(plus(("evil", "x" * 50, 0o644, STORED)), "evil", size=51), 400, "not a sound zip"),
    "stored, longer than it says": (lambda: forge(plus(("evil", "x" * 50, 0o644, STORED)), "evil", size=49), 400, "not a sound zip"),
    "packed shorter than it says": (lambda: forge(plus(("evil", "x" * 5000)), "evil", packed=500), 400, "entries overlap"),
    "packed into the next header": (
        lambda: forge(plus(("evil", "x" * 50, 0o644, STORED), ("next", "")), "evil", packed=60), 400, "entries overlap",
    ),
    "name of 50,000 bytes": (lambda: forge(plus(("evil", bytes(60_000), 0o644, STORED)), "evil", ["local"], named=50_000), 400, "not a sound zip"),
    "packed longer than it says": (lambda: forge(plus(("evil", "x" * 5000)), "evil", packed=5), 400, "not a sound zip"),
    **{
        f"zip64 {field} {value:#x}": (lambda field=field, value=value: zip64(**{field: value}), 400, "not a sound zip")
        for field in ("size", "packed", "place") for value in (0, 49, 99, 2**31, 2**63 - 1, 2**63, 2**64 - 1)
    },
    "nested bomb": (lambda: plus(bundle_of=add_nested), 400, "entries overlap"),
    "bad checksum": (lambda: forge(plus(("evil", "x")), "evil", crc=1), 400, "not a sound zip"),
    "bad data": (lambda: plus(("evil", "x" * 99, 0o644, STORED)).replace(b"x" * 99, b"y" * 99), 400, "not a sound zip"),
    "broken deflate": (lambda: forge(plus(("evil", "\xff" * 9, 0o644, STORED)), "evil", method=8), 400, "not a sound zip"),
    "overlapping entries": (lambda: plus(bundle_of=add_overlapping), 400, "not a sound zip"),
    "bomb": (lambda: plus(("zeros", bytes(2 * scrapy_do.MIB))), 413, "unpacks to more than 1 MiB"),
    "bombs": (lambda: plus(*((f"z{i}", bytes(300_000)) for i in range(4))), 413, "unpacks to more than 1 MiB"),
    "lying bomb": (lambda: forge(plus(("zeros", bytes(2 * scrapy_do.MIB))), "zeros", size=10), 400, "not a sound zip"),
    "10,001 entries": (lambda: plus(*((f"{i}", "") for i in range(9_998))), 413, "10001 entries"),
    "10,001 folders": (lambda: plus(*((f"{i}/x", "") for i in range(5_000))), 413, "more than 10000"),
    # what Scrapy says of it
    "no spiders": (lambda: plus(("list.sh", "")), 400, "no spiders"),
    "list fails": (lambda: plus(("list.sh", "seq 99 >&2; exit 3")), 400, "exit code 3:\n92\n93\n94\n95\n96\n97\n98\n99"),
    "list is killed": (lambda: plus(("list.sh", "kill -9 $$")), 400, "'scrapy list' failed in the project with exit code -9"),
    "list fails on stdout": (lambda: plus(("list.sh", "echo why; exit 1")), 400, "exit code 1:\nwhy"),
}


@pytest.mark.parametrize(("make", "status", "reason"), REFUSED_ARCHIVES.values(), ids=REFUSED_ARCHIVES)
def test_a_bad_archive_is_refused_whole(site, tmp_path, monkeypatch, make, status, reason):
    monkeypatch.setattr(scrapy_do, "ARCHIVE_BYTES", scrapy_do.MIB)
    site.push()
    before = folder_contents(tmp_path)
    answered, answer = site.try_push(make())
    assert (answered, answer["status"]) == (status, "error")
    assert reason in answer["msg"]
    assert len(answer["msg"]) < 800
    assert folder_contents(tmp_path) == before
    assert site.get("list-projects")["projects"] == ["shop"]
    assert site.get("list-spiders", project="shop")["spiders"] == ["quick"]
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


def push_file(client, path, field="archive"):
    """Push an archive with curl, as multipart, and return the answer."""
    address = f"http://127.0.0.1:{client.port}/push-project.json"
    command = ["curl", "-sS", "--noproxy", "*", "-F", f"{field}=@{path}", address]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


def test_a_hundred_thousand_entries_are_refused(outside, tmp_path):
    site = outside()
    before = folder_contents(tmp_path / "data")
    (path := tmp_path / "many.zip").write_bytes(plus(bundle_of=add_many))
    assert "100003 entries" in push_file(site, path)["msg"]
    assert folder_contents(tmp_path / "data") == before


def peak_memory(client):
    """Return the most MiB that the process of a daemon has had."""
    lines = pathlib.Path(f"/proc/{client.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def test_a_million_entries_and_a_bomb_cost_little_memory(outside, tmp_path):
    site = outside()
    site.push()
    before = folder_contents(tmp_path / "data"), peak_memory(site)
    bomb = config(bytes(100 * scrapy_do.MIB))
    for archive, reason in ((repeat(b"evil", 1_000_000), "list of entries is longer"), (bomb, "scrapy.cfg is longer")):
        (path := tmp_path / "hostile.zip").write_bytes(archive)
        assert reason in push_file(site, path)["msg"]
    assert folder_contents(tmp_path / "data") == before[0]
    assert peak_memory(site) - before[1] < 40


def test_an_archive_in_another_field_is_refused(site, tmp_path):
    before = folder_contents(tmp_path / "data")
    (path := tmp_path / "shop.zip").write_bytes(SOUND_ARCHIVE)
    answer = push_file(site, path, "file")
    assert answer["status"] == "error"
    assert "'file'" in answer["msg"]
    assert "archive" in answer["msg"]
    status, answer = site.try_post("push-project")
    assert (status, answer["status"]) == (400, "error")
    assert "archive" in answer["msg"]
    assert folder_contents(tmp_path / "data") == before


@pytest.mark.parametrize("start", ["sleep 99 &", "setsid sleep 99 &"], ids=["child", "own session"])
def test_a_list_that_takes_too_long_is_ended_with_all_it_started(inside, tmp_path, start):
    site = inside(list_timeout=0.5)
    before = folder_contents(tmp_path / "data")
    pids = tmp_path / "pids"
    status, answer = site.try_push(plus(("list.sh", f"{start} echo $! $$ > {pids}; echo quick; wait; sleep 99")))
    assert (status, answer["status"]) == (400, "error")
    assert "did not end within 0.5 s" in answer["msg"]
    assert all(is_gone(int(pid)) for pid in pids.read_text().split())
    assert folder_contents(tmp_path / "data") == before


def test_what_list_leaves_running_is_ended(site, tmp_path):
    site.push(plus(("list.sh", f"setsid sleep 99 & echo $! > {tmp_path}/pid; echo quick")))
    assert is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("scrapy", "reason"),
    [
        (("/nonexistent/scrapy",), "'/nonexistent/scrapy' cannot be started"),
        (("nonexistent-scrapy",), "'nonexistent-scrapy' cannot be started"),
        (("/etc/passwd",), "'/etc/passwd' cannot be started"),
        ((sys.executable, "-S", "-m", "scrapy"), "Scrapy is not installed for"),
    ],
    ids=["no file", "not on PATH", "not executable", "not installed"],
)
def test_without_scrapy_a_push_says_what_to_do(inside, tmp_path, scrapy, reason):
    site = inside(scrapy=scrapy)
    before = folder_contents(tmp_path / "data")
    status, answer = site.try_push(SOUND_ARCHIVE)
    assert (status, answer["status"]) == (400, "error")
    assert reason in answer["msg"]
    assert "--scrapy" in answer["msg"]
    assert folder_contents(tmp_path / "data") == before


def unpacked(data):
    """Unpack an archive where every refusal is a ScrapyDoError, check what has come out, and tell whether it passed."""
    with tempfile.TemporaryDirectory() as place:
        archive, folder = pathlib.Path(place) / "archive", pathlib.Path(place) / "folder"
        archive.write_bytes(data)
        refusal = None
        try:
            scrapy_do.unpack(archive, folder)
        except scrapy_do.ScrapyDoError as error:
            refusal = error
        assert refusal is None or (refusal.status in (400, 413) and len(str(refusal)) < 500)
        assert set(os.listdir(place)) <= {"archive", "folder"}
        for path in folder.rglob("*"):
            mode = path.lstat().st_mode
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), path
            assert mode & 0o7600 == 0o600, path
        return refusal is None


HONEST_ARCHIVE = plus(("a/b/text", "hi\n" * 20), ("tool", "#!/bin/sh\n", 0o100755), ("a/", ""))


@pytest.mark.parametrize("archive", [HONEST_ARCHIVE, streamed(("text", "hi\n")), zip64()], ids=["plain", "streamed", "zip64"])
def test_an_archive_that_is_cut_anywhere_is_refused(archive):
    assert unpacked(archive)
    assert [cut for cut in range(0, len(archive), 5) if unpacked(archive[:cut])] == []
    assert unpacked(archive[:-1]) is False


SPLICES = st.lists(
    st.tuples(st.sampled_from(["flip", "flip", "flip", "flip", "set", "set", "swap", "cut", "insert", "copy"]), *[st.integers(0, 2**16)] * 3),
    min_size=1, max_size=3,
)  # fmt: skip
ODD_BYTES = st.binary(max_size=4) | st.sampled_from([b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\0\0\0\0", b"\xff\xff\xff\xff", b"../", b"\0"])


def splice(data, changes, odd):
    """Return bytes that are spoiled here and there, as often as not in the headers of a zip archive."""
    data = bytearray(data)
    for kind, place, other, length in changes:
        headers = [match.end() for match in re.finditer(b"PK(\1\2|\3\4|\5\6)", data)] or [0]
        at = min(headers[place % len(headers)] + other % 42, len(data)) if length % 3 else place % (len(data) + 1)
        end = min(at + 1 + length % 50, len(data))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << other % 8
        elif kind == "set":
            data[at : at + len(odd)] = odd
        elif kind == "cut":
            del data[at:end]
        elif kind == "insert":
            data[at:at] = odd
        elif kind == "copy":
            data[:0] = data[at:end]
        elif kind == "swap":
            start = headers[length % len(headers)] + place % 42
            data[start : start + end - at] = data[at:end]
    return bytes(data)


@hypothesis.settings(max_examples=400, deadline=None, database=None)
@hypothesis.given(st.sampled_from([HONEST_ARCHIVE, streamed(("text", "hi\n")), zip64(), zip64_end(94, 162)]), SPLICES, ODD_BYTES)
def test_a_spoiled_archive_is_unpacked_within_its_folder_or_refused(archive, changes, odd):
    unpacked(splice(archive, changes, odd))


def git_archive():
    """Return what `git archive` makes of a project, with a comment, folder entries and all."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(stub_project(talk="cat sub/text", settings="x"))) as bundle:
            bundle.extractall(folder)
        (pathlib.Path(folder) / "sub").mkdir()
        (pathlib.Path(folder) / "sub" / "text").write_text("hello\n")
        me = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "x"]):
            subprocess.run(["git", "-C", folder, *command], check=True, stdin=subprocess.DEVNULL)
        command = ["git", "-C", folder, "archive", "--format=zip", "--prefix=shop-1.0/", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True).stdout


ACCEPTED_ARCHIVES = {  # name: (how to make it, the project's name, what its spider `talk` prints)
    "at the root": (lambda: stub_project(talk="cat code.py"), "shop", "x = 1\n"),
    "one folder down": (lambda: stub_project(folder="in/", talk="cat code.py"), "shop", "x = 1\n"),
    "name in Polish": (lambda: stub_project("księgarnia", talk="echo $SCRAPY_PROJECT"), "księgarnia", "księgarnia\n"),
    "name in Chinese": (lambda: stub_project("书店", talk="echo $SCRAPY_PROJECT"), "书店", "书店\n"),
    "name of 100 letters": (lambda: stub_project("x" * 100, talk="echo hi"), "x" * 100, "hi\n"),
    "name of all kinds": (lambda: stub_project("_0.9-a", talk="echo hi"), "_0.9-a", "hi\n"),
    "files in Chinese": (
        lambda: pack(
            ("书店/scrapy.cfg", "[deploy]\nproject = shop\n"), ("书店/spiders.txt", "talk"),
            ("书店/talk.sh", "cat 数据/价格.txt"), ("书店/数据/价格.txt", "¥1\n"),
        ), "shop", "¥1\n",
    ),
    "folder entries": (
        lambda: pack(
            ("p/", "", 0o40755), ("p/a/", "", 0o40500), ("p/a/b/", ""), ("p/scrapy.cfg", "[deploy]\nproject = shop\n"),
            ("p/spiders.txt", "talk"), ("p/a/text", "hi\n"), ("p/talk.sh", "cat a/text; ls -d a/b"),
        ), "shop", "hi\na/b\n",
    ),
    "folders after files": (lambda: plus(("a/b/c", "x"), ("a/b/", ""), ("a/", ""), ("text", "hi\n")), "shop", "hi\n"),
    "byte order mark": (
        lambda: pack(
            ("scrapy.cfg", b"\xef\xbb\xbf[deploy]\r\nproject = shop\r\n"), ("spiders.txt", "talk"), ("talk.sh", "echo hi")
        ), "shop", "hi\n",
    ),
    "percent sign": (
        lambda: pack(
            ("scrapy.cfg", "[deploy]\nproject = shop\nx = %(y)s\n"), ("spiders.txt", "talk"), ("talk.sh", "echo hi")
        ), "shop", "hi\n",
    ),
    "date past all calendars": (lambda: forge(plus(("text", "hi\n")), "text", time=0xFFFFFFFF), "shop", "hi\n"),
    "no date": (lambda: forge(plus(("text", "hi\n")), "text", time=0), "shop", "hi\n"),
    "stored": (lambda: plus(("text", "hi\n", 0o644, STORED)), "shop", "hi\n"),
    "unreadable mode": (lambda: plus(("text", "hi\n", 0o100000)), "shop", "hi\n"),
    "comment of 64 KiB": (lambda: forge_end(plus(("text", "hi\n")), 20, "<H", 65535) + b"c" * 65535, "shop", "hi\n"),
    "zip before it": (lambda: SOUND_ARCHIVE + plus(("text", "hi\n")), "shop", "hi\n"),
    "little behind it": (lambda: plus(("text", "hi\n")) + bytes(99), "shop", "hi\n"),
    "zip64": (lambda: zip64(), "shop", ""),
    "one disk of several": (lambda: forge_end(plus(("text", "hi\n")), 4, "<H", 3), "shop", "hi\n"),
    "wrong count": (lambda: forge_end(plus(("text", "hi\n")), 10, "<H", 999), "shop", "hi\n"),
    "lies that the list puts right": (
        lambda: forge(plus(("text", "hi\n")), "text", ["local"], size=7, packed=7, crc=7, method=99, flags=1), "shop", "hi\n",
    ),
    "month 15": (lambda: forge(plus(("text", "hi\n")), "text", time=0x01FF << 16 | 0xFFFF), "shop", "hi\n"),
    "zip within": (lambda: plus(("text", "hi\n"), ("a.zip", SOUND_ARCHIVE)), "shop", "hi\n"),
    "names almost alike": (lambda: plus(("Text", ""), ("text", "hi\n"), ("\u00e9", ""), ("e\u0301", "")), "shop", "hi\n"),
    "names that are ways out elsewhere": (
        lambda: plus(("text", "hi\n"), ("C:/evil", ""), ("%2e%2e/evil", ""), ("．．/evil", ""), ("~/evil", ""), (".../evil", ""),
                     ("\u202ea\nb", "")), "shop", "hi\n",
    ),
    "name in cp437": (lambda: plus(("text", "hi\n"), ("evilX", "")).replace(b"evilX", b"z\x88\xfe\xffX"), "shop", "hi\n"),
    "data descriptors": (lambda: streamed(("text", "hi\n")), "shop", "hi\n"),
    "scrapy.cfg in the folder of another name": (
        lambda: plus(("text", "hi\n"), ("scrapy.cfg.d/x", ""), ("my-scrapy.cfg", "")), "shop", "hi\n",
    ),
    "shell script before it": (lambda: b"#!/bin/sh\nexit 1\n" + plus(("text", "hi\n")), "shop", "hi\n"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "name", "said"), ACCEPTED_ARCHIVES.values(), ids=ACCEPTED_ARCHIVES)
def test_a_sound_archive_becomes_a_project_that_runs(site, make, name, said):
    answer = site.push(make())
    assert answer["name"] == name
    assert "talk" in answer["spiders"]
    assert site.get("list-projects")["projects"] == [name]
    assert site.get("list-spiders", project=name) == {"status": "ok", "project": name, "spiders": answer["spiders"]}
    job = site.wait_job(site.schedule("talk", project=name))
    assert (job["status"], site.log(job["identifier"], "out")) == ("SUCCESSFUL", said)


def test_an_archive_may_have_just_as_many_entries_and_bytes_as_the_limits(site, monkeypatch):
    monkeypatch.setattr(scrapy_do, "ARCHIVE_ENTRIES", 6)
    monkeypatch.setattr(scrapy_do, "ARCHIVE_BYTES", 2 * scrapy_do.MIB)
    with zipfile.ZipFile(io.BytesIO(plus())) as bundle:
        fill = bytes(2 * scrapy_do.MIB - sum(entry.file_size for entry in bundle.infolist()))
    site.push(plus(("a/b", fill), ("c", "")))  # five files and the folder of one
    assert site.try_push(plus(("a/b", fill), ("c", "x")))[0] == 413
    assert site.try_push(plus(("a/b", ""), ("c", ""), ("d", "")))[0] == 413
    assert site.try_push(plus(("a/", ""), ("a/b", ""), ("c/d", "")))[0] == 413


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_what_git_archive_makes_becomes_a_project(site, tmp_path):
    folder = tmp_path / "repository"
    with zipfile.ZipFile(io.BytesIO(plus(("text", "hi\n"), ("deep/er/text", "hi\n")))) as bundle:
        bundle.extractall(folder)
    (folder / "talk.sh").write_text("cat deep/er/text; stat -c '%a %n' text talk.sh")
    (folder / "talk.sh").chmod(0o755)
    git = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    made = subprocess.run([*git, "archive", "--format=zip", "--prefix=shop-1.0/", "HEAD"], check=True, capture_output=True)
    assert site.push(made.stdout) == {"status": "ok", "name": "shop", "spiders": ["talk"]}
    assert site.log(site.wait_job(site.schedule("talk"))["identifier"], "out") == "hi\n644 text\n755 talk.sh\n"


def test_modes_survive_into_the_crawl_but_set_user_id_does_not(site):
    site.push(
        pack(
            ("scrapy.cfg", "[deploy]\nproject = shop\n"), ("spiders.txt", "talk"), ("tool", "#!/bin/sh\necho it runs\n", 0o100755), ("root", "", 0o106755), ("mine", "", 0o100600),
            ("run.py", "", 0o100750), ("sticky/", "", 0o43755),
            ("talk.sh", "./tool; stat -c '%a %n' root mine run.py sticky"),
        )
    )  # fmt: skip
    identifier = site.wait_job(site.schedule("talk"))["identifier"]
    assert site.log(identifier, "out") == "it runs\n755 root\n600 mine\n750 run.py\n755 sticky\n"


# ---- 7. Daemon: projects ---------------------------------------------------------------------------------------------


def read_spiders_file(archive):
    """Return the spiders in a stored archive of the stub."""
    with zipfile.ZipFile(archive) as bundle:
        return sorted(bundle.read("spiders.txt").decode().split())


def test_projects_and_spiders_are_listed_sorted(site):
    assert site.get("list-projects")["projects"] == []
    for name in ("zebra", "Ant", "bee"):
        assert site.push(name=name, zoo="exit 0", Ace="exit 0")["spiders"] == ["Ace", "quick", "zoo"]
    assert site.get("list-projects")["projects"] == ["Ant", "bee", "zebra"]
    assert site.get("list-spiders", project="bee")["spiders"] == ["Ace", "quick", "zoo"]
    assert site.get("status")["projects"] == 3
    assert site.get("status")["spiders"] == 9


def test_a_second_push_replaces_the_first(site):
    site.push(old="echo old", both="echo first")
    assert site.push(new="echo new", both="echo second")["spiders"] == ["both", "new", "quick"]
    assert site.get("list-spiders", project="shop")["spiders"] == ["both", "new", "quick"]
    status, answer = site.try_post("schedule-job", project="shop", spider="old", when="now")
    assert (status, answer["status"]) == (404, "error")
    assert "both, new, quick" in answer["msg"]
    assert site.log(site.wait_job(site.schedule("both"))["identifier"], "out") == "second\n"


@pytest.mark.parametrize(("folder", "other"), [("", "in/"), ("in/", ""), ("a/", "b/")])
def test_a_push_may_move_the_project_inside_the_archive(site, folder, other):
    for number, place in enumerate([folder, other, folder]):
        site.push(stub_project(folder=place, talk=f"echo {number}"))
        assert site.log(site.wait_job(site.schedule("talk"))["identifier"], "out") == f"{number}\n"


@pytest.mark.parametrize("status", ["SCHEDULED", "PENDING", "RUNNING"])
def test_active_jobs_keep_their_spider_and_their_project(inside, tmp_path, status):
    site = inside(job_slots=1)
    gate, archive = tmp_path / "gate", tmp_path / "data" / "projects" / "shop.zip"
    waits = until(gate) + "echo done"
    site.push(stay=waits, leave=waits)
    if status == "PENDING":
        site.wait_job(site.schedule("stay"), "RUNNING")
    identifier = site.schedule("leave", "every day" if status == "SCHEDULED" else "now")
    before = site.wait_job(identifier, status), archive.read_bytes()
    for path, fields in (("push-project", {"archive": stub_project(stay=waits)}), ("remove-project", {"name": "shop"})):
        code, answer = site.try_post(path, **fields)
        assert (code, answer["status"]) == (409, "error")
        assert identifier in answer["msg"]
        assert f"leave, {status}" in answer["msg"]
        assert (site.job(identifier), archive.read_bytes()) == before
        assert site.get("list-projects")["projects"] == ["shop"]
        assert site.get("list-spiders", project="shop")["spiders"] == ["leave", "quick", "stay"]
        assert len(list((tmp_path / "data" / "projects").iterdir())) == 1
    site.push(stay=waits, leave=waits)  # nothing is missing, so this is fine
    gate.touch()
    if status == "SCHEDULED":
        site.post("cancel-job", id=identifier)
    else:
        assert site.wait_job(identifier)["status"] == "SUCCESSFUL"
        assert site.log(identifier, "out") == "done\n"
    wait_for(lambda: not site.jobs("ACTIVE"))
    site.push()  # and now nobody needs it
    site.post("remove-project", name="shop")


def test_a_running_crawl_keeps_the_code_it_started_with(site, tmp_path):
    def version(text):
        return make_zip(
            {
                "scrapy.cfg": "[deploy]\nproject = shop\n", "spiders.txt": "slow\n", "code.py": text, "text": text,
                "slow.sh": f"echo on; {until(tmp_path / text)} cat code.py text",
            }
        )  # fmt: skip

    site.push(version("1"))
    first = site.schedule("slow")
    wait_for(lambda: site.log(first, "out") == "on\n")
    site.push(version("2"))
    second = site.schedule("slow")
    wait_for(lambda: site.log(second, "out") == "on\n")
    for text, identifier in (("1", first), ("2", second)):
        (tmp_path / text).touch()
        assert site.wait_job(identifier)["status"] == "SUCCESSFUL"
        assert site.log(identifier, "out") == f"on\n{text}{text}"


def test_a_removed_project_is_gone_also_from_the_disk(outside, tmp_path):
    site = outside()
    site.push(name="other")
    before = folder_contents(tmp_path / "data" / "projects"), len(list((tmp_path / "data" / "work").iterdir()))
    site.push(name="shop")
    site.wait_job(site.schedule())
    site.post("remove-project", name="shop")
    for path, fields in (
        ("remove-project", {"name": "shop"}),
        ("schedule-job", {"project": "shop", "spider": "quick", "when": "now"}),
    ):
        code, answer = site.try_post(path, **fields)
        assert (code, answer["status"]) == (404, "error")
        assert "'shop'" in answer["msg"]
    assert site.call("GET", "/list-spiders.json?project=shop")[0] == 404
    assert folder_contents(tmp_path / "data" / "projects") == before[0]
    assert len(list((tmp_path / "data" / "work").iterdir())) == before[1]
    site.stop()
    site.start()
    assert site.get("list-projects")["projects"] == ["other"]
    site.push(name="shop", again="echo again")
    assert site.log(site.wait_job(site.schedule("again"))["identifier"], "out") == "again\n"


def test_pushes_of_one_project_at_once_leave_one_of_them(outside, tmp_path):
    site = outside()
    archives = [stub_project(folder=["", "in/"][number % 2], **{f"s{number}": f"echo {number}"}) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pushed = list(pool.map(site.push, archives))
    assert [answer["spiders"] for answer in pushed] == [["quick", f"s{number}"] for number in range(8)]

    def check():
        spiders = site.get("list-spiders", project="shop")["spiders"]
        number = int(spiders[1][1:])
        assert spiders == ["quick", f"s{number}"]
        assert (tmp_path / "data" / "projects" / "shop.zip").read_bytes() == archives[number]
        assert len(list((tmp_path / "data" / "projects").iterdir())) == 1
        assert site.log(site.wait_job(site.schedule(spiders[1]))["identifier"], "out") == f"{number}\n"
        assert len(list((tmp_path / "data" / "work").iterdir())) == 1
        return spiders

    spiders = check()
    site.stop()
    site.start()
    assert check() == spiders


def test_pushes_while_crawls_run_never_mix_two_versions(inside):
    site = inside(completed_cap=1000)

    def version(number):
        checks = f'[ "$(cat version code.py)" = {number}{number} ] && [ -e only{number} ]'
        files = {"scrapy.cfg": "[deploy]\nproject = shop\n", "spiders.txt": "quick", "version": f"{number}"}
        files |= {"code.py": f"{number}", f"only{number}": "", "quick.sh": f"{checks} && echo {number}"}
        return make_zip({f"{number}/{name}": content for name, content in files.items()})

    site.push(version(0))
    identifiers = []
    for number in range(1, 11):
        identifiers += [site.schedule() for _ in range(5)]
        site.push(version(number))
    assert {site.wait_job(identifier)["reason"] for identifier in identifiers} == {None}
    seen = [int(site.log(identifier, "out")) for identifier in identifiers]
    assert all(number // 5 <= version for number, version in enumerate(seen))


def test_twenty_pushes_leave_one_unpacked_tree(site, tmp_path):
    for number in range(20):
        site.push(**{f"s{number}": "exit 0"})
    assert len(list((tmp_path / "data" / "work").iterdir())) == 1
    assert os.listdir(tmp_path / "data" / "projects") == ["shop.zip"]
    assert site.wait_job(site.schedule("s19"))["status"] == "SUCCESSFUL"
    assert len(list((tmp_path / "data" / "work").iterdir())) == 1


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["stop", "kill"])
def test_a_project_is_there_after_a_restart(outside, tmp_path, end):
    site = outside()
    site.push(stub_project(folder="书/", talk="cat code.py"))
    stored = folder_contents(tmp_path / "data" / "projects")
    site.stop(end)
    site.start()
    assert folder_contents(tmp_path / "data" / "projects") == stored
    assert site.get("list-projects")["projects"] == ["shop"]
    assert site.get("list-spiders", project="shop")["spiders"] == ["quick", "talk"]
    identifiers = [site.schedule("talk") for _ in range(5)]  # several slots find no unpacked tree at once
    for identifier in identifiers:
        assert site.wait_job(identifier)["status"] == "SUCCESSFUL"
        assert site.log(identifier, "out") == "x = 1\n"
    assert len(list((tmp_path / "data" / "work").iterdir())) == 1


def test_what_a_crawl_does_to_its_copy_no_other_crawl_sees(site, tmp_path):
    show = "find . -type f | sort; cat text deep/text; "
    harm = (
        "echo harm > text; echo more >> deep/text; rm spiders.txt new.py deep/gone; touch made; "
        "mkdir -p locked/in; touch locked/in/file; chmod 500 locked locked/in; chmod 0 deep"
    )
    scripts = {"harm": show + harm, "look": show, "late": f"echo on >&2; {until(tmp_path / 'gate')}{show}"}
    files = {"scrapy.cfg": "[deploy]\nproject = shop\n", "spiders.txt": "\n".join(scripts), "new.py": "x\n"}
    files |= {"text": "text\n", "deep/text": "deep\n", "deep/gone": "gone\n"}
    site.push(make_zip(files | {f"{name}.sh": script for name, script in scripts.items()}))
    late = site.schedule("late")
    wait_for(lambda: site.log(late) == "on\n")
    work = tmp_path / "data" / "work"
    assert len(list(work.iterdir())) == 2
    assert any((path / "text").read_text() == "text\n" for path in work.iterdir())
    logs = []
    for name in ("look", "harm", "harm", "look"):
        job = site.wait_job(site.schedule(name))
        assert job["status"] == "SUCCESSFUL"
        logs.append(site.log(job["identifier"], "out"))
        assert len(list(work.iterdir())) == 2  # the tree, and the copy of the one that still runs
    (tmp_path / "gate").touch()
    site.wait_job(late)
    assert set(logs) == {site.log(late, "out")}
    assert logs[0].endswith("./text\ntext\ndeep\n")
    assert len(list(work.iterdir())) == 1


# ---- 6. Timer --------------------------------------------------------------------------------------------------------


class FakeClock(scrapy_do.Clock):
    """A clock that stands still until a test moves it, and that tells when the timer sleeps on it."""

    def __init__(self, now=1_700_000_000.0):
        self.now, self.ticks = now, 1000.0
        self.waits = []  # how long each wait wanted to be
        self.sleeper = None

    def time(self):
        return self.now

    def monotonic(self):
        return self.ticks

    def wait(self, condition, seconds):
        self.waits.append(seconds)
        self.sleeper = condition
        condition.wait()
        self.sleeper = None

    def asleep(self):
        """Wait until the timer sleeps."""
        wait_for(lambda: self.sleeper)

    def advance(self, seconds, step=0.0):
        """Let time pass; `step` sets the system clock by so much more."""
        self.asleep()
        condition = self.sleeper
        with condition:
            self.now += seconds + step
            self.ticks += seconds
            self.sleeper = None
            condition.notify_all()
        self.asleep()


@pytest.fixture
def timer():
    """Return a timer on a fake clock; `timer.calls` has what it called back."""
    calls, clock = [], FakeClock()

    def on_due(key):
        calls.append(("due", key))
        if key == "bad":
            raise RuntimeError("broken on purpose")

    timer = scrapy_do.Timer(
        on_due, lambda key: calls.append(("deadline", key)), lambda: calls.append(("set back",)), clock
    )
    timer.calls, timer.clock = calls, clock
    timer.start()
    yield timer
    timer.close()


def test_the_timer_calls_in_order_and_sleeps_between(timer):
    timer.clock.asleep()
    assert timer.clock.waits == [None]
    now = timer.clock.now
    for key, seconds in {"c": 30, "a": 10, "b": 20, "dropped": 15}.items():
        timer.at(key, now + seconds)
    timer.after("kill", 12)
    timer.drop("dropped")
    timer.clock.advance(9.9)
    assert timer.calls == []
    timer.clock.advance(0.2)
    assert timer.calls == [("due", "a")]
    timer.clock.advance(30)
    assert timer.calls == [("due", "a"), ("deadline", "kill"), ("due", "b"), ("due", "c")]
    assert timer.clock.waits[-1] is None


def test_the_timer_moves_a_key_both_ways(timer):
    now = timer.clock.now
    timer.at("x", now + 10)
    timer.at("x", now + 50)
    timer.clock.advance(20)
    assert timer.calls == []
    timer.at("x", now + 30)
    timer.clock.advance(10)
    assert timer.calls == [("due", "x")]
    timer.clock.advance(100)
    assert len(timer.calls) == 1


def test_a_callback_that_fails_stops_no_other(timer, capsys):
    for key in ("bad", "good"):
        timer.at(key, timer.clock.now + 1)
    timer.clock.advance(2)
    assert timer.calls == [("due", "bad"), ("due", "good")]
    assert "broken on purpose" in capsys.readouterr().err


def test_the_timer_looks_at_the_clock_every_minute_and_notices_steps(timer):
    timer.at("x", timer.clock.now + 1000)
    timer.after("kill", 500)
    timer.clock.advance(1)
    assert timer.clock.waits[-1] == 60
    timer.clock.advance(60, step=-300)
    assert timer.calls == [("set back",)]
    timer.clock.advance(60, step=0.5)
    timer.clock.advance(60, step=2000)  # forward: what is due is called late, deadlines do not care
    assert timer.calls[1:] == [("due", "x")]
    timer.clock.advance(400)
    assert timer.calls[2:] == [("deadline", "kill")]


def test_an_agenda_forgets_stale_entries():
    agenda = scrapy_do.Agenda()
    for instant in range(10_000):
        agenda.put("moving", float(instant))
    assert len(agenda._heap) < 200
    assert agenda.pop_due(1e9) == ["moving"]
    assert agenda.first() is None


# ---- 7. Daemon -------------------------------------------------------------------------------------------------------

HOLD = "echo started; while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done"
STUBBORN = "trap '' TERM; echo started; while :; do sleep 0.05; done"


def release(tmp_path):
    (tmp_path / "data/spider-data/go").touch()


def test_a_job_has_the_keys_of_the_contract(site):
    site.push()
    answer = site.post("schedule-job", project="shop", spider="quick", when="Every  3 hours", description="Opis żółty")
    job = site.job(answer["identifier"])
    assert answer["next_run"] == job["next_run"] > job["timestamp"]
    assert {**job, "timestamp": "", "next_run": "", "identifier": ""} == {
        "identifier": "", "status": "SCHEDULED", "actor": "USER", "schedule": "Every  3 hours", "project": "shop",
        "spider": "quick", "description": "Opis żółty", "payload": "{}", "args": [], "settings": [], "timeout": None,
        "timestamp": "", "duration": None,
        "next_run": "", "exit_code": None, "reason": None, "stats": None,
    }  # fmt: skip
    done = site.wait_job(site.schedule(payload='{"a": "漢字"}'))
    assert {key: done[key] for key in ("schedule", "payload", "duration", "next_run", "exit_code", "reason")} == {
        "schedule": "now", "payload": '{"a": "漢字"}', "duration": 0, "next_run": None, "exit_code": 0, "reason": None,
    }  # fmt: skip


@pytest.mark.parametrize("payload", ["", "[]", "1", "{", '{"a": 1} x', "null", "[" * 100_000])
def test_a_payload_that_is_no_object_is_refused(site, payload):
    site.push()
    status, answer = site.try_post("schedule-job", project="shop", spider="quick", when="now", payload=payload)
    assert (status, "payload" in answer["msg"]) == (400, True)
    assert site.jobs("ACTIVE") == []


def test_a_crawl_gets_its_environment_and_payload(inside, monkeypatch):
    monkeypatch.setenv("SCRAPY_SETTINGS_MODULE", "wrong.module")
    site = inside()
    site.push(stub_project(settings="shop.settings", show='env; echo "args: $@"'))
    job = site.schedule("show", payload='{"città": "漢字 żółw"}')
    assert site.wait_job(job)["status"] == "SUCCESSFUL"
    lines = site.log(job, "out").splitlines()
    data = site.store.spider_data
    for line in (f"SCRAPY_JOB={job}", "SCRAPY_PROJECT=shop", "SCRAPY_SPIDER=show", f"SPIDER_DATA_DIR={data}",
                 "PYTHONIOENCODING=utf-8", "SCRAPY_SETTINGS_MODULE=shop.settings",
                 'args: -a payload={"città": "漢字 żółw"}'):  # fmt: skip
        assert line in lines
    job = site.schedule("show")
    site.wait_job(job)
    assert "args: " in site.log(job, "out").splitlines()


ARGS = ["page=-2", "page=2", "eq==x= ", "zdanie=zażółć\n--gęślą jaźń;", "漢字=漢 字", "none="]
SETTINGS = ["LOG_LEVEL=-x y", "_MARK1=a=b\n漢字", "EMPTY=", "EMPTY="]
SHOW = "for word; do printf '%s|' \"$word\"; done"


@pytest.mark.parametrize("kind", ["urlencoded", "multipart", "json", "json text"])
def test_args_and_settings_reach_the_crawl_unchanged_and_in_order(site, kind):
    site.push(show=SHOW)
    args, settings = (ARGS, SETTINGS) if kind != "json text" else (ARGS[-1:], SETTINGS[:1])
    fields = {"project": "shop", "spider": "show", "when": "now", "payload": '{"a": 1}', "arg": args, "setting": settings}
    pairs = [(name, v) for name, value in fields.items() for v in ([value] if isinstance(value, str) else value)]
    body = {
        "urlencoded": (urllib.parse.urlencode(pairs).encode(), URLENCODED),
        "multipart": (b"\r\n".join([*(part_of(name, value.encode()) for name, value in pairs), CLOSING]), MULTIPART),
        "json": (json.dumps(fields).encode(), JSON),
        "json text": (json.dumps(dict(pairs)).encode(), JSON),
    }[kind]
    job = site.wait_job(json.loads(speak(site, post_of("/schedule-job.json", *body))[2])["identifier"])
    assert (job["args"], job["settings"]) == (args, settings)
    words = [word for flag, texts in (("-a", ['payload={"a": 1}', *args]), ("-s", settings)) for text in texts for word in (flag, text)]
    assert site.log(job["identifier"], "out").split("|") == [*words, ""]


def test_args_and_settings_go_to_the_runs_of_a_schedule_after_a_crash(outside):
    site = outside()
    site.push(show=SHOW)
    schedule = site.schedule("show", "every second", arg=ARGS, setting=SETTINGS)
    site.kill()
    site.start()
    run = wait_for(lambda: site.jobs("SUCCESSFUL"))[0]
    assert site.log(run["identifier"], "out").split("|")[1::2] == [*ARGS, *SETTINGS]
    for job in (run, site.job(schedule)):
        assert (job["args"], job["settings"]) == (ARGS, SETTINGS)


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        *(({"arg": text}, 400, ["arg", "NAME=VALUE"]) for text in ("", "a", "=1", " =1", "-a=1", "a\0=1", "a=\0")),
        *(({"setting": text}, 400, ["setting", "NAME=VALUE"]) for text in ("", "A", "=1", "1A=1", "A B=1", "A-B=1", "A=\0")),
        ({"arg": ["a=1", "b"]}, 400, ["'b'"]),
        ({"arg": "payload=x", "payload": '{"a": 1}'}, 400, ["payload", "arg", "leave one of them out"]),
        ({"arg": ["a=1"] * 101}, 413, ["'arg'", "100 times"]),
        ({"setting": ["A=" + "a" * 1000] * 99 + ["A=" + "ż" * 2000]}, 413, ["'setting'", "102400 bytes"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_arg_or_setting_that_is_none_is_refused(site, fields, status, words):
    site.push()
    code, answer = site.try_post("schedule-job", **PLAN, **fields)
    assert (code, [word for word in words if word not in answer["msg"]]) == (status, []), answer
    assert site.jobs("ACTIVE") == []


def test_the_most_args_and_settings_are_taken(site):
    site.push(count='echo "$#"')
    texts = [f"A{number}=" + "a" * 1000 for number in range(100)]
    job = site.schedule("count", arg=["payload=x", *texts[1:]], setting=texts)
    assert site.wait_job(job)["reason"] is None
    assert site.log(job, "out") == "400\n"


def test_jobs_start_in_the_order_of_their_making(inside, tmp_path):
    site = inside(job_slots=1)
    site.push(hold=HOLD, note="echo $SCRAPY_JOB >> $SPIDER_DATA_DIR/order")
    site.wait_job(site.schedule("hold"), "RUNNING")
    made = [site.schedule("note") for _ in range(20)]
    assert [job["identifier"] for job in site.jobs("PENDING")] == made[::-1]
    release(tmp_path)
    site.wait_job(made[-1])
    assert (tmp_path / "data/spider-data/order").read_text().split() == made


def test_no_more_crawls_run_than_there_are_slots(inside, tmp_path):
    site = inside(job_slots=2)
    site.push(hold=HOLD)
    jobs = [site.schedule("hold") for _ in range(5)]
    wait_for(lambda: len(site.jobs("RUNNING")) == 2)
    assert len(site.jobs("PENDING")) == 3
    assert len(site.daemon._crawls) <= 2
    release(tmp_path)
    assert {site.wait_job(job)["status"] for job in jobs} == {"SUCCESSFUL"}


DUMPED = """2026-11-24 05:29:30 [scrapy.statscollectors] INFO: Dumping Scrapy stats:
{'downloader/response_bytes': 77,
 'elapsed': {'a}': "it's"},
 'finish_reason': 'finished',
 'finish_time': datetime.datetime(2026, 11, 24, 5, 29, 30, tzinfo=datetime.timezone.utc),
 'item_scraped_count': 50,
 'log_count/ERROR': 2,
 'memusage/max': 66220032,
 'response_received_count': 6,
 'why}': 'it is }'}
2026-11-24 05:29:30 [scrapy.core.engine] INFO: Spider closed (finished)
"""
STATS_LOGS = {  # a log, and what it says: items, responses, errors, finish_reason
    "whole": (DUMPED, (50, 6, 2, "finished")),
    "nothing": ("", None),
    "no-dump": (DUMPED.replace("Dumping", "Pumping"), None),
    "no-dictionary": ("Dumping Scrapy stats:\nnothing today {'item_scraped_count': 1}", None),
    "empty": ("Dumping Scrapy stats:\n{}\n {'item_scraped_count': 1}", (0, 0, 0, "")),
    "on-one-line": ("Dumping Scrapy stats:\n{'finish_reason': 'x', 'item_scraped_count': 1}", (1, 0, 0, "x")),
    "counts-after-it": (DUMPED.replace(" 'item_scraped_count': 50,\n", "") + " 'item_scraped_count': 1,\n", (0, 6, 2, "finished")),
    "other-keys": (DUMPED.replace("'item_", "'my/item_").replace("received_count'", "received_count/200'"), (0, 0, 2, "finished")),
    "numbers-of-other-kinds": (DUMPED.replace("50", "'50'").replace(": 6,", ": 6.5,").replace(": 2,", f": {'9' * 5000},"), (0, 0, 0, "finished")),
    "quotes": (DUMPED.replace("'finished'", '''"it's {enough}"'''), (50, 6, 2, "it's {enough}")),
    "other-format": (DUMPED.replace("\n2026", " [scrapy.statscollectors] {INFO}\n2026").replace("2026-11-24 05:29:30 [", "["), (50, 6, 2, "finished")),
    "json-format": (json.dumps({"message": DUMPED, "level": "INFO"}), (50, 6, 2, "finished")),
    "windows-lines": (DUMPED.replace("\n", "\r\n"), (50, 6, 2, "finished")),
    "two": (DUMPED.replace("50", "7") + DUMPED, (50, 6, 2, "finished")),
    "second-cut-off-before-its-dictionary": (DUMPED + "Dumping Scrapy stats:\n", (50, 6, 2, "finished")),
    "cut-off-in-a-number": (DUMPED[: DUMPED.index("50") + 1], (0, 0, 0, "finished")),
    "cut-off-in-a-text": (DUMPED[: DUMPED.index("shed',")], (0, 0, 0, "")),
    "code": (DUMPED.replace("50", "__import__('os').abort()"), (0, 6, 2, "finished")),
    "binary": (bytes(range(256)) * 99 + DUMPED.replace("finished'", "fin\udcffished'").encode(errors="surrogateescape") + bytes(range(256)), (50, 6, 2, "fin\ufffdished")),
    "far-from-the-end": (DUMPED + "x" * 70_000, None),
    "long": ("x" * 1_000_000 + DUMPED + "y" * 60_000, (50, 6, 2, "finished")),
}  # fmt: skip


@pytest.mark.parametrize(("log", "stats"), STATS_LOGS.values(), ids=STATS_LOGS)
def test_stats_are_read_from_the_end_of_the_log(site, log, stats):
    archive = stub_project(talk="cat stats >&2; exit 3")
    with zipfile.ZipFile(buffer := io.BytesIO(archive), "a") as bundle:
        bundle.writestr("stats", log)
    site.push(buffer.getvalue())
    job = site.wait_job(site.schedule("talk"))
    keys = ("items", "responses", "errors", "finish_reason")
    assert (job["status"], job["stats"]) == ("FAILED", stats and dict(zip(keys, stats, strict=True)))


def test_a_log_that_is_not_there_any_more_has_no_stats(site):
    site.push(link='cd "$SPIDER_DATA_DIR/../logs"; echo "Dumping Scrapy stats: {}" > x; ln -sf x $SCRAPY_JOB.err',
              pipe='cd "$SPIDER_DATA_DIR/../logs"; rm $SCRAPY_JOB.err; mkfifo $SCRAPY_JOB.err')  # fmt: skip
    for spider in ("link", "pipe"):
        job = site.wait_job(site.schedule(spider))
        assert (job["status"], job["stats"]) == ("SUCCESSFUL", None)


@pytest.mark.parametrize("hostile", ["Dumping Scrapy stats:{'", "Dumping Scrapy stats:{", "{'a", "'\\", "\\"])
def test_stats_of_hostile_logs_cost_little_time(tmp_path, hostile):
    (tmp_path / "log").write_text("Dumping Scrapy stats:{" + hostile * (65_000 // len(hostile)))
    began = time.process_time()
    scrapy_do.read_stats(tmp_path / "log")
    assert time.process_time() - began < 0.2


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("exit 3", 3, "the crawl ended with exit code 3; its log says why"),
        ("kill -9 $$", -9, "the crawl was ended by signal 9 (Killed)"),
        ("kill -TERM $$", -15, "the crawl was ended by signal 15 (Terminated)"),
    ],
    ids=["exit", "SIGKILL", "SIGTERM"],
)
def test_a_crawl_that_fails_says_why(site, script, code, reason):
    site.push(bad=script)
    job = site.wait_job(site.schedule("bad"))
    assert (job["status"], job["exit_code"], job["reason"]) == ("FAILED", code, reason)


def alive(path):
    """Return the processes whose numbers a crawl has noted in a file and that still run."""
    numbers = [int(word) for word in path.read_text().split()] if path.exists() else []
    found = []
    for number in numbers:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                found.append(number)
    return found


NOTE = "echo $! >> $SPIDER_DATA_DIR/pids"
TREES = {
    "plain": f"sleep 60 & {NOTE}",
    "ignores-TERM": f"(trap '' TERM; while :; do sleep 0.05; done) & {NOTE}",
    "left-session": f"setsid sh -c 'echo $$ >> $SPIDER_DATA_DIR/pids; exec sleep 60' & {NOTE}",
    "lost-parent": "(setsid sh -c 'echo $$ >> $SPIDER_DATA_DIR/pids; trap \"\" TERM; exec sleep 60' &)",
    "execs-for-ever": (  # while a process executes a program it seems to have no environment
        "again=$SPIDER_DATA_DIR/again; echo exec /bin/sh $again > $again; "
        "setsid sh -c 'echo $$ >> $SPIDER_DATA_DIR/pids; exec /bin/sh $SPIDER_DATA_DIR/again' &"
    ),
    "no-environment": f"env -i /bin/sleep 60 & {NOTE}",
    "holds-output": f"sleep 60 & {NOTE}",
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("end", ["exits", "canceled"])
def test_nothing_of_a_crawl_outlives_it(inside, tmp_path, tree, end):
    site = inside(kill_after=0.5)
    tail = "exit 0" if end == "exits" else "wait; sleep 60"
    site.push(tree=f"{tree}\nwhile [ ! -s $SPIDER_DATA_DIR/pids ]; do sleep 0.02; done; {tail}")
    job = site.schedule("tree")
    if end == "canceled":
        wait_for(lambda: alive(tmp_path / "data/spider-data/pids"))
        site.post("cancel-job", id=job)
    assert site.wait_job(job)["status"] == {"exits": "SUCCESSFUL", "canceled": "CANCELED"}[end]
    assert alive(tmp_path / "data/spider-data/pids") == []
    assert list((tmp_path / "data/work").glob(f"*/{job}")) == []
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


def test_a_process_keeps_its_environment_while_it_executes(tmp_path):
    again = tmp_path / "again"
    again.write_text(f"exec /bin/sh {again}\n")
    with subprocess.Popen(["/bin/sh", again], env={"SCRAPY_JOB": "x"}, start_new_session=True) as process:
        try:
            wait_for(lambda: b"SCRAPY_JOB=x" in scrapy_do.read_environment(process.pid))
            seen = [b"SCRAPY_JOB=x" in scrapy_do.read_environment(process.pid) for _ in range(3000)]
        finally:
            process.kill()
    assert all(seen)


def test_cancel_ends_scheduled_and_pending_jobs_at_once(inside, tmp_path):
    site = inside(job_slots=1)
    site.push(hold=HOLD)
    site.wait_job(site.schedule("hold"), "RUNNING")
    for job in (site.schedule(when="every 2 hours"), site.schedule()):
        site.post("cancel-job", id=job)
        canceled = site.job(job)
        assert (canceled["status"], canceled["reason"]) == ("CANCELED", "canceled by the user")
        assert canceled["next_run"] is canceled["duration"] is canceled["exit_code"] is None
        status, answer = site.try_post("cancel-job", id=job)
        assert (status, "has ended already" in answer["msg"]) == (409, True)
    release(tmp_path)


def test_cancel_asks_first_and_kills_later(inside):
    site = inside(kill_after=0.4)
    site.push(polite="trap 'echo bye; exit 0' TERM; echo started; while :; do sleep 0.02; done", stubborn=STUBBORN)
    for spider, code in {"polite": 0, "stubborn": -9}.items():
        job = site.schedule(spider)
        wait_for(lambda job=job: "started" in site.log(job, "out"))
        site.post("cancel-job", id=job)
        canceled = site.job(job)  # the answer comes when it is gone
        assert (canceled["status"], canceled["exit_code"]) == ("CANCELED", code)
        assert ("bye" in site.log(job, "out")) == (spider == "polite")


POLITE = "trap 'echo bye; exit 0' TERM; echo started; while :; do sleep 0.02; done"


@pytest.mark.parametrize(("spider", "code"), [("polite", 0), ("stubborn", -9)])
@pytest.mark.parametrize("whose", ["job", "option", "job before option"])
def test_a_crawl_that_runs_longer_than_its_timeout_is_ended_and_has_failed(inside, tmp_path, spider, code, whose):
    site = inside(kill_after=0.3, job_timeout=0.0 if whose == "job" else 0.5 if whose == "option" else 1000.0)
    site.push(polite=POLITE, stubborn=f"({STUBBORN}) & {NOTE}\n{STUBBORN}")
    began = time.monotonic()
    job = site.wait_job(site.schedule(spider, **({} if whose == "option" else {"timeout": "0.5"})))
    assert time.monotonic() - began > (0.5 if spider == "polite" else 0.8)
    wanted = ("FAILED", code, "it ran longer than its timeout of 0.5 s", None if whose == "option" else 0.5)
    assert (job["status"], job["exit_code"], job["reason"], job["timeout"]) == wanted
    assert ("bye" in site.log(job["identifier"], "out")) == (spider == "polite")
    assert (tmp_path / "data/spider-data/pids").exists() == (spider == "stubborn")
    assert alive(tmp_path / "data/spider-data/pids") == []
    assert site.wait_job(site.schedule(timeout="30"))["status"] == "SUCCESSFUL"
    check_counts(site.get("status"))


@pytest.mark.parametrize("how", ["cancel", "stop"])
@pytest.mark.parametrize("timeout", [0.3, 60], ids=["after the timeout", "before the timeout"])
def test_a_cancel_or_a_stop_comes_before_a_timeout(inside, tmp_path, how, timeout):
    """Also when the timeout was over first: the crawl has been asked to end, and must not be asked again."""
    site = inside(kill_after=30)
    loop = "while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done"
    site.push(slow=f"trap 'echo bye' TERM; echo started; {loop}")
    job = site.schedule("slow", timeout=timeout)
    wait_for(lambda: ("bye" if timeout < 1 else "started") in site.log(job, "out"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(site.daemon.cancel, job) if how == "cancel" else pool.submit(site.daemon.close)
        wait_for(lambda: getattr(site.daemon._crawls.get(job), "ended_for", "") == how)
        wait_for(lambda: "bye" in site.log(job, "out"))
        release(tmp_path)
        asked.result(20)
    saved = state(tmp_path)["jobs"][job]
    wanted = {"cancel": ("CANCELED", "canceled by the user"), "stop": ("PENDING", None)}[how]
    assert (saved["status"], saved.get("reason")) == wanted
    assert (tmp_path / f"data/logs/{job}.out").read_text() == "started\nbye\n"


def test_a_timeout_goes_to_the_runs_of_a_schedule_and_begins_anew_after_a_crash(outside, tmp_path):
    site = outside("--job-timeout", "60", "--kill-after", "0.3")
    site.push(hold=HOLD)
    schedule = site.schedule("hold", "every second", timeout="1.5")
    run = wait_for(lambda: site.jobs("RUNNING"))[0]["identifier"]
    site.kill()
    site.start()
    assert site.job(schedule)["timeout"] == 1.5
    site.post("cancel-job", id=schedule)
    job = site.wait_job(run)
    assert (job["status"], job["reason"]) == ("FAILED", "it ran longer than its timeout of 1.5 s")
    assert job["duration"] >= 1
    release(tmp_path)


@pytest.mark.parametrize("timeout", ["0", "-1", "", "x", "nan", "inf", "1000000.1", "1 s"])
def test_a_timeout_that_is_no_positive_number_is_refused(site, timeout):
    site.push()
    status, answer = site.try_post("schedule-job", **PLAN, timeout=timeout)
    assert (status, repr(timeout) in answer["msg"], "above 0" in answer["msg"]) == (400, True, True)
    assert site.jobs("ACTIVE") == []


def in_parallel(*calls):
    """Run functions at once and return their results, in order."""
    results = [None] * len(calls)
    gate = threading.Barrier(len(calls))

    def run(number, call):
        gate.wait()
        results[number] = call()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def check_counts(status):
    """The counters of status.json must add up."""
    ended = status["jobs-successful"] + status["jobs-failed"] + status["jobs-canceled"]
    assert status["jobs-run"] == ended + status["jobs-running"], status


def test_cancel_twice_at_once_and_at_the_natural_end_gives_one_outcome(inside):
    site = inside(job_slots=2)
    site.push(blink="sleep 0.0$(($$ % 5))")
    draw = random.Random(4)
    for number in range(60):
        job = site.schedule("blink")
        moment = time.monotonic() + draw.random() * 0.1 * (number % 2)  # half of them at once: while it starts
        wait_for(lambda moment=moment: time.monotonic() >= moment)
        answers = in_parallel(*[lambda job=job: site.try_post("cancel-job", id=job)] * 2)
        final = site.wait_job(job)["status"]
        codes = sorted(status for status, _ in answers)
        assert codes in ([200, 200], [200, 409], [409, 409])
        assert final == ("CANCELED" if 200 in codes else "SUCCESSFUL")
    check_counts(site.get("status"))


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_crawl_that_shall_end_while_it_starts_ends_at_once(inside, tmp_path, monkeypatch, how):
    site, real, go = inside(), scrapy_do.copy_tree, threading.Event()
    site.push(long="exec sleep 60")
    monkeypatch.setattr(scrapy_do, "copy_tree", lambda *paths: (go.wait(), real(*paths)))
    job = site.schedule("long")
    site.wait_job(job, "RUNNING")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(site.daemon.cancel, job) if how == "cancel" else pool.submit(site.daemon.close)
        wait_for(lambda: state(tmp_path)["jobs"][job].get("cancel") if how == "cancel" else site.daemon._is_closing)
        go.set()
        asked.result(20)
    assert state(tmp_path)["jobs"][job]["status"] == {"cancel": "CANCELED", "stop": "PENDING"}[how]
    assert len(list((tmp_path / "data/work").iterdir())) == 1  # the tree of the project
    status = site.daemon.status()
    assert status["jobs-canceled"] == (how == "cancel")
    assert status["jobs-running"] == 0


def test_a_start_that_fails_frees_its_slot(inside, tmp_path, capsys):
    site = inside(job_slots=1)
    site.push()
    script = tmp_path / "stub-scrapy"
    spoiled = {
        "gone": lambda: script.rename(tmp_path / "away"),
        "not-executable": lambda: script.chmod(0o644),
        "no-interpreter": lambda: script.write_text("#!/nonexistent/interpreter\n"),
    }
    source = script.read_text()
    for spoil in spoiled.values():
        spoil()
        job = site.wait_job(site.schedule())
        assert (job["status"], job["exit_code"]) == ("FAILED", None)
        assert "cannot be started" in job["reason"]
        assert f"job {job['identifier']} is FAILED after 0 s, {job['reason']}" in capsys.readouterr().err
        script.write_text(source)
        script.chmod(0o755)
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    long = site.wait_job(site.schedule(payload=json.dumps({"x": "y" * 200_000})))
    assert (long["status"], long["reason"]) == ("FAILED", "the payload, args and settings are too long for a command")
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    check_counts(site.get("status"))


def test_an_unknown_path_is_answered_with_all_that_exist(site):
    status, answer = site.call("GET", "/status")
    assert status == 404
    assert [path for path in (*scrapy_do.ROUTES, "/get-log/data/ID.out", "/get-log/data/ID.err") if path not in answer["msg"]] == []


def test_a_working_copy_that_cannot_be_made_is_one_sentence(site, monkeypatch):
    def refuse(source, target, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    site.push()
    monkeypatch.setattr(shutil, "copy2", refuse)
    job = site.wait_job(site.schedule())
    assert (job["status"], job["exit_code"]) == ("FAILED", None)
    assert job["reason"].startswith("no working copy could be made for the crawl: [Errno 28] No space left on device")
    monkeypatch.undo()
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


def test_an_archive_deleted_by_hand_fails_its_jobs_with_a_reason(outside, tmp_path):
    site = outside()
    site.push()
    site.stop()
    (tmp_path / "data/projects/shop.zip").unlink()
    site.start()
    job = site.wait_job(site.schedule())
    assert (job["status"], "shop.zip" in job["reason"]) == ("FAILED", True)
    site.push()
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


def test_only_the_newest_finished_jobs_are_kept(inside, tmp_path):
    site = inside(completed_cap=3)
    site.push(talk="echo x")
    made = []
    for _ in range(6):
        made.append(site.schedule("talk"))
        site.wait_job(made[-1])
    assert [job["identifier"] for job in site.jobs("COMPLETED")] == made[:2:-1]
    logs = sorted(path.name for path in (tmp_path / "data/logs").iterdir())
    assert logs == sorted(f"{job}.{stream}" for job in made[3:] for stream in ("out", "err"))
    assert list(state(tmp_path)["jobs"]) == made[3:]
    assert site.call("GET", f"/get-log/data/{made[0]}.out")[0] == 404


def kept_logs(tmp_path):
    """Return the jobs that have logs."""
    return {path.stem for path in (tmp_path / "data/logs").iterdir()}


def test_finished_jobs_are_forgotten_by_age_also_when_nothing_happens(inside, tmp_path):
    clock = FakeClock()
    site = inside(clock, keep_days=2)
    site.push(bad="echo x; exit 1")
    schedule, old = site.schedule(when="every 9 days"), [site.schedule("bad"), site.schedule()]
    for job in old:
        site.wait_job(job)
    clock.advance(DAY)
    young = site.schedule("bad")
    site.wait_job(young)
    clock.advance(DAY - 1)
    site.schedule(when="every 9 days")
    assert {job["identifier"] for job in site.jobs("COMPLETED")} == {*old, young}
    clock.advance(1)
    wait_for(lambda: kept_logs(tmp_path) == {young})
    assert [job["identifier"] for job in site.jobs("COMPLETED")] == [young]
    assert schedule in state(tmp_path)["jobs"].keys() >= {young}
    clock.advance(DAY)
    wait_for(lambda: kept_logs(tmp_path) == set())
    assert (site.jobs("COMPLETED"), len(site.jobs("SCHEDULED"))) == ([], 2)


def test_finished_jobs_are_forgotten_by_the_size_of_their_logs_across_a_restart(outside, tmp_path):
    site = outside("--keep-mib", "1")
    site.push(half="head -c 300000 /dev/zero; head -c 200000 /dev/zero >&2", big="head -c 2000000 /dev/zero", small="echo x")

    def run(spider):
        job = site.wait_job(site.schedule(spider))["identifier"]
        wait_for(lambda: kept_logs(tmp_path) == {job["identifier"] for job in site.jobs("COMPLETED")})
        return job

    first, second, third = [run(spider) for spider in ("half", "small", "half")]
    assert kept_logs(tmp_path) == {first, second, third}
    site.stop()
    site.start()
    fourth = run("half")
    assert kept_logs(tmp_path) == {second, third, fourth}
    big = run("big")
    site.schedule(when="every 3 hours")
    assert kept_logs(tmp_path) == {big}
    last = run("small")
    assert kept_logs(tmp_path) == {last}


@pytest.mark.parametrize(("option", "left"), [("--completed-cap", 1), ("--keep-days", 1), ("--keep-mib", 2)])
def test_a_start_forgets_what_is_not_to_be_kept_any_more(outside, tmp_path, option, left):
    site = outside()
    site.push(half="head -c 500000 /dev/zero")
    jobs = [site.wait_job(site.schedule("half"))["identifier"] for _ in range(3)]
    site.stop()
    change_state(tmp_path, lambda document: [document["jobs"][job].update(timestamp=1.7e9 + n) for n, job in enumerate(jobs[:2])])
    site.options = (*site.options, option, "1")
    site.start()
    assert [job["identifier"] for job in site.jobs("COMPLETED")] == jobs[: -left - 1 : -1]
    wait_for(lambda: kept_logs(tmp_path) == set(jobs[-left:]))


NOTICE = """#!/bin/sh
# What --on-finish starts: it keeps what it got, and what was on the disk then.
cp data/state.json notes/state
cat > notes/input
echo "$SCRAPY_DO_JOB $SCRAPY_DO_STATUS $SCRAPY_JOB $*" > notes/words
mv notes "$SCRAPY_DO_JOB"
mkdir notes
"""


@pytest.fixture
def notes(tmp_path):
    """Return a function that gives what the command of --on-finish got for a job."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "note").write_text(NOTICE)
    (tmp_path / "note").chmod(0o755)

    def read(job):
        wait_for(lambda: (tmp_path / job).exists())
        return {path.name: path.read_text() for path in (tmp_path / job).iterdir()}

    return read


def test_on_finish_is_started_for_each_run_that_has_ended(outside, tmp_path, notes):
    site = outside("--on-finish", f"{tmp_path}/note 'a b' '*'", "--job-slots", "1", "--kill-after", "1")
    site.push(bad="exit 3", stubborn=STUBBORN, talk="echo \"Dumping Scrapy stats: {'item_scraped_count': 2}\" >&2")
    made = {"talk": "SUCCESSFUL", "bad": "FAILED", "stubborn": "CANCELED", "quick": "CANCELED"}
    ids = {spider: site.schedule(spider, payload='{"a": "漢字"}') for spider in made}
    site.wait_job(ids["stubborn"], "RUNNING")
    schedule = site.schedule(when="every 3 hours")
    for job in (schedule, ids["quick"], ids["stubborn"]):
        site.post("cancel-job", id=job)
    for spider, status in made.items():
        job, got = ids[spider], notes(ids[spider])
        assert got["words"] == f"{job} {status}  a b *\n"
        assert json.loads(got["input"]) == site.job(job)
        assert re.findall(rf'"{job}".*"status": "([A-Z]+)"', got["state"])[-1] == status
    assert site.job(ids["talk"])["stats"]["items"] == 2
    assert not (tmp_path / schedule).exists()
    site.schedule(when="every second")
    run = wait_for(lambda: [job["identifier"] for job in site.jobs("SUCCESSFUL") if job["actor"] == "SCHEDULER"])[0]
    assert json.loads(notes(run)["input"])["actor"] == "SCHEDULER"
    assert "on-finish" not in site.log_path.read_text()


def test_on_finish_knows_an_end_that_a_crash_has_delayed_but_no_run_that_begins_again(outside, tmp_path, notes):
    site = outside("--on-finish", f"{tmp_path}/note")
    site.push(hold=HOLD)
    again, over = site.schedule("hold"), site.schedule("hold")
    wait_for(lambda: "started" in site.log(over, "out") and "started" in site.log(again, "out"))
    site.stop()
    assert not (tmp_path / again).exists()
    change_state(tmp_path, lambda document: document["jobs"][over].update(status="RUNNING", cancel=True))
    site.start()
    assert notes(over)["words"] == f"{over} CANCELED  \n"
    wait_for(lambda: "started" in site.log(again, "out"))
    site.reload()
    release(tmp_path)
    assert notes(again)["words"] == f"{again} SUCCESSFUL  \n"


def test_a_reload_waits_a_little_for_on_finish(outside, tmp_path):
    (tmp_path / "note").write_text("#!/bin/sh\nsleep 1\necho $SCRAPY_DO_JOB >> notes\n")
    (tmp_path / "note").chmod(0o755)
    site = outside("--on-finish", f"{tmp_path}/note")
    site.push()
    jobs = [site.schedule(), site.schedule()]
    for job in jobs:
        site.wait_job(job)
    site.reload()
    assert sorted((tmp_path / "notes").read_text().split()) == sorted(jobs)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("nothing-here", "[Errno 2] No such file or directory: b'nothing-here'"),
        ("sh -c 'exit 3'", "exit code 3"),
        ("sh -c 'kill -9 $$'", "exit code -9"),
        ("sh -c 'sleep 600 & echo $! > child; wait'", "it took too long and was killed"),
    ],
    ids=["missing", "exit", "signal", "slow"],
)
def test_on_finish_that_fails_is_only_logged(inside, tmp_path, monkeypatch, capsys, command, fault):
    monkeypatch.setattr(scrapy_do, "NOTICE_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    site = inside(on_finish=scrapy_do.command(command))
    site.push()
    job = site.wait_job(site.schedule(payload=json.dumps({"long": "x" * 100_000})))
    said = ""
    while f"--on-finish failed for job {job['identifier']}: {fault}\n" not in said:
        said += wait_for(lambda: capsys.readouterr().err)
    assert site.job(job["identifier"]) == job
    assert not (tmp_path / "child").exists() or not alive(tmp_path / "child")


def test_on_finish_holds_no_crawl_up_and_waits_for_so_many_at_most(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scrapy_do, "NOTICES_COUNT", 2)
    monkeypatch.chdir(tmp_path)
    site = inside(on_finish=scrapy_do.command("sh -c 'echo $SCRAPY_DO_JOB >> started; while [ ! -e go ]; do sleep 0.02; done'"))
    site.push()
    jobs = [site.schedule()]
    wait_for((tmp_path / "started").exists)
    for _ in range(4):
        jobs.append(site.schedule())
        site.wait_job(jobs[-1])
    (tmp_path / "go").touch()
    wait_for(lambda: (tmp_path / "started").read_text().split() == jobs[:3])
    said = capsys.readouterr().err
    assert [f"failed for job {job}: 2 others are waiting\n" in said for job in jobs] == [False] * 3 + [True] * 2


def test_a_stop_waits_a_little_for_on_finish(inside, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scrapy_do, "NOTICE_STOP_SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    site = inside(on_finish=scrapy_do.command("sh -c 'echo $$ > started; [ -e go ] && sleep 600 || sleep 0.2; touch go done'"))
    site.push()
    jobs = [site.schedule() for _ in range(3)]
    wait_for((tmp_path / "started").exists)
    for job in jobs:
        site.wait_job(job)
    began = time.monotonic()
    site.daemon.close()
    assert 0.8 < time.monotonic() - began < 3
    assert (tmp_path / "done").exists()
    assert not alive(tmp_path / "started")
    said = capsys.readouterr().err
    assert (said.count("it took too long and was killed"), said.count("the daemon is stopping")) == (1, 1)


def test_on_finish_waits_until_the_disk_has_the_end(inside, tmp_path, monkeypatch, notes):
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    site = inside(on_finish=(str(tmp_path / "note"),))
    site.push(hold=HOLD)
    job = site.schedule("hold")
    wait_for(lambda: "started" in site.log(job, "out"))
    wait_for(lambda: "pid" in state(tmp_path)["jobs"][job])
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        faults.error, faults.step = errno.ENOSPC, "write"
        release(tmp_path)
        site.wait_job(job)
        wait_for(lambda: faults.count < -4)
        assert not (tmp_path / job).exists()
        faults.step = ""
        assert '"SUCCESSFUL"' in notes(job)["state"]


def test_a_schedule_never_has_two_pending_runs(inside, tmp_path):
    clock = FakeClock()
    site = inside(clock, job_slots=1)
    site.push(hold=HOLD)
    schedule = site.schedule("hold", "every 10 seconds")
    clock.advance(10)
    first = wait_for(lambda: site.jobs("RUNNING"))[0]
    assert (first["actor"], first["schedule"]) == ("SCHEDULER", "now")
    for _ in range(3):
        clock.advance(10)
    wait_for(lambda: site.get("status")["runs-skipped"] == 2)
    assert len(site.jobs("PENDING")) == 1
    assert site.job(schedule)["next_run"] == scrapy_do.local_time(clock.now + 10)
    release(tmp_path)
    wait_for(lambda: len(site.jobs("SUCCESSFUL")) == 2)


def test_runs_do_not_drift(inside):
    clock = FakeClock(1_700_000_000.123457)
    site = inside(clock)
    site.push()
    began = clock.now
    schedule = site.schedule(when="every 10 seconds")
    late = random.Random(7)
    for number in range(1, 60):
        clock.advance(began + 10 * number + late.random() * 9 - clock.now)
        wait_for(lambda number=number: state_due(site, schedule) == began + 10 * (number + 1))
    assert site.get("status")["jobs-run"] > 30


def state_due(site, schedule):
    return site.daemon._jobs[schedule].due


def test_missed_due_times_become_one_run_and_the_grid_goes_on(inside):
    clock = FakeClock()
    site = inside(clock)
    site.push()
    began = clock.now
    schedule = site.schedule(when="every 10 minutes")
    clock.advance(3 * 86400 + 1)
    wait_for(lambda: len(site.jobs("SUCCESSFUL")) == 1)
    assert state_due(site, schedule) == began + 3 * 86400 + 600
    clock.advance(599)
    wait_for(lambda: len(site.jobs("SUCCESSFUL")) == 2)


def test_a_clock_that_is_set_back_keeps_no_schedule_waiting(inside):
    clock = FakeClock()
    site = inside(clock)
    site.push()
    schedule = site.schedule(when="every 10 minutes")
    drawn = site.schedule(when="every 2 to 3 hours")
    clock.advance(30)
    clock.advance(30, step=-86400)
    wait_for(lambda: state_due(site, schedule) == clock.now + 600)
    assert clock.now + 7200 <= state_due(site, drawn) <= clock.now + 10800


def test_due_times_survive_a_restart_to_the_microsecond(outside, tmp_path):
    site = outside()
    site.push()
    jobs = [site.schedule(when=when) for when in ("every 2 to 3 hours", "every 2 weeks", "every monday at 12:30")]
    before = [site.job(job) for job in jobs]
    exact = [state(tmp_path)["jobs"][job]["due"] for job in jobs]
    for end in (site.stop, site.kill, site.stop):
        end()
        site.start()
        assert [site.job(job) for job in jobs] == before
        assert [state(tmp_path)["jobs"][job]["due"] for job in jobs] == exact


def change_state(tmp_path, change):
    """Edit the state file of a daemon that does not run."""
    path = tmp_path / "data/state.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_daemon_that_was_down_runs_once_and_goes_on_with_the_grid(outside, tmp_path):
    site = outside()
    site.push()
    job = site.schedule(when="every 10 minutes")
    site.stop()
    due = state(tmp_path)["jobs"][job]["due"] - 51 * 600
    change_state(tmp_path, lambda document: document["jobs"][job].update(due=due))
    site.start()
    wait_for(lambda: len(site.jobs("SUCCESSFUL")) == 1)
    later = state(tmp_path)["jobs"][job]["due"]
    assert (later - due) % 600 == pytest.approx(0, abs=1e-5)
    assert time.time() < later < time.time() + 600
    assert site.get("status")["jobs-run"] == 1


@pytest.mark.parametrize("spec", ["every blue moon", "now", "", "every 99999999 weeks"])
def test_a_spec_in_the_state_that_makes_no_sense_fails_only_its_job(outside, tmp_path, spec):
    site = outside()
    site.push()
    bad, good = site.schedule(when="every 3 hours"), site.schedule(when="every 1 second")
    site.stop()
    change_state(tmp_path, lambda document: document["jobs"][bad].update(schedule=spec))
    site.start()
    job = site.job(bad)
    assert job["status"] == "FAILED"
    assert job["reason"]
    wait_for(lambda: site.jobs("SUCCESSFUL"))
    assert site.job(good)["status"] == "SCHEDULED"


def test_a_job_that_fails_at_the_start_takes_the_place_of_one_other(outside, tmp_path):
    site = outside("--completed-cap", "2")
    site.push()
    jobs = [site.schedule(when="every 3 hours") for _ in range(3)]
    for job in jobs[:2]:
        site.post("cancel-job", id=job)
    site.stop()
    change_state(tmp_path, lambda document: document["jobs"][jobs[2]].update(schedule="now"))
    site.start()
    assert [job["identifier"] for job in site.jobs("COMPLETED")] == [jobs[2], jobs[1]]


def test_the_length_of_the_list_is_known_without_listing(inside, tmp_path):
    """It decides whether the accept loop may answer; other requests must not wait for a long one."""
    site = inside(completed_cap=2)
    site.push()
    schedule = site.schedule(when="every 2 hours", description="a" * 1000, payload=json.dumps({"a": "b" * 300_000}))
    for _ in range(4):
        site.wait_job(site.schedule(arg=["a=b", "c=" + "d" * 5000]))
    real = len(json.dumps(site.jobs("ACTIVE") + site.jobs("COMPLETED")))
    assert real * 0.8 < site.daemon.list_bytes < real * 1.2  # of which most are texts
    assert site.daemon.list_bytes > scrapy_do.QUICK_LIST_BYTES
    site.post("cancel-job", id=schedule)
    for _ in range(3):
        site.wait_job(site.schedule())
    wait_for(lambda: len(site.jobs("COMPLETED")) == 2)
    assert 1 <= site.daemon.list_bytes / len(json.dumps(site.jobs("COMPLETED"))) < 2


def test_every_second_runs_every_second(outside, tmp_path):
    site = outside("--completed-cap", "100")
    site.push()
    schedule = site.schedule(when="every second")
    wait_for(lambda: len(site.jobs("COMPLETED")) >= 3)
    assert site.get("status")["runs-skipped"] == 0
    site.stop()
    saved = state(tmp_path)["jobs"]
    runs = [job for job in saved.values() if job["actor"] == "SCHEDULER"]
    assert saved[schedule]["due"] == pytest.approx(saved[schedule]["origin"] + len(runs) + 1)
    begun = sorted(job["origin"] - saved[schedule]["origin"] for job in runs)
    assert all(0 <= moment - number < 1 for number, moment in enumerate(begun, 1)), begun


def test_a_stop_puts_running_jobs_back_in_their_place(outside, tmp_path):
    site = outside("--job-slots", "1", "--kill-after", "0.5")
    site.push(stubborn=STUBBORN, note="echo $SCRAPY_JOB >> $SPIDER_DATA_DIR/order")
    first = site.schedule("stubborn")
    wait_for(lambda: "started" in site.log(first, "out"))
    second = site.schedule("note")
    crawl = psutil.Process(state(tmp_path)["jobs"][first]["pid"])
    assert site.stop() == 0
    assert not crawl.is_running()
    saved = state(tmp_path)["jobs"]
    assert [saved[job]["status"] for job in (first, second)] == ["PENDING", "PENDING"]
    assert list((tmp_path / "data").glob("state.json.*")) == []
    site.start()
    site.wait_job(first, "RUNNING")
    assert site.job(second)["status"] == "PENDING"
    site.post("cancel-job", id=first)
    assert site.wait_job(second)["status"] == "SUCCESSFUL"
    status = site.get("status")
    assert (status["jobs-run"], status["jobs-canceled"]) == (2, 1)
    check_counts(status)


def test_a_crash_ends_the_crawl_and_runs_the_job_again(outside, tmp_path):
    site = outside("--job-slots", "2")
    site.push(hold="echo $$ >> $SPIDER_DATA_DIR/pids; " + HOLD, orphan=f"{TREES['lost-parent']}; {HOLD}")
    jobs = [site.schedule("hold"), site.schedule("orphan")]
    pids = tmp_path / "data/spider-data/pids"
    wait_for(lambda: len(alive(pids)) == 2)
    waiting = site.schedule()
    site.kill()
    before = alive(pids)
    assert len(before) == 2
    site.start()
    assert [pid for pid in alive(pids) if pid in before] == []
    log = site.log_path.read_text()
    assert all(f"job {job} is PENDING again" in log for job in jobs)
    wait_for(lambda: len(alive(pids)) == 2)
    assert [site.job(job)["status"] for job in jobs] == ["RUNNING", "RUNNING"]
    release(tmp_path)
    assert {site.wait_job(job)["status"] for job in [*jobs, waiting]} == {"SUCCESSFUL"}
    assert site.get("status")["jobs-run"] == 3


def test_a_job_that_was_being_canceled_in_a_crash_does_not_run_again(outside, tmp_path):
    site = outside("--kill-after", "60")
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn")
    wait_for(lambda: "started" in site.log(job, "out"))
    asker = threading.Thread(target=try_cancel, args=(site, job))
    asker.start()
    wait_for(lambda: state(tmp_path)["jobs"][job].get("cancel"))
    site.kill()
    asker.join()
    site.start()
    assert site.job(job)["status"] == "CANCELED"
    assert site.get("status")["jobs-running"] == 0


def try_cancel(site, job):
    """Cancel a job of a daemon that may die meanwhile."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        site.try_post("cancel-job", id=job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_status_0_whatever_it_does(outside, number):
    site = outside("--kill-after", "1")
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn")
    wait_for(lambda: "started" in site.log(job, "out"))
    asker = threading.Thread(target=try_cancel, args=(site, site.schedule("stubborn")))
    asker.start()
    site.process.send_signal(number)
    site.process.send_signal(number)
    assert site.process.wait(15) == 0
    asker.join()
    assert "Traceback" not in site.log_path.read_text()


def test_a_push_that_is_under_way_is_refused_when_the_daemon_stops(outside, tmp_path):
    site = outside("--kill-after", "0.3")
    slow = make_zip({"scrapy.cfg": "[deploy]\nproject=slow\n", "list.sh": "touch $SPIDER_DATA_DIR/on; sleep 60"})
    answers = []
    pusher = threading.Thread(target=lambda: answers.append(site.try_push(slow)))
    pusher.start()
    wait_for((tmp_path / "data/spider-data/on").exists)
    assert site.stop() == 0
    pusher.join()
    assert answers[0][0] == 503
    site.start()
    assert site.get("list-projects")["projects"] == []
    assert list((tmp_path / "data/projects").iterdir()) == []

def crawl_of(site, tmp_path, job):
    """Return the process of a job that has begun to talk, as the state file knows it."""
    pid = wait_for(lambda: state(tmp_path)["jobs"][job].get("pid"))
    wait_for(lambda: "started" in site.log(job, "out"))
    return psutil.Process(pid)


def test_crawls_go_on_across_two_reloads(outside, tmp_path):
    site = outside("--job-slots", "2")
    site.push(good=f"{HOLD}; cat code.py", bad=f"sleep 60 & {HOLD}; cat code.py; exit 7")
    jobs = {spider: site.schedule(spider) for spider in ("good", "bad")}
    crawls = {spider: crawl_of(site, tmp_path, job) for spider, job in jobs.items()}
    began = time.monotonic()
    waiting, before = site.schedule(), {spider: site.job(job) for spider, job in jobs.items()}
    process, port = psutil.Process(site.process.pid), site.port
    descriptors = process.num_fds()
    for _ in range(2):
        site.reload()
        assert {spider: site.job(job) for spider, job in jobs.items()} == before
        status = site.get("status")
        assert (status["jobs-running"], status["jobs-pending"], status["jobs-run"]) == (2, 1, 2)
        assert site.port == port
    assert {crawl.ppid() for crawl in crawls.values()} == {site.process.pid}
    wait_for(lambda: process.num_fds() <= descriptors)
    wait_for(lambda: time.monotonic() > began + 2)
    release(tmp_path)
    done = {spider: site.wait_job(job) for spider, job in jobs.items()}
    assert {spider: (job["status"], job["exit_code"]) for spider, job in done.items()} == {
        "good": ("SUCCESSFUL", 0), "bad": ("FAILED", 7),
    }  # fmt: skip
    assert min(job["duration"] for job in done.values()) >= 2
    assert {site.log(job, "out") for job in jobs.values()} == {"started\nx = 1\n"}  # from its working copy
    assert site.wait_job(waiting)["status"] == "SUCCESSFUL"
    wait_for(lambda: [path.name for path in (tmp_path / "data/work").iterdir() if path.name in jobs.values()] == [])
    check_counts(site.get("status"))
    assert [child for child in process.children() if child.status() == psutil.STATUS_ZOMBIE] == []
    assert [process for process in psutil.process_iter() if marked(process, tmp_path)] == []
    assert site.stop() == 0
    assert "Traceback" not in site.log_path.read_text()


SLOW_START = """
import os, runpy, sys, time
while os.path.exists({flag!r}) and {name!r} in os.environ:
    time.sleep(0.01)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def slow(outside, tmp_path):
    """Return a function that starts a daemon that at a reload waits, before it is one again, while a file is there."""
    flag = tmp_path / "wait"
    source = SLOW_START.format(flag=str(flag), name=scrapy_do.HANDOVER)

    def start(*options):
        site = outside(*options, command=(sys.executable, "-c", source, str(MODULE)))
        flag.touch()
        return site, flag

    return start


def wait_until_it_is_executed(site):
    """Wait until a daemon has told that it is being reloaded, and its new program has begun."""
    wait_for(lambda: "reloading" in site.log_path.read_text())
    wait_for(lambda: psutil.Process(site.process.pid).num_threads() == 1)


def test_a_crawl_that_ends_during_a_reload_keeps_its_exit_code(slow, tmp_path):
    site, flag = slow()
    site.push(hold=f"{HOLD}; exit 7")
    job = site.schedule("hold")
    crawl = crawl_of(site, tmp_path, job)
    listens_again = site.hang_up()
    wait_until_it_is_executed(site)
    release(tmp_path)
    wait_for(lambda: crawl.status() == psutil.STATUS_ZOMBIE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(site.get, "status")  # it waits in the backlog of the socket, which is the same
        wait_for(lambda: asked.running())
        flag.unlink()
        assert asked.result(30)["jobs-scheduled"] == 0
    listens_again()
    done = site.wait_job(job)
    assert (done["status"], done["exit_code"]) == ("FAILED", 7)
    assert site.log(job, "out") == "started\n"
    assert not crawl.is_running()
    assert site.get("status")["jobs-run"] == 1


SLOW_LAUNCH = """
import os, runpy, sys, time
link, fsync = os.link, os.fsync
def slow_link(*paths):
    open({flag!r} + ".on", "w").close()
    while os.path.exists({flag!r}):
        time.sleep(0.01)
    link(*paths)
def slow_fsync(descriptor):
    if os.path.exists({flag!r} + ".on"):
        time.sleep(0.5)
    fsync(descriptor)
os.link, os.fsync = slow_link, slow_fsync
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_crawl_that_is_being_started_at_a_reload_is_started_once(outside, tmp_path):
    flag = tmp_path / "copying"
    flag.touch()
    site = outside(command=(sys.executable, "-c", SLOW_LAUNCH.format(flag=str(flag)), str(MODULE)))
    site.push(hold="echo run >> $SPIDER_DATA_DIR/runs; " + HOLD)
    job = site.schedule("hold")
    wait_for((tmp_path / "copying.on").exists)
    listens_again = site.hang_up()
    wait_for(lambda: site.try_push(stub_project("other"))[0] == 503)
    waiting = site.schedule()
    flag.unlink()
    listens_again()
    release(tmp_path)
    assert {site.wait_job(each)["status"] for each in (job, waiting)} == {"SUCCESSFUL"}
    assert (tmp_path / "data/spider-data/runs").read_text() == "run\n"
    log = site.log_path.read_text()
    assert log.index("reloading") < log.index(f"job {waiting} is RUNNING")


def test_a_crawl_is_canceled_after_a_reload_like_any_other(outside, tmp_path):
    site = outside("--kill-after", "0.5")
    site.push(polite=POLITE, stubborn=STUBBORN)
    jobs = {spider: site.schedule(spider) for spider in ("polite", "stubborn")}
    for job in jobs.values():
        crawl_of(site, tmp_path, job)
    site.reload()
    for spider, code in {"polite": 0, "stubborn": -9}.items():
        site.post("cancel-job", id=jobs[spider])
        canceled = site.job(jobs[spider])
        assert (canceled["status"], canceled["exit_code"]) == ("CANCELED", code)
    assert site.log(jobs["polite"], "out") == "started\nbye\n"


def test_a_cancel_that_is_under_way_is_answered_before_a_reload(outside, tmp_path):
    site = outside("--kill-after", "1.5")
    site.push(stubborn="trap 'echo asked' TERM; echo started; while :; do sleep 0.05; done", hold=HOLD)
    job, kept = site.schedule("stubborn"), site.schedule("hold")
    for started in (job, kept):
        crawl_of(site, tmp_path, started)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(site.try_post, "cancel-job", id=job)
        wait_for(lambda: "asked" in site.log(job, "out"))
        listens_again = site.hang_up()
        wait_for(lambda: site.try_push(stub_project("other"))[0] == 503)
        assert site.try_post("cancel-job", id=kept)[0] == 503
        assert asked.result(30)[0] == 200
    listens_again()
    assert site.job(job)["exit_code"] == -9
    assert site.log(job, "out") == "started\nasked\n"
    assert site.job(kept)["status"] == "RUNNING"
    release(tmp_path)
    assert site.wait_job(kept)["status"] == "SUCCESSFUL"


def test_a_timeout_goes_on_during_a_reload(slow, tmp_path):
    site, flag = slow("--kill-after", "0.3")
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn", timeout="3")
    crawl_of(site, tmp_path, job)
    began = time.monotonic()
    listens_again = site.hang_up()
    wait_until_it_is_executed(site)
    wait_for(lambda: time.monotonic() > began + 3)
    flag.unlink()
    listens_again()
    ready = time.monotonic()
    done = site.wait_job(job)
    assert time.monotonic() - ready < 2.5
    assert (done["reason"], done["exit_code"]) == ("it ran longer than its timeout of 3 s", -9)
    assert done["duration"] >= 3


def test_a_push_that_is_under_way_is_refused_at_a_reload(outside, tmp_path):
    site = outside("--kill-after", "0.3")
    slow = make_zip({"scrapy.cfg": "[deploy]\nproject=slow\n", "list.sh": "touch $SPIDER_DATA_DIR/on; sleep 60"})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(site.try_push, slow)
        wait_for((tmp_path / "data/spider-data/on").exists)
        site.reload()
        assert pushed.result(30)[0] == 503
    assert site.get("list-projects")["projects"] == []
    assert os.listdir(tmp_path / "data/work") == []
    site.push()
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    assert [process for process in psutil.process_iter() if marked(process, tmp_path)] == []


@pytest.fixture
def copied(outside, tmp_path):
    """Return a function that starts a daemon from a file of its own, and returns that file, too."""
    path = tmp_path / "scrapy_do.py"

    def start(*options):
        shutil.copy(MODULE, path)
        return outside(*options, command=(sys.executable, "scrapy_do.py")), path

    return start


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda source: source + "\nbreak\n", "cannot be started: SyntaxError: 'break' outside loop; mend it"),
        (lambda source: "print('x')", "cannot be started: it does not say its version; mend it"),
        (lambda source: source.replace('"--kill-after"', '"--kill"'), "unrecognized arguments: --kill-after 2"),
        (lambda source: "while True: pass", ""),  # what comes of it is known when the next signal comes
    ],
    ids=["syntax", "another", "option", "endless"],
)
def test_a_program_that_cannot_be_started_changes_nothing(copied, tmp_path, fault, said):
    site, path = copied("--kill-after", "2")
    site.push(hold=HOLD)
    job = site.schedule("hold")
    crawl = crawl_of(site, tmp_path, job)
    path.write_text(fault(MODULE.read_text()))
    site.process.send_signal(signal.SIGHUP)
    if said:
        wait_for(lambda: "not reloaded, all goes on as before" in site.log_path.read_text())
    assert said in site.log_path.read_text()
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    path.write_text(MODULE.read_text().replace('__version__ = "', '__version__ = "new-'))
    site.reload()
    assert site.get("status")["daemon-version"] == f"new-{scrapy_do.__version__}"
    assert crawl.ppid() == site.process.pid
    release(tmp_path)
    assert site.wait_job(job)["status"] == "SUCCESSFUL"


def test_a_timeout_that_is_over_just_after_a_cancel_kills_nothing(inside, tmp_path):
    site = inside(kill_after=60)
    site.push(slow="trap 'echo asked' TERM; echo started; while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done")
    job = site.schedule("slow", timeout="600")
    crawl_of(site, tmp_path, job)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(site.try_post, "cancel-job", id=job)
        wait_for(lambda: "asked" in site.log(job, "out"))
        site.daemon._on_deadline(job)  # as the timer does that has looked before the cancel
        release(tmp_path)
        assert asked.result(30)[0] == 200
    assert (site.job(job)["status"], site.job(job)["exit_code"]) == ("CANCELED", 0)


def test_a_reload_that_would_take_long_is_given_up(inside, tmp_path, monkeypatch):
    site = inside(kill_after=60)
    loop = "echo started; while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done"
    site.push(slow=f"trap 'echo asked' TERM; {loop}", hold=HOLD)
    slow, hold = site.schedule("slow"), site.schedule("hold")
    crawl = crawl_of(site, tmp_path, hold)
    crawl_of(site, tmp_path, slow)
    monkeypatch.setattr(scrapy_do, "FREEZE_SECONDS", 0.1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(site.try_post, "cancel-job", id=slow)
        wait_for(lambda: "asked" in site.log(slow, "out"))
        with pytest.raises(scrapy_do.Unavailable, match="takes long"):
            site.daemon.freeze()
        assert crawl.is_running()
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
        release(tmp_path)
        assert asked.result(30)[0] == 200
    assert site.wait_job(hold)["status"] == "SUCCESSFUL"
    assert site.log(slow, "out") == "started\nasked\n"


def test_nothing_is_reaped_or_ended_while_the_daemon_is_frozen(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 0.1)
    site = inside(kill_after=0.2)
    site.push(hold=HOLD, stubborn=STUBBORN)
    jobs = {"hold": site.schedule("hold"), "stubborn": site.schedule("stubborn", timeout="0.5")}
    crawls = {spider: crawl_of(site, tmp_path, job) for spider, job in jobs.items()}
    site.daemon.freeze()
    release(tmp_path)
    wait_for(lambda: crawls["hold"].status() == psutil.STATUS_ZOMBIE)
    moment = time.monotonic() + 1.5
    wait_for(lambda: time.monotonic() > moment)
    assert crawls["stubborn"].status() != psutil.STATUS_ZOMBIE
    waiting = site.schedule()
    assert site.daemon._commit(site.daemon._take_next, is_fact=True) is None  # a slot that comes late
    assert site.try_post("cancel-job", id=jobs["stubborn"])[0] == 503
    assert sorted(job["spider"] for job in site.jobs("RUNNING")) == ["hold", "stubborn"]
    site.daemon._thaw()
    assert site.wait_job(waiting)["status"] == site.wait_job(jobs["hold"])["status"] == "SUCCESSFUL"
    assert "timeout" in site.wait_job(jobs["stubborn"])["reason"]


def test_a_freeze_waits_until_the_number_of_a_crawl_that_starts_is_on_the_disk(inside, tmp_path, monkeypatch):
    site, real, go = inside(), scrapy_do.copy_tree, threading.Event()
    site.push(hold=HOLD)
    monkeypatch.setattr(scrapy_do, "copy_tree", lambda *paths: (go.wait(), real(*paths)))
    job = site.schedule("hold")
    site.wait_job(job, "RUNNING")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        frozen = pool.submit(site.daemon.freeze)
        wait_for(lambda: site.daemon._is_frozen)
        faults = ParkingFaults(monkeypatch)
        faults.park("fsync", 0)
        go.set()
        wait_for(lambda: faults.parked.is_set() and job in site.daemon._resting)
        assert not frozen.done()
        faults.release()
        frozen.result(30)
    assert state(tmp_path)["jobs"][job]["pid"] == site.daemon._crawls[job].pid
    release(tmp_path)
    site.daemon._thaw()
    assert site.wait_job(job)["status"] == "SUCCESSFUL"


def test_no_reload_while_the_disk_is_full(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 0.1)
    site = inside()
    site.push(hold=HOLD)
    job = site.schedule("hold")
    crawl_of(site, tmp_path, job)
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        faults.error, faults.step = errno.ENOSPC, "write"
        release(tmp_path)
        assert site.wait_job(job)["status"] == "SUCCESSFUL"
        with pytest.raises(scrapy_do.Unavailable, match="cannot be written"):
            site.daemon.freeze()
    wait_for(lambda: state(tmp_path)["jobs"][job]["status"] == "SUCCESSFUL")
    site.daemon.freeze()


@pytest.mark.parametrize("order", ["abc", "bca"])
def test_more_crawls_than_slots_after_a_reload_all_come_to_their_end(outside, tmp_path, order):
    (tmp_path / "options").write_text("--job-slots\n3\n")
    site = outside("@options")
    until = "echo started; while [ ! -e $SPIDER_DATA_DIR/{0} ]; do sleep 0.02; done; echo > $SPIDER_DATA_DIR/{0}-ended"
    site.push(**{name: until.format(name) for name in "abc"}, last="cd $SPIDER_DATA_DIR; test -e a-ended -a -e b-ended -a -e c-ended")
    jobs = {name: site.schedule(name) for name in "abc"}
    for job in jobs.values():
        crawl_of(site, tmp_path, job)
    last = site.schedule("last")
    (tmp_path / "options").write_text("--job-slots\n1\n")
    site.reload()
    for name in order:
        assert site.job(last)["status"] == "PENDING"
        (tmp_path / "data/spider-data" / name).touch()
        assert site.wait_job(jobs[name])["status"] == "SUCCESSFUL"
    assert site.wait_job(last)["status"] == "SUCCESSFUL"


def test_a_reload_lets_nobody_in_without_a_password(outside, tmp_path):
    (tmp_path / "users").write_text("ala:kot")
    (tmp_path / "users").chmod(0o600)
    (tmp_path / "options").write_text(f"--host\n0.0.0.0\n--auth-file\n{tmp_path}/users\n")
    site = outside("@options")
    assert site.call("GET", "/status.json")[0] == 401
    (tmp_path / "options").write_text("--host\n0.0.0.0\n")
    site.process.send_signal(signal.SIGHUP)
    assert site.process.wait(30) == 1
    assert "name the users who may by --auth-file" in site.log_path.read_text()


NO_EXEC = """
import os, runpy, sys
def refuse(*args):
    raise OSError(12, os.strerror(12))
os.execv = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_program_that_cannot_be_executed_is_like_a_crash(outside, tmp_path):
    site = outside("--kill-after", "0.3", command=(sys.executable, "-c", NO_EXEC, str(MODULE)))
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn")
    crawl = crawl_of(site, tmp_path, job)
    site.process.send_signal(signal.SIGHUP)
    assert site.process.wait(30) == 1
    assert "cannot be executed: [Errno 12]" in site.log_path.read_text()
    assert "Traceback" not in site.log_path.read_text()
    site.start()
    assert is_gone(crawl.pid)
    assert f"job {job} is PENDING again" in site.log_path.read_text()


def test_a_crash_after_a_reload_is_like_any_other(outside, tmp_path):
    site = outside()
    site.push(hold="echo $$ >> $SPIDER_DATA_DIR/pids; " + HOLD)
    job, schedule = site.schedule("hold"), site.schedule(when="every 2 hours")
    crawl, due = crawl_of(site, tmp_path, job), site.job(schedule)["next_run"]
    site.reload()
    assert site.job(schedule)["next_run"] == due
    site.kill()
    assert not is_gone(crawl.pid)
    site.start()
    assert is_gone(crawl.pid)
    assert f"job {job} is PENDING again" in site.log_path.read_text()
    release(tmp_path)
    assert site.wait_job(job)["status"] == "SUCCESSFUL"
    assert len((tmp_path / "data/spider-data/pids").read_text().split()) == 2


def test_a_stop_at_any_moment_of_a_reload_ends_it_well(outside, tmp_path):
    """By hand for longer: STOP_ROUNDS=100 python -m pytest -k moment_of_a_reload."""
    site = outside("--job-slots", "1", "--kill-after", "0.2")
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn")
    for number in range(int(os.environ.get("STOP_ROUNDS", "12"))):
        crawl = crawl_of(site, tmp_path, job)
        site.process.send_signal(signal.SIGHUP)
        moment = time.monotonic() + number % 12 * 0.05
        wait_for(lambda moment=moment: time.monotonic() >= moment)
        assert site.stop() == 0
        assert is_gone(crawl.pid)
        assert state(tmp_path)["jobs"][job]["status"] == "PENDING"
        site.start()
    assert "Traceback" not in site.log_path.read_text()


def test_a_child_of_the_process_is_no_crawl_without_a_reload(outside, inside, tmp_path):
    """A number may have been given again, in a container soon, to what its first command has started."""
    site = outside()
    site.push(hold=HOLD)
    job = site.schedule("hold")
    crawl_of(site, tmp_path, job)
    site.stop()
    with subprocess.Popen(["sleep", "60"]) as child:
        change_state(tmp_path, lambda document: document["jobs"][job].update(status="RUNNING", pid=child.pid))
        again = inside()
        wait_for(lambda: state(tmp_path)["jobs"][job].get("pid") not in (None, child.pid))
        release(tmp_path)
        assert again.wait_job(job)["status"] == "SUCCESSFUL"
        assert child.poll() is None
        child.kill()


def test_a_process_with_a_strange_environment_is_no_obstacle_to_a_start(outside, tmp_path):
    environment = {b"SCRAPY_JOB": b"\xff", b"SPIDER_DATA_DIR": bytes(tmp_path / "others"), b"PATH": os.environb[b"PATH"]}
    with subprocess.Popen(["sleep", "60"], env=environment) as stranger:
        site = outside()
        site.push()
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
        site.reload()
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
        assert stranger.poll() is None
        stranger.kill()


def test_a_stop_that_comes_late_in_a_reload_is_for_the_next_program(outside, tmp_path):
    (tmp_path / "note").write_text("#!/bin/sh\ntouch noting\nuntil [ -e noted ]; do sleep 0.02; done\n")
    (tmp_path / "note").chmod(0o755)
    site = outside("--on-finish", f"{tmp_path}/note", "--kill-after", "0.2")
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn")
    crawl = crawl_of(site, tmp_path, job)
    site.wait_job(site.schedule())
    wait_for((tmp_path / "noting").exists)
    listens_again = site.hang_up()
    wait_for(lambda: "reloading" in site.log_path.read_text())
    site.process.terminate()
    (tmp_path / "noted").touch()
    listens_again()
    assert site.process.wait(15) == 0
    assert is_gone(crawl.pid)
    assert state(tmp_path)["jobs"][job]["status"] == "PENDING"


@contextlib.contextmanager
def request_across_a_reload(site):
    """Send SIGHUP while a request has half arrived, and yield its connection and the rest when all others are closed."""
    body = json.dumps({"project": "shop", "spider": "quick", "when": "every 2 hours"}).encode()
    with contextlib.ExitStack() as stack:
        half, idle = (stack.enter_context(socket.create_connection(("127.0.0.1", site.port), timeout=30)) for _ in range(2))
        half.sendall(post_of("/schedule-job.json", body, JSON)[: -len(body) // 2])
        idle.sendall(head_of())
        assert idle.recv(100_000).startswith(b"HTTP/1.1 200 ")
        site.process.send_signal(signal.SIGHUP)
        while idle.recv(100_000):
            pass
        yield half, body[-len(body) // 2 :]


def test_a_request_that_arrives_during_a_reload_is_answered_before_it(outside):
    site = outside()
    site.push()
    began = site.log_bytes()
    with request_across_a_reload(site) as (line, rest):
        line.sendall(rest)
        answer = line.recv(100_000)
    assert answer.startswith(b"HTTP/1.1 200 ")
    site.wait_until_it_listens(began)
    assert [job["identifier"].encode() in answer for job in site.jobs("SCHEDULED")] == [True]


def test_a_stop_while_a_reload_waits_for_a_request_comes_first(outside, tmp_path):
    site = outside("--kill-after", "0.3")
    site.push(hold=HOLD)
    job = site.schedule("hold")
    crawl = crawl_of(site, tmp_path, job)
    with request_across_a_reload(site):
        assert site.stop() == 0
    assert is_gone(crawl.pid)
    assert state(tmp_path)["jobs"][job]["status"] == "PENDING"


def test_jobs_run_once_each_while_it_is_reloaded_again_and_again(outside, tmp_path):
    """By hand for longer: RELOADS=200 python -m pytest -k reloaded_again."""
    site = outside("--job-slots", "3", "--completed-cap", "100000")
    note = "echo $SCRAPY_JOB >> $SPIDER_DATA_DIR/runs; "
    site.push(quick=f"{note} exit 3", brief=f"{note} sleep 0.0$(($$ % 10)); exit 4", long=f"{note} sleep 0.5; exit 5")
    stop, sure = threading.Event(), {}

    def ask(client):
        draw = random.Random(client)
        while not stop.is_set():
            spider = draw.choice(["quick", "quick", "brief", "brief", "brief", "long"])
            with contextlib.suppress(OSError, http.client.HTTPException):  # its connection was closed by a reload
                job = site.schedule(spider)
                sure[job] = spider
                if draw.random() < 0.5:  # or there would be ever more
                    site.wait_job(job)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, client) for client in range(3)]
        site.schedule("quick", when="every second")
        try:
            for number in range(int(os.environ.get("RELOADS", "15"))):
                enough = len(sure) + random.Random(number).randrange(1, 12)
                wait_for(lambda enough=enough: len(sure) >= enough)
                listens_again = site.hang_up()
                for _ in range(number % 3):
                    site.process.send_signal(signal.SIGHUP)
                listens_again()
        finally:
            stop.set()
        for future in asked:
            future.result(30)
    for job in site.jobs("SCHEDULED"):
        site.post("cancel-job", id=job["identifier"])
    wait_for(lambda: not site.jobs("PENDING") and not site.jobs("RUNNING"))
    ended = {job["identifier"]: job for job in site.jobs("COMPLETED") if job["status"] != "CANCELED"}
    runs = (tmp_path / "data/spider-data/runs").read_text().split()
    assert sorted(runs) == sorted(ended)
    assert sure.keys() <= ended.keys()
    codes = {"quick": 3, "brief": 4, "long": 5}
    assert [job for job in ended.values() if (job["status"], job["exit_code"]) != ("FAILED", codes[job["spider"]])] == []
    assert site.stop() == 0
    assert "Traceback" not in site.log_path.read_text()


def test_a_crawl_inherits_no_signal_that_a_reload_has_held_back(outside):
    site = outside()
    site.push(show="grep -E 'Sig(Blk|Ign)' /proc/self/status; env | grep -c SCRAPY_DO; ls -l /proc/self/fd | grep -c socket:")
    first = site.log(site.wait_job(site.schedule("show"))["identifier"], "out")
    site.reload()
    assert site.log(site.wait_job(site.schedule("show"))["identifier"], "out") == first
    blocked, ignored = (int(line.split()[1], 16) for line in first.splitlines()[:2])
    assert blocked == 0
    assert ignored & sum(1 << number - 1 for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)) == 0
    assert first.splitlines()[2:] == ["0", "0"]  # of the daemon's own variables, and of its sockets


def test_a_hang_up_that_nohup_has_ignored_stays_so(outside, tmp_path):
    site = outside(command=("nohup", sys.executable, str(MODULE)))
    status = pathlib.Path(f"/proc/{site.process.pid}/status").read_text()
    assert int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) & 1 << signal.SIGHUP - 1
    assert site.stop() == 0



def test_nothing_is_lost_or_doubled_by_kill_9(outside, tmp_path):
    """Kill the daemon under load, again and again; after each start what it has acknowledged must be there, and no more.

    By hand for longer: KILL_ROUNDS=1000 python -m pytest -k kill_9
    """
    site = outside("--completed-cap", "60", "--job-slots", "3")
    site.push(hold="exec sleep 60", brief="sleep 0.05")
    load = Load(site)
    for number in range(int(os.environ.get("KILL_ROUNDS", "50"))):
        stop = threading.Event()
        threads = [threading.Thread(target=load.work, args=(stop, client, number)) for client in range(3)]
        for thread in threads:
            thread.start()
        enough = len(load.sure) + random.Random(number).randrange(1, 12)
        wait_for(lambda enough=enough: len(load.sure) >= enough)
        site.kill()
        stop.set()
        for thread in threads:
            thread.join()
        site.start()
        load.check(tmp_path / "data")
    for job in [job for job in site.jobs("PENDING") + site.jobs("RUNNING") if job["spider"] == "hold"]:
        try_cancel(site, job["identifier"])
    wait_for(lambda: not site.jobs("PENDING") and not site.jobs("RUNNING"))
    load.check(tmp_path / "data")
    assert [process for process in psutil.process_iter() if marked(process, tmp_path)] == []
    wait_for(lambda: len(list((tmp_path / "data/work").iterdir())) <= len(site.get("list-projects")["projects"]))
    assert site.stop() == 0


class Load:
    """Clients of a daemon that may be killed at any moment, and what they know of it."""

    def __init__(self, site):
        self.site, self.lock = site, threading.Lock()
        self.sure, self.maybe, self.refused = {}, set(), set()  # jobs: those acknowledged by identifier, else by description
        self.asked, self.canceled, self.ended = set(), set(), set()
        self.projects = {}  # whether one is there; None is unknown, since there was no answer

    def work(self, stop, client, number):
        """Make random calls until the daemon is gone."""
        draw = random.Random(f"{client} {number}")
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # it was killed
            while not stop.is_set():
                draw.choice([self.schedule, self.schedule, self.schedule, self.change_project, self.read])(draw, f"p{client}")

    def schedule(self, draw, name):
        when, spider = draw.choice([("now", "brief"), ("every 2 hours", "quick"), ("now", "hold"), ("now", "nobody")])
        text = f"{name} {draw.random()}"
        (self.refused if spider == "nobody" else self.maybe).add(text)
        status, answer = self.site.try_post("schedule-job", project="shop", spider=spider, when=when, description=text)
        assert status == (404 if spider == "nobody" else 200)
        if status == 200:
            self.sure[answer["identifier"]] = when
            if spider == "hold" or draw.random() < 0.5:
                self.asked.add(answer["identifier"])
                if self.site.try_post("cancel-job", id=answer["identifier"])[0] == 200:
                    self.canceled.add(answer["identifier"])

    def change_project(self, draw, name):
        is_push, self.projects[name] = draw.random() < 0.6, None
        if is_push:
            status, _ = self.site.try_push(stub_project(name))
        else:
            status, _ = self.site.try_post("remove-project", name=name)
        assert status == 200 or (status == 404 and not is_push)
        self.projects[name] = is_push

    def read(self, draw, name):
        self.ended |= {job["identifier"] for job in self.site.jobs("SUCCESSFUL")}

    def check(self, data):
        """Compare what a daemon that has just started says, and has on the disk, with what the clients know."""
        site, kept = self.site, fold(json.loads((data / "state.json").read_text()))
        jobs = {job["identifier"]: job for group in ("ACTIVE", "COMPLETED") for job in site.jobs(group)}
        completed = len(site.jobs("COMPLETED"))
        gone = self.sure.keys() - jobs.keys()
        assert not gone or completed == 60
        assert [job for job in gone if self.sure[job] != "now" and job not in self.asked] == []
        assert {job["description"] for job in jobs.values()} <= self.maybe - self.refused
        assert {jobs[job]["status"] for job in self.canceled & jobs.keys()} <= {"CANCELED"}
        assert {jobs[job]["status"] for job in self.ended & jobs.keys()} <= {"SUCCESSFUL"}
        assert kept["jobs"].keys() >= {job for job, view in jobs.items() if view["status"] == "SCHEDULED"}
        listed = site.get("list-projects")["projects"]
        assert {name: name in listed for name, there in self.projects.items() if there is not None} == {
            name: there for name, there in self.projects.items() if there is not None
        }
        crawls = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if marked(process, data.parent) and process.name() == "sleep":
                    crawls.append(process.environ()["SCRAPY_JOB"])
        assert len(crawls) == len(set(crawls)) <= 3
        archives = {path.name for path in (data / "projects").iterdir()}
        assert archives == {f"{name}.zip" for name in listed}
        logs = {path.stem for path in (data / "logs").iterdir()}
        assert logs <= {job["identifier"] for group in ("ACTIVE", "COMPLETED") for job in site.jobs(group)} | jobs.keys()
        assert len(list((data / "work").iterdir())) <= len(listed) + 3 + 3  # a crawl that starts may unpack its project


def marked(process, folder):
    """Tell whether a process was started by the daemon of a folder."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("SPIDER_DATA_DIR") == str(folder / "data/spider-data") and process.pid != os.getpid()
    return False


def test_concurrent_changes_share_writes(site, monkeypatch):
    site.push()
    writes = itertools.count()
    real = site.store.write
    monkeypatch.setattr(site.store, "write", lambda *change: (next(writes), real(*change))[1])
    in_parallel(*[lambda: [site.schedule(when="every 3 hours") for _ in range(10)]] * 16)
    assert next(writes) < 120
    assert len(site.jobs("SCHEDULED")) == 160


def test_a_burst_of_due_schedules_holds_no_request_up(inside, monkeypatch):
    clock = FakeClock()
    site = inside(clock, job_slots=1)
    site.push()
    schedules = [site.daemon.schedule("shop", "quick", "every 10 minutes")["identifier"] for _ in range(600)]
    sizes, before, go = [], [], threading.Event()
    real = site.store.write

    def write(records, changed):
        sizes.append(len(changed))
        if any(getattr(record, "schedule", "") == "every 3 hours" for record in changed.values()):
            before.append(sum(sizes))
        go.wait(30)
        real(records, changed)

    monkeypatch.setattr(site.store, "write", write)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        clock.advance(600)
        wait_for(lambda: sizes and len(site.daemon._firings) > 500)
        asked = pool.submit(site.schedule, when="every 3 hours")
        wait_for(lambda: any(not change.is_fact for change in site.daemon._changes))
        go.set()
        job = asked.result(30)
        assert before[0] < 600  # it did not wait for the 1,200 records of the others
    assert all(size <= 2 * (scrapy_do.FIRINGS_COUNT + 8) for size in sizes)
    wait_for(lambda: site.get("status")["jobs-pending"] + site.get("status")["jobs-run"] >= 600)
    assert {state_due(site, schedule) for schedule in schedules} == {clock.now + 600}
    site.post("cancel-job", id=job)


def test_a_daemon_that_was_asleep_runs_once_and_goes_on_with_the_grid(outside, tmp_path):
    site = outside("--completed-cap", "100")
    site.push()
    job = site.schedule(when="every second")
    first = state(tmp_path)["jobs"][job]["due"]
    site.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: time.time() > first + 3.2)
    site.process.send_signal(signal.SIGCONT)
    wait_for(lambda: len(site.jobs("SUCCESSFUL")) >= 2)
    site.post("cancel-job", id=job)
    runs = [run["origin"] - first for run in state(tmp_path)["jobs"].values() if run["actor"] == "SCHEDULER"]
    assert min(runs) > 3.1
    grid = [int(run) for run in runs]
    assert len(set(grid)) == len(grid), runs  # however late the machine is, one run for each second that has begun


def test_every_two_weeks_are_two_weeks_for_a_daemon_that_is_started_daily(tmp_path, stub):
    began, job = 1_700_000_000.25, ""
    for day in range(30):
        site = Inside(tmp_path, stub, FakeClock(began + day * 86400))
        with contextlib.closing(site):
            if day == 0:
                site.push()
                job = site.schedule(when="every 2 weeks")
            runs = day // 14
            wait_for(lambda site=site, runs=runs: len(site.jobs("SUCCESSFUL")) == runs)
            assert state_due(site, job) == began + 14 * 86400 * (runs + 1)


@pytest.mark.parametrize(("name", "offset"), [("Asia/Kathmandu", "+05:45"), ("Australia/Lord_Howe", None)])
def test_the_zone_of_the_process_is_named_and_every_time_is_in_it(outside, name, offset):
    site = outside(environment={"TZ": name})
    site.push()
    place = zoneinfo.ZoneInfo(name)
    before = datetime.datetime.now(place).replace(tzinfo=None)
    job = site.job(site.schedule(when="every day at 10:30"))
    status = site.get("status")
    after = datetime.datetime.now(place).replace(tzinfo=None)
    for shown in (job["timestamp"], status["time"]):
        assert before <= datetime.datetime.fromisoformat(shown) <= after
    assert datetime.datetime.fromisoformat(job["next_run"]).time() == datetime.time(10, 30)
    zone_now = datetime.datetime.now(place)
    assert zone_now.tzname() in status["timezone"].split("; ")
    assert offset is None or zone_now.isoformat().endswith(offset)


def test_status_counts_and_describes(site, tmp_path):
    site.push(hold=HOLD, bad="exit 1")
    first = site.get("status")
    assert list(first) == [
        "status", "memory-usage", "cpu-usage", "time", "timezone", "hostname", "uptime", "jobs-run", "jobs-successful",
        "jobs-failed", "jobs-canceled", "runs-skipped", "jobs-scheduled", "jobs-pending", "jobs-running", "projects",
        "spiders", "daemon-version",
    ]  # fmt: skip
    assert isinstance(first["memory-usage"], float)
    assert isinstance(first["cpu-usage"], float)
    assert (first["projects"], first["spiders"]) == (1, 3)
    assert first["timezone"] == "; ".join(time.tzname)
    for spider in ("quick", "bad"):
        site.wait_job(site.schedule(spider))
    site.wait_job(site.schedule("hold"), "RUNNING")
    site.schedule(when="every day")
    status = site.get("status")
    assert [status[f"jobs-{key}"] for key in ("run", "successful", "failed", "canceled", "scheduled", "running")] == [
        3, 1, 1, 0, 1, 1,
    ]  # fmt: skip

    def cpu():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return site.get("status")["cpu-usage"]

    wait_for(lambda: 20 < cpu() < 500)  # this thread has been busy since the last call
    release(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m"), (86400 + 12 * 60 + 24, "1d 12m 24s"), (3600 * 25 + 1.9, "1d 1h 1s")],
)
def test_a_time_span_leaves_zeros_out(seconds, text):
    assert scrapy_do.describe_seconds(seconds) == text


# ---- 7. Daemon: any interleaving of calls and faults -----------------------------------------------------------------
#
# By hand for longer: STATEFUL_EXAMPLES=2000 python -m pytest -k interleaving


class EagerClock(FakeClock):
    """A fake clock on which a short wait, such as for a crawl that ignores SIGTERM, passes by itself."""

    def __init__(self):
        super().__init__()
        self.mover = threading.Lock()

    def wait(self, condition, seconds):
        if seconds is None or seconds > 1:
            return super().wait(condition, seconds)
        self.now += seconds
        self.ticks += seconds
        return None

    def advance(self, seconds, step=0.0):
        with self.mover:
            super().advance(seconds, step)


class ParkingFaults(Faults):
    """Faults that can hold the writer up at their step: a disk that is slow, or a moment for a crash."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.parked, self.go = threading.Event(), threading.Event()
        self.go.set()

    def park(self, step, error):
        """Hold the writer up when it comes to a step; with an error it fails there later."""
        self.parked.clear()
        self.go.clear()
        self.step, self.error = step, error

    def release(self):
        """Let the writer go on; the disk is good again."""
        self.step = ""
        self.go.set()

    def fail(self, *steps):
        if self.step in steps and not self.go.is_set():
            self.parked.set()
            self.go.wait()
        if self.error:
            super().fail(*steps)

    def write(self, write, data):
        taken = super().write(write, data)
        self.fail("short")
        return taken


class FakeCrawls:
    """Starts crawls that have no process and end when a test says so; notes what must never be."""

    def __init__(self, slots):
        self.slots, self.lock, self.error = slots, threading.Lock(), 0
        self.live, self.started, self.odd = {}, [], []

    def __call__(self, command, folder, environment, out, err):
        job, is_list = environment["SCRAPY_JOB"], command[-1] == "list"
        with self.lock:
            if not is_list:
                self.started.append(job)
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            out.write_text((folder / "spiders.txt").read_text() if is_list else "x")
            err.touch()
            crawl = FakeCrawl(self, job, folder, is_stubborn=environment["SCRAPY_SPIDER"] == "b")
            if is_list:
                crawl.end(0)
                return crawl
            if job in self.live:
                self.odd.append(f"two live crawls of {job}")
            self.live[job] = crawl
            if len(self.live) > self.slots:
                self.odd.append(f"{len(self.live)} crawls at once")
        return crawl


class FakeCrawl:
    """What the daemon sees of a crawl."""

    pid = 2**30  # no process has that number

    def __init__(self, crawls, job, folder, is_stubborn):
        self.crawls, self.job, self.folder, self.is_stubborn = crawls, job, folder, is_stubborn
        self.is_over, self.ended_for = False, ""
        self.code, self.ended = None, threading.Event()

    def created(self):
        return 1.0

    def end(self, code):
        """End, unless it has ended."""
        if not self.ended.is_set():
            self.code = code
            self.ended.set()

    def signal(self, number):
        if number == signal.SIGKILL or not self.is_stubborn:
            self.end(-number)

    def wait(self):
        self.ended.wait()
        self.is_over = True

    def reap(self):
        with self.crawls.lock:
            self.crawls.live.pop(self.job, None)
        return self.code


FLOW = {  # from each status, those that may be seen later
    "SCHEDULED": {"SCHEDULED", "CANCELED", "FAILED"},
    "PENDING": {"PENDING", "RUNNING", "SUCCESSFUL", "FAILED", "CANCELED"},
    "RUNNING": {"RUNNING", "SUCCESSFUL", "FAILED", "CANCELED"},
    **{status: {status} for status in ("SUCCESSFUL", "FAILED", "CANCELED")},
}
ENDED = ("SUCCESSFUL", "FAILED", "CANCELED")
FIXED = ("actor", "schedule", "project", "spider", "description", "payload", "args", "settings", "timeout")
SHOPS = st.sampled_from(["shop", "other"])
NUMBERS = st.integers(0, 9)
WHEN = st.sampled_from(["now", "now", "now", "every 10 minutes", "every 1 to 2 hours", "every day at 10:30"])
CALLS = st.sampled_from(["schedule"] * 4 + ["end"] * 3 + ["cancel"] * 2 + ["push", "remove", "advance", "read"]).flatmap(
    lambda kind: st.tuples(st.just(kind), *{
        "schedule": (NUMBERS, WHEN), "cancel": (NUMBERS,), "end": (NUMBERS, st.sampled_from([0, 0, 1, -9])),
        "push": (SHOPS, st.sampled_from(["a", "ab", "ab", ""])), "remove": (SHOPS,), "read": (),
        "advance": (st.sampled_from([60, 600, 7200]), st.sampled_from([0, 0, -3600])),
    }[kind])
)  # fmt: skip
SLOTS, CAP = 2, 4
UNKNOWN = str(uuid.UUID(int=0))


class Interleavings(hypothesis.stateful.RuleBasedStateMachine):
    """Call a daemon in any order, several calls at once, under any fault, and compare it with what it acknowledged."""

    failures: typing.ClassVar = []  # hypothesis would only say that a failure did not come again

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(scrapy_do, "RETRY_SECONDS", 0.1)
        self.faults, self.start_error = ParkingFaults(self.patch), 0
        self.home, self.numbers = pathlib.Path(tempfile.mkdtemp()), itertools.count()
        self.clock, self.lock = EagerClock(), threading.Lock()
        self.projects = {}  # a name and its spiders, as acknowledged
        self.may_be = {}  # of a project that several calls changed at once, or one without an answer: what it may be
        self.made = {}  # acknowledged jobs by description, which is another one for each
        self.may_be_made = set()  # the descriptions of jobs that a crash has left without an answer
        self.canceled, self.may_be_canceled, self.gone = set(), set(), set()
        self.codes = {}  # exit codes of jobs that have just ended by themselves
        self.views = {}  # the jobs when all was quiet last,
        self.saved = {}  # and when all was quiet last and the disk good
        self.touched = set()  # jobs that may have ended since
        self.interrupted = set()  # jobs that a former daemon started: they wait again, beside a later run
        self.steps = []  # for the message of a failure, since threads cannot be made to repeat it
        self.open(self.home / "data")
        for call in (("push", "shop", "ab"), ("schedule", 0, "now"), ("schedule", 1, "every 10 minutes")):
            self.call_all([call])
            self.all_is_well()

    def open(self, folder):
        """Start a daemon on a folder, which must have what was acknowledged."""
        self.steps.append(f"start on {folder}, the disk fails at {self.faults.step!r}")
        folder.mkdir(exist_ok=True)
        self.folder, self.crawls = folder, FakeCrawls(SLOTS)
        loaded, _ = self.read_state()
        self.gone -= loaded.keys()  # those that were purged when the disk did not take it
        self.check_gone(self.saved, loaded)
        ended = {job: view for job, view in self.saved.items() if view["status"] in ENDED and job in loaded}
        assert {job: loaded[job] for job in ended} == ended, "a job that had ended has not"
        self.seen = {job: view["status"].replace("RUNNING", "PENDING") for job, view in loaded.items()}
        self.views = loaded
        self.store = scrapy_do.Store(folder)
        settings = scrapy_do.Settings(job_slots=SLOTS, completed_cap=CAP, kill_after=1.0)
        self.daemon = scrapy_do.Daemon(self.store, settings, self.clock, self.crawls)
        self.daemon.start()

    def close(self):
        """Stop the daemon."""
        self.daemon.close()
        self.store.close()
        self.touched |= set(self.crawls.started)
        self.interrupted |= set(self.crawls.started)
        assert self.crawls.live == {}

    def teardown(self):
        if isinstance(error := sys.exc_info()[1], Exception):
            self.failures.append(f"{error!r} after {self.steps}")
        try:
            self.faults.step = ""
            with contextlib.suppress(OSError):  # it is closed already if a rule has failed
                self.close()
        finally:
            self.patch.undo()
            shutil.rmtree(self.home)

    def read_state(self):
        """Return the jobs and the projects that the state file has."""
        path = self.folder / "state.json"
        document = fold(scrapy_do.parse_state(path.read_bytes())) if path.exists() else {"jobs": {}, "projects": {}}
        jobs = {key: scrapy_do.decode_job(key, fields).view() for key, fields in document["jobs"].items()}
        return jobs, document["projects"]

    def reach(self, step):
        """See to it that the next write comes to a step that there is only when the file is written anew."""

        def is_certain():
            os.utime(self.folder / "state.json", (moment := next(self.numbers), moment))  # as if somebody had been at it
            under_way = self.daemon._submit(lambda draft: None, True, self.daemon._changes)
            wait_for(lambda: under_way.done.is_set() or self.faults.parked.is_set())
            found = os.stat(self.folder / "state.json").st_mtime_ns
            return self.faults.parked.is_set() or self.store.is_behind or (found,) != self.store._left[3:]

        if step in ("rename", "folder-fsync"):
            wait_for(is_certain)

    # What the calls are, and what their answers must be

    def name_things(self, kind, *args):
        """Put a thing in the place of the number of a call, mostly one for which the call makes sense."""

        def pick(things, wrong):
            return things[args[0] % len(things)] if things and args[0] < 9 else wrong

        if kind == "cancel":
            active = [job for job, view in self.views.items() if view["status"] not in ENDED]
            return kind, pick(active or list(self.views), ([*self.gone, *self.views.keys() - active] or [UNKNOWN])[0])
        if kind == "end":
            return kind, pick(sorted(self.crawls.live), ""), args[1]
        if kind == "schedule":
            pairs = [(name, spider) for name, spiders in self.projects.items() for spider in spiders]
            return kind, *pick(pairs, ("shop", "c")), args[1], f"#{next(self.numbers)}"
        return kind, *args

    def prepare(self, kind, *args):
        """Return a function that makes a call and returns what comes of it: a result or a ScrapyDoError."""
        upload = self.daemon.new_upload_path()
        if kind == "push":
            name, spiders = args
            config = f"[deploy]\nproject={name}\n"
            upload.write_bytes(make_zip({"scrapy.cfg": config, "spiders.txt": "\n".join(spiders)}))
            call = functools.partial(self.daemon.push, upload)
        elif kind == "end":
            call = functools.partial(self.crawls.live[args[0]].end, args[1]) if args[0] else lambda: None
        elif kind == "read":
            call = self.look
        else:
            call = functools.partial(self.clock.advance if kind == "advance" else getattr(self.daemon, kind), *args)

        def run():
            try:
                return call()
            except scrapy_do.ScrapyDoError as error:
                return error
            finally:
                upload.unlink(missing_ok=True)

        return run

    def expected(self, kind, *args):
        """Return the error that a call alone must meet, or None."""
        bad_disk = scrapy_do.StorageError if self.faults.step else None
        active = [v for v in self.views.values() if v["status"] not in ENDED and [v["project"]] == list(args[:1])]
        if kind == "push":
            if self.start_error:
                return scrapy_do.BadRequest if self.start_error in (errno.ENOENT, errno.E2BIG) else scrapy_do.StorageError
            if not args[1]:
                return scrapy_do.BadRequest
            return scrapy_do.Conflict if {view["spider"] for view in active} - set(args[1]) else bad_disk
        if kind == "remove":
            return scrapy_do.NotFound if args[0] not in self.projects else scrapy_do.Conflict if active else bad_disk
        if kind == "schedule":
            return bad_disk if args[1] in self.projects.get(args[0], "") else scrapy_do.NotFound
        if kind == "cancel":
            view = self.views.get(args[0])
            return scrapy_do.NotFound if not view else scrapy_do.Conflict if view["status"] in ENDED else bad_disk
        return None

    def call_all(self, calls, during=None):
        """Make calls at once, and `during`, which returns which answers there are after it.

        Return of each call what it was, what came of it, and the error that it would have met alone.
        """
        calls = [self.name_things(*call) for call in calls]
        wanted = [self.expected(*call) for call in calls]
        outcomes, is_answered = [None] * len(calls), [False] * len(calls)
        may_refuse = self.faults.step or self.start_error

        def make(number, run):
            outcomes[number] = run()
            is_answered[number] = True

        threads = [
            threading.Thread(target=make, args=pair) for pair in enumerate([self.prepare(*call) for call in calls])
        ]
        for thread in threads:
            thread.start()
        known = during(is_answered) if during else is_answered
        for thread in threads:
            thread.join()
        assert all(is_answered)
        self.steps += zip(calls, map(repr, outcomes), known, strict=True)
        for call, outcome, is_known in zip(calls, outcomes, known, strict=True):
            assert may_refuse or not is_known or not isinstance(outcome, scrapy_do.StorageError)
            self.learn(outcome, is_known, *call)
        return list(zip(calls, outcomes, wanted, strict=True))

    def learn(self, outcome, is_known, kind, *args):
        """Note what has been acknowledged; a call whose answer is not known may have happened or not."""
        has_worked = is_known and not isinstance(outcome, Exception)
        if kind == "schedule" and has_worked:
            self.made[args[3]] = outcome["identifier"]
        elif kind == "schedule" and not is_known:
            self.may_be_made.add(args[3])
        elif kind == "cancel" and (has_worked or not is_known):
            (self.canceled if has_worked else self.may_be_canceled).add(args[0])
        elif kind in ("push", "remove") and (has_worked or not is_known):
            self.may_be.setdefault(args[0], [] if has_worked else [self.projects.get(args[0], "")])
            self.may_be[args[0]].append("".join(args[1:]))

    # What must hold

    def look(self):
        """Return the jobs as they are at any moment, and check what must hold always."""
        with self.lock:
            views = {view["identifier"]: view for view in json.loads(self.daemon.jobs(scrapy_do.Status))}
            for job, view in views.items():
                assert view["status"] in FLOW[self.seen.get(job, view["status"])], (self.seen, view)
                self.seen[job] = view["status"]
        check_counts(self.daemon.status())
        assert [view["status"] for view in views.values()].count("RUNNING") <= SLOTS
        runs = [view for view in views.values() if (view["actor"], view["status"]) == ("SCHEDULER", "PENDING")]
        waiting = [view["description"] for view in runs if view["identifier"] not in self.interrupted]
        assert len(waiting) == len(set(waiting)), "two runs of a schedule wait"
        return views

    def unrest(self):
        """Say what still goes on, or is wrong; None when all is as it must be at rest."""
        views = self.look()
        groups = {status: {job for job, view in views.items() if view["status"] == status} for status in FLOW}
        status, listed = self.daemon.status(), self.listed()
        if groups["RUNNING"] != (live := {job for job, crawl in dict(self.crawls.live).items() if not crawl.ended.is_set()}):
            return "what runs is not what is RUNNING", groups, live
        if groups["PENDING"] and len(groups["RUNNING"]) < SLOTS:
            return "a job waits while a slot is free", groups
        if [s for s in ("RUNNING", "PENDING", "SCHEDULED") if status[f"jobs-{s.lower()}"] != len(groups[s])]:
            return "the status has other numbers", status, groups
        if status["jobs-run"] != len(self.crawls.started):
            return "not every start is counted once", status, self.crawls.started
        if [job for job in groups["SCHEDULED"] if views[job]["next_run"] <= scrapy_do.local_time(self.clock.now)]:
            return "a schedule is due and does not run", views
        if sum(len(groups[status]) for status in ENDED) > CAP:
            return "too many finished jobs are kept", groups
        if self.faults.step:
            return None
        saved, projects = self.read_state()
        if (saved, {name: fields["spiders"] for name, fields in projects.items()}) != (views, listed):
            return "the file is not what the daemon says", saved, views, projects, listed
        order = [view["status"] for view in saved.values() if view["status"] in ("RUNNING", "PENDING")]
        if order != sorted(order, reverse=True):
            return "a younger job runs before an older one", saved
        return self.leftovers(views, projects)

    def listed(self):
        """Return the projects and their spiders."""
        with contextlib.suppress(scrapy_do.NotFound):  # one that is just being removed
            return {name: self.daemon.spiders(name)["spiders"] for name in self.daemon.projects()}

    def leftovers(self, views, projects):
        """Say which files are there that nobody needs, or missing."""
        found = {name: {path.name for path in (self.folder / name).iterdir()} for name in ("", "logs", "work", "projects")}
        work = {p["archive"] for p in projects.values()} | {crawl.folder.name for crawl in self.crawls.live.values()}
        extra = {
            "": found[""] ^ {"lock", "state.json", "logs", "work", "projects", "spider-data"},
            "logs": {name for name in found["logs"] if name[:-4] not in views},
            "work": found["work"] - work,
            "projects": found["projects"] ^ {f"{name}.zip" for name in projects},
        }
        return extra if any(extra.values()) else None

    def check_gone(self, known, views):
        """Only jobs that have ended may be gone, and only when as many as are to be kept are there."""
        ended = sum(view["status"] in ENDED for view in views.values())
        for job in {*known, *self.made.values()} - views.keys() - self.gone:
            has_ended = job in self.touched or job in self.canceled or known.get(job, {}).get("status") in ENDED
            assert ended == CAP, (job, "is gone")
            assert has_ended, (job, "is gone, which was active")
            self.gone.add(job)

    @hypothesis.stateful.invariant()
    def all_is_well(self):
        found = []
        try:
            wait_for(lambda: found.append(self.unrest()) or found[-1] is None, 5)
            self.check()
        except AssertionError as error:
            raise AssertionError(f"{error}; {found[-1:]} after {self.steps}") from error

    def check(self):
        """Compare what is there at rest with what was there before, and with what was acknowledged since."""
        assert self.crawls.odd == []
        self.touched |= set(self.crawls.started)
        views, listed = self.look(), self.listed()
        for name in ("shop", "other"):
            spiders = "".join(listed.get(name, ()))
            assert spiders in self.may_be.get(name, [self.projects.get(name, "")]), (name, spiders, self.may_be)
        self.projects, self.may_be = {name: "".join(spiders) for name, spiders in listed.items()}, {}
        self.check_gone(self.views, views)
        assert self.gone.isdisjoint(views), "a job has come back"
        for job, view in views.items():
            status, code = view["status"], view["exit_code"]
            former = self.views.get(job, view)
            assert [view[key] for key in FIXED] == [former[key] for key in FIXED]
            assert status in ENDED or view["spider"] in listed.get(view["project"], ()), "a job without its spider"
            assert status == "CANCELED" if job in self.canceled else status != "CANCELED" or job in self.may_be_canceled
            assert (view["reason"] is None) == (status not in ("FAILED", "CANCELED"))
            assert status != "SUCCESSFUL" or code == 0
            assert self.codes.get(job, code) == code
            if view["actor"] == "USER":
                is_known = self.made.get(view["description"]) == job or view["description"] in self.may_be_made
                assert is_known, "a refused job is there"
            assert self.daemon.log_file(job, "out").parent == self.folder / "logs"
        for job in self.gone:
            with pytest.raises(scrapy_do.NotFound):
                self.daemon.log_file(job, "out")
        self.views, self.codes = views, {}
        if not self.faults.step:
            self.saved, self.touched = views, set()

    # The steps

    @hypothesis.stateful.rule(call=CALLS)
    def one_call(self, call):
        [(call, outcome, wanted)] = self.call_all([call])
        if wanted or isinstance(outcome, Exception):
            assert type(outcome) is wanted, (call, outcome)
        if call[0] == "end" and call[1]:
            self.codes[call[1]] = call[2]

    @hypothesis.stateful.rule(calls=st.lists(CALLS, min_size=2, max_size=5))
    def calls_at_once(self, calls):
        self.call_all(calls)

    @hypothesis.stateful.precondition(lambda self: not self.faults.step)
    @hypothesis.stateful.rule(calls=st.lists(CALLS, min_size=3, max_size=6))
    def calls_at_once_on_a_slow_disk(self, calls):
        """Hold a write up until the other calls wait, so that they share the next one."""

        def hold(is_answered):
            wait_for(self.faults.parked.is_set)
            end = time.monotonic() + 0.02
            wait_for(lambda: time.monotonic() > end)
            self.faults.release()
            return is_answered

        self.faults.park("fsync", 0)
        self.call_all([("push", "other", "ab"), *calls], hold)

    @hypothesis.stateful.rule(spiders=st.lists(NUMBERS, min_size=2, max_size=3))
    def schedules_are_due_while_all_slots_are_busy(self, spiders):
        for call in (*[("schedule", number, "now") for number in spiders], *[("advance", 600, 0)] * 2):
            self.one_call(call)
            self.all_is_well()

    @hypothesis.stateful.rule(number=NUMBERS, others=st.lists(CALLS, max_size=1))
    def cancel_twice(self, number, others):
        views = self.views
        answers = self.call_all([("cancel", number), ("cancel", number), ("read",), *others])
        was = views.get(answers[0][0][1], {}).get("status")
        successes = sum(not isinstance(outcome, Exception) for _, outcome, _ in answers[:2])
        if was == "SCHEDULED" and not self.faults.step and len(others) == 0:
            assert successes == 1
        if was is None or was in ENDED:
            assert successes == 0

    @hypothesis.stateful.rule(step=st.sampled_from(sorted(STEPS)), error=st.sampled_from(list(ERRORS.values())))
    def the_disk_goes_bad(self, step, error):
        self.faults.step, self.faults.error = STEPS[step], error
        self.reach(step)

    @hypothesis.stateful.precondition(lambda self: self.faults.step)
    @hypothesis.stateful.rule()
    def the_disk_is_mended(self):
        self.faults.step = ""

    @hypothesis.stateful.rule(
        error=st.sampled_from([errno.EMFILE, errno.EAGAIN, errno.ENOENT, errno.E2BIG]), calls=st.lists(CALLS, max_size=3)
    )
    def no_crawl_can_be_started(self, error, calls):
        self.start_error = self.crawls.error = error
        for call in calls:
            self.one_call(call)
            self.all_is_well()
        self.start_error = self.crawls.error = 0

    @hypothesis.stateful.rule(
        calls=st.lists(CALLS.filter(lambda call: call[0] not in ("advance", "read")), max_size=3), mend=st.booleans()
    )
    def a_stop(self, calls, mend):
        before = self.crawls.live.keys() - self.canceled

        def stop(is_answered):
            if mend:  # a disk that is good again just before the daemon stops must get all that has happened
                self.faults.step = ""
            self.close()
            return is_answered

        self.call_all(calls, stop)
        if not self.faults.step:
            statuses = {job: view["status"] for job, view in self.read_state()[0].items()}
            assert "RUNNING" not in statuses.values()
            if not calls:
                ended = {job for job, view in self.views.items() if view["status"] in ENDED}
                assert {job for job, status in statuses.items() if status in ENDED} == ended
                assert {statuses[job] for job in before} <= {"PENDING"}
        self.open(self.folder)

    @hypothesis.stateful.precondition(lambda self: not self.faults.step)
    @hypothesis.stateful.rule(calls=st.lists(CALLS, max_size=4), step=st.sampled_from(sorted(STEPS)))
    def a_crash(self, calls, step):
        """Hold the writer up at a step, and go on with a copy of the folder, which is what kill -9 would leave."""
        folder, former = self.home / f"{next(self.numbers)}/data", self.folder
        self.faults.park(STEPS[step], errno.EIO)
        self.reach(step)

        def crash(is_answered):
            wait_for(self.faults.parked.is_set)
            known = list(is_answered)
            shutil.copytree(self.folder, folder, ignore=lambda path, names: names if path.endswith("/work") else ())
            self.faults.release()
            return known

        self.call_all([*calls, ("push", "shop", "ab")], crash)  # the last one makes sure that there is a write
        self.close()
        shutil.rmtree(former)
        self.open(folder)


def test_any_interleaving_of_calls_and_faults_keeps_what_was_acknowledged():
    examples = int(os.environ.get("STATEFUL_EXAMPLES", "15"))
    settings = hypothesis.settings(
        max_examples=examples, stateful_step_count=20, deadline=None, database=None, print_blob=False,
        phases=[hypothesis.Phase.generate],  # what threads do cannot be repeated, so it cannot be made shorter either
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    Interleavings.failures.clear()
    with contextlib.suppress(hypothesis.errors.FlakyStrategyDefinition):  # threads may take another course next time
        hypothesis.stateful.run_state_machine_as_test(Interleavings, settings=settings)
    assert Interleavings.failures == []


def test_changes_that_share_a_write_see_each_other(site, monkeypatch):
    site.push()
    job = site.schedule(when="every 2 hours")
    site.push(name="other")
    faults = ParkingFaults(monkeypatch)
    faults.park("fsync", 0)
    calls = {  # in this order
        "first": lambda: site.try_post("schedule-job", project="shop", spider="quick", when="every 3 hours"),
        "job": lambda: site.try_post("schedule-job", project="other", spider="quick", when="every 3 hours"),
        "remove": lambda: site.try_post("remove-project", name="other"),
        "cancel": lambda: site.try_post("cancel-job", id=job),
        "again": lambda: site.try_post("cancel-job", id=job),
        "bare": lambda: site.try_push(make_zip({"scrapy.cfg": "[deploy]\nproject=other", "spiders.txt": "quack"})),
    }
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        answers = {}
        for number, (name, call) in enumerate(calls.items()):
            answers[name] = pool.submit(call)
            wait_for(faults.parked.is_set)
            wait_for(lambda number=number: len(site.daemon._changes) == number)
        faults.release()
        codes = {name: answer.result(30)[0] for name, answer in answers.items()}
    assert codes == {"first": 200, "job": 200, "remove": 409, "cancel": 200, "again": 409, "bare": 409}


BEFORE_IT = {  # how its parent may have prepared the process, and what the log then has
    "streams-closed": ("import os; [os.close(number) for number in range(3)]", False),
    "signals-ignored": (
        "import signal; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)]",
        True,
    ),
    "signals-blocked": ("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())", True),
    "broken-log": ("import os; pipe = os.pipe(); os.close(pipe[0]); [os.dup2(pipe[1], n) for n in (1, 2)]", False),
}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(("prepare", "has_log"), BEFORE_IT.values(), ids=BEFORE_IT)
def test_it_runs_and_stops_whatever_it_inherits(tmp_path, stub, prepare, has_log):
    client = Client()
    client.port = free_port()
    command = [
        str(MODULE), "--port", str(client.port), "--data-dir", str(tmp_path / "data"), "--kill-after", "0.3",
        "--job-slots", "1", "--scrapy", *stub,
    ]  # fmt: skip
    launch = f"import os, sys; {prepare}; os.execv(sys.executable, [sys.executable, *{command}])"
    for number in (signal.SIGTERM, signal.SIGINT):
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen([sys.executable, "-c", launch], stdout=log, stderr=log)
        try:
            wait_for(lambda: not refuses(client.port))
            streams = [os.readlink(f"/proc/{process.pid}/fd/{descriptor}") for descriptor in range(3)]
            assert [path for path in streams if "data" in path or path.startswith("socket:")] == []
            if number == signal.SIGTERM:
                client.push(bad="kill -TERM $$; exit 3", stubborn=STUBBORN, tree="sleep 60 & exit 3")
                assert client.wait_job(client.schedule("bad"))["exit_code"] == -15
                assert client.wait_job(client.schedule("tree"))["exit_code"] == 3
                job = client.schedule("stubborn")
            wait_for(functools.partial(alive_again, client, job))
            process.send_signal(number)
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait()
        assert state(tmp_path)["jobs"][job]["status"] == "PENDING"
        assert ("listens on" in (tmp_path / "log").read_text()) == has_log
    assert [process for process in psutil.process_iter() if marked(process, tmp_path)] == []


def refuses(port):
    """Tell whether nobody listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_supervisor_that_starts_it_again_loses_nothing(tmp_path, stub):
    """A shell runs it in the background, so with SIGINT ignored, and again whenever it ends, however it ends."""
    client = Client()
    client.port = free_port()
    loop = """trap 'kill $!; wait; exit 7' TERM; while :; do "$@" & wait $!; echo $? >> ends; done"""
    options = ["--port", str(client.port), "--kill-after", "0.3", "--data-dir", "data", "--scrapy", *stub]
    command = ["/bin/sh", "-c", loop, "sh", sys.executable, str(MODULE), *options]
    with subprocess.Popen(command, cwd=tmp_path) as supervisor, contextlib.ExitStack() as stack:
        stack.callback(supervisor.terminate)
        wait_for(lambda: not refuses(client.port))
        client.push(stubborn=STUBBORN)
        schedule, job = client.schedule(when="every 2 hours"), client.schedule("stubborn")
        due = client.job(schedule)["next_run"]
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            wait_for(lambda: alive_again(client, job))
            [daemon] = psutil.Process(supervisor.pid).children()
            daemon.send_signal(number)
            daemon.wait(15)
            wait_for(lambda daemon=daemon: daemon not in psutil.Process(supervisor.pid).children())
        wait_for(lambda: alive_again(client, job))
        assert client.job(schedule)["next_run"] == due
    assert supervisor.returncode == 7
    assert (tmp_path / "ends").read_text().split() == ["137", "0", "0", "137"]
    assert state(tmp_path)["jobs"][job]["status"] == "PENDING"
    assert [process for process in psutil.process_iter() if marked(process, tmp_path)] == []


def alive_again(client, job):
    """Tell whether a daemon answers and its crawl runs."""
    return not refuses(client.port) and client.job(job)["status"] == "RUNNING" and "started" in client.log(job, "out")


@pytest.fixture
def as_process_1(tmp_path):
    """Return the words before a command that make it the first process of a container of its own."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.getuid() != 0:
        command += ["--user", "--map-root-user"]
    try:
        done = subprocess.run([*command, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1)")
    if done.returncode != 0:
        pytest.skip(f"the kernel lets us make no namespace of processes: {done.stderr}")
    return command


def test_as_process_1_it_reaps_orphans_and_stops_like_any_other(outside, tmp_path, as_process_1):
    site = outside("--kill-after", "0.5", command=(*as_process_1, sys.executable, str(MODULE)))
    [first] = psutil.Process(site.process.pid).children()
    orphans = "for n in 1 2 3 4 5; do (setsid sleep 0.01 & exec true); done; echo left; "
    site.push(orphans=orphans + HOLD, bad="sleep 0.05; exit 3", stubborn=f"{TREES['lost-parent']}\n{STUBBORN}")
    job = site.schedule("orphans")
    wait_for(lambda: "started" in site.log(job, "out"))
    assert site.wait_job(site.schedule("bad"))["exit_code"] == 3

    def states():
        with contextlib.suppress(psutil.NoSuchProcess):
            return [process.status() for process in first.children(recursive=True)]
        return [psutil.STATUS_ZOMBIE]  # one is just being reaped

    wait_for(lambda: states() and psutil.STATUS_ZOMBIE not in states())  # also while the crawl goes on
    assert site.job(job)["status"] == "RUNNING"
    canceled, interrupted = site.schedule("stubborn"), site.schedule("stubborn")
    for stubborn in (canceled, interrupted):
        wait_for(lambda stubborn=stubborn: "started" in site.log(stubborn, "out"))
    site.post("cancel-job", id=canceled)
    assert site.job(canceled)["exit_code"] == -9
    wait_for(lambda: psutil.STATUS_ZOMBIE not in states())
    first.send_signal(signal.SIGTERM)
    assert site.process.wait(15) == 0
    saved = state(tmp_path)["jobs"]
    assert {saved[job]["status"], saved[interrupted]["status"]} == {"PENDING"}
    site.start()
    [first] = psutil.Process(site.process.pid).children()
    daemon = min(first.children(), key=lambda process: process.pid)  # an orphan of the crawl may be there already
    wait_for(lambda: "started" in site.log(interrupted, "out"))
    began = site.log_bytes()
    first.send_signal(signal.SIGHUP)
    site.wait_until_it_listens(began)
    assert site.job(interrupted)["status"] == "RUNNING"
    assert daemon in first.children()
    daemon.kill()  # then the container ends, which whoever keeps it starts again
    assert site.process.wait(15) == 137


def test_many_requests_and_crawls_leave_its_process_as_it_was(outside, tmp_path):
    """By hand for longer: SOAK_REQUESTS=100000 SOAK_CRAWLS=2000 python -m pytest -s -k many_requests."""
    requests, crawls = (int(os.environ.get(name, least)) for name, least in (("SOAK_REQUESTS", 4000), ("SOAK_CRAWLS", 160)))
    site = outside("--completed-cap", "20")
    site.push()
    process = psutil.Process(site.process.pid)

    def ask(seed):
        """Ask for everything in turn over one connection, and schedule crawls now and then."""
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        paths = ["/status.json", "/list-jobs.json?status=COMPLETED", "/list-projects.json", "/list-jobs.json?status=x", "/x"]
        form = urllib.parse.urlencode({"project": "shop", "spider": "quick", "when": "now"})
        every = max(1, requests // crawls)
        for number in range(seed, requests // 4, 4):
            if number % every == 0:
                connection.request("POST", "/schedule-job.json", form, {"Content-Type": "application/x-www-form-urlencoded"})
            else:
                connection.request("GET", paths[number % 5])
            connection.getresponse().read()
        connection.close()

    def measure():
        """Send a quarter of the requests in four threads and return what the process holds when all is at rest."""
        in_parallel(*[functools.partial(ask, seed) for seed in range(4)])
        site.push()
        wait_for(lambda: not site.jobs("ACTIVE"), 600)
        return process.num_threads(), process.num_fds(), process.memory_info().rss // 1024

    measures = [measure() for _ in range(4)]
    print(f"after each quarter: threads, file descriptors, KiB resident: {measures}; {site.get('status')}")
    status = site.get("status")
    assert status["jobs-run"] == status["jobs-successful"] >= crawls * 0.9
    _, middle, _, end = measures
    assert max(threads for threads, _, _ in measures) <= 6 + 4 + 2  # its own, one for each client, one for us and a spare
    assert end[1] <= middle[1] + 2
    assert end[2] <= middle[2] * 1.03 + 256
    assert len(list((tmp_path / "data/logs").iterdir())) <= 40
    assert len(list((tmp_path / "data/work").iterdir())) == 1


@pytest.fixture
def small_disk(tmp_path):
    """Return a command that runs another one where ./disk is a small file system that nobody else sees."""
    (tmp_path / "disk").mkdir()
    rights = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=1m,mode=755 tmpfs disk && exec "$@"'
    command = ["unshare", *rights, "--mount", "/bin/sh", "-c", f"cd {tmp_path} && {mount}", "sh"]
    try:
        done = subprocess.run([*command, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1)")
    if done.returncode != 0:
        pytest.skip(f"the kernel lets us mount no file system: {done.stderr}")
    return command


@pytest.mark.parametrize("filler", ["a-stranger", "the-log-of-a-crawl"])
def test_a_full_disk_refuses_changes_and_goes_on(outside, tmp_path, small_disk, filler):
    site = outside("--data-dir", "disk/data", command=(*small_disk, sys.executable, str(MODULE)))
    disk = pathlib.Path(f"/proc/{site.process.pid}/root{tmp_path}/disk")  # as the daemon sees it
    data = disk / "data"
    fill = f"head -c 2000000 /dev/zero; {HOLD}"
    site.push(hold=HOLD, fill=fill)
    done = site.wait_job(site.schedule())["identifier"]
    kept = site.schedule(when="every 2 hours", description="x" * 90_000)  # to save needs more than what an end frees
    running = site.schedule("hold")
    wait_for(lambda: "started" in site.log(running, "out"))

    def saved():
        return fold(json.loads((data / "state.json").read_text()))["jobs"]

    if filler == "a-stranger":
        with contextlib.suppress(OSError), open(disk / "big", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:
        filling = site.schedule("fill")
        wait_for(lambda: shutil.disk_usage(disk).free == 0)
    wait_for(lambda: site.try_post("schedule-job", project="shop", spider="quick", when="now")[0] == 507)
    before = site.jobs("ACTIVE")
    for path, fields in {
        "schedule-job": {"project": "shop", "spider": "quick", "when": "every 2 hours"},
        "cancel-job": {"id": kept}, "push-project": {"archive": stub_project("other")},
        "remove-project": {"name": "other"},
    }.items():  # fmt: skip
        status, answer = site.try_post(path, **fields)
        assert (status, answer["status"]) == (404 if path == "remove-project" else 507, "error"), (path, answer)
    assert site.jobs("ACTIVE") == before
    assert site.job(done)["status"] == "SUCCESSFUL"
    site.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "not reloaded, all goes on as before" in site.log_path.read_text())
    assert f"{tmp_path}/disk/data cannot be written, so the state is not saved" in site.log_path.read_text()
    (data / "spider-data/go").touch()
    assert site.wait_job(running)["status"] == "SUCCESSFUL"
    assert saved()[running]["status"] == "RUNNING"
    if filler == "a-stranger":
        (disk / "big").unlink()
    else:
        assert site.wait_job(filling)["exit_code"] == 0
        (data / f"logs/{filling}.out").write_bytes(b"")
    wait_for(lambda: saved()[running]["status"] == "SUCCESSFUL")
    site.post("cancel-job", id=kept)
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    jobs = {job["identifier"]: job for job in site.jobs("COMPLETED")}
    assert {job: (view["status"], view["reason"]) for job, view in jobs.items()} == {
        job: (fields["status"], fields.get("reason")) for job, fields in saved().items()
    }
    assert sorted(path.name for path in data.iterdir()) == ["lock", "logs", "projects", "spider-data", "state.json", "work"]
    assert [path.name for path in (data / "projects").iterdir()] == ["shop.zip"]
    assert len(list((data / "work").iterdir())) == 1
    site.stop()
    assert "Traceback" not in site.log_path.read_text()


def test_a_daemon_without_file_descriptors_waits_and_recovers(outside, tmp_path):
    site = outside()
    site.push(hold=f"sleep 60 & {NOTE}\n{HOLD}")
    running, kept = site.schedule("hold"), site.schedule(when="every 2 hours")
    wait_for(lambda: "started" in site.log(running, "out"))
    used = psutil.Process(site.process.pid).num_fds()
    limits = resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE, (used + 8, limits[1]))
    with contextlib.ExitStack() as stack:
        for _ in range(30):  # more than there are descriptors for: the rest wait in the backlog
            line = stack.enter_context(socket.create_connection(("127.0.0.1", site.port), timeout=30))
        wait_for(lambda: psutil.Process(site.process.pid).num_fds() == used + 8)
        release(tmp_path)
        line.sendall(b"GET /status.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert select.select([line], [], [], 0.3)[0] == []
    assert site.wait_job(running)["status"] == "SUCCESSFUL"
    assert (tmp_path / "data/spider-data/pids").exists()
    assert alive(tmp_path / "data/spider-data/pids") == []
    wait_for(lambda: state(tmp_path)["jobs"][running]["status"] == "SUCCESSFUL")
    site.post("cancel-job", id=kept)
    resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE, limits)
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    assert site.jobs("SCHEDULED") == []
    assert "Traceback" not in site.log_path.read_text()


FEW_PROCESSES = """
import os, resource, runpy, sys
real, limits = os.fsync, resource.getrlimit(resource.RLIMIT_NPROC)
def fsync(descriptor):
    resource.setrlimit(resource.RLIMIT_NPROC, (1 if os.path.exists({flag!r}) else limits[0], limits[1]))
    real(descriptor)
os.fsync = fsync
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Steady(Client):
    """Speak to a daemon over one connection, for which it needs no other thread or file descriptor."""

    def __init__(self, site):
        self.connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
        self.push()
        assert self.wait_job(self.schedule())["status"] == "SUCCESSFUL"

    def request(self, method, path, body=None, headers=None):
        self.connection.request(method, path, body, headers or {})
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def check_starts_fail(self, reason):
        jobs = [self.wait_job(self.schedule()) for _ in range(2)]
        assert [(job["status"], job["exit_code"], reason in job["reason"]) for job in jobs] == [("FAILED", None, True)] * 2

    def check_starts_work(self):
        assert self.wait_job(self.schedule())["status"] == "SUCCESSFUL"
        check_counts(self.get("status"))
        self.connection.close()


def test_a_start_without_processes_fails_only_its_job(outside, tmp_path):
    """The kernel's limit does not bind root, whose daemon here runs as somebody else who may read all files."""
    rights = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    someone = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *rights] if os.getuid() == 0 else []
    flag = tmp_path / "few"
    launcher = FEW_PROCESSES.format(flag=str(flag))
    site = Steady(outside("--job-slots", "1", command=(*someone, sys.executable, "-c", launcher, str(MODULE))))
    flag.touch()
    site.check_starts_fail("[Errno 11]")
    flag.unlink()
    site.check_starts_work()


def test_a_start_without_file_descriptors_fails_only_its_job(outside):
    daemon = outside("--job-slots", "1")
    site = Steady(daemon)
    process, kind = psutil.Process(daemon.process.pid), resource.RLIMIT_NOFILE
    limits = resource.prlimit(process.pid, kind)
    resource.prlimit(process.pid, kind, (process.num_fds() + 3, limits[1]))  # for a write
    site.check_starts_fail("Too many open files")
    resource.prlimit(process.pid, kind, limits)
    site.check_starts_work()


def test_sigterm_at_any_moment_of_the_start_ends_it_well(tmp_path, stub):
    """Before its first line runs, which Python takes some time for, the process can only die of the signal."""
    site = Outside(tmp_path, "--scrapy", *stub, "--job-slots", "1", "--kill-after", "0.2")
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn")
    wait_for(lambda: "started" in site.log(job, "out"))
    site.kill()
    command = [sys.executable, str(MODULE), "--port", "0", "--data-dir", str(tmp_path / "data"), *site.options]
    codes = set()
    for number in range(int(os.environ.get("START_ROUNDS", "14"))):
        lock, moment = tmp_path / "data/lock", time.monotonic() + number * 0.03
        lock.unlink(missing_ok=True)
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        wait_for(lambda moment=moment: time.monotonic() > moment)
        process.terminate()
        said = process.communicate(timeout=15)[1].decode()
        codes.add(process.returncode)
        assert process.returncode == 0 or (process.returncode == -signal.SIGTERM and not lock.exists()), said
        assert "Traceback" not in said
        assert state(tmp_path)["jobs"][job]["status"] == ("PENDING" if 0 in codes else "RUNNING")
    assert 0 in codes
    assert [process for process in psutil.process_iter() if marked(process, tmp_path)] == []


SLOW_FSYNC = """
import os, runpy, sys, threading
real, first = os.fsync, threading.Event()
def fsync(descriptor):
    if os.path.exists({flag!r}) and "/state.json" in os.readlink("/proc/self/fd/%d" % descriptor):
        open({flag!r} + ".on", "w").close()
        first.wait(0.7)
    real(descriptor)
os.fsync = fsync
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("count", [1, 3])
def test_sigterm_during_a_write_and_a_cancel_and_a_start_keeps_what_is_acknowledged(outside, tmp_path, count):
    flag = tmp_path / "slow"
    launcher = (sys.executable, "-c", SLOW_FSYNC.format(flag=str(flag)), str(MODULE))
    site = outside("--kill-after", "0.5", "--job-slots", "2", command=launcher)
    site.push(stubborn=STUBBORN)
    jobs = [site.schedule("stubborn"), site.schedule("stubborn")]
    for job in jobs:
        wait_for(lambda job=job: "started" in site.log(job, "out"))
    waiting, answers = site.schedule(), {}
    flag.touch()
    calls = {
        "schedule": lambda: site.try_post("schedule-job", project="shop", spider="quick", when="every 2 hours"),
        "cancel": lambda: site.try_post("cancel-job", id=jobs[0]),  # it ignores SIGTERM, and the next one starts then
        "push": lambda: site.try_push(stub_project("other")),
    }

    def ask(name, call):
        with contextlib.suppress(OSError, http.client.HTTPException):
            answers[name] = call()

    threads = [threading.Thread(target=ask, args=pair) for pair in calls.items()]
    for thread in threads:
        thread.start()
    wait_for((tmp_path / "slow.on").exists)
    for _ in range(count):
        site.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert site.process.wait(15) == 0
    assert time.monotonic() - began < 0.5 + 6  # a few writes of 0.7 s each
    for thread in threads:
        thread.join()
    saved = state(tmp_path)
    assert saved["jobs"][jobs[1]]["status"] == "PENDING"
    assert saved["jobs"][waiting]["status"] in ("PENDING", "SUCCESSFUL")
    assert "RUNNING" not in {fields["status"] for fields in saved["jobs"].values()}
    for name, (status, answer) in answers.items():
        assert status in (200, 503), answer
        is_there = {
            "schedule": len(saved["jobs"]) == 4, "push": "other" in saved["projects"],
            "cancel": saved["jobs"][jobs[0]]["status"] == "CANCELED",
        }[name]  # fmt: skip
        assert is_there or status == 503, (name, answer)
    assert answers
    assert "Traceback" not in site.log_path.read_text()
    assert [process for process in psutil.process_iter() if marked(process, tmp_path)] == []


# ---- 8. HTTP ---------------------------------------------------------------------------------------------------------

NOBODY = "01234567-89ab-cdef-0123-456789abcdef"
URLENCODED, MULTIPART, JSON = "application/x-www-form-urlencoded", "multipart/form-data; boundary=xYz", "application/json"
JOB_KEYS = {
    "identifier", "status", "actor", "schedule", "project", "spider", "description", "payload", "args", "settings",
    "timeout", "timestamp", "duration", "next_run", "exit_code", "reason", "stats",
}  # fmt: skip
GET_ROUTES = {
    "/status.json": {
        "memory-usage", "cpu-usage", "time", "timezone", "hostname", "uptime", "jobs-run", "jobs-successful",
        "jobs-failed", "jobs-canceled", "jobs-scheduled", "jobs-pending", "jobs-running", "runs-skipped", "projects",
        "spiders", "daemon-version",
    },
    "/list-projects.json": {"projects"},
    "/list-spiders.json?project=shop": {"project", "spiders"},
    "/list-jobs.json?status=ACTIVE": {"jobs"},
}  # fmt: skip
CONFIG = "[settings]\ndefault = \n[deploy]\nproject = shop\n"
FILES = {"spiders.txt": "quick\n", "quick.sh": "exit 0\n"}
POST_ROUTES = ("/push-project.json", "/schedule-job.json", "/cancel-job.json", "/remove-project.json")


class Line:
    """A connection on which a test says exactly which bytes are sent, and when."""

    def __init__(self, site):
        self.socket = socket.create_connection(("127.0.0.1", site.port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
        self.socket.close()

    def send(self, data):
        """Send all of it, as far as the daemon takes it."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def send_bytewise(self, data):
        """Send every byte for itself."""
        for byte in data:
            self.socket.send(bytes([byte]))

    def drip(self, data):
        """Send a byte now and then until the daemon answers; tell whether it did."""
        return any(select.select([self.socket], [], [], 0.01)[0] or self.send(bytes([byte])) for byte in data)

    def answer(self, has_body=True):
        """Return the status, the headers and the body of the next answer."""
        words = self.file.readline().split(None, 2)
        assert words, "the connection was closed without an answer"
        assert words[0] == b"HTTP/1.1"
        headers = http.client.parse_headers(self.file)
        length = int(headers["Content-Length"]) if has_body and words[1] != b"100" else 0
        body = self.file.read(length)
        assert len(body) == length
        return int(words[1]), headers, body

    def is_closed(self):
        """Tell whether the daemon has said all, and nothing but the answers read so far."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True

    def reset(self):
        """Break the connection off."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def speak(site, data, has_body=True):
    """Send bytes on a connection of their own and return the status, the headers and the body of the answer."""
    with Line(site) as line:
        line.send(data)
        return line.answer(has_body)


def check_refusal(answer, *statuses):
    """Check that an answer is an error as the contract wants it and return its message."""
    status, headers, body = answer
    assert status in statuses, (status, body)
    assert headers["Content-Type"] == "application/json"
    assert body.endswith(b"}\n")
    document = json.loads(body.decode())
    assert document.keys() == {"status", "msg"}
    assert document["status"] == "error"
    return document["msg"]


def head_of(path="/status.json", *lines, method="GET", version="1.1"):
    """Return the head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode()


def post_of(path, body, kind=URLENCODED, *lines):
    """Return a POST with its length."""
    return head_of(path, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *lines, method="POST") + body


def chunks_of(body, size):
    """Return a chunked body."""
    cuts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(cut), cut) for cut in cuts) + b"0\r\n\r\n"


def chunked_post_of(path, body, kind=URLENCODED):
    """Return the head of a chunked POST, and a body that is chunked already."""
    return head_of(path, f"Content-Type: {kind}", "Transfer-Encoding: chunked", method="POST") + body


def part_of(name, value, more=""):
    """Return one part of a multipart body with the boundary xYz, without the line break that ends it."""
    return f'--xYz\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value


PLAN = {"project": "shop", "spider": "quick", "when": "every 1000 weeks"}
PLAN_URLENCODED = urllib.parse.urlencode(PLAN).encode()
PLAN_PARTS = [part_of(name, value.encode()) for name, value in PLAN.items()]
CLOSING = b"--xYz--\r\n"
QUERY = b"id=" + NOBODY.encode()


def description_of(site, answer):
    """Return the description of the job that an answer says was made."""
    assert answer[0] == 200, answer[2]
    return site.job(json.loads(answer[2])["identifier"])["description"]


@pytest.fixture
def shop(site):
    """Return a running daemon that has a project."""
    site.push()
    return site


@pytest.fixture
def short_time(site, monkeypatch):
    """Give clients little time."""
    site.limit(request_timeout=0.3)
    monkeypatch.setattr(scrapy_do, "LINGER_SECONDS", 0.1)


# Routes


def test_every_route_answers_with_its_keys(shop):
    keys = {path: shop.call("GET", path)[1].keys() - {"status"} for path in GET_ROUTES}
    assert keys == GET_ROUTES
    assert shop.post("push-project", archive=stub_project("toys")) == {"status": "ok", "name": "toys", "spiders": ["quick"]}
    assert shop.post("remove-project", name="toys") == {"status": "ok"}
    answer = shop.post("schedule-job", **PLAN)
    identifier = answer["identifier"]
    job = shop.job(identifier)
    assert answer == {"status": "ok", "identifier": str(uuid.UUID(identifier)), "next_run": job["next_run"]}
    assert job.keys() == JOB_KEYS
    assert (job["status"], job["actor"], job["schedule"]) == ("SCHEDULED", "USER", PLAN["when"])
    assert (job["description"], job["payload"], job["duration"]) == ("", "{}", None)
    for moment in (job["timestamp"], job["next_run"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", moment)
    assert shop.post("cancel-job", id=identifier) == {"status": "ok"}
    assert shop.log(identifier) == ""


def test_a_list_of_jobs_is_filtered_and_limited(shop, monkeypatch):
    """The newest come first, and what is left out is not even encoded."""
    shop.push(stub_project("other", sound="exit 0"))
    shop.push(stub_project("gone"))
    made = [("shop", "quick"), ("other", "quick"), ("other", "sound"), ("shop", "quick"), ("other", "quick")]
    jobs = [shop.schedule(spider, "every 3 hours", project) for project, spider in made]
    removed = shop.wait_job(shop.schedule(project="gone"))["identifier"]
    shop.post("remove-project", name="gone")
    encoded = []
    monkeypatch.setattr(scrapy_do, "job_text", lambda job: encoded.append(job.identifier) or json.dumps(job.view()))
    for query, numbers in {
        (): (4, 3, 2, 1, 0), (("limit", 2),): (4, 3), (("limit", "1000000000"),): (4, 3, 2, 1, 0), (("project", "shop"),): (3, 0),
        (("spider", "quick"),): (4, 3, 1, 0), (("project", "other"), ("spider", "quick")): (4, 1),
        (("project", "other"), ("spider", "quick"), ("limit", 1)): (4,), (("project", "shop"), ("spider", "sound")): (),
        (("project", "nowhere"),): (), (("spider", "nobody"),): (), (("project", ""),): (),
    }.items():  # fmt: skip
        encoded.clear()
        found = [job["identifier"] for job in shop.get("list-jobs", status="SCHEDULED", **dict(query))["jobs"]]
        assert found == encoded == [jobs[number] for number in numbers], query
    assert [job["identifier"] for job in shop.get("list-jobs", status="COMPLETED", project="gone", limit=5)["jobs"]] == [removed]


def test_status_has_values_of_the_right_kind(shop):
    status = shop.get("status")
    kinds = dict.fromkeys(("memory-usage", "cpu-usage"), float) | dict.fromkeys(
        ("status", "time", "timezone", "hostname", "uptime", "daemon-version"), str
    )
    assert {name: type(value) for name, value in status.items()} == {name: kinds.get(name, int) for name in status}
    assert (status["projects"], status["spiders"], status["daemon-version"]) == (1, 1, scrapy_do.__version__)


@pytest.mark.parametrize("path", [*GET_ROUTES, f"/list-jobs.json?id={NOBODY}", "/nothing", "/get-log/data/{}.out"])
def test_head_answers_like_get_without_the_body(shop, path):
    job = shop.wait_job(shop.schedule())
    path = path.format(job["identifier"])
    with Line(shop) as line:
        line.send(head_of(path) + head_of(path, method="HEAD") + head_of(path))
        first, second, third = line.answer(), line.answer(has_body=False), line.answer()
    volatile = {"Date", *(["Content-Length"] if path == "/status.json" else [])}
    kept = [[(name, value) for name, value in headers.items() if name not in volatile] for _, headers, _ in (first, second)]
    assert kept[0] == kept[1]
    assert (first[0], second[2], third[0]) == (second[0], b"", second[0])


@pytest.mark.parametrize(
    "path", ["/status", "/status.json/", "//status.json", "/STATUS.JSON", "/%00", "/.json", "/get-log/", "*", "x", "/ą"]
)
def test_unknown_path_is_404(site, path):
    message = check_refusal(speak(site, head_of(path)), 404)
    assert "/schedule-job.json" in message
    assert check_refusal(speak(site, head_of(path, "Content-Length: 0", method="POST")), 404) == message


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "get", "BREW"])
def test_wrong_method_is_405_with_the_right_one(shop, method):
    log = f"/get-log/data/{shop.schedule(when='every 9 days')}.err"
    for path in (*GET_ROUTES, log, *POST_ROUTES):
        allowed = ["POST"] if path in POST_ROUTES else ["GET", "HEAD"]
        if method in allowed:
            continue
        status, headers, body = speak(shop, head_of(path, method=method), method != "HEAD")
        assert (status, headers["Allow"]) == (405, ", ".join(allowed))
        assert method == "HEAD" or "is asked for by" in check_refusal((status, headers, body), 405)


WRONG_PARAMETERS = {
    "missing project": ("/list-spiders.json?", ["project"]),
    "twice": ("/list-spiders.json?project=shop&project=shop", ["twice", "project"]),
    "unknown": ("/list-spiders.json?project=shop&prefix=a", ["prefix", "project"]),
    "wrong case": ("/list-spiders.json?Project=shop", ["Project", "project"]),
    "none known": ("/status.json?verbose", ["verbose"]),
    "nameless": ("/list-projects.json?=1", ["''"]),
    "neither": ("/list-jobs.json", ["status", "id"]),
    "both": (f"/list-jobs.json?id={NOBODY}&status=ACTIVE", ["status", "id"]),
    "status twice": ("/list-jobs.json?status=ACTIVE&status=ACTIVE", ["twice", "status", "id"]),
    "only a limit": ("/list-jobs.json?limit=1", ["status", "id"]),
    **{
        f"id and {name}": (f"/list-jobs.json?id={NOBODY}&{name}=1", [name, "status", "leave them out", "id"])
        for name in ("project", "spider", "limit")
    },
    **{
        f"limit {limit}": (f"/list-jobs.json?status=ACTIVE&limit={limit}", ["'limit'", "whole number from 1 to", limit])
        for limit in ("0", "-1", "x", "1.5", "2000000000")
    },
    "limit of many digits": (f"/list-jobs.json?status=ACTIVE&limit={'0' * 11}1{'9' * 5000}", ["'limit'", "whole number"]),
    "limit twice": ("/list-jobs.json?status=ACTIVE&limit=1&limit=2", ["twice", "limit"]),
    "status in small letters": ("/list-jobs.json?status=active", ["'active'", *["ACTIVE", "COMPLETED", "PENDING", "FAILED"]]),
    "empty status": ("/list-jobs.json?status", ["''", "ACTIVE", "SUCCESSFUL"]),
    "not UTF-8": ("/list-spiders.json?project=%ff", ["project", "UTF-8"]),
    "name not UTF-8": ("/list-spiders.json?%ff=a", ["UTF-8"]),
    "no archive": ("/push-project.json", b"", ["archive"]),
    "two archives": ("/push-project.json", b"archive=a&archive=b", ["twice", "archive"]),
    "other archive": ("/push-project.json", b"archive=a&egg=b", ["egg", "archive"]),
    "no when": ("/schedule-job.json", b"project=shop&spider=quick", ["when", "description", "payload", "timeout", "arg (may be repeated), setting (may"]),
    "no spider": ("/schedule-job.json", b"project=shop&when=now", ["spider", "when"]),
    "no project": ("/schedule-job.json", b"spider=quick&when=now", ["project", "when"]),
    "two payloads": ("/schedule-job.json", PLAN_URLENCODED + b"&payload={}&payload={}", ["twice", "payload", "when"]),
    "priority": ("/schedule-job.json", PLAN_URLENCODED + b"&priority=1", ["priority", "description"]),
    "description not UTF-8": ("/schedule-job.json", PLAN_URLENCODED + b"&description=%ff", ["description", "UTF-8"]),
    "no id": ("/cancel-job.json", b"", ["id"]),
    "two ids": ("/cancel-job.json", QUERY + b"&" + QUERY, ["twice", "id"]),
    "identifier": ("/cancel-job.json", b"identifier=" + NOBODY.encode(), ["identifier", "id"]),
    "no name": ("/remove-project.json", b"", ["name"]),
    "project to remove": ("/remove-project.json", b"project=shop", ["'project'", "name"]),
}


@pytest.mark.parametrize("request_", WRONG_PARAMETERS.values(), ids=WRONG_PARAMETERS)
def test_wrong_parameter_is_named_beside_the_ones_that_exist(shop, request_):
    path, *body, words = request_
    message = check_refusal(speak(shop, post_of(path, *body) if body else head_of(path)), 400)
    assert [word for word in words if word not in message] == [], message
    assert shop.get("list-projects")["projects"] == ["shop"]
    assert shop.jobs("ACTIVE") == []


UNKNOWN_THINGS = {
    "spiders of a project": ("/list-spiders.json?project=toys", "toys"),
    "job": (f"/list-jobs.json?id={NOBODY}", NOBODY),
    "job that is no identifier": ("/list-jobs.json?id=..%2f", "../"),
    "log": (f"/get-log/data/{NOBODY}.out", NOBODY),
    "project to schedule": ("/schedule-job.json", b"project=toys&spider=quick&when=now", "toys"),
    "spider to schedule": ("/schedule-job.json", b"project=shop&spider=slow&when=now", "slow"),
    "job to cancel": ("/cancel-job.json", QUERY, NOBODY),
    "project to remove": ("/remove-project.json", b"name=../shop", "../shop"),
}


@pytest.mark.parametrize("request_", UNKNOWN_THINGS.values(), ids=UNKNOWN_THINGS)
def test_unknown_thing_is_404_and_named(shop, request_):
    path, *body, name = request_
    assert name in check_refusal(speak(shop, post_of(path, *body) if body else head_of(path)), 404)


@pytest.mark.parametrize("path", POST_ROUTES)
def test_post_with_parameters_in_the_address_is_400(shop, path):
    assert "body" in check_refusal(speak(shop, post_of(f"{path}?name=shop&id={NOBODY}", b"")), 400)
    assert shop.get("list-projects")["projects"] == ["shop"]


@pytest.mark.parametrize("kind", ["text/plain", "multipart/mixed; boundary=xYz", "application/zip", "nonsense", "ą" * 99, ""])
def test_unknown_content_type_is_415(site, kind):
    assert "curl -F" in check_refusal(speak(site, post_of("/cancel-job.json", QUERY, kind)), 415)


# Bodies


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize(
    "options",
    [
        ["-F", "archive=@{}"],
        ["-F", 'archive=@{};filename="zażółć gęślą jaźń.zip"'],
        ["-F", 'archive=@{};filename="爬虫 项目.zip";type=application/zip'],
        ["-F", 'archive=@{};filename="a \\"quoted; name=\\\\\\"x\\\\\\"; b.zip"'],
        ["-F", "archive=@{}", "-H", "Expect: 100-continue"],
        ["-F", "archive=@{}", "-H", "Transfer-Encoding: chunked"],
        ["-F", "archive=@{}", "-0"],
        ["--data-urlencode", "archive@{}"],
    ],
    ids=["form", "polish name", "chinese name", "quotes", "expect", "chunked", "http 1.0", "urlencoded"],
)
def test_curl_pushes_a_project(site, tmp_path, options):
    archive = tmp_path / "shop ;,'x.zip"
    archive.write_bytes(make_zip({"big.bin": random.Random(1).randbytes(200_000), "scrapy.cfg": CONFIG, **FILES}))
    options = [option.format(f'"{archive}"' if option.startswith("archive=") else archive) for option in options]
    command = ["curl", "-sS", "--max-time", "30", f"http://127.0.0.1:{site.port}/push-project.json", *options]
    printed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    assert json.loads(printed) == {"status": "ok", "name": "shop", "spiders": ["quick"]}


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize(
    "options",
    [
        [option for pair in PLAN.items() for option in ("-F", "=".join(pair))] + ["--form-string", "description=a ż; \"b\"\\+%41&"],
        ["-d", PLAN_URLENCODED.decode(), "--data-urlencode", "description=a ż; \"b\"\\+%41&"],
        ["-H", "Content-Type: application/json", "-d", json.dumps({**PLAN, "description": "a ż; \"b\"\\+%41&"})],
    ],
    ids=["multipart", "urlencoded", "json"],
)
def test_curl_schedules_a_job(shop, options):
    command = ["curl", "-sS", "--max-time", "30", f"http://127.0.0.1:{shop.port}/schedule-job.json", *options]
    printed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    assert shop.job(json.loads(printed)["identifier"])["description"] == "a ż; \"b\"\\+%41&"


def deliver(site, how, body, kind):
    """Send a body to schedule-job in one way of several and return the answer."""
    if how == "chunked":
        return speak(site, chunked_post_of("/schedule-job.json", chunks_of(body, 1), kind))
    if how == "whole":
        return speak(site, post_of("/schedule-job.json", body, kind))
    with Line(site) as line:
        line.send_bytewise(post_of("/schedule-job.json", body, kind))
        return line.answer()


WAYS = pytest.mark.parametrize("how", ["whole", "bytewise", "chunked"])

PARTS = {
    "plain": (part_of("description", b"hello"), "hello"),
    "empty": (part_of("description", b""), ""),
    "line breaks": (part_of("description", b"\r\na\r\n\r\nb\r\n"), "\r\na\r\n\r\nb\r\n"),
    "line break": (part_of("description", b"\r\n"), "\r\n"),
    "half a line break": (part_of("description", b"\r\r\n\r"), "\r\r\n\r"),
    "half boundaries": (part_of("description", b"\r\n--\r\n--xY\r\n-xYz\r\n--xYZ\r\n--"), "\r\n--\r\n--xY\r\n-xYz\r\n--xYZ\r\n--"),
    "longer boundaries": (part_of("description", b"\r\n--xYzz\r\n--xYz-\r\n--xYz a"), "\r\n--xYzz\r\n--xYz-\r\n--xYz a"),
    "boundary within a line": (part_of("description", b"a--xYz--\r\n --xYz\r\n"), "a--xYz--\r\n --xYz\r\n"),
    "boundary after a line feed": (part_of("description", b"a\n--xYz--\n--xYz\r"), "a\n--xYz--\n--xYz\r"),
    "boundary, spaces and text": (part_of("description", b"\r\n--xYz" + b" " * 70 + b"a"), "\r\n--xYz" + " " * 70 + "a"),
    "polish file name": (part_of("description", b"a", '; filename="żółć.txt"'), "a"),
    "chinese file name": (part_of("description", b"a", '; filename="爬虫.zip"\r\nContent-Type: text/plain'), "a"),
    "name in a file name": (part_of("description", b"a", r'; filename="x\"; name=\"when; .zip"'), "a"),
    "file name first": (
        b'--xYz\r\nContent-Disposition: form-data; filename="; name=when; \\";name=\\"id"; name="description"\r\n\r\na',
        "a",
    ),
    "extended file name": (part_of("description", b"a", "; filename*=UTF-8''%c5%bc; x=y"), "a"),
    "header in small letters": (b"--xYz\r\ncontent-disposition:form-data;name=description\r\n\r\na", "a"),
    "other headers first": (
        b'--xYz\r\nContent-Type: text/plain; name="when"\r\nX-Name: name="id"\r\n'
        b'CONTENT-DISPOSITION: Form-Data ;\tNAME="description"\r\n\r\na',
        "a",
    ),
    "escapes in the name": (b'--xYz\r\nContent-Disposition: form-data; name="des\\cription"\r\n\r\na', "a"),
    "padding": (b'--xYz \t \r\nContent-Disposition: form-data; name="description"\r\n\r\na', "a"),
}


@WAYS
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_multipart_part_is_read_to_the_byte(shop, part, how):
    content, description = part
    body = b"\r\n".join([PLAN_PARTS[0], content, *PLAN_PARTS[1:], CLOSING])
    assert description_of(shop, deliver(shop, how, body, MULTIPART)) == description


WHOLE = b"\r\n".join([*PLAN_PARTS, part_of("description", b"a"), CLOSING])
MULTIPARTS = {
    "preamble": (b"nothing --xYz\r\n--xYzz\r\nContent-Disposition: x\r\n" + WHOLE, MULTIPART),
    "line break before": (b"\r\n" + WHOLE, MULTIPART),
    "epilogue": (WHOLE + b"nothing\r\n--xYz\r\nmore", MULTIPART),
    "no last line break": (WHOLE[:-2], MULTIPART),
    "padding at the end": (WHOLE[:-2] + b" \t\r\n", MULTIPART),
    "quoted boundary": (WHOLE.replace(b"xYz", b"a;b, c=d"), 'multipart/form-data; boundary="a;b, c=d"; charset=x'),
    "odd boundary": (WHOLE.replace(b"xYz", b"'()+_,-./:=?"), "multipart/form-data; boundary=\"'()+_,-./:=?\""),
    "pattern as boundary": (WHOLE.replace(b"xYz", b".*"), "multipart/form-data; boundary=.*"),
    "dashes": (WHOLE.replace(b"xYz", b"-" * 20), "multipart/form-data; boundary=" + "-" * 20),
    "capitals": (WHOLE, "Multipart/Form-Data;charset=utf-8;\tBOUNDARY=xYz"),
}


@WAYS
@pytest.mark.parametrize("body", MULTIPARTS.values(), ids=MULTIPARTS)
def test_multipart_frame_is_read_as_rfc_2046_has_it(shop, body, how):
    assert description_of(shop, deliver(shop, how, *body)) == "a"


BAD_MULTIPARTS = {
    "cut in a part": WHOLE[:-14],
    "cut in a boundary": WHOLE[:-5],
    "cut before the last dash": WHOLE[:-3],
    "cut in the headers": WHOLE[:20],
    "no last boundary": b"\r\n".join([*PLAN_PARTS, b""]),
    "other boundary": WHOLE.replace(b"xYz", b"abc"),
    "line feeds for line breaks": WHOLE.replace(b"\r\n", b"\n"),
    "nothing": b"",
    "part without a name": b'--xYz\r\nContent-Disposition: form-data; filename="name"\r\n\r\na\r\n' + WHOLE,
    "part without a disposition": b"--xYz\r\nContent-Type: text/plain\r\n\r\na\r\n" + WHOLE,
    "part without headers": b"--xYz\r\n\r\na\r\n" + WHOLE,
    "attachment": b'--xYz\r\nContent-Disposition: attachment; name="description"\r\n\r\na\r\n' + WHOLE,
    "name that is not UTF-8": b'--xYz\r\nContent-Disposition: form-data; name="\xff"\r\n\r\na\r\n' + WHOLE,
    "headers without an end": b"--xYz\r\nX: " + b"a" * 100_000,
    "too many headers": b"--xYz\r\n" + b"X: a\r\n" * 20_000 + b"\r\n" + WHOLE,
    "headers too long": b"--xYz\r\nX: " + b"a" * 100_000 + b"\r\n" + WHOLE[7:],
}


@pytest.mark.parametrize("body", BAD_MULTIPARTS.values(), ids=BAD_MULTIPARTS)
def test_broken_multipart_body_is_400(shop, body):
    assert "multipart" in check_refusal(speak(shop, post_of("/schedule-job.json", body, MULTIPART)), 400).replace("part", "multipart")
    assert shop.jobs("ACTIVE") == []


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary=""'])
def test_multipart_body_without_boundary_is_400(shop, kind):
    assert "boundary" in check_refusal(speak(shop, post_of("/schedule-job.json", WHOLE, kind)), 400)


URLENCODEDS = {
    "plus": (b"description=a+b%2Bc", "a b+c"),
    "utf-8": ("description=żółć %E7%88%AC".encode(), "żółć 爬"),
    "equals": (b"description=a=b==", "a=b=="),
    "line breaks": (b"description=a%0d%0Ab\r\nc", "a\r\nb\r\nc"),
    "percent alone": (b"description=100%", "100%"),
    "percent and plus": (b"description=100%+", "100% "),
    "percent and a digit": (b"description=%4", "%4"),
    "percent and no digits": (b"description=%zz%%41%4%414%", "%zz%A%4A4%"),
    "encoded name": (b"%64escription=a", "a"),
    "empty": (b"description=", ""),
    "no equals": (b"description", ""),
    "no equals, then more": (b"description&", ""),
    "empty pairs": (b"&&description=a&&", "a"),
    "encoded ampersand": (b"description=a%26payload%3D1", "a&payload=1"),
    "semicolon": (b"description=a;payload=1", "a;payload=1"),
    "long": (b"description=" + b"%41b+" * 1000, "Ab " * 1000),
}


@WAYS
@pytest.mark.parametrize("field", URLENCODEDS.values(), ids=URLENCODEDS)
def test_urlencoded_field_is_decoded(shop, field, how):
    content, description = field
    assert description_of(shop, deliver(shop, how, content + b"&" + PLAN_URLENCODED, URLENCODED)) == description
    assert description_of(shop, deliver(shop, how, PLAN_URLENCODED + b"&" + content, URLENCODED)) == description


def test_body_without_content_type_is_urlencoded(shop):
    request = head_of("/schedule-job.json", f"Content-Length: {len(PLAN_URLENCODED)}", method="POST") + PLAN_URLENCODED
    assert description_of(shop, speak(shop, request)) == ""


@pytest.mark.parametrize("how", ["whole", "bytewise", "chunked"])
def test_binary_archive_may_be_urlencoded(site, how):
    body = b"archive=" + urllib.parse.quote_plus(stub_project()).encode()
    with Line(site) as line:
        if how == "chunked":
            line.send(chunked_post_of("/push-project.json", chunks_of(body, 7)))
        else:
            (line.send if how == "whole" else line.send_bytewise)(post_of("/push-project.json", body))
        assert json.loads(line.answer()[2]) == {"status": "ok", "name": "shop", "spiders": ["quick"]}


JSONS = {
    "payload as an object": ({**PLAN, "payload": {"b": ["ż", 1.5, None], "a": {}}}, "", {"b": ["ż", 1.5, None], "a": {}}),
    "payload as a text": ({**PLAN, "payload": '{"a": "\\u017c"}'}, "", {"a": "ż"}),
    "empty payload": ({**PLAN, "payload": {}}, "", {}),
    "numbers": ({**PLAN, "timeout": 60, "description": -1.5}, "-1.5", {}),
    "description": ({**PLAN, "description": 'żółć 爬虫 \U0001f577\r\n\0"\\'}, 'żółć 爬虫 \U0001f577\r\n\0"\\', {}),
}


@WAYS
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("document", JSONS.values(), ids=JSONS)
def test_json_body_is_read(shop, document, ascii_only, how):
    fields, description, payload = document
    body = json.dumps(fields, ensure_ascii=ascii_only).encode()
    answer = deliver(shop, how, body, "Application/JSON; charset=utf-8")
    assert description_of(shop, answer) == description
    assert json.loads(shop.job(json.loads(answer[2])["identifier"])["payload"]) == payload


BAD_JSONS = {
    "empty": b"",
    "cut short": b'{"project": "shop"',
    "two documents": b"{}{}",
    "text": b"project=shop",
    "array": json.dumps([PLAN]).encode(),
    "string": b'"project"',
    "null": b"null",
    "bool as a value": json.dumps({**PLAN, "description": True}).encode(),
    "null as a value": json.dumps({**PLAN, "description": None}).encode(),
    "list as a value": json.dumps({**PLAN, "description": ["a"]}).encode(),
    "list of a number": json.dumps({**PLAN, "arg": ["a=1", None]}).encode(),
    "list of a list": json.dumps({**PLAN, "setting": [["A=1"]]}).encode(),
    "object as an arg": json.dumps({**PLAN, "arg": {"a": "1"}}).encode(),
    "lone surrogate in an arg": json.dumps({**PLAN, "arg": ["a=\ud800"]}).encode(),
    "object as a description": json.dumps({**PLAN, "payload": "[]"}).encode(),
    "the same name twice": json.dumps(PLAN).replace('"when"', '"project": "shop", "when"').encode(),
    "the same name twice, escaped": json.dumps(PLAN).replace('"when"', '"\\u0070roject": "shop", "when"').encode(),
    "bad UTF-8": json.dumps({**PLAN, "description": "#"}).encode().replace(b"#", b"\xff"),
    "lone surrogate": json.dumps({**PLAN, "description": "\ud800"}).encode(),
    "lone surrogate in a name": json.dumps({**PLAN, "\udfff": "a"}).encode(),
    "lone surrogate in the payload": json.dumps({**PLAN, "payload": {"a": "\ud800"}}).encode(),
    "lone surrogate in the spec": json.dumps({**PLAN, "when": "every \ud800"}).encode(),
    "deep array": b"[" * 100_000,
    "deep payload": b'{"payload":' * 50_000 + b"1" + b"}" * 50_000,
    "long number": b'{"when": %b}' % (b"1" * 10_000),
}


@pytest.mark.parametrize("body", BAD_JSONS.values(), ids=BAD_JSONS)
def test_broken_json_body_is_400(shop, body):
    check_refusal(speak(shop, post_of("/schedule-job.json", body, JSON)), 400)
    assert shop.jobs("ACTIVE") == []


@pytest.mark.parametrize("kind", [URLENCODED, MULTIPART, JSON])
def test_text_of_over_a_mebibyte_is_413(shop, kind):
    long = "a" * (scrapy_do.TEXT_BYTES + 1)
    parts = b"\r\n".join([*PLAN_PARTS, part_of("description", long.encode()), CLOSING])
    bodies = {URLENCODED: b"description=" + long.encode(), MULTIPART: parts, JSON: json.dumps({"description": long}).encode()}
    check_refusal(speak(shop, post_of("/schedule-job.json", bodies[kind], kind)), 413)


SIZE = b"%x" % len(PLAN_URLENCODED)
ONE_CHUNK = PLAN_URLENCODED + b"\r\n0\r\n\r\n"
CHUNKS = {
    "one": SIZE + b"\r\n" + ONE_CHUNK,
    "capitals": SIZE.upper() + b"\r\n" + ONE_CHUNK,
    "zeros": SIZE.rjust(15, b"0") + b"\r\n" + ONE_CHUNK[:-5] + b"000\r\n\r\n",
    "extensions": SIZE + b' ; name="a b";x\r\n' + ONE_CHUNK[:-5] + b"0;last\r\n\r\n",
    "trailers": SIZE + b"\r\n" + ONE_CHUNK[:-2] + b"Content-Length: 5\r\nX: y\r\n\r\n",
}


@pytest.mark.parametrize("how", ["whole", "bytewise"])
@pytest.mark.parametrize("body", CHUNKS.values(), ids=CHUNKS)
def test_chunked_body_is_read_and_the_next_request_found(shop, body, how):
    with Line(shop) as line:
        request = chunked_post_of("/schedule-job.json", body) + head_of("/list-projects.json")
        (line.send if how == "whole" else line.send_bytewise)(request)
        assert description_of(shop, line.answer()) == ""
        assert json.loads(line.answer()[2]) == {"status": "ok", "projects": ["shop"]}


BAD_CHUNKS = {
    "no size": b"\r\n" + ONE_CHUNK,
    "not hexadecimal": b"xyz\r\n" + ONE_CHUNK,
    "prefix": b"0x" + SIZE + b"\r\n" + ONE_CHUNK,
    "plus": b"+" + SIZE + b"\r\n" + ONE_CHUNK,
    "minus": b"-" + SIZE + b"\r\n" + ONE_CHUNK,
    "underscore": b"_".join([SIZE[:1], SIZE[1:]]) + b"\r\n" + ONE_CHUNK,
    "space before": b" " + SIZE + b"\r\n" + ONE_CHUNK,
    "line feed": SIZE + b"\n" + ONE_CHUNK + b"\r\n",
    "line feed in an extension": SIZE + b";a\nb\r\n" + ONE_CHUNK,
    "carriage return in an extension": SIZE + b";a\rb\r\n" + ONE_CHUNK,
    "too small": b"3\r\n" + ONE_CHUNK,
    "too large": SIZE + b"\r\n" + PLAN_URLENCODED[:-1] + b"\r\n0\r\n\r\n",
    "no line break after": SIZE + b"\r\n" + PLAN_URLENCODED + b"0\r\n\r\n",
    "40 digits": b"0" * 40 + b"\r\n\r\n",
    "endless extension": SIZE + b";" + b"a" * 100_000,
    "endless size": b"1" * 100_000,
    "endless trailers": SIZE + b"\r\n" + ONE_CHUNK[:-2] + b"X: y\r\n" * 1000,
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_broken_chunked_body_is_400_and_closes(shop, body):
    with Line(shop) as line:
        line.send(chunked_post_of("/schedule-job.json", body))
        assert "chunk" in check_refusal(line.answer(), 400)
        assert line.is_closed()
    assert shop.jobs("ACTIVE") == []


def test_expectation_is_met_before_the_body_comes(site):
    body = b"\r\n".join([part_of("archive", stub_project(), '; filename="a.zip"'), CLOSING])
    with Line(site) as line:
        line.send(post_of("/push-project.json", body, MULTIPART, "Expect: 100-Continue")[: -len(body)])
        assert line.answer()[0] == 100
        line.send(body + head_of("/list-projects.json"))
        assert json.loads(line.answer()[2])["name"] == "shop"
        assert json.loads(line.answer()[2])["projects"] == ["shop"]


def test_expectation_is_met_for_a_chunked_body(shop):
    with Line(shop) as line:
        line.send(head_of("/schedule-job.json", "Transfer-Encoding: chunked", "Expect: 100-continue", method="POST"))
        assert line.answer()[0] == 100
        line.send(chunks_of(PLAN_URLENCODED, 10))
        assert description_of(shop, line.answer()) == ""


@pytest.mark.parametrize(
    ("path", "lines", "status"),
    [
        ("/push-project.json", ["Content-Length: 9999999999", "Expect: 100-continue"], 413),
        ("/push-project.json", ["Content-Length: ten", "Expect: 100-continue"], 400),
        ("/nothing", ["Content-Length: 10", "Expect: 100-continue"], 404),
        ("/status.json", ["Content-Length: 10", "Expect: 100-continue"], 405),
        ("/push-project.json?a=b", ["Content-Length: 10", "Expect: 100-continue"], 400),
        ("/push-project.json", ["Content-Length: 10", "Expect: a miracle"], 417),
    ],
)
def test_expectation_of_a_refused_request_is_not_met(site, path, lines, status):
    with Line(site) as line:
        line.send(head_of(path, *lines, method="POST"))
        check_refusal(line.answer(), status)
        assert line.is_closed()


def test_expectation_of_http_1_0_is_ignored(shop):
    """RFC 9110, section 10.1.1: HTTP/1.0 knows no 100."""
    lines = [f"Content-Length: {len(PLAN_URLENCODED)}", "Expect: 100-continue"]
    request = head_of("/schedule-job.json", *lines, method="POST", version="1.0") + PLAN_URLENCODED
    assert description_of(shop, speak(shop, request)) == ""


def test_declared_length_over_the_limit_is_413_without_waiting(site):
    with Line(site) as line:
        line.send(head_of("/push-project.json", f"Content-Length: {4 * scrapy_do.MIB + 1}", method="POST"))
        assert "4 MiB; see --max-upload" in check_refusal(line.answer(), 413)
        assert line.is_closed()


def test_body_of_exactly_the_limit_is_read(site):
    message = check_refusal(speak(site, post_of("/push-project.json", b"archive=".ljust(4 * scrapy_do.MIB, b"a"))), 400)
    assert "zip" in message


def test_chunked_body_that_grows_over_the_limit_is_413(site, tmp_path):
    with Line(site) as line:
        line.send(chunked_post_of("/push-project.json", b"fffffff\r\narchive=" + bytes(5 * scrapy_do.MIB)))
        check_refusal(line.answer(), 413)
        assert line.is_closed()
    assert os.listdir(tmp_path / "data" / "work") == []


@pytest.mark.parametrize("kind", ["length", "chunked"])
def test_client_that_sends_all_before_it_listens_sees_the_413(site, kind):
    body = bytes(16 * scrapy_do.MIB)
    length = {"length": f"Content-Length: {len(body)}", "chunked": "Transfer-Encoding: chunked"}[kind]
    with Line(site) as line:
        line.send(head_of("/push-project.json", length, method="POST"))
        line.socket.sendall(body if kind == "length" else b"1000000\r\narchive=" + body)  # not reset
        check_refusal(line.answer(), 413)


# Heads


def long_head(count):
    """Return a head with so many headers."""
    return head_of("/status.json", *(f"X-{number}: y" for number in range(count - 1)))


POST = "POST /cancel-job.json HTTP/1.1\r\nHost: localhost\r\n"
MALFORMED = {
    "nonsense": ("nonsense\r\n\r\n", 400),
    "empty": ("\r\n\r\n", 400),
    "bytes": ("\x16\x03\x01\x02\x00\x01\x00\xff\r\n\r\n", 400),
    "no version": ("GET /status.json\r\n\r\n", 400),
    "small letters in the version": ("GET /status.json http/1.1\r\nHost: localhost\r\n\r\n", 400),
    "two spaces": ("GET  /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "space at the end": ("GET /status.json HTTP/1.1 \r\nHost: localhost\r\n\r\n", 400),
    "space in the path": ("GET /status .json HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "space before": (" GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "method that is no token": ("G(T /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "version 1.10": ("GET /status.json HTTP/1.10\r\nHost: localhost\r\n\r\n", 400),
    "version 2": ("GET /status.json HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    "preface of version 2": ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "version 0.9": ("GET /status.json HTTP/0.9\r\nHost: localhost\r\n\r\n", 505),
    "address too long": (f"GET /{'a' * 9000} HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "query too long": (f"GET /list-jobs.json?id={'a' * 9000} HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "head too long": (f"GET /status.json HTTP/1.1\r\nHost: localhost\r\nX: {'a' * 70_000}\r\n\r\n", 431),
    "head without an end": (f"GET /status.json HTTP/1.1\r\nHost: localhost\r\nX: {'a' * 70_000}", 431),
    "too many headers": (long_head(101).decode(), 431),
    "no colon": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nnonsense\r\n\r\n", 400),
    "space before the colon": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n", 400),
    "no name": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\n: y\r\n\r\n", 400),
    "name that is no token": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nX(: y\r\n\r\n", 400),
    "name that is not ASCII": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nŻ: y\r\n\r\n", 400),
    "continued line": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nX: y\r\n z\r\n\r\n", 400),
    "continued line, first": ("GET /status.json HTTP/1.1\r\n Host: localhost\r\nHost: localhost\r\n\r\n", 400),
    "carriage return": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nX: a\rContent-Length: 5\r\n\r\n", 400),
    "line feed": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nX: a\nContent-Length: 5\r\n\r\n", 400),
    "line feed after the request": ("GET /status.json HTTP/1.1\nHost: localhost\r\n\r\n", 400),
    "NUL": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
    "no Host": ("GET /status.json HTTP/1.1\r\n\r\n", 400),
    "two Hosts": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nhost: x\r\n\r\n", 400),
    "two lengths": (POST + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nid=a", 400),
    "two lengths that agree": (POST + "Content-Length: 4\r\nContent-Length: 4\r\n\r\nid=a", 400),
    "two lengths in a line": (POST + "Content-Length: 4, 4\r\n\r\nid=a", 400),
    "length and chunked": (POST + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked and length": (POST + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
    "length +4": (POST + "Content-Length: +4\r\n\r\nid=a", 400),
    "length -1": (POST + "Content-Length: -1\r\n\r\nid=a", 400),
    "length 0x10": (POST + "Content-Length: 0x10\r\n\r\nid=a", 400),
    "length 1e3": (POST + "Content-Length: 1e3\r\n\r\nid=a", 400),
    "length 1_0": (POST + "Content-Length: 1_0\r\n\r\nid=a", 400),
    "length 4.0": (POST + "Content-Length: 4.0\r\n\r\nid=a", 400),
    "length ４": (POST + "Content-Length: ４\r\n\r\nid=a", 400),
    "length ²": (POST.encode() + b"Content-Length: \xb2\r\n\r\nid=a", 400),
    "empty length": (POST + "Content-Length:\r\n\r\nid=a", 400),
    "length of 30 digits": (POST + f"Content-Length: {'9' * 30}\r\n\r\nid=a", 400),
    "length of 18 digits": (POST + f"Content-Length: {'9' * 18}\r\n\r\nid=a", 413),
    "bad length of a GET": ("GET /status.json HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
    "unknown coding": (POST + "Transfer-Encoding: gzip\r\n\r\nid=a", 501),
    "two codings": (POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "chunked twice": (POST + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501),
    "chunked and identity": (POST + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 400),
    "empty coding": (POST + "Transfer-Encoding:\r\n\r\nid=a", 501),
    "vertical tab and chunked": (POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 501),
    "two content types": (POST + "Content-Type: a\r\nContent-Type: b\r\n\r\n", 400),
    "path that is not UTF-8": ("GET /get-log/data/%ff.out HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "raw path that is not UTF-8": (b"GET /get-log/data/\xff.out HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "path with a surrogate": ("GET /get-log/data/%ed%a0%80.out HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
}


@pytest.mark.parametrize(("head", "status"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_head_is_refused_and_the_connection_closed(site, head, status):
    with Line(site) as line:
        line.send(head if isinstance(head, bytes) else head.encode())
        answer = line.answer()
        check_refusal(answer, status)
        assert answer[1]["Connection"] == "close"
        assert line.is_closed()
    site.get("status")


SOUND = {
    "empty line first": b"\r\n" + head_of(),
    "a hundred headers": long_head(100),
    "long address": head_of("/status.json?" + "&" * 8000),
    "absolute address": head_of("http://127.0.0.1:80/status.json"),
    "absolute address, capitals": head_of("HTTPS://LOCALHOST/status.json"),
    "encoded letter": head_of("/st%61tus.json"),
    "empty Host": b"GET /status.json HTTP/1.1\r\nHost:\r\n\r\n",
    "no space after the colon": b"GET /status.json HTTP/1.1\r\nhost:localhost\r\nX:\t y \t\r\nX:\r\n\r\n",
    "bytes in a value": b"GET /status.json HTTP/1.1\r\nHost: localhost\r\nX: \xff\xc5\xbc\r\n\r\n",
    "no Host in 1.0": b"GET /status.json HTTP/1.0\r\n\r\n",
    "version 1.9": head_of(version="1.9"),
    "length 0": head_of("/status.json", "Content-Length: 000"),
}


@pytest.mark.parametrize("head", SOUND.values(), ids=SOUND)
def test_unusual_but_sound_head_is_answered(site, head):
    status, headers, body = speak(site, head)
    assert (status, headers["Content-Type"], json.loads(body)["status"]) == (200, "application/json", "ok")


@pytest.mark.parametrize(
    "path",
    [
        "../state.json", "../../state.json", "%2e%2e/state.json", "..%2fstate.json", "%2e%2e%2fstate.json", "{}.out%00",
        "{}%00.out", "{}.out/", "./{}.out", "%2e/{}.out", "{}.out%0a", "{}", "{}.zip", "{}.OUT", "%zz", "%", "", "/{}.out",
        "..%5cstate.json", "%252e%252e%252fstate.json", "x/../{}.out", ".out", "{}.out.", "{}.out%20", "{}.out%09", "{}.out;x=1",
        "..;/{}.out", "{}.out/../{}.err", "{}.out/..", "{}.out#x", "\\{}.out", "%5c{}.out", "{}.out%2500", "{}%252eout", "%257b{}.out", "{}%2eout%2f", "{upper}.out",
        "..%ef%bc%8fstate.json", "..%c0%afstate.json", "%c0%ae%c0%ae/state.json", "{}.out%c0%80", "%e0%80%ae%e0%80%ae/state.json",
        "{{{}}}.out", "urn:uuid:{}.out", "%u002e%u002e/state.json", "{}.%6fut.", "{}.out%0d%0aX:%20y",
    ],
)  # fmt: skip
@pytest.mark.parametrize("start", ["", "http://localhost", "HTTP://LOCALHOST:80"], ids=["path", "address", "address and port"])
def test_odd_path_to_a_log_is_refused(shop, path, start):
    identifier = shop.schedule(when="every 9 days").replace("0", "a")
    target = f"{start}/get-log/data/{path.format(*[identifier] * 2, upper=identifier.upper())}"
    check_refusal(speak(shop, head_of(target)), 400 if "%c0" in path or "%e0" in path else 404)


def test_random_bytes_as_a_head_are_refused(site):
    dice = random.Random(7)
    words = [b"GET", b" ", b"/", b"status.json", b" HTTP/1.1", b"\r\n", b"Host: localhost", b":", b"\0", b"\xff", b"%", b"?", b"=", b"\n"]
    for _ in range(100):
        noise = b"".join(dice.choice(words) if dice.random() < 0.9 else dice.randbytes(3) for _ in range(dice.randrange(12)))
        with Line(site) as line:
            line.send(noise + b"\r\n\r\n")
            status, headers, body = line.answer()
            assert status == 200 or check_refusal((status, headers, body), 400, 404, 405, 505)
    site.get("status")


# Connections


def test_connection_serves_many_requests(shop):
    with Line(shop) as line:
        for _ in range(50):
            line.send(head_of("/list-projects.json"))
            status, headers, body = line.answer()
            assert (status, json.loads(body)["projects"]) == (200, ["shop"])
            assert headers["Connection"] != "close"
            line.send(post_of("/cancel-job.json", QUERY))
            check_refusal(line.answer(), 404)  # an error does not end the connection, when its body was read
        line.send(head_of("/status.json", "Connection: close"))
        assert line.answer()[1]["Connection"] == "close"
        assert line.is_closed()


def test_requests_may_be_pipelined(shop):
    requests = [head_of("/list-projects.json"), post_of("/schedule-job.json", PLAN_URLENCODED), head_of("/nothing")]
    requests.append(chunked_post_of("/schedule-job.json", chunks_of(PLAN_URLENCODED, 5)))
    requests.append(post_of("/schedule-job.json", WHOLE + b"epilogue", MULTIPART))
    requests.append(post_of("/schedule-job.json", json.dumps(PLAN).encode(), JSON))
    with Line(shop) as line:
        line.send(b"".join(requests) * 3)
        assert [line.answer()[0] for _ in range(18)] == [200, 200, 404, 200, 200, 200] * 3
    assert len(shop.jobs("SCHEDULED")) == 12


def test_answer_is_utf_8_with_one_length_and_a_line_feed(shop):
    status, headers, body = speak(shop, head_of("/list-spiders.json?project=żółć爬虫%F0%9F%95%B7%0A"))
    assert "żółć爬虫\U0001f577" in check_refusal((status, headers, body), 404)
    assert "żółć爬虫\U0001f577".encode() in body
    assert body.count(b"\n") == 1
    assert headers.get_all("Content-Length") == [str(len(body))]
    assert headers.get_all("Content-Type") == ["application/json"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "request_",
    [
        head_of("/list-projects.json", "Content-Length: 5") + b"hello",
        head_of("/list-projects.json", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
        head_of("/nothing", "Content-Length: 5", method="POST") + b"hello",
        post_of("/status.json", b"hello"),
        post_of("/push-project.json", b"egg=" + b"a" * 1000),
    ],
    ids=["get with a body", "get with chunks", "unknown path", "wrong method", "refused half-way"],
)
def test_body_that_nobody_reads_closes_the_connection(site, request_):
    with Line(site) as line:
        line.send(request_ + head_of())
        assert line.answer()[1]["Connection"] == "close"
        assert line.is_closed()


@pytest.mark.parametrize(
    ("version", "wish", "stays"),
    [
        ("1.1", "X: y", True), ("1.1", "Connection: keep-alive", True), ("1.1", "Connection: Upgrade, CLOSE", False),
        ("1.0", "X: y", False), ("1.0", "Connection: Keep-Alive", True), ("1.0", "Connection: close", False),
    ],
)  # fmt: skip
def test_connection_stays_as_the_client_wishes(site, version, wish, stays):
    with Line(site) as line:
        line.send(head_of("/status.json", wish, version=version))
        status, headers, _ = line.answer()
        assert status == 200
        if version == "1.0" and stays:  # such a client would otherwise wait for the end of the connection
            assert headers["Connection"].lower() == "keep-alive"
        assert (headers["Connection"] == "close") is not stays
        if stays:
            line.send(head_of())
            assert line.answer()[0] == 200
        else:
            assert line.is_closed()


def test_chunked_body_in_http_1_0_closes_the_connection(shop):
    """RFC 9112, section 6.1: a proxy that knows only HTTP/1.0 has not understood where that body ends."""
    lines = ["Transfer-Encoding: chunked", "Connection: keep-alive"]
    with Line(shop) as line:
        line.send(head_of("/schedule-job.json", *lines, method="POST", version="1.0") + chunks_of(PLAN_URLENCODED, 9) + head_of())
        assert line.answer()[1]["Connection"] == "close"
        assert line.is_closed()


def test_three_hundred_connections_at_once_are_all_answered(site):
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(site)) for _ in range(300)]
        for line in lines:
            line.send(head_of("/list-projects.json", "Connection: close"))
        statuses = [line.answer()[0] for line in lines]
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= site.server.rules.max_connections


def test_connection_past_the_cap_is_503_at_once_until_another_ends(site, monkeypatch):
    site.limit(max_connections=5)
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(site)) for _ in range(5)]
        for line in lines:  # all threads have a connection now, which they keep
            line.send(head_of())
            assert line.answer()[0] == 200
        for _ in range(3):
            with Line(site) as line:  # told before it has asked
                assert "too many" in check_refusal(line.answer(), 503)
                assert line.is_closed()
        for line in lines:
            line.send(head_of())
            assert line.answer()[0] == 200
    wait_for(lambda: speak(site, head_of())[0] == 200)
    assert [speak(site, head_of("/status.json", "Connection: close"))[0] for _ in range(5)].count(200) >= 1


def test_thread_that_cannot_be_started_costs_one_connection(site, monkeypatch, capsys):
    def refuse(*args, **options):
        raise RuntimeError("can't start new thread")

    site.limit(max_connections=2)
    with monkeypatch.context() as patch:
        patch.setattr(scrapy_do.threading, "Thread", refuse)
        for _ in range(4):
            check_refusal(speak(site, head_of(f"/get-log/data/{UNKNOWN}.out")), 503)
    assert "Traceback" not in capsys.readouterr().err
    with Line(site) as first, Line(site) as second:
        for line in (first, second):
            line.send(head_of(f"/get-log/data/{UNKNOWN}.out"))
            assert line.answer()[0] == 404


def test_slow_connections_give_way_to_a_new_one(outside):
    site = outside("--max-connections", "200")
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(site)) for _ in range(450)]
        for line, start in zip(lines, itertools.cycle([b"", b"GET", head_of()[:-2], b"\r"])):
            line.send(start)
        statuses = []

        def is_answered():
            statuses.append(curl(site, "/status.json", "--max-time", "5")[0])  # be it by 503, nobody waits
            return statuses[-1] == 200

        wait_for(is_answered, 10)
        assert set(statuses) <= {200, 503}
        for _ in range(5):
            assert curl(site, "/status.json")[0] == 200
        assert psutil.Process(site.process.pid).num_threads() < 20


def test_a_connection_at_work_does_not_give_way(site, tmp_path, monkeypatch):
    monkeypatch.setattr(scrapy_do, "GRACE_SECONDS", 0.0)
    site.limit(max_connections=2)
    with Line(site) as worker, Line(site) as idle:
        worker.send(post_of("/cancel-job.json", QUERY)[:-1])
        idle.send(head_of())
        assert idle.answer()[0] == 200
        wait_for(lambda: speak(site, head_of())[0] == 200)
        assert idle.is_closed()
        worker.send(QUERY[-1:])
        check_refusal(worker.answer(), 404)


def test_an_answer_that_is_not_taken_costs_nobody_else_time(site):
    site.limit(request_timeout=0.5)
    with Line(site) as line:
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                line.socket.send(head_of() * 100)
        line.socket.setblocking(True)
        site.get("status")
        wait_for(lambda: site.server._connection_count == 0)
        site.get("status")


@pytest.mark.parametrize("count", [1, 2_000])
def test_answers_that_are_taken_late_arrive_whole(site, monkeypatch, count):
    site.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections have it from there
    names = [f"project{number}" for number in range(count)]
    monkeypatch.setattr(site.daemon, "projects", lambda: names)
    with Line(site) as line:
        for _ in range(60):
            line.send(head_of("/list-projects.json"))
            site.get("status")  # the other is answered by now, as far as there is room
        for _ in range(60):
            assert json.loads(line.answer()[2])["projects"] == names
        line.send(head_of())
        assert line.answer()[0] == 200


def test_connections_that_give_way_are_counted_once(site, monkeypatch):
    """One of them is found readable and has to give way in the same moment."""
    monkeypatch.setattr(scrapy_do, "GRACE_SECONDS", 0.0)
    site.limit(max_connections=2)
    is_asked, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(site.daemon, "projects", lambda: is_asked.set() or (go_on.wait(10) and []))
    with contextlib.ExitStack() as stack:
        idle, asking = (stack.enter_context(Line(site)) for _ in range(2))
        idle.send(head_of())
        assert idle.answer()[0] == 200
        asking.send(head_of("/list-projects.json"))
        assert is_asked.wait(10)  # the accept loop is held up here
        new = stack.enter_context(Line(site))
        idle.send(head_of())
        new.send(post_of("/cancel-job.json", QUERY)[:-1])
        go_on.set()
        assert asking.answer()[0] == 200
        asking.send(post_of("/cancel-job.json", QUERY)[:-1])
        wait_for(lambda: site.server._connection_count == 2 and not site.server._parked)
        check_refusal(speak(site, head_of()), 503)  # both connections are at work


SLOW = {
    "head": (b"GET /status.json HTTP/1.1\r\nX: ", b"a" * 10_000),
    "first line": (b"", b"a" * 10_000),
    "empty lines": (b"\r", b"\n\r" * 5_000),
    "body": (head_of("/cancel-job.json", "Content-Length: 99999", method="POST"), b"a" * 10_000),
    "archive": (post_of("/push-project.json", b"archive=").replace(b": 8", b": 99999"), b"a" * 10_000),
    "chunks": (chunked_post_of("/push-project.json", b"8\r\narchive=\r\n"), b"1\r\na\r\n" * 2_000),
    "chunk size": (chunked_post_of("/push-project.json", b""), b"0" * 10_000),
    "part": (head_of("/push-project.json", f"Content-Type: {MULTIPART}", "Content-Length: 99999", method="POST"), b"a" * 10_000),
}


@pytest.mark.parametrize(("start", "rest"), SLOW.values(), ids=SLOW)
def test_slow_client_is_cut_off_and_its_thread_freed(site, tmp_path, monkeypatch, short_time, start, rest):
    site.limit(max_connections=1)
    with Line(site) as line:
        line.send(start)
        assert line.drip(rest)
        check_refusal(line.answer(), 408, *([400] if rest[:2] in (b"00", b"\n\r") else []))
        wait_for(lambda: speak(site, head_of("/status.json", "Connection: close"))[0] == 200)  # though it stays connected
    assert os.listdir(tmp_path / "data" / "work") == []


def test_slow_second_request_is_cut_off_too(site, short_time):
    with Line(site) as line:
        line.send(head_of() + b"GET")
        assert line.answer()[0] == 200
        check_refusal(line.answer(), 408)
        assert line.is_closed()


def test_idle_connection_is_closed_and_its_thread_freed(site, monkeypatch, short_time):
    site.limit(max_connections=1)
    with Line(site) as line:
        line.send(head_of())
        assert line.answer()[0] == 200
        wait_for(lambda: speak(site, head_of())[0] == 200)
        line.file.read()  # to the end


def test_slow_upload_above_the_least_rate_is_taken(shop, monkeypatch):
    shop.limit(request_timeout=1.0)
    monkeypatch.setattr(scrapy_do, "BODY_BYTES_PER_SECOND", 1)
    body = PLAN_URLENCODED + b"&description=" + b"a" * 100
    with Line(shop) as line:
        line.send(post_of("/schedule-job.json", body)[: -len(body)])
        line.drip(body)
        assert description_of(shop, line.answer()) == "a" * 100


ARCHIVE_PART = part_of("archive", stub_project(), '; filename="a.zip"')
BROKEN_OFF = {
    "nothing": b"",
    "half a head": head_of()[:20],
    "half a length": post_of("/cancel-job.json", QUERY)[:-5],
    "half an archive": post_of("/push-project.json", ARCHIVE_PART, MULTIPART)[:-50],
    "half an archive in chunks": chunked_post_of("/push-project.json", chunks_of(ARCHIVE_PART, 50)[:-60], MULTIPART),
    "half an archive, urlencoded": post_of("/push-project.json", b"archive=" + b"%41" * 99)[:-2],
    "half a JSON object": post_of("/schedule-job.json", json.dumps(PLAN).encode(), JSON)[:-2],
    "a promise": head_of("/push-project.json", "Content-Length: 99", "Expect: 100-continue", method="POST"),
    "whole": head_of(),
}


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("data", BROKEN_OFF.values(), ids=BROKEN_OFF)
def test_client_that_goes_leaves_nothing_behind(site, tmp_path, monkeypatch, capsys, data, is_reset):
    site.limit(max_connections=1)
    with Line(site) as line:
        line.send(data)
        if is_reset:
            line.reset()
    wait_for(lambda: speak(site, head_of("/status.json", "Connection: close"))[0] == 200)
    assert os.listdir(tmp_path / "data" / "work") == []
    assert "Traceback" not in capsys.readouterr().err


def test_client_that_goes_in_the_midst_of_a_log_leaves_nothing_behind(shop, tmp_path, monkeypatch, capsys):
    job = shop.wait_job(shop.schedule())
    (tmp_path / "data" / "logs" / f"{job['identifier']}.out").write_bytes(bytes(20 * scrapy_do.MIB))
    with Line(shop) as line:
        line.send(head_of(f"/get-log/data/{job['identifier']}.out"))
        assert line.file.read(15) == b"HTTP/1.1 200 OK"
        line.reset()
    shop.get("status")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/status.json", "/push-project.json"])
def test_crash_is_500_and_its_traceback_only_in_the_log(site, tmp_path, monkeypatch, capsys, path):
    def crash(*args, **form):
        raise RuntimeError("a secret")

    monkeypatch.setitem(scrapy_do.ROUTES, path, scrapy_do.ROUTES[path]._replace(answer=crash))
    with Line(site) as line:
        line.send(head_of(path) if path == "/status.json" else post_of(path, b"archive=x"))
        line.send(head_of("/list-projects.json"))
        message = check_refusal(line.answer(), 500)
        assert json.loads(line.answer()[2])["projects"] == []
    assert "secret" not in message
    assert "Runtime" not in message
    printed = capsys.readouterr()
    assert (printed.err.count("Traceback"), printed.err.count("RuntimeError: a secret"), printed.out) == (1, 1, "")
    assert os.listdir(tmp_path / "data" / "work") == []


# Who may ask


USERS = {"ala": "kot:1", "żółw": "hasło", "o'hara \"x\"": "a\\b"}


@pytest.fixture
def guarded(site, monkeypatch):
    """Return a running daemon with users, which answers a wrong password soon."""
    monkeypatch.setattr(scrapy_do, "PENALTY_SECONDS", 0.05)
    site.limit(users=USERS)
    return site


def curl(site, path, *options, scheme="http"):
    """Return the status and the JSON that curl has got."""
    command = ["curl", "-sS", "--max-time", "30", "-w", "%{http_code}", f"{scheme}://localhost:{site.port}{path}", *options]
    printed = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    return int(printed[-3:]), json.loads(printed[:-3])


def challenge_of(site, *lines):
    """Return the fields of the first challenge, and how many there are, that a refused request is answered with."""
    status, headers, _ = speak(site, head_of("/status.json", *lines))
    assert status == 401
    challenges = headers.get_all("WWW-Authenticate")
    return dict(re.findall(r'(\w+)="?([^",]*)"?', challenges[0])), challenges


def digest_line(made, user="ala", password="kot:1", target="/status.json", way="SHA-256", quality="auth", **changes):
    """Return the Authorization header for a GET, RFC 7616, with some fields changed afterwards; None drops one."""

    def h(*texts):
        return hashlib.new({"MD5": "md5"}.get(way, "sha256"), ":".join(texts).encode()).hexdigest()

    fields = {"username": user, "realm": "scrapy-do", "nonce": made, "uri": target, "algorithm": way, "qop": quality}
    fields |= {"nc": "00000001", "cnonce": "abc"}
    fields["response"] = h(h(user, "scrapy-do", password), made, "00000001", "abc", quality, h("GET", target))
    fields |= changes
    return "Authorization: Digest " + ", ".join(f'{name}="{value}"' for name, value in fields.items() if value is not None)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("way", ["--digest", "--anyauth"])
def test_curl_comes_in_with_a_password(guarded, way, user):
    options = [way, "-u", f"{user}:{USERS[user]}"]
    assert curl(guarded, "/list-projects.json?", *options)[0] == 200
    assert curl(guarded, f"/list-jobs.json?id={NOBODY}&x=ż%20%ff", *options)[0] == 400
    assert curl(guarded, "/cancel-job.json", *options, "-d", f"id={NOBODY}")[0] == 404
    assert curl(guarded, "/list-projects.json", way, "-u", f"{user}:x")[0] == 401
    assert curl(guarded, "/list-projects.json")[0] == 401


def test_curl_pushes_with_a_password(guarded, tmp_path):
    (tmp_path / "shop.zip").write_bytes(make_zip({"big.bin": random.Random(1).randbytes(3_000_000), "scrapy.cfg": CONFIG, **FILES}))
    for way in ("--digest", "--anyauth"):
        status, answer = curl(guarded, "/push-project.json", way, "-u", "ala:kot:1", "-F", f"archive=@{tmp_path}/shop.zip")
        assert (status, answer.get("spiders")) == (200, ["quick"])


def test_requests_comes_in_with_a_password(guarded):
    session = requests.Session()
    session.auth = requests.auth.HTTPDigestAuth("ala", "kot:1")
    for _ in range(2):
        assert session.get(f"http://localhost:{guarded.port}/list-projects.json").json()["projects"] == []
        answer = session.post(f"http://localhost:{guarded.port}/push-project.json", data={"archive": stub_project()})
        assert answer.json()["spiders"] == ["quick"]
        session.post(f"http://localhost:{guarded.port}/remove-project.json", data={"name": "shop"})
    assert requests.get(f"http://localhost:{guarded.port}/status.json", auth=("ala", "kot:1")).status_code == 401
    session.close()


@pytest.mark.parametrize("path", [*GET_ROUTES, *POST_ROUTES, "/nothing", f"/get-log/data/{NOBODY}.err"])
def test_nothing_is_answered_without_a_password(guarded, path):
    method = "POST" if path in POST_ROUTES else "GET"
    with Line(guarded) as line:
        line.send(head_of(path, "Content-Length: 3000000", "Expect: 100-continue", method=method))
        status, headers, body = line.answer()  # the body is not waited for, nor asked for
    assert (status, json.loads(body)["status"], headers["Connection"]) == (401, "error", "close")
    assert "--anyauth -u" in json.loads(body)["msg"]


@pytest.mark.parametrize("algorithm", ["SHA-256", "MD5"])
def test_digest_with_the_right_proof_comes_in_until_the_nonce_expires(guarded, monkeypatch, algorithm):
    fields, challenges = challenge_of(guarded)
    assert [("SHA-256" in way, "MD5" in way) for way in challenges] == [(True, False), (False, True)]
    line = digest_line(fields["nonce"], way=algorithm)
    with Line(guarded) as connection:
        for _ in range(2):  # a nonce may be used again
            connection.send(head_of("/status.json", line))
            assert connection.answer()[0] == 200
        monkeypatch.setattr(scrapy_do, "NONCE_SECONDS", -1)
        connection.send(head_of("/status.json", line))
        status, headers, _ = connection.answer()
    assert (status, ["stale=true" in way for way in headers.get_all("WWW-Authenticate")]) == (401, [True, True])


def test_a_nonce_lives_for_half_its_time_at_least(guarded, monkeypatch):
    monkeypatch.setattr(scrapy_do, "NONCE_SECONDS", 2.0)
    began = time.monotonic()
    request = head_of("/status.json", digest_line(challenge_of(guarded)[0]["nonce"]))
    wait_for(lambda: speak(guarded, request)[0] == 401)
    assert 1 <= time.monotonic() - began < 4


WRONG_DIGESTS = {
    "password": {"password": "x"}, "user": {"user": "ola"}, "user without a password": {"user": "ola", "password": ""}, "user of another case": {"user": "Ala"}, "no user": {"username": None},
    "target": {"target": "/list-projects.json"}, "uri": {"uri": "/status.json?"}, "no uri": {"uri": None},
    "qop": {"quality": "auth-int"}, "qop of the field": {"qop": "auth-int"}, "no qop": {"qop": None}, "nc": {"nc": "2"}, "no nc": {"nc": None}, "cnonce": {"cnonce": "x"},
    "response": {"response": "0" * 64}, "no response": {"response": None}, "response that is not ASCII": {"response": "ż"},
    "algorithm": {"algorithm": "MD5"}, "no algorithm": {"algorithm": None}, "unknown algorithm": {"way": "SHA-512-256"},
    "session algorithm": {"way": "MD5-sess"}, "nonce": {"nonce": "1-x"}, "no nonce": {"nonce": None},
}  # fmt: skip


@pytest.mark.parametrize("changes", WRONG_DIGESTS.values(), ids=WRONG_DIGESTS)
def test_wrong_digest_is_refused_and_logged(guarded, capsys, changes):
    _, challenges = challenge_of(guarded, digest_line(challenge_of(guarded)[0]["nonce"], **changes))
    assert not [way for way in challenges if "stale" in way]
    lines = [line for line in capsys.readouterr().err.splitlines() if "refused" in line]
    assert [line[20:] for line in lines] == ["GET /status.json from 127.0.0.1 was refused with 401: the user or the password is wrong"]


@pytest.mark.parametrize("nonce", ["", "0-", "ffffffffff-x", "1" * 9999, "-", "zz-zz", "1-" + "0" * 64])
def test_a_nonce_that_the_daemon_has_not_made_is_stale(guarded, nonce):
    assert "stale=true" in challenge_of(guarded, digest_line(nonce))[1][0]


def test_a_nonce_of_another_daemon_is_stale(guarded):
    made = challenge_of(guarded)[0]["nonce"]
    assert speak(guarded, head_of("/status.json", digest_line(made)))[0] == 200
    guarded.limit()  # as a restart does, this draws another secret
    for nonce in (made, f"{int(time.monotonic()):x}-{'0' * 64}"):
        assert "stale=true" in challenge_of(guarded, digest_line(nonce))[1][0]


@pytest.mark.parametrize(
    "value",
    ["Digest", "Digest ,,,,", 'Digest username="', "Basic", "Basic !", "Bearer x", "x", 'Digest a="' * 3000, "Digest " + "a" * 60_000],
    ids=lambda value: value[:12],
)
def test_nonsense_as_credentials_is_401(guarded, value):
    before = time.process_time()
    assert len(challenge_of(guarded, f"Authorization: {value}")[1]) == 2
    assert time.process_time() - before < 2


def test_a_wrong_password_is_answered_late_and_holds_nobody_else_up(site, monkeypatch):
    monkeypatch.setattr(scrapy_do, "PENALTY_SECONDS", 1.5)
    site.limit(users=USERS)
    nonce = challenge_of(site)[0]["nonce"]
    for user, password in (("ala", "x"), ("ola", "kot:1")):
        with Line(site) as guesser:
            began = time.monotonic()
            guesser.send(head_of("/status.json", digest_line(nonce, user, password)))
            assert speak(site, head_of("/status.json", digest_line(nonce)))[0] == 200
            assert not select.select([guesser.socket], [], [], 0)[0]
            status, _, body = guesser.answer()
            assert (status, json.loads(body)["msg"]) == (401, "the user or the password is wrong")
            assert time.monotonic() - began >= 1.5


AUTH_FILES = {
    "group may read": ("ala:kot", 0o640, "chmod 600"),
    "others may write": ("ala:kot", 0o602, "chmod 600"),
    "no colon": ("ala:kot\nola sekret\n", 0o600, "line 2 of"),
    "no user": (":sekret", 0o600, "line 1 of"),
    "no password": ("ala:", 0o600, "line 1 of"),
    "user twice": ("ala:kot\n\nala:sekret", 0o600, "line 3 of"),
    "empty": ("\n\r\n \n", 0o600, "has no users"),
    "not UTF-8": (b"ala:\xff", 0o600, "utf-8"),
    "missing": (None, 0, "No such file"),
    "folder": (None, 0o700, "Is a directory"),
}


@pytest.mark.parametrize(("content", "mode", "sentence"), AUTH_FILES.values(), ids=AUTH_FILES)
def test_a_bad_file_of_users_stops_the_start(tmp_path, content, mode, sentence):
    path = tmp_path / "users"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
    elif mode:
        path.mkdir()
    status, said = run_main("--port", "0", "--auth-file", str(path), "--data-dir", str(tmp_path / "data"))
    assert (status, said.count("\n")) == (1, 1)
    assert sentence in said
    assert str(path) in said
    assert "sekret" not in said


@pytest.mark.parametrize("host", ["0.0.0.0", ""])
def test_other_machines_are_let_in_by_password_or_by_decision(outside, tmp_path, host):
    status, said = run_main("--port", "0", "--host", host, "--data-dir", str(tmp_path / "data"))
    assert (status, said.count("\n")) == (1, 1)
    assert "--auth-file" in said
    assert "--no-auth" in said
    site = outside("--host", host, "--no-auth")
    assert site.get("status")
    site.stop()
    (tmp_path / "users").write_text("ala:kot\r\n\r\nola:\u00a0a : b \n")
    (tmp_path / "users").chmod(0o600)
    site = outside("--host", host, "--auth-file", str(tmp_path / "users"))
    assert curl(site, "/status.json", "--digest", "-u", "ala:kot")[0] == 200
    assert curl(site, "/status.json", "--digest", "-u", "ola:\u00a0a : b ")[0] == 200
    assert curl(site, "/status.json")[0] == 401


# TLS


def make_certificate(folder, name="localhost", password=None):
    """Write cert.pem and key.pem, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    now, names = datetime.datetime.now(datetime.timezone.utc), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder(names, names, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))


@pytest.fixture
def encrypted(site, tmp_path):
    """Return a running daemon that speaks TLS."""
    make_certificate(tmp_path)
    site.limit(tls=scrapy_do.Tls(tmp_path / "cert.pem", tmp_path / "key.pem", None))
    site.cacert = ("--cacert", str(tmp_path / "cert.pem"))
    return site


def test_curl_speaks_tls(encrypted, tmp_path):
    archive = tmp_path / "shop.zip"
    archive.write_bytes(make_zip({"big.bin": random.Random(1).randbytes(3_000_000), "scrapy.cfg": CONFIG, **FILES}))
    assert curl(encrypted, "/push-project.json", *encrypted.cacert, "-F", f"archive=@{archive}", scheme="https")[0] == 200
    status, answer = curl(encrypted, "/schedule-job.json", *encrypted.cacert, "-d", PLAN_URLENCODED.decode(), scheme="https")
    assert status == 200
    log = encrypted.store.log_file(answer["identifier"], "err")
    log.write_bytes(json.dumps({"log": "x" * 5_000_000}).encode())
    assert len(curl(encrypted, f"/get-log/data/{log.name}", *encrypted.cacert, scheme="https")[1]["log"]) == 5_000_000


def test_many_requests_come_over_one_tls_connection(encrypted, tmp_path):
    context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    line = socket.create_connection(("localhost", encrypted.port), 30)
    with context.wrap_socket(line, server_hostname="localhost") as line, line.makefile("rb") as file:
        for requests_ in [head_of(), head_of(f"/get-log/data/{UNKNOWN}.out"), head_of("/nothing")] * 5 + [head_of() * 100]:
            line.sendall(requests_)
            for _ in range(requests_.count(b"GET")):
                assert file.readline() in (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 404 Not Found\r\n")
                assert file.read(int(http.client.parse_headers(file)["Content-Length"])).endswith(b"}\n")


def test_the_end_of_a_tls_connection_is_said(encrypted, tmp_path):
    context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    line = socket.create_connection(("localhost", encrypted.port), 30)
    with context.wrap_socket(line, server_hostname="localhost", suppress_ragged_eofs=False) as line:
        line.sendall(head_of("/status.json", "Connection: close"))
        with line.makefile("rb") as file:
            assert file.read().endswith(b"}\n")  # otherwise it could have been cut off on the way


def test_basic_is_taken_over_tls_only(guarded, tmp_path):
    assert curl(guarded, "/status.json", "--basic", "-u", "ala:kot:1")[0] == 401
    make_certificate(tmp_path)
    tls = scrapy_do.Tls(tmp_path / "cert.pem", tmp_path / "key.pem", None)
    guarded.limit(tls=tls)
    cacert = ("--cacert", str(tmp_path / "cert.pem"))
    for way in ("--basic", "--digest", "--anyauth"):
        for user, password in (*USERS.items(), ("ala", "x"), ("ola", "kot:1"), ("ala", ""), ("ola", "")):
            status, _ = curl(guarded, "/list-projects.json", way, "-u", f"{user}:{password}", *cacert, scheme="https")
            assert status == (200 if USERS.get(user) == password else 401)


def test_tls_options_serve_https_with_an_encrypted_key(outside, tmp_path):
    make_certificate(tmp_path, password="zażółć")
    (tmp_path / "password").write_text("zażółć\n")
    files = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    site = outside(*files, "--tls-password-file", str(tmp_path / "password"))
    assert curl(site, "/status.json", "--cacert", str(tmp_path / "cert.pem"), scheme="https")[0] == 200
    assert "listens on https://" in site.log_path.read_text()
    site.stop()
    for wrong in ([], ["--tls-password-file", str(tmp_path / "cert.pem")], ["--tls-password-file", "nowhere"]):
        status, said = run_main("--port", "0", *files, *wrong, "--data-dir", str(tmp_path / "data"), stdin=subprocess.DEVNULL)
        assert (status, said.count("\n")) == (1, 1)
        assert "the certificate cannot be used" in said
        assert str(tmp_path / "key.pem") in said


def test_no_secret_of_the_daemon_reaches_a_spider_or_the_process_list(outside, tmp_path):
    make_certificate(tmp_path, password="kluczyk")
    for name, text in (("password", "kluczyk\n"), ("users", "ala:tajemnica\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    files = {"cert": "cert.pem", "key": "key.pem", "password-file": "password"}
    options = [word for name, path in files.items() for word in (f"--tls-{name}", str(tmp_path / path))]
    site = outside(*options, "--auth-file", str(tmp_path / "users"))
    seen = {}

    def look(process):
        """Look at a process that sleeps."""
        proc = pathlib.Path(f"/proc/{process.pid}")
        seen[proc] = [(proc / name).read_bytes() for name in ("cmdline", "environ")]
        assert sorted(os.listdir(proc / "fd")) == ["0", "1", "2"]

    def wait_sleep():
        daemon = psutil.Process(site.process.pid)
        return wait_for(lambda: next((child for child in daemon.children() if child.name() == "sleep"), None))

    def ask(path, *more):
        status, answer = curl(site, path, "--cacert", str(tmp_path / "cert.pem"), "-u", "ala:tajemnica", *more, scheme="https")
        assert status == 200, answer
        return answer

    scripts = {"list.sh": f"[ ! -e {tmp_path}/first ] || exec sleep 99; echo > {tmp_path}/first; echo hold", "hold.sh": "exec sleep 99"}
    (tmp_path / "shop.zip").write_bytes(make_zip({"scrapy.cfg": CONFIG, **scripts}))
    push = ("/push-project.json", "-F", f"archive=@{tmp_path}/shop.zip")
    ask(*push)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(ask, *push)
        look(child := wait_sleep())  # `scrapy list`
        child.kill()
        assert "exit code -9" in str(pushed.exception())
    job = ask("/schedule-job.json", "-d", "project=shop&spider=hold&when=now")["identifier"]
    look(wait_sleep())
    ask("/cancel-job.json", "-d", f"id={job}")
    assert curl(site, "/status.json", "-k", "--digest", "-u", "ala:tajemnik", scheme="https")[0] == 401
    seen["daemon"] = [pathlib.Path(f"/proc/{site.process.pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
    site.stop()
    secrets = ["tajemnica", "tajemnik", "kluczyk", (tmp_path / "key.pem").read_text().splitlines()[1]]
    kept = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    texts = [*itertools.chain(*seen.values()), site.log_path.read_bytes(), *kept]
    assert len(seen) == 3
    assert [secret for secret in secrets for text in texts if secret.encode() in text] == []


def test_a_renewed_certificate_is_used_without_a_restart(encrypted, tmp_path, capsys):
    old = (tmp_path / "old.pem").write_bytes((tmp_path / "cert.pem").read_bytes()) and ("--cacert", str(tmp_path / "old.pem"))
    (tmp_path / "cert.pem").write_text("half a certificate")
    assert curl(encrypted, "/status.json", *old, scheme="https")[0] == 200
    make_certificate(tmp_path, "renewed.example")
    assert curl(encrypted, "/status.json", *encrypted.cacert, scheme="https")[0] == 200
    with pytest.raises(subprocess.CalledProcessError):
        curl(encrypted, "/status.json", *old, scheme="https")
    said = capsys.readouterr().err
    assert (said.count("the former one stays in use"), said.count("the renewed certificate is in use")) == (1, 1)


def test_no_handshake_holds_others_up(encrypted, capsys):
    hello = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = hello.read()
    starts = [b"", hello[:1], hello[: len(hello) // 2], hello]
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(Line(encrypted)) for _ in range(40)]
        for line, start in zip(lines, itertools.cycle(starts)):
            line.send(start)
        assert curl(encrypted, "/status.json", *encrypted.cacert, scheme="https")[0] == 200
    for wrong in (head_of(), b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\0" * 100_000, hello + b"x" * 100):
        with Line(encrypted) as line:
            line.send(wrong)
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in line.file.read()
    assert curl(encrypted, "/status.json", *encrypted.cacert, scheme="https")[0] == 200
    assert "Traceback" not in capsys.readouterr().err


# Browsers

ORIGINS = {
    "another site": (["Origin: http://evil.example"], 403),
    "null": (["Origin: null"], 403),
    "another port": (["Origin: http://localhost:1"], 403),
    "no port": (["Origin: http://localhost"], 403),
    "another machine with our name in it": (["Origin: http://localhost:{port}.evil.example"], 403),
    "empty": (["Origin:"], 403),
    "extension": (["Origin: chrome-extension://abc"], 403),
    "cross-site": (["Sec-Fetch-Site: cross-site"], 403),
    "cross-site with our origin": (["Sec-Fetch-Site: cross-site", "Origin: http://localhost:{port}"], 403),
    "own page": (["Origin: http://localhost:{port}"], 404),
    "own page, capitals": (["Origin: HTTP://LOCALHOST:{port}"], 404),
    "own page behind TLS": (["Origin: https://localhost:{port}", "Sec-Fetch-Site: same-origin"], 404),
    "page of a name that was allowed": (["Origin: https://crawls.example"], 404),
    "curl": ([], 404),
}


@pytest.mark.parametrize("kind", [URLENCODED, MULTIPART, JSON, "text/plain"])
@pytest.mark.parametrize(("lines", "status"), ORIGINS.values(), ids=ORIGINS)
def test_a_page_of_another_site_changes_nothing(site, lines, status, kind):
    site.limit(allow_host=("Crawls.example",))
    body = {MULTIPART: part_of("id", NOBODY.encode()) + b"\r\n" + CLOSING, JSON: json.dumps({"id": NOBODY}).encode()}.get(kind, QUERY)
    lines = [f"Host: localhost:{site.port}", *(line.format(port=site.port) for line in lines)]
    head = "\r\n".join(["POST /cancel-job.json HTTP/1.1", *lines, f"Content-Type: {kind}", f"Content-Length: {len(body)}", "", ""])
    answer = speak(site, head.encode() + body)
    check_refusal(answer, 415 if status == 404 and kind == "text/plain" else status)
    assert "Access-Control-Allow-Origin" not in answer[1]
    if kind == URLENCODED:  # what only reads may be linked to from anywhere
        assert speak(site, ("GET /status.json HTTP/1.1\r\n" + "\r\n".join([*lines, "", ""])).encode())[0] == 200


HOSTS = {
    "localhost": 200, "localhost:7654": 200, "LocalHost.": 200, "127.0.0.1": 200, "127.0.0.1:80": 200, "192.0.2.7": 200,
    "[::1]:7654": 200, "[2001:db8::1]": 200, socket.gethostname(): 200, f"{socket.gethostname().upper()}:1": 200,
    "crawls.example": 200, "Crawls.Example:443": 200, "": 200,
    "evil.example": 403, "localhost.evil.example": 403, "127.0.0.1.evil.example": 403, "evil.example:7654": 403, "1.2.3": 403,
    "localhost:7654@evil.example": 403, "x.crawls.example": 403, "[evil.example]": 403, "a b": 403, "żółw": 403, "localhost/": 403,
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_foreign_name_is_refused(site, host, method):
    """A page can have its own name resolve to 127.0.0.1 after it was loaded; the browser then takes us for its site."""
    site.limit(allow_host=("Crawls.example",))
    path = "/status.json" if method == "GET" else "/cancel-job.json"
    status, _, _ = speak(site, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert status == (400 if (HOSTS[host], method) == (200, "POST") else HOSTS[host])


def test_host_of_an_absolute_address_counts(site):
    check_refusal(speak(site, head_of("http://evil.example/status.json")), 403)
    check_refusal(speak(site, head_of("http://user@localhost/status.json")), 403)


def test_names_are_allowed_by_an_option(outside):
    site = outside("--allow-host", "a.example", "--allow-host", "B.example")
    for name, status in (("a.example", 200), ("b.EXAMPLE", 200), ("c.example", 403)):
        assert speak(site, f"GET /status.json HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())[0] == status


# Logs


def test_log_of_a_running_crawl_grows(site, tmp_path):
    gates = tmp_path / "more", tmp_path / "end"
    wait = "while [ ! -e '{}' ]; do sleep 0.02; done"
    site.push(talker=f"echo one; echo two >&2; {wait.format(gates[0])}; echo three; {wait.format(gates[1])}")
    identifier = site.schedule("talker")
    wait_for(lambda: site.log(identifier, "out") == "one\n" and site.log(identifier, "err") == "two\n")
    gates[0].touch()
    wait_for(lambda: site.log(identifier, "out") == "one\nthree\n")
    assert site.job(identifier)["status"] == "RUNNING"
    gates[1].touch()
    assert site.wait_job(identifier)["status"] == "SUCCESSFUL"


def test_log_of_a_job_that_has_not_begun_is_empty(shop):
    identifier = shop.schedule(when="every 9 days")
    assert (shop.log(identifier, "out"), shop.log(identifier, "err")) == ("", "")


def test_log_is_handed_out_to_the_byte(shop, tmp_path):
    identifier = shop.wait_job(shop.schedule())["identifier"]
    content = random.Random(3).randbytes(5 * scrapy_do.MIB + 1)
    (tmp_path / "data" / "logs" / f"{identifier}.err").write_bytes(content)
    status, headers, body = shop.request("GET", f"/get-log/data/{identifier}.err")
    assert (status, headers["Content-Type"], body == content) == (200, "text/plain; charset=utf-8", True)


def test_log_that_is_not_utf_8_passes_unchanged(site):
    site.push(talker=r"printf 'a\377\376\000\305\274\r\n'")
    identifier = site.wait_job(site.schedule("talker"))["identifier"]
    assert speak(site, head_of(f"/get-log/data/{identifier}.out"))[2] == b"a\xff\xfe\0\xc5\xbc\r\n"


@pytest.mark.parametrize("thing", ["link", "dangling link", "folder", "pipe"])
def test_log_that_is_no_file_is_refused(shop, tmp_path, thing):
    identifier = shop.wait_job(shop.schedule())["identifier"]
    path = tmp_path / "data" / "logs" / f"{identifier}.out"
    path.unlink()
    (tmp_path / "secret").write_text("secret")
    make = {"link": lambda: path.symlink_to(tmp_path / "secret"), "dangling link": lambda: path.symlink_to("nowhere")}
    make |= {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make[thing]()
    with Line(shop) as line:
        line.send(head_of(f"/get-log/data/{identifier}.out"))
        is_answered = select.select([line.socket], [], [], 5)[0]
        if not is_answered:
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # lets the thread go that waits for a writer
        assert is_answered
        assert "secret" not in check_refusal(line.answer(), *range(400, 508))


TAILS = {
    "": "", "a": "a", "a\n": "a\n", "a\nb": "b", "a\nb\n": "b\n", "\n\n": "\n", "\n": "\n", "a\n\n": "\n",
}  # fmt: skip


@pytest.mark.parametrize(("content", "last"), TAILS.items())
def test_tail_gives_the_last_lines(shop, tmp_path, content, last):
    identifier = shop.wait_job(shop.schedule())["identifier"]
    path = tmp_path / "data" / "logs" / f"{identifier}.err"
    path.write_text(content)
    for count in (0, 1, 2, 10**9):
        status, _, body = shop.request("GET", f"/get-log/data/{identifier}.err?tail={count}")
        assert (status, body.decode()) == (200, "".join(content.splitlines(True)[-count:]) if count else "")
    assert shop.request("GET", f"/get-log/data/{identifier}.err?tail=1")[2].decode() == last


@pytest.mark.parametrize("size", [scrapy_do.CHUNK_BYTES + shift for shift in (-1, 0, 1)])
def test_tail_is_right_across_blocks(shop, tmp_path, size):
    identifier = shop.wait_job(shop.schedule())["identifier"]
    for content in (b"x\n" + b"a" * size, b"x\n" + b"a" * size + b"\n", b"x\n\n" * size, (b"a" * 99 + b"\n") * size):
        (tmp_path / "data" / "logs" / f"{identifier}.err").write_bytes(content)
        for count in (1, 2, 3, 700, 10 * size):
            body = shop.request("GET", f"/get-log/data/{identifier}.err?tail={count}")[2]
            assert body == b"".join(content.splitlines(True)[-count:])


RANGES = {
    "bytes=0-": "0123456789", "bytes=4-": "456789", "bytes=9-": "9", "bytes=0-0": "0", "bytes=2-4": "234", "bytes=5-99": "56789",
    "bytes=-3": "789", "bytes=-99": "0123456789", "bytes=10-": None, "bytes=99-": None, "bytes=-0": None, "bytes=5-4": None,
    "bytes=-": None,
}  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("asked", [*RANGES, "bytes=0-1,3-4", "lines=1-2", "bytes=a-", "bytes=٣-", ""])
def test_a_range_of_a_log_is_sent(shop, tmp_path, asked, method):
    identifier = shop.wait_job(shop.schedule())["identifier"]
    (tmp_path / "data" / "logs" / f"{identifier}.err").write_text("0123456789")
    path = f"/get-log/data/{identifier}.err"
    status, headers, body = speak(shop, head_of(path, f"Range: {asked}", method=method), method == "GET")
    part = RANGES.get(asked, "all")
    if part == "all":  # what is no single range may be ignored, RFC 9110 section 14.2
        assert (status, headers["Content-Range"], headers["Content-Length"]) == (200, None, "10")
    elif part is None:
        assert (status, headers["Content-Range"]) == (416, "bytes */10")
    else:
        start = "0123456789".index(part)
        assert (status, headers["Content-Range"]) == (206, f"bytes {start}-{start + len(part) - 1}/10")
        assert headers["Content-Length"] == str(len(part))
        assert body.decode() == (part if method == "GET" else "")


def test_curl_goes_on_with_a_log_that_was_cut_off(shop, tmp_path):
    identifier = shop.wait_job(shop.schedule())["identifier"]
    content = random.Random(5).randbytes(3_000_000)
    (tmp_path / "data" / "logs" / f"{identifier}.err").write_bytes(content)
    (tmp_path / "log").write_bytes(content[:1_234_567])
    url = f"http://localhost:{shop.port}/get-log/data/{identifier}.err"
    subprocess.run(["curl", "-sSf", "-C", "-", "-o", str(tmp_path / "log"), url], timeout=60, check=True)
    assert (tmp_path / "log").read_bytes() == content


def read_chunked(line):
    """Return the body of an answer that comes in chunks."""
    assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
    assert http.client.parse_headers(line.file)["Transfer-Encoding"] == "chunked"
    body = b""
    while size := int(line.file.readline(), 16):
        body += line.file.read(size)
        assert line.file.read(2) == b"\r\n"
    assert line.file.read(2) == b"\r\n"
    return body


def test_a_log_is_followed_until_its_crawl_has_ended(site, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    site.push(talker=f"while read line; do echo $line >&2; done < {gate}; printf 'no end' >&2")
    identifier = site.schedule("talker")
    url = f"http://localhost:{site.port}/get-log/data/{identifier}.err?follow=1"
    with subprocess.Popen(["curl", "-sSN", url], stdout=subprocess.PIPE) as curl, open(gate, "w") as writer:
        for line in ("one", "zażółć", "爬虫" * 1000):
            writer.write(line + "\n")
            writer.flush()
            assert curl.stdout.readline().decode() == line + "\n"
        writer.close()
        assert curl.stdout.read() == b"no end"
        assert curl.wait(30) == 0
    assert site.job(identifier)["status"] == "SUCCESSFUL"
    with Line(site) as line:  # what is over ends at once, and the connection stays
        line.send(head_of(f"/get-log/data/{identifier}.err?follow=1&tail=2") + head_of())
        assert read_chunked(line) == ("爬虫" * 1000 + "\nno end").encode()
        assert line.answer()[0] == 200


def test_a_log_is_followed_from_before_its_crawl_begins(inside):
    site = inside(job_slots=1)
    site.push(slow="while :; do sleep 0.05; done", talker="echo one; echo two; exit 3")
    first, second = site.schedule("slow"), site.schedule("talker")
    with Line(site) as line, Line(site) as old:
        line.send(head_of(f"/get-log/data/{second}.out?follow=1"))
        old.send(head_of(f"/get-log/data/{second}.out?follow=1&tail=1", version="1.0"))
        site.wait_job(first, "RUNNING")
        site.post("cancel-job", id=first)
        assert read_chunked(line) == b"one\ntwo\n"
        assert old.file.read().partition(b"\r\n\r\n")[2] == b"one\ntwo\n"


def test_who_follows_and_goes_costs_no_thread(site):
    site.push(slow="while :; do sleep 0.05; done")
    identifier = site.schedule("slow")
    for is_reset in (False, True):
        with Line(site) as line:
            line.send(head_of(f"/get-log/data/{identifier}.err?follow=1"))
            assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
            if is_reset:
                line.reset()
        wait_for(lambda: site.server._connection_count == 0)
    with Line(site) as line:
        line.send(head_of(f"/get-log/data/{identifier}.err?follow=1"))
        assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
        line.send(b"x" * 200_000)
        wait_for(lambda: site.server._connection_count == 0)
    site.post("cancel-job", id=identifier)


def test_a_stop_ends_those_who_follow(outside):
    site = outside()
    site.push(slow="while :; do sleep 0.05; done")
    identifier = site.schedule("slow")
    with Line(site) as line:
        line.send(head_of(f"/get-log/data/{identifier}.err?follow=1"))
        assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
        assert site.stop() == 0
        assert line.file.read().endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("query", ["follow=2", "follow=yes", "follow=", "tail=-1", "tail=x", "tail=1&tail=1", "tial=1", "tail=²"])
def test_wrong_parameters_of_a_log_are_400(shop, query):
    identifier = shop.schedule(when="every 9 days")
    check_refusal(speak(shop, head_of(f"/get-log/data/{identifier}.err?{query}")), 400)


# What cannot happen


def cut(data, places):
    """Return data in pieces."""
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return iter([data[start:end] for start, end in itertools.pairwise(ends)])


def plain(fields):
    """Return fields whose pieces are joined."""
    return [(name, b"".join(pieces).decode()) for name, pieces in fields]


PLACES = st.lists(st.integers(0, 10_000), max_size=20)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SNAGS = st.lists(st.sampled_from(["\r\n", "\r", "-", "--xYz", "\r\n--xYza", "%", "+", "&", "=", "4", '"', "\\"]))
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10)
FIELDS = st.dictionaries(NAMES, TEXTS | SNAGS.map("".join), max_size=5)


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(FIELDS, PLACES)
def test_any_text_survives_a_multipart_body(fields, places):
    fields = {name: re.sub("(?<=\r\n)(--xYz)+(?=-|\r|$)", "", value) for name, value in fields.items()}  # no delimiters
    parts = [part_of(re.sub(r'(["\\])', r"\\\1", name), value.encode()) for name, value in fields.items()]
    assert plain(scrapy_do.multipart_fields(cut(b"\r\n".join([*parts, CLOSING]), places), b"xYz")) == list(fields.items())


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(FIELDS, PLACES, st.sampled_from([urllib.parse.quote, urllib.parse.quote_plus]))
def test_any_text_survives_an_urlencoded_body(fields, places, quote):
    body = urllib.parse.urlencode(fields, quote_via=quote).encode()
    assert plain(scrapy_do.urlencoded_fields(cut(body, places))) == list(fields.items())


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(st.binary() | SNAGS.map(lambda words: "".join(words).encode()), PLACES)
def test_an_urlencoded_value_is_what_the_standard_library_reads(value, places):
    value = value.replace(b"&", b"")
    read = [b"".join(pieces) for _, pieces in scrapy_do.urlencoded_fields(cut(b"a=" + value, places))]
    assert read == [urllib.parse.unquote_to_bytes(value.replace(b"+", b" "))]


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(FIELDS, PLACES, st.booleans())
def test_any_text_survives_a_json_body(fields, places, ascii_only):
    body = json.dumps(fields, ensure_ascii=ascii_only).encode()
    assert plain(scrapy_do.json_fields(cut(body, places))) == list(fields.items())


HEAD_WORDS = st.sampled_from(
    [
        b"GET", b"POST", b" ", b"/", b"/status.json", b"http://x", b"HTTP/1.1", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"\r\n",
        b"Host: localhost\r\n", b"Connection:", b"close", b"Content-Length: ", b"99", b"chunked", b":", b"%", b"%ff", b"?", b"\0",
    ]
)  # fmt: skip
HEADER_LINES = [
    b"Content-Length: 5", b"X: y", b"x:", b"X:\t\xff \t", b"Connection: close", b"!#$%&'*+.^_`|~-9: z", b"Expect: 100-continue",
    *[b"X: y", b"A: b", b"C:d"] * 9, b"X:\0", b"X: \n", b" X: y", b"X : y", b"X", b":", b"", b"Host: b",
]  # fmt: skip
BODY_WORDS = st.sampled_from(
    [
        b"--xYz", b"\r\n--xYz", b"--xYz--", b"\r\n", b"\r\n\r\n", b'Content-Disposition: form-data; name="a"', b"name=", b";",
        b'"', b"\\", b"--", b" ", b"=", b"&", b"%", b"%ff", b"+", b"{", b"}", b'"a": ', b"[", b"1", b"\\ud800", b"\xff",
    ]
)  # fmt: skip


def noise(words):
    """Return the strategy for bytes that are random, or nearly make sense."""
    return st.binary(max_size=300) | st.lists(words | st.binary(max_size=3)).map(b"".join)


@hypothesis.settings(max_examples=300, deadline=None, database=None)
@hypothesis.given(
    st.sampled_from([b"", b"GET /%5a?%zz HTTP/1.1\r\nhost:\xff\r\n", b"A http://[/%c5%bc HTTP/1.0\r\nX: y\r\n"]),
    noise(HEAD_WORDS) | st.lists(st.sampled_from(HEADER_LINES)).map(b"\r\n".join),
)
def test_any_bytes_as_a_head_are_read_or_refused(start, rest):
    with contextlib.suppress(scrapy_do.ScrapyDoError):
        request = scrapy_do.parse_head(start + rest)
        first, *lines = (start + rest).split(b"\r\n")
        assert first.split(b" ")[:-1] == [request.method.encode(), request.target.encode("latin-1")]
        assert request.headers.keys() >= {line.partition(b":")[0].decode().lower() for line in lines} - {"expect"}
        assert not re.search("[\r\n\0]", "".join([*request.headers, *request.headers.values()]))


@hypothesis.settings(max_examples=300, deadline=None, database=None)
@hypothesis.given(noise(BODY_WORDS), PLACES, st.sampled_from([URLENCODED, MULTIPART, JSON, "multipart/form-data; boundary=-"]))
def test_any_bytes_as_a_body_are_read_or_refused(body, places, kind):
    with contextlib.suppress(scrapy_do.ScrapyDoError, scrapy_do.Gone):
        for name, pieces in scrapy_do.read_fields({"content-type": kind}, cut(body, places), ("a",)):
            assert isinstance(name, str)
            assert set(map(type, pieces)) <= {bytes}


PART_LINES = {  # and the name that each gives a part
    b'Content-Disposition: form-data; name="a"': "a", b"content-disposition:form-data;name=b": "b",
    b'Content-Disposition: form-data; filename="\\"; name=\\"x\\""; name="c"': "c", b"X: form-data; name=d": None,
    b"Content-Disposition: attachment; name=e": None, b"Content-Disposition: form-data": None,
}  # fmt: skip
FRAME_LINES = [b"--xYz", b"--xYz--", b"--xYz \t", b"--xYz-- x", b"--xYza", b" --xYz", b"--xY", b"--xYz\t-", b"", b"", b"a", b"X : y", b" x"]

LINES_OF_PART = st.tuples(
    st.sampled_from([b"--xYz", b"--xYz", b"--xYz \t", b"--xYzz", b"x"]), st.sampled_from([*list(PART_LINES)[:3] * 3, *PART_LINES]),
    st.lists(st.sampled_from([*list(PART_LINES) * 4, *FRAME_LINES]), max_size=2), st.lists(st.sampled_from([*PART_LINES, *FRAME_LINES]), max_size=4),
).map(lambda part: [*part[:2], *part[2], b"", *part[3]])  # fmt: skip


def strict_parts(lines):
    """Return the fields of a multipart body, RFC 2046 section 5.1.1, that is given as lines; ValueError for a bad one."""
    fields, lines = [], iter(lines)
    content = fields  # of the preamble, which is forgotten
    for line in lines:
        if line.startswith(b"--xYz--"):
            return [(name, b"\r\n".join(content)) for name, content in fields]
        if re.fullmatch(rb"--xYz[ \t]*", line):
            headers = list(itertools.takewhile(bool, lines))
            names = [name for header in headers if (name := PART_LINES[header])]
            if sum(b"isposition" in header for header in headers) > 1:
                raise ValueError
            fields.append((names[0], content := [next(lines)]))  # one that looks like a delimiter has no line break before it
        elif content is not fields:
            content.append(line)
    raise ValueError


@hypothesis.settings(max_examples=500, deadline=None, database=None)
@hypothesis.given(st.lists(LINES_OF_PART, max_size=4), PLACES, st.sampled_from([b"--xYz--", b"--xYz-- x", b"--xYz", b""]))
def test_a_multipart_body_is_read_as_a_strict_reader_reads_it(parts, places, closing):
    lines = [*itertools.chain(*parts), closing]
    try:
        expected = strict_parts(lines)
    except (KeyError, IndexError, ValueError, StopIteration):
        expected = None
    try:
        fields = scrapy_do.multipart_fields(cut(b"\r\n".join([*lines, b""]), places), b"xYz")
        read = [(name, b"".join(pieces)) for name, pieces in fields]
    except scrapy_do.BadRequest:
        read = None
    assert read == expected


def strict_chunks(stream):
    """Return a chunked body, RFC 9112 section 7.1, and what follows it. Raise ValueError for a bad one."""
    body = b""
    while True:
        line, _, stream = stream.partition(b"\r\n")
        size = line.partition(b";")[0].rstrip(b" \t")
        if not size or size.strip(b"0123456789abcdefABCDEF") or re.search(rb"[\r\n]", line):
            raise ValueError
        if not int(size, 16):
            break
        body, end, stream = body + stream[: int(size, 16)], stream[int(size, 16) :][:2], stream[int(size, 16) + 2 :]
        if end != b"\r\n":
            raise ValueError
    while stream.partition(b"\r\n")[0]:
        stream = stream.partition(b"\r\n")[2]
    if not stream.startswith(b"\r\n"):
        raise ValueError
    return body, stream[2:]


def strict_request(stream):
    """Return the first request of a stream, its method, target and body, as RFC 9112 has it, and what follows. Raise ValueError."""
    head, end, stream = stream.partition(b"\r\n\r\n")
    first, *lines = re.sub(rb"^(\r\n)+", b"", head).split(b"\r\n")
    method, target, version = first.split(b" ")
    if not end or version != b"HTTP/1.1" or re.search(rb"[\r\n\0]", b"".join(lines)):
        raise ValueError
    headers = [line.partition(b":") for line in lines]
    tokens = [method, *(name if colon else b"" for name, colon, _ in headers)]
    if not all(re.fullmatch(rb"[\w!#$%&'*+.^`|~-]+", token) for token in tokens):
        raise ValueError
    framing = [(name.lower(), value.strip(b" \t").lower()) for name, _, value in headers if name[0] in b"CcTt"]
    framing = [field for field in framing if field[0] in (b"content-length", b"transfer-encoding")]
    if framing[1:]:
        raise ValueError
    if framing and framing[0][0] == b"transfer-encoding":
        if framing[0][1] != b"chunked":
            raise ValueError
        body, stream = strict_chunks(stream)
    else:
        length = framing[0][1] if framing else b"0"
        if not length.isdigit() or int(length) > len(stream):
            raise ValueError
        body, stream = stream[: int(length)], stream[int(length) :]
    return (method, target, body), stream


FRAMINGS = [  # what says, truly or not, how long a body is
    "Content-Length: {n}", "content-length:\t0{n} ", "Transfer-Encoding: chunked", "TRANSFER-ENCODING:Chunked", "Content-Length: {n}",
    "Transfer-Encoding: chunked", "Content-Length: 0", "Content-Length: {m}", "Content-Length: +{n}", "Content-Length: {n}, {n}",
    "Content-Length : {n}", "Content-Length: {n}\r", "Transfer-Encoding: xchunked", "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding : chunked", "Transfer_Encoding: chunked", " Transfer-Encoding: chunked", "Transfer-Encoding:\x0bchunked",
    "X: y\nTransfer-Encoding: chunked", "X: y\rContent-Length: 0", "X: y\0", "Connection: Content-Length", "X: y", "Transfer-Encoding",
]  # fmt: skip
SIZES = ["{n:x}", "{n:x}", "{n:X} ;a=b", "{m:x}", "0{n:x}", "0x{n:x}", "+{n:x}", "{m:x}", "{n:x};\n", " {n:x}", "-{n:x}", "{n:x}\r", "{n}"]
ENDS = ["0\r\n\r\n", "0\r\n\r\n", "00;x\r\nContent-Length: 9\r\n\r\n", "0\r\n", "0\n\n", "", "0\r\nX: y\r\n\r\n"]
HIDDEN = "GET /list-jobs.json?id=hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
REMAINDERS = st.sampled_from(["", "\r\n\r\n" + HIDDEN, HIDDEN, "\r\n0\r\n\r\n" + HIDDEN])
LIES = st.sampled_from([-1, -2, -3, 1, 2, 90])
REQUESTS = st.one_of(  # one oddity, or two, or many
    st.tuples(st.sampled_from([[line] for line in FRAMINGS]), st.just(SIZES[0]), st.just(ENDS[0]), REMAINDERS, LIES),
    st.tuples(st.just(FRAMINGS[2:3]), st.sampled_from(SIZES), st.sampled_from(ENDS), REMAINDERS, LIES),
    st.tuples(st.lists(st.sampled_from(FRAMINGS), max_size=2), st.sampled_from(SIZES), st.sampled_from(ENDS), REMAINDERS, LIES),
)


def write_request(number, framings, size, end, tail, lie):
    """Return a request that looks for a job by its number, in a frame that may be broken."""
    body = f"id={number}{tail}"
    numbers = {"n": len(body), "m": max(0, len(body) + lie)}
    lines = [framing.format(**numbers) for framing in framings]
    if any("hunked" in line for line in lines):
        body = f"{size.format(**numbers)}\r\n{body}\r\n{end}"
    return "\r\n".join(["POST /cancel-job.json HTTP/1.1", "Host: localhost", *lines, "", body]).encode()


def test_no_request_is_seen_where_a_strict_reader_sees_none(site):
    outcomes = []

    @hypothesis.settings(max_examples=600, deadline=None, database=None)
    @hypothesis.given(st.lists(REQUESTS, min_size=1, max_size=3))
    def check(requests):
        stream = b"".join(write_request(number, *request) for number, request in enumerate(requests)) + HIDDEN.encode()
        seen = []
        with Line(site) as line:
            line.send(stream)
            line.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ValueError):
                while stream:
                    (method, target, body), stream = strict_request(stream)
                    seen.append((method, (target.partition(b"?")[2] or body).decode()))
            answers = []
            while line.file.peek(1):
                answers.append(line.answer())
        for number, (status, headers, body) in enumerate(answers):
            if number >= len(seen):  # what is no request ends the connection
                assert (status in (400, 405, 413, 501), headers["Connection"], number) == (True, "close", len(answers) - 1)
            elif seen[number][0] not in (b"GET", b"POST"):  # the rest of a body has come before it
                assert status == 405
            elif status == 404:
                assert json.loads(body)["msg"].startswith(f"there is no job '{seen[number][1][3:].replace('+', ' ')}';")
            else:
                assert (status, seen[number][1].startswith("id=")) == (400, False), body
        outcomes.append((len(answers), len(seen)))

    check()
    assert {answered - seen for answered, seen in outcomes} <= {0, 1, -1, -2, -3}
    assert {(1, 0), (2, 2), (3, 3), (2, 1)} <= set(outcomes)  # the frames are sound, and broken, often enough


SPACES = b" " * 60_000
HOSTILE = {
    "spaces in a header": lambda: scrapy_do.parse_head(b"GET / HTTP/1.1\r\nHost: localhost\r\nA: y" + SPACES + b"z"),
    "spaces and a NUL in a header": lambda: scrapy_do.parse_head(b"GET / HTTP/1.1\r\nHost: localhost\r\nA:" + SPACES[:1500] + b"\0"),
    "name without an end": lambda: next(scrapy_do.urlencoded_fields(iter([b"a"] * 40_000))),
    "percents": lambda: plain(scrapy_do.urlencoded_fields(iter([b"a=", *[b"%"] * 60_000]))),
    "boundaries": lambda: plain(scrapy_do.multipart_fields(iter([b"--xYz\r\n", *[b"\r\n--xYz--"] * 9_000]), b"xYz")),
    "looks like boundaries": lambda: plain(scrapy_do.multipart_fields(iter([part_of("a", b"\r\n--xYza" * 60_000)]), b"xYz")),
    "quotes in a part": lambda: plain(
        scrapy_do.multipart_fields(iter([part_of("a", b"", ';a="' * 15_000), b"\r\n" + CLOSING]), b"xYz")
    ),
    "spaces in a part": lambda: plain(
        scrapy_do.multipart_fields(iter([part_of("a", b"", ";" + " " * 60_000), b"\r\n" + CLOSING]), b"xYz")
    ),
    "backslashes in a part": lambda: plain(
        scrapy_do.multipart_fields(iter([part_of("a", b"", ';a="' + "\\" * 60_000), b"\r\n" + CLOSING]), b"xYz")
    ),
}


@pytest.mark.parametrize("read", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_cost_little_time(read):
    before = time.thread_time()
    with contextlib.suppress(scrapy_do.ScrapyDoError):
        read()
    assert time.thread_time() - before < 2


# ---- 9. Command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "99999"], "'99999' is not a whole number from 0 to 65535"),
        (["--port", "x"], "'x' is not a whole number from 0 to 65535"),
        (["--job-slots", "0"], "'0' is not a whole number from 1 to 1000"),
        (["--keep-days", "0"], "'0' is not a whole number from 1 to"),
        (["--keep-mib", "1.5"], "'1.5' is not a whole number from 1 to"),
        (["--completed-cap", "-1"], "'-1' is not a whole number from 1 to"),
        (["--kill-after", "nan"], "'nan' is not a number of seconds"),
        (["--job-timeout", "x"], "'x' is not a number of seconds"),
        (["--list-timeout", "-1"], "'-1' is not a number of seconds"),
        (["--scrapy", ""], "the command is empty"),
        (["--scrapy", "'"], "is not a command"),
        (["--on-finish", " "], "the command is empty"),
        (["--max-upload", "0"], "'0' is not a whole number from 1"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--po", "1"], "unrecognized arguments: --po 1"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named_with_status_2(capsys, options, sentence):
    with pytest.raises(SystemExit) as error:
        scrapy_do.main(options)
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err


def test_options_may_come_from_a_file(tmp_path):
    (tmp_path / "options").write_text("--port\n0\n--job-slots\n7\n")
    options = scrapy_do.parse_options([f"@{tmp_path}/options", "--scrapy", "nice -n 5 ./venv/bin/scrapy"])
    assert (options.port, options.job_slots) == (0, 7)
    assert options.scrapy == ("nice", "-n", "5", "./venv/bin/scrapy")
    assert scrapy_do.parse_options(["--scrapy", "./scrapy"]).scrapy == (str(pathlib.Path("scrapy").absolute()),)


def test_help_and_version_end_well(capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as error:
            scrapy_do.main([option])
        assert error.value.code == 0
    assert f"scrapy-do {scrapy_do.__version__}" in capsys.readouterr().out


def test_it_runs_as_a_module_too(outside, tmp_path):
    shutil.copy(MODULE, tmp_path)  # beside which Python may keep it compiled
    site = outside(command=(sys.executable, "-m", "scrapy_do"))
    site.reload()
    assert site.get("status")["daemon-version"] == scrapy_do.__version__
    assert site.stop() == 0


def test_a_taken_port_is_one_sentence(outside, tmp_path):
    site = outside()
    status, said = run_main("--port", str(site.port), "--data-dir", str(tmp_path / "other"))
    assert (status, said.count("\n")) == (1, 1)
    assert f"cannot listen on 127.0.0.1, port {site.port}" in said
    assert "choose another --port" in said


def test_a_missing_psutil_is_one_sentence(tmp_path):
    (tmp_path / "psutil.py").write_text("raise ImportError")
    status, said = run_main(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (status, said.count("\n")) == (1, 1)
    assert "pip install psutil" in said


def test_events_are_log_lines_that_cannot_be_faked(outside):
    site = outside()
    site.push(bad="exit 4")
    site.schedule("bad", description="x\n2026-01-01 00:00:00 job faked")
    wait_for(lambda: "exit code 4" in site.log_path.read_text())
    site.stop()
    lines = site.log_path.read_text().splitlines()
    wanted = ("listens on http://127.0.0.1:", "project shop was pushed", "is PENDING (now)", "is RUNNING",
              "is FAILED after 0 s, the crawl ended with exit code 4", "stopping")  # fmt: skip
    assert [any(words in line for line in lines) for words in wanted] == [True] * 6
    assert all(line[:2] == "20" and line[19] == " " and "faked" not in line for line in lines), lines


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_service_manager_is_told_of_the_start_a_reload_and_the_stop(outside, tmp_path, is_abstract):
    shutil.copy(MODULE, tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"scrapy-do-{uuid.uuid4()}" if is_abstract else str(tmp_path / "notify")
        manager.bind("\0" + name if is_abstract else name)
        manager.settimeout(30)
        address = "@" + name if is_abstract else name
        site = outside(environment={"NOTIFY_SOCKET": address}, command=(sys.executable, "scrapy_do.py"))
        assert manager.recv(100) == b"READY=1"
        site.push(speaker='echo "${NOTIFY_SOCKET-none}"')
        assert site.log(site.wait_job(site.schedule("speaker"))["identifier"], "out") == "none\n"
        before = time.clock_gettime(time.CLOCK_MONOTONIC)
        site.reload()
        reloading, moment = manager.recv(100).split(b"\nMONOTONIC_USEC=")
        assert reloading == b"RELOADING=1"
        assert before < int(moment) / 1e6 < time.clock_gettime(time.CLOCK_MONOTONIC)
        assert manager.recv(100) == b"READY=1"
        (tmp_path / "scrapy_do.py").write_text("break")
        site.process.send_signal(signal.SIGHUP)
        assert manager.recv(100).startswith(b"RELOADING=1")
        assert manager.recv(100) == b"READY=1"
        assert "not reloaded" in site.log_path.read_text()
        site.process.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert site.process.wait(30) == 0


def test_the_file_stays_short_enough_to_be_read():
    """Growing is a decision: whoever raises the number has looked for the simpler shape."""
    source = MODULE.read_text()
    assert len(source.splitlines()) <= 3972
    banners = re.findall(r"^# ---- ([0-9]+)\. ", source, re.MULTILINE)
    assert banners == [str(number) for number in range(1, 11)]


# ---- 10. Page --------------------------------------------------------------------------------------------------------


def test_the_page_takes_nothing_from_elsewhere_and_makes_no_html_of_what_it_is_told(site):
    status, headers, body = site.request("GET", "/")
    assert (status, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "text/html; charset=utf-8", "nosniff")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    page = body.decode()
    assert not re.findall(r"https?:|//\w|innerHTML|insertAdjacent|document\.write|outerHTML|eval\(", page)
    assert page.count("\n") < 200
    assert site.request("HEAD", "/")[1]["Content-Length"] == str(len(body))
    check_refusal(speak(site, head_of("/", method="POST")), 405)
    site.limit(users=USERS)
    assert site.request("GET", "/")[0] == 401


@pytest.fixture
def browser():
    """Return a headless chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium or its driver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1300"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def test_a_browser_pushes_schedules_watches_and_cancels(browser, site, tmp_path):
    hostile = "<img src=x onerror=document.title='hacked'>"
    (tmp_path / "shop.zip").write_bytes(stub_project(
        talker=f"echo \"{hostile} żółw\" >&2; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done; echo last >&2", failing="exit 3",
    ))  # fmt: skip

    def element(path):
        return wait_for(lambda: browser.find_elements("xpath", path))[0]

    def text(identifier):
        return browser.find_element("id", identifier).text

    def schedule(spider, when):
        browser.find_element("name", "spider").send_keys(spider)
        box = browser.find_element("name", "when")
        box.clear()
        box.send_keys(when)
        element("//button[text()='Schedule']").click()

    browser.get(f"http://localhost:{site.port}/")
    browser.find_element("name", "archive").send_keys(str(tmp_path / "shop.zip"))
    element("//button[text()='Push']").click()
    wait_for(lambda: "shop has the spiders failing, quick, talker" in text("message"))
    element("//select[@name='spider']/option[text()='talker']")
    browser.find_element("name", "description").send_keys(hostile)
    schedule("talker", "now")
    element("//tbody[@id='active']//td[text()='RUNNING']")
    element("//tbody[@id='active']//button[text()='log']").click()
    wait_for(lambda: text("log") == f"{hostile} żółw")
    (tmp_path / "end").touch()
    wait_for(lambda: text("log") == f"{hostile} żółw\nlast")
    element("//tbody[@id='completed']//td[text()='SUCCESSFUL']")
    schedule("failing", "now")
    element("//tbody[@id='completed']//td[contains(text(), 'exit code 3')]")
    schedule("quick", "every monday at 12:30")
    wait_for(lambda: "Next run: " in text("message"))
    element("//tbody[@id='active']//button[text()='cancel']").click()
    wait_for(lambda: browser.switch_to.alert or True).accept()
    element("//tbody[@id='completed']//td[text()='canceled by the user']")
    schedule("quick", "every moonday")
    wait_for(lambda: "'moonday' does not fit" in text("message"))
    assert hostile in text("completed")
    assert browser.title == "scrapy-do"
    browser.set_window_size(400, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in messages if "400 (Bad Request)" not in message and "favicon" not in message] == []


# ---- 11. Real Scrapy -------------------------------------------------------------------------------------------------

REAL_SPIDER = """
import json, os, sys
import scrapy
print("not-a-spider")
sys.stdout.write("no line break")


class Pages(scrapy.Spider):
    name = "pages"
    custom_settings = {"FEEDS": {os.environ.get("SPIDER_DATA_DIR", ".") + "/%(name)s.jsonl": {"format": "jsonlines"}}}

    def __init__(self, payload="{}", **arguments):
        super().__init__(**arguments)
        self.wish = json.loads(payload)
        self.start_urls = [self.wish["site"] + "/1"]

    def parse(self, response):
        self.logger.info("Zażółć gęślą jaźń: %s", self.wish.get("word"))
        self.logger.info("note %r, mark %r", getattr(self, "note", None), self.settings.get("MARK"))
        yield {"title": response.css("title::text").get(), "job": os.environ["SCRAPY_JOB"]}
        yield from response.follow_all(css="a")


class Slow(Pages):
    name = "slow"

    def parse(self, response):
        yield {"title": "first"}
        yield response.follow(f"/slow/{response.url.count('/')}", dont_filter=True)
"""


class Pages(http.server.BaseHTTPRequestHandler):
    """A little web site: three pages in a row, and slow ones."""

    def do_GET(self):
        number = self.path.rpartition("/")[2]
        if self.path.startswith("/slow/"):
            self.server.is_over.wait(0.2)
        more = f"<a href=/{int(number) + 1}>on</a>" if self.path in ("/1", "/2") else ""
        body = f"<title>Strona {number} – 頁</title>{more}".encode()
        self.send_response(200 if number.isdigit() else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def website():
    """Return the address of a local web site."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.is_over = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.is_over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def scrapy_project(tmp_path):
    """Return the folder of a project made by Scrapy's own commands."""
    scrapy = [sys.executable, "-m", "scrapy"]
    subprocess.run([*scrapy, "startproject", "real"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([*scrapy, "genspider", "made", "example.com"], cwd=tmp_path / "real", check=True, capture_output=True)
    (tmp_path / "real/real/spiders/pages.py").write_text(REAL_SPIDER)
    return tmp_path / "real"


def zip_folder(folder):
    """Return a zip archive of a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return make_zip({str(path.relative_to(folder.parent)): path.read_bytes() for path in paths})


@pytest.fixture
def real(tmp_path, scrapy_project):
    """Return a daemon with the real Scrapy, in a locale without UTF-8, that has the project."""
    site = Outside(tmp_path, environment={"LANG": "C", "LC_ALL": "C"})
    try:
        (tmp_path / "real.zip").write_bytes(zip_folder(scrapy_project))
        command = ["curl", "-s", f"http://127.0.0.1:{site.port}/push-project.json", "-F", f"archive=@{tmp_path}/real.zip"]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert answer == {"status": "ok", "name": "real", "spiders": ["made", "pages", "slow"]}
        yield site
    finally:
        site.close()


def test_a_real_crawl_runs_to_its_end_in_any_language(real, website, tmp_path):
    payload = json.dumps({"site": website, "word": "漢字"}, ensure_ascii=False)
    command = ["curl", "-s", f"http://127.0.0.1:{real.port}/schedule-job.json", "-F", "project=real", "-F", "spider=pages",
               "-F", "when=now", "-F", f"payload={payload}"]  # fmt: skip
    job = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["identifier"]
    done = real.wait_job(job)
    log = real.log(job)
    assert (done["status"], done["reason"], done["payload"]) == ("SUCCESSFUL", None, payload), log
    assert log.count("Zażółć gęślą jaźń: 漢字") == 3
    assert "'item_scraped_count': 3" in log
    assert done["stats"] == {"items": 3, "responses": 4, "errors": 0, "finish_reason": "finished"}  # and robots.txt
    real.stop()
    real.start()
    assert real.job(job) == done
    assert "Strona 3 – 頁" in log
    items = [json.loads(line) for line in (tmp_path / "data/spider-data/pages.jsonl").read_text().splitlines()]
    assert [item["title"] for item in items] == [f"Strona {number} – 頁" for number in (1, 2, 3)]
    assert {item["job"] for item in items} == {job}


def test_args_and_settings_reach_a_real_spider_and_scrapy(real, website):
    job = real.schedule(
        "pages", project="real", payload=json.dumps({"site": website}), arg=["note=-1 = żółć\n漢字"],
        setting=["DEPTH_LIMIT=1", "MARK=--x=żółw"],
    )  # fmt: skip
    assert real.wait_job(job)["reason"] is None
    log = real.log(job)
    assert log.count("note '-1 = żółć\\n漢字', mark '--x=żółw'") == 2, log  # pages; the third is too deep
    assert "'item_scraped_count': 2" in log


def test_a_real_crawl_that_is_canceled_flushes_its_feed(real, website, tmp_path):
    job = real.schedule("slow", project="real", payload=json.dumps({"site": website}))
    wait_for(lambda: "/slow/" in real.log(job))
    real.post("cancel-job", id=job)
    canceled = real.job(job)
    assert (canceled["status"], canceled["stats"]["finish_reason"]) == ("CANCELED", "shutdown")
    assert canceled["stats"]["items"] > 0
    log = real.log(job)
    assert "Received SIGTERM" in log
    assert "'finish_reason': 'shutdown'" in log
    assert "first" in (tmp_path / "data/spider-data/slow.jsonl").read_text()


def test_a_real_crawl_goes_on_across_two_reloads_and_flushes_its_feed_when_it_is_canceled_then(real, website, tmp_path):
    job = real.schedule("slow", project="real", payload=json.dumps({"site": website}))
    for _ in range(2):
        seen = real.log(job).count("/slow/")
        wait_for(lambda seen=seen: real.log(job).count("/slow/") > seen)
        real.reload()
    seen = real.log(job).count("/slow/")
    wait_for(lambda: real.log(job).count("/slow/") > seen)
    real.post("cancel-job", id=job)
    canceled, log = real.job(job), real.log(job)
    assert (canceled["status"], canceled["exit_code"], canceled["stats"]["finish_reason"]) == ("CANCELED", 0, "shutdown")
    assert (log.count("Received SIGTERM"), log.count("Spider opened")) == (1, 1), log
    assert "first" in (tmp_path / "data/spider-data/slow.jsonl").read_text()


def test_a_real_crawl_that_runs_too_long_flushes_its_feed_and_has_failed(real, website, tmp_path):
    job = real.wait_job(real.schedule("slow", project="real", payload=json.dumps({"site": website}), timeout=4))
    log = real.log(job["identifier"])
    assert (job["status"], job["exit_code"], job["reason"]) == ("FAILED", 0, "it ran longer than its timeout of 4 s"), log
    assert log.count("Received SIGTERM") == 1
    assert "first" in (tmp_path / "data/spider-data/slow.jsonl").read_text()


def test_a_real_project_that_cannot_be_imported_shows_why(real, scrapy_project):
    (scrapy_project / "real/spiders/pages.py").write_text("class Broken(:\n")
    status, answer = real.try_push(zip_folder(scrapy_project))
    assert (status, "SyntaxError: invalid syntax" in answer["msg"]) == (400, True), answer
    (scrapy_project / "real/spiders/pages.py").unlink()
    (scrapy_project / "real/spiders/made.py").write_text("print('loud')\n")
    status, answer = real.try_push(zip_folder(scrapy_project))
    assert (status, "shows no spiders" in answer["msg"]) == (400, True), answer
    assert real.get("list-spiders", project="real")["spiders"] == ["made", "pages", "slow"]


def test_a_real_schedule_makes_real_crawls_across_a_crash(real, website):
    schedule = real.schedule("pages", "every 2 seconds", "real", payload=json.dumps({"site": website}))
    wait_for(lambda: real.jobs("SUCCESSFUL"))
    real.kill()
    real.start()
    done = len(real.jobs("SUCCESSFUL"))
    wait_for(lambda: len(real.jobs("SUCCESSFUL")) > done)
    assert real.job(schedule)["status"] == "SCHEDULED"
    assert real.jobs("FAILED") == []


# ---- 12. Benchmarks --------------------------------------------------------------------------------------------------

# They print figures and are run by hand: python -m pytest -m benchmark -s


def hammer(site, request, clients, seconds, keeps_alive=True):
    """Send a request again and again from several connections and return how many seconds each answer took."""
    end = time.monotonic() + seconds

    def send_on_and_on():
        taken = []
        while time.monotonic() < end:
            with Line(site) as line:
                while time.monotonic() < end:
                    began = time.monotonic()
                    line.socket.sendall(request)
                    assert line.answer()[0] == 200
                    taken.append(time.monotonic() - began)
                    if not keeps_alive:
                        break
        return taken

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [x for future in [pool.submit(send_on_and_on) for _ in range(clients)] for x in future.result()]


def centile(values, percent):
    """Return the value below which so many percent lie, in milliseconds."""
    return 1000 * sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def say(name, value, unit):
    """Print a figure."""
    print(f"{name:<72} {value:>10,.3g} {unit}")


@pytest.mark.benchmark
def test_figures_of_start_and_memory(outside):
    starts = []
    for _ in range(11):
        began = time.monotonic()
        site = outside()
        site.get("status")
        starts.append(time.monotonic() - began)
        for _ in range(200):
            site.get("status")
        memory = psutil.Process(site.process.pid).memory_info().rss
        site.stop()
    say("start to the first answer, median", centile(starts, 50), "ms")
    say("resident memory after 200 requests", memory / scrapy_do.MIB, "MiB")


@pytest.mark.benchmark
def test_figures_of_answers(outside):
    site = outside()
    site.push()
    for _ in range(50):
        site.schedule(when="every 3 hours")
    for path in ("/status.json", "/list-jobs.json?status=ACTIVE"):
        for keeps_alive in (True, False):
            lines = [] if keeps_alive else ["Connection: close"]
            taken = hammer(site, head_of(path, *lines), 8, 3, keeps_alive)
            say(f"GET {path}, 8 clients, {'one connection each' if keeps_alive else 'a new connection each'}", len(taken) / 3, "/s")
    taken = hammer(site, post_of("/schedule-job.json", PLAN_URLENCODED), 8, 3)
    say("POST /schedule-job.json, on the disk, 8 clients", len(taken) / 3, "/s")


@pytest.mark.benchmark
def test_figures_of_crawls(outside, tmp_path):
    site = outside("--completed-cap", "1000")
    site.push(stamp=f"date +%s.%N > {tmp_path}/began")
    delays = []
    for _ in range(50):
        asked = time.time()
        site.wait_job(site.schedule("stamp"))
        delays.append(float((tmp_path / "began").read_text()) - asked)
    say("schedule-job to the first instruction of a crawl, median", centile(delays, 50), "ms")
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: site.schedule(), range(300)))
    wait_for(lambda: len(site.jobs("SUCCESSFUL")) == 350)
    say("crawls of /bin/sh through 3 slots", 300 / (time.monotonic() - began), "/s")


@pytest.mark.benchmark
def test_figures_of_fairness(outside, tmp_path):
    site = outside("--completed-cap", "1000")
    site.push()
    ticking = site.schedule(when="every second")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        changes = pool.submit(hammer, site, post_of("/schedule-job.json", PLAN_URLENCODED), 64, 10)
        answers = pool.submit(hammer, site, head_of(), 1, 10).result()
        say("schedule-job from 64 clients", len(changes.result()) / 10, "/s")
    say("meanwhile: GET /status.json, 99th percentile", centile(answers, 99), "ms")
    jobs = state(tmp_path)["jobs"]
    due = jobs[ticking]["due"]
    late = [(job["origin"] - due) % 1 for job in jobs.values() if job["actor"] == "SCHEDULER"]
    assert len(late) >= 10
    say("meanwhile: runs of 'every second' later than due, at most", centile(late, 100), "ms")


@pytest.mark.benchmark
def test_figures_of_growth(outside, tmp_path):
    site = outside()
    site.push(stamp=f"date +%s.%N > {tmp_path}/began")
    for count in (100, 1_000, 10_000):
        missing = range(count - site.get("status")["jobs-scheduled"])
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            list(pool.map(lambda _: site.schedule(when="every 1000 weeks"), missing))
        changes = hammer(site, post_of("/schedule-job.json", PLAN_URLENCODED), 1, 2)
        say(f"{count} schedules: schedule-job on the disk, median", centile(changes, 50), "ms")
        delays = []
        for _ in range(20):
            asked = time.time()
            site.wait_job(site.schedule("stamp"))
            delays.append(float((tmp_path / "began").read_text()) - asked)
        say(f"{count} schedules: schedule-job to the first instruction, median", centile(delays, 50), "ms")
        lists = hammer(site, head_of("/list-jobs.json?status=ACTIVE"), 1, 2)
        say(f"{count} schedules: list-jobs of all, median", centile(lists, 50), "ms")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            pool.submit(hammer, site, head_of("/list-jobs.json?status=ACTIVE"), 1, 3)
            answers = pool.submit(hammer, site, head_of(), 1, 3).result()
        say(f"{count} schedules: status.json while all are listed, slowest", centile(answers, 100), "ms")
    began = time.monotonic()
    site.stop()
    site.start()
    site.get("status")
    say("10000 schedules: stop, and start to the first answer", 1000 * (time.monotonic() - began), "ms")
