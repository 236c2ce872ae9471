"""Prove scrapy_do.py from outside: real HTTP, real processes, real signals, real files; sections as in the module."""
from __future__ import annotations

import ast
import concurrent.futures
import contextlib
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
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import uuid
import warnings
import zipfile
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
from scrapy_do import (
    LAST_INSTANT,
    SPEC_FORMS,
    UNIT_SECONDS,
    WEEKDAYS,
    Recurrence,
    ScrapyDoError,
    parse_spec,
)

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
HOLD = "echo started; while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done"  # until release
POLITE = "trap 'echo bye; exit 0' TERM; echo started; while :; do sleep 0.02; done"
STUBBORN = "trap 'echo asked' TERM; echo started; while :; do sleep 0.02; done"
NOTE = "echo $! >> $SPIDER_DATA_DIR/pids"


def release(tmp_path):
    (tmp_path / "data/spider-data/go").touch()


def until(gate):
    """Return the line of a shell script that waits for a file."""
    return f"until [ -e '{gate}' ]; do sleep 0.02; done\n"


def wait_for(condition, seconds=30.0):
    """Return what `condition` returns as soon as it is true. The only place that sleeps."""
    end = time.monotonic() + seconds
    while True:
        if result := condition():
            return result
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def pack(*entries, method=zipfile.ZIP_DEFLATED):
    """Return a zip archive of (name, content[, mode]), also of what ZipFile only warns of."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content, *mode in entries:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (mode or [0o100644])[0] << 16
            info.compress_type = method
            bundle.writestr(info, content)
    return buffer.getvalue()


def make_zip(files):
    return pack(*files.items())


def stub_project(name="shop", folder="", settings="", more=(), **spiders):
    """Return an archive for the stub: a shell script for each spider; `quick` is always there."""
    spiders = {"quick": "exit 0", **spiders}
    config = f"[settings]\ndefault = {settings}\n[deploy]\nproject = {name}\n"
    files = {"scrapy.cfg": config, "spiders.txt": "\n".join(spiders), "code.py": "x = 1\n", **dict(more)}
    files |= {f"{spider}.sh": script + "\n" for spider, script in spiders.items()}
    return make_zip({folder + path: content for path, content in files.items()})


def big_project(size):
    return stub_project(more={"big.bin": random.Random(1).randbytes(size)})


def real_project(folder="", **files):
    """Return the archive of a project for real Scrapy: `files` are modules of it, by their names."""
    files = {"__init__": "", "spiders/__init__": "", "settings": "SPIDER_MODULES = ['shop.spiders']\n", **files}
    cfg = "[settings]\ndefault = shop.settings\n[deploy:vps]\nproject = shop\n"
    code = {f"{folder}shop/{name}.py": text for name, text in files.items()}
    return make_zip({f"{folder}scrapy.cfg": cfg, **code})


def folder_contents(folder):
    """Return what a folder holds, all the way down: names, modes, bytes."""
    return {
        str(path.relative_to(folder)): (oct(path.lstat().st_mode), path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


class Client:
    port = 0

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def call(self, method, path, body=None, headers=None):
        status, headers, data = self.request(method, path, body, headers)
        assert headers["Content-Type"] == "application/json"
        assert data.endswith(b"}\n")
        return status, json.loads(data)

    def get(self, path, **query):
        status, answer = self.call("GET", f"/{path}.json?{urllib.parse.urlencode(query)}")
        assert (status, answer["status"]) == (200, "ok"), answer
        return answer

    def try_post(self, path, **fields):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.call("POST", f"/{path}.json", urllib.parse.urlencode(fields, doseq=True), headers)

    def post(self, path, **fields):
        status, answer = self.try_post(path, **fields)
        assert (status, answer["status"]) == (200, "ok"), answer
        return answer

    def try_push(self, archive):
        return self.try_post("push-project", archive=archive)

    def push(self, *args, **spiders):
        return self.post("push-project", archive=args[0] if args else stub_project(**spiders))

    def schedule(self, spider="quick", when="now", project="shop", **fields):
        return self.post("schedule-job", project=project, spider=spider, when=when, **fields)["identifier"]

    def job(self, identifier):
        return self.get("list-jobs", id=identifier)["jobs"][0]

    def jobs(self, status):
        return self.get("list-jobs", status=status)["jobs"]

    def wait_job(self, identifier, *statuses):
        """Wait until a job is in one of some statuses, any finished one by default, and return it."""
        wanted = statuses or ("SUCCESSFUL", "FAILED", "CANCELED")
        return wait_for(lambda: (job := self.job(identifier))["status"] in wanted and job)

    def log(self, identifier, stream="err"):
        status, headers, data = self.request("GET", f"/get-log/data/{identifier}.{stream}")
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        return data.decode()


def make_options(**changes):
    """The options that a daemon has which is started without any, but for these."""
    options = scrapy_do.parse_options([])
    vars(options).update(changes)
    return options


class Inside(Client):
    """A daemon in this process, so that a test can reach into its surroundings."""

    def __init__(self, folder, scrapy, **settings):
        self.store = scrapy_do.Store(folder / "data")
        self.options = make_options(scrapy=scrapy, max_upload=4, **settings)
        self.daemon = scrapy_do.Daemon(self.store, self.options)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listening.getsockname()[1]
        self.server = scrapy_do.Server(self.listening, self.daemon, self.options)
        self.daemon.start()
        self.signals, self.wake = socket.socketpair()
        self.thread = threading.Thread(target=self.server.serve_until, args=(self.signals,))
        self.thread.start()

    def limit(self, **options):
        vars(self.options).update(options)
        self.server.guard = scrapy_do.Guard(self.options)

    def close(self):
        self.wake.send(b"x")
        self.thread.join()
        self.signals.close()
        self.wake.close()
        self.listening.close()
        self.daemon.close()
        self.server.drain(5)
        os.close(self.store.lock)


@contextlib.contextmanager
def opened(folder):
    """Have a store, until its folder is to be free for another one in this process."""
    store = scrapy_do.Store(folder)
    try:
        yield store
    finally:
        os.close(store.lock)


class Outside(Client):
    """A daemon in a process of its own, started as a user would."""

    def __init__(self, folder, *options, environment=None, command=(sys.executable, str(MODULE))):
        self.folder, self.options, self.command = folder, options, command
        self.environment = {**os.environ, **(environment or {})}
        self.log_path = folder / "daemon.log"
        self.start()

    def start(self):
        began = self.log_bytes()
        command = [*self.command, "--port", "0", "--data-dir", str(self.folder / "data"), *self.options]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=self.environment, cwd=self.folder)
        self.wait_until_it_listens(began)

    def log_bytes(self):
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def wait_until_it_listens(self, began):
        def address():
            assert self.process.poll() is None, self.log_path.read_text()
            return re.search(r"listens on https?://\S+:([0-9]+) ", self.log_path.read_text()[began:])

        self.port = int(wait_for(address)[1])

    def hang_up(self):
        """Tell it to be executed anew, and return a function that waits until it listens again."""
        began = self.log_bytes()
        self.process.send_signal(signal.SIGHUP)
        return functools.partial(self.wait_until_it_listens, began)

    def reload(self):
        self.hang_up()()

    def stop(self, number=signal.SIGTERM, seconds=30):
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self):
        self.stop(signal.SIGKILL)

    def close(self):
        try:
            if self.process.poll() is None:
                self.stop()
        finally:
            self.process.kill()
            self.process.wait()


def denied(answer, status, *words):
    """Assert that an answer is an error as the contract wants it, with these words, and return its message."""
    if isinstance(answer, requests.Response):
        answer = answer.status_code, answer.headers, answer.content
    found, *headers, document = answer
    if headers:
        assert (headers[0]["Content-Type"], document[-2:]) == ("application/json", b"}\n")
        document = json.loads(document)
    assert (found, document["status"], document.keys()) == (status, "error", {"status", "msg"}), document
    assert [word for word in words if word not in document["msg"]] == [], document["msg"]
    return document["msg"]


def run_main(*options, **more):
    done = subprocess.run([sys.executable, str(MODULE), *options], capture_output=True, text=True, timeout=30, **more)
    return done.returncode, done.stdout + done.stderr


def start_refused(folder, *words):
    """Check that a daemon does not start on a folder, says so in a line, and changes no file there."""

    def contents():
        paths = [path for path in folder.rglob("*") if path.name != "lock"]
        return {path: path.read_bytes() if path.is_file() else path.lstat().st_mode for path in paths}

    before = contents()
    status, said = run_main("--port", "0", "--data-dir", str(folder))
    assert (status, said.count("\n")) == (1, 1), said
    assert [word for word in words if word not in said] == [], said
    assert contents().items() >= before.items()


def running(client, spider, **fields):
    """Schedule a crawl, and return its identifier when it has begun to talk."""
    job = client.schedule(spider, **fields)
    wait_for(lambda: client.job(job)["status"] == "RUNNING" and "started" in client.log(job, "out"))
    return job


def crawl_of(site, tmp_path, job):
    """Return the process of a job that has begun to talk, as the state file knows it."""
    wait_for(lambda: site.job(job)["status"] == "RUNNING" and "started" in site.log(job, "out"))
    return psutil.Process(kept_jobs(tmp_path)[job]["pid"])


def output_of(client, spider, project="shop"):
    """Run a spider, which must succeed, and return what it has printed."""
    job = client.wait_job(client.schedule(spider, project=project))
    assert job["status"] == "SUCCESSFUL", (job, client.log(job["identifier"]))
    return client.log(job["identifier"], "out")


def runs_of(client, schedule, status="COMPLETED"):
    return client.get("list-jobs", status=status, scheduled_by=schedule)["jobs"]


def check_counts(status):
    """The counters of status.json must add up."""
    ended = status["jobs-successful"] + status["jobs-failed"] + status["jobs-canceled"]
    assert status["jobs-run"] == ended + status["jobs-running"], status


def kept_records(path):
    """Return the projects and the jobs in a state file, each a dictionary; it may be half written just then."""

    def document():
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text())

    projects, jobs = {}, {}
    for record in itertools.chain(*wait_for(document)["changes"]):
        group, key = (jobs, record["identifier"]) if "identifier" in record else (projects, record["name"])
        group[key] = record
        if record.get("gone"):
            del group[key]
    return projects, jobs


def kept_jobs(tmp_path):
    return kept_records(tmp_path / "data/state.json")[1]


SPANS = itertools.count(900, -1)


def wake_timer(client):
    """Have the timer look at the clock, as it does once a minute by itself: a schedule due before all others."""
    client.schedule(when=f"every {next(SPANS)} seconds")


def due(tmp_path, schedule):
    return kept_jobs(tmp_path)[schedule]["due"]


def kept_logs(tmp_path):
    return {path.stem for path in (tmp_path / "data/logs").iterdir()}


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def crawls_of(data):
    """Return the name and the environment of each process that the daemon of a folder has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SPIDER_DATA_DIR") == str(data / "spider-data") and process.pid != os.getpid():
                found.append((process.name(), process.environ()))
    return found


def noted(tmp_path, name="pids"):
    path = tmp_path / "data/spider-data" / name
    return path.read_text().split() if path.exists() else []


def living(tmp_path):
    return [pid for pid in map(int, noted(tmp_path)) if not is_gone(pid)]


def said(site, *words):
    wait_for(lambda: all(word in site.log_path.read_text() for word in words))


def make_job(number=1, **fields):
    values = {"actor": "USER", "schedule": "now", "project": "shop", "spider": "quick", "timestamp": 1.5}
    return scrapy_do.Job(f"{number:08x}-9b3c-4b52-a9e0-0d8fcd1cf001", scrapy_do.Status.PENDING, **{**values, **fields})


# HTTP by hand and by curl

NOBODY = "01234567-89ab-cdef-0123-456789abcdef"
URLENCODED, JSON = "application/x-www-form-urlencoded", "application/json"
MULTIPART = "multipart/form-data; boundary=xYz"
USERS = {"ala": "kot:1", "żółw": "hasło", "o'hara \"x\"": "a\\b"}


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
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

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


def speak(site, data, has_body=True):
    with Line(site) as line:
        line.send(data)
        return line.answer(has_body)


def head_of(path="/status.json", *lines, method="GET", version="1.1", host="localhost"):
    return "\r\n".join([f"{method} {path} HTTP/{version}", f"Host: {host}", *lines, "", ""]).encode("latin-1")


def post_of(path, body, kind=URLENCODED, *lines):
    return head_of(path, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *lines, method="POST") + body


def chunks_of(body, size):
    cuts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(cut), cut) for cut in cuts) + b"0\r\n\r\n"


def part_of(name, value, more=""):
    """Return one part of a multipart body with the boundary xYz, without the line break that ends it."""
    return f'--xYz\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value


PLAN = {"project": "shop", "spider": "quick", "when": "every 1000 weeks"}
PLAN_URLENCODED = urllib.parse.urlencode(PLAN).encode()
PLAN_PARTS = b"".join(part_of(name, value.encode()) + b"\r\n" for name, value in PLAN.items())


def url_of(site, path):
    return f"http://localhost:{site.port}{path}"


def curl_of(site, path, *options, scheme="http"):
    """Return the status and the JSON that curl has got."""
    command = ["curl", "-sS", "--max-time", "20", "-w", "%{http_code}", f"{scheme}://localhost:{site.port}{path}"]
    printed = subprocess.run([*command, *options], capture_output=True, timeout=60, check=True).stdout
    return int(printed[-3:]), json.loads(printed[:-3])


def hurry(site, seconds):
    site.limit(request_timeout=seconds)
    timeout = struct.pack("ll", *divmod(int(seconds * 1e6), 10**6))
    site.listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)


def challenge_of(site):
    """Return the nonce of the first challenge, and all challenges, that a refused request is answered with."""
    answer = speak(site, head_of())
    denied(answer, 401, "curl --anyauth -u NAME")
    challenges = answer[1].get_all("WWW-Authenticate")
    return re.search('nonce="([^"]+)"', challenges[0])[1], challenges


def digest_line(made, target="/status.json", method="GET", password="kot:1", way="SHA-256", count="00000001", **changes):
    """Return the Authorization header of ala, RFC 7616, with some fields changed afterwards; None drops one."""

    def h(*texts):
        return hashlib.new({"MD5": "md5"}.get(way, "sha256"), ":".join(texts).encode()).hexdigest()

    fields = {"username": "ala", "realm": "scrapy-do", "nonce": made, "uri": target, "algorithm": way, "qop": "auth",
        "nc": count, "cnonce": "c"}
    fields["response"] = h(h("ala", "scrapy-do", password), made, count, "c", "auth", h(method, target))
    sent = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    return "Authorization: Digest " + ", ".join(f'{name}="{value}"' for name, value in sent.items())


def make_key_pair(folder, name="localhost"):
    """Write cert.pem and key.pem, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    names = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder(names, names, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(secret)
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))


def wait_until_it_is_executed(site):
    """Wait until a daemon is being reloaded, and its new program has begun."""
    said(site, "reloading")
    wait_for(lambda: psutil.Process(site.process.pid).num_threads() == 1)


def try_to_cancel(site, job):
    """Cancel a job of a daemon that may be gone meanwhile."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        site.try_post("cancel-job", id=job)


def feed_of(tmp_path, job):
    return [json.loads(line) for line in (tmp_path / f"data/spider-data/{job}.jsonl").read_text().splitlines()]


# Set-ups, each a fixture


@pytest.fixture(autouse=True)
def no_leaks(request):
    """Fail a test that leaves a thread, a child or a file descriptor behind."""

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def threads():
        return {thread for thread in threading.enumerate() if thread.name not in ("http", "on-finish")}  # these wait for more work

    before = threads(), descriptors()
    yield
    wait_for(lambda: threads() <= before[0] and descriptors() <= before[1])
    assert psutil.Process().children() == []


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "stub-scrapy"
    path.write_text(STUB)
    path.chmod(0o755)
    return (str(path),)


@pytest.fixture
def inside(tmp_path, stub):
    """Return a function that starts a daemon in this process with the stub for Scrapy."""
    with contextlib.ExitStack() as stack:

        def start(**settings):
            client = Inside(tmp_path, settings.pop("scrapy", stub), **settings)
            stack.callback(client.close)
            return client

        yield start


@pytest.fixture
def site(inside):
    return inside()


@pytest.fixture
def outside(tmp_path, stub):
    """Return a function that starts a daemon in a process of its own, with the stub for Scrapy."""
    with contextlib.ExitStack() as stack:

        def start(*options, scrapy=("--scrapy", *stub), **more):
            client = Outside(tmp_path, *scrapy, *options, **more)
            stack.callback(client.close)
            return client

        yield start


@pytest.fixture
def shop(site):
    site.push()
    return site


@pytest.fixture
def follow_me(site, tmp_path):
    """Return a daemon, a crawl that has written a line and waits, and the file that lets it write another and end."""
    site.push(slow=HOLD + "; echo two")
    return site, running(site, "slow"), tmp_path / "data/spider-data/go"


@pytest.fixture
def guarded(site, monkeypatch):
    """Return a running daemon with users, which answers a wrong password soon."""
    monkeypatch.setattr(scrapy_do, "PENALTY_SECONDS", 0.05)
    site.limit(users=USERS)
    return site


@pytest.fixture
def encrypted(site, tmp_path):
    make_key_pair(tmp_path)
    site.limit(tls=scrapy_do.load_certificate(tmp_path / "cert.pem", tmp_path / "key.pem"))
    site.cacert = ("--cacert", str(tmp_path / "cert.pem"))
    return site


@pytest.fixture
def small_disk(outside, tmp_path):
    """Return a daemon on a small file system that nobody else sees, and its folder as it sees it."""
    (tmp_path / "disk").mkdir()
    rights = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=1m,mode=755 tmpfs disk && exec "$@"'
    command = ["unshare", *rights, "--mount", "/bin/sh", "-c", f"cd {tmp_path} && {mount}", "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("the kernel lets us mount no file system")
    options = ("--data-dir", str(tmp_path / "disk/data"), "--job-slots", "2", "--kill-after", "0.5")
    site = outside(*options, command=(*command, sys.executable, str(MODULE)))
    return site, pathlib.Path(f"/proc/{site.process.pid}/root{tmp_path}/disk/data")


WRAPPED = """
import os, runpy, sys, time
{more}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def wrapped(outside):
    """Return a function that starts a daemon after some lines of Python in the same process, at a reload as well."""

    def start(more, *options):
        return outside(*options, command=(sys.executable, "-c", WRAPPED.format(more=more), str(MODULE)))

    return start


@pytest.fixture
def slow(wrapped, tmp_path):
    """Return a function that starts a daemon that waits in the middle of a reload while a file is there, and that file."""
    flag = tmp_path / "wait"

    def start(*options):
        wait = f"while os.path.exists({str(flag)!r}) and {scrapy_do.HANDOVER!r} in os.environ:\n    time.sleep(0.01)"
        site = wrapped(wait, *options)
        flag.touch()
        return site, flag

    return start


@pytest.fixture
def copied(outside, tmp_path):
    """Return a function that starts a daemon from a file of its own, as a module, and returns that file, too."""
    path = tmp_path / "scrapy_do.py"

    def start(*options, **more):
        shutil.copy(MODULE, path)
        return outside(*options, command=(sys.executable, "-m", "scrapy_do"), **more), path

    return start


SHIFTED = """
import time
real = time.time
def shifted():
    try:
        with open({path!r}) as file:
            return real() + float(file.read())
    except FileNotFoundError:
        return real()
time.time = shifted
"""


@pytest.fixture
def clocked(outside, tmp_path):
    """Return a function that starts a daemon with a clock of its own, and a function that sets that clock."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(SHIFTED.format(path=str(tmp_path / "offset")))

    def set_clock(seconds):
        (tmp_path / "new").write_text(str(seconds))
        (tmp_path / "new").rename(tmp_path / "offset")

    def start(*options, offset=0.0):
        set_clock(offset)
        return outside(*options, environment={"PYTHONPATH": str(tmp_path / "python")}), set_clock

    return start


NOTICE = """#!/bin/sh
# What --on-finish starts: it keeps what it got, and what was on the disk then.
mkdir -p "notes/$SCRAPY_DO_JOB"
cp data/state.json "notes/$SCRAPY_DO_JOB/state"
cat > "notes/$SCRAPY_DO_JOB/input"
env > "notes/$SCRAPY_DO_JOB/environment"
echo "$SCRAPY_DO_JOB $SCRAPY_DO_STATUS $*" >> told
until [ ! -e wait ]; do sleep 0.02; done
"""


@pytest.fixture
def told(tmp_path):
    """Return a function that gives what the command of --on-finish was told, line by line."""
    (tmp_path / "note").write_text(NOTICE)
    (tmp_path / "note").chmod(0o755)
    return lambda: (tmp_path / "told").read_text().splitlines() if (tmp_path / "told").exists() else []


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


CLICK = """const found = document.evaluate(arguments[0], document, null, 9, null).singleNodeValue;
if (found) found.click(); return Boolean(found);"""


class Browser:
    def __init__(self, chrome, site):
        self.chrome = chrome
        chrome.get(f"http://localhost:{site.port}/")

    def element(self, path):
        return wait_for(lambda: self.chrome.find_elements("xpath", path))[0]

    def click(self, path):
        """Click; an element that was drawn anew meanwhile is looked for again."""
        self.element(path)
        wait_for(lambda: self.chrome.execute_script(CLICK, path))

    def text(self, identifier):
        return self.chrome.find_element("id", identifier).text

    def fill(self, **fields):
        for name, value in fields.items():
            box = self.chrome.find_element("name", name)
            wait_for(box.is_displayed)
            box.clear()
            box.send_keys(value)


@pytest.fixture
def browser(site):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium or its driver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Browser(chrome, site)
    chrome.quit()


class Pages(http.server.BaseHTTPRequestHandler):
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
        pass


@pytest.fixture
def website():
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
def real(outside):
    """Return a function that starts a daemon with the real Scrapy, in a locale without UTF-8, that has a project.

    Another Scrapy by hand: REAL_SCRAPY=/srv/scrapy-2.11/bin/scrapy python -m pytest -k real.
    """

    def start(*options, more=""):
        if "REAL_SCRAPY" in os.environ and "--scrapy" not in options:
            options = (*options, "--scrapy", os.environ["REAL_SCRAPY"])
        site = outside(*options, scrapy=(), environment={"LANG": "C", "LC_ALL": "C"})
        answer = site.push(real_project(**{"settings": SETTINGS_OF_PAGES + more, "spiders/pages": SPIDERS_OF_PAGES}))
        assert answer["spiders"] == ["pages", "slow"]
        return site

    return start


# ---- 2. Schedules ----------------------------------------------------------------------------------------------------

MINUTE, HOUR, DAY, WEEK = 60, 3600, 86400, 604800
ZONES = (
    "UTC", "Europe/Warsaw", "America/New_York", "Africa/Cairo", "Australia/Lord_Howe", "Asia/Kathmandu",
    "America/Havana", "America/Nuuk", "Pacific/Apia",
)  # fmt: skip
FIRST_INSTANT, END_INSTANT = 631152000, 3786912000  # 1990 to 2090, in UTC
PROPERTY = hypothesis.settings(deadline=None, derandomize=True, max_examples=200)


def instant(text, place=datetime.timezone.utc, fold=0):
    return datetime.datetime.fromisoformat(text).replace(tzinfo=place, fold=fold).timestamp()


def wall_clock(moment, place):
    return datetime.datetime.fromtimestamp(moment, place).replace(tzinfo=None)


def utc_offset(moment, place):
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


def refusal(text):
    with pytest.raises(ScrapyDoError) as caught:
        parse_spec(text)
    assert caught.value.status == 400
    return str(caught.value)


def at(*hours):
    return tuple(hour * HOUR for hour in hours)


def days(*numbers, **more):
    """Return a recurrence on some weekdays; 0 is Monday."""
    return Recurrence("day", weekdays=frozenset(numbers), **more)


ACCEPTED = [
    ("now", None), (" NoW\n", None), ("every second", Recurrence("second")), ("every seconds", Recurrence("second")),
    ("every 1 seconds", Recurrence("second")), ("every 000000000000000000007 seconds", Recurrence("second", 7, 7)),
    ("every 1 to 1 seconds", Recurrence("second", 1, 1)), ("every 10 to 20 seconds", Recurrence("second", 10, 20)),
    ("every minute at :59", Recurrence("minute", times=(59,))),
    ("every 2 to 3 minutes at :30", Recurrence("minute", 2, 3, times=(30,))), ("every hour", Recurrence("hour")),
    ("every hour at :15", Recurrence("hour", times=(15 * MINUTE,))),
    ("every 3 hours at 00:15", Recurrence("hour", 3, 3, times=(15,))),
    ("every hour at 59:59", Recurrence("hour", times=(3599,))), ("every day", Recurrence("day")),
    ("every 2 to 5 days", Recurrence("day", 2, 5)), ("every day at 9:30", Recurrence("day", times=at(9.5))),
    ("every day at 09:30", Recurrence("day", times=at(9.5))), ("every day at 0:00", Recurrence("day", times=at(0))),
    ("every 2 days at 23:59:59", Recurrence("day", 2, 2, times=(DAY - 1,))),
    ("every 1 to 2 weeks", Recurrence("week", 1, 2)),
    *[(f"every {name}", days(day)) for day, name in enumerate(WEEKDAYS)],
    ("EVERY 2 To 3 HOURS At :30", Recurrence("hour", 2, 3, times=(30 * MINUTE,))),
    ("\tevery\r\n 2 \u00a0 days\u3000at  10:30 ", Recurrence("day", 2, 2, times=at(10.5))),
    ("every 3155760000 seconds", Recurrence("second", 3155760000, 3155760000)),
    ("every 36525 days", Recurrence("day", 36525, 36525)), ("every 1 to 5217 weeks", Recurrence("week", 1, 5217)),
    ("every weekday at 6:00", days(0, 1, 2, 3, 4, times=at(6))), ("Every Weekend", days(5, 6)),
    ("every weekday and saturday", days(0, 1, 2, 3, 4, 5)),
    ("every weekend and weekday at 6:00", Recurrence("day", times=at(6))), ("every friday and monday", days(0, 4)),
    ("every day at 6:00, 12:00 and 18:00", Recurrence("day", times=at(6, 12, 18))),
    ("every 1 day at 18:30 and 6:00", Recurrence("day", times=at(6, 18.5))),
    ("every days at 6:00 and 06:00:01", Recurrence("day", times=(6 * HOUR, 6 * HOUR + 1))),
]  # fmt: skip


@pytest.mark.parametrize(("text", "recurrence"), ACCEPTED)
def test_spec_is_understood(text, recurrence):
    assert parse_spec(text) == recurrence
    assert parse_spec(text) is parse_spec(text)
    assert hash(parse_spec(text)) == hash(recurrence)


def test_list_may_be_written_with_commas_and_the_word_and():
    wanted = days(0, 2, 4, times=at(6, 18.5))
    for first, last in itertools.product([", ", ",", " , ", " and ", "\n,"], [" and ", ", and ", ",and\t", ",", " ,"]):
        for times in ("6:00 and 18:30", "18:30,6:00", "06:00 , 18:30:00"):
            assert parse_spec(f"every monday{first}wednesday{last}friday at {times}") == wanted


REFUSED = {  # what is wrong: the spec, and the word that it stumbles on; "" is its end
    "starts with 'now' or 'every'": [("", ""), ("10:30", "10:30"), ("żółw", "żółw"), ("x" * 61, "x" * 57 + "..."),
        ("NOPE", "nope")],
    "a unit of time or a weekday is wanted": [("every", ""), ("every now", "now"), ("every -1 days", "-1"),
        ("every ½ days", "½"), ("every month", "month"), ("every mondays", "mondays"), ("every ｄay", "ｄay")],
    "a unit of time is wanted": [("every 2", ""), ("every 2 to 3", ""), ("every 2 3 days", "3"),
        ("every 1 to 2 mondays at 10:30", "mondays"), ("every 2 - 3 days", "-"), ("every 1,5 days", ","),
        ("every 2 weekdays", "weekdays")],
    "a whole number from 1 is wanted": [("every 0 days", "0"), ("every 1.5 days", "1.5"), ("every 1e3 seconds", "1e3"),
        ("every ² days", "²"), ("every ٣ days", "٣")],
    "a whole number from 2 is wanted": [("every 2 to", ""), ("every 2 to -3 days", "-3"), ("every 2 to 1 days", "1"),
        ("every 2 to 3.5 days", "3.5"), ("every 2 to ٣ days", "٣")],
    "at most 100 years": [("every 3155760001 seconds", "seconds"), ("every 36526 days", None),
        ("every 1 to 36526 days", None), ("every " + "9" * 900 + " days", None)],
    "the plural is wanted": [("every 2 second", "second"), ("every 10 minute", "minute"),
        ("EVERY  2 DAY at 10:30", "day"), ("every 1 to 3 day", "day"), ("every 1 to 1 hour", "hour")],
    "a time like 9:30, 18:00 or 23:59:59 is wanted": [("every day at", ""), ("every day at noon", "noon"),
        ("every day at :30", ":30"), ("every day at 10:3", "10:3"), ("every day at 9:05:07", "9:05:07"),
        ("every day at 9:30pm", "9:30pm"), ("every day at 1٣:30", "1٣:30"), ("every day at 24:00", "24:00"),
        ("every day at 10:60", "10:60"), ("every day at 23:59:60", "23:59:60"), ("every monday at", ""),
        ("every day at 6:00,", ""), ("every day at , 6:00", ","), ("every day at 6:00 and and 7:00", "and"),
        ("every day at " + "1" * 900, "1" * 57 + "...")],
    "a time like :15 (minute 15) or 00:15 (second 15)": [("every hour at", ""), ("every hour at 1:15", "1:15"),
        ("every hour at :5", ":5"), ("every hour at 60:00", None), ("every hour at :60", ":60"),
        ("every hour at 00:60", None), ("every hour at :٣5", ":٣5")],
    "a time like :15 (second 15)": [("every minute at", ""), ("every minute at 00:30", "00:30"),
        ("every minute at :60", ":60")],
    "seconds take no time": [("every second at :00", "at"), ("every 2 to 3 seconds at", "at")],
    "weeks take no time; weekdays do": [("every week at 10:30", "at"), ("every 2 weeks at monday", "at")],
    "a weekday is wanted": [("every monday,", ""), ("every monday and", ""), ("every monday and at 6:00", "at"),
        ("every weekday, 6:00", "6:00")],
    "given twice": [("every monday and monday", "monday"), ("every weekday and friday", "friday"),
        ("every sunday, weekend", None), ("every day at 6:00 and 06:00:00", "06:00:00"),
        ("every monday at 6:00, 7:00 and 06:00", "06:00")],
    "can be a list": [("every 2 days at 6:00 and 18:00", "and"), ("every 1 to 2 days at 6:00, 18:00", ","),
        ("every day, at 6:00", ","), ("every hour at :00 and :30", "and"), ("every day and monday", "and"),
        ("now, ", ",")],
    "nothing may follow": [("now now", "now"), ("every day every day", "every"), ("every day at 10:30 sharp", "sharp"),
        ("every day at 10:30 at 11:30", "at"), ("every monday to friday", "to"),
        ("every day \u200bat 10:30", "\\u200bat"), ("every week monday at 10:30", "monday")],
    "one-off runs are only possible by 'now'": [("tomorrow", "tomorrow"), ("in 5 minutes", "in"), ("at 10:30", "at"),
        ("today at 10:30", "today")],
    "cron syntax is not read": [("0 0 1 * *", "0"), ("*/7 * * * *", "*/7"), ("99 25 * * *", "99"),
        ("@reboot", "@reboot"), ("0 17-9 * * *", "0"), ("0 6 * * 0,7", "0"), ("0 6 * * 8", "0"), ("* * * * * *", "*"),
        ("*/90 * * * *", None), ("*/10 5 * * *", None)],
}  # fmt: skip
REFUSALS = [(text, word, wanted) for wanted, rows in REFUSED.items() for text, word in rows]


@pytest.mark.parametrize(("text", "word", "wanted"), REFUSALS)
def test_spec_is_refused_in_words(text, word, wanted):
    message = refusal(text)
    assert wanted in message
    assert word is None or (f"'{word}' does not fit" if word else "it ends too early") in message
    assert word != "" or "; in the shell, spaces need quotes: -F 'when=every monday at 12:30'" in message
    assert message.endswith(f". The forms: {SPEC_FORMS}")
    assert len(message) < 400


MEANT = [
    ("every weekdays", "every weekday"), ("every mon", "every monday"), ("every mondays", "every monday"),
    ("every thu at 6:00", "every thursday at 6:00"), ("every min", "every minute"),
    ("every 5 min", "every 5 minutes"), ("every 5min", "every 5 minutes"), ("EVERY 30S", "every 30 seconds"),
    ("every 10 minute", "every 10 minutes"), ("every 1 to 3 day at 6:00", "every 1 to 3 days at 6:00"),
    ("every 2days", "every 2 days"), ("every day 10:30", "every day at 10:30"),
    ("every weekday 6:00, 18:30", "every weekday at 6:00, 18:30"), ("every day at 10", "every day at 10:00"),
    ("every hour at 15", "every hour at :15"), ("every minute at 30", "every minute at :30"),
    ("every monday tuesday", "every monday and tuesday"), ("every day at 6:00 18:00", "every day at 6:00 and 18:00"),
    ("every mon, wed , and fri at 6:00", "every monday, wednesday, friday at 6:00"),
    ("every mon and tue at 6", "every monday and tuesday at 6:00"), ("monday at 12:30", "every monday at 12:30"),
    ("5 min", "every 5 minutes"), ("30 12 * * 1", "every monday at 12:30"), ("0 5 * * *", "every day at 5:00"),
    (" 5  5 * *\t* ", "every day at 5:05"), ("*/10 * * * *", "every 10 minutes"), ("*/6 * * * *", "every 6 minutes"),
    ("* * * * *", "every minute"), ("0 * * * *", "every hour at :00"), ("59 * * * *", "every hour at :59"),
    ("0 6 * * 1-5", "every weekday at 6:00"), ("0 6 * * 1,3", "every monday and wednesday at 6:00"),
    ("0 6 * * 0", "every sunday at 6:00"), ("0 6 * * 6,7", "every saturday and sunday at 6:00"),
    ("0 6,18 * * *", "every day at 6:00 and 18:00"),
    ("30 06,18 * * MON,fri", "every monday and friday at 06:30 and 18:30"), ("@hourly", "every hour at :00"),
    ("@daily", "every day at 0:00"), ("@weekly", "every sunday at 0:00"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), MEANT)
def test_refusal_shows_the_sentence_that_was_meant(text, sentence):
    assert f"; write '{sentence}'. The forms:" in refusal(text)
    assert parse_spec(sentence)
    assert ("cron syntax is not read" in refusal(text)) == ("*" in text or "@" in text)


@pytest.mark.parametrize(
    "text",
    [
        "every month", "every 2 months", "every 2 mondays", "every day at 24:00", "every week at 10:30", "every",
        "every 2 days at 6:00 and 18:00", "*/7 * * * *", "0 6 * * 8", "99 25 * * *", "every mon at", "tomorrow",
    ],
)  # fmt: skip
def test_refusal_shows_no_sentence_where_the_meaning_is_not_known(text):
    assert "write" not in refusal(text)


def test_spec_of_a_thousand_characters_is_read_or_refused_at_once():
    for text in ("every " + "9" * 5000 + " days", "every day" + " " * 992, "x" * 10_000_000):
        assert refusal(text) == "schedule not understood: it has more than 1000 characters"
    assert parse_spec("every day" + " " * 991) == Recurrence("day")
    quarters = [f"{minutes // 60:02}:{minutes % 60:02}" for minutes in range(0, 24 * 60, 15)]
    everything = f"every {', '.join(WEEKDAYS)} at {','.join(quarters)}"
    assert len(parse_spec(everything).times) == 96
    begin = time.process_time()
    for text in ("every " + "9 " * 497, "every " + "mon " * 248, everything.replace(",", " "), "1-9," * 250):
        refusal(text)
    assert time.process_time() - begin < 1


WORDS = (
    "now", "every", "0", "1", "2", "7", "to", "at", "second", "seconds", "day", "days", "week", "monday", ":15", "9:05",
    ",", "and", "weekday", "weekend", "sunday", "18:30", "mon", "min", "*", "*/5", "1,5", "@daily", "10", "5min",
)  # fmt: skip


@hypothesis.settings(PROPERTY, max_examples=500)
@hypothesis.given(st.sampled_from([["every"], []]), st.lists(st.sampled_from(WORDS), max_size=9))
def test_spec_of_any_words_is_understood_or_refused(first, words):
    """No other exception may come out, whatever is accepted has a due time, and so has what is suggested."""
    try:
        recurrence = parse_spec(" ".join(first + words))
    except ScrapyDoError as error:
        meant = re.search("; write '(.+)'. The forms", str(error))
        recurrence = meant and parse_spec(meant[1])
    assert recurrence is None or recurrence.next_after(0.0) > 0


SATURDAY = 1718445600.25  # 2024-06-15 12:00:00.25 in Warsaw, two hours ahead of UTC
DUES = [  # spec, and the next three due times
    ("every 2 days", "Mon 17 12:00:00.25, Wed 19 12:00:00.25, Fri 21 12:00:00.25"),
    ("every hour at 00:15", "Sat 15 12:00:15.00, Sat 15 13:00:15.00, Sat 15 14:00:15.00"),
    ("every 3 hours at 00:30", "Sat 15 15:00:30.00, Sat 15 18:00:30.00, Sat 15 21:00:30.00"),
    ("every day at 12:00:01", "Sat 15 12:00:01.00, Sun 16 12:00:01.00, Mon 17 12:00:01.00"),
    ("every monday", "Mon 17 12:00:00.25, Mon 24 12:00:00.25, Mon 01 12:00:00.25"),
    ("every saturday", "Sat 22 12:00:00.25, Sat 29 12:00:00.25, Sat 06 12:00:00.25"),
    ("every weekend at 6:00", "Sun 16 06:00:00.00, Sat 22 06:00:00.00, Sun 23 06:00:00.00"),
    ("every day at 18:00, 6:00 and 12:00", "Sat 15 18:00:00.00, Sun 16 06:00:00.00, Sun 16 12:00:00.00"),
    ("every saturday and monday at 12:30 and 12:00", "Sat 15 12:30:00.00, Mon 17 12:00:00.00, Mon 17 12:30:00.00"),
]


@pytest.mark.parametrize(("text", "dues"), DUES)
def test_next_due_is_exact(zone, text, dues):
    place = zone("Europe/Warsaw")
    found = [wall_clock(due, place) for due in fire(parse_spec(text), SATURDAY, 3)]
    assert ", ".join(f"{due:%a %d %H:%M:%S}.{due.microsecond // 10000:02}" for due in found) == dues


LOCAL = [  # spec, zone, from, and the next three due times, local and in UTC
    ("every day at 02:30", "Europe/Warsaw", "2024-03-30 12:00", "31 03:00 01:00, 01 02:30 00:30, 02 02:30 00:30"),
    ("every day at 02:30", "Europe/Warsaw", "2024-10-26 12:00", "27 02:30 00:30, 28 02:30 01:30, 29 02:30 01:30"),
    ("every hour at :15", "Europe/Warsaw", "2024-10-27 01:30", "27 02:15 00:15, 27 02:15 01:15, 27 03:15 02:15"),
    ("every hour at :45", "Australia/Lord_Howe", "2024-04-07 01:00", "07 01:45 14:45, 07 01:45 15:15, 07 02:45 16:15"),
    ("every hour at :15", "Australia/Lord_Howe", "2024-04-07 01:00", "07 01:15 14:15, 07 01:45 15:15, 07 02:15 15:45"),
    ("every 2 days at 23:30", "America/Nuuk", "2024-03-28 23:30", "31 00:00 01:00, 01 23:30 00:30, 03 23:30 00:30"),
    ("every 2 days at 10:30", "Pacific/Apia", "2011-12-28 10:30", "31 00:00 10:00, 01 10:30 20:30, 03 10:30 20:30"),
    ("every friday at 10:30", "Pacific/Apia", "2011-12-29 00:00", "31 00:00 10:00, 06 10:30 20:30, 13 10:30 20:30"),
    ("every day at 2:15,2:45", "Europe/Warsaw", "2024-03-30 02:30", "30 02:45 01:45, 31 03:00 01:00, 01 02:15 00:15"),
    ("every day at 2:15,3:00", "Europe/Warsaw", "2024-03-31 01:30", "31 03:00 01:00, 01 02:15 00:15, 01 03:00 01:00"),
    ("every day at 2:45,2:15", "Europe/Warsaw", "2024-10-27 01:30", "27 02:15 00:15, 27 02:45 00:45, 28 02:15 01:15"),
    ("every day at 23:30,12:00", "America/Nuuk", "2024-03-30 12:00", "31 00:00 01:00, 31 12:00 13:00, 31 23:30 00:30"),
]


@pytest.mark.parametrize(("text", "name", "begin", "dues"), LOCAL)
def test_next_due_keeps_local_time(zone, text, name, begin, dues):
    place, utc = zone(name), datetime.timezone.utc
    found = fire(parse_spec(text), instant(begin, place), 3)
    assert ", ".join(f"{wall_clock(due, place):%d %H:%M} {wall_clock(due, utc):%H:%M}" for due in found) == dues


@st.composite
def specs(draw, ranges=True):
    """Draw a spec of any form."""
    unit = draw(st.sampled_from([*UNIT_SECONDS, "weekday", "daily"]))
    times = {
        "minute": st.integers(0, 59).map(lambda n: f":{n:02}"),
        "hour": st.integers(0, 3599).map(lambda n: f"{n // 60:02}:{n % 60:02}" if n % 2 else f":{n // 60:02}"),
        "day": st.integers(0, DAY - 1).map(lambda n: time.strftime("%H:%M:%S" if n % 2 else "%H:%M", time.gmtime(n))),
    }
    if unit in ("weekday", "daily"):
        names = draw(st.lists(st.sampled_from(WEEKDAYS), min_size=1, max_size=3, unique=True))
        day = draw(st.sampled_from(["weekday", "weekend", " and ".join(names)])) if unit == "weekday" else "day"
        several = draw(st.lists(times["day"], max_size=3, unique_by=lambda text: f"{text}:00"[:8]))
        return f"every {day}{' at ' * bool(several)}{', '.join(several)}"
    at = draw(st.just("") | times[unit].map(" at {}".format)) if unit in times else ""
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


def alarm(wall, place):
    """Return the first instant at which clocks show the second `wall`, counted from 1970 on that clock, or later."""
    shown = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=wall)
    moment = shown.replace(tzinfo=place).timestamp()  # PEP 495: the first pass; in a gap an instant after it
    return moment if wall_clock(moment, place) == shown else max(m for m in transitions(place.key) if m <= moment)


def next_by_walking(recurrence, count, moment, name):
    """Return what next_after must return for a whole second, straight from the words of the manual."""
    place = zoneinfo.ZoneInfo(name)
    unit, _, _, weekdays, times = recurrence
    if unit in ("second", "minute", "hour"):

        def seconds():
            return wall_clock(moment, place).minute * MINUTE % UNIT_SECONDS[unit] + wall_clock(moment, place).second

        if not times:
            return moment + count * UNIT_SECONDS[unit]
        if count == 1:
            moment += 1
        while count != 1 and seconds() != 0:  # back to where this hour or minute began
            moment -= 1
        while seconds() != times[0]:
            moment += 1
        return moment + (count * UNIT_SECONDS[unit] if count != 1 else 0)
    day, time_of_day = divmod(moment + utc_offset(moment, place), DAY)
    if times and moment in transitions(name) and alarm((day - 1) * DAY + times[-1], place) == moment:
        day -= 1  # a gap over midnight: this is the run of yesterday
    step = count * UNIT_SECONDS[unit] // DAY
    if step > 1:
        return alarm((day + step) * DAY + (*times, time_of_day)[0], place)
    week = [day + number for number in range(9) if (day + number + 3) % 7 in weekdays]  # 1970 began on a Thursday
    dues = {alarm(day * DAY + at, place) for day in week for at in times or (time_of_day,)}
    return min(due for due in dues if due > moment)


def fixed(number):
    return types.SimpleNamespace(randint=lambda low, high: number)


@hypothesis.settings(PROPERTY, max_examples=1000)
@hypothesis.given(specs(), places(whole=True), st.data())
def test_next_due_equals_a_walk_second_by_second(text, drawn, data):
    name, moment = drawn
    recurrence = parse_spec(text)
    hypothesis.assume(recurrence.unit != "hour" or name != "Australia/Lord_Howe")  # where hours are not whole
    with local_zone(name):
        count = data.draw(st.integers(recurrence.low, recurrence.high))
        assert recurrence.next_after(moment, fixed(count)) == next_by_walking(recurrence, count, int(moment), name)


def test_lists_fire_at_each_instant_of_their_days_at_every_change_of_the_clocks():
    """All gaps and folds of a century, with the days before and after them."""
    for place, moment, before, after in jumps():
        low, high = moment + min(before, after), moment + max(before, after)  # on the clock: skipped, or shown twice
        walls = {(low - HOUR) % DAY, low % DAY, (low + high) // 2 % DAY, high % DAY, 12 * HOUR}
        day = (low + high) // 2 // DAY
        for weekdays in (range(7), range(5), (5, 6), (day % 7, (day + 3) % 7)):
            recurrence = days(*weekdays, times=tuple(sorted(walls)))
            week = [day + number for number in range(-3, 9) if (day + number + 3) % 7 in weekdays]
            dues = sorted({alarm(day * DAY + at, place) for day in week for at in walls})
            begin = moment - 2 * DAY - 0.5
            expected = [due for due in dues if due > begin][:12]
            assert fire(recurrence, begin, len(expected)) == expected, (place, moment)
            assert recurrence.resume_after(expected[4] - 28 * DAY, expected[4] - 0.5) == expected[4]


def test_every_hour_at_a_minute_fires_in_every_real_hour():
    """Where clocks change by whole hours, each gap is an hour; by half an hour, none is longer."""
    for place, moment, before, after in jumps():
        for text in (":00", ":15", ":45", "00:15", "59:59"):
            recurrence = parse_spec(f"every hour at {text}")
            dues = fire(recurrence, moment - 5 * HOUR - 0.5, 12)
            gaps = {second - first for first, second in itertools.pairwise(dues)}
            assert gaps == {HOUR} if (after - before) % HOUR == 0 else max(gaps) == HOUR, (place, moment)
            assert dues[-1] % HOUR == (recurrence.times[0] - after) % HOUR


@pytest.mark.parametrize("text", ["every 90 minutes", "every 3 minutes at :20", "every hour at :15", "every 3 hours"])
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


def test_time_of_day_left_open_is_not_shifted_by_any_gap():
    """The runs after the delayed one come at the time of day, and on the days, that the first one set."""
    count = 0
    for place, moment, before, after in jumps():
        wall = moment + (before + after) // 2  # in the middle of the gap
        weekly = days((wall // DAY + 3) % 7)
        steps = {Recurrence("day"): 1, Recurrence("day", 2, 2): 2, Recurrence("week", 2, 2): 14, weekly: 7}
        for recurrence, step in steps.items() if after > before else ():
            origin = alarm(wall - step * DAY, place)
            expected = [alarm(wall + number * step * DAY, place) for number in range(4)]
            assert expected[0] == moment
            assert fire(recurrence.anchored(origin), origin, 4) == expected, (place, moment)
            count += 1
    assert count > 1000


def test_time_of_day_left_open_is_taken_from_the_origin(zone):
    zone("Europe/Warsaw")
    noon = (12 * HOUR + 0.25,)
    assert parse_spec("every day").anchored(SATURDAY) == Recurrence("day", times=noon)
    assert parse_spec("every weekday").anchored(SATURDAY) == days(0, 1, 2, 3, 4, times=noon)
    for text in ("every friday at 10:30", "every day at 6:00, 7:00", "every hour", "every second", "every hour at :15"):
        assert parse_spec(text).anchored(SATURDAY) == parse_spec(text)


@pytest.mark.parametrize("text", ["every day", "every saturday", "every week", "every weekend"])
def test_schedule_is_not_due_at_the_moment_it_is_made(zone, text):
    """The rounding of floats changes at 2**30 and 2**31 seconds, where the local clock is ahead of UTC."""
    zone("Europe/Warsaw")
    moments = random.Random(1)
    for _ in range(1000):
        moment = 2 ** moments.choice([30, 31]) - moments.random() * HOUR
        assert parse_spec(text).anchored(moment).next_after(moment) > moment + HOUR


@hypothesis.settings(PROPERTY)
@hypothesis.given(specs(ranges=False), places(), st.floats(0, 60) | st.floats(0, 900))
def test_resume_equals_stepping(text, drawn, missed):
    name, moment = drawn
    with local_zone(name):
        recurrence = parse_spec(text).anchored(moment)
        is_split_grid = name == "Australia/Lord_Howe" and recurrence.times != () and recurrence.low > 1
        hypothesis.assume(not (recurrence.unit == "hour" and is_split_grid))  # an hour's half has no one right phase
        hypothesis.assume(name != "Pacific/Apia" or 0 not in recurrence.times)  # one of its midnights stood for two
        due = expected = recurrence.next_after(moment)
        now = due + missed * recurrence.low * UNIT_SECONDS[recurrence.unit]
        while expected <= now:
            expected = recurrence.next_after(expected)
        assert recurrence.resume_after(due, now) == pytest.approx(expected, rel=0, abs=1e-6)
        assert recurrence.resume_after(expected, now) == expected  # once is enough


def test_resume_keeps_the_days_over_any_gap():
    """A leap from a gap or into one, above all one at midnight, must not come out a day early or late."""
    for place, moment, before, after in jumps():
        wall = moment + (before + after) // 2
        for step, begin in itertools.product((2, 3), (wall - 6 * DAY, wall)) if after > before else ():
            recurrence, due = Recurrence("day", step, step, times=(wall % DAY,)), alarm(begin, place)
            for now in range(int(due) + 8 * DAY + 1, int(due) + 14 * DAY, DAY):
                dues = (alarm(begin + number * step * DAY, place) for number in itertools.count())
                assert recurrence.resume_after(due, float(now)) == next(due for due in dues if due > now)
    with local_zone("Europe/Warsaw") as place:  # where this sunday has 25 hours
        friday, now, monday = (instant(f"2024-10-{text}", place) for text in ("25T06:00", "27T05:30", "28T06:00"))
        assert parse_spec("every weekday at 6:00").resume_after(friday, now) == monday


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
        "every second", "every 1 to 3 seconds", "every 2 minutes at :15", "every 2 to 3 hours", "every 2 days at 00:30",
        "every 1 to 3 days at 00:30", "every monday", "every 2 weeks", "every weekday at 6:00, 18:30", "every weekend",
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
@hypothesis.given(specs(), places(), st.floats(0, 5e6), st.floats(0, 1))
def test_latest_is_the_greatest_draw_never_recedes_and_bounds_what_resumes(text, drawn, gone, share):
    """Were it less than a due time that was drawn, a restart would draw that one again."""
    name, moment = drawn
    with local_zone(name):
        recurrence = parse_spec(text).anchored(moment)
        dues = {recurrence.next_after(moment, fixed(n)) for n in range(recurrence.low, recurrence.high + 1)}
        assert all(type(due) is float and due > moment for due in dues)
        assert recurrence.latest_after(moment) == max(dues)
        assert recurrence.latest_after(moment + (max(dues) - moment) * share) >= max(dues)
        now = max(dues) + gone
        assert now < recurrence.resume_after(min(dues), now, random.Random(1)) <= recurrence.latest_after(now)


@pytest.mark.parametrize("text", ["every 2 to 4 seconds", "every 2 to 4 hours at :15", "every 2 to 4 days"])
def test_interval_is_drawn_afresh_for_every_run(zone, text):
    zone("UTC")
    recurrence, rng, dues = parse_spec(text), random.Random(1), [0.0]
    for _ in range(200):
        dues.append(recurrence.next_after(dues[-1], rng))
    gaps = [round((second - first) / UNIT_SECONDS[recurrence.unit]) for first, second in itertools.pairwise(dues[1:])]
    assert {number: gaps.count(number) > 40 for number in gaps} == {2: True, 3: True, 4: True}


@pytest.mark.parametrize("name", ["UTC", "Pacific/Apia", "America/Nuuk"])
@pytest.mark.parametrize(
    "text", ["every 36525 days at 23:59:59", "every 1 to 36525 days", "every 3155760000 seconds", "every sunday"]
)
def test_next_due_past_the_year_9999_is_refused(zone, name, text):
    """Always, not only when a far number is drawn; and whatever is accepted can be kept in the state file."""
    zone(name)
    recurrence = parse_spec(text)
    most = recurrence.high * UNIT_SECONDS[recurrence.unit]
    for moment in (LAST_INSTANT - most + 1, LAST_INSTANT - 1):
        for function in (recurrence.next_after, recurrence.latest_after):
            with pytest.raises(ScrapyDoError, match="past the year 9999"):
                function(moment)
    for hours in range(400):
        with contextlib.suppress(ScrapyDoError):
            assert recurrence.next_after(LAST_INSTANT - most - hours * HOUR, fixed(recurrence.high)) <= LAST_INSTANT
    assert recurrence.next_after(LAST_INSTANT - most - 10 * DAY, fixed(recurrence.high)) > LAST_INSTANT - 20 * DAY


@pytest.fixture
def freeze(monkeypatch):
    """Return a function that stops the clock of the schedule library: what people know `every monday` from."""

    def stop(moment):
        class Frozen(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime.fromtimestamp(moment, tz)

        names = types.SimpleNamespace(datetime=Frozen, timedelta=datetime.timedelta, time=datetime.time)
        monkeypatch.setattr(schedule, "datetime", names)

    return stop


def asked(text):
    """Return the jobs of the schedule library that a spec stands for; it knows single weekdays and times."""
    text = text.replace("weekday", ", ".join(WEEKDAYS[:5])).replace("weekend", "saturday, sunday")
    when, _, times = text.removeprefix("every ").partition(" at ")
    for name, at in itertools.product(*(re.split(", | and ", part) for part in (when, times))):
        *numbers, unit = name.replace(" to ", " ").split()
        job = schedule.Scheduler().every(*map(int, numbers[:1]))
        job = getattr(job.to(int(numbers[1])) if numbers[1:] else job, unit)
        yield job.at(at) if at else job


@hypothesis.settings(PROPERTY, max_examples=1000, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(specs(), places(), st.integers(0, 999), st.sampled_from([0, 0, 0, 0, MINUTE, HOUR, DAY]))
def test_schedule_library_agrees_on_a_thousand_specs(freeze, text, drawn, seed, stroke):
    """Also on the stroke, where "later" and "not before" differ. In UTC: where clocks change, the library departs."""
    _, moment = drawn
    moment -= moment % stroke if stroke else 0
    with local_zone("UTC"):
        freeze(moment)
        random.seed(seed)  # the library draws from the module's generator
        answered = min(job.do(int).next_run.timestamp() for job in asked(text))
        assert parse_spec(text).next_after(moment, random.Random(seed)) == pytest.approx(answered, rel=0, abs=1e-6)


# ---- 4. Store --------------------------------------------------------------------------------------------------------


def test_the_state_file_is_one_document_with_a_change_in_each_line_and_is_private(site, tmp_path):
    site.push()
    jobs = [site.schedule(when="every 3 hours", description=text) for text in ("Zażółć", "漢字\n2", 'x"}]\n]}\\')]
    site.post("cancel-job", id=jobs[0])
    lines = (tmp_path / "data/state.json").read_text().splitlines()
    document = json.loads("\n".join(lines))
    assert (document["version"], lines[-1], "Zażółć" in "".join(lines)) == (2, "]}", True)
    changes = [json.loads(line.lstrip(",")) for line in lines[1:-1]]
    assert [[record.get("identifier", record.get("name")) for record in change] for change in changes] == (
        [["shop"], *([job] for job in jobs), jobs[:1]]
    )
    assert [job["description"] for job in kept_jobs(tmp_path).values()] == ["Zażółć", "漢字\n2", 'x"}]\n]}\\']
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "data").iterdir()}
    folders = dict.fromkeys(("projects", "logs", "work", "spider-data"), 0o700)
    assert modes == {"lock": 0o600, "state.json": 0o600, **folders}
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


TEXTS, INSTANTS, STATUSES = st.text(max_size=20), st.floats(0, 4e9), st.sampled_from(scrapy_do.Status)
FIELDS = dict.fromkeys(("identifier", "actor", "schedule", "project", "spider"), TEXTS) | {"timestamp": INSTANTS}
OTHERS = {
    "description": TEXTS, "arg": st.lists(TEXTS).map(tuple), "priority": st.integers(), "items": st.booleans(),
    "due": INSTANTS, "timeout": INSTANTS, "exit_code": st.integers(-64, 255), "reason": TEXTS,
    "stats": st.dictionaries(TEXTS, st.integers() | TEXTS),
}  # fmt: skip
JOBS = st.fixed_dictionaries({"status": STATUSES, **FIELDS}, optional=OTHERS).map(lambda all: scrapy_do.Job(**all))
PROJECTS = st.builds(scrapy_do.Project, TEXTS, TEXTS, TEXTS, TEXTS, st.lists(TEXTS).map(tuple))


@hypothesis.settings(deadline=None, max_examples=50, database=None)
@hypothesis.given(record=JOBS | PROJECTS | st.builds(scrapy_do.Gone, identifier=TEXTS))
def test_a_record_is_read_as_it_was_saved(record):
    line = scrapy_do.encode_record(record)
    assert "\n" not in line
    assert scrapy_do.decode_record(json.loads(line)) == record


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777], ids=oct)
def test_a_data_folder_that_others_may_write_to_is_refused(tmp_path, mode):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine").write_text("x")
    folder.chmod(mode)
    start_refused(folder, f"'chmod go-w {folder}'")
    assert (folder.stat().st_mode & 0o7777, [path.name for path in folder.iterdir()]) == (mode, ["mine"])


def test_a_second_daemon_on_the_same_folder_is_refused(outside, tmp_path):
    first = outside()
    start_refused(tmp_path / "data", "another scrapy_do uses", str(tmp_path / "data"), "--data-dir")
    assert first.get("status")


GROWN = """{"version": 2, "since": 5.0, "changes": [
[]
,[{"name": "shop", "push": "x", "folder": "", "settings": "", "spiders": ["quick"]}]
,[{"identifier": "i", "schedule": "", "status": "PENDING", "actor": "",
 "project": "", "spider": "quick", "timestamp": 1.5}]
,[{"identifier": "i", "schedule": "", "status": "RUNNING", "actor": "",
 "project": "", "spider": "quick", "timestamp": 2.5}]
]}
"""
BAD_STATES = {
    "empty": ("", "Expecting value"),
    "cut-in-the-head": (GROWN[:30], "cannot be read"),
    "not-utf8": (GROWN.encode().replace(b'"quick"', b'"\xff"', 1), "utf-8"),
    "not-an-object": ("[]", "version None, this scrapy_do reads version 2"),
    "version-a-text": ('{"version": "2"}', "version '2', this scrapy_do reads version 2"),
    "newer": ('{"version": 3, "changes": []}', "version 3, this scrapy_do reads version 2"),
    "no-changes": ('{"version": 2}', "a list of 'changes'"),
    "changes-an-object": ('{"version": 2, "changes": {}}', "a list of 'changes'"),
    "nested": ("[" * 100_000, "recursion"),
    "edited-change": (GROWN.replace("PENDING", 'PENDING"'), "Expecting ',' delimiter: line 4 column"),
    "edited-last-change": (GROWN.replace("RUNNING", 'RUNNING"'), "Expecting ',' delimiter: line 6 column"),
    "last-line-deleted": ("\n".join([*GROWN.splitlines()[:-2], "]}\n"]), "cannot be read"),
    "comma-deleted": (GROWN.replace(",[", "[", 1), "Expecting ',' delimiter: line 3 column"),
    "garbage-in-a-change": (GROWN.replace("PENDING", "\0" * 512), "Invalid control character at: line 4 column"),
    "since-a-text": (GROWN.replace("5.0", '"x"'), "could not convert"),
    "a-number": (GROWN.replace("[]", "[7]", 1), "7 is not an object"),
    "bad-status": (GROWN.replace("RUNNING", "DONE"), "the record 'i': 'DONE' is not a valid Status"),
    "bad-type": (GROWN.replace('"spider": "quick"', '"spider": 3', 1), "no field 'spider' can be 3"),
    "bad-time": (GROWN.replace("2.5", "NaN"), "no field 'timestamp' can be nan"),
    "unknown-field": (GROWN.replace('"folder"', '"colour"'), "the record 'shop': no field 'colour' can be ''"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_bad_state_file_is_refused_with_the_reason_and_left_alone(tmp_path, content, reason):
    path = tmp_path / "data/state.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with opened(tmp_path / "data") as store, pytest.raises(scrapy_do.ScrapyDoError) as caught:
        store.load()
    assert f"{path} cannot be read: " in str(caught.value)
    assert reason in str(caught.value)
    assert path.read_bytes() == before


def test_a_bad_state_file_stops_the_start_and_nothing_is_deleted(tmp_path):
    with opened(tmp_path / "data"):
        pass
    (tmp_path / "data/state.json").write_text(GROWN.replace("RUNNING", "DONE"))  # a line of it is wrong
    for name in (f"projects/{uuid.uuid4()}.zip", f"logs/{uuid.uuid4()}.out", "work/x", "spider-data/y"):
        (tmp_path / "data" / name).write_text("x")
    start_refused(tmp_path / "data", f"{tmp_path}/data/state.json cannot be read", "nothing was changed")


@pytest.mark.parametrize(
    ("thing", "name"),
    [("folder", "state.json"), ("folder", "lock")]
    + [("file", name) for name in ("", "projects", "spider-data")]
    + [("broken-link", name) for name in ("state.json", "lock", "logs", "spider-data")],
)
def test_a_folder_that_is_not_as_it_should_be_stops_the_start(tmp_path, name, thing):
    path = tmp_path / "data" / name
    path.parent.mkdir(exist_ok=True)
    {"folder": path.mkdir, "file": path.touch, "broken-link": lambda: path.symlink_to("/nonexistent/x")}[thing]()
    kind = path.lstat().st_mode
    start_refused(tmp_path / "data", str(tmp_path / "data"))
    assert path.lstat().st_mode == kind


def test_people_may_edit_the_file_while_the_daemon_is_stopped(outside, tmp_path):
    site = outside()
    site.push()
    jobs = [site.schedule(when="every 3 hours") for _ in range(3)]
    site.stop()
    path = tmp_path / "data/state.json"
    document = json.loads(path.read_text().replace("every 3 hours", "every 4 hours", 1))
    path.write_text(json.dumps(document))  # as other tools write it
    site.start()
    jobs.append(site.schedule(when="every 5 hours"))
    site.kill()
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if jobs[1] not in line))
    site.start()
    kept = {job["identifier"]: job["schedule"] for job in site.jobs("SCHEDULED")}
    assert kept == {jobs[0]: "every 4 hours", jobs[2]: "every 3 hours", jobs[3]: "every 5 hours"}


def test_leftovers_of_a_crash_are_swept_and_other_files_stay(outside, tmp_path):
    site, data = outside(), tmp_path / "data"
    site.push()
    done = site.wait_job(site.schedule())["identifier"]
    site.kill()
    [push] = kept_records(data / "state.json")[0].values()
    new = str(uuid.uuid4())
    stray = [f"projects/{new}.zip", f"projects/{uuid.uuid4()}/x", f"logs/{new}.out", f"work/{new}/x", "work/y"]
    made = ["state.json.backup", "notes.txt", "projects/README", "logs/mine.txt", "spider-data/feed", f"logs/{new}.err"]
    for name in stray + made:
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("x")
    os.utime(data / made[-1], (1e9, 1e9))  # older than the state file, so it is of another one
    site.start()
    assert [name for name in stray if (data / name).exists()] == []
    kept = [*made, f"logs/{done}.out", f"projects/{push['push']}.zip"]
    assert [name for name in kept if not (data / name).exists()] == []


def test_nothing_is_deleted_when_the_state_file_was_moved_away_and_it_can_come_back(outside, tmp_path):
    site, data = outside(), tmp_path / "data"
    site.push(talk="echo hello")
    job = site.wait_job(site.schedule("talk"))["identifier"]
    for end in (site.stop, site.kill):
        end()
        (data / "state.json").rename(tmp_path / "away")
        before = {path for name in ("projects", "logs", "spider-data") for path in (data / name).rglob("*")}
        for _ in range(2):  # the second time there is a state file, which knows nothing of them
            site.start()
            assert site.get("list-projects")["projects"] == []
            assert {path for path in before if not path.exists()} == set()
            site.stop()
        (tmp_path / "away").rename(data / "state.json")
        site.start()
        assert site.log(job, "out") == "hello\n"
        assert site.wait_job(site.schedule("talk"))["status"] == "SUCCESSFUL"


def test_a_change_is_written_to_the_end_and_a_stop_tidies_the_file(outside, tmp_path):
    site = outside("--completed-cap", "1")
    site.push()
    path = tmp_path / "data/state.json"
    first, gone, canceled = (site.schedule(when="every 3 hours") for _ in range(3))
    inode, head = path.stat().st_ino, path.read_bytes()[:-4]
    site.post("cancel-job", id=gone)
    site.post("cancel-job", id=canceled)
    assert (path.stat().st_ino, path.read_bytes()[: len(head)]) == (inode, head)
    wait_for(lambda: list(kept_records(path)[1]) == [first, canceled])  # the timer forgets the other
    before = kept_records(path)
    site.kill()
    site.start()
    assert [job["identifier"] for job in site.jobs("SCHEDULED")] == [first]
    assert kept_records(path) == before
    site.stop()
    assert len(path.read_text().splitlines()) == 5  # the head, three records, the end
    assert kept_records(path) == before


def test_what_is_forgotten_is_given_back_to_disk_and_memory(outside, tmp_path):
    site, sizes, resident = outside("--completed-cap", "1"), [], []
    site.push()
    for _ in range(6):
        for _ in range(50):
            site.schedule(when="every 3 hours", payload=json.dumps({"x": "y" * 99_000}))
        site.post("cancel-job", project="shop")
        site.schedule(when="every 3 hours")
        sizes.append((tmp_path / "data/state.json").stat().st_size // 2**20)
        resident.append(psutil.Process(site.process.pid).memory_info().rss // 2**20)
    assert max(sizes) < 15, sizes  # of 29 that were written
    assert resident[-1] - resident[2] < 12, resident


MEDDLERS = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, 100),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "replaced": lambda path: (path.with_name("copy").write_text("x"), path.with_name("copy").replace(path)),
}


@pytest.mark.parametrize("meddle", MEDDLERS.values(), ids=MEDDLERS)
def test_a_state_file_that_somebody_spoils_under_the_daemon_is_written_anew(site, tmp_path, meddle):
    site.push()
    jobs = [site.schedule(when="every 3 hours") for _ in range(2)]
    meddle(tmp_path / "data/state.json")
    jobs.append(site.schedule(when="every 3 hours"))
    assert list(kept_jobs(tmp_path)) == jobs


@pytest.fixture
def appended(tmp_path):
    """Return the bytes of a state file before and after a change was written to its end, and where it begins."""
    with opened(tmp_path / "data") as store:
        store.load()
        store.rewrite([scrapy_do.Project("shop", "x", "", "", ("quick",)), make_job(1), make_job(3)])
        assert store.append([make_job(2, description="漢字", reason=os.fsdecode(b"not UTF-8: \xff"))])
        before = store.state_file.read_bytes()
        gone = scrapy_do.Gone(make_job(1).identifier)
        assert store.append([make_job(3, reason='"}}]}\\ żó'), gone, make_job(4, arg=("b=2",))])
        after = store.state_file.read_bytes()
    start = len(before) - 4  # a change is written over the line feed and the brackets
    assert (after[:start], before[start:], after[-4:]) == (before[:start], b"\n]}\n", b"\n]}\n")
    return before, after, start


def is_new(appended, torn):
    """Check that a file that a power cut has left is read as it was before or after the change; tell which."""
    states = [json.loads(data)["changes"] for data in appended[:2]]
    found = scrapy_do.parse_state(torn)["changes"]
    assert found in states, torn
    return found == states[1]


def test_a_change_that_is_torn_at_any_byte_is_whole_or_not_there(appended):
    before, after, start = appended
    size = len(after)
    for cut in range(start, size + 1):
        zeros = bytes(size - cut)
        assert not is_new(appended, after[:cut] + before[cut:]) or cut >= size - 4  # the rest is as it was before
        if cut >= len(before):  # else the old brackets are still on the disk
            assert not is_new(appended, after[:cut] + zeros) or cut >= size - 4  # blocks that were not written
            assert not is_new(appended, before + bytes(cut - len(before)) + after[cut:])  # the first one was not
            assert not is_new(appended, before + after[len(before) : cut])


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
    assert "a crash has cut off the last change" in site.log_path.read_text()
    jobs.append(site.schedule(when="every 3 hours"))
    site.kill()
    site.start()
    assert {job["identifier"] for job in site.jobs("SCHEDULED")} == set(jobs)
    assert site.log_path.read_text().count("has cut off") == 1


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
        if self.step == "short-write" and len(data) > 10:
            return write(data[:10])
        self.fail("short-write")
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
        self.fail(*["fsync"] * ("/state.json" in path), *["folder-fsync"] * path.endswith("/data"))
        return self.real["fsync"](descriptor)

    def replace(self, source, target):
        if str(target).endswith("/state.json"):
            self.fail("rename")
        return self.real["replace"](source, target)


class FailingFile(io.FileIO):
    def __init__(self, faults, descriptor):
        super().__init__(descriptor, "wb")
        self.faults = faults

    def write(self, data):
        return self.faults.write(super().write, bytes(data))


ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE)
STEPS = ("open", "write", "short-write", "fsync", "rename", "folder-fsync")


@pytest.mark.parametrize("step", STEPS)
def test_a_write_that_fails_undoes_the_change_and_recovers_by_itself(site, tmp_path, monkeypatch, step):
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 0.1)
    site.push(hold=HOLD)
    faults, path = Faults(monkeypatch), tmp_path / "data/state.json"
    for faults.error in ERRORS:
        (tmp_path / "data/spider-data/go").unlink(missing_ok=True)
        kept, stopped, running = site.schedule(when="every 3 hours"), site.schedule("hold"), site.schedule("hold")
        for job in (stopped, running):
            site.wait_job(job, "RUNNING")
        saved, before = kept_records(path), site.jobs("ACTIVE")
        if step in ("rename", "folder-fsync"):
            path.write_bytes(path.read_bytes() + b"\n")  # somebody has been at it, so it is written anew
        faults.step = step
        for call, fields in {
            "schedule-job": {"project": "shop", "spider": "quick", "when": "now"}, "cancel-job": {"id": kept},
            "remove-project": {"name": "other"}, "push-project": {"archive": stub_project("other")},
        }.items():  # fmt: skip
            wanted = (404,) if call == "remove-project" else (507, f"{path} cannot be written: ")
            denied(site.try_post(call, **fields), *wanted)
            assert kept_records(path) == saved, "a kill would bring the refused change to light"
        assert site.jobs("ACTIVE") == before
        assert site.get("list-projects")["projects"] == ["shop"]
        assert len({path.stem for path in (tmp_path / "data/projects").iterdir()}) == 1
        site.post("cancel-job", id=stopped)  # or a log that fills the disk could not be stopped
        assert site.job(stopped)["status"] == "CANCELED"
        release(tmp_path)
        assert site.wait_job(running)["status"] == "SUCCESSFUL"  # what happens on a full disk is seen,
        faults.step = ""
        wait_for(lambda running=running: kept_jobs(tmp_path)[running]["status"] == "SUCCESSFUL")  # and saved when there is space again
        assert kept_jobs(tmp_path)[stopped]["status"] == "CANCELED"
        site.post("cancel-job", id=kept)
        assert kept_jobs(tmp_path)[kept]["status"] == "CANCELED"
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


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
    assert [job["schedule"] for job in kept_jobs(tmp_path).values()] == ["every 3 hours", "every 2 hours"]


def test_what_a_full_disk_did_not_take_is_saved_at_the_stop(inside, tmp_path, monkeypatch):
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 60)
    site = inside()
    site.push(hold=HOLD)
    running = site.wait_job(site.schedule("hold"), "RUNNING")["identifier"]
    faults = Faults(monkeypatch)
    faults.step, faults.error = "write", errno.ENOSPC
    release(tmp_path)
    assert site.wait_job(running)["status"] == "SUCCESSFUL"
    faults.step = ""
    site.daemon.close()
    assert kept_jobs(tmp_path)[running]["status"] == "SUCCESSFUL"


@pytest.mark.parametrize("name", ["mkdir", "link", "open", "chmod", "utime", "unlink", "rmdir", "scandir", "listdir"])
def test_no_slot_is_lost_whatever_fails_around_a_crawl(inside, tmp_path, monkeypatch, name):
    """The files of crawls, rather than the state, are what the disk does not take."""
    site = inside(job_slots=1)
    site.push()
    real, fault = getattr(os, name), []

    def fail(path, *args, **options):
        if fault and any(part in str(path) for part in ("/work", "/logs", "/projects")):
            raise OSError(fault[0], os.strerror(fault[0]), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, name, fail)
    for error in ERRORS:
        fault.append(error)
        ends = [site.wait_job(site.schedule()) for _ in range(2)]
        assert site.try_push(stub_project("other"))[0] in (200, 507)
        fault.clear()
        for job in ends:
            assert job["status"] == "SUCCESSFUL" or os.strerror(error) in job["reason"]
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
        assert site.get("status")["jobs-running"] == 0


def test_a_log_that_fills_the_disk_is_stopped_by_a_cancel_and_all_recovers(small_disk):
    site, data = small_disk
    site.push(hold=HOLD, fill="cat /dev/zero 2> /dev/null; sleep 60")
    done = site.wait_job(site.schedule())["identifier"]
    kept = site.schedule(when="every 2 hours", payload=json.dumps({"x": "y" * 90_000}))  # more than what an end frees
    running, filling = site.schedule("hold"), site.schedule("fill")
    wait_for(lambda: shutil.disk_usage(data).free == 0)
    wait_for(lambda: site.try_post("schedule-job", project="shop", spider="quick", when="now")[0] == 507)
    before = site.jobs("ACTIVE")
    for path, fields in {
        "schedule-job": {"project": "shop", "spider": "quick", "when": "every 2 hours"},
        "cancel-job": {"id": kept}, "push-project": {"archive": stub_project("other")},
    }.items():  # fmt: skip
        assert site.try_post(path, **fields)[0] == 507, path
    assert site.jobs("ACTIVE") == before
    assert site.job(done)["status"] == "SUCCESSFUL"
    site.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "not reloaded, all goes on as before" in site.log_path.read_text())
    site.post("cancel-job", id=filling)
    assert site.job(filling)["status"] == "CANCELED"
    (data / "spider-data/go").touch()
    assert site.wait_job(running)["status"] == "SUCCESSFUL"
    assert kept_records(data / "state.json")[1][running]["status"] == "RUNNING"
    (data / f"logs/{filling}.out").write_bytes(b"")
    wait_for(lambda: kept_records(data / "state.json")[1][running]["status"] == "SUCCESSFUL")
    site.post("cancel-job", id=kept)
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    log = site.log_path.read_text()
    assert log.count("changes are refused until that is mended") == log.count("can be written again") >= 1
    jobs = {job["identifier"]: job["status"] for job in site.jobs("COMPLETED")}
    assert jobs == {job: fields["status"] for job, fields in kept_records(data / "state.json")[1].items()}


def test_a_disk_that_becomes_read_only_costs_no_slot_and_all_recovers(small_disk, tmp_path):
    site, data = small_disk
    disk, enter = tmp_path / "disk", ["nsenter", f"--target={site.process.pid}", "--mount", "sh", "-c"]
    go = tmp_path / "go"
    site.push(wait=f"while [ ! -e {go} ]; do sleep 0.02; done", stubborn="trap '' TERM; while :; do sleep 0.02; done")
    running, stubborn = site.schedule("wait"), site.schedule("stubborn")
    for job in (running, stubborn):
        site.wait_job(job, "RUNNING")
    subprocess.run([*enter, f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}"], check=True)
    denied(site.try_post("schedule-job", project="shop", spider="quick", when="now"), 507, "Read-only file system")
    assert site.try_push(stub_project("other"))[0] == 507
    go.touch()
    assert site.wait_job(running)["status"] == "SUCCESSFUL"
    site.post("cancel-job", id=stubborn)
    assert "it had to be killed" in site.job(stubborn)["reason"]
    assert site.jobs("ACTIVE") == []
    subprocess.run([*enter, f"umount {disk}"], check=True)
    wait_for(lambda: kept_records(data / "state.json")[1][stubborn]["status"] == "CANCELED")
    jobs = [site.schedule() for _ in range(4)]
    assert {site.wait_job(job)["status"] for job in jobs} == {"SUCCESSFUL"}
    site.reload()
    assert [path.name for path in (data / "work").iterdir()] == ["shim"]  # what could not be deleted


TREE = """mkdir -p d/e/f 'new
line'; ln -s /tmp d/link; ln -s nowhere d/dangling; mkfifo d/e/pipe; echo x > d/e/f/file; chmod 000 d/e/f/file
touch "$(printf '\\377')"; chmod 000 d/e/f; chmod 555 d/e d; chmod 555 .; exit 0"""


def test_a_working_copy_is_deleted_whatever_a_crawl_of_another_user_leaves_there(tmp_path):
    if os.getuid() != 0:
        pytest.skip("to become another user takes root")
    (tmp_path / "any.zip").write_bytes(stub_project())
    scrapy_do.unpack(tmp_path / "any.zip", tmp_path / "any")  # imports what the other user may not be able to read
    folder = pathlib.Path(tempfile.mkdtemp())  # where the other user may go, too
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)
    os.chown(folder, 65534, 65534)
    os.setresuid(65534, 65534, 0)
    try:
        site = Inside(folder, (str(folder / "stub"),), job_slots=1)
        try:
            site.push(tree=TREE)
            for _ in range(2):
                assert site.wait_job(site.schedule("tree"))["status"] == "SUCCESSFUL"
            left = folder / "data/work" / str(uuid.uuid4())  # as after kill -9
            subprocess.run(["/bin/sh", "-c", f"mkdir {left}; cd {left}; {TREE}"], check=True)
        finally:
            site.close()
        with opened(folder / "data") as store:
            store.load()
            store.sweep([], [])
            wait_for(lambda: [path.name for path in store.work.iterdir()] == ["shim"])
    finally:
        os.setresuid(0, 0, 0)
        shutil.rmtree(folder)
    assert pathlib.Path("/tmp").stat().st_mode & 0o1777 == 0o1777


def test_what_cannot_be_deleted_is_a_line_in_the_log(site, tmp_path, capsys):
    site.push(deep=f"p={'d/' * 800}; mkdir -p $p; cd $p; mkdir -p $p")  # deeper than Python calls itself
    job = site.wait_job(site.schedule("deep"))
    work = tmp_path / "data/work" / job["identifier"]
    said = []
    is_said = f"{work} cannot be deleted: "
    wait_for(lambda: said.append(capsys.readouterr().err) or not work.exists() or is_said in "".join(said))
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    subprocess.run(["rm", "-rf", work], check=True)


def test_nothing_is_lost_or_doubled_by_kill_9(outside, tmp_path):
    """Kill the daemon under load; after each start what it has acknowledged must be there, and no more.

    By hand for longer: KILL_ROUNDS=1000 python -m pytest -k kill_9
    """
    site = outside("--completed-cap", "60", "--job-slots", "3")
    site.push(hold="exec sleep 60", brief="sleep 0.05")
    load = Load(site)
    for number in range(int(os.environ.get("KILL_ROUNDS", "6"))):
        with load.at_work(number):
            enough = len(load.sure) + random.Random(number).randrange(1, 12)
            wait_for(lambda enough=enough: len(load.sure) >= enough)
            site.kill()
        site.start()
        load.check(tmp_path / "data")
    load.finish(tmp_path / "data")
    assert site.stop() == 0


def test_nothing_is_lost_or_doubled_while_the_disk_fails_again_and_again(inside, tmp_path, monkeypatch):
    """By hand for longer: FAULT_ROUNDS=1000 python -m pytest -k again_and_again."""
    monkeypatch.setattr(scrapy_do, "RETRY_SECONDS", 0.05)
    site = inside(completed_cap=60, job_slots=3, kill_after=1.0)
    site.push(hold="exec sleep 60", brief="sleep 0.05")
    load, faults = Load(site), Faults(monkeypatch)
    for number in range(int(os.environ.get("FAULT_ROUNDS", "6"))):
        draw = random.Random(number)
        with load.at_work(number):
            for _ in range(3):
                enough = len(load.sure) + draw.randrange(1, 5)
                wait_for(lambda enough=enough: len(load.sure) >= enough)
                enough = load.refusals + draw.randrange(1, 5)
                faults.error, faults.step = draw.choice(ERRORS), draw.choice(STEPS[:4])
                wait_for(lambda enough=enough: load.refusals >= enough)
                faults.step = ""
        wait_for(lambda: not site.store.is_behind)
        load.check(tmp_path / "data")
    assert load.errors == []
    load.finish(tmp_path / "data")


class Load:
    """Clients of a daemon that may be killed or short of space at any moment, and what they know of it."""

    def __init__(self, site):
        self.site, self.refusals, self.errors = site, 0, []
        self.sure, self.maybe, self.refused = {}, set(), set()  # sure ones by identifier, others by description
        self.asked, self.canceled, self.ended = set(), set(), set()
        self.projects = {}  # whether one is there; None is unknown, since there was no answer

    @contextlib.contextmanager
    def at_work(self, number):
        """Have three clients make random calls, until the end or until the daemon is gone."""
        stop = threading.Event()
        threads = [threading.Thread(target=self.work, args=(stop, client, number)) for client in range(3)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def work(self, stop, client, number):
        draw = random.Random(f"{client} {number}")
        try:
            while not stop.is_set():
                draw.choice([*[self.schedule] * 3, self.change_project, self.read])(draw, f"p{client}")
        except (OSError, http.client.HTTPException, ValueError):
            pass  # it was killed
        except Exception as error:
            self.errors.append(error)
            raise

    def try_post(self, path, allowed, **fields):
        """Return the status and the answer of a call, which the disk may refuse."""
        status, answer = self.site.try_post(path, **fields)
        self.refusals += status == 507
        assert status in (200, 507, *allowed), answer
        return status, answer

    def schedule(self, draw, name):
        when, spider = draw.choice([("now", "brief"), ("every 2 hours", "quick"), ("now", "hold"), ("now", "nobody")])
        text = f"{name} {draw.random()}"
        self.maybe.add(text)
        fields = {"project": "shop", "spider": spider, "when": when, "description": text}
        status, answer = self.try_post("schedule-job", (404,) * (spider == "nobody"), **fields)
        if status != 200:
            self.refused.add(text)
            return
        self.sure[answer["identifier"]] = when
        if spider == "hold" or draw.random() < 0.5:
            self.asked.add(answer["identifier"])
            if self.try_post("cancel-job", (404, 409), id=answer["identifier"])[0] == 200:
                self.canceled.add(answer["identifier"])

    def change_project(self, draw, name):
        is_push, was, self.projects[name] = draw.random() < 0.6, self.projects.get(name), None
        if is_push:
            status, _ = self.try_post("push-project", (), archive=stub_project(name))
        else:
            status, _ = self.try_post("remove-project", (404,), name=name)
        self.projects[name] = was if status == 507 else is_push

    def read(self, draw, name):
        self.ended |= {job["identifier"] for job in self.site.jobs("SUCCESSFUL")}

    def check(self, data):
        """Compare what a daemon says and has on the disk with what the clients know."""
        site, (_, kept) = self.site, kept_records(data / "state.json")
        jobs = {job["identifier"]: job for group in ("COMPLETED", "ACTIVE", "COMPLETED") for job in site.jobs(group)}
        gone = self.sure.keys() - jobs.keys()
        wait_for(lambda: not gone or len(site.jobs("COMPLETED")) == 60)  # the timer forgets the others
        assert [job for job in gone if self.sure[job] != "now" and job not in self.asked] == []
        assert {job["description"] for job in jobs.values()} <= self.maybe - self.refused
        assert {jobs[job]["status"] for job in self.canceled & jobs.keys()} <= {"CANCELED"}
        assert {jobs[job]["status"] for job in self.ended & jobs.keys()} <= {"SUCCESSFUL"}
        assert kept.keys() >= {job for job, view in jobs.items() if view["status"] == "SCHEDULED"}
        listed, known = site.get("list-projects")["projects"], {k: v for k, v in self.projects.items() if v is not None}
        assert {name: name in listed for name in known} == known
        crawls = [environ["SCRAPY_JOB"] for name, environ in crawls_of(data) if name == "sleep"]
        assert len(crawls) == len(set(crawls))
        assert site.get("status")["jobs-running"] <= 3
        pushes = {project["push"] for project in kept_records(data / "state.json")[0].values()}
        assert {path.stem for path in (data / "projects").iterdir()} == pushes
        logs = {path.stem for path in (data / "logs").iterdir()}
        assert logs <= jobs.keys() | {job["identifier"] for job in site.jobs("ACTIVE")}

    def finish(self, data):
        for job in self.site.jobs("PENDING") + self.site.jobs("RUNNING"):
            if job["spider"] == "hold":
                self.try_post("cancel-job", (404, 409), id=job["identifier"])
        wait_for(lambda: not self.site.jobs("PENDING") and not self.site.jobs("RUNNING"))
        self.check(data)
        wait_for(lambda: crawls_of(data) == [])
        wait_for(lambda: [path.name for path in (data / "work").iterdir()] == ["shim"])


# ---- 5. Archives -----------------------------------------------------------------------------------------------------

SHOP = {"scrapy.cfg": "[deploy]\nproject = shop\n", "spiders.txt": "talk\n", "talk.sh": "[ ! -e text ] || cat text\n"}


def plus(*entries):
    return pack(*SHOP.items(), *entries)


def damaged(method):
    archive = bytearray(pack(("scrapy.cfg", bytes(random.Random(1).choices(b"ab", k=999))), method=method))
    archive[100:140] = bytes(40)
    return bytes(archive)


def config(text, name="scrapy.cfg"):
    folder = name.removesuffix("scrapy.cfg")
    return pack((name, text), (f"{folder}spiders.txt", "talk\n"), (f"{folder}talk.sh", "echo hi\n"))


TWO_PLACES = "[deploy:vps]\nproject = shop\n[deploy:home]\nproject = {}\nurl = http://localhost/\n"
HOW_TO_ZIP = ["git archive -o demo.zip HEAD", "-F archive=@demo.zip"]
REFUSED_ARCHIVES = {  # name: (how to make it, the status, words of the message)
    # not a zip
    "nothing": (lambda: b"", 400, ["@demo.zip"]),
    "text": (lambda: b"demo.zip", 400, ["begins with b'demo.zip', so it is no zip", "only with @", "-F archive=@demo.zip"]),
    "tar.gz": (lambda: b"\x1f\x8b\x08" + bytes(500), 400, ["gzip, tar.gz?", *HOW_TO_ZIP]),
    "cut": (lambda: plus()[:-30], 400, ["cannot be unpacked"]),
    "bad deflate": (lambda: damaged(zipfile.ZIP_DEFLATED), 400, ["the zip cannot be unpacked", "zip it anew"]),
    "bad bzip2": (lambda: damaged(zipfile.ZIP_BZIP2), 400, ["zip it anew"]),
    "bad lzma": (lambda: damaged(zipfile.ZIP_LZMA), 400, ["the zip cannot be unpacked", "zip it anew"]),
    # scrapy.cfg
    "no scrapy.cfg": (lambda: pack(("spiders.txt", "quick")), 400, ["no scrapy.cfg"]),
    "nothing but a folder of that name": (lambda: pack(("scrapy.cfg/", "")), 400, ["scrapy.cfg"]),
    "several": (lambda: plus(("b/c/scrapy.cfg", "")), 400, ["several scrapy.cfg: b/c/scrapy.cfg, scrapy.cfg"]),
    "no deploy": (lambda: config("[settings]\ndefault = shop.settings\n"), 400, ["add [deploy] with 'project = NAME'"]),
    "targets that differ": (lambda: config(TWO_PLACES.format("bar")), 400, ["'bar' and 'shop'", "add [deploy]"]),
    "not UTF-8": (lambda: config(b"[deploy]\nproject = sklep\xb1\n"), 400, ["scrapy.cfg cannot be read"]),
    **{
        f"name {name[:12]!r}": (lambda name=name: config(f"[deploy]\nproject = {name}\n"), 400, ["cannot be called"])
        for name in ("../../x", "..", ".x", "-x", "a/b", "a\\b", "x" * 101, "a b", "a\0b")
    },
    # entries
    "absolute path": (lambda: plus(("/tmp/evil", "x")), 400, ["'/tmp/evil', a path out of its folder"]),
    "way out": (lambda: plus(("a/../../evil", "x")), 400, ["a path out of its folder"]),
    "way out of Windows": (lambda: plus(("a\\..\\..\\evil", "x")), 400, ["a path out of its folder"]),
    "drive": (lambda: plus(("C:\\evil", "x")), 400, ["a path out of its folder"]),
    "link": (lambda: plus(("in/link", "/etc/passwd", 0o120777)), 400, ["'in/link' is a link", "without 'zip"]),
    "name too long": (lambda: plus(("x" * 300, "x")), 400, ["cannot be unpacked"]),
    "file in a file": (lambda: plus(("a", "x"), ("a/b", "x")), 400, ["cannot be unpacked"]),
    "too many": (lambda: plus(*((f"{n}", "") for n in range(58))), 413, ["over 60 entries"]),
    "bombs": (lambda: plus(*((f"z{n}", bytes(300_000)) for n in range(4))), 413, ["or 1 MiB"]),
    # what Scrapy says of it
    "no spiders": (lambda: plus(("list.sh", "")), 400, ["no spiders", "SPIDER_MODULES"]),
    "spider --help": (lambda: plus(("list.sh", "echo good; echo --help")), 400, ["'--help'", "rename it"]),
    "list fails": (lambda: plus(("list.sh", "seq 99 >&2; exit 3")), 400, ["failed", "92\n93\n94\n95\n96\n97\n98\n99"]),
    "list fails on stdout": (lambda: plus(("list.sh", "echo why; exit 1")), 400, ["failed", "why"]),
}


@pytest.mark.parametrize(("make", "status", "words"), REFUSED_ARCHIVES.values(), ids=REFUSED_ARCHIVES)
def test_a_bad_archive_is_refused_whole_with_advice(site, tmp_path, monkeypatch, make, status, words):
    monkeypatch.setattr(scrapy_do, "ARCHIVE_MIB", 1)
    monkeypatch.setattr(scrapy_do, "ARCHIVE_ENTRIES", 60)
    site.push()
    before = folder_contents(tmp_path)
    message = denied(site.try_push(make()), status, *words)
    assert len(message) < 600
    assert str(tmp_path) not in message
    assert folder_contents(tmp_path) == before
    assert site.get("list-spiders", project="shop")["spiders"] == ["quick"]


def test_an_archive_that_curl_does_not_send_as_a_file_is_refused_with_the_command_that_does(site, tmp_path):
    (path := tmp_path / "demo.zip").write_bytes(plus())
    for options in (["-F", "archive=demo.zip"], ["-d", "archive=demo.zip"], ["-F", f"archive={tmp_path}"]):
        assert "-F archive=@" in curl_of(site, "/push-project.json", *options)[1]["msg"]
    for options in (["--data-binary", f"@{path}"], ["-T", str(path), "-X", "POST"], ["-F", f"file=@{path}"]):
        status, answer = curl_of(site, "/push-project.json", *options)
        message = denied((status, answer), status, "archive")
        assert "@" in message or "'file'" in message
    assert site.get("list-projects")["projects"] == []
    assert curl_of(site, "/push-project.json", "-F", f"archive=@{path}")[1]["spiders"] == ["talk"]


CODE = {**SHOP, "talk.sh": "cat sub/text; pwd\n", "sub/text": "hi\n"}
ACCEPTED_ARCHIVES = {  # name: (how to make it, the project's name, the start of what its spider `talk` prints)
    "five folders down": (lambda: make_zip({f"a/b/c/d/e/{n}": text for n, text in CODE.items()}), "shop", "hi\n"),
    "made on Windows": (lambda: pack(*((f"a/b/{n}".replace("/", "\\"), t) for n, t in CODE.items())), "shop", "hi\n"),
    "targets that agree": (lambda: config(TWO_PLACES.format("shop")), "shop", "hi\n"),
    "targets beside a plain one": (lambda: config(TWO_PLACES.format("x") + "[deploy]\nproject = bar"), "bar", "hi\n"),
    "name in Chinese": (lambda: stub_project("书店", talk="echo $SCRAPY_PROJECT"), "书店", "书店\n"),
    "files in Chinese": (lambda: make_zip({f"书店/{n}": text for n, text in CODE.items()}), "shop", "hi\n"),
    "byte order mark, CR LF, %": (
        lambda: config(b"\xef\xbb\xbf[deploy]\r\nproject = shop\r\nx = %(y)s\r\n"), "shop", "hi\n"
    ),
    "bzip2": (lambda: pack(*SHOP.items(), ("text", "hi\n"), method=zipfile.ZIP_BZIP2), "shop", "hi\n"),
    "no modes": (lambda: plus(("text", "hi\n", 0), ("folder/", "", 0)), "shop", "hi\n"),
    "bits that are not kept": (
        lambda: pack(
            *list(SHOP.items())[:2], ("root", "", 0o106755), ("mine.py", "", 0o100600), ("sticky/", "", 0o43755),
            ("talk.sh", "stat -c '%a %n' root mine.py sticky"),
        ),
        "shop", "755 root\n600 mine.py\n755 sticky\n",
    ),
    "script before it": (lambda: b"#!/bin/sh\nexit 1\n" + plus(("text", "hi\n")), "shop", "hi\n"),
    "of a Mac": (lambda: plus(("text", "hi\n"), ("__MACOSX/._scrapy.cfg", b"\0\5")), "shop", "hi\n"),
}


@pytest.mark.parametrize(("make", "name", "said"), ACCEPTED_ARCHIVES.values(), ids=ACCEPTED_ARCHIVES)
def test_a_sound_archive_becomes_a_project_that_runs(site, make, name, said):
    answer = site.push(make())
    assert (answer["name"], answer["warnings"]) == (name, [])
    assert "talk" in answer["spiders"]
    assert site.get("list-projects")["projects"] == [name]
    assert site.get("list-spiders", project=name)["spiders"] == answer["spiders"]
    assert output_of(site, "talk", name).startswith(said)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_what_git_archive_makes_becomes_a_project_and_modes_survive(site, tmp_path):
    folder = tmp_path / "repository"
    with zipfile.ZipFile(io.BytesIO(plus(("tool", "#!/bin/sh\necho it runs\n")))) as bundle:
        bundle.extractall(folder)
    (folder / "talk.sh").write_text("./tool; stat -c '%a %n' tool talk.sh")
    (folder / "tool").chmod(0o755)
    git = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    made = subprocess.check_output([*git, "archive", "--format=zip", "--prefix=shop-1.0/", "HEAD"])
    assert site.push(made) == {"status": "ok", "name": "shop", "spiders": ["talk"], "warnings": []}
    assert output_of(site, "talk") == "it runs\n755 tool\n644 talk.sh\n"


# ---- 5. `scrapy list` at a push --------------------------------------------------------------------------------------


def test_a_list_that_takes_too_long_is_ended_with_all_it_started(outside, tmp_path):
    site = outside("--list-timeout", "1")
    before = folder_contents(tmp_path / "data")
    script = "sleep 98 & a=$!; setsid sleep 99 & echo $a $! $$ > ../../../pids; echo quick; wait; sleep 9"
    denied(site.try_push(plus(("list.sh", script))), 400, "did not end within 1 s", "--list-timeout")
    assert all(is_gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert folder_contents(tmp_path / "data") == before


def test_what_list_leaves_running_is_ended(outside, tmp_path):
    site = outside()
    site.push(plus(("list.sh", f"setsid sleep 99 & echo $! > {tmp_path}/pid; echo quick")))
    assert is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("scrapy", "words"),
    [
        (("/nonexistent/scrapy",), ["'/nonexistent/scrapy' cannot be started", "--scrapy"]),
        (("/etc/passwd",), ["'/etc/passwd' cannot be started", "--scrapy"]),
        ((sys.executable, "-S", "-m", "scrapy"), ["No module named scrapy", f"{sys.executable} -m pip install scrapy"]),
    ],
)
def test_without_scrapy_a_push_says_what_to_do(inside, tmp_path, scrapy, words):
    site = inside(scrapy=scrapy)
    before = folder_contents(tmp_path / "data")
    denied(site.try_push(stub_project()), 400, *words)
    assert folder_contents(tmp_path / "data") == before


def test_each_project_has_its_own_environment(inside, tmp_path):
    site = inside(scrapy=(f"{tmp_path}/envs/{{project}}/bin/scrapy",))
    for name in ("shop", "bar"):
        (path := tmp_path / "envs" / name / "bin" / "scrapy").parent.mkdir(parents=True)
        path.write_text(STUB + f"echo in the environment of {name} >&2\n")
        path.chmod(0o755)
    for name in ("shop", "bar"):
        site.push(name=name, talk="true")
        job = site.wait_job(site.schedule("talk", project=name))
        assert site.log(job["identifier"]) == f"in the environment of {name}\n"
    home = f"{tmp_path}/envs/other"
    how = f"python3 -m venv {home} && {home}/bin/python -m pip install scrapy"
    denied(site.try_push(stub_project("other")), 400, f"'{home}/bin/scrapy' cannot be started", how)
    assert site.get("list-projects")["projects"] == ["bar", "shop"]


REAL_SPIDER = """
import logging
import scrapy

class Good(scrapy.Spider):
    name, start_urls = "good", ["data:,x"]

    def parse(self, response):
        print("printed by the spider")
        logging.error("something went wrong")
        yield {"text": response.text}

class Twin(Good):
    name = "twin"

class OtherTwin(Good):
    name = "twin"
"""
REAL_SETTINGS = """
import os
SPIDER_MODULES = ["shop.spiders", "shop.broken"]
SPIDER_LOADER_WARN_ONLY = LOG_STDOUT = True
STATS_DUMP = TELNETCONSOLE_ENABLED = False
LOG_FILE, LOG_LEVEL = "hidden.log", "ERROR"
print("not_a_spider")
os.write(1, b"nor_this\\n")
"""


def test_a_project_that_talks_and_configures_a_lot_is_listed_counted_and_logged(outside, tmp_path):
    site = outside("--scrapy", f"{sys.executable} -m scrapy")
    broken = {"broken/__init__": "", "broken/bad": "import nonesuch\n"}
    modules = {"spiders/good": REAL_SPIDER, "settings": REAL_SETTINGS, **broken}
    answer = site.push(real_project("repo-main/scrapers/", **modules))
    assert answer["spiders"] == ["good", "twin"]
    for words in ("No module named 'nonesuch'", "twin"):
        assert sum(words in warning for warning in answer["warnings"]) == 1
        assert re.search(rf"project shop: Scrapy warns: .*{words}", site.log_path.read_text())
    assert not any(str(tmp_path) in warning or "\n" in warning for warning in answer["warnings"])
    job = site.wait_job(site.schedule("good"))
    assert job["stats"] == {"items": 1, "responses": 1, "errors": 1, "finish_reason": "finished"}
    assert "something went wrong" in site.log(job["identifier"])
    message = denied(site.try_push(config("[settings]\ndefault = bar.settings\n[deploy]\nproject = bar\n")), 400)
    assert message.endswith("'bar'\nscrapy.cfg or a setting names it; put it into the archive, or install it")


@pytest.mark.parametrize("has_requirements", [True, False])
def test_a_missing_dependency_is_named_then_its_cure_then_the_projects_own_frames(inside, tmp_path, has_requirements):
    site = inside(scrapy=(sys.executable, "-m", "scrapy"))
    modules = {"spiders/city": "import shop.base\n", "base": "\nimport city_scrapers_core.items\n"}
    archive = io.BytesIO(real_project("in/", **modules))
    if has_requirements:
        with zipfile.ZipFile(archive, "a") as bundle:
            bundle.writestr("in/requirements.txt", "city-scrapers-core\n")
    message = denied(site.try_push(archive.getvalue()), 400)
    what = "-r requirements.txt" if has_requirements else "city_scrapers_core"
    assert message.splitlines() == [
        "'scrapy list' failed in the project: ModuleNotFoundError: No module named 'city_scrapers_core'",
        f"install what is missing: {sys.executable} -m pip install {what}",
        'File "shop/spiders/city.py", line 1, in <module>',
        'File "shop/base.py", line 2, in <module>',
    ]


@pytest.mark.parametrize(
    ("launcher", "missing", "advice"),
    [
        ("bin/scrapy", "nonesuch.part", "{}/bin/python -m pip install nonesuch"),
        ("bin/python3.11", "nonesuch", "{}/bin/python3.11 -m pip install nonesuch"),
        ("bin/uv", "nonesuch", "pip install nonesuch"),
        ("bin/scrapy", "code.part", ""),
    ],
    ids=["scrapy", "python", "launcher", "the project's own"],
)
def test_what_is_missing_is_to_be_installed_where_scrapy_is(inside, tmp_path, launcher, missing, advice):
    (path := tmp_path / launcher).parent.mkdir()
    path.write_text(f"#!/bin/sh\necho \"ModuleNotFoundError: No module named '{missing}'\" >&2; exit 1\n")
    path.chmod(0o755)
    site = inside(scrapy=(str(path), "run"))
    message = denied(site.try_push(stub_project()), 400, f"No module named '{missing}'", advice.format(tmp_path))
    assert "uv -m" not in message
    assert not advice or message.index("No module") < message.index("pip install")
    assert ("pip install" in message) == bool(advice)


# ---- 5. Working copies -----------------------------------------------------------------------------------------------

IMPORT_CODE = f"unset PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX; {sys.executable} -v -c 'import shop_code' 2>&1"
IS_COMPILED = IMPORT_CODE + " | grep -c 'shop_code.*pyc matches'; true"


def test_no_crawl_compiles_again_also_after_a_restart_until_one_changes_the_code(outside):
    site = outside()
    spiders = {"talk.sh": IS_COMPILED + "; cat other.py", "evil.sh": "echo evil > other.py"}
    spiders["list.sh"] = f"({IMPORT_CODE}) >&2; cat spiders.txt"
    files = {**SHOP, **spiders, "spiders.txt": "talk\nevil\n", "shop_code.py": "x = 1\n", "other.py": "x = 2\n"}
    site.push(make_zip(files))
    for end in (site.stop, site.kill, site.stop):
        assert [output_of(site, "talk") for _ in range(2)] == ["1\nx = 2\n"] * 2
        end()
        site.start()
    output_of(site, "evil")
    assert [output_of(site, "talk") for _ in range(2)] == ["0\nx = 2\n"] * 2


def test_what_list_leaves_in_the_tree_is_not_the_projects(outside):
    site = outside()
    mess = "ln -s nowhere dangling; ln -s / root; mkdir -p cache/deep; echo > cache/deep/x; echo y >> text; mkfifo pipe"
    files = {**SHOP, "text": "text\n", "talk.sh": "find . | sort; cat text"}
    files["list.sh"] = f"{mess}; mkdir -m 0 locked; cat spiders.txt"
    site.push(make_zip(files))
    clean = "".join(f"{name}\n" for name in sorted([".", *(f"./{name}" for name in files)])) + "text\n"
    assert output_of(site, "talk") == clean
    site.stop()
    site.start()
    assert output_of(site, "talk") == clean


def test_what_a_crawl_does_to_its_copy_no_other_crawl_sees(inside, tmp_path):
    site = inside(job_slots=5)
    show = "find . -type f | sort; cat text deep/text code.py deep/code.py; "
    harm = (
        "echo harm > text; echo more >> deep/text; rm spiders.txt new.py deep/gone; touch made; "
        "echo evil >> code.py; echo evil > deep/code.py; ln -s /tmp locked; "
        "mkdir -p shut/in; touch shut/in/file; chmod 500 shut shut/in; chmod 0 deep"
    )
    scripts = {"harm": show + harm, "look": show, "late": f"echo on >&2; {until(tmp_path / 'gate')}cat text deep/text"}
    files = {**SHOP, "spiders.txt": "\n".join(scripts), "new.py": "x\n", "code.py": "x = 1\n"}
    files |= {"deep/code.py": "x = 2\n", "text": "text\n", "deep/text": "deep\n", "deep/gone": "gone\n"}
    site.push(make_zip(files | {f"{name}.sh": script for name, script in scripts.items()}))
    late = site.schedule("late")
    wait_for(lambda: site.log(late) == "on\n")
    logs = {output_of(site, name) for name in ("look", "harm", "harm")}
    looks = [site.schedule("look") for _ in range(4)]  # several at once find that the code was changed
    logs |= {site.log(site.wait_job(identifier)["identifier"], "out") for identifier in looks}
    assert len(logs) == 1
    assert logs.pop().endswith("./text\ntext\ndeep\nx = 1\nx = 2\n")
    (tmp_path / "gate").touch()
    site.wait_job(late)
    assert site.log(late, "out") == "text\ndeep\n"
    wait_for(lambda: os.listdir(tmp_path / "data" / "work") == ["shim"])
    assert len(os.listdir(tmp_path / "data" / "projects")) == 2  # the archive, and the code


def test_projects_may_be_a_link_to_another_file_system(outside, tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (tmp_path / "data").mkdir(mode=0o700)
        (tmp_path / "data" / "projects").symlink_to(folder)
        site = outside()
        talk, compiled = "cat code.py; ls __pycache__; echo evil >> code.py", "mkdir __pycache__; touch __pycache__/x.pyc"
        files = {**SHOP, "talk.sh": talk, "code.py": "x = 1\n", "list.sh": f"{compiled}; cat spiders.txt"}
        site.push(make_zip(files))
        for _ in range(2):
            assert [output_of(site, "talk") for _ in range(2)] == ["x = 1\nx.pyc\n"] * 2
            site.stop()
            site.start()
        site.push(stub_project(talk="echo new"))
        assert output_of(site, "talk") == "new\n"
        assert len(os.listdir(folder)) == 2
        site.post("remove-project", name="shop")
        assert os.listdir(folder) == []


def test_new_files_at_the_top_of_a_working_copy_are_told_in_the_log(outside):
    site = outside()
    bad = "touch items.json; mkdir .scrapy __pycache__; echo x >> code.py"
    site.push(stub_project(folder="in/", talk=bad))
    output_of(site, "talk")
    line = wait_for(lambda: re.search(r".*items\.json.*", site.log_path.read_text()))[0]
    assert all(words in line for words in ("'.scrapy', 'items.json'", "$SPIDER_DATA_DIR", "'Where results go'"))
    assert "pycache" not in line


def test_payload_args_and_settings_have_a_limit_within_which_crawls_start(inside, monkeypatch):
    site = inside(job_slots=1)
    site.push(talk='printf %s "$*" | wc -c')

    def fields(size):
        part = size // 3
        return {"payload": f'{{"x": "{"p" * part}"}}', "arg": "a=" + "ą" * (part // 2), "setting": "S=" + "s" * part}

    limit = scrapy_do.ARGUMENT_BYTES
    for long in ({"payload": f'{{"x": "{"p" * 200_000}"}}'}, fields(limit + 99)):
        answer = site.try_post("schedule-job", project="shop", spider="talk", when="now", **long)
        denied(answer, 413, f"at most {limit} bytes together")
    assert site.jobs("ACTIVE") == site.jobs("COMPLETED") == []
    for long in (fields(limit - 99), {"arg": "a=" + "x" * (limit - 99)}, {"arg": [f"a{n}=x" for n in range(200)]}):
        assert site.wait_job(site.schedule("talk", **long))["reason"] is None
    monkeypatch.setenv("TOO_LONG", "x" * 200_000)  # whatever is too long all the same, the slot is free again
    job = site.wait_job(site.schedule("talk"))
    assert (job["status"], "rgument list too long" in job["reason"]) == ("FAILED", True)
    monkeypatch.delenv("TOO_LONG")
    assert output_of(site, "talk")


# ---- 6. Daemon: projects ---------------------------------------------------------------------------------------------


def test_a_big_project_is_pushed_with_one_short_line_and_a_misspelt_spider_is_answered_shortly(outside):
    site = outside()
    names = [f"spider_of_town_{number:04}" for number in range(5000)]
    site.push(make_zip({**SHOP, "spiders.txt": "\n".join(names)}))
    assert site.get("list-spiders", project="shop")["spiders"] == names
    fields = {"project": "shop", "spider": "spider_of_twon_0042", "when": "every day"}
    words = ("did you mean 'spider_of_town_0042'", "list-spiders.json?project=shop shows the 5000 there are")
    assert len(denied(site.try_post("schedule-job", **fields), 404, *words)) < 250
    denied(site.try_post("schedule-job", **fields | {"project": "'shop'"}), 404, "did you mean 'shop'")
    denied(site.try_post("remove-project", name="shpo"), 404, "did you mean 'shop'")
    assert "project shop was pushed with 5000 spiders" in site.log_path.read_text()
    assert max(map(len, site.log_path.read_text().splitlines())) < 400


def test_a_second_push_replaces_the_first_wherever_it_is_in_the_archive(site, tmp_path):
    for number, place in enumerate(["", "a/b/", "in/", ""]):
        answer = site.push(stub_project(folder=place, **{"both": f"echo {number}", f"only{number}": "exit 0"}))
        assert answer["spiders"] == ["both", f"only{number}", "quick"]
        assert answer["spiders"] == site.get("list-spiders", project="shop")["spiders"]
        assert output_of(site, "both") == f"{number}\n"
        assert len(os.listdir(tmp_path / "data" / "projects")) == 2  # the archive, and the code
    assert site.try_post("schedule-job", project="shop", spider="only0", when="now")[0] == 404


@pytest.mark.parametrize("status", ["SCHEDULED", "PENDING", "RUNNING"])
def test_active_jobs_keep_their_spider_and_their_project(inside, tmp_path, status):
    site = inside(job_slots=1)
    waits = until(tmp_path / "gate") + "echo done"
    site.push(stay=waits, leave=waits)
    if status == "PENDING":
        site.wait_job(site.schedule("stay"), "RUNNING")
    identifier = site.schedule("leave", "every day" if status == "SCHEDULED" else "now")
    before = site.wait_job(identifier, status), folder_contents(tmp_path / "data" / "projects")
    for path, fields in (("push-project", {"archive": stub_project(stay=waits)}), ("remove-project", {"name": "shop"})):
        denied(site.try_post(path, **fields), 409, f"{identifier} (leave, {status})")
        assert (site.job(identifier), folder_contents(tmp_path / "data" / "projects")) == before
        assert site.get("list-spiders", project="shop")["spiders"] == ["leave", "quick", "stay"]
    site.push(stay=waits, leave=waits)  # nothing is missing, so this is fine
    (tmp_path / "gate").touch()
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
        slow = f"echo on; {until(tmp_path / text)} cat code.py text"
        return make_zip({**SHOP, "spiders.txt": "slow\n", "code.py": text, "text": text, "slow.sh": slow})

    started = []
    for text in ("1", "2"):
        site.push(version(text))
        started.append((text, site.schedule("slow")))
        wait_for(lambda: site.log(started[-1][1], "out") == "on\n")
    for text, identifier in started:
        (tmp_path / text).touch()
        assert site.wait_job(identifier)["status"] == "SUCCESSFUL"
        assert site.log(identifier, "out") == f"on\n{text}{text}"


def test_a_removed_project_is_gone_also_from_the_disk(outside, tmp_path):
    site = outside()
    site.push(name="other")
    before = folder_contents(tmp_path / "data" / "projects")
    site.push(name="shop")
    site.wait_job(site.schedule())
    site.post("remove-project", name="shop")
    denied(site.try_post("remove-project", name="shop"), 404, "'shop'")
    assert folder_contents(tmp_path / "data" / "projects") == before
    site.stop()
    site.start()
    assert site.get("list-projects")["projects"] == ["other"]
    site.push(name="shop", again="echo again")
    assert output_of(site, "again") == "again\n"


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
        assert [path.read_bytes() for path in (tmp_path / "data" / "projects").glob("*.zip")] == [archives[number]]
        assert output_of(site, spiders[1]) == f"{number}\n"
        wait_for(lambda: os.listdir(tmp_path / "data" / "work") == ["shim"])
        assert len(os.listdir(tmp_path / "data" / "projects")) == 2
        return spiders

    spiders = check()
    site.kill()
    site.start()
    assert check() == spiders


def test_pushes_while_crawls_run_never_mix_two_versions(site):
    def version(number):
        checks = f'[ "$(cat version code.py)" = {number}{number} ] && [ -e only{number} ]'
        files = {**SHOP, "spiders.txt": "quick", "version": f"{number}", "code.py": f"{number}", f"only{number}": ""}
        files["quick.sh"] = f"{checks} && echo {number}"
        return make_zip({f"{number}/{name}": content for name, content in files.items()})

    site.push(version(0))
    identifiers = []
    for number in range(1, 11):
        identifiers += [site.schedule() for _ in range(3)]
        site.push(version(number))
    assert {site.wait_job(identifier)["reason"] for identifier in identifiers} == {None}
    seen = [int(site.log(identifier, "out")) for identifier in identifiers]
    assert all(number // 3 <= version for number, version in enumerate(seen))


# ---- 6. Daemon -------------------------------------------------------------------------------------------------------


# Life of a job


def test_a_job_has_the_keys_of_the_contract(site):
    site.push()
    answer = site.post("schedule-job", project="shop", spider="quick", when="Every  3 hours", description="Opis żółty")
    job = site.job(answer["identifier"])
    assert answer["next_run"] == job["next_run"] > job["timestamp"]
    assert {**job, "timestamp": "", "next_run": "", "identifier": ""} == {
        "identifier": "", "status": "SCHEDULED", "actor": "USER", "schedule": "Every  3 hours", "scheduled_by": None,
        "project": "shop", "spider": "quick", "description": "Opis żółty", "payload": "{}", "args": [], "settings": [],
        "timeout": None, "priority": 0, "items": False, "timestamp": "", "started": None, "duration": None,
        "next_run": "", "exit_code": None, "reason": None, "stats": None,
    }  # fmt: skip
    made = site.schedule(payload='{"a": "漢字"}', priority=-2)
    done = site.wait_job(made)
    keys = ("schedule", "payload", "priority", "duration", "next_run", "exit_code", "reason")
    assert {key: done[key] for key in keys} == {
        "schedule": "now", "payload": '{"a": "漢字"}', "priority": -2, "duration": 0, "next_run": None, "exit_code": 0,
        "reason": None,
    }  # fmt: skip
    assert job["timestamp"] < done["started"] < done["timestamp"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        *(({"payload": text}, 400, ["payload"]) for text in ("", "[]", "1", "{", '{"a": 1} x', "null", "[" * 50_000)),
        *(({"arg": f"{text}=1"}, 400, ["arg", "NAME=VALUE"]) for text in ("", " ", "-a", "a\0", "a=\0", "a\nb")),
        *(({"setting": f"{text}=1"}, 400, ["setting", "NAME=VALUE"]) for text in ("", "1A", "A B", "A-B", "A=\0")),
        *(({name: text}, 400, [name, "NAME=VALUE"]) for name in ("arg", "setting") for text in ("", "A")),
        ({"arg": ["a=1", "b"]}, 400, ["'b'"]),
        *(({"timeout": text}, 400, ["timeout", repr(text)]) for text in ("0", "-1", "", "x", "nan", "inf", "1_0", "1 s")),
        *(({"priority": text}, 400, ["priority", "whole number"]) for text in ("", "1.5", "x", "1_0", "9" * 30)),
        *(({"items": text}, 400, ["items"]) for text in ("", "2", "yes")),
        ({"description": "x" * (100 * 1024)}, 413, ["description", "at most"]),
        ({"spider": "quik"}, 404, ["'quik'", "did you mean 'quick'?", "list-spiders.json"]),
        ({"spider": ["quick", "nobody"]}, 404, ["'nobody'"]),
        ({"project": "shpo"}, 404, ["'shpo'", "'shop'"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_job_that_makes_no_sense_is_refused(site, fields, status, words):
    site.push()
    fields = {"project": "shop", "spider": "quick", "when": "now", **fields}
    denied(site.try_post("schedule-job", **fields), status, *words)
    assert site.jobs("ACTIVE") == []


ARGS = ["page=-2", "page=2", "eq==x= ", "zdanie=zażółć\n--gęślą jaźń;", "漢字=漢 字", "none="]
SETTINGS = ["LOG_LEVEL=-x y", "_MARK1=a=b\n漢字", "EMPTY=", "EMPTY="]
SHOW = "for word; do printf '%s|' \"$word\"; done"


def test_args_and_settings_reach_the_runs_of_a_schedule_unchanged_and_in_order_also_after_a_crash(outside):
    site = outside()
    site.push(show=SHOW)
    wish = {"arg": ARGS, "setting": SETTINGS, "payload": '{"a": 1}', "timeout": "50", "priority": 7}
    schedule = site.schedule("show", "every second", **wish)
    site.kill()
    site.start()
    run = wait_for(lambda: runs_of(site, schedule, "SUCCESSFUL"))[-1]
    words = site.log(run["identifier"], "out").split("|")[1::2]
    assert words == ['payload={"a": 1}', *ARGS, "LOG_FILE=", *SETTINGS]
    made = site.job(schedule)
    for job in (run, made):
        assert [job[key] for key in ("args", "settings", "timeout", "priority")] == [ARGS, SETTINGS, 50, 7]
    assert (run["actor"], run["schedule"], run["scheduled_by"]) == ("SCHEDULER", "now", schedule)
    assert (made["scheduled_by"], made["started"], run["started"] is None) == (None, None, False)


def test_a_crawl_gets_its_environment_and_nothing_of_the_daemons_supervisor_also_after_a_reload(outside, tmp_path):
    own = {"LISTEN_FDNAMES": "x", "WATCHDOG_USEC": "99000000", "WATCHDOG_PID": "1", "CREDENTIALS_DIRECTORY": "/x",
           "NOTIFY_SOCKET": str(tmp_path / "notify"), "SCRAPY_SETTINGS_MODULE": "wrong.module", "OURS": "zażółć"}  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        site = outside(environment=own, command=("env", "LISTEN_FDS=0", "LISTEN_PID=1", sys.executable, str(MODULE)))
        show = "env; pwd; ls -l /proc/self/fd | grep -c socket:; grep -E 'Sig(Blk|Ign)' /proc/self/status"
        site.push(settings="shop.settings", show=show)
        for _ in range(2):
            job = site.wait_job(site.schedule("show"))["identifier"]
            lines = site.log(job, "out").splitlines()
            environment, work = dict(line.partition("=")[::2] for line in lines), tmp_path / "data/work" / job
            wanted = {"SCRAPY_JOB": job, "SCRAPY_PROJECT": "shop", "SCRAPY_SPIDER": "show", "OURS": "zażółć",
                      "PYTHONIOENCODING": "utf-8", "SPIDER_DATA_DIR": str(tmp_path / "data/spider-data")}  # fmt: skip
            assert {name: environment[name] for name in wanted} == wanted
            assert str(work) in environment["PYTHONPATH"].split(":")
            assert "wrong" not in environment["SCRAPY_SETTINGS_MODULE"]
            theirs = ("LISTEN_", "WATCHDOG_", "NOTIFY_", "CREDENTIALS_", scrapy_do.HANDOVER)
            assert [name for name in environment if name.startswith(theirs)] == []
            assert lines[-4:-1] == [str(work), "0", f"SigBlk:\t{'0' * 16}"]
            assert int(lines[-1].split()[1], 16) & sum(1 << number - 1 for number in scrapy_do.SIGNALS) == 0
            site.reload()


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("exit 3", 3, "exit code 3; its log says why"),
        ("kill -9 $$", -9, "the crawl was ended by signal 9 (Killed)"),
        ("kill -TERM $$", -15, "the crawl was ended by signal 15 (Terminated)"),
    ],
    ids=["exit", "SIGKILL", "SIGTERM"],
)
def test_a_crawl_that_fails_says_why(site, script, code, reason):
    site.push(bad=script)
    job = site.wait_job(site.schedule("bad"))
    assert (job["status"], job["exit_code"], job["reason"]) == ("FAILED", code, reason)


def test_a_log_that_is_truncated_while_it_is_written_does_not_get_filled_with_nul(site, tmp_path):
    site.push(talk=f"echo 123456789; echo 123456789 >&2; {HOLD}; echo end; echo end >&2")
    job = running(site, "talk")
    for stream in ("out", "err"):
        os.truncate(tmp_path / f"data/logs/{job}.{stream}", 0)
    release(tmp_path)
    site.wait_job(job)
    assert [site.log(job, stream) for stream in ("out", "err")] == ["end\n", "end\n"]


@pytest.mark.parametrize(
    ("report", "stats"),
    [
        ('{"items": 50, "responses": 6, "errors": 2, "finish_reason": "done"}',
         {"items": 50, "responses": 6, "errors": 2, "finish_reason": "done"}),
        ("", None), ("{", None), ("[]", None), ("3", None), ("{}", None),
    ],
    ids=["whole", "empty", "torn", "list", "number", "nothing"],
)  # fmt: skip
def test_statistics_are_what_scrapy_has_reported_or_null(site, report, stats):
    path = '$(printf %s "$SCRAPY_DO" | sed \'s/.*"report": "\\([^"]*\\)".*/\\1/\')'
    site.push(
        talk=f"printf %s '{report}' > \"{path}\"; exit 3",
        silent="echo \"Dumping Scrapy stats: {{'item_scraped_count': 9}}\" >&2",
    )
    job = site.wait_job(site.schedule("talk"))
    assert (job["status"], job["stats"]) == ("FAILED", stats)
    assert site.wait_job(site.schedule("silent"))["stats"] is None


# Slots, priority, order


def test_jobs_start_by_priority_and_in_the_order_of_making_within_it_also_after_a_restart(outside, tmp_path):
    site = outside("--job-slots", "1", "--kill-after", "0.2")
    site.push(hold=HOLD, note="echo $SCRAPY_JOB >> $SPIDER_DATA_DIR/order")
    first = running(site, "hold", priority=9)
    made = {number: site.schedule("note", priority=priority) for number, priority in enumerate([0, 5, -3, 5, 0, 1])}
    status = site.get("status")
    assert (status["jobs-running"], status["jobs-pending"]) == (1, 6)
    assert site.stop() == 0
    site.start()
    wait_for(lambda: "started" in site.log(first, "out"))
    release(tmp_path)
    for job in made.values():
        site.wait_job(job)
    assert noted(tmp_path, "order") == [made[number] for number in (1, 3, 5, 0, 4, 2)]
    check_counts(site.get("status"))


def test_projects_and_spiders_have_limits_of_their_own_and_others_pass_by(inside, tmp_path):
    site = inside(job_slots=6, project_slots=3, spider_slots=2)
    site.push(hold=HOLD, other=HOLD)
    site.push(stub_project("second", hold=HOLD))
    made = [site.schedule(spider, project=project) for project, spider in
            [("shop", "hold")] * 4 + [("shop", "other")] * 3 + [("second", "hold")] * 3]  # fmt: skip
    runs = {0, 1, 4, 7, 8}
    wait_for(lambda: len(site.jobs("RUNNING")) == len(runs))
    assert {number for number, job in enumerate(made) if site.job(job)["status"] == "RUNNING"} == runs
    extra = site.schedule(project="second")
    assert site.wait_job(extra)["status"] == "SUCCESSFUL"
    site.post("cancel-job", id=made[4])
    wait_for(lambda: site.job(made[5])["status"] == "RUNNING")
    assert site.job(made[2])["status"] == "PENDING"
    release(tmp_path)
    assert {site.wait_job(job)["status"] for job in made} == {"SUCCESSFUL", "CANCELED"}


def test_a_hung_spider_of_a_schedule_holds_one_slot_and_a_run_that_waits_is_the_only_one(outside, tmp_path):
    site = outside("--job-slots", "2")
    site.push(hold=HOLD)
    schedule = site.schedule("hold", "every second")
    skipped = f"job {schedule} SCHEDULED (every second): shop hold is due but skipped, since run "
    wait_for(lambda: site.get("status")["runs-skipped"] >= 1)
    run, waits = runs_of(site, schedule, "RUNNING"), runs_of(site, schedule, "PENDING")
    assert (len(run), len(waits)) == (1, 1)
    assert skipped + waits[0]["identifier"] in site.log_path.read_text()
    for _ in range(3):
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    site.kill()  # it runs again, and there are still no two at once
    site.start()
    wait_for(lambda: runs_of(site, schedule, "RUNNING"))
    wait_for(lambda: site.get("status")["runs-skipped"] >= 1)
    assert len(runs_of(site, schedule, "RUNNING")) == len(runs_of(site, schedule, "PENDING")) == 1
    site.post("cancel-job", id=schedule)
    release(tmp_path)
    wait_for(lambda: len(runs_of(site, schedule, "SUCCESSFUL")) == 2)


@pytest.mark.parametrize(
    "limits", [{}, {"project_slots": 2}, {"spider_slots": 1}, {"project_slots": 3, "spider_slots": 2}]
)
def test_the_job_that_starts_is_always_the_first_that_may(limits):
    """All steps are drawn; what starts is compared with a search through all jobs that wait."""
    draw = random.Random(str(limits))
    line = scrapy_do.Waiting(make_options(job_slots=4, **limits))
    queued, held, dropped = [], [], set()

    def may_start(job):
        same = [other for other in held if other.project == job.project]
        return (
            len(held) < 4
            and len(same) < limits.get("project_slots", 99)
            and sum(other.spider == job.spider for other in same) < limits.get("spider_slots", 99)
            and not (job.scheduled_by and any(other.scheduled_by == job.scheduled_by for other in held))
        )

    for number in range(6000):
        step = draw.random()
        if step < 0.45 and len(queued) < 40:
            job = make_job(number, spider=draw.choice("abc"), project=draw.choice("pqr"), priority=draw.randrange(-1, 2),
                           scheduled_by=draw.choice([None, None, "x", "y"]))  # fmt: skip
            queued.append(job)
            line.put(job)
        elif step < 0.55 and queued:
            dropped.add(queued.pop(draw.randrange(len(queued))))
        elif held:
            held.pop(draw.randrange(len(held)))
        while True:
            wanted = max(filter(may_start, queued), key=lambda job: job.priority, default=None)
            while (job := line.pop(held)) in dropped:
                pass  # it was canceled
            assert job == wanted
            if wanted is None:
                break
            queued.remove(wanted)
            held.append(wanted)


def test_a_start_does_not_go_through_all_jobs_that_a_limit_holds_back(monkeypatch):
    line = scrapy_do.Waiting(make_options(job_slots=3, spider_slots=1))
    for number in range(10_000):
        line.put(make_job(number, spider="blocked"))
    first = line.pop([])
    assert (first.spider, line.pop([first])) == ("blocked", None)
    looks, pop = [], scrapy_do.heapq.heappop
    monkeypatch.setattr(scrapy_do.heapq, "heappop", lambda heap: looks.append(1) or pop(heap))
    for number in range(10_000, 10_100):
        job = make_job(number, spider=f"other{number}")
        line.put(job)
        assert line.pop([first]) is job
        assert line.pop([first, job]) is None
    assert line.pop([]).spider == "blocked"
    assert len(looks) < 1000  # of 100 starts; a scan would make it a million


def test_a_start_that_fails_frees_its_slot(inside, tmp_path, capsys):
    site = inside(job_slots=1)
    site.push()
    script = tmp_path / "stub-scrapy"
    spoiled = {
        "No such file": lambda: script.rename(tmp_path / "away"),
        "Permission denied": lambda: script.chmod(0o644),
        "cannot be started": lambda: script.write_text("#!/nonexistent/interpreter\n"),
    }
    source = script.read_text()
    for words, spoil in spoiled.items():
        spoil()
        job = site.wait_job(site.schedule())
        assert (job["status"], job["exit_code"], job["started"]) == ("FAILED", None, None)
        assert words in job["reason"]
        assert f"job {job['identifier']} FAILED: shop quick, {job['reason']}" in capsys.readouterr().err
        script.write_text(source)
        script.chmod(0o755)
        assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    check_counts(site.get("status"))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("copy_tree", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the code cannot be copied for the crawl: "),
        ("crawl_arguments", ValueError("broken on purpose"), "broken on purpose"),
        ("find_family", OSError(errno.EROFS, "read-only"), None),
        ("find_family", RuntimeError("broken on purpose"), None),
    ],
)
def test_whatever_goes_wrong_at_a_start_or_an_end_its_slot_comes_free(inside, monkeypatch, name, error, words):
    def fail(*args, **more):
        raise error

    site = inside(job_slots=1)
    site.push()
    with monkeypatch.context() as patch:
        patch.setattr(scrapy_do, name, fail)
        job = site.wait_job(site.schedule())
    assert job["status"] == ("FAILED" if words else "SUCCESSFUL")
    assert (words or "") in (job["reason"] or "")
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


def test_no_thread_for_a_crawl_is_a_wait_and_no_end(inside, monkeypatch):
    site = inside()
    site.push()
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith("crawl-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        job = site.schedule()
        assert site.job(job)["status"] == "PENDING"
    assert site.wait_job(site.schedule())["status"] == site.wait_job(job)["status"] == "SUCCESSFUL"


# Cancel, time-outs, what a crawl leaves behind


def test_cancel_ends_scheduled_and_pending_jobs_at_once_and_no_finished_one(inside, tmp_path):
    site = inside(job_slots=1)
    site.push(hold=HOLD)
    running(site, "hold")
    for job in (site.schedule(when="every 2 hours"), site.schedule()):
        assert site.post("cancel-job", id=job) == {"status": "ok"}
        canceled = site.job(job)
        assert (canceled["status"], canceled["reason"]) == ("CANCELED", "canceled by the user")
        assert canceled["next_run"] is canceled["started"] is canceled["duration"] is canceled["exit_code"] is None
        denied(site.try_post("cancel-job", id=job), 409, "has ended already", "CANCELED")
    denied(site.try_post("cancel-job", id=NOBODY), 404, "list-jobs.json?status=")
    release(tmp_path)


@pytest.mark.parametrize(("spider", "code"), [("polite", 0), ("stubborn", -9)])
def test_cancel_asks_once_kills_later_and_answers_when_the_crawl_is_gone(inside, tmp_path, spider, code):
    site = inside(kill_after=0.3)
    site.push(polite=POLITE, stubborn=STUBBORN)
    job = running(site, spider)
    pid = kept_jobs(tmp_path)[job]["pid"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(site.try_post, "cancel-job", id=job) for _ in range(3)]
        assert {answer.result(20)[0] for answer in asked} <= {200, 409}
    canceled = site.job(job)
    assert is_gone(pid)
    assert (canceled["status"], canceled["exit_code"]) == ("CANCELED", code)
    assert ("feeds may be cut off" in canceled["reason"]) == (code < 0)
    assert site.log(job, "out").splitlines() == ["started", "bye" if code == 0 else "asked"]
    wait_for(lambda: not (tmp_path / "data/work" / job).exists())


def test_a_project_or_a_spider_is_canceled_with_all_its_jobs_and_no_others(inside, tmp_path):
    site = inside(job_slots=2, kill_after=0.2)
    site.push(stubborn=STUBBORN, hold=HOLD)
    site.push(stub_project("second", hold=HOLD))
    mine = [running(site, "stubborn"), *(site.schedule("stubborn", f"every {hours} hours") for hours in (2, 3))]
    other = running(site, "hold", project="second")
    mine.append(site.schedule("stubborn"))
    quick = site.schedule(when="every 2 hours")
    assert site.post("cancel-job", project="shop", spider="stubborn") == {"status": "ok", "canceled": 4}
    assert {site.job(job)["status"] for job in mine} == {"CANCELED"}
    assert (site.job(quick)["status"], site.job(other)["status"]) == ("SCHEDULED", "RUNNING")
    assert site.post("cancel-job", project="shop")["canceled"] == 1
    assert site.post("cancel-job", project="shop")["canceled"] == 0
    denied(site.try_post("cancel-job", project="thrid"), 404, "'thrid'")
    denied(site.try_post("cancel-job", spider="stubborn"), 400, "project")
    denied(site.try_post("cancel-job", id=other, project="second"), 400, "project")
    release(tmp_path)
    assert site.wait_job(other)["status"] == "SUCCESSFUL"


def test_cancel_twice_at_once_and_at_the_natural_end_gives_one_outcome(inside):
    """By hand for longer: CANCELS=1000 python -m pytest -k natural_end."""
    site = inside(job_slots=2)
    site.push(blink="sleep 0.0$(($$ % 5))")
    draw = random.Random(4)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for number in range(int(os.environ.get("CANCELS", "20"))):
            job = site.schedule("blink")
            moment = time.monotonic() + draw.random() * 0.1 * (number % 2)  # half of them at once: while it starts
            wait_for(lambda moment=moment: time.monotonic() >= moment)
            asked = [pool.submit(site.try_post, "cancel-job", id=job) for _ in range(2)]
            codes = sorted(answer.result(20)[0] for answer in asked)
            assert codes in ([200, 200], [200, 409], [409, 409])
            assert site.wait_job(job)["status"] == ("CANCELED" if 200 in codes else "SUCCESSFUL")
    check_counts(site.get("status"))


def test_a_job_that_is_canceled_while_its_code_is_copied_never_starts(inside, tmp_path, monkeypatch):
    site, real, go, copying = inside(job_slots=1), scrapy_do.copy_tree, threading.Event(), threading.Event()
    site.push(long="echo x >> $SPIDER_DATA_DIR/pids; exec sleep 60")
    monkeypatch.setattr(scrapy_do, "copy_tree", lambda *paths: (copying.set(), go.wait(), real(*paths))[2])
    job = site.schedule("long")
    copying.wait()
    site.post("cancel-job", id=job)
    assert site.job(job)["status"] == "CANCELED"
    go.set()
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    assert noted(tmp_path) == []
    assert site.get("status")["jobs-run"] == 1


@pytest.mark.parametrize(
    ("whose", "spider", "code"), [("job", "stubborn", -9), ("option", "polite", 0), ("job before option", "polite", 0)]
)
def test_a_crawl_that_runs_longer_than_its_timeout_is_ended_and_has_failed(outside, tmp_path, whose, spider, code):
    site = outside("--kill-after", "0.2", "--job-timeout", {"job": "0", "option": "0.3"}.get(whose, "1000"))
    site.push(polite=POLITE, stubborn=f"({STUBBORN}) & {NOTE}\n{STUBBORN}")
    began = time.monotonic()
    job = site.wait_job(site.schedule(spider, **({} if whose == "option" else {"timeout": "0.3"})))
    assert time.monotonic() - began > (0.3 if spider == "polite" else 0.5)
    assert (job["status"], job["exit_code"], job["timeout"]) == ("FAILED", code, None if whose == "option" else 0.3)
    assert job["reason"].startswith("it ran longer than its timeout of 0.3 s")
    assert ("feeds may be cut off" in job["reason"]) == (code < 0)
    assert ("bye" in site.log(job["identifier"], "out")) == (spider == "polite")
    assert living(tmp_path) == []
    assert site.wait_job(site.schedule(timeout="30"))["status"] == "SUCCESSFUL"
    check_counts(site.get("status"))


def test_a_cancel_right_at_the_start_of_a_crawl_with_a_timeout_still_kills_it(inside):
    site = inside(kill_after=0.1, job_timeout=600.0, job_slots=8)
    site.push(stubborn="trap '' TERM; while :; do sleep 0.02; done")
    jobs = [site.schedule("stubborn") for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda job: site.wait_job(job, "RUNNING") and site.try_post("cancel-job", id=job), jobs)
        assert {answer[0] for answer in asked} == {200}


def test_a_cancel_that_comes_after_the_timeout_counts_and_asks_no_second_time(inside, tmp_path):
    site = inside(kill_after=30)
    site.push(slow="trap 'echo asked' TERM; " + HOLD)
    job = running(site, "slow", timeout="0.2")
    wait_for(lambda: "asked" in site.log(job, "out"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(site.try_post, "cancel-job", id=job)
        wait_for(lambda: kept_jobs(tmp_path)[job].get("ending") == "cancel")
        release(tmp_path)
        assert answer.result(20)[0] == 200
    assert (site.job(job)["status"], site.job(job)["reason"]) == ("CANCELED", "canceled by the user")
    assert site.log(job, "out") == "started\nasked\n"


TREES = {
    "plain": f"sleep 60 & {NOTE}",
    "ignores-TERM": f"(trap '' TERM; while :; do sleep 0.05; done) & {NOTE}",
    "left-session": "setsid sh -c 'echo $$ >> $SPIDER_DATA_DIR/pids; exec sleep 60' &",
    "lost-parent": "(setsid sh -c 'echo $$ >> $SPIDER_DATA_DIR/pids; trap \"\" TERM; exec sleep 60' &)",
    "execs-for-ever": (  # while a process executes a program it seems to have no environment
        "again=$SPIDER_DATA_DIR/again; echo exec /bin/sh $again > $again; "
        "setsid sh -c 'echo $$ >> $SPIDER_DATA_DIR/pids; exec /bin/sh $SPIDER_DATA_DIR/again' &"
    ),
    "no-environment": f"env -i /bin/sleep 60 & {NOTE}",
    "stopped": f"sleep 60 & {NOTE}; kill -STOP $!",
}


@pytest.mark.parametrize("end", ["exits", "canceled"])
def test_nothing_of_a_crawl_outlives_it_and_nothing_else_is_hit(outside, tmp_path, end):
    site = outside("--kill-after", "0.4", "--job-slots", "20")
    tail = "exit 0" if end == "exits" else "sleep 60"
    ready = "while [ ! -e $SPIDER_DATA_DIR/go ]; do sleep 0.02; done"
    scripts = {name: f"{tree}\necho started; {ready}; {tail}" for name, tree in TREES.items()}
    site.push(**scripts, bystander="exec sleep 60")
    bystander = site.wait_job(site.schedule("bystander"), "RUNNING")["identifier"]
    marks = {"SCRAPY_JOB": bystander, "SPIDER_DATA_DIR": str(tmp_path / "data/spider-data")}
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **marks}) as stranger:  # it is not below the daemon
        jobs = [running(site, name) for name in TREES]
        wait_for(lambda: len(living(tmp_path)) == len(TREES))
        release(tmp_path)
        if end == "canceled":
            assert site.post("cancel-job", project="shop", spider="plain")["canceled"] == 1
            with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
                list(pool.map(lambda job: site.try_post("cancel-job", id=job), jobs))
        assert {site.wait_job(job)["status"] for job in jobs} == {"SUCCESSFUL" if end == "exits" else "CANCELED"}
        assert living(tmp_path) == []
        assert (site.job(bystander)["status"], stranger.poll()) == ("RUNNING", None)
        site.post("cancel-job", id=bystander)
        assert stranger.poll() is None
        stranger.kill()
    assert psutil.Process(site.process.pid).children() == []
    wait_for(lambda: not [path for path in (tmp_path / "data/work").iterdir() if path.name in jobs])


# Many at once


def test_many_spiders_are_scheduled_in_one_call_all_or_nothing(site, tmp_path):
    site.push(**{f"s{number}": "exit 0" for number in range(200)})
    denied(site.try_post("schedule-job", project="shop", spider=["s1", "nobody"], when="now"), 404, "'nobody'")
    assert site.jobs("ACTIVE") == []
    before = len((tmp_path / "data/state.json").read_text().splitlines())
    answer = site.post("schedule-job", project="shop", spider="*", when="every 2 hours")
    assert len((tmp_path / "data/state.json").read_text().splitlines()) - before <= 201
    assert answer["identifier"] == answer["identifiers"][0]
    jobs = {job["identifier"]: job for job in site.jobs("SCHEDULED")}
    assert jobs.keys() == set(answer["identifiers"])
    assert sorted(job["spider"] for job in jobs.values()) == site.get("list-spiders", project="shop")["spiders"]
    assert site.post("cancel-job", project="shop")["canceled"] == 201
    fields = {"project": "shop", "spider": ["s3", "quick", "s3"], "when": "now"}
    _, answer = site.call("POST", "/schedule-job.json", json.dumps(fields), {"Content-Type": JSON})
    assert [site.wait_job(job)["spider"] for job in answer["identifiers"]] == ["s3", "quick"]
    assert "identifiers" not in site.post("schedule-job", project="shop", spider="quick", when="now")


# Retention


def test_only_the_newest_finished_jobs_are_kept_and_the_answer_says_so(inside, tmp_path):
    site = inside(completed_cap=3)
    site.push(talk="echo x")
    made = []
    for _ in range(6):
        made.append(site.schedule("talk"))
        site.wait_job(made[-1])
    wait_for(lambda: [job["identifier"] for job in site.jobs("COMPLETED")] == made[:2:-1])
    wait_for(lambda: kept_logs(tmp_path) == set(made[3:]))
    assert list(kept_jobs(tmp_path)) == made[3:]
    denied(site.request("GET", f"/get-log/data/{made[0]}.out"), 404, "--completed-cap")


def test_finished_jobs_are_forgotten_by_the_size_of_their_logs_also_after_a_restart(outside, tmp_path):
    site = outside("--keep-mib", "1")
    half = "head -c 300000 /dev/zero; head -c 200000 /dev/zero >&2"
    site.push(half=half, big="head -c 2000000 /dev/zero", small="echo x")

    def run(spider):
        job = site.wait_job(site.schedule(spider))["identifier"]
        wake_timer(site)
        wait_for(lambda: len(kept_logs(tmp_path)) == len(site.jobs("SUCCESSFUL")))
        return job

    first, second, third = [run(spider) for spider in ("half", "small", "half")]
    assert kept_logs(tmp_path) == {first, second, third}
    site.stop()
    site.start()
    fourth = run("half")
    wait_for(lambda: kept_logs(tmp_path) == {second, third, fourth})
    big = run("big")
    wait_for(lambda: kept_logs(tmp_path) == {big})
    last = run("small")
    wait_for(lambda: kept_logs(tmp_path) == {last})


# The clock. A daemon in a process of its own has one that is off by as many seconds as a file says.

def test_due_times_that_were_missed_become_one_run_and_the_grid_goes_on(clocked, tmp_path):
    site, set_clock = clocked()
    site.push()
    schedules = [site.schedule(when=when) for when in ("every 10 minutes", "every 7 days", "every 2 to 3 hours")]
    began = [due(tmp_path, schedule) for schedule in schedules]
    site.schedule(when="every second")  # so that the timer looks at the clock

    def check(count, gone):
        for plan in (schedules[0], schedules[2]):
            wait_for(lambda plan=plan: len(runs_of(site, plan, "SUCCESSFUL")) == count)
        assert runs_of(site, schedules[1]) == []
        steady, weekly, drawn = (due(tmp_path, schedule) for schedule in schedules)
        assert weekly == began[1]
        assert (steady - began[0] + 300) % 600 == pytest.approx(300, abs=1e-3)
        assert 0 < steady - time.time() - gone <= 600
        assert 0 < drawn - time.time() - gone <= 3 * 3600

    set_clock(3 * DAY)  # the machine was asleep
    check(1, 3 * DAY)
    site.stop()  # the daemon is down
    set_clock(5 * DAY)
    site.start()
    check(2, 5 * DAY)


def test_a_clock_that_is_set_back_keeps_no_schedule_waiting(clocked, tmp_path):
    site, set_clock = clocked()
    site.push()
    steady, drawn = site.schedule(when="every 10 minutes"), site.schedule(when="every 2 to 3 hours")
    set_clock(-DAY)
    wake_timer(site)
    wait_for(lambda: "the system clock was set back" in site.log_path.read_text())
    now = time.time() - DAY
    wait_for(lambda: due(tmp_path, steady) <= now + 601)
    assert now + 590 < due(tmp_path, steady)
    assert now + 7190 < due(tmp_path, drawn) <= now + 10_801
    site.stop()
    set_clock(-2 * DAY)
    site.start()
    assert due(tmp_path, steady) <= time.time() - 2 * DAY + 601
    assert site.get("status")["jobs-run"] == 0
    set_clock(-2 * DAY + 700)
    site.post("cancel-job", id=drawn)  # has the timer look at the clock
    wait_for(lambda: runs_of(site, steady))
    assert len(runs_of(site, steady) + runs_of(site, steady, "ACTIVE")) == 1


def test_a_clock_at_1970_at_boot_fires_nothing_and_leaves_the_grid_alone(clocked, tmp_path):
    site, set_clock = clocked()
    site.push()
    schedules = [site.schedule(when=when) for when in ("every 10 minutes", "every 2 to 3 hours", "every monday at 12:30")]
    began = [due(tmp_path, schedule) for schedule in schedules]
    site.stop()
    set_clock(-time.time() + 1000)
    site.start()
    denied(site.try_post("schedule-job", project="shop", spider="quick", when="every second"), 503, "1970-01-01")
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    set_clock(0)
    ticker = site.schedule(when="every second")
    wait_for(lambda: runs_of(site, ticker), 90)
    assert [due(tmp_path, schedule) for schedule in schedules] == began
    assert [runs_of(site, schedule) for schedule in schedules] == [[], [], []]


def test_finished_jobs_are_forgotten_by_age_also_when_nothing_happens(clocked, tmp_path):
    site, set_clock = clocked("--keep-days", "2")
    site.push(bad="echo x; exit 1")
    schedule = site.schedule(when="every 9 days")
    old = [site.wait_job(site.schedule("bad"))["identifier"] for _ in range(2)]
    set_clock(1.5 * DAY)
    young = site.wait_job(site.schedule("bad"))["identifier"]
    assert kept_logs(tmp_path) == {young, *old}
    set_clock(2 * DAY + 60)
    wake_timer(site)
    wait_for(lambda: kept_logs(tmp_path) & {young, *old} == {young})
    assert schedule in kept_jobs(tmp_path).keys() >= {young}
    site.stop()
    set_clock(4 * DAY)
    site.start()
    wait_for(lambda: young not in kept_logs(tmp_path))
    assert site.job(schedule)["status"] == "SCHEDULED"


def test_every_second_runs_every_second_without_drift(outside, tmp_path):
    site = outside()
    site.push()
    schedule = site.schedule(when="every second")
    began = due(tmp_path, schedule)
    wait_for(lambda: len(runs_of(site, schedule)) >= 2)
    site.stop()
    saved = kept_jobs(tmp_path)
    runs = [job for job in saved.values() if job["actor"] == "SCHEDULER"]
    assert saved[schedule]["due"] == pytest.approx(began + len(runs))
    begun = sorted(job["origin"] - began for job in runs)
    assert all(0 <= moment - number < 0.5 for number, moment in enumerate(begun)), begun


def test_due_times_survive_a_restart_to_the_microsecond(outside, tmp_path):
    site = outside()
    site.push()
    jobs = [site.schedule(when=when) for when in ("every 2 to 3 hours", "every 2 weeks", "every monday at 12:30")]
    before = [site.job(job) for job in jobs], [due(tmp_path, job) for job in jobs]
    for end in (site.stop, site.kill):
        end()
        site.start()
        assert ([site.job(job) for job in jobs], [due(tmp_path, job) for job in jobs]) == before


# --on-finish


def test_on_finish_is_told_of_each_run_once_when_its_end_is_on_the_disk(outside, tmp_path, told):
    site = outside("--on-finish", f"{tmp_path}/note 'a b' '*'", "--job-slots", "1", "--kill-after", "0.2",
                   environment={"WATCHDOG_USEC": "99000000"})  # fmt: skip
    site.push(bad="exit 3", stubborn=STUBBORN)
    schedule = site.schedule(when="every 3 hours")
    made = {"quick": "SUCCESSFUL", "bad": "FAILED", "stubborn": "CANCELED"}
    ids = {spider: site.schedule(spider, payload='{"a": "漢字"}') for spider in made}
    made["pending"], ids["pending"] = "CANCELED", site.schedule()
    wait_for(lambda: "started" in site.log(ids["stubborn"], "out"))
    for job in (schedule, ids["pending"], ids["stubborn"]):
        site.post("cancel-job", id=job)
    wait_for(lambda: len(told()) >= 4)
    assert sorted(told()) == sorted(f"{ids[name]} {status} a b *" for name, status in made.items())
    for name, status in made.items():
        job, notes = ids[name], tmp_path / "notes" / ids[name]
        assert json.loads((notes / "input").read_text()) == site.job(job)
        assert re.findall(rf'"{job}".*?"status": "([A-Z]+)"', (notes / "state").read_text())[-1] == status
        assert "WATCHDOG_USEC" not in (notes / "environment").read_text()
    assert "--on-finish failed" not in site.log_path.read_text()


def test_on_finish_is_told_after_a_kill_9_of_what_it_was_not_told_of_and_of_nothing_twice(outside, tmp_path, told):
    (tmp_path / "wait").touch()
    site = outside("--on-finish", f"{tmp_path}/note", "--kill-after", "0.2")
    site.push(hold=HOLD)
    again = running(site, "hold")
    jobs = [site.schedule() for _ in range(3)]
    for job in jobs:
        site.wait_job(job)
    wait_for(lambda: len(told()) == 1)  # the others wait
    site.kill()
    (tmp_path / "wait").unlink()
    site.start()
    wait_for(lambda: len(told()) == 3)
    wait_for(lambda: "started" in site.log(again, "out"))
    release(tmp_path)
    wait_for(lambda: len(told()) == 4)
    assert {line.split()[0] for line in told()} == {again, *jobs}
    site.stop()
    site.start()
    site.wait_job(site.schedule())
    assert len(wait_for(lambda: len(told()) > 4 and told())) == 5


@pytest.mark.parametrize(
    ("command", "fault"),
    [("sh -c 'exit 3'", "exit status 3"), ("sh -c 'kill -9 $$'", "SIGKILL"), ("sleep 600", "timed out")],
    ids=["exit", "signal", "slow"],
)
def test_on_finish_that_fails_is_only_logged(inside, monkeypatch, capsys, command, fault):
    monkeypatch.setattr(scrapy_do, "NOTICE_SECONDS", 0.3)
    site = inside(on_finish=scrapy_do.parse_command(command))
    site.push()
    jobs = [site.wait_job(site.schedule(description="x" * 9000))["identifier"] for _ in range(2)]
    said = ""
    while not all(re.search(f"--on-finish failed for job {job}: .*{fault}", said) for job in jobs):
        said += wait_for(lambda: capsys.readouterr().err)
    assert {site.job(job)["status"] for job in jobs} == {"SUCCESSFUL"}


# ---- 7. HTTP ---------------------------------------------------------------------------------------------------------

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
POST_ROUTES = ("/push-project.json", "/schedule-job.json", "/cancel-job.json", "/remove-project.json")


# Routes


def test_every_route_answers_with_its_keys_and_one_line_feed(shop):
    for path, keys in GET_ROUTES.items():
        status, headers, body = shop.request("GET", path)
        assert (status, headers.get_all("Content-Type")) == (200, ["application/json"])
        assert json.loads(body).keys() == {"status", *keys}
        assert (body.count(b"\n"), int(headers["Content-Length"])) == (1, len(body))
    answer = shop.post("schedule-job", **PLAN)
    assert answer.keys() == {"status", "identifier", "next_run"}
    assert shop.post("cancel-job", project="shop")["canceled"] == 1
    assert shop.post("remove-project", name="shop") == {"status": "ok"}


def test_status_has_values_of_the_right_kind(shop):
    answer = shop.get("status")
    assert [type(answer[name]) for name in ("memory-usage", "cpu-usage", "jobs-run")] == [float, float, int]
    datetime.datetime.strptime(answer["time"], "%Y-%m-%d %H:%M:%S.%f")
    assert re.fullmatch(r"(\d+d )?(\d+h )?(\d+m )?(\d+s)?", answer["uptime"])
    assert (answer["projects"], answer["spiders"], answer["hostname"]) == (1, 1, socket.gethostname())


def test_head_answers_like_get_without_the_body(follow_me):
    site, identifier, gate = follow_me
    for path in (*GET_ROUTES, "/", f"/get-log/data/{identifier}.out"):
        full = site.request("GET", path)
        head = speak(site, head_of(path, "Connection: close", method="HEAD"), has_body=False)
        assert (head[0], head[1]["Content-Type"]) == (200, full[1]["Content-Type"])
        assert abs(int(head[1]["Content-Length"]) - len(full[2])) < 20
    with Line(site) as line:
        line.send(head_of(f"/get-log/data/{identifier}.out?follow=1", method="HEAD") + head_of("/x", method="HEAD"))
        assert [line.answer(has_body=False)[0] for _ in range(2)] == [200, 404]
    gate.touch()


@pytest.mark.parametrize(("path", "word"), [
    ("/nothing", "/list-jobs.json"), ("/schedule.json", "/schedule-job.json"),
    ("/addversion.json", "/push-project.json"),
    ("/daemonstatus.json", "/status.json"), ("/listjobs.json", "/list-jobs.json"),
    (f"/get-log/data/{NOBODY}", "ID.err"), (f"/get-log/data/{NOBODY}.log", "ID.err"),
    ("/get-log/data/ID.err", "identifier"), (f"/get-log/data/../{NOBODY}.err", "ID.err"), ("/" + "x" * 5000, "xxx..."),
])  # fmt: skip
def test_unknown_path_is_404_and_says_what_to_ask_for(site, path, word):
    for method in ("GET", "POST"):
        assert len(denied(site.request(method, path), 404, word)) < 400


def test_wrong_method_is_405_with_allow_and_the_option_of_curl(shop):
    for method, path, allow, word in [
        *(("GET", path, "POST", "-F or -d") for path in POST_ROUTES),
        *(("POST", path, "GET, HEAD", "-X") for path in GET_ROUTES),
        ("PUT", "/", "GET, HEAD", ""), ("DELETE", "/cancel-job.json", "POST", ""),
        ("PATCH", "/status.json", "GET, HEAD", ""),
        ("OPTIONS", f"/get-log/data/{NOBODY}.err", "GET, HEAD", ""),
    ]:  # fmt: skip
        answer = shop.request(method, path)
        denied(answer, 405, word)
        assert answer[1]["Allow"] == allow
    denied(shop.request("BREW", "/status.json"), 501)


@pytest.mark.parametrize(("path", "body", "status", "words"), [
    ("/schedule-job.json", b"project=shop&spider=quick", 400, ("'when'", "spider (repeatable)")),
    ("/schedule-job.json", b"project=a&project=b", 400, ("'project' is given twice",)),
    ("/schedule-job.json", PLAN_URLENCODED + b"&arg=q=x&y=2", 400, ("'y'", "--data-urlencode")),
    ("/schedule-job.json", PLAN_URLENCODED + b"&args=q", 400, ("arg (repeatable)",)),
    ("/schedule-job.json", b"project=%ff&spider=b", 400, ("UTF-8",)),
    ("/schedule-job.json", b"%ff=x", 400, ("UTF-8",)),
    ("/schedule-job.json", b'{"project": "shop"}', 400, ("--json",)),
    ("/push-project.json", b"archive=", 400, ()),
    ("/push-project.json", b"", 400, ("'archive'",)),
    ("/cancel-job.json", b"spider=quick", 400, ("id", "project")),
    ("/cancel-job.json", b"id=" + NOBODY.encode(), 404, ("list-jobs.json", "--completed-cap")),
    ("/remove-project.json", b"name=toys", 404, ("toys",)),
    ("/remove-project.json?name=shop", b"", 400, ("not in the address",)),
])  # fmt: skip
def test_a_wrong_form_is_refused_with_the_cure(shop, path, body, status, words):
    denied(speak(shop, post_of(path, body)), status, *words)
    assert shop.jobs("ACTIVE") == []


@pytest.mark.parametrize(("path", "status", "words"), [
    ("/list-jobs.json", 400, "list-jobs.json?status=ACTIVE"), ("/list-jobs.json?status=X", 400, "SCHEDULED"),
    (f"/list-jobs.json?id={NOBODY}&limit=3", 400, "either id or status"),
    ("/list-jobs.json?status=ACTIVE&limit=0", 400, "limit"),
    ("/list-jobs.json?state=ACTIVE", 400, "scheduled_by"), (f"/list-jobs.json?id={NOBODY}", 404, "COMPLETED"),
    ("/list-spiders.json", 400, "project"), ("/list-spiders.json?project=toys", 404, "toys"),
    ("/status.json?a=b", 400, "no parameters"),
    (f"/get-log/data/{NOBODY}.err", 404, "list-jobs.json"), (f"/get-log/data/{NOBODY}.err?tail=x", 400, "tail"),
    (f"/get-log/data/{NOBODY}.err?tail=-1", 400, "tail"),
    (f"/get-log/data/{NOBODY}.err?foo=1", 400, "follow, tail"), ("/%ff", 404, "/%ff"),
])  # fmt: skip
def test_a_wrong_question_is_refused_with_the_call_that_works(shop, path, status, words):
    denied(shop.request("GET", path), status, words)


def test_a_list_of_jobs_is_filtered_and_limited(shop):
    made = [shop.schedule(description=str(number)) for number in range(3)]
    for identifier in made:
        shop.wait_job(identifier)
    plan = shop.schedule(when="every 1 second")
    (run,) = wait_for(lambda: shop.get("list-jobs", status="SUCCESSFUL", scheduled_by=plan, limit=1)["jobs"])
    assert (run["scheduled_by"], run["actor"], run["schedule"]) == (plan, "SCHEDULER", "now")
    assert shop.post("cancel-job", id=plan) == {"status": "ok"}
    found = shop.get("list-jobs", status="COMPLETED", project="shop", spider="quick")["jobs"]
    assert found == sorted(found, key=lambda job: job["timestamp"], reverse=True)
    assert {job["identifier"] for job in found} >= {*made, plan}
    assert shop.get("list-jobs", status="COMPLETED", limit=2)["jobs"] == found[:2]
    assert shop.get("list-jobs", status="COMPLETED", spider="other")["jobs"] == []
    denied(shop.request("GET", f"/get-log/data/{shop.schedule(when='every day')}.err"), 404, "scheduled_by=")


def test_a_crash_is_500_and_its_traceback_only_in_the_log(shop, monkeypatch, capfd):
    monkeypatch.setattr(scrapy_do.Daemon, "find_project", lambda self, name: 1 / 0)
    assert "Zero" not in denied(speak(shop, post_of("/remove-project.json", b"name=shop")), 500, "see its log")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_refusal_is_one_short_line_of_the_log_and_a_challenge_or_an_answer_is_none(shop, capfd):
    assert len(denied(speak(shop, post_of("/schedule-job.json", b"x" * 250_000 + b"=1")), 400, "xxx...")) < 400
    said = capfd.readouterr().err
    assert (said.count("\n"), len(said) < 500) == (1, True)
    assert "POST /schedule-job.json from 127.0.0.1 got 400: " in said
    shop.get("status")
    assert capfd.readouterr().err == ""


# Bodies


def test_form_multipart_and_json_mean_the_same(shop):
    rich = {"payload": '{"x": [1]}', "timeout": "1.5", "priority": "3", "items": "1", "description": "ż&+ %=\r\n"}
    several = {"arg": ["a=1", "b=ü&+ %"], "setting": ["LOG_LEVEL=INFO"]}
    fields = {**PLAN, **rich, **several}
    lists = {key: [value] if isinstance(value, str) else value for key, value in fields.items()}
    files = [(key, (None, text)) for key, texts in lists.items() for text in texts]
    typed = {**fields, "payload": {"x": [1]}, "timeout": 1.5, "priority": 3, "items": True}
    seen = []
    for options in ({"data": fields}, {"files": files}, {"json": fields}, {"json": typed}):
        answer = requests.post(url_of(shop, "/schedule-job.json"), **options).json()
        seen.append(shop.job(answer["identifier"]))
    for job in seen:
        assert {key: job[key] for key in ("payload", "timeout", "priority", "description")} == {
            "payload": '{"x": [1]}', "timeout": 1.5, "priority": 3, "description": rich["description"],
        }  # fmt: skip
        assert (job["args"], job["settings"]) == (several["arg"], several["setting"])


@pytest.mark.parametrize(("body", "status", "words"), [
    (b'{"project": "a", "project": "b"}', 400, "twice"), (b"[]", 400, "one object"), (b"{", 400, "not JSON"),
    (b"\xff", 400, "UTF-8"), (b'{"project": ["a", "b"]}', 400, "twice|project"),
    (b'{"description": "\\ud800"}', 400, "UTF-8"), (b"[" * 100_000, 400, "not JSON"),
    (b'{"args": ["a=1"]}', 400, r"arg \(repeatable\)"), (b'{"a": ' + b"1" * 5000 + b"}", 400, ""),
    (b'"' + b"x" * scrapy_do.MIB + b'"', 413, "1 MiB"),
])  # fmt: skip
def test_broken_json_is_refused(shop, body, status, words):
    message = denied(speak(shop, post_of("/schedule-job.json", body, JSON)), status)
    assert re.search(words, message)


@pytest.mark.parametrize(("body", "kind", "status", "words"), [
    (part_of("project", b"shop"), MULTIPART, 400, "cut short"), (b"--xYz--", MULTIPART, 400, "'project'"),
    (b"--xYz\r\nX: y\r\n\r\nz\r\n--xYz--", MULTIPART, 400, "no name"), (b"", "multipart/form-data", 400, "boundary"),
    (b"x", "application/zip", 415, "-F archive=@demo.zip"), (b"x", "text/plain", 415, "--json"),
    (b"x" + PLAN_PARTS + b"\r\n--xYz--\r\n", MULTIPART, 400, "begin with its boundary"),
    (PLAN_URLENCODED + b"&description=" + b"x" * (scrapy_do.MIB + 1), URLENCODED, 413, "1 MiB"),
    (b"&" * (scrapy_do.MIB - 1), URLENCODED, 400, "'project'"), (b"arg=a&" * 2000, URLENCODED, 413, "1000"),
])  # fmt: skip
def test_a_body_of_the_wrong_kind_is_refused(shop, body, kind, status, words):
    began = time.process_time()
    denied(speak(shop, post_of("/schedule-job.json", body, kind)), status, words)
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("value", [b"", b"\r\n--xY", b"\r\n--xYz-", b"a\r\n--xYzz\r\nb", b"\r\n", b"\r\n\r\n",
    b"--xYz", "żółw".encode()])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_multipart_value_is_read_to_the_byte(shop, value, size):
    body = PLAN_PARTS + part_of("description", value, '; filename="a;b"') + b"\r\n--xYz--\r\n"
    head = head_of("/schedule-job.json", f"Content-Type: {MULTIPART}", "Transfer-Encoding: chunked", method="POST")
    data = head + chunks_of(body, size) if size else post_of("/schedule-job.json", body, MULTIPART)
    status, _, answer = speak(shop, data)
    assert status == 200, answer
    assert shop.job(json.loads(answer)["identifier"])["description"].encode() == value


@pytest.mark.parametrize(("field", "text"), [
    (b"", ""), (b"a+b%2B%26%3d", "a b+&="), (b"%zz%4", "%zz%4"), (b"%", "%"), (b"%C5%BC", "ż"), (b"=a=", "=a="),
    ("ż".encode(), "ż"),
])  # fmt: skip
def test_an_urlencoded_value_is_decoded_wherever_it_is_cut(shop, field, text):
    body = PLAN_URLENCODED + b"&&description=" + field + b"&"
    for size in (1, 5, len(body)):
        head = head_of("/schedule-job.json", "Content-Type: " + URLENCODED, "Transfer-Encoding: chunked", method="POST")
        status, _, answer = speak(shop, head + chunks_of(body, size))
        assert status == 200, answer
        assert shop.job(json.loads(answer)["identifier"])["description"] == text


@pytest.mark.parametrize("options", [
    ("-F", "archive=@{}"), ("--data-urlencode", "archive@{}"),
    ("-F", "archive=@{}", "-H", "Transfer-Encoding: chunked"),
    ("-F", "archive=@{}", "-H", "Expect: 100-continue"), ("-F", "archive=@{}", "--http1.0"),
    ("-F", "archive=@{};type=application/zip"),
])  # fmt: skip
def test_curl_pushes_a_project_in_each_way(site, tmp_path, options):
    archive = tmp_path / "shop.zip"
    archive.write_bytes(big_project(300_000))
    status, answer = curl_of(site, "/push-project.json", *(option.format(archive) for option in options))
    assert (status, answer) == (200, {"status": "ok", "name": "shop", "spiders": ["quick"], "warnings": []})


def test_the_client_of_the_original_sends_and_gets_what_it_wants(site):
    """As `scrapy-do-cl` 0.5.0 does: an urlencoded archive, the content type compared for equality."""
    answer = requests.post(url_of(site, "/push-project.json"), data={"archive": stub_project()})
    assert (answer.headers["Content-Type"], answer.json()["name"]) == ("application/json", "shop")
    fields = {**PLAN, "when": "now", "description": "", "payload": "{}"}
    identifier = requests.post(url_of(site, "/schedule-job.json"), data=fields).json()["identifier"]
    site.wait_job(identifier)
    answer = requests.get(url_of(site, "/list-jobs.json"), params={"id": identifier})
    assert (answer.headers["Content-Type"], answer.json()["jobs"][0]["payload"]) == ("application/json", "{}")
    answer = requests.get(url_of(site, f"/get-log/data/{identifier}.out"))
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_a_body_over_the_limit_is_413_and_the_client_sees_that(site, tmp_path, monkeypatch):
    site.limit(max_upload=1)
    denied(speak(site, head_of("/push-project.json", "Content-Length: 1048577", method="POST")), 413, "--max-upload")
    (tmp_path / "big").write_bytes(bytes(3_000_000))
    for more in ((), ("-H", "Transfer-Encoding: chunked", "-H", "Expect:"), ("-H", "Expect:")):
        denied(curl_of(site, "/push-project.json", "-F", f"archive=@{tmp_path}/big", *more), 413, "--max-upload")
    site.limit(max_upload=4)
    body = b'{"archive": "' + bytes(scrapy_do.MIB)
    denied(speak(site, post_of("/push-project.json", body, "application/json")), 413, "1 MiB", "-F archive=@demo.zip")
    assert os.listdir(tmp_path / "data" / "projects") == []


@pytest.mark.parametrize("body", [b"x\r\n", b"5\r\nname=xx\r\n0\r\n\r\n", b"-1\r\n\r\n", b"0x1\r\na\r\n",
    b"1\na\r\n0\r\n\r\n", b"1\r\na0\r\n\r\n"])
def test_a_broken_chunked_body_is_400_and_closes(shop, body):
    with Line(shop) as line:
        line.send(head_of("/remove-project.json", "Transfer-Encoding: chunked", method="POST") + body)
        line.socket.shutdown(socket.SHUT_WR)
        denied(line.answer(), 400)
        assert line.is_closed()


def test_an_expectation_is_met_before_the_body_comes_and_only_if_that_is_wanted(shop):
    head = functools.partial(head_of, method="POST")
    wish = ("Expect: 100-continue", f"Content-Length: {len(PLAN_URLENCODED)}")
    with Line(shop) as line:
        line.send(head("/schedule-job.json", *wish))
        assert line.answer()[0] == 100
        line.send(PLAN_URLENCODED)
        assert line.answer()[0] == 200
        line.send(head("/nothing", *wish))
        denied(line.answer(), 404)
    assert speak(shop, head("/schedule-job.json", *wish, version="1.0") + PLAN_URLENCODED)[0] == 200


# Heads and connections


@pytest.mark.parametrize(("head", "status"), [
    (head_of("/", "X: a\rContent-Length: 5"), 400), (head_of("/", "A: b", " folded"), 400),
    (head_of("/", "a b: c"), 400), (head_of("/", "a : c"), 400), (head_of("/", "nonsense"), 400),
    (head_of("/", "A: \0"), 400), (head_of("/", "Host: localhost"), 400), (head_of("/", "Content-Length: +1"), 400),
    (head_of("/", "Content-Length: 1", "Content-Length: 1", method="POST"), 400),
    (head_of("/", "Content-Length: 1", "Transfer-Encoding: chunked"), 400), (head_of("/", "Content-Length: 1, 1"), 400),
    (head_of("/", "Content-Length: "), 400), (head_of("/", "Transfer-Encoding: gzip, chunked"), 400),
    (head_of("/", "Transfer-Encoding: "), 400), (b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET /\r\n\r\n", 400),
    (head_of("/" + "x" * 70_000), 414), (head_of("/", *[f"a{n}: b" for n in range(200)]), 431),
    (head_of("/", "a: " + "b" * 70_000), 431), (head_of("/", *["a: " + "b" * 30_000] * 3), 431),
    (head_of("/", *["a: " + "b" * 5_000] * 20), 431),
])  # fmt: skip
def test_an_unsound_head_is_refused_and_what_follows_is_no_request(site, head, status):
    with Line(site) as line:
        line.send(head_of() + head + head_of("/list-projects.json"))
        assert line.answer()[0] == 200
        denied(line.answer(), status)
        assert line.is_closed()


def test_requests_may_be_pipelined_and_bodies_are_not_requests(shop):
    with Line(shop) as line:
        schedule = post_of("/schedule-job.json", PLAN_URLENCODED)
        line.send(head_of() + schedule + head_of("/nothing") + head_of("/list-projects.json"))
        assert [line.answer()[0] for _ in range(4)] == [200, 200, 404, 200]
    chunked = head_of("/nothing", "Transfer-Encoding: chunked", method="POST")
    for request in (head_of("/status.json", "Content-Length: 40"), chunked):
        with Line(shop) as line:
            line.send(request + head_of())
            assert line.answer()[1]["Connection"] == "close"
            assert line.is_closed()


@pytest.mark.parametrize(("version", "wish", "stays"), [
    ("1.1", None, True), ("1.1", "close", False), ("1.1", "Upgrade, close", False), ("1.0", None, False),
    ("1.0", "keep-alive", False),
])  # fmt: skip
def test_a_connection_stays_as_the_client_wishes(site, version, wish, stays):
    with Line(site) as line:
        line.send(head_of("/status.json", *([f"Connection: {wish}"] if wish else []), version=version) + head_of())
        assert line.answer()[1]["Connection"] == ("keep-alive" if stays else "close")
        assert line.answer()[0] == 200 if stays else line.is_closed()


@pytest.mark.parametrize("start", [b"", b"GET /sta", head_of()[:-2], head_of() + b"GET", head_of()])
def test_a_slow_head_is_cut_off_without_a_word(site, start, capfd):
    hurry(site, 0.3)
    with Line(site) as line:
        line.send(start)
        if start.startswith(head_of()):
            assert line.answer()[0] == 200
        assert line.is_closed()
    assert capfd.readouterr().err == ""


def test_a_client_that_drips_is_cut_off_too(site):
    hurry(site, 0.3)
    with Line(site) as line:
        line.send(b"GET /")
        assert wait_for(lambda: select.select([line.socket], [], [], 0.02)[0] or line.send(b"x"), 5)


def test_a_slow_body_is_408_but_a_steady_one_is_taken(shop, monkeypatch):
    hurry(shop, 0.2)
    monkeypatch.setattr(scrapy_do, "LINGER_SECONDS", 0.1)
    denied(speak(shop, head_of("/schedule-job.json", "Content-Length: 99", method="POST") + b"proj"), 408)
    monkeypatch.setattr(scrapy_do, "BODY_BYTES_PER_SECOND", 100)
    body = PLAN_URLENCODED + b"&description=" + b"x" * 100
    with Line(shop) as line:
        line.send(post_of("/schedule-job.json", body)[: -len(body)])
        for at in range(0, len(body), 20):
            line.send(body[at : at + 20])
            select.select([line.socket], [], [], 0.06)
        assert line.answer()[0] == 200


def is_idle(site, address):
    handlers = filter(None, list(site.server.connections.values()))
    return any(each.client_address == address and each.idle_since < time.monotonic() for each in handlers)


def test_the_connection_idle_for_longest_gives_way_and_busy_ones_do_not(follow_me, monkeypatch):
    site, identifier, gate = follow_me
    monkeypatch.setattr(scrapy_do, "GRACE_SECONDS", 0.1)
    site.limit(max_connections=3)
    with contextlib.ExitStack() as stack:
        follower, first, second = (stack.enter_context(Line(site)) for _ in range(3))
        follower.send(head_of(f"/get-log/data/{identifier}.out?follow=1", "Connection: close"))
        follower.file.readline()
        for line in (first, second):
            line.send(head_of())
            line.answer()
            wait_for(functools.partial(is_idle, site, line.socket.getsockname()))
        # Connections of before may be ending still, and then they are the first to go.
        wait_for(lambda: site.get("status") and select.select([first.socket], [], [], 0)[0])
        assert first.is_closed()
        gate.touch()
        assert b"two" in follower.file.read()


def test_past_the_cap_a_connection_is_503_until_another_ends(follow_me, monkeypatch):
    site, identifier, gate = follow_me
    monkeypatch.setattr(scrapy_do, "GRACE_SECONDS", 0.1)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            line = stack.enter_context(Line(site))
            line.send(head_of(f"/get-log/data/{identifier}.out?follow=1", "Connection: close"))
            line.file.readline()
        site.limit(max_connections=2)
        denied(speak(site, head_of()), 503, "--max-connections")
        gate.touch()
        assert b"two" in line.file.read()
    wait_for(lambda: site.request("GET", "/status.json")[0] == 200)


def test_a_client_that_goes_on_asking_is_not_cut_at_the_cap(site):
    site.limit(max_connections=2)
    found = []
    with Line(site) as first, Line(site) as second:
        third = threading.Thread(target=lambda: found.append(speak(site, head_of())))
        third.start()
        while third.is_alive():
            for line in (first, second):
                line.send(head_of())
                assert line.answer()[0] == 200
        third.join()
    denied(found[0], 503, "--max-connections")


def test_a_follower_whose_log_is_gone_sees_no_other_answer_in_it(follow_me, tmp_path):
    site, identifier, gate = follow_me
    log = tmp_path / f"data/logs/{identifier}.out"
    with Line(site) as line:
        line.send(head_of(f"/get-log/data/{identifier}.out?follow=1"))
        line.file.readline()
        log.rename(tmp_path / "away")
        log.symlink_to("/etc/passwd")
        assert b"HTTP/1.1" not in line.file.read()
    gate.touch()


def test_a_thread_that_cannot_be_started_costs_one_connection(site, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with Line(site) as line:
        line.send(head_of())
        line.answer()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            denied(speak(site, head_of()), 503, "thread")
        assert site.get("status")


def test_a_client_that_goes_leaves_nothing_behind(shop, tmp_path, capfd):
    kept = os.listdir(tmp_path / "data" / "projects")
    for data in (b"", b"GET /sta", head_of(), post_of("/push-project.json", b"archive=" + bytes(9999))[:-99],
        head_of("/", "Content-Length: 9")):
        with Line(shop) as line:
            line.send(data)
            line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: os.listdir(tmp_path / "data" / "projects") == kept)
    assert shop.get("status")
    assert "Traceback" not in capfd.readouterr().err


# Logs


def test_a_log_is_followed_until_its_crawl_has_ended(follow_me):
    site, identifier, gate = follow_me
    with requests.get(url_of(site, f"/get-log/data/{identifier}.out?follow=1"), stream=True) as answer:
        lines = answer.iter_lines(chunk_size=1)
        assert next(lines) == b"started"
        gate.touch()
        assert list(lines) == [b"two"]
    with Line(site) as line:
        line.send(head_of(f"/get-log/data/{identifier}.out?follow=1&tail=1", version="1.0"))
        assert line.file.read().endswith(b"\r\n\r\ntwo\n")


def test_a_log_is_followed_from_before_its_crawl_begins(inside, tmp_path):
    site = inside(job_slots=1)
    site.push(slow=HOLD, quick="echo out; echo err >&2")
    site.schedule("slow")
    identifier = site.schedule()
    assert site.log(identifier) == ""
    with requests.get(url_of(site, f"/get-log/data/{identifier}.err?follow=1"), stream=True) as answer:
        release(tmp_path)
        assert answer.content == b"err\n"


def test_who_follows_and_goes_costs_no_thread(follow_me):
    site, identifier, gate = follow_me
    site.limit(max_connections=1)
    for _ in range(3):
        with Line(site) as line:
            line.send(head_of(f"/get-log/data/{identifier}.out?follow=1"))
            assert line.file.readline() == b"HTTP/1.1 200 OK\r\n"
    gate.touch()
    assert site.wait_job(identifier)


def test_a_follower_is_cut_by_a_reload_and_can_tell_and_does_not_hold_it_up(outside):
    site = outside("--kill-after", "1")
    site.push(slow=HOLD)
    identifier = running(site, "slow")
    with requests.get(url_of(site, f"/get-log/data/{identifier}.out?follow=1"), stream=True) as answer:
        pieces = answer.iter_content(8)
        assert next(pieces) == b"started\n"
        began, listens_again = time.monotonic(), site.hang_up()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            next(pieces)
        assert time.monotonic() - began < 2
        listens_again()


def test_tail_and_range_of_a_log_are_right_across_blocks(shop, tmp_path):
    identifier = shop.schedule()
    shop.wait_job(identifier)
    path, log_file = f"/get-log/data/{identifier}.err", tmp_path / "data" / "logs" / f"{identifier}.err"
    text = b"".join(b"line %d\n" % number for number in range(30_000))
    for content in (b"", b"\n", b"a", b"a\n\nb\xff\n", text, text[:-1], b"x" * 65_536 + b"\n", b"\n" * 65_537):
        log_file.write_bytes(content)
        for count in (0, 1, 2, 20_000, 10**9):
            wanted = b"".join(content.splitlines(keepends=True)[-count:]) if count else b""
            assert shop.request("GET", f"{path}?tail={count}")[2] == wanted
    log_file.write_bytes(text)
    size = len(text)
    for asked, first, last in (("0-0", 0, 1), ("5-6", 5, 7), ("-3", size - 3, size), ("70000-", 70_000, size),
    (f"9-{size * 2}", 9, size)):
        status, headers, body = shop.request("GET", path, None, {"Range": f"bytes={asked}"})
        assert (status, headers["Content-Range"], body) == (206, f"bytes {first}-{last - 1}/{size}", text[first:last])
    status, headers, body = answer = shop.request("GET", path, None, {"Range": f"bytes={size}-"})
    denied(answer, 416)
    assert headers["Content-Range"] == f"bytes */{size}"
    for asked in ("lines=1-2", "bytes=a-b", "bytes=0-1,3-4"):
        assert shop.request("GET", path, None, {"Range": asked})[::2] == (200, text)
    part = tmp_path / "part"
    part.write_bytes(text[:1000])
    subprocess.run(["curl", "-sS", "-C", "-", "-o", str(part), url_of(shop, path)], check=True)
    assert part.read_bytes() == text
    log_file.unlink()
    log_file.symlink_to("/etc/passwd")
    denied(shop.request("GET", path), 404, "log")


# Browsers


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1:7654", "[::1]:7654", "LOCALHOST.",
    "crawls.example:1", "10.1.2.3"])
def test_own_names_are_answered(site, host):
    site.limit(allow_host=["crawls.example"])
    assert speak(site, head_of(host=host))[0] == 200


@pytest.mark.parametrize("host", [
    "", "evil.example", "999.1.1.1", "[:::]", "localhost:x", "127.1", "1", "[127.0.0.1]", "::1", "localhost@evil",
        "a b", "localhost.evil", "\xff",
])  # fmt: skip
def test_foreign_names_are_refused(site, host):
    denied(speak(site, head_of(host=host)), 403, "--allow-host")


def test_an_absolute_address_is_refused_as_this_is_no_proxy(site):
    for target in ("http:///status.json", "http://evil/status.json"):
        denied(speak(site, head_of(target)), 400)


@pytest.mark.parametrize(("lines", "status"), [
    ((), 200), (("Origin: http://localhost:5",), 200), (("Origin: http://localhost",), 403),
    (("Origin: null",), 403), (("Origin: ",), 403), (("Origin: ftp://localhost:5",), 403),
    (("Sec-Fetch-Site: same-site",), 403), (("Sec-Fetch-Site: cross-site",), 403),
    (("Sec-Fetch-Site: same-origin",), 200), (("Sec-Fetch-Site: none",), 200),
    (("Origin: https://crawls.example",), 200), (("Origin: https://crawls.example:9",), 403),
    (("Origin: http://other.example:8080",), 200), (("Origin: http://other.example",), 403),
    (("Origin: http://localhost:5", "Sec-Fetch-Site: cross-site"), 403),
    (("Origin: http://localhost:5", "Origin: http://evil"), 403),
])  # fmt: skip
def test_only_own_pages_change_something(shop, lines, status):
    shop.limit(allow_host=["crawls.example", "other.example:8080"])
    head = head_of("/remove-project.json", "Content-Length: 9", *lines, method="POST", host="localhost:5")
    assert speak(shop, head + b"name=shop")[0] == status
    assert shop.get("list-projects")["projects"] == ([] if status == 200 else ["shop"])


def test_a_proxy_that_loses_the_port_is_told_how_to_keep_it(shop):
    head = head_of("/remove-project.json", "Content-Length: 9", "Origin: http://localhost:8080", method="POST")
    denied(speak(shop, head + b"name=shop"), 403, "proxy_set_header Host $http_host", "--allow-host localhost:8080")


# Users


@pytest.mark.parametrize(("user", "way"), [*zip(USERS, ("--digest", "--anyauth", "--digest"), strict=True)])
def test_curl_comes_in_with_a_password(guarded, way, user):
    options = [way, "-u", f"{user}:{USERS[user]}"]
    assert curl_of(guarded, "/list-projects.json?", *options)[0] == 200
    assert curl_of(guarded, "/cancel-job.json", *options, "-d", f"id={NOBODY}")[0] == 404
    assert curl_of(guarded, "/list-projects.json", way, "-u", f"{user}:x")[0] == 401


@pytest.mark.parametrize("kind", ["data", "files"])
def test_requests_and_curl_push_a_large_archive_with_a_password(guarded, tmp_path, kind):
    archive = big_project(1_000_000)
    login = requests.auth.HTTPDigestAuth("ala", "kot:1")
    answer = requests.post(url_of(guarded, "/push-project.json"), **{kind: {"archive": archive}}, auth=login)
    assert answer.json()["spiders"] == ["quick"]
    (tmp_path / "shop.zip").write_bytes(archive)
    for way in ("--digest", "--anyauth"):
        options = (way, "-u", "ala:kot:1", "-F", f"archive=@{tmp_path}/shop.zip")
        assert curl_of(guarded, "/push-project.json", *options)[0] == 200


def test_nothing_but_a_challenge_is_answered_without_a_password(guarded, capfd):
    for path in (*GET_ROUTES, "/", f"/get-log/data/{NOBODY}.err", "/nothing"):
        denied(guarded.request("GET", path), 401)
    assert [way.split()[0] for way in challenge_of(guarded)[1]] == ["Digest", "Digest"]
    assert capfd.readouterr().err == ""
    denied(requests.get(url_of(guarded, "/status.json"), auth=("ala", "kot:1")), 401, "TLS only")


@pytest.mark.parametrize("way", ["SHA-256", "MD5"])
def test_a_digest_is_good_once_and_for_one_path_and_a_time(guarded, monkeypatch, way):
    nonce, _ = challenge_of(guarded)
    for count in ("0000000a", "00000002"):  # a browser's requests overtake each other
        assert speak(guarded, head_of("/status.json", digest_line(nonce, way=way, count=count)))[0] == 200
        answer = speak(guarded, head_of("/status.json", digest_line(nonce, way=way, count=count)))
        denied(answer, 401, "used before")
        assert "stale=true" in answer[1]["WWW-Authenticate"]
    denied(speak(guarded, head_of("/status.json", digest_line(nonce, "/x/status.json", count="00000003"))), 400,
        "proxy", "/x/status.json")
    monkeypatch.setattr(scrapy_do, "NONCE_SECONDS", 0)
    challenge_of(guarded)
    denied(speak(guarded, head_of("/status.json", digest_line(nonce, count="00000004"))), 401, "too old")


def test_a_captured_header_does_not_carry_another_body(guarded):
    login = requests.auth.HTTPDigestAuth("ala", "kot:1")
    requests.post(url_of(guarded, "/push-project.json"), data={"archive": stub_project()}, auth=login)
    nonce, _ = challenge_of(guarded)
    line = digest_line(nonce, "/remove-project.json", "POST")
    denied(speak(guarded, post_of("/remove-project.json", b"name=nothing", URLENCODED, line)), 404)
    denied(speak(guarded, post_of("/remove-project.json", b"name=shop", URLENCODED, line)), 401)
    assert requests.get(url_of(guarded, "/list-projects.json"), auth=login).json()["projects"] == ["shop"]


def test_old_nonces_are_forgotten_but_never_good_again(guarded, monkeypatch):
    monkeypatch.setattr(scrapy_do, "NONCE_USES", 1)
    nonces = []
    for _ in range(4):
        nonces.append(challenge_of(guarded)[0])
        assert speak(guarded, head_of("/status.json", digest_line(nonces[-1])))[0] == 200
    assert len({*nonces}) == 4
    for nonce in nonces:
        denied(speak(guarded, head_of("/status.json", digest_line(nonce))), 401)


@pytest.mark.parametrize("changes", [
    {"password": "x"}, {"username": "ola"}, {"response": "0" * 64}, {"response": None}, {"uri": "/"},
    {"qop": "auth-int"}, {"qop": None}, {"way": "SHA-512"}, {"cnonce": "d"}, {"realm": "x", "response": "\xfc"},
    {"method": "POST"}, {"nonce": None}, {"nc": "1"},
])  # fmt: skip
def test_a_wrong_digest_is_refused_and_logged(guarded, capfd, changes):
    line = digest_line(challenge_of(guarded)[0], **changes)
    denied(speak(guarded, head_of("/status.json", line)), 401, "wrong")
    assert "GET /status.json from 127.0.0.1 got 401" in capfd.readouterr().err


@pytest.mark.parametrize("value", ["", "Digest", "Basic", "Bearer x", "Digest " + "=" * 1000, 'Digest username="',
    "Digest nonce=\xff, uri=\xff"])
def test_nonsense_as_credentials_is_401(guarded, value):
    denied(speak(guarded, head_of("/status.json", f"Authorization: {value}")), 401)


def test_a_nonce_of_another_daemon_is_stale_not_wrong(guarded):
    nonce, _ = challenge_of(guarded)
    for made in ("", "0" * 94, nonce[:-1] + ("0" if nonce[-1] != "0" else "1")):
        answer = speak(guarded, head_of("/status.json", digest_line(made)))
        denied(answer, 401)
        assert "stale=true" in answer[1]["WWW-Authenticate"]


def test_strangers_never_keep_users_out(guarded, monkeypatch):
    monkeypatch.setattr(scrapy_do, "PENALTY_SECONDS", 5)
    guarded.limit(max_connections=20)
    bad = digest_line(challenge_of(guarded)[0], password="x")
    push = head_of("/push-project.json", "Content-Length: 99999", method="POST")
    kinds = (b"", b"GET /", head_of(), head_of("/status.json", bad), push)
    with contextlib.ExitStack() as stack:
        for number in range(256):
            stack.enter_context(Line(guarded)).send(kinds[number % len(kinds)])
        began = time.monotonic()
        assert curl_of(guarded, "/status.json", "--digest", "-u", "ala:kot:1")[0] == 200
        assert time.monotonic() - began < 1


def test_a_wrong_password_is_answered_late_and_holds_nobody_else_up(site):
    site.limit(users=USERS)
    began = time.monotonic()
    with Line(site) as line:
        line.send(head_of("/status.json", digest_line(challenge_of(site)[0], password="x")))
        assert curl_of(site, "/status.json", "--digest", "-u", "ala:kot:1")[0] == 200
        assert time.monotonic() - began < 0.9
        denied(line.answer(), 401, "wrong")
        assert time.monotonic() - began > 0.9


def test_a_file_of_users_is_read_strictly(tmp_path):
    path = tmp_path / "users"
    path.write_bytes(b"ala:a:b\n\nbob:c\r\n")
    for mode in (0o600, 0o640, 0o440):
        path.chmod(mode)
        assert scrapy_do.read_users(path) == {"ala": "a:b", "bob": "c"}
    for mode, text, words in (
        (0o644, "a:b", "chmod"), (0o660, "a:b", "chmod"), (0o600, "a", "line 1"), (0o600, "a:b\na:c", "line 2"),
        (0o600, ":b", "line 1"),
        (0o600, "", "no users"), (0o600, "\xff", "UTF-8"),
    ):  # fmt: skip
        path.write_bytes(text.encode("latin-1"))
        path.chmod(mode)
        with pytest.raises(scrapy_do.ScrapyDoError, match=words) as raised:
            scrapy_do.read_users(path)
        assert str(raised.value).count(str(path)) == 1
    with pytest.raises(scrapy_do.ScrapyDoError, match="--auth-file"):
        scrapy_do.read_users(tmp_path / "none")


# TLS


def test_basic_and_digest_are_taken_over_tls(encrypted, tmp_path, monkeypatch):
    monkeypatch.setattr(scrapy_do, "PENALTY_SECONDS", 0.05)
    encrypted.limit(users=USERS)
    (tmp_path / "shop.zip").write_bytes(big_project(1_000_000))
    for way in ("--basic", "--digest", "--anyauth"):
        options = (*encrypted.cacert, way, "-u", "żółw:hasło", "-F", f"archive=@{tmp_path}/shop.zip")
        assert curl_of(encrypted, "/push-project.json", *options, scheme="https")[0] == 200
    for wrong in ("ala:x", "ola:kot:1", "żółw:"):
        assert curl_of(encrypted, "/status.json", *encrypted.cacert, "-u", wrong, scheme="https")[0] == 401
    status, _ = curl_of(encrypted, "/status.json", *encrypted.cacert, "-H", "Authorization: Basic !", scheme="https")
    assert status == 401


def test_a_renewed_certificate_is_used_after_a_reload(outside, tmp_path):
    make_key_pair(tmp_path)
    site = outside("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    (tmp_path / "old.pem").write_bytes((tmp_path / "cert.pem").read_bytes())
    old, new = (("--cacert", str(tmp_path / name)) for name in ("old.pem", "cert.pem"))
    make_key_pair(tmp_path, "renewed.example")
    assert curl_of(site, "/status.json", *old, scheme="https")[0] == 200
    site.reload()
    assert curl_of(site, "/status.json", *new, scheme="https")[0] == 200
    with pytest.raises(subprocess.CalledProcessError):
        curl_of(site, "/status.json", *old, scheme="https")


def test_a_certificate_that_cannot_be_used_is_refused_without_asking_for_a_password(tmp_path):
    make_key_pair(tmp_path)
    key, locked = tmp_path / "key.pem", tmp_path / "locked.pem"
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    lock = serialization.BestAvailableEncryption(b"kot")
    pem = secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    locked.write_bytes(pem)
    for certificate, file in ((tmp_path / "cert.pem", locked), (tmp_path / "cert.pem", None), (tmp_path / "none", key)):
        with pytest.raises(scrapy_do.ScrapyDoError, match="openssl pkey") as raised:
            scrapy_do.load_certificate(certificate, file)
        assert str(file or certificate) in str(raised.value)


def test_no_handshake_holds_others_up_and_a_broken_connection_is_not_the_disk(encrypted, tmp_path, capfd):
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    with Line(encrypted), Line(encrypted) as plain:
        plain.send(head_of())
        plain.is_closed()
        with socket.create_connection(("127.0.0.1", encrypted.port)) as raw:
            with context.wrap_socket(raw, server_hostname="localhost") as line:
                line.sendall(post_of("/push-project.json", b"archive=x" * 9)[:-5])
                os.write(line.fileno(), b"rubbish that is no record of TLS")
                with contextlib.suppress(ConnectionError):
                    while os.read(line.fileno(), 65536):
                        pass
        assert curl_of(encrypted, "/status.json", *encrypted.cacert, scheme="https")[0] == 200
    said = capfd.readouterr().err
    assert ("Traceback" in said, "disk" in said) == (False, False)


def test_clients_that_fail_before_tls_do_not_loosen_the_cap(encrypted, monkeypatch):
    def refuse(self, connection, **options):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(ssl.SSLContext, "wrap_socket", refuse)
        for _ in range(5):
            with Line(encrypted) as line:
                line.is_closed()
    monkeypatch.setattr(scrapy_do, "GRACE_SECONDS", 0.1)
    encrypted.limit(max_connections=1)
    with Line(encrypted) as first, Line(encrypted):
        assert first.is_closed()


# ---- 8. Reloads and stops --------------------------------------------------------------------------------------------


def test_crawls_go_on_across_two_reloads(outside, tmp_path):
    site = outside("--job-slots", "2")
    site.push(good=f"{HOLD}; cat code.py", bad=f"sleep 60 & {HOLD}; cat code.py; exit 7")
    jobs = {spider: site.schedule(spider) for spider in ("good", "bad")}
    crawls, began = [crawl_of(site, tmp_path, job) for job in jobs.values()], time.monotonic()
    waiting, before = site.schedule(), [site.job(job) for job in jobs.values()]
    process, port = psutil.Process(site.process.pid), site.port
    descriptors = process.num_fds()
    for _ in range(2):
        site.reload()
        assert [site.job(job) for job in jobs.values()] == before
        status = site.get("status")
        assert (status["jobs-running"], status["jobs-pending"], status["jobs-run"]) == (2, 1, 2)
        assert site.port == port
    assert {crawl.ppid() for crawl in crawls} == {site.process.pid}
    wait_for(lambda: process.num_fds() <= descriptors)
    wait_for(lambda: time.monotonic() > began + 1)
    release(tmp_path)
    done = [site.wait_job(job) for job in jobs.values()]
    assert [(job["status"], job["exit_code"]) for job in done] == [("SUCCESSFUL", 0), ("FAILED", 7)]
    assert min(job["duration"] for job in done) >= 1  # from its start, not from the reload
    assert {site.log(job, "out") for job in jobs.values()} == {"started\nx = 1\n"}  # from its working copy
    assert site.wait_job(waiting)["status"] == "SUCCESSFUL"
    wait_for(lambda: not {path.name for path in (tmp_path / "data/work").iterdir()} & {*jobs.values()})
    assert [child for child in process.children() if child.status() == psutil.STATUS_ZOMBIE] == []
    assert crawls_of(tmp_path / "data") == []
    assert site.stop() == 0
    assert "Traceback" not in site.log_path.read_text()


def test_a_crawl_that_ends_during_a_reload_keeps_its_exit_code_and_no_client_is_refused(slow, tmp_path):
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
    assert (done["status"], done["exit_code"], site.log(job, "out")) == ("FAILED", 7, "started\n")
    assert not crawl.is_running()


def test_a_timeout_goes_on_and_a_stop_is_not_lost_during_a_reload(slow, tmp_path):
    site, flag = slow("--kill-after", "0.3")
    site.push(stubborn=STUBBORN)
    job = site.schedule("stubborn", timeout="1")
    crawl_of(site, tmp_path, job)
    began, listens_again = time.monotonic(), site.hang_up()
    wait_until_it_is_executed(site)
    wait_for(lambda: time.monotonic() > began + 1)
    flag.unlink()
    listens_again()
    done = site.wait_job(job)
    assert (done["status"], done["exit_code"], done["duration"] < 3) == ("FAILED", -9, True)
    assert "it ran longer than its timeout of 1 s" in done["reason"]
    job = site.schedule("stubborn")
    crawl = crawl_of(site, tmp_path, job)
    flag.touch()
    seen = site.log_path.read_text().count("reloading")
    site.hang_up()
    wait_for(lambda: site.log_path.read_text().count("reloading") > seen)
    wait_until_it_is_executed(site)
    site.process.terminate()
    flag.unlink()
    assert site.process.wait(15) == 0
    assert (is_gone(crawl.pid), kept_jobs(tmp_path)[job]["status"]) == (True, "PENDING")


def test_a_crawl_that_is_being_started_at_a_reload_is_started_once(wrapped, tmp_path):
    flag = tmp_path / "copying"
    wait = f"while os.path.exists({str(flag)!r}):\n        open({str(flag)!r} + '.on', 'w').close()\n        time.sleep(0.01)"
    site = wrapped(f"link = os.link\ndef slow_link(*paths):\n    {wait}\n    link(*paths)\nos.link = slow_link")
    site.push(hold="echo run >> $SPIDER_DATA_DIR/runs; " + HOLD)
    flag.touch()
    job = site.schedule("hold")
    wait_for((tmp_path / "copying.on").exists)
    site.reload()
    flag.unlink()
    release(tmp_path)
    assert site.wait_job(job)["status"] == "SUCCESSFUL"
    assert noted(tmp_path, "runs") == ["run"]


def test_a_crawl_that_is_being_ended_at_a_reload_is_asked_once_and_killed_in_time(outside, tmp_path):
    site = outside("--kill-after", "3")
    site.push(stubborn="trap 'echo asked' TERM; echo started; while :; do sleep 0.05; done", hold=HOLD)
    job, kept = site.schedule("stubborn"), site.schedule("hold")
    for started in (job, kept):
        crawl_of(site, tmp_path, started)
    asker = threading.Thread(target=try_to_cancel, args=(site, job))
    asker.start()
    wait_for(lambda: "asked" in site.log(job, "out"))
    began = time.monotonic()
    site.reload()
    asker.join()
    assert (site.job(job)["status"], site.job(kept)["status"]) == ("RUNNING", "RUNNING")
    canceled = site.wait_job(job)
    assert (canceled["status"], canceled["exit_code"]) == ("CANCELED", -9)
    assert 2 < time.monotonic() - began < 4.5
    assert site.log(job, "out") == "started\nasked\n"
    release(tmp_path)
    assert site.wait_job(kept)["status"] == "SUCCESSFUL"


def test_a_push_that_is_under_way_at_a_reload_or_stop_changes_nothing(outside, tmp_path):
    site = outside("--kill-after", "0.3")
    on = tmp_path / "data/spider-data/on"
    slow = make_zip({"scrapy.cfg": "[deploy]\nproject=slow\n", "list.sh": "touch $SPIDER_DATA_DIR/on; sleep 60"})

    def push():
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert site.try_push(slow)[0] == 503

    site.push(name="other")
    for end in (site.reload, site.stop):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pushed = pool.submit(push)
            wait_for(on.exists)
            end()
            pushed.result(30)
        on.unlink()
    assert crawls_of(tmp_path / "data") == []
    site.start()
    assert site.get("list-projects")["projects"] == ["other"]
    assert len(list((tmp_path / "data/projects").iterdir())) == 2  # its archive and its code
    site.push()
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"


def test_a_reload_that_cannot_succeed_is_refused_and_all_goes_on(copied, tmp_path):
    make_key_pair(tmp_path)
    users, certificate = tmp_path / "users", tmp_path / "cert.pem"
    users.write_text("ala:kot\n")
    users.chmod(0o600)
    good = f"--auth-file\n{users}\n--host\n127.0.0.1\n--kill-after\n2\n--tls-cert\n{certificate}\n--tls-key\n{tmp_path}/key.pem\n"
    (tmp_path / "options").write_text(good)
    site, path = copied("@options")
    source, pem = MODULE.read_text(), certificate.read_text()
    faults = [
        (path, source + "\nbreak\n", "SyntaxError: 'break' outside loop"),
        (path, "print('x')", "it does not say its version"),
        (path, source.replace('"--kill-after"', '"--kill"'), "unrecognized arguments: --kill-after 2"),
        (tmp_path / "options", good + "--on-finish\n/none\n", "--on-finish /none cannot be executed"),
        (users, "ala:kot\nbad line\n", str(users)),
        (certificate, pem[: len(pem) // 2], str(certificate)),
    ]
    for number, (file, content, words) in enumerate(faults, 1):
        before = file.read_text()
        file.write_text(content)
        site.process.send_signal(signal.SIGHUP)
        wait_for(lambda number=number: site.log_path.read_text().count("not reloaded, all goes on as before") == number)
        assert words in site.log_path.read_text()
        file.write_text(before)
    get = functools.partial(requests.get, f"https://127.0.0.1:{site.port}/status.json", verify=False, timeout=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (get().status_code, get(auth=("ala", "kot")).status_code) == (401, 200)
        path.write_text(source.replace('__version__ = "', '__version__ = "new-'))
        site.reload()
        assert get(auth=("ala", "kot")).json()["daemon-version"] == f"new-{scrapy_do.__version__}"


def test_a_program_that_cannot_be_executed_changes_nothing(wrapped, tmp_path):
    refuse = "def refuse(*args):\n    raise OSError(12, os.strerror(12))\nos.execve = refuse"
    site = wrapped(refuse, "--kill-after", "0.3")
    site.push(hold=HOLD)
    job = site.schedule("hold")
    crawl = crawl_of(site, tmp_path, job)
    site.process.send_signal(signal.SIGHUP)
    said(site, "not reloaded, all goes on as before", os.strerror(12))
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    assert crawl.is_running()
    assert site.stop() == 0
    assert (is_gone(crawl.pid), kept_jobs(tmp_path)[job]["status"]) == (True, "PENDING")
    assert "Traceback" not in site.log_path.read_text()


def test_more_crawls_than_slots_after_a_reload_all_come_to_their_end(outside, tmp_path):
    (tmp_path / "options").write_text("--job-slots\n3\n")
    site = outside("@options")
    until = "echo started; while [ ! -e $SPIDER_DATA_DIR/{} ]; do sleep 0.02; done"
    site.push(**{name: until.format(name) for name in "abc"}, last="")
    jobs = {name: site.schedule(name) for name in "abc"}
    for job in jobs.values():
        crawl_of(site, tmp_path, job)
    last = site.schedule("last")
    (tmp_path / "options").write_text("--job-slots\n1\n")
    site.reload()
    for name in "bca":
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
    for number, options in enumerate(("--host\n0.0.0.0\n", ""), 1):  # it goes on to listen there
        (tmp_path / "options").write_text(options)
        site.process.send_signal(signal.SIGHUP)
        wait_for(lambda number=number: site.log_path.read_text().count("name users by --auth-file") == number)
    assert site.call("GET", "/status.json")[0] == 401


def test_a_crash_after_a_reload_is_like_any_other(outside, tmp_path):
    site = outside()
    site.push(hold="echo $$ >> $SPIDER_DATA_DIR/pids; " + HOLD)
    job, schedule = site.schedule("hold"), site.schedule(when="every 2 hours")
    crawl, due = crawl_of(site, tmp_path, job), site.job(schedule)["next_run"]
    site.reload()
    assert site.job(schedule)["next_run"] == due
    site.kill()
    assert not is_gone(crawl.pid)
    stranger = {b"SCRAPY_JOB": b"\xff", b"SPIDER_DATA_DIR": bytes(tmp_path / "others"), b"PATH": os.environb[b"PATH"]}
    mine = {"SPIDER_DATA_DIR": str(tmp_path / "data/spider-data"), "PATH": os.environ["PATH"]}  # somebody tries a spider
    with subprocess.Popen(["sleep", "60"], env=stranger) as other, subprocess.Popen(["sleep", "60"], env=mine) as trial:
        site.start()
        assert is_gone(crawl.pid)
        said(site, f"job {job} PENDING")
        release(tmp_path)
        assert site.wait_job(job)["status"] == "SUCCESSFUL"
        assert len(noted(tmp_path)) == 2
        assert (other.poll(), trial.poll()) == (None, None)
        other.kill()
        trial.kill()


def test_after_a_crash_jobs_of_one_call_start_in_their_order(outside, tmp_path):
    site = outside("--job-slots", "1")
    site.push(**dict.fromkeys("abcd", HOLD))
    jobs = site.post("schedule-job", project="shop", spider="*", when="now")["identifiers"]
    crawl_of(site, tmp_path, jobs[0])
    site.kill()
    site.start()
    release(tmp_path)
    ended = [site.wait_job(job) for job in jobs]
    assert [job["spider"] for job in sorted(ended, key=lambda job: job["started"])] == [*"abcd", "quick"]
    assert (site.get("status")["jobs-run"], site.get("status")["jobs-successful"]) == (5, 5)


def test_a_stop_at_any_moment_of_a_reload_ends_it_well(outside, tmp_path):
    """By hand for longer: STOP_ROUNDS=100 python -m pytest -k moment_of_a_reload."""
    site = outside("--job-slots", "1", "--kill-after", "0.2")
    site.push(stubborn=STUBBORN)
    job, rounds = site.schedule("stubborn"), int(os.environ.get("STOP_ROUNDS", "4"))
    for number in range(rounds):
        crawl = crawl_of(site, tmp_path, job)
        site.process.send_signal(signal.SIGHUP)
        moment = time.monotonic() + 0.6 * number / rounds
        wait_for(lambda moment=moment: time.monotonic() >= moment)
        assert site.stop() == 0
        assert (is_gone(crawl.pid), kept_jobs(tmp_path)[job]["status"]) == (True, "PENDING")
        site.start()
    assert "Traceback" not in site.log_path.read_text()


def test_a_request_that_arrives_during_a_reload_is_answered_before_it(outside):
    site = outside()
    site.push()
    body = b"project=shop&spider=quick&when=every+2+hours"
    head = "POST /schedule-job.json HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as half:
        half.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:20])
        site.get("status")  # so the server has seen the other
        listens_again = site.hang_up()
        said(site, "reloading")
        half.sendall(body[20:])
        answer = half.recv(100_000)
    assert answer.startswith(b"HTTP/1.1 200 ")
    listens_again()
    assert [job["identifier"].encode() in answer for job in site.jobs("SCHEDULED")] == [True]


def test_jobs_run_once_each_and_no_client_is_refused_while_it_is_reloaded_again_and_again(outside, tmp_path):
    """By hand for longer: RELOAD_ROUNDS=200 python -m pytest -k reloaded_again."""
    site = outside("--completed-cap", "100000")
    note = "echo $SCRAPY_JOB >> $SPIDER_DATA_DIR/runs; "
    site.push(quick=f"{note} exit 3", brief=f"{note} sleep 0.0$(($$ % 10)); exit 4", long=f"{note} sleep 0.5; exit 5")
    stop, sure = threading.Event(), set()

    def ask(client):  # nobody is refused or cut off
        draw = random.Random(client)
        while not stop.is_set():
            if client == 0:
                site.get("status")
                continue
            job = site.schedule(draw.choice(["quick", "brief", "brief", "long"]))
            sure.add(job)
            if draw.random() < 0.7:  # or there would be ever more
                site.wait_job(job)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, client) for client in range(4)]
        site.schedule(when="every second")
        try:
            for number in range(int(os.environ.get("RELOAD_ROUNDS", "5"))):
                enough = len(sure) + random.Random(number).randrange(1, 8)
                wait_for(lambda enough=enough: len(sure) >= enough)
                listens_again = site.hang_up()
                for _ in range(number % 3):
                    site.process.send_signal(signal.SIGHUP)
                listens_again()
        finally:
            stop.set()
        for future in asked:
            future.result(30)
    for job in wait_for(lambda: site.jobs("SCHEDULED")):
        site.post("cancel-job", id=job["identifier"])
    wait_for(lambda: not site.jobs("PENDING") and not site.jobs("RUNNING"))
    ended = {job["identifier"]: job for job in site.jobs("COMPLETED") if job["status"] != "CANCELED"}
    assert sorted(noted(tmp_path, "runs")) == sorted(ended)
    assert sure <= ended.keys()
    codes = {"quick": 3, "brief": 4, "long": 5}
    assert [job for job in ended.values() if (job["status"], job["exit_code"]) != ("FAILED", codes[job["spider"]])] == []
    assert site.stop() == 0
    assert "Traceback" not in site.log_path.read_text()


def test_a_hang_up_that_nohup_has_ignored_stays_so_and_is_said(outside):
    site = outside(command=("nohup", sys.executable, str(MODULE)))
    said(site, "SIGHUP is ignored")
    site.process.send_signal(signal.SIGHUP)
    site.push()
    assert site.wait_job(site.schedule())["status"] == "SUCCESSFUL"
    assert "reloading" not in site.log_path.read_text()
    assert site.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_with_status_0_whatever_it_does_and_puts_jobs_back_in_their_place(outside, tmp_path, number):
    site = outside("--job-slots", "1", "--kill-after", "0.2")
    site.push(stubborn=STUBBORN, note="echo $SCRAPY_JOB")
    first = site.schedule("stubborn")
    crawl, second = crawl_of(site, tmp_path, first), site.schedule("note")
    asker = threading.Thread(target=try_to_cancel, args=(site, site.schedule("stubborn")))
    asker.start()
    site.process.send_signal(number)
    site.process.send_signal(number)
    assert site.process.wait(15) == 0
    asker.join()
    assert is_gone(crawl.pid)
    saved = kept_jobs(tmp_path)
    assert [(saved[job]["status"], saved[job].get("pid")) for job in (first, second)] == [("PENDING", None)] * 2
    assert list((tmp_path / "data").glob("state.json.*")) == []
    site.start()
    site.wait_job(first, "RUNNING")
    assert site.job(second)["status"] == "PENDING"
    site.post("cancel-job", id=first)
    assert site.wait_job(second)["status"] == "SUCCESSFUL"
    assert "Traceback" not in site.log_path.read_text()


def test_it_works_with_closed_streams_and_with_sigchld_ignored(stub, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        site = Client()
        site.port = free.getsockname()[1]
    options = ["--port", str(site.port), "--data-dir", str(tmp_path / "data"), "--scrapy", *stub]
    ignore = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.closerange(0, 3)"
    command = [sys.executable, "-c", f"{ignore}; os.execv(sys.executable, sys.argv[1:])", sys.executable, str(MODULE), *options]
    with subprocess.Popen(command) as process:
        try:
            wait_for(lambda: subprocess.run(["curl", "-s", f"http://127.0.0.1:{site.port}/status.json", "-o", os.devnull]).returncode == 0)
            site.push(talk="echo out; echo err >&2; exit 3")
            job = site.wait_job(site.schedule("talk"))
            assert (job["exit_code"], site.log(job["identifier"], "out"), site.log(job["identifier"])) == (3, "out\n", "err\n")
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_as_the_first_process_of_a_container_it_reaps_what_crawls_leave(outside, tmp_path):
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("there may be no namespace here")
    site = outside(command=(*unshare, sys.executable, str(MODULE)))
    (first,) = psutil.Process(site.process.pid).children()
    site.push(orphans="for n in 1 2 3; do (setsid true &) ; done; (setsid sleep 60 &); exit 3")
    for _ in range(2):
        job = site.wait_job(site.schedule("orphans"))
        assert (job["status"], job["exit_code"]) == ("FAILED", 3)
        wait_for(lambda: not first.children(recursive=True))
    first.terminate()
    assert site.process.wait(30) == 0


# ---- 8. Command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "99999"], "must be a whole number from 0 to 65535, not '99999'"),
        (["--job-slots", "0"], "must be a whole number from 1 to 1000, not '0'"),
        (["--keep-mib", "1.5"], "must be a whole number from 0 to"),
        (["--completed-cap", "-1"], "must be a whole number from 1 to"),
        (["--kill-after", "nan"], "must be a number of seconds"),
        (["--list-timeout", "-1"], "must be a number of seconds"),
        (["--scrapy", ""], "is empty"),
        (["--scrapy", "'"], "--scrapy: No closing quotation"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--po", "1"], "unrecognized arguments: --po 1"),
        (["--tls-key", "x"], "--tls-key needs --tls-cert"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named_with_status_2(capsys, options, sentence):
    with pytest.raises(SystemExit) as error:
        scrapy_do.main(options)
    assert error.value.code == 2
    assert (sentence in capsys.readouterr().err, options[0][:3]) == (True, options[0][:3])


def test_options_may_come_from_a_file(tmp_path):
    (tmp_path / "options").write_text("--port\n0\n--job-slots\n7\n")
    options = scrapy_do.parse_options([f"@{tmp_path}/options", "--scrapy", "nice -n 5 ./venv/bin/scrapy"])
    assert (options.port, options.job_slots) == (0, 7)
    assert options.scrapy == ("nice", "-n", "5", "./venv/bin/scrapy")
    assert scrapy_do.parse_options(["--scrapy", "./scrapy"]).scrapy == (str(pathlib.Path("scrapy").absolute()),)


def test_help_is_grouped_with_each_default_and_the_version_is_said(capsys):
    scrapy_do.main(["--version"])
    assert capsys.readouterr().out == f"scrapy-do {scrapy_do.__version__}\n"
    with pytest.raises(SystemExit) as error:
        scrapy_do.main(["--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0
    groups = text.split("\n\n")
    assert [group.partition(":\n")[0] for group in groups if ":\n" in group][-4:] == ["where", "crawls", "finished jobs", "clients"]
    defaults = ["127.0.0.1", "7654", "scrapy-do-data", "this Python's -m scrapy", "3", "30", "60", "500", "256"]
    words = " ".join(text.split())
    assert [value for value in defaults if not re.search(rf"\((default: )?{re.escape(value)}\)", words)] == []
    assert max(map(len, text.splitlines())) < 80


def test_a_start_that_cannot_succeed_is_one_sentence_with_the_cure(outside, tmp_path):
    site = outside()
    (tmp_path / "psutil.py").write_text("raise ImportError")
    (tmp_path / "hook").touch()
    data = ["--data-dir", str(tmp_path / "other")]
    for options, environment, words in (
        (["--port", str(site.port), *data], {}, (f"cannot listen on 127.0.0.1, port {site.port}", "choose another --port")),
        (["--host", "0.0.0.0", *data], {}, ("could run code as you", "--auth-file", "--no-auth")),
        (["--port", "0", *data, "--on-finish", f"{tmp_path}/hook"], {}, ("--on-finish", "cannot be executed", "chmod +x")),
        (["--port", "0", *data, "--on-finish", "no-such-hook -x"], {}, ("--on-finish no-such-hook cannot be executed",)),
        ([], {"PYTHONPATH": str(tmp_path)}, (f"'{os.path.abspath(sys.executable)} -m pip install psutil'",)),
    ):
        status, text = run_main(*options, env={**os.environ, **environment})
        assert (status, text.count("\n"), [word for word in words if word not in text]) == (1, 1, []), text
    assert not (tmp_path / "other").exists()


NO_SCRAPY = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "scrapy" else find(name, *rest)
"""


@pytest.mark.parametrize(
    ("options", "environment", "warned"),
    [
        ((), {"TZ": "Europe/Atlantis"}, "warning: there is no time zone 'Europe/Atlantis', so times are UTC"),
        ((), {"TZ": ":Europe/Warsaw"}, ""),
        ((), {"TZ": "CET-1CEST,M3.5.0,M10.5.0/3"}, ""),
        (("--scrapy", "no-such-scrapy"), {}, "warning: there is no command 'no-such-scrapy'"),
        (("--scrapy", "{project}/bin/scrapy"), {}, ""),
        (("--scrapy", f"{sys.executable} -m scrapy"), {"PYTHONPATH": "."}, f"run '{os.path.abspath(sys.executable)} -m pip install scrapy'"),
    ],
)
def test_what_will_not_work_later_is_said_at_the_start(outside, tmp_path, options, environment, warned):
    if "PYTHONPATH" in environment:
        (tmp_path / "sitecustomize.py").write_text(NO_SCRAPY)
    log = outside(*options, environment=environment).log_path.read_text()
    assert warned in log
    assert log.count("warning") == bool(warned)
    assert str(tmp_path / "data") in log


def test_events_are_log_lines_that_cannot_be_faked(outside):
    site = outside()
    site.push(bad="exit 4")
    plan = site.schedule("bad", "every second", description="x\n2026-01-01 00:00:00 job faked")
    run = wait_for(lambda: site.jobs("FAILED"))[0]["identifier"]
    site.call("GET", "/status.json?%0A2026-01-01%2000:00:00+0000%20faked=1")
    site.stop()
    lines = site.log_path.read_text().splitlines()
    wanted = ("listens on http://127.0.0.1:", "project shop was pushed", f"job {plan} SCHEDULED (every second): shop bad",
              f"job {run} FAILED after 0 s: shop bad, a run of {plan}, exit code 4", "stopping")  # fmt: skip
    assert [any(words in line for line in lines) for words in wanted] == [True] * 5, lines
    assert all(re.match(r"20[0-9-]{8} [0-9:]{8}[+-][0-9]{4} ", line) for line in lines), lines
    assert [line for line in lines if re.match(r"\S+ \S+ (job )?faked", line)] == []


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_service_manager_is_told_of_the_start_a_reload_and_the_stop(copied, tmp_path, is_abstract):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"scrapy-do-{uuid.uuid4()}" if is_abstract else str(tmp_path / "notify")
        manager.bind("\0" + name if is_abstract else name)
        manager.settimeout(30)
        site, path = copied(environment={"NOTIFY_SOCKET": "@" + name if is_abstract else name})
        assert manager.recv(100) == b"READY=1"
        before = time.clock_gettime(time.CLOCK_MONOTONIC)
        site.reload()
        reloading, moment = manager.recv(100).split(b"\nMONOTONIC_USEC=")
        assert reloading == b"RELOADING=1"
        assert before < int(moment) / 1e6 < time.clock_gettime(time.CLOCK_MONOTONIC)
        assert manager.recv(100) == b"READY=1"
        path.write_text("break")
        site.process.send_signal(signal.SIGHUP)
        assert manager.recv(100).startswith(b"RELOADING=1")
        assert manager.recv(100) == b"READY=1"
        site.process.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert site.process.wait(30) == 0


def test_the_file_stays_short_enough_to_be_read_and_is_what_the_card_says():
    """Growing is a decision: whoever raises a number has looked for the simpler shape."""
    source = MODULE.read_text()
    assert len(source.splitlines()) <= 2800
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source))) <= 1800
    assert max(map(len, source.splitlines())) <= 100
    assert re.findall(r"^# ---- ([0-9]+)\. ", source, re.MULTILINE) == [str(number) for number in range(1, 10)]
    assert issubclass(scrapy_do.Server, http.server.ThreadingHTTPServer)
    assert issubclass(scrapy_do.Handler, http.server.BaseHTTPRequestHandler)
    assert "import scrapy\n" not in source.partition('SHIM = """')[0]


# ---- 9. Page ---------------------------------------------------------------------------------------------------------


def test_the_page_takes_nothing_from_elsewhere_and_makes_no_html_of_what_it_is_told(site):
    status, headers, body = site.request("GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["X-Content-Type-Options"] == "nosniff"
    for rule in ("default-src 'none'", "connect-src 'self'", "form-action 'none'", "frame-ancestors 'none'"):
        assert rule in headers["Content-Security-Policy"]
    page = body.decode()
    assert not re.findall(r"https?:|//\w|innerHTML|insertAdjacent|document\.write|outerHTML|eval\(", page)
    assert page.count("\n") <= 200


def test_a_browser_pushes_schedules_with_arguments_and_reads_a_log_as_text(browser, site, tmp_path):
    hostile = "<img src=x onerror=document.title='hacked'>"
    script = f"echo \"{hostile} żółw\" >&2; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done"
    (tmp_path / "shop.zip").write_bytes(stub_project(talker=f"{script}; echo last >&2"))
    browser.element("//details[@id='pushing'][@open]")  # an empty daemon says what to do first
    assert "push-project.json" in browser.text("curl")
    browser.fill(archive=str(tmp_path / "shop.zip"))
    browser.click("//button[text()='Push']")
    wait_for(lambda: "shop has 2 spiders" in browser.text("message"))
    browser.click("//details[@id='new']/summary")
    browser.element("//select[@name='project']/option[text()='shop']")
    browser.fill(spider="talker", description=hostile, arg="a=1\nb=two words", setting="MARK=3")
    browser.click("//button[text()='Schedule']")
    browser.click("//ul[@id='running']//button[text()='log']")
    wait_for(lambda: browser.text("log") == f"{hostile} żółw")
    (tmp_path / "end").touch()
    wait_for(lambda: browser.text("log") == f"{hostile} żółw\nlast")
    wait_for(lambda: browser.text("note") == "the end")
    browser.click("//dialog//button[text()='Close']")
    wait_for(lambda: "SUCCESSFUL" in browser.text("finished"))
    assert hostile in browser.text("finished")
    assert browser.chrome.title == "scrapy-do"
    (job,) = site.jobs("COMPLETED")
    assert (job["args"], job["settings"]) == (["a=1", "b=two words"], ["MARK=3"])
    browser.fill(when="every moonday")
    browser.click("//button[text()='Schedule']")
    wait_for(lambda: "moonday" in browser.text("message"))
    assert [log for log in browser.chrome.get_log("browser") if not re.search("400|favicon", log["message"])] == []


def test_the_page_draws_the_runs_of_a_schedule_and_cancels_it(browser, site):
    site.push(failing="exit 3")
    plan = site.schedule("failing", "every second")
    wait_for(lambda: len(site.get("list-jobs", status="FAILED", scheduled_by=plan)["jobs"]) >= 2)
    browser.element("//ul[@id='scheduled']//*[@role='img'][@class='bad'][2][contains(@title, 'FAILED')]")
    browser.element("//ul[@id='failed']//button[text()='by every second']")
    browser.chrome.execute_script("asked = []; confirm = text => asked.push(text)")
    browser.click("//ul[@id='scheduled']//button[text()='cancel']")
    assert browser.chrome.execute_script("return asked") == ["Cancel failing, every second?"]
    wait_for(lambda: browser.text("scheduled") == "")
    assert site.job(plan)["status"] == "CANCELED"


def test_the_page_searches_spiders_and_fits_a_telephone(browser, site):
    site.push(**{f"city{number}": "exit 0" for number in range(30)})
    browser.element("//ul[@id='projects']//b[text()='shop']")
    browser.chrome.find_element("id", "search").send_keys("city17")
    wait_for(lambda: browser.text("projects").splitlines()[:2] == ["shop spiders: 1", "city17"])
    browser.chrome.set_window_size(400, 800)
    assert browser.chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth")


# ---- 10. Real Scrapy -------------------------------------------------------------------------------------------------

SPIDERS_OF_PAGES = """
import json, os, sys
import scrapy
print("not-a-spider")
sys.stdout.write("no line break")


class Pages(scrapy.Spider):
    name = "pages"

    def __init__(self, payload="{}", **arguments):
        super().__init__(**arguments)
        self.wish = json.loads(payload)
        self.start_urls = [self.wish["site"] + "/1"]

    def parse(self, response):
        self.logger.error("Zażółć gęślą jaźń: %s", self.wish.get("word"))
        self.logger.error("note %r, mark %r", getattr(self, "note", None), self.settings.get("MARK"))
        print("chatter")
        yield {"title": response.css("title::text").get(), "job": os.environ["SCRAPY_JOB"]}
        yield from response.follow_all(css="a")


class Slow(Pages):
    name = "slow"

    def parse(self, response):
        yield {"title": "first"}
        yield response.follow(f"/slow/{response.url.count('/')}", dont_filter=True)
"""
SETTINGS_OF_PAGES = """
import os
SPIDER_MODULES = ["shop.spiders"]
FEEDS = {os.environ.get("SPIDER_DATA_DIR", ".") + f"/{os.environ.get('SCRAPY_JOB')}.jsonl": {"format": "jsonlines"}}
ROBOTSTXT_OBEY = TELNETCONSOLE_ENABLED = False
LOG_FILE = "lost.log"
"""


def test_a_real_crawl_of_a_new_project_is_run_by_curl(outside, website, tmp_path):
    site = outside(scrapy=(), environment={"LANG": "C", "LC_ALL": "C"})
    subprocess.run([sys.executable, "-m", "scrapy", "startproject", "new"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "new/new/spiders/pages.py").write_text(SPIDERS_OF_PAGES)
    shutil.make_archive(str(tmp_path / "new"), "zip", tmp_path, "new")
    assert curl_of(site, "/push-project.json", "-F", f"archive=@{tmp_path}/new.zip")[1] == {
        "status": "ok", "name": "new", "spiders": ["pages", "slow"], "warnings": [],
    }  # fmt: skip
    payload = json.dumps({"site": website, "word": "漢字"}, ensure_ascii=False)
    fields = ["project=new", "spider=pages", "when=now", f"payload={payload}", "arg=note=-1 = żółć\n漢字",
              "setting=MARK=--x=żółw", "setting=DOWNLOAD_DELAY=0", "items=1"]  # fmt: skip
    _, answer = curl_of(site, "/schedule-job.json", *(word for field in fields for word in ("-F", field)))
    job = site.wait_job(answer["identifier"])
    log = site.log(job["identifier"])
    assert (job["status"], job["reason"], job["payload"]) == ("SUCCESSFUL", None, payload), log
    assert (log.count("Zażółć gęślą jaźń: 漢字"), log.count("note '-1 = żółć\\n漢字', mark '--x=żółw'")) == (3, 3), log
    assert job["stats"] == {"items": 3, "responses": 4, "errors": 6, "finish_reason": "finished"}  # and robots.txt
    site.reload()
    assert site.job(job["identifier"]) == job


def test_real_statistics_logs_and_items_do_not_depend_on_how_a_project_logs(real, website, tmp_path):
    site = real(more="LOG_LEVEL = 'ERROR'\nSTATS_DUMP = False\nLOG_FORMATTER = 'scrapy.logformatter.LogFormatter'\n")
    own, dummy = tmp_path / "own.log", "STATS_CLASS=scrapy.statscollectors.DummyStatsCollector"
    wishes = [{}, {"items": "1"}, {"setting": f"LOG_FILE={own}"}, {"setting": dummy}, {"setting": "LOG_ENABLED=False"}]
    payload = json.dumps({"site": website, "word": "漢字"})
    jobs = [site.schedule("pages", payload=payload, **wish) for wish in wishes]
    done = [site.wait_job(job) for job in jobs]
    logs = [site.log(job) for job in jobs]
    assert {job["status"] for job in done} == {"SUCCESSFUL"}, logs
    right = {"items": 3, "responses": 3, "errors": 6, "finish_reason": "finished"}
    assert [job["stats"] for job in done[:4]] == [right, right, right, None]
    assert {**done[4]["stats"], "errors": None} == {**right, "errors": None}
    assert [log.count("Zażółć gęślą jaźń: 漢字") for log in logs] == [3, 3, 0, 3, 0]
    assert own.read_text().count("Zażółć") == 3
    lines = site.log(jobs[1], "out").splitlines()
    items = [json.loads(line) for line in lines if line.startswith("{")]
    titles = [f"Strona {number} – 頁" for number in (1, 2, 3)]
    assert [item["title"] for item in items] == titles
    assert "{" not in site.log(jobs[0], "out")
    for job in jobs:  # the project's own feed is kept
        assert [(item["title"], item["job"]) for item in feed_of(tmp_path, job)] == [(title, job) for title in titles]


def test_real_crawls_go_on_across_a_reload_and_flush_their_feeds_when_they_are_ended(real, website, tmp_path):
    site = real()
    wish = {"payload": json.dumps({"site": website})}
    canceled, late = site.schedule("slow", **wish), site.schedule("slow", timeout="3", **wish)
    for job in (canceled, late):
        wait_for(lambda job=job: "/slow/" in site.log(job))
    site.reload()
    seen = site.log(canceled).count("/slow/")
    wait_for(lambda: site.log(canceled).count("/slow/") > seen)
    site.post("cancel-job", id=canceled)
    for job, status, reason in ((canceled, "CANCELED", "canceled"), (late, "FAILED", "it ran longer than its timeout of 3 s")):
        done, log = site.wait_job(job), site.log(job)
        assert (done["status"], done["exit_code"], done["stats"]["finish_reason"]) == (status, 0, "shutdown"), log
        assert reason in done["reason"]
        assert "feeds may be" not in done["reason"]
        assert (log.count("Received SIGTERM"), log.count("Spider opened")) == (1, 1), log
        assert len(feed_of(tmp_path, job)) == done["stats"]["items"] > 0


LAUNCHERS = {
    "a shell script that stays": '#!/bin/sh\n"{scrapy}" "$@"\nexit $?\n',
    "a program that passes signals on": """#!{python}
import signal, subprocess, sys
crawl = subprocess.Popen(["{scrapy}", *sys.argv[1:]])
signal.signal(signal.SIGTERM, lambda number, frame: crawl.send_signal(number))
sys.exit(crawl.wait())
""",
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_real_crawl_behind_a_launcher_keeps_its_feed_when_it_is_canceled(real, website, tmp_path, name):
    scrapy = os.environ.get("REAL_SCRAPY", os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "scrapy"))
    if not os.path.exists(scrapy):
        pytest.skip("there is no script that starts Scrapy")
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHERS[name].format(scrapy=scrapy, python=sys.executable))
    launcher.chmod(0o755)
    site = real("--scrapy", str(launcher), "--kill-after", "20")
    job = site.schedule("slow", payload=json.dumps({"site": website}))
    wait_for(lambda: "/slow/" in site.log(job))
    site.post("cancel-job", id=job)
    canceled, log = site.job(job), site.log(job)
    assert (canceled["status"], canceled["stats"]["finish_reason"]) == ("CANCELED", "shutdown"), log
    assert (log.count("Received SIGTERM"), "Closing spider" in log) == (1, True), log
    assert len(feed_of(tmp_path, job)) == canceled["stats"]["items"] > 0
