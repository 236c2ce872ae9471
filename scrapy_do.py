#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["psutil>=5.9.6"]
# ///
"""Keep Scrapy projects, run their spiders now or on a schedule, and answer a small JSON API.

    curl ──> main, http ───> Daemon.push / schedule / cancel / remove ──┐ a change: a function of a Draft
                                                                        v
    timer ──(a schedule is due)────────────────────────────────────> writer ──> state.json, fsync ──> publish
                                                                        ^                                │
    slot-1 .. slot-N <──(a job is pending)──────────────────────────────┼────────────────────────────────┘
        └── working copy, Popen, wait, exit code ──(started, ended)─────┘

Threads
    main       accepts connections, waits for their requests and answers the quick ones, until SIGTERM or Ctrl-C writes
               a byte that it waits for, too.
    http       answer requests that take time, one each; idle ones are used again, then go.
    timer      sleeps until the next due time or deadline, and hands its key on. Never waits for the disk.
    writer     runs the changes, all that have gathered at once, on a draft of the records; writes the draft to the
               disk; then publishes it. What a reader sees is on the disk, or will be as soon as the disk takes it.
    slot-*     each takes the oldest pending job, starts its crawl and blocks until that has ended.
    on-finish  starts the command of --on-finish for one finished job after the other; there only with that option.
    reload     there only after SIGHUP: checks the program and freezes the daemon, before main executes it anew.

Locks
    Daemon._lock     guards the published records and all that is derived from them; held for memory work only.
    Timer._wake      guards the agenda; may be taken inside Daemon._lock, never the other way round.
    The main thread and the http threads share nothing but two queues of connections.
No thread unpacks, starts a process, syncs a file or reads from the network while it holds a lock.
"""
from __future__ import annotations

# Some modules that a start does not need are imported where they are used: they cost milliseconds and megabytes.
import argparse
import contextlib
import errno
import fcntl
import functools
import heapq
import io
import itertools
import json
import os
import queue
import random
import re
import selectors
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

try:
    import psutil
except ImportError:
    sys.exit("scrapy_do needs psutil, which is not installed: run 'python -m pip install psutil' and start again")

__version__ = "0.1.0"

MIB = 1024 * 1024
CHUNK_BYTES = 64 * 1024
HEAD_BYTES = 64 * 1024  # the longest request line and headers together
URL_BYTES = 8 * 1024
HEADERS_COUNT = 100
TEXT_BYTES = MIB  # the longest value of a parameter that is not an archive
REPEATS_COUNT = 100  # of a parameter that may be repeated,
REPEATS_BYTES = 100 * 1024  # and all its values together; Linux takes 128 KiB for one argument of a command
QUICK_LIST_BYTES = 256 * 1024  # up to which a list of jobs takes few milliseconds at the most
ARCHIVE_ENTRIES = 10_000
FOLDER_DEPTH = 50
ZIP_HEADER_BYTES = 30  # before the name of an entry and its data
ZIP_DIRECTORY_BYTES = 8 * MIB  # the longest list of entries; unpacking takes six times as much memory
CONFIG_BYTES = 8 * 1024  # the longest scrapy.cfg; ConfigParser takes time by the square of a line
ARCHIVE_BYTES = 1024 * MIB  # the most that an archive may unpack to
BODY_BYTES_PER_SECOND = 10 * 1024  # the least rate of an upload
IDLE_SECONDS = 10.0  # after which a thread without a connection ends
DRAIN_SECONDS = 2.0  # for the last answers when the daemon stops
LINGER_SECONDS = 2.0  # how long the rest of a refused body is read, so that the client sees the answer
GRACE_SECONDS = 1.0  # how long a connection may wait with its request before it gives way to a new one
FOLLOW_SECONDS = 0.2  # between looks at a log that is followed
DESCRIPTOR_SECONDS = 0.05  # until what needed a file descriptor is tried again when there was none
PENALTY_SECONDS = 1.0  # before a wrong password is answered
NONCE_SECONDS = 300
BACKLOG_COUNT = 1024  # connections that the kernel keeps until they are accepted
BATCH_COUNT = 256  # changes that share one write: bounds how long the records stay locked
FIRINGS_COUNT = 64  # schedules that fire in one write beside them: more would make requests wait for a burst
CHECK_SECONDS = 10.0  # that the program may take to say its version before a reload
FREEZE_SECONDS = 15.0  # for crawls that are being started or ended, before another program may begin
NOTICES_COUNT = 1000  # finished jobs that wait for the command of --on-finish
NOTICE_SECONDS = 60.0  # that the command may take
NOTICE_STOP_SECONDS = 3.0  # that all who wait for it have when the daemon stops
NOTICE_LOOK_SECONDS = 0.2  # between looks at whether it does
SWITCH_SECONDS = 0.001  # after which a thread that lists many jobs lets others go on; Python's own is 5 ms
RETRY_SECONDS = 2.0  # between attempts to save what the disk did not take
CLOCK_CHECK_SECONDS = 60.0  # a wait does not notice that the system clock was set
ENVIRONMENT_READS = 50
ENVIRONMENT_SECONDS = 0.0005  # between them; an exec takes less, unless its program comes from a slow disk
CALM_SCANS = 2  # that find nothing: of one a process may slip that was born while it went on
DAY_SECONDS = 86400
LAST_INSTANT = 253402214400.0  # 9999-12-31 00:00 UTC: still the year 9999 in every time zone

T = TypeVar("T")


# ---- 1. Errors -------------------------------------------------------------------------------------------------------


class ScrapyDoError(Exception):
    """Tell a user in one sentence what is wrong and what to do; `status` is the HTTP status that says so."""

    status = 500


class BadRequest(ScrapyDoError):
    """Refuse what was asked because the request itself is wrong."""

    status = 400


class SpecError(BadRequest):
    """Refuse a scheduling spec."""


class Forbidden(ScrapyDoError):
    """Refuse what a web page of somebody else may have asked a browser for."""

    status = 403


class NotFound(ScrapyDoError):
    """Say that there is no such path, project, spider or job."""

    status = 404


class Conflict(ScrapyDoError):
    """Refuse a change that the present state does not allow."""

    status = 409


class TooLarge(ScrapyDoError):
    """Refuse what is over a limit."""

    status = 413


class Unavailable(ScrapyDoError):
    """Refuse work because the daemon is stopping or has too much of it."""

    status = 503


class StorageError(ScrapyDoError):
    """Say that the disk did not take a change, which therefore did not happen."""

    status = 507


def new_identifier() -> str:
    """Return a random UUID, RFC 9562 section 5.4."""
    bits = int.from_bytes(os.urandom(16), "big") & ~(0xF << 76 | 0x3 << 62) | (0x4 << 76 | 0x2 << 62)
    return re.sub(r"(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", f"{bits:032x}")


def is_whole_number(text: str, least: int, most: int) -> bool:
    """Tell whether a text is a whole number in these bounds, without reading one of thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) <= 12 and least <= int(text) <= most


def log(message: str) -> None:
    """Write one line to stderr, with the local time; a line break in `message` cannot fake a second line."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    line = message if message.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal must not stop a crawl
        print(f"{stamp} {line}\n", end="", file=sys.stderr, flush=True)  # which may be None


def log_crash(what: str) -> None:
    """Write the traceback of the exception being handled, a line each."""
    try:
        import traceback

        text = traceback.format_exc()
    except OSError:  # no file descriptor is left for the module; whoever logs a crash must not end by that
        text = repr(sys.exc_info()[1])
    for line in f"{what} failed:\n{text}".splitlines():
        log(line)


# ---- 2. Scheduling spec ----------------------------------------------------------------------------------------------

SPEC_CHARACTERS = 1000
UNIT_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": DAY_SECONDS, "week": 7 * DAY_SECONDS}
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
TIME_FORMS = {  # unit: (what its time must look like, how to say so)
    "day": (r"([0-9]{1,2}):([0-9]{2})|([0-9]{2}):([0-9]{2}):([0-9]{2})", "HH:MM, H:MM or HH:MM:SS"),
    "hour": (r"([0-9]{2})?:([0-9]{2})", "MM:SS or :MM"),
    "minute": (r":([0-9]{2})", ":SS"),
}
SPEC_FORMS = (
    "now | every [N] second(s)|minute(s)|hour(s)|day(s)|week(s) [at TIME] | "
    "every A to B seconds|minutes|hours|days|weeks [at TIME] | every monday|...|sunday [at TIME]"
)


def _utc_offset(moment: float) -> int:
    """Return by how many seconds local clocks are ahead of UTC at a POSIX time."""
    return time.localtime(moment).tm_gmtoff


def _instant_of_wall(wall: float) -> float:
    """Return the first instant at which local clocks show `wall` or later.

    `wall` counts the seconds from 1970-01-01 00:00 as local clocks show them. In the gap of spring this is the first
    instant after it, in the fold of autumn the first pass: the reading of PEP 495 that people expect of an alarm clock.
    """
    before, after = _utc_offset(wall - DAY_SECONDS), _utc_offset(wall + DAY_SECONDS)
    for offset in (before, after):
        if _utc_offset(wall - offset) == offset:
            return wall - offset
    low, high = int(wall - after) - 1, int(wall - before) + 1  # the clocks jump over `wall` somewhere between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle + _utc_offset(middle) >= wall else (middle, high)
    return float(high)


class Recurrence(NamedTuple):
    """Say when a schedule is due: every `low` to `high` units, at a second of the minute, hour or day."""

    unit: str
    low: int = 1
    high: int = 1
    weekday: int | None = None  # 0 is Monday; the unit is then a week
    at: float | None = None  # seconds into the unit (of a week: into the day); None keeps those of the moment

    @property
    def is_elapsed(self) -> bool:
        """Tell whether the interval is elapsed time; otherwise it is days on the local calendar."""
        return self.unit in ("second", "minute", "hour")

    def anchored(self, origin: float) -> Recurrence:
        """Return the same recurrence with the time of day of `origin` where the spec left it open.

        Without it a run that a spring gap delayed would hand the delay on to all later ones.
        """
        if self.is_elapsed or self.at is not None:
            return self
        return self._replace(at=(origin + _utc_offset(origin)) % DAY_SECONDS)

    def next_after(self, moment: float, rng: Any = random) -> float:
        """Return the first due time after `moment`; both are POSIX seconds.

        `rng.randint` draws the number of units when the spec leaves it open. Raise SpecError when the due time would
        be past the year 9999.
        """
        if moment + (self.high + 2) * UNIT_SECONDS[self.unit] > LAST_INSTANT:  # a time of day may add one and an hour
            raise SpecError("the next run would be past the year 9999; choose a shorter interval")
        count = self.low if self.low == self.high else rng.randint(self.low, self.high)
        return self._next_elapsed(moment, count) if self.is_elapsed else self._next_local(moment, count)

    def _next_elapsed(self, moment: float, count: int) -> float:
        size = UNIT_SECONDS[self.unit]
        if self.at is None:
            return moment + count * size
        offset, later = _utc_offset(moment), _utc_offset(moment + size)
        due = ((moment + offset) // size + (count if count != 1 else 0)) * size + self.at - offset
        if due <= moment:
            due += size
        again = due + (offset - later) % size - size  # where clocks go back half an hour, the minute comes again sooner
        return again if count == 1 and again > moment and _utc_offset(again) == later else due

    def _wall_of(self, moment: float) -> float:
        """Return what local clocks show, or would have shown had no gap over midnight delayed a run to `moment`."""
        wall = moment + _utc_offset(moment)
        if self.at is None:
            return wall
        yesterday = (wall // DAY_SECONDS - 1) * DAY_SECONDS + self.at
        return yesterday if _instant_of_wall(yesterday) == moment else wall

    def _next_local(self, moment: float, count: int) -> float:
        day, time_of_day = divmod(self._wall_of(moment), DAY_SECONDS)
        step = count * UNIT_SECONDS[self.unit] // DAY_SECONDS
        if self.weekday is not None:
            day += (self.weekday - (day + 3)) % 7  # 1970-01-01 was a Thursday
        if count != 1 or (self.unit == "week" and self.weekday is None):  # only a day or weekday may still be to come
            day += step
        at = time_of_day if self.at is None else self.at
        due = _instant_of_wall(day * DAY_SECONDS + at)
        while due < moment + 1e-6:  # the sum above may round up; no two due times are that close
            day += step
            due = _instant_of_wall(day * DAY_SECONDS + at)
        return due

    def resume_after(self, due: float, now: float, rng: Any = random) -> float:
        """Return the first due time after `now` on the grid on which `due` lies, however many have passed.

        Most of the missed ones are leapt over as intervals of the greatest length, which is a possible draw.
        """
        longest = self.high * UNIT_SECONDS[self.unit]
        missed = int((now - due) // longest) - 2  # two less: a day of 25 hours, and the last steps are drawn
        if missed > 0:
            leap = missed * longest
            due = due + leap if self.is_elapsed else _instant_of_wall(self._wall_of(due) + leap)
        while due <= now:
            due = self.next_after(due, rng)
        return due

    def latest_after(self, moment: float) -> float:
        """Return the latest instant that `next_after(moment)` can give: no due time may be further away."""
        return self._replace(low=self.high).next_after(moment)


class _Words:
    """Hand out the words of a spec one by one, and complain about one in a way that helps."""

    def __init__(self, text: str):
        self.words = text.lower().split()
        self.place = 0

    def peek(self) -> str:
        """Return the next word, or "" at the end."""
        return self.words[self.place] if self.place < len(self.words) else ""

    def take(self) -> str:
        """Return the next word and step over it."""
        word = self.peek()
        self.place += 1
        return word

    def error(self, word: str, wanted: str) -> SpecError:
        """Return the error that says what was wanted in the place of `word`."""
        quoted = word if len(word) <= 40 else word[:37] + "..."
        found = f"'{quoted}' does not fit" if word else "it ends too early"
        return SpecError(f"schedule not understood: {found}: {wanted}. The forms are: {SPEC_FORMS}")

    def take_number(self) -> int:
        """Return the next word as a whole number from 1."""
        word = self.take()
        digits = word.lstrip("0")
        if not (word.isascii() and digits.isdigit()):
            raise self.error(word, "a whole number from 1 is wanted here")
        if len(digits) > 12:
            raise self.error(word, "the next run would be past the year 9999")
        return int(digits)


@functools.lru_cache(maxsize=1024)
def parse_spec(text: str) -> Recurrence | None:
    """Return when the spec says that a job is due; None is 'now'. Raise SpecError when it fits no form."""
    if len(text) > SPEC_CHARACTERS:
        raise SpecError(f"schedule not understood: it has more than {SPEC_CHARACTERS} characters")
    words = _Words(text)
    first = words.take()
    if first == "now":
        recurrence = None
    elif first == "every":
        recurrence = _parse_time(words, _parse_interval(words))
    else:
        raise words.error(first, "a schedule starts with 'now' or 'every'")
    if words.peek():
        raise words.error(words.peek(), "nothing may follow here")
    return recurrence


def _parse_interval(words: _Words) -> Recurrence:
    if words.peek() in WEEKDAYS:
        return Recurrence("week", weekday=WEEKDAYS.index(words.take()))
    low = high = 1
    ranged = False
    if words.peek()[:1].isdigit():
        low = high = words.take_number()
        if ranged := words.peek() == "to":
            words.take()
            high = words.take_number()
            if low > high:
                raise words.error(str(high), f"the second number must not be below the first, {low}")
    return Recurrence(_parse_unit(words, high, plural=ranged or high > 1), low, high)


def _parse_unit(words: _Words, most: int, plural: bool) -> str:
    word = words.take()
    unit = word.removesuffix("s")
    if unit not in UNIT_SECONDS or word not in (unit, unit + "s"):
        wanted = "a unit of time" if words.place > 2 else "a whole number from 1, a unit of time or a weekday"
        raise words.error(word, f"{wanted} is wanted here")
    if plural and word == unit:
        raise words.error(word, f"write '{' '.join(words.words[:words.place])}s'")
    if most * UNIT_SECONDS[unit] > LAST_INSTANT:
        raise words.error(str(most), "the next run would be past the year 9999")
    return unit


def _parse_time(words: _Words, recurrence: Recurrence) -> Recurrence:
    if words.peek() != "at":
        return recurrence
    form = "day" if recurrence.weekday is not None else recurrence.unit
    if form not in TIME_FORMS:
        raise words.error(words.take(), f"'{form}s' take no time; only minutes, hours, days and weekdays do")
    words.take()
    word = words.take()
    pattern, shown = TIME_FORMS[form]
    match = re.fullmatch(pattern, word)
    if match is None:
        raise words.error(word, f"the time of '{form}s' is written {shown}")
    numbers = [int(group) for group in match.groups() if group is not None]
    limits = (24, 60, 60) if form == "day" else (60, 60)
    if any(number >= limit for number, limit in zip(numbers, limits, strict=False)):
        raise words.error(word, "hours go from 00 to 23, minutes and seconds from 00 to 59")
    scale = {"day": 3600, "hour": 60, "minute": 1}[form]  # what the first number counts; each next one a 60th of it
    return recurrence._replace(at=sum(n * scale // 60**place for place, n in enumerate(numbers)))


# ---- 3. Records ------------------------------------------------------------------------------------------------------


class Status(str, Enum):
    """Where a job is in its life."""

    SCHEDULED = "SCHEDULED"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCESSFUL = "SUCCESSFUL"
    FAILED = "FAILED"
    CANCELED = "CANCELED"


class Actor(str, Enum):
    """Who asked for a run."""

    USER = "USER"
    SCHEDULER = "SCHEDULER"


ACTIVE = (Status.SCHEDULED, Status.PENDING, Status.RUNNING)
COMPLETED = (Status.SUCCESSFUL, Status.FAILED, Status.CANCELED)
BY_USER = "canceled by the user"
TRANSITIONS = {  # RUNNING goes back to PENDING when the daemon stops or dies under it
    Status.SCHEDULED: (Status.CANCELED, Status.FAILED),
    Status.PENDING: (Status.RUNNING, Status.CANCELED, Status.FAILED),
    Status.RUNNING: (Status.SUCCESSFUL, Status.FAILED, Status.CANCELED, Status.PENDING),
}


def local_time(moment: float) -> str:
    """Return POSIX seconds as local time with six decimals, like `2017-12-11 15:20:42.415793`."""
    whole, micro = divmod(round(moment * 1_000_000), 1_000_000)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(whole)) + f".{micro:06d}"


class Stats(NamedTuple):
    """What Scrapy counted in a crawl."""

    items: int = 0
    responses: int = 0
    errors: int = 0  # lines in the log
    finish_reason: str = ""


class Job(NamedTuple):
    """One scheduled, waiting, running or finished job. Times are POSIX seconds."""

    identifier: str
    status: Status
    actor: Actor
    schedule: str
    project: str
    spider: str
    timestamp: float
    description: str = ""
    payload: str = "{}"
    arg: tuple[str, ...] = ()  # NAME=VALUE each, like those of `setting`
    setting: tuple[str, ...] = ()
    timeout: float | None = None  # seconds that the crawl may take; None leaves it to --job-timeout
    origin: float = 0.0  # when it was made: gives `every day` its time of day
    due: float | None = None  # of a SCHEDULED job
    run: str | None = None  # of a SCHEDULED job: the job that it made last
    duration: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    stats: Stats | None = None  # of a run whose log has them
    cancel: bool = False  # of a RUNNING job: it has been told to end
    pid: int | None = None
    pid_created: float | None = None

    def view(self) -> dict[str, Any]:
        """Return what the API says of the job."""
        return {
            "identifier": self.identifier, "status": self.status.value, "actor": self.actor.value,
            "schedule": self.schedule, "project": self.project, "spider": self.spider,
            "description": self.description, "payload": self.payload,
            "args": list(self.arg), "settings": list(self.setting), "timeout": self.timeout,
            "timestamp": local_time(self.timestamp), "duration": self.duration,
            "next_run": None if self.due is None else local_time(self.due),
            "exit_code": self.exit_code, "reason": self.reason,
            "stats": None if self.stats is None else self.stats._asdict(),
        }  # fmt: skip

    def length(self) -> int:
        """Return about how many bytes `view` takes as JSON."""
        texts = (self.payload, self.description, self.reason or "", *self.arg, *self.setting)
        return 600 + sum(map(len, texts))

    def recurrence(self) -> Recurrence:
        """Return when the job is due. Raise SpecError for a spec that does not parse, or that is 'now'."""
        recurrence = parse_spec(self.schedule)
        if recurrence is None:
            raise SpecError("'now' is not a recurring schedule")
        return recurrence.anchored(self.origin)


class Project(NamedTuple):
    """One pushed project."""

    name: str
    spiders: tuple[str, ...]
    archive: str  # names the push that it came with
    folder: str  # of scrapy.cfg inside the archive, "" for its root
    settings: str  # the settings module that scrapy.cfg names, "" for none


Record = Job | Project
Sections = Mapping[str, Mapping[str, Record | None]]  # projects by their name, jobs by their identifier; None is gone
JOB_PATTERN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NAME_PATTERN = re.compile(r"\w[\w.-]{0,99}")
NAME_BYTES = 200  # a file name has at most 255, and the archive's has more than the project's
FIELD_TYPES: dict[str, type] = {  # all other fields are str
    "status": Status, "actor": Actor, "timestamp": float, "origin": float, "due": float, "duration": int,
    "exit_code": int, "cancel": bool, "pid": int, "pid_created": float, "spiders": list,
    "arg": list, "setting": list, "timeout": float,
    "stats": Stats, "items": int, "responses": int, "errors": int,
}  # fmt: skip
SHARED_FIELDS = ("schedule", "project", "spider", "description")  # thousands of jobs have the same, and one text for it
encode_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make such an encoder for each call


@functools.lru_cache(maxsize=1024)  # a job never changes, and whoever watches a list asks for the same ones again
def job_text(job: Job) -> str:
    """Return what the API says of a job as JSON."""
    return encode_json(job.view())


class Json(str):
    """Text that is JSON already."""


def encode_answer(answer: Mapping[str, Any]) -> str:
    """Return an answer as JSON.

    Lists of jobs come as text: to encode 10,000 of them in one call would keep all other threads waiting.
    """
    texts = [f', "{name}": {value}' for name, value in answer.items() if isinstance(value, Json)]
    others = {name: value for name, value in answer.items() if not isinstance(value, Json)}
    return encode_json(others)[:-1] + "".join(texts) + "}"


def is_project_name(name: str) -> bool:
    """Tell whether a project may have that name: letters of any script, digits, `_`, `-` and `.`."""
    return bool(NAME_PATTERN.fullmatch(name)) and len(name.encode()) <= NAME_BYTES


def encode_line(key: str, record: Record | None) -> bytes:
    """Return a record as a member of a JSON object, on one line, without the fields that have their default.

    One that is gone is null. What is not UTF-8 in the name of a file, and so in a reason, becomes an escape, which JSON
    has for it, too.
    """
    fields = None
    if record is not None:
        defaults, unset = record._field_defaults, object()
        fields = {name: value for name, value in record._asdict().items() if value != defaults.get(name, unset)}
        if isinstance(record, Job) and record.stats is not None:
            fields["stats"] = record.stats._asdict()
    return f"{encode_json(key)}: {encode_json(fields)}".encode("utf-8", "backslashreplace")


def encode_sections(sections: Sections) -> Iterator[bytes]:
    """Yield the members of a JSON object: one for each section, in it a line for each record."""
    for number, (section, records) in enumerate(sections.items()):
        yield b'%s"%s": {' % (b",\n" if number else b"", section.encode())
        for place, (key, record) in enumerate(records.items()):
            yield (b",\n" if place else b"\n") + encode_line(key, record)
        yield b"\n}"


def decode_record(kind: type[Any], fields: Any) -> Any:
    """Return the record that a JSON object describes. Raise ValueError that says which field is wrong."""
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r:.40} is not an object")
    try:
        return kind(**{name: _decode_field(name, value) for name, value in fields.items()})
    except (TypeError, ValueError):
        if unknown := sorted(fields.keys() - set(kind._fields)):
            raise ValueError(f"there is no field '{unknown[0]}'") from None
        if missing := [name for name in kind._fields if name not in fields and name not in kind._field_defaults]:
            raise ValueError(f"the field '{missing[0]}' is missing") from None
        raise


def _decode_field(name: str, value: Any) -> Any:
    wanted: Any = FIELD_TYPES.get(name, str)
    if wanted is type(value) is str:
        return sys.intern(value) if name in SHARED_FIELDS else value
    if wanted is Status or wanted is Actor:
        return wanted(value)
    if wanted is Stats:
        return decode_record(Stats, value)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted or (wanted is float and not 0 <= value <= LAST_INSTANT):
        raise ValueError(f"the field '{name}' cannot be {value!r:.40}")
    if wanted is list and not all(type(item) is str for item in value):
        raise ValueError(f"the field '{name}' must hold strings")
    return tuple(value) if wanted is list else value


def decode_project(name: str, fields: Any) -> Project:
    """Return the project that a JSON object describes. Raise ValueError that names it when it does not."""
    try:
        project: Project = decode_record(Project, fields)
        if project.name != name or not is_project_name(name):
            raise ValueError(f"'{project.name:.120}' is not its name")
    except ValueError as error:
        raise ValueError(f"project '{name:.120}': {error}") from None
    return project


def decode_job(identifier: str, fields: Any) -> Job:
    """Return the job that a JSON object describes, or when it does not, what is left of the job and the reason.

    An active job with a reason is one that cannot go on. Raise ValueError when not even the identifier is one.
    """
    if not JOB_PATTERN.fullmatch(identifier):
        raise ValueError(f"'{identifier:.60}' is not the identifier of a job")
    try:
        job: Job = decode_record(Job, fields)
        if job.identifier != identifier:
            raise ValueError(f"'{job.identifier:.60}' is not its identifier")
    except ValueError as error:
        names = ("schedule", "project", "spider", "description", "payload")
        known = fields if isinstance(fields, dict) else {}
        texts = {name: known[name] for name in names if isinstance(known.get(name), str)}
        job = Job(identifier, Status.SCHEDULED, Actor.USER, "", "", "", 0.0)
        return job._replace(reason=f"its record was not valid: {error}", **texts)
    return job


# ---- 4. Store --------------------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, see fsync(2)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a file, or a folder with all it holds, as far as that is possible."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    import shutil

    shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # a crawl may have left folders that even their owner cannot write to
        path.chmod(stat.S_IRWXU)
        for root, folders, _ in os.walk(path):
            for name in folders:
                with contextlib.suppress(OSError):
                    os.chmod(os.path.join(root, name), stat.S_IRWXU, follow_symlinks=False)
        shutil.rmtree(path, ignore_errors=True)


def open_log(path: Path) -> IO[bytes]:
    """Open a log; one that has not begun is empty. Raise NotFound for what is no log, like a link."""
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


CHANGES_BEGIN = b',\n"changes": [{}'  # the first one is empty, so that each other begins with a comma
CHANGE_BEGIN, STATE_END = b",\n{", b"]}\n"  # no line of a record ends or begins like that


def parse_state(data: bytes) -> Any:
    """Return the JSON document of a state file, without its last change if a crash has torn that.

    A part of an object, or one with zeros where the disk was not written, is no JSON; so what can be read is whole.
    Raise ValueError that names the place for damage of another kind: within what was written at once, followed by
    another change, or between the two ends of the last one.
    """
    try:
        return json.loads(data)
    except ValueError:
        if CHANGES_BEGIN not in data:
            raise
        text = data.decode("latin-1")  # a character for each byte; all marks of JSON are ASCII
        end = data.index(CHANGES_BEGIN) + len(CHANGES_BEGIN)
        with contextlib.suppress(ValueError):
            while data.startswith(CHANGE_BEGIN, end):
                _, end = json.JSONDecoder().raw_decode(text, end + len(CHANGE_BEGIN) - 1)
        rest = data[end:]
        is_edited = rest.startswith(CHANGE_BEGIN) and rest.endswith(b"}" + STATE_END) and b"\0" not in rest
        if is_edited or CHANGE_BEGIN in rest[1:]:
            raise
        document = json.loads(data[:end] + STATE_END)
        log(f"the state file ends with a change that a crash has cut off; its {len(rest)} bytes are left out")
        return document


def look_of(descriptor: int) -> tuple[int, ...]:
    """Return what tells a file from another one, or from itself after an edit, or when it has become a backup, too."""
    found = os.fstat(descriptor)
    return found.st_ino, found.st_nlink, found.st_size, found.st_mtime_ns


class Store:
    """The data directory: its lock, the state file, archives, logs and work folders.

    The state file is one JSON object. It holds the records as they were when it was written anew, and the changes that
    have been saved since, each an object of the same kind:

        {"version": 1,
        "projects": {
        "shop": {"name": "shop", "spiders": ["books"], ...}
        },
        "jobs": {
        "0c1f...": {"identifier": "0c1f...", "status": "PENDING", ...},
        "9a7e...": {"identifier": "9a7e...", "status": "SCHEDULED", ...}
        },
        "changes": [{},
        {"jobs": {
        "0c1f...": {"identifier": "0c1f...", "status": "RUNNING", ...},
        "9a7e...": null
        }}]}

    A change is written over the last two brackets and ends with new ones. It is on the disk before the next is written,
    so that a power cut can only spoil the last one, which nobody has been told of; `parse_state` leaves it out. As in
    SQLite's "powersafe overwrite", what lies before a write in the same sector of the disk is taken to be safe.
    """

    VERSION = 1

    def __init__(self, folder: Path):
        """Create and lock the folder. Raise StorageError when it is in use or cannot be written."""
        self.folder = folder
        self.state_file = folder / "state.json"
        self.projects, self.logs, self.work = folder / "projects", folder / "logs", folder / "work"
        self.spider_data = folder / "spider-data"
        self.is_behind = False  # the file lacks changes that have happened
        self._left: tuple[int, ...] = ()  # what the state file was like after the last write
        self._first_end = self._end = 0  # where its last two brackets were when it was written anew, and are now
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not any(folder.iterdir()):  # made for us, with the modes of a login
                folder.chmod(0o700)
            if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise StorageError(f"others may write to {folder}, and so run code as you: run 'chmod 700 {folder}'")
            self._lock = self._take_lock()
            if self.work.is_symlink():
                self.work.unlink()
            for path in (self.projects, self.logs, self.work, self.spider_data):
                path.mkdir(mode=0o700, exist_ok=True)
                if not path.is_symlink():  # one leads where its owner has seen to that
                    path.chmod(0o700)
        except OSError as error:
            raise StorageError(f"the data folder {folder} cannot be used: {error}; see --data-dir") from None

    def _take_lock(self) -> int:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StorageError(
                f"another scrapy_do is using the data folder {self.folder}; stop it, or choose another --data-dir"
            ) from None
        return descriptor

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._lock)

    def load(self) -> tuple[dict[str, Project], dict[str, Job]]:
        """Return the saved records, the jobs in the order in which they were made.

        Raise StorageError that names the file when it is not one that this version has written. What an interrupted
        change left behind is put right: a pushed archive gets its name, everything that no record knows is deleted.
        """
        try:
            sections = self._read() if os.path.lexists(self.state_file) else {"projects": {}, "jobs": {}}
            projects = {name: decode_project(name, fields) for name, fields in sections["projects"].items()}
            decoded = (decode_job(identifier, fields) for identifier, fields in sections["jobs"].items())
            jobs = {job.identifier: job for job in decoded}
            self._sweep(projects, jobs)
        except (OSError, ValueError, RecursionError) as error:
            message = f"{self.state_file} cannot be read: {error}. It was left as it is; mend it or move it away"
            raise StorageError(message) from None
        return projects, jobs

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return what the state file says of each record, a later change before an earlier one."""
        document = parse_state(self.state_file.read_bytes())
        if not isinstance(document, dict) or type(document.get("version")) is not int:
            raise ValueError("it is not an object with a 'version'")
        if document["version"] != self.VERSION:
            raise ValueError(f"it has version {document['version']}, this scrapy_do knows {self.VERSION}")
        if not isinstance(changes := document.get("changes", []), list) or not all(type(c) is dict for c in changes):
            raise ValueError("its 'changes' must be a list of objects")
        sections: dict[str, dict[str, Any]] = {"projects": {}, "jobs": {}}
        for change in [document, *changes]:
            for section, records in sections.items():
                if not isinstance(found := change.get(section, {}), dict):
                    raise ValueError("its 'projects' and 'jobs' must be objects")
                records.update(found)
        return {name: {key: fields for key, fields in records.items() if fields is not None}
                for name, records in sections.items()}  # fmt: skip

    def _sweep(self, projects: Mapping[str, Project], jobs: Mapping[str, Job]) -> None:
        for project in projects.values():
            self.adopt_archive(project)
        archives = {self.archive(name) for name in projects}
        for path in [*self.projects.glob("*.zip"), *self.projects.glob("*.new"), self.folder / "state.json.new"]:
            if path not in archives:
                remove_tree(path)
        for path in [*self.logs.glob("*.out"), *self.logs.glob("*.err")]:
            if path.stem not in jobs:
                remove_tree(path)

    def archive(self, name: str) -> Path:
        """Return where a project's archive is kept."""
        return self.projects / f"{name}.zip"

    def _staged_archive(self, project: Project) -> Path:
        return self.projects / f"{project.name}.{project.archive}.new"

    def stage_archive(self, upload: Path, project: Project) -> Path:
        """Make a pushed archive durable under a name that only its project's new record knows, and return that."""
        staged = self._staged_archive(project)
        try:
            with open(upload, "rb") as file:
                os.fsync(file.fileno())
            upload.replace(staged)
            sync_folder(self.projects)
        except OSError as error:
            raise StorageError(f"the archive was not saved: {error}") from None
        return staged

    def adopt_archive(self, project: Project) -> None:
        """Give a staged archive, whose project's record is on the disk now, its name; else `load` does it."""
        with contextlib.suppress(FileNotFoundError):
            self._staged_archive(project).replace(self.archive(project.name))

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
            self.log_file(identifier, stream).unlink(missing_ok=True)

    def new_work_path(self) -> Path:
        """Return a path in the work folder that nobody else uses."""
        return self.work / new_identifier()

    def work_copy(self, identifier: str) -> Path:
        """Return where the crawl of a job has its working copy."""
        return self.work / identifier

    def sweep_work(self, jobs: Collection[str]) -> None:
        """Delete all working copies but those of these jobs."""
        for path in self.work.iterdir():
            if path.name not in jobs:
                remove_tree(path)

    def write(self, records: Sections, changed: Mapping[tuple[str, str], Record | None]) -> None:
        """Save changed records, None for a deleted one, and return when they are on the disk.

        `records` are those that have been saved, or should have been: the file is written anew when that has failed,
        when somebody else has changed it, and when the changes have become longer than the rest. Raise StorageError
        when the disk does not take it all.
        """
        change: dict[str, dict[str, Record | None]] = {section: {} for section in records}
        for (section, key), record in changed.items():
            change[section][key] = record
        try:
            is_long = self._end > 4 * (self._first_end + MIB)
            if self.is_behind or is_long or not self._append({name: lines for name, lines in change.items() if lines}):
                self._replace({section: {**records[section], **change[section]} for section in records})
            self.is_behind = False
        except OSError as error:
            self.is_behind = True  # a write without its fsync may still reach the disk, so it must be replaced
            raise StorageError(f"the change was not saved, {self.folder} cannot be written: {error}") from None

    def tidy(self, records: Sections) -> None:
        """Write the file anew if it has changes at its end, or lacks some, and the disk takes it."""
        if self.is_behind or self._end > self._first_end:
            with contextlib.suppress(OSError):
                self._replace(records)

    def _append(self, change: Sections) -> bool:
        """Write a change over the last two brackets, and new ones after it; False when the file is not as it was."""
        data = b"".join([CHANGE_BEGIN, *encode_sections(change), b"}"])
        try:
            descriptor = os.open(self.state_file, os.O_WRONLY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            if look_of(descriptor) != self._left:
                return False
            if os.pwrite(descriptor, data + STATE_END, self._end) < len(data + STATE_END):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            self._left = look_of(descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # the file shall be as before, however soon this process ends
                os.ftruncate(descriptor, self._end + len(STATE_END))
                os.pwrite(descriptor, STATE_END, self._end)
            raise
        finally:
            os.close(descriptor)
        self._end += len(data)
        return True

    def _replace(self, records: Sections) -> None:
        """Write beside, sync, rename, sync the folder: after a crash the file is the old one or the new one."""
        living = {name: {k: r for k, r in section.items() if r is not None} for name, section in records.items()}
        temporary = self.folder / "state.json.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb", buffering=CHUNK_BYTES) as file:
            file.write(b'{"version": %d,\n' % self.VERSION)
            file.writelines(encode_sections(living))
            file.write(CHANGES_BEGIN)
            end = file.tell()
            file.write(STATE_END)
            file.flush()
            os.fsync(descriptor)
            self._left = look_of(descriptor)
        os.replace(temporary, self.state_file)
        sync_folder(self.folder)
        self._first_end = self._end = end


# ---- 5. Crawls -------------------------------------------------------------------------------------------------------

LIST_MODULE = "scrapy_do_spiders"
LIST_SETTINGS = """
from importlib import import_module
from scrapy.utils.misc import load_object

print({mark!r})
if {settings!r}:
    project = vars(import_module({settings!r}))
    globals().update({{name: value for name, value in project.items() if name.isupper()}})
loader = load_object(globals().get("SPIDER_LOADER_CLASS", "scrapy.spiderloader.SpiderLoader"))

class Marked(loader):
    def list(self):
        return [{mark!r} + name for name in super().list()]

SPIDER_LOADER_CLASS = "{module}.Marked"
"""


class ArchiveFile(io.BufferedReader):
    """A file that is read in short pieces only, which bounds the list of entries that zipfile makes of one."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > ZIP_DIRECTORY_BYTES:
            raise TooLarge(f"the archive's list of entries is longer than {ZIP_DIRECTORY_BYTES // MIB} MiB")
        return super().read(size)


class Layout(NamedTuple):
    """What `scrapy.cfg` says of an unpacked project."""

    name: str
    folder: str
    settings: str


def unpack(archive: Path, folder: Path) -> Layout:
    """Unpack a pushed archive into a new folder and return what its `scrapy.cfg` says.

    Raise BadRequest or TooLarge with the reason when it is not a project or not harmless; the folder may then exist.
    """
    import zipfile
    import zlib

    refusals = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
    try:
        with ArchiveFile(io.FileIO(archive)) as file, zipfile.ZipFile(file) as bundle:
            entries = bundle.infolist()
            check_entries(entries, bundle.start_dir)
            budget = ARCHIVE_BYTES
            folder.mkdir(mode=0o700)
            for entry in entries:
                with bundle.open(entry) as source:
                    budget -= extract(entry, source, folder, budget)
    except refusals as error:
        raise BadRequest(f"the archive is not a sound zip file: {error!s:.300}") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # zipfile has been led before the beginning of the file
            raise BadRequest("the archive is not a sound zip file: it is cut off") from None
        if error.errno in (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ):
            raise BadRequest(f"the archive holds a path that cannot be: {error!s:.300}") from None
        raise StorageError(f"the archive cannot be unpacked: {error}") from None
    return read_layout(folder, [entry.filename for entry in entries])


def check_entries(entries: list[Any], end: int) -> None:
    """Raise BadRequest or TooLarge for zip entries, up to a place in the file, that no honest project has."""
    if len(entries) > ARCHIVE_ENTRIES:
        raise TooLarge(f"the archive has {len(entries)} entries; at most {ARCHIVE_ENTRIES} are allowed")
    files: set[tuple[str, ...]] = set()
    folders: set[tuple[str, ...]] = set()
    for entry in entries:
        name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
        parts = tuple(name.rstrip("/").split("/"))
        if "\0" in entry.orig_filename or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise BadRequest(f"the archive holds an unsafe path, {name!r:.100}")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise BadRequest(f"the archive holds {name!r:.100}, neither a file nor a folder; links are refused")
        if entry.flag_bits & 1 or entry.compress_type not in (0, 8):
            raise BadRequest(f"the archive holds {name!r:.100} encrypted or not deflated; zip it plainly")
        if parts in files or len(parts) > FOLDER_DEPTH:
            raise BadRequest(f"the archive holds {name!r:.100} twice or too deep")
        files.add(parts)
        folders.update(parts[:depth] for depth in range(1, len(parts)))
    for entry in sorted(entries, key=lambda entry: -entry.header_offset):
        if entry.header_offset + ZIP_HEADER_BYTES + entry.compress_size > end:
            raise BadRequest("the archive is not a sound zip file: its entries overlap")
        end = entry.header_offset
    if len(files | folders) > ARCHIVE_ENTRIES:
        raise TooLarge(f"the archive has more than {ARCHIVE_ENTRIES} files and folders")


def extract(entry: Any, source: IO[bytes], folder: Path, budget: int) -> int:
    """Write one zip entry below a folder and return its size. Raise TooLarge past `budget` bytes.

    What counts is what comes out: the sizes in the archive may lie. Permissions survive, set-user-id bits do not.
    """
    path = folder / entry.filename
    mode = (entry.external_attr >> 16) & 0o777 if entry.create_system == 3 else 0
    if entry.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod((mode or 0o755) | stat.S_IRWXU)
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with open(path, "xb") as target:
        while chunk := source.read(MIB):
            size += len(chunk)
            if size > budget:
                raise TooLarge(f"the archive unpacks to more than {ARCHIVE_BYTES // MIB} MiB")
            target.write(chunk)
    if size != entry.file_size:
        raise BadRequest(f"the archive is not a sound zip file: {entry.filename!r:.100} has not the size it claims")
    path.chmod((mode or 0o644) | stat.S_IRUSR | stat.S_IWUSR)
    return size


def read_layout(folder: Path, names: list[str]) -> Layout:
    """Find and read the one `scrapy.cfg` of an unpacked archive. Raise BadRequest when that fails."""
    import configparser

    found = [name for name in names if name.split("/")[-1] == "scrapy.cfg"]
    if len(found) != 1:
        listed = f"several scrapy.cfg: {', '.join(found):.300}" if found else "no scrapy.cfg"
        raise BadRequest(f"the archive has {listed}; it must hold one project with one scrapy.cfg")
    if found[0].count("/") > 1:
        raise BadRequest(f"{found[0]:.300} is too deep; scrapy.cfg must be at the archive's root or one folder down")
    if (folder / found[0]).stat().st_size > CONFIG_BYTES:
        raise TooLarge(f"scrapy.cfg is longer than {CONFIG_BYTES} bytes")
    config = configparser.ConfigParser(interpolation=None)
    try:
        config.read_string((folder / found[0]).read_text(encoding="utf-8-sig"))
        name = config.get("deploy", "project", fallback="").strip()
    except (configparser.Error, UnicodeDecodeError) as error:
        raise BadRequest(f"scrapy.cfg cannot be read: {error!s:.500}") from None
    if not name:
        raise BadRequest("scrapy.cfg does not name the project; it needs [deploy] with 'project = NAME'")
    if not is_project_name(name):
        raise BadRequest(
            f"the project's name {name!r:.120} is not allowed: use letters, digits, '_', '-' and '.', at most 100, "
            "the first not '.' or '-'"
        )
    settings = config.get("settings", name, fallback=config.get("settings", "default", fallback=""))
    if not settings.isprintable():
        raise BadRequest(f"scrapy.cfg names the settings {settings!r:.100}, which cannot be a module")
    return Layout(name, os.path.dirname(found[0]), settings.strip())


def copy_tree(source: Path, target: Path) -> None:
    """Make a working copy: `.py` files are hard links, since crawls read them, all others are copies."""
    import shutil

    def link_or_copy(old: str, new: str) -> None:
        if old.endswith(".py"):
            with contextlib.suppress(OSError):  # a file system without links, or with too many of them
                os.link(old, new)
                return
        shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link_or_copy)


class Crawl:
    """A started command with everything that descends from it.

    What belongs to it is told by its session or by `SCRAPY_JOB` in its environment, which also a process that left
    the session and lost its parents still has.
    """

    def __init__(self, pid: int, identifier: str):
        """Take a child of this process, which runs the job of that identifier."""
        self.pid = pid
        self.is_over = False
        self.ended_for = ""  # why the daemon has asked it to end: "cancel", "stop" or "timeout"
        self.kill_at = 0.0  # when it is killed after that, as time.monotonic has it
        self._mark = f"SCRAPY_JOB={identifier}".encode()

    @classmethod
    def start(cls, command: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> Crawl:
        """Start the command; its output goes to new files. Raise OSError or ValueError when that fails."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK  # a link or a pipe fails
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(open(os.open(path, flags, 0o600), "wb")) for path in (out, err)]
            process = subprocess.Popen(
                [word.encode() for word in command],  # UTF-8, whatever the locale of the daemon
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=streams[0], stderr=streams[1],
                start_new_session=True,
            )  # fmt: skip
        process.returncode = 0  # so that Popen leaves it to `reap`
        return cls(process.pid, environment["SCRAPY_JOB"])

    def created(self) -> float | None:
        """Return when the process was created, in POSIX seconds as psutil has them; None when it has ended."""
        try:
            return psutil.Process(self.pid).create_time()
        except psutil.Error:
            return None

    def wait(self) -> None:
        """Wait until the command has ended.

        It is not reaped, see waitid(2): while it is a zombie nobody can get its number, so a signal to its session
        cannot meet a stranger.
        """
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.is_over = True

    def reap(self) -> int:
        """Return the exit code of the command, -N for signal N, after ending all that it left behind."""
        end_processes(lambda: find_processes(lambda pid: pid != self.pid and self._owns(pid)))
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def signal(self, number: int) -> None:
        """Send a signal to the whole tree."""
        for process in find_processes(self._owns):
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(number)

    def _owns(self, pid: int) -> bool:
        return os.getsid(pid) == self.pid or self._mark in read_environment(pid)


def read_environment(pid: int) -> list[bytes]:
    """Return the environment that a process was started with. Raise OSError or psutil.Error when it is hidden.

    Linux shows none while the process is executing another program, so an empty one is read again for a while.
    """
    if sys.platform == "linux":  # psutil takes ten times as long
        for _ in range(ENVIRONMENT_READS):
            with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
                environment = file.readall()
            if environment or not is_alive(psutil.Process(pid)):
                break
            time.sleep(ENVIRONMENT_SECONDS)
        return environment.split(b"\0")
    return [f"{name}={value}".encode() for name, value in psutil.Process(pid).environ().items()]


def find_processes(belongs: Callable[[int], bool]) -> set[psutil.Process]:
    """Return the living processes of which `belongs` is true, with all their descendants.

    When no file descriptor is left to look at them, wait until there is one: nothing may be overlooked.
    """
    while True:
        try:
            return {process for pid in psutil.pids() for process in find_family(pid, belongs) if is_alive(process)}
        except OSError as error:
            if not lacks_descriptors(error):
                raise
            time.sleep(DESCRIPTOR_SECONDS)


def find_family(pid: int, belongs: Callable[[int], bool]) -> list[psutil.Process]:
    """Return a process with all its descendants if `belongs` is true of it and it can be looked at, else nothing."""
    try:
        if pid == os.getpid() or os.getsid(pid) == 0 or not belongs(pid):  # the kernel's threads are in no session
            return []
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except (OSError, psutil.Error) as error:
        if lacks_descriptors(error):
            raise
        return []


def lacks_descriptors(error: Exception) -> bool:
    """Tell whether this process, or the system, had no file descriptor left."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process still runs; a zombie does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_processes(find: Callable[[], set[psutil.Process]]) -> None:
    """Kill what `find` finds until it finds no more: a process may fork while its parent is being killed."""
    calm_scans = 0
    for _ in range(20):
        found = find()
        calm_scans = 0 if found else calm_scans + 1
        if calm_scans == CALM_SCANS:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.5)
    log(f"some processes cannot be killed: {', '.join(str(process.pid) for process in found)}")


PRINTED = rb"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^'"{}])"""  # a string, or a character that is no brace
STATS_DUMP = rb"(?s).*Dumping Scrapy stats:[^{]{0,9}(\{(?:%b|\{%b*\})*\}?)" % (PRINTED, PRINTED)  # the last
STATS_COUNT = rb"'([\w/]+)': ([0-9]{1,15})[,}\s]"  # one without an end may be cut off
STATS_REASON = rb"'finish_reason': (['\"])(.{0,200}?)\1"


def read_stats(path: Path) -> Stats | None:
    """Return what Scrapy says near the end of a log that it has counted; None when it does not.

    A spider may write there what it likes, so all that is not understood is passed over.
    """
    try:
        with open_log(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - CHUNK_BYTES))
            dump = re.match(STATS_DUMP, file.read(CHUNK_BYTES))
    except (ScrapyDoError, OSError):
        return None
    if dump is None:
        return None
    counts, reason = dict(re.findall(STATS_COUNT, dump[1])), re.search(STATS_REASON, dump[1])
    names = (b"item_scraped_count", b"response_received_count", b"log_count/ERROR")
    items, responses, errors = (int(counts.get(name, 0)) for name in names)
    return Stats(items, responses, errors, reason[2].decode("utf-8", "replace") if reason else "")


def read_spiders(output: str, mark: str) -> list[str]:
    """Return the sorted spiders that `scrapy list` printed, without what the project printed beside them.

    Scrapy prints the mark before each name, see LIST_SETTINGS; a launcher that knows nothing of it prints names only.
    """
    lines = output.splitlines()
    if mark in output:
        lines = [line.partition(mark)[2] for line in lines]
    return sorted({line.strip() for line in lines} - {""})


# ---- 6. Timer --------------------------------------------------------------------------------------------------------


class Clock:
    """The real clocks; tests have their own."""

    def time(self) -> float:
        """Return POSIX seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that nobody can set."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait on a condition that the caller holds; None is for ever."""
        condition.wait(seconds)


class Agenda:
    """Keys with an instant each, the earliest first."""

    def __init__(self) -> None:
        self._instants: dict[Any, float] = {}
        self._heap: list[tuple[float, Any]] = []

    def put(self, key: Any, instant: float) -> None:
        """Set or change the instant of a key."""
        if self._instants.get(key) == instant:
            return
        self._instants[key] = instant
        heapq.heappush(self._heap, (instant, key))
        if len(self._heap) > 2 * len(self._instants) + 64:  # mostly stale: changed or dropped
            self._heap = [(instant, key) for key, instant in self._instants.items()]
            heapq.heapify(self._heap)

    def drop(self, key: Any) -> None:
        """Forget a key, if it is there."""
        self._instants.pop(key, None)

    def first(self) -> float | None:
        """Return the earliest instant; None when there is none."""
        while self._heap and self._instants.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> list[Any]:
        """Remove and return the keys whose instant has come, in order."""
        due = []
        while (first := self.first()) is not None and first <= now:
            due.append(heapq.heappop(self._heap)[1])
            del self._instants[due[-1]]
        return due


class Timer:
    """Call back when the time of a key has come: `at` a POSIX time that follows the system clock, or `after` a delay.

    `on_due(key)` and `on_deadline(key)` are called in the timer's thread and must be quick; `on_clock_set_back()` is
    called within a minute after the system clock was set back by more than a second.
    """

    def __init__(
        self,
        on_due: Callable[[str], None],
        on_deadline: Callable[[str], None],
        on_clock_set_back: Callable[[], None],
        clock: Clock,
    ):
        self._on_due, self._on_deadline, self._on_clock_set_back = on_due, on_deadline, on_clock_set_back
        self._clock = clock
        self._wake = threading.Condition()  # guards all below
        self._dues, self._deadlines = Agenda(), Agenda()
        self._lead = clock.time() - clock.monotonic()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="timer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for it."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, key: str, moment: float) -> None:
        """Call `on_due(key)` at a POSIX time."""
        self._put(self._dues, key, moment)

    def after(self, key: str, seconds: float) -> None:
        """Call `on_deadline(key)` after so many seconds."""
        self._put(self._deadlines, key, self._clock.monotonic() + seconds)

    def drop(self, key: str) -> None:
        """Forget a key: neither callback will be called for it, but for one that is being called now."""
        with self._wake:
            self._dues.drop(key)
            self._deadlines.drop(key)

    def _put(self, agenda: Agenda, key: str, instant: float) -> None:
        with self._wake:
            before = agenda.first()
            agenda.put(key, instant)
            if before is None or instant < before:
                self._wake.notify()

    def _run(self) -> None:
        while not self._closed:
            with self._wake:
                was_set_back = self._notice_clock_set_back()
                due = self._dues.pop_due(self._clock.time())
                late = self._deadlines.pop_due(self._clock.monotonic())
                if not (due or late or was_set_back or self._closed):
                    self._clock.wait(self._wake, self._seconds_to_wait())
            if was_set_back:
                self._call(self._on_clock_set_back)
            for key in late:
                self._call(self._on_deadline, key)
            for key in due:
                self._call(self._on_due, key)

    def _notice_clock_set_back(self) -> bool:
        lead, self._lead = self._lead, self._clock.time() - self._clock.monotonic()
        return lead - self._lead > 1.0

    def _seconds_to_wait(self) -> float | None:
        due, deadline = self._dues.first(), self._deadlines.first()
        waits = [] if due is None else [due - self._clock.time(), CLOCK_CHECK_SECONDS]
        if deadline is not None:
            waits.append(deadline - self._clock.monotonic())
        return max(0.0, min(waits)) if waits else None

    def _call(self, callback: Callable[..., None], *key: str) -> None:
        try:
            callback(*key)
        except Exception:  # one bad key must not stop the others
            log_crash(f"the timer's call for {key}")


# ---- 7. Daemon -------------------------------------------------------------------------------------------------------


class Draft:
    """The records as they will be when the batch of changes that is being made is on the disk."""

    def __init__(self, projects: Mapping[str, Project], jobs: Mapping[str, Job], now: float = 0.0):
        self._projects, self._jobs = projects, jobs
        self.now = now
        self.changed: dict[tuple[str, str], Record | None] = {}
        self.events: list[str] = []  # log lines
        self.skipped = 0  # runs that were not made
        self.finished: list[Job] = []  # runs that have got their last status
        self.afterwards: list[Callable[[], None]] = []  # what follows on the disk, in order; may be done again

    def find_project(self, name: str) -> Project:
        """Return a project. Raise NotFound when there is none of that name."""
        project = self.changed.get(("projects", name), self._projects.get(name))
        if not isinstance(project, Project):
            raise NotFound(f"there is no project '{name}'; list-projects.json shows those there are")
        return project

    def find_job(self, identifier: str) -> Job:
        """Return a job. Raise NotFound when there is none of that identifier."""
        job = self._get_job(identifier)
        if job is None:
            raise NotFound(f"there is no job '{identifier}'; list-jobs.json shows those there are")
        return job

    def is_pending(self, identifier: str) -> bool:
        """Tell whether there is a job of that identifier that waits for a slot."""
        job = self._get_job(identifier)
        return job is not None and job.status is Status.PENDING

    def _get_job(self, identifier: str) -> Job | None:
        job = self.changed.get(("jobs", identifier), self._jobs.get(identifier))
        return job if isinstance(job, Job) else None

    def active_jobs(self, project: str) -> list[Job]:
        """Return the jobs of a project that have not ended."""
        new = {key: record for (section, key), record in self.changed.items() if section == "jobs"}
        jobs = [job for job in {**self._jobs, **new}.values() if isinstance(job, Job)]
        return [job for job in jobs if job.project == project and job.status in ACTIVE]

    def put(self, record: Record, event: str = "") -> None:
        """Add or replace a record; the event is logged when it is on the disk."""
        self.changed["jobs" if isinstance(record, Job) else "projects", record[0]] = record
        if event:
            self.events.append(event)

    def move(self, job: Job, status: Status, event: str = "", **fields: Any) -> Job:
        """Change the status of a job, the only place where that happens, and return the job as it is then."""
        if status not in TRANSITIONS.get(job.status, ()):
            raise Conflict(f"job {job.identifier} is {job.status.value} and cannot become {status.value}")
        is_run = job.status is not Status.SCHEDULED
        job = job._replace(status=status, timestamp=self.now, due=None, cancel=False, pid=None, pid_created=None)
        job = job._replace(**fields)
        if is_run and status in COMPLETED:
            self.finished.append(job)
        self.put(job, f"job {job.identifier} is {status.value}{event}: {job.project} {job.spider}")
        return job


class Change:
    """A function of the draft that is to be saved, and what came of it.

    The function raises before it puts anything into the draft, or not at all. A fact is what has happened already: if
    the disk does not take it, it is remembered and saved later, while other changes are then undone and refused.
    """

    def __init__(self, make: Callable[[Draft], Any], is_fact: bool):
        self.make, self.is_fact = make, is_fact
        self.result: Any = None
        self.error: Exception | None = None
        self.done = threading.Event()

    def run(self, draft: Draft) -> None:
        """Make the change in the draft; an exception becomes the outcome."""
        self.error = None
        try:
            self.result = self.make(draft)
        except ScrapyDoError as error:
            self.error = error
        except Exception as error:
            log_crash("a change")
            self.error = error


class Settings(NamedTuple):
    """What the command line says of the daemon. Times are seconds."""

    scrapy: tuple[str, ...] = (sys.executable, "-m", "scrapy")
    job_slots: int = 3
    completed_cap: int = 50
    kill_after: float = 10.0
    list_timeout: float = 60.0
    job_timeout: float = 0.0  # of jobs that have none of their own; 0 lets them run on
    on_finish: tuple[str, ...] = ()  # none
    keep_days: float = float("inf")
    keep_mib: float = float("inf")


class Notifier:
    """Start a command after each finished job, one at a time; what goes wrong with it is only logged."""

    def __init__(self, command: tuple[str, ...]):
        self._command = [word.encode() for word in command]
        self._waiting: queue.Queue[Job | None] = queue.Queue()  # None ends the thread
        self._end = float("inf")  # when no command may run any more, as time.monotonic has it
        self._thread = threading.Thread(target=self._run, name="on-finish", daemon=True)

    def start(self) -> None:
        """Start the thread, if there is a command."""
        if self._command:
            self._thread.start()

    def put(self, job: Job) -> None:
        """Have the command started for a job, unless too many wait for it. Only the writer calls this."""
        if self._command and self._waiting.qsize() < NOTICES_COUNT:
            self._waiting.put(job)
        elif self._command:
            log(f"--on-finish failed for job {job.identifier}: {NOTICES_COUNT} others are waiting")

    def close(self) -> None:
        """Give those who wait a few seconds, and end the thread."""
        self._end = time.monotonic() + NOTICE_STOP_SECONDS
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            try:
                self._notify(job)
            except Exception as error:  # mostly an OSError: there is no such command, or no space for its input
                log(f"--on-finish failed for job {job.identifier}: {error}")

    def _notify(self, job: Job) -> None:
        """Run the command for a job. Raise what is wrong with it.

        Its input is a file, since nobody may read a pipe. It has no SCRAPY_JOB, which would make it part of the crawl.
        """
        import tempfile

        end = min(self._end, time.monotonic() + NOTICE_SECONDS)
        if time.monotonic() >= end:
            raise Unavailable("the daemon is stopping")
        environment = {**os.environ, "SCRAPY_DO_JOB": job.identifier, "SCRAPY_DO_STATUS": job.status.value}
        with tempfile.TemporaryFile() as file:
            file.write((job_text(job) + "\n").encode("utf-8", "backslashreplace"))
            file.seek(0)
            process = subprocess.Popen(
                self._command, env=environment, stdin=file, stdout=subprocess.DEVNULL, start_new_session=True
            )
        while process.poll() is None and time.monotonic() < min(end, self._end):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(NOTICE_LOOK_SECONDS)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise ScrapyDoError("it took too long and was killed")
        if process.returncode:
            raise ScrapyDoError(f"exit code {process.returncode}")


class Daemon:
    """Keep projects and jobs, and run the crawls: all that the API can ask for.

    Public methods may be called from any thread. They hand out plain dictionaries, and return from a change when it is
    on the disk; they raise a ScrapyDoError when it is refused, and then nothing has changed.
    """

    def __init__(self, store: Store, settings: Settings, clock: Clock | None = None, start_crawl: Any = Crawl.start):
        self._store, self._settings, self._start_crawl = store, settings, start_crawl
        self._clock = clock or Clock()
        self._timer = Timer(self._on_due, self._on_deadline, self._on_clock_set_back, self._clock)
        self._began = self._clock.monotonic()
        self._notifier = Notifier(settings.on_finish)
        self._unsaved: list[Job] = []  # of the writer: finished jobs whose last status is not on the disk yet
        self._writer = threading.Thread(target=self._write_changes, name="writer", daemon=True)
        self._slots: list[threading.Thread] = []

        self._lock = threading.Lock()  # guards everything below; see the head of the file
        self._job_waits = threading.Condition(self._lock)
        self._crawl_changed = threading.Condition(self._lock)  # one has come to rest, ended, or may go on
        self._change_waits = threading.Condition(self._lock)
        self._projects: dict[str, Project] = {}
        self._jobs: dict[str, Job] = {}  # in the order of their making
        self._records: Sections = {"projects": self._projects, "jobs": self._jobs}  # as the store wants them
        self._by_status: dict[Status, dict[str, None]] = {status: {} for status in Status}
        self._completed: dict[str, None] = {}  # the oldest first
        self.list_bytes = 0  # about how long a list of all jobs is; anybody may read it
        self._log_bytes: dict[str, int] = {}  # of jobs that have logs: as they were at the start or after their crawl
        self._counts = dict.fromkeys(("jobs-run", "jobs-successful", "jobs-failed", "jobs-canceled", "runs-skipped"), 0)
        self._crawls: dict[str, Crawl] = {}  # what runs now: by the job's identifier, or a listing's own
        self._changes: list[Change] = []
        self._firings: list[Change] = []  # of schedules that are due: thousands at one instant hold no request up
        self._cpu_mark = time.process_time(), self._began  # seconds of CPU, and when that was, at the last status
        self._resting: set[str] = set()  # jobs of which a slot does nothing but wait for their crawl
        self._surplus_slots = 0  # to end when their crawl has: a former daemon in this process had more of them
        self._is_frozen = self._is_closing = self._is_writer_done = False

    # Start and stop

    def start(self, is_next: bool = False) -> None:
        """Load the state, end what a former daemon left running, and go to work. Raise StorageError for a bad state.

        With `is_next` another daemon was frozen in this process, and the crawls that it had go on.
        """
        projects, jobs = self._store.load()
        running = {job.pid: job for job in jobs.values() if job.status is Status.RUNNING and job.pid is not None}
        children = running.items() if is_next else ()
        adopted = {job.identifier: (job, Crawl(pid, job.identifier)) for pid, job in children}
        finished = [identifier for identifier, job in jobs.items() if job.status in COMPLETED]
        self._log_bytes.update({identifier: self._store.log_bytes(identifier) for identifier in finished})
        self._end_leftovers(running.values(), adopted)
        self._store.sweep_work(adopted)
        draft = Draft(projects, jobs, self._clock.time())
        for job in jobs.values():
            if job.identifier not in adopted:
                self._recover(draft, job)
        jobs.update({key: job for (_, key), job in draft.changed.items() if isinstance(job, Job)})
        with self._lock:
            self._projects.update(projects)
            self._jobs.update(jobs)
            self._counts["jobs-run"] = len(adopted)
            self.list_bytes = sum(job.length() for job in jobs.values())
            for job in sorted(jobs.values(), key=lambda job: job.status in COMPLETED and job.timestamp):
                self._index_locked(job)
        self._writer.start()
        self._notifier.start()

        def adopt(published: Draft) -> None:
            published.changed.update(draft.changed)
            published.events += draft.events
            published.finished += draft.finished

        self._commit(adopt, is_fact=True)
        self._timer.start()
        count = max(self._settings.job_slots, len(adopted))
        self._surplus_slots = count - self._settings.job_slots
        for number, first in itertools.zip_longest(range(1, count + 1), adopted.values()):
            slot = threading.Thread(target=self._run_slot, args=(first,), name=f"slot-{number}", daemon=True)
            self._slots.append(slot)
            slot.start()

    def _end_leftovers(self, running: Iterable[Job], adopted: Collection[str]) -> None:
        """End the crawls of a daemon that was killed: they are known by their number, or by our folder."""
        mark = f"SPIDER_DATA_DIR={self._store.spider_data}".encode()
        created = {job.pid: job.pid_created for job in running if job.identifier not in adopted}
        kept = {f"SCRAPY_JOB={identifier}".encode() for identifier in adopted}

        def is_leftover(pid: int) -> bool:
            if pid in created and psutil.Process(pid).create_time() == created[pid]:
                return True
            environment = read_environment(pid)
            jobs = {line for line in environment if line.startswith(b"SCRAPY_JOB=")}
            return mark in environment and not jobs <= kept

        end_processes(lambda: find_processes(is_leftover))

    def _recover(self, draft: Draft, job: Job) -> None:
        """Put right what the last daemon could not finish, or a clock that was set back spoils."""
        if job.status is Status.RUNNING and job.cancel:
            draft.move(job, Status.CANCELED, reason=BY_USER)
        elif job.status in ACTIVE:
            try:
                if job.reason:
                    raise BadRequest(job.reason)
                draft.find_project(job.project)
                if job.status is Status.RUNNING:
                    draft.move(job, Status.PENDING, " again")
                elif job.status is Status.SCHEDULED:
                    self._check_due(draft, job)
            except ScrapyDoError as error:
                draft.move(job, Status.FAILED, reason=str(error))

    def _check_due(self, draft: Draft, job: Job) -> None:
        """Set a due time that is missing, or further away than it can be unless the clock was set back."""
        recurrence = job.recurrence()
        if job.due is None or job.due > recurrence.latest_after(draft.now):
            draft.put(job._replace(due=recurrence.next_after(draft.now)))

    def close(self) -> None:
        """End the crawls, whose jobs become PENDING again, save the state, and end all threads."""
        with self._lock:
            self._is_closing = True
            crawls = list(self._crawls)
        self._thaw()
        for identifier in crawls:
            self._end_crawl(identifier, "stop")
        for thread in self._slots:
            thread.join()
        self.leave()

    def freeze(self) -> None:
        """Bring all to rest, so that the next daemon may begin in this process. Raise Unavailable when that fails.

        At rest no crawl is being started, ended or reaped, and all that has happened is on the disk. Crawls run on, as
        children of the process, which keeps their exit codes for whatever program it executes, see execve(2).
        """
        with self._lock:
            self._is_frozen = not self._is_closing
            listings = [identifier for identifier in self._crawls if identifier not in self._jobs]
        for identifier in listings:
            self._end_crawl(identifier, "stop")
        self._commit(lambda draft: None, is_fact=True)  # all that was under way
        with self._lock:
            running = self._by_status[Status.RUNNING]
            is_calm = self._crawl_changed.wait_for(lambda: running.keys() <= self._resting, FREEZE_SECONDS)
        self._commit(lambda draft: None, is_fact=True)  # the numbers of the last crawls
        if not is_calm or self._store.is_behind:
            self._thaw()
            full = f"{self._store.folder} cannot be written, so the state is not saved; mend that"
            raise Unavailable(full if is_calm else "a crawl takes long to start or to end; wait for it")

    def _thaw(self) -> None:
        with self._lock:
            self._is_frozen = False
            self._job_waits.notify_all()
            self._crawl_changed.notify_all()

    def leave(self) -> None:
        """Save the state and end all threads but the slots, which have ended or rest."""
        self._timer.close()
        with self._lock:
            self._is_writer_done = True
            self._change_waits.notify()
        if self._writer.is_alive():
            self._writer.join()
            self._store.tidy(self._records)
        self._notifier.close()

    # Changes: one writer for all, see the head of the file

    def _commit(self, make: Callable[[Draft], T], is_fact: bool = False) -> T:
        """Have a change made and saved, and return what `make` returned."""
        change = self._submit(make, is_fact, self._changes)
        change.done.wait()
        if change.error is not None:
            raise change.error
        return change.result  # type: ignore[no-any-return]

    def _submit(self, make: Callable[[Draft], Any], is_fact: bool, line: list[Change]) -> Change:
        """Have a change made and saved some time soon; the order within a line is kept."""
        change = Change(make, is_fact)
        with self._lock:
            if self._is_writer_done:
                raise Unavailable("the daemon is stopping; ask again when it has been started")
            line.append(change)
            self._change_waits.notify()
        return change

    def _write_changes(self) -> None:
        """Do the work of the writer's thread."""
        while (batch := self._next_batch()) is not None:
            draft = self._make_draft(batch)
            was_behind = self._store.is_behind
            try:
                if draft.changed or was_behind:
                    self._store.write(self._records, draft.changed)
            except StorageError as error:
                draft = self._keep_facts(batch, error)
                if not was_behind:
                    log(f"{error}; changes are refused until that is mended")
            if was_behind and not self._store.is_behind:
                log(f"{self._store.folder} can be written again")
            self._publish(draft)
            for change in batch:
                change.done.set()

    def _next_batch(self) -> list[Change] | None:
        """Wait for changes and return them; an empty list when it is time to try the disk again, None to end."""
        with self._lock:
            if not (self._changes or self._firings or self._is_writer_done):
                self._change_waits.wait(RETRY_SECONDS if self._store.is_behind else None)
            batch = self._changes[:BATCH_COUNT] + self._firings[:FIRINGS_COUNT]
            del self._changes[:BATCH_COUNT], self._firings[:FIRINGS_COUNT]
            return None if self._is_writer_done and not batch else batch

    def _published(self) -> Draft:
        return Draft(self._projects, self._jobs)

    def _make_draft(self, batch: Iterable[Change]) -> Draft:
        with self._lock:
            draft = Draft(self._projects, self._jobs, self._clock.time())
            for change in batch:
                change.run(draft)
            self._purge(draft)
        return draft

    def _keep_facts(self, batch: list[Change], error: StorageError) -> Draft:
        """Make the draft again with nothing but facts, after the disk has refused it; refuse the other changes."""
        draft = self._make_draft(change for change in batch if change.is_fact)
        with contextlib.suppress(StorageError):
            self._store.write(self._records, draft.changed)
        for change in batch:
            if not change.is_fact and change.error is None:
                change.error = error
        return draft

    def _publish(self, draft: Draft) -> None:
        """Make the draft what readers, slots and the timer see, and do on the disk what follows from it."""
        with self._lock:
            self._counts["runs-skipped"] += draft.skipped
            for (section, key), record in draft.changed.items():
                if isinstance(record, Job):
                    self._publish_job_locked(record)
                elif isinstance(record, Project):
                    self._projects[key] = record
                elif section == "projects":
                    self._projects.pop(key, None)
                else:
                    self._unindex_locked(key)
                    if (job := self._jobs.pop(key, None)) is not None:
                        self.list_bytes -= job.length()
                    self._log_bytes.pop(key, None)
        for event in draft.events:
            log(event)
        self._unsaved += draft.finished
        while self._unsaved and not self._store.is_behind:
            self._notifier.put(self._unsaved.pop(0))
        for action in draft.afterwards:
            try:
                action()
            except OSError:
                log_crash("tidying up after a change")

    def _publish_job_locked(self, job: Job) -> None:
        former = self._jobs.get(job.identifier)
        if former is not None and former.status is not job.status:
            self._unindex_locked(job.identifier)
            if former.status is Status.RUNNING:
                self._crawl_changed.notify_all()
            if job.status is Status.RUNNING:
                self._counts["jobs-run"] += 1
            elif former.status is Status.RUNNING and job.status in COMPLETED:
                self._counts[f"jobs-{job.status.value.lower()}"] += 1
        self.list_bytes += job.length() - (former.length() if former is not None else 0)
        self._jobs[job.identifier] = job
        self._index_locked(job)

    def _index_locked(self, job: Job) -> None:
        self._by_status[job.status].setdefault(job.identifier)
        if job.status is Status.SCHEDULED and job.due is not None:
            self._timer.at(job.identifier, job.due)
        elif job.status is Status.PENDING:
            self._job_waits.notify()
        elif job.status in COMPLETED:
            self._completed.setdefault(job.identifier)
            if self._settings.keep_days < float("inf"):  # it fires nothing, but what is too old goes with every change
                self._timer.at(job.identifier, job.timestamp + self._settings.keep_days * DAY_SECONDS)

    def _unindex_locked(self, identifier: str) -> None:
        if (job := self._jobs.get(identifier)) is not None:
            self._by_status[job.status].pop(identifier, None)
            self._completed.pop(identifier, None)
            self._timer.drop(identifier)

    # Projects

    def new_upload_path(self) -> Path:
        """Return where an archive may be written that is to be pushed; the caller deletes it if it is still there."""
        return self._store.new_work_path()

    def push(self, upload: Path) -> dict[str, Any]:
        """Check an archive, and make it a project or a project's new code. Return its name and spiders."""
        tree = staged = self._store.new_work_path()
        try:
            layout = unpack(upload, tree)
            spiders = self._list_spiders(tree / layout.folder, layout)
            project = Project(layout.name, tuple(spiders), tree.name, layout.folder, layout.settings)
            staged = self._store.stage_archive(upload, project)
            former = self._commit(lambda draft: self._put_project(draft, project))
        except BaseException:
            remove_tree(staged)
            remove_tree(tree)
            raise
        if former is not None:
            self._retire_tree(former)
        return {"name": project.name, "spiders": spiders}

    def _put_project(self, draft: Draft, project: Project) -> Project | None:
        """Replace a project and return the former. Raise Conflict when active jobs need a spider that is gone."""
        stranded = [job for job in draft.active_jobs(project.name) if job.spider not in project.spiders]
        if stranded:
            raise Conflict(f"the new code lacks spiders that active jobs need: {name_jobs(stranded)}")
        former = None
        with contextlib.suppress(NotFound):
            former = draft.find_project(project.name)
        draft.put(project, f"project {project.name} was pushed with spiders: {', '.join(project.spiders)}")
        draft.afterwards.append(lambda: self._store.adopt_archive(project))
        return former

    def remove(self, name: str) -> dict[str, Any]:
        """Forget a project and its archive. Raise Conflict when it has active jobs."""

        def remove_project(draft: Draft) -> Project:
            project = draft.find_project(name)
            if active := draft.active_jobs(name):
                raise Conflict(f"project '{name}' has active jobs, cancel them first: {name_jobs(active)}")
            draft.changed["projects", name] = None
            draft.events.append(f"project {name} was removed")
            draft.afterwards.append(lambda: self._store.archive(name).unlink(missing_ok=True))
            return project

        self._retire_tree(self._commit(remove_project))
        return {}

    def projects(self) -> list[str]:
        """Return the names of the projects, sorted."""
        with self._lock:
            return sorted(self._projects)

    def spiders(self, project: str) -> dict[str, Any]:
        """Return a project's name and its spiders, sorted."""
        with self._lock:
            return {"project": project, "spiders": list(self._published().find_project(project).spiders)}

    def _list_spiders(self, folder: Path, layout: Layout) -> list[str]:
        """Ask Scrapy for the spiders of an unpacked project. Raise BadRequest with the reason when it has none."""
        work = self._store.new_work_path()
        work.mkdir(mode=0o700)
        mark = f"{new_identifier()}:"
        environment = self._environment(work.name, layout.name, LIST_MODULE)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(work), environment.get("PYTHONPATH")]))
        try:
            source = LIST_SETTINGS.format(mark=mark, settings=layout.settings, module=LIST_MODULE)
            (work / f"{LIST_MODULE}.py").write_text(source, encoding="utf-8")
            crawl = self._start([*self._settings.scrapy, "list"], folder, environment, work / "out", work / "err")
            exit_code = self._wait_for(work.name, crawl, self._settings.list_timeout)
            output, errors = ((work / name).read_text("utf-8", "replace") for name in ("out", "err"))
        finally:
            remove_tree(work)
        if crawl.ended_for == "stop":
            raise Unavailable("the daemon is stopping; push again when it has been started")
        if crawl.ended_for:
            raise BadRequest(f"'scrapy list' did not end within {self._settings.list_timeout:g} s; see --list-timeout")
        if exit_code != 0:
            raise BadRequest(explain_list_error(exit_code, errors or output, self._settings.scrapy))
        if not (spiders := read_spiders(output, mark)):
            raise BadRequest("'scrapy list' shows no spiders in the project; check SPIDER_MODULES in its settings")
        return spiders

    def _copy_project(self, name: str, folder: Path) -> Project:
        """Make a working copy of a project's unpacked code, and return the project.

        A push renames the tree that it replaces before it deletes it; a copy after which the tree is still there is
        whole. After a restart there is none until a crawl needs it.
        """
        while True:
            with self._lock:
                project = self._published().find_project(name)
            tree = self._store.work / project.archive
            try:
                if not tree.exists():
                    self._unpack_again(project, tree)
                copy_tree(tree, folder)
            except OSError:
                if tree.exists():
                    raise
            if tree.exists():
                return project
            remove_tree(folder)

    def _unpack_again(self, project: Project, tree: Path) -> None:
        """Unpack the stored archive of a project; of several slots that do so at once, the first one's counts."""
        fresh = self._store.new_work_path()
        try:
            unpack(self._store.archive(project.name), fresh)
            with self._lock:
                if self._projects.get(project.name) == project and not tree.exists():
                    fresh.rename(tree)
        finally:
            remove_tree(fresh)

    def _retire_tree(self, project: Project) -> None:
        """Delete the unpacked code of a project that has been replaced or removed."""
        retired = self._store.new_work_path()
        with contextlib.suppress(FileNotFoundError):
            (self._store.work / project.archive).rename(retired)
        remove_tree(retired)

    # Jobs

    def schedule(
        self, project: str, spider: str, when: str, description: str = "", payload: str = "{}",
        arg: Sequence[str] = (), setting: Sequence[str] = (), timeout: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Make a job and return its identifier, and when it runs.

        `payload` is the text of a JSON object, `arg` and `setting` hold NAME=VALUE for the spider and for Scrapy, and
        `timeout` is the text of a number of seconds; None leaves it to the one of all jobs.
        """
        recurrence = parse_spec(when)
        check_payload(payload)
        check_options(arg, setting, payload)
        seconds = None if timeout is None else read_timeout(timeout)
        project, spider, when, description = map(sys.intern, (project, spider, when, description))

        def add_job(draft: Draft) -> dict[str, Any]:
            if spider not in (known := draft.find_project(project).spiders):
                raise NotFound(f"project '{project}' has no spider '{spider}'; it has {', '.join(known)}")
            job = Job(
                new_identifier(), Status.PENDING, Actor.USER, when, project, spider, draft.now, description, payload,
                tuple(arg), tuple(setting), seconds, origin=draft.now,
            )  # fmt: skip
            if recurrence is not None:
                job = job._replace(status=Status.SCHEDULED, due=job.recurrence().next_after(draft.now))
            draft.put(job, f"job {job.identifier} is {job.status.value} ({when}): {project} {spider}")
            return {"identifier": job.identifier, "next_run": job.view()["next_run"]}

        return self._commit(add_job)

    def cancel(self, identifier: str) -> dict[str, Any]:
        """Cancel a job and return when it has ended. Raise Conflict when it had ended before."""

        def cancel_job(draft: Draft) -> None:
            job = draft.find_job(identifier)
            if job.status in COMPLETED:
                raise Conflict(f"job {identifier} has ended already, it is {job.status.value}")
            if job.status is Status.RUNNING and self._is_frozen:
                raise Unavailable("the daemon is being reloaded; ask again in a moment")
            if job.status is Status.RUNNING:
                draft.put(job._replace(cancel=True), f"job {identifier} is being canceled")
            else:
                draft.move(job, Status.CANCELED, reason=BY_USER)

        self._commit(cancel_job)
        self._end_crawl(identifier, "cancel")
        with self._lock:
            self._crawl_changed.wait_for(lambda: identifier not in self._by_status[Status.RUNNING])
        return {}

    def job(self, identifier: str) -> dict[str, Any]:
        """Return a job."""
        with self._lock:
            return self._published().find_job(identifier).view()

    def jobs(
        self, statuses: Iterable[Status], project: str | None = None, spider: str | None = None,
        limit: int | None = None,
    ) -> Json:  # fmt: skip
        """Return the list of the jobs in these statuses, the newest change of status first; None leaves none out."""
        with self._lock:
            jobs = [self._jobs[identifier] for status in statuses for identifier in self._by_status[status]]
        jobs = [job for job in jobs if project in (None, job.project) and spider in (None, job.spider)]
        jobs.sort(key=lambda job: job.timestamp, reverse=True)
        return Json(f"[{', '.join(map(job_text, jobs[:limit]))}]")

    def log_file(self, identifier: str, stream: str) -> Path:
        """Return the file with the output of a job, which may not exist yet; `stream` is out or err."""
        self.job(identifier)
        return self._store.log_file(identifier, stream)

    def writes_log(self, identifier: str) -> bool:
        """Tell whether a job runs or waits to."""
        with self._lock:
            return any(identifier in self._by_status[status] for status in (Status.PENDING, Status.RUNNING))

    def status(self) -> dict[str, Any]:
        """Return what the daemon is doing and has done since it was started."""
        with self._lock:
            counts = {**self._counts, **{f"jobs-{s.value.lower()}": len(self._by_status[s]) for s in ACTIVE}}
            projects = list(self._projects.values())
            (cpu, moment), self._cpu_mark = self._cpu_mark, (time.process_time(), self._clock.monotonic())
            cpu_share = (self._cpu_mark[0] - cpu) / max(1e-6, self._cpu_mark[1] - moment)
        return {
            "memory-usage": memory_usage(int(10 * self._clock.monotonic())),
            "cpu-usage": round(100 * cpu_share, 1),
            "time": local_time(self._clock.time()),
            "timezone": "; ".join(time.tzname),
            "hostname": socket.gethostname(),
            "uptime": describe_seconds(self._clock.monotonic() - self._began),
            **counts,
            "projects": len(projects),
            "spiders": sum(len(project.spiders) for project in projects),
            "daemon-version": __version__,
        }

    def _purge(self, draft: Draft) -> None:
        """Forget the oldest finished jobs beyond the number, age and size of logs to be kept, and delete their logs.

        The newest one stays, however long its logs are.
        """
        changed = (record for record in draft.changed.values() if isinstance(record, Job))
        kept = [job.identifier for job in changed if job.status in COMPLETED and job.identifier not in self._completed]
        count, most_bytes = len(self._completed) + len(kept), self._settings.keep_mib * MIB
        known = itertools.chain(self._completed, kept) if most_bytes < float("inf") else ()
        size = sum(self._log_bytes.get(identifier, 0) for identifier in known)
        for identifier in self._completed:
            is_young = self._jobs[identifier].timestamp + self._settings.keep_days * DAY_SECONDS > draft.now
            if is_young and count <= self._settings.completed_cap and (count == 1 or size <= most_bytes):
                break
            count, size = count - 1, size - self._log_bytes.get(identifier, 0)
            draft.changed["jobs", identifier] = None
            draft.afterwards.append(functools.partial(self._store.delete_logs, identifier))

    # The timer's calls

    def _on_due(self, identifier: str) -> None:
        self._submit(lambda draft: self._fire(draft, identifier), is_fact=True, line=self._firings)

    def _on_deadline(self, identifier: str) -> None:
        """Kill a crawl that was asked to end, and ask one that was not: its time is over."""
        with self._lock:
            crawl = self._crawls.get(identifier)
            is_asked = crawl is not None and crawl.ended_for != ""
            is_late = crawl is not None and self._clock.monotonic() >= crawl.kill_at
        if not is_asked:
            self._end_crawl(identifier, "timeout")
        elif crawl is not None and is_late:  # else it was asked just before its timeout was over
            crawl.signal(signal.SIGKILL)

    def _on_clock_set_back(self) -> None:
        def recover(draft: Draft) -> None:
            for identifier in self._by_status[Status.SCHEDULED]:
                if (job := draft.find_job(identifier)).status is Status.SCHEDULED:
                    self._recover(draft, job)

        log("the system clock was set back; due times that are too far away now are set again")
        self._submit(recover, is_fact=True, line=self._changes)

    def _fire(self, draft: Draft, identifier: str) -> None:
        """Make a run of a schedule that is due, unless one is waiting still, and set its next due time."""
        job = draft.find_job(identifier)
        if self._is_closing or job.status is not Status.SCHEDULED or job.due is None:
            return
        if job.due > draft.now:  # the clock was set back since; publishing the job again tells the timer
            draft.put(job)
            return
        try:
            due = job.recurrence().resume_after(job.due, draft.now)
        except SpecError as error:
            draft.move(job, Status.FAILED, reason=str(error))
            return
        if job.run is not None and draft.is_pending(job.run):
            draft.skipped += 1
            draft.put(job._replace(due=due), f"job {identifier} is due but skipped: run {job.run} is waiting still")
            return
        run = job._replace(
            identifier=new_identifier(), status=Status.PENDING, actor=Actor.SCHEDULER, schedule="now",
            timestamp=draft.now, origin=draft.now, due=None, run=None,
        )  # fmt: skip
        draft.put(job._replace(due=due, run=run.identifier))
        draft.put(run, f"job {run.identifier} is PENDING, since {identifier} was due: {job.project} {job.spider}")

    # Slots

    def _run_slot(self, first: tuple[Job, Crawl] | None) -> None:
        """Do the work of a slot's thread, which may begin with a crawl that runs already."""
        if first is not None:
            self._run_job(*first)
        while True:
            with self._lock:
                if self._surplus_slots:
                    self._surplus_slots -= 1
                    return
                self._job_waits.wait_for(lambda: self._is_closing or self._may_start_locked())
                if self._is_closing:
                    return
            if job := self._commit(self._take_next, is_fact=True):
                self._run_job(job)

    def _may_start_locked(self) -> bool:
        return bool(self._by_status[Status.PENDING]) and not self._is_frozen

    def _take_next(self, draft: Draft) -> Job | None:
        """Make the oldest pending job RUNNING; None when others were quicker."""
        for identifier in self._by_status[Status.PENDING]:
            if draft.is_pending(identifier) and not (self._is_closing or self._is_frozen):
                return draft.move(draft.find_job(identifier), Status.RUNNING)
        return None

    def _run_job(self, job: Job, crawl: Crawl | None = None) -> None:
        """Run one crawl from start to end, or to its end one that runs already."""
        folder, exit_code = self._store.work_copy(job.identifier), None
        elapsed = max(0.0, self._clock.time() - job.timestamp) if crawl else 0.0
        began = self._clock.monotonic() - elapsed
        timeout = job.timeout or self._settings.job_timeout or None
        try:
            crawl = crawl or self._launch(job, folder)
            exit_code = self._wait_for(job.identifier, crawl, None if timeout is None else timeout - elapsed)
            reason = explain_exit(exit_code)
            if crawl.ended_for == "timeout":  # to which Scrapy answers by ending well
                reason = f"it ran longer than its timeout of {timeout:.15g} s"
        except ScrapyDoError as error:
            reason = str(error)
        except Exception as error:
            log_crash(f"the crawl of job {job.identifier}")
            reason = f"the crawl could not be run: {error!r}"
        remove_tree(folder)
        size = self._store.log_bytes(job.identifier)
        with self._lock:
            self._log_bytes[job.identifier] = size
        outcome = {
            "duration": int(self._clock.monotonic() - began), "exit_code": exit_code, "reason": reason,
            "stats": None if exit_code is None else read_stats(self._store.log_file(job.identifier, "err")),
        }  # fmt: skip
        is_interrupted = crawl is not None and crawl.ended_for == "stop"
        self._commit(lambda draft: self._finish(draft, job.identifier, is_interrupted, outcome), is_fact=True)

    def _launch(self, job: Job, folder: Path) -> Crawl:
        """Start the crawl of a job in a working copy of its project, and save its number."""
        payload = [f"payload={job.payload}"] if job.payload != "{}" else []
        options = [("-a", text) for text in (*payload, *job.arg)] + [("-s", text) for text in job.setting]
        command = [*self._settings.scrapy, "crawl", job.spider, *itertools.chain(*options)]
        try:
            project = self._copy_project(job.project, folder)
        except OSError as error:  # shutil.Error is one, with a list of (source, target, what went wrong)
            first = error.args[0][0][-1] if isinstance(error.args[0], list) else error
            raise StorageError(f"no working copy could be made for the crawl: {first}") from None
        environment = self._environment(job.identifier, project.name, project.settings, job.spider)
        logs = [self._store.log_file(job.identifier, stream) for stream in ("out", "err")]
        crawl = self._start(command, folder / project.folder, environment, *logs)
        created = crawl.created()

        def save_number(draft: Draft) -> None:
            if (job_now := draft.find_job(job.identifier)).status is Status.RUNNING:
                draft.put(job_now._replace(pid=crawl.pid, pid_created=created))

        self._submit(save_number, is_fact=True, line=self._changes)
        return crawl

    def _start(self, command: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> Crawl:
        """Start a command. Raise a ScrapyDoError that says what to do when it does not start."""
        try:
            return self._start_crawl(command, folder, environment, out, err)  # type: ignore[no-any-return]
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise BadRequest("the payload, args and settings are too long for a command") from None
            if isinstance(error, (FileNotFoundError, PermissionError)):
                advice = f"'{command[0]}' cannot be started; install Scrapy, or say where it is by --scrapy"
                raise BadRequest(f"{advice} ({error.strerror})") from None
            raise StorageError(f"'{command[0]}' cannot be started: {error}") from None

    def _wait_for(self, identifier: str, crawl: Crawl, timeout: float | None) -> int:
        """Return the exit code of a crawl that may be ended meanwhile, or that shall end before it was known.

        After `timeout` seconds it is ended; None lets it run on.
        """
        with self._lock:
            self._crawls[identifier] = crawl
            if timeout is not None:
                self._timer.after(identifier, timeout)
            job = self._jobs.get(identifier)
            is_too_late = self._is_closing or (self._is_frozen and job is None)
            why = "cancel" if job is not None and job.cancel else "stop" if is_too_late else ""
            self._resting.add(identifier)
            self._crawl_changed.notify_all()
        if why:
            self._end_crawl(identifier, why)
        try:
            crawl.wait()
            with self._lock:
                self._crawl_changed.wait_for(lambda: not (self._is_frozen and identifier in self._resting))
                self._resting.discard(identifier)
            return crawl.reap()
        finally:
            with self._lock:
                del self._crawls[identifier]
            self._timer.drop(identifier)

    def _end_crawl(self, identifier: str, why: str) -> None:
        """Ask a crawl to end, and kill it some time later; one that is not known yet is asked when it is.

        It is asked once, whatever comes after a timeout: to Scrapy, a second SIGTERM means to drop what it has.
        """
        with self._lock:
            crawl = self._crawls.get(identifier)
            if crawl is None or crawl.is_over:
                return
            if self._is_frozen and why != "stop":
                self._timer.after(identifier, RETRY_SECONDS)  # if another program begins instead, that one sees to it
                return
            self._resting.discard(identifier)
            self._crawl_changed.notify_all()
            is_asked, crawl.ended_for = crawl.ended_for != "", why
            if not is_asked:
                crawl.kill_at = self._clock.monotonic() + self._settings.kill_after
                self._timer.after(identifier, self._settings.kill_after)
        if not is_asked:
            crawl.signal(signal.SIGTERM)

    def _environment(self, identifier: str, project: str, settings: str, spider: str = "") -> dict[str, str]:
        """Return the environment of a crawl.

        Scrapy takes SCRAPY_PROJECT for the name of an option in [settings] of scrapy.cfg, where most projects have
        none but `default`; so the settings module is named outright.
        """
        environment = {**os.environ, "SPIDER_DATA_DIR": str(self._store.spider_data), "PYTHONIOENCODING": "utf-8"}
        environment.update(SCRAPY_JOB=identifier, SCRAPY_PROJECT=project, SCRAPY_SPIDER=spider)
        for name in ("SCRAPY_SETTINGS_MODULE", "NOTIFY_SOCKET"):  # no spider may speak for the daemon
            environment.pop(name, None)
        if settings:
            environment["SCRAPY_SETTINGS_MODULE"] = settings
        return environment

    def _finish(self, draft: Draft, identifier: str, is_interrupted: bool, outcome: dict[str, Any]) -> None:
        """Give a job that has run its last status, or the first one again."""
        job = draft.find_job(identifier)
        event = f" after {outcome['duration']} s, {outcome['reason'] or 'exit code 0'}"
        if job.cancel:
            draft.move(job, Status.CANCELED, event, **{**outcome, "reason": BY_USER})
        elif is_interrupted:
            draft.move(job, Status.PENDING, " again, since the daemon is stopping")
        else:
            draft.move(job, Status.FAILED if outcome["reason"] else Status.SUCCESSFUL, event, **outcome)


@functools.lru_cache(maxsize=1)
def memory_usage(tenth: int) -> float:
    """Return the resident memory in MiB at a tenth of a second; psutil takes a quarter of the time of a status."""
    return float(psutil.Process().memory_info().rss / MIB)


def name_jobs(jobs: list[Job]) -> str:
    """Return a list of jobs for an error message."""
    shown = [f"{job.identifier} ({job.spider}, {job.status.value})" for job in jobs[:10]]
    return ", ".join(shown) + (f" and {len(jobs) - 10} more" if len(jobs) > 10 else "")


def check_payload(payload: str) -> None:
    """Raise BadRequest unless a payload is the text of a JSON object."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the payload is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest('the payload must be a JSON object, like {"page": 2}')


def check_options(arg: Sequence[str], setting: Sequence[str], payload: str) -> None:
    """Raise BadRequest unless arguments and settings are NAME=VALUE, and none is the payload again."""
    wrong = [f"arg {text!r:.60}" for text in arg if not re.fullmatch(r"[^-=\0\s][^=\0]*=[^\0]*", text)]
    wrong += [f"setting {text!r:.60}" for text in setting if not re.fullmatch(r"[^\W\d]\w*=[^\0]*", text)]
    if wrong:
        rules = "a name is not empty and has no first '-', that of a setting is an identifier, and there is no NUL"
        raise BadRequest(f"the {wrong[0]} must be NAME=VALUE, like page=2 or LOG_LEVEL=INFO; {rules}")
    if payload != "{}" and any(text.startswith("payload=") for text in arg):
        raise BadRequest("there are both the parameter payload and an arg named payload; leave one of them out")


def read_timeout(text: str) -> float:
    """Return the number of seconds that a timeout is. Raise BadRequest for one that cannot be."""
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= 10**6:
            return seconds
    raise BadRequest(f"the timeout must be a number of seconds above 0, at most 1000000, not {text!r:.40}")


def explain_list_error(exit_code: int, errors: str, scrapy: tuple[str, ...]) -> str:
    """Return why `scrapy list` failed."""
    if "No module named scrapy" in errors and "-m" in scrapy:
        return f"Scrapy is not installed for {scrapy[0]}: run '{scrapy[0]} -m pip install scrapy', or see --scrapy"
    last = [line for line in errors.splitlines() if line.strip()][-8:]
    return f"'scrapy list' failed in the project with exit code {exit_code}:\n" + "\n".join(last)


def explain_exit(exit_code: int) -> str | None:
    """Return why a crawl with this exit code has failed; None when it has not."""
    if exit_code >= 0:
        return f"the crawl ended with exit code {exit_code}; its log says why" if exit_code else None
    return f"the crawl was ended by signal {-exit_code} ({signal.strsignal(-exit_code) or 'unknown'})"


def describe_seconds(seconds: float) -> str:
    """Return a time span like `1d 12m 24s`, without the parts that are zero."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    parts = ((hours // 24, "d"), (hours % 24, "h"), (minute, "m"), (second, "s"))
    return " ".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


# ---- 8. HTTP ---------------------------------------------------------------------------------------------------------

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(rb"(%s) (\S+) HTTP/([0-9])\.([0-9])" % TOKEN)
ABSOLUTE_TARGET = re.compile(rb"https?://([^/?]*)", re.I)
HEADER_LINE = re.compile(rb"(%s):([^\0\r\n]*)" % TOKEN)
SINGLE_HEADERS = ("host", "content-length", "transfer-encoding", "content-type", "content-disposition")
PARAMETER = re.compile(r'(?<![\w*-])([\w-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s,;"]*))', re.ASCII)
PERCENTS = re.compile(rb"(?:%[0-9A-Fa-f]{2})+")
REALM = "scrapy-do"
ALGORITHMS = {"SHA-256": "sha256", "MD5": "md5"}  # of Digest, as HTTP and as hashlib name them, the better one first
IP_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9a-f:.]+\]")
LOG_PATH = re.compile(rf"/get-log/data/({JOB_PATTERN.pattern})\.(out|err)")
REASONS = {
    200: "OK", 206: "Partial Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 414: "URI Too Long",
    415: "Unsupported Media Type", 416: "Range Not Satisfiable", 417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable",
    505: "HTTP Version Not Supported", 507: "Insufficient Storage",
}  # fmt: skip
BYTE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)
LOG_TYPE = "text/plain; charset=utf-8"
PAGE_HEADERS = [  # nothing from elsewhere, and no frame around it, whose owner could lead a click
    ("Content-Security-Policy", "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
     "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
]  # fmt: skip
BOUNDARY_LENGTH = 200
DELIMITER_BYTES = BOUNDARY_LENGTH + 70  # the longest line that ends a part, which may be padded
TOO_SLOW = "the request took too long to arrive"
Headers = Iterable[tuple[str, str]]
Stream = Iterator[bytes]  # pieces of any size
Field = tuple[str, Stream]  # a parameter's name and its value


class HttpError(ScrapyDoError):
    """Refuse a request with a status that only HTTP knows, and headers that go with it."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]):
        super().__init__(message)
        self.status, self.headers = status, headers


class WrongPassword(HttpError):
    """Refuse a user who is unknown or has another password; the answer waits a while, to slow guessing down."""


class Gone(Exception):
    """Say that the client is no longer there, so that nobody needs an answer."""


class Pieces:
    """A buffer over pieces of bytes that arrive one by one."""

    def __init__(self, pieces: Stream, start: bytes = b""):
        self._pieces = pieces
        self.buffer = bytearray(start)

    def more(self) -> bool:
        """Take in one more piece; False at the end."""
        piece = next(self._pieces, b"")
        self.buffer += piece
        return piece != b""

    def take(self, count: int) -> bytes:
        """Remove and return the first bytes of the buffer."""
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def take_until(self, end: bytes, most: int, error: ScrapyDoError) -> bytes:
        """Return what comes before `end`, which is stepped over. Raise `error` when it is not in `most` bytes."""
        while (at := self.buffer.find(end, 0, most + len(end))) < 0:
            if len(self.buffer) >= most + len(end) or not self.more():
                raise error
        return self.take(at + len(end))[:at]


class Wire(Pieces):
    """A connection. The accept loop never waits for it; a thread does, until a deadline for all that it wants."""

    def __init__(self, connection: socket.socket, seconds: float):
        """Take a connection that does not block; `seconds` is the time for a request, and for an answer."""
        super().__init__(iter(()))
        self.socket, self.seconds = connection, seconds
        self.unsent = b""  # of an answer, where the client did not take all at once
        self._deadline: float | None = None  # None in the accept loop

    def wait_no_more(self) -> None:
        """Go over from a thread to the accept loop."""
        self._deadline = None
        self.socket.settimeout(0)

    def expect(self, seconds: float) -> None:
        """Wait from now on, and give the client so many seconds."""
        self._deadline = time.monotonic() + seconds

    def more(self) -> bool:
        """Take in what has arrived, in a thread what arrives until the deadline. Raise Gone when nothing will."""
        if self._deadline is not None:
            if (seconds := self._deadline - time.monotonic()) <= 0:
                raise HttpError(408, TOO_SLOW)
            self.socket.settimeout(seconds)
        try:
            piece = self.socket.recv(CHUNK_BYTES)
        except TimeoutError:
            raise HttpError(408, TOO_SLOW) from None
        except OSError as error:
            if is_not_ready(error):
                return True
            raise Gone from None
        if not piece:
            raise Gone
        self.buffer += piece
        return True

    def take_head(self) -> bytes | None:
        """Return the head of the next request, without the empty line; None when it has not arrived wholly."""
        at = self.buffer.find(b"\r\n\r\n", 0, HEAD_BYTES + 4)
        if at < 0 and len(self.buffer) >= HEAD_BYTES + 4:
            raise HttpError(431, f"the head of the request is longer than {HEAD_BYTES} bytes")
        return self.take(at + 4)[:at].removeprefix(b"\r\n") if at >= 0 else None

    def counted(self, length: int) -> Stream:
        """Yield so many bytes."""
        while length:
            if not self.buffer:
                self.more()
            piece = self.take(length)
            length -= len(piece)
            yield piece

    def chunked(self) -> Stream:
        """Decode a chunked body, RFC 9112 section 7.1; extensions and trailers are ignored."""
        bad = BadRequest("the chunked body is broken")
        while True:
            line = self.take_until(b"\r\n", 256, bad)
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?", line)
            if match is None:
                raise bad
            if not (size := int(match[1], 16)):
                break
            yield from self.counted(size)
            self.take_until(b"\r\n", 0, bad)
        for _ in range(HEADERS_COUNT):
            if not self.take_until(b"\r\n", HEAD_BYTES, bad):
                return
        raise bad

    def send(self, data: bytes) -> None:
        """Send all of `data`; a client that does not take it within the time for a request is gone.

        In the accept loop what the client does not take at once becomes `unsent`.
        """
        self.unsent = data
        try:
            if self._deadline is None:
                self.unsent = data[self.socket.send(data) :]
            else:
                self.socket.settimeout(self.seconds)
                self.socket.sendall(data)
                self.unsent = b""
        except OSError as error:
            if not is_not_ready(error):
                raise Gone from None

    def pause(self, seconds: float) -> None:
        """Wait so long for the client to go, and raise Gone when it does, or says too much to be kept."""
        self.expect(seconds)
        with contextlib.suppress(HttpError):
            while len(self.buffer) <= HEAD_BYTES:
                self.more()
            raise Gone

    def close(self) -> None:
        """End the connection; TLS wants that said, RFC 8446 section 6.1."""
        with self.socket, contextlib.suppress(OSError, ValueError):
            self.socket.settimeout(0)
            getattr(self.socket, "unwrap", int)()

    def linger(self) -> None:
        """Say that nothing more will be sent, and read on for a while: a reset would take the last answer along."""
        with contextlib.suppress(OSError, HttpError, Gone):
            self.socket.shutdown(socket.SHUT_WR)
            self.expect(LINGER_SECONDS)
            while self.more():
                self.buffer.clear()


def is_not_ready(error: OSError) -> bool:
    """Tell whether a connection only has to be asked again later; TLS says so with errors of its own."""
    return isinstance(error, BlockingIOError) or error.__class__.__name__ in ("SSLWantReadError", "SSLWantWriteError")


class Request(NamedTuple):
    """The head of a request."""

    method: str
    target: str  # as it was sent
    path: str
    query: bytes
    headers: dict[str, str]  # by lower-case name
    length: int | None  # of the body; None when that comes in chunks
    keeps_alive: bool
    is_old: bool  # speaks HTTP/1.0


NO_REQUEST = Request("", "", "", b"", {}, None, keeps_alive=False, is_old=False)


def parse_head(head: bytes) -> Request:
    """Return the request that a head describes. Raise BadRequest or HttpError for one that is not sound HTTP/1."""
    first, *lines = head.split(b"\r\n")
    if len(first) > URL_BYTES:
        raise HttpError(414, f"the address is longer than {URL_BYTES} bytes; parameters may go in a POST body")
    match = REQUEST_LINE.fullmatch(first)
    if match is None:
        raise BadRequest("this is not a request line of HTTP/1.1")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise HttpError(505, "this server speaks HTTP/1.1")
    headers, is_old = parse_headers(lines), minor == b"0"
    if not is_old and "host" not in headers:
        raise BadRequest("the Host header is missing")
    wish = headers.get("connection", "").lower()
    keeps_alive = "close" not in wish
    if is_old:  # RFC 9112, sections 9.3 and 6.1
        keeps_alive = keeps_alive and "keep-alive" in wish and "transfer-encoding" not in headers
    path, _, query = target.partition(b"?")
    if match := ABSOLUTE_TARGET.match(path):  # its host counts, RFC 9112 section 3.2.2
        headers["host"] = match[1].decode("latin-1")
        path = path[match.end() :]
    place = decode_text(decode_percent(path), "path")
    length = body_length(headers)
    return Request(method.decode(), target.decode("latin-1"), place, query, headers, length, keeps_alive, is_old)


def parse_headers(lines: list[bytes]) -> dict[str, str]:
    """Return the headers by their lower-case names. Raise BadRequest for what could smuggle a second request in."""
    if len(lines) > HEADERS_COUNT:
        raise HttpError(431, f"there are more than {HEADERS_COUNT} headers")
    headers: dict[str, str] = {}
    for line in lines:
        match = HEADER_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(f"this is not a header: {line[:80].decode('latin-1')!r}")
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        if name in headers and name in SINGLE_HEADERS:
            raise BadRequest(f"the header {name} is there twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def body_length(headers: Mapping[str, str]) -> int | None:
    """Return how long a body is, None for a chunked one. Raise BadRequest or HttpError unless that is plainly said."""
    if (coding := headers.get("transfer-encoding")) is None:
        length = headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise BadRequest(f"the Content-Length {length!r:.40} is not a number")
        return int(length)
    if "content-length" in headers:
        raise BadRequest("there are both a Content-Length and a Transfer-Encoding")
    if coding.lower() != "chunked":
        raise HttpError(501, f"the transfer coding {coding!r:.40} is not known; use chunked")
    return None


def parameters_of(text: str) -> dict[str, str]:
    """Return the parameters in the value of a header by their lower-case names, RFC 9110 section 5.6.6."""
    found = PARAMETER.finditer(text)
    return {match[1].lower(): re.sub(r"\\(.)", r"\1", match[2] or match[3] or "") for match in found}


def decode_percent(data: bytes) -> bytes:
    """Return the bytes with `%XX` decoded; a stray % stays."""
    return PERCENTS.sub(lambda match: bytes.fromhex(match[0].replace(b"%", b"").decode()), data)


def decode_text(data: bytes, what: str) -> str:
    """Return UTF-8 text. Raise BadRequest that names what is not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"the {what} is not UTF-8") from None


def urlencoded_fields(pieces: Stream) -> Iterator[Field]:
    """Yield the fields of `application/x-www-form-urlencoded` data; a value may be of any size, and binary."""
    source = Pieces(itertools.chain(pieces, [b"&"]))
    while source.buffer or source.more():
        name = decode_text(join_pieces(urlencoded_text(source, b"[=&]"), what := "name of a parameter"), what)
        has_value = source.take(1) == b"="
        if name or has_value:
            yield name, urlencoded_text(source, b"&") if has_value else iter(())


def urlencoded_text(source: Pieces, end: bytes) -> Stream:
    """Yield what comes before a pattern that is sure to come."""
    while not (mark := re.search(end, source.buffer)):
        cut = source.buffer.find(b"%", -2)  # a %XX that may not be complete yet
        yield decode_percent(source.take(cut if cut >= 0 else len(source.buffer)).replace(b"+", b" "))
        source.more()
    yield decode_percent(source.take(mark.start()).replace(b"+", b" "))


def multipart_fields(pieces: Stream, boundary: bytes) -> Iterator[Field]:
    """Yield the fields of `multipart/form-data`, RFC 7578; only a whole delimiter line ends a part."""
    source = Pieces(pieces, b"\r\n")
    delimiter = re.compile(rb"\r\n--%b(?:(?=--)|[ \t]{0,64}(?=\r\n))" % re.escape(boundary))
    for _ in multipart_value(source, delimiter):  # the preamble means nothing
        pass
    while source.buffer[:2] != b"--":
        yield part_name(source), multipart_value(source, delimiter)
    while source.more():  # nor does the epilogue
        source.buffer.clear()


def multipart_value(source: Pieces, delimiter: re.Pattern[bytes]) -> Stream:
    """Yield one part's content and step over the delimiter; the two bytes after it, CR LF or `--`, stay."""
    while not (end := delimiter.search(source.buffer)):
        yield source.take(max(0, len(source.buffer) - DELIMITER_BYTES))
        if not source.more():
            raise BadRequest("the multipart body ends before its last boundary; was the upload cut short?")
    yield source.take(end.start())
    source.take(end.end() - end.start())


def part_name(source: Pieces) -> str:
    """Step over the headers of a part, and the line break before them, and return the field's name."""
    endless = BadRequest("a part of the multipart body has no end of its headers")
    headers = parse_headers(source.take_until(b"\r\n\r\n", HEAD_BYTES, endless).split(b"\r\n")[1:])
    kind, _, rest = headers.get("content-disposition", "").partition(";")
    name = parameters_of(rest).get("name")
    if kind.strip().lower() != "form-data" or name is None:
        raise BadRequest("a part of the multipart body has no name")
    return decode_text(name.encode("latin-1"), "name of a part")


def json_fields(pieces: Stream, repeatable: tuple[str, ...] = ()) -> Iterator[Field]:
    """Yield the members of a JSON object; an object, like a payload, or a number as its JSON text.

    Those of the `repeatable` names may be lists.
    """

    def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(twins := dict(pairs)) < len(pairs):
            raise BadRequest(f"a parameter is there twice in the JSON object; its names are {', '.join(sorted(twins))}")
        return twins

    try:
        document = json.loads(join_pieces(pieces, "JSON body"), object_pairs_hook=refuse_twins)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadRequest("the JSON body must be one object")
    for name, value in document.items():
        for item in value if name in repeatable and isinstance(value, list) else [value]:
            if type(item) not in (str, dict, int, float):
                raise BadRequest(f"the parameter '{name:.40}' must be a string, or a list if it may be repeated")
            text = item if isinstance(item, str) else encode_json(item)
            yield name, iter([text.encode("utf-8", "surrogatepass")])


def join_pieces(pieces: Stream, what: str) -> bytes:
    """Return all pieces as one. Raise TooLarge for more than a text may have."""
    joined = bytearray()
    for piece in pieces:
        joined += piece
        if len(joined) > TEXT_BYTES:
            raise TooLarge(f"the {what} is longer than {TEXT_BYTES} bytes")
    return bytes(joined)


def read_fields(headers: Mapping[str, str], pieces: Stream, repeatable: tuple[str, ...]) -> Iterator[Field]:
    """Yield the fields of a body by its content type. Raise HttpError for one that is not known."""
    kind, _, rest = headers.get("content-type", "application/x-www-form-urlencoded").partition(";")
    kind = kind.strip().lower()
    if kind == "application/x-www-form-urlencoded":
        return urlencoded_fields(pieces)
    if kind == "application/json":
        return json_fields(pieces, repeatable)
    if kind != "multipart/form-data":
        raise HttpError(415, f"a body of type '{kind:.60}' is not understood; send a form (curl -F or -d) or JSON")
    boundary = parameters_of(rest).get("boundary", "")
    if not 1 <= len(boundary) <= BOUNDARY_LENGTH:
        raise BadRequest("the multipart body has no boundary in its Content-Type")
    return multipart_fields(pieces, boundary.encode("latin-1"))


def save_pieces(pieces: Stream, path: Path) -> None:
    """Write pieces to a new file as they come. Raise StorageError when the disk does not take them."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.writelines(pieces)
    except OSError as error:
        raise StorageError(f"the upload cannot be stored: {error}") from None


class Route(NamedTuple):
    """An endpoint: what it is called, how, the function that answers, and its parameters."""

    name: str
    methods: tuple[str, ...]
    answer: Callable[..., dict[str, Any]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeatable: tuple[str, ...] = ()  # optional, too
    quick_bytes: float = -1  # answered from memory, and shortly while a list of all jobs is no longer than that

    def explain(self) -> str:
        """Return which parameters exist."""
        shown = [*self.required, *self.optional, *(f"{name} (may be repeated)" for name in self.repeatable)]
        return f"the parameters that exist are {', '.join(shown)}" if shown else "it takes none"


def read_form(route: Route, fields: Iterator[Field], upload: Path | None = None) -> dict[str, Any]:
    """Return the parameters of a request as texts, a repeatable one as the list of its texts.

    An archive is saved to `upload`, and its value is that path. Raise BadRequest that names a parameter which is
    unknown, there twice, or missing, and TooLarge for one that is repeated too often.
    """
    form: dict[str, Any] = {}
    for name, pieces in fields:
        is_repeatable, what = name in route.repeatable, f"parameter '{name:.60}'"
        if not is_repeatable and name not in route.required + route.optional:
            raise BadRequest(f"{route.name} has no {what}; {route.explain()}")
        if name in form and not is_repeatable:
            raise BadRequest(f"the {what} is there twice; {route.explain()}")
        if name == "archive" and upload:
            save_pieces(pieces, upload)
            form[name] = upload
            continue
        text = decode_text(join_pieces(pieces, what), what)
        form[name] = [*form.get(name, ()), text] if is_repeatable else text
        if is_repeatable and (len(form[name]) > REPEATS_COUNT or len("".join(form[name]).encode()) > REPEATS_BYTES):
            raise TooLarge(f"'{name}' may be there {REPEATS_COUNT} times, with {REPEATS_BYTES} bytes in all")
    for name in route.required:
        if name not in form:
            raise BadRequest(f"{route.name} needs the parameter '{name}'; {route.explain()}")
    return form


def list_jobs(daemon: Daemon, **form: str) -> dict[str, Any]:
    """Answer list-jobs.json: one job by its `id`, or those in a `status` that the filters leave."""
    if ("id" in form) == ("status" in form):
        raise BadRequest("list-jobs.json needs one of the parameters status and id")
    if "id" in form:
        if len(form) > 1:
            raise BadRequest("project, spider and limit go with status; leave them out, as id means one job")
        return {"jobs": [daemon.job(form["id"])]}
    groups = {"ACTIVE": ACTIVE, "COMPLETED": COMPLETED, **{status.value: (status,) for status in Status}}
    if form["status"] not in groups:
        raise BadRequest(f"there is no status '{form['status']:.40}'; the ones that exist are {', '.join(groups)}")
    limit = whole_number_of(form, "limit", 10**9, least=1)
    return {"jobs": daemon.jobs(groups[form["status"]], form.get("project"), form.get("spider"), limit)}


READS, CHANGES = ("GET", "HEAD"), ("POST",)
ROUTES = {
    f"/{route.name}": route
    for route in (
        Route("status.json", READS, Daemon.status, quick_bytes=float("inf")),
        Route("push-project.json", CHANGES, lambda daemon, archive: daemon.push(archive), ("archive",)),
        Route("list-projects.json", READS, lambda daemon: {"projects": daemon.projects()}, quick_bytes=float("inf")),
        Route("list-spiders.json", READS, Daemon.spiders, ("project",), quick_bytes=float("inf")),
        Route(
            "schedule-job.json", CHANGES, Daemon.schedule,
            ("project", "spider", "when"), ("description", "payload", "timeout"), ("arg", "setting"),
        ),
        Route(
            "list-jobs.json", READS, list_jobs, (), ("status", "id", "project", "spider", "limit"),
            quick_bytes=QUICK_LIST_BYTES,
        ),
        Route("cancel-job.json", CHANGES, lambda daemon, id: daemon.cancel(id), ("id",)),
        Route("remove-project.json", CHANGES, Daemon.remove, ("name",)),
    )
}  # fmt: skip
LOG_ROUTE = Route("get-log", READS, dict, (), ("follow", "tail"))


class Tls:
    """The certificate of the server, read again when its files have changed."""

    def __init__(self, certificate: Path, key: Path | None, password_file: Path | None):
        """Read the files. Raise ScrapyDoError that says which does not do; without `key` it is in `certificate`."""
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
            password = self._password_file.read_text("utf-8").rstrip("\r\n") if self._password_file else ""
            context.load_cert_chain(*self._files, lambda: password)  # without it OpenSSL asks the terminal
        except (OSError, ValueError) as error:
            files = ", ".join(str(path) for path in (*self._files, self._password_file) if path)
            raise ScrapyDoError(f"the certificate cannot be used: {error}; check {files}") from None
        self._context = context

    def wrap(self, connection: socket.socket) -> Any:
        """Return the connection as one that shakes hands when it is read. Raise OSError when that is impossible."""
        if self._stamps() != self._seen:
            try:
                self._load()
                log("the renewed certificate is in use")
            except ScrapyDoError as error:
                log(f"{error}; the former one stays in use")
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)


class Rules(NamedTuple):
    """What the command line says of the server. Times are seconds."""

    max_upload: int = 256  # MiB
    request_timeout: float = 60.0
    max_connections: int = 256
    allow_host: Sequence[str] = ()
    users: Mapping[str, str] | None = None  # passwords by name; None lets everybody in
    tls: Tls | None = None


class Guard:
    """Refuse what a foreign web page asks of a browser, and whoever has no password where one is wanted."""

    def __init__(self, rules: Rules):
        name = socket.gethostname().lower()
        self._aliases = {name.lower() for name in rules.allow_host}
        self._names = {"localhost", name, name.partition(".")[0], *self._aliases}
        self._wants_user, self._users = rules.users is not None, rules.users or {}
        self._is_tls = rules.tls is not None
        self._secret = os.urandom(32).hex()

    def check(self, request: Request) -> None:
        """Raise Forbidden or HttpError unless the request may be answered."""
        host = request.headers.get("host", "").lower()
        if host and not self._is_own_name(host):
            raise Forbidden(f"{host!r:.100} is no name of this machine; if it should be, start with --allow-host NAME")
        if request.method not in READS and self._is_foreign_page(request.headers, host):
            raise Forbidden("a web page of another site must not change anything here")
        if self._wants_user:
            self._check_user(request)

    def _is_own_name(self, host: str) -> bool:
        """Tell whether a Host header is one that no foreign name, which may be rebound to our address, can give."""
        name = re.sub(":[0-9]*$", "", host)
        return name.removesuffix(".") in self._names or IP_ADDRESS.fullmatch(name) is not None

    def _is_foreign_page(self, headers: Mapping[str, str], host: str) -> bool:
        place = re.sub("^https?://", "", headers.get("origin", host).lower())
        is_own = place == host or re.sub(":[0-9]+$", "", place) in self._aliases
        return not is_own or headers.get("sec-fetch-site") == "cross-site"

    def _check_user(self, request: Request) -> None:
        """Raise HttpError unless the request proves that it comes from a user, RFC 7616 and RFC 7617."""
        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        fields, is_digest = parameters_of(rest), scheme.lower() == "digest"
        if is_digest:
            is_right = self._proves(request, fields)
        elif scheme.lower() == "basic" and self._is_tls:
            is_right = self._is_password(rest)
        else:
            wanted = "a user and a password are wanted here, as curl sends them with --anyauth -u NAME"
            raise self._challenge(f"{wanted}; Basic is taken over TLS only")
        if not is_right:
            raise self._challenge("the user or the password is wrong", WrongPassword)
        if is_digest and not any(is_same(fields.get("nonce", ""), nonce) for nonce in self._nonces()):
            raise self._challenge("the nonce has expired", more=", stale=true")

    def _challenge(self, message: str, kind: type[HttpError] = HttpError, more: str = "") -> HttpError:
        start = f'Digest realm="{REALM}", nonce="{self._nonces()[0]}", qop="auth", charset=UTF-8{more}, algorithm='
        ways = [start + name for name in ALGORITHMS] + [f'Basic realm="{REALM}"'] * self._is_tls
        return kind(401, message, *[("WWW-Authenticate", way) for way in ways])

    def _nonces(self) -> list[str]:
        """Return the nonces that are taken now, the one to give out first; only this daemon can have made them."""
        half = int(2 * time.monotonic() / NONCE_SECONDS)
        return [digest_of("sha256", self._secret, str(number)) for number in (half, half - 1)]

    def _proves(self, request: Request, fields: Mapping[str, str]) -> bool:
        """Tell whether Digest fields come from a user who knows the password; no such user costs the same time."""
        algorithm = ALGORITHMS.get(fields.get("algorithm", "MD5").upper())
        if algorithm is None or fields.get("qop") != "auth" or fields.get("uri") != request.target:
            return False
        name = fields.get("username", "").encode("latin-1").decode("utf-8", "replace")
        known = digest_of(algorithm, name, REALM, self._users.get(name, self._secret))
        asked = digest_of(algorithm, request.method, request.target)
        counted = [fields.get(field, "") for field in ("nonce", "nc", "cnonce", "qop")]
        return is_same(fields.get("response", "").lower(), digest_of(algorithm, known, *counted, asked))

    def _is_password(self, credentials: str) -> bool:
        import binascii

        with contextlib.suppress(ValueError):
            name, _, password = binascii.a2b_base64(credentials.strip()).decode().partition(":")
            return is_same(digest_of("sha256", password), digest_of("sha256", self._users.get(name, self._secret)))
        return False


def digest_of(algorithm: str, *texts: str) -> str:
    """Return the hexadecimal digest of texts joined by colons."""
    import hashlib

    data = ":".join(texts).encode("utf-8", "surrogateescape")
    return hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()


def is_same(text: str, other: str) -> bool:
    """Compare secrets in a time that does not tell where they differ."""
    import hmac

    return hmac.compare_digest(text.encode(), other.encode())


class Handler(Wire):
    """Answer the requests of one connection, one after another, be it in the accept loop or in a thread."""

    def __init__(self, server: Server, connection: socket.socket, address: str):
        super().__init__(connection, server.rules.request_timeout)
        self.server, self.address = server, address
        self.request = NO_REQUEST  # what is to be answered
        self.refusal: ScrapyDoError | None = None  # why it must be refused, perhaps before its head could be read
        self.is_read = False  # all of the request is, so that it is known where the next one begins
        self.is_last = False  # nothing may follow on this connection
        self.due = 0.0  # when the head of the next request must be there; 0 when that is yet to be set

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step; an exception ends this connection and nothing else."""
        try:
            step()
        except Exception as error:
            if not isinstance(error, Gone):
                log_crash("a connection")
            self._forget_request()
            self.unsent = b""
            self.is_read = self.is_last = True

    def receive(self) -> None:
        """Take in what has arrived, and answer what that can be done for without waiting for anything."""
        self.more()
        self._find_request()
        if self._is_quick():
            self.answer()

    def _find_request(self) -> None:
        """Find the next request, or why it must be refused, if its head has arrived."""
        self.is_read = False
        try:
            if (head := self.take_head()) is not None:
                self.request = parse_head(head)
                self.is_last = not self.request.keeps_alive
                self.is_read = self.request.length == 0
                self.server.guard.check(self.request)
        except ScrapyDoError as error:
            self.refusal = error

    def _forget_request(self) -> None:
        self.request, self.refusal, self.due = NO_REQUEST, None, 0.0

    def _has_work(self) -> bool:
        return self.request is not NO_REQUEST or self.refusal is not None

    def _is_quick(self) -> bool:
        """Tell whether there is a request that can be answered at once, and nothing follows it yet."""
        if self.buffer or isinstance(self.refusal, WrongPassword):
            return False
        route = ROUTES.get(self.request.path)
        return self.refusal is not None or (route is not None and self.server.daemon.list_bytes <= route.quick_bytes)

    def needs_thread(self) -> bool:
        """Tell whether there is something that the accept loop must not wait for."""
        return self._has_work() or self.unsent != b"" or (self.is_last and not self.is_read)

    def work(self) -> None:
        """Do in a thread what the accept loop must not wait for, up to where the next request is not there yet."""
        self.expect(self.seconds)
        self.send(self.unsent)
        while self._has_work():
            self.expect(self.seconds)
            self.answer()
            if not self.is_last:
                self._find_request()
        if self.is_last and not self.is_read:
            self.linger()
        self.wait_no_more()

    def answer(self) -> None:
        """Answer the request that was found. Raise Gone when the client is."""
        try:
            if isinstance(self.refusal, WrongPassword):
                time.sleep(PENALTY_SECONDS)
            if self.refusal:
                raise self.refusal
            self._answer(self.request)
        except ScrapyDoError as error:
            self._refuse(error)
        except Gone:
            raise
        except Exception:
            log_crash("answering a request")
            self._refuse(HttpError(500, "the daemon met an error of its own; its log has the details"))
        finally:
            self._forget_request()

    def _answer(self, request: Request) -> None:
        route = ROUTES.get(request.path)
        log_path = None if route else LOG_PATH.fullmatch(request.path)
        if not (route or log_path or request.path == "/"):
            paths = ", ".join(["/", *ROUTES, "/get-log/data/ID.out", "/get-log/data/ID.err"])
            raise NotFound(f"there is no {request.path:.100}; the paths that exist are {paths}")
        methods = route.methods if route else READS
        if request.method not in methods:
            raise HttpError(405, f"{request.path} is asked for by {methods[0]}", ("Allow", ", ".join(methods)))
        if route:
            self._send_json(200, {"status": "ok", **self._call(route, request)})
        elif log_path:
            self._send_log(request, *log_path.groups())
        else:
            self._send(200, "text/html; charset=utf-8", len(PAGE.encode()), PAGE.encode(), PAGE_HEADERS)

    def _call(self, route: Route, request: Request) -> dict[str, Any]:
        """Read the parameters, have the route answer, and clear its upload away."""
        upload = self.server.daemon.new_upload_path() if "archive" in route.required else None
        try:
            return route.answer(self.server.daemon, **read_form(route, self._fields(route, request), upload))
        finally:
            if upload:
                upload.unlink(missing_ok=True)

    def _fields(self, route: Route, request: Request) -> Iterator[Field]:
        if route.methods == READS:
            return urlencoded_fields(iter([request.query]))
        if request.query:
            raise BadRequest(f"{route.name} takes its parameters from the body (curl -F or -d), not the address")
        return read_fields(request.headers, self._body(request), route.repeatable)

    def _body(self, request: Request) -> Stream:
        """Ask for the body and yield it. Raise TooLarge as soon as it is longer than allowed."""
        most, received, started = self.server.rules.max_upload * MIB, 0, time.monotonic()
        too_large = TooLarge(f"the body is larger than {most // MIB} MiB; see --max-upload")
        if request.length and request.length > most:
            raise too_large
        expectation = request.headers.get("expect", "").lower()
        if expectation not in ("", "100-continue"):
            raise HttpError(417, f"the expectation {expectation!r:.40} cannot be met")
        if expectation and not self.is_read and not request.is_old:  # which knows no 100, RFC 9110 section 10.1.1
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        for piece in self.chunked() if request.length is None else self.counted(request.length):
            received += len(piece)
            if received > most:
                raise too_large
            self.expect(started + self.seconds + received / BODY_BYTES_PER_SECOND - time.monotonic())
            yield piece
        self.is_read = True

    def _refuse(self, error: ScrapyDoError) -> None:
        if error.status != 401 or isinstance(error, WrongPassword):  # that a password is wanted is no event
            what = f"{self.request.method} {self.request.path:.100}".strip() or "a request"
            log(f"{what} from {self.address} was refused with {error.status}: {error}")
        self._send_json(error.status, {"status": "error", "msg": str(error)}, getattr(error, "headers", ()))

    def _send_json(self, status: int, answer: dict[str, Any], headers: Headers = ()) -> None:
        data = (encode_answer(answer) + "\n").encode("utf-8", "backslashreplace")
        self._send(status, "application/json", len(data), data, headers)

    def _send(self, status: int, kind: str, length: int | None, data: bytes, headers: Headers = ()) -> None:
        """Send the head and the beginning of an answer at once: two writes would meet Nagle's delay, RFC 896.

        Without a length the rest comes in chunks, RFC 9112 section 7.1, or HTTP/1.0 has it up to the end.
        """
        frame = f"Content-Length: {length}\r\n"
        if length is None:
            frame = "" if self.request.is_old else "Transfer-Encoding: chunked\r\n"
        self.is_last = self.is_last or not self.is_read or not frame
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {kind}\r\n{frame}"
            f"Date: {http_date(int(time.time()))}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
            f"Connection: {'close' if self.is_last else 'keep-alive'}\r\n"  # HTTP/1.0 wants to be told
        )
        head += "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
        self.send(head.encode("latin-1") + (b"" if self.request.method == "HEAD" else data))

    def _send_log(self, request: Request, identifier: str, stream: str) -> None:
        """Send what a log holds now, the part of it that is asked for, or all that comes until its job has ended."""
        form = read_form(LOG_ROUTE, urlencoded_fields(iter([request.query])))
        path = self.server.daemon.log_file(identifier, stream)
        lines, is_followed = whole_number_of(form, "tail", 10**9), whole_number_of(form, "follow", 1)
        with open_log(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = tail_start(file, size, lines)
            if not is_followed:
                asked = BYTE_RANGE.fullmatch(request.headers.get("range", "")) if lines is None else None
                self._send_part(file, start, size, asked)
        if is_followed:
            self._follow_log(path, identifier, start)

    def _send_part(self, file: IO[bytes], start: int, size: int, asked: re.Match[str] | None) -> None:
        """Send a log from its `start`, or the range of bytes that is asked for."""
        status, end, headers = 200, size, [("Accept-Ranges", "bytes")]
        if asked:
            start, end = range_of(asked, size)
            status, headers = 206, [*headers, ("Content-Range", f"bytes {start}-{end - 1}/{size}")]
        pieces = read_part(file, start, end)
        self._send(status, LOG_TYPE, end - start, next(pieces, b""), headers)
        for piece in () if self.request.method == "HEAD" else pieces:
            self.send(piece)

    def _follow_log(self, path: Path, identifier: str, start: int) -> None:
        """Send a log as it grows, until its job has ended, the daemon stops or the client goes."""
        self._send(200, LOG_TYPE, None, b"")
        while self.request.method != "HEAD":
            is_over = self.server.is_over or not self.server.daemon.writes_log(identifier)  # asked before it is read
            with open_log(path) as file:
                size = os.fstat(file.fileno()).st_size
                for piece in read_part(file, start if start <= size else 0, size):  # one that begins again is new
                    self._send_chunk(piece)
            if is_over:
                self._send_chunk(b"")
                return
            start = size
            self.pause(FOLLOW_SECONDS)

    def _send_chunk(self, data: bytes) -> None:
        """Send a piece of an answer without a length; an empty one ends it."""
        self.send(data if self.request.is_old else b"%x\r\n%b\r\n" % (len(data), data))


@functools.lru_cache(maxsize=2)
def http_date(second: int) -> str:
    """Return POSIX seconds as HTTP writes them, RFC 9110 section 5.6.7; Python leaves the names English."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))


def whole_number_of(form: Mapping[str, str], name: str, most: int, least: int = 0) -> int | None:
    """Return a parameter that is a whole number; None when it is not there."""
    text = form.get(name)
    if text is None:
        return None
    if not is_whole_number(text, least, most):
        raise BadRequest(f"the parameter '{name}' must be a whole number from {least} to {most}, not {text!r:.40}")
    return int(text)


def read_part(file: IO[bytes], start: int, end: int) -> Stream:
    """Yield a part of a file. Raise Gone when that is cut short meanwhile: the client must not wait for the rest."""
    file.seek(start)
    while start < end:
        piece = file.read(min(end - start, CHUNK_BYTES))
        if not piece:
            raise Gone
        start += len(piece)
        yield piece


def tail_start(file: IO[bytes], size: int, lines: int | None) -> int:
    """Return where the last lines of a file begin, the last of which may lack its end; None stands for all."""
    if not lines:
        return 0 if lines is None else size
    for start in reversed(range(0, size - 1, CHUNK_BYTES)):
        file.seek(start)
        block = file.read(min(CHUNK_BYTES, size - 1 - start))  # the line feed at the very end begins no other line
        count = block.count(b"\n")
        if count >= lines:
            return start + len(block.rsplit(b"\n", lines)[0]) + 1
        lines -= count
    return 0


def range_of(match: re.Match[str], size: int) -> tuple[int, int]:
    """Return where the range of a Range header begins and ends in so many bytes, RFC 9110 section 14.1.2."""
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last or 0))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        raise HttpError(416, f"the log has {size} bytes; nothing is there yet", ("Content-Range", f"bytes */{size}"))
    return start, end


class Server:
    """Accept connections, wait for their requests, answer the quick ones, and give the others to threads.

    So a slow client costs no thread, and a question for the status no change of threads. Of http.server and
    socketserver nothing would be left to use here, and they cost 7 MiB and 30 ms to import. All is the accept loop's,
    but for what passes between it and the threads.
    """

    def __init__(self, listening: socket.socket, daemon: Daemon, rules: Rules):
        """Take the connections of a socket that listens."""
        self.daemon, self.rules, self.guard = daemon, rules, Guard(rules)
        self.socket = listening
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # for all connections that come from it
        self.host, self.port = self.socket.getsockname()[:2]
        self._connection_count = 0
        self._parked: dict[int, Handler] = {}  # wait for a request, by file descriptor; the first of them is due first
        self._given: queue.SimpleQueue[Handler] = queue.SimpleQueue()  # to the threads
        self._returned: queue.SimpleQueue[Handler] = queue.SimpleQueue()  # by the threads
        self._idle = threading.Semaphore(0)  # counts the threads that have no work
        self.is_over = False

    def serve(self, signals: socket.socket, goes_on: Callable[[], bool]) -> None:
        """Serve until `goes_on()`, called whenever something can be read from `signals`, is false.

        Then stop listening, and let go of all who wait.
        """
        back, self._wake = socket.socketpair()
        with self.socket, back, self._wake, selectors.DefaultSelector() as self._selector:
            self._wake.setblocking(False)
            self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
            self._selector.register(back, selectors.EVENT_READ, lambda: self._take_back(back))
            self._selector.register(signals, selectors.EVENT_READ)
            while signals not in [key.fileobj for key, _ in self._serve_some()] or goes_on():
                pass
            self.is_over = True
            for handler in list(self._parked.values()):
                self._close(handler)

    def _first(self) -> Handler | None:
        return next(iter(self._parked.values()), None)

    def _serve_some(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait until there is something to do, do it, and return what there was."""
        first = self._first()
        events = self._selector.select(None if first is None else max(0.0, first.due - time.monotonic()))
        for key, _ in events:
            if handler := self._parked.get(key.fd):
                self._read(handler)
            elif key.data:
                key.data()
        while (first := self._first()) and first.due <= time.monotonic():
            self._end_wait(first)
        return events

    def _end_wait(self, handler: Handler) -> None:
        """Refuse a request that has not arrived in time; who has not begun one is let go without a word."""
        if handler.buffer:
            handler.refusal = HttpError(408, TOO_SLOW)
            handler.attempt(handler.answer)
            self._go_on(handler)
        else:
            self._close(handler)

    def _accept(self) -> None:
        try:
            connection, address = self.socket.accept()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionError)):  # of a client that went at once
                time.sleep(DESCRIPTOR_SECONDS)
            return
        connection.setblocking(False)
        try:
            connection = self.rules.tls.wrap(connection) if self.rules.tls else connection
        except OSError:
            connection.close()
            return
        handler = Handler(self, connection, address[0])
        self._connection_count += 1
        if self._has_room():
            self._read(handler)
        else:
            self._turn_away(handler, "too many connections at once; try again later")

    def _has_room(self) -> bool:
        """Tell whether the newest connection may stay; who has kept a request back for longest gives way to it."""
        if self._connection_count <= self.rules.max_connections:
            return True
        first = self._first()
        if first is None or first.due > time.monotonic() + self.rules.request_timeout - GRACE_SECONDS:
            return False
        self._close(first)
        return True

    def _turn_away(self, handler: Handler, reason: str) -> None:
        """Answer for want of a thread or of room, without waiting for a request."""
        handler.refusal = Unavailable(reason)
        handler.attempt(handler.answer)
        self._close(handler)

    def _read(self, handler: Handler) -> None:
        handler.attempt(handler.receive)
        self._go_on(handler)

    def _go_on(self, handler: Handler) -> None:
        """Give to a thread what is not quick, and wait for what has not arrived."""
        if handler.needs_thread():
            self._give(handler)
        elif handler.is_last:
            self._close(handler)
        else:
            self._park(handler)

    def _park(self, handler: Handler) -> None:
        number = handler.socket.fileno()
        if number not in self._parked:
            self._selector.register(number, selectors.EVENT_READ)
        if not handler.due:
            handler.due = time.monotonic() + self.rules.request_timeout
            self._parked.pop(number, None)
            self._parked[number] = handler  # as the last one

    def _unpark(self, handler: Handler) -> None:
        number = handler.socket.fileno()
        if self._parked.pop(number, None):
            self._selector.unregister(number)

    def _close(self, handler: Handler) -> None:
        self._unpark(handler)
        handler.close()
        self._connection_count -= 1

    def _give(self, handler: Handler) -> None:
        """Give a connection to a thread, a new one if all have work; where none can be had, refuse the request."""
        self._unpark(handler)
        if not self._idle.acquire(blocking=False):
            try:
                threading.Thread(target=self._work, name="http", daemon=True).start()
            except RuntimeError:
                self._turn_away(handler, "the system gives the daemon no more threads; ask again later")
                return
        self._given.put(handler)

    def _work(self) -> None:
        """Do the work of one thread, until there is none for a while."""
        while True:
            try:
                handler = self._given.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                if self._idle.acquire(blocking=False):
                    return
                continue  # work is on its way to this thread
            handler.attempt(handler.work)
            self._idle.release()  # before the next request can come
            self._returned.put(handler)
            with contextlib.suppress(OSError):  # the loop knows already, or has ended
                self._wake.send(b"x")

    def _take_back(self, back: socket.socket) -> None:
        back.recv(CHUNK_BYTES)
        while not self._returned.empty():
            self._go_on(self._returned.get())

    def drain(self, seconds: float) -> None:
        """Wait for the requests that are being answered, but no longer than so many seconds."""
        end = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while self._connection_count:
                self._close(self._returned.get(timeout=max(0.0, end - time.monotonic())))


# ---- 9. Command line -------------------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IS_FROZEN = 0  # stands between the numbers of signals when a reload may begin
HANDOVER = "SCRAPY_DO_HANDOVER"  # in the environment: the process, and the descriptor of the socket that it listens on


def whole_number(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Return the check of an option that is a whole number."""

    def check(text: str) -> int:
        if not is_whole_number(text, least, most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return check


def seconds(text: str) -> float:
    """Check an option that is a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 1000000")
    return value


def command(text: str) -> tuple[str, ...]:
    """Split an option that is a command as a shell does; a path is taken from where the daemon is started."""
    import shlex

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a command: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("the command is empty")
    return (os.path.abspath(words[0]) if "/" in words[0] else words[0], *words[1:])


OPTIONS = (  # the name, the check, what stands for the value in the help, and what it means
    ("--host", str, "HOST", "address to listen on (%(default)s: this machine only)"),
    ("--port", whole_number(0, 65535), "PORT", "port to listen on, 0 for any (%(default)s)"),
    ("--data-dir", Path, "DIR", "where everything is kept (./%(default)s)"),
    ("--job-slots", whole_number(1, 1000), "COUNT", "crawls that run at once (%(default)s)"),
    ("--completed-cap", whole_number(1), "COUNT", "finished jobs to keep with their logs (%(default)s)"),
    ("--keep-days", whole_number(1), "DAYS", "days after which finished jobs are forgotten"),
    ("--keep-mib", whole_number(1), "MIB", "the most that logs of finished jobs may fill"),
    ("--scrapy", command, "CMD", "the command that is Scrapy (this Python's '-m scrapy')"),
    ("--kill-after", seconds, "SECONDS", "from SIGTERM to SIGKILL (%(default)g)"),
    ("--job-timeout", seconds, "SECONDS", "for crawls whose job has no timeout (0: no limit)"),
    ("--list-timeout", seconds, "SECONDS", "for 'scrapy list' (%(default)g)"),
    ("--on-finish", command, "CMD", "started after each run, the job is its input"),
    ("--max-upload", whole_number(1, 10**6), "MIB", "largest body (%(default)s)"),
    ("--max-connections", whole_number(1, 10**5), "COUNT", "clients at once (%(default)s)"),
    ("--request-timeout", seconds, "SECONDS", "for a request to arrive (%(default)g)"),
    ("--auth-file", Path, "FILE", "users who may come in, a line USER:PASSWORD each"),
    ("--tls-cert", Path, "FILE", "certificate chain; with it only HTTPS is spoken"),
    ("--tls-key", Path, "FILE", "its private key, if that is in a file of its own"),
    ("--tls-password-file", Path, "FILE", "the password of the key, if it has one"),
)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; None takes them from the command line. Wrong ones end the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="scrapy-do", description=(__doc__ or "").splitlines()[0], allow_abbrev=False, fromfile_prefix_chars="@",
        epilog="@FILE takes options from a file, one word a line. The README explains schedules and the API.",
        formatter_class=functools.partial(argparse.HelpFormatter, width=79),  # to find it out takes 0.6 MiB of imports
    )  # fmt: skip
    add = parser.add_argument
    for name, check, metavar, meaning in OPTIONS:
        add(name, type=check, metavar=metavar, help=meaning)
    add("--no-auth", action="store_true", help="let everybody in who reaches the port, whatever --host is")
    add("--allow-host", action="append", metavar="NAME", help="another name by which clients may call this machine")
    add("--version", action="store_true", help="say which version this is, and no more")
    parser.set_defaults(host="127.0.0.1", port=7654, data_dir=Path("scrapy-do-data"))
    parser.set_defaults(**Settings()._asdict(), **Rules(allow_host=[])._asdict())
    options = parser.parse_args(argv)
    if options.auth_file and options.no_auth:
        parser.error("--auth-file and --no-auth contradict each other")
    if (options.tls_key or options.tls_password_file) and not options.tls_cert:
        parser.error("--tls-key and --tls-password-file need --tls-cert")
    if options.version:  # after the check of all others, which `check_program` asks for
        print(f"scrapy-do {__version__}")
        parser.exit()
    return options


def read_users(path: Path) -> dict[str, str]:
    """Return the passwords by user of a file with a line `user:password` each. Raise ScrapyDoError if it has faults."""
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ScrapyDoError(f"others may read or write {path}, which has passwords: run 'chmod 600 {path}'")
            lines = file.read().split("\n")
    except (OSError, ValueError) as error:
        raise ScrapyDoError(f"the users cannot be read from {path}: {error}; see --auth-file") from None
    users: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, _, password = line.partition(":")
        if name in users:
            raise ScrapyDoError(f"line {number} of {path} has the user of an earlier line again")
        if name and password:
            users[name] = password
        elif line.strip():
            raise ScrapyDoError(f"line {number} of {path} is not of the form user:password")
    if not users:
        raise ScrapyDoError(f"{path} has no users; write a line user:password for each")
    return users


def read_rules(options: argparse.Namespace) -> Rules:
    """Return what the options say of the server. Raise ScrapyDoError for files that do not do."""
    if options.auth_file:
        options.users = read_users(options.auth_file)
    if options.tls_cert:
        options.tls = Tls(options.tls_cert, options.tls_key, options.tls_password_file)
    return Rules(**{name: getattr(options, name) for name in Rules._fields})


def listen(options: argparse.Namespace, former: socket.socket | None) -> socket.socket:
    """Return a socket that listens, without asking DNS for a name. Raise ScrapyDoError when it cannot be had.

    `former` is one that does so already, None makes one. Its options may have been others, so it is checked, too.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listening = former or socket.create_server((options.host, options.port), family=family, backlog=BACKLOG_COUNT)
    except OSError as error:
        raise Conflict(
            f"cannot listen on {options.host}, port {options.port}: {error.strerror or error}; "
            "choose another --port or --host, or stop what uses it"
        ) from None
    host = listening.getsockname()[0]
    if not (host.startswith("127.") or host == "::1" or options.auth_file or options.no_auth):
        listening.close()
        raise Forbidden(
            f"whoever reaches {host} could run code as this user; name the users who may by --auth-file, or "
            "say --no-auth if something in front of the daemon checks them"
        )
    return listening


def inherit() -> socket.socket | None:
    """Return the socket on which a daemon listened that was frozen in this process, see `reload`; None without one."""
    process, _, descriptor = os.environ.pop(HANDOVER, "").partition(" ")
    if process != str(os.getpid()):
        return None
    listening = socket.socket(fileno=int(descriptor))
    listening.set_inheritable(False)
    return listening


def tell_supervisor(state: str) -> None:
    """Tell the service manager that has started the daemon how it is, see sd_notify(3); others are told nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        if address:
            wire.sendto(state.encode(), re.sub("^@", "\0", address))


def program() -> list[str]:
    """Return the command that has started this process."""
    return [sys.executable, *sys.orig_argv[1:]]


def check_program() -> None:
    """Raise ScrapyDoError unless the program, which may be a newer one now, can be started with the same options."""
    command = [*program(), "--version"]
    try:
        asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_SECONDS)
        said, reason = asked.stdout, asked.stderr.strip().split("\n")[-1]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        said, reason = "", str(error)
    if not said.startswith("scrapy-do "):
        raise ScrapyDoError(f"the program cannot be started: {reason or 'it does not say its version'}; mend it")


def prepare_reload(daemon: Daemon, turn: threading.Lock, wake: socket.socket) -> None:
    """Bring the daemon to rest and write IS_FROZEN to `wake`; if that cannot be, say why, and let it go on.

    One does so at a time, and none after it has been done: `turn` is kept then.
    """
    turn.acquire()
    tell_supervisor(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        check_program()
        daemon.freeze()
    except ScrapyDoError as error:
        log(f"not reloaded, all goes on as before: {error}, and send SIGHUP again")
        tell_supervisor("READY=1")
        turn.release()
    else:
        wake.send(bytes([IS_FROZEN]))


def reload(daemon: Daemon, listening: socket.socket, signals: socket.socket) -> None:
    """Execute the program again in this process, once the daemon is frozen; end as in a crash when that fails.

    Clients wait until the next daemon takes their connections from the same socket. A signal that comes too late for
    this one stays pending for the next, see execve(2); one that another thread gets then has the effect of a crash.
    """
    daemon.leave()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signals.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for late in set(signals.recv(CHUNK_BYTES)):
            signal.raise_signal(late)
    listening.set_inheritable(True)
    os.environ[HANDOVER] = f"{os.getpid()} {listening.fileno()}"
    try:
        os.execv(sys.executable, program())
    except OSError as error:
        log(f"{sys.executable} cannot be executed: {error}; start the daemon again")
        os._exit(1)  # as in a crash: without timer and writer no crawl can be ended well


def serve(options: argparse.Namespace, signals: socket.socket, wake: socket.socket) -> None:
    """Run the daemon until a signal stops it, each a byte in `signals`. Raise ScrapyDoError when it cannot start."""
    store = Store(Path(os.path.abspath(options.data_dir)))
    daemon = Daemon(store, Settings(**{name: getattr(options, name) for name in Settings._fields}))
    turn, ended_by = threading.Lock(), set[int]()

    def goes_on() -> bool:
        ended_by.update(signals.recv(CHUNK_BYTES))
        if signal.SIGHUP in ended_by:
            threading.Thread(target=prepare_reload, args=(daemon, turn, wake), name="reload", daemon=True).start()
        ended_by.discard(signal.SIGHUP)
        return not ended_by

    try:
        rules, former = read_rules(options), inherit()
        server = Server(listen(options, former), daemon, rules)
        daemon.start(is_next=former is not None)
        host = f"[{server.host}]" if ":" in server.host else server.host
        log(f"scrapy-do {__version__} listens on {'https' if server.rules.tls else 'http'}://{host}:{server.port}")
        tell_supervisor("READY=1")
        listening = server.socket.dup()
        server.serve(signals, goes_on)
        if ended_by == {IS_FROZEN}:
            log("reloading; crawls run on")
            server.drain(DRAIN_SECONDS)
            reload(daemon, listening, signals)
        listening.close()
        tell_supervisor("STOPPING=1")
        log("stopping: crawls are being ended, their jobs will run again at the next start")
        daemon.close()
        server.drain(DRAIN_SECONDS)
    finally:
        daemon.close()
        store.close()


def forget_parent() -> None:
    """Undo what a process may have inherited that breaks a daemon.

    A file that is opened while a standard stream is closed would become that stream, and the kernel keeps no exit code
    of a crawl while SIGCHLD is ignored.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def be_init() -> int | None:
    """Fork, return None in the child, and in the parent its exit status when it has ended.

    The first process of a container gets all orphans, see pid_namespaces(7), and must reap them. The daemon itself
    could not without taking the exit codes of its crawls away.
    """
    signals = {signal.SIGCHLD, *SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        return None
    while True:
        if (number := signal.sigwait(signals)) != signal.SIGCHLD:
            os.kill(child, number)
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                return code if code >= 0 else 128 - code  # as shells have it


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 when told to stop, 1 when the daemon cannot start.

    A signal writes a byte that `serve` waits for, see signal.set_wakeup_fd: a handler that only runs between two
    bytecodes of the main thread could come just too late to end a wait.
    """
    options = parse_options(argv)
    forget_parent()
    if os.getpid() == 1 and (status := be_init()) is not None:
        return status
    sys.setswitchinterval(SWITCH_SECONDS)
    signals, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which a crawl would inherit
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # none may stay blocked that was by the parent, or by `reload`
    try:
        serve(options, signals, wake)
    except ScrapyDoError as error:
        print(f"scrapy-do: {error}", file=sys.stderr)
        return 1
    return 0


# ---- 10. Page --------------------------------------------------------------------------------------------------------

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>scrapy-do</title>
<style>
:root { color-scheme: light dark; --line: #8884; --good: #2a7; --bad: #d44; --soft: #888 }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 0 .8rem 3rem }
h1 { font-size: 1.3rem; margin: .8rem 0 .2rem }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: end }
label { display: flex; flex-direction: column; font-size: .8rem; color: var(--soft); flex: 1 1 9rem; min-width: 0 }
input, select, button { font: inherit; padding: .3rem .5rem; min-width: 0; max-width: 100% }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-top: 1px solid var(--line) }
th { font-size: .8rem; color: var(--soft); border: 0 }
td { overflow-wrap: anywhere }
button { white-space: nowrap }
pre { border: 1px solid var(--line); padding: .5rem; height: 22rem; overflow: auto }
pre, #message { white-space: pre-wrap; overflow-wrap: anywhere }
.soft { color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad) }
#message:empty { display: none }
#message { position: sticky; top: 0; padding: .5rem; border: 1px solid var(--line); background: Canvas }
@media (max-width: 40rem) {
  thead { display: none }
  tr { display: block; border-top: 1px solid var(--line); padding: .4rem 0 }
  td { display: block; border: 0; padding: 0 }
}
</style>
<h1>scrapy-do</h1>
<div id="status" class="soft"></div>
<div id="message" role="status"></div>
<h2>Projects</h2>
<table><tbody id="projects"></tbody></table>
<form id="push">
  <label>Push a zipped project<input type="file" name="archive" accept=".zip" required></label>
  <button>Push</button>
</form>
<h2>Schedule</h2>
<form id="schedule">
  <label>Project<select name="project" required></select></label>
  <label>Spider<select name="spider" required></select></label>
  <label>When<input name="when" value="now" placeholder="every monday at 12:30" required></label>
  <label>Description<input name="description"></label>
  <button>Schedule</button>
</form>
<h2>Active jobs</h2>
<table><thead><tr><th>Job<th>When<th>Since<th></thead><tbody id="active"></tbody></table>
<h2>Finished jobs</h2>
<table><thead><tr><th>Job<th>Outcome<th>Items<th>Took<th>Ended<th></thead><tbody id="completed"></tbody></table>
<div id="viewer" hidden>
  <h2>Log <span id="name" class="soft"></span></h2>
  <pre id="log" tabindex="0"></pre>
  <button id="close">Close</button>
</div>
<noscript>This page needs JavaScript; curl does not.</noscript>
<script>
"use strict";
// Whatever comes from outside goes into the page as text, never as HTML.
const find = id => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
};
const say = (text, bad) => { find("message").textContent = text; find("message").className = bad ? "bad" : ""; };

async function ask(path, body) {
  const answer = await fetch(path, body && {method: "POST", body});
  const document = await answer.json();
  if (document.status !== "ok") throw new Error(document.msg);
  return document;
}

const form = fields => new URLSearchParams(fields);
const button = (text, act) => make("button", {type: "button", textContent: text, onclick: () => run(act)});

async function run(act) {
  try { await act(); } catch (error) { say(error.message, true); }
  await refresh();
}

let reader = null;
async function follow(job, stream) {
  if (reader) reader.abort();
  const mine = reader = new AbortController();
  find("viewer").hidden = false;
  find("name").textContent = `${job.spider} ${job.identifier}.${stream}`;
  find("log").textContent = "";
  find("viewer").scrollIntoView();
  try {
    const answer = await fetch(`get-log/data/${job.identifier}.${stream}?follow=1&tail=1000`, {signal: mine.signal});
    for (const pieces = answer.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      const {done, value} = await pieces.read();
      if (done) break;
      const log = find("log"), atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 40;
      log.append(value);
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) { if (!mine.signal.aborted) say(error.message, true); }
}
find("close").onclick = () => { if (reader) reader.abort(); find("viewer").hidden = true; };

const logs = job => make("td", {},
  button("log", () => { follow(job, "err"); }), " ", button("out", () => { follow(job, "out"); }));
const title = job => make("td", {title: job.identifier},
  make("b", {textContent: job.spider}), ` ${job.project} `,
  make("span", {className: "soft", textContent: job.description}));
const moment = text => make("td", {className: "soft", textContent: text.slice(0, 19)});

function activeRow(job) {
  const cancel = () => confirm(`Cancel ${job.spider}?`) && ask("cancel-job.json", form({id: job.identifier}));
  const when = job.status === "SCHEDULED" ? `${job.schedule}; next ${job.next_run.slice(0, 19)}` : job.status;
  const last = job.status === "SCHEDULED" ? make("td") : logs(job);
  last.append(" ", button("cancel", cancel));
  return make("tr", {}, title(job), make("td", {textContent: when}), moment(job.timestamp), last);
}

function completedRow(job) {
  const isGood = job.status === "SUCCESSFUL", items = job.stats ? job.stats.items : null;
  return make("tr", {}, title(job),
    make("td", {className: isGood ? "good" : "bad", textContent: job.reason || job.status}),
    make("td", {className: isGood && items === 0 ? "bad" : "", textContent: items === null ? "" : `${items} items`}),
    make("td", {textContent: job.duration === null ? "" : `${job.duration} s`}), moment(job.timestamp), logs(job));
}

function choose(name, values) {
  const box = find("schedule").elements[name], was = box.value;
  if ([...box.options].map(option => option.value).join("\n") === values.join("\n")) return;
  box.replaceChildren(...values.map(value => make("option", {value, textContent: value})));
  if (values.includes(was)) box.value = was;
}

function projectRow(list) {
  const remove = () => confirm(`Remove ${list.project}?`) && ask("remove-project.json", form({name: list.project}));
  return make("tr", {}, make("td", {}, make("b", {textContent: list.project})),
    make("td", {textContent: list.spiders.join(", ")}), make("td", {}, button("remove", remove)));
}

const lists = ["list-jobs.json?status=ACTIVE&limit=200", "list-jobs.json?status=COMPLETED&limit=100",
  "list-projects.json"];
let spiders = {}, shown = "";
async function refresh() {
  try {
    const status = await ask("status.json");
    find("status").textContent = `${status.hostname}, up ${status.uptime}, ${status.time.slice(0, 19)}: ` +
      `${status["jobs-running"]} running, ${status["jobs-pending"]} waiting, ${status["jobs-scheduled"]} scheduled`;
    const [active, completed, {projects}] = await Promise.all(lists.map(path => ask(path)));
    const found = await Promise.all(projects.map(project => ask("list-spiders.json?" + form({project}))));
    const news = JSON.stringify([active, completed, found]);
    if (news === shown) return;  // a button must not go away under the mouse
    shown = news;
    spiders = Object.fromEntries(found.map(list => [list.project, list.spiders]));
    find("projects").replaceChildren(...found.map(projectRow));
    choose("project", projects);
    choose("spider", spiders[find("schedule").elements.project.value] || []);
    find("active").replaceChildren(...active.jobs.map(activeRow));
    find("completed").replaceChildren(...completed.jobs.map(completedRow));
  } catch (error) { say(`The daemon does not answer: ${error.message}`, true); }
}

find("schedule").elements.project.onchange = event => choose("spider", spiders[event.target.value] || []);
find("schedule").onsubmit = event => { event.preventDefault(); run(async () => {
  const made = await ask("schedule-job.json", new URLSearchParams(new FormData(event.target)));
  say(made.next_run ? `Next run: ${made.next_run.slice(0, 19)}` : "It starts as soon as a slot is free.");
}); };
find("push").onsubmit = event => { event.preventDefault(); run(async () => {
  say("Pushing...");
  const made = await ask("push-project.json", new FormData(event.target));
  say(`${made.name} has the spiders ${made.spiders.join(", ")}`);
}); };

refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 3000);
</script>
"""


if __name__ == "__main__":
    sys.exit(main())
