#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["psutil>=5.9.6"]
# ///
"""Keep Scrapy projects, run their spiders now or on a schedule, and answer a small JSON API.

    python scrapy_do.py --port 7654
    curl -sS localhost:7654/push-project.json -F archive=@demo.zip
    curl -sS localhost:7654/schedule-job.json -F project=demo -F spider=toscrape \\
        -F 'when=every weekday at 6:00'

How a request becomes a crawl:

    curl ──> http thread: Daemon.schedule ──┐
                                            ├─> save: state.json, fsync, then memory
    timer thread: a schedule is due ────────┘                  │
                                                               v
    crawl thread: copy the code, Popen, wait, <────────── dispatch <──┐
                  end what is left, save how it ended ────────────────┘

Threads
    main        accepts connections until a signal comes; see `main` and `Server.serve_until`.
    http        answer the requests of a connection each, and may wait for client and disk.
    timer       sleeps until a schedule is due, and looks at the clock at least once a minute.
    crawl-ID    sees to a crawl that has a slot, from the copy of its code to its end.
    alarm       asks a crawl to end whose timeout is over, or kills it --kill-after seconds later.
    on-finish   runs the command of --on-finish, for one finished job after the other.

Locks
    Daemon.lock is held by whoever changes a record or starts or reaps a child process, including
    the write to the disk. Readers take no lock: records never change, and what a reader sees is on
    the disk. Server has a lock of its own for its list of connections. Neither is taken inside
    the other.
"""

from __future__ import annotations

# Modules that a start does not need are imported where they are used: each costs milliseconds.
import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import heapq
import hmac
import http.server
import io
import itertools
import json
import os
import queue
import random
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
# A computer without a battery starts in 1970 and is set by the network minutes later. No clock
# that is right shows a time before this program was written, so until then nothing is due.
SANE_INSTANT = 1_790_000_000  # 2026-09-21


# ---- 1. Errors and log -----------------------------------------------------------------------


class ScrapyDoError(Exception):
    """Tell a user in a sentence what is wrong and what to do; `status` is the HTTP status."""

    status = 500

    def __init__(
        self, message: str, status: int | None = None, headers: Sequence[tuple[str, str]] = ()
    ):
        super().__init__(message)
        self.status = status or self.status
        self.headers = headers


class BadRequest(ScrapyDoError):
    """Refuse a request that is wrong in itself."""

    status = 400


class SpecError(BadRequest):
    """Refuse a scheduling spec."""


class Forbidden(ScrapyDoError):
    """Refuse what somebody else's web page may have asked a browser for."""

    status = 403


class NotFound(ScrapyDoError):
    """Say that there is no such path, project, spider or job."""

    status = 404


class Conflict(ScrapyDoError):
    """Refuse a change that the present state does not allow."""

    status = 409


class TooLarge(ScrapyDoError):
    """Refuse a request that is over a limit."""

    status = 413


class Unavailable(ScrapyDoError):
    """Refuse work because the daemon is stopping or has too much of it."""

    status = 503


class StorageError(ScrapyDoError):
    """Say that the disk did not take a change, which therefore did not happen."""

    status = 507


def log(message: str) -> None:
    """Write a line to stderr, with the local time; a line break cannot fake a second line."""
    if not message.isprintable():
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {message}\n"
    # A full disk or a closed terminal must not stop a crawl, and sys.stderr may even be None.
    with contextlib.suppress(OSError, ValueError):
        print(line, end="", file=sys.stderr, flush=True)


def log_crash(what: str) -> None:
    """Write the traceback of the exception being handled, a line each."""
    try:
        import traceback

        text = traceback.format_exc()
    except OSError:  # there may be no file descriptor left to read the module
        text = repr(sys.exc_info()[1])
    for line in f"{what} failed:\n{text}".splitlines():
        log(line)


def quoted(text: str) -> str:
    """Return a text in quotes for a message, cut short."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def closest(word: str, known: Collection[str]) -> str:
    """Return the known names that look most like a word, as `'a' or 'b'`; "" if none do."""
    import difflib

    found = difflib.get_close_matches(word[:100], known, 3, 0.6)
    return " or ".join(quoted(name) for name in found)


def parse_whole(text: str, least: int, most: int) -> int:
    """Return a whole number within bounds. Raise ValueError for anything else."""
    if re.fullmatch("-?[0-9]{1,12}", text, re.ASCII) and least <= int(text) <= most:
        return int(text)
    raise ValueError(f"must be a whole number from {least} to {most}, not {quoted(text)}")


def parse_seconds(text: str, least: float = 0.0) -> float:
    """Return a number of seconds up to a million. Raise ValueError for anything else."""
    if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{0,6})?", text, re.ASCII) and least <= float(text) <= 10**6:
        return float(text)
    raise ValueError(f"must be a number of seconds from {least:g} to 1000000, not {quoted(text)}")


# ---- 2. Schedules ----------------------------------------------------------------------------

SPEC_CHARACTERS = 1000  # all weekdays and a time for each quarter of an hour fit
UNIT_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}
ELAPSED_UNITS = ("second", "minute", "hour")  # the others are days on the local calendar
LAST_INSTANT = 253402214400.0  # 9999-12-31 00:00 UTC: still the year 9999 in every time zone
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DAY_NAMES = {name: frozenset({day}) for day, name in enumerate(WEEKDAYS)}
DAY_NAMES |= {"weekday": frozenset(range(5)), "weekend": frozenset({5, 6})}
TIME_FORMS = {  # unit: how its times are written, and examples
    "day": (r"(?a)\d:[0-5]\d|([01]\d|2[0-3]):[0-5]\d(:[0-5]\d)?", "9:30, 18:00 or 23:59:59"),
    "hour": (r"(?a)([0-5]\d)?:[0-5]\d", ":15 (minute 15) or 00:15 (second 15)"),
    "minute": (r"(?a):[0-5]\d", ":15 (second 15)"),
}


def _utc_offset(moment: float) -> int:
    """Return by how many seconds local clocks are ahead of UTC at a POSIX time."""
    return time.localtime(moment).tm_gmtoff


def _instant_of_wall(wall: float) -> float:
    """Return the first POSIX time at which local clocks show `wall` (seconds from 1970) or later.

    That is right after the gap of spring, and the first pass in the fold of autumn (PEP 495).
    """
    before, after = _utc_offset(wall - DAY_SECONDS), _utc_offset(wall + DAY_SECONDS)
    for offset in (before, after):
        if _utc_offset(wall - offset) == offset:
            return wall - offset

    seconds = range(int(wall - after) - 1, int(wall - before) + 2)  # clocks jump over `wall` here
    return float(seconds[bisect_left(seconds, wall, key=lambda m: m + _utc_offset(m))])


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
        if self.times or self.unit in ELAPSED_UNITS:
            return self
        return self._replace(times=((origin + _utc_offset(origin)) % DAY_SECONDS,))

    def next_after(self, moment: float, rng: Any = random) -> float:
        """Return the first due time after `moment`, both in POSIX seconds; `rng` draws the units.

        Raise SpecError when it may be past the year 9999, whatever is drawn.
        """
        # Beside the units, a weekday may be 7 days away; the rest is for time zones and gaps.
        if moment + self.high * UNIT_SECONDS[self.unit] + 9 * DAY_SECONDS > LAST_INSTANT:
            raise SpecError("the next run may be past the year 9999; choose a shorter interval")

        count = rng.randint(self.low, self.high)
        if self.unit in ELAPSED_UNITS:
            return self._next_elapsed(moment, count)
        return self._next_local(moment, count * UNIT_SECONDS[self.unit] // DAY_SECONDS)

    def _next_elapsed(self, moment: float, count: int) -> float:
        size = UNIT_SECONDS[self.unit]
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
        first = today + (step if step > 1 else 0)  # only a single day may still be today
        dues = (
            _instant_of_wall(day * DAY_SECONDS + at)
            for day in itertools.count(first)
            if (day + 3) % 7 in self.weekdays  # 1970-01-01 was a Thursday
            for at in self.times or (time_of_day,)
        )
        return next(due for due in dues if due > moment + 1e-6)  # a sum of floats may round up

    def _wall_of(self, moment: float) -> float:
        """Return what local clocks show, or would show had no gap delayed a run past midnight."""
        # This keeps the grid of steps of several days, which have one time; others need no grid.
        wall = moment + _utc_offset(moment)
        yesterday = (wall // DAY_SECONDS - 1) * DAY_SECONDS + sum(self.times[-1:])
        return yesterday if self.times and _instant_of_wall(yesterday) == moment else wall

    def resume_after(self, due: float, now: float, rng: Any = random) -> float:
        """Return the first due time after `now` on the grid of `due`, however many were missed."""
        # Leap over most of them as intervals of the greatest length, which is a possible draw.
        longest = self.high * UNIT_SECONDS[self.unit]
        leap = ((now - due) // longest - 2) * longest  # two less: a day of 25 hours, and last draws
        if leap > 0:
            is_local = self.unit not in ELAPSED_UNITS
            due = _instant_of_wall(self._wall_of(due) + leap) if is_local else due + leap
        while due <= now:
            due = self.next_after(due, rng)
        return due

    def latest_after(self, moment: float) -> float:
        """Return the latest POSIX time that `next_after(moment)` can give."""
        return self._replace(low=self.high).next_after(moment)


# The parser: each function takes the words that are left, then "", and removes those that fit. The
# first that does not fit stays there, and the SpecError says what is wrong with it.


@functools.lru_cache(maxsize=1024)  # lists of jobs ask for the same few specs again and again
def parse_spec(text: str) -> Recurrence | None:
    """Return when the spec says that a job is due; None is 'now'. Raise SpecError where it errs."""
    if len(text) > SPEC_CHARACTERS:
        raise SpecError(f"schedule not understood: it has more than {SPEC_CHARACTERS} characters")
    words = re.sub(r",(\s*and\s)?", " , ", text.lower()).split()
    recurrence, left, problem = _read(words)
    if not problem:
        return recurrence

    where = "it ends too early"
    advice = "; in the shell, spaces need quotes: -F 'when=every monday at 12:30'"
    if left:
        meant = _meant(_cron_sentence(words) or words)
        where, advice = f"{quoted(left[0])} does not fit", f"; write '{meant}'" if meant else ""
    raise SpecError(f"schedule not understood: {where}: {problem}{advice}. The forms: {SPEC_FORMS}")


def _read(words: list[str]) -> tuple[Recurrence | None, list[str], str]:
    """Return the meaning of a spec, the words that do not fit, and what is wrong with the first."""
    rest = [*words, ""]
    try:
        return _parse_sentence(rest), [], ""
    except SpecError as error:
        return None, rest[:-1], str(error)


def _parse_sentence(rest: list[str]) -> Recurrence | None:
    if re.match("@|([0-9*/,-]+ ){3}", " ".join(rest)):
        raise SpecError("cron syntax is not read")
    if rest[0] in ("at", "in", "next", "on", "once", "today", "tomorrow", "tonight"):
        raise SpecError("one-off runs are only possible by 'now'")
    if rest[0] not in ("now", "every"):
        raise SpecError("a schedule starts with 'now' or 'every'")

    is_now = rest.pop(0) == "now"
    recurrence = None if is_now else _parse_times(rest, _parse_interval(rest))
    if rest[0]:
        only = "only weekdays, and the times of weekdays and 'every day', can be a list"
        raise SpecError(only if rest[0] in (",", "and") else "nothing may follow here")
    return recurrence


def _parse_interval(rest: list[str]) -> Recurrence:
    if rest[0] in DAY_NAMES:
        return Recurrence("day", weekdays=_parse_list(rest, DAY_NAMES.get, "a weekday"))

    is_counted = rest[0][:1].isdigit()
    low = high = _parse_number(rest, 1) if is_counted else 1
    if is_range := is_counted and rest[0] == "to":
        rest.pop(0)
        high = _parse_number(rest, low)

    unit = rest[0].removesuffix("s")
    if unit not in UNIT_SECONDS:
        raise SpecError(f"a unit of time{'' if is_counted else ' or a weekday'} is wanted here")
    if rest[0] == unit and (is_range or high > 1):
        raise SpecError("the plural is wanted here")
    if high * UNIT_SECONDS[unit] > 36525 * DAY_SECONDS:  # more is a slip of the pen
        raise SpecError("an interval is at most 100 years")
    rest.pop(0)
    return Recurrence(unit, low, high)


def _parse_number(rest: list[str], least: int) -> int:
    word = rest[0]
    if not (word.isascii() and word.isdigit() and int(word) >= least):
        raise SpecError(f"a whole number from {least} is wanted here")
    return int(rest.pop(0))


def _parse_times(rest: list[str], recurrence: Recurrence) -> Recurrence:
    unit = recurrence.unit
    if rest[0] != "at":
        return recurrence
    if unit not in TIME_FORMS:
        raise SpecError(f"{unit}s take no time; weekdays do, as in 'every monday at 12:30'")
    rest.pop(0)
    read, wanted = functools.partial(_read_time, unit), f"a time like {TIME_FORMS[unit][1]}"
    times = _parse_list(rest, read, wanted, unit == "day" and recurrence.high == 1)
    return recurrence._replace(times=tuple(sorted(times)))


def _read_time(unit: str, word: str) -> frozenset[int]:
    if re.fullmatch(TIME_FORMS[unit][0], word) is None:
        return frozenset()
    scale = UNIT_SECONDS[unit] // (24 if unit == "day" else 60)  # what the first number counts
    numbers = filter(None, word.split(":"))
    return frozenset({sum(int(n) * scale // 60**place for place, n in enumerate(numbers))})


def _parse_list(
    rest: list[str], read: Callable[[str], frozenset[int] | None], wanted: str, is_open: bool = True
) -> frozenset[int]:
    found: frozenset[int] = frozenset()
    while True:
        values = read(rest[0])
        if not values or found & values:
            raise SpecError("it is given twice" if values else f"{wanted} is wanted here")
        found |= values
        rest.pop(0)
        if not is_open or rest[0] not in (",", "and"):
            return found
        rest.pop(0)


# What a refusal shows; a sentence that it suggests has been read by the parser above.
SPEC_FORMS = (
    "now | every [N | A to B] seconds|minutes|hours|days|weeks [at TIME] | "
    "every day|weekday|weekend|monday, friday and sunday [at 6:00 and 18:30]"
)
SPEC_WORDS = (*UNIT_SECONDS, *(f"{unit}s" for unit in UNIT_SECONDS), *DAY_NAMES)
CRON_NAMES = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@weekly": "0 0 * * 0"}
CRON_DAYS = {str(number): name for number, name in enumerate(WEEKDAYS, 1)}
CRON_DAYS |= {"*": "day", "1-5": "weekday", "0": "sunday"}


def _meant(words: list[str], repairs: int = 5) -> str:
    """Return the sentence that was meant, put right word by word; "" if that leads nowhere."""
    _, left, problem = _read(words)
    if not problem:
        return " ".join(words).replace(" ,", ",")
    for repair in _repairs(left[0]) if repairs and left else ():
        trial = [*words[: -len(left)], *repair.split(), *left[1:]]
        if len("".join(_read(trial)[1])) < len("".join(left)):
            return _meant(trial, repairs - 1)
    return ""


def _repairs(word: str) -> list[str]:
    """Return what may have been meant by a word."""
    found = [known for known in SPEC_WORDS if known.startswith(word.rstrip("s") or word)]
    if word[0].isdigit():
        found += [f":{word}", f"{word}:00", re.sub("([0-9])([a-z])", r"\1 \2", word)]
    return [*found, f"every {word}", f"at {word}", f"and {word}"]


def _cron_sentence(words: list[str]) -> list[str]:
    """Return words, not yet parsed, that mean what five fields of crontab(5) do; or none."""
    fields = CRON_NAMES.get(words[0], " ".join(words).replace(" , ", ",")).split()
    if len(fields) != 5 or fields[2:4] != ["*", "*"]:
        return []
    minute, hour, _, _, days = fields
    if hour == days == "*":
        sentence = "every minute" if minute == "*" else f"every hour at :{minute:0>2}"
        if step := re.fullmatch(r"\*/([2-6]|1[025]|[23]0)", minute):
            sentence = f"every {step[1]} minutes"
        return sentence.split()
    named = " and ".join(CRON_DAYS.get(day, day) for day in days.split(","))
    times = " and ".join(f"{number}:{minute:0>2}" for number in hour.split(","))
    return f"every {named} at {times}".split()


# ---- 3. Records (pure) -----------------------------------------------------------------------


class Status(str, Enum):
    """Where a job is in its life."""

    SCHEDULED = "SCHEDULED"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCESSFUL = "SUCCESSFUL"
    FAILED = "FAILED"
    CANCELED = "CANCELED"


ACTIVE = (Status.SCHEDULED, Status.PENDING, Status.RUNNING)
COMPLETED = (Status.SUCCESSFUL, Status.FAILED, Status.CANCELED)
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

    def view(self) -> dict[str, Any]:
        """Return what the API says of the job."""
        return {
            "identifier": self.identifier, "status": self.status.value, "actor": self.actor,
            "schedule": self.schedule, "scheduled_by": self.scheduled_by,
            "project": self.project, "spider": self.spider,
            "description": self.description, "payload": self.payload,
            "args": self.arg, "settings": self.setting,
            "timeout": self.timeout, "priority": self.priority, "items": self.items,
            "timestamp": local_time(self.timestamp), "started": local_time(self.started),
            "duration": self.duration, "next_run": local_time(self.due),
            "exit_code": self.exit_code, "reason": self.reason, "stats": self.stats,
        }  # fmt: skip

    def recurrence(self) -> Recurrence:
        """Return when the job is due. Raise SpecError for a spec that this version refuses."""
        recurrence = parse_spec(self.schedule)
        if recurrence is None:
            raise SpecError("'now' is not a recurring schedule")
        return recurrence.anchored(self.origin)


class Gone(NamedTuple):
    """Say that a job or a project has been removed."""

    identifier: str = ""
    name: str = ""


Record = Job | Project | Gone
encode_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder each time
JSON_TYPES: dict[str, tuple[type, ...]] = {  # what a field of that annotation is in JSON
    "str": (str,), "int": (int,), "bool": (bool,), "float": (float, int), "None": (type(None),),
    "Strings": (list,), "Status": (str,), "dict[str, Any]": (dict,),
}  # fmt: skip
SHARED_FIELDS = ("schedule", "project", "spider", "description")  # thousands of jobs share a text


def describe(job: Job) -> str:
    """Return how the log names a job."""
    when = f" ({job.schedule})" if job.status is Status.SCHEDULED else ""
    run = f", a run of {job.scheduled_by}" if job.scheduled_by else ""
    end = f", {job.reason}" if job.reason else ""
    took = f" after {job.duration} s" if job.duration is not None else ""
    status = f"{job.status.value}{when}{took}"
    return f"job {job.identifier} {status}: {job.project} {job.spider}{run}{end}"


def new_identifier() -> str:
    """Return a random UUID, RFC 9562 section 5.4; the module uuid takes 10 ms to import."""
    bits = int.from_bytes(os.urandom(16), "big") & ~(0xF << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62
    return re.sub("(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", f"{bits:032x}")


def local_time(instant: float | None) -> str | None:
    """Return POSIX seconds as local time like `2017-12-11 15:20:42.415793`; None stays None."""
    if instant is None:
        return None
    whole, micro = divmod(round(instant * 1_000_000), 1_000_000)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(whole)) + f".{micro:06d}"


class Json(str):
    """Text that is JSON already."""


def encode_answer(answer: Mapping[str, Any]) -> str:
    """Return an answer as JSON.

    A list of jobs comes as text: to encode 10,000 in a call would keep all other threads waiting.
    """
    texts = [f', "{name}": {value}' for name, value in answer.items() if isinstance(value, Json)]
    others = {name: value for name, value in answer.items() if not isinstance(value, Json)}
    return encode_json(others)[:-1] + "".join(texts) + "}"


@functools.lru_cache(maxsize=1024)
def _cached_text(job: Job) -> str:
    return encode_json(job.view())


def job_text(job: Job) -> str:
    """Return what the API says of a job as JSON.

    Whoever watches a list asks for the same jobs again; long ones are not kept in memory for that.
    """
    size = len(job.payload) + len(job.description) + sum(map(len, job.arg + job.setting))
    is_hashable = job.stats is None
    return _cached_text(job) if is_hashable and size < 2000 else encode_json(job.view())


def encode_record(record: Record) -> str:
    """Return a record as JSON on one line, without the fields that have their default."""
    if isinstance(record, Gone):
        return encode_json({**{k: v for k, v in record._asdict().items() if v}, "gone": True})
    defaults, unset = record._field_defaults, object()
    fields = zip(record._fields, record, strict=True)
    return encode_json({k: v for k, v in fields if v != defaults.get(k, unset)})


def decode_record(fields: Any) -> Record:
    """Return the record that a line of the state file describes. Raise ValueError for a fault."""
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r:.60} is not an object")
    if fields.get("gone") is True:
        return Gone(str(fields.get("identifier", "")), str(fields.get("name", "")))
    kind: type[Any] = Job if "identifier" in fields else Project
    try:
        record: Record = kind(**{k: _decode_field(kind, k, v) for k, v in fields.items()})
    except (TypeError, ValueError) as error:
        key = fields.get(kind._fields[0])
        raise ValueError(f"the record {key!r:.60}: {error}") from None
    return record


def _decode_field(kind: type[Any], name: str, value: Any) -> Any:
    wanted = kind.__annotations__.get(name)
    if wanted is None:
        raise ValueError(f"there is no field {quoted(name)}")
    parts = wanted.__forward_arg__.split(" | ")  # typing.NamedTuple makes a ForwardRef of the text
    allowed = [python for part in parts for python in JSON_TYPES[part]]
    if type(value) not in allowed or (type(value) is float and not 0 <= value < LAST_INSTANT):
        raise ValueError(f"the field '{name}' cannot be {value!r:.60}")
    if name == "status":
        return Status(value)
    if isinstance(value, list):
        return tuple(str(item) for item in value)
    return sys.intern(value) if name in SHARED_FIELDS else value


# ---- 4. Store --------------------------------------------------------------------------------

# Scrapy is started with this settings module, which takes over the settings of the project, and
# then tells the daemon what Scrapy found: neither the project's logging nor its output is read.
SHIM_MODULE = "scrapy_do_shim"
SHIM = """
import atexit
import importlib
import json
import os
import sys
import warnings

from pydispatch import dispatcher
from scrapy import exporters, signals
from scrapy.utils.misc import load_object

order = json.loads(os.environ.pop("SCRAPY_DO"))
os.environ["SCRAPY_SETTINGS_MODULE"] = order["settings"]  # the project sees no more
project = importlib.import_module(order["settings"])
globals().update({name: getattr(project, name) for name in dir(project) if name.isupper()})

def report(answer):
    with open(order["report"], "w") as file:
        json.dump(answer, file, default=str)

def report_stats(crawler):
    stats, uncounted = crawler.stats.get_stats(), crawler.settings["LOG_LEVEL"] in ("CRITICAL", 50)
    names = {"item_scraped_count": 0, "response_received_count": 0, "finish_reason": ""}
    names["log_count/ERROR"] = None if uncounted else 0
    if "start_time" in stats:  # else the project counts nothing, and 0 would be wrong
        report({name: stats.get(name, default) for name, default in names.items()})

def watch(sender):
    atexit.register(report_stats, sender)  # feeds are stored after the spider closes, and may fail

if order["command"] == "list":
    base = load_object(globals().get("SPIDER_LOADER_CLASS", "scrapy.spiderloader.SpiderLoader"))

    class SPIDER_LOADER_CLASS(base):
        @classmethod
        def from_settings(cls, settings):
            with warnings.catch_warnings(record=True) as caught:
                loader = base.from_settings(settings)
            texts = [str(warning.message) for warning in caught]
            report({"spiders": list(loader.list()), "warnings": texts})
            return loader

else:  # signals of whatever sender: the project's own collector, extensions and feeds are untouched
    dispatcher.connect(watch, signals.spider_opened)
    if order["items"]:
        sys.stdout.reconfigure(line_buffering=True, write_through=False)  # a print splits no item
        exporter = exporters.JsonLinesItemExporter(open(1, "ab", buffering=0, closefd=False))
        dispatcher.connect(exporter.export_item, signals.item_scraped)
"""

STATE_END = b"]}\n"
STATE_SLACK_BYTES = MIB  # by which the file may outgrow twice its size before it is made anew
CLEAN_STOP = b"stopped\n"  # in the lock file; anything else was a crash
SPARE_SECONDS = 0.05  # until a step is tried again for which there was no file descriptor


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, see fsync(2)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a file or a folder with all that a crawl may have left there; log a failure."""
    import shutil

    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():  # there may be folders that even their owner cannot write to
            path.chmod(stat.S_IRWXU)
            for root, folders, _ in os.walk(path):
                for folder in (os.path.join(root, name) for name in folders):
                    if not os.path.islink(folder):
                        os.chmod(folder, stat.S_IRWXU)
            shutil.rmtree(path)
    except (OSError, RecursionError) as error:
        log(f"{path} cannot be deleted: {error}; delete it by hand")


def open_log(path: Path) -> IO[bytes]:
    """Open a log to read it; a log that has not begun is empty. Raise NotFound for a link etc."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return open(os.devnull, "rb")
    except OSError as error:
        raise NotFound(f"the log cannot be read: {error.strerror}") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise NotFound("there is something else in the place of the log")


def parse_state(data: bytes) -> tuple[Any, bool]:
    """Return the document of a state file, and whether a crash has torn its end.

    A crash leaves rubbish after a whole document, or a last change that is cut off or has zeros
    where the disk was not written. Raise ValueError for all else, lest the mistake of somebody
    who edits the file is taken for a crash, and records are lost.
    """
    try:
        return json.loads(data), False
    except ValueError:
        whole, end, rest = data.partition(b"\n" + STATE_END)
        former, _, last = data.rpartition(b",\n[")
        if rest:
            return json.loads(whole + end), True
        is_closed = data.endswith(end or STATE_END) and not data.endswith(b"," + STATE_END)
        if is_closed and b"\0" not in last:
            raise
        log("a crash has cut off the last change of the state file, which is left out")
        document = json.loads(former + b"\n" + STATE_END)
        with contextlib.suppress(ValueError, KeyError):  # it may be the change before, and whole
            change = json.JSONDecoder().raw_decode("[" + last.decode("utf-8", "replace"))[0]
            document["changes"].append(change)
        return document, True


class Store:
    """The data folder: its lock, the state file, archives, logs and working copies.

    The state file is one JSON document, with a change in each line. A change is a list of records,
    nearly always of one. The last record of a job or project counts:

        {"version": 2, "since": 1790000000.0, "changes": [
        [{"name": "shop", "push": "1b9d...", "spiders": ["books"]}],
        [{"identifier": "0c1f...", "status": "RUNNING", ...}],
        [{"identifier": "9a7e...", "gone": true}]
        ]}

    A change is written over the closing brackets and ends with new ones, in a write and an fsync.
    So a power cut can only spoil the last change, which nobody has been told of. As in SQLite's
    "powersafe overwrite", bytes before a write in the same sector are taken to be safe.

    All methods that write want Daemon.lock to be held.
    """

    VERSION = 2

    def __init__(self, folder: Path):
        """Create and lock the folder. Raise StorageError when it is in use or cannot be written."""
        self.folder = folder
        self.state_file = folder / "state.json"
        self.projects, self.logs, self.work = folder / "projects", folder / "logs", folder / "work"
        self.spider_data, self.shim = folder / "spider-data", self.work / "shim"
        self.is_behind = False  # the file lacks changes that have happened
        self.was_crashed = False  # the last daemon did not end well
        self._since = 0.0  # when the state file began; older files in the folder are not ours
        self._end = 0  # where its closing brackets are; 0 when it must be written anew
        self._first_end = 0  # where they were when it was written anew
        try:
            self._make_folders()
        except OSError as error:
            raise StorageError(f"the data folder cannot be used: {error}; see --data-dir") from None

    def _make_folders(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(self.folder.iterdir()):  # made for us, with the modes of a login
            self.folder.chmod(0o700)
        if self.folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem = f"others may write to {self.folder}, and so run code as you"
            raise StorageError(f"{problem}: run 'chmod go-w {self.folder}'")
        self._take_lock()
        for path in (self.projects, self.logs, self.work, self.spider_data):
            path.mkdir(mode=0o700, exist_ok=True)  # or a link to a folder, made by its owner

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            advice = "stop it, or choose another --data-dir"
            raise StorageError(f"another scrapy_do uses {self.folder}: {advice}") from None
        self.was_crashed = os.read(self._lock, 10) != CLEAN_STOP
        os.truncate(self._lock, 0)

    def close(self) -> None:
        """Let go of the folder, after a stop that left nothing to be cleared up."""
        with contextlib.suppress(OSError):
            os.pwrite(self._lock, CLEAN_STOP, 0)
        os.close(self._lock)

    def load(self) -> tuple[dict[str, Project], dict[str, Job]]:
        """Return the saved records, the jobs in the order in which they were made.

        Raise StorageError that names the file when this version has not written it.
        """
        projects: dict[str, Project] = {}
        jobs: dict[str, Job] = {}
        try:
            for record in self._read() if os.path.lexists(self.state_file) else ():
                apply_record(record, projects, jobs)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            advice = "nothing was changed; mend the file, or move the whole folder away"
            raise StorageError(f"{self.state_file} cannot be read: {error}; {advice}") from None
        self._since = self._since or time.time()
        return projects, jobs

    def _read(self) -> list[Record]:
        """Return the records in the order in which they were saved."""
        data = self.state_file.read_bytes()
        document, is_torn = parse_state(data)
        if not isinstance(document, dict) or type(document.get("version")) is not int:
            raise ValueError("it is not an object with a 'version'")
        if document["version"] != self.VERSION:
            known = f"this scrapy_do reads version {self.VERSION}"
            raise ValueError(f"it has version {document['version']}, {known}")
        changes = document.get("changes")
        if not isinstance(changes, list) or not all(type(change) is list for change in changes):
            raise ValueError("its 'changes' must be a list of lists")
        self._since = float(document.get("since", 0.0))
        if not is_torn and changes and data.endswith(b"]\n" + STATE_END):
            self._first_end = self._end = len(data) - len(STATE_END)
        return [decode_record(fields) for change in changes for fields in change]

    def sweep(
        self, pushes: Collection[str], jobs: Collection[str], running: Collection[str]
    ) -> None:
        """Delete what a crash left behind: uploads and code, logs, and working copies.

        What is older than the state file stays, since that may have been moved away by hand.
        """
        found = [path for path in self.projects.iterdir() if path.stem not in pushes]
        found += [path for path in self.logs.iterdir() if path.stem not in jobs]
        for path in found:
            if JOB_PATTERN.fullmatch(path.stem) and path.lstat().st_mtime >= self._since:
                remove_tree(path)
        for path in self.work.iterdir():
            if path != self.shim and path.name.split(".")[0] not in running:
                remove_tree(path)

    def write_shim(self) -> None:
        """Put the settings module of crawls in its place. Raise StorageError if that fails."""
        path = self.shim / f"{SHIM_MODULE}.py"
        try:
            self.shim.mkdir(exist_ok=True)
            if not path.exists() or path.read_text("utf-8") != SHIM:
                path.write_text(SHIM, "utf-8")
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error}") from None

    def archive(self, project: Project) -> Path:
        """Return where a project's archive is kept."""
        return self.projects / f"{project.push}.zip"

    def tree(self, project: Project) -> Path:
        """Return the folder with a project's unpacked archive."""
        return self.projects / project.push

    def log_file(self, identifier: str, stream: str) -> Path:
        """Return the log of a job: `stream` is out or err."""
        return self.logs / f"{identifier}.{stream}"

    def log_bytes(self, identifier: str) -> int:
        """Return how long the logs of a job are together."""
        size = 0
        for stream in ("out", "err"):
            with contextlib.suppress(OSError):
                size += self.log_file(identifier, stream).lstat().st_size
        return size

    def delete_logs(self, identifier: str) -> None:
        """Delete the logs of a job, if there are any."""
        for stream in ("out", "err"):
            remove_tree(self.log_file(identifier, stream))

    def append(self, records: Sequence[Record]) -> bool:
        """Save a change; False when the file must be written anew. Raise OSError if that fails."""
        limit = 2 * self._first_end + STATE_SLACK_BYTES
        if self.is_behind or not self._end or self._end > limit:
            return False
        change = ", ".join(map(encode_record, records))
        data = f",\n[{change}]\n".encode("utf-8", "backslashreplace") + STATE_END
        try:
            descriptor = os.open(self.state_file, os.O_WRONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(descriptor).st_size != self._end + len(STATE_END):
                return False  # somebody has changed the file
            self._overwrite(descriptor, data)
        finally:
            os.close(descriptor)
        return True

    def _overwrite(self, descriptor: int, data: bytes) -> None:
        # A change begins over the line feed before the brackets, where its comma belongs.
        start = self._end - 1
        try:
            if os.pwrite(descriptor, data, start) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # the change was refused, even if we end right now
                os.ftruncate(descriptor, self._end + len(STATE_END))
                os.pwrite(descriptor, b"\n" + STATE_END, start)
            raise
        self._end = start + len(data) - len(STATE_END)

    def rewrite(self, records: Iterable[Record]) -> None:
        """Write the file anew: beside, fsync, rename, fsync the folder. Raise OSError."""
        temporary = self.folder / "state.json.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        head = f'{{"version": {self.VERSION}, "since": {self._since!r}, "changes": [\n[]'
        with open(os.open(temporary, flags, 0o600), "wb", buffering=CHUNK_BYTES) as file:
            file.write(head.encode())
            for record in records:
                file.write(f",\n[{encode_record(record)}]".encode("utf-8", "backslashreplace"))
            file.write(b"\n")
            end = file.tell()
            file.write(STATE_END)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.state_file)
        sync_folder(self.folder)
        self._first_end = self._end = end
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

ARCHIVE_ENTRIES = 10_000
ARCHIVE_BYTES = 1024 * MIB  # as it comes out
NAME_BYTES = 200  # a file name has at most 255, and others are made of a project's name
# Every file of code gets this time when it is unpacked. A crawl shares these files by hard links,
# and after an in-place write the time is another, whatever the system clock has done meanwhile.
CODE_STAMP_NS = 1_600_000_000 * 10**9
CODE_SUFFIXES = (".py", ".pyc")
ENVIRONMENT_SECONDS = 0.005  # a process in the middle of exec shows no environment for less
STUBBORN_SECONDS = 5.0  # after SIGKILL, until a process that still runs is given up
LEFT_SECONDS = 0.02  # between looks at whether what a crawl left behind has ended
SECRETS = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_", "CREDENTIALS_DIRECTORY", "SCRAPY_DO_HANDOVER")


class Layout(NamedTuple):
    """The result of unpacking: what `scrapy.cfg` says of the project."""

    name: str
    folder: str
    settings: str


def unpack(archive: Path, folder: Path) -> Layout:
    """Unpack a pushed archive into a new folder and return what its `scrapy.cfg` says.

    Raise BadRequest or TooLarge with the reason if it is no project; the folder may then exist.
    """
    import zipfile

    folder.mkdir(mode=0o700)
    try:
        with zipfile.ZipFile(archive) as bundle:
            entries = bundle.infolist()
            if len(entries) > ARCHIVE_ENTRIES:
                raise TooLarge(f"the archive has over {ARCHIVE_ENTRIES} entries; zip less")
            budget = ARCHIVE_BYTES
            for entry in entries:
                budget -= extract(bundle, entry, folder, budget)
    except ScrapyDoError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE):
            raise StorageError(f"the archive cannot be unpacked: {error.strerror}") from None
        why = str(error).replace(f"{folder}/", "")
        raise BadRequest(f"the archive cannot be unpacked: {why:.300}; zip it anew") from None
    except Exception as error:  # a damaged file makes zipfile raise nearly anything
        raise BadRequest(explain_archive(archive, error)) from None
    names = {entry.filename.replace("\\", "/") for entry in entries}
    return read_layout(folder, [name for name in names if name.split("/")[-1] == "scrapy.cfg"])


def extract(bundle: Any, entry: Any, folder: Path, budget: int) -> int:
    """Write a zip entry below a folder and return its size. Raise TooLarge past `budget` bytes."""
    name = entry.filename.replace("\\", "/")  # as some programs of Windows write it
    kind, mode = stat.S_IFMT(entry.external_attr >> 16), (entry.external_attr >> 16) & 0o777
    if kind == stat.S_IFLNK:
        advice = "zip without 'zip --symlinks', or 'git archive' after replacing the link by a copy"
        raise BadRequest(f"the archive holds a link, {quoted(name)}: {advice}")
    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
        raise BadRequest(f"the archive holds {quoted(name)}, a path out of its folder")
    path = folder / name
    if name.endswith("/"):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode | stat.S_IRWXU if mode else 0o755)
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with bundle.open(entry) as source, open(path, "xb") as target:
        while chunk := source.read(MIB):
            size += len(chunk)
            if size > budget:
                raise TooLarge(f"the archive unpacks to more than {ARCHIVE_BYTES // MIB} MiB")
            target.write(chunk)
    path.chmod(mode | stat.S_IRUSR | stat.S_IWUSR if mode else 0o644)
    if name.endswith(CODE_SUFFIXES):
        os.utime(path, ns=(CODE_STAMP_NS, CODE_STAMP_NS))
    return size


def explain_archive(archive: Path, error: Exception) -> str:
    """Return why an archive is not a zip, by the first bytes of the file."""
    with open(archive, "rb") as file:
        start = file.read(262)
    good = "curl -sS .../push-project.json -F archive=@demo.zip"
    if start.startswith(b"PK"):
        return f"the zip file is damaged: {error!s:.200}; zip it anew"
    if len(start) < 200 and start.isascii():
        text = quoted(start.decode())
        return f"the archive is the text {text}; curl sends a file only with @, as in {good}"
    known = {
        b"\x1f\x8b": "a gzip file (tar.gz?)", b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file",
        b"7z\xbc\xaf": "a 7z file", b"Rar!": "a rar file",
    }  # fmt: skip
    kinds = [kind for magic, kind in known.items() if start.startswith(magic)]
    what = kinds[0] if kinds else "a tar file" if start[257:] == b"ustar" else "not a zip file"
    return f"the archive is {what}; make a zip, 'git archive -o demo.zip HEAD', and {good}"


def read_layout(folder: Path, found: Sequence[str]) -> Layout:
    """Read the one `scrapy.cfg` of an unpacked archive. Raise BadRequest if that fails."""
    import configparser

    if len(found) != 1:
        names = ", ".join(sorted(found)[:5])
        listed = f"several scrapy.cfg: {names:.300}" if found else "no scrapy.cfg"
        raise BadRequest(f"the archive has {listed}; zip the folder of one project, with its own")
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read_string((folder / found[0]).read_text(encoding="utf-8-sig"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise BadRequest(f"scrapy.cfg cannot be read: {error!s:.500}") from None
    name = deploy_name(config)
    default = config.get("settings", "default", fallback="")
    settings = config.get("settings", name, fallback=default).strip()
    where = str(Path(found[0]).parent)
    return Layout(name, "" if where == "." else where, settings)


def deploy_name(config: Any) -> str:
    """Return the project's name by [deploy], or by the sections [deploy:TARGET] if they agree."""
    sections = [name for name in config.sections() if name.startswith("deploy:")]
    names = {config.get(name, "project", fallback="").strip() for name in sections} - {""}
    if config.get("deploy", "project", fallback="").strip():
        names = {config.get("deploy", "project").strip()}
    if not names:
        raise BadRequest("scrapy.cfg does not name the project; add [deploy] with 'project = NAME'")
    if len(names) > 1:
        listed = " and ".join(sorted(map(quoted, names)))
        raise BadRequest(f"[deploy:...] of scrapy.cfg name {listed}; add [deploy] with one of them")
    name: str = names.pop()
    if not NAME_PATTERN.fullmatch(name) or len(name.encode()) > NAME_BYTES:
        rules = "use letters, digits, '_', '-' and '.', at most 100, the first not '.' or '-'"
        raise BadRequest(f"the project cannot be called {quoted(name)}: {rules}")
    return name


def copy_tree(source: str, target: str) -> bool:
    """Make a working copy; False when a crawl has written into the code in place.

    Code is hard links, which take a tenth of the time of copies; crawls rarely write to it.
    """
    import shutil

    os.mkdir(target)
    is_clean = True
    with os.scandir(source) as entries:
        for entry in entries:
            path = os.path.join(target, entry.name)
            if entry.is_dir(follow_symlinks=False):
                is_clean = copy_tree(entry.path, path) and is_clean
            elif entry.name.endswith(CODE_SUFFIXES):
                is_clean = entry.stat().st_mtime_ns == CODE_STAMP_NS and is_clean
                link_or_copy(entry.path, path)
            else:
                shutil.copy2(entry.path, path)
    shutil.copymode(source, target)
    return is_clean


def link_or_copy(source: str, target: str) -> None:
    """Make a hard link, or a copy on a file system without links or with too many of them."""
    import shutil

    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def keep_bytecode(source: Path, target: Path, is_stamped: bool = False) -> None:
    """Move compiled modules to where crawls get them, so that no crawl compiles them again.

    With `is_stamped` only those which no crawl has changed.
    """
    for path in source.rglob("__pycache__/*.pyc"):
        kept = target / path.relative_to(source)
        is_good = path.lstat().st_mtime_ns == CODE_STAMP_NS or not is_stamped
        if is_good and stat.S_ISREG(path.lstat().st_mode) and kept.parent.parent.is_dir():
            kept.parent.mkdir(exist_ok=True)
            os.replace(path, kept)
            os.utime(kept, ns=(CODE_STAMP_NS, CODE_STAMP_NS))


class Crawl:
    """A command that has a slot, with all that descends from it: a crawl, or `scrapy list`.

    Whatever it leaves behind becomes a child of the daemon, a "child subreaper", see prctl(2). It
    is known by its session or by SCRAPY_JOB in its environment.
    """

    def __init__(self, identifier: str, pid: int = 0):
        self.identifier = identifier
        self.pid = pid  # 0 until it is started
        self.began = time.monotonic()
        self.kill_at = float("inf")  # by time.monotonic, once it has been asked to end
        self.was_killed = False  # it took SIGKILL to end it
        self.is_over = threading.Event()  # it is gone, with its last status saved
        self._is_reaped = False  # its number may be another process's
        self._reaping = threading.Lock()  # for that, since an alarm kills without Daemon.lock
        self._alarm: threading.Timer | None = None

    def start(
        self, command: Sequence[str], folder: Path, environment: dict[str, str],
        logs: Sequence[Path],
    ) -> None:  # fmt: skip
        """Start the command; Daemon.lock is held. Raise ScrapyDoError when that fails."""
        # Opened to append, so that a log which somebody truncates does not get filled with NUL.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with contextlib.ExitStack() as stack:
                out, err = (
                    stack.enter_context(open(os.open(path, flags, 0o600), "wb")) for path in logs
                )
                process = subprocess.Popen(
                    [word.encode() for word in command],  # UTF-8, whatever the daemon's locale
                    cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    start_new_session=True,
                )  # fmt: skip
        except (OSError, ValueError) as error:
            raise explain_start(command[0], error) from None
        process.returncode = 0  # so that Popen leaves it to `reap`
        self.pid, self.began = process.pid, time.monotonic()

    def set_alarm(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Have a function called after some seconds, in place of an earlier one."""
        self.stop_alarm()
        self._alarm = threading.Timer(seconds, function, args)
        self._alarm.daemon = True
        self._alarm.start()

    def stop_alarm(self) -> None:
        """Forget the function that is to be called."""
        if self._alarm:
            self._alarm.cancel()

    def has_ended(self) -> bool:
        """Tell whether the command has ended; it is not reaped yet."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def wait(self) -> None:
        """Wait until the command has ended. While it is not reaped, its number stays its own."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def ask(self, kill_after: float) -> None:
        """Send SIGTERM, once: a second one tells Scrapy to drop its feeds. Daemon.lock is held."""
        os.kill(self.pid, signal.SIGTERM)
        self.kill_later(kill_after)

    def kill_later(self, seconds: float) -> None:
        """Kill the command after some seconds; `end_rest` then kills all that it leaves."""
        self.kill_at = time.monotonic() + seconds
        self.set_alarm(seconds, self.kill)

    def kill(self) -> None:
        """Kill the command."""
        self.kill_at, self.was_killed = time.monotonic(), True
        with self._reaping:
            if not self._is_reaped:
                os.kill(self.pid, signal.SIGKILL)

    def end_rest(self, kill_after: float) -> None:
        """End what the command left behind: SIGTERM once, SIGKILL after as many seconds.

        The seconds count from when the command was asked to end, if it was.
        """
        kill_at = min(self.kill_at, time.monotonic() + kill_after)
        asked: set[int] = set()
        while rest := find_family(self.pid, self.identifier):
            is_late = time.monotonic() >= kill_at
            self.was_killed = self.was_killed or is_late
            if time.monotonic() >= kill_at + STUBBORN_SECONDS:  # of another user, say by sudo
                log(f"job {self.identifier} left processes that cannot be killed: {rest}")
                return
            for process in rest:
                if is_late or process.pid not in asked:
                    asked.add(process.pid)
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(signal.SIGKILL if is_late else signal.SIGTERM)
            psutil.wait_procs(rest, LEFT_SECONDS)

    def reap(self) -> int:
        """Return the exit code of the command, -N for signal N. Daemon.lock is held."""
        self.stop_alarm()
        with self._reaping:
            self._is_reaped = True
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def explain_start(command: str, error: Exception) -> ScrapyDoError:
    """Return why a command was not started, and what to do."""
    problem = f"'{command}' cannot be started: {getattr(error, 'strerror', None) or error}"
    if not isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
        return StorageError(problem)
    home = Path(command).parent.parent
    advice = "install Scrapy, or say where it is by --scrapy"
    if Path(command).parent.name == "bin":
        advice = f"python3 -m venv {home} && {home}/bin/python -m pip install scrapy"
    return BadRequest(f"{problem}; {advice}")


def outer_environment() -> dict[str, str]:
    """Return the environment of the daemon without what is for the daemon alone."""
    return {k: v for k, v in os.environ.items() if not k.startswith(SECRETS)}


def crawl_arguments(job: Job) -> list[str]:
    """Return the words after `scrapy` of a crawl. A project's LOG_FILE would hide its log."""
    payload = [f"payload={job.payload}"] if job.payload != "{}" else []
    options = [("-a", text) for text in (*payload, *job.arg)]
    options += [("-s", text) for text in ("LOG_FILE=", *job.setting)]
    return ["crawl", job.spider, *itertools.chain(*options)]


def read_report(path: Path, output: str, work: Path) -> dict[str, Any]:
    """Return the spiders of a project and Scrapy's warnings, by the shim's report.

    A launcher that drops our environment has no report; then each line of its output is a spider.
    Raise BadRequest for a project without spiders, or with a name that no command line can have.
    """
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        report = {"spiders": output.splitlines(), "warnings": []}
    spiders = sorted({str(name).strip() for name in report["spiders"]} - {""})
    warnings = [brief(str(text), work) for text in report["warnings"]]
    if not spiders:
        why = warnings[0] if warnings else "check SPIDER_MODULES in its settings"
        raise BadRequest(f"the project has no spiders; {why}")
    for name in spiders:
        if name.startswith("-") or not name.isprintable():
            raise BadRequest(f"Scrapy cannot run a spider called {quoted(name)}; rename it")
    return {"spiders": spiders, "warnings": warnings}


def brief(warning: str, work: Path) -> str:
    """Return a warning as a line, without tracebacks and the private folder of `scrapy list`."""
    text = re.sub(r"(?m)^Traceback \(most recent call last\):\n(?: .*\n)*", "", warning)
    text = text.replace("See above traceback for details.", "").replace(f"{work}/", "")
    return " ".join(text.split())[:500]


def read_stats(path: Path) -> dict[str, Any] | None:
    """Return what Scrapy counted in a crawl, by the shim's report; None when there is none."""
    try:
        stats = json.loads(path.read_bytes())
        return {
            "items": int(stats["item_scraped_count"]),
            "responses": int(stats["response_received_count"]),
            "errors": stats["log_count/ERROR"],
            "finish_reason": str(stats["finish_reason"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def explain_list_error(command: Sequence[str], errors: str, work: Path) -> str:
    """Return why `scrapy list` failed: the exception, its cure, then the project's own frames.

    `work` is the private folder in which it ran, with requirements.txt if the project has that.
    """
    lines = [line for line in errors.replace(f"{work}/", "").splitlines() if line.strip()]
    starts = [n for n, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
    frames: list[str] = []
    rest: list[str] = []
    for line in lines[starts[-1] + 1 :] if starts else ():  # the last traceback ended the program
        if line.startswith("  File "):
            frames.append(line.strip())
        elif not line.startswith("   ") or rest:
            rest.append(line)
    own = [frame for frame in frames if not frame.startswith(('File "/', 'File "<'))]
    cure = missing_module_cure(command, errors, work)
    if cure and rest and not own:  # pip may have a stranger's package of that name
        cure = ["scrapy.cfg or a setting names it; put it into the archive, or install it"]
    why = [*(rest[:8] or lines[-8:]), *cure, *own[-8:]]
    return "'scrapy list' failed in the project: " + "\n".join(why)


def missing_module_cure(command: Sequence[str], errors: str, work: Path) -> list[str]:
    """Return the command that installs a module which `scrapy list` missed, in a list, or []."""
    found = re.findall(r"No module named '?([\w.]+)'?", errors)
    name = found[-1].split(".")[0] if found else ""
    if not name or (work / name).exists() or (work / f"{name}.py").exists():
        return []  # or a package of a stranger would be advised in place of the project's own
    sibling, program = os.path.join(os.path.dirname(command[0]), "python"), Path(command[0]).name
    python = command[0] if program.startswith("python") else sibling
    pip = f"{python} -m pip" if program.startswith(("python", "scrapy")) else "pip"
    has_list = name != "scrapy" and (work / "requirements.txt").exists()
    return [f"install what is missing: {pip} install {'-r requirements.txt' if has_list else name}"]


def sync_upload(path: Path) -> None:
    """Make an uploaded archive durable, name and all."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def child_pids(pid: int) -> list[int]:
    """Return the children of a process: Linux lists them by thread, see proc_pid_task(5)."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                    found += map(int, file.readall().split())
    return found


HAS_CHILD_LISTS = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def descendants() -> list[psutil.Process]:
    """Return all processes below this one, without a look at any others where Linux can do so."""
    if not HAS_CHILD_LISTS:
        return psutil.Process().children(recursive=True)
    found, todo = [], child_pids(os.getpid())
    while todo:
        pid = todo.pop()
        todo += child_pids(pid)
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(pid))
    return found


def find_family(leader: int, identifier: str) -> list[psutil.Process]:
    """Return the living processes that belong to a crawl, but for its leader.

    When no file descriptor is left to look at them, wait until there is: none may be overlooked.
    """
    mark = f"SCRAPY_JOB={identifier}".encode()
    while True:
        try:
            return [p for p in descendants() if p.pid != leader and belongs(p, leader, mark)]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            time.sleep(SPARE_SECONDS)


def belongs(process: psutil.Process, leader: int, mark: bytes) -> bool:
    """Tell whether a living process is of a crawl: by its session or its environment."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if os.getsid(process.pid) == leader or mark in read_environment(process.pid):
            return True
        parent = process.parent()  # of a process with an environment of its own
        return parent is not None and parent.pid != os.getpid() and belongs(parent, leader, mark)
    except (psutil.Error, ProcessLookupError, FileNotFoundError, PermissionError):
        return False


def read_environment(pid: int) -> list[bytes]:
    """Return the environment that a process was started with. Raise OSError when it is hidden."""
    for _ in range(2):
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            if environment := file.readall():
                return environment.split(b"\0")
        time.sleep(ENVIRONMENT_SECONDS)
    return []


def is_stray(pid: int, folder: bytes, marks: Collection[bytes]) -> bool:
    """Tell whether a process has a folder in its environment, and none of the marks."""
    with contextlib.suppress(OSError):
        # Threads of the kernel are in no session; they have no environment, however long we wait.
        environment = read_environment(pid) if os.getsid(pid) else []
        return folder in environment and not set(marks).intersection(environment)
    return False


def end_strays(spider_data: Path, kept: Collection[str]) -> None:
    """Kill what a daemon that died left running, but for these jobs: it is known by our folder."""
    folder = f"SPIDER_DATA_DIR={spider_data}".encode()
    marks = {f"SCRAPY_JOB={identifier}".encode() for identifier in kept}
    for _ in range(20):  # a process may fork while its parent is being killed
        strays = [p for p in psutil.process_iter() if is_stray(p.pid, folder, marks)]
        if not strays:
            return
        for process in strays:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(strays, timeout=0.5)
    log(f"these processes cannot be killed: {', '.join(str(p.pid) for p in strays)}")


# ---- 6. Daemon -------------------------------------------------------------------------------

RETRY_SECONDS = 2.0  # between attempts to save what the disk did not take
LOOK_SECONDS = 60.0  # a wait does not notice that the system clock was set
DUE_COUNT = 500  # schedules that fire in one change, so that requests are served in between
STALE_COUNT = 1000  # entries of a heap that may be out of date before it is made anew
COPY_COUNT = 20  # attempts to copy code that pushes and other crawls replace meanwhile
ARGUMENT_BYTES = 100 * 1024  # payload, args and settings together; Linux takes 128 KiB for one
DESCRIPTION_CHARACTERS = 10_000
NOTICE_SECONDS = 60.0  # that the command of --on-finish may take
BY_USER = "canceled by the user"
KILLED = "it had to be killed, so its feeds may be cut off; see --kill-after"


class Settings(NamedTuple):
    """The options that the daemon needs. Times are seconds; 0 is no limit."""

    scrapy: Strings = (sys.executable, "-m", "scrapy")
    job_slots: int = 3
    project_slots: int = 0
    spider_slots: int = 0
    completed_cap: int = 500
    keep_days: int = 0
    keep_mib: int = 0
    kill_after: float = 30.0
    job_timeout: float = 0.0  # of jobs that have none of their own
    list_timeout: float = 60.0
    on_finish: Strings = ()


class Slots:
    """Say which PENDING job may start: by priority, then in their order, within all limits.

    A job that may not start because of a limit is parked there, and looked at again when a slot
    below that limit comes free; so nobody goes through all who wait. Daemon.lock guards it.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._numbers = itertools.count()
        self._waiting: set[str] = set()  # identifiers; entries of others are stale
        self._ready: list[tuple[int, int, Job]] = []  # a heap
        self._parked: dict[Any, list[tuple[int, int, Job]]] = {}  # such heaps by limit
        self._taken = Counter[Any]()  # slots by limit

    def _limits(self, job: Job) -> dict[Any, int]:
        """Return the limits that a job counts for; runs of one schedule never overlap."""
        limits: dict[Any, int] = {("all",): self._settings.job_slots}
        if job.scheduled_by:
            limits["run", job.scheduled_by] = 1
        if self._settings.spider_slots:
            limits["spider", job.project, job.spider] = self._settings.spider_slots
        if self._settings.project_slots:
            limits["project", job.project] = self._settings.project_slots
        return limits

    def put(self, job: Job) -> None:
        """Have a job wait for a slot."""
        self._waiting.add(job.identifier)
        heapq.heappush(self._ready, (-job.priority, next(self._numbers), job))

    def drop(self, job: Job) -> None:
        """Have a job wait no more, if it did."""
        if job.identifier in self._waiting:
            self._waiting.remove(job.identifier)
            self._unpark(job)

    def take(self, job: Job) -> None:
        """Give a slot to a job, whatever the limits are."""
        self._waiting.discard(job.identifier)
        self._taken.update(self._limits(job).keys())

    def free(self, job: Job) -> None:
        """Take the slot of a job back."""
        self._taken.subtract(self._limits(job).keys())
        self._taken += Counter()  # forgets those at 0
        self._unpark(job)

    def pop(self) -> Job | None:
        """Give a slot to the next job and return it; None when no job may start."""
        while self._ready:
            entry = heapq.heappop(self._ready)
            job = entry[2]
            if job.identifier not in self._waiting:
                continue
            limits = self._limits(job)
            full = next((key for key, most in limits.items() if self._taken[key] >= most), None)
            if full is None:
                self.take(job)
                return job
            heapq.heappush(self._parked.setdefault(full, []), entry)
            self._unpark(job, full)  # the job may have been looked at in place of others
        return None

    def _unpark(self, job: Job, but: Any = None) -> None:
        """Look again at the first job that waits for each limit of this job."""
        for key in self._limits(job):
            heap = self._parked.get(key, []) if key != but else []
            while heap:
                entry = heapq.heappop(heap)
                if entry[2].identifier in self._waiting:
                    heapq.heappush(self._ready, entry)
                    break
            if key in self._parked and not self._parked[key]:
                del self._parked[key]


class Daemon:
    """Keep projects and jobs, and run the crawls: all that the API can ask for.

    Methods without an underscore are for callers in any thread. They return from a change when it
    is on the disk, and raise a ScrapyDoError when it is refused; then nothing has changed. Methods
    that want `lock` to be held say so.
    """

    def __init__(self, store: Store, settings: Settings):
        self.store, self.settings = store, settings
        # Held by whoever changes anything below, or starts or reaps a child. Readers do without:
        # list(dictionary) is one step of the interpreter, and records never change.
        self.lock = threading.Lock()
        self.projects: dict[str, Project] = {}  # by name
        self.jobs: dict[str, Job] = {}  # by identifier, in the order in which they were made
        self.is_closing = False
        self._by_status: dict[Status, dict[str, None]] = {status: {} for status in Status}
        self._slots = Slots(settings)
        self._crawls: dict[str, Crawl] = {}  # of each job that has a slot
        self._listings: dict[str, Crawl] = {}  # each `scrapy list` of a push
        self._is_hooking = False  # the command of --on-finish runs, which is not ours to reap
        self._due: list[tuple[float, str]] = []  # heap of schedules; entries may be stale
        self._finished: dict[str, int] = {}  # bytes of the logs of finished jobs, the oldest first
        self._twins = Counter[int]()  # schedules by a hash of all that was asked for
        self._counts = Counter[str]()  # since the start, for status.json
        self._wake = threading.Event()  # the timer is to look again
        self._notices: queue.SimpleQueue[Job] = queue.SimpleQueue()  # jobs to tell --on-finish of
        self._threads: list[threading.Thread] = []
        self._began = time.monotonic()
        self._lead = time.time() - self._began  # of the system clock, to notice that it was set
        self._cpu_mark = time.process_time(), self._began  # at the last status

    # Start and stop

    def start(self, is_reloaded: bool = False) -> None:
        """Load the state, take over or end what runs, and go to work.

        `is_reloaded` says that crawls of a former program in this process are our children. Raise
        StorageError for a state that cannot be read.
        """
        projects, jobs = self.store.load()
        running = [job for job in jobs.values() if job.status is Status.RUNNING]
        adopted = [job for job in running if is_reloaded and job.pid and is_child(job.pid)]
        kept = [job.identifier for job in adopted]
        if is_reloaded or running or self.store.was_crashed:
            end_strays(self.store.spider_data, kept)
        self.store.sweep([project.push for project in projects.values()], jobs, kept)
        self.store.write_shim()
        with self.lock:
            self.projects.update(projects)
            left = [job for job in jobs.values() if job.identifier not in kept]
            changed = list(filter(None, map(self._recover, left)))
            jobs.update({job.identifier: job for job in changed})
            for job in sorted(jobs.values(), key=end_instant):
                self._apply(job)
            self.jobs = jobs  # in their own order
            self._counts.clear()
            for job in changed:
                log(describe(job))
            self.save(*changed, is_fact=True)
            if not self.store.state_file.exists():  # from now on leftovers are known to be ours
                with contextlib.suppress(OSError):
                    self.store.rewrite(self._records())
            for job in adopted:
                self._adopt(job)
            self.dispatch()
        self._start_thread(self._run_timer, name="timer")
        if self.settings.on_finish:
            threading.Thread(target=self._run_hooks, name="on-finish", daemon=True).start()

    def _start_thread(self, function: Callable[..., None], *args: Any, name: str) -> None:
        thread = threading.Thread(target=function, args=args, name=name, daemon=True)
        thread.start()
        self._threads = [thread, *(other for other in self._threads if other.is_alive())]

    def _recover(self, job: Job) -> Job | None:
        """Return what becomes of a job after a stop or crash; None leaves it as it is."""
        if job.status not in ACTIVE:
            return None
        try:
            if job.project not in self.projects:
                raise NotFound(f"there is no project {quoted(job.project)} any more")
            if job.status is Status.RUNNING:
                return self._ended(job, None, False)
            return self._within_reach(job) if job.status is Status.SCHEDULED else None
        except ScrapyDoError as error:
            return self._finish(job, Status.FAILED, str(error))

    def _within_reach(self, job: Job) -> Job | None:
        """Return a schedule with a new due time if its own is further away than any can be.

        That is so when the system clock was set back. None means that all is well.
        """
        now, recurrence = time.time(), job.recurrence()
        if now < SANE_INSTANT or (job.due is not None and job.due <= recurrence.latest_after(now)):
            return None
        return job._replace(due=recurrence.next_after(now))

    def _adopt(self, job: Job) -> None:
        """Take over a crawl that the former program in this process started. `lock` is held."""
        now = time.time()
        crawl = self._crawls[job.identifier] = Crawl(job.identifier, job.pid or 0)
        self._slots.take(job)
        crawl.began -= max(0.0, now - (job.started or now))
        if job.ending:
            waited = max(0.0, now - (job.ending_since or now))
            crawl.kill_later(max(0.0, self.settings.kill_after - waited))
        else:
            self._set_timeout(job, crawl)
        self._counts["jobs-run"] += 1
        name = f"crawl-{job.identifier}"
        self._start_thread(self._see_to_end, job, crawl, None, name=name)

    def close(self) -> None:
        """End all crawls, whose jobs become PENDING again, save the state, and end all threads."""
        with self.lock:
            self.is_closing = True
            self._end([self.jobs[key] for key, crawl in self._crawls.items() if crawl.pid], "stop")
            for listing in self._listings.values():
                listing.kill()
        self._wake.set()
        for thread in self._threads:
            thread.join()
        with self.lock, contextlib.suppress(OSError):
            self.store.rewrite(self._records())

    # Changes

    def save(self, *records: Record, is_fact: bool = False) -> None:
        """Put records on the disk, then where readers see them. `lock` is held.

        A fact has happened already: what the disk does not take is written when it does. Raise
        StorageError for anything else, and then nothing has changed.
        """
        was_behind = self.store.is_behind
        try:
            while (records or was_behind) and not self.store.append(records):
                self.store.rewrite(self._records())  # without the change, which may be refused yet
        except OSError as error:
            self.store.is_behind = True  # a write without its fsync may still reach the disk
            message = f"{self.store.state_file} cannot be written: {error.strerror}"
            if not was_behind:
                log(f"{message}; changes are refused until that is mended")
                self._wake.set()  # the timer tries again
            if not is_fact:
                raise StorageError(f"not saved: {message}; mend that and ask again") from None
        if was_behind and not self.store.is_behind:
            log(f"{self.store.state_file} can be written again")
        for record in records:
            former = self.jobs.get(record.identifier) if isinstance(record, Job) else None
            if isinstance(record, Job) and (former is None or former.status is not record.status):
                log(describe(record))
            self._apply(record)

    def _records(self) -> list[Record]:
        """Return all records."""
        return [*self.projects.values(), *self.jobs.values()]

    def _apply(self, record: Record) -> None:
        """Put a record where readers see it, and a job where the timer or a slot finds it."""
        job = record if isinstance(record, Job) else None
        former = None if isinstance(record, Project) else self.jobs.get(record[0])
        apply_record(record, self.projects, self.jobs)
        is_moved = former is None or job is None or job.status is not former.status
        if former is not None and is_moved:
            self._leave(former)
        if job is not None and is_moved:
            self._enter(job, former)
        if job is not None and job.due is not None:
            heapq.heappush(self._due, (job.due, job.identifier))
            if self._due[0][1] == job.identifier:
                self._wake.set()

    def _leave(self, job: Job) -> None:
        """Take a job away from where its status had put it."""
        self._by_status[job.status].pop(job.identifier, None)
        self._finished.pop(job.identifier, None)
        if job.status is Status.PENDING:
            self._slots.drop(job)
        elif job.status is Status.SCHEDULED:
            self._twins[twin_hash(job)] -= 1
            if not self._twins[twin_hash(job)]:
                del self._twins[twin_hash(job)]

    def _enter(self, job: Job, former: Job | None) -> None:
        """Put a job where its status belongs."""
        self._by_status[job.status][job.identifier] = None
        if job.status is Status.PENDING:
            self._slots.put(job)
        elif job.status is Status.SCHEDULED:
            self._twins[twin_hash(job)] += 1
        elif job.status is Status.RUNNING:
            self._counts["jobs-run"] += 1
        else:
            self._finished[job.identifier] = self.store.log_bytes(job.identifier)
            if former is not None and former.status is Status.RUNNING:
                self._counts[f"jobs-{job.status.value.lower()}"] += 1
            if job.notice and self.settings.on_finish:
                self._notices.put(job)

    def _surplus(self, coming: int = 0) -> list[Gone]:
        """Return the finished jobs to forget: too many, too old, or with too long logs.

        `coming` more are about to be finished. The newest job stays, however long its logs are.
        """
        settings, count = self.settings, len(self._finished) + coming
        oldest = time.time() - settings.keep_days * DAY_SECONDS if settings.keep_days else 0.0
        most = settings.keep_mib * MIB
        size = sum(self._finished.values()) if most else 0
        gone = []
        for identifier, length in self._finished.items():
            is_long = 0 < most < size and count > 1
            is_old = self.jobs[identifier].timestamp < oldest
            if not (is_long or is_old or count > settings.completed_cap):
                break
            gone.append(Gone(identifier))
            count, size = count - 1, size - length
        return gone

    def _purge(self) -> None:
        """Forget finished jobs, with their logs. `lock` is held."""
        if gone := self._surplus():
            with contextlib.suppress(StorageError):
                self._save_end(*gone)

    def _save_end(self, *records: Record, is_fact: bool = False) -> None:
        """Save ends of jobs, and forget the oldest with their logs. `lock` is held."""
        ends = sum(isinstance(record, Job) for record in records)
        gone = self._surplus(ends)
        self.save(*records, *gone, is_fact=is_fact)
        for record in gone:
            self.store.delete_logs(record.identifier)

    # Projects

    def new_upload(self) -> Path:
        """Return where an archive may be written that is to be pushed."""
        return self.store.projects / f"{new_identifier()}.zip"

    def clear_upload(self, upload: Path) -> None:
        """Delete an upload that has not become the archive of a project."""
        if all(project.push != upload.stem for project in list(self.projects.values())):
            remove_tree(upload)

    def push(self, upload: Path) -> dict[str, Any]:
        """Check an archive, and make it a project or a project's new code.

        Return its name, its spiders, and what Scrapy warned of. The upload is kept or deleted.
        """
        tree = upload.with_suffix("")
        try:
            layout = unpack(upload, tree)
            found = self._list(tree, layout)
            project = Project(layout.name, upload.stem, *layout[1:], tuple(found["spiders"]))
            sync_upload(upload)
            with self.lock:
                self._check_spiders_stay(project)
                former = self.projects.get(project.name)
                self.save(project)
        except BaseException as error:
            remove_tree(upload)
            remove_tree(tree)
            if isinstance(error, OSError):
                raise StorageError(f"the push failed: {error}; mend that and push again") from None
            raise
        log(f"project {project.name} was pushed with {len(project.spiders)} spiders")
        for warning in found["warnings"]:
            log(f"project {project.name}: Scrapy warns: {warning}")
        self._discard(former)
        return {"name": project.name, **found}

    def _check_spiders_stay(self, project: Project) -> None:
        stranded = [j for j in self._active(project.name) if j.spider not in project.spiders]
        if stranded:
            names = name_jobs(stranded)
            raise Conflict(f"the new code lacks spiders of active jobs; cancel them first: {names}")

    def _active(self, project: str, spider: str | None = None) -> list[Job]:
        keys = [key for status in ACTIVE for key in list(self._by_status[status])]
        jobs = [self.jobs[key] for key in keys]
        return [job for job in jobs if job.project == project and spider in (None, job.spider)]

    def _discard(self, project: Project | None) -> None:
        """Delete the archive and the code of a project that no record names any more."""
        if project is not None:
            remove_tree(self.store.archive(project))
            remove_tree(self.store.tree(project))

    def remove(self, name: str) -> dict[str, Any]:
        """Forget a project and its archive. Raise Conflict while it has active jobs."""
        with self.lock:
            project = self.find_project(name)
            if active := self._active(name):
                advice = f"cancel-job.json with project={name} cancels all"
                raise Conflict(f"{quoted(name)} has active jobs, {advice}: {name_jobs(active)}")
            self.save(Gone("", name))
        log(f"project {name} was removed")
        self._discard(project)
        return {}

    def find_project(self, name: str) -> Project:
        """Return a project. Raise NotFound when there is none of that name."""
        project = self.projects.get(name)
        if project is not None:
            return project
        bare = name.strip("'\"")
        if bare in self.projects:
            raise NotFound(f"the project's name is sent with quotes; write -F project={bare}")
        near = closest(name, list(self.projects))
        advice = f"did you mean {near}?" if near else "list-projects.json shows those there are"
        raise NotFound(f"there is no project {quoted(name)}; {advice}")

    def list_projects(self) -> dict[str, Any]:
        """Return the names of the projects, sorted."""
        return {"projects": sorted(self.projects)}

    def list_spiders(self, project: str) -> dict[str, Any]:
        """Return a project's name and its spiders, sorted."""
        return {"project": project, "spiders": self.find_project(project).spiders}

    def _list(self, tree: Path, layout: Layout) -> dict[str, Any]:
        """Ask Scrapy for the spiders of an unpacked project, and what it warns of.

        Raise BadRequest with the reason when that fails. What was compiled is kept in the tree.
        """
        listing = Crawl(new_identifier())
        work = self.store.work / listing.identifier
        logs = [self.store.work / f"{listing.identifier}.{stream}" for stream in ("out", "err")]
        report = self.store.work / f"{listing.identifier}.json"
        command = [*self._scrapy(layout.name), "list", "-s", "LOG_FILE=", "-s", "LOG_STDOUT=0"]
        environment = self._environment(listing.identifier, layout, work, report)
        try:
            copy_tree(str(tree), str(work))
            with self.lock:
                listing.start(command, work / layout.folder, environment, logs)
                self._listings[listing.identifier] = listing
                listing.set_alarm(self.settings.list_timeout, listing.kill)
            listing.wait()
            is_late = listing.was_killed
            listing.end_rest(0.0)
            with self.lock:
                del self._listings[listing.identifier]
                exit_code = listing.reap()
            output, errors = (path.read_text("utf-8", "replace") for path in logs)
            if self.is_closing:
                raise Unavailable("the daemon is stopping; push again when it has been started")
            if is_late:
                limit = f"{self.settings.list_timeout:g} s"
                raise BadRequest(f"'scrapy list' did not end within {limit}; see --list-timeout")
            if exit_code != 0:
                why = explain_list_error(command, errors or output, work / layout.folder)
                raise BadRequest(why)
            found = read_report(report, output, work / layout.folder)
            keep_bytecode(work, tree)
        finally:
            for path in (work, report, *logs):
                remove_tree(path)
        return found

    # Jobs

    def schedule(
        self, project: str, spider: Sequence[str], when: str, description: str = "",
        payload: str = "{}", timeout: str | None = None, priority: str = "0", items: str = "0",
        arg: Sequence[str] = (), setting: Sequence[str] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """Make a job for each spider, `*` is all, and return their identifiers and next run.

        `payload` is the text of a JSON object, `arg` and `setting` hold NAME=VALUE, `timeout` is
        the text of a number of seconds; None leaves it to --job-timeout.
        """
        recurrence = parse_spec(when)
        check_arguments(description, payload, arg, setting)
        now = time.time()
        if recurrence is not None and now < SANE_INSTANT:
            raise Unavailable(f"the system clock shows {local_time(now)}; set it, and ask again")
        job = Job(
            "", Status.PENDING if recurrence is None else Status.SCHEDULED, "USER", when, project,
            "", now, now, description, payload, tuple(arg), tuple(setting),
            timeout=None if timeout is None else checked("timeout", parse_seconds, timeout, 0.001),
            priority=checked("priority", parse_whole, priority, -(10**6), 10**6),
            items=bool(checked("items", parse_whole, items, 0, 1)),
        )  # fmt: skip
        with self.lock:
            spiders = self._find_spiders(project, spider)
            jobs = [job._replace(identifier=new_identifier(), spider=name) for name in spiders]
            if recurrence is not None:
                jobs = [job._replace(due=job.recurrence().next_after(now)) for job in jobs]
            twins = [job.spider for job in jobs if recurrence and self._twins[twin_hash(job)]]
            self.save(*jobs)
            self.dispatch()
        first = jobs[0]
        answer: dict[str, Any] = {
            "identifier": first.identifier, "next_run": local_time(first.due)
        }  # fmt: skip
        if len(jobs) > 1:
            answer["identifiers"] = [job.identifier for job in jobs]
        if twins:
            answer["warnings"] = [f"the same schedule exists already for {', '.join(twins[:5])}"]
        return answer

    def _find_spiders(self, project: str, names: Sequence[str]) -> list[str]:
        """Return the spiders that names stand for. Raise NotFound for a name that is none."""
        known = self.find_project(project).spiders
        if "*" in names:
            return list(known)
        for name in dict.fromkeys(names):
            if name not in known:
                near = closest(name, known)
                advice = f"did you mean {near}? " if near else ""
                total = f"it has {len(known)}, see list-spiders.json?project={project}"
                raise NotFound(f"{project} has no spider {quoted(name)}; {advice}{total}")
        return list(dict.fromkeys(names))

    def find_job(self, identifier: str) -> Job:
        """Return a job. Raise NotFound when there is none of that identifier."""
        job = self.jobs.get(identifier)
        if job is not None:
            return job
        kept = f"--completed-cap ({self.settings.completed_cap}) newest finished jobs"
        advice = f"list-jobs.json?status=COMPLETED shows the {kept} that are kept"
        raise NotFound(f"there is no job {quoted(identifier)} (any more); {advice}")

    def list_jobs(
        self, statuses: Sequence[Status], project: str | None = None, spider: str | None = None,
        scheduled_by: str | None = None, limit: int | None = None,
    ) -> Json:  # fmt: skip
        """Return the jobs in these statuses, the newest change first; None leaves none out."""
        keys = [key for status in statuses for key in list(self._by_status[status])]
        jobs = [job for job in map(self.jobs.get, keys) if job is not None]
        wanted = {"project": project, "spider": spider, "scheduled_by": scheduled_by}
        for name, value in wanted.items():
            if value is not None:
                jobs = [job for job in jobs if getattr(job, name) == value]
        jobs.sort(key=lambda job: job.timestamp, reverse=True)
        return Json(f"[{', '.join(map(job_text, jobs[:limit]))}]")

    def cancel(self, identifier: str) -> dict[str, Any]:
        """Cancel a job, and return when its crawl is gone. Raise Conflict when it has ended."""
        with self.lock:
            job = self.find_job(identifier)
            crawl = self._crawls.get(identifier)
            is_late = job.status in COMPLETED
            if not is_late:
                self._cancel([job])
        if crawl and job.status is Status.RUNNING:
            crawl.is_over.wait()
            job = self.jobs.get(identifier, job)
            is_late = job.status in (Status.SUCCESSFUL, Status.FAILED)
        if is_late:
            raise Conflict(f"job {identifier} has ended already, it is {job.status.value}")
        return {}

    def cancel_all(self, project: str, spider: str | None) -> dict[str, Any]:
        """Cancel the active jobs of a project, or of one spider; return how many there were."""
        with self.lock:
            jobs = self._active(project, spider)
            if not jobs:
                self.find_project(project)
            crawls = [self._crawls[j.identifier] for j in jobs if j.status is Status.RUNNING]
            self._cancel(jobs)
        for crawl in crawls:
            crawl.is_over.wait()
        return {"canceled": len(jobs)}

    def _cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel active jobs; running crawls are asked to end. `lock` is held."""
        waiting = [job for job in jobs if job.status is not Status.RUNNING]
        if waiting:
            self._save_end(*(self._finish(job, Status.CANCELED, BY_USER) for job in waiting))
        self._end([job for job in jobs if job.status is Status.RUNNING], "cancel")

    def _end(self, jobs: Sequence[Job], why: str) -> None:
        """Note why running crawls are to end, and ask each to, once. `lock` is held.

        A crawl that has just ended by itself is left alone. A full disk does not keep one going.
        """
        jobs = [job for job in jobs if not self._crawls[job.identifier].has_ended()]
        noted = [job for job in jobs if not job.ending or why == "cancel"]
        now = time.time()
        changes = [j._replace(ending=why, ending_since=j.ending_since or now) for j in noted]
        self.save(*changes, is_fact=True)
        for job in jobs:
            if not job.ending:
                self._crawls[job.identifier].ask(self.settings.kill_after)

    def log_path(self, identifier: str, stream: str) -> Path:
        """Return the file with the output of a job, which may not exist yet."""
        if self.find_job(identifier).status is Status.SCHEDULED:
            runs = f"list-jobs.json?status=COMPLETED&scheduled_by={identifier}"
            raise NotFound(f"a schedule has no log, its runs have; {runs} lists them")
        return self.store.log_file(identifier, stream)

    def is_logging(self, identifier: str) -> bool:
        """Tell whether a job runs or waits to."""
        job = self.jobs.get(identifier)
        return job is not None and job.status in (Status.PENDING, Status.RUNNING)

    def status(self) -> dict[str, Any]:
        """Return what the daemon does now, and has done since it was started."""
        projects, now = list(self.projects.values()), time.monotonic()
        (cpu, instant), self._cpu_mark = self._cpu_mark, (time.process_time(), now)
        share = (self._cpu_mark[0] - cpu) / max(1e-6, now - instant)
        counted = ("jobs-run", "jobs-successful", "jobs-failed", "jobs-canceled", "runs-skipped")
        return {
            "memory-usage": memory_usage(int(10 * now)),
            "cpu-usage": round(100 * share, 1),
            "time": local_time(time.time()),
            "timezone": "; ".join(time.tzname),
            "hostname": socket.gethostname(),
            "uptime": describe_seconds(now - self._began),
            **{name: self._counts[name] for name in counted},
            **{f"jobs-{s.value.lower()}": len(self._by_status[s]) for s in ACTIVE},
            "projects": len(projects),
            "spiders": sum(len(project.spiders) for project in projects),
            "daemon-version": __version__,
        }

    # The timer

    def _run_timer(self) -> None:
        """Do the work of the timer's thread."""
        while not self.is_closing:
            seconds = RETRY_SECONDS
            try:
                with self.lock:
                    seconds = self._tick(time.time())
            except Exception:
                log_crash("the timer")
            self._wake.wait(seconds)
            self._wake.clear()

    def _tick(self, now: float) -> float:
        """Do what is due, and return after how many seconds to look again. `lock` is held."""
        if self.is_closing:
            return 0.0
        self._notice_clock(now)
        if now >= SANE_INSTANT:
            self._fire(self._pop_due(now), now)
        self.save(is_fact=True)  # of what the disk did not take, if anything
        self._purge()
        self._reap_orphans()
        self.dispatch()
        next_due = self._due[0][0] - now if self._due else LOOK_SECONDS
        most = RETRY_SECONDS if self.store.is_behind else LOOK_SECONDS
        return max(0.0, min(next_due, most)) if now >= SANE_INSTANT else most

    def _notice_clock(self, now: float) -> None:
        """Set due times anew that are too far away since the system clock was set back."""
        lead, self._lead = self._lead, now - time.monotonic()
        if lead - self._lead > 1.0:
            log("the system clock was set back; due times that are too far away are set again")
            jobs = [self.jobs[key] for key in self._by_status[Status.SCHEDULED]]
            self.save(*filter(None, map(self._recover, jobs)), is_fact=True)

    def _pop_due(self, now: float) -> list[Job]:
        """Return schedules that are due, though not too many at once."""
        if len(self._due) > STALE_COUNT + 2 * len(self._by_status[Status.SCHEDULED]):
            self._due = [entry for entry in self._due if self._is_live(entry)]
            heapq.heapify(self._due)
        due: dict[str, Job] = {}  # an entry may be there twice
        while self._due and self._due[0][0] <= now and len(due) < DUE_COUNT:
            entry = heapq.heappop(self._due)
            if self._is_live(entry):
                due[entry[1]] = self.jobs[entry[1]]
        return list(due.values())

    def _is_live(self, entry: tuple[float, str]) -> bool:
        job = self.jobs.get(entry[1])
        return job is not None and job.due == entry[0]

    def _fire(self, due: Sequence[Job], now: float) -> None:
        """Make a run of each schedule that is due, unless a run waits; set the next due times."""
        records: list[Record] = []
        for job in due:
            try:
                next_due = job.recurrence().resume_after(job.due or now, now)
            except ScrapyDoError as error:
                records.append(self._finish(job, Status.FAILED, str(error)))
                continue
            last = self.jobs.get(job.run or "")
            if last is not None and last.status is Status.PENDING:
                self._counts["runs-skipped"] += 1
                log(f"{describe(job)} is due but skipped, since run {last.identifier} still waits")
                records.append(job._replace(due=next_due))
                continue
            run = job._replace(
                identifier=new_identifier(), status=Status.PENDING, actor="SCHEDULER",
                schedule="now", timestamp=now, origin=now, due=None, run=None,
                scheduled_by=job.identifier,
            )  # fmt: skip
            records += [job._replace(due=next_due, run=run.identifier), run]
        self.save(*records, is_fact=True)

    def _reap_orphans(self) -> None:
        """Reap processes that crawls left behind and that have ended. `lock` is held."""
        crawls = [*self._crawls.values(), *self._listings.values()]
        known = {crawl.pid for crawl in crawls}
        with contextlib.suppress(OSError):  # without file descriptors it has to wait
            for pid in child_pids(os.getpid()):
                if pid not in known and not self._is_hooking:
                    os.waitpid(pid, os.WNOHANG)

    # Crawls, each in a thread

    def dispatch(self) -> None:
        """Start the crawls for which there are slots. `lock` is held."""
        while not self.is_closing and (job := self._slots.pop()):
            crawl = self._crawls[job.identifier] = Crawl(job.identifier)
            try:
                name = f"crawl-{job.identifier}"
                self._start_thread(self._run, job, crawl, name=name)
            except RuntimeError as error:  # the system has no thread for us; the timer asks again
                log(f"job {job.identifier} waits: {error}")
                self._release(job)
                self._slots.put(job)
                return

    def _release(self, job: Job) -> None:
        del self._crawls[job.identifier]
        self._slots.free(job)

    def _run(self, job: Job, crawl: Crawl) -> None:
        """Run a crawl from start to end."""
        reason = None
        try:
            self._launch(job, crawl)
        except ScrapyDoError as error:
            reason = str(error)
        except Exception as error:
            log_crash(f"the start of job {job.identifier}")
            reason = f"the crawl could not be started: {error!r:.200}"
        self._see_to_end(job, crawl, reason)

    def _launch(self, job: Job, crawl: Crawl) -> None:
        """Start a crawl in a working copy, unless the job was canceled meanwhile."""
        work = self.store.work / job.identifier
        project = self._copy_code(job.project, work)
        layout = Layout(project.name, project.folder, project.settings)
        report = self.store.work / f"{job.identifier}.json"
        environment = self._environment(job.identifier, layout, work, report, job)
        command = [*self._scrapy(project.name), *crawl_arguments(job)]
        logs = [self.store.log_file(job.identifier, stream) for stream in ("out", "err")]
        with self.lock:
            if self.jobs.get(job.identifier) is not job or self.is_closing:
                return
            crawl.start(command, work / project.folder, environment, logs)
            now = time.time()
            running = job._replace(status=Status.RUNNING, timestamp=now, started=now)
            self.save(running._replace(pid=crawl.pid), is_fact=True)
            self._set_timeout(job, crawl)  # before a cancel can set its own alarm

    def _set_timeout(self, job: Job, crawl: Crawl) -> None:
        if timeout := job.timeout or self.settings.job_timeout:
            elapsed = time.monotonic() - crawl.began
            crawl.set_alarm(max(0.0, timeout - elapsed), self._time_out, job.identifier)

    def _time_out(self, identifier: str) -> None:
        with self.lock:
            job = self.jobs.get(identifier)
            if job is not None and identifier in self._crawls and not job.ending:
                self._end([job], "timeout")

    def _copy_code(self, name: str, work: Path) -> Project:
        """Make a working copy of a project's code, and return the project.

        Code that a crawl has changed is unpacked anew. A push replaces the record before it
        deletes the former code, so a copy is whole if the record is still the same.
        """
        for _ in range(COPY_COUNT):
            project = self.find_project(name)
            try:
                is_clean = copy_tree(str(self.store.tree(project)), str(work))
            except FileNotFoundError:
                is_clean = False
            except OSError as error:
                raise StorageError(f"the code cannot be copied for the crawl: {error}") from None
            if is_clean and self.projects.get(name) is project:
                return project
            remove_tree(work)
            if self.projects.get(name) is project:
                self._renew(project)
        raise StorageError(f"the code of {name} changes all the time; push it again")

    def _renew(self, project: Project) -> None:
        """Unpack the archive of a project again, in place of code that is gone or changed."""
        fresh = project._replace(push=new_identifier())
        try:
            link_or_copy(str(self.store.archive(project)), str(self.store.archive(fresh)))
            unpack(self.store.archive(fresh), self.store.tree(fresh))
            keep_bytecode(self.store.tree(project), self.store.tree(fresh), is_stamped=True)
            with self.lock:
                is_current = self.projects.get(project.name) is project
                if is_current:
                    self.save(fresh)
            self._discard(project if is_current else fresh)
        except (OSError, ScrapyDoError) as error:
            self._discard(fresh)
            if self.projects.get(project.name) is project:  # else another crawl was quicker
                raise StorageError(f"the code cannot be unpacked again: {error}; push it") from None

    def _see_to_end(self, job: Job, crawl: Crawl, reason: str | None) -> None:
        """Wait until a crawl has ended, end what it leaves behind, and save how it ended.

        `reason` says why it was not started.
        """
        identifier = job.identifier
        work, report = self.store.work / identifier, self.store.work / f"{identifier}.json"
        if crawl.pid:
            crawl.wait()
            try:
                crawl.end_rest(self.settings.kill_after)
            except Exception:  # whatever it is, the slot comes free
                log_crash(f"the end of job {identifier}")
        with self.lock:
            exit_code = crawl.reap() if crawl.pid else None
            current = self.jobs.get(identifier)
            if current is not None and current.status is Status.RUNNING:
                duration, stats = int(time.monotonic() - crawl.began), read_stats(report)
                current = current._replace(duration=duration, exit_code=exit_code, stats=stats)
                self._save_end(self._ended(current, exit_code, crawl.was_killed), is_fact=True)
            elif current is not None and current.status is Status.PENDING and reason:
                self._save_end(self._finish(current, Status.FAILED, reason), is_fact=True)
            self._release(job)
            self._reap_orphans()
            self.dispatch()
        crawl.is_over.set()
        if crawl.pid:
            self._warn_of_results(job, work)
        for path in (work, report):
            remove_tree(path)

    def _warn_of_results(self, job: Job, work: Path) -> None:
        """Say in the log that a crawl left files where they are deleted with its working copy."""
        project = self.projects.get(job.project)
        if project is None:
            return
        with contextlib.suppress(OSError):
            known = os.listdir(self.store.tree(project) / project.folder)
            new = set(os.listdir(work / project.folder)) - {*known, "__pycache__"}
            if new:
                names = ", ".join(sorted(map(quoted, new))[:5])
                cure = "write to $SPIDER_DATA_DIR instead, see 'Where results go' in the README"
                log(f"job {job.identifier} left {names} in its working copy, now deleted; {cure}")

    def _ended(self, job: Job, exit_code: int | None, was_killed: bool) -> Job:
        """Return a RUNNING job as it is after its end; an exit code of None stands for a crash."""
        if job.ending == "cancel":
            reason = f"{BY_USER}; {KILLED}" if was_killed else BY_USER
            return self._finish(job, Status.CANCELED, reason)
        if job.ending == "timeout":
            limit = job.timeout or self.settings.job_timeout
            reason = f"it ran longer than its timeout of {limit:.15g} s"
            reason += f"; {KILLED}" if was_killed else ""
            return self._finish(job, Status.FAILED, reason)
        if job.ending == "stop" or exit_code is None:
            return job._replace(
                status=Status.PENDING, timestamp=time.time(), pid=None, started=None, ending="",
                ending_since=None, duration=None, exit_code=None, stats=None,
            )  # fmt: skip
        problem = explain_exit(exit_code)
        return self._finish(job, Status.FAILED if problem else Status.SUCCESSFUL, problem)

    def _finish(self, job: Job, status: Status, reason: str | None) -> Job:
        """Return a job with its last status."""
        is_run = job.status is not Status.SCHEDULED
        return job._replace(
            status=status, reason=reason, timestamp=time.time(), due=None, pid=None, ending="",
            ending_since=None, notice=is_run and bool(self.settings.on_finish),
        )  # fmt: skip

    def _scrapy(self, project: str) -> list[str]:
        """Return the command that is Scrapy for a project."""
        return [word.replace("{project}", project) for word in self.settings.scrapy]

    def _environment(
        self, identifier: str, layout: Layout, work: Path, report: Path, job: Job | None = None
    ) -> dict[str, str]:
        """Return the environment of a crawl, or without a job of `scrapy list`.

        Scrapy takes SCRAPY_PROJECT for the name of an option in [settings] of scrapy.cfg, where
        most projects have none but `default`; so the settings module is named outright.
        """
        environment = outer_environment()
        path = [str(self.store.shim), str(work / layout.folder), environment.get("PYTHONPATH", "")]
        order = {
            "command": "crawl" if job else "list", "settings": layout.settings,
            "report": str(report), "items": job is not None and job.items,
        }  # fmt: skip
        environment.update(
            SPIDER_DATA_DIR=str(self.store.spider_data), PYTHONIOENCODING="utf-8",
            PYTHONPATH=os.pathsep.join(filter(None, path)), SCRAPY_JOB=identifier,
            SCRAPY_PROJECT=layout.name, SCRAPY_SPIDER=job.spider if job else "",
            SCRAPY_SETTINGS_MODULE=SHIM_MODULE, SCRAPY_DO=encode_json(order),
        )  # fmt: skip
        if not layout.settings:
            del environment["SCRAPY_SETTINGS_MODULE"]
        return environment

    # Commands of --on-finish

    def _run_hooks(self) -> None:
        """Do the work of the thread that tells --on-finish of finished jobs, one at a time."""
        while not self.is_closing:
            job = self._notices.get()
            while self.store.is_behind:
                time.sleep(RETRY_SECONDS)  # only an end that is on the disk is told
            try:
                with self.lock:
                    if self.jobs.get(job.identifier) is job:  # else it has been forgotten
                        self.save(job._replace(notice=False), is_fact=True)
                    self._is_hooking = True
                run_hook(self.settings.on_finish, job)
            except Exception as error:
                log(f"--on-finish failed for job {job.identifier}: {error}")
            self._is_hooking = False


def run_hook(command: Sequence[str], job: Job) -> None:
    """Run the command of --on-finish for a job. Raise OSError or SubprocessError if it fails."""
    environment = outer_environment()
    environment.update(SCRAPY_DO_JOB=job.identifier, SCRAPY_DO_STATUS=job.status.value)
    subprocess.run(
        [word.encode() for word in command], env=environment, stdout=subprocess.DEVNULL,
        input=(job_text(job) + "\n").encode("utf-8", "backslashreplace"), check=True,
        timeout=NOTICE_SECONDS, start_new_session=True,
    )  # fmt: skip


def end_instant(job: Job) -> float:
    """Return when a job ended, for sorting; 0 when it has not."""
    return job.timestamp if job.status in COMPLETED else 0.0


def twin_hash(job: Job) -> int:
    """Return a number that schedules have in common which ask for the same."""
    return hash((job.project, job.spider, job.schedule, job.payload, job.arg, job.setting))


def is_child(pid: int) -> bool:
    """Tell whether a process is a child of this process that has not been reaped."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def checked(name: str, parse: Callable[..., Any], text: str, *bounds: float) -> Any:
    """Return the value of a parameter. Raise BadRequest that names it if it cannot be parsed."""
    try:
        return parse(text, *bounds)
    except ValueError as error:
        raise BadRequest(f"the parameter '{name}' {error}") from None


def check_arguments(
    description: str, payload: str, arg: Sequence[str], setting: Sequence[str]
) -> None:
    """Raise BadRequest or TooLarge unless Scrapy can be given all this on its command line."""
    if len(description) > DESCRIPTION_CHARACTERS:
        raise TooLarge(f"the description has over {DESCRIPTION_CHARACTERS} characters; shorten it")
    if len("".join((payload, *arg, *setting)).encode("utf-8", "replace")) > ARGUMENT_BYTES:
        limit = f"at most {ARGUMENT_BYTES} bytes together"
        raise TooLarge(f"payload, args and settings may have {limit}; put the data into a file")
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the payload is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest('the payload must be a JSON object, like {"page": 2}')
    wrong = [f"arg {quoted(a)}" for a in arg if not re.fullmatch(r"[^-=\0\s][^=\0\s]*=[^\0]*", a)]
    wrong += [f"setting {quoted(s)}" for s in setting if not re.fullmatch(r"[^\W\d]\w*=[^\0]*", s)]
    if wrong:
        raise BadRequest(f"the {wrong[0]} must be NAME=VALUE, like page=2 or LOG_LEVEL=INFO")
    if payload != "{}" and any(text.startswith("payload=") for text in arg):
        raise BadRequest("there are a payload and an arg named payload; leave one of them out")


def name_jobs(jobs: Sequence[Job]) -> str:
    """Return a list of jobs for an error message."""
    shown = [f"{job.identifier} ({job.spider}, {job.status.value})" for job in jobs[:10]]
    return ", ".join(shown) + (f" and {len(jobs) - 10} more" if len(jobs) > 10 else "")


def explain_exit(exit_code: int) -> str | None:
    """Return why a crawl with this exit code has failed; None when it has not."""
    if exit_code >= 0:
        return f"exit code {exit_code}; its log says why" if exit_code else None
    name = signal.strsignal(-exit_code) or "unknown"
    return f"the crawl was ended by signal {-exit_code} ({name})"


def describe_seconds(seconds: float) -> str:
    """Return a time span like `1d 12m 24s`, without the parts that are zero."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    parts = ((hours // 24, "d"), (hours % 24, "h"), (minute, "m"), (second, "s"))
    return " ".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


@functools.lru_cache(maxsize=1)
def memory_usage(tenth: int) -> float:
    """Return the resident memory in MiB, asked for once in a tenth of a second."""
    return float(psutil.Process().memory_info().rss / MIB)


# ---- 7. HTTP ---------------------------------------------------------------------------------

HEAD_BYTES = 64 * 1024  # the longest headers together
URL_BYTES = 8 * 1024  # the longest request line; others have this limit as well
HEADERS_COUNT = 100
FIELDS_COUNT = 1000  # of a form; a crawl's command has no room for more
TEXT_BYTES = MIB  # the longest parameter that is not an archive
BODY_BYTES_PER_SECOND = 10 * 1024  # the least rate of an upload: a slow telephone's
LINGER_SECONDS = 2.0  # for the rest of a refused body, so that the client gets to see the answer
GRACE_SECONDS = 1.0  # in which a client that has connected may send its request undisturbed
DESCRIPTOR_SECONDS = 0.05  # until a connection is accepted for which there was no descriptor
IDLE_SECONDS = 10.0  # after which a thread without a connection ends
FOLLOW_SECONDS = 0.2  # between looks at a log that is followed
PENALTY_SECONDS = 1.0  # before a wrong password is answered: slow guessing down
NONCE_SECONDS = 300  # that a Digest nonce lives; then clients fetch another by themselves
NONCE_USES = 4096  # of a nonce: a bit is kept for each
NONCES_COUNT = 1000  # of nonces whose uses are remembered
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(rb"(%s) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n" % TOKEN)
HEADER_LINE = re.compile(rb"(%s):([^\0\r\n]*)\r\n" % TOKEN)
SINGLE_HEADERS = ("host", "content-length", "content-type", "transfer-encoding", "authorization")
ABSOLUTE_TARGET = re.compile(r"https?://([^/?]*)", re.IGNORECASE)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\0\r\n]*)?\r\n")
PARAMETER = re.compile(r'(?<![\w*-])([\w-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s,;"]*))', re.ASCII)
PERCENTS = re.compile(rb"(?:%[0-9A-Fa-f]{2})+")
BYTE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)
LOG_PATH = re.compile(rf"/get-log/data/({JOB_PATTERN.pattern})\.(out|err)")
LOG_TYPE = "text/plain; charset=utf-8"
PUSH_CALL = "curl -sS .../push-project.json -F archive=@demo.zip"
PAGE_HEADERS = [  # nothing from elsewhere, and no frame around it, whose owner could lead a click
    ("Content-Security-Policy", "default-src 'none'; connect-src 'self'; "
     "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; "
     "form-action 'none'; frame-ancestors 'none'"),
]  # fmt: skip
Headers = Sequence[tuple[str, str]]


class WrongPassword(ScrapyDoError):
    """Refuse a user who is unknown or has another password; the answer waits for a while."""

    status = 401


class ClientGone(Exception):
    """Say that nobody is there to get an answer, or that it must be cut."""


class Tls:
    """The certificate of the server, read again when its files have changed."""

    def __init__(self, certificate: Path, key: Path | None, password_file: Path | None):
        """Read the files; the key may be in `certificate`. Raise ScrapyDoError if that fails."""
        self._files, self._password_file = (certificate, key or certificate), password_file
        self._load()

    def _stamps(self) -> list[tuple[int, int]]:
        with contextlib.suppress(OSError):
            return [(about.st_mtime_ns, about.st_ino) for about in map(os.stat, self._files)]
        return []

    def _load(self) -> None:
        import ssl

        self._seen = self._stamps()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            file = self._password_file
            password = file.read_text("utf-8").rstrip("\r\n") if file else ""
            # Without a function OpenSSL would ask the terminal for the password.
            context.load_cert_chain(*self._files, lambda: password)
        except (OSError, ValueError) as error:
            files = dict.fromkeys(path for path in (*self._files, self._password_file) if path)
            reason = getattr(error, "strerror", None) or error
            check = f"check {', '.join(map(str, files))}"
            raise ScrapyDoError(f"the certificate cannot be used: {reason}; {check}") from None
        self._context = context

    def wrap(self, connection: socket.socket) -> socket.socket:
        """Return a connection that shakes hands when it is read. Raise OSError if that fails."""
        if self._stamps() != self._seen:
            try:
                self._load()
                log("the renewed certificate is in use")
            except ScrapyDoError as error:
                log(f"{error}; the former certificate stays in use")
        return self._context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )


class Rules(NamedTuple):
    """What the command line says of the server. Times are seconds."""

    max_upload: int = 256  # MiB
    request_timeout: float = 60.0
    max_connections: int = 256
    allow_host: Sequence[str] = ()  # NAME or NAME:PORT
    users: Mapping[str, str] | None = None  # passwords by name; None lets everybody in
    tls: Tls | None = None


def read_users(path: Path) -> dict[str, str]:
    """Return the passwords by user of a file with a line USER:PASSWORD each.

    Raise ScrapyDoError with the fault. Its group may read it: so mounted secrets come.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise ScrapyDoError(f"others may use the passwords: run 'chmod g-w,o-rwx {path}'")
            lines = file.read().split("\n")
    except OSError as error:
        raise ScrapyDoError(f"the users cannot be read: {error}; see --auth-file") from None
    except ValueError:
        raise ScrapyDoError(f"{path} is not UTF-8; save it so") from None
    users: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, _, password = line.partition(":")
        if name in users:
            raise ScrapyDoError(f"line {number} of {path} has the user of an earlier line again")
        if name and password:
            users[name] = password
        elif line.strip():
            raise ScrapyDoError(f"line {number} of {path} is not of the form USER:PASSWORD")
    if not users:
        raise ScrapyDoError(f"{path} has no users; write a line USER:PASSWORD for each")
    return users


def parameters_of(text: str) -> dict[str, str]:
    """Return the parameters in a header's value by lower-case name, RFC 9110 section 5.6.6."""
    found = PARAMETER.finditer(text)
    return {m[1].lower(): re.sub(r"\\(.)", r"\1", m[2] or m[3] or "") for m in found}


ALGORITHMS = {"SHA-256": "sha256", "MD5": "md5"}  # as Digest and hashlib name them


class Guard:
    """Refuse what a foreign web page asks a browser for, and who lacks a password."""

    def __init__(self, rules: Rules):
        name = socket.gethostname().lower()
        self._aliases = {host.lower() for host in rules.allow_host}
        self._names = {"localhost", name, name.partition(".")[0]}
        self._names |= {host.partition(":")[0] for host in self._aliases}
        self._users, self._is_tls = rules.users, rules.tls is not None
        self._origin = re.compile("https://(.+)" if self._is_tls else "https?://(.+)")
        self._secret = os.urandom(32)
        self._lock = threading.Lock()  # for the two below
        self._uses: dict[str, int] = {}  # a bit for each counter that came with a nonce
        self._oldest = ""  # nonces up to this one are no longer taken

    def check(self, request: Handler) -> bool:
        """Tell whether a request has shown a password. Raise ScrapyDoError if it is refused."""
        host = request.headers.get("host", "localhost").lower()  # only HTTP/1.0 may lack it
        if not self._is_own(host):
            advice = "if it should be, start with --allow-host NAME"
            raise Forbidden(f"{quoted(host)} is not a name of this machine; {advice}")
        if request.command not in ("GET", "HEAD"):
            self._check_page(host, request.headers)
        if self._users is None:
            return False
        self._check_user(request, self._users)
        return True

    def _is_own(self, host: str) -> bool:
        """Tell whether no foreign name, which may be led to our address, can be such a host."""
        match = HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].removesuffix(".")
        family = socket.AF_INET6 if name.startswith("[") else socket.AF_INET
        with contextlib.suppress(OSError, ValueError):
            return name in self._names or bool(socket.inet_pton(family, name.strip("[]")))
        return False

    def _check_page(self, host: str, headers: Mapping[str, str]) -> None:
        """Raise Forbidden for a change that the page of another site asks for."""
        site = headers.get("sec-fetch-site", "none")
        origin = headers.get("origin")
        match = self._origin.fullmatch(origin.lower()) if origin is not None else None
        place = match[1] if match else host if origin is None else ""
        if place not in (host, *self._aliases):
            advice = "a proxy must keep it ('proxy_set_header Host $http_host' in nginx)"
            allowed = f", or start with --allow-host {place:.100}" if place else ""
            what = f"a page of {quoted(origin or '')} must not change anything at {quoted(host)}"
            raise Forbidden(f"{what}; if the page is the daemon's, {advice}{allowed}")
        if site not in ("same-origin", "none"):
            raise Forbidden("a web page of another site must not change anything here")

    def _check_user(self, request: Handler, users: Mapping[str, str]) -> None:
        """Raise ScrapyDoError unless a user asks, RFC 7616 and RFC 7617."""
        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "digest":
            fields = parameters_of(rest)
            is_right, nonce = self._proves(request, fields, users), fields.get("nonce", "")
        elif scheme.lower() == "basic" and self._is_tls:
            is_right, nonce = self._is_password(rest, users), None
        else:
            wanted = "a user and a password are wanted here: curl --anyauth -u NAME"
            raise ScrapyDoError(f"{wanted}; Basic is taken over TLS only", 401, self._challenges())
        if not is_right:
            raise WrongPassword("the user or the password is wrong", None, self._challenges())
        if nonce is not None and not self._use_nonce(nonce, fields.get("nc", "")):
            message = "the nonce is too old, or this request has come before; ask again"
            raise ScrapyDoError(message, 401, self._challenges(", stale=true"))
        if nonce is not None and fields.get("uri") != request.path:
            differ = f"Digest is for {quoted(fields.get('uri', ''))}, not {quoted(request.path)}"
            advice = "let the proxy keep the path, or check the passwords itself"
            raise BadRequest(f"{differ}: a proxy has changed the path; {advice}")

    def _challenges(self, more: str = "") -> Headers:
        start = f'Digest realm="scrapy-do", nonce="{self._new_nonce()}", qop="auth", charset=UTF-8'
        ways = [f"{start}{more}, algorithm={name}" for name in ALGORITHMS]
        ways += ['Basic realm="scrapy-do", charset="UTF-8"'] * self._is_tls
        return [("WWW-Authenticate", way) for way in ways]

    def _new_nonce(self) -> str:
        """Return a nonce that only this daemon can make; it begins with milliseconds."""
        start = f"{int(time.monotonic() * 1000):014x}{os.urandom(8).hex()}"
        return start + hmac.new(self._secret, start.encode(), "sha256").hexdigest()

    def _use_nonce(self, nonce: str, counter: str) -> bool:
        """Note the use of a nonce; False if it is not a live one of ours or has been used so.

        Who listens to a request can so not send it again, or another body with its header. A bit
        for each counter, since the requests of a browser overtake each other.
        """
        start, mac = nonce[:30], nonce[30:].encode()
        right = hmac.new(self._secret, start.encode(), "sha256").hexdigest()
        if not hmac.compare_digest(mac, right.encode()) or not re.fullmatch("[0-9a-f]{8}", counter):
            return False
        age, count = time.monotonic() - int(start[:14], 16) / 1000, int(counter, 16)
        with self._lock:
            uses = self._uses.get(nonce, 0)
            if age > NONCE_SECONDS or nonce <= self._oldest or count >= NONCE_USES:
                return False
            self._uses[nonce] = uses | 1 << count
            if len(self._uses) > NONCES_COUNT:
                self._oldest = min(self._uses)
                del self._uses[self._oldest]
        return not uses >> count & 1

    def _proves(
        self, request: Handler, fields: Mapping[str, str], users: Mapping[str, str]
    ) -> bool:
        """Tell whether Digest fields show a password; a user who does not exist costs the same."""
        algorithm = ALGORITHMS.get(fields.get("algorithm", "MD5").upper())
        if algorithm is None or fields.get("qop") != "auth":
            return False
        name = fields.get("username", "").encode("latin-1").decode("utf-8", "replace")
        known = digest_of(algorithm, name, "scrapy-do", users.get(name, self._secret.hex()))
        asked = digest_of(algorithm, request.command, fields.get("uri", ""))
        counted = [fields.get(field, "") for field in ("nonce", "nc", "cnonce", "qop")]
        right = digest_of(algorithm, known, *counted, asked)
        return hmac.compare_digest(fields.get("response", "").lower().encode(), right.encode())

    def _is_password(self, credentials: str, users: Mapping[str, str]) -> bool:
        import base64

        with contextlib.suppress(ValueError):
            name, _, password = base64.b64decode(credentials.strip()).decode().partition(":")
            texts = (password, users.get(name, self._secret.hex()))
            given, right = (hashlib.sha256(text.encode()).digest() for text in texts)
            return hmac.compare_digest(given, right)
        return False


def digest_of(algorithm: str, *texts: str) -> str:
    """Return the hexadecimal digest of texts joined by colons."""
    data = ":".join(texts).encode("utf-8", "surrogateescape")
    return hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()


class Source:
    """Bytes that are read up to a mark: a query."""

    def __init__(self, start: bytes = b""):
        self._buffer = start

    def read(self) -> bytes:
        """Return the next piece; b"" at the end."""
        return b""

    def peek(self) -> bytes:
        """Return the first bytes without a step over them."""
        self._buffer = self._buffer or self.read()
        return self._buffer[:100]

    def unread(self, data: bytes) -> None:
        """Put data before what comes next."""
        self._buffer = data + self._buffer

    def until(self, mark: re.Pattern[bytes], most: int, write: Callable[[bytes], object]) -> bytes:
        """Hand all before a mark to `write`. Return the mark, b"" if the end comes first.

        A mark has `most` bytes.
        """
        while not (match := mark.search(self._buffer)):
            piece = self.read()
            safe = max(0, len(self._buffer) - most + 1) if piece else len(self._buffer)
            write(self._buffer[:safe])
            self._buffer = self._buffer[safe:] + piece
            if not piece:
                return b""
        write(self._buffer[: match.start()])
        self._buffer = self._buffer[match.end() :]
        return match[0]


class Body(Source):
    """The body of a request, as it arrives."""

    def __init__(self, request: Handler, length: int | None, most: int):
        """Take a body of some length, None for a chunked one. Raise TooLarge past `most` bytes."""
        super().__init__()
        self._request, self._is_chunked = request, length is None
        self._left = length or 0  # of the body or the chunk
        self._received, self._most = 0, most
        self._check_size(self._left)
        request.wire.deadline = time.monotonic() + request.wire.seconds

    def _check_size(self, size: int) -> None:
        if size > self._most:
            advice = "; see --max-upload" if self._most != 2 * TEXT_BYTES else ""
            raise TooLarge(f"the body is longer than {self._most // MIB} MiB{advice}")

    def read(self) -> bytes:
        """Return the next piece; b"" at the end. Raise ClientGone when it does not come."""
        reader, wire = self._request.rfile, self._request.wire
        if self._is_chunked and not self._left and not self._request.is_read:
            self._left = self._next_chunk(reader)
        if not self._left:
            self._request.is_read = True
            return b""
        piece: bytes = reader.read1(min(self._left, CHUNK_BYTES))
        if not piece:
            raise ClientGone
        self._left -= len(piece)
        self._received += len(piece)
        self._check_size(self._received)
        wire.deadline = (wire.deadline or 0) + len(piece) / BODY_BYTES_PER_SECOND
        if self._is_chunked and not self._left and reader.readline(2) != b"\r\n":
            raise BadRequest("the chunked body is broken")
        return piece

    def _next_chunk(self, reader: io.BufferedIOBase) -> int:
        """Return the length of the next chunk, 0 at the end, RFC 9112 section 7.1."""
        match = CHUNK_LINE.fullmatch(reader.readline(256))
        if match is None:
            raise BadRequest("the chunked body is broken")
        if not (size := int(match[1], 16)):
            read_headers(reader)  # of the trailer, which means nothing here
        return size


class Text:
    """A parameter that is text."""

    def __init__(self, what: str):
        self._what, self._data = what, bytearray()

    def write(self, data: bytes) -> None:
        """Take a piece. Raise TooLarge when it gets too much."""
        self._data += data
        if len(self._data) > TEXT_BYTES:
            raise TooLarge(f"{self._what} is longer than {TEXT_BYTES // MIB} MiB")

    def decoded(self, text: str) -> str:
        """Return percent-encoded text decoded. Raise BadRequest if it is not UTF-8 then."""
        self.write(decode_percent(text.encode("latin-1")))
        return self.close()

    def close(self) -> str:
        """Return the text. Raise BadRequest if it is not UTF-8."""
        try:
            return self._data.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"{self._what} is not UTF-8") from None


class Decoder:
    """Decodes a percent-encoded value, on its way; a stray % stays."""

    def __init__(self, write: Callable[[bytes], object]):
        self._write, self._rest = write, b""

    def write(self, data: bytes) -> None:
        """Take a piece; a %XX at its end may lack digits that come with the next."""
        data = self._rest + data
        cut = data.find(b"%", max(0, len(data) - 2))
        self._rest = data[cut:] if cut >= 0 else b""
        self._write(decode_percent(data[: len(data) - len(self._rest)].replace(b"+", b" ")))

    def close(self) -> None:
        """Hand on what is left."""
        self._write(self._rest)


def decode_percent(data: bytes) -> bytes:
    """Return the bytes with `%XX` decoded; a stray % stays."""
    return PERCENTS.sub(lambda match: bytes.fromhex(match[0].replace(b"%", b"").decode()), data)


class Route(NamedTuple):
    """An endpoint: the function that answers, and its parameters."""

    name: str
    answer: Callable[..., dict[str, Any]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeatable: tuple[str, ...] = ()  # of those

    def explain(self) -> str:
        """Return which parameters exist."""
        names = [*self.required, *self.optional]
        shown = [f"{name} (repeatable)" if name in self.repeatable else name for name in names]
        return f"its parameters are {', '.join(shown)}" if shown else "it has no parameters"


class Form:
    """The parameters of a request, taken in the order in which they come."""

    def __init__(self, route: Route, daemon: Daemon):
        self._route, self._daemon, self.repeatable = route, daemon, route.repeatable
        self._values: dict[str, Any] = {}
        self._count = 0
        self.upload: Path | None = None  # an archive, which belongs to the push in the end
        self.file: IO[bytes] = io.BytesIO()  # the archive's

    def next_field(self) -> None:
        """Count a field, an empty one as well. Raise TooLarge past the limit."""
        self._count += 1
        if self._count > FIELDS_COUNT:
            raise TooLarge(f"a request may have {FIELDS_COUNT} parameters")

    def open(self, name: str, hint: str = "") -> Any:
        """Return what takes the value of a parameter. Raise BadRequest if it cannot be there."""
        route, what = self._route, f"parameter {quoted(name)}"
        if name not in route.required + route.optional:
            hint = f"; it is '{SINGULAR[name]}'" if name in SINGULAR else hint
            raise BadRequest(f"{route.name} has no {what}{hint}; {route.explain()}")
        if name in self._values and name not in route.repeatable:
            raise BadRequest(f"the {what} is given twice; {route.explain()}")
        if name == "archive":
            self.upload = self._daemon.new_upload()
            descriptor = os.open(self.upload, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self.file = os.fdopen(descriptor, "wb")
            return self.file
        return Text(f"the {what}")

    def close(self, name: str, value: Any) -> None:
        """Keep the value of a parameter, as a text or a path."""
        kept = value.close() or self.upload or ""
        is_list = name in self.repeatable
        self._values[name] = [*self._values.get(name, ()), kept] if is_list else kept

    def values(self) -> dict[str, Any]:
        """Return all texts, a repeatable one as a list. Raise BadRequest if one is missing."""
        for name in self._route.required:
            if name not in self._values:
                what = f"{self._route.name} needs the parameter '{name}'"
                raise BadRequest(f"{what}; {self._route.explain()}")
        return self._values


SINGULAR = {"args": "arg", "settings": "setting", "spiders": "spider"}  # as a job shows them
AND, EQUALS_OR_AND = re.compile(b"&"), re.compile(b"[=&]")
BLANK_LINE, NEVER = re.compile(b"\r\n\r\n"), re.compile(b"(?!)")
FORM_TYPE = "application/x-www-form-urlencoded"
# What sends itself as a form by curl -d, but is none: how it begins, what it is, the cure.
NO_FORMS = (
    (b"PK\x03\x04", f"a zip file without a form around it: {PUSH_CALL}"),
    (b"\x1f\x8b", f"a gzip file; make a zip, and {PUSH_CALL}"),
    (b"{", "JSON without its header: use curl --json, or add -H 'Content-Type: application/json'"),
)


def read_query(source: Source, form: Form, hint: str = "") -> None:
    """Read urlencoded fields; a value may be binary."""
    mark = b"&"
    while mark:
        form.next_field()
        name = Text("the name of a parameter")
        decoder = Decoder(name.write)
        mark = source.until(EQUALS_OR_AND, 1, decoder.write)
        decoder.close()
        if not (text := name.close()) and mark != b"=":
            continue
        value = form.open(text, hint)
        decoder = Decoder(value.write)
        if mark == b"=":
            mark = source.until(AND, 1, decoder.write)
        decoder.close()
        form.close(text, value)


def read_multipart(source: Source, boundary: str, form: Form) -> None:
    """Read `multipart/form-data`, RFC 7578; only a whole line with the boundary ends a part."""
    if not 1 <= len(boundary) <= 200:
        raise BadRequest("the multipart body has no boundary in its Content-Type")
    line = re.escape(boundary.encode("latin-1"))
    delimiter = re.compile(rb"\r\n--%b(--|[ \t]{0,64}\r\n)" % line)
    most = len(boundary) + 70
    source.unread(b"\r\n")  # before the first line, so that it is like the others
    mark = source.until(delimiter, most, len)  # what comes before means nothing
    while mark and not mark.endswith(b"--"):
        form.next_field()
        head = Text("the head of a part")
        source.until(BLANK_LINE, 4, head.write)
        found = re.search("(?im)^content-disposition: *form-data *;(.*)", head.close())
        name = parameters_of(found[1]).get("name") if found else None
        if name is None:
            raise BadRequest("a part of the multipart body has no name")
        value = form.open(name)
        mark = source.until(delimiter, most, value.write)
        form.close(name, value)
    if not mark:
        raise BadRequest("the multipart body ends before its last boundary: was it cut short?")
    source.until(NEVER, 1, len)  # nor does what comes after


def read_json(source: Source, form: Form) -> None:
    """Read the members of a JSON object; repeatable ones may be lists."""
    text = Text("the JSON body")
    source.until(NEVER, 1, text.write)
    try:
        pairs = json.loads(document := text.close(), object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error!s:.200}") from None
    if not document.lstrip().startswith("{"):
        raise BadRequest("the JSON body must be one object, like {\"project\": \"demo\"}")
    for name, value in json.loads(document).items() if len(dict(pairs)) == len(pairs) else pairs:
        is_list = isinstance(value, list) and name in form.repeatable
        for item in value if is_list else [value]:
            form.next_field()
            target = form.open(name)
            target.write(json_text(item).encode("utf-8", "surrogatepass"))
            form.close(name, target)


def json_text(value: Any) -> str:
    """Return a value of a JSON body as the text that a form would have."""
    if isinstance(value, bool):
        return str(int(value))
    return value if isinstance(value, str) else encode_json(value)


def read_body(body: Body, content_type: str, form: Form) -> None:
    """Read a body by its type. Raise ScrapyDoError for a type that is not known."""
    kind, _, rest = content_type.partition(";")
    kind = kind.strip().lower() or FORM_TYPE
    if kind == "application/json":
        read_json(body, form)
    elif kind == "multipart/form-data":
        read_multipart(body, parameters_of(rest).get("boundary", ""), form)
    elif kind == FORM_TYPE:
        start = body.peek().lstrip()
        for magic, what in NO_FORMS:
            if start.startswith(magic):
                raise BadRequest(f"the body is {what}")
        hint = "; a '&' or '+' within a value is sent by curl --data-urlencode"
        read_query(body, form, hint)
    else:
        advice = f"send a form (curl -F or -d) or JSON (curl --json), as in {PUSH_CALL}"
        raise ScrapyDoError(f"a body of type {quoted(kind)} is not understood; {advice}", 415)


def read_headers(reader: Any) -> dict[str, str]:
    """Return headers by lower-case name, up to the empty line.

    Raise ScrapyDoError for what could smuggle a second request in: http.server's own reader, made
    for mail, splits lines at a bare CR and stops at a line that it does not understand.
    """
    headers: dict[str, str] = {}
    size = 0
    while (line := reader.readline(HEAD_BYTES)) not in (b"\r\n", b"\n"):
        match = HEADER_LINE.fullmatch(line)
        size += len(line)
        if size >= HEAD_BYTES or len(headers) >= HEADERS_COUNT:
            raise ScrapyDoError("the headers are too long, or too many", 431)
        if match is None:
            raise BadRequest(f"this is not a header: {quoted(line.decode('latin-1'))}")
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        if name in headers and name in SINGLE_HEADERS:
            raise BadRequest(f"the header {name} is given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def body_length(headers: Mapping[str, str]) -> int | None:
    """Return how long a body is, None for a chunked one. Raise ScrapyDoError if it is unclear."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None and length is not None:
        raise BadRequest("there are both a Content-Length and a Transfer-Encoding")
    if coding is not None and coding.lower() != "chunked":
        raise ScrapyDoError(f"the transfer coding {quoted(coding)} is not known; use chunked", 501)
    if not re.fullmatch("[0-9]{1,18}", "0" if length is None else length):
        raise BadRequest(f"the Content-Length {quoted(length or '')} is not a number")
    return None if coding is not None else int(length or 0)


def list_jobs(daemon: Daemon, **form: str) -> dict[str, Any]:
    """Answer list-jobs.json: one job by its `id`, or the jobs in a `status`, by some filters."""
    if "id" in form and len(form) == 1:
        return {"jobs": [daemon.find_job(form["id"]).view()]}
    if "id" in form or "status" not in form:
        raise BadRequest("list-jobs.json needs either id or status: list-jobs.json?status=ACTIVE")
    groups = {"ACTIVE": ACTIVE, "COMPLETED": COMPLETED, **{s.value: (s,) for s in Status}}
    statuses = groups.get(form.pop("status"))
    if statuses is None:
        raise BadRequest(f"there is no such status; use one of {', '.join(groups)}")
    limit = form.pop("limit", None)
    count = None if limit is None else checked("limit", parse_whole, limit, 1, 10**9)
    return {"jobs": daemon.list_jobs(statuses, **form, limit=count)}


def cancel(daemon: Daemon, **form: str) -> dict[str, Any]:
    """Answer cancel-job.json: a job by its `id`, or all of a `project`, or of its `spider`."""
    if form.keys() == {"id"}:
        return daemon.cancel(form["id"])
    if "id" in form or "project" not in form:
        raise BadRequest("cancel-job.json needs either id, or project and maybe spider")
    return daemon.cancel_all(form["project"], form.get("spider"))


GETS, POSTS = (
    {f"/{route.name}": route for route in routes}
    for routes in (
        (
            Route("status.json", Daemon.status),
            Route("list-projects.json", Daemon.list_projects),
            Route("list-spiders.json", Daemon.list_spiders, ("project",)),
            Route("list-jobs.json", list_jobs, (),
                  ("status", "id", "project", "spider", "scheduled_by", "limit")),
        ),
        (
            Route("push-project.json", lambda daemon, archive: daemon.push(archive), ("archive",)),
            Route("schedule-job.json", Daemon.schedule, ("project", "spider", "when"),
                  ("description", "payload", "timeout", "priority", "items", "arg", "setting"),
                  ("spider", "arg", "setting")),
            Route("cancel-job.json", cancel, (), ("id", "project", "spider")),
            Route("remove-project.json", Daemon.remove, ("name",)),
        ),
    )
)  # fmt: skip
LOG_ROUTE = Route("get-log", Daemon.status, (), ("follow", "tail"))
SCRAPYD_ROUTES = {  # which people try here, and the route that does the same
    "/addversion.json": "/push-project.json", "/daemonstatus.json": "/status.json",
    "/schedule.json": "/schedule-job.json", "/cancel.json": "/cancel-job.json",
    "/listjobs.json": "/list-jobs.json?status=ACTIVE", "/listspiders.json": "/list-spiders.json",
    "/listprojects.json": "/list-projects.json", "/delproject.json": "/remove-project.json",
}  # fmt: skip
ROBOTS = b"User-agent: *\nDisallow:\n"  # spiders are tried on the daemon's own status


class Wire(io.RawIOBase):
    """Reads a connection until a deadline; a timeout of the socket counts for each read anew."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self.seconds = connection, seconds  # for a request to arrive
        self.deadline = time.monotonic() + seconds
        if hasattr(connection, "cipher"):  # TLS ignores the timeout that the listener hands on
            connection.settimeout(seconds)

    def readable(self) -> bool:
        """Tell io.BufferedReader that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived; 0 is the end. Raise TimeoutError at the deadline."""
        if time.monotonic() > self.deadline:
            raise TimeoutError
        try:
            return self._connection.recv_into(buffer)
        except OSError as error:  # BlockingIOError is the timeout of the system
            is_late = isinstance(error, (BlockingIOError, TimeoutError))
            raise TimeoutError if is_late else ConnectionError from None


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer the requests of a connection, one after another, in a thread of its own."""

    server: Server
    headers: Any  # a dictionary by lower-case name
    rfile: Any  # io.BufferedReader
    raw_requestline: bytes  # as http.server has read it
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Begin a connection, see socketserver.BaseRequestHandler."""
        self.connection = self.request
        self.wire = Wire(self.connection, self.server.rules.request_timeout)
        self.rfile = io.BufferedReader(self.wire, CHUNK_BYTES)
        self.wfile = io.BytesIO()  # http.server flushes it; answers are sent by `_send`
        self.is_known = False  # it has shown a password
        self.accepted = time.monotonic()
        self.idle_since: float | None = self.accepted  # None while a request is being answered
        self.is_read = True  # all of the request
        self.command = ""
        self.server.note(self)

    def finish(self) -> None:
        """End a connection. A reset would take the last answer along, so read on for a moment."""
        with contextlib.suppress(OSError):
            if not self.is_read:
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(LINGER_SECONDS)
                self.wire.deadline = time.monotonic() + LINGER_SECONDS
                while self.rfile.read1(CHUNK_BYTES):
                    pass
        self.server.forget(self)

    def handle_one_request(self) -> None:
        """Read and answer a request; the connection is idle until its head is there."""
        self.idle_since = time.monotonic()
        self.wire.deadline = self.idle_since + self.wire.seconds
        self.is_read = self.close_connection = True
        try:
            super().handle_one_request()
        except (OSError, ClientGone):  # it went, or was told to go
            self.close_connection = True

    def parse_request(self) -> bool:
        """Read the head of a request; False when it was refused, see http.server."""
        self.close_connection, self.command, self.is_old = True, "", False
        try:
            self._read_head()
        except ScrapyDoError as error:
            if isinstance(error, WrongPassword):
                self._pause(PENALTY_SECONDS)
            self._refuse(error)
            return False
        self.idle_since = None
        return True

    def _read_head(self) -> None:
        self.is_read = False
        if len(self.raw_requestline) > URL_BYTES:
            raise ScrapyDoError("the address is too long; parameters may go in a POST body", 414)
        match = REQUEST_LINE.fullmatch(self.raw_requestline)
        if match is None or match[3] != b"1":
            raise BadRequest("this is not a request line of HTTP/1.1")
        self.command, self.path = match[1].decode(), match[2].decode("latin-1")
        self.is_old = match[4] == b"0"
        self.headers = read_headers(self.rfile)
        if absolute := ABSOLUTE_TARGET.match(self.path):  # its host counts, RFC 9112 section 3.2.2
            self.headers["host"] = absolute[1]
        if not self.is_old and "host" not in self.headers:
            raise BadRequest("the Host header is missing")
        self.length = body_length(self.headers)
        self.is_read = self.length == 0
        wish = self.headers.get("connection", "").lower()
        self.close_connection = "close" in wish or (self.is_old and "keep-alive" not in wish)
        self.is_known = self.server.guard.check(self)

    def do_GET(self) -> None:
        """Answer a request of any method, and log what fails."""
        try:
            self._answer()
        except ScrapyDoError as error:
            self._refuse(error)
        except TimeoutError:
            self._refuse(ScrapyDoError("the request took too long to arrive", 408))
        except (ClientGone, ConnectionError):
            self.close_connection = self.is_read = True
        except OSError as error:
            self._refuse(StorageError(f"the disk does not take it: {error.strerror}"))
        except Exception:
            log_crash("answering a request")
            self._refuse(ScrapyDoError("the daemon met an error of its own; see its log"))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what http.server itself does not understand."""
        self.close_connection, self.is_read = True, False
        self._refuse(ScrapyDoError(message or "the request is not understood", code))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of a connection on which nothing came in time."""

    def _answer(self) -> None:
        path, _, query = ABSOLUTE_TARGET.sub("", self.path).partition("?")
        path = Text("the path").decoded(path)
        log_path = LOG_PATH.fullmatch(path)
        is_get = path in GETS or path in ("/", "/robots.txt") or log_path is not None
        if not is_get and path not in POSTS:
            raise NotFound(explain_path(path))
        if self.command not in (methods := ("GET", "HEAD") if is_get else ("POST",)):
            how = "leave out -d, -F and -X" if is_get else "curl does that with -F or -d"
            what = f"{quoted(path)} is asked for by {methods[0]}: {how}"
            raise ScrapyDoError(what, 405, [("Allow", ", ".join(methods))])
        if path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.encode(), PAGE_HEADERS)
        elif path == "/robots.txt":
            self._send(200, LOG_TYPE, ROBOTS)
        elif log_path:
            self._send_log(query, *log_path.groups())
        else:
            self._call(GETS.get(path) or POSTS[path], query)

    def _call(self, route: Route, query: str) -> None:
        """Read the parameters of a route, and send what its function answers."""
        form = Form(route, self.server.daemon)
        try:
            if f"/{route.name}" in GETS:
                if query:
                    read_query(Source(query.encode("latin-1")), form)
            elif query:
                how = "by curl -F or -d, not in the address"
                raise BadRequest(f"{route.name} takes its parameters {how}")
            else:
                self._read_body(route, form)
            answer = route.answer(self.server.daemon, **form.values())
        finally:
            if form.upload:
                with contextlib.suppress(OSError):
                    self.server.daemon.clear_upload(form.upload)
                    form.file.close()
        self._send_json(200, {"status": "ok", **answer})

    def _read_body(self, route: Route, form: Form) -> None:
        is_push = "archive" in route.required
        most = self.server.rules.max_upload * MIB if is_push else 2 * TEXT_BYTES
        body = Body(self, self.length, most)
        expected = self.headers.get("expect", "").lower()
        if expected not in ("", "100-continue"):
            raise ScrapyDoError(f"the expectation {quoted(expected)} cannot be met", 417)
        if expected and not self.is_old and not self.is_read:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        read_body(body, self.headers.get("content-type", ""), form)

    def _refuse(self, error: ScrapyDoError) -> None:
        if error.status != 401 or isinstance(error, WrongPassword):  # a challenge is no event
            what = f"{self.command} {self.path:.100}" if self.command else "a request"
            log(f"{what} from {self.client_address[0]} got {error.status}: {error!s:.300}")
        self._send_json(error.status, {"status": "error", "msg": str(error)}, error.headers)

    def _send_json(self, status: int, answer: dict[str, Any], headers: Headers = ()) -> None:
        data = (encode_answer(answer) + "\n").encode("utf-8", "backslashreplace")
        self._send(status, "application/json", data, headers)

    def _send(
        self, status: int, kind: str, data: bytes, headers: Headers = (), length: int | None = -1
    ) -> None:
        """Send the head and the beginning of an answer at once: two writes meet Nagle, RFC 896.

        `length` is that of the whole answer, by default of `data`; None sends it in chunks, RFC
        9112 section 7.1, or to HTTP/1.0 up to the end.
        """
        frame = f"Content-Length: {len(data) if length == -1 else length}"
        if length is None:
            frame = "Transfer-Encoding: chunked" if not self.is_old else "Connection: close"
        is_endless = length is None and self.is_old
        self.close_connection = self.close_connection or not self.is_read or is_endless
        lines = [
            f"HTTP/1.1 {status} {self.responses.get(status, ('Refused',))[0]}",
            f"Content-Type: {kind}", frame, f"Date: {http_date(int(time.time()))}",
            "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
            f"Connection: {'close' if self.close_connection else 'keep-alive'}",
            *(f"{name}: {value}" for name, value in headers), "\r\n",
        ]  # fmt: skip
        head = "\r\n".join(lines).encode("latin-1", "replace")
        self._write(head if self.command == "HEAD" else head + data)

    def _write(self, data: bytes) -> None:
        """Send data. Raise ClientGone when the client does not take it in time."""
        try:
            self.connection.sendall(data)
        except OSError:
            raise ClientGone from None

    def _pause(self, seconds: float) -> None:
        """Wait a moment. Raise ClientGone when the client goes meanwhile."""
        before = self.connection.gettimeout()
        self.connection.settimeout(seconds)
        self.wire.deadline = time.monotonic() + self.wire.seconds
        with contextlib.suppress(TimeoutError):
            if not self.rfile.peek(1):
                raise ClientGone
            time.sleep(seconds)  # it has sent its next request already
        self.connection.settimeout(before)

    def _send_log(self, query: str, identifier: str, stream: str) -> None:
        """Send what a log holds now, a part of it, or all that comes until its job has ended."""
        form = Form(LOG_ROUTE, self.server.daemon)
        read_query(Source(query.encode("latin-1")), form)
        values = {k: checked(k, parse_whole, v, 0, 10**9) for k, v in form.values().items()}
        path = self.server.daemon.log_path(identifier, stream)
        with open_log(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = tail_start(file, size, values.get("tail"))
            if not values.get("follow"):
                self._send_part(file, start, size, "tail" in values)
                return
        self._follow(path, identifier, start)

    def _send_part(self, file: IO[bytes], start: int, size: int, is_tail: bool) -> None:
        """Send a log from `start`, or the range of bytes that is asked for, RFC 9110 section 14."""
        status, end, headers = 200, size, [("Accept-Ranges", "bytes")]
        asked = BYTE_RANGE.fullmatch(self.headers.get("range", ""))
        if asked and not is_tail:
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last or 0))
            end = min(size, int(last) + 1) if first and last else size
            if start >= end:
                headers = [("Content-Range", f"bytes */{size}")]
                raise ScrapyDoError(f"the log has {size} bytes; nothing is there", 416, headers)
            status = 206
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{size}"))
        file.seek(start)
        piece = file.read(min(CHUNK_BYTES, end - start))
        self._send(status, LOG_TYPE, piece, headers, length=end - start)
        left = 0 if self.command == "HEAD" else end - start - len(piece)
        while left:
            piece = file.read(min(CHUNK_BYTES, left))
            if not piece:
                raise ClientGone  # the log was cut short, so the client must not wait for the rest
            self._write(piece)
            left -= len(piece)

    def _follow(self, path: Path, identifier: str, start: int) -> None:
        """Send a log as it grows, until its job has ended.

        When the daemon stops or reloads before, the answer is cut, so that the client can tell.
        """
        daemon = self.server.daemon
        self._send(200, LOG_TYPE, b"", length=None)
        while self.command != "HEAD":
            is_over = not daemon.is_logging(identifier)  # asked before the log is read
            with open_log(path) as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(start if start <= size else 0)  # a log that has become shorter is new
                while piece := file.read(CHUNK_BYTES):
                    self._write(piece if self.is_old else b"%x\r\n%b\r\n" % (len(piece), piece))
                start = file.tell()
            if is_over:
                self._write(b"" if self.is_old else b"0\r\n\r\n")
                return
            if daemon.is_closing or self.server.is_draining:
                raise ClientGone
            self._pause(FOLLOW_SECONDS)


@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    """Return POSIX seconds as HTTP writes them, RFC 9110 section 5.6.7; the names stay English."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))


def explain_path(path: str) -> str:
    """Return what to ask for instead of a path that does not exist."""
    if path in SCRAPYD_ROUTES:
        return f"that is a route of scrapyd; here it is {SCRAPYD_ROUTES[path]}"
    if path.startswith("/get-log/data/"):
        return "a log is get-log/data/ID.err or ID.out, with the identifier of a job for ID"
    paths = ", ".join(["/", *GETS, *POSTS, "/get-log/data/ID.err"])
    return f"there is no {quoted(path)}; the paths are {paths}"


def tail_start(file: IO[bytes], size: int, lines: int | None) -> int:
    """Return where the last lines of a file begin; None stands for all lines."""
    if not lines:
        return 0 if lines is None else size
    for start in reversed(range(0, size - 1, CHUNK_BYTES)):
        file.seek(start)
        # The line feed at the very end begins no other line.
        block = file.read(min(CHUNK_BYTES, size - 1 - start))
        count = block.count(b"\n")
        if count >= lines:
            return start + len(block.rsplit(b"\n", lines)[0]) + 1
        lines -= count
    return 0


class Server(http.server.ThreadingHTTPServer):
    """Accept connections, each of which gets a thread; a thread is used again when it ends."""

    daemon_threads = True
    block_on_close = False  # so that socketserver keeps no list of all threads

    def __init__(self, listening: socket.socket, daemon: Daemon, rules: Rules):
        """Take the connections of a socket that listens."""
        # What server_bind would do asks DNS for a name.
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.daemon, self.rules, self.guard = daemon, rules, Guard(rules)
        self.is_draining = False  # followers of logs are to go
        self._lock = threading.Lock()  # for the open connections, see `make_room`
        self._open: dict[Handler, None] = {}
        self._count = 0  # of connections that have been accepted and not ended
        self._idle = threading.Semaphore(0)  # counts threads without a connection
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # `accept` would block when the client has gone already. Connections inherit the options;
        # with these timeouts a read takes a system call, and with Python's own two.
        listening.setblocking(False)
        seconds = struct.pack("ll", *divmod(int(rules.request_timeout * 1e6), 10**6))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve_until(self, signals: socket.socket) -> bytes:
        """Serve until something can be read from `signals`, and return that."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(signals, select.POLLIN)
        while signals.fileno() not in dict(poll.poll()):
            self._accept()
        return signals.recv(CHUNK_BYTES)

    def _accept(self) -> None:
        """Give a connection to a thread, as socketserver's _handle_request_noblock does."""
        try:
            request, address = self.get_request()
        except (BlockingIOError, ConnectionError):  # the client has gone at once
            return
        except OSError as error:
            log(f"no connection can be accepted: {error.strerror}")
            time.sleep(DESCRIPTOR_SECONDS)
            return
        with self._lock:
            self._count += 1
        try:
            if self.rules.tls:
                request = self.rules.tls.wrap(request)
            if not self._make_room():
                raise Unavailable("too many connections; ask again later, or see --max-connections")
            self.process_request(request, address)
        except (OSError, RuntimeError, ScrapyDoError) as error:  # RuntimeError: no thread
            self._turn_away(request, str(error))

    def _turn_away(self, request: socket.socket, reason: str) -> None:
        body = encode_json({"status": "error", "msg": reason}) + "\n"
        head = "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(0)
            request.send((head + body).encode())
        self._end(request)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread without a connection take it, or a new thread: that takes 0.2 ms."""
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._run, name="http", daemon=True).start()
        self._work.put((request, client_address))

    def _run(self) -> None:
        """Do the work of a thread, until there is none for a while."""
        while True:
            try:
                request, address = self._work.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                if self._idle.acquire(blocking=False):
                    return
                continue  # a connection is on its way to this thread
            try:
                self.finish_request(request, address)
            except Exception:
                log_crash("a connection")
            self._end(request)
            self._idle.release()

    def _end(self, request: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            request.close()
        with self._lock:
            self._count -= 1

    def note(self, handler: Handler) -> None:
        """Keep a connection in mind that may have to give way to another."""
        with self._lock:
            self._open[handler] = None

    def forget(self, handler: Handler) -> None:
        """Forget a connection that ends."""
        with self._lock:
            self._open.pop(handler, None)

    def _make_room(self) -> bool:
        """Tell whether a new connection may stay. The one idle for longest gives way to it.

        Where users are wanted, first those which have not shown a password.
        """
        end = time.monotonic() + GRACE_SECONDS
        while self._count > self.rules.max_connections:
            with self._lock:
                idle = [h for h in self._open if h.idle_since is not None]
                first = min(idle, key=lambda h: (h.is_known, h.idle_since), default=None)
                is_free = first is not None and (
                    (self.rules.users is not None and not first.is_known)
                    or time.monotonic() - (first.idle_since or 0.0) > GRACE_SECONDS
                )
                if first is not None and is_free:
                    self._open.pop(first)
                    with contextlib.suppress(OSError):
                        first.connection.shutdown(socket.SHUT_RDWR)
                    return True
            if time.monotonic() > end:
                return False
            time.sleep(DESCRIPTOR_SECONDS / 5)
        return True

    def drain(self, seconds: float) -> None:
        """Wait for the requests that are being answered, but no longer than so many seconds.

        A connection that was just accepted has a request on its way.
        """
        self.is_draining = True
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            idle = [h for h in list(self._open) if h.idle_since is not None]
            quiet = [h for h in idle if h.command or now > h.accepted + GRACE_SECONDS]
            if self._count <= len(quiet):
                break
            time.sleep(DESCRIPTOR_SECONDS / 5)
        self.is_draining = False


# ---- 8. Command line -------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IS_CHECKED = 0  # comes among the numbers of signals when a new program has been checked
HANDOVER = "SCRAPY_DO_HANDOVER"  # in the environment: this process and its listening socket
BACKLOG_COUNT = 1024  # connections that the kernel keeps until they are accepted
CHECK_SECONDS = 20.0  # that a new program may take to say its version
DRAIN_SECONDS = 2.0  # for the last answers at a stop or reload
SWITCH_SECONDS = 0.001  # after which a busy thread lets others go on; Python's own is 5 ms


def option(parse: Callable[..., Any], *bounds: float) -> Callable[[str], Any]:
    """Return the check of an option, for argparse."""

    def check(text: str) -> Any:
        """Return the value of the option."""
        try:
            return parse(text, *bounds)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def parse_command(text: str) -> Strings:
    """Split a command as a shell does; a path is taken from where the daemon is started."""
    import shlex

    words = shlex.split(text)
    if not words:
        raise ValueError("is empty")
    return (os.path.abspath(words[0]) if "/" in words[0] else words[0], *words[1:])


OPTIONS = {  # by group: the name, the check, the name of the value, and the meaning
    "where": (
        ("--host", str, "HOST", "address to listen on, by default only for this machine"),
        ("--port", option(parse_whole, 0, 65535), "PORT", "port to listen on, 0 for any"),
        ("--data-dir", Path, "DIR", "folder in which everything is kept"),
    ),
    "crawls": (
        ("--scrapy", option(parse_command), "CMD", "the command that is Scrapy; {project} in it "
         "stands for the project's name (default: this Python's -m scrapy)"),
        ("--job-slots", option(parse_whole, 1, 1000), "COUNT", "crawls that run at once"),
        ("--project-slots", option(parse_whole, 0, 1000), "COUNT", "of one project, 0: no limit"),
        ("--spider-slots", option(parse_whole, 0, 1000), "COUNT", "of one spider, 0: no limit"),
        ("--job-timeout", option(parse_seconds), "SECONDS", "of jobs without one, 0: no limit"),
        ("--kill-after", option(parse_seconds), "SECONDS", "from SIGTERM to SIGKILL"),
        ("--list-timeout", option(parse_seconds, 1), "SECONDS", "for 'scrapy list' at a push"),
        ("--on-finish", option(parse_command), "CMD", "run after each job, which is its input"),
    ),
    "finished jobs": (
        ("--completed-cap", option(parse_whole, 1, 10**6), "COUNT", "how many are kept"),
        ("--keep-days", option(parse_whole, 0, 10**5), "DAYS", "for how long, 0: no limit"),
        ("--keep-mib", option(parse_whole, 0, 10**9), "MIB", "of logs in all, 0: no limit"),
    ),
    "clients": (
        ("--auth-file", Path, "FILE", "users who may come in, a line USER:PASSWORD each"),
        ("--tls-cert", Path, "FILE", "certificate chain; with it only HTTPS is spoken"),
        ("--tls-key", Path, "FILE", "its private key, if that is in a file of its own"),
        ("--tls-password-file", Path, "FILE", "the password of the key, if it has one"),
        ("--max-upload", option(parse_whole, 1, 10**6), "MIB", "largest body of a request"),
        ("--max-connections", option(parse_whole, 1, 10**5), "COUNT", "connections at once"),
        ("--request-timeout", option(parse_seconds, 1), "SECONDS", "for a request to arrive"),
    ),
}  # fmt: skip


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; None takes them from the command line. Wrong ones end with status 2."""
    # To find out the width of a terminal takes argparse imports of 2 ms and 0.6 MiB.
    wide = functools.partial(argparse.HelpFormatter, width=79, max_help_position=28)
    parser = argparse.ArgumentParser(
        prog="scrapy-do", description=(__doc__ or "").splitlines()[0], allow_abbrev=False,
        fromfile_prefix_chars="@", formatter_class=wide,
        epilog="@FILE takes options from a file, one word a line. The README explains all.",
    )  # fmt: skip
    defaults = {**Settings()._asdict(), **Rules()._asdict(), "allow_host": []}
    defaults |= {"host": "127.0.0.1", "port": 7654, "data_dir": Path("scrapy-do-data")}
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, check, metavar, meaning in rows:
            value = defaults.get(name[2:].replace("-", "_"))
            shown = f" ({value:g})" if isinstance(value, float) else f" ({value})"
            shown = shown if value is not None and not isinstance(value, tuple) else ""
            group.add_argument(name, type=check, metavar=metavar, help=meaning + shown)
    group.add_argument("--no-auth", action="store_true", help="let in everybody on any --host")
    more = "one more name of this machine, or NAME:PORT; may be repeated"
    group.add_argument("--allow-host", action="append", metavar="NAME", help=more)
    parser.add_argument("--version", action="store_true", help="say the version, and no more")
    parser.set_defaults(**defaults)
    options = parser.parse_args(argv)
    if options.auth_file and options.no_auth:
        parser.error("--auth-file and --no-auth contradict each other")
    if (options.tls_key or options.tls_password_file) and not options.tls_cert:
        parser.error("--tls-key and --tls-password-file need --tls-cert")
    return options


def check_exposure(host: str, options: argparse.Namespace) -> None:
    """Raise ScrapyDoError if the daemon would let in whoever reaches a host."""
    is_local = host.startswith("127.") or host in ("::1", "localhost")
    if not (is_local or options.auth_file or options.no_auth):
        advice = "name users by --auth-file, or say --no-auth if a proxy or firewall checks them"
        raise ScrapyDoError(f"whoever reaches {host} could run code as this user; {advice}")


def read_rules(options: argparse.Namespace) -> Rules:
    """Return the rules of the server. Raise ScrapyDoError for files that will not do."""
    check_exposure(options.host, options)
    if options.auth_file:
        options.users = read_users(options.auth_file)
    if options.tls_cert:
        options.tls = Tls(options.tls_cert, options.tls_key, options.tls_password_file)
    if options.on_finish and not find_command(options.on_finish[0]):
        advice = f"run 'chmod +x {options.on_finish[0]}', or mend the path"
        raise ScrapyDoError(f"--on-finish {options.on_finish[0]} cannot be executed; {advice}")
    return Rules(**{name: getattr(options, name) for name in Rules._fields})


def find_command(name: str) -> str | None:
    """Return the path of a command, None when there is none."""
    import shutil

    return shutil.which(name)


def warn_of_surroundings(options: argparse.Namespace) -> None:
    """Log what will not work later, though the daemon can start."""
    import importlib.util

    scrapy = options.scrapy
    if scrapy == Settings().scrapy and importlib.util.find_spec("scrapy") is None:
        cure = f"run '{sys.executable} -m pip install scrapy', or see --scrapy"
        log(f"warning: Scrapy is not installed for {sys.executable}: {cure}")
    elif "{project}" not in scrapy[0] and not find_command(scrapy[0]):
        log(f"warning: there is no command '{scrapy[0]}'; install it, or see --scrapy")
    zone = os.environ.get("TZ", "").removeprefix(":")
    is_known = not zone or os.path.exists(os.path.join("/usr/share/zoneinfo", zone))
    if not is_known and not re.match(r"(<[^>]+>|[A-Za-z]{3,})[+-]?[0-9]", zone):
        log(f"warning: there is no time zone {quoted(zone)}, so times are UTC; set TZ to another")
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        log("SIGHUP is ignored, as nohup has it, so it does not reload")


def listen(options: argparse.Namespace) -> socket.socket:
    """Return a socket that listens, without asking DNS. Raise ScrapyDoError when it cannot be had.

    After a reload it is the former program's.
    """
    process, _, descriptor = os.environ.pop(HANDOVER, "").partition(" ")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        if process == str(os.getpid()):
            listening = socket.socket(fileno=int(descriptor))
            listening.set_inheritable(False)
        else:
            address = (options.host, options.port)
            listening = socket.create_server(address, family=family, backlog=BACKLOG_COUNT)
    except OSError as error:
        where = f"{options.host}, port {options.port}: {error.strerror or error}"
        advice = "choose another --port or --host, or stop the program that uses it"
        raise ScrapyDoError(f"cannot listen on {where}; {advice}") from None
    try:
        check_exposure(listening.getsockname()[0], options)  # after a reload it may be another
    except ScrapyDoError:
        listening.close()
        raise
    return listening


def tell_supervisor(state: str) -> None:
    """Tell the service manager that started the daemon how it is, see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        if address:
            wire.sendto(state.encode(), re.sub("^@", "\0", address))


def program() -> list[str]:
    """Return the command that has started this process."""
    return [sys.executable, *sys.orig_argv[1:]]


def check_program(wake: socket.socket) -> None:
    """Write IS_CHECKED to `wake` if the program, maybe a newer version, starts with our options."""
    now = time.monotonic_ns() // 1000
    tell_supervisor(f"RELOADING=1\nMONOTONIC_USEC={now}")
    try:
        asked = subprocess.run(
            [*program(), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=CHECK_SECONDS, env={k: v for k, v in os.environ.items() if k != HANDOVER},
        )  # fmt: skip
        problem = (asked.stderr.strip() or "it does not say its version").splitlines()[-1]
        is_good = asked.returncode == 0 and asked.stdout.startswith("scrapy-do ")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        is_good, problem = False, str(error)
    if is_good:
        wake.send(bytes([IS_CHECKED]))
    else:
        refuse_reload(f"the program cannot be started: {problem}")


def refuse_reload(problem: str) -> None:
    """Say that the present program goes on."""
    log(f"not reloaded, all goes on as before: {problem}; mend that and send SIGHUP again")
    tell_supervisor("READY=1")


def reexec(daemon: Daemon, server: Server, signals: socket.socket) -> None:
    """Execute the program anew in this process; return only if that is impossible.

    The lock is held: no child is started or reaped, and no record changes, until the next program
    has loaded them. Its children are ours, see execve(2), and clients wait at the same socket.
    """
    log("reloading; crawls run on")
    server.drain(DRAIN_SECONDS)
    with daemon.lock:
        if daemon.store.is_behind:
            refuse_reload(f"{daemon.store.folder} cannot be written, so the state is not saved")
            return
        if select.select([signals], [], [], 0)[0]:
            return  # somebody wants us to stop, or to reload again
        server.socket.set_inheritable(True)
        os.environ[HANDOVER] = f"{os.getpid()} {server.socket.fileno()}"
        # A signal that comes from now on stays pending, and is for the next program.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            os.execv(sys.executable, program())
        except OSError as error:
            refuse_reload(f"{sys.executable}: {error.strerror}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        server.socket.set_inheritable(False)
        del os.environ[HANDOVER]


def serve(options: argparse.Namespace, signals: socket.socket, wake: socket.socket) -> None:
    """Run the daemon until a signal stops it. Raise ScrapyDoError when it cannot start."""
    rules, is_reloaded = read_rules(options), HANDOVER in os.environ
    with listen(options) as listening, contextlib.ExitStack() as stack:
        store = Store(Path(os.path.realpath(options.data_dir)))
        stack.callback(store.close)
        settings = Settings(**{name: getattr(options, name) for name in Settings._fields})
        daemon = Daemon(store, settings)
        warn_of_surroundings(options)
        daemon.start(is_reloaded)
        server = Server(listening, daemon, rules)
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        url = f"{'https' if rules.tls else 'http'}://{host}:{port}"
        log(f"scrapy-do {__version__} listens on {url} and keeps everything in {store.folder}")
        tell_supervisor("READY=1")
        serve_until_stopped(daemon, server, signals, wake)
        tell_supervisor("STOPPING=1")
        log("stopping: crawls are being ended, their jobs will run again at the next start")
        listening.close()
        daemon.close()
        server.drain(DRAIN_SECONDS)


def serve_until_stopped(
    daemon: Daemon, server: Server, signals: socket.socket, wake: socket.socket
) -> None:
    """Serve, and reload when asked to, until a signal says to stop."""
    while not {signal.SIGTERM, signal.SIGINT} & set(numbers := server.serve_until(signals)):
        if signal.SIGHUP in numbers:
            threading.Thread(target=check_program, args=(wake,), daemon=True).start()
        if IS_CHECKED in numbers:
            reexec(daemon, server, signals)


def prepare_process() -> None:
    """Put right what a process may inherit, and what a daemon wants of the kernel."""
    # A file that is opened while a standard stream is closed would become that stream.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    # While SIGCHLD is ignored, the kernel keeps no exit codes of crawls.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError, ImportError):
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, see prctl(2)
    sys.setswitchinterval(SWITCH_SECONDS)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 when told to stop, 1 when the daemon cannot start.

    A signal writes a byte to a socket, see signal.set_wakeup_fd: a handler runs between two steps
    of the interpreter only, and might come just too late to end a wait.
    """
    options = parse_options(argv)
    try:
        if options.version:  # with all the files read, since `check_program` asks for that
            read_rules(options)
            print(f"scrapy-do {__version__}")
            return 0
        prepare_process()
        signals, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)  # SIG_IGN would be inherited
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent, or `reexec`, may block some
        serve(options, signals, wake)
    except ScrapyDoError as error:
        print(f"scrapy-do: {error}", file=sys.stderr)
        return 1
    return 0


# ---- 9. Page ---------------------------------------------------------------------------------

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>scrapy-do</title>
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark } h2 { margin: 1em 0 .3em } [type=checkbox] { align-self: start }
body { max-width: 74rem; margin: auto; padding: .8rem; font: 15px/1.45 system-ui, sans-serif }
ul { padding: 0; margin: 0 } ul:empty::before { content: attr(data-empty); opacity: .7 }
li { display: grid; grid-template-columns: 3fr 3fr 2fr 16.5rem; gap: 0 1rem; padding: .35rem 0;
  border-top: 1px solid #8884; overflow-wrap: anywhere } .wide { grid-template-columns: 1fr auto }
li > *, label, input, select, textarea, button { min-width: 0; max-width: 100%; font: inherit }
label { display: flex; flex-direction: column; flex: 1 1 15rem; font-size: .85rem }
form, .buttons { display: flex; flex-wrap: wrap; gap: .4rem; align-items: end; margin: .3rem 0 }
li button { font-size: .85rem; text-align: left; place-self: start } .buttons { margin: 0 }
pre, #message { white-space: pre-wrap; overflow-wrap: anywhere; overflow: auto; max-height: 75vh }
dialog { width: min(74rem, 100%); box-sizing: border-box } #log { height: 75vh }
#message { position: sticky; top: 0; background: Canvas; border: 1px solid; padding: .5rem }
#message::after { content: "\2715"; cursor: pointer } #message:empty, .empty .used { display: none }
.bars i { display: inline-block; width: 6px; margin-right: 2px; background: currentColor }
.soft { color: light-dark(#666, #aaa) } .good { color: light-dark(#1a7f37, #56d364) }
.bad { color: light-dark(#c62828, #ff8078) } .warn { color: light-dark(#a86400, #e3b341) }
@media (max-width: 50rem) { li { display: block } } [aria-busy=true] { opacity: .5 }
</style>
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
<main class="used">
  <label>Search for spiders, projects or identifiers<input type="search" id="search"></label>
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
let data, now, counts, code, spiders, reading, loaded = 0, turn = 0, next = 0, gathered = "";
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
const lasting = length => length < 120 ? `${length} s` : length < 7200 ? `${length / 60 | 0} min`
  : length < 172800 ? `${length / 3600 | 0} h` : `${length / 86400 | 0} d`;
const tell = (moment, ago = seconds(now) - seconds(moment)) => moment.slice(5, 19) +
  (ago < 0 ? `, in ${lasting(-ago)}` : `, ${lasting(ago)} ago`);
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
const results = ({stats, duration}) => `took ${lasting(duration || 0)}, ` + (stats ?
  `${stats.items} items, ${stats.responses} responses, ${stats.errors} errors` : "no statistics");
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
function projectRow({name, found, open}) {
  const about = make("summary", {}, make("b", {}, name), ` spiders: ${found.length}`);
  const remove = button("remove", event => confirm(`Remove the project ${name}?`)
    && act(event, () => post("remove-project.json", {name})), name);
  return make("li", {className: "wide"}, make("details", {open}, about, found.join(", ")), remove);
}
function show(id, records, row) {  // a row that says the same stays: no button goes under the mouse
  const list = find(id), focus = document.activeElement, rest = records.length - sizes[id];
  const old = new Map([...list.children].map(row => [row.text, row]));
  const wanted = records.slice(0, sizes[id]).map(it => {
    const text = JSON.stringify([it, data.specs.get(it.scheduled_by), runsOf(it.identifier)]);
    return old.get(text) || Object.assign(row(it), {text});
  });
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
function offer() {  // browsers are slow with thousands of options
  const names = spiders.get(fields.project.value) || [], typed = fields.spider.value;
  find("names").replaceChildren(...options(names.filter(it => it.includes(typed)).slice(0, 100)));
}
async function loadSpiders() {
  const {projects} = await ask("list-projects.json"), chosen = fields.project.value;
  spiders = new Map(await Promise.all(projects.map(async project =>
    [project, (await ask(`list-spiders.json?project=${encodeURIComponent(project)}`)).spiders])));
  fields.project.replaceChildren(...options(projects));
  if (spiders.has(chosen)) fields.project.value = chosen;
}
const jobsIn = async list => (await ask(`list-jobs.json?status=${list}`)).jobs;
function arrange([running, waiting, scheduled, finished]) {
  scheduled.sort((one, other) => one.next_run < other.next_run ? -1 : 1);
  return {running: [...running, ...waiting], scheduled, finished,
    failed: finished.filter(job => job.status === "FAILED"),
    runs: Map.groupBy(finished, job => job.scheduled_by),
    specs: new Map(scheduled.map(job => [job.identifier, job.schedule]))};
}
async function refresh(isForced) {
  const mine = ++turn, begun = performance.now(); next = Infinity;
  try {
    const status = await ask("status.json"), projects = `${status.projects} ${status.spiders}`;
    const news = JSON.stringify({...status, time: 0, uptime: 0, "cpu-usage": 0, "memory-usage": 0});
    now = status.time;
    if (isForced || news !== counts || begun > loaded + 30000) {
      if (isForced || projects !== code) await loadSpiders();
      const found = await Promise.all(lists.map(jobsIn));
      if (mine !== turn) return;
      [data, counts, code, loaded] = [arrange(found), news, projects, begun];
    }
    find("status").textContent = `${status.hostname}, up ${status.uptime}, ${now.slice(0, 19)}: ` +
      ["running", "pending", "scheduled"].map(it => `${status["jobs-" + it]} ${it}`).join(", ");
    document.body.className = spiders.size || data.finished.length ? "" : "empty";
    find("pushing").open ||= document.body.className === "empty"; paint();
  } catch (error) { find("status").textContent = `The daemon does not answer: ${error.message}`; }
  next = begun + 11 * (performance.now() - begun);  // spares a daemon that is busy
}
find("schedule").onsubmit = event => act(event, async () => {
  const lines = [...new FormData(event.target)].flatMap(([name, value]) =>
    (/arg|setting/.test(name) ? value.split("\n") : [value]).map(each => [name, each.trim()]));
  const made = await post("schedule-job.json", lines.filter(([, value]) => value));
  say([`Next run: ${made.next_run || "when a slot is free"}`, ...made.warnings || []].join("\n"));
});
find("push").onsubmit = event => act(event, async () => {
  say("Pushing...");
  const made = await ask("push-project.json", new FormData(event.target));
  say([`${made.name} has ${made.spiders.length} spiders.`, ...made.warnings].join("\n"));
});
find("search").oninput = paint; fields.spider.oninput = fields.spider.onfocus = offer;
find("message").onclick = () => say(""); find("viewer").onclose = () => reading.abort();
find("curl").textContent += new URL("push-project.json", location);
setInterval(() => { if (!document.hidden && performance.now() > next) refresh(); }, 3000);
refresh();</script>
"""


if __name__ == "__main__":
    sys.exit(main())
