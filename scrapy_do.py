#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["psutil>=5.9.6"]
# ///
"""Keep Scrapy projects, run their spiders now or on a schedule, and answer a small JSON API.

    python scrapy_do.py --port 7654
    curl -sS localhost:7654/push-project.json -F archive=@demo.zip
    curl -sS localhost:7654/schedule-job.json -F project=demo -F spider=a -F 'when=every day'

How a request becomes a crawl:

    curl ──> http thread: Daemon.schedule ──┐
                                            ├─> save: state.json, fsync, then memory
    timer thread: a schedule is due ────────┘                  │
                                                               v
    crawl thread: copy the code, Popen, wait, <────────── dispatch <──┐
                  end what is left, save how it ended ────────────────┘

Threads
    main        accepts connections until a signal comes; see `serve` and `Server.serve_until`
    http        answer the requests of one connection each; may wait for client and disk
    timer       sleeps until a schedule is due or a crawl has had its time, a minute at most
    crawl-ID    runs a crawl that has a slot: copies its code, starts it, waits, cleans up
    on-finish   runs the command of --on-finish, for one finished job at a time

Locks
    Daemon.lock is held to change a record, the write to the disk included, and to start or reap a
    child process. Readers take no lock: records never change, and what a reader sees is on the
    disk. Daemon._code_lock is held to copy or delete unpacked code. Neither is taken inside the
    other. Else http threads share only dictionaries and queues, whose methods are atomic.
"""

from __future__ import annotations

# Modules that a start does not need are imported where they are used: each costs milliseconds.
import argparse
import base64
import contextlib
import errno
import fcntl
import functools
import heapq
import http.server
import io
import itertools
import json
import math
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import psutil
except ImportError:
    sys.exit(f"scrapy_do needs psutil: run '{sys.executable} -m pip install psutil', start again")

__version__ = "0.2.0"
MIB = 1024 * 1024
CHUNK_BYTES = 64 * 1024  # read or sent at once: enough to be fast, little enough for many threads
DAY_SECONDS = 86400
SANE_INSTANT = 1_790_000_000  # 2026-09-21: a clock that shows less, 1970 at boot, is not set yet


# ---- 1. Errors and log -----------------------------------------------------------------------

class ScrapyDoError(Exception):
    """Tell a user in a sentence what is wrong and what to do, and clients by an HTTP status."""

    def __init__(self, message: str, status: int = 500, headers: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.status, self.headers = status, headers


BadRequest = functools.partial(ScrapyDoError, status=400)  # wrong in itself
Forbidden = functools.partial(ScrapyDoError, status=403)  # maybe asked for by a foreign web page
NotFound = functools.partial(ScrapyDoError, status=404)
Conflict = functools.partial(ScrapyDoError, status=409)  # not allowed in the present state
TooLarge = functools.partial(ScrapyDoError, status=413)
Unavailable = functools.partial(ScrapyDoError, status=503)  # a stop, or an unset clock
StorageError = functools.partial(ScrapyDoError, status=507)  # the disk, or the data folder


def log(message: str) -> None:
    """Write a line to stderr, with the local time; a line break cannot fake a second line."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    # A full disk or a closed terminal must not stop a crawl, and sys.stderr may even be None.
    with contextlib.suppress(OSError, ValueError):
        print(f"{time.strftime('%F %T%z')} {text}\n", end="", file=sys.stderr, flush=True)


def log_crash(what: str, error: Exception) -> None:
    """Write an exception that nobody expected, with its traceback."""
    log(f"{what} failed: {error!r}")
    with contextlib.suppress(OSError):  # no file descriptor may be left to read the module
        import traceback
        for line in "".join(traceback.format_exception(error)).splitlines():
            log(line)


def quoted(text: str) -> str:
    """Return a text in quotes for a message, cut short."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def suggest(name: str, known: Collection[str]) -> str:
    """Return a question for the known names that look most like a name; "" when none does."""
    import difflib
    near = [quoted(each) for each in difflib.get_close_matches(name[:100], known)]
    return f"did you mean {' or '.join(near)}? " if near else ""


def parse_whole(text: str, least: int, most: int) -> int:
    """Return a whole number within bounds. Raise ValueError for anything else."""
    if re.fullmatch("-?[0-9]{1,12}", text) and least <= int(text) <= most:
        return int(text)
    raise ValueError(f"must be a whole number from {least} to {most}, not {quoted(text)}")


def parse_seconds(text: str, least: float = 0.0) -> float:
    """Return a number of seconds up to a million. Raise ValueError for anything else."""
    if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{0,6})?", text) and least <= float(text) <= 10**6:
        return float(text)
    raise ValueError(f"must be a number of seconds from {least:g} to 1000000, not {quoted(text)}")


# ---- 2. Schedules ----------------------------------------------------------------------------

UNIT_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}
ELAPSED_UNITS = ("second", "minute", "hour")  # the others are days on the local calendar
LAST_INSTANT = 253402214400.0  # 9999-12-31 00:00 UTC: still the year 9999 in every time zone
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DAY_NAMES = {"weekday": frozenset(range(5)), "weekend": frozenset({5, 6}),
             **{name: frozenset({day}) for day, name in enumerate(WEEKDAYS)}}
TIME_FORMS = {  # unit: what the first number of its times counts, their form, and examples
    "day": (3600, r"(?a)\d:[0-5]\d|([01]\d|2[0-3]):[0-5]\d(:[0-5]\d)?", "9:30, 18:00 or 23:59:59"),
    "hour": (60, r"(?a)([0-5]\d)?:[0-5]\d", ":15 (minute 15) or 00:15 (second 15)"),
    "minute": (1, r"(?a):[0-5]\d", ":15 (second 15)")}
SPEC_FORMS = ("now | every [N | A to B] seconds|minutes|hours|days|weeks [at TIME] | "
              "every day|weekday|weekend|monday, friday and sunday [at 6:00 and 18:30]")
NO_BEGINS = (  # what is wrong with a sentence that begins otherwise than with 'now' or 'every'
    ("@|([0-9*/,-]+ ){3}", "cron syntax is not read"),
    ("(at|in|next|on|once|today|tomorrow|tonight) ", "one-off runs are only possible by 'now'"),
    ("", "a schedule starts with 'now' or 'every'"))
CRON_LINES = {"@hourly": "every hour at :00", "@daily": "every day at 0:00",
              "@weekly": "every sunday at 0:00", "* * * * *": "every minute",
              **{f"*/{n} * * * *": f"every {n} minutes" for n in range(2, 31) if 60 % n == 0}}
CRON_DAYS = {"*": "day", "1-5": "weekday", **{str(n): WEEKDAYS[n - 1] for n in range(8)}}


def _want(is_right: object, problem: str) -> None:
    if not is_right:
        raise BadRequest(problem)


def _utc_offset(moment: float) -> int:
    return time.localtime(moment).tm_gmtoff  # by which local clocks are ahead


def _instant_of(wall: float) -> float:
    # Return when local clocks first show `wall` (seconds from 1970) or later: right after the gap
    # of spring, and on the first pass in the fold of autumn (PEP 495).
    before, after = _utc_offset(wall - DAY_SECONDS), _utc_offset(wall + DAY_SECONDS)
    if _utc_offset(wall - before) == before:
        return wall - before
    seconds = range(int(wall) - DAY_SECONDS, int(wall) + DAY_SECONDS)  # clocks change in one
    change = bisect_left(seconds, True, key=lambda second: _utc_offset(second) == after)
    return max(float(seconds[change]), wall - after)


class Recurrence(NamedTuple):
    """Say when a schedule is due: every `low` to `high` units, on some weekdays, at some times."""
    unit: str
    low: int = 1
    high: int = 1
    weekdays: frozenset[int] = frozenset(range(7))  # Monday is 0; all, unless each day counts
    times: tuple[float, ...] = ()  # seconds into the unit, ascending; () keeps those of the moment

    def anchored(self, origin: float) -> Recurrence:
        """Return the recurrence with the time of day of `origin` where the spec left it open."""
        # Otherwise a run that a spring gap delayed would hand the delay on to all later runs.
        is_set = self.times or self.unit in ELAPSED_UNITS
        return self if is_set else self._replace(times=(self._wall_of(origin) % DAY_SECONDS,))

    def next_after(self, moment: float, rng: Any = random) -> float:
        """Return the POSIX time due after `moment`. Raise ScrapyDoError if it may be past 9999."""
        size = UNIT_SECONDS[self.unit]
        # A weekday may be 7 days away beyond the units; 2 days more for time zones and gaps.
        _want(moment + self.high * size + 9 * DAY_SECONDS <= LAST_INSTANT,
              "the next run may be past the year 9999; choose a shorter interval")
        count: int = rng.randint(self.low, self.high)
        if self.unit not in ELAPSED_UNITS:
            return self._next_local(moment, count * size // DAY_SECONDS)
        if not self.times:
            return moment + count * size
        at = self.times[0]
        offset, later = _utc_offset(moment), _utc_offset(moment + size)
        passed = at if count == 1 else 0  # only a single unit may end in the present hour or minute
        due = ((moment + offset - passed) // size + count) * size + at - offset
        # Where clocks go back by half an hour (Lord Howe Island), the minute comes again sooner.
        again = due + (offset - later) % size - size
        return again if count == 1 and again > moment and _utc_offset(again) == later else due

    def _next_local(self, moment: float, step: int) -> float:
        today, time_of_day = divmod(self._wall_of(moment), DAY_SECONDS)
        dues = (_instant_of(day * DAY_SECONDS + at)
                for day in itertools.count(today + (step if step > 1 else 0))  # one may be today
                if (day + 3) % 7 in self.weekdays  # 1970-01-01 was a Thursday
                for at in self.times or (time_of_day,))
        return next(due for due in dues if due > moment + 1e-6)  # a sum of floats may round up

    def _wall_of(self, moment: float) -> float:
        # Return what local clocks show, or would show had no gap delayed a run past midnight. This
        # keeps the grid of steps of several days, which have one time; others need no grid.
        wall = moment + _utc_offset(moment)
        yesterday = (wall // DAY_SECONDS - 1) * DAY_SECONDS + sum(self.times[-1:])
        return yesterday if self.times and _instant_of(yesterday) == moment else wall

    def resume_after(self, due: float, now: float, rng: Any = random) -> float:
        """Return the first due time after `now` on the grid of `due`, however many were missed."""
        # Leap over most of them as intervals of the greatest length, which is a possible draw.
        longest = self.high * UNIT_SECONDS[self.unit]
        leap = max((now - due) // longest - 2, 0) * longest  # 2: a day of 25 hours, and last draws
        due = due + leap if self.unit in ELAPSED_UNITS else _instant_of(self._wall_of(due) + leap)
        while due <= now:
            due = self.next_after(due, rng)
        return due

    def latest_after(self, moment: float) -> float:
        """Return the latest POSIX time that `next_after(moment)` can give."""
        return self._replace(low=self.high).next_after(moment)


# The parser: each function takes the words that it understands from the front of `rest`, which ends
# with "". The first word that is left is the one that the error is about.
@functools.lru_cache(maxsize=1024)  # lists of jobs ask for the same few specs again and again
def parse_spec(text: str) -> Recurrence | None:
    """Return when a job is due; None is 'now'. Raise ScrapyDoError where the spec errs."""
    _want(len(text) <= 1000, "schedule not understood: it has more than 1000 characters")
    words = re.sub(r",(\s*and\s)?", " , ", text.lower()).split()
    recurrence, left, problem = _read(words)
    if not problem:
        return recurrence
    where = (f"it ends too early: {problem}; in the shell, spaces need quotes:"
             " -F 'when=every monday at 12:30'")
    if left:
        where = (f"{quoted(left[0])} does not fit: {problem}"
                 f"{_meant(_cron_sentence(words).split() or words)}")
    raise BadRequest(f"schedule not understood: {where}. The forms: {SPEC_FORMS}")


def _read(words: list[str]) -> tuple[Recurrence | None, list[str], str]:
    # Return the meaning, the words that do not fit, and what is wrong with the first of them.
    rest = [*words, ""]
    try:
        return _parse_sentence(rest), [], ""
    except ScrapyDoError as error:
        return None, rest[:-1], str(error)


def _parse_sentence(rest: list[str]) -> Recurrence | None:
    _want(rest[0] in ("now", "every"),
          next(text for begin, text in NO_BEGINS if re.match(begin, " ".join(rest))))
    recurrence = None if rest.pop(0) == "now" else _parse_interval(rest)
    if recurrence and rest[0] == "at":
        unit = recurrence.unit
        _want(unit in TIME_FORMS, f"{unit}s take no time; weekdays do: 'every monday at 12:30'")
        rest.pop(0)
        scale, form, examples = TIME_FORMS[unit]
        times = _parse_list(rest, functools.partial(_read_time, scale, form),
                            f"a time like {examples}", unit == "day" and recurrence.high == 1)
        recurrence = recurrence._replace(times=tuple(sorted(times)))
    _want(rest[0] == "", "only weekdays, and the times of weekdays and 'every day', can be a list"
          if rest[0] in (",", "and") else "nothing may follow here")
    return recurrence


def _parse_interval(rest: list[str]) -> Recurrence:
    if rest[0] in DAY_NAMES:
        return Recurrence("day", weekdays=_parse_list(rest, DAY_NAMES.get, "a weekday"))
    numbers = [_parse_number(rest, 1)] if rest[0][:1].isdigit() else []
    if numbers and rest[0] == "to":
        rest.pop(0)
        numbers.append(_parse_number(rest, numbers[0]))
    unit = rest[0].removesuffix("s")
    _want(unit in UNIT_SECONDS, f"a unit of time{'' if numbers else ' or a weekday'} is wanted")
    _want(rest[0] != unit or numbers in ([], [1]), "the plural is wanted")
    high = max(numbers, default=1)
    _want(high * UNIT_SECONDS[unit] <= 36525 * DAY_SECONDS, "an interval is at most 100 years")
    rest.pop(0)
    return Recurrence(unit, min(numbers, default=1), high)


def _parse_number(rest: list[str], least: int) -> int:
    _want(re.fullmatch("[0-9]+", rest[0]) and int(rest[0]) >= least,
          f"a whole number from {least} is wanted")
    return int(rest.pop(0))


def _read_time(scale: int, form: str, word: str) -> frozenset[int]:
    seconds = sum(int(n) * scale // 60**place for place, n in enumerate(re.findall("[0-9]+", word)))
    return frozenset({seconds} if re.fullmatch(form, word) else ())


def _parse_list(rest: list[str], read: Callable[[str], frozenset[int] | None], wanted: str,
                is_list: bool = True, found: frozenset[int] = frozenset()) -> frozenset[int]:
    values = read(rest[0]) or frozenset()
    _want(values, f"{wanted} is wanted")
    _want(not found & values, "it is given twice")
    rest.pop(0)
    if not is_list or rest[0] not in (",", "and"):
        return found | values
    rest.pop(0)
    return _parse_list(rest, read, wanted, is_list, found | values)


def _meant(words: list[str], repairs: int = 5) -> str:
    # Return the advice to write what was meant, put right word by word; "" if that leads nowhere.
    _, left, problem = _read(words)
    if not problem:
        return f"; write '{' '.join(words).replace(' ,', ',')}'"
    if not (left and repairs):
        return ""
    word = left[0]
    known = [form for name in (*UNIT_SECONDS, *DAY_NAMES) for form in (name, f"{name}s")
             if name.startswith(word.rstrip("s") or word)]
    found = [*known, f":{word}", f"{word}:00", re.sub("([0-9])([a-z])", r"\1 \2", word),
             f"every {word}", f"at {word}", f"and {word}"]
    trials = [[*words[: len(words) - len(left)], *repair.split(), *left[1:]] for repair in found]
    better = [trial for trial in trials if len("".join(_read(trial)[1])) < len("".join(left))]
    return _meant(better[0], repairs - 1) if better else ""


def _cron_sentence(words: list[str]) -> str:
    # Return what means the same as a line of crontab(5), not yet parsed; "" for other lines.
    line = " ".join(words).replace(" , ", ",")
    match line.split():
        case [minute, "*", "*", "*", "*"]:
            return CRON_LINES.get(line, f"every hour at :{minute:0>2}")
        case [minute, hour, "*", "*", days]:
            named = " and ".join(CRON_DAYS.get(day, day) for day in days.split(","))
            times = " and ".join(f"{number}:{minute:0>2}" for number in hour.split(","))
            return f"every {named} at {times}"
    return CRON_LINES.get(line, "")


# ---- 3. Records (pure) -----------------------------------------------------------------------

class Status(str, Enum):
    """Where a job is in its life: three that are active, three that are completed."""
    SCHEDULED, PENDING, RUNNING = "SCHEDULED", "PENDING", "RUNNING"
    SUCCESSFUL, FAILED, CANCELED = "SUCCESSFUL", "FAILED", "CANCELED"


ACTIVE, COMPLETED = tuple(Status)[:3], tuple(Status)[3:]
JOB_PATTERN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NAME_PATTERN = re.compile(r"\w[\w.-]{0,99}")
Strings = tuple[str, ...]


class Project(NamedTuple):
    """A pushed project. Its archive and its unpacked code are named by `push`."""
    name: str
    push: str
    folder: str  # of scrapy.cfg inside the archive, "" for its root
    settings: str  # the settings module that scrapy.cfg names, "" for none
    spiders: Strings  # sorted


class Job(NamedTuple):
    """A scheduled, waiting, running or finished job. Instants are POSIX seconds."""
    identifier: str
    status: Status
    actor: str  # USER or SCHEDULER
    schedule: str  # the spec as given
    project: str
    spider: str
    timestamp: float  # of the last change of status
    origin: float = 0.0  # when it was made: gives `every day` its time of day
    description: str = ""
    payload: str = "{}"
    arg: Strings = ()  # NAME=VALUE each, like those of `setting`
    setting: Strings = ()
    timeout: float | None = None  # seconds; None leaves it to --job-timeout
    priority: int = 0
    items: bool = False  # they go to stdout as JSON lines
    due: float | None = None  # of a SCHEDULED job
    run: str | None = None  # of a SCHEDULED job: the job that it made last
    scheduled_by: str | None = None  # of such a run: the SCHEDULED job
    pid: int | None = None  # of a RUNNING job
    started: float | None = None  # when the crawl began
    ending: str = ""  # why a RUNNING crawl was asked to end: "cancel", "timeout" or "stop"
    ending_since: float | None = None
    duration: int | None = None  # whole seconds
    exit_code: int | None = None
    reason: str | None = None
    stats: dict[str, Any] | None = None  # what Scrapy counted: items, responses, errors
    notice: bool = False  # --on-finish has not been told yet

    def __hash__(self) -> int:
        return hash(self.identifier)  # `stats` has no hash

    def recurrence(self) -> Recurrence:
        """Return when the job is due. Raise ScrapyDoError for a spec that this version refuses."""
        if (recurrence := parse_spec(self.schedule)) is None:
            raise BadRequest("'now' is not a recurring schedule")
        return recurrence.anchored(self.origin)


class Gone(NamedTuple):
    """A job or a project that was removed."""
    identifier: str = ""
    name: str = ""


Record = Job | Project | Gone
encode_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder each time
# The annotations of fields that allow a value, by the type of the value in JSON.
JSON_KINDS = {str: ("str", "Status"), bool: ("bool",), int: ("int", "float"), float: ("float",),
              type(None): ("None",), list: ("Strings",), dict: ("dict[str, Any]",)}


def describe(job: Job) -> str:
    """Return how the log names a job."""
    status = f"SCHEDULED ({job.schedule})" if job.status is Status.SCHEDULED else job.status.value
    took = f" after {job.duration} s" if job.duration is not None else ""
    run = f", a run of {job.scheduled_by}" if job.scheduled_by else ""
    end = f", {job.reason}" if job.reason else ""
    return f"job {job.identifier} {status}{took}: {job.project} {job.spider}{run}{end}"


def new_identifier() -> str:
    """Return a random UUID, RFC 9562 section 5.4; the module uuid takes 2 ms to import."""
    return re.sub("(.{8})(....).(...).(...)(.*)", r"\1-\2-4\3-a\4-\5", os.urandom(16).hex())


def local_time(moment: float | None) -> str | None:
    """Return POSIX seconds as local time like `2017-12-11 15:20:42.415793`; None stays None."""
    return None if moment is None else datetime.fromtimestamp(moment).isoformat(" ", "microseconds")


@functools.lru_cache(maxsize=100)  # whoever watches a list asks for the same jobs again
def job_text(job: Job) -> str:
    """Return what the API says of a job as JSON."""
    return encode_json({
        "identifier": job.identifier, "status": job.status, "actor": job.actor,
        "schedule": job.schedule, "scheduled_by": job.scheduled_by, "project": job.project,
        "spider": job.spider, "description": job.description, "payload": job.payload,
        "args": job.arg, "settings": job.setting, "timeout": job.timeout, "priority": job.priority,
        "items": job.items, "timestamp": local_time(job.timestamp),
        "started": local_time(job.started), "duration": job.duration,
        "next_run": local_time(job.due), "exit_code": job.exit_code, "reason": job.reason,
        "stats": job.stats})


def encode_answer(answer: Mapping[str, Any]) -> str:
    """Return an answer as JSON; the `jobs` in it are JSON texts already."""
    # To encode 10,000 jobs in a call would keep all other threads waiting.
    if "jobs" not in answer:
        return encode_json(answer)
    return f'{{"status": "ok", "jobs": [{", ".join(answer["jobs"])}]}}'


def encode_record(record: Record) -> str:
    """Return a record as JSON on one line, without the fields that have their default."""
    fields = {k: v for k, v in record._asdict().items() if v != record._field_defaults.get(k)}
    return encode_json({**fields, "gone": True} if isinstance(record, Gone) else fields)


def decode_record(fields: Any) -> Record:
    """Return the record that a line of the state file describes. Raise ValueError for a fault."""
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r:.60} is not an object")
    if fields.get("gone") is True:
        return Gone(str(fields.get("identifier", "")), str(fields.get("name", "")))
    kind: type[Job | Project] = Job if "identifier" in fields else Project
    try:
        return kind(**{name: _decode_field(kind, name, v) for name, v in fields.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the record {fields.get(kind._fields[0])!r:.60}: {error}") from None


def _decode_field(kind: type[Job | Project], name: str, value: Any) -> Any:
    # typing.NamedTuple keeps the text of an annotation in a ForwardRef.
    wanted = kind.__annotations__[name].__forward_arg__ if name in kind._fields else ""
    if {*wanted.split(" | ")}.isdisjoint(JSON_KINDS[type(value)]) or (
            "float" in wanted and not 0 <= (value or 0) < LAST_INSTANT):
        raise ValueError(f"no field {quoted(name)} can be {value!r:.60}")
    if isinstance(value, list):
        return tuple(map(str, value))
    return Status(value) if name == "status" else value


# ---- 4. Store --------------------------------------------------------------------------------

# Scrapy is started with this settings module, which takes over the settings of the project, and
# then tells the daemon what Scrapy found: neither the project's logging nor its output is read.
SHIM_MODULE = "scrapy_do_shim"
SHIM = """
import atexit, importlib, json, os, pathlib, sys, warnings
from pydispatch import dispatcher
from scrapy import exporters, signals
from scrapy.utils.misc import load_object

order = json.loads(os.environ.pop("SCRAPY_DO"))
os.environ["SCRAPY_SETTINGS_MODULE"] = order["settings"]  # the project sees no more
project = importlib.import_module(order["settings"])
globals().update({name: getattr(project, name) for name in dir(project) if name.isupper()})

def report(**found):
    pathlib.Path(order["report"]).write_text(json.dumps(found))

def report_stats(crawler):
    stats, uncounted = crawler.stats.get_stats(), crawler.settings["LOG_LEVEL"] in ("CRITICAL", 50)
    if "start_time" in stats:  # else the project counts nothing, and 0 would be wrong
        report(items=int(stats.get("item_scraped_count", 0)),
               responses=int(stats.get("response_received_count", 0)),
               errors=None if uncounted else int(stats.get("log_count/ERROR", 0)),
               finish_reason=str(stats.get("finish_reason", "")))

if order["command"] == "list":
    base = load_object(globals().get("SPIDER_LOADER_CLASS", "scrapy.spiderloader.SpiderLoader"))
    class SPIDER_LOADER_CLASS(base):
        @classmethod
        def from_settings(cls, settings):
            with warnings.catch_warnings(record=True) as caught:
                loader = base.from_settings(settings)
            report(spiders=list(map(str, loader.list())), warnings=[str(w.message) for w in caught])
            return loader
else:  # signals of whatever sender: the project's own collector, extensions and feeds are untouched
    dispatcher.connect(lambda sender: atexit.register(report_stats, sender), signals.spider_opened,
                       weak=False)  # feeds are stored after the spider closes, and may fail
    if order["items"]:
        sys.stdout.reconfigure(line_buffering=True, write_through=False)  # a print splits no item
        exporter = exporters.JsonLinesItemExporter(open(1, "ab", buffering=0, closefd=False))
        dispatcher.connect(exporter.export_item, signals.item_scraped)
"""

STATE_VERSION = 2
STATE_END = b"\n]}\n"


def sync(*paths: Path) -> None:
    """Make files, and the names in folders, durable, see fsync(2)."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_size(path: Path) -> int:
    """Return the length of a file in bytes; 0 when there is none."""
    with contextlib.suppress(OSError):
        return path.lstat().st_size
    return 0


def remove_tree(path: Path) -> None:
    """Delete a file or a folder with all that a crawl may have left there; log a failure."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if path.exists():  # there may be folders that even their owner cannot write to
            folders = [str(path)]
            for folder in folders:  # to which those in them are added
                os.chmod(folder, stat.S_IRWXU)
                folders += [e.path for e in os.scandir(folder) if e.is_dir(follow_symlinks=False)]
            shutil.rmtree(path)
    except (OSError, RecursionError) as error:
        log(f"{path} cannot be deleted: {error}; delete it by hand")


def open_log(path: Path) -> IO[bytes]:
    """Open a log to read it; a log that has not begun is empty. Raise NotFound for a link etc."""
    try:
        return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except FileNotFoundError:
        return open(os.devnull, "rb")
    except OSError as error:
        raise NotFound(f"the log cannot be read: {error.strerror}") from None


def parse_state(data: bytes) -> Any:
    """Return the document of a state file, without a last change that a crash has torn."""
    try:
        document = json.loads(data)
    except ValueError:
        # A crash leaves rubbish after a whole document, or a last change cut off or with zeros.
        whole, end, rest = data.partition(STATE_END)
        former, _, last = data.rpartition(b"\n,")
        if end and not rest and b"\0" not in last:
            raise  # somebody has edited the file, and made a mistake
        document = json.loads((whole if rest else former) + STATE_END)
        log("a crash has cut off the last change of the state file, which is left out")
    version = document.get("version") if isinstance(document, dict) else None
    if version != STATE_VERSION or not isinstance(document.get("changes"), list):
        raise ValueError(f"version {version!r}, this scrapy_do reads version {STATE_VERSION} with a"
                         " list of 'changes'")
    return document


def _encode_change(records: Iterable[Record]) -> bytes:
    # The comma comes first, so that the lines before are whole whatever happens to this one.
    return f"\n,[{', '.join(map(encode_record, records))}]".encode("utf-8", "backslashreplace")


class Store:
    """The data folder: its lock, the state file, archives, logs and working copies.

    Each line of the state file is a change, a list of records; the last of a job or project counts:

        {"version": 2, "since": 1790000000.0, "changes": [[]
        ,[{"name": "shop", "push": "1b9d...", "spiders": ["books"]}]
        ,[{"identifier": "0c1f...", "status": "RUNNING", ...}]
        ,[{"identifier": "9a7e...", "gone": true}]
        ]}

    With Daemon.lock held, a change is written over the closing brackets, and ends with new ones. A
    power cut only spoils a change that nobody was told of: bytes before it are safe, as in SQLite.
    """

    def __init__(self, folder: Path):
        """Create and lock the folder. Raise StorageError when it is in use or cannot be written."""
        self.folder, self.state_file = folder, folder / "state.json"
        self.projects, self.logs, self.work = folder / "projects", folder / "logs", folder / "work"
        self.spider_data, self.shim = folder / "spider-data", self.work / "shim"
        self.is_behind = False  # the file lacks changes that have happened
        self._since = time.time()  # when the file began; what is older in the folder is not ours
        self._size = self._most = 0  # of the file, and from which on it is written anew
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise StorageError(f"others could run code as you: 'chmod go-w {folder}'")
            # The kernel unlocks it when the process ends or executes another program.
            self.lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in (self.projects, self.logs, self.work, self.spider_data, self.shim):
                path.mkdir(mode=0o700, exist_ok=True)  # or a link to a folder, made by its owner
            # Whatever runs has files there, so the last daemon did not end well.
            self.was_crashed = any(path != self.shim for path in self.work.iterdir())
            path = self.shim / f"{SHIM_MODULE}.py"
            if not path.exists() or path.read_text() != SHIM:  # a crawl may just be reading it
                path.write_text(SHIM)
        except BlockingIOError:
            raise StorageError(f"another scrapy_do uses {folder}; see --data-dir") from None
        except OSError as error:
            raise StorageError(f"the data folder cannot be used: {error}; see --data-dir") from None

    def load(self) -> tuple[dict[str, Project], dict[str, Job]]:
        """Return the saved records, jobs in the order they were made in, or raise StorageError."""
        records: tuple[dict[str, Project], dict[str, Job]] = {}, {}
        try:
            if not os.path.lexists(self.state_file):
                with contextlib.suppress(OSError):  # from now on leftovers are known to be ours
                    self.rewrite([])
                return records
            document = parse_state(self.state_file.read_bytes())
            self._since = float(document.get("since", self._since))
            for fields in itertools.chain(*document["changes"]):
                apply_record(decode_record(fields), *records)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise StorageError(f"{self.state_file} cannot be read: {error}; nothing was changed;"
                               " mend the file, or move the whole folder away") from None
        return records

    def sweep(self, known: Collection[str], running: Collection[str]) -> None:
        """Delete what a crash left behind: uploads, code and logs not known, and working copies."""
        # What is older than the state file stays, since that may have been moved away by hand.
        for path in (*self.projects.iterdir(), *self.logs.iterdir()):
            if (path.stem not in known and JOB_PATTERN.fullmatch(path.stem)
                    and path.lstat().st_mtime >= self._since):
                remove_tree(path)
        for path in self.work.iterdir():
            if path != self.shim and path.stem not in running:
                remove_tree(path)

    def tree(self, project: Project) -> Path:
        """Return the folder of a project's code; its archive is beside it, with `.zip`."""
        return self.projects / project.push

    def log_files(self, identifier: str) -> list[Path]:
        """Return the logs of a job, its stdout and its stderr, which may not exist."""
        return [self.logs / f"{identifier}.{stream}" for stream in ("out", "err")]

    def append(self, records: Sequence[Record]) -> bool:
        """Save a change; False when the file must be written anew. Raise OSError."""
        if self.is_behind or self._size >= self._most or file_size(self.state_file) != self._size:
            return False
        data = _encode_change(records) + STATE_END
        start = self._size - len(STATE_END)
        with open(os.open(self.state_file, os.O_RDWR), "r+b", buffering=0) as file:
            try:
                if os.pwrite(file.fileno(), data, start) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # it was refused, even if we end right now
                    os.ftruncate(file.fileno(), self._size)
                    os.pwrite(file.fileno(), STATE_END, start)
                raise
        self._size = start + len(data)
        return True

    def rewrite(self, records: Iterable[Record]) -> None:
        """Write the file anew: beside, fsync, rename, fsync the folder. Raise OSError."""
        temporary = self.folder / "state.json.new"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as new:
            new.write(b'{"version": %d, "since": %r, "changes": [[]' % (STATE_VERSION, self._since))
            new.writelines(_encode_change([record]) for record in records)
            new.write(STATE_END)
            self._size = new.tell()
        sync(temporary)
        os.replace(temporary, self.state_file)
        sync(self.folder)
        self._most = 2 * self._size + MIB
        self.is_behind = False


def apply_record(record: Record, projects: dict[str, Project], jobs: dict[str, Job]) -> None:
    """Put a record into the dictionaries, or take it out."""
    if isinstance(record, Job):
        jobs[record.identifier] = record
    elif isinstance(record, Project):
        projects[record.name] = record
    else:
        jobs.pop(record.identifier, None)
        projects.pop(record.name, None)


# ---- 5. Archives and crawls ------------------------------------------------------------------

PUSH_CALL = "curl -sS .../push-project.json -F archive=@demo.zip"  # as messages advise it
ARCHIVE_ENTRIES = 10_000
ARCHIVE_MIB = 1024  # as it comes out
# The time of each file of code: a crawl that writes into one, through a hard link, changes it.
CODE_STAMP_NS = 1_600_000_000 * 10**9
CODE_SUFFIXES = (".py", ".pyc")


def unpack(archive: Path, folder: Path) -> Project:
    """Unpack an archive into a new folder; return what `scrapy.cfg` says, or raise BadRequest."""
    import zipfile
    folder.mkdir(mode=0o700)
    try:
        with zipfile.ZipFile(archive) as bundle:
            entries = bundle.infolist()
            if (len(entries) > ARCHIVE_ENTRIES  # and zipfile unpacks no more than these sizes
                    or sum(entry.file_size for entry in entries) > ARCHIVE_MIB * MIB):
                raise TooLarge(f"it unpacks to over {ARCHIVE_ENTRIES} entries or {ARCHIVE_MIB} MiB")
            for entry in entries:
                name = entry.filename = entry.filename.replace("\\", "/")  # from Windows
                mode = entry.external_attr >> 16
                if stat.S_ISLNK(mode):
                    raise BadRequest(f"{quoted(name)} is a link; zip without 'zip --symlinks'")
                if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
                    raise BadRequest(f"the archive holds {quoted(name)}, a path out of its folder")
                path = bundle.extract(entry, folder)
                if mode & 0o777 and not entry.is_dir():
                    os.chmod(path, mode & 0o777 | stat.S_IRUSR | stat.S_IWUSR)
                if name.endswith(CODE_SUFFIXES):
                    os.utime(path, ns=(CODE_STAMP_NS, CODE_STAMP_NS))
    except Exception as error:  # a damaged file makes zipfile raise nearly anything
        if (isinstance(error, ScrapyDoError) or getattr(error, "errno", None)
                in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE)):
            raise
        with open(archive, "rb") as file:
            start = file.read(30)
        if start.startswith(b"PK"):
            problem = str(error).replace(f"{folder}/", "")
            raise BadRequest(f"the zip cannot be unpacked: {problem:.300}; zip it anew") from None
        kind = " (gzip, tar.gz?)" if start.startswith(b"\x1f\x8b") else ""
        raise BadRequest(f"it begins with {start!r:.70}{kind}, so it is no zip: 'git archive -o"
                         f" demo.zip HEAD' makes one; send it only with @: {PUSH_CALL}") from None
    return _read_config(archive.stem, folder, {entry.filename for entry in entries})


def _read_config(push: str, folder: Path, names: Collection[str]) -> Project:
    # The project's name is in [deploy], or in the sections [deploy:TARGET] if these agree.
    import configparser
    found = sorted(name for name in names if os.path.basename(name) == "scrapy.cfg")
    if len(found) != 1:
        listed = f"several scrapy.cfg: {', '.join(found):.300}" if found else "no scrapy.cfg"
        raise BadRequest(f"the archive has {listed}; zip the folder of one project, with its own")
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read_string((folder / found[0]).read_text(encoding="utf-8-sig"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise BadRequest(f"scrapy.cfg cannot be read: {error!s:.500}") from None
    sections = ["deploy", *(each for each in config.sections() if each.startswith("deploy:"))]
    named = [config.get(each, "project", fallback="").strip() for each in sections]
    name = "' and '".join(sorted({*named[:1]} - {""} or {*named} - {""}))
    if not NAME_PATTERN.fullmatch(name):  # which several, put together so, are not either
        raise BadRequest(f"the project cannot be called '{name:.200}'; in scrapy.cfg, add [deploy]"
                         " with 'project = NAME', up to 100 letters, digits, _, inside - and . too")
    settings = config.get("settings", name, fallback=config.get("settings", "default", fallback=""))
    return Project(name, push, os.path.dirname(found[0]), settings.strip(), ())


def copy_tree(source: str, target: str) -> bool:
    """Make a working copy; return False when a crawl has written into the code in place."""
    os.mkdir(target)
    is_clean = True
    with os.scandir(source) as entries:
        for entry in entries:
            path = os.path.join(target, entry.name)
            if entry.is_dir(follow_symlinks=False):
                is_clean = copy_tree(entry.path, path) and is_clean
            elif entry.name.endswith(CODE_SUFFIXES):
                is_clean = entry.stat().st_mtime_ns == CODE_STAMP_NS and is_clean
                try:
                    os.link(entry.path, path)  # a tenth of the time of a copy
                except OSError:  # a file system without links, or with too many of them
                    shutil.copy2(entry.path, path)
            else:
                shutil.copy2(entry.path, path)
    return is_clean


def keep_bytecode(source: Path, target: Path) -> None:
    """Move compiled modules to where crawls get them, so that no crawl compiles them again."""
    for path in source.rglob("__pycache__/*.pyc"):
        kept = target / path.relative_to(source)
        if stat.S_ISREG(path.lstat().st_mode) and kept.parent.parent.is_dir():
            kept.parent.mkdir(exist_ok=True)
            shutil.move(path, kept)  # maybe to another file system
            os.utime(kept, ns=(CODE_STAMP_NS, CODE_STAMP_NS))


class Crawl:
    """A command that the daemon has started, with all that descends from it: a crawl or a listing.

    What it leaves behind becomes a child of the daemon, a subreaper of prctl(2), and is known by
    session or SCRAPY_JOB. Daemon.lock is held to start, signal or reap it, so that `pid` is right.
    """

    def __init__(self, identifier: str, job: Job | None = None, pid: int = 0):
        self.identifier, self.pid = identifier, pid  # the pid is 0 until it is started
        self.job = job  # as it was when it got its slot; None for a listing
        self.began = time.monotonic()
        self.deadline = float("inf")  # by time.monotonic: when the timer ends or kills it
        self.was_killed = False  # it took SIGKILL to end it
        self.is_over = threading.Event()  # it is gone, with its last status saved

    def start(self, command: Sequence[str], folder: Path, environment: dict[str, str],
              logs: Sequence[Path]) -> None:
        """Start the command. Raise ScrapyDoError when that fails."""
        words = [word.encode("utf-8", "surrogateescape") for word in command]  # in any locale
        # Opened to append, so that a log which somebody truncates does not get filled with NUL.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with (open(os.open(logs[0], flags, 0o600), "wb") as out,
                  open(os.open(logs[1], flags, 0o600), "wb") as err):
                child = subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=err,
                                         stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            status = 400 if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR) else 507
            home, is_program, _ = command[0].rpartition("/bin/")
            how = f"python3 -m venv {home} && {home}/bin/python -m pip install scrapy; "
            cure = f"; {how if is_program else ''}install Scrapy, or say where it is by --scrapy"
            raise ScrapyDoError(f"'{command[0]}' cannot be started: {error.strerror}"
                                f"{cure if status == 400 else ''}", status) from None
        child.returncode = 0  # so that Popen leaves it to `reap`
        self.pid, self.began = child.pid, time.monotonic()

    def wait(self, options: int = 0) -> bool:
        """Wait until the command has ended; with os.WNOHANG only tell whether it has."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | options) is not None

    def end_rest(self, kill_after: float) -> None:
        """End what it left behind: SIGTERM once, SIGKILL so many seconds after its first signal."""
        kill_at = min(self.deadline, time.monotonic() + (0.0 if self.was_killed else kill_after))
        find = functools.partial(find_family, self.pid, self.identifier)
        self.was_killed = end_processes(find, kill_at) or self.was_killed

    def reap(self) -> int:
        """Return the exit code of the command, -N for signal N."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def outer_environment() -> dict[str, str]:
    """Return the environment of the daemon without what is for the daemon alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith(
        ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_", "CREDENTIALS_DIRECTORY", "SCRAPY_DO_HANDOVER"))}


def crawl_arguments(job: Job) -> list[str]:
    """Return the words after `scrapy` of a crawl. A project's LOG_FILE would hide its log."""
    args = [f"payload={job.payload}", *job.arg] if job.payload != "{}" else job.arg
    options = [("-a", arg) for arg in args] + [("-s", s) for s in ("LOG_FILE=", *job.setting)]
    return ["crawl", job.spider, *itertools.chain(*options)]


def read_stats(path: Path) -> dict[str, Any] | None:
    """Return what the shim reports: of a crawl its statistics. None when there is no report."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_bytes())) or None
    return None


def read_report(path: Path, output: str, work: Path) -> dict[str, Any]:
    """Return the spiders and Scrapy's warnings. Raise BadRequest for no spiders, or a bad name."""
    # A launcher that drops our environment has no report; then each line of output is a spider.
    report = read_stats(path) or {"spiders": output.splitlines(), "warnings": []}
    spiders = sorted({name.strip() for name in report["spiders"]} - {""})
    noise = r"(?m)^Traceback .*\n(?: .*\n)*|See above traceback for details\."
    warnings = [" ".join(re.sub(noise, "", text).replace(f"{work}/", "").split())[:500]
                for text in report["warnings"]]
    if not spiders:
        raise BadRequest("the project has no spiders; "
                         + ("".join(warnings[:1]) or "check SPIDER_MODULES in its settings"))
    if bad := [name for name in spiders if name.startswith("-") or not name.isprintable()]:
        raise BadRequest(f"Scrapy cannot run a spider called {quoted(bad[0])}; rename it")
    return {"spiders": spiders, "warnings": warnings}


def explain_list_error(command: Sequence[str], errors: str, work: Path) -> str:
    """Return why `scrapy list` failed: the exception, its cure, then the project's own frames."""
    # The last traceback is the one that ended the program. `work` is where scrapy.cfg is.
    _, found, last = errors.replace(f"{work}/", "").rpartition(" (most recent call last):\n")
    own = re.findall('(?m)^  (File "[^/<].*)', last)[-8:]
    lines = [line for line in re.sub(r"\A(?:  .*\n)+", "", last).splitlines() if line.strip()]
    why = lines[:8] if found else lines[-8:]
    missing = "".join(re.findall(r"No module named '?(\w+)", errors)[-1:])
    # PyPI may have a stranger's package by the name of a module of the project's own.
    if missing and not any((work / f"{missing}{suffix}").exists() for suffix in ("", ".py")):
        python = re.sub("scrapy$", "python", command[0])
        pip = f"{python} -m pip" if "python" in os.path.basename(python) else "pip"
        if missing != "scrapy" and (work / "requirements.txt").exists():
            missing = "-r requirements.txt"
        cure = f"install what is missing: {pip} install {missing}"
        if found and not own:
            cure = "scrapy.cfg or a setting names it; put it into the archive, or install it"
        why.append(cure)
    return "'scrapy list' failed in the project: " + "\n".join([*why, *own])


def end_processes(find: Callable[[], list[psutil.Process]], kill_at: float) -> bool:
    """End all that `find` finds: SIGTERM once, SIGKILL from `kill_at` on. True if it took that."""
    asked: set[psutil.Process] = set()
    is_late = False
    while True:
        try:
            rest = find()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            time.sleep(0.05)  # until there is a file descriptor to look: none may be overlooked
            continue
        if not rest:
            return is_late
        is_late = time.monotonic() >= kill_at
        if time.monotonic() >= kill_at + 5.0:  # they are of another user, say by sudo
            log(f"these processes cannot be killed: {rest}")
            return is_late
        for process in rest if is_late else {*rest} - asked:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL if is_late else signal.SIGTERM)
        asked.update(rest)
        psutil.wait_procs(rest, 0.02)


def child_pids(pid: int) -> list[int]:
    """Return the children of a process: Linux lists them by thread, see proc_pid_task(5)."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split())
    return found


def _read_environment(process: psutil.Process) -> dict[str, str]:
    # {} if it is gone, hidden, or in the kernel (session 0). In the middle of exec it shows none.
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        for _ in range(2):
            if (environment := process.environ()) or not os.getsid(process.pid):
                return environment
            time.sleep(0.005)
    return {}


def find_family(leader: int, identifier: str) -> list[psutil.Process]:
    """Return the living processes of a crawl but for its leader, and all that descend from them."""
    found = []  # they are below this process, so nobody else's are looked at
    todo = [(pid, False) for pid in child_pids(os.getpid())]
    for pid, is_ours in todo:  # it grows
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            process = psutil.Process(pid)
            is_ours = (is_ours or os.getsid(pid) == leader
                       or _read_environment(process).get("SCRAPY_JOB") == identifier)
            todo += [(child, is_ours) for child in child_pids(pid)]
            if is_ours and pid != leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def find_strays(spider_data: Path, kept: Collection[str]) -> list[psutil.Process]:
    """Return what a daemon on our folder left running when it died, but for the jobs to keep."""
    return [process for process in psutil.process_iter()
            if (found := _read_environment(process)).get("SPIDER_DATA_DIR") == str(spider_data)
            and found.get("SCRAPY_JOB") not in (None, *kept)]


# ---- 6. Daemon -------------------------------------------------------------------------------

RETRY_SECONDS = 2.0  # between attempts to save what the disk did not take
ARGUMENT_BYTES = 100 * 1024  # payload, args and settings together; Linux takes 128 KiB for one
NOTICE_SECONDS = 60.0  # that the command of --on-finish may take
BY_USER = "canceled by the user"


class Waiting:
    """The PENDING jobs, which start by priority, then in their order, as soon as all limits allow.

    Jobs that count for the same limits wait in a line of their own, so that only the first job of
    each line has to be looked at. Daemon.lock guards it.
    """

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._numbers = itertools.count()
        self._lines: dict[Any, list[tuple[int, int, Job]]] = {}  # heaps

    def _limits(self, job: Job) -> tuple[tuple[Any, int], ...]:
        # What a job counts for, with the limits; runs of one schedule never overlap.
        limits = ((("run", job.scheduled_by), 1 if job.scheduled_by else 0),
                  (("project", job.project), self._options.project_slots),
                  (("spider", job.project, job.spider), self._options.spider_slots))
        return tuple((key, most) for key, most in limits if most)

    def put(self, job: Job) -> None:
        """Have a job wait."""
        entry = (-job.priority, next(self._numbers), job)
        heapq.heappush(self._lines.setdefault(self._limits(job), []), entry)

    def pop(self, running: Collection[Job]) -> Job | None:
        """Return the next job, beside those that have a slot; None when no job may start."""
        if len(running) >= self._options.job_slots:
            return None
        taken = Counter(key for job in running for key, _ in self._limits(job))
        free = [line for line in self._lines if all(taken[key] < most for key, most in line)]
        if not free:
            return None
        first = min(free, key=lambda line: self._lines[line][0])
        job = heapq.heappop(self._lines[first])[-1]
        if not self._lines[first]:
            del self._lines[first]
        return job


class Daemon:
    """Keep projects and jobs, and run the crawls: all that the API can ask for.

    Methods without an underscore are for callers in any thread. They return from a change when it
    is on the disk, and raise a ScrapyDoError when it is refused; then nothing has changed. Methods
    that want `lock` to be held say so. `options` are those of the command line.
    """

    def __init__(self, store: Store, options: argparse.Namespace):
        self.store, self.options = store, options
        # Held by whoever changes anything below, or starts or reaps a child. Readers do without:
        # list(dictionary) is one step of the interpreter, and records never change.
        self.lock = threading.Lock()
        self.projects: dict[str, Project] = {}  # by name
        self.jobs: dict[str, Job] = {}  # by identifier, in the order in which they were made
        self.is_closing = False
        self._code_lock = threading.Lock()  # held by whoever copies or deletes unpacked code
        self._waiting = Waiting(options)
        self._crawls: dict[str, Crawl] = {}  # of each job that has a slot, and each `scrapy list`
        self._is_hooking = False  # the command of --on-finish runs, which is not ours to reap
        self._due: list[tuple[float, str]] = []  # heap of schedules; entries may be stale
        self._counts = Counter[Any]()  # since the start, for status.json
        self._wake = threading.Event()  # the timer is to look again
        self._notices: queue.SimpleQueue[Job] = queue.SimpleQueue()  # jobs to tell --on-finish of
        self._began = time.monotonic()
        self._lead = time.time() - self._began  # of the system clock, to notice that it was set
        self._cpu_mark = time.process_time(), self._began  # at the last status

    # Start and stop

    def start(self, is_reloaded: bool = False) -> None:
        """Load the state, take over or end what runs, and go to work. Raise StorageError."""
        projects, jobs = self.store.load()
        # Crawls of a former program in this process are our children.
        children = child_pids(os.getpid()) if is_reloaded else []
        running = [job for job in jobs.values() if job.status is Status.RUNNING]
        adopted = {job.identifier: job for job in running if job.pid in children}
        if running or self.store.was_crashed:
            find = functools.partial(find_strays, self.store.spider_data, adopted)
            end_processes(find, time.monotonic())
        self.store.sweep({*jobs, *(project.push for project in projects.values())}, adopted)
        with self.lock:
            self.projects.update(projects)
            self.jobs.update(jobs)
            left = [job for job in jobs.values() if job.identifier not in adopted]
            # What was interrupted had come before all that waits.
            self.save(*filter(None, map(self._recover, left)), is_fact=True)
            for job in jobs.values():
                if self.jobs[job.identifier] is job:
                    self._apply(job)
            self._counts = Counter({Status.RUNNING: len(adopted)})
            for job in adopted.values():
                self._set_deadline(job, self._start_thread(job))
            self.dispatch()
        threading.Thread(target=self._run_timer, name="timer", daemon=True).start()
        if self.options.on_finish:
            threading.Thread(target=self._run_hooks, name="on-finish", daemon=True).start()

    def _recover(self, job: Job) -> Job | None:
        # Return a job as it must be after a stop, a crash or a clock set back, after which a due
        # time may be later than the spec allows; None for no change.
        now = time.time()
        try:
            if job.status not in COMPLETED:
                self.find_project(job.project)
            if job.status is Status.RUNNING:
                return self._ended(job, None, False)
            if job.status is Status.SCHEDULED and now >= SANE_INSTANT:
                recurrence = job.recurrence()
                if job.due is None or job.due > recurrence.latest_after(now):
                    return job._replace(due=recurrence.next_after(now))
        except ScrapyDoError as error:
            return self._finish(job, Status.FAILED, str(error))
        return None

    def close(self) -> None:
        """End all crawls, whose jobs become PENDING again, save the state, and wait for threads."""
        with self.lock:
            self.is_closing = True
            self._end(self._select([Status.RUNNING]), "stop")
        self._wake.set()  # the timer kills each `scrapy list`
        for thread in threading.enumerate():
            if thread.name.startswith(("crawl-", "timer")):
                thread.join()
        with self.lock, contextlib.suppress(OSError):
            self.store.rewrite([*self.projects.values(), *self.jobs.values()])

    # Changes

    def save(self, *records: Record, is_fact: bool = False) -> None:
        """Put records on the disk, then where readers see them. `lock` is held.

        What the disk does not take raises StorageError, but a fact, which is written later.
        """
        was_behind = self.store.is_behind
        try:
            while (records or was_behind) and not self.store.append(records):
                # Without the change: to append it may still fail.
                self.store.rewrite([*self.projects.values(), *self.jobs.values()])
        except OSError as error:
            self.store.is_behind = True  # a write without its fsync may still reach the disk
            message = f"{self.store.state_file} cannot be written: {error.strerror}"
            if not was_behind:
                log(f"{message}; changes are refused until that is mended")
                self._wake.set()  # the timer tries again
            if records and not is_fact:
                raise StorageError(f"not saved: {message}; mend that and ask again") from None
        if was_behind and not self.store.is_behind:
            log(f"{self.store.state_file} can be written again")
        for record in records:
            self._apply(record)

    def _apply(self, record: Record) -> None:
        # Put a record where readers see it, and a job where the timer or a slot finds it.
        former = self.jobs.get(record.identifier) if isinstance(record, Job) else None
        apply_record(record, self.projects, self.jobs)
        if not isinstance(record, Job):
            return
        if record.due is not None:
            heapq.heappush(self._due, (record.due, record.identifier))
            if self._due[0][1] == record.identifier:
                self._wake.set()
        if record.status is Status.PENDING:
            self._waiting.put(record)
        if record.notice:
            self._notices.put(record)
        if former is None or former.status is not record.status:
            log(describe(record))
            if Status.RUNNING in (record.status, former and former.status):
                self._counts[record.status] += 1

    def _retire(self) -> None:
        # Forget finished jobs that are too many, too old, or have too much log. `lock` is held.
        oldest = time.time() - (self.options.keep_days or 10**6) * DAY_SECONDS
        most = self.options.keep_mib * MIB
        size, gone = 0, list[Gone]()
        for count, job in enumerate(self._select(COMPLETED)):
            size += sum(map(file_size, self.store.log_files(job.identifier))) if most else 0
            is_long = size > most and count > 0  # the newest job stays
            if is_long or count >= self.options.completed_cap or job.timestamp < oldest:
                gone.append(Gone(job.identifier))
        with contextlib.suppress(ScrapyDoError):
            self.save(*gone)
            for path in itertools.chain(*(self.store.log_files(each.identifier) for each in gone)):
                remove_tree(path)

    # Projects

    def push(self, archive: Path) -> dict[str, Any]:
        """Make an archive a project or a project's new code; delete it on failure."""
        try:
            project = unpack(archive, archive.with_suffix(""))
            found = self._list(project)
            project = project._replace(spiders=tuple(found["spiders"]))
            sync(archive, archive.parent)
            with self.lock:
                active = self._select(ACTIVE, project.name)
                if lost := [job for job in active if job.spider not in project.spiders]:
                    raise Conflict(f"cancel the jobs whose spiders it lacks: {_name_jobs(lost)}")
                former = self.projects.get(project.name)
                self.save(project)
        except BaseException:
            self._discard(archive.with_suffix(""))
            raise
        log(f"project {project.name} was pushed with {len(project.spiders)} spiders")
        for warning in found["warnings"]:
            log(f"project {project.name}: Scrapy warns: {warning}")
        if former is not None:
            self._discard(self.store.tree(former))
        return {"name": project.name, **found}

    def _discard(self, tree: Path) -> None:
        with self._code_lock:
            remove_tree(tree.with_suffix(".zip"))
            remove_tree(tree)

    def remove(self, name: str) -> dict[str, Any]:
        """Forget a project and its archive. Raise Conflict while it has active jobs."""
        with self.lock:
            project = self.find_project(name)
            if active := self._select(ACTIVE, name):
                raise Conflict(f"{quoted(name)} has active jobs, cancel-job.json with"
                               f" project={name} cancels all: {_name_jobs(active)}")
            self.save(Gone("", name))
        log(f"project {name} was removed")
        self._discard(self.store.tree(project))
        return {}

    def find_project(self, name: str) -> Project:
        """Return a project. Raise NotFound when there is none of that name."""
        if (project := self.projects.get(name)) is None:
            raise NotFound(f"there is no project {quoted(name)}; {suggest(name, self.projects)}"
                           "list-projects.json shows all")
        return project

    def list_projects(self) -> dict[str, Any]:
        """Return the names of the projects, sorted."""
        return {"projects": sorted(self.projects)}

    def list_spiders(self, project: str) -> dict[str, Any]:
        """Return a project's name and its spiders, sorted."""
        return {"project": project, "spiders": self.find_project(project).spiders}

    def _list(self, project: Project) -> dict[str, Any]:
        # Ask Scrapy for the spiders of an unpacked project, and what it warns of, or raise
        # BadRequest with the reason. What was compiled is kept in the tree.
        listing, tree = Crawl(new_identifier()), self.store.tree(project)
        work, limit = self.store.work / listing.identifier, self.options.list_timeout
        report, folder = work.with_suffix(".json"), work / project.folder
        logs = [work.with_suffix(suffix) for suffix in (".out", ".err")]
        words = ("list", "-s", "LOG_FILE=", "-s", "LOG_STDOUT=0")
        try:
            copy_tree(str(tree), str(work))
            with self.lock:
                command = self._start_scrapy(listing, project, words, logs)
                listing.deadline = listing.began + limit
                self._crawls[listing.identifier] = listing
                self._wake.set()
            listing.wait()
            is_late = listing.was_killed
            listing.end_rest(0.0)
            with self.lock:
                del self._crawls[listing.identifier]
                exit_code = listing.reap()
                self._wake.set()
            if self.is_closing:
                raise Unavailable("the daemon is stopping; push again when it has been started")
            if is_late:
                raise BadRequest(f"'scrapy list' did not end within {limit:g} s (--list-timeout)")
            output, errors = (path.read_text("utf-8", "replace") for path in logs)
            if exit_code != 0:
                raise BadRequest(explain_list_error(command, errors or output, folder))
            keep_bytecode(work, tree)
            return read_report(report, output, folder)
        finally:
            for path in (work, report, *logs):
                remove_tree(path)

    # Jobs

    def schedule(self, project: str, spider: Sequence[str], when: str, description: str = "",
                 payload: str = "{}", timeout: str | None = None, priority: str = "0",
                 items: str = "0", arg: Sequence[str] = (), setting: Sequence[str] = (),
                 ) -> dict[str, Any]:
        """Make a job for each spider, `*` is all. All values are texts, as a form has them.

        `timeout` is in seconds; None leaves it to --job-timeout.
        """
        recurrence, now = parse_spec(when), time.time()
        _check_arguments(description, payload, arg, setting)
        if recurrence is not None and now < SANE_INSTANT:
            raise Unavailable(f"the system clock shows {local_time(now)}; set it, and ask again")
        job = Job(
            "", Status.PENDING if recurrence is None else Status.SCHEDULED, "USER", when, project,
            "", now, now, description, payload, tuple(arg), tuple(setting),
            timeout=None if timeout is None else checked("timeout", parse_seconds, timeout, 0.001),
            priority=checked("priority", parse_whole, priority, -(10**6), 10**6),
            items=bool(checked("items", parse_whole, items, 0, 1)))
        with self.lock:
            jobs = [job._replace(identifier=new_identifier(), spider=name, due=None
                    if recurrence is None else recurrence.anchored(now).next_after(now))
                    for name in self._find_spiders(project, spider)]
            self.save(*jobs)
            self.dispatch()
        answer = {"identifier": jobs[0].identifier, "next_run": local_time(jobs[0].due)}
        several = {"identifiers": [job.identifier for job in jobs]} if len(jobs) > 1 else {}
        return {**answer, **several}

    def _find_spiders(self, project: str, names: Sequence[str]) -> list[str]:
        known = self.find_project(project).spiders
        if wrong := [name for name in names if name not in known and name != "*"]:
            raise NotFound(f"there is no spider {quoted(wrong[0])}; {suggest(wrong[0], known)}"
                           f"list-spiders.json?project={project} shows the {len(known)} there are")
        return list(known if "*" in names else dict.fromkeys(names))

    def find_job(self, identifier: str) -> Job:
        """Return a job. Raise NotFound when there is none of that identifier."""
        if (job := self.jobs.get(identifier)) is None:
            raise NotFound(f"there is no job {quoted(identifier)} (any more); list-jobs.json"
                           "?status=COMPLETED shows those that --completed-cap keeps")
        return job

    def _select(self, statuses: Collection[Status], project: str | None = None,
                spider: str | None = None) -> list[Job]:
        # The jobs in these statuses, the newest change first; None stands for all.
        jobs = [job for job in list(self.jobs.values()) if job.status in statuses
                and project in (None, job.project) and spider in (None, job.spider)]
        return sorted(jobs, key=lambda job: job.timestamp, reverse=True)

    def list_jobs(self, id: str | None = None, status: str | None = None,
                  project: str | None = None, spider: str | None = None,
                  scheduled_by: str | None = None, limit: str | None = None) -> dict[str, Any]:
        """Return one job by its `id`, or the jobs in a status or group of them, newest first."""
        others = (project, spider, scheduled_by, limit)
        if (id is None) is (status is None) or (id is not None and any(others)):
            raise BadRequest("this needs either id or status, as in list-jobs.json?status=ACTIVE")
        if id is not None:
            return {"jobs": [job_text(self.find_job(id))]}
        groups = {"ACTIVE": ACTIVE, "COMPLETED": COMPLETED, **{s.value: (s,) for s in Status}}
        if status not in groups:
            raise BadRequest(f"there is no such status; use one of {', '.join(groups)}")
        jobs = [job for job in self._select(groups[status], project, spider)
                if scheduled_by in (None, job.scheduled_by)]
        count = None if limit is None else checked("limit", parse_whole, limit, 1, 10**9)
        return {"jobs": [job_text(job) for job in jobs[:count]]}

    def cancel(self, id: str | None = None, project: str | None = None,
               spider: str | None = None) -> dict[str, Any]:
        """Cancel a job, or all active jobs of a project or its spider; return when they are gone.

        Raise Conflict for a job that has ended.
        """
        if (id is None) is (project is None) or (id is not None and spider is not None):
            raise BadRequest("cancel-job.json needs either id, or project and maybe spider")
        with self.lock:
            if project is not None:
                self.find_project(project)
            jobs = self._select(ACTIVE, project, spider) if id is None else [self.find_job(id)]
            running = [job for job in jobs if job.status is Status.RUNNING]
            waiting = [job for job in jobs if job.status in (Status.SCHEDULED, Status.PENDING)]
            self.save(*(self._finish(job, Status.CANCELED, BY_USER) for job in waiting))
            self._end(running, "cancel")
            self._wake.set()  # finished jobs may be too many now
            crawls = [self._crawls[job.identifier] for job in running]
        for crawl in crawls:
            crawl.is_over.wait()
        if id is None:
            return {"canceled": len(jobs)}
        job = self.jobs.get(id, jobs[0]) if crawls else jobs[0]
        if job.status in (Status.SUCCESSFUL, Status.FAILED) or jobs[0].status in COMPLETED:
            raise Conflict(f"job {id} has ended already, it is {job.status.value}")
        return {}

    def _end(self, jobs: Sequence[Job], why: str) -> None:
        # Note why running crawls are to end, and send each SIGTERM, once: a second SIGTERM would
        # tell Scrapy to drop its feeds. A crawl that has just ended by itself is left alone, and a
        # full disk does not keep a crawl going. `lock` is held.
        now = time.time()
        jobs = [job for job in jobs if not self._crawls[job.identifier].wait(os.WNOHANG)]
        noted = [job for job in jobs if not job.ending or why == "cancel"]
        self.save(*(job._replace(ending=why, ending_since=job.ending_since or now)
                    for job in noted), is_fact=True)
        for job in jobs:
            if not job.ending:
                os.kill(self._crawls[job.identifier].pid, signal.SIGTERM)
                self._set_deadline(self.jobs[job.identifier], self._crawls[job.identifier])

    def status(self) -> dict[str, Any]:
        """Return what the daemon does now, and has done since it was started."""
        projects, now = list(self.projects.values()), time.monotonic()
        (cpu, instant), self._cpu_mark = self._cpu_mark, (time.process_time(), now)
        share = (self._cpu_mark[0] - cpu) / max(1e-6, now - instant)
        statuses = Counter(job.status for job in list(self.jobs.values()))
        up = int(now - self._began)
        parts = ((up // 86400, "d"), (up // 3600 % 24, "h"), (up // 60 % 60, "m"), (up % 60, "s"))
        return {
            **_ask_system(int(10 * now)), "cpu-usage": round(100 * share, 1),
            "time": local_time(time.time()), "timezone": "; ".join(time.tzname),
            "uptime": " ".join(f"{number}{unit}" for number, unit in parts if number) or "0s",
            "jobs-run": self._counts[Status.RUNNING],
            **{f"jobs-{status.value.lower()}": self._counts[status] for status in COMPLETED},
            "runs-skipped": self._counts["skipped"],
            **{f"jobs-{status.value.lower()}": statuses[status] for status in ACTIVE},
            "projects": len(projects), "spiders": sum(len(each.spiders) for each in projects),
            "daemon-version": __version__}

    # The timer

    def _run_timer(self) -> None:
        while not self.is_closing or self._crawls:
            seconds = RETRY_SECONDS
            try:
                with self.lock:
                    seconds = self._tick(time.time())
            except Exception as error:
                log_crash("the timer", error)
            self._wake.wait(seconds)
            self._wake.clear()

    def _tick(self, now: float) -> float:
        # Do what is due, and return after how many seconds to look again. `lock` is held.
        self._expire()
        if not self.is_closing:
            lead, self._lead = self._lead, now - time.monotonic()
            if lead - self._lead > 1.0:
                log("the system clock was set back; due times that are too far away are set again")
                fixed = filter(None, map(self._recover, self._select([Status.SCHEDULED])))
                self.save(*fixed, is_fact=True)
            self.save(*self._fire(now), is_fact=True)  # and what the disk did not take before
            self._retire()
            self.dispatch()
            known = {crawl.pid for crawl in self._crawls.values()}
            with contextlib.suppress(OSError):  # without file descriptors it has to wait
                for pid in child_pids(os.getpid()):
                    if pid not in known and not self._is_hooking:  # a crawl has left it behind
                        os.waitpid(pid, os.WNOHANG)
        # A wait does not notice that the system clock was set: look once a minute.
        seconds = [RETRY_SECONDS if self.store.is_behind else 60.0]
        seconds += [crawl.deadline - time.monotonic() for crawl in self._crawls.values()]
        seconds += [due - now for due, _ in self._due[:1] if not self.is_closing]
        return max(0.0, min(seconds))

    def _expire(self) -> None:
        # Ask each crawl to end whose timeout is over; kill those asked before, and listings.
        for identifier, crawl in self._crawls.items():
            is_unwanted = self.is_closing and crawl.job is None
            if is_unwanted or crawl.deadline <= time.monotonic():
                crawl.deadline = float("inf")
                job = self.jobs.get(identifier)
                if job is not None and not job.ending:
                    self._end([job], "timeout")
                else:
                    crawl.was_killed = True  # so that `end_rest` kills all that it leaves
                    os.kill(crawl.pid, signal.SIGKILL)

    def _set_deadline(self, job: Job, crawl: Crawl) -> None:
        if job.ending:
            waited = max(0.0, time.time() - (job.ending_since or 0.0))
            crawl.deadline = time.monotonic() + self.options.kill_after - waited
        elif timeout := job.timeout or self.options.job_timeout:
            crawl.deadline = crawl.began + timeout
        self._wake.set()

    def _fire(self, now: float) -> list[Job]:
        # The schedules that are due, with their next due time, and their runs: at most some
        # hundreds in a change, so that requests are served in between.
        if len(self._due) > 1000 + 2 * len(self.jobs):  # most are of canceled schedules
            self._due = [(j.due, j.identifier) for j in self.jobs.values() if j.due is not None]
            heapq.heapify(self._due)
        fired: dict[str, list[Job]] = {}  # by schedule: the heap may hold one twice
        while self._due and self._due[0][0] <= now and len(fired) < 500:
            due, identifier = heapq.heappop(self._due)
            job = self.jobs.get(identifier)
            if job is not None and job.due == due and identifier not in fired:
                fired[identifier] = self._make_run(job, due, now)
        return list(itertools.chain(*fired.values()))

    def _make_run(self, job: Job, due: float, now: float) -> list[Job]:
        # A schedule with its next due time, and its run, unless a run waits already.
        try:
            job = job._replace(due=job.recurrence().resume_after(due, now))
        except ScrapyDoError as error:
            return [self._finish(job, Status.FAILED, str(error))]
        last = self.jobs.get(job.run or "")
        if last is not None and last.status is Status.PENDING:
            self._counts["skipped"] += 1
            log(f"{describe(job)} is due but skipped, since run {last.identifier} still waits")
            return [job]
        run = job._replace(
            identifier=new_identifier(), status=Status.PENDING, actor="SCHEDULER", schedule="now",
            timestamp=now, origin=now, due=None, run=None, scheduled_by=job.identifier)
        return [job._replace(run=run.identifier), run]

    # Crawls, each in a thread

    def dispatch(self) -> None:
        """Start the crawls for which there are slots. `lock` is held."""
        if self.is_closing:
            return
        while job := self._waiting.pop([crawl.job for crawl in self._crawls.values() if crawl.job]):
            if self.jobs.get(job.identifier) is job:  # else it was canceled while it waited
                try:
                    self._start_thread(job)
                except RuntimeError as error:  # the system has no thread; the timer asks again
                    log(f"job {job.identifier} waits: {error}")
                    self._waiting.put(job)
                    return

    def _start_thread(self, job: Job) -> Crawl:
        crawl, name = Crawl(job.identifier, job, job.pid or 0), f"crawl-{job.identifier}"
        if job.started is not None:  # by a former program in this process
            crawl.began -= max(0.0, time.time() - job.started)
        threading.Thread(target=self._run, args=(job, crawl), name=name, daemon=True).start()
        self._crawls[job.identifier] = crawl
        return crawl

    def _run(self, job: Job, crawl: Crawl) -> None:
        # Run a crawl to its end; an adopted one has been started already.
        work = self.store.work / job.identifier
        problem = "" if crawl.pid else self._launch(job, crawl, work)
        if crawl.pid:
            crawl.wait()
            try:
                crawl.end_rest(self.options.kill_after)
            except Exception as error:  # whatever it is, the slot comes free
                log_crash(f"the end of job {job.identifier}", error)
        with self.lock:
            exit_code = crawl.reap() if crawl.pid else None
            job = self.jobs.get(job.identifier, job)
            if job.status is Status.RUNNING:
                job = job._replace(duration=int(time.monotonic() - crawl.began),
                                   exit_code=exit_code, stats=read_stats(work.with_suffix(".json")))
                self.save(self._ended(job, exit_code, crawl.was_killed), is_fact=True)
            elif job.status is Status.PENDING and problem:
                self.save(self._finish(job, Status.FAILED, problem), is_fact=True)
            del self._crawls[job.identifier]
            self.dispatch()
            self._wake.set()  # finished jobs may be too many, and a stop waits for the last crawl
        crawl.is_over.set()
        self._warn_of_results(job, work)
        remove_tree(work)
        remove_tree(work.with_suffix(".json"))

    def _launch(self, job: Job, crawl: Crawl, work: Path) -> str:
        # Start a crawl in a working copy, unless its job was canceled meanwhile. Return why that
        # failed, "" if it did not.
        try:
            project = self._copy_code(job.project, work)
            logs = self.store.log_files(job.identifier)
            with self.lock:
                if self.jobs.get(job.identifier) is job and not self.is_closing:
                    self._start_scrapy(crawl, project, crawl_arguments(job), logs)
                    now = time.time()
                    running = job._replace(status=Status.RUNNING, timestamp=now, started=now)
                    self.save(running._replace(pid=crawl.pid), is_fact=True)
                    self._set_deadline(job, crawl)
            return ""
        except ScrapyDoError as error:
            return str(error)
        except Exception as error:
            log_crash(f"the start of job {job.identifier}", error)
            return f"the crawl could not be started: {error!r:.200}"

    def _start_scrapy(self, crawl: Crawl, project: Project, words: Sequence[str],
                      logs: Sequence[Path]) -> list[str]:
        # Start Scrapy in a working copy, and return the command. `lock` is held.
        job, work = crawl.job, self.store.work / crawl.identifier
        folder = work / project.folder
        path = [str(self.store.shim), str(folder), os.environ.get("PYTHONPATH", "")]
        order = {"command": words[0], "settings": project.settings,
                 "report": str(work.with_suffix(".json")), "items": job is not None and job.items}
        environment = {
            **outer_environment(), "SPIDER_DATA_DIR": str(self.store.spider_data),
            "PYTHONIOENCODING": "utf-8", "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "SCRAPY_JOB": crawl.identifier, "SCRAPY_PROJECT": project.name,
            "SCRAPY_SPIDER": job.spider if job else "", "SCRAPY_DO": encode_json(order),
            "SCRAPY_SETTINGS_MODULE": SHIM_MODULE}
        if not project.settings:  # else SCRAPY_PROJECT would be taken for a name in [settings]
            del environment["SCRAPY_SETTINGS_MODULE"]
        command = [word.replace("{project}", project.name) for word in self.options.scrapy]
        crawl.start([*command, *words], folder, environment, logs)
        return command

    def _copy_code(self, name: str, work: Path) -> Project:
        # Make a working copy of a project's code, and return the project. Code that is gone, or
        # that a crawl has changed, is unpacked anew.
        with self._code_lock:
            project = self.find_project(name)
            tree, fresh = self.store.tree(project), self.store.projects / new_identifier()
            try:
                if tree.exists() and copy_tree(str(tree), str(work)):
                    return project
                remove_tree(work)
                unpack(tree.with_suffix(".zip"), fresh)
                remove_tree(tree)
                fresh.rename(tree)
                copy_tree(str(tree), str(work))
            except OSError as error:
                raise StorageError(f"the code cannot be copied for the crawl: {error}") from None
            finally:
                remove_tree(fresh)
            return project

    def _warn_of_results(self, job: Job, work: Path) -> None:
        with contextlib.suppress(OSError, ScrapyDoError):
            project = self.find_project(job.project)
            known = {*os.listdir(self.store.tree(project) / project.folder), "__pycache__"}
            if new := sorted({*os.listdir(work / project.folder)} - known):
                log(f"job {job.identifier} left {', '.join(map(quoted, new[:5]))} in its copy, now"
                    " deleted; write to $SPIDER_DATA_DIR, see 'Where results go' in the README")

    def _ended(self, job: Job, exit_code: int | None, was_killed: bool) -> Job:
        # A RUNNING job as it is after its end; an exit code of None stands for a crash.
        killed = "; it had to be killed, so its feeds may be cut off; see --kill-after"
        timeout = job.timeout or self.options.job_timeout
        late = f"it ran longer than its timeout of {timeout:.15g} s"
        asked = {"cancel": (Status.CANCELED, BY_USER), "timeout": (Status.FAILED, late)}
        if job.ending in asked:
            status, why = asked[job.ending]
            return self._finish(job, status, why + (killed if was_killed else ""))
        if job.ending == "stop" or exit_code is None:
            return job._replace(
                status=Status.PENDING, timestamp=time.time(), pid=None, started=None, ending="",
                ending_since=None, duration=None, exit_code=None, stats=None)
        if exit_code == 0:
            return self._finish(job, Status.SUCCESSFUL, None)
        why = f"exit code {exit_code}; its log says why"
        if exit_code < 0:
            why = f"the crawl was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        return self._finish(job, Status.FAILED, why)

    def _finish(self, job: Job, status: Status, reason: str | None) -> Job:
        return job._replace(
            status=status, reason=reason, timestamp=time.time(), due=None, pid=None, ending="",
            notice=bool(self.options.on_finish) and job.status is not Status.SCHEDULED,
            ending_since=None)

    # Commands of --on-finish

    def _run_hooks(self) -> None:
        for job in iter(self._notices.get, None):
            while self.store.is_behind:
                time.sleep(RETRY_SECONDS)  # only an end that is on the disk is told
            try:
                with self.lock:
                    if self.jobs.get(job.identifier) is job:  # else it has been forgotten
                        self.save(job._replace(notice=False), is_fact=True)
                    self._is_hooking = True
                subprocess.run(
                    [word.encode() for word in self.options.on_finish],
                    env={**outer_environment(), "SCRAPY_DO_JOB": job.identifier,
                         "SCRAPY_DO_STATUS": job.status.value},
                    input=(job_text(job) + "\n").encode("utf-8", "backslashreplace"),
                    stdout=subprocess.DEVNULL, timeout=NOTICE_SECONDS, start_new_session=True,
                    check=True)
            except Exception as error:
                log(f"--on-finish failed for job {job.identifier}: {error}")
            self._is_hooking = False


def checked(name: str, parse: Callable[..., Any], text: str, *bounds: float) -> Any:
    """Return the value of a parameter. Raise BadRequest that names it if it cannot be parsed."""
    try:
        return parse(text, *bounds)
    except ValueError as error:
        raise BadRequest(f"the parameter '{name}' {error}") from None


def _check_arguments(description: str, payload: str, arg: Sequence[str],
                     setting: Sequence[str]) -> None:
    # Scrapy must be able to get all this on its command line.
    texts = (description, payload, *arg, *setting)
    if len("".join(texts).encode("utf-8", "replace")) > ARGUMENT_BYTES:
        raise TooLarge("description, payload, args and settings may have at most "
                       f"{ARGUMENT_BYTES} bytes together; put the data into a file")
    try:
        dict(**json.loads(payload))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f'the payload must be a JSON object, like {{"x": 2}}: {error}') from None
    wrong = [f"arg {quoted(a)}" for a in arg if not re.fullmatch(r"[^-=\0\s][^=\0\s]*=[^\0]*", a)]
    wrong += [f"setting {quoted(s)}" for s in setting if not re.fullmatch(r"[^\W\d]\w*=[^\0]*", s)]
    if wrong:
        raise BadRequest(f"the {wrong[0]} must be NAME=VALUE, like page=2 or LOG_LEVEL=INFO")


def _name_jobs(jobs: Sequence[Job]) -> str:
    shown = [f"{job.identifier} ({job.spider}, {job.status.value})" for job in jobs[:10]]
    return ", ".join(shown) + (f" and {len(jobs) - 10} more" if len(jobs) > 10 else "")


@functools.lru_cache(maxsize=1)
def _ask_system(tenth: int) -> dict[str, Any]:
    # Cached for 0.1 s: a system call hands the interpreter to another thread.
    memory = psutil.Process().memory_info().rss / MIB
    return {"memory-usage": float(memory), "hostname": socket.gethostname()}


# ---- 7. HTTP ---------------------------------------------------------------------------------

LINE_BYTES = 8 * 1024  # the longest line of a head, as in other servers
BODY_BYTES_PER_SECOND = 10 * 1024  # the least rate of an upload: a slow telephone's
LINGER_SECONDS = 2.0  # for the rest of a refused body, so that the client gets to see the answer
GRACE_SECONDS = 0.5  # in which a client may send its next request undisturbed
PLACE_SECONDS = 0.01  # between looks whether a connection or a request has ended
PENALTY_SECONDS = 1.0  # before a wrong password is answered: slow guessing down
NONCE_SECONDS = 300  # after which a Digest nonce is replaced; clients fetch the new one
NONCE_USES = 10_000  # after which it is replaced: each use is remembered
ALGORITHMS = ("SHA-256", "MD5")  # of Digest, the best first
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(rb"(%s) (/[!-~\x80-\xff]*) HTTP/1\.([0-9])\r\n" % TOKEN)
HEADER_LINE = re.compile(rb"(%s):([^\0\r\n]*)\r\n" % TOKEN)
CHUNK_LINE = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0\r\n]*)?\r\n")
LOG_PATH = re.compile(rf"/get-log/data/({JOB_PATTERN.pattern})\.(out|err)")
TEXT_TYPE = "text/plain; charset=utf-8"
PAGE_HEADERS = [("Content-Security-Policy",  # nothing from elsewhere, nor a frame that leads clicks
                 "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src "
                 "'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")]


def load_certificate(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """Return a context for TLS; the key may be in `certificate`. Raise ScrapyDoError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, "")  # None would ask the terminal for a password
    except (OSError, ValueError) as error:
        raise ScrapyDoError(f"cannot use {certificate}, key {key or certificate}: {error}; openssl"
                            " pkey -in KEY -out NEW takes off a password") from None
    return context


def read_users(path: Path) -> dict[str, str]:
    """Return passwords by user, from a file with a line for each. Raise ScrapyDoError."""
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ScrapyDoError(f"the --auth-file {path} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):  # the group may read it, as with mounted secrets
        raise ScrapyDoError(f"others may use the passwords: run 'chmod g-w,o-rwx {path}'")
    users: dict[str, str] = {}
    for number, line in enumerate(re.split("\r?\n", _as_text(data, f"the --auth-file {path}")), 1):
        name, _, password = line.partition(":")
        if line.strip() and (not name or not password or name in users):
            raise ScrapyDoError(f"line {number} of {path} is not USER:PASSWORD, or repeats a user")
        if password:
            users[name] = password
    if not users:
        raise ScrapyDoError(f"{path} has no users; write a line USER:PASSWORD for each")
    return users


def _parameters_of(text: str) -> dict[str, str]:
    # By lower-case name, from the value of a header, RFC 9110 section 5.6.6.
    found = re.finditer(r'(?a)(?<![\w*-])([\w-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s,;"]*))', text)
    return {m[1].lower(): re.sub(r"\\(.)", r"\1", m[2] or m[3] or "") for m in found}


def _proofs(fields: Mapping[str, str], method: str, users: Mapping[str, str]) -> list[str]:
    # The right response of a Digest, RFC 7616; none for an algorithm that is not known.
    import hashlib
    algorithm = fields.get("algorithm", "MD5").upper()
    if algorithm not in ALGORITHMS:
        return []
    def digest(*texts: str) -> str:
        return hashlib.new(algorithm.replace("-", ""), ":".join(texts).encode(),
                           usedforsecurity=False).hexdigest()
    uri, *counted = (fields.get(name, "") for name in ("uri", "nonce", "nc", "cnonce", "qop"))
    user = fields.get("username", "").encode("latin-1").decode("utf-8", "replace")
    # A user who does not exist costs the same time as one who does.
    known = digest(user, "scrapy-do", users.get(user, os.urandom(9).hex()))
    return [digest(known, *counted, digest(method, uri))]


class Guard:
    """Refuse foreign web pages, and clients without a password."""

    def __init__(self, options: argparse.Namespace):
        name = socket.gethostname().lower()
        self._aliases = {host.lower() for host in options.allow_host}
        self._names = {"localhost", name, name.partition(".")[0],
                       *(host.partition(":")[0] for host in self._aliases)}
        self._users, self._is_tls = options.users, options.tls is not None
        # When each Digest nonce was made, and the proofs seen with it: an eavesdropper can neither
        # repeat a request nor send another body with its header.
        self._nonces = {os.urandom(16).hex(): (time.monotonic(), dict[str, object]())}

    def check(self, request: Handler) -> None:
        """Raise ScrapyDoError if a request is refused; after a second for a wrong password."""
        headers = request.headers
        host = headers.get("host", "localhost").lower()  # only HTTP/1.0 may lack it
        if not self._is_own(host):
            raise Forbidden(f"{quoted(host)} is not a name of this machine; see --allow-host NAME")
        if request.command not in ("GET", "HEAD"):
            origin = headers.get("origin", f"https://{host}").lower()
            scheme, _, place = origin.partition("://")
            schemes = ("https",) if self._is_tls else ("https", "http")
            if (scheme not in schemes or place not in (host, *self._aliases)
                    or headers.get("sec-fetch-site", "none") not in ("same-origin", "none")):
                raise Forbidden(f"a page of {quoted(origin)} must not change {quoted(host)}; if it "
                                "is the daemon's, use 'proxy_set_header Host $http_host' in nginx, "
                                f"or start with --allow-host {place[:100] or 'NAME'}")
        if self._users is not None:
            self._check_user(request, self._users)

    def _is_own(self, host: str) -> bool:
        # A foreign name may point to our address, so that its pages can call us (DNS rebinding).
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?", host)
        name = match[1].removesuffix(".") if match else ""
        family = socket.AF_INET6 if name.startswith("[") else socket.AF_INET
        with contextlib.suppress(OSError):
            return name in self._names or bool(socket.inet_pton(family, name.strip("[]")))
        return False

    def _check_user(self, request: Handler, users: Mapping[str, str]) -> None:
        import hmac
        # The nonce before the newest is still taken, older ones are not.
        newest, (made, proofs) = list(self._nonces.items())[-1]
        now = time.monotonic()
        if now - made >= NONCE_SECONDS or len(proofs) >= NONCE_USES:
            self._nonces = {newest: (made, proofs), os.urandom(16).hex(): (now, {})}

        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        kind, fields = scheme.lower(), _parameters_of(rest)
        if kind == "digest":
            given = fields.get("response", "").lower()
            wanted = _proofs(fields, request.command, users)
        elif kind == "basic" and self._is_tls:
            given = rest.strip()
            wanted = [base64.b64encode(f"{name}:{users[name]}".encode()).decode() for name in users]
        else:
            raise self._challenge("a password is wanted: curl --anyauth -u NAME; Basic: TLS only")
        if not any(hmac.compare_digest(given.encode(), proof.encode()) for proof in wanted):
            log(f"{request.command} {request.path:.100} from {request.client_address[0]} got 401")
            request._pause(PENALTY_SECONDS)
            raise self._challenge("the user or the password is wrong")
        if kind == "basic":
            return
        use = object()
        _, uses = self._nonces.get(fields.get("nonce", ""), (0.0, None))
        if uses is None or uses.setdefault(given, use) is not use:  # atomic: one of two is first
            raise self._challenge("this login was used before, or is too old", ", stale=true")
        if (uri := fields.get("uri", "")) != request.path:
            raise BadRequest(f"Digest is for {quoted(uri)}, not {quoted(request.path)}: a proxy has"
                             " changed the path; let it keep the path, or check the passwords")

    def _challenge(self, message: str, more: str = "") -> ScrapyDoError:
        ways = [f'Digest realm="scrapy-do", nonce="{list(self._nonces)[-1]}", qop="auth"'
                f", charset=UTF-8, algorithm={name}{more}" for name in ALGORITHMS]
        ways += ['Basic realm="scrapy-do", charset="UTF-8"'] * self._is_tls
        return ScrapyDoError(message, 401, [("WWW-Authenticate", way) for way in ways])


# A body is a file, on the disk if it is an archive: that may be large, and is read in pieces.
_Field = tuple[str, Iterable[bytes]]  # the name, and the value in pieces


def _cut(file: IO[bytes], start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _pieces(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, CHUNK_BYTES):
        yield _cut(file, at, min(at + CHUNK_BYTES, end))


def _as_text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{what} is not UTF-8") from None


def _query_fields(data: bytes) -> Iterator[_Field]:
    # A value may be binary; a stray % is kept.
    unquote = urllib.parse.unquote_to_bytes
    what = f"the name of a parameter (a file is sent by {PUSH_CALL})"
    for field in re.finditer(b"[^&]+", data):
        name, _, value = field[0].replace(b"+", b" ").partition(b"=")
        # To decode an archive as a whole would take 60 times its memory.
        pieces = re.finditer(rb"(?s)(?:%[0-9A-Fa-f]{2}|.){1,9999}", value)
        yield _as_text(unquote(name[:999]), what), (unquote(piece[0]) for piece in pieces)


def _find(line: bytes, file: IO[bytes], at: int) -> tuple[int, int, bool]:
    # Where the next line with the boundary begins and ends, and whether it is the last. A search of
    # the file as a whole would keep all of it in memory; the windows overlap by more than a line.
    while window := _cut(file, at, at + CHUNK_BYTES + 1024):
        if match := re.search(line, window):
            return at + match.start(), at + match.end(), match[1] == b"--"
        at += CHUNK_BYTES
    raise BadRequest("the multipart body was cut short, or its Content-Type lacks the boundary")


def _multipart_fields(file: IO[bytes], boundary: str) -> Iterator[_Field]:  # RFC 7578
    line = rb"--%b(--|[ \t]{0,64}\r\n)" % re.escape(boundary.encode("latin-1"))
    start, at, is_last = _find(line, file, 0)
    _want(start == 0, "the multipart body does not begin with its boundary")
    while not is_last:
        file.seek(at)
        names = _parameters_of(_read_headers(file).get("content-disposition", ""))
        name = names.get("name", "(no name)").encode("latin-1").decode("utf-8", "replace")
        start = file.tell()
        end, at, is_last = _find(rb"\r\n" + line, file, start)
        yield name, _pieces(file, start, end)


def _json_fields(data: bytes, repeatable: Collection[str]) -> Iterator[_Field]:
    # The members of an object; repeatable ones may be lists.
    try:
        members = dict(**json.loads(_as_text(data, "the JSON body"), object_pairs_hook=_unique))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON with one object {{...}}: {error!s:.200}") from None
    for name, value in members.items():
        for item in value if isinstance(value, list) and name in repeatable else [value]:
            number = int(item) if isinstance(item, bool) else item  # as a form would have it
            text = item if isinstance(item, str) else encode_json(number)
            yield name, [text.encode("utf-8", "surrogatepass")]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python would keep the last of two equal keys.
    if len(dict(pairs)) < len(pairs):
        (twin, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise BadRequest(f"the parameter {quoted(twin)} is given twice; use a list for several")
    return dict(pairs)


def _body_fields(file: IO[bytes], headers: Mapping[str, str], route: _Route) -> Iterator[_Field]:
    # By Content-Type. Only multipart/form-data is read in pieces.
    kind, _, rest = headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if kind == "multipart/form-data":
        return _multipart_fields(file, _parameters_of(rest).get("boundary") or "none")
    most = MIB if kind == "application/json" else 64 * MIB  # percent-encoded, of 25 MiB
    data = _cut(file, 0, most + 1)
    if len(data) > most:
        raise TooLarge(f"only curl -F sends more than {most // MIB} MiB, as in {PUSH_CALL}")
    if kind == "application/json":
        return _json_fields(data, route.repeatable)
    if kind in ("", "application/x-www-form-urlencoded"):
        return _query_fields(data)
    raise ScrapyDoError(f"a body of type {quoted(kind)} is not understood; send a form (curl -F or"
                        f" -d) or JSON (curl --json), as in {PUSH_CALL}", 415)


class _Route(NamedTuple):
    name: str
    answer: Callable[..., dict[str, Any]]  # takes these parameters by name
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeatable: tuple[str, ...] = ()  # may be given several times
    is_post: bool = False

    def __str__(self) -> str:
        shown = [f"{name} (repeatable)" if name in self.repeatable else name
                 for name in self.required + self.optional]
        return f"its parameters are {', '.join(shown)}" if shown else "it has no parameters"

    def check(self, fields: Iterable[_Field]) -> dict[str, Any]:
        # Return values by name: a text, where repeatable a list of texts, an archive in pieces.
        values: dict[str, Any] = {}
        for count, (name, value) in enumerate(fields, 1):
            if count > 1000:  # a crawl's command has no room for more
                raise TooLarge("a request may have 1000 parameters")
            if name not in self.required + self.optional:
                raise BadRequest(f"{self.name} has no parameter {quoted(name)}; {self}; with curl,"
                                 " JSON needs --json, a file -F, a value with & --data-urlencode")
            if name in values and name not in self.repeatable:
                raise BadRequest(f"the parameter {quoted(name)} is given twice; {self}")
            kept = value if name == "archive" else _as_text(b"".join(value), f"parameter '{name}'")
            values[name] = [*values.get(name, ()), kept] if name in self.repeatable else kept
        if missing := [name for name in self.required if name not in values]:
            raise BadRequest(f"{self.name} needs the parameter '{missing[0]}'; {self}")
        return values


def _read_headers(reader: IO[bytes]) -> dict[str, str]:
    # By lower-case name. The reader of http.server is made for mail and could let a second request
    # in: it splits lines at a bare CR, and stops at one that it does not understand.
    headers: dict[str, str] = {}
    left = 64 * 1024
    while (line := reader.readline(LINE_BYTES)) not in (b"\r\n", b"\n"):
        match = HEADER_LINE.fullmatch(line)
        left -= len(line)
        if len(line) == LINE_BYTES or len(headers) == 100 or left < 0:
            raise ScrapyDoError("the headers are too long, or too many", 431)
        if match is None:
            raise BadRequest(f"this is not a header: {quoted(line.decode('latin-1'))}")
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


ROUTES = {f"/{route.name}": route for route in (
    _Route("status.json", Daemon.status),
    _Route("list-projects.json", Daemon.list_projects),
    _Route("list-spiders.json", Daemon.list_spiders, ("project",)),
    _Route("list-jobs.json", Daemon.list_jobs, (),
           ("status", "id", "project", "spider", "scheduled_by", "limit")),
    _Route("push-project.json", Daemon.push, ("archive",), is_post=True),
    _Route("schedule-job.json", Daemon.schedule, ("project", "spider", "when"),
           ("description", "payload", "timeout", "priority", "items", "arg", "setting"),
           ("spider", "arg", "setting"), is_post=True),
    _Route("cancel-job.json", Daemon.cancel, (), ("id", "project", "spider"), is_post=True),
    _Route("remove-project.json", Daemon.remove, ("name",), is_post=True),
)}
LOG_ROUTE = _Route("get-log", Daemon.status, (), ("follow", "tail"))  # only for its parameters


def _tail_start(file: IO[bytes], size: int, lines: int) -> int:
    for start in reversed(range(0, size, CHUNK_BYTES)):
        block = _cut(file, start, min(start + CHUNK_BYTES, size - 1))  # the last LF starts none
        if (count := block.count(b"\n")) >= lines:
            return start + len(block.rsplit(b"\n", lines)[0]) + 1
        lines -= count
    return 0


class _Reader(socket.SocketIO):
    # Reads a connection until a deadline: a timeout of the socket begins anew with each read.
    deadline = 0.0  # on the monotonic clock

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer) if time.monotonic() < self.deadline else None
        if size is None:  # the deadline, or a timeout of the system
            raise TimeoutError
        return size


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer the requests of a connection, one after another, in a thread of its own."""
    server: Server
    headers: Any  # a dictionary by lower-case name
    raw_requestline: bytes  # as http.server has read it
    command = ""  # of the latest request
    idle_since = math.inf  # while a request is answered; else when the connection may give way

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = io.BufferedReader(_Reader(self.request, "r"), CHUNK_BYTES)
        self.is_known = self.server.options.users is None  # or has shown a password
        self.server.connections[self.request] = self

    def finish(self) -> None:
        # To close with unread data resets the connection, and the client would lose the answer.
        end = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            if self.length != 0:
                self.request.shutdown(socket.SHUT_WR)
                self.request.settimeout(LINGER_SECONDS)
                while time.monotonic() < end and self.request.recv(CHUNK_BYTES):
                    pass

    def handle_one_request(self) -> None:
        self.idle_since = time.monotonic() + GRACE_SECONDS
        self.rfile.raw.deadline = self.idle_since + self.server.options.request_timeout
        self.length: int | None = 0  # of the body still to be read; None: unknown, or in chunks
        self.is_begun = False  # the answer
        try:
            super().handle_one_request()
        except ScrapyDoError as error:
            self._refuse(error)
        except (ConnectionError, BlockingIOError, ssl.SSLError):
            raise  # to `Server.handle_error`: the client went, a timeout, or to cut the answer
        except OSError as error:
            self._refuse(StorageError(f"the disk does not take it: {error.strerror}"))
        except Exception as error:
            log_crash("answering a request", error)
            self._refuse(ScrapyDoError("the daemon met an error of its own; see its log"))

    def parse_request(self) -> bool:
        self.command, self.length = "", None
        match = REQUEST_LINE.fullmatch(self.raw_requestline)
        if match is None:
            raise BadRequest("this is not a request line of HTTP/1.1, like GET /status.json")
        self.command, self.path = match[1].decode(), match[2].decode("latin-1")
        self.is_old = match[3] == b"0"
        self.headers = _read_headers(self.rfile)
        if "," in self.headers.get("host", "" if self.is_old else ","):
            raise BadRequest("there must be one Host header")
        coding = self.headers.get("transfer-encoding")
        length = self.headers.get("content-length", "0")
        if coding is None and re.fullmatch("[0-9]{1,18}", length):
            self.length = int(length)
        elif coding is None or coding.lower() != "chunked" or "content-length" in self.headers:
            raise BadRequest("there must be one Content-Length, or Transfer-Encoding: chunked")
        self.close_connection = self.is_old or "close" in self.headers.get("connection", "").lower()
        self.server.guard.check(self)
        self.is_known = True
        self.idle_since = math.inf
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # http.server calls this for an unknown method, or a request line of over 64 KiB.
        self.length = None
        raise ScrapyDoError(message or "the address is too long; use a POST body", code)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log what http.server logs: a time-out."""

    def do_GET(self) -> None:  # and all other methods
        path, _, query = self.path.partition("?")
        log_path, route = LOG_PATH.fullmatch(path), ROUTES.get(path)
        if not (route or log_path or path == "/"):
            raise NotFound(f"there is no {quoted(path)}; the paths are /, {', '.join(ROUTES)}, and"
                           " /get-log/data/ID.err or .out, where ID is the identifier of a job")
        methods = ("POST",) if route and route.is_post else ("GET", "HEAD")
        if self.command not in methods:
            raise ScrapyDoError(f"{quoted(path)} takes {methods[0]}; curl sends POST with -F or -d,"
                                " else GET, without -X", 405, [("Allow", ", ".join(methods))])
        if route:
            answer = route.answer(self.server.daemon, **self._parameters(route, query))
            self._send(200, {"status": "ok", **answer})
        elif log_path:
            self._send_log(query, *log_path.groups())
        else:
            self._send(200, PAGE.encode(), "text/html; charset=utf-8", PAGE_HEADERS)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def _parameters(self, route: _Route, query: str) -> dict[str, Any]:
        if not route.is_post:
            return route.check(_query_fields(query.encode("latin-1")))
        if query:
            raise BadRequest(f"{route.name} takes parameters by curl -F or -d, not in the address")
        if "archive" not in route.required:
            body = io.BytesIO()
            self._receive(body, MIB)
            return route.check(_body_fields(body, self.headers, route))
        upload = self.server.daemon.store.projects / f"{new_identifier()}.zip"
        try:
            with open(upload, "xb+") as file, open(upload, "rb+") as target:
                self._receive(file, self.server.options.max_upload * MIB)
                # The archive moves to the start of its own file; a piece is read before that.
                target.writelines(route.check(_body_fields(file, self.headers, route))["archive"])
                target.truncate()
        except BaseException:
            remove_tree(upload)
            raise
        return {"archive": upload}

    def _receive(self, file: IO[bytes], most: int) -> None:
        if self.headers.get("expect", "").lower() == "100-continue" and not self.is_old:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.rfile.raw.deadline = time.monotonic() + self.server.options.request_timeout
        try:
            left = self._next_chunk(b"\r\n") if self.length is None else self.length
            while left:
                if file.tell() + left > most:
                    raise TooLarge(f"the body is longer than {most // MIB} MiB; see --max-upload")
                piece = self.rfile.read1(min(left, CHUNK_BYTES))
                if not piece:
                    raise ConnectionAbortedError
                left -= file.write(piece)
                self.rfile.raw.deadline += len(piece) / BODY_BYTES_PER_SECOND
                if not left and self.length is None:
                    left = self._next_chunk(self.rfile.read(2))
        except TimeoutError:
            raise ScrapyDoError("the request took too long to arrive", 408) from None
        self.length = 0

    def _next_chunk(self, end: bytes) -> int:
        # Return the size, 0 at the end, RFC 9112 section 7.1; `end` is that of the chunk before.
        match = CHUNK_LINE.fullmatch(end + self.rfile.readline(256))
        if match is None:
            raise BadRequest("the chunked body is broken")
        if not (size := int(match[1], 16)):
            _read_headers(self.rfile)  # of the trailer, which means nothing here
        return size

    def _refuse(self, error: ScrapyDoError) -> None:
        if self.is_begun:
            raise ConnectionAbortedError  # a second answer would look like a part of the first
        if error.status != 401:  # a challenge is no event
            what = f"{self.command} {self.path:.100}" if self.command else "a request"
            log(f"{what} from {self.client_address[0]} got {error.status}: {error!s:.300}")
        self._send(error.status, {"status": "error", "msg": str(error)}, headers=error.headers)

    def _send(self, status: int, answer: Mapping[str, Any] | bytes, kind: str = "application/json",
              headers: Sequence[tuple[str, str]] = (), framing: str = "") -> None:
        # `framing` is the header that says how the body ends, by default after `answer`.
        if not isinstance(answer, bytes):
            answer = (encode_answer(answer) + "\n").encode("utf-8", "backslashreplace")
        self.close_connection = self.close_connection or self.length != 0
        head = "\r\n".join([
            f"HTTP/1.1 {status} {self.responses[status][0]}", f"Content-Type: {kind}",
            framing or f"Content-Length: {len(answer)}", f"Date: {self.date_time_string()}",
            "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
            f"Connection: {'close' if self.close_connection else 'keep-alive'}",
            *(f"{name}: {value}" for name, value in headers), "\r\n",
        ]).encode("latin-1", "replace")
        self.is_begun = True
        self.request.sendall(head if self.command == "HEAD" else head + answer)

    def _pause(self, seconds: float) -> None:
        # Cut the answer if the client goes, or the daemon stops or reloads.
        poll = select.poll()
        poll.register(self.request, select.POLLRDHUP)
        if poll.poll(seconds * 1000) or self.server.is_draining:
            raise ConnectionAbortedError

    def _send_log(self, query: str, identifier: str, stream: str) -> None:
        asked = {name: checked(name, parse_whole, text, 0, 10**9)
                 for name, text in self._parameters(LOG_ROUTE, query).items()}
        if self.server.daemon.find_job(identifier).status is Status.SCHEDULED:
            raise NotFound("a schedule has no log, its runs have; list-jobs.json?status=COMPLETED"
                           f"&scheduled_by={identifier} lists them")
        path = self.server.daemon.store.logs / f"{identifier}.{stream}"
        with open_log(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = _tail_start(file, size, asked["tail"]) if "tail" in asked else 0
            if not asked.get("follow") or self.command == "HEAD" or self.is_old:  # without chunks
                self._send_part(file, start, size, "tail" in asked)
                return
        self._follow(path, identifier, start)

    def _send_part(self, file: IO[bytes], start: int, size: int, is_tail: bool) -> None:
        status, end, headers = 200, size, [("Accept-Ranges", "bytes")]
        # RFC 9110, section 14; what is more than one range of bytes is ignored.
        match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", self.headers.get("range", ""))
        if match and not is_tail:
            first, last = match.groups()
            start = int(first) if first else max(0, size - int(last or 0))
            end = min(size, int(last) + 1) if first and last else size
            if start >= end:
                raise ScrapyDoError(f"the log has {size} bytes; nothing is there", 416,
                                    [("Content-Range", f"bytes */{size}")])
            status = 206
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{size}"))
        self._send(status, b"", TEXT_TYPE, headers, f"Content-Length: {end - start}")
        if self.command == "GET" and start < end:
            self.request.settimeout(self.server.options.request_timeout)  # as `sendfile` wants
            if self.request.sendfile(file, start, end - start) < end - start:
                raise ConnectionAbortedError  # the log was cut short, so no more will come

    def _follow(self, path: Path, identifier: str, start: int) -> None:
        # An answer that is cut has no last chunk, so the client can tell.
        self._send(200, b"", TEXT_TYPE, (), "Transfer-Encoding: chunked")
        piece, is_over = b"", False
        while piece or not is_over:
            job = self.server.daemon.jobs.get(identifier)  # asked for before the log is read
            is_over = job is None or job.status not in (Status.PENDING, Status.RUNNING)
            with open_log(path) as file:
                # A log that is shorter than before has begun anew.
                file.seek(start if start <= os.fstat(file.fileno()).st_size else 0)
                piece = file.read(CHUNK_BYTES)
                start = file.tell()
            if piece or is_over:  # an empty chunk is the last
                self.request.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            else:
                self._pause(0.2)  # between looks: soon for a reader, rare for the disk


_FULL_ANSWER = (b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 113\r\n"
                b'Content-Type: application/json\r\n\r\n{"status": "error", "msg": "too many'
                b' connections, or no room for a thread; ask later, or see --max-connections"}\n')


class Server(http.server.ThreadingHTTPServer):
    """Accept connections, each of which gets a thread."""

    def __init__(self, listening: socket.socket, daemon: Daemon, options: argparse.Namespace):
        # `server_bind` would ask DNS for a name.
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.daemon, self.options, self.guard = daemon, options, Guard(options)
        self.is_draining = False  # answers that wait are cut
        self.connections: dict[socket.socket, Handler | None] = {}  # None: no thread has it yet
        self._idle = threading.Semaphore(0)  # counts threads without a connection
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        listening.setblocking(False)  # `accept` would wait when the client has gone already
        # Connections inherit these. Python's own timeouts double the system calls of an answer.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = struct.pack("ll", *divmod(int(options.request_timeout * 1e6), 10**6))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)

    def serve_until(self, signals: socket.socket) -> bytes:
        """Serve until something can be read from `signals`, and return that."""
        while signals not in select.select([self.socket, signals], [], [])[0]:
            self._accept()
        return signals.recv(CHUNK_BYTES)

    def _accept(self) -> None:
        try:
            request, address = self.get_request()
        except (BlockingIOError, ConnectionError):  # the client has gone already
            return
        except OSError as error:
            log(f"no connection can be accepted: {error.strerror}")
            time.sleep(GRACE_SECONDS)
            return
        try:
            if tls := self.options.tls:
                request.settimeout(self.options.request_timeout)  # it ignores the inherited timeout
                request = tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            self._make_room()
            self.connections[request] = None
            if not self._idle.acquire(blocking=False):  # a new one takes longer than most answers
                threading.Thread(target=self._run, name="http", daemon=True).start()
            self._work.put((request, address))
        except (OSError, RuntimeError):  # no room, or no thread
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.send(_FULL_ANSWER)
            self.shutdown_request(request)

    def _make_room(self) -> None:
        # Close the connection that has been idle for longest, those without a password first.
        end = time.monotonic() + 2 * GRACE_SECONDS
        while len(self.connections) >= self.options.max_connections:
            first = min(filter(None, list(self.connections.values())), default=None,
                        key=lambda handler: (handler.is_known, handler.idle_since))
            if first and (not first.is_known or first.idle_since < time.monotonic()):
                self.connections.pop(first.request, None)
                with contextlib.suppress(OSError):
                    first.request.shutdown(socket.SHUT_RDWR)
            elif time.monotonic() > end:
                raise TimeoutError
            else:
                time.sleep(PLACE_SECONDS)

    def _run(self) -> None:
        while True:
            self.process_request_thread(*self._work.get())
            self._idle.release()

    def shutdown_request(self, request: Any) -> None:
        self.connections.pop(request, None)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, OSError):  # a client that went
            log_crash("a connection", error)

    def drain(self, seconds: float) -> None:
        """Wait for answers, also to new connections, but no longer than so many seconds."""
        self.is_draining = True
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end and any(
                not each or each.idle_since > now for each in list(self.connections.values())):
            time.sleep(PLACE_SECONDS)
        self.is_draining = False


# ---- 8. Command line -------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HANDOVER = "SCRAPY_DO_HANDOVER"  # in the environment at a reload: the listening socket's number
DRAIN_SECONDS = 2.0  # for the last answers at a stop or reload
PROGRAM = (sys.executable, *sys.orig_argv[1:])  # what has started this process
OWN_SCRAPY = (sys.executable, "-m", "scrapy")


def parse_command(text: str) -> Strings:
    """Split a command as a shell does; a path is taken from where the daemon is started."""
    import shlex
    words = shlex.split(text)
    if not words:
        raise ValueError("is empty")
    return (os.path.abspath(words[0]) if "/" in words[0] else words[0], *words[1:])


def _parse_option(parse: Callable[..., Any], bounds: Sequence[float], text: str) -> Any:
    try:
        return parse(text, *bounds)
    except ValueError as error:  # argparse shows the words of an error of its own only
        raise argparse.ArgumentTypeError(str(error)) from None


# By group: the name, the default, the name of the value, how it is read, bounds, and the meaning.
OPTIONS = {
    "where": (
        ("--host", "127.0.0.1", "HOST", str, (), "address, by default only of this machine"),
        ("--port", 7654, "PORT", parse_whole, (0, 65535), "port to listen on, 0 for any"),
        ("--data-dir", Path("scrapy-do-data"), "DIR", Path, (), "folder for everything"),
    ),
    "crawls": (
        ("--scrapy", OWN_SCRAPY, "CMD", parse_command, (), "the command that is Scrapy; {project} "
         "in it stands for the project's name (default: this Python's -m scrapy)"),
        ("--job-slots", 3, "COUNT", parse_whole, (1, 1000), "crawls that run at once"),
        ("--project-slots", 0, "COUNT", parse_whole, (0, 1000), "of one project, 0: no limit"),
        ("--spider-slots", 0, "COUNT", parse_whole, (0, 1000), "of one spider, 0: no limit"),
        ("--job-timeout", 0, "SECONDS", parse_seconds, (), "of jobs without one, 0: no limit"),
        ("--kill-after", 30, "SECONDS", parse_seconds, (), "from SIGTERM to SIGKILL"),
        ("--list-timeout", 60, "SECONDS", parse_seconds, (1,), "for 'scrapy list' at a push"),
        ("--on-finish", (), "CMD", parse_command, (), "run after each job, which is its input"),
    ),
    "finished jobs": (
        ("--completed-cap", 500, "COUNT", parse_whole, (1, 10**6), "how many are kept"),
        ("--keep-days", 0, "DAYS", parse_whole, (0, 10**5), "for how long, 0: no limit"),
        ("--keep-mib", 0, "MIB", parse_whole, (0, 10**9), "of logs in all, 0: no limit"),
    ),
    "clients": (
        ("--auth-file", None, "FILE", Path, (), "users who may come in, a line USER:PASSWORD each"),
        ("--tls-cert", None, "FILE", Path, (), "certificate chain; with it only HTTPS is spoken"),
        ("--tls-key", None, "FILE", Path, (), "its private key, if that is in a file of its own"),
        ("--max-upload", 256, "MIB", parse_whole, (1, 10**6), "largest body of a request"),
        ("--max-connections", 256, "COUNT", parse_whole, (1, 10**5), "connections at once"),
        ("--request-timeout", 60, "SECONDS", parse_seconds, (1,), "for a request to arrive"),
    ),
}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; None takes them from the command line. Wrong ones end with status 2."""
    parser = argparse.ArgumentParser(
        prog="scrapy-do", allow_abbrev=False, fromfile_prefix_chars="@",
        description="Keep Scrapy projects, and run their spiders now or on a schedule.",
        epilog="@FILE takes options from a file, one word a line. The README explains all.",
        # To find out the width of a terminal takes argparse imports of 2 ms and 0.6 MiB.
        formatter_class=functools.partial(argparse.HelpFormatter, width=79, max_help_position=28))
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, default, metavar, parse, bounds, meaning in rows:
            shown = " (%(default)s)" if default and parse is not parse_command else ""
            group.add_argument(name, default=default, metavar=metavar, help=meaning + shown,
                               type=functools.partial(_parse_option, parse, bounds))
    group.add_argument("--no-auth", action="store_true", help="let in all, without --auth-file")
    group.add_argument("--allow-host", metavar="NAME", action="append", default=[],
                       help="one more name of this machine, or NAME:PORT; may be repeated")
    parser.add_argument("--version", action="store_true", help="say the version, and no more")
    parser.set_defaults(users=None, tls=None)  # until `read_files`
    options = parser.parse_args(argv)
    if options.tls_key and not options.tls_cert:
        parser.error("--tls-key needs --tls-cert")
    return options


def read_files(options: argparse.Namespace) -> None:
    """Read the users and the certificate. Raise ScrapyDoError if an option is unusable."""
    is_local = options.host.startswith("127.") or options.host in ("::1", "localhost")
    if not (is_local or options.auth_file or options.no_auth):
        raise ScrapyDoError(f"whoever reaches {options.host} could run code as you: name users by"
                            " --auth-file, or say --no-auth if a proxy checks them")
    if options.on_finish and not shutil.which(options.on_finish[0]):
        raise ScrapyDoError(f"--on-finish {options.on_finish[0]} cannot be executed; try chmod +x")
    if options.auth_file:
        options.users = read_users(options.auth_file)
    if options.tls_cert:
        options.tls = load_certificate(options.tls_cert, options.tls_key)


def _warn_of_surroundings(scrapy: Sequence[str]) -> None:
    # Log what will not work later, though the daemon can start.
    found = (each.find_spec("scrapy", None) for each in sys.meta_path if hasattr(each, "find_spec"))
    if scrapy == OWN_SCRAPY and not any(found):
        log(f"warning: Scrapy is missing; run '{sys.executable} -m pip install scrapy'")
    elif "{project}" not in scrapy[0] and not shutil.which(scrapy[0]):
        log(f"warning: there is no command '{scrapy[0]}'; install it, or see --scrapy")
    zone = os.environ.get("TZ", "").removeprefix(":")
    known = re.match(r"$|(<[^>]+>|[A-Za-z]{3,})[+-]?[0-9]", zone)  # none, or a rule
    if not known and not os.path.exists(os.path.join("/usr/share/zoneinfo", zone)):
        log(f"warning: there is no time zone {quoted(zone)}, so times are UTC; set TZ to another")


def _tell_supervisor(state: str) -> None:
    # Tell the service manager that has started the daemon, see sd_notify(3).
    address = os.environ.get("NOTIFY_SOCKET", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        wire.sendto(state.encode(), re.sub("^@", "\0", address))  # "" is an OSError


def _reexec(daemon: Daemon, server: Server, signals: socket.socket) -> None:
    # Execute the program anew in this process; return when that is refused, or when there is a
    # signal to look at first. The lock is held, so no child is started or reaped and no record
    # changes until the next program has loaded them. Our children are its children, see execve(2).
    _tell_supervisor(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        # The program, maybe a newer version, must be able to start with our options.
        asked = subprocess.run(
            [*PROGRAM, "--version", "--host", server.socket.getsockname()[0]], text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=10.0)  # new clients wait
        if not asked.stdout.startswith("scrapy-do "):  # the timer may have reaped its exit status
            problem = (asked.stderr.strip() or "it does not say its version").splitlines()[-1]
            raise ScrapyDoError(f"the program cannot be started: {problem}")
        log("reloading; crawls run on")
        server.drain(DRAIN_SECONDS)
        with daemon.lock:
            if daemon.store.is_behind:
                raise ScrapyDoError(f"the state cannot be saved in {daemon.store.folder}")
            server.socket.set_inheritable(True)  # subprocess closes it all the same
            # A signal that comes from now on stays pending, and is for the next program.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            if not select.select([signals], [], [], 0)[0]:
                handover = {HANDOVER: str(server.socket.fileno())}
                os.execve(PROGRAM[0], PROGRAM, {**os.environ, **handover})
    except (ScrapyDoError, OSError, ValueError, subprocess.SubprocessError) as error:
        log(f"not reloaded, all goes on as before: {error}; mend that and send SIGHUP again")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _tell_supervisor("READY=1")


def serve(options: argparse.Namespace, signals: socket.socket) -> None:
    """Run the daemon until a signal stops it. Raise ScrapyDoError when it cannot start."""
    is_reloaded = HANDOVER in os.environ
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:  # after a reload it is the socket of the former program
        listening = (socket.socket(fileno=int(os.environ.pop(HANDOVER))) if is_reloaded else
                     socket.create_server((options.host, options.port), family=family,
                                          backlog=1024))  # clients until they are accepted
    except OSError as error:
        raise ScrapyDoError(f"cannot listen on {options.host}, port {options.port}: {error};"
                            " choose another --port or --host") from None
    options.host, options.port = listening.getsockname()[:2]  # after a reload those of before
    read_files(options)
    _warn_of_surroundings(options.scrapy)
    store = Store(Path(os.path.realpath(options.data_dir)))
    daemon = Daemon(store, options)
    daemon.start(is_reloaded)
    server = Server(listening, daemon, options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"{'https' if options.tls else 'http'}://{host}:{options.port}"
    log(f"scrapy-do {__version__} listens on {url} and keeps everything in {store.folder}")
    _tell_supervisor("READY=1")
    while not {signal.SIGTERM, signal.SIGINT} & set(server.serve_until(signals)):
        _reexec(daemon, server, signals)
    _tell_supervisor("STOPPING=1")
    log("stopping: crawls are being ended, their jobs will run again at the next start")
    listening.close()
    daemon.close()
    server.drain(DRAIN_SECONDS)


def prepare_process() -> socket.socket:
    """Put right what a process may inherit; return a socket that gets a byte for each signal."""
    # A file that is opened while a standard stream is closed would become that stream.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, the kernel keeps no exit codes
    with contextlib.suppress(OSError, AttributeError, ImportError):
        import ctypes
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, see prctl(2)
    sys.setswitchinterval(0.001)  # after which a busy thread lets others go on, instead of 5 ms
    # A handler might run too late to end a wait, so there is a socket, see signal.set_wakeup_fd.
    signals, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            log("SIGHUP is ignored, as nohup has it, so it does not reload")
        else:
            signal.signal(number, lambda number, frame: None)  # SIG_IGN would be inherited
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent, or `_reexec`, may block some
    return signals


def main(argv: list[str] | None = None) -> None:
    """Run the command line; the exit status is 0 when told to stop, 1 when it cannot start."""
    options = parse_options(argv)
    try:
        if options.version:
            read_files(options)  # since `_reexec` asks whether the program would start
            print(f"scrapy-do {__version__}")
        else:
            serve(options, prepare_process())
    except ScrapyDoError as error:
        sys.exit(f"scrapy-do: {error}")


# ---- 9. Page ---------------------------------------------------------------------------------

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>scrapy-do</title>
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark } h2 { margin: 1em 0 .3em } [aria-busy=true] { opacity: .5 }
body { max-width: 74rem; margin: auto; padding: .8rem; font: 15px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere } ul { padding: 0; margin: 0 } .wide { grid-template-columns: 1fr auto }
li { display: grid; grid-template-columns: 3fr 3fr 2fr 16.5rem; gap: 0 1rem; padding: .35rem 0;
  border-top: 1px solid #8884 } li > *, label, input, select, textarea, button { min-width: 0;
  font: inherit } label { display: flex; flex-flow: column; flex: 1 1 15rem; font-size: .85rem }
form, .buttons { display: flex; flex-wrap: wrap; gap: .4rem; align-items: end; margin: .3rem 0 }
li button { font-size: .85rem; text-align: left; place-self: start } .buttons { margin: 0 }
pre, #message { white-space: pre-wrap; overflow: auto; max-height: 75vh } #log { height: 75vh }
ul:empty::before { content: attr(data-empty); opacity: .7 } [type=checkbox] { align-self: start }
dialog { width: min(74rem, 100%); box-sizing: border-box } .soft { color: light-dark(#666, #aaa) }
#message { position: sticky; top: 0; background: Canvas; border: 1px solid; padding: .5rem }
#message::after { content: "\2715"; cursor: pointer } #message:empty, .empty .used { display: none }
.bars i { display: inline-block; width: 6px; margin-right: 2px; background: currentColor }
.good { color: light-dark(#1a7f37, #56d364) } @media (max-width: 50rem) { li { display: block } }
.bad { color: light-dark(#c62828, #ff8078) } .warn { color: light-dark(#a86400, #e3b341) }</style>
<h1>scrapy-do</h1><div id="status" class="soft"></div><div id="message" role="status"></div>
<details id="new" class="used"><summary>Run or schedule a spider</summary><form id="schedule">
  <label>Project<select name="project" required></select></label><datalist id="names"></datalist>
  <label>Spider, or * for all<input name="spider" list="names" autocomplete="off" required></label>
  <label>When: now, every monday at 6:00<input name="when" value="now" required></label>
  <label>Description<input name="description"></label>
  <label>Arguments, one NAME=VALUE a line<textarea name="arg"></textarea></label>
  <label>Settings, one NAME=VALUE a line<textarea name="setting"></textarea></label>
  <label>Time limit, s<input name="timeout"></label><label>Priority<input name="priority"></label>
  <label>Items to .out<input name="items" type=checkbox value="1"></label><button>Schedule</button>
</form></details><details id="pushing"><summary>Push a project</summary><form id="push">
  <label>A zip of the project<input type="file" name="archive" accept=".zip" required></label>
  <button>Push</button></form>Or by curl:<pre id="curl">git archive -o project.zip HEAD
curl -sS -F archive=@project.zip </pre></details>
<main class="used"><label>Search spiders, projects, jobs<input type="search" id="search"></label>
  <h2>Running and waiting</h2><ul id="running" data-empty="Nothing runs or waits."></ul>
  <h2>Failed lately</h2><ul id="failed" data-empty="Nothing failed."></ul>
  <h2>Next runs</h2><ul id="scheduled" data-empty="Nothing is scheduled."></ul>
  <h2>Finished jobs</h2><ul id="finished" data-empty="Nothing has finished."></ul>
  <h2>Projects</h2><ul id="projects" data-empty="There is no such spider."></ul></main>
<dialog id="viewer" aria-labelledby="whole"><form method="dialog">
  <a id="whole" target="_blank"></a><span id="note" role="status" class="soft"></span>
  <button>Close</button></form><pre id="log" tabindex="0"></pre></dialog>
<noscript>This page needs JavaScript; curl does not.</noscript><script>"use strict";
// Whatever comes from outside goes into the page as text, never as HTML.
const sizes = {running: 50, failed: 5, scheduled: 20, finished: 20, projects: 20};  // rows shown
const lists = ["RUNNING&limit=200", "PENDING&limit=200", "SCHEDULED", "COMPLETED&limit=500"];
const find = id => document.getElementById(id), fields = find("schedule").elements;
const post = (path, values) => ask(path, new URLSearchParams(values));
const runsOf = id => (data.runs.get(id) || []).slice(0, 10);
let data, now, counts, known, spiders, reading, loaded = 0, turn = 0, next = 0, gathered = "";
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children); return element;
}
const line = (textContent, className = "soft") => make("div", {className, textContent});
const button = (textContent, onclick, about) => make("button",
  {type: "button", textContent, onclick, ariaLabel: `${textContent} ${about}`});
const options = values => values.map(value => make("option", {value}, value));
const say = (textContent, className) => Object.assign(find("message"), {textContent, className});
async function ask(path, body) {
  const answer = await fetch(path, body && {method: "POST", body});
  const result = await answer.json().catch(() => ({msg: `The answer was HTTP ${answer.status}.`}));
  if (result.status !== "ok") throw new Error(result.msg);
  return result;
}
async function act(event, work) {
  const pressed = event.submitter || event.target; event.preventDefault();
  if (pressed.ariaBusy === "true") return;
  pressed.ariaBusy = "true";  // not disabled, which would take the focus away
  try { await work(); } catch (error) { say(error.message, "bad"); }
  pressed.ariaBusy = "false"; await refresh(true);
}
const seconds = local => Date.parse(local.slice(0, 19).replace(" ", "T") + "Z") / 1000;
const span = length => length < 120 ? `${length} s` : length < 7200 ? `${length / 60 | 0} min`
  : length < 172800 ? `${length / 3600 | 0} h` : `${length / 86400 | 0} d`;
const tell = (moment, ago = seconds(now) - seconds(moment)) => moment.slice(5, 19) +
  (ago < 0 ? `, in ${span(-ago)}` : `, ${span(ago)} ago`);
async function follow({identifier, spider}, stream) {
  const path = `get-log/data/${identifier}.${stream}`, {signal} = reading = new AbortController();
  const note = text => { if (!signal.aborted) find("note").textContent = text; };
  Object.assign(find("whole"), {href: path, textContent: `${spider}, ${path}`});
  find("log").replaceChildren(); gathered = ""; find("viewer").showModal(); note("following");
  try {
    const log = (await fetch(`${path}?follow=1&tail=1000`, {signal})).body;
    await log.pipeThrough(new TextDecoderStream()).pipeTo(new WritableStream({write}), {signal});
    note("the end");
  } catch (error) { note(`cut off: ${error.message}`); }
}
const write = piece => { if (!gathered) setTimeout(append, 100); gathered += piece; };
function append() {  // ten times a second: a crawl may write faster than a browser can lay out
  const log = find("log"), isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 40;
  log.append(gathered.slice(-3e5)); gathered = "";
  while (log.textContent.length > 3e5) log.firstChild.remove();  // or it fills the memory
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}
const colour = ({status, stats}) => status === "FAILED" ? "bad" : status !== "SUCCESSFUL" ? "soft"
  : stats && !stats.items ? "warn" : "good";
const results = ({stats, duration}) => `took ${span(duration || 0)}, ` + (!stats ? "no statistics"
  : `${stats.items} items, ${stats.responses} responses, ${stats.errors ?? "?"} errors`);
function bars(runs) {  // the oldest on the left; the height is the logarithm of the items
  const log = run => Math.log1p(run.stats?.items || 0), most = Math.max(...runs.map(log)) || 1;
  return make("div", {className: "bars"}, ...runs.toReversed().map(run => make("i", {role: "img",
    className: colour(run), style: `height: ${3 + 19 * log(run) / most}px`,
    title: `${run.started || run.timestamp}, ${results(run)}, ${run.status}`})));
}
function jobRow(job) {
  const {identifier: id, spider, status, scheduled_by: origin} = job, about = `${spider} ${id}`;
  const isPlan = status === "SCHEDULED", runs = runsOf(id), logged = isPlan ? runs[0] : job;
  const who = make("div", {}, make("details", {}, make("summary", {}, make("b", {}, spider),
    ` ${job.project}`), make("pre", {}, JSON.stringify(job, null, 1))), line(job.description));
  if (origin) who.append(button("by " + (data.specs.get(origin) || "a former schedule"),
    () => { find("search").value = origin; paint(); find("search").focus(); }, about));
  const what = make("div", {}, line(isPlan ? job.schedule : job.reason || status, colour(job)),
    runs.length ? bars(runs) : "", line(logged?.duration == null ? "" : results(logged)));
  const at = make("time", {dateTime: job.next_run || job.started || job.timestamp});
  const acts = make("div", {className: "buttons"});
  if (logged?.started) acts.append(button("log", () => follow(logged, "err"), about),
    button("out", () => follow(logged, "out"), about));
  acts.append(button(id.slice(0, 8), () => prompt("Identifier", id), "identifier of " + about));
  if (/SCHEDULED|PENDING|RUNNING/.test(status)) acts.append(button("cancel", it => confirm(
    `Cancel ${spider}, ${job.schedule}?`) && act(it, () => post("cancel-job.json", {id})), about));
  return make("li", {}, who, what, at, acts);
}
const projectRow = ({name, found, open}) => make("li", {className: "wide"}, make("details", {open},
  make("summary", {}, make("b", {}, name), ` spiders: ${found.length}`), found.join(", ")),
  button("remove", event => confirm(`Remove the project ${name}?`)
    && act(event, () => post("remove-project.json", {name})), name));
function show(id, records, row) {  // a row that says the same stays: no button goes under the mouse
  const list = find(id), focus = document.activeElement, rest = records.length - sizes[id];
  const old = new Map([...list.children].map(row => [row.text, row]));
  const says = it => JSON.stringify([it, data.specs.get(it.scheduled_by), runsOf(it.identifier)]);
  const wanted = records.slice(0, sizes[id]).map(it =>
    old.get(says(it)) || Object.assign(row(it), {text: says(it)}));
  if (rest > 0) wanted.push(make("li", {className: "wide", text: rest}, button(`${rest} more`,
    () => { sizes[id] += 100; paint(); }, id)));
  if (wanted.length === old.size && wanted.every(row => old.has(row.text))) return;
  list.replaceChildren(...wanted);
  (focus.isConnected ? focus : [...list.querySelectorAll("button")].find(each =>
    each.ariaLabel === focus.ariaLabel))?.focus({preventScroll: true});
}
function paint() {
  const word = find("search").value.trim().toLowerCase(), has = s => s.toLowerCase().includes(word);
  for (const id of ["running", "failed", "scheduled", "finished"])
    show(id, data[id].filter(job => word === "" || has(Object.values(job).join(" "))), jobRow);
  const projects = [...spiders].map(([name, all]) => ({name, open: word !== "",
    found: all.filter(spider => has(`${name} ${spider}`))}));
  show("projects", projects.filter(({found}) => found.length), projectRow);
  for (const each of document.querySelectorAll("time")) each.textContent = tell(each.dateTime);
}
const offer = () => find("names").replaceChildren(...options(
  (spiders.get(fields.project.value) || []).filter(it => it.includes(fields.spider.value))
    .slice(0, 100)));  // browsers are slow with thousands of options
async function loadSpiders() {
  const {projects} = await ask("list-projects.json"), chosen = fields.project.value;
  spiders = new Map(await Promise.all(projects.map(async project =>
    [project, (await ask(`list-spiders.json?project=${encodeURIComponent(project)}`)).spiders])));
  fields.project.replaceChildren(...options(projects));
  if (spiders.has(chosen)) fields.project.value = chosen;
}
const jobsIn = async list => (await ask(`list-jobs.json?status=${list}`)).jobs;
async function refresh(isForced) {
  const mine = ++turn, begun = performance.now(); next = Infinity;
  try {
    const {time, ...state} = await ask("status.json"), size = `${state.projects} ${state.spiders}`;
    const news = JSON.stringify({...state, uptime: 0, "cpu-usage": 0, "memory-usage": 0});
    if (isForced || news !== counts || begun > loaded + 30000) {
      if (isForced || size !== known) await loadSpiders();
      const [running, waiting, scheduled, finished] = await Promise.all(lists.map(jobsIn));
      if (mine !== turn) return;
      scheduled.sort((one, other) => one.next_run < other.next_run ? -1 : 1);
      data = {running: [...running, ...waiting], scheduled, finished,
        failed: finished.filter(job => job.status === "FAILED"),
        runs: Map.groupBy(finished, job => job.scheduled_by),
        specs: new Map(scheduled.map(job => [job.identifier, job.schedule]))};
      [counts, known, loaded] = [news, size, begun];
    }
    find("status").textContent = `${state.hostname}, up ${state.uptime}, ${time.slice(0, 19)}: ` +
      ["running", "pending", "scheduled"].map(it => `${state["jobs-" + it]} ${it}`).join(", ");
    document.body.className = spiders.size || data.finished.length ? "" : "empty";
    now = time; find("pushing").open ||= document.body.className === "empty"; paint();
  } catch (error) { find("status").textContent = `The daemon does not answer: ${error.message}`; }
  next = begun + 11 * (performance.now() - begun);  // spares a daemon that is busy
}
find("schedule").onsubmit = event => act(event, async () => {
  const lines = [...new FormData(event.target)].flatMap(([name, value]) =>
    value.split("\n").map(each => [name, each.trim()]));
  const made = await post("schedule-job.json", lines.filter(([, value]) => value));
  say([`Next run: ${made.next_run || "when a slot is free"}`, ...made.warnings || []].join("\n"));
});
find("push").onsubmit = event => act(event, async () => {
  say("Pushing..."); const made = await ask("push-project.json", new FormData(event.target));
  say([`${made.name} has ${made.spiders.length} spiders.`, ...made.warnings].join("\n"));
});
find("search").oninput = paint; fields.spider.oninput = fields.spider.onfocus = offer;
find("message").onclick = () => say(""); find("viewer").onclose = () => reading.abort();
setInterval(() => { if (!document.hidden && performance.now() > next) refresh(); }, 3000);
find("curl").textContent += new URL("push-project.json", location); refresh();</script>"""


if __name__ == "__main__":
    main()
